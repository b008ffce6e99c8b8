"""When an edit is done and which of its steps is kept: judged on `dev`, never on what is scored.

before training:     r0 = loss on dev retain text
every `every` steps: f, r = losses on dev forget and dev retain text
stop = "beyond" and r > r0 + retain_budget: end here
at the end:          of the steps looked at with r <= r0 + retain_budget, the one of highest f;
where there is none, the one of lowest r, and the record says so
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from excise.core.config import Config
from excise.core.context import Context
from excise.core.disk import new_file, write_text
from excise.core.errors import Diverged, NotFinite, counted
from excise.methods.choosing import RULE, better
from excise.train.distributed import barrier


class StopRule(Config):
    """Look at `dev` while a method trains, and keep its best step."""

    every: int = Field(default=10, ge=1)
    """Steps between two looks; the last step is always looked at."""
    retain_budget: float = Field(default=0.05, ge=0)
    """Nats per token by which the loss on `dev` retain text may rise."""
    stop: Literal["end", "beyond"] = "beyond"
    """Train to the end, or stop at the first look beyond the budget."""
    rows: int = Field(default=64, ge=1)
    """Rows of `dev` scored per role and capability at most."""
    keep_looks: bool = False
    """Keep the trained tensors of every look beside the model, not of the best alone."""


@dataclass(frozen=True)
class Look:
    """Losses on `dev` after a step, nats per token.

    Attributes:
        step: Steps done.
        forget: Loss on `dev` forget text; capabilities count alike.
        retain: Loss on `dev` retain text.
    """

    step: int
    forget: float
    retain: float


@dataclass
class Looks:
    """The looks of one loop; `run_fit` takes them. Make it before `fit` restores any state.

    Attributes:
        rule: When to look, and what may be kept.
        losses: Losses on `dev`, forget and retain, of the model as it stands.
        parameters: What is trained, by name.
        steps: Steps of the loop.
        ctx: Gives the folder, processes, and who is told.
    """

    rule: StopRule
    losses: Callable[[], tuple[float, float]]
    parameters: Mapping[str, nn.Parameter]
    steps: int
    ctx: Context
    original: Look = field(init=False)
    best: Look | None = field(default=None, init=False)
    table: dict[int, Look] = field(default_factory=dict, init=False)
    stopped: str = field(default="", init=False)

    def __post_init__(self) -> None:
        """Look at the model before anything is trained, and read what a killed run looked at."""
        if self.ctx.rank == 0:
            self.folder.mkdir(exist_ok=True)
        barrier(self.ctx)
        self.original = Look(0, *self.losses())
        if self.file.exists():
            looks = json.loads(self.file.read_text(encoding="utf-8"))
            self.table = {look["step"]: Look(**look) for look in looks}

    @property
    def folder(self) -> Path:
        """Where looks are kept."""
        return self.ctx.work / "looks"

    @property
    def file(self) -> Path:
        """Their losses."""
        return self.folder / "looks.json"

    @property
    def limit(self) -> float:
        """The highest retain loss allowed, nats per token."""
        return self.original.retain + self.rule.retain_budget

    def after(self, done: int) -> bool:
        """Look at the model if it is time; return whether training ends here.

        Args:
            done: Steps done. Steps that were replayed have been looked at, or are the last ones.

        Raises:
            Diverged: If the model gives no numbers any more.
        """
        if done % self.rule.every and done != self.steps:
            return False
        seen = self.table.get(done)
        try:
            look = seen or Look(done, *self.losses())
        except NotFinite:
            raise Diverged(
                f"the model has no finite loss on `dev` after {counted(done, 'step')}; lower the "
                "learning rate"
            ) from None
        is_best = better(look, self.best, self.limit)
        self.best = look if is_best else self.best
        if seen is None:
            self._keep(look, is_best)
        beyond = look.retain > self.limit
        if beyond and self.rule.stop == "beyond" and done < self.steps:
            self.stopped = f"dev_retain rose beyond the budget after {done} steps"
            return True
        return False

    def _keep(self, look: Look, is_best: bool) -> None:
        """Write the weights first, then the losses that say they are there."""
        if self.ctx.rank == 0:
            if is_best or self.rule.keep_looks:
                weights = {n: p.detach().cpu().contiguous() for n, p in self.parameters.items()}
                with new_file(self._weights(look)) as part:
                    save_file(weights, str(part))
            looks = [asdict(one) for one in (*self.table.values(), look)]
            write_text(self.file, json.dumps(looks))
            for path in self.folder.glob("step-*.safetensors") if is_best else ():
                if not self.rule.keep_looks and path != self._weights(look):
                    path.unlink()
        self.table[look.step] = look
        self.ctx.emit(
            "note",
            {"text": f"dev after {look.step} steps: forget {look.forget:.3f}, retain "
                     f"{look.retain:.3f}" + (" (beyond the budget)" * (look.retain > self.limit))},
        )  # fmt: skip

    def _weights(self, look: Look) -> Path:
        return self.folder / f"step-{look.step}.safetensors"

    @torch.no_grad()
    def restore(self) -> dict[str, Any]:
        """Put the best step's weights into the model; return what the record says of the choice."""
        assert self.best is not None, "the last step is looked at"
        barrier(self.ctx)
        best: Mapping[str, Tensor] = load_file(str(self._weights(self.best)))
        for name, parameter in self.parameters.items():
            parameter.copy_(best[name])
        return {
            "rule": RULE,
            "retain_budget": self.rule.retain_budget,
            "original": asdict(self.original),
            "chosen": asdict(self.best),
            "within_budget": self.best.retain <= self.limit,
            "stopped": self.stopped,
            "table": [asdict(look) for look in self.table.values()],
        }
