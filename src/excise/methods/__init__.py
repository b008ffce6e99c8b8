"""The methods: the typed union is the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from excise.methods.base import Cost, Method, Paper, Removal
from excise.methods.chain import Chain
from excise.methods.distillation.undo import Undo
from excise.methods.posthoc.altpo import AltPO
from excise.methods.posthoc.assd import ASSD
from excise.methods.posthoc.checkpoint_transfer import CheckpointTransfer
from excise.methods.posthoc.circuit_breakers import CircuitBreakers
from excise.methods.posthoc.direction import Direction
from excise.methods.posthoc.dpo import DPO
from excise.methods.posthoc.elm import ELM
from excise.methods.posthoc.grad_diff import GradDiff
from excise.methods.posthoc.gradient_ascent import GradientAscent
from excise.methods.posthoc.idk_dpo import IdkDPO
from excise.methods.posthoc.lfssd import LFSSD
from excise.methods.posthoc.maxent import MaxEnt
from excise.methods.posthoc.npo import NPO
from excise.methods.posthoc.potion import Potion
from excise.methods.posthoc.refusal import Refusal
from excise.methods.posthoc.repnoise import RepNoise
from excise.methods.posthoc.repselect import RepSelect
from excise.methods.posthoc.rmu import RMU
from excise.methods.posthoc.rmu_lat import RMULAT
from excise.methods.posthoc.seam import SEAM
from excise.methods.posthoc.simnpo import SimNPO
from excise.methods.posthoc.ssd import SSD
from excise.methods.posthoc.tar import TAR
from excise.methods.posthoc.task_vector import TaskVector
from excise.methods.posthoc.undial import UNDIAL
from excise.methods.pretraining.ablated_plain import AblatedPlain
from excise.methods.pretraining.adapters import AdapterModules, DualAdapters
from excise.methods.pretraining.demix import DEMix
from excise.methods.pretraining.era import ERA, ERAAfter
from excise.methods.pretraining.filter_lora import FilterLoRA
from excise.methods.pretraining.filtering import Filtering
from excise.methods.pretraining.grad_diff_pretrain import GradDiffPretrain
from excise.methods.pretraining.gram import GRAM
from excise.methods.pretraining.memsinks import MemSinks
from excise.methods.pretraining.moefy import Moefy
from excise.methods.pretraining.plain import Plain
from excise.methods.pretraining.propagate import Propagate
from excise.methods.pretraining.relabel import Relabel
from excise.methods.pretraining.sgtm import SGTM
from excise.methods.pretraining.token_filter import TokenFilter

AnyMethod = (
    Plain
    | Filtering
    | FilterLoRA
    | Relabel
    | Propagate
    | TokenFilter
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
    | GradientAscent
    | GradDiff
    | NPO
    | SimNPO
    | DPO
    | IdkDPO
    | AltPO
    | UNDIAL
    | MaxEnt
    | RMU
    | TaskVector
    | Direction
    | Refusal
    | CheckpointTransfer
    | ELM
    | RepSelect
    | TAR
    | SEAM
    | RMULAT
    | CircuitBreakers
    | RepNoise
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
    "DPO",
    "ELM",
    "ERA",
    "GRAM",
    "LFSSD",
    "METHODS",
    "NPO",
    "RMU",
    "RMULAT",
    "SEAM",
    "SGTM",
    "SSD",
    "TAR",
    "UNDIAL",
    "AblatedPlain",
    "AdapterModules",
    "AltPO",
    "AnyMethod",
    "Chain",
    "CheckpointTransfer",
    "CircuitBreakers",
    "Cost",
    "DEMix",
    "Direction",
    "DualAdapters",
    "ERAAfter",
    "FilterLoRA",
    "Filtering",
    "GradDiff",
    "GradDiffPretrain",
    "GradientAscent",
    "IdkDPO",
    "MaxEnt",
    "MemSinks",
    "Method",
    "Moefy",
    "Paper",
    "Plain",
    "Potion",
    "Propagate",
    "Refusal",
    "Relabel",
    "Removal",
    "RepNoise",
    "RepSelect",
    "SimNPO",
    "TaskVector",
    "TokenFilter",
    "Undo",
]
