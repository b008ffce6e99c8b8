"""Model FLOPs utilisation of distillation: a student of 100M parameters towards a teacher its size.

Steps are those of `undo`: the library's loop and loss, a frozen teacher beside the student, float32
master weights. The operations of a pass forward and back are counted as steps count them; prints
them over the median seconds of steps after the first three, as a share of the peak of the maker's
data sheet. On a device whose peak is not known, the speed of one matrix product of `--matrix`
squared stands for it, and it is said.
Appends a row to `results.csv` and fails below `UTILISED` on a GPU.

    python benchmarks/distil.py [--device cuda] [--dtype bfloat16] [--width 768] [--blocks 12]
        [--vocab 32768] [--rows 16] [--tokens 1024] [--steps 12] [--no-save]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import save

from excise.core.context import Context
from excise.data.stream import Batch
from excise.methods.distillation.distil import Distillation
from excise.methods.distillation.targets import FromOriginal
from excise.methods.distillation.teachers import Frozen
from excise.models.head import head_of
from excise.models.tiny import tiny_model
from excise.train.fit import FitConfig, fit
from excise.train.utilisation import Utilisation, utilisation_on

UTILISED = 0.4
UNCOUNTED = 3
"""First steps, which warm up caches."""


def product_speed(device: str, dtype: torch.dtype, size: int) -> float:
    """Return the operations a second of one large matrix product, the best of five."""
    square = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        float((square @ square)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def batch_of(options: argparse.Namespace, number: int) -> Batch:
    """Return rows of noise."""
    draw = torch.Generator().manual_seed(number)
    ids_BT = torch.randint(4, options.vocab, (options.rows, options.tokens), generator=draw)
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    units = tuple(map(str, range(options.rows)))
    return Batch(ids_BT, real_BT, real_BT, torch.zeros_like(ids_BT), units)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return utilisation, tokens a second and parameters of one training."""
    dtype = getattr(torch, options.dtype)
    peak = utilisation_on(options.device, dtype).peak
    known = peak is not None
    peak = peak or product_speed(options.device, dtype, options.matrix)
    models = []
    for seed in (0, 1):
        made = tiny_model(
            "llama", seed=seed, vocab=options.vocab, width=options.width, blocks=options.blocks,
            max_position_embeddings=options.tokens,
        )  # fmt: skip
        models.append(made.to(options.device, dtype))
    student, teacher = models
    teacher.eval().requires_grad_(False)
    task = Distillation(
        FromOriginal(), {"original": Frozen("original", teacher, head_of(teacher))}, {}
    )
    batches = [batch_of(options, i) for i in range(4)]
    meter = Utilisation(peak)
    read = batches[0].to(torch.device(options.device))
    with meter.watch():
        task.loss(student, read)["divergence"].sum.backward()
    meter.of(read.num_tokens, 1.0)
    student.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        ctx = Context(Path(folder), device=torch.device(options.device), dtype=dtype)
        config = FitConfig(steps=options.steps, lr=1e-4)
        steps = fit(
            student, lambda step: [batches[step % 4]], task.loss, config, ctx, counts=task.counts()
        )
        seconds = statistics.median([step.seconds for step in steps][UNCOUNTED:])
    return {
        "parameters": sum(p.numel() for p in student.parameters()),
        "known": known,
        "peak": peak,
        "utilisation": meter.of(read.num_tokens, seconds),
        "tokens_per_second": read.num_tokens / seconds,
    }


def main() -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--matrix", type=int, default=4096)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    found = measure(options)
    of = "of its data sheet" if found["known"] else f"of a product of {options.matrix} squared"
    print(
        f"{found['parameters'] / 1e6:.0f}M parameters: {found['utilisation']:.1%} of "
        f"{found['peak'] / 1e12:.3g} TFLOP/s {of}; "
        f"{found['tokens_per_second']:,.0f} tokens a second"
    )
    if not options.no_save:
        facts = {
            "variant": "distillation",
            "width": options.width, "rows": options.rows, "tokens": options.tokens,
            "dtype": options.dtype, "vocab": options.vocab,
            "utilisation": round(found["utilisation"], 4),
            "tokens_per_second": round(found["tokens_per_second"]),
        }  # fmt: skip
        save("distil", facts, options.device)
    if options.device.startswith("cuda") and found["utilisation"] < UTILISED:
        print(f"misses its target: utilisation {found['utilisation']:.2f}, below {UTILISED}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
