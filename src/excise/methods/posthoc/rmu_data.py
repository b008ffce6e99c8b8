"""What RMU reads: topics in turn, and control vectors.

Shape legend: D residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain, Rows
from excise.data.stream import Batch, Stream, Tokenizer
from excise.methods.tuning import stream

if TYPE_CHECKING:
    from excise.methods.posthoc.rmu import RMU


def topics_of(domain: Domain) -> list[str]:
    """Return the capabilities that have rows to forget.

    Raises:
        UserError: If there is none.
    """
    topics = [name for name in domain.forget if domain.forget[name]]
    if not topics:
        raise UserError(f"domain '{domain.name}' has no forget row for the method; check the split")
    return topics


def per_topic(
    value: float | tuple[float, ...], topics: Sequence[str], name: str
) -> dict[str, float]:
    """Return one number for every topic.

    Args:
        value: One for all, or one for each.
        topics: The topics.
        name: Field the value is from.

    Raises:
        UserError: If there are more or fewer values than topics.
    """
    values = value if isinstance(value, tuple) else (value,) * len(topics)
    if len(values) != len(topics):
        raise UserError(
            f"rmu: '{name}' has {len(values)} values for {len(topics)} topics "
            f"({', '.join(topics)}); give one value, or one for each"
        )
    return dict(zip(topics, values, strict=True))


def alternate(
    method: RMU, topics: Sequence[str], domain: Domain, tokenizer: Tokenizer, ctx: Context
) -> Callable[[int], list[dict[str, Batch]]]:
    """Return batches by step: topic = step mod K, batch = step div K, retain shared by topics."""

    def reading(rows: Rows, purpose: str, length: int) -> Callable[[int], list[Batch]]:
        kept = tuple(r for r in rows if not r.text or len(r.text) > method.min_chars)
        if not kept:
            raise UserError(
                f"rmu: no row of {purpose} has more than {method.min_chars} characters; "
                "lower 'min_chars'"
            )
        made = stream(
            kept, tokenizer, method.fit, ctx,
            purpose=purpose, max_length=length, shuffle=method.order != "file",
        )  # fmt: skip
        pad = tokenizer.pad_token_id if method.pad == "pad" else tokenizer.eos_token_id
        made = replace(made, padding_side=method.padding, pad_id=pad)
        return _again(made) if method.order == "once" else made

    later = method.later_max_length or method.max_length
    forget = {
        topic: reading(domain.forget[topic], f"forget.{topic}", later if i else method.max_length)
        for i, topic in enumerate(topics)
    }
    retain = reading(domain.retain, "retain", method.max_length)

    def batches(step: int) -> list[dict[str, Batch]]:
        turn, which = divmod(step, len(topics))
        topic = topics[which]
        pairs = zip(forget[topic](turn), retain(turn), strict=True)
        return [{topic: f, "retain": r} for f, r in pairs]

    return batches


def _again(made: Stream) -> Callable[[int], list[Batch]]:
    """Read the batches of the first epoch over and over; rows that fill no batch are left out."""
    count = max(1, len(made.examples) // made.batch_size)
    return lambda step: made(step % count)


def control_vector(width: int, topic: str, ctx: Context) -> Float[Tensor, " D"]:
    """Draw a unit vector from uniform [0, 1) entries, a draw of its own for each topic."""
    u_D = torch.rand(width, generator=ctx.generator(f"rmu.control.{topic}"))
    unit_D: Tensor = u_D / u_D.norm()
    return unit_D


def read_controls(path: str, topics: Sequence[str], width: int) -> dict[str, Float[Tensor, " D"]]:
    """Read control vectors that another run saved.

    Args:
        path: A safetensors file with one vector per topic.
        topics: Names that must be there.
        width: Entries of each.

    Raises:
        UserError: If the file or a topic is missing, or a vector has another width.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"rmu: 'controls' names {path}, which is no file")
    try:
        found: Mapping[str, Tensor] = load_file(file)
    except SafetensorError:
        raise UserError(f"rmu: {path} is no safetensors file; name one that a run saved") from None
    for topic in topics:
        if topic not in found or tuple(found[topic].shape) != (width,):
            raise UserError(
                f"rmu: {path} holds no vector of {width} entries for topic '{topic}'; it has "
                + ", ".join(f"{n} {list(t.shape)}" for n, t in found.items())
            )
    return {topic: found[topic] for topic in topics}
