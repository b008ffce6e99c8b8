"""Conversations: the model's own chat template, with an exact mask of what the assistant said.

Scored are the assistant's words and the mark that ends its turn: what a model in use produces, and
nothing that the template writes for it.
"""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError

from excise.core.errors import UserError, first_line
from excise.data.domain import Row, Span
from excise.data.encoding import leading_specials
from excise.data.spans import common_length, cut_spans

_STAND_INS = ("Q1J", "X2Z", "K3V")
"""Texts that stand in for a turn; at least one shares neither first nor last letter with it."""


def render_chat(row: Row, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Render a conversation with the tokenizer's chat template.

    A template that marks its own assistant tokens (`{% generation %}`) decides. Otherwise each
    assistant turn is replaced by another text, and what differs between the two renderings is what
    the assistant said; it is checked to be that. Unlike rendering prefixes, this also holds for
    templates that render a turn differently once it is history.

    Args:
        row: A row with `messages`.
        tokenizer: The model's `transformers` tokenizer; its stubs are loose.

    Returns:
        Token ids with exactly one BOS where the tokenizer has one, and whether each is scored.

    Raises:
        UserError: If there is no chat template, it refuses the conversation, or it changes what the
            assistant said so that nothing exact can be scored.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the tokenizer has no chat template, so 'messages' cannot be rendered; give rows with "
            "'prompt' and 'completion', or a model whose tokenizer has one"
        )
    messages = [{"role": role, "content": content} for role, content in row.messages]
    if re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)):
        ids, target = _marked(messages, tokenizer, row)
    else:
        text = _render(messages, tokenizer, row)
        spans = [
            _turn_span(messages, i, text, tokenizer, row)
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        ids, target = _tokenize(text, spans, tokenizer)
    return _one_bos(ids, target, tokenizer)


def rendered_spans(row: Row, tokenizer: Any) -> tuple[str, tuple[Span, ...]]:
    """Return a conversation as its template renders it, and where its spans stand there.

    Args:
        row: A row with `messages` and spans over their contents, one line break between two.
        tokenizer: The model's `transformers` tokenizer.

    Raises:
        UserError: If the template changes what is said in a turn that has a span.
    """
    messages = [{"role": role, "content": content} for role, content in row.messages]
    text = _render(messages, tokenizer, row)
    out: list[Span] = []
    first = 0
    for i, (_, said) in enumerate(row.messages):
        spans = cut_spans(row.spans, first, first + len(said))
        first += len(said) + 1
        if not spans:
            continue
        blank = len(said) - len(said.lstrip())
        start, end = _content_span(messages, i, text, tokenizer, row)
        if text[start:end].strip() != said.strip():
            raise UserError(
                f"the chat template changes what is said in unit '{row.unit}', so its spans have "
                "no place; give the row as 'prompt' and 'completion'"
            )
        start += len(text[start:end]) - len(text[start:end].lstrip())
        for span in spans:
            a, b = (min(max(at - blank, 0), len(said.strip())) for at in (span.start, span.end))
            if a < b:
                out.append(replace(span, start=start + a, end=start + b))
    return text, tuple(out)


def _apply(messages: Sequence[dict[str, str]], tokenizer: Any, row: Row, **how: Any) -> Any:
    """Apply the template; what the template raises becomes a sentence."""
    try:
        return apply_template(messages, tokenizer, add_generation_prompt=False, **how)
    except TemplateError as error:
        raise UserError(
            f"the chat template refuses the conversation of unit '{row.unit}' ({error}); "
            "change its roles or their order"
        ) from None


_ENDS: set[str] = set()
"""Templates that were seen to end."""

_PATIENCE = 3
"""Seconds that a template may compute for one conversation."""


def apply_template(messages: Sequence[dict[str, str]], tokenizer: Any, **how: Any) -> Any:
    """Apply a tokenizer's chat template, which is a program that came with the model.

    The first time, a fork of this process is seen to come to an end of it.

    Raises:
        TemplateError: If the template refuses the conversation or has a mistake of its own.
        UserError: If it does not end, or breaks.
    """
    template = str(tokenizer.chat_template)
    if template not in _ENDS and hasattr(os, "fork"):
        _check_end(messages, tokenizer, how)
        _ENDS.add(template)
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except TemplateError:
        raise
    except Exception as error:
        raise UserError(
            f"the chat template of the model is broken ({type(error).__name__}: "
            f"{first_line(error)}); repair it, or give rows with 'prompt' and 'completion'"
        ) from None


def _check_end(messages: Sequence[dict[str, str]], tokenizer: Any, how: dict[str, Any]) -> None:
    """Raise UserError where a template computes without end or takes all memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Python 3.12 on: other threads are not forked
        pid = os.fork()
    if pid == 0:
        try:
            import resource

            # The system ends it: a power of two large numbers hears no signal of Python's.
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            used = int(time.process_time()) + _PATIENCE
            resource.setrlimit(resource.RLIMIT_CPU, (used, used))
            tokenizer.apply_chat_template(messages, **how)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        raise UserError(
            f"the chat template of the model does not end within {_PATIENCE} seconds; repair it, "
            "or give rows with 'prompt' and 'completion'"
        )


def _render(messages: Sequence[dict[str, str]], tokenizer: Any, row: Row) -> str:
    return str(_apply(messages, tokenizer, row, tokenize=False))


def _marked(
    messages: Sequence[dict[str, str]], tokenizer: Any, row: Row
) -> tuple[list[int], list[bool]]:
    """Render with a template that marks assistant tokens itself."""
    out = _apply(
        messages, tokenizer, row, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(out["input_ids"]), [bool(m) for m in out["assistant_masks"]]


def _turn_span(
    messages: Sequence[dict[str, str]], i: int, text: str, tokenizer: Any, row: Row
) -> tuple[int, int]:
    """Return where turn i's words stand in the rendered text, end mark included."""
    said = messages[i]["content"]
    start, end = _content_span(messages, i, text, tokenizer, row)
    # A template may set white space of its own around a block of thinking.
    if end <= start or "".join(text[start:end].split()) not in "".join(said.split()):
        raise UserError(
            f"the chat template changes what the assistant says in unit '{row.unit}', so it cannot "
            "be scored exactly; give the row as 'prompt' and 'completion'"
        )
    return start, end + _mark_length(text[end:], tokenizer)


def _content_span(
    messages: Sequence[dict[str, str]], i: int, text: str, tokenizer: Any, row: Row
) -> tuple[int, int]:
    """Return what of the rendered text another content of turn i would change."""
    said = messages[i]["content"].strip()
    stand_in = next(s for s in _STAND_INS if s[0] != said[0] and s[-1] != said[-1])
    other = _render(
        [*messages[:i], {**messages[i], "content": stand_in}, *messages[i + 1 :]], tokenizer, row
    )
    start = common_length(text, other)
    return start, len(text) - common_length(text[start:][::-1], other[start:][::-1])


def _mark_length(after: str, tokenizer: Any) -> int:
    """Return the length of the special token that follows a turn, white space before it included.

    Templates without one end a turn with a line break; that is the template's, not the model's.
    """
    blank = len(after) - len(after.lstrip())
    marks = [t for t in tokenizer.all_special_tokens if t and after[blank:].startswith(t)]
    marks += [
        str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values()
        if getattr(t, "special", False) and after[blank:].startswith(str(t))
    ]  # fmt: skip
    return blank + max(map(len, marks)) if marks else 0


def _tokenize(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """Tokenize a rendered text once; a token is scored when it overlaps a span."""
    if getattr(tokenizer, "is_fast", False):
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        target = [
            any(b > start and a < end for start, end in spans) for a, b in out["offset_mapping"]
        ]
        return list(out["input_ids"]), target
    ids: list[int] = []
    target = []
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    for i, (a, b) in enumerate(pairwise(edges)):
        piece = tokenizer(text[a:b], add_special_tokens=False)["input_ids"] if b > a else []
        ids += piece
        target += [i % 2 == 1] * len(piece)
    return ids, target


def _one_bos(ids: list[int], target: list[bool], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Drop doubled BOS tokens; add the tokenizer's own marks where the template has none."""
    bos = tokenizer.bos_token_id
    while bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids, target = ids[1:], target[1:]
    head = leading_specials(tokenizer)
    if ids[: len(head)] != head:
        ids, target = head + ids, [False] * len(head) + target
    # The first token is predicted from nothing.
    return ids, [False, *target[1:]] if target else []
