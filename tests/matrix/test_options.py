"""Every option that methods after training share acts on each of them, or is refused by name."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch.utils.checkpoint import checkpoint

from excise.core.context import Context
from excise.data.labels import Confidence, LabelNoise
from excise.methods import METHODS
from excise.methods.base import Method, PostHoc
from excise.methods.search import changed
from excise.methods.stopping import StopRule
from excise.models.lora import LoRA
from excise.testing import toy_start
from excise.testing.methods import FAMILIES, map_fits, shortened
from excise.train.components import Components
from excise.train.fit import FitConfig
from tests.matrix.test_methods import domain_for, made

OPTIONS: Mapping[str, Any] = {
    "labels": LabelNoise(missed_units=0.5),
    "labels.confidence": Confidence(),
    "stop": StopRule(every=1, retain_budget=100.0, stop="end"),
    "sam": 0.5,
    "drop_components": Components(count=2, how="drop"),
    "lora": LoRA(rank=2),
    "modules": ("model.layers.1.mlp.down_proj",),
    "max_length": 4,
    "fit.clip": 1e-6,
    "fit.micro_size": 3,
    "fit.weight_decay": 0.5,
    "fit.betas": (0.5, 0.6),
}
"""An option, and a value that makes another model, or a record that says so."""

WHOLE = ("sam", "drop_components")
"""Options for which an adapter that a method has by default is taken off."""

AFTER = [name for name, cls in METHODS.items() if issubclass(cls, PostHoc)]


@functools.cache
def result(name: str, option: str, plain: bool) -> tuple[str, frozenset[str]]:
    """Return what a method makes with an option set: the model, and what the record speaks of."""
    method = shortened(made(name), 2)
    if plain and getattr(method, "lora", None) is not None:
        method = changed(method, {"lora": None})
    if option == "labels.confidence":
        method = changed(method, {"labels": LabelNoise(confidence=OPTIONS[option])})
    elif option:
        method = changed(method, {option: OPTIONS[option]})
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    removal = method.apply(toy_start(folder / "start"), domain_for(name), Context(folder, seed=5))
    return removal.checkpoint.fingerprint, frozenset(removal.extras)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", AFTER)
def test_an_option_acts_or_is_refused(name: str, option: str) -> None:
    plain = option in WHOLE and name != "circuit_breakers"  # whose adapter is the method
    said = ""
    try:
        found = result(name, option, plain)
    except ValueError as error:
        found, said = None, str(error)
    assert found != result(name, "", plain)
    assert found or option.partition(".")[0] in said
    assert found or option not in ("labels", "max_length"), "every method takes these"


def recomputing(fit: FitConfig) -> FitConfig:
    return fit.model_copy(update={"activation_checkpointing": True})


KINDS = ("plain", "sgtm", "npo", "rmu", "undo")
"""A method of each kind of training: plain, routed, a loss of logits, blocks that run apart, and a
chain that distils."""


@pytest.mark.parametrize(
    ("name", "family"),
    [(n, "llama") for n in METHODS] + [(n, f) for n in KINDS for f in FAMILIES if f != "llama"],
)
def test_activation_checkpointing_changes_no_byte(
    name: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = shortened(made(name, family), 2), []
    method = map_fits(plain, recomputing)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return checkpoint(*args, **kwargs)

    def applied(one: Method, to: str) -> str:
        work = tmp_path / to
        work.mkdir()
        start = toy_start(work / "start", family)
        removal = one.apply(start, domain_for(name), Context(work, seed=5))
        return removal.checkpoint.fingerprint

    kept = family == "llama" and name in AFTER
    before = result(name, "", plain=False)[0] if kept else applied(plain, "plain")
    monkeypatch.setattr("excise.train.recompute.checkpoint", counted)
    assert applied(method, "recomputed") == before
    assert bool(calls) == (method != plain), "every method that trains recomputes its blocks"
