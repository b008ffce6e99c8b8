"""A slice of a parameter that is trained with optimizer state of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from excise.core.errors import UserError


@dataclass(frozen=True, eq=False)
class Slice:
    """Entries `start` to `stop` of a parameter along one dimension.

    Attributes:
        param: The parameter.
        dim: Dimension that is sliced; None for the whole parameter.
        start: First entry.
        stop: Entry after the last.
    """

    param: nn.Parameter
    dim: int | None
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of this slice in a tensor of the parameter's shape."""
        if self.dim is None:
            return tensor
        return tensor.narrow(self.dim, self.start, self.stop - self.start)

    @property
    def whole(self) -> bool:
        """Whether this is the whole parameter."""
        return self.dim is None

    @property
    def key(self) -> tuple[int, int | None, int, int]:
        """What tells one slice from another."""
        return (id(self.param), self.dim, self.start, self.stop)

    @property
    def shape(self) -> list[int]:
        """Shape of the whole parameter, followed by the slice where it is not whole."""
        span = [] if self.dim is None else [self.dim, self.start, self.stop]
        return [*self.param.shape, *span]


def as_slice(given: nn.Parameter | Slice) -> Slice:
    """Return a parameter as the slice that holds all of it."""
    return given if isinstance(given, Slice) else Slice(given, None, 0, 0)


def check_slice(one: Slice, group: str) -> None:
    """Refuse a slice that does not lie within its parameter.

    Raises:
        UserError: If it is empty or reaches beyond.
    """
    if one.dim is None:
        return
    shape = tuple(one.param.shape)
    if not 0 <= one.dim < len(shape) or not 0 <= one.start < one.stop <= shape[one.dim]:
        raise UserError(
            f"group '{group}' has the slice {one.start}:{one.stop} of dimension {one.dim}, which "
            f"does not lie within a parameter of shape {shape}"
        )


def overlaps(a: Slice, b: Slice) -> bool:
    """Return whether two slices of one parameter have an entry in common."""
    if a.dim is None or b.dim is None or a.dim != b.dim:
        return True
    return a.start < b.stop and b.start < a.stop
