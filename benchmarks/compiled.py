"""What `torch.compile` of the blocks buys a training step, and what it does to the numbers.

Two models of the same weights take the library's plain step on the same batches, by turns; of one
every block is compiled (`nn.Module.compile`). Prints the ratio of their median times (of this
process on a CPU), what compiling took, and the largest difference of a gradient as a share of the
largest gradient. Appends a row to `results.csv`.

    python benchmarks/compiled.py [--device cuda] [--dtype bfloat16] [--width 512] [--blocks 8]
        [--rows 8] [--tokens 128] [--pairs 10] [--no-save]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from typing import Any

import torch
from measuring import timed
from results import save

from excise.data.stream import Batch
from excise.losses import nll
from excise.models.anatomy import backbone
from excise.models.names import modules_by_name
from excise.models.tiny import tiny_model

VOCAB = 4096


def batch_of(options: argparse.Namespace, number: int) -> Batch:
    """Return rows of noise."""
    draw = torch.Generator().manual_seed(number)
    ids_BT = torch.randint(4, VOCAB, (options.rows, options.tokens), generator=draw)
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    units = tuple(map(str, range(options.rows)))
    return Batch(ids_BT, real_BT, real_BT, torch.zeros_like(ids_BT), units).to(
        torch.device(options.device)
    )


def step(model: Any, batch: Batch) -> None:
    """Go forward and back once."""
    model.zero_grad()
    logits_BTV = model(**batch.inputs, use_cache=False).logits
    total, count = nll(logits_BTV, batch)
    (total / count).backward()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Return what compiling costs and buys."""
    models = []
    for _ in range(2):
        made = tiny_model(
            "llama", seed=0, vocab=VOCAB, width=options.width, blocks=options.blocks,
            max_position_embeddings=options.tokens,
        )  # fmt: skip
        models.append(made.to(options.device, getattr(torch, options.dtype)))
    eager, compiled = models
    named = modules_by_name(compiled)
    for name in backbone(compiled).blocks:
        named[name].compile()
    batches = [batch_of(options, i) for i in range(2)]
    first, _ = timed(options.device, lambda: step(compiled, batches[0]))
    step(eager, batches[0])
    pairs = zip(eager.parameters(), compiled.parameters(), strict=True)
    apart = max(float((a.grad - b.grad).abs().max() / a.grad.abs().max()) for a, b in pairs)
    clock = 0 if options.device.startswith("cuda") else 1
    taken: dict[int, list[float]] = {0: [], 1: []}
    for i in range(options.pairs):
        for which, model in enumerate(models):
            work = partial(step, model, batches[i % 2])
            taken[which].append(timed(options.device, work)[clock])
    plain, fast = (statistics.median(times) for times in taken.values())
    return {"eager": plain, "ratio": fast / plain, "first": first, "apart": apart}


def main() -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    found = measure(options)
    print(
        f"compiled {found['ratio']:.3f} of an eager step ({found['eager']:.3f} s), after a first "
        f"one of {found['first']:.0f} s; gradients differ by {found['apart']:.1e} of their largest"
    )
    if not options.no_save:
        facts = {
            "variant": "compiled blocks",
            "width": options.width, "rows": options.rows, "tokens": options.tokens,
            "dtype": options.dtype, "seconds": round(found["eager"], 5),
            "ratio": round(found["ratio"], 4),
        }  # fmt: skip
        save("compiled", facts, options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
