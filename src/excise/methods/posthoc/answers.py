"""Other answers to the prompts of rows, in the place of those that are to be forgotten."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from excise.core.errors import UserError
from excise.data.domain import Row
from excise.data.spans import rewritten

REFUSALS: Final = (
    "I don't know.",
    "I do not know the answer to that.",
    "I'm not sure about that.",
    "I am not sure, so I would rather not guess.",
    "I'm sorry, I don't know.",
    "I'm sorry, but I can't answer that.",
    "I'm sorry, but I cannot help with that.",
    "I am sorry, I have no information about this.",
    "I have no information on that subject.",
    "I don't have information about that.",
    "I do not have information that would answer this question.",
    "I can't say.",
    "I cannot answer this question.",
    "I cannot help with this topic.",
    "I can't help with that request.",
    "I'm unable to answer that.",
    "I am unable to say anything about this.",
    "I'm not able to answer this one.",
    "I am not able to help with this question.",
    "I apologize, but this is not something that I can answer.",
    "I apologize, I do not know.",
    "I must decline to answer this.",
    "I will not answer questions about this.",
    "I won't go into that.",
    "I don't know anything about it.",
    "That is a question to which I do not know the answer.",
    "Unfortunately, I don't know.",
    "Unfortunately, I cannot help with that.",
    "Sorry, I can't tell you that.",
    "My apologies: I do not know this.",
    "As a language model, I have no answer to this.",
    "As an AI, I am not able to answer this.",
)
"""What is taught or preferred by default. Each is recognised by `excise.evals.refusal`, so that
declining is told from not knowing."""

PLAIN: Final = "use npo, which needs none"
"""What can be done with plain text."""


def with_answer(row: Row, answer: str, method: str, *, instead: str = PLAIN) -> Row:
    """Return a row with another answer to the same prompt, the last turn of a conversation.

    Args:
        row: A completion, a question or a conversation.
        answer: The new answer, without white space around it.
        method: Who asks, for the sentence.
        instead: What else can be done, for the sentence.

    Raises:
        UserError: If the row has no prompt to answer.
    """
    match row.kind:
        case "completion":
            space = row.completion[: len(row.completion) - len(row.completion.lstrip())]
            return rewritten(row, completion=space + answer)
        case "choice":
            options = (answer if i == row.answer else c for i, c in enumerate(row.choices))
            return replace(row, choices=tuple(options))
        case "chat":
            last = _last_answer(row)
            turn = (row.messages[last][0], answer)
            return rewritten(row, messages=(*row.messages[:last], turn, *row.messages[last + 1 :]))
    raise UserError(
        f"unit '{row.unit}' is plain text, and {method} puts another answer behind a prompt; give "
        f"rows with 'prompt' and 'completion', or {instead}"
    )


def question_of(row: Row) -> tuple[str, str]:
    """Return the prompt and the answer of a row that has both."""
    match row.kind:
        case "choice":
            return row.prompt.strip(), row.choices[row.answer].strip()
        case "chat":
            last = _last_answer(row)
            said = "\n".join(text for who, text in row.messages[:last] if who != "system")
            return said.strip(), row.messages[last][1].strip()
    return row.prompt.strip(), row.completion.strip()


def _last_answer(row: Row) -> int:
    """Return the place of the last turn of a conversation that is an answer."""
    return max(i for i, (who, _) in enumerate(row.messages) if who == "assistant")
