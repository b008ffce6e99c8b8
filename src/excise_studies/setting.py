"""What the studies of distillation and of routing share: tiny models and one attacker.

Every trained model and every attack is a stage, so that a study resumes where it was stopped and
studies that lie side by side share originals, oracles, teachers and students.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SerializeAsAny

from excise.core.config import Config
from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.data.spec import DomainSpec
from excise.domains.arithmetic import ARITHMETIC_FIT, ARITHMETIC_MAX_LENGTH, Arithmetic
from excise.methods.base import ApplyMethod, Method, Removal
from excise.methods.distillation.undo import Undo
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.checkpoint import Checkpoint
from excise.models.spec import Scratch
from excise.record import StudyTable
from excise.run.results import model_ref
from excise.run.stages import MakeModel
from excise.run.study import StudyResult
from excise.train.fit import FitConfig
from excise.train.pool import Pool
from excise_studies.attacking import Attacker, RunKey, attack_all
from excise_studies.base import Replicate, train_draws
from excise_studies.recovery import RecoveryScores, arms_table, curves_table, finish, gather

APART = 2000
"""A further initialisation of a draw starts from the draw's seed plus this."""

LENGTH = ARITHMETIC_MAX_LENGTH


class ExperimentSetting(Config):
    """Data, models and attacker: 0.1M parameters and small tables, seconds a model.

    Settings were chosen by hand on draw 0.
    """

    domain: SerializeAsAny[DomainSpec] = Arithmetic(factors=12, addends=20, dev_share=0.2)
    """The data, drawn anew for every seed."""
    model: Scratch = Scratch(width=64, blocks=2)
    """Architecture of all models."""
    pretrain: Pretrain = Pretrain(
        fit=FitConfig(**{**ARITHMETIC_FIT, "steps": 1000, "lr": 4e-3, "batch_size": 96}),
        max_length=LENGTH,
    )
    """How original and oracle are trained."""
    attacker: Attacker = Attacker()
    """Who relearns T."""


# -- models ----------------------------------------------------------------------------------------


def make_draws(
    bench: ExperimentSetting, seeds: Sequence[int], runtime: Runtime, pool: Pool
) -> dict[int, Replicate]:
    """Train original and oracle of every draw."""
    drawn: dict[int, tuple[Domain, Any]] = {}
    for seed in dict.fromkeys(seeds):
        own = "seed" in type(bench.domain).model_fields
        spec = bench.domain.model_copy(update={"seed": seed}) if own else bench.domain
        drawn[seed] = (spec.build(None), spec.tokenizer())
    return train_draws(drawn, bench.model, bench.pretrain, runtime, pool)


def make_inits(
    bench: ExperimentSetting,
    draws: Mapping[int, Replicate],
    runtime: Runtime,
    pool: Pool,
    apart: int = APART,
) -> dict[int, Checkpoint]:
    """Return a further random model of every draw, of seed plus `apart`."""
    jobs = [
        MakeModel(bench.model, draw.original.tokenizer(), seed + apart)
        for seed, draw in draws.items()
    ]
    return dict(zip(draws, pool.map(runtime.run, jobs), strict=True))


@dataclass(frozen=True)
class Make:
    """One arm of one draw: a method and what it is given.

    Attributes:
        method: The method; the teacher of an `Undo` is a stage that students share.
        start: The model it starts from.
        domain: The data as the method sees it.
    """

    method: Method
    start: Checkpoint
    domain: Domain


def arms_of(
    methods: Mapping[str, Method], draws: Mapping[int, Replicate], seeds: Sequence[int]
) -> dict[RunKey, Make]:
    """Return every method on the original of every draw, with the data as it is."""
    return {
        (name, seed): Make(method, draws[seed].original, draws[seed].domain)
        for name, method in methods.items()
        for seed in seeds
    }


def make_arms(wanted: Mapping[RunKey, Make], runtime: Runtime, pool: Pool) -> dict[RunKey, Removal]:
    """Make the models of all arms, teachers first, so that no two workers wait for one.

    Args:
        wanted: What to make, by arm and draw.
        runtime: Where stages are kept.
        pool: Worker processes.
    """
    teachers: dict[Path, ApplyMethod] = {}
    for (_, seed), make in wanted.items():
        if isinstance(make.method, Undo):
            for method in make.method.needed_makers().values():
                stage = ApplyMethod(method, make.start, make.domain, seed)
                teachers[runtime.path(stage)] = stage
    pool.map(runtime.run, list(teachers.values()))
    jobs = [ApplyMethod(m.method, m.start, m.domain, seed) for (_, seed), m in wanted.items()]
    return dict(zip(wanted, pool.map(runtime.run, jobs), strict=True))


def checkpoints(made: Mapping[RunKey, Removal]) -> dict[RunKey, Checkpoint]:
    """Return the models of removals."""
    return {key: removal.checkpoint for key, removal in made.items()}


def rails(draws: Mapping[int, Replicate], seeds: Sequence[int]) -> dict[RunKey, Checkpoint]:
    """Return original and oracle of the draws, as arms."""
    out: dict[RunKey, Checkpoint] = {}
    for seed in seeds:
        out["original", seed] = draws[seed].original
        oracle = draws[seed].oracle
        assert oracle is not None
        out["oracle", seed] = oracle
    return out


def measure_arms(
    bench: ExperimentSetting,
    models: Mapping[RunKey, Checkpoint],
    draws: Mapping[int, Replicate],
    runtime: Runtime,
    pool: Pool,
) -> RecoveryScores:
    """Relearn T with every arm and with both rails, and put the scores together.

    Args:
        bench: The attacker.
        models: By arm and draw.
        draws: Data and rails.
        runtime: Where stages are kept.
        pool: Worker processes.
    """
    seeds = tuple(dict.fromkeys(seed for _, seed in models))
    both = {**rails(draws, seeds), **models}
    attacker, length = bench.attacker, bench.pretrain.max_length
    attacked = attack_all(attacker, both, draws, runtime, pool, max_length=length)
    domains = {seed: draws[seed].domain for seed in seeds}
    exact = domains[seeds[0]].metrics[0] != "text_loss"
    return gather(attacked, domains, power=attacker.power, absolute=exact)


CHOSEN = (
    "settings of data, models and students were chosen by hand on draw 0, those of teachers on dev "
    "of draws 0, 11 and 12"
)
"""How the studies of distillation were set."""

SIZE = "0.1M parameters and tables of a few hundred facts: effects may differ in larger models"
"""What holds for every study on the bench."""


def result(
    found: RecoveryScores,
    words: Sequence[str],
    decision: str,
    draws: Mapping[int, Replicate],
    models: Mapping[RunKey, Checkpoint],
    *,
    tables: Sequence[StudyTable] = (),
    notes: Sequence[str] = (),
    chosen: str = CHOSEN,
) -> StudyResult:
    """Return what a study found; without power the decision is that there is none.

    Args:
        found: Arms and rails.
        words: Sentences between the rails and the decision.
        decision: What the statistic says.
        draws: Data and rails.
        models: By arm and draw.
        tables: Tables of the study's own, before those of the arms.
        notes: What a reader should know.
        chosen: How the settings were chosen.
    """
    held, paragraph = finish(words, found, decision)
    named = (model_ref(f"{arm}, draw {seed}", model) for (arm, seed), model in models.items())
    return StudyResult(
        tables=(*tables, arms_table(found), curves_table(found)),
        decision=held,
        paragraph=paragraph,
        domain=draws[found.seeds[0]].domain,
        models=(*(ref for seed in found.seeds for ref in draws[seed].refs()), *named),
        notes=(chosen, SIZE, *notes),
    )
