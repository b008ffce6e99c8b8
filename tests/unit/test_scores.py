"""Metrics against plain implementations of their definitions, one row at a time."""

from __future__ import annotations

import builtins
import math
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.fixtures.facts import make_domain

from excise.core.errors import NotFinite, UserError
from excise.data.domain import Row
from excise.data.rows import READS, as_letters
from excise.data.stream import encode_row, pair_of
from excise.evals.generate import continuations, prompt_of, says
from excise.evals.lm_eval_bridge import run_lm_eval, scores_of
from excise.evals.multiple_choice import pick
from excise.evals.refusal import outcome_of, refuses
from excise.evals.score import (
    DEFINITIONS,
    ItemScores,
    chance_of,
    evaluate,
    fitting,
    measure,
    measure_all,
    score_of,
)
from excise.models.tiny import byte_tokenizer, tiny_model, train_bpe

FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma2")

COMPLETIONS = tuple(
    Row(f"u{i // 2}", prompt="the capital of " + "x" * (3 * i) + " is", completion=f" Ro{i % 3}")
    for i in range(10)
)
TEXTS = tuple(Row(f"t{i}", text="some plain text " * (1 + i)) for i in range(4))
CHOICES = tuple(
    Row(
        f"c{i}", prompt="which one? " * (1 + i), choices=("aa", "a b c", "d")[: 2 + i % 2], answer=1
    )
    for i in range(6)
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(bos=True)


def plain_scores(model: Any, tokenizer: Any, row: Row) -> tuple[float, float]:
    """Loss and exact match of one row, from all logits of one unpadded forward."""
    example = encode_row(row, tokenizer, max_length=128)
    with torch.no_grad():
        logits = model(torch.tensor([example.ids])).logits[0].double().log_softmax(-1)
    losses, hits = [], []
    for t, scored in enumerate(example.target):
        if scored:
            losses.append(-float(logits[t - 1, example.ids[t]]))
            hits.append(int(logits[t - 1].argmax()) == example.ids[t])
    return sum(losses) / len(losses), float(all(hits))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_exact_match_are_the_plain_ones_to_the_item(family: str, tokenizer: Any) -> None:
    model = tiny_model(family, width=32)
    rows = (*COMPLETIONS, *TEXTS)
    # Let the model answer itself in one row, so that exact match has a one.
    row = COMPLETIONS[0]
    head = tokenizer(row.prompt)["input_ids"]
    with torch.no_grad():
        best = model(torch.tensor([head])).logits[0, -1]
    mark = tokenizer.decode([int(best[36:200].argmax()) + 36])
    rows = (*rows, Row("own", prompt=row.prompt, completion=mark))
    found = measure_all(model, tokenizer, rows, ("text_loss", "exact_match"))
    expected = [plain_scores(model, tokenizer, r) for r in rows]
    losses = [v for _, v in found["text_loss"].items]
    assert losses == pytest.approx([e[0] for e in expected], abs=1e-5)
    assert [v for _, v in found["exact_match"].items] == [e[1] for e in expected]
    assert [u for u, _ in found["text_loss"].items] == [r.unit for r in rows]


def test_exact_match_sees_a_model_that_answers(knowing: Any, never_taught: Any) -> None:
    rows = make_domain().test["tests"]
    taught = measure(knowing.load(), knowing.tokenizer(), rows, "exact_match")
    ignorant = measure(never_taught.load(), never_taught.tokenizer(), rows, "exact_match")
    assert taught.mean > 0.9
    assert ignorant.mean < 0.3
    said = measure(knowing.load(), knowing.tokenizer(), rows, "generate")
    assert said.mean == pytest.approx(taught.mean, abs=0.06)


@pytest.mark.parametrize("metric", sorted(DEFINITIONS))
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_and_padding_side_change_nothing(
    family: str, metric: str, tokenizer: Any
) -> None:
    model = tiny_model(family, width=32, seed=1)
    reads = READS.get(metric, ("choice",) if metric.startswith("multiple") else ("completion",))
    rows = COMPLETIONS if "completion" in reads else CHOICES
    one = measure(model, tokenizer, rows, metric, batch_size=1)
    many = measure(model, tokenizer, rows, metric, batch_size=64)
    left = measure(model, tokenizer, rows, metric, batch_size=3, padding_side="left")
    # It divides by how far the log-probabilities of a position spread, little in a random model.
    close = 1e-4 if metric == "min_k_plus_plus" else 1e-5
    for other in (many, left):
        assert [v for _, v in other.items] == pytest.approx([v for _, v in one.items], abs=close)


def plain_choice(model: Any, tokenizer: Any, row: Row) -> list[float]:
    """Log-likelihoods of one question by lm-eval's rule, ten lines."""
    out = []
    for choice in row.choices:
        context, continuation = row.prompt, " " + choice
        spaces = len(context) - len(context.rstrip())
        if spaces > 0:
            continuation, context = context[-spaces:] + continuation, context[:-spaces]
        whole, head = tokenizer.encode(context + continuation), tokenizer.encode(context)
        tail = whole[len(head) :]
        with torch.no_grad():
            logits = model(torch.tensor([(head + tail)[:-1]])).logits[0].log_softmax(-1)
        out.append(sum(float(logits[len(head) - 1 + i, t]) for i, t in enumerate(tail)))
    return out


def test_multiple_choice_is_lm_evals_to_the_item() -> None:
    tokenizer = train_bpe(["which one? aa d a b c " * 3], 290)
    model = tiny_model("llama", vocab=len(tokenizer), width=32, initializer_range=0.3)
    expected = [plain_choice(model, tokenizer, row) for row in CHOICES]
    names = ("multiple_choice", "multiple_choice_norm", "multiple_choice_bytes")
    found = measure_all(model, tokenizer, CHOICES, names)
    for name in names:
        for row, scores, (unit, value) in zip(CHOICES, expected, found[name].items, strict=True):
            lengths = {
                "multiple_choice": [1] * len(scores),
                "multiple_choice_norm": [len(c) for c in row.choices],
                "multiple_choice_bytes": [len(c.encode()) for c in row.choices],
            }[name]
            ratios = [s / n for s, n in zip(scores, lengths, strict=True)]
            assert (unit, value) == (row.unit, float(ratios.index(max(ratios)) == row.answer))
    assert found["multiple_choice"].chance == pytest.approx((3 / 2 + 3 / 3) / 6)


def test_choices_of_one_token_share_one_forward(tokenizer: Any) -> None:
    model = tiny_model("llama", width=32)
    rows = [as_letters(row) for row in CHOICES[:3]]
    seen: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    measure(model, tokenizer, rows, "multiple_choice", max_length=512)
    hook.remove()
    # A byte tokenizer spells " A" in two tokens that differ in the last only: one prefix each.
    assert sum(seen) == len(rows)


def test_calibration_subtracts_each_positions_mean() -> None:
    rows = [Row(str(i), prompt="?", choices=("A", "B"), answer=i % 2) for i in range(4)]
    scores = [[-1.0, -3.0 + (i % 2)] for i in range(4)]  # always A, B nearer where it is right
    assert pick(rows, scores, "multiple_choice") == [1, 0, 1, 0]
    assert pick(rows, scores, "multiple_choice_calibrated") == [1, 1, 1, 1]


def test_white_space_moves_to_the_continuation() -> None:
    tokenizer = train_bpe(["a b c"], 262, bos=False)
    pair = pair_of(Row("u", prompt="a b \n", choices=("c", "d"), answer=0), tokenizer)
    assert tokenizer.decode(pair.head) == "a b"
    assert tokenizer.decode(pair.tail) == " \n c"


def test_letters_read_like_wmdp() -> None:
    row = Row("u", prompt=" Which? ", choices=("one", "two"), answer=1)
    asked = as_letters(row, topic="biology")
    assert asked.prompt == (
        "The following are multiple choice questions (with answers) about biology.\n\n"
        "Which?\nA. one\nB. two\nAnswer:"
    )
    assert asked.choices == ("A", "B")
    assert asked.answer == 1


def test_mode_is_restored_and_no_hook_stays(tokenizer: Any) -> None:
    model = tiny_model("gpt2", width=32)
    model.train()
    model.transformer.h[0].eval()
    measure(model, tokenizer, COMPLETIONS, "text_loss")
    assert model.training
    assert not model.transformer.h[0].training
    assert model.transformer.h[1].training
    assert not model.lm_head._forward_pre_hooks


def broken_model(family: str = "llama") -> Any:
    model = tiny_model(family, width=32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(math.nan)
    return model


@pytest.mark.parametrize("metric", sorted(DEFINITIONS))
def test_a_model_without_numbers_has_no_score(metric: str, tokenizer: Any) -> None:
    rows = CHOICES if READS.get(metric, ("choice",))[-1] == "choice" else COMPLETIONS
    rows = COMPLETIONS if metric in ("generate", "refusal") else rows
    scores = measure(broken_model(), tokenizer, rows, metric)
    assert (scores.broken, len(scores.items)) == (len(rows), len(rows))
    said = f"the edited model has no finite {metric} on {len(rows)} of {len(rows)} rows"
    with pytest.raises(NotFinite, match=said) as caught:
        scores.checked("the edited model")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    known = [chance_of(rows, metric)]  # where nothing is told apart, chance is what a mean says
    assert [scores.mean] == known or (known == [None] and math.isnan(scores.mean))
    fine = measure(tiny_model("llama", width=32), tokenizer, rows, metric)
    assert fine.broken == 0
    assert fine.checked() is fine


def test_a_domain_is_not_scored_by_a_model_without_numbers(knowing: Any) -> None:
    model = knowing.load()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.inf)
    with pytest.raises(NotFinite, match="rmu has no finite exact_match"):
        evaluate(model, knowing.tokenizer(), make_domain(), name="rmu")


def test_an_impossible_token_costs_a_hundred_nats(tokenizer: Any) -> None:
    model = tiny_model("llama", width=32)
    model.lm_head = torch.nn.Linear(32, 260)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[5:] = -math.inf
    assert measure(model, tokenizer, TEXTS, "text_loss").checked().mean == 100.0


def test_ties_are_shared(tokenizer: Any) -> None:
    flat = tiny_model("llama", width=32)
    torch.nn.init.zeros_(flat.lm_head.weight)
    rows = [Row(str(i), prompt="q", choices=("Ada", "Bor", "Cel", "Dun"), answer=0) for i in "ab"]
    names = [m for m in DEFINITIONS if m.startswith("multiple")]
    for name, scores in measure_all(flat, tokenizer, rows, names).items():
        assert [v for _, v in scores.items] == [0.25, 0.25], name
    # 260 tokens tie at each of two positions; one of them is the answer's.
    two = [Row("u", prompt="q", completion="ab")]
    assert measure(flat, tokenizer, two, "exact_match").mean == pytest.approx(1 / 260**2)
    assert measure(flat, tokenizer, two, "continuation").mean == pytest.approx(1 / 260)
    rows = [Row(str(i), prompt="?", choices=("A", "B", "C"), answer=i) for i in range(3)]
    assert pick(rows, [[-1.0, -1.0, -2.0]] * 3, "multiple_choice") == [0.5, 0.5, 0.0]


def test_units_weigh_the_same_whatever_their_paraphrases() -> None:
    items = (("a", 1.0), ("a", 0.0), ("b", 1.0))
    scores = ItemScores("m", "m@1", "higher", None, items)
    assert scores.by_unit() == {"a": 0.5, "b": 1.0}
    assert scores.mean == 0.75
    row = score_of(scores, model="x", on="test.t")
    assert (row.n, row.value) == (2, 0.75)
    assert row.low <= row.value <= row.high


def test_greedy_generation_is_the_plain_loop(tokenizer: Any) -> None:
    for family in FAMILIES:
        model = tiny_model(family, width=32, seed=2)
        for row, (_, expected, output) in zip(
            COMPLETIONS, continuations(model, tokenizer, COMPLETIONS), strict=True
        ):
            prompt = prompt_of(row, tokenizer)
            ids = list(prompt.ids)
            for _ in range(prompt.room):
                with torch.no_grad():
                    best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
                if best == tokenizer.eos_token_id:
                    break
                ids.append(best)
            plain = tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=True)
            assert output == plain.strip()
            assert expected == row.completion.strip()


def test_what_counts_as_said() -> None:
    assert says(" The Rome, of course", "rome")
    assert not says("Romeo", "rome")
    assert not says("no\nrome", "rome")
    assert not says("", "rome")
    assert says("It is 3.5 km", "3.5 km")
    assert says("?!", "!")
    for output, expected, right in (
        ("DNA is it", "A", False),
        ("it is A.", "A", True),
        ("Then", "The", False),
        ("5", "-5", False),
        ("-5", "5", False),
        ("it is -5.", "-5", True),
        ("3.5", "3", False),
        ("42nd", "42", False),
        ("red\nblue\nmore", "red\nblue", True),
        ("red\ngreen", "red\nblue", False),
        ("\u5317 \u4eac", "\u5317\u4eac", True),
    ):
        assert says(output, expected) is right, (output, expected)


def test_refusal_is_apart_from_ignorance() -> None:
    assert outcome_of("I'm sorry, I can\u2019t say Rome", "Rome") == "refused"
    assert outcome_of("It is Rome", "Rome") == "right"
    assert outcome_of("It is Paris", "Rome") == "wrong"
    assert not refuses("a canto of Rome")


def test_evaluate_scores_every_set(knowing: Any) -> None:
    domain = make_domain()
    scores, items = evaluate(knowing.load(), knowing.tokenizer(), domain, name="original")
    assert {s.set for s in scores} == {"test.tests", "retain_test"}
    assert {s.metric for s in scores} == {"exact_match", "text_loss"}
    assert all(s.model == "original" and s.low <= s.value <= s.high for s in scores)
    rows = sum(len(r) for r in (*domain.test.values(), domain.retain_test))
    assert len(items) == 2 * rows
    assert fitting(("multiple_choice",), domain.retain_test) == ("text_loss",)


MISTAKES: list[tuple[Callable[[Any, Any], object], str]] = [
    (lambda m, t: measure(m, t, COMPLETIONS, "exactmatch"), "did you mean 'exact_match'"),
    (lambda m, t: measure(m, t, (), "text_loss"), "no row to score"),
    (lambda m, t: measure(m, t, COMPLETIONS, "multiple_choice"), "no multiple-choice question"),
    (lambda m, t: measure(m, t, TEXTS, "generate"), "plain text"),
    (lambda m, t: run_lm_eval(m, t, ()), "no lm-eval task was named"),
]


@pytest.mark.parametrize(("call", "words"), MISTAKES)
def test_mistakes_are_one_sentence(
    call: Callable[[Any, Any], object], words: str, tokenizer: Any
) -> None:
    with pytest.raises(UserError, match=words):
        call(tiny_model("llama", width=32), tokenizer)


def test_the_bridge_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> types.ModuleType:
        if name.split(".")[0] == "lm_eval":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install"):
        run_lm_eval(None, tokenizer, ["arc_easy"])


def test_the_bridge_reads_lm_evals_answer() -> None:
    answer = {
        "results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "ppl,none": 3.0}},
        "n-samples": {"t": {"original": 9, "effective": 4}},
        "higher_is_better": {"t": {"acc": True, "ppl": False}},
        "versions": {"t": 1.0},
    }
    acc, ppl = scores_of(answer, name="m", version="0.4.13")
    assert (acc.set, acc.metric, acc.n, acc.direction) == ("lm-eval.t", "acc", 4, "higher")
    assert acc.low == pytest.approx(0.5 - 0.196)
    assert (ppl.metric, ppl.direction) == ("ppl", "lower")
