"""A model that is taught to refuse, and how deep its refusals go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.data.stream import Batch, Example, Stream, Tokenizer, encode, zip_streams
from excise.methods.base import Cost
from excise.methods.distillation.sampling import prompt_ids, sample
from excise.methods.tuning import Progress, forget_rows, role_counts, run_fit, state_dir
from excise.models.head import final_hidden, head_of
from excise.train.fit import FitConfig, Term, fit
from excise.train.vocab import chunked_nll, next_tokens

DEEPEST = 8
"""Tokens of the true answer that are forced at most."""


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


def taught_to_refuse(
    model: Any,
    domain: Domain,
    tokenizer: Tokenizer,
    said: Sequence[int],
    config: FitConfig,
    ctx: Context,
    *,
    prompt_tokens: int,
    max_length: int,
    parameters: int,
) -> Cost:
    """Train a model in place to refuse what is to be removed and to go on with the rest.

    Args:
        model: The original.
        domain: Gives forget prompts and retain rows.
        tokenizer: Its tokenizer.
        said: The refusal.
        config: Steps and rates; `batch_size` rows of either side.
        ctx: Seed and folder.
        prompt_tokens: Tokens of a plain text that are its prompt.
        max_length: Tokens per row.
        parameters: Size of the model, for the cost.
    """
    forget = encode(forget_rows(domain), tokenizer, max_length=max_length)
    refusals = []
    for example in forget:
        prompt = prompt_ids(example, prompt_tokens)
        target = (False,) * len(prompt) + (True,) * len(said)
        refusals.append(Example((*prompt, *said), target, example.label, example.unit))
    retain = encode(domain.retain, tokenizer, max_length=max_length)
    sides = {"forget": list(dict.fromkeys(refusals)), "retain": retain}
    batches = zip_streams(
        {
            side: Stream(
                examples, config.batch_size, ctx.seed_for(f"order.{side}"),
                tokenizer.pad_token_id, ctx.rank, ctx.world, config.micro_size,
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

    progress = Progress(ctx, "refusing", config.steps)
    model.requires_grad_(True)
    run_fit(
        fit(model, batches, loss, config, ctx, counts=role_counts, state_dir=state_dir(ctx)),
        progress,
    )
    model.requires_grad_(False)
    return progress.cost(parameters)


@torch.no_grad()
def measure_refusal(
    model: Any,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    said: Sequence[int],
    *,
    prompt_tokens: int,
) -> tuple[dict[str, Any], int]:
    """Return how often a model refuses after 0, 1, 2 ... tokens of the true answer were forced.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        examples: Rows to forget.
        said: The refusal.
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
            model, tokenizer, prompts, [0] * len(prompts), new_tokens=len(said), temperature=0.0
        )
        read += sum(len(p) + len(n) for p, n in zip(prompts, new, strict=True))
        rates.append(sum(n == tuple(said) for n in new) / len(new))
    deep = next((i for i, rate in enumerate(rates) if rate < 0.5), len(rates))
    facts = {"rate": rates[0], "rate_by_depth": rates, "depth_tokens": deep - 1}
    return facts, read
