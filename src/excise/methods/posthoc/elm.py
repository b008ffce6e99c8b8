"""ELM: on forget text predict what somebody who knows nothing of it would, and stay fluent.

    of the original, once, before anything is trained:
        forget row x of n tokens:  s_i = log p0(. | x_1..i) at temperature T; e_i and v_i the same
                                   behind the words of an expert and of a novice
                                   eta_i = from 1 to `eta` in n equal steps
                                   q_i = softmax of the `top` largest of s_i - eta_i (e_i - v_i)
                                   y = `redirect` and what follows x and it, sampled from
                                   log p0 - gamma (log p0(. | expert, y) - log p0(. | novice, y))
        retain row r:              a_i = argmax p0(. | r_1..i)
    for every step:
        erase   = CE of the model on x against q
        retain  = CE of the model on r against a
        fluency = CE of the model on y behind x
        AdamW step of an adapter on erase + retain + fluency

Each loss is the mean over a row's tokens, then over rows. With eta up to 1000, q is all but one
token.

Source:
    arXiv 2410.02760; rohitgandikota/erasing-llm@fa33064 (no licence), trainscripts/erase.py.

Shape legend: B rows, T tokens, n tokens of one row, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from excise.core.config import Config
from excise.core.context import Context, Stage
from excise.core.disk import new_file, write_text
from excise.core.errors import UserError
from excise.data.domain import Domain, Row
from excise.data.encoding import cut_head, with_specials
from excise.data.stream import Batch, Example, Stream, Tokenizer, collate, encode
from excise.evals.tokens import logits_at
from excise.losses import Summed, token_nll
from excise.methods.base import Paper, Removal
from excise.methods.distillation.sampling import sample
from excise.methods.tuning import (
    Progress,
    TuningMethod,
    finish,
    forget_rows,
    looking,
    places_read,
    run_fit,
    state_dir,
    stream,
    tuned,
)
from excise.models.anatomy import backbone
from excise.models.checkpoint import Checkpoint
from excise.models.limits import carries_state, readable
from excise.models.lora import LoRA
from excise.train.distributed import barrier
from excise.train.fit import FitConfig, Term, fit

ROWS = 8
"""Rows that the original reads at once."""


class Guide(Config):
    """What the original is asked, to know what a novice would say."""

    concept: str = ""
    """What the knowledge is called; empty for the name of each row's capability."""
    expert: str = "This text is by an expert in {concept}, exact and full of technical detail:\n"
    """Words before a text whose likelihood is lowered."""
    novice: str = "This text is by somebody who knows nothing of {concept} and talks of fun:\n"
    """Words before a text whose likelihood is raised."""
    redirect: str = ". But that is risky ground, so let us turn to something pleasant instead:"
    """Words that lead away from a forget text."""
    eta: float = Field(default=1000.0, ge=1)
    """Strength at the last token of a row; it grows linearly from 1 at the first."""
    top: int = Field(default=50, ge=1)
    """Likeliest tokens that a target keeps."""
    temperature: float = Field(default=1.2, gt=0)
    """By which the logits of the original are divided."""
    gamma: float = 3.0
    """Strength while the continuation is sampled."""
    continuation: int = Field(default=200, ge=1)
    """Tokens sampled behind the redirection at most."""


class ELM(TuningMethod):
    """Minimise CE(novice's prediction) on forget + CE(own argmax) on retain + CE(own way out)."""

    name: Literal["elm"] = "elm"
    erase: float = Field(default=1.0, ge=0)
    """Weight of the loss on forget rows."""
    retain: float = Field(default=1.0, ge=0)
    """Weight of the loss on retain rows."""
    fluency: float = Field(default=1.0, ge=0)
    """Weight of the loss on sampled ways out; 0 samples none."""
    skip_first: bool = False
    """Leave the first token of the redirection unscored, as the release does."""
    guide: Guide = Guide()
    """What the original is asked."""
    layers: tuple[int, ...] = (4, 5, 6, 7)
    """Blocks that are trained, where `modules` names nothing."""
    fit: FitConfig = FitConfig(steps=2250, lr=5e-5, batch_size=4, weight_decay=0.01)
    """Steps, rows per step of each role, learning rate."""
    max_length: int = Field(default=175, ge=2)
    """Tokens per row, without what is sampled."""
    lora: LoRA | None = LoRA(rank=256, alpha=16.0)
    """The adapter that is trained; empty for the weights themselves."""

    refuses: ClassVar[Mapping[str, str]] = {
        "sam": "its three terms are one loss over the same rows"
    }
    paper: ClassVar[Paper] = Paper(
        "Erasing conceptual knowledge from language models",
        "arXiv:2410.02760",
        "L = L_erase + L_retain + L_fluency",
        "rohitgandikota/erasing-llm@fa33064 (no licence)",
        {
            "erase": "trainscripts/erase.py --erase_loss_scale 1",
            "retain": "erase.py --retain_loss_scale 1, on the argmax (--use_retain_soft_loss "
            "False)",
            "fluency": "erase.py --consistence_loss_scale 1",
            "skip_first": "erase.py cuts the continuation with [:, 1:] and its logits with "
            "[:, :-1], so that its first token is never scored; off here",
            "guide": "erase.py: eta 1 to 1000 (--eta), --topk 50, --temperature 1.2, gamma 3, "
            "100 to 300 new tokens, here 200. The release draws each row's words from 10 to 20 "
            "sentences about a list of keywords; here they are one of ours and one name. Both "
            "guides read the continuation without the text before it, as released",
            "layers": "erase.py --layers_to_train 4,8",
            "fit": "README: 3000 prompts of each of '0,0,1', batch 1, accumulated over 4: 2250 "
            "steps of 4; --lr 5e-5; AdamW of torch with its default decay 0.01",
            "max_length": "erase.py --max_len 700 characters, about 175 tokens",
            "lora": "erase.py --lora_rank 256 --lora_alpha 16 on all projections; its dropout of "
            "0.05 is left out",
        },
    )

    @property
    def step_cost(self) -> float:
        """Forget rows are read again with their way out."""
        return 1.5 if self.fluency else 1.0

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove `domain.forget` by predicting on it what a novice would."""
        domain, quality = self.given(domain, ctx)
        tokenizer, modules = start.tokenizer(), self.trained(start.shapes)
        rows = forget_rows(domain)
        forget, retain = (
            stream(part, tokenizer, self.fit, ctx, purpose=role, max_length=self.max_length)
            for role, part in (("forget", rows), ("retain", domain.retain))
        )
        read = {role: places_read(s, self.fit.steps) for role, s in (("f", forget), ("r", retain))}
        answers = ctx.run(
            AskOriginal(
                start=start,
                guide=self.guide,
                forget=tuple(rows[i] for i in read["f"]),
                retain=tuple(domain.retain[i] for i in read["r"]),
                max_length=self.max_length,
                ways_out=self.fluency > 0,
                seed=ctx.seed,
            )
        )
        batches = self.batches(answers, forget, retain, read, tokenizer)
        model = start.load(dtype=ctx.dtype, device=ctx.device)
        progress = Progress(ctx, self.name, self.fit.steps)
        progress.tokens = answers.tokens
        with tuned(model, modules, self.lora, ctx) as (live, parameters):
            looks = looking(self, live, parameters, tokenizer, domain, ctx)
            steps = fit(
                live, batches, self.terms, self.fit, ctx,
                groups={"trained": list(parameters.values())}, counts=self.counts,
                state_dir=state_dir(ctx), change=self.change,
            )  # fmt: skip
            facts = {**quality, **run_fit(steps, progress, looks)}
            return finish(start, live, parameters, progress, ctx, lora=self.lora, extras=facts)

    def trained(self, model: nn.Module) -> Sequence[str]:
        """Return the modules that are trained, or carry the adapter.

        Raises:
            UserError: If a block is beyond the model.
        """
        if self.modules:
            return self.modules
        blocks = backbone(model).blocks
        if not self.layers or not all(0 <= layer < len(blocks) for layer in self.layers):
            raise UserError(
                f"elm: 'layers' names {', '.join(map(str, self.layers)) or 'no block'}, and this "
                f"model has blocks 0 to {len(blocks) - 1}; set others, or 'modules'"
            )
        return [blocks[layer] for layer in self.layers]

    def batches(
        self,
        answers: Answers,
        forget: Stream,
        retain: Stream,
        read: Mapping[str, Sequence[int]],
        tokenizer: Tokenizer,
    ) -> Callable[[int], list[Micro]]:
        """Return the micro-batches of a step: rows with what the original said of them."""
        place = {role: {row: at for at, row in enumerate(rows)} for role, rows in read.items()}
        size = self.fit.micro_size or self.fit.batch_size

        def padded(examples: Sequence[Example]) -> Batch:
            side = forget.padding_side
            return collate(examples, pad_id=tokenizer.pad_token_id, padding_side=side)

        def way_out(example: Example, new: tuple[int, ...]) -> Example:
            skipped = len(example.ids) + self.skip_first
            scored = tuple(i >= skipped for i in range(len(example.ids) + len(new)))
            return replace(example, ids=(*example.ids, *new), target=scored, confidence=1.0)

        def batches(step: int) -> list[Micro]:
            f, r = forget.indices(step), retain.indices(step)
            micros = []
            for i in range(0, len(f), size):
                at_f = [place["f"][row] for row in f[i : i + size]]
                at_r = [place["r"][row] for row in r[i : i + size]]
                xs = [forget.examples[row] for row in f[i : i + size]]
                out = [way_out(x, answers.ways_out[at]) for x, at in zip(xs, at_f, strict=True)]
                micros.append(
                    Micro(
                        padded(xs),
                        padded([retain.examples[row] for row in r[i : i + size]]),
                        padded(out) if self.fluency else None,
                        torch.cat([answers.top[at] for at in at_f]).long(),
                        torch.cat([answers.share[at] for at in at_f]),
                        torch.cat([answers.argmax[at] for at in at_r]).long(),
                    )
                )
            return micros

        return batches

    def counts(self, micro: Micro) -> dict[str, float]:
        """Return what each loss is divided by: rows."""
        rows = float(len(micro.forget.ids_BT))
        terms = ("erase", "retain", "fluency") if micro.way_out else ("erase", "retain")
        return dict.fromkeys(terms, rows)

    def terms(self, live: nn.Module, micro: Micro) -> dict[str, Term]:
        """Return the three losses of a micro-batch."""

        def logits(batch: Batch) -> Float[Tensor, "B T V"]:
            found: Tensor = live(**batch.inputs, use_cache=False).logits
            return found.float() if found.dtype != torch.float64 else found

        seen_BT, kept_BT = micro.forget.attention_BT, micro.retain.attention_BT
        erase = soft_nll(logits(micro.forget), micro.top_NK, micro.share_NK, seen_BT)
        retain = soft_nll(
            logits(micro.retain), micro.argmax_N[:, None], torch.ones_like(micro.share_NK[:1, :1]),
            kept_BT,
        )  # fmt: skip
        terms = {"erase": Term(*erase, self.erase), "retain": Term(*retain, self.retain)}
        if micro.way_out is not None:
            nll_BT = token_nll(logits(micro.way_out), micro.way_out.ids_BT)
            terms["fluency"] = Term(*row_means(nll_BT, micro.way_out.target_BT), self.fluency)
        return terms


@dataclass(frozen=True)
class Micro:
    """Rows of a micro-batch with what the original said of them.

    Attributes:
        forget: Forget rows.
        retain: Retain rows.
        way_out: Forget rows with their redirection, which is scored; None without it.
        top_NK: Likeliest tokens of a novice at each real token of the forget rows, row by row.
        share_NK: Their probabilities.
        argmax_N: The original's likeliest token at each real token of the retain rows.
    """

    forget: Batch
    retain: Batch
    way_out: Batch | None
    top_NK: Int[Tensor, "N K"]
    share_NK: Float[Tensor, "N K"]
    argmax_N: Int[Tensor, " N"]

    @property
    def num_tokens(self) -> int:
        """Real tokens read."""
        more = 0 if self.way_out is None else self.way_out.num_tokens
        return self.forget.num_tokens + self.retain.num_tokens + more

    def to(self, device: torch.device) -> Micro:
        """Return the micro-batch on `device`."""
        return Micro(
            self.forget.to(device),
            self.retain.to(device),
            None if self.way_out is None else self.way_out.to(device),
            self.top_NK.to(device),
            self.share_NK.to(device),
            self.argmax_N.to(device),
        )


def soft_nll(
    logits_BTV: Float[Tensor, "B T V"],
    top_NK: Int[Tensor, "N K"],
    share_NK: Float[Tensor, "N K"],
    mask_BT: Bool[Tensor, "B T"],
) -> Summed:
    """Return the cross-entropy against a few tokens' probabilities, row means summed over rows.

    Args:
        logits_BTV: Logits of the model.
        top_NK: Tokens of the target of each position in the mask, row by row.
        share_NK: Their probabilities.
        mask_BT: Which positions count.
    """
    said_NK = logits_BTV.log_softmax(-1)[mask_BT].gather(1, top_NK)
    loss_BT = torch.zeros_like(logits_BTV[..., 0])
    loss_BT[mask_BT] = -(share_NK.to(said_NK.dtype) * said_NK).sum(-1)
    return row_means(loss_BT, mask_BT)


def row_means(value_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]) -> Summed:
    """Return the sum over rows of each row's mean over the mask, and the number of rows."""
    mean_B = value_BT.masked_fill(~mask_BT, 0).sum(1) / mask_BT.sum(1).clamp(min=1)
    return mean_B.sum(), float(len(mask_BT))


@dataclass(frozen=True)
class Answers:
    """What the original said.

    Attributes:
        top: Tokens of a novice's prediction at each token of each forget row, [n, K].
        share: Their probabilities.
        ways_out: Redirection and sampled continuation of each forget row.
        argmax: Likeliest token at each token of each retain row, [n].
        tokens: Tokens it read for this.
    """

    top: Sequence[Int[Tensor, "n K"]]
    share: Sequence[Float[Tensor, "n K"]]
    ways_out: Sequence[tuple[int, ...]]
    argmax: Sequence[Int[Tensor, " n"]]
    tokens: int


@dataclass(frozen=True)
class AskOriginal(Stage[Answers]):
    """What the original says of forget and retain rows; shared by runs that ask the same.

    Attributes:
        start: The original.
        guide: What it is asked.
        forget: Forget rows.
        retain: Retain rows.
        max_length: Tokens per row.
        ways_out: Whether to sample.
        seed: Seed of what is sampled.
    """

    start: Checkpoint
    guide: Guide
    forget: tuple[Row, ...]
    retain: tuple[Row, ...]
    max_length: int
    ways_out: bool
    seed: int

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "elm-targets"

    def make(self, ctx: Context) -> None:
        """Read every row with the original, and write down what it says.

        Raises:
            UserError: If the model carries a state, and a way out was to be sampled.
        """
        if not ctx.rank and not (ctx.work / "answers.json").exists():
            self.ask(ctx)
        barrier(ctx)

    def ask(self, ctx: Context) -> None:
        """Fill the folder; its last file says that all is there."""
        model = self.start.load(dtype=ctx.dtype, device=ctx.device)
        tokenizer = self.start.tokenizer()
        if self.ways_out and carries_state(model):
            raise UserError(
                "elm: this model carries a state from token to token, which texts of different "
                "lengths read together would change; set 'fluency' to 0"
            )
        forget = encode(self.forget, tokenizer, max_length=self.max_length, only_spans=True)
        retain = encode(self.retain, tokenizer, max_length=self.max_length, only_spans=True)
        tensors: dict[str, Tensor] = {}
        tokens = sum(len(e.ids) for e in retain)
        steps, done = len(forget) + len(retain), 0

        def tell(rows: int) -> None:
            nonlocal done
            done += rows
            ctx.emit("step", {"stage": "elm: the original", "step": done, "steps": steps})

        with torch.no_grad():
            for at in range(0, len(retain), ROWS):
                part = retain[at : at + ROWS]
                for i, logits_nV in enumerate(last(model, tokenizer, part, part), at):
                    tensors[f"argmax.{i}"] = logits_nV.argmax(-1).int().cpu()
                tell(len(part))
            for at in range(0, len(forget), ROWS):
                part, rows = forget[at : at + ROWS], self.forget[at : at + ROWS]
                guided = [
                    [self.behind(words, row, e, model, tokenizer) for row, e in zip(rows, part)]
                    for words in (self.guide.expert, self.guide.novice)
                ]
                said = [last(model, tokenizer, texts, part) for texts in (part, *guided)]
                tokens += sum(len(e.ids) for texts in (part, *guided) for e in texts)
                for i, (own, expert, novice) in enumerate(zip(*said, strict=True), at):
                    top_nK, share_nK = novice_target(own, expert, novice, self.guide)
                    tensors[f"top.{i}"], tensors[f"share.{i}"] = top_nK.int().cpu(), share_nK.cpu()
                tell(len(part))
        ways: list[tuple[int, ...]] = [()] * len(forget)
        if self.ways_out:
            ways = self.sampled(model, tokenizer, forget, ctx)
            tokens += 3 * sum(map(len, ways))
        with new_file(ctx.work / "answers.safetensors") as temporary:
            save_file({k: t.contiguous() for k, t in tensors.items()}, temporary)
        write_text(ctx.work / "answers.json", json.dumps({"ways_out": ways, "tokens": tokens}))

    def read(self, folder: Path) -> Answers:
        """Return what was written."""
        tensors = load_file(folder / "answers.safetensors")
        facts = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        forget, retain = range(len(self.forget)), range(len(self.retain))
        return Answers(
            [tensors[f"top.{i}"] for i in forget],
            [tensors[f"share.{i}"] for i in forget],
            [tuple(ids) for ids in facts["ways_out"]],
            [tensors[f"argmax.{i}"] for i in retain],
            facts["tokens"],
        )

    def words(self, template: str, row: Row, tokenizer: Tokenizer) -> list[int]:
        """Return the ids of a template about a row, as a text begins."""
        concept = self.guide.concept or row.capability.replace("_", " ") or "this subject"
        text = template.replace("{concept}", concept)
        return with_specials(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer)

    def behind(
        self, template: str, row: Row, example: Example, model: Any, tokenizer: Tokenizer
    ) -> Example:
        """Return an example behind the words of a template, in the positions that a model has."""
        words = self.words(template, row, tokenizer)
        skipped = 1 if example.ids[0] == tokenizer.bos_token_id else 0
        body = example.ids[skipped:]
        room = readable(model, len(words) + len(body)) - len(body)
        ids = (*cut_head(words, room, tokenizer), *body)
        return replace(example, ids=ids, target=(False,) * len(ids), confidence=1.0)

    def sampled(
        self, model: Any, tokenizer: Tokenizer, forget: Sequence[Example], ctx: Context
    ) -> list[tuple[int, ...]]:
        """Return the redirection of each row, and what the original says after it under guidance.

        The end token is left out.
        """
        away = tokenizer(self.guide.redirect, add_special_tokens=False)["input_ids"]
        room = readable(model, 1 << 30) - len(away) - 1
        prompts = [(*e.ids[:room], *away) for e in forget]
        new = sample(
            model, tokenizer, prompts,
            [ctx.seed_for(f"elm.{i}") for i in range(len(prompts))],
            new_tokens=self.guide.continuation,
            guides={
                factor: [tuple(self.words(words, row, tokenizer)) for row in self.forget]
                for factor, words in (
                    (-self.guide.gamma, self.guide.expert), (self.guide.gamma, self.guide.novice),
                )
            },
        )  # fmt: skip
        end = tokenizer.eos_token_id
        return [(*away, *(t for t in ids if t != end)) for ids in new]


def last(
    model: Any, tokenizer: Tokenizer, texts: Sequence[Example], rows: Sequence[Example]
) -> Sequence[Float[Tensor, "n V"]]:
    """Return the logits of the last tokens of texts, of each as many as the row in it has."""
    device = next(model.parameters()).device
    batch = collate(texts, pad_id=tokenizer.pad_token_id).to(device)
    wanted_BT = torch.zeros_like(batch.attention_BT)
    for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
        wanted_BT[i, len(text.ids) - len(row.ids) : len(text.ids)] = True
    logits_NV, _ = logits_at(model, {**batch.inputs, "use_cache": False}, wanted_BT)
    return tuple(logits_NV.split([len(row.ids) for row in rows]))


def novice_target(
    own_nV: Float[Tensor, "n V"],
    expert_nV: Float[Tensor, "n V"],
    novice_nV: Float[Tensor, "n V"],
    guide: Guide,
) -> tuple[Int[Tensor, "n K"], Float[Tensor, "n K"]]:
    """Return the likeliest tokens of the guided prediction of one row and their probabilities.

    Args:
        own_nV: Logits of the original at every token of a row.
        expert_nV: The same behind the expert's words.
        novice_nV: The same behind the novice's.
        guide: Strength, temperature, number of tokens.
    """
    own_nV, expert_nV, novice_nV = (
        (z.double() / guide.temperature).log_softmax(-1) for z in (own_nV, expert_nV, novice_nV)
    )
    eta_n = torch.linspace(1, guide.eta, len(own_nV), dtype=torch.float64, device=own_nV.device)
    guided_nV = own_nV - eta_n[:, None] * (expert_nV - novice_nV)
    best = guided_nV.topk(min(guide.top, guided_nV.shape[-1]), dim=-1)
    return best.indices, best.values.softmax(-1).float()
