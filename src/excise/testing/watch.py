"""What a method or an attack leaves behind: hooks, gradients, changed inputs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from excise.models.checkpoint import Checkpoint

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Where a module keeps its hooks."""


@dataclass(frozen=True)
class Seen:
    """A model that was loaded, and how it was then."""

    model: nn.Module
    modules: frozenset[str]
    hooks: int
    needed: dict[str, bool]


@dataclass(frozen=True)
class Watched(Checkpoint):
    """A checkpoint that remembers the models loaded from it and from what is written of it.

    Attributes:
        seen: Every model loaded so far.
        padding_side: Side its tokenizer pads on; empty for its own choice.
    """

    seen: list[Seen] = field(default_factory=list, repr=False, compare=False)
    padding_side: str = ""

    def load(self, **how: Any) -> Any:
        """Load the model and remember it; see `Checkpoint.load`."""
        return self._note(super().load(**how))

    def load_prefix(self, blocks: int, **how: Any) -> Any:
        """Load the first blocks and remember them; see `Checkpoint.load_prefix`."""
        return self._note(super().load_prefix(blocks, **how))

    def tokenizer(self) -> Any:
        """Load the tokenizer, set to pad on the wanted side."""
        tokenizer = super().tokenizer()
        if self.padding_side:
            tokenizer.padding_side = self.padding_side
        return tokenizer

    def _note(self, model: Any) -> Any:
        modules = frozenset(name for name, _ in model.named_modules())
        needed = {name: p.requires_grad for name, p in model.named_parameters()}
        self.seen.append(Seen(model, modules, count_hooks(model), needed))
        return model


def watched(checkpoint: Checkpoint, *, padding_side: str = "") -> Watched:
    """Return the same checkpoint, watched."""
    return Watched(
        checkpoint.path,
        checkpoint.trust_remote_code,
        checkpoint.tokenizer_path,
        padding_side=padding_side,
    )


def count_hooks(model: nn.Module) -> int:
    """Return the number of hooks on a model's modules, those of transformers itself left out."""
    total = 0
    for module in model.modules():
        for kind in HOOKS:
            total += sum(not _library(hook) for hook in getattr(module, kind).values())
    return total


def _library(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "") or "").startswith("transformers.")


def assert_left_clean(seen: list[Seen], who: str) -> None:
    """Assert that every model that was loaded carries no hook and needs gradients as before.

    Args:
        seen: What `Watched` remembered.
        who: Beginning of the message.
    """
    for one in seen:
        now = {name for name, _ in one.model.named_modules()}
        odd = sorted(now ^ one.modules)
        assert not odd, f"{who} left module '{odd[0]}' added to or missing from a model it loaded"
        left = count_hooks(one.model) - one.hooks
        assert left <= 0, (
            f"{who} left {left} hooks on a model it loaded; use excise.models.hooks.capture or "
            "edit, or remove them in a finally"
        )
        after = {name: p.requires_grad for name, p in one.model.named_parameters()}
        turned = [name for name, flag in one.needed.items() if after.get(name, flag) != flag]
        assert not turned, (
            f"{who} left requires_grad of '{turned[0]}' changed; use excise.models.hooks.trainable"
        )
    assert not torch.nn.modules.module._global_forward_hooks, f"{who} left a global hook"


def look(folder: Path) -> dict[str, tuple[str, int]]:
    """Return SHA-256 and time of change of every file under a folder, by its name."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_untouched(before: dict[str, tuple[str, int]], folder: Path, who: str) -> None:
    """Assert that a folder holds the same files, bytes and times as before.

    Args:
        before: What `look` returned.
        folder: The folder.
        who: Beginning of the message.
    """
    after = look(folder)
    for name in sorted(before.keys() | after.keys()):
        assert name in after, f"{who} removed {name} from the model folder it was given"
        assert name in before, (
            f"{who} wrote {name} into the model folder it was given; write under ctx.work"
        )
        assert after[name] == before[name], (
            f"{who} changed {name} in the model folder it was given; write under ctx.work"
        )
