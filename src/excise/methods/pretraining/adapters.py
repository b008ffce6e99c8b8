"""PEFT as gradient routing: a capability's module is a LoRA adapter that is dropped at the end.

`adapter_modules` trains a model from scratch whose modules are adapters laid over it; it differs
from SGTM in the kind of module alone. `dual_adapters` leaves a trained model as it is and lays
two adapters over it: one that stays and takes what retained rows teach, one that labelled rows
write alone and that is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from excise.core.context import Context
from excise.data.domain import Domain, Rows
from excise.data.labels import LabelNoise
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import (
    Pretrain,
    labelled_corpus,
    labelled_tuning_rows,
    schedule,
)
from excise.methods.pretraining.routed import (
    BEFORE,
    ModularModel,
    core_rules,
    described,
    forget_rules,
    module_rates,
)
from excise.methods.pretraining.routed.absorption import Samples, losses, sample
from excise.methods.pretraining.routed.modules import Placed, Shared, groups_of, save_before
from excise.methods.pretraining.routed.training import RoutedTraining, routed_fit
from excise.methods.tuning import finish
from excise.models.checkpoint import Checkpoint
from excise.models.lora import FullLoRA, LoRA, adapted, add_adapter, targets
from excise.routing import JOINT, Part, Policy, Rule
from excise.train.fit import FitConfig

SOURCE = "jnward/gradient-routing-finetuning (gemma-3-1b-it; no licence file, read only)"


class AdapterModules(Method):
    """From scratch with a LoRA adapter as the module of each capability; adapters are dropped."""

    name: Literal["adapter_modules"] = "adapter_modules"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the given labels differ from the truth; missing means they are right."""
    lora: FullLoRA = LoRA(rank=8, alpha=16.0)
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
            "joint": "that of SGTM on TinyStories (arXiv:2512.05648), embeddings alone of what "
            "labelled rows write there",
            "lora.rank": "ours: the paper sizes adapters by their share of the parameters",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` and its adapters, and keep the core alone."""
        config, names = schedule(self.pretrain, self.name), tuple(domain.forget)
        rows = labelled_corpus(domain, self.labels, ctx)
        model = start.load(dtype=ctx.dtype, device=ctx.device)
        placed = Placed(adapter_parts(len(names)), grown=False, lr=self.lr)
        policy = Policy(
            groups=groups_of(placed, self.joint),
            rules=_rules(self.p_off, self.p_as, (JOINT,) if self.joint else ()),
            capabilities=names,
        )
        with adapters_on(model, self.lora, len(names), ctx) as live:
            for parameter in live.parameters():
                parameter.requires_grad_(True)
            modular = ModularModel(live, placed, policy)
            trained, facts, samples = train_adapters(
                start, modular, rows, config, ctx, stage=self.name
            )
        facts["losses"]["after"] = losses(model, samples, ctx.device)
        parameters = dict(model.named_parameters())
        return finish(start, model, parameters, trained.progress, ctx, extras=facts)


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
    """How the given labels differ from the truth; missing means they are right."""
    lora: FullLoRA = LoRA(rank=8, alpha=16.0)
    """Each of the adapters; unlike sizes let the larger swallow everything."""
    p_off: float = Field(default=1.0, ge=0, le=1)
    """Share of core rows that are read with the forget adapters off."""

    paper: ClassVar[Paper] = Paper(
        "Gradient routing with two adapters while fine-tuning",
        "",
        "labelled rows step the forget adapter alone; certain core rows run without it",
        SOURCE,
        defaults={
            "p_off": "all_caps/experiment_dispersed.py: LABELED_GOOD_PERCENTAGE 0.05 of core rows "
            "have the forget adapter off, all others read and write both adapters; here 1, since "
            "every core row is labelled",
            "lora.rank": "experiment.py: rank 1, alpha 64; here 8 and 16; adapters of one size, as "
            "there",
            "fit": "experiment.py: 1000 steps of one row, lr 1e-4, cosine after 100 steps of "
            "warm-up, weight decay 0.01; here 200 steps of 32, lr 1e-3, constant, no decay, "
            "clipped at 1",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train both adapters, drop one, merge the other."""
        config = Pretrain(fit=self.fit, max_length=self.max_length, pack=self.pack)
        rows, names = labelled_tuning_rows(domain, self.labels, ctx), tuple(domain.forget)
        model = start.load(dtype=ctx.dtype, device=ctx.device)
        placed = Placed(adapter_parts(len(names)), grown=False)
        policy = Policy(
            groups=groups_of(placed), rules=_rules(self.p_off, 0.0, ()), capabilities=names
        )
        with adapters_on(model, self.lora, len(names), ctx, stays=True) as live:
            for name, parameter in live.named_parameters():
                parameter.requires_grad_("lora_" in name)
            modular = ModularModel(live, placed, policy)
            trained, facts, samples = train_adapters(
                start, modular, rows, config, ctx, stage=self.name
            )
            live.base_model.set_adapter("default")
            facts["losses"]["after"] = losses(live, samples, ctx.device)
            staying = self.lora.model_copy(update={"output": "merged"})
            return finish(start, live, {}, trained.progress, ctx, lora=staying, extras=facts)


def _rules(p_off: float, p_as: float, joint: tuple[str, ...]) -> dict[str, tuple[Rule, ...]]:
    """Return what rows of each label read and write."""
    core = ("core", *joint)
    return {
        "core": core_rules(core, p_off=p_off),
        "forget": forget_rules(core, joint, p_as=p_as),
        "unlabeled": (Rule(),),
    }


def adapter_parts(count: int) -> dict[str, tuple[Part, ...]]:
    """Return the parts of `count` modules that are the adapters `module_1`, `module_2` ..."""
    names = [f"module_{i + 1}" for i in range(count)]
    return {
        name: (Part(at="parameters", names=tuple(f"*.lora_{side}.{name}.weight" for side in "AB")),)
        for name in names
    }


@contextmanager
def adapters_on(
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
    names = [*(["default"] if stays else []), *adapter_parts(count)]
    with adapted(model, lora, ctx.seed_for("lora.0"), name=names[0]) as live:
        for i, name in enumerate(names[1:]):
            add_adapter(live, lora, name, ctx.seed_for(f"lora.{i + 1}"))
        live.base_model.set_adapter(names)
        yield live


def train_adapters(
    start: Checkpoint,
    modular: ModularModel,
    rows: Rows,
    config: Pretrain,
    ctx: Context,
    *,
    stage: str,
) -> tuple[RoutedTraining, dict[str, Any], Samples]:
    """Train a model with adapters under a policy, measure it, and write it as it is.

    Args:
        start: What the method started from.
        modular: The model with its adapters.
        rows: What is read, with the given labels.
        config: The schedule.
        ctx: Seed, device, folder.
        stage: Name shown beside the progress.

    Returns:
        Map and progress; facts for the record, losses before the adapters are dropped among them;
        and the rows on which they were measured.
    """
    live, policy, tokenizer = modular.model, modular.policy, start.tokenizer()
    rates = module_rates(modular.placed, config)
    trained = routed_fit(live, policy, rows, tokenizer, config, ctx, stage=stage, rates=rates)
    samples = sample(rows, tokenizer, max_length=config.max_length)
    facts = described(live, trained.map, rows, samples, ctx)
    if ctx.rank == 0:
        save_before(live, modular.placed, policy.capabilities, ctx.work / BEFORE)
    facts["losses"] = {"before": losses(live, samples, ctx.device)}
    return trained, facts, samples
