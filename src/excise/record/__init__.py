"""The record: the typed, versioned account of everything a run writes to disk.

`run.json` holds a `Record`; `items.parquet` one score per item; `events.jsonl` the progress.
Report, terminal table and model card are pure functions of these. This module imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from excise.core.disk import write_text
from excise.core.errors import UserError
from excise.core.plain import NotPlain, read_json
from excise.record.entry import LEVELS, Estimate, Level, ScoreDirection
from excise.record.inspection import (
    BlockChange,
    Bucket,
    Inspection,
    NoiseFit,
    SpliceFit,
    Strip,
    TensorChange,
    TokenKL,
)
from excise.record.schema import (
    SCHEMA,
    AttackVariant,
    CurvePoint,
    Environment,
    Item,
    LevelResult,
    MethodRun,
    ModelRef,
    Record,
    Sample,
    Score,
    Verdict,
)
from excise.record.study import (
    StudyContrast,
    StudyLine,
    StudyPicture,
    StudyPictureRow,
    StudyPlot,
    StudyRecord,
    StudyRow,
    StudyTable,
)
from excise.record.upgrade import upgraded

__all__ = [
    "LEVELS",
    "SCHEMA",
    "AttackVariant",
    "BlockChange",
    "Bucket",
    "CurvePoint",
    "Environment",
    "Estimate",
    "Inspection",
    "Item",
    "Level",
    "LevelResult",
    "MethodRun",
    "ModelRef",
    "NoiseFit",
    "Record",
    "Sample",
    "Score",
    "ScoreDirection",
    "SpliceFit",
    "Strip",
    "StudyContrast",
    "StudyLine",
    "StudyPicture",
    "StudyPictureRow",
    "StudyPlot",
    "StudyRecord",
    "StudyRow",
    "StudyTable",
    "TensorChange",
    "TokenKL",
    "Verdict",
    "json_schema",
    "load",
    "parse_record",
    "save",
    "save_as",
    "upgraded",
]


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by None, which JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def save(record: Record, folder: Path) -> Path:
    """Write `run.json` into `folder` and return its path."""
    return save_as(record, folder / "run.json")


def save_as(record: Record, path: Path) -> Path:
    """Write a record as a file of any name, and return its path."""
    data = _finite(record.model_dump(mode="json", by_alias=True))
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def load(folder: Path) -> Record:
    """Read the record of an output folder, whichever version of excise wrote it.

    Raises:
        UserError: If there is none, it is not a record, or a newer version wrote it.
    """
    path = folder / "run.json" if folder.is_dir() else folder
    if not path.is_file():
        raise UserError(f"{folder} holds no run.json; name an output folder of excise")
    try:
        data = read_json(path)
        version = data.get("schema", 0) if isinstance(data, dict) else 0
    except NotPlain as error:
        raise UserError(f"{path} is not a record: it {error}") from None
    if not isinstance(version, int) or version < 1:
        raise UserError(f"{path} is not a record of excise: it has no schema number")
    if version > SCHEMA:
        raise UserError(f"{path} was written by a newer excise (schema {version}); upgrade")
    try:
        return parse_record(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise UserError(
            f"{path} is damaged at {where}: {first['msg'].lower()}; make it again"
        ) from None


def parse_record(data: Mapping[str, Any]) -> Record:
    """Return the record that plain data holds, of any schema up to the present one.

    Raises:
        ValidationError: If a field is missing or of the wrong kind.
    """
    return Record.model_validate(_restore(upgraded(data)))


def _restore(data: dict[str, Any]) -> dict[str, Any]:
    """Turn None back into NaN where a number is required."""
    for score in _entries(data, "scores"):
        score.update({k: math.nan for k in ("value", "low", "high") if score.get(k) is None})
    for attack in _entries(data, "attacks"):
        for point in _entries(attack, "curve"):
            point.update({k: math.nan for k in ("score", "low", "high") if point.get(k) is None})
    for method_run in _entries(data, "method_runs"):
        for row in _entries(method_run, "history"):
            row.update({k: math.nan for k, v in row.items() if v is None})
    return data


def _entries(data: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the entries of a list that are mappings; what else is there validation reports."""
    entries = data.get(key)
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of `run.json`."""
    return Record.model_json_schema(by_alias=True)
