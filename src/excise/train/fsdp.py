"""FSDP2 while a model trains: blocks are cut over processes, and whole again afterwards.

Every block is a unit of its own, so that losses which run blocks one by one, or read hidden states
and head, work as they are; embedding, last norm and head stay whole in every process. Outside of
`sharded` the model is what it was, with the same `Parameter` objects: methods need not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from excise.core.context import Context
from excise.core.errors import Diverged
from excise.models.anatomy import backbone


@contextmanager
def sharded(model: nn.Module, ctx: Context) -> Iterator[dict[int, nn.Parameter]]:
    """Cut the blocks of a model over the processes of `ctx` inside the block.

    Their parameters hold nothing meanwhile. They are filled again from all processes at the end,
    also where a caller leaves a loop or training diverges, which all processes do at once; after
    any other error they stay empty, because another process may be gone.

    Args:
        model: The model; which parameters are trained must be settled.
        ctx: Says whether at all (`ctx.fsdp`), and how.

    Yields:
        What stands in the place of each parameter of a block, by its `id`.
    """
    if not ctx.fsdp:
        yield {}
        return
    blocks = [model.get_submodule(path) for path in backbone(model).blocks]
    mesh = init_device_mesh(ctx.device.type, (ctx.world,))
    # Gradients are sums: `fit` divides terms by their counts over all processes itself.
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    before = {module: _look(module) for block in blocks for module in block.modules()}
    places = [(p, m, name) for m in before for name, p in m.named_parameters(recurse=False)]
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
        block.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        block.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    cut = {id(p): getattr(module, name) for p, module, name in places}
    for p, _, _ in places:
        p.data = p.data.new_empty(0)
    try:
        yield cut
    except (GeneratorExit, Diverged):
        _restore(blocks, before, places, cut)
        raise
    _restore(blocks, before, places, cut)


def _look(module: nn.Module) -> tuple[type, set[str], dict[str, set[int]]]:
    """Return class, attributes and hooks of a module."""
    hooks = {name: set(value) for name, value in vars(module).items() if "hooks" in name}
    return type(module), set(vars(module)), hooks


def _restore(
    blocks: list[nn.Module],
    before: Mapping[nn.Module, tuple[type, set[str], dict[str, set[int]]]],
    places: Sequence[tuple[nn.Parameter, nn.Module, str]],
    cut: Mapping[int, nn.Parameter],
) -> None:
    """Take FSDP off the modules and fill their own parameters, an entry of the mesh at a time."""
    for block in blocks:
        block.reshard()  # type: ignore[operator]
        _module_state_mapping.pop(block)  # so that the model can be cut again
    for module, (cls, attributes, hooks) in before.items():
        module.__class__ = cls
        for name in set(vars(module)) - attributes:
            del vars(module)[name]
        for name, known in hooks.items():
            for key in set(vars(module)[name]) - known:
                del vars(module)[name][key]
    for p, module, name in places:
        if not p.numel():
            p.data = whole_of(cut[id(p)].detach()).to(p.device)
        setattr(module, name, p)


def whole_of(tensor: Tensor) -> Tensor:
    """Return a tensor whole, from all processes where it is cut."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
