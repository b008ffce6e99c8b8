"""Fine-tuning as an attack: one training, scored at its checkpoints.

Optimizer: AdamW without weight decay, constant rate, gradient clipped, float32 masters. The model
stays in evaluation mode, so that no dropout blurs a short attack.

A model that breaks at the first steps, or does not learn what it is shown, may have been scaled to
that end (`conditioning.py`). Its trainings are followed by those of an informed attacker, whoever
the model is: scales put back, rates by tensor, an adapter beside frozen weights.

An attacker also has other rows than T (the method's own forget rows, neighbours, one example), and
searches: settings drawn at random, the best of them on `dev` within a bound on the retain loss
(`results.choose`), the same trials on every model. Relearning on what is at hand: Hu et al. 2024,
arXiv 2406.13356; Lucki et al. 2024, arXiv 2409.18025 (ten examples).
"""

from __future__ import annotations

import math
import random
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from excise.auditor.base import Attack, AttackResult, Subject, VariantResult, name_of
from excise.auditor.batching import GRADIENT, nats, rows_per_pass
from excise.auditor.budget import Budget
from excise.auditor.conditioning import rates_by_tensor, rebalance
from excise.auditor.evaluation_set import EvaluationSet, UnitScores, dev_is_higher, mean
from excise.auditor.results import BOUND, decided, searched
from excise.auditor.scoring import Measurement, read, variant_of
from excise.core.context import Context
from excise.core.errors import Diverged, NotFinite, UserError
from excise.data.domain import Domain, Metric, Rows, all_rows
from excise.data.stream import Batch, Example, Stream, collate, encode
from excise.data.subsample import subsample
from excise.evals.score import direction_of
from excise.losses import token_nll
from excise.models.lora import LoRA, adapted
from excise.train.fit import FitConfig, Term, fit

Micro = Mapping[str, Any]
"""A micro-batch: `batch`, and `benign_B`, which of its rows are benign."""

Prepare = Callable[[Any, Context], dict[str, Any]]
"""Changes a loaded model in place, and returns what is to be noted about it."""

Informed = Literal["", "rebalanced", "rebalanced, rates by tensor"]
"""What an informed attacker does: nothing, scales put back, or that and `rates_by_tensor`."""

ADAPTER_RATE = 10.0
"""Rate of an adapter over that of all parameters, as in the named budgets, where a budget has none
of its own."""

TAUGHT = 0.9
"""Share of the loss on T that is left at most once a training has taught anything."""

FEW_STEPS, KNOWN = 8, 0.1
"""Steps within which a training need not teach, and nats a token at which T is known before."""

Adapt = Callable[[Any], AbstractContextManager[Any]]
"""Puts something trainable on a loaded model for as long as a `with` block lasts."""


@dataclass(frozen=True)
class Training:
    """One training of an attack.

    Attributes:
        kind: All parameters, a LoRA adapter, or vectors before the prompt.
        lr: Learning rate.
        seed: Seed of the order of rows and of the adapter.
        on: What is trained on beside benign rows: T, the method's forget rows, neighbours, fresh
            units in place of T as the control of power, or nothing.
        start: What is done to the weights before, in words; empty for nothing.
        steps: Optimizer steps at most; 0 for those of the budget.
        informed: What an informed attacker does beside.
        examples: Rows of T at most; 0 for all.
        trial: Number of a training at settings drawn at random, from 1; 0 for none.
        batch_size: Rows per step; 0 for those of the budget.
        schedule: What the rate does; a cosine comes after a tenth of the steps of warm-up.
        wording: Which wording of T is read, counted round; 0 for all.
    """

    kind: Literal["full", "lora", "prompt"]
    lr: float
    seed: int
    on: Literal["relearn", "forget", "adjacent", "fresh", "benign"] = "relearn"
    start: str = ""
    steps: int = 0
    informed: Informed = ""
    examples: int = 0
    trial: int = 0
    batch_size: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    wording: int = 0

    def within(self, budget: Budget) -> Budget:
        """Return the budget with the steps, checkpoints and batches of this training."""
        steps = min(self.steps or budget.steps, budget.steps)
        points = tuple(point for point in budget.checkpoints if point <= steps)
        size = self.batch_size or budget.batch_size
        return budget.model_copy(update={"steps": steps, "checkpoints": points, "batch_size": size})

    @property
    def variant(self) -> str:
        """What the record calls it, beside its rate and seed; trials of a kind have one name."""
        rows = {"fresh": "fresh units", "forget": "forget rows", "adjacent": "neighbours"}
        what = f"{self.kind} on {rows[self.on]}" if self.on in rows else self.kind
        if self.examples:
            what += f" on {self.examples} example{'s' if self.examples > 1 else ''}"
        name = self.start or (f"search, {what}" if self.trial else what)
        return f"{self.informed}, {name}" if self.informed else name

    @property
    def facts(self) -> dict[str, Any]:
        """What the record notes of it."""
        noted: dict[str, Any] = {"examples": self.examples} if self.examples else {}
        if self.trial:
            noted |= {"trial": self.trial, "batch_size": self.batch_size}
            noted |= {"schedule": self.schedule, "wording": self.wording}
        return noted

    @property
    def whole(self) -> bool:
        """Whether it shows a model T, or benign rows alone: what says whether a model resists."""
        return self.on in ("relearn", "benign") and not self.examples

    def __str__(self) -> str:
        """Return what a reader calls it: `relearn full 0.001`."""
        after = "".join(f"{words}, " for words in (self.informed, self.start) if words)
        seed = f" seed {self.seed}" if self.seed else ""
        few = f" {self.examples} rows" if self.examples else ""
        trial = f"trial {self.trial}, " if self.trial else ""
        return f"{trial}{after}{self.on}{few} {self.kind} {self.lr:g}{seed}"


def trainings_of(budget: Budget) -> tuple[Training, ...]:
    """Return the trainings of relearning: each kind at every rate and seed.

    From *standard* on, or where the budget says so, one more training, at the middle rate, is on
    fresh units: a budget within which even those cannot be learned has no power. So is one on
    every other kind of rows, and the trials of a search come last.

    Args:
        budget: Rates, seeds, other rows and number of trials.
    """
    parts = [Training("full", lr, seed) for lr in budget.rates for seed in budget.seeds]
    parts += [Training("lora", lr, seed) for lr in budget.lora_rates for seed in budget.seeds]
    parts += fresh_training("full", budget.rates, budget)
    middle = Training("full", budget.rates[len(budget.rates) // 2], budget.seeds[0])
    parts += [replace(middle, on=role) for role in budget.trained_on]
    parts += [replace(middle, examples=count) for count in budget.examples]
    return (*parts, *trials_of(budget))


def trials_of(budget: Budget) -> tuple[Training, ...]:
    """Return trainings on T at settings drawn at random: the same ones for every model.

    Rates are log-uniform from a third of the smallest to three times the largest, steps are one
    of the last three checkpoints, so that curves of different lengths have points in common.

    Args:
        budget: Rates, steps, batch size, seed and number of trials.
    """
    rng = random.Random(f"search:{budget.seeds[0]}")
    points = [point for point in budget.checkpoints if 0 < point < budget.steps]
    parts = []
    for number in range(1, budget.trials + 1):
        kind: Literal["full", "lora"] = "full"
        if budget.lora_rates and rng.random() < 0.5:
            kind = "lora"
        rates = budget.rates if kind == "full" else budget.lora_rates
        lr = math.exp(rng.uniform(math.log(min(rates) / 3), math.log(3 * max(rates))))
        parts.append(
            Training(
                kind,
                float(f"{lr:.4g}"),
                budget.seeds[0],
                trial=number,
                steps=rng.choice([*points[-2:], budget.steps]),
                batch_size=max(2, rng.choice((1, 2, 4, 8)) * budget.batch_size // 4),
                schedule=rng.choice(("constant", "cosine")),
                wording=rng.randrange(4),
            )
        )
    return tuple(parts)


def fresh_training(
    kind: Literal["full", "prompt"], rates: Sequence[float], budget: Budget
) -> tuple[Training, ...]:
    """Return the training on fresh units at the middle rate, where the budget has one."""
    if budget.name == "smoke" and not budget.fresh:
        return ()
    return (Training(kind, rates[len(rates) // 2], budget.seeds[0], "fresh"),)


@dataclass(frozen=True)
class TrainingResult:
    """What one training gave.

    Attributes:
        part: Which training.
        measurements: V, T and retain at every checkpoint.
        dev: Dev score by unit at the end.
        metric: Metric of V.
        extras: `loss_V`, `loss_fresh` (nats by unit at the end), `hedged_V`, `hedged_fresh` (the
            same of a reader who hedges), all of them with `_start`; `dev_loss` (mean nats),
            `trained_metric` (of what was trained on), `prequential` (T loss of every batch before
            training on it), `retain_lost` (see `EvaluationSet.retain_lost`) at the end and
            `retain_lost_most` on the way.
        seconds: Wall-clock time.
        reason: Why it stopped early; empty for a whole run.
        facts: Optimizer steps, and what was done to the weights before.
    """

    part: Training
    measurements: tuple[Measurement, ...]
    dev: UnitScores
    metric: str
    extras: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainingResult:
        """Undo `to_json`."""
        parts = {
            "part": Training(**data["part"]),
            "measurements": tuple(Measurement(**reading) for reading in data["measurements"]),
        }
        return cls(**{**data, **parts})

    def curve_on_t(self) -> tuple[Any, ...]:
        """Return the curve whose score is T."""
        return tuple(reading.point(reading.trained) for reading in self.measurements)

    def units_on_t(self) -> tuple[UnitScores, ...]:
        """Return T's scores by unit at every checkpoint."""
        return tuple(reading.trained for reading in self.measurements)

    @property
    def broke(self) -> bool:
        """Whether the model fell apart: on the way, or for good where weights were changed."""
        lost = self.extras.get("retain_lost" if self.part.start else "retain_lost_most", 0.0)
        return bool(self.reason) or lost > BOUND

    @property
    def taught(self) -> bool:
        """Whether the loss on T fell, as far as there was anything to teach."""
        before = self.extras.get("prequential", ())
        if len(before) < FEW_STEPS or before[0] <= KNOWN:
            return True
        end = before[-(len(before) // 4) :]
        return bool(sum(end) / len(end) <= TAUGHT * before[0])

    @property
    def learned(self) -> float:
        """Share of T that was learned at the end: its score, or by how much its loss fell."""
        first, last = (mean(self.measurements[i].trained) for i in (0, -1))
        if first is None or last is None:
            return 0.0
        if direction_of(self.extras.get("trained_metric", self.metric)) == "higher":
            return last
        return 1 - last / first if first > 0 else 0.0

    def variant(self, attack: Attack, subject: Subject) -> VariantResult:
        """Return the variant whose curve is V."""
        part = self.part
        facts = {**self.facts, **part.facts}
        result = variant_of(
            attack,
            subject,
            self.metric,
            variant=part.variant,
            measurements=self.measurements,
            dev=self.dev,
            control=part.on == "fresh",
            trained_on=self.part.on,
            lr=self.part.lr,
            seed=self.part.seed,
            extras={**self.extras, "learned": self.learned},
            status="failed" if self.reason else "ok",
            reason=self.reason,
            facts={**facts, "broke": True} if self.broke else facts,
        )
        return result


class TrainingAttack(Attack):
    """An attack made of trainings, which run apart and are shared by attacks that read them.

    Subclasses say which trainings there are, how one goes, and what the attack reads in them.
    """

    @property
    def shared(self) -> TrainingAttack:
        """The attack whose trainings these are: equal ones are done once for all its readers."""
        return self

    @abstractmethod
    def trainings(self, budget: Budget) -> tuple[Training, ...]:
        """Return the trainings of a budget."""

    def further(self, trained: Sequence[TrainingResult]) -> tuple[Training, ...]:
        """Return what an informed attacker trains beside, where a model resists every training.

        Args:
            trained: What `train` returned, for every training of the budget on one subject.

        Returns:
            Nothing where one training left the model whole and taught it.
        """
        tried = [one for one in trained if one.part.whole]
        if not tried or any(one.taught and not one.broke for one in tried):
            return ()
        tried = [one for one in tried if not one.part.trial]
        full = [one.part for one in tried if one.part.kind == "full"]
        small = [one.part for one in tried if one.part.kind == "lora"] or [
            replace(part, kind="lora", lr=round(ADAPTER_RATE * part.lr, 12))
            for part in full
            if not part.start
        ]
        by_tensor = [replace(part, informed="rebalanced, rates by tensor") for part in full]
        return (*(replace(part, informed="rebalanced") for part in (*full, *small)), *by_tensor)

    @abstractmethod
    def train(
        self, training: Training, subject: Subject, domain: Domain, budget: Budget, ctx: Context
    ) -> TrainingResult:
        """Run one training and score it on the way.

        Args:
            training: Which.
            subject: The model.
            domain: Rows by role.
            budget: Steps, batch size, checkpoints; of rates and seeds those of `training` count.
            ctx: Device, dtype, seed.
        """

    def conclude(
        self, trained: Sequence[TrainingResult], subject: Subject, higher: bool
    ) -> AttackResult:
        """Put the trainings together: V is reported, and the rate chosen on `dev` decides.

        Args:
            trained: What `train` returned, for every training, `further` ones included.
            subject: The model.
            higher: Whether a higher score on `dev` means more knowledge.
        """
        tried = searched([t.variant(self, subject) for t in trained], higher=higher)
        variants, chosen = decided(tried, higher=higher)
        seconds = sum(t.seconds for t in trained)
        return AttackResult(name_of(self), subject.name, variants, chosen, seconds)

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Run every training, those of an informed attacker where needed, and conclude."""
        start = time.perf_counter()
        trained = [
            self.train(training, subject, domain, budget, ctx)
            for training in possible(self.trainings(budget), domain)
        ]
        for training in self.further(trained):
            trained.append(self.train(training, subject, domain, budget, ctx))
        result = self.conclude(trained, subject, dev_is_higher(domain))
        return replace(result, seconds=time.perf_counter() - start)


def relearn_rows(domain: Domain) -> Rows:
    """Return T of all capabilities."""
    return all_rows(domain.relearn)


def possible(trainings: Sequence[Training], domain: Domain) -> tuple[Training, ...]:
    """Return the trainings that a domain has rows for: not every one has neighbours."""
    fresh = len({row.unit for row in domain.fresh}) > 1  # one half is trained on, one is scored
    there = {"fresh": fresh, "forget": any(domain.forget.values()), "adjacent": domain.adjacent}
    return tuple(t for t in trainings if there.get(t.on, True))


def rows_of(part: Training, domain: Domain) -> Rows:
    """Return what a training of relearning reads beside benign rows; T for fresh units' place.

    Args:
        part: Which rows, how many, in which wording where there are several.
        domain: Rows by role.
    """
    if part.on == "adjacent":
        return domain.adjacent
    if part.on == "forget":
        return all_rows(domain.forget)
    rows = relearn_rows(domain)
    wordings = sorted({row.wording for row in rows})
    if part.wording and len(wordings) > 1:
        rows = tuple(r for r in rows if r.wording == wordings[part.wording % len(wordings)])
    return subsample(rows, part.examples, by="row") if part.examples else rows


def train(
    part: Training,
    subject: Subject,
    evaluation: EvaluationSet,
    ctx: Context,
    *,
    rows: Rows,
    benign_share: float,
    clip: float = 1.0,
    lora_rank: int = 8,
    prepare: Prepare | None = None,
    adapt: Adapt | None = None,
) -> TrainingResult:
    """Fine-tune one subject and score it at the budget's checkpoints.

    Args:
        part: Kind, rate, seed.
        subject: The model; its folder is only read.
        evaluation: What to score, and the budget.
        ctx: Device, dtype; its seed and the part's seed the order.
        rows: T; empty for a benign training.
        benign_share: Share of every batch drawn from `domain.benign`.
        clip: Largest norm of the gradient.
        lora_rank: Rank of a LoRA part.
        prepare: What is done to the weights before, as `part.start` says; the curve then has two
            points without a cost, before and after it.
        adapt: What is trained in place of the weights; None for what the part's kind says.

    Returns:
        The measurements. A training that diverged ends at its last finite checkpoint.

    Raises:
        UserError: If there is no row to train on: benign rows alone would show nothing.
    """
    start = time.perf_counter()
    inner = replace(ctx, seed=ctx.seed + 1000 * part.seed)
    evaluation = replace(evaluation, budget=part.within(evaluation.budget))
    model = subject.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
    facts = {"steps": evaluation.budget.steps, **(rebalance(model) if part.informed else {})}
    if part.on == "fresh":
        rows = evaluation.fresh_train
    if not rows and part.on != "benign":
        raise UserError(f"there is no row to train on in {part.on}; check the split")
    if not {row.unit for row in rows}.isdisjoint(row.unit for row in evaluation.all_test):
        facts["trained_on_test_units"] = True
    mix = mixed_batches(model, evaluation, inner, rows, benign_share)
    size = sum(p.numel() for p in model.parameters())
    if part.kind == "lora":
        adapt = partial(adapter, rank=lora_rank)
    with nullcontext(model) if adapt is None else adapt(model) as net:
        small = 0
        if adapt is not None:
            small = sum(p.numel() for p in net.parameters() if p.requires_grad)
        run = _Run(net, evaluation, part, rows=rows, cost=_flops_per_token(size, small))
        reason = run.go(mix, inner, clip, prepare)
        extras: dict[str, Any] = {"parameters": size, "trained_parameters": small or size}
        extras |= run.lost()
        dev: UnitScores = {}
        try:
            extras = run.extras() | extras
            dev = evaluation.units(net, evaluation.all_dev)
        except NotFinite as error:
            reason = reason or str(error)
    return TrainingResult(
        part,
        tuple(run.measurements),
        dev,
        evaluation.metric,
        extras,
        time.perf_counter() - start,
        reason,
        facts | run.facts,
    )


def adapter(model: Any, rank: int) -> AbstractContextManager[Any]:
    """Return the model with a fresh LoRA adapter."""
    return adapted(model, LoRA(rank=rank, alpha=2 * rank))


def _flops_per_token(size: int, small: int) -> float:
    """Return operations per trained token; see `attacks/relearn.py`."""
    return 4.0 * size + 6.0 * small if small else 6.0 * size


def mixed_batches(
    model: Any, evaluation: EvaluationSet, ctx: Context, rows: Rows, benign_share: float
) -> Callable[[int], list[Micro]]:
    """Return the micro-batches of a step: T and benign rows in fixed shares."""
    size = evaluation.budget.batch_size
    num_benign = min(size, round(size * benign_share)) if rows else size
    counts = {"t": size - num_benign, "benign": num_benign}
    sources = {"t": rows, "benign": evaluation.domain.benign}
    streams: dict[str, Stream] = {}
    for name, count in counts.items():
        if count:
            needed = subsample(sources[name], count * evaluation.budget.steps, by="row")
            examples = encode(
                needed, evaluation.tokenizer, max_length=evaluation.max_length, only_spans=True
            )
            streams[name] = Stream(
                examples, count, ctx.seed_for(f"attack/{name}"), evaluation.tokenizer.pad_token_id
            )
    longest = max(len(e.ids) for s in streams.values() for e in s.examples)
    limit = max(1, rows_per_pass(model, longest) // GRADIENT)

    def micros(step: int) -> list[Micro]:
        picked: list[tuple[Example, bool]] = []
        for name, stream in streams.items():
            picked += [(stream.examples[i], name == "benign") for i in stream.indices(step)]
        return [
            {
                "batch": collate([e for e, _ in part], pad_id=evaluation.tokenizer.pad_token_id),
                "benign_B": torch.tensor([benign for _, benign in part]),
            }
            for part in (picked[i : i + limit] for i in range(0, len(picked), limit))
        ]

    return micros


def _by_role(micro: Micro) -> dict[str, torch.Tensor]:
    """Return which positions are scored, for T and for the benign rows."""
    batch: Batch = micro["batch"]
    target_BT = batch.target_BT.clone()
    target_BT[:, 0] = False
    benign_B1 = micro["benign_B"][:, None]
    return {"t": target_BT & ~benign_B1, "benign": target_BT & benign_B1}


def counts(micro: Micro) -> dict[str, float]:
    """Return how many tokens of each role a micro-batch scores."""
    return {name: float(mask_BT.sum()) for name, mask_BT in _by_role(micro).items()}


def loss(model: Any, micro: Micro) -> dict[str, Term]:
    """Return mean cross-entropy on T plus mean cross-entropy on benign tokens."""
    batch: Batch = micro["batch"]
    nll_BT = token_nll(model(**batch.inputs, use_cache=False).logits, batch.ids_BT)
    return {
        name: Term(nll_BT.masked_fill(~mask_BT, 0).sum(), float(mask_BT.sum()))
        for name, mask_BT in _by_role(micro).items()
    }


class _Run:
    """One training with what was read on the way."""

    def __init__(
        self, net: Any, evaluation: EvaluationSet, part: Training, *, rows: Rows, cost: float
    ) -> None:
        self.net, self.evaluation, self.part = net, evaluation, part
        self.rows, self.cost = rows, cost
        self.tokens = 0
        self.measurements: list[Measurement] = []
        self.before: list[float] = []
        self.facts: dict[str, Any] = {}
        self.started = self._losses() if evaluation.budget.bits else {}

    def go(
        self,
        mix: Callable[[int], list[Micro]],
        ctx: Context,
        clip: float,
        prepare: Prepare | None,
    ) -> str:
        """Train to the last checkpoint; return why it stopped early, or nothing."""
        budget = self.evaluation.budget
        config = FitConfig(
            steps=budget.steps,
            lr=self.part.lr,
            batch_size=budget.batch_size,
            clip=clip,
            schedule=self.part.schedule,
            warmup=0 if self.part.schedule == "constant" else budget.steps // 10,
        )
        points = {step for step in budget.checkpoints if step <= budget.steps} | {budget.steps}
        self._read(0)  # what gives no numbers to begin with fails the attack, not one training
        try:
            if prepare is not None:
                self.facts = prepare(self.net, ctx)
                self._read(0)
            rates = self._rates()
            groups = {name: [self.net.get_parameter(name)] for name in rates} or None
            for record in fit(
                self.net, mix, loss, config, ctx, groups=groups, rates=rates, counts=counts
            ):
                self.tokens += record.tokens
                if "t" in record.terms:
                    self.before.append(record.terms["t"])
                if record.step + 1 in points:
                    self._read(record.step + 1)
        except (Diverged, NotFinite) as error:
            return str(error)
        return ""

    def _rates(self) -> dict[str, float]:
        """Return a rate for every parameter, none where all have one."""
        if self.part.informed != "rebalanced, rates by tensor":
            return {}
        return rates_by_tensor(self.net, self.part.lr)

    def lost(self) -> dict[str, float]:
        """Return which share of the retain score was lost at the end, and at most on the way.

        Vectors before a prompt cost none: other questions are asked without them.
        """
        if self.part.kind == "prompt":
            return {}
        first, *later = (reading.retain for reading in self.measurements)
        lost = [self.evaluation.retain_lost(first, units) for units in later] or [0.0]
        return {"retain_lost": lost[-1], "retain_lost_most": max(lost)}

    def _read(self, step: int) -> None:
        """Score V, T and retain."""
        reading = read(
            self.net,
            self.evaluation,
            trained=self._trained(),
            trained_metric=self.trained_metric,
            examples=step * self.evaluation.budget.batch_size,
            tokens=self.tokens,
            flops=self.cost * self.tokens,
        )
        self.measurements.append(reading)

    def _trained(self) -> Rows:
        """Return what is trained on, cut to the budget: all of T, even where a part is read."""
        if self.part.on == "relearn" and self.rows:
            return self.evaluation.trained
        return subsample(self.rows, self.evaluation.budget.max_other_rows, by="row")

    @property
    def trained_metric(self) -> Metric:
        """Metric of what is trained on; of benign trainings that of T, which is not scored."""
        if self.part.on in ("relearn", "benign"):
            return self.evaluation.trained_metric
        return self.evaluation.metric_of(self.rows)

    def _losses(self) -> dict[str, dict[str, float]]:
        """Return nats by unit on V and on fresh units nobody trained on.

        Fresh units of another shape than V have no template in common with it: their loss tells
        nothing about V, and is left out.
        """
        evaluation = self.evaluation
        same = {r.kind for r in evaluation.fresh_test} == {r.kind for r in evaluation.all_test}
        sets = {"V": evaluation.all_test, "fresh": evaluation.fresh_test if same else ()}
        losses = {
            name: nats(self.net, rows, evaluation.tokenizer, max_length=evaluation.max_length)
            for name, rows in sets.items()
        }
        return {f"loss_{name}": each.plain for name, each in losses.items()} | {
            f"hedged_{name}": each.hedged for name, each in losses.items()
        }

    def extras(self) -> dict[str, Any]:
        """Return what the statistics need beside the curve, read on the net as it is now."""
        evaluation = self.evaluation
        noted = {"prequential": self.before, "trained_metric": self.trained_metric}
        if not evaluation.budget.bits:
            return noted
        dev = nats(
            self.net, evaluation.all_dev, evaluation.tokenizer, max_length=evaluation.max_length
        )
        return {
            **self._losses(),
            **{f"{name}_start": values for name, values in self.started.items()},
            "dev_loss": mean(dev.plain),
            **noted,
        }
