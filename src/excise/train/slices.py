"""A slice of a parameter that is trained with optimizer state of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Slice:
    """Entries `start` to `stop` of a parameter along one dimension.

    Attributes:
        param: The parameter.
        dim: Dimension that is sliced.
        start: First entry.
        stop: Entry after the last.
    """

    param: nn.Parameter
    dim: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of this slice in a tensor of the parameter's shape."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)
