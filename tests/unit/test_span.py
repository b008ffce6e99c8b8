from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.data.stream import Batch, Example, collate
from excise.models.anatomy import anatomy
from excise.models.hooks import capture, edit, trainable
from excise.models.span import hidden_after, record_calls, run_span, without_start
from excise.models.tiny import FAMILIES, tiny_model

WINDOWED = {"mistral", "gemma2", "gemma3"}


def _model(family: str, **more: Any) -> Any:
    window: dict[str, Any] = {"sliding_window": 4} if family in WINDOWED else {}
    return tiny_model(family, width=32, blocks=3, **window, **more)


def _batch(side: str) -> Batch:
    rows = [tuple(range(4, 4 + n)) for n in (12, 5, 9)]
    examples = [Example(ids, (False, *[True] * (len(ids) - 1)), 0, "u") for ids in rows]
    return collate(examples, pad_id=0, padding_side=side)


def _blocks_out(model: Any, inputs: dict[str, Tensor], grad: bool = False) -> list[Tensor]:
    paths = anatomy(model).blocks
    with capture(model, paths, grad=grad) as got:
        model(**inputs)
    return [got[path][0] for path in paths]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_span_is_the_full_forward_bit_for_bit(family: str, side: str) -> None:
    model, inputs = _model(family), _batch(side).inputs
    with torch.no_grad():
        full = _blocks_out(model, inputs)
    calls = record_calls(model, inputs, 3)
    hidden = calls.hidden_BTD
    assert not hidden.requires_grad
    for i in range(3):
        assert torch.equal(run_span(model, calls, hidden, 0, i + 1, grad=False), full[i])
        for j in range(i, 3):
            assert torch.equal(run_span(model, calls, full[i], i + 1, j + 1, grad=False), full[j])
    assert torch.equal(hidden_after(model, inputs, 1), full[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_full_forward(family: str) -> None:
    model, inputs = _model(family), _batch("left").inputs
    parts = anatomy(model)
    with trainable(model, parts.mlp_down[:2]) as chosen:
        full = _blocks_out(model, inputs, grad=True)[1]
        expected = torch.autograd.grad(full.square().sum(), list(chosen.values()))
        calls = record_calls(model, inputs, 2, parts=parts)
        start = run_span(model, calls, calls.hidden_BTD, 0, 0, grad=False)
        span = run_span(model, calls, start, 0, 2)
        got = torch.autograd.grad(span.square().sum(), list(chosen.values()))
        assert torch.equal(span, full)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with trainable(model, [parts.mlp_down[1]]) as chosen:
        full = _blocks_out(model, inputs, grad=True)[1]
        (wanted,) = torch.autograd.grad(full.square().sum(), next(iter(chosen.values())))
        start = run_span(model, calls, calls.hidden_BTD, 0, 1, grad=False)
        span = run_span(model, calls, start, 1, 2)
        (found,) = torch.autograd.grad(span.square().sum(), next(iter(chosen.values())))
        assert not start.requires_grad
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_embeddings_keep_their_graph_when_asked(family: str) -> None:
    model, inputs = _model(family), _batch("right").inputs
    weight = model.get_input_embeddings().weight
    full = _blocks_out(model, inputs, grad=True)[0]
    (expected,) = torch.autograd.grad(full.sum(), weight)
    calls = record_calls(model, inputs, 1, grad=True)
    out = run_span(model, calls, calls.hidden_BTD, 0, 1)
    (got,) = torch.autograd.grad(out.sum(), weight)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windows_and_half_precision(family: str) -> None:
    inputs = _batch("left").inputs
    model = _model(family).to(torch.bfloat16)
    wide = tiny_model(family, width=32, blocks=3).to(torch.bfloat16)
    with torch.no_grad():
        full = _blocks_out(model, inputs)[2]
        assert not torch.equal(full, _blocks_out(wide, inputs)[2]), "the window is not reached"
    assert torch.equal(hidden_after(model, inputs, 2), full)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_padding_and_with_another_attention(attention: str) -> None:
    model = _model("qwen2", attention=attention)
    inputs = {"input_ids": torch.arange(4, 24).view(2, 10)}
    with torch.no_grad():
        full = _blocks_out(model, inputs)[2]
    assert torch.equal(hidden_after(model, inputs, 2), full)


def test_recording_runs_no_block_and_leaves_no_trace() -> None:
    model, inputs = _model("llama"), _batch("left").inputs
    blocks = list(model.model.layers)
    with capture(model, ["model.layers.0", "model.layers.0.mlp"]) as got:
        calls = record_calls(model, inputs, 3)
    assert got == {"model.layers.0": [], "model.layers.0.mlp": []}
    assert all(a is b for a, b in zip(blocks, model.model.layers, strict=True))
    with (
        pytest.raises(ZeroDivisionError),
        edit(model, {"model.embed_tokens": lambda x: x * (1 // 0)}),
    ):
        record_calls(model, inputs, 3)
    assert all(a is b for a, b in zip(blocks, model.model.layers, strict=True))
    freed = without_start(calls)
    assert freed.hidden_BTD.numel() == 0
    assert freed.calls == calls.calls


def test_hooks_on_blocks_act_in_a_span() -> None:
    model, inputs = _model("llama"), _batch("left").inputs
    with edit(model, {"model.layers.0": lambda x: x + 1}):
        with torch.no_grad():
            full = _blocks_out(model, inputs)[2]
        assert torch.equal(hidden_after(model, inputs, 2), full)
    assert not torch.equal(hidden_after(model, inputs, 2), full)


@pytest.mark.parametrize("kind", ["starcoder2", "gptj", "stablelm", "bloom", "falcon", "cohere"])
def test_families_nobody_listed(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 32}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    more = {"intermediate_size": 64} if kind in ("starcoder2", "stablelm", "cohere") else {}
    if kind in ("starcoder2", "stablelm", "cohere"):
        more["num_key_value_heads"] = 2
    if kind == "gptj":
        more["rotary_dim"] = 8
    config = AutoConfig.for_model(kind, vocab_size=64, **ids, **sizes, **more)
    model = AutoModelForCausalLM.from_config(config).eval()
    inputs = _batch("left").inputs
    if kind == "bloom":
        inputs.pop("position_ids")
    with torch.no_grad():
        full = _blocks_out(model, inputs)
    assert torch.equal(hidden_after(model, inputs, 1), full[1])


def test_wrapped_models() -> None:
    from excise.models.lora import LoRA, adapted

    model, inputs = _model("llama"), _batch("left").inputs
    with torch.no_grad():
        plain = _blocks_out(model, inputs)[1]
    compiled: Any = torch.compile(model, backend="eager")
    assert torch.equal(hidden_after(compiled, inputs, 1), plain)
    with adapted(model, LoRA(rank=2)) as tuned:
        assert torch.equal(hidden_after(tuned, inputs, 1), plain)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.attention = form, Attention()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))

    def forward(self, x: Tensor, extra: Any = None) -> Any:
        x = x + self.attention(x)
        x = x + self.mlp(x)
        return (x, x.mean()) if self.form in ("tuple", "more") else x


class LayerNorm(nn.LayerNorm):
    pass


class Stranger(nn.Module):
    """A model of no family: what its forward does between blocks is up to `form`."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.embed = nn.Embedding(64, 8)
        self.blocks = nn.ModuleList(Block(form) for _ in range(3))
        self.norm, self.head = LayerNorm(8), nn.Linear(8, 64, bias=False)

    def forward(self, input_ids: Tensor) -> Any:
        x, extra = self.embed(input_ids), None
        if self.form == "flat":
            x = x.flatten()
        if self.form == "cache":
            extra = SimpleNamespace(get_seq_length=lambda: 0)
        for block in self.blocks[:2] if self.form == "few" else self.blocks:
            out = block(x, extra)
            x = out[0] if self.form in ("tuple", "more") else out
            extra = out[1] if self.form == "more" else extra
            if self.form == "between":
                x = x * 2
        return SimpleNamespace(logits=self.head(self.norm(x)))


@pytest.mark.parametrize("form", ["tensor", "tuple"])
def test_strangers_that_hand_the_stream_on(form: str) -> None:
    model, ids_BT = Stranger(form), torch.arange(12).view(2, 6)
    with torch.no_grad():
        full = _blocks_out(model, {"input_ids": ids_BT})
    assert torch.equal(hidden_after(model, {"input_ids": ids_BT}, 2), full[2])


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("between", "but block 1 was not given what block 0 put out"),
        ("more", "looked for a residual stream that goes from block to block of 'blocks'"),
        ("flat", "block 0 was given no tensor of rows x tokens x width"),
        ("few", "only 2 of 3 blocks were called"),
        ("cache", "block 0 is called with a cache"),
    ],
)
def test_strangers_that_do_not(form: str, words: str) -> None:
    model = Stranger(form)
    with pytest.raises(UserError, match=words):
        record_calls(model, {"input_ids": torch.arange(12).view(2, 6)}, 3)
    assert all(isinstance(block, Block) for block in model.blocks)


def test_blocks_beyond_the_model() -> None:
    model, inputs = _model("llama"), _batch("left").inputs
    with pytest.raises(UserError, match="has 3 blocks"):
        record_calls(model, inputs, 4)
    calls = record_calls(model, inputs, 2)
    with pytest.raises(UserError, match="were not recorded; only 0 to 2 were"):
        run_span(model, calls, calls.hidden_BTD, 0, 3)
