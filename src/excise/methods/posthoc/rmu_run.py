"""One run of RMU: load what is needed, train, write what changed.

Shape legend: D residual width.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.data.stream import Batch
from excise.methods.base import Removal
from excise.methods.posthoc.rmu_cache import PrefixCache
from excise.methods.posthoc.rmu_data import (
    alternate,
    control_vector,
    per_topic,
    read_controls,
    topics_of,
)
from excise.methods.posthoc.rmu_engine import Engine, Full, Span, swapped
from excise.methods.posthoc.rmu_places import Places, find_places, sliced
from excise.methods.tuning import Progress, finish, run_fit, state_dir, tuned
from excise.models.checkpoint import Checkpoint
from excise.models.delta import write_delta
from excise.models.lora import reference
from excise.train.fit import Term, fit

if TYPE_CHECKING:
    from excise.methods.posthoc.rmu import RMU

Micros = Callable[[int], list[dict[str, Batch]]]
CONTROLS = "control_vectors.safetensors"


@dataclass
class Loaded:
    """A model with its trained parameters, and the original inside it.

    Attributes:
        net: The model to run, wrapped when there is an adapter.
        parameters: Trained parameters by name.
        saved: Copies of them as they were; empty with an adapter.
        restored: Context in which `net` is the original.
    """

    net: nn.Module
    parameters: Mapping[str, nn.Parameter]
    saved: Mapping[str, Tensor]
    restored: Callable[[], AbstractContextManager[object]]


def places_of(method: RMU, start: Checkpoint) -> Places:
    """Return what a run trains; see `find_places`.

    Raises:
        UserError: As `find_places`, or when a slice would not stay alone.
    """
    places = find_places(
        start,
        method.layer,
        blocks=method.blocks,
        modules=method.modules,
        matrix=method.matrix,
        experts=method.experts if method.lora is None else "all",
    )
    if places.slices and method.fit.weight_decay:
        raise UserError(
            f"rmu: weight decay would reach beyond the trained part of '{places.printed[0]}'; "
            "set fit.weight_decay to 0 or experts to 'all'"
        )
    return places


@contextmanager
def opened(method: RMU, model: nn.Module, places: Places, ctx: Context) -> Iterator[Loaded]:
    """Let the chosen tensors, or an adapter on their modules, be trained while the block runs."""
    names = places.names
    if method.lora is not None:
        names = tuple(name.removesuffix(".weight") for name in names)
    with ExitStack() as stack:
        net, parameters = stack.enter_context(tuned(model, names, method.lora, ctx))
        if method.lora is not None:
            yield Loaded(net, parameters, {}, partial(reference, net))
            return
        stack.enter_context(sliced(parameters, places.slices))
        saved = {name: p.detach().clone() for name, p in parameters.items()}
        yield Loaded(net, parameters, saved, partial(swapped, parameters, saved))


def make_engine(
    method: RMU,
    start: Checkpoint,
    loaded: Loaded,
    places: Places,
    ctx: Context,
    *,
    cache: PrefixCache | None = None,
    upto: int = 0,
) -> Engine:
    """Return the engine a method asks for."""
    if method.engine == "full":
        if method.lora is not None:
            return Full(loaded.net, loaded.net, places.at, method.inputs, loaded.restored)
        frozen: nn.Module = start.load(dtype=ctx.dtype, device=ctx.device)
        return Full(loaded.net, frozen, places.at, method.inputs, torch.no_grad)
    if cache is None:
        cache = PrefixCache(int(method.cache_gib * 2**30) if method.engine == "cached" else 0)
    return Span(loaded.net, places, method.inputs, loaded.restored, cache, upto)


def make_controls(
    method: RMU, topics: list[str], engine: Engine, batches: Micros, width: int, ctx: Context
) -> dict[str, Float[Tensor, " D"]]:
    """Return the control vector of every topic.

    The first batch of every topic is looked at before anything is trained, for the norms that
    `adaptive` needs and to refuse a model that puts out NaN.
    """
    steering = per_topic(method.steering, topics, "steering")
    if method.controls:
        controls = read_controls(method.controls, topics, width)
    else:
        controls = {t: steering[t] * control_vector(width, t, ctx) for t in topics}
    for i, topic in enumerate(topics if method.adaptive else topics[:1]):
        batch = batches(i)[0][topic].to(ctx.device)
        with torch.no_grad():
            hidden_BTD = engine.current(batch)
        refuse_nan(hidden_BTD, method.layer)
        if method.adaptive:
            norm_BT = hidden_BTD.float().norm(dim=-1)
            controls[topic] *= float(norm_BT[method.mask(batch)].mean())
    return controls


def train(
    method: RMU,
    loaded: Loaded,
    engine: Engine,
    controls: Mapping[str, Tensor],
    batches: Micros,
    progress: Progress,
    ctx: Context,
    *,
    state: str = "",
) -> None:
    """Run the loop."""
    alpha = per_topic(method.alpha, list(controls), "alpha")

    def loss(_net: nn.Module, micro: Mapping[str, Batch]) -> dict[str, Term]:
        return method.terms(engine, micro, controls, alpha)

    def counts(micro: Mapping[str, Batch]) -> dict[str, float]:
        topic = next(role for role in micro if role != "retain")
        width = next(iter(controls.values())).numel()
        pairs = (("forget", micro[topic]), ("retain", micro["retain"]))
        if not method.masked and method.fit.micro_size == 0:
            return {term: 1.0 for term, _ in pairs}
        return {term: float(method.mask(batch).sum()) * width for term, batch in pairs}

    folder = state_dir(ctx) / state if state else state_dir(ctx)
    steps = fit(
        loaded.net, batches, loss, method.fit, ctx,
        groups={"trained": list(loaded.parameters.values())}, counts=counts, state_dir=folder,
    )  # fmt: skip
    run_fit(steps, progress)


def run(method: RMU, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
    """Train and write; `RMU.apply` without a sweep."""
    places = places_of(method, start)
    topics = topics_of(domain)
    ctx.emit("note", {"text": f"rmu trains {', '.join(places.printed)}"})
    if method.engine == "full":
        model: Any = start.load(dtype=ctx.dtype, device=ctx.device)
    else:
        model = start.load_prefix(method.layer + 1, dtype=ctx.dtype, device=ctx.device)
    batches = alternate(method, topics, domain, start.tokenizer(), ctx)
    progress = Progress(ctx, method.name, method.fit.steps)
    with opened(method, model, places, ctx) as loaded:
        engine = make_engine(method, start, loaded, places, ctx)
        width = places.parts.d_model
        controls = make_controls(method, topics, engine, batches, width, ctx)
        save_file(dict(controls), str(ctx.work / CONTROLS))
        train(method, loaded, engine, controls, batches, progress, ctx)
        extras = facts(method, start, places, loaded, engine, controls)
        return close(method, start, loaded, places, progress, ctx, extras)


def close(
    method: RMU,
    start: Checkpoint,
    loaded: Loaded,
    places: Places,
    progress: Progress,
    ctx: Context,
    extras: Mapping[str, Any],
) -> Removal:
    """Write the edited checkpoint, and the changed tensors by themselves if asked for."""
    removal = finish(
        start, loaded.net, loaded.parameters, progress, ctx,
        lora=method.lora, extras=extras, flops_per_token=flops_per_token(method, places, start),
    )  # fmt: skip
    known: Any = removal.extras
    if places.slices:
        known["share_moved"] *= places.whole / places.entries
        known["trained_entries"] = places.entries
    if method.keep == "delta":
        write_delta(start, removal.checkpoint.weights_of(removal.changed), ctx.work / "delta")
        known["files"] = {**known["files"], "delta": "delta"}
    return removal


def facts(
    method: RMU,
    start: Checkpoint,
    places: Places,
    loaded: Loaded,
    engine: Engine,
    controls: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Return what the record keeps of a run."""
    reference_bytes = sum(t.numel() * t.element_size() for t in loaded.saved.values())
    whole = start.num_parameters * next(iter(loaded.parameters.values())).element_size()
    if method.engine == "full" and method.lora is None:
        reference_bytes = whole
    found: dict[str, Any] = {
        "hidden_at": places.at,
        "modules": list(places.printed),
        "engine": method.engine,
        "steering_norm": {topic: float(c.norm()) for topic, c in controls.items()},
        "optimizer": method.fit.optimizer,
        "master": method.fit.master,
        "compute_dtype": str(next(loaded.net.parameters()).dtype).removeprefix("torch."),
        "reference_bytes": reference_bytes,
        "reference_share": reference_bytes / whole,
        "bytes_read": start.bytes_read,
        "files": {"control_vectors": CONTROLS},
    }
    if isinstance(engine, Span):
        cache = engine.cache
        found["cache"] = {"bytes": cache.num_bytes, "hits": cache.hits, "misses": cache.misses}
    return found


def flops_per_token(method: RMU, places: Places, start: Checkpoint) -> float:
    """Estimate FLOPs per token read, half of the tokens being retain text.

    Forward costs 2 per weight; retain text passes the frozen model too. Backward costs 2 per
    weight above the first trained block and 2 per trained weight.
    """
    sizes = [0] * places.parts.num_blocks
    for name, p in start.layout.model.named_parameters():
        for i, block in enumerate(places.parts.blocks):
            if name.startswith(block + "."):
                sizes[i] += p.numel()
    tail = sum(sizes[places.first : method.layer + 1])
    backward = 2.0 * tail + 2.0 * places.entries
    if method.engine == "full":
        return 1.5 * 2.0 * start.num_parameters + backward
    prefix = 0 if method.engine == "cached" else sum(sizes[: places.first])
    return 2.0 * prefix + 1.5 * 2.0 * tail + backward


def refuse_nan(hidden_BTD: Float[Tensor, "B T D"], layer: int) -> None:
    """Raise UserError if activations are not finite before anything was trained."""
    if not bool(torch.isfinite(hidden_BTD).all()):
        raise UserError(
            f"rmu: block {layer} puts out NaN or infinity on the first batch, in "
            f"{str(hidden_BTD.dtype).removeprefix('torch.')}; check the model's weights, or run "
            "it in float32"
        )


def replace_model(start: Checkpoint, ctx: Context) -> Path:
    """Return the folder of the edited model, after removing what a killed call left there."""
    to = ctx.work / "model"
    if to.exists() and to != start.path:
        shutil.rmtree(to)
    return to
