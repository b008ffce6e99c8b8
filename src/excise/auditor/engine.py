"""The audit: every attack on every subject, each pair a stage of its own.

One procedure runs on candidate, reference models and positive control alike. What an attack does
to a model is kept by the model's bytes, so that reference models are shared between runs, equal
weights are attacked once, and a killed audit resumes. Attacks that train are cut further, one
stage a training, and two attacks that read one training share it. A model that resists every
training gets those of an informed attacker in a second round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from excise.auditor.attacks import ATTACKS
from excise.auditor.base import (
    ORIGINAL,
    POSITIVE_CONTROL,
    Attack,
    AttackResult,
    Results,
    Subject,
    name_of,
)
from excise.auditor.budget import LARGE, Budget
from excise.auditor.controls.control import Control, MakeControl, PositiveControl, in_order
from excise.auditor.evaluation_set import dev_is_higher, more_is_known
from excise.auditor.results import (
    RECOVERED,
    SHORT,
    absent,
    from_json,
    mean_curve,
    renamed,
    share_back,
    to_json,
)
from excise.auditor.tuning import Training, TrainingAttack, TrainingResult, possible
from excise.core.context import Context, Stage
from excise.core.disk import write_text
from excise.core.errors import UserError, nearest
from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.models.checkpoint import Checkpoint
from excise.train.pool import Pool


@dataclass(frozen=True)
class AttackModel(Stage[AttackResult]):
    """One attack on one model.

    Attributes:
        attack: The attack.
        checkpoint: The model.
        original: The model before removal, for what an attack reports beside; None if unknown.
        domain: Rows by role.
        budget: How hard to try, as `Budget.for_attack` gives it.
        seed: Seed of the audit.
    """

    version: ClassVar[int] = 3

    attack: Attack
    checkpoint: Checkpoint
    original: Checkpoint | None
    domain: Domain
    budget: Budget
    seed: int

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return f"attack-{name_of(self.attack)}"

    def make(self, ctx: Context) -> None:
        """Attack the model and write the result."""
        subject = Subject("subject", self.checkpoint, self.original)
        result = self.attack.run(subject, self.domain, self.budget, ctx)
        write_text(ctx.work / "result.json", to_json(result))

    def read(self, folder: Path) -> AttackResult:
        """Return the result."""
        text = (folder / "result.json").read_text(encoding="utf-8")
        return from_json(text, str(folder))


@dataclass(frozen=True)
class TrainModel(Stage[TrainingResult]):
    """One training of an attack on one model.

    Attributes:
        attack: The attack that trains.
        training: Which of its trainings.
        checkpoint: The model.
        domain: Rows by role.
        budget: How hard to try, as `Budget.for_training` gives it.
        seed: Seed of the audit.
    """

    version: ClassVar[int] = 3

    attack: TrainingAttack
    training: Training
    checkpoint: Checkpoint
    domain: Domain
    budget: Budget
    seed: int

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return f"attack-{name_of(self.attack)}"

    def make(self, ctx: Context) -> None:
        """Train the model and write what was scored on the way."""
        subject = Subject("subject", self.checkpoint)
        result = self.attack.train(self.training, subject, self.domain, self.budget, ctx)
        write_text(ctx.work / "trained.json", json.dumps(result.to_json()) + "\n")

    def read(self, folder: Path) -> TrainingResult:
        """Return what was scored."""
        text = (folder / "trained.json").read_text(encoding="utf-8")
        return TrainingResult.from_json(json.loads(text))


AttackStage = AttackModel | TrainModel
"""What one worker does."""


def chosen_attacks(budget: Budget, attacks: Sequence[Attack] = ()) -> tuple[Attack, ...]:
    """Return the attacks of an audit.

    Args:
        budget: Names what is required.
        attacks: Attacks with settings of their own; they replace those of the same name.

    Returns:
        Every required attack once, then what was given beyond.

    Raises:
        UserError: If the budget requires an attack nobody knows.
    """
    given = {name_of(attack): attack for attack in attacks}
    required: dict[str, Attack] = {}
    for name in budget.attacks:
        if name not in given and name not in ATTACKS:
            raise UserError(f"the budget requires the attack '{name}'; {nearest(name, ATTACKS)}")
        required[name] = given[name] if name in given else ATTACKS[name]()
    return tuple({**required, **given}.values())


def attack_all(
    subjects: Sequence[Subject],
    domain: Domain,
    budget: Budget,
    seed: int,
    runtime: Runtime,
    pool: Pool,
    *,
    attacks: Sequence[Attack] = (),
    controls: bool = True,
) -> Results:
    """Run every attack on every subject and on the positive controls.

    Args:
        subjects: Candidates, original, oracles; each has a name of its own.
        domain: Rows by role.
        budget: How hard to try, and which attacks are required.
        seed: Seed of the attacks.
        runtime: Where stages are kept.
        pool: Worker processes; its `emit` gets the progress.
        attacks: Attacks with settings of their own, beside or in place of the budget's.
        controls: Whether to make positive controls, which needs the original.

    Returns:
        Results by attack and subject; the control's subject is `POSITIVE_CONTROL`. What could not
        run is there as a variant that says why.
    """
    wanted = chosen_attacks(budget, attacks)
    pairs = [(attack, subject) for attack in wanted for subject in subjects]
    original = next((s.checkpoint for s in subjects if s.name == ORIGINAL), None)
    original = original or next((s.original for s in subjects if s.original), None)
    by_attack: dict[Attack, Control] = {}
    budgets: dict[Attack, Budget] = {}
    if controls and original is not None:
        by_attack = _controls(wanted, original, domain, budget, seed, runtime, pool)
        hiding = _on_controls(wanted, by_attack, original)
        budgets = _long_enough(hiding, by_attack, domain, budget, seed, runtime, pool)
        pairs += hiding
    stages = {pair: _stages(*pair, domain, budgets.get(pair[0], budget), seed) for pair in pairs}
    reasons = _run(stages, budget, runtime, pool)
    for _ in range(min(budget.doublings, FOR_THE_SLOW)):
        slow = _slow(stages, reasons, runtime)
        if not slow:
            break
        reasons |= _run(slow, budget, runtime, pool)
        stages |= slow
    further = _further(stages, reasons, runtime)
    reasons |= _run(further, budget, runtime, pool)
    for pair, parts in further.items():
        # An adapter that a family cannot have fails alone: what was trained before stands.
        stages[pair] += tuple(part for part in parts if not reasons[runtime.path(part)])
    results: dict[tuple[str, str], AttackResult] = {}
    for attack, subject in pairs:
        result = _collect(stages[attack, subject], attack, subject, domain, reasons, runtime)
        if subject.name == POSITIVE_CONTROL:
            result = _with_control(result, by_attack[attack])
        results[name_of(attack), subject.name] = result
    for attack in wanted:
        if controls and (name_of(attack), POSITIVE_CONTROL) not in results:
            control = by_attack.get(attack, NO_ORIGINAL)
            results[name_of(attack), POSITIVE_CONTROL] = absent(
                attack, POSITIVE_CONTROL, "missing", control.reason
            )
    return results


FOR_THE_SLOW = 2
"""How often the steps of a candidate that learns less than the oracles are doubled at most."""

NO_ORIGINAL = Control(
    "none", None, float("nan"), reason="there is no original to make a positive control of"
)
UNDECLARED = Control(
    "none", None, float("nan"), reason="the attack declares no positive control that suits"
)


def _on_controls(
    attacks: Sequence[Attack], controls: Mapping[Attack, Control], original: Checkpoint
) -> list[tuple[Attack, Subject]]:
    """Return attacks with the positive controls they are to undo, where those hide."""
    return [
        (attack, Subject(POSITIVE_CONTROL, control.checkpoint, original))
        for attack in attacks
        if (control := controls[attack]).hides and control.checkpoint is not None
    ]


def _long_enough(
    pairs: Sequence[tuple[Attack, Subject]],
    controls: Mapping[Attack, Control],
    domain: Domain,
    budget: Budget,
    seed: int,
    runtime: Runtime,
    pool: Pool,
) -> dict[Attack, Budget]:
    """Return the budgets of attacks that have to train longer than the budget begins with.

    Positive controls are attacked before anything else. While an attack that trains brings back too
    little of what its own hides, its steps are doubled, `budget.doublings` times at most: a length
    that is found without a look at any candidate. Attacks that read the same trainings keep the
    same length.

    Args:
        pairs: Attacks with the positive controls they are to undo.
        controls: Those controls, for what the original scored.
        domain: Rows by role.
        budget: Steps to begin with.
        seed: Seed of the attacks.
        runtime: Where stages are kept.
        pool: Worker processes.
    """
    short = [(a, s) for a, s in pairs if isinstance(a, TrainingAttack)]
    longer: dict[Attack, Budget] = {}
    cut = budget
    for _ in range(budget.doublings):
        stages: dict[tuple[Attack, Subject], tuple[AttackStage, ...]] = {
            pair: _stages(*pair, domain, cut, seed) for pair in short
        }
        reasons = _run(stages, budget, runtime, pool)
        weak = {
            attack.shared
            for attack, subject in short
            if _undone(
                _collect(stages[attack, subject], attack, subject, domain, reasons, runtime),
                controls[attack],
            )
            < RECOVERED
        }
        short = [(attack, subject) for attack, subject in short if attack.shared in weak]
        cut = cut.doubled()
        longer |= {attack: cut for attack, _ in short}
    return longer


def _undone(result: AttackResult, control: Control) -> float:
    """Return which share of what a positive control hides an attack brought back.

    All of it for an attack that decides nothing, or failed: more steps would not help.
    """
    back = share_back(control.before, mean_curve([result.variants[i] for i in result.chosen]))
    return 1.0 if back is None else back


def _controls(
    attacks: Sequence[Attack],
    original: Checkpoint,
    domain: Domain,
    budget: Budget,
    seed: int,
    runtime: Runtime,
    pool: Pool,
) -> dict[Attack, Control]:
    """Make the controls that the attacks declare, each once; the first that hides is used."""
    higher = more_is_known(domain)
    large = original.num_parameters >= LARGE
    needed = {attack: in_order(attack.controls, higher=higher, large=large) for attack in attacks}
    jobs = [
        (runtime, [MakeControl(c, original, domain, budget.for_attack(), seed) for c in kinds])
        for kinds in dict.fromkeys(needed.values())
        if kinds
    ]
    for _, stages in jobs:
        for stage in stages:
            text = f"positive control {in_words(stage.control)}"
            pool.emit("label", {"stage": runtime.path(stage).name, "label": text})
    # Where memory is short, they take turns: all but a gate hold gradients.
    turns = [i % budget.together if budget.together else None for i in range(len(jobs))]
    by_kinds: dict[tuple[PositiveControl, ...], Control] = {(): UNDECLARED}
    for (_, stages), control in zip(jobs, pool.map(first_that_hides, jobs, turns=turns)):
        by_kinds[tuple(stage.control for stage in stages)] = control
        facts = {"kind": control.name, "hides": control.hides, "reason": control.reason}
        pool.emit("control", facts)
    return {attack: by_kinds[kinds] for attack, kinds in needed.items()}


def in_words(control: PositiveControl) -> str:
    """Return the name of a control and what of it is not by default: `password_lock filler`."""
    fields = type(control).model_fields
    changed = [str(value) for name, value in control if value != fields[name].default]
    return " ".join([control.name, *changed])


def first_that_hides(job: tuple[Runtime, Sequence[MakeControl]]) -> Control:
    """Return the first control that hides, each a stage; the last one tried if none does."""
    runtime, stages = job
    control = UNDECLARED
    for stage in stages:
        control = runtime.run(stage)
        if control.hides:
            break
    return control


def lengths(results: Results, budget: Budget) -> list[str]:
    """Say which attacks trained longer than their budget begins with, one sentence each.

    Args:
        results: Results by attack and subject.
        budget: The budget of the audit.
    """
    trained = {
        pair: max((v.entry.facts.get("steps", 0) for v in result.variants), default=0)
        for pair, result in results.items()
    }
    said = {}
    for (attack, subject), steps in trained.items():
        usual = max(trained.get((attack, each), 0) for each in (ORIGINAL, POSITIVE_CONTROL))
        if usual > budget.steps:
            said[attack, ""] = (
                f"{attack} trained every model for {usual} steps: {usual // 2} brought back less "
                f"than {RECOVERED:.0%} of what its positive control hides"
            )
        if steps > max(usual, budget.steps):
            said[attack, subject] = (
                f"{attack} trained {subject} for {steps} steps: in {steps // 2} it learned less of "
                "the relearn set than the oracles in theirs"
            )
    return list(said.values())


def _stages(
    attack: Attack, subject: Subject, domain: Domain, budget: Budget, seed: int
) -> tuple[AttackStage, ...]:
    """Return the stages of one attack on one subject."""
    model = subject.checkpoint
    if not isinstance(attack, TrainingAttack):
        return (AttackModel(attack, model, subject.original, domain, budget.for_attack(), seed),)
    # Fresh units ask whether the budget teaches; models that people use answer that.
    trainings = [
        training
        for training in possible(attack.trainings(budget), domain)
        if training.on != "fresh" or subject.name != POSITIVE_CONTROL
    ]
    return tuple(
        TrainModel(attack.shared, training, model, domain, budget.for_training(), seed)
        for training in trainings
    )


def _slow(
    stages: Mapping[tuple[Attack, Subject], Sequence[AttackStage]],
    reasons: Mapping[Path, str],
    runtime: Runtime,
) -> dict[tuple[Attack, Subject], tuple[AttackStage, ...]]:
    """Return relearning of twice the steps, for candidates that learned less than the oracles did.

    Who was never taught may be slow to learn, who resists being taught hides what he knows: until
    a candidate has learned as much of the relearn set as the oracles, it was not attacked.

    Args:
        stages: Stages by attack and subject, all run.
        reasons: Why some failed.
        runtime: Where stages are kept.

    Returns:
        The stages of such candidates, longer ones in place of those on the relearn set.
    """
    learned: dict[tuple[Attack, Subject], float] = {}
    for (attack, subject), parts in stages.items():
        if attack.level != "D4":
            continue
        paths = {runtime.path(part): part for part in parts if _teaches(part)}
        read = [part.read(path) for path, part in paths.items() if not reasons[path]]
        shares = [one.learned for one in read if isinstance(one, TrainingResult) and not one.broke]
        if shares:
            learned[attack, subject] = max(shares)
    slow: dict[tuple[Attack, Subject], tuple[AttackStage, ...]] = {}
    for (attack, subject), share in learned.items():
        if subject.name.startswith("oracle") or subject.name in (ORIGINAL, POSITIVE_CONTROL):
            continue
        oracles = [
            v for (a, s), v in learned.items() if a == attack and s.name.startswith("oracle")
        ]
        if oracles and share < min(*oracles, 1.0) - SHORT:
            slow[attack, subject] = tuple(
                replace(part, budget=part.budget.doubled()) if _teaches(part) else part
                for part in stages[attack, subject]
            )
    return slow


def _teaches(part: AttackStage) -> bool:
    """Return whether a stage trains a model on the whole relearn set, at settings of the budget."""
    if not isinstance(part, TrainModel):
        return False
    training = part.training
    return training.on == "relearn" and not training.examples and not training.trial


def _further(
    stages: Mapping[tuple[Attack, Subject], Sequence[AttackStage]],
    reasons: Mapping[Path, str],
    runtime: Runtime,
) -> dict[tuple[Attack, Subject], tuple[TrainModel, ...]]:
    """Return what an informed attacker trains beside, for subjects that resist every training."""
    more: dict[tuple[Attack, Subject], tuple[TrainModel, ...]] = {}
    for (attack, subject), parts in stages.items():
        trained = [part for part in parts if isinstance(part, TrainModel)]
        paths = [runtime.path(part) for part in trained]
        if not isinstance(attack, TrainingAttack) or any(reasons.get(path) for path in paths):
            continue
        results = [part.read(path) for part, path in zip(trained, paths, strict=True)]
        further = attack.further(results)
        if further:
            more[attack, subject] = tuple(replace(trained[0], training=one) for one in further)
    return more


def _run(
    stages: Mapping[tuple[Attack, Subject], Sequence[AttackStage]],
    budget: Budget,
    runtime: Runtime,
    pool: Pool,
) -> dict[Path, str]:
    """Run every stage once, trainings first because they take longest; return why some failed."""
    by_path: dict[Path, tuple[AttackStage, str]] = {}
    for (_, subject), parts in stages.items():
        for stage in parts:
            by_path.setdefault(runtime.path(stage), (stage, subject.name))
    for path, (stage, name) in by_path.items():
        what = stage.training if isinstance(stage, TrainModel) else name_of(stage.attack)
        text = f"{what} on {name}"
        pool.emit("label", {"stage": path.name, "label": text, "counted": True})
    ordered = sorted(by_path, key=lambda path: not isinstance(by_path[path][0], TrainModel))
    done = 0

    def on_done(i: int, reason: str) -> None:
        nonlocal done
        done += 1
        stage, subject = by_path[ordered[i]]
        facts = {"attack": name_of(stage.attack), "subject": subject}
        pool.emit("attack", {**facts, "done": done, "of": len(ordered), "reason": reason})

    jobs = [(runtime, by_path[path][0]) for path in ordered]
    turns = turns_of([stage for _, stage in jobs], budget.together)
    return dict(zip(ordered, pool.map(attempt, jobs, on_done, turns=turns), strict=True))


def attempt(job: tuple[Runtime, AttackStage]) -> str:
    """Run a stage, or find it done; return why it failed, or nothing.

    What a user can cause (a role without rows, a text without tokens) fails the attack and not
    the audit; it is not kept, so that the next run tries again.
    """
    runtime, stage = job
    try:
        runtime.make(stage)
    except UserError as error:
        return str(error)
    return ""


def turns_of(stages: Sequence[AttackStage], together: int) -> list[int | None]:
    """Return whose turn each stage waits for: heavy ones take as many as may run at once.

    What holds optimizer states is heavy: attacks on weights, unless they say they are light.

    Args:
        stages: In the order in which they start.
        together: Heavy stages at the same time at most, 0 for any number.
    """
    turns: list[int | None] = []
    count = 0
    for stage in stages:
        if not together or stage.attack.light or stage.attack.access != "weights":
            turns.append(None)
            continue
        turns.append(count % together)
        count += 1
    return turns


def _collect(
    stages: Sequence[AttackStage],
    attack: Attack,
    subject: Subject,
    domain: Domain,
    reasons: Mapping[Path, str],
    runtime: Runtime,
) -> AttackResult:
    """Read one pair's stages back."""
    paths = [runtime.path(stage) for stage in stages]
    why = next((reasons[path] for path in paths if reasons[path]), "")
    if why:
        return absent(attack, subject.name, "failed", why)
    if isinstance(attack, TrainingAttack):
        trained = [
            stage.read(path)
            for stage, path in zip(stages, paths, strict=True)
            if isinstance(stage, TrainModel)
        ]
        return attack.conclude(trained, subject, dev_is_higher(domain))
    (stage,) = stages
    assert isinstance(stage, AttackModel)
    return renamed(stage.read(paths[0]), subject.name)


def _with_control(result: AttackResult, control: Control) -> AttackResult:
    """Note in every variant which control was attacked and how well it hides."""
    facts = {"positive_control": control.name, "known": control.before, "hidden": control.after}
    variants = tuple(
        replace(one, entry=one.entry.model_copy(update={"facts": {**one.entry.facts, **facts}}))
        for one in result.variants
    )
    return replace(result, variants=variants)
