"""The attacks: one file each, and the union that configurations name them by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from excise.auditor.attacks.benign import Benign
from excise.auditor.attacks.direction import Direction
from excise.auditor.attacks.drop_adapter import DropAdapter
from excise.auditor.attacks.embedding_rows import AlignRows, MatchRows, RescaleRows
from excise.auditor.attacks.few_shot import FewShot
from excise.auditor.attacks.filler import Filler
from excise.auditor.attacks.gcg import GCG
from excise.auditor.attacks.latent import Latent
from excise.auditor.attacks.lens import Lens
from excise.auditor.attacks.noise import Noise
from excise.auditor.attacks.paraphrase import Paraphrase
from excise.auditor.attacks.prefix import Prefix
from excise.auditor.attacks.probe import Probe
from excise.auditor.attacks.prune import Prune
from excise.auditor.attacks.quantize import Quantize
from excise.auditor.attacks.reinit import Reinit
from excise.auditor.attacks.relearn import Relearn
from excise.auditor.attacks.sampling import Sampling
from excise.auditor.attacks.shrink_perturb import ShrinkPerturb
from excise.auditor.attacks.soft_prompt import SoftPrompt
from excise.auditor.attacks.steer import Steer
from excise.auditor.attacks.template import Template
from excise.auditor.attacks.transfer import Transfer
from excise.auditor.base import Attack

AnyAttack = (
    FewShot | Prefix | Paraphrase | Filler | Template | Sampling
    | Lens | Probe | Direction | Latent | Steer
    | Quantize | Prune | Benign | Noise | ShrinkPerturb | Reinit
    | RescaleRows | AlignRows | MatchRows | DropAdapter
    | GCG | SoftPrompt | Relearn | Transfer
)  # fmt: skip
"""Adding an attack: its file, its test, and here its import, the union and the names.

Cheapest access first.
"""

ATTACKS: Mapping[str, type[Attack]] = {
    cls.model_fields["name"].default: cls for cls in get_args(AnyAttack)
}
"""Built-in attacks by name."""

__all__ = [
    "ATTACKS",
    "GCG",
    "AlignRows",
    "AnyAttack",
    "Benign",
    "Direction",
    "DropAdapter",
    "FewShot",
    "Filler",
    "Latent",
    "Lens",
    "MatchRows",
    "Noise",
    "Paraphrase",
    "Prefix",
    "Probe",
    "Prune",
    "Quantize",
    "Reinit",
    "Relearn",
    "RescaleRows",
    "Sampling",
    "ShrinkPerturb",
    "SoftPrompt",
    "Steer",
    "Template",
    "Transfer",
]
