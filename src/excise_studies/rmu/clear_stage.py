"""Stages of clearing: fit on one draw, clear, score; clear and relearn.

Shape legend: L blocks, D width, K dimensions.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excise.auditor.attacks.direction import first_edited
from excise.auditor.base import Budget, Subject
from excise.auditor.batching import Memo
from excise.auditor.scoring import evaluation_set
from excise.auditor.tuning import Part, train
from excise.core.errors import UserError
from excise.core.stages import Store
from excise.data.domain import Domain, Rows
from excise.data.subsample import subsample
from excise.domains.prose import load_prose
from excise.models.checkpoint import Checkpoint
from excise.models.hooks import edit
from excise.record import write_text
from excise.run.jobs import Setting
from excise.train.pool import emit
from excise_studies.rmu.clearing import Clearing, Material, fit_all, states
from excise_studies.rmu.weights import clear_weights, writers
from excise_studies.scoring import Rubric, read, rubric

VERSION = 2
"""Raised when what a stage computes changes."""

BARE = "not cleared"
"""Name of the arm without clearing."""


@dataclass(frozen=True)
class Plan:
    """How much is fitted and scored.

    Attributes:
        dims: Sizes of the subspaces.
        randoms: Random directions.
        only: Arms to score; empty for all.
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
        """Return whether an arm is scored."""
        return not self.only or any(part in name for part in self.only)


@dataclass(frozen=True)
class ClearJob:
    """Clear one edited model, and its original in the same way."""

    setting: Setting
    domain: Domain
    original: Checkpoint
    edited: Checkpoint
    plan: Plan
    seed: int
    part: int = 0
    parts: int = 1

    def key(self) -> dict[str, Any]:
        """Return the key of the stage."""
        plan = self.plan
        return self.setting.key(
            version=VERSION,
            domain=self.domain.fingerprint,
            original=self.original.fingerprint,
            edited=self.edited.fingerprint,
            plan=[*plan.dims, plan.randoms, plan.only, plan.max_rows, plan.max_length,
                  plan.fit_tokens, plan.generic],
            seed=self.seed,
            part=[self.part, self.parts],
        )  # fmt: skip


def make_clear(job: ClearJob) -> dict[str, Any]:
    """Return scores by arm, `{arm: {facts, edited, original}}`, and the residual by block.

    Every arm is written as it is done, so that a killed stage goes on with the next one.
    """

    def make(work: Path) -> None:
        (work / "arms").mkdir(exist_ok=True)
        both = _Both(job)
        for number, (name, facts, models) in enumerate(both.arms()):
            file = work / "arms" / f"{number}.json"
            if file.is_file() or not job.plan.wants(name) or number % job.parts != job.part:
                continue
            emit("note", {"text": f"draw {job.seed}: {name}"})
            scored = {"name": name, "facts": dict(facts), **both.score(models)}
            write_text(file, json.dumps(scored))
        write_text(work / "residual.json", json.dumps(both.residual()))

    folder = Store(job.setting.store, emit).stage("clearing", job.key(), make)
    files = sorted((folder / "arms").iterdir(), key=lambda f: int(f.stem))
    arms = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    residual = json.loads((folder / "residual.json").read_text(encoding="utf-8"))
    return {"arms": {arm.pop("name"): arm for arm in arms}, "residual": residual}


Pair = tuple[Any, Clearing | None]
"""A model and what is cleared in it."""


class _Both:
    """The edited model and its original, loaded, with every clearing fitted."""

    def __init__(self, job: ClearJob) -> None:
        self.material, self.made, self.models, self.tokenizer = fitted(job)
        self.rubric: Rubric = rubric(
            job.domain, self.tokenizer, max_rows=job.plan.max_rows, max_length=job.plan.max_length
        )

    def arms(self) -> Iterator[tuple[str, Mapping[str, Any], dict[str, Pair]]]:
        """Yield name, facts and how each of both models is cleared."""
        yield BARE, {"control": False}, {side: (m, None) for side, m in self.models.items()}
        for one in self.made:
            yield one.name, as_plain(one), {side: (m, one) for side, m in self.models.items()}
        for one in self.made:
            basis_DK = in_weights(one)
            if basis_DK is not None and _can_be_written(self.models["edited"]):
                name = f"{one.name}, in the weights"
                yield name, as_plain(one), self._written(basis_DK)

    def _written(self, basis_DK: Tensor) -> dict[str, Pair]:
        """Return copies of both models whose weights do not write a basis."""
        out: dict[str, Pair] = {}
        for side, model in self.models.items():
            copied = copy.deepcopy(model)
            clear_weights(copied, basis_DK)
            out[side] = (copied, None)
        return out

    def score(self, pairs: Mapping[str, Pair]) -> dict[str, Any]:
        """Score both models."""
        out = {}
        for side, (model, one) in pairs.items():
            with edit(model, one.edits(model)) if one is not None else nullcontext():
                out[side] = read(model, self.tokenizer, self.rubric)
        return out

    def residual(self) -> list[dict[str, float]]:
        """Return by block: norms per token, and how alike the changes of forget tokens are."""
        m, rows = self.material, []
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


def in_weights(one: Clearing) -> Tensor | None:
    """Return the basis of a clearing that can be written into weights, or None.

    It must be a plain projection, the same at every block.
    """
    same = bool(torch.equal(one.write_LDK, one.write_LDK[:1].expand_as(one.write_LDK)))
    plain = bool(torch.equal(one.write_LDK, one.read_LDK)) and not bool(one.centre_LD.any())
    fits = not one.control and not one.spare and same and plain and "per block" not in one.name
    return one.write_LDK[0] if fits else None


def fitted(job: ClearJob) -> tuple[Material, list[Clearing], dict[str, Any], Any]:
    """Fit every clearing of a draw.

    Args:
        job: The models and the data.

    Returns:
        What they are fitted on, the clearings, both models, and their tokenizer.
    """
    ctx = job.setting.context(job.setting.store, job.seed)
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
    material = Material(
        forget_LND=of("edited", dev),
        before_LND=of("original", dev),
        retain_LND=of("edited", domain.dev_retain),
        calm_LND=of("original", domain.dev_retain),
        generic_LND=of("edited", subsample(generic, count or len(dev))),
        first=first_edited(models["edited"], models["original"]) or 0,
    )
    made = fit_all(material, plan.dims, plan.randoms, ctx.generator("clearing"))
    return material, made, models, tokenizer


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
class RelearnJob:
    """Fine-tune one model on T, cleared or not, and score V."""

    setting: Setting
    name: str
    model: Checkpoint
    domain: Domain
    budget: Budget
    lr: float
    seed: int
    clearing: Clearing | None = None


def make_relearn(job: RelearnJob) -> dict[str, Any]:
    """Return scores by unit before and after: `V`, `retain`, and the mean `dev_loss` at the end."""
    one = job.clearing
    parts = [] if one is None else [one.write_LDK, one.read_LDK, one.centre_LD]
    digest = hashlib.sha256(b"".join(t.float().contiguous().numpy().tobytes() for t in parts))
    key = job.setting.key(
        version=VERSION,
        model=job.model.fingerprint,
        domain=job.domain.fingerprint,
        budget=job.budget.model_dump(mode="json"),
        clearing=digest.hexdigest() if one is not None else "",
        first=one.first if one is not None else 0,
        spare=one is not None and one.spare,
        lr=job.lr,
        seed=job.seed,
    )

    def make(work: Path) -> None:
        start = Cleared(job.model.path, tokenizer_path=job.model.tokenizer_path, clearing=one)
        evaluation = evaluation_set(job.domain, job.budget, start.tokenizer())
        rows = tuple(row for rows in job.domain.relearn.values() for row in rows)
        done = train(
            Part("full", job.lr, job.seed),
            Subject(job.name, start),
            evaluation,
            job.setting.context(work, job.seed),
            rows=rows,
            benign_share=0.5,
        )
        first, last = done.measurements[0], done.measurements[-1]
        found = {
            "V": [first.units, last.units],
            "retain": [first.retain, last.retain],
            "dev_loss": done.extras["dev_loss"],
            "reason": done.reason,
        }
        write_text(work / "relearn.json", json.dumps(found))

    folder = Store(job.setting.store, emit).stage("clear-relearn", key, make)
    data: dict[str, Any] = json.loads((folder / "relearn.json").read_text(encoding="utf-8"))
    return data
