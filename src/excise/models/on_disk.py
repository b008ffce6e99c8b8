"""A model folder as a value: identity, loading, and writing only what changed."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from excise.core.disk import check_free, clone_file, expand, file_sum, new_folder
from excise.core.errors import UserError, first_line, nearest
from excise.core.keys import ByContent, file_identity
from excise.data.stream import Tokenizer
from excise.models import files
from excise.models.folder import (
    INDEX,
    TOKENIZER_FILES,
    WEIGHT_SUFFIXES,
    WEIGHTS,
    ensure_pad,
    find_shards,
    meta_model,
    quiet,
)
from excise.models.layout import Layout, TensorGroup, build_layout, read_group, to_disk
from excise.models.spec import Model


def model_identity(name: str) -> Any:
    """Return the identity of the model in a folder; of a file or a name, as `file_identity`."""
    path = expand(name)
    if name and (path / "config.json").is_file():
        return Checkpoint(path).identity
    return file_identity(name)


ModelPath = Annotated[str, ByContent(model_identity)]
"""A field that holds the folder of a model, or a name that the method knows."""


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
            UserError: If there is none, an adapter lies beside them, or the index is broken or
                names a file that is not there.
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
    def identity(self) -> dict[str, Any]:
        """Everything in the folder that decides what the model says, by its bytes.

        Beside the weights and the tokenizer that is the generation config, further chat templates,
        and code where it may run; texts about the model and weights in formats that are not read
        do not count.
        """
        folders = {"": self.path, "tokenizer/": self.tokenizer_path}
        beside = {
            prefix + path.relative_to(folder).as_posix(): file_sum(path)
            for prefix, folder in folders.items()
            if folder is not None
            for path in sorted(folder.rglob("*"))
            if path.is_file() and _decides(path, folder)
        }
        return {
            "weights": self.fingerprint,
            "beside": beside,
            "trust_remote_code": self.trust_remote_code,
        }

    @property
    def file_sums(self) -> dict[str, str]:
        """SHA-256 of every file of the folder by relative name, as `sha256sum` prints it.

        Left out are the card (`README.md`), hidden files, and weights that are not read.
        """
        read = {self.path / INDEX, *self.shards}
        return {
            path.relative_to(self.path).as_posix(): file_sum(path)
            for path in sorted(self.path.rglob("*"))
            if path.is_file()
            and path != self.path / "README.md"
            and (path in read or not _is_weights(path))
            and not any(part.startswith(".") for part in path.relative_to(self.path).parts)
        }

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
        return sum(p.numel() for p in self.shapes.parameters())

    @property
    def has_weights(self) -> bool:
        """Whether safetensors weights lie in the folder; an outline may lack them."""
        return any((self.path / name).is_file() for name in (WEIGHTS, INDEX))

    @functools.cached_property
    def shapes(self) -> Model:
        """The model on the meta device: as its weights are, or as the configuration alone says."""
        if self.has_weights:
            return self.layout.model
        return meta_model(self.config, trust_remote_code=self.trust_remote_code)

    def prefix_shapes(self, blocks: int) -> Model:
        """Return the model that `load_prefix` loads, on the meta device and with its head."""
        return _shortened(self, blocks) or self.shapes

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that `weights_of`, `write` and `load_prefix` have read so far."""
        return self._bytes[0]

    @functools.cached_property
    def entries(self) -> dict[str, files.Entry]:
        """Every tensor of every shard, from the headers alone."""
        stored: dict[str, files.Entry] = {}
        for shard in self.shards:
            stored.update(files.read_header(shard))
        return stored

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

        Raises:
            UserError: If the folder does not hold one whole model; see `shards`.
        """
        from transformers import AutoModelForCausalLM

        find_shards(self.path)
        extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        try:
            with quiet():
                model = AutoModelForCausalLM.from_pretrained(
                    self.path,
                    dtype=dtype,
                    local_files_only=True,
                    trust_remote_code=self.trust_remote_code,
                    use_safetensors=True,
                    **extra,
                )
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.path} cannot be loaded: {first_line(error)}; fetch the model again"
            ) from None
        _keep_scale(model.config)
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
        tensors: dict[str, Tensor] = {}
        for name in dict.fromkeys(names):
            if name in tensors:
                continue
            group = self.layout.group_of(self.own_name(name))
            if group is None:
                raise UserError(f"{self.path} holds no weights for '{name}'")
            converted = read_group(self.layout, group, self.read)
            aliases = self.layout.aliases[self.own_name(name)]
            tensors[name] = next(converted[alias] for alias in aliases if alias in converted)
        return tensors

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
        _write_changed(self, changed, to, dtype=dtype, link=link)
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

        A family whose first blocks would be others in a shorter model (which blocks share keys
        and values, or a block, follows from their number) is loaded whole.

        Raises:
            UserError: If the model has fewer blocks.
        """
        return _load_prefix(self, blocks, dtype=dtype, device=device, head=head)


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
        UserError: If `to` is not free, or a weight is NaN or infinite.
    """
    check_free(to)
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        raise UserError("the model carries an adapter; merge it before it is saved whole")
    if not hasattr(model, "save_pretrained"):
        raise UserError("the model is not a transformers model; convert it to one first")
    saved: Model = model
    for name, parameter in saved.named_parameters():
        check_finite(name, parameter.detach())
    with new_folder(to) as work:
        own = saved.config
        saved.config = copy.deepcopy(own)  # saving writes the dtype and class name into it
        # Whoever calls this writes; transformers would leave it to process 0 of several.
        saved.__dict__["should_save_on_this_rank"] = bool
        try:
            with quiet():
                saved.save_pretrained(work)
        finally:
            saved.config = own
            del saved.__dict__["should_save_on_this_rank"]
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        elif source is None:
            raise UserError("a model is saved with its tokenizer; give one")
        else:
            for path in source.tokenizer_files:
                clone_file(path, work / path.name)
    return Checkpoint(to)


def check_finite(name: str, stored: Tensor) -> None:
    """Refuse to store NaN or infinity; asked of the values as they are stored, after any cast.

    Raises:
        UserError: Naming the tensor.
    """
    if not stored.is_floating_point():
        return
    wide = stored if stored.element_size() > 1 else stored.float()
    if not torch.isfinite(wide).all():
        raise UserError(
            f"the new value of '{name}' does not fit {stored.dtype} (NaN, infinity, or beyond "
            f"{torch.finfo(stored.dtype).max:g}); store a wider dtype or lower the learning rate"
        )


_Make = Callable[[], dict[str, Tensor]]


def _write_changed(
    source: Checkpoint,
    changed: Mapping[str, Tensor],
    to: Path,
    *,
    dtype: torch.dtype | None,
    link: bool,
) -> None:
    """Do the work of `Checkpoint.write`; arguments and errors are the same."""
    check_free(to)
    plan = _groups_to_write(source, changed)
    with new_folder(to) as work:
        grown = 0
        for shard in source.shards:
            here = {key for key, entry in source.entries.items() if entry.file == shard}
            dtypes = {
                key: dtype or source.entries[key].dtype
                for _, keys in plan
                for key in keys
                if key in here
            }
            if dtypes:
                new = _values(plan, dtypes)
                grown += files.rewrite_shard(shard, work / shard.name, dtypes, new)
            elif link:
                os.link(shard.resolve(), work / shard.name)
            else:
                clone_file(shard, work / shard.name)
        _copy_side_files(source, work, grown)


def _values(
    plan: list[tuple[_Make, tuple[str, ...]]], dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the new values of one shard, one group in memory at a time."""
    for make, keys in plan:
        if dtypes.keys().isdisjoint(keys):
            continue
        for key, tensor in make().items():
            if key not in dtypes:
                continue
            stored = tensor.to(dtypes[key])
            check_finite(key, stored)
            yield key, stored


def _groups_to_write(
    source: Checkpoint, changed: Mapping[str, Tensor]
) -> list[tuple[_Make, tuple[str, ...]]]:
    """Return, for every group on disk that changes, how to make it and its keys."""
    layout = source.layout
    by_group: dict[tuple[str, ...], tuple[TensorGroup, dict[str, Tensor]]] = {}
    for given, tensor in changed.items():
        name = source.own_name(given)
        shape = layout.model.get_parameter(name).shape
        if tensor.shape != shape:
            raise UserError(
                f"the new value of '{name}' has shape {list(tensor.shape)} and the model in"
                f" {source.path} needs {list(shape)}"
            )
        stored = [alias for alias in layout.aliases[name] if alias in layout.groups]
        if not stored:
            raise UserError(f"{source.path} holds no weights for '{name}'")
        for alias in stored:  # a tie stored twice is written twice
            group = layout.groups[alias]
            by_group.setdefault(group.names, (group, {}))[1][alias] = tensor
    return [
        (functools.partial(_on_disk, source, group, new), tuple(key for key, _ in group.keys))
        for group, new in by_group.values()
    ]


def _on_disk(
    source: Checkpoint, group: TensorGroup, new: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return a group as stored, reading the members that did not change."""
    tensors = {name: tensor.detach().cpu() for name, tensor in new.items()}
    if len(tensors) < len(group.names):
        tensors = {**read_group(source.layout, group, source.read), **tensors}
    return to_disk(source.layout, group, tensors, source.entries)


def _copy_side_files(source: Checkpoint, work: Path, grown: int) -> None:
    """Copy configuration, tokenizer and texts; the index gets the new total size.

    Code is copied only where it was trusted.
    """
    for path in sorted(source.path.iterdir()):
        weights = _is_weights(path)
        code = path.suffix in {".py", ".so"} and not source.trust_remote_code
        if path.is_file() and not weights and not code and not path.name.startswith("."):
            clone_file(path, work / path.name)
    if source.tokenizer_path is not None:
        for path in source.tokenizer_files:
            (work / path.name).unlink(missing_ok=True)
            clone_file(path, work / path.name)
    templates = source.path / "additional_chat_templates"
    if templates.is_dir():
        (work / templates.name).mkdir()
        for path in sorted(templates.glob("*.jinja")):
            clone_file(path, work / templates.name / path.name)
    if (source.path / WEIGHTS).is_file():
        return
    index = json.loads((source.path / INDEX).read_text(encoding="utf-8"))
    if grown and "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] += grown
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (work / INDEX).write_text(text, encoding="utf-8")


class _LazyTensor:
    """A tensor on disk that is read when transformers asks for its values."""

    def __init__(self, source: Checkpoint, entry: files.Entry) -> None:
        self.source, self.entry = source, entry
        self.shape, self.dtype = entry.shape, entry.dtype

    def __getitem__(self, index: Any) -> Tensor:
        return self.source.read(self.entry.key)[index]


def _truncated(config: Any, blocks: int) -> Any:
    """Return a copy of a configuration with only the first `blocks` blocks."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    whole = text.num_hidden_layers
    text.num_hidden_layers = blocks
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == whole and "layer" in name:
            setattr(text, name, value[:blocks])
    return short


def _keep_scale(config: Any) -> None:
    """Let RWKV's weights stay as they are.

    In evaluation it halves those of later blocks in place, which guards half precision, and they
    would be saved so.
    """
    if getattr(config, "rescale_every", 0):
        config.rescale_every = 0


def _shortened(source: Checkpoint, blocks: int) -> Model | None:
    """Return a shorter model on the meta device, or None where its blocks would not be the same.

    Blocks are the same where every module has the class, the shapes and the plain attributes
    (indices, kinds of attention, widths) that it has in the whole model.
    """
    try:
        short = meta_model(
            _truncated(source.config, blocks), trust_remote_code=source.trust_remote_code
        )
    except Exception:  # a configuration that checks itself: lists of another length, a last block
        return None
    whole = dict(source.shapes.named_modules())
    base = getattr(short, short.base_model_prefix, short)
    same = all(
        name in whole and _nature(module) == _nature(whole[name])
        for name, module in short.named_modules()
        if module not in (short, base) and not isinstance(module, nn.ModuleList)
    )
    return short if same else None


def _nature(module: nn.Module) -> Any:
    """Return what makes two modules compute the same with equal weights."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if value is None or isinstance(value, bool | int | float | str)
    }
    shapes = {n: p.shape for n, p in module.named_parameters(recurse=False)}
    return type(module), plain, shapes


def _load_prefix(
    source: Checkpoint, blocks: int, *, dtype: torch.dtype, device: torch.device | str, head: bool
) -> Model:
    """Do the work of `Checkpoint.load_prefix`; arguments and errors are the same."""
    config = source.config
    whole = config.get_text_config().num_hidden_layers
    if not 1 <= blocks <= whole:
        raise UserError(f"{source.path} has {whole} blocks; ask for 1 to {whole} of them")
    model = _shortened(source, blocks)
    if model is None:
        return source.load(dtype=dtype, device=device)
    layout = build_layout(model, source.entries, source.same)
    output = model.get_output_embeddings()
    tied = output is None or output.weight is model.get_input_embeddings().weight
    base: Model = getattr(model, model.base_model_prefix, model)
    whole_model = head or tied or base is model
    target = model if whole_model else base
    beyond = set() if whole_model or output is None else {id(p) for p in output.parameters()}
    left_out = {name for name, p in model.named_parameters() if id(p) in beyond}
    wanted = {
        key: _LazyTensor(source, source.entries[key])
        for group in layout.groups.values()
        if not left_out.issuperset(group.names)
        for key, _ in group.keys
    }
    with quiet():
        loaded = type(target).from_pretrained(
            None, config=model.config, state_dict=wanted, dtype=dtype
        )
    if not whole_model:
        setattr(model, model.base_model_prefix, loaded)
        model.set_output_embeddings(_no_head(dtype))
        loaded = model
    _keep_scale(loaded.config)
    return loaded.to(device).eval()


def _no_head(dtype: torch.dtype) -> Any:
    """Return the identity; Mamba's forward asks its head for the dtype of its weight."""
    head: Any = nn.Identity()
    head.weight = torch.empty(0, dtype=dtype)
    return head


def _decides(path: Path, folder: Path) -> bool:
    """Return whether a file beside the weights can change what a model says."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    about = path.suffix == ".md" or path.stem.upper().startswith(("LICENSE", "NOTICE"))
    return not (hidden or about or _is_weights(path))


def _is_weights(path: Path) -> bool:
    """Return whether a file holds weights or says which file does, in any format."""
    return path.suffix.lower() in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
