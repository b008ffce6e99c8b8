"""Residual bits: what the weights save an attacker on V, relative to an oracle.

Headline: (loss on fresh units - loss on V) / ln 2, both after attacking T, minus the same
difference for the oracle. Fresh units are made up of the same template and nobody ever saw them,
so what the attack teaches about the template cancels. Losses are nats per unit, summed over its
target tokens, as attacks leave them in `extras["loss_V"]` and `extras["loss_fresh"]`. The
prequential sum is secondary.

Shape legend: S bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from excise.auditor.base import ORIGINAL, VariantResult
from excise.auditor.verdict.case import Case
from excise.auditor.verdict.rails import LEVEL, Gap, Units, ratio_of, seed_weights, void_gap
from excise.evals.stats import SAMPLES, Array, quantiles, resampled_means

LN2 = math.log(2)

Losses = tuple[Units, Units]
"""Nats by unit on V and on fresh units, of one model after one attack."""


@dataclass(frozen=True)
class Bits:
    """Bits per unit.

    Attributes:
        value: Point estimate.
        low: Lower end of the 90 % interval.
        high: Upper end.
        draws: Bootstrap draws.
    """

    value: float
    low: float
    high: float
    draws: Array


def saved_bits(
    models: Sequence[Losses],
    *,
    groups: Mapping[str, str] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Return (loss on fresh - loss on V) / ln 2 of several models, resampled jointly.

    Args:
        models: M models.
        groups: Group of each unit.
        samples: S.
        seed: Seed of the draws; V and fresh units are drawn apart.

    Returns:
        M values and S x M draws.
    """
    settings = {"samples": samples, "groups": groups}
    v_mean, v_draws = resampled_means([v for v, _ in models], seed=seed, **settings)  # type: ignore[arg-type]
    fresh_mean, fresh_draws = resampled_means(
        [fresh for _, fresh in models],
        seed=seed + 1,
        **settings,  # type: ignore[arg-type]
    )
    return (fresh_mean - v_mean) / LN2, (fresh_draws - v_draws) / LN2


def residual_bits(
    candidate: Sequence[Losses],
    oracles: Sequence[Losses],
    original: Losses | None = None,
    *,
    groups: Mapping[str, str] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> tuple[Bits, Gap]:
    """Return residual bits per unit, and as a share of what the original's weights hold.

    Args:
        candidate: One entry per attacker seed, after attacking T.
        oracles: One entry per oracle, after attacking T; may be empty (then nothing is taken off).
        original: The original before any attack; without it the share is void.
        groups: Group of each unit.
        samples: Bootstrap samples.
        seed: Seed of the draws.

    Returns:
        Bits with their 90 % interval, and the share (bits / the original's bits above the
        oracle's), to be held against the margin from both sides.
    """
    tops = [original] if original is not None else []
    values, draws = saved_bits(
        [*candidate, *oracles, *tops], groups=groups, samples=samples, seed=seed
    )
    c, o = len(candidate), len(oracles)
    generator = np.random.default_rng(seed + 2)
    by_attack = seed_weights(generator, c, samples)
    rail, rail_draws = 0.0, np.zeros(samples)
    if o:
        by_oracle = seed_weights(generator, o, samples)
        rail = float(values[c : c + o].mean())
        rail_draws = (draws[:, c : c + o] * by_oracle).sum(1)
    value = float(values[:c].mean()) - rail
    moved = (draws[:, :c] * by_attack).sum(1) - rail_draws
    low, high = quantiles(moved, LEVEL)
    bits = Bits(value, low, high, moved)
    if not tops:
        return bits, void_gap("without the original there is no scale for residual bits")
    down, down_draws = float(values[-1]) - rail, draws[:, -1] - rail_draws
    ends = quantiles(down_draws, 0.95)
    if ends[0] <= 0:
        return bits, void_gap(
            f"the original's weights save {down:.3g} bits per unit, not more than its interval "
            f"[{ends[0]:.3g}, {ends[1]:.3g}] allows"
        )
    ratio = ratio_of(moved, down_draws, down)
    low, high = quantiles(ratio, LEVEL)
    return bits, Gap(value / down, low, high, len(candidate[0][0]), ratio)


def losses_of(arm: VariantResult, *, start: bool = False) -> Losses | None:
    """Return the losses an attack left in an arm, or None where it left none."""
    end = "_start" if start else ""
    v, fresh = arm.extras.get(f"loss_V{end}"), arm.extras.get(f"loss_fresh{end}")
    if not v or not fresh:
        return None
    values = [*v.values(), *fresh.values()]
    return (v, fresh) if all(math.isfinite(x) for x in values) else None


def kinds(case: Case, attack: str, subject: str) -> dict[str, tuple[VariantResult, ...]]:
    """Return for each kind of training (full, LoRA) the arms at the rate that fits `dev` best.

    Averaged over seeds; controls and arms that hold the original are left out.
    """
    result = case.result(attack, subject)
    variants: dict[tuple[str, float | None], list[VariantResult]] = {}
    for arm in result.variants if result else ():
        record = arm.entry
        usable = record.status in ("ok", "invalid") and losses_of(arm) is not None
        if usable and not record.control and not record.needs_original:
            variants.setdefault((record.variant, record.lr), []).append(arm)
    best: dict[str, tuple[float, tuple[VariantResult, ...]]] = {}
    for (kind, _), arms in variants.items():
        losses = [float(a.extras.get("dev_loss", math.inf)) for a in arms]
        loss = sum(losses) / len(losses)
        loss = loss if math.isfinite(loss) else math.inf
        if kind not in best or loss < best[kind][0]:
            best[kind] = (loss, tuple(arms))
    return {kind: arms for kind, (_, arms) in best.items()}


def bits_of(case: Case, attack: str, kind: str) -> tuple[Bits, Gap] | None:
    """Return the residual bits of a candidate under one kind of training.

    Args:
        case: The candidate.
        attack: Relearning attack whose arms carry losses.
        kind: `full`, `lora`.

    Returns:
        Bits and their share of the original's; None where the losses are missing.
    """
    ours = [losses_of(a) for a in kinds(case, attack, case.arm).get(kind, ())]
    rails = [_one(kinds(case, attack, name).get(kind, ())) for name in case.oracles]
    top = next(
        (
            found
            for arms in kinds(case, attack, ORIGINAL).values()
            for found in [losses_of(arms[0], start=True)]
            if found is not None
        ),
        None,
    )
    mine = [losses for losses in ours if losses is not None]
    others = [losses for losses in rails if losses is not None]
    if not mine or len(others) < len(case.oracles):
        return None
    return residual_bits(mine, others, top, groups=case.groups, seed=case.seed)


def _one(arms: Sequence[VariantResult]) -> Losses | None:
    """Return the losses of one oracle, averaged over attacker seeds."""
    found = [losses for losses in map(losses_of, arms) if losses is not None]
    if not found:
        return None
    return _average([v for v, _ in found]), _average([f for _, f in found])


def _average(maps: Sequence[Units]) -> Units:
    """Return the mean by unit."""
    return {u: sum(m[u] for m in maps) / len(maps) for u in maps[0] if all(u in m for m in maps)}


def prequential(case: Case, attack: str) -> float | None:
    """Return the summed difference in loss on every batch of T before training on it.

    Secondary: it is confounded by what a model must first unlearn, and counts T, not V.

    Args:
        case: The candidate.
        attack: Relearning attack whose arms carry `prequential` (mean nats per target token).

    Returns:
        Sum over batches of oracle - candidate in bits per target token, each model at its own
        shortest code; None without an oracle or without the losses.
    """
    ours = _shortest(case, attack, case.arm)
    rails = [_shortest(case, attack, name) for name in case.oracles]
    known = [r for r in rails if r is not None]
    if ours is None or not known:
        return None
    return (sum(known) / len(known) - ours) / LN2


def _shortest(case: Case, attack: str, subject: str) -> float | None:
    """Return the smallest prequential sum of a subject's arms."""
    result = case.result(attack, subject)
    sums = [
        float(sum(a.extras["prequential"]))
        for a in (result.variants if result else ())
        if a.extras.get("prequential")
        and not a.entry.control
        and a.entry.status in ("ok", "invalid")
    ]
    return min((s for s in sums if math.isfinite(s)), default=None)
