"""GGUF files, hub ids, models in memory, tokenizers from elsewhere: all become checked folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from excise.core.errors import UserError
from excise.models.checkpoint import (
    Checkpoint,
    cache_root,
    open_checkpoint,
    open_outline,
    save_model,
)
from excise.models.tiny import byte_tokenizer, tiny_model, word_tokenizer

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of a query or key projection as GGUF files do."""
    rows, columns = weight.shape
    split = weight.reshape(heads, 2, rows // heads // 2, columns)
    return split.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(model: Any, tokenizer: Any, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Write a Llama as a GGUF file with a byte-level tokenizer and a chat template."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if i < 4 else 1 for _, i in vocabulary])
    writer.add_token_merges(["a b"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.named_parameters():
        value = tensor.detach().numpy()
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        for part, heads in (
            ("attn_q", config.num_attention_heads),
            ("attn_k", config.num_key_value_heads),
        ):
            value = interleave(value, heads) if part in name else value
        if value.ndim > 1:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tokenizer() -> Any:
    """Return the byte tokenizer with the one merge that a GGUF file needs to be one."""
    from excise.models.tiny import CHAT_TEMPLATE, train_bpe

    tokenizer = train_bpe(["ab ab ab"], 261, bos=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_gguf(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, tied: bool) -> None:
    model = tiny_model("llama", width=32, vocab=261, tie_word_embeddings=tied)
    tokenizer = gguf_tokenizer()
    path = tmp_path / "in" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(model, tokenizer, path, gguf.GGMLQuantizationType[kind])
    before = (path.stat().st_mtime_ns, path.read_bytes())
    checkpoint = open_checkpoint(path, cache=tmp_path / "cache")
    assert not capfd.readouterr().err
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
    assert [p.name for p in path.parent.iterdir()] == ["tiny.gguf"]
    loaded = checkpoint.load()
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    step = {"F32": 0.0, "F16": 2**-11, "Q8_0": 2**-7, "Q4_1": 2**-3}[kind]
    ours = dict(model.named_parameters())
    assert tuple(ours) == checkpoint.parameter_names()
    for name, value in loaded.named_parameters():
        bound = step * ours[name].abs().max() + 1e-9
        assert (value - ours[name]).abs().max() <= bound, name
    read = checkpoint.tokenizer()
    text = "Hello \u00e9 ab \U0001f600"
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert read.chat_template == tokenizer.chat_template
    assert read.eos_token_id == 2
    assert "quantization_config" not in checkpoint.config.to_dict()
    again = open_checkpoint(str(path), cache=tmp_path / "cache")
    assert again == checkpoint
    assert checkpoint.write({}, tmp_path / "out").load() is not None


@pytest.mark.parametrize("tied", [True, False])
def test_an_outline_of_a_gguf_file_reads_no_weight(tmp_path: Path, tied: bool) -> None:
    model = tiny_model("llama", width=32, vocab=261, tie_word_embeddings=tied)
    path = tmp_path / "tiny.gguf"
    write_gguf(model, gguf_tokenizer(), path, gguf.GGMLQuantizationType.F16)
    with open_outline(path) as outline:
        assert outline.num_parameters == sum(p.numel() for p in model.parameters())
        assert not outline.has_weights
        assert outline.tokenizer()("a b")["input_ids"] == gguf_tokenizer()("a b")["input_ids"]
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="cannot be read"), open_outline(path):
        pass


def test_a_cut_gguf(tmp_path: Path) -> None:
    model, path = tiny_model("llama", width=32, vocab=261), tmp_path / "tiny.gguf"
    write_gguf(model, gguf_tokenizer(), path, gguf.GGMLQuantizationType.F32)
    data = path.read_bytes()
    for size in (20, len(data) // 2, len(data) - 100):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match="cannot be read") as caught:
            open_checkpoint(path, cache=tmp_path / "cache")
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("gguf-*"))


def test_a_model_in_memory(tmp_path: Path) -> None:
    model = tiny_model("gemma2", width=32).bfloat16()
    cache = tmp_path / "cache"
    checkpoint = open_checkpoint(model, tokenizer=byte_tokenizer(chat=True), cache=cache)
    loaded = checkpoint.load(dtype=torch.bfloat16)
    for name, value in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), value)
    assert checkpoint.tokenizer().chat_template
    assert open_checkpoint(model, tokenizer=byte_tokenizer(chat=True), cache=cache) == checkpoint
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    other = open_checkpoint(model, tokenizer=byte_tokenizer(chat=True), cache=cache)
    assert other != checkpoint
    assert open_checkpoint(model, tokenizer=byte_tokenizer(), cache=cache) != other


def test_another_process_was_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = tiny_model("llama", width=32), tmp_path / "cache"
    first = open_checkpoint(model, tokenizer=byte_tokenizer(), cache=cache)
    real, asked = Path.is_dir, []

    def late(path: Path) -> bool:
        asked.append(path)
        return real(path) and (path != first.path or asked.count(path) > 1)

    monkeypatch.setattr(Path, "is_dir", late)
    assert open_checkpoint(model, tokenizer=byte_tokenizer(), cache=cache) == first


def test_an_adapter_is_merged_in_a_copy(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama", width=32)
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    ids = torch.arange(12)[None]
    wrapped.eval()
    with torch.no_grad():
        want = wrapped(ids).logits
    cache = tmp_path / "cache"
    checkpoint = open_checkpoint(wrapped, tokenizer=byte_tokenizer(), cache=cache)
    after = wrapped.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.allclose(checkpoint.load()(ids).logits, want, atol=1e-5)
        assert torch.equal(wrapped(ids).logits, want)
    assert checkpoint.parameter_names() == Checkpoint(checkpoint.path).parameter_names()
    with pytest.raises(UserError, match="merge it"):
        save_model(wrapped, byte_tokenizer(), tmp_path / "direct")


def test_memory_refuses(tmp_path: Path) -> None:
    model, cache = tiny_model("llama", width=32), tmp_path / "cache"
    big = word_tokenizer(f"w{i}" for i in range(400))
    with pytest.raises(UserError, match="needs its tokenizer"):
        open_checkpoint(model, cache=cache)
    with pytest.raises(UserError, match="embedding rows"):
        open_checkpoint(model, tokenizer=big, cache=cache)
    with pytest.raises(UserError, match="a Linear is not a transformers model"):
        open_checkpoint(nn.Linear(2, 2), tokenizer=byte_tokenizer(), cache=cache)
    with pytest.raises(UserError, match="not a causal language model"):
        open_checkpoint(model.model, tokenizer=byte_tokenizer(), cache=cache)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match=r"'model\.norm\.weight' .* NaN"):
        open_checkpoint(model, tokenizer=byte_tokenizer(), cache=cache)
    assert not cache.exists()


def test_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    whole = save_model(tiny_model("llama", width=32), byte_tokenizer(), tmp_path / "whole")
    bare = tmp_path / "bare"
    shutil.copytree(whole.path, bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    for given in (whole.path, str(whole.path), byte_tokenizer()):
        checkpoint = open_checkpoint(bare, tokenizer=given, cache=tmp_path / "cache")
        assert checkpoint.tokenizer()("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]
        assert not list(bare.glob("tokenizer*"))
    written = checkpoint.write({}, tmp_path / "out")
    assert written.tokenizer_path is None
    assert open_checkpoint(written.path).tokenizer_fingerprint == checkpoint.tokenizer_fingerprint
    with pytest.raises(UserError, match="holds no tokenizer"):
        open_checkpoint(whole.path, tokenizer=bare)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Turn the hub off and give it an empty cache."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_a_hub_id_that_is_not_there(offline: Path) -> None:
    with pytest.raises(UserError, match=r"no folder owner/model.*not in the local cache"):
        open_checkpoint("owner/model")
    with pytest.raises(UserError, match="at revision 'v2'"):
        open_checkpoint("owner/model", revision="v2")
    assert not list(offline.rglob("*.safetensors"))


def test_a_hub_id_from_the_cache(offline: Path, tmp_path: Path) -> None:
    made = save_model(tiny_model("qwen2", width=32), byte_tokenizer(), tmp_path / "made")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = offline / "models--owner--model"
    shutil.copytree(made.path, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    checkpoint = open_checkpoint("owner/model")
    assert checkpoint.path == repo / "snapshots" / commit
    assert checkpoint.fingerprint == made.fingerprint
    assert open_checkpoint("owner/model", revision=commit) == checkpoint


def test_a_revision_is_of_the_hub(tmp_path: Path) -> None:
    made = save_model(tiny_model("qwen2", width=32), byte_tokenizer(), tmp_path / "made")
    with pytest.raises(UserError, match="has no revision"):
        open_checkpoint(made.path, revision="main")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("GatedRepoError", "it is gated"),
        ("RepositoryNotFoundError", "the hub has no such model"),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "cannot be reached"),
    ],
)
def test_what_the_hub_says(monkeypatch: pytest.MonkeyPatch, error: str, words: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    seen: dict[str, Any] = {}

    def refuse(name: str, **arguments: Any) -> str:
        seen.update(arguments, name=name)
        raise getattr(errors, error).__new__(getattr(errors, error))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=words):
        open_checkpoint("owner/model", revision="v1")
    assert (seen["name"], seen["revision"]) == ("owner/model", "v1")
    assert not {"*.bin", "*.pt", "*.py", "*"} & set(seen["allow_patterns"])


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.delenv("EXCISE_CACHE", raising=False)
    assert cache_root() == tmp_path / "x" / "excise"
    monkeypatch.setenv("EXCISE_CACHE", str(tmp_path / "y"))
    assert cache_root() == tmp_path / "y"
