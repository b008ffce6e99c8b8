"""From files to a domain: roles that never overlap, exposure by the rows, splits read again."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from excise.core.errors import UserError
from excise.data.dedup import find_duplicates
from excise.data.domain import CORE, UNLABELED, Domain, Row, text_of
from excise.data.rows import METRICS
from excise.data.spec import Files
from excise.data.split import read_split, split_of, write_split

Records = list[dict[str, Any]]
WORDS = [f"word{i}" for i in range(500)]


def documents(count: int, seed: int, words: int = 30, **more: Any) -> Records:
    rng = random.Random(seed)
    return [{"text": " ".join(rng.choices(WORDS, k=words)), **more} for _ in range(count)]


def facts(count: int, wordings: int, start: int = 0) -> Records:
    return [
        {"unit": f"fact-{i}", "prompt": f"wording {w} of {i} is", "completion": f" {i * 7}"}
        for i in range(start, start + count)
        for w in range(wordings)
    ]


def put(folder: Path, **files: Records) -> None:
    for name, records in files.items():
        text = "".join(json.dumps(r) + "\n" for r in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def spec(folder: Path, **fields: Any) -> Files:
    fields = {"forget": "f", "retain": "r", **fields}

    def full(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: full(v) for k, v in value.items()}
        return str(folder / f"{value}.jsonl")

    names = {"forget", "retain", "adjacent", "unlabeled", "relearn", "test", "dev_forget",
             "retain_test", "dev_retain", "benign", "adjacent_test", "fresh",
             "multi_hop"}  # fmt: skip
    return Files.model_validate({k: full(v) if k in names else v for k, v in fields.items()})


def units(rows: Iterable[Row]) -> set[str]:
    return {row.unit for row in rows}


def check_disjoint(domain: Domain) -> None:
    """No two roles share a unit, but a capability's forget rows with its own when V was seen."""
    roles = {name: rows for name, rows in domain.roles() if name != "unlabeled"}
    for (a, first), (b, second) in itertools.combinations(roles.items(), 2):
        own = a.startswith("forget.") and b.split(".")[-1] == a.removeprefix("forget.")
        if not (own and domain.exposure == "seen"):
            assert not units(first) & units(second), (a, b)
    flat = [(name, row) for name, rows in roles.items() for row in rows]
    found = find_duplicates([text_of(row) for _, row in flat])
    for i, at in enumerate(found.cluster):
        assert flat[i][0] == flat[at][0]


def test_two_files_are_cut_by_the_stated_shares(tmp_path: Path) -> None:
    put(tmp_path, f=documents(100, 0), r=documents(200, 1))
    domain = spec(tmp_path).build(None)
    sizes = {name: len(rows) for name, rows in domain.roles() if rows}
    assert sizes == {"forget.forget": 40, "dev_forget.forget": 10, "relearn.forget": 25,
                     "test.forget": 25, "retain": 120, "benign": 20, "dev_retain": 20,
                     "retain_test": 40}  # fmt: skip
    assert (domain.exposure, domain.claim) == ("held_out", "capability")
    assert domain.metrics == domain.retain_metrics == ("text_loss",)
    assert {(r.capability, r.label) for r in domain.test["forget"]} == {("forget", 1)}
    assert {(r.capability, r.label) for r in domain.retain} == {("", CORE)}
    assert any("method 40, dev forget 10, relearn 25, test 25" in note for note in domain.notes)
    assert any("no matched fresh text" in note for note in domain.notes)
    check_disjoint(domain)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 999),
    copies=st.lists(st.integers(0, 39), max_size=15),
    groups=st.integers(0, 3),
    wordings=st.integers(1, 3),
    rng=st.randoms(use_true_random=False),
)
def test_order_of_lines_does_not_matter_and_roles_are_disjoint(
    tmp_path: Path, seed: int, copies: list[int], groups: int, wordings: int, rng: random.Random
) -> None:
    forget = documents(40, seed) if wordings == 1 else facts(20, wordings)
    retain = documents(30, seed + 1000)
    for i, row in enumerate(forget):
        row["group"] = f"g{i // 6}" if groups and wordings == 1 else None
    for i in copies:
        source = forget[i % len(forget)] if i % 2 else retain[i % len(retain)]
        copy = {**source, "group": None}
        if "text" in copy:
            copy["text"] += " tail"
        (forget if source in forget else retain).append(copy)
    put(tmp_path, f=forget, r=retain)
    domain = spec(tmp_path, seed=seed).build(None)
    rng.shuffle(forget)
    rng.shuffle(retain)
    put(tmp_path, f=forget, r=retain)
    assert spec(tmp_path, seed=seed).build(None).fingerprint == domain.fingerprint
    check_disjoint(domain)
    roles = ("forget", "dev_forget", "relearn", "test")
    for a, b in itertools.combinations(roles, 2):
        first, second = (getattr(domain, r)["forget"] for r in (a, b))
        assert not ({r.group for r in first} & {r.group for r in second}) - {""}


def test_seeds_split_differently(tmp_path: Path) -> None:
    put(tmp_path, f=documents(40, 0), r=documents(40, 1))
    built = {spec(tmp_path, seed=s).build(None).fingerprint for s in (0, 1, 1)}
    assert len(built) == 2


def test_wordings_of_forget_units_are_withheld(tmp_path: Path) -> None:
    put(tmp_path, f=facts(50, 3) + facts(5, 1, start=90), r=documents(40, 1))
    domain = spec(tmp_path).build(None)
    assert (domain.exposure, domain.claim) == ("seen", "deletion")
    assert domain.metrics == METRICS["completion"]
    method = domain.forget["forget"]
    assert len(units(method)) == 55
    apart = [getattr(domain, r)["forget"] for r in ("relearn", "test", "dev_forget")]
    assert [len(units(rows)) for rows in apart] == [20, 20, 10]
    seen = {text_of(row) for row in method}
    assert not seen & {text_of(row) for rows in apart for row in rows}
    assert len(method) == 50 * 2 + 5
    check_disjoint(domain)


def test_chunks_of_documents_are_no_wordings(tmp_path: Path) -> None:
    put(tmp_path, f=[{**r, "unit": i // 2} for i, r in enumerate(documents(60, 0))],
        r=documents(40, 1))  # fmt: skip
    assert spec(tmp_path).build(None).exposure == "held_out"
    numbered = [{**r, "unit": i // 2, "wording": i % 2} for i, r in enumerate(documents(60, 0))]
    put(tmp_path, f=numbered)
    assert spec(tmp_path).build(None).exposure == "seen"
    assert spec(tmp_path, exposure="held_out").build(None).exposure == "held_out"
    assert spec(tmp_path, exposure="unknown").build(None).exposure == "unknown"


def test_duplicates_are_one_unit_and_noted(tmp_path: Path) -> None:
    forget = documents(30, 0)
    near = {"text": forget[3]["text"] + " and so on"}
    put(tmp_path, f=[*forget, forget[0], near], r=documents(30, 1))
    domain = spec(tmp_path).build(None)
    assert len(units(r for name, rows in domain.roles() if "forget" in name for r in rows)) == 30
    assert any("1 exact duplicates" in n and "f.jsonl line 31 with" in n for n in domain.notes)
    assert any("1 near duplicates" in n and "f.jsonl line 32 with" in n for n in domain.notes)
    assert not any(word in note for note in domain.notes for word in forget[0]["text"].split())


def test_units_named_apart_are_merged_when_their_texts_are_copies(tmp_path: Path) -> None:
    forget = [{**row, "unit": f"id-{i:02}"} for i, row in enumerate(documents(30, 0))]
    put(tmp_path, f=[*forget, {**forget[5], "unit": "id-99"}], r=documents(30, 1))
    domain = spec(tmp_path).build(None)
    named = units(r for name, rows in domain.roles() if "forget" in name for r in rows)
    assert named == {f"id-{i:02}" for i in range(30)}
    assert any("1 of these had different unit ids" in note for note in domain.notes)


def test_several_capabilities_are_numbered_and_share_groups_whole(tmp_path: Path) -> None:
    put(
        tmp_path,
        a=[{**r, "group": f"g{i // 2}"} for i, r in enumerate(documents(40, 0))],
        b=[{**r, "group": f"g{i // 2}"} for i, r in enumerate(documents(40, 2))],
        r=documents(40, 1),
    )
    domain = spec(tmp_path, forget={"bio": "a", "cyber": "b"}).build(None)
    assert {r.label for r in domain.forget["bio"]} == {1}
    assert {r.label for r in domain.test["cyber"]} == {2}
    role: dict[str, str] = {}
    for name, rows in domain.roles():
        for row in rows:
            if row.capability:
                assert role.setdefault(row.group, name.split(".")[0]) == name.split(".")[0]
    check_disjoint(domain)


def test_files_for_roles_are_not_cut(tmp_path: Path) -> None:
    put(tmp_path, f=documents(20, 0), r=documents(20, 1), t=documents(5, 2), v=documents(6, 3),
        s=documents(7, 4), n=documents(8, 5), d=documents(3, 6), e=documents(4, 7),
        b=documents(5, 8), a=documents(9, 9), w=documents(2, 10))  # fmt: skip
    domain = spec(
        tmp_path, relearn="t", test="v", dev_forget="d", retain_test="s", dev_retain="e",
        benign="b", adjacent="a", adjacent_test="w", fresh="n",
    ).build(None)  # fmt: skip
    sizes = {name: len(rows) for name, rows in domain.roles()}
    assert sizes == {"forget.forget": 20, "relearn.forget": 5, "test.forget": 6,
                     "dev_forget.forget": 3, "retain": 20, "retain_test": 7, "dev_retain": 4,
                     "benign": 5, "adjacent": 9, "adjacent_test": 2, "unlabeled": 0,
                     "fresh": 8}  # fmt: skip
    assert domain.exposure == "held_out"
    assert not any("fresh" in note for note in domain.notes)


def test_one_role_from_a_file_leaves_the_others_cut(tmp_path: Path) -> None:
    put(tmp_path, f=documents(20, 0), r=documents(20, 1), v=documents(6, 3))
    domain = spec(tmp_path, test="v").build(None)
    cut = [len(getattr(domain, r)["forget"]) for r in ("forget", "dev_forget", "relearn", "test")]
    assert cut == [13, 2, 5, 6]


def test_a_test_file_about_forget_units_is_seen(tmp_path: Path) -> None:
    ask = [{"unit": f"fact-{i}", "question": f"What is {i}?", "choices": [f"{i}", "none"],
            "answer": 0} for i in range(8)]  # fmt: skip
    put(tmp_path, f=facts(30, 2), r=documents(20, 1), v=ask)
    domain = spec(tmp_path, test="v").build(None)
    assert domain.exposure == "seen"
    assert domain.metrics[0] == "multiple_choice"
    assert not units(domain.relearn["forget"]) & units(domain.test["forget"])
    assert not units(domain.dev_forget["forget"]) & units(domain.test["forget"])
    assert units(domain.test["forget"]) <= units(domain.forget["forget"])


def test_unlabelled_rows_keep_the_truth_and_lose_what_is_scored(tmp_path: Path) -> None:
    forget, retain = documents(40, 0), documents(40, 1)
    put(tmp_path, f=forget, r=retain, u=[*forget, *retain, *documents(10, 2)])
    domain = spec(tmp_path, unlabeled="u").build(None)
    assert {r.label for r in domain.unlabeled} == {UNLABELED}
    by_truth = {c: units(r for r in domain.unlabeled if r.capability == c) for c in ("", "forget")}
    assert by_truth["forget"] == units(domain.forget["forget"])
    assert by_truth[""] >= units(domain.retain)
    assert not units(domain.unlabeled) & units([*domain.test["forget"], *domain.retain_test])
    assert any("16 of 50 unlabelled rows are about forget units" in n for n in domain.notes)


def test_unlabelled_rows_of_seen_units_lose_withheld_wordings_only(tmp_path: Path) -> None:
    put(tmp_path, f=facts(30, 3), r=documents(20, 1), u=facts(30, 3))
    domain = spec(tmp_path, unlabeled="u").build(None)
    assert {text_of(r) for r in domain.unlabeled} == {text_of(r) for r in domain.forget["forget"]}


def test_refit_gives_the_method_every_forget_row(tmp_path: Path) -> None:
    put(tmp_path, f=documents(40, 0), r=documents(40, 1))
    plain, refit = (spec(tmp_path, refit=r).build(None) for r in (False, True))
    assert len(refit.forget["forget"]) == 40
    assert refit.test == plain.test
    assert refit.retain == plain.retain
    assert refit.exposure == "seen"
    assert any("refit" in note for note in refit.notes)


@pytest.mark.parametrize("sensitive", [False, True])
@pytest.mark.parametrize("wordings", [1, 3])
def test_a_later_audit_reads_the_same_split(wordings: int, sensitive: bool, tmp_path: Path) -> None:
    put(tmp_path, f=facts(40, wordings), r=documents(40, 1), a=documents(10, 2))
    made = spec(tmp_path, adjacent="a", seed=5, sensitive=sensitive)
    domain = made.build(None)
    path = tmp_path / "split.json"
    write_split(path, split_of(domain, seed=5, sources=made.hashes()))
    assert ("fact-7" in path.read_text()) != sensitive
    later = spec(tmp_path, adjacent="a", seed=9, sensitive=sensitive, split=str(path))
    assert later.build(None).fingerprint == domain.fingerprint
    assert read_split(path).fingerprint == domain.fingerprint
    put(tmp_path, f=facts(41, wordings))
    with pytest.raises(UserError, match=r"forget\.forget: f\.jsonl differs from what was split"):
        later.build(None)


def test_claim_metrics_and_chunks_as_asked(tmp_path: Path) -> None:
    put(tmp_path, f=facts(20, 1), r=documents(20, 1))
    domain = spec(
        tmp_path, claim="deletion", metrics=("text_loss",), chunk_words=10, title="mine"
    ).build(None)
    assert (domain.name, domain.claim, domain.metrics) == ("mine", "deletion", ("text_loss",))
    assert {len(r.text.split()) for r in domain.retain} == {10}
    assert len(domain.retain) == 12 * 3
    assert len(units(domain.retain)) == 12


def test_a_deletion_scores_rows_that_the_method_sees(tmp_path: Path) -> None:
    put(tmp_path, f=documents(20, 0, words=150), r=documents(20, 1))
    domain = spec(tmp_path, claim="deletion").build(None)
    forget, test = domain.forget["forget"], domain.test["forget"]
    apart = [units(rows["forget"]) for rows in (domain.relearn, domain.test, domain.dev_forget)]
    assert [len(each) for each in apart] == [8, 8, 4]
    assert len(set().union(*apart)) == len(units(forget)) == 20
    assert set(test) < set(forget)
    assert domain.verbatim
    assert (domain.exposure, domain.metrics) == (
        "seen",
        ("text_loss", "continuation", "extraction_strength"),
    )
    # All of a document is trained on and scored, in pieces that fit.
    assert {len(row.text.split()) for row in test} == {50}
    assert len(test) == 8 * 3
    write_split(
        tmp_path / "s.json", split_of(domain, sources=spec(tmp_path, claim="deletion").hashes())
    )
    # A later audit need not be told: the split says so.
    later = spec(tmp_path, split=str(tmp_path / "s.json"))
    assert later.build(None).fingerprint == domain.fingerprint
    plain = spec(tmp_path)
    write_split(tmp_path / "p.json", split_of(plain.build(None), sources=plain.hashes()))
    with pytest.raises(UserError, match="was not made for a deletion"):
        spec(tmp_path, claim="deletion", split=str(tmp_path / "p.json")).build(None)


def test_paraphrases_of_a_deletion_are_withheld_for_test_units_alone(tmp_path: Path) -> None:
    worded = [
        {"text": " ".join(random.Random(f"{i} {w}").choices(WORDS, k=20)), "unit": f"d{i}",
         "wording": w}
        for i in range(10) for w in range(4)
    ]  # fmt: skip
    put(tmp_path, f=worded, r=documents(20, 1))
    domain = spec(tmp_path, claim="deletion").build(None)
    hidden, test = domain.paraphrases["forget"], domain.test["forget"]
    assert units(hidden) == units(test)
    assert len(hidden) == len(units(test)) == 4
    assert 0 not in {row.wording for row in hidden}
    assert len(domain.forget["forget"]) == 40 - 4
    assert not set(hidden) & set(domain.forget["forget"])


@pytest.mark.parametrize(("named", "tested", "scored"), [(10, 4, 4), (3, 3, 3)])
def test_a_file_for_test_of_a_deletion_holds_paraphrases(
    tmp_path: Path, named: int, tested: int, scored: int
) -> None:
    first, other = documents(10, 0), documents(10, 5)
    put(
        tmp_path,
        f=[{**row, "unit": f"d{i}"} for i, row in enumerate(first)],
        p=[{**row, "unit": f"d{i}"} for i, row in enumerate(other[:named])],
        r=documents(20, 1),
        x=documents(3, 9),
    )
    domain = spec(tmp_path, claim="deletion", test="p").build(None)
    test = units(domain.test["forget"])
    assert len(test) == tested
    assert len(domain.paraphrases["forget"]) == scored
    assert units(domain.paraphrases["forget"]) == test
    assert not test & units(domain.relearn["forget"])
    assert len(domain.forget["forget"]) == 10
    texts = {row.text for row in domain.test["forget"]}
    assert texts < {row["text"] for row in first}
    with pytest.raises(UserError, match=r"x\.jsonl line 1: is about no unit of forget\.forget"):
        spec(tmp_path, claim="deletion", test="x").build(None)
    # The documents themselves choose which are scored, and are no paraphrases.
    put(tmp_path, v=[{**row, "unit": f"d{i}"} for i, row in enumerate(first[:3])])
    chosen = spec(tmp_path, claim="deletion", test="v").build(None)
    assert units(chosen.test["forget"]) == {"d0", "d1", "d2"}
    assert not chosen.paraphrases


def hops(start: int, count: int) -> Records:
    return [
        {"unit": f"fact-{i}", "prompt": f"what follows from {i + 500} is", "completion": f" {i}"}
        for i in range(start, start + count)
    ]


def test_multi_hop_questions_end_in_test_units(tmp_path: Path) -> None:
    own = {"prompt": "what follows from nothing is", "completion": " none"}
    put(tmp_path, f=facts(30, 3), r=documents(20, 1), m=[*hops(0, 30), own])
    domain = spec(tmp_path, multi_hop="m").build(None)
    asked, test = domain.multi_hop["forget"], units(domain.test["forget"])
    assert test < units(asked)
    (other,) = units(asked) - test  # a row that names no unit is one by itself
    assert other.startswith("text-")
    assert any("multi_hop.forget: 18 rows about units outside" in note for note in domain.notes)
    assert domain.test == spec(tmp_path).build(None).test
    assert {row.label for row in asked} == {1}
    # They decide nothing about the split, which serves audits with other ones.
    plain = spec(tmp_path)
    write_split(tmp_path / "s.json", split_of(plain.build(None), sources=plain.hashes()))
    again = spec(tmp_path, multi_hop="m", split=str(tmp_path / "s.json")).build(None)
    assert again.multi_hop == domain.multi_hop
    with_hops = spec(tmp_path, multi_hop="m")
    write_split(tmp_path / "h.json", split_of(domain, sources=with_hops.hashes()))
    assert not spec(tmp_path, split=str(tmp_path / "h.json")).build(None).multi_hop


def test_multi_hop_questions_about_other_units_are_refused(tmp_path: Path) -> None:
    put(tmp_path, f=facts(30, 3), r=[*facts(20, 1, start=100), *hops(0, 1)], m=hops(0, 30))
    with pytest.raises(UserError, match=r"share 1 unit"):
        spec(tmp_path, multi_hop="m").build(None)
    put(tmp_path, r=facts(20, 1, start=100))
    plain = spec(tmp_path).build(None)
    trained = sorted(units(plain.relearn["forget"]))[:2]
    put(tmp_path, m=[row for row in hops(0, 30) if row["unit"] in trained])
    with pytest.raises(UserError, match=r"m\.jsonl line 1: no row of multi_hop\.forget ends in"):
        spec(tmp_path, multi_hop="m").build(None)


def test_groups_in_forget_and_retain_are_noted(tmp_path: Path) -> None:
    put(tmp_path, f=documents(20, 0), r=[*documents(19, 1), *documents(1, 5, group="g")])
    assert not any("in common" in note for note in spec(tmp_path).build(None).notes)
    put(tmp_path, f=[*documents(19, 0), *documents(1, 6, group="g")])
    assert any("1 group in common" in note for note in spec(tmp_path).build(None).notes)


def test_units_that_two_sets_share_can_be_left_out(tmp_path: Path) -> None:
    forget = [{"text": f"the forget text {i}"} for i in range(20)]
    retain = [{"text": f"another text {i}"} for i in range(20)]
    tested = [forget[0], *retain[:2], {"text": "a text of its own"}]
    for name, rows in (("f", forget), ("r", retain + forget[:3]), ("t", tested), ("u", tested[:3])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def build(**more: Any) -> Domain:
        files = {"forget": str(tmp_path / "f.jsonl"), "retain": str(tmp_path / "r.jsonl")}
        return Files.model_validate({**files, "overlaps": "leave_out", **more}).build(None)

    domain = build()
    roles = ("retain", "retain_test", "benign", "dev_retain")
    kept = [row.text for role in roles for row in getattr(domain, role)]
    assert sorted(kept) == sorted(row["text"] for row in retain)
    assert "retain: 3 rows that repeat forget.forget were left out" in domain.notes
    domain = build(retain_test=str(tmp_path / "t.jsonl"))
    assert [row.text for row in domain.retain_test] == ["a text of its own"]
    assert "retain_test: 3 rows that repeat forget.forget or retain were left out" in domain.notes
    with pytest.raises(UserError, match=r"every row of retain_test repeats one of forget\.forget"):
        build(retain_test=str(tmp_path / "u.jsonl"))
