"""Run the released losses beside this project's batches and write down what they did.

Needs checkouts of the released code, which are no dependency, and none of which is kept here:

    python tests/golden/record_losses.py OPEN_UNLEARNING UNLEARN_SIMPLE tests/golden
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import importlib.util
import json
import platform
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch

from tests.golden import loss_inputs as given


def released(checkout: Path, *names: str) -> list[Any]:
    """Import modules of the released trainers without what they stand on.

    Args:
        checkout: The source folder that holds the package `trainer`.
        *names: Modules in `trainer.unlearn`.
    """
    for name in ("trainer", "trainer.unlearn"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    base: Any = types.ModuleType("trainer.unlearn.base")
    base.UnlearnTrainer = object  # the losses use nothing of it
    sys.modules["trainer.unlearn.base"] = base
    return [importlib.import_module(f"trainer.unlearn.{name}") for name in names]


def released_wmdp(checkout: Path) -> Any:
    """Import the losses for WMDP without the trainer they stand on."""
    package = types.ModuleType("wmdp_unlearn")
    package.__path__ = [str(checkout / "WMDP/src/unlearn")]
    base: Any = types.ModuleType("wmdp_unlearn.base")
    base.BaseTrainer = object
    sys.modules |= {"wmdp_unlearn": package, "wmdp_unlearn.base": base}
    return importlib.import_module("wmdp_unlearn.GA")


def inputs(rows: list[Any]) -> dict[str, torch.Tensor]:
    """Return rows as the released collator pads them: on the right, labels with -100."""
    width = max(len(row.ids) for row in rows)
    pads = [width - len(row.ids) for row in rows]
    ids = [[*row.ids, *[given.PAD] * n] for row, n in zip(rows, pads, strict=True)]
    seen = [[1] * len(row.ids) + [0] * n for row, n in zip(rows, pads, strict=True)]
    labels = [
        [i if scored else -100 for i, scored in zip(row.ids, row.target)] + [-100] * n
        for row, n in zip(rows, pads, strict=True)
    ]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(seen),
        "labels": torch.tensor(labels),
    }


def record(name: str, trainers: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Take the steps of one method with its released loss."""
    case, start = given.CASES[name], given.start(folder)
    model = start.load()
    trainer = trainers[case.trainer].__new__(trainers[case.trainer])
    for key, value in case.released.items():
        setattr(trainer, key, value)
    frozen = copy.deepcopy(model).requires_grad_(False)
    trainer.model, trainer.ref_model, trainer.infer_model = model, frozen, frozen
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=given.FIT.lr, eps=given.FIT.epsilon, weight_decay=0.0
    )
    steps = []
    for step in range(given.FIT.steps):
        rows = given.rows_of(case, start, folder, step)
        micro: Any = {role: inputs(part) for role, part in rows.items() if role != "preferred"}
        if "preferred" in rows:
            micro["forget"] = {
                "original": micro["forget"], "alternate": inputs(rows["preferred"])
            }  # fmt: skip
        if case.cut_retain:
            # The released KL counts the last position too, which predicts a token that no row has:
            # on rows that are one token shorter it is the same mean.
            micro["retain"] = {key: value[:, :-1] for key, value in micro["retain"].items()}
        if case.as_lists:
            order = ("input_ids", "attention_mask", "labels")
            micro = {role: [part[key] for key in order] for role, part in micro.items()}
        loss = trainer.compute_loss(model, micro)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        now = dict(model.named_parameters())
        steps.append({"loss": loss.item(), "moved": given.checksums(now, before)})
    return steps


def main() -> None:
    """Record every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("open_unlearning", type=Path)
    parser.add_argument("unlearn_simple", type=Path)
    parser.add_argument("to", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import transformers

    source = options.open_unlearning / "src"
    names = ("grad_ascent", "grad_diff", "npo", "simnpo", "dpo", "undial")
    classes = ("GradAscent", "GradDiff", "NPO", "SimNPO", "DPO", "UNDIAL")
    sys.path.insert(0, str(source))
    modules = released(source, *names)
    trainers = {c: getattr(m, c) for c, m in zip(classes, modules, strict=True)}
    wmdp = released_wmdp(options.unlearn_simple)
    trainers |= {"NPO_FT": wmdp.NPO_FT}
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.CASES:
            work = Path(folder) / name
            work.mkdir()
            runs[name] = record(name, trainers, work)
    files = [source / "trainer/utils.py"]
    files += [source / f"trainer/unlearn/{name}.py" for name in names]
    files += [options.unlearn_simple / "WMDP/src/unlearn/GA.py"]
    facts = {
        "what": "compute_loss of locuslab/open-unlearning@d3d7cf9 (MIT) and of "
        "OPTML-Group/Unlearn-Simple@f1a355d (MIT), WMDP, on the rows of loss_inputs.py",
        "sha256": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "optimizer": f"torch.optim.AdamW, lr {given.FIT.lr}, eps {given.FIT.epsilon}, no decay",
        "runs": runs,
    }
    text = json.dumps(facts, sort_keys=True) + "\n"
    (options.to / "loss_reference.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
