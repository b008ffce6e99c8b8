"""Write a model folder again with some parameters changed and every other byte as it was."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from excise.core.errors import UserError
from excise.models import files
from excise.models.folder import INDEX, WEIGHTS
from excise.models.layout import Group, read_group, to_disk

if TYPE_CHECKING:
    from excise.models.checkpoint import Checkpoint

WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pkl",
     ".npz", ".ot"}
)  # fmt: skip
"""Endings of files that hold weights, in whichever format."""

_Make = Callable[[], dict[str, Tensor]]


def write_changed(
    source: Checkpoint,
    changed: Mapping[str, Tensor],
    to: Path,
    *,
    dtype: torch.dtype | None,
    link: bool,
) -> None:
    """Do the work of `Checkpoint.write`; arguments and errors are the same."""
    files.check_free(to)
    plan = _plan(source, changed)
    with files.new_folder(to) as work:
        grown = 0
        for shard in source.shards:
            here = {key for key, entry in source.entries.items() if entry.file == shard}
            dtypes = {
                key: dtype or source.entries[key].dtype
                for _, keys in plan
                for key in keys
                if key in here
            }
            if dtypes:
                new = _values(plan, dtypes)
                grown += files.rewrite_shard(shard, work / shard.name, dtypes, new)
            elif link:
                os.link(shard.resolve(), work / shard.name)
            else:
                files.clone_file(shard, work / shard.name)
        _copy_side_files(source, work, grown)


def _values(
    plan: list[tuple[_Make, tuple[str, ...]]], dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the new values of one shard, one group in memory at a time."""
    for make, keys in plan:
        if dtypes.keys().isdisjoint(keys):
            continue
        for key, tensor in make().items():
            if key not in dtypes:
                continue
            stored = tensor.to(dtypes[key])
            if not torch.equal(torch.isfinite(stored), torch.isfinite(tensor)):
                raise UserError(
                    f"the new value of '{key}' does not fit {dtypes[key]}; store a wider dtype"
                )
            yield key, stored


def _plan(source: Checkpoint, changed: Mapping[str, Tensor]) -> list[tuple[_Make, tuple[str, ...]]]:
    """Return, for every group on disk that changes, how to make it and its keys."""
    layout = source.layout
    by_group: dict[tuple[str, ...], tuple[Group, dict[str, Tensor]]] = {}
    for given, tensor in changed.items():
        name = source.own_name(given)
        shape = layout.model.get_parameter(name).shape
        if tensor.shape != shape:
            raise UserError(
                f"the new value of '{name}' has shape {list(tensor.shape)} and the model in"
                f" {source.path} needs {list(shape)}"
            )
        found = [alias for alias in layout.aliases[name] if alias in layout.groups]
        if not found:
            raise UserError(f"{source.path} holds no weights for '{name}'")
        for alias in found:  # a tie stored twice is written twice
            group = layout.groups[alias]
            by_group.setdefault(group.names, (group, {}))[1][alias] = tensor
    return [
        (functools.partial(_on_disk, source, group, new), tuple(key for key, _ in group.keys))
        for group, new in by_group.values()
    ]


def _on_disk(source: Checkpoint, group: Group, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a group as stored, reading the members that did not change."""
    tensors = {name: tensor.detach().cpu() for name, tensor in new.items()}
    if len(tensors) < len(group.names):
        tensors = {**read_group(source.layout, group, source.read), **tensors}
    return to_disk(source.layout, group, tensors, source.entries)


def _copy_side_files(source: Checkpoint, work: Path, grown: int) -> None:
    """Copy configuration, tokenizer and texts; the index gets the new total size.

    Code is copied only where it was trusted.
    """
    for path in sorted(source.path.iterdir()):
        weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        code = path.suffix in {".py", ".so"} and not source.trust_remote_code
        if path.is_file() and not weights and not code and not path.name.startswith("."):
            files.clone_file(path, work / path.name)
    if source.tokenizer_path is not None:
        for path in source.tokenizer_files:
            (work / path.name).unlink(missing_ok=True)
            files.clone_file(path, work / path.name)
    templates = source.path / "additional_chat_templates"
    if templates.is_dir():
        (work / templates.name).mkdir()
        for path in sorted(templates.glob("*.jinja")):
            files.clone_file(path, work / templates.name / path.name)
    if (source.path / WEIGHTS).is_file():
        return
    index = json.loads((source.path / INDEX).read_text(encoding="utf-8"))
    if grown and "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] += grown
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (work / INDEX).write_text(text, encoding="utf-8")
