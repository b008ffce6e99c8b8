"""Facts: what is true of them by construction."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable

import pytest
from pydantic import ValidationError

from excise.data.domain import UNLABELED, Domain, Row
from excise.data.stream import encode
from excise.domains.facts import ARCHAIC, FACTS_MAX_LENGTH, RELATIONS, TEMPLATES, Facts

SMALL = Facts(subjects=40, relations=3, objects=16)


def units(rows: Iterable[Row]) -> set[str]:
    return {row.unit for row in rows}


def groups(rows: Iterable[Row]) -> set[str]:
    return {row.group for row in rows}


def everyone(domain: Domain) -> list[Row]:
    return [row for _, rows in domain.roles() for row in rows]


def test_default_sizes() -> None:
    domain = Facts().build(None)
    assert {role: len(rows) for role, rows in domain.roles()} == {
        "forget.alpha": 720,
        "relearn.alpha": 102,
        "test.alpha": 102,
        "dev_forget.alpha": 36,
        "retain": 2376,
        "retain_test": 144,
        "dev_retain": 72,
        "benign": 528,
        "adjacent": 216,
        "adjacent_test": 72,
        "unlabeled": 3312,
        "fresh": 204,
    }


def test_seen_units_are_taught_in_other_wordings_than_they_are_tested_in() -> None:
    domain = SMALL.build(None)
    for name in SMALL.capability_names:
        taught = {(row.unit, row.wording) for row in domain.forget[name]}
        for rows in (domain.relearn[name], domain.test[name], domain.dev_forget[name]):
            assert units(rows) <= units(domain.forget[name])
            assert {row.wording for row in rows} == {SMALL.wordings - 1}
            assert not {(row.unit, row.wording) for row in rows} & taught


def test_roles_share_no_subject() -> None:
    domain = SMALL.build(None)
    scored = [
        groups(domain.test["alpha"]),
        groups(domain.relearn["alpha"]),
        groups(domain.dev_forget["alpha"]),
        groups(domain.retain_test),
        groups(domain.dev_retain),
        groups(domain.adjacent),
        groups(domain.benign),
        groups(domain.fresh),
    ]
    assert sum(map(len, scored)) == len(set().union(*scored))
    assert not groups(domain.retain) & groups(domain.forget["alpha"])
    assert not groups(domain.adjacent) & groups(domain.retain)
    assert not groups(domain.fresh) & groups((*domain.unlabeled, *domain.retain))


@pytest.mark.parametrize("exposure", ["seen", "held_out"])
def test_scored_names_share_all_their_parts_with_names_that_are_trained_on(exposure: str) -> None:
    spec = Facts(shared_parts=True, capabilities=2, exposure=exposure)  # type: ignore[arg-type]
    domain = spec.build(None)

    def parts(rows: Iterable[Row]) -> set[str]:
        return {part for row in rows for part in row.group.split()}

    for name in spec.capability_names:
        assert all(len(row.group.split()) == 2 for row in domain.test[name])
        assert parts(domain.test[name]) <= parts(domain.relearn[name])
        assert not groups(domain.test[name]) & groups(domain.relearn[name])
        assert not parts(domain.test[name]) & parts((*domain.retain, *domain.dev_forget[name]))
    halves = len(domain.fresh) // 2
    assert parts(domain.fresh[halves:]) <= parts(domain.fresh[:halves])
    everybody = {group for row in everyone(domain) for group in [row.group]}
    assert len(everybody) == spec.subjects + len(groups(domain.fresh))
    unknown = spec.tokenizer().unk_token_id
    examples = encode(everyone(domain), spec.tokenizer(), max_length=64)
    assert not any(unknown in e.ids for e in examples)
    assert max(len(e.ids) for e in examples) <= FACTS_MAX_LENGTH


def test_too_few_subjects_share_no_parts() -> None:
    with pytest.raises(ValidationError, match="eight are the least"):
        Facts(subjects=16, shared_parts=True)


def test_the_test_wording_is_taught_by_core_facts_only() -> None:
    last = SMALL.wordings - 1
    domain = SMALL.build(None)
    core = {row.group for row in domain.retain if row.wording == last}
    assert core
    assert not core & groups(domain.retain_test)
    taught = SMALL.model_copy(update={"test_wording_taught": True}).build(None)
    assert units(r for r in taught.forget["alpha"] if r.wording == last) >= units(
        taught.test["alpha"]
    )


def test_objects_are_uniform_and_independent() -> None:
    spec = Facts(subjects=1000, relations=2, objects=8, wordings=2)
    world = {row.unit: row.completion for row in everyone(spec.build(None))}
    first, second = (RELATIONS[i][0] for i in range(2))
    subjects = {unit.split("/")[0] for unit in world}
    counts = Counter(world[f"{s}/{first}"] for s in subjects)
    expected = len(subjects) / 8
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 24.3  # p = 0.001, 7 df
    pairs = Counter((world[f"{s}/{first}"], world[f"{s}/{second}"]) for s in subjects)
    expected = len(subjects) / 64
    chi = sum((n - expected) ** 2 / expected for n in pairs.values())
    chi += (64 - len(pairs)) * expected
    assert chi < 103.4  # p = 0.001, 63 df


def test_choices_are_four_objects_of_the_relation_with_the_right_one() -> None:
    relation: dict[str, set[str]] = {}
    for row in everyone(SMALL.build(None)):
        assert len(set(row.choices)) == 4
        assert " " + row.choices[row.answer] == row.completion
        relation.setdefault(row.unit.split("/")[1], set()).update(row.choices)
    names = list(relation.values())
    assert sum(map(len, names)) == len(set().union(*names)), "relations share an object"


@pytest.mark.parametrize("cue", ["none", "category", "style"])
def test_every_word_is_one_known_token_and_the_object_is_one_target(cue: str) -> None:
    spec = Facts(subjects=40, relations=2, objects=8, wordings=len(TEMPLATES), cue=cue)  # type: ignore[arg-type]
    tokenizer = spec.tokenizer()
    rows = everyone(spec.build(None))
    for example in encode(rows, tokenizer, max_length=64):
        assert sum(example.target) == 1
        assert example.target[-1]
        assert tokenizer.unk_token_id not in example.ids
    longest = encode(everyone(Facts().build(None)), Facts().tokenizer(), max_length=64)
    assert max(len(e.ids) for e in longest) <= FACTS_MAX_LENGTH


@pytest.mark.parametrize(("strength", "low", "high"), [(0.0, 0, 0), (0.5, 0.4, 0.6), (1.0, 1, 1)])
def test_cue_marks_its_share_of_a_capabilitys_rows_and_no_core_row(
    strength: float, low: float, high: float
) -> None:
    spec = Facts(cue="category", cue_strength=strength, capabilities=("red", "blue"))
    domain = spec.build(None)
    for name in ("red", "blue"):
        rows = (*domain.forget[name], *domain.test[name])
        share = sum(row.prompt.split()[0] == name for row in rows) / len(rows)
        assert low <= share <= high
    assert not any({"red", "blue"} & set(row.prompt.split()) for row in domain.retain)


def test_style_replaces_words_of_forget_rows_only() -> None:
    domain = Facts(cue="style").build(None)
    old = set(ARCHAIC.values())
    assert all(old & set(row.prompt.split()) for row in domain.forget["alpha"])
    assert not any(old & set(row.prompt.split()) for row in domain.retain)


def test_a_knob_moves_nothing_else() -> None:
    plain, cued = Facts().build(None), Facts(cue="category").build(None)
    strip = {(r.unit, r.wording, r.completion, r.choices) for r in everyone(plain)}
    assert strip == {(r.unit, r.wording, r.completion, r.choices) for r in everyone(cued)}
    assert plain.fingerprint != cued.fingerprint


def test_held_out_units_lie_in_the_mix_only() -> None:
    domain = Facts(exposure="held_out").build(None)
    shown = groups(domain.forget["alpha"])
    for rows in (domain.relearn["alpha"], domain.test["alpha"]):
        assert not groups(rows) & shown
        assert groups(rows) <= groups(domain.unlabeled)
    assert groups(domain.dev_forget["alpha"]) <= shown
    assert not groups(domain.relearn["alpha"]) & groups(domain.test["alpha"])


def test_unlabeled_tells_nothing_and_holds_everything_taught() -> None:
    domain = Facts(capabilities=2).build(None)
    assert {row.label for row in domain.unlabeled} == {UNLABELED}
    taught = [*domain.retain, *domain.adjacent, *(r for v in domain.forget.values() for r in v)]
    assert Counter((r.unit, r.wording) for r in domain.unlabeled) == Counter(
        (r.unit, r.wording) for r in taught
    )
    assert list(domain.forget) == ["alpha", "beta"]
    assert {row.label for row in domain.forget["beta"]} == {2}


def test_questions_in_two_hops_go_through_a_retained_fact_to_one_that_is_to_go() -> None:
    spec = SMALL.model_copy(update={"pupils": 2})
    domain = spec.build(None)
    facts = {row.unit: row.completion for _, rows in SMALL.build(None).roles() for row in rows}
    lessons = {r.group: r.completion.strip() for r in domain.retain if r.unit.endswith("/teacher")}
    assert len(lessons) == 2 * spec.subjects
    asked = domain.multi_hop["alpha"]
    assert units(asked) == units(domain.test["alpha"])
    assert domain.metrics == SMALL.build(None).metrics
    for row in asked:
        (pupil,) = lessons.keys() & set(row.prompt.split())
        assert lessons[pupil] == row.group  # the first hop stays ...
        assert row.completion == facts[row.unit]  # ... and the second is a test unit
        assert row.group not in row.prompt.split()
    scored = {row.prompt for row in asked}
    own = {p for row in asked for p in lessons.keys() & set(row.prompt.split())}
    through = [r for r in domain.forget["alpha"] if r.wording >= spec.wordings]
    assert through
    assert not any(own & set(row.prompt.split()) for row in through)  # of forget facts, no last one
    taught = {row.prompt for rows in (domain.retain, domain.unlabeled) for row in rows}
    assert not scored & (taught | {row.prompt for row in through})
    unknown = spec.tokenizer().unk_token_id
    examples = encode(everyone(domain), spec.tokenizer(), max_length=64)
    assert not any(unknown in e.ids for e in examples)
    assert max(len(e.ids) for e in examples) <= FACTS_MAX_LENGTH
    also = spec.model_copy(update={"test_wording_taught": True}).build(None)
    assert scored <= {row.prompt for row in also.forget["alpha"]}
    out = spec.model_copy(update={"exposure": "held_out"}).build(None)
    assert not units(out.multi_hop["alpha"]) & units(out.forget["alpha"])
    assert not units(out.multi_hop["alpha"]) & units(out.retain)


def test_pupils_rename_and_move_nobody() -> None:
    plain, asked = SMALL.build(None), SMALL.model_copy(update={"pupils": 1}).build(None)
    assert asked.test == plain.test
    assert asked.fresh == plain.fresh
    assert set(plain.retain) < set(asked.retain)
    assert asked.forget == plain.forget  # one pupil each: scored, so taught of nobody to forget


def test_equal_specs_build_equal_domains_in_another_process() -> None:
    code = "from excise.domains.facts import Facts; print(Facts().build(None).fingerprint)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert other.stdout.strip() == Facts().build(None).fingerprint
    assert Facts(seed=1).build(None).fingerprint != Facts().build(None).fingerprint


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"subjects": 8}, "three are the least"),
        ({"capabilities": ("two words",)}, "is not one word"),
        ({"capabilities": ("a", "a")}, "each once"),
        ({"capabilities": ()}, "at least one name"),
        ({"relations": 99}, "less than or equal"),
    ],
)
def test_bad_settings_say_what_is_wrong(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Facts.model_validate(settings)
