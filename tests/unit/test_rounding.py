from __future__ import annotations

from itertools import pairwise
from statistics import NormalDist

import pytest
import torch

from excise.auditor.budget import Format
from excise.auditor.quantization import (
    NF4,
    Grid,
    flip_rate,
    grid_of,
    grouped,
    inside,
    levels,
    quantize_,
    rounded,
)
from excise.auditor.quantization import ungrouped as back
from excise.models.tiny import tiny_model

GRIDS = [Grid(8), Grid(4), Grid(4, 64, 0), Grid(3, 7, 2), Grid(4, 1000, 5)]


@pytest.mark.parametrize("grid", GRIDS)
def test_grouping_is_undone_for_any_width(grid: Grid) -> None:
    weight_RC = torch.randn(5, 100)
    assert torch.equal(back(grouped(weight_RC, grid), weight_RC, grid), weight_RC)


def test_the_first_group_has_the_offset_as_its_length() -> None:
    weight_RC = torch.ones(1, 100)
    weight_RC[0, 15], weight_RC[0, 16] = 7.0, 14.0
    _, scale_RG1 = levels(weight_RC, Grid(4, 64, 16))
    assert scale_RG1.flatten().tolist() == [1.0, 2.0, pytest.approx(1 / 7)]


def test_rounding_by_hand() -> None:
    weight_RC = torch.tensor([[7.0, 3.4, -3.6, 0.4, -7.0, 0.0]])
    assert rounded(weight_RC, Grid(4, 6, 0)).tolist() == [[7.0, 3.0, -4.0, 0.0, -7.0, 0.0]]


@pytest.mark.parametrize("form", ["int4", "int3", "nf4"])
def test_zeros_stay_zeros(form: Format) -> None:
    weight_RC = torch.zeros(3, 10)
    assert not rounded(weight_RC, grid_of(form, 64, 16)).any()
    weight_RC[:, 3] = 2.0
    assert torch.equal(rounded(weight_RC, grid_of(form, 64, 16)), weight_RC)


def test_three_bits_by_hand() -> None:
    weight_RC = torch.tensor([[3.0, 1.4, -1.6, -0.4, 2.6]])
    assert rounded(weight_RC, grid_of("int3", 5, 0)).tolist() == [[3.0, 1.0, -2.0, 0.0, 3.0]]


def test_the_levels_of_nf4_are_quantiles_of_a_normal_distribution() -> None:
    """Eight above 0 and seven below, evenly in probability, scaled to 1 (QLoRA, equation 4)."""
    last = 0.9677083  # of bitsandbytes: the mean of 1 - 1/32 and 1 - 1/30
    top = NormalDist().inv_cdf(last)
    above = [NormalDist().inv_cdf(last - i * (last - 0.5) / 8) / top for i in range(8)]
    below = [-NormalDist().inv_cdf(last - i * (last - 0.5) / 7) / top for i in range(7)]
    assert pytest.approx(sorted((*above, 0.0, *below)), abs=1e-6) == NF4


def test_nf4_by_hand() -> None:
    """Blocks of two inputs behind a first of one: every scale is the largest of its block."""
    weight_RC = torch.tensor([[-3.0, 2.0, 0.1, -4.0, 2.0]])
    grid = grid_of("nf4", 2, 1)
    # 0.1 / 2 = 0.05 lies nearer to 0.0796 than to 0; 2 / 4 = 0.5 nearer to 0.4407 than to 0.5626.
    expected = [-3.0, 2.0, 2 * 0.07958029955625534, -4.0, 4 * 0.44070982933044434]
    assert rounded(weight_RC, grid)[0].tolist() == pytest.approx(expected)
    level_RGS, scale_RG1 = levels(weight_RC, grid)
    assert scale_RG1.flatten().tolist() == [3.0, 2.0, 4.0]
    assert level_RGS.flatten().tolist() == [7, 0, 15, 8, 0, 12]


def test_every_weight_goes_to_the_nearest_level_of_nf4() -> None:
    value_RC = torch.linspace(-1, 1, 401)[None]
    nearest = (value_RC.T - torch.tensor(NF4)).abs().argmin(-1)
    assert torch.equal(rounded(value_RC, grid_of("nf4", 401, 0))[0], torch.tensor(NF4)[nearest])
    assert all(low < high for low, high in pairwise(NF4))


@pytest.mark.parametrize("grid", GRIDS)
def test_any_move_inside_the_bounds_rounds_to_the_same(grid: Grid) -> None:
    weight_RC = torch.randn(9, 130)
    low_RC, high_RC = inside(weight_RC, grid)
    assert (low_RC <= weight_RC).all()
    assert (weight_RC <= high_RC).all()
    assert (high_RC > low_RC).float().mean() > 0.7
    for value_RC in (low_RC, high_RC, low_RC + torch.rand(9, 130) * (high_RC - low_RC)):
        assert torch.equal(rounded(value_RC, grid), rounded(weight_RC, grid))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_matrices_are_rounded_and_embeddings_are_not(family: str) -> None:
    model = tiny_model(family, width=32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    count = quantize_(model, Grid(4))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert count >= sum(before[name].numel() for name in moved)
    for name in moved:
        assert before[name].dim() >= 2
        assert "embed" not in name
        assert "wte" not in name
        assert "head" not in name


def test_inputs_share_a_scale_in_gpt2_as_elsewhere() -> None:
    model = tiny_model("gpt2", width=32)
    weight = model.transformer.h[0].mlp.c_proj.weight  # stored as (inputs, outputs)
    expected = rounded(weight.detach().t(), Grid(4)).t()
    quantize_(model, Grid(4))
    assert torch.equal(weight, expected)


def test_flip_rate_counts_levels() -> None:
    one, two = tiny_model("llama", width=32), tiny_model("llama", width=32)
    assert flip_rate(one, two.get_parameter, Grid(4)) == 0.0
    with torch.no_grad():
        two.model.layers[0].mlp.down_proj.weight.neg_()
    share = flip_rate(one, two.get_parameter, Grid(8))
    part = two.model.layers[0].mlp.down_proj.weight.numel()
    total = quantize_(two, Grid(8))
    assert 0.9 * part / total < share <= part / total
