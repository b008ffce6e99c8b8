"""State of an interrupted training run on disk: safetensors and JSON, never a pickle.

`step-00000120/` holds the trained weights (float32 masters where there are any), the moments of
the optimizers and the cursor, all of one step: it is written under another name and renamed, so
that a kill leaves the previous state or the next, never a mixture. `steps.jsonl` logs every step
record; lines after the cursor belong to steps that will be done again.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from excise.core.disk import disk_full
from excise.core.errors import UserError
from excise.train.optim import Optimizer
from excise.train.slices import Slice

VERSION = 1
"""Version of the layout."""


@dataclass
class Group:
    """Parameters, or slices of them, that are stepped together with an optimizer of their own.

    Attributes:
        name: Name of the group.
        slices: Which parameters of the model, or which slices of them.
        leaves: What the optimizer steps: the parameters, views of them, or float32 masters of
            half ones.
        optimizer: Its state.
        lr: Learning rate before the schedule.
    """

    name: str
    slices: Sequence[Slice]
    leaves: Sequence[Tensor]
    optimizer: Optimizer
    lr: float

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters of the model, whole, one for each leaf."""
        return [one.param for one in self.slices]

    def mastered(self, i: int) -> bool:
        """Return whether leaf `i` has memory of its own, in a wider dtype."""
        return self.leaves[i].dtype != self.slices[i].param.dtype

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model's parameters."""
        for i, (one, leaf) in enumerate(zip(self.slices, self.leaves, strict=True)):
            if self.mastered(i):
                one.of(one.param).copy_(leaf)


def identity(settings: str, groups: Sequence[Group]) -> dict[str, Any]:
    """Return what must be equal for a state to belong to a run.

    Args:
        settings: Digest of the settings that decide the weights.
        groups: The groups; names and shapes count.
    """
    shapes = {g.name: [one.shape for one in g.slices] for g in groups}
    return {"version": VERSION, "settings": settings, "groups": shapes}


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers a model would save, such as running means."""
    kept = set(model.state_dict().keys())
    return {name: b for name, b in model.named_buffers() if name in kept}


def _fsync(path: Path) -> None:
    """Push a file to the disk."""
    with path.open("rb") as f:
        os.fsync(f.fileno())


def save_state(
    folder: Path,
    cursor: int,
    groups: Sequence[Group],
    buffers: Mapping[str, Tensor],
    who: Mapping[str, Any],
    *,
    moments: bool = True,
) -> None:
    """Write the state after `cursor` steps and drop older ones.

    Args:
        folder: State folder; made if missing.
        cursor: Steps done.
        groups: Weights and optimizers.
        buffers: Buffers of the model.
        who: What `identity` gave.
        moments: Whether to write the optimizers' moments, which a finished run needs no more.

    Raises:
        UserError: If the disk is full.
    """
    final = folder / f"step-{cursor:08d}"
    tensors = {f"buffer/{name}": b for name, b in buffers.items()}
    for g in groups:
        tensors |= {f"weight/{g.name}/{i}": leaf for i, leaf in enumerate(g.leaves)}
        if moments:
            tensors |= {f"moment/{g.name}/{k}": t for k, t in g.optimizer.tensors().items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    state = {
        **who,
        "cursor": cursor,
        "moments": moments,
        "steps": {g.name: g.optimizer.steps for g in groups},
    }
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        with disk_full(folder, needed):
            _write(temporary, tensors, state)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in folder.iterdir():
        if old != final and old.name.startswith(("step-", ".step-")):
            shutil.rmtree(old, ignore_errors=True)


def _write(temporary: Path, tensors: dict[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write both files of a state and push them to the disk."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_file(tensors, temporary / "state.safetensors")
    except SafetensorError as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, str(error)) from None
        raise
    (temporary / "state.json").write_text(json.dumps(state, sort_keys=True) + "\n")
    for name in ("state.safetensors", "state.json"):
        _fsync(temporary / name)


def load_state(
    folder: Path, groups: Sequence[Group], buffers: Mapping[str, Tensor], who: Mapping[str, Any]
) -> int:
    """Put the newest whole state back into model and optimizers.

    Args:
        folder: State folder; need not exist.
        groups: Groups as `save_state` saw them, freshly made.
        buffers: Buffers of the model.
        who: What `identity` gives for this run.

    Returns:
        Steps done: 0 when there is no state, or none that can be read.

    Raises:
        UserError: If the folder holds the state of another run.
    """
    if not folder.is_dir():
        return 0
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            state = json.loads((path / "state.json").read_text())
            tensors = load_file(path / "state.safetensors")
        except (OSError, ValueError, SafetensorError):
            continue  # cut short by a power failure: an older state, or the start, serves
        if {key: state.get(key) for key in who} != dict(who):
            raise UserError(
                f"{path} holds the state of a training run with other settings; "
                "restore them or remove the folder"
            )
        _restore(groups, buffers, tensors, state)
        return int(state["cursor"])
    return 0


@torch.no_grad()
def _restore(
    groups: Sequence[Group],
    buffers: Mapping[str, Tensor],
    tensors: dict[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Copy tensors into leaves, buffers and optimizers."""
    for name, buffer in buffers.items():
        buffer.copy_(tensors[f"buffer/{name}"])
    for g in groups:
        for i, leaf in enumerate(g.leaves):
            leaf.copy_(tensors[f"weight/{g.name}/{i}"])
        prefix = f"moment/{g.name}/"
        mine = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        g.optimizer.restore(mine, state["steps"][g.name])
        g.publish()


class Log:
    """Append-only log of step records; without a folder it keeps nothing.

    Attributes:
        path: The file, or None.
    """

    def __init__(self, folder: Path | None) -> None:
        """Keep the log in `folder / "steps.jsonl"`."""
        self.path = None if folder is None else folder / "steps.jsonl"

    def replay(self, cursor: int) -> list[dict[str, Any]] | None:
        """Return the records of the first `cursor` steps and drop later lines.

        Returns:
            The records, or None when the log is not whole, so that the run must start over.
        """
        if self.path is None:
            return []
        rows: list[dict[str, Any]] = []
        lines = self.path.read_bytes().splitlines() if self.path.is_file() else []
        for line in lines[:cursor]:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        if len(rows) < cursor or any(row.get("step") != i for i, row in enumerate(rows)):
            return None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".steps.{os.getpid()}")
        temporary.write_bytes(b"".join(line + b"\n" for line in lines[:cursor]))
        temporary.replace(self.path)
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one record."""
        if self.path is not None:
            with disk_full(self.path), self.path.open("a") as f:
                f.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Push the log to the disk."""
        if self.path is not None and self.path.is_file():
            _fsync(self.path)
