"""What `excise inspect` found, as the record holds it: numbers by block, token and tensor.

Read it through `excise.record`. This module imports no torch.
"""

from __future__ import annotations

from typing import Literal

from excise.record.entry import Estimate, RecordEntry


class BlockChange(RecordEntry):
    """The residual stream after one block; the first token of every row is left out."""

    block: int
    """Number of the block, from 0."""
    norm_forget_original: Estimate
    """Mean norm of the original on forget text."""
    norm_forget_edited: Estimate
    """Mean norm of the edited model on forget text."""
    norm_retain_original: Estimate
    """Mean norm of the original on retain text."""
    norm_retain_edited: Estimate
    """Mean norm of the edited model on retain text."""
    change_forget: float
    """Mean norm of the change on forget text, as a share of the original's norm."""
    change_retain: float
    """The same on retain text."""
    cosine: Estimate
    """Mean cosine of a forget token's change with the junk direction."""
    share: float
    """Share of the squared change on forget text that lies along the junk direction."""
    dimensions: float
    """Directions the change on forget text spreads over: exp of the entropy of its spectrum."""
    size_forget: float
    """Mean change along the direction on forget text, as a share of the original's norm."""
    size_retain: float
    """The same on retain text."""
    auc: Estimate
    """Whether a token's change along the direction tells forget from retain text: 0.5 is no."""
    auc_answers: float
    """The same where a scored token is predicted, so that the text has said what it is about."""
    auc_edited: float
    """The same of the edited model's residual stream, without the original."""
    auc_original: float
    """The same of the original's: what the direction told before the edit."""
    weights: float
    """Relative Frobenius norm of the change of the block's weights."""


class Bucket(RecordEntry):
    """The residual stream after one block at tokens of one kind; first tokens are left out."""

    text: Literal["forget", "retain"]
    """Which text, of the dev rows."""
    position: Literal["prompt", "answer"]
    """Tokens of the prompt, or those where a scored token is due."""
    block: int
    """Number of the block, from 0."""
    tokens: int
    """Number of tokens."""
    norm_original: float
    """Mean norm of the original."""
    norm_edited: float
    """Mean norm of the edited model."""
    change: float
    """Mean norm of the change, as a share of the original's norm."""
    cosine: float
    """Mean cosine of a token's stream with the original's."""
    top_original: float
    """Share of the original's variance along its four principal directions."""
    top_edited: float
    """The same of the edited model along its own."""


class TokenKL(RecordEntry):
    """KL(edited || original) on one side, in nats per token."""

    side: Literal["forget", "retain"]
    """Which text."""
    mean: Estimate
    """Mean over units."""
    answers: Estimate
    """Mean over units where a scored token is predicted."""
    median: float
    """Median over tokens."""
    p99: float
    """99 % of the tokens lie below."""
    tokens: int
    """Number of tokens."""
    units: int
    """Number of units."""


class Strip(RecordEntry):
    """One row, token by token; never kept where the data is sensitive."""

    side: Literal["forget", "retain"]
    """Which text."""
    unit: str
    """Unit id."""
    tokens: tuple[str, ...] = ()
    """Tokens as text."""
    kl: tuple[float | None, ...] = ()
    """KL(edited || original) in nats of the prediction of each token; None where none is made."""


class NoiseFit(RecordEntry):
    """One kind of noise in "noise where harmful, original elsewhere"."""

    noise: Literal["uniform", "unigram", "mean-edited"]
    """Even; the frequencies of tokens in dev rows; the edited model's mean output on dev forget."""
    kl_forget: float
    """KL(edited || noise) on forget text, in nats per token."""
    share: float
    """Share of KL(edited || original) that the splice explains, both sides weighing the same."""
    share_answers: float
    """The same where a scored token is predicted."""
    weight: float
    """Share w of noise in (1 - w) original + w noise that is nearest on forget text."""
    share_mixed: float
    """Share of the forget side's KL that this mixture explains."""
    weight_retain: float
    """The same w on retain text."""


class SpliceFit(RecordEntry):
    """How far the edited model is "noise where harmful, original elsewhere"."""

    auc: Estimate
    """Whether KL(edited || original) of a token tells forget from retain text."""
    auc_answers: float
    """The same where a scored token is predicted."""
    kinds: tuple[NoiseFit, ...] = ()
    """By kind of noise."""


class TensorChange(RecordEntry):
    """How one tensor moved."""

    name: str
    """Name as in `model.named_parameters()`."""
    shape: tuple[int, ...]
    """Shape."""
    relative: float
    """Frobenius norm of the change, as a share of the original's."""
    moved: float
    """Share of the entries that differ."""
    rank: float | None = None
    """Effective rank of the change: exp of the entropy of its singular values (Roy 2007); None
    for vectors and for matrices too large to take apart."""
    count90: int | None = None
    """Singular values that hold 90 % of the squared change."""


class Inspection(RecordEntry):
    """What one edit did inside a model."""

    model: str
    """Name of the edited model."""
    headline: str = ""
    """The finding in one sentence."""
    summary: str
    """The finding in a paragraph, computed from the numbers below."""
    identical: bool = False
    """Whether no tensor differs."""
    conjecture: Literal["fits", "fits in part", "does not fit", "nothing changed"]
    """How "if harmful, add a big vector" stands; see `docs/inspect.md` for the thresholds."""
    peak: int
    """Block with the largest mean change on dev forget text, beside the original's norm."""
    clearest: int
    """Block at which the change is read: of those with at least half that, the one whose change
    on dev forget text is nearest to one direction."""
    blocks: tuple[BlockChange, ...] = ()
    """By block."""
    buckets: tuple[Bucket, ...] = ()
    """By kind of token and block."""
    kl: tuple[TokenKL, ...] = ()
    """Forget and retain side."""
    splice: SpliceFit
    """Against a splice of noise and the original."""
    strips: tuple[Strip, ...] = ()
    """A few rows token by token; empty where the data is sensitive."""
    tensors: tuple[TensorChange, ...] = ()
    """Tensors that moved, the farthest first."""
    tensors_total: int = 0
    """Tensors that were compared."""
    rows: dict[str, int] = {}
    """Rows read, by role."""
