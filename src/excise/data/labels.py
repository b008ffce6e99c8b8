"""What a training-time method is told, and how that differs from the truth.

The truth is `row.capability` and is never changed here; what is told is `row.label`. Labels are
missed in two ways that behave differently: missed *occurrences* leave other rows of the same unit
labelled, missed *units* leave none. Misses can also follow a topic or a style, which no rate
describes. A labeller may say how sure it is (`confidence.py`). This module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, field_validator

from excise.core.config import Config
from excise.core.errors import UserError, nearest
from excise.data.confidence import Confidence, confidences
from excise.data.domain import CORE, UNLABELED, Row, Rows, content_of
from excise.data.texts import text_of

Rate = Annotated[float, Field(ge=0.0, le=1.0)]


class LabelNoise(Config):
    """How the labels one has differ from the truth. Rates are met exactly, up to rounding."""

    missed_units: Rate = 0.0
    """Share of each capability's units of which no row is labelled."""
    missed_occurrences: Rate = 0.0
    """Share of the rows of the other units that are not labelled, each row by itself."""
    missed_wordings: tuple[int, ...] = ()
    """Structured miss: wordings the labeller does not recognise."""
    missed_groups: tuple[str, ...] = ()
    """Structured miss: groups (authors, topics) the labeller does not know of."""
    missed_pattern: str = ""
    """Structured miss: rows whose text matches this regular expression (a topic, a style)."""
    structured_rate: Rate = 1.0
    """Share of the rows that fit a structured miss which are really missed."""
    false_alarms: Rate = 0.0
    """Share of the core rows that are labelled as some capability."""
    missed_as: Literal["core", "unlabeled"] = "core"
    """What is told of a missed row: that it is core, or nothing."""
    unread_core: Rate = 0.0
    """Share of the core rows that nobody has looked at, so that nothing is told of them. With
    `missed_as` 'unlabeled' labels are few but sure, and what has none is not given away by it."""
    spread: Literal["no", "unit", "group"] = "no"
    """Whether a label spreads to all rows of its unit, or of its group, before labels are used."""
    confidence: Confidence | None = None
    """How sure the labeller says it is of each label; missing means certain of every one."""

    @field_validator("missed_pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        """Refuse what is not a regular expression."""
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return value


def label_rows(rows: Iterable[Row], capabilities: Sequence[str]) -> Rows:
    """Tell the truth: core rows get `CORE`, rows of capability i get i + 1.

    Args:
        rows: Rows with their true `capability`.
        capabilities: Names, in the order that numbers them.

    Returns:
        The rows with `label` set.

    Raises:
        UserError: If a row has a capability that is not among them.
    """
    numbers = {"": CORE, **{name: i + 1 for i, name in enumerate(capabilities)}}
    told = []
    for row in rows:
        if row.capability not in numbers:
            raise UserError(
                f"unit '{row.unit}' has the unknown capability '{row.capability}'; "
                + nearest(row.capability, capabilities)
            )
        told.append(replace(row, label=numbers[row.capability]))
    return tuple(told)


def tell_labels(rows: Sequence[Row], noise: LabelNoise, *, seed: int) -> Rows:
    """Return the rows with labels as an imperfect labeller gives them.

    Which rows are missed depends on their content and the seed alone, never on their order.
    Rows that nobody has looked at (`UNLABELED`) stay so.

    Args:
        rows: Rows whose `label` tells the truth (`label_rows`).
        noise: How labels differ from it.
        seed: Seed of the draw.

    Returns:
        The same rows in the same order, `capability` untouched.
    """
    keys = _row_keys(rows)
    missed = _missed(rows, keys, noise, seed)
    alarms = _alarms(rows, keys, noise, seed)
    core = {keys[i]: i for i, row in enumerate(rows) if row.label == CORE and not row.capability}
    unread = {core[key] for key in _pick(core, noise.unread_core, seed, "unread")}
    told_missed = CORE if noise.missed_as == "core" else UNLABELED
    out = []
    for i, row in enumerate(rows):
        known = UNLABELED if i in unread else row.label
        label = told_missed if i in missed else alarms.get(i, known)
        out.append(row if label == row.label else replace(row, label=label))
    if noise.confidence is None:
        return _spread(out, noise)
    right = [told.label == row.label for told, row in zip(out, rows, strict=True)]
    sure = confidences([row.label for row in out], right, keys, noise.confidence, seed=seed)
    return _spread([replace(row, confidence=c) for row, c in zip(out, sure, strict=True)], noise)


def _spread(rows: Sequence[Row], noise: LabelNoise) -> Rows:
    """Return the rows, labels spread as the noise says."""
    return tuple(rows) if noise.spread == "no" else propagated(rows, by=noise.spread)


def suspicion(row: Row) -> float:
    """Return the probability, as the labeller told it, that a row is of some capability.

    Rows that nobody has looked at have none: 0.
    """
    if row.label == UNLABELED:
        return 0.0
    return row.confidence if row.label > CORE else 1.0 - row.confidence


def propagated(
    rows: Sequence[Row], *, by: Literal["unit", "group"] = "unit", at_least: int = 1
) -> Rows:
    """Give all rows of a unit the label that enough of its rows carry.

    Args:
        rows: Rows with the labels one has; a label counts where it is likely right.
        by: What shares a label. A row without a group stands alone.
        at_least: Labelled rows that it takes.

    Returns:
        The rows in their order. Of several capabilities the most frequent wins, of two equally
        frequent the first in number; a row that is likely labelled right by itself stays so.
    """
    seen: dict[str, Counter[int]] = defaultdict(Counter)
    for row in rows:
        if row.label > CORE and suspicion(row) > 0.5:
            seen[_shared(row, by)][row.label] += 1
    spread = {
        key: min(votes, key=lambda label: (-votes[label], label))
        for key, votes in seen.items()
        if votes.total() >= at_least
    }
    out = []
    for row in rows:
        known = row.label > CORE and suspicion(row) > 0.5
        label = None if known else spread.get(_shared(row, by))
        out.append(row if label is None else replace(row, label=label, confidence=1.0))
    return tuple(out)


def _shared(row: Row, by: Literal["unit", "group"]) -> str:
    return f"group:{row.group}" if by == "group" and row.group else f"unit:{row.unit}"


def label_quality(rows: Iterable[Row]) -> Mapping[str, float]:
    """Return how good the told labels are, measured against the true ones.

    Args:
        rows: Rows with `capability` (truth) and `label` (told).

    Returns:
        `occurrences`: share of forget rows labelled; `units`: share of forget units with at least
        one labelled row; `false_alarms`: share of core rows labelled. NaN where there are none.
        Unlabelled rows are part of none.
    """
    forget: list[bool] = []
    core: list[bool] = []
    units: dict[tuple[str, str], bool] = {}
    for row in rows:
        if row.capability:
            forget.append(row.label > CORE)
            key = (row.capability, row.unit)
            units[key] = units.get(key, False) or row.label > CORE
        elif row.label != UNLABELED:
            core.append(row.label > CORE)
    return {
        "occurrences": _mean(forget),
        "units": _mean(list(units.values())),
        "false_alarms": _mean(core),
    }


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _row_keys(rows: Sequence[Row]) -> list[str]:
    """Return a key per row that depends on its content; equal rows are counted."""
    told = {"label", "confidence"}
    made: dict[Row, str] = {}
    seen: Counter[str] = Counter()
    keys = []
    for row in rows:
        if row not in made:
            content = {k: v for k, v in content_of(row).items() if k not in told}
            made[row] = json.dumps(content, sort_keys=True)
        text = made[row]
        keys.append(f"{text}#{seen[text]}")
        seen[text] += 1
    return keys


def _pick(keys: Iterable[str], rate: float, seed: int, purpose: str) -> set[str]:
    """Return `round(rate * n)` of the keys: those with the smallest seeded hashes."""
    ranked = sorted(
        set(keys), key=lambda k: hashlib.sha256(f"{seed}:{purpose}:{k}".encode()).digest()
    )
    return set(ranked[: round(rate * len(ranked))])


def _missed(rows: Sequence[Row], keys: Sequence[str], noise: LabelNoise, seed: int) -> set[int]:
    """Return the indices of labelled rows that the labeller misses."""
    by_capability: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row.label > CORE:
            by_capability[row.capability].append(i)
    missed: set[int] = set()
    for name, indices in by_capability.items():
        units = _pick({rows[i].unit for i in indices}, noise.missed_units, seed, f"units:{name}")
        fits = {keys[i] for i in indices if _structured(rows[i], noise)}
        unseen = _pick(fits, noise.structured_rate, seed, f"structured:{name}")
        rest = {keys[i] for i in indices if rows[i].unit not in units}
        slips = _pick(rest, noise.missed_occurrences, seed, f"occurrences:{name}")
        missed |= {
            i for i in indices if rows[i].unit in units or keys[i] in unseen or keys[i] in slips
        }
    return missed


def _structured(row: Row, noise: LabelNoise) -> bool:
    """Whether a row fits one of the structured misses."""
    if row.wording in noise.missed_wordings or row.group in noise.missed_groups:
        return True
    return bool(noise.missed_pattern) and bool(re.search(noise.missed_pattern, text_of(row)))


def _alarms(
    rows: Sequence[Row], keys: Sequence[str], noise: LabelNoise, seed: int
) -> dict[int, int]:
    """Return index -> wrong label of core rows that are taken for a capability."""
    numbers = sorted({row.label for row in rows if row.label > CORE})
    if not numbers or not noise.false_alarms:
        return {}
    core = {keys[i]: i for i, row in enumerate(rows) if row.label == CORE and not row.capability}
    picked = sorted(_pick(core, noise.false_alarms, seed, "alarms"))
    out = {}
    for key in picked:
        digest = hashlib.sha256(f"{seed}:which:{key}".encode()).digest()
        out[core[key]] = numbers[digest[0] % len(numbers)]
    return out
