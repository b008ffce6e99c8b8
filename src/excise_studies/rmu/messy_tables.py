"""From the runs of `messy-forget-set` to ranks at matched retain, tables and words.

Shape legend: S bootstrap samples, M methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from excise.evals.stats import Estimate, bootstrap_mean, quantiles
from excise.record import StudyRow, StudyTable
from excise_studies.base import row
from excise_studies.rmu.statements import Mess

if TYPE_CHECKING:
    from excise_studies.rmu.messy_forget_set import Cell, MessyForgetSet, Point

Array = NDArray[np.float64]

SAMPLES = 1000
"""Bootstrap samples."""

OUTCOMES = {"V": "exact match on V", "relearned": "exact match on V after relearning T"}
"""What methods are ranked by; the last decides."""


def summarise(
    study: MessyForgetSet,
    base: Mapping[int, Point],
    points: Mapping[Cell, Sequence[Point]],
    found: Mapping[tuple[Mess, str], float],
) -> tuple[tuple[StudyTable, ...], str, str]:
    """Return tables, decision and paragraph.

    Args:
        study: Settings and margin.
        base: Scores of the original of every draw; `oracle` holds the oracle's.
        points: Scores of the runs of every cell, weakest first.
        found: Factor on the learning rate at which retain costs what is wanted, by set and method.
    """
    levels = {
        outcome: {mess: matched(study, base, points, mess, outcome) for mess in study.sets}
        for outcome in OUTCOMES
    }
    ranked = {o: {mess: ranks(drawn) for mess, drawn in v.items()} for o, v in levels.items()}
    changes = {o: change(study, v) for o, v in ranked.items()}
    decision = decide(study, changes["relearned"])
    tables = (
        _matched(study, base, levels),
        _ranks(study, ranked, changes),
        _strengths(study, found, base, points),
    )
    return tables, decision, _paragraph(study, base, levels, ranked, changes, decision)


def matched(
    study: MessyForgetSet,
    base: Mapping[int, Point],
    points: Mapping[Cell, Sequence[Point]],
    mess: Mess,
    outcome: str,
) -> dict[int, Array]:
    """Return by draw the score at matched retain: of the data, then resampled, by method.

    The units of V and those of retain are resampled, the same for all methods and sets of a draw.

    Args:
        study: What retain may cost.
        base: Scores of the originals.
        points: Scores of the runs.
        mess: Forget set.
        outcome: `V` or `relearned`.

    Returns:
        (1 + S) x M scores by draw.
    """
    out: dict[int, Array] = {}
    for seed in study.seeds:
        units, kept = list(base[seed]["V"]), list(base[seed]["retain"])
        draw = np.random.default_rng(seed)
        weights = [_weights(len(units), draw), _weights(len(kept), draw)]
        before = weights[1] @ np.array([base[seed]["retain"][u] for u in kept])
        columns = []
        for method in study.methods:
            runs = points[seed, mess, method]
            scores = [weights[0] @ np.array([p[outcome][u] for u in units]) for p in runs]
            costs = [weights[1] @ np.array([p["retain"][u] for u in kept]) - before for p in runs]
            # Doing nothing costs nothing and leaves what the original knows.
            scores.insert(0, weights[0] @ np.array([base[seed][outcome][u] for u in units]))
            costs.insert(0, np.zeros_like(before))
            columns.append(interpolate(np.array(costs), np.array(scores), study.retain_cost))
        out[seed] = np.stack(columns, axis=1)
    return out


def _weights(count: int, draw: np.random.Generator) -> Array:
    """Return weights of units: equal ones first, then those of bootstrap samples."""
    drawn = draw.multinomial(count, np.full(count, 1 / count), size=SAMPLES) / count
    weights: Array = np.concatenate([np.full((1, count), 1 / count), drawn])
    return weights


def interpolate(costs: Array, scores: Array, wanted: float) -> Array:
    """Return the score at the wanted cost, between runs; beyond the strongest run, that one's.

    Args:
        costs: (runs, samples), weakest run first; made to rise.
        scores: The same shape.
        wanted: Cost.
    """
    rising = np.maximum.accumulate(costs, axis=0) + 1e-9 * np.arange(len(costs))[:, None]
    pairs = zip(rising.T, scores.T, strict=True)
    return np.array([np.interp(wanted, x, y) for x, y in pairs])


def ranks(drawn: Mapping[int, Array]) -> dict[int, Array]:
    """Return by draw the rank of every method, 1 for the lowest score; ties share theirs."""
    return {
        seed: 1
        + (scores[:, :, None] > scores[:, None, :] + 1e-12).sum(2)
        + ((np.abs(scores[:, :, None] - scores[:, None, :]) <= 1e-12).sum(2) - 1) / 2
        for seed, scores in drawn.items()
    }


def over_draws(values: Mapping[int, Array], seed: int = 0) -> Estimate:
    """Return the mean over draws, with draws and, inside them, units resampled.

    Args:
        values: By draw: the value of the data, then of the samples.
        seed: Seed of the bootstrap over draws.
    """
    table = np.stack([values[s] for s in values])
    draws = np.random.default_rng(seed).integers(len(table), size=(table.shape[1] - 1, len(table)))
    sampled = table[draws, np.arange(1, table.shape[1])[:, None]].mean(1)
    value = float(table[:, 0].mean())
    low, high = quantiles(sampled, 0.95)
    return Estimate(value, min(low, value), max(high, value), len(table))


def change(study: MessyForgetSet, ranked: Mapping[Mess, Mapping[int, Array]]) -> Estimate:
    """Return the change of RMU's rank from the first forget set to the last."""
    at = list(study.methods).index("rmu")
    clean, messy = ranked[study.sets[0]], ranked[study.sets[-1]]
    return over_draws({s: messy[s][:, at] - clean[s][:, at] for s in study.seeds})


def decide(study: MessyForgetSet, moved: Estimate) -> str:
    """Return what the statistic says under the margin."""
    if moved.high < -study.margin:
        return f"supported: RMU gains more than {study.margin:g} ranks from the mess"
    if moved.low > -study.margin:
        return f"contradicted: RMU does not gain {study.margin:g} ranks from the mess"
    return f"undecided: the interval holds a gain of {study.margin:g} ranks"


Levels = Mapping[str, Mapping[Mess, Mapping[int, Array]]]


def _matched(study: MessyForgetSet, base: Mapping[int, Point], levels: Levels) -> StudyTable:
    """Return scores at matched retain, all draws together and one by one."""
    rows: list[StudyRow] = []
    for side in ("original", "oracle"):
        for outcome, words in OUTCOMES.items():
            of = {s: base[s] if side == "original" else base[s]["oracle"] for s in study.seeds}
            units = {f"{s}:{u}": v for s in study.seeds for u, v in of[s][outcome].items()}
            rows.append(row(side, words, bootstrap_mean(units)))
    for mess in study.sets:
        for i, method in enumerate(study.methods):
            for outcome, words in OUTCOMES.items():
                drawn = {s: v[:, i] for s, v in levels[outcome][mess].items()}
                rows.append(row(f"{method} on {mess}", words, over_draws(drawn)))
                rows += [
                    row(f"{method} on {mess}", words, over_draws({s: v}), s)
                    for s, v in drawn.items()
                ]
    return StudyTable(
        title="Knowledge left at matched retain",
        note=f"Where the loss on retain has risen by {study.retain_cost:g} nats; lower is better.",
        rows=tuple(rows),
    )


def _ranks(study: MessyForgetSet, ranked: Levels, changes: Mapping[str, Estimate]) -> StudyTable:
    """Return ranks by set, and the change of RMU's."""
    rows: list[StudyRow] = []
    for mess in study.sets:
        for i, method in enumerate(study.methods):
            for outcome, words in OUTCOMES.items():
                drawn = {s: v[:, i] for s, v in ranked[outcome][mess].items()}
                rows.append(row(f"{method} on {mess}", f"rank by {words}", over_draws(drawn)))
    for outcome, words in OUTCOMES.items():
        name = f"rmu, {study.sets[-1]} minus {study.sets[0]}"
        rows.append(row(name, f"rank by {words}", changes[outcome]))
    return StudyTable(
        title="Ranks", note="1 is the method that leaves least; n counts draws.", rows=tuple(rows)
    )


def _strengths(
    study: MessyForgetSet,
    found: Mapping[tuple[Mess, str], float],
    base: Mapping[int, Point],
    points: Mapping[Cell, Sequence[Point]],
) -> StudyTable:
    """Return learning rates found on the tuned draw, and how often the wanted cost was reached."""
    rows: list[StudyRow] = []
    for (mess, method), factor in found.items():
        fit: Any = study.methods[method].fit  # type: ignore[attr-defined]
        arm = f"{method} on {mess}"
        rows.append(StudyRow(condition=arm, metric="learning rate", value=fit.lr * factor, n=1))
        most = [
            max(float(np.mean(list(p["retain"].values()))) for p in points[s, mess, method])
            - float(np.mean(list(base[s]["retain"].values())))
            for s in study.seeds
        ]
        rows.append(
            StudyRow(
                condition=arm, metric="largest cost, nats", value=float(np.mean(most)), n=len(most)
            )
        )
        reached = float(np.mean([m >= study.retain_cost for m in most]))
        rows.append(StudyRow(condition=arm, metric="draws matched", value=reached, n=len(most)))
    return StudyTable(
        title="Strength",
        note="Rate found on the tuned draw; draws where a run cost retain as much as is compared.",
        rows=tuple(rows),
    )


def _paragraph(
    study: MessyForgetSet,
    base: Mapping[int, Point],
    levels: Levels,
    ranked: Levels,
    changes: Mapping[str, Estimate],
    decision: str,
) -> str:
    """Return the result in words."""
    original = float(np.mean([np.mean(list(base[s]["V"].values())) for s in study.seeds]))
    words = [
        f"Over {len(study.seeds)} draws the original answered {original:.2f} of V. At a loss on "
        f"retain {study.retain_cost:g} nats higher,"
    ]
    for mess in (study.sets[0], study.sets[-1]):
        parts = []
        for i, method in enumerate(study.methods):
            two = [over_draws({s: v[:, i] for s, v in levels[o][mess].items()}) for o in OUTCOMES]
            rank = over_draws({s: v[:, i] for s, v in ranked["relearned"][mess].items()})
            parts.append(
                f"{method} left {two[0].value:.2f} ({two[1].value:.2f} after relearning, rank "
                f"{rank.value:.1f})"
            )
        words.append(f"on the {mess} forget set {', '.join(parts)};")
    first, last = changes["V"], changes["relearned"]
    words.append(
        f"the rank of RMU changed by {last.value:+.2f} [{last.low:+.2f}, {last.high:+.2f}] after "
        f"relearning and by {first.value:+.2f} [{first.low:+.2f}, {first.high:+.2f}] before it."
    )
    return " ".join([*words, f"Decision: {decision}."])
