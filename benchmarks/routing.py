"""A training step with parameter-edge routing beside a plain one, and one backward per label.

`routed` trains rows of three labels in one mixed batch, frozen groups and optimizer included,
against `plain`, the same steps without labels: pairs of steps in turns, the median of their
ratios. `mixed` gives every sequence tokens of three labels and compares one routed pass with the
cheapest way to do without: one forward pass, one backward pass per label, gradients masked.
`spans` trains with the loss of labelled tokens left out, on rows whose labels are spans against
the same rows without any, from text to optimizer step; `spans_routed` is the same, routed, against
rows with one label each.
Memory is what a step needs at its peak beyond what is there before it.
Appends rows to `results.csv` and fails above 1.05 times plain, above 1.02 times a step without
spans, below 1.5 times faster than one backward per label, or when a step keeps more than token
weights and one gradient beyond plain.

    python benchmarks/routing.py [--device cuda] [--width 512] [--rows 8] [--tokens 128]
        [--pairs 15] [--no-save]

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from measuring import peak, timed
from results import save
from torch import Tensor, nn

from excise.core.context import Context
from excise.data.domain import CORE, Row, Span
from excise.data.stream import Batch, Stream, encode
from excise.losses import nll, token_nll
from excise.methods.pretraining.routed.training import RoutedBatch, routed_loss
from excise.models.tiny import byte_tokenizer, tiny_model
from excise.routing import GroupMap, Groups, Part, Policy, Routing, Rule, compile, route
from excise.train.fit import FitConfig, Term, fit

VOCAB, BLOCKS, CYCLE = 512, 2, 4
LABELS = (0, 1, 2)
SLOWER, FASTER, SPANNED = 1.05, 1.5, 1.02
Step = Callable[[], Any]


def make_policy(width: int) -> Policy:
    """Return core and two modules of a sixteenth of the neurons and one head each."""
    size = 4 * width // 16
    parts = {
        f"module_{i}": (
            Part(at="mlp", units=(size * (i - 1), size * i)),
            Part(at="heads", units=(2 * i - 2, 2 * i)),
        )
        for i in (1, 2)
    }
    return Policy(
        groups=Groups(parts={**parts, "joint": (Part(at="embed"),)}),
        rules={
            "core": (Rule(write=("core", "joint")),),
            "forget": (Rule(write=("self", "joint")),),
            "unlabeled": (Rule(),),
        },
        capabilities=("a", "b"),
    )


def read(rows: int, tokens: int, number: int, *, within: bool) -> Batch:
    """Return a batch of labelled noise: a label per row, or runs of 16 tokens within rows."""
    generator = torch.Generator().manual_seed(number)
    ids_BT = torch.randint(4, VOCAB, (rows, tokens), generator=generator)
    if within:
        runs = torch.randint(0, len(LABELS), (rows, -(-tokens // 16)), generator=generator)
        label_BT = runs.repeat_interleave(16, dim=1)[:, :tokens]
    else:
        share = torch.tensor([0, 0, 0, 0, 0, 1, 2, -1])
        label_BT = share[torch.arange(rows) % len(share)][:, None].expand(rows, tokens)
    real_BT = torch.ones(rows, tokens, dtype=torch.bool)
    target_BT = real_BT.clone()
    target_BT[:, 0] = False
    return Batch(ids_BT, real_BT, target_BT, label_BT, tuple(map(str, range(rows))))


def plain_loss(model: nn.Module, micro: Batch) -> Mapping[str, Term]:
    """Next-token prediction."""
    return {"nll": Term(*nll(model(**micro.inputs, use_cache=False).logits, micro))}


def steps_of(
    model: nn.Module, routing: Routing | None, policy: Policy, folder: Path, options: Any
) -> Step:
    """Return a function that does the next step of `fit`, routed where there is a routing."""
    config = FitConfig(steps=10**6, lr=1e-4, weight_decay=0.1, clip=1.0)
    ctx = Context(work=folder, device=torch.device(options.device))
    batches = [read(options.rows, options.tokens, i, within=False) for i in range(CYCLE)]
    loop: Iterator[Any]
    if routing is None:
        loop = fit(model, lambda step: [batches[step % CYCLE]], plain_loss, config, ctx)
    else:

        def routed(step: int) -> list[RoutedBatch]:
            batch = batches[step % CYCLE]
            return [RoutedBatch(batch, compile(policy, routing.map, batch))]

        loop = fit(
            model,
            routed,
            lambda model, micro: routed_loss(model, routing, micro),
            config,
            ctx,
            groups=routing.map.slices(model),
            writes=lambda micro: micro.routes.written,
        )
    return lambda: next(loop)


def stream_of(options: argparse.Namespace, *, spans: bool) -> Stream:
    """Return texts, each with a span in the middle or with a label as a whole."""
    half = options.tokens // 2
    rows = []
    for i in range(CYCLE * options.rows):
        generator = torch.Generator().manual_seed(i)
        letters = torch.randint(97, 123, (options.tokens,), generator=generator).tolist()
        parts = (Span(half, half + half // 2, "a", 1),) if spans else ()
        rows.append(Row(f"u{i}", text="".join(map(chr, letters)), label=i % 4 == 3, spans=parts))
    examples = encode(rows, byte_tokenizer(), max_length=options.tokens)
    return Stream(examples, options.rows, seed=0, pad_id=0)


def masked_loss(model: nn.Module, micro: Batch) -> Mapping[str, Term]:
    """Next-token prediction without the tokens of a capability."""
    nll_BT = token_nll(model(**micro.inputs, use_cache=False).logits, micro.ids_BT)
    kept_BT = micro.target_BT & (micro.label_BT <= CORE)
    return {"nll": Term(nll_BT[kept_BT].sum(), float(kept_BT.sum()))}


def reading_steps(
    model: nn.Module,
    routing: Routing | None,
    policy: Policy,
    folder: Path,
    options: Any,
    *,
    spans: bool,
) -> Step:
    """Return a function that does the next step on texts with spans, or without."""
    config = FitConfig(steps=10**6, lr=1e-4, weight_decay=0.1, clip=1.0)
    ctx = Context(work=folder, device=torch.device(options.device))
    read = stream_of(options, spans=spans)
    loop: Iterator[Any]
    if routing is None:
        loop = fit(model, read, masked_loss, config, ctx)
    else:

        def routed(step: int) -> list[RoutedBatch]:
            return [RoutedBatch(b, compile(policy, routing.map, b)) for b in read(step)]

        def loss(model: nn.Module, micro: RoutedBatch) -> Mapping[str, Term]:
            return routed_loss(model, routing, micro)

        groups = routing.map.slices(model)
        writes = lambda micro: micro.routes.written  # noqa: E731
        loop = fit(model, routed, loss, config, ctx, groups=groups, writes=writes)
    return lambda: next(loop)


def one_pass(model: nn.Module, routing: Routing, policy: Policy, batch: Batch) -> Step:
    """Return a function that computes routed gradients of a mixed batch in one pass."""

    def step() -> None:
        routes = compile(policy, routing.map, batch)
        terms = routed_loss(model, routing, RoutedBatch(batch, routes))
        terms["nll"].sum.backward()
        model.zero_grad()

    return step


def pass_per_label(model: nn.Module, map: GroupMap, policy: Policy, batch: Batch) -> Step:
    """Return a function that computes one backward pass per label and masks its gradients."""
    named = dict(model.named_parameters())

    def step() -> None:
        nll_BT = token_nll(model(**batch.inputs, use_cache=False).logits, batch.ids_BT)
        total: dict[str, Tensor] = {}
        for label in LABELS:
            nll_BT[(batch.label_BT == label) & batch.target_BT].sum().backward(
                retain_graph=label != LABELS[-1]
            )
            module = {policy.module_of(label)} if label else {"core"}
            for name, param in named.items():
                assert param.grad is not None
                for one in map.owners[name]:
                    if one.group not in module | {"joint"}:
                        whole = one.dim is None
                        grad = (
                            param.grad
                            if whole
                            else param.grad.narrow(one.dim or 0, one.start, one.stop - one.start)
                        )
                        grad.zero_()
                total[name] = total[name] + param.grad if name in total else param.grad
                param.grad = None

    return step


def paired(base: Step, other: Step, pairs: int, device: str) -> dict[str, float]:
    """Return medians of both and of the ratio other / base, in turns that change their order."""
    for step in (base, other) * 2:
        step()
    rows: list[tuple[float, float, float, float]] = []
    for i in range(pairs):
        first, second = (base, other) if i % 2 == 0 else (other, base)
        a, b = timed(device, first), timed(device, second)
        x, y = (a, b) if i % 2 == 0 else (b, a)
        rows.append((*x, *y))
    return {
        "base": statistics.median(r[0] for r in rows),
        "seconds": statistics.median(r[2] for r in rows),
        "ratio": statistics.median(r[2] / r[0] for r in rows),
        "cpu_ratio": statistics.median(r[3] / r[1] for r in rows),
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Return times and bytes of both comparisons."""
    policy, device = make_policy(options.width), options.device
    found: dict[str, dict[str, float]] = {}

    def make() -> Any:
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
        made = tiny_model("llama", vocab=VOCAB, width=options.width, blocks=BLOCKS, **heads)
        return made.to(device)

    plain, model = make(), make()
    with route(model, policy) as routing:
        base = steps_of(plain, None, policy, folder, options)
        routed = steps_of(model, routing, policy, folder, options)
        found["routed"] = paired(base, routed, options.pairs, device)
        found["routed"] |= {"plain_peak": peak(device, base), "peak": peak(device, routed)}
    layer = max(p.numel() for p in plain.parameters()) * 4
    tokens = options.rows * options.tokens * len(routing.map.names) * 4
    found["routed"]["allowed"] = found["routed"]["plain_peak"] + layer + 3 * tokens
    batch = read(options.rows, options.tokens, 9, within=True).to(torch.device(device))
    with route(model, policy) as routing:
        one = one_pass(model, routing, policy, batch)
        per_label = pass_per_label(plain, routing.map, policy, batch)
        found["mixed"] = paired(per_label, one, max(3, options.pairs // 2), device)
        found["mixed"] |= {"plain_peak": peak(device, per_label), "peak": peak(device, one)}
    with_spans, without = (
        reading_steps(make(), None, policy, folder, options, spans=spans) for spans in (True, False)
    )
    found["spans"] = paired(without, with_spans, options.pairs, device)
    found["spans"] |= {"plain_peak": peak(device, without), "peak": peak(device, with_spans)}
    a, b = make(), make()
    with route(a, policy) as first, route(b, policy) as second:
        without = reading_steps(a, first, policy, folder, options, spans=False)
        with_spans = reading_steps(b, second, policy, folder, options, spans=True)
        found["spans_routed"] = paired(without, with_spans, options.pairs, device)
        found["spans_routed"] |= {
            "plain_peak": peak(device, without),
            "peak": peak(device, with_spans),
        }
    return found


def main() -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    bad = []
    words = {"routed": "a plain step", "mixed": "one backward per label",
             "spans": "a step without spans", "spans_routed": "a routed step without"}  # fmt: skip
    for name, row in found.items():
        print(
            f"{name}: {row['seconds']:.4f} s against {row['base']:.4f} s of {words[name]}, ratio "
            f"{row['ratio']:.3f} ({row['cpu_ratio']:.3f} of processor time); peak "
            f"{row['peak'] / 2**20:.1f} MiB against {row['plain_peak'] / 2**20:.1f} MiB"
        )
        facts = {
            "variant": name, "seconds": round(row["seconds"], 5), "ratio": round(row["ratio"], 4),
            "times_faster": round(1 / row["ratio"], 3), "peak_bytes": int(row["peak"]),
            "plain_peak_bytes": int(row["plain_peak"]), "cpu_ratio": round(row["cpu_ratio"], 4),
            "width": options.width, "rows": options.rows, "tokens": options.tokens,
            "dtype": "float32",
        }  # fmt: skip
        if not options.no_save:
            save("routing", facts, options.device)
    if found["routed"]["ratio"] > SLOWER:
        bad.append(f"a routed step takes {found['routed']['ratio']:.3f} plain ones")
    if found["routed"]["peak"] > found["routed"]["allowed"]:
        bad.append(f"a routed step needs {found['routed']['peak'] / 2**20:.1f} MiB at its peak")
    if found["spans"]["ratio"] > SPANNED:
        bad.append(f"a step with spans takes {found['spans']['ratio']:.3f} of one without")
    if found["mixed"]["ratio"] > 1 / FASTER:
        bad.append(f"one pass is {1 / found['mixed']['ratio']:.2f}x one per label")
    for line in bad:
        print(f"misses its target: {line}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
