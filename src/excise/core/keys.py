"""What decides a result, as plain data: the identity of inputs, of code and of libraries.

A stage's key is made here and nowhere else. A value whose identity is not known is refused, so
that nothing that decides a result can be left out. This module imports no torch.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
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
from excise.core.disk import expand, file_sum

LIBRARIES = (
    "excise", "torch", "transformers", "tokenizers", "safetensors", "numpy", "jinja2", "peft",
    "accelerate", "liger-kernel", "lm-eval", "gguf", "sentencepiece", "tiktoken", "schedulefree",
    "bitsandbytes",
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
    path = expand(name)
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
        there = value not in ("", ".", "..", "/", "~") and expand(value).exists()
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
        if _at_prompt(cls):
            found["beside"] = _beside(cls)
    return found


@functools.cache
def source_of(cls: type) -> tuple[str, ...]:
    """Return what tells apart the code that a third-party class stands on: sums and versions.

    That is its own module (the whole package, where it lies in one) and every module that these
    import, at the top or inside a function, and so on, but for the standard library and for
    installed packages, which count by version. A class without a file, made at a prompt, is new in
    every process.
    """
    if _at_prompt(cls):
        return (secrets.token_hex(16),)
    own = cls.__module__.split(".")[0]
    code, todo, seen = set[str](), [own], {"excise", *sys.stdlib_module_names} - {own}
    while todo:
        top = todo.pop()
        if top in seen:
            continue
        seen.add(top)
        places = _places_of(top)
        if top != own and any({"site-packages", "dist-packages"} & set(p.parts) for p in places):
            code |= _versions_of(top)
            continue
        for place in places:
            for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
                source = _loaded(top) or file.read_bytes()
                sha256 = hashlib.sha256(source).hexdigest()
                alone = place.is_file() and (top == own or _loaded(top) is not None)
                inner = "" if alone else f"{top}/{file.relative_to(place).as_posix()} "
                code.add(inner + sha256)  # two files that trade their contents are other code
                todo += _imported(source) - seen
        todo += _named_in(top) - seen
    return tuple(sorted(code))


def _at_prompt(cls: type) -> bool:
    """Return whether a class lies in no file, as in a notebook."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return file is None or not Path(file).is_file()


def _beside(cls: type) -> list[str]:
    """Return what a class made at a prompt may use: functions, classes and plain values there."""
    module = sys.modules.get(cls.__module__)
    values = {n: v for n, v in vars(module).items() if n[0] != "_" or callable(v)} if module else {}
    values[cls.__qualname__] = cls
    return [f"{name} {_in_memory(value)}" for name, value in sorted(values.items())]


def _in_memory(value: Any) -> str:
    """Return what tells apart functions, classes and plain values in one process; of others, ""."""
    match value:
        case None | bool() | int() | float() | str() | bytes() | tuple():
            return repr(value)
        case types.CodeType():
            return f"{value.co_code!r} {value.co_names} {[_in_memory(c) for c in value.co_consts]}"
        case types.FunctionType():
            return f"{_in_memory(value.__code__)} {value.__defaults__} {value.__kwdefaults__}"
        case type():
            return str({n: _in_memory(v) for n, v in vars(value).items() if n[:2] != "__"})
    return ""


def _loaded(top: str) -> bytes | None:
    """Return the source of a module that was loaded from a user's file, as it was then."""
    source: bytes | None = getattr(sys.modules.get(top), "__source__", None)
    return source


def _places_of(top: str) -> list[Path]:
    """Return the file of a top-level module or the folders of a package, imported or not."""
    module = sys.modules.get(top)
    file, folders = getattr(module, "__file__", None), getattr(module, "__path__", None)
    if module is None:
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            spec = None
        if spec is not None:
            file, folders = spec.origin, spec.submodule_search_locations
    places = [Path(place) for place in folders or [file] if place]
    return [place for place in places if place.exists()]


@functools.cache
def _imported(source: bytes) -> frozenset[str]:
    """Return the top-level names that a source imports from elsewhere, wherever in it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # compiled, or not of this Python
        return frozenset()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return frozenset(name.split(".")[0] for name in names)


def _named_in(top: str) -> set[str]:
    """Return the top-level modules that the values in a loaded module or package come from."""
    names = set()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == top and module is not None:
            for value in list(vars(module).values()):
                of = value.__name__ if isinstance(value, types.ModuleType) else None
                of = of or getattr(value, "__module__", None)
                names |= {of} if isinstance(of, str) else set()
    return {name.split(".")[0] for name in names}


def _versions_of(top: str) -> set[str]:
    """Return the distributions that bring a package, with their versions."""
    names = _distributions().get(top, ())
    return {f"{name}=={importlib.metadata.version(name)}" for name in names}


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Return which distributions bring which packages."""
    return importlib.metadata.packages_distributions()


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
