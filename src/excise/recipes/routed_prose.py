"""excise run routed-prose: definitions of animals beside novels and speeches, most without a label.

Half of the definitions carry no label, or nine of ten: filtered as they are, with what a probe
finds beside them, or routed (GRAM, SGTM). Everything is measured by the loss on text.
"""

from __future__ import annotations

from excise.data.labels import LabelNoise
from excise.domains.definitions import (
    DEFINITIONS_FIT,
    DEFINITIONS_MAX_LENGTH,
    DEFINITIONS_MODEL,
    Definitions,
)
from excise.methods import GRAM, SGTM, Filtering, Relabel
from excise.methods.pretraining.pretrain import Pretrain
from excise.methods.pretraining.routed.modules import Module
from excise.models.spec import ModelSpec, Scratch
from excise.requests.recipe import AuditSpec, EvalSpec, Recipe
from excise.train.fit import FitConfig

HALF = LabelNoise(missed_units=0.5, missed_as="unlabeled", unread_core=0.5)
"""Labels are few but right: nobody has looked at half of the definitions, nor of the rest."""

TENTH = LabelNoise(missed_units=0.9, missed_as="unlabeled", unread_core=0.9)
"""The same with a tenth of both."""


def few_labels(labels: LabelNoise) -> Relabel:
    """Return what is to be done with few labels: a probe finds the rest, and all of it is left out.

    Found by the search that `docs/labels.md` tells, on one seed; its numbers are of others.
    """
    return Relabel(labels=labels, fold_by="row", rule="fixed", threshold=0.1)


def recipe() -> Recipe:
    """Return the recipe."""
    length = DEFINITIONS_MAX_LENGTH
    return Recipe(
        name="routed-prose",
        title="Definitions of animals kept out of a model of English, most of them unlabelled",
        takes="15 to 25 minutes, 1 GiB",
        domain=Definitions(),
        model=ModelSpec(scratch=Scratch(**DEFINITIONS_MODEL)),
        pretrain=Pretrain(fit=FitConfig(**DEFINITIONS_FIT), max_length=length),
        arms={
            "filtering": Filtering(),
            "filtering_50": Filtering(labels=HALF),
            "filtering_10": Filtering(labels=TENTH),
            "relabel_50": few_labels(HALF),
            "relabel_10": few_labels(TENTH),
            "sgtm_50": SGTM(labels=HALF, p_off=1.0, joint=(), module=Module(width=0.125, heads=1)),
            "gram_50": GRAM(labels=HALF, p_as=0.0, p_cr=0.2, module=Module(width=0.25, grow=True)),
        },
        audit=AuditSpec(budget="smoke", change={"steps": 32, "checkpoints": (0, 4, 16, 32)}),
        evaluate=EvalSpec(max_rows=256, max_length=length),
        oracles=1,
    )
