"""What excise computes does not depend on the device, to the bit; and how often it waits for one.

Everything here runs on `tests/device/second_device.py`, in one process beside this. Adapters of
PEFT run too. Not held: several processes, and the kernels of Liger, which ask for CUDA by name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from excise.auditor.attacks import ATTACKS
from excise.auditor.budget import BUDGETS
from excise.evals.score import DEFINITIONS
from excise.methods import METHODS

ROOT = Path(__file__).parents[2]

Ask = Callable[..., Any]
"""Asks for one case of `tests/device/comparisons.py`."""


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Start the process that has the device, and end it after the last test."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.device.comparisons"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def answer(*case: Any) -> Any:
            questions.write(json.dumps(case) + "\n")
            questions.flush()
            line = answers.readline()
            assert line, f"the process with the device ended at {case}"
            return json.loads(line)

        yield answer


def test_the_device_refuses_what_cuda_refuses(ask: Ask) -> None:
    assert ask("mixed") is None


def test_what_makes_the_host_wait_is_counted(ask: Ask) -> None:
    assert ask("counted") == {
        "item": 1, "bool": 1, "tolist": 1, "cpu": 1, "nonzero": 1, "mask": 1, "equal": 1,
        "sum": 0, "indices": 0,
    }  # fmt: skip


def test_what_depends_on_the_device_is_seen(ask: Ask) -> None:
    drawn, seeded, rounded = ask("faults")
    assert "global random state of cpu" in drawn
    assert "global random state" in seeded
    assert rounded == ": tensors differ"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_the_same_bytes(ask: Ask, name: str) -> None:
    assert ask("method", name, "llama") is None


@pytest.mark.parametrize("name", ["grad_diff", "rmu", "era", "ssd"])
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_method_gives_the_same_bytes_on_other_families(ask: Ask, name: str, family: str) -> None:
    assert ask("method", name, family) is None


@pytest.mark.parametrize("name", ["grad_diff", "rmu", "npo"])
def test_an_adapter_gives_the_same_bytes(ask: Ask, name: str) -> None:
    assert ask("adapter", name) is None


@pytest.mark.parametrize("name", ["grad_diff", "rmu"])
def test_a_killed_method_resumes_on_the_device_to_the_same_bytes(ask: Ask, name: str) -> None:
    assert ask("resumed", name) is None


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gives_the_same_numbers(ask: Ask, name: str) -> None:
    assert ask("attack", name) is None


def test_every_attack_of_the_budgets_is_among_them() -> None:
    assert {name for budget in BUDGETS.values() for name in budget.attacks} <= set(ATTACKS)


@pytest.mark.parametrize("metric", DEFINITIONS)
def test_a_score_is_the_same(ask: Ask, metric: str) -> None:
    assert ask("scores", metric) is None


@pytest.mark.parametrize("what", ["study", "sampled", "route", "pool"])
def test_studies_samples_workers_and_ones_own_loop_are_the_same(ask: Ask, what: str) -> None:
    assert ask(what) is None


@pytest.mark.parametrize("micro_size", [0, 4, 1])
def test_a_step_waits_for_the_device_twice(ask: Ask, micro_size: int) -> None:
    """Once for the values of all terms and micro-batches, once for the gradient's norm."""
    assert ask("waits", micro_size)["excise"] == 2
