"""`excise audit --canary` from the folder of a removal to a record, and wrong use of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from excise.cli import main
from excise.record import load
from excise.report.limits import limits
from tests.cli import material as m

DATA = "--forget mine.jsonl --retain wiki.jsonl --model model --workers 1 --quiet"
FIT = "--fit.steps 2 --fit.batch_size 4 --max_length 48"
CANARY = "--canary --canary.units 8 --canary.repeats '[1, 20]' --canary.lr 0.01 --workers 1 --quiet"
SMALL = (
    "--audit.change '{attacks: [transfer], steps: 2, checkpoints: [0, 2], rates: [0.001], "
    "max_test_rows: 8, max_other_rows: 4, max_length: 48}' --canary.max_length 48 "
    "--evaluate.max_length 48"
)


def excise(line: str) -> int:
    """Run a command line in this process."""
    return main(shlex.split(line))


def made(folder: Path) -> dict[Path, int]:
    """Return when each stage was made."""
    return {path: path.stat().st_mtime_ns for path in folder.glob(".stages/*/*/done.json")}


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Work in a folder with a model, a forget set, retain text and a removal."""
    folder = tmp_path_factory.mktemp("canary")
    m.save_tiny(folder / "model")
    (folder / "mine.jsonl").write_text(m.texts("secret", 20))
    (folder / "wiki.jsonl").write_text(m.texts("wiki", 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert excise(f"remove grad_diff {DATA} {FIT} --alpha 2 --out gone") == 0
        yield folder


def test_canaries_are_taught_removed_and_audited(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert excise(f"audit gone {CANARY} {SMALL} --out birds") in (0, 4)
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing about your own forget set" in said
    assert "excise card" not in said
    assert "excise audit birds" not in said
    record = load(work / "birds")
    assert record.kind == "audit"
    assert any("canary audit" in sentence for sentence in limits(record))
    (run,) = record.method_runs
    removal = load(work / "gone").method_runs[0].method
    assert run.method == removal
    assert run.method["alpha"] == 2
    assert [model.name for model in record.models] == ["original", "oracle-0"]
    scores = {(s.model, s.set, s.metric): s.value for s in record.scores}
    assert {s for _, s, _ in scores} >= {"test.once", "test.20_times", "paraphrases.once"}
    # Taught, unlike the oracle; and the removal undid some of it.
    often = ("test.20_times", "text_loss")
    assert scores["original", *often] < scores["oracle-0", *often] - 0.2
    assert scores["grad_diff", *often] > scores["original", *often]
    assert any("By capability" in reason for reason in record.verdicts[0].reasons)
    texts = (work / "mine.jsonl").read_text()
    assert not any(sample.prompt in texts for sample in record.samples if sample.set != "retain")
    # A second call finds everything; the folder itself is no removal to audit.
    before = made(work)
    assert excise(f"audit gone {CANARY} {SMALL} --out birds") in (0, 4)
    assert made(work) == before
    assert excise("audit birds --out again") == 2
    assert "is a canary audit" in capsys.readouterr().err
    assert excise(f"audit gone {CANARY} {SMALL} --out plan --dry-run") == 0
    assert "canary: original and oracles" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--model gone/model --original model", "--canary needs the output folder"),
        ("gone --oracle model", "--oracle is given beside --canary"),
        ("gone --proxy-oracle model", "--proxy-oracle is given beside --canary"),
        ("gone --canary.units 12", "canary.units"),
        ("gone --canary.repeats [0]", "canary.repeats"),
    ],
)
def test_wrong_use_is_said(line: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert excise(f"audit --canary --out wrong {line}") == 2
    assert sentence in capsys.readouterr().err
    assert not Path("wrong").exists()


def test_a_folder_without_a_method_is_refused(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = SMALL.partition(" --canary")[0]
    assert excise(f"audit gone {small} --out made --workers 1 --quiet") in (0, 4)
    capsys.readouterr()
    assert excise("audit made --canary --out wrong") == 2
    assert "names no method" in capsys.readouterr().err


def test_a_proxy_oracle_is_named_wherever_it_stands(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    m.save_tiny(work / "sibling", seed=1)
    small = SMALL.replace("--canary.max_length 48 ", "")
    line = f"audit gone --proxy-oracle sibling {small} --out read --workers 1 --quiet"
    assert excise(line) in (0, 4)
    record = load(work / "read")
    assert [model.name for model in record.models] == ["original", "oracle-proxy-0"]
    assert any("proxy oracle" in reason for reason in record.verdicts[0].reasons)
    assert record.verdicts[0].levels[-1].status != "pass"
    assert "proxy oracle" in (work / "read" / "report.html").read_text()
    assert excise(f"audit read {small} --out twice --workers 1 --quiet") in (0, 4)
    assert [m.name for m in load(work / "twice").models] == ["original", "oracle-proxy-0"]
