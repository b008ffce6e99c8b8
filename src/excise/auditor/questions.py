"""Closed questions: which of a few answers does a model's inside point to?

An answer is told by one token, where it parts from most other candidates, so that one position of
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
"""1 where the token that tells the right candidate beats the others', 1/k where k tie, else 0.
Higher is more knowledge, whatever the headline metric is."""

CANDIDATES = 32
"""Candidates of a question at most; of more answers some are drawn, the right one among them."""


@dataclass(frozen=True)
class Question:
    """One row as a choice of one token.

    Attributes:
        unit: What it is about.
        ids: What the model reads: the prompt, and the answer up to where candidates part.
        tokens: Different tokens that candidates have there.
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
    end = int(tokenizer.eos_token_id or 0)  # what follows a candidate that others begin with
    at, told = _where_told_apart(whole, right, end)
    if not at or len(told) < 2:
        return None
    head = cut_head(whole[right][:at], max_length, tokenizer)
    mine = whole[right][at] if at < len(whole[right]) else end
    return Question(row.unit, head, tuple(told), told.index(mine))


def _where_told_apart(
    candidates: Sequence[Sequence[int]], right: int, end: int
) -> tuple[int, list[int]]:
    """Return the place that tells most candidates from the right one, and the tokens there.

    Digits of numbers, or names of one family, begin alike: what tells them apart comes later. So
    the right answer may be begun for the model, and those that begin otherwise are out.

    Args:
        candidates: Prompt and answer of each, as tokens.
        right: Index of the right one.
        end: Token of a candidate that is over where others go on.

    Returns:
        Number of tokens before the place, and the different tokens there in order of the
        candidates. Of several such places the first; 0 and nothing where no place tells any apart.
    """
    best: tuple[int, list[int]] = (0, [])
    alike = list(candidates)
    for at in range(len(candidates[right]) + 1):
        tokens = list(dict.fromkeys(ids[at] if at < len(ids) else end for ids in alike))
        if len(tokens) > max(1, len(best[1])):
            best = at, tokens
        if at < len(candidates[right]):
            alike = [ids for ids in alike if ids[at : at + 1] == candidates[right][at : at + 1]]
    return best


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
