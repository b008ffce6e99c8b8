"""Activation checkpointing: what a block computed is not kept, and no bit of a training moves."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.models.tiny import tiny_model
from excise.train.fit import FitConfig, Term, fit
from excise.train.recompute import recomputed

BLOCKS = 3
IDS_BT = torch.randint(90, (4, 9), generator=torch.Generator().manual_seed(1))


def made(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_model("gpt2", seed=0, width=32, blocks=BLOCKS).to(dtype)


def loss(model: nn.Module, ids_BT: Tensor, use_cache: bool | None = False) -> dict[str, Term]:
    logits_BTV: Any = model(ids_BT, use_cache=use_cache).logits[:, :-1]
    total = nn.functional.cross_entropy(
        logits_BTV.float().flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum"
    )
    return {"nll": Term(total, ids_BT[:, 1:].numel())}


@pytest.mark.parametrize("again", [False, True])
def test_what_a_block_computed_is_gone_before_the_backward_pass(again: bool) -> None:
    model, seen, alive = made(), [], []

    def note(module: nn.Module, args: Any) -> None:
        seen.append(weakref.ref(args[0]))

    def counted(model: nn.Module, ids_BT: Tensor) -> dict[str, Term]:
        terms = loss(model, ids_BT)
        alive.append(sum(ref() is not None for ref in seen))
        return terms

    for block in model.transformer.h:
        block.mlp.c_proj.register_forward_pre_hook(note)
    config = FitConfig(steps=1, activation_checkpointing=again)
    list(fit(model, lambda s: [IDS_BT], counted, config, Context(Path("unused"))))
    assert alive == [0 if again else BLOCKS]
    assert len(seen) == (2 if again else 1) * BLOCKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_backward", [False, True])
def test_dropout_is_drawn_again_as_it_was(dtype: torch.dtype, in_backward: bool) -> None:
    trained = []
    for again in (False, True):
        model = made(dtype).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        config = FitConfig(
            steps=3, lr=1e-2, in_backward=in_backward, activation_checkpointing=again
        )
        list(fit(model, lambda s: [IDS_BT], loss, config, Context(Path("unused"))))
        trained.append(model.state_dict())
    before = made(dtype).state_dict()
    for name, tensor in trained[0].items():
        assert torch.equal(tensor, trained[1][name]), name
    assert not torch.equal(before["transformer.wte.weight"], trained[0]["transformer.wte.weight"])


def test_blocks_and_configuration_are_as_before_afterwards() -> None:
    model = made()
    own = model.transformer.h[1].forward
    model.transformer.h[1].forward = own
    model.config.use_cache = True
    with recomputed(model):
        assert not model.config.use_cache
        assert all("forward" in block.__dict__ for block in model.transformer.h)
    assert model.config.use_cache
    assert ["forward" in block.__dict__ for block in model.transformer.h] == [False, True, False]
    assert model.transformer.h[1].forward is own


def test_a_cache_and_a_model_without_blocks_are_refused() -> None:
    model = made()
    with recomputed(model):
        loss(model, IDS_BT, use_cache=None)
        with pytest.raises(UserError, match=r"'transformer\.h\.0' is called with a cache"):
            loss(model, IDS_BT, use_cache=True)
    plain = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(UserError, match="were not all found"), recomputed(plain):
        pass
