"""A release by the command: held to a requirement, compared, verified, published."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from excise.cli import main
from excise.record import Record, load, save
from excise.record.redaction import public
from excise.report.page import render_html, write_report
from tests.cli import material as m
from tests.report import sample

ROOT = Path(__file__).parents[2]
SMALL = (
    "--audit.change '{steps: 2, checkpoints: [0, 2], rates: [0.001], max_test_rows: 8,"
    " max_other_rows: 8, max_length: 32}'"
)
REMOVE = (
    "remove rmu --model model --forget f.jsonl --retain r.jsonl --layer 0 --fit.steps 3"
    " --max_length 32 --workers 1 --quiet"
)


def excise(line: str) -> int:
    """Run a command line in this process."""
    return main(shlex.split(line))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Work in a folder with a model, its rows, two removals and made-up records."""
    folder = tmp_path_factory.mktemp("work")
    m.save_tiny(folder / "model")
    (folder / "f.jsonl").write_text(m.texts("f"))
    (folder / "r.jsonl").write_text(m.texts("r"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("full", "many", "sensitive"):
            (folder / name).mkdir()
            save(sample.RECORDS[name](), folder / name)
            write_report(folder / name)
        yield folder


@pytest.fixture(scope="module")
def removed(work: Path) -> Path:
    """Return the output folder of a removal."""
    assert excise(f"{REMOVE} --out removed --require 'retain>=-9'") == 0
    return work / "removed"


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("gate full --model filtering --require D5", 0, "1 of 1 conditions met"),
        ("gate full --require 'D0, D3'", 3, "missed        D3"),
        ("gate full --model rmu --require D1", 4, "inconclusive  D1"),
        ("gate full --baseline full", 0, "no worse: recovery"),
        ("gate full --baseline many --model filtering --model rmu", 0, "conditions met"),
        ("gate full --baseline many --require D0 --model filtering", 0, "met           D0"),
    ],
)
def test_gate(
    line: str, code: int, words: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert excise(line) == code
    said = capsys.readouterr().out
    assert words in said
    assert max(map(len, said.splitlines())) <= 80


def test_gate_reads_as_json_junit_and_workflow_commands(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "gate full --model rmu --require 'D0, D1, bits<=1'"
    assert excise(f"{line} --format json") == 3
    data = json.loads(capsys.readouterr().out)
    assert data["exit_code"] == 3
    assert [c["status"] for c in data["conditions"]] == ["met", "inconclusive", "missed"]
    assert excise(f"{line} --format junit") == 3
    suite = ElementTree.fromstring(capsys.readouterr().out)
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    assert [case.get("name") for case in suite] == ["D0", "D1", "bits<=1"]
    assert excise(f"{line} --format github") == 3
    lines = capsys.readouterr().out.splitlines()
    assert [text.partition(" ")[0] for text in lines] == ["::notice", "::warning", "::error"]
    assert lines[2].startswith("::error title=rmu%3A bits<=1 missed::Residual bits per unit")


def test_hostile_names_break_no_format(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "hostile").mkdir()
    save(sample.hostile(), work / "hostile")
    for name in ("text", "json", "junit", "github"):
        assert excise(f"gate hostile --require 'D5, retain>=0' --format {name}") in (3, 4)
        said = capsys.readouterr().out
        assert "\x1b" not in said
        if name == "json":
            json.loads(said)
        elif name == "junit":
            ElementTree.fromstring(said)
        elif name == "github":
            assert all(line.startswith("::") for line in said.splitlines())


def test_gate_loads_nothing_heavy(work: Path) -> None:
    code = (
        "import sys\nfrom excise.cli import main\n"
        "assert main(['gate', 'full', '--require', 'D0']) == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'pyarrow', 'rich', 'jinja2'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    env = {"PYTHONPATH": str(ROOT / "src"), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env, cwd=work
    )
    assert done.returncode == 0, done.stderr


def test_a_removal_below_its_requirement_exits_with_3_and_resumes_with_another(
    removed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(removed).config["audit"]["require"] == "retain>=-9"
    starts = (removed / "events.jsonl").read_text().count("stage_start")
    capsys.readouterr()
    assert excise(f"{REMOVE} --out removed --require 'retain>=9'") == 3
    assert "0 of 1 conditions met" in capsys.readouterr().out
    assert (removed / "events.jsonl").read_text().count("stage_start") == starts
    assert excise("gate removed") == 3  # what the run was given
    assert excise("gate removed --require D0") == 4
    assert excise("report removed") == 0
    assert excise(f"{REMOVE} --out removed") == 0


def test_several_candidates_of_one_original_are_one_audit(removed: Path) -> None:
    """They share the reference models, and the table tells them apart."""
    m.save_tiny(removed.parent / "other", seed=3)
    line = (
        "audit --original model --candidate rmu=removed/model --candidate other=other"
        " --forget f.jsonl --retain r.jsonl --out both --workers 1 --quiet"
        " --require 'D4' " + SMALL
    )
    assert excise(line) in (1, 3, 4)
    record = load(removed.parent / "both")
    assert [run.name for run in record.method_runs] == ["rmu", "other"]
    assert {v.model for v in record.verdicts} == {"rmu", "other"}
    assert excise("compare both --out cmp --csv t/t.csv --md t.md --latex t.tex") == 0
    assert (removed.parent / "t" / "t.csv").read_text().count("\n") == 3
    assert (removed.parent / "cmp" / "report.html").is_file()


def test_verify_knows_every_byte(removed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = load(removed)
    run = record.method_runs[0]
    folder = removed / "model"
    files = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.name != "README.md"
    }
    model = run.model.model_copy(update={"files": files})
    changed = record.model_copy(update={"method_runs": (run.model_copy(update={"model": model}),)})
    save(changed, removed)
    write_report(removed)
    capsys.readouterr()
    assert excise("verify removed") == 0
    assert "0 not" in capsys.readouterr().out
    config = folder / "config.json"
    was = config.read_bytes()
    config.write_bytes(was + b" ")
    (folder / "extra.py").write_text("")
    (folder / "generation_config.json").rename(removed / "away")
    assert excise("verify removed") == 3
    said = capsys.readouterr().out
    assert "changed   removed/model/config.json: SHA-256" in said
    assert "extra     removed/model/extra.py" in said
    assert "missing   removed/model/generation_config.json" in said
    config.write_bytes(was)
    (folder / "extra.py").unlink()
    (removed / "away").rename(folder / "generation_config.json")
    assert excise("verify removed") == 0
    page = removed / "report.html"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("<h1>", "<h1>Ships: "), encoding="utf-8")
    capsys.readouterr()
    assert excise("verify removed") == 3
    assert "report.html: it does not say what the record says" in capsys.readouterr().out
    page.write_text(text, encoding="utf-8")
    # The page and the items tell what the record tells.
    scores = tuple(s.model_copy(update={"value": s.value + 1}) for s in changed.scores)
    save(changed.model_copy(update={"scores": scores}), removed)
    assert excise("verify removed") == 3
    said = capsys.readouterr().out
    assert "report.html: it tells of another record" in said
    assert "items.parquet: text_loss of original on test.forget is" in said
    save(record, removed)
    write_report(removed)


def test_an_older_record_is_verified_by_its_one_hash(
    removed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = load(removed)
    run = record.method_runs[0]
    old = run.model_copy(update={"model": run.model.model_copy(update={"files": {}})})
    save(record.model_copy(update={"method_runs": (old,)}), removed)
    write_report(removed)
    capsys.readouterr()
    assert excise("verify removed") == 0
    assert "an older record" in capsys.readouterr().out
    weights = removed / "model" / "model.safetensors"
    was = weights.read_bytes()
    weights.write_bytes(was[:-1] + bytes([was[-1] ^ 1]))
    assert excise("verify removed") == 3
    weights.write_bytes(was)
    save(record, removed)


def test_what_is_public_holds_no_text_of_the_data(removed: Path) -> None:
    assert excise("report removed --public --out pub/page.html") == 0
    pages = [removed.parent / "pub" / name for name in ("page.html", "page.json")]
    data = [json.loads(line)["text"] for name in "fr" for line in (m.texts(name)).splitlines()]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for row in data:
            assert row not in text
            assert row[:20] not in text
        assert str(removed.parent) not in text
        assert ".jsonl" not in text
        assert "--forget" not in text
    assert load(pages[1]).verdicts == ()


def secret() -> Record:
    """Return a record whose every free text is a secret."""
    record = sample.full()
    swap = {"facts": "SECRETCAP"}

    def named(text: str) -> str:
        head, dot, rest = text.partition(".")
        return head + dot + swap.get(rest, rest)

    data = {**record.data, "notes": ["SECRET note"], "SECRET": "x", "path": "/srv/SECRET/f"}
    data["rows"] = {named(k): v for k, v in record.data["rows"].items()}
    failed = {"status": "failed", "reason": "SECRET row 'SECRET'", "curve": ()}
    attacks = [
        a.model_copy(update={"scored_on": named(a.scored_on), "trained_on": named(a.trained_on)})
        for a in record.attacks
    ]
    attacks[0] = attacks[0].model_copy(update={"variant": "'SECRET prompt'"})
    attacks[1] = attacks[1].model_copy(update={**failed, "facts": {"SECRET": "SECRET"}})
    runs = [
        run.model_copy(
            update={
                "model": run.model.model_copy(
                    update={"path": "/srv/SECRET", "source": "SECRET", "files": {"SECRET.x": "0"}}
                ),
                "method": {**run.method, "prompt": "a SECRET text", "file": "SECRET.jsonl"},
                "extras": {"SECRET": 1, "said": "SECRET text"},
            }
        )
        for run in record.method_runs
    ]
    sentence = "On SECRETCAP it fails in /srv/SECRET/x and C:\\SECRET\\y; SECRETUNIT too."
    verdicts = tuple(
        v.model_copy(update={"sentence": sentence, "reasons": (sentence,)}) for v in record.verdicts
    )
    scores = tuple(s.model_copy(update={"set": named(s.set)}) for s in record.scores)
    config = {
        "domain": {"name": "files", "forget": {"SECRETCAP": "SECRET.jsonl"}},
        "candidates": {"SECRET": "SECRET"},
        "audit": {"budget": "smoke", "require": "D3", "attacks": [{"text": "SECRET"}]},
    }
    return record.model_copy(
        update={
            "title": "SECRET",
            "command": "excise remove --forget /srv/SECRET/f.jsonl",
            "config": config,
            "data": data,
            "attacks": tuple(attacks),
            "method_runs": tuple(runs),
            "verdicts": verdicts,
            "scores": scores,
            "notes": ("SECRET",),
            "models": tuple(
                each.model_copy(update={"source": "SECRET/x@1", "path": "../SECRET"})
                for each in record.models
            ),
            "samples": tuple(
                each.model_copy(update={"prompt": "SECRET"}) for each in record.samples
            ),
        }
    )


def test_no_secret_survives_and_names_stay_the_same() -> None:
    record = public(secret(), ["SECRETUNIT"])
    page = render_html(record)
    assert "SECRET" not in page
    assert "SECRET" not in record.model_dump_json()
    assert "capability-1" in record.verdicts[0].sentence
    assert "unit-1" in record.verdicts[0].sentence
    assert {s.set for s in record.scores} >= {"test.capability-1"}
    assert record.attacks[0].scored_on == "test.capability-1"
    assert [v.model for v in record.verdicts] == ["filtering", "rmu"]
    assert record.method_runs[0].method["lr"] == 1e-3
    assert record.models[0].fingerprint == sample.full().models[0].fingerprint
    assert record.config["audit"]["budget"] == "smoke"


@pytest.mark.parametrize("name", sample.RECORDS)
def test_every_record_can_be_public(name: str) -> None:
    record = public(sample.RECORDS[name]())
    assert record.sensitive
    assert not record.samples
    render_html(record)
    if name != "hostile":  # whose original is called something else
        assert public(record).model_dump_json() == record.model_dump_json()
