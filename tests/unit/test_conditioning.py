"""The informed attacker: scales put back without a change, and what resists is trained so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.families import FEW, MORE, save_family

from excise.auditor.attacks import Quantize, Relearn
from excise.auditor.base import AttackResult, Results, Subject
from excise.auditor.budget import SMOKE
from excise.auditor.conditioning import ScaledPair, rates_by_tensor, rebalance
from excise.auditor.controls import ShortFineTuning
from excise.auditor.controls.control import make_control
from excise.auditor.engine import attack_all
from excise.auditor.results import decided
from excise.auditor.tuning import Training, TrainingResult
from excise.auditor.verdict import case_of, judge_all
from excise.core.context import Context
from excise.core.stages import LAYOUT, Runtime
from excise.data.domain import Domain
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import FAMILIES, tiny_model
from excise.train.pool import Processes

BY = 2.0**13
"""About 1e4, in a form that rounds nothing."""
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MORE]


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def lively(model: Any) -> Any:
    """Make a random model one whose every part matters to what it says."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
            elif "norm" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def scale_all(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale every pair that allows it by 1e4 and 1e-4, a third of the channels the other way."""

    def factors(pair: ScaledPair) -> torch.Tensor:
        at = torch.arange(len(pair.sizes()[0]))
        other = 1.0 if pair.gain else BY  # gains of all sizes would be folded as one
        return torch.where(at % 3 == 0, 1 / BY, other)

    with monkeypatch.context() as patch:
        patch.setattr(ScaledPair, "factors", factors)
        rebalance(model)


@pytest.mark.parametrize("family", [*FAMILIES, *FEW, *SLOW])
def test_scales_are_put_back_in_every_family(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family) if family in FAMILIES else save_family(family, tmp_path / "m")[1]
    known = logits(lively(model))
    slack = 3e-4 * float(known.abs().max())
    rebalance(model)
    torch.testing.assert_close(logits(model), known, atol=slack, rtol=0)
    scale_all(model, monkeypatch)
    torch.testing.assert_close(logits(model), known, atol=slack, rtol=0)
    facts = rebalance(model)
    torch.testing.assert_close(logits(model), known, atol=slack, rtol=0)
    assert facts["largest_factor"] >= BY / 8
    assert facts["rescaled"] > 5
    # What is left asks for a factor of two at most, so no pair lies further apart than 2^3.
    assert rebalance(model)["largest_factor"] <= 2


def scaled(source: Checkpoint, to: Path) -> Checkpoint:
    """Return a model that says the same, every pair of it scaled by 1e4 and 1e-4."""
    model = source.load()
    up_down = torch.full((model.config.intermediate_size,), BY)
    up_down[1::2] = 1 / BY
    values = torch.full((model.config.head_dim,), BY)  # one head of values for three of queries
    values[1::2] = 1 / BY
    gains = torch.ones(model.config.hidden_size)
    gains[::3] = 1 / BY
    known = logits(model)
    with torch.no_grad():
        for block in model.model.layers:
            mlp, attention = block.mlp, block.self_attn
            mlp.up_proj.weight.mul_(up_down[:, None])
            mlp.down_proj.weight.div_(up_down)
            attention.v_proj.weight.mul_(values[:, None])
            attention.o_proj.weight.div_(values.repeat(3))
            attention.q_proj.weight.mul_(BY)
            attention.k_proj.weight.div_(BY)
            block.input_layernorm.weight.mul_(gains)
            block.post_attention_layernorm.weight.mul_(gains)
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj,
                          mlp.gate_proj, mlp.up_proj):  # fmt: skip
                layer.weight.div_(gains)
    assert torch.equal(logits(model), known)
    return save_model(model, source.tokenizer(), to)


def test_scales_are_put_back_by_hand(tmp_path: Path, knowing: Checkpoint) -> None:
    model = scaled(knowing, tmp_path / "scaled").load()
    known = logits(model)
    rebalance(model.requires_grad_(False))
    assert torch.equal(logits(model), known)
    for block, old in zip(
        model.model.layers, knowing.load().requires_grad_(False).model.layers, strict=True
    ):
        up, down = block.mlp.up_proj.weight, block.mlp.down_proj.weight
        ratio = up.square().mean(1).sqrt() / down.square().mean(0).sqrt()
        assert 0.1 < float(ratio.min()) <= float(ratio.max()) < 10
        q, k = (layer.weight.square().mean().sqrt() for layer in
                (block.self_attn.q_proj, block.self_attn.k_proj))  # fmt: skip
        assert 0.1 < float(q / k) < 10
        gain = block.input_layernorm.weight
        assert 0.1 < float(gain.min()) <= float(gain.max()) < 10
        assert gain.sign().equal(old.input_layernorm.weight.sign())
        # Nothing is linear in the gate: its rows keep their scale, its columns take the gain's.
        rows = block.mlp.gate_proj.weight * block.post_attention_layernorm.weight
        torch.testing.assert_close(
            rows, old.mlp.gate_proj.weight * old.post_attention_layernorm.weight, rtol=1e-6, atol=0
        )


def test_what_an_activation_lies_between_and_dead_gains_are_left_alone() -> None:
    model = lively(tiny_model("gpt2"))
    block = model.transformer.h[0]
    with torch.no_grad():
        block.mlp.c_fc.weight.mul_(100)
        block.ln_2.weight[3] = 0.0
    known, down = logits(model), block.mlp.c_proj.weight.detach().clone()
    column = block.mlp.c_fc.weight[3].detach().clone()
    rebalance(model)
    assert torch.equal(logits(model), known)
    assert torch.equal(block.mlp.c_proj.weight, down)
    assert block.ln_2.weight[3] == 0
    assert torch.equal(block.mlp.c_fc.weight[3], column)


def test_a_model_without_numbers_is_left_alone() -> None:
    model = tiny_model("llama", width=32)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    assert rebalance(model) == {"rescaled": 0, "largest_factor": 1.0}


def test_matrices_get_rates_by_their_scale_and_vectors_the_rate() -> None:
    layers = [torch.nn.Linear(4, 4) for _ in range(4)]
    model = torch.nn.Sequential(*layers)
    with torch.no_grad():
        for layer, scale in zip(layers, (1.0, 1.0, 1e4, 0.0), strict=True):
            layer.weight.fill_(scale)
    rates = rates_by_tensor(model, 0.5)
    assert [rates[f"{i}.weight"] for i in range(4)] == [0.5, 0.5, 5e3, 0.5]
    assert {rates[f"{i}.bias"] for i in range(4)} == {0.5}


def trained(
    lost: float = 0.0, t: Sequence[float] = (), reason: str = "", **part: Any
) -> TrainingResult:
    extras = {"retain_lost": lost, "retain_lost_most": lost, "prequential": list(t)}
    one = Training(**{"kind": "full", "lr": 1e-3, "seed": 0, **part})
    return TrainingResult(one, (), {}, "exact_match", extras, reason=reason)


FLAT, FALLING = (4.0,) * 16, tuple(4.0 - 0.2 * i for i in range(16))


def test_only_what_resists_every_training_is_trained_further() -> None:
    attack = Relearn()
    broke, whole, flat = trained(0.9, FALLING), trained(0.1, FALLING), trained(0.0, FLAT)
    assert not attack.further([broke, whole, flat])
    assert not attack.further([trained(0.0, FLAT[:2])])  # too short to teach anybody
    assert not attack.further([trained(0.0, [0.05] * 16)])  # knows it before
    assert not attack.further([trained(0.9, FALLING, on="fresh")])
    further = attack.further([broke, flat, trained(0.9, FALLING, on="fresh")])
    assert [str(one) for one in further] == [
        *["rebalanced, relearn full 0.001"] * 2,
        *["rebalanced, relearn lora 0.01"] * 2,
        *["rebalanced, rates by tensor, relearn full 0.001"] * 2,
    ]
    assert attack.further([trained(reason="diverged"), trained(0.9, kind="lora", lr=0.5)])[1] == (
        Training("lora", 0.5, 0, informed="rebalanced")
    )
    # A change of weights breaks a model by itself: what counts is whether it was repaired.
    repaired = trained(0.1, start="norms", on="benign")
    repaired.extras["retain_lost_most"] = 1.0
    assert not attack.further([repaired])


BUDGET = SMOKE.model_copy(
    update={"attacks": ("quantize", "benign", "relearn", "transfer"), "rates": (3e-4, 1e-3)}
)


@pytest.fixture(scope="module")
def audited(
    tmp_path_factory: pytest.TempPathFactory,
    facts_domain: Domain,
    knowing: Checkpoint,
    never_taught: Checkpoint,
) -> tuple[Path, Results]:
    root = tmp_path_factory.mktemp("informed")
    hiding = make_control(
        ShortFineTuning(), knowing, facts_domain, SMOKE, Context(root), root / "hiding"
    ).checkpoint
    assert hiding is not None
    models = {"plain": hiding, "scaled": scaled(hiding, root / "scaled")}
    models |= {"original": knowing, "oracle-0": never_taught}
    subjects = [Subject(name, model, knowing) for name, model in models.items()]
    with Processes(1) as pool:
        runtime = Runtime(root / "stages")
        return root, attack_all(subjects, facts_domain, BUDGET, 0, runtime, pool)


def test_trainings_that_undo_their_controls_keep_their_length(
    audited: tuple[Path, Results],
) -> None:
    trained = [r for (attack, _), r in audited[1].items() if attack != "quantize"]
    assert {v.entry.facts["steps"] for result in trained for v in result.variants} == {BUDGET.steps}
    assert BUDGET.doublings


def names(result: AttackResult, chosen: bool = False) -> set[str]:
    at = result.chosen if chosen else range(len(result.variants))
    return {result.variants[i].entry.variant for i in at}


def test_models_that_stand_training_cost_no_further_one(audited: tuple[Path, Results]) -> None:
    root, results = audited
    for (_, subject), result in results.items():
        if subject != "scaled":
            assert not any(name.startswith("rebalanced") for name in names(result))
    parts = [
        json.loads(path.read_text())["part"]
        for path in (root / "stages" / LAYOUT).glob("attack-*/trained.json")
    ]
    informed = [part for part in parts if part["informed"]]
    assert len(informed) == 2 * 6  # benign and relearn: three moves at two rates
    assert len(results["transfer", "scaled"].variants) == 2 + 6


def test_a_scaled_model_is_attacked_as_the_same_model_unscaled(
    audited: tuple[Path, Results], facts_domain: Domain
) -> None:
    _, results = audited
    for attack in BUDGET.attacks:
        ours, plain = results[attack, "scaled"], results[attack, "plain"]
        first = {v.entry.variant: v for v in ours.variants}[min(names(plain))]
        assert first.entry.facts["broke"]
        assert ours.variants[0].unit_scores[0] == plain.variants[0].unit_scores[0]
        if ours.chosen:
            assert all(name.startswith("rebalanced") for name in names(ours, chosen=True))
    _, verdicts = judge_all(["plain", "scaled"], results, facts_domain, BUDGET)
    plain_levels, levels = ({r.level: r for r in verdict.levels} for verdict in verdicts)
    for level in ("D0", "D3", "D4"):
        assert levels[level].status == plain_levels[level].status
    assert plain_levels["D4"].status == "fail"
    assert levels["D4"].gap == pytest.approx(plain_levels["D4"].gap, abs=0.15)


def test_without_the_informed_attacker_the_same_attack_is_invalid(
    audited: tuple[Path, Results], facts_domain: Domain
) -> None:
    results = dict(audited[1])
    for attack in ("quantize", "transfer"):
        one = results[attack, "scaled"]
        old = [v for v in one.variants if not v.entry.variant.startswith("rebalanced")]
        variants, chosen = decided(old, higher=True)
        results[attack, "scaled"] = replace(one, variants=variants, chosen=chosen)
    case = case_of("scaled", results, facts_domain, BUDGET)
    assert "the model broke and was not attacked" in case.invalid["quantize"]
    assert "the model broke and was not attacked" in case.invalid["transfer"]
    assert not case_of("scaled", audited[1], facts_domain, BUDGET).invalid


def test_what_breaks_all_the_same_says_what_was_tried(
    audited: tuple[Path, Results], facts_domain: Domain
) -> None:
    results = dict(audited[1])
    one = results["transfer", "scaled"]
    at = next(i for i, v in enumerate(one.variants) if v.entry.variant == "full")
    results["transfer", "scaled"] = replace(one, chosen=(at,))
    found = case_of("scaled", results, facts_domain, BUDGET).invalid["transfer"]
    assert found.endswith(
        "was not attacked, nor with its scales put back, rates by tensor and an adapter beside "
        "frozen weights"
    )


def test_a_grid_that_breaks_a_scaled_model_is_tried_on_rebalanced_weights(
    audited: tuple[Path, Results], knowing: Checkpoint, facts_domain: Domain, tmp_path: Path
) -> None:
    subject = Subject("candidate", scaled(knowing, tmp_path / "scaled"), knowing)
    result = Quantize().run(subject, facts_domain, SMOKE, Context(tmp_path))
    ends = {v.entry.variant: v.entry.curve[-1] for v in result.variants}
    assert list(ends) == ["int8", "rebalanced, int8", "int4", "rebalanced, int4"]
    for grid in ("int8", "int4"):
        assert ends[grid].score < 0.3
        assert ends[f"rebalanced, {grid}"].score > 0.9
    assert names(result, chosen=True) <= {"rebalanced, int8", "rebalanced, int4"}
