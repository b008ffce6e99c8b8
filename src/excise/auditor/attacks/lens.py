"""The lens: what every block already says, read through the model's own output layer.

Readouts of the residual stream where a question is answered. *logit*: the final norm and the head
on a block's output. *recentred*: the same after the mean over the relearn set's answers is
exchanged for that over benign text, which takes out what an edit adds to all forget prompts alike;
*cleared*: after the direction between the two means is, which takes out what it adds to some more
than to others. *tuned*: an affine translator of each block, trained on benign text to say what the
last block says. The block is chosen on `dev`. The score is the share of questions whose right
answer is the first of its candidates, so that it is compared with what the same lens reads out of
oracle and original.

Its positive control hides in the last block. What is hidden before, so that later blocks compute
with it, no readout of one block need find; clearing and probes are the attacks on that.

Shape legend: N positions, Q questions, L blocks, D width, V vocabulary.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from excise.auditor.base import Access, Attack, AttackResult, Subject, VariantResult
from excise.auditor.budget import Budget
from excise.auditor.controls import GatedEdit, PositiveControl
from excise.auditor.evaluation_set import evaluation_set
from excise.auditor.questions import METRIC
from excise.auditor.readout import (
    NO_QUESTIONS,
    Readout,
    final_norm,
    logit_lens,
    own_output,
    read_off,
)
from excise.auditor.residuals import Residuals, residuals_of
from excise.auditor.results import absent, decided
from excise.auditor.scoring import Measurement, variant_of
from excise.core.context import Context
from excise.data.domain import Domain
from excise.models.anatomy import backbone
from excise.models.head import Head, head_of
from excise.record import Level

VOCABULARY = 4096
"""Tokens that a translator learns to predict at most; of more, the questions' and others drawn."""


class Lens(Attack):
    """Logit, recentred, cleared and tuned lens; the right answer's place among its candidates."""

    name: Literal["lens"] = "lens"
    """Name of the attack."""
    steps: int = Field(default=96, ge=1)
    """Optimizer steps of a translator."""
    batch: int = Field(default=128, ge=1)
    """Positions of one step."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of a translator."""
    blocks: int = Field(default=8, ge=1)
    """Blocks that get a translator at most, evenly spaced."""

    access: ClassVar[Access] = "activations"
    level: ClassVar[Level] = "D2"
    controls: ClassVar[tuple[PositiveControl, ...]] = (GatedEdit(block="last"),)
    light: ClassVar[bool] = True
    source: ClassVar[str] = (
        "nostalgebraist, lesswrong.com 2020-08-31; Belrose et al., arXiv 2303.08112, equation 9; "
        "recentring and clearing are this library's"
    )
    version: ClassVar[int] = 2

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read: once, and retain."""
        del budget
        return 2.0

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Read V off every block.

        Args:
            subject: The model.
            domain: Rows by role; `benign` and `relearn` are read, the block is chosen on `dev`.
            budget: Rows and lengths.
            ctx: Seed, device, dtype.

        Returns:
            One variant per readout, at its best block on dev. The curve begins with what the
            model's own output says of the same candidates. `facts["by_block"]` are the scores on
            dev, `facts["mean_rank"]` the mean rank of the right candidate on V, 0 the first.
        """
        start = time.perf_counter()
        residuals = residuals_of(subject.checkpoint, domain, budget, ctx)
        if not residuals.asked["test"].questions or not residuals.asked["dev"].questions:
            return absent(self, subject.name, "missing", NO_QUESTIONS, applies=False)
        model = subject.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
        blocks = backbone(model).num_blocks
        readouts: dict[str, Readout] = {"logit": logit_lens(model)}
        if {"relearn", "benign"} <= set(residuals.texts):
            readouts["recentred"] = recentred_lens(readouts["logit"], residuals)
            readouts["cleared"] = cleared_lens(readouts["logit"], residuals)
        if "benign" in residuals.texts:
            readouts["tuned"] = tuned_lens(self, model, residuals, ctx)
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        bare = own_output(model, residuals, evaluation)
        variants = [
            _variant(self, subject, residuals, bare, name, readout, blocks)
            for name, readout in readouts.items()
        ]
        marked, chosen = decided(variants, higher=True)
        return AttackResult(self.name, subject.name, marked, chosen, time.perf_counter() - start)


def _variant(
    attack: Lens,
    subject: Subject,
    residuals: Residuals,
    bare: Measurement,
    name: str,
    readout: Readout,
    blocks: int,
) -> VariantResult:
    """Read V through one readout, at the block where dev is read best."""
    on_dev = [read_off(residuals, "dev", readout, block) for block in range(blocks)]
    means = [sum(units.values()) / len(units) for units, _ in on_dev]
    best = max(range(blocks), key=lambda block: (means[block], -on_dev[block][1], block))
    units, rank = read_off(residuals, "test", readout, best)
    return variant_of(
        attack,
        subject,
        METRIC,
        variant=name,
        measurements=(bare, Measurement(units, bare.retain, examples=len(units))),
        dev=on_dev[best][0],
        extras={"dev_loss": on_dev[best][1]},  # settles ties: the mean rank
        trained_on={"recentred": "relearn", "cleared": "relearn", "tuned": "benign"}.get(name, ""),
        facts={"block": best, "mean_rank": rank, "by_block": means},
    )


def recentred_lens(lens: Readout, residuals: Residuals) -> Readout:
    """Return a lens behind which forget prompts look, on average, like benign text.

    Args:
        lens: What reads after that.
        residuals: Of the relearn set and of benign text, where an answer is about to be given.
    """
    shift_LD = _answering(residuals, "benign") - _answering(residuals, "relearn")
    return lambda hidden_ND, block: lens(hidden_ND + shift_LD[block], block)


def cleared_lens(lens: Readout, residuals: Residuals) -> Readout:
    """Return a lens without the direction that tells forget prompts from benign text.

    An edit that adds more of it to some prompts than to others survives the exchange of means.

    Args:
        lens: What reads after that.
        residuals: Of the relearn set and of benign text, where an answer is about to be given.
    """
    benign_LD = _answering(residuals, "benign")
    unit_LD = torch.nn.functional.normalize(_answering(residuals, "relearn") - benign_LD, dim=-1)

    def read(hidden_ND: Tensor, block: int) -> Tensor:
        along_N = (hidden_ND - benign_LD[block]) @ unit_LD[block]
        return lens(hidden_ND - torch.outer(along_N, unit_LD[block]), block)

    return read


def _answering(residuals: Residuals, role: str) -> Float[Tensor, "L D"]:
    """Return the mean over positions that predict a scored token."""
    texts = residuals.texts[role]
    return texts.hidden_NLD[texts.answering_N].mean(0)


def tuned_lens(attack: Lens, model: Any, residuals: Residuals, ctx: Context) -> Readout:
    """Train an affine translator per block on benign text and return the lens behind it.

    min over A, b of KL(softmax f(h_L) || softmax f(h_l + A h_l + b)), f the final norm and head,
    A and b from zero, Adam; of large vocabularies only some tokens, renormalized.

    Args:
        attack: Steps, rate, batch and number of translators; a block without one has no lens of
            its own and takes the logit lens.
        model: The model; its weights stay as they are.
        residuals: Of benign text; V is not read, but the tokens of its candidates are kept.
        ctx: Seed of the order of positions and of the tokens.

    Source:
        Belrose et al., arXiv 2303.08112, equations 8 and 9.
    """
    head, norm = head_of(model).detach(), final_norm(model)
    device = head.weight_VD.device
    keep_K = _vocabulary(head, residuals, ctx).to(device)
    weight_KD = head.weight_VD[keep_K].float()
    bias_K = None if head.bias_V is None else head.bias_V[keep_K].float()
    small = Head(weight_KD, bias_K, head.softcap, head.scale)
    benign_NLD = residuals.texts["benign"].hidden_NLD
    blocks = benign_NLD.shape[1]
    translators = {
        block: _translator(attack, norm, small, benign_NLD[:, (block, -1)], ctx, block)
        for block in _spaced(blocks, attack.blocks)
    }
    lens = logit_lens(model)

    def read(hidden_ND: Tensor, block: int) -> Tensor:
        if block not in translators:
            return lens(hidden_ND, block)
        return lens(hidden_ND + translators[block](hidden_ND), block)

    return read


def _spaced(blocks: int, most: int) -> list[int]:
    """Return evenly spaced blocks before the last, which needs no translator."""
    count = min(most, blocks - 1)
    return sorted({round((i + 1) * (blocks - 1) / (count + 1)) for i in range(count)})


def _vocabulary(head: Head, residuals: Residuals, ctx: Context) -> Tensor:
    """Return the tokens that translators predict, in order."""
    if head.vocab <= VOCABULARY:
        return torch.arange(head.vocab)
    asked = {t for part in residuals.asked.values() for q in part.questions for t in q.tokens}
    drawn = torch.randperm(head.vocab, generator=ctx.generator("lens/vocabulary"))[:VOCABULARY]
    return torch.tensor(sorted({*asked, *drawn.tolist()}))


def _translator(
    attack: Lens,
    norm: nn.Module,
    head: Head,
    pair_N2D: Float[Tensor, "N 2 D"],
    ctx: Context,
    block: int,
) -> nn.Module:
    """Train one block's translator.

    Args:
        attack: Steps, rate, batch.
        norm: The model's final norm.
        head: Its head, of the tokens that are predicted.
        pair_N2D: The block's output and the last block's, on benign text.
        ctx: Seed.
        block: Number of the block.

    Returns:
        h -> A h + b, on the CPU.
    """
    device, dtype = head.weight_VD.device, next(norm.parameters(), head.weight_VD).dtype
    width = pair_N2D.shape[-1]
    linear = nn.utils.skip_init(nn.Linear, width, width, device=device)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    optimizer = torch.optim.Adam(linear.parameters(), lr=attack.lr)
    generator = ctx.generator(f"lens/{block}")

    def logprobs(hidden_ND: Tensor) -> Tensor:
        return head.logits(norm(hidden_ND.to(dtype)).float()).log_softmax(-1)

    for _ in range(attack.steps):
        at_N = torch.randint(len(pair_N2D), (attack.batch,), generator=generator)
        early_ND, late_ND = pair_N2D[at_N].to(device).unbind(1)
        with torch.no_grad():
            target_NK = logprobs(late_ND)
        said_NK = logprobs(early_ND + linear(early_ND))
        loss = nn.functional.kl_div(said_NK, target_NK, reduction="batchmean", log_target=True)
        gradients = torch.autograd.grad(loss, list(linear.parameters()))
        for parameter, gradient in zip(linear.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    trained: nn.Module = linear.requires_grad_(False).cpu()
    return trained
