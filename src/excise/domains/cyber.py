"""Weaknesses and attacks in words: a stand-in for hazardous knowledge in plain text.

Forget: CWE and ATT&CK (`excise fetch cyber`). Neighbour: computing without attacks, the docstrings
of the running Python. Retain: the shipped general English. This module imports no torch.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from excise.data.domain import Domain
from excise.domains.corpus import Corpus, Document, corpus_domain
from excise.domains.pydocs import stdlib_docstrings
from excise.fetch import known, require

_FIELDS = (
    "Description",
    "Extended_Description",
    "Background_Detail",
    "Note",
    "Effectiveness_Notes",
)

_REPEATS = 2
"""Documents that one sentence may occur in; more often it is boilerplate, which the relearn set
would give away about the test set."""


class Cyber(Corpus):
    """CWE and ATT&CK text is to be forgotten, other computing stays (`excise fetch cyber`)."""

    name: Literal["cyber"] = "cyber"
    """Name in recipes and on the command line."""
    sources: tuple[Literal["cwe", "attack"], ...] = ("cwe", "attack")
    """Which of the two collections."""

    def build(self, model: object = None) -> Domain:
        """Return the domain; see `DomainSpec.build`. The rows do not depend on the model."""
        folder = require("cyber")
        documents = []
        if "cwe" in self.sources:
            documents += list(read_weaknesses(folder / "cwe.xml"))
        if "attack" in self.sources:
            documents += list(read_attacks(folder / "patterns.json", folder / "relationships.json"))
        documents = without_boilerplate(documents)
        beside = [Document(f"python/{key}", text) for key, text in stdlib_docstrings()]
        return corpus_domain(
            self,
            documents,
            beside,
            notes=(
                "forget: " + known()["cyber"].source + "; citations and links removed",
                f"sentences that occur in more than {_REPEATS} documents are left out",
                "adjacent: docstrings of the running Python's standard library",
            ),
        )

    def hashes(self) -> Mapping[str, Mapping[str, str]]:
        """Return the pinned SHA-256 of the fetched files."""
        members = [m for p in known()["cyber"].packages for m in p.members]
        return {"forget.cyber": {m.to: m.sha256 for m in members}}


def read_weaknesses(file: Path) -> Iterator[Document]:
    """Yield one document per weakness of a CWE catalogue.

    Args:
        file: The catalogue as XML.
    """
    for event, node in ET.iterparse(file, events=("end",)):
        if event != "end" or not node.tag.endswith("}Weakness"):
            continue
        space = node.tag[: node.tag.index("}") + 1]
        texts = [node.get("Name", "") + "."]
        for name in _FIELDS:
            texts += [" ".join("".join(e.itertext()).split()) for e in node.iter(space + name)]
        yield Document(f"cwe/{node.get('ID')}", " ".join(dict.fromkeys(t for t in texts if t)))
        node.clear()


def read_attacks(patterns: Path, relationships: Path) -> Iterator[Document]:
    """Yield one document per technique, and one per group, program or measure that uses some.

    Args:
        patterns: Techniques as JSON.
        relationships: Who uses or counters what, one sentence each, as JSON.
    """
    for entry in json.loads(patterns.read_text(encoding="utf-8"))["attack_patterns"]:
        text = plain(entry["description"] or "")
        if text and not (entry["revoked"] or entry["deprecated"]):
            yield Document(f"attack/{entry['external_id']}", f"{entry['name']}. {text}")
    sentences: dict[str, list[str]] = {}
    for entry in json.loads(relationships.read_text(encoding="utf-8"))["relationships"]:
        text = plain(entry.get("description") or "")
        if len(text.split()) > 4 and not (entry["revoked"] or entry["deprecated"]):
            sentences.setdefault(entry["source_ref"], []).append(text)
    for source, texts in sentences.items():
        yield Document(f"attack/{source}", " ".join(dict.fromkeys(texts)))


def without_boilerplate(documents: Sequence[Document]) -> list[Document]:
    """Return documents without the sentences that more than two of them hold.

    Args:
        documents: All documents of the forget set; those that are left empty are dropped.
    """
    split = [re.split(r"(?<=[.!?:])\s+", d.text) for d in documents]
    counts = Counter(s.casefold() for sentences in split for s in set(sentences))
    out = []
    for document, sentences in zip(documents, split, strict=True):
        rare = [s for s in sentences if counts[s.casefold()] <= _REPEATS]
        if len(" ".join(rare).split()) > 4:
            out.append(replace(document, text=" ".join(rare)))
    return out


def plain(text: str) -> str:
    """Return text without citations, links, markup, and without the stump of a cut sentence."""
    text = re.sub(r"\(Citation:[^)]*(?:\)|$)", "", text)
    text = re.sub(r"\[([^\]]*)\](?:\([^)\s]*(?:\)|$))?", r"\1", text)
    text = " ".join(re.sub(r"</?\w+>|[`*]+", "", text).split())
    if not text.endswith("..."):
        return text
    whole = re.match(r".*[.!?](?=\s)", text[:-3])
    stump = text[:-3].rpartition(" ")[0].rstrip(" ,;:(")
    return whole[0] if whole else stump + "."
