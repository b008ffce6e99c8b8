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

KEPT = re.compile(
    r"^(license(_name|_link)?|language|pipeline_tag|library_name|datasets|base_model|extra_gated_\w+)$"
)
"""Fields of the upstream front matter that stay true of the edited model."""

TAGS = ("unlearning", "excise")


def render_card(record: Record, arm: str, upstream_card: str | None = None) -> str:
    """Return the README.md of an edited model.

    Where `extras["refit"]` of the arm is set (`True`, or a mapping with the `fingerprint` of the
    released model), the card says that the audited model is not the released one.

    Args:
        record: The record of the run that made it.
        arm: Which removal.
        upstream_card: The README of the original model, if it has one.

    Raises:
        UserError: If the record has no such arm.
    """
    names = words.arm_names(record)
    if arm not in names:
        raise UserError(f"the record has no arm '{arm}'; {nearest(arm, names)}")
    made = next((a for a in record.method_runs if a.name == arm), None)
    verdict = next((v for v in record.verdicts if v.model == arm), None)
    source = next((m.source for m in record.models if m.name == "original"), "")
    parts = [
        front_matter(upstream_card, source),
        f"# {_md(words.plain(record.title) or arm)}: {_md(arm)}\n",
        _opening(record, verdict, source),
        _removed(record, made),
        _audited(record, made),
        _attacked(record, arm),
        _ladder(verdict),
        _scores(record, arm),
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
    found: dict[str, str] = {}
    name = ""
    for line in match.group(1).splitlines() if match else ():
        head = re.match(r"([A-Za-z_][\w-]*)[ \t]*:", line)
        if head:
            name = head.group(1)
            found[name] = line + "\n"
        elif name and (not line.strip() or line[0] in " \t-#"):
            found[name] += line + "\n"
    return found


def front_matter(upstream: str | None, source: str) -> str:
    """Return the YAML front matter: the upstream's licence and kept fields, its tags and ours."""
    found = blocks(upstream or "")
    lines = [text for name, text in found.items() if KEPT.match(name)]
    # Only with a revision: without one, a source may as well be a folder of that name.
    if "base_model" not in found and re.fullmatch(r"[\w.-]+/[\w.-]+@[\w.-]+", source):
        lines.append(f"base_model: {source.partition('@')[0]}\n")
    lines.append(_tags(found.get("tags", "")))
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


def _opening(record: Record, verdict: Verdict | None, source: str) -> str:
    text = "This model was edited to remove something from it.\n"
    if source:
        text = f"This is {_md(source)} with something removed.\n"
    if verdict is None:
        return text + "\n**It was not attacked, so how much would come back is not known.**\n"
    lines = [text, f"**{_md(verdict.sentence)}**\n"]
    lines += [f"Highest level of the ladder that counts: {_md(words.highest(verdict))}.\n"]
    lines += ["".join(f"- {_md(r)}\n" for r in (*verdict.reasons, *record.notes))]
    return "\n".join(line for line in lines if line)


def _removed(record: Record, arm: MethodRun | None) -> str:
    data = record.data
    lines = ["## What was removed, and how\n"]
    facts: list[tuple[str, object]] = [("data", data.get("name", ""))]
    facts += [("claim", data.get("claim", "")), ("exposure", data.get("exposure", ""))]
    rows = data.get("rows")
    if isinstance(rows, Mapping):
        facts += [(f"rows of {k}", v) for k, v in rows.items() if str(k).startswith("forget")]
    if arm is not None:
        facts += [("method", arm.method.get("name", arm.name)), ("seed", arm.seed)]
        facts += [(f"setting {k}", v) for k, v in arm.method.items() if k != "name"]
        facts += [("tensors changed", len(arm.changed))]
        facts += [(f"cost, {k}", f"{v:.4g}") for k, v in arm.cost.items()]
    lines += [f"- {_md(key)}: {_md(text)}\n" for key, text in facts if text not in ("", None)]
    return lines[0] + "\n" + "".join(lines[1:])


def _audited(record: Record, arm: MethodRun | None) -> str:
    if arm is None:
        return ""
    audited = arm.model.fingerprint or words.MISSING
    refit = arm.extras.get("refit", record.config.get("refit"))
    head = "## Which model was audited\n\n"
    if not refit:
        return head + f"The weights in this folder, SHA-256 `{_word(audited)}`.\n"
    released = refit.get("fingerprint", "") if isinstance(refit, Mapping) else ""
    named = f" (SHA-256 `{_word(released)}`)" if released else ""
    return head + (
        f"The method was repeated on all rows, and the weights in this folder{named} are that "
        f"refit. **They were not attacked.** The audited model is the one made from the method's "
        f"part of the split, SHA-256 `{_word(audited)}`.\n"
    )


def _word(text: object) -> str:
    """Return text safe inside backticks."""
    return re.sub(r"[^\w ./@:+-]", "", words.plain(text))


def _rows(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(_md(c) for c in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _attacked(record: Record, arm: str) -> str:
    found = words.attacks_on(record, arm)
    head = "## How it was attacked, and what came back\n\n"
    if not found:
        return head + "It was not attacked.\n"
    shown = [a for a in found if a.decisive or a.status != "ok" or a.control]
    rows = [_attack_row(a) for a in (shown or found)]
    header = (
        "Attack",
        "Access",
        "Trained on",
        "V before",
        "V after",
        "95 % interval",
        "Tokens",
        "Status",
    )
    return (
        head
        + _rows(header, rows)
        + "\nV is scored and never trained on; other rates are in the report.\n"
    )


def _attack_row(arm: AttackVariant) -> tuple[object, ...]:
    first, last = (arm.curve[0], arm.curve[-1]) if arm.curve else (None, None)
    name = f"{arm.name} {arm.variant}".strip() + (" (control)" if arm.control else "")
    status = words.STATUS[arm.status][1] + (f": {arm.reason}" if arm.reason else "")
    return (
        name,
        words.ACCESS[arm.access],
        arm.trained_on or "nothing",
        words.number(first.score if first else None),
        words.number(last.score if last else None),
        (words.interval(last.low, last.high) if last else "") or words.MISSING,
        words.count(last.tokens if last else None),
        status,
    )


def _ladder(verdict: Verdict | None) -> str:
    if verdict is None or not verdict.levels:
        return ""
    rows = [
        (
            f"{words.level_words(r.level, verdict.levels)} ({r.level})",
            words.STATUS[r.status][1]
            + ("" if solid or r.status != "pass" else ", but does not count: a lower one did not"),
            words.AGAINST[r.against],
            f"{words.number(r.gap)} {words.interval(r.low, r.high)}".strip(),
        )
        for r, solid in zip(verdict.levels, words.counts(verdict.levels), strict=True)
    ]
    header = ("Level", "Result", "Read against", "Depth gap, 90 % interval")
    return "## The ladder\n\n" + _rows(header, rows)


def _scores(record: Record, arm: str) -> str:
    known = {(s.model, s.set, s.metric): s for s in record.scores}
    rows = []
    for (model, where, metric), score in known.items():
        if model != arm:
            continue
        base = known.get(("original", where, metric))
        before = f"{words.number(base.value)} {words.interval(base.low, base.high)}" if base else ""
        after = f"{words.number(score.value)} {words.interval(score.low, score.high)}"
        name = f"{words.metric_name(metric)} ({score.direction} is more knowledge)"
        rows.append((words.set_name(where), name, before or words.MISSING, after, score.n))
    if not rows:
        return ""
    header = ("Set", "Metric", "Original", "This model", "Units")
    return "## Scores before and after, without an attack\n\n" + _rows(header, rows)


def _reproduce(record: Record) -> str:
    env = record.environment
    versions = ", ".join(f"{k} {v}" for k, v in env.versions.items())
    text = "\n## How to reproduce\n\n"
    text += _code(record.command) + "\n" if record.command else ""
    return text + (
        f"excise {_md(env.excise or words.MISSING)}, {_md(versions or words.MISSING)}, "
        f"on {_md(env.device or words.MISSING)} in {_md(env.dtype or words.MISSING)}. "
        f"Data, SHA-256: `{_word(record.data.get('fingerprint') or words.MISSING)}`. "
        "The full record is `run.json` beside the report.\n"
    )
