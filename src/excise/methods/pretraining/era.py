"""Expand-Route-Ablate: extra neurons that forget rows train, deleted at the end.

All rows run through the whole model. For a token of a row labelled as a capability, the gradient
that would pass back through the original neurons of the first blocks is reversed and shrunk, the
more wholly the more typical the token is of such rows; the added neurons always get theirs.

`era` trains from scratch, as published. `era_after` starts from a model that is trained already:
nothing removes what its original neurons know except that forget tokens push against them
(`expand.alpha` below 0) while the added neurons take over. One re-run of the published code found
0.26 nats of forget loss and hardly any cost.

Shape legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from excise.core.config import SIGNED, Config
from excise.core.context import Context
from excise.data.domain import CORE, Domain, Rows
from excise.data.labels import LabelNoise
from excise.data.stream import Tokenizer, encode
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import (
    Pretrain,
    labelled_corpus,
    labelled_tuning_rows,
    schedule,
)
from excise.methods.pretraining.routed import ModularModel, train_and_cut
from excise.methods.pretraining.routed.coherence import Coherence
from excise.methods.pretraining.routed.modules import Module, own_units, place
from excise.models.anatomy import anatomy
from excise.models.checkpoint import Checkpoint
from excise.routing import Groups, Policy, Rule
from excise.train.fit import FitConfig

PUBLISHED = {
    "expand.depth": "bulk_runs_for_paper.py: layers 0 to 4 of 8",
    "expand.width": "bulk_runs_for_paper.py: 64 neurons beside 2048",
    "expand.alpha": "bulk_runs_for_paper.py: -0.75 on the original neurons for tokens of forget "
    "stories",
    "expand.l1": "bulk_runs_for_paper.py: 1e-4 on the MLP activations of the target layers, summed "
    "over all positions, padding too, and divided by batch x 256; here by the real tokens",
    "expand.tokens": "appendix C: slope 1, offset -4, smoothing 1 and 20; tinystories_era.py "
    "counts every forget story, also where labels are partial; here those that are labelled",
    "expand.coherence": "tinystories_era.py: one batch of 64 retain stories, lr 5e-5, 41 steps, "
    "betas 0.9 and 0.95, decay 0.1, best on 1000; here 40 steps, betas 0.9 and 0.999, decay 0",
}
"""Where the defaults come from: arXiv:2410.04332, appendix C, and files of the released code, which
lie in projects/tinystories."""


class TokenWeights(Config):
    """How much a token of a forget row counts as forget, by how typical of forget rows it is."""

    slope: Annotated[float, SIGNED] = 1.0
    """s: how fast the weight falls with the frequency ratio."""
    offset: float = -4.0
    """b: at -4 a token as frequent in both is routed by 2 %."""
    smooth_forget: float = Field(default=1.0, gt=0)
    """Added to every count among forget rows."""
    smooth_retain: float = Field(default=20.0, gt=0)
    """Added to every count among retain rows."""


class Expand(Config):
    """The three steps of Expand-Route-Ablate."""

    width: float = Field(default=0.03125, gt=0, le=8)
    """Neurons added to each routed block, as a share of its MLP's."""
    depth: float = Field(default=0.625, gt=0, le=1)
    """Share of the blocks, from the first, that are expanded and routed."""
    alpha: float = -0.75
    """Weight of the gradient of a forget token that passes back through the original neurons."""
    tokens: TokenWeights | None = TokenWeights()
    """How wholly a token of a labelled row is routed, by how typical it is; missing for wholly."""
    l1: float = Field(default=1e-4, ge=0)
    """Weight of the L1 norm of the routed blocks' MLP activations."""
    lr: float = Field(default=1.0, ge=0)
    """Learning rate of the added neurons, as a multiple of the schedule's."""
    coherence: Coherence | None = Coherence()
    """The light fine-tune after the ablation; missing for none."""


class ERA(Method):
    """Grow neurons, route forget gradients away from the others, delete them, repair lightly."""

    name: Literal["era"] = "era"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the given labels differ from the truth; missing means they are right."""
    expand: Expand = Expand()
    """What is grown, how gradients are routed, and the repair."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Gradient routing: masking gradients to localize computation in neural networks",
        "arXiv:2410.04332",
        "section 4.2.1 and appendix C",
        "kxcloud/gradient-routing@896dba3 (MIT in its pyproject)",
        defaults=PUBLISHED,
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Expand `start`, train it under routing, ablate, and repair."""
        config, names = schedule(self.pretrain, self.name), tuple(domain.forget)
        rows = labelled_corpus(domain, self.labels, ctx)
        return expand_route_ablate(start, rows, names, self.expand, config, ctx, stage=self.name)


class ERAAfter(Method):
    """Expand a trained model, train it on under routing, delete what was added."""

    name: Literal["era_after"] = "era_after"
    fit: FitConfig = FitConfig(steps=200, lr=1e-4, batch_size=32, weight_decay=0.1)
    """Continued training on forget and retain rows together."""
    max_length: int = Field(default=128, ge=2)
    """Tokens per row."""
    pack: tuple[int, ...] = (1,)
    """Rows per text, in turn."""
    labels: LabelNoise | None = None
    """How the given labels differ from the truth; missing means they are right."""
    expand: Expand = Expand()
    """What is grown, how gradients are routed, and the repair."""

    paper: ClassVar[Paper] = Paper(
        "Gradient routing: masking gradients to localize computation in neural networks",
        "arXiv:2410.04332",
        "section 4.2.1 from a trained checkpoint",
        "EleutherAI/gradient-routing (re-runs of February 2026)",
        defaults={
            **PUBLISHED,
            "expand.coherence": "tinystories_era_posttrain.py: 500 steps (501 are taken), lr 5e-5, "
            "betas 0.9 and 0.95, decay 0.1; here 40 steps, betas 0.9 and 0.999, decay 0",
            "expand": "tinystories_era_posttrain.py adds neurons that speak from the first step; "
            "here their output is 0 at first, so that the model starts as it was",
            "fit.lr": "tinystories_era_posttrain.py: 1e-4",
            "fit.weight_decay": "appendix C: 0.1",
            "fit.steps": "tinystories_era_posttrain.py: 5,000; here 200, see the study "
            "era-after-training",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Expand `start` silently, train it on under routing, ablate, and repair."""
        config = Pretrain(fit=self.fit, max_length=self.max_length, pack=self.pack)
        rows, names = labelled_tuning_rows(domain, self.labels, ctx), tuple(domain.forget)
        return expand_route_ablate(
            start, rows, names, self.expand, config, ctx, stage=self.name, silent=True
        )


def expand_route_ablate(
    start: Checkpoint,
    rows: Rows,
    names: tuple[str, ...],
    expand: Expand,
    config: Pretrain,
    ctx: Context,
    *,
    stage: str,
    silent: bool = False,
) -> Removal:
    """Add neurons, train under routing, delete them, and repair.

    Groups are `core`, `original` (the routed blocks' own neurons) and one module per capability.

    Args:
        start: What is expanded.
        rows: What is read, with the given labels.
        names: Capabilities, in the order of their labels.
        expand: Settings.
        config: The schedule.
        ctx: Seed, device, folder.
        stage: Name shown beside the progress.
        silent: Whether the new neurons lead nowhere at first.
    """
    model = start.load(dtype=ctx.dtype, device=ctx.device)
    blocks = tuple(range(max(1, round(expand.depth * anatomy(model).num_blocks))))
    original = own_units(model, blocks)
    module = Module(width=expand.width, blocks=blocks, grow=True, lr=expand.lr)
    placed = place(model, module, len(names), ctx.seed_for("grow"), silent=silent)
    policy = Policy(
        groups=Groups(parts={"original": original, **placed.parts}),
        rules={
            "core": (Rule(),),
            "unlabeled": (Rule(),),
            "forget": (Rule(edges={"original": expand.alpha}),),
        },
        capabilities=names,
    )
    soften_V = None
    if expand.tokens is not None:
        soften_V = routed_share(
            model, rows, start.tokenizer(), expand.tokens, max_length=config.max_length
        )
    return train_and_cut(
        start,
        ModularModel(model, placed, policy),
        rows,
        config,
        ctx,
        stage=stage,
        how="delete",
        l1=expand.l1,
        soften_V=soften_V,
        repair=expand.coherence,
    )


def routed_share(
    model: nn.Module, rows: Rows, tokenizer: Tokenizer, config: TokenWeights, *, max_length: int
) -> Float[Tensor, "V"]:
    """Return how wholly each token of the vocabulary is routed in a labelled row.

    Args:
        model: Gives the size of the vocabulary.
        rows: What is read, with the given labels.
        tokenizer: The model's tokenizer.
        config: Slope, offset and smoothing.
        max_length: Tokens per row.
    """
    vocab = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    ids: dict[bool, list[int]] = {True: [], False: []}
    for example in encode(rows, tokenizer, max_length=max_length):
        label = example.label
        labels = (label,) * len(example.ids) if isinstance(label, int) else label
        for token, number in zip(example.ids, labels, strict=True):
            ids[number > CORE].append(token)
    counts = [token_counts([ids[forget]], vocab) for forget in (True, False)]
    return 1 - token_weights(counts[0], counts[1], config)


def token_counts(texts: Iterable[Iterable[int]], vocab: int) -> Int[Tensor, "V"]:
    """Return how often each token id occurs.

    Args:
        texts: Token ids.
        vocab: Size of the vocabulary.
    """
    ids = [i for text in texts for i in text]
    return torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=vocab)


def token_weights(
    forget_V: Int[Tensor, "V"], retain_V: Int[Tensor, "V"], config: TokenWeights
) -> Float[Tensor, "V"]:
    """Return w: 1 for tokens treated like any other, 0 for those that are wholly routed.

    Source: Cloud et al. 2024, "Gradient Routing", arXiv:2410.04332, appendix C:
    w = 1 - sigmoid(s (r - 1/r) + b) with r the frequency of a token in forget rows over its
    frequency in retain rows.

    Args:
        forget_V: Counts among forget rows.
        retain_V: Counts among retain rows.
        config: Slope, offset and smoothing.
    """
    forget = forget_V.double() + config.smooth_forget
    retain = retain_V.double() + config.smooth_retain
    ratio = (forget / forget.sum()) / (retain / retain.sum())
    return (1 - torch.sigmoid(config.slope * (ratio - 1 / ratio) + config.offset)).float()
