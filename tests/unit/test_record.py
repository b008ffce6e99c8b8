"""The record on disk: it comes back as it went, and what is no record is refused in a sentence."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from excise.core.disk import write_text
from excise.core.errors import UserError
from excise.record import (
    LEVELS,
    SCHEMA,
    AttackVariant,
    CurvePoint,
    Environment,
    LevelResult,
    MethodRun,
    ModelRef,
    Record,
    Sample,
    Score,
    Verdict,
    json_schema,
    load,
    save,
    upgraded,
)

OLD = Path(__file__).parents[1] / "fixtures" / "record-schema-1.json"
"""A run of the demo by a version that wrote schema 1, trimmed."""


def sample() -> Record:
    """Return a record with something in every part."""
    point = CurvePoint(examples=4, tokens=9, flops=1e9, score=0.5, low=0.25, high=0.75, retain=0.9)
    level = LevelResult(level="D4", words="relearning", status="fail", against="oracle", gap=0.5)
    return Record(
        kind="remove",
        title="rmu",
        command="excise remove rmu",
        config={"method": {"name": "rmu", "layer": 7}},
        environment=Environment(excise="0.1.0", versions={"torch": "2"}, threads=1),
        seeds=(0, 1),
        data={"rows": {"retain": 3}},
        models=(ModelRef(name="original", fingerprint="ab", parameters=5),),
        method_runs=(
            MethodRun(
                name="rmu",
                method={"name": "rmu"},
                model=ModelRef(name="rmu"),
                changed=("a", "b"),
                cost={"steps": 2.0},
                history=({"step": 0.0, "loss": 1.5},),
            ),
        ),
        scores=(
            Score(model="rmu", set="test.a", metric="exact_match", value=0.1, low=0, high=1, n=4),
        ),
        attacks=(
            AttackVariant(name="relearn", access="weights", lr=1e-3, curve=(point,), decisive=True),
        ),
        verdicts=(Verdict(model="rmu", sentence="Half came back.", levels=(level,), recovery=0.5),),
        samples=(Sample(set="test.a", prompt="caf\u00e9 <b>", outputs={"rmu": "\u4e2d"}),),
        seconds=1.25,
        notes=("one",),
    )


def test_a_record_comes_back_as_it_went(tmp_path: Path) -> None:
    path = save(sample(), tmp_path)
    assert path == tmp_path / "run.json"
    assert load(tmp_path) == sample()
    assert load(path) == sample()
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert json.loads(path.read_text(encoding="utf-8"))["schema"] == SCHEMA
    assert "caf\u00e9" in path.read_text(encoding="utf-8")


def test_not_a_number_survives_as_null(tmp_path: Path) -> None:
    nan, inf = math.nan, math.inf
    record = Record(
        scores=(Score(model="m", set="s", metric="x", value=nan, low=-inf, high=inf, n=0),),
        attacks=(
            AttackVariant(
                name="a", access="logits", curve=(CurvePoint(score=nan, low=nan, high=1),)
            ),
        ),
        method_runs=(
            MethodRun(
                name="a", method={}, model=ModelRef(name="a"), history=({"step": 0, "loss": nan},)
            ),
        ),
        verdicts=(Verdict(model="a", sentence="s", recovery=nan),),
        seconds=2.0,
    )
    text = save(record, tmp_path).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    again = load(tmp_path)
    assert all(math.isnan(v) for v in (again.scores[0].value, again.scores[0].low))
    assert math.isnan(again.attacks[0].curve[0].score)
    assert again.attacks[0].curve[0].high == 1
    assert math.isnan(again.method_runs[0].history[0]["loss"])
    assert again.method_runs[0].history[0]["step"] == 0
    assert again.verdicts[0].recovery is None


def test_fields_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    data = json.loads(save(sample(), tmp_path).read_text())
    data["new_field"] = {"a": 1}
    data["environment"]["cuda"] = "13"
    data["attacks"][0]["curve"][0]["joules"] = 3
    (tmp_path / "run.json").write_text(json.dumps(data))
    assert load(tmp_path) == sample()


def test_a_record_with_little_in_it_loads(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"schema": 1}')
    assert load(tmp_path) == Record()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema": SCHEMA + 1}))
    with pytest.raises(UserError, match=rf"newer excise \(schema {SCHEMA + 1}\); upgrade"):
        load(tmp_path)


def test_a_folder_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run\.json; name an output folder"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"holds no run\.json"):
        load(tmp_path / "none")


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "7", "null", '"text"', "{}", '{"schema": 0}', '{"schema": "1"}',
        '{"schema": null}', '{"schema": 1', "\x00\x01",
    ],
)  # fmt: skip
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json is not a record"):
        load(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b'{"schema": 1, "title": "\xff\xfe"}')
    with pytest.raises(UserError, match=r"run\.json is not a record"):
        load(tmp_path)


def set_at(data: Any, path: tuple[str | int, ...], value: Any) -> None:
    for part in path[:-1]:
        data = data[part]
    data[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("kind",), "party", "kind"),
        (("seconds",), "long", "seconds"),
        (("scores", 0, "n"), "many", r"scores\.0\.n"),
        (("scores",), 3, "scores"),
        (("scores",), [3], r"scores\.0"),
        (("attacks", 0, "access"), "magic", r"attacks\.0\.access"),
        (("attacks", 0, "curve", 0, "tokens"), "x", r"attacks\.0\.curve\.0\.tokens"),
        (("method_runs", 0, "history"), [3], r"method_runs\.0\.history\.0"),
        (("verdicts", 0, "levels", 0, "level"), "D9", r"verdicts\.0\.levels\.0\.level"),
        (("models", 0), None, r"models\.0"),
    ],
)
def test_damage_is_told_with_its_place(
    tmp_path: Path, path: tuple[str | int, ...], value: Any, where: str
) -> None:
    data = json.loads(save(sample(), tmp_path).read_text())
    set_at(data, path, value)
    (tmp_path / "run.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=rf"run\.json is damaged at {where}: "):
        load(tmp_path)


def test_records_are_frozen() -> None:
    with pytest.raises(ValidationError):
        sample().title = "other"


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    write_text(path, "old")
    assert path.stat().st_mode & 0o777 == 0o644

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_the_schema_of_the_file_names_its_own_field() -> None:
    schema = json_schema()
    assert "schema" in schema["properties"]
    assert "version" not in schema["properties"]
    assert schema["properties"]["seconds"]["description"] == "Wall-clock time."


def numbers(data: Any) -> list[float]:
    """Return every number of plain data, in order."""
    if isinstance(data, dict):
        return [n for value in data.values() for n in numbers(value)]
    if isinstance(data, list):
        return [n for value in data for n in numbers(value)]
    return [data] if isinstance(data, int | float) and not isinstance(data, bool) else []


def test_a_record_of_schema_1_is_read_under_its_new_names(tmp_path: Path) -> None:
    text = OLD.read_text(encoding="utf-8")
    old = json.loads(text)
    new = upgraded(old)
    assert old == json.loads(text)
    assert numbers(new) == [SCHEMA, *numbers(old)[1:]]
    assert upgraded(new) == new
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    record = load(tmp_path)
    assert record.version == SCHEMA
    assert [run.name for run in record.method_runs] == [run["name"] for run in old["arms"]]
    assert [v.model for v in record.verdicts] == [v["arm"] for v in old["verdicts"]]
    for verdict, before in zip(record.verdicts, old["verdicts"], strict=True):
        assert [(one.level, one.status, one.gap) for one in verdict.levels] == [
            (rung["rung"], rung["status"], rung["gap"]) for rung in before["rungs"]
        ]
        assert [one.words for one in verdict.levels] == list(LEVELS.values())
        assert verdict.sentence == before["sentence"]
    for attack, was in zip(record.attacks, old["attacks"], strict=True):
        assert (attack.variant, attack.level) == (was["arm"], was["rung"])
        assert attack.status == {"void": "invalid"}.get(was["status"], was["status"])
    assert {"invalid", "ok"} == {attack.status for attack in record.attacks}
    (control, *_) = [a for a in record.attacks if a.subject == "positive-control"]
    assert control.facts["positive_control"]
    save(record, tmp_path)
    assert load(tmp_path) == record


def test_studies_and_inspections_of_schema_1_are_read_too() -> None:
    rows = [{"arm": "cleared", "metric": "loss", "value": 1.5}]
    old = {
        "schema": 1,
        "study": {"name": "s", "tables": [{"title": "t", "rows": rows}]},
        "inspection": {"arm": "rmu", "tensors": [{"name": "w"}]},
    }
    new = upgraded(old)
    assert new["study"]["tables"][0]["rows"] == [
        {"condition": "cleared", "metric": "loss", "value": 1.5}
    ]
    assert new["inspection"] == {"model": "rmu", "tensors": [{"name": "w"}]}


@pytest.mark.parametrize("part", ["arms", "attacks", "verdicts", "study", "inspection"])
@pytest.mark.parametrize("value", [3, "x", [3], {"tables": 3}])
def test_damage_to_an_old_record_is_left_to_the_validation(part: str, value: Any) -> None:
    assert upgraded({"schema": 1, part: value})["schema"] == SCHEMA
