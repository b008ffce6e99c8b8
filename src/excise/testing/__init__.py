"""Checks for methods and attacks of one's own: plain asserts, to be called from any test runner."""

from __future__ import annotations

from excise.testing.attacks import check_attack
from excise.testing.methods import check_method
from excise.testing.setting import Setting, tiny_setting
from excise.testing.toy import toy_domain, toy_start

__all__ = [
    "Setting",
    "check_attack",
    "check_method",
    "tiny_setting",
    "toy_domain",
    "toy_start",
]
