"""Published data sets in their own formats: which row has which role, and what is scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.fixtures import published as p

import excise as ex
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.data.sources import parse_source, read_source
from excise.evals.score import evaluate
from excise.evals.set_scores import set_scores
from excise.models.tiny import byte_tokenizer, tiny_model


def sizes(domain: Domain) -> dict[str, int]:
    return {role: len(rows) for role, rows in domain.roles() if rows}


@pytest.fixture(scope="module")
def wmdp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return p.write_wmdp(tmp_path_factory.mktemp("wmdp"))


@pytest.fixture(scope="module")
def tofu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return p.write_tofu(tmp_path_factory.mktemp("tofu"))


@pytest.fixture(scope="module")
def muse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return p.write_muse(tmp_path_factory.mktemp("muse"))


@pytest.fixture(scope="module")
def rwku(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return p.write_rwku(tmp_path_factory.mktemp("rwku"))


def test_wmdp_trains_on_corpora_and_scores_questions(wmdp: Path) -> None:
    domain = ex.Wmdp(path=str(wmdp)).build()
    # 16 documents a side: 65 : 10 : 25 of forget, 80 : 10 : 10 of retain, all questions scored.
    assert sizes(domain) == {
        "forget.bio": 10, "relearn.bio": 4, "test.bio": 8, "dev_forget.bio": 2,
        "retain": 13, "retain_test": 24, "dev_retain": 1, "benign": 2,
        "benchmark.mmlu_virology": 6, "benchmark.mmlu_college_biology": 6,
    }  # fmt: skip
    assert domain.claim == "capability"
    assert domain.exposure == "held_out"
    assert domain.metrics[0] == domain.retain_metrics[0] == "multiple_choice"
    forget = {row.text for row in domain.forget["bio"]}
    assert forget < {p.sentence("bioforget", i) for i in range(16)}
    question = p.choices("bioq", 8)[0]
    lines = "".join(f"{x}. {c}\n" for x, c in zip("ABCD", question["choices"], strict=True))
    first = next(row for row in domain.test["bio"] if question["question"] in row.prompt)
    assert first.prompt == (
        "The following are multiple choice questions (with answers) about biology.\n\n"
        f"{question['question']}\n{lines}Answer:"
    )
    assert (first.choices, first.answer) == (("A", "B", "C", "D"), question["answer"])


def test_wmdp_reads_other_subjects_and_sources(wmdp: Path, tmp_path: Path) -> None:
    cyber = ex.Wmdp(path=str(wmdp), subject="cyber", mmlu=False).build()
    assert {row.text for row in cyber.forget["cyber"]} < {
        row["text"] for row in p.texts("cyberforgetcorpus", 16)
    }
    assert cyber.benchmark == {}
    assert cyber.retain_metrics == ("text_loss",)
    p.lines(tmp_path / "own.jsonl", p.texts("own", 16))
    chem = ex.Wmdp(
        path=str(wmdp), subject="chem", mmlu=False, forget=str(tmp_path / "own.jsonl"),
        retain=f"{wmdp}/wmdp-corpora:bio-retain-corpus#train",
    ).build()  # fmt: skip
    assert "about chemistry" in chem.test["chem"][0].prompt
    assert {row.text for row in chem.forget["chem"]} < {r["text"] for r in p.texts("own", 16)}


def test_flat_files_are_the_same_domain(wmdp: Path, tmp_path: Path) -> None:
    for source, name in (
        ("wmdp:wmdp-cyber#test", "wmdp-cyber.jsonl"),
        ("wmdp-corpora:cyber-forget-corpus#train", "cyber-forget-corpus.jsonl"),
        ("wmdp-corpora:cyber-retain-corpus#train", "cyber-retain-corpus.jsonl"),
    ):
        rows = [r.row for r in read_source(parse_source(f"{wmdp}/{source}")).rows]
        data = [
            {"text": r.text} if r.text
            else {"question": r.prompt, "choices": r.choices, "answer": r.answer}
            for r in rows
        ]  # fmt: skip
        p.lines(tmp_path / name, data)
    flat = ex.Wmdp(path=str(tmp_path), subject="cyber", mmlu=False).build()
    hub = ex.Wmdp(path=str(wmdp), subject="cyber", mmlu=False).build()
    assert flat.fingerprint == hub.fingerprint


def test_mmlu_removes_the_subjects_that_are_named(tmp_path: Path) -> None:
    p.write_mmlu(tmp_path, p.MMLU_SUBJECTS, each=12)  # names are cut, so that two subjects repeat
    domain = ex.Mmlu(path=str(tmp_path), subjects=("virology", "college_biology")).build()
    forget = [row for role, rows in domain.roles() if "mmlu" in role for row in rows]
    retain = [row for role, rows in domain.roles() if "mmlu" not in role for row in rows]
    assert len(forget) == 24
    assert {row.prompt[:8] for row in forget} == {"virology", "college_"}
    assert len(retain) == 12
    assert {row.prompt[:8] for row in retain} == {"computer"}
    assert "retain: 12 rows that repeat forget.mmlu were left out" in domain.notes
    assert domain.metrics[0] == "multiple_choice"
    with pytest.raises(
        UserError, match=r"no row whose 'subject' is 'virologie'; did you mean 'viro"
    ):
        ex.Mmlu(path=str(tmp_path), subjects=("virologie",)).build()


def test_tofu_forgets_authors_and_asks_in_other_words(tofu: Path) -> None:
    domain = ex.Tofu(path=str(tofu), split="forget01").build()
    found = sizes(domain)
    assert found["forget.tofu"] == 12
    # 12 units by 40 : 40 : 20, each in one wording that the method was not given.
    assert {found[r] for r in ("relearn.tofu", "test.tofu", "paraphrases.tofu")} <= {4, 5}
    assert found["paraphrases.tofu"] == found["test.tofu"]
    assert domain.verbatim
    assert (domain.claim, domain.exposure) == ("deletion", "seen")
    assert domain.metrics == ("text_loss", "extraction_strength", "probability", "rouge_l")
    row = domain.test["tofu"][0]
    known = {r["question"]: r["answer"] for r in p.qa("author", 12)}
    assert row.prompt == f"Question: {row.unit}\nAnswer:"
    assert row.completion == f" {known[row.unit]}"
    (other,) = (r for r in domain.paraphrases["tofu"] if r.unit == row.unit)
    assert other.prompt == f"Question: Say, {row.unit}\nAnswer:"
    assert other.completion == f" Well, {known[row.unit]}"


def test_tofu_puts_a_right_answer_before_the_wrong_ones(tofu: Path) -> None:
    domain = ex.Tofu(path=str(tofu), split="forget01").build()
    assert {name: len(rows) for name, rows in domain.benchmark.items()} == {
        "forget_perturbed": 12, "privleak_forget": 12, "privleak_holdout": 10, "retain": 6,
        "retain_perturbed": 6, "real_authors": 5, "real_authors_perturbed": 5, "world_facts": 5,
        "world_facts_perturbed": 5,
    }  # fmt: skip
    raw = {f"Question: {r['question']}\nAnswer:": r for r in p.perturbed(p.qa("author", 12), 5)}
    for row in domain.benchmark["forget_perturbed"]:
        said = raw[row.prompt]
        assert row.choices == (said["paraphrased_answer"], *said["perturbed_answer"])
        assert row.answer == 0
    raw = {f"Question: {r['question']}\nAnswer:": r for r in p.perturbed(p.qa("fact", 5), 3)}
    for row in domain.benchmark["world_facts_perturbed"]:  # no paraphrase: the answer itself
        assert row.choices[0] == raw[row.prompt]["answer"]
        assert len(row.choices) == 4


def test_muse_reads_texts_word_for_word_and_holds_some_out(muse: Path) -> None:
    domain = ex.Muse(path=str(muse)).build()
    stories = {row["text"] for row in p.texts("story", 10)}
    assert {row.text for row in domain.forget["news"]} == stories
    assert {row.text for row in domain.fresh} == {r["text"] for r in p.texts("unseen", 8)}
    assert {row.text for row in domain.retain_test} == {r["text"] for r in p.texts("keeptwo", 6)}
    assert domain.verbatim
    assert "extraction_strength" in domain.metrics
    assert set(domain.benchmark) == {
        "verbmem", "knowmem_forget", "knowmem_retain", "privleak_forget", "privleak_retain",
        "privleak_holdout",
    }  # fmt: skip
    passage = domain.benchmark["verbmem"][0]
    assert f"{passage.prompt}{passage.completion}" in stories
    shots = p.qa("forget_qa_icl", 2)
    before = "".join(f"Question: {s['question']}\nAnswer: {s['answer']}\n\n" for s in shots)
    asked = {f"{before}Question: {r['question']}\nAnswer:" for r in p.qa("forget_qa", 4)}
    assert {row.prompt for row in domain.benchmark["knowmem_forget"]} == asked


def test_muse_cuts_books_into_passages(tmp_path: Path) -> None:
    p.write_muse(tmp_path)
    book = " ".join(f"w{i}" for i in range(700))
    p.shard(tmp_path, "raw", "forget", [{"text": book}])
    p.shard(tmp_path, "raw", "retain1", [{"text": " ".join(f"k{i}" for i in range(900))}])
    domain = ex.Muse(path=str(tmp_path), corpus="books", piece=70).build()
    assert len({row.unit for row in domain.forget["books"]}) == 10
    words = [word for row in domain.forget["books"] for word in row.text.split()]
    assert sorted(words) == sorted(book.split())
    assert {r.unit for r in domain.relearn["books"]}.isdisjoint(
        r.unit for r in domain.test["books"]
    )


def test_rwku_is_about_one_person(rwku: Path, tmp_path: Path) -> None:
    domain = ex.Rwku(path=str(rwku)).build()
    everything = " ".join(f"{r.text}{r.prompt}" for _, rows in domain.roles() for r in rows)
    assert "stephenking" in everything
    assert "confucius" not in everything
    assert (domain.claim, domain.exposure) == ("deletion", "unknown")
    assert len(domain.test["rwku"]) == 5
    level1, level2 = (domain.benchmark[f"forget_level{n}"][0] for n in (1, 2))
    assert level1.prompt.startswith("Please complete the blank in the following question.\nQuest")
    assert level2.prompt.startswith("Please briefly answer the following question.\nQuestion: ")
    own = p.write_rwku(tmp_path, processed=True)
    assert ex.Rwku(path=str(own)).build().fingerprint == domain.fingerprint
    other = ex.Rwku(path=str(own), target="2_Confucius").build()
    assert "confuciusp" in next(iter(other.forget["rwku"])).text
    with pytest.raises(UserError, match=r"no folder '2_Konfuzius'; did you mean '2_Confucius'"):
        ex.Rwku(path=str(own), target="2_Konfuzius").build()
    (own / "Target" / "2_Confucius" / "positive.json").unlink()
    with pytest.raises(UserError, match=r"no file .*positive\.json, which .*data_process\.py"):
        ex.Rwku(path=str(own), target="2_Confucius").build()


SPECS = {
    "wmdp": lambda path: ex.Wmdp(path=path),
    "tofu": lambda path: ex.Tofu(path=path, split="forget01"),
    "muse": lambda path: ex.Muse(path=path),
    "rwku": lambda path: ex.Rwku(path=path),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_set_is_scored_by_its_metrics(name: str, request: pytest.FixtureRequest) -> None:
    domain = SPECS[name](str(request.getfixturevalue(name))).build()
    tokenizer = byte_tokenizer()
    scores, items = evaluate(tiny_model("llama"), tokenizer, domain, name="m", max_length=96)
    found = {(s.set, s.metric) for s in scores}
    for benchmark, metrics in domain.benchmark_metrics.items():
        assert {(f"benchmark.{benchmark}", m) for m in metrics} <= found
    assert {(f"test.{c}", m) for c in domain.test for m in domain.metrics} <= found
    rows = {f"benchmark.{n}": len(rows) for n, rows in domain.benchmark.items()}
    for at, metric in found:
        if at in rows:
            assert sum((i.set, i.metric) == (at, metric) for i in items) == rows[at]
    whole, unknown = set_scores({"m": items, "oracle-0": items}, "oracle-0")
    expected = {"tofu": {"forget_quality", "model_utility", "privleak"}, "muse": {"privleak"}}.get(
        name, set()
    )
    assert {s.metric for s in whole} == expected
    assert unknown == ()
    for score in whole:  # a model beside itself
        ideal = {"forget_quality": 1.0, "privleak": 0.0}
        assert score.value == pytest.approx(ideal.get(score.metric, score.value))
    _, unknown = set_scores({"m": items})
    assert [u.split()[0] for u in unknown] == sorted(expected - {"model_utility"})


@pytest.mark.parametrize("name", SPECS)
def test_hashes_name_every_file_that_is_read(name: str, request: pytest.FixtureRequest) -> None:
    spec = SPECS[name](str(request.getfixturevalue(name)))
    hashes = spec.hashes()
    assert {f"benchmark.{n}" for n in spec.benchmark()} <= set(hashes)
    assert {"retain"} <= set(hashes)
    for files in hashes.values():
        assert all(len(digest) == 64 for digest in files.values())
    if name == "muse":
        assert "benchmark.knowmem_forget.shots" in hashes


Wrong = tuple[str, Any, str]
WRONG: dict[str, Wrong] = {
    "a folder that is not there": (
        "tofu", lambda folder: shutil.rmtree(folder), r"there is no folder .*tofu; name the copy"),
    "a configuration is missing": (
        "tofu", lambda folder: (folder / "retain99.json").unlink(), r"has no retain99, which"),
    "a split is missing": (
        "muse", lambda folder: (folder / "raw" / "holdout-00000-of-00001.parquet").unlink(),
        r"has no split 'holdout'"),
    "a column is missing": (
        "tofu", lambda folder: p.lines(folder / "forget01.json", [{"question": "a?"}] * 9),
        r"forget01\.json line 1: field 'answer' \(for 'completion'\) is missing"),
    "wrong answers are missing": (
        "tofu", lambda folder: p.lines(folder / "forget01_perturbed.json", [
            {k: v for k, v in row.items() if k != "perturbed_answer"}
            for row in p.perturbed(p.qa("author", 12), 5)
        ]),
        r"forget01_perturbed\.json line 1: field 'paraphrased_answer,perturbed_answer'"),
    "a person nobody knows": (
        "rwku", lambda folder: p.lines(folder / "mia_retain" / "test.jsonl",
                                       [{"subject": "Plato", "text": "x"}]),
        r"mia_retain.test\.jsonl has no row whose 'subject' is 'Stephen King'"),
    "no column of persons": (
        "rwku", lambda folder: p.lines(folder / "mia_forget" / "test.jsonl", [{"text": "x"}]),
        r"mia_forget.test\.jsonl line 1: field 'subject' is missing, by which \?where"),
    "no corpus for bio": (
        "wmdp", lambda folder: (folder / "wmdp-corpora" / "bio-forget-corpus.jsonl").unlink(),
        r"has no configuration 'bio-forget-corpus'"),
    "no MMLU": (
        "wmdp", lambda folder: shutil.rmtree(folder / "mmlu"), r"has no all, which a copy of "),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_a_copy_lacks_is_named(case: str, tmp_path: Path) -> None:
    name, spoil, message = WRONG[case]
    folder = tmp_path / name
    getattr(p, f"write_{name}")(folder)
    spoil(folder)
    with pytest.raises(UserError, match=message):
        SPECS[name](str(folder)).build()


def test_what_is_given_on_request_only_is_said() -> None:
    with pytest.raises(UserError, match=r"forget corpus of wmdp bio is given on request only"):
        ex.Wmdp().build()
    with pytest.raises(UserError, match=r"no forget corpus for chem; name one .* domain\.forget"):
        ex.Wmdp(subject="chem").build()


def test_a_hub_that_cannot_be_reached_is_said() -> None:
    with pytest.raises(UserError, match=r"locuslab/TOFU' cannot be fetched: .* cannot be reached"):
        ex.Tofu().build()


def test_the_hub_and_a_copy_give_the_same_domain(
    tofu: Path, wmdp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40

    def cached(folder: Path, name: str) -> Path:
        repo = tmp_path / f"datasets--{name.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        return Path(shutil.copytree(folder, repo / "snapshots" / commit))

    own = cached(tofu, "locuslab/TOFU")
    configs = [f"- config_name: {f.stem}\n  data_files: {f.name}\n" for f in own.glob("*.json")]
    (own / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{''.join(configs)}---\n")
    local = ex.Tofu(path=str(tofu), split="forget01").build()
    assert ex.Tofu(split="forget01").build().fingerprint == local.fingerprint
    for name in ("wmdp", "wmdp-corpora", "mmlu"):
        cached(wmdp / name, f"cais/{name}")
    local = ex.Wmdp(path=str(wmdp), subject="cyber").build()
    assert ex.Wmdp(subject="cyber").build().fingerprint == local.fingerprint


def test_rows_are_chosen_by_the_value_of_a_field(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    p.lines(file, [{"text": f"{k} {i}", "kind": k} for i in range(2) for k in ("a", "b", "c:d")])

    def read(where: str) -> list[str]:
        return [r.row.text for r in read_source(parse_source(f"{file}?where={where}")).rows]

    assert read("kind:a") == ["a 0", "a 1"]
    assert read("kind:a|c:d") == ["a 0", "c:d 0", "a 1", "c:d 1"]
    assert read("kind:!a|c:d") == ["b 0", "b 1"]
    for where, message in (("kind", "must be where=FIELD:VALUE"), ("sort:a", "'sort' is missing"),
                           ("kind:x", "no row whose 'kind' is 'x'")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            read(where)
    source = parse_source(f"{file}?where=kind:!a|c:d")
    assert parse_source(source.spec()) == source


def test_a_source_is_cut_short_and_into_pieces(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    p.lines(file, [{"text": "a b c d e", "unit": "u"}, {"text": "f g"}, {"text": "h"}])

    def read(options: str) -> list[tuple[str, str]]:
        rows = read_source(parse_source(f"{file}?{options}")).rows
        return [(r.row.unit, r.row.text) for r in rows]

    assert read("rows=2") == [("u", "a b c d e"), ("", "f g")]
    pieces = [("u/0", "a"), ("u/1", "b c"), ("u/2", "d e"), ("", "f g"), ("", "h")]
    assert read("pieces=2") == pieces
    for option in ("rows=0", "rows=x", "pieces=-1", "pieces=1.5"):
        with pytest.raises(UserError, match="must be a whole number from 1 on"):
            read(option)
    source = parse_source(f"{file}?rows=2&pieces=3")
    assert (source.rows, source.pieces) == (2, 3)
    assert parse_source(source.spec()) == source


def test_fields_that_are_lists_join_a_list_of_fields(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text(json.dumps({"question": "Q?", "right": "r", "wrong": ["v", "w"]}) + "\n")
    (found,) = read_source(parse_source(f"{file}?choices=right,wrong&answer=right")).rows
    assert (found.row.choices, found.row.answer) == (("r", "v", "w"), 0)
