"""What is trained and what steps it: slices of parameters, master weights, optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from excise.core.errors import UserError
from excise.core.plugins import import_bitsandbytes

OptimizerName = Literal["adamw", "adamw_8bit", "hf_adamw", "sgd", "schedule_free"]


class HFAdamW(torch.optim.Optimizer):
    """AdamW as `transformers` had it until 4.50: eps before the bias correction, decay last.

    With its eps of 1e-6, small gradients move weights by far less than the learning rate at first,
    so that an algorithm published with it is another one under torch's AdamW.

    Source:
        `transformers.AdamW` of 4.38.2 (Apache-2.0), which RMU's released loop steps with:
        centerforaisafety/wmdp@bc5e1ba (MIT), rmu/unlearn.py.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        """Prepare to step `params`; what a setting means is as in `torch.optim.AdamW`."""
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every tensor that has a gradient; a closure is not taken."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step(weight, weight.grad, self.state[weight], group)

    def _step(self, weight: Tensor, grad: Tensor, state: Any, group: dict[str, Any]) -> None:
        """Step one tensor."""
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        (beta1, beta2), lr, step = group["betas"], group["lr"], int(state["step"])
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.mul_(beta1).add_(grad, alpha=1.0 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        size = lr * math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)
        weight.addcdiv_(first, second.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            weight.add_(weight, alpha=-lr * group["weight_decay"])


def make_optimizer(
    name: OptimizerName,
    weights: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Return an optimizer; a tensor without a gradient is not touched, not even by weight decay.

    On a CPU torch's own step one tensor at a time: that is the form whose bits recorded numbers
    rest on. There `foreach` gives the same bits and needs another copy of the second moments, and
    `fused` rounds otherwise. On CUDA they are fused: one kernel in the place of ten a tensor.

    Args:
        name: Which rule.
        weights: What it steps.
        lr: Learning rate of the first step.
        betas: Decay rates of Adam's moments.
        eps: Adam's epsilon.
        weight_decay: Decoupled for the AdamWs, added to the gradient for SGD.

    Raises:
        UserError: If the package of the optimizer is not installed.
    """
    fused = all(weight.is_cuda for weight in weights)
    if name == "sgd":
        return torch.optim.SGD(
            weights, lr=lr, weight_decay=weight_decay, foreach=False, fused=fused
        )
    if name == "adamw_8bit":
        return _adamw_8bit(weights, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    if name == "hf_adamw":
        return HFAdamW(weights, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    if name == "schedule_free":
        return _schedule_free(weights, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    return torch.optim.AdamW(
        weights, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False, fused=fused
    )


def _adamw_8bit(weights: Sequence[Tensor], **settings: Any) -> torch.optim.Optimizer:
    """Return AdamW whose moments are bytes, scaled by blocks of 256 (Dettmers et al. 2022).

    Tensors of fewer than 4,096 entries keep float32 moments. Source: arXiv:2110.02861.

    Raises:
        UserError: If bitsandbytes is missing, or a tensor is a part of a larger one, which its
            kernels would copy and step beside the model.
    """
    package = import_bitsandbytes()
    if package is None:
        raise UserError(
            "the optimizer 'adamw_8bit' needs the package bitsandbytes; install it with: "
            "pip install 'excise[bitsandbytes]', or set fit.optimizer to adamw"
        )
    if not all(weight.is_contiguous() for weight in weights):
        raise UserError(
            "the optimizer 'adamw_8bit' steps whole parameters, and this method trains slices of "
            "them; set fit.optimizer to adamw"
        )
    return package.optim.AdamW8bit(weights, **settings)  # type: ignore[no-any-return]


TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""What all 8-bit states share: the values that the bytes of either moment stand for."""


def moments_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Return what an optimizer remembers of every tensor it has stepped, by number and name."""
    weights = optimizer.param_groups[0]["params"]
    return {
        i: {name: torch.as_tensor(v) for name, v in state.items() if name not in TABLES}
        for i, weight in enumerate(weights)
        if (state := optimizer.state.get(weight))
    }


def put_moments(optimizer: torch.optim.Optimizer, moments: dict[int, dict[str, Tensor]]) -> None:
    """Give a fresh optimizer what `moments_of` returned of another."""
    tables = getattr(optimizer, "name2qmap", None)
    if tables is None:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return
    eight: Any = optimizer
    eight.fill_qmap()
    for i, weight in enumerate(optimizer.param_groups[0]["params"]):
        state = {name: value.to(weight.device) for name, value in moments.get(i, {}).items()}
        if not state:
            continue
        if state["state1"].dtype == torch.uint8:
            state |= {name: tables[kind].to(weight.device) for name, kind in TABLES.items()}
        optimizer.state[weight] = {**state, "step": int(state["step"])}


def _schedule_free(weights: Sequence[Tensor], **settings: Any) -> torch.optim.Optimizer:
    """Return schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682), ready to train.

    While it trains the weights are the point y at which it wants gradients; `eval()` puts them at
    x, the average it stands for. Warm-up is the caller's: it sets the learning rate.
    """
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError:
        raise UserError(
            "the optimizer 'schedule_free' needs the package schedulefree; install it with: "
            "pip install 'excise[schedule-free]', or set fit.optimizer to adamw"
        ) from None
    optimizer: Any = AdamWScheduleFree(weights, foreach=False, **settings)
    optimizer.train()
    return optimizer  # type: ignore[no-any-return]


def schedule_share(
    step: int,
    steps: int,
    *,
    warmup: int,
    schedule: Literal["constant", "linear", "cosine"],
    min_lr: float,
) -> float:
    """Return the share of the learning rate used at `step`.

    Warm-up rises to the full rate at its last step, so that no step is wasted at rate 0; what
    follows falls from 1 towards `min_lr`, which it would reach at `steps`.

    Args:
        step: Step, from 0.
        steps: Steps in all.
        warmup: Steps of warm-up.
        schedule: Shape after warm-up.
        min_lr: Share reached at the end.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return min_lr + (1 - min_lr) * (1 - progress)
    return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, eq=False)
class Slice:
    """Entries `start` to `stop` of a parameter along one dimension.

    Attributes:
        param: The parameter.
        dim: Dimension that is sliced; None for the whole parameter.
        start: First entry.
        stop: Entry after the last.
    """

    param: nn.Parameter
    dim: int | None
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of this slice in a tensor of the parameter's shape.

        Of one that is cut over processes by rows, it is the rows of the slice that lie here.
        """
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
            if self.dim == 0:
                first, last = self.rows
                offset = self._held[0]
                return tensor.narrow(0, first - offset, last - first)
        if self.dim is None:
            return tensor
        return tensor.narrow(self.dim, self.start, self.stop - self.start)

    @property
    def cut(self) -> bool:
        """Whether the parameter is cut over processes."""
        return isinstance(self.param, DTensor)

    @property
    def viewed(self) -> bool:
        """Whether what is stepped is a view of the parameter and not the parameter itself."""
        return self.dim is not None or self.cut

    @property
    def rows(self) -> tuple[int, int]:
        """Rows of the parameter that the part of the slice in this process spans."""
        begin, end = self._held
        if self.dim != 0:
            return begin, end
        first = min(max(self.start, begin), end)
        return first, max(first, min(self.stop, end))

    @property
    def _held(self) -> tuple[int, int]:
        """Rows of a cut parameter that lie in this process, as `torch.chunk` deals them."""
        mesh, count = self.param.device_mesh, self.param.shape[0]  # type: ignore[attr-defined]
        each, rank = -(-count // mesh.size()), mesh.get_local_rank()
        return min(count, rank * each), min(count, (rank + 1) * each)

    def whole(self, part: Tensor) -> Tensor:
        """Return what a tensor of this process's part of the slice is over all processes.

        Numbers that are no part of it, such as an optimizer's count of steps, stay as they are.
        """
        if not self.cut or part.dim() == 0:
            return part
        group = self.param.device_mesh.get_group()  # type: ignore[attr-defined]
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, part.detach().cpu(), group=group)
        return torch.cat(parts)

    def here(self, whole: Tensor) -> Tensor:
        """Return this process's part of what `whole` returned."""
        if not self.cut or whole.dim() == 0:
            return whole
        first, last = self.rows
        start = self.start if self.dim == 0 else 0
        return whole[first - start : last - start]

    @property
    def inside(self) -> bool:
        """Whether it holds an entry and none beyond the parameter."""
        shape = self.param.shape
        return self.dim is None or (
            0 <= self.dim < len(shape) and 0 <= self.start < self.stop <= shape[self.dim]
        )

    @property
    def key(self) -> tuple[int, int | None, int, int]:
        """What tells one slice from another."""
        return (id(self.param), self.dim, self.start, self.stop)

    @property
    def shape(self) -> list[int]:
        """Shape of the whole parameter, followed by the slice where it is not whole."""
        span = [] if self.dim is None else [self.dim, self.start, self.stop]
        return [*self.param.shape, *span]

    def overlaps(self, other: Slice) -> bool:
        """Return whether two slices of one parameter have an entry in common."""
        if self.dim is None or other.dim is None or self.dim != other.dim:
            return True
        return self.start < other.stop and other.start < self.stop


@dataclass
class OptimizerGroup:
    """Parameters, or slices of them, that are stepped together with an optimizer of their own.

    Attributes:
        name: Name of the group.
        slices: Which parameters of the model, or which slices of them.
        master_weights: What the optimizer steps: the parameters, views of them, or float32
            copies of half-precision ones.
        optimizer: Steps them.
        lr: Learning rate before the schedule.
    """

    name: str
    slices: Sequence[Slice]
    master_weights: Sequence[Tensor]
    optimizer: torch.optim.Optimizer
    lr: float

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters of the model, whole, one for each master weight."""
        return [part.param for part in self.slices]

    def parts(self) -> list[tuple[Slice, Tensor]]:
        """Return the master weights with what they stand for."""
        return list(zip(self.slices, self.master_weights, strict=True))

    def copies(self) -> list[tuple[Slice, Tensor]]:
        """Return the master weights that have memory of their own, with what they stand for."""
        return [(part, weight) for part, weight in self.parts() if weight.dtype != part.param.dtype]

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the master weights into the model's parameters."""
        for part, weight in self.copies():
            part.of(part.param).copy_(weight)

    def settle(self) -> None:
        """Put the weights where the optimizer means them to be used: a schedule-free average."""
        evaluate = getattr(self.optimizer, "eval", None)
        if evaluate is not None:
            evaluate()
            self.copy_to_model()

    def step(self, lr: float) -> None:
        """Step once at a learning rate, and drop the gradients."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.copy_to_model()
        for part, weight in zip(self.slices, self.master_weights, strict=True):
            part.param.grad = weight.grad = None

    @torch.no_grad()
    def step_one(self, i: int) -> None:
        """Step one master weight, the only one that has a gradient, and drop that."""
        self.optimizer.step()
        part, weight = self.slices[i], self.master_weights[i]
        if weight.dtype != part.param.dtype:
            part.of(part.param).copy_(weight)
        part.param.grad = weight.grad = None
