"""Texts of several rows: what stands in them, what is labelled and scored, what an oracle reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from excise.core.errors import UserError
from excise.data.domain import CORE, Domain, Row, Span
from excise.data.labels import LabelNoise, give_labels
from excise.data.mix import in_texts
from excise.data.spans import without
from excise.data.stream import encode, encode_row
from excise.domains.facts import Facts
from excise.methods import SGTM, Filtering
from excise.methods.pretraining.filtering import makes_oracle
from excise.methods.pretraining.pretrain import corpus, dropped, taught

SMALL = Facts(subjects=40, relations=3, objects=16)
MIXED = SMALL.model_copy(update={"facts_per_text": 4})


def said(row: Row) -> str:
    """Return the sentence of a fact, as it stands in a text."""
    return f"{row.prompt} {row.choices[row.answer]}"


def parts(row: Row) -> list[str]:
    """Return the sentences of a text of facts, which end where something is scored."""
    ends = [end for _, end in row.targets]
    starts = [0, *(end + 1 for end in ends)]
    return [row.text[a:b] for a, b in zip(starts, ends, strict=False)]


def without_mixture(domain: Domain) -> Domain:
    return replace(domain, rows_per_text=1)


@pytest.mark.parametrize(
    ("spec", "before"),
    [
        (Facts(), "115e40f223087ff8054e4d8db731cbf79e4e776b39852c6f14f0d617373aef6a"),
        (SMALL, "e6761de55d455efad9cb53e02bbb6eb072afd9d7e603c54a5a1e01815504cac6"),
    ],
)
def test_one_fact_a_text_is_the_domain_there_always_was(spec: Facts, before: str) -> None:
    domain = spec.build()
    assert domain.fingerprint == before
    assert corpus(domain) == taught(domain)


def test_several_facts_a_text_change_no_row_of_any_role() -> None:
    one, several = SMALL.build(), MIXED.build()
    assert dict(one.roles()) == dict(several.roles())
    assert one.fingerprint != several.fingerprint
    assert not any(row.spans or row.targets for _, rows in several.roles() for row in rows)


@pytest.mark.parametrize("share", [None, 0.05])
def test_every_fact_is_read_as_often_as_before(share: float | None) -> None:
    domain = MIXED.model_copy(update={"mix_share": share}).build()
    texts = corpus(domain)
    assert Counter(part for row in texts for part in parts(row)) == Counter(
        said(row) for row in taught(domain)
    )
    sizes = Counter(len(row.targets) for row in texts)
    assert sizes[4] >= len(texts) - 3
    assert sorted(sizes)[-1] == 4
    units = {said(row): row.unit for row in taught(domain)}
    for row in texts:
        here = [units[part] for part in parts(row)]
        assert len(here) == len(set(here)), "a fact could be read off another wording of it"


def test_texts_hold_facts_of_both_kinds_in_any_order() -> None:
    texts = corpus(MIXED.build())
    kinds = Counter((bool(row.spans), len(row.spans) == len(row.targets)) for row in texts)
    assert kinds[True, False] > 0.4 * len(texts)
    forget = {span.start == 0 for row in texts for span in row.spans}
    assert forget == {True, False}


@pytest.mark.parametrize("exposure", ["seen", "held_out"])
@pytest.mark.parametrize("capabilities", [1, 2])
def test_spans_are_the_facts_to_forget(exposure: str, capabilities: int) -> None:
    spec = MIXED.model_copy(update={"capabilities": capabilities, "exposure": exposure})
    domain = spec.build()
    truth = {said(row): row.capability for row in taught(domain)}
    assert set(truth.values()) == {"", *spec.capability_names}
    for row in corpus(domain):
        spans = {row.text[s.start : s.end]: s for s in row.spans}
        assert {part for part in parts(row) if truth[part]} == set(spans)
        for part, span in spans.items():
            assert span.capability == truth[part]
            assert ("", *spec.capability_names)[span.label] == truth[part]
        counts = Counter[str]()
        for part, span in spans.items():
            counts[span.capability] += len(part)
        assert row.capability in (
            [name for name, n in counts.items() if n == max(counts.values())] or [""]
        )
        assert row.label == ("", *spec.capability_names).index(row.capability)


def test_every_object_is_one_target_with_the_label_of_its_fact() -> None:
    domain, tokenizer = MIXED.build(), MIXED.tokenizer()
    truth = {said(row): row.label for row in taught(domain)}
    texts = corpus(domain)
    for row, example in zip(texts, encode(texts, tokenizer, max_length=64), strict=True):
        labels = example.label if isinstance(example.label, tuple) else (0,) * len(example.ids)
        at = 1  # behind the mark that begins a text
        for part in parts(row):
            end = at + len(part.split())
            assert set(labels[at:end]) == {truth[part]}
            assert [*example.target[at:end]] == [False] * (end - at - 1) + [True]
            word = tokenizer.convert_ids_to_tokens(example.ids[end - 1])
            assert word == part.split()[-1]
            at = end
        assert at == len(example.ids)
        assert labels[0] == CORE
        assert not example.cut


def test_the_mixture_depends_on_the_seed_and_not_on_the_order() -> None:
    domain = MIXED.build()
    assert corpus(domain) == corpus(MIXED.build())
    rows = taught(domain)
    assert in_texts(rows[::-1], 4) == in_texts(rows, 4)
    other = MIXED.model_copy(update={"seed": 1}).build()
    assert {row.text for row in corpus(other)}.isdisjoint(row.text for row in corpus(domain))


def test_an_oracle_reads_the_texts_without_what_is_to_be_forgotten() -> None:
    domain = MIXED.build()
    oracle = Filtering(drop="spans")
    texts = [row for row in map(oracle._read, corpus(domain)) if row is not None]
    forget = {row.group for row in domain.forget["alpha"]}
    words = {word for row in texts for word in row.text.split()}
    assert not words & forget
    assert Counter(part for row in texts for part in parts(row)) == Counter(
        said(row) for row in taught(domain) if not row.capability
    )
    assert all(not row.spans and not row.label and not row.capability for row in texts)
    assert all(sum(e.target) == len(row.targets) for row, e in zip(
        texts, encode(texts, MIXED.tokenizer(), max_length=64), strict=True
    ))  # fmt: skip


def test_filtering_drops_texts_whole_and_says_what_went_with_them() -> None:
    domain = MIXED.build()
    rows = corpus(domain)
    read = [row for row in rows if Filtering()._read(row) is not None]
    assert read == [row for row in rows if not row.spans]
    core = [said(row) for row in taught(domain) if not row.capability]
    lost = sum(len(s.split()) for s in core) - sum(len(row.text.split()) for row in read)
    facts = dropped(rows, read)
    assert facts["core_words_lost"] == lost > 0
    assert facts["forget_rows_left"] == facts["core_rows_lost"] == 0


def test_only_filtering_that_reads_what_an_oracle_reads_is_one_more_of_them() -> None:
    assert makes_oracle(Filtering(), SMALL.build())
    assert not makes_oracle(Filtering(), MIXED.build())
    assert makes_oracle(Filtering(drop="spans"), MIXED.build())
    assert not makes_oracle(SGTM(), SMALL.build())


def test_labels_of_texts_are_missed_by_text_and_by_part() -> None:
    rows = corpus(MIXED.build())
    labelled = [row for row in rows if row.spans]
    missed = give_labels(rows, LabelNoise(missed_occurrences=0.5), seed=0)
    assert sum(row.label > CORE for row in missed) == len(labelled) - round(len(labelled) / 2)
    facts = sum(len(row.spans) for row in rows)
    missed = give_labels(rows, LabelNoise(missed_spans=0.5), seed=0)
    left = sum(
        span.label > CORE and span.start < end <= span.end
        for row in missed
        for _, end in row.targets
        for span in row.spans
    )
    assert left == facts - round(facts / 2)


def test_a_text_that_does_not_fit_is_refused_with_the_length_it_needs() -> None:
    row = corpus(MIXED.build())[0]
    with pytest.raises(UserError, match=r"4 rows.*set 'pretrain.max_length' to 4 times"):
        encode_row(row, MIXED.tokenizer(), max_length=16)


CUT = Row(unit="u", text="One two. Bad here. Three!", capability="alpha", label=1)


@pytest.mark.parametrize(
    ("start", "end", "left"),
    [
        (9, 18, "One two. Three!"),
        (0, 18, "Three!"),
        (9, 25, "One two."),
        (4, 7, "One . Bad here. Three!"),
    ],
)
def test_what_is_left_of_a_text_has_no_doubled_blank(start: int, end: int, left: str) -> None:
    row = replace(CUT, spans=(Span(start, end, "alpha", 1),), targets=())
    cut = without(row, lambda span: span.label == 1)
    assert cut is not None
    assert cut.text == left
    assert (cut.label, cut.capability, cut.spans) == (0, "", ())


def test_what_is_left_keeps_its_other_labels_and_its_turns() -> None:
    row = replace(CUT, spans=(Span(0, 8, "alpha", 1), Span(9, 18, "beta", 2)))
    cut = without(row, lambda span: span.label == 1)
    assert cut is not None
    assert [cut.text[s.start : s.end] for s in cut.spans] == ["Bad here."]
    assert cut.label == 2
    assert without(replace(CUT, spans=(Span(0, 25, "alpha", 1),)), lambda _: True) is None
    assert without(CUT, lambda _: True) is None
    pair = Row(
        unit="u",
        prompt="Say it. Now.",
        completion=" Yes. No.",
        spans=(Span(0, 8, "a", 1), Span(17, 21, "a", 1)),
    )
    cut = without(pair, lambda _: True)
    assert cut is not None
    assert (cut.prompt, cut.completion) == ("Now.", " Yes.")
    chat = Row(
        unit="u",
        messages=(("user", "Hi. Bad?"), ("assistant", "Ok. Bad.")),
        spans=(Span(4, 8, "a", 1), Span(13, 17, "a", 1)),
    )
    cut = without(chat, lambda _: True)
    assert cut is not None
    assert cut.messages == (("user", "Hi."), ("assistant", "Ok."))
    gone = replace(chat, spans=(Span(9, 17, "a", 1),))
    assert without(gone, lambda _: True) is None
