"""What builds a domain: a configuration with `build`.

This module imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from excise.core.config import Config
from excise.data.domain import Domain, Metric

if TYPE_CHECKING:
    from excise.models.checkpoint import Checkpoint


class DomainSpec(Config, ABC):
    """A way to make a domain: files, a generator, a shipped corpus.

    Subclasses declare `name: Literal["..."] = "..."` and their settings, and implement `build`.
    Two equal specs build equal domains (equal `Domain.fingerprint`), whatever the process.
    """

    kind: ClassVar[str] = "domain"
    name: str
    """Name in recipes and on the command line."""

    @abstractmethod
    def build(self, model: Checkpoint | None) -> Domain:
        """Return the domain.

        Args:
            model: The model it is for, where the rows depend on it (tokenizer, what it knows).
                None when there is none yet; specs that need one say so in a `UserError`.

        Returns:
            The rows of every role.

        Raises:
            UserError: If the data cannot be read or cannot be split as asked.
        """

    def hashes(self) -> Mapping[str, Mapping[str, str]]:
        """Return what the domain is read from: set -> file name -> SHA-256; empty for none."""
        return {}


class Files(DomainSpec):
    """Files of one's own. Two are enough: what to remove and what to keep.

    A source is one string: a `.jsonl`, `.json`, `.parquet` or `.txt` file, a folder saved by
    `datasets` or laid out as on the hub, or `owner/name:config@revision#split`. Rows hold `text`,
    `prompt`+`completion`, `question`+`choices`+`answer` or `messages`, and perhaps `unit`, `group`,
    `wording` and `capability`. Roles without a file are cut from `forget` and `retain`, with the
    shares that `domains/split.py` states.
    """

    name: Literal["files"] = "files"
    title: str = "files"
    """Name of the domain in record and report."""
    forget: dict[str, str]
    """What to remove: capability -> source; a lone source is the capability `forget`."""
    retain: str
    """What must stay."""
    adjacent: str = ""
    """Entangled neighbours, scored apart; the method does not see them."""
    unlabeled: str = ""
    """The mix that training-time methods and distillation read."""
    relearn: dict[str, str] = Field(default={})
    """What the attacker trains on, by capability."""
    test: dict[str, str] = Field(default={})
    """What is scored and never trained on, by capability."""
    dev_forget: dict[str, str] = Field(default={})
    """Forget rows for sweeps and attacker rates, by capability."""
    retain_test: str = ""
    """Scored rows of what must stay."""
    dev_retain: str = ""
    """Retain rows for sweeps."""
    benign: str = ""
    """The attacker's harmless rows."""
    adjacent_test: str = ""
    """Scored rows of the neighbours."""
    fresh: str = ""
    """Units of the same kind as the forget set that no model ever saw."""
    split: str = ""
    """A `split.json` written by an earlier run, to use the same split."""
    seed: int = 0
    """Seed of the split."""
    exposure: Literal["auto", "seen", "held_out", "unknown"] = "auto"
    """Whether scored units were shown to the method; `auto` decides by the rows, and `unknown` is
    for models of somebody else."""
    sensitive: bool = False
    """Keep texts out of record and report."""
    refit: bool = False
    """Give the method every forget row, those that are scored too."""
    claim: Literal["", "deletion", "capability"] = ""
    """What is claimed; by default deletion where scored units were seen, else capability."""
    metrics: tuple[Metric, ...] = ()
    """Metrics of the scored forget rows, the headline first; by default by their shape."""
    retain_metrics: tuple[Metric, ...] = ()
    """The same for the scored retain rows."""
    chunk_words: int = 0
    """Cut plain texts into chunks of this many words at most after the split; 0 keeps them."""

    @field_validator("forget", "relearn", "test", "dev_forget", mode="before")
    @classmethod
    def _lone(cls, value: Any) -> Any:
        """Take one source as that of the capability `forget`."""
        return {"forget": value} if isinstance(value, str) and value else value or {}

    @model_validator(mode="after")
    def _check(self) -> Files:
        """Refuse roles of capabilities that are not removed."""
        if not self.forget:
            raise ValueError("forget: name at least one source")
        for name in self.forget:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"forget.{name}: use letters, digits, '-' and '_' in names")
        for role in ("relearn", "test", "dev_forget"):
            for name in getattr(self, role):
                if name not in self.forget:
                    known = ", ".join(self.forget)
                    raise ValueError(f"{role}.{name}: is no capability of forget ({known})")
        if self.adjacent_test and not self.adjacent:
            raise ValueError("adjacent_test: needs 'adjacent' too")
        if self.chunk_words < 0:
            raise ValueError("chunk_words: must be 0 or more")
        return self

    def sources(self) -> dict[str, str]:
        """Return the source of every set: `forget.NAME`, `retain`, `test.NAME` ..."""
        out = {}
        for role in ("forget", "relearn", "test", "dev_forget"):
            out.update({f"{role}.{name}": spec for name, spec in getattr(self, role).items()})
        for role in ("retain", "retain_test", "dev_retain", "benign", "adjacent",
                     "adjacent_test", "unlabeled", "fresh"):  # fmt: skip
            if getattr(self, role):
                out[role] = getattr(self, role)
        return out

    def hashes(self) -> Mapping[str, Mapping[str, str]]:
        """Return set -> file name -> SHA-256 of every source.

        Raises:
            UserError: If a file is not there.
        """
        from excise.data.files import parse_source, source_hashes

        return {name: source_hashes(parse_source(s)) for name, s in self.sources().items()}

    def build(self, model: Checkpoint | None) -> Domain:
        """Read the files, put duplicates into one unit, refuse overlaps, and split by unit.

        Args:
            model: Not needed; rows do not depend on it.

        Returns:
            The rows of every role; notes name duplicates, the split and what is missing.

        Raises:
            UserError: With up to five problems, each naming file and line.
        """
        from excise.data.assemble import assemble

        return assemble(self)
