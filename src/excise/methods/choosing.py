"""The rule by which one of several settings is chosen: on `dev`, within a retain budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from torch import nn

from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.evals.score import measure

RULE = (
    "highest dev_forget loss among those whose dev_retain loss is at most retain_budget above "
    "the original's; if there is none, lowest dev_retain loss"
)


class DevLosses(Protocol):
    """What a choice looks at."""

    @property
    def forget(self) -> float:
        """Loss on `dev` forget text, nats per token."""
        ...

    @property
    def retain(self) -> float:
        """Loss on `dev` retain text."""
        ...


D = TypeVar("D", bound=DevLosses)


def better(new: D, old: D | None, limit: float) -> bool:
    """Return whether a setting is to be preferred.

    Within the limit the highest forget loss wins, beyond it the lowest retain loss.

    Args:
        new: A setting that was tried.
        old: The best so far; None for none.
        limit: The highest retain loss allowed, nats per token.
    """
    if old is None:
        return True
    fits = new.retain <= limit
    if fits != (old.retain <= limit):
        return fits
    return new.forget > old.forget if fits else new.retain < old.retain


def check_dev(domain: Domain, who: str) -> None:
    """Refuse a domain without rows to choose on.

    Args:
        domain: Rows by role.
        who: What chooses, for the message.

    Raises:
        UserError: If `dev_forget` or `dev_retain` is empty.
    """
    if not domain.dev_retain or not any(domain.dev_forget.values()):
        raise UserError(
            f"domain '{domain.name}' has no dev rows for {who} to choose on; give some "
            "to forget and some to retain"
        )


def dev_losses(
    model: nn.Module, tokenizer: Any, domain: Domain, rows: int, max_length: int
) -> tuple[float, float]:
    """Return mean losses (nats per token) on `dev` forget and retain rows; topics count alike.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        domain: Gives `dev_forget` and `dev_retain`.
        rows: Rows of each set at most.
        max_length: Tokens per row.

    Raises:
        NotFinite: If the model gives no numbers.
    """

    def score(part: Sequence[Any]) -> float:
        scores = measure(
            model, tokenizer, part[:rows], "text_loss", max_length=max_length, batch_size=16
        )
        return scores.checked().mean

    topics = [score(part) for part in domain.dev_forget.values() if part]
    return sum(topics) / len(topics), score(domain.dev_retain)
