"""A model folder as a value: fingerprint, loading, and writing only what changed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from excise.core.errors import UserError, nearest
from excise.models import files
from excise.models.folder import INDEX, TOKENIZER_FILES, ensure_pad, find_shards, meta_model, quiet
from excise.models.layout import Layout, build_layout, read_group

Model = Any
"""A `transformers` model."""
Tokenizer = Any
"""A `transformers` tokenizer."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model in safetensors, its configuration and its tokenizer.

    Attributes:
        path: The folder; it is read and never written.
        trust_remote_code: Whether code in the folder may run; only ever on request.
        tokenizer_path: Folder of the tokenizer where it does not lie beside the weights.
    """

    path: Path
    trust_remote_code: bool = False
    tokenizer_path: Path | None = None
    _bytes: list[int] = field(default_factory=lambda: [0], repr=False, compare=False)

    def __reduce__(self) -> tuple[type[Checkpoint], tuple[Path, bool, Path | None]]:
        """Travel to another process as paths."""
        return Checkpoint, (self.path, self.trust_remote_code, self.tokenizer_path)

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
        return files.hash_files(self.tokenizer_files)

    @property
    def tokenizer_files(self) -> list[Path]:
        """Files the tokenizer is made of."""
        folder = self.tokenizer_path or self.path
        return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]

    @property
    def config(self) -> Any:
        """The model's `transformers` configuration, a new object each time."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(
            self.path, local_files_only=True, trust_remote_code=self.trust_remote_code
        )

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
        model = meta_model(self.config, trust_remote_code=self.trust_remote_code)
        return build_layout(model, self.entries, self.same)

    def same(self, a: str, b: str) -> bool:
        """Return whether two keys on disk hold the same values."""
        return torch.equal(self.read(a), self.read(b))

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
                trust_remote_code=self.trust_remote_code,
                use_safetensors=True,
                **extra,
            )
        return model.to(device).eval()

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer; where it has no padding token, its end token pads."""
        from transformers import AutoTokenizer

        folder = self.tokenizer_path or self.path
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=self.trust_remote_code
        )
        return ensure_pad(tokenizer, str(folder))

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
            group = self.layout.group_of(self.own_name(name))
            if group is None:
                raise UserError(f"{self.path} holds no weights for '{name}'")
            made = read_group(self.layout, group, self.read)
            aliases = self.layout.aliases[self.own_name(name)]
            found[name] = next(made[alias] for alias in aliases if alias in made)
        return found

    def own_name(self, name: str) -> str:
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
        from excise.models.rewrite import write_changed

        write_changed(self, changed, to, dtype=dtype, link=link)
        return replace(self, path=to, tokenizer_path=None, _bytes=[0])

    def load_prefix(
        self,
        blocks: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        head: bool = False,
    ) -> Model:
        """Load the embeddings, the first blocks and the final norm, and read nothing else.

        Args:
            blocks: Number of blocks, from the first.
            dtype: Dtype of the weights in memory.
            device: Where they go.
            head: Whether to read the output head too; without it, a head of its own is replaced
                by the identity (a head tied to the embeddings is there anyway).

        Returns:
            A causal model of that many blocks, in evaluation mode; names as in the whole model.

        Raises:
            UserError: If the model has fewer blocks.
        """
        from excise.models.prefix import load_prefix

        return load_prefix(self, blocks, dtype=dtype, device=device, head=head)


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
    from excise.models.source import open_source

    return open_source(
        source,
        revision=revision,
        tokenizer=tokenizer,
        cache=cache,
        trust_remote_code=trust_remote_code,
    )


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
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        raise UserError("the model carries an adapter; merge it before it is saved whole")
    if not hasattr(model, "save_pretrained"):
        raise UserError("the model is not a transformers model; convert it to one first")
    saved: Model = model
    with files.new_folder(to) as work:
        own = saved.config
        saved.config = copy.deepcopy(own)  # saving writes the dtype and class name into it
        try:
            with quiet():
                saved.save_pretrained(work)
        finally:
            saved.config = own
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        elif source is None:
            raise UserError("a model is saved with its tokenizer; give one")
        else:
            for path in source.tokenizer_files:
                files.clone_file(path, work / path.name)
    return Checkpoint(to)
