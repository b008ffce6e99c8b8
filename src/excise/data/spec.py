"""What builds a domain: a configuration with `build`, and the one for files of one's own.

This module imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from excise.core.config import Config
from excise.core.errors import UserError, counted
from excise.data.dedup import text_hash
from excise.data.domain import UNLABELED, Domain, Metric, Row, Rows, text_of
from excise.data.labels import label_rows
from excise.data.rows import DOCUMENT, METRICS, READS, chunk_rows
from excise.data.sources import parse_source, source_hashes
from excise.data.split import (
    ADJACENT,
    FORGET,
    RETAIN,
    Parts,
    Split,
    cut_held_out,
    cut_plain,
    cut_seen,
    cut_verbatim,
    read_split,
    set_named,
    versions_of,
)
from excise.data.units import (
    BY_CAPABILITY,
    Sets,
    UnitRow,
    check_overlaps,
    group_note,
    read_sets,
    units_of,
    without_overlaps,
)


class DomainSpec(Config, ABC):
    """A way to make a domain: files, a generator, a shipped corpus.

    Subclasses declare `name: Literal["..."] = "..."` and their settings, and implement `build`.
    Two equal specs build equal domains (equal `Domain.fingerprint`), whatever the process.
    """

    kind: ClassVar[str] = "domain"
    name: str
    """Name in recipes and on the command line."""

    @abstractmethod
    def build(self, model: Any) -> Domain:
        """Return the domain.

        Args:
            model: The `Checkpoint` it is for, where the rows depend on it (tokenizer, what it
                knows); loosely typed because models are built on top of this package. None when
                there is none yet; specs that need one say so in a `UserError`.

        Returns:
            The rows of every role.

        Raises:
            UserError: If the data cannot be read or cannot be split as asked.
        """

    def hashes(self) -> Mapping[str, Mapping[str, str]]:
        """Return what the domain is read from: set -> file name -> SHA-256; empty for none."""
        return {}

    def tokenizer(self) -> Any:
        """Return the `transformers` tokenizer of models that are trained from scratch on it.

        Raises:
            UserError: If the domain brings none.
        """
        raise UserError(
            f"domain '{self.name}' brings no tokenizer for a model trained from scratch; "
            "name one in 'model.tokenizer', a folder or hub id, or a pretrained model in "
            "'model.path'"
        )


class Files(DomainSpec):
    """Files of one's own. Two are enough: the forget set and the retain set.

    A source is one string: a `.jsonl`, `.json`, `.parquet`, `.csv`, `.tsv` or `.txt` file, a folder
    of texts, saved by `datasets` or laid out as on the hub, or `owner/name:config@revision#split`,
    with options after a question mark (`docs/data.md`). Rows hold `text`,
    `prompt`+`completion`, `question`+`choices`+`answer` or `messages`, and perhaps `unit`, `group`,
    `wording` and `capability`. Roles without a file are cut from `forget` and `retain`, with the
    shares that `excise.data.split` states.
    """

    name: Literal["files"] = "files"
    title: str = "files"
    """Name of the domain in record and report."""
    forget: dict[str, str]
    """What to remove: capability -> source; a lone source is the capability `forget`."""
    retain: str
    """The retain set."""
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
    multi_hop: dict[str, str] = Field(default={})
    """Questions that reach what is to be forgotten through another fact, by capability; scored
    apart. `unit` names the unit that is asked for in the end."""
    retain_test: str = ""
    """Scored rows of the retain set."""
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
    overlaps: Literal["refuse", "leave_out"] = "refuse"
    """What becomes of units that two sets share and must not: the domain is refused, or the rows
    are left out of the later of the two, which is retain where the other is forget."""
    sensitive: bool = False
    """Keep texts out of record and report."""
    refit: bool = False
    """Give the method every forget row, those that are scored too."""
    claim: Literal["", "deletion", "capability"] = ""
    """What is claimed; by default deletion where scored units were seen, else capability. Asked
    for, a deletion gives every forget row to the method, and what is relearned and scored are
    disjoint units among these very rows."""
    metrics: tuple[Metric, ...] = ()
    """Metrics of the scored forget rows, the headline first; by default by their shape."""
    retain_metrics: tuple[Metric, ...] = ()
    """The same for the scored retain rows."""
    chunk_words: int = 0
    """Cut plain texts into chunks of this many words at most after the split; 0 keeps them, or
    cuts the documents of a deletion at `DOCUMENT_WORDS`."""

    @field_validator(*BY_CAPABILITY, mode="before")
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
        for role in BY_CAPABILITY[1:]:
            for name in getattr(self, role):
                if name not in self.forget:
                    known = ", ".join(self.forget)
                    raise ValueError(f"{role}.{name}: is no capability of forget ({known})")
        if self.adjacent_test and not self.adjacent:
            raise ValueError("adjacent_test: needs 'adjacent' too")
        if self.claim == "deletion" and self.exposure == "held_out":
            raise ValueError("exposure: a deletion is scored on what the method saw; leave it out")
        if self.claim == "deletion" and self.refit:
            raise ValueError("refit: a deletion gives the method every forget row already")
        return self

    def sources(self) -> dict[str, str]:
        """Return the source of every set: `forget.NAME`, `retain`, `test.NAME` ..."""
        out = {}
        for role in BY_CAPABILITY:
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
        return {name: source_hashes(parse_source(s)) for name, s in self.sources().items()}

    def build(self, model: Any = None) -> Domain:
        """Read the files, put duplicates into one unit, refuse overlaps, and split by unit.

        Args:
            model: Not needed; rows do not depend on it.

        Returns:
            The rows of every role; notes name duplicates, the split and what is missing.

        Raises:
            UserError: With up to five problems, each naming file and line.
        """
        fixed = read_split(Path(self.split), self.hashes()) if self.split else None
        sets, notes = read_sets(self.sources(), sensitive=self.sensitive)
        if self.overlaps == "leave_out":
            sets, left_out = without_overlaps(sets)
            notes = (*notes, *left_out)
        else:
            check_overlaps(sets)
        seed = fixed.seed if fixed else self.seed
        layout, why = _layout(self, sets, fixed)
        parts: Parts = {name: rows for name, rows in sets.items() if not name.startswith("forget.")}
        groups: dict[str, str] = {}
        for capability in self.forget:
            parts |= CUTS[layout](capability, sets, seed, fixed, groups)
        parts |= cut_plain("retain", RETAIN, sets, seed, fixed)
        if "adjacent" in sets:
            parts |= cut_plain("adjacent", ADJACENT, sets, seed, fixed)
        parts, unscored = _multi_hop(parts, tuple(self.forget))
        exposure: Exposure = "held_out" if layout == "held_out" else "seen"
        exposure = "unknown" if self.exposure == "unknown" else exposure
        exposure = fixed.exposure if fixed else exposure
        counts = tuple(_counts(parts, sets))
        if self.refit:
            parts |= {name: rows for name, rows in sets.items() if name.startswith("forget.")}
            exposure = "seen" if exposure == "held_out" else exposure
            why = "refit: the method sees every forget row, so the scored ones are not held out"
        mix, overlaps = _unlabeled(self, sets, parts)
        notes = (*notes, *group_note(sets), *counts, *unscored, why, *overlaps)
        notes += _shape_notes(parts, tuple(self.forget))
        if not self.fresh:
            notes += (
                "there is no matched fresh text: residual bits and power checks need `fresh`",
            )
        words = self.chunk_words
        if layout == "verbatim" and not words:
            words = DOCUMENT_WORDS
            notes += (
                f"documents are read in pieces of at most {words} words, so that all of each is "
                "trained on and scored",
            )
        return self._domain(parts, mix, exposure, words, layout == "verbatim", notes)

    def _domain(
        self,
        parts: Parts,
        mix: Rows,
        exposure: Exposure,
        words: int,
        verbatim: bool,
        notes: Sequence[str],
    ) -> Domain:
        """Order, chunk and label the rows of every role."""
        names = tuple(self.forget)

        def rows(key: str) -> Rows:
            # By unit and content, so that a domain does not depend on the order of lines.
            ordered = tuple(member.row for member in sorted(parts.get(key, ()), key=_order))
            chunks = chunk_rows(ordered, words) if words else ordered
            return label_rows(chunks, names)

        def by_capability(role: str) -> dict[str, Rows]:
            return {name: rows(f"{role}.{name}") for name in names}

        paraphrases = {c: part for c, part in by_capability("paraphrases").items() if part}
        multi_hop = {c: part for c, part in by_capability("multi_hop").items() if part}

        test, retain_test = by_capability("test"), rows("retain_test")
        scored = [row for members in test.values() for row in members]
        return Domain(
            name=self.title,
            forget=by_capability("forget"),
            retain=rows("retain"),
            relearn=by_capability("relearn"),
            test=test,
            retain_test=retain_test,
            dev_forget=by_capability("dev_forget"),
            dev_retain=rows("dev_retain"),
            benign=rows("benign"),
            adjacent=rows("adjacent"),
            adjacent_test=rows("adjacent_test"),
            unlabeled=chunk_rows(mix, words) if words else mix,
            fresh=rows("fresh"),
            metrics=_metrics(scored, self.metrics, "test", verbatim=verbatim),
            retain_metrics=_metrics(retain_test, self.retain_metrics, "retain_test"),
            claim=self.claim or ("deletion" if exposure == "seen" else "capability"),
            exposure=exposure,
            sensitive=self.sensitive,
            notes=tuple(notes),
            paraphrases=paraphrases,
            multi_hop=multi_hop,
        )


DOCUMENT_WORDS = 64
"""Words of a piece of a document that was to be deleted: about 100 tokens, fewer than methods,
scores and attacks read of a row by default."""

Layout = Literal["seen", "held_out", "verbatim"]
"""What scored rows are: withheld paraphrases of forget units, units that the method never saw, or
forget rows themselves."""

CUTS = {"seen": cut_seen, "held_out": cut_held_out, "verbatim": cut_verbatim}
"""How the forget set is cut for each."""

Exposure = Literal["seen", "held_out", "unknown"]


def _layout(spec: Files, sets: Sets, fixed: Split | None) -> tuple[Layout, str]:
    """Decide what the scored rows are, and say why.

    Raises:
        UserError: If the file for test holds both, or a written split is of another kind.
    """
    if spec.claim == "deletion" or (fixed is not None and fixed.verbatim):
        if fixed is not None and not fixed.verbatim:
            raise UserError(
                f"{spec.split} was not made for a deletion, and the method did not see every "
                "forget row; leave the claim out, or the split"
            )
        return "verbatim", (
            "a deletion: the method sees every forget row, and the held-out test set holds rows "
            "among them, of other units than the relearn set"
        )
    tested = {u for c in spec.test for u in units_of(sets[f"test.{c}"])}
    forget = {u for c in spec.forget for u in units_of(sets[f"forget.{c}"])}
    if tested:
        shared = len(tested & forget)
        if 0 < shared < len(tested):
            raise UserError(
                f"{shared} of the {len(tested)} units of test are in forget and the others are "
                "not; score forget units only, or none of them"
            )
        kind: Layout = "seen" if shared else "held_out"
        word = "forget units" if shared else "units the method never saw"
        return kind, f"the file for test holds {word}"
    if spec.exposure in ("seen", "held_out"):
        return spec.exposure, f"exposure {spec.exposure} as asked"
    rows = [member for c in spec.forget for member in sets[f"forget.{c}"]]
    several = sum(len(names) > 1 for names in versions_of(rows).values())
    worded = any(member.version.startswith("w") and member.row.wording for member in rows)
    if all(member.given for member in rows) and several * 2 >= len(forget) and (
        rows[0].row.kind != "text" or worded
    ):  # fmt: skip
        return (
            "seen",
            f"{several} of {len(forget)} forget units come in several paraphrases: the held-out "
            "test set holds those that were withheld from the method",
        )
    return "held_out", "the held-out test set holds forget units that the method never saw"


def _counts(parts: Parts, sets: Sets) -> Iterable[str]:
    """Yield the split in words, one sentence a set."""
    for name in sets:
        role, _, capability = name.partition(".")
        if role not in ("forget", "retain", "adjacent"):
            continue
        shares = {"forget": FORGET, "retain": RETAIN, "adjacent": ADJACENT}[role]
        cut = [(r, f"{r}.{capability}" if capability else r) for r in shares]
        words = ", ".join(
            f"{'method' if r == role else r.replace('_', ' ')} {len(units_of(parts[key]))}"
            for r, key in cut
            if key in parts
        )
        yield f"{set_named(name)}: {counted(len(units_of(sets[name])), 'unit')}, by role: {words}"
        apart = parts.get(f"paraphrases.{capability}", ())
        if apart:
            yield (
                f"{set_named(name)}: {counted(len(apart), 'paraphrase')} of "
                f"{counted(len(units_of(apart)), 'test unit')} were "
                "withheld from the method and are scored apart"
            )


def _multi_hop(parts: Parts, capabilities: Sequence[str]) -> tuple[Parts, list[str]]:
    """Leave multi-hop questions that end in other units than test units out, and say how many.

    Raises:
        UserError: If none is left.
    """
    out, notes = dict(parts), []
    for capability in capabilities:
        rows = parts.get(f"multi_hop.{capability}", ())
        given = parts[f"forget.{capability}"]
        seen = {text_hash(text_of(member.row)) for member in given}
        others = {u for role in ("relearn", "dev_forget")
                  for u in units_of(parts.get(f"{role}.{capability}", ()))}  # fmt: skip
        others = (others | units_of(given).keys()) - units_of(parts[f"test.{capability}"]).keys()
        kept = tuple(
            member for member in rows
            if member.row.unit not in others and text_hash(text_of(member.row)) not in seen
        )  # fmt: skip
        if rows and not kept:
            raise UserError(
                f"{rows[0].where}: no row of multi_hop.{capability} ends in a unit of the held-out "
                "test set; give the 'unit' that each asks for, and questions for more units"
            )
        if lost := len(rows) - len(kept):
            notes.append(
                f"multi_hop.{capability}: {counted(lost, 'row')} about units outside the held-out "
                "test set, or in words of the forget set, were left out"
            )
        if kept:
            out[f"multi_hop.{capability}"] = kept
    return out, notes


def _shape_notes(parts: Parts, capabilities: tuple[str, ...]) -> tuple[str, ...]:
    """Say what it means that rows for choices, or fresh rows, have another shape than V's."""

    def kinds(*names: str) -> set[str]:
        return {member.row.kind for name in names for member in parts.get(name, ())}

    test = kinds(*(f"test.{c}" for c in capabilities))
    dev = kinds(*(f"dev_forget.{c}" for c in capabilities))
    fresh = kinds("fresh")
    notes = []
    if "choice" in test and "choice" not in dev:
        notes.append(
            "the held-out test set holds questions and dev_forget none: learning rates are chosen, "
            "and positive controls made, by the token loss of other rows; questions for dev_forget "
            "would make both sharper"
        )
    if fresh and fresh != test:
        notes.append(
            f"fresh holds rows of shape {', '.join(sorted(fresh))} and the held-out test set of "
            f"shape {', '.join(sorted(test))}: residual bits need fresh units of the same template "
            "and are not measured"
        )
    return tuple(notes)


def _unlabeled(spec: Files, sets: Sets, parts: Parts) -> tuple[Rows, tuple[str, ...]]:
    """Return the unlabelled mix, and notes on what of it is about forget units or left out.

    Units that nobody may train on leave the mix, and texts of withheld paraphrases.
    """
    if "unlabeled" not in sets:
        return (), ()
    taught = {u: c for c in spec.forget for u in units_of(sets[f"forget.{c}"])}
    apart: set[str] = set()
    texts: set[str] = set()
    for key, rows in parts.items():
        role = key.partition(".")[0]
        if role in ("forget", "retain", "adjacent", "unlabeled"):
            continue
        apart |= {member.row.unit for member in rows}
        texts |= {text_hash(text_of(member.row)) for member in rows}
    seen = [member.row for c in spec.forget for member in parts[f"forget.{c}"]]
    method = {row.unit for row in seen}
    texts -= {text_hash(text_of(row)) for row in seen}
    out: list[Row] = []
    gone = overlap = 0
    for member in sets["unlabeled"]:
        row = member.row
        closed = row.unit in apart - method or text_hash(text_of(row)) in texts
        if closed and not (spec.refit and row.unit in taught):
            gone += 1
            continue
        overlap += row.unit in taught
        capability = taught.get(row.unit, row.capability)
        out.append(replace(row, capability=capability, label=UNLABELED))
    notes = [f"{overlap} of {len(out)} unlabelled rows are about forget units"]
    if gone:
        notes.append(f"{gone} unlabelled rows of units that are scored or attacked were left out")
    return tuple(out), tuple(notes)


def _order(member: UnitRow) -> Any:
    return (member.row.unit, member.row.wording, text_of(member.row), member.row.choices)


def _metrics(
    rows: Sequence[Row], wanted: tuple[Metric, ...], role: str, *, verbatim: bool = False
) -> tuple[Metric, ...]:
    """Return the metrics that apply to scored rows, by default those of their shape.

    Raises:
        UserError: If the rows have several shapes, or a wanted metric does not apply.
    """
    kinds = sorted({row.kind for row in rows})
    if len(kinds) > 1:
        raise UserError(
            f"{role} holds rows of several shapes ({', '.join(kinds)}), which are scored "
            "differently; give them the same fields"
        )
    known = [metric for metric, shapes in READS.items() if kinds[0] in shapes]
    for metric in wanted:
        if metric not in known:
            raise UserError(
                f"metric '{metric}' does not apply to {role}, whose rows are of shape "
                f"'{kinds[0]}'; use {' or '.join(known)}"
            )
    return wanted or (DOCUMENT if verbatim and kinds[0] in ("text", "chat") else METRICS[kinds[0]])
