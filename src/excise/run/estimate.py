"""What a recipe would do and cost, before anything starts: arms, steps, tokens, memory, time.

Times are ranges from the arithmetic alone; `docs/costs.md` has measured ones.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excise.auditor.budget import Budget
from excise.core.config import Config
from excise.core.errors import UserError
from excise.core.events import duration
from excise.fetch import cached, known
from excise.fetch.model import open_model
from excise.methods.base import Method
from excise.models.checkpoint import Checkpoint
from excise.models.folder import meta_model
from excise.models.spec import ModelSpec
from excise.models.tiny import tiny_config
from excise.requests.recipe import Recipe, budget_for, starts_from
from excise.train.fit import FitConfig

CPU_FLOPS = (3e10, 3e11)
"""Range of planned FLOP/s of one thread. Four recipes from 0.16M to 135M parameters gave 1.4e11 to
1.7e11 on an AMD EPYC with AVX-512; texts shorter than planned make it look faster than it is."""
GPU_FLOPS = (5e12, 3e14)
"""The same for one accelerator in bf16."""


@dataclass(frozen=True)
class Line:
    """One thing that is trained."""

    name: str
    steps: int
    tokens: int
    flops: float


@dataclass(frozen=True)
class Plan:
    """The estimate.

    Attributes:
        name: Recipe.
        parameters: Size of the model; 0 when it is not here yet.
        lines: What is trained.
        memory: Bytes of memory per worker at the peak.
        disk: Bytes written.
        seconds: Range of the time on one worker.
        out: Output folder.
    """

    name: str
    parameters: int
    lines: tuple[Line, ...]
    memory: int
    disk: int
    seconds: tuple[float, float]
    out: Path

    def text(self) -> str:
        """Return the estimate as lines for a terminal."""
        width = max(len(line.name) for line in self.lines)
        rows = [f"{'what':<{width}}  {'steps':>8}  {'tokens':>12}  {'FLOPs':>8}"]
        rows += [
            f"{line.name:<{width}}  {line.steps:>8,}  {line.tokens:>12,}  {line.flops:>8.1e}"
            for line in self.lines
        ]
        low, high = self.seconds
        size = f"{self.parameters:,}" if self.parameters else "not here yet"
        rows += [
            "",
            f"parameters  {size}",
            f"memory      about {gib(self.memory)} per worker",
            f"disk        about {gib(self.disk)} under {self.out}",
            f"time        {duration(low)} to {duration(high)} on one worker",
        ]
        return "\n".join(rows)

    def refuse(self, *, force: bool) -> None:
        """Refuse what cannot fit.

        Args:
            force: Whether the user insists.

        Raises:
            UserError: If memory or disk is too small by this estimate.
        """
        if force:
            return
        try:
            memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        except AttributeError:  # Windows
            memory = math.inf
        if self.memory > memory:
            raise UserError(
                f"needs about {gib(self.memory)} of memory and this machine has {gib(memory)}; "
                "use --lora.rank, a smaller fit.micro_size, or --force to try"
            )
        where = next(p for p in (self.out, *self.out.absolute().parents) if p.exists())
        free = shutil.disk_usage(where).free
        if self.disk > free:
            raise UserError(
                f"needs about {gib(self.disk)} of disk under {self.out} and {gib(free)} is free; "
                "choose another --out, or --force to try"
            )


def gib(count: float) -> str:
    """Return bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.0f} MiB"


def plan(recipe: Recipe, out: Path) -> Plan:
    """Estimate a recipe; downloads and trains nothing."""
    count = parameters(recipe)
    lines = list(_lines(recipe, count))
    flops = sum(line.flops for line in lines)
    width = 2 if recipe.dtype == "bfloat16" else 4
    models = 1 + len(recipe.arms) + (recipe.oracles + 1 if recipe.model.scratch else 0)
    rows = max((f.micro_size or f.batch_size) for f in _all_fits(recipe)) if lines else 1
    # weights twice (frozen and live), fp32 master, gradient and two moments; activations per row.
    memory = 3 * 2**28 + count * (2 * width + 4 * 4) + rows * 2**20 * max(1, count // 10**7)
    low, high = GPU_FLOPS if recipe.device.startswith("cuda") else CPU_FLOPS
    return Plan(
        recipe.name,
        count,
        tuple(lines),
        memory,
        2 * models * count * width + 2**24,
        (flops / high, flops / low),
        out,
    )


def parameters(recipe: Recipe) -> int:
    """Return the size of the model from its configuration or its headers; 0 when not here.

    Raises:
        UserError: If the model is here and something is wrong with it.
    """
    if recipe.model.scratch is not None:
        scratch = recipe.model.scratch
        more: dict[str, Any] = dict(scratch.overrides)
        config = tiny_config(scratch.family, width=scratch.width, blocks=scratch.blocks, **more)
        return sum(p.numel() for p in meta_model(config).parameters())
    checkpoint = here(recipe.model)
    return checkpoint.num_parameters if checkpoint else 0


def here(spec: ModelSpec) -> Checkpoint | None:
    """Return the model if it is on this disk as a folder, checked; None if it is still to come.

    Raises:
        UserError: If there is no such model, or something is wrong with it.
    """
    path = Path(spec.path).expanduser()
    if not path.exists() and (spec.path in known() or spec.path.count("/") == 1):
        if spec.path not in known() or cached(spec.path) is None:
            return None  # fetched, or refused, when the run starts
    elif path.suffix.lower() == ".gguf" and path.is_file():
        return None  # becomes a folder when the run starts
    return open_model(spec)


def _fits(config: Config) -> Iterator[FitConfig]:
    """Yield every training schedule inside a configuration."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, FitConfig):
                yield item
            elif isinstance(item, Config):
                yield from _fits(item)


def _all_fits(recipe: Recipe) -> list[FitConfig]:
    found = [fit for method in recipe.arms.values() for fit in _fits(method)]
    if recipe.pretrain is not None:
        found.append(recipe.pretrain.fit)
    return found or [FitConfig()]


def _lines(recipe: Recipe, count: int) -> Iterator[Line]:
    """Yield what is trained, in order."""
    if recipe.pretrain is not None:
        fit, length = recipe.pretrain.fit, recipe.pretrain.max_length
        yield _line("original", fit, length, count, 1)
        for i in range(recipe.oracles):
            yield _line(f"oracle-{i}", fit, length, count, 1)
    for name, method in recipe.arms.items():
        yield _arm(name, method, recipe, count)
    if recipe.audit.budget != "none":
        subjects = len(recipe.arms) + 1 + (recipe.oracles if recipe.model.scratch else 0)
        yield _audit(budget_for(recipe.audit, count), subjects, count)


def _arm(name: str, method: Method, recipe: Recipe, count: int) -> Line:
    if starts_from(method) == "scratch" and recipe.pretrain is not None:
        return _line(name, recipe.pretrain.fit, recipe.pretrain.max_length, count, 1)
    length = int(getattr(method, "max_length", 128))
    sweep = getattr(method, "sweep", None)
    trials = len(sweep.points(method)) if sweep is not None else 1
    parts = [_line(name, fit, length, count, 2 * trials) for fit in _fits(method)]
    return Line(
        name,
        sum(p.steps for p in parts),
        sum(p.tokens for p in parts),
        sum(p.flops for p in parts),
    )


def _line(name: str, fit: FitConfig, length: int, count: int, roles: int) -> Line:
    tokens = fit.steps * fit.batch_size * length * roles
    return Line(name, fit.steps, tokens, 6.0 * count * tokens)


def _audit(budget: Budget, subjects: int, count: int) -> Line:
    runs = subjects * len(budget.seeds) * (2 * len(budget.rates) + len(budget.lora_rates))
    steps = runs * budget.steps
    trained = steps * budget.batch_size * budget.max_length
    scored = subjects * 40 * budget.max_test_rows * budget.max_length
    flops = 6.0 * count * trained + 2.0 * count * scored
    return Line(f"audit ({budget.name})", steps, trained + scored, flops)
