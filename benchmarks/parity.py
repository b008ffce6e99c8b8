"""Every method on a device beside the CPU: the first losses, and what the edited models answer.

Methods run two steps from the same start in float32, TF32 off. Losses of the first step, before any
weight moved, may differ by rounding (`LOSS`, as a share); answers of the edited models by `SHARE`
of what the method moved them by, the bound that padding and batch split are held to in tests.
Prints a line a method, writes a table where asked to, and fails where one differs by more.

    python -m benchmarks.parity [--device cuda] [--families llama] [--methods rmu npo] [--csv FILE]
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tests.matrix.test_methods import CHAOTIC, domain_for, made
from torch import Tensor

from excise.core.context import Context
from excise.methods import METHODS
from excise.models.folder import quiet
from excise.testing import toy_start
from excise.testing.methods import FAMILIES, SHARE, map_fits, outputs, shortened

LOSS = 1e-4
STEPS = 2


def applied(name: str, family: str, device: str, folder: Path) -> tuple[list[float], Tensor, float]:
    """Return the first losses of a method on a device, what its model answers, and how far it went.

    The last is the mean distance of the answers from those of the start.
    """
    losses: list[float] = []

    def note(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step" and data["step"] == 1 and "loss" in data:
            losses.append(data["loss"])

    told = {"log_every": 1}
    method = shortened(made(name, family), STEPS)
    method = map_fits(method, lambda fit: fit.model_copy(update=told))
    start = toy_start(folder / "start", family)
    domain = domain_for(name)
    work = folder / "work"
    work.mkdir()
    ctx = Context(work, seed=5, device=torch.device(device), emit=note)
    answers = outputs(method.apply(start, domain, ctx).checkpoint, domain)
    return losses, answers, float((answers - outputs(start, domain)).abs().mean())


def compared(name: str, family: str, device: str) -> dict[str, Any]:
    """Return how far a method on a device is from itself on the CPU."""
    found = []
    for where in ("cpu", device):
        with tempfile.TemporaryDirectory() as folder:
            found.append(applied(name, family, where, Path(folder)))
    (losses, answers, moved), (there, other, _) = found
    pairs = zip(losses, there, strict=True)
    loss = max((abs(a - b) / max(abs(a), 1e-9) for a, b in pairs), default=0.0)
    apart = float((answers - other).abs().mean())
    share = apart / moved if moved else float(apart > 0)
    within = loss <= LOSS and (share <= SHARE or name in CHAOTIC)
    return {"method": name, "family": family, "loss": loss, "answers": share, "within": within}


def main(words: Sequence[str] | None = None) -> int:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--families", nargs="+", default=["llama"], choices=FAMILIES)
    parser.add_argument("--methods", nargs="+", default=sorted(METHODS), choices=sorted(METHODS))
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    rows = []
    with quiet():
        for name in options.methods:
            for family in options.families:
                row = compared(name, family, options.device)
                rows.append(row)
                print(
                    f"{name:<20} {family:<9} first losses off by {row['loss']:.1e}, answers by "
                    f"{row['answers']:.1e} of what it moved{'' if row['within'] else '  TOO FAR'}",
                    flush=True,
                )
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    far = [f"{row['method']} on {row['family']}" for row in rows if not row["within"]]
    print(f"{len(rows)} compared on {options.device}; too far: {', '.join(far) or 'none'}")
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
