"""Names of modules and parameters, as users write them and under any wrapper.

A *canonical* name is the one the unwrapped `transformers` model uses: the prefixes of PEFT, DDP,
FSDP and `torch.compile` are taken off.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator
from torch import nn

from excise.core.errors import UserError


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""Names of modules or parameters in a configuration; a single one need not be a list."""

_INNER = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
"""Segments that wrappers put anywhere into a name."""
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|modules_to_save)(\.|$)")
"""Segments of parameters that an adapter adds below the module it wraps."""


def unwrap(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the real path of the innermost model under PEFT, DDP, FSDP and compile, and itself.

    Args:
        model: Any model, wrapped in anything.

    Returns:
        Its prefix with a trailing dot (empty when not wrapped), and the unwrapped model.
    """
    prefix = ""
    while True:
        children = dict(model.named_children())
        only = next(iter(children), "")
        if len(children) == 1 and only in {"module", *_INNER}:
            below = only
        elif "base_model" in children and hasattr(model, "peft_config"):
            below = "base_model.model"
        else:
            return prefix, model
        prefix += below + "."
        model = model.get_submodule(below)


def canonical(name: str, prefix: str = "") -> str:
    """Return `name` without the wrapper `prefix` and without segments of inner wrappers."""
    return ".".join(part for part in name.removeprefix(prefix).split(".") if part not in _INNER)


def is_adapter(name: str) -> bool:
    """Return whether a canonical name lies in what an adapter added to the model."""
    return _ADAPTER.search(name) is not None


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by canonical name; of a wrapper and what it wraps, the wrapper.

    The model itself is the empty name.
    """
    prefix, inner = unwrap(model)
    named: dict[str, nn.Module] = {}
    for name, module in inner.named_modules():
        named.setdefault(canonical(name, prefix), module)
    return named


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter by canonical name, tied ones once, under their first name."""
    prefix, inner = unwrap(model)
    return {canonical(n, prefix): p for n, p in inner.named_parameters()}


def find_modules(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Return the module that each path names: its real path, canonical name, or a unique suffix.

    Args:
        model: The model, wrapped or not.
        paths: Such as `model.layers.5.mlp`, or `layers.5.mlp`.

    Returns:
        The modules by the paths given.

    Raises:
        UserError: If for a path there is none, or several.
    """
    named = modules_by_name(model)
    prefix, _ = unwrap(model)
    modules: dict[str, nn.Module] = {}
    for path in paths:
        wanted = canonical(path, prefix)
        ends = [wanted] if wanted in named else [n for n in named if n.endswith("." + wanted)]
        if len(ends) > 1:
            count, first = len(ends), ends[0]
            raise UserError(f"'{path}' names {count} modules ({first}, ...); give one full name")
        if not ends:
            raise UserError(f"the model has no module '{path}'; {nearest_names(path, named)}")
        modules[path] = named[ends[0]]
    return modules


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return the module that `path` names; see `find_modules`.

    Raises:
        UserError: If there is none, or several.
    """
    return find_modules(model, [path])[path]


def nearest_names(pattern: str, names: Iterable[str], count: int = 5) -> str:
    """Return a phrase with the `count` names closest to `pattern`, compared by their endings."""
    length = pattern.count(".") + 1
    endings = {".".join(n.split(".")[-length:]) for n in names if n}
    endings = {e for e in endings if not e.isdigit()}
    ranked = sorted(
        endings, key=lambda e: (-difflib.SequenceMatcher(None, pattern, e).ratio(), len(e), e)
    )
    return "nearest: " + ", ".join(ranked[:count])


def _readings(pattern: str) -> list[Callable[[str], bool]]:
    """Return the ways to read a pattern, the plainest first: name or suffix, glob, regex."""
    readings: list[Callable[[str], bool]] = [
        lambda name: name == pattern or name.endswith("." + pattern)
    ]
    if re.search(r"[*?\[]", pattern):
        readings.append(
            lambda name: (
                fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, "*." + pattern)
            )
        )
    if re.search(r"[\\()|+^$*\[\]{}?]", pattern):
        try:
            regex = re.compile(pattern)
        except re.error:
            return readings
        readings.append(lambda name: regex.fullmatch(name) is not None)
    return readings


def match(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that `pattern` matches, read the plainest way that matches anything.

    Ways, in order: the full name or a suffix of whole segments (as PEFT's `target_modules`), a
    shell glob of the same, a regular expression that matches the full name.
    """
    names = [name for name in names if name]
    for reads in _readings(pattern):
        if matching := [name for name in names if reads(name)]:
            return matching
    return []


def match_modules(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return canonical names of the modules that any pattern matches, in the model's order.

    Raises:
        UserError: If a pattern matches no module.
    """
    names = list(modules_by_name(model))
    selected: set[str] = set()
    for pattern in patterns:
        hits = match(pattern, names)
        if not hits:
            raise UserError(
                f"no module of the model matches '{pattern}'; {nearest_names(pattern, names)}"
            )
        selected.update(hits)
    return [name for name in names if name in selected]


def _parameter_hits(pattern: str, names: Sequence[str], modules: Sequence[str]) -> set[str]:
    """Return the parameters a pattern names itself or that lie in a module it names."""
    own = match(pattern, [*modules, *names])
    heads = set(own)
    hits = set()
    for name in names:
        parts = name.split(".")
        above = {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
        if added := _ADAPTER.search(name):
            # A pattern that names `down_proj` means its weights, not the adapter laid over it.
            above = {a for a in above if len(a) > added.start()}
        if above & heads:
            hits.add(name)
    return hits


def select(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the parameters that any pattern matches, in the model's order.

    A pattern is a parameter's or module's full name, a suffix of it (`down_proj`,
    `layers.5.mlp.down_proj`), a shell glob (`layers.[5-7].mlp.down_proj`) or a regular expression
    that matches the full name. A module stands for all parameters in it. Tied parameters are
    found under every name and returned once, under the first.

    Args:
        model: The model, wrapped or not.
        patterns: At least one.

    Returns:
        Canonical names, as in `named_parameters()` of the unwrapped model.

    Raises:
        UserError: If a pattern matches nothing, or there is no pattern.
    """
    if not patterns:
        raise UserError("no module was named; give at least one pattern such as 'down_proj'")
    prefix, inner = unwrap(model)
    first = {id(p): name for name, p in parameters_by_name(model).items()}
    every = {
        canonical(n, prefix): first[id(p)]
        for n, p in inner.named_parameters(remove_duplicate=False)
    }
    modules = list(modules_by_name(model))
    selected: set[str] = set()
    for pattern in patterns:
        hits = _parameter_hits(pattern, list(every), modules)
        if not hits:
            near = nearest_names(pattern, [*modules, *every])
            raise UserError(f"'{pattern}' matches no weights of the model; {near}")
        selected.update(every[hit] for hit in hits)
    return [name for name in first.values() if name in selected]


def is_compiled(model: nn.Module) -> bool:
    """Return whether the model or a part of it runs through `torch.compile`."""
    # By name, because importing `torch._dynamo` only to ask takes seconds.
    return any(
        "_orig_mod" in dict(m.named_children())
        or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )
