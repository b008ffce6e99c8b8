"""What an inspection of one edit needs, in one value."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SerializeAsAny

from excise.core.config import Config
from excise.data.spec import DomainSpec
from excise.models.spec import ModelSpec


class InspectRun(Config):
    """An original, an edited model and data: `excise inspect` reads nothing else."""

    name: str
    """Short name."""
    title: str = ""
    """One line for the report."""
    domain: SerializeAsAny[DomainSpec]
    """The forget set and the retain set."""
    model: str
    """The edited model: a folder or hub id."""
    arm: str = "edited"
    """What it is called in the report."""
    original: ModelSpec
    """The model before the edit."""
    rows: int = Field(default=256, ge=1)
    """Rows of each side at most."""
    max_length: int = Field(default=128, ge=2)
    """Tokens per row."""
    samples: int = Field(default=4, ge=0)
    """Rows of each side that are shown token by token and continued; none of sensitive data."""
    sensitive: bool = False
    """Keep texts out of record and report, whatever the data says."""
    seed: int = 0
    """Seed of the split, where the data is cut here."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    device: str = "auto"
    """`auto` takes an accelerator where there is one."""
    code: dict[str, str] = {}
    """Names defined by code of one's own, as `./file.py:Class`."""
