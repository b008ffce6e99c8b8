"""SSD and Potion against numbers that their released code gave, recorded by `record_ssd.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from excise.losses import logit_norm
from excise.methods.importance import SortedRatios, Sums, accumulate, dampen_model
from excise.methods.posthoc.potion import Potion, search
from tests.golden import ssd_inputs as given

HERE = Path(__file__).parent
REFERENCE: dict[str, Any] = json.loads((HERE / "ssd_reference.json").read_text(encoding="utf-8"))


def model_of(tied: bool) -> Any:
    """Return the model that the recorded run started from."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**given.CONFIG, tie_word_embeddings=tied)
    config._attn_implementation = "eager"
    model = MistralForCausalLM(config)
    given.fill(model)
    return model.eval()


def logits(model: Any, ids_BT: Tensor) -> Tensor:
    """Return the logits that predict a token, one row each."""
    rows: Tensor = model(input_ids=ids_BT).logits[:, :-1].flatten(0, 1)
    return rows


def cross_entropy(model: Any, ids_BT: Tensor) -> Tensor:
    """Return SSD's loss."""
    return F.cross_entropy(logits(model, ids_BT), ids_BT[:, 1:].flatten())


def length(model: Any, ids_BT: Tensor) -> Tensor:
    """Return XLF's loss."""
    rows = logits(model, ids_BT)
    total, count = logit_norm(rows, torch.ones(len(rows), dtype=torch.bool), squared=False)
    return total / count


def measured(
    model: Any,
    loss: Callable[[Any, Tensor], Tensor],
    fold: Literal["square", "abs"],
    folder: Path,
) -> tuple[Sums, Sums]:
    """Return the sums over forget and over retain rows."""
    folder.mkdir(exist_ok=True)
    forget, retain = (
        accumulate(
            model,
            [given.ids(role, i) for i in range(given.BATCHES[role])],
            loss,
            folder / f"{role}.safetensors",
            fold=fold,
        )
        for role in ("forget", "retain")
    )
    return forget, retain


def assert_sums(named: dict[str, Tensor], recorded: dict[str, float]) -> None:
    """Assert that tensors add up to what was recorded."""
    assert named.keys() == recorded.keys()
    for name, tensor in named.items():
        total = float(tensor.detach().double().sum())
        assert total == pytest.approx(recorded[name], rel=2e-5, abs=2e-5), name


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_ssd_is_the_released_one(kind: str, tmp_path: Path) -> None:
    recorded = REFERENCE["ssd"][kind]
    model = model_of(kind == "tied")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    forget, retain = measured(model, cross_entropy, "square", tmp_path)
    for sums, name in ((forget, "forget"), (forget + retain, "full")):
        for parameter in before:
            value = float(sums.importance(parameter).double().sum())
            assert value == pytest.approx(recorded[name][parameter], rel=1e-5, abs=0)
    tally = dampen_model(model, forget, forget + retain, **given.SSD)
    now = dict(model.named_parameters())
    assert_sums(now, recorded["weights"])
    # A ratio within rounding of alpha may fall on either side of it.
    assert sum(recorded["dampened"].values()) == pytest.approx(tally.dampened, abs=2)
    for name, tensor in now.items():
        moved = int((tensor != before[name]).sum())
        assert moved == pytest.approx(recorded["dampened"][name], abs=1), name


def test_a_wrong_fold_is_not_the_released_ssd(tmp_path: Path) -> None:
    model = model_of(True)
    forget, retain = measured(model, cross_entropy, "abs", tmp_path)
    tally = dampen_model(model, forget, forget + retain, **given.SSD)
    recorded = sum(REFERENCE["ssd"]["tied"]["dampened"].values())
    assert abs(tally.dampened - recorded) > recorded / 10


def test_potion_without_copies_is_the_released_search(tmp_path: Path) -> None:
    model = model_of(True)
    forget, retain = measured(model, length, "abs", tmp_path)
    ratios = SortedRatios(forget, retain, tmp_path / "ratios")

    def guesses() -> Tensor:
        ids = [given.ids("forget", i) for i in range(given.BATCHES["forget"])]
        with torch.no_grad():
            return torch.cat([logits(model, ids_BT).argmax(1) for ids_BT in ids])

    knew = guesses()
    share = given.BATCHES["forget"] / sum(given.BATCHES.values())
    recorded = REFERENCE["potion"]["turns"]
    turns = search(
        Potion(rho=given.RHO),
        model,
        ratios,
        lambda: float((guesses() == knew).float().mean()),
        share,
    )
    assert next(turns).known == 1.0
    number = 0
    for turn, theirs in zip(turns, recorded, strict=True):
        assert turn.share == pytest.approx(theirs["share"])
        assert turn.known == pytest.approx(theirs["known"], abs=1e-6)
        assert_sums(dict(model.named_parameters()), theirs["weights"])
        number = turn.number
    assert number == len(recorded) > 2
