"""Results of attacks whose truth is known by construction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from excise.auditor.base import AttackResult, VariantResult
from excise.auditor.budget import Budget
from excise.data.domain import Domain, Row
from excise.record import AttackVariant, CurvePoint

LEVELS = {"few_shot": "D1", "direction": "D2", "quantize": "D3", "transfer": "D4"}
ACCESS = {"few_shot": "prompt", "direction": "activations"}
BUDGET = Budget(attacks=tuple(LEVELS), margin=0.1)


def draw(share: float, count: int, seed: int) -> dict[str, float]:
    """Return right and wrong answers, an exact share of them right, in a drawn order."""
    right = round(share * count)
    values = np.array([1.0] * right + [0.0] * (count - right))
    np.random.default_rng(seed).shuffle(values)
    return {f"u{i}": float(v) for i, v in enumerate(values)}


def nats(mean: float, count: int, seed: int, prefix: str) -> dict[str, float]:
    """Return losses by unit around a mean."""
    noise = np.random.default_rng(seed).normal(0, 0.2, count)
    return {f"{prefix}{i}": float(mean + v - noise.mean()) for i, v in enumerate(noise)}


def variant(
    attack: str,
    subject: str,
    before: Mapping[str, float],
    after: Mapping[str, float],
    **fields: Any,
) -> VariantResult:
    """Return one variant of two checkpoints."""
    extras = fields.pop("extras", {})
    trained = fields.pop("trained", (None, None))
    points = tuple(
        CurvePoint(
            examples=512 * i,
            tokens=12288 * i,
            score=sum(units.values()) / len(units),
            low=0,
            high=1,
            trained=trained[i],
        )
        for i, units in enumerate((before, after))
    )
    base: dict[str, Any] = {
        "name": attack,
        "subject": subject,
        "access": ACCESS.get(attack, "weights"),
        "level": LEVELS[attack],
        "variant": "full" if attack == "transfer" else attack,
        "metric": "exact_match",
        "curve": points,
    }
    record = AttackVariant.model_validate({**base, **fields})
    return VariantResult(record, (dict(before), dict(after)), extras=extras)


def result(
    attack: str, subject: str, start: float, end: float, *, count: int = 200, seed: int = 0
) -> AttackResult:
    """Return an attack that moved a subject's score from `start` to `end`."""
    extras: dict[str, Any] = {"retain_start": nats(0.95, 60, 5, "r")}
    if attack == "transfer":
        # A unit costs 5 nats that is not known, and nothing that is.
        extras |= {
            "loss_V": nats(5 * (1 - end), count, seed + 10, "u"),
            "loss_fresh": nats(5, count, seed + 11, "f"),
            "loss_V_start": nats(5 * (1 - start), count, seed + 10, "u"),
            "loss_fresh_start": nats(5, count, seed + 11, "f"),
            "dev_loss": 1.0,
            "prequential": [5 * (1 - end), 2.0],
        }
        extras |= {
            name.replace("loss_", "hedged_"): losses
            for name, losses in extras.items()
            if name.startswith("loss_")
        }
    one = variant(
        attack,
        subject,
        draw(start, count, seed + 1),
        draw(end, count, seed + 1),
        extras=extras,
        trained=(start, 0.9),
    )
    return AttackResult(attack, subject, (one,), (0,))


def audit(
    start: float,
    end: float | Mapping[str, float],
    *,
    oracles: int = 3,
    original: float = 0.98,
    planted: float = 0.9,
    count: int = 200,
    oracle: float = 0.05,
    name: str = "rmu",
) -> dict[tuple[str, str], AttackResult]:
    """Return every attack on a candidate, the original, the oracles and the plant.

    Args:
        start: Share of V the candidate knows before any attack.
        end: The same after attacks, one number or by attack.
        oracles: Number of oracles.
        original: Share the original knows.
        planted: Share the plant gives back.
        count: Units of V.
        oracle: Share the oracles get right, whatever is done.
        name: Name of the candidate.
    """
    out = {}
    for i, attack in enumerate(LEVELS):
        after = end.get(attack, start) if isinstance(end, Mapping) else end
        out[attack, name] = result(attack, name, start, after, count=count, seed=50)
        out[attack, "original"] = result(
            attack, "original", original, original, count=count, seed=20
        )
        for k in range(oracles):
            subject = f"oracle-{k}"
            out[attack, subject] = result(
                attack, subject, oracle, oracle, count=count, seed=100 + k
            )
        out[attack, "positive-control"] = result(
            attack, "positive-control", 0.05, planted, count=count, seed=30 + i
        )
    return out


def domain(count: int = 200, **fields: Any) -> Domain:
    """Return a domain with the rows of V and nothing else."""
    rows = tuple(
        Row(f"u{i}", prompt="p", completion=f" o{i % 20}", capability="facts", label=1)
        for i in range(count)
    )
    base: dict[str, Any] = {
        "name": "synthetic",
        "forget": {},
        "retain": (),
        "relearn": {},
        "test": {"facts": rows},
        "retain_test": (),
        "dev_forget": {},
        "dev_retain": (),
        "benign": (),
        "metrics": ("exact_match", "text_loss"),
        "retain_metrics": ("exact_match",),
        "claim": "deletion",
    }
    return Domain(**{**base, **fields})
