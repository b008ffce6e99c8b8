"""SSD's memory and Potion's search, beside what the released code does.

Memory is what a process holds at its peak beyond the weights of one model, in units of its largest
tensor: of one pass of importance and the dampening after it. `published` keeps gradients and two
sets of importances beside the model. Potion's turn is timed without the scoring of forget rows,
which both ways pay alike: `published` restores a copy of the model, sorts all ratios for their
percentile and dampens every tensor; here the weights between two thresholds are looked up.

    python benchmarks/posthoc_importance.py [--width 512] [--turns 10] [--no-save]

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

import argparse
import copy
import gc
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import save
from torch import Tensor, nn

from excise.methods.importance import (
    SortedRatios,
    Sums,
    accumulate,
    dampen_model,
    percentile_of,
)
from excise.methods.posthoc.potion import Potion, search
from excise.models.tiny import tiny_model

VOCAB, BLOCKS, ROWS, TOKENS = 16384, 6, 2, 8
LARGEST = 3.0
"""Largest tensors that SSD may hold beside the model."""


def resident(name: str = "VmRSS") -> int:
    """Return the bytes that this process holds, or held at its peak (`VmHWM`)."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(x for x in text.splitlines() if x.startswith(name)).split()[1])


def peak(work: Callable[[], Any]) -> int:
    """Return the bytes by which the process grows at its peak while something runs."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins here
    before = resident()
    work()
    return resident("VmHWM") - before


def loss(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Return the mean loss of a batch."""
    out: Tensor = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    return out


def batches(count: int, seed: int) -> list[Tensor]:
    """Return batches of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (ROWS, TOKENS), generator=generator) for _ in range(count)]


def measured(model: nn.Module, folder: Path) -> tuple[Sums, Sums]:
    """Return sums over a few forget and retain batches."""
    forget, retain = (
        accumulate(model, batches(2, seed), loss, folder / f"{seed}.safetensors") for seed in (0, 1)
    )
    return forget, retain


def published_ssd(model: nn.Module) -> None:
    """Do as the released code does: everything in memory."""
    found = []
    for seed in (0, 1):
        sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for batch in batches(2, seed):
            model.zero_grad()
            loss(model, batch).backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                sums[name] += parameter.grad.square()
        found.append(sums)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            forget, retain = (sums[name] for sums in found)
            chosen = forget > 5.0 * retain
            parameter[chosen] *= (retain / forget)[chosen].clamp(max=1)
    model.zero_grad()


def ssd_memory(width: int) -> dict[str, float]:
    """Return the peak beyond the weights, in largest tensors, by way."""
    model = tiny_model("llama", seed=0, vocab=VOCAB, width=width, blocks=BLOCKS)
    largest = 4 * max(p.numel() for p in model.parameters())
    weights = 4 * sum(p.numel() for p in model.parameters())
    loss(model, batches(1, 2)[0]).backward()  # what activations take is there from now on
    model.zero_grad()

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            forget, retain = measured(model, Path(folder))
            dampen_model(model, forget, forget + retain, alpha=1.5)

    return {
        "weights": weights / largest,
        "ours": peak(ours) / largest,
        "published": peak(lambda: published_ssd(model)) / largest,
    }


def potion_seconds(width: int, turns: int) -> dict[str, float]:
    """Return seconds of a turn of the search by way, and of the sorting before the first."""
    model = tiny_model("llama", seed=0, vocab=VOCAB, width=width, blocks=BLOCKS)
    share, method = 0.2, Potion(rho=0.0, tries=turns)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        forget, retain = measured(model, folder)
        original = copy.deepcopy(model)
        began = time.perf_counter()
        ratios = SortedRatios(forget, retain, folder / "ratios")
        sorting = time.perf_counter() - began
        began = time.perf_counter()
        last = [*search(method, model, ratios, lambda: 1.0, share)][-1]
        ours = (time.perf_counter() - began) / last.number
        small = {n: forget.importance(n) for n in forget.shapes}
        full = {n: retain.importance(n) for n in retain.shapes}
        began = time.perf_counter()
        for turn in range(last.number):
            now = copy.deepcopy(original)
            s = share / method.start_divisor * method.step**turn
            every = torch.cat([small[n] / full[n] for n in small])
            alpha = float(np.percentile(every[every.isfinite()].numpy(), percentile_of(s)))
            with torch.no_grad():
                for n, parameter in now.named_parameters():
                    chosen = small[n] > alpha * full[n]
                    factor = (full[n] / small[n])[chosen].clamp(max=1)
                    parameter.view(-1)[chosen] *= factor
        published = (time.perf_counter() - began) / last.number
        for (n, ours_now), theirs in zip(model.named_parameters(), now.parameters(), strict=True):
            torch.testing.assert_close(ours_now, theirs, rtol=1e-5, atol=1e-8, msg=n)
    return {"sorting": sorting, "ours": ours, "published": published, "turns": float(last.number)}


def run(width: int, turns: int) -> Mapping[str, Mapping[str, float]]:
    """Return both measurements."""
    return {"ssd memory": ssd_memory(width), "potion search": potion_seconds(width, turns)}


def main() -> None:
    """Print both, and fail where SSD holds more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    found = run(options.width, options.turns)
    memory, potion = found["ssd memory"], found["potion search"]
    print(
        f"ssd: beside one model ({memory['weights']:.1f} of its largest tensor) "
        f"{memory['ours']:.2f} largest tensors; published {memory['published']:.2f}"
    )
    print(
        f"potion: a turn {potion['ours'] * 1e3:.0f} ms after sorting for {potion['sorting']:.1f} s;"
        f" published {potion['published'] * 1e3:.0f} ms, {potion['published'] / potion['ours']:.0f}"
        " times as long, and a copy of the model"
    )
    if not options.no_save:
        rows = {
            f"{what}: {name}": v for what, values in found.items() for name, v in values.items()
        }
        save("posthoc_importance", rows)
    if memory["ours"] > LARGEST:
        raise SystemExit(f"ssd held more than {LARGEST:g} of its largest tensor beside the model")


if __name__ == "__main__":
    main()
