"""From files to a domain: read, unite, check, split, label.

This module imports no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from excise.core.errors import UserError
from excise.data.dedup import text_hash
from excise.data.domain import UNLABELED, Domain, Metric, Row, Rows
from excise.data.gather import Held, Sets, check_overlaps, group_note, read_sets, units_of
from excise.data.labels import label_rows
from excise.data.rows import METRICS
from excise.data.split import (
    ADJACENT,
    FORGET,
    RETAIN,
    SEEN,
    Split,
    assign,
    read_split,
    withheld,
    without,
)
from excise.data.texts import chunk_rows, text_of

if TYPE_CHECKING:
    from excise.data.spec import Files

Exposure = Literal["seen", "held_out", "unknown"]
Parts = dict[str, tuple[Held, ...]]
"""Rows by role, or by role and capability as `role.NAME`."""


def assemble(spec: Files) -> Domain:
    """Build the domain of a `Files` spec; see `Files.build`."""
    fixed = read_split(Path(spec.split), spec.hashes()) if spec.split else None
    sets, notes = read_sets(spec.sources())
    check_overlaps(sets)
    seed = fixed.seed if fixed else spec.seed
    layout, why = _layout(spec, sets)
    parts: Parts = {name: rows for name, rows in sets.items() if not name.startswith("forget.")}
    groups: dict[str, str] = {}
    for capability in spec.forget:
        cut = _cut_seen if layout == "seen" else _cut_held_out
        parts |= cut(capability, sets, seed, fixed, groups)
    parts |= _cut_plain("retain", RETAIN, sets, seed, fixed)
    if "adjacent" in sets:
        parts |= _cut_plain("adjacent", ADJACENT, sets, seed, fixed)
    exposure = fixed.exposure if fixed else _exposure(spec, layout)
    counts = tuple(_counts(parts, sets))
    if spec.refit:
        parts |= {name: rows for name, rows in sets.items() if name.startswith("forget.")}
        exposure = "seen" if exposure == "held_out" else exposure
        why = "refit: the method sees every forget row, so those that are scored are not held out"
    mix, mixed = _unlabeled(sets, parts, spec)
    notes = (*notes, *group_note(sets), *counts, why, *mixed)
    if not spec.fresh:
        notes += ("there is no matched fresh text: residual bits and power checks need `fresh`",)
    return _domain(spec, parts, mix, exposure, notes)


def _layout(spec: Files, sets: Sets) -> tuple[Literal["seen", "held_out"], str]:
    """Decide whether T and V are forget units in withheld wordings, and say why."""
    tested = {u for c in spec.test for u in units_of(sets[f"test.{c}"])}
    forget = {u for c in spec.forget for u in units_of(sets[f"forget.{c}"])}
    if tested:
        shared = len(tested & forget)
        if 0 < shared < len(tested):
            raise UserError(
                f"{shared} of the {len(tested)} units of test are in forget and the others are "
                "not; score forget units only, or none of them"
            )
        kind: Literal["seen", "held_out"] = "seen" if shared else "held_out"
        word = "forget units" if shared else "units the method never saw"
        return kind, f"the file for test holds {word}"
    if spec.exposure in ("seen", "held_out"):
        return spec.exposure, f"exposure {spec.exposure} as asked"
    rows = [held for c in spec.forget for held in sets[f"forget.{c}"]]
    several = sum(len(v) > 1 for v in _versions(rows).values())
    worded = any(held.version.startswith("w") and held.row.wording for held in rows)
    if all(h.given for h in rows) and several * 2 >= len(forget) and (
        rows[0].row.kind != "text" or worded
    ):  # fmt: skip
        return (
            "seen",
            f"{several} of {len(forget)} forget units come in several wordings: V holds "
            "wordings that were withheld from the method",
        )
    return "held_out", "V holds forget units that the method never saw"


def _exposure(spec: Files, layout: Literal["seen", "held_out"]) -> Exposure:
    return "unknown" if spec.exposure == "unknown" else layout


def _versions(rows: Iterable[Held]) -> dict[str, set[str]]:
    """Return the wordings of every unit."""
    out: dict[str, set[str]] = defaultdict(set)
    for held in rows:
        out[held.row.unit].add(held.version)
    return out


def _groups(rows: Iterable[Held]) -> dict[str, set[str]]:
    """Return the groups of every unit."""
    out: dict[str, set[str]] = defaultdict(set)
    for held in rows:
        out[held.row.unit].add(held.row.group)
    return out


def _roles(
    name: str,
    rows: Sequence[Held],
    shares: Mapping[str, int],
    seed: int,
    fixed: Split | None,
    groups: dict[str, str] | None = None,
) -> dict[str, str]:
    """Return the role of every unit, from the written split where there is one."""
    units = _groups(rows)
    if fixed is None:
        roles = assign(units, shares, seed=seed, name=name, fixed=groups)
    else:
        roles = {}
        for unit in units:
            role = fixed.role(name, unit)
            if role is None:
                raise UserError(
                    f"the written split has no unit '{unit}' of {name}; it was made from other rows"
                )
            roles[unit] = role
    if groups is not None:
        groups.update({g: roles[unit] for unit, held in units.items() for g in held if g})
    return roles


def _with_role(rows: Iterable[Held], roles: Mapping[str, str], role: str) -> tuple[Held, ...]:
    return tuple(held for held in rows if roles[held.row.unit] == role)


def _cut_held_out(
    capability: str, sets: Sets, seed: int, fixed: Split | None, groups: dict[str, str]
) -> Parts:
    """Cut a forget set so that the method never sees a unit of T or V."""
    name = f"forget.{capability}"
    explicit = [r for r in FORGET if r != "forget" and f"{r}.{capability}" in sets]
    # Units with a file of their own leave the forget set: the attacker's or the sweep's copy wins.
    own = {u for r in explicit for u in units_of(sets[f"{r}.{capability}"])}
    rows = tuple(held for held in sets[name] if held.row.unit not in own)
    roles = _roles(name, rows, without(FORGET, explicit, "forget"), seed, fixed, groups)
    return {
        f"{role}.{capability}": _with_role(rows, roles, role)
        for role in FORGET
        if role not in explicit
    }


def _cut_seen(
    capability: str, sets: Sets, seed: int, fixed: Split | None, groups: dict[str, str]
) -> Parts:
    """Withhold wordings: T, V and dev are wordings of forget units that the method never saw."""
    name = f"forget.{capability}"
    rows = sets[name]
    explicit = [r for r in SEEN if f"{r}.{capability}" in sets]
    own = {u for r in explicit for u in units_of(sets[f"{r}.{capability}"])}
    versions = _versions(rows)
    several = {unit for unit, held in versions.items() if len(held) > 1 and unit not in own}
    shares = without(SEEN, explicit, "")
    if not shares:
        return {name: rows}
    able = tuple(held for held in rows if held.row.unit in several)
    try:
        roles = _roles(name, able, shares, seed, fixed, groups)
    except UserError as error:
        raise UserError(f"{error}, each in several wordings (or give files for them)") from None
    hidden = {unit: withheld(versions[unit], seed=seed, unit=unit) for unit in several}

    def is_hidden(held: Held) -> bool:
        return held.version in hidden.get(held.row.unit, ())

    hidden_rows = tuple(held for held in able if is_hidden(held))
    out: Parts = {name: tuple(held for held in rows if not is_hidden(held))}
    for role in shares:
        out[f"{role}.{capability}"] = _with_role(hidden_rows, roles, role)
    return out


def _cut_plain(
    name: str, shares: Mapping[str, int], sets: Sets, seed: int, fixed: Split | None
) -> Parts:
    """Cut retain or adjacent."""
    rows = sets[name]
    explicit = [r for r in shares if r != name and r in sets]
    left = without(shares, explicit, name)
    if len(left) == 1:
        return {name: rows}
    roles = _roles(name, rows, left, seed, fixed)
    return {role: _with_role(rows, roles, role) for role in left}


def _counts(parts: Parts, sets: Sets) -> Iterable[str]:
    """Yield the split in words, one sentence a set."""
    for name in sets:
        role, _, capability = name.partition(".")
        if role not in ("forget", "retain", "adjacent"):
            continue
        shares = {"forget": FORGET, "retain": RETAIN, "adjacent": ADJACENT}[role]
        cut = [(r, f"{r}.{capability}" if capability else r) for r in shares]
        words = ", ".join(
            f"{'method' if r == role else r.replace('_', ' ')} {len(units_of(parts[key]))}"
            for r, key in cut
            if key in parts
        )
        yield f"{name}: {len(units_of(sets[name]))} units, by role: {words}"


def _unlabeled(sets: Sets, parts: Parts, spec: Files) -> tuple[Rows, tuple[str, ...]]:
    """Return the unlabelled mix: what overlaps forget is named, what must not be seen is left out.

    Units that nobody may train on leave the mix, and texts of withheld wordings.
    """
    if "unlabeled" not in sets:
        return (), ()
    taught = {u: c for c in spec.forget for u in units_of(sets[f"forget.{c}"])}
    apart: set[str] = set()
    texts: set[str] = set()
    for key, rows in parts.items():
        role = key.partition(".")[0]
        if role in ("forget", "retain", "adjacent", "unlabeled"):
            continue
        apart |= {held.row.unit for held in rows}
        texts |= {text_hash(text_of(held.row)) for held in rows}
    method = {h.row.unit for c in spec.forget for h in parts[f"forget.{c}"]}
    out: list[Row] = []
    gone = overlap = 0
    for held in sets["unlabeled"]:
        row = held.row
        closed = row.unit in apart - method or text_hash(text_of(row)) in texts
        if closed and not (spec.refit and row.unit in taught):
            gone += 1
            continue
        overlap += row.unit in taught
        capability = taught.get(row.unit, row.capability)
        out.append(replace(row, capability=capability, label=UNLABELED))
    notes = [f"{overlap} of {len(out)} unlabelled rows are about forget units"]
    if gone:
        notes.append(f"{gone} unlabelled rows of units that are scored or attacked were left out")
    return tuple(out), tuple(notes)


def _domain(
    spec: Files, parts: Parts, mix: Rows, exposure: Exposure, notes: tuple[str, ...]
) -> Domain:
    """Label and order the rows of every role."""

    def rows(key: str) -> Rows:
        ordered = sorted(parts.get(key, ()), key=_order)
        if spec.chunk_words:
            return label_rows(chunk_rows((h.row for h in ordered), spec.chunk_words), names)
        return label_rows((h.row for h in ordered), names)

    def by_capability(role: str) -> dict[str, Rows]:
        return {c: rows(f"{role}.{c}") for c in names}

    names = tuple(spec.forget)
    test, retain_test = by_capability("test"), rows("retain_test")
    scored = [row for held in test.values() for row in held]
    return Domain(
        name=spec.title,
        forget=by_capability("forget"),
        retain=rows("retain"),
        relearn=by_capability("relearn"),
        test=test,
        retain_test=retain_test,
        dev_forget=by_capability("dev_forget"),
        dev_retain=rows("dev_retain"),
        benign=rows("benign"),
        adjacent=rows("adjacent"),
        adjacent_test=rows("adjacent_test"),
        unlabeled=chunk_rows(mix, spec.chunk_words) if spec.chunk_words else mix,
        fresh=rows("fresh"),
        metrics=_metrics(scored, spec.metrics, "test"),
        retain_metrics=_metrics(retain_test, spec.retain_metrics, "retain_test"),
        claim=spec.claim or ("deletion" if exposure == "seen" else "capability"),
        exposure=exposure,
        sensitive=spec.sensitive,
        notes=tuple(notes),
    )


def _order(held: Held) -> Any:
    """Order rows by unit and content, so that a domain does not depend on the order of lines."""
    return (held.row.unit, held.row.wording, text_of(held.row), held.row.choices)


def _metrics(rows: Sequence[Row], wanted: tuple[Metric, ...], role: str) -> tuple[Metric, ...]:
    """Return the metrics that apply to scored rows.

    Raises:
        UserError: If the rows have several shapes, or a wanted metric does not apply.
    """
    kinds = sorted({row.kind for row in rows})
    if len(kinds) > 1:
        raise UserError(
            f"{role} holds rows of several shapes ({', '.join(kinds)}), which are scored "
            "differently; give them the same fields"
        )
    known = METRICS[kinds[0]]
    for metric in wanted:
        if metric not in known:
            raise UserError(
                f"metric '{metric}' does not apply to {role}, whose rows are of shape "
                f"'{kinds[0]}'; use {' or '.join(known)}"
            )
    return wanted or known
