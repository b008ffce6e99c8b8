"""What FSDP2 costs where it saves nothing: one process that cuts its model over itself.

Two runs of `fit` from equal weights on equal rows take steps in turns, one plain and one cut; the
ratio is the median over pairs of steps. Losses must agree to 1e-6. Appends a row to `results.csv`
and fails above a ratio of 1.05 on a model at least 512 wide.

    python benchmarks/scale.py [--width 512] [--blocks 4] [--rows 8] [--tokens 128] [--steps 20]
                               [--device cpu] [--no-save]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from results import save
from torch import Tensor, nn
from torch import distributed as dist

from excise.core.context import Context
from excise.models.tiny import tiny_model
from excise.train.fit import FitConfig, StepRecord, Term, fit

LIMIT = 1.05


def main() -> int:
    """Measure, print, save; return 1 above the limit."""
    parser = argparse.ArgumentParser()
    for name, value in (("width", 512), ("blocks", 4), ("rows", 8), ("tokens", 128), ("steps", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    backend = "nccl" if options.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        plain, cut = steps(options, fsdp=False), steps(options, fsdp=True)
        pairs = [(next(plain), next(cut)) for _ in range(options.steps)][2:]  # two warm up
        plain.close()
        cut.close()
    finally:
        dist.destroy_process_group()
    assert all(abs(a.loss - b.loss) <= 1e-6 for a, b in pairs)
    ratio = statistics.median(b.seconds / a.seconds for a, b in pairs)
    seconds = statistics.median(b.seconds for _, b in pairs)
    print(f"width {options.width}: a step takes {seconds:.3f} s, {ratio:.3f} times a plain one")
    if not options.no_save:
        facts = {"seconds": round(seconds, 5), "ratio": round(ratio, 4), "variant": "fsdp2 of one"}
        facts |= {"width": options.width, "rows": options.rows, "tokens": options.tokens}
        save("scale", {**facts, "dtype": "float32"}, options.device)
    return int(options.width >= 512 and ratio > LIMIT)


def steps(options: argparse.Namespace, *, fsdp: bool) -> Generator[StepRecord]:
    """Train a random model on random tokens, plain or cut.

    B rows, T tokens, V entries of the vocabulary.
    """
    device = torch.device(options.device)
    model = tiny_model("llama", width=options.width, blocks=options.blocks).to(device)
    vocab = int(model.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    shape = (options.rows, options.tokens)
    ids_BT = torch.randint(vocab, shape, generator=generator).to(device)

    def loss(model: nn.Module, ids_BT: Tensor) -> dict[str, Term]:
        logits_BTV: Any = model(ids_BT).logits[:, :-1]
        total = nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum"
        )
        return {"nll": Term(total, ids_BT[:, 1:].numel())}

    ctx = Context(work=Path("unused"), device=device, fsdp=fsdp)
    return fit(model, lambda _: [ids_BT], loss, FitConfig(steps=options.steps + 1), ctx)


if __name__ == "__main__":
    sys.exit(main())
