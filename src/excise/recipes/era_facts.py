"""excise run era-facts: made-up facts, Expand-Route-Ablate against filtering.

Objects are shared between facts that stay and facts that go, so that no token is typical of
either: labelled rows are routed wholly instead of by token.
"""

from __future__ import annotations

from excise.methods import ERA
from excise.methods.pretraining.era import Expand
from excise.methods.pretraining.routed.coherence import Coherence
from excise.recipes.routed_facts import routed_facts
from excise.requests.recipe import Recipe
from excise.train.fit import FitConfig


def recipe() -> Recipe:
    """Return the recipe."""
    light = Coherence(fit=FitConfig(steps=20, lr=5e-4, batch_size=64), check_rows=256)
    expand = Expand(width=0.125, depth=1.0, tokens=None, coherence=light)
    return routed_facts(
        "era-facts",
        "Made-up facts routed into neurons that are deleted (ERA), against filtering",
        ERA(expand=expand),
        takes="3 to 4 minutes, 1 GiB",
    )
