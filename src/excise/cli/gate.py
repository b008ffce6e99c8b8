"""`excise gate DIR`: hold a release to what it must meet, from the record alone; no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from xml.etree import ElementTree

from excise.cli.options import GateOptions
from excise.core.errors import UserError
from excise.record import Record, load
from excise.record.measured import failed_attacks
from excise.record.requirements import (
    Outcome,
    check,
    exit_code,
    models_of,
    of_record,
    parse_requirement,
    regressions,
    told,
)
from excise.report.words import plain


def main(options: GateOptions) -> int:
    """Check every condition on every model, print what came out, and return the exit code.

    Raises:
        UserError: If there is nothing to check, or the baseline cannot be compared.
    """
    record = load(options.folder)
    models = models_of(record, options.model)
    asked = options.require or ("" if options.baseline else of_record(record))
    if not asked and options.baseline is None:
        raise UserError(
            f"--require is missing, and {options.folder} was run without one; write conditions "
            "such as --require 'D3, recovery<=0.2@1M-tokens, retain>=-0.01'"
        )
    outcomes = check(record, parse_requirement(asked), models) if asked else ()
    if options.baseline is not None:
        outcomes += regressions(load(options.baseline), record, models)
    print(plain(FORMATS[options.format](record, outcomes, models)))
    return exit_code(record, outcomes, models)


def as_json(record: Record, outcomes: Sequence[Outcome], models: Sequence[str]) -> str:
    """Return the outcome for machines."""
    data = {
        "exit_code": exit_code(record, outcomes, models),
        "conditions": [vars(outcome) for outcome in outcomes],
        "failed_attacks": list(failed_attacks(record, models)),
    }
    return json.dumps(data, indent=1)


def as_junit(record: Record, outcomes: Sequence[Outcome], models: Sequence[str]) -> str:
    """Return the outcome as JUnit XML, one test case a condition; undecided is an error."""
    failed = failed_attacks(record, models)
    count = {s: sum(o.status == s for o in outcomes) for s in ("missed", "inconclusive")}
    suite = ElementTree.Element(
        "testsuite",
        name="excise gate",
        tests=str(len(outcomes) + len(failed)),
        failures=str(count["missed"]),
        errors=str(count["inconclusive"] + len(failed)),
    )
    kinds = {"missed": "failure", "inconclusive": "error"}
    for o in outcomes:
        case = ElementTree.SubElement(
            suite, "testcase", classname=_xml(o.model), name=_xml(o.condition)
        )
        if o.status == "met":
            ElementTree.SubElement(case, "system-out").text = _xml(o.reason)
        else:
            ElementTree.SubElement(case, kinds[o.status], message=_xml(o.reason))
    for reason in failed:
        case = ElementTree.SubElement(suite, "testcase", classname="attacks", name=_xml(reason))
        ElementTree.SubElement(case, "error", message=_xml(reason))
    ElementTree.indent(suite, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, "unicode")


def _xml(text: str) -> str:
    """Return text without the characters that XML 1.0 has no way to write (section 2.2)."""
    return "".join(
        c if c in "\t\n\r" or " " <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c > "\uffff"
        else "\ufffd"
        for c in text
    )  # fmt: skip


def as_github(record: Record, outcomes: Sequence[Outcome], models: Sequence[str]) -> str:
    """Return the outcome as workflow commands, escaped as actions/toolkit does (MIT).

    `escapeData` and `escapeProperty` of packages/core/src/command.ts.
    """
    kinds = {"met": "notice", "missed": "error", "inconclusive": "warning"}
    lines = [
        f"::{kinds[o.status]} title={_property(f'{o.model}: {o.condition} {o.status}')}"
        f"::{_data(o.reason)}"
        for o in outcomes
    ]
    failed = failed_attacks(record, models)
    return "\n".join([*lines, *(f"::error title=attack failed::{_data(why)}" for why in failed)])


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


FORMATS = {"text": told, "json": as_json, "junit": as_junit, "github": as_github}
"""Ways to print the outcome."""
