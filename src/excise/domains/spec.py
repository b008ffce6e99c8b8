"""What builds a domain: a configuration with `build`.

This module imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from excise.config import Config
from excise.domains.base import Domain

if TYPE_CHECKING:
    from excise.models.checkpoint import Checkpoint


class DomainSpec(Config, ABC):
    """A way to make a domain: files, a generator, a shipped corpus.

    Subclasses declare `name: Literal["..."] = "..."` and their settings, and implement `build`.
    Two equal specs build equal domains (equal `Domain.fingerprint`), whatever the process.
    """

    kind: ClassVar[str] = "domain"
    name: str
    """Name in recipes and on the command line."""

    @abstractmethod
    def build(self, model: Checkpoint | None) -> Domain:
        """Return the domain.

        Args:
            model: The model it is for, where the rows depend on it (tokenizer, what it knows).
                None when there is none yet; specs that need one say so in a `UserError`.

        Returns:
            The rows of every role.

        Raises:
            UserError: If the data cannot be read or cannot be split as asked.
        """
