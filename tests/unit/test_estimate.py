"""What a run costs, before it costs: real lengths, shapes by configuration, measured paces."""

from __future__ import annotations

import resource
import runpy
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.cli import material as m

from excise.auditor.attacks import ATTACKS, FewShot
from excise.auditor.base import Subject
from excise.auditor.budget import STANDARD
from excise.auditor.evaluation_set import evaluation_set
from excise.auditor.tuning import TrainingAttack
from excise.core.context import Context
from excise.core.errors import UserError
from excise.core.events import silent
from excise.data.domain import Domain
from excise.methods import METHODS, RMU
from excise.methods.base import PostHoc
from excise.methods.importance import ImportanceMethod
from excise.models.checkpoint import Checkpoint
from excise.models.tiny import byte_tokenizer, tiny_model
from excise.requests.audit import AuditRun
from excise.requests.recipe import Recipe
from excise.requests.registry import parse_audit, parse_recipe
from excise.run.estimate import (
    FULL,
    LIBRARIES,
    SAMPLE,
    DataSizes,
    Pace,
    Plan,
    as_there,
    evaluation_tokens,
    plan,
)
from excise.run.estimate import _activations as activations
from excise.run.estimate import _memory as estimated_memory
from excise.run.measure import measured

ROOT = Path(__file__).parents[2]
SMALL = {"steps": 6, "checkpoints": [0, 6], "rates": [0.001], "batch_size": 8}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a tiny model and rows of two lengths."""
    monkeypatch.chdir(tmp_path)
    m.save_tiny(tmp_path / "model")
    rows = [{"text": chr(97 + i % 26) * (10 if i % 2 else 30) + f" {i}"} for i in range(40)]
    (tmp_path / "f.jsonl").write_text(m.jsonl(*rows))
    (tmp_path / "r.jsonl").write_text(m.texts("r", 40))
    return tmp_path


def recipe(model: str = "model", *, audit: str = "none", **method: Any) -> Recipe:
    """Return a removal from the two files."""
    arm = {"name": "grad_diff", "max_length": 16, "fit": {"steps": 50, "batch_size": 4}} | method
    return parse_recipe(
        {
            "name": "r",
            "domain": {"name": "files", "forget": "f.jsonl", "retain": "r.jsonl"},
            "model": {"path": model},
            "arms": {"gd": arm},
            "audit": {"budget": audit, "change": SMALL if audit != "none" else {}},
        }
    )


def request(model: str = "model") -> AuditRun:
    """Return the audit of a model beside itself."""
    return parse_audit(
        {
            "name": "a",
            "domain": {
                "name": "files", "forget": "f.jsonl", "retain": "r.jsonl", "exposure": "unknown",
            },
            "candidates": {"edited": model},
            "original": {"path": model},
            "audit": {"budget": "smoke", "change": SMALL},
        }
    )  # fmt: skip


def lines_of(estimate: Plan) -> dict[str, Any]:
    """Return the lines by name."""
    return {line.name: line for line in estimate.lines}


def test_rows_are_counted_as_long_as_they_are(here: Path) -> None:
    short = lines_of(plan(recipe(), Path("out")))["gd"]
    assert short.steps == 50
    # Rows beyond 16 tokens count as 16, shorter ones as they are; without rows all count as 16.
    assert short.tokens < 50 * 4 * 2 * 16
    assert lines_of(plan(recipe(), Path("out"), rows=False))["gd"].tokens == 50 * 4 * 2 * 16
    wide = lines_of(plan(recipe(max_length=512), Path("out")))["gd"]
    assert short.tokens < wide.tokens < 50 * 4 * 2 * 40
    assert wide.flops > 6 * 47_520 * wide.tokens  # padding


def test_padding_is_the_expected_longest_of_a_batch() -> None:
    sizes = DataSizes(1, object(), None, {("a",): [(10, 1), (20, 1)]})  # type: ignore[dict-item]
    assert sizes.tokens(("a",), 100, 1) == (15.0, 15.0)  # type: ignore[arg-type]
    assert sizes.tokens(("a",), 100, 2) == (15.0, 17.5)  # type: ignore[arg-type]
    assert sizes.tokens(("a",), 12, 1) == (11.0, 11.0)  # type: ignore[arg-type]


def test_large_sets_are_sampled(here: Path) -> None:
    estimate = plan(recipe(), Path("out"))
    assert estimate.domain is not None
    row = estimate.domain.retain[0]
    many = tuple(replace(row, text=f"{i} words") for i in range(5 * SAMPLE))
    sizes = DataSizes(1, estimate.tokenizer, estimate.domain)
    sizes.tokens(many, 100, 1)
    assert len(sizes.lengths[many]) == SAMPLE


def test_an_audit_is_counted_with_its_controls_and_its_scores(here: Path) -> None:
    estimate = plan(request(), Path("out"))
    lines = lines_of(estimate)
    # Candidate, original and positive control, one rate each.
    assert (lines["audit: relearn"].steps, lines["audit: relearn"].jobs) == (6, 3)
    assert lines["audit: benign"].jobs == 3
    assert "audit: transfer" not in lines  # it reads the trainings of relearn
    assert {f"audit: {name}" for name in ("few_shot", "prefix", "direction", "quantize")} <= {
        *lines
    }
    assert lines["audit: scores on the way"].jobs % 5 == 0
    assert all(line.flops for line in estimate.lines)
    twice = lines_of(plan(recipe(audit="smoke"), Path("out")))["audit: relearn"]
    assert twice.jobs == 3


TRAINED = {name for name, cls in ATTACKS.items() if issubclass(cls, TrainingAttack)}


@pytest.mark.parametrize("name", sorted({*ATTACKS} - TRAINED - {"template"}))
def test_an_attack_without_training_reads_about_as_often_as_it_says(
    name: str,
    facts_domain: Domain,
    knowing: Checkpoint,
    never_taught: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens that go through the model, twice those that a gradient goes back through."""
    read: list[float] = []

    def note(_: Any, args: Any, inputs: dict[str, Any]) -> None:
        read.append(float(inputs["attention_mask"].sum()) * (1 + torch.is_grad_enabled()))

    load = Checkpoint.load

    def counted(self: Checkpoint, **how: Any) -> Any:
        model = load(self, **how)
        model.register_forward_pre_hook(note, with_kwargs=True)
        return model

    monkeypatch.setattr(Checkpoint, "load", counted)
    budget = STANDARD.model_copy(update={"shots": (1, 4), "random_directions": 2})
    short = {"steps": 3, "width": 16, "tokens": 6} if name == "gcg" else {}
    attack = ATTACKS[name].model_validate(short)
    subject = Subject("x", never_taught, knowing)
    attack.run(subject, facts_domain, budget, Context(tmp_path))
    tokenizer = knowing.tokenizer()
    evaluation = evaluation_set(facts_domain, budget, tokenizer)
    sizes = DataSizes(knowing.num_parameters, tokenizer, facts_domain)
    scoring = evaluation_tokens(evaluation, budget, sizes)
    told = scoring * attack.passes(as_there(budget, evaluation, scoring))
    assert 0.6 < told / sum(read) < 6


def test_rows_behind_examples_are_no_longer_than_a_prompt_can_be() -> None:
    short, long = (STANDARD.model_copy(update={"max_length": n}) for n in (20, 2048))
    assert FewShot().passes(short) == 1 + 2 * (2 + 5 + 17)
    assert FewShot().passes(long) == 1 + 2 * (2 + 2 + 2)


def test_trained_prompts_are_counted_and_controls_take_no_more_steps_at_strong(
    here: Path,
) -> None:
    def lines(budget: str) -> dict[str, Any]:
        asked = request()
        spec = asked.audit.model_copy(update={"budget": budget, "change": {}})
        return lines_of(plan(asked.model_copy(update={"audit": spec}), Path("out"), rows=False))

    standard, strong = lines("standard"), lines("strong")
    # Three rates and three seeds on candidate, original and control; one more on fresh units.
    assert standard["audit: soft_prompt"].jobs == 3 * (9 + 1)
    assert standard["audit: soft_prompt"].steps == 256
    assert standard["audit: noise"].steps == strong["audit: noise"].steps == 64
    name = "audit: positive controls"
    assert standard[name].steps == strong[name].steps == 320
    assert not {f"audit: {name}" for name in ATTACKS} - {*standard} - {
        "audit: transfer", "audit: sampling", "audit: steer", "audit: drop_adapter", "audit: gcg",
    }  # fmt: skip


@pytest.mark.parametrize("name", [n for n, c in METHODS.items() if issubclass(c, PostHoc)])
def test_every_method_after_training_is_planned_and_counts_no_second_model(
    name: str, here: Path
) -> None:
    settings: dict[str, Any] = {"name": name}
    settings |= {"layer": 1} if name in ("rmu", "rmu_lat") else {}
    settings |= {"teacher": str(here / "model")} if name == "checkpoint_transfer" else {}
    settings |= {"lora": {"rank": 2}} if name == "elm" else {}
    method = parse_recipe(recipe().model_dump(mode="json") | {"arms": {name: settings}})
    made = plan(method, Path("out"))
    line, count = made.lines[0], made.parameters
    assert line.tokens
    assert line.flops
    assert made.memory is not None
    assert count is not None
    arm = method.arms[name]
    held = estimated_memory(arm, Checkpoint(here / "model"), Checkpoint(here / "model").shapes, 4)
    weights = (held - LIBRARIES) / count / 4
    assert weights <= 5 + arm.extra_copies  # weights, masters, gradient, two moments
    if isinstance(arm, ImportanceMethod):  # gradients go into files, tensor by tensor
        largest = max(p.numel() for p in Checkpoint(here / "model").shapes.parameters())
        assert weights == pytest.approx(1 + 3 * largest / count)
    elif not hasattr(arm, "fit"):  # nothing is trained, and all rows are read once
        assert weights == 1
        assert line.steps == 0


def test_two_whole_models_are_counted_where_there_are_two(here: Path) -> None:
    start = Checkpoint(here / "model")
    full, span = (
        estimated_memory(RMU(layer=0, engine=engine), start, start.shapes, 4)
        for engine in ("full", "span")
    )
    assert full - span > 4 * start.num_parameters


def test_the_page_on_budgets_is_what_its_script_writes() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "budgets.py"))
    assert script["PAGE"].read_text("utf-8") == script["page"](), "run python benchmarks/budgets.py"


def test_seven_billion_parameters_from_their_configuration_alone(here: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
        num_attention_heads=32,
    ).save_pretrained("big")  # fmt: skip
    byte_tokenizer().save_pretrained("big")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    asked = recipe("big", audit="smoke", name="rmu", layer=7)
    estimate = plan(asked, Path("out"))
    assert estimate.parameters == 6_738_415_616
    assert all(line.flops and line.flops > 1e11 for line in estimate.lines)
    assert "no weights were read" in estimate.text()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
    # Three matrices and eight blocks need no room for the optimizer states of the whole.
    alone = plan(recipe("big", name="rmu", layer=7), Path("out"), rows=False)
    assert alone.memory is not None
    assert alone.memory < 16 * 2**30
    (here / "big" / "tokenizer.json").unlink()
    (here / "big" / "tokenizer_config.json").unlink()
    assert "no tokenizer here" in plan(asked, Path("out")).text()
    with pytest.raises(UserError, match="block 32 is beyond"):
        plan(recipe("big", name="rmu", layer=32), Path("out"))


def test_no_value_of_a_weight_is_read(here: Path) -> None:
    file = here / "model" / "model.safetensors"
    m.tensors(lambda t: t[next(iter(t))].fill_(float("nan")))(here / "model")
    assert plan(recipe(), Path("out")).parameters == 47_520
    header = int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as f:  # a hole where the values were
        size = f.seek(0, 2)
        f.truncate(8 + header)
        f.truncate(size)
    assert plan(request(), Path("out")).parameters == 47_520


def test_what_is_wrong_is_refused_as_in_the_run(here: Path) -> None:
    with pytest.raises(UserError, match="there is no folder nowhere"):
        plan(recipe("nowhere"), Path("out"), rows=False)
    with pytest.raises(UserError, match=r"owner/model.* cannot be fetched"):
        plan(recipe("owner/model"), Path("out"))
    (here / "r.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"r.jsonl line 1"):
        plan(recipe(), Path("out"))
    with pytest.raises(UserError, match=r"r.jsonl line 1"):
        plan(request(), Path("out"))
    (here / "r.jsonl").unlink()
    with pytest.raises(UserError, match=r"no file r.jsonl"):
        plan(request(), Path("out"))
    (here / "model" / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        plan(recipe(), Path("out"), rows=False)


def test_weights_that_do_not_fit_are_refused_by_their_header(here: Path) -> None:
    save_file({"x": torch.zeros(2)}, here / "model" / "model.safetensors")
    with pytest.raises(UserError, match="lacks tensor"):
        plan(recipe(), Path("out"), rows=False)


def test_a_model_to_be_fetched_is_unknown_and_not_zero(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXCISE_CACHE", str(here / "cache"))
    estimate = plan(recipe("smollm2-135m", audit="smoke"), Path("out"))
    assert (estimate.parameters, estimate.seconds, estimate.memory) == (None, None, None)
    text = estimate.text()
    assert "excise fetch smollm2-135m" in " ".join(text.split())
    assert text.count("unknown") >= 4
    assert " 0 s" not in text
    estimate.admit(1, silent, force=False)


def ticking(seconds: float) -> Iterator[float]:
    """Yield times that are `seconds` apart."""
    return (seconds * i for i in count())


@pytest.mark.parametrize("kind", ["remove", "audit"])
def test_measured_ranges_are_narrow(kind: str, here: Path) -> None:
    asked: Recipe | AuditRun = recipe(audit="smoke") if kind == "remove" else request()
    before = m.state(here)
    clock = ticking(0.5)
    planned = plan(asked, Path("out"))
    timed = measured(planned, asked, clock=lambda: next(clock))
    assert m.state(here) == before
    assert planned.seconds is not None
    assert planned.seconds[1] == pytest.approx(10 * planned.seconds[0])
    assert timed.seconds is not None
    low, high = timed.seconds
    assert 0 < low <= high <= 2 * low
    assert {"gd"} & {*timed.paces} == ({"gd"} if kind == "remove" else set())
    assert FULL in timed.paces
    # A step of the method took one tick: fifty take fifty.
    if kind == "remove":
        line = lines_of(planned)["gd"]
        assert line.flops * timed.paces["gd"].low == pytest.approx(50 * 0.5)
    assert "measured here" in timed.text()


def test_a_pace_that_was_not_measured_is_that_of_training(here: Path) -> None:
    planned = replace(plan(request(), Path("out")), paces={FULL: Pace(1e-9, 2e-9)})
    assert planned.seconds is not None
    assert planned.seconds[1] == pytest.approx(2 * planned.seconds[0])


def test_every_line_fits_a_terminal(here: Path) -> None:
    for estimate in (plan(recipe(audit="smoke"), Path("out")), plan(request(), Path("out"))):
        assert max(map(len, estimate.text().splitlines())) < 80


def test_the_table_of_what_fits_is_what_its_script_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = runpy.run_path(str(ROOT / "benchmarks" / "fits.py"))
    text = script["PAGE"].read_text("utf-8")
    assert text == script["page"](text), "run python benchmarks/fits.py"
    assert text.count(" | ") > 100


def test_lean_steps_are_counted_as_what_they_leave_out(here: Path) -> None:
    start = Checkpoint(here / "model")
    count, largest = start.num_parameters, max(p.numel() for p in start.shapes.parameters())

    def held(name: str = "gradient_ascent", **fit: Any) -> float:
        method = METHODS[name].model_validate({"fit": {"clip": 0, **fit}})
        return estimated_memory(method, start, start.shapes, 4) - LIBRARIES

    assert held() == 4 * 4 * count  # weights, gradients, two moments
    assert held(optimizer="sgd") == 2 * 4 * count
    assert held(in_backward=True) == 3 * 4 * count + 4 * largest
    assert held("grad_diff", in_backward=True) == 4 * 4 * count  # that of a role waits
    assert held(optimizer="adamw_8bit") == pytest.approx((2 * 4 + 2 + 1 / 32) * count)


def test_blocks_that_run_again_take_less_memory_and_a_forward_pass_more(here: Path) -> None:
    def asked(again: bool, **more: Any) -> dict[str, Any]:
        fit = {"batch_size": 64, "activation_checkpointing": again}
        return {"name": "npo", "max_length": 256, "fit": fit, **more}

    def flops(again: bool, **more: Any) -> float:
        change = {"arms": {"arm": asked(again, **more)}}
        made = plan(parse_recipe(recipe().model_dump(mode="json") | change), Path("out"))
        assert made.lines[0].flops is not None
        return made.lines[0].flops

    assert flops(True) == pytest.approx(4 / 3 * flops(False))
    lora = {"lora": {"rank": 2}}
    assert flops(True, **lora) == pytest.approx(3 / 2 * flops(False, **lora))
    shapes, sizes = tiny_model("llama", width=32, blocks=8), DataSizes(1, None, None)
    plain, again = (
        activations(METHODS["npo"].model_validate(asked(on)), shapes, sizes, 4)
        for on in (False, True)
    )
    tokens = 64 * 256 * 2
    logits = tokens * 12 * shapes.config.vocab_size
    inputs = tokens * 4 * 8 * 32
    assert (again - logits - inputs) * 4 == pytest.approx(plain - logits)  # two blocks' worth of 8
