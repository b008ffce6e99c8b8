"""The output folder: claimed by one run, written whole, never half."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from excise import record as schema
from excise.core.config import Config
from excise.core.errors import DiskFull, UserError
from excise.data import split as splits
from excise.data.domain import Domain
from excise.data.spec import DomainSpec
from excise.data.split import split_of
from excise.models.checkpoint import Checkpoint
from excise.models.files import clone_file, new_folder
from excise.record import Item, Record, write_text
from excise.report.card import render_card
from excise.report.page import write_report

RECIPE = "recipe.yaml"
LOCK = ".lock"


def store_of(out: Path) -> Path:
    """Return the folder of an output's stages; runs that lie side by side share one."""
    return out.parent / ".stages"


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
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("w")
    except OSError as error:
        why = (error.strerror or "error").lower()
        raise UserError(f"--out {out} cannot be made: {why}; name another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out} is in use by another run; wait for it") from None
        try:
            write_text(out / RECIPE, text)
            yield
        except UserError as error:
            if not known and not isinstance(error, DiskFull):
                _undo(out, new)
            raise
        finally:
            (out / LOCK).unlink(missing_ok=True)


def check_out(out: Path) -> None:
    """Refuse, before anything is computed, an output folder that cannot be one.

    Raises:
        UserError: If the path is a file or holds something that no run wrote.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if out.is_dir() and not (out / RECIPE).is_file() and any(p.name != LOCK for p in out.iterdir()):
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
    if recipe.read_text(encoding="utf-8", errors="replace") != text:
        raise UserError(f"--out {out} holds another run; name a new folder")
    return True


def _undo(out: Path, new: Sequence[Path]) -> None:
    """Take away what a refused run wrote, and the folders it made."""
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in new:
        if any(folder.iterdir()):
            break
        folder.rmdir()


def write_split(out: Path, spec: DomainSpec, domain: Domain) -> None:
    """Write `split.json`, so that a later audit reads the same split."""
    split = split_of(domain, seed=int(getattr(spec, "seed", 0)), sources=spec.hashes())
    splits.write_split(out / "split.json", split)


def write(out: Path, record: Record, items: Sequence[Item]) -> None:
    """Write items, record and report, each whole or not at all."""
    write_items(out / "items.parquet", items)
    schema.save(record, out)
    write_report(out)


def write_models(out: Path, record: Record, arms: Mapping[str, Checkpoint], upstream: Path) -> None:
    """Copy the edited models out of the store, each with its card.

    Args:
        out: Output folder; one model goes to `model`, several to `models/NAME`.
        record: What the cards say.
        arms: The models.
        upstream: Folder of the original, whose card's licence and tags are kept.
    """
    card = upstream / "README.md"
    above = card.read_text(encoding="utf-8") if card.is_file() else None
    for name, folder in copy_models(out, arms).items():
        write_text(folder / "README.md", render_card(record, name, above))


def copy_models(out: Path, arms: Mapping[str, Checkpoint]) -> dict[str, Path]:
    """Copy models to `out/model`, or `out/models/NAME` when there are several."""
    folders = {}
    for name, checkpoint in arms.items():
        folder = out / "model" if len(arms) == 1 else out / "models" / name
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            copy_model(checkpoint, folder)
        folders[name] = folder
    return folders


def write_items(path: Path, items: Sequence[Item]) -> None:
    """Write one row per scored item as parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        name: [getattr(item, name) for item in items]
        for name in ("model", "set", "unit", "metric", "value")
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(pa.table(columns), partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def copy_model(checkpoint: Checkpoint, to: Path) -> None:
    """Copy a model folder, file by file, under a temporary name (a reflink where possible)."""
    with new_folder(to) as partial:
        for file in sorted(checkpoint.path.iterdir()):
            if file.is_file():
                clone_file(file, partial / file.name)
