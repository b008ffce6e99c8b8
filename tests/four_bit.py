"""The real bitsandbytes under an adapter: a base in NF4 against ten lines that round it beforehand.

Run by `make bitsandbytes-test`, as `pytest tests/four_bit.py`: peft imports bitsandbytes wherever
it is installed, and `make test` is to run without it. `python -m tests.four_bit` is the part that
runs on the second device of the tests, in a process of its own.
"""

from __future__ import annotations

import copy
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from excise.cli import main
from excise.core.errors import UserError
from excise.models.checkpoint import Checkpoint
from excise.models.lora import LoRA, adapted, linears_in_4bit, merge, reference, targets
from excise.models.tiny import FAMILIES, tiny_model
from excise.record import load
from excise.testing import check_method, toy_start
from excise.train.recompute import recomputed
from tests.cli import material
from tests.cli.test_torchrun import by_hand, weights
from tests.device.second_device import NAME, install
from tests.matrix.test_methods import domain_for, made

IDS_BT = torch.arange(4, 24).view(2, 10)
QLORA = LoRA(rank=2, load_in_4bit=True)
REFUSED = ("gpt2", "mixtral")
"""Families of convolutions by name, and of experts in one tensor."""


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """Return a model whose matrices have rows of several blocks of 64 weights."""
    return tiny_model(family, width=128).to(dtype)


def rounded(weight: Tensor) -> Tensor:
    """Return a weight through NF4 with double quantization and back."""
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight.detach(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    back: Tensor = bitsandbytes.functional.dequantize_4bit(packed, state)
    return back


def rounded_model(model: nn.Module) -> Any:
    """Return a copy whose matrices inside the blocks are rounded, and nothing else is."""
    other = copy.deepcopy(model)
    for name in targets(model)[0]:
        layer: Any = other.get_submodule(name)
        layer.weight.data = rounded(layer.weight)
    return other


def moved_off_the_start(model: nn.Module) -> None:
    """Give an adapter other weights than those it starts with, of which half are zero."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def one_step(model: Any, *, again: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients of the adapter, by the ends of their names."""
    with ExitStack() as stack:
        if again:
            stack.enter_context(recomputed(model))
        loss = model(input_ids=IDS_BT, labels=IDS_BT, use_cache=False).loss
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def apart(one: Tensor, two: Tensor) -> float:
    """Return the largest difference over the largest entry."""
    return float((one - two).abs().max() / two.abs().max())


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in REFUSED])
def test_a_step_is_that_of_weights_rounded_beforehand(
    family: str, dtype: torch.dtype, limit: float, again: bool
) -> None:
    model = tiny(family, dtype)
    plain = rounded_model(model)
    config = peft.LoraConfig(
        r=2, lora_alpha=16, target_modules=targets(plain)[0], task_type="CAUSAL_LM"
    )
    plain = peft.get_peft_model(plain, config).eval()
    moved_off_the_start(plain)
    expected, gradients = one_step(plain, again=False)
    with adapted(model, QLORA) as live:
        moved_off_the_start(live)
        with torch.no_grad():  # which must not change what the layers are laid out for
            live(IDS_BT)
        loss, found = one_step(live, again=again)
    assert apart(loss, expected) <= limit
    assert found.keys() == gradients.keys()
    assert len(found) == 2 * len(targets(model)[0])
    for name, gradient in gradients.items():
        assert float(gradient.abs().max()) > 0, name
        assert apart(found[name], gradient) <= limit, name
    whole = peft.get_peft_model(tiny(family, dtype), config).eval()
    moved_off_the_start(whole)
    unrounded, others = one_step(whole, again=False)
    assert apart(unrounded, expected) > 0
    if dtype == torch.float32:  # what is held to the limit is not what rounding does not change
        assert all(apart(others[name], gradient) > 100 * limit for name, gradient in found.items())


def test_the_layers_are_in_4_bits_and_nothing_else_is() -> None:
    model = tiny()
    rest = {n: p for n, p in model.named_parameters() if "proj" not in n}
    assert len(linears_in_4bit(model)) == 14
    layers = {name: model.get_submodule(name) for name in targets(model)[0]}
    originals = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    with adapted(model, QLORA) as live:
        held = {n: m for n, m in live.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
        assert len(held) == 14
        bare = live.base_model.model
        for name, original in originals.items():
            weight = bare.get_submodule(name).base_layer.weight
            assert weight.dtype == torch.uint8
            assert weight.numel() == original.numel() // 2
            assert not weight.requires_grad
            assert torch.equal(weight.original, original)
            assert layers[name].weight.numel() == 0
            assert (weight.quant_state.quant_type, weight.quant_state.nested) == ("nf4", True)
            back = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(back, rounded(original))
            lost = float((back - original).norm() / original.norm())
            assert 0.05 < lost < 0.15, name
        kept = dict(bare.named_parameters())
        assert all(kept[name] is parameter for name, parameter in rest.items())


def test_no_layer_waits_in_two_places_for_the_collector() -> None:
    """What is replaced is freed at once: a circle of references would hold all of it."""
    model = tiny()
    with adapted(model, QLORA) as live:
        held = [m for m in live.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
        assert all(getattr(layer.weight, "module", None) is None for layer in held)


def test_an_adapter_that_is_off_leaves_the_rounded_base() -> None:
    model = tiny()
    plain, expected = model(IDS_BT).logits, rounded_model(model)(IDS_BT).logits
    with adapted(model, QLORA) as live, torch.no_grad():
        assert apart(live(IDS_BT).logits, expected) <= 1e-6  # starts as the identity
        moved_off_the_start(live)
        assert apart(live(IDS_BT).logits, expected) > 1e-3
        with reference(live):
            assert apart(live(IDS_BT).logits, expected) <= 1e-6
            assert apart(live(IDS_BT).logits, plain) > 1e-3


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_what_it_was_afterwards(fails: bool) -> None:
    model = tiny("qwen2")  # its projections have biases
    model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    model.train()
    modules = dict(model.named_modules())
    parameters = {n: (p, p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    with suppress(ZeroDivisionError), adapted(model, QLORA) as live:
        live.eval()
        moved_off_the_start(live)
        one_step(live, again=False)
        _ = 1 / (not fails)
    now = dict(model.named_modules())
    assert list(now) == list(modules)
    assert all(now[name] is module for name, module in modules.items())
    assert not any(module.training for module in now.values())
    for name, parameter in model.named_parameters():
        was, bits, required = parameters[name]
        assert parameter is was
        assert torch.equal(parameter, bits)
        assert parameter.requires_grad == required
        assert parameter.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_is_added_to_the_weights_that_were_not_rounded(dtype: torch.dtype) -> None:
    model = tiny(dtype=dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with adapted(model, QLORA) as live:
        moved_off_the_start(live)
        adapter = {n: p.detach().clone() for n, p in live.named_parameters() if "lora_" in n}
        merged, cost = merge(live)
    lost = whole = 0.0
    for name in targets(model)[0]:
        a, b = (adapter[f"base_model.model.{name}.lora_{side}.default.weight"] for side in "AB")
        weight = before[f"{name}.weight"]
        expected = (weight.float() + (b @ a) * (16 / 2)).to(dtype)
        assert torch.equal(merged[f"{name}.weight"], expected)
        lost += float((rounded(weight).float() - weight.float()).square().sum())
        whole += float(weight.float().square().sum())
    assert len(merged) == 14
    assert cost["base_rounding_nf4"] == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert 0.05 < cost["base_rounding_nf4"] < 0.15
    with adapted(model, LoRA(rank=2)) as live:
        assert "base_rounding_nf4" not in merge(live)[1]


@pytest.mark.parametrize("family", REFUSED)
def test_other_layers_are_refused(family: str) -> None:
    model = tiny_model(family, width=32)
    with pytest.raises(UserError, match="is none"), adapted(model, QLORA):
        pass


@pytest.mark.parametrize(
    "name",
    [
        "grad_diff", "npo", "dpo", "undial", "rmu", "rmu_lat", "repnoise", "task_vector", "refusal",
        "elm", "circuit_breakers", "checkpoint_transfer",
    ],
)  # fmt: skip
def test_methods_keep_the_contract(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same seed, same bytes; killed and resumed, the same; padding and micro-batches do not matter.

    That every one of its adapters lay on a base in 4 bits is counted.
    """
    made_of: list[Any] = []
    init = bitsandbytes.nn.Linear4bit.__init__

    def counted(self: Any, *args: Any, **more: Any) -> None:
        made_of.append(self)
        init(self, *args, **more)

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "__init__", counted)
    wide = partial(toy_start, hidden_size=64, intermediate_size=128)
    for module in ("excise.testing.methods", "tests.matrix.test_methods"):
        monkeypatch.setattr(f"{module}.toy_start", wide)
    method = made(name)
    rank = 4 if name in ("elm", "circuit_breakers") else 2
    lora = LoRA(rank=rank, output="adapter", load_in_4bit=True)
    method = method.model_copy(update={"lora": lora})
    check_method(method, families=("llama",), steps=3, domain=domain_for(name))
    assert len(made_of) >= 6 * 14


def test_originals_wait_on_the_cpu_while_the_model_is_elsewhere() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.four_bit"],
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},  # which knows no device of others
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def on_the_second_device() -> None:
    """Check devices while the base is in 4 bits, and that the model is what it was afterwards."""
    install()
    model = tiny_model("llama", width=256).to(f"{NAME}:0")
    parameters = {n: (p, p.detach().cpu()) for n, p in model.named_parameters()}
    with adapted(model, QLORA) as live:
        held = [m for m in live.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
        assert len(held) == 14
        for layer in held:
            assert layer.weight.device.type == layer.weight.quant_state.absmax.device.type == NAME
            assert layer.weight.original.device.type == "cpu"
        ids_BT = IDS_BT.to(f"{NAME}:0")
        live(input_ids=ids_BT, labels=ids_BT).loss.backward()
        merged, _ = merge(live)
        assert {tensor.device.type for tensor in merged.values()} == {"cpu"}
    for name, parameter in model.named_parameters():
        was, bits = parameters[name]
        assert parameter is was
        assert parameter.device.type == NAME
        assert torch.equal(parameter.cpu(), bits)


def excise(line: str) -> int:
    """Run a command line in this process."""
    return main(shlex.split(line))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Work in a folder with a model and rows."""
    folder = tmp_path_factory.mktemp("work")
    material.save_tiny(folder / "model", width=64)
    (folder / "f.jsonl").write_text(material.texts("f"))
    (folder / "r.jsonl").write_text(material.texts("r"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.mark.parametrize("method", ["grad_diff", "npo", "rmu --layer 0"])
def test_from_the_command_line(work: Path, method: str) -> None:
    out = method.split()[0]
    line = (
        f"remove {method} --model model --forget f.jsonl --retain r.jsonl --fit.steps 3"
        " --max_length 32 --workers 1 --quiet --lora.rank 4 --lora.output adapter"
    )
    assert excise(f"{line} --lora.load_in_4bit true --out {out}") == 0
    assert excise(f"{line} --out {out}-whole") == 0
    four, whole = load(work / out), load(work / f"{out}-whole")
    run, other = four.method_runs[0], whole.method_runs[0]
    assert (run.method["lora"]["load_in_4bit"], other.method["lora"]["load_in_4bit"]) == (
        True,
        False,
    )
    assert run.extras["lora"]["load_in_4bit"] is True
    assert 0.05 < run.extras["lora"]["base_rounding_nf4"] < 0.15
    assert "base_rounding_nf4" not in other.extras["lora"]
    assert four.environment.versions["bitsandbytes"] == bitsandbytes.__version__
    assert run.model.fingerprint != other.model.fingerprint
    assert "load_in_4bit" in (work / out / "report.html").read_text()
    # The adapter alone makes the model again, from the weights that were not rounded.
    weights = load_file(work / out / "adapter/adapter_model.safetensors")
    assert weights
    assert all("lora_" in name for name in weights)
    assert excise(f"export {out} --base model --merge --out {out}-merged") == 0
    assert Checkpoint(work / f"{out}-merged").fingerprint == run.model.fingerprint


def test_two_processes_give_the_model_of_one(work: Path) -> None:
    line = (
        "remove grad_diff --model model --forget f.jsonl --retain r.jsonl --max_length 32 --quiet"
        " --fit.steps 3 --fit.batch_size 8 --fit.eps 1e-3 --fit.lr 0.03 --lora.load_in_4bit true"
    )
    assert excise(f"{line} --workers 1 --out one/out") == 0
    codes, said = by_hand(f"{line} --out two/out", work)
    assert codes == [0, 0], said
    assert load(work / "two/out").method_runs[0].extras["lora"]["base_rounding_nf4"] > 0.05
    one, two, start = (
        weights(work / "one/out"),
        weights(work / "two/out"),
        Checkpoint(work / "model"),
    )
    before = start.weights_of(start.parameter_names())
    apart_by = max(float((one[n] - two[n]).abs().max()) for n in one)
    moved_by = max(float((one[n] - before[n]).abs().max()) for n in one)
    assert apart_by <= 1e-6
    assert moved_by > 1e-3


def test_a_sweep_adds_every_update_to_the_originals(work: Path) -> None:
    line = (
        "remove rmu --model model --forget f.jsonl --retain r.jsonl --layer 0 --fit.steps 3"
        " --max_length 32 --workers 1 --quiet --lora.load_in_4bit true"
    )
    assert excise(f"{line} --steering 5 --engine cached --out alone") == 0
    assert excise(f"{line} --sweep.steering 5 --engine cached --out swept") == 0
    alone, swept = (load(work / out).method_runs[0] for out in ("alone", "swept"))
    assert alone.model.fingerprint == swept.model.fingerprint
    assert alone.changed


if __name__ == "__main__":
    on_the_second_device()
