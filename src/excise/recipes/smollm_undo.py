"""excise run smollm-undo: UNDO on knowledge that a pretrained model really has.

First: excise fetch smollm2-135m. One WordNet topic is suppressed in SmolLM2-135M, a twentieth of
every weight is shrunk away (no noise, as UNDO's setting for pretrained models has it), and the rest
is distilled from the suppressed model on the mix. There is no oracle: the record says how much came
back, not whether it is as if never learned. On two cores this is a smoke test of the path: 60 steps
repair no more damage than that. With an accelerator give the student more of both
(`--arms.undo.alpha 0.25 --arms.undo.fit.steps 3000`).
"""

from __future__ import annotations

from excise.domains.glosses import Glosses
from excise.methods import MaxEnt, Undo
from excise.recipes.smollm import MODEL, smollm_audit
from excise.requests.recipe import EvalSpec, Recipe
from excise.train.fit import FitConfig

LENGTH = 48
"""Tokens of a definition in a plain wording, at most."""


def teacher() -> MaxEnt:
    """Return what suppresses the topic."""
    return MaxEnt(fit=FitConfig(steps=40, lr=5e-5, batch_size=8, clip=1.0), max_length=LENGTH)


def recipe() -> Recipe:
    """Return the recipe."""
    distil = FitConfig(steps=60, lr=1e-4, batch_size=8, warmup=5, schedule="cosine", clip=1.0)
    return Recipe(
        name="smollm-undo",
        title="Words for the body out of SmolLM2-135M: suppressed alone, and with UNDO",
        takes="35 minutes, 5 GiB, after fetching smollm2-135m",
        domain=Glosses(),
        model=MODEL,
        arms={
            "unlearn_only": teacher(),
            "undo": Undo(unlearn=teacher(), alpha=0.05, beta=0.0, fit=distil, max_length=LENGTH),
        },
        audit=smollm_audit(test_rows=48, other_rows=16, steps=16, benign_rate=3e-4),
        evaluate=EvalSpec(max_rows=120, max_length=96),
        dtype="bfloat16",
    )
