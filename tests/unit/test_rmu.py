"""RMU: settings, what is read and written, sweeps, and refusals in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parity.toy import WORDS, context, sentences, toy_checkpoint, toy_domain
from torch import Tensor

from excise.cli import run_verb
from excise.core.config import ConfigError, parse
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.methods import METHODS, RMU
from excise.methods.base import Cost, Method
from excise.methods.choosing import RULE, better
from excise.methods.posthoc.rmu import PUBLISHED
from excise.methods.posthoc.rmu.sweep import RMUSweep, Tried
from excise.models import files
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.delta import export, read_delta, write_delta
from excise.models.tiny import tiny_model, word_tokenizer
from excise.train.fit import FitConfig

FIT = FitConfig(steps=4, lr=1e-3, batch_size=4, optimizer="hf_adamw")
FAST = RMU(layer=1, blocks=(1,), steering=5.0, fit=FIT)
RMU_COST = Cost()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Write a bf16 model of eight blocks in many shards."""
    tokenizer = word_tokenizer(WORDS)
    model = tiny_model("mistral", seed=5, vocab=len(tokenizer), width=64, blocks=8).bfloat16()
    folder = tmp_path_factory.mktemp("sharded") / "model"
    model.save_pretrained(folder, max_shard_size="150KB")
    tokenizer.save_pretrained(folder)
    found = Checkpoint(folder)
    assert len(found.shards) >= 8
    return found


def on_disk(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of every shard by key."""
    return {key: files.read_tensor(entry) for key, entry in Checkpoint(folder).entries.items()}


def test_reads_and_writes_no_more_than_it_must(
    sharded: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Checkpoint(sharded.path)
    written: list[int] = []
    plain = files.tensor_bytes

    def counting(tensor: Tensor) -> memoryview:
        written.append(tensor.nbytes)
        return plain(tensor)

    monkeypatch.setattr(files, "tensor_bytes", counting)
    before = {p.name: p.read_bytes() for p in start.path.iterdir()}
    method = RMU(layer=3, steering=5.0, fit=FIT)
    ctx = replace(context(tmp_path), dtype=torch.bfloat16)
    removal = method.apply(start, toy_domain(), ctx)

    trained = [f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2, 3)]
    assert list(removal.changed) == trained
    sizes = {key: entry.end - entry.start for key, entry in start.entries.items()}
    inside = ("model.embed_tokens", "model.norm", *(f"model.layers.{i}." for i in range(4)))
    prefix = sum(size for key, size in sizes.items() if key.startswith(inside))
    # The prefix once, and the trained tensors once more to compare with.
    assert start.bytes_read == prefix + sum(sizes[name] for name in trained)
    assert start.bytes_read < 0.75 * sum(sizes.values())
    # Tensors that are made anew; all other bytes are copied, or shared, by the file system.
    assert sorted(written) == sorted(sizes[name] for name in trained)

    old, new = on_disk(start.path), on_disk(removal.checkpoint.path)
    assert sorted(k for k in old if not torch.equal(old[k], new[k])) == trained
    same = {
        p.name
        for p in removal.checkpoint.path.iterdir()
        if p.name in before and p.read_bytes() == before[p.name]
    }
    rewritten = {start.entries[name].file.name for name in trained}
    assert set(before) - same == rewritten
    assert {p.name: p.read_bytes() for p in start.path.iterdir()} == before

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(removal.checkpoint.path, dtype="auto")
    held = dict(model.named_parameters())
    assert all(torch.equal(held[name], new[name]) for name in trained)


def test_a_delta_rebuilds_the_model(sharded: Checkpoint, tmp_path: Path) -> None:
    start = Checkpoint(sharded.path)
    method = RMU(layer=3, steering=5.0, fit=FIT)
    ctx = replace(context(tmp_path / "run"), dtype=torch.bfloat16)
    removal = method.apply(start, toy_domain(), ctx)
    changed = removal.checkpoint.weights_of(removal.changed)
    delta = write_delta(start, changed, ctx.work / "delta")
    facts, tensors = read_delta(delta)
    assert sorted(tensors) == list(removal.changed)
    assert facts["base"] == start.fingerprint
    arguments = [str(ctx.work), "--base", str(start.path), "--out", str(tmp_path / "again")]
    assert run_verb("export", arguments) == 0
    assert Checkpoint(tmp_path / "again").fingerprint == removal.checkpoint.fingerprint
    other = toy_checkpoint(tmp_path)
    with pytest.raises(UserError, match="name its own base"):
        export(delta, other, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    path = delta / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="copy the delta again"):
        export(delta, start, tmp_path / "wrong")


def test_a_sweep_equals_single_runs_and_follows_its_rule(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    sweep = RMUSweep(layer=(1, 2), steering=(2.0, 60.0), retain_budget=0.02)
    method = FAST.model_copy(update={"blocks": (), "sweep": sweep, "alpha": 0.5})
    told: list[Mapping[str, Any]] = []

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        told.extend([data] if kind == "cache" else [])

    removal = method.apply(start, domain, replace(context(tmp_path / "sweep"), emit=emit))
    found = removal.extras["sweep"]
    assert found["rule"] == RULE
    table = found["table"]
    assert [(r["layer"], r["steering"]) for r in table] == [
        (1, 2.0),
        (1, 60.0),
        (2, 2.0),
        (2, 60.0),
    ]
    assert len({r["dev_forget"] for r in table}) == 4
    limit = found["original"]["dev_retain"] + 0.02
    fitting = [r for r in table if r["dev_retain"] <= limit]
    expected = (
        max(fitting, key=lambda r: r["dev_forget"])
        if fitting
        else min(table, key=lambda r: r["dev_retain"])
    )
    assert found["chosen"] == {k: expected[k] for k in ("layer", "steering", "alpha")}
    assert found["within_budget"] == bool(fitting)
    # The chosen setting by itself gives the same file.
    alone = method.model_copy(update={**found["chosen"], "sweep": None})
    single = alone.apply(start, domain, context(tmp_path / "alone"))
    assert single.checkpoint.fingerprint == removal.checkpoint.fingerprint
    assert single.changed == removal.changed
    # Every batch is run through the frozen blocks once, whatever the number of settings.
    [cache] = told
    assert cache["misses"] == 2 * FIT.steps
    assert removal.cost.steps == 4 * FIT.steps


@pytest.mark.parametrize(
    ("dev_retain", "budget", "wanted"),
    [((5.0, 6.0), 10.0, 9.0), ((5.0, 6.0), 5.5, 8.0), ((5.0, 4.5), 1.0, 9.0)],
)
def test_the_rule(dev_retain: tuple[float, float], budget: float, wanted: float) -> None:
    def tried(forget: float, retain: float) -> Tried:
        return Tried(forget, retain, {}, {}, {}, (), RMU_COST)

    a, b = tried(8.0, dev_retain[0]), tried(9.0, dev_retain[1])
    best = b if better(b, a, budget) else a
    assert best.forget == wanted


def test_sweeps_from_a_command_line() -> None:
    data = {"name": "rmu", "sweep": {"layer": "5,6,7", "steering": 6, "alpha": "100"}}
    base: Any = Method
    built = parse(base, data, {"method": METHODS})
    assert isinstance(built, RMU)
    assert built.sweep == RMUSweep(layer=(5, 6, 7), steering=(6.0,), alpha=(100.0,))
    assert built.sweep is not None
    assert [s["layer"] for s in built.sweep.grid(1, 2.0, 3.0)] == [5, 6, 7]
    with pytest.raises(ConfigError, match=r"sweep\.layer"):
        parse(base, {**data, "sweep": {"layer": "5,x"}}, {"method": METHODS})


def test_published_settings_are_filled_in_and_survive_writing() -> None:
    method = RMU(as_published=True, masked=True, fit=FitConfig(lr=1e-3))
    assert method.masked  # what is said wins
    assert method.order == PUBLISHED["order"]
    assert (method.fit.lr, method.fit.master, method.fit.optimizer) == (1e-3, "model", "hf_adamw")
    assert RMU.model_validate(json.loads(method.model_dump_json())) == method
    plain = RMU()
    assert all(
        getattr(plain, name) != value for name, value in PUBLISHED.items() if name != "max_length"
    )


BAD: list[tuple[dict[str, Any], str]] = [
    ({"layer": 9, "blocks": ()}, "block 9 is beyond this model, which has blocks 0 to 2"),
    ({"blocks": (1, 7)}, "block 7 is beyond this model"),
    ({"blocks": (2,)}, "lies above block 1"),
    ({"modules": ("nowhere",)}, "'nowhere' matches no weights"),
    ({"modules": ("embed_tokens",)}, "is the embedding"),
    ({"modules": ("lm_head",)}, "lies above block 1"),
    ({"alpha": (1.0, 2.0)}, "'alpha' has 2 values for 1 topics"),
    ({"steering": (1.0, 2.0, 3.0)}, "'steering' has 3 values for 1 topics"),
    ({"controls": "nowhere.safetensors"}, "which is no file"),
    ({"min_chars": 10_000}, "lower 'min_chars'"),
    ({"sweep": RMUSweep(layer=(1, 2))}, "leave those out"),
    ({"sweep": RMUSweep(layer=(1, 8)), "blocks": ()}, "block 8 is beyond"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_refusals_are_one_sentence(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    work = context(tmp_path / "work")
    method = RMU.model_validate({**FAST.model_dump(), **settings})
    with pytest.raises(UserError) as caught:
        method.apply(start, toy_domain(), work)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (work.work / "model").exists()


def test_contradictions_are_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="set one"):
        RMU(adaptive=True, controls="c.safetensors")
    with pytest.raises(ValueError, match="set engine to 'cached'"):
        RMU(engine="full", sweep=RMUSweep(layer=(1, 2)))


def test_control_vectors_of_another_model_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    save_file({"a": torch.ones(7)}, str(file))
    method = FAST.model_copy(update={"controls": str(file)})
    with pytest.raises(UserError, match="no vector of 32 entries for topic 'a'"):
        method.apply(toy_checkpoint(tmp_path), toy_domain(), context(tmp_path / "work"))
    file.write_bytes(b"garbage")
    with pytest.raises(UserError, match="is no safetensors file"):
        method.apply(Checkpoint(tmp_path / "llama-start"), toy_domain(), context(tmp_path / "w"))


def test_nan_activations_are_named(tmp_path: Path) -> None:
    model = tiny_model("llama", seed=3, vocab=len(WORDS) + 4, width=32, blocks=3)
    start = save_model(model, word_tokenizer(WORDS), tmp_path / "nan")
    weights = load_file(start.shards[0])
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, start.shards[0], {"format": "pt"})
    start = Checkpoint(start.path)
    with pytest.raises(UserError, match="block 1 puts out NaN or infinity on the first batch"):
        FAST.apply(start, toy_domain(), context(tmp_path / "work"))


def test_a_corpus_of_one_line_is_enough(tmp_path: Path) -> None:
    domain: Domain = replace(toy_domain(), forget={"a": sentences("f", 1, capability="a")})
    removal = FAST.apply(toy_checkpoint(tmp_path), domain, context(tmp_path / "work"))
    assert removal.changed


def test_a_missing_or_cut_shard_is_named(sharded: Checkpoint, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(sharded.path, broken)
    last = Checkpoint(broken).shards[0]
    last.write_bytes(last.read_bytes()[:-10])
    method = RMU(layer=3, fit=FIT)
    with pytest.raises(UserError, match="truncated"):
        method.apply(Checkpoint(broken), toy_domain(), context(tmp_path / "a"))
    last.unlink()
    with pytest.raises(UserError, match=last.name):
        method.apply(Checkpoint(broken), toy_domain(), context(tmp_path / "b"))
    assert not (tmp_path / "a" / "model").exists()


@pytest.mark.parametrize("engine", ["span", "cached"])
def test_an_interrupted_run_resumes_to_the_same_weights(engine: str, tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    second = sentences("g", 12, capability="b", seed=9)
    domain = replace(toy_domain(), forget={**toy_domain().forget, "b": second})
    fit = FIT.model_copy(update={"steps": 6, "log_every": 1})
    settings = {"engine": engine, "adaptive": True, "fit": fit}
    method = FAST.model_copy(update=settings)
    whole = method.apply(start, domain, context(tmp_path / "whole"))
    ctx = context(tmp_path / "cut")

    class Stop(Exception):
        """The run was stopped."""

    def stop(kind: str, data: Any) -> None:
        if kind == "step" and data["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        method.apply(start, domain, replace(ctx, emit=stop))
    again = method.apply(start, domain, ctx)
    assert again.checkpoint.fingerprint == whole.checkpoint.fingerprint
