"""The model card: what was removed, how it was attacked, what came back, what that does not show.

Of an upstream card the licence, tags and other facts about provenance are kept word for word;
its evaluation results are not, because they are those of another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from excise.core.errors import UserError, nearest
from excise.record import AttackVariant, MethodRun, Record, Verdict
from excise.report import words
from excise.report.limits import limits
from excise.report.tables import levels

KEPT = re.compile(
    r"^(license(_name|_link)?|language|pipeline_tag|library_name|datasets|base_model|extra_gated_\w+)$"
)
"""Fields of the upstream front matter that stay true of the edited model."""

TAGS = ("unlearning", "excise")


def render_card(
    record: Record, name: str, upstream_card: str | None = None, *, refit: bool = False
) -> str:
    """Return the README.md of an edited model.

    Args:
        record: The record of the run that made it.
        name: Which removed model.
        upstream_card: The README of the original model, if it has one.
        refit: Whether the card lies beside the model that the method made of all forget rows
            (`MethodRun.refit`); it then says that another model was attacked.

    Raises:
        UserError: If the record has no such model.
    """
    names = words.model_names(record)
    if name not in names:
        raise UserError(f"the record has no model '{name}'; {nearest(name, names)}")
    method_run = next((run for run in record.method_runs if run.name == name), None)
    verdict = next((v for v in record.verdicts if v.model == name), None)
    source = next((m.source for m in record.models if m.name == "original"), "")
    parts = [
        front_matter(upstream_card, source),
        f"# {_md(words.plain(record.title) or name)}: {_md(name)}\n",
        _opening(record, verdict, source, refit=refit),
        _removed(record, method_run),
        _audited(record, method_run, refit=refit),
        _attacked(record, name),
        _levels(verdict),
        _scores(record, name, refit=refit),
        "## What this does not show\n",
        "".join(f"- {_md(limit)}\n" for limit in limits(record)),
        _reproduce(record),
    ]
    if upstream_card and upstream_card.strip():
        parts.append(
            "## The original model\n\nThe licence and tags above are those of the original "
            "model's card. Its evaluation results were left out: they are not this model's.\n"
        )
    return "\n".join(part for part in parts if part)


def _md(text: object) -> str:
    """Return user text that Markdown and HTML print as it is, on one line."""
    line = " ".join(words.spell(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", line)


def _code(text: object) -> str:
    """Return user text as a fenced block that it cannot close."""
    clean = words.plain(text)
    longest = max((len(run) for run in re.findall(r"`+", clean)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{clean}\n{fence}\n"


def blocks(card: str) -> dict[str, str]:
    """Return the top-level fields of a card's YAML front matter, each as its own lines.

    The lines are kept as they are, not parsed, so that what the upstream wrote stays written.

    Args:
        card: A README with or without front matter.
    """
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", card, re.DOTALL)
    fields: dict[str, str] = {}
    name = ""
    for line in match.group(1).splitlines() if match else ():
        head = re.match(r"([A-Za-z_][\w-]*)[ \t]*:", line)
        if head:
            name = head.group(1)
            fields[name] = line + "\n"
        elif name and (not line.strip() or line[0] in " \t-#"):
            fields[name] += line + "\n"
    return fields


def front_matter(upstream: str | None, source: str) -> str:
    """Return the YAML front matter: the upstream's licence and kept fields, its tags and ours."""
    fields = blocks(upstream or "")
    lines = [text for name, text in fields.items() if KEPT.match(name)]
    # Only with a revision: without one, a source may as well be a folder of that name.
    if "base_model" not in fields and re.fullmatch(r"[\w.-]+/[\w.-]+@[\w.-]+", source):
        lines.append(f"base_model: {source.partition('@')[0]}\n")
    lines.append(_tags(fields.get("tags", "")))
    return "---\n" + "".join(lines) + "---\n"


def _tags(block: str) -> str:
    """Return the tags field with ours added, whether it was a list, inline or a single word."""
    head, _, rest = block.partition("\n")
    inline = head.partition(":")[2].strip()
    items = re.findall(r"^\s*-\s+(.*?)\s*$", rest, re.MULTILINE)
    if inline.startswith("["):
        inside = (inline + rest).replace("\n", " ").strip()[1:].partition("]")[0]
        items = [i.strip() for i in inside.split(",") if i.strip()]
    elif inline and not inline.startswith("#"):
        items = [inline]
    bare = {i.strip("\"'") for i in items}
    items += [t for t in TAGS if t not in bare]
    return "tags:\n" + "".join(f"- {i}\n" for i in items)


def _opening(record: Record, verdict: Verdict | None, source: str, *, refit: bool) -> str:
    text = "This model was edited to remove something from it.\n"
    if source:
        text = f"This is {_md(source)} with something removed.\n"
    if verdict is None:
        return text + "\n**It was not attacked, so how much would come back is not known.**\n"
    lines = [text, f"**{_md(verdict.sentence)}**\n"]
    if refit:
        lines.insert(1, "**This model was not attacked.** What follows is about the audited one:\n")
    lines += [f"Highest depth level that counts: {_md(words.highest(verdict))}.\n"]
    lines += ["".join(f"- {_md(r)}\n" for r in (*verdict.reasons, *record.notes))]
    return "\n".join(line for line in lines if line)


def _removed(record: Record, method_run: MethodRun | None) -> str:
    data = record.data
    lines = ["## What was removed, and how\n"]
    facts: list[tuple[str, object]] = [("data", data.get("name", ""))]
    facts += [("claim", data.get("claim", "")), ("exposure", data.get("exposure", ""))]
    rows = data.get("rows")
    if isinstance(rows, Mapping):
        facts += [(f"rows of {k}", v) for k, v in rows.items() if str(k).startswith("forget")]
    if method_run is not None:
        facts += [
            ("method", method_run.method.get("name", method_run.name)),
            ("seed", method_run.seed),
        ]
        sweep = method_run.extras.get("sweep")
        chosen = sweep.get("chosen", {}) if isinstance(sweep, Mapping) else {}
        settings = {**method_run.method, **chosen}
        facts += [(f"setting {k}", v) for k, v in settings.items() if k not in ("name", "sweep")]
        facts += [("chosen by a sweep", ", ".join(chosen))]
        facts += [("tensors changed", len(method_run.changed))]
        facts += [(f"cost, {k}", f"{v:.4g}") for k, v in method_run.cost.items()]
    lines += [f"- {_md(key)}: {_md(text)}\n" for key, text in facts if text not in ("", None)]
    return lines[0] + "\n" + "".join(lines[1:])


def _audited(record: Record, method_run: MethodRun | None, *, refit: bool) -> str:
    """Say which bytes lie in the folder, and whether they are those that were attacked."""
    if method_run is None:
        return ""
    audited, here = method_run.model, method_run.refit if refit else method_run.model
    assert here is not None
    attacked = any(v.model == method_run.name for v in record.verdicts)
    print_here, print_audited = (
        f"fingerprint `{_word(model.fingerprint or words.MISSING)}`" for model in (here, audited)
    )
    if refit:
        text = (
            f"The method was repeated on all rows, and the weights in this folder ({print_here}) "
            "are that refit. **They were not attacked.** "
        )
        text += "The audited model is" if attacked else "The model that can be audited beside it is"
        text += f" the one made from the method's part of the split ({print_audited}).\n"
    else:
        text = f"The weights in this folder ({print_here}).\n"
        text = text if attacked else f"None. The weights in this folder have the {print_here}.\n"
    if here.files:
        text += "\nSHA-256 of the files in this folder, as `sha256sum` prints it:\n\n"
        text += _rows(("File", "SHA-256"), sorted(here.files.items()))
    return "## Which model was audited\n\n" + text


def _word(text: object) -> str:
    """Return text safe inside backticks."""
    return re.sub(r"[^\w ./@:+-]", "", words.plain(text))


def _rows(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(_md(c) for c in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _attacked(record: Record, name: str) -> str:
    attacks = words.attacks_on(record, name)
    head = "## How it was attacked, and what came back\n\n"
    if not attacks:
        return head + "It was not attacked.\n"
    shown = [a for a in attacks if a.decisive or a.status != "ok" or a.control]
    rows = [_attack_row(a) for a in (shown or attacks)]
    header = (
        "Attack",
        "Access",
        "Trained on",
        "Before",
        "After",
        "95 % interval",
        "Tokens",
        "Status",
    )
    return (
        head
        + _rows(header, rows)
        + f"\nBefore and after are scores on {words.scored_on(record)}; other rates are in the "
        "report.\n"
    )


def _attack_row(attack: AttackVariant) -> tuple[object, ...]:
    first, last = (attack.curve[0], attack.curve[-1]) if attack.curve else (None, None)
    name = f"{attack.name} {attack.variant}".strip() + (" (control)" if attack.control else "")
    status = words.STATUS[attack.status][1] + (f": {attack.reason}" if attack.reason else "")
    return (
        name,
        words.ACCESS[attack.access],
        attack.trained_on or "nothing",
        words.number(first.score if first else None),
        words.number(last.score if last else None),
        (words.interval(last.low, last.high) if last else "") or words.MISSING,
        words.count(last.tokens if last else None),
        status,
    )


def _levels(verdict: Verdict | None) -> str:
    if verdict is None or not verdict.levels:
        return ""
    rows = [
        (
            f"{row.words} ({row.code})",
            words.STATUS[row.status][1]
            + ("" if row.counts else ", but does not count: a lower one did not"),
            row.against,
            f"{row.gap} {row.interval}".strip(),
        )
        for row in levels(verdict)
    ]
    header = ("Level", "Result", "Compared with", "Depth gap, 90 % interval")
    return "## How deep the cut went\n\n" + _rows(header, rows)


def _scores(record: Record, name: str, *, refit: bool) -> str:
    known = {(s.model, s.set, s.metric): s for s in record.scores}
    rows = []
    for (model, where, metric), score in known.items():
        if model != name:
            continue
        base = known.get(("original", where, metric))
        before = f"{words.number(base.value)} {words.interval(base.low, base.high)}" if base else ""
        after = f"{words.number(score.value)} {words.interval(score.low, score.high)}"
        named = f"{words.metric_name(metric)} ({score.direction} is more knowledge)"
        rows.append((words.set_name(where), named, before or words.MISSING, after, score.n))
    if not rows:
        return ""
    which = "Audited model" if refit else "This model"
    header = ("Set", "Metric", "Original", which, "Units")
    return "## Scores before and after, without an attack\n\n" + _rows(header, rows)


def _reproduce(record: Record) -> str:
    env = record.environment
    versions = ", ".join(f"{k} {v}" for k, v in env.versions.items())
    text = "\n## How to reproduce\n\n"
    text += _code(record.command) + "\n" if record.command else ""
    return text + (
        f"excise {_md(env.excise or words.MISSING)}, {_md(versions or words.MISSING)}, "
        f"on {_md(env.device or words.MISSING)} in {_md(env.dtype or words.MISSING)}. "
        f"Fingerprint of the data: `{_word(record.data.get('fingerprint') or words.MISSING)}`. "
        "The full record is `run.json` beside the report.\n"
    )
