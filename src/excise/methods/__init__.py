"""The methods: the typed union is the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from excise.methods.base import Cost, Method, Paper, Removal
from excise.methods.chain import Chain
from excise.methods.distillation.undo import Undo
from excise.methods.posthoc.assd import ASSD
from excise.methods.posthoc.grad_diff import GradDiff
from excise.methods.posthoc.lfssd import LFSSD
from excise.methods.posthoc.maxent import MaxEnt
from excise.methods.posthoc.potion import Potion
from excise.methods.posthoc.rmu import RMU
from excise.methods.posthoc.ssd import SSD
from excise.methods.pretraining.ablated_plain import AblatedPlain
from excise.methods.pretraining.adapters import AdapterModules, DualAdapters
from excise.methods.pretraining.demix import DEMix
from excise.methods.pretraining.era import ERA, ERAAfter
from excise.methods.pretraining.filter_lora import FilterLoRA
from excise.methods.pretraining.filtering import Filtering
from excise.methods.pretraining.grad_diff_pretrain import GradDiffPretrain
from excise.methods.pretraining.gram import GRAM
from excise.methods.pretraining.loss_masking import LossMasking
from excise.methods.pretraining.memsinks import MemSinks
from excise.methods.pretraining.moefy import Moefy
from excise.methods.pretraining.plain import Plain
from excise.methods.pretraining.propagate import Propagate
from excise.methods.pretraining.relabel import Relabel
from excise.methods.pretraining.sgtm import SGTM

AnyMethod = (
    Plain
    | Filtering
    | FilterLoRA
    | Relabel
    | Propagate
    | LossMasking
    | AblatedPlain
    | Moefy
    | GradDiffPretrain
    | ERA
    | ERAAfter
    | SGTM
    | GRAM
    | DEMix
    | MemSinks
    | AdapterModules
    | DualAdapters
    | GradDiff
    | MaxEnt
    | RMU
    | SSD
    | LFSSD
    | ASSD
    | Potion
    | Undo
    | Chain
)
"""Adding a method: its file, its test, and here its import, the union and the names below."""

METHODS: Mapping[str, type[Method]] = {
    cls.model_fields["name"].default: cls for cls in get_args(AnyMethod)
}
"""Built-in methods by name."""

__all__ = [
    "ASSD",
    "ERA",
    "GRAM",
    "LFSSD",
    "METHODS",
    "RMU",
    "SGTM",
    "SSD",
    "AblatedPlain",
    "AdapterModules",
    "AnyMethod",
    "Chain",
    "Cost",
    "DEMix",
    "DualAdapters",
    "ERAAfter",
    "FilterLoRA",
    "Filtering",
    "GradDiff",
    "GradDiffPretrain",
    "LossMasking",
    "MaxEnt",
    "MemSinks",
    "Method",
    "Moefy",
    "Paper",
    "Plain",
    "Potion",
    "Propagate",
    "Relabel",
    "Removal",
    "Undo",
]
