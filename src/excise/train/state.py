"""State of an interrupted training run on disk: safetensors and JSON, never a pickle.

`step-00000120/` holds the master weights, the optimizers' moments and the cursor, all of one step:
it is written under another name and renamed, so that a kill leaves the previous state or the next,
never a mixture. `steps.jsonl` logs every step record; lines after the cursor belong to steps that
will be done again. `state.json` holds SHA-256 sums of the tensors, of the log and of itself: a
state whose bytes have changed is never used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from excise.core.disk import disk_full, write_text
from excise.core.errors import UserError
from excise.train.optim import OptimizerGroup, moments_of, put_moments

VERSION = 2
"""Version of the layout."""

TENSORS, FACTS, LOG = "state.safetensors", "state.json", "steps.jsonl"

COUNTERS = ("k", "weight_sum", "lr_max", "train_mode")
"""What schedule-free AdamW counts beside its moments, among the settings of its group."""


@dataclass(frozen=True)
class State:
    """What an intact state holds.

    Attributes:
        cursor: Steps done.
        tensors: Weights, moments and buffers by name.
        records: The records of those steps, as they were logged.
        world: How many processes saved it.
    """

    cursor: int
    tensors: Mapping[str, Tensor]
    records: Sequence[Mapping[str, Any]]
    world: int


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers a model would save, such as running means."""
    saved = set(model.state_dict().keys())
    return {name: b for name, b in model.named_buffers() if name in saved}


def save_state(
    folder: Path,
    cursor: int,
    groups: Sequence[OptimizerGroup],
    buffers: Mapping[str, Tensor],
    run_id: Mapping[str, Any],
    log_sum: str,
    *,
    moments: bool = True,
    write: bool = True,
    world: int = 1,
) -> None:
    """Write the state after `cursor` steps and drop older ones.

    What is cut over processes is written whole, so that any number of them can resume; all of them
    call this then, and one writes.

    Args:
        folder: State folder; made if missing.
        cursor: Steps done.
        groups: Weights and optimizers.
        buffers: Buffers of the model.
        run_id: What must be equal for a state to belong to a run, JSON-able.
        log_sum: SHA-256 of the log's lines, as `Log.sync` gives it.
        moments: Whether to write the optimizers' moments, which a finished run no longer needs.
        write: Whether this process writes.
        world: How many processes train.

    Raises:
        DiskFull: If the disk is full.
    """
    final = folder / f"step-{cursor:08d}"
    tensors = {f"buffer/{name}": b for name, b in buffers.items()}
    for g, group in enumerate(groups):
        parts = group.parts()
        tensors |= {f"weight/{g}/{i}": part.whole(w) for i, (part, w) in enumerate(parts)}
        counted = group.optimizer.param_groups[0]
        for name in (name for name in COUNTERS if name in counted):
            value = torch.tensor(float(counted[name]), dtype=torch.float64)
            tensors[f"counter/{g}/{name}"] = value
        if moments:
            for i, entries in moments_of(group.optimizer).items():
                for name, t in entries.items():
                    tensors[f"optimizer/{g}/{i}/{name}"] = parts[i][0].whole(t)
    if not write:
        return
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    temporary = folder / f".{final.name}.{os.getpid()}"
    facts = {**run_id, "cursor": cursor, "log_sha256": log_sum, "world": world}
    try:
        with disk_full(folder, needed):
            _write(temporary, tensors, facts)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    drop_others(folder, cursor)


def drop_others(folder: Path, cursor: int) -> None:
    """Remove every state but that of one step, and what was half-written of others."""
    for path in folder.iterdir():
        if path.name.startswith(("step-", ".step-")) and path.name != f"step-{cursor:08d}":
            shutil.rmtree(path, ignore_errors=True)


def _write(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write both files of a state and push them to the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        save_file(tensors, folder / TENSORS)
    except SafetensorError as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, str(error)) from None
        raise
    facts |= {"version": VERSION, "tensors_sha256": _sum_of(folder / TENSORS)}
    facts["sha256"] = _sum_of_facts(facts)
    (folder / FACTS).write_text(json.dumps(facts, sort_keys=True) + "\n")
    for name in (TENSORS, FACTS):
        _fsync(folder / name)


def load_state(
    folder: Path, run_id: Mapping[str, Any], note: Callable[[str], None]
) -> State | None:
    """Return the newest intact state of a run.

    Args:
        folder: State folder; need not exist.
        run_id: As `save_state` was given it.
        note: Told in a sentence of every state that is damaged and therefore not used.

    Returns:
        The state, or None when there is none that can be used.

    Raises:
        UserError: If the folder holds the state of another run.
    """
    damaged: list[str] = []
    state = None
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            state = _read(path, folder / LOG, run_id)
            break
        except _Damaged as damage:
            damaged.append(f"the training state {path} is not used, because {damage}")
    follows = f"resumes after step {state.cursor}" if state else "starts over"
    for text in damaged:
        note(f"{text}; training {follows}")
    return state


class _Damaged(Exception):
    """A state's bytes are not those that were written; the text says which."""


def _read(path: Path, log: Path, run_id: Mapping[str, Any]) -> State:
    """Read a state and the log that belongs to it, and check them against their sums."""
    try:
        facts = json.loads((path / FACTS).read_text())
        checksum, version = facts.pop("sha256", ""), facts.get("version")
    except (OSError, ValueError, TypeError, AttributeError):
        raise _Damaged(f"its {FACTS} cannot be read") from None
    if checksum != _sum_of_facts(facts) or version != VERSION:
        raise _Damaged(f"its {FACTS} was changed, or written by another version")
    if {key: facts.get(key) for key in run_id} != json.loads(json.dumps(run_id)):
        raise UserError(
            f"{path} holds the state of a training run with other settings; restore them or "
            "remove the folder"
        )
    lines = log.read_bytes().splitlines(keepends=True) if log.is_file() else []
    lines = lines[: facts["cursor"]]
    if hashlib.sha256(b"".join(lines)).hexdigest() != facts["log_sha256"]:
        raise _Damaged(f"{log.name} beside it lacks steps or was changed")
    try:
        if _sum_of(path / TENSORS) != facts["tensors_sha256"]:
            raise _Damaged(f"its {TENSORS} was changed")
        tensors = load_file(path / TENSORS)
    except OSError:
        raise _Damaged(f"its {TENSORS} cannot be read") from None
    records = [json.loads(line) for line in lines]
    return State(facts["cursor"], tensors, records, facts.get("world", 1))


@torch.no_grad()
def restore(groups: Sequence[OptimizerGroup], buffers: Mapping[str, Tensor], state: State) -> None:
    """Copy a state into master weights, optimizers, model and buffers.

    Args:
        groups: Groups as `save_state` saw them, freshly made.
        buffers: Buffers of the model.
        state: The state.
    """
    for name, buffer in buffers.items():
        buffer.copy_(state.tensors[f"buffer/{name}"])
    for g, group in enumerate(groups):
        moments: dict[int, dict[str, Tensor]] = {}
        parts = group.parts()
        for name, tensor in state.tensors.items():
            if name.startswith(f"optimizer/{g}/"):
                _, _, number, key = name.split("/")
                moments.setdefault(int(number), {})[key] = parts[int(number)][0].here(tensor)
        for i, (part, weight) in enumerate(parts):
            weight.copy_(part.here(state.tensors[f"weight/{g}/{i}"]))
        settings = group.optimizer.param_groups[0]
        for name in (name for name in COUNTERS if f"counter/{g}/{name}" in state.tensors):
            kind = type(settings[name])
            settings[name] = kind(state.tensors[f"counter/{g}/{name}"].item())
        put_moments(group.optimizer, moments)
        group.copy_to_model()


class Log:
    """Append-only log of step records; without a folder it keeps nothing."""

    def __init__(self, folder: Path | None, records: Sequence[Mapping[str, Any]] = ()) -> None:
        """Start `folder / "steps.jsonl"` with the records of steps done, dropping all others."""
        self._path = None if folder is None else folder / LOG
        self._sum = hashlib.sha256()
        text = "".join(map(self._line, records))
        if self._path is not None and self._path.is_file():
            write_text(self._path, text)

    def _line(self, record: Mapping[str, Any]) -> str:
        """Return a record as a line, and count it into the sum."""
        line = json.dumps(record) + "\n"
        self._sum.update(line.encode())
        return line

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record."""
        if self._path is not None:
            with disk_full(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a") as f:
                    f.write(self._line(record))

    def sync(self) -> str:
        """Push the log to the disk; return the SHA-256 of its lines."""
        if self._path is not None and self._path.is_file():
            _fsync(self._path)
        return self._sum.hexdigest()


def _fsync(path: Path) -> None:
    """Push a file to the disk."""
    with path.open("rb") as f:
        os.fsync(f.fileno())


def _sum_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sum_of_facts(facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the facts of a state."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
