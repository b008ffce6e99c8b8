"""Which weights pruning takes, by hand, and what it leaves alone in odd models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.families import save_family
from torch import Tensor

from excise.auditor.attacks.prune import prune_lowest
from excise.auditor.controls.perturb import small_bounds
from excise.auditor.pruning import (
    input_norms,
    lowest_of_matrix,
    lowest_of_rows,
    set_difference,
)
from excise.auditor.quantization import matrices
from excise.data.domain import Row
from excise.models.hooks import capture
from excise.models.tiny import byte_tokenizer, tiny_model

WEIGHT_RC = torch.tensor([[0.1, -0.9, 0.4, -0.3], [2.0, -1.0, 3.0, -4.0]])
ROWS = [Row(unit="a", text="weights"), Row(unit="b", text="and their inputs")]


def places(mask_RC: Tensor) -> list[list[int]]:
    return mask_RC.int().tolist()


def test_magnitude_of_a_matrix_takes_the_smallest_of_all() -> None:
    assert places(lowest_of_matrix(WEIGHT_RC.abs(), 0.5)) == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert places(lowest_of_matrix(WEIGHT_RC.abs(), 0.4)) == [[1, 0, 1, 1], [0, 0, 0, 0]]


def test_magnitude_by_rows_takes_as_many_of_every_output() -> None:
    assert places(lowest_of_rows(WEIGHT_RC.abs(), 0.5)) == [[1, 0, 0, 1], [1, 1, 0, 0]]
    assert places(lowest_of_rows(WEIGHT_RC.abs(), 0.49)) == [[1, 0, 0, 0], [0, 1, 0, 0]]


def test_equal_weights_are_pruned_to_the_exact_share() -> None:
    assert int(lowest_of_rows(torch.ones(3, 10), 0.3).sum()) == 9
    assert int(lowest_of_matrix(torch.ones(3, 10), 0.3).sum()) == 9


def test_set_difference_spares_what_benign_text_needs() -> None:
    forget_RC = torch.tensor([[9.0, 8.0, 1.0, 2.0], [7.0, 3.0, 4.0, 6.0]])
    utility_RC = torch.tensor([[9.0, 1.0, 8.0, 2.0], [3.0, 4.0, 5.0, 7.0]])
    # Top half of the first: 9, 8, 7, 6. Top quarter of the second: 9, 8. Left: 8, 7, 6.
    assert places(set_difference(forget_RC, utility_RC, q=0.5, p=0.25)) == [
        [0, 1, 0, 0], [1, 0, 0, 1],
    ]  # fmt: skip
    assert not set_difference(forget_RC, forget_RC, 0.5, 0.5).any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_wanda_by_hand(family: str) -> None:
    """|w| times the norm of its input over all tokens, the smallest of every output."""
    model, tokenizer = tiny_model(family, width=32), byte_tokenizer()
    norms = input_norms(model, ROWS, tokenizer, max_length=64)
    path = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}[family]
    square_C = torch.zeros(norms[f"{path}.weight"].shape)
    for row in ROWS:
        ids_BT = torch.tensor([tokenizer(row.text)["input_ids"]])
        with torch.no_grad(), capture(model, [path], of="input") as got:
            model(ids_BT)
        square_C += got[path][0][0].square().sum(0)
    assert torch.allclose(norms[f"{path}.weight"], square_C.sqrt(), rtol=1e-4)

    weight = model.get_parameter(f"{path}.weight").detach().clone()
    score_RC = (weight.t() if family == "gpt2" else weight).abs() * square_C.sqrt()
    facts = prune_lowest(model, share=0.25, by_row=True, norms=norms)
    pruned = model.get_parameter(f"{path}.weight") == 0
    pruned_RC = pruned.t() if family == "gpt2" else pruned
    assert pruned_RC.sum(-1).tolist() == [score_RC.shape[1] // 4] * len(score_RC)
    worst_R = score_RC.masked_fill(~pruned_RC, 0).amax(-1)
    assert (worst_R <= score_RC.masked_fill(pruned_RC, torch.inf).amin(-1)).all()
    assert facts["skipped"] == 0
    assert facts["weights"] == sum(int((p == 0).sum()) for p, _ in matrices(model).values())


def test_a_third_of_every_row_and_nothing_else_is_zero() -> None:
    model = tiny_model("gpt2", width=32)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    facts = prune_lowest(model, share=0.34, by_row=True)
    zeros = 0
    for name, (parameter, flipped) in matrices(model).items():
        value_RC = parameter.t() if flipped else parameter
        assert set((value_RC == 0).sum(-1).tolist()) == {int(value_RC.shape[-1] * 0.34)}
        zeros += int((value_RC == 0).sum())
        assert torch.equal(parameter[parameter != 0], kept[name][parameter != 0])
    assert facts == {"weights": zeros, "skipped": 0}
    for name, before in kept.items():
        if name not in matrices(model):
            assert torch.equal(model.get_parameter(name), before)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("name", ["gpt_oss", "mamba"])
def test_weights_that_no_layer_of_their_own_reads_are_skipped_and_counted(
    name: str, tmp_path: Path
) -> None:
    _, model = save_family(name, tmp_path / "model")
    norms = input_norms(model, ROWS, byte_tokenizer(), max_length=64)
    unread = [p.numel() for n, (p, _) in matrices(model).items() if n not in norms]
    assert unread
    assert prune_lowest(model, share=0.5, by_row=True, norms=norms)["skipped"] == sum(unread)


def test_small_weights_may_move_and_stay_small() -> None:
    model = tiny_model("gpt2", width=32)
    before = {n: p.detach().clone() for n, (p, _) in matrices(model).items()}
    bounds = small_bounds(model, 0.3)
    with torch.no_grad():
        for name, (low, high) in bounds.items():
            assert (low <= before[name]).all()
            assert (before[name] <= high).all()
            assert (low < high).float().mean() > 0.2
            model.get_parameter(name).copy_(low + torch.rand(low.shape) * (high - low))
    prune_lowest(model, share=0.3, by_row=True)
    other = tiny_model("gpt2", width=32)
    prune_lowest(other, share=0.3, by_row=True)
    for name, value in other.named_parameters():
        assert torch.equal(value, model.get_parameter(name))
