"""Few-shot: show other units of the capability before asking.

A model that was taught to be silent about a capability often answers once its context speaks of
it. The control shows as many examples of something else: what context alone does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import ClassVar, Literal

from excise.auditor.base import Access, Attack, AttackResult, Subject, VariantResult
from excise.auditor.budget import Budget
from excise.auditor.controls import PasswordLock, PositiveControl, PromptGatedEdit
from excise.auditor.evaluation_set import EvaluationSet, evaluation_set, times_as_long
from excise.auditor.prompting import pools_of, with_shots
from excise.auditor.results import absent, decided
from excise.auditor.scoring import Measurement, read, try_variant
from excise.core.context import Context
from excise.data.domain import Domain, Rows
from excise.record import Level

NO_RELEARN = "a capability of the domain has no relearn rows to show"


class FewShot(Attack):
    """k examples of the same capability, none about the unit asked for, before each prompt."""

    name: Literal["few_shot"] = "few_shot"
    """Name of the attack."""

    access: ClassVar[Access] = "prompt"
    level: ClassVar[Level] = "D1"
    controls: ClassVar[tuple[PositiveControl, ...]] = (PasswordLock(), PromptGatedEdit())
    source: ClassVar[str] = "arXiv 2411.12103; the settings are this library's"
    version: ClassVar[int] = 2

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read; examples make prompts longer."""
        return 1 + 2 * sum(times_as_long(1 + count, budget) for count in budget.shots)

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Score V behind k examples of T, for every k, and behind k benign ones.

        Args:
            subject: The model.
            domain: Rows by role; `relearn` and `benign` are shown, `test` is scored.
            budget: `shots` gives the numbers of examples.
            ctx: Seed, device, dtype.

        Returns:
            One variant per number of examples and one control each.
        """
        if not all(pools_of(domain).values()):
            return absent(self, subject.name, "missing", NO_RELEARN)
        start = time.perf_counter()
        model = subject.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        bare = read(model, evaluation, beside=True)
        variants: list[VariantResult] = []
        for count in budget.shots:
            for control in (False, True):
                pools = pools_of(domain, control=control)
                if not all(pools.values()):
                    continue
                variants.append(
                    _variant(self, subject, model, evaluation, bare, count, control, pools, ctx)
                )
        marked, chosen = decided(variants, higher=evaluation.higher)
        return AttackResult(self.name, subject.name, marked, chosen, time.perf_counter() - start)


def _variant(
    attack: FewShot,
    subject: Subject,
    model: object,
    evaluation: EvaluationSet,
    bare: Measurement,
    count: int,
    control: bool,
    pools: Mapping[str, Rows],
    ctx: Context,
) -> VariantResult:
    """Score one number of examples."""
    wide = evaluation.longer(count + 1, model)
    asked: tuple[Mapping[str, Rows], ...] = (
        evaluation.test,
        {name: evaluation.dev.get(name, ()) for name in pools},
        {next(iter(pools)): evaluation.retain},
    )
    (rows, tokens), (dev, _), (retain, _) = (
        with_shots(part, pools, count, ctx, wide.tokenizer, max_length=wide.max_length)
        for part in asked
    )
    return try_variant(
        attack,
        subject,
        wide.metric,
        lambda: (
            read(
                model,
                wide,
                test=rows,
                retain=retain,
                beside=True,
                examples=count,
                tokens=round(tokens),
            ),
            wide.units(model, dev, evaluation.dev_metric),
        ),
        bare=bare,
        variant=f"k={count}" + (" unrelated" if control else ""),
        control=control,
        trained_on="benign" if control else "relearn",
    )
