"""Models from elsewhere: hub ids, GGUF files and modules in memory become checked folders."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn

from excise.core.errors import UserError
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.files import new_folder, tensor_bytes
from excise.models.folder import TOKENIZER_FILES, ensure_pad, meta_model, quiet
from excise.models.verify import check_place, check_vocabulary, verify_folder

Model = Any
"""A `transformers` model."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CODE_FILES = ("*.py",)
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model",
              "*.txt", "README.md", "LICENSE*")  # fmt: skip
_HUB_SKIPPED = ("consolidated*", "*/*.safetensors", "*/*.json", "*/*.model", "*/*.txt", "*/*.md")


def cache_root() -> Path:
    """Return the folder for models made here: `EXCISE_CACHE`, else `excise` in the user's cache."""
    if os.environ.get("EXCISE_CACHE"):
        return Path(os.environ["EXCISE_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "excise"


def open_source(
    source: str | Path | nn.Module,
    *,
    revision: str | None,
    tokenizer: Any,
    cache: Path | None,
    trust_remote_code: bool,
) -> Checkpoint:
    """Do the work of `open_checkpoint`; arguments and errors are the same."""
    cache = cache or cache_root() / "models"
    if isinstance(source, nn.Module):
        return _from_memory(source, tokenizer, cache)
    beside = _tokenizer_folder(tokenizer, cache)
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path, beside, cache)
    if not path.exists() and isinstance(source, str) and _HUB_ID.fullmatch(source):
        path = fetch_hub(source, revision, trust_remote_code=trust_remote_code)
    elif revision is not None and path.exists():
        raise UserError(f"{path} is on this disk and has no revision; leave the revision out")
    return verify_folder(path, trust_remote_code=trust_remote_code, tokenizer=beside)


def fetch_hub(
    name: str,
    revision: str | None,
    *,
    trust_remote_code: bool = False,
    patterns: tuple[str, ...] = _HUB_FILES,
) -> Path:
    """Return the local snapshot of a hub model: safetensors, configuration and tokenizer.

    The Hugging Face cache, token and offline mode are honoured; pickles are never fetched.

    Args:
        name: `owner/name`.
        revision: Branch, tag or commit; None for the default branch.
        trust_remote_code: Whether to fetch its code too.
        patterns: Files to fetch.

    Returns:
        Folder of the snapshot.

    Raises:
        UserError: If it is not there, is not ours to read, or cannot be reached.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    wanted = list(patterns) + (list(_CODE_FILES) if trust_remote_code else [])
    at = f"'{name}'" + (f" at revision '{revision}'" if revision else "")
    try:
        with quiet():
            return Path(
                hub.snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=wanted,
                    ignore_patterns=list(_HUB_SKIPPED),
                )
            )
    except errors.GatedRepoError:
        reason = "it is gated; ask for access on its page and log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = "it has no such revision"
    except errors.RepositoryNotFoundError:
        reason = "the hub has no such model; check the name, or log in if it is private"
    except (errors.HFValidationError, ValueError):
        reason = "that is not a name the hub can have"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError):
        reason = "it is not in the local cache and the hub cannot be reached"
    raise UserError(f"there is no folder {name}, and {at} cannot be fetched: {reason}") from None


def _make_once(folder: Path, make: Callable[[], object]) -> None:
    """Make a folder of the cache unless it is there; another process may be first."""
    if folder.is_dir():
        return
    try:
        make()
    except UserError:
        if not folder.is_dir():
            raise


def _tokenizer_folder(tokenizer: Any, cache: Path) -> Path | None:
    """Return the folder of a tokenizer given by folder, hub id or as an object."""
    if tokenizer is None or tokenizer == "":
        return None
    if not isinstance(tokenizer, str | Path):
        work = cache / "tokenizers" / _tokenizer_hash(tokenizer)

        def save() -> None:
            with new_folder(work) as folder:
                tokenizer.save_pretrained(folder)

        _make_once(work, save)
        return work
    path = Path(tokenizer).expanduser()
    if not path.exists() and isinstance(tokenizer, str) and _HUB_ID.fullmatch(tokenizer):
        return fetch_hub(tokenizer, None, patterns=TOKENIZER_FILES)
    check_place(path)
    return path


def _tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of what a tokenizer does."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    body = inner.to_str() if inner is not None else json.dumps(tokenizer.get_vocab())
    facts = [body, tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.padding_side]
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _from_memory(model: nn.Module, tokenizer: Any, cache: Path) -> Checkpoint:
    """Save a module under a name made of its contents; the module is left as it is."""
    if tokenizer is None or isinstance(tokenizer, str | Path):
        raise UserError("a model in memory needs its tokenizer object; give tokenizer=...")
    whole: Model = model
    if hasattr(whole, "merge_and_unload"):
        whole = copy.deepcopy(whole).merge_and_unload()
    if not hasattr(whole, "save_pretrained") or not hasattr(whole, "config"):
        raise UserError(
            f"a {type(model).__name__} is not a transformers model; give one of its causal models"
        )
    if not whole.can_generate():
        raise UserError(f"a {type(model).__name__} is not a causal language model; give one")
    ensure_pad(copy.deepcopy(tokenizer), "the model in memory")
    check_vocabulary(tokenizer, whole, "memory")
    digest = hashlib.sha256(whole.config.to_json_string().encode())
    digest.update(_tokenizer_hash(tokenizer).encode())
    for name, tensor in whole.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"tensor '{name}' of the model in memory holds NaN or infinity")
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    folder = cache / "memory" / digest.hexdigest()[:32]
    _make_once(folder, lambda: save_model(whole, tokenizer, folder))
    return Checkpoint(folder)


def _from_gguf(path: Path, tokenizer: Path | None, cache: Path) -> Checkpoint:
    """Dequantize a GGUF file into a folder named by the file's hash, once.

    The folder holds float32: every dequantized value is exact.
    """
    with path.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file; copy or download it again")
        f.seek(0)
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    folder = cache / "gguf" / digest[:32]

    def save() -> None:
        model, made = _read_gguf(path)
        if tokenizer is not None:
            made = Checkpoint(tokenizer).tokenizer()
        check_vocabulary(made, model, str(path))
        save_model(model, made, folder)

    _make_once(folder, save)
    return verify_folder(folder, tokenizer=tokenizer)


def _read_gguf(path: Path) -> tuple[Model, Any]:
    """Return the model and the tokenizer of a GGUF file.

    The model that transformers makes refuses to be saved because its configuration says it is
    quantized, so its weights move into a fresh one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(path.parent), path.name
    try:
        with quiet(), redirect_stderr(io.StringIO()):  # its own progress bar
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
            quantized = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, dtype=torch.float32
            )
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} cannot be read: {first}; copy or download it again") from None
    config = type(quantized.config)(
        **{k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
    )
    fresh = meta_model(config)
    fresh.load_state_dict(quantized.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = quantized.generation_config
    rows = int(fresh.get_input_embeddings().weight.shape[0])
    return fresh, _without_foreign_tokens(tokenizer, rows)


def _without_foreign_tokens(tokenizer: Any, rows: int) -> Any:
    """Drop the tokens that transformers adds to a byte-level GGUF vocabulary which lacks them.

    Such a vocabulary is read as GPT-2's, whose end-of-text token then gets an id that the model
    has no row for.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    body = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in body["added_tokens"] if token["id"] < rows]
    if len(kept) == len(body["added_tokens"]):
        return tokenizer
    body["added_tokens"] = kept
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(body)),
        chat_template=tokenizer.chat_template,
        padding_side=tokenizer.padding_side,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        **{
            name: token
            for name, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str) and tokenizer.convert_tokens_to_ids(token) < rows
        },
    )
