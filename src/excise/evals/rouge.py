"""ROUGE-L of a greedy answer: how much of the expected words it says, in their order.

ROUGE-L is Lin (2004), section 3: the longest common subsequence of words. Words are those of
`google-research/rouge` (`rouge_score` 0.1.2, `tokenize.py`): lower case, runs of a-z and 0-9. They
are not stemmed. The code of TOFU stems them (`use_stemmer=True`), which moves recall up where an
answer has another ending of the same word; that of MUSE does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from excise.core.errors import UserError
from excise.data.domain import Row
from excise.data.encoding import cut_head
from excise.data.stream import pair_of
from excise.evals.generate import Prompt, continue_greedily


@dataclass(frozen=True)
class RougeRule:
    """How an answer is drawn and compared.

    Attributes:
        definition: Versioned definition.
        new_tokens: Tokens of the answer at most.
        value: Which of the three numbers counts.
        stops: What ends an answer beside the end token.
        expected_tokens: Tokens of the expected text at most; 0 for all.
    """

    definition: str
    new_tokens: int
    value: Literal["recall", "f1"]
    stops: tuple[str, ...] = ()
    expected_tokens: int = 0


RULES: Final[Mapping[str, RougeRule]] = {
    "rouge_l": RougeRule(
        "rouge_l@1: ROUGE-L recall of at most 200 greedy tokens after the prompt against the "
        "expected text, words not stemmed; 0 to 1",
        200,
        "recall",
    ),
    "verbmem": RougeRule(
        "verbmem@1: ROUGE-L F-measure of 128 greedy tokens after the prompt against the first 128 "
        "tokens of the true continuation (MUSE); 0 to 1",
        128,
        "f1",
        expected_tokens=128,
    ),
    "knowmem": RougeRule(
        "knowmem@1: ROUGE-L F-measure of at most 32 greedy tokens, up to an empty line or the "
        "next question, against the expected answer (MUSE); 0 to 1",
        32,
        "f1",
        ("\n\n", "\nQuestion", "Question:"),
    ),
    "rwku_recall": RougeRule(
        "rwku_recall@1: ROUGE-L recall of the first line of at most 30 greedy tokens against the "
        "expected answer (RWKU); 0 to 1",
        30,
        "recall",
        ("\n",),
    ),
}
"""Metrics of generated answers."""


def words(text: str) -> list[str]:
    """Return the words that ROUGE compares: runs of a-z and 0-9 in lower case."""
    return re.findall(r"[a-z0-9]+", text.lower())


def common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for j, other in enumerate(second, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(said: str, expected: str) -> dict[str, float]:
    """Return `precision`, `recall` and `f1` of what was said; all 0 where no word is shared.

    Args:
        said: The answer.
        expected: The reference.
    """
    ours, theirs = words(said), words(expected)
    shared = common(ours, theirs)
    if not shared:
        return {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    precision, recall = shared / len(ours), shared / len(theirs)
    f1 = 2 * precision * recall / (precision + recall)
    return {"precision": precision, "recall": recall, "f1": f1}


def rouge_scores(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    rule: RougeRule,
    *,
    max_length: int = 128,
    batch_size: int = 64,
    device: torch.device | None = None,
) -> list[float]:
    """Answer every prompt greedily and compare.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        rows: Completions.
        rule: How answers are drawn and compared.
        max_length: Tokens of a prompt at most; it is cut on the left.
        batch_size: Rows at once.
        device: Where the inputs go; None takes the model's.

    Returns:
        One value per row, from 0 to 1; NaN where the model gives no numbers.

    Raises:
        UserError: If a row has another shape.
    """
    for row in rows:
        if row.kind != "completion":
            raise UserError(
                f"unit '{row.unit}' has no prompt and completion, which ROUGE needs; score it with "
                "text_loss"
            )
    prompts = [_prompt(row, tokenizer, rule, max_length) for row in rows]
    outputs = continue_greedily(model, tokenizer, prompts, batch_size=batch_size, device=device)
    return [
        math.nan
        if said is None
        else rouge_l(_until(said.lstrip(), rule.stops), prompt.expected)[rule.value]
        for said, prompt in zip(outputs, prompts, strict=True)
    ]


def _until(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of its stops."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _prompt(row: Row, tokenizer: Any, rule: RougeRule, max_length: int) -> Prompt:
    """Return the prompt of a completion, which takes no room from it, unlike in training."""
    pair = pair_of(row, tokenizer)
    expected = row.completion.strip()
    if rule.expected_tokens:
        tokens = tokenizer(expected, add_special_tokens=False)["input_ids"]
        expected = tokenizer.decode(tokens[: rule.expected_tokens], skip_special_tokens=True)
    return Prompt(
        cut_head(pair.head, max_length, tokenizer),
        row.prompt.rstrip(),
        expected,
        rule.new_tokens,
        pair.overlap,
    )
