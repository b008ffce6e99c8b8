"""Losses on forget sequences against plain loops beside a frozen model, written from formulas."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain, Row
from excise.data.stream import Example, collate, encode
from excise.methods import (
    DPO,
    METHODS,
    NPO,
    UNDIAL,
    AltPO,
    GradDiff,
    GradientAscent,
    IdkDPO,
    SimNPO,
)
from excise.methods.posthoc import altpo, answers, preference
from excise.methods.posthoc.reference import (
    FILE,
    ComputeReference,
    Reference,
    data_fingerprint,
    reference_of,
)
from excise.methods.tuning import TuningMethod, role_streams, stream
from excise.models.checkpoint import Checkpoint
from excise.models.lora import LoRA
from excise.train.fit import FitConfig
from tests.parity.toy import context, toy_checkpoint, toy_domain, weights

# A larger epsilon than usual: Adam divides by it, and where a gradient is nothing but rounding, as
# that of a KL to oneself at the first step, it makes a step of it.
FIT = FitConfig(steps=6, lr=1e-3, batch_size=4, eps=1e-4)


def questions() -> Domain:
    """Return the toy domain, every row to forget a question with three options."""
    domain = toy_domain()
    asked = []
    for i, row in enumerate(domain.forget["a"]):
        *prompt, one, two = row.text.split()
        options = (one, f"{two} {one}", "w1")
        asked.append(replace(row, text="", prompt=" ".join(prompt), choices=options, answer=i % 3))
    return replace(domain, forget={"a": tuple(asked)})


def logp(model: Any, example: Example) -> Tensor:
    """Return log-probabilities over the vocabulary at every scored token of one unpadded row."""
    at = torch.tensor(example.target[1:])
    logits = model(input_ids=torch.tensor([example.ids])).logits[0, :-1]
    return F.log_softmax(logits[at], -1)


def right(example: Example) -> Tensor:
    """Return the scored tokens of a row."""
    return torch.tensor(example.ids[1:])[torch.tensor(example.target[1:])]


def cost(model: Any, example: Example) -> Tensor:
    """Return -log p of a row's scored tokens, summed."""
    return -logp(model, example).gather(1, right(example)[:, None]).sum()


def mean_nll(model: Any, rows: list[Example]) -> Tensor:
    """Return the mean loss over the scored tokens of rows."""
    return torch.stack([cost(model, r) for r in rows]).sum() / sum(sum(r.target) for r in rows)


def push(method: Any, now: Any, then: Any, rows: list[Any]) -> Tensor:
    """Return the forget loss of a step from the formula of its paper, without its weight."""
    beta = getattr(method, "beta", 1.0)

    def softly(margins: list[Tensor]) -> Tensor:
        return -2 / beta * F.logsigmoid(beta * torch.stack(margins)).mean()

    match method:
        case NPO(reduction="batch_mean"):
            return softly([mean_nll(now, rows) - mean_nll(then, rows)])
        case NPO():
            return softly([cost(now, r) - cost(then, r) for r in rows])
        case SimNPO(delta=delta):
            return softly([cost(now, r) / sum(r.target) - delta for r in rows])
        case DPO() | IdkDPO() | AltPO():
            gained = [[cost(now, r) - cost(then, r) for r in pair] for pair in rows]
            return softly([lost - won for won, lost in gained])
        case UNDIAL():
            value = torch.zeros(())
            for row in rows:
                marked = F.one_hot(right(row), logp(now, row).shape[1])
                target = (logp(then, row) - beta * marked).softmax(-1)
                value = value - (target * logp(now, row)).sum() + (target * target.log()).sum()
            return value / sum(sum(r.target) for r in rows)
        case _:
            return -mean_nll(now, rows)


def hold(method: Any, now: Any, then: Any, rows: list[Example]) -> Tensor:
    """Return the retain loss of a step."""
    if getattr(method, "retain_loss", "nll") == "nll":
        return mean_nll(now, rows)
    drift = [logp(then, r).exp() * (logp(then, r) - logp(now, r)) for r in rows]
    return torch.cat([d.sum(-1) for d in drift]).mean()


def plain(
    method: Any,
    start: Checkpoint,
    domain: Domain,
    ctx: Context,
    pairs: Any = None,
    *,
    sign: float = 1.0,
    optimizer: Callable[..., Any] = torch.optim.AdamW,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train beside a frozen copy, row by row; return weights and the forget loss of each step."""
    now, then = start.load(), start.load().requires_grad_(False)
    tokenizer, length = start.tokenizer(), method.max_length
    streams = role_streams(
        domain, ("forget", "retain"), tokenizer, method.fit, ctx, max_length=length
    )
    if pairs is not None:
        lost = tuple(row for _, row in pairs)
        forget = stream(lost, tokenizer, method.fit, ctx, purpose="forget", max_length=length)
        streams["forget"] = forget
        won = encode([row for row, _ in pairs], tokenizer, max_length=length)
    how = {"weight_decay": 0.0, "eps": 1e-4} if optimizer is torch.optim.AdamW else {}
    steps = optimizer(now.parameters(), lr=method.fit.lr, **how)
    values = []
    for step in range(method.fit.steps):
        rows: list[Any] = [streams["forget"].examples[i] for i in streams["forget"].indices(step)]
        if pairs is not None:
            order = streams["forget"].indices(step)
            rows = [(won[i], row) for i, row in zip(order, rows, strict=True)]
        kept = [streams["retain"].examples[i] for i in streams["retain"].indices(step)]
        forget_loss = push(method, now, then, rows)
        alpha = getattr(method, "alpha", 0.0)
        total = sign * getattr(method, "gamma", 1.0) * forget_loss
        total = total + alpha * hold(method, now, then, kept) if alpha else total
        steps.zero_grad()
        total.backward()
        steps.step()
        values.append(float(forget_loss.detach()))
    return {n: p.detach() for n, p in now.named_parameters()}, values


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Row, Row]]:
    """Return the pairs that methods make, as they make them."""
    seen: list[tuple[Row, Row]] = []

    def spy(method: Any, start: Any, domain: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(given)
        return preference.prefer(method, start, domain, given, *args, **kwargs)

    for module in ("dpo", "idk_dpo", "altpo"):
        monkeypatch.setattr(f"excise.methods.posthoc.{module}.prefer", spy)
    return seen


ALL: list[TuningMethod] = [
    GradientAscent(fit=FIT),
    GradDiff(fit=FIT, retain_loss="kl", alpha=2.0),
    NPO(fit=FIT, beta=0.3, gamma=0.5, alpha=2.0),
    NPO(fit=FIT, beta=0.5, reduction="batch_mean"),
    SimNPO(fit=FIT, beta=2.5, delta=0.5),
    DPO(fit=FIT, beta=0.3, alpha=2.0),
    IdkDPO(fit=FIT, beta=0.3, answers=2),
    AltPO(fit=FIT, beta=0.3, answers=2, new_tokens=4),
    UNDIAL(fit=FIT, beta=3.0, alpha=0.5),
    UNDIAL(fit=FIT),
]


def farthest(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Return the largest difference between two models' weights."""
    return max(float((one[n] - two[n]).abs().max()) for n in one)


def data_of(method: Any) -> Domain:
    return questions() if isinstance(method, preference.Preference) else toy_domain()


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_losses_equal_a_plain_loop_beside_a_frozen_model(
    method: Any, tmp_path: Path, pairs: list[tuple[Row, Row]]
) -> None:
    start, domain = toy_checkpoint(tmp_path), data_of(method)
    removal = method.apply(start, domain, context(tmp_path / "ours"))
    ctx = context(tmp_path / "plain")
    theirs, values = plain(method, start, domain, ctx, pairs or None)
    assert farthest(weights(removal.checkpoint), theirs) <= 5e-6
    assert farthest(weights(start), theirs) > 1e-3
    sign = -1.0 if isinstance(method, GradientAscent | GradDiff) else 1.0  # of the term's weight
    for row in removal.history:
        assert sign * row["forget"] == pytest.approx(values[int(row["step"])], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", ALL[:-1], ids=lambda m: m.name)
def test_a_wrong_sign_or_optimizer_ends_elsewhere(
    method: Any, tmp_path: Path, pairs: list[tuple[Row, Row]]
) -> None:
    start, domain = toy_checkpoint(tmp_path), data_of(method)
    removal = method.apply(start, domain, context(tmp_path / "ours"))
    ours, ctx = weights(removal.checkpoint), context(tmp_path / "plain")
    assert farthest(ours, plain(method, start, domain, ctx, pairs or None, sign=-1.0)[0]) > 1e-4
    wrong = torch.optim.Adagrad
    assert farthest(ours, plain(method, start, domain, ctx, pairs or None, optimizer=wrong)[0]) > (
        1e-4
    )


def test_the_two_published_npos_are_two_methods(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    ends = [
        weights(NPO(fit=FIT, reduction=r).apply(start, domain, context(tmp_path / r)).checkpoint)
        for r in ("sequence_sum", "batch_mean")
    ]
    assert farthest(*ends) > 1e-4


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_the_split_of_a_batch_matters_for_a_mean_over_the_batch_alone(
    method: Any, tmp_path: Path
) -> None:
    start, domain = toy_checkpoint(tmp_path), data_of(method)
    whole = method.apply(start, domain, context(tmp_path / "whole")).checkpoint
    cut = method.model_copy(update={"fit": FIT.model_copy(update={"micro_size": 2})})
    apart = farthest(
        weights(whole), weights(cut.apply(start, domain, context(tmp_path / "cut")).checkpoint)
    )
    if getattr(method, "reduction", "") == "batch_mean":
        assert apart > 1e-5
    else:
        assert apart <= 5e-6


# The model before the edit.


def examples_of(start: Checkpoint, domain: Domain) -> list[Example]:
    return encode(domain.forget["a"], start.tokenizer(), max_length=512)


def test_a_reference_is_one_number_a_sequence_whatever_its_order_padding_and_batch(
    tmp_path: Path,
) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    examples = examples_of(start, domain)
    reference = reference_of(start, examples, context(tmp_path / "one"))
    assert len(reference.nll) == len(examples)
    model = start.load()
    for side in ("left", "right"):
        some = [examples[i] for i in (7, 2, 5)]
        values = reference(collate(some, pad_id=0, padding_side=side, length=20))
        expected = torch.stack([cost(model, e) for e in some]).detach()
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-5)
    turned = tuple(reversed(examples))
    assert data_fingerprint(turned) == data_fingerprint(examples)
    again = reference_of(start, [*turned, *turned], context(tmp_path / "two"))
    assert again.nll == pytest.approx(reference.nll, abs=1e-5)
    other = replace(examples[0], target=(False, False, *examples[0].target[2:]))
    assert data_fingerprint([other]) != data_fingerprint(examples[:1])


class Stop(BaseException):
    """The process dies here."""


def test_a_reference_computed_again_in_mid_training_has_no_adapter(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    fit = FIT.model_copy(update={"save_every": 1, "log_every": 1})
    method = NPO(fit=fit, lora=LoRA(rank=2))
    whole = method.apply(start, domain, context(tmp_path / "whole"))

    def die(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step" and data.get("loss") and data["step"] == 4:
            raise Stop

    ctx = context(tmp_path / "killed")
    with pytest.raises(Stop):
        method.apply(start, domain, replace(ctx, emit=die))
    (kept,) = ctx.work.glob(f"reference-*/{FILE}")
    before = kept.read_bytes()
    kept.unlink()
    resumed = method.apply(start, domain, ctx)
    assert kept.read_bytes() == before
    assert resumed.checkpoint.fingerprint == whole.checkpoint.fingerprint
    model = start.load()
    for example in examples_of(start, domain):
        found = Reference(json.loads(before)["nll"])(collate([example], pad_id=0))
        assert float(found) == pytest.approx(float(cost(model, example).detach()), abs=1e-5)


def test_a_kept_reference_is_read_and_a_stale_one_refused(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    first = NPO(fit=FIT).apply(start, domain, context(tmp_path / "first"))
    file = tmp_path / "first" / first.extras["files"]["reference"]
    method = NPO(fit=FIT, reference=str(file))
    second = method.apply(start, domain, context(tmp_path / "second"))
    assert second.checkpoint.fingerprint == first.checkpoint.fingerprint
    assert not list((tmp_path / "second").glob("reference-*"))
    tokens = sum(len(e.ids) for e in examples_of(start, domain))
    assert first.cost.tokens - second.cost.tokens == tokens

    def refused(start: Checkpoint, domain: Domain, words: str, **change: Any) -> None:
        with pytest.raises(UserError, match=words) as error:
            method.apply(start, domain, replace(context(tmp_path / "bad"), **change))
        assert "\n" not in str(error.value)

    (tmp_path / "other").mkdir()
    refused(second.checkpoint, domain, "computed on another model; leave 'reference' out")
    rows = {"a": domain.forget["a"][1:]}
    refused(start, replace(domain, forget=rows), "computed on another forget set")
    refused(start, domain, "computed on another dtype", dtype=torch.bfloat16)
    config = start.tokenizer_path or start.path
    text = (config / "tokenizer_config.json").read_text(encoding="utf-8")
    data = json.loads(text) | {"padding_side": "left"}
    (config / "tokenizer_config.json").write_text(json.dumps(data), encoding="utf-8")
    refused(Checkpoint(start.path), domain, "computed on another tokenizer; leave")
    (config / "tokenizer_config.json").write_text(text, encoding="utf-8")
    file.write_text("[]", encoding="utf-8")
    refused(Checkpoint(start.path), domain, "no file of log-likelihoods")


def test_a_model_without_numbers_is_no_reference(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    name = "model.layers.0.input_layernorm.weight"
    broken = start.write({name: start.weights_of([name])[name] * 1e38}, tmp_path / "nan")
    with pytest.raises(UserError, match="gives NaN or infinity for unit 'f"):
        NPO(fit=FIT).apply(broken, toy_domain(), context(tmp_path / "one"))


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["weights", "adapter"])
@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_there_is_never_a_second_model_in_memory(
    method: Any, lora: LoRA | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, domain = toy_checkpoint(tmp_path), data_of(method)
    models: list[weakref.ref[Any]] = []
    load = Checkpoint.load

    def spy(self: Checkpoint, **how: Any) -> Any:
        gc.collect()
        assert not [model for model in models if model() is not None], "another model is alive"
        model = load(self, **how)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Checkpoint, "load", spy)
    short = FIT.model_copy(update={"steps": 1})
    method = method.model_copy(update={"fit": short, "lora": lora})
    method.apply(start, domain, context(tmp_path / "ours"))
    assert models


def test_the_frozen_states_of_the_rows_that_are_read_are_kept_and_no_others(
    tmp_path: Path,
) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    fit = FIT.model_copy(update={"steps": 2})
    removal = GradDiff(fit=fit, retain_loss="kl").apply(start, domain, context(tmp_path / "ours"))
    assert removal.extras["teacher_cache"]["documents"] == 8  # two steps of four of sixteen rows


# Pairs.


def test_pairs_prefer_another_answer_to_the_same_prompt(
    tmp_path: Path, pairs: list[tuple[Row, Row]]
) -> None:
    start, domain = toy_checkpoint(tmp_path), questions()
    short = FIT.model_copy(update={"steps": 1})
    for method, each in ((DPO(), 2), (IdkDPO(answers=3), 3), (AltPO(answers=2, new_tokens=4), 2)):
        pairs.clear()
        method.model_copy(update={"fit": short}).apply(
            start, domain, context(tmp_path / method.name)
        )
        assert len(pairs) == each * 12 if method.name != "altpo" else len(pairs) > 12
        for won, lost in pairs:
            assert (won.prompt, won.unit) == (lost.prompt, lost.unit)
            assert won != lost
        if method.name == "idk_dpo":
            assert {won.choices[won.answer] for won, _ in pairs} <= set(answers.REFUSALS)


def test_another_answer_keeps_the_space_before_it_and_the_turns_before_the_last() -> None:
    answered = answers.with_answer(Row("u", prompt="a", completion="  b"), "c d", "dpo")
    assert answered.completion == "  c d"
    turns = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    answered = answers.with_answer(Row("u", messages=turns), "e", "dpo")
    assert answered.messages == (*turns[:3], ("assistant", "e"))
    assert answers.question_of(Row("u", messages=turns)) == ("a\nb\nc", "d")


@pytest.mark.parametrize("method", [DPO(), IdkDPO(), AltPO()], ids=lambda m: m.name)
def test_a_method_that_needs_pairs_refuses_plain_text(method: Any, tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"unit 'f0' .*give rows with '") as error:
        method.apply(start, toy_domain(), context(tmp_path / "ours"))
    assert "\n" not in str(error.value)


def test_sampled_answers_end_where_the_next_question_begins_and_are_never_the_rows_own(
    tmp_path: Path,
) -> None:
    assert altpo.cut(" Paris \nQuestion: where?") == "Paris"
    row = Row("u", prompt="a", completion=" b")
    stage = altpo.SampleAlternatives(toy_checkpoint(tmp_path), (row, row), 2, "", 4, 1.0, 0)
    shares = [[[[0, "b"], [0, ""], [1, "c"]], 9]]
    (tmp_path / altpo.FILE).write_text(json.dumps(shares), encoding="utf-8")
    assert stage.read(tmp_path) == altpo.Alternatives(((), ("c",)), 9)


def test_a_model_that_makes_nothing_up_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = [()] * 60
    monkeypatch.setattr(altpo, "sample", lambda *args, **how: nothing)
    with pytest.raises(UserError, match="made up no other answer to any forget row"):
        AltPO(fit=FIT).apply(toy_checkpoint(tmp_path), questions(), context(tmp_path / "ours"))


def test_the_sentences_differ_and_every_default_with_a_source_is_a_setting() -> None:
    assert len(set(answers.REFUSALS)) == len(answers.REFUSALS) >= 30
    for method in ALL:
        fields = type(method).model_fields
        assert set(type(method).paper.defaults) <= set(fields)
        assert METHODS[method.name] is type(method)


def test_the_stage_of_a_reference_is_found_by_model_and_rows(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    examples = tuple(examples_of(start, toy_domain()))
    one = ComputeReference(start, examples)
    ctx = context(tmp_path / "work")
    assert ctx.run(one) == ctx.run(ComputeReference(start, examples[::-1]))
    assert ctx.run(one) != ctx.run(ComputeReference(start, examples[1:]))
