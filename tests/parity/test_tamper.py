"""SAM, SEAM and TAR against plain loops written here from the formulas."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Row
from excise.data.stream import Batch
from excise.methods import ELM, METHODS, SEAM, TAR, GradDiff, MaxEnt, Method
from excise.methods.posthoc.tar import RandomMapping
from excise.methods.tuning import TuningMethod, role_batches, stream
from excise.run.estimate import DataSizes, method_line
from excise.testing import toy_start
from excise.train.fit import FitConfig, Term, fit
from excise.train.nearby import sharpness_aware
from tests.matrix.test_methods import domain_for, made
from tests.parity.toy import context, toy_checkpoint, toy_domain, weights

FIT = FitConfig(steps=4, lr=1e-3, batch_size=4)
FREE = FitConfig(steps=3, lr=1e-3, batch_size=4, optimizer="schedule_free")
SMALL = TAR(mapping=RandomMapping(fit=FREE), inner_steps=4, every=2, inner_lr=(1e-3,), fit=FREE)


def ce(model: Any, batch: Batch, hidden: Tensor | None = None) -> Tensor:
    """Mean loss over scored tokens, of the model's logits or of those of a hidden state."""
    if hidden is None:
        logits = model(**batch.inputs).logits
    else:
        logits = model.lm_head(hidden)
    labels = batch.ids_BT.masked_fill(~batch.target_BT, -100)[:, 1:]
    loss: Tensor = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100)
    return loss


def flat(model: Any, batch: Batch) -> Tensor:
    """Mean KL from uniform over the positions that predict scored tokens."""
    logp: Tensor = model(**batch.inputs).logits[:, :-1].log_softmax(-1)[batch.target_BT[:, 1:]]
    kl: Tensor = -logp.mean() - math.log(logp.shape[-1])
    return kl


def grads(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Gradients, zeros where there is none."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def norm(gradient: list[Tensor]) -> Tensor:
    """Norm of all tensors together."""
    length: Tensor = torch.cat([g.flatten() for g in gradient]).norm()
    return length


def at(parameters: list[nn.Parameter], direction: list[Tensor], loss: Callable[[], Tensor]) -> Any:
    """Gradient of a loss at another point."""
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, d in zip(parameters, direction, strict=True):
            p.add_(d)
    gradient = grads(loss(), parameters)
    with torch.no_grad():
        for p, k in zip(parameters, kept, strict=True):
            p.copy_(k)
    return gradient


def far(ours: Mapping[str, Tensor], model: Any) -> float:
    """Largest difference of weights."""
    return max(float((ours[n] - p.detach()).abs().max()) for n, p in model.named_parameters())


def sam_loop(
    method: GradDiff | MaxEnt, start: Any, folder: Path, radius: float, *, retain_too: bool = False
) -> Any:
    """Run `method` with SAM by the formula; with `retain_too`, the wrong one."""
    model = start.load(dtype=torch.float64)
    parameters = list(model.parameters())
    read = role_batches(
        toy_domain(), ("forget", "retain"), start.tokenizer(), method.fit, context(folder),
        max_length=512,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(parameters, lr=method.fit.lr, weight_decay=0.0)
    for step in range(method.fit.steps):
        (micro,) = read(step)

        def push(micro: Any = micro) -> Tensor:
            forget = micro["forget"]
            return -ce(model, forget) if isinstance(method, GradDiff) else flat(model, forget)

        def keep(micro: Any = micro) -> Tensor:
            return method.alpha * ce(model, micro["retain"])

        g = grads(push(), parameters)
        ascent = [radius * x / norm(g) for x in g]
        forget = at(parameters, ascent, push)
        retain = at(parameters, ascent, keep) if retain_too else grads(keep(), parameters)
        for p, f, r in zip(parameters, forget, retain, strict=True):
            p.grad = f + r
        optimizer.step()
    return model


@pytest.mark.parametrize("micro_size", [0, 2])
@pytest.mark.parametrize("kind", [GradDiff, MaxEnt])
def test_sam_equals_a_plain_loop(
    kind: type[GradDiff | MaxEnt], micro_size: int, tmp_path: Path
) -> None:
    start = toy_checkpoint(tmp_path)
    method = kind(sam=0.5, alpha=1.5, fit=FIT.model_copy(update={"micro_size": micro_size}))
    # In float64, since float32 leaves more than this between processors.
    double = replace(context(tmp_path / "ours"), dtype=torch.float64)
    ours = weights(method.apply(start, toy_domain(), double).checkpoint)
    whole = method.model_copy(update={"fit": FIT})
    assert far(ours, sam_loop(whole, start, tmp_path / "a", 0.5)) <= 1e-7
    for radius, retain_too in ((-0.5, False), (0.0, False), (0.5, True)):
        other = sam_loop(whole, start, tmp_path / "b", radius, retain_too=retain_too)
        assert far(ours, other) > 1e-4


@pytest.mark.parametrize(
    "name",
    [n for n, cls in METHODS.items() if issubclass(cls, TuningMethod) and "sam" not in cls.refuses],
)
def test_no_method_ignores_the_radius_of_sam(name: str, tmp_path: Path) -> None:
    start, domain = toy_start(tmp_path / "start"), domain_for(name)
    plain: Any = made(name).model_copy(update={"fit": FIT})
    moved = plain.model_copy(update={"sam": 0.5})
    one, two = (
        m.apply(start, domain, context(tmp_path / f"{i}")).checkpoint
        for i, m in enumerate((plain, moved))
    )
    assert one.fingerprint != two.fingerprint


def test_a_loss_that_is_one_says_so() -> None:
    with pytest.raises(ValueError, match="sam: its three terms are one loss"):
        ELM(sam=0.01)


def test_weights_come_back_to_the_bit_from_the_worst_point(tmp_path: Path) -> None:
    """A loss that does not depend on where it is taken leaves the weights as plain steps do."""
    model = nn.Linear(3, 2)
    still = copy.deepcopy(model)

    def loss(net: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
        total: Tensor = sum(p.sum() for p in net.parameters())  # type: ignore[assignment]
        return {role: Term(total, 1.0) for role in micro}

    config = FitConfig(steps=3, lr=0.1, optimizer="sgd")
    batches: Any = lambda _: [{"forget": None, "retain": None}]  # noqa: E731
    for net, gradient in ((model, sharpness_aware(0.3)), (still, None)):
        for _ in fit(net, batches, loss, config, Context(tmp_path), gradient=gradient):
            pass
    for a, b in zip(model.parameters(), still.parameters(), strict=True):
        assert torch.equal(a, b)


def depths(model: Any, batch: Batch) -> Tensor:
    """Mean loss on every hidden state through the last norm; the last one has it already."""
    states = model(**batch.inputs, output_hidden_states=True).hidden_states
    inner = [ce(model, batch, model.model.norm(h)) for h in states[:-1]]
    return torch.stack([*inner, ce(model, batch, states[-1])]).mean()


def seam_loop(method: SEAM, start: Any, ctx: Context, *, sign: float = 1.0) -> Any:
    """Run SEAM by the formula."""
    model = start.load(dtype=torch.float64)
    parameters = list(model.parameters())
    roles = ("forget", "retain")
    read = role_batches(
        toy_domain(), roles, start.tokenizer(), method.fit, ctx, max_length=256
    )  # fmt: skip
    optimizer = torch.optim.AdamW(parameters, lr=method.fit.lr, weight_decay=0.0)
    for step in range(method.fit.steps):
        (micro,) = read(step)
        h, b = (grads(ce(model, micro[role]), parameters) for role in roles)
        n_h, n_b = ([x / norm(g) for x in g] for g in (h, b))
        cosine = sum((x * y).sum() for x, y in zip(n_h, n_b, strict=True))
        there = [method.eps * (y - cosine * x) for x, y in zip(n_h, n_b, strict=True)]
        h2 = at(parameters, there, partial(ce, model, micro["forget"]))
        there = [method.eps * (x - cosine * y) for x, y in zip(n_h, n_b, strict=True)]
        b2 = at(parameters, there, partial(ce, model, micro["retain"]))
        objective = -torch.log(1 + depths(model, micro["forget"]))
        base = grads(objective + method.alpha * ce(model, micro["retain"]), parameters)
        for i, p in enumerate(parameters):
            turn = (h2[i] - h[i]) / norm(h) + (b2[i] - b[i]) / norm(b)
            p.grad = base[i] + sign * method.beta / method.eps * turn
        optimizer.step()
    return model


def test_seam_equals_a_plain_loop(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    method = SEAM(beta=0.5, alpha=1.5, fit=FIT)
    ctx = replace(context(tmp_path / "ours"), dtype=torch.float64)
    ours = weights(method.apply(start, toy_domain(), ctx).checkpoint)
    assert far(ours, seam_loop(method, start, context(tmp_path / "a"))) <= 5e-6
    assert far(ours, seam_loop(method, start, context(tmp_path / "b"), sign=-1.0)) > 1e-4


def test_seam_moves_along_the_gradient_of_the_cosine(tmp_path: Path) -> None:
    """One step of plain descent against second derivatives, which SEAM never takes."""
    start = toy_checkpoint(tmp_path)
    one = FitConfig(steps=1, lr=1.0, batch_size=4, optimizer="sgd")
    ends = []
    for beta in (0.0, 1.0):
        ctx = replace(context(tmp_path / f"{beta}"), dtype=torch.float64)
        made = SEAM(beta=beta, eps=1e-4, fit=one).apply(start, toy_domain(), ctx)
        ends.append(weights(made.checkpoint))
    model: Any = start.load(dtype=torch.float64, attn_implementation="eager")
    parameters = list(model.parameters())
    roles = ("forget", "retain")
    (micro,) = role_batches(
        toy_domain(), roles, start.tokenizer(), one, context(tmp_path / "x"), max_length=256
    )(0)
    losses = (ce(model, micro[role]) for role in roles)
    g_h, g_b = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
        for loss in losses
    )
    exact = grads(F.cosine_similarity(g_h, g_b, dim=0), parameters)
    names = [n for n, _ in model.named_parameters()]
    ours = torch.cat([(ends[0][n].double() - ends[1][n].double()).flatten() for n in names])
    theirs = torch.cat([g.flatten() for g in exact])
    assert float(F.cosine_similarity(ours, theirs, dim=0)) > 0.999
    assert float(ours.norm() / theirs.norm()) == pytest.approx(1.0, abs=1e-2)


def test_seam_preserves_refusals_where_it_is_told_one(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    with pytest.raises(UserError, match="is plain text, and seam puts another answer"):
        SEAM(refusal="w1 w2", fit=FIT).apply(start, domain, context(tmp_path / "text"))
    asked = replace(
        domain,
        forget={
            "a": tuple(
                Row(f"p{i}", prompt=f"w{i} w3", completion=" w5 w6", capability="a", label=1)
                for i in range(8)
            )
        },
    )
    made = SEAM(refusal="w1 w2", fit=FIT).apply(start, asked, context(tmp_path / "asked"))
    assert "preserved" in made.history[-1]


@pytest.mark.parametrize("method", [GradDiff(sam=0.01, fit=FIT), SEAM(fit=FIT)])
def test_a_move_that_rounds_away_is_refused(method: Method, tmp_path: Path) -> None:
    ctx = replace(context(tmp_path / "half"), dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"bfloat16 would round it away; run it with --dtype"):
        method.apply(toy_checkpoint(tmp_path), toy_domain(), ctx)


def test_no_attacker_of_tar_reads_what_it_is_judged_on(tmp_path: Path) -> None:
    start, domain, ctx = toy_checkpoint(tmp_path), toy_domain(), context(tmp_path / "x")
    attacked, heldout = SMALL.split(domain, ctx)
    assert len(heldout) == 2
    assert not {r.unit for r in heldout} & {r.unit for rows in attacked.values() for r in rows}

    def read(rows: Any, purpose: str) -> Any:
        return stream(rows, start.tokenizer(), FREE, ctx, purpose=purpose, max_length=32)

    forget, benign, unseen = (
        read(rows, p) for rows, p in ((attacked["a"], "f"), (domain.retain, "b"), (heldout, "u"))
    )
    kinds = []
    for number in range(40):
        attacker = SMALL.sample(number, {"a": forget}, forget, benign, unseen, ctx)
        units = [u for k in range(4) for batch in attacker.batches(k) for u in batch.units]
        assert not {r.unit for r in heldout} & set(units)
        first = [u[0] for k in range(4) for u in attacker.batches(k)[0].units[:1]]
        assert first == sorted(first, reverse=True)  # retain rows first, then forget rows
        kinds.append(first[0])
    assert 5 < kinds.count("r") < 35


def test_what_is_read_ahead_changes_nothing(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    methods = (SMALL, SMALL.model_copy(update={"cache_gib": 0.0}))
    ends = [
        m.apply(start, toy_domain(), context(tmp_path / f"{i}")).checkpoint.fingerprint
        for i, m in enumerate(methods)
    ]
    assert ends[0] == ends[1]


def test_the_first_safeguard_can_be_left_out(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    bare = SMALL.model_copy(update={"mapping": None})
    made = bare.apply(start, toy_domain(), context(tmp_path / "x"))
    assert made.cost.steps == 3
    # At the original no hidden state has moved, so that none has a direction.
    assert made.history[0]["hidden"] == 0.0


def test_a_capability_of_one_unit_is_refused(tmp_path: Path) -> None:
    domain = toy_domain()
    one = replace(domain, forget={"a": domain.forget["a"][:1]})
    with pytest.raises(UserError, match="'a' has one unit to forget"):
        SMALL.apply(toy_checkpoint(tmp_path), one, context(tmp_path / "x"))


@pytest.mark.parametrize(
    ("method", "times"),
    [(GradDiff(sam=0.1, fit=FIT), "1.5"), (SEAM(fit=FIT), "2.5"), (SMALL, "3.67")],
)
def test_the_cost_is_said_before_the_first_step(method: Method, times: str, tmp_path: Path) -> None:
    told: list[tuple[str, Any]] = []
    ctx = replace(context(tmp_path / "x"), emit=lambda kind, data: told.append((kind, data)))
    method.apply(toy_checkpoint(tmp_path), toy_domain(), ctx)
    first = [kind for kind, _ in told].index("step")
    notes = [data["text"] for kind, data in told[:first] if kind == "note"]
    assert any(f"costs {times} times" in note and "FLOPs" in note for note in notes)


def test_the_estimate_knows_what_a_step_costs(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    sizes = DataSizes(start.num_parameters, start.tokenizer(), toy_domain())

    def flops(method: Method) -> float:
        return method_line("x", method, sizes, 1, "x").flops or 0.0

    plain = flops(GradDiff(fit=FIT))
    assert flops(GradDiff(fit=FIT, sam=0.1)) == pytest.approx(1.5 * plain)
    assert flops(TAR(mapping=None)) / flops(TAR()) > 0.85
    # 64 steps of half a batch, 16 looks, the retain pass and the original's: of 6 forwards.
    assert TAR().step_cost == pytest.approx((64 * 1.5 + 16 * 3 + 4) / 6)


def _net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2)).to(dtype)


def _square(model: nn.Module, step: int) -> dict[str, Term]:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
    return {"mse": Term((model(x.to(next(model.parameters()).dtype)) - 1).square().sum(), 12.0)}


def _run(model: nn.Module, folder: Path | None, stop: int = 30) -> None:
    config = FitConfig(steps=30, lr=1e-2, warmup=5, optimizer="schedule_free", save_every=4)
    run = fit(model, lambda s: [s], _square, config, Context(Path("x")), state_dir=folder)
    for record in run:
        if record.step + 1 == stop < 30:
            run.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schedule_free_is_the_library_s_and_resumes(dtype: torch.dtype, tmp_path: Path) -> None:
    from schedulefree import AdamWScheduleFree

    whole, cut = _net(dtype), _net(dtype)
    _run(whole, None)
    for stop in (3, 11, 29, 30, 30):
        cut = _net(dtype)
        _run(cut, tmp_path, stop)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))
    if dtype == torch.bfloat16:
        return
    plain = _net(dtype)
    optimizer = AdamWScheduleFree(plain.parameters(), lr=1e-2, warmup_steps=5, foreach=False)
    optimizer.train()
    for step in range(30):
        (_square(plain, step)["mse"].sum / 12.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    at_y = copy.deepcopy(plain)
    optimizer.eval()
    for a, b, y in zip(whole.parameters(), plain.parameters(), at_y.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, y)


def test_a_missing_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(UserError, match=r"pip install 'excise\[schedule-free\]', or set"):
        SMALL.apply(toy_checkpoint(tmp_path), toy_domain(), context(tmp_path / "x"))
