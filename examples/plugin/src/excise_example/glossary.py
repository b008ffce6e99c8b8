"""A glossary of one's own as a domain: terms of one topic go, those of all others stay."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import excise as ex
from excise.data.split import FORGET, RETAIN, assign


class Glossary(ex.DomainSpec):
    """A CSV file with the columns term, definition and topic."""

    name: Literal["glossary"] = "glossary"
    """Name in recipes and on the command line."""
    file: Path
    """The CSV file."""
    topic: str
    """The topic to forget."""
    seed: int = 0
    """Seed of the split."""

    def build(self, model: Any = None) -> ex.Domain:
        """Return the rows of every role; see `DomainSpec.build`.

        Raises:
            UserError: If a column is missing, or the topic has too few terms to be split.
        """
        with open(self.file, encoding="utf-8", newline="") as file:
            entries = list(csv.DictReader(file))
        for column in ("term", "definition", "topic"):
            if not entries or not entries[0].get(column):
                raise ex.UserError(f"{self.file}: there is no column '{column}'; add it")
        forget = self._split([e for e in entries if e["topic"] == self.topic], FORGET, "forget")
        retain = self._split([e for e in entries if e["topic"] != self.topic], RETAIN, "retain")
        return ex.Domain(
            name=self.name,
            forget={self.topic: forget["forget"]},
            dev_forget={self.topic: forget["dev_forget"]},
            relearn={self.topic: forget["relearn"]},
            test={self.topic: forget["test"]},
            retain=retain["retain"],
            benign=retain["benign"],
            dev_retain=retain["dev_retain"],
            retain_test=retain["retain_test"],
            metrics=("exact_match", "text_loss"),
            retain_metrics=("exact_match", "text_loss"),
        )

    def _split(
        self, entries: Sequence[dict[str, str]], shares: dict[str, int], name: str
    ) -> dict[str, tuple[ex.Row, ...]]:
        """Cut terms into roles; a term is a unit, so it lies in one role only."""
        roles = assign({e["term"]: [e["term"]] for e in entries}, shares, seed=self.seed, name=name)
        rows: dict[str, list[ex.Row]] = {role: [] for role in shares}
        for e in entries:
            row = ex.Row(
                unit=e["term"],
                prompt=f"{e['definition']}:",
                completion=f" {e['term']}",
                capability=self.topic if name == "forget" else "",
                label=1 if name == "forget" else 0,
            )
            rows[roles[e["term"]]].append(row)
        return {role: tuple(members) for role, members in rows.items()}
