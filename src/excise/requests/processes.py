"""A request against the processes and packages that are there, before any work starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeVar

from excise.core.config import Config, ConfigError, configs_in
from excise.core.errors import UserError
from excise.methods.base import methods_in
from excise.models.lora import LoRA, require_bitsandbytes
from excise.requests.audit import AuditRun
from excise.requests.recipe import Recipe
from excise.train.fit import FitConfig

C = TypeVar("C", bound=Config)

TOGETHER = ("pretrain", "arms", "canary")
"""Fields of a request whose models all processes train together; an attack is one process's."""


CUT: Final = frozenset(
    {
        "plain", "filtering", "propagate", "token_filter", "grad_diff_pretrain", "sgtm",
        "gradient_ascent", "grad_diff", "npo", "simnpo", "undial", "maxent", "task_vector",
        "undo",
    }
)  # fmt: skip
"""Methods that give the same model where `fit` cuts it over processes: they look at weights before
and after alone, and every process runs every block as often."""


def check_batches(request: Recipe | AuditRun, world: int) -> None:
    """Refuse steps whose rows cannot be dealt evenly to the processes.

    Args:
        request: What is run.
        world: Number of processes.

    Raises:
        ConfigError: One problem for each.
    """
    fits = _inside(request, FitConfig)
    problems = [
        f"{path}.batch_size: {fit.batch_size} rows cannot be dealt to {world} processes; use a "
        f"multiple of {world}"
        for path, fit in fits
        if fit.batch_size % world
    ]
    if problems:
        raise ConfigError(problems)


def check_packages(request: Recipe | AuditRun) -> None:
    """Refuse adapters on a base in 4 bits where bitsandbytes is missing.

    Raises:
        UserError: If it is.
    """
    if any(lora.load_in_4bit for _, lora in _inside(request, LoRA)):
        require_bitsandbytes()


def check_fsdp(recipe: Recipe, world: int) -> None:
    """Refuse models that cannot be cut over the processes.

    Args:
        recipe: What is run.
        world: Number of processes.

    Raises:
        UserError: If there is one process.
        ConfigError: One problem for each method that does not give the same model then.
    """
    if not recipe.fsdp:
        return
    if world == 1:
        raise UserError(
            "--fsdp cuts a model over several processes, and this is one; start with "
            "torchrun --nproc-per-node N -m excise, or leave --fsdp out"
        )
    problems = []
    for name, arm in recipe.arms.items():
        for method in methods_in(arm):
            label = getattr(method, "name", type(method).__name__)
            if label not in CUT:
                problems.append(
                    f"arms.{name}: '{label}' does not train a model that is cut over processes; "
                    "leave --fsdp out"
                )
            elif getattr(method, "lora", None) is not None:
                problems.append(
                    f"arms.{name}.lora: an adapter is small and its model is not cut; leave "
                    "--fsdp or the adapter out"
                )
            elif getattr(method, "sam", 0):
                problems.append(
                    f"arms.{name}.sam: a step of several passes cannot be cut over processes; "
                    "leave --fsdp or sam out"
                )
            elif getattr(getattr(method, "corpus", None), "name", "") == "on_policy":
                problems.append(
                    f"arms.{name}.corpus: every process samples texts of its own length from the "
                    "student, and a cut one needs all of them at every token; leave --fsdp out or "
                    "take another corpus"
                )
            for rule in ("stop", "stop_tolerance"):
                if getattr(method, rule, None) is not None:
                    problems.append(
                        f"arms.{name}.{rule}: a stop rule reads the whole model while '{label}' "
                        "trains; leave --fsdp or the rule out"
                    )
    if problems:
        raise ConfigError(problems)


def _inside(request: Recipe | AuditRun, kind: type[C]) -> list[tuple[str, C]]:
    """Return every part of one kind of the models that are trained, with its path."""

    def walk(config: Config, at: str) -> Iterator[tuple[str, C]]:
        if isinstance(config, kind):
            yield at, config
            return
        for name in type(config).model_fields:
            for key, inner in configs_in(getattr(config, name)):
                yield from walk(inner, f"{at}.{name}{key}")

    parts = [(n + k, c) for n in TOGETHER for k, c in configs_in(getattr(request, n, None))]
    return [found for at, config in parts for found in walk(config, at)]
