"""The loss family against numbers that released losses gave, recorded by `record_losses.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from excise.core.context import Context
from tests.golden import loss_inputs as given
from tests.parity.toy import weights

REFERENCE: dict[str, Any] = json.loads(
    Path(__file__).with_name("loss_reference.json").read_text(encoding="utf-8")
)


def run(method: Any, name: str, folder: Path) -> tuple[dict[str, list[float]], float]:
    """Return how the weights moved, and the loss of the last step."""
    folder.mkdir()
    start = given.start(folder)
    (folder / "work").mkdir()
    removal = method.apply(start, given.CASES[name].domain, Context(folder / "work"))
    moved = given.checksums(weights(removal.checkpoint), weights(start))
    return moved, removal.history[-1]["loss"]


def farthest(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> float:
    """Return the largest difference of a checksum, as a share of how far its tensor moved."""
    return max(
        abs(a - b) / theirs[n][1] for n in theirs for a, b in zip(ours[n], theirs[n], strict=True)
    )


@pytest.mark.parametrize("name", given.CASES)
def test_every_step_of_the_released_loss_is_replayed(name: str, tmp_path: Path) -> None:
    recorded, method = REFERENCE["runs"][name], given.CASES[name].method
    for done in range(1, given.FIT.steps + 1):
        short = method.model_copy(update={"fit": given.FIT.model_copy(update={"steps": done})})
        moved, loss = run(short, name, tmp_path / f"{done}")
        assert set(moved) == set(recorded[done - 1]["moved"])
        # On the machine of the recording below 3e-5; other kernels sum in other orders.
        assert farthest(moved, recorded[done - 1]["moved"]) <= 3e-4
        if name != "undial":  # reported as a KL, which is less by the entropy of its target
            assert loss == pytest.approx(recorded[done - 1]["loss"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", given.CASES)
def test_another_rate_weight_or_sign_is_not_what_was_recorded(name: str, tmp_path: Path) -> None:
    theirs, method = REFERENCE["runs"][name][-1]["moved"], given.CASES[name].method
    changes: dict[str, Any] = {"fit": given.FIT.model_copy(update={"eps": 1e-8})}
    if hasattr(method, "alpha"):
        changes["alpha"] = method.alpha * 1.05
    if hasattr(method, "beta"):
        changes["beta"] = method.beta * 1.5
    for setting, value in changes.items():
        moved, _ = run(method.model_copy(update={setting: value}), name, tmp_path / setting)
        assert farthest(moved, theirs) > 1e-3, setting


def test_what_was_recorded_names_its_source() -> None:
    assert {"python", "torch", "transformers"} <= set(REFERENCE["versions"])
    assert "(MIT)" in REFERENCE["what"]
    assert set(REFERENCE["runs"]) == set(given.CASES)
