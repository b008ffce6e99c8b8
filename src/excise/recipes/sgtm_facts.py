"""excise run sgtm-facts: made-up facts, SGTM against filtering, with all and half of the labels.

Core rows run without the modules, half of the labelled rows are left out, and half of the others
are pushed out of the core. With half of the labels these first spread over the rows of a unit, and
a probe labels the rest (settings chosen by `partial-labels`); the same labels before filtering
stand beside it. Expected: with all labels both hold; with half of them filtering leaves every fact
in the model.
"""

from __future__ import annotations

from excise.methods import SGTM, Propagate, Relabel
from excise.methods.pretraining.routed.modules import Module
from excise.recipes.routed_facts import HALF, routed_facts
from excise.requests.recipe import Recipe


def recipe() -> Recipe:
    """Return the recipe."""
    routed = SGTM(
        module=Module(width=0.5, grow=True),
        ablate="delete",
        joint=(),
        p_off=1.0,
        p_push=0.5,
        read=0.5,
    )
    probe = Relabel(fold_by="row", spread="unit")
    return routed_facts(
        "sgtm-facts",
        "Made-up facts routed into neurons that are deleted (SGTM), against filtering",
        routed,
        takes="4 to 5 minutes, 1 GiB",
        half=probe.model_copy(update={"clear": 1.0, "then": routed}),
        beside={
            "propagate_50": Propagate(labels=HALF),
            "relabel_50": probe.model_copy(update={"labels": HALF}),
        },
    )
