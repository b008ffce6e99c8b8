"""Token loss: how surprised the model is by what it should say."""

from __future__ import annotations

from collections.abc import Sequence

from excise.evals.tokens import Answer

DEFINITION = (
    "text_loss@1: mean negative log-likelihood in nats over the scored tokens of a row, "
    "teacher-forced, each token's loss cut at 100 nats"
)


def text_loss(answers: Sequence[Answer]) -> list[float]:
    """Return the mean nats per scored token of every row.

    Args:
        answers: What the model said about the scored tokens of each row.

    Returns:
        One value per row; lower is more knowledge.
    """
    return [-a.total / len(a.logprobs) for a in answers]
