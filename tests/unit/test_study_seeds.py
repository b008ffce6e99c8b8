"""Seeds of a study: how many, in which order, until when, and what is said of too few."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import ValidationError

from excise.cli.study import study_of
from excise.core.errors import UserError
from excise.core.stages import Runtime
from excise.evals.replicates import Contrast, over_seeds
from excise.record import Record
from excise.run.study import Study, StudyResult, conduct
from excise.train.pool import Pool, Processes


class Effect(Study):
    """An effect that is what its seed says."""

    question: ClassVar[str] = "Is there an effect?"
    statistic: ClassVar[str] = "D is above the margin if its interval is."

    name: Literal["effect"] = "effect"
    margin: float = 0.3
    tuned_on: tuple[int, ...] | None = (4,)
    center: float = 0.4
    spread: float = 0.1
    names_none: bool = False

    asked: ClassVar[list[tuple[tuple[int, ...], float]]] = []

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Compare the mean with the margin."""
        self.asked.append((self.seeds, self.error))
        # +1, -1, +1 ... times the spread
        values = [self.center + self.spread * (1 - 2 * (i % 2)) for i in range(len(self.seeds))]
        contrast = Contrast("D", over_seeds(values), (self.margin,), self.error)
        said = "above" if contrast.above(self.margin) else "undecided"
        named = () if self.names_none else (contrast,)
        return StudyResult((), said, f"Decision: {said}.", contrasts=named)


def run(out: Path, **settings: Any) -> Record:
    Effect.asked.clear()
    return conduct(Effect(**settings), out, Processes(1))


def test_a_number_takes_so_many_seeds_that_nothing_was_chosen_on() -> None:
    assert Effect(seeds=2).seeds == (1, 2)  # type: ignore[arg-type]
    assert Effect(seeds=10).seeds == (1, 2, 3, 5, 6, 7, 8, 9, 10, 13)  # type: ignore[arg-type]
    assert Effect(seeds=5, tuned_on=(2,)).seeds == (1, 3, 4, 5, 6)  # type: ignore[arg-type]
    assert Effect(seeds=(7, 9)).seeds == (7, 9)
    asked = study_of("splice-factorial", {"seeds": "10"}, full=False)
    assert asked.seeds == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seeds": (1, 2, 1)}, "names a seed twice"),
        ({"seeds": (1, 7), "tuned_on": (0, 7)}, "settings are chosen on seed 7"),
        ({"seeds": 0}, "takes a number from 1 to"),
        ({"until": "decided"}, "starts with 3 and needs more to add"),
        ({"until": "later"}, "decided"),
        ({"error": 0.0}, "greater than 0"),
    ],
)
def test_seeds_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Effect(**settings)


def test_seeds_are_added_until_it_is_decided(tmp_path: Path) -> None:
    record = run(tmp_path / "out", seeds=12, until="decided", spread=0.05)
    counts = [len(seeds) for seeds, _ in Effect.asked]
    assert counts == [3, 5, 8]
    assert [error for _, error in Effect.asked] == pytest.approx(
        [0.05 * 3 / 12, 0.05 * 2 / 12, 0.05 * 3 / 12]
    )
    assert record.seeds == (1, 2, 3, 5, 6, 7, 8, 9)
    assert record.study is not None
    assert record.study.decision == "above"
    assert "8 were needed, in 3 look(s)" in record.study.paragraph
    looks = record.study.tables[-1]
    assert [row.condition for row in looks.rows] == ["3 seeds", "5 seeds", "8 seeds"]
    again = run(
        tmp_path / "out", seeds=12, until="decided", spread=0.05
    )  # resumes in its own folder
    assert again.study is not None
    assert again.study.decision == "above"


def test_what_stays_undecided_says_how_many_seeds_it_would_take(tmp_path: Path) -> None:
    record = run(tmp_path / "out", seeds=6, until="decided", center=0.33)
    assert record.study is not None
    assert len(record.seeds) == 6
    assert "D is undecided and would take about" in record.study.paragraph
    far = run(tmp_path / "far", center=0.27)
    assert far.study is not None
    assert "more than 50" in far.study.paragraph
    assert "redesigned or retired" in far.study.paragraph


def test_one_seed_is_flagged(tmp_path: Path) -> None:
    record = run(tmp_path / "out", seeds=(1,), center=0.9)
    assert record.study is not None
    assert record.study.decision == "undecided"
    assert "no interval over seeds" in record.study.paragraph


def test_a_study_without_an_interval_cannot_run_until_decided(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no interval that more seeds could decide"):
        run(tmp_path / "out", seeds=6, until="decided", names_none=True)
