"""The model that a recipe names: a folder, a hub id, a GGUF file, or one that was fetched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from excise.core.errors import UserError
from excise.fetch import cache_root, cached, fetch_files, known
from excise.models.checkpoint import Checkpoint, open_checkpoint, open_outline
from excise.models.spec import ModelSpec


def fetch(name: str, cache: Path | None = None) -> Path:
    """Get something by name, or find it in the cache; `fetch_files`, then the model made of them.

    Args:
        name: One of `excise.fetch.known()`.
        cache: Folder to keep it in; None for `cache_root()`.

    Returns:
        The folder of the model, or of the files where the item is no model.

    Raises:
        UserError: As `fetch_files`, or if the file is no model that can be read.
    """
    folder = fetch_files(name, cache)
    model = known()[name].model
    if not model:
        return folder
    return open_checkpoint(folder / model, cache=(cache or cache_root()) / "models").path


def open_model(spec: ModelSpec) -> Checkpoint:
    """Open the model that a recipe names.

    Raises:
        UserError: If it is not here, was not fetched, or is no model.
    """
    if spec.path in known() and not Path(spec.path).exists():
        if cached(spec.path) is None:
            raise UserError(f"model '{spec.path}' is not here yet; run: excise fetch {spec.path}")
        return open_checkpoint(fetch(spec.path))
    return open_checkpoint(spec.path, revision=spec.revision, tokenizer=spec.tokenizer or None)


@contextmanager
def outline_of(spec: ModelSpec) -> Iterator[Checkpoint | None]:
    """Open what the model that a recipe names says of itself; see `open_outline`.

    Yields:
        The outline, or None for a model that `excise fetch` knows and that is not here yet.

    Raises:
        UserError: As `open_outline`.
    """
    path = Path(spec.path)
    if spec.path in known() and not path.exists():
        folder, file = cached(spec.path), known()[spec.path].model
        if folder is None:
            yield None
            return
        path = folder / file if file else folder
    with open_outline(
        str(path), revision=spec.revision, tokenizer=spec.tokenizer or None
    ) as outline:
        yield outline
