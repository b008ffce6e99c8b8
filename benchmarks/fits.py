"""What fits on which cards: `python benchmarks/fits.py` writes the table of `docs/costs.md`.

Everything comes from the estimate that `--dry-run` prints; of models the configuration is enough.
A test holds the page to it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from budgets import SHAPES

from excise.requests.registry import parse_recipe
from excise.run.estimate import gib, plan

PAGE = Path(__file__).resolve().parents[1] / "docs" / "costs.md"

BEGIN, END = "<!-- written by benchmarks/fits.py -->\n", "<!-- end -->\n"

CARDS = {"24 GB": (24e9, 1), "80 GB": (80e9, 1), "8 x 80 GB": (80e9, 8)}
"""Bytes of one card, and how many there are."""

FIT = {"batch_size": 4, "micro_size": 0, "clip": 0}
LEAN = FIT | {"optimizer": "adamw_8bit", "in_backward": True}

LENGTH: Mapping[str, Any] = {"max_length": 128}
"""Tokens of a row at most."""

WAYS: Mapping[str, dict[str, Any]] = {
    "forget and retain, `adamw`": {"name": "grad_diff", "fit": FIT},
    "the same, `activation_checkpointing`": {
        "name": "grad_diff", "fit": FIT | {"activation_checkpointing": True}
    },
    "the same, `adamw_8bit`": {"name": "grad_diff", "fit": FIT | {"optimizer": "adamw_8bit"}},
    "one set, `adamw`": {"name": "gradient_ascent", "fit": FIT},
    "the same, `in_backward`": {"name": "gradient_ascent", "fit": FIT | {"in_backward": True}},
    "`adamw_8bit` and `in_backward`": {"name": "gradient_ascent", "fit": LEAN},
    "the same and `master: model`": {
        "name": "gradient_ascent", "fit": LEAN | {"master": "model"}
    },
    "the same and `activation_checkpointing`": {
        "name": "gradient_ascent",
        "fit": LEAN | {"master": "model", "activation_checkpointing": True},
    },
    "`--lora.rank 8`": {"name": "grad_diff", "fit": FIT, "lora": {"rank": 8}},
    "the same, `--lora.load_in_4bit true`": {
        "name": "grad_diff", "fit": FIT, "lora": {"rank": 8, "load_in_4bit": True}
    },
    "`rmu`, three matrices": {"name": "rmu", "layer": 7},
}  # fmt: skip
"""Settings of a method by what a reader calls them."""


def needs(method: Mapping[str, Any], model: str, folder: Path) -> float:
    """Return the bytes that one worker takes in bfloat16, by the estimate."""
    request = parse_recipe(
        {
            "name": "fits",
            "domain": {"name": "facts"},
            "model": {"path": str(folder / model)},
            "arms": {"edit": {**LENGTH, **method}},
            "audit": {"budget": "none"},
            "dtype": "bfloat16",
            "device": "meta",  # an accelerator, though there is none here
        }
    )
    memory = plan(request, folder / "out", rows=False).memory
    assert memory is not None
    return memory


def lines() -> Iterator[str]:
    """Yield the table."""
    yield f"| model | what is trained | one worker takes | {' | '.join(CARDS)} |"
    yield "|---|---|---|" + "---|" * len(CARDS)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for model, shape in SHAPES.items():
            (folder / model).mkdir()
            config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **shape}
            (folder / model / "config.json").write_text(json.dumps(config))
            for name, method in WAYS.items():
                memory = needs(method, model, folder)
                fit = [cards * int(size // memory) for size, cards in CARDS.values()]
                told = " | ".join(str(count) if count else "no" for count in fit)
                yield f"| {model} | {name} | {gib(memory)} | {told} |"


def page(text: str) -> str:
    """Return the page with its table written anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n".join(lines()) + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), encoding="utf-8")
