"""Rows, units and roles: the one labelled stream everything else reads.

A unit is what can be known or not. Roles and their rules: `docs/evidence.md`.
This module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

CORE = 0
"""Label of what everybody may know. Capability i has label i, starting at 1."""
UNLABELED = -1
"""Label of rows nobody has looked at: the mix as life gives it."""

Metric = Literal["exact_match", "multiple_choice", "text_loss"]


@dataclass(frozen=True, slots=True)
class Row:
    """One example in one of four shapes; which fields are filled says which.

    Plain text (`text`), a completion (`prompt`, `completion`), a question (`prompt`, `choices`,
    `answer`) or a conversation (`messages`).

    Attributes:
        unit: Id of the unit the row is about; the same in every wording.
        group: Author, entity or source that is never split between roles; empty for none.
        text: Plain text; every token after the first is a target.
        prompt: Context that is not scored.
        completion: What is scored after `prompt`.
        choices: Options of a multiple-choice question.
        answer: Index of the right option, or -1.
        messages: Conversation as (role, content); assistant turns are the targets.
        capability: Name of the capability the row teaches; empty for core.
        label: What a method is told: `CORE`, capability number, or `UNLABELED`.
        wording: Which wording of the unit this is.
        confidence: How sure the labeller is of `label`, as a probability.
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


def content_of(row: Row) -> dict[str, Any]:
    """Return a row's fields for hashing; a confidence of 1, which says nothing, is left out."""
    content = asdict(row)
    if row.confidence == 1.0:
        del content["confidence"]
    return content


@dataclass(frozen=True)
class Domain:
    """What is to be removed, what is to stay, and who may see what.

    Attributes:
        name: Short name for the record.
        forget: Rows of each named capability that the method sees.
        retain: Rows the method must keep.
        relearn: T, rows the attacker trains on, by capability.
        test: V, rows that are scored and never trained or selected on, by capability.
        retain_test: Scored rows of what must stay.
        dev_forget: Rows for sweeps, stop rules, attacker rates, direction fitting.
        dev_retain: The same for what must stay.
        benign: The attacker's share of retain.
        adjacent: Entangled neighbours; the oracle may learn them, the method does not see them.
        adjacent_test: Scored rows of the neighbours.
        unlabeled: The mix that training-time methods and distillation read.
        fresh: Units of the same template that nobody ever saw, for residual bits and power:
            first half to train on, second half to score (split by unit).
        metrics: Metrics that apply to `test`, the headline first.
        retain_metrics: Metrics that apply to `retain_test`, the headline first.
        claim: `deletion` (these documents or facts) or `capability` (what they teach).
        exposure: `seen` (V are forget units), `held_out` (V were never shown) or `unknown`.
        sensitive: Texts stay out of record and report.
        notes: Facts about the data the record must carry (duplicates merged, overlap ...).
        mix_share: Share of the words read by models trained from scratch that are to be
            forgotten; None for every row once per epoch.
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
    _fingerprint: list[str] = field(default_factory=list, repr=False, compare=False)

    def roles(self) -> Iterator[tuple[str, Rows]]:
        """Yield (role, rows) for every role, named capabilities as `forget.NAME`."""
        for role in ("forget", "relearn", "test", "dev_forget"):
            for name, rows in getattr(self, role).items():
                yield f"{role}.{name}", rows
        for role in ("retain", "retain_test", "dev_retain", "benign", "adjacent"):
            yield role, getattr(self, role)
        for role in ("adjacent_test", "unlabeled", "fresh"):
            yield role, getattr(self, role)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides what is computed from the domain."""
        return {
            "rows": self.fingerprint,
            "metrics": list(self.metrics),
            "retain_metrics": list(self.retain_metrics),
            "claim": self.claim,
            "exposure": self.exposure,
            "sensitive": self.sensitive,
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all roles and rows, as hex."""
        if not self._fingerprint:
            digest = hashlib.sha256()
            for role, rows in self.roles():
                digest.update(f"\n{role}\n".encode())
                for row in rows:
                    digest.update(json.dumps(content_of(row), sort_keys=True).encode())
            if self.mix_share is not None:
                digest.update(f"\nmix_share\n{self.mix_share!r}".encode())
            self._fingerprint.append(digest.hexdigest())
        return self._fingerprint[0]
