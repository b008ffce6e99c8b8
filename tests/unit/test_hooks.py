from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.models.hooks import capture, edit, find_module, match_modules, select, trainable
from excise.models.tiny import tiny_model

IDS_BT = torch.arange(4, 24).view(2, 10)


def _model(family: str = "llama", **more: Any) -> Any:
    return tiny_model(family, width=32, **more)


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_capture_gives_outputs_and_inputs_of_each_call() -> None:
    model = _model()
    first, second = "model.layers.0", "model.layers.1"
    with capture(model, [first]) as out, capture(model, ["layers.1"], of="input") as given:
        model(IDS_BT)
        model(IDS_BT + 1)
    assert [len(out[first]), len(given["layers.1"])] == [2, 2]
    assert torch.equal(out[first][0], given["layers.1"][0])
    assert not torch.equal(out[first][0], out[first][1])
    assert not out[first][0].requires_grad
    with capture(model, [second], grad=True) as kept:
        loss = model(IDS_BT).logits.sum()
        loss.backward()
    assert kept[second][0].requires_grad
    assert _hooks(model) == 0


def test_captured_copies_survive_later_edits_in_place() -> None:
    linear = nn.Linear(2, 2)
    nn.init.constant_(linear.weight, -1.0)
    layer = nn.Sequential(linear, nn.ReLU(inplace=True))
    with capture(layer, ["0"]) as got:
        layer(torch.ones(1, 2))
    assert (got["0"][0] < 0).all()


class Pair(NamedTuple):
    flag: str
    value: Tensor
    rest: int


class Many(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.last = form, nn.Identity()

    def forward(self, x: Tensor) -> Any:
        forms = {"tuple": (None, x, 3), "list": [x, 3], "dict": {"a": 3, "b": x}}
        return forms[self.form] if self.form in forms else Pair("a", x, 3)


class Outer(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.many = Many(form)

    def forward(self, x: Tensor) -> Any:
        return self.many(x=x)


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "named"])
def test_first_tensor_of_any_container_is_captured_and_edited(form: str) -> None:
    outer, x = Outer(form), torch.ones(2)
    with capture(outer, ["many"], of="input") as given, edit(outer, {"many": lambda t: t * 5}):
        out = outer(x)
    with capture(outer, ["many"]) as plain:
        outer(x)
    assert torch.equal(given["many"][0], x)
    assert torch.equal(plain["many"][0], x)
    assert type(out) is type(outer(x))
    values = list(out.values()) if isinstance(out, dict) else list(out)
    assert 3 in [v for v in values if isinstance(v, int)]
    assert [v.tolist() for v in values if isinstance(v, Tensor)] == [[5.0, 5.0]]


def test_edit_of_a_model_output_keeps_its_class() -> None:
    model = _model()
    with edit(model, {"model": torch.zeros_like}):
        out = model.model(IDS_BT)
        assert torch.equal(model(IDS_BT).logits, torch.zeros(2, 10, 260))
    assert type(out) is type(model.model(IDS_BT))
    assert not out.last_hidden_state.any()


def test_edits_nest_and_end() -> None:
    model = _model()
    plain = model(IDS_BT).logits
    path = "model.layers.0"
    with edit(model, {path: lambda x: x + 1}):
        with edit(model, {path: lambda x: x - 1}), capture(model, [path]) as got:
            both = model(IDS_BT).logits
        assert not torch.equal(model(IDS_BT).logits, plain)
    assert torch.allclose(both, plain, atol=1e-4)
    assert torch.equal(model(IDS_BT).logits, plain)
    assert len(got[path]) == 1


def test_no_hook_is_left_after_an_exception() -> None:
    model = _model()
    with pytest.raises(ZeroDivisionError), capture(model, ["model.layers.0"]):
        _ = 1 / 0
    with pytest.raises(ZeroDivisionError), edit(model, {"model.layers.0": lambda x: x * (1 // 0)}):
        model(IDS_BT)
    with pytest.raises(UserError, match="no module 'nowhere'"):
        capture(model, ["model.layers.0", "nowhere"]).__enter__()
    assert _hooks(model) == 0


def test_output_without_a_tensor_is_refused() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> int:
            return 3

    model = nn.Sequential(Nothing())
    with pytest.raises(UserError, match="'0' has no tensor as output"), capture(model, ["0"]):
        model(torch.ones(1))


def test_trainable_sets_and_restores() -> None:
    model = _model()
    frozen = "model.layers.0.mlp.up_proj.weight"
    model.get_parameter(frozen).requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    names = ["model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    with trainable(model, ["layers.1.mlp.up_proj", "layers.1.mlp.down_proj"]) as chosen:
        assert list(chosen) == names
        assert [n for n, p in model.named_parameters() if p.requires_grad] == names
        with trainable(model, [frozen]) as inner:
            assert list(inner) == [frozen]
        assert [n for n, p in model.named_parameters() if p.requires_grad] == names
        model(IDS_BT).logits.sum().backward()
        assert all(p.grad is not None for p in chosen.values())
    assert before == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ZeroDivisionError), trainable(model, ["down_proj"]):
        _ = 1 / 0
    assert before == {n: p.requires_grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("down_proj", 3),
        ("model.layers.1.mlp.down_proj", 1),
        ("layers.1.mlp.down_proj.weight", 1),
        ("layers.[12].mlp.down_proj", 2),
        ("layers.*.mlp.*_proj", 9),
        (r".*layers\.(0|2)\.mlp\.(up|down)_proj", 4),
        ("mlp", 9),
        ("layers.0", 12),
        ("q_proj.bias", 3),
    ],
)
def test_patterns(pattern: str, count: int) -> None:
    model = _model("qwen2", blocks=3)
    names = select(model, [pattern])
    assert len(names) == count
    assert set(names) <= {n for n, _ in model.named_parameters()}


def test_a_module_name_matches_weights_and_biases() -> None:
    assert select(_model("gpt2"), ["h.0.mlp.c_proj"]) == [
        "transformer.h.0.mlp.c_proj.weight",
        "transformer.h.0.mlp.c_proj.bias",
    ]
    assert select(_model("mixtral"), ["layers.1.mlp.experts.down_proj"]) == [
        "model.layers.1.mlp.experts.down_proj"
    ]
    assert select(_model("gpt2"), ["lm_head"]) == ["transformer.wte.weight"]


def test_a_pattern_that_matches_nothing_names_the_nearest() -> None:
    model = _model()
    with pytest.raises(UserError) as error:
        select(model, ["down_proj", "donw_proj"])
    words = str(error.value)
    assert words.startswith("'donw_proj' matches no weights of the model; nearest: down_proj, ")
    assert words.count(",") == 4
    with pytest.raises(UserError, match=r"nearest: layers\.0\.mlp, layers\.1\.mlp"):
        select(model, ["layers.9.mlp"])
    with pytest.raises(UserError, match="give at least one pattern"):
        select(model, [])
    with pytest.raises(UserError, match="'mlp' names 2 modules"):
        find_module(model, "mlp")
    with pytest.raises(UserError, match=r"no module of the model matches '\(bad'"):
        match_modules(model, ["(bad"])
    assert match_modules(model, ["mlp"]) == ["model.layers.0.mlp", "model.layers.1.mlp"]


class Wrapper(nn.Module):
    """Stands for DDP and FSDP, which keep the model under `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_names_are_the_same_under_wrappers() -> None:
    model = _model()
    wanted = ["model.layers.0.mlp.down_proj.weight"]
    compiled: Any = torch.compile(model, backend="eager")
    for wrapped in (Wrapper(model), compiled, Wrapper(Wrapper(model))):
        assert select(wrapped, ["layers.0.mlp.down_proj"]) == wanted
        assert find_module(wrapped, "model.layers.0") is model.model.layers[0]
        with trainable(wrapped, wanted) as chosen:
            assert chosen[wanted[0]] is model.get_parameter(wanted[0])
    inner: Any = _model()
    inner.model.layers[0] = torch.compile(inner.model.layers[0], backend="eager")
    assert select(inner, ["layers.0.mlp.down_proj"]) == wanted


def test_hooks_run_in_a_model_that_was_compiled_before() -> None:
    model = _model()
    plain = model(IDS_BT).logits
    compiled: Any = torch.compile(model.model.layers[0].mlp, backend="eager")
    x_BTD = torch.randn(2, 3, 32)
    compiled(x_BTD)
    with capture(compiled, ["down_proj"]) as got, edit(compiled, {"up_proj": torch.zeros_like}):
        assert not compiled(x_BTD).any()
    assert got["down_proj"][0].shape == (2, 3, 32)
    assert compiled(x_BTD).any()
    assert torch.equal(model(IDS_BT).logits, plain)


def test_peft_names_are_those_of_the_base() -> None:
    import peft

    base = _model()
    model = peft.get_peft_model(
        base, peft.LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM")
    )
    names = select(model, ["down_proj"])
    assert names == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    assert len(select(model, ["lora_A"])) == 2
    assert len(select(model, ["*lora_*"])) == 4
    with capture(model, ["model.layers.0.mlp.down_proj"]) as got:
        model(IDS_BT)
    assert got["model.layers.0.mlp.down_proj"][0].shape == (2, 10, 32)
