"""Rows of several sources with their units: duplicates merged, overlaps refused or noted.

A set is what one source gives: `forget.NAME`, `retain`, `test.NAME` ... This module imports no
torch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from excise.core.errors import UserError, counted, nearest
from excise.data.dedup import Clusters, Duplicates, find_duplicates, shared_words, text_hash
from excise.data.domain import CORE, Row, labelled_text, text_of
from excise.data.rows import Located, Problems, SourceRows, reasons
from excise.data.sources import parse_source, read_source
from excise.data.spans import pieces, with_pieces

BY_CAPABILITY = ("forget", "relearn", "test", "dev_forget", "multi_hop")
"""Roles that are kept by capability."""

TEMPLATE_TEXTS = 5
"""Different texts from which a cluster of near duplicates may be rows of one template."""

TEMPLATE_SHARE = 0.2
"""Share of a set's rows that a template may put into one unit with others."""


@dataclass(frozen=True, slots=True)
class UnitRow:
    """A row with its unit.

    Attributes:
        row: The row; its unit is never empty.
        where: File and place.
        given: Whether the file named the unit.
        version: Which paraphrase of its unit it is: its number in the file, else its text.
    """

    row: Row
    where: str
    given: bool
    version: str


Sets = Mapping[str, tuple[UnitRow, ...]]
"""Rows by set."""


def read_sets(specs: Mapping[str, str], *, sensitive: bool = False) -> tuple[Sets, tuple[str, ...]]:
    """Read every source and give every row its unit.

    Args:
        specs: Source by set.
        sensitive: Whether notes give places alone, since reasons may quote what stands there.

    Returns:
        The rows by set, and notes on what was left out or merged.

    Raises:
        UserError: With up to five problems of all sources together.
    """
    problems = Problems()
    loaded: dict[str, SourceRows] = {}
    named = [name.partition(".")[2] for name in specs if name.startswith("forget.")]
    for name, spec in specs.items():
        try:
            loaded[name] = _with_capability(read_source(parse_source(spec)), name, named)
        except UserError as error:
            problems.add(error)
    problems.check()
    notes = [note for name, source in loaded.items() for note in left_out(name, source, sensitive)]
    sets, merged = give_units(loaded)
    return sets, (*notes, *merged)


def left_out(name: str, source: SourceRows, sensitive: bool = False) -> Iterable[str]:
    """Yield the notes on what of a source was left out, and on rows that name no unit.

    Args:
        name: What the source is called in a note.
        source: What was read of it.
        sensitive: Whether reasons, which may quote a row, stay out of the notes.
    """
    if source.blank:
        yield f"{name}: {source.blank} blank texts were left out"
    if source.skipped:
        total = len(source.rows) + source.blank + len(source.skipped)
        why = [
            (_place(where) if sensitive else f"{_place(where)}: {reason}")
            for where, reason, _ in reasons(source.skipped)
        ]
        yield (
            f"{name}: {len(source.skipped)} of {total} rows cannot be used and were left out, for "
            f"example {'; '.join(why[:3])}"
        )
    nameless = sum(not located.row.unit for located in source.rows)
    if 0 < nameless < len(source.rows):
        yield (
            f"{name}: {nameless} of {len(source.rows)} rows name no unit; each is one by its text"
        )


def _with_capability(loaded: SourceRows, name: str, named: Sequence[str]) -> SourceRows:
    """Set the capability of a set's rows and label their spans, and refuse what does not belong.

    Rows of a capability whose spans hold nothing of it, such as pieces of a document, are left out.

    Args:
        loaded: Rows of the set.
        name: The set.
        named: The domain's capabilities, in the order that numbers them.
    """
    role, _, capability = name.partition(".")
    out: list[Located] = []
    none: list[tuple[str, str]] = []
    for located in loaded.rows:
        row = _with_labelled_spans(located, name, named)
        if role == "unlabeled":
            out.append(replace(located, row=row))
            continue
        wanted = capability if role in BY_CAPABILITY else ""
        if wanted and row.spans and wanted not in {span.capability for span in row.spans}:
            none.append((located.where, f"has spans, none of capability '{wanted}'"))
            continue
        if wanted and row.spans and not _scored(row, wanted):
            part = "an assistant's turn" if row.kind == "chat" else "the completion"
            none.append(
                (located.where, f"has no span of capability '{wanted}' in {part}, which is scored")
            )
            continue
        if loaded.documents:  # equal names of files mean one document in one capability alone
            row = replace(row, unit=f"{wanted or role}/{row.unit}")
        if row.capability and row.capability != wanted:
            belongs = f"capability '{wanted}'" if wanted else "what everybody may know"
            raise UserError(
                f"{located.where}: has the capability '{row.capability}', but {name} holds "
                f"{belongs}; move the row or remove the field"
            )
        out.append(replace(located, row=replace(row, capability=wanted)))
    if none and not out:
        raise UserError(f"{none[0][0]}: {none[0][1]}, and no other row of {name} does; label some")
    return replace(loaded, rows=tuple(out), skipped=(*loaded.skipped, *none))


def _scored(row: Row, capability: str) -> bool:
    """Return whether a span of a capability holds any of what is scored of a row."""
    scored = [(0, len(labelled_text(row)))]
    if row.kind == "completion":
        scored = [(len(row.prompt), len(labelled_text(row)))]
    elif row.kind == "chat":
        ends = [*accumulate(len(said) + 1 for _, said in row.messages)]
        scored = [
            (end - 1 - len(said), end - 1)
            for end, (who, said) in zip(ends, row.messages, strict=True)
            if who == "assistant"
        ]
    return any(
        span.start < end and start < span.end
        for span in row.spans
        if span.capability == capability
        for start, end in scored
    )


def _with_labelled_spans(located: Located, name: str, named: Sequence[str]) -> Row:
    """Return a row whose spans are labelled by the number of their capability.

    Raises:
        UserError: If a span's capability is none of the domain's, or has no place in this set.
    """
    numbers = {"": CORE, **{capability: i + 1 for i, capability in enumerate(named)}}
    role = name.partition(".")[0]
    spans = located.row.spans
    for span in spans:
        at = f"{located.where}: the span [{span.start}, {span.end}]"
        if span.capability not in numbers:
            raise UserError(f"{at} has the unknown capability '{span.capability}'; "
                            f"{nearest(span.capability, named)}")  # fmt: skip
        if span.capability and role not in (*BY_CAPABILITY, "unlabeled"):
            raise UserError(
                f"{at} is of capability '{span.capability}', but {name} holds what everybody may "
                f"know; move the row to forget.{span.capability} or to unlabeled"
            )
    looked_at = any(span.capability or span.confidence < 1 for span in spans)
    if not looked_at and role not in (*BY_CAPABILITY, "unlabeled"):
        return replace(located.row, spans=())  # parts of what is core anyhow
    labelled = tuple(replace(span, label=numbers[span.capability]) for span in spans)
    row = replace(located.row, spans=labelled)
    document = with_pieces(row, pieces(row)).label
    named_here = row.capability or ("", *named)[document]
    return replace(row, capability=named_here) if role == "unlabeled" else row


def give_units(sources: Mapping[str, SourceRows]) -> tuple[Sets, tuple[str, ...]]:
    """Give every row a unit: its own, merged where texts of different units are duplicates.

    Without an id a row's unit is the cluster of its near duplicates, over all sets.

    Args:
        sources: Rows by set.

    Returns:
        The rows with units, and notes with the number of duplicates and an example.

    Raises:
        UserError: If many rows of a set would be one unit for the sake of a template, or two rows
            of one text have different spans.
    """
    flat = [located for source in sources.values() for located in source.rows]
    _check_spans(flat)
    texts = [text_of(located.row) for located in flat]
    near = [source.near for source in sources.values() for _ in source.rows]
    duplicates = find_duplicates(texts, {i for i, joined in enumerate(near) if not joined})
    clusters = Clusters()
    for i, located in enumerate(flat):
        clusters.join(i, duplicates.cluster[i])
        if located.row.unit:
            clusters.join(("unit", located.row.unit), i)
    members: dict[object, list[int]] = defaultdict(list)
    for i in range(len(flat)):
        members[clusters.find(i)].append(i)
    names: dict[int, str] = {}
    for group in members.values():
        given = [flat[i].row.unit for i in group if flat[i].row.unit]
        name = min(given) if given else "text-" + min(text_hash(texts[i]) for i in group)[:16]
        names.update(dict.fromkeys(group, name))
    version = _versions(duplicates, texts)
    united = iter(
        UnitRow(
            replace(located.row, unit=names[i]),
            located.where,
            bool(located.row.unit),
            f"w{located.row.wording}" if located.worded else version[i],
        )
        for i, located in enumerate(flat)
    )
    out = {name: tuple(next(united) for _ in source.rows) for name, source in sources.items()}
    named = [name for name, source in sources.items() for _ in source.rows]
    return out, (*_notes(flat, duplicates), *_templates(flat, texts, named, duplicates))


def _check_spans(flat: list[Located]) -> None:
    """Refuse two rows of one text whose spans differ; a copy without any stays as it is."""
    first: dict[str, Located] = {}
    for located in flat:
        if not located.row.spans:
            continue
        other = first.setdefault(labelled_text(located.row), located)
        if other.row.spans != located.row.spans:
            raise UserError(
                f"{located.where} and {other.where} are one text with different spans; give both "
                "the same, or remove one"
            )


def _templates(
    flat: list[Located], texts: list[str], named: list[str], duplicates: Duplicates
) -> Iterable[str]:
    """Yield notes on rows of different texts that are one unit because they share a long passage.

    Args:
        flat: Rows.
        texts: What each says.
        named: Set of each.
        duplicates: Clusters of the texts.

    Raises:
        UserError: If that is more than `TEMPLATE_SHARE` of a set's rows.
    """
    clusters: dict[int, list[int]] = defaultdict(list)
    for i, at in enumerate(duplicates.cluster):
        clusters[at].append(i)
    joined: Counter[str] = Counter()
    notes = []
    for group in clusters.values():
        # Rows that name one unit belong together whatever they say.
        owners = {flat[i].row.unit or text_hash(texts[i]): i for i in reversed(group)}
        distinct = {text_hash(texts[i]): texts[i] for i in group}
        if min(len(owners), len(distinct)) < TEMPLATE_TEXTS:
            continue
        words = shared_words([*distinct.values()])
        if words:
            a, b, *_ = (flat[i].where for i in sorted(owners.values()))
            joined.update(named[i] for i in group)
            notes.append(
                f"{len(group)} rows of {len(distinct)} texts are one unit, because they share "
                f"about {words} words, for example {_place(a)} and {_place(b)}"
            )
    total = Counter(named)
    for name, count in joined.items():
        if count > TEMPLATE_SHARE * total[name]:
            raise UserError(
                f"{name}: {count} of {total[name]} rows would be put together with others as near "
                f"duplicates, since a passage that they share is most of them ({notes[0]}); add "
                "?duplicates=exact to the source if it is a template, or remove the copies"
            )
    return notes


def _versions(duplicates: Duplicates, texts: list[str]) -> list[str]:
    """Return a name per row that near duplicates share, whatever the order of rows."""
    smallest: dict[int, str] = {}
    for i, at in enumerate(duplicates.cluster):
        smallest[at] = min(smallest.get(at, "~"), text_hash(texts[i]))
    return [smallest[at] for at in duplicates.cluster]


def _notes(flat: list[Located], duplicates: Duplicates) -> tuple[str, ...]:
    """Return the notes on duplicates; places stand for texts, which may be sensitive."""
    notes = []
    for kind, pairs in (("exact", duplicates.exact), ("near", duplicates.near)):
        if pairs:
            a, b = (flat[i].where for i in pairs[0])
            notes.append(
                f"{len(pairs)} {kind} duplicates were put into one unit with what they repeat, "
                f"for example {_place(b)} with {_place(a)}"
            )
    apart = [
        (a, b)
        for a, b in (*duplicates.exact, *duplicates.near)
        if flat[a].row.unit and flat[b].row.unit and flat[a].row.unit != flat[b].row.unit
    ]
    if apart:
        a, b = (flat[i].where for i in apart[0])
        notes.append(
            f"{len(apart)} of these had different unit ids, for example {_place(b)} and {_place(a)}"
        )
    return tuple(notes)


def _place(where: str) -> str:
    """Return a place with the bare name of its file."""
    folder, _, name = where.rpartition("/")
    return name if folder else Path(where).name


def units_of(rows: tuple[UnitRow, ...]) -> dict[str, UnitRow]:
    """Return the first row of each unit."""
    out: dict[str, UnitRow] = {}
    for member in rows:
        out.setdefault(member.row.unit, member)
    return out


def check_overlaps(sets: Sets) -> None:
    """Refuse sets that share units where they must not.

    A capability's forget set may share units with its own relearn, test and dev sets, its multi-hop
    questions with all of these; `unlabeled` with any set.

    Raises:
        UserError: With up to five problems: how many units are shared, and an example.
    """
    problems = Problems()
    units = {name: units_of(rows) for name, rows in sets.items() if name != "unlabeled"}
    names = sorted(units, key=_rank)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            shared = sorted(units[first].keys() & units[second].keys())
            if not shared or _may_share(first, second):
                continue
            a, b = units[first][shared[0]], units[second][shared[0]]
            problems.add(UserError(
                f"{first} and {second} share {counted(len(shared), 'unit')}, for example {a.where} "
                f"and {b.where}; {_advice(first, second)}"
            ))  # fmt: skip
    problems.check()


def without_overlaps(sets: Sets) -> tuple[Sets, tuple[str, ...]]:
    """Leave units out of the later of two sets that share them where they must not.

    Args:
        sets: Rows by set.

    Returns:
        The sets, and a note for each that lost rows.

    Raises:
        UserError: If a set loses every row.
    """
    out = dict(sets)
    notes = []
    names = sorted((name for name in sets if name != "unlabeled"), key=_rank)
    for i, second in enumerate(names):
        closed: dict[str, str] = {}
        for first in names[:i]:
            if not _may_share(first, second):
                closed |= dict.fromkeys(units_of(out[first]), first)
        kept = tuple(member for member in out[second] if member.row.unit not in closed)
        if lost := len(out[second]) - len(kept):
            others = {closed[m.row.unit] for m in out[second] if m.row.unit in closed}
            if not kept:
                raise UserError(
                    f"every row of {second} repeats one of {' or '.join(sorted(others))}; give "
                    "other data"
                )
            notes.append(
                f"{second}: {counted(lost, 'row')} that repeat {' or '.join(sorted(others))} "
                "were left out"
            )
        out[second] = kept
    return out, tuple(notes)


def _rank(name: str) -> tuple[int, str]:
    order = ("forget", "test", "relearn", "dev_forget", "retain")
    role = name.partition(".")[0]
    return (order.index(role) if role in order else len(order), name)


def _may_share(first: str, second: str) -> bool:
    (role, _, a), (other, _, b) = first.partition("."), second.partition(".")
    if "multi_hop" in (role, other):  # asks for facts of every role of its capability
        return a == b
    return role == "forget" and other in ("relearn", "test", "dev_forget") and a == b


def _advice(first: str, second: str) -> str:
    roles = {first.partition(".")[0], second.partition(".")[0]}
    if roles == {"test", "relearn"}:
        return "what the attacker trains on must not be scored: remove them from one of the two"
    if roles == {"forget"}:
        return "a unit belongs to one capability: remove them from one of the two"
    return "remove them from one of the two, or give the rows unit ids of their own"


def group_note(sets: Sets) -> tuple[str, ...]:
    """Return a note when forget and retain have groups in common."""
    forget = {h.row.group for n, rows in sets.items() if n.startswith("forget.") for h in rows}
    shared = (forget & {h.row.group for h in sets.get("retain", ())}) - {""}
    if not shared:
        return ()
    return (f"forget and retain have {counted(len(shared), 'group')} in common",)
