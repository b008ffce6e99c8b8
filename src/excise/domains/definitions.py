"""Real prose beside the definitions of one topic: what a small model trained here can hold.

Forget: WordNet's definitions of one topic, as plain text. Neighbour: those of a related topic.
Retain: the shipped general English. Everything ships, and models are trained from scratch with a
byte-level BPE of the texts that the method sees. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, Literal

from pydantic import Field

from excise.data.domain import UNLABELED, Domain
from excise.data.spans import relabelled_spans
from excise.data.split import hashed_order
from excise.domains.corpus import Corpus, Document, corpus_domain, text_tokenizer
from excise.domains.glosses import NEIGHBOURS, Topic, load_glosses
from excise.domains.prose import within_prose

DEFINITIONS_MODEL: Final[Mapping[str, Any]] = {"family": "llama", "width": 96, "blocks": 3}
"""Suggested `Scratch`."""

DEFINITIONS_FIT: Final[Mapping[str, Any]] = {
    "steps": 500, "lr": 3e-3, "batch_size": 32, "warmup": 40, "schedule": "cosine",
    "min_lr": 0.05, "betas": (0.9, 0.99), "weight_decay": 0.05, "clip": 1.0,
}  # fmt: skip
"""Suggested `FitConfig`."""

DEFINITIONS_MAX_LENGTH: Final = 64
"""Suggested tokens per row."""


class Definitions(Corpus):
    """Definitions of one topic are to be forgotten, general English stays, by the loss on text."""

    name: Literal["definitions"] = "definitions"
    """Name in recipes and on the command line."""
    topic: Topic = "animal"
    """Topic to forget; its neighbour is the one of `glosses`."""
    words: int = Field(default=30, ge=10, le=2000)
    """Words per passage, about."""
    documents: int = Field(default=1500, ge=20)
    """Definitions of the topic at most, and as many of its neighbour."""
    exposure: Literal["seen", "held_out"] = "held_out"
    """`seen`: the method is given the relearn and test sets too, and what is claimed is that these
    very definitions are deleted."""
    prose: int = Field(default=2500, ge=50)
    """Passages of general English in retain, at most; the scored parts take an eighth of it."""
    prose_around: int = Field(default=0, ge=0, le=100)
    """Words of general English, at most, around each definition that the method is to forget: two
    sentences or more, and the definition between two or at an end, a span; 0 for definitions
    alone. What is scored, the relearn set and retain stay as they are."""
    vocabulary: int = Field(default=1024, ge=300, le=16384)
    """Tokens of the tokenizer."""

    def tokenizer(self) -> Any:
        """Return a byte-level BPE of what the method sees."""
        domain = self.build(None)
        rows = (*domain.forget[self.name], *domain.retain)
        return text_tokenizer(tuple(row.text for row in rows), self.vocabulary)

    def build(self, model: object = None) -> Domain:
        """Return the domain; see `DomainSpec.build`. The rows do not depend on the model."""
        near = NEIGHBOURS[self.topic]
        domain = corpus_domain(
            self,
            _definitions(self.topic),
            _definitions(near),
            exposure=self.exposure,
            notes=(
                f"forget: WordNet 3.0 definitions of the topic '{self.topic}'; neighbour: '{near}'",
            ),
        )
        return self._inside_prose(domain) if self.prose_around else domain

    def _inside_prose(self, domain: Domain) -> Domain:
        """Return the domain with what the method is to forget inside general English."""
        forget = within_prose(
            domain.forget[self.name],
            self.prose_around,
            passage=self.words,
            skip=self.prose,
            seed=self.seed,
        )
        unread = [
            replace(row, label=UNLABELED, spans=relabelled_spans(row, UNLABELED)) for row in forget
        ]
        mix = (*unread, *(row for row in domain.unlabeled if not row.capability))
        return replace(
            domain,
            forget={self.name: forget},
            unlabeled=tuple(hashed_order(mix, [row.text for row in mix], self.seed)),
            notes=(
                *domain.notes,
                f"definitions to forget stand inside {self.prose_around} words of English at most",
            ),
        )


def _definitions(topic: Topic) -> list[Document]:
    """Return the definitions of a topic, one document each."""
    return [
        Document(gloss.number, f"{gloss.term[:1].upper()}{gloss.term[1:]}: {gloss.gloss}.")
        for gloss in load_glosses()
        if gloss.topic == topic
    ]
