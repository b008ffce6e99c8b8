"""What can be wrong with a model folder is said in one sentence, and the folder is left alone."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from excise.core.errors import UserError
from excise.models.checkpoint import Checkpoint, open_checkpoint, save_model, verify_folder
from excise.models.tiny import FAMILIES, byte_tokenizer, tiny_model, word_tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    return save_model(tiny_model("llama", width=32), byte_tokenizer(), folder).path


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "model"
    return save_model(tiny_model("mixtral", width=32), byte_tokenizer(), folder).path


def config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    values = {k: v for k, v in values.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(values))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def cut(folder: Path, size: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:size])


def header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of the weights, keeping its length by blanks."""
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    values = json.loads(data[8 : 8 + length])
    change(values)
    text = json.dumps(values).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def shards(folder: Path) -> None:
    model = Checkpoint(folder).load()
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="40KB")


def only(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)


def tokenizer(folder: Path, made: Any) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    if made is not None:
        made.save_pretrained(folder)


def missing_shard(folder: Path) -> None:
    shards(folder)
    sorted(folder.glob("*.safetensors"))[1].unlink()


def escaping_shard(folder: Path) -> None:
    shards(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def broken_index(folder: Path) -> None:
    shards(folder)
    (folder / INDEX).write_text("{")


def text_of(folder: Path, change: Callable[[str], str]) -> None:
    """Change the text of the header of the weights."""
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = change(data[8 : 8 + length].decode().rstrip()).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def header_of(folder: Path) -> Any:
    """Return what the header says of the head."""
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length])["lm_head.weight"]


def numbered_index(folder: Path) -> None:
    shards(folder)
    (folder / INDEX).write_text('{"weight_map": {"a": 3}}')


def endless_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


def collide(folder: Path) -> None:
    """Give two words of the tokenizer one id."""
    data = json.loads((folder / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    a, b = list(vocab)[50:52]
    vocab[a] = vocab[b]
    (folder / "tokenizer.json").write_text(json.dumps(data))


NAN = float("nan")
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "holds no config.json"),
    "adapter": (
        lambda p: (p / "config.json").rename(p / "adapter_config.json"),
        "holds an adapter.*merge it",
    ),
    "broken config": (lambda p: (p / "config.json").write_text('{"a": 1,'), "not valid JSON.*line"),
    "config is bytes": (lambda p: (p / "config.json").write_bytes(b"\xff\x00"), "not valid JSON"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "names no model_type"),
    "no model type": (lambda p: config(p, model_type=None), "names no model_type"),
    "unknown type": (lambda p: config(p, model_type="lama"), "unknown model_type 'lama'.*'llama'"),
    "remote code": (
        lambda p: config(p, model_type="mine", auto_map={"AutoConfig": "c.C"}),
        "needs Python code.*is off.*trust_remote_code",
    ),
    "encoder": (lambda p: config(p, model_type="bert"), "holds an encoder and not a causal"),
    "encoder-decoder": (
        lambda p: config(p, model_type="t5", is_encoder_decoder=True),
        "not a causal language model",
    ),
    "image model": (lambda p: config(p, model_type="vit"), "kind 'vit' and not a causal"),
    "quantized": (
        lambda p: config(p, quantization_config={"quant_method": "gptq"}),
        "quantized weights.*before",
    ),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), "holds no weights"),
    "bin": (
        lambda p: only(p, "pytorch_model.bin"),
        r"pickle \(pytorch_model.bin\).*code",
    ),
    "pt": (lambda p: only(p, "model.pt"), "only as a pickle.*code"),
    "pth": (lambda p: only(p, "model.pth"), "only as a pickle.*code"),
    "ckpt": (lambda p: only(p, "model.ckpt"), "only as a pickle.*code"),
    "gguf beside": (lambda p: only(p, "model.gguf"), "name the file .*model.gguf itself"),
    "empty weights": (lambda p: cut(p, 0), r"truncated \(0 bytes\)"),
    "cut in the length": (lambda p: cut(p, 5), r"truncated \(5 bytes\)"),
    "cut in the header": (lambda p: cut(p, 100), "truncated: its header needs"),
    "cut in the body": (lambda p: cut(p, -10), "truncated: tensor '.*' ends at byte"),
    "garbage": (lambda p: (p / WEIGHTS).write_bytes(b"\xab" * 500), "header is garbage"),
    "header not JSON": (
        lambda p: (p / WEIGHTS).write_bytes(struct.pack("<Q", 9) + b"{" * 400),
        "header is garbage",
    ),
    "header a list": (
        lambda p: (p / WEIGHTS).write_bytes(struct.pack("<Q", 2) + b"[]" + b"0" * 400),
        "header is garbage",
    ),
    "header entry wrong": (
        lambda p: header(p, lambda h: h["model.norm.weight"].update(shape=[33])),
        "header is garbage",
    ),
    "header dtype unknown": (
        lambda p: header(p, lambda h: h["model.norm.weight"].update(dtype="F3")),
        "header is garbage",
    ),
    "NaN": (
        lambda p: weights(p, lambda t: t["model.norm.weight"].__setitem__(3, NAN)),
        "tensor 'model.norm.weight' in .* holds NaN",
    ),
    "infinity": (
        lambda p: weights(p, lambda t: t["lm_head.weight"].__setitem__((7, 3), -float("inf"))),
        "tensor 'lm_head.weight' in .* holds NaN or infinity",
    ),
    "shape against config": (
        lambda p: config(p, vocab_size=300),
        r"shape \[260, 32\] and config.json asks for \[300, 32\]",
    ),
    "config of another size": (lambda p: config(p, intermediate_size=64), "asks for"),
    "more layers than weights": (
        lambda p: config(p, num_hidden_layers=3),
        r"lacks tensor '.*\.2\.",
    ),
    "impossible config": (lambda p: config(p, hidden_size="big"), "config.json"),
    "missing tensor": (
        lambda p: weights(p, lambda t: t.pop("model.norm.weight")),
        r"lacks tensor 'model.norm.weight' \(1 missing\)",
    ),
    "missing head": (
        lambda p: weights(p, lambda t: t.pop("lm_head.weight")),
        "lacks tensor 'lm_head.weight'",
    ),
    "missing shard": (missing_shard, "names 'model-00002-of-.*', which .* does not hold"),
    "shard elsewhere": (escaping_shard, r"names '\.\./model.safetensors'"),
    "broken index": (broken_index, "index.json is broken"),
    "index of nothing": (
        numbered_index,
        "index.json is broken",
    ),
    "one tensor twice": (
        lambda p: text_of(
            p, lambda t: t[:-1] + ', "lm_head.weight": ' + json.dumps(header_of(p)) + "}"
        ),
        "header is garbage",
    ),
    "bytes behind": (
        lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes() + b"\0" * 64),
        "holds bytes behind its last tensor",
    ),
    "tensors over each other": (
        lambda p: header(p, lambda h: h["model.norm.weight"].update(data_offsets=[0, 128])),
        "its tensors overlap or leave holes",
    ),
    "shape of floats": (
        lambda p: header(p, lambda h: h["model.norm.weight"].update(shape=[32.0])),
        "header is garbage",
    ),
    "deep header": (lambda p: text_of(p, lambda t: '{"a":' * 50_000), "header is garbage"),
    "integers": (
        lambda p: header(p, lambda h: h["model.norm.weight"].update(dtype="I32")),
        "holds I32 and no floating point numbers",
    ),
    "no blocks": (
        lambda p: config(p, num_hidden_layers=0),
        "num_hidden_layers must be a whole number from 1",
    ),
    "a billion blocks": (
        lambda p: config(p, num_hidden_layers=10**9),
        "num_hidden_layers must be a whole number from 1 to 10,000",
    ),
    "window below zero": (lambda p: config(p, sliding_window=-1), "sliding_window must be"),
    "deep config": (
        lambda p: (p / "config.json").write_text("[" * 100_000),
        "not valid JSON .it nests too deeply",
    ),
    "pipe beside the weights": (lambda p: os.mkfifo(p / "notes.json"), "is a pipe or a device"),
    "endless config": (
        endless_config,
        "is a pipe or a device",
    ),
    "two words of one id": (collide, "has one id, 5[01], for '.*' and '.*'"),
    "length in text": (
        lambda p: (p / "tokenizer_config.json").write_text(
            json.dumps(
                {**json.loads((p / "tokenizer_config.json").read_text()), "model_max_length": "x"}
            )
        ),
        "tokenizer in .* cannot be read",
    ),
    "no tokenizer": (lambda p: tokenizer(p, None), "holds no tokenizer"),
    "broken tokenizer": (
        lambda p: (p / "tokenizer.json").write_text("{"),
        "tokenizer in .* cannot be read",
    ),
    "tokenizer of another model": (
        lambda p: tokenizer(p, word_tokenizer(f"w{i}" for i in range(400))),
        r"token id 403 \('w399'\) and the model has only 260 embedding rows",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence(good: Path, tmp_path: Path, case: str) -> None:
    spoil, message = CASES[case]
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    spoil(folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "there is no folder"),
        ("a.txt", "is a file; name the folder"),
        ("a.pt", "is a pickle, and loading one runs"),
        ("a.gguf", "is not a GGUF file"),
    ],
)
def test_places(tmp_path: Path, name: str, message: str) -> None:
    if "." in name:
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path / name, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_expert_of_another_shape(mixture: Path, tmp_path: Path) -> None:
    shutil.copytree(mixture, tmp_path / "m")
    key = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    weights(tmp_path / "m", lambda t: t.update({key: t[key][:, :5].clone()}))
    with pytest.raises(UserError, match="do not fit its config"):
        verify_folder(tmp_path / "m")


def test_a_missing_expert(mixture: Path, tmp_path: Path) -> None:
    shutil.copytree(mixture, tmp_path / "m")
    weights(tmp_path / "m", lambda t: t.pop("model.layers.0.block_sparse_moe.experts.1.w2.weight"))
    with pytest.raises(UserError, match="down_proj"):
        verify_folder(tmp_path / "m")


@pytest.mark.parametrize("family", FAMILIES)
def test_good_folders_pass_and_stay_as_they_are(tmp_path: Path, family: str) -> None:
    folder = save_model(tiny_model(family, width=32), byte_tokenizer(), tmp_path / "m").path
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    checkpoint = open_checkpoint(folder)
    assert checkpoint.load() is not None
    assert checkpoint.fingerprint
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()} == before


def test_an_index_does_not_lead_out_of_the_folder(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "m")
    shutil.copy(good / WEIGHTS, tmp_path / WEIGHTS)
    escaping_shard(tmp_path / "m")
    with pytest.raises(UserError, match=r"names '\.\./model\.safetensors'"):
        verify_folder(tmp_path / "m")


def test_several_shards_pass(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "m")
    shards(tmp_path / "m")
    assert len(verify_folder(tmp_path / "m").shards) > 2


def test_known_architectures_need_no_code_of_their_own(good: Path, tmp_path: Path) -> None:
    """Many folders carry both: code that is not needed is neither run nor passed on."""
    shutil.copytree(good, tmp_path / "m")
    config(tmp_path / "m", auto_map={"AutoModelForCausalLM": "modeling_bad.Bad"})
    (tmp_path / "m" / "modeling_bad.py").write_text("raise SystemExit('ran')")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert type(checkpoint.load()).__name__ == "LlamaForCausalLM"
    written = checkpoint.write({}, tmp_path / "out")
    assert not list(written.path.glob("*.py"))
    assert type(written.load()).__name__ == "LlamaForCausalLM"
