"""Residual bits: what the weights save an attacker on the held-out test set, beside an oracle.

    residual bits = [fresh - V](candidate) - [fresh - V](oracle),  in nats per unit / ln 2

where V is the loss on the held-out test set and `fresh` the loss on made-up units of the same
template that nobody ever saw, both after the attacker trained on the relearn set: what the attack
teaches about the template cancels. Losses are nats per unit, summed over its target tokens, of a
reader who hedges (`batching.Nats`), since how sure a model is of what it does not know says nothing
about what it knows. Attacks leave them in `extras["hedged_V"]` and `extras["hedged_fresh"]`. The
quantity is excise's own. One temperature per model in place of the hedge was tried and is convex in
the share of units known, so that half of them read as a tenth: docs/lab-notes.md.
The prequential sum (Dawid 1984) is secondary.

Shape legend: M models, S bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from excise.auditor.base import ORIGINAL, VariantResult
from excise.auditor.evaluation_set import UnitScores
from excise.auditor.results import on_other_rows
from excise.auditor.verdict.reference import (
    COVERAGE,
    RAN,
    Gap,
    VerdictCase,
    averaged,
    invalid_gap,
    ratio_of,
    seed_weights,
)
from excise.evals.stats import SAMPLES, Array, clusters, interval, resampled_means
from excise.record import Estimate

LN2 = math.log(2)

Losses = tuple[UnitScores, UnitScores]
"""Nats by unit on V and on fresh units, of one model after one attack."""


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
        seed: Seed of the bootstrap; V and fresh units are resampled apart.

    Returns:
        M values and S x M samples, in bits per unit.
    """
    held_out = [v for v, _ in models]
    made_up = [fresh for _, fresh in models]
    v_mean, v_samples = resampled_means(held_out, samples=samples, seed=seed, groups=groups)
    fresh_mean, fresh_samples = resampled_means(
        made_up, samples=samples, seed=seed + 1, groups=groups
    )
    return (fresh_mean - v_mean) / LN2, (fresh_samples - v_samples) / LN2


def residual_bits(
    candidate: Sequence[Losses],
    oracles: Sequence[Losses],
    original: Losses | None = None,
    *,
    groups: Mapping[str, str] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> tuple[Estimate, Gap]:
    """Return residual bits per unit, and as a share of what the original's weights hold.

    Args:
        candidate: One entry per attacker seed, after the attack.
        oracles: One entry per oracle, after the attack; may be empty (then nothing is taken off).
        original: The original before any attack; without it the share is invalid.
        groups: Group of each unit.
        samples: Bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        Bits with their 90 % interval, and the share (bits / the original's bits above the
        oracle's), to be held against the margin from both sides.

    Source:
        This library's own: docs/evidence.md.
    """
    tops = [original] if original is not None else []
    values, resampled = saved_bits(
        [*candidate, *oracles, *tops], groups=groups, samples=samples, seed=seed
    )
    c, o = len(candidate), len(oracles)
    sizes = [len(set(clusters(list(part), groups))) for part in candidate[0]]
    units = min(sizes)  # V and fresh units are resampled apart; the fewer decide
    generator = np.random.default_rng(seed + 2)
    by_attack = seed_weights(generator, c, samples)
    lower, lower_samples = 0.0, np.zeros(samples)
    if o:
        by_oracle = seed_weights(generator, o, samples)
        lower = float(values[c : c + o].mean())
        lower_samples = (resampled[:, c : c + o] * by_oracle).sum(1)
    value = float(values[:c].mean()) - lower
    excess = (resampled[:, :c] * by_attack).sum(1) - lower_samples
    bits = Estimate(value, *interval(excess, value, units, COVERAGE), units, COVERAGE)
    if not tops:
        return bits, invalid_gap("without the original there is no scale for residual bits")
    whole, whole_samples = float(values[-1]) - lower, resampled[:, -1] - lower_samples
    low, high = interval(whole_samples, whole, units, 0.95)
    if low <= 0:
        return bits, invalid_gap(
            f"the original's weights save {whole:.3g} bits per unit, not more than its interval "
            f"[{low:.3g}, {high:.3g}] allows"
        )
    share = ratio_of(excess, whole_samples, whole)
    return bits, Gap(
        value / whole, *interval(share, value / whole, units, COVERAGE), units, samples=share
    )


def losses_of(variant: VariantResult, *, start: bool = False) -> Losses | None:
    """Return the hedged losses that an attack noted; None where they are not finite.

    Args:
        variant: A variant of relearning.
        start: Whether those before the attack are wanted, not those at its end.
    """
    end = "_start" if start else ""
    v, fresh = variant.extras.get(f"hedged_V{end}"), variant.extras.get(f"hedged_fresh{end}")
    if not v or not fresh:
        return None
    return (v, fresh) if all(map(math.isfinite, [*v.values(), *fresh.values()])) else None


def best_on_dev(
    case: VerdictCase, attack: str, subject: str
) -> dict[str, tuple[VariantResult, ...]]:
    """Return for each kind of training (full, LoRA) the runs at the rate that fits `dev` best.

    Averaged over seeds; controls and variants that hold the original are left out.
    """
    by_rate: dict[tuple[str, float | None], list[VariantResult]] = {}
    for variant in case.variants(attack, subject):
        entry = variant.entry
        usable = entry.status in RAN and losses_of(variant) is not None
        usable = usable and not on_other_rows(variant)
        if usable and not entry.control and not entry.needs_original:
            by_rate.setdefault((entry.variant, entry.lr), []).append(variant)
    best: dict[str, tuple[float, tuple[VariantResult, ...]]] = {}
    for (kind, _), runs in by_rate.items():
        losses = [float(run.extras.get("dev_loss", math.inf)) for run in runs]
        loss = sum(losses) / len(losses)
        loss = loss if math.isfinite(loss) else math.inf
        if kind not in best or loss < best[kind][0]:
            best[kind] = (loss, tuple(runs))
    return {kind: runs for kind, (_, runs) in best.items()}


def start_losses(case: VerdictCase, subject: str, attacks: Sequence[str]) -> Losses | None:
    """Return the losses of a subject before any attack, as the first of `attacks` noted them."""
    for attack in attacks:
        for runs in best_on_dev(case, attack, subject).values():
            losses = losses_of(runs[0], start=True)
            if losses is not None:
                return losses
    return None


def bits_of(case: VerdictCase, attack: str, kind: str) -> tuple[Estimate, Gap] | None:
    """Return the residual bits of a candidate under one kind of training.

    Args:
        case: The candidate.
        attack: Relearning attack whose variants carry losses.
        kind: `full`, `lora`.

    Returns:
        Bits and their share of the original's; None where the losses are missing.
    """
    runs = best_on_dev(case, attack, case.model).get(kind, ())
    candidate = [losses for losses in map(losses_of, runs) if losses is not None]
    oracles = [
        losses
        for name in case.oracles
        if (losses := _over_seeds(best_on_dev(case, attack, name).get(kind, ()))) is not None
    ]
    if not candidate or len(oracles) < len(case.oracles):
        return None
    original = start_losses(case, ORIGINAL, [attack])
    return residual_bits(candidate, oracles, original, groups=case.groups, seed=case.seed)


def all_bits(case: VerdictCase) -> list[tuple[str, str, Estimate, Gap]]:
    """Return (attack, kind, bits, share) for every deciding relearning attack that kept losses."""
    out = []
    for attack in case.attacks():
        if case.level(attack) != "D4" or not case.chosen(attack, case.model):
            continue
        for kind in best_on_dev(case, attack, case.model):
            known = bits_of(case, attack, kind)
            if known is not None:
                out.append((attack, kind, *known))
    return out


def _over_seeds(runs: Sequence[VariantResult]) -> Losses | None:
    """Return the losses of one oracle, averaged over attacker seeds."""
    known = [losses for losses in map(losses_of, runs) if losses is not None]
    if not known:
        return None
    return averaged([v for v, _ in known]), averaged([fresh for _, fresh in known])


def prequential(case: VerdictCase, attack: str) -> float | None:
    """Return the summed difference in loss on every batch of T before training on it.

    Secondary: it is confounded by what a model must first unlearn, and counts the relearn set, not
    the held-out test set. Prequential code length: Dawid 1984.

    Args:
        case: The candidate.
        attack: Relearning attack whose variants carry `prequential` (mean nats per target token).

    Returns:
        Sum over batches of oracle - candidate in bits per target token, each model at its own
        shortest code; None without an oracle or without the losses.
    """
    ours = _shortest(case, attack, case.model)
    theirs = [_shortest(case, attack, name) for name in case.oracles]
    known = [length for length in theirs if length is not None]
    if ours is None or not known:
        return None
    return (sum(known) / len(known) - ours) / LN2


def _shortest(case: VerdictCase, attack: str, subject: str) -> float | None:
    """Return the smallest prequential sum over the variants on a subject."""
    sums = [
        float(sum(variant.extras["prequential"]))
        for variant in case.variants(attack, subject)
        if variant.extras.get("prequential")
        and not (on_other_rows(variant) or "trial" in variant.entry.facts)
        and not variant.entry.control
        and variant.entry.status in RAN
    ]
    return min((s for s in sums if math.isfinite(s)), default=None)
