"""Model FLOPs utilisation: counted as by hand, and nothing of a training moves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from excise.core.context import Context
from excise.data.stream import Batch
from excise.losses import nll
from excise.models.tiny import tiny_model
from excise.train import fit as fitting
from excise.train.fit import FitConfig, Term, fit
from excise.train.utilisation import Utilisation, peak_flops, utilisation_on

PEAK = 1e9
VOCAB, WIDTH, INNER = 30, 8, 12


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("cpu", None),
    ],
)
def test_a_peak_is_that_of_the_device_and_no_other(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def batch(rows: int, length: int, seed: int) -> Batch:
    ids_BT = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    units = tuple(map(str, range(rows)))
    return Batch(ids_BT, real_BT, real_BT, torch.zeros_like(ids_BT), units)


class Layers(nn.Module):
    """Two matrices behind a table of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.up, self.head = nn.Linear(WIDTH, INNER), nn.Linear(INNER, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.up(self.table(input_ids)).relu())
        return out


def told(
    model: nn.Module,
    batches: list[Batch],
    peak: float | None,
    monkeypatch: pytest.MonkeyPatch,
    **settings: Any,
) -> list[Mapping[str, Any]]:
    monkeypatch.setattr(fitting, "utilisation_on", lambda device, dtype: Utilisation(peak))
    events: list[Mapping[str, Any]] = []
    ctx = Context(Path("unused"), emit=lambda kind, data: events.append(data))

    def loss(model: nn.Module, micro: Batch) -> dict[str, Term]:
        if isinstance(model, Layers):
            return {"nll": Term(*nll(model(micro.ids_BT), micro))}
        return {"nll": Term(*nll(model(**micro.inputs, use_cache=False).logits, micro))}

    config = FitConfig(steps=len(batches), lr=1e-2, log_every=1, **settings)
    list(fit(model, lambda step: [batches[step]], loss, config, ctx))
    return events


@pytest.mark.parametrize("in_backward", [False, True])
def test_operations_are_those_counted_by_hand(
    in_backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []
    of = Utilisation.of

    def note(self: Utilisation, tokens: float, seconds: float) -> float | None:
        share = of(self, tokens, seconds)
        if share is not None:
            seen.append((share * seconds * PEAK, tokens))
        return share

    monkeypatch.setattr(Utilisation, "of", note)
    batches = [batch(2, 7, 0), batch(2, 7, 1), batch(3, 5, 2)]
    events = told(Layers(), batches, PEAK, monkeypatch, in_backward=in_backward)
    # 2 forward, 2 for the matrix, 2 for what stands before it, of which a table needs none.
    each = 6 * WIDTH * INNER + 6 * INNER * VOCAB
    assert [(round(ops), tokens) for ops, tokens in seen] == [(each * 14, 14), (each * 15, 15)]
    assert "model_flops_utilisation" not in events[0]
    assert all(event["model_flops_utilisation"] > 0 for event in events[1:])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_counting_moves_no_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    for peak in (None, PEAK):
        model = tiny_model(family, seed=0, vocab=VOCAB, width=32, blocks=2)
        events = told(model, [batch(2, 7, s) for s in range(3)], peak, monkeypatch)
        assert ("model_flops_utilisation" in events[-1]) == (peak is not None)
        trained.append(model.state_dict())
    for name, tensor in trained[0].items():
        assert torch.equal(tensor, trained[1][name]), name


def test_nothing_is_said_where_the_peak_is_not_known() -> None:
    meter = utilisation_on("cpu", torch.bfloat16)
    with meter.watch():
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert meter.of(4, 1.0) is None
    assert meter.of(4, 1.0) is None


def test_pictures_are_watched_once_and_nothing_is_said_of_them() -> None:
    meter = Utilisation(PEAK)
    for _ in range(2):
        with meter.watch():
            torch.ones(2, 2) @ torch.ones(2, 2)
        assert meter.of(0, 1.0) is None
    assert meter.peak is None
