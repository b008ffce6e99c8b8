"""Rows, units and roles: the one labelled stream everything else reads.

A unit is what can be known or not. Roles and their rules: `docs/evidence.md`.
This module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Final, Literal

CORE = 0
"""Label of what everybody may know. Capability i has label i, starting at 1."""
UNLABELED = -1
"""Label of rows nobody has looked at: the mix as life gives it."""

Metric = str
"""Name of a score of rows; `data.rows.READS` says which shapes each one reads."""


@dataclass(frozen=True, slots=True)
class Span:
    """Part of a row's text that has a label of its own.

    Attributes:
        start: First character of `labelled_text`.
        end: Character behind the last one.
        capability: Name of the capability it teaches; empty for core.
        label: Label that a method is given: `CORE`, capability number, or `UNLABELED`.
        confidence: The labeller's confidence in `label`, as a probability.
    """

    start: int
    end: int
    capability: str = ""
    label: int = CORE
    confidence: float = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """One example in one of four shapes; which fields are filled says which.

    Plain text (`text`), a completion (`prompt`, `completion`), a question (`prompt`, `choices`,
    `answer`) or a conversation (`messages`).

    Attributes:
        unit: Id of the unit the row is about; the same in every paraphrase.
        group: Author, entity or source that is never split between roles; empty for none.
        text: Plain text; every token after the first is a target.
        prompt: Context that is not scored.
        completion: What is scored after `prompt`.
        choices: Options of a multiple-choice question.
        answer: Index of the right option, or -1.
        messages: Conversation as (role, content); assistant turns are the targets.
        capability: Name of the capability the row teaches; empty for core.
        label: Label that a method is given: `CORE`, capability number, or `UNLABELED`.
        wording: Which paraphrase of the unit this is.
        confidence: The labeller's confidence in `label`, as a probability.
        spans: Labels of parts of the text, in order, none over another; what they leave out is
            core (unlabelled in a row nobody has looked at). Without any, the row's label is that
            of all its text. The row's own label is that of the document.
        targets: Parts of a plain text (first character, the one behind the last) whose tokens are
            scored; without any, all of it is.
    """

    unit: str
    group: str = ""
    text: str = ""
    prompt: str = ""
    completion: str = ""
    choices: tuple[str, ...] = ()
    answer: int = -1
    messages: tuple[tuple[str, str], ...] = ()
    capability: str = ""
    label: int = CORE
    wording: int = 0
    confidence: float = 1.0
    spans: tuple[Span, ...] = ()
    targets: tuple[tuple[int, int], ...] = ()

    @property
    def kind(self) -> Literal["text", "completion", "choice", "chat"]:
        """Which of the four shapes the row has."""
        if self.messages:
            return "chat"
        if self.choices:
            return "choice"
        return "completion" if self.completion else "text"


Rows = tuple[Row, ...]
"""The rows of one role, in a fixed order."""


def all_rows(named: Mapping[str, Rows]) -> Rows:
    """Return the rows of every named capability, in the order of the names."""
    return tuple(row for rows in named.values() for row in rows)


def text_of(row: Row) -> str:
    """Return everything a reader sees of a row, in any of its shapes, system turns left out."""
    if row.kind == "chat":
        return "\n".join(content for role, content in row.messages if role != "system")
    if row.kind == "choice":
        return f"{row.prompt}\n{row.choices[row.answer]}"
    return row.text or f"{row.prompt}{row.completion}"


def labelled_text(row: Row) -> str:
    """Return the text whose characters spans count: prompts and every turn are part of it.

    Args:
        row: Text, a completion (its prompt, then the answer) or a conversation (the contents of
            all turns, one line break between two).
    """
    if row.kind == "chat":
        return "\n".join(content for _, content in row.messages)
    return row.text or f"{row.prompt}{row.completion}"


def content_of(row: Row) -> dict[str, object]:
    """Return a row's fields as JSON has them; `spans` and `targets` only where it has some."""
    content = asdict(row)
    for name in ("spans", "targets"):
        if not content[name]:
            del content[name]
    return content


UNHASHED: Final = ("name", "notes")
"""Fields of a domain that decide no number: what it is called, and remarks for readers."""


@dataclass(frozen=True)
class Domain:
    """What is removed, what is retained, and who may see what.

    Attributes:
        name: Short name for the record.
        forget: Rows of each named capability that the method sees.
        retain: The retain set: rows whose knowledge the method must keep.
        relearn: The relearn set (T): rows the attacker trains on, by capability.
        test: The held-out test set (V): rows that are scored and never trained or selected on,
            by capability.
        retain_test: Scored rows of the retain set.
        dev_forget: Rows for sweeps, stop rules, attacker rates, direction fitting.
        dev_retain: The same for the retain set.
        benign: The attacker's share of the retain set.
        adjacent: Entangled neighbours; the oracle may learn them, the method does not see them.
        adjacent_test: Scored rows of the neighbours.
        unlabeled: The mix that training-time methods and distillation read.
        fresh: Units of the same template that nobody ever saw, for residual bits and power:
            first half to train on, second half to score (split by unit).
        metrics: Metrics that apply to `test`, the headline first.
        retain_metrics: Metrics that apply to `retain_test`, the headline first.
        claim: `deletion` (these documents or facts) or `capability` (what they teach).
        exposure: `seen` (the test units are forget units), `held_out` (they were never shown to
            the method) or `unknown`.
        sensitive: Texts stay out of record and report.
        notes: Facts about the data the record must carry (duplicates merged, overlap ...).
        paraphrases: Test units in paraphrases that the method was not given, by capability: scored
            apart, where the test set holds the very rows that were to be deleted.
        multi_hop: Questions that reach what is to be forgotten through another fact, by
            capability: scored apart, and nobody trains on them.
        benchmark: Sets that a published benchmark scores beside these, by name; nobody trains on
            them.
        benchmark_metrics: Metrics of each of them.
        mix_share: Share of the words read by models trained from scratch that are to be
            forgotten; None for every row once per epoch.
        rows_per_text: Rows, of both kinds, in each text that models trained from scratch read; the
            roles hold them one by one.
    """

    name: str
    forget: Mapping[str, Rows]
    retain: Rows
    relearn: Mapping[str, Rows]
    test: Mapping[str, Rows]
    retain_test: Rows
    dev_forget: Mapping[str, Rows]
    dev_retain: Rows
    benign: Rows
    adjacent: Rows = ()
    adjacent_test: Rows = ()
    unlabeled: Rows = ()
    fresh: Rows = ()
    metrics: tuple[Metric, ...] = ("text_loss",)
    retain_metrics: tuple[Metric, ...] = ("text_loss",)
    claim: Literal["deletion", "capability"] = "capability"
    exposure: Literal["seen", "held_out", "unknown"] = "held_out"
    sensitive: bool = False
    notes: tuple[str, ...] = ()
    mix_share: float | None = None
    rows_per_text: int = 1
    paraphrases: Mapping[str, Rows] = field(default_factory=dict)
    multi_hop: Mapping[str, Rows] = field(default_factory=dict)
    benchmark: Mapping[str, Rows] = field(default_factory=dict)
    benchmark_metrics: Mapping[str, tuple[Metric, ...]] = field(default_factory=dict)

    def roles(self) -> Iterator[tuple[str, Rows]]:
        """Yield (role, rows) for every role, named capabilities as `forget.NAME`."""
        for role in ("forget", "relearn", "test", "dev_forget", "paraphrases", "multi_hop",
                     "benchmark"):  # fmt: skip
            for name, rows in getattr(self, role).items():
                yield f"{role}.{name}", rows
        for role in ("retain", "retain_test", "dev_retain", "benign", "adjacent"):
            yield role, getattr(self, role)
        for role in ("adjacent_test", "unlabeled", "fresh"):
            yield role, getattr(self, role)

    @cached_property  # which `dataclasses.replace` does not copy
    def fingerprint(self) -> str:
        """SHA-256 over every field that decides a number (all but `UNHASHED`), as hex.

        The order of capabilities counts: it decides label numbers and the order in which rows
        are read.
        """
        digest = hashlib.sha256()
        for name in (f.name for f in fields(self) if f.name not in UNHASHED):
            value = getattr(self, name)
            if name == "rows_per_text" and value == 1:
                continue  # as before there was a choice
            for key, part in value.items() if isinstance(value, Mapping) else (("", value),):
                digest.update(f"\n{json.dumps([name, key])}\n".encode())
                for item in part if isinstance(part, tuple | list) else (part,):
                    content = content_of(item) if isinstance(item, Row) else item
                    digest.update(json.dumps(content, sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def verbatim(self) -> bool:
        """Whether every scored row is one that the method is given, as in a deletion."""
        given = {row for rows in self.forget.values() for row in rows}
        tested = [row for rows in self.test.values() for row in rows]
        return bool(tested) and given.issuperset(tested)

    @property
    def identity(self) -> Mapping[str, str]:
        """What a stage that reads this domain depends on."""
        return {"domain": self.fingerprint}
