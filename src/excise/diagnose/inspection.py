"""What an edit did inside: every measurement, tied into one entry of the record.

Directions and noise are fitted on dev rows; everything else is measured on the held-out test set
and the retain test.

Shape legend: L blocks, N and M tokens of the forget and the retain side, U units, S bootstrap
samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain, Row, Rows
from excise.data.stream import encode
from excise.data.subsample import subsample
from excise.diagnose.activations import Chunk, ModelPair, norms, read_pair
from excise.diagnose.direction import Junk, Values, along, fit_junk, rank
from excise.diagnose.outputs import MIXED, Tally, noises, pieces, share_explained, token_kl
from excise.diagnose.summary import conjecture_of, headline, summarize
from excise.diagnose.weights import Moved, check_same_tensors, moved_tensors
from excise.evals.generate import continuations
from excise.models.anatomy import backbone
from excise.models.checkpoint import Checkpoint
from excise.record import (
    BlockChange,
    Estimate,
    Inspection,
    NoiseFit,
    Sample,
    SpliceFit,
    Strip,
    TokenKL,
)

SAMPLES = 300
"""Bootstrap samples of an interval."""


@dataclass(frozen=True)
class InspectedRows:
    """The rows an inspection reads.

    Attributes:
        fit: Dev forget rows, for directions and noise.
        forget: The held-out test set of all capabilities.
        retain: The retain test.
    """

    fit: Rows
    forget: Rows
    retain: Rows


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
    chosen = choose_rows(domain, rows)
    ctx.emit("inspect", {"step": "tensors"})
    moved = list(moved_tensors(original, edited))
    ctx.emit("inspect", {"step": "activations"})
    pair = ModelPair(
        original.load(dtype=ctx.dtype, device=ctx.device),
        edited.load(dtype=ctx.dtype, device=ctx.device),
        original.tokenizer(),
        max_length,
    )
    shown = 0 if domain.sensitive else samples
    numbers = _measured(pair, chosen, moved, name, shown)
    ctx.emit("inspect", {"step": "continuations"})
    said: tuple[Sample, ...] = ()
    for role, side in (("test", chosen.forget), ("retain_test", chosen.retain)):
        said += side_by_side(pair, [side[i] for i in spread_evenly(side, shown)], role, name)
    finding = numbers.model_copy(update={"conjecture": conjecture_of(numbers)})
    words = {"headline": headline(finding), "summary": summarize(finding)}
    return finding.model_copy(update=words), said


def choose_rows(domain: Domain, rows: int) -> InspectedRows:
    """Choose the rows of an inspection.

    Args:
        domain: Rows by role.
        rows: Rows of each kind at most.

    Raises:
        UserError: If a side has no rows.
    """
    by_role = {
        "dev_forget": [row for part in domain.dev_forget.values() for row in part],
        "test": [row for part in domain.test.values() for row in part],
        "retain_test": list(domain.retain_test),
    }
    for role, known in by_role.items():
        if not known:
            raise UserError(f"the data has no {role} rows to read; give more rows of that side")
    return InspectedRows(*(subsample(known, rows, by="row") for known in by_role.values()))


def _measured(
    pair: ModelPair, chosen: InspectedRows, moved: Sequence[Moved], name: str, shown: int
) -> Inspection:
    """Return what activations, logits and tensors tell, without words for it."""
    junk, forget, retain = read_sides(pair, chosen)
    return Inspection(
        model=name,
        summary="",
        identical=not any(tensor.change for tensor in moved),
        conjecture="nothing changed",
        peak=junk.peak,
        clearest=junk.clearest,
        blocks=tuple(
            block_change(i, junk, forget, retain, share)
            for i, share in enumerate(block_weights(pair, moved))
        ),
        kl=(token_kl_of("forget", forget), token_kl_of("retain", retain)),
        splice=splice_fit(forget, retain),
        strips=(
            *strips("forget", forget, chosen.forget, pair, shown),
            *strips("retain", retain, chosen.retain, pair, shown),
        ),
        tensors=tuple(
            sorted(
                (tensor.entry for tensor in moved if tensor.change),
                key=lambda entry: (-entry.relative, entry.name),
            )
        ),
        tensors_total=len(moved),
        rows={role: len(getattr(chosen, role)) for role in ("fit", "forget", "retain")},
    )


def read_sides(pair: ModelPair, chosen: InspectedRows) -> tuple[Junk, Side, Side]:
    """Fit on dev rows, then read both sides."""
    fit = list(read_pair(pair, chosen.fit, where="dev forget"))
    junk, noise = fit_junk(fit), noises(fit)
    size = len(noise["uniform"])
    sides = []
    for where, rows in (("forget", chosen.forget), ("retain", chosen.retain)):
        tokens = len(rows) * pair.max_length
        stride = max(1, tokens * size // MIXED)
        sides.append(gather(read_pair(pair, rows, where=where), rows, junk, noise, stride))
    return junk, sides[0], sides[1]


@dataclass(frozen=True)
class Side:
    """Everything that was read at the tokens of one side.

    Attributes:
        by: Numbers by block and token: `original`, `edited` and `change` are norms; `along`,
            `along_edited` and `along_original` lie along the junk direction; `cosine`.
        kl_N: KL(edited || original), NaN where the row ends.
        answer_N: Whether a scored token is predicted.
        unit_N: Number of each token's unit.
        row_N: Row of each token.
        position_N: Its place in the row.
        tally: Sums for the splice.
        answers: The same where a scored token is predicted.
    """

    by: Mapping[str, Float[NDArray[np.float64], "L N"]]
    kl_N: Float[NDArray[np.float64], " N"]
    answer_N: Bool[NDArray[np.bool_], " N"]
    unit_N: Int[NDArray[np.int64], " N"]
    row_N: Int[NDArray[np.int64], " N"]
    position_N: Int[NDArray[np.int64], " N"]
    tally: Tally
    answers: Tally

    @property
    def units(self) -> int:
        """Number of units."""
        return int(self.unit_N.max()) + 1

    @property
    def predicts_N(self) -> Bool[NDArray[np.bool_], " N"]:
        """Whether a token is not its row's last."""
        return np.isfinite(self.kl_N)


def gather(
    chunks: Iterable[Chunk],
    rows: Sequence[Row],
    junk: Junk,
    noise: Mapping[str, Float[Tensor, " V"]],
    stride: int,
) -> Side:
    """Read every number of a side in one pass over its chunks.

    Args:
        chunks: The rows as both models read them.
        rows: The rows.
        junk: Directions, fitted on other rows.
        noise: Noise of the splice, fitted on other rows.
        stride: One of how many tokens is mixed.
    """
    tally, answers = Tally(stride), Tally(answers_only=True)
    by: dict[str, list[Tensor]] = {}
    flat: dict[str, list[Tensor]] = {}
    for chunk in chunks:
        aside = along(chunk, junk.direction_LD)
        numbers_LN = {
            "original": norms(chunk.original_LND),
            "edited": norms(chunk.edited_LND),
            "change": aside.change_LN,
            "along": aside.along_LN,
            "cosine": aside.cosine_LN,
            "along_edited": aside.edited_LN,
            "along_original": aside.original_LN,
        }
        for name, value in numbers_LN.items():
            by.setdefault(name, []).append(value.double().cpu())
        kl_N = token_kl(chunk.edited_NV, chunk.original_NV).double()
        kl_N[~chunk.predicts_N] = torch.nan
        by_token = {"kl": kl_N, "answer": chunk.answer_N}
        by_token |= {"row": chunk.row_N, "position": chunk.position_N}
        for name, value in by_token.items():
            flat.setdefault(name, []).append(value.cpu())
        tally.add(chunk, noise)
        answers.add(chunk, noise)
    single_N = {name: torch.cat(parts).numpy() for name, parts in flat.items()}
    numbers: dict[str, int] = {}
    unit_N = [numbers.setdefault(rows[i].unit, len(numbers)) for i in single_N["row"].tolist()]
    return Side(
        {name: torch.cat(parts, 1).numpy() for name, parts in by.items()},
        single_N["kl"],
        single_N["answer"],
        np.array(unit_N, dtype=np.int64),
        single_N["row"],
        single_N["position"],
        tally,
        answers,
    )


def block_change(block: int, junk: Junk, forget: Side, retain: Side, weights: float) -> BlockChange:
    """Return what happened to the residual stream after one block."""
    norm = {
        f"norm_{name}_{model}": mean_by_unit(side.by[model][block], side.unit_N, side.units)
        for name, side in (("forget", forget), ("retain", retain))
        for model in ("original", "edited")
    }
    change_N, along_N = forget.by["change"][block], forget.by["along"][block]
    squared = float(np.square(change_N).sum())

    def relative(side: Side, name: str) -> float:
        mean = float(side.by["original"][block].mean())
        return float(side.by[name][block].mean()) / max(mean, 1e-12)

    def both(name: str) -> tuple[Values, Values]:
        return forget.by[name][block], retain.by[name][block]

    high_N, low_M = both("along")
    return BlockChange(
        block=block,
        **norm,
        change_forget=relative(forget, "change"),
        change_retain=relative(retain, "change"),
        cosine=mean_by_unit(forget.by["cosine"][block], forget.unit_N, forget.units),
        share=float(np.square(along_N).sum()) / squared if squared > 0 else 0.0,
        dimensions=float(junk.dimensions_L[block]),
        size_forget=relative(forget, "along"),
        size_retain=relative(retain, "along"),
        auc=auc_by_unit(high_N, forget, low_M, retain),
        auc_answers=auc_of(high_N[forget.answer_N], low_M[retain.answer_N]),
        auc_edited=auc_of(*both("along_edited")),
        auc_original=auc_of(*both("along_original")),
        weights=weights,
    )


def block_weights(pair: ModelPair, moved: Sequence[Moved]) -> list[float]:
    """Return for every block how far its weights moved, beside their norm (Frobenius)."""
    relative = []
    for path in backbone(pair.original).blocks:
        inside = [tensor for tensor in moved if tensor.entry.name.startswith(path + ".")]
        size = sum(tensor.size for tensor in inside)
        relative.append((sum(t.change for t in inside) / size) ** 0.5 if size else 0.0)
    return relative


def token_kl_of(name: str, side: Side) -> TokenKL:
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


def splice_fit(forget: Side, retain: Side) -> SpliceFit:
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


def unit_weights(units: int, seed: int) -> Float[NDArray[np.float64], "S U"]:
    """Return how often each unit occurs in each bootstrap sample."""
    generator = np.random.default_rng(seed)
    counts_SU = generator.multinomial(units, np.full(units, 1 / units), size=SAMPLES)
    return counts_SU.astype(np.float64)


def mean_by_unit(value_N: Values, unit_N: NDArray[np.int64], units: int) -> Estimate:
    """Return the mean over units of a number of tokens, with its interval.

    Args:
        value_N: A number per token.
        unit_N: Unit of each token.
        units: Number of units; those without a token are left out.
    """
    if not len(value_N):
        return Estimate(0.0, 0.0, 0.0)
    count_U = np.bincount(unit_N, minlength=units)
    here_U = count_U > 0
    mean_U = np.bincount(unit_N, value_N, units)[here_U] / count_U[here_U]
    means_S = unit_weights(len(mean_U), 0) @ mean_U / len(mean_U)
    return _estimate(float(mean_U.mean()), means_S, len(mean_U))


def _estimate(value: float, samples_S: Values, n: int) -> Estimate:
    """Return a value with the 95 % interval of its bootstrap samples (Efron 1979)."""
    low, high = np.quantile(samples_S, [0.025, 0.975])
    return Estimate(value, min(float(low), value), max(float(high), value), n)


def auc_by_unit(high_N: Values, forget: Side, low_M: Values, retain: Side) -> Estimate:
    """Return how well a number tells forget tokens from retain tokens, with its interval.

    Args:
        high_N: A number per token of the forget side; NaN leaves a token out.
        forget: The forget side.
        low_M: The same of the retain side.
        retain: The retain side.
    """
    good_N, good_M = np.isfinite(high_N), np.isfinite(low_M)
    ranking = rank(high_N[good_N], low_M[good_M])
    one_N, two_M = forget.unit_N[good_N], retain.unit_N[good_M]
    forget_SU, retain_SU = unit_weights(forget.units, 1), unit_weights(retain.units, 2)
    samples = [
        ranking.auc(forget_U[one_N], retain_U[two_M])
        for forget_U, retain_U in zip(forget_SU, retain_SU, strict=True)
    ]
    return _estimate(ranking.auc(), np.array(samples), forget.units + retain.units)


def auc_of(high_N: Values, low_M: Values) -> float:
    """Return how well a number tells two classes of tokens apart; NaN leaves a token out."""
    return rank(high_N[np.isfinite(high_N)], low_M[np.isfinite(low_M)]).auc()


def spread_evenly(rows: Sequence[Row], count: int) -> list[int]:
    """Return the indices of a few rows, spread evenly, for rows of one kind lie together."""
    count = min(count, len(rows))
    return [i * len(rows) // count for i in range(count)]


def strips(name: str, side: Side, rows: Sequence[Row], pair: ModelPair, count: int) -> list[Strip]:
    """Return a few rows token by token, each with the KL of the prediction that should name it."""
    shown = []
    for i in spread_evenly(rows, count):
        here = np.flatnonzero((side.row_N == i) & side.predicts_N)
        kl_at = {int(side.position_N[n]): float(side.kl_N[n]) for n in here}
        (example,) = encode([rows[i]], pair.tokenizer, max_length=pair.max_length)
        strip = {
            "side": name,
            "unit": rows[i].unit,
            "tokens": pieces(example.ids, pair.tokenizer),
            "kl": tuple(kl_at.get(t - 1) for t in range(len(example.ids))),
        }
        shown.append(Strip.model_validate(strip))
    return shown


def side_by_side(
    pair: ModelPair, rows: Sequence[Row], role: str, name: str, max_new: int = 24
) -> tuple[Sample, ...]:
    """Continue the same prompts greedily with both models.

    Args:
        pair: The models.
        rows: A few rows; none gives no samples.
        role: Where they come from, `test` or `retain_test`.
        name: Name of the edited model.
        max_new: New tokens at most.

    Returns:
        One sample per row.
    """
    if not rows:
        return ()
    said = [
        continuations(model, pair.tokenizer, rows, max_length=pair.max_length, max_new=max_new)
        for model in (pair.original, pair.edited)
    ]
    return tuple(
        Sample(
            set=role, prompt=prompt, expected=expected, outputs={"original": before, name: after}
        )
        for (prompt, expected, before), (_, _, after) in zip(*said, strict=True)
    )
