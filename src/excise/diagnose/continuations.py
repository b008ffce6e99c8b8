"""What both models say, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from excise.data.domain import Row
from excise.diagnose.activations import Pair
from excise.evals.generate import continuations
from excise.record import Sample


def side_by_side(
    pair: Pair, rows: Sequence[Row], *, role: str, name: str, max_new: int = 24
) -> tuple[Sample, ...]:
    """Continue the same prompts greedily with both models.

    Args:
        pair: The models.
        rows: A few rows; none gives no samples.
        role: Where they come from, `test` or `retain_test`.
        name: Name of the edited model.
        max_new: New tokens at most.

    Returns:
        One sample per row.
    """
    if not rows:
        return ()
    said = [
        continuations(model, pair.tokenizer, rows, max_length=pair.max_length, max_new=max_new)
        for model in (pair.original, pair.edited)
    ]
    return tuple(
        Sample(set=role, prompt=prompt, expected=expected, outputs={"original": one, name: two})
        for (prompt, expected, one), (_, _, two) in zip(*said, strict=True)
    )
