"""What lies in a model folder, and small steps around transformers that several modules share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from excise.core.errors import UserError
from excise.core.plain import read_json
from excise.data.stream import Tokenizer
from excise.models.spec import Model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pkl",
     ".npz", ".ot"}
)  # fmt: skip
"""Endings of files that hold weights, in whichever format."""


def find_shards(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a model folder; see `Checkpoint.shards`."""
    if (folder / "adapter_config.json").is_file():  # transformers would apply it, we would not
        raise UserError(
            f"{folder} holds a whole model and an adapter beside it, and it is not said which is "
            "meant; merge them into one model, or move the adapter's files to a folder of their own"
        )
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    index = folder / INDEX
    if not index.is_file():
        raise UserError(f"{folder} holds no {WEIGHTS}; name a folder with safetensors weights")
    try:
        about = read_json(index)
        names = sorted(set(about["weight_map"].values()))
        if not names or not isinstance(about["metadata"], dict):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is broken; copy or download it again") from None
    for name in names:
        safe = isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
        if not safe or not _is_file(folder / name):
            raise UserError(
                f"{index} names '{str(name)[:200]}', which {folder} does not hold; fetch it again"
            )
    return tuple(folder / name for name in names)


def _is_file(path: Path) -> bool:
    """Return whether there is such a file; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def meta_model(config: Any, *, trust_remote_code: bool = False) -> Model:
    """Return the causal model of a configuration on the meta device: names and shapes, no data."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model.eval()


def ensure_pad(tokenizer: Tokenizer, where: str) -> Tokenizer:
    """Give a tokenizer without padding token its end token for that; no row is ever added."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {where} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars off the terminal for a while."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
