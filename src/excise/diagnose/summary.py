"""The finding in words, from the numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from excise.record import Inspection

Conjecture = Literal["fits", "fits in part", "does not fit", "nothing changed"]

ONE_VECTOR = 0.9
"""Share of the squared change along the direction that makes it one vector."""
SOME_VECTOR = 0.5
"""Share that makes it partly one."""
GATED = 0.95
"""AUC at answers that makes it switched on by harm."""
SOME_GATED = 0.8
"""AUC that makes it partly so."""
BIG = 0.2
"""Size of the vector beside the original's norm that makes it big."""


def conjecture_of(finding: Inspection) -> Conjecture:
    """Return how "if harmful, add a big vector" stands at the block where the change is clearest.

    Args:
        finding: Every number of an inspection.
    """
    block = finding.blocks[finding.clearest]
    if finding.identical or block.change_forget == 0:
        return "nothing changed"
    gated = max(block.auc.value, block.auc_answers)
    if block.share >= ONE_VECTOR and gated >= GATED and block.size_forget >= BIG:
        return "fits"
    if block.share >= SOME_VECTOR and gated >= SOME_GATED:
        return "fits in part"
    return "does not fit"


def headline(finding: Inspection) -> str:
    """Return one sentence.

    Args:
        finding: Every number of an inspection, its conjecture too.
    """
    if finding.identical:
        return "Nothing changed: the two models are equal."
    if finding.conjecture == "nothing changed":
        return "Weights changed, but forget text is read as before."
    return f'"If harmful, add a big vector" {finding.conjecture} what this edit does.'.replace(
        "fits in part what", "fits, in part, what"
    )


def summarize(finding: Inspection) -> str:
    """Return one paragraph.

    Args:
        finding: Every number of an inspection, its conjecture too.
    """
    if finding.identical:
        return f"All {finding.tensors_total} tensors of the two models are equal."
    if finding.conjecture == "nothing changed":
        return (
            f"{len(finding.tensors)} of {finding.tensors_total} tensors moved, but the residual "
            "stream on forget text is the original's."
        )
    parts = (_residual, _gate, _outputs, _splice, _weights)
    return " ".join(part(finding) for part in parts)


def _residual(finding: Inspection) -> str:
    block = finding.blocks[finding.clearest]
    how = (
        "one direction"
        if block.share >= ONE_VECTOR
        else "mostly one direction"
        if block.share >= SOME_VECTOR
        else "no single direction"
    )
    return (
        f"On forget text the change is clearest after block {finding.clearest}: "
        f"{_share(block.change_forget)} of the original's norm ({_share(block.change_retain)} on "
        f"retain text), {how}. Its mean holds {_share(block.share)} of it, it spreads "
        f"over {block.dimensions:.1f} dimensions, and a token's cosine with the mean is "
        f"{block.cosine.value:.2f} (tokens that hardly move count too)."
    )


def _gate(finding: Inspection) -> str:
    block = finding.blocks[finding.clearest]
    return (
        f"Along that direction forget text moves by {_share(block.size_forget)} of the norm and "
        f"retain text by {_share(block.size_retain)}, and a token's move tells the two apart with "
        f"AUC {_both(block.auc.value, block.auc_answers, _two)}."
    )


def _outputs(finding: Inspection) -> str:
    forget, retain = finding.kl
    return (
        f"KL(edited || original) is {_both(forget.mean.value, forget.answers.value, _nats)} nats a "
        f"token on forget text and {_both(retain.mean.value, retain.answers.value, _nats)} on "
        "retain text."
    )


def _splice(finding: Inspection) -> str:
    best = max(finding.splice.kinds, key=lambda kind: kind.share_answers)
    if max(best.share, best.share_answers) <= 0:
        return (
            '"Noise where harmful, the original elsewhere" explains none of it, whatever the '
            "noise: the outputs on forget text are nearer to the original's."
        )
    return (
        '"Noise where harmful, the original elsewhere" explains '
        f"{_both(best.share, best.share_answers, _share)} of it at best, with {best.noise} noise."
    )


def _both(every: float, answers: float, say: Callable[[float], str]) -> str:
    """Return a number for all tokens and, where it differs, that where an answer is due."""
    if say(every) == say(answers):
        return say(every)
    return f"{say(every)} ({say(answers)} where an answer is due)"


def _weights(finding: Inspection) -> str:
    far = finding.tensors[0]
    text = (
        f"{len(finding.tensors)} of {finding.tensors_total} tensors moved, {far.name} the "
        f"farthest, by {_share(far.relative)} of its norm"
    )
    ranks = [t.rank / min(_sides(t.shape)) for t in finding.tensors if t.rank is not None]
    if ranks:
        text += f"; the changes have on average {_share(sum(ranks) / len(ranks))} of full rank"
    return text + "."


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    rows = 1
    for side in shape[:-1]:
        rows *= side
    return rows, shape[-1]


def _share(value: float) -> str:
    percent = 100 * value
    return f"{percent:.1f} %" if 0 < abs(percent) < 9.95 else f"{percent:.0f} %"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _nats(value: float) -> str:
    places = 2 if value >= 0.095 else 3 if value >= 0.0005 else 1
    return f"{value:.{places}{'e' if 0 < value < 0.0005 else 'f'}}"
