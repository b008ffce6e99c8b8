from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from excise.core.errors import UserError
from excise.models.anatomy import anatomy
from excise.models.hooks import capture, find_module, select
from excise.models.tiny import FAMILIES, tiny_config, tiny_model

IDS_BT = torch.arange(4, 24).view(2, 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_table_and_structure_agree_and_paths_are_real(family: str) -> None:
    model = tiny_model(family, width=32, blocks=3)
    parts = anatomy(model)
    assert parts == anatomy(model, by_structure=True)
    assert parts == anatomy(model.config)
    assert (parts.num_blocks, parts.d_model, parts.d_mlp) == (3, 32, 128)
    assert parts.tied is model.config.tie_word_embeddings
    assert parts.transposed is (family == "gpt2")
    single = [parts.embed, parts.final_norm, parts.head]
    for path in [*single, *parts.blocks, *parts.attention, *parts.attention_out, *parts.mlp]:
        assert isinstance(model.get_submodule(path), nn.Module)
    assert all(len(norms) in (2, 4) for norms in parts.norms)
    assert len(select(model, parts.mlp_down)) == (6 if family in ("gpt2", "gpt_neox") else 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_mean_what_they_say(family: str) -> None:
    """Zeroing the down-projection makes the MLP put out nothing, whatever the family."""
    model = tiny_model(family, width=32)
    parts = anatomy(model)
    with torch.no_grad():
        for name in select(model, [parts.mlp_down[0]]):
            model.get_parameter(name).zero_()
        with capture(model, [parts.mlp[0], parts.mlp[1], parts.blocks[1]]) as got:
            logits = model(IDS_BT).logits
        head = find_module(model, parts.head)
        normed = find_module(model, parts.final_norm)(got[parts.blocks[1]][0])
    assert not got[parts.mlp[0]][0].any()
    assert got[parts.mlp[1]][0].any()
    capped = head(normed)
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        capped = torch.tanh(capped / cap) * cap
    assert torch.allclose(capped, logits, atol=1e-6)


def test_gate_and_up_of_a_fused_matrix() -> None:
    model = tiny_model("phi3", width=32)
    parts = anatomy(model)
    mlp = find_module(model, parts.mlp[0])
    x_BTD = torch.randn(1, 3, 32)
    weight = find_module(model, parts.mlp_up[0]).get_parameter("weight")
    rows = {n: weight[slice(*r)] for n, r in parts.slices.items()}
    inside = torch.nn.functional.silu(x_BTD @ rows["mlp_gate"].T) * (x_BTD @ rows["mlp_up"].T)
    assert torch.allclose(find_module(model, parts.mlp_down[0])(inside), mlp(x_BTD), atol=1e-6)


def test_experts_are_slices_of_fused_parameters() -> None:
    model = tiny_model("mixtral", width=32)
    parts = anatomy(model)
    experts = parts.experts[1]
    assert experts is not None
    assert experts.count == 4
    weight = experts.down[3]
    assert (weight.parameter, weight.index) == ("model.layers.1.mlp.experts.down_proj", 3)
    assert weight.parameter == parts.mlp_down[1]
    assert model.get_parameter(weight.parameter)[3].shape == (32, 128)
    assert experts.slices == parts.slices == {"mlp_gate": (0, 128), "mlp_up": (128, 256)}
    assert anatomy(tiny_config("llama", width=32)).experts == (None, None)


@pytest.mark.parametrize(
    ("kind", "down", "gate"),
    [
        ("starcoder2", "model.layers.1.mlp.c_proj", ""),
        ("gptj", "transformer.h.1.mlp.fc_out", ""),
        ("stablelm", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate_proj"),
        ("glm4", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate_up_proj"),
    ],
)
def test_families_nobody_listed_are_found_by_structure(kind: str, down: str, gate: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config.num_hidden_layers = 2
    parts = anatomy(config)
    assert (parts.mlp_down[1], parts.mlp_gate[1]) == (down, gate)
    assert parts.attention[1].endswith(("self_attn", "attn"))


def test_experts_stored_in_out_and_interleaved() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("gpt_oss", num_hidden_layers=1, intermediate_size=64)
    experts = anatomy(config).experts[0]
    assert experts is not None
    assert experts.transposed
    assert not experts.slices
    assert anatomy(config).d_mlp == 64


def test_what_is_missed_is_listed() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("opt", num_hidden_layers=2)
    with pytest.raises(UserError, match=r"parts of a opt model .* the MLP of a block"):
        anatomy(config)
    with pytest.raises(UserError, match=r"the blocks \(a ModuleList.*the token embedding.*head"):
        anatomy(nn.Sequential(nn.Linear(2, 2)))


def test_wrapped_models_have_the_same_anatomy() -> None:
    import peft

    model: Any = tiny_model("gpt2", width=32)
    plain, structure = anatomy(model), anatomy(model, by_structure=True)
    config = peft.LoraConfig(
        target_modules=["mlp.c_proj", "c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, config)
    assert anatomy(wrapped) == plain == structure == anatomy(wrapped, by_structure=True)
    assert isinstance(find_module(wrapped, plain.mlp_down[0]), peft.tuners.lora.LoraLayer)
    assert anatomy(torch.compile(wrapped, backend="eager")) == plain
