"""The checks that excise offers to packages, and what a score and a domain must hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from excise_example.answer_rank import AnswerRank
from excise_example.glossary import Glossary
from excise_example.norm_reset import NormReset
from excise_example.task_negation import TaskNegation

import excise as ex
from excise.models.tiny import byte_tokenizer, tiny_model
from excise.testing import check_attack, check_method


def test_task_negation_keeps_the_contract() -> None:
    check_method(TaskNegation())


def test_norm_reset_has_power_and_invents_nothing() -> None:
    check_attack(NormReset())


def test_answer_rank_is_one_over_the_place_of_the_answer_among_all_tokens() -> None:
    model, tokenizer = tiny_model("llama").eval(), byte_tokenizer(bos=True)
    logits_V = model(**tokenizer("Ann likes", return_tensors="pt")).logits[0, -1]
    letters = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in "abc"}
    rank = {a: int((logits_V > logits_V[i]).sum()) + 1 for a, i in letters.items()}
    rows = tuple(ex.Row(unit=a, prompt="Ann likes", completion=a) for a in letters)
    scores = AnswerRank().items(model, tokenizer, rows, max_length=32)
    assert scores.items == tuple((letter, 1 / rank[letter]) for letter in letters)
    assert len(set(rank.values())) > 1


def test_a_term_of_the_glossary_lies_in_one_role_and_a_missing_column_is_named(
    tmp_path: Path,
) -> None:
    path = tmp_path / "terms.csv"
    lines = [f"term{i},what {i} means,{'sea' if i % 2 else 'land'}" for i in range(80)]
    path.write_text("\n".join(["term,definition,topic", *lines]), encoding="utf-8")
    domain = Glossary(file=path, topic="sea").build()
    units = [{row.unit for row in rows} for _, rows in domain.roles()]
    assert sum(map(len, units)) == len(set().union(*units)) == 80
    path.write_text("term,definition\nx,y\n", encoding="utf-8")
    with pytest.raises(ex.UserError, match="no column 'topic'"):
        Glossary(file=path, topic="sea").build()
