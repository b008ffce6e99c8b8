"""Adapters: kept beside the model where that was asked, and merged at any scale."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli import material as m
from torch import Tensor

import excise as ex
from excise import record
from excise.cli import main
from excise.core.errors import UserError
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.delta import export_adapter
from excise.models.tiny import byte_tokenizer, tiny_model

IDS_BT = torch.arange(4, 24).view(2, 10)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS_BT).logits  # type: ignore[no-any-return]


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return save_model(tiny_model("llama", width=32), byte_tokenizer(), tmp_path / "base")


def save_adapter(base: Checkpoint, to: Path, **settings: Any) -> Path:
    """Write an adapter as plain peft does, none of its matrices zero."""
    config = peft.LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    torch.manual_seed(0)
    model = peft.get_peft_model(base.load(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(str(to))
    return to


@pytest.mark.parametrize(
    ("family", "targets", "rank"),
    [("llama", ["q_proj", "down_proj"], False), ("gpt2", ["c_attn", "c_fc"], False),
     ("llama", ["v_proj"], True)],
)  # fmt: skip
def test_an_adapter_is_added_and_subtracted(
    family: str, targets: list[str], rank: bool, tmp_path: Path
) -> None:
    base = save_model(tiny_model(family, width=32), byte_tokenizer(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=targets, use_rslora=rank,
                           fan_in_fan_out=family == "gpt2")  # fmt: skip
    whole = peft.PeftModel.from_pretrained(base.load(), str(adapter)).merge_and_unload()
    command = ["export", str(adapter), "--base", str(base.path), "--merge", "--out"]
    assert main([*command, str(tmp_path / "plus")]) == 0
    torch.testing.assert_close(logits(Checkpoint(tmp_path / "plus").load()), logits(whole))
    assert main([*command, str(tmp_path / "minus"), "--scale", "-1"]) == 0
    before, after = (dict(model.named_parameters()) for model in (base.load(), whole))
    minus = dict(Checkpoint(tmp_path / "minus").load().named_parameters())
    moved = 0
    for name, weight in before.items():
        torch.testing.assert_close(minus[name], 2 * weight - after[name])
        moved += not torch.equal(minus[name], weight)
    assert moved == 2 * len(targets)
    half = export_adapter(adapter, base, tmp_path / "half", scale=-0.5)
    for name, weight in half.load().named_parameters():
        torch.testing.assert_close(weight, 1.5 * before[name] - 0.5 * after[name])


def test_an_audit_takes_an_adapter_as_an_edit_of_its_original(
    base: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.jsonl").write_text(m.texts(name, 40))
    data = ["--forget", str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl")]
    pair = ["audit", "--model", str(adapter), "--original", str(base.path), *data]
    out = tmp_path / "audit"
    assert main([*pair, "--budget", "smoke", "--dry-run"]) == 0
    change = json.dumps({"steps": 1, "checkpoints": [0, 1], "rates": [1e-3], "max_test_rows": 4})
    assert main([*pair, "--audit.change", change, "--out", str(out), "--workers", "1"]) == 0
    (run,) = record.load(out).method_runs
    merged = export_adapter(adapter, base, tmp_path / "merged")
    assert run.model.fingerprint == merged.fingerprint != base.fingerprint
    other = save_model(tiny_model("gpt2", width=32), byte_tokenizer(), tmp_path / "other")
    assert main([*pair[:4], str(other.path), *data, "--out", str(tmp_path / "no")]) == 2
    assert "adapter" in capsys.readouterr().err


def test_the_merged_model_is_stored_as_its_base_is(tmp_path: Path) -> None:
    model = tiny_model("llama", width=32).to(torch.bfloat16)
    base = save_model(model, byte_tokenizer(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    merged = export_adapter(adapter, base, tmp_path / "out", scale=-1)
    assert {t.dtype for t in merged.weights_of(merged.parameter_names()).values()} == {
        torch.bfloat16
    }
    assert main(["export", str(adapter), "--base", str(base.path), "--out", "x"]) == 2


def _ia3(base: Checkpoint, to: Path) -> None:
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    peft.get_peft_model(base.load(), config).save_pretrained(str(to))


def _plain(base: Checkpoint, to: Path) -> None:
    save_adapter(base, to, target_modules=["q_proj"])


def _changed(**fields: Any) -> Callable[[Checkpoint, Path], object]:
    def make(base: Checkpoint, to: Path) -> None:
        _plain(base, to)
        config = json.loads((to / "adapter_config.json").read_text())
        (to / "adapter_config.json").write_text(json.dumps(config | fields))

    return make


def _weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Checkpoint, Path], object]:
    def make(base: Checkpoint, to: Path) -> None:
        _plain(base, to)
        weights = load_file(to / "adapter_model.safetensors")
        change(weights)
        save_file(weights, to / "adapter_model.safetensors")

    return make


def _wider(base: Checkpoint, to: Path) -> None:
    other = save_model(tiny_model("llama", width=64), byte_tokenizer(), to.parent / "other")
    _plain(other, to)


def _pickled(base: Checkpoint, to: Path) -> None:
    _plain(base, to)
    (to / "adapter_model.safetensors").rename(to / "adapter_model.bin")


def _cut(base: Checkpoint, to: Path) -> None:
    _plain(base, to)
    (to / "adapter_model.safetensors").write_bytes(b"\x00" * 40)


WRONG: dict[str, tuple[Callable[[Checkpoint, Path], object], str]] = {
    "no LoRA": (_ia3, "holds an adapter of kind .*IA3; only LoRA is read"),
    "DoRA": (
        lambda base, to: save_adapter(base, to, target_modules=["q_proj"], use_dora=True),
        "sets use_dora, so it is more than a product",
    ),
    "whole modules": (
        lambda base, to: save_adapter(base, to, target_modules=["q_proj"],
                                      modules_to_save=["lm_head"]),
        "sets modules_to_save, so",
    ),
    "a moved base": (_changed(init_lora_weights="pissa"), "sets init_lora_weights, so"),
    "another size": (_wider, "does not fit the base; name the model it was trained on"),
    "modules that are not there": (_changed(target_modules=["query"]), "does not fit the base"),
    "a matrix less": (_weights(lambda w: w.pop(min(w))), r"does not fit the base.*\(it lacks '"),
    "a matrix more": (
        _weights(lambda w: w.update({"base_model.model.x.lora_A.weight": torch.ones(2, 2)})),
        r"does not fit the base.*\(it has '",
    ),
    "a pickle": (_pickled, r"holds no adapter_model\.safetensors"),
    "garbage": (_cut, "cannot be read: .*copy it again"),
    "a broken config": (_changed(peft_type="NONE"), "cannot be read: .*copy it again"),
    "nothing": (lambda base, to: to.mkdir(), r"holds no adapter_config\.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_adapter_of_the_base_is_refused(
    case: str, base: Checkpoint, tmp_path: Path
) -> None:
    make, message = WRONG[case]
    make(base, tmp_path / "adapter")
    with pytest.raises(UserError, match=message) as caught:
        export_adapter(tmp_path / "adapter", base, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_shared_weight_is_not_merged(tmp_path: Path) -> None:
    base = save_model(tiny_model("gpt2", width=32), byte_tokenizer(), tmp_path / "base")
    assert base.load().config.tie_word_embeddings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says the same
        adapter = save_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(UserError, match=r"the adapter is on 'lm_head\.weight', which is shared"):
        export_adapter(adapter, base, tmp_path / "out")


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_scales_that_mean_nothing(scale: float, base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adds nothing that can be written"):
        export_adapter(tmp_path / "adapter", base, tmp_path / "out", scale=scale)


def test_a_removal_keeps_its_adapter_where_that_was_asked(base: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(m.texts("f"))
    (tmp_path / "r.jsonl").write_text(m.texts("r"))
    out = tmp_path / "out"
    fit = {"steps": 2, "lr": 0.01, "batch_size": 2}
    method = ex.GradDiff.model_validate(
        {"lora": {"rank": 2, "output": "adapter"}, "fit": fit, "max_length": 16}
    )
    domain = ex.Files.model_validate(
        {"forget": str(tmp_path / "f.jsonl"), "retain": str(tmp_path / "r.jsonl")}
    )
    ex.remove(base, method, domain, out=out)
    names = {path.name for path in (out / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    expected = logits(Checkpoint(out / "model").load())
    loaded = peft.PeftModel.from_pretrained(base.load(), str(out / "adapter"))
    torch.testing.assert_close(logits(loaded), expected)
    assert not torch.equal(logits(base.load()), expected)
    again = ["export", str(out), "--base", str(base.path), "--merge", "--out"]
    assert main([*again, str(tmp_path / "again")]) == 0
    assert Checkpoint(tmp_path / "again").fingerprint == Checkpoint(out / "model").fingerprint
