"""The two rails: every forget score is read between the oracle and the original.

depth gap at budget k = (candidate(k) - oracle(k)) / (original(0) - oracle(0))

The same attack, budget and selection on all. The sign of the metric cancels: 0 is the oracle, 1
the original, whichever way knowledge lies. Below zero is damage or suppression, not credit.

Shape legend: S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from excise.core.errors import UserError
from excise.evals.stats import SAMPLES, Array, bootstrap_mean, quantiles, resampled_means
from excise.record import Direction

Units = Mapping[str, float]
"""Score by unit."""

LEVEL = 0.9
"""Level of a depth gap's interval: two one-sided tests at 5 % each."""


@dataclass(frozen=True)
class Gap:
    """A share of the distance between the rails.

    Attributes:
        value: Point estimate; NaN where void.
        low: Lower end of the 90 % interval.
        high: Upper end.
        n: Independent units (or groups) it rests on.
        draws: Bootstrap draws, S of them.
        void: Why it cannot be read; empty for one that can.
    """

    value: float
    low: float
    high: float
    n: int
    draws: Array = field(repr=False, compare=False, default_factory=lambda: np.zeros(0))
    void: str = ""


def seed_weights(generator: np.random.Generator, count: int, samples: int) -> Array:
    """Return S x count weights that resample seeds; one seed is always drawn."""
    if count == 1:
        return np.ones((samples, 1))
    return generator.multinomial(count, np.full(count, 1 / count), size=samples) / count


def void_gap(reason: str, n: int = 0) -> Gap:
    """Return a gap that cannot be read."""
    nan = float("nan")
    return Gap(nan, nan, nan, n, void=reason)


def depth_gap(
    candidate: Units | Sequence[Units],
    oracles: Sequence[Units],
    original: Units,
    *,
    oracles_start: Sequence[Units] | None = None,
    groups: Mapping[str, str] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    rail: str = "the oracle",
) -> Gap:
    """Return the depth gap with its 90 % interval.

    Units (or whole groups) are resampled jointly for all models, attacker seeds and oracle seeds
    beside them; oracles are averaged.

    Args:
        candidate: Score by unit after the attack, one mapping per attacker seed.
        oracles: The same for every oracle.
        original: The original's before any attack.
        oracles_start: The oracles' before any attack, in the same order; None takes `oracles`.
        groups: Group of each unit; groups are independent, units within need not be.
        samples: S.
        seed: Seed of the draws.
        rail: What the lower rail is called, for the reason.

    Returns:
        The gap; void where the rails are closer than their 95 % interval.

    Raises:
        UserError: If there is no oracle or the models share no unit.
    """
    if not oracles:
        raise UserError("a depth gap needs an oracle; give one with --oracle")
    attacked = [candidate] if isinstance(candidate, Mapping) else list(candidate)
    start = list(oracles if oracles_start is None else oracles_start)
    if len(start) != len(oracles):
        raise UserError("every oracle needs its scores before and after the attack")
    maps = [*attacked, *oracles, *start, original]
    means, draws = resampled_means(maps, samples=samples, seed=seed, groups=groups)
    a, o = len(attacked), len(oracles)
    generator = np.random.default_rng(seed + 1)
    by_attack = seed_weights(generator, a, samples)
    by_oracle = seed_weights(generator, o, samples)
    top = (draws[:, :a] * by_attack).sum(1) - (draws[:, a : a + o] * by_oracle).sum(1)
    bottom = draws[:, -1] - (draws[:, a + o : -1] * by_oracle).sum(1)
    up = float(means[:a].mean() - means[a : a + o].mean())
    down = float(means[-1] - means[a + o : -1].mean())
    n = _clusters(maps, groups)
    low, high = quantiles(bottom, 0.95)
    if not (low > 0 or high < 0):
        return void_gap(
            f"the original and {rail} are closer ({down:.3g}) than their interval "
            f"[{low:.3g}, {high:.3g}], so nothing can be read between them",
            n,
        )
    ratio = ratio_of(top, bottom, down)
    return _gap(ratio, up / down, abs(down), _floor(attacked, oracles), n)


def _gap(ratio: Array, value: float, distance: float, floor: tuple[float, float], n: int) -> Gap:
    """Return a gap whose interval holds its value and is no narrower than the floor."""
    low, high = quantiles(ratio, LEVEL)
    low, high = min(low, value), max(high, value)
    return Gap(value, low - floor[0] / distance, high + floor[1] / distance, n, ratio)


def ratio_of(top: Array, bottom: Array, down: float) -> Array:
    """Divide draws; a denominator that crosses zero is held just on the side of its estimate."""
    sign = 1.0 if down > 0 else -1.0
    return top / (sign * np.maximum(sign * bottom, 1e-6 * abs(down)))


def _clusters(maps: Sequence[Units], groups: Mapping[str, str] | None) -> int:
    """Return the number of independent units common to all models."""
    units = [u for u in maps[0] if all(u in m for m in maps[1:])]
    return len({(groups or {}).get(u) or f"u:{u}" for u in units})


def _floor(attacked: Sequence[Units], oracles: Sequence[Units]) -> tuple[float, float]:
    """Return by how much equal answers widen the difference, below and above.

    Scores that are all 0 (or all 1), or unit for unit the rail's, have nothing to resample, and a
    bootstrap would call three zeros certain. n units leave the share 1 - 0.05^(1/n) open on their
    other side.
    """
    n = min(len(units) for units in (*attacked, *oracles))
    ours = {v for units in attacked for v in units.values()}
    rails = {v for units in oracles for v in units.values()}
    open_share = 1 - 0.05 ** (1 / n)
    same = (ours | rails) <= {0.0, 1.0} and all(
        o.get(u) == v for a in attacked for o in oracles for u, v in a.items()
    )
    below = same or rails == {0.0} or ours == {1.0}
    above = same or ours == {0.0} or rails == {1.0}
    return open_share * below, open_share * above


def refuse_equal(candidates: Mapping[str, str], rails: Mapping[str, str]) -> None:
    """Refuse a candidate that is one of its own rails.

    Args:
        candidates: Fingerprint of each candidate.
        rails: Fingerprint of the original and each oracle.

    Raises:
        UserError: If two are equal.
    """
    for name, fingerprint in candidates.items():
        for rail, other in rails.items():
            if fingerprint and fingerprint == other:
                raise UserError(
                    f"'{name}' and the rail '{rail}' are the same model, byte for byte; give the "
                    "audit a candidate that differs from what it is read against"
                )


def nothing_to_remove(
    original: Units,
    chance: float | None,
    direction: Direction,
    *,
    groups: Mapping[str, str] | None = None,
    seed: int = 0,
) -> str:
    """Say that the original is at chance, or nothing.

    Args:
        original: Its scores by unit before any attack.
        chance: Score of a model that knows nothing; None where unknown.
        direction: Which way is more knowledge.
        groups: Group of each unit.
        seed: Seed of the bootstrap.

    Returns:
        One sentence where the original's 95 % interval holds chance or lies on its wrong side.
    """
    if chance is None:
        return ""
    found = bootstrap_mean(original, seed=seed, groups=groups)
    knows = found.low > chance if direction == "higher" else found.high < chance
    if knows:
        return ""
    return (
        f"There is nothing to remove: the original scores {found.value:.3g} "
        f"[{found.low:.3g}, {found.high:.3g}] where knowing nothing scores {chance:.3g}."
    )
