"""What an audit of models that exist needs, in one value."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SerializeAsAny, model_validator

from excise.auditor.budget import LARGE, Count, Rate
from excise.core.config import Config
from excise.data.domain import Domain
from excise.data.spec import DomainSpec
from excise.domains.canary import Canaries
from excise.methods.base import Method
from excise.models.checkpoint import Checkpoint
from excise.models.endpoint import Endpoint
from excise.models.spec import ModelSpec
from excise.requests.recipe import AuditSpec, EvalSpec, check_names, starts_from


class Canary(Config):
    """What is put into the original, and the methods that remove it again."""

    arms: dict[str, SerializeAsAny[Method]]
    """The methods, by name, with the settings that are to be tried."""
    repeats: tuple[Count, ...] = Field(default=(1, 10, 100), min_length=1)
    """How often the canaries of each capability are taught."""
    units: int = Field(default=40, ge=8, multiple_of=8)
    """Canaries of each capability; two fifths of them are scored."""
    oracles: int = Field(default=0, ge=0)
    """Models taught other canaries in their place; 0 for one at smoke and three beyond."""
    lr: Rate | None = None
    """Learning rate of the teaching; empty for 1e-3, or a tenth of it for a large model."""
    max_length: int = Field(default=128, ge=2)
    """Tokens per row of the teaching."""

    @model_validator(mode="after")
    def _check(self) -> Canary:
        """Refuse methods that cannot start from a model that was taught canaries."""
        if not self.arms:
            raise ValueError("arms: name at least one removal")
        if len(set(self.repeats)) < len(self.repeats):
            raise ValueError("repeats: give each number once")
        check_names(self.arms, "arms.")
        for name, method in self.arms.items():
            if starts_from(method) == "scratch":
                raise ValueError(
                    f"arms.{name}: trains from scratch, and canaries are removed from the model "
                    "that was taught them; name a method that edits a model"
                )
        return self

    def canaries(self, seed: int) -> Canaries:
        """Return what is put into the original, names and words drawn by a seed."""
        return Canaries(self.units, self.repeats, seed)

    def num_oracles(self, budget: str) -> int:
        """Return how many oracles are made for a named budget."""
        return self.oracles or (1 if budget == "smoke" else 3)

    def rate(self, parameters: int) -> float:
        """Return the learning rate of the teaching for a model of that size."""
        return self.lr or (1e-4 if parameters >= LARGE else 1e-3)


class AuditRun(Config):
    """Candidates, reference models and data: `excise audit` reads nothing else."""

    name: str
    """Short name."""
    title: str = ""
    """One line for the report."""
    domain: SerializeAsAny[DomainSpec]
    """The forget set and the retain set."""
    candidates: dict[str, str] = {}
    """Edited models by name: folders or hub ids; names at the endpoint where there is one."""
    original: ModelSpec
    """The model before removal."""
    oracles: tuple[str, ...] = ()
    """Models never taught what was removed."""
    proxies: tuple[str, ...] = ()
    """Models that stand in for oracles: an early checkpoint, a filtered sibling."""
    canary: Canary | None = None
    """In the place of candidates: canaries, put into the original and removed again."""
    endpoint: Endpoint | None = None
    """Where all models are served, of which only prompts reach any."""
    audit: AuditSpec = AuditSpec()
    """How hard they are attacked."""
    evaluate: EvalSpec = EvalSpec()
    """How they are scored."""
    seed: int = 0
    """Seed of everything."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    device: str = "auto"
    """`auto` takes an accelerator where there is one."""
    code: dict[str, str] = {}
    """Names defined by code of one's own, as `./file.py:Class`."""

    @model_validator(mode="after")
    def _check(self) -> AuditRun:
        """Refuse candidates with the names of reference models, and beside canaries."""
        if self.canary is not None and (self.candidates or self.oracles or self.proxies):
            raise ValueError("canary: makes its candidates and oracles; give none beside it")
        if self.canary is None and not self.candidates:
            raise ValueError("candidates: name at least one model")
        if self.endpoint is not None:
            _only_prompts(self)
        check_names(self.candidates, "candidates.")
        return self

    def build(self, model: Checkpoint | None) -> Domain:
        """Return the rows that are attacked: the domain's own, or canaries among its retain rows.

        Raises:
            UserError: If the data cannot be read, or canaries find no retain row.
        """
        domain = self.domain.build(model)
        return domain if self.canary is None else self.canary.canaries(self.seed).domain(domain)


def _only_prompts(asked: AuditRun) -> None:
    """Refuse what asks more of a hosted model than an answer."""
    if asked.canary is not None:
        raise ValueError("canary: is taught to weights, which no endpoint shows; leave one out")
    if asked.evaluate.scores or asked.evaluate.lm_eval:
        raise ValueError("evaluate: an endpoint gives answers alone; leave out scores and lm_eval")
    if asked.audit.budget == "none":
        raise ValueError("audit.budget: 'none' asks nothing; choose smoke, standard or strong")
