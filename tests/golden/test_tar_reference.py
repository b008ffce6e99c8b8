"""TAR against numbers that its released loops gave, recorded by `record_tar.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from excise.core.context import Context
from excise.data.stream import Batch
from excise.methods import TAR
from excise.methods.posthoc.tar import Attacker, OriginalStates, RandomVectors
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import byte_tokenizer
from excise.train.fit import FitConfig, Losses, Passes, fit
from tests.golden import rmu_inputs as filled
from tests.golden import tar_inputs as given

HERE = Path(__file__).parent
REFERENCE: dict[str, Any] = json.loads((HERE / "tar_reference.json").read_text(encoding="utf-8"))
TENSORS = load_file(HERE / "tar_reference.safetensors")
FIT = FitConfig(
    steps=given.STEPS, lr=given.LR, warmup=given.WARMUP, batch_size=5, optimizer="schedule_free"
)
METHOD = TAR(
    mapping=None, inner_steps=given.INNER_STEPS, every=given.EVERY, growth=given.GROWTH,
    scale=given.SCALE, entropy="all", fit=FIT,
)  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Write the model that the recorded run started from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**given.CONFIG))
    filled.fill(model)
    return save_model(model, byte_tokenizer(), tmp_path_factory.mktemp("tar") / "start")


def batch(topic: str, number: int) -> Batch:
    """Return a recorded batch."""
    ids_BT = given.ids(topic, number)
    seen_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    target_BT = seen_BT.clone()
    target_BT[:, 0] = False
    return Batch(ids_BT, seen_BT, target_BT, torch.zeros_like(ids_BT), ("",) * len(ids_BT))


def retain(step: int) -> list[dict[str, Batch]]:
    """Return the retain batch of a step; the release throws its first away."""
    return [{"retain": batch("retain", step + 1)}]


def attacker(step: int) -> Attacker:
    """Return the recorded attacker of a step."""
    read = given.attack_batches(step)
    _, lr, _ = given.ATTACKERS[step]
    return Attacker(lr, lambda k: [batch(*read[k])], [batch("unseen", step)])


def replay(
    start: Checkpoint, folder: Path, method: TAR = METHOD
) -> tuple[list[dict[str, float]], dict[str, Tensor], dict[str, Tensor]]:
    """Return terms of every step, the weights after the last, and the average they stand for."""
    model: Any = start.load(attn_implementation="eager")
    named = dict(model.named_parameters())
    states = OriginalStates(start, named, retain, given.STEPS, 0)

    def gradient(passes: Passes[dict[str, Batch]]) -> Losses:
        return method.gradient(passes, [attacker(passes.step)], states.at(passes))

    run = fit(
        model, retain, lambda *_: {}, method.fit, Context(folder), gradient=gradient,
        groups={"trained": list(named.values())},
    )  # fmt: skip
    return ended(run, named)


def ended(
    run: Iterator[Any], named: dict[str, Any]
) -> tuple[list[dict[str, float]], dict[str, Tensor], dict[str, Tensor]]:
    """Run a loop to its end and return its terms and its weights before and after settling."""
    terms = [next(run).terms for _ in range(given.STEPS)]
    last = {n: p.detach().clone() for n, p in named.items()}
    assert next(run, None) is None
    return terms, last, {n: p.detach().clone() for n, p in named.items()}


def furthest(ours: dict[str, Tensor], name: str) -> float:
    """Return the largest difference of weights from the recorded ones."""
    return max(float((t - TENSORS[f"{name}/{n}"]).abs().max()) for n, t in ours.items())


def test_the_released_loop_is_replayed(start: Checkpoint, tmp_path: Path) -> None:
    terms, last, average = replay(start, tmp_path)
    for ours, theirs in zip(terms, REFERENCE["runs"]["tar"], strict=True):
        assert ours["retain"] + ours["hidden"] == pytest.approx(theirs["retain_loss"], abs=2e-5)
    assert furthest(last, "tar") <= 1e-3 * given.LR
    assert furthest(average, "tar.average") <= 1e-3 * given.LR
    for name, weight in last.items():
        total = REFERENCE["runs"]["tar"][-1]["parameters"][name]["sum"]
        assert float(weight.double().sum()) == pytest.approx(total, abs=1e-3)


FAULTS: dict[str, dict[str, Any]] = {
    "entropy descended": {"scale": -given.SCALE},
    "looks alike": {"growth": 0.0},
    "looks at every step": {"every": 1},
    "no decay of attackers": {"inner_decay": 0.0},
    "no retain terms": {"alpha": 0.0},
    "a plain optimizer": {"fit": FIT.model_copy(update={"optimizer": "adamw"})},
}
"""Settings that make it another algorithm."""


@pytest.mark.parametrize("fault", FAULTS)
def test_another_algorithm_ends_elsewhere(fault: str, start: Checkpoint, tmp_path: Path) -> None:
    _, last, _ = replay(start, tmp_path, METHOD.model_copy(update=FAULTS[fault]))
    assert furthest(last, "tar") > 5e-3 * given.LR


def test_the_released_random_mapping_is_replayed(start: Checkpoint, tmp_path: Path) -> None:
    model: Any = start.load(attn_implementation="eager")
    named = dict(model.named_parameters())
    vectors = RandomVectors(TENSORS["mapping/table"], torch.arange(given.CONFIG["vocab_size"]))

    def both(step: int) -> list[dict[str, Batch]]:
        return [{"forget": batch("forget", step), "retain": batch("retain", step)}]

    run = fit(model, both, vectors.loss, FIT, Context(tmp_path))
    terms, last, average = ended(run, named)
    for ours, theirs in zip(terms, REFERENCE["runs"]["mapping"], strict=True):
        assert ours["forget"] == pytest.approx(theirs["cos_loss"], abs=2e-5)
        assert ours["retain"] == pytest.approx(theirs["lm_loss"], abs=2e-5)
    assert furthest(last, "mapping") <= 1e-3 * given.LR
    assert furthest(average, "mapping.average") <= 1e-3 * given.LR
