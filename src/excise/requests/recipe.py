"""A recipe: everything a run needs, in one value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, SerializeAsAny, model_validator

from excise.auditor.base import RESERVED, Attack
from excise.auditor.budget import Budget, budget_of
from excise.core.config import Config, parse
from excise.core.errors import UserError
from excise.data.spec import DomainSpec
from excise.evals.extra import ExtraScore
from excise.methods.base import Method
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.spec import ModelSpec
from excise.record.requirements import needs_attack, parse_requirement


class AuditSpec(Config):
    """How hard each edited model is attacked."""

    restarts: ClassVar[Mapping[str, tuple[str, ...]]] = {"budget": ("change",)}
    """Fields that start from their defaults where another, given on a command line, changes: what a
    recipe changes of *smoke* would cut *standard* short."""

    budget: Literal["none", "smoke", "standard", "strong"] = "smoke"
    """Named budget; `none` skips the audit."""
    change: dict[str, Any] = {}
    """Fields of the budget that differ from the named one; the report lists them."""
    attacks: tuple[SerializeAsAny[Attack], ...] = ()
    """Attacks with their settings; empty for all that the budget requires."""
    require: str = ""
    """What every edited model must meet, such as `D3, recovery<=0.2@1M-tokens, retain>=-0.01`; it
    decides the exit code and no number."""

    @model_validator(mode="after")
    def _check(self) -> AuditSpec:
        """Refuse a requirement that cannot be read, or that no attack will test."""
        conditions = parse_requirement(self.require) if self.require else ()
        attacked = needs_attack(conditions)
        if self.budget == "none" and attacked:
            raise ValueError(
                f"require: '{attacked}' needs attacks, and the budget is 'none'; choose smoke, "
                "standard or strong"
            )
        return self


def budget_for(spec: AuditSpec, parameters: int) -> Budget:
    """Return the budget an audit asks for, its changes applied and checked.

    Who names a number of steps gets that number, without doublings.

    Args:
        spec: Named budget and changes.
        parameters: Size of the model, to which the learning rates are scaled.

    Raises:
        UserError: If a change names no field of a budget or does not fit it.
    """
    named = budget_of(spec.budget, parameters)
    if not spec.change:
        return named
    fields = named.model_dump() | ({"doublings": 0} if "steps" in spec.change else {})
    return parse(Budget, {**fields, **spec.change}, {}, source="audit.change")


class EvalSpec(Config):
    """How models are scored before any attack."""

    max_rows: int = Field(default=512, ge=0)
    """Rows of each scored set at most; 0 for all."""
    max_length: int = Field(default=128, ge=2)
    """Tokens per row."""
    samples: int = Field(default=3, ge=0)
    """Continuations shown per set; none are shown for sensitive data."""
    scores: tuple[SerializeAsAny[ExtraScore], ...] = ()
    """Scores beside the domain's own: `refusal`, `generate`, one of your own."""
    lm_eval: tuple[str, ...] = ()
    """Tasks of lm-eval run on every model, for its utility."""
    lm_eval_limit: Annotated[int, Field(ge=1)] | None = None
    """Questions per task at most."""


Keep = Literal["best", "all", "delta", "none"]
"""What a run leaves of its edited models beside record and report."""

NO_MODEL: Final = ("delta", "none")
"""Choices of `Keep` that leave no model."""


class Recipe(Config):
    """Domain, model, methods and audit: `excise run` reads nothing else."""

    name: str
    """Short name; the output folder is called after it."""
    title: str = ""
    """One line for the report."""
    takes: str = ""
    """Expected time and memory on two cores, for `ls` and `show`."""
    domain: SerializeAsAny[DomainSpec]
    """What is removed and what stays."""
    model: ModelSpec
    """The original."""
    pretrain: Pretrain | None = None
    """Schedule of models trained from scratch: original, oracles and scratch methods."""
    arms: dict[str, SerializeAsAny[Method]]
    """Removals by name."""
    audit: AuditSpec = AuditSpec()
    """How they are attacked."""
    evaluate: EvalSpec = EvalSpec()
    """How they are scored."""
    refit: bool = False
    """After the audit, repeat every removal on all forget rows; the results lie under refit/."""
    keep: Keep = "best"
    """Of edited models: the `best` step, or the only one; its `delta` alone, the changed tensors,
    from which `excise export` rebuilds it; `all` of both and of the steps that a stop rule kept;
    `none`."""
    oracles: int = Field(default=3, le=1000)
    """Models trained without the forget units, when there is a `pretrain`."""
    seed: int = 0
    """Seed of everything; oracle i uses seed + 1000 + i."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    device: str = "auto"
    """`auto` takes an accelerator where there is one."""
    fsdp: bool = False
    """Under torchrun, cut the blocks of a model over the processes while it trains (FSDP2):
    each holds a share of weights, gradients and optimizer states."""
    code: dict[str, str] = {}
    """Names defined by code of one's own, as `./file.py:Class`."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        """Refuse combinations that cannot run, before anything runs."""
        if not self.name or Path(self.name).name != self.name:
            raise ValueError("name: the output folder is called after it; give one without '/'")
        if not self.arms:
            raise ValueError("arms: name at least one removal")
        if bool(self.model.path) == (self.model.scratch is not None):
            raise ValueError("model: give either 'path' or 'scratch'")
        scratch = [n for n, m in self.arms.items() if starts_from(m) == "scratch"]
        if self.model.scratch is None and scratch:
            raise ValueError(
                f"arms.{scratch[0]}: trains from scratch; use a recipe with 'model.scratch' and "
                "'pretrain' (excise show demo)"
            )
        if self.model.scratch is not None and self.pretrain is None:
            raise ValueError("pretrain: is required with 'model.scratch'")
        if self.keep == "delta" and scratch:
            raise ValueError(
                f"keep: a delta changes the original, and arms.{scratch[0]} trains from scratch; "
                "use 'best' or 'none'"
            )
        check_names(self.arms, "arms.")
        if self.refit and getattr(self.domain, "claim", "") == "deletion":
            raise ValueError(
                "refit: a deletion gives the method every forget row already; leave it out"
            )
        return self


def starts_from(method: Method) -> str:
    """Return whether a method starts from the original or from scratch; a chain as its first."""
    links = getattr(method, "methods", None)
    return starts_from(links[0]) if links else method.starts_from


def check_names(names: Iterable[str], field: str = "") -> None:
    """Refuse names of edited models that are no words or belong to the reference models.

    Args:
        names: The names.
        field: What stands before a name in the sentence, such as `arms.`.

    Raises:
        UserError: Naming the first.
    """
    for name in names:
        if not name.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"{field}{name}: use letters, digits, '-' and '_' only")
        if name in RESERVED or name.startswith("oracle"):
            raise UserError(
                f"{field}{name}: this is the name of a reference model or a control; use another"
            )
