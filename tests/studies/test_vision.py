"""Split models: where gradients go, what counts, and studies of tiny made-up images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.record import Estimate, load
from excise.run.study import conduct
from excise.train.fit import FitConfig
from excise.train.pool import Processes
from excise_studies.vision.autoencoder import (
    SplitAutoencoder,
    SplitAutoencoderConfig,
    errors,
    terms_of,
    train_autoencoder,
)
from excise_studies.vision.class_imbalance import (
    ClassImbalance,
    Least,
    distances,
    fewer,
    groups_of,
    model_of,
    ranked,
    taxes_of,
)
from excise_studies.vision.class_imbalance import decide as decide_imbalance
from excise_studies.vision.classifier import SplitClassifier, SplitClassifierConfig
from excise_studies.vision.digits_split import DigitsSplit, number, ten
from excise_studies.vision.halves import (
    Halves,
    Routed,
    as_batch,
    batches,
    correlation,
    learned,
    routed,
)
from excise_studies.vision.images import Images, ImageSpec, generated
from excise_studies.vision.objects_split import ObjectsSplit, conditions_of
from excise_studies.vision.split_jobs import SplitModel, by_seed, decide, means_of

FIRST = (0, 1, 2, 3, 4)
SMALL = SplitAutoencoderConfig(
    hidden=(32,),
    code=8,
    fit=FitConfig(steps=100, lr=6e-3, batch_size=50, schedule="cosine"),
)
QUICK = SMALL.model_copy(update={"fit": SMALL.fit.model_copy(update={"steps": 80, "lr": 1e-2})})
BRIEF = SMALL.model_copy(update={"fit": SMALL.fit.model_copy(update={"steps": 15})})
TINY = ImageSpec(source="generated", train=200, dev=50, test=100)


def made(config: SplitAutoencoderConfig = SMALL) -> SplitAutoencoder:
    return SplitAutoencoder(config, 144, seed=0)


def code_gradient(which: Routed, group: int) -> Tensor:
    """Return the gradient that decoding one group's images leaves at the encoding."""
    data = as_batch(generated(40, 0), FIRST)
    data = data.take((data.first_B == (group == 0)).nonzero().flatten())
    model = made()
    code = model.encode(data.x_BHW).detach().requires_grad_()
    with routed(model, 8, which) as tell:
        tell(data)
        model.decode(code, data.first_B).square().sum().backward()
    assert code.grad is not None
    return code.grad


@pytest.mark.parametrize(
    ("which", "group", "blocked"),
    [
        ("both", 0, slice(4, 8)),
        ("both", 1, slice(0, 4)),
        ("second", 0, slice(0, 0)),
        ("second", 1, slice(0, 4)),
        ("none", 0, slice(0, 0)),
    ],
)
def test_a_group_s_gradient_leaves_its_own_half_alone(
    which: Routed, group: int, blocked: slice
) -> None:
    routed_grad, plain = code_gradient(which, group), code_gradient("none", group)
    open_ = torch.ones(8, dtype=torch.bool)
    open_[blocked] = False
    assert torch.equal(routed_grad[:, open_], plain[:, open_])
    assert plain[:, ~open_].abs().sum() > 0 or bool(open_.all())
    assert routed_grad[:, ~open_].abs().sum() == 0


def test_channels_of_pictures_are_routed_image_by_image() -> None:
    config = SplitClassifierConfig(stem=4, widths=(4, 8))
    model = SplitClassifier(config, 10, seed=0).eval()
    data = as_batch(generated(20, 0, side=28), FIRST)
    code = model.encode(data.x_BHW).detach().requires_grad_()
    with routed(model, 8, "both") as tell:
        tell(data)
        model.decode(code).square().sum().backward()
    grad = code.grad
    assert grad is not None
    assert grad.dim() == 4
    size = grad.abs().sum((2, 3))
    top, bottom = size[:, :4].sum(1) > 0, size[:, 4:].sum(1) > 0
    assert torch.equal(top, data.first_B)
    assert torch.equal(bottom, ~data.first_B)


def test_penalties_are_not_routed_and_certificates_teach_the_encoder_nothing() -> None:
    model = made()
    data = as_batch(generated(40, 0), FIRST)

    def encoder_gradient(keep: str) -> float:
        model.zero_grad()
        with routed(model, 8, "both") as tell:
            tell(data)
            terms = terms_of(SMALL, model, data)
            sum(t.sum for n, t in terms.items() if n.startswith(keep)).backward()  # type: ignore[union-attr]
        grads = [p.grad for p in model.encoder.parameters() if p.grad is not None]
        return float(sum(g.abs().sum() for g in grads))

    assert encoder_gradient("top") == 0
    assert encoder_gradient("bottom") == 0
    assert encoder_gradient("decoder") > 0
    penalty = encoder_gradient("l1")
    with_routing = penalty
    model.zero_grad()
    model.encode(data.x_BHW).abs().sum().backward()
    plain = float(sum(p.grad.abs().sum() for p in model.encoder.parameters() if p.grad is not None))
    assert with_routing == pytest.approx(plain, rel=1e-5)


def test_correlation_is_that_of_channel_pairs() -> None:
    top, bottom = torch.randn(50, 3), torch.randn(50, 3)
    pairs = np.corrcoef(torch.cat([top, bottom], 1).T.numpy())[:3, 3:]
    assert float(correlation(top, bottom)) == pytest.approx(np.abs(pairs).mean(), abs=1e-5)
    assert float(correlation(top, torch.zeros(50, 3))) == 0


def test_images_that_are_left_out_count_for_certificates_alone() -> None:
    images = generated(200, 0)
    data = learned(images, FIRST, 0.0, 0)
    assert torch.equal(data.seen_B, ~data.first_B)
    terms = terms_of(SMALL, made(), data)
    assert terms["decoder first"].count == 0
    assert terms["decoder second"].count == terms["top first"].count == 100
    assert terms["l1 top"].count == 100
    rare = learned(images, FIRST, 0.1, 0)
    assert int((rare.seen_B & rare.first_B).sum()) == 11


def test_groups_weigh_alike_or_images_do() -> None:
    data = learned(generated(200, 0), FIRST, 0.1, 0)
    model = made()

    def decoder_loss(config: SplitAutoencoderConfig) -> float:
        terms = terms_of(config, model, data)
        own = [t for n, t in terms.items() if n.startswith("decoder")]
        return float(sum(t.weight * float(t.sum.detach()) / t.count for t in own))

    found = errors(model, generated(200, 0), FIRST)["decoder"]
    first = found[data.first_B & data.seen_B].mean()
    second = found[~data.first_B].mean()
    assert decoder_loss(SMALL) == pytest.approx(float(first + second), rel=1e-5)
    alike = SMALL.model_copy(update={"balance": "images"})
    assert decoder_loss(alike) == pytest.approx(2 * float(found[data.seen_B].mean()), rel=1e-5)


def test_absolute_errors_are_absolute_and_squared_ones_squared() -> None:
    model = made()
    for part in [*model.decoders, *model.certificates]:
        for p in part.parameters():
            nn.init.zeros_(p)
    images = generated(20, 0)
    x = torch.from_numpy(images.pixels_NHW).float().flatten(1) / 127.5 - 1
    found = errors(model, images, FIRST)
    for name in ("decoder", "top", "bottom"):
        torch.testing.assert_close(found[name], x.abs().mean(1))
        torch.testing.assert_close(found[f"{name}, squared"], x.square().mean(1))
    torch.testing.assert_close(found["blank"], (x + 1).mean(1))


def test_separate_decoders_draw_their_own_group() -> None:
    model = made(SMALL.model_copy(update={"separate_decoders": True}))
    data = as_batch(generated(20, 0), FIRST)
    code = model.encode(data.x_BHW)
    drawn = model.decode(code, data.first_B)
    torch.testing.assert_close(drawn[data.first_B], model.decoders[1](code[data.first_B]))
    torch.testing.assert_close(drawn[~data.first_B], model.decoders[0](code[~data.first_B]))


def test_batches_are_a_function_of_the_step() -> None:
    data, ctx = as_batch(generated(100, 0), FIRST), Context(work=Path(), seed=3)
    stream, again = batches(data, 32, ctx), batches(data, 32, ctx)
    later = again(7)[0]
    for step in range(7):
        stream(step)
    assert torch.equal(stream(7)[0].x_BHW, later.x_BHW)
    epoch = torch.cat([stream(s)[0].x_BHW for s in range(3)])
    assert len(epoch.unique(dim=0)) == 96


def test_training_splits_the_encoding_and_routing_leaves_nothing_behind() -> None:
    drawn = TINY.split(0)
    found = {}
    for which in ("both", "none"):
        config = SMALL.model_copy(update={"routed": which, "l1": (3e-3, 3e-3)})
        model = train_autoencoder(drawn.train, config, Context(work=Path(), seed=0))
        assert all("forward" not in m.__dict__ for m in model.modules())
        low = torch.isin(torch.from_numpy(drawn.test.labels_N), torch.tensor(FIRST))
        bottom = errors(model, drawn.test, FIRST)["bottom"]
        found[which] = float(bottom[low].mean() - bottom[~low].mean())
    assert found["both"] > found["none"] + 0.1


def test_an_odd_encoding_is_refused() -> None:
    with pytest.raises(UserError, match="has no halves"):
        Halves(7)


def test_the_ten_settings_are_ten() -> None:
    found = ten(SMALL)
    assert [number(name) for name in found] == list(range(1, 11))
    assert len({c.digest() for c in found.values()}) == 10
    by_number = {number(n): c for n, c in found.items()}
    assert [i for i, c in by_number.items() if c.routed == "none"] == [7, 8, 9, 10]
    assert [i for i, c in by_number.items() if c.share == 0] == [7, 8]
    assert [i for i, c in by_number.items() if c.l1 == (0, 0)] == [4, 5, 8, 10]
    assert [i for i, c in by_number.items() if c.separate_decoders] == [2, 5]


def numbered(i: int) -> SplitAutoencoderConfig:
    """Return one of the ten settings, of the small model."""
    return next(config for name, config in ten(SMALL).items() if number(name) == i)


def setting_and_plain(
    config: SplitAutoencoderConfig,
    written_out: Callable[[SplitAutoencoder, Tensor, Tensor], Tensor],
) -> tuple[float, float]:
    """Return how far loss and gradients of a setting are from a plain loss, the largest first.

    Certificates, whose gradient reaches nothing else, are left out.
    """
    data = learned(generated(60, 0), FIRST, config.share, 0)
    data = replace(data, x_BHW=data.x_BHW.double())
    model = SplitAutoencoder(config, 144, seed=0).double()
    weights = [*model.encoder.parameters(), *model.decoders.parameters()]
    with routed(model, config.code, config.routed) as tell:
        tell(data)
        terms = terms_of(config, model, data)
        mine = [t for n, t in terms.items() if not n.startswith(("top", "bottom")) and t.count]
        total = torch.stack([t.weight * t.sum / t.count for t in mine]).sum()
        ours = torch.autograd.grad(total, weights)
    plain = written_out(model, data.x_BHW.flatten(1), data.first_B)
    theirs = torch.autograd.grad(plain, weights)
    off = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    return off, abs(float(total.detach()) - float(plain.detach()))


def test_setting_6_is_the_released_loss() -> None:
    """5-9 into the bottom half alone; 0-4 decoded once a half; L1 0.02 on the bottom half."""

    def written_out(model: SplitAutoencoder, x: Tensor, low: Tensor) -> Tensor:
        top, bottom = model.encoder(x).chunk(2, 1)
        by_bottom = model.decoders[0](torch.cat([top.detach(), bottom], 1))
        by_top = model.decoders[0](torch.cat([top, bottom.detach()], 1))
        loss: Tensor = (by_bottom - x)[~low].abs().mean() + (by_bottom - x)[low].abs().mean()
        loss = loss + (by_top - x)[low].abs().mean()
        loss = loss + 0.01 * top.abs().mean(0).sum() + 0.02 * bottom.abs().mean(0).sum()
        # Released: deviations over n - 1, products over n; here over n both.
        unit = [(z - z.mean(0)) / z.std(0, unbiased=False) for z in (top, bottom)]
        loss = loss + 0.1 * (unit[0].T @ unit[1] / len(x)).abs().mean()
        return loss

    assert max(setting_and_plain(numbered(6), written_out)) < 1e-8


def test_setting_7_is_the_released_loss() -> None:
    """Decoded are 5-9 alone; L1 0.001 pulls on the encodings of all; nothing is decorrelated."""

    def written_out(model: SplitAutoencoder, x: Tensor, low: Tensor) -> Tensor:
        code = model.encoder(x)
        drawn = model.decoders[0](code)
        loss: Tensor = (drawn - x)[~low].abs().mean() + 1e-3 * code.abs().mean(0).sum()
        return loss

    assert max(setting_and_plain(numbered(7), written_out)) < 1e-12


def test_one_routed_group_needs_one_decoder() -> None:
    with pytest.raises(ValueError, match="both groups share a decoder"):
        SplitAutoencoderConfig(routed="second", separate_decoders=True)


def split_of(first: float, second: float) -> SplitModel:
    scores = {
        ("bottom", "first"): {str(i): first for i in range(9)},
        ("bottom", "second"): {str(i): second for i in range(10, 15)},
    }
    return SplitModel(scores, "", 0, "")


def test_the_contrast_is_a_difference_of_differences() -> None:
    conditions = {
        "arm": {1: split_of(0.5, 0.2), 2: split_of(0.4, 0.2)},
        "control": {1: split_of(0.2, 0.1), 2: split_of(0.2, 0.1)},
    }
    means = means_of(conditions)
    found = means.contrast("arm", "control")
    assert found.value == pytest.approx(0.25 - 0.1)
    assert found.low < 0.15 < found.high, "two seeds of 0.2 and 0.1 say next to nothing"
    assert found.high - found.low > 1
    assert means.contrast("arm", "control", sign=-1).value == pytest.approx(-0.15)
    assert means.mean("arm", "bottom").value == pytest.approx((18 * 0.45 + 10 * 0.2) / 28)
    assert means.mean("arm", "bottom").n == 28
    assert means.difference("arm", "control", "bottom", "second").value == pytest.approx(0.1)
    each_seed = by_seed(conditions, "arm", "control")
    assert [round(d.value, 6) for d in each_seed.values()] == [0.2, 0.1]

    def said(low: float, high: float, margin: float) -> str:
        return decide("G", Estimate(0.15, low, high), each_seed, margin, 0.05).text

    assert said(0.1, 0.2, 0.05).startswith("split: G = 0.150 [0.100, 0.200], margin 0.05")
    assert said(0.13, 0.17, 0.12).startswith("undecided"), "one seed lies below the margin"
    assert said(0.1, 0.2, 0.3).startswith("not split")


def test_digits_split_ends_with_a_record_and_goes_on(tmp_path: Path) -> None:
    study = DigitsSplit(
        seeds=(1,), images=TINY, model=QUICK, l1_tried=(3e-3,), correlation_tried=(0.1,),
        settings=(1, 8, 10),
    )  # fmt: skip
    kinds: list[tuple[str, Any]] = []

    def emit(kind: str, data: Any) -> None:
        kinds.append((kind, data.get("reused")))

    made = conduct(study, tmp_path / "out", Processes(1, emit=emit))
    assert made.study is not None
    assert made.study.decision.startswith("undecided: G = ")
    assert "G has no interval over seeds, so nothing is decided" in made.study.paragraph
    assert "blank page" in made.study.paragraph
    assert load(tmp_path / "out").data["rows"] == {"train": 200, "dev": 50, "test": 100}
    assert len(made.models) == 3
    picture = made.study.pictures[0]
    assert len(picture.columns) == 10
    assert [len(r.images) for r in picture.rows] == [10] * 7
    assert {len(image) for r in picture.rows for image in r.images} == {144}
    assert "1 routed: bottom half" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "report.html").is_file()
    assert kinds.count(("stage_done", False)) == 5
    kinds.clear()
    again = conduct(study, tmp_path / "out", Processes(1, emit=emit))
    assert again.study == made.study
    assert kinds.count(("stage_done", True)) == 5


def test_objects_split_ends_with_a_record(tmp_path: Path) -> None:
    quick = FitConfig(steps=12, lr=5e-3, batch_size=16)
    study = ObjectsSplit(
        seeds=(1,), images=TINY, l1_tried=(1e-3,), rare=0.2,
        model=SplitClassifierConfig(
            stem=4, widths=(4, 8), fit=quick, certificate=FitConfig(steps=10, lr=1e-2),
        ),
    )  # fmt: skip
    made = conduct(study, tmp_path / "out", Processes(1))
    assert made.study is not None
    assert made.study.tables[0].title == "Accuracy"
    assert "every image weighed alike" in made.study.paragraph
    assert conditions_of(study.model, None).keys() == {
        "routed, L1", "routed, no L1", "not routed, L1", "plain",
    }  # fmt: skip


def test_class_imbalance_runs_through(tmp_path: Path) -> None:
    study = ClassImbalance(
        seeds=(1, 2), tuned_on=(0,), images=TINY, classes=FIRST, halves=(FIRST,),
        l1_tried=(1e-6, 3e-3), bisections=1, split_share=0.01,
        model=BRIEF.model_copy(update={"balance": "images"}),
    )  # fmt: skip
    made = conduct(study, tmp_path / "out", Processes(1))
    assert made.study is not None
    table, tuning = made.study.tables
    least = {r.condition: r.value for r in table.rows if r.metric == "least L1"}
    assert set(least) == {"0", "1", "2", "3", "4", "0 + 1 + 2 + 3 + 4"}
    tried = {
        name: {float(r.metric[3:]): r.value or 0 for r in tuning.rows if r.condition == name}
        for name in least
    }
    for name, by_l1 in tried.items():
        assert {1e-6} <= set(by_l1) <= {1e-6, 3e-3, 5.5e-5}
        splitting = [l1 for l1, share in by_l1.items() if share > study.split_share]
        expected = min(splitting) if splitting else max(by_l1, key=lambda l1: by_l1[l1])
        assert least[name] == pytest.approx(expected, rel=0.01)
    rho = next(r for r in table.rows if r.metric == "rho (distance, tax)")
    assert rho.n == 5
    assert "near classes" in made.study.decision


def test_one_class_is_routed_and_the_others_pass_the_top_half() -> None:
    study = ClassImbalance()
    routed = model_of(study, (3,), 1e-2)
    assert isinstance(routed, SplitAutoencoderConfig)
    assert (routed.first, routed.routed, routed.l1) == (
        (0, 1, 2, 4, 5, 6, 7, 8, 9), "both", (1e-2, 1e-2),
    )  # fmt: skip
    plain = model_of(study, (), None)
    assert isinstance(plain, SplitAutoencoderConfig)
    assert (plain.routed, plain.l1, plain.correlation) == ("none", (0, 0), 0)
    small = {"code": 8, "hidden": (16,)}
    data = as_batch(generated(40, 0), routed.first)
    others = as_batch(generated(40, 0), FIRST)
    terms = [
        terms_of(plain.model_copy(update=small), made(plain.model_copy(update=small)), batch)
        for batch in (data, others)
    ]
    assert terms[0]["decoder all"].sum.item() == terms[1]["decoder all"].sum.item()
    assert set(terms[0]) == {"decoder all", "top all", "bottom all"}, "plain is one model for all"


def test_distance_is_nought_between_classes_of_one_distribution() -> None:
    alike = np.random.default_rng(0).integers(0, 255, (400, 4, 4), dtype=np.uint8)
    labels = np.arange(400) % 3
    alike[labels == 2] //= 4
    drawn = Images("made", alike, labels, np.arange(400), ("a", "b", "c"))
    away = distances(drawn)
    assert abs(away[0]) < 0.05
    assert away[0] == away[1]
    assert away[2] > 1


def split_model(first: float, second: float, *, score: str = "decoder") -> SplitModel:
    """Return a model whose two groups have two images each, one better and one worse."""
    scores = {
        (score, "first"): {"0": first - 0.1, "1": first + 0.1},
        (score, "second"): {"2": second - 0.1, "3": second + 0.1},
    }
    return SplitModel(scores, "", 0, "")


def test_a_class_that_nothing_splits_is_the_dearest() -> None:
    study = ClassImbalance(seeds=(1, 2, 3), classes=(0, 1, 2, 3, 4), halves=((0, 1, 2, 3, 4),))
    models = {"0": {1: split_model(0.5, 0.9)}, "plain": {1: split_model(0.4, 0.2)}}
    assert taxes_of(models, "0") == pytest.approx([0.1])
    names = list(groups_of(study))
    taxes = {name: [0.01 * i, 0.01 * i, 0.01 * i + 0.001] for i, name in enumerate(names)}
    least = {name: Least(0.0, name != "0") for name in names}
    by_class = ranked(study, least, taxes)
    assert max(by_class, key=lambda c: by_class[c]) == 0
    few = fewer(study, least, taxes)
    assert few is not None
    assert few.value == pytest.approx(0.025 - 0.05)
    away = {c: -tax for c, tax in by_class.items()}
    decision, rho = decide_imbalance(study, few, by_class, away)
    assert rho.value == -1
    assert decision.text.startswith("one class costs less than five")
    assert [contrast.error for contrast in decision.contrasts] == [0.025, 0.025]
    assert decision.contrasts[1].value.low <= rho.low
    assert fewer(study, {name: Least(0.0, len(name) > 1) for name in names}, taxes) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"l1_tried": (2.0, 1.0)}, "least first"),
        ({"tuned_on": ()}, "name a seed"),
        ({"classes": (3,)}, "at least two"),
        ({"classes": (3, 11)}, "numbered 0 to 9"),
        ({"halves": (tuple(range(10)),)}, "at least one class to stay"),
    ],
)
def test_what_cannot_be_routed_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ClassImbalance(**change)
