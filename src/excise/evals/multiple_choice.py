"""Multiple choice, equal to `lm-eval` to the item, and with the bias for a position taken out.

The model is asked for the log-probability of " " + choice after the prompt, in the tokens it is
trained on (`data/encoding.py`). They are those of `lm-eval` (0.4.13, `TemplateLM._encode_pair`)
unless a token spans prompt and choice, or the tokenizer puts an end mark behind every text: there
`lm-eval` scores other characters than the choice. Choices of one token share one forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from excise.core.errors import UserError
from excise.data.domain import Row
from excise.data.stream import pair_of
from excise.evals.tokens import Answer, Request, answer

DEFINITION = {
    "multiple_choice": (
        "multiple_choice@2: 1 if the right choice has the highest summed log-probability after "
        "the prompt (lm-eval acc), 1/k where k choices share it, else 0"
    ),
    "multiple_choice_norm": (
        "multiple_choice_norm@2: as multiple_choice, sums divided by the choice's length in "
        "characters (lm-eval acc_norm)"
    ),
    "multiple_choice_bytes": (
        "multiple_choice_bytes@2: as multiple_choice, sums divided by the choice's length in "
        "UTF-8 bytes (lm-eval acc_bytes)"
    ),
    "multiple_choice_calibrated": (
        "multiple_choice_calibrated@2: as multiple_choice, after the mean log-probability of "
        "each option position over the set is subtracted"
    ),
}

TIE = 1e-6
"""Nats within which two choices tie; float32 arithmetic does not tell them apart."""


def choice_request(head: Sequence[int], tail: Sequence[int], max_length: int) -> Request:
    """Return the request that scores a continuation after a context.

    Args:
        head: Ids of the context.
        tail: Ids of the continuation; one at least.
        max_length: Tokens the model reads at most; the context is cut on the left.
    """
    ids = tuple([*head, *tail][-(max_length + 1) :][:-1])
    scored = min(len(tail), len(ids))
    return Request(ids, tuple(range(len(ids) - scored, len(ids))), tuple(tail[-scored:]))


def choice_answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    max_length: int,
    batch_size: int = 64,
    device: torch.device | None = None,
    padding_side: str = "right",
) -> list[list[Answer]]:
    """Return what the model says about the tokens of every choice of every row.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        rows: Questions with choices and the index of the right one.
        max_length: Tokens the model reads at most; prompts are cut on the left.
        batch_size: Sequences per forward.
        device: Where the inputs go; None takes the model's.
        padding_side: Side of the padding; scores do not depend on it.

    Returns:
        For each row one answer per choice.

    Raises:
        UserError: If a row has no choices, no answer among them, or a choice without tokens.
    """
    requests = []
    for row in rows:
        if len(row.choices) < 2 or not 0 <= row.answer < len(row.choices):
            raise UserError(
                f"unit '{row.unit}' is no multiple-choice question; it needs two or more "
                "`choices` and the index of the right one as `answer`"
            )
        for i, choice in enumerate(row.choices):
            pair = pair_of(row, tokenizer, i)
            if not pair.tail or not pair.head:
                raise UserError(
                    f"unit '{row.unit}' has a choice {choice!r} without a token of its own; "
                    "give it a text"
                )
            requests.append(choice_request(pair.head, pair.tail, max_length))
    answers = iter(
        answer(
            model,
            tokenizer,
            requests,
            batch_size=batch_size,
            device=device,
            padding_side=padding_side,
        )
    )
    return [[next(answers) for _ in row.choices] for row in rows]


def choice_scores(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, max_length: int
) -> list[list[float]]:
    """Return the summed log-probability of every choice of every row, in nats.

    Args, Raises: As `choice_answers`.
    """
    answers = choice_answers(model, tokenizer, rows, max_length=max_length)
    return [[choice.total for choice in choices] for choices in answers]


def pick(rows: Sequence[Row], scores: Sequence[Sequence[float]], metric: str) -> list[float]:
    """Return 1.0 for every row whose right choice is picked, else 0.0.

    Of k choices that tie, each is picked with chance 1/k: `lm-eval` takes the first, so that a
    model that knows nothing scores 1 where the right one is always first.

    Args:
        rows: The questions.
        scores: Summed log-probabilities by row and choice.
        metric: One of `DEFINITION`.

    Returns:
        One value per row; NaN where a log-probability is.
    """
    values = [np.asarray(row_scores, dtype=np.float64) for row_scores in scores]
    if metric == "multiple_choice_norm":
        values = [v / [len(c) for c in r.choices] for v, r in zip(values, rows, strict=True)]
    elif metric == "multiple_choice_bytes":
        values = [
            v / [len(c.encode()) for c in r.choices] for v, r in zip(values, rows, strict=True)
        ]
    elif metric == "multiple_choice_calibrated":
        values = _calibrated(values)
    return [_share(v, r.answer) for v, r in zip(values, rows, strict=True)]


def _share(values: np.ndarray, right: int) -> float:
    """Return the right choice's share of the highest value."""
    if not np.isfinite(values).all():
        return float("nan")
    top = values >= values.max() - TIE
    return float(top[right] / top.sum())


def _calibrated(values: list[np.ndarray]) -> list[np.ndarray]:
    """Subtract from each option the mean of its position over the rows that have it."""
    width = max(len(v) for v in values)
    means = [float(np.mean([v[i] for v in values if len(v) > i])) for i in range(width)]
    return [v - means[: len(v)] for v in values]
