"""The labels that a training-time method is given, and how they differ from the truth.

The truth is `row.capability` and is never changed here; the given label is `row.label`. Labels are
missed in two ways that behave differently: missed *occurrences* leave other rows of the same unit
labelled, missed *units* leave none. Misses can also follow a topic or a style, which no rate
describes.

A labeller may give its confidence. A calibrated one is right about a share c of the rows to which
it gives confidence c. Let the confidences of all rows with the same given label follow Beta(a, b).
By Bayes those of the right labels then follow Beta(a + 1, b) and those of the wrong ones
Beta(a, b + 1), and the share of right labels is a / (a + b): given that share, one number is left,
the concentration a + b. Calibration and sharpness: Gneiting, Balabdaoui and Raftery 2007,
"Probabilistic forecasts, calibration and sharpness", doi:10.1111/j.1467-9868.2007.00587.x.

This module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from excise.core.config import Config
from excise.core.errors import UserError, counted, nearest
from excise.data.domain import (
    CORE,
    UNLABELED,
    Domain,
    Row,
    Rows,
    Span,
    all_rows,
    content_of,
    labelled_text,
    text_of,
)
from excise.data.sources import SourceSpec, parse_source, read_source
from excise.data.spans import labelled_whole, pieces, relabelled_spans, with_pieces, word_pieces

Rate = Annotated[float, Field(ge=0.0, le=1.0)]


class Confidence(Config):
    """How a labeller's confidence relates to how often it is right."""

    concentration: float = Field(default=1.0, gt=0, le=1e6)
    """Small: near 0 and 1, telling right labels from wrong. Large: all near the share of right."""
    overconfidence: float = Field(default=1.0, gt=0, le=100)
    """Factor of the log-odds: 1 for calibrated, above 1 for overconfident, below for too shy."""


class LabelNoise(Config):
    """How the given labels differ from the truth. Rates are met exactly, up to rounding."""

    file: SourceSpec = ""
    """Source of labels in place of the truth, such as what `excise label` or somebody's classifier
    wrote: rows with `spans`, found by their text. A row without spans is of its `capability`."""
    not_in_file: Literal["unlabeled", "core"] = "unlabeled"
    """Label of rows whose text is not in `file`."""
    missed_units: Rate = 0.0
    """Share of each capability's units of which no row is labelled."""
    missed_occurrences: Rate = 0.0
    """Share of the rows of the other units that are not labelled, each row by itself."""
    missed_wordings: tuple[int, ...] = ()
    """Structured miss: paraphrases the labeller does not recognise, by number."""
    missed_groups: tuple[str, ...] = ()
    """Structured miss: groups (authors, topics) the labeller does not know of."""
    missed_pattern: str = ""
    """Structured miss: rows whose text matches this regular expression (a topic, a style)."""
    structured_rate: Rate = 1.0
    """Share of the rows that fit a structured miss which are really missed."""
    false_alarms: Rate = 0.0
    """Share of the core rows that are labelled as some capability."""
    missed_spans: Rate = 0.0
    """Share of the labelled spans of each capability that are missed, each whole; a row without
    spans is one."""
    missed_words: Rate = 0.0
    """Share of the words of the other labelled spans that are missed, each by itself."""
    bleed_words: int = Field(default=0, ge=0)
    """Words before and behind every labelled span that are labelled with it."""
    false_words: Rate = 0.0
    """Share of all words that teach no capability that are labelled as some, each by itself."""
    missed_as: Literal["core", "unlabeled"] = "core"
    """Label of what is missed: core, or none."""
    unread_core: Rate = 0.0
    """Share of the core rows that nobody has looked at, so that they have no label. With
    `missed_as` 'unlabeled' labels are few but certain, and having none gives nothing away."""
    spread: Literal["no", "unit", "group"] = "no"
    """Whether a label spreads to all rows of its unit, or of its group, before labels are used."""
    confidence: Confidence | None = None
    """The labeller's confidence in each label; missing means certain of every one."""

    @model_validator(mode="after")
    def _file_alone(self) -> LabelNoise:
        """Refuse rates beside a file, whose labels are as they are."""
        if not self.file:
            return self
        beside = (
            "missed_units", "missed_occurrences", "missed_wordings", "missed_groups",
            "missed_pattern", "false_alarms", "missed_spans", "missed_words", "bleed_words",
            "false_words", "unread_core", "confidence",
        )  # fmt: skip
        if asked := next((name for name in beside if getattr(self, name)), None):
            raise ValueError(f"file: gives the labels themselves; leave out {asked}")
        return self

    @field_validator("missed_pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        """Refuse what is not a regular expression."""
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return value


def label_rows(rows: Iterable[Row], capabilities: Sequence[str]) -> Rows:
    """Label rows and spans by the truth: `CORE`, or i + 1 for capability i.

    Args:
        rows: Rows with their true `capability`.
        capabilities: Names, in the order that numbers them.

    Returns:
        The rows with `label` set.

    Raises:
        UserError: If a row or one of its spans has a capability that is not among them.
    """
    numbers = {"": CORE, **{name: i + 1 for i, name in enumerate(capabilities)}}
    labelled = []
    for row in rows:
        if row.capability not in numbers:
            raise UserError(
                f"unit '{row.unit}' has the unknown capability '{row.capability}'; "
                + nearest(row.capability, capabilities)
            )
        if unknown := {span.capability for span in row.spans} - {*numbers}:
            raise UserError(
                f"unit '{row.unit}' has a span of the unknown capability '{min(unknown)}'; "
                + nearest(min(unknown), capabilities)
            )
        spans = tuple(replace(span, label=numbers[span.capability]) for span in row.spans)
        labelled.append(replace(row, label=numbers[row.capability], spans=spans))
    return tuple(labelled)


def give_labels(rows: Sequence[Row], noise: LabelNoise, *, seed: int) -> Rows:
    """Return the rows with labels as an imperfect labeller gives them.

    Which rows are missed depends on their content and the seed alone, never on their order.
    Rows that nobody has looked at (`UNLABELED`) stay so, but for those that `file` labels.

    Args:
        rows: Rows whose `label` is the truth (`label_rows`).
        noise: How the given labels differ from it.
        seed: Seed of the labeller.

    Returns:
        The same rows in the same order, `capability` untouched.
    """
    if noise.file:
        given_there, _ = labels_from_file(rows, noise)
        return given_there if noise.spread == "no" else propagated(given_there, by=noise.spread)
    keys = _row_keys(rows)
    missed = _missed(rows, keys, noise, seed)
    alarms = _alarms(rows, keys, noise, seed)
    core = {keys[i]: i for i, row in enumerate(rows) if row.label == CORE and not row.capability}
    unread = {core[key] for key in _pick(core, noise.unread_core, seed, "unread")}
    label_of_missed = CORE if noise.missed_as == "core" else UNLABELED
    given = []
    for i, row in enumerate(rows):
        label = UNLABELED if i in unread else row.label
        label = label_of_missed if i in missed else alarms.get(i, label)
        spans = relabelled_spans(row, label) if i in missed or i in unread else row.spans
        changed = label != row.label
        given.append(replace(row, label=label, spans=spans) if changed else row)
    given = _noisy_words(given, keys, noise, seed)
    if noise.confidence is not None:
        cut = word_pieces if noise.missed_words or noise.false_words else pieces
        given = _with_confidence(given, rows, keys, noise.confidence, cut, seed)
    return tuple(given) if noise.spread == "no" else propagated(given, by=noise.spread)


def labels_from_file(rows: Sequence[Row], noise: LabelNoise) -> tuple[Rows, int]:
    """Return the rows with the labels and confidences that a file gives their texts.

    Args:
        rows: Rows whose `label` is the truth.
        noise: Names the file, and the label of rows that are not in it.

    Returns:
        The same rows in the same order, `capability` untouched, and the texts of how many of them
        the file has.

    Raises:
        UserError: If the file or a row of it cannot be read, it labels one text in two ways, names
            a capability that no row has, or labels none of the rows as one.
    """
    numbers = {"": CORE} | {row.capability: row.label for row in rows if row.capability}
    numbers |= {span.capability: span.label for row in rows for span in row.spans}
    there: dict[str, tuple[Span, ...]] = {}
    places: dict[str, str] = {}
    source = read_source(parse_source(noise.file))
    if source.skipped:
        where, reason = source.skipped[0]
        raise UserError(
            f"labels.file: {len(source.skipped)} of its rows cannot be used, such as {where}: "
            f"{reason}; mend or remove them"
        )
    for located in source.rows:
        text = _key_text(located.row)
        spans = _labels_there(located.row, numbers, located.where)
        if there.setdefault(text, spans) != spans:
            raise UserError(
                f"{located.where} and {places[text]} are one text with different labels; give both "
                "the same, or remove one"
            )
        places.setdefault(text, located.where)
    label = UNLABELED if noise.not_in_file == "unlabeled" else CORE
    lacking = sum(1 for row in rows if _key_text(row) not in there)
    if lacking == len(rows):
        raise UserError(
            f"labels.file {noise.file} has the text of none of {counted(len(rows), 'row')}; label "
            "the very texts that the method is given"
        )
    if not any(span.label > CORE for row in rows for span in there.get(_key_text(row), ())):
        raise UserError(
            f"labels.file {noise.file} labels none of {counted(len(rows), 'row')} as a capability; "
            "give its rows 'spans' or a 'capability' (another column as ?spans=NAME), and the very "
            "texts that are to be forgotten"
        )
    given = (
        _as_labelled_there(row, there[_key_text(row)])
        if _key_text(row) in there
        else _as_labelled_there(replace(row, label=label), _whole(row, label))
        for row in rows
    )
    return tuple(given), len(rows) - lacking


def _key_text(row: Row) -> str:
    """Return the text by which a file's labels are found."""
    return text_of(row) if row.kind == "choice" else labelled_text(row)


def _whole(row: Row, label: int) -> tuple[Span, ...]:
    return (Span(0, max(1, len(labelled_text(row))), label=label),)


def _labels_there(row: Row, numbers: Mapping[str, int], where: str) -> tuple[Span, ...]:
    """Return the labels that a row of a file gives all its characters.

    Raises:
        UserError: If a capability is none that the rows have.
    """
    named = {row.capability, *(span.capability for span in row.spans)}
    if unknown := named - {*numbers}:
        raise UserError(
            f"{where}: has the capability '{min(unknown)}', which none of the rows that are "
            f"labelled has; {nearest(min(unknown), [name for name in numbers if name])}"
        )
    if not row.spans:
        return _whole(row, numbers[row.capability])
    spans = tuple(replace(span, label=numbers[span.capability]) for span in row.spans)
    return pieces(replace(row, label=CORE, spans=spans))


def _as_labelled_there(row: Row, there: Sequence[Span]) -> Row:
    """Return a row with the labels of pieces of its text; its capabilities stay."""
    first = there[0]
    if len(there) == 1 and not row.spans:
        return replace(row, label=first.label, confidence=first.confidence)
    starts = [span.start for span in there]
    parts = []
    if UNLABELED not in {span.label for span in there}:
        row = replace(row, label=CORE)
    for piece in pieces(row):
        inside = [at for at in starts if piece.start < at < piece.end]
        for a, b in pairwise((piece.start, *inside, piece.end)):
            given = there[bisect_right(starts, a) - 1]
            parts.append(
                replace(piece, start=a, end=b, label=given.label, confidence=given.confidence)
            )
    return with_pieces(row, parts)


def _noisy_words(
    rows: Sequence[Row], keys: Sequence[str], noise: LabelNoise, seed: int
) -> list[Row]:
    """Return rows in which spans and words are missed, bleed over their edges or are invented.

    Rows that nobody has looked at stay as they are, and so do rows that nothing befalls.
    """
    if not (noise.missed_spans or noise.missed_words or noise.bleed_words or noise.false_words):
        return [*rows]
    looked_at = [i for i, row in enumerate(rows) if row.label != UNLABELED]
    words = {i: [*word_pieces(rows[i])] for i in looked_at}
    numbers = sorted({w.label for each in words.values() for w in each if w.label > CORE})
    label_of_missed = CORE if noise.missed_as == "core" else UNLABELED

    def picked(chosen: Iterable[tuple[int, Span]], rate: float, purpose: str) -> set[str]:
        by_label: dict[int, list[str]] = defaultdict(list)
        for i, piece in chosen:
            by_label[piece.label].append(f"{keys[i]}@{piece.start}")
        sets = (_pick(each, rate, seed, f"{purpose}:{n}") for n, each in sorted(by_label.items()))
        return set().union(*sets)

    spans = [(i, p) for i in looked_at for p in pieces(rows[i]) if p.label > CORE]
    missed = picked(spans, noise.missed_spans, "spans")
    for i, span in spans:
        if f"{keys[i]}@{span.start}" in missed:
            words[i] = [
                replace(w, label=label_of_missed) if span.start <= w.start < span.end else w
                for w in words[i]
            ]
    inside = [(i, w) for i in looked_at for w in words[i] if w.label > CORE]
    missed = picked(inside, noise.missed_words, "words")
    for i in looked_at:
        bled = _bled([w.label for w in words[i]], noise.bleed_words)
        words[i] = [
            replace(w, label=label_of_missed if f"{keys[i]}@{w.start}" in missed else label)
            for w, label in zip(words[i], bled, strict=True)
        ]
    core = [(i, w) for i in looked_at for w in words[i] if w.label == CORE and not w.capability]
    false = picked(core, noise.false_words if numbers else 0.0, "false words")
    for i in looked_at if false else ():
        words[i] = [
            replace(w, label=numbers[_byte(f"{seed}:which word:{key}") % len(numbers)])
            if w.label == CORE and (key := f"{keys[i]}@{w.start}") in false
            else w
            for w in words[i]
        ]
    given = [*rows]
    for i in looked_at:
        if [w.label for w in words[i]] != [w.label for w in word_pieces(rows[i])]:
            given[i] = with_pieces(rows[i], words[i])
    return given


def _bled(labels: Sequence[int], reach: int) -> list[int]:
    """Return labels of words of which those near a labelled one take its label, the nearest one."""
    out = [*labels]
    for distance in range(1, reach + 1):
        for at, label in enumerate(labels):
            for near in (at - distance, at + distance):
                if label > CORE and 0 <= near < len(out) and out[near] == CORE:
                    out[near] = label
    return out


def _with_confidence(
    given: Sequence[Row],
    rows: Sequence[Row],
    keys: Sequence[str],
    config: Confidence,
    cut: Callable[[Row], Sequence[Span]],
    seed: int,
) -> list[Row]:
    """Return rows with the labeller's confidence in each label.

    Of a row with spans every piece that `cut` gives has one of its own, what lies between spans
    too: were it certain there, what is missed would be told by its doubt.
    """
    numbers = {"": CORE} | {row.capability: row.label for row in rows if row.capability}
    numbers |= {span.capability: span.label for row in rows for span in row.spans}
    parts = [cut(row) if row.spans else () for row in given]
    labels: list[int] = []
    right: list[bool] = []
    names: list[str] = []
    for now, row, key, of_row in zip(given, rows, keys, parts, strict=True):
        if now.spans:
            labels += [part.label for part in of_row]
            right += [part.label == numbers[part.capability] for part in of_row]
            names += [f"{key}@{part.start}" for part in of_row]
        else:
            labels.append(now.label)
            right.append(now.label == row.label)
            names.append(key)
    scores = iter(confidences(labels, right, names, config, seed=seed))
    out = []
    for row, of_row in zip(given, parts, strict=True):
        if row.spans:
            out.append(with_pieces(row, [replace(p, confidence=next(scores)) for p in of_row]))
        else:
            out.append(replace(row, confidence=next(scores)))
    return out


def relabelled(
    domain: Domain, noise: LabelNoise | None, *, seed: int
) -> tuple[Domain, dict[str, Mapping[str, float | None]]]:
    """Return what a method on a trained model is given by an imperfect labeller.

    Forget and retain rows change roles by their given labels; rows without a label have none.
    `dev` and everything that is scored or attacked keep the truth.

    Args:
        domain: Rows by role.
        noise: How labels differ from the truth; None for not at all.
        seed: Seed of the labeller.

    Returns:
        The domain as it is given, and for the record `label_quality` under `labels`, None where a
        share is of nothing; no entry where labels are the truth.

    Raises:
        UserError: If no row is left to forget, or none to retain.
    """
    if noise is None:
        return domain, {}
    names = tuple(domain.forget)
    rows = label_rows((*all_rows(domain.forget), *domain.retain), names)
    given = give_labels(rows, noise, seed=seed)
    quality = {k: None if math.isnan(v) else v for k, v in label_quality(given).items()}
    forget = {n: tuple(r for r in given if r.label == i + 1) for i, n in enumerate(names)}
    retain = tuple(row for row in given if row.label == CORE)
    for role, left, had in (
        ("forget", all_rows(forget), all_rows(domain.forget)), ("retain", retain, domain.retain)
    ):  # fmt: skip
        if had and not left:
            raise UserError(
                f"labels: no row of domain '{domain.name}' is given as {role}, so that the method "
                "has all rows of one class; lower the rates"
            )
    return replace(domain, forget=forget, retain=retain), {"labels": quality}


def confidences(
    labels: Sequence[int],
    right: Sequence[bool],
    keys: Sequence[str],
    config: Confidence,
    *,
    seed: int,
) -> list[float]:
    """Return the labeller's confidence in each label.

    That of a row depends on its key, the seed and how often its label is right, never on the
    order of rows. Where no row of a label is wrong (or right), all get 1 (or 0).

    Args:
        labels: Given labels.
        right: Whether each is the truth.
        keys: A key per row that depends on its content.
        config: Concentration and overconfidence.
        seed: Seed of the labeller.

    Returns:
        One number in [0, 1] per row; 1 for rows that nobody has looked at.
    """
    hits: dict[int, list[bool]] = defaultdict(list)
    for label, good in zip(labels, right, strict=True):
        hits[label].append(good)
    share = {label: sum(goods) / len(goods) for label, goods in hits.items()}
    out = []
    for label, good, key in zip(labels, right, keys, strict=True):
        p = share[label]
        if label == UNLABELED or p in (0.0, 1.0):
            out.append(1.0 if label == UNLABELED else p)
            continue
        a, b = p * config.concentration, (1 - p) * config.concentration
        rng = random.Random(f"{seed}:confidence:{key}")
        c = rng.betavariate(a + good, b + (not good))
        out.append(_sharpened(c, config.overconfidence))
    return out


def _sharpened(c: float, factor: float) -> float:
    """Multiply the log-odds of a probability."""
    if factor == 1.0 or c in (0.0, 1.0):
        return c
    logit = factor * (math.log(c) - math.log1p(-c))
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0


def forget_score(row: Row) -> float:
    """Return the probability, as the labeller gave it, that a row is of some capability.

    Rows that nobody has looked at have none: 0.
    """
    if row.label == UNLABELED:
        return 0.0
    return row.confidence if row.label > CORE else 1.0 - row.confidence


def propagated(
    rows: Sequence[Row], *, by: Literal["unit", "group"] = "unit", at_least: int = 1
) -> Rows:
    """Give all rows of a unit the label that enough of its rows carry.

    Args:
        rows: Rows with the given labels; a label counts where it is likely right.
        by: What shares a label. A row without a group stands alone.
        at_least: Labelled rows that it takes.

    Returns:
        The rows in their order. Of several capabilities the most frequent wins, of two equally
        frequent the first in number; a row that is likely labelled right by itself stays so.
        The label is that of all of a row's text, whatever labels its parts were given.
    """
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for row in rows:
        if row.label > CORE and forget_score(row) > 0.5:
            votes[_shared(row, by)][row.label] += 1
    spread = {
        key: min(counts, key=lambda label: (-counts[label], label))
        for key, counts in votes.items()
        if counts.total() >= at_least
    }
    out = []
    for row in rows:
        likely = row.label > CORE and forget_score(row) > 0.5
        label = None if likely else spread.get(_shared(row, by))
        out.append(row if label is None else labelled_whole(row, label))
    return tuple(out)


def _shared(row: Row, by: Literal["unit", "group"]) -> str:
    return f"group:{row.group}" if by == "group" and row.group else f"unit:{row.unit}"


def label_quality(rows: Iterable[Row]) -> Mapping[str, float]:
    """Return how good the given labels are, measured against the true ones.

    Args:
        rows: Rows with `capability` (truth) and `label` (given).

    Returns:
        `occurrences`: share of forget rows labelled; `units`: share of forget units with at least
        one labelled row; `false_alarms`: share of core rows labelled. NaN where there are none.
        Unlabelled rows are part of none. Where rows have spans, `characters` and
        `false_characters`: the shares of the characters that teach a capability and of the others
        that are labelled.
    """
    rows = tuple(rows)
    forget: list[bool] = []
    core: list[bool] = []
    units: dict[tuple[str, str], bool] = {}
    for row in rows:
        if row.capability:
            forget.append(row.label > CORE)
            key = (row.capability, row.unit)
            units[key] = units.get(key, False) or row.label > CORE
        elif row.label != UNLABELED:
            core.append(row.label > CORE)
    return {
        "occurrences": _mean(forget),
        "units": _mean(list(units.values())),
        "false_alarms": _mean(core),
        **(_quality_of_characters(rows) if any(row.spans for row in rows) else {}),
    }


def _quality_of_characters(rows: Sequence[Row]) -> dict[str, float]:
    """Return the shares of characters of either truth that carry a label of a capability."""
    total: Counter[bool] = Counter()
    labelled: Counter[bool] = Counter()
    for row in rows:
        for piece in pieces(row):
            if piece.label != UNLABELED or piece.capability:
                total[bool(piece.capability)] += piece.end - piece.start
                labelled[bool(piece.capability)] += (piece.end - piece.start) * (piece.label > CORE)
    shares = {side: labelled[side] / total[side] if total[side] else math.nan for side in total}
    return {
        "characters": shares.get(True, math.nan),
        "false_characters": shares.get(False, math.nan),
    }


def miscalibration(rows: Sequence[Row], bins: int = 10) -> float:
    """Return the expected calibration error of given labels against the true ones.

    Source: Guo et al. 2017, "On calibration of modern neural networks", arXiv:1706.04599, eq. 3.

    Args:
        rows: Rows with `capability` (truth), `label` and `confidence` (given); a label is right
            here if it says core of a core row, or some capability of a row of one. Rows that
            nobody has looked at are left out.
        bins: Bins of equal width.

    Returns:
        Mean over rows of |share right - mean confidence| of the row's bin; NaN without rows.
    """
    labelled = [row for row in rows if row.label != UNLABELED]
    gaps: dict[int, list[float]] = defaultdict(list)
    for row in labelled:
        right = (row.label > CORE) == bool(row.capability)
        gaps[min(bins - 1, int(row.confidence * bins))].append(right - row.confidence)
    if not labelled:
        return math.nan
    return sum(abs(math.fsum(each)) for each in gaps.values()) / len(labelled)


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _row_keys(rows: Sequence[Row]) -> list[str]:
    """Return a key per row that depends on its content; equal rows are counted."""
    given = {"label", "confidence"}
    texts: dict[Row, str] = {}
    seen: Counter[str] = Counter()
    keys = []
    for row in rows:
        if row not in texts:
            content = {k: v for k, v in content_of(row).items() if k not in given}
            if row.spans:
                content["spans"] = [(s.start, s.end, s.capability) for s in row.spans]
            texts[row] = json.dumps(content, sort_keys=True)
        text = texts[row]
        keys.append(f"{text}#{seen[text]}")
        seen[text] += 1
    return keys


def _pick(keys: Iterable[str], rate: float, seed: int, purpose: str) -> set[str]:
    """Return `round(rate * n)` of the keys: those with the smallest seeded hashes."""
    ranked = sorted(
        set(keys), key=lambda k: hashlib.sha256(f"{seed}:{purpose}:{k}".encode()).digest()
    )
    return set(ranked[: round(rate * len(ranked))])


def _byte(text: str) -> int:
    """Return a number below 256 that depends on `text` alone."""
    return hashlib.sha256(text.encode()).digest()[0]


def _missed(rows: Sequence[Row], keys: Sequence[str], noise: LabelNoise, seed: int) -> set[int]:
    """Return the indices of labelled rows that the labeller misses."""
    by_capability: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row.label > CORE:
            by_capability[row.capability].append(i)
    missed: set[int] = set()
    for name, indices in by_capability.items():
        units = _pick({rows[i].unit for i in indices}, noise.missed_units, seed, f"units:{name}")
        fits = {keys[i] for i in indices if _structured(rows[i], noise)}
        unseen = _pick(fits, noise.structured_rate, seed, f"structured:{name}")
        rest = {keys[i] for i in indices if rows[i].unit not in units}
        slips = _pick(rest, noise.missed_occurrences, seed, f"occurrences:{name}")
        missed |= {
            i for i in indices if rows[i].unit in units or keys[i] in unseen or keys[i] in slips
        }
    return missed


def _structured(row: Row, noise: LabelNoise) -> bool:
    """Whether a row fits one of the structured misses."""
    if row.wording in noise.missed_wordings or row.group in noise.missed_groups:
        return True
    return bool(noise.missed_pattern) and bool(re.search(noise.missed_pattern, text_of(row)))


def _alarms(
    rows: Sequence[Row], keys: Sequence[str], noise: LabelNoise, seed: int
) -> dict[int, int]:
    """Return index -> wrong label of core rows that are taken for a capability."""
    numbers = sorted({row.label for row in rows if row.label > CORE})
    if not numbers or not noise.false_alarms:
        return {}
    core = {keys[i]: i for i, row in enumerate(rows) if row.label == CORE and not row.capability}
    picked = sorted(_pick(core, noise.false_alarms, seed, "alarms"))
    out = {}
    for key in picked:
        out[core[key]] = numbers[_byte(f"{seed}:which:{key}") % len(numbers)]
    return out
