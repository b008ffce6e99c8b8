"""The pages of the everyday jobs, whole: their commands run as they stand, in a clean folder."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path

import pytest

from excise.cli import main
from excise.models.checkpoint import save_model
from excise.models.tiny import byte_tokenizer, tiny_model
from excise.record import load
from excise.record.measured import failed_attacks
from tests.cli import material as m
from tests.cli.test_docs import ROOT, commands
from tests.fixtures import published

AUDIT = (
    " --audit.change '{attacks: [few_shot, prefix, quantize, relearn, transfer], steps: 2,"
    " checkpoints: [0, 2], rates: [0.001], max_test_rows: 4, max_other_rows: 4, max_length: 32}'"
    " --evaluate.max_length 32 --workers 1 --quiet"
)
REMOVE = " --fit.steps 2 --max_length 32 --workers 1 --quiet"


def smaller(line: str) -> str:
    """Return a command of a page with settings of seconds; what it asks for stays."""
    words = shlex.split(line)
    if words[1] == "remove":
        return line + REMOVE + (AUDIT.split(" --workers")[0] if "--audit" in words else "")
    return line + AUDIT if words[1] == "audit" else line


def document(kind: str, i: int) -> str:
    """Return a text; the same one each time."""
    return " ".join(random.Random(f"{kind}{i}").choices([f"{kind}{j}" for j in range(99)], k=9))


def documents(kind: str, count: int, unit: str = "") -> str:
    """Return texts, with ids where they are to have them."""
    return m.jsonl(
        *(
            {"text": document(kind, i)} | ({"unit": f"{unit}{i}"} if unit else {})
            for i in range(count)
        )
    )


def questions(kind: str, count: int = 8) -> str:
    """Return questions as `cais/wmdp` and `cais/mmlu` have them."""
    return m.jsonl(
        *(
            {
                "question": f"What of {kind} {i}?",
                "choices": [f"{kind}{i}{letter}" for letter in "abcd"],
                "answer": i % 4,
            }
            for i in range(count)
        )
    )


FILES = {
    "corpus.jsonl": documents("virus", 20),
    "wiki.jsonl": documents("wiki", 20),
    "questions.jsonl": questions("pathogen"),
    "questions-dev.jsonl": questions("toxin"),
    "mmlu.jsonl": questions("history"),
    "person.jsonl": documents("ada", 12, "d"),
    "others.jsonl": documents("other", 20),
    "retold.jsonl": documents("retold", 12, "d"),
}


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that holds what the pages name and nothing else."""
    for seed, name in enumerate(("base", "retrained")):
        model = tiny_model("llama", blocks=7, width=16, seed=seed)
        save_model(model, byte_tokenizer(), tmp_path / name)
    published.write_wmdp(tmp_path / "copies")
    published.write_tofu(tmp_path / "tofu")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ["wmdp", "deletion", "release"])
def test_the_commands_of_a_page_run_one_after_the_other(page: str, clean: Path) -> None:
    before = m.state(clean)
    lines = commands((ROOT / "docs" / f"{page}.md").read_text("utf-8"))
    assert len(lines) >= 4
    for line in lines:
        code = main(shlex.split(smaller(line))[1:])
        # A gate may find anything but an error; of everything else a page promises success.
        assert code in ((0, 3, 4) if line.startswith("excise gate") else (0,)), line
    after = m.state(clean)
    assert {name: after[name] for name in before} == before
    LEFT[page](clean)


def wmdp(work: Path) -> None:
    """Check what the page on hazardous knowledge promises."""
    for folder in ("AUDIT", "THEIRS"):
        record = load(work / folder)
        assert not failed_attacks(record)
        metrics = {(s.set, s.metric) for s in record.scores if s.model == "original"}
        assert {("test.forget", "multiple_choice"), ("retain_test", "multiple_choice")} <= metrics
    assert not failed_attacks(load(work / "WMDP-AUDIT"))
    rows = load(work / "OUT").data["rows"]
    assert (rows["test.forget"], rows["retain_test"], rows["dev_forget.forget"]) == (8, 8, 8)


def deletion(work: Path) -> None:
    """Check what the page on a deletion promises."""
    record, audit = load(work / "OUT"), load(work / "AUDIT")
    assert record.data["rows"]["forget.forget"] == 12
    assert (record.data["claim"], record.data["exposure"]) == ("deletion", "seen")
    card = (work / "OUT" / "model" / "README.md").read_text()
    assert record.method_runs[0].model.files["model.safetensors"] in card
    assert audit.verdicts[0].sentence[:20] in card
    assert {"forget_quality", "privleak"} <= {s.metric for s in load(work / "TOFU-AUDIT").scores}
    told = (work / "public" / "report.json").read_text() + card
    rows = FILES["person.jsonl"] + FILES["others.jsonl"] + FILES["retold.jsonl"]
    assert not any(json.loads(row)["text"] in told for row in rows.splitlines())


def release(work: Path) -> None:
    """Check what the page on a release promises."""
    assert (work / "table.csv").read_text().count("\n") == 4
    for name in ("table.md", "table.tex", "curves.svg", "comparison/report.html"):
        assert (work / name).stat().st_size > 100
    assert {v.model for v in load(work / "BOTH").verdicts} == {"ours", "theirs"}
    assert str(work) not in (work / "public" / "report.html").read_text()


LEFT = {"wmdp": wmdp, "deletion": deletion, "release": release}
"""What the pages leave behind."""
