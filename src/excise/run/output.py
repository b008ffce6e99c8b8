"""The output folder: claimed by one run, written whole, never half."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from excise.core.config import Config
from excise.core.disk import (
    clone_file,
    expand,
    file_sum,
    is_part,
    locked,
    new_file,
    new_folder,
    sweep,
    write_text,
)
from excise.core.errors import DiskFull, UserError
from excise.core.events import Emit, silent
from excise.core.plain import NotPlain, read_yaml
from excise.core.stages import LAYOUT, Runtime, old_stages
from excise.data import split as splits
from excise.data.domain import Domain
from excise.data.spec import DomainSpec
from excise.data.split import split_of
from excise.methods.base import Removal
from excise.models.checkpoint import Checkpoint
from excise.models.delta import write_delta
from excise.record import Item, ModelRef, Record, load, save
from excise.report.card import render_card
from excise.report.page import write_report
from excise.requests.recipe import NO_MODEL, Keep
from excise.run.environment import device_of

RECIPE = "recipe.yaml"
LOCK = ".lock"
CARD = "README.md"
SEVERAL = {"adapter": "adapters", "delta": "deltas", "looks": "looks"}
"""Folders of what is kept beside several models, by its kind."""


def store_of(out: Path) -> Path:
    """Return where the stages of an output are kept; those that lie side by side share it."""
    return out.parent / ".stages"


def runtime(out: Path, dtype: str, device: str, emit: Emit = silent) -> Runtime:
    """Return where the stages of an output are kept; runs that lie side by side share a store.

    Args:
        out: Output folder.
        dtype: Compute dtype.
        device: Device, or `auto`.
        emit: Gets a note of stages that an earlier version left.
    """
    store = store_of(out)
    for partial in (store / LAYOUT).glob("*.partial"):  # of killed runs that nobody resumed
        sweep(partial, deep=True)
    old = old_stages(store)
    if old:
        emit("note", {"text": old})
    return Runtime(store, dtype, device_of(device))


@contextmanager
def claim(out: Path, config: Config) -> Iterator[None]:
    """Hold an output folder for one run of one configuration.

    Args:
        out: The folder; made if missing.
        config: What is run; written as `recipe.yaml`.

    Raises:
        UserError: If the path is a file, holds another run or something else, or is in use.
    """
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    known = _check_free(out, text)
    _check_outside(out, config)
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    with _private(config), hold(out):
        try:
            write_text(out / RECIPE, text)
            yield
        except UserError as error:
            if not known and not isinstance(error, DiskFull):
                _undo(out, new)
            raise


@contextmanager
def _private(config: Config) -> Iterator[None]:
    """Let what is made of sensitive data be its owner's alone to read, in workers too."""
    domain = getattr(config, "domain", None)
    if not (getattr(config, "sensitive", False) or getattr(domain, "sensitive", False)):
        yield
        return
    mask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask)


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Keep an output folder to one process, and sweep away what killed ones left in it.

    Args:
        out: The folder; made if missing.

    Raises:
        UserError: If it cannot be made or is in use.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = (error.strerror or "error").lower()
        raise UserError(f"--out {out} cannot be made: {why}; name another folder") from None
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(out / LOCK))
        except BlockingIOError:
            raise UserError(f"--out {out} is in use by another run; wait for it") from None
        try:
            sweep(out, deep=True)
            yield
        finally:
            with suppress(OSError):  # Windows keeps the file of a lock that is held
                (out / LOCK).unlink(missing_ok=True)


def check_out(out: Path) -> None:
    """Refuse, before anything is computed, an output folder that cannot be one.

    Raises:
        UserError: If the path is a file, lies in a model's folder, or holds something that no run
            wrote.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    inside = next((up for up in out.absolute().parents if (up / "config.json").is_file()), None)
    if inside is not None:
        raise UserError(f"--out {out} lies in the folder of a model, {inside}; name one elsewhere")
    if not out.is_dir() or (out / RECIPE).is_file():
        return
    # What a run leaves that was killed before it had written its recipe.
    early = {LOCK, "events.jsonl"}
    if any(p.name not in early and not is_part(p) for p in out.iterdir()):
        raise UserError(f"--out {out} is not empty and holds no run; name a new folder")


def _check_free(out: Path, text: str) -> bool:
    """Return whether the folder holds this very run already.

    Raises:
        UserError: If it holds another one, or something else.
    """
    check_out(out)
    recipe = out / RECIPE
    if not recipe.is_file():
        return False
    if not same_run(recipe.read_text(encoding="utf-8", errors="replace"), text):
        raise UserError(f"--out {out} holds another run; name a new folder")
    return True


def _check_outside(out: Path, config: Config) -> None:
    """Refuse an output folder inside a folder of data, which would be read as data the next time.

    Raises:
        UserError: Naming the folder.
    """
    domain = getattr(config, "domain", None)
    given = domain.model_dump(mode="json", exclude={"name"}) if isinstance(domain, Config) else {}
    for text in _texts(given):
        folder = expand(re.split("[?#]", text)[0])
        if text and os.path.isdir(folder) and out.absolute().is_relative_to(folder.absolute()):
            raise UserError(f"--out {out} lies in the folder of the data, {folder}; name another")


def _texts(data: Any) -> Iterator[str]:
    """Yield every text in plain data."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping | list):
        for part in data.values() if isinstance(data, Mapping) else data:
            yield from _texts(part)


def same_run(old: str, new: str) -> bool:
    """Return whether two configurations ask for the same.

    A requirement and what is kept decide no number, and the time that a study may take only how
    far it gets.
    """

    def decisive(text: str) -> object:
        try:
            data = read_yaml(text)
        except NotPlain:
            return text
        if isinstance(data, dict):
            data.pop("keep", None)
            data.pop("time_budget", None)
            if isinstance(data.get("audit"), dict):
                data["audit"].pop("require", None)
        return data

    return old == new or decisive(old) == decisive(new)


def _undo(out: Path, new: Sequence[Path]) -> None:
    """Take away what a refused run wrote, its recipe last, and the folders it made."""
    for path in sorted(out.iterdir(), key=lambda path: path.name == RECIPE):
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / LOCK).unlink(missing_ok=True)
    for folder in new:
        if any(folder.iterdir()):
            break
        folder.rmdir()


def note_changes(out: Path, spec: DomainSpec, original: Checkpoint, emit: Emit) -> None:
    """Say which input of a finished run has other bytes now, so that the run is made anew.

    Args:
        out: Output folder, before anything is written into it.
        spec: What the data is read from.
        original: The model before removal.
        emit: Gets one `warning` that names what changed.
    """
    changed = []
    with suppress(UserError):  # there is no finished run, or one that is damaged
        record, before = load(out), splits.read_split(out / "split.json").sources
        changed = sorted(
            {file for name, files in spec.hashes().items() for file, sha256 in files.items()
             if before.get(name, {}).get(file, sha256) != sha256}
        )  # fmt: skip
        recorded = [m for m in record.models if m.name == "original" and m.fingerprint]
        if recorded and recorded[0].fingerprint != original.fingerprint:
            changed.append(f"the model {original.path}")
    if changed:
        text = f"{', '.join(changed)}: other bytes than when {out} was made, so it is made anew"
        emit("warning", {"text": text})


def write_split(out: Path, spec: DomainSpec, domain: Domain) -> None:
    """Write `split.json`, so that a later audit reads the same split."""
    split = split_of(domain, seed=int(getattr(spec, "seed", 0)), sources=spec.hashes())
    splits.write_split(out / "split.json", split)


def write(out: Path, record: Record, items: Sequence[Item]) -> None:
    """Write items, record and report, each whole or not at all."""
    write_items(out / "items.parquet", items)
    save(record, out)
    write_report(out)


def write_models(
    out: Path,
    record: Record,
    models: Mapping[str, Checkpoint],
    refitted: Mapping[str, Checkpoint],
    upstream: Path,
    keep: Keep = "best",
) -> Record:
    """Copy the edited models out of the store, each with the card of its own bytes.

    Args:
        out: Output folder; one model goes to `model`, several to `models/NAME`.
        record: What the cards say.
        models: The models by name.
        refitted: Those made of all forget rows; they go to `refit/`, laid out alike.
        upstream: Folder of the original, whose card's licence and tags are kept.
        keep: What is to be left of the models; without one there is no card.

    Returns:
        The record, which names the models where they lie in the output folder, or nowhere.
    """
    kept = keep not in NO_MODEL
    folders = copy_models(out, models) if kept else {}
    again = copy_models(out / "refit", refitted) if kept else {}

    def at(model: ModelRef, folder: Path | None) -> ModelRef:
        path = "" if folder is None else folder.relative_to(out).as_posix()
        return model.model_copy(update={"path": path})

    method_runs = []
    for run in record.method_runs:
        change = {"model": at(run.model, folders.get(run.name))}
        if run.refit is not None:
            change["refit"] = at(run.refit, again.get(run.name))
        method_runs.append(run.model_copy(update=change))
    record = record.model_copy(update={"method_runs": tuple(method_runs)})
    for name, folder in folders.items():
        write_card(folder, record, name, upstream)
    for name, folder in again.items():
        write_card(folder, record, name, upstream, refit=True)
    return record


def write_card(
    folder: Path, record: Record, name: str, upstream: Path, *, refit: bool = False
) -> Path:
    """Write the card beside the weights of a removal, or of its refit, and return its path.

    Args:
        folder: The model's folder.
        record: What the card says.
        name: Which of its method runs.
        upstream: Folder of the original, whose card's licence and tags are kept.
        refit: Whether the model was made of all forget rows, beside the one that was attacked.
    """
    above = upstream / CARD
    text = above.read_text(encoding="utf-8") if above.is_file() else None
    write_text(folder / CARD, render_card(record, name, text, refit=refit))
    return folder / CARD


def copy_models(out: Path, models: Mapping[str, Checkpoint]) -> dict[str, Path]:
    """Copy models to `out/model`, or `out/models/NAME` when there are several."""
    folders = {}
    for name, checkpoint in models.items():
        folder = out / "model" if len(models) == 1 else out / "models" / name
        copy_folder(checkpoint.path, folder)
        folders[name] = folder
    return folders


def copy_edits(
    out: Path,
    removals: Mapping[str, Removal],
    bases: Mapping[str, Checkpoint],
    keep: Keep = "best",
) -> dict[str, dict[str, Any]]:
    """Put what is kept beside a model, or in its place, where a user finds it.

    Args:
        out: Output folder. LoRA adapters, deltas and looks of one method run go to `adapter`,
            `delta` and `looks`, of several to `adapters/NAME` and so on.
        removals: What the methods returned, by method run.
        bases: What they started from, where a user has it.
        keep: What is to be left: a delta, and the steps that a stop rule looked at and kept.

    Returns:
        By method run and kind what the record says: where it lies, and the SHA-256 of every file.
    """
    edits: dict[str, dict[str, Any]] = {}
    for name, removal in removals.items():
        parts = {"adapter": removal.extras.get("files", {}).get("adapter")}
        if keep in ("all", "delta") and name in bases:
            parts["delta"] = removal.checkpoint.path
        looks = removal.checkpoint.path.parent / "looks"
        if keep == "all" and looks.is_dir():
            parts["looks"] = looks
        for kind, source in parts.items():
            if source is None:
                continue
            folder = Path(kind) if len(removals) == 1 else Path(SEVERAL[kind]) / name
            if kind == "delta":
                _write_delta(bases[name], removal, out / folder)
            else:
                copy_folder(Path(source), out / folder)
            sums = {file: file_sum(path) for file, path in files_of(out / folder).items()}
            edits.setdefault(name, {})[kind] = {"path": folder.as_posix(), "sha256": sums}
    return edits


def _write_delta(base: Checkpoint, removal: Removal, to: Path) -> None:
    """Write what a removal changed, in place of what an earlier call left."""
    shutil.rmtree(to, ignore_errors=True)
    write_delta(base, removal.checkpoint.weights_of(removal.changed), to)


def copy_folder(source: Path, to: Path) -> None:
    """Copy a folder, unless its copy is there byte by byte; another one is replaced."""
    if to.is_dir():
        there = {name: file_sum(path) for name, path in files_of(to).items() if name != CARD}
        wanted = {name: file_sum(path) for name, path in files_of(source).items()}
        if there == {name: known for name, known in wanted.items() if name != CARD}:
            return
    with new_folder(to, replace=True) as partial:
        for name, path in files_of(source).items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            clone_file(path, partial / name)


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files under a folder by relative name, hidden ones left out."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def write_items(path: Path, items: Sequence[Item]) -> None:
    """Write one row per scored item as parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        name: [getattr(item, name) for item in items]
        for name in ("model", "set", "unit", "metric", "value")
    }
    with new_file(path) as partial:
        pq.write_table(pa.table(columns), partial)
