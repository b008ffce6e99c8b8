"""Folders in, folders out: only what changed is written, and inputs stay as they are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from excise.core.errors import UserError
from excise.models import files
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import FAMILIES, byte_tokenizer, tiny_model


def raw(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder with the safetensors library."""
    return {k: v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}


def plain(folder: Path) -> Any:
    """Load a folder with plain transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def shard(source: Checkpoint, to: Path, size: str = "40KB") -> Checkpoint:
    """Save a checkpoint again in several files."""
    plain(source.path).save_pretrained(to, max_shard_size=size)
    source.tokenizer().save_pretrained(to)
    return Checkpoint(to)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("models")
    return {
        family: save_model(tiny_model(family, width=32), byte_tokenizer(), root / family)
        for family in (*FAMILIES,)
    }


@pytest.fixture
def llama(folders: dict[str, Checkpoint]) -> Checkpoint:
    return Checkpoint(folders["llama"].path)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_values_are_those_of_the_loaded_model(
    folders: dict[str, Checkpoint], family: str
) -> None:
    checkpoint = folders[family]
    model = plain(checkpoint.path)
    parameters = dict(model.named_parameters())
    assert checkpoint.parameter_names() == tuple(parameters)
    assert checkpoint.num_parameters == model.num_parameters()
    values = checkpoint.weights_of(parameters)
    assert all(torch.equal(values[name], parameters[name]) for name in parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_write_changes_what_it_is_given_and_nothing_else(
    folders: dict[str, Checkpoint], family: str, tmp_path: Path
) -> None:
    checkpoint = folders[family]
    before = snapshot(checkpoint.path)
    old = dict(plain(checkpoint.path).named_parameters())
    names = [n for n in old if "1.mlp" in n or n == checkpoint.parameter_names()[0]]
    assert len(names) > 1
    new = {n: old[n].detach() * 2 + 1 for n in names}
    written = checkpoint.write(new, tmp_path / "out")
    assert snapshot(checkpoint.path) == before
    loaded = dict(plain(written.path).named_parameters())
    for name in old:
        assert torch.equal(loaded[name], new[name] if name in new else old[name]), name
    assert raw(written.path).keys() == raw(checkpoint.path).keys()
    assert written.fingerprint != checkpoint.fingerprint
    assert written.tokenizer_fingerprint == checkpoint.tokenizer_fingerprint
    assert not [p for p in tmp_path.iterdir() if p.name != "out"]


def test_mixtral_experts_stay_apart_on_disk(folders: dict[str, Checkpoint], tmp_path: Path) -> None:
    """One expert of a fused tensor changes: one gate, one up projection on disk changes."""
    checkpoint = folders["mixtral"]
    name = "model.layers.1.mlp.experts.gate_up_proj"
    value = checkpoint.weights_of([name])[name].clone()
    value[2] += 1
    written = checkpoint.write({name: value}, tmp_path / "out")
    old, new = raw(checkpoint.path), raw(written.path)
    differ = {key for key in old if not torch.equal(old[key], new[key])}
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    assert differ == {f"{prefix}.w1.weight", f"{prefix}.w3.weight"}
    assert torch.equal(new[f"{prefix}.w1.weight"], value[2, : value.shape[1] // 2])
    assert torch.equal(dict(plain(written.path).named_parameters())[name], value)


def test_only_shards_with_a_change_are_written_anew(llama: Checkpoint, tmp_path: Path) -> None:
    many = shard(llama, tmp_path / "many")
    assert len(many.shards) > 2
    name = "model.layers.1.mlp.down_proj.weight"
    new = torch.zeros_like(many.weights_of([name])[name])
    written = many.write({name: new}, tmp_path / "copied")
    linked = many.write({name: new}, tmp_path / "linked", link=True)
    home = many.entries[name].file.name
    for path in many.shards:
        same = (written.path / path.name).read_bytes() == path.read_bytes()
        assert same == (path.name != home)
        assert (written.path / path.name).stat().st_ino != path.stat().st_ino
        link = (linked.path / path.name).stat().st_ino == path.stat().st_ino
        assert link == (path.name != home)
    assert linked.fingerprint == written.fingerprint
    assert torch.equal(plain(written.path).model.layers[1].mlp.down_proj.weight, new)


def test_a_group_over_two_shards_is_written_whole(
    folders: dict[str, Checkpoint], tmp_path: Path
) -> None:
    many = shard(folders["mixtral"], tmp_path / "many", "30KB")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    homes = {many.entries[key].file for key, _ in many.layout.groups[name].keys}
    assert len(homes) > 1
    value = many.weights_of([name])[name] + 1
    written = many.write({name: value}, tmp_path / "out")
    assert torch.equal(dict(plain(written.path).named_parameters())[name], value)


@pytest.mark.parametrize(
    ("family", "prefix"), [("llama", "model."), ("mixtral", "model."), ("gpt2", "transformer.")]
)
def test_files_without_the_base_prefix(
    folders: dict[str, Checkpoint], tmp_path: Path, family: str, prefix: str
) -> None:
    shutil.copytree(folders[family].path, tmp_path / "bare")
    tensors = raw(tmp_path / "bare")
    bare = {key.removeprefix(prefix): value for key, value in tensors.items()}
    save_file(bare, tmp_path / "bare" / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint(tmp_path / "bare")
    assert not checkpoint.layout.missing
    names = [n for n in checkpoint.parameter_names() if ".0." in n or "wte" in n]
    new = {name: value + 1 for name, value in checkpoint.weights_of(names).items()}
    written = checkpoint.write(new, tmp_path / "out")
    assert raw(written.path).keys() == bare.keys()
    loaded = dict(plain(written.path).named_parameters())
    assert all(torch.equal(loaded[name], new[name]) for name in names)


def test_stored_dtype_is_kept_unless_told(llama: Checkpoint, tmp_path: Path) -> None:
    model = llama.load(dtype=torch.bfloat16)
    half = save_model(model, byte_tokenizer(), tmp_path / "half")
    assert half.config.dtype == torch.bfloat16
    name = "model.layers.0.self_attn.q_proj.weight"
    value = torch.full_like(model.get_parameter(name), 0.1, dtype=torch.float32)
    kept = raw(half.write({name: value}, tmp_path / "kept").path)
    assert {t.dtype for t in kept.values()} == {torch.bfloat16}
    wide = half.write({name: value}, tmp_path / "wide", dtype=torch.float32)
    new, old = raw(wide.path), raw(half.path)
    assert torch.equal(new[name], value)
    assert new[name].dtype == torch.float32
    assert all(
        torch.equal(new[k], old[k]) and new[k].dtype == old[k].dtype for k in old.keys() - {name}
    )
    assert torch.equal(Checkpoint(wide.path).weights_of([name])[name], value)


def test_a_wider_dtype_grows_the_index(llama: Checkpoint, tmp_path: Path) -> None:
    many = shard(llama, tmp_path / "many")
    name = "model.norm.weight"
    value = many.weights_of([name])[name].double()
    wide = many.write({name: value}, tmp_path / "wide", dtype=torch.float64)
    index = "model.safetensors.index.json"
    sizes = [
        json.loads((c.path / index).read_text())["metadata"]["total_size"] for c in (many, wide)
    ]
    assert sizes[1] - sizes[0] == 4 * value.numel()
    assert torch.equal(raw(wide.path)[name], value)


def test_values_that_do_not_fit_are_refused(llama: Checkpoint, tmp_path: Path) -> None:
    half = save_model(llama.load(dtype=torch.float16), byte_tokenizer(), tmp_path / "half")
    with pytest.raises(UserError, match="does not fit"):
        half.write({"model.norm.weight": torch.full((32,), 1e6)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"half"}


def test_weights_in_other_formats_stay_behind(llama: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(llama.path, tmp_path / "in")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "old.gguf", "modeling_x.py"):
        (tmp_path / "in" / name).write_bytes(b"old values")
    (tmp_path / "in" / "README.md").write_text("card")
    written = Checkpoint(tmp_path / "in").write({}, tmp_path / "out")
    names = {p.name for p in written.path.iterdir()}
    assert "README.md" in names
    assert names == {p.name for p in llama.path.iterdir()} | {"README.md"}
    assert written.fingerprint == llama.fingerprint


def test_write_refuses(llama: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean 'model\.norm\.weight'"):
        llama.write({"model.norm.wieght": torch.zeros(32)}, tmp_path / "a")
    with pytest.raises(UserError, match=r"shape \[31\]"):
        llama.write({"model.norm.weight": torch.zeros(31)}, tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        with pytest.raises(UserError, match="new or empty folder"):
            llama.write({}, tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert llama.write({}, tmp_path / "empty").load() is not None


def test_a_failed_write_leaves_nothing(
    llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "tensor_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        llama.write({"model.norm.weight": torch.zeros(32)}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kernel", [True, False])
def test_copies_are_exact_with_and_without_the_kernel(
    llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool
) -> None:
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
        monkeypatch.setattr(files, "_CHUNK", 1000)
    written = llama.write({"model.norm.weight": torch.zeros(32)}, tmp_path / "a", dtype=torch.half)
    old, new = raw(llama.path), raw(written.path)
    assert [k for k in old if not torch.equal(old[k], new[k])] == ["model.norm.weight"]


def test_save_model_keeps_what_belongs_to_it(tmp_path: Path) -> None:
    model = tiny_model("qwen3", width=32, tie_word_embeddings=True).bfloat16()
    model.generation_config.max_new_tokens = 17
    tokenizer = byte_tokenizer(chat=True)
    before = model.config.to_json_string()
    saved = save_model(model, tokenizer, tmp_path / "a")
    assert model.config.to_json_string() == before
    loaded = plain(saved.path)
    assert loaded.generation_config.max_new_tokens == 17
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert saved.tokenizer().chat_template == tokenizer.chat_template
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    again = save_model(model, None, tmp_path / "b", source=saved)
    assert again.tokenizer_fingerprint == saved.tokenizer_fingerprint
    with pytest.raises(UserError, match="already holds files"):
        save_model(model, tokenizer, tmp_path / "a")
    with pytest.raises(UserError, match="give one"):
        save_model(model, None, tmp_path / "c")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_load_is_explicit_and_in_eval_mode(llama: Checkpoint) -> None:
    model = llama.load(dtype=torch.bfloat16, attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert model.config._attn_implementation == "eager"
    assert {p.dtype for p in llama.load().parameters()} == {torch.float32}


def test_fingerprint_follows_the_bytes(llama: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(llama.path, tmp_path / "copy")
    copy = Checkpoint(tmp_path / "copy")
    assert copy.fingerprint == llama.fingerprint
    weights = copy.path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert copy.fingerprint != llama.fingerprint
    assert copy.tokenizer_fingerprint == llama.tokenizer_fingerprint


def test_a_big_file_is_hashed_once(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    first = llama.fingerprint
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert Checkpoint(llama.path).fingerprint == first


def test_a_missing_padding_token_is_the_end_token(llama: Checkpoint, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    saved = save_model(llama.load(), tokenizer, tmp_path / "a")
    loaded = saved.tokenizer()
    assert loaded.pad_token_id == loaded.eos_token_id == 2
    assert len(loaded) == len(byte_tokenizer())
