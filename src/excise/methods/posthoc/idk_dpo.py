"""IdkDPO: DPO towards saying that one does not know.

    draw `answers` sentences of REFUSALS for every forget row, each once
    run DPO on the pairs (sentence, the row's own answer) (`preference`)

What it learns is a refusal: the knowledge is not touched where the sentence is not asked for.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from excise.core.context import Context
from excise.data.domain import Domain
from excise.methods.base import Paper, Removal
from excise.methods.posthoc.answers import REFUSALS, with_answer
from excise.methods.posthoc.preference import Preference, prefer
from excise.methods.tuning import forget_rows
from excise.models.checkpoint import Checkpoint


class IdkDPO(Preference):
    """Prefer "I don't know" to the answers to forget, by DPO; + alpha NLL(retain)."""

    name: Literal["idk_dpo"] = "idk_dpo"
    answers: int = Field(default=5, ge=1, le=len(REFUSALS))
    """Sentences drawn for each row, so many pairs it makes."""

    needs: ClassVar[tuple[str, ...]] = ("forget (prompts and answers)", "retain")
    paper: ClassVar[Paper] = Paper(
        "TOFU: a task of fictitious unlearning for LLMs (preference optimization)",
        "arXiv:2401.06121",
        "IDK+RT with the DPO loss: -2/beta E log sigmoid(beta (log w/w0 - log l/l0)) + NLL(retain)",
        "locuslab/open-unlearning@d3d7cf9 (MIT)",
        {
            "beta": "configs/trainer/DPO.yaml: 0.1",
            "gamma": "configs/trainer/DPO.yaml: 1.0",
            "alpha": "configs/trainer/DPO.yaml: 1.0",
            "answers": "src/data/qa.py draws one of 100 sentences anew whenever a row is read; "
            "here five of thirty-two (our own, those of `refusal`) are drawn once, so that the "
            "model before the edit reads each pair once",
            "fit": "configs/experiment/unlearn/tofu/idk.yaml and configs/trainer/finetune.yaml: lr "
            "1e-5, weight decay 0.01, 10 epochs of 32 rows (125 steps on the 400 of forget10), "
            "warm-up of one epoch, then linear; clipping at 1 is the default of its Trainer",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove the answers of `domain.forget` by preferring not to know."""
        domain, quality = self.given(domain, ctx)
        generator = ctx.generator("idk")
        pairs = []
        for row in forget_rows(domain):
            drawn = torch.randperm(len(REFUSALS), generator=generator)[: self.answers].tolist()
            pairs += [(with_answer(row, REFUSALS[i], self.name), row) for i in drawn]
        return prefer(self, start, domain, pairs, ctx, extras=quality)
