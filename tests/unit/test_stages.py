"""The store: made once, locked, checked, resumed, and clear about a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from excise.core import disk
from excise.core.context import Context, Stage
from excise.core.disk import disk_full
from excise.core.errors import UserError
from excise.core.keys import library_versions
from excise.core.stages import Runtime, Store, old_stages

LARGE = 3 << 20
KEY = {"config": {"lr": 1e-3}, "seed": 0}


def _write(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "small.txt").write_text("small")
    (folder / "large.bin").write_bytes(b"\0" * LARGE)


def _never(folder: Path) -> None:
    raise AssertionError("made again")


def test_a_stage_is_made_once_and_named_by_its_key(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.damage(store.path("arm", KEY)) == "its done.json is missing"
    folder = store.stage("arm", KEY, _write)
    assert folder.parent == tmp_path
    assert folder.name.startswith("arm-")
    assert len(folder.name) == len("arm-") + 16
    assert store.stage("arm", dict(reversed(KEY.items())), _never) == folder
    assert Store(tmp_path).damage(folder) == ""
    done = json.loads((folder / "done.json").read_text())
    assert done["key"] == KEY
    assert done["files"]["model/small.txt"]["size"] == 5
    zeros = hashlib.sha256(b"\0" * LARGE).hexdigest()
    assert done["files"]["large.bin"] == {"size": LARGE, "sha256": zeros}
    for other in ({**KEY, "seed": 1}, {"config": {"lr": 2e-3}, "seed": 0}):
        assert store.path("arm", other) != folder
    assert store.path("base", KEY).name[-16:] != folder.name[-16:]


def test_a_name_cannot_leave_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for name in ("../../evil", "/etc/x", "a/b c", "...", ""):
        assert store.path(name, KEY).parent == tmp_path / "store"


def _unlink_done(folder: Path) -> None:
    (folder / "done.json").unlink()


def _tear_done(folder: Path) -> None:
    (folder / "done.json").write_text('{"fil')


def _lose(folder: Path) -> None:
    (folder / "model" / "small.txt").unlink()


def _swap(folder: Path) -> None:
    (folder / "model" / "small.txt").write_text("SMALL")


def _truncate(folder: Path) -> None:
    os.truncate(folder / "large.bin", 10)


def _flip(folder: Path) -> None:
    """Change one byte of a large file and put its time stamp back."""
    path = folder / "large.bin"
    stat = path.stat()
    with path.open("r+b") as f:
        f.seek(LARGE // 2)
        f.write(b"\1")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _add(folder: Path) -> None:
    (folder / "model" / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_unlink_done, "done.json is missing"),
        (_tear_done, "done.json cannot be read"),
        (_lose, "small.txt is missing"),
        (_swap, "small.txt has other contents"),
        (_truncate, "large.bin has 10 bytes"),
        (_flip, "large.bin has other contents"),
        (_add, "adapter_config.json was added"),
    ],
)
def test_a_damaged_stage_is_made_again_and_said_so(
    harm: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    told: list[str] = []

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "note":
            told.append(data["text"])

    store = Store(tmp_path, emit)
    folder = store.stage("arm", KEY, _write)
    harm(folder)
    assert words in store.damage(folder)
    assert store.stage("arm", KEY, _write) == folder
    assert len(told) == 1
    assert words in told[0]
    assert store.damage(folder) == ""


def test_an_interrupted_stage_goes_on_where_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fails(folder: Path) -> None:
        (folder / "half").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.stage("arm", KEY, fails)
    assert not store.path("arm", KEY).exists()

    def goes_on(folder: Path) -> None:
        assert (folder / "half").read_text() == "1"
        (folder / "whole").write_text("2")

    folder = store.stage("arm", KEY, goes_on)
    assert sorted(p.name for p in folder.iterdir()) == ["done.json", "half", "whole"]


def test_events_say_what_was_reused(tmp_path: Path) -> None:
    told: list[tuple[str, Any]] = []
    store = Store(tmp_path, lambda kind, data: told.append((kind, data.get("reused"))))
    store.stage("arm", KEY, _write)
    store.stage("arm", KEY, _write)
    assert told == [("stage_start", None), ("stage_done", False), ("stage_done", True)]


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"disk of .* is full; free some space"):
        Store(tmp_path).stage("arm", KEY, full)
    with pytest.raises(UserError, match="free about 3 MiB"), disk_full(tmp_path, 3 << 20):
        Path("/dev/full").write_text("x")
    with pytest.raises(FileNotFoundError), disk_full(tmp_path):
        (tmp_path / "missing").read_text()


def test_a_refused_stage_leaves_nothing_and_an_interrupted_one_everything(tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        _write(folder)
        raise UserError("alpha is 2; choose one in [0, 1]")

    def stop(folder: Path) -> None:
        _write(folder)
        raise KeyboardInterrupt

    store = Store(tmp_path)
    with pytest.raises(UserError, match="alpha is 2"):
        store.stage("arm", KEY, refuse)
    assert not list(tmp_path.glob("arm-*"))
    with pytest.raises(KeyboardInterrupt):
        store.stage("arm", KEY, stop)
    assert (store.path("arm", KEY).with_name(store.path("arm", KEY).name + ".partial")).is_dir()


def test_a_stage_is_read_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are taken when a stage is made, checked once by a later run, and never in between."""
    read: list[str] = []

    def digest(f: Any, name: str) -> Any:
        read.append(Path(f.name).name)
        return whole(f, name)

    whole = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", digest)
    began = time.time() - 60
    Store(tmp_path, since=began).stage("arm", KEY, _write)
    assert sorted(read) == ["large.bin", "small.txt"]
    read.clear()
    final = Store(tmp_path).path("arm", KEY)
    checked = time.time() + 60
    monkeypatch.setattr(Store, "_checked", lambda self, final: checked)
    for since, expected in ((began, []), (checked + 1, ["large.bin", "small.txt"])):
        monkeypatch.setattr(disk, "_SUMS", {})  # as in another process
        assert Store(tmp_path, since=since).damage(final) == ""
        assert sorted(read) == expected


def test_other_processes_follow_the_first(tmp_path: Path) -> None:
    """Process 1 neither locks nor finishes; it makes its share when process 0 says so."""
    answers = iter([False, True, True, True])
    made: list[Path] = []
    store = Store(tmp_path, rank=1, agree=lambda _: next(answers))
    folder = store.stage("arm", KEY, made.append)
    assert made == [folder.with_name(folder.name + ".partial")]
    assert not folder.exists()
    assert not (tmp_path / ".locks").exists()
    reused = Store(tmp_path, rank=1, agree=lambda _: True)
    assert reused.stage("arm", KEY, _never) == folder


SCRIPT = """
import sys, time
from pathlib import Path
from excise.core import disk
from excise.core.stages import Store
disk.PATIENCE = 0.1
def make(folder):
    with (folder / "log").open("a") as f:
        f.write("made\\n")
    print("making", flush=True)
    while not Path(sys.argv[2]).exists():
        time.sleep(0.01)
store = Store(Path(sys.argv[1]), lambda kind, data: print(kind, data.get("text", ""), flush=True))
store.stage("arm", {"a": 1}, make)
"""


def _process(root: Path, until: Path) -> subprocess.Popen[str]:
    """Start a process that makes a stage and is done when `until` exists."""
    command = [sys.executable, "-c", SCRIPT, str(root), str(until)]
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )


def _until(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"the process ended without saying '{words}'")


def test_a_second_process_waits_and_does_not_make_it_again(tmp_path: Path) -> None:
    first = _process(tmp_path, tmp_path / "go")
    _until(first, "making")
    second = _process(tmp_path, tmp_path / "go")
    _until(second, "waiting")
    (tmp_path / "go").touch()
    for process in (first, second):
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "stage_done" in output
    (folder,) = tmp_path.glob("arm-*")
    assert (folder / "log").read_text() == "made\n"


def test_a_killed_process_frees_its_lock(tmp_path: Path) -> None:
    first = _process(tmp_path, tmp_path / "never")
    _until(first, "making")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second = _process(tmp_path, tmp_path)
    second.communicate(timeout=30)
    assert second.returncode == 0
    (folder,) = tmp_path.glob("arm-*")
    assert (folder / "log").read_text() == "made\nmade\n"


def test_versions_name_what_decides_numbers() -> None:
    versions = library_versions()
    assert {"python", "torch", "transformers", "numpy"} <= set(versions)
    assert all(versions.values())


def test_a_store_of_an_earlier_version_is_left_alone(tmp_path: Path) -> None:
    store = tmp_path / ".stages"
    assert old_stages(store) == ""
    (store / "init-abc").mkdir(parents=True)
    (store / "init-abc" / "done.json").write_text("{}")
    assert "holds 1 stages written by an earlier version" in old_stages(store)

    @dataclass(frozen=True)
    class Note(Stage[str]):
        text: str
        name = "note"

        def make(self, ctx: Context) -> None:
            (ctx.work / "note.txt").write_text(self.text)

        def read(self, folder: Path) -> str:
            return (folder / "note.txt").read_text()

    assert Runtime(store).run(Note("new")) == "new"
    assert old_stages(store).startswith(f"{store} holds 1 stages")
    assert (store / "init-abc" / "done.json").read_text() == "{}"
