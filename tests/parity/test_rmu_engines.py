"""RMU's three engines against each other and against the published loop, bit for bit.

Shape legend: B rows, T tokens, D residual width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from excise.core.config import parse
from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.stream import Batch
from excise.methods import RMU
from excise.methods.posthoc.rmu import RMUSweep
from excise.methods.posthoc.rmu.topics import control_vector, per_topic
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.lora import LoRA
from excise.models.tiny import tiny_model, word_tokenizer
from excise.train.fit import FitConfig
from tests.parity.toy import WORDS, context, sentences, toy_checkpoint, toy_domain

LAYER, STEPS = 7, 20
FIT = FitConfig(steps=STEPS, lr=1e-3, batch_size=4, optimizer="hf_adamw")
TRAINED = [f"model.layers.{i}.mlp.down_proj.weight" for i in (5, 6, 7)]


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Write a random Mistral of ten blocks."""
    tokenizer = word_tokenizer(WORDS)
    model = tiny_model("mistral", seed=5, vocab=len(tokenizer), width=64, blocks=10)
    return save_model(model, tokenizer, tmp_path_factory.mktemp("rmu") / "start")


def two_topics() -> Domain:
    """Return a domain with two capabilities."""
    second = sentences("g", 12, capability="b", seed=9)
    return replace(toy_domain(), forget={**toy_domain().forget, "b": second})


def published(
    start: Checkpoint,
    method: RMU,
    work: Path,
    dtype: torch.dtype,
    scale: float = 0.0,
    in_turn: bool = True,
) -> dict[str, Tensor]:
    """Run the loop of the paper's code, written from its description: two models, whole passes.

    Gradients are computed for every weight and used for three; AdamW adds eps before the bias
    correction. With `scale` it is adaptive RMU: vectors of norm 1, and a factor for each
    topic from the mean norm at the step that first reads it, or (not `in_turn`) before any step.
    """
    ctx = Context(work=work, dtype=dtype)
    live, frozen = start.load(dtype=dtype), start.load(dtype=dtype)
    live.train()
    controls = load_file(work / "control_vectors.safetensors")
    topics = list(controls)
    read = method.batches(topics, two_topics(), start.tokenizer(), ctx)
    named = dict(live.named_parameters())
    params = [named[name] for name in TRAINED]
    alpha = per_topic(method.alpha, ["a"], "alpha")["a"]
    first = [torch.zeros_like(p) for p in params]
    second = [torch.zeros_like(p) for p in params]
    factors = dict.fromkeys(topics, 1.0)
    if scale:
        controls = {t: control_vector(64, t, ctx).to(dtype) for t in topics}

    def hidden(net: Any, batch: Batch) -> Tensor:
        seen: list[Tensor] = []
        layers = net.model.layers
        handle = layers[LAYER].register_forward_hook(lambda m, args, out: seen.append(out))
        net(input_ids=batch.ids_BT, attention_mask=batch.attention_BT.long())
        handle.remove()
        return seen[0]

    for step in range(STEPS):
        topic = topics[step % len(topics)]
        (micro,) = read(step)
        pushed_BTD = hidden(live, micro[topic])
        if scale and step == topics.index(topic):
            seen_BTD = pushed_BTD.detach()
            if not in_turn:
                seen_BTD = hidden(frozen, micro[topic]).detach()
            factors[topic] = seen_BTD.norm(dim=-1).mean(dim=1).mean(dim=0).item() * scale
        goal = (controls[topic] * factors[topic] if scale else controls[topic]).to(dtype)
        forget = F.mse_loss(pushed_BTD, goal.expand_as(pushed_BTD))
        with torch.no_grad():
            kept_BTD = hidden(frozen, micro["retain"])
        retain = F.mse_loss(hidden(live, micro["retain"]), kept_BTD)
        live.zero_grad()
        (forget + alpha * retain).backward()
        with torch.no_grad():
            for p, m, v in zip(params, first, second, strict=True):
                assert p.grad is not None
                m.mul_(0.9).add_(p.grad, alpha=1 - 0.9)
                v.mul_(0.999).addcmul_(p.grad, p.grad, value=1 - 0.999)
                size = method.fit.lr * math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
                p.addcdiv_(m, v.sqrt().add_(1e-6), value=-size)
    return {name: named[name].detach() for name in TRAINED}


def edited(
    start: Checkpoint, method: RMU, folder: Path, dtype: torch.dtype, domain: Domain | None = None
) -> dict[str, Tensor]:
    """Return the changed tensors of a run, in the dtype it computed in."""
    ctx = replace(context(folder), dtype=dtype)
    removal = method.apply(start, domain or two_topics(), ctx)
    found = removal.checkpoint.weights_of(removal.changed)
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest difference of any entry."""
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engines_and_the_published_loop_give_the_same_bits(
    mistral: Checkpoint, dtype: torch.dtype, tmp_path: Path
) -> None:
    method = RMU(layer=LAYER, steering=6.5, alpha=50.0, as_published=True, fit=FIT)
    assert method.fit.master == "model"
    found = {
        engine: edited(
            mistral, method.model_copy(update={"engine": engine}), tmp_path / engine, dtype
        )
        for engine in ("full", "span", "cached")
    }
    theirs = published(mistral, method, tmp_path / "span", dtype)
    assert sorted(found["span"]) == TRAINED
    assert far(found["span"], found["full"]) == 0.0
    assert far(found["cached"], found["full"]) == 0.0
    assert far(found["full"], theirs) == 0.0
    other = method.model_copy(update={"fit": method.fit.model_copy(update={"optimizer": "adamw"})})
    assert far(edited(mistral, other, tmp_path / "other", dtype), theirs) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adaptive_rmu_is_the_released_one_with_two_topics(
    mistral: Checkpoint, dtype: torch.dtype, tmp_path: Path
) -> None:
    fit = FIT.model_copy(update={"lr": 1e-2})  # one update moves the norm by more than bf16 rounds
    method = RMU(layer=LAYER, alpha=50.0, adaptive=True, as_published=True, fit=fit)
    assert method.steering == 5.0
    found = edited(mistral, method, tmp_path / "ours", dtype)
    theirs = published(mistral, method, tmp_path / "ours", dtype, 5.0)
    assert far(found, theirs) == 0.0
    early = published(mistral, method, tmp_path / "ours", dtype, 5.0, in_turn=False)
    assert far(found, early) > 1e-3
    if dtype == torch.bfloat16:
        upcast = method.model_copy(update={"upcast": True})
        assert far(edited(mistral, upcast, tmp_path / "upcast", dtype), theirs) > 1e-4


def test_adaptive_rmu_has_settings_of_its_own() -> None:
    registry: dict[str, Any] = {}
    assert RMU().steering == 20.0
    for method in (
        RMU(adaptive=True),
        parse(RMU, {"adaptive": True}, registry),
        parse(RMU, {"adaptive": True, "fit": {"batch_size": 4}}, registry),
    ):
        assert (method.steering, method.alpha, method.fit.steps) == (5.0, 1200.0, 150)
        assert (method.fit.batch_size, method.fit.lr, method.fit.optimizer) == (4, 5e-5, "hf_adamw")
        assert RMU.model_validate(method.model_dump()) == method
    chosen = RMU(adaptive=True, steering=3.0, alpha=(1.0, 2.0), fit=FIT)
    assert (chosen.steering, chosen.alpha, chosen.fit) == (3.0, (1.0, 2.0), FIT)
    assert RMU(adaptive=False).fit.steps == 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adaptive": True, "order": "once", "padding": "left"},
        {"alpha": (3.0, 30.0), "steering": (5.0, 9.0), "blocks": (2, 4)},
        {"modules": ("layers.1.self_attn.o_proj", "layers.4.mlp.up_proj")},
        {"lora": LoRA(rank=2)},
        {"matrix": "up", "fit": FIT.model_copy(update={"micro_size": 2})},
    ],
)
def test_engines_agree_with_other_settings(
    mistral: Checkpoint, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    given = {"layer": 4, "fit": FIT.model_copy(update={"steps": 8}), **settings}
    given["fit"] = given["fit"].model_copy(update={"steps": 8})
    found = {}
    for engine in ("full", "span", "cached"):
        method = RMU.model_validate({**given, "engine": engine})
        found[engine] = edited(mistral, method, tmp_path / engine, dtype)
        assert found[engine]
    assert far(found["span"], found["full"]) == 0.0
    assert far(found["cached"], found["full"]) == 0.0


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "olmo2", "phi3", "mixtral"])
def test_engines_agree_on_other_families(family: str, tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path, family)
    settings: dict[str, Any] = {"layer": 1, "blocks": (1,), "steering": 5.0, "order": "once"}
    if family in ("phi3", "mixtral"):
        settings["matrix"] = "up"
    found = {}
    for engine in ("full", "span", "cached"):
        fit = FIT.model_copy(update={"steps": 7})
        method = RMU.model_validate({**settings, "engine": engine, "fit": fit})
        domain = toy_domain()
        found[engine] = edited(start, method, tmp_path / engine, torch.float32, domain)
    assert far(found["span"], found["full"]) == 0.0
    assert far(found["cached"], found["full"]) == 0.0


def test_first_expert_is_a_slice_and_the_share_is_of_the_slice(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path, "mixtral")
    method = RMU(layer=1, blocks=(1,), steering=5.0, fit=FIT)
    removal = method.apply(start, toy_domain(), context(tmp_path / "a"))
    (name,) = removal.changed
    assert removal.extras["modules"] == [f"{name}[0]"]
    before, after = start.weights_of([name])[name], removal.checkpoint.weights_of([name])[name]
    assert torch.equal(before[1:], after[1:])
    assert removal.extras["trained_entries"] == before[0].numel()
    share = float((before[0] != after[0]).float().mean())
    assert removal.extras["share_moved"] == pytest.approx(share)
    assert share > 0.5
    swept = method.model_copy(update={"sweep": RMUSweep(steering=(5.0,))})
    same = swept.apply(start, toy_domain(), context(tmp_path / "b"))
    (row,) = same.extras["sweep"]["table"]
    shares = row["share_moved"], same.extras["share_moved"]
    assert shares == (removal.extras["share_moved"],) * 2
    assert same.extras["trained_entries"] == removal.extras["trained_entries"]


def test_bf16_updates_round_away_without_masters(mistral: Checkpoint, tmp_path: Path) -> None:
    small = FitConfig(steps=6, lr=2e-5, batch_size=4, optimizer="hf_adamw")
    shares = {}
    for master in ("model", "float32"):
        method = RMU(layer=4, fit=small.model_copy(update={"master": master}))
        ctx = replace(context(tmp_path / master), dtype=torch.bfloat16)
        removal = method.apply(mistral, toy_domain(), ctx)
        assert removal.extras["master"] == master
        assert removal.extras["optimizer"] == "hf_adamw"
        found = removal.checkpoint.weights_of(removal.changed)
        start = mistral.weights_of(removal.changed)
        shares[master] = sum(int((found[n].bfloat16() != start[n].bfloat16()).sum()) for n in found)
    assert shares["model"] < shares["float32"]


def test_cached_reads_a_batch_once(mistral: Checkpoint, tmp_path: Path) -> None:
    method = RMU(layer=4, engine="cached", order="once", fit=FIT)
    told: list[Mapping[str, Any]] = []

    def listen(kind: str, data: Mapping[str, Any]) -> None:
        told.extend([data] if kind == "cache" else [])

    ctx = replace(context(tmp_path / "a"), emit=listen)
    removal = method.apply(mistral, toy_domain(), ctx)
    assert told[0]["misses"] == 3 + 4  # 12 rows to forget and 16 to retain, four at a time
    assert told[0]["bytes"] > 0
    none = method.model_copy(update={"cache_gib": 0.0})
    same = none.apply(mistral, toy_domain(), replace(ctx, work=context(tmp_path / "b").work))
    assert told[1]["bytes"] == 0
    assert not {"cache", "bytes_read"} & {*removal.extras, *same.extras}
    names = removal.changed
    assert far(removal.checkpoint.weights_of(names), same.checkpoint.weights_of(names)) == 0.0


def test_control_vectors_are_saved_and_taken_back(mistral: Checkpoint, tmp_path: Path) -> None:
    method = RMU(layer=4, steering=(3.0, 4.0), fit=FIT)
    removal = method.apply(mistral, two_topics(), context(tmp_path / "a"))
    file = tmp_path / "a" / removal.extras["files"]["control_vectors"]
    vectors = load_file(file)
    assert [round(float(v.norm()), 4) for v in vectors.values()] == [3.0, 4.0]
    assert all(bool((v >= 0).all()) for v in vectors.values())
    again = RMU(layer=4, controls=str(file), fit=FIT)
    other = replace(context(tmp_path / "b"), seed=1)
    removal = again.apply(mistral, two_topics(), other)
    assert all(
        torch.equal(v, vectors[t])
        for t, v in load_file(other.work / "control_vectors.safetensors").items()
    )
