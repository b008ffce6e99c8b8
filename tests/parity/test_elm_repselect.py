"""ELM, RepSelect and the components taken out of gradients, against plain loops written here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from excise.core.errors import UserError
from excise.methods import ELM, GradDiff, RepSelect
from excise.methods.distillation.sampling import sample
from excise.methods.posthoc.elm import AskOriginal, Guide
from excise.methods.tuning import forget_rows, role_batches, stream
from excise.models.lora import LoRA, adapted
from excise.testing import check_method
from excise.train.components import Components, without_top
from excise.train.fit import FitConfig
from tests.parity.test_posthoc import plain_nll
from tests.parity.toy import context, toy_checkpoint, toy_domain, weights

FIT = FitConfig(steps=4, lr=1e-3, batch_size=4, weight_decay=0.01)
SELECT = RepSelect(
    components=Components(count=4),
    elicit=LoRA(rank=2, alpha=2.0),
    elicit_lr=0.5,
    fit=FitConfig(steps=3, lr=0.5, batch_size=4, optimizer="sgd"),
    budget=0.0,
)
ERASE = ELM(
    layers=(1,),
    fit=FIT,
    lora=None,
    guide=Guide(concept="w3", expert="w1 w2 {concept}", novice="w4", redirect=" w5 w6 w7",
                eta=20.0, top=5, continuation=6),
)  # fmt: skip


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two sets of weights."""
    return max(float((one[n] - two[n]).abs().max()) for n in one)


def plain_repselect(start: Any, method: RepSelect, folder: Path, sign: float = 1.0) -> Any:
    """Return the weights of RepSelect by autograd, two hand-made matrices and one SVD each."""
    ctx, model = context(folder), start.load()
    names = [f"{b}.mlp.{m}_proj" for b in (f"model.layers.{i}" for i in range(3))
             for m in ("gate", "up", "down")]  # fmt: skip
    read = stream(forget_rows(toy_domain()), start.tokenizer(), method.fit, ctx,
                  purpose="forget", max_length=128)  # fmt: skip
    low: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with adapted(start.load(), LoRA(rank=2, alpha=2.0, modules=tuple(names)),
                 seed=ctx.seed_for("lora")) as drawn:  # fmt: skip
        for name in names:
            a = drawn.get_parameter(f"base_model.model.{name}.lora_A.default.weight")
            out = model.get_submodule(name).weight.shape[0]
            low[name] = (a.detach().clone(), torch.zeros(out, 2))
    handles = [
        model.get_submodule(n).register_forward_hook(
            lambda _m, x, y, n=n: y + x[0] @ low[n][0].T @ low[n][1].T
        )
        for n in names
    ]
    for step in range(3) if method.elicit else ():
        for pair in low.values():
            for part in pair:
                part.requires_grad_(True).grad = None
        plain_nll(model, read(step)[0]).backward()
        with torch.no_grad():
            for pair in low.values():
                for part in pair:
                    part -= method.elicit_lr * part.grad  # type: ignore[operator]
    model.zero_grad()
    for step in range(3):
        (-sign * plain_nll(model, read(step)[0])).backward()
    for handle in handles:
        handle.remove()
    for i, name in enumerate(names):
        weight = model.get_submodule(name).weight
        grad = weight.grad
        torch.manual_seed(ctx.seed_for(f"components/{i}"))
        u, s, v = torch.svd_lowrank(grad, q=4)
        taken = torch.diag(1 - s[-1] / s)
        grad = grad - grad @ v @ taken @ v.T
        grad = grad - u @ taken @ u.T @ grad
        for _ in range(method.fit.steps):
            weight.data -= method.fit.lr * grad
    return {n: p.detach() for n, p in model.named_parameters()}


def test_repselect_equals_a_plain_loop(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    removal = SELECT.apply(start, toy_domain(), context(tmp_path / "ours"))
    theirs = plain_repselect(start, SELECT, tmp_path / "plain")
    ours, before = weights(removal.checkpoint), weights(start)
    moved = distance(ours, before)
    assert moved > 1e-4
    assert distance(ours, theirs) < 1e-4 * moved
    assert len(removal.changed) == 9
    assert all(".mlp." in name for name in removal.changed)


def test_repselect_needs_its_sign_and_its_adapter(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    ours = weights(SELECT.apply(start, toy_domain(), context(tmp_path / "ours")).checkpoint)
    moved = distance(ours, weights(start))
    down = plain_repselect(start, SELECT, tmp_path / "down", sign=-1.0)
    bare = plain_repselect(start, SELECT.model_copy(update={"elicit": None}), tmp_path / "bare")
    assert distance(ours, down) > moved
    assert distance(ours, bare) > 1e-3 * moved


def test_repselect_sums_means_of_batches(tmp_path: Path) -> None:
    start, moves = toy_checkpoint(tmp_path), {}
    for size, micro in ((4, 0), (4, 2), (12, 0)):
        fit = SELECT.fit.model_copy(update={"batch_size": size, "micro_size": micro})
        method = SELECT.model_copy(update={"fit": fit, "elicit": None})
        removal = method.apply(start, toy_domain(), context(tmp_path / f"{size}-{micro}"))
        moves[size, micro] = removal.extras["distance"]
    assert moves[4, 2] == pytest.approx(moves[4, 0], rel=1e-4)
    assert moves[4, 0] > 1.5 * moves[12, 0]  # three means, not one


def test_repselect_stops_before_the_budget_is_spent(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    free = SELECT.model_copy(update={"budget": 1e9, "fit": SELECT.fit.model_copy(
        update={"steps": 6})})  # fmt: skip
    all_of_it = free.apply(start, domain, context(tmp_path / "free"))
    spent = [row["kl"] for row in all_of_it.history if "kl" in row]
    assert len(spent) == 6
    assert spent == sorted(spent)
    tight = free.model_copy(update={"budget": (spent[2] + spent[3]) / 2})
    removal = tight.apply(start, domain, context(tmp_path / "tight"))
    three = SELECT.apply(start, domain, context(tmp_path / "three"))
    assert removal.extras["subtractions"] == 3
    assert removal.checkpoint.fingerprint == three.checkpoint.fingerprint
    model, first = removal.checkpoint.load(), start.load()
    batch = stream(domain.dev_retain, start.tokenizer(), FIT, context(tmp_path / "kl"),
                   purpose="x", max_length=128)(0)[0]  # fmt: skip
    p, q = (m(**batch.inputs).logits[batch.attention_BT].log_softmax(-1) for m in (first, model))
    plain = (p.exp() * (p - q)).sum(-1).mean()
    assert plain.item() == pytest.approx(spent[2], rel=1e-3)


def test_repselect_says_what_is_wrong(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    strict = SELECT.model_copy(update={"budget": 1e-12})
    with pytest.raises(UserError, match=r"over the budget of 1e-12; lower fit\.lr"):
        strict.apply(start, domain, context(tmp_path / "a"))
    with pytest.raises(UserError, match="no dev_retain row"):
        strict.apply(start, replace(domain, dev_retain=()), context(tmp_path / "b"))
    with pytest.raises(UserError, match="holds no matrix"):
        SELECT.model_copy(update={"modules": ("model.norm",)}).apply(
            start, domain, context(tmp_path / "c")
        )
    with pytest.raises(ValueError, match="leave optimizer at sgd"):
        RepSelect(fit=FitConfig(optimizer="adamw"))


def plain_elm(start: Any, method: ELM, folder: Path, swap: bool = False) -> Any:
    """Return the weights of ELM from one row at a time and torch's AdamW."""
    ctx, domain, tokenizer = context(folder), toy_domain(), start.tokenizer()
    frozen, model = start.load(), start.load()
    rows = forget_rows(domain)
    answers = ctx.run(AskOriginal(start, method.guide, rows, domain.retain, 175, True, ctx.seed))
    words = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("w1 w2 w3", "w4")]
    expert, novice = reversed(words) if swap else words
    forget, retain = (
        stream(r, tokenizer, FIT, ctx, purpose=p, max_length=175)
        for p, r in (("forget", rows), ("retain", domain.retain))
    )

    def logits(net: Any, ids: Any) -> torch.Tensor:
        found: torch.Tensor = net(input_ids=torch.tensor([list(ids)])).logits[0]
        return found

    def guided(ids: Any) -> torch.Tensor:
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id == ids[0] else []
        body, n = list(ids[len(bos) :]), len(ids)
        z = [logits(frozen, x)[-n:] for x in (ids, bos + expert + body, bos + novice + body)]
        own, up, down = ((one.double() / 1.2).log_softmax(-1) for one in z)
        score = own - torch.linspace(1, 20, n).double()[:, None] * (up - down)
        fifth = score.topk(5).values[:, -1:]
        return score.masked_fill(score < fifth, -torch.inf).softmax(-1).float()

    trained = [p for n, p in model.named_parameters() if n.startswith("model.layers.1.")]
    optimizer = torch.optim.AdamW(trained, lr=FIT.lr, weight_decay=FIT.weight_decay)
    for step in range(FIT.steps):
        optimizer.zero_grad()
        for f, r in zip(forget.indices(step), retain.indices(step), strict=True):
            x, y = forget.examples[f].ids, retain.examples[r].ids
            with torch.no_grad():
                target, own = guided(x), logits(frozen, y).argmax(-1)
            out = torch.tensor(answers.ways_out[f])
            loss = F.cross_entropy(logits(model, x), target)
            loss = loss + F.cross_entropy(logits(model, y), own)
            behind = logits(model, (*x, *out.tolist()))[len(x) - 1 : -1]
            (loss + F.cross_entropy(behind, out)).div(4).backward()
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


def test_elm_equals_a_plain_loop(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    removal = ERASE.apply(start, toy_domain(), context(tmp_path / "ours"))
    ours = weights(removal.checkpoint)
    assert distance(ours, plain_elm(start, ERASE, tmp_path / "plain")) < 2e-6
    assert distance(ours, weights(start)) > 1e-3
    assert all(name.startswith("model.layers.1.") for name in removal.changed)


def test_elm_needs_to_know_who_is_the_expert(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    ours = weights(ERASE.apply(start, toy_domain(), context(tmp_path / "ours")).checkpoint)
    assert distance(ours, plain_elm(start, ERASE, tmp_path / "swapped", swap=True)) > 1e-4


def test_elm_says_what_is_wrong_and_leaves_out_what_is_off(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    with pytest.raises(UserError, match="names 4, 5, 6, 7, and this model has blocks 0 to 2"):
        ELM(fit=FIT).apply(start, domain, context(tmp_path / "a"))
    quiet = ERASE.model_copy(update={"fluency": 0.0}).apply(
        start, domain, context(tmp_path / "quiet")
    )
    assert set(quiet.history[0]) == {"step", "loss", "erase", "retain"}
    with_first = ERASE.apply(start, domain, context(tmp_path / "b"))
    without = ERASE.model_copy(update={"skip_first": True}).apply(
        start, domain, context(tmp_path / "c")
    )
    assert with_first.checkpoint.fingerprint != without.checkpoint.fingerprint


def test_ways_out_lead_away_from_the_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, told = toy_checkpoint(tmp_path), {}

    def hear(*args: Any, **kwargs: Any) -> list[tuple[int, ...]]:
        told.update(kwargs["guides"])
        return sample(*args, **kwargs)

    monkeypatch.setattr("excise.methods.posthoc.elm.sample", hear)
    ERASE.apply(start, toy_domain(), context(tmp_path / "ours"))
    said = {factor: {start.tokenizer().decode(g) for g in texts} for factor, texts in told.items()}
    assert said == {-3.0: {"<bos> w1 w2 w3"}, 3.0: {"<bos> w4"}}


def test_guides_are_added_to_what_a_prompt_says(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    model, tokenizer = start.load(), start.tokenizer()
    prompts, up, down = [(5, 6, 7), (8, 9)], [(10, 11), (12,)], [(13,), (14, 15, 16, 17)]
    new = sample(model, tokenizer, prompts, [1, 2], new_tokens=6, guides={-3.0: up, 3.0: down})
    for i, seed in enumerate((1, 2)):
        draws = torch.rand(6, generator=torch.Generator().manual_seed(seed))
        said: tuple[int, ...] = ()
        for draw in draws[: len(new[i])].tolist():
            z = [model(input_ids=torch.tensor([x[i] + said])).logits[0, -1].log_softmax(-1)
                 for x in (prompts, up, down)]  # fmt: skip
            share = (z[0] - 3 * (z[1] - z[2])).double().softmax(-1).cumsum(-1)
            said += (int((share <= draw).sum()),)
        assert new[i] == said


def test_components_are_dropped_or_shrunk_and_nothing_else_moves() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(20, 6, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(12, 6, generator=generator))[0]
    s = torch.tensor([32.0, 16, 8, 4, 2, 1])
    matrix = u @ torch.diag(s) @ v.T
    dropped = without_top(matrix, Components(count=2, how="drop"), 0)
    torch.testing.assert_close(dropped, u[:, 2:] @ torch.diag(s[2:]) @ v[:, 2:].T)
    # Of a matrix of rank 6 no more than 6 count: noise is not what the others are brought to.
    shrunk = without_top(matrix, Components(count=12), 0)
    torch.testing.assert_close(shrunk, u @ torch.diag(1 / s) @ v.T)
    three = torch.linalg.svdvals(without_top(matrix, Components(count=3), 0))
    # 32, 16 and 8 become 8 * 8 / 32, 8 * 8 / 16 and 8.
    assert three.tolist() == pytest.approx([8.0, 4, 4, 2, 2, 1, *[0] * 6], abs=0.5)
    experts = torch.stack([matrix, 2 * matrix])
    both = without_top(experts, Components(count=2, how="drop"), 0)
    torch.testing.assert_close(both, torch.stack([dropped, 2 * dropped]))
    gains, broken = torch.ones(5), torch.full((4, 4), torch.nan)
    assert without_top(gains, Components(count=1), 0) is gains
    assert without_top(broken, Components(count=1), 0) is broken
    assert not without_top(torch.zeros(4, 4), Components(count=1), 0).any()
    with pytest.raises(UserError, match="use fewer than 12"):
        without_top(matrix, Components(count=12, how="drop"), 0)


def test_any_loss_can_be_trained_without_top_components(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    fit = FitConfig(steps=3, lr=0.1, batch_size=4, optimizer="sgd")
    taken = Components(count=3, how="drop")
    method = GradDiff(fit=fit, modules=("down_proj",), drop_components=taken)
    ours = weights(method.apply(start, domain, context(tmp_path / "ours")).checkpoint)
    model = start.load()
    read = role_batches(domain, ("forget", "retain"), start.tokenizer(), fit,
                        context(tmp_path / "plain"), max_length=512)  # fmt: skip
    for step in range(3):
        model.zero_grad()
        micro = read(step)[0]
        (plain_nll(model, micro["retain"]) - plain_nll(model, micro["forget"])).backward()
        for block in model.model.layers:
            weight = block.mlp.down_proj.weight
            u, s, v = torch.linalg.svd(weight.grad, full_matrices=False)
            weight.data -= 0.1 * u[:, 3:] @ torch.diag(s[3:]) @ v[3:]
    moved = distance(ours, weights(start))
    theirs = {n: p.detach() for n, p in model.named_parameters()}
    whole = method.model_copy(update={"drop_components": None})
    other = weights(whole.apply(start, domain, context(tmp_path / "whole")).checkpoint)
    assert distance(ours, theirs) < 0.05 * moved  # one SVD is randomised, the other is not
    assert distance(ours, other) > moved
    with pytest.raises(ValueError, match="which an adapter of rank 8 does not have"):
        GradDiff(lora=LoRA(), drop_components=taken)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_method_without_top_components_keeps_the_contract(family: str) -> None:
    check_method(GradDiff(drop_components=Components(count=2, how="drop")), families=(family,))
