from __future__ import annotations

import json
from pathlib import Path

import pytest

from excise.evals.multiple_choice import choice_scores
from tests.golden.choice_rows import ROWS, make_model, make_tokenizer

FROZEN = json.loads((Path(__file__).parent / "lm_eval_choices.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["bpe", "bpe_bos", "gemma2"])
def test_log_likelihoods_are_lm_evals_to_the_item(name: str) -> None:
    tokenizer = make_tokenizer(name)
    found = choice_scores(make_model(name, tokenizer), tokenizer, ROWS, max_length=512)
    flat = [value for scores in found for value in scores]
    assert flat == pytest.approx(FROZEN["models"][name], abs=1e-4)
