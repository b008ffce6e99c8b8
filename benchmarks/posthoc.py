"""Methods after training, each beside the way it is usually written.

`npo` and `grad_diff-kl` are run by the library and beside a second, frozen model, in turns and in
the same loop, so that what else the machine does hits both. Seconds are the median over the steps
of all rounds, on a CPU those of the processor, which other work there does not touch. Weights are
the bytes of all parameters and heads that are alive in a step, and what is computed once before the
first step is timed apart. Prints ratios, appends rows to `results.csv` and fails below 1.1x the
speed or above 0.6x the weights.

    python benchmarks/posthoc.py [--device cuda] [--width 512] [--rounds 4] [--no-save]

A further comparison is a function that yields `Found` rows, listed in `COMPARISONS`.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results import save
from torch import nn

from excise.core.context import Context
from excise.data.domain import Domain, Row, Rows
from excise.data.stream import Batch
from excise.losses import Summed, forward_kl, nll, npo, predicting, sequence_nll
from excise.methods import NPO, GradDiff
from excise.methods.posthoc.reference import frozen_states, reference_of
from excise.methods.tuning import (
    RoleLoss,
    TuningMethod,
    logits_of,
    minimise,
    role_batches,
    role_streams,
)
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.head import Head
from excise.models.tiny import tiny_model, word_tokenizer
from excise.train.fit import FitConfig, Term

VOCAB = 512
FASTER, LIGHTER = 1.1, 0.6
"""Least speed and most weights, as shares of the usual way's."""


@dataclass(frozen=True)
class Found:
    """What was measured of one method.

    Attributes:
        method: Its name.
        seconds: Of a step.
        usual_seconds: The same, written the usual way.
        before: Seconds of what is computed once before the first step.
        weights: Bytes of weights alive in a step.
        usual_weights: The same, written the usual way.
    """

    method: str
    seconds: float
    usual_seconds: float
    before: float
    weights: int
    usual_weights: int


def domain(options: argparse.Namespace) -> Domain:
    """Return rows of random words, of one length."""
    draw = random.Random(0)

    def rows(prefix: str, count: int) -> Rows:
        words = [f"w{i}" for i in range(VOCAB - 4)]
        texts = [" ".join(draw.choices(words, k=options.tokens - 1)) for _ in range(count)]
        return tuple(Row(f"{prefix}{i}", text=text) for i, text in enumerate(texts))

    forget, retain = rows("f", 8 * options.rows), rows("r", 16 * options.rows)
    one, few = {"a": forget[:1]}, retain[:1]
    return Domain("benchmark", {"a": forget}, retain, one, one, few, one, few, few)


def alive() -> int:
    """Return the bytes of all parameters and heads that are in memory, each once."""
    gc.collect()
    tensors: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, nn.Module):
            found: list[torch.Tensor] = list(thing.parameters())
        elif isinstance(thing, Head):
            found = [thing.weight_VD]
        else:
            continue
        tensors |= {t.data_ptr(): t.numel() * t.element_size() for t in found if t.numel()}
    return sum(tensors.values())


def clock(device: torch.device) -> float:
    """Return seconds: of the wall once an accelerator is done, else of the processor."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


class Watch:
    """Times the steps of a loop as it tells of them, and weighs what is alive in one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last, self.seconds, self.weights = device, 0.0, list[float](), 0

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        """Take note of a step; the first one warms up."""
        if kind != "step" or "loss" not in data:
            return
        if self.last:
            self.seconds.append(clock(self.device) - self.last)
        else:
            self.weights = alive()
        self.last = clock(self.device)


def watched(ctx: Context, run: Callable[[Context], Any]) -> Watch:
    """Run something in a folder of its own and return what was seen of its steps."""
    watch = Watch(ctx.device)
    with tempfile.TemporaryDirectory(dir=ctx.work) as folder:
        run(replace(ctx, work=Path(folder), emit=watch))
    return watch


def beside_a_second_model(
    method: TuningMethod, start: Checkpoint, rows: Domain, ctx: Context
) -> None:
    """Run NPO or GradDiff with KL as they are usually written."""
    frozen: nn.Module = start.load(dtype=ctx.dtype, device=ctx.device).requires_grad_(False)

    def said(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return logits_of(frozen, batch)

    def forget_loss(model: nn.Module, batch: Batch) -> Summed:
        if not isinstance(method, NPO):
            return nll(logits_of(model, batch), batch)
        before_B, _ = sequence_nll(said(batch), batch)
        return npo(sequence_nll(logits_of(model, batch), batch)[0], before_B, method.beta)

    def retain_loss(model: nn.Module, batch: Batch) -> Summed:
        now_BTV = logits_of(model, batch)
        if isinstance(method, NPO):
            return nll(now_BTV, batch)
        return forward_kl(said(batch), now_BTV, predicting(batch.target_BT))

    sign = 1.0 if isinstance(method, NPO) else -1.0
    losses: dict[str, RoleLoss] = {
        "forget": lambda model, batch: Term(*forget_loss(model, batch), sign),
        "retain": lambda model, batch: Term(*retain_loss(model, batch)),
    }
    batches = role_batches(
        rows, ("forget", "retain"), start.tokenizer(), method.fit, ctx,
        max_length=method.max_length,
    )  # fmt: skip
    minimise(method, start, rows, batches, losses, ctx)


def without_a_second_model(options: argparse.Namespace, ctx: Context) -> Iterator[Found]:
    """Compare NPO and GradDiff with KL, and what their precomputation takes."""
    words = word_tokenizer(f"w{i}" for i in range(VOCAB - 4))
    model = tiny_model("llama", vocab=VOCAB, width=options.width, blocks=options.blocks)
    start = save_model(model.to(ctx.dtype), words, ctx.work / "start")
    del model
    rows = domain(options)
    fit = FitConfig(steps=options.steps, lr=1e-5, batch_size=options.rows, log_every=1)
    for name, method in (
        ("npo", NPO(fit=fit)),
        ("grad_diff-kl", GradDiff(fit=fit, retain_loss="kl")),
    ):
        streams = role_streams(
            rows, ("forget", "retain"), start.tokenizer(), fit, ctx, max_length=method.max_length
        )
        began = clock(ctx.device)
        if isinstance(method, NPO):
            reference_of(start, streams["forget"].examples, ctx)
        else:
            frozen_states(start, streams["retain"], fit.steps, ctx)
        before = clock(ctx.device) - began
        ours, usual = [], []
        for _ in range(options.rounds):
            ours.append(watched(ctx, partial(method.apply, start, rows)))
            usual.append(watched(ctx, partial(beside_a_second_model, method, start, rows)))
        yield Found(
            name,
            statistics.median(s for watch in ours for s in watch.seconds),
            statistics.median(s for watch in usual for s in watch.seconds),
            before,
            max(watch.weights for watch in ours),
            max(watch.weights for watch in usual),
        )


COMPARISONS = (without_a_second_model,)
"""What is compared."""


def main() -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    options.width = options.width or (2048 if cuda else 256)
    options.blocks = options.blocks or (16 if cuda else 8)
    options.tokens = options.tokens or (512 if cuda else 128)
    dtype = torch.bfloat16 if cuda else torch.float32
    bad = []
    for compare in COMPARISONS:
        with tempfile.TemporaryDirectory() as folder:
            ctx = Context(Path(folder), device=torch.device(options.device), dtype=dtype)
            for found in compare(options, ctx):
                faster = found.usual_seconds / found.seconds
                lighter = found.weights / found.usual_weights
                print(
                    f"{found.method:<14} {found.seconds:8.4f} s a step ({faster:.2f}x as fast), "
                    f"{found.weights / 2**20:8.1f} MiB of weights ({lighter:.2f}x), after "
                    f"{found.before:.2f} s before the first step",
                    flush=True,
                )
                if faster < FASTER:
                    bad.append(f"{found.method} is {faster:.2f}x as fast, below {FASTER}x")
                if lighter > LIGHTER:
                    bad.append(f"{found.method} holds {lighter:.2f}x the weights, above {LIGHTER}x")
                facts = {
                    "variant": found.method, "seconds": round(found.seconds, 5),
                    "times_faster": round(faster, 3), "weight_bytes": found.weights,
                    "memory_ratio": round(lighter, 3), "seconds_before": round(found.before, 3),
                    "width": options.width, "rows": options.rows, "tokens": options.tokens,
                    "dtype": str(dtype).removeprefix("torch."),
                }  # fmt: skip
                if not options.no_save:
                    save("posthoc", facts, options.device)
    for sentence in bad:
        print(sentence, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
