"""Progress of a verb: on the terminal, in the `events.jsonl` of its output folder, in a tracker."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from excise.core.events import Emit, JsonlSink, Point, check_tracker, terminal, track
from excise.record import Record, load
from excise.requests.audit import AuditRun
from excise.requests.lengths import fit_lengths
from excise.requests.recipe import Recipe
from excise.run.estimate import Plan, plan
from excise.run.measure import measured


@contextmanager
def progress(
    events: Path, *, quiet: bool, tracker: Literal["", "trackio", "wandb", "tensorboard"] = ""
) -> Iterator[Emit]:
    """Show progress on the terminal and append it to `events`.

    Nothing is written until the output folder is there: a refused run leaves nothing behind.

    Args:
        events: The `events.jsonl` of the output folder.
        quiet: Whether to show nothing.
        tracker: What gets the events and the record once the run is done; empty for none.

    Yields:
        A sink for the events of this process and its workers.

    Raises:
        UserError: Before anything starts, if the tracker is not installed.
    """
    if tracker:
        check_tracker(tracker)
    with terminal(quiet=quiet) as screen:

        def emit(kind: str, data: Mapping[str, Any]) -> None:
            if events.parent.is_dir():
                JsonlSink(events)(kind, data)
            screen(kind, data)

        yield emit
        if tracker:
            screen("phase", {"text": f"sending the run to {tracker}"})
            track(events, tracker, results=points_of(load(events.parent)))


def show_plan(request: Recipe | AuditRun, out: Path, *, measure: bool, quiet: bool = False) -> Plan:
    """Print what a run would do and cost.

    Args:
        request: What would be run.
        out: Output folder.
        measure: Whether to time a few steps.
        quiet: Whether to show no progress meanwhile.

    Returns:
        The estimate.
    """
    with terminal(quiet=quiet) as screen:
        estimate = plan(request, out, emit=screen)
        if measure:
            estimate = measured(estimate, fit_lengths(request), emit=screen)
    print(estimate.text())
    return estimate


def points_of(record: Record) -> list[Point]:
    """Return what a tracker shows of a record: every score, and the curves of attacks by token."""
    points = [
        (f"scores/{score.model}/{score.set}/{score.metric}", 0, score.value)
        for score in record.scores
    ]
    for attack in record.attacks:
        rate = "" if attack.lr is None else f" {attack.lr:g}"
        variant = f"{attack.variant}{rate} seed {attack.seed}"
        tag = f"attacks/{attack.name}/{attack.subject}/{variant}"
        for point in attack.curve:
            points.append((tag, point.tokens, point.score))
            if point.retain is not None:
                points.append((f"{tag}/retain", point.tokens, point.retain))
    return [point for point in points if math.isfinite(point[2])]
