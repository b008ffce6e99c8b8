"""RMU: push forget activations at one layer to a random vector, pin retain activations.

    for topic k:        u_k = c_k v / |v|,  v uniform in [0, 1)^D
    for step t:         k = t mod K, batch t div K of topic k and of the retain text
        forget  =  mean over tokens and D of (h(forget) - u_k)^2
        retain  =  mean over tokens and D of (h(retain) - h0(retain))^2
        AdamW step on forget + alpha_k retain

with h the output of block `layer`, h0 that of the original model, and three matrices trained: the
down-projections of the MLPs of blocks layer - 2 to layer.

Source:
    arXiv 2403.03218, section 4; centerforaisafety/wmdp@bc5e1ba (MIT), rmu/unlearn.py. Adaptive
    RMU: arXiv 2408.06223; RebelsNLU-jaist/llm-unlearning@3f951e2 (no licence file; read only),
    baselines/adap_rmu/unlearn.py. Thinking traces: arXiv 2506.12963, in `traces`.

Shape legend: B rows, T tokens, D residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from excise.core.context import Context
from excise.core.disk import new_file
from excise.core.errors import UserError
from excise.core.keys import FilePath
from excise.data.domain import Domain, Rows
from excise.data.stream import Batch, Stream, Tokenizer
from excise.losses import rmu_forget, rmu_retain
from excise.methods.base import Paper, Removal
from excise.methods.choosing import check_dev, dev_losses
from excise.methods.posthoc.rmu.engine import (
    Engine,
    Full,
    PrefixCache,
    TrainedSpan,
    runs_apart,
)
from excise.methods.posthoc.rmu.parameters import (
    EditableModel,
    TargetParameters,
    editing,
    find_target_parameters,
    flops_per_token,
    of_slices,
)
from excise.methods.posthoc.rmu.sweep import RMUSweep, Tried, choose
from excise.methods.posthoc.rmu.topics import (
    control_vector,
    per_topic,
    read_control_vectors,
    topics_of,
)
from excise.methods.posthoc.rmu.traces import Traces
from excise.methods.search import Range, Space
from excise.methods.stopping import Looks
from excise.methods.tuning import (
    Progress,
    TrainingMethod,
    finish,
    looking,
    moved,
    run_fit,
    state_dir,
    stream,
    write_edit,
)
from excise.models.checkpoint import Checkpoint
from excise.models.lora import LoRA, merge
from excise.models.names import Names
from excise.train.distributed import gather, sum_dicts
from excise.train.fit import FitConfig, Term, fit

__all__ = ["RMU", "RMUSweep"]

CONTROLS = "control_vectors.safetensors"
TRACE, COT = "trace of forget", "trace of retain"
"""Terms of thinking traces, and their batches in a micro-batch, where topics have names too."""

PUBLISHED: Mapping[str, Any] = {
    "masked": False,
    "upcast": False,
    "order": "file",
    "padding": "left",
    "pad": "eos",
    "positions": "slots",
    "max_length": 512,
    "later_max_length": 768,
}
"""What `as_published` sets where nothing else was said."""

ADAPTIVE: Mapping[str, Any] = {"steering": 5.0, "alpha": 1200.0}
"""What `adaptive` sets where nothing else was said, beside `ADAPTIVE_STEPS`."""
ADAPTIVE_STEPS = 150


class RMU(TrainingMethod):
    """Minimise |h(forget) - c u|^2 + alpha |h(retain) - h0(retain)|^2 at one layer, per entry."""

    name: Literal["rmu"] = "rmu"
    layer: int = Field(default=7, ge=0)
    """Block whose output is steered."""
    blocks: tuple[int, ...] = ()
    """Blocks whose MLP matrix is trained; empty for layer-2, layer-1, layer."""
    steering: float | tuple[float, ...] = 20.0
    """c: norm of the control vector (with `adaptive`, the factor on the mean forget norm)."""
    alpha: float | tuple[float, ...] = 100.0
    """Weight of the retain term; one value, or one for each topic."""
    adaptive: bool = False
    """Adaptive RMU: c is `steering` times the mean norm of the first batch of each topic, when that
    batch is read. What was not set is as in its release: steering 5, alpha 1200, 150 steps."""
    controls: FilePath = ""
    """File of control vectors by topic to use as they are, instead of drawing and scaling."""
    engine: Literal["full", "span", "cached"] = "span"
    """How activations are computed, to the same bits: two whole models, or the blocks needed."""
    cache_gib: float = Field(default=4.0, ge=0)
    """Memory that `cached` may fill with what frozen blocks put out."""
    matrix: Literal["down", "up"] = "down"
    """Matrix of the MLP (the released Mixtral run trained `up` of the first expert)."""
    experts: Literal["first", "all"] = "first"
    """Which experts of a mixture are trained."""
    modules: Names = ()
    """Modules to train by name, instead of `blocks`."""
    masked: bool = True
    """Leave padding out of both means; the released code does not."""
    upcast: bool = True
    """Compute both losses in float32; the released code uses the model's dtype."""
    order: Literal["shuffled", "once", "file"] = "shuffled"
    """Order of rows: anew every epoch, the same batches every epoch, or as in the file."""
    padding: Literal["right", "left"] = "right"
    """Side of the padding."""
    pad: Literal["pad", "eos"] = "pad"
    """Token that fills the padding."""
    positions: Literal["tokens", "slots"] = "tokens"
    """Whether positions count real tokens, or padding as well, as the released code's do."""
    max_length: int = Field(default=512, ge=2)
    """Tokens per row of the first topic and of retain."""
    later_max_length: int = Field(default=0, ge=0)
    """Tokens per row of all further topics; 0 for `max_length`."""
    min_chars: int = Field(default=0, ge=0)
    """Texts of so many characters or fewer are left out."""
    as_published: bool = False
    """Set everything above that was not set as the released code has it, and fit.master=model."""
    fit: FitConfig = FitConfig(steps=80, lr=5e-5, batch_size=4, optimizer="hf_adamw")
    """Steps over all topics together, rows per step of each role, learning rate."""
    lora: LoRA | None = None
    """Train an adapter instead; the frozen model is the adapter switched off."""
    traces: Traces | None = None
    """R2MU: steer thinking traces of forget rows too, and pin those of retain rows."""
    sweep: RMUSweep | None = None
    """Try several layers, norms and weights in one run and keep the best on `dev`."""

    version: ClassVar[int] = 3
    search: ClassVar[Space] = {"fit.lr": Range(), "steering": Range(), "alpha": Range()}
    paper: ClassVar[Paper] = Paper(
        "The WMDP benchmark: measuring and reducing malicious use with unlearning",
        "arXiv:2403.03218 (adaptive: arXiv:2408.06223; traces: arXiv:2506.12963)",
        "section 4, L = L_forget + alpha L_retain",
        "centerforaisafety/wmdp@bc5e1ba (MIT)",
        {
            "layer": "rmu/unlearn.py --layer_id 7",
            "steering": "rmu/unlearn.py --steering_coeffs 20,20",
            "alpha": "rmu/unlearn.py --alpha 100,100",
            "fit": "rmu/unlearn.py: lr 5e-5, batch 4, 80 batches; transformers' AdamW",
            "adaptive": "RebelsNLU-jaist/llm-unlearning@3f951e2, baselines/adap_rmu/unlearn.py: "
            "--scale 5 (here `steering`), --alpha 1200,1200, --max_num_batches 150 "
            "(experiments/adap_rmu.sh runs 500), --steering_coeffs 1,1; the norm of the second "
            "topic is taken after one update. Off here unless asked for",
            "traces": "OPTML-Group/Unlearn-R2MU@dc2d6c5, unlearn_r2mu.py: both weights 1, 100 and "
            "150 tokens, the prefix; run.sh has steering 6.5, alpha 1.4, lr 7.5e-5, 500 batches "
            "and torch's AdamW",
        },
    )

    @classmethod
    def filled_in(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fill in the released settings of adaptive RMU, which are not those of RMU."""
        if not data.get("adaptive"):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        fit = given.get("fit")
        if fit is None:
            fit = {**cls.model_fields["fit"].default.model_dump(exclude_unset=True)}
            fit["steps"] = ADAPTIVE_STEPS
        elif isinstance(fit, FitConfig):
            fit = fit.model_dump(exclude_unset=True)
        if isinstance(fit, Mapping):
            fit = {"steps": ADAPTIVE_STEPS, **fit}
        return {**ADAPTIVE, **given, "fit": fit}

    @model_validator(mode="before")
    @classmethod
    def _published(cls, data: Any) -> Any:
        """Fill in the released settings before anything is checked, so that they are recorded."""
        if not isinstance(data, Mapping):
            return data
        if data.get("keep") == "delta":
            raise ValueError("keep: what is kept is the run's; use 'keep' of the recipe")
        if data.get("keep") == "model":  # so in records of before
            data = {name: value for name, value in data.items() if name != "keep"}
        data = cls.filled_in(data)
        if not data.get("as_published"):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        fit = given.get("fit", cls.model_fields["fit"].default)
        fit = fit.model_dump(exclude_unset=True) if isinstance(fit, FitConfig) else dict(fit)
        return {**PUBLISHED, **given, "fit": {"master": "model", "optimizer": "hf_adamw", **fit}}

    @model_validator(mode="after")
    def _sound(self) -> RMU:
        """Refuse settings that contradict each other."""
        if self.adaptive and self.controls:
            raise ValueError("'adaptive' scales vectors and 'controls' gives them; set one")
        if self.sweep is not None and self.engine == "full":
            raise ValueError("a sweep shares what frozen blocks put out; set engine to 'cached'")
        if self.sweep is not None and self.stop is not None:
            raise ValueError("'sweep' and 'stop' both choose on dev; set one")
        return self

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Steer `domain.forget` to noise at one layer."""
        domain, quality = self.given(domain, ctx)
        if self.sweep is not None:
            return _best_of_sweep(self, self.sweep, start, domain, quality, ctx)
        targets = self.target_parameters(start)
        topics = topics_of(domain)
        ctx.emit("note", {"text": f"rmu trains {', '.join(targets.printed)}"})
        tokenizer = start.tokenizer()
        if self.engine == "full" or self.stop is not None:  # losses on dev need every block
            model: Any = start.load(dtype=ctx.dtype, device=ctx.device)
        else:
            model = start.load_prefix(self.layer + 1, dtype=ctx.dtype, device=ctx.device)
        batches = self.batches(topics, domain, tokenizer, ctx)
        progress = Progress(ctx, self.name, self.fit.steps)
        with editing(model, targets, self.lora, ctx) as edit:
            engine = make_engine(self, start, edit, targets, ctx)
            controls = self.control_vectors(topics, engine, batches, targets.parts.d_model, ctx)
            looks = looking(self, edit.net, edit.parameters, tokenizer, domain, ctx)
            chosen = self.train(
                edit, engine, controls, batches, progress, ctx, state_dir(ctx), looks
            )
            _save_controls(controls, ctx)
            facts = _facts(self, start, targets, edit, engine, controls)
            if isinstance(engine, TrainedSpan):
                _tell_cache(engine.cache, start, ctx)
            removal = finish(
                start, edit.net, edit.parameters, progress, ctx, lora=self.lora,
                extras={**facts, **quality, **chosen},
                flops_per_token=flops_per_token(targets, start, self.engine),
            )  # fmt: skip
        return replace(removal, extras=of_slices(removal.extras, targets))

    def points(self) -> list[RMU]:
        """Return every setting of a sweep as a method of its own; without one, this method."""
        if self.sweep is None:
            return [self]
        alone: dict[str, Any] = {"sweep": None, "engine": "cached"}
        grid = self.sweep.grid(self.layer, self.steering, self.alpha)
        return [self.model_copy(update={**settings, **alone}) for settings in grid]

    def target_parameters(self, start: Checkpoint) -> TargetParameters:
        """Return what a run trains; see `find_target_parameters`.

        Raises:
            UserError: As `find_target_parameters`, or if weight decay would reach beyond a slice.
        """
        targets = find_target_parameters(
            start,
            self.layer,
            blocks=self.blocks,
            modules=self.modules,
            matrix=self.matrix,
            experts=self.experts if self.lora is None else "all",
        )
        if targets.slices and self.fit.weight_decay:
            raise UserError(
                "rmu: weight decay would reach beyond the trained part of "
                f"'{targets.printed[0]}'; set fit.weight_decay to 0 or experts to 'all'"
            )
        return targets

    def batches(
        self, topics: Sequence[str], domain: Domain, tokenizer: Tokenizer, ctx: Context
    ) -> Callable[[int], list[dict[str, Batch]]]:
        """Return batches by step: topic = step mod K, batch = step div K; topics share retain.

        Args:
            topics: Names of the K capabilities.
            domain: Rows by role.
            tokenizer: The model's tokenizer.
            ctx: Seeds of the orders, processes.

        Raises:
            UserError: If a role has no row of more than `min_chars` characters.
        """

        def batches_of(
            rows: Rows, purpose: str, length: int, shortest: int = self.min_chars
        ) -> Callable[[int], list[Batch]]:
            long = tuple(r for r in rows if not r.text or len(r.text) > shortest)
            if not long:
                raise UserError(
                    f"rmu: no row of {purpose} has more than {self.min_chars} characters; "
                    "lower 'min_chars'"
                )
            shuffled = self.order != "file"
            reader = stream(
                long, tokenizer, self.fit, ctx, purpose=purpose, max_length=length, shuffle=shuffled
            )
            pad = tokenizer.pad_token_id if self.pad == "pad" else tokenizer.eos_token_id
            reader = replace(reader, padding_side=self.padding, pad_id=pad)
            return _first_epoch_again(reader) if self.order == "once" else reader

        later = self.later_max_length or self.max_length
        forget = {
            topic: batches_of(
                domain.forget[topic], f"forget.{topic}", later if i else self.max_length
            )
            for i, topic in enumerate(topics)
        }
        retain = batches_of(domain.retain, "retain", self.max_length)

        def batches(step: int) -> list[dict[str, Batch]]:
            turn, which = divmod(step, len(topics))
            topic = topics[which]
            pairs = zip(forget[topic](turn), retain(turn), strict=True)
            return [{topic: f, "retain": r} for f, r in pairs]

        if self.traces is None:
            return batches
        length = self.max_length
        trace = {
            t: batches_of(
                self.traces.forget(domain.forget[t], tokenizer, t), f"trace.{t}", length, shortest=0
            )
            for t in topics
        }
        kept = self.traces.retain(domain.retain)
        cot = batches_of(kept, "cot", self.traces.retain_max_length, shortest=0)

        def with_traces(step: int) -> list[dict[str, Batch]]:
            turn, which = divmod(step, len(topics))
            more = zip(trace[topics[which]](turn), cot(turn), strict=True)
            return [
                {**micro, TRACE: t, COT: c}
                for micro, (t, c) in zip(batches(step), more, strict=True)
            ]

        return with_traces

    def control_vectors(
        self,
        topics: Sequence[str],
        engine: Engine,
        batches: Callable[[int], list[dict[str, Batch]]],
        width: int,
        ctx: Context,
    ) -> dict[str, Float[Tensor, " D"]]:
        """Return the control vector of every topic, with `adaptive` of norm 1 until it is scaled.

        The first batch is looked at before anything is trained, to refuse a model that puts out
        NaN.

        Args:
            topics: Names of the capabilities.
            engine: Gives activations.
            batches: Micro-batches by step.
            width: Residual width D.
            ctx: Seed of the vectors, device.

        Raises:
            UserError: If activations are not finite, or vectors and topics do not fit.
        """
        steering = per_topic(self.steering, topics, "steering")
        self.activations(engine, batches(0)[0][topics[0]], ctx)
        if self.controls:
            return read_control_vectors(self.controls, topics, width)
        vectors = {t: control_vector(width, t, ctx) for t in topics}
        return vectors if self.adaptive else {t: steering[t] * vectors[t] for t in topics}

    def activations(self, engine: Engine, batch: Batch, ctx: Context) -> Float[Tensor, "B T D"]:
        """Return what the steered block puts out now, without a gradient.

        Args:
            engine: Gives activations.
            batch: What is read.
            ctx: Device.

        Raises:
            UserError: If it is not finite.
        """
        with torch.no_grad():
            hidden_BTD = engine.current(batch.to(ctx.device))
        if not bool(torch.isfinite(hidden_BTD).all()):
            raise UserError(
                f"rmu: block {self.layer} puts out NaN or infinity on the first batch, in "
                f"{_name(hidden_BTD.dtype)}; check the model's weights, or run it in float32"
            )
        return hidden_BTD

    def scaled(
        self,
        unit_D: Float[Tensor, " D"],
        steering: float,
        engine: Engine,
        batches: Sequence[Batch],
        ctx: Context,
    ) -> Float[Tensor, " D"]:
        """Return c u with c = steering mean |h(forget)|, h being what the block puts out now.

        Args:
            unit_D: Control vector u of norm 1.
            steering: Factor on the norm.
            engine: Gives activations.
            batches: The first forget batch of a topic, cut into micro-batches.
            ctx: Device.

        Source:
            arXiv 2408.06223; RebelsNLU-jaist/llm-unlearning@3f951e2, baselines/adap_rmu/unlearn.py,
            which takes norm and mean in the model's dtype and rounds u to it before scaling.
        """
        total = count = 0.0
        for batch in batches:
            hidden_BTD = self.activations(engine, batch, ctx)
            norm_BT = (hidden_BTD.float() if self.upcast else hidden_BTD).norm(dim=-1)
            mask_BT = self.mask(batch).to(norm_BT.device)
            mean = norm_BT[mask_BT].mean() if self.masked else norm_BT.mean(dim=1).mean(dim=0)
            tokens = float(mask_BT.sum())
            total, count = total + tokens * float(mean), count + tokens
        over_all = sum_dicts(gather({"total": total, "count": count}, ctx))
        c = steering * over_all["total"] / over_all["count"]
        if not self.upcast:
            return (c * unit_D.to(hidden_BTD.dtype)).to(unit_D.dtype)
        return c * unit_D

    def train(
        self,
        edit: EditableModel,
        engine: Engine,
        controls: Mapping[str, Float[Tensor, " D"]],
        batches: Callable[[int], list[dict[str, Batch]]],
        progress: Progress,
        ctx: Context,
        folder: Path | None,
        looks: Looks | None = None,
    ) -> dict[str, Any]:
        """Run the loop; return what the record says of a stop rule's choice.

        Args:
            edit: The model and what is trained of it.
            engine: Where activations come from.
            controls: Control vectors by topic; `adaptive` scales each in place when its topic is
                first read.
            batches: Micro-batches by step.
            progress: Told of every step.
            ctx: Seed, device, processes.
            folder: Where the state of an interrupted run is.
            looks: Looks at `dev` on the way.
        """
        alpha = per_topic(self.alpha, list(controls), "alpha")

        def loss(_net: nn.Module, micro: Mapping[str, Batch]) -> dict[str, Term]:
            return self.terms(engine, micro, controls, alpha)

        def counts(micro: Mapping[str, Batch]) -> dict[str, float]:
            topic = _topic(micro)
            width = next(iter(controls.values())).numel()
            pairs = [("forget", micro[topic]), ("retain", micro["retain"])]
            pairs += [(term, micro[term]) for term in (TRACE, COT) if term in micro]
            if not self.masked and self.fit.micro_size == 0:
                return {term: 1.0 for term, _ in pairs}
            return {term: float(self.mask(batch).sum()) * width for term, batch in pairs}

        read = self.adapting(engine, controls, batches, ctx, folder) if self.adaptive else batches
        steps = fit(
            edit.net, read, loss, self.fit, ctx,
            groups={"trained": list(edit.parameters.values())}, counts=counts, state_dir=folder,
        )  # fmt: skip
        return run_fit(steps, progress, looks)

    def adapting(
        self,
        engine: Engine,
        controls: Mapping[str, Float[Tensor, " D"]],
        batches: Callable[[int], list[dict[str, Batch]]],
        ctx: Context,
        folder: Path | None,
    ) -> Callable[[int], list[dict[str, Batch]]]:
        """Return the batches; the vector of a topic is scaled in place when it is first read.

        Topic k is first read at step k, when the model has taken k steps. The scaled vectors are
        kept beside the state of the run, since a resumed run has other activations.

        Args:
            engine: Gives activations.
            controls: Control vectors of norm 1 by topic.
            batches: Micro-batches by step.
            ctx: Device.
            folder: Where the state of an interrupted run is.
        """
        topics, units = list(controls), {name: u_D.clone() for name, u_D in controls.items()}
        steering = per_topic(self.steering, topics, "steering")
        kept = None if folder is None else folder / CONTROLS
        if kept is not None and kept.is_file():
            for name, vector_D in load_file(kept).items():
                controls[name].copy_(vector_D)

        def read(step: int) -> list[dict[str, Batch]]:
            micros = batches(step)
            if step < len(topics):
                name = topics[step]
                firsts = [micro[name] for micro in micros]
                vector_D = self.scaled(units[name], steering[name], engine, firsts, ctx)
                controls[name].copy_(vector_D)
                if kept is not None and ctx.rank == 0:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    with new_file(kept) as part:
                        save_file(dict(controls), str(part))
            return micros

        return read

    def terms(
        self,
        engine: Engine,
        micro: Mapping[str, Batch],
        controls: Mapping[str, Float[Tensor, " D"]],
        alpha: Mapping[str, float],
    ) -> dict[str, Term]:
        """Return the terms of the loss of one micro-batch, two and with traces four.

        L = mean |h(forget) - c u|^2 + alpha mean |h(retain) - h_original(retain)|^2 over tokens
        and the residual width, h being the output of the steered block.

        Args:
            engine: Gives current and original activations.
            micro: Batches of one topic and of retain.
            controls: Control vector c u of each topic.
            alpha: Weight of the retain term by topic.

        Source:
            arXiv 2403.03218, section 4; centerforaisafety/wmdp@bc5e1ba (MIT), rmu/unlearn.py.
        """
        topic = _topic(micro)
        forget, retain = micro[topic], micro["retain"]
        original_BTD = engine.original(retain)
        hidden_BTD = engine.current(forget)
        control_D = controls[topic].to(hidden_BTD)
        forget_term = self.distance(hidden_BTD, control_D, forget)
        retain_term = self.distance(engine.current(retain), original_BTD, retain)
        terms = {"forget": Term(*forget_term), "retain": Term(*retain_term, alpha[topic])}
        if self.traces is not None:
            trace, cot = micro[TRACE], micro[COT]
            drawn = self.distance(engine.current(trace), control_D, trace)
            original_BTD = engine.original(cot)
            pinned = self.distance(engine.current(cot), original_BTD, cot)
            terms[TRACE] = Term(*drawn, self.traces.weight)
            terms[COT] = Term(*pinned, self.traces.retain_weight)
        return terms

    def distance(
        self, hidden_BTD: Float[Tensor, "B T D"], goal: Tensor, batch: Batch
    ) -> tuple[Tensor, float]:
        """Return a sum of squared differences and what it is to be divided by.

        Args:
            hidden_BTD: Activations of the model that is trained.
            goal: What they are drawn to: a control vector [D], or activations [B, T, D].
            batch: Gives the mask, where padding is left out.
        """
        if self.masked:
            both = rmu_forget if goal.dim() == 1 else rmu_retain
            return both(hidden_BTD, goal, self.mask(batch), upcast=self.upcast)
        if self.upcast:
            hidden_BTD, goal = hidden_BTD.float(), goal.float()
        mean = F.mse_loss(hidden_BTD, goal.expand_as(hidden_BTD))
        # The mean itself, as released: a sum divided later would round differently.
        whole = self.fit.micro_size == 0
        return (mean, 1.0) if whole else (mean * hidden_BTD.numel(), float(hidden_BTD.numel()))

    def mask(self, batch: Batch) -> Bool[Tensor, "B T"]:
        """Return the positions that enter the means."""
        return batch.attention_BT if self.masked else torch.ones_like(batch.attention_BT)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the keyword arguments the model is called with."""
        inputs = batch.inputs
        if self.positions == "slots":
            del inputs["position_ids"]
        return inputs


def _topic(micro: Mapping[str, Batch]) -> str:
    """Return the topic of a micro-batch."""
    return next(role for role in micro if role != "retain")


def _first_epoch_again(reader: Stream) -> Callable[[int], list[Batch]]:
    """Read the batches of the first epoch over and over; rows that fill no batch are left out."""
    count = max(1, len(reader.examples) // reader.batch_size)
    return lambda step: reader(step % count)


def _name(dtype: torch.dtype) -> str:
    """Return a dtype as people write it."""
    return str(dtype).removeprefix("torch.")


def make_engine(
    method: RMU,
    start: Checkpoint,
    edit: EditableModel,
    targets: TargetParameters,
    ctx: Context,
    *,
    cache: PrefixCache | None = None,
    upto: int = 0,
) -> Engine:
    """Return the engine a method asks for.

    Args:
        method: The settings.
        start: The original model.
        edit: The model that is trained.
        targets: What is trained of it.
        ctx: Device and dtype.
        cache: What the settings of a sweep share; None for a cache of its own.
        upto: Blocks whose calls that cache records.
    """
    if method.engine == "full":
        if method.lora is not None:
            return Full(edit.net, edit.net, targets.steered, method.inputs, edit.restored)
        frozen: nn.Module = start.load(dtype=ctx.dtype, device=ctx.device)
        return Full(edit.net, frozen, targets.steered, method.inputs, torch.no_grad)
    if cache is None:
        if not runs_apart(edit.net, targets, method.inputs):
            ctx.emit("note", {"text": f"rmu runs whole models: {_unlike(targets)}"})
            return Full(edit.net, edit.net, targets.steered, method.inputs, edit.restored)
        cache = PrefixCache(int(method.cache_gib * 2**30) if method.engine == "cached" else 0)
    return TrainedSpan(edit.net, targets, method.inputs, edit.restored, cache, upto)


def _unlike(targets: TargetParameters) -> str:
    return f"the blocks of a {targets.parts.family} model hand on more than the residual stream"


def _save_controls(controls: Mapping[str, Tensor], ctx: Context) -> None:
    """Write the control vectors beside the model, once over all processes."""
    if ctx.rank == 0:
        save_file(dict(controls), str(ctx.work / CONTROLS))


def _facts(
    method: RMU,
    start: Checkpoint,
    targets: TargetParameters,
    edit: EditableModel,
    engine: Engine,
    controls: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Return what the record says of a run."""
    reference_bytes = sum(t.numel() * t.element_size() for t in edit.saved.values())
    whole = start.num_parameters * next(iter(edit.parameters.values())).element_size()
    if method.engine == "full" and method.lora is None:
        reference_bytes = whole
    return {
        "hidden_at": targets.steered,
        "modules": list(targets.printed),
        "engine": method.engine if isinstance(engine, TrainedSpan) else "full",
        "steering_norm": {topic: float(c.norm()) for topic, c in controls.items()},
        "optimizer": method.fit.optimizer,
        "master": method.fit.master,
        "compute_dtype": _name(next(edit.net.parameters()).dtype),
        "reference_bytes": reference_bytes,
        "reference_share": reference_bytes / whole,
        "files": {"control_vectors": CONTROLS},
    }


def _tell_cache(cache: PrefixCache, start: Checkpoint, ctx: Context) -> None:
    """Say what this process read and remembered: no part of the record, for a resumed run has less.

    Args:
        cache: What the engine remembered.
        start: The original, which counts the bytes that were read of it.
        ctx: Is told.
    """
    remembered = {"bytes": cache.num_bytes, "hits": cache.hits, "misses": cache.misses}
    ctx.emit("cache", {**remembered, "bytes_read": start.bytes_read})


def _best_of_sweep(
    method: RMU,
    sweep: RMUSweep,
    start: Checkpoint,
    domain: Domain,
    quality: Mapping[str, Any],
    ctx: Context,
) -> Removal:
    """Try every setting, running frozen blocks once for all of them; write the best.

    Raises:
        UserError: If `dev` is empty, or a setting does not fit the model.
    """
    check_dev(domain, "rmu's sweep")
    if len(sweep.layer) > 1 and (method.blocks or method.modules):
        raise UserError(
            "rmu: sweep.layer moves the steered block and 'blocks' or 'modules' fix what is "
            "trained; leave those out"
        )
    grid = sweep.grid(method.layer, method.steering, method.alpha)
    points = method.points()
    targets = [point.target_parameters(start) for point in points]
    model: Any = start.load(dtype=ctx.dtype, device=ctx.device)
    tokenizer = start.tokenizer()
    if not runs_apart(model, targets[0], method.inputs):
        raise UserError(
            f"rmu: {_unlike(targets[0])}, so that a sweep cannot run them apart; leave 'sweep' out"
        )
    cache = PrefixCache(int(method.cache_gib * 2**30))
    upto = max(target.layer for target in targets) + 1

    def losses(net: nn.Module) -> tuple[float, float]:
        return dev_losses(net, tokenizer, domain, sweep.rows, method.max_length)

    def attempt(number: int) -> Tried:
        point, target = points[number], targets[number]
        topics = topics_of(domain)
        batches = point.batches(topics, domain, tokenizer, ctx)
        progress = Progress(ctx, f"rmu {number + 1}/{len(points)}", point.fit.steps)
        with editing(model, target, point.lora, ctx) as edit:
            engine = make_engine(point, start, edit, target, ctx, cache=cache, upto=upto)
            controls = point.control_vectors(topics, engine, batches, target.parts.d_model, ctx)
            folder = state_dir(ctx) / f"{number}"
            point.train(edit, engine, controls, batches, progress, ctx, folder)
            forget, retain = losses(edit.net)
            facts = _facts(point, start, target, edit, engine, controls)
            trained = edit.parameters if point.lora is None else merge(edit.net)[0]
            changed = {n: t.detach().to("cpu", copy=True) for n, t in trained.items()}
            with torch.no_grad():
                for name, value in edit.saved.items():
                    edit.parameters[name].copy_(value)
        per_token = flops_per_token(target, start, point.engine)
        cost = progress.cost(start.num_parameters, flops_per_token=per_token)
        facts |= of_slices(moved(start.weights_of(list(changed)), changed), target)
        return Tried(forget, retain, changed, controls, facts, tuple(progress.history), cost)

    best, cost, report = choose(sweep, grid, attempt, losses(model), ctx)
    _save_controls(best.controls, ctx)
    extras = {**best.facts, **quality, "sweep": report}
    _tell_cache(cache, start, ctx)
    removal = write_edit(start, best.changed, ctx, extras=extras, cost=cost, history=best.history)
    target = targets[grid.index(report["chosen"])]
    return replace(removal, extras=of_slices(removal.extras, target))
