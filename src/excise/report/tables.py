"""The rows of the page's tables: everything is text by the time the template sees it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from excise.record import LEVELS, AttackVariant, Record, Score, Verdict
from excise.report import words
from excise.report.figures import candidate_roles
from excise.report.svg import swatch


@dataclass(frozen=True)
class LevelRow:
    """One depth level of one verdict, as text.

    `counts` is false for a pass above a level that did not pass, which `status` calls `uncounted`.
    """

    code: str
    words: str
    status: str
    counts: bool
    against: str
    gap: str
    interval: str
    margin: str
    decided_by: str
    reason: str


@dataclass(frozen=True)
class AttackRow:
    """One variant of one attack, as text.

    `cells` are the numeric columns in order; `interval` is that of the first of them.
    """

    name: str
    marks: tuple[str, ...]
    status: str
    reason: str
    subject: str
    interval: str
    cells: tuple[str, ...]


def levels(verdict: Verdict) -> Iterable[LevelRow]:
    """Yield the depth levels of one verdict, lowest first."""
    for result, solid in zip(verdict.levels, words.counts(verdict.levels), strict=True):
        margin = "" if result.margin is None else f"\u00b1 {words.number(result.margin)}"
        yield LevelRow(
            code=result.level,
            words=words.level_words(result.level, verdict.levels),
            status=result.status if solid or result.status != "pass" else "uncounted",
            counts=solid or result.status != "pass",
            against=result.against,
            gap=words.number(result.gap),
            interval=words.interval(result.low, result.high),
            margin=margin or words.MISSING,
            decided_by=words.spell(result.decided_by) or "\u2013",
            reason=words.spell(result.reason) or "\u2013",
        )


@dataclass(frozen=True)
class AnswerRow:
    """What a release manager asks about one removed model, as text, with its mark in the picture.

    `ship` is `yes`, `no` or `open`, and `why` says why.
    """

    mark: Markup
    name: str
    cells: Sequence[str]
    ship: str
    answer: str
    why: str


@dataclass(frozen=True)
class AnswerTable:
    """The first table of the page: columns as (head, note), and one row for each removed model."""

    heads: tuple[tuple[str, ...], ...]
    rows: tuple[AnswerRow, ...]


def answers(record: Record) -> AnswerTable:
    """Return what a release manager asks, one row for each removed model, in the record's order.

    A metric that all cells of a column share stands in its head.
    """
    roles = candidate_roles(words.model_names(record))
    asked = {name: words.answers(record, name) for name in roles}
    columns = [[words.plain(getattr(each, field)) for each in asked.values()]
               for field in ("removed", "came_back", "lost")]  # fmt: skip
    heads = []
    for head, cells in zip(
        ("Removed", "Came back", "Cost to the retain set"), columns, strict=True
    ):
        metrics = {words.metric_name(s.metric) for s in record.scores}
        note = next((m for m in metrics if all(c.startswith(f"{m} ") for c in cells)), "")
        cells[:] = [cell.removeprefix(f"{note} ") if note else cell for cell in cells]
        lower = words.direction(record, note).startswith("lower")
        heads.append((head, f"{note}, lower knows more" if note and lower else note))
    rows = [
        AnswerRow(
            swatch(role),
            words.plain(name),
            cells,
            asked[name].ship,
            words.SHIP[asked[name].ship],
            words.plain(asked[name].why),
        )
        for (name, role), *cells in zip(roles.items(), *columns, strict=True)
    ]
    return AnswerTable(tuple(heads), tuple(rows))


def score_table(record: Record) -> dict[str, Any]:
    """Return models by (set, metric): value, interval, change against the original."""
    columns = list(dict.fromkeys((s.set, s.metric) for s in record.scores))
    by: dict[tuple[str, str, str], Score] = {(s.model, s.set, s.metric): s for s in record.scores}
    models = sorted(
        dict.fromkeys(s.model for s in record.scores),
        key=lambda model: words.RANK[words.role(model)],
    )
    heads = []
    for column in columns:
        some = next(s for s in record.scores if (s.set, s.metric) == column)
        chance = "" if some.chance is None else f"; chance {words.number(some.chance)}"
        heads.append(
            {
                "set": words.set_name(some.set),
                "metric": words.metric_name(some.metric),
                "note": f"{some.direction} is more knowledge; n = {words.count(some.n)}{chance}",
                "definition": words.plain(some.definition),
            }
        )
    rows = []
    for model in models:
        cells = []
        for column in columns:
            score = by.get((model, *column))
            base = by.get(("original", *column))
            change = ""
            if score and base and words.role(model) == "candidate":
                delta = words.number(score.value - base.value)
                change = delta if delta.startswith(("\u2212", "not")) else f"+{delta}"
            cells.append(
                {
                    "value": words.number(score.value if score else None),
                    "interval": words.interval(score.low, score.high) if score else "",
                    "change": change,
                }
            )
        rows.append({"model": words.plain(model), "role": words.role(model), "cells": cells})
    return {"heads": heads, "rows": rows}


def by_level(attacks: Iterable[AttackVariant]) -> list[tuple[str, str, list[AttackRow]]]:
    """Return (code, words, rows) by depth level, so that words need not stand in every row."""
    ranked = sorted(
        attacks,
        key=lambda a: (a.level, a.name, a.control, a.variant, a.subject, a.lr or 0.0, a.seed),
    )
    groups: dict[str, list[AttackRow]] = {}
    for attack in ranked:
        groups.setdefault(attack.level, []).append(_attack(attack))
    return [
        (code if code in LEVELS else "", words.level_words(code) or "beside the levels", rows)
        for code, rows in groups.items()
    ]


def _attack(attack: AttackVariant) -> AttackRow:
    first, last = (attack.curve[0], attack.curve[-1]) if attack.curve else (None, None)
    score = words.number(last.score if last else None)
    if first is not None and len(attack.curve) > 1:
        score = f"{words.number(first.score)} \u2192 {score}"
    lr = "" if attack.lr is None else f"{attack.lr:.1e}".replace(".0e", "e").replace("e-0", "e-")
    cells = (
        score,
        words.number(last.retain if last else None),
        words.count(last.tokens if last else None),
        f"{lr.replace('-', chr(0x2212)) or chr(0x2013)}, {attack.seed}",
        words.ACCESS[attack.access],
        f"{words.plain(attack.trained_on) or chr(0x2013)} \u2192 {words.plain(attack.scored_on)}",
        words.short(last.flops, "FLOP") if last and last.flops else words.MISSING,
    )
    marks: tuple[str, ...] = ("decides",) if attack.decisive else ()
    marks += ("control",) if attack.control else ()
    marks += ("holds the original",) if attack.needs_original else ()
    marks += ("shown: trained on test units",) if "trained_on_test_units" in attack.facts else ()
    if "trial" in attack.facts:
        best = words.number(attack.facts.get("best_so_far"))
        marks += (f"trial {attack.facts['trial']}, best by then {best}",)
    subject, reason = words.plain(attack.subject), words.spell(attack.reason)
    interval = words.interval(last.low, last.high) if last else ""
    name = words.attack_name(attack)
    return AttackRow(name, marks, attack.status, reason, subject, interval, cells)


def value(item: object) -> str:
    """Return any value of the record as text: numbers as numbers, the rest as JSON."""
    if isinstance(item, bool):
        return "yes" if item else "no"
    if item is None:
        return words.MISSING
    if isinstance(item, int):
        return words.count(item)
    if isinstance(item, float):
        return words.number(item)
    if isinstance(item, str):
        return words.spell(item) or "\u2013"
    return words.plain(json.dumps(item, ensure_ascii=False, default=str))


def data(record: Record) -> dict[str, Any]:
    """Return the data's facts, notes, and rows and units by role."""
    facts = record.data
    counts = {k: v for k, v in facts.items() if k in ("rows", "units") and isinstance(v, Mapping)}
    roles = list(dict.fromkeys(role for by_role in counts.values() for role in by_role))
    rows = [
        (words.plain(role), *(value(counts.get(k, {}).get(role)) for k in ("rows", "units")))
        for role in roles
    ]
    notes = facts.get("notes") or ()
    notes = [notes] if isinstance(notes, str) else notes
    rest = [
        (words.plain(k).replace("_", " "), value(v))
        for k, v in facts.items()
        if k not in counts and k not in ("notes", "fingerprint")
    ]
    return {"rows": rows, "notes": [words.spell(n) for n in notes], "rest": rest}


def environment(record: Record) -> list[tuple[str, str]]:
    """Return versions, device and cost as pairs."""
    env = record.environment
    pairs = [
        ("excise", env.excise),
        *env.versions.items(),
        ("device", env.device),
        ("dtype", env.dtype),
        ("platform", env.platform),
        ("git", env.git),
        ("processes", str(env.world)),
        ("threads per process", str(env.threads)),
        ("started", env.started),
        ("wall-clock", words.duration(record.seconds) if record.seconds else ""),
        ("peak memory", words.size(record.peak_memory_bytes) if record.peak_memory_bytes else ""),
        ("seeds", ", ".join(map(str, record.seeds))),
    ]
    return [(words.plain(k), words.plain(v) or words.MISSING) for k, v in pairs]


def models(record: Record) -> list[tuple[str, ...]]:
    """Return every model with its fingerprints."""
    return [
        (
            words.plain(m.name),
            words.plain(m.source or m.path) or words.MISSING,
            words.short(m.parameters) if m.parameters else words.MISSING,
            words.plain(m.fingerprint) or words.MISSING,
            words.plain(m.tokenizer) or words.MISSING,
        )
        for m in (*record.models, *(run.model for run in record.method_runs))
    ]
