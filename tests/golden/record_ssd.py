"""Run the released SSD and Potion beside this project and write down what they did.

Needs checkouts of both (MIT, and GPL-3, which is run and not copied); neither is a dependency, and
none of that code is kept here. What they import beside torch and numpy is stubbed, since nothing
of it takes part.

    python tests/golden/record_ssd.py SSD_CHECKOUT POTION_CHECKOUT tests/golden
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
given = importlib.import_module("ssd_inputs")


def loaded(file: Path) -> Any:
    """Import a file of a checkout, whatever it imports that is not here."""
    spec = importlib.util.spec_from_file_location(file.stem + "_released", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    while True:
        try:
            spec.loader.exec_module(module)
            return module
        except ModuleNotFoundError as error:
            sys.modules[str(error.name)] = MagicMock()


class Rows(nn.Module):
    """A causal model as a classifier: one row of logits per predicted token."""

    def __init__(self, model: Any) -> None:
        """Wrap it."""
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return logits [B (T - 1), V]."""
        logits: Tensor = self.model(input_ids=ids_BT).logits[:, :-1]
        return logits.flatten(0, 1)


class Loader(list):  # type: ignore[type-arg]
    """Batches, and the number of rows as a data set."""

    @property
    def dataset(self) -> range:
        """As many things as there are rows."""
        return range(given.ROWS * len(self))


def model_of(tied: bool) -> Rows:
    """Return the model, fresh."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**given.CONFIG, tie_word_embeddings=tied)
    config._attn_implementation = "eager"
    model = MistralForCausalLM(config)
    given.fill(model)
    return Rows(model.eval())


def batches(role: str, order: Callable[[Tensor, Tensor], Any]) -> Loader:
    """Return the batches of a role as the released loaders give them."""
    out = Loader()
    for i in range(given.BATCHES[role]):
        ids_BT = given.ids(role, i)
        out.append(order(ids_BT, ids_BT[:, 1:].flatten()))
    return out


def sums(named: Any) -> dict[str, float]:
    """Return the sum of every tensor in float64."""
    return {
        n.removeprefix(
            "model.",
        ): float(t.detach().double().sum())
        for n, t in named
    }


def ssd(released: Any, tied: bool) -> dict[str, Any]:
    """Run SSD."""
    model = model_of(tied)
    settings = {
        "lower_bound": 1, "exponent": 1, "magnitude_diff": None, "min_layer": -1, "max_layer": -1,
        "forget_threshold": 1, "dampening_constant": given.SSD["lam"],
        "selection_weighting": given.SSD["alpha"],
    }  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    perturber = released.ParameterPerturber(model, optimizer, "cpu", settings)
    forget, retain = (batches(r, lambda x, y: (x, None, y)) for r in ("forget", "retain"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    small = perturber.calc_importance(forget)
    full = perturber.calc_importance(Loader([*retain, *forget]))
    perturber.modify_weight(full, small)
    now = dict(model.named_parameters())
    return {
        "forget": sums(small.items()),
        "full": sums(full.items()),
        "weights": sums(now.items()),
        "dampened": {n.removeprefix("model."): int((now[n] != before[n]).sum()) for n in before},
    }


@torch.no_grad()
def guesses(model: Rows, loader: Loader) -> Tensor:
    """Return the likeliest token at every position."""
    return torch.cat([model(x).argmax(1) for x, _, _ in loader])


def potion(released: Any) -> dict[str, Any]:
    """Run Potion's dampening in turns, each from the original weights, until rho is reached."""
    forget, retain = (batches(r, lambda x, y: (x, y, None)) for r in ("forget", "retain"))
    knew = guesses(model_of(tied=True), forget)
    share = len(forget) / (len(forget) + len(retain)) / 25
    turns: list[dict[str, Any]] = []
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # importances are kept in the working directory
        try:
            while True:
                model = model_of(tied=True)
                released.alfssd_tuning(model, forget, 1, 1, retain, "cpu", share, retain, x_D=True)
                known = float((guesses(model, forget) == knew).float().mean())
                turns.append({"share": share, "known": known,
                              "weights": sums(model.named_parameters())})  # fmt: skip
                if known <= given.RHO or len(turns) == 60:
                    break
                share *= 1.1
        finally:
            os.chdir(here)
    return {"turns": turns}


def main() -> None:
    """Record both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ssd", type=Path)
    parser.add_argument("potion", type=Path)
    parser.add_argument("to", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import transformers

    model_of(tied=True)  # transformers looks for packages, and must find no stubs
    files = {"ssd": options.ssd / "src/ssd.py", "potion": options.potion / "src/utils.py"}
    for name in ("torchvision", "matplotlib", "seaborn", "wandb", "optuna", "torchmetrics"):
        sys.modules.setdefault(name, MagicMock())
    released = {name: loaded(file) for name, file in files.items()}
    facts = {
        "what": "ParameterPerturber of if-loops/selective-synaptic-dampening@cdfdc0e (MIT) and "
        "alfssd_tuning of if-loops/towards_poison_unlearning@5b5e83f (GPL-3) on ssd_inputs.py",
        "sha256": {n: hashlib.sha256(f.read_bytes()).hexdigest() for n, f in files.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "transformers": transformers.__version__,
        },
        "attention": "eager",
        "ssd": {"tied": ssd(released["ssd"], True), "untied": ssd(released["ssd"], False)},
        "potion": potion(released["potion"]),
    }
    text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
    (options.to / "ssd_reference.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
