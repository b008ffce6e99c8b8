"""What a student reads while it is distilled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from excise.core.config import Config
from excise.core.context import Context
from excise.core.disk import write_text
from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Domain, Rows
from excise.data.labels import LabelNoise, give_labels, label_rows
from excise.data.mix import mixed
from excise.data.stream import Batch, Example, Stream, Tokenizer, encode, zip_streams
from excise.data.subsample import subsample
from excise.methods.base import Cost
from excise.methods.distillation.sampling import prompt_ids, sample, sampled_example
from excise.methods.pretraining.pretrain import corpus
from excise.methods.tuning import Progress, forget_rows, role_counts, run_fit, state_dir
from excise.models.checkpoint import Checkpoint
from excise.models.head import final_hidden, head_of
from excise.train.fit import FitConfig, Term, fit
from excise.train.vocab import chunked_nll, next_tokens

SAMPLES = "samples.json"
"""File of sampled texts, so that an interrupted run samples them once."""

REFUSED_ROWS = 64
"""Forget rows on which refusals are measured, at most."""

DEEPEST = 8
"""Tokens of the true answer that are forced at most."""


class FullMix(Config):
    """The unlabelled mix, forget rows among it."""

    name: Literal["mix"] = "mix"


class WithoutForget(Config):
    """The mix without the rows that are labelled as harmful."""

    name: Literal["without_forget"] = "without_forget"
    labels: LabelNoise | None = None
    """How the given labels differ from the truth; missing means they are right."""


class SampledText(Config):
    """How texts are sampled: prompts are those of the mix, of plain texts the first tokens."""

    prompt_tokens: int = Field(default=4, ge=1)
    """Tokens of a plain text that are its prompt."""
    new_tokens: int = Field(default=32, ge=1)
    """Tokens sampled at most."""
    temperature: float = Field(default=1.0, ge=0)
    """0 takes the likeliest token."""


class TeacherSamples(SampledText):
    """Texts sampled from the unlearned teacher."""

    name: Literal["teacher_samples"] = "teacher_samples"
    rows: int = Field(default=2048, ge=1)
    """Texts in all."""


class RefusingSamples(SampledText):
    """Texts sampled from the original after it was fine-tuned to refuse."""

    name: Literal["refusing_samples"] = "refusing_samples"
    rows: int = Field(default=2048, ge=1)
    """Texts in all."""
    refusal: str = " I cannot help with that."
    """What it says instead of an answer; the tokenizer must know its words."""
    fit: FitConfig = FitConfig(steps=60, lr=1e-3, batch_size=32, clip=1.0)
    """How it is taught: half of each batch refuses forget prompts, half is retain text."""


class OnPolicy(SampledText):
    """Texts sampled from the student itself, anew in every step; scored by reverse KL."""

    name: Literal["on_policy"] = "on_policy"


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
        teacher: The unlearned model, where texts are sampled from it.
        ctx: Gives seeds and the folder in which sampled texts are kept.
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
        given = rows
        if config.labels is not None:
            given = give_labels(rows, config.labels, seed=ctx.seed_for("corpus.labels"))
        harmless = tuple(
            row for row, now in zip(rows, given, strict=True) if now.label in (CORE, UNLABELED)
        )
        dropped, rows = len(rows) - len(harmless), harmless
    truth = [bool(row.capability) for row in rows]
    if noise is not None:
        rows = give_labels(rows, noise, seed=ctx.seed_for("labels"))
    texts = Texts(encode(rows, tokenizer, max_length=max_length), truth)
    if isinstance(config, TeacherSamples | RefusingSamples):
        texts = _sampled_texts(config, texts, domain, original, teacher, ctx, max_length)
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


def _sampled_texts(
    config: TeacherSamples | RefusingSamples,
    mix: Texts,
    domain: Domain,
    original: Checkpoint,
    teacher: Checkpoint | None,
    ctx: Context,
    max_length: int,
) -> Texts:
    """Return sampled texts: those on disk, or new ones."""
    path = ctx.work / SAMPLES
    if path.is_file():
        data = json.loads(path.read_text(encoding="utf-8"))
        examples = [
            Example(tuple(ids), tuple(target), label, unit)
            for ids, target, label, unit in data["examples"]
        ]
        return Texts(examples, data["truth"], data["facts"], data["read"], Cost(**data["cost"]))
    tokenizer = original.tokenizer()
    if isinstance(config, TeacherSamples):
        assert teacher is not None
        model = teacher.load(dtype=ctx.dtype, device=ctx.device)
        texts = _sample(config, mix, model, tokenizer, ctx, max_length)
    else:
        model, refusals, cost, read = _refusing(
            config, domain, original, tokenizer, ctx, max_length
        )
        texts = _sample(config, mix, model, tokenizer, ctx, max_length)
        refusal = tuple(refusal_ids(config.refusal, tokenizer))
        facts = {"refusal": {**refusals, **_refused(texts, refusal)}}
        texts = replace(texts, facts=facts, cost=cost, read=texts.read + read)
    if ctx.rank == 0:
        data = {
            "examples": [[e.ids, e.target, e.label, e.unit] for e in texts.examples],
            "truth": texts.truth,
            "facts": texts.facts,
            "read": texts.read,
            "cost": asdict(texts.cost),
        }
        write_text(path, json.dumps(data))
    return texts


def _sample(
    config: TeacherSamples | RefusingSamples,
    mix: Texts,
    model: Any,
    tokenizer: Tokenizer,
    ctx: Context,
    max_length: int,
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
        example = sampled_example(mix.examples[i], prompt, ids, max_length)
        if example is not None:
            examples.append(example)
            truth.append(mix.truth[i])
    return Texts(examples, truth, {}, sum(len(p) + len(n) for p, n in zip(prompts, new)))


def _refused(texts: Texts, refusal: tuple[int, ...]) -> dict[str, float]:
    """Return the share of sampled texts that refuse, on either side."""
    refuses: dict[bool, list[bool]] = {True: [], False: []}
    for example, harmful in zip(texts.examples, texts.truth, strict=True):
        new = example.ids[example.target.index(True) :]
        refuses[harmful].append(new[: len(refusal)] == refusal[: len(new)])
    return {
        "rate_harmful": sum(refuses[True]) / max(1, len(refuses[True])),
        "rate_benign": sum(refuses[False]) / max(1, len(refuses[False])),
    }


def _refusing(
    config: RefusingSamples,
    domain: Domain,
    original: Checkpoint,
    tokenizer: Tokenizer,
    ctx: Context,
    max_length: int,
) -> tuple[Any, dict[str, Any], Cost, int]:
    """Return the original taught to refuse, what is known about its refusals, and their cost."""
    refusal = refusal_ids(config.refusal, tokenizer)
    model = original.load(dtype=ctx.dtype, device=ctx.device)
    cost = _teach_to_refuse(
        model, domain, tokenizer, refusal, config, ctx.child("refusing"),
        max_length=max_length, parameters=original.num_parameters,
    )  # fmt: skip
    asked = subsample(forget_rows(domain), REFUSED_ROWS, by="content", seed=ctx.seed_for("refusal"))
    examples = encode(asked, tokenizer, max_length=max_length)
    facts, read = measure_refusal(
        model, tokenizer, examples, refusal, prompt_tokens=config.prompt_tokens
    )
    return model, facts, cost, read


def refusal_ids(refusal: str, tokenizer: Tokenizer) -> list[int]:
    """Return a refusal as token ids.

    Raises:
        UserError: If it is empty or has words the tokenizer does not know.
    """
    ids = list(tokenizer(refusal, add_special_tokens=False)["input_ids"])
    if not ids or tokenizer.unk_token_id in ids:
        raise UserError(
            f"corpus.refusal: the tokenizer cannot write {refusal!r}; give a text of words it knows"
        )
    return ids


def _teach_to_refuse(
    model: Any,
    domain: Domain,
    tokenizer: Tokenizer,
    refusal: Sequence[int],
    config: RefusingSamples,
    ctx: Context,
    *,
    max_length: int,
    parameters: int,
) -> Cost:
    """Train a model in place to refuse what is to be removed and to continue the rest."""
    forget = encode(forget_rows(domain), tokenizer, max_length=max_length, only_spans=True)
    refusals = []
    for example in forget:
        prompt = prompt_ids(example, config.prompt_tokens)
        target = (False,) * len(prompt) + (True,) * len(refusal)
        refusals.append(Example((*prompt, *refusal), target, example.label, example.unit))
    retain = encode(domain.retain, tokenizer, max_length=max_length, only_spans=True)
    sides = {"forget": list(dict.fromkeys(refusals)), "retain": retain}
    batches = zip_streams(
        {
            side: Stream(
                examples, config.fit.batch_size, ctx.seed_for(f"order.{side}"),
                tokenizer.pad_token_id, ctx.rank, ctx.world, config.fit.micro_size,
            )
            for side, examples in sides.items()
        }
    )  # fmt: skip

    def loss(net: nn.Module, micro: dict[str, Batch]) -> dict[str, Term]:
        head = head_of(net)
        terms = {}
        for side, batch in micro.items():
            hidden_ND = final_hidden(net, batch.inputs).flatten(0, 1)
            total, count = chunked_nll(hidden_ND, head, next_tokens(batch))
            terms[side] = Term(total, count)
        return terms

    progress = Progress(ctx, "refusing", config.fit.steps)
    model.requires_grad_(True)
    run_fit(
        fit(model, batches, loss, config.fit, ctx, counts=role_counts, state_dir=state_dir(ctx)),
        progress,
    )
    model.requires_grad_(False)
    return progress.cost(parameters)


@torch.no_grad()
def measure_refusal(
    model: Any,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    refusal: Sequence[int],
    *,
    prompt_tokens: int,
) -> tuple[dict[str, Any], int]:
    """Return how often a model refuses after 0, 1, 2 ... tokens of the true answer were forced.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        examples: Rows to forget.
        refusal: The refusal.
        prompt_tokens: Tokens of a plain text that are its prompt.

    Returns:
        `rate`, greedily without anything forced; `rate_by_depth`; `depth_tokens`, the forced
        tokens up to which at least half of the rows are still refused, -1 where not even the bare
        prompt is; and the number of tokens read.
    """
    rates: list[float] = []
    read = 0
    for forced in range(DEEPEST + 1):
        prompts = []
        for example in examples:
            prompt = prompt_ids(example, prompt_tokens)
            if len(example.ids) - len(prompt) > forced or not forced:
                prompts.append(example.ids[: len(prompt) + forced])
        if not prompts:
            break
        new = sample(
            model, tokenizer, prompts, [0] * len(prompts), new_tokens=len(refusal), temperature=0.0
        )
        read += sum(len(p) + len(n) for p, n in zip(prompts, new, strict=True))
        rates.append(sum(n == tuple(refusal) for n in new) / len(new))
    deep = next((i for i, rate in enumerate(rates) if rate < 0.5), len(rates))
    facts = {"rate": rates[0], "rate_by_depth": rates, "depth_tokens": deep - 1}
    return facts, read
