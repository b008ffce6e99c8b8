"""What is computed on the CPU and on the second device and compared to the bit.

A process of its own: `python -m tests.device.comparisons` reads lines of JSON, a name of `CASES`
and its arguments, and answers each with a line: null where both agree, else what differs. The
device is registered here alone, since that cannot be taken back.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from excise.auditor.attacks import ATTACKS
from excise.auditor.base import Subject
from excise.auditor.budget import SMOKE
from excise.auditor.results import to_json
from excise.core.context import Context
from excise.models.checkpoint import Checkpoint
from excise.testing import toy_start
from excise.testing.methods import shortened
from tests.conftest import FIXTURES
from tests.device.second_device import NAME, install
from tests.fixtures.facts import make_domain
from tests.matrix import test_methods

DEVICES = ("cpu", NAME)

QUICK: Mapping[str, Mapping[str, Any]] = {
    "sampling": {"samples": (4,)},
    "lens": {"steps": 2, "batch": 16},
    "latent": {"steps": 2, "strengths": (1.0,), "blocks": 1},
    "steer": {"strengths": (1.0,), "blocks": 1},
    "prune": {"shares": (0.3,), "top_shares": (0.01,), "calibration_rows": 16},
    "noise": {"repair_steps": 2, "strengths": (0.1,)},
    "shrink_perturb": {"repair_steps": 2, "alphas": (0.3,)},
    "reinit": {"repair_steps": 2, "parts": ("norms", "attention")},
    "align_rows": {"steps": 3},
    "gcg": {"steps": 2, "width": 16, "tokens": 4, "rows": 4, "top": 16},
    "soft_prompt": {"vectors": 4, "rates": (0.03,)},
}
"""Attacks cut short: each kind of step is taken, few times."""

TIMES = ("seconds",)
"""Facts that no two runs share."""


def shared(value: Any, folder: str) -> Any:
    """Return plain data without times and the place of its files, which no two runs share."""
    if isinstance(value, Mapping):
        return {key: shared(item, folder) for key, item in value.items() if key not in TIMES}
    if isinstance(value, str) and value.startswith(folder):
        return Path(value).name
    return [shared(item, folder) for item in value] if isinstance(value, (list, tuple)) else value


def both(compute: Callable[[Context], Any]) -> str | None:
    """Compute something on either device, from other global random states; say what differs."""
    results = []
    for i, device in enumerate(DEVICES):
        torch.manual_seed(i)
        before = random_states()
        with tempfile.TemporaryDirectory() as folder:
            ctx = Context(Path(folder), seed=5, device=torch.device(device))
            results.append(shared(compute(ctx), folder))
        for name, state in random_states().items():
            if not torch.equal(state, before[name]):
                return f"computing on {device} left the global random state of {name} changed"
    return difference(*results)


def random_states() -> dict[str, torch.Tensor]:
    """Return the global random state of either device."""
    return {"cpu": torch.get_rng_state(), NAME: torch.get_device_module(NAME).get_rng_state()}


def difference(one: Any, two: Any, at: str = "") -> str | None:
    """Return where two pieces of plain data first differ."""
    if isinstance(one, Mapping) and isinstance(two, Mapping) and one.keys() == two.keys():
        return next((d for k in one if (d := difference(one[k], two[k], f"{at}.{k}"))), None)
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        pairs = enumerate(zip(one, two, strict=True))
        return next((d for i, (a, b) in pairs if (d := difference(a, b, f"{at}[{i}]"))), None)
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return None if torch.equal(one.cpu(), two.cpu()) else f"{at}: tensors differ"
    same = one == two or (one != one and two != two)
    return None if same else f"{at}: {one!r} on the CPU and {two!r} on the device"


def method(name: str, family: str) -> str | None:
    """Apply a method for two steps."""
    made = shortened(test_methods.made(name, family), 2)
    if name == "potion":
        made = made.model_copy(update={"tries": 2})
    domain = test_methods.domain_for(name)
    with tempfile.TemporaryDirectory() as folder:
        path = toy_start(Path(folder) / "start", family).path

        def apply(ctx: Context) -> Any:
            start = Checkpoint(path)  # counts from 0 what is read of it
            removal = made.apply(start, domain, ctx)
            of_model = {"fingerprint": removal.checkpoint.fingerprint, "changed": removal.changed}
            return {**of_model, "cost": asdict(removal.cost), "extras": dict(removal.extras)}

        return both(apply)


def attack(name: str) -> str | None:
    """Attack a model that was never taught, with one that was as the original."""
    models = [Checkpoint(FIXTURES / folder) for folder in ("never_taught", "knowing")]
    budget = SMOKE.model_copy(
        update={
            "steps": 2, "rates": (1e-3,), "checkpoints": (0, 1, 2), "batch_size": 8,
            "max_test_rows": 8, "max_other_rows": 8,
        }
    )  # fmt: skip

    def run(ctx: Context) -> Any:
        subject = Subject("never-taught", *models)
        result = ATTACKS[name].model_validate(QUICK.get(name, {})).run(subject, make_domain(), budget, ctx)
        return to_json(replace(result, seconds=0.0))

    return both(run)


CASES: Mapping[str, Callable[..., str | None]] = {"method": method, "attack": attack}


def main() -> None:
    """Answer until nobody asks."""
    install()
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        case, *arguments = json.loads(line)
        try:
            answer = CASES[case](*arguments)
        except Exception:
            answer = traceback.format_exc()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
