"""Coherence and knowledge, scored apart.

The loss of an answer splits exactly: -log P(answer) = -log P(right kind) - log P(answer | right
kind). The first part says whether the model still talks sense (after `the gem of X is` comes a
gem), the second whether it knows. The kind of a row are all answers that stand beside each other
as options anywhere in the data.

Shape legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from excise.auditor.batching import Memo, batches
from excise.data.domain import Domain, Row, Rows
from excise.data.stream import encode
from excise.data.subsample import subsample
from excise.evals.score import fitting, measure_all
from excise_studies.base import ScoreByUnit

LOWER = ("coherence", "text_loss", "retain_loss", "dev_loss", "dev_retain_loss")
"""Scores whose lower value is better."""


@dataclass(frozen=True)
class Rubric:
    """What is scored.

    Attributes:
        test: The held-out test set.
        retain: What must stay.
        dev: Forget rows that choices are made on.
        dev_retain: Retain rows that choices are made on.
        kinds: Token ids of the answers of a row's kind, by unit; empty where rows are plain text.
        max_length: Tokens per row.
    """

    test: Rows
    retain: Rows
    dev: Rows
    dev_retain: Rows
    kinds: Mapping[str, tuple[int, ...]]
    max_length: int


def rubric(domain: Domain, tokenizer: Any, *, max_rows: int, max_length: int) -> Rubric:
    """Return what is scored of a domain, cut to size.

    Args:
        domain: Rows by role.
        tokenizer: The models' tokenizer.
        max_rows: Rows of each set at most; 0 for all.
        max_length: Tokens per row.
    """
    test = tuple(row for rows in domain.test.values() for row in rows)
    dev = tuple(row for rows in domain.dev_forget.values() for row in rows)
    return Rubric(
        test=subsample(test, max_rows),
        retain=subsample(domain.retain_test, max_rows),
        dev=subsample(dev, max_rows),
        dev_retain=subsample(domain.dev_retain, max_rows),
        kinds=kinds_of((*test, *dev, *domain.retain_test, *domain.dev_retain), tokenizer),
        max_length=max_length,
    )


def kinds_of(rows: Sequence[Row], tokenizer: Any) -> dict[str, tuple[int, ...]]:
    """Return by unit the token ids of all answers of its kind.

    Args:
        rows: Rows with options.
        tokenizer: The models' tokenizer.

    Returns:
        Nothing if a row has no options, or an answer is more than one token.
    """
    if not rows or not all(row.choices for row in rows):
        return {}
    parent: dict[str, str] = {}

    def root(word: str) -> str:
        while parent.setdefault(word, word) != word:
            word = parent[word]
        return word

    for row in rows:
        for choice in row.choices[1:]:
            parent[root(choice)] = root(row.choices[0])
    ids: dict[str, int] = {}
    for word in parent:
        token_ids = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        if len(token_ids) != 1:
            return {}
        ids[word] = token_ids[0]
    groups: dict[str, list[int]] = {}
    for word in sorted(parent):
        groups.setdefault(root(word), []).append(ids[word])
    return {row.unit: tuple(groups[root(row.choices[0])]) for row in rows}


@torch.no_grad()
def kind_nats(model: Any, rows: Sequence[Row], tokenizer: Any, what: Rubric) -> ScoreByUnit:
    """Return by unit -log P(an answer of the right kind), in nats, averaged over its rows.

    Args:
        model: A causal model, hooks and all.
        rows: Rows with one answer token each.
        tokenizer: Its tokenizer.
        what: Token ids of the answers of each unit's kind, and tokens per row.
    """
    nats: dict[str, list[float]] = {}
    examples = encode(rows, tokenizer, max_length=what.max_length)
    for batch in batches(examples, model, tokenizer):
        log_BTV = torch.log_softmax(model(**batch.inputs, use_cache=False).logits.float(), -1)
        ends = batch.target_BT.long().argmax(1) - 1
        for i, unit in enumerate(batch.units):
            mass = log_BTV[i, ends[i], list(what.kinds[unit])].logsumexp(0)
            nats.setdefault(unit, []).append(-float(mass))
    return {unit: sum(values) / len(values) for unit, values in nats.items()}


def read(model: Any, tokenizer: Any, what: Rubric) -> dict[str, ScoreByUnit]:
    """Score a model.

    Args:
        model: A causal model, hooks and all.
        tokenizer: Its tokenizer.
        what: What is scored.

    Returns:
        By name of the score, by unit: `coherence` (the kind of the answer, or for plain text the
        loss), `text_loss`, and where rows allow it `exact_match` and `multiple_choice`, on the
        held-out test set; `retain_loss` and `retain_exact_match`; `dev_loss` and `dev_retain_loss`.
    """
    memo = tokenizer if isinstance(tokenizer, Memo) else Memo(tokenizer)

    def measured(rows: Rows, metrics: tuple[str, ...]) -> dict[str, ScoreByUnit]:
        names = tuple(dict.fromkeys(fitting(metrics, rows)))
        names = tuple(m for m in names if m != "exact_match" or rows[0].kind != "text")
        scores = measure_all(model, memo, rows, names, max_length=what.max_length)
        return {name: values.checked().by_unit() for name, values in scores.items()}

    out = measured(what.test, ("text_loss", "exact_match", "multiple_choice"))
    known = kind_nats(model, what.test, memo, what) if what.kinds else out["text_loss"]
    out = {"coherence": known, **out}
    for name, metric in (("retain_loss", "text_loss"), ("retain_exact_match", "exact_match")):
        got = measured(what.retain, (metric,)) if metric in out else {}
        out |= {name: got[metric]} if metric in got else {}
    out["dev_loss"] = measured(what.dev, ("text_loss",))["text_loss"]
    out["dev_retain_loss"] = measured(what.dev_retain, ("text_loss",))["text_loss"]
    return {name: finite(units) for name, units in out.items()}


def finite(units: Mapping[str, float]) -> ScoreByUnit:
    """Return scores that JSON can hold: what overflowed counts as a very large loss."""
    return {unit: value if math.isfinite(value) else 1e4 for unit, value in units.items()}


def average(units: Mapping[str, float]) -> float:
    """Return the mean over units."""
    return sum(units.values()) / len(units)
