"""Models from wherever they are become checked folders: one sentence where one cannot.

What such a folder is as a value, `Checkpoint`, is in `on_disk`. Hub ids, GGUF files and modules
in memory are written into a cache of stages first, so that what lies there is checked by its
bytes.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn

from excise.core.disk import check_regular, expand, file_sum, scratch
from excise.core.errors import UserError, first_line, nearest
from excise.core.keys import file_identity, library_versions, own_source
from excise.core.plain import NotPlain, read_json
from excise.core.stages import Store
from excise.models import files
from excise.models.folder import (
    INDEX,
    TOKENIZER_FILES,
    WEIGHT_SUFFIXES,
    WEIGHTS,
    ensure_pad,
    meta_model,
    quiet,
)
from excise.models.limits import check_sizes
from excise.models.on_disk import Checkpoint, ModelPath, save_model
from excise.models.spec import Model

__all__ = [
    "Checkpoint",
    "ModelPath",
    "cache_root",
    "check_place",
    "check_vocabulary",
    "fetch_hub",
    "open_checkpoint",
    "open_outline",
    "open_tokenizer",
    "save_model",
    "tokenizer_identity",
    "verify_folder",
]

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


def open_checkpoint(
    source: str | Path | nn.Module,
    *,
    revision: str | None = None,
    tokenizer: Any = None,
    cache: Path | None = None,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Open a model from wherever it is, and check it.

    Args:
        source: A folder, a `.gguf` file, a hub id `owner/name`, or a model in memory (a `peft`
            model is merged in a copy).
        revision: Revision of a hub id.
        tokenizer: For a model in memory, its tokenizer. For the others only where the tokenizer
            does not lie beside the weights: a folder or hub id, or a tokenizer.
        cache: Where models that are no folder yet are written; a folder of the user's by default.
        trust_remote_code: Whether code in the folder may run.

    Returns:
        The checkpoint.

    Raises:
        UserError: If there is no such model or something is wrong with it; see `verify_folder`.
    """
    cache = cache or cache_root() / "models"
    if isinstance(source, nn.Module):
        return _from_memory(source, tokenizer, cache)
    beside = _tokenizer_folder(tokenizer, cache)
    path = expand(source)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _from_gguf(path, beside, cache)
    if not path.exists() and isinstance(source, str) and _HUB_ID.fullmatch(source):
        path = fetch_hub(source, revision, trust_remote_code=trust_remote_code)
    elif revision is not None and path.exists():
        raise _no_revision(path)
    return verify_folder(path, trust_remote_code=trust_remote_code, tokenizer=beside)


@contextmanager
def open_outline(
    source: str | Path, *, revision: str | None = None, tokenizer: str | None = None
) -> Iterator[Checkpoint]:
    """Open what a model says of itself, to count with; no value of a weight is read.

    Of a folder that is the configuration, the tokenizer and, where weights lie there, their
    headers; of a hub id the configuration and the tokenizer are fetched; a GGUF file is read for
    both.

    Args:
        source: A folder, a `.gguf` file or a hub id. The weights need not be there, nor then the
            tokenizer.
        revision: Revision of a hub id.
        tokenizer: Folder or hub id of a tokenizer that does not lie beside the weights.

    Yields:
        The checkpoint; `num_parameters` and `shapes` answer, and `load` only where weights are.

    Raises:
        UserError: If there is no such model, or what is there of it is wrong.
    """
    path = expand(source)
    with scratch() as work:
        beside = _tokenizer_folder(tokenizer, work)
        if path.suffix.lower() == ".gguf" and path.is_file():
            path = _outline_of_gguf(path, work)
        elif not path.exists() and _HUB_ID.fullmatch(str(source)):
            path = fetch_hub(str(source), revision, patterns=("config.json", *TOKENIZER_FILES))
        elif revision is not None and path.exists():
            raise _no_revision(path)
        yield verify_folder(path, tokenizer=beside, outline=True)


def _no_revision(path: Path) -> UserError:
    return UserError(f"{path} is on this disk and has no revision; leave the revision out")


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


def _tokenizer_folder(tokenizer: Any, cache: Path) -> Path | None:
    """Return the folder of a tokenizer given by folder, hub id or as an object."""
    if tokenizer is None or tokenizer == "":
        return None
    if not isinstance(tokenizer, str | Path):
        return Store(cache).stage(
            "tokenizer", tokenizer_identity(tokenizer), tokenizer.save_pretrained
        )
    path = expand(tokenizer)
    if not path.exists() and isinstance(tokenizer, str) and _HUB_ID.fullmatch(tokenizer):
        return fetch_hub(tokenizer, None, patterns=TOKENIZER_FILES)
    check_place(path)
    return path


def open_tokenizer(source: str | Path) -> Any:
    """Load a tokenizer for a model that is made here.

    Args:
        source: Folder or hub id of a tokenizer, or of a model that has one.

    Raises:
        UserError: If there is none.
    """
    folder = _tokenizer_folder(source, cache_root() / "models")
    assert folder is not None
    return Checkpoint(folder).tokenizer()


def tokenizer_identity(tokenizer: Any) -> Any:
    """Return what makes two tokenizers in memory equal: the bytes that saving one writes."""
    with scratch() as folder:
        tokenizer.save_pretrained(folder)
        return file_identity(str(folder))


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
    for name, tensor in whole.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"tensor '{name}' of the model in memory holds NaN or infinity")
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(files.tensor_bytes(tensor))
    generation = getattr(whole, "generation_config", None)
    key = {
        "model": digest.hexdigest(),
        "generation": None if generation is None else generation.to_dict(),
        "tokenizer": tokenizer_identity(tokenizer),
        "libraries": dict(library_versions()),
        "code": own_source(),
    }
    text = json.loads(json.dumps(key, default=str))
    return Checkpoint(
        Store(cache).stage("memory", text, _saver(lambda: (whole, tokenizer))) / "model"
    )


def _saver(make: Callable[[], tuple[Model, Any]]) -> Callable[[Path], None]:
    """Return what fills a stage with a model and its tokenizer, under `model`."""

    def save(work: Path) -> None:
        if (work / "model").exists():  # of a run that was killed
            shutil.rmtree(work / "model")
        save_model(*make(), work / "model")

    return save


def _from_gguf(path: Path, tokenizer: Path | None, cache: Path) -> Checkpoint:
    """Dequantize a GGUF file into a folder named by the file's hash, once.

    The folder holds float32: every dequantized value is exact.
    """
    _check_gguf(path)
    beside = None if tokenizer is None else Checkpoint(tokenizer)

    def read() -> tuple[Model, Any]:
        model, own = _read_gguf(path)
        used = own if beside is None else beside.tokenizer()
        check_vocabulary(used, model, str(path))
        return model, used

    key = {
        "file": file_sum(path),
        "tokenizer": "" if beside is None else beside.tokenizer_fingerprint,
        "libraries": dict(library_versions()),
        "code": own_source(),
    }
    folder = Store(cache).stage("gguf", key, _saver(read)) / "model"
    return verify_folder(folder, tokenizer=tokenizer)


def _check_gguf(path: Path) -> None:
    """Raise UserError unless a file begins as GGUF files do."""
    with path.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file; copy or download it again")


def _outline_of_gguf(path: Path, to: Path) -> Path:
    """Write configuration and tokenizer of a GGUF file as a folder without weights."""
    from transformers import AutoConfig, AutoTokenizer

    _check_gguf(path)
    folder, name = str(path.parent), path.name
    try:
        with quiet(), redirect_stderr(io.StringIO()):  # its own progress bar
            config = AutoConfig.from_pretrained(folder, gguf_file=name)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except Exception as error:
        raise _unreadable_gguf(path, error) from None
    config.save_pretrained(to)
    _without_foreign_tokens(tokenizer, config.get_text_config().vocab_size).save_pretrained(to)
    return to


def _unreadable_gguf(path: Path, error: Exception) -> UserError:
    first = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return UserError(f"{path} cannot be read: {first}; copy or download it again")


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
        raise _unreadable_gguf(path, error) from None
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


PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
"""Endings of weight files that run code when they are read."""


def verify_folder(
    path: Path,
    *,
    trust_remote_code: bool = False,
    tokenizer: Path | None = None,
    outline: bool = False,
) -> Checkpoint:
    """Check a model folder from its name to the last weight; nothing is written or executed.

    Args:
        path: The folder.
        trust_remote_code: Whether code in the folder may run.
        tokenizer: Folder of the tokenizer where it does not lie beside the weights.
        outline: Whether to read no value of a weight, and to do without weights and tokenizer
            where the folder holds no file of weights at all.

    Returns:
        The checkpoint.

    Raises:
        UserError: What is wrong, where, and what to do.
    """
    check_place(path)
    config = _read_config(path)
    _check_kind(path, config, trust_remote_code)
    checkpoint = Checkpoint(path, trust_remote_code, tokenizer)
    _check_sizes(checkpoint)
    bare = outline and not any(file.suffix.lower() in WEIGHT_SUFFIXES for file in path.iterdir())
    if bare:
        _check_meta(checkpoint)
    else:
        _check_files(path)
        _check_shapes(checkpoint)
    if not bare or checkpoint.tokenizer_files:
        _check_tokenizer(checkpoint)
    if not outline:
        _check_values(checkpoint)
    return checkpoint


def check_place(path: Path) -> None:
    """Raise UserError unless `path` is a folder."""
    try:
        inside = [*path.iterdir()] if path.is_dir() else None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {(error.strerror or 'error').lower()}") from None
    if inside is not None:
        for file in inside:
            check_regular(file)
        return
    if not os.path.lexists(path):
        raise UserError(f"there is no folder {str(path)[:300]}; name one that holds a model")
    check_regular(path)
    if path.suffix.lower() in PICKLES:
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
            raise UserError(
                f"{path} holds an adapter, not a model; merge it into its model first, as with "
                f"`excise export {path} --base MODEL --merge --out DIR`"
            )
        raise UserError(f"{path} holds no config.json; name the folder of a transformers model")
    try:
        config = read_json(file)
    except NotPlain as error:
        raise UserError(f"{file} {error}; fetch it again") from None
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
    others = sorted(p.name for p in path.iterdir() if p.suffix.lower() in WEIGHT_SUFFIXES)
    pickles = [name for name in others if Path(name).suffix.lower() in PICKLES]
    ggufs = [name for name in others if name.lower().endswith(".gguf")]
    if ggufs:
        raise UserError(f"{path} holds no {WEIGHTS}; name the file {path / ggufs[0]} itself")
    if pickles:
        raise UserError(
            f"{path} holds its weights only as a pickle ({pickles[0]}), and loading one runs"
            " whatever code is in it; convert it to safetensors where you trust it"
        )
    raise UserError(f"{path} holds no weights ({WEIGHTS}); fetch the model again")


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Raise UserError unless the configuration can be read and its sizes are a model's."""
    file = checkpoint.path / "config.json"
    try:
        config = checkpoint.config
    except Exception as error:
        raise UserError(
            f"{file} is no configuration: {first_line(error)}; fetch it again"
        ) from None
    check_sizes(config, str(file))


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
            f"the weights in {path} do not fit its config.json: {first_line(error)};"
            " use the config of these weights"
        ) from None
    if layout.mismatched:
        name, shape, wanted = layout.mismatched[0]
        raise UserError(
            f"tensor '{name}' in {path} has shape {list(shape)} and config.json asks for"
            f" {list(wanted)} ({len(layout.mismatched)} such); use the config of these weights"
        )
    if layout.missing:
        raise UserError(
            f"{path} lacks tensor '{layout.missing[0]}' ({len(layout.missing)} missing); fetch the"
            " model again, or use the config of these weights"
        )
    for name in layout.parameters:
        group = layout.group_of(name)
        for key, _ in group.keys if group else ():
            if not checkpoint.entries[key].dtype.is_floating_point:
                raise UserError(
                    f"tensor '{key}' in {path} holds {checkpoint.entries[key].code} and no floating"
                    " point numbers; give the model before quantization"
                )


def _check_meta(checkpoint: Checkpoint) -> None:
    """Raise UserError unless a model can be made of the configuration alone."""
    try:
        assert checkpoint.shapes is not None
    except Exception as error:
        raise UserError(
            f"{checkpoint.path}/config.json makes no model: {first_line(error)}; fetch it again"
        ) from None


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    """Raise UserError unless there is a tokenizer whose ids the embedding has rows for."""
    where = checkpoint.tokenizer_path or checkpoint.path
    if not checkpoint.tokenizer_files:
        raise UserError(f"{where} holds no tokenizer; put its files beside the weights")
    try:
        tokenizer = checkpoint.tokenizer()
        tokenizer.decode(tokenizer("some words")["input_ids"])  # settings that only use shows
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the tokenizer in {where} cannot be read: {first_line(error)}; fetch it again"
        ) from None
    check_vocabulary(tokenizer, checkpoint.shapes, str(where))


def check_vocabulary(tokenizer: Any, model: Any, where: str) -> None:
    """Raise UserError where the tokenizer has an id that the model's embedding has no row for."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    words: dict[int, str] = {}
    for token, number in tokenizer.get_vocab().items():
        if words.setdefault(number, token) != token:
            raise UserError(
                f"the tokenizer in {where} has one id, {number}, for {words[number]!r} and"
                f" {token!r}; fetch it again"
            )
    if not words:
        raise UserError(f"the tokenizer in {where} has no token; fetch it again")
    last = max(words)
    token = words[last]
    if last >= rows:
        raise UserError(
            f"the tokenizer in {where} has token id {last} ({token!r}) and the model has only"
            f" {rows} embedding rows; use the tokenizer of this model"
        )


def _check_values(checkpoint: Checkpoint) -> None:
    """Raise UserError where a weight is not finite; streamed, and once per file and process."""
    for shard in checkpoint.shards:
        bad = files.bad_tensor(shard)
        if bad:
            raise UserError(
                f"tensor '{bad}' in {shard} holds NaN or infinity; fetch the model again or train"
                " it anew"
            )
