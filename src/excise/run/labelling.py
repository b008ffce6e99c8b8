"""From a few labels to a file of labels for all rows: what `excise label` does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from excise.core.disk import clone_file, file_sum, part_of, write_text
from excise.core.errors import UserError, counted, nearest
from excise.core.events import Emit
from excise.data.domain import UNLABELED, Domain, Row, Rows, labelled_text
from excise.data.labels import label_rows
from excise.data.sources import parse_source, read_source
from excise.data.subsample import subsample
from excise.data.units import give_units, left_out
from excise.fetch.model import open_model
from excise.labelling.labeller import FACTS, WEIGHTS
from excise.labelling.stages import LABELS, FitLabeller, LabelledRows, LabelRows
from excise.requests.labelling import LabelRun
from excise.run import output


def label(request: LabelRun, out: Path, *, emit: Emit) -> dict[str, Any]:
    """Train a labeller and let it label all words that have no label.

    Args:
        request: Labels, texts, labeller.
        out: Output folder: `labels.jsonl`, `labeller.json`, `labeller.safetensors`. Labels that
            were edited there stay.
        emit: Sink of progress events.

    Returns:
        What `labeller.json` says.

    Raises:
        UserError: If the data cannot be read or too little of it is labelled.
    """
    with output.claim(out, request):
        runtime = output.runtime(out, request.dtype, request.device, emit)
        emit("phase", {"text": "reading the data"})
        given = given_rows(request, emit)
        model = open_model(request.model) if request.model.path else None
        if model is not None and request.labeller.name != "states":
            raise UserError(
                f"labeller '{request.labeller.name}' reads no model; leave --model out, or take "
                "--labeller states"
            )
        fit = FitLabeller(request.labeller, given, model, request.seed)
        labels = runtime.run(LabelRows(fit))
        fitted = runtime.run(fit)
        facts = dict(fitted.facts)
        if request.domain is not None:
            facts["unlabelled_truth"] = dict(labels.quality)
        _copy(runtime.path(fit) / WEIGHTS, out / WEIGHTS)
        write_text(out / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        edited = (out / LABELS).exists() and file_sum(out / LABELS) != file_sum(labels.path)
        if edited:
            text = f"{out / LABELS} was changed and stays; remove it to have it written again"
            emit("note", {"text": text})
        else:
            _copy(labels.path, out / LABELS)
    emit("done", {"out": str(out)})
    return facts


def _copy(source: Path, to: Path) -> None:
    """Copy a file whole or not at all."""
    part = part_of(to)
    clone_file(source, part)
    part.replace(to)


def given_rows(request: LabelRun, emit: Emit) -> LabelledRows:
    """Return the rows of a request with the labels that the labeller is given.

    Args:
        request: Names files or a domain.
        emit: Gets notes on rows that cannot be labelled by word.

    Raises:
        UserError: If nothing is labelled, or nothing is to be.
    """
    if request.domain is None:
        rows, names = _from_files(request, emit)
    else:
        rows, names = _from_domain(request.domain.build(None), request)
    asked = sum(1 for row in rows if row.kind == "choice")
    if asked:
        text = f"{counted(asked, 'multiple-choice question')} cannot be labelled by word: left out"
        emit("note", {"text": text})
        rows = tuple(row for row in rows if row.kind != "choice")
    if not any(row.label == UNLABELED for row in rows):
        raise UserError(
            "every row has a label already, and none is left to be labelled; "
            + ("give --documents, the number of labels" if request.domain else "give --unlabeled")
        )
    return LabelledRows(rows, names)


def _from_files(request: LabelRun, emit: Emit) -> tuple[Rows, tuple[str, ...]]:
    """Return the rows of files, those of `unlabeled` without a label but for their spans."""
    specs = {f"labels {i + 1}": spec for i, spec in enumerate(request.labels)}
    specs |= {f"unlabeled {i + 1}": spec for i, spec in enumerate(request.unlabeled)}
    sources = {name: read_source(parse_source(spec)) for name, spec in specs.items()}
    left = [note for name, source in sources.items() for note in left_out(name, source)]
    sets, notes = give_units(sources)
    for note in (*left, *notes):
        emit("note", {"text": note})
    known, rest = (
        [m.row for name, members in sets.items() if name.startswith(role) for m in members]
        for role in ("labels", "unlabeled")
    )
    named = {row.capability for row in known} | {s.capability for row in known for s in row.spans}
    names = tuple(sorted(named - {""}))
    if not names:
        raise UserError(
            f"{request.labels[0]} labels nothing as a capability; give rows 'spans' or a "
            "'capability'"
        )
    for name, members in sets.items():
        for member in members if name.startswith("unlabeled") else ():
            if unknown := {span.capability for span in member.row.spans} - {"", *names}:
                raise UserError(
                    f"{member.where}: has a span of the capability '{min(unknown)}', which no "
                    f"labelled row has; {nearest(min(unknown), names)}"
                )
    texts = {labelled_text(row) for row in known}
    rest = [replace(row, capability="") for row in rest if labelled_text(row) not in texts]
    unlabelled = (replace(row, label=UNLABELED) for row in label_rows(rest, names))
    return (*label_rows(known, names), *unlabelled), names


def _from_domain(domain: Domain, request: LabelRun) -> tuple[Rows, tuple[str, ...]]:
    """Return the rows of a domain that a method may see, few or all of them labelled."""
    names = tuple(domain.forget)
    sides = (*domain.forget.values(), domain.retain)
    count = request.documents
    known: list[Row] = []
    rest: list[Row] = []
    for rows in sides:
        chosen = {*(subsample(rows, count, by="content", seed=request.seed) if count else rows)}
        known += [row for row in rows if row in chosen]
        rest += [row for row in rows if row not in chosen]
    texts = {labelled_text(row) for row in (*known, *rest)}
    rest += _new((*domain.adjacent, *domain.unlabeled), texts)
    unlabelled = (_without_label(row) for row in label_rows(rest, names))
    return (*label_rows(known, names), *unlabelled), names


def _new(rows: Iterable[Row], texts: set[str]) -> list[Row]:
    """Return the rows whose texts were not seen before."""
    out = []
    for row in rows:
        if labelled_text(row) not in texts:
            texts.add(labelled_text(row))
            out.append(row)
    return out


def _without_label(row: Row) -> Row:
    """Return a row that nobody has looked at; its capabilities, the truth, stay."""
    spans = tuple(replace(span, label=UNLABELED) for span in row.spans)
    return replace(row, label=UNLABELED, spans=spans)
