"""The verbs on real input, end to end: what they write, and that a second time costs nothing."""

from __future__ import annotations

import json
import re
import shlex
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from excise.cli import main
from excise.cli.audit import request_data
from excise.cli.flags import flags_of
from excise.cli.index import build_index
from excise.cli.ls import FAMILIES, load_index
from excise.cli.options import VERBS, AuditOptions
from excise.core.disk import file_sum
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
    assert excise(f"{REMOVE} --lora.rank 4 --lora.output adapter --out adapted") == 0
    record = load(work / "adapted")
    assert record.method_runs[0].method["lora"]["rank"] == 4
    files = {path.name: file_sum(path) for path in (work / "adapted/adapter").iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert record.method_runs[0].extras["adapter"] == {"path": "adapter", "sha256": files}
    assert excise("export adapted --base model --merge --out merged") == 0
    assert Checkpoint(work / "merged").fingerprint == record.method_runs[0].model.fingerprint
    assert record.method_runs[0].model.fingerprint != load(removed).method_runs[0].model.fingerprint


def test_remove_with_a_delta(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert excise(f"{REMOVE} --keep delta --out changed") == 0
    record = load(work / "changed")
    run = record.method_runs[0]
    files = {path.name: file_sum(path) for path in (work / "changed/delta").iterdir()}
    assert run.extras["delta"] == {"path": "delta", "sha256": files}
    assert (run.model.path, (work / "changed/model").exists()) == ("", False)
    capsys.readouterr()
    assert excise("export changed --base model --out rebuilt") == 0
    assert Checkpoint(work / "rebuilt").fingerprint == run.model.fingerprint
    assert excise("report changed") == 0
    assert "excise audit changed" not in capsys.readouterr().out
    for verb in ("audit changed --out no", "inspect changed --out no", "card changed"):
        assert excise(verb) == 2
        said = capsys.readouterr().err
        assert "holds no model" in said
        assert "excise export changed/delta --base MODEL" in said
    assert excise("verify changed") == 0
    # What is kept decides no number: the same run, from the store.
    starts = (work / "changed" / "events.jsonl").read_text().count("stage_start")
    assert excise(f"{REMOVE} --keep best --out changed") == 0
    assert (work / "changed" / "events.jsonl").read_text().count("stage_start") == starts
    assert Checkpoint(work / "changed/model").fingerprint == run.model.fingerprint


def test_a_run_keeps_nothing_or_everything(work: Path) -> None:
    assert excise(f"{REMOVE} --keep none --out nothing") == 0
    assert {path.name for path in (work / "nothing").iterdir() if path.is_dir()} == set()
    stop = "--stop.every 1 --stop.keep_looks true --stop.retain_budget 100"
    assert excise(f"{REMOVE} {stop} --keep all --out everything") == 0
    out, run = work / "everything", load(work / "everything").method_runs[0]
    looks = {path.name for path in (out / "looks").glob("*.safetensors")}
    assert looks == {"step-1.safetensors", "step-2.safetensors", "step-3.safetensors"}
    assert looks < set(run.extras["looks"]["sha256"])
    assert Checkpoint(out / "model").fingerprint == run.model.fingerprint
    assert (out / "delta" / "delta.json").is_file()


def test_several_models_keep_a_delta_each_but_none_from_scratch(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {
        "name": "two",
        "domain": {"name": "files", "forget": {"forget": "f.jsonl"}, "retain": "r.jsonl"},
        "model": {"path": "model"},
        "arms": {
            name: {"name": name, "max_length": 32, "fit": {"steps": 1, "batch_size": 2}}
            for name in ("grad_diff", "task_vector")
        },
        "audit": {"budget": "none"},
        "evaluate": {"max_length": 32, "max_rows": 4, "samples": 0},
        "keep": "delta",
    }
    (work / "two.yaml").write_text(json.dumps(recipe))
    assert excise("run two.yaml --out two --workers 1 --quiet") == 0
    assert {p.name for p in (work / "two/deltas").iterdir()} == {"grad_diff", "task_vector"}
    assert excise("export two/deltas/task_vector --base model --out third") == 0
    runs = {run.name: run.model.fingerprint for run in load(work / "two").method_runs}
    assert Checkpoint(work / "third").fingerprint == runs["task_vector"]
    capsys.readouterr()
    assert excise("run tiny.yaml --keep delta --out no") == 2
    assert "arms.filtering trains from scratch" in capsys.readouterr().err


def test_the_method_of_the_docs_runs(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    code = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "Method)" in b)
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
    attacks = "--audit.attacks '[{name: quantize, formats: [nf4]}, {name: prune, shares: [0.3]}]'"
    assert excise(f"audit removed --out audited --workers 1 --quiet {attacks} {SMALL}") == 0
    assert m.state(removed) | {"/": m.state(work / "model")["config.json"]} == before
    record = load(work / "audited")
    assert record.kind == "audit"
    assert record.verdicts[0].sentence
    assert {attack.subject for attack in record.attacks} >= {"original", "rmu"}
    edits = {(a.name, a.variant) for a in record.attacks if a.subject == "rmu" and a.level == "D3"}
    assert edits >= {("quantize", "nf4"), ("prune", "wanda 30%"), ("prune", "set difference 5%")}
    assert record.data["units"] == load(removed).data["units"]
    # Attacks that were asked for are asked for again where the record is audited.
    again = request_data(AuditOptions(folder=str(work / "audited"), budget="smoke"))
    assert [(a["name"], a.get("formats")) for a in again["audit"]["attacks"]] == [
        ("quantize", ["nf4"]), ("prune", None),
    ]  # fmt: skip


def test_audit_of_models_from_elsewhere(work: Path, removed: Path) -> None:
    line = (
        "audit --model removed/model --original model --forget f.jsonl --retain r.jsonl"
        f" --out foreign --workers 1 --quiet {SMALL}"
    )
    assert excise(line) == 0
    record = load(work / "foreign")
    assert record.verdicts
    assert record.data["exposure"] == "unknown"


def test_inspect_asks_which_of_several_models(
    ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert excise("inspect ran --out no") == 2
    assert "2 edited models; choose one by --arm; known: filtering, rmu" in capsys.readouterr().err
    assert not (ran.parent / "no").exists()


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
    index = load_index()
    shared = Counter(entry["name"] for entries in index.values() for entry in entries)
    for family, entries in index.items():
        assert f"{family}  (" in said or f"\n{family}\n" in said
        names = [entry["name"] for entry in entries]
        assert len(names) == len({*names})
        assert [n for n in names if len(re.findall(rf"^  {n} ", said, re.M)) != shared[n]] == []
    assert excise("ls methods") == 0
    assert "arXiv" in capsys.readouterr().out
    assert excise("ls scores recipes") == 0
    said = capsys.readouterr().out
    assert "refusal" in said
    assert "takes: under 2 minutes" in said


def test_the_index_is_current() -> None:
    assert load_index() == build_index(), "write it again: python -m excise.cli.index"
    assert tuple(load_index()) == FAMILIES


SHOWN = [entry["name"] for family in FAMILIES for entry in load_index()[family]]


@pytest.mark.parametrize("name", SHOWN)
def test_everything_that_is_listed_can_be_shown(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert excise(f"show {name}") == 0
    said = capsys.readouterr().out
    assert "Undefined" not in said
    assert re.search(r"^  --\S+ = |^  --\S+\.\*|^\w+:|^It has no settings\.$", said, re.M), said


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert excise(f"{verb} --help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    said = " ".join(" ".join(lines).split())
    assert said.startswith(f"usage: excise {verb} ")
    flags = flags_of(VERBS[verb])
    assert flags
    for flag in flags:
        assert f"{flag.label} " in said or f"{flag.label}," in said, said
        assert flag.help in said, said


def test_help_of_a_method_lists_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert excise("remove rmu --help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    at = lines.index("settings of rmu:")
    assert any("--allow-code" in line for line in lines[:at])
    assert any(line.startswith("  --steering = 20.0  ") for line in lines[at:])
    assert any(line.startswith("    --fit.lr = 5e-05  ") for line in lines[at:])
    assert excise("show rmu") == 0
    assert capsys.readouterr().out.endswith("\n".join(lines[at + 1 :]) + "\n")


def test_check_of_a_study_says_what_is_stated(capsys: pytest.CaptureFixture[str]) -> None:
    assert excise("check rmu-is-shallow --margin 0.25 --rmu.max-length 9") == 0
    said = capsys.readouterr().out
    for words in ("statistic: R = ", "margin: 0.25", "takes: 4 minutes", "settings\n"):
        assert words in said
    assert "  max_length: 9\n" in said
    assert excise("run rmu-is-shallow --full --dry-run") == 0
    assert "output: runs/rmu-is-shallow-full" in capsys.readouterr().out
    assert excise("check rmu-is-shallow --full") == 0
    assert "smollm2-135m" in capsys.readouterr().out


def test_a_method_run_keeps_its_name(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = m.TINY.replace("  rmu: ", "  my-run: ")
    (work / "named.yaml").write_text(text)
    line = "run named.yaml --dry-run --out named"
    assert excise(f"{line} --arms.my-run.fit.batch-size 4 --arms.my-run.fit.steps 7") == 0
    said = capsys.readouterr().out
    assert re.search(r"my-run +7 ", said)
    assert "my_run" not in said
    assert excise(f"{line} --arms.new-run.name maxent --arms.new-run.fit.steps 5") == 0
    assert re.search(r"new-run +5 ", capsys.readouterr().out)
    assert excise(f"{line} --arms.new-run '{{name: maxent, fit: {{steps: 5}}}}'") == 0
    assert re.search(r"new-run +5 ", capsys.readouterr().out)


def test_an_audit_is_estimated_without_a_byte_written(
    work: Path, removed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = m.state(work)
    assert excise(f"audit removed --out dry --dry-run {SMALL}") == 0
    said = capsys.readouterr().out
    assert re.search(r"audit: relearn +2 +3 ", said)
    assert "not measured" in said
    assert m.state(work) == before
    (work / "asked.yaml").write_text(
        yaml.safe_dump(request_data(AuditOptions(folder="removed", dry_run=True)))
    )
    assert excise(f"check asked.yaml {SMALL}") == 0
    said = capsys.readouterr().out
    assert re.search(r"audit: relearn +2 +3 ", said)
    assert "rows by role" in said


def test_a_changed_input_is_named_before_all_is_made_anew(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "c.jsonl").write_text(m.texts("c"))
    line = f"{REMOVE.replace('f.jsonl', 'c.jsonl')} --out renewed"
    assert excise(line) == 0
    assert excise(line) == 0
    assert capsys.readouterr().err == ""
    before = load(work / "renewed").data["fingerprint"]
    (work / "c.jsonl").write_text(m.texts("c", start=20))
    assert excise(line) == 0
    assert capsys.readouterr().err == (
        "c.jsonl: other bytes than when renewed was made, so it is made anew\n"
    )
    assert load(work / "renewed").data["fingerprint"] != before


def test_a_tracker_gets_losses_and_scores(removed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags: list[str] = []
    fake = types.ModuleType("trackio")
    fake.__dict__.update(
        init=lambda project, name: tags.append(f"{project}/{name}"),
        log=lambda values, step: tags.append(next(iter(values))),
        finish=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    assert excise(f"{REMOVE} --out removed --track trackio") == 0
    assert tags[0] == "excise/removed"
    assert "rmu/forget" in tags
    assert any(tag.startswith("scores/rmu/test.forget/") for tag in tags)
