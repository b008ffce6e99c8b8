"""Tests cannot reach other machines, and run on one thread in a cache of their own."""

from __future__ import annotations

import os
import socket
import urllib.request
from pathlib import Path

import pytest
import torch
from tests.conftest import NetworkUsed


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80), ("example.org", 80)])
def test_no_socket_reaches_another_machine(address: tuple[str, int]) -> None:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as one:
        with pytest.raises(NetworkUsed):
            one.connect(address)
        with pytest.raises(NetworkUsed):
            one.connect_ex(address)
    with pytest.raises(NetworkUsed):
        socket.create_connection(address, timeout=1)
    with (
        socket.socket(family, socket.SOCK_DGRAM) as two,
        pytest.raises(NetworkUsed),
    ):
        two.sendto(b"x", address)


def test_no_name_is_looked_up() -> None:
    with pytest.raises(NetworkUsed):
        urllib.request.urlopen("http://example.org/", timeout=1)


def test_this_machine_can_be_reached(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            assert client.getpeername() == server.getsockname()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))


def test_one_thread_offline_and_a_cache_of_its_own(own_cache: Path) -> None:
    import huggingface_hub.constants as hub

    assert torch.get_num_threads() == 1
    assert hub.HF_HUB_OFFLINE
    assert os.environ["EXCISE_CACHE"] == str(own_cache)
