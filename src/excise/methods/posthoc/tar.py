"""TAR: weights from which fine-tuning on forget rows leads nowhere, found by sampled attacks.

    a safeguard to start from (random mapping):
        R[v] ~ N(0, 1)^D for every token v
        minimise  CE(retain) + mean over hidden states l and tokens t of 1 - |cos(h_lt, R[x_t])|

    for outer step i:
        x   = a batch of forget units that no attacker reads;  g = 0
        for each of the sampled attackers, from theta:
            rows = one capability, or: retain rows for M ~ Beta(6, 3) K steps, then forget rows
            for k = 0 .. K - 1:
                theta_k = AdamW step on CE(rows), at a sampled rate
                every 4th k:  g += scale exp(growth (k - (K - 1))) grad of -entropy(x) at theta_k
        g  += alpha grad at theta of CE(retain) + mean over l, t of |h_lt - h0_lt|
        schedule-free AdamW step of theta on g

First-order: the gradient at theta_k is taken for one at theta. h are all hidden states, the
embedding and the normed last one among them; h0 those of the original.

The original is never a second model: it is read into the weights once in a while, and its hidden
states are kept for as many of the coming steps as `cache_gib` holds.

Source:
    Tamirisa et al. 2024, arXiv 2408.00761; rishub-tamirisa/tamper-resistance@19de233 (MIT),
    modules/training.py, `tar_training_loop` and `random_mapping_training_loop`. Padding counts in
    the means of the release and not here. The release saves the point at which schedule-free AdamW
    takes gradients, because it never calls `eval()`; here the average it stands for is kept.

Shape legend: B rows, T tokens, V vocabulary, D residual width, S hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from excise.core.config import Config
from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain, Rows, all_rows
from excise.data.stream import Batch, encode
from excise.losses import negative_entropy, nll, predicting
from excise.methods.base import Cost, Paper, Removal
from excise.methods.tuning import (
    Progress,
    TrainingMethod,
    finish,
    forget_rows,
    logits_of,
    looking,
    nlls,
    role_batches,
    role_counts,
    run_fit,
    state_dir,
    stream,
    tell_cost,
    tokens_of,
    tuned,
)
from excise.models.anatomy import backbone
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig, Losses, Passes, Term, fit
from excise.train.nearby import plus, put


class RandomMapping(Config):
    """The safeguard that TAR starts from: forget activations to random vectors, token by token."""

    fit: FitConfig = FitConfig(
        steps=750, lr=2e-5, batch_size=16, warmup=50, optimizer="schedule_free"
    )
    """Steps, rows per step of each role, learning rate."""


class TAR(TrainingMethod):
    """Entropy on held-out forget rows after sampled fine-tuning attacks, retain states pinned."""

    name: Literal["tar"] = "tar"
    mapping: RandomMapping | None = RandomMapping()
    """The safeguard to start from; none where the model has one already."""
    inner_steps: int = Field(default=64, ge=1)
    """K: steps of an attacker."""
    inner_lr: tuple[float, ...] = Field(default=(2e-6, 2e-5, 4e-5), min_length=1)
    """Learning rates of attackers, one of which is sampled."""
    inner_batch: int = Field(default=4, ge=1)
    """Rows per step of an attacker."""
    inner_decay: float = Field(default=0.01, ge=0)
    """Weight decay of attackers."""
    attackers: int = Field(default=1, ge=1)
    """Attackers per step, whose gradients are averaged."""
    switch: tuple[float, float] = (6.0, 3.0)
    """Beta distribution of the share of steps after which an attacker turns to forget rows."""
    every: int = Field(default=4, ge=1)
    """An attacker's weights are looked at every so many steps."""
    growth: float = 0.0625
    """Later looks count more, by a factor exp(growth) a step; the last counts 1."""
    scale: float = Field(default=4.0, ge=0)
    """Weight of the entropy term."""
    entropy: Literal["scored", "all"] = "scored"
    """Where it is taken: at positions that predict scored tokens, or at every token as released."""
    alpha: float = Field(default=1.0, ge=0)
    """Weight of the retain terms."""
    heldout: float = Field(default=0.2, gt=0, lt=1)
    """Share of forget units that no attacker reads."""
    cache_gib: float = Field(default=4.0, ge=0)
    """Memory that hidden states of the original may fill, read ahead for coming steps."""
    max_length: int = Field(default=256, ge=2)
    """Tokens per row."""
    fit: FitConfig = FitConfig(
        steps=750, lr=2e-5, batch_size=8, warmup=32, optimizer="schedule_free"
    )
    """Outer steps, rows of the held-out and of the retain batch, learning rate."""

    refuses: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("lora", "modules"), "its attackers move every weight, so every weight must resist them"
        ),
        **dict.fromkeys(
            ("sam", "drop_components"), "its gradient is a sum of those at attacked weights"
        ),
    }
    paper: ClassVar[Paper] = Paper(
        "Tamper-resistant safeguards for open-weight LLMs",
        "arXiv:2408.00761",
        "Algorithm 1 (TAR), with random mapping before it",
        "rishub-tamirisa/tamper-resistance@19de233 (MIT)",
        {
            "mapping": "no script of the release runs it; tar.py defaults: 750 steps, lr 2e-5, "
            "batch 2 x 8 accumulated on each of 8 GPUs (128), 50 steps of warm-up; here 16",
            "inner_steps": "run_tar_bio.sh --tar_inner_loop_steps 64",
            "inner_lr": "run_tar_bio.sh --adversary_lr_samples (run_tar_cyber.sh leaves out 2e-6)",
            "inner_batch": "run_tar_bio.sh --tar_adversary_batch_size 4, on each of 8 GPUs (32); "
            "here 4",
            "inner_decay": "torch.optim.AdamW's own, modules/training.py sets none",
            "attackers": "run_tar_bio.sh --tar_num_tasks_sampled 1",
            "switch": "run_tar_bio.sh --switching_point_coeffs; capabilities and the switching "
            "attacker are sampled alike, .33 each with two and .5 each with one",
            "every": "run_tar_bio.sh --tar_inner_loop_subsample 4",
            "growth": "run_tar_bio.sh --schedule_lambda 0.0625",
            "scale": "run_tar_bio.sh --tar_tamper_resistance_grad_scale 4.0",
            "entropy": "modules/objectives.py, max_entropy_loss, takes every position; ours does "
            "not take those that predict nothing scored",
            "alpha": "run_tar_bio.sh --tar_retain_scale 1.0",
            "heldout": "modules/dataloaders.py: train_test_split(test_size=0.20) of rows; ours is "
            "of units",
            "max_length": "modules/dataloaders.py: cutoff_len=256",
            "fit": "run_tar_bio.sh: 750 steps, lr 2e-5, batch 8 on each of 8 GPUs (64), "
            "warm-up 32; here batch 8; tar.py: schedulefree.AdamWScheduleFree",
        },
    )

    @property
    def step_cost(self) -> float:
        """Attackers and looks at them, the retain pass and the original's, of 6 forwards."""
        looks = self.inner_steps // self.every
        attack = self.inner_steps * self.inner_batch / self.fit.batch_size
        return (3 * self.attackers * (attack + looks) + 3 + 1) / 6

    @property
    def extra_copies(self) -> int:
        """The weights before the attack, the gradient of the looks, an attacker's two moments."""
        return 4

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove `domain.forget`, and make what is left hard to bring back by fine-tuning."""
        domain, quality = self.given(domain, ctx)
        attacked, heldout = self.split(domain, ctx)
        model: Any = start.load(dtype=ctx.dtype, device=ctx.device)
        tokenizer = start.tokenizer()

        def read(rows: Rows, purpose: str, size: int) -> Callable[[int], list[Batch]]:
            return stream(
                rows, tokenizer, self.fit, ctx, purpose=f"tar.{purpose}", batch_size=size,
                max_length=self.max_length,
            )  # fmt: skip

        topics = {t: read(r, f"attack.{t}", self.inner_batch) for t, r in attacked.items()}
        everything = read(all_rows(attacked), "attack", self.inner_batch)
        benign = read(domain.retain, "benign", self.inner_batch)
        unseen = read(heldout, "heldout", self.fit.batch_size)
        retain = read(domain.retain, "retain", self.fit.batch_size)

        def attackers(step: int) -> list[Attacker]:
            return [
                self.sample(step * self.attackers + n, topics, everything, benign, unseen, ctx)
                for n in range(self.attackers)
            ]

        def batches(step: int) -> list[dict[str, Batch]]:
            return [{"retain": batch} for batch in retain(step)]

        tokens = tokens_of(batches(0)) + sum(batch.num_tokens for batch in unseen(0))
        tell_cost(self, self.fit.steps, tokens, start, ctx)
        with tuned(model, (), None, ctx) as (live, parameters):
            looks = looking(self, live, parameters, tokenizer, domain, ctx)
            before = self.map_at_random(live, parameters, start, domain, ctx)
            original = OriginalStates(
                start, parameters, batches, self.fit.steps, int(self.cache_gib * 2**30)
            )

            def gradient(passes: Passes[dict[str, Batch]]) -> Losses:
                return self.gradient(passes, attackers(passes.step), original.at(passes))

            progress = Progress(ctx, self.name, self.fit.steps)
            steps = fit(
                live, batches, _unused, self.fit, ctx,
                groups={"trained": list(parameters.values())}, state_dir=state_dir(ctx) / "tar",
                gradient=gradient,
            )  # fmt: skip
            facts = {
                "heldout_rows": len(heldout), "attacked_rows": len(all_rows(attacked)), **quality,
                **run_fit(steps, progress, looks),
            }  # fmt: skip
            removal = finish(start, live, parameters, progress, ctx, extras=facts)
        return replace(removal, cost=before + removal.cost)

    def split(self, domain: Domain, ctx: Context) -> tuple[dict[str, Rows], Rows]:
        """Return the rows that attackers read, by capability, and those of units held out.

        Args:
            domain: Gives forget rows.
            ctx: Seed of the split.

        Raises:
            UserError: If a capability has a single unit.
        """
        forget_rows(domain)
        attacked: dict[str, Rows] = {}
        heldout: list[Any] = []
        for topic, rows in domain.forget.items():
            units = sorted({row.unit for row in rows})
            if len(units) == 1:
                raise UserError(
                    f"tar: '{topic}' has one unit to forget, and needs one for attackers and "
                    "another that they never see; give it more rows"
                )
            order = np.random.default_rng(ctx.seed_for(f"tar.heldout.{topic}")).permutation(units)
            out = set(order[: max(1, round(self.heldout * len(units)))].tolist())
            heldout += [row for row in rows if row.unit in out]
            if rows:
                attacked[topic] = tuple(row for row in rows if row.unit not in out)
        return attacked, tuple(heldout)

    def sample(
        self,
        number: int,
        topics: Mapping[str, Callable[[int], list[Batch]]],
        everything: Callable[[int], list[Batch]],
        benign: Callable[[int], list[Batch]],
        unseen: Callable[[int], list[Batch]],
        ctx: Context,
    ) -> Attacker:
        """Return the attacker of a number: one capability's rows, or benign ones and then all.

        Args:
            number: Number of the attacker, from 0.
            topics: Batches of forget rows by capability.
            everything: Batches of all forget rows.
            benign: Batches of retain rows.
            unseen: Batches that no attacker trains on.
            ctx: Seed.
        """
        rng = np.random.default_rng(ctx.seed_for(f"tar.attacker.{number}"))
        kind = int(rng.integers(len(topics) + 1))
        lr = self.inner_lr[int(rng.integers(len(self.inner_lr)))]
        turns, rows = 0, everything
        if kind < len(topics):
            rows = list(topics.values())[kind]
        else:
            turns = int(self.inner_steps * rng.beta(*self.switch))

        def batches(k: int) -> list[Batch]:
            return (benign if k < turns else rows)(number * self.inner_steps + k)

        return Attacker(lr, batches, unseen(number))

    def gradient(
        self,
        passes: Passes[dict[str, Batch]],
        attackers: Sequence[Attacker],
        original: Sequence[Float[Tensor, "S B T D"]],
    ) -> Losses:
        """Leave the gradient of an outer step in the weights.

        Args:
            passes: The step, with micro-batches of retain rows.
            attackers: The attackers.
            original: Hidden states of the original on those micro-batches.
        """
        total: list[Tensor | None] = [None] * len(passes.weights)
        losses = Losses(0.0, {}, 0)
        for attacker in attackers:
            rows = [{"tamper": batch} for batch in attacker.unseen]
            with passes.elsewhere():
                optimizer = torch.optim.AdamW(
                    passes.weights, lr=attacker.lr, weight_decay=self.inner_decay, foreach=False
                )
                for k in range(self.inner_steps):
                    batches = [{"attacker": batch} for batch in attacker.batches(k)]
                    attack = passes.backward(batches, nlls, role_counts)
                    losses += replace(attack, total=0.0)
                    optimizer.step()
                    passes.take()
                    passes.publish()
                    if (k + 1) % self.every:
                        continue
                    late = math.exp(self.growth * (k - (self.inner_steps - 1)))
                    factor = self.scale * late / len(attackers)
                    look = passes.backward(rows, self.tamper_loss, self.tamper_counts)
                    losses += replace(look, total=factor * look.total)
                    total = plus(total, passes.take(), factor)
                del optimizer
        retain = [
            {**micro, "original": states}
            for micro, states in zip(passes.micros, original, strict=True)
        ]
        losses += passes.backward(retain, self.retain_loss, retain_counts)
        put(passes, total)
        return losses

    def tamper_loss(self, model: nn.Module, micro: Mapping[str, Batch]) -> dict[str, Term]:
        """Return log V minus the entropy of what the model predicts on held-out forget rows."""
        batch = micro["tamper"]
        at_BT = predicting(batch.target_BT) if self.entropy == "scored" else batch.attention_BT
        return {"tamper": Term(*negative_entropy(logits_of(model, batch), at_BT))}

    def tamper_counts(self, micro: Mapping[str, Batch]) -> dict[str, float]:
        """Return how many positions that is."""
        batch = micro["tamper"]
        tokens = batch.num_targets if self.entropy == "scored" else batch.num_tokens
        return {"tamper": float(tokens)}

    def retain_loss(self, model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        """Return the loss on retain rows, and how far their hidden states are from the original's.

        Args:
            model: The model.
            micro: A batch of `retain` and its hidden states in the `original`.
        """
        batch = micro["retain"]
        out = model(**batch.inputs, output_hidden_states=True, use_cache=False)
        total, count = nll(out.logits, batch)
        apart = torch.zeros((), device=total.device)
        for h_BTD, h0_BTD in zip(out.hidden_states, micro["original"], strict=True):
            distance_BT = torch.linalg.vector_norm(h_BTD.float() - h0_BTD.float(), dim=-1)
            apart = apart + distance_BT[batch.attention_BT].sum()
        states = float(len(out.hidden_states) * batch.num_tokens)
        return {
            "retain": Term(total, count, self.alpha),
            "hidden": Term(apart, states, self.alpha),
        }

    def map_at_random(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        start: Checkpoint,
        domain: Domain,
        ctx: Context,
    ) -> Cost:
        """Train the safeguard that TAR starts from, if it is asked for.

        Args:
            model: The model.
            parameters: What is trained of it.
            start: What it was read from.
            domain: Forget and retain rows.
            ctx: Seeds, processes.

        Returns:
            What it took.
        """
        if self.mapping is None:
            return Cost()
        schedule, tokenizer = self.mapping.fit, start.tokenizer()
        batches = role_batches(
            domain, ("forget", "retain"), tokenizer, schedule, ctx, max_length=self.max_length
        )
        rows = encode(
            all_rows(domain.forget), tokenizer, max_length=self.max_length, only_spans=True
        )
        ids_N = torch.tensor(sorted({i for row in rows for i in row.ids}))
        parts = backbone(model)
        vectors_ND = torch.randn(len(ids_N), parts.d_model, generator=ctx.generator("tar.mapping"))
        place_V = torch.zeros(int(ids_N.max()) + 1, dtype=torch.long)
        place_V[ids_N] = torch.arange(len(ids_N))
        mapped = RandomVectors(vectors_ND.to(ctx.device), place_V.to(ctx.device))

        def counts(micro: Mapping[str, Batch]) -> dict[str, float]:
            states = float((parts.num_blocks + 1) * micro["forget"].num_tokens)
            return {"retain": float(micro["retain"].num_targets), "forget": states}

        progress = Progress(ctx, "random mapping", schedule.steps)
        steps = fit(
            model, batches, mapped.loss, schedule, ctx,
            groups={"trained": list(parameters.values())}, counts=counts,
            state_dir=state_dir(ctx) / "mapping",
        )  # fmt: skip
        run_fit(steps, progress)
        return progress.cost(start.num_parameters)


@dataclass(frozen=True)
class Attacker:
    """A fine-tuning attack to resist.

    Attributes:
        lr: Its learning rate.
        batches: Its micro-batches by step.
        unseen: Micro-batches of forget rows it does not train on, on which it is judged.
    """

    lr: float
    batches: Callable[[int], list[Batch]]
    unseen: Sequence[Batch]


@dataclass(frozen=True)
class RandomVectors:
    """A random vector for every token of the forget rows.

    Attributes:
        vectors_ND: The vectors.
        place_V: Which of them is a token's.
    """

    vectors_ND: Float[Tensor, "N D"]
    place_V: Int[Tensor, " V"]

    def loss(self, model: nn.Module, micro: Mapping[str, Batch]) -> dict[str, Term]:
        """Return the loss on retain rows, and 1 - |cos| of forget states and random vectors."""
        retain, forget = micro["retain"], micro["forget"]
        kept = nll(logits_of(model, retain), retain)
        out = model(**forget.inputs, output_hidden_states=True, use_cache=False)
        here_BT = forget.attention_BT
        random_ND = self.vectors_ND[self.place_V[forget.ids_BT[here_BT]]]
        cosines = [
            F.cosine_similarity(h_BTD[here_BT].float(), random_ND, dim=-1).abs()
            for h_BTD in out.hidden_states
        ]
        apart = sum((1 - cos_N).sum() for cos_N in cosines)
        assert isinstance(apart, Tensor)
        return {
            "retain": Term(*kept),
            "forget": Term(apart, float(len(cosines) * forget.num_tokens)),
        }


@dataclass
class OriginalStates:
    """Hidden states of the original on retain batches, read ahead as far as memory allows.

    Attributes:
        start: The original.
        parameters: The weights that are trained, into which the original's are put meanwhile.
        batches: Micro-batches by step.
        steps: Steps in all.
        limit: Bytes that states of coming steps may take.
        ahead: Those states, by step.
    """

    start: Checkpoint
    parameters: Mapping[str, nn.Parameter]
    batches: Callable[[int], list[dict[str, Batch]]]
    steps: int
    limit: int
    ahead: dict[int, list[Float[Tensor, "S B T D"]]] = field(default_factory=dict)

    def at(self, passes: Passes[dict[str, Batch]]) -> list[Float[Tensor, "S B T D"]]:
        """Return the states on the micro-batches of a step."""
        if passes.step not in self.ahead:
            with passes.elsewhere(), torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.start.weights_of([name])[name])
                used = 0
                for step in range(passes.step, self.steps):
                    self.ahead[step] = [
                        self._states(passes.model, micro["retain"].to(passes.ctx.device))
                        for micro in self.batches(step)
                    ]
                    used += sum(t.numel() * t.element_size() for t in self.ahead[step])
                    if used > self.limit:
                        break
        return self.ahead.pop(passes.step)

    @staticmethod
    def _states(model: nn.Module, batch: Batch) -> Float[Tensor, "S B T D"]:
        out = model(**batch.inputs, output_hidden_states=True, use_cache=False)
        return torch.stack([h_BTD.cpu() for h_BTD in out.hidden_states])


def retain_counts(micro: Mapping[str, Any]) -> dict[str, float]:
    """Return the counts of `TAR.retain_loss`."""
    batch = micro["retain"]
    states = float(len(micro["original"]) * batch.num_tokens)
    return {"retain": float(batch.num_targets), "hidden": states}


def _unused(model: nn.Module, micro: Mapping[str, Batch]) -> dict[str, Term]:
    raise AssertionError("an outer step takes its gradient pass by pass")
