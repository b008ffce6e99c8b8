"""A soft prompt: trained vectors before the embedded tokens, for as long as a `with` block lasts.

Source: Lester, Al-Rfou & Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning",
arXiv:2104.08691. The vectors stand before everything, a BOS token included, as there and in `peft`.

Shape legend: B rows, T tokens, K vectors, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from excise.models.anatomy import backbone
from excise.models.hooks import eager, find_module

PARAMETER = "soft_prompt_KD"
"""Name of the parameter while it is there."""


class PromptVectors:
    """Trainable vectors before every row that a model reads.

    The model is called as before, with token ids, and its logits are those of the tokens alone:
    stand-ins are put before the ids, so that families which read the ids elsewhere too work, and
    what the embedding says of them is replaced. The vectors are kept in units of the embedding's
    root mean square, so that one learning rate suits models of any scale.
    """

    def __init__(self, count: int, generator: torch.Generator) -> None:
        """Prepare a prompt that is put on a model by `on`.

        Args:
            count: Number of vectors.
            generator: Draws the tokens whose embeddings they start from.
        """
        self.count, self.generator = count, generator
        self.active = self.inside = False
        self.scale = 1.0

    @contextmanager
    def on(self, model: Any) -> Iterator[Any]:
        """Give a model the vectors and freeze its weights; `begin` puts them before the rows.

        Args:
            model: A causal model.

        Yields:
            The model; of its parameters only the vectors require gradients.

        Raises:
            UserError: If the model has no embedding or head that can be found.
        """
        parts = backbone(model)
        embed, head = find_module(model, parts.embed), find_module(model, parts.head)
        before = [(p, p.requires_grad) for p in model.parameters()]
        self.vectors_KD = self._start(embed)
        with ExitStack() as stack:
            stack.enter_context(eager(model))
            for hook in (
                model.register_forward_pre_hook(self._lengthen, with_kwargs=True),
                embed.register_forward_hook(self._put),
                head.register_forward_pre_hook(self._shorten),
            ):
                stack.callback(hook.remove)
            try:
                model.requires_grad_(False)
                model.register_parameter(PARAMETER, self.vectors_KD)
                yield model
            finally:
                delattr(model, PARAMETER)
                for parameter, required in before:
                    parameter.requires_grad_(required)

    def begin(self) -> None:
        """Put the vectors before every row from now on."""
        self.active = True

    @torch.no_grad()
    def _start(self, embed: Any) -> nn.Parameter:
        """Return what the embedding says of a few tokens, in units of its root mean square."""
        ids_K = torch.randint(len(embed.weight), (self.count,), generator=self.generator)
        start_KD = embed(ids_K[None].to(embed.weight.device))[0]
        self.scale = float(start_KD.float().square().mean().sqrt().clamp(min=1e-6))
        return nn.Parameter(start_KD / self.scale)

    def _lengthen(self, model: Any, args: Any, inputs: dict[str, Any]) -> Any:
        """Put stand-ins before the ids; later tokens of a cached text move up instead."""
        if not self.active:
            return None
        ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
        ones_BK = mask_BT.new_ones(len(ids_BT), self.count)
        self.inside = inputs.get("past_key_values") is None
        new = {"attention_mask": torch.cat([ones_BK, mask_BT], 1)}
        position_BT = inputs["position_ids"] + self.count
        if self.inside:
            new["input_ids"] = torch.cat([ids_BT[:, :1].expand(-1, self.count), ids_BT], 1)
            first_BK = torch.arange(self.count, device=ids_BT.device).expand(len(ids_BT), -1)
            position_BT = torch.cat([first_BK, position_BT], 1)
        return args, {**inputs, **new, "position_ids": position_BT}

    def _put(self, module: Any, args: Any, hidden_BTD: Tensor) -> Tensor | None:
        """Put the vectors where the stand-ins are."""
        if not self.inside:
            return None
        vectors_BKD = (self.vectors_KD * self.scale).to(hidden_BTD).expand(len(hidden_BTD), -1, -1)
        return torch.cat([vectors_BKD, hidden_BTD[:, self.count :]], 1)

    def _shorten(self, module: Any, args: tuple[Any, ...]) -> Any:
        """Leave the positions of the tokens alone to the head."""
        return (args[0][:, self.count :], *args[1:]) if self.inside else None
