"""What the recipes of routed facts share: data, schedule, and filtering on the same labels."""

from __future__ import annotations

from collections.abc import Mapping

from excise.data.labels import LabelNoise
from excise.domains.facts import FACTS_FIT, FACTS_MAX_LENGTH, FACTS_MODEL, Facts
from excise.methods import Filtering
from excise.methods.base import Method
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.spec import ModelSpec, Scratch
from excise.requests.recipe import AuditSpec, EvalSpec, Recipe
from excise.train.fit import FitConfig

HALF = LabelNoise(missed_occurrences=0.5, missed_as="unlabeled", unread_core=0.5)
"""Labels are few but right: nobody has looked at half of the rows, of either kind."""


def routed_facts(
    name: str,
    title: str,
    method: Method,
    *,
    takes: str,
    half: Method | None = None,
    beside: Mapping[str, Method] | None = None,
) -> Recipe:
    """Return a recipe that compares a method with filtering, at all labels and at half of them.

    Args:
        name: Of the recipe.
        title: One line for the report.
        method: A method from scratch with a field `labels`.
        takes: Expected time and memory.
        half: What stands for it at half of the labels; the same when missing.
        beside: Further methods by name, between filtering and the method.
    """
    short = str(getattr(method, "name", name))
    return Recipe(
        name=name,
        title=title,
        takes=takes,
        # Groups of a test are subjects: with two facts each 36 are tested, and an audit can decide.
        domain=Facts(subjects=252, relations=2, objects=32, forget_share=0.34),
        model=ModelSpec(scratch=Scratch(**FACTS_MODEL)),
        pretrain=Pretrain(
            fit=FitConfig(**{**FACTS_FIT, "steps": 400, "batch_size": 96, "micro_size": 24}),
            max_length=FACTS_MAX_LENGTH,
            pack=(1, 1, 2, 4),
        ),
        arms={
            "filtering": Filtering(),
            "filtering_50": Filtering(labels=HALF),
            **(beside or {}),
            short: method,
            f"{short}_50": (half or method).model_copy(update={"labels": HALF}),
        },
        audit=AuditSpec(budget="smoke"),
        evaluate=EvalSpec(max_length=FACTS_MAX_LENGTH),
        oracles=2,
    )
