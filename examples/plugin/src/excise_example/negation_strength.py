"""How much does task negation remove as it is scaled up?"""

from __future__ import annotations

from typing import ClassVar, Literal

import excise as ex
from excise.core.stages import Runtime
from excise.domains.facts import FACTS_FIT, FACTS_MAX_LENGTH, FACTS_MODEL
from excise.evals.stats import bootstrap_difference
from excise.methods.base import ApplyMethod
from excise.models.spec import ModelSpec, Scratch
from excise.record import Item, StudyRow, StudyTable
from excise.requests.recipe import EvalSpec
from excise.run.stages import MakeModel, ScoreModel
from excise.train.pool import Pool
from excise_example.task_negation import TaskNegation


class NegationStrength(ex.Study):
    """Exact match on held-out facts after a fine-tuning on the forget facts is subtracted.

    Stated beforehand. The statistic is the original's exact match on the held-out test set minus
    the edited model's at the largest strength, paired by unit; negation removes if the lower end
    of its 95 % interval is above the margin.
    """

    question: ClassVar[str] = "Does subtracting a fine-tuning on the forget facts remove them?"
    statistic: ClassVar[str] = (
        "Exact match on the held-out test set, original minus edited at the largest strength; "
        "removed if the lower end of the 95 % interval is above the margin."
    )
    takes: ClassVar[str] = "20 seconds, 1 GiB"

    name: Literal["negation-strength"] = "negation-strength"
    """Name on the command line."""
    margin: float = 0.1
    """Exact match that must go."""
    seeds: tuple[int, ...] = (1,)
    """Replicates that are reported."""
    tuned_on: tuple[int, ...] = ()
    """Nothing is chosen."""
    domain: ex.Facts = ex.Facts(subjects=48, objects=16, relations=2)
    """The data, made anew for every seed."""
    pretrain: ex.Pretrain = ex.Pretrain(
        fit=ex.FitConfig(**{**FACTS_FIT, "steps": 60}), max_length=FACTS_MAX_LENGTH
    )
    """How the original is trained."""
    model: Scratch = Scratch(**FACTS_MODEL)
    """Its architecture."""
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Multiples of the fine-tuning that are subtracted, smallest first."""

    def run(self, runtime: Runtime, pool: Pool) -> ex.StudyResult:
        """Train, negate at every strength, score; every model and score is a stage."""
        rows: list[StudyRow] = []
        lows: list[float] = []
        for seed in self.seeds:
            spec = self.domain.model_copy(update={"seed": seed})
            domain = spec.build(ModelSpec(scratch=self.model))
            start = runtime.run(MakeModel(self.model, spec.tokenizer(), seed))
            plain = ex.Plain(pretrain=self.pretrain)
            original = runtime.run(ApplyMethod(plain, start, domain, seed)).checkpoint
            removals = [
                ApplyMethod(TaskNegation(strength=strength), original, domain, seed)
                for strength in self.strengths
            ]
            edited = [removal.checkpoint for removal in pool.map(runtime.run, removals)]
            scored = [
                runtime.run(ScoreModel(model, domain, EvalSpec())) for model in (original, *edited)
            ]
            before, *after = (known(result.items) for result in scored)
            for strength, units in zip(self.strengths, after, strict=True):
                lost = bootstrap_difference(before, units)
                rows.append(
                    StudyRow(
                        condition=f"strength {strength}",
                        seed=seed,
                        metric="exact match lost",
                        value=lost.value,
                        low=lost.low,
                        high=lost.high,
                        n=lost.n,
                    )
                )
            lows.append(lost.low)
        removes = all(low > self.margin for low in lows)
        decision = "it removes" if removes else "not shown to remove"
        table = StudyTable(title="Exact match lost on the held-out test set", rows=tuple(rows))
        return ex.StudyResult((table,), decision, f"Decision: {decision}.", domain=domain)


def known(items: tuple[Item, ...]) -> dict[str, float]:
    """Return the exact match of every held-out unit."""
    return {
        item.unit: item.value
        for item in items
        if item.set.startswith("test.") and item.metric == "exact_match"
    }
