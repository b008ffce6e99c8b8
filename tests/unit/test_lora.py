from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.models.hooks import find_module
from excise.models.lora import LoRA, adapted, merge, reference, targets
from excise.models.tiny import FAMILIES, tiny_model

IDS_BT = torch.arange(4, 24).view(2, 10)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def _same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[n], state[n]) for n in now)


def _train(peft_model: Any, steps: int = 2) -> None:
    chosen = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(chosen, lr=1.0)
    for _ in range(steps):
        peft_model(IDS_BT, labels=IDS_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_merge_and_unload(family: str) -> None:
    model = tiny_model(family, width=32)
    state, kinds = _state(model), [type(m) for m in model.modules()]
    attributes = set(vars(model))
    with torch.no_grad():
        plain = model(IDS_BT).logits
    with adapted(model, LoRA(rank=2)) as tuned:
        assert not tuned.training
        with torch.no_grad():
            assert torch.equal(tuned(IDS_BT).logits, plain), "starts as the identity"
        _train(tuned)
        trained = {n for n, p in tuned.named_parameters() if p.requires_grad}
        assert trained
        assert all("lora_" in n for n in trained)
        with torch.no_grad():
            moved = tuned(IDS_BT).logits
            with reference(tuned):
                assert torch.equal(tuned(IDS_BT).logits, plain)
            assert torch.equal(tuned(IDS_BT).logits, moved)
        assert not torch.allclose(moved, plain, atol=1e-3)
        merged, cost = merge(tuned)
    assert _same(model, state)
    assert [type(m) for m in model.modules()] == kinds
    assert set(vars(model)) == attributes
    assert all(p.requires_grad for p in model.parameters())
    names = {n for n, _ in model.named_parameters()}
    assert set(merged) <= names
    model.load_state_dict(merged, strict=False)
    with torch.no_grad():
        assert torch.allclose(model(IDS_BT).logits, moved, atol=1e-4)
    assert cost["merge_rounding"] == 0.0
    assert cost["merge_rounding_bf16"] > 0.0


def test_all_linear_layers_of_the_blocks_by_default() -> None:
    modules, parameters = targets(tiny_model("llama", width=32))
    assert len(modules) == 14
    assert not parameters
    modules, parameters = targets(tiny_model("mixtral", width=32))
    assert len(modules) == 8
    assert len(parameters) == 4


@pytest.mark.parametrize(
    ("patterns", "count"), [(("down_proj",), 2), (("layers.0.mlp", "lm_head"), 4), (("*.q_*",), 2)]
)
def test_modules_by_name(patterns: tuple[str, ...], count: int) -> None:
    model = tiny_model("llama", width=32)
    with adapted(model, LoRA(rank=2, modules=patterns)) as tuned:
        names = [n for n, _ in tuned.named_parameters() if "lora_A" in n]
    assert len(names) == count


def test_seed_decides_and_the_global_state_stays() -> None:
    model = tiny_model("llama", width=32)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        with adapted(model, LoRA(modules=("down_proj",)), seed) as tuned:
            layer = find_module(tuned, "layers.0.mlp.down_proj")
            drawn.append(layer.lora_A["default"].weight.detach().clone())  # type: ignore[index, union-attr]
        after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_flags_and_modules_come_back_after_an_exception() -> None:
    model = tiny_model("gpt2", width=32)
    model.requires_grad_(False)
    state = _state(model)
    with suppress(ZeroDivisionError), adapted(model, LoRA()) as tuned:
        _train(tuned)
        _ = 1 / 0
    assert _same(model, state)
    assert not any(p.requires_grad for p in model.parameters())
    with adapted(model, LoRA()):
        pass


def test_reference_keeps_flags_and_gradients_between() -> None:
    model = tiny_model("llama", width=32)
    with adapted(model, LoRA()) as tuned:
        frozen = next(n for n, p in tuned.named_parameters() if p.requires_grad)
        tuned.get_parameter(frozen).requires_grad_(False)
        loss = tuned(IDS_BT, labels=IDS_BT).loss
        with torch.no_grad(), reference(tuned):
            tuned(IDS_BT)
        loss.backward()
        assert tuned.get_parameter(frozen).grad is None
        left = [p for p in tuned.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in left)
        with pytest.raises(ZeroDivisionError), reference(tuned):
            _ = 1 / 0
        assert not tuned.get_parameter(frozen).requires_grad


def test_rounding_in_half_precision_is_told() -> None:
    model = tiny_model("llama", width=32).to(torch.bfloat16)
    with adapted(model, LoRA(modules=("down_proj",))) as tuned:
        layer = find_module(tuned, "layers.0.mlp.down_proj")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # type: ignore[index, union-attr]
        assert a.dtype == torch.float32
        with torch.no_grad():
            b.fill_(1e-6)
        merged, cost = merge(tuned)
        name = "model.layers.0.mlp.down_proj.weight"
        weight = layer.get_parameter("base_layer.weight")
        exact = (weight.float() + 2.0 * (b @ a)).detach()
        assert merged[name].dtype == torch.bfloat16
        assert torch.equal(merged[name], exact.bfloat16())
        assert cost["merge_rounding"] == pytest.approx(
            float((exact - exact.bfloat16().float()).abs().max())
        )
        assert cost["merge_rounding"] == cost["merge_rounding_bf16"] > 0
        assert cost["merge_lost_bf16"] > 0.9


def test_mistakes_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", width=32)
    with pytest.raises(UserError, match=r"'down_prj' matches no linear layer; nearest: down_proj"):
        adapted(model, LoRA(modules=("down_prj",))).__enter__()
    with adapted(model, LoRA()), pytest.raises(UserError, match="has an adapter already"):
        adapted(model, LoRA()).__enter__()
    with pytest.raises(UserError, match="has no adapter"):
        merge(model)
    with pytest.raises(UserError, match=r"'lm_head', whose weight is shared"):
        adapted(tiny_model("gpt2", width=32), LoRA(modules=("lm_head",))).__enter__()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install excise\[lora\]"):
        adapted(model, LoRA()).__enter__()
