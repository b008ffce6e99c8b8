"""Edits keyed on names: what undoes them, what does not, and what a verdict makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.unit.families import FEW, MORE, save_family
from tests.unit.synthetic import BUDGET, audit, draw, variant
from tests.unit.synthetic import domain as synthetic
from torch import Tensor

from excise.auditor.attacks import ATTACKS, AlignRows, MatchRows, RescaleRows
from excise.auditor.attacks.embedding_rows import matched, reflection, rescaled, turned
from excise.auditor.base import Attack, AttackResult, Subject
from excise.auditor.budget import ROWS, SMOKE, STANDARD, STRONG
from excise.auditor.controls import PermutedRows, RotatedRows, ShrunkRows
from excise.auditor.controls.control import PositiveControl, make_control
from excise.auditor.name_rows import NameRows, embedding, name_rows, within, words_shared
from excise.auditor.verdict import judge_all
from excise.core.context import Context
from excise.data.domain import Domain, Row
from excise.domains.arithmetic import Arithmetic
from excise.domains.facts import Facts
from excise.models.checkpoint import Checkpoint, save_model
from excise.record import Level

NAMES: dict[str, type[Attack]] = {name: ATTACKS[name] for name in ROWS}

EACH = [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


def words(names: tuple[int, ...], checkpoint: Checkpoint) -> set[str]:
    return set(checkpoint.tokenizer().convert_ids_to_tokens(list(names)))


@pytest.fixture
def names(facts_domain: Domain, knowing: Checkpoint) -> NameRows:
    return name_rows(facts_domain, knowing.tokenizer(), 128)


def rewritten(
    knowing: Checkpoint, names: NameRows, change: Callable[[Tensor, Tensor], None], to: Path
) -> Checkpoint:
    """Return the knowing model with its embedding changed in place."""
    model = knowing.load()
    with torch.no_grad():
        change(embedding(model)[1], torch.tensor(names.names))
    return save_model(model, None, to, source=knowing)


def scores(
    attack: Attack, checkpoint: Checkpoint, domain: Domain, folder: Path, original: Checkpoint
) -> dict[str, tuple[float, float]]:
    """Return V before and after, by variant."""
    subject = Subject("candidate", checkpoint, original)
    result = attack.run(subject, domain, SMOKE, Context(folder))
    assert all((v.entry.curve[-1].retain or 0) > 0.95 for v in result.variants)
    return {
        v.entry.variant: (v.entry.curve[0].score, v.entry.curve[-1].score) for v in result.variants
    }


def test_names_are_the_tokens_of_prompts_that_no_kept_text_holds(
    names: NameRows, knowing: Checkpoint, facts_domain: Domain
) -> None:
    asked = {row.group for row in facts_domain.test["tests"]}
    trained = {row.group for row in facts_domain.relearn["tests"]}
    dev = {row.group for row in facts_domain.dev_forget["tests"]}
    assert words(names.asked, knowing) == asked
    assert words(names.trained, knowing) == trained
    assert words(names.dev, knowing) == dev
    assert words(names.guides, knowing) == trained | dev
    assert names.keyed == 1.0
    assert names.exist
    assert words(names.rarest, knowing) < {row.group for row in facts_domain.benign}


@pytest.mark.parametrize("name", ROWS)
def test_no_answer_of_v_is_read(
    name: str, facts_domain: Domain, knowing: Checkpoint, tmp_path: Path
) -> None:
    """With other answers to V the same weights come of it: what was right is then all wrong."""
    wrong = {"tests": tuple(replace(r, completion=" :") for r in facts_domain.test["tests"])}
    attack = NAMES[name]()
    facts = []
    for domain in (facts_domain, replace(facts_domain, test=wrong)):
        result = attack.run(Subject("o", knowing, knowing), domain, SMOKE, Context(tmp_path))
        facts.append([(v.entry.facts, v.dev_score) for v in result.variants])
    assert facts[0] == facts[1]


UNDONE: dict[tuple[PositiveControl, type[Attack]], tuple[str, float, float]] = {
    (ShrunkRows(), RescaleRows): ("median length", 0.95, 1.0),
    (RotatedRows(), AlignRows): ("relearn set", 0.5, 1.0),
    (PermutedRows(), MatchRows): ("most like the original's", 1.0, 1.0),
    (RotatedRows(), RescaleRows): ("median length", 0.0, 0.15),
    (PermutedRows(), RescaleRows): ("median length", 0.0, 0.15),
    (PermutedRows(), AlignRows): ("relearn set", 0.0, 0.15),
}
"""What comes back of which hiding: least and most. A permutation takes the original."""


@pytest.mark.parametrize("case", UNDONE, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_undone_and_what_is_not(
    case: tuple[PositiveControl, type[Attack]],
    seed: int,
    facts_domain: Domain,
    knowing: Checkpoint,
    tmp_path: Path,
) -> None:
    kind, attack = case
    ctx = Context(tmp_path, seed=seed)
    control = make_control(kind, knowing, facts_domain, SMOKE, ctx, tmp_path / "model")
    assert control.hides
    assert control.retain_after == control.retain_before
    assert control.checkpoint is not None
    name, least, most = UNDONE[case]
    before, after = scores(attack(), control.checkpoint, facts_domain, tmp_path, knowing)[name]
    assert before <= 0.15
    assert least <= after <= most


def test_a_rotation_is_read_off_the_original_rows_of_other_names(
    facts_domain: Domain, knowing: Checkpoint, tmp_path: Path
) -> None:
    to = tmp_path / "model"
    control = make_control(RotatedRows(), knowing, facts_domain, SMOKE, Context(tmp_path), to)
    assert control.checkpoint is not None
    both = scores(MatchRows(), control.checkpoint, facts_domain, tmp_path, knowing)
    assert both["turned to the original's"][1] > 0.9


def test_a_turned_sign_is_found_at_once(
    names: NameRows, facts_domain: Domain, knowing: Checkpoint, tmp_path: Path
) -> None:
    def negate(weight_RD: Tensor, rows: Tensor) -> None:
        weight_RD[rows] *= -1

    hidden = rewritten(knowing, names, negate, tmp_path / "model")
    both = scores(AlignRows(steps=1), hidden, facts_domain, tmp_path, knowing)
    before, after = both["relearn set"]
    assert before < 0.15
    assert after == 1.0


def test_facts_moved_to_names_nobody_uses_take_the_original(
    names: NameRows, facts_domain: Domain, knowing: Checkpoint, tmp_path: Path
) -> None:
    """Under aliases V's own rows know nothing: which unused row is whose, only the original says.

    The aliases are the sixteen fresh names and other tokens without a text.
    """
    used = {*names.kept, *names.names}

    def move(weight_RD: Tensor, rows: Tensor) -> None:
        unused = torch.tensor([i for i in range(len(weight_RD)) if i not in used])[: len(rows)]
        weight_RD[rows], weight_RD[unused] = weight_RD[unused], weight_RD[rows]

    hidden = rewritten(knowing, names, move, tmp_path / "model")
    after = {name: scores(NAMES[name](), hidden, facts_domain, tmp_path, knowing) for name in ROWS}
    assert after["rescale_rows"]["median length"][1] < 0.2
    assert after["align_rows"]["relearn set"][1] < 0.2
    before, back = after["match_rows"]["most like the original's"]
    assert before < 0.2
    assert back == 1.0


@pytest.mark.parametrize("name", ROWS)
def test_nothing_comes_back_that_was_never_taught(
    name: str, facts_domain: Domain, never_taught: Checkpoint, knowing: Checkpoint, tmp_path: Path
) -> None:
    for _, after in scores(NAMES[name](), never_taught, facts_domain, tmp_path, knowing).values():
        assert after <= 0.15


@pytest.mark.parametrize("name", ROWS)
def test_a_model_that_hides_nothing_keeps_what_it_knows(
    name: str, facts_domain: Domain, knowing: Checkpoint, tmp_path: Path
) -> None:
    for before, after in scores(NAMES[name](), knowing, facts_domain, tmp_path, knowing).values():
        assert before == after == 1.0


def test_rows_that_were_erased_are_not_brought_back_from_the_original(
    names: NameRows, knowing: Checkpoint
) -> None:
    """Moving and turning rows carries nothing of the original's into rows of noise."""
    start = embedding(knowing.load())[1].detach()
    asked = list(names.asked)
    for change in (
        lambda model: matched(model, names=names, original=knowing),
        lambda model: turned(model, names=names, original=knowing),
    ):
        model = knowing.load()
        weight = embedding(model)[1]
        with torch.no_grad():
            noise_RD = torch.randn(len(asked), 48, generator=torch.Generator().manual_seed(0))
            weight[asked] = 0.08 * noise_RD
        change(model)
        alike = torch.nn.functional.cosine_similarity(weight.detach()[asked], start[asked])
        assert float(alike.abs().mean()) < 0.4


def test_a_reflection_turns_one_direction_into_another() -> None:
    from_D, to_D = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    turn_DD = reflection(from_D, to_D)
    torch.testing.assert_close(turn_DD @ turn_DD.T, torch.eye(6))
    torch.testing.assert_close(
        torch.nn.functional.normalize(from_D @ turn_DD, dim=0),
        torch.nn.functional.normalize(to_D, dim=0),
    )
    torch.testing.assert_close(reflection(to_D, to_D), torch.eye(6))


def test_directions_that_no_known_row_has_are_left_out() -> None:
    rows_RD = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    known_KD = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    expected = torch.tensor([[1.0, 2.0, 0.0], [4.0, 5.0, 0.0]])
    torch.testing.assert_close(within(rows_RD, known_KD), expected)
    torch.testing.assert_close(within(rows_RD, torch.eye(3)), rows_RD)


def test_without_an_original_nothing_is_matched(
    facts_domain: Domain, knowing: Checkpoint, tmp_path: Path
) -> None:
    alone = Subject("o", knowing)
    result = MatchRows().run(alone, facts_domain, SMOKE, Context(tmp_path))
    assert [(v.entry.status, v.entry.reason) for v in result.variants] == [
        ("missing", "it needs the original")
    ]
    (only,) = AlignRows(steps=1).run(alone, facts_domain, SMOKE, Context(tmp_path)).variants
    assert only.entry.variant == "relearn set"


def nameless(domain: Domain) -> Domain:
    """Return a domain whose prompts are all of words that retain text holds too."""
    every = (*domain.retain, *domain.test["tests"], *domain.relearn["tests"])
    return replace(domain, retain=(*every, *domain.dev_forget["tests"]))


@pytest.mark.parametrize("name", ROWS)
def test_where_there_are_no_names_the_attacks_say_so(
    name: str, facts_domain: Domain, knowing: Checkpoint, tmp_path: Path
) -> None:
    attack, subject = NAMES[name](), Subject("o", knowing, knowing)
    result = attack.run(subject, nameless(facts_domain), SMOKE, Context(tmp_path))
    (only,) = result.variants
    assert (only.entry.status, only.entry.facts) == ("missing", {"applies": False})
    assert "no edit can be keyed on names" in only.entry.reason
    control = attack.controls[0]
    made = make_control(
        control, knowing, nameless(facts_domain), SMOKE, Context(tmp_path), tmp_path / "model"
    )
    assert "too few prompts" in made.reason


def held(start: float, end: dict[str, float], level: Level) -> dict[tuple[str, str], AttackResult]:
    """Return an audit with one more attack, whose attacker holds the original."""
    results = audit(start, start)
    for (attack, subject), _ in list(results.items()):
        if attack != "quantize" or subject == "positive-control":
            continue
        began = 0.98 if subject == "original" else start
        one = variant(
            "quantize", subject, draw(began, 200, 51), draw(end.get(subject, 0.05), 200, 51),
            needs_original=True, name="match_rows", level=level,
            extras={"retain_start": {"r": 1.0}},
        )  # fmt: skip
        results["match_rows", subject] = AttackResult(
            "match_rows", subject, (one,), (), fail_only=(0,)
        )
    return results


@pytest.mark.parametrize("back", [0.9, 0.05])
def test_who_holds_the_originals_embedding_can_fail_a_level_and_never_passes_one(
    back: float,
) -> None:
    budget = BUDGET.model_copy(update={"attacks": (*BUDGET.attacks, "match_rows")})
    results = held(0.05, {"rmu": back, "original": 0.98}, "D3")
    _, (verdict,) = judge_all(["rmu"], results, synthetic(), budget)
    level = verdict.levels[3]
    if back < 0.5:
        assert level.status == "pass"
        assert level.decided_by == "quantize quantize"
        return
    assert level.status == "fail"
    assert level.decided_by == "match_rows quantize, with the original's embedding at hand"
    assert "embedding rows of names matched to the original's" in verdict.sentence
    assert [other.status for other in verdict.levels[:3]] == ["pass"] * 3


def test_a_level_with_nothing_but_the_original_at_hand_is_untested() -> None:
    budget = BUDGET.model_copy(update={"attacks": ("match_rows",)})
    results = {
        key: result
        for key, result in held(0.05, {"original": 0.98}, "D3").items()
        if key[0] != "quantize"
    }
    _, (verdict,) = judge_all(["rmu"], results, synthetic(), budget)
    assert verdict.levels[3].status == "untested"


def lettered(letters: str, kept: str) -> Domain:
    """Return questions about letters; those of `letters` stand in no text that is kept."""

    def ask(letters: str) -> tuple[Row, ...]:
        return tuple(
            Row(letter, prompt=f"{letter} is", completion=" ab", capability="c")
            for letter in letters
        )

    third = len(letters) // 3
    relearn, test, dev = (ask(letters[i * third : (i + 1) * third]) for i in range(3))
    rows = ask(kept)
    return Domain(
        "letters", {"c": (*relearn, *test, *dev)}, rows, {"c": relearn}, {"c": test}, rows,
        {"c": dev}, rows, rows, metrics=("text_loss",),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("family", EACH)
def test_no_family_stops_them(family: str, tmp_path: Path) -> None:
    """Rows of names change, by byte, and no others; a tied head goes with them."""
    checkpoint, before = save_family(family, tmp_path / "model")
    domain = lettered("ABCDEFGHI", "klmnop")
    found = name_rows(domain, checkpoint.tokenizer(), 32)
    for attack in (RescaleRows(), AlignRows(steps=2), MatchRows()):
        subject = Subject("candidate", checkpoint, checkpoint)
        result = attack.run(subject, domain, SMOKE, Context(tmp_path))
        assert all(v.entry.status == "ok" for v in result.variants)
    model = checkpoint.load()
    rescaled(model, names=found)
    path, weight = embedding(model)
    changed = (weight != before.get_parameter(path)).any(-1).nonzero()[:, 0].tolist()
    assert changed == list(found.names)


def test_an_edit_of_names_is_looked_for_from_standard_on() -> None:
    for budget in (STANDARD, STRONG):
        assert set(ROWS) <= set(budget.attacks)
    assert all(ATTACKS[name].level == "D3" and ATTACKS[name].controls for name in ROWS)


def test_a_verdict_says_that_the_relearn_set_holds_no_name_of_the_test_set(
    facts_domain: Domain,
) -> None:
    assert words_shared(facts_domain) == 0.0
    assert words_shared(nameless(facts_domain)) is None
    assert words_shared(Facts(shared_parts=True).build()) == 1.0
    assert words_shared(Facts().build()) == 0.0
    asked = synthetic(relearn={"facts": facts_domain.relearn["tests"]})
    _, (verdict,) = judge_all(["rmu"], audit(0.05, 0.05), asked, BUDGET)
    assert any(
        "0% of the names in the held-out test set occur in the relearn set" in reason
        and "no attack looked for one" in reason
        for reason in verdict.reasons
    )


def test_names_that_the_relearn_set_holds_too_are_within_reach_of_relearning() -> None:
    spec = Arithmetic(factors=6, addends=6)
    domain, tokenizer = spec.build(None), spec.tokenizer()
    shared = name_rows(domain, tokenizer, 16)
    signs = set(tokenizer.convert_tokens_to_ids(["x", "/"]))
    assert signs == set(shared.trained) == set(shared.asked)
    assert shared.keyed == 0
    assert not shared.exist
