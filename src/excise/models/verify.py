"""Is this folder a causal language model that can be read safely? One sentence if not."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from excise.core.errors import UserError, nearest
from excise.models import files
from excise.models.checkpoint import Checkpoint
from excise.models.folder import INDEX, WEIGHTS
from excise.models.rewrite import WEIGHT_SUFFIXES

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
"""Endings of weight files that run code when they are read."""


def verify_folder(
    path: Path, *, trust_remote_code: bool = False, tokenizer: Path | None = None
) -> Checkpoint:
    """Check a model folder from its name to the last weight; nothing is written or executed.

    Args:
        path: The folder.
        trust_remote_code: Whether code in the folder may run.
        tokenizer: Folder of the tokenizer where it does not lie beside the weights.

    Returns:
        The checkpoint.

    Raises:
        UserError: What is wrong, where, and what to do.
    """
    check_place(path)
    config = _read_config(path)
    _check_kind(path, config, trust_remote_code)
    _check_files(path)
    checkpoint = Checkpoint(path, trust_remote_code, tokenizer)
    _check_shapes(checkpoint)
    _check_tokenizer(checkpoint)
    _check_values(checkpoint)
    return checkpoint


def check_place(path: Path) -> None:
    """Raise UserError unless `path` is a folder."""
    if path.is_dir():
        return
    if not path.exists():
        raise UserError(f"there is no folder {path}; name one that holds a model")
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, and loading one runs whatever code is in it; convert it to"
            " safetensors where you trust it"
        )
    raise UserError(f"{path} is a file; name the folder that holds the model")


def _read_config(path: Path) -> dict[str, Any]:
    """Return config.json."""
    file = path / "config.json"
    if not file.is_file():
        if (path / "adapter_config.json").is_file():
            raise UserError(f"{path} holds an adapter, not a model; merge it into its model first")
        raise UserError(f"{path} holds no config.json; name the folder of a transformers model")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{file} names no model_type; name the folder of a transformers model")
    return config


def _check_kind(path: Path, config: dict[str, Any], trusted: bool) -> None:
    """Raise UserError unless the configuration is one of a causal language model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    kind = config["model_type"]
    if "quantization_config" in config:
        raise UserError(
            f"{path} holds quantized weights, which cannot be edited; give the model before"
            " quantization or a GGUF file"
        )
    if kind not in CONFIG_MAPPING_NAMES:
        if trusted and "auto_map" in config:
            return
        if "auto_map" in config:
            raise UserError(
                f"model_type '{kind}' in {path} needs Python code from that folder, which is off;"
                " read the code and allow it with trust_remote_code"
            )
        raise UserError(
            f"{path}/config.json has the unknown model_type '{kind}'; {nearest(kind, CAUSAL)}"
        )
    encoder = kind in MASKED and not config.get("is_decoder")
    if kind not in CAUSAL or encoder or config.get("is_encoder_decoder"):
        what = "an encoder" if kind in MASKED else f"a model of kind '{kind}'"
        raise UserError(
            f"{path} holds {what} and not a causal language model; give a model that writes text"
        )


def _check_files(path: Path) -> None:
    """Raise UserError unless there are safetensors weights."""
    if (path / WEIGHTS).is_file() or (path / INDEX).is_file():
        return
    others = sorted(p.name for p in path.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    pickles = [name for name in others if Path(name).suffix in PICKLES]
    ggufs = [name for name in others if name.endswith(".gguf")]
    if ggufs:
        raise UserError(f"{path} holds no {WEIGHTS}; name the file {path / ggufs[0]} itself")
    if pickles:
        raise UserError(
            f"{path} holds its weights only as a pickle ({pickles[0]}), and loading one runs"
            " whatever code is in it; convert it to safetensors where you trust it"
        )
    raise UserError(f"{path} holds no weights ({WEIGHTS}); fetch the model again")


def _first_line(error: Exception) -> str:
    """Return an error's first line that says something, short enough for a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KeyError):
        lines = [f"{error} is missing"]
    if len(lines) > 1 and lines[0].endswith(":"):
        del lines[0]  # a heading
    return (lines[0] if lines else type(error).__name__).rstrip(".:")[:200]


def _check_shapes(checkpoint: Checkpoint) -> None:
    """Raise UserError unless the headers hold what the configuration asks for."""
    path = checkpoint.path
    assert checkpoint.entries is not None  # reads every header, with errors of its own
    try:
        layout = checkpoint.layout
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the weights in {path} do not fit its config.json: {_first_line(error)};"
            " use the config of these weights"
        ) from None
    if layout.mismatched:
        name, found, wanted = layout.mismatched[0]
        raise UserError(
            f"tensor '{name}' in {path} has shape {list(found)} and config.json asks for"
            f" {list(wanted)} ({len(layout.mismatched)} such); use the config of these weights"
        )
    if layout.missing:
        raise UserError(
            f"{path} lacks tensor '{layout.missing[0]}' ({len(layout.missing)} missing); fetch the"
            " model again, or use the config of these weights"
        )


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    """Raise UserError unless there is a tokenizer whose ids the embedding has rows for."""
    where = checkpoint.tokenizer_path or checkpoint.path
    if not checkpoint.tokenizer_files:
        raise UserError(f"{where} holds no tokenizer; put its files beside the weights")
    try:
        tokenizer = checkpoint.tokenizer()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the tokenizer in {where} cannot be read: {_first_line(error)}; fetch it again"
        ) from None
    check_vocabulary(tokenizer, checkpoint.layout.model, str(where))


def check_vocabulary(tokenizer: Any, model: Any, where: str) -> None:
    """Raise UserError where the tokenizer has an id that the model's embedding has no row for."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= rows:
        raise UserError(
            f"the tokenizer in {where} has token id {last} ({token!r}) and the model has only"
            f" {rows} embedding rows; use the tokenizer of this model"
        )


@functools.lru_cache(maxsize=4096)
def _bad_tensor(path: str, size: int, mtime_ns: int) -> str:
    """Return the first tensor of a file with a NaN or infinity, or an empty string."""
    del size, mtime_ns
    for key, entry in files.read_header(Path(path)).items():
        if entry.dtype.is_floating_point:
            for part in files.read_parts(entry):
                if not torch.isfinite(part if part.element_size() > 1 else part.float()).all():
                    return key
    return ""


def _check_values(checkpoint: Checkpoint) -> None:
    """Raise UserError where a weight is not finite; streamed, and once per file and process."""
    for shard in checkpoint.shards:
        stat = shard.stat()
        bad = _bad_tensor(str(shard), stat.st_size, stat.st_mtime_ns)
        if bad:
            raise UserError(
                f"tensor '{bad}' in {shard} holds NaN or infinity; fetch the model again or train"
                " it anew"
            )
