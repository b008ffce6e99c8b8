"""Parts of made-up records: models, scores, attacks, verdicts."""

from __future__ import annotations

import random
from typing import Literal

from excise.record import LEVELS, AttackVariant, CurvePoint, LevelResult, ModelRef, Score, Verdict

TOKENS = (0, 512, 1024, 2048, 4096, 8192)
ENDS = {"original": (0.97, 0.98), "oracle": (0.03, 0.05)}


def digest(name: str) -> str:
    """Return a stand-in for a SHA-256."""
    return f"{random.Random(name).getrandbits(256):064x}"


def model(name: str, parameters: int = 268_416) -> ModelRef:
    """Return a model that is not there."""
    return ModelRef(
        name=name,
        path=f"stages/{name}",
        fingerprint=digest(name),
        tokenizer=digest("tokenizer"),
        source="facts/tiny-llama" if name == "original" else "",
        parameters=parameters,
    )


def scores(name: str, forget: float, retain: float, adjacent: float) -> list[Score]:
    """Return the scores of one model before any attack."""
    sets = (("test.facts", forget), ("retain_test", retain), ("adjacent_test", adjacent))
    result = [
        Score(
            model=name,
            set=where,
            metric="exact_match",
            value=value,
            low=max(0.0, value - 0.035),
            high=min(1.0, value + 0.03),
            n=160,
            chance=1 / 24,
            definition="exact_match@1",
        )
        for where, value in sets
    ]
    loss = 0.06 + 3.4 * (1 - forget) + (6 if name == "maxent" else 0)
    result.append(
        Score(
            model=name,
            set="test.facts",
            metric="text_loss",
            value=loss,
            low=loss * 0.96,
            high=loss * 1.05,
            n=160,
            direction="lower",
            chance=9.6,
            definition="text_loss@1",
        )
    )
    return result


def curve(start: float, end: float, trained: float | None = None) -> tuple[CurvePoint, ...]:
    """Return a relearning curve from `start` to `end`."""
    points = []
    for index, tokens in enumerate(TOKENS):
        part = (index / (len(TOKENS) - 1)) ** 1.3
        value = start + (end - start) * part
        points.append(
            CurvePoint(
                examples=tokens // 16,
                tokens=tokens,
                flops=6.0 * 268_416 * tokens,
                score=value,
                low=max(0.0, value - 0.05),
                high=min(1.0, value + 0.05),
                retain=0.98 - 0.02 * part,
                trained=None if trained is None else start + (trained - start) * part**0.5,
            )
        )
    return tuple(points)


def point(score: float, tokens: int = 0) -> CurvePoint:
    """Return one point of an attack that does not train."""
    return CurvePoint(
        tokens=tokens,
        score=score,
        low=max(0.0, score - 0.04),
        high=min(1.0, score + 0.04),
        retain=0.97,
    )


def one(
    subject: str, name: str, level: str, variant: str, start: float, end: float
) -> AttackVariant:
    """Return an attack of two points that ran and decides."""
    access: dict[str, Literal["prompt", "activations", "weights"]]
    access = {"D1": "prompt", "D2": "activations", "D3": "weights"}
    return AttackVariant(
        name=name,
        subject=subject,
        access=access[level],
        level=level,
        variant=variant,
        metric="exact_match",
        scored_on="test.facts",
        decisive=True,
        curve=(point(start), point(end, 96 if level == "D1" else 0)),
    )


def unusual(subject: str, start: float) -> list[AttackVariant]:
    """Return controls, an attack that was not run and one without power."""
    random = one(subject, "direction", "D2", "random", start, start)
    result = [
        random.model_copy(
            update={
                "variant": f"random-{i}",
                "control": True,
                "decisive": False,
                "curve": (point(start), point(start + 0.015 * i)),
            }
        )
        for i in range(3)
    ]
    lens = one(subject, "lens", "D2", "", start, start)
    missing = {"status": "missing", "reason": "not part of the smoke budget", "curve": ()}
    invalid = {
        "status": "invalid",
        "reason": "the positive control was not recovered within the budget",
    }
    prefix = one(subject, "prefix_fill", "D1", "k=8", start, start)
    return [
        *result,
        lens.model_copy(update={**missing, "decisive": False}),
        prefix.model_copy(update={**invalid, "decisive": False}),
    ]


def attacks(subject: str, start: float, relearned: float) -> list[AttackVariant]:
    """Return every attack of the smoke budget on one model."""
    reference = subject in ("original", "positive-control") or subject.startswith("oracle")
    result = [
        one(subject, "few_shot", "D1", "k=4", start, start + 0.02),
        one(subject, "direction", "D2", "matched", start, min(0.98, start + 0.21)),
        one(subject, "quantize", "D3", "int4", start, start + 0.01),
    ]
    result += [] if reference else unusual(subject, start)
    for variant, scale in (("full", 1.0), ("lora", 0.8)):
        for lr in (3e-4, 1e-3, 3e-3):
            chosen = lr == 1e-3
            end = start + (relearned - start) * scale * (1.0 if chosen else 0.6)
            result.append(
                AttackVariant(
                    name="relearn",
                    subject=subject,
                    access="weights",
                    level="D4",
                    variant=variant,
                    trained_on="relearn.facts",
                    scored_on="test.facts",
                    metric="exact_match",
                    lr=lr,
                    decisive=chosen,
                    curve=curve(start, end, trained=0.92 if chosen else 0.7),
                )
            )
    return result


def verdict(name: str, start: float, end: float) -> Verdict:
    """Return a verdict that goes with the attacks on `name`."""
    gap = (end - 0.05) / 0.94
    passed = gap < 0.1
    states: tuple[Literal["pass", "fail", "untested", "underpowered"], ...] = (
        "pass",
        "underpowered" if name == "rmu" else "pass",
        "pass" if passed else "fail",
        "pass",
        "pass" if passed else "fail",
        "pass" if passed else "untested",
    )
    levels = tuple(
        LevelResult(
            level=code,
            words=text,
            status=state,
            against="oracle" if state != "untested" else "nothing",
            gap=None if state == "untested" else (gap if code == "D4" else gap / (6 - index)),
            low=None
            if state == "untested"
            else (gap if code == "D4" else gap / (6 - index)) - 0.07,
            high=None
            if state == "untested"
            else (gap if code == "D4" else gap / (6 - index)) + 0.08,
            margin=0.1,
            decided_by={"D4": "relearn, full, 1e-3", "D2": "direction, matched"}.get(
                code, "scores"
            ),
            reason="inside the margin" if state == "pass" else "the interval leaves the margin",
        )
        for index, ((code, text), state) in enumerate(zip(LEVELS.items(), states, strict=True))
    )
    back = (end - start) / (0.97 - start)
    return Verdict(
        model=name,
        sentence=(
            f"After 8,192 tokens of relearning on other facts, {100 * back:.0f} % of what {name} "
            f"removed came back; an oracle under the same attack reaches 2 %."
        ),
        budget="smoke",
        levels=levels,
        highest="D5" if passed else "D0",
        recovery=back,
        recovery_tokens=8192,
        residual_bits=0.03 if passed else 2.31,
        residual_low=-0.05 if passed else 1.94,
        residual_high=0.11 if passed else 2.66,
        null=0.012,
        reasons=(
            "The prefix-fill attack is invalid: it did not recover its positive control.",
            "Rates were chosen on dev; the worst of them is in the table.",
        ),
    )


MODELS: dict[str, tuple[float, float, float]] = {
    "filtering": (0.04, 0.06, 0.99),
    "grad_diff": (0.02, 0.44, 0.93),
    "maxent": (0.03, 0.71, 0.97),
    "rmu": (0.09, 0.83, 0.98),
}
"""Forget score before and after relearning, and retain score."""
