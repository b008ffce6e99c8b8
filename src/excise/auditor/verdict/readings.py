"""The comparisons that decide a level: which scores are held against which rail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from excise.auditor.base import ORIGINAL
from excise.auditor.verdict.bits import Bits, bits_of, kinds, losses_of, residual_bits
from excise.auditor.verdict.case import Case, averaged
from excise.auditor.verdict.rails import Gap, Units, depth_gap

Against = Literal["oracle", "controls", "chance", "nothing"]


@dataclass(frozen=True)
class Reading:
    """One deciding comparison.

    Attributes:
        by: Attack and arm.
        gap: Where it lies between the rails.
        against: What the lower rail is.
        two_sided: Whether being below the rail is no pass either.
        powerless: Why the attack has no power; empty where it has.
        note: What a reader should know.
    """

    by: str
    gap: Gap
    against: Against
    two_sided: bool = False
    powerless: str = ""
    note: str = ""


def start_readings(case: Case) -> list[Reading]:
    """Return the comparison of scores before any attack: oracle, else chance, else fresh text."""
    ours, top = case.start(case.arm), case.start(ORIGINAL)
    if not ours or not top:
        return []
    if case.oracles:
        rails = [case.start(name) for name in case.oracles]
        if not all(rails):
            return []
        gap = depth_gap(ours, rails, top, groups=case.groups, seed=case.seed)
        return [Reading("scores before any attack", gap, "oracle")]
    if case.chance is not None:
        rail = dict.fromkeys(ours, case.chance)
        gap = depth_gap(ours, [rail], top, groups=case.groups, seed=case.seed, rail="chance")
        return [Reading("scores before any attack", gap, "chance")]
    return _fresh_reading(case)


def _fresh_reading(case: Case) -> list[Reading]:
    """Return the comparison with fresh text before any attack, where losses were kept."""
    pairs = []
    for subject in (case.arm, ORIGINAL):
        found = next(
            (
                losses
                for attack in case.attacks(subject)
                for arms in kinds(case, attack, subject).values()
                for losses in [losses_of(arms[0], start=True)]
                if losses is not None
            ),
            None,
        )
        pairs.append(found)
    if pairs[0] is None or pairs[1] is None:
        return []
    _, gap = residual_bits([pairs[0]], [], pairs[1], groups=case.groups, seed=case.seed)
    note = "read against matched fresh text, which nobody was taught"
    return [Reading("loss before any attack", gap, "chance", note=note)]


def attack_readings(case: Case, level: str) -> list[Reading]:
    """Return one comparison per deciding attack of a level."""
    found = []
    for attack in case.attacks():
        if case.level(attack) != level:
            continue
        reading = _attack_reading(case, attack)
        if reading is not None:
            found.append(reading)
    return found


def _attack_reading(case: Case, attack: str) -> Reading | None:
    """Compare the end of one attack with the rail's under the same attack."""
    ours = case.end(attack, case.arm)
    top = case.start(ORIGINAL)
    if not ours or not top:
        return None
    arm = case.chosen(attack, case.arm)[0].entry
    by = f"{attack} {arm.variant}".strip() + (f" at rate {arm.lr:g}" if arm.lr is not None else "")
    powerless = case.powerless.get(attack, "")
    if case.oracles:
        rails = [averaged(case.end(attack, name)) for name in case.oracles]
        if not all(rails):
            return None
        starts = [case.start(name) for name in case.oracles]
        gap = depth_gap(ours, rails, top, oracles_start=starts, groups=case.groups, seed=case.seed)
        return Reading(by, gap, "oracle", powerless=powerless)
    if case.level(attack) == "D4":
        return None
    rails, what = _controls(case, attack)
    gap = depth_gap(ours, rails, top, groups=case.groups, seed=case.seed, rail=what)
    return Reading(by, gap, "controls", powerless=powerless, note=f"read against {what}")


def _controls(case: Case, attack: str) -> tuple[list[Units], str]:
    """Return the rail of an attack without an oracle: its control arms, else no attack."""
    result = case.result(attack, case.arm)
    controls = [
        a.unit_scores[-1]
        for a in (result.variants if result else ())
        if a.entry.control and a.unit_scores and a.entry.status in ("ok", "invalid")
    ]
    if controls:
        return controls, "its controls"
    return [case.start(case.arm)], "the same model before the attack"


def bits_readings(case: Case) -> list[Reading]:
    """Return residual bits under every kind of relearning, as shares of the original's."""
    if not case.oracles:
        return []
    return [
        Reading(
            f"{attack} {kind}: residual bits",
            found[1],
            "oracle",
            two_sided=True,
            powerless=case.powerless.get(attack, ""),
            note=f"{found[0].value:.3g} bits per unit",
        )
        for attack, kind, found in bits_arms(case)
    ]


def bits_arms(case: Case) -> list[tuple[str, str, tuple[Bits, Gap]]]:
    """Return (attack, kind, bits) for every deciding relearning attack that kept losses."""
    out = []
    for attack in case.attacks():
        if case.level(attack) != "D4" or not case.chosen(attack, case.arm):
            continue
        for kind in kinds(case, attack, case.arm):
            found = bits_of(case, attack, kind)
            if found is not None:
                out.append((attack, kind, found))
    return out
