"""The scripts and the notebook under examples/ run, and show what they say."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import pytest

import excise as ex

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK: dict[str, Any] = {
    "rates": [1e-3], "steps": 2, "checkpoints": [0, 2], "random_directions": 1,
    "max_test_rows": 16, "max_other_rows": 8,
}  # fmt: skip
"""A budget that is over in seconds."""


def script(name: str) -> ModuleType:
    """Import a script without running it."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What `small_model.py` makes, hardly trained; the folder is the current one."""
    folder = tmp_path_factory.mktemp("examples")
    script("small_model").make(folder / "small", subjects=24, steps=4)
    mpl.use("Agg")
    with contextlib.chdir(folder):
        yield folder


def test_a_model_and_two_files_are_made_that_the_others_read(small: Path) -> None:
    assert (small / "small/original/model.safetensors").is_file()
    forget, retain = (
        {
            json.loads(line)["unit"]
            for line in (small / f"small/{name}.jsonl").read_text("utf-8").splitlines()
        }
        for name in ("forget", "retain")
    )
    assert len(forget) >= 12
    assert not forget & retain


def test_the_script_removes_audits_and_draws(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ex, "audit", partial(ex.audit, change=QUICK), raising=False)
    picture = script("remove_audit_plot").main(["--steps", "2"])
    assert "tokens the attacker trained on" in picture.read_text("utf-8")
    record = ex.load("small/removed-audit")
    assert isinstance(record, ex.Record)
    curves = record.to_frame("curves")
    assert len(curves) == sum(len(attack.curve) for attack in record.attacks) > 0
    assert {"name", "subject", "variant", "tokens", "score", "decisive"} <= set(curves.columns)
    assert len(record.to_frame("scores")) == len(record.scores)
    assert len(record.to_frame("levels")) == 6 * len(record.verdicts)
    empty = ex.Record(kind="audit").to_frame("curves")
    assert len(empty) == 0
    assert list(empty.columns) == list(curves.columns)


def test_the_notebook_runs_from_top_to_bottom(small: Path) -> None:
    notebook = json.loads((EXAMPLES / "remove_audit_plot.ipynb").read_text("utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "the notebook is committed without outputs"
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                names |= {"steps": 2, "change": QUICK}
    record = names["record"]
    assert {verdict.model for verdict in record.verdicts} == {"grad_diff", "rmu"}
    assert Path("small/notebook/relearning.svg").is_file()


def test_an_edited_model_needs_nothing_but_transformers(small: Path) -> None:
    text = script("edited_model").main("small/original", "the hue of", new_tokens=3)
    assert isinstance(text, str)
    blocked = "import sys; sys.modules['excise'] = None; import runpy; runpy.run_path(sys.argv[1])"
    command = [sys.executable, "-c", blocked, str(EXAMPLES / "edited_model.py")]
    assert subprocess.run(command, check=False).returncode == 0


def test_a_routed_loop_of_ones_own_keeps_the_capability_in_the_module() -> None:
    scores = script("route_own_loop").main(steps=120)
    assert scores["capability cut"] < scores["capability"] - 0.2
    assert scores["capability cut"] < scores["rest cut"]


def test_losses_and_hooks_work_in_a_loop_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_loop.py"), run_name="__main__")
    assert "norm after block 1" in capsys.readouterr().out


def test_every_example_is_listed() -> None:
    text = (EXAMPLES / "README.md").read_text("utf-8")
    for path in EXAMPLES.iterdir():
        if path.suffix == ".py" or (path / "pyproject.toml").is_file():
            assert f"({path.name})" in text, f"{path.name} is not in examples/README.md"
