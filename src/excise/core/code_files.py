"""Code in a user's file: `./mine.py:Class`, imported by its bytes when the user allows it.

This module imports no torch; what it loads may.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import types
from collections.abc import Mapping
from typing import Any

from excise.core.disk import expand
from excise.core.errors import UserError, nearest


def is_code(name: object) -> bool:
    """Whether a name is a reference to code in a file, `./mine.py:Cls`."""
    return isinstance(name, str) and ".py:" in name


def load_code(reference: str, *, allow: bool) -> Any:
    """Import a file and return the object in it that `reference` names.

    Args:
        reference: `path/to/file.py:Name`.
        allow: Whether the user asked for it with `--allow-code`.

    Raises:
        UserError: If it was not asked for, the file is missing or broken, or holds no such name.
    """
    path_text, _, attribute = reference.rpartition(":")
    path = expand(path_text)
    if not allow:
        raise UserError(f"'{reference}' runs code from {path}; add --allow-code if you trust it")
    if not path.is_file():
        raise UserError(f"'{reference}' names code in {path}, which is not a file")
    # By place and contents: an edited file is another module, and so is a copy elsewhere.
    code = path.read_bytes()
    digest = hashlib.sha256(f"{path.resolve()}\n".encode() + code).hexdigest()
    name = f"excise_user_{path.stem}_{digest[:12]}"
    module = sys.modules.get(name)
    if module is None:
        module = types.ModuleType(name)
        module.__file__ = str(path.resolve())
        module.__dict__["__source__"] = code  # what a key counts: the file may be edited later
        sys.modules[name] = module  # before its code runs: dataclasses look themselves up there
        try:
            exec(compile(code, module.__file__, "exec"), module.__dict__)
        except Exception as error:
            del sys.modules[name]
            raise UserError(f"{path} cannot be imported: {type(error).__name__}: {error}") from None
    if not hasattr(module, attribute):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(f"{path} has no '{attribute}'; {nearest(attribute, public)}")
    return getattr(module, attribute)


def where(cls: type) -> str:
    """Return the reference by which a class from a user's file is loaded again."""
    return f"{inspect.getfile(cls)}:{cls.__qualname__}"


def rebuild(reference: str, fields: Mapping[str, Any]) -> Any:
    """Make a configuration of a user's class in another process of the same run."""
    return load_code(reference, allow=True).model_validate(fields)
