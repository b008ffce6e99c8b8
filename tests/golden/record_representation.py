"""Run the released losses of circuit breakers, RepNoise and RMU+LAT and write down what they did.

Needs checkouts of the released code, which is not kept here; what it imports beside torch,
transformers and peft is replaced by empty modules.

    python tests/golden/record_representation.py RR_FOLDER REPNOISE_FOLDER LAT_ROOT tests/golden

RR_FOLDER holds lorra_circuit_breaker.py, REPNOISE_FOLDER loss.py, LAT_ROOT the package latent_at.
"""

from __future__ import annotations

import argparse
import builtins
import hashlib
import importlib
import json
import platform
import sys
import tempfile
import types
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers

from excise.core.context import Context
from excise.models.lora import adapted
from tests.golden import representation_inputs as given


class Empty(types.ModuleType):
    """A module of which anything can be imported."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


def forge(*names: str) -> None:
    """Put empty modules where packages are not installed."""
    for name in names:
        sys.modules[name] = Empty(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)


def record_rr(module: Any, folder: Path) -> list[dict[str, Any]]:
    """Train the adapter with the released loss, torch's AdamW and the Trainer's clipping."""
    model: Any = given.start(folder).load_prefix(3)
    settings: Any = given.RR
    out = []
    seed = Context(work=folder).seed_for("lora")
    with adapted(model, settings["lora"], seed=seed) as live:
        trained = [p for p in live.parameters() if p.requires_grad]
        given.stir(trained)
        optimizer = torch.optim.AdamW(trained, lr=settings["fit"].lr, weight_decay=0.0)
        trainer = types.SimpleNamespace(current_training_step=0)
        trainer.get_training_progress = lambda: trainer.current_training_step / 300
        for step in range(given.STEPS):
            forget, retain = given.padded(1, step), given.padded(2, step)
            inputs = {
                "input_ids": retain.ids_BT, "attention_mask": retain.attention_BT.long(),
                "input_ids_circuit_breaker": forget.ids_BT,
                "attention_mask_circuit_breaker": forget.attention_BT.long(),
            }  # fmt: skip
            loss = module.compute_loss(trainer, live, inputs, [1, 2], settings["alpha"])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            out.append({"loss": float(loss), "parameters": given.sums(trained)})
    return out


def record_repnoise(module: Any, folder: Path) -> list[dict[str, Any]]:
    """Train all weights with the released loss and torch's AdamW."""
    model: Any = given.start(folder).load()
    settings: Any = given.REPNOISE
    fit = settings["fit"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=fit.lr, weight_decay=fit.weight_decay)
    out = []
    for step in range(given.STEPS):
        forget, retain = given.pair(step)
        layer = iter(range(100))
        mask_BT = forget.target_BT

        def drawn(like: Any, layer: Any = layer, step: int = step, mask: Any = mask_BT) -> Any:
            values = torch.zeros_like(like)
            values[mask] = given.noise(step, next(layer), like[mask].shape)
            return values

        both = [
            {"input_ids": b.ids_BT, "attention_mask": b.attention_BT.long()}
            for b in (forget, retain)
        ]
        with mock.patch.object(torch, "randn_like", drawn):
            loss = module.rep_noise_loss(
                model, *both, beta=settings["beta"], alpha=settings["alpha"]
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append({"loss": float(loss), "parameters": given.sums(model.parameters())})
    return out


class Ids:
    """Takes rows of token ids where the released code gives texts."""

    truncation_side = "left"

    def __call__(self, rows: Any, **_: Any) -> Any:
        if isinstance(rows, list):
            ids_BT = torch.stack(rows)
            mask_BT = torch.ones_like(ids_BT)
            return transformers.BatchEncoding({"input_ids": ids_BT, "attention_mask": mask_BT})
        return {"input_ids": rows}


def record_lat(module: Any, folder: Path) -> list[dict[str, Any]]:
    """Run the released loop; losses are noted as they are formed, weights after every step."""
    checkpoint = given.start(folder)
    model: Any = checkpoint.load()
    settings: Any = given.LAT
    turns = given.STEPS // settings["per_attack"]
    out: list[dict[str, Any]] = []
    losses: list[float] = []
    plain_mse, plain_adamw = torch.nn.functional.mse_loss, torch.optim.AdamW

    def mse(*args: Any) -> Any:
        value = plain_mse(*args)
        losses.append(float(value))
        return value

    class Recorded(plain_adamw):  # type: ignore[misc,valid-type]
        def step(self, closure: Any = None) -> Any:
            done = super().step(closure)
            params = self.param_groups[0]["params"]
            if params[0].dim() == 2:  # the model's and not the adversary's
                forget, retain = losses[-2:]
                loss = forget + settings["alpha"] * retain
                out.append({"loss": loss, "parameters": given.sums(params)})
            return done

    controls = [given.control(turn) for turn in range(turns)]
    adversary = module.GDAdversary
    with (
        mock.patch.object(torch, "rand", side_effect=controls),
        mock.patch.object(torch.nn.functional, "mse_loss", mse),
        mock.patch.object(torch.optim, "AdamW", Recorded),
        mock.patch.object(builtins, "breakpoint"),
        mock.patch.object(
            module, "GDAdversary", lambda dim, **named: adversary(dim=32, **named)
        ),
        mock.patch.object(
            module, "projected_gradient_descent",
            partial(module.projected_gradient_descent),
        ),
    ):  # fmt: skip
        module.projected_gradient_descent.keywords["device"] = "cpu"
        module.run_rmu(
            model, checkpoint.load, Ids(),
            [list(given.whole(3, turn).ids_BT) for turn in range(turns)],
            [list(given.whole(4, turn).ids_BT) for turn in range(turns)],
            alpha=settings["alpha"], layer_ids=[0, 1, 2], layer_id=2, lr=settings["fit"].lr,
            steering_coef=settings["steering"], pgd_layers=1, epsilon=settings["epsilon"],
            model_iterations_per_step=settings["per_attack"], max_num_batches=turns,
            inner_learning_rate=settings["attack_lr"],
            pgd_iterations_per_step=settings["attack_steps"],
        )  # fmt: skip
    return out


def main() -> None:
    """Record all three."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("rr", "repnoise", "lat", "to"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.Trainer  # noqa: B018 - imported before it could find an empty deepspeed
    forge(
        "deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero",
        "deepspeed.runtime.zero.partition_parameters", "cb_train_dataset", "utils", "args",
        "wandb", "dotenv", "einops", "latent_at.lat_datasets",
        "tasks", "tasks.general_capabilities", "tasks.wmdp",
        "tasks.general_capabilities.multiple_choice_tasks", "tasks.wmdp.WMDP_MCTask",
    )  # fmt: skip
    sys.path[:0] = [str(options.rr), str(options.repnoise), str(options.lat)]
    files = {
        "rr": options.rr / "lorra_circuit_breaker.py",
        "repnoise": options.repnoise / "loss.py",
        "lat": options.lat / "latent_at/lat_methods.py",
    }
    runs = {}
    for name, module, record in (
        ("rr", "lorra_circuit_breaker", record_rr),
        ("repnoise", "loss", record_repnoise),
        ("lat", "latent_at.lat_methods", record_lat),
    ):
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = record(importlib.import_module(module), Path(folder))
        sys.modules["deepspeed"] = None  # type: ignore[assignment] # only the first needs it
    facts = {
        "what": "losses and checksums of trained parameters (sum, sum of sizes) after every step "
        "of released code on the inputs of representation_inputs.py",
        "source": {
            "rr": "compute_loss of GraySwanAI/circuit-breakers (MIT), in the copy of NexusSin/"
            "Llama-3-IHL-Circuit-Breakers-Testing-and-Compliance@2877690",
            "repnoise": "rep_noise_loss of domenicrosati/representation-noising@03689ff "
            "(Apache-2.0)",
            "lat": "run_rmu of aengusl/latent-adversarial-training@53ac752 (MIT), its breakpoints "
            "passed over and the width of its adversary set to the model's",
        },
        "sha256": {n: hashlib.sha256(f.read_bytes()).hexdigest() for n, f in files.items()},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "peft": peft.__version__,
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "runs": runs,
    }  # fmt: skip
    text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
    (options.to / "representation_reference.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
