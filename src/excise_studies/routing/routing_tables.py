"""From scored arms of gradient routing to tables, words and the result of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from excise.methods.base import Removal
from excise.record import StudyRow, StudyTable
from excise.run.study import StudyResult
from excise_studies.attacking import Key
from excise_studies.base import row
from excise_studies.distillation.distilling import checkpoints, result
from excise_studies.levels import estimate
from excise_studies.routing.routing_setting import Outcome, World


def tax_table(outcome: Outcome, title: str = "Loss on retain and the alignment tax") -> StudyTable:
    """Return losses on retain and compute ratios of arms, rails and plain runs."""
    rows: list[StudyRow] = []
    loss = outcome.loss
    for arm in loss.arms:
        rows.append(row(arm, "retain loss", estimate(loss.at(arm), loss.n)))
        if outcome.shares and not arm.startswith("plain, "):
            rows.append(row(arm, "compute ratio", estimate(outcome.ratio(arm), loss.n)))
    ends = f" It is cut at {min(outcome.shares):g} and 1." if outcome.shares else ""
    return StudyTable(
        title=title,
        note=(
            "Compute ratio: the share of plain training's steps that reaches the arm's loss on "
            f"retained facts in a wording of their own; 1 is no tax.{ends}"
        ),
        rows=tuple(rows),
    )


def conclude(
    outcome: Outcome,
    world: World,
    words: Sequence[str],
    decision: str,
    *,
    more: Sequence[StudyTable] = (),
    notes: Sequence[str] = (),
    brief: bool = False,
) -> StudyResult:
    """Return the result of a study of one world: tables, decision, one paragraph.

    Args:
        outcome: The arms.
        world: Their draws.
        words: Sentences between those on the rails and on retain, and the decision.
        decision: What the statistic says; without power of the attacker it is void.
        more: Tables that come first.
        notes: What a reader should know.
        brief: Whether the paragraph leaves out what every single arm kept.
    """
    absorption = absorption_table(outcome.removals)
    tables = [*more, tax_table(outcome), *([absorption] if absorption else [])]
    return result(
        outcome.found,
        [*words, *([] if brief else [said_retain(outcome)])],
        decision,
        world.draws,
        checkpoints(outcome.removals),
        tables=tables,
        notes=notes,
        chosen="settings of data, models and methods were chosen by hand on the draws named above",
    )


def said_retain(outcome: Outcome) -> str:
    """Return what arms kept, and at which share of the compute plain training keeps as much."""
    found, parts = outcome.found, []
    for arm in found.arms:
        ratio = f" at compute ratio {outcome.ratio(arm)[0]:.2f}" if outcome.shares else ""
        parts.append(f"{arm} {found.retain.at(arm)[0]:.2f}{ratio}")
    original = f"Retain recall, the original's {found.retain.at('original')[0]:.2f}"
    return f"{original}: {', '.join(parts)}."


def absorption_table(removals: Mapping[Key, Removal]) -> StudyTable | None:
    """Return where rows write and what the ablation did, means over draws; None where unknown."""
    sums: dict[tuple[str, str], list[float]] = {}
    for (arm, _), removal in removals.items():
        for metric, value in absorbed(removal).items():
            sums.setdefault((arm, metric), []).append(value)
    if not sums:
        return None
    rows = [
        StudyRow(condition=arm, metric=metric, value=sum(values) / len(values), n=len(values))
        for (arm, metric), values in sums.items()
    ]
    return StudyTable(
        title="Absorption",
        note=(
            "Share of the squared gradient that rows of a kind would write into the modules "
            "before the ablation, and their loss before and after it; `missed` are forget rows "
            "without a label. n counts draws."
        ),
        rows=tuple(rows),
    )


def absorbed(removal: Removal) -> dict[str, float]:
    """Return absorption and losses of one removal, as far as it tells them."""
    out: dict[str, float] = {}
    for kind, held in removal.extras.get("absorption", {}).items():
        modules = [v for name, v in held["share"].items() if name.startswith("module_")]
        out[f"{kind} rows into modules"] = sum(modules)
    for when, held in removal.extras.get("losses", {}).items():
        for kind, value in held.items():
            out[f"loss of {kind} rows, {when}"] = value
    return out
