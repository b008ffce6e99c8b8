"""Attacks on models that only prompts reach: levels D0 and D1, by what the models answer.

The attacks are those of every audit, and so are their results. A hosted model has no tokenizer
that we could read: lengths are counted in bytes, `BYTES` to a token. Nothing can be hidden in its
weights either, so the positive control is the original behind a filter that knows the bare
questions: an attack counts where the original still answers behind its contexts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from excise.auditor.attacks.filler import Filler
from excise.auditor.attacks.paraphrase import Paraphrase
from excise.auditor.attacks.template import Template
from excise.auditor.base import (
    ORIGINAL,
    POSITIVE_CONTROL,
    Attack,
    AttackResult,
    Results,
    Subject,
    name_of,
)
from excise.auditor.budget import Budget
from excise.auditor.engine import chosen_attacks
from excise.auditor.evaluation_set import evaluation_set
from excise.auditor.results import absent
from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain, Rows
from excise.models.checkpoint import Checkpoint
from excise.models.endpoint import EndpointError, HostedModel
from excise.models.tiny import byte_tokenizer

BYTES = 4
"""Bytes of text that count as a token, as is usual for English."""
WIDEST = 4096 * BYTES
"""Bytes of a prompt at most that shots and filler may fill."""

ONLY_PROMPTS = "only prompts reach this model"
ITS_TEMPLATE = "the endpoint puts its own template, or none, around every prompt"
FILTER = "question_filter"
"""Name of the positive control in the record."""


@dataclass(frozen=True)
class Hosted:
    """A hosted model where attacks by prompt expect a checkpoint: they load it and tokenize."""

    model: HostedModel

    def load(self, *, dtype: torch.dtype, device: torch.device) -> HostedModel:
        """Return the model, which is loaded where it is served."""
        del dtype, device
        return self.model

    def tokenizer(self) -> Any:
        """Return a tokenizer that counts bytes."""
        tokenizer = byte_tokenizer()
        tokenizer.model_max_length = WIDEST
        return tokenizer

    @property
    def checkpoint(self) -> Checkpoint:
        """Return the same as the type that stages and subjects declare."""
        return cast("Checkpoint", self)


def asked_of(domain: Domain) -> Domain:
    """Return a domain as far as answers can score it.

    Args:
        domain: Rows by role.

    Returns:
        The same with the metric `generate`. Neighbours, paraphrases, multi-hop rows and benchmarks
        that are no questions are left out of what is scored.

    Raises:
        UserError: If test, dev or scored retain rows have no prompt, or no answer.
    """
    for role in ("test", "dev_forget", "retain_test"):
        part = getattr(domain, role)
        parts = part.values() if isinstance(part, Mapping) else (part,)
        if not _askable(tuple(row for rows in parts for row in rows)):
            raise UserError(
                f"{role} holds no rows, or some without a prompt and its answer, and a hosted "
                f"model can only be asked; give --{role.replace('_', '-')} a file with 'prompt' "
                "and 'completion'"
            )

    def kept(named: Mapping[str, Rows]) -> dict[str, Rows]:
        # A set of another shape than its neighbour would be scored by that shape's own metrics.
        return {
            name: rows
            for name, rows in named.items()
            if _askable(rows) and _kinds(rows) == _kinds(domain.test[name])
        }

    beside = domain.adjacent_test if _askable(domain.adjacent_test) else ()
    return replace(
        domain,
        adjacent_test=beside if _kinds(beside) == _kinds(domain.retain_test) else (),
        paraphrases=kept(domain.paraphrases),
        multi_hop=kept(domain.multi_hop),
        benchmark={},
        benchmark_metrics={},
        metrics=("generate",),
        retain_metrics=("generate",),
    )


def _askable(rows: Rows) -> bool:
    """Return whether there are rows, and all have a prompt and an answer."""
    return bool(rows) and all(
        row.kind in ("completion", "choice") and row.prompt.strip() for row in rows
    )


def _kinds(rows: Rows) -> set[str]:
    return {row.kind for row in rows}


def attack_hosted(
    models: Mapping[str, HostedModel],
    domain: Domain,
    budget: Budget,
    ctx: Context,
    attacks: Sequence[Attack] = (),
) -> Results:
    """Run every attack by prompt on every model and on the positive control.

    Args:
        models: Candidates, `original` and oracles by name.
        domain: Rows by role, as `asked_of` returns it.
        budget: How hard to try; what it requires of other attacks is missing in the results.
        ctx: Seed, and a folder to work in.
        attacks: Attacks with settings of their own, beside or in place of the budget's.

    Returns:
        Results by attack and subject.

    Raises:
        EndpointError: If the endpoint does not answer.
    """
    beside = {name_of(attack): attack for attack in (Paraphrase(), Filler(), *attacks)}
    wide = budget.for_attack()
    wide = wide.model_copy(update={"max_length": wide.max_length * BYTES})
    original = models[ORIGINAL]
    bare = evaluation_set(domain, wide, Hosted(original).tokenizer())
    filtered = frozenset(row.prompt.rstrip() for row in (*bare.all_test, *bare.all_dev))
    subjects = {**models, POSITIVE_CONTROL: replace(original, refused=filtered)}
    results: dict[tuple[str, str], AttackResult] = {}
    chosen = chosen_attacks(budget, tuple(beside.values()))
    for done, attack in enumerate(chosen, 1):
        name = name_of(attack)
        for subject, model in subjects.items():
            result = _attack(attack, subject, model, domain, wide, ctx)
            results[name, subject] = _of_filter(result) if subject == POSITIVE_CONTROL else result
        ctx.emit("attack", {"attack": name, "subject": "all models", "done": done,
                            "of": len(chosen), "reason": ""})  # fmt: skip
    return results


def _attack(
    attack: Attack, name: str, model: HostedModel, domain: Domain, budget: Budget, ctx: Context
) -> AttackResult:
    """Run one attack on one model; what its rows do not allow fails the attack, not the audit."""
    if attack.access != "prompt":
        return absent(attack, name, "missing", ONLY_PROMPTS)
    if isinstance(attack, Template):
        return absent(attack, name, "missing", ITS_TEMPLATE, applies=False)
    try:
        return attack.run(Subject(name, Hosted(model).checkpoint), domain, budget, ctx)
    except EndpointError:
        raise
    except UserError as error:
        return absent(attack, name, "failed", str(error))


def _of_filter(result: AttackResult) -> AttackResult:
    """Note in every variant which control was attacked."""
    variants = tuple(
        replace(
            one,
            entry=one.entry.model_copy(
                update={"facts": {**one.entry.facts, "positive_control": FILTER}}
            ),
        )
        for one in result.variants
    )
    return replace(result, variants=variants)
