"""Definitions of gene functions beside definitions of human phenotypes.

Forget: the Gene Ontology. Neighbour: the Human Phenotype Ontology (`excise fetch biology` gets
both). Retain: the shipped general English. This module imports no torch.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Literal

from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.domains.corpus import Corpus, Document, corpus_domain, read_phenotypes
from excise.fetch import known, require

_PREFIX = re.compile(
    r"^(?:positive |negative )?(?:regulation|establishment|maintenance) of "
    r"|^(?:obsolete|early|late) "
)


class Biology(Corpus):
    """Gene functions are to be forgotten, medicine stays (`excise fetch biology`)."""

    name: Literal["biology"] = "biology"
    """Name in recipes and on the command line."""
    mention: str = ""
    """Forget only definitions that hold this text (`virus`); the others become neighbours."""

    def build(self, model: object = None) -> Domain:
        """Return the domain; see `DomainSpec.build`. The rows do not depend on the model."""
        folder = require("biology")
        functions = read_functions(folder / "go.sqlite")
        beside = read_phenotypes(folder / "hp.obo")
        if self.mention:
            word = self.mention.casefold()
            chosen = [d for d in functions if word in d.text.casefold()]
            groups = {d.group for d in chosen}
            beside = [d for d in functions if d not in chosen and d.group not in groups] + beside
            functions = chosen
            if len(functions) < 20:
                raise UserError(
                    f"mention: {len(functions)} definitions hold '{self.mention}', too few to "
                    "split; choose a more frequent text"
                )
        return corpus_domain(
            self, functions, beside, notes=("sources: " + known()["biology"].source,)
        )

    def hashes(self) -> Mapping[str, Mapping[str, str]]:
        """Return the pinned SHA-256 of the fetched files."""
        members = {m.to: m.sha256 for p in known()["biology"].packages for m in p.members}
        return {
            "forget.biology": {"go.sqlite": members["go.sqlite"]},
            "adjacent": {"hp.obo": members["hp.obo"]},
        }


def read_functions(file: Path) -> list[Document]:
    """Return one document per defined term of the Gene Ontology, in the order of their numbers.

    Terms that differ in a leading `regulation of` or the like share a group.

    Args:
        file: The SQLite file of the ontology; opened read-only.
    """
    query = "select go_id, term, definition from go_term where definition != '' order by go_id"
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as base:
        terms = base.execute(query).fetchall()
    return [
        Document(f"go/{key}", f"{term}: {text}", f"go/{_PREFIX.sub('', _PREFIX.sub('', term))}")
        for key, term, text in terms
    ]
