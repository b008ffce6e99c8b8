"""excise run sgtm-facts: made-up facts, SGTM against filtering, with all and half of the labels.

Labels spread over the rows of a unit, core rows run without the modules, half of the labelled rows
are left out, and half of the others are pushed out of the core (chosen by `partial-labels`).
Expected: with all labels both hold; with half of them filtering leaves every fact in the model.
"""

from __future__ import annotations

from excise.methods import SGTM
from excise.methods.pretraining.routing.modules import Module
from excise.recipes.base import Recipe
from excise.recipes.routed_facts import routed_facts


def recipe() -> Recipe:
    """Return the recipe."""
    return routed_facts(
        "sgtm-facts",
        "Made-up facts routed into neurons that are deleted (SGTM), against filtering",
        SGTM(
            module=Module(width=0.5, grow=True),
            ablate="delete",
            joint=(),
            p_off=1.0,
            p_push=0.5,
            read=0.5,
        ),
        takes="3 to 4 minutes, 1 GiB",
        spread=True,
    )
