"""What works on families of models, and what is refused before it starts; tiny random models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.families import FAMILIES, FEW, MORE, save_family
from torch import Tensor

import excise as ex
from excise.auditor.controls.gated import add_gate, into_stream
from excise.core.context import Context
from excise.core.errors import UserError
from excise.methods import RMU, GradDiff
from excise.methods.base import Method, Removal
from excise.models.anatomy import anatomy, backbone
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.hooks import active_stream, capture, find_module
from excise.models.lora import LoRA, adapted, adapter_size, targets
from excise.models.names import select
from excise.models.structure import sizes
from excise.models.tiny import byte_tokenizer, tiny_model
from excise.testing import toy_domain
from excise.train.fit import FitConfig

FIT = FitConfig(steps=2, lr=1e-3, batch_size=2)
IDS_BT = torch.arange(4, 24).view(2, 10)
EACH = [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def apply(method: Method, start: Checkpoint, work: Path) -> Removal:
    work.mkdir()
    return method.apply(start, toy_domain(), Context(work=work, seed=3))


def trained(removal: Removal) -> dict[str, Tensor]:
    names = removal.extras["trained_tensors"]
    return dict(removal.checkpoint.weights_of(names))


@pytest.mark.parametrize("name", EACH)
def test_a_family_is_saved_edited_and_loaded(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    start, model = save_family(name, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(start.load()(IDS_BT).logits, model(IDS_BT).logits)
    parts = backbone(start.shapes)
    blocks = 5 if name == "gemma3n_text" else 3
    assert (parts.num_blocks, parts.d_model) == (blocks, 32)

    removal = apply(GradDiff(fit=FIT, max_length=16), start, tmp_path / "grad_diff")
    assert any(n.startswith(f"{parts.blocks[0]}.") for n in removal.changed)
    by_name = RMU(layer=1, modules=(family.module,), max_length=16, fit=FIT)
    span = apply(by_name, start, tmp_path / "span")
    full = apply(by_name.model_copy(update={"engine": "full"}), start, tmp_path / "full")
    assert span.extras["engine"] == ("span" if family.apart else "full")
    assert span.changed == tuple(sorted(select(model, [family.module])))
    ours, theirs = trained(span), trained(full)
    assert ours.keys() == theirs.keys()
    # The same sums; some CPUs add them up in another order for another shape.
    apart = max(float((ours[n] - theirs[n]).abs().max()) for n in ours)
    assert apart < 0.05 * moved(start, ours)
    found = RMU(layer=1, max_length=16, fit=FIT)
    if family.found:
        (tmp_path / "found").mkdir()
        assert apply(found, start, tmp_path / "found" / "work").changed
    else:
        with pytest.raises(UserError, match=rf"{name} model.*--modules '\[.*or use grad_diff"):
            apply(found, start, tmp_path / "found")


def moved(start: Checkpoint, now: Mapping[str, Tensor]) -> float:
    """Return how far the furthest entry of trained tensors moved."""
    before = start.weights_of(now)
    return max(float((now[n] - before[n]).abs().max()) for n in now)


def assert_equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("name", EACH)
def test_an_adapter_lies_on_the_blocks_of_a_family(name: str, tmp_path: Path) -> None:
    start, model = save_family(name, tmp_path / "model")
    parts, lora = backbone(model), LoRA(rank=2)
    modules, fused = targets(model)
    assert modules
    assert all(any(n.startswith(b + ".") for b in parts.blocks) for n in (*modules, *fused))
    with adapted(model, lora) as net:
        count = sum(p.numel() for p in net.parameters() if p.requires_grad)
        net(IDS_BT, use_cache=False).logits.sum().backward()
    assert count == adapter_size(start.shapes, lora)


def test_layers_that_peft_refuses_are_left_out_and_refused_by_name(tmp_path: Path) -> None:
    _, model = save_family("mamba", tmp_path / "model")
    leaves = {n.rpartition(".")[2] for n in targets(model)[0]}
    assert leaves == {"in_proj", "x_proj", "dt_proj"}
    with pytest.raises(UserError, match=r"names 'backbone.*out_proj', which mamba reads past"):
        targets(model, ["layers.1.mixer.out_proj"])


def test_routers_and_shared_layers_carry_no_adapter(tmp_path: Path) -> None:
    _, shared = save_family("zamba2", tmp_path / "zamba2")
    assert not any("shared_transformer.self_attn" in n for n in targets(shared)[0])
    with pytest.raises(UserError, match="whose weight is shared"):
        targets(shared, ["layers.1.shared_transformer.self_attn.o_proj"])
    with pytest.raises(UserError, match=r"no linear layer that an adapter can be put on; nearest"):
        targets(save_family("llama4_text", tmp_path / "llama4")[1], ["layers.1.*.router"])


def test_what_peft_refuses_is_one_sentence() -> None:
    class Own(torch.nn.Module):
        in_features, out_features = 32, 128

    model = tiny_model("llama", width=32)
    model.model.layers[1].mlp.up_proj = Own()
    lora = LoRA(modules=("up_proj",))
    match = r"^peft puts no adapter on .*Own\(\).* not supported"
    with pytest.raises(UserError, match=match), adapted(model, lora):
        pass
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_of_stacked_streams_the_first_is_read(tmp_path: Path) -> None:
    """Gemma 3n stacks four streams before the rows, of which attention and MLP read the first."""
    _, model = save_family("gemma3n_text", tmp_path / "model")
    paths = backbone(model).blocks
    with torch.no_grad(), capture(model, paths) as got:
        model(IDS_BT, use_cache=False)
    assert got[paths[0]][0].shape == (4, 2, 10, 32)
    assert torch.equal(active_stream(got[paths[0]][0]), got[paths[0]][0][0])
    assert active_stream(torch.ones(2, 10, 32)).shape == (2, 10, 32)


def test_shared_experts_carry_the_adapter_that_names_them(tmp_path: Path) -> None:
    """peft takes their names for those of the experts beside them, as they were stored once."""
    _, model = save_family("deepseek_v3", tmp_path / "model")
    lora = LoRA(rank=2, modules=("layers.1.mlp.shared_experts.up_proj",))
    with adapted(model, lora) as net:
        on = {n.partition(".lora_")[0] for n, _ in net.named_parameters() if ".lora_" in n}
    assert {n.removeprefix("base_model.model.") for n in on} == {
        "model.layers.1.mlp.shared_experts.up_proj"
    }


def test_weights_by_channel_are_no_experts(tmp_path: Path) -> None:
    """RWKV mixes by vectors of shape 1 x 1 x width, Mamba's convolution is width x 1 x kernel."""
    for name in ("rwkv", "mamba"):
        assert targets(save_family(name, tmp_path / name)[1])[1] == []


def test_blocks_that_a_shorter_model_would_not_have_are_loaded_whole(tmp_path: Path) -> None:
    """The last two blocks of this Gemma 3n take keys and values from those below."""
    start, model = save_family("gemma3n_text", tmp_path / "model")
    whole = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in start.load_prefix(2).parameters()) == whole
    assert sum(p.numel() for p in start.prefix_shapes(2).parameters()) == whole
    other, model = save_family("opt", tmp_path / "opt")
    above = sum(p.numel() for p in model.model.decoder.layers[2].parameters())
    assert sum(p.numel() for p in other.load_prefix(2).parameters()) == other.num_parameters - above


def test_the_weights_of_rwkv_are_not_halved_by_a_forward(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, RwkvConfig

    config = RwkvConfig(
        vocab_size=260, hidden_size=16, attention_hidden_size=16, intermediate_size=16,
        num_hidden_layers=3, rescale_every=1,
    )  # fmt: skip
    saved = save_model(AutoModelForCausalLM.from_config(config), byte_tokenizer(), tmp_path / "m")
    model = saved.load()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        model(IDS_BT, use_cache=False)
    assert_equal(before, dict(model.named_parameters()))


def test_a_single_name_need_not_be_a_list() -> None:
    assert RMU.model_validate({"modules": "down_proj"}).modules == ("down_proj",)
    assert GradDiff.model_validate({"modules": "down_proj"}).modules == ("down_proj",)
    assert LoRA.model_validate({"modules": "down_proj"}).modules == ("down_proj",)


def test_a_sweep_needs_blocks_that_run_apart(tmp_path: Path) -> None:
    start, _ = save_family("rwkv", tmp_path / "model")
    sweep = {"steering": (1.0, 2.0), "layer": (1,)}
    method = RMU.model_validate(
        {"modules": "blocks.1.feed_forward.value", "sweep": sweep, "engine": "cached"}
    )
    with pytest.raises(UserError, match="more than the residual stream, so that a sweep cannot"):
        apply(method, start, tmp_path / "work")


def test_a_model_without_blocks_is_sent_to_grad_diff() -> None:
    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(8, 4)
            self.head = torch.nn.Linear(4, 8)

    class Outline:
        shapes: Any = Bare()

    from excise.methods.posthoc.rmu.parameters import find_target_parameters

    with pytest.raises(UserError, match="needs a list of blocks and grad_diff none"):
        find_target_parameters(Outline(), 0, modules=("head",))  # type: ignore[arg-type]


SMALL = {
    "steps": 2, "checkpoints": (0, 2), "rates": (1e-3,), "lora_rates": (1e-3,),
    "max_test_rows": 4, "max_other_rows": 4,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["opt", "mamba", "rwkv", "zamba2", "gemma3n_text", "dbrx", "gpt_oss", "llama4_text"]
)
def test_an_audit_of_a_family_ends_with_no_attack_failed(name: str, tmp_path: Path) -> None:
    start, _ = save_family(name, tmp_path / "model")
    edited = apply(GradDiff(fit=FIT, max_length=16), start, tmp_path / "work").checkpoint
    record = ex.audit(edited.path, original=start.path, domain=toy_domain(), change=SMALL)
    of_attack: dict[str, set[str]] = {}
    for variant in record.attacks:
        of_attack.setdefault(variant.name, set()).add(variant.status)
        assert variant.status != "failed", variant.reason
    assert {"direction", "quantize", "relearn", "benign"} <= of_attack.keys()


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("gptj", "transformer.h.1.mlp.fc_out"),
        ("opt", "model.decoder.layers.1.fc2"),
        ("mamba", "backbone.layers.1.mixer.out_proj"),
        ("gpt_oss", "model.layers.1.self_attn.o_proj"),
        ("zamba2", "model.layers.1.mamba_decoder.mamba.out_proj"),
    ],
)
def test_a_gate_adds_to_the_stream_what_its_detector_reads(
    name: str, layer: str, tmp_path: Path
) -> None:
    """Adding c u v^T to the layer moves what it puts out by c (v . a) u for its input a."""
    _, model = save_family(name, tmp_path / "model")
    assert into_stream(model)[1] == layer
    v_F, u_D = torch.randn((sizes(find_module(model, layer)) or (0,))[0]), torch.randn(32)
    ins, outs = capture(model, [layer], of="input"), capture(model, [layer])
    with torch.no_grad(), ins as into, outs as out:
        model(IDS_BT, use_cache=False)
        add_gate(model, 1, v_F, u_D, 3.0)
        model(IDS_BT, use_cache=False)
    moved = out[layer][1] - out[layer][0]
    assert torch.allclose(moved, 3.0 * (into[layer][0] @ v_F)[..., None] * u_D, atol=1e-4)


def test_anatomy_is_what_the_table_says(tmp_path: Path) -> None:
    for name in ("opt", "dbrx", "gptj", "gemma3n_text"):
        model = save_family(name, tmp_path / name)[1]
        if FAMILIES[name].found:
            assert anatomy(model).d_model == 32
        else:
            with pytest.raises(UserError):
                anatomy(model)
