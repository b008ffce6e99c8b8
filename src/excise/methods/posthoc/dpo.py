"""DPO: prefer the wrong options of a question to the right one.

for each question to forget: a pair (another option, the right option) for every other option
run DPO on the pairs (`preference`)
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain, Row
from excise.methods.base import Paper, Removal
from excise.methods.posthoc.preference import Preference, prefer
from excise.methods.tuning import forget_rows
from excise.models.checkpoint import Checkpoint


class DPO(Preference):
    """Prefer the other options of a question to the right one, by DPO; + alpha NLL(retain)."""

    name: Literal["dpo"] = "dpo"

    needs: ClassVar[tuple[str, ...]] = ("forget (questions with options)", "retain")
    paper: ClassVar[Paper] = Paper(
        "Direct preference optimization: your language model is secretly a reward model",
        "arXiv:2305.18290",
        "-2/beta E log sigmoid(beta (log w/w0 - log l/l0)), 2/beta as in TOFU, + NLL(retain)",
        "locuslab/open-unlearning@d3d7cf9 (MIT)",
        {
            "beta": "configs/trainer/DPO.yaml: 0.1 (the class says 1.0)",
            "gamma": "configs/trainer/DPO.yaml: 1.0",
            "alpha": "configs/trainer/DPO.yaml: 1.0",
            "fit": "configs/experiment/unlearn/tofu/idk.yaml and configs/trainer/finetune.yaml: lr "
            "1e-5, weight decay 0.01, 10 epochs of 32 pairs (125 steps on the 400 of forget10), "
            "warm-up of one epoch, then linear; clipping at 1 is the default of its Trainer",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove the right answers of `domain.forget` by preferring the wrong ones."""
        domain, quality = self.given(domain, ctx)
        pairs: list[tuple[Row, Row]] = []
        for row in forget_rows(domain):
            if len(row.choices) < 2:
                text = row.kind == "text"
                other = "npo, which needs none" if text else "idk_dpo or altpo, which make one"
                raise UserError(
                    f"unit '{row.unit}' has no second answer, and dpo prefers the wrong options of "
                    "a question to the right one; give rows with 'question', 'choices' and "
                    f"'answer', or use {other}"
                )
            others = [i for i in range(len(row.choices)) if i != row.answer]
            pairs += [(replace(row, answer=i), row) for i in others]
        return prefer(self, start, domain, pairs, ctx, extras=quality)
