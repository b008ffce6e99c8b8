"""excise run sgtm-facts: made-up facts, SGTM against filtering, with all and half of the labels.

Expected: with all labels both hold; with half of them filtering leaves every fact in the model.
"""

from __future__ import annotations

from excise.methods import SGTM
from excise.recipes.base import Recipe
from excise.recipes.routed_facts import routed_facts


def recipe() -> Recipe:
    """Return the recipe."""
    return routed_facts(
        "sgtm-facts",
        "Made-up facts routed into neurons that are emptied (SGTM), against filtering",
        SGTM(),
        takes="4 to 6 minutes, 1 GiB",
    )
