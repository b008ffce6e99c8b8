"""The same by word: a labeller that never saw a document's labels labels its words.

Documents of one group (or unit) share a fold, and so do equal texts, so that a missed document
cannot teach the labeller that its words are core.

Shape legend: N words, K classes (core and every capability).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Row, Rows
from excise.labelling.head import verdict
from excise.labelling.labeller import (
    AnyLabeller,
    open_reader,
    read_inputs,
    reading_flops,
    scores_of,
    train,
)
from excise.labelling.words import (
    Document,
    SplitBy,
    document_of,
    documents_of,
    labelled,
    ranked,
    split_keys,
)
from excise.methods.pretraining.relabel.probe import ThresholdRule, agreement, choose_threshold
from excise.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class WordJudgement:
    """What a labeller says of every word, out of fold.

    Attributes:
        documents: Rows as words.
        chances: Probability of being of some capability, of the words of each.
        labels: The capability that is most likely, from 1.
        threshold: Probability above which a word is taken for forget.
        held_out: Precision, recall and F1 on labelled words, judged by their labels.
        verdict: A sentence where it finds nothing or everything; else empty.
        flops: Floating-point operations of training and reading.
    """

    documents: Sequence[Document]
    chances: Sequence[Tensor]
    labels: Sequence[Tensor]
    threshold: float
    held_out: Mapping[str, float]
    verdict: str
    flops: float


def judge_words(
    rows: Sequence[Row],
    labeller: AnyLabeller,
    classes: int,
    ctx: Context,
    *,
    model: Checkpoint | None,
    folds: int,
    by: SplitBy,
    rule: ThresholdRule,
    fixed: float,
    seed: int,
) -> WordJudgement:
    """Score every word by a labeller that never saw its document, and choose the threshold.

    Args:
        rows: All rows with the given labels; words nobody has looked at are scored only.
        labeller: What is trained for each fold.
        classes: Core and every capability.
        ctx: Seed, device and folder.
        model: What `states` reads.
        folds: Number of folds.
        by: What must not be on both sides of a fold.
        rule: How the threshold is chosen; see `probe.judge`.
        fixed: The threshold of `fixed`.
        seed: Seed of the folds.

    Raises:
        UserError: If there are too few labelled words for the folds, or rows have no words.
    """
    asked = next((row for row in rows if row.kind == "choice"), None)
    if asked is not None:
        raise UserError(
            f"relabel.features '{labeller.name}' labels words, and unit '{asked.unit}' is a "
            "multiple-choice question; use features 'tokens' or 'hidden'"
        )
    documents = documents_of(dict.fromkeys(rows))
    keys = split_keys([document.row for document in documents], by)
    fold = {key: i % folds for i, key in enumerate(ranked(keys, seed, "fold"))}
    reader = open_reader(labeller, model, ctx)
    inputs, tokens = read_inputs(labeller, documents, reader)
    flops = reader.flops_per_token * tokens if reader else 0.0
    scores: list[Tensor | None] = [None] * len(documents)
    for number in range(folds):
        here = [i for i, key in enumerate(keys) if fold[key] == number]
        others = [i for i, key in enumerate(keys) if fold[key] != number]
        known = [i for i in others if any(n != UNLABELED for n in documents[i].labels)]
        _check(known, documents, number, folds)
        trained = train(
            labeller,
            [documents[i] for i in known],
            [documents[i] for i in others if i not in {*known}],
            classes,
            ctx.child(f"fold-{number}"),
            inputs and [inputs[i] for i in known],
        )
        chosen = [documents[i] for i in here]
        said = scores_of(
            labeller, trained.weights, chosen, ctx, inputs and [inputs[i] for i in here]
        )
        words = sum(len(document.words) for document in chosen)
        flops += trained.flops + words * reading_flops(labeller, classes, chosen)
        for i, scores_NK in zip(here, said, strict=True):
            scores[i] = scores_NK
    found = [part.double().softmax(dim=1) for part in scores if part is not None]
    chances = [1.0 - part[:, CORE] for part in found]
    given_N = torch.tensor([n for document in documents for n in document.labels])
    chance_N, known_N = torch.cat(chances), given_N != UNLABELED
    threshold = choose_threshold(chance_N, given_N > CORE, known_N, rule, fixed)
    forget_N = given_N[known_N] > CORE
    return WordJudgement(
        documents,
        chances,
        [part[:, 1:].argmax(dim=1) + 1 for part in found],
        threshold,
        agreement(chance_N[known_N] > threshold, forget_N),
        verdict(chance_N[known_N], forget_N, threshold),
        flops,
    )


def _check(known: Sequence[int], documents: Sequence[Document], number: int, folds: int) -> None:
    """Refuse a fold outside of which one side has no labelled word."""
    there = {n > CORE for i in known for n in documents[i].labels if n != UNLABELED}
    if len(there) < 2:
        raise UserError(
            f"relabel finds no labelled {'core' if True in there else 'forget'} word outside fold "
            f"{number} of {folds}; lower 'folds' or label more rows"
        )


def relabel_words(
    rows: Sequence[Row], judgement: WordJudgement, *, clear: float = 0.0
) -> tuple[Rows, dict[str, float | int | None]]:
    """Return the rows, words above the threshold labelled, and how good that is by the truth.

    Labels of capabilities that exist stay.

    Args:
        rows: Rows with the given labels.
        judgement: What the labeller says of their words.
        clear: Share of the threshold below which words without a label are labelled core.

    Returns:
        The rows, and for the record of words `labelled`: how many are newly labelled; `precision`:
        the share of these that is forget; `recall`: the share of the missed forget words that was
        found (None where there are none).
    """
    now: dict[Row, Row] = {}
    new = right = missed = 0
    for document, chance_N, label_N in zip(
        judgement.documents, judgement.chances, judgement.labels, strict=True
    ):
        labels: list[int | None] = [None] * len(document.words)
        truth = document_of(_true(document.row)).labels
        scored = zip(document.labels, chance_N.tolist(), label_N.tolist(), truth, strict=True)
        for i, (given, chance, label, true) in enumerate(scored):
            missed += bool(true) and given <= CORE
            if given <= CORE and chance > judgement.threshold:
                labels[i] = label
                new, right = new + 1, right + bool(true)
            elif given == UNLABELED and chance < clear * judgement.threshold:
                labels[i] = CORE
        changed = any(label is not None for label in labels)
        certain = [1.0] * len(labels)
        now[document.row] = labelled(document, labels, certain) if changed else document.row
    facts: dict[str, Any] = {
        "labelled": new,
        "precision": right / new if new else None,
        "recall": right / missed if missed else None,
    }
    return tuple(now[row] for row in rows), facts


def _true(row: Row) -> Row:
    """Return a row whose label is 1 wherever it teaches a capability."""
    spans = tuple(
        replace(span, label=int(bool(span.capability)), confidence=1.0) for span in row.spans
    )
    label = CORE if spans else int(bool(row.capability))
    return replace(row, label=label, confidence=1.0, spans=spans)
