"""Topics of a domain, and the control vector of each.

Shape legend: D residual width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from excise.core.context import Context
from excise.core.disk import expand
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.methods.tuning import forget_rows


def topics_of(domain: Domain) -> list[str]:
    """Return the capabilities that have rows to forget.

    Raises:
        UserError: If there is none.
    """
    forget_rows(domain)
    return [topic for topic, rows in domain.forget.items() if rows]


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
            f"'{name}' has {len(values)} values for {len(topics)} topics "
            f"({', '.join(topics)}); give one value, or one for each"
        )
    return dict(zip(topics, values, strict=True))


def control_vector(width: int, topic: str, ctx: Context) -> Float[Tensor, " D"]:
    """Return a unit vector of uniform [0, 1) entries, sampled for each topic by itself.

    Args:
        width: Entries.
        topic: The topic.
        ctx: Gives the seed.

    Source:
        centerforaisafety/wmdp@bc5e1ba (MIT), rmu/unlearn.py: entries are neither Gaussian nor
        centred, so that the vectors of two topics have a cosine of about 0.75.
    """
    u_D = torch.rand(width, generator=ctx.generator(f"rmu.control.{topic}"))
    unit_D: Tensor = u_D / u_D.norm()
    return unit_D


def read_control_vectors(
    path: str, topics: Sequence[str], width: int
) -> dict[str, Float[Tensor, " D"]]:
    """Read control vectors that another run saved.

    Args:
        path: A safetensors file with one vector per topic.
        topics: Names that must be there.
        width: Entries of each.

    Raises:
        UserError: If the file or a topic is missing, or a vector has another width.
    """
    file = expand(path)
    if not file.is_file():
        raise UserError(f"rmu: 'controls' names {path}, which is no file")
    try:
        vectors: dict[str, Tensor] = load_file(file)
    except SafetensorError:
        raise UserError(f"rmu: {path} is no safetensors file; name one that a run saved") from None
    for topic in topics:
        if topic not in vectors or tuple(vectors[topic].shape) != (width,):
            raise UserError(
                f"rmu: {path} holds no vector of {width} entries for topic '{topic}'; it has "
                + ", ".join(f"{n} {list(t.shape)}" for n, t in vectors.items())
            )
    return {topic: vectors[topic] for topic in topics}
