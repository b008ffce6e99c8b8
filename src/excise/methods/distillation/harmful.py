"""Who says which token is harmful: the truth, a classifier of few labels, or the teacher itself.

Shape legend: B rows, T tokens, N texts or tokens, D residual width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from excise.core.config import Config
from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import CORE, Domain
from excise.data.labels import LabelNoise
from excise.data.stream import Example, collate, encode
from excise.data.subsample import subsample
from excise.methods.tuning import forget_rows
from excise.models.anatomy import backbone
from excise.models.hooks import capture


class TrueLabels(Config):
    """Every row says whether it is harmful, perhaps with mistakes."""

    name: Literal["true"] = "true"
    noise: LabelNoise | None = None
    """How the given labels differ from the truth; missing means they are right."""


class Classifier(Config):
    """A linear probe on the original's residual stream, taught few labelled rows."""

    name: Literal["classifier"] = "classifier"
    labels: int = Field(default=200, ge=2)
    """Labelled rows, half of them to forget and half to retain; fewer where there are fewer."""
    block: int = -1
    """Block whose output is read; -1 takes the middle one."""
    per: Literal["row", "token"] = "row"
    """Whether a text is judged whole, or every token by what stands before it."""
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """Probability from which on a text or token is harmful."""


class Implicit(Config):
    """Harmful is where unlearning moved the teacher: KL(unlearned || original) above `tau`."""

    name: Literal["implicit"] = "implicit"
    tau: float = Field(default=0.5, gt=0)
    """Nats."""


Judge = Annotated[TrueLabels | Classifier | Implicit, Field(discriminator="name")]
"""Whose labels decide."""


def classify(
    config: Classifier,
    model: Any,
    tokenizer: Any,
    domain: Domain,
    examples: Sequence[Example],
    ctx: Context,
    *,
    max_length: int,
) -> tuple[list[Example], int]:
    """Label examples with a probe on the original.

    Args:
        config: The classifier.
        model: The original.
        tokenizer: Its tokenizer.
        domain: Gives the labelled rows: forget and retain, which the method may see.
        examples: What is to be labelled.
        ctx: Gives the seed of the labelled rows.
        max_length: Tokens per labelled row.

    Returns:
        The examples with labels of the probe, 1 or `CORE`, and the number of tokens read.

    Raises:
        UserError: If there is no retain row, or no such block.
    """
    seed = ctx.seed_for("classifier")
    half = config.labels // 2
    sides = (
        subsample(domain.retain, half, by="content", seed=seed),
        subsample(forget_rows(domain), half, by="content", seed=seed),
    )
    if not sides[0]:
        raise UserError(
            f"a classifier needs retain rows as well, and domain '{domain.name}' has none"
        )
    blocks = backbone(model).blocks
    if not -1 <= config.block < len(blocks):
        raise UserError(
            f"classifier.block is {config.block}; the model has blocks 0 to {len(blocks) - 1}"
        )
    path = blocks[len(blocks) // 2 if config.block == -1 else config.block]
    taught = encode([row for side in sides for row in side], tokenizer, max_length=max_length)
    forget = torch.tensor([float(i >= len(sides[0])) for i in range(len(taught))])
    features = _features(model, path, taught, tokenizer.pad_token_id, ctx, config.per)
    given_N = torch.cat([forget[i].expand(len(f)) for i, f in enumerate(features)])
    probe = _logistic(torch.cat(features), given_N)
    judged = []
    reads = _features(model, path, examples, tokenizer.pad_token_id, ctx, config.per)
    for example, feature_ND in zip(examples, reads, strict=True):
        harmful_N = probe(feature_ND) >= config.threshold
        judged.append(replace(example, label=_labels(example, harmful_N, config.per)))
    return judged, sum(len(e.ids) for e in (*taught, *examples))


def _labels(
    example: Example, harmful_N: Bool[Tensor, " N"], per: Literal["row", "token"]
) -> int | tuple[int, ...]:
    """Return labels of one example; state t judges token t + 1, which it predicts."""
    values = [int(h) if h else CORE for h in harmful_N.tolist()]
    if per == "row":
        return values[0]
    return (values[0], *values[: len(example.ids) - 1])


@torch.no_grad()
def _features(
    model: Any,
    path: str,
    examples: Sequence[Example],
    pad_id: int,
    ctx: Context,
    per: Literal["row", "token"],
) -> list[Float[Tensor, "N D"]]:
    """Return one mean state per example, or one per token."""
    out: list[Tensor] = []
    for at in range(0, len(examples), 64):
        batch = collate(examples[at : at + 64], pad_id=pad_id).to(ctx.device)
        with capture(model, [path]) as captured:
            model(**batch.inputs, use_cache=False)
        states_BTD = captured[path][0].float().cpu()
        for state_TD, real_T in zip(states_BTD, batch.attention_BT.cpu(), strict=True):
            state_ND = state_TD[real_T]
            out.append(state_ND.mean(0, keepdim=True) if per == "row" else state_ND)
    return out


def _logistic(feature_ND: Float[Tensor, "N D"], given_N: Float[Tensor, " N"]) -> Any:
    """Fit a ridge logistic regression, both sides weighing the same; return its probability."""
    mean_D, scale_D = feature_ND.mean(0), feature_ND.std(0).clamp(min=1e-6)
    x_ND = ((feature_ND - mean_D) / scale_D).double()
    y_N = given_N.double()
    weight_N = torch.where(y_N > 0, 0.5 / y_N.mean(), 0.5 / (1 - y_N).mean())
    parameters = torch.zeros(x_ND.shape[1] + 1, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logit_N = x_ND @ parameters[:-1] + parameters[-1]
        loss = F.binary_cross_entropy_with_logits(logit_N, y_N, weight_N)
        loss = loss + 0.5 * parameters[:-1].square().sum() / len(y_N)
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = parameters.detach()

    def probability(other_ND: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        scaled = ((other_ND - mean_D) / scale_D).double()
        return torch.sigmoid(scaled @ fitted[:-1] + fitted[-1])

    return probability


def quality(examples: Sequence[Example], truth: Sequence[bool]) -> dict[str, float]:
    """Return how good the labels of scored tokens are, and how many are called harmful.

    Args:
        examples: Examples with the given labels.
        truth: Whether each example is harmful indeed.

    Returns:
        `harmful`, share of scored tokens called harmful; `recall`, share of harmful ones found;
        `false_alarms`, share of the others called harmful; the last two 0 where there is none.
    """
    called = {True: 0, False: 0}
    tokens = {True: 0, False: 0}
    for example, harmful in zip(examples, truth, strict=True):
        label = example.label
        labels = label if isinstance(label, tuple) else (label,) * len(example.ids)
        tokens[harmful] += sum(example.target)
        called[harmful] += sum(
            scored and label > CORE for scored, label in zip(example.target, labels, strict=True)
        )
    return {
        "harmful": sum(called.values()) / max(1, sum(tokens.values())),
        "recall": called[True] / max(1, tokens[True]),
        "false_alarms": called[False] / max(1, tokens[False]),
    }
