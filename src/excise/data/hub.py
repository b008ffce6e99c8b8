"""Data sets as folders: saved by `datasets`, laid out as on the hub, or fetched from it.

The files of a data set are read by excise itself, so that the same rows come out wherever they
lie; only what it cannot read (archives, xml) goes through the `datasets` library. The Hugging Face
cache, token and offline mode are honoured by `huggingface_hub`. Loading scripts are never run.
This module imports no torch.
"""

from __future__ import annotations

import fnmatch
import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path, PurePosixPath
from typing import Any, Final

from excise.core.errors import UserError, nearest
from excise.core.plain import NotPlain, read_json, read_yaml

READABLE: Final = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".arrow")
"""Kinds of files that excise reads itself; a folder is read in the first kind it has."""

_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json",
             "requirements.txt", "license.txt", ".huggingface.json")  # fmt: skip
_ALIASES = {"validation": ("validation", "valid", "val", "dev"), "test": ("test", "eval"),
            "train": ("train", "training")}  # fmt: skip
_USUAL = {"configuration": ("default", ":"), "split": ("train", "#")}
"""Name that is taken where none is asked for, and the mark that asks for one in a source."""


def saved_files(folder: Path, split: str) -> list[Path] | None:
    """Return the arrow files of a folder written by `save_to_disk`, or None for another folder.

    Args:
        folder: The folder.
        split: Split, where it holds several.

    Raises:
        UserError: If there is no such split, or the folder is damaged.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json(folder / "dataset_dict.json").get("splits", [])
        folder = folder / _pick(splits, split, str(folder), "split")
    state = folder / "state.json"
    if not state.is_file():
        return None
    saved = _read_json(state)
    if saved.get("_indices_data_files") or saved.get("_indices_files"):
        raise UserError(f"{folder} is a selection of rows; save it after `flatten_indices()`")
    names = [str(entry.get("filename", "")) for entry in saved.get("_data_files") or ()]
    files = [folder / name for name in names if name]
    if not files:
        raise UserError(f"{state} names no data file; save the data set again")
    for file in files:
        if not file.is_file() or file.parent != folder:
            raise UserError(f"{file} is missing, which {state} names; save the data set again")
    return files


def folder_files(folder: Path, config: str, split: str) -> list[Path]:
    """Return the data files of a folder laid out as on the hub.

    Args:
        folder: The folder: a README with `configs`, or files named by split.
        config: Configuration; empty for the only or the default one.
        split: Split; empty for the only one or `train`.

    Raises:
        UserError: If no file fits.
    """
    names = sorted(str(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if p.is_file())
    readme = folder / "README.md"
    card = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    chosen = choose_files(names, card, config=config, split=split, where=str(folder))
    return [folder / name for name in chosen]


def text_folder(folder: Path) -> list[Path] | None:
    """Return the texts of a folder of documents, or None for a folder of any other kind.

    Such a folder holds `.txt` files, in folders of its own where there are any; a data set, whose
    files are all named by split, or whose card names them, is none.

    Args:
        folder: The folder.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    readme = folder / "README.md"
    if readme.is_file() and _declared(readme.read_text(encoding="utf-8", errors="replace")):
        return None
    data = {name: path for name, path in zip(names, files, strict=True) if _is_data(name)}
    if not data or any(path.suffix.lower() != ".txt" for path in data.values()):
        return None
    if all(_named_split(name) for name in data):
        return None
    return [*data.values()]


def choose_files(
    names: Sequence[str], card: str, *, config: str, split: str, where: str
) -> list[str]:
    """Choose the files of one configuration and split.

    The card's `configs` decide where there are any; else the top folder is the configuration and
    the words in a file's path are its split, as on the hub.

    Args:
        names: Every file of the data set, relative, with forward slashes.
        card: Text of its README.
        config: Configuration; empty for the only or the default one.
        split: Split; empty for the only one or `train`.
        where: Name of the data set, for errors.

    Returns:
        Names of the files, in reading order.

    Raises:
        UserError: If no file fits; names the configurations or splits there are.
    """
    declared = _declared(card)
    if declared:
        patterns = declared[_pick(list(declared), config, where, "configuration")]
        chosen = patterns[_pick(list(patterns), split, where, "split")]
        fitting = [n for n in names if any(_matches(n, p) for p in chosen)]
        if not fitting:
            raise UserError(f"{where} has no file {', '.join(chosen)}, which its card names")
        return _whole(_one_kind(fitting, where), where)
    data = [n for n in names if _is_data(n)]
    if config:
        configs = sorted({n.split("/")[0] for n in data if "/" in n})
        _pick(configs, config, where, "configuration")
        data = [n for n in data if n.startswith(f"{config}/")]
    data = _one_kind(data, where)
    by_split: dict[str, list[str]] = {}
    for name in data:
        by_split.setdefault(_split_of(name), []).append(name)
    if len({n.split("/")[0] for n in data if "/" in n}) > 1 and not config and not split:
        folders = sorted({n.split("/")[0] for n in data if "/" in n})
        if not any(_split_word(f) for f in folders):
            raise UserError(f"{where} has several configurations ({', '.join(folders)}); add :NAME")
    return _whole(by_split[_pick(list(by_split), split, where, "split")], where)


def _whole(names: list[str], where: str) -> list[str]:
    """Refuse a part of the shards that names like `train-00000-of-00002` promise."""
    shards = [re.search(r"-\d{5}-of-(\d{5})", name) for name in names]
    promised = max((int(shard[1]) for shard in shards if shard), default=0)
    present = sum(shard is not None for shard in shards)
    if promised > present:
        raise UserError(f"{where} holds {present} of {promised} shards; fetch the others too")
    return names


def _declared(card: str) -> dict[str, dict[str, list[str]]]:
    """Return configuration -> split -> patterns from the YAML head of a card."""
    head = re.match(r"\A---\r?\n(.*?)\r?\n---\r?\n", card, flags=re.DOTALL)
    if head is None:
        return {}
    try:
        data = read_yaml(head[1])
    except NotPlain:
        return {}
    out: dict[str, dict[str, list[str]]] = {}
    for entry in (data.get("configs") or []) if isinstance(data, Mapping) else []:
        if not isinstance(entry, Mapping) or "data_files" not in entry:
            continue
        files, splits = entry["data_files"], {}
        items = files if isinstance(files, list) else [files]
        for item in items:
            if isinstance(item, Mapping):
                path = item.get("path", [])
                splits[str(item.get("split", "train"))] = [path] if isinstance(path, str) else path
            else:
                splits.setdefault("train", []).append(str(item))
        out[str(entry.get("config_name", "default"))] = splits
    return out


def _matches(name: str, pattern: str) -> bool:
    """Whether a file fits a pattern of a card, where `**` spans folders and `*` does not."""
    plain = pattern.removeprefix("./")
    if "**" in plain:
        return fnmatch.fnmatchcase(name, plain) or fnmatch.fnmatchcase(
            name, plain.replace("**/", "")
        )
    parts, wanted = name.split("/"), plain.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _is_data(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return path.suffix.lower() in READABLE and not hidden and path.name.lower() not in _NOT_DATA


def _one_kind(names: Sequence[str], where: str) -> list[str]:
    """Keep the files of the first readable kind."""
    for extension in READABLE:
        readable = [n for n in names if n.lower().endswith(extension)]
        if readable:
            return sorted(readable)
    raise UserError(f"{where} holds no file that is read here; use {', '.join(READABLE)}")


def _split_of(name: str) -> str:
    """Return the split that a file's path names; `train` where it names none."""
    return _named_split(name) or "train"


def _named_split(name: str) -> str:
    """Return the split that a file's path names, or nothing."""
    words = map(_split_word, reversed(PurePosixPath(name).with_suffix("").parts))
    return next(filter(None, words), "")


def _split_word(text: str) -> str:
    words = re.split(r"[-._ ]", text.lower())
    for split, aliases in _ALIASES.items():
        if any(alias in words for alias in aliases):
            return split
    sharded = re.fullmatch(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?", text)
    return sharded[1] if sharded else ""


def _pick(known: Sequence[str], wanted: str, where: str, what: str) -> str:
    """Return the configuration or split that is wanted, else the only or the usual one."""
    usual, mark = _USUAL[what]
    if wanted in known:
        return wanted
    if wanted:
        raise UserError(f"{where} has no {what} '{wanted}'; {nearest(wanted, known)}")
    if len(known) == 1:
        return known[0]
    if usual in known:
        return usual
    raise UserError(f"{where} has several {what}s; add {mark}NAME; {nearest('', known)}")


def _read_json(path: Path) -> Any:
    try:
        data = read_json(path)
    except (NotPlain, OSError):
        data = None
    if not isinstance(data, dict):
        raise UserError(f"{path} is not valid JSON; save the data set again")
    return data


def hub_files(name: str, config: str, revision: str, split: str) -> list[Path]:
    """Return the local files of a data set on the hub, fetched into the Hugging Face cache.

    Args:
        name: Hub id, `owner/name`.
        config: Configuration; empty for the only or the default one.
        revision: Branch, tag or commit; empty for the newest.
        split: Split; empty for the only one or `train`.

    Raises:
        UserError: If it is not there, not ours to read, cannot be reached or has no such split.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    at: dict[str, Any] = {"revision": revision or None, "repo_type": "dataset"}
    try:
        with _quiet():
            try:
                names = hub.HfApi().list_repo_files(name, **at)
            except (errors.OfflineModeIsEnabled, OSError) as error:
                if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
                    raise
                folder = hub.snapshot_download(name, local_files_only=True, **at)
                return _cached_files(Path(folder), name, config, split)
            card = ""
            if "README.md" in names:
                readme = Path(hub.hf_hub_download(name, "README.md", **at))
                card = readme.read_text(encoding="utf-8", errors="replace")
            if not any(_is_data(n) for n in names):
                return _through_datasets(name, config, revision, split)
            chosen = choose_files(names, card, config=config, split=split, where=name)
            return [Path(hub.hf_hub_download(name, n, **at)) for n in chosen]
    except errors.GatedRepoError:
        reason = "it is gated; ask for access on its page and log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = "it has no such revision"
    except errors.RepositoryNotFoundError:
        reason = "the hub has no such data set; check the name, or log in if it is private"
    except errors.HFValidationError:
        reason = "that is not a name the hub can have"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError):
        reason = "it is not in the local cache and the hub cannot be reached"
    wanted = f"'{name}'" + (f" at revision '{revision}'" if revision else "")
    raise UserError(f"there is no file or folder {name}, and {wanted} cannot be fetched: {reason}")


def _cached_files(folder: Path, name: str, config: str, split: str) -> list[Path]:
    """Return the files of a data set that is in the local cache already."""
    files = folder_files(folder, config, split)
    splits = {_split_of(str(file.relative_to(folder).as_posix())) for file in files}
    if not split and splits != {"train"}:
        # The cache may hold less than the hub, where `train` would be read.
        named = ", ".join(sorted(splits))
        raise UserError(f"only '{named}' of {name} is in the local cache; add #{named}")
    return files


def _through_datasets(name: str, config: str, revision: str, split: str) -> list[Path]:
    """Load a data set of another format with `datasets`; its arrow files are then read here."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"'{name}' holds no file that is read here ({', '.join(READABLE)}); "
            "install `excise[hub]`, which reads other formats"
        ) from None
    try:
        loaded = datasets.load_dataset(name, config or None, revision=revision or None)
    except OSError:
        raise
    except Exception as error:  # whatever a reader of foreign formats raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"'{name}' cannot be read by `datasets`: {reason}") from None
    chosen = _pick([str(s) for s in loaded], split, name, "split")
    return [Path(entry["filename"]) for entry in loaded[chosen].cache_files]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the hub's progress bars and warnings out of the terminal."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
