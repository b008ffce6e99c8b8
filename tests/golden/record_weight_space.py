"""Run released code of three methods on small models and write down what it gave.

Needs checkouts of the three repositories, and einops, tqdm and huggingface_hub, which their files
import; none of that code is kept here.

    python tests/golden/record_weight_space.py REFUSAL_DIRECTION UNLEARN MUSE_BENCH tests/golden
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
given = importlib.import_module("weight_space_inputs")


def released(checkout: Path, file: str) -> Any:
    """Import one file of a checkout by itself."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, checkout / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Ids:
    """What a tokenizer returns."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.input_ids = torch.tensor(rows)
        self.attention_mask = torch.ones_like(self.input_ids)


def direction(checkout: Path) -> dict[str, Tensor]:
    """Difference of means before block 2, and matrices without it."""
    sys.path.insert(0, str(checkout))
    means = released(checkout, "pipeline/submodules/generate_directions.py")
    utils = released(checkout, "pipeline/utils/utils.py")
    model = given.model(0)
    difference = means.get_mean_diff(
        model, None, given.rows(0), given.rows(1),
        lambda instructions: Ids(instructions), list(model.model.layers), batch_size=4,
        positions=[given.POSITION],
    )[0, given.LAYER + 1]  # fmt: skip
    clear = utils.get_orthogonalized_matrix
    block = model.model.layers[0]
    return {
        "direction.difference": difference,
        "direction.embed": clear(model.model.embed_tokens.weight.data, difference),
        "direction.o_proj": clear(block.self_attn.o_proj.weight.data.T, difference).T,
        "direction.down_proj": clear(block.mlp.down_proj.weight.data.T, difference).T,
    }


def affine(checkout: Path) -> dict[str, Tensor]:
    """The map from one model's activations before block 1 to another's."""
    fitter = released(checkout, "unlearn/algorithm/online_affine_fitter.py")
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in given.rows(1)]
    found = fitter.train_affine_transform(
        given.model(1), given.model(0), data, [given.LAYER + 1], num_examples=len(data),
        device="cpu", alpha=given.RIDGE,
    )[given.LAYER + 1]  # fmt: skip
    return {"affine.weight": found.weight.detach(), "affine.bias": found.bias.detach()}


def task_vector(checkout: Path) -> dict[str, Tensor]:
    """One model minus `SCALE` times its difference from another."""
    release = released(checkout, "baselines/baselines/task_vector.py")
    before, after = given.model(0), given.model(1)
    vector = release.TaskVector(
        pretrained_state_dict=before.state_dict(), finetuned_state_dict=after.state_dict()
    )
    new = (-vector).apply_to(pretrained_model=before, scaling_coef=given.SCALE, in_place=False)
    return {f"task_vector.{name}": new[name] for name in given.COMPARED}


FILES = {
    "andyrdt/refusal_direction@9d852fa (Apache-2.0)": (
        "pipeline/submodules/generate_directions.py", "pipeline/utils/utils.py",
    ),
    "EleutherAI/unlearn@1a6079f (MIT)": ("unlearn/algorithm/online_affine_fitter.py",),
    "jaechan-repo/muse_bench@54719c5 (no licence file)": ("baselines/baselines/task_vector.py",),
}  # fmt: skip
"""What is run of each repository."""


def main() -> None:
    """Record all three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", type=Path, nargs=3)
    parser.add_argument("to", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import transformers
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for run, checkout in zip((direction, affine, task_vector), options.checkouts, strict=True):
        with torch.no_grad():
            tensors |= run(checkout)
    facts = {
        "what": "released functions of three repositories on the inputs of weight_space_inputs.py",
        "sha256": {
            source: {
                name: hashlib.sha256((checkout / name).read_bytes()).hexdigest() for name in files
            }
            for (source, files), checkout in zip(FILES.items(), options.checkouts, strict=True)
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        options.to / "weight_space_reference.safetensors",
    )
    text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
    (options.to / "weight_space_reference.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
