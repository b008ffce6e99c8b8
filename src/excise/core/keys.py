"""What decides a result, as plain data: the identity of inputs, of code and of libraries.

A stage's key is made here and nowhere else. A value whose identity is not known is refused, so
that nothing that decides a result can be left out. This module imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import math
import platform
import secrets
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, get_args, get_origin, runtime_checkable

from excise.core.config import Config
from excise.core.disk import file_sum

LIBRARIES = (
    "excise", "torch", "transformers", "tokenizers", "safetensors", "numpy", "jinja2", "peft",
    "accelerate", "liger-kernel", "lm-eval",
)  # fmt: skip
"""Packages that decide numbers."""


@runtime_checkable
class Keyed(Protocol):
    """A value that knows its identity: a model by its bytes, a domain by its rows."""

    @property
    def identity(self) -> Any:
        """JSON-able data that differs wherever the value does."""
        ...


@dataclass(frozen=True)
class ByContent:
    """Marks a text field of a configuration that names something on disk.

    Attributes:
        identity: Returns what lies there; the name itself does not count.
    """

    identity: Callable[[str], Any]


def file_identity(name: str) -> Any:
    """Return the identity of a file or folder by its bytes; of a name without one, the name."""
    path = Path(name).expanduser()
    if not name:
        return name
    if path.is_file():
        return {"file": file_sum(path)}
    if path.is_dir():
        return {"folder": {p.relative_to(path).as_posix(): file_sum(p) for p in _files(path)}}
    return name


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files under a folder in a fixed order."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path


FilePath = Annotated[str, ByContent(file_identity)]
"""A field that names a file or a folder; empty for none."""


def identity(value: Any) -> Any:
    """Return JSON-able data that differs wherever a value does.

    Args:
        value: A model, a domain, a configuration, a path (its bytes count), a dataclass or a
            container of those, or plain data.

    Returns:
        Its identity.

    Raises:
        TypeError: If the identity of such a value is not known.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else repr(value)
        case bytes():
            return {"bytes": hashlib.sha256(value).hexdigest()}
        case Path():
            return file_identity(str(value))
        case Keyed():
            return value.identity
        case Config():
            return config_identity(value)
        case Mapping():
            return {"map": sorted(([identity(k), identity(v)] for k, v in value.items()), key=repr)}
        case list() | tuple():
            return [identity(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": class_identity(type(value)), **fields_identity(value)}
    raise TypeError(f"nothing is known of what makes two {type(value).__name__} values equal")


def fields_identity(value: Any) -> dict[str, Any]:
    """Return the identity of every field of a dataclass.

    Raises:
        TypeError: Naming the field whose identity is not known.
    """
    found = {}
    for field in fields(value):
        known = field.metadata.get("identity", identity)
        try:
            found[field.name] = known(getattr(value, field.name))
        except TypeError as error:
            raise TypeError(f"{type(value).__name__}.{field.name}: {error}") from None
    return found


def config_identity(config: Config) -> dict[str, Any]:
    """Return the identity of a configuration: its class, third-party code, and its fields.

    A field marked `ByContent` counts as what lies on disk. Any other text that names something on
    disk counts as text and as what lies there, unless its field lists the values it may take.
    """
    found: dict[str, Any] = {}
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        marks = [mark for mark in info.metadata if isinstance(mark, ByContent)]
        if marks:
            found[name] = marks[0].identity(value)
        elif get_origin(info.annotation) is Literal:
            found[name] = value
        else:
            found[name] = _setting(value, *_marks(info.annotation))
    return {"class": class_identity(type(config)), "fields": found}


def _marks(annotation: Any) -> list[ByContent]:
    """Return the marks inside an annotation, as in `dict[str, FilePath]`."""
    own = [mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, ByContent)]
    return own + [mark for part in get_args(annotation) for mark in _marks(part)]


def _setting(value: Any, mark: ByContent | None = None, *_: ByContent) -> Any:
    """Return the identity of a setting, texts in it by what they name."""
    if isinstance(value, Mapping):
        return {str(k): _setting(v, mark) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_setting(item, mark) for item in value]
    if not isinstance(value, str):
        return identity(value)
    if mark is not None:
        return mark.identity(value)
    try:
        there = value not in ("", ".", "..", "/", "~") and Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a long text is no path
        there = False
    return {"text": value, "there": file_identity(value)} if there else value


def class_identity(cls: type) -> Any:
    """Return what a class is: its name, its declared version, and its code where it is not ours."""
    found: dict[str, Any] = {"name": cls.__qualname__}
    version = getattr(cls, "version", None)
    if isinstance(version, int | str):
        found["version"] = version
    if cls.__module__.split(".")[0] != "excise":
        found["source"] = source_of(cls)
    return found


@functools.cache
def source_of(cls: type) -> tuple[str, ...]:
    """Return what tells apart the code that a third-party class stands on: sums and versions.

    That is its own module (the whole package, where it lies in one) and every module it has
    imported, but for the standard library and for installed packages, which count by version. A
    class without a file, made at a prompt, counts by its text, or else as new in every process.
    """
    module = sys.modules.get(cls.__module__)
    if module is None or getattr(module, "__file__", None) is None:
        try:
            text = inspect.getsource(cls)
        except (OSError, TypeError):
            text = secrets.token_hex(16)
        return (hashlib.sha256(text.encode()).hexdigest(),)
    code, todo, seen = set[str](), [module], set[str]()
    while todo:
        module = todo.pop()
        top = module.__name__.split(".")[0]
        known = {"excise"} | sys.stdlib_module_names
        if module.__name__ in seen or top in known or not getattr(module, "__file__", None):
            continue
        seen.add(module.__name__)
        if _installed(module) and top != cls.__module__.split(".")[0]:
            code |= _versions_of(top)
            continue
        code |= _sums_of(module, top)
        todo += _imported(module)
    return tuple(sorted(code))


def _installed(module: types.ModuleType) -> bool:
    """Return whether a module belongs to an installed package."""
    return bool({"site-packages", "dist-packages"} & set(Path(str(module.__file__)).parts))


def _versions_of(top: str) -> set[str]:
    """Return the distributions that bring a package, with their versions."""
    names = _distributions().get(top, ())
    return {f"{name}=={importlib.metadata.version(name)}" for name in names}


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Return which distributions bring which packages."""
    return importlib.metadata.packages_distributions()


def _sums_of(module: types.ModuleType, top: str) -> set[str]:
    """Return the sum of a module's file, or of all files of the package it lies in."""
    loaded = getattr(module, "__sha256__", None)  # of a user's file, as it was when imported
    if loaded is not None:
        return {str(loaded)}
    package = getattr(sys.modules.get(top), "__path__", None)
    if not package:
        return {file_sum(Path(str(module.__file__)))}
    return {file_sum(path) for root in package for path in sorted(Path(root).rglob("*.py"))}


def _imported(module: types.ModuleType) -> list[types.ModuleType]:
    """Return the modules that the names in a module come from."""
    names = set()
    for value in list(vars(module).values()):
        name = value.__name__ if isinstance(value, types.ModuleType) else None
        name = name or getattr(value, "__module__", None)
        if isinstance(name, str):
            names.add(name)
    return [sys.modules[name] for name in sorted(names) if name in sys.modules]


@functools.cache
def library_versions() -> Mapping[str, str]:
    """Return the versions of Python and of the installed libraries that decide numbers."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def own_source() -> str:
    """Return the sum over our own code: in a checkout, the version says too little."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0{file_sum(path)}\n".encode())
    return digest.hexdigest()
