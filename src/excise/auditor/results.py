"""Results of attacks as JSON, and the choice of the arms that decide."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from excise.auditor.base import ArmResult, AttackResult
from excise.core.errors import UserError
from excise.record import AttackArm


def arm_to_json(arm: ArmResult) -> dict[str, Any]:
    """Return an arm as plain data."""
    return {
        "arm": arm.arm.model_dump(mode="json"),
        "unit_scores": [dict(scores) for scores in arm.unit_scores],
        "dev_score": arm.dev_score,
        "extras": dict(arm.extras),
    }


def arm_from_json(data: dict[str, Any]) -> ArmResult:
    """Undo `arm_to_json`."""
    return ArmResult(
        arm=AttackArm.model_validate(data["arm"]),
        unit_scores=tuple(data["unit_scores"]),
        dev_score=data["dev_score"],
        extras=data["extras"],
    )


def to_json(result: AttackResult) -> str:
    """Return a result as JSON text; not-a-number is written as `NaN`, which Python reads."""
    data = {
        "attack": result.attack,
        "subject": result.subject,
        "arms": [arm_to_json(arm) for arm in result.arms],
        "chosen": list(result.chosen),
        "seconds": result.seconds,
    }
    return json.dumps(data) + "\n"


def from_json(text: str, where: str = "a stored result") -> AttackResult:
    """Undo `to_json`.

    Args:
        text: What `to_json` wrote.
        where: Named in the error.

    Returns:
        The result.

    Raises:
        UserError: If the text is damaged.
    """
    try:
        data = json.loads(text)
        return AttackResult(
            attack=data["attack"],
            subject=data["subject"],
            arms=tuple(arm_from_json(arm) for arm in data["arms"]),
            chosen=tuple(data["chosen"]),
            seconds=data["seconds"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is damaged ({error}); delete its folder and run again") from None


def renamed(result: AttackResult, subject: str) -> AttackResult:
    """Return the same result about a subject of another name: equal weights, attacked once."""
    arms = tuple(
        replace(arm, arm=arm.arm.model_copy(update={"subject": subject})) for arm in result.arms
    )
    return replace(result, subject=subject, arms=arms)


def choose(arms: Sequence[ArmResult], *, higher: bool) -> tuple[int, ...]:
    """Pick the variant that decides, on `dev`, averaged over seeds; never the best seed.

    Arms of one variant share everything but the seed. Controls, arms that hold the original
    and arms that are not ok never decide. Equal scores are settled by the loss on dev, where an
    arm recorded it (`extras["dev_loss"]`), then by order.

    Args:
        arms: All arms of one attack on one subject.
        higher: Whether a higher score means more knowledge.

    Returns:
        Indices of the arms of the winning variant, one per seed.
    """
    variants: dict[tuple[str, float | None], list[int]] = {}
    for i, arm in enumerate(arms):
        if arm.arm.control or arm.arm.needs_original or arm.arm.status != "ok":
            continue
        variants.setdefault((arm.arm.arm, arm.arm.lr), []).append(i)

    def gain(indices: list[int]) -> tuple[float, float]:
        scores = [arms[i].dev_score for i in indices]
        losses = [float(arms[i].extras.get("dev_loss", math.nan)) for i in indices]
        score, loss = sum(scores) / len(scores), sum(losses) / len(losses)
        signed = score if higher else -score
        return (
            signed if math.isfinite(signed) else -math.inf,
            -loss if math.isfinite(loss) else -math.inf,
        )

    if not variants:
        return ()
    best = max(variants, key=lambda variant: gain(variants[variant]))
    return tuple(variants[best])


def decided(
    arms: Sequence[ArmResult], *, higher: bool
) -> tuple[tuple[ArmResult, ...], tuple[int, ...]]:
    """Mark the arms that decide; see `choose`.

    Returns:
        All arms, `decisive` set on the chosen ones, and the indices of those.
    """
    chosen = choose(arms, higher=higher)
    marked = tuple(
        replace(arm, arm=arm.arm.model_copy(update={"decisive": i in chosen}))
        for i, arm in enumerate(arms)
    )
    return marked, chosen
