"""What an edit did inside: every measurement, tied into one entry of the record.

Directions and noise are fitted on dev rows; everything else is read on V and the retain test.

Shape legend: L blocks, N and M tokens of the forget and the retain side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain, Row, Rows
from excise.data.subsample import subsample
from excise.diagnose.activations import Pair, read_pair
from excise.diagnose.continuations import side_by_side
from excise.diagnose.junk import Junk, fit_junk
from excise.diagnose.sides import Side, Values, auc_by_unit, auc_of, gather, mean_by_unit
from excise.diagnose.splice import MIXED, noises, share_explained
from excise.diagnose.summary import conjecture_of, headline, summarize
from excise.diagnose.token_kl import strip_of
from excise.diagnose.updates import Moved, check_same_tensors, moved_tensors
from excise.models.anatomy import anatomy
from excise.models.checkpoint import Checkpoint
from excise.record import (
    BlockChange,
    Inspection,
    NoiseFit,
    Sample,
    SpliceFit,
    Strip,
    TokenKL,
)


@dataclass(frozen=True)
class Text:
    """The rows an inspection reads.

    Attributes:
        fit: Dev forget rows, for directions and noise.
        forget: V of all capabilities.
        retain: The retain test.
    """

    fit: Rows
    forget: Rows
    retain: Rows


def text_of(domain: Domain, rows: int) -> Text:
    """Choose the rows of an inspection.

    Args:
        domain: Rows by role.
        rows: Rows of each kind at most.

    Raises:
        UserError: If a side has no rows.
    """
    every = {
        "dev_forget": [row for part in domain.dev_forget.values() for row in part],
        "test": [row for part in domain.test.values() for row in part],
        "retain_test": list(domain.retain_test),
    }
    for role, found in every.items():
        if not found:
            raise UserError(f"the data has no {role} rows to read; give more rows of that side")
    return Text(*(subsample(found, rows, by="row") for found in every.values()))


def inspect_pair(
    original: Checkpoint,
    edited: Checkpoint,
    domain: Domain,
    ctx: Context,
    *,
    name: str,
    rows: int,
    max_length: int,
    samples: int,
) -> tuple[Inspection, tuple[Sample, ...]]:
    """Measure what one edit did.

    Args:
        original: The model before the edit.
        edited: The model after it.
        domain: Forget and retain rows; texts are kept unless it is sensitive.
        ctx: Device and dtype.
        name: Name of the edited model.
        rows: Rows of each side at most.
        max_length: Tokens per row.
        samples: Strips and continuations per side.

    Returns:
        The finding, and continuations of both models.

    Raises:
        UserError: If the models are not of one shape, a side has no rows, or a model computes
            numbers that are not finite.
    """
    check_same_tensors(original, edited)
    text = text_of(domain, rows)
    ctx.emit("inspect", {"step": "tensors"})
    moved = list(moved_tensors(original, edited))
    ctx.emit("inspect", {"step": "activations"})
    pair = Pair(
        original.load(dtype=ctx.dtype, device=ctx.device),
        edited.load(dtype=ctx.dtype, device=ctx.device),
        original.tokenizer(),
        max_length,
    )
    shown = 0 if domain.sensitive else samples
    found = _measured(pair, text, moved, name, shown)
    ctx.emit("inspect", {"step": "continuations"})
    said: tuple[Sample, ...] = ()
    for role, side in (("test", text.forget), ("retain_test", text.retain)):
        said += side_by_side(pair, [side[i] for i in picked(side, shown)], role=role, name=name)
    found = found.model_copy(update={"conjecture": conjecture_of(found)})
    told = {"headline": headline(found), "summary": summarize(found)}
    return found.model_copy(update=told), said


def _measured(pair: Pair, text: Text, moved: Sequence[Moved], name: str, shown: int) -> Inspection:
    """Return what activations, logits and tensors tell, without words for it."""
    junk, forget, retain = read_sides(pair, text)
    return Inspection(
        model=name,
        summary="",
        identical=not any(one.change for one in moved),
        conjecture="nothing changed",
        peak=junk.peak,
        clearest=junk.clearest,
        blocks=tuple(
            block_reading(i, junk, forget, retain, share)
            for i, share in enumerate(block_weights(pair, moved))
        ),
        kl=(kl_reading("forget", forget), kl_reading("retain", retain)),
        splice=splice_reading(forget, retain),
        strips=(
            *strips("forget", forget, text.forget, pair, shown),
            *strips("retain", retain, text.retain, pair, shown),
        ),
        tensors=tuple(
            sorted(
                (one.reading for one in moved if one.change), key=lambda t: (-t.relative, t.name)
            )
        ),
        tensors_total=len(moved),
        rows={role: len(getattr(text, role)) for role in ("fit", "forget", "retain")},
    )


def read_sides(pair: Pair, text: Text) -> tuple[Junk, Side, Side]:
    """Fit on dev rows, then read both sides."""
    fit = list(read_pair(pair, text.fit, where="dev forget"))
    junk, noise = fit_junk(fit), noises(fit)
    size = len(noise["uniform"])
    sides = []
    for where, rows in (("forget", text.forget), ("retain", text.retain)):
        tokens = len(rows) * pair.max_length
        stride = max(1, tokens * size // MIXED)
        sides.append(gather(read_pair(pair, rows, where=where), rows, junk, noise, stride))
    return junk, sides[0], sides[1]


def block_reading(
    block: int, junk: Junk, forget: Side, retain: Side, weights: float
) -> BlockChange:
    """Return what happened to the residual stream after one block."""
    norm = {
        f"norm_{side}_{model}": mean_by_unit(one.by[model][block], one.unit_N, one.units)
        for side, one in (("forget", forget), ("retain", retain))
        for model in ("original", "edited")
    }
    change_N, along_N = forget.by["change"][block], forget.by["along"][block]
    squared = float(np.square(change_N).sum())

    def relative(side: Side, name: str) -> float:
        mean = float(side.by["original"][block].mean())
        return float(side.by[name][block].mean()) / max(mean, 1e-12)

    def told(name: str) -> tuple[Values, Values]:
        return forget.by[name][block], retain.by[name][block]

    high_N, low_M = told("along")
    return BlockChange(
        block=block,
        norm_forget_original=norm["norm_forget_original"],
        norm_forget_edited=norm["norm_forget_edited"],
        norm_retain_original=norm["norm_retain_original"],
        norm_retain_edited=norm["norm_retain_edited"],
        change_forget=relative(forget, "change"),
        change_retain=relative(retain, "change"),
        cosine=mean_by_unit(forget.by["cosine"][block], forget.unit_N, forget.units),
        share=float(np.square(along_N).sum()) / squared if squared > 0 else 0.0,
        dimensions=float(junk.dimensions_L[block]),
        size_forget=relative(forget, "along"),
        size_retain=relative(retain, "along"),
        auc=auc_by_unit(high_N, forget, low_M, retain),
        auc_answers=auc_of(high_N[forget.answer_N], low_M[retain.answer_N]),
        auc_edited=auc_of(*told("along_edited")),
        auc_original=auc_of(*told("along_original")),
        weights=weights,
    )


def block_weights(pair: Pair, moved: Sequence[Moved]) -> list[float]:
    """Return for every block how far its weights moved, beside their norm."""
    found = []
    for path in anatomy(pair.original).blocks:
        own = [one for one in moved if one.reading.name.startswith(path + ".")]
        size = sum(one.size for one in own)
        found.append((sum(one.change for one in own) / size) ** 0.5 if size else 0.0)
    return found


def kl_reading(name: str, side: Side) -> TokenKL:
    """Return how far the predictions of one side moved."""
    keep_N = side.predicts_N
    answers_N = keep_N & side.answer_N
    known_N = side.kl_N[keep_N]
    middle, high = np.quantile(known_N, [0.5, 0.99]) if len(known_N) else (0.0, 0.0)
    return TokenKL.model_validate(
        {
            "side": name,
            "mean": mean_by_unit(known_N, side.unit_N[keep_N], side.units),
            "answers": mean_by_unit(side.kl_N[answers_N], side.unit_N[answers_N], side.units),
            "median": float(middle),
            "p99": float(high),
            "tokens": int(keep_N.sum()),
            "units": side.units,
        }
    )


def splice_reading(forget: Side, retain: Side) -> SpliceFit:
    """Return how much of the edit "noise where harmful, the original elsewhere" explains."""
    kinds = []
    for name in forget.tally.kl_noise:
        weight, mixed = forget.tally.nearest(name)
        kinds.append(
            NoiseFit.model_validate(
                {
                    "noise": name,
                    "kl_forget": forget.tally.kl_noise[name] / max(forget.tally.tokens, 1),
                    "share": share_explained(forget.tally, retain.tally, name),
                    "share_answers": share_explained(forget.answers, retain.answers, name),
                    "weight": weight,
                    "share_mixed": mixed,
                    "weight_retain": retain.tally.nearest(name)[0],
                }
            )
        )
    return SpliceFit(
        auc=auc_by_unit(forget.kl_N, forget, retain.kl_N, retain),
        auc_answers=auc_of(forget.kl_N[forget.answer_N], retain.kl_N[retain.answer_N]),
        kinds=tuple(kinds),
    )


def picked(rows: Sequence[Row], count: int) -> list[int]:
    """Return the indices of a few rows, spread evenly, for rows of one kind lie together."""
    count = min(count, len(rows))
    return [i * len(rows) // count for i in range(count)]


def strips(name: str, side: Side, rows: Sequence[Row], pair: Pair, count: int) -> list[Strip]:
    """Return a few rows token by token."""
    found = []
    for i in picked(rows, count):
        row = rows[i]
        here = np.flatnonzero((side.row_N == i) & side.predicts_N)
        kl_at = {int(side.position_N[n]): float(side.kl_N[n]) for n in here}
        tokens, kl = strip_of(row, pair.tokenizer, kl_at, max_length=pair.max_length)
        found.append(
            Strip.model_validate({"side": name, "unit": row.unit, "tokens": tokens, "kl": kl})
        )
    return found
