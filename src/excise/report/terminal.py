"""The record on a terminal: what a release manager asks, then the verdict and the numbers."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from excise.record import LEVELS, AttackVariant, Record, Verdict, load, requirements
from excise.record.measured import PROXY
from excise.report import study, words

STYLE = {
    "pass": "green",
    "fail": "red",
    "below": "yellow",
    "untested": "dim",
    "underpowered": "yellow",
    "uncounted": "dim",
    "ok": "green",
    "invalid": "yellow",
    "missing": "dim",
    "failed": "red",
}
SHIP = {"yes": "green", "no": "red", "open": "yellow"}


def finish(folder: Path, next_command: str = "") -> int:
    """Print the summary of a run, as a verb's last step.

    Args:
        folder: Output folder with a `run.json`, whose report is written.
        next_command: What to type next; empty for what the record suggests.

    Returns:
        Exit code: 3 where a condition of the run's requirement is missed, 1 where an attack ended
        in an error, 4 where a condition is inconclusive, else 0.

    Raises:
        UserError: If the folder holds no record, or its requirement names an unknown metric.
    """
    record = load(folder)
    Console().print(render_terminal(record, folder, next_command))
    asked = requirements.of_record(record)
    conditions = requirements.parse_requirement(asked) if asked else ()
    outcomes = requirements.check(record, conditions, words.model_names(record))
    if said := requirements.told(record, outcomes):
        print(_ascii(said))
    return requirements.exit_code(record, outcomes)


def render_terminal(
    record: Record, folder: Path | None = None, next_command: str = ""
) -> RenderableType:
    """Return what `rich` prints at the end of a run.

    Colours are styles alone, so a console under NO_COLOR prints the same words without them.

    Args:
        record: Any record.
        folder: The output folder, to name the report and the next command.
        next_command: What to type next; empty for what the record suggests.
    """
    parts: list[RenderableType] = [*_inspection(record), *_study(record)]
    verdicts = {v.model: v for v in record.verdicts}
    for name in () if record.inspection or record.study else words.model_names(record):
        parts.append(Text(_ascii(name), style="bold"))
        parts.append(_answers(record, name))
        if name in verdicts:
            parts.append(Padding(_sentence(record, verdicts[name]), (0, 0, 1, 2)))
    if record.verdicts:
        parts.append(_levels(record))
    if record.scores:
        parts.append(_scores(record))
    if record.attacks:
        parts.append(_attacks(record))
    if record.attacks and not words.has_oracle(record):
        parts.append(Text(_ascii(words.WITHOUT_ORACLE) + "\n", style="dim"))
    for note in record.notes:
        parts.append(Text(f"note: {_ascii(words.spell(note))}", style="dim"))
    if folder is not None:
        parts.append(Text(f"report  {folder / 'report.html'}", overflow="fold"))
        following = next_command or _next(record, folder)
        parts += [Text(f"next    {following}", overflow="fold")] if following else []
    return Group(*parts)


def _inspection(record: Record) -> list[RenderableType]:
    """Return what an inspection finding: the sentence, the paragraph, the numbers by block."""
    finding = record.inspection
    if finding is None:
        return []
    table = _table("By block: norms are forget, then retain text")
    heads = ("block", "norm before", "norm after", "one direction", "cosine", "AUC", "AUC, answers")
    for head in heads:
        table.add_column(head, justify="right", overflow="fold")
    step = max(1, len(finding.blocks) // 16)
    shown = [b for b in finding.blocks if b.block % step == 0 or b.block == finding.clearest]
    for b in shown:
        before = (b.norm_forget_original, b.norm_retain_original)
        after = (b.norm_forget_edited, b.norm_retain_edited)
        cells = [f"{forget.value:.3g} {retain.value:.3g}" for forget, retain in (before, after)]
        cells += [words.share(b.share), f"{b.cosine.value:.2f}"]
        cells += [f"{b.auc.value:.2f}", f"{b.auc_answers:.2f}"]
        style = "bold" if b.block == finding.clearest else ""
        table.add_row(str(b.block), *(_ascii(c) for c in cells), style=style)
    hidden = len(finding.blocks) - len(shown)
    return [
        Text(_ascii(finding.model), style="bold"),
        Padding(Text(_ascii(finding.headline)), (0, 0, 1, 2)),
        Padding(Text(_ascii(finding.summary)), (0, 0, 1, 2)),
        *([] if finding.identical else [table]),
        Text(f"{hidden} more blocks in the report.\n" if hidden else "", style="dim"),
    ]


def _study(record: Record) -> list[RenderableType]:
    """Return what a study was asked, what decides, and what came out."""
    if record.study is None:
        return []
    parts: list[RenderableType] = [Text(_ascii(words.plain(record.study.decision)), style="bold")]
    parts.append(Padding(Text(_ascii(words.plain(record.study.paragraph))), (0, 0, 1, 2)))
    for key, text in study.stated(record):
        parts.append(Text(f"{key}: {_ascii(text)}", style="dim"))
    for view in study.views(record):
        if len(view.rows) > 12:
            parts.append(Text(f"{view.title}: {len(view.rows)} rows in the report", style="dim"))
            continue
        table = _table(_ascii(view.title))
        for i, head in enumerate(view.header[:4]):
            table.add_column(_ascii(head), justify="right" if i else "left", overflow="fold")
        for line in view.rows:
            table.add_row(*(Text(_ascii(cell)) for cell in line[:4]))
        parts.append(table)
    return parts


def _ascii(text: object) -> str:
    """Return text fit for any terminal: no control characters, plain minus signs and dashes."""
    clean = words.plain(text)
    for fancy, simple in (("\u2212", "-"), ("\u2013", "-"), ("\u2192", "->"), ("\u00b1", "+-")):
        clean = clean.replace(fancy, simple)
    return clean


def _answers(record: Record, name: str) -> RenderableType:
    """Return what was removed, whether it comes back, at what cost, and whether it can ship."""
    answers = words.answers(record, name)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    ship = Text(words.SHIP[answers.ship], style=f"bold {SHIP[answers.ship]}")
    ship.append(f": {_ascii(answers.why)}.", style="not bold default")
    removed = f"{words.capabilities(record)}; {answers.removed}"
    lines = (("Removed", removed), ("Comes back", answers.came_back), ("Retain set", answers.lost))
    for label, text in lines:
        table.add_row(label, Text(_ascii(text)))
    table.add_row("Can it ship?", ship)
    return Padding(table, (0, 0, 1, 2))


def _sentence(record: Record, verdict: Verdict) -> Text:
    text = Text(_ascii(words.spell(verdict.sentence)))
    text.append(
        f"\nHighest depth level that counts: {_ascii(words.highest(verdict))}.", style="dim"
    )
    if right := words.how_often_right(record, verdict):
        text.append(f"\n{_ascii(right)}", style="dim")
    return text


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        header_style="dim",
    )


def _cell(status: str) -> Text:
    return Text(words.STATUS[status][1], style=STYLE[status])


def _levels(record: Record) -> RenderableType:
    """Return the levels that something was compared on, and one line for the others."""
    shown = record.verdicts[:4]
    tested = {r.level for v in shown for r in words.tested(v.levels)}
    table = _table("Depth levels")
    table.add_column("level", overflow="fold")
    for verdict in shown:
        table.add_column(Text(_ascii(verdict.model)), overflow="fold", min_width=12)
    loose = False
    for code in (code for code in LEVELS if code in tested):
        cells = []
        for verdict in shown:
            counted = zip(verdict.levels, words.counts(verdict.levels), strict=True)
            hit = next(((r, solid) for r, solid in counted if r.level == code), None)
            uncounted = hit is not None and hit[0].status == "pass" and not hit[1]
            cell = _cell("untested" if hit is None else "uncounted" if uncounted else hit[0].status)
            if hit and hit[0].gap is not None:
                cell.append(f" {_ascii(words.number(hit[0].gap))}", style="default")
            if uncounted:
                cell.append(" *", style="yellow")
            loose = loose or uncounted
            cells.append(cell)
        text = words.level_words(code, shown[0].levels)
        table.add_row(Text(f"{code} {_ascii(text)}"), *cells)
    oracle = any(r.against == "oracle" for v in shown for r in v.levels)
    proxy = any(model.name.startswith(PROXY) for model in record.models)
    zero = "the oracle" if oracle else "what it is compared with"
    zero = "a proxy oracle" if oracle and proxy else zero
    notes = [f"Numbers are depth gaps: 0 is {zero}, 1 the original."] if tested else []
    notes += ["* does not count: a lower level did not pass."] if loose else []
    notes += [_ascii(words.not_tested(shown))]
    hidden = len(record.verdicts) - len(shown)
    notes += [f"{hidden} more in the report."] if hidden else []
    said = Text(" ".join(note for note in notes if note) + "\n", style="dim")
    return Group(table, said) if tested else said


def _scores(record: Record) -> RenderableType:
    columns = list(dict.fromkeys((s.set, s.metric) for s in record.scores))
    known = {(s.model, s.set, s.metric): s for s in record.scores}
    table = _table("Scores before any attack")
    table.add_column("model", overflow="fold")
    for where, metric in columns[:4]:
        way = next(s.direction for s in record.scores if (s.set, s.metric) == (where, metric))
        sign = "+" if way == "higher" else "-"
        head = f"{words.set_name(where)}, {words.metric_name(metric)} ({sign})"
        table.add_column(Text(_ascii(head)), justify="right", overflow="fold")
    for model in dict.fromkeys(s.model for s in record.scores):
        row = []
        for column in columns[:4]:
            score = known.get((model, *column))
            row.append(Text(_ascii(words.number(score.value)) if score else "-"))
        table.add_row(Text(_ascii(model)), *row)
    note = "(+) higher or (-) lower is more knowledge."
    more = len(columns) - 4
    note += f" {more} more scores in the report." if more > 0 else ""
    return Group(table, Text(note + "\n", style="dim"))


def _attacks(record: Record) -> RenderableType:
    names = words.model_names(record)[:4]
    table = _table("Attacks: held-out set, first -> last")
    table.add_column("attack", overflow="fold")
    cells: dict[str, dict[str, list[AttackVariant]]] = {}
    for name in names:
        table.add_column(Text(_ascii(name)), justify="right", overflow="fold", min_width=12)
        for attack in words.attacks_on(record, name):
            if not attack.control and (attack.decisive or attack.status != "ok"):
                title = f"{attack.name} {attack.variant}".replace("_", " ").strip()
                cells.setdefault(title, {}).setdefault(name, []).append(attack)
    for title, row in list(cells.items())[:30]:
        table.add_row(Text(_ascii(title)), *(_outcome(row.get(n, [])) for n in names))
    rest = "Other rates, controls and the reference models are in the report.\n"
    return Group(table, Text(rest, style="dim"))


def _outcome(variants: list[AttackVariant]) -> Text:
    """Return the mean over seeds of what the deciding variants did, or why they do not count."""
    bad = next((a for a in variants if a.status != "ok"), None)
    if bad is not None:
        return Text(words.UNFIT, style="dim") if words.unfit(bad) else _cell(bad.status)
    curves = [a.curve for a in variants if a.curve]
    if not curves:
        return Text("-")
    first = sum(c[0].score for c in curves) / len(curves)
    last = sum(c[-1].score for c in curves) / len(curves)
    return Text(_ascii(f"{words.two(first)} -> {words.two(last)}"))


def _next(record: Record, folder: Path) -> str:
    """Return the command that would add to the record, or nothing."""
    where = shlex.quote(str(folder))
    if record.inspection is not None or record.study is not None:
        return ""
    if record.config.get("canary") or record.config.get("endpoint"):  # left no model to attack
        return ""
    if record.config.get("keep") in ("delta", "none"):  # the same
        return ""
    if not record.attacks:
        return f"excise audit {where} --out {where}-audit"
    if any(v.budget == "smoke" for v in record.verdicts) and not words.nothing_to_remove(record):
        return f"excise audit {where} --budget standard --out {where}-standard"
    return ""
