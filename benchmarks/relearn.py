"""A relearning grid of 12 arms on a tiny model: 12 runs in a row against warm workers.

Both are measured in one run, in turns, and the best round of each counts, so that what else the
machine does hits both. A run in a row is what the library does without a pool: one thread. Runs
in a row with the threads of all cores are timed once and shown beside it.
Prints the ratio, appends a row to `results.csv` beside this file and fails above 0.6.

With `--device cuda` the grid runs there as well, one arm after the other in one process, and its
seconds and curves stand beside; nothing is asked of them but that curves agree within 1e-3 nats.

    python benchmarks/relearn.py [--device cuda] [--rounds 3] [--no-save]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from results import save
from safetensors.torch import load_model, save_model
from torch import nn

from excise.core.context import Context
from excise.data.stream import Batch, Example, Stream, collate, zip_streams
from excise.losses import nll
from excise.models.tiny import tiny_model
from excise.train.fit import FitConfig, Term, fit
from excise.train.pool import Processes, visible_cores

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
STEPS = 16
CHECKPOINTS = (1, 2, 4, 8, 16)
VOCAB, LENGTH, ROWS = 700, 14, 256
LIMIT = 0.6

AGREE = 1e-3

Job = tuple[str, float, int]


def make_model() -> nn.Module:
    """Return the untrained model: a Llama of about 0.27M parameters."""
    model: nn.Module = tiny_model("llama", vocab=VOCAB, width=64, blocks=3)
    return model


def make_rows(seed: int) -> list[Example]:
    """Return random sequences whose last two tokens are scored."""
    ids = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    target = tuple(t >= LENGTH - 2 for t in range(LENGTH))
    return [Example(tuple(row), target, 0, str(i)) for i, row in enumerate(ids.tolist())]


def loss(model: nn.Module, micro: Mapping[str, Batch]) -> dict[str, Term]:
    """Return the attacker's loss: half relearn rows, half benign ones."""
    return {
        role: Term(*nll(model(**batch.inputs, use_cache=False).logits, batch))
        for role, batch in micro.items()
    }


@torch.no_grad()
def score(model: nn.Module, rows: list[Example]) -> float:
    """Return the mean loss on the scored tokens, in nats."""
    total, count = 0.0, 0.0
    for i in range(0, len(rows), 128):
        batch = collate(rows[i : i + 128], pad_id=0).to(next(model.parameters()).device)
        value, n = nll(model(**batch.inputs, use_cache=False).logits, batch)
        total, count = total + float(value), count + n
    return total / count


def arm(job: Job, device: str = "cpu") -> list[float]:
    """Relearn at one rate and seed; score the held-out rows at log-spaced checkpoints."""
    path, rate, seed = job
    model = make_model()
    load_model(model, path)
    model = model.to(device)
    ctx = Context(work=Path(path).parent, seed=seed, device=torch.device(device))
    streams = {
        role: Stream(make_rows(i), batch_size=16, seed=ctx.seed_for(role), pad_id=0)
        for i, role in enumerate(("relearn", "benign"))
    }
    test = make_rows(2)
    curve = [score(model, test)]
    for record in fit(model, zip_streams(streams), loss, FitConfig(steps=STEPS, lr=rate), ctx):
        if record.step + 1 in CHECKPOINTS:
            curve.append(score(model, test))
    return curve


def timed(run: Callable[[], list[list[float]]]) -> tuple[float, list[list[float]]]:
    """Return the seconds a grid takes, and its curves."""
    began = time.perf_counter()
    curves = run()
    return time.perf_counter() - began, curves


def in_a_row(jobs: list[Job], threads: int, device: str = "cpu") -> list[list[float]]:
    """Run the arms one after the other in this process."""
    torch.set_num_threads(threads)
    return [arm(job, device) for job in jobs]


def main() -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    cores = visible_cores()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model()
        count = sum(p.numel() for p in model.parameters())
        path = os.path.join(folder, "model.safetensors")
        save_model(model, path)
        jobs = [(path, rate, seed) for rate in RATES for seed in SEEDS]
        began = time.perf_counter()
        with Processes(cores) as pool:
            pool.map(arm, jobs[:cores])
            start = time.perf_counter() - began
            row: list[float] = []
            warm: list[float] = []
            alone: list[list[float]] = []
            pooled: list[list[float]] = []
            for _ in range(options.rounds):
                seconds, alone = timed(lambda: in_a_row(jobs, 1))
                row.append(seconds)
                seconds, pooled = timed(lambda: pool.map(arm, jobs))
                warm.append(seconds)
                print(f"in a row {row[-1]:.2f} s, pool {warm[-1]:.2f} s", flush=True)
        threaded, _ = timed(lambda: in_a_row(jobs, cores))
        there = alone
        if options.device != "cpu":
            in_a_row(jobs[:1], 1, options.device)
            seconds, there = timed(lambda: in_a_row(jobs, 1, options.device))
            off = float((torch.tensor(alone) - torch.tensor(there)).abs().max())
            print(f"on {options.device}: {seconds:.2f} s in a row, curves differ by {off:.1e}")
    worst = float((torch.tensor(alone) - torch.tensor(pooled)).abs().max())
    ratio = min(warm) / min(row)
    print(
        f"{len(jobs)} arms of {count / 1e6:.2f}M parameters: in a row {min(row):.2f} s "
        f"({threaded:.2f} s with {cores} threads), {cores} warm workers {min(warm):.2f} s, ratio "
        f"{ratio:.3f} (at most {LIMIT}); starting the pool and its first arms {start:.1f} s; "
        f"curves differ by {worst:.1e}"
    )
    if not options.no_save:
        facts = {"seconds": f"{min(warm):.2f}", "row_seconds": f"{min(row):.2f}"}
        facts |= {"row_all_threads_seconds": f"{threaded:.2f}", "ratio": f"{ratio:.3f}"}
        save("relearn", facts)
    agrees = float((torch.tensor(alone) - torch.tensor(there)).abs().max()) < AGREE
    return 0 if ratio <= LIMIT and worst < 1e-5 and agrees else 1


if __name__ == "__main__":
    sys.exit(main())
