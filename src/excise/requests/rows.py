"""A request against the rows it is about, before any work starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from excise.auditor.evaluation_set import evaluation_set
from excise.data.domain import Domain, Rows
from excise.data.labels import label_rows, labels_from_file
from excise.data.stream import encode
from excise.data.subsample import subsample
from excise.methods.base import Method, methods_in
from excise.methods.pretraining.pretrain import corpus
from excise.methods.tuning import forget_rows
from excise.requests.audit import AuditRun
from excise.requests.recipe import Recipe, budget_for, starts_from


def check_rows(request: Recipe | AuditRun, domain: Domain, tokenizer: Any) -> tuple[str, ...]:
    """Refuse what scores and methods would refuse of the rows once models were trained.

    Args:
        request: What is run.
        domain: Its rows.
        tokenizer: The model's; of None nothing is asked of tokens.

    Returns:
        Notes on what files of labels have of the rows.

    Raises:
        UserError: If a row that is scored or relearned has no labelled token within the length that
            is read of it, or a file of labels does not fit the rows of its method.
    """
    if tokenizer is not None:
        for rows, length in _read(request, domain, tokenizer):
            spanned = [row for row in rows if row.spans]
            encode(spanned, tokenizer, max_length=length, only_spans=True)
    arms = request.arms if isinstance(request, Recipe) else {}
    return tuple(
        note
        for name, arm in arms.items()
        for method in methods_in(arm)
        for note in _said_of_file(name, method, domain)
    )


def _read(request: Recipe | AuditRun, domain: Domain, tokenizer: Any) -> Iterator[tuple[Rows, int]]:
    """Yield rows of which labelled tokens alone are scored or relearned, and the tokens read."""
    for rows in (*domain.test.values(), *domain.dev_forget.values()):
        yield subsample(rows, request.evaluate.max_rows), request.evaluate.max_length
    if request.audit.budget != "none":
        drawn = evaluation_set(domain, budget_for(request.audit, 0), tokenizer)
        for rows in (*drawn.test.values(), *drawn.dev.values(), *domain.relearn.values()):
            yield rows, drawn.max_length


def _said_of_file(name: str, method: Method, domain: Domain) -> tuple[str, ...]:
    """Return how many rows of a method its file of labels has, where it has one."""
    labels = getattr(method, "labels", None)
    if labels is None or not labels.file:
        return ()
    rows = (
        corpus(domain)
        if starts_from(method) == "scratch"
        else label_rows((*forget_rows(domain), *domain.retain), tuple(domain.forget))
    )
    _, found = labels_from_file(rows, labels)
    rest = f"; the others are {labels.not_in_file}" if found < len(rows) else ""
    return (f"{name}: labels.file has {found:,} of {len(rows):,} texts{rest}",)
