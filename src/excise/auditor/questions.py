"""Closed questions: which of a few answers does a model's inside point to?

An answer is told by the token where it parts from the other candidates, so that one position of
one pass serves all of them. Candidates of a question are its choices; of a completion, answers of
its own set.

Shape legend: Q questions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from excise.core.errors import NotFinite
from excise.data.domain import Row
from excise.data.encoding import cut_head, encode_pair
from excise.data.stream import pair_of

METRIC = "candidate_choice"
"""1 where the right candidate's first distinct token beats the others', 1/k where k tie, else 0.
Higher is more knowledge, whatever the headline metric is."""

CANDIDATES = 32
"""Candidates of a question at most; of more answers some are drawn, the right one among them."""


@dataclass(frozen=True)
class Question:
    """One row as a choice of one token.

    Attributes:
        unit: What it is about.
        ids: What the model reads: the prompt, up to where the candidates part.
        tokens: Token of every candidate there.
        right: Index of the right one.
    """

    unit: str
    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    right: int

    @property
    def answer(self) -> int:
        """Token of the right candidate."""
        return self.tokens[self.right]


def questions_of(
    rows: Mapping[str, Sequence[Row]],
    tokenizer: Any,
    *,
    max_length: int,
    generator: torch.Generator,
) -> list[Question]:
    """Return the rows that can be asked: choices, and completions of a set of several answers.

    Args:
        rows: By capability; a completion's candidates are the answers of its capability here.
        tokenizer: The subject's tokenizer.
        max_length: Tokens of a prompt; it is cut on the left.
        generator: Draws candidates where there are more than `CANDIDATES`.

    Returns:
        The questions, in the order of the rows; none for plain texts and conversations.
    """
    asked = []
    for part in rows.values():
        answers = list(dict.fromkeys(row.completion for row in part if row.kind == "completion"))
        for row in part:
            question = _question(row, answers, tokenizer, max_length, generator)
            if question is not None:
                asked.append(question)
    return asked


def _question(
    row: Row, answers: list[str], tokenizer: Any, max_length: int, generator: torch.Generator
) -> Question | None:
    """Return a row as a question; None where nothing tells its candidates apart."""
    if row.kind == "choice" and row.answer >= 0:
        pairs, right = [pair_of(row, tokenizer, i) for i in range(len(row.choices))], row.answer
    elif row.kind == "completion" and len(answers) > 1:
        others = [answer for answer in answers if answer != row.completion]
        drawn = torch.randperm(len(others), generator=generator)[: CANDIDATES - 1].tolist()
        texts = [row.completion, *(others[i] for i in sorted(drawn))]
        pairs, right = [encode_pair(row.prompt, text, tokenizer) for text in texts], 0
    else:
        return None
    whole = [pair.head + pair.tail for pair in pairs]
    apart = (i for i, ids in enumerate(zip(*whole, strict=False)) if len(set(ids)) > 1)
    at = next(apart, min(map(len, whole)))
    end = int(tokenizer.eos_token_id or 0)  # what follows a candidate that others begin with
    tokens = tuple(ids[at] if at < len(ids) else end for ids in whole)
    if not at or len(set(tokens)) < 2:
        return None
    return Question(row.unit, cut_head(whole[0][:at], max_length, tokenizer), tokens, right)


def choice_scores(
    questions: Sequence[Question], logits_QV: Float[Tensor, "Q V"]
) -> tuple[dict[str, float], float]:
    """Score what a readout says at the questions.

    Args:
        questions: Q of them.
        logits_QV: Its scores of every token, one row a question.

    Returns:
        Score by unit (see `METRIC`), and the mean rank of the right candidate, 0 the first.

    Raises:
        NotFinite: If the readout gives no numbers.
    """
    broken = sum(
        not bool(logits_V[list(question.tokens)].isfinite().all())
        for question, logits_V in zip(questions, logits_QV, strict=True)
    )
    if broken:
        raise NotFinite("the model", METRIC, broken, len(questions))
    by_unit: dict[str, list[float]] = {}
    ranks = 0.0
    for question, logits_V in zip(questions, logits_QV.float(), strict=True):
        scores = logits_V[list(question.tokens)]
        right = scores[question.right]
        above, level = int((scores > right).sum()), int((scores == right).sum())
        by_unit.setdefault(question.unit, []).append(0.0 if above else 1 / level)
        ranks += above + (level - 1) / 2
    units = {unit: sum(values) / len(values) for unit, values in by_unit.items()}
    return units, ranks / max(1, len(questions))
