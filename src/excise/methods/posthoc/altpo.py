"""AltPO: DPO towards plausible other answers that the model makes up itself.

for each forget row (prompt x, answer y), `answers` times, once
y' <- sample(model, "question x, answer y: write another one")
run DPO on the pairs (y', y) (`preference`)
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from jinja2 import TemplateError
from pydantic import Field

from excise.core.context import Context, Stage
from excise.core.disk import write_text
from excise.core.errors import UserError
from excise.data.chat import apply_template
from excise.data.domain import Domain, Row, Rows
from excise.data.encoding import cut_head, with_specials
from excise.data.stream import Tokenizer
from excise.methods.base import Cost, Paper, Removal
from excise.methods.distillation.sampling import sample
from excise.methods.posthoc.answers import question_of, with_answer
from excise.methods.posthoc.preference import Preference, prefer
from excise.methods.tuning import forget_rows
from excise.models.checkpoint import Checkpoint
from excise.models.limits import position_limit
from excise.train.distributed import barrier, gather
from excise.train.fit import FitConfig

ASK: Final = (
    "Question: {prompt}\nAnswer: {answer}\nNow make up another answer to this question: as "
    "plausible and of the same kind, but with every fact of the answer above changed."
)
"""What the model is asked for; `{prompt}` and `{answer}` are those of the row."""
LEAD: Final = "Other answer:"
"""What stands before its answer."""
STOPS: Final = ("Question:", "Q:", "\n\n")
"""What ends it, beside the end token."""
FILE = "alternatives.json"


class AltPO(Preference):
    """Prefer other answers that the model makes up to those to forget, by DPO; + alpha NLL."""

    name: Literal["altpo"] = "altpo"
    answers: int = Field(default=5, ge=1)
    """Other answers sampled for each row, so many pairs it makes at most."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the samples."""
    new_tokens: int = Field(default=200, ge=1)
    """Tokens of a sampled answer at most."""
    ask: str = ASK
    """What the model is asked for; `{prompt}` and `{answer}` are those of the row."""
    fit: FitConfig = FitConfig(
        steps=125, lr=5e-5, batch_size=32, warmup=12, schedule="linear", weight_decay=0.01, clip=1.0
    )
    """Steps, pairs and retain rows per step, learning rate."""

    needs: ClassVar[tuple[str, ...]] = ("forget (prompts and answers)", "retain")
    paper: ClassVar[Paper] = Paper(
        "Alternate preference optimization for unlearning factual knowledge in large language "
        "models",
        "arXiv:2409.13474",
        "section 3: DPO on alternate answers + NLL on retain",
        "molereddy/Alternate-Preference-Optimization@c9b78bd (no licence); a copy is "
        "locuslab/open-unlearning@d3d7cf9 (MIT), community/methods/AltPO",
        {
            "beta": "README.md: 0.1 (searched over 0.05, 0.1, 0.5)",
            "gamma": "dataloader.py: the loss on pairs has no factor",
            "alpha": "README.md: retain_wt 1 (searched over 1, 2, 5)",
            "answers": "config/generate.yaml: repeats 5",
            "temperature": "config/generate.yaml: 1.0",
            "new_tokens": "config/generate.yaml: max_new_tokens 200",
            "ask": "generate.py asks in Llama's own marks; here in our words, through the "
            "tokenizer's chat template where it has one",
            "fit": "README.md: lr 5e-5, 2 epochs over five pairs a row (125 steps of 32 on the 400 "
            "rows of forget10; there of 35); config/unlearn_llama2.yaml: weight decay 0.01; "
            "warm-up, decay and clipping as for npo",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove the answers of `domain.forget` by preferring made-up ones."""
        domain, quality = self.given(domain, ctx)
        rows = forget_rows(domain)
        for row in rows:
            with_answer(row, "", self.name)  # refuses plain text before anything is sampled
        began = time.monotonic()
        made = ctx.run(
            SampleAlternatives(
                start, rows, self.answers, self.ask, self.new_tokens, self.temperature,
                ctx.seed_for("alternatives"),
            )
        )  # fmt: skip
        pairs = [
            (with_answer(row, text, self.name), row)
            for row, texts in zip(rows, made.texts, strict=True)
            for text in texts
        ]
        if not pairs:
            raise UserError(
                f"altpo: model {start.path} made up no other answer to any forget row; change "
                "'ask', or use idk_dpo, which needs none of the model"
            )
        cost = Cost(tokens=made.tokens, flops=2.0 * start.num_parameters * made.tokens)
        return prefer(
            self, start, domain, pairs, ctx,
            before=replace(cost, seconds=time.monotonic() - began),
            extras={**quality, "rows_without_alternative": sum(not t for t in made.texts)},
        )  # fmt: skip


@dataclass(frozen=True)
class Alternatives:
    """What a model made up.

    Attributes:
        texts: Other answers by row, none empty, none the row's own.
        tokens: Tokens read and sampled.
    """

    texts: tuple[tuple[str, ...], ...]
    tokens: int


@dataclass(frozen=True)
class SampleAlternatives(Stage[Alternatives]):
    """Other answers that a model makes up; each is a function of a seed of its own.

    Attributes:
        model: The model.
        rows: Rows with a prompt and an answer.
        answers: Samples for each.
        ask: What the model is asked for.
        new_tokens: Tokens of a sample at most.
        temperature: Of the samples.
        seed: Seed of all samples.
    """

    data_parallel: ClassVar[bool] = True

    model: Checkpoint
    rows: Rows
    answers: int
    ask: str
    new_tokens: int
    temperature: float
    seed: int

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "alternatives"

    def make(self, ctx: Context) -> None:
        """Ask for every row, each process its share."""
        tokenizer = self.model.tokenizer()
        model: Any = self.model.load(dtype=ctx.dtype, device=ctx.device)
        limit = position_limit(self.model.config)
        mine = [(i, k) for i in range(len(self.rows)) for k in range(self.answers)]
        mine = mine[ctx.rank :: ctx.world]
        prompts = [asked(self.rows[i], tokenizer, self.ask) for i, _ in mine]
        if limit:
            room = max(1, limit - self.new_tokens)
            prompts = [cut_head(ids, room, tokenizer) for ids in prompts]
        seeds = [replace(ctx, seed=self.seed).seed_for(f"{i}/{k}") for i, k in mine]
        new = sample(
            model, tokenizer, prompts, seeds, new_tokens=self.new_tokens,
            temperature=self.temperature,
        )  # fmt: skip
        texts = [tokenizer.decode(list(ids), skip_special_tokens=True) for ids in new]
        tokens = sum(len(a) + len(b) for a, b in zip(prompts, new, strict=True))
        shares = gather([[[i, cut(t)] for (i, _), t in zip(mine, texts)], tokens], ctx)
        if ctx.rank == 0:
            write_text(ctx.work / FILE, json.dumps(shares))
        barrier(ctx)

    def read(self, folder: Path) -> Alternatives:
        """Return the answers that say something else than the row does."""
        shares = json.loads((folder / FILE).read_text(encoding="utf-8"))
        texts: list[list[str]] = [[] for _ in self.rows]
        for share, _ in shares:
            for i, text in share:
                if text and text != question_of(self.rows[i])[1]:
                    texts[i].append(text)
        return Alternatives(tuple(map(tuple, texts)), sum(tokens for _, tokens in shares))


def cut(text: str) -> str:
    """Return a sampled answer up to where the model goes on to something else."""
    text = text.strip()
    for stop in STOPS:
        text = text.partition(stop)[0]
    return text.strip()


def asked(row: Row, tokenizer: Tokenizer, ask: str) -> tuple[int, ...]:
    """Return the token ids that ask a model for another answer.

    Raises:
        UserError: If the chat template refuses a question of the user alone.
    """
    prompt, answer = question_of(row)
    text = ask.replace("{prompt}", prompt).replace("{answer}", answer)
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": text}]
        try:
            text = str(apply_template(turns, tokenizer, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise UserError(
                f"altpo: the chat template refuses a question of the user alone ({error}); use "
                "idk_dpo, which asks the model nothing"
            ) from None
        text += LEAD
    else:
        text += f"\n{LEAD}"
    return tuple(with_specials(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer))
