"""The published JSON Schema is the one the code writes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.report import sample

from excise.record import SCHEMA, json_schema, load, save

PUBLISHED = Path(__file__).parents[2] / "docs" / "record.schema.json"


def test_published_schema_is_current() -> None:
    current = json.dumps(json_schema(), indent=2, sort_keys=True) + "\n"
    assert PUBLISHED.read_text(encoding="utf-8") == current, (
        "docs/record.schema.json is stale: write json.dumps(record.json_schema(), indent=2, "
        "sort_keys=True) into it, and raise SCHEMA if old records would no longer load"
    )


def test_every_field_is_described() -> None:
    schema = json_schema()
    assert schema["properties"]["schema"]["default"] == SCHEMA
    for part in (schema, *schema["$defs"].values()):
        for name, field in part["properties"].items():
            assert field.get("description"), name


def test_records_come_back_as_they_went(tmp_path: Path) -> None:
    for name, make in sample.RECORDS.items():
        folder = tmp_path / name
        folder.mkdir()
        save(make(), folder)
        assert load(folder).model_dump_json() == make().model_dump_json()
