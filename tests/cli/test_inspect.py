"""`excise inspect` through the command: from flags, from a folder, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from excise import record
from excise.cli import main
from tests.cli import material as m


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with an original, an edited model and two files."""
    monkeypatch.chdir(tmp_path)
    m.save_tiny(tmp_path / "model")
    m.save_tiny(tmp_path / "edited")
    m.tensors(push)(tmp_path / "edited")
    (tmp_path / "f.jsonl").write_text(m.texts("f", 24))
    (tmp_path / "r.jsonl").write_text(m.texts("r", 24))
    return tmp_path


NAME = "model.layers.1.mlp.down_proj.weight"


def push(values: dict[str, torch.Tensor]) -> None:
    """Add a matrix of rank one."""
    rows, columns = values[NAME].shape
    values[NAME] = values[NAME] + torch.outer(torch.ones(rows), torch.ones(columns))


def inspect(*words: str, model: str = "edited", out: str = "out") -> list[str]:
    """Return the arguments of an inspection."""
    files = ["--forget", "f.jsonl", "--retain", "r.jsonl", "--max-length", "24", "--rows", "8"]
    return [
        "inspect", "--model", model, "--original", "model", *files, "--out", out, "--quiet", *words
    ]  # fmt: skip


def test_flags_make_a_record_and_a_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [m.state(here / name) for name in ("model", "edited")]
    assert main(inspect()) == 0
    made = record.load(here / "out")
    assert made.kind == "inspect"
    assert made.inspection is not None
    (tensor,) = made.inspection.tensors
    assert tensor.name == NAME
    assert tensor.rank == pytest.approx(1, abs=0.01)
    assert made.method_runs[0].changed == (NAME,)
    assert len(made.inspection.blocks) == 2
    assert made.inspection.blocks[0].change_forget == 0
    # Of plain text every token but the last is an answer. The second block alone was changed.
    assert {(b.text, b.position) for b in made.inspection.buckets} == {
        (side, "answer") for side in ("forget", "retain")
    }
    assert {b.change > 0 for b in made.inspection.buckets if b.block == 0} == {False}
    assert {b.change > 0 for b in made.inspection.buckets if b.block == 1} == {True}
    assert made.samples
    assert [m.state(here / name) for name in ("model", "edited")] == before
    page = (here / "out" / "report.html").read_text(encoding="utf-8")
    assert "What the edit did inside" in page
    assert made.inspection.headline[:30] in capsys.readouterr().out
    assert main(inspect()) == 0, "the same command resumes"
    assert main(inspect(out="again")) == 0
    passes = list((here / ".stages").rglob("residuals-*/done.json"))
    assert len(passes) == 2, "both models were read once for both outputs"
    assert main(inspect("--seed", "3")) == 2, "another one needs another folder"


def test_sensitive_keeps_texts_out(here: Path) -> None:
    assert main(inspect("--sensitive")) == 0
    made = record.load(here / "out")
    assert made.sensitive
    assert made.inspection is not None
    assert made.inspection.strips == ()
    assert made.samples == ()
    text = (here / "out" / "run.json").read_text(encoding="utf-8")
    assert not any(word in text for word in ("f17 ", "r17 "))


def test_identical_models_are_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(inspect(model="model")) == 0
    made = record.load(here / "out")
    assert made.inspection is not None
    assert made.inspection.identical
    assert any("identical" in note for note in made.notes)
    assert "Nothing changed" in capsys.readouterr().out


def test_an_output_folder_says_everything(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    removal = ["remove", "grad_diff", "--model", "model", "--forget", "f.jsonl", "--retain"]
    removal += ["r.jsonl", "--out", "made", "--workers", "1", "--quiet"]
    removal += ["--fit.steps", "2", "--fit.batch-size", "4", "--max-length", "24"]
    assert main(removal) == 0
    before = m.state(here / "made")
    assert main(["inspect", "made", "--out", "seen", "--max-length", "24", "--quiet"]) == 0
    found = record.load(here / "seen").inspection
    assert found is not None
    assert found.model == "grad_diff"
    assert len(found.tensors) > 5
    assert m.state(here / "made") == before
    capsys.readouterr()
    assert main(["inspect", "made", "--arm", "rmu", "--out", "no"]) == 2
    assert "no edited model 'rmu'" in capsys.readouterr().err
    assert not (here / "no").exists()


def wider(here: Path) -> None:
    m.save_tiny(here / "other", width=48)


def deeper(here: Path) -> None:
    m.save_tiny(here / "other")
    m.config(num_hidden_layers=1)(here / "other")
    m.tensors(
        lambda values: [values.pop(key) for key in list(values) if ".layers.1." in key]
    )(here / "other")  # fmt: skip


def tokenizer(here: Path) -> None:
    m.save_tiny(here / "other")
    path = here / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a"', '"\\u1234"'))


def huge(here: Path) -> None:
    m.save_tiny(here / "other")

    def fill(values: dict[str, torch.Tensor]) -> None:
        values[NAME] = torch.full_like(values[NAME], 3e38)

    m.tensors(fill)(here / "other")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (wider, "not of the original's architecture and shape"),
        (deeper, "not of one architecture and shape"),
        (tokenizer, "another vocabulary"),
        (huge, "not finite after block 1"),
        (lambda here: None, "no folder other"),
    ],
)
def test_what_does_not_compare_is_refused_in_a_sentence(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], None],
    said: str,
) -> None:
    make(here)
    assert main(inspect(model="other")) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inspect", "--model", "edited"], "--original is missing"),
        (["inspect", "nowhere"], "nowhere holds no run.json"),
        (inspect("--rows", "0"), "rows"),
        (inspect("--max-length", "2"), "more than two tokens"),
        (inspect("--rowz", "3"), "rowz"),
    ],
)
def test_mistakes_are_told(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert not (here / "out").exists()
