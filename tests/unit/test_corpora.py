"""Domains of documents: reading the fetched files, splitting by document, general English."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import pytest

from excise.core.errors import UserError
from excise.data.domain import Row
from excise.data.split import hashed_order, portions
from excise.domains import biology, corpus, cyber
from excise.domains.biology import Biology, read_functions
from excise.domains.corpus import Document, read_phenotypes
from excise.domains.cyber import Cyber, plain, read_attacks, read_weaknesses, without_boilerplate
from excise.domains.prose import ProsePart, load_prose, passages
from excise.domains.pydocs import reference_topics, stdlib_docstrings


def units(rows: Iterable[Row]) -> set[str]:
    return {row.unit for row in rows}


def groups(rows: Iterable[Row]) -> set[str]:
    return {row.group for row in rows if row.group}


def nonsense(seed: int, words: int = 30) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefgh", k=5)) for _ in range(words)) + "."


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as the fetched ones are, with made-up content."""
    weakness = (
        '<Weakness ID="{i}" Name="Bug {i}"><Description>{a}</Description><Extended_Description>'
        "<p>{b}</p></Extended_Description></Weakness>"
    )
    body = "".join(weakness.format(i=i, a=nonsense(i), b=nonsense(100 + i)) for i in range(40))
    (tmp_path / "cwe.xml").write_text(f'<Catalog xmlns="urn:cwe-7">{body}</Catalog>')
    pattern = {"revoked": False, "deprecated": False, "description": "An act. Then a cut sen..."}
    patterns = [{**pattern, "external_id": "T1", "name": "Act"}]
    patterns += [{**pattern, "external_id": "T2", "name": "Gone", "revoked": True}]
    (tmp_path / "patterns.json").write_text(json.dumps({"attack_patterns": patterns}))
    uses = [
        {
            "source_ref": f"malware--{i % 10}",
            "description": f"[M](https://x.org/{i}) did {nonsense(200 + i)}(Citation: Somebody)",
            "revoked": False,
            "deprecated": False,
        }
        for i in range(30)
    ]
    (tmp_path / "relationships.json").write_text(json.dumps({"relationships": uses}))
    with sqlite3.connect(tmp_path / "go.sqlite") as base:
        base.execute("create table go_term (go_id, term, ontology, definition)")
        for i in range(40):
            for n, prefix in enumerate(("", "regulation of ", "negative regulation of ")):
                row = (f"GO:{i}{n}", f"{prefix}thing {i}", "BP", nonsense(300 + 3 * i + n))
                base.execute("insert into go_term values (?, ?, ?, ?)", row)
        base.execute("insert into go_term values ('GO:x', 'undefined', 'BP', null)")
    base.close()
    terms = [
        f'id: HP:{i}\nname: Sign {i}\ndef: "{nonsense(500 + i)} A \\"mark\\"." [x]\ncomment: no\n'
        for i in range(60)
    ]
    terms.append('id: HP:99\nname: Old\ndef: "Old." []\nis_obsolete: true\n')
    (tmp_path / "hp.obo").write_text("head\n\n[Term]\n" + "\n[Term]\n".join(terms))
    for module in (cyber, biology, corpus):
        monkeypatch.setattr(module, "require", lambda name, cache=None: tmp_path)
    return tmp_path


def test_weaknesses_are_words_without_markup(fetched: Path) -> None:
    found = list(read_weaknesses(fetched / "cwe.xml"))
    assert [d.key for d in found[:2]] == ["cwe/0", "cwe/1"]
    assert found[3].text == f"Bug 3. {nonsense(3)} {nonsense(103)}"


def test_attacks_are_grouped_by_who_acts(fetched: Path) -> None:
    found = {
        d.key: d.text
        for d in read_attacks(fetched / "patterns.json", fetched / "relationships.json")
    }
    assert len(found) == 11
    assert found["attack/T1"] == "Act. An act."
    assert found["attack/malware--4"].startswith(f"M did {nonsense(204)} M did {nonsense(214)}")


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("It ran.(Citation: A 1)(Citation: B", "It ran."),
        ("[Tool](https://a.b/c) made it.", "Tool made it."),
        ("First done. Second (cut) in the mid...", "First done."),
        ("[A](https://a.b/x) used it to reach, su...", "A used it to reach."),
        ("Ran <code>cmd</code> **twice**.", "Ran cmd twice."),
    ],
)
def test_plain(raw: str, clean: str) -> None:
    assert plain(raw) == clean


def test_boilerplate_is_left_out() -> None:
    same = "Always check every input that comes from outside."
    documents = [Document(str(i), f"{nonsense(i)} {same}") for i in range(3)]
    assert [d.text for d in without_boilerplate(documents)] == [nonsense(i) for i in range(3)]
    assert without_boilerplate(documents[:2]) == documents[:2]


def test_functions_and_phenotypes(fetched: Path) -> None:
    found = read_functions(fetched / "go.sqlite")
    assert len(found) == 120
    assert {d.group for d in found if "thing 7:" in d.text} == {"go/thing 7"}
    signs = read_phenotypes(fetched / "hp.obo")
    assert len(signs) == 60
    assert signs[2].text == f'Sign 2: {nonsense(502)} A "mark".'


@pytest.mark.parametrize("spec", [Cyber(), Biology(), Biology(fresh="phenotypes"), Cyber(seed=3)])
def test_roles_share_no_document(spec: Cyber | Biology, fetched: Path) -> None:
    domain = spec.build(None)
    parts = [p[spec.name] for p in (domain.forget, domain.dev_forget, domain.relearn, domain.test)]
    assert all(parts)
    for i, one in enumerate(parts):
        for other in parts[:i]:
            assert not units(one) & units(other)
            assert not groups(one) & groups(other)
    assert domain.adjacent
    assert not units(domain.adjacent) & units(domain.adjacent_test)
    assert not groups(domain.retain) & groups((*domain.retain_test, *domain.benign))
    assert {row.label for row in domain.forget[spec.name]} == {1}
    assert spec.build(None).fingerprint == domain.fingerprint
    assert spec.model_copy(update={"seed": 9}).build(None).fingerprint != domain.fingerprint


def test_near_duplicates_are_one_unit(fetched: Path) -> None:
    text = nonsense(1, 60)
    table = sqlite3.connect(fetched / "go.sqlite")
    with table:
        for i in range(6):
            row = (f"GO:twin{i}", f"twin {i}", "BP", f"{text} variant{i}")
            table.execute("insert into go_term values (?, ?, ?, ?)", row)
    table.close()
    domain = Biology().build(None)
    homes = {
        (role, row.unit)
        for role, rows in domain.roles()
        for row in rows
        if " variant" in row.text and row.unit.startswith("go")
    }
    assert len({unit for _, unit in homes}) == 1
    assert len({role for role, _ in homes} - {"unlabeled"}) == 1


def test_mention_moves_the_rest_to_the_neighbours(fetched: Path) -> None:
    domain = Biology(mention="Thing 1").build(None)
    assert all("thing 1" in text for text in (r.text for r in domain.test["biology"]))
    assert any(row.unit.startswith("go/") for row in domain.adjacent)
    with pytest.raises(UserError, match="mention: 0 definitions"):
        Biology(mention="unicorn").build(None)


def test_what_was_not_fetched_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXCISE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="run excise fetch cyber"):
        Cyber().build(None)


def test_passages_end_with_sentences_and_lose_nothing() -> None:
    text = " ".join(nonsense(i, 7) for i in range(40))
    found = list(passages(text, 30))
    assert " ".join(found) == text
    assert all(p.endswith(".") and 30 <= len(p.split()) < 38 for p in found[:-1])
    assert list(passages("short", 30)) == ["short"]
    assert next(passages(nonsense(1, 100), 30)).count(" ") == 36
    assert list(passages('He said "no." She left.', 3)) == ['He said "no."', "She left."]
    assert list(passages(" \n", 5)) == []


def test_order_and_portions() -> None:
    items = list("abcdefghij")
    order = hashed_order(items, items)
    assert sorted(order) == items != order
    assert hashed_order(items[::-1], items[::-1]) == order
    assert [len(p) for p in portions(order, [0.2, 0.5])] == [2, 5, 3]


def test_prose_parts_share_no_document() -> None:
    names: tuple[ProsePart, ...] = ("retain", "benign", "dev", "test")
    parts = {name: load_prose(name) for name in names}
    homes = [groups(rows) for rows in parts.values()]
    assert sum(map(len, homes)) == len(set().union(*homes)) >= 130
    assert len(parts["retain"]) > 3000 > 300 > 200 < len(parts["dev"])
    sources = {row.group.split("/")[1] for row in parts["test"]}
    assert sources == {"persuasion", "pride-and-prejudice", "union"}
    few = load_prose("retain", limit=40)
    assert few == parts["retain"][:40]
    assert len(groups(few)) > 15
    with pytest.raises(UserError, match="no part 'train'"):
        load_prose("train")  # type: ignore[arg-type]


def test_prose_is_clean_text() -> None:
    for row in load_prose("retain"):
        assert "_" not in row.text
        assert "  " not in row.text
        assert row.text.isprintable()


def test_python_text_is_prose() -> None:
    for found in (stdlib_docstrings(), reference_topics()):
        assert len(found) > 50
        assert len({key for key, _ in found}) == len(found)
        assert not any(">>>" in text for _, text in found)
