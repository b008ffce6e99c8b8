"""Weight-space methods against numbers that released code gave; see `record_weight_space.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from excise.data.stream import Batch
from excise.methods import Direction
from excise.methods.posthoc.checkpoint_transfer import MapSums
from excise.methods.posthoc.direction import cleared
from excise.methods.posthoc.task_vector import negate
from excise.models.anatomy import anatomy
from excise.models.checkpoint import save_model
from excise.models.tiny import byte_tokenizer
from tests.golden import weight_space_inputs as given

HERE = Path(__file__).parent
FACTS = json.loads((HERE / "weight_space_reference.json").read_text(encoding="utf-8"))
REFERENCE = load_file(HERE / "weight_space_reference.safetensors")


def batch(role: int) -> Batch:
    """Return the rows of a role, the last token of each scored."""
    ids_BT = torch.tensor(given.rows(role))
    target_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    target_BT[:, -1] = True
    everything_BT = torch.ones_like(target_BT)
    return Batch(ids_BT, everything_BT, target_BT, torch.zeros_like(ids_BT), ("",) * len(ids_BT))


def assert_near(ours: Tensor, name: str, atol: float = 2e-6) -> None:
    wanted = REFERENCE[name]
    torch.testing.assert_close(ours.to(wanted.dtype), wanted, rtol=0, atol=atol)


def test_the_recorded_code_is_named() -> None:
    assert [len(files) for files in FACTS["sha256"].values()] == [1, 2, 1]


def test_a_direction_and_what_is_left_of_matrices() -> None:
    model = given.model(0)
    parts, method = anatomy(model), Direction()
    means = [method.means(model, parts, [batch(role)], "forget") for role in (0, 1)]
    difference = (means[0] - means[1])[given.LAYER]
    assert_near(difference, "direction.difference")
    r = (difference / difference.norm()).float()
    block = model.model.layers[0]
    assert_near(cleared(model.model.embed_tokens.weight.data, r, 1), "direction.embed")
    assert_near(cleared(block.self_attn.o_proj.weight.data, r, 0), "direction.o_proj")
    assert_near(cleared(block.mlp.down_proj.weight.data, r, 0), "direction.down_proj")
    wrong = cleared(block.self_attn.o_proj.weight.data, r, 1)
    assert (wrong - REFERENCE["direction.o_proj"]).abs().max() > 1e-3


@torch.no_grad()
def test_an_affine_map() -> None:
    held: list[Any] = [
        given.model(number)(torch.tensor(given.rows(1)), output_hidden_states=True)
        .hidden_states[given.LAYER + 1]
        .flatten(0, 1)
        for number in (1, 0)
    ]
    sums = MapSums.of(*held)
    for t_NE, h_ND in zip(*(part.split(36) for part in held), strict=True):
        sums.add(t_NE, h_ND)
    found = sums.solve(given.RIDGE)
    assert_near(found.a_ED.T, "affine.weight", atol=1e-5)
    assert_near(found.b_D, "affine.bias", atol=1e-5)
    other = sums.solve(100 * given.RIDGE)
    assert (other.a_ED.T - REFERENCE["affine.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("name", given.COMPARED)
def test_a_task_vector(name: str, tmp_path: Path) -> None:
    start = save_model(given.model(0), byte_tokenizer(), tmp_path / "start")
    tuned = given.model(1)
    negate(dict(tuned.named_parameters()), start, given.SCALE)
    assert_near(tuned.get_parameter(name).detach(), f"task_vector.{name}", atol=1e-6)
