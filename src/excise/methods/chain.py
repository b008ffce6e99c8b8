"""Several removals, one after another."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import SerializeAsAny, field_validator

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.methods.base import Cost, Method, Paper, Removal
from excise.models.checkpoint import Checkpoint


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
        """Apply the methods in order; each works in a folder of its own."""
        changed: set[str] = set()
        cost, links = Cost(), []
        checkpoint = start
        for i, method in enumerate(self.methods):
            removal = method.apply(checkpoint, domain, ctx.child(f"{i}"))
            checkpoint, cost = removal.checkpoint, cost + removal.cost
            changed.update(removal.changed)
            links.append({"method": method.model_dump(mode="json"), "extras": removal.extras})
        if checkpoint is start:
            raise UserError("a chain needs at least one method")
        return Removal(checkpoint, tuple(sorted(changed)), cost, {"links": links}, removal.history)
