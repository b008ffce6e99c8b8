"""Do SSD and Potion find the module in which a routed model keeps a capability?"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny
from safetensors import safe_open
from torch import Tensor

from excise.core.context import Context, Stage
from excise.core.disk import write_text
from excise.core.stages import Runtime
from excise.data.domain import Domain, Rows
from excise.data.stream import Batch, collate, encode
from excise.evals.replicates import Contrast, Decision
from excise.methods import GRAM, SSD, AblatedPlain, Method, Potion
from excise.methods.base import Removal
from excise.methods.importance import SortedRatios, Sums, accumulate, batch_loss, share_of
from excise.methods.posthoc.potion import asked, knowledge, search
from excise.methods.pretraining.routed.modules import Module, serve
from excise.methods.tuning import forget_rows
from excise.models.checkpoint import Checkpoint
from excise.models.names import parameters_by_name
from excise.record import StudyRow, StudyTable
from excise.routing import Groups, Part
from excise.routing.resolve import resolve
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.attacking import RunKey
from excise_studies.base import row
from excise_studies.levels import Levels, estimate, levels
from excise_studies.recovery import said
from excise_studies.routing.presets import era
from excise_studies.routing.setting import (
    facts_setting,
    make_setting,
    train_conditions,
)
from excise_studies.setting import CHOSEN, SIZE, ExperimentSetting

CONTROL = "no routing"


class SSDFinds(Study):
    """Routed models whose module is known, and the order in which SSD and Potion take weights.

    Stated beforehand. Models are trained with modules and looked at before any is cut off. All
    weights are sorted by I_f / I_D, from the rows that are to be forgotten and those that stay; as
    many as the module has are taken from the top. R is the share of the module's entries among
    them, which is precision and recall at once, of the first condition. Its units are the module's
    neurons. A localiser finds the module if the lower end of R's 95 % interval is above `margin`,
    does not if the upper end is below it. Beside it stand R where modules of the same size were
    trained without routing, and precision and recall of what SSD takes at its published selection
    and Potion where its search ends.
    """

    question: ClassVar[str] = (
        "Are the weights that SSD and Potion dampen those in which a routed model keeps what is to "
        "be forgotten?"
    )
    statistic: ClassVar[str] = (
        "R = share of the module's entries among the same number of entries with the largest "
        "I_f / I_D of the whole model; the module is found if the lower end of the 95 % interval "
        "is above the margin. Intervals over seeds and the module's neurons."
    )
    takes: ClassVar[str] = "6 minutes, 1 GiB"

    name: Literal["ssd-finds"] = "ssd-finds"
    """Name on the command line."""
    margin: float = Field(default=0.5, gt=0, lt=1)
    """Share of the module's entries."""
    experiment: ExperimentSetting = facts_setting()
    """Data, models."""
    routed: dict[str, SerializeAsAny[Method]] = {
        "gram": GRAM(module=Module(width=0.5, grow=True)),
        "era": era(),
    }
    """Routed models; the first one decides. Chosen on seed 0 because, modules on, they know what is
    to be forgotten and what stays, and modules off only the latter."""
    holds: float = Field(default=0.5, ge=0, le=1)
    """By how much forget rows must be known less with the module off, or there is nothing to find
    in it."""
    control: AblatedPlain = AblatedPlain(module=Module(width=0.5, grow=True))
    """The same modules without routing."""
    ssd: SSD = SSD(against="retain", batch_size=8)
    """SSD; against retain rows, since no weight is ten times as important to a third of the rows
    as to all."""
    potion: Potion = Potion(batch_size=8)
    """Potion."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Train, locate, compare."""
        setting = make_setting(self.experiment, self.seeds, runtime, pool)
        methods: dict[str, Method] = {**self.routed, CONTROL: self.control}
        removals = train_conditions(
            {name: (method, None) for name, method in methods.items()}, setting, runtime, pool
        )
        found: dict[str, dict[RunKey, Located]] = {}
        for localiser in (self.ssd, self.potion):
            jobs = [
                Locate(
                    setting.inits[seed],
                    before(removal),
                    setting.replicates[seed].domain,
                    localiser,
                    self.experiment.pretrain.max_length,
                    removal.checkpoint,
                )
                for (_, seed), removal in removals.items()
            ]
            located = pool.map(runtime.run, jobs)
            found[localiser.name] = dict(zip(removals, located, strict=True))
        shares = {name: by_neuron(of_one) for name, of_one in found.items()}
        first = next(iter(self.routed))
        held = holding(found[self.ssd.name], first)
        decided = [decide(self, name, first, values) for name, values in shares.items()]
        words = [f"Without its module {first} knew {held:.2f} less of the forget rows."]
        words += [spoken(name, values) for name, values in shares.items()]
        decision = Decision(
            "; ".join(d.text for d in decided), tuple(c for d in decided for c in d.contrasts)
        )
        if held < self.holds:
            why = f"invalid: the module of {first} does not hold what is to be forgotten"
            decision = Decision(why)
        return StudyResult(
            tables=(found_table(self, shares), published_table(found)),
            decision=decision.text,
            contrasts=decision.contrasts,
            paragraph=" ".join([*words, f"Decision: {decision.text}."]),
            domain=setting.replicates[self.seeds[0]].domain,
            models=tuple(r for s in self.seeds for r in setting.replicates[s].refs()),
            notes=(CHOSEN, SIZE),
        )


def before(removal: Removal) -> Path:
    """Return the file of a routed model with its modules on."""
    return Path(removal.extras["files"]["before_ablation"])


@dataclass(frozen=True)
class Located:
    """What a localiser says of one model.

    Attributes:
        neurons: Share of each of the module's neurons' entries among as many top ones.
        module: The module's share of all entries.
        precision: Of what is dampened at the published setting; None where nothing is.
        recall: The same.
        dampened: Share of all entries that is dampened there.
        known: How well rows are known: to forget and to keep with the module on, to forget with it
            off.
    """

    neurons: Mapping[str, float]
    module: float
    precision: float | None
    recall: float
    dampened: float
    known: tuple[float, float, float]


@dataclass(frozen=True)
class Locate(Stage[Located]):
    """Importances of a model with its modules on, held against where the modules are.

    Attributes:
        start: What the model was trained from: shapes and tokenizer.
        before: Weights with the modules on; the header says where they are.
        domain: The rows.
        localiser: SSD or Potion.
        max_length: Tokens per row.
        ablated: The model with its modules off.
    """

    start: Checkpoint
    before: Path
    domain: Domain
    localiser: SSD | Potion
    max_length: int
    ablated: Checkpoint

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return f"locate-{self.localiser.name}"

    def make(self, ctx: Context) -> None:
        """Measure, sort, and write down what lies where."""
        with safe_open(self.before, framework="pt") as file:
            modules = json.loads(file.metadata()["modules"])
        model = serve(self.start, self.before, keep=modules["capabilities"]).to(ctx.device)
        parts = {
            name: tuple(map(Part.model_validate, of_module))
            for name, of_module in modules["parts"].items()
        }
        forget = self._sums(model, forget_rows(self.domain), ctx, "forget")
        retain = self._sums(model, self.domain.retain, ctx, "retain")
        full = forget + retain if self.localiser.against == "all" else retain
        ratios = SortedRatios(forget, full, ctx.work / "ratios", floor=0.0)
        rows = forget_rows(self.domain)
        known = [self.known(model, rows), self.known(model, self.domain.retain)]
        known.append(self.known(self.ablated.load(), rows))
        facts = {**against_truth(self, model, parts, ratios), "known": known}
        write_text(ctx.work / "located.json", json.dumps(facts))
        shutil.rmtree(ctx.work / "ratios")
        for path in ctx.work.glob("*.safetensors"):
            path.unlink()

    def read(self, folder: Path) -> Located:
        """Return what was written down."""
        facts = json.loads((folder / "located.json").read_text(encoding="utf-8"))
        return Located(**{**facts, "known": tuple(facts["known"])})

    def known(self, model: Any, rows: Rows) -> float:
        """Return how well a model knows rows of the domain."""
        part, metric = asked(replace(self.domain, forget={"": rows}), 256)
        return knowledge(model, self.start.tokenizer(), part, metric, self.max_length)

    def _sums(self, model: Any, rows: Rows, ctx: Context, role: str) -> Sums:
        """Return the folded gradients of rows in their order."""
        kind: Any = "nll" if isinstance(self.localiser, SSD) else self.localiser.loss
        tokenizer, size = self.start.tokenizer(), self.localiser.batch_size
        examples = encode(rows, tokenizer, max_length=self.max_length)
        batches: list[Batch] = [
            collate(examples[i : i + size], pad_id=tokenizer.pad_token_id).to(ctx.device)
            for i in range(0, len(examples), size)
        ]
        return accumulate(
            model,
            batches,
            batch_loss(model, kind),
            ctx.work / f"{role}.safetensors",
            fold="square" if kind == "nll" else "abs",
        )


def against_truth(
    stage: Locate, model: Any, parts: Mapping[str, Sequence[Part]], ratios: SortedRatios
) -> dict[str, Any]:
    """Return the fields of `Located`.

    Args:
        stage: The localiser, and the rows it asks.
        model: The model; Potion's search dampens it.
        parts: Where the modules are.
        ratios: I_f / I_D of all entries.
    """
    shapes = {name: p.shape for name, p in parameters_by_name(model).items()}
    total = sum(shape.numel() for shape in shapes.values())
    map = resolve(model, Groups(parts={name: tuple(of) for name, of in parts.items()}))
    owned = [(n, o) for n, slices in map.owners.items() for o in slices if o.group in parts]
    size = sum(map.entries(name, o) for name, o in owned)
    top = chosen(ratios, shapes, ratios.ranked(size))
    hits: dict[str, list[Tensor]] = {}
    for name, o in owned:
        assert o.dim is not None
        block = re.search(r"\.(\d+)\.", name)
        assert block is not None
        taken = o.of(top[name]).movedim(o.dim, 0).flatten(1)
        for i, entries in enumerate(taken):
            hits.setdefault(f"block {block[1]}, neuron {o.start + i}", []).append(entries)
    if isinstance(stage.localiser, SSD):
        alpha = stage.localiser.alpha
    else:
        alpha = _searched(stage, stage.localiser, model, ratios)
    dampened = chosen(ratios, shapes, max(alpha, 1.0))
    count = sum(int(mask.sum()) for mask in dampened.values())
    inside = sum(int(o.of(dampened[name]).sum()) for name, o in owned)
    return {
        "neurons": {n: float(torch.cat(parts).float().mean()) for n, parts in hits.items()},
        "module": size / total,
        "precision": inside / count if count else None,
        "recall": inside / size,
        "dampened": count / total,
    }


def _searched(stage: Locate, method: Potion, model: Any, ratios: SortedRatios) -> float:
    """Return the threshold at which Potion's search ends."""
    rows = forget_rows(stage.domain)
    turns = search(method, model, ratios, lambda: stage.known(model, rows), share_of(stage.domain))
    *_, last = turns
    return last.alpha


def chosen(
    ratios: SortedRatios, shapes: Mapping[str, torch.Size], threshold: float
) -> dict[str, Tensor]:
    """Return by parameter which entries' ratios lie above a threshold."""
    masks = {}
    for name, count in ratios.above(threshold).items():
        mask = torch.zeros(shapes[name].numel(), dtype=torch.bool)
        mask[ratios.between(name, 0, count)[0]] = True
        masks[name] = mask.view(shapes[name])
    return masks


def holding(found: Mapping[RunKey, Located], condition: str) -> float:
    """Return by how much less a condition knows with its module off, mean over seeds."""
    falls = [at.known[0] - at.known[2] for (name, _), at in found.items() if name == condition]
    return sum(falls) / len(falls)


def by_neuron(found: Mapping[RunKey, Located]) -> Levels:
    """Return R of all conditions, resampled by seed and neuron."""
    scores: dict[str, dict[int, Mapping[str, float]]] = {}
    for (name, seed), located in found.items():
        scores.setdefault(name, {})[seed] = located.neurons
    return levels(scores, {})


def decide(study: SSDFinds, localiser: str, condition: str, shares: Levels) -> Decision:
    """Return what R says of one localiser; the two share the error."""
    value = estimate(shares.at(condition), shares)
    asked = Contrast(f"R of {localiser}", value, (study.margin,), study.error / 2)
    text = f"{localiser}: undecided: R's interval crosses {study.margin:g}"
    if asked.above(study.margin):
        text = f"{localiser} finds the module of {condition}: R is above {study.margin:g}"
    elif asked.below(study.margin):
        text = f"{localiser} does not find the module of {condition}: R is below {study.margin:g}"
    return Decision(text, (asked,))


def spoken(localiser: str, shares: Levels) -> str:
    """Return R of all conditions in words."""
    parts = [f"{c} {said(estimate(shares.at(c), shares))}" for c in shares.conditions]
    return f"By {localiser}, R was {', '.join(parts)}."


def found_table(study: SSDFinds, shares: Mapping[str, Levels]) -> StudyTable:
    """Return R by condition and localiser."""
    rows = tuple(
        row(condition, name, estimate(values.at(condition), values))
        for condition in next(iter(shares.values())).conditions
        for name, values in shares.items()
    )
    return StudyTable(title="Share of the module found", note=study.statistic, rows=rows)


def published_table(found: Mapping[str, Mapping[RunKey, Located]]) -> StudyTable:
    """Return what is dampened at published settings, by condition, seed and localiser."""
    rows = []
    for name, of_one in found.items():
        for (condition, seed), located in of_one.items():
            values = {
                "module, share of all entries": located.module,
                "module on: forget rows known": located.known[0],
                "module on: retain rows known": located.known[1],
                "module off: forget rows known": located.known[2],
                f"{name}: precision": located.precision,
                f"{name}: recall": located.recall,
                f"{name}: dampened, share of all entries": located.dampened,
            }
            rows += [
                StudyRow(condition=condition, seed=seed, metric=metric, value=value, n=1)
                for metric, value in values.items()
                if name == "ssd" or not metric.startswith("module")
            ]
    note = (
        "Precision: share of what is dampened that lies in the module, empty where nothing is "
        "dampened. A localiser by chance has the module's share of all entries."
    )
    return StudyTable(title="At published settings", note=note, rows=tuple(rows))
