"""Records of an older schema, brought up to the present one, so that old reports can be rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from excise.record.entry import LEVELS

RENAMED_IN_2: dict[str, dict[str, str]] = {
    "record": {"arms": "method_runs"},
    "attacks": {"arm": "variant", "rung": "level"},
    "verdicts": {"arm": "model", "rungs": "levels"},
    "levels": {"rung": "level"},
    "inspection": {"arm": "model"},
    "rows": {"arm": "condition"},
    "facts": {"plant": "positive_control"},
}
"""Fields that schema 2 calls otherwise, by the part of the record that holds them."""

VALUES_IN_2: dict[tuple[str, str], dict[str, str]] = {
    ("attacks", "status"): {"void": "invalid"},
    ("attacks", "subject"): {"planted": "positive-control"},
    ("levels", "words"): {"relearning T does not bring back V": LEVELS["D4"]},
}
"""Values that schema 2 calls otherwise, by part and (new) field."""


def upgraded(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of any older schema as one of the present schema.

    Sentences stay as they were written. What is not of the expected shape is left as it is, for
    the validation to name.

    Args:
        data: `run.json` as plain data, `schema` in it; it is not changed.

    Returns:
        New data; the same where nothing is to be done.
    """
    return _schema_1_to_2(data) if data.get("schema") == 1 else dict(data)


def _schema_1_to_2(data: Mapping[str, Any]) -> dict[str, Any]:
    """Rename fields, statuses and subjects; no number is touched."""

    def attack(entry: Mapping[str, Any]) -> dict[str, Any]:
        return _within(_renamed("attacks", entry), "facts", lambda facts: _renamed("facts", facts))

    def verdict(entry: Mapping[str, Any]) -> dict[str, Any]:
        return _within(
            _renamed("verdicts", entry), "levels", lambda level: _renamed("levels", level)
        )

    def table(entry: Mapping[str, Any]) -> dict[str, Any]:
        return _within(entry, "rows", lambda row: _renamed("rows", row))

    out = _renamed("record", data) | {"schema": 2}
    out = _within(out, "attacks", attack)
    out = _within(out, "verdicts", verdict)
    out = _within(out, "inspection", lambda entry: _renamed("inspection", entry))
    return _within(out, "study", lambda study: _within(study, "tables", table))


def _renamed(part: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return one part of the record with its new names and values, in the old order."""
    names = RENAMED_IN_2.get(part, {})
    out = {}
    for old, value in entry.items():
        name = names.get(old, old)
        values = VALUES_IN_2.get((part, name), {})
        out[name] = values.get(value, value) if isinstance(value, str) else value
    return out


def _within(
    data: Mapping[str, Any], key: str, change: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Return `data` with the mapping, or every mapping of the list, under `key` changed."""
    value = data.get(key)
    if isinstance(value, Mapping):
        return {**data, key: change(value)}
    if isinstance(value, list):
        return {**data, key: [change(v) if isinstance(v, Mapping) else v for v in value]}
    return dict(data)
