"""What a killed run leaves is swept, rights follow the umask, and odd paths are told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from excise.core import disk
from excise.core.config import Config
from excise.core.errors import UserError
from excise.run.output import claim

KILLED = """
import os, sys
from pathlib import Path
from excise.core.disk import new_file, new_folder, scratch
folder = Path(sys.argv[1])
with new_folder(folder / "model") as work, new_file(folder / "page.html") as page, scratch():
    (work / "weights").write_text("half")
    page.write_text("half")
    os._exit(9)
"""


def test_the_next_write_sweeps_what_a_killed_run_left(tmp_path: Path) -> None:
    there = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a")], env=there, check=False)
    assert len([p for p in tmp_path.rglob(".part-*") if p.parent.name in ("a", tmp_path.name)]) == 3
    disk.write_text(tmp_path / "a" / "other.txt", "whole")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["other.txt"]
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "b")], env=there, check=False)
    assert len(list(tmp_path.glob(".part-*"))) == 1  # of the second, which took the first's away


class Data(Config):
    sensitive: bool = False
    forget: str = ""


class Asked(Config):
    domain: Data = Data()


@pytest.mark.parametrize(("sensitive", "rights"), [(False, 0o640), (True, 0o600)])
def test_rights_follow_the_umask(tmp_path: Path, sensitive: bool, rights: int) -> None:
    mask = os.umask(0o027)
    try:
        asked = Asked(domain=Data(sensitive=sensitive))
        with claim(tmp_path / "out", asked), disk.new_folder(tmp_path / "out" / "model") as work:
            (work / "weights").write_text("x")
            (work / "weights").chmod(0o600)  # as a library writes it
        files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert {path.stat().st_mode & 0o777 for path in files} == {rights}
    finally:
        os.umask(mask)


def test_an_output_does_not_lie_in_the_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    asked = Asked(domain=Data(forget=f"{tmp_path}/data?by=file"))
    out = tmp_path / "data" / "out"
    with pytest.raises(UserError, match="lies in the folder of the data"), claim(out, asked):
        pass
    assert list((tmp_path / "data").iterdir()) == []


def test_a_user_who_is_not_there_is_a_name() -> None:
    assert disk.expand("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")
