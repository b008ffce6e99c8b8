"""Fine-tune on retain only, with weight decay: does forgetting happen by itself?"""

from typing import ClassVar, Literal

from excise.core.context import Context
from excise.data.domain import Domain
from excise.losses import nll
from excise.methods.base import Method, Paper, Removal
from excise.methods.tuning import stream, tune
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig, Term


class Decay(Method):
    """Keep training on retain under weight decay."""

    name: Literal["decay"] = "decay"
    fit: FitConfig = FitConfig(steps=50, lr=1e-3, batch_size=32, weight_decay=0.1)
    max_length: int = 128

    paper: ClassVar[Paper] = Paper("an example", "")

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        model = start.load(dtype=ctx.dtype, device=ctx.device)
        rows = stream(
            domain.retain,
            start.tokenizer(),
            self.fit,
            ctx,
            purpose="retain",
            max_length=self.max_length,
        )

        def loss(model, micro):
            total, count = nll(model(**micro["retain"].inputs).logits, micro["retain"])
            return {"retain": Term(total, count)}

        return tune(
            start,
            model,
            lambda step: [{"retain": b} for b in rows(step)],
            loss,
            self.fit,
            ctx,
            stage=self.name,
        )
