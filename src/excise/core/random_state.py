"""The global random states of PyTorch, for code that takes no generator: dropout, `svd_lowrank`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

CPU = torch.device("cpu")


def random_states(device: torch.device) -> dict[torch.device, Tensor]:
    """Return the states that code on `device` may draw from: the CPU's and the device's own."""
    states = {CPU: torch.get_rng_state()}
    if device.type != "cpu":
        module = torch.get_device_module(device)
        states[device] = module.get_rng_state(*_named(device))
    return states


def set_random_states(states: dict[torch.device, Tensor]) -> None:
    """Put generators back to what `random_states` returned."""
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, *_named(device))


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Draw from `seed` on the CPU and on `device`; afterwards both states are as they were.

    No other device is asked: `torch.manual_seed` seeds all there are, and takes a sixth of a
    training step of a tiny model for it.
    """
    before = random_states(device)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        module = torch.get_device_module(device)
        of_several = hasattr(module, "device")
        with module.device(device) if of_several else nullcontext():
            module.manual_seed(seed)
    try:
        yield
    finally:
        set_random_states(before)


def _named(device: torch.device) -> tuple[torch.device, ...]:
    """Return the argument that says which device is meant; Apple's takes none, there is one."""
    return () if device.type == "mps" else (device,)
