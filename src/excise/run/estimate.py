"""What a removal or an audit would do and cost, before anything starts: steps, memory, time.

The data is read as the run reads it and its rows are tokenized; of models, configuration and
headers are enough. Times follow from operations and an assumed speed, until `measure` has timed
steps on the model and the machine themselves.
"""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from excise.auditor.base import Attack, name_of
from excise.auditor.budget import LARGE, Budget
from excise.auditor.controls.control import CHUNK, CHUNK_LARGE
from excise.auditor.controls.lock import STEPS, STEPS_LARGE
from excise.auditor.engine import FOR_THE_SLOW, chosen_attacks
from excise.auditor.evaluation_set import EvaluationSet, evaluation_set
from excise.auditor.tuning import (
    Training,
    TrainingAttack,
    possible,
    relearn_rows,
)
from excise.core.config import Config
from excise.core.disk import expand
from excise.core.errors import UserError
from excise.core.events import Emit, duration, silent
from excise.data.domain import Domain, Rows, all_rows
from excise.data.mix import in_texts
from excise.data.stream import Tokenizer, encode_row
from excise.data.subsample import subsample
from excise.fetch.model import outline_of
from excise.methods.base import Method, PostHoc, completed
from excise.methods.chain import Chain
from excise.methods.importance import ImportanceMethod
from excise.methods.posthoc.rmu import RMU
from excise.methods.pretraining.plain import Plain
from excise.models.anatomy import backbone
from excise.models.checkpoint import Checkpoint
from excise.models.folder import meta_model
from excise.models.hooks import trainable
from excise.models.lora import LoRA, adapter_size, holds_adapter, linears_in_4bit, on_modules
from excise.models.spec import ModelSpec, Scratch
from excise.models.tiny import tiny_config
from excise.requests.audit import AuditRun
from excise.requests.lengths import fit_lengths
from excise.requests.recipe import Recipe, budget_for, starts_from
from excise.requests.rows import check_rows
from excise.run.canary import teaching
from excise.run.devices import fitting_workers, gib, worker_devices
from excise.run.environment import device_of
from excise.run.steps import scratch_tokenizer
from excise.train.fit import FitConfig

CPU_FLOPS = (3e10, 3e11)
"""Range of FLOP/s of one thread, where nothing was measured. Four recipes from 0.16M to 135M
parameters gave 1.4e11 to 1.7e11 on an AMD EPYC with AVX-512."""
GPU_FLOPS = (5e12, 3e14)
"""The same for one accelerator in bf16."""

SAMPLE = 256
"""Rows of a set that are tokenized to know their lengths: all, or so many evenly spaced ones."""


@dataclass(frozen=True)
class Pace:
    """How fast one kind of work goes.

    Attributes:
        low: Seconds per operation at the fastest.
        high: The same at the slowest.
        fixed: Seconds that every job of the kind takes beside: loading, first step, writing.
    """

    low: float
    high: float
    fixed: float = 0.0


@dataclass(frozen=True)
class Line:
    """One kind of work.

    Attributes:
        name: What it is to a reader.
        steps: Optimizer steps of one job; 0 for scoring.
        jobs: How often it is done.
        tokens: Tokens of all jobs, without padding.
        flops: Operations of all jobs, padding included; None where the model is not known yet.
        pace: Kind of work whose measured pace tells its time.
    """

    name: str
    steps: int
    jobs: int
    tokens: float
    flops: float | None
    pace: str


@dataclass(frozen=True)
class Plan:
    """The estimate.

    Attributes:
        name: Recipe or request.
        parameters: Size of the model; None when it is not known yet.
        lines: What is trained and scored.
        memory: Bytes of memory per worker at the peak; None when not known yet.
        disk: Bytes written; None when not known yet.
        out: Output folder.
        assumed: Pace of what was not measured.
        paces: Measured pace by kind of work; empty where nothing was measured.
        notes: What a reader must know: what is missing, what is not counted.
        domain: The rows by role, where the data was read.
        tokenizer: The model's tokenizer, where it has one.
        device: Where models run.
    """

    name: str
    parameters: int | None
    lines: tuple[Line, ...]
    memory: float | None
    disk: float | None
    out: Path
    assumed: Pace
    paces: Mapping[str, Pace] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    domain: Domain | None = None
    tokenizer: Tokenizer = None
    device: str = "cpu"

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Range of the time on one worker; None when not known yet."""
        low = high = 0.0
        for line in self.lines:
            if line.flops is None:
                return None
            pace = self.paces.get(line.pace) or self.paces.get(FULL) or self.assumed
            low += line.jobs * pace.fixed + line.flops * pace.low
            high += 1.5 * line.jobs * pace.fixed + line.flops * pace.high
        return low, high

    def text(self) -> str:
        """Return the estimate as lines for a terminal of 80 columns."""
        width = max([4, *(len(line.name) for line in self.lines)])
        rows = [f"{'what':<{width}}  {'steps':>7}  {'times':>6}  {'tokens':>13}  {'FLOPs':>8}"]
        for line in self.lines:
            steps = f"{line.steps:,}" if line.steps else "-"
            flops = f"{line.flops:.1e}" if line.flops is not None else "unknown"
            rows.append(
                f"{line.name:<{width}}  {steps:>7}  {line.jobs:>6,}  {line.tokens:>13,.0f}"
                f"  {flops:>8}"
            )
        rows.append("")
        facts = {
            "parameters": "unknown" if self.parameters is None else f"{self.parameters:,}",
            "memory": "unknown"
            if self.memory is None
            else f"about {gib(self.memory)} per worker, activations included",
            "disk": f"unknown, under {self.out}"
            if self.disk is None
            else f"about {gib(self.disk)} under {self.out}",
            "time": self._time(),
        }
        for name, fact in facts.items():
            rows += textwrap.wrap(f"{name:<12}{fact}", 79, subsequent_indent=" " * 12)
        for note in self.notes:
            rows += textwrap.wrap(f"{'note':<12}{note}", 79, subsequent_indent=" " * 12)
        return "\n".join(rows)

    def _time(self) -> str:
        """Return the range of the time, and where it comes from."""
        if self.seconds is None:
            return "unknown"
        span = f"{duration(self.seconds[0])} to {duration(self.seconds[1])} on one worker"
        if self.paces:
            return f"{span}; measured here, by three steps of each kind of work"
        speeds = f"{1 / self.assumed.high:.0e} to {1 / self.assumed.low:.0e} FLOP/s"
        return (
            f"{span}; not measured, but from FLOPs and an assumed speed of {speeds} "
            "(--measure times three steps)"
        )

    def admit(self, workers: int, emit: Emit, *, force: bool) -> int:
        """Return how many workers start, or refuse what cannot fit.

        Args:
            workers: How many are asked for; 0 for one a device or a core, as far as they fit.
            emit: Gets a note where not every core has a worker.
            force: Whether the user insists.

        Raises:
            UserError: If memory or disk is too small by this estimate.
        """
        if force or self.memory is None or self.disk is None:
            return workers
        fit = fitting_workers(self.device, workers, self.memory)
        wanted = len(worker_devices(self.device, workers))
        if fit < wanted:
            text = f"{fit} of {wanted} workers start, at about {gib(self.memory)} of memory each"
            emit("note", {"text": text})
        self.check_disk(force=force)
        return fit

    def check_disk(self, *, force: bool) -> None:
        """Refuse what does not fit on the disk.

        Args:
            force: Whether the user insists.

        Raises:
            UserError: If it is too small by this estimate.
        """
        if force or self.disk is None:
            return
        free = shutil.disk_usage(existing(self.out)).free
        if self.disk > free:
            raise UserError(
                f"needs about {gib(self.disk)} of disk under {self.out} and {gib(free)} is free; "
                "choose another --out, or --force to try"
            )


def existing(out: Path) -> Path:
    """Return the nearest folder that exists, from an output folder upwards."""
    return next(path for path in (out, *out.absolute().parents) if path.is_dir())


FULL, ADAPTER = "training all parameters", "training an adapter"
SCORING, ON_THE_WAY = "scoring", "scoring a model that is in memory"
"""Kinds of work of an audit; every method run is a kind of its own."""


@dataclass(frozen=True)
class DataSizes:
    """What the lines are computed from.

    Attributes:
        count: Parameters of the model; None when not known.
        tokenizer: The model's; None where it has none yet, and every row counts as its limit.
        domain: Rows by role; None where the data was not read.
    """

    count: int | None
    tokenizer: Tokenizer
    domain: Domain | None
    lengths: dict[Rows, list[tuple[int, int]]] = field(default_factory=dict)

    def tokens(self, rows: Rows, limit: int, batch: int) -> tuple[float, float]:
        """Return the mean tokens of a row, without padding and padded to the longest of a batch.

        The longest of `batch` rows is its expectation over draws from the sample.
        """
        if self.tokenizer is None or not rows:
            return float(limit), float(limit)
        sizes = sorted(min(size, limit) for size, _ in self._sampled(rows))
        n = len(sizes)
        chance = [((i + 1) / n) ** batch - (i / n) ** batch for i in range(n)]
        return sum(sizes) / n, sum(c * size for c, size in zip(chance, sizes, strict=True))

    def scored(self, rows: Rows, limit: int) -> float:
        """Return the tokens of scoring rows: a question is read once for every choice."""
        if self.tokenizer is None or not rows:
            return float(len(rows) * limit)
        sampled = self._sampled(rows)
        return len(rows) * sum(min(size, limit) * k for size, k in sampled) / len(sampled)

    def _sampled(self, rows: Rows) -> list[tuple[int, int]]:
        """Return tokens and number of choices of a sample of rows."""
        if rows not in self.lengths:
            picked = rows[:: math.ceil(len(rows) / SAMPLE)]
            self.lengths[rows] = [
                (
                    len(encode_row(row, self.tokenizer, max_length=1 << 30).ids),
                    max(1, len(row.choices)),
                )
                for row in picked
            ]
        return self.lengths[rows]

    def flops(self, per_parameter: float, tokens: float) -> float | None:
        """Return the operations of tokens; None where the model is not known."""
        return None if self.count is None else per_parameter * self.count * tokens


def plan(
    request: Recipe | AuditRun,
    out: Path,
    *,
    rows: bool = True,
    emit: Emit = silent,
) -> Plan:
    """Estimate a removal or an audit; trains nothing.

    Args:
        request: What would be run.
        out: Output folder.
        rows: Whether to read the data and count its tokens; without it every row counts as the
            longest that is allowed.
        emit: Sink of progress events.

    Raises:
        UserError: If the run would refuse its model or its data, as far as can be seen without
            reading weights.
    """
    if isinstance(request, AuditRun) and request.endpoint is not None:
        raise UserError(
            "models behind an endpoint take no compute here; excise audit --endpoint URL --dry-run "
            "counts the questions they would be asked"
        )
    with ExitStack() as stack:
        emit("phase", {"text": "reading configurations of the models"})
        spec = request.model if isinstance(request, Recipe) else request.original
        original = None if spec.scratch else stack.enter_context(outline_of(spec))
        others = _other_models(request)
        for path in others:
            if not holds_adapter(expand(path)):  # one is as large as its original
                stack.enter_context(outline_of(ModelSpec(path=path)))
        cut: list[str] = []
        request = fit_lengths(request, lambda _, data: cut.append(data["text"]))
        domain = None
        if rows:
            emit("phase", {"text": "reading the data"})
            build = request.build if isinstance(request, AuditRun) else request.domain.build
            domain = build(original)
        tokenizer = None
        if spec.scratch is not None:
            tokenizer = scratch_tokenizer(spec, request.domain) if rows else None
        elif original is not None and original.tokenizer_files:
            tokenizer = original.tokenizer()
        said: tuple[str, ...] = ()
        if domain is not None:
            emit("phase", {"text": "checking rows and labels"})
            said = check_rows(request, domain, tokenizer)
        emit("phase", {"text": "counting tokens"})
        shapes: Any = (
            _shapes(spec.scratch, tokenizer) if spec.scratch else original and original.shapes
        )
        count = None if shapes is None else sum(p.numel() for p in shapes.parameters())
        sizes = DataSizes(count, tokenizer, domain)
        lines = tuple(_lines(request, sizes))
        width = 2 if request.dtype == "bfloat16" else 4
        arms = _arms(request)
        methods = [link for arm in arms.values() for link in links(arm) if shapes is not None]
        device = device_of(request.device)
        needs = [
            _memory(
                method, original, shapes, width, _activations(method, shapes, sizes, width), device
            )
            for method in methods
        ]
        if count is not None and (request.audit.budget != "none" or spec.scratch):
            # Activations of eight rows, by experience.
            needs.append(_training_memory(count, count, width) + 2**23 * max(1, count // 10**7))
        models = len(arms)
        if isinstance(request, AuditRun) and request.canary is not None:
            models += 1 + request.canary.num_oracles(request.audit.budget)
        if spec.scratch is not None and isinstance(request, Recipe):
            models += 1 + request.oracles
        slow, fast = GPU_FLOPS if device.startswith("cuda") else CPU_FLOPS
        return Plan(
            request.name,
            count,
            lines,
            max(needs, default=None),
            None
            if count is None
            else (models + _kept(request) + _controls(request, count)) * count * width + 2**24,
            out,
            Pace(1 / fast, 1 / slow),
            notes=(*cut, *said, *_notes(request, spec, original, sizes, rows)),
            domain=domain,
            tokenizer=tokenizer,
            device=device,
        )


def _kept(request: Recipe | AuditRun) -> int:
    """Return how many models lie in the output folder beside the store, a delta as one at most."""
    each = {"none": 0, "all": 2}.get(getattr(request, "keep", "best"), 1)
    return each * len(_arms(request))


def _arms(request: Recipe | AuditRun) -> Mapping[str, Method]:
    """Return the removals by name, those of canaries among them."""
    if isinstance(request, Recipe):
        return request.arms
    return request.canary.arms if request.canary is not None else {}


def _other_models(request: Recipe | AuditRun) -> tuple[str, ...]:
    """Return the models beside the original that must be there."""
    if isinstance(request, Recipe):
        return ()
    return (*request.candidates.values(), *request.oracles, *request.proxies)


def _shapes(scratch: Scratch, tokenizer: Tokenizer) -> Any:
    """Return a model that would be trained from scratch, on the meta device."""
    more: dict[str, Any] = dict(scratch.overrides)
    if tokenizer is not None:
        more = {"vocab": len(tokenizer), **more}
    return meta_model(
        tiny_config(scratch.family, width=scratch.width, blocks=scratch.blocks, **more)
    )


def _notes(
    request: Recipe | AuditRun,
    spec: ModelSpec,
    original: Checkpoint | None,
    sizes: DataSizes,
    read_rows: bool,
) -> Iterator[str]:
    """Yield what a reader must know about the numbers."""
    if spec.scratch is None and original is None:
        yield (
            f"the model '{spec.path}' is not here yet, so its cost is unknown; run: "
            f"excise fetch {spec.path}"
        )
    elif original is not None and not original.has_weights:
        yield "shapes are those of the configuration; no weights were read"
    if read_rows and sizes.tokenizer is None:
        yield "there is no tokenizer here, so every row counts as the longest that is allowed"
    elif sizes.lengths:
        yield (
            f"rows were tokenized, of each set all or {SAMPLE} evenly spaced ones; FLOPs include "
            "padding"
        )
    if request.evaluate.lm_eval:
        yield "tasks of lm-eval are not counted"
    if request.audit.budget != "none":
        yield "further trainings of a model that resists every one of an attack are not counted"
        doublings = budget_for(request.audit, sizes.count or LARGE).doublings
        if doublings:
            yield (
                "an attack that trains and does not undo its positive control takes up to "
                f"{2**doublings} times the steps, relearning of a candidate that falls behind the "
                f"oracles {2 ** min(doublings, FOR_THE_SLOW)} times those; neither is counted"
            )


LIBRARIES = 2**29
"""Bytes of a process that has loaded what it needs and no model yet."""


def _memory(
    method: Method,
    original: Checkpoint | None,
    shapes: Any,
    width: int,
    activations: float = 0.0,
    device: str = "cpu",
) -> float:
    """Return the bytes that a method holds at its peak, with activations of so many bytes.

    A base in 4 bits waits on the CPU: there it lies beside what is packed, elsewhere in its place.
    """
    count = sum(p.numel() for p in shapes.parameters())
    if isinstance(method, ImportanceMethod):  # gradients go into files, tensor by tensor
        largest = max(int(p.numel()) for p in shapes.parameters())
        return float(LIBRARIES + count * width + 3 * 4 * largest + activations)
    trained = loaded = count
    net = shapes
    if isinstance(method, PostHoc) and next(_schedules(method), None) is None:
        trained = 0  # closed forms hold weights alone
    named: tuple[str, ...] = getattr(method, "modules", ())
    if isinstance(method, RMU) and original is not None:
        # All settings of a sweep are looked up, so that one that does not fit is refused here.
        targets, *_ = [point.target_parameters(original) for point in method.points()]
        trained, named = targets.entries, targets.names
        if method.engine == "full":
            loaded = 2 * count if method.lora is None else count
        else:
            net = original.prefix_shapes(method.layer + 1)
            loaded = sum(p.numel() for p in net.parameters())
    elif named:
        with trainable(shapes, method.modules) as parameters:  # type: ignore[attr-defined]
            trained = sum(p.numel() for p in parameters.values())
    lora = getattr(method, "lora", None)
    if isinstance(lora, LoRA):
        trained = adapter_size(shapes, on_modules(lora, named))
    fits = [fit for fit, *_ in _schedules(method)] or [FitConfig()]
    largest = max(int(p.numel()) for p in shapes.parameters())
    if len(_roles(method)) > 1:
        largest = trained  # the gradient of one role waits, whole, for that of the other
    held = max(
        _training_memory(trained, loaded, width, method.extra_copies, fit, largest) for fit in fits
    )
    # An adapter is merged into a second copy of the weights, when activations are gone.
    merging = LIBRARIES + 2.0 * loaded * width if isinstance(lora, LoRA) else 0.0
    if isinstance(lora, LoRA) and lora.load_in_4bit:
        packed = [linear.weight.numel() for linear in linears_in_4bit(net)]
        beside = IN_4BIT * sum(packed)
        if device.startswith("cpu"):
            merging += beside
        else:  # where originals lie; the model is whole before and after, but for one layer
            beside -= width * sum(packed)
            merging = LIBRARIES + float(width * (loaded + max(packed)))
        held += beside + width * max(packed)  # the layer that computes is there unpacked
    return max(held + activations, merging)


IN_4BIT = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes of a weight in NF4: 4 bits, a scale of 8 bits for 64 of them, and one of 32 for 256 scales
(Dettmers et al. 2023, arXiv:2305.14314)."""
MOMENTS = {"sgd": 0.0, "adamw_8bit": 2 + 2 * 4 / 256}
"""Bytes that an optimizer remembers of a number it steps; 8 where two are kept in float32."""


def _training_memory(
    trained: int,
    loaded: int,
    width: int,
    more: int = 0,
    fit: FitConfig | None = None,
    largest: int = 0,
) -> float:
    """Return the bytes of weights, master weights, gradients and moments.

    Args:
        trained: Numbers that are stepped.
        loaded: Numbers of the models in memory.
        width: Bytes of one of those.
        more: Copies in float32 of what is trained that a method keeps beside.
        fit: Its optimizer, and whether it steps in the backward pass; AdamW by default.
        largest: Numbers whose gradients are there at once then: of the largest tensor.
    """
    fit = fit or FitConfig()
    masters = 4 if width < 4 and fit.master == "float32" else 0
    wide = 4 if masters else width
    gradients = min(trained, largest) if fit.in_backward else trained
    # A half-precision gradient is there beside the one it is added to, tensor by tensor.
    kept = trained * (masters + MOMENTS.get(fit.optimizer, 8.0) + 4 * more)
    return LIBRARIES + loaded * width + kept + gradients * wide


def _activations(method: Method, shapes: Any, sizes: DataSizes, width: int) -> float:
    """Return the bytes that the graph of the largest micro-batch of a method keeps.

    A matrix keeps its input and output, and norms, rotations and gates between matrices about
    half as much again; an adapter on it as much as 0.6 of both. A block that runs again has its
    activations and their gradients at once. Logits, their softmax and its gradient are in float32.
    """
    try:
        blocks = [shapes.get_submodule(path) for path in backbone(shapes).blocks]
    except UserError:  # its parts are not known: the whole is one block
        blocks = [shapes]
    vocabulary = int(getattr(shapes.config.get_text_config(), "vocab_size", 0))
    if isinstance(method, RMU):  # the graph is of the steered block and two below, without head
        blocks, vocabulary = blocks[max(0, method.layer - 2) : method.layer + 1], 0
    each: list[int] = [
        sum(sum(p.shape[-2:]) for p in b.parameters() if p.dim() > 1) for b in blocks
    ]
    found: float = 0.0
    wide = int(getattr(shapes.config.get_text_config(), "hidden_size", 0))
    for fit, length, lora, _ in _schedules(method):
        _, padded = _step_tokens(fit, length, sizes, _sets(method, sizes))
        tokens = padded * (fit.micro_size or fit.batch_size) / fit.batch_size
        share = 2.1 if lora else 1.5
        kept = share * sum(each)
        if fit.activation_checkpointing:
            kept = min(kept, len(blocks) * wide + 2 * share * max(each, default=0))
        found = max(found, tokens * (kept * width + 3 * 4 * vocabulary))
    return found


def _lines(request: Recipe | AuditRun, sizes: DataSizes) -> Iterator[Line]:
    """Yield what is trained and scored, in order."""
    subjects, scratch = 1, False
    if isinstance(request, Recipe):
        scratch = request.model.scratch is not None
        if request.pretrain is not None and scratch:
            plain = Plain(pretrain=request.pretrain)
            yield method_line("original and oracles", plain, sizes, 1 + request.oracles, ORIGINAL)
        for name, method in request.arms.items():
            method = completed(method, {"pretrain": request.pretrain})
            yield method_line(name, method, sizes, 2 if request.refit else 1, name)
        subjects += len(request.arms) + (request.oracles if scratch else 0)
    elif request.canary is not None:
        oracles = request.canary.num_oracles(request.audit.budget)
        teach = teaching(request.canary, sizes.count or LARGE)
        yield method_line("canary: original and oracles", teach, sizes, 1 + oracles, FULL)
        for name, method in request.canary.arms.items():
            yield method_line(f"canary: {name}", method, sizes, 1, FULL)
        subjects += len(request.canary.arms) + oracles
    else:
        subjects += len(_other_models(request))
    yield _scores(request, sizes, subjects)
    if request.audit.budget != "none":
        yield from _audit(request, sizes, subjects)


ORIGINAL = "original"
"""Kind of work of training the original and the oracles."""


def method_line(name: str, method: Method, sizes: DataSizes, jobs: int, pace: str) -> Line:
    """Return the line of a method run."""
    if isinstance(method, ImportanceMethod):
        return _one_pass(name, method, sizes, jobs, pace)
    trials = 1
    if isinstance(method, RMU) and method.sweep is not None:
        trials = len(method.sweep.grid(method.layer, method.steering, method.alpha))
    steps, tokens, padded = 0, 0.0, 0.0
    for config, length, lora, cost in _schedules(method):
        one, one_padded = _step_tokens(config, length, sizes, _sets(method, sizes))
        steps += config.steps
        tokens += config.steps * one * cost
        # A frozen weight needs no gradient of its own: 4 instead of 6 operations a token. Blocks
        # that run again in the backward pass cost 2 more.
        passes = (4 if lora else 6) + 2 * config.activation_checkpointing
        padded += config.steps * one_padded * cost * passes / 6
    for link in links(method):
        rows = _sets(link, sizes)
        limit = int(getattr(link, "max_length", 512))
        read = link.readings * sum(len(part) * sizes.tokens(part, limit, 8)[0] for part in rows)
        tokens, padded = tokens + read, padded + read
    total = jobs * trials
    return Line(name, steps, total, total * tokens, sizes.flops(6.0, total * padded), pace)


def _one_pass(name: str, method: ImportanceMethod, sizes: DataSizes, jobs: int, pace: str) -> Line:
    """Return the line of a method that differentiates every row once; its steps are batches."""
    domain, size = sizes.domain, method.batch_size
    if domain is None:
        return Line(name, 0, jobs, 0.0, None, pace)
    steps, tokens, padded = 0, 0.0, 0.0
    for rows in (all_rows(domain.forget), domain.retain):
        mean, longest = sizes.tokens(rows, method.max_length, size)
        steps += math.ceil(len(rows) / size)
        tokens += len(rows) * mean
        padded += len(rows) * longest
    return Line(name, steps, jobs, jobs * tokens, sizes.flops(6.0, jobs * padded), pace)


def _schedules(config: Config, length: int = 128) -> Iterator[tuple[FitConfig, int, bool, float]]:
    """Yield every schedule of a method: tokens per row, whether adapters, passes of a step."""
    length = int(getattr(config, "max_length", length) or length)
    lora = getattr(config, "lora", None) is not None
    for name in type(config).model_fields:
        value = getattr(config, name)
        values = tuple(value.values()) if isinstance(value, Mapping) else value
        for item in values if isinstance(values, tuple) else (values,):
            if isinstance(item, FitConfig):
                yield item, length, lora, float(getattr(config, "step_cost", 1.0))
            elif isinstance(item, Config):
                yield from _schedules(item, length)


def links(method: Method) -> Sequence[Method]:
    """Return the methods that a chain is made of; any other is its own."""
    return method.methods if isinstance(method, Chain) else (method,)


def _sets(method: Method, sizes: DataSizes) -> list[Rows]:
    """Return the sets of which a step of a method reads rows each: one where it trains on all."""
    domain = sizes.domain
    forget = all_rows(domain.forget) if domain else ()
    retain = domain.retain if domain else ()
    if starts_from(method) == "scratch":
        return [in_texts((*forget, *retain), domain.rows_per_text if domain else 1)]
    return [retain if role == "retain" else forget for role in _roles(method)]


def _roles(method: Method) -> tuple[str, ...]:
    """Return the roles of which a step of a method makes a pass each."""
    if starts_from(method) == "scratch":
        return ("all",)
    return ("forget", "retain") if "retain" in method.needs else ("forget",)


def _step_tokens(
    config: FitConfig, length: int, sizes: DataSizes, sets: Sequence[Rows]
) -> tuple[float, float]:
    """Return the tokens of one step, and with padding, that reads rows of each set."""
    micro = config.micro_size or config.batch_size
    means = [sizes.tokens(rows, length, micro) for rows in sets]
    return (
        config.batch_size * sum(mean for mean, _ in means),
        config.batch_size * sum(padded for _, padded in means),
    )


def _scores(request: Recipe | AuditRun, sizes: DataSizes, subjects: int) -> Line:
    """Return the line of scoring every model without an attack."""
    asked, domain = request.evaluate, sizes.domain
    sets: list[Rows] = [()]
    if domain is not None:
        scored = (*domain.test.values(), *domain.relearn.values(), *domain.multi_hop.values())
        sets = [*scored, domain.retain_test, domain.adjacent_test, *domain.benchmark.values()]
    tokens = sum(
        sizes.scored(subsample(rows, asked.max_rows, by="row"), asked.max_length)
        if rows
        else (0 if domain else 3 * asked.max_rows * asked.max_length)
        for rows in sets
    )
    return Line(
        "scores", 0, subjects, subjects * tokens, sizes.flops(2.0, subjects * tokens), SCORING
    )


def evaluation_tokens(evaluation: EvaluationSet | None, budget: Budget, sizes: DataSizes) -> float:
    """Return the tokens of scoring V, T and retain once."""
    if evaluation is None:
        return float((budget.max_test_rows + 2 * budget.max_other_rows) * budget.max_length)
    sets = (evaluation.all_test, evaluation.trained, evaluation.retain)
    return sum(sizes.scored(rows, budget.max_length) for rows in sets)


def _controls(request: Recipe | AuditRun, count: int) -> int:
    """Return how many positive controls an audit makes at most, one for each set of attacks."""
    if request.audit.budget == "none":
        return 0
    attacks = chosen_attacks(budget_for(request.audit, count), request.audit.attacks)
    kinds = {attack.controls for attack in attacks if attack.controls}
    return len(kinds)


def _audit(request: Recipe | AuditRun, sizes: DataSizes, subjects: int) -> Iterator[Line]:
    """Yield the attacks on every subject, the positive control among them."""
    budget = budget_for(request.audit, sizes.count or LARGE)
    domain = sizes.domain
    evaluation = None if domain is None else evaluation_set(domain, budget, sizes.tokenizer)
    scoring = evaluation_tokens(evaluation, budget, sizes)
    reads = 0
    controls = _controls(request, sizes.count or LARGE)
    if controls:
        hiding = _hiding(budget, sizes)
        yield _training("audit: positive controls", hiding, controls, "relearn", sizes, FULL)
        reads += controls * hiding.steps // 4  # after every move `dev`, about a quarter of it all
    done: set[tuple[Attack, Training]] = set()
    there = budget if evaluation is None else as_there(budget, evaluation, scoring)
    for attack in chosen_attacks(budget, request.audit.attacks):
        attacked = subjects + bool(attack.controls)
        name = f"audit: {name_of(attack)}"
        if not isinstance(attack, TrainingAttack):
            passes = attack.passes(there) * attacked
            flops = sizes.flops(2.0, passes * scoring)
            yield Line(name, 0, attacked, passes * scoring, flops, SCORING)
            continue
        asked = attack.trainings(budget)
        asked = asked if domain is None else possible(asked, domain)
        fresh = [t for t in asked if (attack.shared, t) not in done]
        done |= {(attack.shared, t) for t in fresh}
        for kind, pace in (("full", FULL), ("lora", ADAPTER), ("prompt", ADAPTER)):
            trainings = [t for t in fresh if t.kind == kind]
            if trainings:
                label = f"{name}, adapter" if kind == "lora" else name
                cuts = [(t, t.within(budget)) for t in trainings]
                yield _together(
                    [_training(label, cut, attacked, t.on, sizes, pace) for t, cut in cuts]
                )
                reads += attacked * sum(_points(cut) + bool(t.start) for t, cut in cuts)
    tokens = reads * scoring
    yield Line("audit: scores on the way", 0, reads, tokens, sizes.flops(2.0, tokens), ON_THE_WAY)


def _hiding(budget: Budget, sizes: DataSizes) -> Budget:
    """Return a budget of the steps and rows that a positive control takes at most."""
    large = (sizes.count or LARGE) >= LARGE
    change = {"steps": STEPS_LARGE, "batch_size": 2 * CHUNK_LARGE}
    return budget.model_copy(update=change if large else {"steps": STEPS, "batch_size": 2 * CHUNK})


def as_there(budget: Budget, evaluation: EvaluationSet, scoring: float) -> Budget:
    """Return a budget with the numbers and the mean length of the rows that are there to score."""
    test, other = len(evaluation.all_test), len(evaluation.trained) + len(evaluation.retain)
    change = {
        "max_test_rows": max(1, test),
        "max_other_rows": max(1, other // 2),
        "max_length": max(1, round(scoring / max(1, test + other))),
    }
    return budget.model_copy(update=change)


def _together(lines: Sequence[Line]) -> Line:
    """Return one line for trainings of one kind, which may differ in steps."""
    flops = [line.flops for line in lines if line.flops is not None]
    return replace(
        lines[0],
        steps=max(line.steps for line in lines),
        jobs=sum(line.jobs for line in lines),
        tokens=sum(line.tokens for line in lines),
        flops=sum(flops) if len(flops) == len(lines) else None,
    )


def _points(budget: Budget) -> int:
    """Return how often a training scores: along its curve, and at its ends for the statistics."""
    points = len({s for s in budget.checkpoints if s <= budget.steps} | {0, budget.steps})
    # Beside its curve, a training reads the nats of V and fresh units twice, and dev.
    return points + (3 if budget.bits else 1)


def attack_step(budget: Budget, sizes: DataSizes, on: str) -> tuple[float, float]:
    """Return the tokens of one step of an attack, and with padding."""
    domain = sizes.domain
    rows: Rows = (
        ()
        if domain is None
        else (domain.benign if on == "benign" else (*relearn_rows(domain), *domain.benign))
    )
    mean, padded = sizes.tokens(rows, budget.max_length, budget.batch_size)
    return budget.batch_size * mean, budget.batch_size * padded


def _training(name: str, budget: Budget, jobs: int, on: str, sizes: DataSizes, pace: str) -> Line:
    """Return the line of trainings of an attack."""
    mean, padded = attack_step(budget, sizes, on)
    flops = sizes.flops(4.0 if pace == ADAPTER else 6.0, jobs * budget.steps * padded)
    return Line(name, budget.steps, jobs, jobs * budget.steps * mean, flops, pace)
