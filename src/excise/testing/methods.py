"""The property matrix of a method: what must hold whatever it does to a model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from excise.core.config import Config
from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.stream import collate, encode
from excise.methods.base import Method, Removal
from excise.methods.chain import Chain
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.folder import quiet
from excise.testing.toy import toy_domain, toy_start
from excise.testing.watch import assert_left_clean, assert_untouched, look, watched
from excise.train.fit import FitConfig

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox")
"""Families a method is checked on: plain, query norms, sandwich norms, fused, parallel."""

SHARE = 0.02
"""How far the padding side and the split may move the outputs, as a share of what the method did:
rounding only, since sums are taken in another order."""

Settings = Mapping[str, Any] | Callable[[str], Mapping[str, Any]]
"""Fields of the method to change: for every family alike, or by family."""

C = TypeVar("C", bound=Config)


class Killed(BaseException):
    """The process dies here, as far as the method can tell."""


@dataclass(frozen=True)
class _Case:
    """A method on one family: what every check is given.

    Attributes:
        who: Beginning of every message.
        method: The method, shortened.
        start: What it starts from.
        domain: The rows.
        root: A folder of the case's own.
    """

    who: str
    method: Method
    start: Checkpoint
    domain: Domain
    root: Path

    def context(self, name: str) -> Context:
        """Return a context that works in `root/name`."""
        work = self.root / name
        work.mkdir(exist_ok=True)
        return Context(work=work, seed=5)


def check_method(
    method: Method,
    *,
    families: Sequence[str] = FAMILIES,
    settings: Settings | None = None,
    steps: int = 3,
    domain: Domain | None = None,
) -> None:
    """Assert that a method keeps the contract on tiny random models.

    Same configuration and seed give the same bytes, whatever the global random state. The saved
    model loads, in its own dtype, with the same outputs; exactly the tensors of `Removal.changed`
    moved; ties hold. The folder it was given is untouched, no hook is left and `requires_grad` is
    as before. Padding side and micro-batch split do not matter. Killed at any of its events and
    applied again in the same folder, it ends with the same bytes.

    Args:
        method: The method. Every `FitConfig` inside it is cut to a few steps of eight rows; one
            that trains from scratch and has no `pretrain` is given a schedule.
        families: Tiny models to run on; see `excise.models.tiny.FAMILIES`.
        settings: Fields to change, such as a layer that a model of three blocks of width 32 has:
            a mapping, or a function from the family to one.
        steps: Steps of every `FitConfig`.
        domain: Rows by role, short ones; random sentences by default.

    Raises:
        AssertionError: With a sentence that says which property fails and what to do.
    """
    rows = domain or toy_domain()
    for number, family in enumerate(families):
        change = settings(family) if callable(settings) else settings or {}
        checked = shortened(type(method).model_validate({**_fields(method), **change}), steps)
        who = f"method '{getattr(method, 'name', type(method).__name__)}' on {family}"
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            root = Path(folder)
            case = _Case(who, checked, toy_start(root / "start", family), rows, root)
            _check_case(case)
            if number == 0:
                half = toy_start(root / "half", family, dtype=torch.bfloat16)
                _check_dtype(replace(case, start=half))


def _fields(config: Config) -> dict[str, Any]:
    """Return a configuration's fields, unconverted."""
    return {name: getattr(config, name) for name in type(config).model_fields}


def shortened(method: Method, steps: int) -> Method:
    """Return the method with every schedule cut to `steps` steps of eight rows."""

    def cut(fit: FitConfig) -> FitConfig:
        return fit.model_copy(
            update={"steps": steps, "batch_size": 8, "micro_size": 0, "warmup": 0, "save_every": 2}
        )

    if method.starts_from == "scratch" and getattr(method, "pretrain", "none") is None:
        schedule = Pretrain(fit=FitConfig(steps=steps, lr=1e-3, batch_size=8))
        method = method.model_copy(update={"pretrain": schedule})
    if isinstance(method, Chain):
        links = tuple(shortened(link, steps) for link in method.methods)
        method = method.model_copy(update={"methods": links})
    return map_fits(method, cut)


def map_fits(config: C, change: Callable[[FitConfig], FitConfig]) -> C:
    """Return a configuration in which every `FitConfig`, however deep, is changed."""

    def walk(value: Any) -> Any:
        if isinstance(value, FitConfig):
            return change(value)
        if isinstance(value, Config):
            return map_fits(value, change)
        if isinstance(value, tuple):
            return tuple(walk(item) for item in value)
        return value

    old = _fields(config)
    new = {name: walk(value) for name, value in old.items()}
    moved = {name: value for name, value in new.items() if value != old[name]}
    return config.model_copy(update=moved) if moved else config


def _check_case(case: _Case) -> None:
    """Run every check of one family."""
    before = look(case.start.path)
    start = watched(case.start)
    events: list[str] = []
    ctx = replace(case.context("one"), emit=lambda kind, data: events.append(kind))
    torch.manual_seed(1)
    removal = case.method.apply(start, case.domain, ctx)
    assert_untouched(before, case.start.path, case.who)
    assert_left_clean(start.seen, case.who)
    _check_result(case, removal, ctx)
    _check_moved(case, removal)
    _check_loads(case, removal)
    _check_again(case, removal)
    _check_resumed(case, removal, len(events))
    _check_padding(case, removal)
    _check_split(case, removal)


def _check_result(case: _Case, removal: Removal, ctx: Context) -> None:
    """Assert that what came back is what a run can keep."""
    who, path = case.who, removal.checkpoint.path
    assert ctx.work in path.parents, f"{who} wrote its model to {path}; write it under ctx.work"
    if not isinstance(case.method, Chain):
        assert path == ctx.work / "model", (
            f"{who} wrote its model to {path.name}; a run looks for it in ctx.work / 'model'"
        )
    try:
        json.dumps(dict(removal.extras))
    except TypeError as error:
        raise AssertionError(f"{who}: Removal.extras cannot be written as JSON: {error}") from None
    for name, file in removal.extras.get("files", {}).items():
        assert not Path(file).is_absolute(), (
            f"{who}: extras['files']['{name}'] is absolute; the folder moves, name it relative "
            "to ctx.work"
        )
        assert (ctx.work / file).exists(), f"{who}: extras['files']['{name}'] names no file"


def _check_moved(case: _Case, removal: Removal) -> None:
    """Assert that exactly the declared tensors moved, and that shapes, dtypes and ties are kept."""
    who, start, edited = case.who, case.start, removal.checkpoint
    kept = {key: (entry.code, entry.shape) for key, entry in start.entries.items()}
    now = {key: (entry.code, entry.shape) for key, entry in edited.entries.items()}
    odd = sorted(key for key in kept.keys() | now.keys() if kept.get(key) != now.get(key))
    assert not odd, (
        f"{who}: tensor '{odd[0]}' was {kept.get(odd[0])} on disk and is {now.get(odd[0])}; "
        "write with start.write(changed, to), which keeps names, dtypes and ties"
    )
    names = start.parameter_names()
    stranger = sorted(set(removal.changed) - set(names))
    assert not stranger, (
        f"{who}: Removal.changed names '{stranger[0]}', which named_parameters() does not give"
    )
    old, new = start.weights_of(names), edited.weights_of(names)
    moved = {name for name in names if not _same_bits(old[name], new[name])}
    silent = sorted(moved - set(removal.changed))
    assert not silent, f"{who} moved '{silent[0]}' without naming it in Removal.changed"
    still = sorted(set(removal.changed) - moved)
    assert not still, f"{who} names '{still[0]}' in Removal.changed, but it did not move"
    before, after = _ties(start), _ties(edited)
    assert before == after, f"{who}: tied parameters were {before} and are {after}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _ties(checkpoint: Checkpoint) -> list[list[str]]:
    """Return the groups of names that share one parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in checkpoint.load().named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(sorted(names) for names in groups.values() if len(names) > 1)


@torch.no_grad()
def outputs(checkpoint: Checkpoint, domain: Domain, model: Any = None) -> Tensor:
    """Return the logits of a checkpoint on a few rows, at every scored token."""
    tokenizer = checkpoint.tokenizer()
    rows = [*next(iter(domain.test.values()))[:3], *domain.retain_test[:3]]
    batch = collate(encode(rows, tokenizer, max_length=32), pad_id=tokenizer.pad_token_id)
    live = checkpoint.load() if model is None else model
    logits: Tensor = live(**batch.inputs).logits
    return logits[batch.attention_BT].float()


def _check_loads(case: _Case, removal: Removal) -> None:
    """Assert that the model loads as anybody would load it, and survives being saved again."""
    from transformers import AutoModelForCausalLM

    who, edited = case.who, removal.checkpoint
    first = outputs(edited, case.domain)
    assert bool(first.isfinite().all()), f"{who}: the saved model's outputs are not finite"
    with quiet():
        plain = AutoModelForCausalLM.from_pretrained(edited.path, local_files_only=True).eval()
    again = save_model(edited.load(), edited.tokenizer(), case.root / "again")
    for what, other in (
        ("from_pretrained", outputs(edited, case.domain, plain)),
        ("saving it again", outputs(again, case.domain)),
    ):
        assert torch.equal(first, other), f"{who}: {what} gives other outputs than the saved model"


def _check_again(case: _Case, removal: Removal) -> None:
    """Assert that the same seed gives the same bytes, whatever was drawn before."""
    torch.manual_seed(2)
    other = case.method.apply(case.start, case.domain, case.context("two"))
    assert other.checkpoint.fingerprint == removal.checkpoint.fingerprint, (
        f"{case.who}: the same configuration and seed gave other weights; draw from "
        "ctx.generator(purpose), never from the global random state"
    )


def _check_resumed(case: _Case, removal: Removal, events: int) -> None:
    """Assert that a method killed early and late, in one folder, ends with the same bytes."""
    ctx = case.context("killed")
    for last in sorted({max(1, events // 2), events} if events else set()):
        steps = 0

        def die(kind: str, data: Mapping[str, Any], last: int = last) -> None:
            nonlocal steps
            steps += 1
            if steps >= last:
                raise Killed

        torch.manual_seed(3)
        with suppress(Killed):
            _go_on(case, replace(ctx, emit=die))
    torch.manual_seed(4)
    done = _go_on(case, ctx)
    assert done.checkpoint.fingerprint == removal.checkpoint.fingerprint, (
        f"{case.who}: killed and applied again in the same ctx.work it gives other weights; "
        "everything a step needs must follow from its number, and fit needs state_dir"
    )
    assert done.changed == removal.changed, f"{case.who}: resumed, it names other tensors"


def _go_on(case: _Case, ctx: Context) -> Removal:
    """Apply the method in a folder where it may have been killed before."""
    try:
        return case.method.apply(case.start, case.domain, ctx)
    except Exception as error:
        raise AssertionError(
            f"{case.who}: killed and applied again in the same ctx.work it fails: {error!r}"
        ) from error


def _check_padding(case: _Case, removal: Removal) -> None:
    """Assert that a tokenizer that pads on the left gives the same model."""
    start = watched(case.start, padding_side="left")
    other = case.method.apply(start, case.domain, case.context("left"))
    _assert_close(case, removal, other, "the padding side", "mask padding and pass position_ids")


def _check_split(case: _Case, removal: Removal) -> None:
    """Assert that micro-batches give the same model, where the method says nothing else.

    One without a `FitConfig` has none, and of one with `whole_batch` they change the objective.
    """
    halves = map_fits(case.method, lambda fit: fit.model_copy(update={"micro_size": 4}))
    if halves == case.method or case.method.whole_batch:
        return
    other = halves.apply(case.start, case.domain, case.context("split"))
    _assert_close(
        case,
        removal,
        other,
        "cutting a batch into micro-batches",
        "return sums and counts of tokens as Term, never means",
    )


def _assert_close(case: _Case, one: Removal, two: Removal, what: str, fix: str) -> None:
    """Assert that two results answer alike, up to rounding."""
    start = outputs(case.start, case.domain)
    a, b = outputs(one.checkpoint, case.domain), outputs(two.checkpoint, case.domain)
    done, off = float((a - start).abs().max()), float((a - b).abs().max())
    assert off <= SHARE * done + 1e-5, (
        f"{case.who}: {what} moves the outputs by {off:.2g} (the method moves them by {done:.2g});"
        f" {fix}"
    )


def _check_dtype(case: _Case) -> None:
    """Assert that a model stored in bfloat16 stays one."""
    removal = case.method.apply(watched(case.start), case.domain, case.context("bfloat16"))
    _check_moved(replace(case, who=f"{case.who} in bfloat16"), removal)
