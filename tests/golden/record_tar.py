"""Run TAR's released loops beside this project and write down what they did.

Needs a checkout of the released code, accelerate and schedulefree; none of that code is kept here.
FSDP is replaced by the bare model, wandb and the sampling of attackers by stand-ins.

    python tests/golden/record_tar.py CHECKOUT tests/golden
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
given = importlib.import_module("tar_inputs")
filled = importlib.import_module("rmu_inputs")


def batches(topic: str, count: int) -> list[dict[str, Tensor]]:
    """Return batches as the released loops take them."""
    rows = [given.ids(topic, i) for i in range(count)]
    return [
        {"input_ids": r, "labels": r.clone(), "attention_mask": torch.ones_like(r)} for r in rows
    ]


def sums(model: Any) -> dict[str, dict[str, Any]]:
    """Return sum and hash of the bytes of every weight."""
    return {
        name: {
            "sum": float(p.detach().double().sum()),
            "sha256": hashlib.sha256(p.detach().contiguous().numpy().tobytes()).hexdigest(),
        }
        for name, p in model.named_parameters()
    }


def main() -> None:
    """Record the random mapping and the tamper-resistance loop, in float32."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("to", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logged: list[dict[str, float]] = []
    steps: list[dict[str, Any]] = []
    live: dict[str, Any] = {}

    def log(values: dict[str, float]) -> None:
        logged.append(values)
        if "retain_loss" in values or "cos_loss" in values:
            facts = {k: float(v) for k, v in values.items() if k != "learning_rate"}
            steps.append({**facts, "parameters": sums(live["model"])})

    sys.path.insert(0, str(options.checkout))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    dist.init_process_group("gloo", rank=0, world_size=1)
    import accelerate
    import schedulefree
    import transformers
    from safetensors.torch import save_file

    # Not before: accelerate looks for the real one.
    sys.modules["wandb"] = types.SimpleNamespace(log=log)  # type: ignore[assignment]
    training: Any = importlib.import_module("modules.training")
    storage: Any = importlib.import_module("modules.fsdp_v1_utils")
    storage.fsdp_v1_model_params = lambda model: model.parameters()
    accelerator = accelerate.Accelerator(cpu=True)
    config = transformers.LlamaConfig(**given.CONFIG)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    filled.fill(model)
    frozen = copy.deepcopy(model)
    tensors: dict[str, Tensor] = {}
    runs: dict[str, Any] = {}

    def optimizer(trained: Any) -> Any:
        made = schedulefree.AdamWScheduleFree(
            trained.parameters(), lr=given.LR, warmup_steps=given.WARMUP, foreach=False
        )
        made.train()
        return made

    def keep(run: str, trained: Any, stepped: Any) -> None:
        tensors.update({f"{run}/{n}": p.detach().clone() for n, p in trained.named_parameters()})
        stepped.eval()
        tensors.update(
            {f"{run}.average/{n}": p.detach().clone() for n, p in trained.named_parameters()}
        )
        runs[run] = list(steps)
        steps.clear()

    live["model"] = mapped = copy.deepcopy(model)
    torch.manual_seed(7)
    tensors["mapping/table"] = torch.randn(config.vocab_size, config.hidden_size)
    torch.manual_seed(7)
    bare = optimizer(mapped)
    training.random_mapping_training_loop(
        mapped,
        {"retain": batches("retain", given.STEPS), "forget_train": batches("forget", given.STEPS)},
        accelerator.prepare_optimizer(bare),
        accelerator,
        gradient_accumulation_steps=1,
        max_steps=given.STEPS,
    )
    keep("mapping", mapped, bare)

    script = iter(given.ATTACKERS)
    now: dict[str, Any] = {}

    def task(choices: str) -> str:
        if "constant" in choices:
            return "constant"
        now["attacker"] = next(script)
        kind = now["attacker"][0]
        return (
            "retain_forget_switch"
            if kind == "switch"
            else {"forget": "forget_train"}.get(kind, kind)
        )

    training.distributed_sample_task = task
    training.distributed_sample_adversary_lr = lambda *_: now["attacker"][1]
    training._sample_switching_point = lambda *_: now["attacker"][2]
    training.AutoModelForCausalLM = types.SimpleNamespace(from_pretrained=lambda _: frozen)
    live["model"] = model
    bare = optimizer(model)
    count = given.INNER_STEPS * given.STEPS
    training.tar_training_loop(
        model,
        {
            "retain": batches("retain", given.STEPS + 1),  # the first warms FSDP up
            "meta": batches("unseen", given.STEPS),
            "forget_train": batches("forget", count),
            "other": batches("other", count),
            "adv_retain": batches("benign", count),
        },
        accelerator.prepare_optimizer(bare),
        accelerator,
        gradient_accumulation_steps=1,
        max_steps=given.STEPS,
        tar_inner_loop_steps=given.INNER_STEPS,
        tar_num_tasks_sampled=1,
        tar_inner_loop_subsample=given.EVERY,
        tar_tamper_resistance_grad_scale=given.SCALE,
        schedule_lambda=given.GROWTH,
        use_weighting_schedule=True,
        unbounded=True,
        retain_representations=True,
        adversary_lr_samples="1",
        adversary_lr_schedulers="constant:1.0",
    )
    keep("tar", model, bare)

    code = {
        name: hashlib.sha256((options.checkout / name).read_bytes()).hexdigest()
        for name in ("modules/training.py", "modules/objectives.py", "modules/fsdp_v1_utils.py")
    }
    facts = {
        "what": "tar_training_loop and random_mapping_training_loop of "
        "rishub-tamirisa/tamper-resistance (MIT) on the inputs of tar_inputs.py",
        "source": "github.com/rishub-tamirisa/tamper-resistance"
        "@19de233f652078f82dd45422331498ad431ab2da",
        "sha256": code,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "schedulefree": importlib.metadata.version("schedulefree"),
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "attention": "eager",
        "runs": runs,
    }
    save_file(tensors, options.to / "tar_reference.safetensors")
    text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
    (options.to / "tar_reference.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
