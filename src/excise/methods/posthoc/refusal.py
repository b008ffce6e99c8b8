"""Refusal training: teach the model to decline, and to go on answering what is not to be forgotten.

    for every forget prompt:  y = one of the refusals, drawn once
    for every retain prompt:  y = its own answer
    minimise NLL(y_f | forget prompt) + alpha NLL(y_r | retain prompt)

Half of what is called unlearning is this, and the model still knows: it is a baseline. Both roles
are prompts, so that what is learned is when to decline and not that prompts are declined. Rows of
plain text have no prompt and are left out.

Source:
    arXiv:2401.06121 (TOFU), section 3.2, L = L(retain) + L(forget with "I don't know").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from excise.core.context import Context
from excise.core.disk import expand
from excise.core.errors import UserError
from excise.core.keys import FilePath
from excise.data.domain import Domain, Rows
from excise.data.stream import Tokenizer
from excise.losses import nll
from excise.methods.base import Paper, Removal
from excise.methods.posthoc.answers import REFUSALS, with_answer
from excise.methods.tuning import TuningMethod, forget_rows, tune
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig


class Refusal(TuningMethod):
    """Fine-tune on refusals of forget prompts and on the answers of retain prompts."""

    name: Literal["refusal"] = "refusal"
    alpha: float = 1.0
    """Weight of the retain loss."""
    sentences: FilePath = ""
    """File of refusals of one's own, one a line; empty for a list that ships."""
    fit: FitConfig = FitConfig(steps=100, lr=1e-5, batch_size=32, weight_decay=0.01)
    """Steps, rows per step of each role, learning rate."""

    paper: ClassVar[Paper] = Paper(
        "TOFU: a task of fictitious unlearning for LLMs",
        "arXiv:2401.06121",
        "section 3.2, L = L(S_R) + L(S_F with 'I don't know')",
        "locuslab/tofu@8c49eee (MIT)",
        {
            "alpha": "dataloader.py, 'idk': both are in one mean over all tokens, where each role "
            "has a mean of its own here",
            "sentences": "data/idontknow.jsonl holds others; ours were written for this",
            "fit": "config/forget.yaml: lr 1e-5, weight decay 0.01, 5 epochs, which are steps "
            "here; README.md: 2 x 4 rows, 4 accumulated",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Teach the model to decline the prompts of `domain.forget`."""
        domain, quality = self.given(domain, ctx)
        refusals, tokenizer = read_refusals(self.sentences), start.tokenizer()
        forget, retain = forget_rows(domain), domain.retain
        asked = with_prompts(forget, "forget", domain)
        answered = with_prompts(retain, "retain", domain)
        left_out = len(forget) - len(asked) + len(retain) - len(answered)
        if left_out:
            ctx.emit("note", {"text": f"refusal leaves out {left_out} rows that have no prompt"})
        unknown = sum(_is_unknown(text, tokenizer) for text in refusals)
        if unknown:
            text = f"the tokenizer knows no word of {unknown} of {len(refusals)} refusals"
            ctx.emit("warning", {"text": f"{text}, which teach unknown tokens; give --sentences"})
        generator = ctx.generator("refusals")
        drawn = torch.randint(len(refusals), (len(asked),), generator=generator).tolist()
        declined = [
            with_answer(row, refusals[i], self.name) for row, i in zip(asked, drawn, strict=True)
        ]
        matched = replace(domain, forget={"forget": tuple(declined)}, retain=answered)
        terms = {"forget": (1.0, nll), "retain": (self.alpha, nll)}
        given = self.model_copy(update={"labels": None})  # they are in force already
        removal = tune(given, start, matched, terms, ctx)
        facts = {**quality, "refusals": len(refusals), "rows_left_out": left_out}
        return replace(removal, extras={**removal.extras, **facts})


def read_refusals(path: str) -> tuple[str, ...]:
    """Return the refusals of a file, one a line; without one, those that ship.

    Raises:
        UserError: If the file cannot be read or holds none.
    """
    if not path:
        return REFUSALS
    try:
        text = expand(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"refusal: 'sentences' {path} cannot be read; give a text file in UTF-8 with one "
            "refusal a line"
        ) from None
    lines = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not lines:
        raise UserError(f"refusal: 'sentences' {path} is empty; write one refusal a line")
    return lines


def with_prompts(rows: Rows, role: str, domain: Domain) -> Rows:
    """Return the rows that ask something: completions with a prompt, questions, conversations.

    Args:
        rows: Rows of any shape.
        role: What they are, for the message.
        domain: Where they are from, for the message.

    Raises:
        UserError: If there is none.
    """
    asking = tuple(row for row in rows if row.kind == "chat" or row.prompt.strip())
    if not asking:
        raise UserError(
            f"refusal: no {role} row of domain '{domain.name}' has a prompt that could be declined "
            "or answered; give rows with 'prompt' and 'completion', or use a method for text such "
            "as grad_diff"
        )
    return asking


def _is_unknown(text: str, tokenizer: Tokenizer) -> bool:
    """Return whether a text is nothing but unknown tokens."""
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return set(ids) <= {tokenizer.unk_token_id}
