"""Progress of a verb: on the terminal, and in the `events.jsonl` of its output folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from excise.core.events import Emit, JsonlSink, terminal


@contextmanager
def progress(events: Path, *, quiet: bool) -> Iterator[Emit]:
    """Show progress on the terminal and append it to `events`.

    Nothing is written until the output folder is there: a refused run leaves nothing behind.

    Yields:
        A sink for the events of this process and its workers.
    """
    with terminal(quiet=quiet) as screen:

        def emit(kind: str, data: Mapping[str, Any]) -> None:
            if events.parent.is_dir():
                JsonlSink(events)(kind, data)
            screen(kind, data)

        yield emit
