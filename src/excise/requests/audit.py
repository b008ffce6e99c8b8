"""What an audit of models that exist needs, in one value."""

from __future__ import annotations

from typing import Literal

from pydantic import SerializeAsAny, model_validator

from excise.core.config import Config
from excise.data.spec import DomainSpec
from excise.models.spec import ModelSpec
from excise.requests.recipe import AuditSpec, EvalSpec, check_names


class AuditRun(Config):
    """Candidates, reference models and data: `excise audit` reads nothing else."""

    name: str
    """Short name."""
    title: str = ""
    """One line for the report."""
    domain: SerializeAsAny[DomainSpec]
    """The forget set and the retain set."""
    candidates: dict[str, str]
    """Edited models by name: folders or hub ids."""
    original: ModelSpec
    """The model before removal."""
    oracles: tuple[str, ...] = ()
    """Models never taught what was removed."""
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
        """Refuse candidates with the names of reference models."""
        if not self.candidates:
            raise ValueError("candidates: name at least one model")
        check_names(self.candidates, "candidates.")
        return self
