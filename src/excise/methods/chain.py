"""Several removals, one after another."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import SerializeAsAny, field_validator

from excise.core.context import Context
from excise.data.domain import Domain
from excise.methods.base import ApplyMethod, Cost, Method, Paper, Removal
from excise.models.checkpoint import Checkpoint
from excise.train.distributed import barrier


class Chain(Method):
    """Apply each method to what the one before it made, e.g. routing and then RMU."""

    name: Literal["chain"] = "chain"
    methods: tuple[SerializeAsAny[Method], ...]
    """The methods, in order; only the first may train from scratch."""

    paper: ClassVar[Paper] = Paper(
        "Gradient routing (ERA followed by RMU)", "arXiv:2410.04332", "section 4.2"
    )

    @field_validator("methods")
    @classmethod
    def _check(cls, methods: tuple[Method, ...]) -> tuple[Method, ...]:
        """Refuse an empty chain and a later link that would throw the earlier ones away."""
        if not methods:
            raise ValueError("a chain needs at least one method")
        for later in methods[1:]:
            if later.starts_from == "scratch":
                raise ValueError(f"'{later.name}' trains from scratch and can only come first")  # type: ignore[attr-defined]
        return methods

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Apply the methods in order; each is a stage of its own, which other chains share."""
        changed: set[str] = set()
        cost, links = Cost(), []
        checkpoint, history = start, tuple[Mapping[str, float], ...]()
        for method in self.methods:
            removal = ctx.run(ApplyMethod(method, checkpoint, domain, ctx.seed))
            checkpoint, cost, history = removal.checkpoint, cost + removal.cost, removal.history
            changed.update(removal.changed)
            links.append({"method": method.model_dump(mode="json"), "extras": removal.extras})
        to = ctx.work / "model"
        if ctx.rank == 0:
            shutil.rmtree(to, ignore_errors=True)  # of a run that was killed
            checkpoint.write({}, to, link=True)
        barrier(ctx)
        model = Checkpoint(to, trust_remote_code=start.trust_remote_code)
        return Removal(model, tuple(sorted(changed)), cost, {"links": links}, history)
