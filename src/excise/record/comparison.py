"""Edited models side by side, from the records of several output folders.

Models of equal bytes are one candidate, whatever records speak of them: a removal and its audit, or
audits at several budgets. Candidates of the same method and settings, data and seed apart, are one
row. Rows that were measured alike stand in one ranked table; the others stand apart, with a
sentence that says what differs. This module imports neither torch nor numpy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from excise.core.errors import UserError
from excise.record.entry import LEVELS, Estimate, Level
from excise.record.measured import (
    Recovered,
    bits_of,
    budget_words,
    change_of,
    differences,
    estimate_of,
    headline,
    model_names,
    score_of,
    verdict_on,
    was_removed,
    worst_recovery,
)
from excise.record.schema import MethodRun, Record, Verdict

T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""

ORDER = {"none": 0, "smoke": 1, "standard": 2, "strong": 3}
"""Budgets, the smallest first."""


@dataclass(frozen=True)
class Candidate:
    """One edited model, by its bytes.

    Attributes:
        label: What it is called beside the others.
        model: Its name in the records.
        records: What speaks of it, the smallest budget first; the last one decides.
        run: How it was made; empty settings where no record says so.
        seed: Seed of the method.
    """

    label: str
    model: str
    records: tuple[Record, ...]
    run: MethodRun | None
    seed: int

    @property
    def record(self) -> Record:
        """The record of the largest budget."""
        return self.records[-1]

    @property
    def verdict(self) -> Verdict | None:
        """Its verdict at the largest budget."""
        return verdict_on(self.record, self.model)

    @property
    def budgets(self) -> tuple[str, ...]:
        """Budgets at which it was attacked, the smallest first."""
        return tuple(dict.fromkeys(b for r in self.records if (b := budget_words(r)) != "none"))


ANSWERS = ("holds", "undecided", "retain damaged", "comes back", "still there", "not attacked")
"""What a row comes to, the best first."""


@dataclass(frozen=True)
class ComparedRow:
    """Candidates that differ in the seed alone.

    Attributes:
        label: What the row is called.
        candidates: One a seed.
        group: What it may be ranked with: rows of equal number were measured alike.
    """

    label: str
    candidates: tuple[Candidate, ...]
    group: int = 0

    @property
    def seeds(self) -> int:
        """How many seeds there are."""
        return len(self.candidates)

    def over_seeds(self, of: Callable[[Candidate], Estimate | None]) -> Estimate | None:
        """Return the mean over seeds with its 95 % interval (Student's t); of one seed, its own.

        Args:
            of: What is measured of one candidate; None where it was not.
        """
        known = [value for c in self.candidates if (value := of(c)) is not None]
        if len(known) < 2:
            return known[0] if known else None
        middle = mean(e.value for e in known)
        quantile = T_95[len(known) - 2] if len(known) - 2 < len(T_95) else 1.96
        half = quantile * stdev(e.value for e in known) / math.sqrt(len(known))
        return Estimate(middle, middle - half, middle + half, len(known))

    @property
    def forget(self) -> Estimate | None:
        """Score on the held-out test set before any attack."""
        return self.over_seeds(lambda c: estimate_of(score_of(c.record, c.model, "test")))

    @property
    def worst(self) -> tuple[Recovered, ...]:
        """What the worst attack brought back, seed by seed."""
        known = (worst_recovery(c.record, c.model) for c in self.candidates)
        return tuple(back for back in known if back is not None)

    @property
    def recovery(self) -> Estimate | None:
        """Most that came back of what was removed: published fraction, held-out test set."""
        return self.over_seeds(
            lambda c: back.fraction if (back := worst_recovery(c.record, c.model)) else None
        )

    @property
    def nothing_removed(self) -> bool:
        """Whether a seed knows as much as the original before any attack."""
        return any(not was_removed(c.record, c.model) for c in self.candidates)

    @property
    def retain(self) -> Estimate | None:
        """Change of the retain score against the original, positive is better."""
        return self.over_seeds(lambda c: change_of(c.record, c.model, "retain_test"))

    @property
    def adjacent(self) -> Estimate | None:
        """The same on the adjacent set."""
        return self.over_seeds(lambda c: change_of(c.record, c.model, "adjacent_test"))

    @property
    def bits(self) -> Estimate | None:
        """Residual bits per unit, minus the oracle's."""
        return self.over_seeds(lambda c: bits_of(c.verdict))

    @property
    def levels(self) -> dict[Level, str]:
        """Status of every depth level, the worst over seeds."""
        order = ("fail", "underpowered", "untested", "below", "pass")
        verdicts = [c.verdict for c in self.candidates]
        out: dict[Level, str] = {}
        for code in LEVELS:
            statuses = [
                next((r.status for r in v.levels if r.level == code), "untested")
                if v
                else "untested"
                for v in verdicts
            ]
            out[code] = min(statuses, key=order.index)
        return out

    @property
    def highest(self) -> Level | None:
        """Highest depth level that counts in every seed; None for none."""
        passed: Level | None = None
        for code, status in self.levels.items():
            if status != "pass":
                break
            passed = code
        return passed

    @property
    def answer(self) -> str:
        """Whether it comes back, in two or three words."""
        if all(c.verdict is None for c in self.candidates):
            return "not attacked"
        if self.nothing_removed:
            return "still there"
        statuses = [status for code, status in self.levels.items() if code != "D5"]
        if "fail" in statuses:
            return "still there" if self.levels["D0"] == "fail" else "comes back"
        if self.damaged:
            return "retain damaged"
        return "holds" if set(statuses) == {"pass"} else "undecided"

    @property
    def damaged(self) -> bool:
        """Whether the retain set lost something, beyond the interval."""
        return self.retain is not None and self.retain.high < 0


@dataclass(frozen=True)
class Comparison:
    """Rows, and why they do not all stand in one ranking.

    Attributes:
        rows: Ranked within their group where there is but one, else in the order given.
        apart: What differs between the groups, one clause each; empty where all were measured
            alike.
    """

    rows: tuple[ComparedRow, ...]
    apart: tuple[str, ...]

    @property
    def groups(self) -> tuple[tuple[ComparedRow, ...], ...]:
        """Rows that were measured alike, together."""
        numbers = dict.fromkeys(row.group for row in self.rows)
        return tuple(tuple(r for r in self.rows if r.group == number) for number in numbers)

    @property
    def ranked(self) -> bool:
        """Whether the rows stand in one ranking."""
        return not self.apart

    @property
    def sentence(self) -> str:
        """Why there is no single ranking; empty where there is."""
        if self.ranked:
            return ""
        return (
            f"No ranking: {'; '.join(self.apart)} differ. The tables below stand apart; measure "
            "all models alike to rank them."
        )


def compare(records: Mapping[str, Record]) -> Comparison:
    """Put the edited models of several records side by side.

    Args:
        records: By what their models shall be called: a name that the user gave or the folder's.

    Raises:
        UserError: If they hold fewer than one edited model.
    """
    rows = _rows(_candidates(records))
    if not rows:
        raise UserError("these records hold no edited model; name folders of removals or audits")
    grouped: list[ComparedRow] = []
    apart: list[str] = []
    for row in rows:
        why: tuple[str, ...] = ()
        for other in grouped:
            why = _differences(other, row)
            if not why:
                grouped.append(ComparedRow(row.label, row.candidates, other.group))
                break
        else:
            known = {clause.partition(" (")[0] for clause in apart}
            apart += [clause for clause in why if clause.partition(" (")[0] not in known]
            number = max((r.group for r in grouped), default=-1) + 1
            grouped.append(ComparedRow(row.label, row.candidates, number))
    if not apart:
        grouped.sort(key=_rank)
    return Comparison(tuple(grouped), tuple(apart))


def _rank(row: ComparedRow) -> tuple[float, ...]:
    """Sort by the answer, the highest level that counts, how little came back, what retain lost."""
    level = -1 if row.highest is None else list(LEVELS).index(row.highest)
    back = math.inf if row.recovery is None or row.nothing_removed else row.recovery.value
    lost = -(row.retain.value if row.retain else -math.inf)
    return (ANSWERS.index(row.answer), -level, back, lost)


def _candidates(records: Mapping[str, Record]) -> list[Candidate]:
    """Return every edited model once, with all records that speak of it."""
    entries: dict[tuple[str, str], list[tuple[str, str, Record]]] = {}
    for label, record in records.items():
        names = model_names(record)
        runs = {run.name: run for run in record.method_runs}
        for name in names:
            mark = runs[name].model.fingerprint if name in runs else ""
            data = str(record.data.get("fingerprint", ""))
            key = (mark, data) if mark else (f"{label}/{name}", data)
            shown = label if len(names) == 1 else name if len(records) == 1 else f"{label}/{name}"
            entries.setdefault(key, []).append((shown, name, record))
    out = []
    for known in entries.values():
        known.sort(key=lambda entry: _effort(entry[2]))
        label, model, last = known[-1]
        known_runs = [
            run
            for _, name, record in known
            for run in record.method_runs
            if run.name == name and run.method
        ]
        seed = known_runs[0].seed if known_runs else (last.seeds[0] if last.seeds else 0)
        aligned = tuple(_renamed(record, name, model) for _, name, record in known)
        out.append(
            Candidate(known[0][0], model, aligned, known_runs[0] if known_runs else None, seed)
        )
    return out


def _renamed(record: Record, old: str, new: str) -> Record:
    """Return a record that calls one edited model by another name: its audit may do so."""
    if old == new:
        return record

    def changed(entry: Any, field: str) -> Any:
        return entry.model_copy(update={field: new}) if getattr(entry, field) == old else entry

    return record.model_copy(
        update={
            "method_runs": tuple(changed(e, "name") for e in record.method_runs),
            "scores": tuple(changed(e, "model") for e in record.scores),
            "attacks": tuple(changed(e, "subject") for e in record.attacks),
            "verdicts": tuple(changed(e, "model") for e in record.verdicts),
        }
    )


def _effort(record: Record) -> tuple[int, int]:
    """Sort records by budget, then by the tokens that any attacker used."""
    name = budget_words(record).split(" ")[0]
    tokens = max((p.tokens for a in record.attacks for p in a.curve), default=0)
    return ORDER.get(name, 0), tokens


def _rows(candidates: Sequence[Candidate]) -> list[ComparedRow]:
    """Put candidates that differ in the seed alone into one row."""
    rows: list[list[Candidate]] = []
    for candidate in candidates:
        for row in rows:
            if all(_seeds_apart(candidate, other) for other in row):
                row.append(candidate)
                break
        else:
            rows.append([candidate])
    labels = [row[0].label if len(row) == 1 else row[0].model for row in rows]
    return [
        ComparedRow(labels[i] if labels.count(labels[i]) == 1 else row[0].label, tuple(row))
        for i, row in enumerate(rows)
    ]


def _seeds_apart(a: Candidate, b: Candidate) -> bool:
    """Return whether two candidates differ in the seed alone, and in what was drawn from it."""
    if a.run is None or b.run is None or a.seed == b.seed or a.run.method != b.run.method:
        return False
    drawn = ("the data", "the original")
    apart = [why for why in differences(a.record, b.record) if not why.startswith(drawn)]
    return not apart and _source(a.record) == _source(b.record)


def _source(record: Record) -> str:
    """Return where data and original come from, whatever was drawn from the seed."""
    config = record.config
    domain, model = config.get("domain"), config.get("model") or config.get("original")
    kept = {k: v for k, v in domain.items() if k not in ("seed", "split")} if domain else {}
    scratch = isinstance(model, Mapping) and model.get("scratch")
    original = next((m.fingerprint for m in record.models if m.name == "original"), "")
    data = kept or record.data.get("fingerprint")
    return json.dumps([data, scratch or original], sort_keys=True, default=str)


def _differences(a: ComparedRow, b: ComparedRow) -> tuple[str, ...]:
    """Return what keeps two rows from one ranking; seeds that both have are read in pairs."""
    pairs = (differences(x.record, y.record) for x in a.candidates for y in b.candidates)
    return min(pairs, key=len)


def metric_of(rows: Sequence[ComparedRow]) -> str:
    """Return the metric of the held-out test set that rows of one group share."""
    return next((m for r in rows for c in r.candidates if (m := headline(c.record, "test"))), "")
