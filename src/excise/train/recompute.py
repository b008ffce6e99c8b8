"""Activation checkpointing: a block keeps its input alone, and runs again in the backward pass.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from excise.core.errors import UserError
from excise.models.anatomy import backbone
from excise.models.hooks import eager
from excise.models.names import find_modules, unwrap


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Let every block of a model run again in the backward pass, as long as the `with` lasts.

    Values and gradients keep their bits: random states are put back for the second run. (A forward
    that does not say `use_cache` keeps no cache meanwhile, which may round otherwise.) Instance
    forwards are replaced, so that blocks that run one by one are recomputed too, hooks on a block
    run once, and FSDP gathers a block before both runs. transformers' own checkpointing works in
    train mode alone, and wants families to know it.

    What a `with` block changed inside a block (routes, an adapter that is off) must be as it was
    until the backward pass is done.

    Args:
        model: A model with a list of blocks; a compiled one runs eagerly meanwhile.

    Raises:
        UserError: If it has no list of blocks, or a block is called with a cache, which it would
            fill twice.
    """
    blocks = find_modules(model, backbone(model).blocks)
    config: Any = getattr(unwrap(model)[1], "config", None)
    inner = getattr(config, "get_text_config", lambda: config)()
    caching = {id(c): (c, c.use_cache) for c in (config, inner) if hasattr(c, "use_cache")}
    before = {path: block.__dict__.get("forward") for path, block in blocks.items()}
    with eager(model):
        try:
            for kept, _ in caching.values():
                kept.use_cache = False  # what a forward that is not told takes
            for path, block in blocks.items():
                block.forward = _twice(block.forward, path)
            yield
        finally:
            for kept, use_cache in caching.values():
                kept.use_cache = use_cache
            for path, block in blocks.items():
                forward = before[path]
                if forward is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.forward = forward


def _twice(forward: Callable[..., Any], path: str) -> Callable[..., Any]:
    """Return the forward of a block that runs again where a graph is built."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
            raise UserError(
                f"fit.activation_checkpointing: block '{path}' is called with a cache, which it "
                "would fill twice; leave it out"
            )
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
