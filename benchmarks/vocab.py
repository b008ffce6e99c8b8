"""Losses over a large vocabulary: the plain ones against those formed in chunks.

Forward and backward of one loss, from hidden states and head to gradients of both, in pairs that
take turns, so that what else the machine does hits both. Seconds are the best of the rounds;
memory is the peak beyond inputs, gradients included, as torch's profiler (or the GPU's allocator)
sees it. Prints ratios, appends rows to `results.csv`, and fails where a loss in chunks takes more
than a fifth of the memory of the plain one or more than 1.1 times its seconds.

    python benchmarks/vocab.py [--losses nll kl uniform] [--vocab 131072] [--tokens 4096]
        [--width 256] [--rounds 3] [--device cuda] [--dtype bfloat16] [--no-save]

Shape legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import peak, timed
from results import save
from torch import Tensor
from torch.nn import functional as F

from excise import losses
from excise.core.errors import UserError
from excise.models.head import Head
from excise.train.vocab import HiddenTarget, chunked_kl, chunked_nll, chunked_uniform

MEMORY, SECONDS = 0.2, 1.1
COPIES = {"nll": 4, "kl": 8, "uniform": 6}
"""Float32 [tokens, vocabulary] tensors the plain loss may hold, generously counted."""
Loss = Callable[[], Tensor]


def cases(options: argparse.Namespace) -> tuple[list[Tensor], dict[str, tuple[Loss, Loss]]]:
    """Return the tensors that get gradients, and each loss as (plain, in chunks)."""
    draw = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=draw) * shape[-1] ** -0.25
        return made.to(options.device, options.dtype)

    hidden_ND = tensor(options.tokens, options.width).requires_grad_()
    weight_VD = tensor(options.vocab, options.width).requires_grad_()
    teacher = HiddenTarget(tensor(options.tokens, options.width), Head(tensor(*weight_VD.shape)))
    label_N = torch.randint(options.vocab, (options.tokens,), generator=draw).to(options.device)
    all_1N = torch.ones((1, options.tokens), dtype=torch.bool, device=options.device)
    head = Head(weight_VD)

    def plain_nll() -> Tensor:
        return F.cross_entropy(head.logits(hidden_ND).float(), label_N, reduction="sum")

    def plain_kl() -> Tensor:
        with torch.no_grad():
            goal_NV = teacher.head.logits(teacher.hidden_ND)
        return losses.forward_kl(goal_NV[None], head.logits(hidden_ND)[None], all_1N)[0]

    def plain_uniform() -> Tensor:
        return losses.kl_to_uniform(head.logits(hidden_ND)[None], all_1N)[0]

    return [hidden_ND, weight_VD], {
        "nll": (plain_nll, lambda: chunked_nll(hidden_ND, head, label_N, engine="torch")[0]),
        "kl": (plain_kl, lambda: chunked_kl(hidden_ND, head, teacher)[0]),
        "uniform": (plain_uniform, lambda: chunked_uniform(hidden_ND, head)[0]),
    }


def step(loss: Loss, leaves: list[Tensor]) -> float:
    """Run a loss forward and backward; return its value."""
    total = loss()
    total.backward()
    for leaf in leaves:
        leaf.grad = None
    return float(total.detach())


def enough(options: argparse.Namespace, name: str) -> None:
    """Refuse what would not fit into this machine's memory."""
    needed = COPIES[name] * options.tokens * options.vocab * 4
    info = Path("/proc/meminfo")
    if options.device == "cpu" and info.is_file():
        line = next(x for x in info.read_text().splitlines() if x.startswith("MemAvailable"))
        free = int(line.split()[1]) * 1024
        if needed > free:
            raise UserError(
                f"the plain {name} may take {needed / 2**30:.0f} GiB and {free / 2**30:.0f} GiB "
                "are free; give fewer --tokens or other --losses"
            )


def measure(options: argparse.Namespace, name: str, leaves: list[Tensor], pair: Any) -> list[str]:
    """Measure one loss both ways, print, save, and return what missed its limit."""
    enough(options, name)
    plain, chunked = pair
    work = {"plain": lambda: step(plain, leaves), "chunked": lambda: step(chunked, leaves)}
    values: dict[str, float] = {}
    found: dict[str, dict[str, float]] = {way: {"seconds": float("inf")} for way in work}
    for way, run in work.items():

        def once(way: str = way, run: Callable[[], float] = run) -> None:
            values[way] = run()

        found[way]["peak"] = peak(options.device, once)
    for _ in range(options.rounds):
        for way, run in work.items():
            found[way]["seconds"] = min(found[way]["seconds"], timed(options.device, run)[0])
    off = abs(values["chunked"] - values["plain"]) / abs(values["plain"])
    memory = found["chunked"]["peak"] / found["plain"]["peak"]
    seconds = found["chunked"]["seconds"] / found["plain"]["seconds"]
    print(
        f"{name:<8} plain {found['plain']['peak'] / 2**20:8.0f} MiB "
        f"{found['plain']['seconds']:7.3f} s   chunked {found['chunked']['peak'] / 2**20:8.0f} MiB "
        f"{found['chunked']['seconds']:7.3f} s   memory {memory:.3f}, seconds {seconds:.3f}, "
        f"value off by {off:.1e}"
    )
    for way, row in found.items():
        facts = {
            "variant": f"{name} {way}", "seconds": round(row["seconds"], 5),
            "peak_bytes": int(row["peak"]), "width": options.width, "tokens": options.tokens,
            "dtype": str(options.dtype)[6:], "vocab": options.vocab,
        }  # fmt: skip
        if way == "chunked":
            facts |= {"ratio": round(seconds, 4), "memory_ratio": round(memory, 4)}
        if not options.no_save:
            save("vocab", facts, options.device)
    missed = []
    if memory > MEMORY:
        missed.append(f"{name} in chunks takes {memory:.2f} of the memory, more than {MEMORY}")
    if seconds > SECONDS:
        missed.append(f"{name} in chunks takes {seconds:.2f} of the seconds, more than {SECONDS}")
    if off > 1e-3:
        missed.append(f"{name} in chunks is off by {off:.1e}")
    return missed


def main() -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--losses", nargs="+", default=list(COPIES), choices=list(COPIES))
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    options.dtype = getattr(torch, options.dtype)
    leaves, pairs = cases(options)
    print(
        f"vocabulary {options.vocab}, {options.tokens} tokens, width {options.width}, "
        f"{str(options.dtype)[6:]}, {options.device}"
    )
    missed = []
    try:
        for name in options.losses:
            missed += measure(options, name, leaves, pairs[name])
    except UserError as error:
        print(error)
        return 2
    for line in missed:
        print(f"beyond the limit: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
