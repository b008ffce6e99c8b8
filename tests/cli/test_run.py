"""The verbs on real input, end to end: what they write, and that a second time costs nothing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from excise.cli import MODULES, VERBS, main
from excise.models.checkpoint import Checkpoint
from excise.record import load
from tests.cli import material as m

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


def tree(folder: Path) -> set[str]:
    """Return every file below a folder."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Work in a folder with a model, its rows, a recipe, and what the verbs made of them."""
    folder = tmp_path_factory.mktemp("work")
    m.save_tiny(folder / "model")
    (folder / "f.jsonl").write_text(m.texts("f"))
    (folder / "r.jsonl").write_text(m.texts("r"))
    (folder / "tiny.yaml").write_text(m.TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def ran(work: Path) -> Path:
    """Return the output folder of a recipe."""
    assert excise("run tiny.yaml --out ran --workers 1 --quiet") == 0
    return work / "ran"


@pytest.fixture(scope="module")
def removed(work: Path) -> Path:
    """Return the output folder of a removal."""
    assert excise(f"{REMOVE} --out removed") == 0
    return work / "removed"


def test_a_run_writes_everything(ran: Path) -> None:
    record = load(ran)
    assert [arm.name for arm in record.method_runs] == ["filtering", "rmu"]
    assert {score.model for score in record.scores} == {"original", "oracle-0", "filtering", "rmu"}
    assert [verdict.model for verdict in record.verdicts] == ["filtering", "rmu"]
    assert {attack.name for attack in record.attacks} >= {"relearn", "quantize", "few_shot"}
    assert record.command == "excise run tiny.yaml --out ran --workers 1 --quiet"
    assert record.environment.versions["torch"]
    items = pq.read_table(ran / "items.parquet").to_pylist()
    assert {item["model"] for item in items} >= {"original", "rmu"}
    assert "<html" in (ran / "report.html").read_text()
    assert tree(ran) >= {"recipe.yaml", "split.json", "events.jsonl", "models/rmu/README.md"}
    assert not [name for name in tree(ran) if Path(name).name.startswith(".")]


def test_edited_models_load_with_plain_transformers(ran: Path, removed: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in (ran / "models" / "rmu", ran / "models" / "filtering", removed / "model"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = AutoTokenizer.from_pretrained(folder)("a b", return_tensors="pt").input_ids
        assert model(ids).logits.isfinite().all()


def test_a_second_time_nothing_is_computed(ran: Path) -> None:
    before, stages = load(ran), tree(ran.parent / ".stages")
    starts = (ran / "events.jsonl").read_text().count("stage_start")
    assert excise("run tiny.yaml --out ran --workers 1 --quiet") == 0
    after = load(ran)
    assert after.scores == before.scores
    assert after.attacks == before.attacks
    assert after.verdicts == before.verdicts
    assert tree(ran.parent / ".stages") == stages
    assert (ran / "events.jsonl").read_text().count("stage_start") == starts


def test_a_dry_run_writes_nothing(
    work: Path, ran: Path, removed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = m.state(work)
    assert excise("run tiny.yaml --out dry --dry-run") == 0
    assert excise(f"{REMOVE} --out dry --dry-run") == 0
    said = capsys.readouterr().out
    assert re.search(r"rmu +20 ", said)
    assert re.search(r"rmu +3 ", said)
    assert "parameters" in said
    assert "memory" in said
    assert m.state(work) == before


def test_remove_changes_what_it_says_and_leaves_the_input(removed: Path) -> None:
    original = Checkpoint(removed.parent / "model")
    edited = Checkpoint(removed / "model")
    record = load(removed)
    assert record.kind == "remove"
    changed = record.method_runs[0].changed
    assert changed == ("model.layers.0.mlp.down_proj.weight",)
    assert edited.fingerprint != original.fingerprint
    for name in original.parameter_names():
        a, b = original.weights_of([name])[name], edited.weights_of([name])[name]
        assert bool((a != b).any()) == (name in changed)


def test_remove_with_an_adapter(work: Path, removed: Path) -> None:
    assert excise(f"{REMOVE} --lora.rank 4 --out adapted") == 0
    record = load(work / "adapted")
    assert record.method_runs[0].method["lora"]["rank"] == 4
    assert record.method_runs[0].model.fingerprint != load(removed).method_runs[0].model.fingerprint


def test_the_method_of_the_docs_runs(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    code = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "(Method)" in b)
    (work / "mine.py").write_text(code)
    assert len(code.splitlines()) <= 42
    line = (
        "remove ./mine.py:Decay --model model --forget f.jsonl --retain r.jsonl --fit.steps 3"
        " --max_length 32 --workers 1 --quiet --out decayed"
    )
    assert excise(line) == 2
    assert "--allow-code" in capsys.readouterr().err
    assert excise(f"{line} --allow-code") == 0
    record = load(work / "decayed")
    assert record.method_runs[0].method["name"] == "decay"
    assert record.config["code"] == {"decay": "./mine.py:Decay"}
    assert excise(f"audit decayed --allow-code --workers 1 --quiet --out redecayed {SMALL}") == 0


def test_audit_of_an_output_folder(work: Path, removed: Path) -> None:
    before = m.state(removed) | {"/": m.state(work / "model")["config.json"]}
    assert excise(f"audit removed --out audited --workers 1 --quiet {SMALL}") == 0
    assert m.state(removed) | {"/": m.state(work / "model")["config.json"]} == before
    record = load(work / "audited")
    assert record.kind == "audit"
    assert record.verdicts[0].sentence
    assert {attack.subject for attack in record.attacks} >= {"original", "rmu"}
    assert record.data["units"] == load(removed).data["units"]


def test_audit_of_models_from_elsewhere(work: Path, removed: Path) -> None:
    line = (
        "audit --model removed/model --original model --forget f.jsonl --retain r.jsonl"
        f" --out foreign --workers 1 --quiet {SMALL}"
    )
    assert excise(line) == 0
    record = load(work / "foreign")
    assert record.verdicts
    assert record.data["exposure"] == "unknown"


def test_the_small_verbs(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (ran / "report.html").unlink()
    assert excise("report ran") == 0
    assert (ran / "report.html").is_file()
    assert "rmu" in capsys.readouterr().out
    assert excise("show demo") == 0
    assert "arms:" in capsys.readouterr().out
    assert excise("show rmu") == 0
    assert "--lora.rank = 8" in capsys.readouterr().out
    assert excise("check tiny.yaml") == 0
    said = capsys.readouterr().out
    assert ">>" in said
    assert "test.alpha" in said
    assert excise("fetch") == 0
    assert "smollm2-135m" in capsys.readouterr().out
    assert excise("--version") == 0


def test_ls_lists_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert excise("ls") == 0
    said = capsys.readouterr().out
    for word in ("methods", "grad_diff", "relearn", "facts", "smollm-cyber"):
        assert word in said
    assert excise("ls methods") == 0
    assert "arXiv" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert excise(f"{verb} --help") == 0
    said = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert f"usage: excise {verb}" in said
    source = (ROOT / "src" / "excise" / "cli" / f"{MODULES.get(verb, verb)}.py").read_text()
    fields = re.findall(r'^    (\w+): (.*?)\n    """(\w+(?: \w+)?)', source, re.M)
    for name, annotation, text in fields:
        flag = name.upper() if "Positional" in annotation else "--" + name.replace("_", "-")
        assert f"{flag} " in said or f"{flag}," in said, said
        assert text in said, said
    assert fields or verb in ("ls", "show")
