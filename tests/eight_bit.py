"""The real bitsandbytes: 8-bit moments resume to the bit, and are bytes.

Run by `make bitsandbytes-test`, which puts the package into a folder of its own: peft imports it
wherever it is installed, and `make test` is to run without it.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.unit.test_lean_steps import same, trained


def wrong(folder: Path, *, in_backward: bool) -> list[str]:
    """Return what is not as it should be of a run that stops and goes on."""
    change = {"optimizer": "adamw_8bit", "in_backward": in_backward}
    whole, _ = trained(change)
    trained(change, folder=folder, stop=3)
    state = load_file(next(folder.glob("step-*")) / "state.safetensors")
    dtypes = {n.rpartition("/")[2]: t.dtype for n, t in state.items() if "optimizer/0/1/" in n}
    resumed, _ = trained(change, folder=folder)
    plain, _ = trained({"optimizer": "adamw"})
    checks = {
        "moments are no bytes": dtypes["state1"] == dtypes["state2"] == torch.uint8,
        "resumed is not uninterrupted": same(whole, resumed),
        "8-bit moments change nothing": not same(whole, plain),
        "a kernel of the hub was asked for": "kernels" not in sys.modules,
    }
    return [sentence for sentence, holds in checks.items() if not holds]


def main() -> int:
    """Run both ways and return 1 if anything is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        found = [
            f"in_backward {inside}: {sentence}"
            for inside in (False, True)
            for sentence in wrong(Path(folder) / str(inside), in_backward=inside)
        ]
    print("\n".join(found) or f"bitsandbytes {version('bitsandbytes')}: 8-bit moments are right")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
