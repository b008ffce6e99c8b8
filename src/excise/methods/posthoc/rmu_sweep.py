"""Several settings of RMU in one run: frozen blocks are run once for all of them.

The rule of choice: of the settings whose loss on `dev` retain text rises by at most the budget
over the original's, the one with the highest loss on `dev` forget text; where there is none, the
one that raises the retain loss least, and the record says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, field_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from excise.core.config import Config
from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.methods.base import Cost, Removal

if TYPE_CHECKING:
    from excise.methods.posthoc.rmu import RMU

RULE = (
    "highest dev_forget loss among settings whose dev_retain loss is at most retain_budget above "
    "the original's; if there is none, lowest dev_retain loss"
)


class RMUSweep(Config):
    """Settings to try; an empty one stays as the method has it."""

    layer: tuple[int, ...] = ()
    """Blocks whose output is steered."""
    steering: tuple[float, ...] = ()
    """Norms of the control vector."""
    alpha: tuple[float, ...] = ()
    """Weights of the retain term."""
    retain_budget: float = Field(default=0.05, ge=0)
    """Nats per token by which the loss on `dev` retain text may rise."""
    rows: int = Field(default=64, ge=1)
    """Rows of `dev` scored per role and topic at most."""

    @field_validator("layer", "steering", "alpha", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Take `5,6,7` and a single number, as they come from a command line."""
        if isinstance(value, str):
            return tuple(part for part in value.replace(",", " ").split())
        return (value,) if isinstance(value, int | float) else value

    def points(self, method: RMU) -> list[RMU]:
        """Return a method for every setting, lower layers first.

        Raises:
            UserError: If the trained blocks are fixed while the layer changes.
        """
        if len(self.layer) > 1 and (method.blocks or method.modules):
            raise UserError(
                "rmu: sweep.layer moves the steered block and 'blocks' or 'modules' fix what is "
                "trained; leave those out"
            )
        grid = itertools.product(
            sorted(set(self.layer)) or [method.layer],
            self.steering or [method.steering],
            self.alpha or [method.alpha],
        )
        fixed: dict[str, Any] = {"sweep": None, "engine": "cached"}
        return [
            method.model_copy(update={"layer": at, "steering": c, "alpha": a, **fixed})
            for at, c, a in grid
        ]


@dataclass
class Tried:
    """One setting and what came of it.

    Attributes:
        method: The setting.
        forget: Loss on `dev` forget text, nats per token.
        retain: Loss on `dev` retain text.
        changed: Trained tensors by name.
        controls: Control vectors.
        facts: What the record keeps of the run.
        history: Its log.
        cost: What it took.
    """

    method: RMU
    forget: float
    retain: float
    changed: Mapping[str, Tensor]
    controls: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]
    cost: Cost


def better(new: Tried, old: Tried | None, limit: float) -> bool:
    """Return whether `new` is to be preferred, `limit` being the highest retain loss allowed."""
    if old is None:
        return True
    fits = new.retain <= limit
    if fits != (old.retain <= limit):
        return fits
    return new.forget > old.forget if fits else new.retain < old.retain


def dev_losses(
    model: nn.Module, tokenizer: Any, domain: Domain, rows: int, max_length: int
) -> tuple[float, float]:
    """Return mean losses (nats per token) on `dev` forget and retain rows; topics count alike."""
    from excise.evals.score import measure

    def score(part: Sequence[Any]) -> float:
        return measure(
            model, tokenizer, part[:rows], "text_loss", max_length=max_length, batch_size=16
        ).mean

    topics = [score(part) for part in domain.dev_forget.values() if part]
    return sum(topics) / len(topics), score(domain.dev_retain)


def run(method: RMU, start: Any, domain: Domain, ctx: Context) -> Removal:
    """Try every setting, keep the best and write it.

    Raises:
        UserError: If `dev` is empty, or a setting does not fit the model.
    """
    from excise.methods.posthoc.rmu_cache import PrefixCache
    from excise.methods.posthoc.rmu_run import places_of

    sweep = method.sweep
    assert sweep is not None, "a sweep was asked for"
    if not domain.dev_retain or not any(domain.dev_forget.values()):
        raise UserError(f"domain '{domain.name}' has no dev rows for rmu's sweep to choose on")
    points = sweep.points(method)
    every = [places_of(point, start) for point in points]
    model = start.load(dtype=ctx.dtype, device=ctx.device)
    tokenizer = start.tokenizer()
    cache = PrefixCache(int(method.cache_gib * 2**30))
    upto = max(places.layer for places in every) + 1
    before = dev_losses(model, tokenizer, domain, sweep.rows, method.max_length)
    limit = before[1] + sweep.retain_budget
    best: Tried | None = None
    table: list[dict[str, Any]] = []
    cost = Cost()
    for number, (point, places) in enumerate(zip(points, every, strict=True)):
        one = _Point(point, places, number, len(points), cache, upto)
        tried = one.run(start, model, tokenizer, domain, ctx, sweep.rows)
        cost += tried.cost
        row = {
            "layer": point.layer, "steering": point.steering, "alpha": point.alpha,
            "dev_forget": tried.forget, "dev_retain": tried.retain,
            "within_budget": tried.retain <= limit, "share_moved": tried.facts["share_moved"],
            "flops": tried.cost.flops, "seconds": tried.cost.seconds,
        }  # fmt: skip
        table.append(row)
        ctx.emit("note", {"text": _said(row, number, len(points))})
        if better(tried, best, limit):
            best = tried
    assert best is not None
    found = {
        "rule": RULE,
        "retain_budget": sweep.retain_budget,
        "original": {"dev_forget": before[0], "dev_retain": before[1]},
        "chosen": {k: getattr(best.method, k) for k in ("layer", "steering", "alpha")},
        "within_budget": best.retain <= limit,
        "table": table,
        "cache": {"bytes": cache.num_bytes, "hits": cache.hits, "misses": cache.misses},
    }
    return _write(best, start, cost, found, method, ctx)


def _said(row: Mapping[str, Any], number: int, count: int) -> str:
    """Return one row of the table for people."""
    return (
        f"rmu {number + 1}/{count}: layer {row['layer']}, steering {row['steering']}, alpha "
        f"{row['alpha']}: dev forget {row['dev_forget']:.3f}, retain {row['dev_retain']:.3f}"
        + ("" if row["within_budget"] else " (beyond the budget)")
    )


@dataclass
class _Point:
    """One setting of a sweep, and what it shares with the others."""

    method: RMU
    places: Any
    number: int
    count: int
    cache: Any
    upto: int

    def run(
        self, start: Any, model: Any, tokenizer: Any, domain: Domain, ctx: Context, rows: int
    ) -> Tried:
        """Train from the original, score on `dev`, and leave the model as it was."""
        from excise.methods.posthoc import rmu_run as one
        from excise.methods.posthoc.rmu_data import alternate, topics_of
        from excise.methods.tuning import Progress, moved
        from excise.models.lora import merge

        method, places = self.method, self.places
        topics = topics_of(domain)
        batches = alternate(method, topics, domain, tokenizer, ctx)
        stage = f"rmu {self.number + 1}/{self.count}"
        progress = Progress(ctx, stage, method.fit.steps)
        with one.opened(method, model, places, ctx) as loaded:
            engine = one.make_engine(
                method, start, loaded, places, ctx, cache=self.cache, upto=self.upto
            )
            width = places.parts.d_model
            controls = one.make_controls(method, topics, engine, batches, width, ctx)
            one.train(
                method, loaded, engine, controls, batches, progress, ctx,
                state=f"{self.number}",
            )  # fmt: skip
            forget, retain = dev_losses(loaded.net, tokenizer, domain, rows, method.max_length)
            whole = loaded.parameters if method.lora is None else merge(loaded.net)[0]
            changed = {n: t.detach().to("cpu", copy=True) for n, t in whole.items()}
            facts = one.facts(method, start, places, loaded, engine, controls)
            with torch.no_grad():
                for name, value in loaded.saved.items():
                    loaded.parameters[name].copy_(value)
        stored = start.weights_of(list(changed))
        changed = {n: t.to(stored[n].dtype) for n, t in changed.items()}
        facts |= moved(stored, changed)
        per_token = one.flops_per_token(method, places, start)
        cost = progress.cost(start.num_parameters, flops_per_token=per_token)
        return Tried(
            method, forget, retain, changed, controls, facts, tuple(progress.history), cost
        )


def _write(
    best: Tried, start: Any, cost: Cost, found: dict[str, Any], method: RMU, ctx: Context
) -> Removal:
    """Write the chosen model."""
    from excise.methods.posthoc.rmu_run import CONTROLS, replace_model
    from excise.models.delta import write_delta

    save_file(dict(best.controls), str(ctx.work / CONTROLS))
    stored = start.weights_of(list(best.changed))
    different = {n: t for n, t in best.changed.items() if not torch.equal(t, stored[n])}
    checkpoint = start.write(different, replace_model(start, ctx))
    extras: dict[str, Any] = {**best.facts, "sweep": found}
    if method.keep == "delta":
        write_delta(start, different, ctx.work / "delta")
        extras["files"] = {**extras["files"], "delta": "delta"}
    return Removal(checkpoint, tuple(sorted(different)), cost, extras, tuple(best.history))
