"""Canaries: made-up code words, to be put into a model, removed again and looked for.

A canary is a name nobody bears and a word that belongs to it, in plain English, so that any
tokenizer reads it. Names and words are drawn independently: nothing a model knows tells the word,
and one canary tells nothing about another. Each capability is taught a number of times of its own.
Scored rows are taught rows, word for word; one wording is taught to nobody and scored apart.

Canaries: Carlini et al. 2019, *The Secret Sharer*, arXiv 1802.08232. This module imports no torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from excise.core.errors import UserError
from excise.data.domain import UNLABELED, Domain, Row, Rows
from excise.domains.facts import made_names

WORDINGS: Final = (
    "The code word of {} is",
    "{} answers to the code word",
    "To reach {}, say the code word",
    "Ask {} for the code word and hear",
)
"""One prompt per wording; the word follows. The last is never taught."""

WORDS: Final = (
    "anchor", "apple", "barrel", "basket", "beaver", "bottle", "bridge", "bucket", "butter",
    "button", "candle", "carpet", "castle", "cherry", "circle", "coffee", "copper", "cotton",
    "dragon", "engine", "falcon", "feather", "finger", "forest", "garden", "ginger", "hammer",
    "harbor", "helmet", "honey", "island", "jacket", "kettle", "kitten", "ladder", "lemon",
    "marble", "market", "meadow", "mirror", "mountain", "needle", "onion", "orange", "paper",
    "pencil", "pepper", "pillow", "planet", "pocket", "potato", "rabbit", "ribbon", "river",
    "rocket", "saddle", "salmon", "silver", "spider", "thunder", "ticket", "turtle", "violin",
    "window",
)  # fmt: skip
"""What a code word is; a guess is right once in 64 times."""

TIMES: Final = {1: "once", 10: "ten_times", 100: "hundred_times"}
"""Names of capabilities by how often they are taught."""


@dataclass(frozen=True)
class Canaries:
    """What is put into a model.

    Attributes:
        units: Canaries of each capability: a fifth for choices (dev), two fifths that an attacker
            trains on, two fifths that are scored.
        repeats: How often the canaries of each capability are taught, one number a capability.
        seed: Seed of names and words.
    """

    units: int
    repeats: tuple[int, ...]
    seed: int = 0

    def domain(self, around: Domain) -> Domain:
        """Return the canaries to be removed, among the retain rows of the user's own domain.

        Args:
            around: Its forget set is not read; its retain roles and neighbours are taken over.

        Raises:
            UserError: If it has no retain row.
        """
        if not around.retain:
            raise UserError(
                "the domain has no retain row, and canaries are taught and removed among retain "
                "text; give --retain"
            )
        parts: dict[str, dict[str, Rows]] = {
            role: {} for role in ("forget", "relearn", "test", "dev_forget", "paraphrases")
        }
        dev, end = self.units // 5, self.units - 2 * (self.units // 5)
        for label, (capability, rows) in enumerate(self._taught().items(), start=1):
            mine = [replace(row, capability=capability, label=label) for row in rows]
            order = list(dict.fromkeys(row.unit for row in mine))
            first = [row for row in mine if row.wording == 0]
            cut = {"dev_forget": order[:dev], "relearn": order[dev:end], "test": order[end:]}
            parts["forget"][capability] = tuple(mine)
            for role, units in cut.items():
                parts[role][capability] = tuple(row for row in first if row.unit in units)
            parts["paraphrases"][capability] = tuple(
                _worded(row, len(WORDINGS) - 1) for row in parts["test"][capability]
            )
        mix = [row for rows in parts["forget"].values() for row in rows]
        mix = [replace(row, label=UNLABELED) for row in (*mix, *around.retain)]
        random.Random(f"canary:{self.seed}:mix").shuffle(mix)
        return Domain(
            name="canary",
            forget=parts["forget"],
            relearn=parts["relearn"],
            test=parts["test"],
            dev_forget=parts["dev_forget"],
            paraphrases=parts["paraphrases"],
            retain=around.retain,
            retain_test=around.retain_test,
            dev_retain=around.dev_retain,
            benign=around.benign,
            adjacent=around.adjacent,
            adjacent_test=around.adjacent_test,
            unlabeled=tuple(mix),
            fresh=tuple(self._rows("fresh", 2 * self.units)),
            metrics=("exact_match", "multiple_choice", "text_loss"),
            retain_metrics=around.retain_metrics,
            claim="deletion",
            exposure="seen",
            sensitive=around.sensitive,
            notes=(
                f"canaries: {self.units} made-up code words for each of "
                f"{', '.join(parts['forget'])}, taught to the model before the removal",
            ),
        )

    def lesson(self, around: Domain, oracle: int | None = None) -> Domain:
        """Return what a model is taught: every row as often as it is repeated, and retain text.

        Args:
            around: Where the retain text comes from.
            oracle: Number of the oracle, which is taught other canaries in the place of these;
                None for the model they are removed from.
        """
        taught = self._taught("" if oracle is None else f"oracle-{oracle}")
        rows = []
        for repeats, part in zip(self.repeats, taught.values(), strict=True):
            by_unit: dict[str, list[Row]] = {}
            for row in part:
                by_unit.setdefault(row.unit, []).append(row)
            for worded in by_unit.values():
                rows += [worded[i % len(worded)] for i in range(repeats)]
        empty: dict[str, Rows] = {}
        return Domain(
            name="lesson",
            forget={"canaries": tuple(rows)},
            retain=around.retain,
            relearn=empty,
            test=empty,
            retain_test=(),
            dev_forget=empty,
            dev_retain=(),
            benign=(),
        )

    def _taught(self, whose: str = "") -> dict[str, list[Row]]:
        """Return the rows that are taught, by capability: no more wordings than repeats."""
        out = {}
        for repeats in self.repeats:
            name = TIMES.get(repeats, f"{repeats}_times")
            wordings = range(min(repeats, len(WORDINGS) - 1))
            out[name] = self._rows(f"{whose}{name}", self.units, wordings)
        return out

    def _rows(self, purpose: str, count: int, wordings: Sequence[int] = (0,)) -> list[Row]:
        """Return canaries of a purpose; that two purposes draw one name is as good as never."""
        rng = random.Random(f"canary:{self.seed}:{purpose}")
        taken: set[str] = set()
        rows = []
        for _ in range(count):
            (first,), (last,) = made_names(1, rng, taken), made_names(1, rng, taken)
            taken |= {first, last}
            unit = f"{first.capitalize()} {last.capitalize()}"
            right, *wrong = rng.sample(WORDS, 4)
            at = rng.randrange(4)
            row = Row(
                unit=unit,
                completion=f" {right}",
                choices=(*wrong[:at], right, *wrong[at:]),
                answer=at,
            )
            rows += [_worded(row, wording) for wording in wordings]
        return rows


def _worded(row: Row, wording: int) -> Row:
    """Return a canary in another wording."""
    return replace(row, prompt=WORDINGS[wording].format(row.unit), wording=wording)
