"""How many units a block has, and making a model say the sizes its tensors have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from excise.core.errors import UserError
from excise.models.anatomy import Anatomy, anatomy
from excise.models.names import modules_by_name, parameters_by_name, unwrap

What = Literal["mlp", "heads", "experts"]
"""What can be grown and deleted."""


def count_units(model: nn.Module, block: int, what: What = "mlp") -> int:
    """Return how many MLP neurons, query heads or experts a block has.

    Args:
        model: A causal model; blocks may differ in width.
        block: Number of the block.
        what: What to count.

    Raises:
        UserError: If the block has no such thing.
    """
    return _count(modules_by_name(model), parameters_by_name(model), anatomy(model), block, what)


def _count(
    named: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    found: Anatomy,
    block: int,
    what: What,
) -> int:
    experts = found.experts[block]
    if what == "experts":
        if experts is None:
            raise UserError(f"block {block} has no experts; name a mixture of experts")
        return experts.count
    if what == "heads":
        out = named[found.attention_out[block]]
        return _inputs(out) // head_size(named[found.attention[block]])
    down = named.get(found.mlp_down[block])
    if down is not None:
        return _inputs(down)
    assert experts is not None, "a fused MLP is a mixture of experts"
    return int(tensors[found.mlp_down[block]].shape[1 if experts.transposed else 2])


def _inputs(module: Any) -> int:
    """Return the number of inputs of a linear layer or `Conv1D`."""
    return int(module.in_features if hasattr(module, "in_features") else module.nx)


def head_size(attention: nn.Module) -> int:
    """Return the width of one head.

    Raises:
        UserError: If the module does not say it.
    """
    for name in ("head_dim", "head_size"):
        size = getattr(attention, name, None)
        if isinstance(size, int):
            return size
    raise UserError(f"{type(attention).__name__} does not say how wide its heads are")


def heads_together(attention: nn.Module) -> int:
    """Return how many query heads share keys and values."""
    return int(getattr(attention, "num_key_value_groups", 1))


def experts_per_token(mlp: nn.Module) -> int:
    """Return how many experts each token is sent to."""
    counts = (getattr(module, "top_k", None) for module in mlp.modules())
    return next((count for count in counts if isinstance(count, int)), 1)


def refresh(model: nn.Module) -> None:
    """Make modules and configuration say the sizes that their tensors have.

    Where blocks differ in width no configuration can say so, and it keeps what it said.

    Args:
        model: A causal model whose tensors have changed shape.
    """
    named = modules_by_name(model)
    for module in named.values():
        _say_sizes(module)
    found = anatomy(model)
    tensors = parameters_by_name(model)
    blocks = range(found.num_blocks)
    for block in blocks:
        mlp = named[found.mlp[block]]
        if isinstance(getattr(mlp, "intermediate_size", None), int):
            mlp.intermediate_size = _count(named, tensors, found, block, "mlp")  # type: ignore[assignment]
    config: Any = getattr(unwrap(model)[1], "config", None)
    if config is None:
        return
    config = config.get_text_config()
    widths = {_count(named, tensors, found, block, "mlp") for block in blocks}
    if len(widths) == 1:
        _say_width(config, widths.pop())
    experts = {e.count if e is not None else 0 for e in found.experts}
    if len(experts) == 1 and 0 not in experts:
        config.num_local_experts = experts.pop()
    if "head_dim" in config.to_dict():  # elsewhere heads follow from the width
        heads = {_count(named, tensors, found, block, "heads") for block in blocks}
        if len(heads) == 1:
            config.num_attention_heads = heads.pop()
            step = heads_together(named[found.attention[0]])
            config.num_key_value_heads = config.num_attention_heads // step


def _say_sizes(module: Any) -> None:
    """Set the sizes that a module keeps beside its tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(weight, Tensor) and isinstance(getattr(module, "nf", None), int):
        module.nx, module.nf = weight.shape
    if isinstance(getattr(module, "split_size", None), int) and hasattr(module, "c_attn"):
        module.split_size = module.c_attn.weight.shape[1] // 3
        module.num_heads = module.split_size // module.head_dim
    if isinstance(getattr(module, "num_experts", None), int):
        rows = getattr(module, "gate_up_proj", weight)
        if isinstance(rows, Tensor):
            module.num_experts = rows.shape[0]


def _say_width(config: Any, width: int) -> None:
    """Set the MLP's width in a configuration; GPT-2's may be empty for four times the model's."""
    if hasattr(config, "n_inner"):
        if config.n_inner is not None or width != 4 * config.n_embd:
            config.n_inner = width
    elif hasattr(config, "intermediate_size"):
        config.intermediate_size = width
