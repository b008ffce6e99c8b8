"""The first blocks of a model, without reading the rest of its files."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.models.files import Entry
from excise.models.folder import meta_model, quiet
from excise.models.layout import build_layout

if TYPE_CHECKING:
    from excise.models.checkpoint import Checkpoint

Model = Any
"""A `transformers` model."""


class _Lazy:
    """A tensor on disk that is read when transformers asks for its values."""

    def __init__(self, source: Checkpoint, entry: Entry) -> None:
        self.source, self.entry = source, entry
        self.shape, self.dtype = entry.shape, entry.dtype

    def __getitem__(self, index: Any) -> Tensor:
        return self.source.read(self.entry.key)[index]


def truncated(config: Any, blocks: int) -> Any:
    """Return a copy of a configuration with only the first `blocks` blocks."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    whole = text.num_hidden_layers
    text.num_hidden_layers = blocks
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == whole and "layer" in name:
            setattr(text, name, value[:blocks])
    return short


def load_prefix(
    source: Checkpoint, blocks: int, *, dtype: torch.dtype, device: torch.device | str, head: bool
) -> Model:
    """Do the work of `Checkpoint.load_prefix`; arguments and errors are the same."""
    config = source.config
    whole = config.get_text_config().num_hidden_layers
    if not 1 <= blocks <= whole:
        raise UserError(f"{source.path} has {whole} blocks; ask for 1 to {whole} of them")
    model = meta_model(truncated(config, blocks), trust_remote_code=source.trust_remote_code)
    layout = build_layout(model, source.entries, source.same)
    output = model.get_output_embeddings()
    tied = output is None or output.weight is model.get_input_embeddings().weight
    base = getattr(model, model.base_model_prefix)
    whole_model = head or tied or base is model
    target = model if whole_model else base
    beyond = set() if whole_model or output is None else {id(p) for p in output.parameters()}
    left_out = {name for name, p in model.named_parameters() if id(p) in beyond}
    wanted = {
        key: _Lazy(source, source.entries[key])
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
        model.set_output_embeddings(nn.Identity())
        loaded = model
    return loaded.to(device).eval()
