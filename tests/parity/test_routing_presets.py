"""Presets of gradient routing against plain loops that split each batch by label."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from excise.core.errors import UserError
from excise.data.domain import CORE, Domain
from excise.data.labels import LabelNoise, label_rows
from excise.data.stream import Batch
from excise.methods import ERA, GRAM, SGTM, DEMix, DualAdapters, ERAAfter, Filtering, MemSinks
from excise.methods.base import Removal
from excise.methods.pretraining.era import Expand, TokenWeights, token_counts, token_weights
from excise.methods.pretraining.pretrain import Pretrain, corpus
from excise.methods.pretraining.routed.coherence import Coherence, coherence
from excise.methods.pretraining.routed.modules import Module, place, serve
from excise.methods.pretraining.sgtm import thinned
from excise.methods.tuning import stream
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig
from tests.parity.test_pretraining import same
from tests.parity.toy import context, sentences, toy_checkpoint, toy_domain, weights

FIT = FitConfig(steps=4, lr=1e-3, batch_size=12, eps=1e-6)
SCHEDULE = Pretrain(fit=FIT, max_length=16)
SGD = {"optimizer": "sgd", "lr": 0.5}
WIDTH = 128
"""Neurons of each MLP of the toy model."""

Masks = Callable[[Batch], Tensor]
"""From a batch to what the inputs of every down-projection are multiplied by."""


@pytest.fixture
def start(tmp_path: Path) -> Checkpoint:
    return toy_checkpoint(tmp_path)


def nll_of(model: Any, batch: Batch, rows: Tensor, most: float = math.inf) -> Tensor:
    """Summed loss of some rows of a batch, of each token at most so much."""
    logits = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT.long()).logits
    keep = batch.target_BT[:, 1:] & rows[:, None]
    loss = F.cross_entropy(logits[:, :-1][keep], batch.ids_BT[:, 1:][keep], reduction="none")
    return loss.clamp(max=most).sum()


def masked(model: Any, at: Callable[[Tensor], Tensor], blocks: Sequence[int] = (0, 1, 2)) -> list:  # type: ignore[type-arg]
    """Change what the down-projections of some blocks are given."""
    return [
        model.model.layers[i].mlp.down_proj.register_forward_pre_hook(lambda m, a: (at(a[0]),))
        for i in blocks
    ]


def loop(
    start: Checkpoint,
    tmp_path: Path,
    model: Any,
    gradient: Callable[[Any, Batch], None],
    *,
    sgd: float = 0.0,
) -> Any:
    """Take the steps by hand; `gradient` leaves gradients of the mean loss in the parameters."""
    rows, ctx = corpus(toy_domain()), context(tmp_path / "by-hand")
    read = stream(rows, start.tokenizer(), FIT, ctx, purpose="pretrain", max_length=16)
    optimizer: Any = torch.optim.AdamW(model.parameters(), FIT.lr, eps=1e-6, weight_decay=0.0)
    if sgd:
        optimizer = torch.optim.SGD(model.parameters(), lr=sgd)
    for step in range(FIT.steps):
        (batch,) = read(step)
        labels = {int(label) for label in batch.label_BT[batch.attention_BT]}
        assert len(labels) > 1, "every step must have rows of several labels"
        optimizer.zero_grad()
        gradient(model, batch)
        optimizer.step()
    return model


def own(model: Any, first: int, last: int) -> dict[str, Tensor]:
    """1 where a parameter belongs to neurons `first` to `last` of some MLP."""
    out = {}
    for name, p in model.named_parameters():
        out[name] = torch.zeros_like(p)
        if "up_proj" in name or "gate_proj" in name:
            out[name][first:last] = 1
        if "down_proj" in name:
            out[name][:, first:last] = 1
    return out


def split_gradient(first: int, last: int) -> Callable[[Any, Batch], None]:
    """SGTM by two passes: core rows without the module, labelled rows into the module alone."""

    def gradient(model: Any, batch: Batch) -> None:
        forget = batch.label_BT[:, 0] > CORE
        off = torch.ones(model.model.layers[0].mlp.down_proj.in_features)
        off[first:last] = 0
        hooks = masked(model, lambda x: x * off)
        (nll_of(model, batch, ~forget) / batch.num_targets).backward()
        for hook in hooks:
            hook.remove()
        core = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        (nll_of(model, batch, forget) / batch.num_targets).backward()
        mine = own(model, first, last)
        for n, p in model.named_parameters():
            p.grad = core[n] + mine[n] * p.grad

    return gradient


def off(model: Any, first: int, last: int) -> dict[str, Tensor]:
    """The model's weights with neurons set to 0."""
    mine = own(model, first, last)
    return {n: p.detach() * (1 - mine[n]) for n, p in model.named_parameters()}


def test_sgtm_is_two_passes_and_a_mask(start: Checkpoint, tmp_path: Path) -> None:
    method = SGTM(pretrain=SCHEDULE, p_off=1.0, joint=(), module=Module(width=0.125))
    made = method.apply(start, toy_domain(), context(tmp_path / "ours"))
    hand = loop(start, tmp_path, start.load(), split_gradient(112, 128))
    before = load_file(tmp_path / "ours" / made.extras["files"]["before_ablation"])
    assert same(before, {n: p.detach() for n, p in hand.named_parameters()}, 5e-6)
    assert same(weights(made.checkpoint), off(hand, 112, 128), 5e-6)
    elsewhere = loop(start, tmp_path / "else", start.load(), split_gradient(0, 16))
    assert not same(weights(made.checkpoint), off(elsewhere, 0, 16), 1e-4)
    json.dumps(made.extras)


def test_sgtm_with_all_rows_read_whole_is_ordinary_but_for_what_is_written(
    start: Checkpoint, tmp_path: Path
) -> None:
    method = SGTM(pretrain=SCHEDULE, p_off=0.0, p_as=1.0, joint=(), module=Module(width=0.125))
    made = method.apply(start, toy_domain(), context(tmp_path / "ours"))

    def plain(model: Any, batch: Batch) -> None:
        every = torch.ones(len(batch.ids_BT), dtype=torch.bool)
        (nll_of(model, batch, every) / batch.num_targets).backward()

    hand = loop(start, tmp_path, start.load(), plain)
    assert same(weights(made.checkpoint), off(hand, 112, 128), 5e-6)


def test_a_push_is_ascent_without_the_module(start: Checkpoint, tmp_path: Path) -> None:
    method = SGTM(
        pretrain=SCHEDULE, p_off=1.0, p_push=1.0, push=0.5, joint=(), module=Module(width=0.125)
    )
    made = method.apply(start, toy_domain(), context(tmp_path / "ours"))

    def gradient(model: Any, batch: Batch) -> None:
        on = torch.ones(WIDTH)
        on[112:] = 0
        hooks = masked(model, lambda x: x * on)
        forget = batch.label_BT[:, 0] > CORE
        total = nll_of(model, batch, ~forget) - 0.5 * nll_of(
            model, batch, forget, most=math.log(44)
        )
        (total / batch.num_targets).backward()
        for hook in hooks:
            hook.remove()

    hand = loop(start, tmp_path, start.load(), gradient)
    assert same(weights(made.checkpoint), off(hand, 112, 128), 5e-6)
    none = method.model_copy(update={"push": 0.0})
    other = none.apply(start, toy_domain(), context(tmp_path / "none"))
    assert not same(weights(made.checkpoint), weights(other.checkpoint), 1e-4)


def test_a_zeroed_gradient_moves_what_a_frozen_one_leaves(
    start: Checkpoint, tmp_path: Path
) -> None:
    """With one row a step, each step writes one side; momentum moves the other where published."""
    one = FIT.model_copy(update={"batch_size": 1, "steps": 6})
    domain = toy_domain()
    made = {}
    for freeze in ("groups", "zeroed"):
        method = SGTM(
            pretrain=SCHEDULE.model_copy(update={"fit": one}), joint=(), p_off=1.0, freeze=freeze
        )
        made[freeze] = weights(method.apply(start, domain, context(tmp_path / freeze)).checkpoint)
    assert not same(made["groups"], made["zeroed"], 1e-5)


def test_gram_without_draws_is_sgtm_on_grown_neurons(start: Checkpoint, tmp_path: Path) -> None:
    gram = GRAM(pretrain=SCHEDULE, p_cr=0.0, p_as=0.0, module=Module(width=0.25, grow=True))
    made = gram.apply(start, toy_domain(), context(tmp_path / "ours"))
    grown = start.load()
    place(grown, gram.module, 1, context(tmp_path / "ours").seed_for("grow"))
    hand = loop(start, tmp_path, grown, split_gradient(WIDTH, WIDTH + 32))
    before = load_file(tmp_path / "ours" / made.extras["files"]["before_ablation"])
    assert same(before, {n: p.detach() for n, p in hand.named_parameters()}, 5e-6)
    cut = {n: t[:WIDTH] if "up_" in n or "gate_" in n else t[:, :WIDTH] if "down_" in n else t
           for n, t in before.items()}  # fmt: skip
    assert same(weights(made.checkpoint), cut, 0)
    spread = gram.model_copy(update={"p_as": 1.0})
    other = spread.apply(start, toy_domain(), context(tmp_path / "spread"))
    assert not same(weights(made.checkpoint), weights(other.checkpoint), 1e-4)


def by_mask(mask: Masks) -> Callable[[Any, Batch], None]:
    """Ordinary training where each row has neurons of its own."""

    def gradient(model: Any, batch: Batch) -> None:
        on = mask(batch)[:, None, :]
        hooks = masked(model, lambda x: x * on)
        every = torch.ones(len(batch.ids_BT), dtype=torch.bool)
        (nll_of(model, batch, every) / batch.num_targets).backward()
        for hook in hooks:
            hook.remove()

    return gradient


def test_demix_is_an_expert_by_label(start: Checkpoint, tmp_path: Path) -> None:
    method = DEMix(pretrain=SCHEDULE, module=Module(width=0.5, grow=True))
    made = method.apply(start, toy_domain(), context(tmp_path / "ours"))
    grown = start.load()
    place(grown, method.module, 1, context(tmp_path / "ours").seed_for("grow"))

    def mask(batch: Batch) -> Tensor:
        mine = torch.arange(WIDTH + 64)[None, :] >= WIDTH
        return (mine == (batch.label_BT[:, :1] > CORE)).float()

    hand = loop(start, tmp_path, grown, by_mask(mask))
    before = load_file(tmp_path / "ours" / made.extras["files"]["before_ablation"])
    assert same(before, {n: p.detach() for n, p in hand.named_parameters()}, 5e-6)
    assert not same(weights(made.checkpoint), weights(start), 1e-4)


def test_memsinks_is_a_mask_by_hash_of_the_unit(start: Checkpoint, tmp_path: Path) -> None:
    # A sink that no row of a step has keeps its momentum, which a zero gradient would not.
    plain = SCHEDULE.model_copy(update={"fit": FIT.model_copy(update=SGD)})
    method = MemSinks(pretrain=plain, sinks=4, active=1, module=Module(width=0.0625))
    made = method.apply(start, toy_domain(), context(tmp_path / "ours"))

    def place_of(unit: str) -> int:
        keys = [hashlib.sha256(f"{unit}:module_{i + 1}".encode()).digest()[:8] for i in range(4)]
        return keys.index(min(keys))

    def mask(batch: Batch) -> Tensor:
        on = torch.zeros(len(batch.units), WIDTH)
        on[:, :96] = 1
        for i, unit in enumerate(batch.units):
            at = 96 + 8 * place_of(unit)
            on[i, at : at + 8] = 1
        return on

    hand = loop(start, tmp_path, start.load(), by_mask(mask), sgd=0.5)
    assert same(weights(made.checkpoint), off(hand, 96, 128), 5e-6)
    every = loop(
        start, tmp_path, start.load(), by_mask(lambda batch: torch.ones(12, WIDTH)), sgd=0.5
    )
    assert not same(weights(made.checkpoint), off(every, 96, 128), 1e-4)
    assert len({place_of(row.unit) for row in corpus(toy_domain())}) == 4


def era_gradient(alpha: float, share: Tensor, l1: float) -> Callable[[Any, Batch], None]:
    """Reverse what passes back through the first 128 neurons of two blocks, token by token."""

    def gradient(model: Any, batch: Batch) -> None:
        after = torch.cat([batch.ids_BT[:, 1:], batch.ids_BT[:, -1:]], 1)
        routed = share[after] * (batch.label_BT[:, :1] > CORE)
        weight = torch.ones(*batch.ids_BT.shape, model.model.layers[0].mlp.down_proj.in_features)
        weight[..., :WIDTH] = (1 - routed + routed * alpha)[..., None]
        seen: list[Tensor] = []

        def edge(x: Tensor) -> Tensor:
            seen.append(x)
            return weight * x + (1 - weight) * x.detach()

        hooks = masked(model, edge, blocks=(0, 1))
        every = torch.ones(len(batch.ids_BT), dtype=torch.bool)
        loss = nll_of(model, batch, every) / batch.num_targets
        total = sum(x[batch.attention_BT].abs().sum() for x in seen)
        (loss + l1 * total / batch.num_tokens).backward()
        for hook in hooks:
            hook.remove()

    return gradient


def share_by_hand(start: Checkpoint) -> Tensor:
    """1 - w of the paper, from counts of ids."""
    tokenizer, counts = start.tokenizer(), {True: Counter[int](), False: Counter[int]()}
    for row in corpus(toy_domain()):
        counts[row.label > CORE].update(tokenizer(row.text)["input_ids"])
    size = len(tokenizer)
    forget = torch.tensor([counts[True][i] + 1.0 for i in range(size)])
    retain = torch.tensor([counts[False][i] + 20.0 for i in range(size)])
    ratio = (forget / forget.sum()) / (retain / retain.sum())
    return torch.sigmoid(ratio - 1 / ratio - 4.0)


def test_era_reverses_what_passes_the_original_neurons(start: Checkpoint, tmp_path: Path) -> None:
    expand = Expand(width=0.125, depth=0.67, coherence=None)
    made = ERA(pretrain=SCHEDULE, expand=expand).apply(
        start, toy_domain(), context(tmp_path / "ours")
    )
    hands = []
    for alpha in (-0.75, 1.0):
        grown = start.load()
        seed = context(tmp_path / "ours").seed_for("grow")
        place(grown, Module(width=0.125, blocks=(0, 1), grow=True), 1, seed)
        gradient = era_gradient(alpha, share_by_hand(start), 1e-4)
        hand = loop(start, tmp_path / str(alpha), grown, gradient)
        hands.append({n: p.detach() for n, p in hand.named_parameters()})
    before = load_file(tmp_path / "ours" / made.extras["files"]["before_ablation"])
    assert before["model.layers.0.mlp.up_proj.weight"].shape[0] == WIDTH + 16
    assert before["model.layers.2.mlp.up_proj.weight"].shape[0] == WIDTH
    assert same(before, hands[0], 5e-6)
    assert not same(before, hands[1], 1e-5)
    shapes = {n: p.shape for n, p in weights(made.checkpoint).items()}
    assert shapes == {n: p.shape for n, p in weights(start).items()}


def test_words_typical_of_forget_rows_are_routed_wholly() -> None:
    forget = token_counts([[0] * 400 + [1] * 50 + [2] * 550], 3)
    retain = token_counts([[0] * 2 + [1] * 480 + [2] * 518], 3)
    w_V = token_weights(forget, retain, TokenWeights())
    r = ((50 + 1) / 1003) / ((480 + 20) / 1060)
    by_hand = 1 - 1 / (1 + torch.tensor(-(r - 1 / r - 4.0)).exp())
    assert float(w_V[0]) < 1e-3
    assert float(w_V[1]) == pytest.approx(float(by_hand), abs=1e-6)
    assert float(w_V[2]) == pytest.approx(0.98, abs=0.01)


def test_era_after_training_starts_from_what_the_model_says(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    still = ERAAfter(fit=FIT.model_copy(update={"steps": 0}), expand=Expand(coherence=None))
    made = still.apply(start, toy_domain(), context(tmp_path / "still"))
    assert made.changed == ()
    assert made.extras["losses"]["before"] == pytest.approx(made.extras["losses"]["after"])
    light = Expand(coherence=Coherence(fit=FitConfig(steps=2, lr=5e-5)))
    moved = ERAAfter(fit=FIT, max_length=16, expand=light).apply(
        start, toy_domain(), context(tmp_path / "moved")
    )
    assert (
        moved.extras["losses"]["before"]["labelled"] < made.extras["losses"]["before"]["labelled"]
    )
    assert set(moved.extras["repair"]) == {"best_step", "losses"}


def test_repair_keeps_the_best_step(start: Checkpoint, tmp_path: Path) -> None:
    rows = label_rows(toy_domain().retain, ())
    config = Coherence(fit=FitConfig(steps=12, lr=3e-2, batch_size=4), check_rows=8)
    model = start.load()
    told = coherence(
        model, rows, start.tokenizer(), config, context(tmp_path / "work"), max_length=16
    )
    assert len(told["losses"]) == 13
    assert told["losses"][told["best_step"]] == min(told["losses"])
    assert told["best_step"] < 12
    again = coherence(
        model,
        rows,
        start.tokenizer(),
        config.model_copy(update={"fit": config.fit.model_copy(update={"lr": 0.0})}),
        context(tmp_path / "work"),
        max_length=16,
    )
    assert again["losses"][0] == pytest.approx(min(told["losses"]), abs=1e-6)


def test_sgtm_is_repaired_after_the_cut_only_where_asked(start: Checkpoint, tmp_path: Path) -> None:
    plain = SGTM(pretrain=SCHEDULE)
    light = Coherence(fit=FitConfig(steps=6, lr=3e-3, batch_size=16), check_rows=8)
    made = plain.apply(start, toy_domain(), context(tmp_path / "plain"))
    mended = plain.model_copy(update={"repair": light}).apply(
        start, toy_domain(), context(tmp_path / "light")
    )
    assert "repair" not in made.extras
    losses, told = mended.extras["losses"], mended.extras["repair"]
    assert losses["after"] == made.extras["losses"]["after"]
    assert told["losses"][told["best_step"]] < told["losses"][0]
    assert losses["repaired"]["retain"] < losses["after"]["retain"]


def test_a_share_of_labelled_rows_is_read(start: Checkpoint, tmp_path: Path) -> None:
    domain = toy_domain()
    rows = corpus(domain)
    some = thinned(rows, 0.5, seed=1)
    labelled = [row for row in rows if row.label > 0]
    assert [row for row in some if row.label <= 0] == [row for row in rows if row.label <= 0]
    assert sum(row.label > 0 for row in some) == round(len(labelled) / 2)
    assert some == thinned(rows, 0.5, seed=1) != thinned(rows, 0.5, seed=2)
    assert thinned(rows, 1.0, seed=1) is rows
    made = SGTM(pretrain=SCHEDULE, read=0.5).apply(start, domain, context(tmp_path / "some"))
    whole = SGTM(pretrain=SCHEDULE).apply(start, domain, context(tmp_path / "all"))
    assert made.checkpoint.fingerprint != whole.checkpoint.fingerprint


def two() -> Domain:
    """A domain with two capabilities."""
    domain = toy_domain()
    more = sentences("g", 8, capability="b", seed=9)
    for role in (domain.forget, domain.relearn, domain.test, domain.dev_forget):
        role["b"] = more  # type: ignore[index]
    return domain


def test_any_profile_can_be_served(start: Checkpoint, tmp_path: Path) -> None:
    ids = torch.arange(4, 24).reshape(2, 10)
    fast = SCHEDULE.model_copy(update={"fit": FIT.model_copy(update={"lr": 1e-2})})
    made = GRAM(pretrain=fast).apply(start, two(), context(tmp_path / "ours"))
    file = tmp_path / "ours" / made.extras["files"]["before_ablation"]

    @torch.no_grad()
    def says(*keep: str) -> Tensor:
        out: Tensor = serve(start, file, keep)(input_ids=ids).logits
        return out

    assert torch.equal(says(), made.checkpoint.load()(input_ids=ids).logits)
    grown = start.load()
    place(grown, GRAM().module, 2, 0)
    grown.load_state_dict(load_file(file), strict=False)
    torch.testing.assert_close(says("a", "b"), grown(input_ids=ids).logits)
    for name, at in (("a", 141), ("b", 128)):  # neurons of the other one, set to 0
        copy = start.load()
        place(copy, GRAM().module, 2, 0)
        copy.load_state_dict(load_file(file), strict=False)
        with torch.no_grad():
            for block in copy.model.layers:
                block.mlp.down_proj.weight[:, at : at + 13] = 0
        torch.testing.assert_close(says(name), copy(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(says(name), says(), rtol=0, atol=1e-3)
    with pytest.raises(UserError, match="there is no capability 'c'"):
        serve(start, file, ["c"])


def test_dual_adapters_leave_the_model_as_it_is(start: Checkpoint, tmp_path: Path) -> None:
    method = DualAdapters(fit=FIT, max_length=16)
    domain = toy_domain()
    made = method.apply(start, domain, context(tmp_path / "ours"))
    losses = made.extras["losses"]
    assert losses["before"]["labelled"] < losses["after"]["labelled"]
    before = load_file(tmp_path / "ours" / made.extras["files"]["before_ablation"])
    assert all(torch.equal(before[n], t) for n, t in weights(start).items() if n in before)
    assert all(t.abs().sum() > 0 for n, t in before.items() if ".lora_B." in n)
    # Whose labels are all missed teach the adapter that stays.
    alone = method.model_copy(update={"labels": LabelNoise(missed_units=1.0)})
    mixed = alone.apply(start, domain, context(tmp_path / "mixed"))
    learned = mixed.extras["losses"]
    assert learned["after"]["missed"] == pytest.approx(learned["before"]["missed"], abs=1e-6)
    assert learned["after"]["missed"] < losses["after"]["labelled"]


def absorbed(removal: Removal) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = removal.extras["losses"]
    return out


def test_what_is_missed_is_told_apart(start: Checkpoint, tmp_path: Path) -> None:
    half = LabelNoise(missed_occurrences=0.5)
    made = SGTM(pretrain=SCHEDULE, labels=half).apply(start, toy_domain(), context(tmp_path / "o"))
    assert set(absorbed(made)["before"]) == {"retain", "labelled", "missed"}
    assert made.extras["labels"]["occurrences"] == 0.5
    shares = made.extras["absorption"]["missed"]["share"]
    assert set(shares) == {"core", "module_1", "joint"}
    assert sum(shares.values()) == pytest.approx(1)
    owners = {row["tensor"] for row in made.extras["groups"] if row["group"] == "joint"}
    assert owners == {"model.embed_tokens.weight"}


def test_ways_to_cut_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="only grown modules can be deleted"):
        SGTM(ablate="delete")
    with pytest.raises(ValueError, match="grown modules are deleted"):
        GRAM(ablate="zero")
    with pytest.raises(ValueError, match="must be fewer than the 4 sinks"):
        MemSinks(sinks=4, active=4)


def test_modules_that_leave_no_core_are_refused(start: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave block 0 none of its mlp"):
        place(start.load(), Module(width=0.5), 2, 0)
    wide = SGTM(pretrain=SCHEDULE, module=Module(width=1.0))
    with pytest.raises(UserError, match=r"lower 'module\.width'"):
        wide.apply(start, toy_domain(), context(tmp_path / "wide"))


def test_filtering_reads_the_same_labels(start: Checkpoint, tmp_path: Path) -> None:
    """Presets and the baseline are told the same of every row."""
    half = LabelNoise(missed_units=0.5)
    ours = SGTM(pretrain=SCHEDULE, labels=half).apply(start, toy_domain(), context(tmp_path / "a"))
    theirs = Filtering(pretrain=SCHEDULE, labels=half).apply(
        start, toy_domain(), context(tmp_path / "b")
    )
    assert ours.extras["labels"]["occurrences"] == 1 - theirs.extras["forget_rows_left"] / 12
