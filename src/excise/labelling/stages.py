"""Labellers and their labels as stages: made once, found again, resumed where they were killed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from excise.core.context import Context, Stage
from excise.core.disk import new_file, write_text
from excise.data.domain import CORE, UNLABELED, Row, Rows, Span, content_of, labelled_text
from excise.data.spans import pieces
from excise.labelling import labeller as by_word
from excise.labelling.labeller import (
    AnyLabeller,
    Fitted,
    fit_labeller,
    load_labeller,
    open_reader,
    save_labeller,
)
from excise.labelling.words import Document, document_of
from excise.models.checkpoint import Checkpoint

LABELS: Final = "labels.jsonl"
"""Rows with their labels; a source of rows like any other."""

CHUNK: Final = 200
"""Rows that are labelled, and written, at once."""


@dataclass(frozen=True)
class LabelledRows:
    """Rows with the labels that a labeller is given.

    Attributes:
        rows: The rows.
        names: Capabilities, in the order that numbers them.
    """

    rows: Rows
    names: tuple[str, ...]

    @property
    def identity(self) -> Any:
        """What tells rows apart: every field of each, in their order."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(content_of(row), sort_keys=True).encode() + b"\n")
        return {"rows": digest.hexdigest(), "names": [*self.names]}


@dataclass(frozen=True)
class FitLabeller(Stage[Fitted]):
    """A labeller, trained, calibrated and measured.

    Attributes:
        labeller: What it is.
        given: Rows with the labels it is given.
        model: What `states` reads; None for the others.
        seed: Seed of everything random.
    """

    labeller: AnyLabeller
    given: LabelledRows
    model: Checkpoint | None
    seed: int

    @property
    def name(self) -> str:
        """Kind of features."""
        return f"labeller-{self.labeller.name}"

    def make(self, ctx: Context) -> None:
        """Fit the labeller and write it down."""
        ctx.emit("phase", {"text": f"training the labeller '{self.labeller.name}'"})
        inner = ctx.child("training")
        fitted = fit_labeller(self.labeller, self.given.rows, self.given.names, inner, self.model)
        save_labeller(fitted, ctx.work)
        shutil.rmtree(inner.work)

    def read(self, folder: Path) -> Fitted:
        """Return the labeller."""
        return load_labeller(self.labeller, folder)


@dataclass(frozen=True)
class Labels:
    """What a labeller said of rows.

    Attributes:
        path: The file of the labels.
        quality: Precision and recall over the characters of rows whose truth is known and that
            had no label; None of none.
    """

    path: Path
    quality: Mapping[str, float | None]


@dataclass(frozen=True)
class LabelRows(Stage[Labels]):
    """The labels that a labeller gives all words that have none, as `labels.jsonl`.

    Attributes:
        fit: The labeller, by how it is made; it labels the rows it is given.
    """

    fit: FitLabeller

    @property
    def name(self) -> str:
        """Kind of features."""
        return f"labels-{self.fit.labeller.name}"

    def make(self, ctx: Context) -> None:
        """Label row after row; what a killed run has labelled is not labelled again."""
        fitted, given = ctx.run(self.fit), self.fit.given
        rows = given.rows
        parts = ctx.child("parts").work
        reader = open_reader(self.fit.labeller, self.fit.model, ctx)
        count = -(-len(rows) // CHUNK)
        for i in range(count):
            counts = parts / f"{i:06d}.json"
            if not counts.exists():
                documents = [document_of(row) for row in rows[i * CHUNK : (i + 1) * CHUNK]]
                labelled = by_word.label_documents(fitted, documents, ctx, reader)
                write_text(parts / f"{i:06d}.jsonl", "".join(lines_of(labelled, given.names)))
                write_text(counts, json.dumps(found_of(documents, labelled)))
            ctx.emit("step", {"stage": "labelling", "step": i + 1, "steps": count})
        with new_file(ctx.work / LABELS) as whole, whole.open("wb") as f:
            for i in range(count):
                f.write((parts / f"{i:06d}.jsonl").read_bytes())
        counted = [json.loads(path.read_text()) for path in sorted(parts.glob("*.json"))]
        right, flagged, true = map(sum, zip(*counted, strict=True))
        quality = {
            "precision": right / flagged if flagged else None,
            "recall": right / true if true else None,
        }
        write_text(ctx.work / "quality.json", json.dumps(quality))
        shutil.rmtree(parts)

    def read(self, folder: Path) -> Labels:
        """Return the labels."""
        quality = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
        return Labels(folder / LABELS, quality)


def lines_of(rows: Iterable[Row], names: Sequence[str]) -> Iterable[str]:
    """Yield rows as lines of JSON that say their given labels, and not the truth.

    Args:
        rows: Rows with labels.
        names: Capabilities, in the order that numbers them.
    """
    for row in rows:
        fields: dict[str, Any] = {"unit": row.unit, "group": row.group}
        if row.kind == "chat":
            fields["messages"] = [{"role": r, "content": text} for r, text in row.messages]
        elif row.kind == "completion":
            fields |= {"prompt": row.prompt, "completion": row.completion}
        else:
            fields["text"] = row.text
        spans = [
            [span.start, span.end, names[span.label - 1] if span.label > CORE else "",
             span.confidence]
            for span in _by_label(row)
        ]  # fmt: skip
        content = {k: v for k, v in fields.items() if v} | {"spans": spans}
        yield json.dumps(content, ensure_ascii=False) + "\n"


def _by_label(row: Row) -> list[Span]:
    """Return what of a row is not certainly core, joined where labels are one, blanks cut off."""
    text = labelled_text(row)
    joined: list[Span] = []
    for part in pieces(row):
        last = joined[-1] if joined else None
        same = last is not None and (last.label, last.confidence) == (part.label, part.confidence)
        if last is not None and same and last.end == part.start:
            joined[-1] = replace(last, end=part.end)
        elif part.label > CORE or part.confidence < 1.0:
            joined.append(part)
    return [
        replace(span, end=span.start + len(text[span.start : span.end].rstrip())) for span in joined
    ]


def found_of(documents: Iterable[Document], labelled: Iterable[Row]) -> tuple[int, int, int]:
    """Return characters rightly labelled as a capability, so labelled, and truly of one.

    Rows that had any label before are left out.

    Args:
        documents: Rows with the labels that were given.
        labelled: The same rows, all labelled, with their true capabilities.
    """
    right = flagged = true = 0
    for before, row in zip(documents, labelled, strict=True):
        if {*before.labels} == {UNLABELED}:
            for piece in pieces(row):
                length = piece.end - piece.start
                flagged += length * (piece.label > CORE)
                true += length * bool(piece.capability)
                right += length * (piece.label > CORE and bool(piece.capability))
    return right, flagged, true
