"""SSD, LFSSD, Adaptive SSD and Potion against plain loops; what they do with what is odd."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.data.stream import Batch, collate, encode
from excise.losses import head_norm, logit_norm
from excise.methods import ASSD, LFSSD, SSD, Potion
from excise.methods.base import Removal
from excise.methods.importance import (
    ImportanceMethod,
    MeasureImportance,
    SortedRatios,
    Sums,
    accumulate,
    dampen_model,
    share_of,
)
from excise.methods.posthoc.potion import asked, knowledge
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.hooks import trainable
from tests.parity.test_posthoc import plain_nll
from tests.parity.toy import context, toy_checkpoint, toy_domain, weights

SIZE = 4
Loss = Callable[[Any, Batch], Tensor]


def batches(start: Checkpoint, rows: Any) -> Iterator[Batch]:
    """Yield rows in file order, `SIZE` at a time."""
    examples = encode(rows, start.tokenizer(), max_length=512)
    for i in range(0, len(examples), SIZE):
        yield collate(examples[i : i + SIZE], pad_id=start.tokenizer().pad_token_id)


def plain_importance(
    start: Checkpoint, rows: Any, loss: Loss, fold: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the mean over batches of folded gradients, with everything in memory."""
    model = start.load()
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    count = 0
    for batch in batches(start, rows):
        model.zero_grad()
        loss(model, batch).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            sums[name] += fold(parameter.grad)
        count += 1
    return {name: total / count for name, total in sums.items()}


def plain_length(squared: bool) -> Loss:
    """Return the mean length of the logits before every scored token."""

    def loss(model: Any, batch: Batch) -> Tensor:
        out = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT.long())
        chosen: Tensor = out.logits[:, :-1][batch.target_BT[:, 1:]]
        lengths = chosen.norm(dim=-1)
        mean: Tensor = (lengths**2 if squared else lengths).mean()
        return mean

    return loss


def plain_dampened(
    start: Checkpoint, forget: dict[str, Tensor], full: dict[str, Tensor], alpha: float, lam: float
) -> dict[str, Tensor]:
    """Return the weights after the two equations of the paper."""
    out = weights(start)
    for name, weight in out.items():
        chosen = forget[name] > alpha * full[name]
        factor = (lam * full[name] / forget[name]).clamp(max=1)
        out[name] = torch.where(chosen, weight * factor, weight)
    return out


def assert_equal(removal: Removal, expected: dict[str, Tensor]) -> None:
    """Assert that a removal holds these weights."""
    for name, tensor in weights(removal.checkpoint).items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-4, atol=1e-7)


KINDS: dict[str, tuple[ImportanceMethod, Loss, Callable[[Tensor], Tensor]]] = {
    "ssd": (SSD(alpha=1.7, lam=0.9, batch_size=SIZE), plain_nll, torch.square),
    "lfssd": (LFSSD(alpha=1.3, batch_size=SIZE), plain_length(squared=True), torch.abs),
    "assd": (ASSD(batch_size=SIZE), plain_nll, torch.square),
    "potion": (Potion(batch_size=SIZE, tries=3, rho=0.0), plain_length(squared=False), torch.abs),
}


def importances(
    start: Checkpoint, domain: Domain, name: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the two importances of a method by plain loops."""
    _, loss, fold = KINDS[name]
    forget = plain_importance(start, domain.forget["a"], loss, fold)
    retain = plain_importance(start, domain.retain, loss, fold)
    if name == "potion":
        return forget, retain
    a, b = (math.ceil(len(rows) / SIZE) for rows in (domain.forget["a"], domain.retain))
    return forget, {n: (a * forget[n] + b * retain[n]) / (a + b) for n in forget}


def percentile(forget: dict[str, Tensor], full: dict[str, Tensor], share: float) -> float:
    """Return the threshold as the released code takes it."""
    ratio = np.concatenate([(forget[n] / full[n]).flatten().numpy() for n in forget])
    ratio = ratio[np.isfinite(ratio)]
    return max(1.0, float(np.percentile(ratio, 100 - math.log(1 + 100 * share))))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("name", KINDS)
def test_methods_equal_plain_loops(name: str, family: str, tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path, family), toy_domain()
    method = KINDS[name][0]
    removal = method.apply(start, domain, context(tmp_path / "ours"))
    forget, full = importances(start, domain, name)
    share = len(domain.forget["a"]) / (len(domain.forget["a"]) + len(domain.retain))
    if isinstance(method, SSD | LFSSD):
        alpha, lam = method.alpha, method.lam
    elif isinstance(method, ASSD):
        alpha, lam = percentile(forget, full, share), 1.0
    else:
        alpha, lam = percentile(forget, full, share / 25 * 1.1**2), 1.0  # the third share
    assert removal.extras["alpha"] == pytest.approx(alpha, rel=1e-3)
    assert_equal(removal, plain_dampened(start, forget, full, removal.extras["alpha"], lam))
    assert removal.extras["dampening"]["dampened"] > 20


def test_squares_and_absolute_values_choose_other_weights(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    removal = KINDS["ssd"][0].apply(start, domain, context(tmp_path / "ours"))
    forget = plain_importance(start, domain.forget["a"], plain_nll, torch.abs)
    retain = plain_importance(start, domain.retain, plain_nll, torch.abs)
    full = {n: (3 * forget[n] + 4 * retain[n]) / 7 for n in forget}
    with pytest.raises(AssertionError):
        assert_equal(removal, plain_dampened(start, forget, full, 1.7, 0.9))


def test_the_size_of_a_batch_matters(tmp_path: Path) -> None:
    # The gradient of a batch is squared whole: no token or sequence mean, and no micro-batches.
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    found = [
        SSD(alpha=1.7, batch_size=size).apply(start, domain, context(tmp_path / f"{size}"))
        for size in (1, 4)
    ]
    one, four = (removal.extras["dampening"]["dampened"] for removal in found)
    assert abs(one - four) > 0.1 * max(one, four)


@pytest.mark.parametrize("squared", [True, False])
def test_the_head_as_a_form_gives_the_gradients_of_the_logits(squared: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=generator)
    weight = torch.randn(50, 16, generator=generator)
    grads = []
    for form in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        used = w * 1.0  # as where the head is an embedding that is used elsewhere too
        if form:
            total, count = head_norm(h, used, weight.T @ weight, squared=squared)
        else:
            seen = torch.ones(1, 7, dtype=torch.bool)
            total, count = logit_norm((h @ used.T)[None], seen, squared=squared)
        assert count == 7
        (total / count + used[:3].sum()).backward()
        grads.append((float(total.detach()), h.grad, w.grad))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-5)
    for ours, plain in zip(grads[0][1:], grads[1][1:], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_gradients_are_freed_and_no_hook_stays(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    model = start.load()
    with trainable(model, ("*",)) as parameters:
        held: list[int] = []

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            held.append(sum(p.grad is not None for p in parameters.values()))
            return plain_nll(model, batch)

        rows = list(batches(start, domain.retain))
        sums = accumulate(model, rows, loss, tmp_path / "sums.safetensors")
        assert held == [0] * len(rows)
        assert all(p.grad is None for p in parameters.values())
        plain_nll(model, rows[0]).backward()
        assert all(p.grad is not None for p in parameters.values())
    assert sums.batches == len(rows)


def sums_of(values: Tensor, path: Path) -> Sums:
    """Return sums that hold these values, for a model of one tensor."""
    weight = nn.Parameter(torch.zeros_like(values))
    model = nn.ParameterDict({"w": weight})
    return accumulate(model, [0], lambda _, __: (weight * values).sum(), path, fold="abs")


def test_thresholds_are_percentiles_and_odd_ratios_are_told_apart(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    small, large = (torch.rand(400, generator=generator) for _ in range(2))
    small[:5] = large[:5] = 0.0  # 0 / 0
    large[5:8] = 0.0  # nothing in D
    forget = sums_of(small, tmp_path / "f.safetensors")
    full = sums_of(large, tmp_path / "d.safetensors")
    ratios = SortedRatios(forget, full, tmp_path / "ratios", floor=0.0)
    finite = (small / large)[8:].numpy()
    assert (ratios.finite, ratios.infinite) == (392, 3)
    for at in (5.0, 50.0, 97.3, 99.9, 100.0):
        value = ratios.threshold(at)
        assert value == pytest.approx(float(np.percentile(finite, at)), rel=1e-5)
        assert ratios.above(value)["w"] == 3 + int((finite > value).sum())
    model = nn.ParameterDict({"w": nn.Parameter(torch.ones(400))})
    tally = dampen_model(model, forget, full, alpha=2.0)
    assert (tally.untouched, tally.zeroed) == (5, 3)
    assert bool((model["w"][:5] == 1).all())
    assert bool((model["w"][5:8] == 0).all())


def test_vectors_and_other_modules_can_be_spared(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    ssd = SSD(alpha=1.1, batch_size=SIZE)
    every = ssd.apply(start, domain, context(tmp_path / "every"))
    assert any("norm" in name for name in every.changed)
    assert every.extras["dampening"]["vectors_dampened"] > 0
    spared = ssd.model_copy(update={"vectors": False})
    few = spared.apply(start, domain, context(tmp_path / "spared"))
    assert few.changed == tuple(n for n in every.changed if "norm" not in n)
    mlp = ssd.model_copy(update={"modules": ("mlp",)})
    part = mlp.apply(start, domain, context(tmp_path / "mlp"))
    assert part.changed == tuple(n for n in every.changed if ".mlp." in n)


def test_tied_weights_count_once(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path, tie_word_embeddings=True), toy_domain()
    ctx = context(tmp_path / "ours")
    forget, _ = SSD(batch_size=SIZE).measured("nll", start, domain, ctx)
    plain = plain_importance(start, domain.forget["a"], plain_nll, torch.square)
    assert set(forget.shapes) == set(plain)
    for name, tensor in plain.items():
        ours = forget.importance(name).view_as(tensor)
        torch.testing.assert_close(ours, tensor, rtol=1e-4, atol=1e-12)


def test_selection_does_not_measure_again(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    made: list[str] = []
    first = context(tmp_path / "one")

    def run(stage: Any) -> Any:
        if f"{stage}" not in made:
            made.append(f"{stage}")
            ctx = context(tmp_path / f"stage-{len(made)}")
            stage.make(ctx)
        return stage.read(tmp_path / f"stage-{made.index(f'{stage}') + 1}")

    for alpha in (1.5, 2.0):
        ctx = replace(first, work=context(tmp_path / f"{alpha}").work, stages=run)
        SSD(alpha=alpha, batch_size=SIZE).apply(start, domain, ctx)
    assert len(made) == 2
    assert all(MeasureImportance.__name__ in stage for stage in made)


def taught(start: Checkpoint, domain: Domain, to: Path) -> Checkpoint:
    """Return a model that learned all rows of a domain."""
    model = start.load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        for batch in batches(start, (*domain.forget["a"], *domain.retain)):
            optimizer.zero_grad()
            plain_nll(model, batch).backward()
            optimizer.step()
    return save_model(model, start.tokenizer(), to)


def test_potion_stops_where_forget_rows_are_known_no_better(tmp_path: Path) -> None:
    domain = toy_domain()
    start = taught(toy_checkpoint(tmp_path), domain, tmp_path / "taught")
    method = Potion(batch_size=SIZE, rho=0.5)
    removal = method.apply(start, domain, context(tmp_path / "ours"))
    known = [turn["known"] for turn in removal.history]
    assert known[0] > 0.3
    assert known[-1] <= 0.5 * known[0]
    assert all(level > 0.5 * known[0] for level in known[1:-1])
    search = removal.extras["search"]
    assert search["turns"] == len(known) - 1 < 500
    assert search["end"] == "forget rows are known no better than asked for"
    # What was searched is what was written.
    model = removal.checkpoint.load()
    rows, metric = asked(domain, 256)
    level = knowledge(model, start.tokenizer(), rows, metric, 512)
    assert level == pytest.approx(known[-1], rel=1e-5)


def test_potion_takes_the_shares_it_is_told_to(tmp_path: Path) -> None:
    method = Potion(batch_size=SIZE, rho=0.0, tries=3, step=3.0, start_divisor=50.0)
    domain = toy_domain()
    removal = method.apply(toy_checkpoint(tmp_path), domain, context(tmp_path / "ours"))
    first = share_of(domain) / 50
    shares = [turn["share"] for turn in removal.history]
    assert shares == pytest.approx([0, first, 3 * first, 9 * first][: len(shares)])
    assert len(shares) > 2


def test_what_cannot_be_done_is_said_in_a_sentence(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    with pytest.raises(UserError, match=r"alpha 10 selects nothing.*1/2.33 of all batches.*below"):
        SSD(batch_size=SIZE).apply(start, domain, context(tmp_path / "a"))
    assert not list((tmp_path / "a").iterdir()), "it is said before anything is measured"
    with pytest.raises(UserError, match="none to retain; give --retain"):
        SSD().apply(start, replace(domain, retain=()), context(tmp_path / "b"))
    broken = start.weights_of(["model.norm.weight"])["model.norm.weight"].clone()
    broken[0] = 1e30
    huge = start.write({"model.norm.weight": broken}, tmp_path / "huge")
    with pytest.raises(UserError, match=r"the gradient of '.*' is not finite in batch 1"):
        SSD(alpha=1.5).apply(huge, domain, context(tmp_path / "c"))
