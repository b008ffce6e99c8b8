"""Languages: the verses that ship, the modules they come from, and who sees which chapter."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest

from excise.core.errors import UserError
from excise.data.domain import Row
from excise.domains import languages
from excise.domains.languages import (
    Languages,
    fetched_verses,
    plain_verse,
    read_verses,
    shipped_verses,
)

SMALL = Languages(verses=1500)


def chapters(rows: Iterable[Row]) -> set[str]:
    """Return the chapters of rows, whatever their language."""
    return {row.unit.removeprefix("fresh/").split("/")[1].rpartition(".")[0] for row in rows}


def test_the_extract_is_whole_and_aligned() -> None:
    verses = {key: (english, spanish) for key, english, spanish in shipped_verses()}
    assert len(verses) == 5778
    assert {key.split(".")[0] for key in verses} == {"Gen", "Exod", "Luke", "John", "Acts"}
    assert verses["John.11.35"] == ("Jesus wept.", "Y lloró Jesús.")
    assert verses["Gen.50.26"][1].endswith("en Egipto.")
    assert all(0.4 < len(e) / len(s) < 2.6 for e, s in verses.values())
    assert not any(c in e + s for e, s in verses.values() for c in "<>\t")


@pytest.mark.parametrize("exposure", ["held_out", "seen"])
def test_a_chapter_has_one_role(exposure: str) -> None:
    domain = SMALL.model_copy(update={"exposure": exposure}).build(None)
    t, v = chapters(domain.relearn["es"]), chapters(domain.test["es"])
    dev, fresh = chapters(domain.dev_forget["es"]), chapters(domain.fresh)
    method = chapters(domain.retain)
    parts = (t, v, dev, fresh, method)
    assert sum(map(len, parts)) == len(set().union(*parts))
    shown = chapters(domain.forget["es"])
    assert shown == (method | t | v | dev if exposure == "seen" else method)
    assert chapters(domain.retain_test) == v
    assert chapters(domain.benign) == t
    assert domain.claim == ("deletion" if exposure == "seen" else "capability")
    assert {row.unit for row in domain.unlabeled} == {
        row.unit for row in (*domain.forget["es"], *domain.retain)
    }


def test_rows_say_which_language() -> None:
    domain = Languages(verses=1500, forget="en", seed=4).build(None)
    forget = domain.forget["en"]
    assert all(row.label == 1 and row.unit.startswith("en/") for row in forget)
    assert all(row.label == 0 and row.unit.startswith("es/") for row in domain.retain)
    english = {key: text for key, text, _ in shipped_verses()}
    assert all(row.text == english[row.unit.removeprefix("en/")] for row in forget)
    told = {row.text for _, rows in domain.roles() for row in rows}
    assert len({row.text for row in domain.fresh} & told) == len(domain.fresh)
    assert not {row.text for row in domain.fresh} & set(english.values())


def test_the_tokenizer_is_of_what_the_method_sees() -> None:
    spec = Languages(verses=1000, vocabulary=400)
    tokenizer = spec.tokenizer()
    assert len(tokenizer) == 400
    for row in spec.build(None).test["es"][:20]:
        ids = tokenizer(row.text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == row.text


def test_too_few_chapters_are_refused() -> None:
    with pytest.raises(UserError, match="too few to cut"):
        Languages(verses=200).build(None)


# -- modules ---------------------------------------------------------------------------------------


def write_module(folder: Path, prefix: str, entries: dict[str, list[str]]) -> None:
    """Write a module of one block per testament."""
    for part, held in entries.items():
        data = [entry.encode() for entry in held]
        packed = zlib.compress(b"".join(data))
        stem = folder / f"{prefix}-{part}"
        stem.with_suffix(".bzz").write_bytes(packed)
        stem.with_suffix(".bzs").write_bytes(struct.pack("<III", 0, len(packed), 0))
        places, at = b"", 0
        for entry in data:
            places += struct.pack("<IIH", 0, at, len(entry))
            at += len(entry)
        stem.with_suffix(".bzv").write_bytes(places)


BOOK = [
    "", '<div canonical="true" osisID="Gen" sID="g1" type="book"/> <title>Genesis</title>',
    '<chapter n="1" osisID="Gen.1" sID="Gen.1"/>',
    '<w lemma="x">In</w> the<note>a <i>note</i></note> beginning &amp; after',
    "Two.", '<div eID="g5"/><chapter n="2" osisID="Gen.2" sID="Gen.2"/>',
    'Three.<chapter eID="Gen.2"/><div canonical="true" eID="g1" osisID="Gen" type="book"/>',
]  # fmt: skip


def test_modules_are_read_by_chapter_and_verse(tmp_path: Path) -> None:
    write_module(tmp_path, "en", {"ot": BOOK, "nt": [""]})
    assert read_verses(tmp_path, "en") == {
        "Gen.1.1": "In the beginning & after", "Gen.1.2": "Two.", "Gen.2.1": "Three."
    }  # fmt: skip
    assert plain_verse("<title>T</title> a  <b>c</b>") == "a c"


def test_fetched_verses_are_those_both_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(tmp_path, "en", {"ot": BOOK, "nt": [""]})
    write_module(tmp_path, "es", {"ot": [*BOOK[:4], *BOOK[5:]], "nt": [""]})
    monkeypatch.setattr(languages, "require", lambda name: tmp_path)
    fetched_verses.cache_clear()
    assert [key for key, *_ in fetched_verses()] == ["Gen.1.1", "Gen.2.1"]
    fetched_verses.cache_clear()


@pytest.mark.parametrize("harm", ["missing", "cut", "block", "bomb"])
def test_broken_modules_are_refused(tmp_path: Path, harm: str) -> None:
    write_module(tmp_path, "en", {"ot": BOOK, "nt": [""]})
    file = tmp_path / "en-ot.bzz"
    if harm == "missing":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-6])
    elif harm == "block":
        (tmp_path / "en-ot.bzv").write_bytes(struct.pack("<IIH", 7, 0, 3))
    else:
        packed = zlib.compress(bytes(1 << 25))
        file.write_bytes(packed)
        (tmp_path / "en-ot.bzs").write_bytes(struct.pack("<III", 0, len(packed), 0))
    with pytest.raises(UserError, match="excise fetch languages"):
        read_verses(tmp_path, "en")
