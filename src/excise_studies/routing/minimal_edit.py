"""How small may an edit be that suppresses, and how small one that relearning does not undo?

Shape legend: M x N a matrix, R its singular values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float
from pydantic import Field, SerializeAsAny
from safetensors.torch import load_file
from torch import Tensor

from excise.core.context import Context, Stage
from excise.core.disk import write_text
from excise.core.stages import Runtime
from excise.data.domain import Domain, all_rows
from excise.domains.facts import Facts
from excise.evals.replicates import Decision, SeedEstimate, contrasts
from excise.evals.score import measure
from excise.evals.stats import Estimate
from excise.methods import GRAM, Filtering, Method
from excise.methods.base import ApplyMethod, Removal
from excise.methods.pretraining.routed.modules import Module
from excise.models.checkpoint import Checkpoint
from excise.record import StudyRow, StudyTable
from excise.run.stages import MakeModel
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.attacking import RelearnModel, RunKey, known
from excise_studies.base import Replicate, row
from excise_studies.levels import estimate, levels
from excise_studies.recovery import gaps, said
from excise_studies.routing.presets import grad_diff, npo, repselect, rmu, ssd
from excise_studies.routing.setting import RoutingSetting, facts_setting, make_setting, prepared
from excise_studies.setting import ExperimentSetting, measure_conditions, reference_models, result

Way = Literal["length", "rank", "entries"]
"""What an edit is made smaller by: all of it shrinks, its matrices lose singular values, or it
keeps its largest entries."""

WAYS: tuple[Way, ...] = ("length", "rank", "entries")
FINEST: Mapping[Way, float] = {"length": 1 / 16, "rank": 1 / 64, "entries": 1 / 4096}
"""The smallest sizes that are looked at."""

Aim = Literal["suppressing", "resistant"]
"""Whether an edit must hold before relearning or after it."""

AIMS: tuple[Aim, ...] = ("suppressing", "resistant")
FILTERED = "filtered"
ROUTED = "routed"
K = TypeVar("K", bound=Hashable)


class MinimalEdit(Study):
    """The smallest edits along the way of each method: one that suppresses, one that resists.

    Stated beforehand. What a method changes, delta, is made smaller in three ways: delta shrinks as
    a whole (or grows, up to `reach` times), every matrix of it keeps the singular vectors that
    matter most (vectors stay), or all of it keeps its largest entries. An edit suppresses if `dev`
    forget rows are known at most `bar` of the way from the oracle to the original; it resists if
    the same holds for the best that relearning makes of it, at any rate and step, against the
    oracle's best. The smallest size of each is found on `dev` by bisection among sizes half a
    doubling apart, as if a larger edit never held less. Rank and entries are cut from delta at
    `room` times the smallest length of either aim, so that both have as much to lose. M is
    log2(resistant / suppressing) of sizes, over the methods that edit a trained model. Resisting
    takes another edit if the lower end of M's 95 % interval is above `margin`; it takes none if M
    lies within it. Where no length up to `reach` resists, M counts at `reach`, a lower bound, and
    nothing is said to be equal; of one seed nothing is said. Within one method the two edits lie in
    each other by construction; how they overlap is measured between methods.
    """

    question: ClassVar[str] = (
        "How much larger, by length, rank or entries, is the smallest edit that relearning does "
        "not undo than the smallest that suppresses, and do those of different methods overlap?"
    )
    statistic: ClassVar[str] = (
        "M = log2 of the size of the smallest resistant edit over that of the smallest suppressing "
        "one, for length, rank and entries, mean over methods; resisting takes another edit if the "
        "lower end of the 95 % interval is above the margin (doublings). Found on dev by "
        "bisection; intervals over seeds and methods."
    )
    takes: ClassVar[str] = "20 minutes, 1 GiB; --seeds cuts it; resumes where it was stopped"
    quoted: ClassVar[tuple[str, ...]] = ("Smallest edits",)

    name: Literal["minimal-edit"] = "minimal-edit"
    """Name on the command line."""
    margin: float = Field(default=1.0, gt=0)
    """Doublings."""
    experiment: ExperimentSetting = facts_setting(
        domain=Facts(subjects=56, relations=4, objects=32, forget_share=0.4, dev_share=0.3)
    )
    """Data, models, attacker; a third of what is to be forgotten is `dev`."""
    methods: dict[str, SerializeAsAny[Method]] = {
        "rmu": rmu(),
        "npo": npo(),
        "grad_diff": grad_diff(),
        "ssd": ssd(),
        "repselect": repselect(),
    }
    """Methods that edit a trained model, set by hand on seed 0."""
    routed: SerializeAsAny[Method] | None = GRAM(
        module=Module(width=0.4), p_cr=0.5, p_as=0.3, ablate="zero"
    )
    """A routed model, whose edit is the ablation, beside them; empty for none."""
    bar: float = Field(default=0.25, gt=0, lt=1)
    """Share of the way from the oracle to the original that may be known."""
    reach: float = Field(default=4.0, ge=1)
    """How far an edit is drawn out at most."""
    room: float = Field(default=2.0, ge=1)
    """What lengths are multiplied by before rank and entries are cut."""
    keep: float = Field(default=0.9, ge=0, le=1)
    """Retain rows of `dev` that an edit should leave known; counted, and decides nothing."""

    def sizes(self, way: Way) -> tuple[float, ...]:
        """Return the sizes of a way, the largest first."""
        top = self.reach if way == "length" else 1.0
        steps = math.floor(2 * math.log2(top / FINEST[way]) + 1e-9)
        return tuple(top * 2 ** (-i / 2) for i in range(steps + 1))

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Make the edits, find the smallest, compare."""
        setting = make_setting(self.experiment, self.seeds, runtime, pool)
        search = Search(self, setting, edits_of(self, setting, runtime, pool), runtime, pool)
        found: dict[tuple[Way, Aim], Sizes] = {}
        for aim in AIMS:
            found["length", aim] = search.smallest("length", aim, dict.fromkeys(search.edits, 1.0))
            lengths = {key: self.room * size for key, (size, _) in found["length", aim].items()}
            for way in WAYS[1:]:
                found[way, aim] = search.smallest(way, aim, lengths)
        models = {
            (f"{name}, {aim}", seed): cut.checkpoint
            for aim in AIMS
            for (name, seed), (_, cut) in found["length", aim].items()
            if all((name, other) in found["length", aim] for other in self.seeds)
        }
        recovery = measure_conditions(self.experiment, models, setting.replicates, runtime, pool)
        ratios = {way: ratios_of(self, found, way) for way in WAYS}
        words = [_spoken(self, found, ratios), _shortest(self, found), _kept(self, found)]
        return result(
            recovery,
            [*words, gaps(recovery)],
            decide(self, ratios),
            setting.replicates,
            models,
            tables=(
                ratio_table(self, ratios),
                sizes_table(found),
                overlap_table(search.edits, found),
            ),
            chosen="settings of data, models and methods were chosen by hand on seed 0",
        )


# -- edits -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """A model before and after an edit."""

    before: Checkpoint
    after: Checkpoint


@dataclass(frozen=True)
class Cut:
    """A smaller edit, put on the model before it.

    Attributes:
        checkpoint: The model.
        forget: How well `dev` forget rows are known.
        retain: The same of `dev` retain rows.
        norm: Length of the edit, as a share of the length of all weights before it.
        rank: Singular values that its matrices keep, as a share of all.
        entries: Entries that it changes, as a share of all.
    """

    checkpoint: Checkpoint
    forget: float
    retain: float
    norm: float
    rank: float
    entries: float


@dataclass(frozen=True)
class CutEdit(Stage[Cut]):
    """An edit made smaller, scored on `dev`.

    Attributes:
        edit: The edit as a method made it.
        scale: What all of it is multiplied by.
        way: What is cut then.
        share: How much of that is left.
        domain: Gives `dev`.
        max_length: Tokens per row.
    """

    edit: Edit
    scale: float
    way: Way
    share: float
    domain: Domain
    max_length: int

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return f"edit-{self.way}"

    def make(self, ctx: Context) -> None:
        """Cut, write the model, score it."""
        before = self.edit.before.weights_of(self.edit.before.parameter_names())
        whole = delta(before, self.edit.after)
        part = {n: self.scale * d for n, d in cut(whole, self.way, self.share).items()}
        changed = {n: before[n].float() + d for n, d in part.items() if d.any()}
        model = self.edit.before.write(changed, ctx.work / "model").load(device=ctx.device)
        tokenizer, domain = self.edit.before.tokenizer(), self.domain
        scores = {}
        for role, rows, metric in (
            ("forget", all_rows(domain.dev_forget), domain.metrics[0]),
            ("retain", domain.dev_retain, domain.retain_metrics[0]),
        ):
            items = measure(model, tokenizer, rows, metric, max_length=self.max_length)
            scores[role] = known({"": items.checked().mean}, metric)[""]
        facts = {**scores, **shape_of(before, part)}
        write_text(ctx.work / "cut.json", json.dumps(facts))

    def read(self, folder: Path) -> Cut:
        """Return the model and its scores."""
        facts = json.loads((folder / "cut.json").read_text(encoding="utf-8"))
        return Cut(Checkpoint(folder / "model", self.edit.before.trust_remote_code), **facts)


@dataclass(frozen=True)
class BeforeAblation(Stage[Checkpoint]):
    """A routed model with its modules on, as a checkpoint of the start's shapes.

    Attributes:
        start: What it was trained from.
        weights: Its file `before_ablation`.
    """

    start: Checkpoint
    weights: Path

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "before-ablation"

    def make(self, ctx: Context) -> None:
        """Write the checkpoint."""
        self.start.write(load_file(self.weights), ctx.work / "model")

    def read(self, folder: Path) -> Checkpoint:
        """Return it."""
        return Checkpoint(folder / "model", self.start.trust_remote_code)


def delta(before: Mapping[str, Tensor], after: Checkpoint) -> dict[str, Tensor]:
    """Return by how much a model differs from one before it, by parameter."""
    return {n: t.float() - before[n].float() for n, t in after.weights_of(before).items()}


def cut(edit: Mapping[str, Tensor], way: Way, share: float) -> dict[str, Tensor]:
    """Return an edit with a share of its rank, or of the entries it changes.

    Args:
        edit: By parameter.
        way: What is cut; of the rank of matrices one is left at least, and vectors stay.
        share: What is left.
    """
    if way == "rank":
        return {n: truncated(d, share) if d.ndim == 2 else d for n, d in edit.items()}
    if way == "entries":
        flat = torch.cat([d.abs().flatten() for d in edit.values()])
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept[flat.topk(max(1, round(share * int((flat > 0).sum())))).indices] = True
        masks = kept.split([d.numel() for d in edit.values()])
        return {n: d * m.view_as(d) for (n, d), m in zip(edit.items(), masks, strict=True)}
    return dict(edit)


def truncated(matrix_MN: Float[Tensor, "M N"], share: float) -> Float[Tensor, "M N"]:
    """Return a matrix of a share of the rank."""
    u_MR, s_R, v_RN = torch.linalg.svd(matrix_MN, full_matrices=False)
    rank = math.ceil(share * len(s_R) - 1e-9)
    part_MN: Tensor = (u_MR[:, :rank] * s_R[:rank]) @ v_RN[:rank]
    return part_MN


def shape_of(before: Mapping[str, Tensor], edit: Mapping[str, Tensor]) -> dict[str, float]:
    """Return norm, rank and entries of an edit, as `Cut` has them."""

    def square(tensors: Mapping[str, Tensor]) -> float:
        return sum(float(t.double().square().sum()) for t in tensors.values())

    matrices = [d for d in edit.values() if d.ndim == 2]
    ranks = sum(int(torch.linalg.matrix_rank(d)) for d in matrices)
    return {
        "norm": math.sqrt(square(edit) / square(before)),
        "rank": ranks / max(1, sum(min(d.shape) for d in matrices)),
        "entries": sum(int((d != 0).sum()) for d in edit.values())
        / sum(d.numel() for d in edit.values()),
    }


def edits_of(
    study: MinimalEdit, setting: RoutingSetting, runtime: Runtime, pool: Pool
) -> dict[RunKey, Edit]:
    """Return what every method makes of the original, and the references beside them.

    `filtered` is trained without the forget rows from the original's own first weights: the
    difference of the two models is an edit too. `routed` is the ablation of a routed model.
    """
    experiment, replicates = study.experiment, setting.replicates
    inits = [
        MakeModel(experiment.model, replicate.original.tokenizer(), seed)
        for seed, replicate in replicates.items()
    ]
    starts = dict(zip(replicates, pool.map(runtime.run, inits), strict=True))
    filtering = Filtering(pretrain=experiment.pretrain)
    wanted: dict[RunKey, ApplyMethod] = {}
    for seed, replicate in replicates.items():
        for name, method in study.methods.items():
            wanted[name, seed] = ApplyMethod(method, replicate.original, replicate.domain, seed)
        wanted[FILTERED, seed] = ApplyMethod(filtering, starts[seed], replicate.domain, seed)
        if study.routed is not None:
            ready = prepared(study.routed, experiment)
            wanted[ROUTED, seed] = ApplyMethod(ready, setting.inits[seed], replicate.domain, seed)
    removals: list[Removal] = pool.map(runtime.run, list(wanted.values()))
    edits: dict[RunKey, Edit] = {}
    for (name, seed), removal in zip(wanted, removals, strict=True):
        before = replicates[seed].original
        if name == ROUTED:
            weights = Path(removal.extras["files"]["before_ablation"])
            before = runtime.run(BeforeAblation(setting.inits[seed], weights))
        edits[name, seed] = Edit(before, removal.checkpoint)
    return edits


# -- the search ------------------------------------------------------------------------------------

Sizes = Mapping[RunKey, tuple[float, Cut]]
"""The smallest size, and the edit of that size, by method and seed; what has none is not in it."""


def bisected(
    keys: Sequence[K], count: int, holds: Callable[[Mapping[K, int]], Mapping[K, bool]]
) -> dict[K, int]:
    """Return by key the last of `count` sizes that holds, the largest being number 0.

    Args:
        keys: What is searched for, all at the same time.
        count: Number of sizes.
        holds: Says of a size for each of some keys whether it holds; if one does, all larger ones
            are taken to hold.

    Returns:
        Keys of which not even the largest holds are left out.
    """
    low = {key: 0 for key, held in holds(dict.fromkeys(keys, 0)).items() if held}
    high = dict.fromkeys(low, count)
    while middle := {k: (low[k] + high[k]) // 2 for k in low if high[k] - low[k] > 1}:
        for key, held in holds(middle).items():
            (low if held else high)[key] = middle[key]
    return low


@dataclass(frozen=True)
class Search:
    """What the search for the smallest edits needs.

    Attributes:
        study: What was stated.
        setting: Data and reference models.
        edits: By method and seed.
        runtime: Where stages are kept.
        pool: Worker processes.
    """

    study: MinimalEdit
    setting: RoutingSetting
    edits: Mapping[RunKey, Edit]
    runtime: Runtime
    pool: Pool

    def smallest(self, way: Way, aim: Aim, scales: Mapping[RunKey, float]) -> Sizes:
        """Return the smallest edits of a way that reach an aim.

        Args:
            way: What is made smaller.
            aim: What must hold.
            scales: What every edit is multiplied by beforehand; others are left out.
        """
        sizes, bars = self.study.sizes(way), self.bars(aim)

        def stage(key: RunKey, at: int) -> CutEdit:
            size = sizes[at] if way == "length" else 1.0
            return CutEdit(
                self.edits[key],
                scales[key] * size,
                way,
                1.0 if way == "length" else sizes[at],
                self.setting.replicates[key[1]].domain,
                self.study.experiment.pretrain.max_length,
            )

        def holds(at: Mapping[RunKey, int]) -> dict[RunKey, bool]:
            stages = [stage(key, i) for key, i in at.items()]
            cuts = dict(zip(at, self.pool.map(self.runtime.run, stages), strict=True))
            level = {key: each.forget for key, each in cuts.items()}
            if aim == "resistant":
                models = {
                    key: c.checkpoint for key, c in cuts.items() if level[key] <= bars[key[1]]
                }
                level |= {key: best for key, (_, best) in self.relearned(models).items()}
            return {key: level[key] <= bars[key[1]] for key in at}

        found = bisected(list(scales), len(sizes), holds)
        return {key: (sizes[i], self.runtime.run(stage(key, i))) for key, i in found.items()}

    def bars(self, aim: Aim) -> dict[int, float]:
        """Return by seed how well `dev` forget rows may be known."""
        replicates: Mapping[int, Replicate] = self.setting.replicates
        levels = self.relearned(reference_models(replicates, tuple(replicates)))
        at = AIMS.index(aim)
        return {
            seed: (1 - self.study.bar) * levels["oracle", seed][at]
            + self.study.bar * levels["original", seed][0]
            for seed in replicates
        }

    def relearned(self, models: Mapping[RunKey, Checkpoint]) -> dict[RunKey, tuple[float, float]]:
        """Return how well `dev` forget rows are known before relearning, and at best in it."""
        attacker = self.study.experiment.attacker
        budget = attacker.budget(self.study.experiment.pretrain.max_length).without(("rates",))
        jobs = {
            (key, rate): RelearnModel(
                model, self.setting.replicates[key[1]].domain, budget, rate, key[1]
            )
            for key, model in models.items()
            for rate in attacker.rates
        }
        curves = dict(zip(jobs, self.pool.map(self.runtime.run, list(jobs.values())), strict=True))
        levels: dict[RunKey, list[float]] = {}
        for (key, _), curve in curves.items():
            levels.setdefault(key, []).extend(sum(u.values()) / len(u) for u in curve["dev"])
        return {key: (values[0], max(values)) for key, values in levels.items()}


# -- what was found --------------------------------------------------------------------------------

Found = Mapping[tuple[Way, Aim], Sizes]


@dataclass(frozen=True)
class Ratios:
    """M of one way.

    Attributes:
        value: Mean over methods and seeds.
        single: M of one method at one seed.
        bounds: How many of them are lower bounds, because nothing up to `reach` resists.
    """

    value: Estimate
    single: Mapping[RunKey, float]
    bounds: int = 0


def ratios_of(study: MinimalEdit, found: Found, way: Way) -> Ratios:
    """Return M of a way, over the methods that edit a trained model."""
    first, second = found[way, "suppressing"], found[way, "resistant"]
    single, bounds = dict[RunKey, float](), 0
    for key, (size, _) in first.items():
        if key[0] not in study.methods:
            continue
        if key in second:
            single[key] = math.log2(second[key][0] / size)
        elif way == "length":
            single[key] = math.log2(study.reach / size)
            bounds += 1
    by_seed: dict[int, dict[str, float]] = {}
    for (name, seed), ratio in single.items():
        by_seed.setdefault(seed, {})[name] = ratio
    if not by_seed:
        nan = math.nan
        return Ratios(SeedEstimate(nan, nan, nan, 0), single)
    shared = levels({way: by_seed}, {})
    return Ratios(estimate(shared.at(way), shared), single, bounds)


def decide(study: MinimalEdit, ratios: Mapping[Way, Ratios]) -> Decision:
    """Return what M says of every way."""
    values: dict[str, Estimate] = {way: of_way.value for way, of_way in ratios.items()}
    asked = contrasts(values, (-study.margin, study.margin), study.error)
    words = {
        "above": f"resisting takes more than {study.margin:g} doubling(s)",
        "equal": f"resisting takes no more within {study.margin:g} doubling(s)",
        "below": "resisting takes less than suppressing",
        "undecided": "undecided",
    }
    parts = []
    for way, of_way in ratios.items():
        bounded = of_way.bounds and asked[way].verdict in ("equal", "below")
        parts.append(f"{way}: {'undecided' if bounded else asked[way].say(words)}")
    return Decision("; ".join(parts), tuple(asked.values()))


def _spoken(study: MinimalEdit, found: Found, ratios: Mapping[Way, Ratios]) -> str:
    """Return M in words."""
    asked = len(study.methods) * len(study.seeds)
    first = ratios["length"]
    parts = [f"{way} {said(of_way.value)} ({len(of_way.single)})" for way, of_way in ratios.items()]
    return (
        f"Of {asked} edits {len(first.single)} suppress at a length up to {study.reach:g} times "
        f"their own and {len(first.single) - first.bounds} resist. Doublings from suppressing to "
        f"resistant (of so many edits): {', '.join(parts)}."
    )


def _shortest(study: MinimalEdit, found: Found) -> str:
    """Return in words which methods make the shortest edits, by seed."""
    parts = []
    for seed in study.seeds:
        ends = []
        for aim in AIMS:
            known = {k: c for k, (_, c) in found["length", aim].items() if k[1] == seed}
            mine = {k[0]: c.norm for k, c in known.items() if k[0] in study.methods}
            least = min(mine, key=lambda name: mine[name], default="")
            ends.append(f"{least} {mine[least]:.3f}" if least else "none")
        parts.append(f"seed {seed}: {ends[0]}, {ends[1]}")
    return (
        "The shortest edits as a share of the length of all weights, suppressing and resistant: "
        f"{'; '.join(parts)}."
    )


def _kept(study: MinimalEdit, found: Found) -> str:
    """Return in words how many edits leave retain rows known."""
    parts = []
    for aim in AIMS:
        mine = [c for k, (_, c) in found["length", aim].items() if k[0] in study.methods]
        good = sum(c.retain >= study.keep for c in mine)
        parts.append(f"{good} of {len(mine)} {aim} ones")
    return f"At least {study.keep:g} of dev retain rows are left known by {' and '.join(parts)}."


def ratio_table(study: MinimalEdit, ratios: Mapping[Way, Ratios]) -> StudyTable:
    """Return M of all methods and of each."""
    rows = [row("all methods", f"doublings, {way}", of_way.value) for way, of_way in ratios.items()]
    for way, of_way in ratios.items():
        rows += [
            StudyRow(condition=name, seed=seed, metric=f"doublings, {way}", value=value, n=1)
            for (name, seed), value in of_way.single.items()
        ]
    return StudyTable(title="From suppressing to resistant", note=study.statistic, rows=tuple(rows))


def sizes_table(found: Found) -> StudyTable:
    """Return the sizes of the smallest edits, means over the seeds that have one."""
    groups: dict[tuple[str, str], list[float]] = {}
    for (way, aim), sizes in found.items():
        for (name, _), (_, cut) in sizes.items():
            values = {
                "length": {"length": cut.norm, "retain": cut.retain},
                "rank": {"rank": cut.rank, "length at that rank": cut.norm},
                "entries": {"entries": cut.entries, "length at those entries": cut.norm},
            }[way]
            for metric, value in values.items():
                groups.setdefault((f"{name}, {aim}", metric), []).append(value)
    return StudyTable(
        title="Smallest edits",
        note=(
            "Shares: length of that of all weights, rank of that of all matrices, entries of all "
            "entries; retain: of `dev`, at the length. n counts the seeds that have such an edit."
        ),
        rows=tuple(
            StudyRow(condition=c, metric=m, value=sum(v) / len(v), n=len(v))
            for (c, m), v in groups.items()
        ),
    )


PAIRS: tuple[tuple[Aim, Aim], ...] = (
    ("suppressing", "suppressing"),
    ("resistant", "resistant"),
    ("suppressing", "resistant"),
)
"""Aims of the edits whose overlap is measured."""


def overlap_table(edits: Mapping[RunKey, Edit], found: Found) -> StudyTable:
    """Return how the smallest edits of different methods overlap, means over seeds."""
    groups: dict[tuple[str, str], list[float]] = {}
    for one, other in PAIRS:
        for way in WAYS[1:]:
            measured = _entries_shared if way == "entries" else _spaces_shared
            mine, theirs = (
                {
                    key: delta(weights_of(edits[key].before), cut.checkpoint)
                    for key, (_, cut) in found[way, aim].items()
                    if key[0] != ROUTED
                }
                for aim in (one, other)
            )
            for a, b in ((a, b) for a in mine for b in theirs if a[1] == b[1]):
                if a < b or (one != other and a != b):
                    label = f"{a[0]} {one}, {b[0]} {other}"
                    for metric, value in measured(mine[a], theirs[b]).items():
                        groups.setdefault((label, metric), []).append(value)
    return StudyTable(
        title="Overlap between methods",
        note=(
            "Entries: cosine, and entries changed by both among those changed by either (Jaccard), "
            "of edits with the fewest entries. Directions: mean squared cosine of the principal "
            "angles between what matrices of the lowest rank read and write, 1 if the smaller lies "
            "in the larger; beside it that of random ones. n counts seeds."
        ),
        rows=tuple(
            StudyRow(condition=c, metric=m, value=sum(v) / len(v), n=len(v))
            for (c, m), v in groups.items()
        ),
    )


def weights_of(model: Checkpoint) -> dict[str, Tensor]:
    """Return all parameters of a model."""
    return model.weights_of(model.parameter_names())


def _entries_shared(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    """Return cosine and Jaccard index of two edits."""
    x, y = (torch.cat([d.double().flatten() for d in edit.values()]) for edit in (a, b))
    both, either = ((x != 0) & (y != 0)).sum(), ((x != 0) | (y != 0)).sum()
    return {
        "cosine": float(x @ y / (x.norm() * y.norm())),
        "entries of both": float(both / either),
    }


def _spaces_shared(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    """Return how row and column spaces of two edits' matrices overlap, and what chance gives."""
    shared: list[float] = []
    chance: list[float] = []
    for name in a:
        if a[name].ndim == 2 and a[name].any() and b[name].any():
            for x, y in ((a[name], b[name]), (a[name].T, b[name].T)):
                u, v = _span(x), _span(y)
                shared.append(float((u.T @ v).square().sum()) / min(u.shape[1], v.shape[1]))
                chance.append(max(u.shape[1], v.shape[1]) / len(x))
    if not shared:
        return {}
    return {
        "directions of both": sum(shared) / len(shared),
        "directions, by chance": sum(chance) / len(chance),
    }


def _span(matrix_MN: Float[Tensor, "M N"]) -> Tensor:
    """Return an orthonormal basis of a matrix's column space."""
    u_MR, s_R, _ = torch.linalg.svd(matrix_MN.double(), full_matrices=False)
    basis: Tensor = u_MR[:, : int((s_R > 1e-4 * s_R[0]).sum())]
    return basis
