"""What a student reads while it is distilled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from excise.core.config import Config
from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Domain, Rows
from excise.data.labels import LabelNoise, label_rows, tell_labels
from excise.data.mix import mixed
from excise.data.stream import Example, encode
from excise.data.subsample import subsample
from excise.methods.base import Cost
from excise.methods.distillation.refusing import measure_refusal, refusal_ids, taught_to_refuse
from excise.methods.distillation.sampling import prompt_ids, sample, sampled
from excise.methods.pretraining.pretrain import corpus
from excise.models.checkpoint import Checkpoint
from excise.record import write_text
from excise.train.fit import FitConfig

SAMPLES = "samples.json"
"""File of drawn texts, so that an interrupted run draws them once."""


class FullMix(Config):
    """The unlabelled mix, forget rows among it."""

    name: Literal["mix"] = "mix"


class WithoutForget(Config):
    """The mix without the rows that are labelled as harmful."""

    name: Literal["without_forget"] = "without_forget"
    labels: LabelNoise | None = None
    """How the labels one has differ from the truth; missing means they are right."""


class Drawn(Config):
    """How texts are drawn: prompts are those of the mix, of plain texts the first tokens."""

    rows: int = Field(default=2048, ge=1)
    """Texts in all."""
    prompt_tokens: int = Field(default=4, ge=1)
    """Tokens of a plain text that are its prompt."""
    new_tokens: int = Field(default=32, ge=1)
    """Tokens drawn at most."""
    temperature: float = Field(default=1.0, ge=0)
    """0 takes the likeliest token."""


class TeacherSamples(Drawn):
    """Texts drawn from the unlearned teacher."""

    name: Literal["teacher_samples"] = "teacher_samples"


class RefusingSamples(Drawn):
    """Texts drawn from the original after it was fine-tuned to refuse."""

    name: Literal["refusing_samples"] = "refusing_samples"
    refusal: str = " I cannot help with that."
    """What it says instead of an answer; the tokenizer must know its words."""
    fit: FitConfig = FitConfig(steps=60, lr=1e-3, batch_size=32, clip=1.0)
    """How it is taught: half of each batch refuses forget prompts, half is retain text."""


class OnPolicy(Config):
    """Texts drawn from the student itself, anew in every step; scored by reverse KL."""

    name: Literal["on_policy"] = "on_policy"
    prompt_tokens: int = Field(default=4, ge=1)
    """Tokens of a plain text that are its prompt."""
    new_tokens: int = Field(default=32, ge=1)
    """Tokens drawn at most."""
    temperature: float = Field(default=1.0, ge=0)
    """0 takes the likeliest token."""


AnyCorpus = Annotated[
    FullMix | WithoutForget | TeacherSamples | RefusingSamples | OnPolicy,
    Field(discriminator="name"),
]
"""What a student reads."""


@dataclass(frozen=True)
class Texts:
    """A corpus, ready to be read.

    Attributes:
        examples: Encoded rows; with `OnPolicy` those whose prompts are continued.
        truth: Whether each is about what is to be removed.
        facts: What the record keeps.
        read: Tokens that models read to make it.
        cost: What training a model for it took.
    """

    examples: list[Example]
    truth: list[bool]
    facts: dict[str, Any] = field(default_factory=dict)
    read: int = 0
    cost: Cost = field(default_factory=Cost)


def mix_of(domain: Domain) -> Rows:
    """Return the mix with true labels: `unlabeled`, or all a model of the domain is trained on."""
    if not domain.unlabeled:
        return corpus(domain)
    rows = label_rows(domain.unlabeled, tuple(domain.forget))
    return rows if domain.mix_share is None else mixed(rows, domain.mix_share)


def read_corpus(
    config: AnyCorpus,
    domain: Domain,
    original: Checkpoint,
    teacher: Checkpoint | None,
    ctx: Context,
    *,
    noise: LabelNoise | None,
    max_length: int,
) -> Texts:
    """Return the texts that a student reads.

    Args:
        config: Which.
        domain: Gives the rows.
        original: Gives the tokenizer, and the model that is taught to refuse.
        teacher: The unlearned model, where texts are drawn from it.
        ctx: Gives seeds and the folder in which drawn texts are kept.
        noise: How the labels of the targets differ from the truth.
        max_length: Tokens per row.

    Raises:
        UserError: If all texts together are shorter than one of `max_length`, or a model that is
            to refuse cannot write its refusal.
    """
    tokenizer = original.tokenizer()
    rows = mix_of(domain)
    dropped = 0
    if isinstance(config, WithoutForget):
        told = rows
        if config.labels is not None:
            told = tell_labels(rows, config.labels, seed=ctx.seed_for("corpus.labels"))
        kept = tuple(row for row, t in zip(rows, told, strict=True) if t.label in (CORE, UNLABELED))
        dropped, rows = len(rows) - len(kept), kept
    truth = [bool(row.capability) for row in rows]
    if noise is not None:
        rows = tell_labels(rows, noise, seed=ctx.seed_for("labels"))
    texts = Texts(encode(rows, tokenizer, max_length=max_length), truth)
    if isinstance(config, TeacherSamples):
        assert teacher is not None
        model = teacher.load(dtype=ctx.dtype, device=ctx.device)
        texts = _kept_or_drawn(config, texts, lambda: (model, {}, Cost(), 0), tokenizer, ctx,
                               max_length)  # fmt: skip
    elif isinstance(config, RefusingSamples):
        texts = _kept_or_drawn(
            config,
            texts,
            lambda: _refusing(config, domain, original, tokenizer, ctx, max_length),
            tokenizer,
            ctx,
            max_length,
        )
    check_length(texts.examples, max_length, domain.name)
    facts = {"name": config.name, **counts_of(texts), **texts.facts}
    if isinstance(config, WithoutForget):
        facts["rows_dropped"] = dropped
    return replace(texts, facts=facts)


def check_length(examples: Sequence[Example], max_length: int, name: str) -> None:
    """Refuse a corpus that is shorter than one sequence.

    Raises:
        UserError: If there are fewer tokens in all than `max_length`.
    """
    tokens = sum(len(e.ids) for e in examples)
    if tokens < max_length:
        raise UserError(
            f"the corpus of domain '{name}' holds {tokens} tokens, less than one sequence of "
            f"{max_length}; give it more text or lower max_length"
        )


def counts_of(texts: Texts) -> dict[str, int]:
    """Return rows and tokens of a corpus, and how many are about what is to be removed."""
    sizes = [len(e.ids) for e in texts.examples]
    harmful = [n for n, bad in zip(sizes, texts.truth, strict=True) if bad]
    return {
        "rows": len(sizes),
        "tokens": sum(sizes),
        "forget_rows": len(harmful),
        "forget_tokens": sum(harmful),
    }


def _kept_or_drawn(
    config: Drawn,
    mix: Texts,
    make: Any,
    tokenizer: Any,
    ctx: Context,
    max_length: int,
) -> Texts:
    """Return drawn texts: those on disk, or new ones."""
    path = ctx.work / SAMPLES
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        examples = [
            Example(tuple(ids), tuple(target), label, unit)
            for ids, target, label, unit in found["examples"]
        ]
        return Texts(examples, found["truth"], found["facts"], found["read"], Cost(**found["cost"]))
    model, facts, cost, read = make()
    texts = _draw(config, mix, model, tokenizer, ctx, max_length)
    texts = replace(texts, facts={**facts, **texts.facts}, cost=cost, read=texts.read + read)
    if isinstance(config, RefusingSamples):
        said = tuple(refusal_ids(config.refusal, tokenizer))
        texts.facts["refusal"] = {**facts["refusal"], **_refused(texts, said)}
    if ctx.rank == 0:
        data = {
            "examples": [[e.ids, e.target, e.label, e.unit] for e in texts.examples],
            "truth": texts.truth,
            "facts": texts.facts,
            "read": texts.read,
            "cost": asdict(cost),
        }
        write_text(path, json.dumps(data))
    return texts


def _draw(
    config: Drawn, mix: Texts, model: Any, tokenizer: Any, ctx: Context, max_length: int
) -> Texts:
    """Continue prompts of the mix, in an order that the seed decides, over and over."""
    generator = ctx.generator("corpus.order")
    order = torch.randperm(len(mix.examples), generator=generator).tolist()
    chosen = [order[i % len(order)] for i in range(config.rows)]
    prompts = [prompt_ids(mix.examples[i], config.prompt_tokens) for i in chosen]
    seeds = [ctx.seed_for(f"corpus/{i}") for i in range(config.rows)]
    new = sample(
        model, tokenizer, prompts, seeds, new_tokens=config.new_tokens,
        temperature=config.temperature,
    )  # fmt: skip
    examples, truth = [], []
    for i, prompt, ids in zip(chosen, prompts, new, strict=True):
        made = sampled(mix.examples[i], prompt, ids, max_length)
        if made is not None:
            examples.append(made)
            truth.append(mix.truth[i])
    return Texts(examples, truth, {}, sum(len(p) + len(n) for p, n in zip(prompts, new)))


def _refused(texts: Texts, said: tuple[int, ...]) -> dict[str, float]:
    """Return the share of drawn texts that refuse, on either side."""
    told: dict[bool, list[bool]] = {True: [], False: []}
    for example, harmful in zip(texts.examples, texts.truth, strict=True):
        new = example.ids[example.target.index(True) :]
        told[harmful].append(new[: len(said)] == said[: len(new)])
    return {
        "rate_harmful": sum(told[True]) / max(1, len(told[True])),
        "rate_benign": sum(told[False]) / max(1, len(told[False])),
    }


def _refusing(
    config: RefusingSamples,
    domain: Domain,
    original: Checkpoint,
    tokenizer: Any,
    ctx: Context,
    max_length: int,
) -> tuple[Any, dict[str, Any], Cost, int]:
    """Return the original taught to refuse, what is known about its refusals, and their cost."""
    said = refusal_ids(config.refusal, tokenizer)
    model = original.load(dtype=ctx.dtype, device=ctx.device)
    cost = taught_to_refuse(
        model, domain, tokenizer, said, config.fit, ctx.child("refusing"),
        prompt_tokens=config.prompt_tokens, max_length=max_length,
        parameters=original.num_parameters,
    )  # fmt: skip
    asked = subsample(
        [row for rows in domain.forget.values() for row in rows], 64, by="content",
        seed=ctx.seed_for("refusal"),
    )  # fmt: skip
    examples = encode(asked, tokenizer, max_length=max_length)
    facts, read = measure_refusal(
        model, tokenizer, examples, said, prompt_tokens=config.prompt_tokens
    )
    return model, {"refusal": facts}, cost, read
