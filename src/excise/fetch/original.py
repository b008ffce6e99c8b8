"""The model a recipe names: a folder, a hub id, a GGUF file, or something that was fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from excise.core.errors import UserError
from excise.models.checkpoint import Checkpoint
from excise.models.open import open_checkpoint
from excise.models.spec import ModelSpec


def open_model(spec: ModelSpec) -> Checkpoint:
    """Open the model that a recipe names.

    Raises:
        UserError: If it is not here, was not fetched, or is no model.
    """
    from excise.fetch import cached, fetch, known

    if spec.path in known() and not Path(spec.path).exists():
        if cached(spec.path) is None:
            raise UserError(f"model '{spec.path}' is not here yet; run: excise fetch {spec.path}")
        return open_checkpoint(fetch(spec.path))
    return open_checkpoint(spec.path, revision=spec.revision, tokenizer=spec.tokenizer or None)


def tokenizer_for(domain: Any) -> Any:
    """Return the tokenizer of a domain whose models are trained from scratch.

    Raises:
        UserError: If the domain brings none.
    """
    make = getattr(domain, "tokenizer", None)
    if make is None:
        raise UserError(
            f"domain '{domain.name}' brings no tokenizer for a model trained from scratch; "
            "name a pretrained model in 'model.path'"
        )
    return make()
