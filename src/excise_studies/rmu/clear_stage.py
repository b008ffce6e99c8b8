"""Stages of clearing: fit on one seed, clear, score; clear and relearn.

Shape legend: L blocks, D width, K dimensions.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from excise.auditor.attacks.direction import first_edited
from excise.auditor.base import Subject
from excise.auditor.batching import Memo
from excise.auditor.budget import Budget
from excise.auditor.evaluation_set import evaluation_set
from excise.auditor.tuning import Training, relearn_rows, train
from excise.core.context import Context, Stage
from excise.core.disk import write_text
from excise.core.errors import UserError
from excise.data.domain import Domain, Rows
from excise.data.subsample import subsample
from excise.domains.prose import load_prose
from excise.models.checkpoint import Checkpoint
from excise.models.hooks import edit
from excise_studies.rmu.clearing import (
    Clearing,
    FittingActivations,
    clear_weights,
    fit_all,
    states,
    writers,
)
from excise_studies.rmu.scoring import Rubric, read, rubric

BARE = "not cleared"
"""Name of the condition without clearing."""


@dataclass(frozen=True)
class ClearingPlan:
    """How much is fitted and scored.

    Attributes:
        dims: Sizes of the subspaces.
        randoms: Random directions.
        only: Conditions to score; empty for all.
        max_rows: Rows of each scored set at most; 0 for all.
        max_length: Tokens per row.
        fit_tokens: Tokens that estimators are fitted on, at most.
        generic: What generic text is: the harmless rows of the domain, or shipped English.
    """

    dims: tuple[int, ...]
    randoms: int
    only: tuple[str, ...] = ()
    max_rows: int = 0
    max_length: int = 128
    fit_tokens: int = 1024
    generic: str = "benign"

    def wants(self, name: str) -> bool:
        """Return whether a condition is scored."""
        return not self.only or any(part in name for part in self.only)


@dataclass(frozen=True)
class ClearModels(Stage[dict[str, Any]]):
    """One edited model, and its original in the same way, cleared in every way and scored.

    Attributes:
        domain: Rows by role.
        original: The model before removal.
        edited: The model after.
        plan: What is tried.
        seed: Seed of random directions.
        part: Which of the ways are scored here.
        parts: Into how many parts they are cut.
    """

    version: ClassVar[int] = 2

    domain: Domain
    original: Checkpoint
    edited: Checkpoint
    plan: ClearingPlan
    seed: int
    part: int = 0
    parts: int = 1

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "clearing"

    def make(self, ctx: Context) -> None:
        """Write every condition as it is done, so that a killed stage resumes with the next one."""
        (ctx.work / "arms").mkdir(exist_ok=True)
        both = _Both(self, ctx)
        for number, (name, facts, models) in enumerate(both.conditions()):
            file = ctx.work / "arms" / f"{number}.json"
            if file.is_file() or not self.plan.wants(name) or number % self.parts != self.part:
                continue
            ctx.emit("note", {"text": f"seed {self.seed}: {name}"})
            scored = {"name": name, "facts": dict(facts), **both.score(models)}
            write_text(file, json.dumps(scored))
        write_text(ctx.work / "residual.json", json.dumps(both.residual()))

    def read(self, folder: Path) -> dict[str, Any]:
        """Return scores by condition (facts, edited, original), and the residual by block."""
        files = sorted((folder / "arms").iterdir(), key=lambda f: int(f.stem))
        conditions = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        residual = json.loads((folder / "residual.json").read_text(encoding="utf-8"))
        return {
            "arms": {condition.pop("name"): condition for condition in conditions},
            "residual": residual,
        }


ClearedModel = tuple[Any, Clearing | None]
"""A model and what is cleared in it."""


class _Both:
    """The edited model and its original, loaded, with every clearing fitted."""

    def __init__(self, job: ClearModels, ctx: Context) -> None:
        self.activations, self.clearings, self.models, self.tokenizer = fitted(job, ctx)
        self.rubric: Rubric = rubric(
            job.domain, self.tokenizer, max_rows=job.plan.max_rows, max_length=job.plan.max_length
        )

    def conditions(self) -> Iterator[tuple[str, Mapping[str, Any], dict[str, ClearedModel]]]:
        """Yield name, facts and how each of both models is cleared."""
        yield BARE, {"control": False}, {side: (m, None) for side, m in self.models.items()}
        for clearing in self.clearings:
            yield (
                clearing.name,
                as_plain(clearing),
                {side: (m, clearing) for side, m in self.models.items()},
            )
        for clearing in self.clearings:
            basis_DK = in_weights(clearing)
            if basis_DK is not None and _can_be_written(self.models["edited"]):
                name = f"{clearing.name}, in the weights"
                yield name, as_plain(clearing), self._written(basis_DK)

    def _written(self, basis_DK: Tensor) -> dict[str, ClearedModel]:
        """Return copies of both models whose weights do not write a basis."""
        out: dict[str, ClearedModel] = {}
        for side, model in self.models.items():
            copied = copy.deepcopy(model)
            clear_weights(copied, basis_DK)
            out[side] = (copied, None)
        return out

    def score(self, pairs: Mapping[str, ClearedModel]) -> dict[str, Any]:
        """Score both models."""
        out = {}
        for side, (model, clearing) in pairs.items():
            with edit(model, clearing.edits(model)) if clearing is not None else nullcontext():
                out[side] = read(model, self.tokenizer, self.rubric)
        return out

    def residual(self) -> list[dict[str, float]]:
        """Return by block: norms per token, and how alike the changes of forget tokens are."""
        m, rows = self.activations, []
        for i in range(len(m.forget_LND)):
            change_ND = m.forget_LND[i] - m.before_LND[i]
            mean_D = change_ND.mean(0)
            along_N = change_ND @ (mean_D / mean_D.norm().clamp(min=1e-12))
            size_N = change_ND.norm(dim=-1).clamp(min=1e-12)
            rows.append(
                {
                    "norm, forget, original": float(m.before_LND[i].norm(dim=-1).mean()),
                    "norm, forget, edited": float(m.forget_LND[i].norm(dim=-1).mean()),
                    "norm, retain, original": float(m.calm_LND[i].norm(dim=-1).mean()),
                    "norm, retain, edited": float(m.retain_LND[i].norm(dim=-1).mean()),
                    "cosine of change with its mean": float((along_N / size_N).mean()),
                    "share of change along its mean": float(
                        along_N.square().sum() / size_N.square().sum()
                    ),
                }
            )
        return rows


def as_plain(clearing: Clearing) -> Mapping[str, Any]:
    """Return what the record keeps of a clearing."""
    return {
        "estimator": clearing.estimator,
        "dims": clearing.dims,
        "first_block": clearing.first,
        "control": clearing.control,
        "needs_original": clearing.needs_original,
        "spare": clearing.spare,
    }


def _can_be_written(model: Any) -> bool:
    """Return whether the clearing can be written into the weights of this architecture."""
    try:
        return bool(writers(model))
    except UserError:
        return False


def in_weights(clearing: Clearing) -> Tensor | None:
    """Return the basis of a clearing that can be written into weights, or None.

    It must be a plain projection, the same at every block.
    """
    same = bool(
        torch.equal(clearing.write_LDK, clearing.write_LDK[:1].expand_as(clearing.write_LDK))
    )
    plain = bool(torch.equal(clearing.write_LDK, clearing.read_LDK)) and not bool(
        clearing.centre_LD.any()
    )
    fits = (
        not clearing.control
        and not clearing.spare
        and same
        and plain
        and "per block" not in clearing.name
    )
    return clearing.write_LDK[0] if fits else None


def fitted(
    job: ClearModels, ctx: Context
) -> tuple[FittingActivations, list[Clearing], dict[str, Any], Any]:
    """Fit every clearing of a seed.

    Args:
        job: The models and the data.
        ctx: Seed, device, dtype.

    Returns:
        What they are fitted on, the clearings, both models, and their tokenizer.
    """
    models = {
        "edited": job.edited.load(dtype=ctx.dtype, device=ctx.device),
        "original": job.original.load(dtype=ctx.dtype, device=ctx.device),
    }
    tokenizer = Memo(job.edited.tokenizer())
    plan, domain = job.plan, job.domain
    dev = tuple(row for rows in domain.dev_forget.values() for row in rows)
    limits = {"max_length": plan.max_length, "limit": plan.fit_tokens}
    count = 4 * plan.max_rows

    def of(side: str, rows: Rows) -> Tensor:
        return states(models[side], tokenizer, subsample(rows, count), **limits)

    generic = domain.benign if plan.generic == "benign" else load_prose("dev")
    activations = FittingActivations(
        forget_LND=of("edited", dev),
        before_LND=of("original", dev),
        retain_LND=of("edited", domain.dev_retain),
        calm_LND=of("original", domain.dev_retain),
        generic_LND=of("edited", subsample(generic, count or len(dev))),
        first=first_edited(models["edited"], models["original"]) or 0,
    )
    clearings = fit_all(activations, plan.dims, plan.randoms, ctx.generator("clearing"))
    return activations, clearings, models, tokenizer


@dataclass(frozen=True)
class Cleared(Checkpoint):
    """A checkpoint whose model is cleared wherever it is loaded, also while it is trained.

    Attributes:
        clearing: What is cleared; None for nothing.
    """

    clearing: Clearing | None = None

    def load(self, **options: Any) -> Any:
        """Load the model with its hooks on; see `Checkpoint.load`."""
        model = super().load(**options)
        if self.clearing is not None:
            hooks = edit(model, self.clearing.edits(model))
            hooks.__enter__()
            model.cleared_by = hooks  # they live as long as the model does
        return model


@dataclass(frozen=True)
class RelearnCleared(Stage[dict[str, Any]]):
    """One model fine-tuned on the relearn set, cleared or not, and scored on the held-out test set.

    Attributes:
        model: The model.
        domain: Rows by role.
        budget: Steps and scores; of its rates `lr` is taken.
        lr: Learning rate.
        seed: Seed of the order of rows.
        clearing: What is cleared wherever the model is loaded; None for nothing.
    """

    version: ClassVar[int] = 2

    model: Checkpoint
    domain: Domain
    budget: Budget
    lr: float
    seed: int
    clearing: Clearing | None = None

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "clear-relearn"

    def make(self, ctx: Context) -> None:
        """Write scores by unit before and after: `V`, `retain`, and the mean `dev_loss`."""
        start = Cleared(
            self.model.path, tokenizer_path=self.model.tokenizer_path, clearing=self.clearing
        )
        training_run = train(
            Training("full", self.lr, self.seed),
            Subject("candidate", start),
            evaluation_set(self.domain, self.budget, start.tokenizer()),
            ctx,
            rows=relearn_rows(self.domain),
            benign_share=0.5,
        )
        first, last = training_run.measurements[0], training_run.measurements[-1]
        scores = {
            "V": [first.units, last.units],
            "retain": [first.retain, last.retain],
            "dev_loss": training_run.extras["dev_loss"],
            "reason": training_run.reason,
        }
        write_text(ctx.work / "relearn.json", json.dumps(scores))

    def read(self, folder: Path) -> dict[str, Any]:
        """Return what was written."""
        data: dict[str, Any] = json.loads((folder / "relearn.json").read_text(encoding="utf-8"))
        return data
