"""The terminal's summary: what it says, in 80 columns, with and without colour."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tests.report import sample
from tests.report.test_inspection import inspection, record_of
from tests.report.test_study import study

from excise.record import Record
from excise.report.terminal import render_terminal


def shown(record: Record, width: int = 80, colour: bool = False, folder: Path | None = None) -> str:
    """Return what a console of this width prints."""
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        no_color=not colour,
        legacy_windows=False,
    )
    console.print(render_terminal(record, folder))
    return out.getvalue()


@pytest.mark.parametrize("make", sample.RECORDS.values(), ids=sample.RECORDS)
def test_fits_eighty_columns_without_escapes(make: Callable[[], Record]) -> None:
    text = shown(make(), folder=Path("out/facts"))
    assert max(map(len, text.splitlines()), default=0) <= 80
    assert "\x1b" not in text
    assert "nan" not in text


def test_says_what_matters() -> None:
    text = shown(sample.full(), folder=Path("out/facts"))
    assert (
        text.index("84 % of what rmu removed") < text.index("Depth levels") < text.index("Scores")
    )
    assert "relearn full" in text
    assert "0.09 -> 0.83" in text
    assert "invalid" in text
    assert "* does not count: a lower level did not pass" in " ".join(text.split())
    assert "report  out/facts/report.html" in text
    assert "next    excise audit out/facts --budget standard" in text


def test_an_attack_that_has_nothing_to_do_is_not_missing() -> None:
    full = sample.full(("rmu",))
    assert "nothing to do" not in shown(full)
    assert "missing" in shown(full)
    kept = tuple(
        a.model_copy(update={"facts": {"applies": False}}) if a.name == "lens" else a
        for a in full.attacks
    )
    text = shown(full.model_copy(update={"attacks": kept}))
    assert "nothing to do" in text
    assert "missing" not in text


def test_begins_with_what_a_release_manager_asks() -> None:
    text = shown(sample.full(("rmu",)))
    order = ("rmu", "Removed", "Comes back", "Retain set", "Can it ship?", "After 8,192", "Depth")
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert "No: 84 % comes back with relearning." in text


def test_a_pass_that_does_not_count_is_not_green() -> None:
    lines = shown(sample.full(("rmu",)), colour=True).splitlines()
    (weights,) = (line for line in lines if "D3" in line)
    assert "passed" in weights
    assert "\x1b[32m" not in weights
    (first,) = (line for line in lines if line.startswith("D0"))
    assert "\x1b[32mpassed" in first


def test_inspections_and_studies_suggest_nothing_to_type() -> None:
    assert "next " not in shown(record_of(inspection()), folder=Path("LOOK"))
    assert "next " not in shown(study(), folder=Path("out"))


def test_next_command_after_an_unattacked_removal() -> None:
    text = shown(sample.removed(), folder=Path("my out"))
    assert "next    excise audit 'my out' --out 'my out'-audit" in text
    assert "Not shown: nobody attacked it, so what would come back is not known." in " ".join(
        text.split()
    )


def test_colour_is_style_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[32m" in shown(sample.full(), colour=True)
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=True).print(render_terminal(sample.full()))
    assert "\x1b[3" not in out.getvalue().replace("\x1b[3m", "")


def test_markup_in_names_is_text() -> None:
    record = sample.full()
    verdict = record.verdicts[1].model_copy(update={"sentence": "[red]x[/red] \x1b[2J"})
    text = shown(record.model_copy(update={"verdicts": (verdict,)}))
    assert "[red]x[/red]" in text
    assert "\x1b" not in text
