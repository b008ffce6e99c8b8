"""The named budgets, arm by arm, with what they cost: `python benchmarks/budgets.py`.

Writes `docs/budgets.md`, and a test holds the page to it. Everything comes from the budgets, the
attacks and the estimate that `--dry-run` prints; of models the configuration is enough.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from excise.auditor.attacks import ATTACKS
from excise.auditor.base import Attack, name_of
from excise.auditor.budget import BUDGETS, LARGE, Budget, budget_of
from excise.auditor.tuning import TrainingAttack
from excise.requests.registry import parse_audit
from excise.run.estimate import GPU_FLOPS, Pace, Plan, gib, plan

PAGE = Path(__file__).resolve().parents[1] / "docs" / "budgets.md"

SPEED = 1e14
"""FLOP/s that hours are told at: a third of what an A100 of 80 GB does at its peak in bfloat16."""

CARD = 80e9
"""Bytes of the memory of one such card."""

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "max_position_embeddings": 131_072, "tie_word_embeddings": True,
    },
    "Llama-2-7B": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Published configurations of the three sizes."""

HEAD = f"""# Budgets

Written by `python benchmarks/budgets.py`; not by hand. What an audit at each named budget runs, arm
by arm, and what it costs at three sizes, by the estimate that `--dry-run` prints: one edited model
beside its original and one oracle, and the positive control of every attack that has one. A further
edited model or oracle adds about a quarter.

- Every row counts as long as the budget allows, and every set as large, so that these are upper
  bounds: `excise audit ... --dry-run` counts your rows, and `--measure` times them on your machine.
- *trainings* are of one model; a *reading* scores the held-out test set, the relearn set and
  retain once. Tokens and hours are of all models together.
- Hours are those of one accelerator at {SPEED:.0e} FLOP/s, about a third of an A100's peak in
  bfloat16. The totals also say the estimate's own range, {GPU_FLOPS[0]:.0e} to {GPU_FLOPS[1]:.0e}.
- Not counted: the further trainings of a model that resists every one of an attack, steps that
  are doubled, tasks of lm-eval, and controls that are tried after another of the same attack did
  not hide.
- `--audit.change` changes any of these numbers, `--audit.attacks` adds an attack or gives one
  settings of its own; `--workers` shares the work out.
"""


def plans(budget: str, folder: Path, attacks: Sequence[str] = ()) -> dict[str, Plan]:
    """Return the estimate of an audit for every size.

    Args:
        budget: Its name.
        folder: Where the configurations lie.
        attacks: Attacks that are asked for beside those of the budget.
    """
    made = {}
    for name in SHAPES:
        path = str(folder / name)
        request = parse_audit(
            {
                "name": "budgets",
                "domain": {"name": "facts"},
                "candidates": {"edited": path},
                "original": {"path": path},
                "oracles": [path],
                "audit": {"budget": budget, "attacks": [{"name": name} for name in attacks]},
                "dtype": "bfloat16",
            }
        )
        made[name] = plan(request, folder / "out", rows=False)
    return made


def hours(flops: float) -> str:
    """Return hours for people, two digits."""
    count = flops / SPEED / 3600
    if count < 0.01:
        return f"{count:.0e}".replace("e-0", "e-")
    return f"{count:.2g}" if count < 100 else f"{count:,.0f}"


def told(value: Any) -> str:
    """Return a setting for people; of long texts their number."""
    if not isinstance(value, tuple):
        return f"{value:g}" if isinstance(value, float) else str(value).lower()
    if any(" " in str(part) for part in value):
        return str(len(value))
    return ", ".join(map(told, value)) or "none"


class Read:
    """A budget that notes which of its fields an attack asks for."""

    def __init__(self, budget: Budget) -> None:
        """Take the budget."""
        self.budget = budget
        self.fields: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """Return a field and note it."""
        self.fields.append(name)
        return getattr(self.budget, name)


OF_ROWS = ("max_test_rows", "max_other_rows", "max_length", "batch_size")
"""Fields that are told once for a budget."""


def settings(attack: Attack, budget: Budget) -> str:
    """Return what an attack runs at a budget: its trainings, the budget's numbers, its own."""
    parts = []
    if isinstance(attack, TrainingAttack):
        parts += list(trainings(attack, budget))
    else:
        read = Read(budget)
        attack.passes(read)  # type: ignore[arg-type]
        asked = [name for name in dict.fromkeys(read.fields) if name not in OF_ROWS]
        parts += [f"{name} {told(getattr(budget, name))}" for name in asked]
    own = {name: getattr(attack, name) for name in type(attack).model_fields if name != "name"}
    plain = {n: v for n, v in own.items() if v != () and not isinstance(v, Attack)}
    return "; ".join([*parts, *(f"{name} {told(value)}" for name, value in plain.items())])


def trainings(attack: TrainingAttack, budget: Budget) -> Iterator[str]:
    """Yield the trainings of an attack in words, those of one name together."""
    by_name: dict[str, list[int]] = {}
    for training in attack.trainings(budget):
        by_name.setdefault(training.variant, []).append(training.within(budget).steps)
    for name, steps in by_name.items():
        span = f"{min(steps):,}" if min(steps) == max(steps) else f"{min(steps):,}-{max(steps):,}"
        yield f"{len(steps)} x {name} ({span} steps)"


def arms(budget: Budget, attacks: Sequence[Attack], made: dict[str, Plan]) -> Iterator[str]:
    """Yield the table of arms.

    Args:
        budget: For models of `LARGE` parameters or more.
        attacks: In the order in which they are told.
        made: Estimates by size.
    """
    yield f"| attack | access, level | runs | times | tokens | hours at {' | '.join(made)} |"
    yield "|---|---|---|---|---|" + "---|" * len(made)
    shared: dict[Attack, str] = {}
    for attack in attacks:
        name = f"audit: {name_of(attack)}"
        if isinstance(attack, TrainingAttack):
            if attack.shared in shared:
                other = f"the trainings of `{shared[attack.shared]}`, scored on held-out units"
                yield f"| {_who(attack)} | {other} | | | {'| ' * len(made)}"
                continue
            shared[attack.shared] = name_of(attack)
            times = f"{len(attack.trainings(budget))} trainings"
        else:
            times = f"{attack.passes(budget):.2g} readings"
        cost = _cost(made, (name, f"{name}, adapter"))
        yield f"| {_who(attack)} | {settings(attack, budget)} | {times} | {cost} |"


def _who(attack: Attack) -> str:
    """Return the first two cells of an attack."""
    original = " and the original" if attack.needs_original else ""
    return f"`{name_of(attack)}` | {attack.access}{original}, {attack.level}"


def _cost(made: dict[str, Plan], names: Sequence[str] = ()) -> str:
    """Return tokens and hours of the lines of these names, of all lines for none."""
    lines = [[line for line in p.lines if not names or line.name in names] for p in made.values()]
    tokens = sum(line.tokens for line in lines[0])
    return " | ".join(
        [f"{tokens:.1e}", *(hours(sum(line.flops or 0.0 for line in each)) for each in lines)]
    )


def rest(made: dict[str, Plan]) -> Iterator[str]:
    """Yield the rows of what is no attack, and the sum."""
    names = {
        "scores": "every model scored before an attack",
        "audit: positive controls": "positive controls, at most",
        "audit: scores on the way": "readings along the curves of trainings",
    }
    for name, words in names.items():
        line = next(line for line in next(iter(made.values())).lines if line.name == name)
        yield f"| {words} | | | {line.jobs:,} | {_cost(made, (name,))} |"
    yield f"| **all** | | | | {_cost(made)} |"


def needs(made: dict[str, Plan]) -> Iterator[str]:
    """Yield the table of time, memory and disk by size."""
    yield "| model | parameters | hours, range | memory of one worker | disk |"
    yield "|---|---|---|---|---|"
    pace = Pace(1 / GPU_FLOPS[1], 1 / GPU_FLOPS[0])
    for name, each in made.items():
        seconds = replace(each, assumed=pace).seconds
        assert seconds is not None
        assert each.memory is not None
        assert each.disk is not None
        low, high = (hours(SPEED * value) for value in seconds)
        fits = "" if each.memory <= CARD else "; more than a card of 80 GB has"
        memory = f"{gib(each.memory)}{fits}"
        row = f"{each.parameters:,} | {low} to {high} | {memory} | {gib(each.disk)}"
        yield f"| {name} | {row} |"


def section(name: str, folder: Path) -> Iterator[str]:
    """Yield the section of one budget."""
    budget = budget_of(name, LARGE)
    made = plans(name, folder)
    fields = {f: getattr(budget, f) for f in type(budget).model_fields if f not in _ARMS}
    attacks = [ATTACKS[attack]() for attack in ATTACKS if attack in budget.attacks]
    small = budget_of(name)
    other = {f: getattr(small, f) for f in fields if getattr(small, f) != getattr(budget, f)}
    yield f"\n## {name}\n"
    yield "; ".join(f"`{f}` {told(v)}" for f, v in fields.items()) + "."
    words = "; ".join(f"`{f}` {told(v)}" for f, v in other.items())
    yield f"\nBelow {LARGE:,} parameters: {words}.\n"
    yield from arms(budget, attacks, made)
    yield from rest(made)
    yield ""
    yield from needs(made)


_ARMS = ("name", "attacks", "together")
"""Fields of a budget that its tables say, or that a machine decides."""


def beside(folder: Path) -> Iterator[str]:
    """Yield the section of the attacks that no budget asks for."""
    asked = {name for budget in BUDGETS.values() for name in budget.attacks}
    others = [name for name in ATTACKS if name not in asked]
    attacks = [ATTACKS[name]() for name in others]
    yield "\n## Asked for by name\n"
    yield "No budget runs these; here at *standard*. They are shown and decide no level.\n"
    yield from arms(budget_of("standard", LARGE), attacks, plans("standard", folder, others))


def page() -> str:
    """Return the page."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name, shape in SHAPES.items():
            (folder / name).mkdir()
            config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **shape}
            (folder / name / "config.json").write_text(json.dumps(config))
        lines = [line for name in BUDGETS for line in section(name, folder)]
        return "\n".join([HEAD.rstrip(), *lines, *beside(folder)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
