"""Attacks on edited models, read between rails: the package, and `ex.audit(...)` itself.

The design gives one name to the subpackage and to the function of the Python interface; importing
the former would hide the latter, so the package can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A module that can be called: `ex.audit(model, original=..., domain=...)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Attack models and judge them; arguments of `excise.api.audit`."""
        from excise.api import audit

        return audit(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
