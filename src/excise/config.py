"""The base of every configuration: frozen, strict, documented under each field.

This module imports no torch, so that `--help`, `ls` and `check` stay fast.
"""

from __future__ import annotations

import hashlib
import json

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A set of choices. Frozen; unknown fields are errors; help is the docstring under a field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )

    def canonical(self) -> str:
        """Return the configuration as JSON with sorted keys: equal choices give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """Return the SHA-256 of `canonical()` as hex."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()
