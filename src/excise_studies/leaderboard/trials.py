"""The search for settings: the same number of trials for every method, breadth first, on `dev`.

A trial applies a method, looks at two losses on `dev` rows and throws the model away. No attack is
run and nothing of the relearn set, the held-out test set or `retain_test` is read.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from excise.core.context import Context, Stage
from excise.core.disk import write_text
from excise.core.errors import DiskFull
from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.methods.base import ApplyMethod, Cost, Method, Removal
from excise.methods.choosing import better, dev_losses
from excise.methods.search import Range, changed, settings_of
from excise.models.checkpoint import Checkpoint
from excise.run.steps import label
from excise.train.pool import Pool


@dataclass(frozen=True)
class Tried:
    """What came of one setting.

    Attributes:
        forget: Loss on `dev` forget rows, nats per token.
        retain: Loss on `dev` retain rows.
        cost: What the removal took.
        failed: Why there is no model to score; empty where there is one.
    """

    forget: float = 0.0
    retain: float = 0.0
    cost: Cost = field(default_factory=Cost)
    failed: str = ""


@dataclass(frozen=True)
class TrySetting(Stage[Tried]):
    """One setting of a method on `dev` rows; the model is not kept.

    Attributes:
        method: The method with this setting.
        start: What it starts from.
        domain: What it is given.
        dev: The domain whose `dev` rows are scored.
        seed: Seed of the removal.
        rows: Rows of each set at most.
        max_length: Tokens per row.
    """

    method: Method
    start: Checkpoint
    domain: Domain
    dev: Domain
    seed: int
    rows: int
    max_length: int

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return f"trial-{getattr(self.method, 'name', 'method')}"

    def make(self, ctx: Context) -> None:
        """Apply, score, write the losses, throw the model away."""
        try:
            removal = self.method.apply(self.start, self.domain, ctx)
            losses = losses_of(removal.checkpoint, self.dev, self.rows, self.max_length, ctx)
            tried = Tried(*losses, removal.cost)
        except Exception as error:
            if isinstance(error, DiskFull):
                raise
            tried = Tried(failed=reason(error))
        for path in ctx.work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_text(ctx.work / "trial.json", json.dumps(asdict(tried)))

    def read(self, folder: Path) -> Tried:
        """Return what came of it."""
        data = json.loads((folder / "trial.json").read_text(encoding="utf-8"))
        return Tried(**{**data, "cost": Cost(**data["cost"])})


@dataclass(frozen=True)
class ScoreDev(Stage[tuple[float, float]]):
    """The two losses of a model on `dev` rows, forget and retain.

    Attributes:
        checkpoint: The model.
        dev: The domain whose `dev` rows are scored.
        rows: Rows of each set at most.
        max_length: Tokens per row.
    """

    checkpoint: Checkpoint
    dev: Domain
    rows: int
    max_length: int

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "dev-losses"

    def make(self, ctx: Context) -> None:
        """Score the model."""
        losses = losses_of(self.checkpoint, self.dev, self.rows, self.max_length, ctx)
        write_text(ctx.work / "losses.json", json.dumps(losses))

    def read(self, folder: Path) -> tuple[float, float]:
        """Return the losses."""
        forget, retain = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
        return forget, retain


def losses_of(
    checkpoint: Checkpoint, dev: Domain, rows: int, max_length: int, ctx: Context
) -> tuple[float, float]:
    """Return the losses of a model on disk; see `dev_losses`."""
    model = checkpoint.load(dtype=ctx.dtype, device=ctx.device)
    return dev_losses(model, checkpoint.tokenizer(), dev, rows, max_length)


def reason(error: Exception) -> str:
    """Return why a method failed, in one line."""
    lines = str(error).strip().splitlines() or ["no reason was given"]
    return lines[0] if isinstance(error, ValueError) else f"{type(error).__name__}: {lines[0]}"


def made(job: tuple[Runtime, ApplyMethod, ScoreDev | None]) -> Removal | str:
    """Apply a method; return why where it fails, or makes a model that gives no numbers."""
    runtime, stage, score = job
    try:
        removal = runtime.run(stage)
        if score is not None:
            runtime.run(ScoreDev(removal.checkpoint, score.dev, score.rows, score.max_length))
    except DiskFull:
        raise
    except Exception as error:
        return reason(error)
    return removal


@dataclass(frozen=True)
class Trial:
    """One setting of a method, and what came of it.

    Attributes:
        settings: What differs from the published settings, by path; nothing in the first trial.
        tried: What came of it.
    """

    settings: Mapping[str, Any]
    tried: Tried

    @property
    def forget(self) -> float:
        """Loss on `dev` forget rows."""
        return self.tried.forget

    @property
    def retain(self) -> float:
        """Loss on `dev` retain rows."""
        return self.tried.retain


@dataclass(frozen=True)
class Searched:
    """The trials of one method, in their order, as many as every method has.

    Attributes:
        trials: What was tried; those that failed too.
        asked: How many there were to be: fewer than asked for where a method has nothing to search.
    """

    trials: tuple[Trial, ...]
    asked: int

    @property
    def usable(self) -> tuple[Trial, ...]:
        """Trials that gave a model."""
        return tuple(t for t in self.trials if not t.tried.failed)

    @property
    def failed(self) -> str:
        """Why no trial gave a model; empty where one did."""
        return "" if self.usable or not self.trials else self.trials[0].tried.failed

    @property
    def cost(self) -> Cost:
        """What all trials took."""
        total = Cost()
        for trial in self.trials:
            total += trial.tried.cost
        return total

    def best(self, limit: float) -> Trial:
        """Return the trial to choose at a limit of the retain loss; one at least is usable."""
        best: Trial | None = None
        for trial in self.usable:
            if better(trial, best, limit):
                best = trial
        assert best is not None, "a trial is usable"
        return best

    def frontier(self) -> tuple[Trial, ...]:
        """Return the trials that no other beats in both losses, the cheapest for retain first."""
        out: list[Trial] = []
        for trial in sorted(self.usable, key=lambda t: (t.retain, -t.forget)):
            if not out or trial.forget > out[-1].forget:
                out.append(trial)
        return tuple(out)


def search(
    methods: Mapping[str, Method],
    stage_of: Callable[[Method], TrySetting],
    trials: int,
    seed: int,
    ranges: Callable[[str], Mapping[str, Range]],
    deadline: float,
    runtime: Runtime,
    pool: Pool,
) -> dict[str, Searched]:
    """Try settings of every method, the first of all before the second of any.

    Args:
        methods: By name, with their published settings.
        stage_of: Returns the `TrySetting` of a method.
        trials: Settings of each method.
        seed: Seed of the search.
        ranges: Ranges of a method of that name, as `settings_of` takes them.
        deadline: Time since the epoch from which on no trial is begun.
        runtime: Where stages are kept.
        pool: Worker processes.

    Returns:
        For every method that was tried, its trials of the rounds that every method has been
        through: a search that was cut short compares equal numbers of them.
    """
    plans = {name: settings_of(m, trials, seed, ranges(name)) for name, m in methods.items()}
    order = [(n, i) for i in range(trials) for n, plan in plans.items() if i < len(plan)]
    jobs: list[tuple[Runtime, TrySetting | str, float]] = []
    for name, i in order:
        try:
            stage = stage_of(changed(methods[name], plans[name][i]))
        except ValueError as error:  # the point lies outside what the method takes
            jobs.append((runtime, str(error).splitlines()[-1].strip(), deadline))
            continue
        label([stage], [f"{name}, trial {i + 1}"], runtime, pool)
        jobs.append((runtime, stage, deadline))
    found = dict(zip(order, pool.map(attempt, jobs), strict=True))
    rounds = [i for (_, i), tried in found.items() if tried is None]
    whole = max(1, min(rounds, default=trials))
    out = {}
    for name, plan in plans.items():
        tried = [(plan[i], found[name, i]) for i in range(min(whole, len(plan)))]
        mine = tuple(Trial(settings, t) for settings, t in tried if t is not None)
        if mine:
            out[name] = Searched(mine, len(plan))
    return out


def attempt(job: tuple[Runtime, TrySetting | str, float]) -> Tried | None:
    """Try a setting, unless the time is up and it was not tried before."""
    runtime, stage, deadline = job
    if isinstance(stage, str):
        return Tried(failed=stage)
    if time.time() >= deadline and not runtime.path(stage).exists():
        return None
    return runtime.run(stage)


def within(searched: Sequence[Trial], limit: float) -> float | None:
    """Return the highest `dev` forget loss of trials whose retain loss is at most a limit."""
    return max((t.forget for t in searched if t.retain <= limit), default=None)
