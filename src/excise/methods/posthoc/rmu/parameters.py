"""Which parameters RMU trains, found by name; slices where experts are fused into one tensor.

The released code picks tensors by position, which is the MLP's down-projection in Llama and
Mistral, the first expert's up-projection in Mixtral, and any other tensor elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.methods.tuning import tuned
from excise.models.anatomy import Anatomy, Backbone, BlockExperts, anatomy, backbone
from excise.models.checkpoint import Checkpoint
from excise.models.lora import READ_BY_KERNELS, LoRA, reference
from excise.models.names import modules_by_name, select
from excise.models.spec import Model
from excise.models.structure import sizes

Index = tuple[int | slice, ...]
"""An index into a tensor."""


@dataclass(frozen=True)
class TargetParameters:
    """What a run of RMU trains, and the block it steers.

    Attributes:
        parts: Backbone of the whole model.
        layer: Block whose output is steered.
        names: Trained tensors by canonical name, in the model's order.
        slices: For a tensor of which only a part is trained, which part.
        first: First block that holds a trained tensor.
        attention: The attention of block `first` where all that is trained in that block lies in
            its MLP, so that it puts out the same in every step; empty elsewhere, and where a
            block is not known to be attention and MLP.
        entries: Trained entries.
        whole: Entries of the trained tensors with those that are not trained.
    """

    parts: Backbone
    layer: int
    names: tuple[str, ...]
    slices: Mapping[str, Index]
    first: int
    attention: str
    entries: int
    whole: int

    @property
    def steered(self) -> str:
        """Path of the steered block."""
        return self.parts.blocks[self.layer]

    @property
    def printed(self) -> tuple[str, ...]:
        """Names with their slices as one would type them, such as `[0, 64:128]`."""
        return tuple(n + _typed(self.slices[n]) if n in self.slices else n for n in self.names)


def _typed(index: Index) -> str:
    """Return an index as one would type it."""
    parts = [
        str(i)
        if isinstance(i, int)
        else f"{'' if i.start is None else i.start}:{'' if i.stop is None else i.stop}"
        for i in index
    ]
    return f"[{', '.join(parts)}]"


def find_target_parameters(
    start: Checkpoint,
    layer: int,
    *,
    blocks: Sequence[int] = (),
    modules: Sequence[str] = (),
    matrix: Literal["down", "up"] = "down",
    experts: Literal["first", "all"] = "first",
) -> TargetParameters:
    """Find what is trained; nothing but headers is read.

    Args:
        start: The model.
        layer: Block whose output is steered.
        blocks: Blocks whose MLP matrix is trained; empty for `layer` and the two below it.
        modules: Modules or parameters by name, instead of `blocks`.
        matrix: Which matrix of the MLP.
        experts: Of a mixture of experts, which.

    Raises:
        UserError: If a block is beyond the model, a name matches nothing, or something trained
            lies above the steered block.
    """
    model = start.shapes
    parts, whole = _parts(model, layer, by_name=bool(modules))
    chosen = tuple(blocks) or tuple(range(max(0, layer - 2), layer + 1))
    for block in (layer, *chosen):
        if not 0 <= block < parts.num_blocks:
            raise UserError(
                f"rmu: block {block} is beyond this model, which has blocks 0 to "
                f"{parts.num_blocks - 1}; set 'layer' or 'sweep.layer' (and 'blocks') lower"
            )
    if modules:
        names, slices = select(model, modules), dict[str, Index]()
    else:
        assert whole is not None, "without modules the anatomy is known"
        matrices: dict[str, Index | None] = {}
        for block in sorted(set(chosen)):
            matrices |= _matrices(model, whole, block, matrix, experts)
        names = [n for n in dict(model.named_parameters()) if n in matrices]
        slices = {n: index for n, index in matrices.items() if index is not None}
    first, attention = _first_block(parts, whole, layer, names)
    sizes = {n: torch.empty(model.get_parameter(n).shape, device="meta") for n in names}
    return TargetParameters(
        parts=parts,
        layer=layer,
        names=tuple(names),
        slices=slices,
        first=first,
        attention=attention,
        entries=sum(t[slices[n]].numel() if n in slices else t.numel() for n, t in sizes.items()),
        whole=sum(t.numel() for t in sizes.values()),
    )


def _parts(model: Model, layer: int, *, by_name: bool) -> tuple[Backbone, Anatomy | None]:
    """Return the backbone, and the anatomy where blocks are attention and MLP.

    Raises:
        UserError: If there is no list of blocks, or what is trained was to be found and cannot be.
    """
    try:
        whole = anatomy(model)
        return whole, whole
    except UserError as error:
        reason = error
    try:
        parts = backbone(model)
    except UserError as error:
        raise UserError(
            f"rmu: {error}; rmu needs a list of blocks and grad_diff none, so use grad_diff"
        ) from None
    if by_name:
        return parts, None
    block = parts.blocks[min(layer, parts.num_blocks - 1)]
    inside = [
        n for n, m in modules_by_name(model).items() if n.startswith(f"{block}.") and sizes(m)
    ]
    free = [n for n in inside if n.rpartition(".")[2] not in READ_BY_KERNELS]  # or an adapter fails
    raise UserError(
        f"rmu: {reason}; name what is trained, as with "
        f"--modules '[{(free or inside or [block])[-1]}]', or "
        "use grad_diff, which needs no parts"
    )


def _first_block(
    parts: Backbone, whole: Anatomy | None, layer: int, names: Sequence[str]
) -> tuple[int, str]:
    """Return the first trained block, and its attention if its MLP holds all that is trained in it.

    Raises:
        UserError: If gradients do not reach a name, or it is the embedding.
    """
    block_of: dict[str, int] = {}
    for name in names:
        inside = [i for i, b in enumerate(parts.blocks) if name.startswith(b + ".")]
        block_of[name] = inside[0] if inside else -1
        if block_of[name] > layer or (not inside and not name.startswith(parts.embed + ".")):
            raise UserError(
                f"rmu: '{name}' lies above block {layer}, whose output is steered, so no gradient "
                f"reaches it; name modules of blocks 0 to {layer}"
            )
    first = min(block_of.values())
    if first < 0:
        raise UserError(f"rmu: '{names[0]}' is the embedding; name modules inside the blocks")
    if whole is None:
        return first, ""
    mlp = whole.mlp[first] + "."
    alone = all(n.startswith(mlp) for n in names if block_of[n] == first)
    return first, whole.attention[first] if alone else ""


def _matrices(
    model: nn.Module, parts: Anatomy, block: int, matrix: str, experts: str
) -> dict[str, Index | None]:
    """Return the matrices of one block's MLP by name, with the slice that is trained."""
    mixture = parts.experts[block]
    if mixture is not None:
        return _expert_matrices(mixture, matrix, experts)
    path = parts.mlp_down[block] if matrix == "down" else parts.mlp_up[block]
    named = {n: p for n, p in model.named_parameters() if n.startswith(path + ".")}
    (name,) = (n for n, p in named.items() if p.dim() == 2)
    if matrix == "down" or not parts.slices:
        return {name: None}
    return {name: _up_rows(parts.slices, parts.transposed)}


def _up_rows(slices: Mapping[str, tuple[int, int]], transposed: bool) -> Index:
    """Return the part of a fused matrix that is the up-projection."""
    up = slice(*slices["mlp_up"])
    return (slice(None), up) if transposed else (up,)


def _expert_matrices(mixture: BlockExperts, matrix: str, experts: str) -> dict[str, Index | None]:
    """Return the matrices of a mixture's experts, or of the first alone."""
    weights = mixture.down if matrix == "down" else mixture.up
    fused = matrix == "up" and mixture.slices
    rows = _up_rows(mixture.slices, mixture.transposed) if fused else ()
    if experts == "all":
        if weights[0].index is not None and rows:
            return {weights[0].parameter: (slice(None), *rows)}
        return {w.parameter: None for w in weights}
    if weights[0].index is None:
        return {weights[0].parameter: rows or None}
    return {weights[0].parameter: (weights[0].index, *rows)}


@contextmanager
def _gradients_inside(
    parameters: Mapping[str, nn.Parameter], slices: Mapping[str, Index]
) -> Iterator[None]:
    """Let gradients reach only the given parts of tensors while the block runs.

    Args:
        parameters: Trained parameters by name.
        slices: Parts by name.
    """

    def inside(index: Index) -> object:
        def hook(grad: Tensor) -> Tensor:
            out = torch.zeros_like(grad)
            out[index] = grad[index]
            return out

        return hook

    handles = [parameters[n].register_hook(inside(index)) for n, index in slices.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _swapped(
    parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]
) -> Iterator[None]:
    """Give parameters other values while the block runs; nothing is copied.

    Args:
        parameters: Parameters by name.
        values: Their values meanwhile.
    """
    current = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = current[name]


@dataclass
class EditableModel:
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


@contextmanager
def editing(
    model: nn.Module, targets: TargetParameters, lora: LoRA | None, ctx: Context
) -> Iterator[EditableModel]:
    """Let the target parameters, or an adapter on their modules, be trained in the block.

    Args:
        model: The model.
        targets: What is trained.
        lora: An adapter instead.
        ctx: Gives the adapter's seed.
    """
    with ExitStack() as stack:
        net, parameters = stack.enter_context(tuned(model, targets.names, lora, ctx))
        if lora is not None:
            yield EditableModel(net, parameters, {}, partial(reference, net))
            return
        stack.enter_context(_gradients_inside(parameters, targets.slices))
        saved = {name: p.detach().clone() for name, p in parameters.items()}
        yield EditableModel(net, parameters, saved, partial(_swapped, parameters, saved))


def flops_per_token(targets: TargetParameters, start: Checkpoint, engine: str) -> float:
    """Estimate FLOPs per token read, half of the tokens being retain text.

    Forward costs 2 per weight; retain text passes the frozen model too. Backward costs 2 per
    weight above the first trained block and 2 per trained weight.

    Args:
        targets: What is trained.
        start: The model.
        engine: Which blocks run: all with `full`, none below the first trained one with `cached`.
    """
    sizes = [0] * targets.parts.num_blocks
    for name, p in start.layout.model.named_parameters():
        for i, block in enumerate(targets.parts.blocks):
            if name.startswith(block + "."):
                sizes[i] += p.numel()
    tail = sum(sizes[targets.first : targets.layer + 1])
    backward = 2.0 * tail + 2.0 * targets.entries
    if engine == "full":
        return 1.5 * 2.0 * start.num_parameters + backward
    prefix = 0 if engine == "cached" else sum(sizes[: targets.first])
    return 2.0 * prefix + 1.5 * 2.0 * tail + backward


def of_slices(facts: Mapping[str, Any], targets: TargetParameters) -> dict[str, Any]:
    """Return what `moved` says, with entries that are not trained left out."""
    if not targets.slices:
        return dict(facts)
    share = facts["share_moved"] * targets.whole / targets.entries
    return {**facts, "share_moved": share, "trained_entries": targets.entries}
