"""What an audit cannot say anything about is refused or flagged, and never scored in silence."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import excise as ex
from excise.auditor.attacks import ATTACKS
from excise.auditor.base import AttackResult, Subject
from excise.auditor.budget import BUDGETS, SMOKE
from excise.auditor.engine import attack_all
from excise.auditor.prompting import shown
from excise.auditor.questions import Question, choice_scores
from excise.auditor.tuning import TrainingAttack, possible
from excise.core.context import Context
from excise.core.errors import NotFinite, UserError
from excise.core.stages import Runtime
from excise.data.domain import Domain, Row, Rows
from excise.evals.score import measure
from excise.models.checkpoint import Checkpoint
from excise.train.pool import Processes

QUICK = SMOKE.model_copy(
    update={
        "steps": 1, "checkpoints": (0, 1), "rates": (1e-3,), "max_test_rows": 8,
        "max_other_rows": 8, "subspaces": (1,), "doublings": 0,
    }
)  # fmt: skip

ROWS = ("rescale_rows", "align_rows", "match_rows")
REPAIRS = ("noise", "shrink_perturb", "reinit")
TEMPLATED = "template"
"""Has nothing to do for a tokenizer without a chat template."""


SHORT: dict[str, dict[str, Any]] = {"gcg": {"steps": 2, "width": 4, "tokens": 4}}
"""Searches that are made for large models."""


def run(name: str, model: Checkpoint, domain: Domain, original: Checkpoint, to: Path) -> Any:
    subject = Subject("x", model, original)
    attack = ATTACKS[name].model_validate(SHORT.get(name, {}))
    return attack.run(subject, domain, QUICK, Context(to))


def curves(result: AttackResult) -> list[float]:
    return [point.score for variant in result.variants for point in variant.entry.curve]


# A model without numbers.

BREAKS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "everywhere": lambda t: [value.fill_(torch.nan) for value in t.values()],
    "in the output alone": lambda t: t["model.norm.weight"].fill_(torch.nan),
    "too large": lambda t: t["model.norm.weight"].fill_(3e38),
}


@pytest.mark.parametrize("where", BREAKS)
def test_a_model_without_numbers_fails_every_attack_and_the_others_go_on(
    where: str, tmp_path: Path, facts_domain: Domain, knowing: Checkpoint
) -> None:
    shutil.copytree(knowing.path, tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    BREAKS[where](tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    subjects = [
        Subject("broken", Checkpoint(tmp_path / "broken"), knowing),
        Subject("whole", knowing, knowing),
    ]
    names = tuple(sorted({*ATTACKS} - {"align_rows", *SHORT, *REPAIRS}))
    names = names if where == "in the output alone" else ("lens", "quantize")
    budget = QUICK.model_copy(update={"attacks": names})
    with Processes(1) as pool:
        results = attack_all(
            subjects, facts_domain, budget, 0, Runtime(tmp_path / "stages"), pool, controls=False
        )
    for name in {*names} - {TEMPLATED}:
        broken, whole = results[name, "broken"], results[name, "whole"]
        assert {v.entry.status for v in broken.variants} == {"failed"}, name
        assert all("finite" in v.entry.reason for v in broken.variants), name
        assert broken.chosen == broken.fail_only == ()
        assert {v.entry.status for v in whole.variants} == {"ok"}, name
        assert all(map(math.isfinite, curves(whole))), name
    for name in SHORT:
        with pytest.raises(NotFinite):
            run(name, subjects[0].checkpoint, facts_domain, knowing, tmp_path)


ONE_OF_MANY: dict[str, dict[str, Any]] = {
    **SHORT,
    "soft_prompt": {"rates": (0.01,)},
    "reinit": {"parts": ("norms",)},
    "noise": {"strengths": (0.1,)},
    "shrink_perturb": {"alphas": (0.1,)},
}
READ_BEFORE = {"relearn": 3, "transfer": 3, "soft_prompt": 3}
"""Sets that are scored before the attack: V and retain, and T where it is trained on."""


@pytest.mark.parametrize("name", sorted({*ATTACKS} - {TEMPLATED, "sampling", "lens", "probe"}))
def test_what_breaks_under_an_attack_has_failed_and_decides_nothing(
    name: str,
    tmp_path: Path,
    facts_domain: Domain,
    knowing: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trains = issubclass(ATTACKS[name], TrainingAttack)
    calls: Counter[Any] = Counter()

    def breaking(model: Any, tokenizer: Any, rows: Rows, metric: str, **how: Any) -> Any:
        calls[which := model if trains else name] += 1  # every training begins with a whole model
        if calls[which] > READ_BEFORE.get(name, 2):
            raise NotFinite("the model", metric, 1, len(rows))
        return measure(model, tokenizer, rows, metric, **how)

    monkeypatch.setattr("excise.auditor.evaluation_set.measure", breaking)
    attack = ATTACKS[name](**ONE_OF_MANY.get(name, {}))
    result = attack.run(Subject("x", knowing, knowing), facts_domain, QUICK, Context(tmp_path))
    assert result.variants
    assert result.chosen == result.fail_only == ()
    for variant in result.variants:
        assert variant.entry.status == "failed"
        assert variant.entry.reason.startswith("the model has no finite ")
    assert all(map(math.isfinite, curves(result)))


def test_a_lens_that_says_no_number_is_no_answer() -> None:
    asked = [Question("a", (1,), (0, 1), 0), Question("b", (1,), (0, 1), 0)]
    logits = torch.tensor([[1.0, 0.0], [torch.nan, 0.0]])
    with pytest.raises(NotFinite, match="no finite candidate_choice on 1 of 2 rows"):
        choice_scores(asked, logits)
    assert choice_scores(asked[:1], logits[:1])[0] == {"a": 1.0}


# Roles without rows.


def emptied(domain: Domain, role: str) -> Domain:
    value = getattr(domain, role)
    change: dict[str, Any] = {role: () if isinstance(value, tuple) else dict.fromkeys(value, ())}
    return replace(domain, **change)


NEEDS: dict[str, tuple[str, ...]] = {
    "relearn": (
        "few_shot", "probe", "latent", "steer", "prune", "soft_prompt", "relearn", "transfer",
        *ROWS,
    ),
    "benign": ("prefix", "filler", "prune", "benign", "relearn", "transfer", *REPAIRS, *ROWS),
    "dev_retain": ("direction",),
    "test": tuple(sorted({*ATTACKS} - {*ROWS})),
    "dev_forget": tuple(sorted({*ATTACKS} - {*ROWS})),
    "retain_test": tuple(sorted({*ATTACKS})),
}  # fmt: skip
"""Attacks that have nothing to work with where a role has no rows; of V, `dev` and `retain_test`
all need some, and those on names find none first."""


@pytest.mark.parametrize("role", NEEDS)
def test_an_attack_without_its_rows_says_so(
    role: str, tmp_path: Path, facts_domain: Domain, knowing: Checkpoint
) -> None:
    domain = emptied(facts_domain, role)
    for name in NEEDS[role]:
        try:
            result = run(name, knowing, domain, knowing, tmp_path)
            assert [(v.entry.status, v.entry.curve) for v in result.variants] == [("missing", ())]
            reason = result.variants[0].entry.reason
        except UserError as error:
            reason = str(error)
        assert "\n" not in reason
        assert role in reason or "no row to train on" in reason, name


@pytest.mark.parametrize("role", ["test", "dev_forget", "retain_test"])
def test_an_audit_with_nothing_to_score_or_to_choose_by_is_refused(
    role: str, tmp_path: Path, facts_domain: Domain, knowing: Checkpoint, never_taught: Checkpoint
) -> None:
    domain = emptied(facts_domain, role)
    with pytest.raises(UserError, match=f"domain 'tests' has no row in {role}, ") as caught:
        ex.audit(never_taught, original=knowing, domain=domain, out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / ".stages").exists()


def test_without_fresh_units_none_are_trained_on(facts_domain: Domain) -> None:
    """Benign rows in their place would be a control of nothing."""
    for count, trained in ((0, False), (1, False), (2, True)):
        units = list(dict.fromkeys(row.unit for row in facts_domain.fresh))[:count]
        fresh = tuple(row for row in facts_domain.fresh if row.unit in units)
        domain = replace(facts_domain, fresh=fresh)
        for name in ("relearn", "soft_prompt"):
            trainings = possible(ATTACKS[name]().trainings(BUDGETS["standard"]), domain)  # type: ignore[attr-defined]
            assert any(training.on == "fresh" for training in trainings) is trained


# Rows that an attack cannot read.

NEW = ("paraphrase", "lens", "probe", "direction", "latent", "steer", "soft_prompt", *ROWS)


@pytest.mark.parametrize("name", NEW)
def test_three_units_are_scored_as_three(
    name: str, tmp_path: Path, facts_domain: Domain, knowing: Checkpoint, never_taught: Checkpoint
) -> None:
    """Whether that is enough is the verdict's to say; see `test_depth.py`."""
    rows = facts_domain.test["tests"]
    units = list(dict.fromkeys(row.unit for row in rows))[:3]
    few = replace(facts_domain, test={"tests": tuple(r for r in rows if r.unit in units)})
    result = run(name, never_taught, few, knowing, tmp_path)
    assert result.variants
    for variant in result.variants:
        assert variant.entry.status == "ok"
        assert {*variant.unit_scores[-1]} <= {*units}
    assert all(map(math.isfinite, curves(result)))


def everywhere(domain: Domain, change: Callable[[Row], Row], metric: str) -> Domain:
    parts: dict[str, Any] = {"metrics": (metric,), "retain_metrics": (metric,)}
    for role in ("forget", "relearn", "test", "dev_forget"):
        held = getattr(domain, role)
        parts[role] = {name: tuple(map(change, rows)) for name, rows in held.items()}
    for role in ("retain", "retain_test", "dev_retain", "benign", "fresh"):
        parts[role] = tuple(map(change, getattr(domain, role)))
    return replace(domain, **parts)


@pytest.mark.parametrize("name", ["paraphrase", "sampling", "lens", "probe", *ROWS])
def test_plain_texts_are_said_to_be_out_of_reach(
    name: str, tmp_path: Path, facts_domain: Domain, knowing: Checkpoint
) -> None:
    texts = everywhere(
        facts_domain, lambda r: replace(r, text=shown(r), prompt="", completion=""), "text_loss"
    )
    (variant,) = run(name, knowing, texts, knowing, tmp_path).variants
    assert (variant.entry.status, variant.entry.facts) == ("missing", {"applies": False})
    assert variant.entry.reason


@pytest.mark.parametrize("name", ["few_shot", "quantize", "latent", "soft_prompt", "transfer"])
def test_a_question_of_one_choice_is_no_question(
    name: str, tmp_path: Path, facts_domain: Domain, knowing: Checkpoint
) -> None:
    domain = everywhere(
        facts_domain,
        lambda r: replace(r, completion="", choices=(r.completion.strip(),), answer=0),
        "multiple_choice",
    )
    with pytest.raises(UserError, match="is no multiple-choice question"):
        run(name, knowing, domain, knowing, tmp_path)


@pytest.mark.parametrize("name", ["few_shot", "lens", "latent", "quantize", "soft_prompt"])
def test_a_tokenizer_without_padding_changes_no_number(
    name: str, tmp_path: Path, facts_domain: Domain, knowing: Checkpoint
) -> None:
    shutil.copytree(knowing.path, tmp_path / "bare")
    file = tmp_path / "bare" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": None}))
    bare = Checkpoint(tmp_path / "bare")
    ids = [model.tokenizer().pad_token_id for model in (bare, knowing)]
    assert ids[0] == bare.tokenizer().eos_token_id != ids[1]
    one, two = (
        run(name, model, facts_domain, model, tmp_path / model.path.name)
        for model in (bare, knowing)
    )
    assert curves(one)
    assert curves(one) == curves(two)
