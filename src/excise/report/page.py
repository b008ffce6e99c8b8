"""report.html: one file, no network, a pure function of the record."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from excise.core.disk import write_text
from excise.record import LEVELS, MethodRun, Record, Verdict, load
from excise.report import figures, inspection, study, svg, tables, words
from excise.report.limits import limits

LEGEND = {
    "candidate": "after removal, on the held-out test set",
    "trained": "after removal, on the relearn set (what the attacker trains on; never decisive)",
    "original": "original, a reference model",
    "oracle": "oracle, a reference model",
    "control": "controls: the same attack without the information",
    "positive": "positive control",
}


def render_html(record: Record) -> str:
    """Return the whole page.

    Args:
        record: Any record, however incomplete. Where `sensitive` is set, samples are left out
            even if it holds some.

    Returns:
        One HTML file that needs no network; every text of the record is escaped.
    """
    if record.sensitive:
        hidden = {"samples": (), "inspection": inspection.redacted(record.inspection)}
        record = record.model_copy(update=hidden)
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
    names = words.model_names(record)
    runs = {run.name: run for run in record.method_runs}
    verdicts = {v.model: v for v in record.verdicts}
    shared, oracle = _shared(record), words.has_oracle(record)
    tested = {r.level for v in record.verdicts for r in words.tested(v.levels)}
    blocks: list[dict[str, Any]] = []
    for index, name in enumerate(names):
        verdict, method_run = verdicts.get(name), runs.get(name)
        blocks.append(
            {
                "key": f"model-{index}",
                "name": words.plain(name),
                "verdict": _verdict(record, verdict, shared, oracle) if verdict else None,
                "levels": tuple(tables.levels(verdict)) if verdict else (),
                "not_tested": words.not_tested((verdict,)) if verdict else "",
                "gap": figures.gap_figure(verdict, f"gap-{index}") if verdict else None,
                "curves": figures.relearn_figures(record, name, f"curve-{index}"),
                "attacks": figures.attack_figures(record, name, f"attack-{index}"),
                "table": tables.by_level(words.attacks_on(record, name)),
                "removal": _removal(method_run, index) if method_run else None,
            }
        )
    scores = figures.score_figures(record)
    on_candidates = [a for name in names for a in words.attacks_on(record, name)]
    others = [a for a in record.attacks if a not in on_candidates]
    inside = inspection.view(record)
    return {
        "record": record,
        "title": words.plain(record.title) or "Removal record",
        "subtitle": _subtitle(record),
        "blocks": blocks,
        "inspection": inside,
        "alone": (record.kind == "inspect" and inside is not None) or record.kind == "study",
        "study_views": study.views(record),
        "study_stated": study.stated(record),
        "study_pictures": (*study.plots(record), *study.pictures(record)),
        "study_absorption": figures.study_absorption_figure(record),
        "notes": (*shared, *record.notes),
        "oracle": oracle,
        "lead": figures.lead_figure(record),
        "answers": tables.answers(record),
        "removed": words.capabilities(record),
        "scored": words.scored_on(record),
        "level_words": tuple((code, text) for code, text in LEVELS.items() if code in tested),
        "scores": scores,
        "score_table": tables.score_table(record),
        "score_legend": _legend(scores),
        "curve_legend": _legend(figure for block in blocks for figure in block["curves"]),
        "attack_legend": _legend(figure for block in blocks for figure in block["attacks"]),
        "others": tables.by_level(others),
        "other_count": len(others),
        "samples": _samples(record),
        "data": tables.data(record),
        "limits": tuple(s for s in limits(record) if s != words.WITHOUT_ORACLE),
        "without_oracle": "" if oracle or not record.attacks else words.WITHOUT_ORACLE,
        "config": json.dumps(record.config, indent=2, ensure_ascii=False, default=str),
        "environment": tables.environment(record),
        "models": tables.models(record),
        "glossary": words.glossary(record).items(),
        "status": words.STATUS,
        "embedded": embedded(record),
    }


def _subtitle(record: Record) -> tuple[str, ...]:
    kinds = {"run": "recipe", "remove": "removal", "audit": "audit", "study": "study"}
    kinds["inspect"] = "inspection"
    budgets = sorted({v.budget for v in record.verdicts if v.budget})
    parts = [kinds[record.kind]]
    parts += [f"budget: {words.plain(b)}" for b in budgets]
    parts += [
        f"{k}: {words.plain(record.data[k])}" for k in ("claim", "exposure") if record.data.get(k)
    ]
    seeds = len(record.seeds)
    parts += ["1 seed" if seeds == 1 else f"{seeds} seeds"]
    parts += [words.plain(record.environment.started[:10])] if record.environment.started else []
    parts += [f"took {words.duration(record.seconds)}"] if record.seconds else []
    return tuple(p.replace("_", " ") for p in parts)


def _shared(record: Record) -> tuple[str, ...]:
    """Return what is said of every model alike, to be said once."""
    if len(record.verdicts) < 2:
        return ()
    first, *others = (v.reasons for v in record.verdicts)
    return tuple(r for r in first if all(r in other for other in others))


def _verdict(
    record: Record, verdict: Verdict, shared: tuple[str, ...], oracle: bool
) -> dict[str, Any]:
    """Return a verdict as text; what only an oracle can measure is left out without one."""
    recovery = words.share(verdict.recovery)
    if verdict.recovery is not None and verdict.recovery_tokens is not None:
        recovery += f" after {words.count(verdict.recovery_tokens)} tokens"
    bits = words.number(verdict.residual_bits)
    if verdict.residual_bits is not None:
        bits = f"{bits} {words.interval(verdict.residual_low, verdict.residual_high)}".strip()
    facts = [
        ("Highest depth level that counts", words.highest(verdict)),
        ("Recovery fraction", recovery),
    ]
    if oracle:
        facts += [
            ("Residual bits per unit", bits),
            ("Measured null of the audit", words.number(verdict.null)),
        ]
    reasons = tuple(words.spell(r) for r in verdict.reasons if r not in shared)
    return {
        "sentence": words.spell(verdict.sentence),
        "right": words.how_often_right(record, verdict),
        "facts": facts,
        "reasons": reasons,
    }


def _legend(shown: Iterable[figures.Figure]) -> list[tuple[Markup, str]]:
    roles = {role for figure in shown for role in figure.roles}
    return [(svg.swatch(r), text) for r, text in LEGEND.items() if r in roles]


def _samples(record: Record) -> list[dict[str, Any]]:
    return [
        {
            "set": words.set_name(s.set),
            "prompt": words.plain(s.prompt).strip(" "),
            "expected": words.plain(s.expected).strip(" "),
            "outputs": [
                (words.plain(m), words.plain(t).strip(" "))
                for m, t in sorted(s.outputs.items(), key=lambda o: words.RANK[words.role(o[0])])
            ],
        }
        for s in record.samples
    ]


def _removal(method_run: MethodRun, index: int) -> dict[str, Any]:
    cost = [(k.replace("_", " "), _cost(k, v)) for k, v in method_run.cost.items()]
    history = figures.history_figure(method_run, f"history-{index}")
    keys = [] if history is None else list(zip(history.roles, history.header[1:], strict=True))
    return {
        "method": words.plain(method_run.method.get("name", method_run.name)),
        "settings": [
            (words.plain(k), _setting(v)) for k, v in method_run.method.items() if k != "name"
        ],
        "cost": [(words.plain(k), v) for k, v in cost],
        "extras": [
            (words.plain(k).replace("_", " "), tables.value(v))
            for k, v in method_run.extras.items()
            if k not in ("files", "absorption")
        ],
        "changed": [words.plain(c) for c in method_run.changed],
        "seed": method_run.seed,
        "history": history,
        "absorption": figures.absorption_figure(method_run, f"absorption-{index}"),
        "legend": [(svg.swatch(role), name) for role, name in keys],
    }


def _cost(name: str, amount: float) -> str:
    if name == "seconds":
        return words.duration(amount)
    if name == "flops":
        return words.short(amount, "FLOP")
    return words.count(amount) if float(amount).is_integer() else words.number(amount)


def _setting(item: object) -> str:
    """Return a hyper-parameter as one would type it."""
    return words.plain(item if isinstance(item, str) else json.dumps(item, default=str))
