"""An adapter on a base in 4 bits, without bitsandbytes: what is refused, counted and keyed.

`tests/four_bit.py` is what runs with it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli import material as m

from excise.core.config import ConfigError, parse
from excise.core.errors import UserError
from excise.core.keys import identity
from excise.methods import METHODS, RMU, Chain, GradDiff, Method
from excise.models.checkpoint import Checkpoint
from excise.models.lora import LoRA, adapted, linears_in_4bit
from excise.models.tiny import tiny_model
from excise.requests.processes import check_packages
from excise.requests.recipe import Recipe
from excise.requests.registry import parse_recipe
from excise.run.estimate import _memory as estimated_memory

QLORA = LoRA(rank=2, load_in_4bit=True)
BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a weight; the paper says 4.127 (0.127 for the constants)."""


def recipe(**arms: Any) -> Recipe:
    """Return removals from two files that nobody reads."""
    domain = {"name": "files", "forget": "f.jsonl", "retain": "r.jsonl"}
    return parse_recipe(
        {"name": "r", "domain": domain, "model": {"path": "model"}, "arms": arms,
         "audit": {"budget": "none"}}
    )  # fmt: skip


def test_without_bitsandbytes_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    said = r"load_in_4bit needs the package bitsandbytes.*pip install 'excise\[bitsandbytes\]'"
    four = {"name": "grad_diff", "lora": {"load_in_4bit": True}}
    whole = {"name": "grad_diff", "lora": {"rank": 2}}
    check_packages(recipe(a=whole))
    with pytest.raises(UserError, match=said):
        check_packages(recipe(a=whole, b={"name": "chain", "methods": [whole, four]}))
    model = tiny_model("llama", width=64)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    modules = dict(model.named_modules())
    with pytest.raises(UserError, match=said), adapted(model, QLORA):
        pass
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    with adapted(model, LoRA(rank=2)):
        pass


def test_the_layers_are_those_that_an_adapter_goes_on_by_default() -> None:
    for family, count in (("llama", 14), ("gpt_neox", 8), ("phi3", 8)):
        model = tiny_model(family, width=64)
        names = {id(layer): name for name, layer in model.named_modules()}
        held = [names[id(layer)] for layer in linears_in_4bit(model)]
        assert len(held) == count
        assert all("layers." in name for name in held)


@pytest.mark.parametrize(
    ("family", "layer"),
    [("gpt2", "transformer.h.0.attn.c_attn"), ("mixtral", "model.layers.0.mlp.experts.")],
)
def test_other_layers_are_refused_by_name(family: str, layer: str) -> None:
    model = tiny_model(family, width=32)
    with pytest.raises(UserError, match=rf"'{layer}.*is none.*leave load_in_4bit out"):
        adapted(model, QLORA).__enter__()
    assert not hasattr(model, "peft_config")
    model = tiny_model("llama", width=96)
    with pytest.raises(UserError, match=r"multiple of 64 .*'model.layers.0.self_attn.q_proj'"):
        linears_in_4bit(model)


@pytest.mark.parametrize("name", ["filter_lora", "adapter_modules", "dual_adapters", "repselect"])
def test_methods_that_touch_the_base_take_none(name: str) -> None:
    field = "elicit" if name == "repselect" else "lora"
    with pytest.raises(ConfigError, match=rf"{field}: load_in_4bit: only methods that edit"):
        parse(METHODS[name], {field: {"load_in_4bit": True}}, {})
    parse(METHODS[name], {field: {"rank": 2}}, {})


def test_every_method_with_an_adapter_takes_it_or_says_why_not() -> None:
    fields = {n: f for n, c in METHODS.items() if (f := c.model_fields.get("lora")) is not None}
    refusing = {n for n, f in fields.items() if any("_in_full" in str(m) for m in f.metadata)}
    assert refusing == {"filter_lora", "adapter_modules", "dual_adapters"}
    assert {"grad_diff", "npo", "rmu", "elm", "circuit_breakers"} <= fields.keys() - refusing


def test_it_decides_the_identity_of_a_method() -> None:
    one, two = (GradDiff(lora=LoRA(load_in_4bit=on)) for on in (False, True))
    assert identity(one) != identity(two)
    assert identity(Chain(methods=(one, one))) != identity(Chain(methods=(one, two)))


def test_its_memory_is_counted_where_it_lies(tmp_path: Path) -> None:
    start = Checkpoint(m.save_tiny(tmp_path / "model", width=64))
    shapes = start.shapes
    layers = [p.numel() for n, p in shapes.named_parameters() if "_proj" in n]
    count, packed, largest = start.num_parameters, sum(layers), max(layers)

    def held(method: Method, device: str, activations: float) -> float:
        return estimated_memory(method, start, shapes, 2, activations, device)

    whole = GradDiff(lora=LoRA(rank=2))
    four = whole.model_copy(update={"lora": QLORA})
    much = 1e9  # of activations, so that the peak is while it trains
    cpu, card = (held(four, d, much) - held(whole, d, much) for d in ("cpu", "cuda:0"))
    assert cpu == pytest.approx(packed * BITS / 8 + 2 * largest)
    assert card == pytest.approx(packed * (BITS / 8 - 2) + 2 * largest)
    # Merged on the CPU, beside the originals; on an accelerator the model is whole but once.
    few = LoRA(rank=1, modules=("q_proj",))
    last = whole.model_copy(update={"lora": few})
    small = last.model_copy(update={"lora": few.model_copy(update={"load_in_4bit": True})})
    assert held(last, "cpu", 0.0) == held(last, "cuda:0", 0.0)
    assert held(small, "cpu", 0.0) - held(last, "cpu", 0.0) == pytest.approx(packed * BITS / 8)
    assert held(last, "cpu", 0.0) - held(small, "cuda:0", 0.0) == 2 * (count - largest)
    # Of RMU the blocks up to the steered one are there.
    rmu, rmu_four = (RMU(layer=0, engine="span", lora=lora) for lora in (LoRA(rank=2), QLORA))
    first = sum(
        p.numel() for n, p in shapes.named_parameters() if "layers.0." in n and "_proj" in n
    )
    change = held(rmu_four, "cuda", much) - held(rmu, "cuda", much)
    assert change == pytest.approx(first * (BITS / 8 - 2) + 2 * largest)
