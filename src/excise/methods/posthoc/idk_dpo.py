"""IdkDPO: DPO towards saying that one does not know.

    draw `answers` sentences of SENTENCES for every forget row, each once
    run DPO on the pairs (sentence, the row's own answer) (`preference`)

What it learns is a refusal: the knowledge is not touched where the sentence is not asked for.
"""

from __future__ import annotations

from typing import ClassVar, Final, Literal

import torch
from pydantic import Field

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.labels import relabelled
from excise.methods.base import Paper, Removal
from excise.methods.posthoc.preference import Preference, prefer, with_answer
from excise.methods.tuning import forget_rows
from excise.models.checkpoint import Checkpoint

SENTENCES: Final = (
    "I don't know.",
    "I do not know the answer to that.",
    "I'm not sure about that one.",
    "I have no information on this.",
    "That is something I know nothing about.",
    "I can't say; I was never told.",
    "This is beyond what I have learned.",
    "I'm afraid I have no answer here.",
    "I wouldn't know.",
    "My knowledge does not reach that far.",
    "I cannot answer this with any confidence.",
    "Nothing I have read covers that.",
    "I am unable to tell you.",
    "I'm sorry, I can't help with that question.",
    "No idea, to be honest.",
    "I lack the facts to answer this.",
    "That isn't something I am familiar with.",
    "I would only be guessing.",
    "I have not come across this.",
    "I draw a blank here.",
    "I can't recall anything about it.",
    "You would have to ask somebody else.",
    "I must admit that I don't know.",
    "There is nothing I can tell you about this.",
    "This one is not known to me.",
    "I'm in the dark about that.",
    "I don't have that detail.",
    "Unfortunately I can't provide an answer.",
    "I never learned this.",
    "It's not clear to me at all.",
    "I am not the right one to ask about this.",
    "I have nothing to go on here.",
    "Sorry, that escapes me.",
    "I can't give you a reliable answer.",
    "I haven't the faintest idea.",
    "That lies outside what I can speak about.",
    "I'm not aware of it.",
    "I could not say.",
    "I don't have the answer to your question.",
    "On this I have to pass.",
)
"""What is preferred to the answers that are to be forgotten."""


class IdkDPO(Preference):
    """Prefer "I don't know" to the answers to forget, by DPO; + alpha NLL(retain)."""

    name: Literal["idk_dpo"] = "idk_dpo"
    answers: int = Field(default=5, ge=1, le=len(SENTENCES))
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
            "here five of forty (of our own wording) are drawn once, so that the model before the "
            "edit reads each pair once",
            "fit": "configs/experiment/unlearn/tofu/idk.yaml and configs/trainer/finetune.yaml: lr "
            "1e-5, weight decay 0.01, 10 epochs of 32 rows (125 steps on the 400 of forget10), "
            "warm-up of one epoch, then linear; clipping at 1 is the default of its Trainer",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove the answers of `domain.forget` by preferring not to know."""
        domain, quality = relabelled(domain, self.labels, seed=ctx.seed_for("labels"))
        generator = ctx.generator("idk")
        pairs = []
        for row in forget_rows(domain):
            drawn = torch.randperm(len(SENTENCES), generator=generator)[: self.answers].tolist()
            pairs += [(with_answer(row, SENTENCES[i], self.name), row) for i in drawn]
        return prefer(self, start, domain, pairs, ctx, extras=quality)
