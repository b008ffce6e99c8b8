"""Any task of `lm-eval`, run by `lm-eval` itself on a model in memory.

Needs the extra `lm-eval`, imported late. Tasks fetch their own data sets; those come from the
hub's cache where it is offline. Our own multiple choice needs none of this and agrees with it to
the item (`tests/golden`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from excise.core.errors import UserError
from excise.evals.tokens import evaluating
from excise.record import Score, ScoreDirection


def run_lm_eval(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    *,
    name: str = "model",
    batch_size: int = 8,
    include: Path | None = None,
    seed: int = 0,
) -> list[Score]:
    """Run tasks of `lm-eval` on a model and return their scores.

    Args:
        model: A `transformers` causal model; its mode is restored.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups.
        limit: Questions per task at most; None for all.
        name: Name of the model in the record.
        batch_size: Sequences per forward.
        include: Folder with task files of one's own.
        seed: Seed of the few-shot examples.

    Returns:
        One score per task and metric, `set` is `lm-eval.TASK`; the interval is `lm-eval`'s own
        standard error times 1.96, of no width where it gives none.

    Raises:
        UserError: If the extra is missing, or `lm-eval` cannot find or run a task.
    """
    if not tasks:
        raise UserError("no lm-eval task was named; name one, for example 'arc_easy'")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            "lm-eval tasks need the extra 'lm-eval': pip install 'excise[lm-eval]'"
        ) from None
    manager = TaskManager(include_path=str(include) if include else None)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    kinds = ("random", "numpy_random", "torch_random", "fewshot_random")
    seeds = {f"{kind}_seed": seed for kind in kinds}
    options = {"task_manager": manager, "bootstrap_iters": 1000, "log_samples": False, **seeds}
    try:
        with evaluating(model):
            answer = lm_eval.simple_evaluate(wrapped, tasks=list(tasks), limit=limit, **options)
    except (KeyError, ValueError, OSError) as error:
        first = str(error).strip().splitlines()
        raise UserError(
            f"lm-eval could not run {', '.join(tasks)}: {first[0] if first else error!r}; "
            "check the names with `lm-eval ls tasks`"
        ) from None
    version = str(getattr(lm_eval, "__version__", ""))
    return scores_of(answer or {}, name=name, version=version)


def scores_of(answer: Mapping[str, Any], *, name: str, version: str) -> list[Score]:
    """Turn the answer of `lm_eval.simple_evaluate` into scores of the record.

    Args:
        answer: Its answer.
        name: Name of the model.
        version: Version of `lm-eval`.
    """
    out = []
    counts = answer.get("n-samples", {})
    better = answer.get("higher_is_better", {})
    for task, values in answer.get("results", {}).items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            half = 1.96 * error if isinstance(error, int | float) else math.nan
            half = half if math.isfinite(half) else 0.0
            up = better.get(task, {}).get(metric, True)
            direction: ScoreDirection = "lower" if up is False else "higher"
            out.append(
                Score(
                    model=name,
                    set=f"lm-eval.{task}",
                    metric=metric if filtered == "none" else f"{metric}.{filtered}",
                    value=float(value),
                    low=float(value) - half,
                    high=float(value) + half,
                    n=int(counts.get(task, {}).get("effective", 0)),
                    direction=direction,
                    definition=f"lm-eval {version}, task version "
                    f"{answer.get('versions', {}).get(task, '?')}, filter {filtered}",
                )
            )
    return out
