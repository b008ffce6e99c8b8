"""Relabel, then filter or route: a probe trained on the given labels labels the rest.

The probe sees the tokens of a row, the hidden states of a model trained for a short while on
everything, or how much the ablation of a routed model took from the row (its absorption). A
labeller (`excise.labelling`) labels words in its place: from n-grams, by an encoder, or from the
states of such a model. What that training costs is taken off the steps of the model that is handed
back, so that all methods spend the same compute.

Shape legend: N rows, F features, B rows of a batch, T tokens, D width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Domain, Row, Rows
from excise.data.labels import LabelNoise, forget_score, propagated
from excise.data.spans import labelled_whole
from excise.data.stream import collate, encode
from excise.evals.score import measure
from excise.labelling.labeller import EncoderLabeller, NgramLabeller, StatesLabeller
from excise.methods.base import Cost, Method, Paper, Removal
from excise.methods.pretraining.pretrain import (
    Pretrain,
    cut_to,
    dropped,
    labelled_corpus,
    pretrain,
    schedule,
)
from excise.methods.pretraining.relabel.probe import (
    Judgement,
    ThresholdRule,
    bag_of_tokens,
    judge,
    standardised,
)
from excise.methods.pretraining.relabel.words import judge_words, relabel_words
from excise.methods.pretraining.routed.modules import serve
from excise.models.anatomy import anatomy
from excise.models.checkpoint import Checkpoint
from excise.models.hooks import capture

LABELLERS: Mapping[str, type[NgramLabeller] | type[EncoderLabeller] | type[StatesLabeller]] = {
    "ngrams": NgramLabeller, "encoder": EncoderLabeller, "states": StatesLabeller
}  # fmt: skip
"""Features that label words."""


@dataclass(frozen=True)
class Judged:
    """What a probe made of the labels of rows.

    Attributes:
        given: The corpus with the given labels.
        rows: The same, labels spread: what the probe learned from.
        relabelled: The same with the labels of the probe.
        judgement: What it said.
        cost: What its features cost.
        steps: Steps of the schedule by purpose: `features`, `reading`, and `training` for the rest.
    """

    given: Rows
    rows: Rows
    relabelled: Rows
    judgement: Judgement
    cost: Cost
    steps: Mapping[str, int]


class Relabel(Method):
    """A probe trained on the labels finds rows they miss; drop those too, or hand the labels on."""

    name: Literal["relabel"] = "relabel"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the given labels differ from the truth; missing means they are right."""
    features: Literal["tokens", "hidden", "absorption", "ngrams", "encoder", "states"] = "tokens"
    """What the probe sees: a bag of tokens, the mean hidden state of a briefly trained model, or
    the rise of the row's loss when the module of a routed model is ablated. With `ngrams`,
    `encoder` or `states` (of a briefly trained model) words are labelled, each by itself."""
    labeller: NgramLabeller | EncoderLabeller | StatesLabeller | None = None
    """Settings of the labeller of words, by its `name`; those of `features` when missing."""
    router: SerializeAsAny[Method] | None = None
    """Method whose absorption is read; it must leave its model before the ablation."""
    warm_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of the steps spent on the model behind `hidden`, `absorption` or `states`."""
    block: int | None = None
    """Block whose output `hidden` reads, from 0; missing means the middle one."""
    folds: int = Field(default=5, ge=2)
    """Every row is scored by a probe trained on the other folds."""
    fold_by: Literal["row", "unit", "group"] = "group"
    """What is never on both sides of a fold: other rows of a missed unit teach that it is core."""
    spread: Literal["no", "unit", "group"] = "no"
    """Whether labels first spread over the unit or group, as `propagate` does."""
    rule: ThresholdRule = "lift"
    """How the threshold is chosen on held-out labelled rows; see `relabel.probe.judge`."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Probability above which a row is forget, with rule `fixed`."""
    l2: float = Field(default=1.0, gt=0)
    """Penalty of the probe's squared weights."""
    clear: float = Field(default=0.0, ge=0, le=1)
    """Rows without a label are labelled core where the probe gives them less than this share of
    the threshold; 0 leaves them unlabelled."""
    then: SerializeAsAny[Method] | None = None
    """Method that trains on the new labels; missing leaves out the rows that are labelled."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Learning with positive and unlabeled examples using weighted logistic regression",
        "ICML 2003",
        "section 4: the threshold; then filtering (arXiv:2508.06601)",
        defaults={"l2": "ours: the usual C = 1 of logistic regression; no published value"},
    )

    @model_validator(mode="after")
    def _check(self) -> Relabel:
        """Refuse a router that is not read, and absorption without one."""
        if (self.features == "absorption") != (self.router is not None):
            raise ValueError(
                "router: name a routed method with features 'absorption', and with no other"
            )
        if self.router is not None and self.router.starts_from != "scratch":
            raise ValueError("router: must train from scratch, so that its compute can be counted")
        if self.labeller is not None and self.labeller.name != self.features:
            raise ValueError(
                f"labeller: is '{self.labeller.name}', and features are '{self.features}'; name "
                "one of them alone, or both the same"
            )
        if self.features in LABELLERS and self.then is None:
            raise ValueError(
                f"then: features '{self.features}' label words, which cannot be left out as rows "
                "are; name a method that reads labels of words, such as token_filter"
            )
        if self.then is not None:
            needed = ("pretrain", "labels")
            reads_labels = set(needed) <= set(type(self.then).model_fields)
            if self.then.starts_from != "scratch" or not reads_labels:
                raise ValueError("then: name a method that trains from scratch on labels")
            if any(getattr(self.then, name) is not None for name in needed):
                raise ValueError("then: takes schedule and labels from relabel; set them there")
        elif self.clear:
            raise ValueError("clear: filtering keeps unlabelled rows anyway; name a method in then")
        return self

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` on the rows that neither labels nor probe take for forget."""
        config = schedule(self.pretrain, self.name)
        if self.features in LABELLERS:
            return self._by_word(start, domain, config, ctx)
        judged = self.judged(start, domain, ctx)
        rows, relabelled = judged.rows, judged.relabelled
        rest = cut_to(config, judged.steps["training"], self.name)
        facts = {
            "spread": relabelling_quality(judged.given, rows),
            "probe": {
                **relabelling_quality(rows, relabelled),
                "threshold": judged.judgement.threshold,
            },
            "held_out": judged.judgement.held_out,
            "steps": dict(judged.steps),
        }
        if self.then is None:
            remaining = tuple(row for row in relabelled if forget_score(row) <= 0.5)
            facts = {**dropped(rows, remaining), **facts}
            removal = pretrain(start, remaining, rest, ctx, stage=self.name, extras=facts)
        else:
            then = self.then.model_copy(update={"pretrain": rest})
            removal = then.apply(start, with_labels(domain, relabelled), ctx)
            removal = replace(removal, extras={**removal.extras, "relabel": facts})
        return replace(removal, cost=removal.cost + judged.cost)

    def judged(self, start: Checkpoint, domain: Domain, ctx: Context) -> Judged:
        """Return every row as the given labels and as the probe have it; nothing is trained on it.

        Raises:
            UserError: If the features are those of a labeller of words, or leave no step to train.
        """
        if self.features in LABELLERS:
            raise UserError(
                f"relabel.features '{self.features}' label words, not rows; use 'tokens', 'hidden' "
                "or 'absorption'"
            )
        config = schedule(self.pretrain, self.name)
        given, rows = self._labels(domain, ctx)
        steps = config.fit.steps
        warm = 0 if self.features == "tokens" else max(1, round(self.warm_share * steps))
        passes = {"tokens": 0, "hidden": 1, "absorption": 2}[self.features]
        # Reading a row costs a third of training on it.
        read = -(-passes * len(rows) // (3 * config.fit.batch_size))
        rest = cut_to(config, steps - warm - read, self.name)
        x_NF, cost = self._features(start, rows, domain, cut_to(config, warm or 1, self.name), ctx)
        judgement = judge(
            rows,
            x_NF,
            folds=self.folds,
            by=self.fold_by,
            rule=self.rule,
            fixed=self.threshold,
            l2=self.l2,
            seed=ctx.seed_for("relabel"),
        )
        relabelled = relabel(rows, judgement, clear=self.clear)
        spent = {"features": warm, "reading": read, "training": rest.fit.steps}
        return Judged(given, rows, relabelled, judgement, cost, spent)

    def _labels(self, domain: Domain, ctx: Context) -> tuple[Rows, Rows]:
        """Return the corpus with the given labels, and with these spread."""
        given = labelled_corpus(domain, self.labels, ctx)
        return given, given if self.spread == "no" else propagated(given, by=self.spread)

    def _by_word(
        self, start: Checkpoint, domain: Domain, config: Pretrain, ctx: Context
    ) -> Removal:
        """Label words by a labeller, and train on the new labels."""
        assert self.then is not None
        given, rows = self._labels(domain, ctx)
        labeller = self.labeller or LABELLERS[self.features]()
        inner = ctx.child("features")
        cost, model, warm = Cost(), None, 0
        if isinstance(labeller, StatesLabeller):
            warm = max(1, round(self.warm_share * config.fit.steps))
            trained = pretrain(
                start, rows, cut_to(config, warm, self.name), inner, stage=f"{self.name}.features"
            )
            cost, model = trained.cost, trained.checkpoint
        began = time.perf_counter()
        judgement = judge_words(
            rows,
            labeller,
            len(domain.forget) + 1,
            inner,
            model=model,
            folds=self.folds,
            by=self.fold_by,
            rule=self.rule,
            fixed=self.threshold,
            seed=ctx.seed_for("relabel"),
        )
        cost += Cost(flops=judgement.flops, seconds=time.perf_counter() - began)
        if judgement.verdict:
            ctx.emit("note", {"text": f"relabel: {judgement.verdict}"})
        examples = encode(rows, start.tokenizer(), max_length=config.max_length)
        tokens = config.fit.batch_size * sum(len(e.ids) for e in examples) / len(examples)
        step = 6.0 * start.num_parameters * tokens
        read = math.ceil(judgement.flops / step)
        rest = cut_to(config, config.fit.steps - warm - read, self.name)
        relabelled, quality = relabel_words(rows, judgement, clear=self.clear)
        facts = {
            "spread": relabelling_quality(given, rows),
            "probe": {**quality, "threshold": judgement.threshold},
            "held_out": judgement.held_out,
            "verdict": judgement.verdict,
            "steps": {"features": warm, "reading": read, "training": rest.fit.steps},
        }
        then = self.then.model_copy(update={"pretrain": rest})
        removal = then.apply(start, with_labels(domain, relabelled), ctx)
        extras = {**removal.extras, "relabel": facts}
        return replace(removal, extras=extras, cost=removal.cost + cost)

    def _features(
        self, start: Checkpoint, rows: Rows, domain: Domain, warm: Pretrain, ctx: Context
    ) -> tuple[Tensor, Cost]:
        """Return what the probe sees, and what it cost."""
        tokenizer = start.tokenizer()
        if self.features == "tokens":
            examples = encode(rows, tokenizer, max_length=warm.max_length)
            return bag_of_tokens([e.ids for e in examples]), Cost()
        inner = ctx.child("features")
        if self.features == "hidden":
            trained = pretrain(start, rows, warm, inner, stage=f"{self.name}.features")
            model = trained.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
            hidden_ND = mean_hidden(model, tokenizer, rows, warm, self.block)
            return standardised(hidden_ND), trained.cost
        assert self.router is not None
        router = self.router.model_copy(update={"pretrain": warm, "labels": self.labels})
        routed = router.apply(start, domain, inner)
        rise_N1 = absorbed(start, routed, inner.work, tuple(domain.forget), rows, warm, ctx)
        return standardised(rise_N1), routed.cost


def with_labels(domain: Domain, rows: Rows) -> Domain:
    """Return the domain as one who believes the labels sees it; what is scored stays.

    Args:
        domain: Rows by role.
        rows: The whole corpus with its new labels, rows of a mix repeated and put into texts.
    """
    names = enumerate(domain.forget, start=1)
    return replace(
        domain,
        forget={name: tuple(row for row in rows if row.label == number) for number, name in names},
        retain=tuple(row for row in rows if row.label <= CORE),
        adjacent=(),
        unlabeled=(),
        mix_share=None,
        rows_per_text=1,
    )


def relabel(rows: Sequence[Row], judgement: Judgement, *, clear: float = 0.0) -> Rows:
    """Return the rows, those above the threshold labelled whole; labels that exist stay.

    Args:
        rows: Rows with the given labels.
        judgement: What the probe says of them.
        clear: Share of the threshold below which rows without a label are labelled core.
    """
    relabelled = []
    chances, labels = judgement.chance_N.tolist(), judgement.label_N.tolist()
    for row, chance, label in zip(rows, chances, labels, strict=True):
        if chance > judgement.threshold and forget_score(row) <= 0.5:
            row = labelled_whole(row, int(label))
        elif row.label == UNLABELED and chance < clear * judgement.threshold:
            row = labelled_whole(row, CORE)
        relabelled.append(row)
    return tuple(relabelled)


def relabelling_quality(
    rows: Sequence[Row], relabelled: Sequence[Row]
) -> dict[str, float | int | None]:
    """Return how good the relabelling is, judged by the truth, for the record.

    Args:
        rows: Rows with the given labels.
        relabelled: The same with their new labels.

    Returns:
        `precision`: share of the newly labelled rows that are forget; `recall`: share of the
        missed forget rows that were found (None where there are none); `labelled`: their number.
    """
    pairs = zip(rows, relabelled, strict=True)
    new = [row for row, now in pairs if now.label > CORE and forget_score(row) <= 0.5]
    missed = sum(1 for row in rows if row.capability and forget_score(row) <= 0.5)
    right = sum(1 for row in new if row.capability)
    return {
        "labelled": len(new),
        "precision": right / len(new) if new else None,
        "recall": right / missed if missed else None,
    }


@torch.no_grad()
def mean_hidden(
    model: Any, tokenizer: Any, rows: Sequence[Row], config: Pretrain, block: int | None
) -> Float[Tensor, "N D"]:
    """Return the mean of a block's output over the tokens of every row, on the CPU.

    Args:
        model: A causal model in evaluation mode.
        tokenizer: Its tokenizer.
        rows: The rows.
        config: Gives length and batch.
        block: Number of the block; None for the middle one.

    Raises:
        UserError: If there is no such block.
    """
    blocks = anatomy(model).blocks
    at = len(blocks) // 2 if block is None else block
    if not 0 <= at < len(blocks):
        raise UserError(f"relabel.block is {at}; the model has {len(blocks)} blocks, from 0")
    examples = encode(rows, tokenizer, max_length=config.max_length)
    means = []
    for i in range(0, len(examples), config.fit.batch_size):
        batch = collate(examples[i : i + config.fit.batch_size], pad_id=tokenizer.pad_token_id)
        batch = batch.to(model.device)
        with capture(model, [blocks[at]]) as outputs:
            model(**batch.inputs, use_cache=False)
        real_BT1 = batch.attention_BT[..., None]
        total_BD = (outputs[blocks[at]][0].float() * real_BT1).sum(dim=1)
        means.append((total_BD / real_BT1.sum(dim=1)).cpu())
    return torch.cat(means)


def absorbed(
    start: Checkpoint,
    routed: Removal,
    work: Path,
    names: Sequence[str],
    rows: Sequence[Row],
    config: Pretrain,
    ctx: Context,
) -> Float[Tensor, "N 1"]:
    """Return by how much the ablation raised the loss of every row, in nats per token.

    Args:
        start: What the routed method started from.
        routed: What it returned.
        work: The folder it worked in.
        names: Capabilities, whose modules are on before the ablation.
        rows: The rows.
        config: Gives length and batch.
        ctx: Device and dtype.

    Raises:
        UserError: If the method did not keep its model before the ablation.
    """
    file = routed.extras.get("files", {}).get("before_ablation")
    if file is None:
        raise UserError(
            "relabel.router keeps no model from before its ablation; name a routed method such as "
            "sgtm, gram or era"
        )
    tokenizer = start.tokenizer()
    losses = []
    for model in (serve(start, work / file, names), routed.checkpoint.load()):
        scores = measure(
            model.to(ctx.device, ctx.dtype),
            tokenizer,
            rows,
            "text_loss",
            max_length=config.max_length,
            batch_size=config.fit.batch_size,
        )
        losses.append(
            torch.tensor([value for _, value in scores.checked().items], dtype=torch.float64)
        )
    return (losses[1] - losses[0])[:, None]
