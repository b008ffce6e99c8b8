"""Studies of separability, a planted shortcut and moefication: data, decisions, tiny runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.studies.tiny_setting import QUICK, ran, ran_twice

from excise.domains.facts import Facts
from excise.evals.stats import Estimate
from excise.methods import TokenFilter
from excise.methods.base import Method
from excise.methods.pretraining.moefy import Moefy
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.spec import Scratch
from excise.record import StudyRecord
from excise_studies.attacking import Attacker
from excise_studies.levels import levels
from excise_studies.routing.domain_pairs import FETCHED, PAIRS, Sizes, make_pair
from excise_studies.routing.moefication import DENSE, MEASURED, RANDOM, Moefication
from excise_studies.routing.moefication import conditions as moefied
from excise_studies.routing.moefication import decide as decide_moefication
from excise_studies.routing.routing_scale import RoutingScale
from excise_studies.routing.separability import FILTERED, PLAIN, ROUTED, PairCosts, Separability
from excise_studies.routing.separability import conditions as separability_conditions
from excise_studies.routing.separability import decide as decide_separability
from excise_studies.routing.setting import facts_setting
from excise_studies.routing.spurious import (
    CUE,
    HELP,
    MORE,
    PRICE,
    Shortcut,
    ShortcutFacts,
    Spurious,
    shortcut_domain,
    shortcut_tokenizer,
)
from excise_studies.routing.spurious import decide as decide_spurious
from excise_studies.vision.digit_pairs import MODEL, divergence, only
from excise_studies.vision.images import ImageSpec

TINY = Scratch(width=32, blocks=1)
SMALL = Shortcut(subjects=8, relations=1, answers=3, wordings=3)


def by_name(told: StudyRecord | None, title: str) -> dict[tuple[str, str], float | None]:
    """Return the values of a table by condition and metric, those of single seeds left out."""
    assert told is not None
    table = next(table for table in told.tables if table.title == title)
    return {(r.condition, r.metric): r.value for r in table.rows if r.seed is None}


# -- pairs of domains ------------------------------------------------------------------------------


def test_pairs_that_nothing_tells_apart_are_near_and_languages_are_far() -> None:
    small = Sizes(units=100, prose=20)
    found = {
        name: make_pair(name, small, 1)
        for name in ("one topic, halves", "animals / plants", "Spanish / English")
    }
    nats = [pair.nats for pair in found.values()]
    assert nats == sorted(nats)
    assert abs(nats[0]) < 0.1
    assert found["one topic, halves"].accuracy < 0.75
    assert found["Spanish / English"].accuracy == 1.0


def test_a_pair_scores_what_it_does_not_teach() -> None:
    pair = make_pair("one novel / another", Sizes(units=60, prose=20), 0)
    domain = pair.domain
    for taught, scored in (
        (domain.forget["away"], domain.test["away"]),
        (domain.adjacent, domain.adjacent_test),
        (domain.retain, domain.retain_test),
    ):
        assert scored
        assert not {row.group for row in taught} & {row.group for row in scored}
    assert {row.label for row in domain.forget["away"]} == {1}
    assert not any("persuasion" in row.group for row in (*domain.retain, *domain.retain_test))
    again = make_pair("one novel / another", Sizes(units=60, prose=20), 0)
    assert again.domain.fingerprint == domain.fingerprint
    other = make_pair("one novel / another", Sizes(units=60, prose=20), 1)
    assert other.domain.fingerprint != domain.fingerprint


def test_separability_refuses_pairs_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"no pair 'animals / plant'; .*animals / plants"):
        Separability(pairs=("animals / plant", "one topic, halves"))
    with pytest.raises(ValueError, match="names a pair twice"):
        Separability(pairs=("one topic, halves", "one topic, halves"))
    with pytest.raises(ValueError, match="different digits"):
        Separability(digits=((3, 3),))
    assert set(Separability.full().pairs) == {*PAIRS, *FETCHED}


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (-0.9, -0.5, "near domains cost more"),
        (-0.2, 0.4, "near domains do not cost more"),
        (-0.9, 0.1, "undecided"),
        (float("nan"), float("nan"), "undecided"),
    ],
)
def test_separability_is_decided_from_both_sides(low: float, high: float, wanted: str) -> None:
    rho = Estimate((low + high) / 2, low, high, 8)
    assert decide_separability(Separability(), rho).text.startswith(wanted)


def test_separability_runs_through(tmp_path: Path) -> None:
    study = Separability(
        seeds=(1,),
        pairs=("animals / plants", "one topic, halves"),
        sizes=Sizes(units=20, prose=20),
        vocabulary=300,
        model=TINY,
        pretrain=Pretrain(fit=QUICK, max_length=12),
        digits=((0, 1), (3, 8)),
        images=ImageSpec(train=60, dev=10, test=60, shrink=4),
        autoencoder=MODEL.model_copy(update={"hidden": (8,), "code": 4, "fit": QUICK}),
    )
    made = ran(study, tmp_path / "out").study
    drawn = by_name(made, "Pairs of digits, the farthest first")
    assert {condition for condition, _ in drawn} == {"all pairs", "0 / 1", "3 / 8"}
    held = by_name(made, "Pairs, the farthest first")
    for pair in study.pairs:
        costs = {f"{a} - {b}" for a, b in ((ROUTED, PLAIN), (FILTERED, PLAIN), (ROUTED, FILTERED))}
        values = {cost: held[pair, f"beside: {cost}"] for cost in costs}
        assert None not in values.values()
        routed, filtered = values["routed - plain"] or 0, values["filtered - plain"] or 0
        assert values["routed - filtered"] == pytest.approx(routed - filtered)


def test_the_correlation_is_that_of_ranks() -> None:
    """Costs that fall with the divergence give -1 and those that rise 1, whatever their size."""
    study = Separability(seeds=(1,), pairs=("one topic, halves", "animals / plants"))
    drawn = {(n, 1): make_pair(n, Sizes(units=40, prose=20), 1) for n in study.pairs}
    for near, far, wanted in ((3.0, 0.1, -1.0), (0.1, 0.2, 1.0)):
        scores = {
            (name, "adjacent_test"): levels(
                {PLAIN: {1: {"a": 1.0, "b": 1.0}}, ROUTED: {1: {"a": 1 + cost, "b": 1 + cost}}}, {}
            )
            for name, cost in zip(study.pairs, (near, far), strict=True)
        }
        assert PairCosts(study, drawn, scores).rho(PLAIN).value == pytest.approx(wanted)


def test_passages_of_a_pair_may_stand_in_one_text() -> None:
    sizes = Sizes(units=40, prose=20)
    apart, side_by_side = (
        make_pair("animals / plants", sizes, 1, together=together) for together in (False, True)
    )
    assert side_by_side.nats == apart.nats
    mixed = side_by_side.domain.forget["away"]
    for row, alone in zip(mixed, apart.domain.forget["away"], strict=True):
        held = row.text[row.spans[0].start : row.spans[0].end] if row.spans else row.text
        assert (held, row.label) == (alone.text, 1)
    beside = {row.text for row in apart.domain.adjacent}
    company = [row.text.replace(row.text[s.start : s.end], "").strip() for row in mixed
               for s in row.spans]  # fmt: skip
    assert {*company, *(row.text for row in side_by_side.domain.adjacent)} == beside
    assert {row.spans[0].start > 0 for row in mixed if row.spans} == {False, True}


def test_separability_with_labels_of_parts_runs_through(tmp_path: Path) -> None:
    study = Separability(
        seeds=(1,),
        pairs=("animals / plants", "one topic, halves"),
        sizes=Sizes(units=20, prose=20),
        vocabulary=300,
        model=TINY,
        pretrain=Pretrain(fit=QUICK, max_length=24),
        digits=(),
        together=True,
    )
    trained = separability_conditions(study)
    assert isinstance(trained[FILTERED], TokenFilter)
    assert {method.pretrain.max_length for method in trained.values()} == {48}  # type: ignore[attr-defined]
    made = ran(study, tmp_path / "out").study
    assert {n for n, _ in by_name(made, "Pairs, the farthest first")} == set(study.pairs)


@pytest.mark.slow
def test_routing_scale_runs_through(tmp_path: Path) -> None:
    study = RoutingScale(
        seeds=(1, 2),
        sizes=Sizes(units=20, prose=20),
        vocabulary=300,
        model=TINY,
        pretrain=Pretrain(fit=QUICK, max_length=24),
        widths=(16, 24, 32, 48),
        shares=(0.5, 1.0),
    )
    made = ran_twice(study, tmp_path)
    assert {row.condition for row in made.tables[0].rows} == {f"width {w}" for w in study.widths}
    assert [contrast.name for contrast in made.contrasts] == ["S"]


def test_three_is_nearer_to_eight_than_nought_to_one() -> None:
    drawn = ImageSpec(train=400, dev=10, test=300, shrink=4).split(0)
    far = divergence(only(drawn, (0, 1)), (0, 1))
    assert far > 2 * divergence(only(drawn, (3, 8)), (3, 8)) > 0
    assert set(only(drawn, (3, 8)).test.labels_N.tolist()) == {3, 8}


# -- a planted shortcut ----------------------------------------------------------------------------


def test_the_cue_is_right_as_often_as_planted_and_flipped_in_the_test() -> None:
    spec = Shortcut(subjects=60, relations=4, cued=0.6, aligned=0.95)
    domain, facts = shortcut_domain(spec, 3), ShortcutFacts(spec, 3)
    _, answers, cues = facts.words

    def right(row: object) -> bool:
        prompt, completion = row.prompt, row.completion.strip()  # type: ignore[attr-defined]
        relation = next(i for i, each in enumerate(answers) if completion in each)
        word = prompt.split()[0]
        return cues[relation].index(word) == answers[relation].index(completion)

    cued = domain.forget[CUE]
    share = len(cued) / (len(cued) + len(domain.retain))
    assert share == pytest.approx(0.6, abs=0.05)
    assert sum(map(right, cued)) / len(cued) == pytest.approx(0.95, abs=0.03)
    assert not any(map(right, domain.test[CUE]))
    assert all(map(right, domain.adjacent_test))
    flat = {word for each in cues for word in each}
    assert not any(row.prompt.split()[0] in flat for row in (*domain.retain, *domain.retain_test))
    scored = [{row.unit for row in rows} for rows in (domain.test[CUE], domain.retain_test)]
    assert scored[0] == scored[1]
    taught = {(row.unit, row.wording) for row in (*cued, *domain.retain)}
    assert not taught & {(row.unit, row.wording) for row in domain.retain_test}
    tokenizer = shortcut_tokenizer(spec, 3)
    for row in (cued[0], domain.test[CUE][0]):
        assert tokenizer.unk_token_id not in tokenizer(row.prompt + row.completion).input_ids


@pytest.mark.parametrize(
    ("helped", "more", "price", "wanted"),
    [
        ((0.2, 0.4), (0.15, 0.3), (0.0, 0.05), "helps: H is above the margin; {}, more than"),
        ((0.2, 0.4), (-0.05, 0.05), (0.0, 0.2), "helps: H is above the margin; {}, as much as"),
        ((0.2, 0.4), (-0.3, -0.2), (0.0, 0.0), "helps: H is above the margin; {}, less than"),
        ((0.2, 0.4), (-0.3, 0.2), (0.0, 0.0), "helps: H is above the margin; {}, whether more"),
        ((-0.2, 0.05), (0.2, 0.3), (0.0, 0.0), "does not help: H is below 0.1; {}, more than"),
        ((0.05, 0.3), (0.2, 0.3), (0.0, 0.0), "undecided: H's interval holds 0.1; {}, more"),
    ],
)
def test_help_against_plain_filtering_and_its_price(
    helped: tuple[float, float], more: tuple[float, float], price: tuple[float, float], wanted: str
) -> None:
    found = {
        name: Estimate(sum(span) / 2, *span, 96)
        for name, span in ((HELP, helped), (MORE, more), (PRICE, price))
    }
    told = decide_spurious(Spurious(), found).text
    assert told.removeprefix("separation ").startswith(wanted.format("where labels are 50 %"))
    assert told.endswith("no cue stands") == (price[1] > 0.1)


def test_spurious_runs_through(tmp_path: Path) -> None:
    study = Spurious(
        seeds=(1,), data=SMALL, model=TINY, pretrain=Pretrain(fit=QUICK, max_length=12),
        rates=(1.0, 0.5),
    )  # fmt: skip
    told = ran(study, tmp_path / "out").study
    three = by_name(told, "Exact match under three cues")
    assert {condition for condition, _ in three} == {
        "plain", "routed, 100 % labels", "filtered, 100 % labels", "routed, 50 % labels",
        "filtered, 50 % labels",
    }  # fmt: skip
    contrasts = by_name(told, "Routed against plain and filtered")
    flipped = {
        condition: value or 0 for (condition, metric), value in three.items() if "flipped" in metric
    }
    assert contrasts["contrast", HELP] == pytest.approx(
        flipped["routed, 100 % labels"] - flipped["plain"]
    )
    assert contrasts["contrast", MORE] == pytest.approx(
        flipped["routed, 50 % labels"] - flipped["filtered, 50 % labels"]
    )


# -- moefication -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chance", "dense", "wanted"),
    [
        ((1.1, 1.9), (4.0, 6.0), "turns separates by over 1 nats more than the same steps dense; "
         "measured neurons separate more than random ones, by over 1 nats"),
        ((0.3, 0.9), (4.0, 6.0), "separate as much as random ones within 1 nats"),
        ((-1.9, -1.1), (0.0, 0.9), "by turns does not separate by 1 nats more than the same steps "
         "dense; measured neurons separate less than random ones, by over 1 nats"),
        ((0.3, 1.9), (0.7, 1.4), "undecided whether routing by turns separates; undecided whether "
         "measured neurons separate more than random ones"),
    ],
)  # fmt: skip
def test_moefication_is_held_against_each_control_on_its_own(
    chance: tuple[float, float], dense: tuple[float, float], wanted: str
) -> None:
    spans = {"S": chance, "C": dense}
    found = {n: Estimate(sum(span) / 2, *span, 96) for n, span in spans.items()}
    decided = decide_moefication(Moefication(), found)
    assert wanted in decided.text
    assert decided.open == ("undecided" in wanted)
    assert [c.thresholds for c in decided.contrasts] == [(-1.0, 1.0), (1.0,)]


def test_moefication_runs_through(tmp_path: Path) -> None:
    fit = QUICK.model_copy(update={"steps": 4})
    study = Moefication(
        seeds=(1,),
        experiment=facts_setting(
            domain=Facts(subjects=12, relations=1, objects=4, forget_share=0.34, cue="category"),
            model=TINY,
            pretrain=Pretrain(fit=fit, max_length=12),
            attacker=Attacker(steps=1, rates=(1e-3,), checkpoints=(0,), batch_size=4),
        ),
        moefy=Moefy(rounds=2, neurons=0.2),
        shares=(1.0,),
    )
    controls: dict[str, Method] = moefied(study)
    assert [m.control for m in controls.values()] == ["none", "random", "dense"]  # type: ignore[attr-defined]
    told = ran(study, tmp_path / "out").study
    held = by_name(told, "Separation without the modules")
    net = {
        condition: held[condition, "net separation"] or 0 for condition in (MEASURED, RANDOM, DENSE)
    }
    first = held["contrast", "S (net separation, measured - random)"]
    assert first == pytest.approx(net[MEASURED] - net[RANDOM])
    rounds = by_name(told, "Utility, separation and size by round")
    assert {condition for condition, _ in rounds} == {
        f"{condition}, round {i}" for condition in (MEASURED, RANDOM, DENSE) for i in (1, 2)
    }
    core = [rounds[f"{MEASURED}, round {i}", "active parameters: core"] or 0 for i in (1, 2)]
    assert core[0] > core[1]
