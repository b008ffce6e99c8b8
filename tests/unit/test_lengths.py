"""What a model can read: positions that end, and states that padding would change."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fixtures.facts import make_domain
from tests.fixtures.odd_models import ENDLESS, LEARNED, POSITIONS, RECURRENT, odd_model

import excise as ex
from excise.auditor.attacks.prefix import _if_it_fits
from excise.auditor.budget import SMOKE
from excise.auditor.evaluation_set import evaluation_set
from excise.auditor.prompting import before, fits, pools_of, with_shots
from excise.core.config import ConfigError
from excise.core.context import Context
from excise.data.domain import Row
from excise.evals.generate import continuations, prompt_of, room_of
from excise.evals.score import measure
from excise.methods.distillation.sampling import sample
from excise.methods.distillation.undo import Undo
from excise.methods.posthoc.maxent import MaxEnt
from excise.models.limits import carries_state, position_limit
from excise.models.tiny import byte_tokenizer, tiny_config
from excise.requests.lengths import check_lengths, fit_lengths
from excise.requests.recipe import AuditSpec, EvalSpec
from excise.requests.registry import parse_recipe
from excise.train.fit import FitConfig

LONG = tuple(
    Row(f"u{i}", prompt="where is it? " * (3 + i), completion=f" in town {i}" * 2) for i in range(4)
)
ASKED = tuple(
    Row(f"c{i}", prompt="which one? " * (1 + 2 * i), choices=("aa", "a b c", "d"), answer=1)
    for i in range(4)
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(bos=True)


@pytest.mark.parametrize("family", sorted({**LEARNED, **ENDLESS}))
def test_the_limit_is_where_a_forward_fails(family: str) -> None:
    model = odd_model(family)
    limit = position_limit(model.config)
    ids_BT = torch.full((1, POSITIONS), 7)
    assert model(input_ids=ids_BT).logits.shape[1] == POSITIONS
    longer_BT = torch.full((1, POSITIONS + 1), 7)
    if family in ENDLESS:
        assert limit is None
        assert model(input_ids=longer_BT).logits.shape[1] == POSITIONS + 1
        return
    assert limit == POSITIONS
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=longer_BT)


@pytest.mark.parametrize("metric", ["text_loss", "multiple_choice", "generate", "continuation"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj", "mpt"])
def test_rows_are_cut_to_the_positions(family: str, metric: str, tokenizer: Any) -> None:
    model = odd_model(family)
    rows = ASKED if metric.startswith("multiple") else LONG
    far = measure(model, tokenizer, rows, metric, max_length=1000)
    assert far == measure(model, tokenizer, rows, metric, max_length=POSITIONS)
    assert far.broken == 0


@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj", "mpt"])
def test_generation_stops_where_positions_end(family: str, tokenizer: Any) -> None:
    model = odd_model(family)
    rows = [
        *LONG,
        Row("short", prompt="a", completion=" b" * 20),
        Row("mid", prompt="a" * 30, completion=" b" * 20),
    ]
    said = continuations(model, tokenizer, rows, max_length=500, max_new=64)
    for row, (_, _, text) in zip(rows, said, strict=True):
        prompt = prompt_of(row, tokenizer, max_length=POSITIONS)
        ids = list(prompt.ids)
        for _ in range(prompt.room):
            if len(ids) > POSITIONS:
                break
            with torch.no_grad():
                best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if best == tokenizer.eos_token_id:
                break
            ids.append(best)
        new = tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=True)
        assert text == new.strip()
    assert room_of(model, POSITIONS, 9) == 1
    assert room_of(model, POSITIONS - 3, 9) == 4
    assert room_of(model, 3, 9) == 9
    prompts = [tuple(range(4, 4 + n)) for n in (5, 40, 46)]
    together = sample(model, tokenizer, prompts, [1, 2, 3], new_tokens=30)
    alone = [
        sample(model, tokenizer, [p], [s], new_tokens=30)[0]
        for p, s in zip(prompts, (1, 2, 3), strict=True)
    ]
    assert together == alone
    assert all(len(p) + len(n) <= POSITIONS + 1 for p, n in zip(prompts, together, strict=True))


@pytest.mark.parametrize("metric", ["generate", "min_k_plus_plus", "multiple_choice", "text_loss"])
@pytest.mark.parametrize("family", sorted(RECURRENT))
def test_padding_never_changes_what_a_state_says(family: str, metric: str, tokenizer: Any) -> None:
    model = odd_model(family)
    assert carries_state(model)
    rows = ASKED if metric.startswith("multiple") else LONG
    one = measure(model, tokenizer, rows, metric, batch_size=1)
    for side in ("left", "right"):
        other = measure(model, tokenizer, rows, metric, batch_size=3, padding_side=side)
        assert [v for _, v in other.items] == pytest.approx([v for _, v in one.items], abs=1e-5)


@pytest.mark.parametrize("family", sorted(RECURRENT))
def test_a_state_is_continued_as_if_alone(family: str, tokenizer: Any) -> None:
    model = odd_model(family)
    said = continuations(model, tokenizer, LONG, max_new=6)
    assert said == [continuations(model, tokenizer, [row], max_new=6)[0] for row in LONG]
    prompts = [(4, 5), (6, 7, 8), (9, 10), (11, 12, 13, 14)]
    together = sample(model, tokenizer, prompts, range(4), new_tokens=5)
    assert together == [
        sample(model, tokenizer, [p], [i], new_tokens=5)[0] for i, p in enumerate(prompts)
    ]


SHORT = {"family": "gpt2", "overrides": {"n_positions": 40}}


def recipe(**changes: Any) -> Any:
    data = {
        "name": "x",
        "domain": {"name": "facts", "subjects": 24, "relations": 2, "objects": 4},
        "model": {"scratch": SHORT},
        "pretrain": {"fit": {"steps": 2, "lr": 0.001, "batch_size": 4}},
        "arms": {"rmu": {"name": "rmu", "layer": 0}},
    }
    return parse_recipe({**data, **changes})


def test_defaults_are_cut_to_the_positions_and_said_so() -> None:
    notes: list[str] = []
    fitted = fit_lengths(recipe(), lambda _, data: notes.append(data["text"]))
    assert notes == ["rows are cut to the 40 positions of the model"]
    assert fitted.evaluate.max_length == 40
    assert fitted.pretrain.max_length == 40
    assert fitted.arms["rmu"].max_length == 40
    assert fitted.arms["rmu"].later_max_length == 0
    assert fitted.audit.change == {"max_length": 40}
    assert fit_lengths(fitted) == fitted
    rotary = recipe(model={"scratch": {**SHORT, "family": "llama", "overrides": {}}})
    assert fit_lengths(rotary) is rotary


def test_lengths_that_were_asked_for_are_refused_by_name() -> None:
    asked = recipe(
        evaluate={"max_length": 41},
        arms={
            "rmu": {"name": "rmu", "layer": 0, "max_length": 99},
            "both": {"name": "chain", "methods": [{"name": "maxent", "max_length": 50}]},
            "undo": {"name": "undo", "unlearn": {"fit": {"steps": 1}}},
        },
        audit={"change": {"max_length": 64}},
    )
    with pytest.raises(ConfigError) as caught:
        fit_lengths(asked)
    assert sorted(problem.partition(":")[0] for problem in caught.value.problems) == [
        "arms.both.methods[0].max_length",
        "arms.rmu.max_length",
        "audit.change.max_length",
        "evaluate.max_length",
    ]
    assert all(
        problem.endswith(": the model has positions for 40 tokens; use 40 or fewer")
        for problem in caught.value.problems
    )


def test_a_default_inside_a_default_is_cut() -> None:
    config = tiny_config("gpt2", n_positions=40)
    default = Undo().unlearn
    assert isinstance(default, MaxEnt)
    inner = default.max_length
    assert inner > 40
    cut = check_lengths(Undo(), config).unlearn
    assert cut == default.model_copy(update={"max_length": 40})
    with pytest.raises(ConfigError, match=r"unlearn\.max_length: the model has positions for 40"):
        check_lengths(Undo(unlearn=MaxEnt(max_length=inner + 1)), config)
    assert check_lengths(EvalSpec(max_length=40), config).max_length == 40
    spec = AuditSpec(budget="none")
    assert check_lengths(spec, config) is spec


def test_examples_that_do_not_fit_are_left_out_whole(tokenizer: Any, tmp_path: Path) -> None:
    cpu = Context(tmp_path, 0)
    domain = make_domain()
    rows = {"tests": domain.test["tests"][:3]}
    pools = {"tests": pools_of(domain)["tests"]}
    whole, tokens = with_shots(rows, pools, 4, cpu, tokenizer, max_length=10_000)
    size = {row: len(tokenizer(row.prompt + row.completion)["input_ids"]) for row in whole}
    some, fewer = with_shots(rows, pools, 4, cpu, tokenizer, max_length=max(size.values()) - 1)
    assert fewer < tokens
    for full, cut in zip(whole, some, strict=True):
        assert fits(cut, tokenizer, max(size.values()) - 1)
        lines = full.prompt.split("\n")
        assert cut.prompt.split("\n") in (lines, lines[1:])
    bare, none = with_shots(rows, pools, 4, cpu, tokenizer, max_length=1)
    assert (bare, none) == (rows["tests"], 0.0)


def test_prompts_are_given_no_more_room_than_there_are_positions(tokenizer: Any) -> None:
    budget = SMOKE.model_copy(update={"max_length": 20})
    evaluation = evaluation_set(make_domain(), budget, tokenizer)
    assert evaluation.longer(2, odd_model("gpt2")).max_length == 40
    assert evaluation.longer(4, odd_model("gpt2")).max_length == POSITIONS
    assert evaluation.longer(4, odd_model("llama")).max_length == 80
    row = Row("u", prompt="who?", completion=" me")  # eight tokens with BOS
    with_six = partial(_if_it_fits, row, partial(before, context="12345"))
    assert with_six(replace(evaluation, max_length=14)) == before(row, "12345")
    assert with_six(replace(evaluation, max_length=13)) is row


def test_a_removal_reads_long_rows_as_far_as_the_positions_go(
    tokenizer: Any, tmp_path: Path
) -> None:
    for kind in ("forget", "retain"):
        rows = [{"text": f"{kind} {i} {i * 7} " * 20} for i in range(20)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{kind}.jsonl").write_text(lines, encoding="utf-8")
    files = ex.Files(
        forget={"forget": str(tmp_path / "forget.jsonl")}, retain=str(tmp_path / "retain.jsonl")
    )
    fit = FitConfig(steps=1, lr=1e-3, batch_size=4)
    model = odd_model("gpt2")
    removal = ex.remove(
        model, ex.GradDiff(fit=fit), files, tokenizer=tokenizer, out=tmp_path / "out"
    )
    cut = ex.remove(model, ex.GradDiff(fit=fit, max_length=POSITIONS), files, tokenizer=tokenizer,
        out=tmp_path / "cut",
    )  # fmt: skip
    assert removal.checkpoint.fingerprint == cut.checkpoint.fingerprint
    with pytest.raises(ConfigError, match="max_length: the model has positions for 48 tokens"):
        ex.remove(model, ex.GradDiff(fit=fit, max_length=POSITIONS + 1), files, tokenizer=tokenizer,
            out=tmp_path / "no",
        )  # fmt: skip
    assert not (tmp_path / "no").exists()
