"""Scores beside the headline, built in and of one's own, by recipe and registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

import excise as ex
from excise.cli import main
from excise.cli.run import recipe_data
from excise.data.domain import Domain, Rows
from excise.evals.extra import SCORES, ExtraScore, Generate, RefusalRate, extra_scores
from excise.evals.score import ItemScores, measure
from excise.models.checkpoint import Checkpoint
from excise.requests.registry import parse_recipe

MINE = '''
from typing import Literal
import excise as ex
from excise.evals.extra import ExtraScore
from excise.evals.score import ItemScores
from excise.recipes.demo import recipe as demo

class Length(ExtraScore):
    """Number of words of the prompt."""

    name: Literal["length"] = "length"

    def items(self, model, tokenizer, rows, *, max_length):
        found = tuple((row.unit, float(len(row.prompt.split()))) for row in rows)
        return ItemScores("length", "length@1", "higher", None, found)

def mine():
    return demo().model_copy(update={"name": "mine"})

def broken():
    return 3
'''


def test_who_never_refuses_has_a_rate_of_zero_and_says_what_it_knows(
    facts_domain: Domain, knowing: Checkpoint, never_taught: Checkpoint
) -> None:
    said: dict[str, float] = {}
    for name, checkpoint in (("knowing", knowing), ("never", never_taught)):
        model, tokenizer = checkpoint.load(), checkpoint.tokenizer()
        refused, _ = extra_scores(model, tokenizer, facts_domain, RefusalRate(), max_length=32)
        assert {s.value for s in refused} == {0.0}
        assert {s.set for s in refused} == {"test.tests", "retain_test"}
        only = Generate(on="test", max_rows=8)
        scores, items = extra_scores(model, tokenizer, facts_domain, only, max_length=32)
        assert len(items) == 8
        said[name] = scores[0].value
    assert said["knowing"] > 0.8
    assert said["never"] < 0.3


class Loss(ExtraScore):
    """The token loss under a name of its own."""

    name: Literal["answer_loss"] = "answer_loss"

    def items(self, model: Any, tokenizer: Any, rows: Rows, *, max_length: int) -> ItemScores:
        return measure(model, tokenizer, rows, "text_loss", max_length=max_length)


def test_a_score_goes_by_its_own_name_whatever_it_is_computed_with(
    facts_domain: Domain, knowing: Checkpoint
) -> None:
    scores, items = extra_scores(
        knowing.load(), knowing.tokenizer(), facts_domain, Loss(max_rows=4), max_length=32
    )
    assert {score.metric for score in scores} == {"answer_loss"}
    assert {item.metric for item in items} == {"answer_loss"}


def test_a_recipe_names_scores_and_a_file_adds_one(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    reference = f"{tmp_path / 'mine.py'}:Length"
    data = recipe_data("demo")
    data["evaluate"]["scores"] = [{"name": "refusal", "max_rows": 4}, {"name": reference}]
    recipe = parse_recipe(data, allow_code=True)
    assert [s.name for s in recipe.evaluate.scores] == ["refusal", "length"]  # type: ignore[attr-defined]
    assert recipe.code == {"length": reference}
    with pytest.raises(ex.UserError, match="unknown score 'refusl'; did you mean 'refusal'"):
        parse_recipe({**data, "evaluate": {"scores": [{"name": "refusl"}]}})
    assert set(SCORES) == {"refusal", "generate", "multiple_choice_calibrated"}


def test_a_recipe_may_come_from_a_file_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    reference = f"{tmp_path / 'mine.py'}:mine"
    with pytest.raises(ex.UserError, match="add --allow-code"):
        recipe_data(reference)
    assert recipe_data(reference, allow_code=True)["name"] == "mine"
    with pytest.raises(ex.UserError, match="gives no recipe"):
        recipe_data(f"{tmp_path / 'mine.py'}:broken", allow_code=True)
    assert main(["run", reference, "--allow-code", "--dry-run"]) == 0
    assert "original" in capsys.readouterr().out
