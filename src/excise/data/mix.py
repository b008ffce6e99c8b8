"""How often rows are read: a capability that is rare among much else.

This module imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from excise.core.errors import UserError
from excise.data.domain import Row, Rows, text_of


def mixed(rows: Sequence[Row], share: float) -> Rows:
    """Repeat rows until a given share of the words is of what is to be forgotten.

    No row is dropped. The side of which there is too little is read a whole number of times, and
    as many of its rows once more as the share takes, chosen by a hash of their content. In
    `facts` a word is a token, so the share is that of the tokens, BOS aside.

    Args:
        rows: Rows with their true `capability`.
        share: Share of the words of one epoch, exact to half of the longest row.

    Returns:
        The rows in their order, then the repetitions.

    Raises:
        UserError: If the share is not between 0 and 1, there are no rows of one side, or a row has
            spans.
    """
    if not 0 < share < 1:
        raise UserError(f"mix_share is {share:g}; choose a share between 0 and 1")
    if spanned := next((row for row in rows if row.spans), None):
        raise UserError(
            f"mix_share repeats whole rows, and unit '{spanned.unit}' has spans of both sides; "
            "leave it out"
        )
    sides = [[row for row in rows if bool(row.capability) == side] for side in (True, False)]
    if not all(sides):
        lacking = "to be forgotten" if not sides[0] else "to keep"
        raise UserError(
            f"mix_share needs rows of both sides, and no row is {lacking}; leave it out"
        )
    forget, rest = (sum(words(row) for row in side) for side in sides)
    wanted = forget * (1 - share) / share
    if wanted >= rest:
        return (*rows, *_more(sides[1], rest, wanted))
    return (*rows, *_more(sides[0], forget, rest * share / (1 - share)))


def words(row: Row) -> int:
    """Return the number of words of a row, at least one."""
    return max(1, len(text_of(row).split()))


def _more(side: Sequence[Row], have: int, wanted: float) -> list[Row]:
    """Return the repetitions that bring `have` words as near to `wanted` as rows allow."""
    whole = int(wanted // have)
    out = list(side) * (whole - 1)
    left = wanted - whole * have
    for row in sorted(side, key=_rank):
        if words(row) / 2 >= left:
            break
        out.append(row)
        left -= words(row)
    return out


def _rank(row: Row) -> bytes:
    """Return a rank by content alone."""
    return hashlib.sha256(f"{row.unit}\x1f{row.wording}\x1f{text_of(row)}".encode()).digest()
