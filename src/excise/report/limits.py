"""What a record does not show, derived from the record: the paragraph most reports leave out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from excise.record import Record
from excise.record.measured import PROXY
from excise.report import words


def limits(record: Record) -> tuple[str, ...]:
    """Return one sentence for everything the numbers of `record` must not be quoted for.

    Args:
        record: Any record, however incomplete.

    Returns:
        Sentences in plain text, the most important first, never empty.
    """
    if record.kind == "inspect":
        return tuple(words.spell(s) for part in (_inspected(record), _always()) for s in part)
    if record.kind == "study":
        return tuple(words.spell(s) for part in (_studied(record), _always()) for s in part)
    parts = (_attacked(record), _references(record), _effort(record), _power(record))
    more = (_scores(record), _data(record), _always())
    return tuple(words.spell(s) for part in (*parts, *more) for s in part)


def _names(items: Iterable[str], most: int = 6) -> str:
    names = list(dict.fromkeys(words.plain(i) for i in items))
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _studied(record: Record) -> Iterator[str]:
    yield (
        f"A study answers its question for these models and this data, over {len(record.seeds)} "
        "reported seeds; another architecture, size or kind of knowledge may answer otherwise."
    )
    yield "Its statistic and margin were stated beforehand; what else its tables show was not."


def _inspected(record: Record) -> Iterator[str]:
    yield (
        "An inspection describes one edit of one model. It attacks nothing and says nothing about "
        "how much would come back; excise audit does."
    )
    if record.inspection is not None and record.inspection.identical:
        yield "The two models are equal, so there was nothing to describe."
        return
    yield (
        "A direction that carries the change need not be what hides the knowledge: clear it and "
        "score the model to know. An AUC tells forget from retain text of this data, not harmful "
        "from harmless text at large."
    )
    yield (
        "Forget tokens that are common to both texts count as forget tokens, which pulls an AUC "
        "over all tokens towards 0.5; where an answer is due, the text has said what it is about."
    )


def _attacked(record: Record) -> Iterator[str]:
    if not record.attacks:
        yield (
            "Nothing was attacked. The scores say how the model answers, not what its weights "
            "still hold; run excise audit on this folder."
        )
        return
    without = [n for n in words.model_names(record) if not words.attacks_on(record, n)]
    if without:
        yield f"Not attacked at all: {_names(without)}."


def _references(record: Record) -> Iterator[str]:
    oracles = [m for m in record.models if words.role(m.name) == "oracle"]
    if not oracles:
        yield words.WITHOUT_ORACLE
    elif any(m.name.startswith(PROXY) for m in oracles):
        yield (
            "It was read against a proxy oracle, a model that stands in for one retrained without "
            "the forget set: nothing here shows a model as if it had never learned."
        )
    elif len(oracles) < 3:
        yield (
            f"The oracles come from {len(oracles)} "
            f"{'seed' if len(oracles) == 1 else 'seeds'}; three are needed to know their spread."
        )
    if record.attacks and not any(words.role(a.subject) == "positive" for a in record.attacks):
        yield "No positive control was attacked, so the attacks' own power was not shown that way."
    if oracles and record.verdicts and all(v.null is None for v in record.verdicts):
        yield (
            "The audit's null (the gap between a model made by data filtering and the oracle) was "
            "not measured in this run."
        )


def _effort(record: Record) -> Iterator[str]:
    budgets = sorted({v.budget for v in record.verdicts if v.budget})
    ours = [a for a in record.attacks if words.role(a.subject) == "candidate"]
    tokens = max((p.tokens for a in ours for p in a.curve), default=0)
    if "smoke" in budgets:
        yield (
            "The budget was smoke, the smallest"
            + (f": no attacker used more than {words.count(tokens)} tokens" if tokens else "")
            + ". A stronger attacker may bring back more."
        )
    elif budgets:
        yield (
            f"The budget was {_names(budgets)}"
            + (f": no attacker used more than {words.count(tokens)} tokens" if tokens else "")
            + ". Nothing is said about a stronger attacker."
        )
    if len(record.seeds) < 2:
        yield (
            "The removal was run with one seed. The intervals are over test units and say "
            "nothing about how another seed would come out."
        )
    used = {a.access for a in ours if a.status == "ok"}
    lacking = [w for key, w in words.ACCESS.items() if key not in used and key != "logits"]
    if ours and lacking:
        yield f"No attack that counts had access to: {_names(lacking)}."


def _power(record: Record) -> Iterator[str]:
    for status, text in (
        ("below", "Below what was never taught, so suppressed or damaged"),
        ("underpowered", "Too little power to decide"),
        ("untested", "Not tested"),
    ):
        levels = [
            f"{words.level_words(result.level, verdict.levels)} ({words.plain(verdict.model)})"
            for verdict in record.verdicts
            for result in verdict.levels
            if result.status == status
        ]
        if levels:
            yield f"{text}: {_names(levels)}."
    for status, text in (
        ("invalid", "Invalid, because it was not shown to work, so that it passes nothing"),
        ("missing", "Required but not run"),
        ("failed", "Failed while running"),
    ):
        names = [
            f"{a.name} {a.variant}".strip()
            for a in record.attacks
            if a.status == status and words.role(a.subject) == "candidate" and not words.unfit(a)
        ]
        if names:
            yield f"{text}: {_names(names)}."
    idle = [
        a.name for a in record.attacks if words.role(a.subject) == "candidate" and words.unfit(a)
    ]
    if idle:
        yield f"Left nothing to do by these rows or this model: {_names(idle)}."
    if any(a.needs_original for a in record.attacks):
        yield "Attacks that hold the original let no level pass; third parties do not have it."


def _scores(record: Record) -> Iterator[str]:
    forget = [s for s in record.scores if s.set.partition(".")[0] == "test"]
    for score in forget:
        if words.role(score.model) == "original" and words.at_chance(score):
            yield (
                f"The original is at chance on {words.set_name(score.set)} "
                f"({words.metric_name(score.metric)}): there was nothing to remove."
            )
    known = {s.set for s in forget if words.role(s.model) == "original" and not words.at_chance(s)}
    suppressed = [
        s.model
        for s in forget
        if s.metric == "text_loss"
        and s.set in known
        and s.chance is not None
        and words.role(s.model) == "candidate"
        and s.value >= 0.8 * s.chance
    ]
    if suppressed:
        yield (
            f"Suppressed is not ignorant: the forget loss of {_names(suppressed)} is near that of "
            "a uniform guess, which no absence of knowledge explains."
        )
    metrics = {s.metric for s in forget}
    if metrics == {"multiple_choice"}:
        yield (
            "Only forced choice was scored on the held-out test set, which overstates recovery; "
            "free text was not."
        )
    if not any(s.set.startswith("retain") for s in record.scores):
        yield "The retain set was not scored, so the cost of the removal is unknown."
    if not any(s.set.startswith("adjacent") for s in record.scores):
        yield "No neighbouring knowledge (adjacent set) was scored."


def _data(record: Record) -> Iterator[str]:
    claim, exposure = record.data.get("claim"), record.data.get("exposure")
    sets = {score.set.partition(".")[0] for score in record.scores}
    if claim == "deletion":
        yield "The claim is about these documents or facts, not about the capability they teach."
    elif claim == "capability":
        yield (
            "The claim is about the capability as this test measures it, not about every "
            "document that teaches it."
        )
    if exposure == "unknown":
        yield (
            "Whether the removal saw the test units is unknown: no split was written with the "
            "model, so this may be memorised removal rather than general removal."
        )
    elif exposure == "seen" and record.data.get("verbatim"):
        yield (
            "The scored rows are rows that were to be deleted, word for word"
            + ("." if "paraphrases" in sets else "; no paraphrase of them was scored.")
        )
    elif exposure == "seen":
        yield "The test units are those the removal saw, in other paraphrases; others may remain."
    if record.data.get("name") == "canary":
        yield (
            "It is a canary audit: made-up facts were taught and removed, and nothing is said "
            "about a forget set of your own."
        )
    if record.sensitive:
        yield "The data is marked sensitive: texts and samples were kept out of this report."


def _always() -> Iterator[str]:
    yield "An attack nobody has thought of is not in this list."
