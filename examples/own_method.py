"""Fine-tune on retain only, with weight decay: does forgetting happen by itself?"""

from typing import ClassVar, Literal

from excise.core.context import Context
from excise.data.domain import Domain
from excise.losses import nll
from excise.methods.base import Paper, Removal
from excise.methods.tuning import TuningMethod, tune
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig


class Decay(TuningMethod):
    """Keep training on retain under weight decay."""

    name: Literal["decay"] = "decay"
    fit: FitConfig = FitConfig(steps=50, lr=1e-3, batch_size=32, weight_decay=0.1)
    max_length: int = 128

    paper: ClassVar[Paper] = Paper("an example", "")

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        return tune(self, start, domain, {"retain": (1.0, nll)}, ctx)
