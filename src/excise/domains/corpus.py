"""Domains of documents: a technical source to forget, its neighbour, and shipped general English.

The document is the unit, near-duplicates are one unit, texts are cut into passages of about
`words` words after the split. This module imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from excise.core.errors import UserError
from excise.data.dedup import find_duplicates, normal_form
from excise.data.domain import CORE, UNLABELED, Domain, Row, Rows
from excise.data.spec import DomainSpec
from excise.data.split import ADJACENT, FORGET, SEEN, assign, hashed_order
from excise.domains.prose import load_prose, passages
from excise.domains.pydocs import reference_topics
from excise.fetch import require
from excise.models.tiny import train_bpe


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
        key: Its id: the unit, unless it repeats an earlier one.
        text: What it says.
        group: What is never split between roles, or empty.
    """

    key: str
    text: str
    group: str = ""


class Corpus(DomainSpec):
    """Settings that domains of documents share."""

    words: int = Field(default=80, ge=10, le=2000)
    """Words per passage, about."""
    documents: int = Field(default=2000, ge=20)
    """Documents of the forget set at most, and as many of its neighbour."""
    prose: int = Field(default=2500, ge=50)
    """Passages of general English in retain, at most; the scored parts take an eighth of it."""
    fresh: Literal["python", "phenotypes"] = "python"
    """Text that controls train on and score: Python's language reference, which every Python has,
    or definitions of phenotypes (`excise fetch phenotypes`)."""
    seed: int = 0
    """Seed of the split."""


def corpus_domain(
    spec: Corpus,
    forget: Sequence[Document],
    adjacent: Sequence[Document],
    *,
    exposure: Literal["seen", "held_out"] = "held_out",
    notes: Iterable[str] = (),
) -> Domain:
    """Return the domain of a document set, its neighbour and general English.

    Args:
        spec: Sizes and seed; its name is the capability.
        forget: What is to be removed; equal groups stay together.
        adjacent: Its neighbour.
        exposure: Whether the method is given the documents that are scored and relearned too.
        notes: Facts about the sources.

    Returns:
        The rows of every role.

    Raises:
        UserError: If there are too few documents.
    """
    name = spec.name
    units, merged = _merge(_some(forget, spec))
    near, _ = _merge(_some(adjacent, spec))
    shares = SEEN if exposure == "seen" else FORGET
    by_role = _roles(units, shares, spec, f"forget.{name}")
    beside = _roles(near, ADJACENT, spec, "adjacent")
    parts = {role: _rows(by_role.get(role, ()), spec, name) for role in FORGET}
    seen: set[str] = set()
    for role in ("test", "relearn", "dev_forget", "forget"):
        parts[role] = _unrepeated(parts[role], seen)
    if exposure == "seen":
        parts["forget"] = (*parts["relearn"], *parts["test"], *parts["dev_forget"])
    retain = load_prose("retain", words=spec.words, limit=spec.prose)
    eighth = spec.prose // 8
    mix = [replace(row, label=UNLABELED) for row in (*parts["forget"], *retain)]
    fresh = _rows(_fresh_documents(spec), spec, name)
    return Domain(
        name=name,
        forget={name: parts["forget"]},
        retain=retain,
        relearn={name: parts["relearn"]},
        test={name: parts["test"]},
        retain_test=load_prose("test", words=spec.words, limit=eighth),
        dev_forget={name: parts["dev_forget"]},
        dev_retain=load_prose("dev", words=spec.words, limit=eighth // 2),
        benign=load_prose("benign", words=spec.words, limit=2 * eighth),
        adjacent=_rows(beside["adjacent"], spec),
        adjacent_test=_rows(beside["adjacent_test"], spec),
        unlabeled=tuple(hashed_order(mix, [row.text for row in mix], spec.seed)),
        fresh=fresh,
        metrics=("text_loss",),
        retain_metrics=("text_loss",),
        claim="deletion" if exposure == "seen" else "capability",
        exposure=exposure,
        notes=(
            *notes,
            f"{len(units)} forget documents after {merged} near-duplicates were put with others",
            f"passages of about {spec.words} words; retain is the shipped general English",
            f"fresh text: {_FRESH[spec.fresh]}",
        ),
    )


_FRESH = {
    "python": "the language reference of the running Python",
    "phenotypes": "definitions of human phenotypes (HPO)",
}


def _fresh_documents(spec: Corpus) -> list[Document]:
    """Return the fresh text: controls train on half of it and are scored on the other half."""
    if spec.fresh == "phenotypes":
        texts = read_phenotypes(require("phenotypes") / "hp.obo")
    else:
        texts = [Document(f"reference/{key}", text) for key, text in reference_topics()]
    return _some(texts, spec)[: max(40, spec.documents // 4)]


def _some(documents: Sequence[Document], spec: Corpus) -> list[Document]:
    """Return at most `spec.documents` documents, chosen by the hash of their group."""
    order = hashed_order(documents, [d.group or d.key for d in documents], spec.seed)
    return order[: spec.documents]


def _merge(documents: Sequence[Document]) -> tuple[dict[str, list[Document]], int]:
    """Return documents by unit, near-duplicates in one unit, and how many were put with others."""
    if not documents:
        raise UserError("a source holds no documents; run excise fetch again")
    duplicates = find_duplicates([d.text for d in documents])
    units: dict[str, list[Document]] = {}
    for document, first in zip(documents, duplicates.cluster, strict=True):
        units.setdefault(documents[first].key, []).append(document)
    return units, len(documents) - len(units)


def _roles(
    units: dict[str, list[Document]], shares: dict[str, int], spec: Corpus, name: str
) -> dict[str, list[Document]]:
    """Return documents by role, the unit's id in place of their own."""
    groups = {unit: {d.group for d in members} for unit, members in units.items()}
    roles = assign(groups, shares, seed=spec.seed, name=name)
    out: dict[str, list[Document]] = {role: [] for role in shares}
    for unit, role in roles.items():
        out[role] += [replace(d, key=unit) for d in units[unit]]
    return out


def _rows(documents: Sequence[Document], spec: Corpus, capability: str = "") -> Rows:
    """Return the passages of documents, in the order of the documents."""
    return tuple(
        Row(
            unit=document.key,
            group=document.group,
            text=passage,
            capability=capability,
            label=1 if capability else CORE,
        )
        for document in documents
        for passage in passages(document.text, spec.words)
    )


def _unrepeated(rows: Rows, seen: set[str]) -> Rows:
    """Return the rows whose text did not occur before, here or in an earlier part."""
    new = []
    for row in rows:
        form = normal_form(row.text)
        if form not in seen:
            seen.add(form)
            new.append(row)
    return tuple(new)


def read_phenotypes(file: Path) -> list[Document]:
    """Return one document per defined term of the Human Phenotype Ontology.

    Args:
        file: The ontology in OBO format.
    """
    documents = []
    for block in file.read_text(encoding="utf-8").split("\n[Term]\n")[1:]:
        fields = dict(re.findall(r"^(id|name|def): (.*)$", block, re.MULTILINE))
        quoted = re.match(r'"((?:[^"\\]|\\.)*)"', fields.get("def", ""))
        if quoted and "is_obsolete: true" not in block:
            text = re.sub(r"\\(.)", r"\1", quoted[1])
            documents.append(Document(f"hpo/{fields['id']}", f"{fields['name']}: {text}"))
    return documents


@lru_cache(maxsize=8)
def text_tokenizer(texts: tuple[str, ...], vocabulary: int) -> Any:
    """Return a byte-level BPE of texts with `vocabulary` tokens, trained once a process."""
    return train_bpe(texts, vocabulary)
