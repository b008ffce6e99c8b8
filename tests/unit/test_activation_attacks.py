"""What is read off the residual stream: known answers of lens, probe, steering and subspaces.

Shape legend: N positions, Q questions, L blocks, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fixtures.facts import make_domain

from excise.auditor import residuals
from excise.auditor.attacks import ATTACKS, Direction, Lens, direction, latent
from excise.auditor.attacks.direction import cleared, leading, whitened
from excise.auditor.attacks.latent import trained_vector
from excise.auditor.attacks.lens import cleared_lens, recentred_lens, tuned_lens
from excise.auditor.attacks.probe import predicted
from excise.auditor.base import AttackResult, Subject, VariantResult
from excise.auditor.budget import SMOKE, STANDARD, Budget
from excise.auditor.controls import GatedEdit
from excise.auditor.controls.control import make_control
from excise.auditor.evaluation_set import EvaluationSet, UnitScores, evaluation_set
from excise.auditor.prompting import shown
from excise.auditor.questions import CANDIDATES, METRIC, Question, choice_scores, questions_of
from excise.auditor.readout import logit_lens
from excise.auditor.residuals import ReadResiduals, Residuals, reading_budget, residuals_of
from excise.auditor.results import BOUND
from excise.core.context import Context
from excise.core.stages import Runtime
from excise.data.domain import Domain, Row, Rows, all_rows
from excise.data.stream import encode
from excise.models.anatomy import backbone
from excise.models.checkpoint import Checkpoint
from excise.models.hooks import capture

FIXTURES = Path(__file__).parents[1] / "fixtures"
KNOWING, NEVER = Checkpoint(FIXTURES / "knowing"), Checkpoint(FIXTURES / "never_taught")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("activations")


@cache
def gated(folder: Path) -> Checkpoint:
    control = make_control(
        GatedEdit(), KNOWING, make_domain(), SMOKE, Context(folder), folder / "gated"
    )
    assert control.checkpoint is not None
    return control.checkpoint


@cache
def read(checkpoint: Checkpoint, folder: Path) -> Residuals:
    return residuals_of(checkpoint, make_domain(), SMOKE, Context(folder))


def run(
    name: str,
    checkpoint: Checkpoint,
    folder: Path,
    domain: Domain | None = None,
    budget: Budget = SMOKE,
    **settings: Any,
) -> AttackResult:
    subject = Subject("candidate", checkpoint, KNOWING)
    attack = ATTACKS[name].model_validate(settings)
    return attack.run(subject, domain or make_domain(), budget, Context(folder))


def ends(result: AttackResult) -> dict[str, float]:
    return {v.entry.variant: v.entry.curve[-1].score for v in result.variants}


def by_variant(result: AttackResult) -> dict[str, VariantResult]:
    return {variant.entry.variant: variant for variant in result.variants}


def decisive(result: AttackResult) -> float:
    (chosen,) = result.chosen
    return result.variants[chosen].entry.curve[-1].score


def asked(rows: Rows, **how: Any) -> list[Question]:
    settings = {"max_length": 64, "generator": torch.Generator().manual_seed(0), **how}
    return questions_of({"a": rows}, KNOWING.tokenizer(), **settings)


def test_candidates_part_at_the_first_token_that_differs() -> None:
    tokenizer = KNOWING.tokenizer()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    rows = tuple(
        Row(unit=f"u{i}", prompt="the color of s1 is", completion=f" color1 color{i}")
        for i in (2, 3, 2)
    )
    first, second, third = asked(rows)
    assert first.ids[-6:] == tuple(ids("the color of s1 is color1"))
    assert [first.tokens[first.right], second.answer] == ids("color2 color3")
    assert set(first.tokens) == set(ids("color2 color3"))
    assert third.tokens == first.tokens
    question = Row(unit="q", prompt="s1 has", choices=("color4", "taste4", "color5"), answer=1)
    (choice,) = asked((question,))
    assert [choice.tokens, choice.right] == [tuple(ids("color4 taste4 color5")), 1]
    assert asked((Row(unit="t", text="the color of s1 is color2"),)) == []
    assert asked(rows[:1]) == [], "one answer is nothing to choose from"


def test_answers_that_begin_alike_are_asked_where_they_part() -> None:
    """Of numbers, the first digit is the same for most: the second tells ten apart."""
    tokenizer = KNOWING.tokenizer()

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    answers = [f" color{a} taste{b}" for a, b in ((1, 1), (1, 2), (1, 3), (2, 1), (1, 1))]
    rows = tuple(
        Row(unit=f"u{i}", prompt="the color of s1 is", completion=answer)
        for i, answer in enumerate(answers)
    )
    first, *_, other, again = asked(rows)
    assert first.ids[-1:] == ids("color1"), "the right answer is begun"
    assert sorted(first.tokens) == sorted(ids("taste1 taste2 taste3"))
    assert (first.answer,) == ids("taste1")
    # Who begins as nobody else does is told by that.
    assert first.ids[:-1] == other.ids
    assert sorted(other.tokens) == sorted(ids("color1 color2"))
    assert (other.answer,) == ids("color2")
    assert again.tokens == first.tokens
    # Where one answer is the beginning of another, the end of it tells them apart.
    short = [Row(unit=u, prompt="s1 has", completion=u) for u in (" color1", " color1 taste1")]
    ended, longer = asked(tuple(short))
    assert ended.ids == longer.ids
    assert (ended.answer,) == (tokenizer.eos_token_id,)
    assert (longer.answer,) == ids("taste1")


def test_of_many_answers_some_are_drawn_and_the_prompt_is_cut_on_the_left() -> None:
    objects = [f" {kind}{i}" for kind in ("color", "taste") for i in range(20)]
    rows = tuple(Row(unit=o, prompt="the color of s1 is", completion=o) for o in objects)
    questions = asked(rows, max_length=3)
    assert {len(q.tokens) for q in questions} == {CANDIDATES}
    assert len({q.tokens[1:] for q in questions}) > 1
    assert {len(q.ids) for q in questions} == {3}
    assert asked(rows, max_length=3) == questions


def test_ties_share_and_ranks_count_from_zero() -> None:
    questions = [Question("a", (1,), (0, 1, 2), 0), Question("b", (1,), (0, 1, 2), 2)]
    units, rank = choice_scores(questions, torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0]]))
    assert units == {"a": 0.5, "b": 0.0}
    assert rank == pytest.approx((0.5 + 2) / 2)


def test_what_is_kept_is_what_the_model_held(folder: Path) -> None:
    kept, model = read(KNOWING, folder), KNOWING.load()
    test = kept.asked["test"]
    paths = backbone(model).blocks
    for i in (0, 7, len(test.questions) - 1):
        with torch.no_grad(), capture(model, paths) as got:
            model(input_ids=torch.tensor([test.questions[i].ids]), use_cache=False)
        now_LD = torch.stack([got[path][0][0, -1] for path in paths])
        torch.testing.assert_close(test.hidden_QLD[i], now_LD, atol=1e-4, rtol=1e-4)
    texts = kept.texts["retain"]
    rows = make_domain().dev_retain
    assert texts.row_N.bincount().min() == texts.row_N.bincount().max()
    assert len(texts.row_N.unique()) == len(rows)
    assert int(texts.answering_N.sum()) == len(rows)


def test_what_would_not_fit_is_thinned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, most = read(KNOWING, folder), 10
    assert len(whole.asked["test"].questions) > most
    monkeypatch.setattr(residuals, "MAX_ENTRIES", 2 * 48 * most)
    stage = ReadResiduals(KNOWING, make_domain(), reading_budget(SMOKE), 0)
    ctx = Context(folder).child("thin")
    stage.make(ctx)
    thin = stage.read(ctx.work)
    for role, texts in thin.texts.items():
        all_N = len(whole.texts[role].row_N)
        assert len(texts.row_N) == -(-all_N // -(-all_N // most))
    torch.testing.assert_close(thin.asked["test"].hidden_QLD, whole.asked["test"].hidden_QLD)


def test_attacks_share_one_pass(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    make = ReadResiduals.make

    def counted(self: ReadResiduals, ctx: Context) -> None:
        made.append(self.checkpoint.fingerprint)
        make(self, ctx)

    monkeypatch.setattr(ReadResiduals, "make", counted)
    ctx = Context(tmp_path, stages=Runtime(tmp_path / "stages").run)
    subject = Subject("candidate", gated(folder), KNOWING)
    for name in ("lens", "probe", "direction", "steer"):
        ATTACKS[name]().run(subject, make_domain(), SMOKE, ctx)
    assert sorted(made) == sorted({gated(folder).fingerprint, KNOWING.fingerprint})


def test_the_recentred_lens_reads_behind_a_gate_and_nothing_in_who_was_never_taught(
    folder: Path,
) -> None:
    result = run("lens", gated(folder), folder)
    assert {variant.entry.metric for variant in result.variants} == {METRIC}
    assert result.variants[0].entry.curve[0].score < 0.3
    assert [result.variants[i].entry.variant for i in result.chosen] == ["recentred"]
    assert decisive(result) >= 0.8
    assert max(ends(run("lens", NEVER, folder)).values()) <= 0.2
    known = run("lens", KNOWING, folder)
    assert min(ends(known).values()) >= 0.95
    assert known.variants[0].entry.curve[0].score == 1


def test_a_cleared_lens_reads_behind_what_is_added_to_some_prompts_more_than_to_others(
    folder: Path,
) -> None:
    kept, lens = read(KNOWING, folder), logit_lens(KNOWING.load())
    relearn, last = kept.texts["relearn"], len(kept.texts["relearn"].hidden_NLD[0]) - 1
    u_D = torch.randn(48, generator=torch.Generator().manual_seed(3))
    u_D = 500 * u_D / u_D.norm()

    def added(hidden_ND: torch.Tensor) -> torch.Tensor:
        much_N = 0.2 + torch.rand(len(hidden_ND), generator=torch.Generator().manual_seed(4))
        return hidden_ND + torch.outer(much_N, u_D)

    hidden_NLD = relearn.hidden_NLD.clone()
    hidden_NLD[:, last] = added(hidden_NLD[:, last])
    edited = replace(kept, texts={**kept.texts, "relearn": replace(relearn, hidden_NLD=hidden_NLD)})
    asked = kept.asked["test"]

    def share(readout: Any) -> float:
        said_QV = readout(added(asked.hidden_QLD[:, last]), last)
        units, _ = choice_scores(asked.questions, said_QV)
        return sum(units.values()) / len(units)

    assert share(cleared_lens(lens, edited)) >= 0.9
    benign = edited.texts["benign"]
    typical_ND = benign.hidden_NLD[benign.answering_N, last].mean(0, keepdim=True)
    torch.testing.assert_close(cleared_lens(lens, edited)(typical_ND, last), lens(typical_ND, last))
    assert share(recentred_lens(lens, edited)) <= 0.5
    assert share(lens) <= 0.5


def test_a_gate_in_the_last_block_leaves_the_others_alone(folder: Path) -> None:
    made = make_control(
        GatedEdit(block="last"), KNOWING, make_domain(), SMOKE, Context(folder), folder / "late"
    )
    assert made.hides, made.reason
    assert made.checkpoint is not None
    before, after = KNOWING.load().state_dict(), made.checkpoint.load().state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    assert Lens.controls == (GatedEdit(block="last"),)


def test_a_tuned_lens_says_what_the_last_block_says(folder: Path) -> None:
    kept, model = read(KNOWING, folder), KNOWING.load()
    last_NV = logit_lens(model)(kept.texts["retain"].hidden_NLD[:, -1], 1)

    def away(lens: Any) -> float:
        said_NV = lens(kept.texts["retain"].hidden_NLD[:, 0], 0).log_softmax(-1)
        return float(
            torch.nn.functional.kl_div(
                said_NV, last_NV.log_softmax(-1), reduction="batchmean", log_target=True
            )
        )

    tuned = tuned_lens(Lens(), model, kept, Context(folder))
    assert away(tuned) < 0.6 * away(logit_lens(model))
    again = tuned_lens(Lens(), model, kept, Context(folder))
    assert away(again) == away(tuned)


def test_a_probe_reads_behind_a_gate_and_its_shuffled_control_does_not(folder: Path) -> None:
    result = run("probe", gated(folder), folder)
    by_name = ends(result)
    assert by_name["embeddings"] >= 0.8
    # Of the answers of V, a share is among those the classes were fitted on.
    assert by_name["classes"] >= 0.4
    assert max(by_name["embeddings shuffled"], by_name["classes shuffled"]) <= 0.25
    assert max(ends(run("probe", NEVER, folder)).values()) <= 0.2


def test_the_test_set_is_read_to_score_alone(folder: Path) -> None:
    """Other answers of V change scores, and neither block, penalty nor what dev says."""
    domain = make_domain()
    wrong = [row.completion for row in domain.test["tests"]]
    rows = tuple(
        replace(row, completion=wrong[i - 7]) for i, row in enumerate(domain.test["tests"])
    )
    for name in ("lens", "probe"):
        one = run(name, gated(folder), folder)
        two = run(name, gated(folder), folder, replace(domain, test={"tests": rows}))
        assert decisive(two) < decisive(one) - 0.3
        for a, b in zip(one.variants, two.variants, strict=True):
            assert a.dev_score == b.dev_score
            chosen = [k for k in a.entry.facts if k != "mean_rank"]
            assert {k: a.entry.facts[k] for k in chosen} == {k: b.entry.facts[k] for k in chosen}


@pytest.mark.parametrize("name", ["lens", "probe"])
def test_texts_have_no_candidates_and_the_attack_says_so(name: str, folder: Path) -> None:
    domain = make_domain()

    def plain(rows: Rows) -> Rows:
        return tuple(replace(r, text=shown(r), prompt="", completion="") for r in rows)

    texts = replace(domain, test={"tests": plain(domain.test["tests"])})
    (only,) = run(name, KNOWING, folder, texts).variants
    assert (only.entry.status, only.entry.facts) == ("missing", {"applies": False})
    assert only.entry.reason.startswith("these rows have no candidates")
    untold = replace(domain, relearn={"tests": plain(domain.relearn["tests"])})
    statuses = {v.entry.status for v in run(name, KNOWING, folder, untold).variants}
    assert statuses == ({"ok"} if name == "lens" else {"missing"})


def test_questions_with_choices_are_read_in_the_same_metric(folder: Path) -> None:
    domain = make_domain()

    def choices(rows: Rows) -> Rows:
        answers = [row.completion.strip() for row in rows]
        return tuple(
            replace(row, completion="", choices=(answers[i - 5], answers[i]), answer=1)
            for i, row in enumerate(rows)
            if answers[i - 5] != answers[i]
        )

    research = replace(
        domain,
        test={"tests": choices(domain.test["tests"])},
        dev_forget={"tests": choices(domain.dev_forget["tests"])},
        retain_test=choices(domain.retain_test),
        metrics=("multiple_choice",),
        retain_metrics=("multiple_choice",),
    )
    for name, least in (("lens", 0.8), ("probe", 0.8)):
        result = run(name, gated(folder), folder, research)
        assert decisive(result) >= least
        assert result.variants[0].entry.metric == METRIC


def test_steering_holds_the_original_and_never_decides(folder: Path) -> None:
    result = run("steer", gated(folder), folder)
    assert result.chosen == ()
    by_name = ends(result)
    assert max(by_name["block 0"], by_name["block 1"]) >= 0.7
    assert max(by_name["block 0 random"], by_name["block 1 random"]) <= 0.3
    alone = ATTACKS["steer"]().run(Subject("x", NEVER), make_domain(), SMOKE, Context(folder))
    assert [v.entry.status for v in alone.variants] == ["missing"]


def test_a_trained_vector_opens_a_gate_and_stays_in_its_ball(folder: Path) -> None:
    result = run("latent", gated(folder), folder)
    assert decisive(result) >= 0.7
    for variant in result.variants:
        assert variant.extras["dev_loss"] > 0, "equal scores are told apart by it"
        if variant.entry.control:
            assert variant.entry.curve[-1].score <= 0.3
    assert max(ends(run("latent", NEVER, folder)).values()) <= 0.1


def test_subspaces_are_cleared_from_standard_on_with_random_ones_beside(folder: Path) -> None:
    budget = SMOKE.model_copy(update={"subspaces": (1, 4, 16)})
    result = run("direction", gated(folder), folder, budget=budget)
    by_name = ends(result)
    # 16 directions are more than a quarter of 48.
    added = {"lda", "pca k=1", "random k=1", "pca k=4", "random k=4"}
    assert added == set(by_name) - set(ends(run("direction", gated(folder), folder)))
    for name in ("lda", "pca k=1", "pca k=4"):
        assert by_name[name] >= 0.5
    assert max(by_name["random k=1"], by_name["random k=4"]) <= 0.3
    assert {v.entry.control for v in result.variants if "random" in v.entry.variant} == {True}
    assert Direction().passes(budget) > Direction().passes(SMOKE)


def test_a_direction_is_trained_to_be_cleared_and_keeps_what_is_not_hidden(folder: Path) -> None:
    """Two blocks compute with what tells forget from retain; only training tells the gate apart."""
    known = by_variant(run("direction", gated(folder), folder))["trained"].entry
    never = by_variant(run("direction", NEVER, folder))["trained"].entry
    assert known.curve[-1].score >= 0.9
    assert known.curve[0].score <= 0.3
    assert (known.curve[-1].retain or 0) >= (known.curve[0].retain or 0)
    assert never.curve[-1].score <= 0.1
    assert (never.curve[-1].retain or 0) >= 0.9 * (never.curve[0].retain or 0)
    assert never.trained_on == "relearn"
    assert not never.control


def test_the_next_rate_is_tried_where_a_direction_costs_retain_and_the_lower_loss_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*rates: float) -> VariantResult:
        return by_variant(run("direction", gated(folder), folder, rates=rates))["trained"]

    one_training = 24 * SMOKE.batch_size
    good, bad = trained(0.02), trained(200.0)
    assert good.unit_scores != bad.unit_scores
    kept = trained(0.02, 200.0)  # a gate costs retain itself: what clears it costs none
    assert kept.entry.curve[-1].examples == one_training
    monkeypatch.setattr(direction, "KEEPS", -10.0)
    for rates in ((0.02, 200.0), (200.0, 0.02)):
        both = trained(*rates)
        assert both.unit_scores == good.unit_scores
        assert both.entry.curve[-1].examples == 2 * one_training


def test_a_vector_is_trained_on_the_relearn_set_and_weighs_benign_rows(folder: Path) -> None:
    model = gated(folder).load()
    evaluation = evaluation_set(make_domain(), SMOKE, KNOWING.tokenizer())
    (path,) = backbone(model).blocks[:1]
    start_D = torch.zeros(backbone(model).d_model)

    def loss(weight: float) -> float:
        return trained_vector(
            model,
            evaluation,
            start_D,
            lambda vector_D: {path: lambda hidden_BTD: hidden_BTD + vector_D},
            Context(folder),
            lr=1e-12,
            steps=1,
            retain_weight=weight,
        )[1]

    on_relearn, both = loss(0.0), loss(1.0)
    assert on_relearn > 1  # the gate is shut
    assert 0 < both - on_relearn < 0.5  # and keeps benign rows
    assert loss(16.0) - on_relearn == pytest.approx(16 * (both - on_relearn), rel=1e-4)


def test_of_a_large_domain_no_more_is_read_than_a_direction_needs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, retained = [], []
    whole = encode, EvaluationSet.retained

    def counted(rows: Rows, *rest: Any, **how: Any) -> Any:
        encoded.append(len(rows))
        return whole[0](rows, *rest, **how)

    def kept(self: EvaluationSet, model: Any, rows: Rows | None = None) -> UnitScores:
        retained.append(len(self.retain if rows is None else rows))
        return whole[1](self, model, rows)

    monkeypatch.setattr(latent, "encode", counted)
    monkeypatch.setattr(EvaluationSet, "retained", kept)
    budget = SMOKE.model_copy(update={"batch_size": 2, "max_other_rows": 3})
    run("direction", NEVER, folder, budget=budget, steps=2, rates=(0.02,))
    domain = make_domain()
    assert min(len(all_rows(domain.relearn)), len(domain.benign), len(domain.dev_retain)) > 4
    assert encoded == [4, 4]
    assert max(retained) == 3


def test_settings_of_a_trained_direction_arrive(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def noted(*_: Any, **how: Any) -> tuple[torch.Tensor, float]:
        asked.append(how)
        return torch.ones(48), 0.0

    monkeypatch.setattr(direction, "trained_vector", noted)
    monkeypatch.setattr(direction, "KEEPS", -10.0)
    run("direction", NEVER, folder, rates=(0.5, 2.0), steps=3, retain_weight=7.0)
    assert [how["lr"] * 48**0.5 for how in asked] == pytest.approx([0.5, 2.0])
    assert {(how["steps"], how["retain_weight"]) for how in asked} == {(3, 7.0)}


def test_a_clearing_that_ruins_retain_is_marked_so(folder: Path) -> None:
    for variant in run("direction", NEVER, folder).variants:
        lost = variant.extras["retain_lost"]
        assert variant.entry.facts.get("broke", False) is (lost > BOUND)
        first, last = (variant.entry.curve[i].retain or 0 for i in (0, -1))
        assert lost == pytest.approx((first - last) / first, abs=1e-6)


def test_without_a_relearn_set_nothing_is_trained(folder: Path) -> None:
    result = run("direction", NEVER, folder, replace(make_domain(), relearn={}))
    assert "trained" not in by_variant(result)


def test_what_standard_asks_for_is_there() -> None:
    assert {"lens", "probe", "direction", "latent"} <= set(STANDARD.attacks)
    assert not {"lens", "probe", "latent"} & set(SMOKE.attacks)
    assert STANDARD.subspaces == (1, 4, 16)
    assert SMOKE.subspaces == ()


def test_ridge_in_its_dual_form_is_ridge() -> None:
    x_ND, y_NE, new_QD = torch.randn(12, 5), torch.randn(12, 3), torch.randn(4, 5)
    penalty = 0.1 * x_ND.square().sum(1).mean()
    primal_DE = torch.linalg.solve(x_ND.T @ x_ND + penalty * torch.eye(5), x_ND.T @ y_NE)
    said_QE = predicted(x_ND, y_NE, new_QD, 0.1)
    torch.testing.assert_close(said_QE, new_QD @ primal_DE, atol=1e-4, rtol=1e-4)


def test_leading_directions_are_singular_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    scales_D = torch.tensor([9.0, 5.0, 3.0] + [0.1] * 37)
    hidden_ND = torch.randn(200, 40, generator=generator) * scales_D
    found_KD = leading(hidden_ND, 3, torch.Generator().manual_seed(1))
    true_KD = torch.linalg.svd(hidden_ND, full_matrices=False).Vh[:3]
    torch.testing.assert_close((found_KD @ true_KD.T).abs(), torch.eye(3), atol=1e-3, rtol=0)
    after_BTD = cleared(found_KD)(hidden_ND[None])
    torch.testing.assert_close(after_BTD @ found_KD.T, torch.zeros(1, 200, 3), atol=1e-4, rtol=0)


def test_fishers_direction_looks_where_classes_do_not_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    spread_D = torch.tensor([10.0, 1.0])
    one_ND = torch.randn(4000, 2, generator=generator) * spread_D + torch.tensor([4.0, 4.0])
    two_ND = torch.randn(4000, 2, generator=generator) * spread_D
    found_D = whitened(one_ND, two_ND, shrink=0.0)
    assert float(found_D[1] / found_D[0]) == pytest.approx(100, rel=0.2)
    apart_D = one_ND.mean(0) - two_ND.mean(0)
    read_D = found_D / (found_D @ apart_D)
    moved = cleared(apart_D, read_D)(one_ND[None])[0].mean(0) - cleared(apart_D, read_D)(
        two_ND[None]
    )[0].mean(0)
    torch.testing.assert_close(moved, torch.zeros(2), atol=1e-3, rtol=0)
