"""MoE-fication by turns: neurons found, moved and routed, against versions written by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.data.labels import LabelNoise
from excise.data.stream import collate, encode
from excise.methods import ERA, RMU, AblatedPlain, Chain, Moefy, Plain
from excise.methods.base import Removal
from excise.methods.pretraining.moefy import phase
from excise.methods.pretraining.moefy.neurons import (
    attribution,
    captured,
    choose,
    contrast,
    gather_units,
)
from excise.methods.pretraining.pretrain import Pretrain, corpus
from excise.methods.pretraining.routed.modules import Module, serve
from excise.methods.tuning import stream
from excise.models.checkpoint import Checkpoint
from excise.models.tiny import tiny_model
from excise.routing import Part
from excise.testing import toy_start
from excise.train.fit import FitConfig
from excise.train.optim import schedule_share
from tests.parity.test_pretraining import same
from tests.parity.toy import context, sentences, toy_checkpoint, toy_domain, weights

FIT = FitConfig(steps=4, lr=1e-3, batch_size=8, eps=1e-6)
SCHEDULE = Pretrain(fit=FIT, max_length=16)
CPU = torch.device("cpu")


def batch_of(start: Checkpoint, rows: Any) -> Any:
    tokenizer = start.tokenizer()
    return collate(encode(rows, tokenizer, max_length=16), pad_id=tokenizer.pad_token_id)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "mixtral"])
def test_gathered_units_leave_the_function_as_it_was(family: str) -> None:
    model = tiny_model(family, seed=1, vocab=40, width=32, blocks=2).eval()
    ids = torch.arange(24).view(2, 12)
    before = model(ids).logits
    other = {n: p.clone() for n, p in model.named_parameters()}
    picks = [[3], [0]] if family == "mixtral" else [[5, 2], [40, 7]]
    parts = gather_units(model, 1, picks)
    assert torch.allclose(model(ids).logits, before, atol=1e-6)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, other[n])}
    assert moved
    assert all(".1." in name for name in moved)
    spans = [part.units for part in parts]
    assert all(a is not None and b is not None and a[1] == b[0] for a, b in pairwise(spans))
    if family == "llama":
        down = model.get_parameter("model.layers.1.mlp.down_proj.weight")
        old = other["model.layers.1.mlp.down_proj.weight"]
        assert torch.equal(down[:, -4:], old[:, [5, 2, 40, 7]])
        assert torch.equal(down[:, :4], old[:, [0, 1, 3, 4]])


def by_hand(model: Any, batch: Any, block: int) -> torch.Tensor:
    """Attribution of a llama's neurons, one row at a time."""
    total = torch.zeros(model.config.intermediate_size)
    layer = model.model.layers[block].mlp.down_proj
    for i in range(len(batch.ids_BT)):
        real = batch.attention_BT[i]
        held: list[torch.Tensor] = []
        hook = layer.register_forward_pre_hook(lambda m, a, held=held: held.append(a[0]))
        logits = model(batch.ids_BT[i : i + 1, real]).logits[0, :-1]
        hook.remove()
        target = batch.target_BT[i, real][1:]
        loss = F.cross_entropy(logits[target], batch.ids_BT[i, real][1:][target], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, held)
        total += (held[0] * gradient).abs().sum((0, 1)).detach()
    return total / float(batch.target_BT.sum())


def test_attribution_equals_a_loop_over_rows(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    model = start.load()
    core, forget = batch_of(start, domain.retain), batch_of(start, domain.forget["a"])
    halves = (batch_of(start, domain.retain[:7]), batch_of(start, domain.retain[7:]))
    flags = [p.requires_grad for p in model.parameters()]
    scores = attribution(model, [halves, [forget]], [0, 2], CPU)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    for block in (0, 2):
        expected = torch.stack([by_hand(model, core, block), by_hand(model, forget, block)])
        assert torch.allclose(scores[block], expected, rtol=1e-4, atol=1e-9)


def test_attribution_finds_the_neuron_that_carries_a_domain() -> None:
    """A neuron whose removal matters to one domain alone is chosen for it."""
    share = torch.tensor([[4.0, 4.0, 1.0, 1.0], [1.0, 1.0, 6.0, 2.0], [1.0, 5.0, 2.0, 2.0]])
    assert choose(contrast(share, "difference"), 1) == [[2], [1]]
    rare = torch.tensor([[50.0, 50.0, 0.01, 0.0], [60.0, 30.0, 0.3, 9.7]])
    assert choose(contrast(rare, "ratio"), 1) == [[3]]
    assert choose(contrast(rare, "difference"), 2) == [[0, 3]]


def test_choosing_keeps_what_is_owned_and_never_gives_twice() -> None:
    score = torch.tensor([[9.0, 8.0, 7.0, 1.0, 0.0], [9.5, 2.0, 8.5, 0.0, 3.0]])
    assert choose(score, 1) == [[1], [0]]
    assert choose(score, 2) == [[1, 3], [0, 2]]
    assert choose(score, 2, [[3], [4]]) == [[3, 1], [4, 0]]
    with pytest.raises(UserError, match="lower 'neurons'"):
        choose(score, 3)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_phases_follow_the_common_schedule(schedule: Any) -> None:
    whole = FitConfig(steps=60, lr=2.0, warmup=6, schedule=schedule, min_lr=0.1)
    rates: list[float] = []
    for begin, end in ((0, 15), (15, 30), (30, 45), (45, 60)):
        part = phase(whole, begin, end).model_copy(update={} if begin == 0 else {"warmup": 0})
        rates += [part.rate_at(step) for step in range(part.steps)]
    expected = [
        2 * schedule_share(s, 60, warmup=6, schedule=schedule, min_lr=0.1) for s in range(60)
    ]
    worst = max(abs(a - b) for a, b in zip(rates, expected, strict=True))
    assert worst < (0.08 if schedule == "cosine" else 1e-9)
    assert phase(whole, 15, 30).warmup == 1
    assert phase(whole, 0, 3).rate_at(2) == pytest.approx(1.0)


def loop(tmp_path: Path, model: Any, start: Checkpoint, domain: Domain, name: str) -> None:
    """Plain training of one phase, by hand."""
    ctx = context(tmp_path / "ours")
    inner = ctx.child("hand", seed=ctx.seed_for(f"moefy.{name}"))
    read = stream(corpus(domain), start.tokenizer(), FIT, inner, purpose="pretrain", max_length=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=FIT.lr, eps=1e-6, weight_decay=0.0)
    for step in range(FIT.steps // 2):
        batch = read(step)[0]
        keep = batch.target_BT[:, 1:]
        logits = model(batch.ids_BT, attention_mask=batch.attention_BT.long()).logits[:, :-1]
        optimizer.zero_grad()
        F.cross_entropy(logits[keep], batch.ids_BT[:, 1:][keep]).backward()
        optimizer.step()


def test_the_dense_control_is_plain_training_with_the_neurons_removed(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    method = Moefy(pretrain=SCHEDULE, rounds=1, dense_share=0.5, neurons=0.2, control="dense",
                   blocks=(0, -1))  # fmt: skip
    made = method.apply(start, domain, context(tmp_path / "ours"))
    model = start.load()
    loop(tmp_path, model, start, domain, "round-1-dense")
    core, forget = batch_of(start, domain.retain), batch_of(start, domain.forget["a"])
    chosen = {}
    for block in (0, 2):
        both = torch.stack([by_hand(model, core, block), by_hand(model, forget, block)])
        share = both / both.sum(1, keepdim=True)
        count = round(0.2 * both.shape[1])
        chosen[block] = (share[1] - share[0]).argsort(descending=True)[:count]
    loop(tmp_path, model, start, domain, "round-1-routed")
    batch = batch_of(start, domain.retain_test)
    full = model(**batch.inputs).logits
    for block, units in chosen.items():
        model.model.layers[block].mlp.down_proj.weight.data[:, units] = 0
    ours = made.checkpoint.load()(**batch.inputs).logits
    assert torch.allclose(ours, model(**batch.inputs).logits, atol=1e-4)
    assert not torch.allclose(ours, full, atol=1e-3)
    again = serve(start, tmp_path / "ours" / made.extras["files"]["before_ablation"], ["a"])
    assert torch.allclose(again(**batch.inputs).logits, full, atol=1e-4)


def test_routed_rows_write_their_module_alone(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    domain = replace(toy_domain(), retain=(), forget={"a": sentences("f", 12, capability="a")})
    method = Moefy(pretrain=SCHEDULE, rounds=1, dense_share=0.0, joint=(), neurons=0.1)
    made = method.apply(start, domain, context(tmp_path / "ours"))
    before, after = weights(start), weights(made.checkpoint)
    count = round(0.1 * before["model.layers.0.mlp.down_proj.weight"].shape[1])
    for name, old in before.items():
        if "mlp" not in name:
            assert torch.equal(old, after[name]), name
            continue
        rows = old.T if "down_proj" in name else old
        now = after[name].T if "down_proj" in name else after[name]
        assert not now[-count:].any()
        kept = {tuple(row.tolist()) for row in rows}
        assert all(tuple(row.tolist()) in kept for row in now[:-count])


def test_the_record_keeps_every_round(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    two = replace(domain, forget={"a": domain.forget["a"][:6], "b": tuple(
        replace(row, capability="b", label=2) for row in domain.forget["a"][6:])})  # fmt: skip
    method = Moefy(pretrain=SCHEDULE, rounds=2, dense_share=0.5, neurons=0.2, read_rows=8)
    made = method.apply(start, two, context(tmp_path / "ours"))
    first, last = made.extras["rounds"]
    assert first["steps"] == {"begin": 0, "routed_from": 1, "end": 2}
    assert last["steps"] == {"begin": 2, "routed_from": 3, "end": 4}
    assert [2 * n for n in first["units"]["0"]] == last["units"]["0"]
    size = start.num_parameters
    for row in (first, last):
        per_unit = 3 * 32 * 3 * row["units"]["0"][0]
        assert row["active"] == {"core": size - 2 * per_unit, "a": size - per_unit,
                                 "b": size - per_unit}  # fmt: skip
        assert (
            row["separation"] == row["losses"]["off"]["labelled"] - row["losses"]["on"]["labelled"]
        )
        assert 0 < row["captured"]["a"]["own"] < 1
    assert made.extras["losses"]["after"] == pytest.approx(last["losses"]["off"])
    assert made.cost.steps == 4
    assert {r["step"] for r in made.history} >= {0.0, 3.0}
    kept = method.model_copy(update={"keep": False, "grow": False, "control": "random"})
    other = kept.apply(start, two, context(tmp_path / "other"))
    assert other.extras["rounds"][0]["units"] == other.extras["rounds"][1]["units"]
    assert other.checkpoint.fingerprint != made.checkpoint.fingerprint


def test_captured_counts_the_modules_columns() -> None:
    scores = {0: torch.tensor([[4.0, 3.0, 1.0], [1.0, 1.0, 2.0]])}
    parts = {0: [Part(at="mlp", blocks=(0,), units=(2, 3))]}
    assert captured(scores, parts) == [{"own": 0.5, "core": 0.125}]


def test_moefy_refuses_what_the_model_lacks(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    with pytest.raises(UserError, match="names 5; the model has 3"):
        Moefy(pretrain=SCHEDULE, blocks=(5,)).apply(start, domain, context(tmp_path / "a"))
    with pytest.raises(UserError, match="leave the core none"):
        Moefy(pretrain=SCHEDULE, neurons=0.999, rounds=1).apply(
            start, domain, context(tmp_path / "b")
        )


def test_ablated_plain_is_plain_training_of_a_wider_model(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    method = AblatedPlain(pretrain=SCHEDULE, module=Module(width=0.25, grow=True))
    made = method.apply(start, domain, context(tmp_path / "ours"))
    assert made.checkpoint.entries.keys() == start.entries.keys()
    file = tmp_path / "ours" / made.extras["files"]["before_ablation"]
    full: Any = serve(start, file, ["a"])
    batch = batch_of(start, domain.retain_test)
    cut: Any = serve(start, file)
    assert torch.equal(cut(**batch.inputs).logits, made.checkpoint.load()(**batch.inputs).logits)
    assert not torch.allclose(cut(**batch.inputs).logits, full(**batch.inputs).logits, atol=1e-4)
    width = start.load().config.intermediate_size
    grown = round(0.25 * width)
    assert full.config.intermediate_size == width + grown
    none = LabelNoise(missed_units=1.0)
    other = method.model_copy(update={"labels": none})
    blind = other.apply(start, domain, context(tmp_path / "blind"))
    assert blind.checkpoint.fingerprint == made.checkpoint.fingerprint
    with pytest.raises(ValueError, match="grown modules are deleted"):
        AblatedPlain(ablate="zero")


def test_ablated_plain_without_growth_loses_neurons_of_plain_training(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    method = AblatedPlain(pretrain=SCHEDULE, module=Module(width=0.25), ablate="zero")
    made = weights(method.apply(start, domain, context(tmp_path / "ours")).checkpoint)
    plain = weights(
        Plain(pretrain=SCHEDULE).apply(start, domain, context(tmp_path / "p")).checkpoint
    )
    count = round(0.25 * start.load().config.intermediate_size)
    for name in plain:
        if ".mlp." in name:
            piece = plain[name][:, -count:] if "down" in name else plain[name][-count:]
            piece.zero_()
    assert same(made, plain, 5e-6)


def test_era_then_rmu_is_a_chain(tmp_path: Path) -> None:
    start, domain = toy_start(tmp_path / "start"), toy_domain()
    era = ERA(pretrain=SCHEDULE)
    rmu = RMU(layer=2, fit=FitConfig(steps=2, lr=1e-3, batch_size=8))
    chain = Chain(methods=(era, rmu)).apply(start, domain, context(tmp_path / "chain"))
    one: Removal = era.apply(start, domain, context(tmp_path / "one"))
    two = rmu.apply(one.checkpoint, domain, context(tmp_path / "two"))
    assert chain.checkpoint.fingerprint == two.checkpoint.fingerprint
    links = chain.extras["links"]
    assert links[0]["extras"]["files"]["before_ablation"]
    assert (tmp_path / "chain/0" / links[0]["extras"]["files"]["before_ablation"]).exists()
    assert chain.cost.steps == one.cost.steps + two.cost.steps
