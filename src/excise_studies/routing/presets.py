"""Presets and baselines as the routing studies run them: one place for what was tuned on seed 0."""

from __future__ import annotations

from collections.abc import Mapping

from excise.data.labels import LabelNoise
from excise.domains.facts import FACTS_MAX_LENGTH
from excise.methods import (
    ERA,
    GRAM,
    NPO,
    RMU,
    SSD,
    TAR,
    AblatedPlain,
    AdapterModules,
    Chain,
    DEMix,
    Filtering,
    FilterLoRA,
    GradDiff,
    GradDiffPretrain,
    MaxEnt,
    MemSinks,
    Propagate,
    Relabel,
    RepSelect,
    TokenFilter,
)
from excise.methods.base import Method
from excise.methods.posthoc.tar import RandomMapping
from excise.methods.pretraining.era import Expand
from excise.methods.pretraining.routed.coherence import Coherence
from excise.methods.pretraining.routed.modules import Module
from excise.train.components import Components
from excise.train.fit import FitConfig
from excise_studies.routing.setting import routed

LENGTH = FACTS_MAX_LENGTH


def era(**changes: object) -> ERA:
    """Return Expand-Route-Ablate, its neurons and repair sized for models of two blocks.

    Labelled rows are routed wholly: the published weights are all near 1 where facts that stay
    and facts that go share their answers (docs/lab-notes.md).
    """
    repair = Coherence(fit=FitConfig(steps=40, lr=3e-4, batch_size=64))
    expand = Expand(width=0.5, coherence=repair, tokens=None)
    return ERA(expand=expand.model_copy(update=changes))


def rmu() -> RMU:
    """Return RMU as in the demo."""
    return RMU(
        layer=1,
        blocks=(0, 1),
        steering=50.0,
        alpha=20.0,
        fit=FitConfig(steps=100, lr=1e-2, batch_size=64),
        max_length=LENGTH,
    )


def maxent() -> MaxEnt:
    """Return MaxEnt as in the demo."""
    fit = FitConfig(steps=100, lr=2e-3, batch_size=64, clip=1.0)
    return MaxEnt(alpha=0.5, fit=fit, max_length=LENGTH)


def grad_diff() -> GradDiff:
    """Return GradDiff as in the demo."""
    fit = FitConfig(steps=80, lr=4e-4, batch_size=64, clip=1.0)
    return GradDiff(alpha=4.0, fit=fit, max_length=LENGTH)


def npo() -> NPO:
    """Return NPO at a rate for models of this size."""
    fit = FitConfig(steps=80, lr=1e-3, batch_size=64, clip=1.0)
    return NPO(fit=fit, max_length=LENGTH)


def ssd() -> SSD:
    """Return SSD against retain rows: of a third of all rows none gives a ratio of ten to all."""
    return SSD(against="retain", max_length=LENGTH)


def repselect() -> RepSelect:
    """Return RepSelect strong enough to be heard in facts that are known by heart.

    512 components are more than matrices of this size have, and a KL of 0.01 on `dev_retain` is
    reached before a fact is lost.
    """
    return RepSelect(
        components=Components(count=4, how="shrink"),
        fit=FitConfig(steps=10, lr=10.0, batch_size=8, optimizer="sgd"),
        budget=0.0,
        max_length=LENGTH,
    )


def tar() -> TAR:
    """Return TAR with few and short attacks, at rates for models of this size."""
    fit = FitConfig(steps=30, lr=1e-3, batch_size=32, warmup=3, optimizer="schedule_free")
    return TAR(
        mapping=RandomMapping(fit=fit),
        inner_steps=16,
        inner_lr=(1e-3, 3e-3),
        inner_batch=16,
        fit=fit,
        max_length=LENGTH,
    )


PRESETS: Mapping[str, Method] = {
    "era": era(),
    "sgtm": routed(),
    "sgtm_pushed": routed(p_push=0.5),
    "sgtm_spread": routed(labels=LabelNoise(spread="unit")),
    "sgtm_tuned": routed(p_push=0.5, read=0.5, labels=LabelNoise(spread="unit")),
    "sgtm_relabelled": Relabel(
        fold_by="row", spread="unit", clear=1.0, then=routed(p_push=0.5, read=0.5)
    ),
    "gram": GRAM(p_cr=0.0, p_as=0.0, module=Module(width=0.5, grow=True)),
    "demix": DEMix(module=Module(width=0.5, grow=True)),
    "memsinks": MemSinks(),
    "adapter_modules": AdapterModules(),
}
"""Gradient routing. `pushed`: half of the labelled rows are pushed out of the core; `spread`:
labels spread over the rows of a unit first; `tuned`: both, and half of the labelled rows are left
out; `relabelled`: a probe labels the rest besides, as forget or core (both chosen on seeds 0, 11
and 12)."""

BASELINES: Mapping[str, Method] = {
    "filtering": Filtering(),
    "filtering_sure": Filtering(unlabeled="drop"),
    "propagate": Propagate(),
    "relabel": Relabel(),
    "relabel_rows": Relabel(fold_by="row"),
    "relabel_grad_diff": Relabel(fold_by="row", spread="unit", then=GradDiffPretrain()),
    "relabel_absorption": Relabel(features="absorption", router=routed()),
    "filter_lora": FilterLoRA(),
    "loss_masking": TokenFilter(how="mask"),
    "grad_diff_pretrain": GradDiffPretrain(),
    "ablated_plain": AblatedPlain(module=Module(width=0.5, grow=True)),
    "era_rmu": Chain(methods=(era(), rmu())),
}
"""What routing must beat, at equal compute."""
