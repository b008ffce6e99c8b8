"""What labelling a corpus costs beside a forward pass of the model that is labelled for.

The model has the shape of SmolLM2-135M (30 blocks, width 576, 49,152 tokens) and random weights;
its tokenizer is trained here on the texts. Each round reads the same passages of shipped English by
the model's forward pass, head included, then by every labeller, from text to labelled rows, so that
what else the machine does hits both. Seconds are the median over rounds, on a CPU those of the
processor. Prints ratios, appends rows to `results.csv` and fails below 5x the speed of the model.

    python benchmarks/labelling.py [--dtype bfloat16] [--passages 64] [--rounds 3] [--no-save]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from results import save

from excise.core.context import Context
from excise.data.domain import CORE, UNLABELED, Row
from excise.data.stream import collate, encode
from excise.domains.definitions import Definitions
from excise.labelling.labeller import (
    AnyLabeller,
    EncoderLabeller,
    NgramLabeller,
    StatesLabeller,
    fit_labeller,
    label_documents,
    open_reader,
)
from excise.labelling.words import documents_of
from excise.models.checkpoint import save_model
from excise.models.tiny import tiny_model, train_bpe
from excise.train.fit import FitConfig

FASTER = 5.0
"""Least speed of a labeller, as a multiple of the model's."""

SHAPE = {
    "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
"""Fields of SmolLM2-135M's configuration beside width, blocks and vocabulary."""

QUICK = FitConfig(steps=3, lr=1e-3, batch_size=4)


def clock(device: torch.device) -> float:
    """Return seconds: of the wall once an accelerator is done, else of the processor."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def passages(count: int) -> tuple[list[Row], list[Row]]:
    """Return rows to teach a labeller, and passages of English to label, 200 words each."""
    domain = Definitions(documents=100, prose=2500).build(None)
    forget, retain = domain.forget["definitions"][:20], domain.retain
    words = " ".join(row.text for row in retain[20:]).split()
    texts = [" ".join(words[i * 200 : (i + 1) * 200]) for i in range(count)]
    rest = [Row(f"p{i}", text=text, label=UNLABELED) for i, text in enumerate(texts)]
    return [*forget, *retain[:20]], rest


def main() -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--passages", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    teaching, rest = passages(options.passages)
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        ctx = Context(Path(folder), device=device, dtype=dtype)
        tokenizer = train_bpe([row.text for row in (*teaching, *rest)], 8192)
        made = tiny_model("llama", vocab=49152, width=576, blocks=30, **SHAPE)
        checkpoint = save_model(made.to(dtype), tokenizer, ctx.work / "model")
        del made
        model = checkpoint.load(dtype=dtype, device=device)
        examples = encode([replace(row, label=CORE) for row in rest], tokenizer, max_length=512)
        tokens = sum(len(example.ids) for example in examples)
        batches = [
            collate(examples[i : i + options.batch], pad_id=tokenizer.pad_token_id).to(device)
            for i in range(0, len(examples), options.batch)
        ]
        labellers: Sequence[AnyLabeller] = (
            NgramLabeller(), EncoderLabeller(fit=QUICK), StatesLabeller()
        )  # fmt: skip
        fitted = [
            fit_labeller(c, tuple(teaching), ("definitions",), ctx.child(c.name), checkpoint)
            for c in labellers
        ]
        readers = [open_reader(config, checkpoint, ctx) for config in labellers]
        seconds: dict[str, list[float]] = {"model": [], **{c.name: [] for c in labellers}}
        for _ in range(options.rounds):
            began = clock(device)
            with torch.no_grad():
                for batch in batches:
                    model(**batch.inputs)
            seconds["model"].append(clock(device) - began)
            for config, labeller, reader in zip(labellers, fitted, readers, strict=True):
                began = clock(device)
                label_documents(labeller, documents_of(rest), ctx, reader)
                seconds[config.name].append(clock(device) - began)
    whole = statistics.median(seconds["model"])
    print(f"model      {tokens / whole:10.0f} tokens/s ({tokens} tokens, {options.dtype})")
    for config in labellers:
        taken = statistics.median(seconds[config.name])
        faster = whole / taken
        print(f"{config.name:<10} {tokens / taken:10.0f} tokens/s ({faster:.1f}x the model's)")
        if faster < FASTER:
            bad.append(f"{config.name} labels at {faster:.1f}x the model's speed, below {FASTER}x")
        facts = {
            "variant": config.name, "seconds": round(taken, 5), "times_faster": round(faster, 3),
            "width": 576, "vocab": 49152, "rows": options.passages, "tokens": tokens,
            "dtype": options.dtype,
        }  # fmt: skip
        if not options.no_save:
            save("labelling", facts, options.device)
    for sentence in bad:
        print(sentence, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
