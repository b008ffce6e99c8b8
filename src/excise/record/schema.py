"""The schema of the record: what `run.json` and `items.parquet` hold, typed and versioned.

Read it through `excise.record`. This module imports no torch.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from excise.record.inspection import Inspection
from excise.record.study import Study

SCHEMA = 1
"""Version of the record's schema; older records always load."""

Direction = Literal["higher", "lower"]


class _Entry(BaseModel):
    """Base of every part of the record: frozen, and tolerant of fields a newer version adds."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class Environment(_Entry):
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


class ModelRef(_Entry):
    """A model by its bytes."""

    name: str
    """What it is to the run: `original`, `oracle-0`, an arm's name."""
    path: str = ""
    """Folder, relative to the output folder where it lies inside it."""
    fingerprint: str = ""
    """SHA-256 of its weights and configuration."""
    tokenizer: str = ""
    """SHA-256 of its tokenizer."""
    source: str = ""
    """Hub id and revision, or the folder the user gave."""
    parameters: int = 0
    """Number of parameters."""


class Score(_Entry):
    """One metric of one model on one set."""

    model: str
    """`original`, `oracle-0`, or the arm."""
    set: str
    """`test.NAME`, `retain_test`, `adjacent_test`."""
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
    direction: Direction = "higher"
    """Which way is more knowledge."""
    chance: float | None = None
    """Value of a model that knows nothing, where that is known."""
    definition: str = ""
    """Versioned definition of the metric."""


class CurvePoint(_Entry):
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
    """Mean score on what the attacker trained on (T): shown, never decisive."""


class AttackArm(_Entry):
    """One arm of one attack on one model."""

    name: str
    """Attack."""
    subject: str = "candidate"
    """Model that was attacked: an arm's name, `original`, `oracle-0`, `planted`."""
    access: Literal["prompt", "logits", "activations", "weights"]
    """What the attacker can touch."""
    rung: str = ""
    """Rung of the ladder it belongs to."""
    needs_original: bool = False
    """Whether the attacker holds the original."""
    arm: str = ""
    """Which variant: `full`, `lora`, `int4`, `k=4`, `random-3` ..."""
    control: bool = False
    """Whether the arm is a control (random direction, same attack without information)."""
    trained_on: str = ""
    """Role the attacker trained on, empty for none."""
    scored_on: str = "test"
    """Role that was scored."""
    metric: str = ""
    """Metric of the curve."""
    lr: float | None = None
    """Learning rate."""
    seed: int = 0
    """Seed of the arm."""
    status: Literal["ok", "void", "missing", "failed"] = "ok"
    """`void`: without power, does not count; `missing`: not run; `failed`: see `reason`."""
    reason: str = ""
    """Why it is void, missing or failed."""
    decisive: bool = False
    """Whether the verdict reads this arm (its rate was the one chosen on `dev`)."""
    curve: tuple[CurvePoint, ...] = ()
    """Checkpoints, cheapest first; the first costs nothing."""
    facts: dict[str, Any] = {}
    """What else was measured (bucket-flip rate, cosine of directions ...)."""


class RungResult(_Entry):
    """One rung of the ladder."""

    rung: Literal["D0", "D1", "D2", "D3", "D4", "D5"]
    """Code, never printed without its words."""
    words: str
    """The rung in words."""
    status: Literal["pass", "fail", "untested", "underpowered"]
    """Result; a rung counts only with all lower ones passed."""
    against: Literal["oracle", "controls", "chance", "nothing"] = "nothing"
    """What it was read against."""
    gap: float | None = None
    """Depth gap (candidate - oracle) / (original - oracle) at the deciding point."""
    low: float | None = None
    """Lower end of its 90 % interval (two one-sided tests at 5 %)."""
    high: float | None = None
    """Upper end of its 90 % interval."""
    margin: float | None = None
    """Equivalence margin."""
    decided_by: str = ""
    """Attack and arm that decided."""
    reason: str = ""
    """One sentence."""


class Verdict(_Entry):
    """What the attacks showed about one arm."""

    arm: str
    """The removal it is about."""
    sentence: str
    """How much came back after how many tokens, first."""
    budget: str = ""
    """Named budget."""
    rungs: tuple[RungResult, ...] = ()
    """The ladder."""
    highest: str = ""
    """Highest rung that counts, or empty."""
    recovery: float | None = None
    """Published fraction on V: (attacked - unlearned) / (original - unlearned)."""
    recovery_tokens: int | None = None
    """Tokens the attacker needed for it."""
    residual_bits: float | None = None
    """Bits per unit that the weights save an attacker, minus the oracle's."""
    residual_low: float | None = None
    """Lower end of their 90 % interval."""
    residual_high: float | None = None
    """Upper end of their 90 % interval."""
    null: float | None = None
    """The audit's measured null: gap between the filtering arm and the rail."""
    reasons: tuple[str, ...] = ()
    """Everything a reader should know before quoting it."""


class Sample(_Entry):
    """A continuation, before and after."""

    set: str
    """Role the prompt comes from."""
    prompt: str
    """What the model was given."""
    expected: str = ""
    """What the data says."""
    outputs: dict[str, str] = {}
    """Continuation by model."""


class ArmRecord(_Entry):
    """One removal."""

    name: str
    """Name of the arm."""
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


class Record(_Entry):
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
    arms: tuple[ArmRecord, ...] = ()
    """Removals."""
    scores: tuple[Score, ...] = ()
    """All scores without an attack."""
    attacks: tuple[AttackArm, ...] = ()
    """All attacks."""
    verdicts: tuple[Verdict, ...] = ()
    """One per arm."""
    inspection: Inspection | None = None
    """What one edit did inside, where that was inspected."""
    samples: tuple[Sample, ...] = ()
    """Continuations; empty where the data is sensitive."""
    study: Study | None = None
    """What a study asked and found; empty for every other kind."""
    sensitive: bool = False
    """Whether texts were kept out."""
    seconds: float = 0.0
    """Wall-clock time."""
    peak_memory_bytes: int = 0
    """Peak resident memory over all processes' maximum."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""


class Item(_Entry):
    """One row of `items.parquet`."""

    model: str
    """Model, with the attack and arm after a slash when attacked."""
    set: str
    """Role."""
    unit: str
    """Unit id."""
    metric: str
    """Metric."""
    value: float
    """Score of the item."""
