"""Fixtures for all tests: a domain of made-up facts, a model that knows them, one that does not.

Tests run with the network blocked, on one thread, offline, with a cache of their own.
"""

from __future__ import annotations

import gc
import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from excise.data.domain import Domain
from excise.models.checkpoint import Checkpoint
from tests.fixtures.facts import make_domain

FIXTURES = Path(__file__).parent / "fixtures"

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What tests and the processes they start run under."""


class NetworkUsed(RuntimeError):
    """A test tried to reach another machine."""


def pytest_configure() -> None:
    """Go offline before anything reads the environment."""
    os.environ.update(OFFLINE)
    # Who starts us in the background has us ignore Ctrl-C, and so would what tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def what_earlier_files_left_is_not_walked_again() -> None:
    """Take what is alive out of the reach of the collections that every job of a pool asks for.

    Late in a run they would walk what five thousand tests left behind, for a second each.
    """
    gc.collect()
    gc.freeze()


def is_local(family: int, address: Any) -> bool:
    """Return whether an address is on this machine."""
    if family == socket.AF_UNIX:
        return True
    host = address[0] if isinstance(address, tuple) and address else address
    if host in ("localhost", "", None):
        return True
    try:
        return ipaddress.ip_address(str(host).split("%")[0]).is_loopback
    except ValueError:
        return False


def _guard(name: str) -> Callable[..., Any]:
    """Return a method of sockets that refuses other machines."""
    real = getattr(socket.socket, name)

    def guarded(self: socket.socket, *args: Any) -> Any:
        if not is_local(self.family, args[-1]):
            raise NetworkUsed(f"a test called {name} with {args[-1]}; tests run without network")
        return real(self, *args)

    return guarded


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Let sockets of this process reach this machine alone, and look up no other."""
    lookup = socket.getaddrinfo

    def guarded(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_local(socket.AF_INET, (host.decode() if isinstance(host, bytes) else host,)):
            raise NetworkUsed(f"a test looked up {host}; tests run without network")
        return lookup(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, _guard(name))
        patch.setattr(socket, "getaddrinfo", guarded)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what tests fetch or convert out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXCISE_CACHE", str(folder))
        yield folder


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
