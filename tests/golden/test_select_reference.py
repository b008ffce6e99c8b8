"""RepSelect and ELM against numbers their released code gave, recorded by `record_select.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from excise.core.context import Context
from excise.data.stream import Batch
from excise.methods import RepSelect
from excise.methods.posthoc.elm import Guide, novice_target
from excise.methods.posthoc.repselect import put
from excise.methods.tuning import Progress
from excise.models.lora import LoRA
from excise.train.components import Components, without_top
from excise.train.fit import FitConfig
from tests.golden import rmu_inputs
from tests.golden import select_inputs as given

HERE = Path(__file__).parent
REFERENCE: dict[str, Any] = json.loads((HERE / "select_reference.json").read_text(encoding="utf-8"))
TENSORS = load_file(HERE / "select_reference.safetensors")
METHOD = RepSelect(
    components=Components(count=given.COMPONENTS),
    elicit_lr=given.LORA_LR,
    fit=FitConfig(lr=given.LR, batch_size=given.ROWS, optimizer="sgd"),
)


def reference_model() -> Any:
    """Return the model that the recorded runs started from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**given.CONFIG)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    rmu_inputs.fill(model)
    return model.eval()


def batches(step: int) -> list[Batch]:
    """Return a recorded batch."""
    ids_BT = given.ids(step)
    seen_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    scored_BT = seen_BT.clone()
    scored_BT[:, 0] = False
    return [Batch(ids_BT, seen_BT, scored_BT, torch.zeros_like(ids_BT), ("",) * given.ROWS)]


def subtracted(model: Any, method: RepSelect, folder: Path) -> dict[str, torch.Tensor]:
    """Return what a method would subtract, by name."""
    ctx = Context(folder)
    names = method.matrices(model)
    edited = {n: p for n, p in model.named_parameters() if n in names}
    progress = Progress(ctx, "x", given.BATCHES)
    with method.eliciting(model, names, batches, given.BATCHES, progress, ctx) as live:
        gradients, _ = method.gradients(live, edited, batches, given.BATCHES, ctx)
    return {
        name: without_top(gradients[name], method.components, ctx.seed_for(f"components/{i}"))
        for i, name in enumerate(names)
    }


def test_repselect_subtracts_what_the_released_code_does(tmp_path: Path) -> None:
    model = reference_model()
    ours = subtracted(model, METHOD, tmp_path)
    named = dict(model.named_parameters())
    for i, (name, matrix) in enumerate(ours.items()):
        theirs = TENSORS[f"repselect/{i}"]
        assert float((matrix - theirs).abs().max()) < 1e-4 * float(theirs.abs().max()), name
        before = named[name].detach().clone()
        for k, sums in enumerate(REFERENCE["repselect"]):
            put(named[name].data, before, matrix, k * given.LR)
            assert named[name].double().sum().item() == pytest.approx(sums[str(i)], abs=1e-5)


def test_without_the_adapter_it_would_be_another_matrix(tmp_path: Path) -> None:
    bare = METHOD.model_copy(update={"elicit": None})
    ours = next(iter(subtracted(reference_model(), bare, tmp_path).values()))
    theirs = TENSORS["repselect/0"]
    assert float((ours - theirs).abs().max()) > 1e-2 * float(theirs.abs().max())
    assert METHOD.elicit == LoRA(rank=8, alpha=8.0)


def test_elm_aims_where_the_released_code_does() -> None:
    model, text = reference_model(), given.text()
    guide = Guide(eta=given.ETA, top=given.TOP, temperature=given.TEMPERATURE)
    with torch.no_grad():
        said = [
            model(input_ids=torch.tensor([ids])).logits[0, -len(text) :]
            for ids in (text, given.EXPERT + text[1:], given.NOVICE + text[1:])
        ]
    own, expert, novice = said
    top_nK, share_nK = novice_target(own, expert, novice, guide)
    ours = torch.zeros_like(TENSORS["elm"]).scatter(1, top_nK, share_nK)
    torch.testing.assert_close(ours, TENSORS["elm"], rtol=0, atol=1e-5)
    swapped = novice_target(own, novice, expert, guide)
    other = torch.zeros_like(ours).scatter(1, *swapped)
    assert float((other - ours).abs().max()) > 0.1
