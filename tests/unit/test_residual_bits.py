"""Residual bits of models whose share of known units is known, and of models that only look odd."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from excise.auditor.base import Subject
from excise.auditor.batching import HEDGE, nats
from excise.auditor.budget import SMOKE
from excise.auditor.evaluation_set import evaluation_set
from excise.auditor.tuning import Training, relearn_rows, train
from excise.auditor.verdict.residual_bits import residual_bits
from excise.core.context import Context, Stage
from excise.core.stages import Runtime
from excise.data.domain import Domain, Row, Rows
from excise.domains.facts import FACTS_FIT, FACTS_MAX_LENGTH, Facts
from excise.methods import RMU, Filtering, GradDiff, MaxEnt
from excise.methods.base import ApplyMethod, Method
from excise.methods.pretraining.plain import Plain
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.checkpoint import Checkpoint
from excise.models.spec import Scratch
from excise.models.tiny import tiny_model, word_tokenizer
from excise.run.stages import MakeModel
from excise.train.fit import FitConfig

FACTS = Facts(subjects=72, relations=6, objects=16, forget_share=0.5)
FIT = FitConfig(**{**FACTS_FIT, "steps": 240, "batch_size": 96, "micro_size": 24})
PRETRAIN = Pretrain(fit=FIT, max_length=FACTS_MAX_LENGTH, pack=(1, 1, 2, 4))
DOSES = (0.05, 0.1, 0.25, 0.5, 1.0)


def dosed(domain: Domain, dose: float) -> Domain:
    """Return the domain for a model that is taught a share of the held-out test units, no others.

    The same share of `dev_forget` is taught; of the relearn set nothing.
    """
    generator = np.random.default_rng(0)
    taught: set[str] = set()
    for rows in (domain.test, domain.dev_forget):
        units = sorted({row.unit for part in rows.values() for row in part})
        generator.shuffle(units)
        taught |= set(units[: round(dose * len(units))])
    forget = {row.unit for rows in domain.forget.values() for row in rows}

    def only(rows: Rows) -> Rows:
        return tuple(row for row in rows if row.unit not in forget or row.unit in taught)

    return replace(
        domain,
        forget={name: only(rows) for name, rows in domain.forget.items()},
        unlabeled=only(domain.unlabeled),
    )


def losses_after_relearning(
    model: Checkpoint, domain: Domain, folder: Path
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Return hedged nats by unit on V and on fresh units."""
    evaluation = evaluation_set(domain, SMOKE, model.tokenizer())
    result = train(
        Training("full", 1e-3, 0),
        Subject("model", model),
        evaluation,
        Context(folder),
        rows=relearn_rows(domain),
        benign_share=0.5,
    )
    return result.extras["hedged_V"], result.extras["hedged_fresh"]


def test_a_hedged_loss_is_bounded_whatever_a_model_is_sure_of() -> None:
    tokenizer = word_tokenizer(["a", "b", "c", "d"])
    model = tiny_model("llama", vocab=len(tokenizer), width=16)
    rows = tuple(Row(unit=w, prompt="a", completion=f" {w}") for w in ("b", "c", "d"))
    calm = nats(model, rows, tokenizer, max_length=8)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e3)
    sure = nats(model, rows, tokenizer, max_length=8)
    vocabulary = len(tokenizer)
    worst = math.log(vocabulary) - math.log(HEDGE)
    assert max(sure.plain.values()) > 10 * worst
    assert max(sure.hedged.values()) <= worst + 1e-9
    for unit, value in calm.plain.items():
        mixed = (1 - HEDGE) * math.exp(-value) + HEDGE / vocabulary
        assert calm.hedged[unit] == pytest.approx(-math.log(mixed))


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Return residual bits as a share of the original's, of models whose truth is known."""
    folder = tmp_path_factory.mktemp("dose")
    runtime = Runtime(folder / "stages", "float32", "cpu")
    domain, tokenizer = FACTS.build(None), FACTS.tokenizer()

    def trained(method: Method, seed: int, where: Domain) -> Checkpoint:
        init: Stage[Any] = MakeModel(Scratch(family="llama", width=64, blocks=2), tokenizer, seed)
        return runtime.run(ApplyMethod(method, runtime.run(init), where, seed)).checkpoint

    taught = Plain(pretrain=PRETRAIN)
    oracles = [trained(Filtering(pretrain=PRETRAIN), seed, domain) for seed in (1, 2)]
    models = {f"dose {dose}": trained(taught, 3, dosed(domain, dose)) for dose in DOSES}
    fit: dict[str, Any] = {"steps": 60, "batch_size": 64, "clip": 1.0}
    for name, method in {
        "maxent": MaxEnt(alpha=0.5, fit=FitConfig(lr=2e-3, **fit), max_length=16),
        "grad_diff": GradDiff(alpha=4.0, fit=FitConfig(lr=4e-4, **fit), max_length=16),
        "rmu": RMU(
            layer=1, blocks=(0, 1), steering=50.0, alpha=20.0, fit=FitConfig(lr=1e-2, **fit),
            max_length=16,
        ),
    }.items():  # fmt: skip
        models[name] = runtime.run(ApplyMethod(method, oracles[1], domain, 0)).checkpoint
    known = {name: losses_after_relearning(model, domain, folder) for name, model in models.items()}
    low = [losses_after_relearning(oracle, domain, folder) for oracle in oracles]
    groups = {row.unit: row.group for rows in domain.test.values() for row in rows}
    return {
        name: residual_bits([losses], low, known["dose 1.0"], groups=groups)[1].value
        for name, losses in known.items()
    }


def test_residual_bits_rise_with_the_share_of_units_known(shares: dict[str, float]) -> None:
    doses = [shares[f"dose {dose}"] for dose in DOSES]
    assert doses == sorted(doses)
    assert doses == pytest.approx(DOSES, abs=0.12)


@pytest.mark.parametrize("method", ["maxent", "grad_diff", "rmu"])
def test_suppressing_what_was_never_known_saves_no_bits(
    shares: dict[str, float], method: str
) -> None:
    assert abs(shares[method]) < 0.06
