"""How much every weight matters to some rows, in one model's memory; and dampening by it.

    for every batch:   g = gradient of the batch's mean loss
                       S += g^2      (or |g|)
    importance I = S / number of batches
    w <- min(lambda I_D / I_f, 1) w     where I_f > alpha I_D

The sums S are float32 and lie in a file. A tensor's gradient is folded into its place there as
soon as the backward pass has completed it, and freed at once, so that beside the model there are
never more than a few of its tensors. Sums of different rows add up: D_f and the rows to retain are
each read once, and I_D is their sum over the number of all batches. What `accumulate`, `dampen`
and `SortedRatios` take is any model, any batches and any loss; what follows them is for language
models.

A weight that no row touches has the ratio 0 / 0: it is never chosen, and no quantile counts it. A
tied tensor is one parameter, whose uses add up before anything is squared.

Source:
    SSD, arXiv 2308.07707; if-loops/selective-synaptic-dampening@cdfdc0e (MIT), src/ssd.py.

Shape legend: B rows, T tokens, N entries of a tensor or tokens of a batch, D hidden size.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from excise.core.context import Context, Stage
from excise.core.disk import new_file, write_text
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.data.stream import Batch, Example, collate, encode
from excise.losses import head_norm, logit_norm, nll, predicting
from excise.methods.base import Cost, PostHoc, Removal
from excise.methods.distillation.teacher_cache import examples_identity
from excise.methods.tuning import forget_rows, logits_of, moved, together, write_model
from excise.models.checkpoint import Checkpoint
from excise.models.files import Entry, read_header, read_tensor
from excise.models.head import final_hidden, head_of
from excise.models.hooks import trainable
from excise.models.names import Names, parameters_by_name
from excise.train.distributed import barrier

B = TypeVar("B")

CHUNK = 1 << 20
"""Entries that are folded or compared at once."""


# -- any model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sums:
    """Folded gradients of some batches; those of others can be added.

    Attributes:
        files: Safetensors with float32 sums by parameter, to be added up.
        batches: Number of batches they come from.
        tokens: Tokens that were read for them.
    """

    files: tuple[Path, ...]
    batches: int
    tokens: int = 0

    def __add__(self, other: Sums) -> Sums:
        """Return the sums over both sets of batches."""
        return Sums(
            (*self.files, *other.files), self.batches + other.batches, self.tokens + other.tokens
        )

    def importance(self, name: str) -> Float[Tensor, " N"]:
        """Return the mean over batches of one parameter, flat."""
        first, *others = self._entries
        total = read_tensor(first[name]).reshape(-1)
        for entries in others:
            with entries[name].file.open("rb") as file:
                file.seek(entries[name].start)
                for part_N in total.split(CHUNK):
                    part_N += torch.from_numpy(np.fromfile(file, np.float32, part_N.numel()))
        return total.div_(self.batches)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters and their shapes."""
        return {name: entry.shape for name, entry in self._entries[0].items()}

    @cached_property
    def _entries(self) -> list[dict[str, Entry]]:
        return [read_header(file) for file in self.files]


def accumulate(
    model: nn.Module,
    batches: Iterable[B],
    loss: Callable[[nn.Module, B], Tensor],
    to: Path,
    *,
    fold: Literal["square", "abs"] = "square",
) -> Sums:
    """Fold the gradients of batches into a file, tensor by tensor.

    Args:
        model: Any model, in evaluation mode; parameters that require no gradient are left out.
        batches: What is read, one backward pass each.
        loss: The mean loss of a batch.
        to: The file to make; its folder must exist.
        fold: Squares of gradients (Fisher's diagonal, of whole batches), or their absolute values.

    Returns:
        The sums; their `tokens` are 0.

    Raises:
        UserError: If a gradient is not finite, or there is no batch.
    """
    named = {n: p for n, p in parameters_by_name(model).items() if p.requires_grad}
    place = np.empty(CHUNK, np.float32)
    done = 0
    with new_file(to) as part, ExitStack() as stack:
        entries = _zeros(part, named)
        file = stack.enter_context(part.open("r+b"))

        def take(name: str, parameter: Tensor) -> None:
            assert parameter.grad is not None
            grad_N, parameter.grad = parameter.grad.detach().reshape(-1), None
            at = entries[name].start
            for part_N in grad_N.split(CHUNK):
                value_N = part_N.to("cpu", torch.float32)
                value_N = value_N.square_() if fold == "square" else value_N.abs_()
                sums = place[: len(value_N)]
                file.seek(at)
                file.readinto(sums.data)
                sums += value_N.numpy()
                if not np.isfinite(sums).all():
                    raise UserError(
                        f"the gradient of '{name}' is not finite in batch {done + 1}; check the "
                        "model's weights, or run it in float32"
                    )
                file.seek(at)
                at += file.write(sums.data)

        for name, parameter in named.items():
            handle = parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: take(name, p)
            )
            stack.callback(handle.remove)
        for batch in batches:
            loss(model, batch).backward()
            done += 1
    if not done:
        raise UserError("there is no batch whose importance could be measured; check the split")
    return Sums((to,), done)


def _zeros(to: Path, named: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Write a safetensors file of float32 zeros; holes take no space."""
    header, at = {}, 0
    for name, tensor in named.items():
        end = at + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with to.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return read_header(to)


@dataclass
class Tally:
    """What dampening met, in entries.

    Attributes:
        entries: All that could be dampened.
        dampened: Those that were.
        zeroed: Of these, those that no batch of D touches and that became 0.
        untouched: Those with the ratio 0 / 0: no batch touches them.
        vectors: Entries of tensors of one dimension (norm gains, biases).
        vectors_dampened: Of these, those that were dampened.
    """

    entries: int = 0
    dampened: int = 0
    zeroed: int = 0
    untouched: int = 0
    vectors: int = 0
    vectors_dampened: int = 0

    def facts(self) -> dict[str, Any]:
        """Return what the record keeps."""
        return {**vars(self), "share_dampened": self.dampened / max(1, self.entries)}


@torch.no_grad()
def dampen(
    weight: Tensor,
    forget_N: Float[Tensor, " N"],
    full_N: Float[Tensor, " N"],
    tally: Tally,
    *,
    alpha: float,
    lam: float = 1.0,
) -> None:
    """Multiply weights by min(lam I_D / I_f, 1) where I_f > alpha I_D, in place.

    Args:
        weight: The parameter; its entries lie in one piece.
        forget_N: I_f, on the CPU.
        full_N: I_D.
        tally: Told what happened.
        alpha: Selection.
        lam: Dampening.

    Source:
        Equations 4 and 5 of arXiv 2308.07707, as `modify_weight` of the released code computes
        them.
    """
    flat_N, before = weight.view(-1), tally.dampened
    for w, f, d in zip(
        flat_N.split(CHUNK), forget_N.split(CHUNK), full_N.split(CHUNK), strict=True
    ):
        chosen = f > d * alpha
        factor = (d[chosen] * lam / f[chosen]).clamp_(max=1)
        chosen = chosen.to(w.device)
        w[chosen] = (w[chosen].float() * factor.to(w.device)).to(w.dtype)
        tally.dampened += factor.numel()
        tally.zeroed += int((factor == 0).sum())
        tally.untouched += int(((f == 0) & (d == 0)).sum())
    tally.entries += flat_N.numel()
    if weight.dim() < 2:
        tally.vectors += flat_N.numel()
        tally.vectors_dampened += tally.dampened - before


def dampen_model(
    model: nn.Module, forget: Sums, full: Sums, *, alpha: float, lam: float = 1.0
) -> Tally:
    """Dampen a model in place, tensor by tensor.

    Args:
        model: The model the sums were taken of.
        forget: Sums over D_f.
        full: Sums over D.
        alpha: Selection.
        lam: Dampening.
    """
    tally, named = Tally(), parameters_by_name(model)
    for name in forget.shapes:
        weight = named[name].data
        dampen(weight, forget.importance(name), full.importance(name), tally, alpha=alpha, lam=lam)
    return tally


class SortedRatios:
    """I_f / I_D of every weight above a floor, sorted tensor by tensor, in files.

    What lies above a threshold is then looked up, in all tensors together, and so is the threshold
    above which a number of weights lies. Of ratios up to the floor only their number is kept: with
    the floor at lambda, dampening leaves those weights as they are.

    Attributes:
        finite: Number of finite ratios.
        infinite: Number of weights that D_f touches and D does not: they lie above every threshold.
    """

    def __init__(
        self,
        forget: Sums,
        full: Sums,
        folder: Path,
        *,
        floor: float = 1.0,
        names: Sequence[str] | None = None,
    ) -> None:
        """Sort the ratios of one tensor after another.

        Args:
            forget: Sums over D_f.
            full: Sums over D.
            folder: Where the files go; emptied first.
            floor: Ratios up to it are not kept.
            names: The parameters; None for all.
        """
        self.floor, self.finite, self.infinite = floor, 0, 0
        self._runs: dict[str, tuple[Any, Any]] = {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for number, name in enumerate(forget.shapes if names is None else names):
            ratio_N = forget.importance(name).div_(full.importance(name))  # 0 / 0 is NaN
            endless = int(ratio_N.isinf().sum())
            self.finite += int(ratio_N.isfinite().sum())
            self.infinite += endless
            index_K = (ratio_N > floor).nonzero().flatten()
            falling_K, order_K = ratio_N[index_K].sort(descending=True, stable=True)
            paths = folder / f"{number}-ratio.npy", folder / f"{number}-index.npy"
            np.save(paths[0], -falling_K.numpy())  # rising, as searchsorted wants it
            np.save(paths[1], index_K[order_K].numpy())
            self._runs[name] = tuple(np.load(p, mmap_mode="r") for p in paths)

    def above(self, threshold: float) -> dict[str, int]:
        """Return how many ratios lie above a threshold, by parameter; at least the floor counts."""
        at = np.float32(-max(threshold, self.floor))
        return {name: int(rising.searchsorted(at)) for name, (rising, _) in self._runs.items()}

    def threshold(self, percentile: float) -> float:
        """Return a percentile of the finite ratios, at least the floor.

        It is interpolated as `numpy.percentile` does.

        Raises:
            UserError: If there is no finite ratio.
        """
        if not self.finite:
            raise UserError("no batch touches any weight, so that there is nothing to dampen")
        at = (self.finite - 1) * max(0.0, percentile) / 100
        low = math.floor(at)
        lower = self._finite(self.finite - 1 - low)
        if lower <= self.floor:
            return self.floor
        upper = self._finite(max(0, self.finite - 2 - low))
        return lower + (upper - lower) * (at - low)

    def ranked(self, count: int) -> float:
        """Return the least threshold above which at most `count` weights lie, by bisection."""
        low, high = _bits(self.floor), _bits(math.inf) - 1
        while low < high:  # the least value above which there are at most so many
            middle = (low + high) // 2
            if sum(self.above(_value(middle)).values()) <= count:
                high = middle
            else:
                low = middle + 1
        return _value(low)

    def _finite(self, rank: int) -> float:
        """Return the finite ratio above which `rank` finite ones lie; the floor where none does."""
        return self.ranked(self.infinite + rank)

    def between(self, name: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return positions and ratios of a parameter's weights from one rank to another.

        Args:
            name: The parameter.
            start: First rank, from the largest ratio.
            stop: Rank after the last.
        """
        rising, index = self._runs[name]
        return (
            torch.from_numpy(index[start:stop].copy()),
            torch.from_numpy(-rising[start:stop]),
        )


def _bits(value: float) -> int:
    """Return a float32 as an integer; positive ones keep their order."""
    return int(np.float32(value).view(np.int32))


def _value(bits: int) -> float:
    """Return the float32 of such an integer."""
    return float(np.int32(bits).view(np.float32))


# -- language models -------------------------------------------------------------------------------

Kind = Literal["nll", "squared_logits", "logits"]
"""What is differentiated: the loss, the mean squared length of the logits, or their mean length."""


@dataclass(frozen=True)
class MeasureImportance(Stage[Sums]):
    """Folded gradients of a model over rows, each read once, in their order.

    A killed one starts again: it is one pass over the rows.

    Attributes:
        start: The model.
        examples: Encoded rows.
        kind: What is differentiated; of the loss squares are summed, else absolute values.
        batch_size: Rows of a batch. Sums are over gradients of batches, so it matters.
        modules: Parameters that are measured; empty for all.
    """

    data_parallel: ClassVar[bool] = True

    start: Checkpoint
    examples: tuple[Example, ...] = field(metadata={"identity": examples_identity})
    kind: Kind
    batch_size: int
    modules: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return f"importance-{self.kind}"

    def make(self, ctx: Context) -> None:
        """Write the sums of every process's share of the batches."""
        model = self.start.load(dtype=ctx.dtype, device=ctx.device)
        tokenizer = self.start.tokenizer()
        starts = range(0, len(self.examples), self.batch_size)
        mine = starts[ctx.rank :: ctx.world]

        def batches() -> Iterable[Batch]:
            for i, at in enumerate(mine):
                examples = self.examples[at : at + self.batch_size]
                yield collate(examples, pad_id=tokenizer.pad_token_id or 0).to(ctx.device)
                ctx.emit("step", {"stage": self.name, "step": i + 1, "steps": len(mine)})

        with trainable(model, self.modules or ("*",)):
            loss = batch_loss(model, self.kind)
            fold: Literal["square", "abs"] = "square" if self.kind == "nll" else "abs"
            accumulate(model, batches(), loss, ctx.work / _file(ctx.rank), fold=fold)
        barrier(ctx)
        if ctx.rank == 0:
            for path in ctx.work.glob("sums-*"):  # of more processes, of which one was killed
                if path.name not in map(_file, range(ctx.world)):
                    path.unlink()
            tokens = sum(len(example.ids) for example in self.examples)
            facts = {"batches": len(starts), "tokens": tokens, "world": ctx.world}
            write_text(ctx.work / "sums.json", json.dumps(facts))
        barrier(ctx)

    def read(self, folder: Path) -> Sums:
        """Return the sums of all processes."""
        facts = json.loads((folder / "sums.json").read_text(encoding="utf-8"))
        files = tuple(folder / _file(rank) for rank in range(facts["world"]))
        return Sums(files, facts["batches"], facts["tokens"])


def drop_ratios(ctx: Context) -> None:
    """Remove the folders `ratios-RANK` of this process, and those that a killed run had more."""
    for folder in ctx.work.glob("ratios-*"):
        if int(folder.name.removeprefix("ratios-")) % ctx.world == ctx.rank:
            shutil.rmtree(folder)


def _file(rank: int) -> str:
    """Return the file of a process's sums."""
    return f"sums-{rank}.safetensors"


def batch_loss(model: nn.Module, kind: Kind) -> Callable[[nn.Module, Batch], Tensor]:
    """Return the mean of what is differentiated over the positions that predict scored tokens.

    Lengths of logits are taken without the logits (`head_norm`) where the head is a matrix alone.

    Args:
        model: A causal model whose head stays as it is.
        kind: What is differentiated.
    """
    if kind == "nll":

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            total, count = nll(logits_of(model, batch), batch)
            return total / count

        return loss
    squared = kind == "squared_logits"
    head = head_of(model)
    if head.softcap is not None or head.bias_V is not None:

        def norm(model: nn.Module, batch: Batch) -> Tensor:
            at_BT = predicting(batch.target_BT)
            total, count = logit_norm(logits_of(model, batch), at_BT, squared=squared)
            return total / count

        return norm
    weight_VD = head.weight_VD
    gram_DD = _gram(weight_VD.detach())
    scale = head.scale**2 if squared else abs(head.scale)

    def form(model: nn.Module, batch: Batch) -> Tensor:
        hidden_ND = final_hidden(model, batch.inputs)[predicting(batch.target_BT)]
        total, count = head_norm(hidden_ND, weight_VD, gram_DD, squared=squared)
        return scale * total / count

    return form


def _gram(weight_VD: Tensor) -> Tensor:
    """Return W^T W in float32, without a float32 copy of W."""
    gram_DD = weight_VD.new_zeros(weight_VD.shape[1], weight_VD.shape[1], dtype=torch.float32)
    for part_ND in weight_VD.split(4096):
        gram_DD += part_ND.float().T @ part_ND.float()
    return gram_DD


class ImportanceMethod(PostHoc):
    """The settings of a method that dampens weights by their importance."""

    name: str
    batch_size: int = Field(default=8, ge=1)
    """Rows of a batch. Its gradient is squared as a whole, so other sizes choose other weights."""
    max_length: int = Field(default=512, ge=2)
    """Tokens per row."""
    against: Literal["all", "retain"] = "all"
    """What I_D is measured on: forget and retain rows, or retain rows alone."""
    modules: Names = ()
    """Modules to dampen, by name; empty for all."""
    vectors: bool = True
    """Whether norm gains and biases are dampened too; a few of them gone can break a model."""

    refuses: ClassVar[Mapping[str, str]] = {
        "lora": "dampening multiplies the model's own weights; an adapter has none to dampen",
        **dict.fromkeys(
            ("stop", "fit", "sam", "drop_components"),
            "rows are read once and weights dampened in closed form, so that there are no steps",
        ),
    }

    @property
    def readings(self) -> float:
        """One pass forward and back over all rows."""
        return 1.0

    def measured(
        self, kind: Kind, start: Checkpoint, domain: Domain, ctx: Context
    ) -> tuple[Sums, Sums]:
        """Return sums over D_f and over D; measured once for all settings of selection.

        Raises:
            UserError: If there is no row to forget, or none to retain.
        """
        if not domain.retain:
            raise UserError(
                f"{self.name} compares forget rows with retain rows, and domain '{domain.name}' "
                "has none to retain; give --retain"
            )
        tokenizer = start.tokenizer()
        forget, retain = (
            ctx.run(
                MeasureImportance(
                    start,
                    tuple(encode(rows, tokenizer, max_length=self.max_length, only_spans=True)),
                    kind,
                    self.batch_size,
                    self.modules,
                )
            )
            for rows in (forget_rows(domain), domain.retain)
        )
        return forget, forget + retain if self.against == "all" else retain

    def names(self, sums: Sums) -> list[str]:
        """Return the parameters that may be dampened, of those that were measured."""
        return [n for n, shape in sums.shapes.items() if self.vectors or len(shape) > 1]


def check_alpha(method: ImportanceMethod, alpha: float, domain: Domain) -> None:
    """Refuse, before anything is measured, a selection that can choose nothing.

    Where D holds D_f, I_D is at least |D_f| / |D| I_f, so that no ratio exceeds |D| / |D_f|.

    Args:
        method: Gives D and the rows of a batch.
        alpha: The selection.
        domain: Rows by role.

    Raises:
        UserError: If alpha is as large, or there is no row to forget.
    """
    forget, retain = (
        math.ceil(len(rows) / method.batch_size) for rows in (forget_rows(domain), domain.retain)
    )
    most = (forget + retain) / forget
    if retain and method.against == "all" and alpha >= most:
        raise UserError(
            f"{method.name}: alpha {alpha:g} selects nothing: forget rows are 1/{most:.3g} of all "
            f"batches, and no weight can be more than {most:.3g} times as important to them as to "
            "all; set alpha below that, or against to 'retain'"
        )


def share_of(domain: Domain) -> float:
    """Return |D_f| / |D| in rows."""
    forget = len(forget_rows(domain))
    return forget / (forget + len(domain.retain))


def percentile_of(share: float) -> float:
    """Return the percentile of relative importances from which on weights are dampened.

    Args:
        share: |D_f| / |D|.

    Source:
        Adaptive SSD, arXiv 2402.10098.
    """
    return 100 - math.log(1 + 100 * share)


def dampened(
    method: ImportanceMethod,
    start: Checkpoint,
    forget: Sums,
    full: Sums,
    ctx: Context,
    *,
    alpha: float,
    lam: float,
    began: float,
    extras: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, float]] = (),
    more: Cost | None = None,
) -> Removal:
    """Dampen a model on disk, tensor by tensor, and write what differs.

    Args:
        method: Says which tensors.
        start: The model.
        forget: Sums over D_f.
        full: Sums over D.
        ctx: Gives the folder, and says which process writes.
        alpha: Selection.
        lam: Dampening.
        began: When the method began, by `time.monotonic`.
        extras: Further facts for the record.
        history: What was tried.
        more: What a search took beside.
    """
    tally, changed, parts = Tally(), dict[str, Tensor](), []
    for name in method.names(forget):
        before = start.weights_of([name])
        weight = before[name].clone()
        dampen(weight, forget.importance(name), full.importance(name), tally, alpha=alpha, lam=lam)
        parts.append(moved(before, {name: weight}))
        if not torch.equal(weight, before[name]):
            changed[name] = weight
    model = write_model(start, changed, ctx)
    if tally.vectors_dampened:
        of = f"{tally.vectors_dampened:,} of {tally.vectors:,} entries of norm gains and biases"
        ctx.emit("note", {"text": f"{method.name} dampened {of}"})
    read = full if method.against == "all" else forget + full
    flops, seconds = 6.0 * start.num_parameters * read.tokens, time.monotonic() - began
    cost = Cost(0, read.tokens, flops, seconds)
    return Removal(
        model,
        tuple(sorted(changed)),
        cost if more is None else cost + more,
        {
            "alpha": alpha,
            "lambda": lam,
            "dampening": tally.facts(),
            **together(parts),
            **(extras or {}),
        },
        tuple(history),
    )
