"""The checks that excise offers to packages."""

from __future__ import annotations

from excise_example.norm_reset import NormReset
from excise_example.task_negation import TaskNegation

from excise.testing import check_attack, check_method


def test_task_negation_keeps_the_contract() -> None:
    check_method(TaskNegation())


def test_norm_reset_has_power_and_invents_nothing() -> None:
    check_attack(NormReset())
