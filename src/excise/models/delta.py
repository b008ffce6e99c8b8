"""What an edit changed, by itself: the changed tensors and the base they belong to.

A delta is a folder with `delta.safetensors` (new values by parameter name, in the dtype the base
stores them in) and `delta.json` (fingerprint of the base, hash of the tensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from excise.core.disk import check_free, new_folder
from excise.core.errors import UserError
from excise.core.plain import read_json
from excise.models import files
from excise.models.checkpoint import Checkpoint
from excise.models.lora import load_adapter, merge

TENSORS, FACTS = "delta.safetensors", "delta.json"
FORMAT = 1
"""Version of the layout."""


def write_delta(base: Checkpoint, changed: Mapping[str, Tensor], to: Path) -> Path:
    """Write the changed tensors of an edited model as a folder, all at once or not at all.

    Args:
        base: What was edited.
        changed: New values by name as in `model.named_parameters()`.
        to: A folder that does not exist or is empty.

    Returns:
        The folder.

    Raises:
        UserError: If the base has no such parameter, or `to` is not free.
    """
    check_free(to)
    stored = base.weights_of(changed)
    tensors = {n: t.detach().to("cpu", stored[n].dtype).contiguous() for n, t in changed.items()}
    with new_folder(to) as work:
        save_file(tensors, str(work / TENSORS))
        facts = {
            "format": FORMAT,
            "base": base.fingerprint,
            "tensors": {n: {"shape": list(t.shape)} for n, t in sorted(tensors.items())},
            "sha256": files.hash_files([work / TENSORS]),
        }
        (work / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return to


def read_delta(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the facts and tensors of a delta, checked against each other.

    Raises:
        UserError: If the folder is no delta, or a file of it is damaged.
    """
    try:
        facts = read_json(folder / FACTS)
        known = facts["format"], facts["base"], facts["sha256"]
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {FACTS}; name the folder of a delta") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / FACTS} is broken; copy the delta again") from None
    if known[0] != FORMAT:
        raise UserError(f"{folder / FACTS} has format {known[0]}; this version reads {FORMAT}")
    path = folder / TENSORS
    if not path.is_file() or files.hash_files([path]) != known[2]:
        raise UserError(f"{path} is missing or not what {FACTS} describes; copy the delta again")
    try:
        return facts, load_file(path)
    except SafetensorError:
        raise UserError(f"{path} is no safetensors file; copy the delta again") from None


def export(delta: Path, base: Checkpoint, to: Path, *, link: bool = False) -> Checkpoint:
    """Rebuild an edited model from its delta and its base.

    Args:
        delta: Folder of the delta.
        base: The model it was made from; it is read and never written.
        to: A folder that does not exist or is empty.
        link: Whether to hard-link shards without a changed tensor instead of copying them.

    Returns:
        The edited model.

    Raises:
        UserError: If the delta is damaged, belongs to another base, or `to` is not free.
    """
    check_free(to)
    facts, tensors = read_delta(delta)
    if facts["base"] != base.fingerprint:
        raise UserError(
            f"the delta in {delta} was made from a model with fingerprint {facts['base'][:12]} "
            f"and {base.path} has {base.fingerprint[:12]}; name its own base"
        )
    return base.write(tensors, to, link=link)


def export_adapter(
    adapter: Path, base: Checkpoint, to: Path, *, scale: float = 1.0, link: bool = False
) -> Checkpoint:
    """Write a base with a LoRA adapter added to it, `scale` times.

    Args:
        adapter: Folder of the adapter, as peft saves it.
        base: The model it was trained on; it is read and never written.
        to: A folder that does not exist or is empty.
        scale: How often the adapter is added; -1 negates it (see `merge`).
        link: Whether to hard-link shards without a changed tensor instead of copying them.

    Returns:
        The merged model, its weights in the dtype that the base stores them in.

    Raises:
        UserError: If the folder holds no LoRA adapter of this base, a weight does not fit its
            dtype, the scale is 0 or not finite, or `to` is not free.
    """
    check_free(to)
    if not math.isfinite(scale) or not scale:
        raise UserError(f"--scale {scale} adds nothing that can be written; give -1, 0.5 ...")
    changed, _ = merge(load_adapter(base.load(), adapter), scale)
    return base.write(changed, to, link=link)
