"""An audit of models behind an endpoint: the straight line, without weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from excise.auditor.base import ORIGINAL
from excise.auditor.budget import LARGE, Budget
from excise.auditor.hosted import ONLY_PROMPTS, Hosted, asked_of, attack_hosted
from excise.auditor.verdict import judge_all
from excise.core.context import Context
from excise.core.disk import scratch
from excise.core.errors import UserError
from excise.core.events import Emit
from excise.data.domain import Domain
from excise.models.endpoint import Endpoint, HostedModel, KeptAnswers
from excise.record import Item, MethodRun, ModelRef, Record, Verdict
from excise.record.measured import PROXY
from excise.requests.audit import AuditRun
from excise.requests.recipe import AuditSpec, EvalSpec, budget_for
from excise.run import output
from excise.run.environment import environment, now
from excise.run.results import describe, items_of, samples_of, timed
from excise.run.stages import Scored, ScoreModel

ANSWERS = "endpoints"
"""Folder of the store that holds what endpoints said, beside the stages and never in them: their
keys change with the code of excise, and an answer was paid for."""

ABOUT_ENDPOINTS = (
    "Only prompts reached these models: every score is of written answers at temperature 0, and D2 "
    "to D5 stay untested. A host may put another model, or a filter, under the same name at any "
    "time; the record speaks of the answers of the days it names."
)
"""What the record of such an audit says of itself."""


@dataclass(frozen=True)
class HostedAudit:
    """What an audit over an endpoint is about.

    Attributes:
        candidates: Names of the edited models at the endpoint, by name in the record.
        references: The same of `original` and oracles.
        domain: Rows by role, as the data has them.
        audit: How hard the models are attacked.
        evaluate: How they are scored.
        seed: Seed of everything.
    """

    candidates: Mapping[str, str]
    references: Mapping[str, str]
    domain: Domain
    audit: AuditSpec
    evaluate: EvalSpec
    seed: int

    @property
    def budget(self) -> Budget:
        """The budget, as for a large model: nobody knows how large a hosted one is."""
        return budget_for(self.audit, LARGE)

    @property
    def scored(self) -> EvalSpec:
        """How models are scored before any attack: no more rows than attacks ask, by default."""
        if "max_rows" in self.evaluate.model_fields_set:
            return self.evaluate
        return self.evaluate.model_copy(update={"max_rows": self.budget.max_test_rows})


def references_of(
    original: str, oracles: tuple[str, ...], proxies: tuple[str, ...]
) -> dict[str, str]:
    """Return the reference models of a hosted audit by their names in the record."""
    return {
        ORIGINAL: original,
        **{f"oracle-{i}": name for i, name in enumerate(oracles)},
        **{f"{PROXY}-{i}": name for i, name in enumerate(proxies)},
    }


def hosted_of(request: AuditRun) -> HostedAudit:
    """Return what a request is about, its data read."""
    return HostedAudit(
        request.candidates,
        references_of(request.original.path, request.oracles, request.proxies),
        request.build(None),
        request.audit,
        request.evaluate,
        request.seed,
    )


def audit_hosted(request: AuditRun, out: Path, *, emit: Emit, command: str = "") -> Record:
    """Attack models behind an endpoint.

    Args:
        request: Names at the endpoint, data and budget.
        out: Output folder; the store beside it keeps every answer, so that a killed audit resumes.
        emit: Sink of progress events.
        command: The command that makes this again, for the record.

    Returns:
        The record, as written to `out/run.json`.
    """
    began, started = time.monotonic(), now()
    with output.claim(out, request):
        emit("phase", {"text": "reading the data"})
        asked = hosted_of(request)
        output.write_split(out, request.domain, asked.domain)
        record, items = examine_hosted(asked, endpoint_of(request), out, emit)
        told = {
            "title": request.title or request.name,
            "command": command,
            "config": request.model_dump(mode="json"),
            "environment": environment("", "endpoint", started),
        }
        record = timed(record.model_copy(update=told), began)
        output.write(out, record, items)
    emit("done", {"out": str(out)})
    return record


def endpoint_of(request: AuditRun) -> Endpoint:
    """Return the endpoint of a request that has one."""
    assert request.endpoint is not None
    return request.endpoint


def examine_hosted(
    asked: HostedAudit, endpoint: Endpoint, out: Path, emit: Emit
) -> tuple[Record, list[Item]]:
    """Score every model, attack it and judge it.

    Args:
        asked: Models, data and budget.
        endpoint: Where the models are served.
        out: Output folder; answers are kept beside it.
        emit: Sink of progress events.

    Returns:
        The record, but for how it was made; and the score of every item.

    Raises:
        UserError: If the data has no questions, or a candidate is a reference model.
        EndpointError: If the endpoint does not answer.
    """
    domain = asked_of(asked.domain)
    models = _open(asked, endpoint, out)
    with _context(asked, emit) as ctx:
        emit("phase", {"text": f"asking {endpoint.host}"})
        scored = _scored(asked, domain, models, ctx)
        results = attack_hosted(models, domain, asked.budget, ctx, asked.audit.attacks)
    items = items_of(scored)
    scores = tuple(score for one in scored.values() for score in one.scores)
    results, verdicts = judge_all(
        list(asked.candidates), results, domain, asked.budget, scores=scores, items=items
    )
    verdicts = tuple(map(_by_prompts_alone, verdicts))
    refs = {name: _ref(name, model) for name, model in models.items()}
    record = Record(
        kind="audit",
        seeds=(asked.seed,),
        data=describe(domain),
        models=tuple(refs[name] for name in asked.references),
        method_runs=tuple(
            MethodRun(name=name, method={}, model=refs[name]) for name in asked.candidates
        ),
        scores=scores,
        samples=samples_of(scored),
        attacks=tuple(variant.entry for result in results.values() for variant in result.variants),
        verdicts=verdicts,
        sensitive=domain.sensitive,
        notes=(ABOUT_ENDPOINTS, *_silence(models)),
    )
    return record, items


def count_questions(asked: HostedAudit, endpoint: Endpoint, out: Path) -> dict[str, int]:
    """Return how many questions each model would still be asked; asks none.

    Args:
        asked: Models, data and budget.
        endpoint: Where the models are served.
        out: Output folder, beside which answers of earlier audits lie.
    """
    domain = asked_of(asked.domain)
    models = {
        name: replace(model, rehearsal=True)
        for name, model in _open(asked, endpoint, out).items()
    }  # fmt: skip
    with _context(asked, lambda *_: None) as ctx:
        _scored(asked, domain, models, ctx)
        attack_hosted(models, domain, asked.budget, ctx, asked.audit.attacks)
    return {name: model.unasked for name, model in models.items()}


def _open(asked: HostedAudit, endpoint: Endpoint, out: Path) -> dict[str, HostedModel]:
    """Return every model with what it said before; one name is one model, asked once.

    Raises:
        UserError: If a candidate is one of its own reference models.
    """
    for name, there in asked.candidates.items():
        for reference, other in asked.references.items():
            if there == other:
                raise UserError(
                    f"'{name}' and the reference model '{reference}' are both '{there}' at the "
                    "endpoint; name a candidate that differs from what it is compared with"
                )
    folder = out.parent / ".stages" / ANSWERS
    kept: dict[str, KeptAnswers] = {}
    for there in (*asked.references.values(), *asked.candidates.values()):
        if there not in kept:
            kept[there] = KeptAnswers.open(folder, endpoint, there)
    return {
        name: HostedModel(endpoint, there, kept[there])
        for name, there in {**asked.references, **asked.candidates}.items()
    }


@contextmanager
def _context(asked: HostedAudit, emit: Emit) -> Iterator[Context]:
    """Yield a context whose folder goes away: what is worth keeping are the answers."""
    with scratch() as work:
        yield Context(work=work, seed=asked.seed, emit=emit)


def _scored(
    asked: HostedAudit, domain: Domain, models: Mapping[str, HostedModel], ctx: Context
) -> dict[str, Scored]:
    """Return the scores of every model before any attack."""
    found = {}
    for name, model in models.items():
        stage = ScoreModel(Hosted(model).checkpoint, domain, asked.scored)
        stage.make(ctx)
        found[name] = stage.read(ctx.work).named(name)
    return found


def _by_prompts_alone(verdict: Verdict) -> Verdict:
    """Give the levels that no prompt decides the one reason there is, oracle or not."""
    levels = tuple(
        level
        if level.level in ("D0", "D1")
        else level.model_copy(update={"reason": f"{ONLY_PROMPTS.capitalize()}."})
        for level in verdict.levels
    )
    return verdict.model_copy(update={"levels": levels})


def _ref(name: str, model: HostedModel) -> ModelRef:
    """Return a hosted model by its name, its host and the days on which it answered."""
    first, last = model.dates
    days = first if first == last else f"{first} to {last}"
    way = ", through chat" if model.endpoint.chat else ""
    return ModelRef(name=name, source=f"{model.name} at {model.endpoint.host}{way}, asked {days}")


def _silence(models: Mapping[str, HostedModel]) -> list[str]:
    """Say which models answered with nothing, which scores as not knowing."""
    return [
        f"{name} answered {model.empty} of {len(model.used)} questions with nothing, which counts "
        "as wrong; a model that thinks before it answers may have had no room left."
        for name, model in models.items()
        if model.empty
    ]
