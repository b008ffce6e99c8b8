"""report.html: one file, no network, a pure function of the record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from excise.record import ArmRecord, AttackArm, Record, RungResult, Score, Verdict, load, write_text
from excise.report import figures, svg, words
from excise.report.limits import limits

LEGEND = {
    "candidate": "after removal, on V",
    "trained": "after removal, on T (what the attacker trains on; never decisive)",
    "original": "original, the upper rail",
    "oracle": "oracle, the lower rail",
    "control": "controls: the same attack without the information",
    "planted": "planted control",
}


@dataclass(frozen=True)
class _Rung:
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
class _Attack:
    cells: tuple[str, ...]
    name: str
    status: str
    reason: str
    marks: tuple[str, ...]


def render_html(record: Record) -> str:
    """Return the whole page.

    Args:
        record: Any record, however incomplete. Where `sensitive` is set, samples are left out
            even if it holds some.

    Returns:
        One HTML file that needs no network; every text of the record is escaped.
    """
    if record.sensitive:
        record = record.model_copy(update={"samples": ()})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        spell=words.spell, plain=words.plain, number=words.number, count=words.count
    )
    return environment.get_template("page.html").render(**_context(record))


def write_report(folder: Path) -> Path:
    """Write `report.html` from the record in `folder`, and return its path.

    Raises:
        UserError: If `folder` holds no record that can be read.
    """
    path = (folder if folder.is_dir() else folder.parent) / "report.html"
    write_text(path, render_html(load(folder)))
    return path


def embedded(record: Record) -> Markup:
    """Return the record as JSON that is safe inside a script element."""
    text = record.model_dump_json(by_alias=True)
    unsafe = ("<", ">", "&", "\u2028", "\u2029")
    for character in unsafe:
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _context(record: Record) -> dict[str, Any]:
    names = words.arm_names(record)
    arms = {a.name: a for a in record.arms}
    verdicts = {v.arm: v for v in record.verdicts}
    blocks = []
    for index, name in enumerate(names):
        verdict, arm = verdicts.get(name), arms.get(name)
        blocks.append(
            {
                "key": f"arm-{index}",
                "name": words.plain(name),
                "verdict": _verdict(verdict) if verdict else None,
                "rungs": tuple(_rungs(verdict)) if verdict else (),
                "gap": figures.gap_figure(verdict, f"gap-{index}") if verdict else None,
                "curves": figures.relearn_figures(record, name, f"curve-{index}"),
                "attacks": figures.attack_figures(record, name, f"attack-{index}"),
                "removal": _removal(arm, index) if arm else None,
            }
        )
    shown = figures.score_figures(record)
    drawn = [f for b in blocks for f in (*b["curves"], *b["attacks"])]
    return {
        "record": record,
        "title": words.plain(record.title) or "Removal record",
        "subtitle": _subtitle(record),
        "blocks": blocks,
        "ladder": tuple(words.LADDER.items()),
        "scores": shown,
        "score_table": _score_table(record, names),
        "score_legend": _legend(shown),
        "curve_legend": _legend(drawn),
        "own": [_attack(a) for a in _sorted(record) if _own(a)],
        "rails": [_attack(a) for a in _sorted(record) if not _own(a)],
        "samples": _samples(record),
        "data": _data(record),
        "limits": limits(record),
        "config": json.dumps(record.config, indent=2, ensure_ascii=False, default=str),
        "environment": _environment(record),
        "models": _models(record),
        "glossary": words.GLOSSARY,
        "status": words.STATUS,
        "embedded": embedded(record),
    }


def _subtitle(record: Record) -> tuple[str, ...]:
    kinds = {"run": "recipe", "remove": "removal", "audit": "audit", "study": "study"}
    budgets = sorted({v.budget for v in record.verdicts if v.budget})
    parts = [kinds[record.kind]]
    parts += [f"budget: {words.plain(b)}" for b in budgets]
    parts += [f"{k}: {words.plain(record.data[k])}" for k in ("claim", "exposure") if record.data.get(k)]
    seeds = len(record.seeds)
    parts += ["1 seed" if seeds == 1 else f"{seeds} seeds"]
    parts += [words.plain(record.environment.started[:10])] if record.environment.started else []
    parts += [f"took {words.duration(record.seconds)}"] if record.seconds else []
    return tuple(p.replace("_", " ") for p in parts)


def _verdict(verdict: Verdict) -> dict[str, Any]:
    recovery = words.share(verdict.recovery)
    if verdict.recovery is not None and verdict.recovery_tokens is not None:
        recovery += f" after {words.count(verdict.recovery_tokens)} tokens"
    bits = words.number(verdict.residual_bits)
    if verdict.residual_bits is not None:
        bits = f"{bits} {words.interval(verdict.residual_low, verdict.residual_high)}".strip()
    facts = (
        ("Highest rung that counts", words.highest(verdict)),
        ("Recovery fraction on V", recovery),
        ("Residual bits per unit", bits),
        ("Measured null of the audit", words.number(verdict.null)),
    )
    reasons = tuple(words.spell(r) for r in verdict.reasons)
    return {"sentence": words.spell(verdict.sentence), "facts": facts, "reasons": reasons}


def _rungs(verdict: Verdict) -> Iterable[_Rung]:
    for rung, solid in zip(verdict.rungs, words.counts(verdict.rungs), strict=True):
        yield _Rung(
            code=rung.rung,
            words=words.rung_words(rung.rung, verdict.rungs),
            status=rung.status,
            counts=solid or rung.status != "pass",
            against=words.AGAINST[rung.against],
            gap=words.number(rung.gap),
            interval=words.interval(rung.low, rung.high),
            margin="\u00b1 " + words.number(rung.margin) if rung.margin is not None else words.MISSING,
            decided_by=words.spell(rung.decided_by) or "\u2013",
            reason=_reason(rung),
        )


def _reason(rung: RungResult) -> str:
    return words.spell(rung.reason) or "\u2013"


def _score_table(record: Record, names: tuple[str, ...]) -> dict[str, Any]:
    columns = list(dict.fromkeys((s.set, s.metric) for s in record.scores))
    by: dict[tuple[str, str, str], Score] = {(s.model, s.set, s.metric): s for s in record.scores}
    models = sorted(
        dict.fromkeys(s.model for s in record.scores),
        key=lambda m: ({"original": 0, "candidate": 1, "planted": 2, "oracle": 3}[words.role(m)],),
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


def _legend(found: Iterable[figures.Figure]) -> list[tuple[Markup, str]]:
    roles = {r for f in found for r in f.roles}
    return [(svg.swatch(r), text) for r, text in LEGEND.items() if r in roles]


def _own(arm: AttackArm) -> bool:
    return words.role(arm.subject) == "candidate" or arm.status != "ok"


def _sorted(record: Record) -> list[AttackArm]:
    return sorted(
        record.attacks, key=lambda a: (a.subject, a.rung, a.name, a.control, a.arm, a.lr or 0, a.seed)
    )


def _attack(arm: AttackArm) -> _Attack:
    first, last = (arm.curve[0], arm.curve[-1]) if arm.curve else (None, None)
    score = words.MISSING
    if last is not None and first is not None:
        score = words.number(last.score)
        if len(arm.curve) > 1:
            score = f"{words.number(first.score)} \u2192 {score}"
    roles = words.plain(arm.trained_on).replace("_", " ") or "nothing"
    cells = (
        words.plain(arm.subject),
        words.ACCESS[arm.access],
        words.rung_words(arm.rung) + (f" ({arm.rung})" if arm.rung in words.LADDER else ""),
        f"{roles} \u2192 {words.set_name(arm.scored_on)}",
        "\u2013" if arm.lr is None else f"{arm.lr:.0e}".replace("e-0", "e\u2212").replace("e-", "e\u2212"),
        str(arm.seed),
        score,
        (words.interval(last.low, last.high) if last else "") or words.MISSING,
        words.count(last.tokens if last else None),
        words.short(last.flops, "FLOP") if last and last.flops else words.MISSING,
        words.number(last.retain if last else None),
    )
    marks = ("decides",) if arm.decisive else ()
    marks += ("control",) if arm.control else ()
    marks += ("holds the original",) if arm.needs_original else ()
    name = words.plain(arm.name).replace("_", " ") + (f", {words.plain(arm.arm)}" if arm.arm else "")
    return _Attack(cells, name, arm.status, words.spell(arm.reason), marks)


def _samples(record: Record) -> list[dict[str, Any]]:
    rank = {"original": 0, "candidate": 1, "planted": 2, "oracle": 3}
    return [
        {
            "set": words.set_name(s.set),
            "prompt": words.plain(s.prompt),
            "expected": words.plain(s.expected),
            "outputs": [
                (words.plain(m), words.plain(t))
                for m, t in sorted(s.outputs.items(), key=lambda o: rank[words.role(o[0])])
            ],
        }
        for s in record.samples
    ]


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


def _removal(arm: ArmRecord, index: int) -> dict[str, Any]:
    units = {"steps": words.count, "tokens": words.count, "seconds": words.duration}
    cost = [
        (k.replace("_", " "), units[k](v) if k in units else words.short(v, "FLOP") if k == "flops" else value(v))
        for k, v in arm.cost.items()
    ]
    history = figures.history_figure(arm, f"history-{index}")
    keys = [] if history is None else list(zip(history.roles, history.header[1:], strict=True))
    return {
        "method": words.plain(arm.method.get("name", arm.name)),
        "settings": [(words.plain(k), _setting(v)) for k, v in arm.method.items() if k != "name"],
        "cost": [(words.plain(k), v) for k, v in cost],
        "extras": [
            (words.plain(k).replace("_", " "), value(v))
            for k, v in arm.extras.items()
            if k != "files"
        ],
        "changed": [words.plain(c) for c in arm.changed],
        "seed": arm.seed,
        "history": history,
        "legend": [(svg.swatch(role), name) for role, name in keys],
    }


def _setting(item: object) -> str:
    """Return a hyper-parameter as one would type it."""
    return words.plain(item if isinstance(item, str) else json.dumps(item, default=str))


def _data(record: Record) -> dict[str, Any]:
    data = record.data
    tables = {k: v for k, v in data.items() if k in ("rows", "units") and isinstance(v, Mapping)}
    roles = list(dict.fromkeys(r for v in tables.values() for r in v))
    rows = [
        (words.plain(r), *(value(tables.get(k, {}).get(r)) for k in ("rows", "units"))) for r in roles
    ]
    notes = data.get("notes") or ()
    notes = [notes] if isinstance(notes, str) else notes
    rest = [
        (words.plain(k).replace("_", " "), value(v))
        for k, v in data.items()
        if k not in tables and k not in ("notes", "fingerprint")
    ]
    return {"rows": rows, "notes": [words.spell(n) for n in notes], "rest": rest}


def _environment(record: Record) -> list[tuple[str, str]]:
    env = record.environment
    pairs = [
        ("excise", env.excise),
        *env.versions.items(),
        ("device", env.device),
        ("dtype", env.dtype),
        ("platform", env.platform),
        ("git", env.git),
        ("processes", f"{env.world} with {env.threads} threads each"),
        ("started", env.started),
        ("wall-clock", words.duration(record.seconds) if record.seconds else ""),
        ("peak memory", words.size(record.peak_memory_bytes) if record.peak_memory_bytes else ""),
        ("seeds", ", ".join(map(str, record.seeds))),
    ]
    return [(words.plain(k), words.plain(v) or words.MISSING) for k, v in pairs]


def _models(record: Record) -> list[tuple[str, ...]]:
    found = [*record.models, *(a.model for a in record.arms)]
    return [
        (
            words.plain(m.name),
            words.plain(m.source or m.path) or words.MISSING,
            words.short(m.parameters) if m.parameters else words.MISSING,
            words.plain(m.fingerprint) or words.MISSING,
            words.plain(m.tokenizer) or words.MISSING,
        )
        for m in found
    ]
