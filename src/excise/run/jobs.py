"""What one worker does: each job is a stage, so that nothing is computed twice.

Jobs are plain values that travel to worker processes; functions are at module level for the same
reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from excise.core.context import Context
from excise.core.errors import UserError
from excise.core.plugins import source_hash
from excise.core.stages import Store, library_versions
from excise.data.domain import Domain
from excise.evals.extra import extra_scores
from excise.evals.generate import continuations
from excise.evals.lm_eval_bridge import run_lm_eval
from excise.evals.score import evaluate
from excise.methods import Chain, Undo
from excise.methods.base import Cost, Method, Removal
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.files import hash_files
from excise.models.spec import Scratch
from excise.models.tiny import tiny_model
from excise.record import Item, Score, write_text
from excise.requests.recipe import EvalSpec
from excise.train.pool import emit


@dataclass(frozen=True)
class Setting:
    """What all jobs of a run share.

    Attributes:
        store: Folder of the stages.
        dtype: Compute dtype, `float32` or `bfloat16`.
        device: Device of the worker.
    """

    store: Path
    dtype: str = "float32"
    device: str = "cpu"

    def key(self, **parts: Any) -> dict[str, Any]:
        """Return a stage's key: its parts and everything that can change a number."""
        kind = torch.device(self.device).type
        return {
            **parts,
            "dtype": self.dtype,
            "device": kind,
            "world": 1,
            "libraries": library_versions(),
        }

    def context(self, work: Path, seed: int) -> Context:
        """Return the context of a stage that works in `work`."""
        return Context(
            work=work,
            seed=seed,
            device=torch.device(self.device),
            dtype=getattr(torch, self.dtype),
            emit=emit,
        )


@dataclass(frozen=True)
class InitJob:
    """Make a random model."""

    setting: Setting
    scratch: Scratch
    tokenizer: Any
    seed: int


def make_init(job: InitJob) -> Checkpoint:
    """Write a random model and its tokenizer; equal seeds give equal bytes."""
    key = job.setting.key(
        scratch=job.scratch.model_dump(mode="json"),
        tokenizer=job.tokenizer.backend_tokenizer.to_str(),
        seed=job.seed,
    )

    def make(work: Path) -> None:
        overrides: dict[str, Any] = dict(job.scratch.overrides)
        model = tiny_model(
            job.scratch.family,
            seed=job.seed,
            vocab=len(job.tokenizer),
            width=job.scratch.width,
            blocks=job.scratch.blocks,
            **overrides,
        )
        save_model(model, job.tokenizer, work / "model")

    return Checkpoint(Store(job.setting.store, emit).stage("init", key, make) / "model")


@dataclass(frozen=True)
class RemovalJob:
    """Apply a method."""

    setting: Setting
    method: Method
    start: Checkpoint
    domain: Domain
    seed: int


def make_removal(job: RemovalJob) -> Removal:
    """Apply a method, or read what it made before; links and teachers are stages of their own."""
    if isinstance(job.method, Chain):
        return _chain(job, job.method)
    key = job.setting.key(
        method=by_content(job.method.model_dump(mode="json")),
        version=type(job.method).version,
        code=_code(job.method),
        start=job.start.fingerprint,
        domain=job.domain.fingerprint,
        seed=job.seed,
    )
    name = str(getattr(job.method, "name", "method"))

    def make(work: Path) -> None:
        ctx = job.setting.context(work, job.seed)
        removal = _applied(job, ctx)
        if removal.checkpoint.path != work / "model":
            raise UserError(f"method '{name}' must write its model to ctx.work / 'model'")
        write_text(work / "removal.json", json.dumps(_plain(removal)))

    return read_removal(Store(job.setting.store, emit).stage(name, key, make))


def by_content(setting: Any) -> Any:
    """Return plain settings in which models and files stand by their bytes and not by their path.

    What lies at a path may change, and the same model may lie at another.
    """
    if isinstance(setting, Mapping):
        return {key: by_content(value) for key, value in setting.items()}
    if isinstance(setting, list | tuple):
        return [by_content(value) for value in setting]
    if not isinstance(setting, str) or os.sep not in setting:
        return setting
    with suppress(OSError):  # a long text is no path
        path = Path(setting).expanduser()
        if (path / "config.json").is_file():
            return f"model {Checkpoint(path).fingerprint}"
        if path.is_file():
            return f"file {hash_files([path])}"
    return setting


def _code(method: Method) -> str:
    """Return the hash of the user's code in a method and its teachers; empty where all is ours."""
    inner = method.makers().values() if isinstance(method, Undo) else ()
    own = source_hash(type(method)) if _foreign(method) else ""
    return ":".join(filter(None, (own, *map(_code, inner))))


def _foreign(method: Method) -> bool:
    return not type(method).__module__.startswith("excise.")


def _applied(job: RemovalJob, ctx: Context) -> Removal:
    """Apply a method; teachers are made in stages that other students share."""
    if not isinstance(job.method, Undo):
        return job.method.apply(job.start, job.domain, ctx)
    makers = job.method.needed_makers()
    made = {name: make_removal(replace(job, method=maker)) for name, maker in makers.items()}
    return job.method.distil(
        job.start,
        job.domain,
        ctx,
        made,
        caches=job.setting.store / "teacher-caches",
        pretrain_tokens=_pretrained(job),
    )


def _pretrained(job: RemovalJob) -> int:
    """Return the tokens the start was trained on, where a stage of this store made it; else 0."""
    stage = job.start.path.parent
    if stage.parent != job.setting.store or not (stage / "removal.json").is_file():
        return 0
    return read_removal(stage).cost.tokens


def _chain(job: RemovalJob, chain: Chain) -> Removal:
    start, cost, changed, links = job.start, Cost(), set[str](), []
    removal = None
    for link in chain.methods:
        removal = make_removal(replace(job, method=link, start=start))
        start, cost = removal.checkpoint, cost + removal.cost
        changed.update(removal.changed)
        links.append({"method": link.model_dump(mode="json"), "extras": dict(removal.extras)})
    assert removal is not None
    return Removal(start, tuple(sorted(changed)), cost, {"links": links}, removal.history)


def _plain(removal: Removal) -> dict[str, Any]:
    return {
        "changed": removal.changed,
        "cost": asdict(removal.cost),
        "extras": removal.extras,
        "history": removal.history,
    }


def read_removal(folder: Path) -> Removal:
    """Read the removal that a stage holds."""
    data = json.loads((folder / "removal.json").read_text(encoding="utf-8"))
    extras = data["extras"]
    if "files" in extras:
        extras["files"] = {k: str(folder / v) for k, v in extras["files"].items()}
    return Removal(
        Checkpoint(folder / "model"),
        tuple(data["changed"]),
        Cost(**data["cost"]),
        extras,
        tuple(data["history"]),
    )


@dataclass(frozen=True)
class ScoreJob:
    """Score one model and let it speak."""

    setting: Setting
    name: str
    checkpoint: Checkpoint
    domain: Domain
    evaluate: EvalSpec


@dataclass(frozen=True)
class Scored:
    """What `make_scores` returns: scores, items, and (set, prompt, expected, output) rows."""

    scores: tuple[Score, ...]
    items: tuple[Item, ...]
    samples: tuple[tuple[str, str, str, str], ...]


def make_scores(job: ScoreJob) -> Scored:
    """Score a model on every set of its domain, and let it continue a few prompts."""
    key = job.setting.key(
        model=job.checkpoint.fingerprint,
        tokenizer=job.checkpoint.tokenizer_fingerprint,
        domain=job.domain.fingerprint,
        evaluate=job.evaluate.model_dump(mode="json"),
        scores=3,
        code=[source_hash(type(extra)) for extra in job.evaluate.scores],
    )

    def make(work: Path) -> None:
        ctx = job.setting.context(work, 0)
        model = job.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
        tokenizer = job.checkpoint.tokenizer()
        scores, items = evaluate(
            model,
            tokenizer,
            job.domain,
            name="model",
            max_rows=job.evaluate.max_rows,
            max_length=job.evaluate.max_length,
        )
        asked = job.evaluate
        for extra in asked.scores:
            more, rows = extra_scores(
                model, tokenizer, job.domain, extra, max_length=asked.max_length
            )
            scores, items = [*scores, *more], [*items, *rows]
        if asked.lm_eval:
            scores += run_lm_eval(model, tokenizer, asked.lm_eval, asked.lm_eval_limit)
        samples = [] if job.domain.sensitive else _samples(model, tokenizer, job)
        data = {
            "scores": [s.model_dump(mode="json") for s in scores],
            "items": [i.model_dump(mode="json") for i in items],
            "samples": samples,
        }
        write_text(work / "scores.json", json.dumps(data))

    folder = Store(job.setting.store, emit).stage("scores", key, make)
    data = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    name = {"model": job.name}
    return Scored(
        tuple(Score.model_validate({**s, **name}) for s in data["scores"]),
        tuple(Item.model_validate({**i, **name}) for i in data["items"]),
        tuple(tuple(s) for s in data["samples"]),
    )


def _samples(model: Any, tokenizer: Any, job: ScoreJob) -> list[tuple[str, str, str, str]]:
    """Continue the first prompts of every scored set, one per unit."""
    sets: Mapping[str, Any] = {
        **{f"test.{name}": rows for name, rows in job.domain.test.items()},
        "retain_test": job.domain.retain_test,
    }
    out = []
    for name, rows in sets.items():
        seen: dict[str, Any] = {}
        for row in rows:
            seen.setdefault(row.unit, row)
        chosen = list(seen.values())[: job.evaluate.samples]
        for row, (prompt, expected, output) in zip(
            chosen, continuations(model, tokenizer, chosen), strict=True
        ):
            del row
            out.append((name, prompt, expected, output))
    return out
