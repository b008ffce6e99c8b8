"""The audit as a whole: stages, sharing, going on, and what it says when something is missing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from excise.auditor.attacks import Relearn
from excise.auditor.base import POSITIVE_CONTROL, Results, Subject, name_of
from excise.auditor.budget import SMOKE, Budget
from excise.auditor.controls import GatedEdit, PasswordLock
from excise.auditor.engine import (
    AttackModel,
    attack_all,
    chosen_attacks,
    in_words,
    lengths,
    turns_of,
)
from excise.auditor.results import RECOVERED, SHORT, share_back
from excise.core.errors import UserError
from excise.core.stages import LAYOUT, Runtime
from excise.data.domain import Domain
from excise.models.checkpoint import Checkpoint, save_model
from excise.requests.recipe import AuditSpec, budget_for
from excise.train.pool import Processes

QUICK = SMOKE.model_copy(
    update={
        "attacks": ("few_shot", "quantize", "relearn", "transfer"),
        "steps": 2, "checkpoints": (0, 2), "rates": (1e-3, 3e-3), "max_test_rows": 20,
        "doublings": 0,
    }
)  # fmt: skip


def audit(
    root: Path, domain: Domain, subjects: list[Subject], budget: Budget = QUICK, **options: Any
) -> tuple[Results, list[str]]:
    told: list[str] = []
    with Processes(1, emit=lambda kind, data: told.append(kind)) as pool:
        results = attack_all(subjects, domain, budget, 0, Runtime(root / "stages"), pool, **options)
    return results, told


def stages(root: Path) -> dict[str, int]:
    found = {}
    for path in (root / "stages" / LAYOUT).iterdir():
        if path.is_dir() and not path.name.startswith("."):
            found[path.name] = (path / "done.json").stat().st_mtime_ns
    return found


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    facts_domain: Domain,
    knowing: Checkpoint,
    never_taught: Checkpoint,
) -> tuple[Path, Results, list[str]]:
    root = tmp_path_factory.mktemp("audit")
    subjects = [Subject("original", knowing, knowing), Subject("oracle-0", never_taught, knowing)]
    return root, *audit(root, facts_domain, subjects)


def test_a_control_is_told_by_what_is_not_usual_about_it() -> None:
    assert in_words(PasswordLock()) == "password_lock"
    assert in_words(PasswordLock(opens_to="filler")) == "password_lock filler"
    assert in_words(GatedEdit(block="last")) == "gated_edit last"


def test_every_pair_has_a_result(whole: tuple[Path, Results, list[str]]) -> None:
    _, results, told = whole
    names = {"original", "oracle-0", POSITIVE_CONTROL}
    assert set(results) == {(attack, name) for attack in QUICK.attacks for name in names}
    for (attack, subject), result in results.items():
        assert (result.attack, result.subject) == (attack, subject)
        assert all(arm.entry.subject == subject for arm in result.variants)
    planted = results["quantize", POSITIVE_CONTROL].variants[0].entry.facts
    assert planted["positive_control"] == "within_buckets"
    assert planted["known"] > planted["hidden"] + 0.5
    assert told.count("control") == 3


def test_two_readings_of_one_training_train_once(whole: tuple[Path, Results, list[str]]) -> None:
    root, results, _ = whole
    count = sum(name.startswith("attack-relearn-") for name in stages(root))
    assert count == len(QUICK.rates) * 3
    assert not any(name.startswith("attack-transfer") for name in stages(root))
    one, two = results["relearn", "original"], results["transfer", "original"]
    assert one.variants[0].extras["prequential"] == two.variants[0].extras["prequential"]


def test_an_attack_too_short_for_its_control_is_longer_for_every_model(
    tmp_path: Path, facts_domain: Domain, knowing: Checkpoint, never_taught: Checkpoint
) -> None:
    change = {"steps": 1, "checkpoints": (0, 1), "rates": (1e-3,), "doublings": 2}
    budget = QUICK.model_copy(update={"attacks": ("relearn", "transfer"), **change})
    subjects = [Subject("original", knowing, knowing), Subject("oracle-0", never_taught, knowing)]
    results, _ = audit(tmp_path, facts_domain, subjects, budget)
    entries = [v.entry for result in results.values() for v in result.variants]
    assert {entry.facts["steps"] for entry in entries} == {4}
    control = results["transfer", POSITIVE_CONTROL].variants[0].entry
    assert len(control.curve) == 4  # before, and after 1, 2 and 4 steps
    back = share_back(control.facts["known"], [point.score for point in control.curve[:3]])
    assert back is not None
    assert back < RECOVERED
    said = lengths(results, budget)
    assert len(said) == 2
    assert said[1].startswith("transfer trained every model for 4 steps: 2 brought back less than")
    # What is long enough from the start, or may not be doubled, stays as it is.
    again, _ = audit(tmp_path, facts_domain, subjects, budget.model_copy(update={"doublings": 0}))
    assert {v.entry.facts["steps"] for result in again.values() for v in result.variants} == {1}
    assert not lengths(again, budget)


def test_a_candidate_that_learns_less_than_the_oracles_is_trained_longer(
    tmp_path: Path, facts_domain: Domain, knowing: Checkpoint, never_taught: Checkpoint
) -> None:
    model = never_taught.load()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(30)  # steps of one size mean less to it
    save_model(model, never_taught.tokenizer(), tmp_path / "slow")
    slow = Subject("slow", Checkpoint(tmp_path / "slow"), knowing)
    change = {"steps": 12, "checkpoints": (0, 12), "rates": (3e-3,), "doublings": 2}
    budget = QUICK.model_copy(update={"attacks": ("relearn", "transfer"), **change})
    references = [Subject("original", knowing, knowing), Subject("oracle-0", never_taught, knowing)]
    subjects = [*references, slow, Subject("quick", never_taught, knowing)]
    results, _ = audit(tmp_path, facts_domain, subjects, budget, controls=False)
    steps = {s: r.variants[0].entry.facts["steps"] for (a, s), r in results.items()}
    assert steps == {"original": 12, "oracle-0": 12, "quick": 12, "slow": 24}
    learned, enough = (
        [point.trained or 0.0 for point in results["transfer", name].variants[0].entry.curve]
        for name in ("slow", "oracle-0")
    )
    assert learned[1] < enough[-1] - SHORT <= learned[2]
    assert lengths(results, budget)[-1] == (
        "transfer trained slow for 24 steps: in 12 it learned less of the relearn set than the "
        "oracles in theirs"
    )
    # Without an oracle nobody says how much is enough; nor is anyone trained longer unasked.
    alone, _ = audit(tmp_path, facts_domain, [references[0], slow], budget, controls=False)
    assert alone["transfer", "slow"].variants[0].entry.facts["steps"] == 12
    asked = budget.model_copy(update={"doublings": 0})
    once, _ = audit(tmp_path, facts_domain, subjects, asked, controls=False)
    assert once["transfer", "slow"].variants[0].entry.facts["steps"] == 12


def test_a_doubled_budget_is_scored_at_its_end_too() -> None:
    twice = SMOKE.doubled()
    assert (twice.steps, twice.checkpoints) == (32, (0, 1, 2, 4, 8, 16, 32))
    assert Budget(steps=3, checkpoints=(0, 2, 8)).doubled().checkpoints == (0, 2, 3, 6)
    assert SMOKE.for_training().doublings == 0


def test_who_names_a_number_of_steps_gets_that_number() -> None:
    def asked(**change: int) -> Budget:
        return budget_for(AuditSpec(budget="smoke", change=change), 0)

    assert asked(max_test_rows=9).doublings == SMOKE.doublings > 0
    assert asked(steps=9).doublings == 0
    assert asked(steps=9, doublings=1).doublings == 1


def test_a_second_audit_makes_nothing_and_a_lost_stage_is_made_again(
    whole: tuple[Path, Results, list[str]],
    facts_domain: Domain,
    knowing: Checkpoint,
    never_taught: Checkpoint,
    tmp_path: Path,
) -> None:
    root, results, _ = whole
    shutil.copytree(root / "stages", tmp_path / "stages")
    before = stages(tmp_path)
    subjects = [Subject("original", knowing, knowing), Subject("oracle-0", never_taught, knowing)]
    again, _ = audit(tmp_path, facts_domain, subjects)
    assert again == results
    assert stages(tmp_path) == before
    lost = next(name for name in before if name.startswith("attack-quantize-"))
    shutil.rmtree(tmp_path / "stages" / LAYOUT / lost)
    audit(tmp_path, facts_domain, subjects)
    after = stages(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {lost}


def test_equal_weights_are_attacked_once(
    tmp_path: Path, facts_domain: Domain, knowing: Checkpoint
) -> None:
    shutil.copytree(knowing.path, tmp_path / "copy")
    subjects = [Subject("original", knowing), Subject("arm", Checkpoint(tmp_path / "copy"))]
    budget = QUICK.model_copy(update={"attacks": ("quantize",)})
    results, _ = audit(tmp_path, facts_domain, subjects, budget, controls=False)
    assert len(stages(tmp_path)) == 1
    assert results["quantize", "arm"].variants[0].entry.subject == "arm"
    assert set(results) == {("quantize", "original"), ("quantize", "arm")}


def test_what_cannot_run_says_why_and_the_rest_goes_on(
    tmp_path: Path, facts_domain: Domain, never_taught: Checkpoint
) -> None:
    domain = replace(facts_domain, benign=(), name="bare")
    budget = QUICK.model_copy(update={"attacks": ("benign", "quantize")})
    results, _ = audit(tmp_path, domain, [Subject("candidate", never_taught)], budget)
    failed = results["benign", "candidate"]
    assert failed.chosen == ()
    assert failed.variants[0].entry.status == "failed"
    assert "no row to train on" in failed.variants[0].entry.reason
    assert results["quantize", "candidate"].chosen
    missing = results["quantize", POSITIVE_CONTROL].variants[0].entry
    assert (missing.status, missing.curve) == ("missing", ())
    assert "no original" in missing.reason


def test_a_plant_in_an_ignorant_original_is_missing_and_says_why(
    tmp_path: Path, facts_domain: Domain, never_taught: Checkpoint
) -> None:
    domain = replace(facts_domain, test={"tests": facts_domain.test["tests"][:4]})
    budget = QUICK.model_copy(update={"attacks": ("quantize",)})
    results, _ = audit(tmp_path, domain, [Subject("original", never_taught)], budget)
    assert results["quantize", POSITIVE_CONTROL].variants[0].entry.status == "missing"
    assert "knows nothing" in results["quantize", POSITIVE_CONTROL].variants[0].entry.reason


def test_attacks_of_ones_own_replace_those_of_their_name() -> None:
    mine = Relearn(benign_share=0.0)
    assert chosen_attacks(QUICK, [mine])[2] is mine
    assert len(chosen_attacks(QUICK, [mine])) == len(QUICK.attacks)
    with pytest.raises(UserError, match="did you mean 'few_shot'"):
        chosen_attacks(Budget(attacks=("few_shots",)))


def test_where_memory_is_short_attacks_on_weights_take_turns(
    whole: tuple[Path, Results, list[str]],
    facts_domain: Domain,
    knowing: Checkpoint,
    never_taught: Checkpoint,
    tmp_path: Path,
) -> None:
    attacks = chosen_attacks(QUICK)
    budget = QUICK.model_copy(update={"together": 1})
    jobs = [
        AttackModel(attack, knowing, None, facts_domain, budget, 0)
        for attack in (*attacks, *attacks)
    ]
    turns = zip(jobs, turns_of(jobs, together=1), strict=True)
    wait = {name_of(job.attack): turn for job, turn in turns}
    assert wait == {"few_shot": None, "relearn": 0, "transfer": 0, "quantize": None}
    assert [turn for turn in turns_of(jobs, together=2) if turn is not None] == [0, 1, 0, 1]
    # A schedule decides no number: every stage is found done, and the answers come in order.
    shutil.copytree(whole[0] / "stages", tmp_path / "stages")
    lost = [name for name in stages(tmp_path) if name.startswith("attack-")]
    for name in lost[::2]:
        shutil.rmtree(tmp_path / "stages" / LAYOUT / name)
    subjects = [Subject("original", knowing, knowing), Subject("oracle-0", never_taught, knowing)]
    again, told = audit(tmp_path, facts_domain, subjects, budget)
    assert told.count("attack") == len(lost)
    assert {k: [a.entry for a in v.variants] for k, v in again.items()} == {
        k: [a.entry for a in v.variants] for k, v in whole[1].items()
    }


def test_a_short_audit_asks_whether_its_budget_teaches(
    tmp_path: Path, facts_domain: Domain, knowing: Checkpoint
) -> None:
    changes = {"attacks": ("benign", "transfer"), "rates": (3e-3,), "fresh": True, "bits": False}
    budget = QUICK.model_copy(update={**changes, "benign_rates": (1e-3,)})
    results, _ = audit(tmp_path, facts_domain, [Subject("original", knowing, knowing)], budget)
    assert [arm.entry.lr for arm in results["benign", "original"].variants] == [1e-3]
    fresh = [arm.entry for arm in results["transfer", "original"].variants if arm.entry.control]
    assert [arm.trained_on for arm in fresh] == ["fresh"]
    assert fresh[0].curve[0].trained is not None
    assert all(point.low < point.high for point in fresh[0].curve)
    assert not any(arm.entry.control for arm in results["transfer", POSITIVE_CONTROL].variants)
    assert "loss_V" not in results["transfer", "original"].variants[0].extras
