"""A prompt and its answer as tokens: one way for training, scoring and generation.

Both are tokenized as one text, because that is what a model reads in use, and cut where the
answer's first character stands. Tokenized apart they are other tokens: a tokenizer may put a space
before every text, an end mark behind it, or join the two across the border.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from excise.core.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pair:
    """Tokens of a prompt and of the answer behind it.

    Attributes:
        head: Ids of the prompt, behind the marks that begin every text.
        tail: Ids of the answer, from the first token on that holds a character of it.
        overlap: End of the prompt that the first token of the answer holds too; mostly empty.
    """

    head: tuple[int, ...]
    tail: tuple[int, ...]
    overlap: str = ""


def leading_specials(tokenizer: Any) -> list[int]:
    """Return the ids that this tokenizer puts before every text, such as one BOS; often none."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    starts = range(len(whole) - len(plain) + 1) if plain else ()
    return whole[: next((i for i in starts if whole[i : i + len(plain)] == plain), 0)]


def with_specials(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Return `ids` behind the tokenizer's leading marks, where they do not begin with them."""
    marks = leading_specials(tokenizer)
    return list(ids) if list(ids[: len(marks)]) == marks else [*marks, *ids]


def cut_head(head: Sequence[T], length: int, tokenizer: Any) -> tuple[T, ...]:
    """Return the last `length` tokens of a prompt at most; one that is cut keeps its marks."""
    over = max(0, len(head) - length)
    marks = len(leading_specials(tokenizer)) if over else 0
    return (*head[:marks], *head[marks + over :])[: max(0, length)]


def encode_pair(prompt: str, answer: str, tokenizer: Any) -> Pair:
    """Tokenize prompt and answer as one text and cut it.

    White space at the end of the prompt belongs to the answer, as in `lm-eval` (0.4.13,
    `TemplateLM._encode_pair`), and so does a token that holds characters of both. `lm-eval` cuts
    where the prompt's own tokens end, which is the same place unless a token spans the border or
    the tokenizer puts an end mark behind every text.

    Args:
        prompt: What the model is given.
        answer: What it should say.
        tokenizer: A `transformers` tokenizer; one without offsets is cut where the tokens of the
            whole text and of the prompt alone part.

    Returns:
        The tokens; the head is empty where there is neither prompt nor leading mark.

    Raises:
        UserError: If the two parts do not spell prompt and answer, so that no cut is exact.
    """
    cut = len(prompt.rstrip())
    text = prompt + answer
    if getattr(tokenizer, "is_fast", False):
        ids, at, start = _cut_by_offsets(text, cut, tokenizer)
    else:
        ids, at, start = _cut_by_prefix(text, cut, tokenizer)
    _check(text, cut, start, [_letters(_decoded(part, tokenizer)) for part in (ids[:at], ids[at:])])
    return Pair(tuple(with_specials(ids[:at], tokenizer)), tuple(ids[at:]), text[start:cut])


def _cut_by_offsets(text: str, cut: int, tokenizer: Any) -> tuple[list[int], int, int]:
    """Return the ids, the place of the answer's first token, and where its characters begin."""
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = list(out["input_ids"]), out["offset_mapping"]
    at = next((i for i, (_, end) in enumerate(spans) if end > cut), len(ids))
    # A tokenizer that drops white space has offsets that begin behind the border.
    start = min(cut, spans[at][0]) if at < len(ids) else cut
    first = _letters(_decoded(ids[at : at + 1], tokenizer))
    if start < cut and "\ufffd" not in first and not first.startswith(_letters(text[start:cut])):
        raise _no_cut(text[cut:])
    return ids, at, start


def _cut_by_prefix(text: str, cut: int, tokenizer: Any) -> tuple[list[int], int, int]:
    """Do the same without offsets: all tokens before the first difference are the prompt's."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    alone = list(tokenizer(text[:cut], add_special_tokens=False)["input_ids"]) if cut else []
    both = zip(ids, alone, strict=False)
    at = next((i for i, (a, b) in enumerate(both) if a != b), min(len(ids), len(alone)))
    if at == len(alone):
        return ids, at, cut
    # The tokens before the difference are both texts'; what they do not spell is in the tail.
    spelled = _letters(_decoded(ids[:at], tokenizer))
    starts = (i for i in range(cut + 1) if _letters(text[:i]) == spelled)
    return ids, at, next(starts, cut)


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))


def _letters(text: str) -> str:
    """Return a text without what tokenizers may lose: white space, case, forms of letters."""
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text)
        text = "".join(c for c in text if not unicodedata.combining(c))
    return "".join(text.casefold().split())


def _check(text: str, cut: int, start: int, parts: Sequence[str]) -> None:
    """Refuse parts that do not spell prompt and answer, where the tokenizer can spell them."""
    head, tail = parts
    if "\ufffd" in head + tail or head + tail != _letters(text):
        return  # a vocabulary of its own, or a letter cut in two: offsets alone decide
    if head != _letters(text[:start]):
        raise _no_cut(text[cut:])


def _no_cut(answer: str) -> UserError:
    return UserError(
        f"the tokenizer does not tell where the answer {answer.strip()[:40]!r} begins, so it "
        "cannot be scored exactly; use the model's fast tokenizer (tokenizer.json)"
    )
