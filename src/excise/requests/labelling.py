"""What `excise label` is asked to do, in one value."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SerializeAsAny, model_validator

from excise.core.config import Config
from excise.data.spec import DomainSpec
from excise.labelling.labeller import EncoderLabeller, NgramLabeller, StatesLabeller
from excise.models.spec import ModelSpec


class LabelRun(Config):
    """A few labels, texts without, and what kind of labeller brings the one to the other."""

    labels: tuple[str, ...] = ()
    """Sources of labelled documents: rows with `spans` or a `capability`; all others are core."""
    unlabeled: tuple[str, ...] = ()
    """Sources of documents that are to be labelled."""
    domain: SerializeAsAny[DomainSpec] | None = None
    """A domain in place of files: forget and retain set are labelled, its mix is not."""
    documents: int = Field(default=0, ge=0)
    """Documents of each capability, and of core, whose labels of a domain the labeller is given; 0
    for all. It labels the others, and the truth says how well."""
    labeller: NgramLabeller | EncoderLabeller | StatesLabeller = NgramLabeller()
    """The labeller, by its `name`: ngrams, encoder or states."""
    model: ModelSpec = ModelSpec()
    """The model whose hidden states `states` reads."""
    seed: int = 0
    """Seed of everything random."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the model."""
    device: str = "auto"
    """`auto` takes an accelerator where there is one."""
    code: dict[str, str] = {}
    """Names defined by code of one's own, as `./file.py:Class`."""

    @model_validator(mode="after")
    def _check(self) -> LabelRun:
        """Refuse data from two places, or from none."""
        if self.domain is not None and (self.labels or self.unlabeled):
            raise ValueError("domain: has data of its own; leave out labels and unlabeled, or it")
        if self.domain is None and not (self.labels and self.unlabeled):
            raise ValueError(
                f"{'unlabeled' if self.labels else 'labels'}: is missing; give a file of labelled "
                "documents (labels) and one without (unlabeled), or a domain"
            )
        if self.documents and self.domain is None:
            raise ValueError("documents: is for a domain; give fewer rows in 'labels' instead")
        return self
