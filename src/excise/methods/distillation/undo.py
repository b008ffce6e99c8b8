"""UNDO: unlearn, damage, distil.

Suppress what is to be removed, take a copy of the result, shrink and perturb its weights, and
distil it from the suppressed model until what must stay is back. What the teacher does not say,
the student has to find by itself.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, SerializeAsAny, model_validator

from excise.core.context import Context
from excise.data.domain import Domain
from excise.methods.base import ApplyMethod, Method, Paper, Removal
from excise.methods.chain import Chain
from excise.methods.distillation.cache import CacheKind
from excise.methods.distillation.corpora import AnyCorpus, FullMix
from excise.methods.distillation.perturb import Part
from excise.methods.distillation.student import make_student, needed
from excise.methods.distillation.targets import FromTeacher, Targets
from excise.methods.posthoc.maxent import MaxEnt
from excise.models.checkpoint import Checkpoint, ModelPath
from excise.train.fit import FitConfig


class Undo(Method):
    """Unlearn, shrink and perturb a copy, distil it from the unlearned model."""

    name: Literal["undo"] = "undo"
    unlearn: SerializeAsAny[Method] = MaxEnt()
    """How the teacher is made: any method that starts from the original."""
    also: dict[str, SerializeAsAny[Method]] = {}
    """Further teachers by name, for mixtures."""
    alpha: float = Field(default=0.6, ge=0, le=1)
    """How far the student's weights are moved before it learns: 0 keeps the teacher's, 1 leaves
    nothing of them (unlearn and distil)."""
    beta: float = Field(default=0.1, ge=0)
    """Scale of the noise, of Xavier-uniform shape; 0 shrinks alone."""
    groups: tuple[Part, ...] = ("all",)
    """Groups of layers that are perturbed."""
    weights: Literal["all", "forget_snip", "random"] = "all"
    """Which weights of `groups` are perturbed: all; the `share` of the matrices' weights with the
    largest |weight x gradient| on forget rows of the original; or as many at random."""
    share: float = Field(default=0.2, gt=0, le=1)
    """How many weights, where not all."""
    repeats: int = Field(default=1, ge=1)
    """Rounds of perturbing and distilling, each with the steps of `fit`."""
    student: ModelPath = "unlearned"
    """Whose weights the student begins with: `unlearned`, `original` or a folder."""
    targets: Targets = FromTeacher()
    """What each token is distilled towards."""
    corpus: AnyCorpus = FullMix()
    """What is read."""
    divergence: Literal["auto", "forward", "reverse"] = "auto"
    """KL(target || student) or KL(student || target); `auto` is reverse on the student's own
    texts."""
    tokens: Literal["scored", "all"] = "scored"
    """Which tokens are distilled: those that are scored, or prompts as well."""
    cache: CacheKind | None = None
    """Keep what teachers say about the corpus, for this student and others: `hidden` is exact,
    `topk` and `sampled` are smaller; empty to ask the teachers in every step."""
    fit: FitConfig = FitConfig(
        steps=1000, lr=7e-4, batch_size=32, warmup=50, schedule="cosine", min_lr=0.1, clip=1.0
    )
    """Steps at most, rows per step, learning rate."""
    stop_tolerance: float | None = Field(default=None, ge=0)
    """Stop when the retain score on dev rows is this near to the teacher's: absolute for scores
    out of 1, a share for losses; empty to take all steps."""
    stop_every: int = Field(default=20, ge=1)
    """Steps between checks."""
    max_length: int = Field(default=512, ge=2)
    """Tokens per row."""
    pack: tuple[int, ...] = (1,)
    """Rows per text, in turn."""
    pretrain_tokens: int = Field(default=0, ge=0)
    """Tokens the original was trained on, for the cost as a share of it; 0 where the run knows them
    or nobody does."""

    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("forget", "retain", "unlabeled")
    paper: ClassVar[Paper] = Paper(
        "Distillation robustifies unlearning (UNDO)",
        "arXiv:2506.06278",
        "section 3: theta <- (1 - alpha) theta + alpha beta X, then KL(teacher || student)",
        "AddieFoote/distillation-robustify-unlearning",
        {
            "alpha": "recommended with MaxEnt; 0.1 to 0.8 were tried",
            "fit": "arithmetic: lr 7e-4 to 7e-5 cosine, 50 steps of warm-up, 1000 at most",
            "stop_tolerance": "arithmetic: within 0.05 of the teacher; language: within 5 %",
        },
    )

    @model_validator(mode="after")
    def _check(self) -> Undo:
        """Refuse what cannot be distilled, before anything runs."""
        for name, method in self.makers().items():
            first = method.methods[0] if isinstance(method, Chain) else method
            if first.starts_from == "scratch":
                raise ValueError(
                    f"{'unlearn' if name == 'unlearned' else f'also.{name}'}: "
                    f"'{method.name}' trains from scratch; name its model in targets.path"  # type: ignore[attr-defined]
                )
        if self.alpha == 1.0 and self.beta == 0.0:
            raise ValueError("beta: with alpha 1 it leaves weights of 0, which learn nothing")
        if self.cache is not None and (self.tokens == "all" or self.corpus.name == "on_policy"):
            raise ValueError(
                "cache: holds the scored tokens of texts that stay the same; leave it out with "
                "tokens 'all' and with corpus 'on_policy'"
            )
        if {"unlearned", "original"} & set(self.also):
            raise ValueError("also: 'unlearned' and 'original' are taken; use other names")
        return self

    def makers(self) -> dict[str, Method]:
        """Return the methods that make teachers, by name."""
        return {"unlearned": self.unlearn, **self.also}

    def needed_makers(self) -> dict[str, Method]:
        """Return those of `makers` that this run asks for anything."""
        wanted = needed(self)
        return {name: method for name, method in self.makers().items() if name in wanted}

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Make the teachers, each a stage that other students share; then distil a student.

        Raises:
            UserError: If a teacher emits NaN or has another vocabulary, or the corpus is shorter
                than a sequence.
        """
        teachers = {
            name: ctx.run(ApplyMethod(method, start, domain, ctx.seed))
            for name, method in self.needed_makers().items()
        }
        return make_student(self, start, domain, ctx, teachers)
