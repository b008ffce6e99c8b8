"""Baselines of equal compute against plain loops, and what each of them does to labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn import functional as F

from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Domain, Row, Rows
from excise.data.labels import Confidence, LabelNoise, give_labels, propagated
from excise.data.stream import encode
from excise.domains.facts import Facts
from excise.labelling.head import fit_logistic, logits
from excise.methods import (
    SGTM,
    Filtering,
    FilterLoRA,
    Plain,
    Propagate,
    Relabel,
    Removal,
    TokenFilter,
)
from excise.methods.pretraining import filter_lora
from excise.methods.pretraining.filter_lora import adapter_rows
from excise.methods.pretraining.pretrain import Pretrain, corpus
from excise.methods.pretraining.relabel import absorbed, relabel, relabelling_quality, with_labels
from excise.methods.pretraining.relabel.probe import (
    Judgement,
    ThresholdRule,
    bag_of_tokens,
    fold_of,
    judge,
    standardised,
)
from excise.methods.pretraining.routed.absorption import hash_ordered
from excise.methods.tuning import stream
from excise.models.lora import LoRA, adapted
from excise.train.fit import FitConfig, fit
from tests.parity.test_pretraining import same
from tests.parity.toy import context, sentences, toy_checkpoint, toy_domain, weights

FIT = FitConfig(steps=5, lr=1e-3, batch_size=8, eps=1e-6)
SCHEDULE = Pretrain(fit=FIT, max_length=32, pack=(1, 2))
HALF = LabelNoise(missed_occurrences=0.5)
HALF_UNITS = LabelNoise(missed_units=0.5)


def loop(tmp_path: Path, rows: Rows, steps: int = 5, *, mask: bool = False) -> Any:
    """Train by hand on `rows`; with `mask`, tokens of forget rows have no loss."""
    start = toy_checkpoint(tmp_path / "y")
    read = stream(rows, start.tokenizer(), FIT, context(tmp_path / "y"), purpose="pretrain",
                  max_length=32, pack=(1, 2))  # fmt: skip
    model = start.load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=FIT.lr, eps=1e-6, weight_decay=0.0)
    for step in range(steps):
        batch = read(step)[0]
        logits_BTV = model(**batch.inputs).logits[:, :-1]
        keep = batch.target_BT[:, 1:] & ((batch.label_BT[:, 1:] == CORE) | (not mask))
        optimizer.zero_grad()
        F.cross_entropy(logits_BTV[keep], batch.ids_BT[:, 1:][keep]).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_masking_reads_what_it_does_not_learn(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    made = TokenFilter(how="mask", pretrain=SCHEDULE).apply(
        start, domain, context(tmp_path / "ours")
    )
    ours = weights(made.checkpoint)
    assert same(ours, loop(tmp_path, corpus(domain), mask=True), 5e-6)
    core = tuple(row for row in corpus(domain) if not row.capability)
    assert not same(ours, loop(tmp_path / "core", core), 1e-4)
    assert made.extras["rows_masked"] == 12
    assert made.extras["forget_rows_left"] == 0


def test_masking_by_confidence_is_the_same_in_micro_batches(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    noise = LabelNoise(missed_units=0.5, confidence=Confidence(concentration=0.2))
    made = []
    for micro in (0, 3):
        fit = FIT.model_copy(update={"micro_size": micro})
        method = TokenFilter(
            how="mask", pretrain=SCHEDULE.model_copy(update={"fit": fit}), labels=noise
        )
        made.append(method.apply(start, domain, context(tmp_path / str(micro))))
    assert same(weights(made[0].checkpoint), weights(made[1].checkpoint), 5e-6)
    plain = method.model_copy(update={"labels": LabelNoise(missed_units=0.5)})
    other = plain.apply(start, domain, context(tmp_path / "certain"))
    assert other.extras["forget_rows_left"] > made[0].extras["forget_rows_left"]


def test_confidence_lets_filtering_drop_what_was_missed(tmp_path: Path) -> None:
    rows = sentences("f", 200, capability="a") + sentences("r", 200)
    noise = LabelNoise(missed_units=0.5, confidence=Confidence(concentration=0.05))
    told = give_labels(rows, noise, seed=0)
    assert sum(r.label == CORE for r in told if r.capability) == 100
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    sure = LabelNoise(missed_units=0.5)
    left: list[int] = []
    for i, labels in enumerate((noise, sure)):
        method = Filtering(pretrain=SCHEDULE, labels=labels)
        made = method.apply(start, domain, context(tmp_path / str(i)))
        left.append(made.extras["forget_rows_left"])
    assert left[0] < left[1] == 6


def wide_domain() -> Domain:
    """Facts in several wordings per unit, several units per subject."""
    return Facts(subjects=16, relations=2, objects=6, wordings=4, forget_share=0.5).build(None)


def test_propagation_equals_training_without_the_units(tmp_path: Path) -> None:
    domain = toy_domain()
    twice = replace(domain, forget={"a": domain.forget["a"] * 2})
    start, ctx = toy_checkpoint(tmp_path), context(tmp_path / "ours")
    made = Propagate(pretrain=SCHEDULE, labels=HALF).apply(start, twice, ctx)
    told = give_labels(corpus(twice), HALF, seed=ctx.seed_for("labels"))
    known = {row.unit for row in told if row.label > CORE}
    assert 3 < len(known) < 12
    kept = tuple(row for row in told if row.unit not in known)
    assert same(weights(made.checkpoint), loop(tmp_path, kept), 5e-6)
    assert made.extras["forget_rows_left"] == 24 - 2 * len(known)
    before, after = made.extras["labels_before_after"]["occurrences"]
    assert before == 0.5 < after == pytest.approx(2 * len(known) / 24)


def told_facts(**noise: Any) -> Rows:
    return give_labels(corpus(wide_domain()), LabelNoise(**noise), seed=1)


def missing(rows: Sequence[Row]) -> int:
    return sum(1 for row in rows if row.capability and row.label <= CORE)


def test_propagation_repairs_occurrences_and_not_units() -> None:
    slips, blind = told_facts(missed_occurrences=0.5), told_facts(missed_units=0.5)
    assert missing(propagated(slips)) < 0.3 * missing(slips)
    assert missing(propagated(blind)) == missing(blind)
    assert missing(propagated(blind, by="group")) < 0.7 * missing(blind)


def test_propagation_of_false_alarms_can_be_made_careful() -> None:
    rows = told_facts(false_alarms=0.05)
    lost = [
        sum(1 for r in propagated(rows, at_least=n) if r.label > CORE and not r.capability)
        for n in (1, 3)
    ]
    alarms = sum(1 for r in rows if r.label > CORE and not r.capability)
    assert lost[0] > 2 * alarms
    assert lost[1] < lost[0]


def test_the_most_frequent_label_wins_and_own_labels_stay() -> None:
    votes = [Row("u", text="x", label=n) for n in (2, 1, 2, CORE, UNLABELED)]
    assert [row.label for row in propagated(votes)] == [2, 1, 2, 2, 2]
    doubt = [Row("u", text="x", label=1, confidence=0.2), Row("u", text="y")]
    assert propagated(doubt) == tuple(doubt)


def test_the_probe_equals_gradient_descent_on_dense_features() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + 0.5 * torch.randn(60, generator=generator) > 0).long()
    fitted = fit_logistic(x, y, 2, l2=1.0)
    other = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    for _ in range(3000):
        loss = F.cross_entropy(x @ other[:-1] + other[-1], y, reduction="sum")
        loss = loss + other[:-1].square().sum() / 2
        (gradient,) = torch.autograd.grad(loss, other)
        with torch.no_grad():
            other -= 0.02 * gradient
    assert torch.allclose(logits(x, fitted).softmax(1), logits(x, other).softmax(1), atol=1e-6)
    sparse = fit_logistic(x.to_sparse(), y, 2, l2=1.0)
    assert torch.allclose(sparse, fitted, atol=1e-8)


def cued(strength: float = 1.0, **noise: Any) -> tuple[Rows, torch.Tensor]:
    """Return told rows whose capability has a cue, and their bags of tokens."""
    spec = Facts(subjects=32, relations=2, objects=6, forget_share=0.5, cue="category",
                 cue_strength=strength)  # fmt: skip
    rows = give_labels(corpus(spec.build(None)), LabelNoise(**noise), seed=1)
    examples = encode(rows, spec.tokenizer(), max_length=16)
    return rows, bag_of_tokens([e.ids for e in examples])


def judged(rows: Rows, x_NF: torch.Tensor, rule: ThresholdRule, folds: int = 3) -> dict[str, Any]:
    verdict = judge(rows, x_NF, folds=folds, by="group", rule=rule, fixed=0.5, l2=1.0, seed=0)
    facts = relabelling_quality(rows, relabel(rows, verdict))
    return {**facts, "threshold": verdict.threshold, "f1": verdict.held_out["f1"]}


def test_the_probe_finds_missed_units_where_rows_share_a_feature() -> None:
    rows, x = cued(missed_units=0.5)
    facts = judged(rows, x, "pu")
    assert facts["recall"] > 0.8
    assert facts["precision"] > 0.95
    plain_rows, plain = cued(strength=0.0, missed_units=0.5)
    assert judged(plain_rows, plain, "pu")["recall"] < facts["recall"] - 0.2


def test_the_threshold_allows_for_missed_labels() -> None:
    rows, x = cued(missed_units=0.7)
    half, fixed = judged(rows, x, "pu"), judged(rows, x, "fixed")
    assert half["threshold"] < 0.3
    assert half["recall"] > fixed["recall"]
    complete, y = cued()
    assert judged(complete, y, "pu")["threshold"] > 0.4
    best = judged(complete, y, "f1")
    assert best["f1"] == pytest.approx(1.0)


def test_a_probe_that_cannot_tell_flags_nothing() -> None:
    rows, x = cued(strength=0.0, missed_units=0.5)
    assert judged(rows, x, "lift")["labelled"] == 0
    assert judged(rows, x, "pu")["precision"] < 0.8
    easy, y = cued(missed_units=0.5)
    facts = judged(easy, y, "lift")
    assert facts["recall"] > 0.8
    assert facts["precision"] > 0.95


def test_lift_is_recall_squared_over_the_share_flagged() -> None:
    rows, x = cued(strength=0.9, missed_occurrences=0.2)
    verdict = judge(rows, x, folds=3, by="group", rule="lift", fixed=0.5, l2=1.0, seed=0)
    told = torch.tensor([row.label > CORE for row in rows])

    def lift(cut: float) -> float:
        said = verdict.chance_N > cut
        return float((said & told).sum() / told.sum()) ** 2 / float(said.float().mean())

    best = max(lift(float(value) - 1e-12) for value in verdict.chance_N)
    assert lift(verdict.threshold) == pytest.approx(best)
    assert best > 1.5


def test_rows_of_a_missed_unit_teach_the_probe_that_it_is_core() -> None:
    rows, x = cued(missed_units=0.5)
    recall = []
    for by in ("row", "group"):
        verdict = judge(rows, x, folds=3, by=by, rule="pu", fixed=0.5, l2=1.0, seed=0)
        recall.append(relabelling_quality(rows, relabel(rows, verdict))["recall"])
    assert recall[0] is not None
    assert recall[1] is not None
    assert recall[0] < recall[1] - 0.2


def test_f1_is_the_best_of_all_cuts() -> None:
    rows, x = cued(strength=0.5, missed_occurrences=0.3, false_alarms=0.1)
    verdict = judge(rows, x, folds=3, by="row", rule="f1", fixed=0.5, l2=1.0, seed=0)
    told = torch.tensor([row.label > CORE for row in rows])

    def score(cut: float) -> float:
        said = verdict.chance_N > cut
        return float(2 * (said & told).sum() / (said.sum() + told.sum()))

    best = max(score(float(value)) for value in verdict.chance_N)
    assert verdict.held_out["f1"] == pytest.approx(best)
    assert score(verdict.threshold) == pytest.approx(best)


@pytest.mark.parametrize("by", ["row", "unit", "group"])
def test_folds_keep_together_what_belongs_together(by: Literal["row", "unit", "group"]) -> None:
    rows = corpus(wide_domain())
    fold = fold_of(rows, 4, by, 0).tolist()
    assert set(fold) == {0, 1, 2, 3}
    key: Callable[[Row], str] = {"unit": lambda r: r.unit, "group": lambda r: r.group}.get(
        by, lambda r: f"{r.unit}{r.wording}"
    )
    homes: dict[str, set[int]] = {}
    for row, at in zip(rows, fold, strict=True):
        homes.setdefault(key(row), set()).add(at)
    assert all(len(folds) == 1 for folds in homes.values())
    backward = fold_of(rows[::-1], 4, by, 0).tolist()[::-1]
    assert backward == fold


def test_relabelling_trains_without_what_the_probe_finds(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    marked = tuple(
        replace(row, text=f"w0 w1 w2 {row.text}", unit=f"{row.unit}-{i}")
        for i, row in enumerate(domain.forget["a"])
    )
    domain = replace(domain, forget={"a": marked})
    method = Relabel(pretrain=SCHEDULE, labels=HALF_UNITS, folds=2)
    made = method.apply(start, domain, context(tmp_path / "ours"))
    assert made.extras["probe"]["recall"] >= 0.8
    assert made.extras["forget_rows_left"] <= 1
    assert made.cost.steps == 5
    ctx = context(tmp_path / "ours")
    told = give_labels(corpus(domain), HALF_UNITS, seed=ctx.seed_for("labels"))
    examples = encode(told, start.tokenizer(), max_length=32)
    verdict = judge(told, bag_of_tokens([e.ids for e in examples]), folds=2, by="group", rule="pu",
                    fixed=0.5, l2=1.0, seed=ctx.seed_for("relabel"))  # fmt: skip
    chances = zip(told, verdict.chance_N.tolist(), strict=True)
    kept = tuple(r for r, c in chances if r.label == CORE and c <= verdict.threshold)
    assert same(weights(made.checkpoint), loop(tmp_path, kept), 5e-6)


def test_what_comes_after_the_probe_trains_on_its_labels(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    marked = tuple(replace(row, text=f"w0 w1 w2 {row.text}") for row in domain.forget["a"])
    domain = replace(domain, forget={"a": marked}, mix_share=0.5)
    method = Relabel(pretrain=SCHEDULE, labels=HALF_UNITS, folds=2, fold_by="row")
    left_out = method.apply(start, domain, context(tmp_path / "out"))
    same_by_filter = method.model_copy(update={"then": Filtering()}).apply(
        start, domain, context(tmp_path / "filter")
    )
    assert weights(same_by_filter.checkpoint).keys() == weights(left_out.checkpoint).keys()
    assert same(weights(same_by_filter.checkpoint), weights(left_out.checkpoint), 0.0)
    routed = SGTM(p_push=0.5)
    made = method.model_copy(update={"then": routed}).apply(start, domain, context(tmp_path / "r"))
    assert made.extras["relabel"]["probe"] == left_out.extras["probe"]
    assert made.extras["relabel"]["probe"]["labelled"] > 0
    ctx = context(tmp_path / "r")
    told = give_labels(corpus(domain), HALF_UNITS, seed=ctx.seed_for("labels"))
    examples = encode(told, start.tokenizer(), max_length=32)
    verdict = judge(told, bag_of_tokens([e.ids for e in examples]), folds=2, by="row", rule="lift",
                    fixed=0.5, l2=1.0, seed=ctx.seed_for("relabel"))  # fmt: skip
    now = relabel(told, verdict)
    alone = replace(
        domain, forget={"a": tuple(r for r in now if r.label == 1)}, mix_share=None,
        retain=tuple(r for r in now if r.label != 1), adjacent=(), unlabeled=(),
    )  # fmt: skip
    by_hand = routed.model_copy(update={"pretrain": SCHEDULE}).apply(
        start, alone, context(tmp_path / "hand")
    )
    assert same(weights(made.checkpoint), weights(by_hand.checkpoint), 0.0)
    assert not same(weights(made.checkpoint), weights(left_out.checkpoint), 1e-4)


def test_rows_the_probe_clears_are_told_to_be_core() -> None:
    rows = tuple(Row(text=f"w{i}", unit=f"u{i}", label=UNLABELED) for i in range(4))
    rows = (*rows, Row(text="w9", unit="u9", label=1))
    chance_N = torch.tensor([0.8, 0.45, 0.2, 0.25, 0.01])
    verdict = Judgement(chance_N, torch.ones(5, dtype=torch.long), 0.5, {})
    labels = {c: [r.label for r in relabel(rows, verdict, clear=c)] for c in (0.0, 0.5, 1.0)}
    assert labels[0.0] == [1, UNLABELED, UNLABELED, UNLABELED, 1]
    assert labels[0.5] == [1, UNLABELED, CORE, UNLABELED, 1]
    assert labels[1.0] == [1, CORE, CORE, CORE, 1]


def test_handing_labels_on_loses_no_row() -> None:
    labels = (1, UNLABELED, CORE, 1, UNLABELED)
    told = tuple(Row(text=f"w{i}", unit=f"u{i}", label=n) for i, n in enumerate(labels))
    seen = with_labels(replace(toy_domain(), mix_share=0.5), told)
    assert set(corpus(seen)) == set(told)
    assert [row.label for row in corpus(seen)] == [1, 1, UNLABELED, CORE, UNLABELED]
    assert seen.test == toy_domain().test
    assert seen.fingerprint != toy_domain().fingerprint


def test_what_comes_after_the_probe_takes_its_labels_from_it() -> None:
    with pytest.raises(ValueError, match="then: takes schedule and labels from relabel"):
        Relabel(then=SGTM(labels=HALF_UNITS))
    with pytest.raises(ValueError, match="then: name a method that trains from scratch on labels"):
        Relabel(then=Plain())
    with pytest.raises(ValueError, match="clear: filtering keeps unlabelled rows anyway"):
        Relabel(clear=0.5)


def test_hidden_features_cost_steps(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    fit = FIT.model_copy(update={"steps": 10})
    config = SCHEDULE.model_copy(update={"fit": fit})
    method = Relabel(pretrain=config, features="hidden", folds=2, warm_share=0.3)
    made = method.apply(start, domain, context(tmp_path / "ours"))
    assert made.extras["steps"] == {"features": 3, "reading": 2, "training": 5}
    assert made.cost.steps == 8
    with pytest.raises(UserError, match="the model has 3 blocks"):
        method.model_copy(update={"block": 7}).apply(start, domain, context(tmp_path / "bad"))
    short = config.model_copy(update={"fit": fit.model_copy(update={"steps": 3})})
    with pytest.raises(UserError, match="none of 3 steps left"):
        method.model_copy(update={"pretrain": short}).apply(start, domain, context(tmp_path / "s"))


def test_standardised_features_have_no_scale() -> None:
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert standardised(x).tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def test_relabelling_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name a routed method with features 'absorption'"):
        Relabel(features="absorption")
    with pytest.raises(ValueError, match="name a routed method with features 'absorption'"):
        Relabel(router=Plain())
    none = LabelNoise(missed_units=1.0)
    with pytest.raises(UserError, match="no labelled forget row outside fold 0"):
        Relabel(pretrain=SCHEDULE, labels=none).apply(
            toy_checkpoint(tmp_path), toy_domain(), context(tmp_path / "ours")
        )
    router = Relabel(pretrain=SCHEDULE, features="absorption", router=Plain(), folds=2)
    long = SCHEDULE.model_copy(update={"fit": FIT.model_copy(update={"steps": 12})})
    with pytest.raises(UserError, match="keeps no model from before its ablation"):
        router.model_copy(update={"pretrain": long}).apply(
            toy_checkpoint(tmp_path / "r"), toy_domain(), context(tmp_path / "routed")
        )


def test_absorption_is_the_rise_of_each_rows_loss(tmp_path: Path) -> None:
    start, domain, ctx = toy_checkpoint(tmp_path), toy_domain(), context(tmp_path / "ours")
    made = SGTM(pretrain=SCHEDULE).apply(start, domain, ctx)
    rows = (*domain.forget["a"], *domain.retain)
    rise = absorbed(start, made, ctx.work, ("a",), rows, SCHEDULE, ctx)
    before = load_file(ctx.work / made.extras["files"]["before_ablation"])
    models = [start.load(), made.checkpoint.load()]
    models[0].load_state_dict(before, strict=False)
    for row, value in zip(rows, rise[:, 0].tolist(), strict=True):
        ids = torch.tensor([encode([row], start.tokenizer(), max_length=32)[0].ids])
        cut = [F.cross_entropy(m(ids).logits[0, :-1], ids[0, 1:]).item() for m in models]
        assert value == pytest.approx(cut[1] - cut[0], abs=1e-5)
    assert rise.abs().max() > 1e-4


def test_relabelling_by_absorption_shares_the_steps(tmp_path: Path) -> None:
    fit = FIT.model_copy(update={"steps": 12})
    method = Relabel(
        pretrain=SCHEDULE.model_copy(update={"fit": fit}), features="absorption",
        router=SGTM(), folds=2, warm_share=0.25, labels=HALF_UNITS,
    )  # fmt: skip
    made = method.apply(toy_checkpoint(tmp_path), toy_domain(), context(tmp_path / "ours"))
    assert made.extras["steps"] == {"features": 3, "reading": 3, "training": 6}
    assert made.cost.steps == 9
    again = Relabel.model_validate(method.model_dump() | {"router": SGTM()})
    assert again == method


def adapter_model(made: Removal, work: Path) -> Any:
    """Load the core and its adapter as anybody would."""
    from peft import PeftModel

    core: Any = made.checkpoint.load()
    return PeftModel.from_pretrained(core, work / made.extras["files"]["adapter_a"]).eval()


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_core_of_filter_lora_is_filtering_and_the_adapter_a_plain_loop(
    ratio: float, tmp_path: Path
) -> None:
    start, domain, ctx = toy_checkpoint(tmp_path), toy_domain(), context(tmp_path / "ours")
    config = SCHEDULE.model_copy(update={"fit": FIT.model_copy(update={"steps": 8})})
    method = FilterLoRA(
        pretrain=config, adapter_share=0.4, lora=LoRA(rank=4), adapter_lr=1e-2, core_ratio=ratio
    )
    made = method.apply(start, domain, ctx)
    core = tuple(row for row in corpus(domain) if not row.capability)
    assert same(weights(made.checkpoint), loop(tmp_path, core), 5e-6)
    assert made.cost.steps == 8
    assert made.extras["adapters"]["a"]["rows"] == 12
    loss = made.extras["adapters"]["a"]["loss"]["forget"]
    assert loss["adapter"] != loss["core"]
    model = adapter_model(made, ctx.work)
    rows = corpus(domain)[:12]
    if ratio:
        rows = (*rows, *hash_ordered(core, ctx.seed_for("adapter.a.core"))[:12])
    read = stream(rows, start.tokenizer(), FIT, ctx, purpose="adapter.a",
                  max_length=32, pack=(1, 2))  # fmt: skip
    ours = load_file(ctx.work / "adapters/a/adapter_model.safetensors")
    with adapted(made.checkpoint.load(), method.lora, seed=ctx.seed_for("lora.a")) as live:
        trained = [p for p in live.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-6, weight_decay=0.0)
        for step in range(3):
            batch = read(step)[0]
            logits_BTV, keep = live(**batch.inputs).logits[:, :-1], batch.target_BT[:, 1:]
            optimizer.zero_grad()
            F.cross_entropy(logits_BTV[keep], batch.ids_BT[:, 1:][keep]).backward()
            optimizer.step()
        named = {n.replace(".default", ""): p.detach() for n, p in live.named_parameters()}
    assert ours
    assert all(torch.allclose(value, named[name], atol=2e-5) for name, value in ours.items())
    assert any(bool(value.abs().max() > 1e-3) for n, value in ours.items() if "lora_B" in n)
    assert sum("lora" in n for n, _ in model.named_parameters()) == len(ours)


def watched_adapter(
    ratio: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int = 12
) -> tuple[Removal, Counter[int], set[str]]:
    """Return what filter_lora made, how often its adapter read rows by label, and what it wrote."""
    read: Counter[int] = Counter()
    written: set[str] = set()

    def watching(model: Any, batches: Any, loss: Any, config: Any, *args: Any, **how: Any) -> Any:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for step in range(config.steps):
            read.update(b.label_BT[i, 1].item() for b in batches(step) for i in range(len(b.units)))
        yield from fit(model, batches, loss, config, *args, **how)
        written.update(n for n, p in model.named_parameters() if not torch.equal(p, before[n]))

    monkeypatch.setattr(filter_lora, "fit", watching)
    tmp_path /= f"{ratio}-{rows}"
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    domain = replace(domain, forget={"a": domain.forget["a"][:rows]})
    schedule = Pretrain(fit=FIT.model_copy(update={"steps": 61}), max_length=32)
    method = FilterLoRA(pretrain=schedule, adapter_share=0.98, core_ratio=ratio)
    made = method.apply(start, domain, context(tmp_path / "ours"))
    return made, read, written


@pytest.mark.parametrize("rows", [12, 2])
def test_an_adapter_reads_two_core_rows_for_each_labelled_row_and_writes_itself_alone(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # core_aux_ratio 2.0 of the released stories runs: forward through core and adapter for either
    # kind of row, backward into the adapter.
    assert FilterLoRA().core_ratio == 2.0
    made, read, written = watched_adapter(2.0, tmp_path, monkeypatch, rows)
    assert set(read) == {CORE, 1}
    assert read[CORE] / read[1] == pytest.approx(2.0, rel=0.1)
    assert made.extras["adapters"]["a"]["core_share"] == pytest.approx(2 / 3)
    assert written
    assert all("lora_" in name for name in written)


def test_an_adapter_on_labelled_rows_alone_is_another_on_the_same_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, read, _ = watched_adapter(0.0, tmp_path, monkeypatch)
    assert set(read) == {1}
    both, _, _ = watched_adapter(2.0, tmp_path, monkeypatch)
    assert alone.checkpoint.fingerprint == both.checkpoint.fingerprint
    loss = {m: made.extras["adapters"]["a"]["loss"] for m, made in (("a", alone), ("b", both))}
    assert loss["a"]["retain"]["core"] == loss["b"]["retain"]["core"]
    assert loss["a"]["retain"]["adapter"] > loss["b"]["retain"]["adapter"]
    with pytest.raises(ValidationError, match="core_ratio"):
        FilterLoRA(core_ratio=-1.0)


def test_the_rows_of_an_adapter_are_bounded_by_what_is_read() -> None:
    labelled, core = (Row(unit="l", label=1),), tuple(Row(unit=str(i)) for i in range(1000))
    rows = adapter_rows(labelled, core, 0.001, reads=50)
    assert len(rows) <= 51
    assert adapter_rows(labelled, (), 2.0, reads=50) == labelled
    whole = adapter_rows(labelled, core, 4.0, reads=10**6)
    assert Counter(row.label for row in whole) == {1: 250, CORE: 1000}
    assert set(core) < set(whole)


def test_filter_lora_without_a_label_is_filtering(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    method = FilterLoRA(pretrain=SCHEDULE, labels=LabelNoise(missed_units=1.0))
    made = method.apply(start, domain, context(tmp_path / "ours"))
    assert made.extras["files"] == {}
    assert made.extras["forget_rows_left"] == 12
    plain = Plain(pretrain=SCHEDULE).apply(start, domain, context(tmp_path / "plain"))
    assert made.checkpoint.fingerprint == plain.checkpoint.fingerprint


def test_a_missing_module_is_found_before_training(tmp_path: Path) -> None:
    method = FilterLoRA(pretrain=SCHEDULE, lora=LoRA(modules=("nowhere",)))
    ctx = context(tmp_path / "ours")
    with pytest.raises(UserError, match="matches no linear layer"):
        method.apply(toy_checkpoint(tmp_path), toy_domain(), ctx)
    assert not (ctx.work / "state").exists()


def test_routing_acts_on_confidence(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    doubt = Confidence(concentration=0.5)
    made = {}
    for name, noise in {
        "missed": HALF_UNITS,
        "missed, unsure": HALF_UNITS.model_copy(update={"confidence": doubt}),
        "right": LabelNoise(),
        "right, sure": LabelNoise(confidence=doubt),
    }.items():
        method = SGTM(pretrain=SCHEDULE, labels=noise)
        removal = method.apply(start, domain, context(tmp_path / name))
        made[name] = removal.checkpoint.fingerprint
    assert made["missed"] != made["missed, unsure"]
    assert made["right"] == made["right, sure"]
