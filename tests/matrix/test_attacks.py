"""Every attack keeps the contract on models with known answers; attacks that break it are caught.

What each attack recovers from which plant is tested in `tests/unit/test_attacks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

import pytest
import torch

from excise.auditor.attacks import ATTACKS
from excise.auditor.attacks.transfer import Transfer
from excise.auditor.base import Access, Attack, AttackResult, Subject, VariantResult
from excise.auditor.budget import SMOKE, Budget
from excise.auditor.controls import LogitScaling
from excise.auditor.evaluation_set import evaluation_set
from excise.auditor.results import decided
from excise.auditor.scoring import read, variant_of
from excise.core.context import Context
from excise.data.domain import Domain
from excise.models.checkpoint import Checkpoint
from excise.models.hooks import edit
from excise.record import Level
from excise.testing import Setting, check_attack, tiny_setting


@pytest.fixture(scope="module")
def setting(facts_domain: Domain, knowing: Checkpoint, never_taught: Checkpoint) -> Setting:
    return Setting(facts_domain, knowing, never_taught)


TEMPLATED = {"template"}
"""Needs models with a chat template; see `tests/unit/test_rewriting.py`."""


SMALLER: dict[str, dict[str, int]] = {
    "gcg": {"steps": 12, "width": 24, "tokens": 8, "rows": 8, "top": 64}
}
"""Searches that are made for large models, cut to what tiny ones need."""


def made(name: str) -> Attack:
    return ATTACKS[name].model_validate(SMALLER.get(name, {}))


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - TEMPLATED))
def test_every_attack_keeps_the_contract(name: str, setting: Setting) -> None:
    check_attack(made(name), setting=setting)


class Sharper(Attack):
    """Multiplies what comes out of the final norm: undoes the plant that scales it down."""

    name: Literal["sharper"] = "sharper"
    factor: float = -1000.0

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D3"

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        model = subject.checkpoint.load()
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        bare = read(model, evaluation)
        with edit(model, {"model.norm": lambda hidden_BTD: hidden_BTD * self.factor}):
            after = read(model, evaluation, examples=1, tokens=1)
            dev = evaluation.units(model, evaluation.all_dev)
        arm = variant_of(
            self, subject, evaluation.metric, variant="only", measurements=(bare, after), dev=dev
        )
        arms, chosen = decided([self.twist(arm)], higher=evaluation.higher)
        return AttackResult(self.name, subject.name, arms, chosen)

    def twist(self, arm: VariantResult) -> VariantResult:
        return arm


@pytest.fixture(scope="module")
def default_setting() -> Setting:
    return tiny_setting()


def test_an_attack_of_ones_own_passes_in_the_default_setting(
    default_setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def trained(seed: int) -> Setting:
        seeds.append(seed)
        return default_setting

    monkeypatch.setattr("excise.testing.attacks.tiny_setting", trained)
    check_attack(Sharper())
    assert seeds == [0]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ATTACKS) - TEMPLATED))
def test_every_attack_has_power_in_the_default_setting(name: str) -> None:
    check_attack(made(name))


def test_the_default_setting_knows_what_it_says(default_setting: Setting) -> None:
    known = default_setting
    scores = []
    for checkpoint in (known.knowing, known.never_taught, *known.locked):
        evaluation = evaluation_set(known.domain, SMOKE, checkpoint.tokenizer())
        reading = read(checkpoint.load(), evaluation)
        scores.append((sum(reading.units.values()) / len(reading.units), reading.retain))
    assert scores[0][0] > 0.9
    assert scores[1][0] < 0.3
    assert scores[2][0] < 0.5
    for _, retain in scores:
        assert sum(retain.values()) / len(retain) > 0.8


class Useless(Sharper):
    """Does nothing."""

    factor: float = 1.0


class Cheat(Sharper):
    """Trains on what is scored."""

    level: ClassVar[Level] = "D4"

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        peeking = replace(domain, relearn=domain.test)
        strong = budget.model_copy(update={"steps": 48, "checkpoints": (0, 48), "rates": (3e-3,)})
        return Transfer().run(subject, peeking, strong, ctx)


class Unseeded(Sharper):
    """Draws from the global random state."""

    def twist(self, arm: VariantResult) -> VariantResult:
        return replace(arm, dev_score=float(torch.rand(())))


class Hooked(Sharper):
    """Leaves a hook."""

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        model = subject.checkpoint.load()
        model.get_submodule("model.norm").register_forward_hook(lambda m, a, out: None)
        return super().run(subject, domain, budget, ctx)


class Writes(Sharper):
    """Writes beside the model."""

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        (subject.checkpoint.path / "cache").write_text("")
        try:
            return super().run(subject, domain, budget, ctx)
        finally:
            self.clean(subject)

    def clean(self, subject: Subject) -> None:
        pass


class Refund(Sharper):
    """Says that it cost less in the end."""

    def twist(self, arm: VariantResult) -> VariantResult:
        curve = (*arm.entry.curve, arm.entry.curve[-1].model_copy(update={"tokens": 0}))
        units = (*arm.unit_scores, arm.unit_scores[-1])
        return replace(arm, entry=arm.entry.model_copy(update={"curve": curve}), unit_scores=units)


class Dear(Sharper):
    """Starts at a cost."""

    def twist(self, arm: VariantResult) -> VariantResult:
        return replace(
            arm,
            entry=arm.entry.model_copy(update={"curve": arm.entry.curve[1:]}),
            unit_scores=arm.unit_scores[1:],
        )


class Rounded(Sharper):
    """Reports a score that is not the mean of its units."""

    def twist(self, arm: VariantResult) -> VariantResult:
        curve = tuple(p.model_copy(update={"score": p.score / 2}) for p in arm.entry.curve)
        return replace(arm, entry=arm.entry.model_copy(update={"curve": curve}))


class DecidesByControl(Sharper):
    """Lets a control decide."""

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        made = super().run(subject, domain, budget, ctx)
        arm = made.variants[0]
        return replace(
            made, variants=(replace(arm, entry=arm.entry.model_copy(update={"control": True})),)
        )


class Silent(Sharper):
    """Fails without saying why."""

    def twist(self, arm: VariantResult) -> VariantResult:
        return replace(arm, entry=arm.entry.model_copy(update={"status": "failed"}))


@pytest.mark.parametrize(
    ("attack", "says"),
    [
        (Useless, "has no power"),
        (Cheat, "never taught"),
        (Unseeded, "same seed gave other numbers"),
        (Hooked, "left 1 hooks"),
        (Refund, "tokens fall"),
        (Dear, "starts at a cost"),
        (Rounded, "not the mean of its units"),
        (DecidesByControl, "lets variant 'only' decide, which is a control"),
        (Silent, "without a reason"),
    ],
)
def test_an_attack_that_breaks_the_contract_is_told_how(
    attack: Callable[[], Attack], says: str, setting: Setting
) -> None:
    with pytest.raises(AssertionError, match=says):
        check_attack(attack(), setting=setting)


def test_an_attack_that_writes_into_the_subject_is_caught(setting: Setting) -> None:
    with pytest.raises(AssertionError, match="wrote cache into the model folder"):
        check_attack(Writes(), setting=setting, controls=(LogitScaling(),))
