"""The matrix that turns hidden states into logits, and the hidden states that go into it.

Shape legend: B rows, T tokens, N tokens of any batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.models.anatomy import backbone
from excise.models.hooks import active_stream, capture
from excise.models.names import find_module, unwrap
from excise.models.tiny import FAMILIES

if TYPE_CHECKING:
    from excise.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Head:
    """Everything between the last hidden state and the logits.

    The logits are `scale * (hidden @ weight.T + bias)`, and where there is a soft cap
    `cap * tanh(that / cap)`.

    Attributes:
        weight_VD: Output matrix; where it is tied it is the very embedding, so that gradients of
            both uses add up.
        bias_V: Output bias, or None.
        softcap: Soft cap of the logits (Gemma-2), or None.
        scale: Constant factor of the logits (Cohere, Granite).
    """

    weight_VD: Float[Tensor, "V D"]
    bias_V: Float[Tensor, " V"] | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the soft cap, by which logits are divided."""
        if self.softcap is not None and not self.softcap > 0:
            raise UserError(f"the soft cap of a head must be more than 0, not {self.softcap}")

    @property
    def vocab(self) -> int:
        """Number of tokens it tells apart."""
        return int(self.weight_VD.shape[0])

    def logits(self, hidden_ND: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """Return all logits at once, as the model itself does."""
        bias = None if self.bias_V is None else self.bias_V.to(hidden_ND.dtype)
        z = nn.functional.linear(hidden_ND, self.weight_VD.to(hidden_ND.dtype), bias) * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def detach(self) -> Head:
        """Return the head without gradients, as a teacher's."""
        bias = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, weight_VD=self.weight_VD.detach(), bias_V=bias)


def _settings(config: Any) -> dict[str, Any]:
    """Return soft cap and scale of the logits as the configuration names them."""
    cap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divided = float(getattr(config, "logits_scaling", None) or 1.0)
    return {"softcap": float(cap) if cap else None, "scale": scale / divided}


def head_of(model: nn.Module) -> Head:
    """Return the head of a causal model: live parameters, soft cap and scale.

    A family that the library is not tested on is asked for logits once, to see whether its head
    is really no more than this.

    Args:
        model: A `transformers` model, wrapped or not.

    Returns:
        The head; its tensors are the model's own.

    Raises:
        UserError: If the head carries an adapter, or does more than multiply, scale and cap.
    """
    parts = backbone(model)
    module = find_module(model, parts.head)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if hasattr(module, "base_layer") or not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UserError(
            f"the head '{parts.head}' of this {parts.family} model is no plain matrix; merge its "
            "adapter first, or use a loss on logits"
        )
    head = Head(weight, bias, **_settings(getattr(unwrap(model)[1], "config", None)))
    if parts.family not in {*FAMILIES, "gemma3_text"} and not _agrees(model, parts.head, head):
        raise UserError(
            f"the logits of this {parts.family} model are not its head times its last hidden "
            "state; use a loss on logits"
        )
    return head


@torch.no_grad()
def _agrees(model: nn.Module, path: str, head: Head) -> bool:
    """Return whether the model's logits on a few tokens are those of `head`."""
    caught: list[Tensor] = []
    handle = find_module(model, path).register_forward_pre_hook(
        lambda _module, args: caught.append(args[0])
    )
    # Not id 0 alone: where it pads, its embedding is zero and so is everything after it.
    ids_BT = torch.arange(1, 6, device=head.weight_VD.device)[None] % head.vocab
    try:
        given_BTV = model(input_ids=ids_BT).logits.float()
    finally:
        handle.remove()
    if len(caught) != 1:
        return False
    wrong = (given_BTV - head.logits(caught[0]).float()).abs().max()
    return bool(wrong <= 1e-2 * given_BTV.abs().max().clamp(min=1e-6))


def hidden_at(
    model: nn.Module,
    paths: Sequence[str],
    inputs: Mapping[str, Any],
    *,
    of: Literal["output", "input"] = "output",
) -> list[Float[Tensor, "B T D"]]:
    """Return what modules put out, or are given, with its graph where gradients are on.

    Args:
        model: A causal model, wrapped or not; no logits are made.
        paths: Canonical paths, such as the blocks of its `backbone`.
        inputs: Keyword arguments of its forward, such as `Batch.inputs`.
        of: Which side of the modules.
    """
    with capture(model, paths, of=of, grad=True) as seen:
        final_hidden(model, inputs)
    return [active_stream(seen[path][-1]) for path in paths]


def final_hidden(model: nn.Module, inputs: Mapping[str, Any]) -> Float[Tensor, "B T D"]:
    """Return what goes into the head: the output of the last norm, with its graph.

    The model's own forward runs, so wrappers and hooks do what they do; the head is given no
    rows, so that no logits are made.

    Args:
        model: A causal model, wrapped or not.
        inputs: Keyword arguments of its forward, such as `Batch.inputs`.

    Returns:
        `hidden_BTD`; `head_of(model).logits(hidden_BTD)` are the model's logits.
    """
    caught: list[Tensor] = []

    def catch(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        caught.append(args[0])
        return (args[0][:, :0], *args[1:])

    handle = find_module(model, backbone(model).head).register_forward_pre_hook(catch)
    try:
        model(**{"use_cache": False, **inputs})
    finally:
        handle.remove()
    assert len(caught) == 1, "the head ran more than once in a forward"
    return caught[0]


def head_of_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Head:
    """Return the head of a model on disk; of its weights only the head is read.

    Args:
        checkpoint: The model.
        dtype: Dtype of the weights in memory.
        device: Where they go.

    Returns:
        The head, without gradients.
    """
    parts = backbone(checkpoint.layout.model)
    module = find_module(checkpoint.layout.model, parts.head)
    names = [f"{parts.head}.weight"]
    if getattr(module, "bias", None) is not None:
        names.append(f"{parts.head}.bias")
    weights = checkpoint.weights_of(names)
    tensors = [weights[name].to(device, dtype) for name in names]
    bias = tensors[1] if len(tensors) > 1 else None
    return Head(tensors[0], bias, **_settings(checkpoint.config))
