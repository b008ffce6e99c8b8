"""Other ways to ask: what is asked, and what is left as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from excise.auditor.attacks import Filler, Paraphrase, Sampling, SoftPrompt, Template
from excise.auditor.attacks.sampling import any_of
from excise.auditor.base import Subject
from excise.auditor.budget import SMOKE, STANDARD, STRONG
from excise.auditor.evaluation_set import EvaluationSet, evaluation_set
from excise.auditor.rewriting import FRAMES, fillers, paraphrases, templates
from excise.auditor.scoring import gives_away
from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain, Row
from excise.domains.facts import Facts
from excise.domains.languages import Languages
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import byte_tokenizer, tiny_model
from excise.testing import Setting, check_attack

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINKS = CHATML.replace(
    "<|assistant|>\n{% endif %}",
    "<|assistant|>\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}",
)


def bytewise(domain: Domain, template: str = "") -> EvaluationSet:
    """Return an evaluation whose tokenizer spells everything."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or None
    budget = SMOKE.model_copy(update={"max_length": 512})
    return evaluation_set(domain, budget, tokenizer)


def test_test_units_are_asked_in_every_paraphrase_a_domain_has() -> None:
    domain = Facts(subjects=24, relations=2, objects=8).build()
    evaluation = evaluation_set(domain, SMOKE, Facts(subjects=24).tokenizer())
    ways = paraphrases(evaluation, frames=())
    assert [way.variant for way in ways] == ["paraphrase 0", "paraphrase 1", "paraphrase 2"]
    asked = ways[1].change(evaluation.all_test, evaluation)
    assert [row.unit for row in asked] == [row.unit for row in evaluation.all_test]
    assert {row.wording for row in asked} == {1}
    assert [row.completion for row in asked] == [r.completion for r in evaluation.all_test]
    assert {row.wording for row in ways[1].change(evaluation.retain, evaluation)} == {1}


def test_a_paraphrase_of_few_units_is_left_out_and_their_rows_are_left_alone() -> None:
    domain = Facts(subjects=24, relations=2, objects=8).build()
    units = {row.unit for rows in domain.test.values() for row in rows}
    gone = sorted(units)[0]
    forget = {n: tuple(r for r in rows if r.unit != gone) for n, rows in domain.forget.items()}
    domain = replace(domain, forget=forget, unlabeled=())
    evaluation = evaluation_set(domain, SMOKE, Facts(subjects=24).tokenizer())
    asked = paraphrases(evaluation, frames=())[0].change(evaluation.all_test, evaluation)
    assert [row.unit for row in asked if row.wording == 3] == [gone]
    none = replace(domain, forget={}, unlabeled=())
    assert not paraphrases(evaluation_set(none, SMOKE, byte_tokenizer()), frames=())


def test_frames_stand_around_prompts_and_need_a_vocabulary(facts_domain: Domain) -> None:
    evaluation = bytewise(facts_domain)
    ways = {way.variant: way for way in paraphrases(evaluation)}
    row = evaluation.all_test[0]
    framed = ways[f"'{FRAMES[0]}'"].change((row,), evaluation)[0]
    assert framed.prompt == f"Question: {row.prompt}\nAnswer:"
    chat = Row(unit="u", messages=(("user", "who?"), ("assistant", "me")))
    tokenizer = byte_tokenizer(chat=True)
    wide = replace(evaluation, tokenizer=tokenizer)
    assert ways[f"'{FRAMES[0]}'"].change((chat,), wide)[0].messages[0][1] == (
        "Question: who?\nAnswer:"
    )
    short = replace(evaluation, max_length=len(row.prompt) + len(row.completion))
    assert ways[f"'{FRAMES[0]}'"].change((row,), short) == (row,)


def test_plain_texts_have_no_paraphrase_to_ask(
    facts_domain: Domain, knowing: Checkpoint, tmp_path: Path
) -> None:
    rows = {n: tuple(Row(unit=r.unit, text=r.prompt) for r in rs)
            for n, rs in facts_domain.test.items()}  # fmt: skip
    domain = replace(facts_domain, test=rows, metrics=("text_loss",))
    for attack in (Paraphrase(), Template(), Sampling()):
        result = attack.run(Subject("x", knowing), domain, SMOKE, Context(tmp_path))
        (entry,) = (variant.entry for variant in result.variants)
        assert (entry.status, entry.facts, result.chosen) == ("missing", {"applies": False}, ())
        assert entry.reason


def test_filler_is_unrelated_and_holds_no_scored_verse(facts_domain: Domain) -> None:
    evaluation = bytewise(facts_domain)
    ways = fillers(evaluation, Context(Path()))
    assert [way.variant for way in ways] == ["benign k=4", "Spanish k=4"]
    scored = {row.prompt for row in evaluation.all_test}
    for way in ways:
        for row in way.change(evaluation.all_test[:3], replace(evaluation, max_length=4096)):
            head = row.prompt.rpartition("\n")[0]
            assert head
            assert not any(prompt in head for prompt in scored)
    verses = bytewise(Languages(verses=600).build()) if "verses" in Languages.model_fields else None
    if verses is not None:
        pool = [w for w in fillers(verses, Context(Path())) if w.variant.startswith("Spanish")]
        texts = {row.text for row in verses.all_test}
        shown = pool[0].change(verses.all_test[:4], replace(verses, max_length=1 << 14))
        assert not any(text in row.prompt for row in shown for text in texts)


def test_a_template_is_put_around_prompts_and_taken_off_conversations(
    facts_domain: Domain,
) -> None:
    evaluation = bytewise(facts_domain, CHATML)
    row = evaluation.all_test[0]
    (on,) = templates(evaluation, None)
    asked = on.change((row,), evaluation)[0]
    assert asked.prompt == f"<|user|>{row.prompt}\n<|assistant|>\n"
    assert asked.completion == row.completion.strip()
    chat = Row(unit="u", messages=(("user", "who?"), ("assistant", "me")))
    talk = bytewise(replace(facts_domain, test={"t": (chat,)}), CHATML)
    (off,) = templates(talk, None)
    plain = off.change((chat,), talk)[0]
    assert (plain.kind, plain.prompt, plain.completion) == ("completion", "who?", "\nme")
    assert not templates(bytewise(facts_domain), None)


def test_what_a_template_refuses_is_a_sentence(facts_domain: Domain) -> None:
    evaluation = bytewise(facts_domain, "{{ raise_exception('no user') }}")
    with pytest.raises(UserError, match="refuses a prompt of the user alone"):
        templates(evaluation, None)[0].change(evaluation.all_test, evaluation)


def test_an_answer_is_asked_behind_the_models_own_trace(
    facts_domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = bytewise(facts_domain, THINKS)
    rooms: list[int] = []

    def traces(model: Any, tokenizer: Any, prompts: Any) -> list[str | None]:
        rooms.extend(prompt.room for prompt in prompts)
        return [f"it is {row.completion} </think> so", None]

    monkeypatch.setattr("excise.auditor.rewriting.continue_greedily", traces)
    off, short = templates(evaluation, None, (8,))[1:]
    row, other = evaluation.all_test[:2]
    assert off.change((row,), evaluation)[0].prompt.endswith("<think>\n\n</think>\n\n")
    first, second = short.change((row, other), evaluation)
    assert first.prompt.endswith(f"<think>\nit is {row.completion}\n</think>\n\n")
    assert second.prompt.endswith("<think>\n\n</think>\n\n")
    assert rooms == [8, 8]
    assert gives_away(first)
    assert not gives_away(second)


def test_a_model_thinks_within_its_room(facts_domain: Domain) -> None:
    evaluation = bytewise(facts_domain, THINKS)
    (way,) = [w for w in templates(evaluation, tiny_model("llama", vocab=300), (8,))
              if w.variant == "thinking for 8 tokens"]  # fmt: skip
    rows = evaluation.all_test[:3]
    new = way.change(rows, evaluation)
    assert [row.completion for row in new] == [row.completion.strip() for row in rows]
    assert new == way.change(rows, evaluation)


@pytest.fixture
def templated(facts_domain: Domain, knowing: Checkpoint, never_taught: Checkpoint,
              tmp_path: Path) -> Setting:  # fmt: skip
    """The facts, of models whose template puts a fact of the retain set before the prompt."""
    shown = facts_domain.benign[0]
    text = shown.prompt + shown.completion

    def with_template(checkpoint: Checkpoint, name: str) -> Checkpoint:
        tokenizer = checkpoint.tokenizer()
        tokenizer.chat_template = (
            f"{text} {{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"
        )
        return save_model(checkpoint.load(), tokenizer, tmp_path / name)

    return Setting(
        facts_domain, with_template(knowing, "knowing"), with_template(never_taught, "never")
    )


def test_the_template_attack_keeps_the_contract(templated: Setting) -> None:
    check_attack(Template(), setting=templated)


def test_any_of_k_is_the_expectation_over_rows() -> None:
    chances = any_of([("a", 0.5), ("a", 0.0), ("b", 1.0)], 2)
    assert chances == {"a": pytest.approx(0.375), "b": 1.0}


def test_smoke_asks_for_none_of_them_and_standard_for_those_that_decide() -> None:
    names = {attack().name for attack in (Paraphrase, Filler, Template, SoftPrompt)}
    assert not names & {*SMOKE.attacks}
    assert names <= {*STANDARD.attacks} & {*STRONG.attacks}
    assert "sampling" not in STRONG.attacks
