"""A record that can be published: numbers stay, and what could name a person or a machine does not.

Kept are numbers, hashes, and words that excise wrote itself. Texts of the data, paths and commands
are left out; names of capabilities, models and units are replaced, each by the same name wherever
it occurs. This module imports neither torch nor numpy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from excise.record.measured import model_names
from excise.record.schema import Record

WORD = re.compile(r"[a-z][a-z0-9_]{0,40}")
"""Text of a setting that names a choice of the code: what does not look so is left out."""

MODEL_FILE = re.compile(r"[\w.-]+\.(safetensors|json|jinja|model)")
PATH = re.compile(r"(?:file:|[A-Za-z]:)?(?:[~.\w-]*[/\\])+[^\s'\",;:()\[\]]*")
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|\u201c[^\u201d]*\u201d")
HIDDEN = "(left out)"


SENTENCES = ("sentence", "reason", "reasons", "decided_by", "headline", "summary")
NAMES = ("name", "model", "subject")
SETS = ("set", "scored_on", "trained_on")


def public(record: Record, units: Iterable[str] = ()) -> Record:
    """Return a record without texts, names and paths.

    Args:
        record: Any record.
        units: Unit ids that are known beside those of the record: the items' of its folder.

    Returns:
        The record, marked sensitive. Capabilities are called `capability-1` and units `unit-1`;
        models `model-1`, unless they are called after their method. Samples, notes, commands,
        pictures and settings that are free text are gone.
    """
    names = _Names(record, units)
    data = names.walk(record.model_dump(mode="json", by_alias=True, exclude={"samples"}))
    asked = ("audit", "endpoint", "evaluate", "refit", "oracles", "seed", "dtype", "pretrain")
    data |= {
        "title": f"Public record: {record.kind}",
        "command": "",
        "sensitive": True,
        "samples": [],
        "config": {
            key: names.settings(record.config[key]) for key in asked if key in record.config
        },
        "data": names.facts(record.data),
        "notes": [],
    }
    for model in data["models"]:
        _bytes_alone(model)
    for run, original in zip(data["method_runs"], record.method_runs, strict=True):
        _bytes_alone(run["model"])
        run["method"] = {key: names.settings(value) for key, value in original.method.items()}
        run["extras"] = names.settings(original.extras)
        run["cost"] = {names.said(key): value for key, value in original.cost.items()}
        run["history"] = [
            {names.said(key): value for key, value in row.items()} for row in original.history
        ]
    for entry, attack in zip(data["attacks"], record.attacks, strict=True):
        entry["facts"] = names.settings(attack.facts)
        entry["variant"] = names.variant(attack.variant)
        failed = attack.status == "failed"
        entry["reason"] = HIDDEN if failed else names.said(QUOTED.sub(HIDDEN, attack.reason))
    if record.inspection is not None:
        data["inspection"]["strips"] = []
    if record.study is not None:
        study = record.study.model_copy(update={"pictures": ()})
        data["study"] = study.model_dump(mode="json")
    return Record.model_validate(data)


def _bytes_alone(model: dict[str, Any]) -> None:
    """Leave of a model its hashes."""
    files = model.get("files") or {}
    model["files"] = {name: sha for name, sha in files.items() if MODEL_FILE.fullmatch(name)}
    model["path"] = model["source"] = ""


class _Names:
    """What is called otherwise in public, the same wherever it occurs."""

    def __init__(self, record: Record, units: Iterable[str]) -> None:
        """Collect the names of capabilities, models and units."""
        sets = [s.set for s in record.scores]
        sets += [name for a in record.attacks for name in (a.scored_on, a.trained_on)]
        sets += [str(k) for key in ("rows", "units") for k in _mapping(record.data.get(key))]
        capabilities = dict.fromkeys(s.partition(".")[2] for s in sets)
        methods = {run.name: str(run.method.get("name", run.name)) for run in record.method_runs}
        models = [
            name
            for name in model_names(record)
            if name != "candidate" and not (name in methods and _after(name, methods[name]))
        ]
        strips = record.inspection.strips if record.inspection else ()
        marked = dict.fromkeys([*units, *(strip.unit for strip in strips)])
        self.called = {
            name: f"{kind}-{i}"
            for kind, names in (("unit", marked), ("model", models), ("capability", capabilities))
            for i, name in enumerate(names, 1)
            if name and name != "forget"  # what a lone capability is called by default
        }
        self.prompts: dict[str, str] = {}
        longest = sorted(self.called, key=len, reverse=True)
        either = "|".join(re.escape(name) for name in longest)
        self.pattern = re.compile(rf"(?<![\w-])(?:{either})(?![\w-])") if longest else None

    def said(self, text: str) -> str:
        """Return a sentence with names replaced and paths left out."""
        if self.pattern is not None:
            text = self.pattern.sub(lambda match: self.called[match[0]], text)
        return PATH.sub(HIDDEN, text) if "/" in text or "\\" in text else text

    def variant(self, name: str) -> str:
        """Return the name of a variant; a text it quotes gets a number."""

        def numbered(match: re.Match[str]) -> str:
            return self.prompts.setdefault(match[0], f"prompt-{len(self.prompts) + 1}")

        return self.said(QUOTED.sub(numbered, name))

    def walk(self, value: Any, field: str = "") -> Any:
        """Return plain data of the record's schema, its names and sentences replaced."""
        if isinstance(value, dict):
            return {key: self.walk(item, key) for key, item in value.items()}
        if isinstance(value, list):
            return [self.walk(item, field) for item in value]
        if not isinstance(value, str):
            return value
        if field in SETS:
            head, dot, capability = value.partition(".")
            return head + dot + self.called.get(capability, capability)
        if field in NAMES:
            return self.called.get(value, value)
        return self.said(value) if field in SENTENCES else value

    def settings(self, value: Any) -> Any:
        """Return settings: numbers, and texts and keys that name a choice of the code."""
        if isinstance(value, str):
            return value if WORD.fullmatch(value) and value not in self.called else HIDDEN
        if isinstance(value, list | tuple):
            return [self.settings(item) for item in value]
        if not isinstance(value, Mapping):
            return value
        out = {}
        for i, (key, item) in enumerate(value.items(), 1):
            plain = str(key) if WORD.fullmatch(str(key)) else f"key-{i}"
            out[self.called.get(str(key), plain)] = self.settings(item)
        return out

    def facts(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a record says of its data: counts, claim, exposure, metrics, its hash."""
        counted = {
            key: {self.walk(str(role), "set"): n for role, n in _mapping(data.get(key)).items()}
            for key in ("rows", "units")
            if key in data
        }
        words = ("name", "claim", "exposure", "metrics", "retain_metrics")
        said = {key: self.settings(data[key]) for key in words if key in data}
        mark = {"fingerprint": data["fingerprint"]} if "fingerprint" in data else {}
        return {**said, **mark, **counted}


def _after(name: str, method: str) -> bool:
    """Return whether a model is called after its method."""
    return bool(method) and name.startswith(method)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
