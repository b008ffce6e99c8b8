"""Texts sampled from a model, each a function of its own seed.

Shape legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from excise.data.stream import Example, collate
from excise.evals.generate import room_of, same_padding
from excise.evals.tokens import device_of, evaluating, logits_at, pad_id
from excise.models.limits import carries_state


def prompt_ids(example: Example, prompt_tokens: int) -> tuple[int, ...]:
    """Return what stands before the scored tokens; of a plain text its first few.

    Args:
        example: A row.
        prompt_tokens: Tokens kept of a text that is scored from the beginning.
    """
    first = example.target.index(True)
    return example.ids[: first if first > 1 else max(1, min(prompt_tokens, len(example.ids) - 1))]


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[int],
    *,
    new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 256,
    guides: Mapping[float, Sequence[tuple[int, ...]]] | None = None,
) -> list[tuple[int, ...]]:
    """Continue every prompt by sampling from the model.

    Args:
        model: A causal model; its mode is restored.
        tokenizer: Gives padding and end token.
        prompts: Token ids; none empty.
        seeds: Seed of each prompt's continuation.
        new_tokens: New tokens at most; a text ends with its end token, or where the model's
            positions do.
        temperature: By which logits are divided; 0 takes the likeliest token.
        batch_size: Prompts at once.
        guides: Other beginnings of every text by the factor with which the logarithm of what the
            model says behind them, and behind what was sampled, is added to that of the prompt
            (classifier-free guidance, arXiv 2306.17806). They are read in the same forward.

    Returns:
        The new tokens of each, the end token included.
    """
    others = dict(guides or {})
    lengths = [max(map(len, texts)) for texts in zip(prompts, *others.values(), strict=True)]
    rooms = [room_of(model, length, new_tokens) for length in lengths]
    out: list[tuple[int, ...]] = [()] * len(prompts)
    with evaluating(model):
        for part in same_padding(model, lengths, rooms, batch_size):
            uniform_BT = torch.stack(
                [
                    torch.rand(new_tokens, generator=torch.Generator().manual_seed(seeds[i]))
                    for i in part
                ]
            )[:, : max(rooms[i] for i in part)]
            chosen = [texts[i] for texts in (prompts, *others.values()) for i in part]
            new = _continue(model, tokenizer, chosen, uniform_BT, temperature, list(others))
            for i, ids in zip(part, new, strict=True):
                out[i] = ids
    return out


def _continue(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    uniform_BT: Float[Tensor, "B T"],
    temperature: float,
    factors: Sequence[float],
) -> list[tuple[int, ...]]:
    """Continue one batch of prompts, padded on the left; see `same_padding`.

    Behind the prompts of the B texts stand their guides, B for each factor.
    """
    examples = [Example(ids, (False,) * len(ids), 0, "") for ids in prompts]
    batch = collate(examples, pad_id=pad_id(tokenizer), padding_side="left").to(device_of(model))
    end = tokenizer.eos_token_id
    inputs: dict[str, Any] = dict(batch.inputs)
    texts = uniform_BT.shape[0]
    new: list[list[int]] = [[] for _ in range(texts)]
    live = [True] * texts
    cache: Any = None
    for t in range(uniform_BT.shape[1]):
        wanted_BT = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        wanted_BT[:, -1] = True
        more: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        more["use_cache"] = not carries_state(model)
        logits_BV, output = logits_at(model, {**inputs, **more}, wanted_BT)
        if factors:
            first_BV, *rest = logits_BV.log_softmax(-1).split(texts)
            logits_BV = first_BV + sum(f * r for f, r in zip(factors, rest, strict=True))
        next_B = _pick(logits_BV, uniform_BT[:, t].to(logits_BV.device), temperature)
        for i, token in enumerate(next_B.tolist()):
            if live[i]:
                new[i].append(token)
                live[i] = token != end
        if not any(live):
            break
        cache = getattr(output, "past_key_values", None)
        mask_BT = inputs["attention_mask"]
        next_B1 = next_B.repeat(1 + len(factors))[:, None]
        position_B1 = inputs["position_ids"][:, -1:] + 1
        old = cache is None
        inputs = {
            "input_ids": torch.cat([inputs["input_ids"], next_B1], 1) if old else next_B1,
            "attention_mask": torch.cat([mask_BT, torch.ones_like(next_B1)], 1),
            "position_ids": torch.cat([inputs["position_ids"], position_B1], 1)
            if old
            else position_B1,
        }
    return [tuple(ids) for ids in new]


def _pick(
    logits_BV: Float[Tensor, "B V"], uniform_B: Float[Tensor, " B"], temperature: float
) -> Int[Tensor, " B"]:
    """Turn a number in [0, 1) into a token by the cumulative distribution."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    sum_BV = (logits_BV.double() / temperature).softmax(-1).cumsum(-1)
    at_B = (sum_BV <= uniform_B[:, None].double() * sum_BV[:, -1:]).sum(-1)
    return at_B.clamp(max=logits_BV.shape[-1] - 1)


def sampled_example(
    example: Example, prompt: tuple[int, ...], new: tuple[int, ...], max_length: int
) -> Example | None:
    """Return a sampled text as a row whose new tokens are scored; None where none fits.

    Args:
        example: The row the prompt is of; gives unit and label.
        prompt: Its prompt.
        new: What was sampled.
        max_length: Tokens kept at most.
    """
    ids = (*prompt, *new)[:max_length]
    count = len(ids) - len(prompt)
    if count <= 0:
        return None
    label = example.label if isinstance(example.label, int) else max(example.label)
    return Example(ids, (False,) * len(prompt) + (True,) * count, label, example.unit)
