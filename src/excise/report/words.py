"""How the report says things: numbers, statuses, names, and what its words mean.

Every code of a depth level is printed with its words; every missing number as "not measured". The
words are those of the glossary in `docs/evidence.md`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable

from excise.record import LEVELS, AttackVariant, LevelResult, Record, Verdict
from excise.record.measured import attacks_on as attacks_on
from excise.record.measured import model_names as model_names
from excise.record.measured import role as role

MISSING = "not measured"

STATUS = {
    "pass": ("\u2713", "passed"),
    "fail": ("\u2715", "failed"),
    "untested": ("\u2013", "not tested"),
    "underpowered": ("?", "underpowered"),
    "ok": ("\u2713", "ran"),
    "invalid": ("?", "invalid"),
    "missing": ("\u2013", "missing"),
    "failed": ("\u2715", "failed"),
}
"""Icon and word of every status; the word carries the meaning."""

ACCESS = {
    "prompt": "prompts",
    "logits": "output probabilities",
    "activations": "activations",
    "weights": "weights",
}

RANK = {"original": 0, "candidate": 1, "positive": 2, "oracle": 3}
"""Order of models in plots and tables, by role."""

GLOSSARY = {
    "original": "the model before the removal.",
    "oracle": "the same architecture, trained on the same schedule without the forget set.",
    "reference models": "the original and the oracle; every forget score is placed between the "
    "two, under the same attack.",
    "depth gap": "(candidate \u2212 oracle) / (original before any attack \u2212 oracle). 0 is a "
    "model that never learned it, 1 the original. Below 0 is damage or suppression, not credit.",
    "depth level": "what a removal withstands, from D0 (the behaviour is gone) to D5 (as if never "
    "learned). A level counts only with all lower ones passed.",
    "relearn set": "what the attacker trains on. It shares no unit with the held-out test set; its "
    "own score is shown, never decisive.",
    "held-out test set": "what is scored. Nobody trains or selects on it.",
    "retain set": "what the model should still know.",
    "attack variant": "one way of running an attack: a number of bits, a kind of training.",
    "positive control": "a model that only hides what it knows, by construction. An attack must "
    "bring that back to count.",
    "invalid": "said of an attack that failed its positive control. It counts neither way.",
    "recovery fraction": "(attacked \u2212 unlearned) / (original \u2212 unlearned) on the "
    "held-out test set, as in publications.",
    "residual bits": "bits per unit that the weights save an attacker on the held-out test set, "
    "minus the same for the oracle.",
    "passed": "shown equivalent within the margin, not merely without a significant difference.",
}
"""Words a first reader needs, with what they mean."""

_BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def plain(text: object) -> str:
    """Return `text` without control and direction characters, which could rewrite a terminal.

    Newlines and tabs stay; the others become U+FFFD.
    """
    return "".join(
        "\ufffd"
        if c in _BIDI or (c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cs"))
        else c
        for c in str(text)
    )


def number(value: float | None) -> str:
    """Return a number with three decimals, fewer when it is large, or "not measured"."""
    if value is None or not math.isfinite(value):
        return MISSING
    size = abs(value)
    if 0 < size < 0.0005:
        text = f"{value:.1e}"
    else:
        places = 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
        text = f"{value:,.{places}f}"
    if not text.strip("-0."):
        text = text.lstrip("-")
    return text.replace("-", "\u2212")


def interval(low: float | None, high: float | None) -> str:
    """Return `[low, high]`, or the empty string where neither was measured."""
    known = [v for v in (low, high) if v is not None and math.isfinite(v)]
    return f"[{number(low)}, {number(high)}]" if known else ""


def clip(text: str, most: int) -> str:
    """Return `text`, shortened with an ellipsis where it is longer than `most` characters."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "\u2026"


def count(value: float | None) -> str:
    """Return a whole number with separators."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:,.0f}".replace("-", "\u2212")


def short(value: float, unit: str = "") -> str:
    """Return a number with a prefix: `12k`, `1.5M`, `3.2 TFLOP` (with a unit, after a space)."""
    if not math.isfinite(value):
        return MISSING
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    power = 0
    while abs(value) >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    scaled = f"{value:.3g}"
    return f"{scaled} {prefixes[power]}{unit}" if unit else f"{scaled}{prefixes[power]}"


def share(value: float | None) -> str:
    """Return a fraction in per cent."""
    if value is None or not math.isfinite(value):
        return MISSING
    places = 1 if 0 < abs(value) < 0.1 else 0
    return f"{100 * value:.{places}f} %".replace("-", "\u2212")


def duration(seconds: float | None) -> str:
    """Return a time a person reads: `45 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count_bytes: float) -> str:
    """Return bytes in MiB or GiB."""
    gib = count_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{count_bytes / 2**20:.0f} MiB"


def spell(text: object) -> str:
    """Return `text` with the words beside every code of a depth level that lacks them."""
    clean = plain(text)

    def with_words(match: re.Match[str]) -> str:
        code, meaning = match.group(0), level_words(match.group(0))
        return code if meaning in clean else f"{code} ({meaning})"

    return re.sub(r"\bD[0-5]\b", with_words, clean)


def level_words(code: str, levels: Iterable[LevelResult] = ()) -> str:
    """Return the words of a level: the record's own, else the known ones, else the text itself."""
    for result in levels:
        if result.level == code and result.words:
            return plain(result.words)
    return next((text for known, text in LEVELS.items() if known == code), plain(code))


def highest(verdict: Verdict) -> str:
    """Return the highest level that counts, with its words, or "none"."""
    if not verdict.highest:
        return "none"
    words = level_words(verdict.highest, verdict.levels)
    return f"{words} ({verdict.highest})" if verdict.highest in LEVELS else spell(words)


def counts(levels: Iterable[LevelResult]) -> tuple[bool, ...]:
    """Return for each level whether it counts: passed, with all lower ones passed."""
    solid, counted = True, []
    for result in levels:
        solid = solid and result.status == "pass"
        counted.append(solid)
    return tuple(counted)


def set_name(name: str) -> str:
    """Return the words for a scored set: `test.cyber` is `held-out test set: cyber`."""
    head, _, rest = plain(name).partition(".")
    words = {
        "test": "held-out test set",
        "retain_test": "retain set",
        "adjacent_test": "adjacent set",
    }
    base = words.get(head, head.replace("_", " "))
    return f"{base}: {rest}" if rest else base


def metric_name(name: str) -> str:
    """Return the words for a metric: `text_loss` is `token loss`."""
    known = {"text_loss": "token loss"}
    return known.get(name, plain(name).replace("_", " "))


def attack_name(attack: AttackVariant) -> str:
    """Return the name of an attack with its variant, in words."""
    name = plain(attack.name).replace("_", " ")
    return f"{name}, {plain(attack.variant)}" if attack.variant else name


def direction(record: Record, metric: str) -> str:
    """Return which way more knowledge lies for a metric, in words."""
    for score in record.scores:
        if score.metric == metric:
            return f"{score.direction} is more knowledge"
    return "lower is more knowledge" if metric.endswith("loss") else "higher is more knowledge"
