"""Everyday jobs by command, on files in the published formats: WMDP research, a deletion."""

from __future__ import annotations

import hashlib
import random
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import excise as ex
from excise.cli import main
from excise.models.checkpoint import Checkpoint
from excise.record import Record, load
from excise.record.measured import failed_attacks
from tests.cli import material as m
from tests.fixtures import published as p

ALL = "few_shot, prefix, direction, quantize, benign, relearn, transfer"
DATA = "--forget corpus.jsonl --retain wiki.jsonl --test bio.jsonl --retain-test mmlu.jsonl"
METHOD = "--layer 0 --fit.steps 2 --max_length 32 --model model --workers 1 --quiet"
OWN = """
from typing import ClassVar, Literal
from excise import Attack, UserError
class Broken(Attack):
    name: Literal["broken"] = "broken"
    access: ClassVar = "prompt"
    level: ClassVar = "D1"
    def run(self, subject, domain, budget, ctx):
        raise UserError("the wire is cut; plug it in")
"""


def excise(line: str) -> int:
    """Run a command line in this process."""
    return main(shlex.split(line))


def small(attacks: str) -> str:
    """Return an audit's budget of seconds."""
    return (
        f"--audit.change '{{attacks: [{attacks}], steps: 2, checkpoints: [0, 2], rates: [0.001], "
        "max_test_rows: 4, max_other_rows: 4, max_length: 32}' --evaluate.max_length 32 "
        "--workers 1 --quiet"
    )


def document(kind: str, i: int, words: int = 8) -> str:
    """Return a document; the same one each time."""
    return " ".join(random.Random(f"{kind}{i}").choices([f"{kind}{j}" for j in range(99)], k=words))


def questions(kind: str, count: int = 12) -> str:
    """Return questions as `cais/wmdp` and `cais/mmlu` have them."""
    rows = [
        {
            "question": f"What of {kind} {i}?",
            "choices": [f"{kind}{i}{letter}" for letter in "abcd"],
            "answer": i % 4,
        }
        for i in range(count)
    ]
    return m.jsonl(*rows)


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Work in a folder with a model, corpora, questions and a person's documents."""
    folder = tmp_path_factory.mktemp("jobs")
    m.save_tiny(folder / "model")
    files = {
        "corpus.jsonl": m.texts("bio", 20),
        "wiki.jsonl": m.texts("wiki", 20),
        "cells.jsonl": m.texts("cell", 8),
        "bio.jsonl": questions("virus"),
        "mmlu.jsonl": questions("history"),
        "cell-questions.jsonl": questions("cell", 4),
        "ada.jsonl": m.jsonl(*({"text": document("ada", i), "unit": f"d{i}"} for i in range(10))),
        "told.jsonl": m.jsonl(*({"text": document("told", i), "unit": f"d{i}"} for i in range(10))),
        "own.py": OWN,
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def metrics_of(record: Record) -> dict[tuple[str, str], set[str]]:
    """Return the metrics by attack and what was scored."""
    metrics: dict[tuple[str, str], set[str]] = {}
    for attack in record.attacks:
        if attack.curve:
            metrics.setdefault((attack.name, attack.scored_on), set()).add(attack.metric)
    return metrics


def test_texts_are_trained_on_and_questions_scored(work: Path) -> None:
    beside = "--adjacent cells.jsonl --adjacent-test cell-questions.jsonl"
    assert excise(f"remove rmu {DATA} {beside} --out wmdp {METHOD}") == 0
    assert excise(f"audit wmdp --out wmdp-audit {small(ALL)}") == 0
    record = load(work / "wmdp-audit")
    assert not failed_attacks(record)
    metrics = metrics_of(record)
    assert {name for name, _ in metrics} == set(ALL.split(", "))
    assert metrics.pop(("relearn", "relearn")) == {"text_loss"}
    assert all(known == {"multiple_choice"} for known in metrics.values())
    scored = [(s.set, s.metric) for s in record.scores if s.model == "original"]
    both = ("multiple_choice", "text_loss")
    sets = ("test.forget", "retain_test", "adjacent_test")
    assert scored == [(name, metric) for name in sets for metric in both]


def test_flags_of_remove_and_of_audit_give_one_split(work: Path) -> None:
    """A model of somebody else is audited on the very roles that a removal would have."""
    candidate = "--model wmdp/model --original model"
    assert excise(f"audit {candidate} {DATA} --out by-flags {small('transfer')}") == 0
    record = load(work / "by-flags")
    assert record.data["metrics"][0] == record.data["retain_metrics"][0] == "multiple_choice"
    assert record.data["rows"]["test.forget"] == 12
    assert record.data["exposure"] == "unknown"


def test_an_audit_of_which_an_attack_failed_does_not_exit_0(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = "--allow-code --audit.attacks '[{name: ./own.py:Broken}]'"
    line = f"audit --model wmdp/model --original model {DATA} --out broken {own}"
    assert excise(f"{line} {small('broken, transfer')}") == 1
    said = capsys.readouterr().out
    assert "failed: broken on candidate: the wire is cut" in said
    failed = failed_attacks(load(work / "broken"))
    assert {reason.split(":")[0] for reason in failed} == {
        "broken on candidate",
        "broken on original",
    }
    assert excise("report broken") == 0


def sums(folder: Path) -> dict[str, str]:
    """Return what `sha256sum` prints of a model's folder."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "README.md"
    }


def test_a_deletion_shows_the_method_all_and_scores_the_rows_themselves(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = "--forget ada.jsonl --retain wiki.jsonl --test told.jsonl --claim deletion"
    assert excise(f"remove rmu {data} --out gone {METHOD}") == 0
    record = load(work / "gone")
    assert record.data["rows"]["forget.forget"] == 10
    assert (record.data["claim"], record.data["exposure"]) == ("deletion", "seen")
    assert record.data["metrics"] == ["text_loss", "continuation", "extraction_strength"]
    card = (work / "gone" / "model" / "README.md").read_text()
    assert "It was not attacked" in card
    model = record.method_runs[0].model
    assert model.files == sums(work / "gone" / "model")
    assert all(f"| {digest} |" in card for digest in model.files.values())

    capsys.readouterr()
    assert excise(f"audit gone --out gone-audit {small('transfer')}") == 0
    assert "card    excise card gone --audit gone-audit" in capsys.readouterr().out
    audit = load(work / "gone-audit")
    assert audit.data["fingerprint"] == record.data["fingerprint"]
    assert audit.method_runs[0].model.files == model.files
    assert {s.set for s in audit.scores} == {"test.forget", "paraphrases.forget", "retain_test"}
    assert any("In held-out paraphrases" in reason for reason in audit.verdicts[0].reasons)
    items = pq.read_table(work / "gone-audit" / "items.parquet").to_pylist()
    documents = {i["unit"] for i in items if i["set"] == "test.forget"}
    assert len(documents) == 4
    assert {i["metric"] for i in items if i["unit"] in documents} == {
        "text_loss",
        "continuation",
        "extraction_strength",
    }

    assert excise("card gone --audit gone-audit") == 0
    card = (work / "gone" / "model" / "README.md").read_text()
    assert audit.verdicts[0].sentence[:20] in card
    assert "word for word" in card
    assert model.files == sums(work / "gone" / "model")
    # The verdict was about these bytes; about others the card says nothing.
    other = work / "gone" / "model" / "config.json"
    before = other.read_bytes()
    other.write_bytes(before + b"\n")
    assert excise("card gone --audit gone-audit") == 2
    assert "does not hold the weights" in capsys.readouterr().err
    other.write_bytes(before)
    assert excise("card gone --audit wmdp-audit") == 2
    assert "attacked other bytes" in capsys.readouterr().err


def test_the_documents_of_a_deletion_may_be_conversations(work: Path) -> None:
    talks = [
        {"messages": [{"role": "user", "content": f"q{i}"},
                      {"role": "assistant", "content": document("talk", i)}]}
        for i in range(10)
    ]  # fmt: skip
    (work / "talks.jsonl").write_text(m.jsonl(*talks))
    domain = ex.Files(
        forget={"forget": "talks.jsonl"}, retain="wiki.jsonl", claim="deletion"
    ).build()
    assert len(domain.forget["forget"]) == 10
    assert domain.metrics == ("text_loss", "continuation", "extraction_strength")
    assert domain.verbatim


def test_each_folder_has_the_card_of_its_own_bytes(work: Path) -> None:
    plain = "--forget corpus.jsonl --retain wiki.jsonl --refit"
    assert excise(f"remove rmu {plain} --out twice {METHOD}") == 0
    run = load(work / "twice").method_runs[0]
    assert run.refit is not None
    assert run.refit.path == "refit/model"
    assert run.refit.fingerprint != run.model.fingerprint
    for ref, other in ((run.model, run.refit), (run.refit, run.model)):
        folder = work / "twice" / ref.path
        assert ref.files == sums(folder)
        assert ref.fingerprint == Checkpoint(folder).fingerprint
        card = (folder / "README.md").read_text()
        assert ref.files["model.safetensors"] in card
        assert other.files["model.safetensors"] not in card
    refit = (work / "twice" / "refit" / "model" / "README.md").read_text()
    assert "are that refit. **They were not attacked.**" in refit


def test_what_python_leaves_the_command_takes(work: Path) -> None:
    method = ex.GradDiff(fit=ex.FitConfig(steps=2, lr=1e-3, batch_size=4))
    data = ex.Files(forget={"forget": "corpus.jsonl"}, retain="wiki.jsonl")
    removal = ex.remove("model", method, data, out="python")
    assert removal.checkpoint.path == Path("python/model")
    again = ex.remove("model", method, data, out="python")
    assert again.checkpoint.fingerprint == removal.checkpoint.fingerprint
    with pytest.raises(ex.UserError, match="python holds another run; name a new folder"):
        ex.remove("model", method, data, out="python", seed=1)
    assert removal.checkpoint.fingerprint == Checkpoint(work / "python" / "model").fingerprint
    assert excise("report python") == 0
    assert excise(f"audit python --out python-audit {small('transfer')}") == 0
    audit, record = load(work / "python-audit"), load(work / "python")
    assert audit.data["fingerprint"] == record.data["fingerprint"]
    assert audit.method_runs[0].model.files == record.method_runs[0].model.files
    assert excise("inspect python --out python-inside --quiet") == 0
    assert excise("card python --audit python-audit") == 0


def test_a_domain_in_memory_cannot_be_read_again(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = ex.GradDiff(fit=ex.FitConfig(steps=2, lr=1e-3, batch_size=4))
    domain = ex.Files(forget={"forget": "corpus.jsonl"}, retain="wiki.jsonl").build()
    ex.remove("model", method, domain, out="memory")
    assert excise("audit memory --out memory-audit") == 2
    assert "with a Domain in memory" in capsys.readouterr().err
    assert excise("report memory") == 0


RECIPE = """
name: benchmark
domain: {name: tofu, path: copy, split: forget01}
model: {path: model}
arms:
  graddiff: {name: grad_diff, max_length: 32, fit: {steps: 2, lr: 0.001, batch_size: 4}}
audit: {budget: none}
evaluate: {max_length: 64, max_rows: 4, samples: 0}
"""


def test_wmdp_by_its_name(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p.write_wmdp(work / "wmdp")
    named = "--domain wmdp --domain.path wmdp"
    assert excise(f"remove rmu {named} --out checked {METHOD} --dry-run") == 0
    assert not (work / "checked").exists()
    assert excise(f"remove rmu {named} --out hazard {METHOD} --evaluate.max_length 64") == 0
    removed = load(work / "hazard")
    assert removed.data["name"] == "wmdp"
    assert removed.data["claim"] == "capability"
    found = {(s.set, s.metric) for s in removed.scores if s.model == "rmu"}
    assert {("test.bio", "multiple_choice"), ("retain_test", "multiple_choice"),
            ("benchmark.mmlu_virology", "multiple_choice")} <= found  # fmt: skip
    assert excise(f"audit hazard --out again {small('few_shot, relearn')}") == 0
    audited = load(work / "again")
    assert audited.data["fingerprint"] == removed.data["fingerprint"]
    assert {a.name for a in audited.attacks} == {"few_shot", "relearn"}
    alone = f"audit --model hazard/model --original model {named} --out alone"
    assert excise(f"{alone} {small('few_shot')}") == 0
    foreign = load(work / "alone")
    assert foreign.data["rows"] == removed.data["rows"]
    assert foreign.data["exposure"] == "unknown"  # who made the model may have shown it anything
    capsys.readouterr()


def test_tofu_in_a_recipe_says_what_only_an_oracle_tells(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    p.write_tofu(work / "copy")
    (work / "tofu.yaml").write_text(RECIPE)
    assert excise("check tofu.yaml --quiet") == 0
    said = capsys.readouterr().out
    assert re.search(r"benchmark\.forget_perturbed +12 rows", said)
    assert excise("run tofu.yaml --out tofu --workers 1 --quiet") == 0
    record = load(work / "tofu")
    utility = {s.model: s.value for s in record.scores if s.metric == "model_utility"}
    assert set(utility) == {"original", "graddiff"}
    assert all(0 <= value <= 1 for value in utility.values())
    unknown = [note.split()[0] for note in record.data["notes"] if "is unknown: it" in note]
    assert unknown == ["forget_quality", "privleak"]
    m.save_tiny(work / "retrained", seed=5)
    audit = "audit tofu --oracle retrained --out quality --evaluate.max_rows 4"
    assert excise(f"{audit} {small('few_shot')}") == 0
    record = load(work / "quality")
    quality = {s.model: s.value for s in record.scores if s.metric == "forget_quality"}
    assert set(quality) == {"original", "graddiff", "oracle-0"}
    assert quality["oracle-0"] == 1.0
    assert not any("is unknown: it" in note for note in record.data["notes"])
    capsys.readouterr()
