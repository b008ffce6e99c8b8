"""PEFT as gradient routing: a capability's module is a LoRA adapter that is dropped at the end.

`adapter_modules` trains a model from scratch whose modules are adapters laid over it; it differs
from SGTM in the kind of module alone. `dual_adapters` leaves a trained model as it is and lays
two adapters over it: one that stays and takes what retained rows teach, one that labelled rows
write alone and that is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from excise.core.context import Context
from excise.data.domain import Domain, Rows
from excise.data.labels import LabelNoise, give_labels, label_rows
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.plain import schedule
from excise.methods.pretraining.pretrain import Pretrain, told_corpus
from excise.methods.tuning import finish, forget_rows
from excise.models.checkpoint import Checkpoint
from excise.models.lora import LoRA, adapted, add_adapter, targets
from excise.routing.ablation import BEFORE, described
from excise.routing.absorption import losses, sample
from excise.routing.groups import JOINT, Groups, Part
from excise.routing.modules import Placed, Shared, alternatives
from excise.routing.profiles import save_before
from excise.routing.rules import Policy, Rule
from excise.routing.train import Trained, routed_fit
from excise.train.fit import FitConfig

SOURCE = "jnward/gradient-routing-finetuning (gemma-3-1b-it; no licence file, read only)"


class AdapterModules(Method):
    """From scratch with a LoRA adapter as the module of each capability; adapters are dropped."""

    name: Literal["adapter_modules"] = "adapter_modules"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the labels one has differ from the truth; missing means they are right."""
    lora: LoRA = LoRA(rank=8, alpha=16.0)
    """The adapter of each capability."""
    lr: float = Field(default=1.0, ge=0)
    """Learning rate of adapters, as a multiple of the schedule's."""
    p_off: float = Field(default=0.25, ge=0, le=1)
    """Share of core rows that are read with the adapters off."""
    p_as: float = Field(default=0.0, ge=0, le=1)
    """Share of labelled rows that write into the core too."""
    joint: tuple[Shared, ...] = ("embed",)
    """What labelled rows may write beside their adapter."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Modular pretraining enables access control, LoRA modules",
        "arXiv:2607.08077",
        "adapters in place of auxiliary MLPs",
        defaults={
            "p_off": "that of SGTM (arXiv:2512.05648) on TinyStories",
            "joint": "that of SGTM on TinyStories",
            "lora.rank": "chosen here",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` and its adapters, and keep the core alone."""
        config, names = schedule(self.pretrain, self.name), tuple(domain.forget)
        rows = told_corpus(domain, self.labels, ctx)
        model = start.load(dtype=ctx.dtype, device=ctx.device)
        policy = Policy(
            groups=adapter_groups(len(names), self.joint),
            rules=_rules(self.p_off, self.p_as, bool(self.joint)),
            capabilities=names,
        )
        with modules_on(model, self.lora, len(names), ctx) as live:
            for parameter in live.parameters():
                parameter.requires_grad_(True)
            trained = _train(live, policy, rows, start, config, ctx, (self.name, self.lr))
            extras, before = _look(live, trained, policy, rows, start, config, ctx)
        sets = sample(rows, start.tokenizer(), max_length=config.max_length)
        extras["losses"] = {"before": before, "after": losses(model, sets, ctx.device)}
        parameters = dict(model.named_parameters())
        return finish(start, model, parameters, trained.progress, ctx, extras=extras)


class DualAdapters(Method):
    """Two adapters on a trained model: one stays, one takes what is labelled and is dropped."""

    name: Literal["dual_adapters"] = "dual_adapters"
    fit: FitConfig = FitConfig(steps=200, lr=1e-3, batch_size=32, clip=1.0)
    """Continued training on forget and retain rows together."""
    max_length: int = Field(default=128, ge=2)
    """Tokens per row."""
    pack: tuple[int, ...] = (1,)
    """Rows per text, in turn."""
    labels: LabelNoise | None = None
    """How the labels one has differ from the truth; missing means they are right."""
    lora: LoRA = LoRA(rank=8, alpha=16.0)
    """Each of the adapters; unlike sizes let the larger swallow everything."""
    p_off: float = Field(default=1.0, ge=0, le=1)
    """Share of core rows that are read with the forget adapters off."""

    paper: ClassVar[Paper] = Paper(
        "Gradient routing with two adapters while fine-tuning",
        "",
        "labelled rows step the forget adapter alone; certain core rows run without it",
        SOURCE,
        defaults={
            "p_off": "labelled-good rows have the forget adapter off",
            "lora.rank": "chosen here; adapters of one size, as vGROUT's notes ask",
            "fit.lr": "chosen here",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train both adapters, drop one, merge the other."""
        config = Pretrain(fit=self.fit, max_length=self.max_length, pack=self.pack)
        names = tuple(domain.forget)
        rows = label_rows((*forget_rows(domain), *domain.retain), names)
        if self.labels is not None:
            rows = give_labels(rows, self.labels, seed=ctx.seed_for("labels"))
        model = start.load(dtype=ctx.dtype, device=ctx.device)
        rules = _rules(self.p_off, 0.0, False)
        policy = Policy(groups=adapter_groups(len(names)), rules=rules, capabilities=names)
        with modules_on(model, self.lora, len(names), ctx, stays=True) as live:
            for name, parameter in live.named_parameters():
                parameter.requires_grad_("lora_" in name)
            trained = _train(live, policy, rows, start, config, ctx, (self.name, 1.0))
            extras, before = _look(live, trained, policy, rows, start, config, ctx)
            live.base_model.set_adapter("default")
            sets = sample(rows, start.tokenizer(), max_length=config.max_length)
            extras["losses"] = {"before": before, "after": losses(live, sets, ctx.device)}
            kept = self.lora.model_copy(update={"output": "merged"})
            return finish(start, live, {}, trained.progress, ctx, lora=kept, extras=extras)


def _rules(p_off: float, p_as: float, joint: bool) -> dict[str, tuple[Rule, ...]]:
    """Return what rows of each label read and write."""
    shared = (JOINT,) if joint else ()
    core = ("core", *shared)
    return {
        "core": alternatives((p_off, Rule(read=core, write=core)), (1 - p_off, Rule())),
        "forget": alternatives(
            (1 - p_as, Rule(write=("self", *shared))), (p_as, Rule(write=("self", *core)))
        ),
        "unlabeled": (Rule(),),
    }


def adapter_groups(count: int, shared: Sequence[Shared] = ()) -> Groups:
    """Return groups whose modules are the adapters `module_1`, `module_2` ...; the rest is core.

    Args:
        count: Number of capabilities.
        shared: Parts that every label writes.
    """
    parts: dict[str, tuple[Part, ...]] = {}
    for i in range(count):
        own = tuple(f"*.lora_{side}.module_{i + 1}.weight" for side in "AB")
        parts[f"module_{i + 1}"] = (Part(at="parameters", names=own),)
    if shared:
        parts[JOINT] = tuple(Part(at=at) for at in shared)
    return Groups(parts=parts)


@contextmanager
def modules_on(
    model: nn.Module, lora: LoRA, count: int, ctx: Context, *, stays: bool = False
) -> Iterator[Any]:
    """Lay one adapter per capability over a model for as long as the block lasts, all active.

    Fused experts get none.

    Args:
        model: A causal model.
        lora: Each adapter.
        count: Number of capabilities.
        ctx: Gives seeds.
        stays: Whether to lay one more, `default`, that belongs to the core.

    Yields:
        The peft model.
    """
    linears, fused = targets(model, lora.modules)
    if fused:
        lora = lora.model_copy(update={"modules": tuple(linears)})
    names = [f"module_{i + 1}" for i in range(count)]
    names = ["default", *names] if stays else names
    with adapted(model, lora, ctx.seed_for("lora.0"), name=names[0]) as live:
        for i, name in enumerate(names[1:]):
            add_adapter(live, lora, name, ctx.seed_for(f"lora.{i + 1}"))
        live.base_model.set_adapter(names)
        yield live


def _train(
    live: nn.Module,
    policy: Policy,
    rows: Rows,
    start: Checkpoint,
    config: Pretrain,
    ctx: Context,
    how: tuple[str, float],
) -> Trained:
    """Train under the policy, adapters at their own rate."""
    stage, rate = how
    modules = [name for name in policy.groups.parts if name != JOINT]
    fast = config.fit.lr * rate
    rates = None if rate == 1 else dict.fromkeys(modules, fast)
    return routed_fit(live, policy, rows, start.tokenizer(), config, ctx, stage=stage, rates=rates)


def _look(
    live: nn.Module,
    trained: Trained,
    policy: Policy,
    rows: Rows,
    start: Checkpoint,
    config: Pretrain,
    ctx: Context,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return facts and losses with the adapters on, and write the model as it is."""
    sets = sample(rows, start.tokenizer(), max_length=config.max_length)
    extras = described(live, trained.map, rows, sets, ctx)
    if ctx.rank == 0:
        placed = Placed({n: p for n, p in policy.groups.parts.items() if n != JOINT}, False)
        save_before(live, placed, policy.capabilities, ctx.work / BEFORE)
    return extras, losses(live, sets, ctx.device)
