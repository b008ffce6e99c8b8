"""Growing, deleting, zeroing and re-initialising units, heads and experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fixtures.gpt_neo import gpt_neo
from torch import Tensor

from excise.core.errors import UserError
from excise.models.checkpoint import save_model
from excise.models.tiny import FAMILIES, byte_tokenizer, tiny_model
from excise.routing import Part, count_units, delete, grow, reinit, zero
from excise.routing.surgery import ranges_of

DENSE = [family for family in FAMILIES if family != "mixtral"]
IDS = torch.arange(4, 28).reshape(2, 12)


def model_of(family: str, **more: Any) -> Any:
    if family == "gpt_neo":
        return gpt_neo(seed=1, **more)
    return tiny_model(family, seed=1, width=32, blocks=2, **more)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits
    return out


def bits(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("family", DENSE)
def test_grown_and_deleted_a_model_has_its_old_bytes(family: str) -> None:
    model = model_of(family)
    before, config, said = bits(model), model.config.to_dict(), logits(model)
    parts = grow(model, {1: 5}, seed=3)
    assert parts == (Part(at="mlp", blocks=(1,), units=(128, 133)),)
    assert [count_units(model, block) for block in (0, 1)] == [128, 133]
    assert not torch.equal(logits(model), said)
    delete(model, parts)
    assert equal(bits(model), before)
    assert torch.equal(logits(model), said)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("family", DENSE)
def test_new_units_that_lead_nowhere_change_nothing(family: str) -> None:
    model = model_of(family)
    said = logits(model)
    (part,) = grow(model, {0: 6}, seed=3, silent=True)
    torch.testing.assert_close(logits(model), said, rtol=0, atol=1e-6)
    fresh = {n: bits(model)[n].narrow(d, a, b - a)
             for n, spans in ranges_of(model, [part]).items() for d, a, b in spans}  # fmt: skip
    assert sorted(float(t.abs().sum()) > 0 for t in fresh.values()).count(False) >= 1
    std = [float(t.std()) for n, t in fresh.items() if t.dim() == 2 and t.any()]
    assert std
    assert all(0.012 < s < 0.3 for s in std)


@pytest.mark.parametrize("family", DENSE)
def test_a_model_without_the_units_says_the_same(family: str, tmp_path: Path) -> None:
    """Deleted equals a model that is built narrower and given what is left."""
    wide = model_of(family)
    field = "n_inner" if family == "gpt2" else "intermediate_size"
    never = model_of(family, **{field: 120})
    delete(wide, [Part(at="mlp", units=(40, 48))])
    assert getattr(wide.config, field) == 120
    never.load_state_dict(wide.state_dict())
    assert torch.equal(logits(wide), logits(never))
    again = save_model(wide, byte_tokenizer(), tmp_path / "made").load()
    assert torch.equal(logits(again), logits(wide))


@pytest.mark.parametrize("family", DENSE)
def test_deleted_units_count_for_as_much_as_zeroed_ones(family: str) -> None:
    parts = [Part(at="mlp", blocks=(0,), units=(3, 9)), Part(at="mlp", blocks=(1,), units=(0, 50))]
    gone, still = model_of(family), model_of(family)
    delete(gone, parts)
    zero(still, parts)
    torch.testing.assert_close(logits(gone), logits(still), rtol=0, atol=2e-5)
    assert not torch.allclose(logits(still), logits(model_of(family)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
def test_heads_leave_in_groups(family: str, tmp_path: Path) -> None:
    four = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = model_of(family, **four)
    part = Part(at="heads", units=(2, 4))
    still = model_of(family, **four)
    zero(still, [part])
    delete(model, [part])
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
    torch.testing.assert_close(logits(model), logits(still), rtol=0, atol=2e-5)
    never = model_of(family, **{**four, "num_attention_heads": 2, "num_key_value_heads": 1})
    never.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(never))
    again = save_model(model, byte_tokenizer(), tmp_path / "made").load()
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(UserError, match="share keys and values with others"):
        delete(model_of(family, **four), [Part(at="heads", units=(3, 4))])


@pytest.mark.parametrize(
    ("family", "heads"),
    [("gpt2", "n_head"), ("gpt_neox", "num_attention_heads"), ("gpt_neo", "num_heads")],
)
def test_heads_that_share_nothing_leave_one_by_one(family: str, heads: str) -> None:
    more = {heads: 4}
    part = Part(at="heads", units=(1, 2))
    gone, still = model_of(family, **more), model_of(family, **more)
    zero(still, [part])
    delete(gone, [part])
    assert [count_units(gone, block, "heads") for block in (0, 1)] == [3, 3]
    torch.testing.assert_close(logits(gone), logits(still), rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "gpt_neo"])
def test_heads_grow_and_leave(family: str) -> None:
    model = model_of(family)
    before, said = bits(model), logits(model)
    parts = grow(model, {1: 2}, seed=2, what="heads", silent=True)
    torch.testing.assert_close(logits(model), said, rtol=0, atol=1e-6)
    assert not equal(bits(model), before)
    delete(model, parts)
    assert equal(bits(model), before)
    assert torch.equal(logits(model), said)


def test_experts_grow_and_leave(tmp_path: Path) -> None:
    model = model_of("mixtral")
    before, said = bits(model), logits(model)
    parts = grow(model, 1, seed=2, what="experts")
    assert model.config.num_local_experts == 5
    again = save_model(model, byte_tokenizer(), tmp_path / "grown").load()
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(model), said)
    delete(model, parts)
    assert equal(bits(model), before)
    assert torch.equal(logits(model), said)
    delete(model, [Part(at="experts", units=(1, 2))])
    never = model_of("mixtral", num_local_experts=3)
    never.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(never))


def test_drawn_anew_units_are_as_large_as_the_others() -> None:
    model = model_of("llama")
    part = Part(at="mlp", blocks=(0,), units=(96, 128))
    zero(model, [part])
    reinit(model, [part], seed=4)
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    assert float(weight[96:].std() / weight[:96].std()) == pytest.approx(1, abs=0.15)
    one, other = model_of("llama"), model_of("llama")
    reinit(one, [part], seed=4)
    reinit(other, [part], seed=5)
    old = model_of("llama").model.layers[0].mlp.up_proj.weight
    assert torch.equal(one.model.layers[0].mlp.up_proj.weight, weight)
    assert torch.equal(one.model.layers[0].mlp.up_proj.weight[:96], old[:96])
    assert not torch.equal(other.model.layers[0].mlp.up_proj.weight[96:], weight[96:])


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([Part(at="embed")], "cannot be deleted, only zeroed"),
        ([Part(at="mlp", units=(0, 128))], "would be left with 0 of its mlp"),
        ([Part(at="mlp", units=(120, 140))], "do not lie within the 128"),
        ([Part(at="experts", units=(0, 1))], "has no experts"),
    ],
)
def test_what_cannot_leave_is_refused(parts: list[Part], says: str) -> None:
    with pytest.raises(UserError, match=says):
        delete(model_of("llama"), parts)


def test_what_cannot_grow_is_refused() -> None:
    with pytest.raises(UserError, match="there is no block 7"):
        grow(model_of("llama"), {7: 1}, seed=0)
    with pytest.raises(UserError, match="multiple of the 2"):
        grow(model_of("llama"), 1, seed=0, what="heads")
    with pytest.raises(UserError, match="needs 2"):
        delete(model_of("mixtral"), [Part(at="experts", units=(0, 3))])
