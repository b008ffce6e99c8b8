"""What attacks on weights do to them, by hand, and that odd models do not stop them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.families import FEW, MORE, save_family

from excise.auditor.attacks import ATTACKS, Noise, Reinit, ShrinkPerturb
from excise.auditor.attacks.drop_adapter import drop_low_rank, leading_part
from excise.auditor.attacks.noise import add_noise
from excise.auditor.attacks.reinit import Part, names_of, reinitialise
from excise.auditor.attacks.shrink_perturb import shrink_and_perturb
from excise.auditor.base import Subject
from excise.auditor.budget import SMOKE, STANDARD, STRONG
from excise.auditor.tuning import Training
from excise.core.context import Context
from excise.data.domain import Domain
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import byte_tokenizer, tiny_model
from excise.testing import toy_domain

EDITS = ("prune", "quantize", "noise", "shrink_perturb", "reinit")
EACH = [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
FEWEST = SMOKE.model_copy(
    update={
        "steps": 1, "checkpoints": (0, 1), "rates": (1e-3,), "max_test_rows": 2,
        "max_other_rows": 2, "formats": STANDARD.formats,
    }
)  # fmt: skip


def rms(value: torch.Tensor) -> float:
    return float(value.detach().square().mean().sqrt())


def test_noise_has_the_strength_that_was_asked_for_in_every_tensor(tmp_path: Path) -> None:
    model, before = (tiny_model("llama", width=96) for _ in range(2))
    facts = add_noise(model, Context(tmp_path), strength=0.1)
    size = 0
    for name, parameter in before.named_parameters():
        noise = model.get_parameter(name) - parameter
        count, scale = parameter.numel(), rms(parameter)
        size += count
        # Relative error of a standard deviation over n values: 1 / sqrt(2 n), five of them.
        assert rms(noise) == pytest.approx(0.1 * scale, rel=5 / (2 * count) ** 0.5)
        assert abs(float(noise.detach().mean())) < 5 * 0.1 * scale / count**0.5
    assert facts == {"strength": 0.1, "weights": size}


def test_noise_follows_the_seed(tmp_path: Path) -> None:
    states = []
    for seed in (0, 0, 1):
        model = tiny_model("llama", width=32)
        add_noise(model, Context(tmp_path, seed=seed), strength=0.1)
        states.append(model.model.norm.weight.detach())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_shrink_and_perturb_by_hand(tmp_path: Path) -> None:
    """A matrix keeps 0.7 of itself plus noise within 0.3 * 0.1 * sqrt(6 / (in + out))."""
    model, before = (tiny_model("llama", width=32) for _ in range(2))
    with torch.no_grad():
        for each in (model, before):
            each.model.norm.weight.fill_(3.0)
    shrink_and_perturb(model, Context(tmp_path), alpha=0.3, beta=0.1)
    assert model.model.norm.weight.tolist() == pytest.approx([0.7 * 3 + 0.3 * 1] * 32)
    old, new = (m.model.layers[0].mlp.up_proj.weight for m in (before, model))
    noise = new - 0.7 * old
    bound = 0.3 * 0.1 * (6 / sum(old.shape)) ** 0.5
    assert 0.95 * bound < float(noise.detach().abs().max()) <= bound * 1.0001


@pytest.mark.parametrize("part", Reinit().parts)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_one_part_is_initialised_and_the_rest_is_left_alone(
    family: str, part: Part, tmp_path: Path
) -> None:
    model, before = (tiny_model(family, width=32) for _ in range(2))
    with torch.no_grad():
        for each in (model, before):
            for parameter in each.parameters():
                parameter.fill_(7.0)
    facts = reinitialise(model, Context(tmp_path), part=part)
    names = names_of(model, part)
    assert facts["weights"] == sum(before.get_parameter(n).numel() for n in names)
    for name, old in before.named_parameters():
        new = model.get_parameter(name)
        assert torch.equal(new, old) == (name not in names)
        if name in names and new.dim() > 1 and new.numel() > 1000:
            assert rms(new) == pytest.approx(model.config.initializer_range, rel=0.1)
        elif name in names and new.dim() == 1:
            assert set(new.tolist()) == {0.0 if name.endswith("bias") else 1.0}


def test_which_parameters_are_a_part() -> None:
    model = tiny_model("gpt2", width=32)
    last = len(model.transformer.h) - 1
    assert {n.partition(".h.0.")[2] for n in names_of(model, "attention") if ".h.0." in n} == {
        "attn.c_attn.weight", "attn.c_proj.weight",
    }  # fmt: skip
    assert {n.partition(".h.0.")[2] for n in names_of(model, "mlp") if ".h.0." in n} == {
        "mlp.c_fc.weight", "mlp.c_proj.weight",
    }  # fmt: skip
    assert set(names_of(model, "norms")) == {n for n, _ in model.named_parameters() if ".ln_" in n}
    assert {n.partition(".h.")[2].partition(".")[0] for n in names_of(model, "last_block")} == {
        str(last)
    }


def test_a_head_that_is_the_embedding_is_left_alone_and_counted_as_nothing(tmp_path: Path) -> None:
    tied = tiny_model("gpt2", width=32)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    before = tied.lm_head.weight.detach().clone()
    assert reinitialise(tied, Context(tmp_path), part="head") == {"weights": 0}
    assert torch.equal(tied.lm_head.weight, before)
    assert names_of(tiny_model("llama", width=32), "head") == ("lm_head.weight",)


def test_a_repair_is_one_short_training_for_every_change_and_seed() -> None:
    trainings = Noise(strengths=(0.1, 0.4), repair_steps=20).trainings(STANDARD)
    assert trainings == tuple(
        Training("full", 1e-3, seed, "benign", start, 20)
        for start in ("noise 0.1", "noise 0.4")
        for seed in (0, 1, 2)
    )
    cut = trainings[0].within(STANDARD)
    assert (cut.steps, cut.checkpoints) == (20, (0, 1, 2, 4, 8, 16))
    assert trainings[0].within(SMOKE).steps == SMOKE.steps
    assert str(trainings[4]) == "noise 0.4, benign full 0.001 seed 1"
    plain = Training("full", 1e-3, 0, "benign")
    assert plain.within(STANDARD) == STANDARD


def test_a_repair_is_scored_before_and_after_its_change(
    facts_domain: Domain, knowing: Checkpoint, tmp_path: Path
) -> None:
    attack = ShrinkPerturb(alphas=(0.99,), repair_steps=2)
    result = attack.run(Subject("o", knowing), facts_domain, SMOKE, Context(tmp_path))
    variant, *informed = result.variants  # which two steps do not repair, so that more is tried
    assert [one.entry.variant for one in informed] == [
        "rebalanced, alpha 0.99", "rebalanced, rates by tensor, alpha 0.99",
    ]  # fmt: skip
    curve = variant.entry.curve
    assert (variant.entry.variant, variant.entry.trained_on) == ("alpha 0.99", "benign")
    assert [point.examples for point in curve] == [0, 0, 32, 64]
    assert [point.tokens > 0 for point in curve] == [False, False, True, True]
    assert curve[0].score > 0.95
    assert curve[1].score < 0.2
    assert variant.entry.facts["alpha"] == 0.99


def test_the_leading_part_is_that_of_a_singular_value_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix_RC = torch.randn(3, 40, 30, generator=generator)
    u, s, vh = torch.linalg.svd(matrix_RC)
    s *= 0.7 ** torch.arange(30)
    matrix_RC = (u[..., :30] * s[:, None]) @ vh
    for rank in (1, 4):
        exact = (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank]
        assert torch.allclose(leading_part(matrix_RC, rank, generator), exact, atol=1e-3)
    assert torch.allclose(leading_part(matrix_RC, 100, generator), matrix_RC, atol=1e-4)


def test_half_of_an_edit_of_rank_two_goes_with_one_direction(tmp_path: Path) -> None:
    before, after = (tiny_model("gpt2", width=32) for _ in range(2))
    original = save_model(before, byte_tokenizer(), tmp_path / "original")
    path = "transformer.h.0.mlp.c_fc.weight"
    with torch.no_grad():
        edited = after.get_parameter(path)
        edited[0, 0] += 3.0
        edited[1, 1] += 4.0
    facts = drop_low_rank(after, original=original, rank=1, ctx=Context(tmp_path))
    assert facts == {"weights": edited.numel(), "share": pytest.approx(16 / 25), "skipped": 0}
    assert torch.allclose((edited - before.get_parameter(path))[:2, :2],
                          torch.tensor([[3.0, 0.0], [0.0, 0.0]]), atol=1e-5)  # fmt: skip


def test_from_standard_on_every_edit_of_weights_is_required_and_at_smoke_the_cheap_ones() -> None:
    for budget in (STANDARD, STRONG):
        assert set(EDITS) <= set(budget.attacks)
        assert budget.formats == ("int8", "int4", "int3", "nf4")
    assert set(EDITS) & set(SMOKE.attacks) == {"quantize"}
    assert SMOKE.formats == ("int8", "int4")
    assert all(ATTACKS[name].level == "D3" and ATTACKS[name].controls for name in EDITS)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("name", EACH)
def test_no_family_stops_an_edit_of_weights(name: str, tmp_path: Path) -> None:
    checkpoint, model = save_family(name, tmp_path / "model")
    subject = Subject("candidate", checkpoint, checkpoint)
    for edit in (*EDITS, "drop_adapter"):
        attack = ATTACKS[edit]()
        if edit == "prune":
            attack = attack.model_copy(update={"shares": (0.5,), "top_shares": (0.1,)})
        result = attack.run(subject, toy_domain(), FEWEST, Context(tmp_path))
        for variant in result.variants:
            assert variant.entry.status == "ok", (edit, variant.entry)
            assert variant.entry.facts["weights"] >= 0
    assert all(
        torch.equal(p, model.get_parameter(n)) for n, p in checkpoint.load().named_parameters()
    )
