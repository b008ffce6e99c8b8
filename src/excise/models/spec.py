"""Which model a recipe is about: one that exists, or one that is trained from scratch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from excise.core.config import SIGNED, Config

Model = Any
"""A `transformers` model; typed loosely because its stubs are."""

Family = Literal[
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "olmo2",
    "mixtral",
]  # fmt: skip


class Scratch(Config):
    """A random model of a known family, small enough to train here."""

    family: Family = "llama"
    """Architecture."""
    width: int = 96
    """Residual width."""
    blocks: int = 2
    """Number of blocks."""
    overrides: Annotated[dict[str, int | float | str | bool], SIGNED] = {}
    """Any other field of the family's configuration."""


class ModelSpec(Config):
    """The original: `path` names one that exists, `scratch` one the recipe trains."""

    path: str = ""
    """Folder, hub id, GGUF file, or a name that `excise fetch` knows."""
    revision: str | None = None
    """Revision of a hub id."""
    tokenizer: str = ""
    """Folder or hub id of the tokenizer, when it does not lie beside the model."""
    scratch: Scratch | None = None
    """Architecture of a model trained from scratch."""
