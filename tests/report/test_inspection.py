"""The page of an inspection: what it says, that it can be read aloud, and that texts are text."""

from __future__ import annotations

import io
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from tests.report import sample
from tests.report.pages import read

from excise.record import (
    BlockChange,
    Bucket,
    Estimate,
    Inspection,
    MethodRun,
    ModelRef,
    NoiseFit,
    Record,
    SpliceFit,
    Strip,
    TensorChange,
    TokenKL,
    load,
    save,
)
from excise.report.inspection import SHADES, shade
from excise.report.page import render_html
from excise.report.terminal import render_terminal


def measured(value: float) -> Estimate:
    return Estimate(value=value, low=value - 0.1, high=value + 0.1)


def block(number: int) -> BlockChange:
    names = {f"norm_{s}_{m}" for s in ("forget", "retain") for m in ("original", "edited")}
    floats = dict.fromkeys(
        set(BlockChange.model_fields) - names - {"block", "cosine", "auc"}, 0.25 * number + 0.25
    )
    intervals = dict.fromkeys(names | {"cosine", "auc"}, measured(number + 0.5))
    return BlockChange.model_validate({"block": number, **floats, **intervals})


def inspection(text: str = "word", blocks: int = 12) -> Inspection:
    return Inspection(
        model=text,
        headline=f"{text} is found.",
        summary=f"All about {text}.",
        conjecture="fits",
        peak=blocks - 1,
        clearest=blocks - 1,
        blocks=tuple(block(i) for i in range(blocks)),
        buckets=tuple(
            Bucket.model_validate(
                {
                    "text": text_of,
                    "position": position,
                    "block": i,
                    "tokens": 9,
                    "norm_original": 2.0,
                    "norm_edited": 3.0,
                    "change": 0.5,
                    "cosine": 0.75,
                    "top_original": 0.25,
                    "top_edited": 0.875,
                }
            )
            for text_of, position in (
                ("forget", "prompt"),
                ("forget", "answer"),
                ("retain", "answer"),
            )
            for i in range(blocks)
        ),
        kl=tuple(
            TokenKL.model_validate(
                {
                    "side": side,
                    "mean": measured(1),
                    "answers": measured(2),
                    "median": 0.5,
                    "p99": 3.0,
                    "tokens": 10,
                    "units": 3,
                }
            )
            for side in ("forget", "retain")
        ),
        splice=SpliceFit(
            auc=measured(0.9),
            auc_answers=1.0,
            kinds=tuple(
                NoiseFit.model_validate(
                    {
                        "noise": noise,
                        "kl_forget": 1.0,
                        "share": -0.5,
                        "share_answers": 0.75,
                        "weight": 0.5,
                        "share_mixed": 0.6,
                        "weight_retain": 0.02,
                    }
                )
                for noise in ("uniform", "unigram", "mean-edited")
            ),
        ),
        strips=(
            Strip(side="forget", unit=text, tokens=("a", f" {text}"), kl=(None, 2.5)),
            Strip(side="retain", unit="u", tokens=("b", "\n"), kl=(None, 0.0)),
        ),
        tensors=tuple(
            TensorChange(
                name=f"{text}.{i}", shape=(4, 8), relative=0.5, moved=1.0, rank=1.5, count90=2
            )
            for i in range(40)
        ),
        tensors_total=50,
        rows={"fit": 3, "forget": 4, "retain": 5},
    )


def record_of(found: Inspection, *, sensitive: bool = False) -> Record:
    arm = MethodRun(name=found.model, method={}, model=ModelRef(name=found.model))
    return Record(
        kind="inspect", title="Inside", method_runs=(arm,), inspection=found, sensitive=sensitive
    )


@pytest.mark.parametrize("blocks", [1, 2, 48])
def test_the_page_is_sound_and_can_be_read_aloud(blocks: int) -> None:
    root = read(render_html(record_of(inspection(blocks=blocks))))
    nodes = root.walk()
    ids = [n.attrs["id"] for n in nodes if "id" in n.attrs]
    assert len(ids) == len(set(ids))
    for node in nodes:
        assert set(node.attrs.get("aria-labelledby", "").split()) <= set(ids)
        if node.tag == "a":
            assert node.attrs["href"][1:] in ids
    levels = [int(n.tag[1]) for n in nodes if re.fullmatch(r"h[1-6]", n.tag)]
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert root.all("h2")[0].text() == "What the edit did inside"
    assert "Every attack" not in {n.text() for n in root.all("h2")}
    for table in root.all("table"):
        assert table.children[0].text()
        width = len(table.all("thead")[0].all("th"))
        assert all(len(row.all("th", "td")) == width for row in table.all("tr"))
    plots = [n for n in root.all("svg") if "aria-hidden" not in n.attrs]
    assert len(plots) == 10
    for plot in plots:
        assert all(c.text() for c in plot.children[:2])
        assert plot.parent is not None
        assert plot.parent.all("details")[0].all("table")
    text = root.all("main")[0].text()
    assert text.index("word is found.") < text.index("All about word.")
    for said in ("\u221250 %", "75 %", "10 more moved less", "word .", "3 dev forget"):
        assert said.replace("word .", "word") in text
    assert "undefined" not in text.lower()


def test_buckets_are_drawn_where_they_were_read() -> None:
    root = read(render_html(record_of(inspection(blocks=3))))
    texts = {table.children[0].text(): table.text() for table in root.all("table")}
    (turned,) = (text for name, text in texts.items() if "Which tokens were turned?" in name)
    assert "forget text, in the prompt" in turned
    assert "retain text, in the prompt" not in turned
    assert "0.75" in turned
    without = inspection(blocks=3).model_copy(update={"buckets": ()})
    assert "By kind of token" not in render_html(record_of(without))


def test_shades_rise_with_the_kl() -> None:
    assert [shade(v) for v in (None, 0.0, *SHADES, 99.0)] == [0, 0, 1, 2, 3, 4, 4]
    root = read(render_html(record_of(inspection())))
    shades = {
        n.text(): n.attrs["class"] for n in root.all("span") if "token" in n.attrs.get("class", "")
    }
    assert shades["word"] == "token heat4"
    assert shades["a"] == "token heat0"


def test_hostile_text_stays_text() -> None:
    html = render_html(record_of(inspection(sample.HOSTILE)))
    assert "<script>alert" not in html
    assert "<img" not in html
    assert "&lt;script&gt;alert" in html
    assert not any(c in html.partition("<script type")[0] for c in "\x1b\u202e")
    assert html.count("<script") == 1


def test_sensitive_texts_are_shown_nowhere() -> None:
    html = render_html(record_of(inspection(), sensitive=True))
    assert "marked sensitive" in html
    data = json.loads(read(html).all("script")[0].text())
    assert data["inspection"]["strips"] == []
    assert not any("heat4" in n.attrs.get("class", "") for n in read(html).all("span"))


def test_other_pages_stay_as_they_are() -> None:
    html = render_html(sample.full())
    assert "What the edit did inside" not in html
    both = render_html(sample.full().model_copy(update={"inspection": inspection()}))
    heads = [n.text() for n in read(both).all("h2")]
    assert heads[0] == "What the edit did inside"
    assert "Every attack" in heads


def test_the_record_comes_back(tmp_path: Path) -> None:
    made = record_of(inspection())
    save(made, tmp_path)
    assert load(tmp_path) == made


def test_the_terminal_says_the_finding_first() -> None:
    screen = Console(file=io.StringIO(), width=100)
    screen.print(render_terminal(record_of(inspection(sample.HOSTILE)), Path("out")))
    file = screen.file
    assert isinstance(file, io.StringIO)
    said = file.getvalue()
    assert "is found." in said
    assert "\x1b" not in said
    assert "No verdict" not in said
    assert "excise audit" not in said
    assert said.index("is found.") < said.index("By block")
