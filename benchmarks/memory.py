"""The estimate of memory against what a process really took, by method, on the CPU.

Each way of training runs for two steps of rows of 128 tokens in a process of its own on a random
llama of eight blocks of width 768 in float32, and the process says its peak (`ru_maxrss`,
libraries included, which the estimate counts as 512 MiB). Prints both and their ratio, and fails
where the estimate is below 0.9 or above 2 times the peak: too low kills a run, too high refuses
one that would fit.

    python benchmarks/memory.py [--no-save]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from fits import LENGTH, WAYS
from results import save

from excise.core.context import Context
from excise.data.domain import Rows
from excise.data.rows import Row
from excise.methods import METHODS
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import byte_tokenizer, tiny_model
from excise.requests.registry import parse_recipe
from excise.run.estimate import gib, plan
from excise.testing import toy_domain
from excise.train.worker import peak_bytes

LOW, HIGH = 0.9, 2.0
"""What the estimate may be in parts of the peak."""


def settings(name: str) -> dict[str, object]:
    """Return the settings of a way, two steps of it."""
    made = json.loads(json.dumps(WAYS[name]))
    made["fit"] = {**made.get("fit", {"batch_size": 4}), "steps": 2}
    return {**LENGTH, **made}


def long(rows: Rows) -> Rows:
    """Return rows that are as long as a model may read, a byte a token."""
    texts = [(row.text or row.prompt + row.completion) * 8 for row in rows]
    return tuple(Row(unit=row.unit, text=text) for row, text in zip(rows, texts, strict=True))


def peak(name: str, model: Path) -> int:
    """Train and return the peak of this process."""
    made = settings(name)
    method = METHODS[str(made["name"])].model_validate(made)
    domain = toy_domain()
    forget = {name: long(rows) for name, rows in domain.forget.items()}
    domain = replace(domain, forget=forget, retain=long(domain.retain))
    with tempfile.TemporaryDirectory() as work:
        method.apply(Checkpoint(model), domain, Context(Path(work), dtype=torch.float32))
    return peak_bytes()


def estimated(name: str, model: Path) -> float:
    """Return what the estimate says of one worker."""
    request = parse_recipe(
        {
            "name": "memory", "domain": {"name": "facts"}, "model": {"path": str(model)},
            "arms": {"edit": settings(name)}, "audit": {"budget": "none"}, "device": "cpu",
        }
    )  # fmt: skip
    memory = plan(request, model / "out", rows=False).memory
    assert memory is not None
    return memory


def main() -> int:
    """Compare every way whose package is here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", default="")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    if options.way:
        print(peak(options.way, options.model))
        return 0
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        tokenizer = byte_tokenizer()
        made = tiny_model("llama", width=768, blocks=8, vocab=len(tokenizer))
        count = made.num_parameters()
        save_model(made, tokenizer, model)
        del made
        for name in WAYS:
            command = [sys.executable, __file__, "--way", name, "--model", str(model)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name}: skipped: {done.stderr.strip().splitlines()[-1]}")
                continue
            took, said = int(done.stdout.split()[-1]), estimated(name, model)
            ratio = said / took
            wrong += not LOW <= ratio <= HIGH
            print(f"{name}: {gib(said)} estimated, {gib(took)} taken, {ratio:.2f}", flush=True)
            if not options.no_save:
                facts = {"variant": name, "peak_bytes": took, "estimated_bytes": round(said)}
                save("memory", facts | {"ratio": round(ratio, 3), "parameters": count})
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
