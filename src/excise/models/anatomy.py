"""Canonical names of a causal model's parts: by a table of families, elsewhere by structure.

All paths are canonical (`excise.models.names`): real paths of the unwrapped model, which
`capture`, `edit`, `trainable` and `find_module` also take for a model under PEFT, DDP, FSDP or
`torch.compile`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from excise.core.errors import UserError
from excise.models.folder import meta_model
from excise.models.names import modules_by_name, unwrap
from excise.models.structure import Block, Frame, find_block, find_frame, sizes

__all__ = ["Anatomy", "Backbone", "BlockExperts", "ExpertWeight", "anatomy", "backbone"]


@dataclass(frozen=True)
class ExpertWeight:
    """One matrix of one expert.

    Attributes:
        parameter: Canonical name of the parameter it lies in.
        index: Where in the parameter's first dimension, or None when it is a parameter of its own.
    """

    parameter: str
    index: int | None = None


@dataclass(frozen=True)
class BlockExperts:
    """The experts of one block.

    Attributes:
        down: Down-projection of each expert.
        up: Up-projection of each.
        gate: Gate of each; empty when the experts have none.
        slices: Outputs of `up` and `gate` where both lie in one matrix, as `Anatomy.slices`;
            empty where they are interleaved.
        transposed: Whether matrices are stored as (in, out).
    """

    down: tuple[ExpertWeight, ...]
    up: tuple[ExpertWeight, ...]
    gate: tuple[ExpertWeight, ...] = ()
    slices: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    transposed: bool = False

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.down)


@dataclass(frozen=True)
class Backbone:
    """The residual stream of a causal model, whatever its blocks are made of.

    Attributes:
        family: `model_type` of the configuration, or the model's class.
        embed: Token embedding.
        blocks: Blocks, first to last.
        final_norm: Norm after the last block; empty where a backbone has none.
        head: The output matrix.
        d_model: Width of the residual stream.
    """

    family: str
    embed: str
    blocks: tuple[str, ...]
    final_norm: str
    head: str
    d_model: int

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.blocks)


@dataclass(frozen=True)
class Anatomy(Backbone):
    """Where the parts of a causal model are.

    Tuples have one entry per block. Where a block's MLP is a mixture of experts whose matrices
    are fused, `mlp_down`, `mlp_up` and `mlp_gate` name parameters (patterns for `select`), not
    modules, and `experts` says which slice belongs to which expert.

    Attributes:
        attention: Attention module of each block.
        attention_out: Its output projection.
        mlp: MLP module of each block.
        mlp_down: The matrix from the MLP's inside to the residual stream.
        mlp_up: The matrix into the MLP's inside.
        mlp_gate: The matrix whose activation gates `mlp_up`; empty strings where there is none.
        norms: Norms of each block, in the order of the module.
        d_mlp: Width inside the (or each expert's) MLP.
        tied: Whether head and embedding share their weight.
        transposed: Whether matrices are stored as (in, out), as GPT-2's `Conv1D` does.
        slices: Outputs (start, stop) of `mlp_gate` and `mlp_up` where both are one matrix.
        experts: Experts of each block, None for a dense one.
    """

    attention: tuple[str, ...]
    attention_out: tuple[str, ...]
    mlp: tuple[str, ...]
    mlp_down: tuple[str, ...]
    mlp_up: tuple[str, ...]
    mlp_gate: tuple[str, ...]
    norms: tuple[tuple[str, ...], ...]
    d_mlp: int
    tied: bool
    transposed: bool
    slices: Mapping[str, tuple[int, int]]
    experts: tuple[BlockExperts | None, ...]


_LLAMA_FRAME = Frame("model.embed_tokens", "model.layers", "model.norm", "lm_head")
_LLAMA_BLOCK = Block(
    "self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj", "mlp.up_proj", "mlp.gate_proj"
)
_EXPERTS = "mlp.experts"
_TABLE: Mapping[str, tuple[Frame, Block]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2"),
        (_LLAMA_FRAME, _LLAMA_BLOCK),
    ),
    "phi3": (
        _LLAMA_FRAME,
        Block(
            "self_attn",
            "self_attn.o_proj",
            "mlp",
            "mlp.down_proj",
            "mlp.gate_up_proj",
            "mlp.gate_up_proj",
        ),
    ),
    "mixtral": (
        _LLAMA_FRAME,
        Block(
            "self_attn",
            "self_attn.o_proj",
            "mlp",
            f"{_EXPERTS}.down_proj",
            f"{_EXPERTS}.gate_up_proj",
            f"{_EXPERTS}.gate_up_proj",
            _EXPERTS,
        ),
    ),
    "gpt2": (
        Frame("transformer.wte", "transformer.h", "transformer.ln_f", "lm_head"),
        Block("attn", "attn.c_proj", "mlp", "mlp.c_proj", "mlp.c_fc", ""),
    ),
    "gpt_neox": (
        Frame("gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm", "lm_head"),
        Block(
            "attention",
            "attention.dense",
            "mlp",
            "mlp.dense_4h_to_h",
            "mlp.dense_h_to_4h",
            "",
        ),
    ),
}
"""By `model_type`: the frame, and the parts of a block relative to it."""


def anatomy(model_or_config: Any, *, by_structure: bool = False) -> Anatomy:
    """Return where the parts of a causal model are.

    Args:
        model_or_config: A model, wrapped or not, or a `transformers` configuration, for which a
            model without weights is built.
        by_structure: Whether to search even where the table knows the family.

    Returns:
        The anatomy.

    Raises:
        UserError: If the family is not in the table and a part was not found.
    """
    family, inner, named = _named(model_or_config)
    entry = None if by_structure else _TABLE.get(family)
    if entry is not None and all(path in named for path in entry[0]):
        return _assemble(_backbone(family, inner, named, entry[0]), named, entry[1])
    missed: list[str] = []
    frame = find_frame(inner, named, missed)
    parts: list[Block] = []
    if frame.blocks and frame.embed:
        width = _width(inner, named, frame)
        for path in _blocks(named, frame.blocks):
            parts.append(find_block(named, path, width, missed))
    if missed:
        raise _not_found(family, missed)
    return _assemble(_backbone(family, inner, named, frame), named, parts)


def backbone(model_or_config: Any) -> Backbone:
    """Return the blocks of a causal model and what lies around them; more models have this.

    Args:
        model_or_config: As `anatomy` takes it.

    Returns:
        The backbone; of models that have an anatomy, its part.

    Raises:
        UserError: If the family is not in the table and has no list of blocks, no embedding or no
            head.
    """
    family, inner, named = _named(model_or_config)
    missed: list[str] = []
    frame = _TABLE[family][0] if family in _TABLE else None
    if frame is None or not all(path in named for path in frame):
        frame = find_frame(inner, named, missed)
    if not (frame.blocks and frame.embed and frame.head):
        raise _not_found(family, missed)
    return _backbone(family, inner, named, frame)


def _named(model_or_config: Any) -> tuple[str, nn.Module, dict[str, nn.Module]]:
    """Return family, unwrapped model and its modules by canonical name."""
    model = model_or_config
    if not isinstance(model, nn.Module):
        model = meta_model(model)
    _, inner = unwrap(model)
    family = str(getattr(getattr(inner, "config", None), "model_type", type(inner).__name__))
    return family, inner, modules_by_name(model)


def _not_found(family: str, missed: list[str]) -> UserError:
    looked = "; ".join(dict.fromkeys(missed))
    return UserError(f"the parts of a {family} model were not all found: {looked}")


def _backbone(
    family: str, model: nn.Module, named: Mapping[str, nn.Module], frame: Frame
) -> Backbone:
    """Put together what lies outside the blocks."""
    return Backbone(
        family=family,
        embed=frame.embed,
        blocks=_blocks(named, frame.blocks),
        final_norm=frame.final_norm,
        head=frame.head,
        d_model=_width(model, named, frame),
    )


def _blocks(named: Mapping[str, nn.Module], container: str) -> tuple[str, ...]:
    """Return the paths of the blocks in a list of modules."""
    return tuple(f"{container}.{i}" for i, _ in named[container].named_children())


def _width(model: nn.Module, named: Mapping[str, nn.Module], frame: Frame) -> int:
    """Return the width of the residual stream: of the last norm, else as the model says.

    The embedding answers last: it may be projected from another width.
    """
    weight = getattr(named.get(frame.final_norm), "weight", None)
    if weight is not None:
        return int(weight.shape[-1])
    size = getattr(getattr(model, "config", None), "hidden_size", None)
    if isinstance(size, int):
        return size
    return int(named[frame.embed].get_parameter("weight").shape[-1])


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _assemble(
    around: Backbone, named: Mapping[str, nn.Module], parts: Block | list[Block]
) -> Anatomy:
    """Put backbone and blocks together with everything that is read off the modules."""
    paths, width = around.blocks, around.d_model
    each = [parts] * len(paths) if isinstance(parts, Block) else parts
    pairs = list(zip(paths, each, strict=True))
    experts = tuple(_experts(named, path, block, width) for path, block in pairs)
    first_path, first = pairs[0]
    down = named.get(f"{first_path}.{first.down}")
    sized = sizes(down)
    d_mlp = sized[0] if sized else _inside(named, first_path, first, width)
    embed, head = named[around.embed], named[around.head]
    fused = first.gate != "" and first.gate == first.up
    if experts[0] is not None:
        fused = bool(experts[0].slices)
    return Anatomy(
        **vars(around),
        attention=tuple(f"{p}.{b.attention}" for p, b in pairs),
        attention_out=tuple(f"{p}.{b.attention_out}" for p, b in pairs),
        mlp=tuple(f"{p}.{b.mlp}" for p, b in pairs),
        mlp_down=tuple(f"{p}.{b.down}" for p, b in pairs),
        mlp_up=tuple(f"{p}.{b.up}" for p, b in pairs),
        mlp_gate=tuple(f"{p}.{b.gate}" if b.gate else "" for p, b in pairs),
        norms=tuple(
            tuple(f"{p}.{n}" for n, m in named[p].named_children() if _is_norm(m)) for p in paths
        ),
        d_mlp=d_mlp,
        tied=getattr(embed, "weight", None) is getattr(head, "weight", embed),
        transposed=hasattr(getattr(down, "base_layer", down), "nf"),
        slices=_halves(d_mlp) if fused else {},
        experts=experts,
    )


def _halves(width: int) -> dict[str, tuple[int, int]]:
    """Return the outputs of a matrix that holds the gate first and then the up-projection."""
    return {"mlp_gate": (0, width), "mlp_up": (width, 2 * width)}


def _fused(named: Mapping[str, nn.Module], path: str, name: str) -> tuple[nn.Module, Tensor]:
    """Return the experts of a block and one of their fused parameters."""
    owner, _, leaf = f"{path}.{name}".rpartition(".")
    return named[owner], named[owner].get_parameter(leaf)


def _transposed(named: Mapping[str, nn.Module], path: str, block: Block, width: int) -> bool:
    """Return whether fused experts store (in, out): as the module says, else by shape."""
    owner, down = _fused(named, path, block.down)
    return bool(getattr(owner, "is_transposed", down.shape[1] != width))


def _inside(named: Mapping[str, nn.Module], path: str, block: Block, width: int) -> int:
    """Return the width inside fused experts."""
    _, down = _fused(named, path, block.down)
    return int(down.shape[1 if _transposed(named, path, block, width) else 2])


def _experts(
    named: Mapping[str, nn.Module], path: str, block: Block, width: int
) -> BlockExperts | None:
    """Return which slices or modules are the experts of a block, None for a dense one."""
    if not block.experts:
        return None
    owner = named[f"{path}.{block.experts}"]
    if isinstance(owner, nn.ModuleList):
        names = [f"{path}.{block.experts}.{i}" for i, _ in enumerate(owner)]
        first = f"{block.experts}.0"

        def per_module(part: str) -> tuple[ExpertWeight, ...]:
            leaf = part.removeprefix(first)
            return tuple(ExpertWeight(f"{n}{leaf}.weight") for n in names) if part else ()

        return BlockExperts(per_module(block.down), per_module(block.up), per_module(block.gate))
    count = int(_fused(named, path, block.down)[1].shape[0])

    def per_slice(part: str) -> tuple[ExpertWeight, ...]:
        return tuple(ExpertWeight(f"{path}.{part}", e) for e in range(count)) if part else ()

    one = block.gate == block.up and getattr(owner, "is_concatenated", True)
    return BlockExperts(
        per_slice(block.down),
        per_slice(block.up),
        per_slice(block.gate),
        _halves(_inside(named, path, block, width)) if one else {},
        _transposed(named, path, block, width),
    )
