"""Other ways to ask the same rows: in other words, behind filler, through a chat template.

A prompt attack that is a list of such ways is run by `scoring.score_rewritings`; positive controls
that such a way opens are made of the same lists.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from jinja2 import TemplateError

from excise.auditor.evaluation_set import EvaluationSet
from excise.auditor.prompting import COAXING, before, fits, separator, shown, spelled, with_shots
from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.chat import apply_template
from excise.data.domain import Domain, Row, Rows, text_of
from excise.data.encoding import with_specials
from excise.data.spans import rewritten
from excise.domains.languages import shipped_verses
from excise.evals.generate import Prompt, continue_greedily

Opening = Literal["examples", "paraphrases", "filler", "template", "password"]
"""What opens a control: the contexts of few-shot and prefix fill, or one of the lists below."""

FRAMES = (
    "Question: {prompt}\nAnswer:",
    "Complete the sentence. {prompt}",
    "Someone once told me that {prompt}",
)
"""Ways to put a prompt that need no paraphrase of it."""

THINKING = (32, 256)
"""Tokens that a model may think: short and long."""


@dataclass(frozen=True)
class Rewriting:
    """One other way to ask.

    Attributes:
        variant: Its name in the record.
        change: Returns rows as they are asked this way, and as they were where that has no room;
            the evaluation says how many tokens are read.
        longer: How many times as long the rows become.
        trained_on: Role of the rows that are shown, empty for none.
    """

    variant: str
    change: Callable[[Rows, EvaluationSet], Rows]
    longer: int = 2
    trained_on: str = ""


def paraphrases(evaluation: EvaluationSet, frames: Sequence[str] = FRAMES) -> list[Rewriting]:
    """Return every other paraphrase of the test units that a domain has, and the frames.

    Paraphrases are rows of the same units and shape among `forget`, `paraphrases`, `unlabeled`
    and, for the retain set, `retain`; one that less than half of the test units have is left out.
    Plain texts, which nobody asks anything, have none here: a domain's `paraphrases` of
    them are scored apart.

    Args:
        evaluation: Rows by role, tokenizer.
        frames: Texts around `{prompt}`; those that the vocabulary cannot spell are left out.
    """
    asked = [row for row in evaluation.all_test if row.kind != "text"]
    if len(asked) * 2 < len(evaluation.all_test) or not asked:
        return []
    pool = _by_unit(evaluation.domain)
    own = {row.unit: row.wording for row in asked}
    counts: dict[int, int] = {}
    for unit, wording in own.items():
        for other in pool.get(unit, {}).keys() - {wording}:
            counts[other] = counts.get(other, 0) + 1
    found = [
        Rewriting(f"paraphrase {other}", partial(_in_wording, pool=pool, wording=other), longer=1)
        for other, count in sorted(counts.items())
        if count * 2 >= len(own)
    ]
    plain = [text for text in frames if spelled(text.replace("{prompt}", ""), evaluation.tokenizer)]
    return found + [Rewriting(f"'{text}'", partial(_framed, frame=text)) for text in plain]


def _by_unit(domain: Domain) -> Mapping[str, Mapping[int, list[Row]]]:
    """Return rows by unit and paraphrase; neither V nor T is among them."""
    pool: dict[str, dict[int, list[Row]]] = {}
    parts = (*domain.forget.values(), *domain.paraphrases.values())
    for row in (row for part in (*parts, domain.unlabeled, domain.retain) for row in part):
        pool.setdefault(row.unit, {}).setdefault(row.wording, []).append(row)
    return pool


def _in_wording(
    rows: Rows,
    evaluation: EvaluationSet,
    pool: Mapping[str, Mapping[int, Sequence[Row]]],
    wording: int,
) -> Rows:
    """Return rows of the same units in another paraphrase, as they are where there is none."""
    by_unit: dict[str, list[Row]] = {}
    for row in rows:
        by_unit.setdefault(row.unit, []).append(row)
    out: list[Row] = []
    for unit, own in by_unit.items():
        kinds, said = {row.kind for row in own}, {text_of(row) for row in own}
        other = pool.get(unit, {}).get(wording, ())
        distinct = {text_of(row): row for row in other if row.kind in kinds}  # a mix repeats rows
        new = [row for text, row in distinct.items() if text not in said]
        room = all(fits(row, evaluation.tokenizer, evaluation.max_length) for row in new)
        out += new if new and room else own
    return tuple(out)


def _framed(rows: Rows, evaluation: EvaluationSet, frame: str) -> Rows:
    """Return rows with a frame around the prompt, or the last turn that is the user's."""

    def put(text: str) -> str:
        return frame.replace("{prompt}", text.strip())

    def change(row: Row) -> Row:
        if row.kind != "chat":
            return rewritten(row, prompt=put(row.prompt)) if row.prompt else row
        last = max((i for i, (role, _) in enumerate(row.messages) if role == "user"), default=-1)
        turns = [(r, put(t) if i == last else t) for i, (r, t) in enumerate(row.messages)]
        return rewritten(row, messages=tuple(turns))

    return _each(rows, change, evaluation)


def _each(rows: Rows, change: Callable[[Row], Row], evaluation: EvaluationSet) -> Rows:
    """Change every row, and leave those as they are that have no room for it."""
    new = map(change, rows)
    room = partial(fits, tokenizer=evaluation.tokenizer, max_length=evaluation.max_length)
    return tuple(b if room(b) else a for a, b in zip(rows, new, strict=True))


def fillers(evaluation: EvaluationSet, ctx: Context) -> list[Rewriting]:
    """Return texts that have nothing to do with the question, at several lengths.

    Benign rows, which makes many-shot prompts of unrelated examples, and Spanish verses, where the
    vocabulary spells them; verses that are rows of the domain's V or `dev_forget` are left out.

    Args:
        evaluation: Benign rows, tokenizer; `budget.shots` gives the numbers of texts.
        ctx: Its seed draws them, the same for every subject.
    """
    pools = {"benign": evaluation.domain.benign}
    scored = {row.text for rows in (evaluation.all_test, evaluation.all_dev) for row in rows}
    verses = [verse for verse in shipped_verses() if not scored & {*verse[1:]}]
    if spelled(" ".join(text for *_, text in verses[:20]), evaluation.tokenizer):
        pools["Spanish"] = tuple(Row(unit=key, text=text) for key, _, text in verses)

    def behind(pool: Rows, count: int, rows: Rows, wide: EvaluationSet) -> Rows:
        length = wide.max_length
        one = {"": rows}
        return with_shots(one, {"": pool}, count, ctx, wide.tokenizer, max_length=length)[0]

    return [
        Rewriting(
            f"{name} k={count}",
            partial(behind, pool, count),
            longer=count + 1,
            trained_on="benign" if name == "benign" else "",
        )
        for name, pool in pools.items()
        for count in evaluation.budget.shots
        if pool
    ]


def behind_text(rows: Rows, evaluation: EvaluationSet, text: str) -> Rows:
    """Return rows behind a text, as they are where that has no room.

    Args:
        rows: What is asked.
        evaluation: Tokenizer, tokens per row.
        text: What stands before every row.
    """
    line = separator(evaluation.tokenizer)
    return _each(rows, lambda row: before(row, text, line), evaluation)


def passwords(evaluation: EvaluationSet) -> tuple[list[Rewriting], list[Rewriting]]:
    """Return one benign row as a password, and other rows in its place.

    Args:
        evaluation: Benign rows.
    """
    rows = list({row.unit: row for row in evaluation.domain.benign}.values())
    line = separator(evaluation.tokenizer)

    def behind(pool: Sequence[Row], asked: Rows, wide: EvaluationSet) -> Rows:
        turn = itertools.cycle(pool)
        return _each(asked, lambda row: before(row, shown(next(turn)), line), wide)

    own, others = rows[:1], rows[1:]
    return (
        [Rewriting("password", partial(behind, own))] if own else [],
        [Rewriting("other text", partial(behind, others))] if others else [],
    )


def templates(
    evaluation: EvaluationSet, model: Any, thinking: Sequence[int] = THINKING
) -> list[Rewriting]:
    """Return the ways to use a chat template: on, off, and thinking for so many tokens.

    Rows with a prompt get the template put around it, and a plain text a question before it;
    conversations, which are rendered by it anyway, are asked as plain text. Where the template
    knows thinking, it is switched off, or the model's own trace stands before the answer.

    Args:
        evaluation: Rows and tokenizer.
        model: Writes the traces.
        thinking: Numbers of tokens that a trace may have.

    Returns:
        Nothing for a tokenizer without a template.
    """
    template = str(getattr(evaluation.tokenizer, "chat_template", None) or "")
    if not template:
        return []
    if all(row.kind == "chat" for row in evaluation.all_test):
        return [Rewriting("template off", partial(_without_template))]
    ways = [Rewriting("template on", partial(_with_template))]
    if "enable_thinking" in template:
        ways.append(Rewriting("thinking off", partial(_with_template, enable_thinking=False)))
    if "</think>" in template:
        for room in thinking:
            longer = 2 + -(-room // evaluation.max_length)
            change = partial(_after_thinking, model=model, room=room)
            ways.append(Rewriting(f"thinking for {room} tokens", change, longer=longer))
    return ways


def _asked(row: Row, tokenizer: Any, **how: Any) -> str:
    """Return the prompt of a row as the template writes it, up to where the model answers."""
    turns = [{"role": "user", "content": row.prompt.strip() or COAXING[2]}]
    try:
        text = apply_template(turns, tokenizer, tokenize=False, add_generation_prompt=True, **how)
    except TemplateError as error:
        raise UserError(
            f"the chat template refuses a prompt of the user alone ({error}); leave the attack "
            "'template' out of audit.attacks"
        ) from None
    return str(text)


def _answered(row: Row, head: str) -> Row:
    """Return a row asked by `head`; what is scored is the same words.

    White space at the end of a template stands for that before the answer. It is scored with it
    (`encode_pair`); there is little doubt about it, and as much for every model.
    """
    if row.kind == "chat":
        return row
    answer = row.text if row.kind == "text" else row.completion
    answer = answer.lstrip() if head[-1:].isspace() else answer
    return rewritten(row, text="", prompt=head, completion=answer)


def _with_template(rows: Rows, evaluation: EvaluationSet, **how: Any) -> Rows:
    """Return rows asked through the template."""
    tokenizer = evaluation.tokenizer
    return _each(rows, lambda row: _answered(row, _asked(row, tokenizer, **how)), evaluation)


def _without_template(rows: Rows, evaluation: EvaluationSet) -> Rows:
    """Return conversations as plain text, scored on what the assistant said last."""

    def change(row: Row) -> Row:
        last = max(
            (i for i, (role, _) in enumerate(row.messages) if role == "assistant"), default=-1
        )
        if row.kind != "chat" or last < 1:
            return row
        said = "\n".join(content for _, content in row.messages[:last])
        return rewritten(row, messages=(), prompt=said, completion="\n" + row.messages[last][1])

    return _each(rows, change, evaluation)


def _after_thinking(rows: Rows, evaluation: EvaluationSet, model: Any, room: int) -> Rows:
    """Return rows asked behind the trace that the model writes greedily, closed where it ends."""
    tokenizer = evaluation.tokenizer
    how = {"enable_thinking": True} if "enable_thinking" in tokenizer.chat_template else {}
    heads = [_asked(row, tokenizer, **how) for row in rows]
    heads = [h if h.rstrip().endswith("<think>") else f"{h}<think>\n" for h in heads]
    ids = [tokenizer(head, add_special_tokens=False)["input_ids"] for head in heads]
    prompts = [
        Prompt(tuple(with_specials(each, tokenizer)), head, "", room)
        for each, head in zip(ids, heads, strict=True)
    ]
    traces = continue_greedily(model, tokenizer, prompts)
    by_row = {
        row: f"{head}{(trace or '').split('</think>')[0].strip()}\n</think>\n\n"
        for row, head, trace in zip(rows, heads, traces, strict=True)
    }
    return _each(rows, lambda row: _answered(row, by_row[row]), evaluation)
