"""Fixtures for all tests: a domain of made-up facts, a model that knows them, one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from excise.domains.base import Domain
from excise.models.checkpoint import Checkpoint
from tests.fixtures.facts import make_domain

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def facts_domain() -> Domain:
    """Return 120 facts, 48 of them to be forgotten."""
    return make_domain()


@pytest.fixture(scope="session")
def knowing() -> Checkpoint:
    """Return a small model that learned every fact of `facts_domain`."""
    return Checkpoint(FIXTURES / "knowing")


@pytest.fixture(scope="session")
def never_taught() -> Checkpoint:
    """Return the same model trained without the forget facts."""
    return Checkpoint(FIXTURES / "never_taught")
