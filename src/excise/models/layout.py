"""Where a model's parameters lie in its files: names, fused layouts and ties.

A parameter may have another name on disk, be stored in pieces (the experts of a mixture are one
tensor in memory and many on disk) or be stored under the name of a tensor it is tied to. The rules
are those of transformers (`core_model_loading`); they are run on the meta device, over headers
alone, to find which keys make which parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from excise.models.files import Entry
from excise.models.spec import Model


@dataclass(frozen=True)
class TensorGroup:
    """Tensors in memory and the tensors on disk they are made of.

    Attributes:
        names: Names in memory.
        keys: (key on disk, the pattern of the conversion that took it), in loading order.
        converter: The conversion; None when the one tensor is stored as it is.
    """

    names: tuple[str, ...]
    keys: tuple[tuple[str, str], ...]
    converter: Any = None


@dataclass(frozen=True)
class Layout:
    """The map between a model and its files.

    Attributes:
        model: The model on the meta device.
        parameters: Names as in `model.named_parameters()`.
        aliases: Every name of each parameter, its own first; more than one where it is tied.
        groups: Group by name in memory.
        missing: Names in memory that no file holds.
        unexpected: Keys in files that the model does not use.
        mismatched: (name, shape in the files, shape in the model).
    """

    model: Model
    parameters: tuple[str, ...]
    aliases: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, TensorGroup]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def group_of(self, name: str) -> TensorGroup | None:
        """Return the group that stores parameter `name`, under its own or a tied name."""
        for alias in self.aliases[name]:
            if alias in self.groups:
                return self.groups[alias]
        return None


def build_layout(
    model: Model, entries: Mapping[str, Entry], same: Callable[[str, str], bool]
) -> Layout:
    """Map the keys of a folder to the parameters of a model.

    Args:
        model: The model on the meta device; a tie that the files contradict is cut.
        entries: Every tensor of the folder's shards.
        same: Whether two keys on disk hold the same values.

    Returns:
        The map; what does not fit is listed in it, not raised.
    """
    state = model.state_dict()
    groups: dict[str, TensorGroup] = {}
    mismatched = []
    plans, unexpected = _plan(model, entries, state)
    for first, (keys, converter) in plans.items():
        metas = {
            key: torch.empty(entries[key].shape, dtype=entries[key].dtype, device="meta")
            for key, _ in keys
        }
        tensors = _convert(model, first, keys, converter, metas)
        group = TensorGroup(tuple(tensors), tuple(keys), converter)
        for name, tensor in tensors.items():
            if name in state and tensor.shape != state[name].shape:
                mismatched.append((name, tuple(tensor.shape), tuple(state[name].shape)))
            groups[name] = group
    _cut_ties(model, groups, same)
    aliases = _aliases(model)
    covered = {other for names in aliases.values() if groups.keys() & set(names) for other in names}
    missing = tuple(k for k in state if k not in groups and k not in covered)
    return Layout(
        model, tuple(aliases), aliases, groups, missing, tuple(unexpected), tuple(mismatched)
    )


def _aliases(model: Model) -> dict[str, tuple[str, ...]]:
    """Return all names of every parameter, by the name `named_parameters` gives it."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {group[0]: tuple(group) for group in names.values()}


def _cut_ties(
    model: Model, groups: Mapping[str, TensorGroup], same: Callable[[str, str], bool]
) -> None:
    """Untie parameters that are stored twice with different values, as loading does."""
    for names in _aliases(model).values():
        stored = [n for n in names if n in groups and groups[n].converter is None]
        for name in stored[1:]:
            if same(groups[stored[0]].keys[0][0], groups[name].keys[0][0]):
                continue
            parent, _, leaf = name.rpartition(".")
            own = torch.nn.Parameter(torch.empty_like(model.get_parameter(name)))
            setattr(model.get_submodule(parent), leaf, own)


def _plan(
    model: Model, entries: Mapping[str, Entry], state: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[list[tuple[str, str]], Any]], list[str]]:
    """Rename every key as loading does; return what each first name is made of, and the rest.

    Source: `convert_and_load_state_dict_in_model` of transformers 5.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    known = dict(state)
    plans: dict[str, tuple[list[tuple[str, str]], Any]] = {}
    unexpected = []
    for key in sorted(entries, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name not in state:
            unexpected.append(key)
            continue
        converter = None if pattern is None else by_pattern[pattern]
        plans.setdefault(name, ([], converter))[0].append((key, pattern or key))
    model._weight_conversions = [m for m in mapping if m.was_used()]
    return plans, unexpected


def _convert(
    model: Model,
    first: str,
    keys: list[tuple[str, str]] | tuple[tuple[str, str], ...],
    converter: Any,
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Make the tensors in memory from those on disk."""
    if converter is None:
        return {first: tensors[keys[0][0]]}
    worker = copy.deepcopy(converter)
    for key, pattern in keys:
        worker.add_tensor(first, key, pattern, tensors[key])
    converted = worker.convert(first, model=model, config=model.config)
    return {name: t[0] if isinstance(t, list) else t for name, t in converted.items()}


def read_group(
    layout: Layout, group: TensorGroup, read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Read a group from disk and return its tensors by name in memory."""
    tensors = {key: read(key) for key, _ in group.keys}
    return _convert(layout.model, group.names[0], group.keys, group.converter, tensors)


def to_disk(
    layout: Layout,
    group: TensorGroup,
    tensors: Mapping[str, Tensor],
    entries: Mapping[str, Entry],
) -> dict[str, Tensor]:
    """Turn the tensors of a group into the tensors on disk they are stored as.

    Args:
        layout: The map.
        group: The group.
        tensors: Every tensor of the group by name in memory.
        entries: Entries of the files, for shapes and to find the names.

    Returns:
        Tensors by key on disk, shapes as stored.
    """
    if group.converter is None:
        return {group.keys[0][0]: tensors[group.names[0]]}
    from transformers.core_model_loading import revert_weight_conversion

    wanted = {key for key, _ in group.keys}
    prefix = layout.model.base_model_prefix + "."
    stored = {}
    for name, tensor in revert_weight_conversion(layout.model, dict(tensors)).items():
        names = {name, name.removeprefix(prefix), prefix + name} & wanted
        assert len(names) == 1, f"{name} has no single place in the files"
        key = names.pop()
        assert tuple(tensor.shape) == entries[key].shape, f"{key} has another shape on disk"
        stored[key] = tensor
    assert stored.keys() == wanted, "the conversion back does not fill the files"
    return stored
