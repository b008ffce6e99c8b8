"""Filtering and pushing of tokens against ten lines each in double precision, rows with spans.

Shape legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Domain, Row, Rows, Span
from excise.data.labels import Confidence, LabelNoise
from excise.data.stream import collate, encode
from excise.methods import Filtering, GradDiffPretrain, TokenFilter
from excise.methods.base import Method
from excise.methods.pretraining import grad_diff_pretrain, token_filter
from excise.methods.pretraining.pretrain import Pretrain
from excise.methods.pretraining.token_filter import hidden_symbol
from excise.models.checkpoint import Checkpoint
from excise.models.tiny import word_tokenizer
from excise.train.fit import FitConfig
from tests.parity.test_pretraining import same
from tests.parity.toy import WORDS, context, sentences, toy_checkpoint, toy_domain, weights

FIT = FitConfig(steps=3, lr=1e-3, batch_size=8, eps=1e-6)
SCHEDULE = Pretrain(fit=FIT, max_length=32, pack=(1, 2))
LENGTH = 9


def of_words(words: str, unit: str = "u", label: int = CORE) -> Row:
    """Return a row of one letter a word: capitals and what is in brackets are to be forgotten.

    Every letter is word `w<number>`; `A` has confidence 1, `[` before it 0.3.
    """
    text, spans, confidence = "", [], 1.0
    for letter in words:
        if letter == "[":
            confidence = 0.3
            continue
        word = WORDS[ord(letter.lower()) - ord("a")]
        text += word + " "
        if letter.isupper():
            at = len(text) - len(word) - 1
            spans.append(Span(at, at + len(word), "a", 1, confidence))
        confidence = 1.0
    own = 1 if spans and label != UNLABELED else label
    return Row(unit, text=text.strip(), capability="a" if spans else "", label=own,
               spans=tuple(spans))  # fmt: skip


ROWS = (
    of_words("abCDef[Gh"),
    of_words("Abcd"),
    of_words("aBc[D[Ef"),
    of_words("ghij"),
    replace(of_words("klmn"), label=1, capability="a"),
    replace(of_words("Opqr"), label=UNLABELED, spans=(Span(0, 3, "a", UNLABELED),)),
    replace(of_words("stuv"), label=1, capability="a", confidence=0.4),
)
"""Spans of two confidences; whole rows: core, forget, without a label, and one that is doubted."""

FORGET: dict[int, list[float]] = {  # by row, the probability that each word is to be forgotten
    0: [0, 0, 1, 1, 0, 0, 0.3, 0], 1: [1, 0, 0, 0], 2: [0, 1, 0, 0.3, 0.3, 0], 3: [0] * 4,
    4: [1] * 4, 5: [0] * 4, 6: [0.4] * 4,
}  # fmt: skip


def loss_of(
    method: Method, module: Any, start: Checkpoint, work: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Return the loss that a method gives to the loop."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(module, "pretrain", lambda *args, **options: given.update(options))
    method.apply(start, toy_domain(), context(work))
    loss: Callable[..., Any] = given["loss"]
    return loss


def padded(values: Sequence[Sequence[float]]) -> Tensor:
    """Return rows of numbers padded with 0 to one length."""
    width = max(len(row) for row in values)
    return torch.tensor([[*row, *([0.0] * (width - len(row)))] for row in values])


def by_hand(model: Any, tokenizer: Any, z: Tensor, hidden: int | None) -> tuple[Tensor, Tensor]:
    """Return the loss of each target, and which targets are not filtered: ten lines.

    `z` says by row and token what is filtered, never the mark that begins a text.
    """
    ids = [tokenizer.convert_tokens_to_ids(["<bos>", *row.text.split()]) for row in ROWS]
    real = padded([[1.0] * len(row) for row in ids]).bool()
    ids_BT = padded(ids).long()
    read_BT = ids_BT if hidden is None else torch.where(z & real, hidden, ids_BT)
    logits_BTV = model(read_BT, attention_mask=real.long()).logits[:, :-1]
    logp_BTV = logits_BTV - logits_BTV.exp().sum(-1, keepdim=True).log()
    nll_BT = -logp_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0]
    return nll_BT, (real & ~z)[:, 1:]


def likely(above: float) -> Tensor:
    """Return by row and token what is to be forgotten with more than a probability."""
    return padded([[0.0, *FORGET[i]] for i in range(len(ROWS))]) > above


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    """Return the gradient of every parameter."""
    return list(torch.autograd.grad(loss, list(model.parameters())))


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest difference as a share of the largest entry."""
    top = max(float(x.abs().max()) for x in b)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / top


@pytest.mark.parametrize("how", ["mask", "remove"])
@pytest.mark.parametrize("above", [0.5, 0.35, 0.2])
def test_the_gradient_is_that_of_ten_lines(
    how: Any, above: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = toy_checkpoint(tmp_path)
    model, tokenizer = start.load().double(), start.tokenizer()
    method = TokenFilter(how=how, filter_above=above, pretrain=SCHEDULE)
    loss = loss_of(method, token_filter, start, tmp_path / "work", monkeypatch)
    batch = collate(encode(ROWS, tokenizer, max_length=LENGTH), pad_id=tokenizer.pad_token_id)
    (term,) = loss(model, batch).values()
    z = likely(above)
    hidden = tokenizer.unk_token_id if how == "remove" else None
    nll_BT, keep_BT = by_hand(model, tokenizer, z, hidden)
    assert term.count == keep_BT.sum()
    ours = gradients(model, term.sum / term.count)
    assert apart(ours, gradients(model, nll_BT[keep_BT].mean())) < 1e-12

    wrong: list[tuple[Tensor, int | None]] = [
        (z.roll(1, 1), hidden),
        (z, tokenizer.unk_token_id if how == "mask" else None),
        (likely(1), hidden),
    ]
    for other_z, other_hidden in wrong:
        nll_BT, keep_BT = by_hand(model, tokenizer, other_z, other_hidden)
        assert apart(ours, gradients(model, nll_BT[keep_BT].mean())) > 1e-3


@pytest.mark.parametrize("above", [0.5, 0.2])
def test_pushed_tokens_are_those_likely_to_be_forgotten(
    above: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = toy_checkpoint(tmp_path)
    model, tokenizer = start.load().double(), start.tokenizer()
    method = GradDiffPretrain(push_above=above, weight=0.5, push="uniform", pretrain=SCHEDULE)
    loss = loss_of(method, grad_diff_pretrain, start, tmp_path / "work", monkeypatch)
    batch = collate(encode(ROWS, tokenizer, max_length=LENGTH), pad_id=tokenizer.pad_token_id)
    terms = loss(model, batch)
    ours = gradients(model, sum(t.weight * t.sum / t.count for t in terms.values()))
    z = likely(above)
    nll_BT, keep_BT = by_hand(model, tokenizer, z, None)
    real_BT = by_hand(model, tokenizer, torch.zeros_like(z), None)[1]
    logp_BTV = F.log_softmax(model(**batch.inputs).logits[:, :-1].double(), -1)
    uniform_BT = -logp_BTV.mean(-1) - torch.tensor(float(logp_BTV.shape[-1])).double().log()
    theirs = nll_BT[keep_BT].mean() + 0.5 * uniform_BT[real_BT & ~keep_BT].mean()
    assert apart(ours, gradients(model, theirs)) < 1e-6


def with_spans(rows: Rows, words: int) -> Rows:
    """Return rows whose first words are to be forgotten."""
    out = []
    for row in rows:
        end = len(" ".join(row.text.split()[:words]))
        out.append(replace(row, capability="a", label=1, spans=(Span(0, end, "a", 1),)))
    return tuple(out)


def mixed_domain() -> Domain:
    """Return a domain whose forget rows begin with two words that are to be forgotten."""
    domain = toy_domain()
    return replace(domain, forget={"a": with_spans(sentences("m", 12, seed=1), 2)})


def test_the_record_counts_tokens_by_the_truth(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), mixed_domain()
    made = TokenFilter(pretrain=SCHEDULE).apply(start, domain, context(tmp_path / "all"))
    assert made.extras["tokens_removed"] == 24
    assert made.extras["forget_tokens_left"] == made.extras["core_tokens_lost"] == 0
    assert (made.extras["rows_removed"], made.extras["core_rows_lost"]) == (0, 0)
    noise = LabelNoise(missed_spans=0.5, false_words=0.2)
    method = TokenFilter(how="mask", pretrain=SCHEDULE, labels=noise)
    facts = method.apply(start, domain, context(tmp_path / "noisy")).extras
    assert facts["forget_tokens_left"] == 12
    assert facts["core_tokens_lost"] > 10
    assert facts["tokens_masked"] == facts["core_tokens_lost"] + 12


def test_a_span_over_a_whole_row_is_the_row(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    spanned = replace(domain, forget={"a": with_spans(domain.forget["a"], 99)})
    made = []
    for name, each in (("rows", domain), ("spans", spanned)):
        removal = TokenFilter(pretrain=SCHEDULE).apply(start, each, context(tmp_path / name))
        made.append(removal)
    assert same(weights(made[0].checkpoint), weights(made[1].checkpoint), 0)
    tokens = [removal.extras["tokens_removed"] for removal in made]
    assert tokens[0] == tokens[1] == sum(len(r.text.split()) for r in domain.forget["a"])
    assert [removal.extras["rows_removed"] for removal in made] == [12, 0]


def test_a_lower_threshold_finds_more_and_loses_more(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), mixed_domain()
    noise = LabelNoise(missed_words=0.5, confidence=Confidence(concentration=2.0))
    left, lost = [], []
    for above in (0.5, 0.1, 0.02):
        method = TokenFilter(pretrain=SCHEDULE, labels=noise, filter_above=above)
        facts = method.apply(start, domain, context(tmp_path / str(above))).extras
        left.append(facts["forget_tokens_left"])
        lost.append(facts["core_tokens_lost"])
    assert left == sorted(left, reverse=True)
    assert left[-1] < left[0]
    assert lost == sorted(lost)
    assert lost[-1] > lost[0]


def test_filtering_drops_a_document_by_its_own_label(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), mixed_domain()
    made = Filtering(pretrain=SCHEDULE).apply(start, domain, context(tmp_path / "all"))
    assert made.extras["rows_dropped"] == 12
    # A document goes as long as one of its words is still labelled.
    noise = LabelNoise(missed_words=0.5)
    missing = Filtering(pretrain=SCHEDULE, labels=noise)
    facts = missing.apply(start, domain, context(tmp_path / "some")).extras
    assert facts["rows_dropped"] + facts["forget_rows_left"] == 12
    assert 6 <= facts["rows_dropped"] < 12


def test_a_doubted_part_makes_a_doubted_document(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), mixed_domain()
    noise = LabelNoise(missed_spans=0.5, confidence=Confidence(concentration=2.0))
    left = []
    for above in (0.5, 0.1, 0.02):
        method = Filtering(pretrain=SCHEDULE, labels=noise, drop_above=above)
        facts = method.apply(start, domain, context(tmp_path / str(above))).extras
        left.append(facts["forget_rows_left"])
    assert left == sorted(left, reverse=True)
    assert left[0] > left[-1]


def test_pushing_by_confidence_leaves_certain_labels_as_they_were(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    doubted = replace(
        domain, forget={"a": tuple(replace(row, confidence=0.4) for row in domain.forget["a"])}
    )
    made = {}
    for name, each, above in (
        ("certain", domain, 0.5),
        ("certain, low", domain, 0.0),
        ("doubted, low", doubted, 0.3),
    ):
        method = GradDiffPretrain(pretrain=SCHEDULE, push_above=above)
        made[name] = weights(method.apply(start, each, context(tmp_path / name)).checkpoint)
    assert same(made["certain"], made["certain, low"], 0)
    assert same(made["certain"], made["doubted, low"], 5e-6)


def test_what_cannot_be_hidden_is_refused_in_a_sentence(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(WORDS)
    assert hidden_symbol(tokenizer, "") == tokenizer.unk_token_id
    assert hidden_symbol(tokenizer, "w3") == tokenizer.convert_tokens_to_ids("w3")
    with pytest.raises(UserError, match=r"'w99' is no token.*'token_filter.hidden'"):
        hidden_symbol(tokenizer, "w99")
    tokenizer.unk_token = None
    assert hidden_symbol(tokenizer, "") == tokenizer.pad_token_id
    tokenizer.eos_token = tokenizer.pad_token
    with pytest.raises(UserError, match="no mask, unknown or padding token of its own"):
        hidden_symbol(tokenizer, "")
    start, domain = toy_checkpoint(tmp_path), replace(toy_domain(), retain=())
    with pytest.raises(UserError, match="leaves no token to learn from"):
        TokenFilter(pretrain=SCHEDULE).apply(start, domain, context(tmp_path / "none"))
