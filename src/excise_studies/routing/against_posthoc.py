"""Gradient routing against methods that edit a trained model, where labels are imperfect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from excise.core.errors import nearest
from excise.evals.replicates import Decision, contrasts, over_seeds
from excise.methods import Chain, Filtering, Method, Potion
from excise.methods.search import changed
from excise.record import Estimate, StudyRow, StudyTable
from excise.record.measured import change_of
from excise.run.study import StudyResult
from excise.train.fit import FitConfig
from excise_studies.base import row
from excise_studies.leaderboard.board import Leaderboard
from excise_studies.leaderboard.repair import RetainTuning
from excise_studies.leaderboard.tables import Board, Entry, conclude, left_of, not_attacked
from excise_studies.recovery import listed, said
from excise_studies.routing.presets import (
    BASELINES,
    LENGTH,
    PRESETS,
    grad_diff,
    npo,
    rmu,
    ssd,
    tar,
)
from excise_studies.routing.setting import (
    LabelSetting,
    Missed,
    Rest,
    label_settings,
)

TUNED = "_then_retain"
"""Ends the name of a method that is followed by fine-tuning on retain rows."""


def contestants() -> dict[str, Method]:
    """Return the methods that are compared, by name."""
    return {
        **{name: PRESETS[name] for name in ("era", "sgtm", "sgtm_relabelled", "gram")},
        "rmu": rmu(),
        "npo": npo(),
        "grad_diff": grad_diff(),
        "tar": tar(),
        "ssd": ssd(),
        "potion": Potion(max_length=LENGTH),
        "filtering": Filtering(),
        "relabel_rows": BASELINES["relabel_rows"],
    }


class RoutingAgainstPosthoc(Leaderboard):
    """Methods of both kinds, chosen on dev and audited, at rates of labels and ways to miss.

    Stated beforehand. Settings are chosen as in the leaderboard, on `dev` of the seed `tuned_on`,
    all labels as at the first of `rates` and no attack seen; those of routing were chosen by hand
    on seeds 0, 11 and 12 of the smaller data of `partial-labels` besides. *Left* is the largest
    depth gap of a model over every score before an attack and after every attack of its audit
    (levels D0 to D4). D of a method is its left minus that of `preset` where the share `decide_at`
    of what is to be forgotten is labelled, averaged over the ways to miss, paired by seed. The
    preset beats a method if the lower end of D's 95 % interval over seeds (Student's t) is above
    `margin`; the method does as well if the upper end is below it and its retain score, averaged
    alike, falls by at most `keep` against the original. Where relearning on a model is invalid,
    since it resists being taught, what it left is a lower bound: a method does not do as well by
    it, and a preset beats nobody. Fine-tuning on retain rows makes SSD (or
    Potion) work if the two in a row do as well. Everything else is shown and decides nothing.
    """

    question: ClassVar[str] = (
        "Under imperfect labels, does gradient routing leave less behind than methods that edit a "
        "trained model, and do SSD and Potion work once they are fine-tuned on retain rows?"
    )
    statistic: ClassVar[str] = (
        "D = largest depth gap of the levels D0 to D4 (held-out test set, original 1, oracle 0) of "
        "a method minus that of `preset`, at the share `decide_at` of labels, mean over ways to "
        "miss, paired by seed; the preset beats the method if the lower end of the 95 % interval "
        "is above the margin, the method does as well if the upper end is below it and it keeps "
        "retain within `keep`; neither by models on which relearning is invalid."
    )
    takes: ClassVar[str] = (
        "5 hours, 2 GiB: 14 methods x 7 settings of the labels x 3 seeds, ten seconds an audit; "
        "--arms, --rates, --missed and --seeds cut it; resumes where it was stopped"
    )

    name: Literal["routing-against-posthoc"] = "routing-against-posthoc"
    """Name on the command line."""
    methods: dict[str, SerializeAsAny[Method]] = Field(default_factory=contestants)
    """Methods by name, with the settings of the first trial."""
    followed: tuple[str, ...] = ("ssd", "potion")
    """Methods that run a second time with fine-tuning on retain rows behind them, searched as one:
    `ssd_then_retain`."""
    then: FitConfig = FitConfig(steps=40, lr=1e-3, batch_size=64, clip=1.0)
    """That fine-tuning."""
    arms: tuple[str, ...] = ()
    """Methods to run, by name; empty for all."""
    trials: int = Field(default=8, ge=1)
    """Settings of every method; the first is as given."""
    rates: tuple[float, ...] = Field(default=(1.0, 0.5, 0.1), min_length=1)
    """Shares of the forget rows that carry a label. Settings are chosen at the first."""
    missed: tuple[Missed, ...] = Field(default=("occurrences", "units", "structured"), min_length=1)
    """What labels miss: rows one by one, units whole, or paraphrases that the labeller does not
    know."""
    rest: Rest = "unlabeled"
    """`unlabeled`: what is missed has no label, nor has the same share of the retain rows: methods
    that edit a model read neither. `core`: what is missed is among the retain rows."""
    repair: FitConfig | None = None
    """Fine-tuning on retain rows that makes repaired rows of all methods; empty for none."""
    preset: str = "sgtm_relabelled"
    """The routed method that others are held against."""
    decide_at: float = 0.5
    """Share of labels at which D is read."""
    keep: float = Field(default=0.05, ge=0)
    """What the retain score may fall by."""

    @model_validator(mode="after")
    def _decides(self) -> Self:
        """Refuse to decide about what is not run."""
        run = {*self.methods, *(f"{name}{TUNED}" for name in self.followed)}
        for field, names, known in (
            ("followed", self.followed, self.methods),
            ("arms", self.arms, run),
            ("preset", (self.preset,), self.arms or self.methods),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(
                        f"{field}: no method that runs is called '{name}'; {nearest(name, known)}"
                    )
        if self.decide_at not in self.rates:
            raise ValueError(f"decide_at: {self.decide_at:g} is none of 'rates'; name one of them")
        return self

    def first(self) -> dict[str, Method]:
        """Return the methods that run, with the settings of their first trial.

        They are of a size for these models already.
        """
        known = {n: changed(m, self.small.get(n, {})) for n, m in self.methods.items()}
        tuning = RetainTuning(fit=self.then, max_length=LENGTH)
        for name in self.followed:
            known[f"{name}{TUNED}"] = Chain(methods=(known[name], tuning))
        return {name: known[name] for name in self.arms or known}

    def conclude(self, board: Board, final: Board | None = None) -> StudyResult:
        """Return the leaderboard's tables, and what D says, before them."""
        last = final or board
        found = conclude(board, final)
        differences = {
            name: behind(self, last, name) for name in last.chosen if name != self.preset
        }
        decision = decide(self, last, differences)
        words = [
            f"Over {len(last.records)} seed(s), left at worst with {labels}: "
            f"{listed(_lefts(last, labels))}."
            for labels in label_settings(self.rates, self.missed)
        ]
        words.append(f"D against {self.preset}: {listed(differences)}.")
        words += [_repaired(self, last, name) for name in _both(self, last)]
        tables = (labels_table(self, last), difference_table(self, last, differences))
        return replace(
            found,
            tables=(*tables, *found.tables),
            decision=decision.text,
            contrasts=decision.contrasts,
            paragraph=" ".join([*words, f"Decision: {decision.text}."]),
        )


def left_at(
    board: Board, name: str, settings: Sequence[LabelSetting]
) -> dict[int, tuple[float, float]]:
    """Return by seed what a method left and how its retain score changed, means over settings.

    Args:
        board: Audits of all seeds.
        name: A method.
        settings: Settings of the labels; a seed that lacks one is left out.
    """
    out = {}
    for seed, record in board.records.items():
        names = [Entry(name, labels).name for labels in settings]
        lefts = [left_of(record, entry) for entry in names]
        kept = [change_of(record, entry, "retain_test") for entry in names]
        values = [e.value for e in lefts if e is not None], [e.value for e in kept if e is not None]
        if all(len(each) == len(settings) for each in values):
            out[seed] = (mean(values[0]), mean(values[1]))
    return out


def deciding(study: RoutingAgainstPosthoc) -> tuple[LabelSetting, ...]:
    """Return the settings of the labels over which D is a mean."""
    return label_settings((study.decide_at,), study.missed)


def behind(study: RoutingAgainstPosthoc, board: Board, name: str) -> Estimate:
    """Return D: how much more a method left than the preset, paired by seed."""
    theirs, ours = (left_at(board, each, deciding(study)) for each in (name, study.preset))
    return over_seeds([theirs[seed][0] - ours[seed][0] for seed in theirs if seed in ours])


def keeps(study: RoutingAgainstPosthoc, board: Board, name: str) -> bool:
    """Return whether a method keeps the retain score within the bound, where D is read."""
    changes = [change for _, change in left_at(board, name, deciding(study)).values()]
    return bool(changes) and mean(changes) >= -study.keep


def resists(study: RoutingAgainstPosthoc, board: Board, name: str) -> bool:
    """Return whether relearning on a method is invalid somewhere where D is read."""
    entries = [Entry(name, labels) for labels in deciding(study)]
    return any(not_attacked(board.compared(entry)) for entry in entries)


def decide(
    study: RoutingAgainstPosthoc, board: Board, differences: dict[str, Estimate]
) -> Decision:
    """Return whom the preset beats, who does as well, and what is open."""
    groups: dict[str, list[str]] = {
        "beats": [], "dear": [], "not attacked": [], "as well": [], "open": [],
    }  # fmt: skip
    asked = contrasts(differences, (study.margin,), study.error)
    bounded = resists(study, board, study.preset)
    for name, contrast in asked.items():
        if contrast.above(study.margin) and not bounded:
            groups["beats"].append(name)
        elif contrast.below(study.margin) and resists(study, board, name):
            groups["not attacked"].append(name)
        elif contrast.below(study.margin):
            groups["as well" if keeps(study, board, name) else "dear"].append(name)
        else:
            groups["open"].append(name)
    words = {
        "beats": f"{study.preset} leaves less than {{}}",
        "as well": f"{{}} leave(s) no more within {study.margin:g}",
        "dear": f"{{}} leave(s) no more and cost(s) more than {study.keep:g} of retain",
        "not attacked": "undecided against {}, on which relearning is invalid",
        "open": "undecided against {}",
    }
    parts = [words[key].format(", ".join(names)) for key, names in groups.items() if names]
    if bounded:
        parts.append(f"relearning on {study.preset} itself is invalid, so that it beats nobody")
    if not keeps(study, board, study.preset):
        parts.append(f"{study.preset} itself does not keep retain within {study.keep:g}")
    for name in _both(study, board):
        works = f"{name}{TUNED}" in groups["as well"]
        shown = "makes" if works else "is not shown to make"
        parts.append(f"fine-tuning on retain rows {shown} {name} work")
    text = "; ".join(parts) or f"undecided: nothing was compared with {study.preset}"
    return Decision(text, tuple(asked.values()))


def _both(study: RoutingAgainstPosthoc, board: Board) -> list[str]:
    """Return the methods that were run with and without fine-tuning on retain rows."""
    return [n for n in study.followed if n in board.chosen and f"{n}{TUNED}" in board.chosen]


def _repaired(study: RoutingAgainstPosthoc, board: Board, name: str) -> str:
    """Return in words what fine-tuning on retain rows does to what a method left."""
    alone, tuned = (left_at(board, n, deciding(study)) for n in (name, f"{name}{TUNED}"))
    change = over_seeds([tuned[seed][0] - alone[seed][0] for seed in alone if seed in tuned])
    return f"Fine-tuning on retain rows changed what {name} left by {said(change)}."


def _lefts(board: Board, labels: LabelSetting) -> dict[str, Estimate]:
    """Return what every method left at one setting of the labels, the least first."""
    known = {n: left_at(board, n, (labels,)) for n in board.chosen}
    values = {n: over_seeds([v for v, _ in at.values()]) for n, at in known.items() if at}
    return dict(sorted(values.items(), key=lambda item: item[1].value))


def labels_table(study: RoutingAgainstPosthoc, board: Board) -> StudyTable:
    """Return what every method left and kept, by setting of the labels."""
    rows: list[StudyRow] = []
    for name in board.chosen:
        for labels in label_settings(study.rates, study.missed):
            at = left_at(board, name, (labels,)).values()
            if at:
                rows.append(row(name, f"left, {labels}", over_seeds([v for v, _ in at])))
                rows.append(row(name, f"retain change, {labels}", over_seeds([k for _, k in at])))
    return StudyTable(
        title="Left by labels",
        note=(
            "Largest depth gap of the levels D0 to D4: 0 is the oracle, 1 the original. Retain "
            "change: against the original, positive is better. Intervals are over seeds."
        ),
        rows=tuple(rows),
    )


def difference_table(
    study: RoutingAgainstPosthoc, board: Board, differences: dict[str, Estimate]
) -> StudyTable:
    """Return D and retain of every method at the labels that decide."""
    rows: list[StudyRow] = []
    for name in (study.preset, *differences):
        kept = [change for _, change in left_at(board, name, deciding(study)).values()]
        if name in differences:
            rows.append(row(name, "D", differences[name]))
        rows.append(row(name, "retain change", over_seeds(kept)))
    return StudyTable(
        title=f"Against {study.preset} at {100 * study.decide_at:g} % labels",
        note=study.statistic,
        rows=tuple(rows),
    )
