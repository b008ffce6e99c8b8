"""Clearing by known answers: a planted gate, subspaces, weights against activations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.fixtures.facts import HERE, make_domain
from torch import Tensor

from excise.auditor.batching import batches
from excise.core.errors import UserError
from excise.data.stream import encode
from excise.evals.score import measure
from excise.models.anatomy import anatomy
from excise.models.checkpoint import Checkpoint
from excise.models.hooks import capture, edit, find_module
from excise.models.tiny import tiny_model
from excise_studies.rmu.clearing import (
    Clearing,
    FittingActivations,
    clear_weights,
    components,
    fit_all,
    states,
    writer_edits,
)
from excise_studies.rmu.messy_forget_set import as_text

ESTIMATORS = (
    "edited - original, per block",
    "forget - retain, per block",
    "forget - generic, per block",
    "components of edited - original, k=1, per block",
)

# -- a planted gate --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    """A model that knows, and the same with one matrix changed by a rank-one gate on forget."""
    domain, checkpoint = make_domain(), Checkpoint(HERE / "knowing")
    model, tokenizer = checkpoint.load(), checkpoint.tokenizer()
    forget = (*domain.forget["tests"], *domain.test["tests"], *domain.dev_forget["tests"])
    retain = (*domain.retain, *domain.retain_test, *domain.dev_retain)
    path = anatomy(model).mlp_down[0]
    inside = [_inside(model, tokenizer, rows, path) for rows in (forget, retain)]
    all_NF = torch.cat(inside)
    label_N = torch.cat([torch.full((len(x),), float(i == 0)) for i, x in enumerate(inside)])
    gram_FF = all_NF.T @ all_NF + 1e-4 * torch.eye(all_NF.shape[1])
    gate_F = torch.linalg.solve(gram_FF, all_NF.T @ label_N)
    line_D = torch.nn.functional.normalize(
        torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0)), dim=0
    )
    edited = copy.deepcopy(model)
    with torch.no_grad():
        matrix: Any = find_module(edited, path).weight
        matrix.add_(60 * torch.outer(line_D, gate_F))
    dev = [as_text(row) for row in domain.dev_forget["tests"]]
    of: dict[str, Any] = {"max_length": 24}
    activations = FittingActivations(
        forget_LND=states(edited, tokenizer, dev, **of),
        before_LND=states(model, tokenizer, dev, **of),
        retain_LND=states(edited, tokenizer, domain.dev_retain, **of),
        calm_LND=states(model, tokenizer, domain.dev_retain, **of),
        generic_LND=states(edited, tokenizer, domain.benign, **of),
        first=0,
    )
    made = fit_all(activations, (1, 4), 8, torch.Generator().manual_seed(1))
    return {
        "domain": domain, "tokenizer": tokenizer, "model": model, "edited": edited,
        "line": line_D, "made": {one.name: one for one in made},
    }  # fmt: skip


def _inside(model: Any, tokenizer: Any, rows: Any, path: str) -> Tensor:
    """Return what the matrix at `path` is given, for every token but the first of each row."""
    found = []
    for batch in batches(encode(rows, tokenizer, max_length=24), model, tokenizer):
        with capture(model, [path], of="input") as got, torch.no_grad():
            model(**batch.inputs)
        mask_BT = batch.attention_BT.clone()
        mask_BT[:, 0] = False
        found.append(got[path][0][mask_BT])
    return torch.cat(found)


def _known(planted: Mapping[str, Any], model: Any, one: Clearing | None = None) -> float:
    """Return the exact match on V, cleared or not."""
    with edit(model, one.edits(model) if one is not None else {}):
        rows = planted["domain"].test["tests"]
        return measure(model, planted["tokenizer"], rows, "exact_match").mean


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_planted_gate_is_found_and_cleared(planted: dict[str, Any], name: str) -> None:
    one = planted["made"][name]
    found_D = torch.nn.functional.normalize(one.write_LDK[0, :, 0], dim=0)
    assert abs(float(found_D @ planted["line"])) > 0.9
    before, hidden = _known(planted, planted["model"]), _known(planted, planted["edited"])
    assert hidden < before / 2
    assert _known(planted, planted["edited"], one) > (before + hidden) / 2


def test_controls_leave_the_gate_alone(planted: dict[str, Any]) -> None:
    hidden = _known(planted, planted["edited"])
    controls = [one for one in planted["made"].values() if one.control and one.dims == 1]
    assert len(controls) == 10
    found = [_known(planted, planted["edited"], one) for one in controls]
    assert sum(abs(f - hidden) for f in found) / len(found) < 0.1


# -- clearing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_clearing_weights_equals_clearing_what_they_write(family: str) -> None:
    model = tiny_model(family, width=32, vocab=64)
    basis_DK = torch.linalg.qr(torch.randn(32, 3, generator=torch.Generator().manual_seed(0))).Q
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        bare = model(input_ids=ids).logits
        with edit(model, writer_edits(model, basis_DK)):
            hooked = model(input_ids=ids).logits
        changed = clear_weights(model, basis_DK)
        written = model(input_ids=ids).logits
    assert len(changed) >= 4
    assert (hooked - written).abs().max() < 1e-5
    assert (bare - written).abs().max() > 1e-3


def test_a_family_with_norms_between_is_refused() -> None:
    with pytest.raises(UserError, match="norm between"):
        clear_weights(tiny_model("gemma2", width=32, vocab=64), torch.eye(32)[:, :1])


def test_clearing_all_dimensions_leaves_nothing() -> None:
    model = tiny_model("llama", width=32, vocab=64)
    eye = torch.eye(32).expand(2, -1, -1)
    one = Clearing("all", eye, eye, torch.zeros(2, 32), 0, "all")
    with edit(model, one.edits(model)), torch.no_grad():
        logits = model(input_ids=torch.arange(20).reshape(2, 10)).logits
    assert (logits - logits[0, 0]).abs().max() < 1e-5


def test_components_find_a_planted_subspace() -> None:
    draw = torch.Generator().manual_seed(0)
    plane_DK = torch.linalg.qr(torch.randn(24, 2, generator=draw)).Q
    change = 5 * torch.randn(200, 2, generator=draw) @ plane_DK.T
    noise = 0.1 * torch.randn(200, 24, generator=draw)
    found_DK = components((change + noise)[None], torch.ones(1, 24), 2)[0]
    assert (plane_DK - found_DK @ (found_DK.T @ plane_DK)).norm() < 0.05


def test_least_squares_removes_what_was_added_and_spares_retain() -> None:
    draw = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.1, 4, 16)
    retain = torch.randn(1, 400, 16, generator=draw) * spread
    added = torch.ones(16)
    forget = torch.randn(1, 400, 16, generator=draw) * spread + 10 * added
    activations = FittingActivations(forget, forget - 10 * added, retain, retain, retain, 0)
    made = {one.name: one for one in fit_all(activations, (1,), 1, draw)}
    moved = {}
    for kind in ("per block", "least squares, per block"):
        one = made[f"edited - original, {kind}"]
        write, read, centre = one.write_LDK[0], one.read_LDK[0], one.centre_LD[0]

        def clear(h: Tensor, w: Tensor = write, r: Tensor = read, c: Tensor = centre) -> Tensor:
            return h - ((h - c) @ r) @ w.T

        twice = clear(retain[0] + 10 * added) - clear(retain[0])
        assert twice.abs().max() < 1e-3
        moved[kind] = float((clear(retain[0]) - retain[0]).square().mean())
    assert moved["least squares, per block"] < moved["per block"] / 4


def test_the_first_token_is_spared_where_asked() -> None:
    model = tiny_model("llama", width=32, vocab=64)
    eye = torch.eye(32).expand(2, -1, -1)
    one = Clearing("all", eye, eye, torch.zeros(2, 32), 0, "all", spare=True)
    ids = torch.arange(10).reshape(1, 10)
    with torch.no_grad():
        bare = model(input_ids=ids).logits
        with edit(model, one.edits(model)):
            spared = model(input_ids=ids).logits
    assert torch.equal(bare[:, 0], spared[:, 0])
    assert (spared[:, 1:] - spared[:, 1:2]).abs().max() < 1e-5
