"""Stop rules: the best step on `dev` is handed on, bit for bit, and nothing beyond the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from excise.core.context import Context
from excise.core.errors import Diverged, UserError
from excise.data.domain import Domain
from excise.data.labels import LabelNoise
from excise.methods import METHODS, RMU, GradDiff
from excise.methods.base import PostHoc, Removal
from excise.methods.choosing import dev_losses
from excise.methods.posthoc.rmu.sweep import RMUSweep
from excise.methods.stopping import StopRule
from excise.testing import check_method, toy_domain, toy_start
from excise.train.fit import FitConfig

FIT = FitConfig(steps=6, lr=3e-3, batch_size=8)
RULE = StopRule(every=2, retain_budget=100.0)


def edited(method: Any, root: Path, domain: Domain | None = None, **change: Any) -> Removal:
    root.mkdir()
    start, rows = toy_start(root / "start"), domain or toy_domain()
    removal: Removal = method.apply(start, rows, Context(root, **change))
    return removal


@pytest.mark.parametrize("method", [GradDiff(fit=FIT), RMU(layer=2, fit=FIT)])
def test_the_step_that_is_kept_is_the_one_training_passed(method: Any, tmp_path: Path) -> None:
    whole = edited(method.model_copy(update={"stop": RULE}), tmp_path / "whole")
    found = whole.extras["stop"]
    assert [look["step"] for look in found["table"]] == [2, 4, 6]
    best = max(found["table"], key=lambda look: look["forget"])
    assert found["chosen"] == best
    assert found["within_budget"]
    short = method.model_copy(update={"fit": FIT.model_copy(update={"steps": best["step"]})})
    other = edited(short, tmp_path / "short")
    assert other.checkpoint.fingerprint == whole.checkpoint.fingerprint
    kept = (tmp_path / "whole" / "looks").glob("*.safetensors")
    assert [path.stem for path in kept] == [f"step-{best['step']}"]


def test_what_the_record_says_of_the_step_is_what_the_model_scores(tmp_path: Path) -> None:
    removal = edited(GradDiff(fit=FIT, stop=RULE), tmp_path / "one")
    model, start = removal.checkpoint, toy_start(tmp_path / "start")
    for checkpoint, which in ((model, "chosen"), (start, "original")):
        losses = dev_losses(checkpoint.load(), checkpoint.tokenizer(), toy_domain(), 64, 512)
        look = removal.extras["stop"][which]
        assert (look["forget"], look["retain"]) == pytest.approx(losses, abs=1e-5)


def test_beyond_the_budget_training_ends_and_the_last_step_within_it_is_kept(
    tmp_path: Path,
) -> None:
    fit = FIT.model_copy(update={"steps": 60, "lr": 3e-2})
    stop = StopRule(every=1, retain_budget=0.3)
    found = edited(GradDiff(fit=fit, stop=stop), tmp_path / "one").extras["stop"]
    *within, last = found["table"]
    limit = found["original"]["retain"] + 0.3
    assert last["retain"] > limit
    assert all(look["retain"] <= limit for look in within)
    assert last["step"] < 60
    assert f"after {last['step']} steps" in found["stopped"]
    assert found["chosen"] == max(within, key=lambda look: look["forget"])


def test_with_no_step_within_the_budget_the_least_harmful_is_kept_and_said(tmp_path: Path) -> None:
    fit = FIT.model_copy(update={"lr": 0.3})
    stop = StopRule(every=2, retain_budget=0.0, stop="end")
    found = edited(GradDiff(fit=fit, stop=stop), tmp_path / "one").extras["stop"]
    assert not found["within_budget"]
    assert found["chosen"] == min(found["table"], key=lambda look: look["retain"])


def test_a_loss_that_diverges_leaves_the_best_step_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def hear(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "warning":
            told.append(data["text"])

    # Rates that grow a thousandfold a step: harmless at first, infinite later.
    rates = [1e-6 * 1e3**step for step in range(40)]
    monkeypatch.setattr(FitConfig, "rate_at", lambda self, step, lr=None: rates[step])
    fit = FIT.model_copy(update={"steps": 40})
    stop = StopRule(every=1, retain_budget=1e9, stop="end")
    removal = edited(GradDiff(fit=fit, stop=stop), tmp_path / "kept", emit=hear)
    assert "lower the learning rate" in removal.extras["stop"]["stopped"]
    assert told
    assert "the best step before it is kept" in told[0]
    with pytest.raises(Diverged):
        edited(GradDiff(fit=fit), tmp_path / "lost")


def test_every_look_is_kept_on_demand(tmp_path: Path) -> None:
    stop = RULE.model_copy(update={"keep_looks": True})
    removal = edited(GradDiff(fit=FIT, stop=stop), tmp_path / "one")
    kept = sorted((tmp_path / "one" / "looks").glob("*.safetensors"))
    assert [path.stem for path in kept] == ["step-2", "step-4", "step-6"]
    chosen = removal.extras["stop"]["chosen"]["step"]
    best = load_file(tmp_path / "one" / "looks" / f"step-{chosen}.safetensors")
    weights = removal.checkpoint.weights_of(list(best))
    assert all(torch.equal(best[name], weights[name]) for name in best)


def test_without_dev_rows_there_is_nothing_to_choose_on(tmp_path: Path) -> None:
    domain = replace(toy_domain(), dev_retain=())
    with pytest.raises(UserError, match="no dev rows for a stop rule to choose on; give"):
        GradDiff(fit=FIT, stop=RULE).apply(toy_start(tmp_path / "start"), domain, Context(tmp_path))
    with pytest.raises(ValueError, match="both choose on dev; set one"):
        RMU(stop=RULE, sweep=RMUSweep())


@pytest.mark.parametrize("method", [GradDiff(stop=RULE), RMU(layer=2, stop=RULE)])
def test_the_contract_holds_under_a_stop_rule(method: Any) -> None:
    check_method(method, families=("llama",), steps=4)


AFTER = [name for name, cls in METHODS.items() if issubclass(cls, PostHoc)]


@pytest.mark.parametrize("name", AFTER)
def test_methods_read_the_labels_they_are_given(name: str, tmp_path: Path) -> None:
    from tests.matrix.test_methods import domain_for, made

    from excise.testing.methods import shortened

    method = shortened(made(name), 3)
    noisy = method.model_copy(update={"labels": LabelNoise(missed_units=0.5)})
    domain = domain_for(name)
    true = edited(method, tmp_path / "true", domain)
    given = edited(noisy, tmp_path / "given", domain)
    assert given.extras["labels"]["units"] == pytest.approx(0.5, abs=0.1)
    assert "labels" not in true.extras
    assert given.checkpoint.fingerprint != true.checkpoint.fingerprint


def test_a_model_that_breaks_at_the_first_look_is_named_with_its_step(tmp_path: Path) -> None:
    fit = FitConfig(steps=6, lr=1e30, batch_size=8, optimizer="sgd")
    with pytest.raises(Diverged, match="no finite loss on `dev` after 1 step; lower the learning"):
        edited(GradDiff(fit=fit, stop=StopRule(every=1, stop="end")), tmp_path / "stop")
    with pytest.raises(Diverged, match=r"at step 1; .*before this step are kept in .*state\)"):
        edited(GradDiff(fit=fit), tmp_path / "none")
    assert list((tmp_path / "none" / "state").glob("step-00000001"))


def test_a_retain_set_of_one_batch_is_told(tmp_path: Path) -> None:
    told: list[str] = []

    def hear(kind: str, data: Mapping[str, Any]) -> None:
        told.extend([data["text"]] if kind == "note" else [])

    domain = toy_domain()
    edited(GradDiff(fit=FIT), tmp_path / "many", emit=hear)
    assert not any("one batch" in text for text in told)
    edited(
        GradDiff(fit=FIT), tmp_path / "one", replace(domain, retain=domain.retain[:3]), emit=hear
    )
    assert "the retain set is one batch (3 rows, 8 a step), so that every step reads" in told[0]
