"""A model folder as a value: fingerprint, loading, and writing only what changed."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from excise.errors import UserError, nearest
from excise.models import files
from excise.models.layout import Layout, build_layout, read_group, to_disk

Model = Any
"""A `transformers` model."""
Tokenizer = Any
"""A `transformers` tokenizer."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pkl",
    ".npz", ".ot",
}  # fmt: skip
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model in safetensors, its configuration and its tokenizer.

    Attributes:
        path: The folder; it is read and never written.
    """

    path: Path
    _bytes: list[int] = field(default_factory=lambda: [0], repr=False, compare=False)

    def __reduce__(self) -> tuple[type[Checkpoint], tuple[Path]]:
        """Travel to another process as a path."""
        return Checkpoint, (self.path,)

    @property
    def shards(self) -> tuple[Path, ...]:
        """Files that hold the weights.

        Raises:
            UserError: If there is none, or the index is broken or names a file that is not there.
        """
        return find_shards(self.path)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over configuration, index and weights, as hex."""
        paths = [self.path / "config.json", *self.shards]
        if len(self.shards) > 1:
            paths.append(self.path / INDEX)
        return files.hash_files(paths)

    @property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 over the tokenizer's files, as hex."""
        return files.hash_files(
            [self.path / name for name in _TOKENIZER_FILES if (self.path / name).is_file()]
        )

    @property
    def config(self) -> Any:
        """The model's `transformers` configuration, a new object each time."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)

    @property
    def num_parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(p.numel() for p in self.layout.model.parameters())

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that `weights_of`, `write` and `load_prefix` have read so far."""
        return self._bytes[0]

    @functools.cached_property
    def entries(self) -> dict[str, files.Entry]:
        """Every tensor of every shard, from the headers alone."""
        found: dict[str, files.Entry] = {}
        for shard in self.shards:
            found.update(files.read_header(shard))
        return found

    @functools.cached_property
    def layout(self) -> Layout:
        """Which keys on disk make which parameters."""
        return build_layout(meta_model(self.config), self.entries)

    def parameter_names(self) -> tuple[str, ...]:
        """Return the names of the parameters, as `model.named_parameters()` gives them."""
        return self.layout.parameters

    def load(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attn_implementation: str | None = None,
    ) -> Model:
        """Load the model in evaluation mode.

        Args:
            dtype: Dtype of the weights in memory.
            device: Where they go.
            attn_implementation: `eager`, `sdpa` ...; None leaves the choice to transformers.

        Returns:
            A `PreTrainedModel`.
        """
        from transformers import AutoModelForCausalLM

        extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                self.path,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                **extra,
            )
        return model.to(device).eval()

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer; where it has no padding token, its end token pads."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            self.path, local_files_only=True, trust_remote_code=False
        )
        return ensure_pad(tokenizer, str(self.path))

    def read(self, key: str) -> Tensor:
        """Read one tensor by its key on disk, and count its bytes."""
        entry = self.entries[key]
        self._bytes[0] += entry.end - entry.start
        return files.read_tensor(entry)

    def weights_of(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read single parameters, in the dtype they are stored in.

        Args:
            names: Names as in `model.named_parameters()`, or a name they are tied under.

        Returns:
            Tensors by the names given; only the shards' bytes they need are read.

        Raises:
            UserError: If the model has no such parameter.
        """
        found: dict[str, Tensor] = {}
        for name in dict.fromkeys(names):
            if name in found:
                continue
            group = self.layout.group_of(self._own_name(name))
            if group is None:
                raise UserError(f"{self.path} holds no weights for '{name}'")
            made = read_group(self.layout, group, self.read)
            aliases = self.layout.aliases[self._own_name(name)]
            found[name] = next(made[alias] for alias in aliases if alias in made)
        return found

    def _own_name(self, name: str) -> str:
        """Return the name under which `named_parameters` lists `name`."""
        if name in self.layout.aliases:
            return name
        for own, names in self.layout.aliases.items():
            if name in names:
                return own
        raise UserError(
            f"the model in {self.path} has no parameter '{name}'; "
            + nearest(name, self.layout.parameters)
        )

    def write(
        self,
        changed: Mapping[str, Tensor],
        to: Path,
        *,
        dtype: torch.dtype | None = None,
        link: bool = False,
    ) -> Checkpoint:
        """Write a copy of this folder in which some parameters have new values.

        Only shards that hold a changed tensor are written anew, with all other bytes as they are;
        other shards, configuration and tokenizer are copied (blocks shared where the file system
        can). Other weight files of the folder (a second format, pickles) are left out: they would
        carry the old values.

        Args:
            changed: New values by name as in `model.named_parameters()`.
            to: A folder that does not exist or is empty.
            dtype: Dtype to store the changed tensors in; None keeps each tensor's own.
            link: Whether to hard-link the shards without a changed tensor instead of copying.

        Returns:
            The new checkpoint.

        Raises:
            UserError: If a name is unknown, a shape differs, a value does not fit the stored
                dtype, or `to` is not free.
        """
        files.check_free(to)
        plan = self._plan_write(changed)
        with files.new_folder(to) as work:
            grown = 0
            for shard in self.shards:
                values: dict[str, Tensor] = {}
                for make, keys in plan:
                    here = [key for key in keys if self.entries[key].file == shard]
                    if here:
                        stored = make()
                        values |= {key: self._stored(key, stored[key], dtype) for key in here}
                if values:
                    grown += files.rewrite_shard(shard, work / shard.name, values)
                elif link:
                    os.link(shard.resolve(), work / shard.name)
                else:
                    files.clone_file(shard, work / shard.name)
            self._copy_side_files(work, grown)
        return Checkpoint(to)

    def _plan_write(
        self, changed: Mapping[str, Tensor]
    ) -> list[tuple[Callable[[], dict[str, Tensor]], tuple[str, ...]]]:
        """Return, for every group on disk that changes, how to make it and its keys."""
        own = {self._own_name(name): tensor for name, tensor in changed.items()}
        by_group: dict[tuple[str, ...], tuple[Any, dict[str, Tensor]]] = {}
        for name, tensor in own.items():
            shape = self.layout.model.get_parameter(name).shape
            if tensor.shape != shape:
                raise UserError(
                    f"the new value of '{name}' has shape {list(tensor.shape)} and the model in"
                    f" {self.path} needs {list(shape)}"
                )
            found = [a for a in self.layout.aliases[name] if a in self.layout.groups]
            if not found:
                raise UserError(f"{self.path} holds no weights for '{name}'")
            for alias in found:  # a tie stored twice is written twice
                group = self.layout.groups[alias]
                by_group.setdefault(group.names, (group, {}))[1][alias] = tensor
        return [
            (functools.partial(self._group_on_disk, group, new), tuple(k for k, _ in group.keys))
            for group, new in by_group.values()
        ]

    def _group_on_disk(self, group: Any, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a group as stored, reading the members that did not change."""
        tensors = {name: tensor.detach().cpu() for name, tensor in new.items()}
        if len(tensors) < len(group.names):
            tensors = {**read_group(self.layout, group, self.read), **tensors}
        return to_disk(self.layout, group, tensors, self.entries)

    def _stored(self, key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Return the tensor in the dtype it is to be stored in."""
        stored = tensor.to(dtype or self.entries[key].dtype)
        if not torch.equal(torch.isfinite(stored), torch.isfinite(tensor)):
            raise UserError(
                f"the new value of '{key}' does not fit {stored.dtype}; store it in a wider dtype"
            )
        return stored.contiguous()

    def _copy_side_files(self, work: Path, grown: int) -> None:
        """Copy configuration, tokenizer and texts; the index gets the new total size."""
        for path in sorted(self.path.iterdir()):
            weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
            if path.is_file() and not weights and not path.name.startswith("."):
                files.clone_file(path, work / path.name)
        templates = self.path / "additional_chat_templates"
        if templates.is_dir():
            (work / templates.name).mkdir()
            for path in sorted(templates.glob("*.jinja")):
                files.clone_file(path, work / templates.name / path.name)
        if (self.path / WEIGHTS).is_file():
            return
        index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
        if grown and "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += grown
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (work / INDEX).write_text(text, encoding="utf-8")


def find_shards(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a model folder; see `Checkpoint.shards`."""
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    index = folder / INDEX
    if not index.is_file():
        raise UserError(f"{folder} holds no {WEIGHTS}; name a folder with safetensors weights")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is broken; copy or download it again") from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{index} names '{name}', which {folder} does not hold; fetch it again")
    return tuple(folder / name for name in names)


def meta_model(config: Any) -> Model:
    """Return the causal model of a configuration on the meta device: names and shapes, no data."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
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


def save_model(
    model: nn.Module, tokenizer: Tokenizer, to: Path, *, source: Checkpoint | None = None
) -> Checkpoint:
    """Write a whole model as a folder, all at once or not at all.

    Args:
        model: A `PreTrainedModel`; its dtype is kept.
        tokenizer: Its tokenizer, or None to copy the one of `source`.
        to: A folder that does not exist or is empty.
        source: Where the model came from; its chat template files and texts are kept.

    Returns:
        The checkpoint.

    Raises:
        UserError: If `to` is not free.
    """
    files.check_free(to)
    if not hasattr(model, "save_pretrained"):
        raise UserError("the model is not a transformers model; convert it to one first")
    saved: Model = model
    with files.new_folder(to) as work:
        with quiet():
            saved.save_pretrained(work)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        elif source is None:
            raise UserError("a model is saved with its tokenizer; give one")
        else:
            for name in _TOKENIZER_FILES:
                if (source.path / name).is_file():
                    files.clone_file(source.path / name, work / name)
    return Checkpoint(to)
