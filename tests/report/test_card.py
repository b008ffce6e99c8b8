"""The model card: kept front matter, what was removed, how it was attacked, which was audited."""

from __future__ import annotations

import re

import pytest
import yaml
from tests.report import parts, sample

from excise.core.errors import UserError
from excise.record import ModelRef
from excise.report.card import blocks, front_matter, render_card

UPSTREAM = """---
license: apache-2.0
license_link: https://example.org/LICENSE
language:
- en
tags:
- llama
- 'small: one'
datasets: [a/b]
model-index:
- name: up
  results:
  - value: 99
---
# Upstream
---
license: mit
---
"""


def head(card: str) -> dict[str, object]:
    """Return the front matter of a card, parsed."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match
    data = yaml.safe_load(match.group(1))
    assert isinstance(data, dict)
    return data


def test_licence_and_tags_are_kept_and_results_are_not() -> None:
    data = head(render_card(sample.full(), "rmu", UPSTREAM))
    assert data["license"] == "apache-2.0"
    assert data["license_link"] == "https://example.org/LICENSE"
    assert data["language"] == ["en"]
    assert data["datasets"] == ["a/b"]
    assert data["tags"] == ["llama", "small: one", "unlearning", "excise"]
    assert "model-index" not in data


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("tags: [a, 'b c']\n", ["a", "b c"]),
        ("tags: one\n", ["one"]),
        ("tags:\n  - a\n  - excise\n", ["a", "excise"]),
        ("tags: [a,\n  b]\n", ["a", "b"]),
        ("tags: []\n", []),
        ("", []),
    ],
)
def test_tags_in_every_spelling(tags: str, expected: list[str]) -> None:
    data = head(front_matter(f"---\nlicense: mit\n{tags}---\n", ""))
    found = data["tags"]
    assert isinstance(found, list)
    assert found[: len(expected)] == expected
    assert sorted({*expected, "excise", "unlearning"}) == sorted(found)


@pytest.mark.parametrize("card", [None, "", "no front matter", "---\nunclosed: yes\n"])
def test_without_upstream_front_matter(card: str | None) -> None:
    data = head(render_card(sample.full(), "rmu", card))
    assert data == {"tags": ["unlearning", "excise"]}


def test_windows_line_ends() -> None:
    assert blocks("---\r\nlicense: mit\r\ntags:\r\n- a\r\n---\r\n")["tags"] == "tags:\n- a\n"


def test_base_model_only_for_a_hub_revision() -> None:
    assert head(front_matter(None, "org/model@abc123"))["base_model"] == "org/model"
    assert "base_model" not in head(front_matter(None, "models/mine"))


def test_says_what_came_back_and_what_it_does_not_show() -> None:
    card = render_card(sample.full(), "rmu")
    assert "**After 8,192 tokens of relearning on other facts, 84 % of what rmu" in card
    assert "| relearn full | weights | relearn.facts | 0.090 | 0.830 |" in card
    assert "invalid: the positive control was not recovered" in card
    assert "passed, but does not count" in card
    assert "## What this does not show" in card
    assert "excise run facts --out out/facts" in card
    assert f"The weights in this folder (fingerprint `{parts.digest('rmu')}`)" in card


def test_refit_names_the_audited_model() -> None:
    record = sample.full()
    arm = record.method_runs[1]
    files = {"model.safetensors": "e" * 64}
    refit = arm.model_copy(
        update={"refit": ModelRef(name="rmu", fingerprint="f" * 64, files=files)}
    )
    record = record.model_copy(update={"method_runs": (record.method_runs[0], refit)})
    card = render_card(record, "rmu", refit=True)
    assert f"the weights in this folder (fingerprint `{'f' * 64}`) are that refit." in card
    assert f"| model.safetensors | {'e' * 64} |" in card
    assert "**They were not attacked.**" in card
    assert f"method's part of the split (fingerprint `{parts.digest('rmu')}`)" in card
    assert card.index("was not attacked") < card.index("After 8,192 tokens")
    beside = render_card(record, "rmu")
    assert f"The weights in this folder (fingerprint `{parts.digest('rmu')}`)" in beside
    assert "refit" not in beside


def test_unattacked_and_unknown_models() -> None:
    assert "It was not attacked, so how much would come back is not known" in render_card(
        sample.removed(), "rmu"
    )
    with pytest.raises(UserError, match=r"no model 'rmuu'; did you mean 'rmu'\?"):
        render_card(sample.full(), "rmuu")


def test_hostile_text_neither_breaks_markdown_nor_html() -> None:
    record = sample.hostile()
    card = render_card(record, record.verdicts[0].model, UPSTREAM)
    prose = re.sub(r"(`{3,})\n.*?\n\1\n", "", card, flags=re.DOTALL)
    assert "<script" not in prose
    assert "<img" not in prose
    assert "\x1b" not in card
    for line in prose.splitlines():
        if line.startswith("| ") and "---" not in line:
            cells = re.split(r"(?<!\\)\|", line)
            assert len(cells) in (6, 7, 10)


def test_a_card_tells_the_settings_that_a_sweep_chose() -> None:
    record = sample.full()
    runs = tuple(
        run.model_copy(
            update={
                "method": {**run.method, "layer": 7},
                "extras": {**run.extras, "sweep": {"chosen": {"layer": 2}}},
            }
        )
        for run in record.method_runs
    )
    text = render_card(record.model_copy(update={"method_runs": runs}), "rmu")
    assert "- setting layer: 2\n" in text
    assert "- chosen by a sweep: layer\n" in text
