"""The schema of the record: what `run.json` and `items.parquet` hold, typed and versioned.

Read it through `excise.record`. This module imports no torch.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from excise.core.errors import UserError
from excise.record.entry import Level, RecordEntry, ScoreDirection
from excise.record.inspection import Inspection
from excise.record.study import StudyRecord

SCHEMA = 2
"""Version of the record's schema; `excise.record.upgrade` brings older records up to it."""


class Environment(RecordEntry):
    """Where and with what a run was made."""

    excise: str = ""
    """Version of excise."""
    versions: dict[str, str] = {}
    """Versions of the libraries that decide numbers."""
    device: str = ""
    """Device kind and name."""
    dtype: str = ""
    """Compute dtype."""
    git: str = ""
    """Commit of the working tree, with `+dirty` when it was not clean; empty outside git."""
    platform: str = ""
    """Operating system and processor."""
    threads: int = 1
    """Threads per process."""
    world: int = 1
    """Number of processes."""
    started: str = ""
    """Start, ISO 8601, UTC."""


class ModelRef(RecordEntry):
    """A model by its bytes."""

    name: str
    """What it is to the run: `original`, `oracle-0`, a method run's name."""
    path: str = ""
    """Folder, relative to the output folder where it lies inside it."""
    fingerprint: str = ""
    """SHA-256 over its weights and configuration together, as excise computes it."""
    files: dict[str, str] = {}
    """SHA-256 of every file of its folder by relative name, as `sha256sum` prints it; the card
    (`README.md`) and weights in formats that are not read are left out."""
    tokenizer: str = ""
    """SHA-256 of its tokenizer."""
    source: str = ""
    """Hub id and revision, or the folder the user gave."""
    parameters: int = 0
    """Number of parameters."""


class Score(RecordEntry):
    """One metric of one model on one set."""

    model: str
    """`original`, `oracle-0`, or the name of a method run."""
    set: str
    """`test.NAME`, `retain_test`, `adjacent_test`, `paraphrases.NAME`, `multi_hop.NAME`,
    `benchmark.NAME`, and `benchmark` for scores of whole sets."""
    metric: str
    """Name of the metric."""
    value: float
    """Mean over units."""
    low: float
    """Lower end of the 95 % interval (bootstrap by unit)."""
    high: float
    """Upper end of the 95 % interval."""
    n: int
    """Number of units."""
    direction: ScoreDirection = "higher"
    """Which way is more knowledge."""
    chance: float | None = None
    """Value of a model that knows nothing, where that is known."""
    definition: str = ""
    """Versioned definition of the metric."""


class CurvePoint(RecordEntry):
    """One checkpoint of an attack."""

    examples: int = 0
    """Examples the attacker has used."""
    tokens: int = 0
    """Tokens the attacker has trained on or shown."""
    flops: float = 0.0
    """Floating-point operations spent by the attacker."""
    score: float
    """Mean score on what is scored."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    retain: float | None = None
    """Mean retain score at the same point, to tell repair from recovery."""
    trained: float | None = None
    """Mean score on the relearn set, which the attacker trained on: shown, never decisive."""


class AttackVariant(RecordEntry):
    """One variant of one attack on one model: a row of the record with its curve."""

    name: str
    """Attack."""
    subject: str = "candidate"
    """Model that was attacked: a method run's name, `original`, `oracle-0`, `positive-control`."""
    access: Literal["prompt", "logits", "activations", "weights"]
    """What the attacker can touch."""
    level: str = ""
    """Depth level it belongs to."""
    needs_original: bool = False
    """Whether the attacker holds the original."""
    variant: str = ""
    """Which variant: `full`, `lora`, `int4`, `k=4`, `random-3` ..."""
    control: bool = False
    """Whether it is a negative control (random direction, same attack without information)."""
    trained_on: str = ""
    """Role the attacker trained on, empty for none."""
    scored_on: str = "test"
    """Role that was scored."""
    metric: str = ""
    """Metric of the curve."""
    lr: float | None = None
    """Learning rate."""
    seed: int = 0
    """Seed of the attacker."""
    status: Literal["ok", "invalid", "missing", "failed"] = "ok"
    """`invalid`: failed its positive control, does not count; `missing`: not run; `failed`: see
    `reason`."""
    reason: str = ""
    """Why it is invalid, missing or failed."""
    decisive: bool = False
    """Whether the verdict rests on this variant (its rate was the one chosen on `dev`)."""
    curve: tuple[CurvePoint, ...] = ()
    """Checkpoints, cheapest first; the first costs nothing."""
    facts: dict[str, Any] = {}
    """What else was measured (bucket-flip rate, cosine of directions ...)."""


class LevelResult(RecordEntry):
    """What one depth level came to."""

    level: Level
    """Code, never printed without its words."""
    words: str
    """The level in words."""
    status: Literal["pass", "fail", "below", "untested", "underpowered"]
    """Result; a level counts only with all lower ones passed. `below`: nothing is left, and yet
    not as in a model that was never taught: suppressed or damaged."""
    against: Literal["oracle", "controls", "chance", "nothing"] = "nothing"
    """What it was compared with."""
    gap: float | None = None
    """Depth gap (candidate - oracle) / (original - oracle) at the deciding point."""
    low: float | None = None
    """Lower end of its 90 % interval (two one-sided tests at 5 %)."""
    high: float | None = None
    """Upper end of its 90 % interval."""
    margin: float | None = None
    """Equivalence margin."""
    decided_by: str = ""
    """Attack and variant that decided."""
    reason: str = ""
    """One sentence."""


class Verdict(RecordEntry):
    """What the attacks showed about one edited model."""

    model: str
    """The method run or audited model it is about."""
    sentence: str
    """Does it come back, after how much work, at what cost to the rest."""
    budget: str = ""
    """Named budget."""
    levels: tuple[LevelResult, ...] = ()
    """The depth levels, lowest first."""
    highest: str = ""
    """Highest level that counts, or empty."""
    recovery: float | None = None
    """Published fraction (attacked - unlearned) / (original - unlearned), held-out test set."""
    recovery_gap: float | None = None
    """Depth gap at the same point: what came back beyond oracles attacked alike; empty without."""
    recovery_tokens: int | None = None
    """Tokens the attacker needed for both."""
    residual_bits: float | None = None
    """Bits per unit that the weights save an attacker, minus the oracle's."""
    residual_low: float | None = None
    """Lower end of their 90 % interval."""
    residual_high: float | None = None
    """Upper end of their 90 % interval."""
    retain_change: float | None = None
    """Change of the retain score against the original before any attack, positive is better."""
    retain_low: float | None = None
    """Lower end of its 95 % interval (paired by unit)."""
    retain_high: float | None = None
    """Upper end of its 95 % interval."""
    null: float | None = None
    """The audit's measured null: gap between the model made by data filtering and the oracle."""
    reasons: tuple[str, ...] = ()
    """Everything a reader should know before quoting it."""


class Sample(RecordEntry):
    """A continuation, before and after."""

    set: str
    """Role the prompt comes from."""
    prompt: str
    """What the model was given."""
    expected: str = ""
    """What the data says."""
    outputs: dict[str, str] = {}
    """Continuation by model."""


class MethodRun(RecordEntry):
    """One run of one method: a removal."""

    name: str
    """Name of the run."""
    method: dict[str, Any]
    """Its configuration."""
    model: ModelRef
    """What it made."""
    seed: int = 0
    """Its seed."""
    changed: tuple[str, ...] = ()
    """Tensors that differ from the start."""
    cost: dict[str, float] = {}
    """Steps, tokens, FLOPs, seconds."""
    extras: dict[str, Any] = {}
    """What the method said (trained modules, share of entries moved ...)."""
    history: tuple[dict[str, float], ...] = ()
    """Named losses by step."""
    refit: ModelRef | None = None
    """What the method made of all forget rows, where that was asked for; `model`, which it made
    of its part of the split, is the one that was attacked."""


class Record(RecordEntry):
    """Everything about one run."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", use_attribute_docstrings=True, populate_by_name=True
    )

    version: int = Field(default=SCHEMA, alias="schema")
    """Version of this schema."""
    kind: Literal["run", "remove", "audit", "study", "inspect"] = "run"
    """Which verb made it."""
    title: str = ""
    """Name of the recipe, or the method and the model."""
    command: str = ""
    """The command that makes it again."""
    config: dict[str, Any] = {}
    """Configuration, complete."""
    environment: Environment = Environment()
    """Versions, device, git."""
    seeds: tuple[int, ...] = (0,)
    """Seeds."""
    data: dict[str, Any] = {}
    """Domain: name, fingerprint, claim, exposure, rows and units by role, sources, notes."""
    models: tuple[ModelRef, ...] = ()
    """Original, oracles."""
    method_runs: tuple[MethodRun, ...] = ()
    """Removals, and in an audit the models that were attacked."""
    scores: tuple[Score, ...] = ()
    """All scores without an attack."""
    attacks: tuple[AttackVariant, ...] = ()
    """All attacks."""
    verdicts: tuple[Verdict, ...] = ()
    """One per method run or audited model."""
    inspection: Inspection | None = None
    """What one edit did inside, where that was inspected."""
    samples: tuple[Sample, ...] = ()
    """Continuations; empty where the data is sensitive."""
    study: StudyRecord | None = None
    """What a study asked and found; empty for every other kind."""
    sensitive: bool = False
    """Whether texts were kept out."""
    seconds: float = 0.0
    """Wall-clock time."""
    peak_memory_bytes: int = 0
    """Peak resident memory over all processes' maximum."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""

    def to_frame(self, of: Literal["curves", "scores", "levels"] = "curves") -> Any:
        """Return one table of the record as a `pandas.DataFrame`, a row an entry.

        Args:
            of: `curves`, one row per checkpoint of every attack variant, with the fields of
                `AttackVariant` (but `curve` and `facts`) and `CurvePoint`; `scores`, the fields of
                `Score`; `levels`, the fields of `LevelResult` and the `model`.

        Returns:
            The table, its columns named like the fields; no rows where there is nothing.

        Raises:
            UserError: If there is no such table, or pandas is not installed.
        """
        if of not in ("curves", "scores", "levels"):
            raise UserError(f"to_frame has no table '{of}'; known: curves, scores, levels")
        try:
            import pandas
        except ImportError:
            raise UserError(
                "to_frame needs pandas, which is not installed: pip install 'excise[plot]'"
            ) from None
        rows: list[dict[str, Any]]
        if of == "curves":
            columns = [f for f in AttackVariant.model_fields if f not in ("curve", "facts")]
            columns += CurvePoint.model_fields
            rows = [
                attack.model_dump(exclude={"curve", "facts"}) | point.model_dump()
                for attack in self.attacks
                for point in attack.curve
            ]
        elif of == "scores":
            columns = [*Score.model_fields]
            rows = [score.model_dump() for score in self.scores]
        else:
            columns = ["model", *LevelResult.model_fields]
            rows = [
                {"model": verdict.model} | level.model_dump()
                for verdict in self.verdicts
                for level in verdict.levels
            ]
        return pandas.DataFrame(rows, columns=columns)


class Item(RecordEntry):
    """One row of `items.parquet`."""

    model: str
    """Model, with the attack and variant after a slash when attacked."""
    set: str
    """Role."""
    unit: str
    """Unit id."""
    metric: str
    """Metric."""
    value: float
    """Score of the item."""
