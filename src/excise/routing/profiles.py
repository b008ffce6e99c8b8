"""The model before its modules were cut off, and every profile that can be served from it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from excise.core.errors import UserError, nearest
from excise.models.checkpoint import Checkpoint
from excise.models.names import parameters_by_name
from excise.routing.change import put_tensor
from excise.routing.groups import Part
from excise.routing.measures import refresh
from excise.routing.modules import How, Placed, cut


def save_before(model: nn.Module, placed: Placed, names: Sequence[str], path: Path) -> None:
    """Write a model with its modules as safetensors, all at once or not at all.

    Args:
        model: The model.
        placed: Its modules; which units they are is written into the file's header.
        names: The capability of each module, in order.
        path: The file.
    """
    from safetensors.torch import save_file

    parts = {g: [p.model_dump(mode="json") for p in own] for g, own in placed.parts.items()}
    said = {"parts": parts, "grown": placed.grown, "capabilities": list(names)}
    tensors = {n: p.detach().cpu().contiguous() for n, p in parameters_by_name(model).items()}
    work = path.with_name(path.name + ".partial")
    save_file(tensors, work, metadata={"modules": json.dumps(said, sort_keys=True)})
    os.replace(work, path)


def serve(
    start: Checkpoint, before: Path, keep: Sequence[str] = (), *, how: How | None = None
) -> Any:
    """Return the model of one profile: the core and the modules that a user may have.

    Args:
        start: What the method started from.
        before: The file `before_ablation` among the files of the removal.
        keep: Capabilities whose modules stay; all others are cut off.
        how: How; by default grown modules are deleted and carved ones zeroed.

    Returns:
        A `transformers` model in evaluation mode. With modules of unlike widths left in its
        blocks it runs, but no configuration describes it.

    Raises:
        UserError: If a capability is unknown or the file is not such a file.
    """
    from safetensors import safe_open

    with safe_open(before, framework="pt") as file:
        header = file.metadata() or {}
        if "modules" not in header:
            raise UserError(f"{before} does not say which modules it has; name `before_ablation`")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if any(".lora_" in name for name in tensors):
        raise UserError(f"the modules in {before} are adapters; switch them with peft instead")
    said = json.loads(header["modules"])
    parts = {g: tuple(map(Part.model_validate, own)) for g, own in said["parts"].items()}
    placed, names = Placed(parts, bool(said["grown"])), said["capabilities"]
    for name in keep:
        if name not in names:
            raise UserError(f"there is no capability '{name}' to keep; {nearest(name, names)}")
    model = start.load()
    for name, tensor in tensors.items():
        put_tensor(model, name, tensor)
    refresh(model)
    kept = [f"module_{names.index(name) + 1}" for name in keep]
    cut(model, placed, how or ("delete" if placed.grown else "zero"), 0, kept)
    return model.eval()
