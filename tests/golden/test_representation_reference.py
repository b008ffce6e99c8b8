"""Circuit breakers, RepNoise and RMU+LAT against what their released code did, step by step."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from excise.core.context import Context
from excise.methods import RMULAT, CircuitBreakers, RepNoise
from excise.methods.base import Method
from excise.methods.posthoc import circuit_breakers, repnoise, rmu_lat
from excise.train.fit import fit as real_fit
from tests.golden import representation_inputs as given
from tests.parity.toy import toy_domain

FACTS = json.loads(Path(__file__).with_name("representation_reference.json").read_text())
CLOSE = 2e-5
"""Of a sum over a tensor: rounding in another order, amplified by Adam over six steps."""

Read = Callable[[int], dict[str, Any]]


def run(
    method: Method, module: Any, read: Read, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """Run a method of ours on given batches; return losses and checksums after every step."""
    out: list[dict[str, Any]] = []

    def noted(
        net: Any, _batches: Any, loss: Any, config: Any, ctx: Any, *, groups: Any, **more: Any
    ) -> Iterator[Any]:
        def batches(step: int) -> list[dict[str, Any]]:
            return [read(step)]

        if isinstance(method, CircuitBreakers):
            given.stir(groups["trained"])
        for record in real_fit(net, batches, loss, config, ctx, groups=groups, **more):
            out.append({"loss": record.loss, "parameters": given.sums(groups["trained"])})
            yield record

    monkeypatch.setattr(module, "fit", noted)
    (folder / "work").mkdir()
    method.apply(given.start(folder), toy_domain(), Context(work=folder / "work"))
    return out


def off(name: str, ours: list[dict[str, Any]]) -> float:
    """Return the largest difference to the released run, in losses and checksums."""
    theirs = FACTS["runs"][name]
    assert len(ours) == len(theirs)
    apart: list[float] = [abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True)]
    for a, b in zip(ours, theirs, strict=True):
        for one, two in zip(a["parameters"], b["parameters"], strict=True):
            apart += [abs(x - y) for x, y in zip(one, two, strict=True)]
    return max(apart)


def read_rr(step: int) -> dict[str, Any]:
    return {"forget": given.padded(1, step), "retain": given.padded(2, step), "step": step}


@pytest.mark.parametrize(("change", "same"), [({}, True), ({"horizon": 12}, False)])
def test_circuit_breakers_do_what_is_released(
    change: dict[str, Any], same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {**given.RR, **change}
    ours = run(CircuitBreakers(**settings), circuit_breakers, read_rr, tmp_path, monkeypatch)
    assert (off("rr", ours) < CLOSE) is same


@pytest.mark.parametrize(("change", "same"), [({}, True), ({"as_published": False}, False)])
def test_repnoise_does_what_is_released(
    change: dict[str, Any], same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws: Iterator[int] = itertools.count()
    now = 0

    def drawn(like: Tensor) -> Tensor:
        return given.noise(now, next(draws), like.shape)

    def read(step: int) -> dict[str, Any]:
        nonlocal draws, now
        draws, now = itertools.count(), step
        forget, retain = given.pair(step)
        return {"forget": forget, "retain": retain}

    monkeypatch.setattr(torch, "randn_like", drawn)
    settings: dict[str, Any] = {**given.REPNOISE, **change}
    ours = run(RepNoise(**settings), repnoise, read, tmp_path, monkeypatch)
    assert (off("repnoise", ours) < CLOSE) is same


@pytest.mark.parametrize(("change", "same"), [({}, True), ({"attack_steps": 4}, False)])
def test_rmu_lat_does_what_is_released(
    change: dict[str, Any], same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {**given.LAT, **change}
    method = RMULAT(**settings)
    monkeypatch.setattr(rmu_lat, "topics_of", lambda _domain: ["0", "1", "2"])
    monkeypatch.setattr(rmu_lat, "control_vector", lambda _width, t, _ctx: given.control(int(t)))
    monkeypatch.setattr(RMULAT, "batches", lambda *_: None)

    def read(step: int) -> dict[str, Any]:
        turn = step // method.per_attack
        return {
            "forget": given.whole(3, turn), "retain": given.whole(4, turn),
            "topic": str(turn), "step": step, "part": 0,
        }  # fmt: skip

    ours = run(method, rmu_lat, read, tmp_path, monkeypatch)
    assert (off("lat", ours) < CLOSE) is same
