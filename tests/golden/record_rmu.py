"""Run RMU's released loop beside this project and write down what it did.

Needs transformers 4.38.2 (the last line with its own AdamW that runs) and a checkout of the
released code; neither is a dependency, and none of that code is kept here.

    python tests/golden/record_rmu.py CHECKOUT tests/golden
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
given = importlib.import_module("rmu_inputs")


class Words(dict):  # type: ignore[type-arg]
    """What a tokenizer returns: a mapping that moves between devices."""

    def to(self, device: Any) -> Words:
        """Stay on the CPU."""
        return self


class FakeTokenizer:
    """Takes batches of token ids where the released code gives texts."""

    truncation_side = "left"

    def __call__(self, rows: list[list[int]], max_length: int, **_: Any) -> Words:
        """Return ids and mask."""
        ids, mask = given.padded(rows, max_length)
        return Words(input_ids=ids, attention_mask=mask)

    def save_pretrained(self, folder: str) -> None:
        """Save nothing."""


def sums(named: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return checksums of tensors: sum and hash of the bytes."""
    return {
        name: {
            "sum": float(t.detach().double().sum()),
            "sha256": hashlib.sha256(
                t.detach().contiguous().view(torch.uint8).numpy().tobytes()
            ).hexdigest(),
        }
        for name, t in named.items()
    }


def record(unlearn: Any, transformers: Any, dtype: torch.dtype) -> tuple[dict[str, Any], Any]:
    """Run the loop once and return its numbers and the tensors it ended with."""
    config = transformers.MistralConfig(**given.CONFIG)
    models = []
    for _ in range(2):
        model = transformers.MistralForCausalLM._from_config(config, attn_implementation="eager")
        given.fill(model)
        models.append(model.to(dtype))
    trained = {
        f"model.layers.{i}.mlp.down_proj.weight": models[0].model.layers[i].mlp.down_proj.weight
        for i in given.TRAINED
    }
    steps: list[dict[str, Any]] = []
    losses: list[float] = []
    plain_mse, plain_adamw = torch.nn.functional.mse_loss, unlearn.AdamW

    def mse(*args: Any) -> Tensor:
        value = plain_mse(*args)
        losses.append(value.item())
        return value

    class Recorded(plain_adamw):  # type: ignore[misc,valid-type]
        def step(self, closure: Any = None) -> Any:
            out = super().step(closure)
            forget, retain = losses[-2:]
            steps.append({"forget": forget, "retain": retain, "parameters": sums(trained)})
            return out

    args = argparse.Namespace(
        layer_ids=list(given.TRAINED), param_ids=[6], layer_id=given.LAYER, lr=given.LR,
        module_str="{model_name}.model.layers[{layer_id}]", verbose=False,
        steering_coeff_list=list(given.STEERING), alpha=list(given.ALPHA),
        max_num_batches=given.STEPS,
    )  # fmt: skip
    torch.manual_seed(7)
    controls = {}
    for topic, norm in enumerate(given.STEERING):
        u = torch.rand(1, 1, given.CONFIG["hidden_size"], dtype=dtype)
        controls[f"control.{topic}"] = (u / torch.norm(u) * norm).flatten()
    batches = given.STEPS
    forget = [[given.texts(t, i) for i in range(batches)] for t in range(given.TOPICS)]
    retain = [[given.texts(-1, i) for i in range(batches)]] * given.TOPICS
    functional: Any = torch.nn.functional
    functional.mse_loss, unlearn.AdamW = mse, Recorded
    torch.manual_seed(7)
    try:
        with tempfile.TemporaryDirectory() as folder:
            args.output_dir = folder
            unlearn.run_rmu(models[0], models[1], FakeTokenizer(), forget, retain, args)
    finally:
        torch.nn.functional.mse_loss, unlearn.AdamW = plain_mse, plain_adamw
    before = dict(models[1].named_parameters())
    now = dict(models[0].named_parameters())
    moved = sorted(n for n, p in now.items() if not torch.equal(p, before[n]))
    ends = {**controls, **{n: t.detach().clone() for n, t in trained.items()}}
    return {"steps": steps, "moved": moved}, ends


def main() -> None:
    """Record both dtypes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("--source", default="", help="where the checkout is from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(options.checkout))
    import transformers
    from safetensors.torch import save_file

    unlearn = importlib.import_module("rmu.unlearn")
    tensors: dict[str, Tensor] = {}
    runs = {}
    for name in ("float32", "bfloat16"):
        runs[name], ends = record(unlearn, transformers, getattr(torch, name))
        tensors |= {f"{name}/{key}": t for key, t in ends.items()}
    code = {
        name: hashlib.sha256((options.checkout / name).read_bytes()).hexdigest()
        for name in ("rmu/unlearn.py", "rmu/utils.py")
    }
    facts = {
        "what": "run_rmu of centerforaisafety/wmdp (MIT) on the inputs of rmu_inputs.py",
        "source": options.source,
        "sha256": code,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "attention": "eager",
        "optimizer": "transformers.AdamW, eps 1e-6, weight decay 0",
        "runs": runs,
    }
    save_file(tensors, options.to / "rmu_reference.safetensors")
    text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
    (options.to / "rmu_reference.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
