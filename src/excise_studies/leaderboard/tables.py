"""From trials and audits to the table, the frontier, the curves and the decision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Protocol

from excise.core.errors import counted
from excise.data.domain import Domain
from excise.evals.replicates import over_seeds
from excise.methods.base import Cost, Removal
from excise.methods.choosing import RULE
from excise.record import (
    LEVELS,
    Estimate,
    ModelRef,
    Record,
    StudyLine,
    StudyPlot,
    StudyRow,
    StudyTable,
)
from excise.record.comparison import Candidate, ComparedRow
from excise.record.measured import (
    by_setting,
    headline,
    is_relearning,
    nothing_to_remove,
    pooled,
    role,
    score_of,
    verdict_on,
    was_removed,
    worst_recovery,
)
from excise.run.study import StudyResult
from excise_studies.auditing.counting import gaps_of
from excise_studies.base import row
from excise_studies.leaderboard.trials import Searched, Trial, within
from excise_studies.routing.setting import ALL, LabelSetting

BOARD = "Leaderboard"
"""Title of the table that is published."""
FINAL = "Finalists"
"""Title of the same by the second audit."""
TRIED = "Search"
"""Title of the table of what was spent on settings."""
LEFT = "left at worst"
"""The metric that decides."""
UNATTACKED = "seeds not attacked"
"""At how many seeds relearning on a row is invalid: what it leaves there is a lower bound."""


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        method: Name of the method.
        labels: How much of what is to be forgotten carries a label, and what is missed.
        repaired: Whether it was fine-tuned on retain rows afterwards.
    """

    method: str
    labels: LabelSetting = ALL
    repaired: bool = False

    @property
    def label(self) -> str:
        """What a reader calls it."""
        kind = "" if self.labels.missed in ("", "occurrences") else f", missed {self.labels.missed}"
        share = "" if self.labels.rate == 1 else f", {self.labels.rate:.0%} labelled{kind}"
        return f"{self.method}{share}{', repaired' if self.repaired else ''}"

    @property
    def name(self) -> str:
        """What its audit calls it."""
        kind = "" if self.labels.missed in ("", "occurrences") else f"-{self.labels.missed}"
        share = "" if self.labels.rate == 1 else f"-{1000 * self.labels.rate:.0f}-of-1000{kind}"
        return f"{self.method}{share}{'-repaired' if self.repaired else ''}"


class Asked(Protocol):
    """What a leaderboard states beforehand."""

    @property
    def margin(self) -> float:
        """What a leader must be ahead by."""
        ...

    @property
    def retain_budget(self) -> float:
        """Nats that dev retain rows may lose."""
        ...

    @property
    def frontier(self) -> tuple[float, ...]:
        """Further such budgets."""
        ...


@dataclass(frozen=True)
class Board:
    """What was searched, chosen and audited so far.

    Attributes:
        asked: What was stated beforehand.
        searched: Trials by method.
        chosen: The trial that was chosen, by method.
        original: Losses of the original on `dev`, forget and retain.
        entries: Rows of the table.
        beside: Methods that train from scratch, among others that edit a model: shown, and out of
            the contest.
        records: The audit of every seed.
        failed: Why a row has no model at a seed.
        costs: What the removals of a row took.
        domain: Data of the first seed.
        refs: Reference models of the search.
        notes: What a reader should know.
    """

    asked: Asked
    searched: Mapping[str, Searched]
    chosen: Mapping[str, Trial]
    original: tuple[float, float]
    entries: tuple[Entry, ...]
    beside: tuple[str, ...] = ()
    records: Mapping[int, Record] = field(default_factory=dict)
    failed: Mapping[tuple[Entry, int], str] = field(default_factory=dict)
    costs: Mapping[Entry, tuple[Cost, ...]] = field(default_factory=dict)
    domain: Domain | None = None
    refs: tuple[ModelRef, ...] = ()
    notes: tuple[str, ...] = ()

    def add(
        self,
        domain: Domain,
        seed: int,
        record: Record,
        removals: Mapping[Entry, Removal],
        failed: Mapping[Entry, str],
    ) -> Board:
        """Return the board with the audit of one more seed."""
        costs = {e: (*self.costs.get(e, ()), r.cost) for e, r in removals.items()}
        return replace(
            self,
            records={**self.records, seed: record},
            failed={**self.failed, **{(e, seed): why for e, why in failed.items()}},
            costs={**self.costs, **costs},
            domain=self.domain or domain,
        )

    def compared(self, entry: Entry) -> ComparedRow:
        """Return the seeds of a row, as `excise compare` reads them."""
        return ComparedRow(
            entry.label,
            tuple(
                Candidate(entry.label, entry.name, (record,), None, seed)
                for seed, record in self.records.items()
                if verdict_on(record, entry.name) is not None
            ),
        )

    def left(self, method: str) -> dict[int, float]:
        """Return what a method left at every seed, the worse of its two rows."""
        out: dict[int, float] = {}
        for entry in self.entries:
            if entry.method == method and entry.labels == self.entries[0].labels:
                for candidate in self.compared(entry).candidates:
                    left = left_of(candidate.record, entry.name)
                    if left is not None:
                        out[candidate.seed] = max(out.get(candidate.seed, -math.inf), left.value)
        return out

    def unattacked(self, method: str) -> list[int]:
        """Return the seeds at which relearning on one of a method's rows is invalid."""
        entries = [e for e in self.entries if e.method == method]
        first = [e for e in entries if e.labels == self.entries[0].labels]
        return sorted({c.seed for e in first for c in not_attacked(self.compared(e))})

    def ranking(self) -> list[str]:
        """Return the methods that were attacked, those within the retain budget first."""
        limit = self.original[1] + self.asked.retain_budget
        known = {n: left for n in self.chosen if (left := self.left(n))}
        # What failed at a seed has no say there, and does not win by it.
        return sorted(
            known,
            key=lambda n: (
                self.chosen[n].retain > limit,
                -len(known[n]),
                mean(known[n].values()),
                n,
            ),
        )

    def contest(self) -> list[str]:
        """Return the methods among which one may lead, in the order of the ranking."""
        return [name for name in self.ranking() if name not in self.beside]


def not_attacked(compared: ComparedRow) -> list[Candidate]:
    """Return the candidates of a row on which relearning is invalid: they resist being taught."""
    return [
        candidate
        for candidate in compared.candidates
        if any(
            attack.status == "invalid"
            for attack in candidate.record.attacks
            if attack.subject == candidate.model and attack.level == "D4" and attack.decisive
        )
    ]


def left_of(record: Record, model: str) -> Estimate | None:
    """Return what a model still holds at worst: 0 as an oracle, 1 as the original.

    With oracles it is the largest depth gap of the levels up to relearning, each of which holds
    the worst score before any attack (D0) or after an attack. Relearning has no gap without an
    oracle: the share that it brought back of what was gone is added to what was left.

    Args:
        record: An audit.
        model: One of its candidates.
    """
    verdict = verdict_on(record, model)
    if verdict is None:
        return None
    known = [
        Estimate(r.gap, r.gap if r.low is None else r.low, r.gap if r.high is None else r.high)
        for r in verdict.levels
        if r.gap is not None and r.level != "D5"
    ]
    if not any(role(m.subject) == "oracle" for m in record.attacks):
        start = next((e.value for e, r in zip(known, verdict.levels) if r.level == "D0"), 0.0)
        back = worst_recovery(record, model)
        if back is not None:
            part = back.fraction
            value, low, high = (start + (1 - start) * x for x in (part.value, part.low, part.high))
            known.append(Estimate(value, low, high))
        elif not was_removed(record, model):
            known.append(Estimate(1.0, 1.0, 1.0))
    return max(known, key=lambda e: e.value, default=None)


# -- tables ----------------------------------------------------------------------------------------


def board_table(board: Board, title: str = BOARD) -> StudyTable:
    """Return the table: what was kept, what is left before and after attacks, at what cost."""
    rows = []
    order = board.ranking()
    for entry in sorted(
        (e for e in board.entries if e.method in order),
        key=lambda e: (order.index(e.method), -e.labels.rate, e.repaired),
    ):
        rows += _entry_rows(board, entry)
    for model in ("original", "oracle-0"):
        scores = [s for r in board.records.values() if (s := score_of(r, model, "test"))]
        if scores:
            name = model.removesuffix("-0")
            rows.append(row(name, "held-out score", over_seeds([s.value for s in scores])))
    metric = next((m for r in board.records.values() if (m := headline(r, "test"))), "")
    return StudyTable(
        title=title,
        note=(
            f"Best first. Held-out score: {metric.replace('_', ' ')}, before any attack. Retain "
            "change: against the original, positive is better. Left before: largest depth gap of "
            "every score that costs nothing; left at worst: of those and after every attack, 0 as "
            "an oracle, 1 as the original. Levels: how many of D0 to D5 count, in the worst seed. "
            "Seeds not attacked: relearning is invalid there, what is left a lower bound. "
            "Repaired: fine-tuned on retain rows, then attacked. Intervals are over seeds."
        ),
        rows=tuple(rows),
    )


def _entry_rows(board: Board, entry: Entry) -> list[StudyRow]:
    """Return the numbers of one row."""
    compared = board.compared(entry)
    if not compared.candidates:
        return []

    def of(measured: Callable[[Candidate], Estimate | None]) -> Estimate:
        known = [e for c in compared.candidates if (e := measured(c)) is not None]
        return known[0] if len(known) == 1 else over_seeds([e.value for e in known])

    def before(candidate: Candidate) -> Estimate | None:
        verdict = candidate.verdict
        first = next((r for r in verdict.levels if r.level == "D0"), None) if verdict else None
        if first is None or first.gap is None:
            return None
        low, high = (first.gap if x is None else x for x in (first.low, first.high))
        return Estimate(first.gap, low, high)

    levels = list(LEVELS)
    reached = 0 if compared.highest is None else levels.index(compared.highest) + 1
    n = compared.seeds
    costs = board.costs.get(entry, ())
    numbers: list[tuple[str, Estimate | None]] = [
        (LEFT, of(lambda c: left_of(c.record, c.model))),
        ("retain change", compared.retain),
        ("left before", of(before)),
        ("held-out score", compared.forget),
        ("came back", compared.recovery),
    ]
    out = [row(entry.label, metric, replace(e, n=n)) for metric, e in numbers if e is not None]
    out.append(StudyRow(condition=entry.label, metric="levels", value=float(reached), n=n))
    out.append(StudyRow(condition=entry.label, metric="seeds", value=float(n), n=n))
    if resisted := not_attacked(compared):
        value = float(len(resisted))
        out.append(StudyRow(condition=entry.label, metric=UNATTACKED, value=value, n=n))
    if costs:
        flops = mean(c.flops for c in costs)
        out.append(StudyRow(condition=entry.label, metric="TFLOPs", value=flops / 1e12, n=n))
    return out


def search_table(board: Board) -> StudyTable:
    """Return what the search of every method found and took."""
    forget, retain = board.original
    rows = [
        StudyRow(condition="original", metric="dev forget", value=forget),
        StudyRow(condition="original", metric="cost", value=0.0),
    ]
    for name, searched in board.searched.items():
        chosen = board.chosen.get(name)
        numbers: dict[str, float | None] = {}
        if chosen is not None:
            numbers |= {"dev forget": chosen.forget, "cost": chosen.retain - retain}
            numbers["chosen"] = float(searched.trials.index(chosen) + 1)
        numbers["trials"] = float(len(searched.trials))
        numbers["failed"] = float(len(searched.trials) - len(searched.usable))
        first = searched.trials[0]
        if not first.tried.failed:
            numbers["published: dev forget"] = first.forget
            numbers["published: cost"] = first.retain - retain
        numbers["tuning TFLOPs"] = searched.cost.flops / 1e12
        numbers["tuning seconds"] = searched.cost.seconds
        rows += [StudyRow(condition=name, metric=m, value=v, n=1) for m, v in numbers.items()]
    note = f"Nats per token on dev; cost: rise on retain rows. Chosen, the trial's number: {RULE}."
    return StudyTable(title=TRIED, note=note, rows=tuple(rows))


def matched_table(board: Board) -> StudyTable:
    """Return the highest loss on dev forget rows at several costs to dev retain rows."""
    rows = []
    for name, searched in board.searched.items():
        for budget in sorted({*board.asked.frontier, board.asked.retain_budget}):
            found = within(searched.usable, board.original[1] + budget)
            rows.append(StudyRow(condition=name, metric=f"at +{budget:g}", value=found, n=1))
    note = (
        "Highest loss on dev forget rows, nats per token, among the trials that raise the loss on "
        f"dev retain rows by at most so much; the original's is {board.original[0]:.3f}. Empty: no "
        "trial costs so little."
    )
    return StudyTable(title="At matched retain", note=note, rows=tuple(rows))


def settings_table(board: Board) -> StudyTable:
    """Return what was chosen, where it is a number."""
    rows = [
        StudyRow(condition=name, metric=path, value=float(value), n=1)
        for name, trial in board.chosen.items()
        for path, value in trial.settings.items()
        if isinstance(value, int | float)
    ]
    note = "What differs from the first trial; a method that is not here was chosen as it is."
    return StudyTable(title="Chosen settings", note=note, rows=tuple(rows))


def attacks_table(board: Board) -> StudyTable:
    """Return the depth gap of every row at the end of each attack; needs oracles."""
    rows = []
    for entry in board.entries:
        by_attack: dict[str, list[float]] = {}
        for record in board.records.values():
            if verdict_on(record, entry.name) is not None:
                for attack, gap in gaps_of(record, entry.name).items():
                    by_attack.setdefault(attack, []).append(gap)
        rows += [row(entry.label, attack, over_seeds(g)) for attack, g in by_attack.items()]
    note = "Depth gap at the end of each attack: 0 as an oracle, 1 as the original."
    return StudyTable(title="Left after each attack", note=note, rows=tuple(rows))


def best_so_far(record: Record, subject: str) -> list[float]:
    """Return the best score on the held-out test set after 1, 2, ... trainings of the attacker.

    Trainings are those of every relearning in the order in which they are tried, seeds averaged;
    the best is by the held-out test set, so that it is an upper end.
    """
    start = score_of(record, "original", "test")
    sign = -1.0 if start is not None and start.direction == "lower" else 1.0
    tried = [a for a in record.attacks if a.subject == subject and is_relearning(a)]
    best: list[float] = []
    for group in by_setting(tried):
        curve = pooled(group)
        if curve:
            score = sign * curve[-1].score
            best.append(max(score, best[-1]) if best else score)
    return [sign * score for score in best]


def attacker_lines(board: Board) -> tuple[StudyLine, ...]:
    """Return the best attack by number of the attacker's trainings, mean over seeds."""
    named = [("original", "original"), ("oracle", "oracle-0")]
    named += [(e.label, e.name) for e in board.entries if e.labels == board.entries[0].labels]
    lines = []
    for label, subject in named:
        curves = [c for r in board.records.values() if (c := best_so_far(r, subject))]
        points = [(float(i + 1), mean(at)) for i, at in enumerate(zip(*curves, strict=False))]
        if points:
            lines.append(StudyLine(name=label, points=tuple(points)))
    return tuple(lines)


def plots_of(board: Board) -> tuple[StudyPlot, ...]:
    """Return the frontier of every method, and the attacker's search."""
    retain = board.original[1]
    frontier = [
        StudyLine(name=n, points=tuple((t.retain - retain, t.forget) for t in s.frontier()))
        for n, s in board.searched.items()
        if s.usable
    ]
    plots = [
        StudyPlot(
            title="Frontier: removed at what cost",
            note="Trials that no other trial of the method beats in both; up and left is better.",
            x="rise of the loss on dev retain rows, nats",
            y="loss on dev forget rows, nats",
            lines=tuple(frontier),
        )
    ]
    lines = attacker_lines(board)
    if lines:
        plots.append(
            StudyPlot(
                title="Best attack by number of trials",
                note="Best score of the held-out test set after so many trainings of the attacker.",
                x="trainings of the attacker",
                y="best held-out score by then",
                lines=lines,
            )
        )
    return tuple(plots)


# -- what was found --------------------------------------------------------------------------------


def ahead(board: Board, first: str, other: str) -> Estimate:
    """Return how much less one method leaves than another, paired by seed."""
    ours, theirs = board.left(first), board.left(other)
    return over_seeds([theirs[seed] - ours[seed] for seed in ours if seed in theirs])


def decide(board: Board) -> str:
    """Return which method leads, or that none does."""
    order, margin = board.contest(), board.asked.margin
    if any(map(nothing_to_remove, board.records.values())):
        return "undecided: the original knows nothing of what is to be removed"
    if not order:
        return "undecided: no method made a model that could be attacked"
    limit = board.original[1] + board.asked.retain_budget
    first, *others = order
    if board.chosen[first].retain > limit:
        return f"undecided: no method stays within {board.asked.retain_budget:g} nats on dev"
    if not others:
        return f"undecided: {first} was compared with no other method"
    if seeds := board.unattacked(first):
        return (
            f"undecided: {first} leaves least, but relearning on it is invalid at "
            f"{counted(len(seeds), 'seed')}, so that what it leaves is a lower bound"
        )
    close = [name for name in others if not ahead(board, first, name).low > margin]
    if not close:
        return f"{first} leads: it leaves less than every other method by more than {margin:g}"
    return (
        f"undecided: {first} leaves least, and is not shown to be ahead of {_listed(close)} by "
        f"more than {margin:g}"
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def said(board: Board) -> str:
    """Return the result in words, made of the numbers."""
    parts = []
    for name in board.ranking():
        left = over_seeds(list(board.left(name).values()))
        ends = "" if math.isnan(left.low) else f" [{left.low:.2f}, {left.high:.2f}]"
        limit = board.original[1] + board.asked.retain_budget
        over = " (beyond the retain budget)" if board.chosen[name].retain > limit else ""
        parts.append(f"{name} {left.value:.2f}{ends}{over}")
    return f"Over {len(board.records)} seed(s), left at worst, repaired or not: {', '.join(parts)}."


def conclude(board: Board, final: Board | None = None) -> StudyResult:
    """Return what the leaderboard found.

    Args:
        board: Everything.
        final: The finalists under their second audit, which then decide.
    """
    decision = decide(final or board)
    tables: Iterable[StudyTable] = (
        *([board_table(final, FINAL)] if final else []),
        board_table(board), search_table(board), matched_table(board), settings_table(board),
        attacks_table(board),
    )  # fmt: skip
    parts = [said(board)]
    if final is not None:
        parts.append(f"Finalists under the second audit: {said(final)}")
    notes = list(board.notes)
    for one in (board, final) if final else (board,):
        notes += [f"{e.label}, seed {seed}: {why}" for (e, seed), why in one.failed.items()]
    every = [e for s in board.searched.values() for e in [s.cost]]
    flops, seconds = sum(c.flops for c in every), sum(c.seconds for c in every)
    notes.append(f"the search took {flops / 1e12:.3g} TFLOPs and {seconds:,.0f} seconds of workers")
    return StudyResult(
        tables=tuple(table for table in tables if table.rows),
        decision=decision,
        paragraph=" ".join([*parts, f"Decision: {decision}."]),
        domain=board.domain,
        models=board.refs,
        notes=tuple(dict.fromkeys(notes)),
        plots=plots_of(final or board),
    )
