"""Who may see which unit: the split, made once, written down and read again by a later audit.

Shares, in percent of units:

| from | held out | seen |
|---|---|---|
| forget | method 40, dev 10, relearn 25, test 25 | relearn 40, test 40, dev 20 of the units with
several paraphrases; the method sees every unit, in the paraphrases that are not withheld |
| retain | method 60, benign 10, dev 10, test 20 | the same |
| adjacent | adjacent 50, adjacent test 50 | the same |

Where a deletion is claimed, the scored rows are the very rows that were to be deleted: the method
sees all of them, and relearn, test and dev are disjoint units among them, in the shares of `seen`.
Of test units only what a column `wording` or a file for test marks as a paraphrase is withheld.

A role that has a file of its own is not cut; its share goes to the method. A unit is never split,
nor is a group. The assignment depends on the seed and on unit ids, not on the order of rows.
This module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, TypeVar

from pydantic import Field, ValidationError

from excise.core.config import Config
from excise.core.disk import write_text
from excise.core.errors import UserError, counted
from excise.core.plain import NotPlain, read_json
from excise.data.dedup import Clusters, text_hash
from excise.data.domain import Domain, text_of
from excise.data.units import Sets, UnitRow, units_of

T = TypeVar("T")

VERSION: Final = 1
"""Version of the written split."""

FORGET: Final = {"forget": 40, "dev_forget": 10, "relearn": 25, "test": 25}
"""Percent of a forget set's units, when the test units are never shown to the method."""

SEEN: Final = {"relearn": 40, "test": 40, "dev_forget": 20}
"""Percent of a forget set's units of which paraphrases are withheld, when the test units are
forget units."""

RETAIN: Final = {"retain": 60, "benign": 10, "dev_retain": 10, "retain_test": 20}
"""Percent of the retain set's units."""

ADJACENT: Final = {"adjacent": 50, "adjacent_test": 50}
"""Percent of the adjacent set's units."""


class Split(Config):
    """Which unit has which role, and what it was made from."""

    version: int = VERSION
    """Version of the format."""
    seed: int = 0
    """Seed of the assignment."""
    exposure: Literal["seen", "held_out", "unknown"] = "held_out"
    """Whether the scored units were shown to the method."""
    verbatim: bool = False
    """Whether the scored rows are rows that the method was given (a deletion)."""
    hashed: bool = False
    """Whether units are written as SHA-256, for sensitive data."""
    units: dict[str, dict[str, str]] = Field(default={})
    """Set (`forget.NAME`, `retain`, `adjacent`) -> unit -> role."""
    sources: dict[str, dict[str, str]] = Field(default={})
    """Set -> file name -> SHA-256."""
    shares: dict[str, dict[str, int]] = Field(default={})
    """Percent of units by role."""
    fingerprint: str = ""
    """Fingerprint of the domain."""

    def role(self, name: str, unit: str) -> str | None:
        """Return the role of a unit of a set, or None when it is not in the split."""
        return self.units.get(name, {}).get(_key(unit, self.hashed))


def _key(unit: str, hashed: bool) -> str:
    return hashlib.sha256(unit.encode()).hexdigest() if hashed else unit


def without(shares: Mapping[str, int], explicit: Iterable[str], method: str) -> dict[str, int]:
    """Return shares without the roles that have files of their own; `method` gains their part.

    Args:
        shares: Percent by role.
        explicit: Roles that are not cut.
        method: Role that gains, if it is among the shares.
    """
    gone = {*explicit} - {method}
    out = {role: share for role, share in shares.items() if role not in gone}
    if method in out:
        out[method] += sum(shares[role] for role in gone if role in shares)
    return out


def assign(
    units: Mapping[str, Iterable[str]],
    shares: Mapping[str, int],
    *,
    seed: int,
    name: str,
    fixed: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Give every unit a role, so that shares are met as nearly as groups allow.

    Groups are laid out from the largest to the smallest, those of one size in an order that only
    the seed and their ids decide; each goes to the role that lacks most.

    Args:
        units: For every unit, the groups it belongs to.
        shares: Percent by role.
        seed: Seed of the order.
        name: Name of the set, for the order and for errors.
        fixed: Role of groups that were assigned with an earlier set.

    Returns:
        Role of every unit.

    Raises:
        UserError: If there are too few units or groups; says how many are needed.
    """
    bundles = _bundles(units)
    total = sum(shares.values())
    needed = -(-total // min(shares.values()))
    roles = ", ".join(role.replace("_", " ") for role in shares)
    if len(units) < needed:
        raise UserError(
            f"{set_named(name)} has {counted(len(units), 'unit')}, too few to cut {roles} from "
            f"it; at least {needed} are needed"
        )
    if len(bundles) < len(shares):
        raise UserError(
            f"{set_named(name)} has {counted(len(bundles), 'group')}, never split, too few to cut "
            f"{roles} from it; at least {len(shares)} are needed"
        )
    lacks = {role: share * len(units) / total for role, share in shares.items()}
    out: dict[str, str] = {}
    rest = []
    for bundle in bundles:
        role = next((r for g in bundle.groups if (r := (fixed or {}).get(g)) in shares), None)
        if role is None:
            rest.append(bundle)
        else:
            lacks[role] -= len(bundle.units)
            out.update(dict.fromkeys(bundle.units, role))
    rest.sort(key=lambda b: (-len(b.units), _rank(seed, name, b.units[0])))
    used = set(out.values())
    for at, bundle in enumerate(rest):
        empty = [role for role in shares if role not in used]
        role = max(empty if len(rest) - at <= len(empty) else shares, key=lambda r: lacks[r])
        used.add(role)
        lacks[role] -= len(bundle.units)
        out.update(dict.fromkeys(bundle.units, role))
    return out


class _Bundle:
    """Units that stay together because they share groups."""

    def __init__(self) -> None:
        self.units: list[str] = []
        self.groups: set[str] = set()


def set_named(name: str) -> str:
    """Return the name of a set as messages give it: `forget` for `forget.forget`."""
    return ".".join(dict.fromkeys(name.split(".")))


def _bundles(units: Mapping[str, Iterable[str]]) -> list[_Bundle]:
    """Return the smallest bundles that no group is split over; units ascending."""
    clusters = Clusters()
    for unit in sorted(units):
        clusters.find(("unit", unit))
        for group in units[unit]:
            if group:
                clusters.join(("unit", unit), ("group", group))
    out: dict[object, _Bundle] = defaultdict(_Bundle)
    for unit in sorted(units):
        bundle = out[clusters.find(("unit", unit))]
        bundle.units.append(unit)
        bundle.groups |= {g for g in units[unit] if g}
    return list(out.values())


def _rank(seed: int, *names: str) -> bytes:
    return hashlib.sha256("\x1f".join((str(seed), *names)).encode()).digest()


def withheld(versions: Iterable[str], *, seed: int, unit: str) -> set[str]:
    """Return the paraphrases of a unit that the method does not see: one in three, at least one.

    Args:
        versions: Names of its paraphrases; with a single one nothing is withheld.
        seed: Seed of the choice.
        unit: The unit.
    """
    ranked = sorted(set(versions), key=lambda v: _rank(seed, "wording", unit, v))
    return set(ranked[: max(1, len(ranked) // 3)]) if len(ranked) > 1 else set()


Parts = dict[str, tuple[UnitRow, ...]]
"""Rows by role, or by role and capability as `role.NAME`."""


def cut_held_out(
    capability: str, sets: Sets, seed: int, fixed: Split | None, groups: dict[str, str]
) -> Parts:
    """Cut a forget set so that the method never sees a unit of the relearn or the test set.

    Args:
        capability: Name of the forget set.
        sets: Rows of every source.
        seed: Seed of the split.
        fixed: A written split to use instead.
        groups: Role of every group so far, over all capabilities; is added to.

    Raises:
        UserError: If there are too few units, or the written split lacks one.
    """
    name = f"forget.{capability}"
    explicit = [r for r in FORGET if r != "forget" and f"{r}.{capability}" in sets]
    # Units with a file of their own leave the forget set: the attacker's or the sweep's copy wins.
    taken = {u for r in explicit for u in units_of(sets[f"{r}.{capability}"])}
    rows = tuple(member for member in sets[name] if member.row.unit not in taken)
    roles = _roles(name, rows, without(FORGET, explicit, "forget"), seed, fixed, groups)
    return {
        f"{role}.{capability}": _with_role(rows, roles, role)
        for role in FORGET
        if role not in explicit
    }


def cut_seen(
    capability: str, sets: Sets, seed: int, fixed: Split | None, groups: dict[str, str]
) -> Parts:
    """Withhold paraphrases: relearn, test and dev rows are unseen paraphrases of forget units.

    Args, Raises: As `cut_held_out`.
    """
    name = f"forget.{capability}"
    rows = sets[name]
    explicit = [r for r in SEEN if f"{r}.{capability}" in sets]
    taken = {u for r in explicit for u in units_of(sets[f"{r}.{capability}"])}
    versions = versions_of(rows)
    several = {unit for unit, names in versions.items() if len(names) > 1 and unit not in taken}
    shares = without(SEEN, explicit, "")
    if not shares:
        return {name: rows}
    able = tuple(member for member in rows if member.row.unit in several)
    try:
        roles = _roles(name, able, shares, seed, fixed, groups)
    except UserError as error:
        raise UserError(f"{error}, each in several paraphrases (or give files for them)") from None
    hidden = {unit: withheld(versions[unit], seed=seed, unit=unit) for unit in several}

    def is_hidden(member: UnitRow) -> bool:
        return member.version in hidden.get(member.row.unit, ())

    hidden_rows = tuple(member for member in able if is_hidden(member))
    out: Parts = {name: tuple(member for member in rows if not is_hidden(member))}
    for role in shares:
        out[f"{role}.{capability}"] = _with_role(hidden_rows, roles, role)
    return out


def cut_verbatim(
    capability: str, sets: Sets, seed: int, fixed: Split | None, groups: dict[str, str]
) -> Parts:
    """Give the method every row; relearn, test and dev units are disjoint ones among them.

    A file for test holds paraphrases of forget units: those of test units are scored apart. Where
    it names a part of the units, these are the test units; where it names all, they are cut.

    Args, Raises: As `cut_held_out`; also if the file for test holds other units.
    """
    name = f"forget.{capability}"
    rows = sets[name]
    given = sets.get(f"test.{capability}", ())
    whole, asked = units_of(rows), units_of(given)
    for unit, member in asked.items():
        if unit not in whole:
            raise UserError(
                f"{member.where}: is about no unit of {name}, and a deletion is scored in the "
                "forget rows and paraphrases of them; give each row the 'unit' of the row that it "
                "paraphrases, in both files"
            )
    explicit = [r for r in ("relearn", "dev_forget") if f"{r}.{capability}" in sets]
    taken = {u for r in explicit for u in units_of(sets[f"{r}.{capability}"])}
    shares = without(SEEN, explicit, "")
    roles: dict[str, str] = {}
    if asked and asked.keys() < whole.keys() - taken:
        roles = dict.fromkeys(asked, "test")
        near = {m.row.group for m in rows if m.row.unit in asked} - {""}
        taken |= asked.keys() | {m.row.unit for m in rows if m.row.group in near}
        shares.pop("test")
    able = tuple(member for member in rows if member.row.unit not in taken)
    if shares:
        roles |= _roles(name, able, shares, seed, fixed, groups)
    tested = {unit for unit, role in roles.items() if role == "test"}
    hidden = {unit: _held_back(rows, unit, seed) for unit in sorted(tested)}

    def is_hidden(member: UnitRow) -> bool:
        return member.row.wording in hidden.get(member.row.unit, ())

    forget = tuple(member for member in rows if not is_hidden(member))
    known = {text_hash(text_of(member.row)) for member in forget}
    paraphrases = [member for member in rows if is_hidden(member)]
    paraphrases += [
        member
        for member in given
        if member.row.unit in tested and text_hash(text_of(member.row)) not in known
    ]
    out: Parts = {name: forget, f"paraphrases.{capability}": tuple(paraphrases)}
    for role in ("relearn", "test", "dev_forget"):
        if role not in explicit:
            members = tuple(m for m in forget if roles.get(m.row.unit) == role)
            out[f"{role}.{capability}"] = members
    return out


def _held_back(rows: Iterable[UnitRow], unit: str, seed: int) -> set[int]:
    """Return the numbered paraphrases of a unit that are withheld; never its first one."""
    numbers = {m.row.wording for m in rows if m.row.unit == unit and m.version.startswith("w")}
    further = {str(number) for number in numbers - {min(numbers, default=0)}}
    if len(further) > 1:
        further = withheld(further, seed=seed, unit=unit)
    return {int(number) for number in further}


def cut_plain(
    name: str, shares: Mapping[str, int], sets: Sets, seed: int, fixed: Split | None
) -> Parts:
    """Cut the set of `retain` or `adjacent` into the roles of `shares` that have no file.

    Raises:
        UserError: If there are too few units, or the written split lacks one.
    """
    rows = sets[name]
    explicit = [r for r in shares if r != name and r in sets]
    left = without(shares, explicit, name)
    if len(left) == 1:
        return {name: rows}
    roles = _roles(name, rows, left, seed, fixed)
    return {role: _with_role(rows, roles, role) for role in left}


def versions_of(rows: Iterable[UnitRow]) -> dict[str, set[str]]:
    """Return the paraphrases of every unit."""
    out: dict[str, set[str]] = defaultdict(set)
    for member in rows:
        out[member.row.unit].add(member.version)
    return out


def _roles(
    name: str,
    rows: Sequence[UnitRow],
    shares: Mapping[str, int],
    seed: int,
    fixed: Split | None,
    groups: dict[str, str] | None = None,
) -> dict[str, str]:
    """Return the role of every unit, from the written split where there is one."""
    units: dict[str, set[str]] = defaultdict(set)
    for member in rows:
        units[member.row.unit].add(member.row.group)
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
        groups.update({g: roles[unit] for unit, names in units.items() for g in names if g})
    return roles


def _with_role(rows: Iterable[UnitRow], roles: Mapping[str, str], role: str) -> tuple[UnitRow, ...]:
    return tuple(member for member in rows if roles[member.row.unit] == role)


def hashed_order(items: Sequence[T], keys: Sequence[str], seed: int = 0) -> list[T]:
    """Return items ordered by a hash of their keys: the same everywhere, unlike any file order.

    Args:
        items: What is ordered.
        keys: One text per item; equal keys stay together.
        seed: Another seed gives another order.
    """

    def place(i: int) -> tuple[bytes, int]:
        return hashlib.sha256(f"{seed}:{keys[i]}".encode()).digest(), i

    return [items[i] for i in sorted(range(len(items)), key=place)]


def portions(items: Sequence[T], shares: Sequence[float]) -> list[list[T]]:
    """Cut items into one part per share and a last part with the rest.

    Args:
        items: What is cut, in order.
        shares: Shares of the whole; together at most 1.

    Returns:
        `len(shares) + 1` lists.
    """
    parts, at = [], 0
    for share in shares:
        size = round(len(items) * share)
        parts.append(list(items[at : at + size]))
        at += size
    return [*parts, list(items[at:])]


def split_of(
    domain: Domain,
    *,
    seed: int = 0,
    sources: Mapping[str, Mapping[str, str]] | None = None,
) -> Split:
    """Return the split that a domain embodies.

    Args:
        domain: The domain.
        seed: Seed it was built with.
        sources: Set -> file name -> SHA-256 of what it was built from.
    """
    units: dict[str, dict[str, str]] = {}
    for role in ("forget", "dev_forget", "relearn", "test"):  # later ones are narrower
        for name, rows in getattr(domain, role).items():
            roles = units.setdefault(f"forget.{name}", {})
            roles.update({_key(row.unit, domain.sensitive): role for row in rows})
    for name, shares in (("retain", RETAIN), ("adjacent", ADJACENT)):
        units[name] = {
            _key(row.unit, domain.sensitive): role
            for role in shares
            for row in getattr(domain, role)
        }
    return Split(
        seed=seed,
        exposure=domain.exposure,
        verbatim=domain.verbatim,
        hashed=domain.sensitive,
        units={name: roles for name, roles in units.items() if roles},
        sources={name: dict(files) for name, files in (sources or {}).items()},
        shares={"forget": SEEN if domain.exposure == "seen" else FORGET,
                "retain": RETAIN, "adjacent": ADJACENT},
        fingerprint=domain.fingerprint,
    )  # fmt: skip


def write_split(path: Path, split: Split) -> None:
    """Write a split as JSON, whole or not at all.

    Args:
        path: File to write, `OUT/split.json`.
        split: The split (`split_of`).
    """
    text = json.dumps(split.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False)
    write_text(path, text + "\n")


def read_split(path: Path, sources: Mapping[str, Mapping[str, str]] | None = None) -> Split:
    """Read a written split.

    Args:
        path: The file.
        sources: Set -> file name -> SHA-256 of the files it shall be used with; None to skip the
            comparison.

    Raises:
        UserError: If it is missing, broken, of a newer version, or made from other files.
    """
    try:
        data = read_json(path)
    except FileNotFoundError:
        raise UserError(f"there is no split {path}; name the split.json of the run") from None
    except NotPlain as error:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name the split.json in it") from None
        raise UserError(f"{path} {error}; name the split.json of the run") from None
    version = data.get("version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise UserError(f"{path} was written by a newer excise (split version {version}); update")
    try:
        split = Split.model_validate(data)
    except ValidationError:
        raise UserError(f"{path} is not a split; name the split.json of the run") from None
    if sources is not None:
        _check_sources(split, sources, path)
    return split


def _check_sources(split: Split, sources: Mapping[str, Mapping[str, str]], path: Path) -> None:
    """Refuse to use a split with other files than it was made from."""
    for name, files in split.sources.items():
        if name not in sources:
            role = name.partition(".")[0]
            if role in ("unlabeled", "fresh", "adjacent", "adjacent_test", "multi_hop"):
                continue
            raise UserError(
                f"{path} was made with a file for {name} ({', '.join(files)}); give it too"
            )
        now = sources[name]
        if sorted(now.values()) == sorted(files.values()):
            continue
        changed = [f for f, digest in now.items() if files.get(f) != digest] or list(now)
        raise UserError(
            f"{path} was made from another file for {name}: {changed[0]} differs from what was "
            "split; give the same file, or leave the split out"
        )
    for name in sources:
        role = name.partition(".")[0]
        if name not in split.sources and role not in ("unlabeled", "fresh", "multi_hop"):
            raise UserError(f"{path} was made without a file for {name}; leave it out")
