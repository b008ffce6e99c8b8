"""One step of RMU four ways: the published loop, and the library's three engines.

The same model, rows and settings, in one process and in turns, so that what else the machine
does hits all of them. FLOPs are counted by torch, seconds are the best of the rounds, memory is
what a step needs at its peak beyond the weights, beside the weights themselves. `published` is
the loop of the paper's code: two whole models, three whole forwards, gradients for every weight.
`cached` is timed when its memory is warm, as in a sweep or a later epoch.
Prints ratios, appends rows to `results.csv` and fails below 4x for `span` and 8x for `cached`.

    python benchmarks/rmu.py [--device cuda] [--width 256] [--rounds 4] [--no-save]

Shape legend: B rows, T tokens, D residual width.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from measuring import peak, timed
from results import save
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from excise.core.context import Context
from excise.data.stream import Batch
from excise.methods.posthoc.rmu import RMU, make_engine
from excise.methods.posthoc.rmu.engine import Full
from excise.methods.posthoc.rmu.parameters import editing
from excise.methods.posthoc.rmu.topics import per_topic
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import tiny_model, word_tokenizer
from excise.train.fit import FitConfig, Term, fit

BLOCKS, LAYER, VOCAB, TOPICS, TURNS = 32, 7, 512, 2, 2
LIMITS = {"span": 4.0, "cached": 8.0}
Step = Callable[[], Any]


def read(rows: int, tokens: int) -> Callable[[int], list[dict[str, Batch]]]:
    """Return two topics in turn, and the same two batches of each again and again."""
    made: dict[tuple[int, int], Batch] = {}
    for which in range(TOPICS + 1):
        for turn in range(TURNS):
            generator = torch.Generator().manual_seed(10 * which + turn)
            ids_BT = torch.randint(4, VOCAB, (rows, tokens), generator=generator)
            seen_BT = torch.ones_like(ids_BT, dtype=torch.bool)
            made[which, turn] = Batch(ids_BT, seen_BT, seen_BT, ids_BT * 0, ("",) * rows)

    def batches(step: int) -> list[dict[str, Batch]]:
        turn, topic = divmod(step, TOPICS)
        return [{f"{topic}": made[topic, turn % TURNS], "retain": made[TOPICS, turn % TURNS]}]

    return batches


def controls(width: int) -> dict[str, Tensor]:
    """Return a control vector for every topic."""
    draw = torch.Generator().manual_seed(3)
    vectors = [torch.rand(width, generator=draw) for _ in range(TOPICS)]
    return {f"{topic}": 6.5 * u / u.norm() for topic, u in enumerate(vectors)}


def published(start: Checkpoint, method: RMU, ctx: Context, batches: Any, width: int) -> Any:
    """Return one step of the published loop as a function, and its two models."""
    live = start.load(dtype=ctx.dtype, device=ctx.device)
    frozen = start.load(dtype=ctx.dtype, device=ctx.device)
    goals = {t: c.to(ctx.device, ctx.dtype) for t, c in controls(width).items()}
    named = dict(live.named_parameters())
    params = [named[name] for name in method.target_parameters(start).names]
    optimizer = torch.optim.AdamW(params, lr=method.fit.lr, foreach=False)
    alpha = per_topic(method.alpha, ["0"], "alpha")["0"]
    whole = Full(live, frozen, f"model.layers.{LAYER}", method.inputs, torch.no_grad)

    def step(number: int) -> None:
        (micro,) = batches(number)
        micro = {role: batch.to(ctx.device) for role, batch in micro.items()}
        topic = str(number % TOPICS)
        pushed_BTD = whole.current(micro[topic])
        forget = F.mse_loss(pushed_BTD, goals[topic].expand_as(pushed_BTD))
        retain = F.mse_loss(whole.current(micro["retain"]), whole.original(micro["retain"]))
        optimizer.zero_grad()
        (forget + alpha * retain).backward()
        optimizer.step()

    return step, [live, frozen]


def ours(
    start: Checkpoint, method: RMU, ctx: Context, batches: Any, width: int, stack: ExitStack
) -> Any:
    """Return one step of an engine as a function, its models, and bytes of the reference."""
    targets = method.target_parameters(start)
    if method.engine == "full":
        model = start.load(dtype=ctx.dtype, device=ctx.device)
    else:
        model = start.load_prefix(LAYER + 1, dtype=ctx.dtype, device=ctx.device)
    edit = stack.enter_context(editing(model, targets, method.lora, ctx))
    engine = make_engine(method, start, edit, targets, ctx)
    goals = controls(width)
    weight = per_topic(method.alpha, list(goals), "alpha")

    def loss(_net: Any, micro: Mapping[str, Batch]) -> dict[str, Term]:
        return method.terms(engine, micro, goals, weight)

    groups = {"trained": list(edit.parameters.values())}
    steps: Iterator[Any] = fit(model, batches, loss, method.fit, ctx, groups=groups)
    models = [model, engine.frozen] if isinstance(engine, Full) else [model]
    return (lambda number: next(steps)), models, list(edit.saved.values())


def size(tensors: Any) -> int:
    """Return bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Return FLOPs, seconds and bytes per step of every way."""
    ctx = Context(work=folder, device=torch.device(options.device), dtype=options.dtype)
    words = word_tokenizer(f"w{i}" for i in range(VOCAB - 4))
    model = tiny_model("mistral", vocab=VOCAB, width=options.width, blocks=BLOCKS)
    start = save_model(model.to(options.dtype), words, folder / "start")
    del model
    cycle = TOPICS * TURNS
    settings = FitConfig(
        steps=(options.rounds + 3) * cycle, lr=5e-5, batch_size=options.rows,
        optimizer="hf_adamw", master="model",
    )  # fmt: skip
    batches = read(options.rows, options.tokens)
    found: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        ways: dict[str, Any] = {}
        for name in ("published", "full", "span", "cached"):
            engine = "full" if name == "published" else name
            method = RMU(layer=LAYER, engine=engine, as_published=True, fit=settings)  # type: ignore[arg-type]
            if name == "published":
                step, models = published(start, method, ctx, batches, options.width)
                saved: list[Tensor] = []
            else:
                step, models, saved = ours(start, method, ctx, batches, options.width, stack)
            ways[name] = step
            weights = size(p for m in models for p in m.parameters())
            frozen = size(models[1].parameters()) if len(models) > 1 else size(saved)
            found[name] = {"weights": weights + size(saved), "reference": frozen}
        whole = size(p for p in start.load(dtype=options.dtype).parameters())
        for name, step in ways.items():
            found[name]["reference_share"] = found[name].pop("reference") / whole
            for number in range(cycle):  # warms caches and allocators
                step(number)
            counter = FlopCounterMode(display=False)
            with counter:
                for number in range(cycle):
                    step(number)
            found[name]["flops"] = counter.get_total_flops() / cycle
            found[name]["peak"] = max(
                peak(options.device, lambda s=step, n=n: s(n)) for n in range(cycle)
            )
        best = {name: float("inf") for name in ways}
        for _ in range(options.rounds):
            for name, step in ways.items():
                turn = sum(timed(options.device, lambda s=step, n=n: s(n))[0] for n in range(cycle))
                best[name] = min(best[name], turn / cycle)
        for name, seconds in best.items():
            found[name]["seconds"] = seconds
    return found


def main() -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--dtype", default="")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    options.width = options.width or (2048 if cuda else 256)
    options.tokens = options.tokens or (512 if cuda else 128)
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if cuda else "float32"))
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    base = found["published"]
    print(
        f"{BLOCKS} blocks, width {options.width}, {options.rows} x {options.tokens} tokens, "
        f"{str(options.dtype).removeprefix('torch.')}, {options.device}"
    )
    bad = []
    for name, row in found.items():
        ratio = {key: base[key] / row[key] for key in ("flops", "seconds")}
        print(
            f"{name:<10} {row['flops'] / 1e9:9.2f} GFLOP ({ratio['flops']:5.2f}x)  "
            f"{row['seconds']:8.4f} s ({ratio['seconds']:5.2f}x)  weights "
            f"{row['weights'] / 2**20:8.1f} MiB  peak beyond {row['peak'] / 2**20:8.1f} MiB  "
            f"reference {100 * row['reference_share']:6.2f} % of the weights"
        )
        if ratio["seconds"] < LIMITS.get(name, 0.0):
            bad.append(f"{name} is {ratio['seconds']:.2f}x, below {LIMITS[name]}x")
        if name in LIMITS and row["reference_share"] > 0.05:
            bad.append(f"{name} keeps {row['reference_share']:.1%} of the weights as reference")
        facts = {
            "variant": name, "seconds": round(row["seconds"], 5), "gflops": row["flops"] / 1e9,
            "times_faster": round(ratio["seconds"], 3), "flops_ratio": round(ratio["flops"], 3),
            "weight_bytes": int(row["weights"]), "peak_bytes": int(row["peak"]),
            "reference_share": round(row["reference_share"], 5), "width": options.width,
            "rows": options.rows, "tokens": options.tokens, "dtype": str(options.dtype)[6:],
        }  # fmt: skip
        if not options.no_save:
            save("rmu", facts, options.device)
    for line in bad:
        print(f"below the limit: {line}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
