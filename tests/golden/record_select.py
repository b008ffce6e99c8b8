"""Run the released code of RepSelect and ELM beside this project and write down what it did.

Needs checkouts of both, which are no dependencies, and none of that code is kept here. Of ELM only
the function that makes targets runs apart from its script.

    python tests/golden/record_select.py REPSELECT ELM tests/golden
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import importlib.util
import json
import platform
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
given = importlib.import_module("select_inputs")
weights = importlib.import_module("rmu_inputs")

REPSELECT, ELM = "src/trainer/unlearn/repselect_simple.py", "trainscripts/erase.py"


def model() -> Any:
    """Return the model both start from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**given.CONFIG)
    config._attn_implementation = "eager"
    made = LlamaForCausalLM(config)
    weights.fill(made)
    return made.eval()


def record_repselect(file: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Return the sum of every edited weight after each subtraction, and what is subtracted."""

    class Trainer:
        """Stands in for the trainer below the method."""

        def __init__(self, model: Any, args: Any) -> None:
            self.model, self.args, self.state = model, args, types.SimpleNamespace()
            self.control = types.SimpleNamespace(should_training_stop=False)
            self.accelerator = types.SimpleNamespace(prepare=lambda model: model)
            keep = types.SimpleNamespace(
                on_train_begin=lambda *_: self.control, on_train_end=lambda *_: self.control
            )
            self.callback_handler = keep
            self.seen: list[dict[str, float]] = []

        def get_train_dataloader(self) -> list[dict[str, Any]]:
            batches = [given.ids(i) for i in range(given.BATCHES)]
            return [
                {"forget": {"input_ids": b, "attention_mask": torch.ones_like(b), "labels": b}}
                for b in batches
            ]

        def evaluate(self) -> None:
            edited = self.base_trainable_params  # type: ignore[attr-defined]
            sums = {str(i): float(w.double().sum()) for i, w in enumerate(edited)}
            self.seen.append(sums)

    base = types.ModuleType("trainer.unlearn.base")
    base.UnlearnTrainer = Trainer  # type: ignore[attr-defined]
    sys.modules |= {
        "trainer": types.ModuleType("trainer"),
        "trainer.unlearn": types.ModuleType("trainer.unlearn"),
        "trainer.unlearn.base": base,
    }
    spec = importlib.util.spec_from_file_location("repselect_simple", file)
    assert spec is not None
    assert spec.loader is not None
    released = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(released)
    plain, calls = torch.svd_lowrank, 0

    def seeded(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        torch.manual_seed(given.seed_for(f"components/{calls}"))
        calls += 1
        return plain(*args, **kwargs)

    args = types.SimpleNamespace(num_train_epochs=given.SUBTRACTIONS, learning_rate=given.LR)
    start = model()
    torch.manual_seed(given.seed_for("lora"))
    trainer = released.RepSelectSimple(
        n_pcs=given.COMPONENTS, lora_lr=given.LORA_LR, model=start, args=args
    )
    torch.svd_lowrank = seeded
    try:
        trainer.train()
    finally:
        torch.svd_lowrank = plain
    taken = {str(i): w.filtered_grad for i, w in enumerate(trainer.base_trainable_params)}
    return trainer.seen, taken


def record_elm(file: Path) -> torch.Tensor:
    """Return the target of one row, a distribution for each token."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    wanted = [n for n in tree.body if getattr(n, "name", "") == "get_edit_vector"]
    scope: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module(wanted, []), str(file), "exec"), scope)

    class Words(dict):  # type: ignore[type-arg]
        """What a tokenizer returns."""

        @property
        def input_ids(self) -> torch.Tensor:
            ids: torch.Tensor = self["input_ids"]
            return ids

        def to(self, _device: Any) -> Words:
            return self

    def tokenizer(texts: list[str], **_: Any) -> Words:
        ids = torch.tensor([[1, *map(int, text.split())] for text in texts])
        return Words(input_ids=ids, attention_mask=torch.ones_like(ids))

    def spoken(ids: list[int]) -> str:
        return "".join(f"{i} " for i in ids[1:])

    live = model()
    with torch.no_grad():
        target: torch.Tensor = scope["get_edit_vector"](
            live, tokenizer, spoken(given.text()), spoken(given.EXPERT), spoken(given.NOVICE),
            start_eta=1, end_eta=given.ETA, dtype=torch.float64, top_k=given.TOP,
            temperature=given.TEMPERATURE,
        )[0]  # fmt: skip
    return target


def main() -> None:
    """Record both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repselect", type=Path)
    parser.add_argument("elm", type=Path)
    parser.add_argument("to", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import peft
    import transformers

    steps, taken = record_repselect(options.repselect / REPSELECT)
    target = record_elm(options.elm / ELM)
    facts = {
        "what": {
            "repselect": "RepSelectSimple of filyp/open-unlearning@5955f30 (MIT)",
            "elm": "get_edit_vector of rohitgandikota/erasing-llm@fa33064 (no licence)",
        },
        "sha256": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for folder, name in ((options.repselect, REPSELECT), (options.elm, ELM))
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "repselect": steps,
    }
    tensors = {f"repselect/{k}": t.contiguous() for k, t in taken.items()}
    save_file({**tensors, "elm": target.contiguous()}, options.to / "select_reference.safetensors")
    text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
    (options.to / "select_reference.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
