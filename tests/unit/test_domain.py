"""A domain's fingerprint follows from everything that decides a number, and from nothing else."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from typing import Any

import pytest

from excise.data.domain import UNHASHED, Domain, Row, Span

A, B = Row("a", text="x", capability="one", label=1), Row("b", text="y")
DOMAIN = Domain(
    name="toy",
    forget={"one": (A,), "two": (B,)},
    retain=(A, B),
    relearn={"one": (A,), "two": ()},
    test={"one": (A,), "two": (B,)},
    retain_test=(B,),
    dev_forget={"one": (A,)},
    dev_retain=(B,),
    benign=(B,),
)
CHANGED: dict[str, Any] = {
    "name": "another",
    "forget": {"one": (A,), "two": (A,)},
    "retain": (B, A),
    "relearn": {"one": (), "two": (A,)},
    "test": {"one": (A, A), "two": (B,)},
    "retain_test": (),
    "dev_forget": {"other": (A,)},
    "dev_retain": (A,),
    "benign": (A,),
    "adjacent": (A,),
    "adjacent_test": (A,),
    "unlabeled": (A,),
    "fresh": (A,),
    "metrics": ("exact_match", "text_loss"),
    "retain_metrics": ("multiple_choice",),
    "claim": "deletion",
    "exposure": "seen",
    "sensitive": True,
    "notes": ("a remark",),
    "mix_share": 0.25,
    "rows_per_text": 4,
    "paraphrases": {"one": (A,)},
    "multi_hop": {"one": (A,)},
    "benchmark": {"one": (A,)},
    "benchmark_metrics": {"one": ("text_loss",)},
}
"""Another value of every field; a new field needs one too."""
ROW: dict[str, Any] = {
    "unit": "c", "group": "g", "text": "z", "prompt": "p", "completion": "c", "choices": ("d", "e"),
    "answer": 1, "messages": (("user", "hi"),), "capability": "two", "label": 2, "wording": 3,
    "confidence": 0.5, "spans": (Span(0, 1, "two"),), "targets": ((0, 1),),
}  # fmt: skip
"""The same of a row."""


def test_every_field_has_another_value_here() -> None:
    assert set(CHANGED) == {field.name for field in fields(Domain)}
    assert set(ROW) == {field.name for field in fields(Row)}


@pytest.mark.parametrize("name", CHANGED)
def test_every_field_but_names_and_notes_counts(name: str) -> None:
    before = DOMAIN.fingerprint
    changed = replace(DOMAIN, **{name: CHANGED[name]})
    assert (changed.fingerprint == before) == (name in UNHASHED)
    assert DOMAIN.fingerprint == before


@pytest.mark.parametrize("name", ROW)
def test_every_field_of_a_row_counts(name: str) -> None:
    changed = replace(DOMAIN, retain=(A, replace(B, **{name: ROW[name]})))
    assert changed.fingerprint != DOMAIN.fingerprint


def test_the_order_of_capabilities_counts() -> None:
    turned = replace(DOMAIN, forget=dict(reversed([*DOMAIN.forget.items()])))
    assert turned.fingerprint != DOMAIN.fingerprint


def test_equal_domains_have_one_identity_wherever_they_are() -> None:
    again: Domain = pickle.loads(pickle.dumps(replace(DOMAIN, name="copy")))
    assert again.identity == DOMAIN.identity == {"domain": DOMAIN.fingerprint}
