"""Small inputs for tests of the command: rows, models, a recipe, and ways to break them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from excise.models.checkpoint import save_model
from excise.models.tiny import byte_tokenizer, tiny_model, train_bpe, word_tokenizer

TINY = """
name: tiny
domain: {name: facts, subjects: 24, relations: 2, objects: 4}
model: {scratch: {width: 32, blocks: 2}}
pretrain: {fit: {steps: 20, lr: 0.003, batch_size: 16}, max_length: 16}
arms:
  filtering: {name: filtering}
  rmu: {name: rmu, layer: 0, max_length: 16, fit: {steps: 20, lr: 0.001, batch_size: 8}}
audit:
  budget: smoke
  change: {steps: 2, checkpoints: [0, 2], rates: [0.001], max_test_rows: 8, max_other_rows: 8}
evaluate: {max_rows: 16, max_length: 16, samples: 1}
oracles: 1
"""
"""A recipe of seconds."""

Break = Callable[[Path], object]
"""Changes a model folder, or the folder of a case."""


def jsonl(*rows: object) -> str:
    """Return rows as lines of JSON."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def texts(kind: str, count: int = 16, start: int = 0) -> str:
    """Return different short texts, the same ones each time."""
    words = [f"{kind}{i}" for i in range(200)]
    return jsonl(
        *(
            {"text": " ".join(random.Random(f"{kind}{i}").choices(words, k=6))}
            for i in range(start, start + count)
        )
    )


def latin_parquet(to: Path) -> None:
    """Write a parquet file whose text is not UTF-8."""
    ends, letters = pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xe9\xe8")
    pq.write_table(
        pa.table({"text": pa.Array.from_buffers(pa.string(), 1, [None, ends, letters])}), to
    )


def save_tiny(
    to: Path, *, seed: int = 0, width: int = 32, family: str = "llama", **overrides: Any
) -> Path:
    """Write a random model of two blocks with a byte tokenizer."""
    model = tiny_model(family, seed=seed, width=width, **overrides)
    return save_model(model, byte_tokenizer(), to).path


def save_short(folder: Path) -> Path:
    """Write a model of 40 positions, `short`."""
    return save_tiny(folder / "short", family="gpt2", n_positions=40)


def save_half(folder: Path) -> Path:
    """Write a model stored in float16, `half`."""
    return save_model(tiny_model("llama", width=32).half(), byte_tokenizer(), folder / "half").path


def save_loud(folder: Path) -> Path:
    """Write a model whose weights are finite and whose logits are not, `loud`."""
    model = tiny_model("llama", width=32)
    torch.nn.init.constant_(model.lm_head.weight, 3e38)
    return save_model(model, byte_tokenizer(), folder / "loud").path


def chatty(model: Path) -> None:
    """Give a model a chat template."""
    byte_tokenizer(chat=True).save_pretrained(model)


def refusing(model: Path) -> None:
    """Give a model a chat template that wants a system turn."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('turns must begin with the system') }}"
    tokenizer.save_pretrained(model)


def shouting(model: Path) -> None:
    """Give a model a chat template that changes what the assistant says."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    tokenizer.save_pretrained(model)


def config(**changes: Any) -> Break:
    """Change fields of config.json; None removes one."""

    def change(model: Path) -> None:
        data = json.loads((model / "config.json").read_text()) | changes
        text = json.dumps({k: v for k, v in data.items() if v is not None})
        (model / "config.json").write_text(text)

    return change


def write(name: str, data: str | bytes) -> Break:
    """Write a file."""
    raw = data.encode() if isinstance(data, str) else data
    return lambda folder: (folder / name).write_bytes(raw)


def drop(*patterns: str) -> Break:
    """Remove files by pattern."""

    def remove(model: Path) -> None:
        for pattern in patterns:
            for path in list(model.glob(pattern)):
                path.unlink()

    return remove


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    """Change the weights."""

    def rewrite(model: Path) -> None:
        values = load_file(model / "model.safetensors")
        change(values)
        save_file(values, model / "model.safetensors", {"format": "pt"})

    return rewrite


def shorten(model: Path) -> None:
    """Cut the weights in half."""
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickled(model: Path) -> None:
    """Put a pickle in the place of the safetensors."""
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def foreign_tokenizer(model: Path) -> None:
    """Give the model a tokenizer of more words than it has rows."""
    drop("tokenizer*")(model)
    train_bpe([texts("z", 200)], 300).save_pretrained(model)


def other_words(model: Path) -> None:
    """Give the model a tokenizer of other words than bytes, no more than it has rows."""
    drop("tokenizer*")(model)
    word_tokenizer(f"w{i}" for i in range(200)).save_pretrained(model)


def without_specials(model: Path) -> None:
    """Take padding and end token out of the model's tokenizer."""
    file = model / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "pad_token": None, "eos_token": None}))


def all_of(*steps: Break) -> Break:
    """Do several things, in order."""

    def do(folder: Path) -> None:
        for step in steps:
            step(folder)

    return do


def state(folder: Path) -> dict[str, tuple[str, int]]:
    """Return SHA-256 and time of change of every file and folder below `folder`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = (
            digest,
            path.stat().st_mtime_ns if path.is_file() else 0,
        )
    return found
