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
from excise.evals.replicates import Decision
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
from excise_studies.base import Replicate, identical, said_identical, train_replicates
from excise_studies.recovery import RecoveryScores, curves_table, finish, gather, recovery_table

APART = 2000
"""A further initialisation starts from the seed plus this."""

LENGTH = ARITHMETIC_MAX_LENGTH


class ExperimentSetting(Config):
    """Data, models and attacker: 0.1M parameters and small tables, seconds a model.

    Settings were chosen by hand on seed 0.
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
    """Who relearns."""


# -- models ----------------------------------------------------------------------------------------


def make_replicates(
    experiment: ExperimentSetting, seeds: Sequence[int], runtime: Runtime, pool: Pool
) -> dict[int, Replicate]:
    """Train original and oracle of every seed."""
    domains: dict[int, tuple[Domain, Any]] = {}
    for seed in dict.fromkeys(seeds):
        reseeded = "seed" in type(experiment.domain).model_fields
        spec = (
            experiment.domain.model_copy(update={"seed": seed}) if reseeded else experiment.domain
        )
        domains[seed] = (spec.build(None), spec.tokenizer())
    return train_replicates(domains, experiment.model, experiment.pretrain, runtime, pool)


def make_inits(
    experiment: ExperimentSetting,
    replicates: Mapping[int, Replicate],
    runtime: Runtime,
    pool: Pool,
    apart: int = APART,
) -> dict[int, Checkpoint]:
    """Return a further random model of every seed, of seed plus `apart`."""
    jobs = [
        MakeModel(experiment.model, replicate.original.tokenizer(), seed + apart)
        for seed, replicate in replicates.items()
    ]
    return dict(zip(replicates, pool.map(runtime.run, jobs), strict=True))


@dataclass(frozen=True)
class Make:
    """One condition at one seed: a method and what it is given.

    Attributes:
        method: The method; the teacher of an `Undo` is a stage that students share.
        start: The model it starts from.
        domain: The data as the method sees it.
    """

    method: Method
    start: Checkpoint
    domain: Domain


def conditions_of(
    methods: Mapping[str, Method], replicates: Mapping[int, Replicate], seeds: Sequence[int]
) -> dict[RunKey, Make]:
    """Return every method on the original of every seed, with the data as it is."""
    return {
        (name, seed): Make(method, replicates[seed].original, replicates[seed].domain)
        for name, method in methods.items()
        for seed in seeds
    }


def make_conditions(
    wanted: Mapping[RunKey, Make], runtime: Runtime, pool: Pool
) -> dict[RunKey, Removal]:
    """Make the models of all conditions, teachers first, so that no two workers wait for one.

    Args:
        wanted: What to make, by condition and seed.
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


def checkpoints(removals: Mapping[RunKey, Removal]) -> dict[RunKey, Checkpoint]:
    """Return the models of removals."""
    return {key: removal.checkpoint for key, removal in removals.items()}


def reference_models(
    replicates: Mapping[int, Replicate], seeds: Sequence[int]
) -> dict[RunKey, Checkpoint]:
    """Return original and oracle of every seed, as conditions."""
    out: dict[RunKey, Checkpoint] = {}
    for seed in seeds:
        out["original", seed] = replicates[seed].original
        oracle = replicates[seed].oracle
        assert oracle is not None
        out["oracle", seed] = oracle
    return out


def measure_conditions(
    experiment: ExperimentSetting,
    models: Mapping[RunKey, Checkpoint],
    replicates: Mapping[int, Replicate],
    runtime: Runtime,
    pool: Pool,
) -> RecoveryScores:
    """Relearn with every condition and with both reference models, and put the scores together.

    Args:
        experiment: The attacker.
        models: By condition and seed.
        replicates: Data and reference models.
        runtime: Where stages are kept.
        pool: Worker processes.
    """
    seeds = tuple(dict.fromkeys(seed for _, seed in models))
    both = {**reference_models(replicates, seeds), **models}
    attacker, length = experiment.attacker, experiment.pretrain.max_length
    attacked = attack_all(attacker, both, replicates, runtime, pool, max_length=length)
    domains = {seed: replicates[seed].domain for seed in seeds}
    exact = domains[seeds[0]].metrics[0] != "text_loss"
    return gather(attacked, domains, power=attacker.power, absolute=exact)


CHOSEN = (
    "settings of data, models and students were chosen by hand on seed 0, those of teachers on dev "
    "of seeds 0, 11 and 12"
)
"""How the studies of distillation were set."""

SIZE = "0.1M parameters and tables of a few hundred facts: effects may differ in larger models"
"""What holds for every study at this size."""


def result(
    recovery: RecoveryScores,
    words: Sequence[str],
    decision: Decision,
    replicates: Mapping[int, Replicate],
    models: Mapping[RunKey, Checkpoint],
    *,
    tables: Sequence[StudyTable] = (),
    notes: Sequence[str] = (),
    chosen: str = CHOSEN,
) -> StudyResult:
    """Return what a study found; without power the decision is that there is none.

    Args:
        recovery: Conditions and reference models.
        words: Sentences between the reference models and the decision.
        decision: What the statistic says.
        replicates: Data and reference models.
        models: By condition and seed.
        tables: Tables of the study's own, before those of the conditions.
        notes: What a reader should know.
        chosen: How the settings were chosen.
    """
    same = said_identical(identical(models))
    stated, paragraph = finish([*words, same], recovery, decision)
    table = recovery_table(recovery)
    table = table.model_copy(update={"note": f"{table.note} {same}".strip()})
    named = (
        model_ref(f"{condition}, seed {seed}", model) for (condition, seed), model in models.items()
    )
    return StudyResult(
        tables=(*tables, table, curves_table(recovery)),
        decision=stated.text,
        contrasts=stated.contrasts,
        paragraph=paragraph,
        domain=replicates[recovery.seeds[0]].domain,
        models=(*(ref for seed in recovery.seeds for ref in replicates[seed].refs()), *named),
        notes=(chosen, SIZE, *notes),
    )
