"""Circuit breakers, RepNoise, RMU+LAT and R2MU's traces against plain loops from the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from excise.core.errors import UserError
from excise.data.domain import Domain, Row, Rows
from excise.data.stream import Batch, collate, encode
from excise.losses import displacement, mmd, not_p, reroute
from excise.methods import RMU, RMULAT, CircuitBreakers, RepNoise
from excise.methods.base import Method, Removal
from excise.methods.posthoc import circuit_breakers
from excise.methods.posthoc.rmu.topics import control_vector
from excise.methods.posthoc.rmu.traces import Traces, trace_of
from excise.methods.tuning import role_batches, stream
from excise.models.head import hidden_at
from excise.models.lora import LoRA, adapted, merge
from excise.train.fit import FitConfig, fit
from tests.golden.representation_inputs import stir
from tests.parity.toy import context, toy_checkpoint, toy_domain, weights

FIT = FitConfig(steps=6, lr=1e-3, batch_size=4)


def hidden(model: Any, batch: Batch) -> tuple[Tensor, ...]:
    """All hidden states, the embedding first."""
    out = model(
        input_ids=batch.ids_BT,
        attention_mask=batch.attention_BT.long(),
        output_hidden_states=True,
    )
    states: tuple[Tensor, ...] = out.hidden_states
    return states


def plain_nll(logits: Tensor, batch: Batch) -> Tensor:
    labels = batch.ids_BT[:, 1:].masked_fill(~batch.target_BT[:, 1:], -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())


def descend(parameters: Any, loss: Callable[[int], Tensor], *, decay: float = 0.0) -> None:
    """The yardstick: torch's AdamW, nothing else."""
    chosen = list(parameters)
    optimizer = torch.optim.AdamW(chosen, lr=FIT.lr, weight_decay=decay)
    for step in range(FIT.steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()


def furthest(removal: Removal, theirs: dict[str, Tensor]) -> float:
    """The largest difference to the weights of a plain loop."""
    ours = weights(removal.checkpoint)
    return max(float((ours[name] - theirs[name].detach()).abs().max()) for name in theirs)


RR = CircuitBreakers(layers=(0, 1), alpha=4.0, fit=FIT, lora=LoRA(rank=4))


@pytest.mark.parametrize("sign", [1, -1])
def test_circuit_breakers_equal_a_plain_loop(
    sign: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    ctx = context(tmp_path / "ours")

    def stirred(*args: Any, groups: Any, **more: Any) -> Any:
        stir(groups["trained"])
        return fit(*args, groups=groups, **more)

    monkeypatch.setattr(circuit_breakers, "fit", stirred)
    removal = RR.apply(start, domain, ctx)
    frozen, model = start.load(), start.load()
    read = role_batches(
        domain, ("forget", "retain"), start.tokenizer(), FIT, context(tmp_path / "plain"),
        max_length=512,
    )  # fmt: skip
    inside = ("model.layers.0.*_proj", "model.layers.1.*_proj")
    lora = RR.lora.model_copy(update={"modules": inside})
    with adapted(model, lora, ctx.seed_for("lora")) as net:
        stir(p for p in net.parameters() if p.requires_grad)

        def loss(step: int) -> Tensor:
            forget, retain = (read(step)[0][role] for role in ("forget", "retain"))
            share = (step + 1) / 12
            with torch.no_grad():
                was_forget, was_retain = hidden(frozen, forget), hidden(frozen, retain)
            now = hidden(net, forget)
            cos = [F.cosine_similarity(now[i], was_forget[i], dim=-1) for i in (1, 2)]
            turned = torch.stack(cos).relu()[:, forget.attention_BT].mean()
            now = hidden(net, retain)
            apart = [(now[i] - was_retain[i])[retain.attention_BT].norm(dim=-1) for i in (1, 2)]
            held = torch.stack(apart).mean()
            return sign * 4.0 * (1 - share) * turned + 4.0 * share * held

        descend((p for p in net.parameters() if p.requires_grad), loss)
        merged, _ = merge(net)
    assert set(removal.changed) == set(merged)
    assert (furthest(removal, merged) < 5e-6) is (sign == 1)


def test_neither_padding_side_nor_split_changes_a_term_of_circuit_breakers(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    tokenizer, live, moved = start.tokenizer(), start.load(), start.load()
    stir(moved.parameters())
    examples = encode(toy_domain().retain[:4], tokenizer, max_length=512)
    paths = ["model.layers.0", "model.layers.2"]
    values = []
    for side, parts in (
        ("right", [examples]), ("left", [examples]), ("right", [examples[:1], examples[1:]]),
    ):  # fmt: skip
        total = torch.zeros(4)
        for part in parts:
            batch = collate(part, pad_id=tokenizer.pad_token_id, padding_side=side)
            both = (hidden_at(net, paths, batch.inputs) for net in (moved, live))
            pairs = zip(*both, strict=True)
            total += torch.stack(
                [
                    term(now, was, batch.attention_BT)[0].detach()
                    for now, was in pairs
                    for term in (reroute, displacement)
                ]
            )
        values.append(total)
    for other in values[1:]:
        torch.testing.assert_close(values[0], other)
    assert float(values[0].min()) > 0.1


def test_frozen_activations_are_those_of_the_original(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    far = RR.model_copy(update={"alpha": 1e-30})  # Adam divides the weight out again
    removal = far.apply(start, toy_domain(), context(tmp_path / "work"))
    first = removal.history[0]
    assert first["reroute"] == pytest.approx(1.0)  # before the first step nothing has moved
    assert first["retain"] == 0.0


@pytest.mark.parametrize("sign", [1, -1])
def test_repnoise_equals_a_plain_loop(
    sign: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distances written out pair by pair, logits at every depth at once."""
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    fit = FIT.model_copy(update={"weight_decay": 0.01})
    method = RepNoise(fit=fit, beta=0.7, alpha=0.9)

    def noise(like: Tensor) -> Tensor:  # the same for every layer and step
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(1))

    monkeypatch.setattr(torch, "randn_like", noise)
    removal = method.apply(start, domain, context(tmp_path / "ours"))
    model: Any = start.load()
    read = role_batches(
        domain, ("forget", "retain"), start.tokenizer(), FIT, context(tmp_path / "plain"),
        max_length=256,
    )  # fmt: skip
    inside: list[Tensor] = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda _m, _a, out: inside.append(out))

    def kernel(a: Tensor, b: Tensor, width: float) -> Tensor:
        scales = [width / 4 * 2**i for i in range(5)]
        return torch.stack([(-(a - b).square().sum() / s).exp() for s in scales]).sum()

    def distance(out: Tensor, mask: Tensor) -> Tensor:
        drawn = torch.zeros_like(out)
        drawn[mask] = noise(out[mask])
        points = [*(out * mask[..., None]).flatten(1), *drawn.flatten(1)]
        count, total = len(out), len(points)
        width = sum(float((a - b).detach().square().sum()) for a in points for b in points)
        width /= total**2 - total
        values = torch.zeros(())
        for i in range(total):
            for j in range(total):
                same = (i < count) == (j < count)
                values = values + (1 if same else -1) * kernel(points[i], points[j], width)
        return values / count**2

    def loss(step: int) -> Tensor:
        forget, retain = (read(step)[0][role] for role in ("forget", "retain"))
        inside.clear()
        *below, last = hidden(model, forget)
        noised = torch.stack([distance(out, forget.target_BT) for out in inside]).mean()
        depths = [model.lm_head(model.model.norm(h)) for h in below] + [model.lm_head(last)]
        unsure = torch.stack([plain_nll(logits, forget) for logits in depths]).mean()
        kept = plain_nll(model.lm_head(hidden(model, retain)[-1]), retain)
        return kept + 0.7 * noised - sign * 0.9 * (1 + unsure).log()

    descend(model.parameters(), loss, decay=0.01)
    assert (furthest(removal, dict(model.named_parameters())) < 1e-5) is (sign == 1)


LAT = RMULAT(
    layer=2, steering=5.0, alpha=3.0, epsilon=0.3, attack_steps=4, per_attack=2, fit=FIT
)  # fmt: skip


def lat_loop(start: Any, domain: Domain, folder: Path, *, towards: int) -> dict[str, Tensor]:
    """RMU+LAT with hooks on the MLP, whole forwards and a second model; `towards` -1 is wrong."""
    model: Any = start.load()
    frozen, ctx = start.load(), context(folder)
    read = {
        role: stream(rows, start.tokenizer(), FIT, ctx, purpose=purpose, max_length=768)
        for role, rows, purpose in (
            ("forget", domain.forget["a"], "forget.a"), ("retain", domain.retain, "retain"),
        )
    }  # fmt: skip
    control = 5.0 * control_vector(32, "a", ctx)
    trained = [model.model.layers[i].mlp.down_proj.weight for i in (0, 1, 2)]
    delta = torch.zeros(0)
    on: list[Tensor] = []
    model.model.layers[1].mlp.register_forward_hook(
        lambda _m, _a, out: out + on[0][:, : out.shape[1]] if on else None
    )

    def fitted(attack: Tensor, forget: Batch, batch: Batch) -> Tensor:
        """The attack on a batch padded on the right to another width."""
        wide = torch.zeros(len(attack), max(attack.shape[1], batch.ids_BT.shape[1]), 32)
        wide[:, : attack.shape[1]] = attack * forget.attention_BT[..., None]
        wide = wide[:, : batch.ids_BT.shape[1]]
        return wide * batch.attention_BT[..., None]

    def attacked(attack: Tensor, forget: Batch, batch: Batch) -> Any:
        on[:] = [fitted(attack, forget, batch)]
        out = model(
            input_ids=batch.ids_BT, attention_mask=batch.attention_BT.long(),
            output_hidden_states=True,
        )  # fmt: skip
        on.clear()
        return out

    def loss(step: int) -> Tensor:
        nonlocal delta
        forget, retain = (read[role](step // 2)[0] for role in ("forget", "retain"))
        if step % 2 == 0:
            delta = torch.zeros(*forget.ids_BT.shape, 32, requires_grad=True)
            optimizer = torch.optim.AdamW([delta], lr=0.05)
            for _ in range(4):
                likely = plain_nll(attacked(delta, forget, forget).logits, forget)
                logp = attacked(delta, forget, retain).logits[:, :-1].log_softmax(-1)
                logp = logp.gather(-1, retain.ids_BT[:, 1:, None])[..., 0]
                logp = logp[retain.target_BT[:, 1:]]
                unlikely = torch.where(logp < -5, 0.0, -torch.log(-torch.expm1(logp))).mean()
                (delta.grad,) = torch.autograd.grad(towards * likely + unlikely, delta)
                optimizer.step()
                with torch.no_grad():
                    delta /= (delta.norm(dim=-1, keepdim=True) / 0.3).clamp(min=1)
        attacked(delta.detach(), forget, forget)
        steered = (raw[-1] - control)[forget.attention_BT].square().mean()
        hidden(model, retain)
        now = raw[-1]
        with torch.no_grad():
            hidden(frozen, retain)
        pinned = (now - raw[-1])[retain.attention_BT].square().mean()
        return steered + 3.0 * pinned

    raw: list[Tensor] = []  # hidden_states would give what the last block puts out normed
    for net in (model, frozen):
        net.model.layers[2].register_forward_hook(
            lambda _m, _a, out: raw.append(out if isinstance(out, Tensor) else out[0])
        )
    descend(trained, loss, decay=0.01)
    return dict(model.named_parameters())


@pytest.mark.parametrize("towards", [1, -1])
def test_rmu_lat_equals_a_plain_loop(towards: int, tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    method = LAT.model_copy(update={"fit": FIT.model_copy(update={"weight_decay": 0.01})})
    removal = method.apply(start, domain, context(tmp_path / "ours"))
    theirs = lat_loop(start, domain, tmp_path / "plain", towards=towards)
    assert sorted(removal.changed) == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1, 2)]
    assert (furthest(removal, theirs) < 1e-5) is (towards == 1)


THOUGHT = "<think> w1 w2 {} w5 w6 </think> w7 w8"


def thinking(domain: Domain) -> Domain:
    """A domain with a row of each role and kind that holds a trace."""

    def more(prefix: str, label: int) -> Rows:
        return tuple(
            Row(
                f"{prefix}{i}", prompt="w0 w3", completion=" " + THOUGHT.format(f"w{9 + i}"),
                capability="a" if label else "", label=label,
            )
            for i in range(4)
        )  # fmt: skip

    forget = {"a": (*domain.forget["a"], *more("think-f", 1))}
    return replace(domain, forget=forget, retain=(*domain.retain, *more("think-r", 0)))


@pytest.mark.parametrize("weight", [1.5, 0.0])
@pytest.mark.parametrize("masked", [True, False])
def test_r2mu_equals_a_plain_loop(masked: bool, weight: float, tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), thinking(toy_domain())
    traces = Traces(weight=weight, retain_weight=0.5, prefix="w4 ", tokens=3)
    method = RMU(
        layer=1, blocks=(0, 1), steering=5.0, alpha=3.0, fit=FIT, masked=masked, traces=traces,
        positions="tokens" if masked else "slots",
    )  # fmt: skip
    removal = method.apply(start, domain, context(tmp_path / "ours"))
    model, frozen, ctx = start.load(), start.load(), context(tmp_path / "plain")
    tokenizer = start.tokenizer()

    def rows(texts: list[str], purpose: str, length: int) -> Any:
        made = tuple(Row(f"{i}", text=text) for i, text in enumerate(texts))
        return stream(made, tokenizer, FIT, ctx, purpose=purpose, max_length=length)

    alone = method.model_copy(update={"traces": None}).batches(["a"], domain, tokenizer, ctx)
    drawn = rows([f"w4 <think>w1 w2 w{9 + i}" for i in range(4)], "trace.a", 512)
    kept = rows([f"w1 w2 w{9 + i} w5 w6</think>\n\n" for i in range(4)], "cot", 150)
    control = 5.0 * control_vector(32, "a", ctx)

    def square(difference: Tensor, batch: Batch) -> Tensor:
        keep = batch.attention_BT if masked else torch.ones_like(batch.attention_BT)
        return difference[keep].square().mean()

    def moved(batch: Batch) -> Tensor:
        with torch.no_grad():
            was = hidden(frozen, batch)[2]
        return square(hidden(model, batch)[2] - was, batch)

    def loss(step: int) -> Tensor:
        micro = alone(step)[0]
        trace, cot = drawn(step)[0], kept(step)[0]
        return (
            square(hidden(model, micro["a"])[2] - control, micro["a"])
            + 3.0 * moved(micro["retain"])
            + 1.5 * square(hidden(model, trace)[2] - control, trace)
            + 0.5 * moved(cot)
        )

    named = dict(model.named_parameters())
    trained = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    descend([named[n] for n in trained], loss)
    assert sorted(removal.changed) == trained
    assert (furthest(removal, named) < 5e-6) is (weight == 1.5)


@pytest.mark.parametrize(
    ("row", "trace"),
    [
        (Row("u", text="a <think> b c </think> d"), " b c "),
        (Row("u", prompt="q", completion="b c</think> d"), "b c"),
        (Row("u", text="a <think> b"), " b"),
        (Row("u", messages=(("user", "<think> no"), ("assistant", "<think>b</think>d"))), "b"),
        (Row("u", text="a b"), ""),
    ],
)
def test_a_trace_is_found_wherever_a_row_holds_it(row: Row, trace: str) -> None:
    assert trace_of(row) == trace


def test_the_split_of_a_batch_matters_to_distances_of_batches_and_to_adversaries(
    tmp_path: Path,
) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    for number, method in enumerate((RepNoise(beta=5.0, fit=FIT), LAT)):
        assert method.whole_batch
        halves = method.model_copy(update={"fit": FIT.model_copy(update={"micro_size": 2})})
        one, two = (
            weights(m.apply(start, domain, context(tmp_path / f"{number}-{i}")).checkpoint)
            for i, m in enumerate((method, halves))
        )
        assert max(float((one[n] - two[n]).abs().max()) for n in one) > 1e-5


def test_mmd_is_zero_for_equal_sets_and_grows_with_their_distance() -> None:
    points = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert float(mmd(points, points)) == pytest.approx(0, abs=1e-6)
    near, far = float(mmd(points, points + 0.5)), float(mmd(points, points + 2))
    assert 0 < near < far


def test_not_p_leaves_out_what_is_unlikely_already() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 1] = -20.0  # token 1 is next, and nearly impossible
    ids = torch.tensor([[0, 1, 2]])
    every = torch.tensor([[False, True, True]])
    batch = Batch(ids, torch.ones_like(every), every, torch.zeros_like(ids), ("",))
    total, count = not_p(logits, batch)
    assert count == 2
    assert float(total) == pytest.approx(-math.log(1 - 0.25))


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (CircuitBreakers(layers=(1, 5)), "need 6 blocks and this model has 3; set 'layers' lower"),
        (RMULAT(layer=2, attack_layer=2), "set 'attack_layer' to 0 or more and less than 2"),
        (RMU(layer=1, traces=Traces()), "no row of topic 'a' holds a thinking trace"),
    ],
)
def test_what_cannot_be_done_is_said(method: Method, says: str, tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    with pytest.raises(UserError, match=says):
        method.apply(start, toy_domain(), context(tmp_path / "work"))
