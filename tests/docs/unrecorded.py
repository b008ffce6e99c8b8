"""What the README says in numbers that have no record in docs/records, and why.

A paragraph, a list's item or a table of the README that is not rendered from a record stands here
with its numbers in their order, so that none can be added or changed by hand without an entry that
says where it comes from. Results of studies belong between marks (docs/studies.md, Publishing a
result); an entry goes once its study is published.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quote:
    """Numbers of one entry of the README.

    Attributes:
        starts: How the entry begins.
        numbers: Its numbers, in their order.
        reason: Why there is no record.
        where: Sections, `PAGE#ANCHOR`, that have all of them; empty where none has.
    """

    starts: str
    numbers: str
    reason: str
    where: tuple[str, ...] = ()


BEFORE = "measured before records were kept; the study's output is lost"
DEMO = "printed by the demo and shown in its picture, which is no study"
RECIPE = "printed by a recipe, which is no study"
BENCHMARK = "printed by a benchmark, which is no study"
NONE = "no measurement"

UNRECORDED = (
    Quote(
        "On made-up facts all 36 hiding models",
        "36 21 25 31 18 16 0 95",
        "beside the rates, from the same run",
        ("studies.md#auditor-roc",),
    ),
    Quote("`--model` takes a folder", "0 1 2 3 4 130 143", NONE),
    Quote("Complete scripts and a notebook", "30", NONE),
    Quote("| attack | access |", "2024", NONE),
    Quote("`make demo`, one seed", "72 0 1", DEMO),
    Quote(
        "| removal | before the attack |",
        "1.00 1.00 0.03 0.01 0.00 0.06 0.28 0.25 0.10 0.19 0.17 0.08 0.76 0.79",
        DEMO,
    ),
    Quote(
        "Only filtering passes all levels",
        "1,024 512 0.65 0.42 0.19 72 0.01 0.21 0.17 0.17 138 0.40 0.30 0.79 0.00",
        DEMO,
    ),
    Quote(
        "`excise run smollm-cyber`",
        "96 4.12 8.58 3.79 3.80 3.94 7.55 64 4.13 4.30 11 37 0.63 0.29 0.25 0.64 0.58 0.49 0.41 "
        "128 0.56 6.8 32 0.515",
        RECIPE,
    ),
    Quote(
        "- `undo-levels`, n = 338",
        "338 0.34 0.23 0.43 0.17 0.07 0.01 0.02 0.3 0.6 0.8 1 0.3 0.6 0.78 0.8 0.77 1 0.78 0.78",
        BEFORE,
        ("distillation.md#numbers",),
    ),
    Quote("- `minimal-edit`", "1 0.52 0.95 0.90 1.00", BEFORE, ("studies.md#minimal-edit",)),
    Quote("A step with per-token routing", "0.97 512 2.9 0.02 0.04 131,072 0.35 0.8", BENCHMARK),
)
