"""Leaderboards that are run whole: made-up facts in tiny models, and glosses in SmolLM2-135M."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, SerializeAsAny

from excise.data.spec import DomainSpec
from excise.domains.glosses import Glosses
from excise.methods.base import Method
from excise.methods.pretraining.filtering import Filtering
from excise.methods.search import RATE, Range
from excise.recipes.smollm import MODEL, smollm_audit
from excise.requests.recipe import AuditSpec, EvalSpec
from excise.train.fit import FitConfig
from excise_studies.leaderboard.board import Leaderboard, posthoc


def every() -> dict[str, Method]:
    """Return every method that edits a trained model, and data filtering beside them."""
    return {**posthoc(), "filtering": Filtering()}


class LeaderboardFacts(Leaderboard):
    """Every method on made-up facts, where labels reach all, half and a tenth of the forget rows.

    Data filtering is a row too; it has nothing to search.
    """

    takes: ClassVar[str] = "2 to 4 hours, 1 GiB; resumes where it was stopped"

    name: Literal["leaderboard", "leaderboard-facts", "leaderboard-glosses"] = "leaderboard-facts"
    """Name on the command line."""
    methods: dict[str, SerializeAsAny[Method]] = Field(default_factory=every)
    """Methods by name, with the settings of the first trial."""
    rates: tuple[float, ...] = Field(default=(1.0, 0.5, 0.1), min_length=1)
    """Shares of the forget rows that carry a label. Settings are chosen at the first."""


class LeaderboardGlosses(Leaderboard):
    """Methods on one WordNet topic in SmolLM2-135M; multiple choice decides, without an oracle."""

    takes: ClassVar[str] = "days on two cores; --time-budget cuts it, after fetching smollm2-135m"

    name: Literal["leaderboard", "leaderboard-facts", "leaderboard-glosses"] = "leaderboard-glosses"
    """Name on the command line."""
    model: str = MODEL.path
    """Folder, hub id, GGUF file, or a name that `excise fetch` knows; empty to train one."""
    domain: SerializeAsAny[DomainSpec] = Glosses()
    """What is removed and what stays."""
    trials: int = Field(default=4, ge=1)
    """Settings of every method; the first is as published."""
    seeds: tuple[int, ...] = Field(default=(1,), min_length=1)
    """Seeds of the removals in the table."""
    dev_rows: int = Field(default=24, ge=1)
    """Rows of `dev` scored per role and topic at most."""
    ranges: dict[str, Range] = {RATE: Range(low=1e-5, high=1e-3, absolute=True)}
    """Ranges by path of a setting, for every method that has it, in place of its own."""
    repair: FitConfig | None = FitConfig(steps=20, lr=1e-4, batch_size=8, clip=1.0)
    """Fine-tuning on retain rows that makes the repaired rows; empty for none."""
    audit: AuditSpec = smollm_audit(test_rows=48, other_rows=16, steps=16, benign_rate=3e-4)
    """The audit of every candidate."""
    evaluate: EvalSpec = EvalSpec(max_rows=120, max_length=96, samples=0)
    """How models are scored."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype."""
