"""Neurons in another order: another place in weights, the same predictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from excise.core.errors import UserError
from excise.models.tiny import FAMILIES, tiny_model
from excise_studies.distillation.init_leak import permute_neurons

DENSE = [family for family in FAMILIES if family != "mixtral"]


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits.double()
    return found


@pytest.mark.parametrize("family", DENSE)
def test_the_function_stays_and_the_weights_do_not(family: str) -> None:
    model: Any = tiny_model(family, seed=0, vocab=40, width=32, blocks=2)
    with torch.no_grad():
        for parameter in model.parameters():  # biases are zero at first
            parameter.add_(0.02 * torch.randn(parameter.shape))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = logits(model)
    moved = permute_neurons(model, torch.Generator().manual_seed(3))
    assert moved > 0
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    for name in changed:
        old, new = before[name].flatten().sort().values, model.get_parameter(name).flatten()
        assert torch.equal(old, new.detach().sort().values), name


def test_experts_are_refused() -> None:
    model = tiny_model("mixtral", seed=0, vocab=40, width=32, blocks=2)
    with pytest.raises(UserError, match="mixes experts"):
        permute_neurons(model, torch.Generator())
