"""RMU against numbers that its released loop gave, recorded by `record_rmu.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from excise.core.context import Context
from excise.data.stream import Batch
from excise.methods import RMU
from excise.methods.posthoc.rmu import make_engine
from excise.methods.posthoc.rmu.parameters import editing
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import byte_tokenizer
from excise.train.fit import FitConfig, Term, fit
from tests.golden import rmu_inputs as given

HERE = Path(__file__).parent
REFERENCE: dict[str, Any] = json.loads((HERE / "rmu_reference.json").read_text(encoding="utf-8"))
TENSORS = load_file(HERE / "rmu_reference.safetensors")
FIT = FitConfig(
    steps=given.STEPS, lr=given.LR, batch_size=given.ROWS, optimizer="hf_adamw", master="model"
)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Write the model that the recorded run started from."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**given.CONFIG)
    config._attn_implementation = "eager"
    model = MistralForCausalLM(config)
    given.fill(model)
    return save_model(model, byte_tokenizer(), tmp_path_factory.mktemp("rmu") / "start")


def batch(topic: int, step: int) -> Batch:
    """Return a recorded batch."""
    ids_BT, mask_BT = given.padded(given.texts(topic, step), 512 if topic < 1 else 768)
    seen_BT = mask_BT.bool()
    return Batch(ids_BT, seen_BT, seen_BT, torch.zeros_like(ids_BT), ("",) * given.ROWS)


def batches(step: int) -> list[dict[str, Batch]]:
    """Return the batches of a step."""
    turn, topic = divmod(step, given.TOPICS)
    return [{f"{topic}": batch(topic, turn), "retain": batch(-1, turn)}]


def replay(
    start: Checkpoint,
    dtype: str,
    folder: Path,
    engine: Literal["full", "span", "cached"] = "full",
    settings: FitConfig = FIT,
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Run ours on the recorded inputs; return the terms of each step and the trained tensors."""
    method = RMU(layer=given.LAYER, as_published=True, engine=engine, fit=settings)
    ctx = Context(work=folder, dtype=getattr(torch, dtype))
    model = start.load(dtype=ctx.dtype, attn_implementation="eager")
    targets = method.target_parameters(start)
    controls = {f"{t}": TENSORS[f"{dtype}/control.{t}"] for t in range(given.TOPICS)}
    alpha = {f"{t}": given.ALPHA[t] for t in range(given.TOPICS)}
    with editing(model, targets, method.lora, ctx) as edit:
        activations = make_engine(method, start, edit, targets, ctx)
        if engine == "full":
            activations.frozen.set_attn_implementation("eager")  # type: ignore[attr-defined]

        def loss(_net: Any, micro: Mapping[str, Batch]) -> dict[str, Term]:
            return method.terms(activations, micro, controls, alpha)

        groups = {"trained": list(edit.parameters.values())}
        steps = fit(model, batches, loss, settings, ctx, groups=groups)
        terms = [record.terms for record in steps]
        return terms, {n: p.detach().clone() for n, p in edit.parameters.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_released_loop_is_replayed(start: Checkpoint, dtype: str, tmp_path: Path) -> None:
    run = REFERENCE["runs"][dtype]
    terms, ends = replay(start, dtype, tmp_path)
    # On the machine of the recording both differences are 0.0; other kernels sum in other orders.
    close = 1e-6 if dtype == "float32" else 1e-2
    for ours, theirs in zip(terms, run["steps"], strict=True):
        for name in ("forget", "retain"):
            assert ours[name] == pytest.approx(theirs[name], rel=close, abs=close * 1e-2)
    assert sorted(ends) == run["moved"]
    for name, tensor in ends.items():
        theirs_end = TENSORS[f"{dtype}/{name}"]
        apart = (tensor != theirs_end).float().mean()
        assert (tensor.float() - theirs_end.float()).abs().max() <= 1e-3 * given.LR or (
            dtype == "bfloat16" and apart < 0.02
        )
        shown = float(tensor.double().sum())
        assert shown == pytest.approx(run["steps"][-1]["parameters"][name]["sum"], abs=1e-2)


def test_the_other_adamw_is_another_algorithm(start: Checkpoint, tmp_path: Path) -> None:
    other = FIT.model_copy(update={"optimizer": "adamw"})
    _, ends = replay(start, "float32", tmp_path, settings=other)
    far = max(float((ends[n] - TENSORS[f"float32/{n}"]).abs().max()) for n in ends)
    assert far > 0.1 * given.LR
