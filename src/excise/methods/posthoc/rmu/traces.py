"""Thinking traces of reasoning models: R2MU's two further terms of RMU.

    trace  =  mean over tokens and D of (h(trace of forget) - u_k)^2
    cot    =  mean over tokens and D of (h(trace of retain) - h0(trace of retain))^2
    AdamW step on forget + alpha_k retain + weight trace + retain_weight cot

A trace is what stands between <think> and </think> in a row, wherever the row holds it: in the
assistant's turns of a conversation, a completion, or plain text. A template that opens the trace
itself leaves only </think> in the answer; a trace that was cut has no end.

Source:
    arXiv 2506.12963; OPTML-Group/Unlearn-R2MU@dc2d6c5 (MIT by its README), unlearn_r2mu.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from excise.core.config import Config
from excise.core.errors import UserError
from excise.data.domain import Row, Rows
from excise.data.spans import rewritten
from excise.data.stream import Tokenizer

OPEN, CLOSE = "<think>", "</think>"


class Traces(Config):
    """How thinking traces are steered and kept."""

    weight: float = Field(default=1.0, ge=0)
    """Weight of the term that draws traces of forget rows to the control vector."""
    retain_weight: float = Field(default=1.0, ge=0)
    """Weight of the term that pins traces of retain rows; `alpha` does not multiply it."""
    prefix: str = "Let's reason this step by step.\n"
    """What is read before a trace to forget and its <think>."""
    tokens: int = Field(default=100, ge=1)
    """Tokens of a trace to forget."""
    retain_max_length: int = Field(default=150, ge=2)
    """Tokens of a trace to retain."""

    def forget(self, rows: Rows, tokenizer: Tokenizer, topic: str) -> Rows:
        """Return the traces of a topic's rows as texts of their own, cut to `tokens`.

        Raises:
            UserError: If there is none.
        """

        def text(trace: str) -> str:
            ids = tokenizer(trace, add_special_tokens=False)["input_ids"][: self.tokens]
            return self.prefix + OPEN + str(tokenizer.decode(ids, skip_special_tokens=True))

        return _some((_plain(row, text(trace)) for row, trace in _traces(rows)), f"topic '{topic}'")

    def retain(self, rows: Rows) -> Rows:
        """Return the traces of retain rows as texts of their own, with their end.

        Raises:
            UserError: If there is none.
        """
        return _some((_plain(row, f"{trace}{CLOSE}\n\n") for row, trace in _traces(rows)), "retain")


def trace_of(row: Row) -> str:
    """Return the thinking trace in a row, empty where there is none."""
    said = "".join(content for role, content in row.messages if role == "assistant")
    text = said or row.completion or row.text
    if OPEN not in text and CLOSE not in text:
        return ""
    return text.partition(OPEN)[2].partition(CLOSE)[0] if OPEN in text else text.partition(CLOSE)[0]


def _traces(rows: Rows) -> Iterator[tuple[Row, str]]:
    """Yield the rows that hold a trace, with it."""
    return ((row, trace) for row in rows if (trace := trace_of(row).strip()))


def _plain(row: Row, text: str) -> Row:
    """Return a row of the same unit that is nothing but a text."""
    return rewritten(row, text=text, prompt="", completion="", choices=(), answer=-1, messages=())


def _some(rows: Iterator[Row], where: str) -> Rows:
    """Return rows, or say that there is none."""
    found = tuple(rows)
    if not found:
        raise UserError(
            f"rmu: no row of {where} holds a thinking trace between {OPEN} and {CLOSE}, which "
            "'traces' steers; add rows that do, or leave 'traces' out"
        )
    return found
