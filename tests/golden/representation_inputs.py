"""What the released losses of RR, RepNoise and RMU+LAT were run on, to run ours on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excise.data.stream import Batch
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.lora import LoRA
from excise.models.tiny import tiny_model, word_tokenizer
from excise.train.fit import FitConfig

WORDS = [f"w{i}" for i in range(40)]
STEPS = 6
ROWS, LENGTH, PROMPT = 4, 9, 3

RR = {
    "layers": (0, 1), "alpha": 10.0, "horizon": 300, "as_published": True,
    "lora": LoRA(rank=4, alpha=4.0), "fit": FitConfig(steps=STEPS, lr=1e-2, clip=1.0),
}  # fmt: skip
REPNOISE = {
    "alpha": 1.0, "beta": 0.5, "as_published": True,
    "fit": FitConfig(steps=STEPS, lr=1e-3, weight_decay=0.01),
}  # fmt: skip
LAT = {
    "layer": 2, "attack_layer": 1, "steering": 6.5, "alpha": 12.0, "epsilon": 2.0,
    "attack_steps": 5, "attack_lr": 0.05, "per_attack": 2,
    "fit": FitConfig(steps=STEPS, lr=1e-3, weight_decay=0.01),
}  # fmt: skip
"""Settings of ours under which they do what is released."""


def start(folder: Path) -> Checkpoint:
    """Write a random Llama of four blocks and return it."""
    tokenizer = word_tokenizer(WORDS)
    model = tiny_model("llama", seed=3, vocab=len(tokenizer), width=32, blocks=4)
    return save_model(model, tokenizer, folder / "start")


def ids(purpose: int, step: int) -> Tensor:
    """Return random words; token 0 is among them."""
    generator = torch.Generator().manual_seed(1000 * purpose + step)
    return torch.randint(0, len(WORDS), (ROWS, LENGTH), generator=generator)


def padded(purpose: int, step: int) -> Batch:
    """Return rows of different lengths, padded on the right, every token but the first scored.

    Token 0 pads only: a row that begins with it has an activation of norm 0, by which the released
    RR divides.
    """
    ids_BT = ids(purpose, step) + 1
    lengths_B = torch.tensor([LENGTH, LENGTH - 2, LENGTH - 1, LENGTH - 4])
    attention_BT = torch.arange(LENGTH)[None] < lengths_B[:, None]
    return _batch(ids_BT.masked_fill(~attention_BT, 0), attention_BT, first=1)


def whole(purpose: int, step: int) -> Batch:
    """Return rows of one length, every token but the first scored."""
    return _batch(ids(purpose, step), torch.ones(ROWS, LENGTH, dtype=torch.bool), first=1)


def pair(step: int) -> tuple[Batch, Batch]:
    """Return two answers to every prompt, which differ at every token."""
    harmful_BT = ids(5, step)
    other_BT = (harmful_BT + 1 + ids(6, step) % 20) % len(WORDS)
    other_BT[:, :PROMPT] = harmful_BT[:, :PROMPT]
    all_BT = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    return _batch(harmful_BT, all_BT, first=PROMPT), _batch(other_BT, all_BT, first=PROMPT)


def _batch(ids_BT: Tensor, attention_BT: Tensor, *, first: int) -> Batch:
    target_BT = attention_BT & (torch.arange(LENGTH)[None] >= first)
    return Batch(ids_BT, attention_BT, target_BT, torch.zeros_like(ids_BT), ("",) * len(ids_BT))


def stir(parameters: Iterable[Tensor]) -> None:
    """Move an adapter away from no change, where RR's gradient is nothing but rounding."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def noise(step: int, layer: int, shape: Sequence[int]) -> Tensor:
    """Return the noise that a layer's scored tokens were compared with."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 * step + layer))


def control(turn: int) -> Tensor:
    """Return the unit vector that adversary `turn` met: the release draws one for every batch."""
    u_D = torch.rand(32, generator=torch.Generator().manual_seed(turn))
    unit_D: Tensor = u_D / u_D.norm()
    return unit_D


def sums(parameters: Iterable[Tensor]) -> list[Any]:
    """Return checksums of trained parameters, in their order."""
    wide = [p.detach().double() for p in parameters]
    return [[float(p.sum()), float(p.abs().sum())] for p in wide]
