"""A slice of the kill campaign: killed before any change of a file, a run ends as undisturbed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks import kill
from benchmarks.kill import Case, Kill

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or not Path("/proc/self/stat").exists(), reason="cases run in forks"
)

JOBS = ("run", "remove", "label")


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> kill.Campaign:
    """Return a campaign in a folder of its own, whose undisturbed runs the tests share."""
    kill.warm_up(JOBS)
    return kill.Campaign(tmp_path_factory.mktemp("campaign").resolve())


@pytest.mark.parametrize("job", JOBS)
def test_a_slice_of_the_kills(job: str, where: kill.Campaign) -> None:
    """Each kill comes right before a change, so that it is the same one every time."""
    tally, told = kill.Tally(), []
    for case in kill.cases(10, 17, [job], exact=True):
        told += [f"case {case.number} of {job}: {fault}" for fault in where.check(case, tally)]
    assert told == []
    assert sum(tally.sent.values()) >= 7
    assert len(tally.sent) > 1


def test_cases_are_the_same_every_time_and_cover_every_kind() -> None:
    cases = kill.cases(400, 3, [*kill.JOBS])
    assert cases == kill.cases(400, 3, [*kill.JOBS])
    assert cases[:40] == kill.cases(100, 3, [*kill.JOBS])[:40]
    kills = [one for case in cases for one in case.kills]
    assert {one.whom for one in kills} == {"process", "group", "worker"}
    assert {one.moment for one in kills} == {"change", "after", "time"}
    assert {one.signal.name for one in kills} == {"SIGKILL", "SIGTERM", "SIGINT"}
    assert {case.job for case in cases} == {*kill.JOBS}
    assert all(case.job.endswith("workers") for case in cases
               if any(one.whom == "worker" for one in case.kills))  # fmt: skip


def spoil_weights(folder: Path) -> None:
    weights = folder / "out" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def spoil_record(folder: Path) -> None:
    record = json.loads((folder / "out" / "run.json").read_text())
    record["method_runs"][0]["extras"]["resumed"] = True
    (folder / "out" / "run.json").write_text(json.dumps(record))


def leave_half(folder: Path) -> None:
    (folder / "out" / ".part-00000000-1-00000000-model").mkdir()


def tear_events(folder: Path) -> None:
    with (folder / "out" / "events.jsonl").open("a") as f:
        f.write('{"kind": "st\n')


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_weights, "/out/model/model.safetensors: "),
        (spoil_record, "/extras/resumed: nothing became True"),
        (leave_half, "/out/.part-00000000-1-00000000-model: nothing became folder"),
        (tear_events, "/out/events.jsonl: events became torn"),
    ],
)
def test_what_differs_is_told(
    spoil: Callable[[Path], None], said: str, where: kill.Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    like = where.undisturbed("remove")
    contents = kill.contents

    def spoiled(folder: Path, given: frozenset[str]) -> object:
        spoil(folder)
        return contents(folder, given)

    monkeypatch.setattr(kill, "contents", spoiled)
    first = Kill(signal.SIGKILL, "process", "change", 0.5)
    faults = where.check(Case(0, "remove", (first,)), kill.Tally())
    assert like.changes > 50
    assert any(said in fault for fault in faults), faults


def test_only_times_may_differ() -> None:
    one: dict[str, Any] = {"cost": {"seconds": 1.0, "steps": 5}, "environment": {"started": "a"}}
    two: dict[str, Any] = {"cost": {"seconds": 2.0, "steps": 5}, "environment": {"started": "b"}}
    assert kill.differences(kill.untimed(one), kill.untimed(two)) == []
    two["cost"]["steps"] = 6
    assert kill.differences(kill.untimed(one), kill.untimed(two)) == ["/cost/steps: 5 became 6"]
