"""The Python interface: what the README shows works on models and folders alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.parity.toy import toy_checkpoint, toy_domain

import excise as ex
from excise.methods.base import Removal

FIT = ex.FitConfig(steps=2, lr=1e-3, batch_size=4)


def test_every_public_name_can_be_imported() -> None:
    for name in ex.__all__:
        assert getattr(ex, name) is not None
    assert set(ex.__all__) <= set(dir(ex))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ex.nothing


def test_remove_takes_a_folder_a_model_and_a_checkpoint(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    method = ex.GradDiff(fit=FIT)

    def removed(model: Any, name: str, tokenizer: Any = None) -> Removal:
        return ex.remove(model, method, domain, tokenizer=tokenizer, out=tmp_path / name)

    whole = removed(start, "a")
    again = removed(str(start.path), "b")
    live = removed(start.load(), "c", start.tokenizer())
    assert whole.checkpoint.path == tmp_path / "a" / "model"
    assert whole.checkpoint.fingerprint == again.checkpoint.fingerprint
    assert whole.checkpoint.fingerprint != start.fingerprint
    for one, other in zip(
        whole.checkpoint.load().parameters(), live.checkpoint.load().parameters(), strict=True
    ):
        assert one.equal(other)


def test_a_domain_that_is_none_is_refused(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    with pytest.raises(ex.UserError, match="must be a Domain or a DomainSpec"):
        ex.remove(start, ex.GradDiff(fit=FIT), "forget.jsonl")  # type: ignore[arg-type]


def test_audit_reads_a_candidate_between_its_rails(
    facts_domain: ex.Domain, knowing: ex.Checkpoint, never_taught: ex.Checkpoint, tmp_path: Path
) -> None:
    change = {"steps": 2, "checkpoints": (0, 2), "rates": (1e-3,), "attacks": ("transfer",)}
    asked: dict[str, Any] = {"original": knowing, "domain": facts_domain, "change": change}
    asked["out"] = tmp_path / "audit"
    hidden = {"hidden": knowing_with_noise(knowing, tmp_path)}
    record = ex.audit(hidden, oracles=[never_taught], **asked)
    assert [v.model for v in record.verdicts] == ["hidden"]
    assert {a.subject for a in record.attacks} >= {"hidden", "original", "oracle-0"}
    loaded = ex.load(tmp_path / "audit")
    assert isinstance(loaded, ex.Record)
    assert loaded.verdicts[0].sentence == record.verdicts[0].sentence
    assert loaded.config["audit"]["change"]["steps"] == 2
    assert "(budget smoke, changed)" in (tmp_path / "audit" / "report.html").read_text()
    # The folder is that of this audit alone.
    again = ex.audit(hidden, oracles=[never_taught], **asked)
    assert again.verdicts == record.verdicts
    with pytest.raises(ex.UserError, match="holds another run; name a new folder"):
        ex.audit(hidden, **asked)


def test_a_candidate_that_is_its_own_original_is_refused_before_any_attack(
    facts_domain: ex.Domain, knowing: ex.Checkpoint, never_taught: ex.Checkpoint, tmp_path: Path
) -> None:
    out = tmp_path / "audit"
    for candidate, other in ((knowing, "original"), (never_taught, "oracle-0")):
        with pytest.raises(ex.UserError, match=f"'{other}' are the same model, byte for byte"):
            ex.audit(
                candidate, original=knowing, oracles=[never_taught], domain=facts_domain, out=out
            )
    assert not any("attack" in path.name for path in (tmp_path / ".stages").rglob("*"))


def knowing_with_noise(knowing: ex.Checkpoint, folder: Path) -> ex.Checkpoint:
    """Return the knowing model with one tensor moved a little: it hides nothing."""
    name = knowing.parameter_names()[-1]
    return knowing.write({name: knowing.weights_of([name])[name] * 1.01}, folder / "noisy")
