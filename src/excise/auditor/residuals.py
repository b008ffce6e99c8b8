"""The residual stream of a model on the rows of an audit, read once and kept for all who look.

Questions are read at the position that answers them, dev and benign texts at every position but
the first (whose norm is orders larger), thinned where they would not fit. Lens, probe, steering
and direction clearing read this; `benchmarks/audit.py` says what that saves.

Shape legend: B rows, T tokens, N positions, Q questions, L blocks, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from excise.auditor.batching import batches
from excise.auditor.budget import Budget
from excise.auditor.evaluation_set import EvaluationSet, evaluation_set
from excise.auditor.questions import Question, questions_of
from excise.core.context import Context, Stage
from excise.core.disk import write_text
from excise.core.errors import UserError
from excise.data.domain import Domain, Row
from excise.data.stream import Batch, Example, encode
from excise.data.subsample import subsample
from excise.losses import predicting
from excise.models.anatomy import backbone
from excise.models.checkpoint import Checkpoint
from excise.models.hooks import active_stream, capture

MAX_ENTRIES = 1 << 26
"""Numbers kept of one set of texts at most (256 MB in float32); questions are all kept."""

READ = ("max_test_rows", "max_other_rows", "max_length")
"""What of a budget decides which positions are read."""


@dataclass(frozen=True)
class Asked:
    """Questions and what the model held where it answers them.

    Attributes:
        questions: Q of them.
        hidden_QLD: Residual stream after every block, float32 on the CPU.
    """

    questions: tuple[Question, ...]
    hidden_QLD: Float[Tensor, "Q L D"]


@dataclass(frozen=True)
class Positions:
    """What the model held at positions of texts.

    Attributes:
        hidden_NLD: Residual stream after every block, float32 on the CPU.
        row_N: Which row each position belongs to.
        answering_N: Whether the next token is a scored one.
    """

    hidden_NLD: Float[Tensor, "N L D"]
    row_N: Int[Tensor, " N"]
    answering_N: Bool[Tensor, " N"]


@dataclass(frozen=True)
class Residuals:
    """What `ReadResiduals` keeps.

    Attributes:
        asked: Questions of `test` (V), `dev` (`dev_forget`), `relearn` (T) and `benign`.
        texts: Positions of `dev` (`dev_forget`), `retain` (`dev_retain`), `relearn` and `benign`.
    """

    asked: Mapping[str, Asked]
    texts: Mapping[str, Positions]


@dataclass(frozen=True)
class ReadResiduals(Stage[Residuals]):
    """One pass over the rows of an audit.

    Attributes:
        checkpoint: The model.
        domain: Rows by role.
        budget: Rows and lengths, as `reading_budget` gives it.
        seed: Seed of the audit: which candidates are drawn.
    """

    version: ClassVar[int] = 1

    checkpoint: Checkpoint
    domain: Domain
    budget: Budget
    seed: int

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "residuals"

    def make(self, ctx: Context) -> None:
        """Read the model and write what it held."""
        model = self.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
        evaluation = evaluation_set(self.domain, self.budget, self.checkpoint.tokenizer())
        residuals = read_residuals(model, evaluation, ctx)
        tensors = {f"asked.{role}": part.hidden_QLD for role, part in residuals.asked.items()}
        for role, part in residuals.texts.items():
            tensors |= {f"texts.{role}.{name}": getattr(part, name) for name in _FIELDS}
        save_file({k: t.contiguous() for k, t in tensors.items()}, ctx.work / "hidden.safetensors")
        questions = {r: [asdict(q) for q in part.questions] for r, part in residuals.asked.items()}
        write_text(ctx.work / "questions.json", json.dumps(questions) + "\n")

    def read(self, folder: Path) -> Residuals:
        """Return what the model held."""
        tensors = load_file(folder / "hidden.safetensors")
        kept = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
        texts = {name.split(".")[1] for name in tensors if name.startswith("texts.")}
        return Residuals(
            {r: Asked(tuple(map(_question, qs)), tensors[f"asked.{r}"]) for r, qs in kept.items()},
            {r: Positions(*(tensors[f"texts.{r}.{n}"] for n in _FIELDS)) for r in sorted(texts)},
        )


_FIELDS = ("hidden_NLD", "row_N", "answering_N")
"""Tensors of `Positions`, in order."""


def _question(data: Mapping[str, Any]) -> Question:
    """Return a question from JSON, which knows no tuples."""
    return Question(data["unit"], tuple(data["ids"]), tuple(data["tokens"]), data["right"])


def residuals_of(checkpoint: Checkpoint, domain: Domain, budget: Budget, ctx: Context) -> Residuals:
    """Return what a model holds on the rows of an audit, read once for all attacks.

    Args:
        checkpoint: The model.
        domain: Rows by role.
        budget: Rows and lengths.
        ctx: Where stages are kept, seed.
    """
    return ctx.run(ReadResiduals(checkpoint, domain, reading_budget(budget), ctx.seed))


def reading_budget(budget: Budget) -> Budget:
    """Return a budget without what does not concern the rows, so that equal passes are one."""
    return budget.without([name for name in type(budget).model_fields if name not in READ])


@torch.no_grad()
def read_residuals(model: Any, evaluation: EvaluationSet, ctx: Context) -> Residuals:
    """Read every set of rows once.

    Args:
        model: A causal model.
        evaluation: Rows, tokenizer and lengths.
        ctx: Seed of the candidates that are drawn.

    Returns:
        Questions of roles whose rows can be asked, positions of roles that have rows.
    """
    domain, other = evaluation.domain, evaluation.budget.max_other_rows
    benign = subsample(domain.benign, other, by="row")
    asked: dict[str, Mapping[str, Sequence[Row]]] = {
        "test": evaluation.test,
        "dev": evaluation.dev,
        "relearn": {
            name: subsample(rows, other, by="row") for name, rows in domain.relearn.items()
        },
        "benign": {"benign": benign},
    }
    texts: dict[str, Sequence[Row]] = {
        "dev": evaluation.all_dev,
        "retain": domain.dev_retain,
        "relearn": evaluation.trained,
        "benign": benign,
    }
    return Residuals(
        {role: _ask(model, evaluation, role, rows, ctx) for role, rows in asked.items()},
        {role: read_positions(model, evaluation, rows) for role, rows in texts.items() if rows},
    )


def _ask(
    model: Any,
    evaluation: EvaluationSet,
    role: str,
    rows: Mapping[str, Sequence[Row]],
    ctx: Context,
) -> Asked:
    """Read questions at their last position."""
    questions = questions_of(
        rows,
        evaluation.tokenizer,
        max_length=evaluation.max_length,
        generator=ctx.generator(f"residuals/{role}"),
    )
    examples = [Example(q.ids, (False,) * len(q.ids), 0, q.unit) for q in questions]
    hidden_QLD, row_Q, _ = _read(model, examples, evaluation.tokenizer, _last)
    return Asked(tuple(questions), hidden_QLD[row_Q.argsort()])


def _last(batch: Batch) -> Bool[Tensor, "B T"]:
    """Return the last real position of every row."""
    mask_BT = torch.zeros_like(batch.attention_BT)
    at_B = (batch.attention_BT * torch.arange(mask_BT.shape[1], device=mask_BT.device)).argmax(1)
    mask_BT[torch.arange(len(at_B), device=mask_BT.device), at_B] = True
    return mask_BT


def read_positions(model: Any, evaluation: EvaluationSet, rows: Sequence[Row]) -> Positions:
    """Read rows at every position but the first.

    Args:
        model: A causal model.
        evaluation: Tokenizer and lengths.
        rows: At least one row.

    Returns:
        All positions, or evenly spaced ones where all would take more than `MAX_ENTRIES`.
    """
    examples = encode(rows, evaluation.tokenizer, max_length=evaluation.max_length)
    return Positions(*_read(model, examples, evaluation.tokenizer, _after_first))


def _after_first(batch: Batch) -> Bool[Tensor, "B T"]:
    """Return every real position but the first."""
    mask_BT = batch.attention_BT.clone()
    mask_BT[:, 0] = False
    return mask_BT


@torch.no_grad()
def _read(
    model: Any,
    examples: Sequence[Example],
    tokenizer: Any,
    wanted: Callable[[Batch], Bool[Tensor, "B T"]],
) -> tuple[Float[Tensor, "N L D"], Int[Tensor, " N"], Bool[Tensor, " N"]]:
    """Return the residual stream at wanted positions, their rows, and whether they answer.

    Raises:
        UserError: If the stream is not finite.
    """
    parts = backbone(model)
    most = max(1, MAX_ENTRIES // (parts.num_blocks * parts.d_model))
    # Of questions every one is scored.
    tokens = 0 if wanted is _last else sum(len(e.ids) - 1 for e in examples)
    stride, seen = -(-tokens // most) or 1, 0
    numbered = [replace(example, unit=str(i)) for i, example in enumerate(examples)]
    hidden: list[Tensor] = [torch.zeros(0, parts.num_blocks, parts.d_model)]
    row, answering = [torch.zeros(0).long()], [torch.zeros(0).bool()]
    for batch in batches(numbered, model, tokenizer):
        with capture(model, parts.blocks) as got:
            model(**batch.inputs, use_cache=False)
        at_N = wanted(batch).flatten().nonzero()[:, 0]
        offset, seen = -seen % stride, seen + len(at_N)
        at_N = at_N[offset::stride]
        streams = [active_stream(got[path][0]).flatten(0, 1)[at_N] for path in parts.blocks]
        hidden.append(torch.stack(streams, 1).float().cpu())
        row.append(torch.tensor([int(u) for u in batch.units])[at_N.cpu() // batch.ids_BT.shape[1]])
        answering.append(predicting(batch.target_BT).flatten()[at_N].cpu())
    hidden_NLD = torch.cat(hidden)
    if not bool(hidden_NLD.isfinite().all()):
        raise UserError(
            "the model's residual stream is not finite on the rows of the audit; its weights are "
            "broken, or try --dtype float32"
        )
    return hidden_NLD, torch.cat(row), torch.cat(answering)
