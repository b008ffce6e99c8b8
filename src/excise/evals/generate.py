"""Free greedy generation: what the model says when nobody offers it the answer.

Forced choice overstates what a model knows; this is the check beside it.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from excise.core.errors import UserError
from excise.data.domain import Row
from excise.data.stream import Example, collate, encode_row, pair_of
from excise.evals.tokens import device_of, evaluating, logits_at, pad_id
from excise.models.endpoint import HostedModel
from excise.models.limits import carries_state, readable

DEFINITION = (
    "generate@3: 1 if a greedy continuation contains the expected text as whole words and numbers, "
    "in as many first lines as it has, ignoring case, punctuation and articles, else 0"
)

MAX_NEW = 64
"""New tokens at most."""


@dataclass(frozen=True)
class Prompt:
    """What the model is given and what it should say.

    Attributes:
        ids: Token ids of the prompt.
        text: The prompt as text.
        expected: The right continuation as text.
        room: New tokens it may use: twice the expected ones plus eight.
        begun: End of the prompt that the first new token spells too; see `encode_pair`.
    """

    ids: tuple[int, ...]
    text: str
    expected: str
    room: int
    begun: str = ""


def prompt_of(row: Row, tokenizer: Any, *, max_length: int = 128) -> Prompt:
    """Split a row into prompt and expected answer.

    A completion or a question is asked with its prompt, a conversation up to its last assistant
    turn, a plain text with its first half.

    Args:
        row: Any row.
        tokenizer: The model's tokenizer.
        max_length: Tokens of the whole row at most.

    Returns:
        The prompt.
    """
    example = encode_row(row, tokenizer, max_length=max_length)
    last = len(example.target) - 1
    while not example.target[last]:
        last -= 1
    start = last
    while start > 0 and example.target[start - 1]:
        start -= 1
    if row.kind == "text":
        start = max(1, min(len(example.ids) // 2, 32))
    start = max(start, 1)
    ids = example.ids[:start]
    room = min(MAX_NEW, 2 * (last + 1 - start) + 8)
    if row.kind in ("completion", "choice"):
        expected = row.completion if row.kind == "completion" else row.choices[row.answer]
        begun = pair_of(row, tokenizer).overlap
        return Prompt(ids, row.prompt.rstrip(), expected.strip(), room, begun)
    text = _decode(tokenizer, ids)
    if row.kind == "chat":
        said = [content for role, content in row.messages if role == "assistant"]
        return Prompt(ids, text, said[-1].strip(), room)
    return Prompt(ids, text, _decode(tokenizer, example.ids[start:]), room)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def continue_greedily(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 64,
    device: torch.device | None = None,
) -> list[str | None]:
    """Return the greedy continuation of every prompt, in its room, up to the end token.

    Prompts are padded on the left and read in batches of like length (`same_padding`); a
    continuation ends where the model's positions do. Nothing of the model's generation
    configuration (sampling, penalties) applies.

    Args:
        model: A causal model; its mode is restored. A hosted one is asked the text of the prompts.
        tokenizer: Its tokenizer.
        prompts: What to continue.
        batch_size: Prompts at once.
        device: Where the inputs go; None takes the model's.

    Returns:
        The new text of each, in order; None where the model gives NaN in place of a token.
    """
    if isinstance(model, HostedModel):
        return list(model.answer([(p.text, p.room) for p in prompts]))
    rooms = [room_of(model, len(p.ids), p.room) for p in prompts]
    out: list[str | None] = [None] * len(prompts)
    with evaluating(model):
        for part in same_padding(model, [len(p.ids) for p in prompts], rooms, batch_size):
            new = _continue(
                model, tokenizer, [replace(prompts[i], room=rooms[i]) for i in part], device
            )
            for i, ids in zip(part, new, strict=True):
                if ids is not None:
                    text = _decode(tokenizer, ids)
                    out[i] = text.removeprefix(prompts[i].begun.strip()).strip()
    return out


def room_of(model: Any, read: int, room: int) -> int:
    """Return how many new tokens a model can say behind `read` tokens, `room` at most."""
    # The last new token is predicted and not read.
    return min(room, readable(model, read + room) - read + 1)


def same_padding(
    model: Any, lengths: Sequence[int], rooms: Sequence[int], batch_size: int
) -> Iterator[list[int]]:
    """Yield the indices of prompts that may be continued in one batch, padded on the left.

    Padding changes nothing where attention hides it. A recurrent state remembers it, and a table
    of positions may not have room for it: there prompts of one length alone share a batch.

    Args:
        model: A causal model.
        lengths: Tokens of each prompt.
        rooms: New tokens that each may get.
        batch_size: Prompts at once at most.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    reach = max(lengths, default=0) + max(rooms, default=0) - 1
    alike = carries_state(model) or readable(model, reach) < reach
    part: list[int] = []
    for i in order:
        if part and (len(part) >= batch_size or (alike and lengths[i] != lengths[part[0]])):
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def _continue(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], device: torch.device | None
) -> list[list[int] | None]:
    """Continue one batch; return new ids without the end token, None for NaN."""
    examples = [Example(p.ids, (False,) * len(p.ids), 0, "") for p in prompts]
    batch = collate(examples, pad_id=pad_id(tokenizer), padding_side="left")
    batch = batch.to(device or device_of(model))
    ends = _ends(model, tokenizer)
    inputs = dict(batch.inputs)
    new: list[list[int]] = [[] for _ in prompts]
    live = [True] * len(prompts)
    broken = [False] * len(prompts)
    cache: Any = None
    for step in range(max(p.room for p in prompts)):
        wanted_BT = torch.zeros(
            inputs["input_ids"].shape, dtype=torch.bool, device=batch.ids_BT.device
        )
        wanted_BT[:, -1] = True
        extra: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        extra["use_cache"] = not carries_state(model)
        logits_BV, output = logits_at(model, {**inputs, **extra}, wanted_BT)
        next_B = logits_BV.argmax(-1)
        for i, (token, top) in enumerate(zip(next_B.tolist(), logits_BV.amax(-1).tolist())):
            broken[i] = broken[i] or (live[i] and not math.isfinite(top))
            live[i] = live[i] and token not in ends and step < prompts[i].room and not broken[i]
            if live[i]:
                new[i].append(token)
        if not any(live):
            break
        cache = getattr(output, "past_key_values", None)
        inputs = _next_inputs(inputs, next_B, cached=cache is not None)
    return [None if bad else ids for ids, bad in zip(new, broken, strict=True)]


def _next_inputs(inputs: dict[str, Any], next_B: torch.Tensor, *, cached: bool) -> dict[str, Any]:
    """Append the new tokens; with a cache the model reads only them."""
    next_B1 = next_B[:, None]
    mask_BT = inputs["attention_mask"]
    position_B1 = inputs["position_ids"][:, -1:] + 1
    return {
        "input_ids": next_B1 if cached else torch.cat([inputs["input_ids"], next_B1], 1),
        "attention_mask": torch.cat([mask_BT, torch.ones_like(next_B1)], 1),
        "position_ids": position_B1
        if cached
        else torch.cat([inputs["position_ids"], position_B1], 1),
    }


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids that end a text: the tokenizer's, and what generation configs name."""
    ends: set[int] = set()
    config = getattr(model, "generation_config", None)
    for value in (getattr(tokenizer, "eos_token_id", None), getattr(config, "eos_token_id", None)):
        if isinstance(value, int):
            ends.add(value)
        elif isinstance(value, list | tuple):
            ends.update(int(v) for v in value)
    return ends


_WORD = re.compile(r"(?<!\w)[-\u2212]\d+(?:[.,]\d+)*|\d+(?:[.,]\d+)*(?!\w)|\w+")
"""A number with its sign and its decimals, or a word."""

_HAN = re.compile(r"(?<=[\u3040-\u30ff\u3400-\u9fff])\s+(?=[\u3040-\u30ff\u3400-\u9fff])")
"""White space between letters of scripts that have none there; some tokenizers put it in."""


def normal(text: str, *, articles: bool = False) -> str:
    """Return text as lower-case words and numbers, one space between.

    Args:
        text: Any text.
        articles: Whether English articles stay.
    """
    text = _HAN.sub("", unicodedata.normalize("NFKC", text).casefold())
    dropped = () if articles else ("a", "an", "the")
    words = (word.replace("\u2212", "-") for word in _WORD.findall(text))
    return " ".join(word for word in words if word not in dropped)


def says(output: str, expected: str) -> bool:
    """Return whether `output` contains `expected` as whole words.

    The first line of the output counts, or as many as the expected text has.
    """
    said = " ".join(output.strip().splitlines()[: len(expected.strip().splitlines())])
    if normal(expected):
        return f" {normal(expected)} " in f" {normal(said)} "
    # Of an article alone, or of punctuation, nothing else is left to compare.
    bare = normal(expected, articles=True)
    if bare:
        return f" {bare} " in f" {normal(said, articles=True)} "
    return bool(said) and expected.strip() in said


def generate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    max_length: int = 128,
    batch_size: int = 64,
    device: torch.device | None = None,
) -> list[float]:
    """Return 1.0 for every row whose greedy continuation says the expected text, else 0.0.

    NaN stands for a row where the model gives no numbers.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        rows: Completions, questions or conversations.
        max_length: Tokens of a row at most.
        batch_size: Rows at once.
        device: Where the inputs go; None takes the model's.

    Raises:
        UserError: If a row is plain text, which has no answer to look for.
    """
    prompts = prompts_of(rows, tokenizer, max_length=max_length)
    outputs = continue_greedily(model, tokenizer, prompts, batch_size=batch_size, device=device)
    return [
        math.nan if o is None else float(says(o, p.expected))
        for o, p in zip(outputs, prompts, strict=True)
    ]


def prompts_of(rows: Sequence[Row], tokenizer: Any, *, max_length: int) -> list[Prompt]:
    """Return the prompts of rows that have an answer.

    Args:
        rows: Completions, questions or conversations.
        tokenizer: The model's tokenizer.
        max_length: Tokens of a row at most.

    Raises:
        UserError: If a row is plain text.
    """
    for row in rows:
        if row.kind == "text":
            raise UserError(
                f"unit '{row.unit}' is plain text and has no answer to look for; "
                "score it with text_loss"
            )
    return [prompt_of(row, tokenizer, max_length=max_length) for row in rows]


def continuations(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, max_length: int = 128, max_new: int = 32
) -> list[tuple[str, str, str]]:
    """Return (prompt, expected, greedy continuation) of every row, for samples of a report.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        rows: Rows of any shape.
        max_length: Tokens of a row at most.
        max_new: New tokens at most.
    """
    length = readable(model, max_length)
    prompts = [prompt_of(row, tokenizer, max_length=length) for row in rows]
    short = [replace(p, room=min(p.room, max_new)) for p in prompts]
    outputs = continue_greedily(model, tokenizer, short)
    return [(p.text, p.expected, o or "") for p, o in zip(prompts, outputs, strict=True)]
