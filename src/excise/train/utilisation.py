"""Model FLOPs utilisation: what a training computes, as a share of what its device could.

Operations are counted, not derived from a formula: the first step of a run is watched, teachers,
frozen parts and adapters included, and later steps are taken to cost as much a token. With
`fit.activation_checkpointing` what is computed again is counted too, which the literature calls
hardware utilisation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

PEAKS: Mapping[str, float] = {
    "A100": 312e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
    "A10": 125e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
}
"""Dense bfloat16 operations a second by the makers' data sheets (float32 accumulators, no
sparsity), by words of the name that the device gives; the first that fits."""


def peak_flops(name: str) -> float | None:
    """Return the bfloat16 operations a second of a device by its name; None where not known.

    A slice of a GPU (MIG) has a share of the peak that its name does not tell.
    """
    words = re.split(r"[\s-]+", name)
    if "MIG" in words:
        return None
    return next((peak for known, peak in PEAKS.items() if set(known.split()) <= set(words)), None)


class _Counter(TorchDispatchMode):
    """Adds up the operations of what runs inside, and leaves it as it is.

    `FlopCounterMode` takes some operations apart in order to count them, which rounds otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class Utilisation:
    """Counts the first step of a run, and says of later ones how busy they kept the device.

    Attributes:
        peak: Operations a second of one device; None where not known: nothing is counted then.
        each: Operations a token of this process costs; None before a step was counted.
    """

    def __init__(self, peak: float | None) -> None:
        """Hold the peak of a device."""
        self.peak = peak
        self.each: float | None = None
        self._counter: _Counter | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what the block computes, if no step was counted yet."""
        if self.peak is None or self.each is not None:
            yield
            return
        with _Counter() as self._counter:
            yield

    def of(self, tokens: float, seconds: float) -> float | None:
        """Return the utilisation of a step; None of the one that was watched.

        Args:
            tokens: Tokens that this process read, a mean over processes.
            seconds: What the step took.
        """
        if self._counter is not None:
            if tokens:
                self.each = self._counter.total / tokens
            else:  # pictures: nothing to count by
                self.peak = None
            self._counter = None
            return None
        if self.peak is None or self.each is None:
            return None
        return self.each * tokens / (seconds * self.peak)


def utilisation_on(device: torch.device | str, dtype: torch.dtype) -> Utilisation:
    """Return what measures trainings there; peaks are known of bfloat16 on some GPUs."""
    device = torch.device(device)
    known = device.type == "cuda" and dtype == torch.bfloat16
    return Utilisation(peak_flops(torch.cuda.get_device_name(device)) if known else None)
