"""Every default that a method explains: what it is called, where it is from, and whether it is so.

`RELEASED` holds what the source of a default says, taken from the source and not from our code. A
default that is another must say so in its sentence, with both numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from excise.core.config import Config
from excise.methods import METHODS, RMU, Method
from excise.methods.base import Paper

OURS, WORDS = "ours", "in words"
"""No value was published; or what was published is a rule, which the sentence tells."""

SOURCE = re.compile(
    r"[\w./-]+\.(?:py|md|yaml|sh|ipynb|jsonl)\b"  # a file
    r"|\b[\w-]+/[\w.-]+@[0-9a-f]{7}"  # a commit
    r"|README|--\w+|arXiv:\d{4}\.\d{4,5}"
    r"|\b(?:section|appendix|equation|table|figure|algorithm) [A-Z0-9]",
    re.IGNORECASE,
)
NO_SOURCE = re.compile(r"^ours: |no published value")
DIFFERS = re.compile(r"\b(?:here|ours?)\b", re.IGNORECASE)
NUMBER = re.compile(r"(?<![\w.])(\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?|\.\d+)( ?%)?", re.IGNORECASE)

TOFU: Mapping[str, Any] = {
    "batch_size": 32, "weight_decay": 0.01, "schedule": "linear", "clip": 1.0,
}  # fmt: skip
"""Fine-tuning of TOFU and of open-unlearning."""

EXPAND: Mapping[str, Any] = {
    "expand.depth": 5 / 8,
    "expand.width": 64 / 2048,
    "expand.alpha": -0.75,
    "expand.l1": 1e-4,
    "expand.tokens": {"slope": 1, "offset": -4, "smooth_forget": 1, "smooth_retain": 20},
}
REPAIR: Mapping[str, Any] = {
    "lr": 5e-5, "batch_size": 64, "betas": (0.9, 0.95), "weight_decay": 0.1,
}  # fmt: skip

RELEASED: Mapping[str, Mapping[str, Any]] = {
    "filter_lora": {"core_ratio": 2.0, "adapter_share": WORDS, "adapter_lr": None, "lora": WORDS},
    "relabel": {"l2": OURS},
    "moefy": {"score": OURS, "dense_share": OURS},
    "grad_diff_pretrain": {"push": "ascent"},
    "token_filter": {"hidden": "<|hidden|>", "filter_above": OURS},
    "era": {**EXPAND, "expand.coherence": {"check_rows": 1000, "fit": {"steps": 41, **REPAIR}}},
    "era_after": {
        **EXPAND,
        "expand.coherence": {"fit": {"steps": 501, **REPAIR}},
        "expand": WORDS,
        "fit.lr": 1e-4,
        "fit.weight_decay": 0.1,
        "fit.steps": 5000,
    },
    "sgtm": {
        "preset": WORDS,
        "p_off": 0.25,
        "module.heads": 1,
        "module.width": 64 / 512,
        "joint": ("embed", "head", "norms"),
        "p_as": OURS,
        "alpha": OURS,
        "p_push": OURS,
        "read": OURS,
        "repair": OURS,
        "freeze": "zeroed",
        "ablate": "zero",
    },
    "gram": {"module.width": 0.1, "p_cr": 0.5, "p_as": 0.3, "p_push": OURS, "joint": ()},
    "demix": {"module.width": 1.0},
    "memsinks": {"module.width": OURS, "sinks": OURS, "active": OURS},
    "adapter_modules": {"p_off": 0.25, "joint": WORDS, "lora.rank": OURS},
    "dual_adapters": {
        "p_off": 0.05,
        "lora.rank": 1,
        "fit": {
            "steps": 1000, "lr": 1e-4, "batch_size": 1, "warmup": 100, "schedule": "cosine",
            "weight_decay": 0.01, "clip": 0.0,
        },
    },
    "gradient_ascent": {"fit": {**TOFU, "lr": 1e-5}},
    "grad_diff": {
        "fit": {"steps": 100, "lr": 6e-5, "batch_size": 4, "clip": 1.0},
        "alpha": 1.0,
        "retain_loss": "nll",
    },
    "npo": {
        "beta": 0.1, "gamma": 1.0, "alpha": 1.0, "reduction": "sequence_sum",
        "fit": {**TOFU, "lr": 1e-5},
    },
    "simnpo": {
        "beta": 4.5, "delta": 0.0, "gamma": 0.125, "alpha": 1.0, "fit": {**TOFU, "lr": 1e-5},
    },
    "dpo": {"beta": 0.1, "gamma": 1.0, "alpha": 1.0, "fit": {**TOFU, "lr": 1e-5}},
    "idk_dpo": {
        "beta": 0.1, "gamma": 1.0, "alpha": 1.0, "answers": WORDS, "fit": {**TOFU, "lr": 1e-5},
    },
    "altpo": {
        "beta": 0.1, "gamma": 1.0, "alpha": 1.0, "answers": 5, "temperature": 1.0,
        "new_tokens": 200, "ask": WORDS, "fit": {**TOFU, "lr": 5e-5},
    },
    "undial": {"beta": 10.0, "alpha": 0.0, "fit": {**TOFU, "lr": 1e-4}},
    "maxent": {"fit": {"steps": 100, "lr": 3e-5, "batch_size": 4, "clip": 1.0}, "alpha": 1.0},
    "rmu": {
        "layer": 7,
        "steering": 20.0,
        "alpha": 100.0,
        "fit": {"steps": 80, "lr": 5e-5, "batch_size": 4, "optimizer": "hf_adamw"},
        "adaptive": WORDS,
        "traces": WORDS,
    },
    "task_vector": {"scale": 1.0, "fit": {"lr": 1e-5, "batch_size": 32, "schedule": "cosine"}},
    "direction": {
        "layer": WORDS, "max_kl": 0.1, "tokens": WORDS, "rows": 128, "dev_rows": 32,
        "embedding": True,
    },
    "refusal": {
        "alpha": WORDS, "sentences": WORDS,
        "fit": {"lr": 1e-5, "weight_decay": 0.01, "batch_size": 32},
    },
    "checkpoint_transfer": {
        "layers": WORDS, "remove": 5.0, "retain": 5.0, "ramp": True, "fit_on": WORDS,
        "map_rows": 1024, "ridge": 0.01,
        "fit": {
            "steps": 512, "lr": 1e-3, "batch_size": 4, "weight_decay": 0.01, "schedule": "linear",
            "clip": 1.0,
        },
        "lora": {"rank": 16, "alpha": 16.0, "output": "merged"},
    },
    "elm": {
        "erase": 1.0, "retain": 1.0, "fluency": 1.0, "skip_first": True,
        "guide": {"eta": 1000.0, "top": 50, "temperature": 1.2, "gamma": 3.0},
        "layers": (4, 5, 6, 7),
        "fit": {"steps": 2250, "lr": 5e-5, "batch_size": 4, "weight_decay": 0.01},
        "max_length": WORDS,
        "lora": {"rank": 256, "alpha": 16.0},
    },
    "repselect": {
        "components": {"count": 512}, "elicit": {"rank": 8, "alpha": 8.0}, "elicit_lr": 0.01,
        "fit": {"lr": 0.05, "batch_size": 8}, "budget": 0.01, "budget_rows": 128,
        "modules": WORDS, "max_length": 128,
    },
    "tar": {
        "mapping": {"fit": {"steps": 750, "lr": 2e-5, "batch_size": 128, "warmup": 50}},
        "inner_steps": 64, "inner_lr": (2e-6, 2e-5, 4e-5), "inner_batch": 32, "inner_decay": 0.01,
        "attackers": 1, "switch": WORDS, "every": 4, "growth": 0.0625, "scale": 4.0,
        "entropy": WORDS, "alpha": 1.0, "heldout": 0.2, "max_length": 256,
        "fit": {
            "steps": 750, "lr": 2e-5, "batch_size": 64, "warmup": 32,
            "optimizer": "schedule_free",
        },
    },
    "seam": {
        "alpha": 1.0, "beta": 0.01, "eps": 1e-3, "refusal": WORDS, "max_length": 256,
        "fit": {
            "steps": 2000, "lr": 2e-5, "batch_size": 4, "warmup": 200, "schedule": "cosine",
            "weight_decay": 0.0,
        },
    },
    "rmu_lat": {
        "layer": 8, "attack_layer": WORDS, "steering": 6.5, "alpha": 1200.0, "epsilon": 2.0,
        "attack_steps": 16, "attack_lr": 0.05, "per_attack": 4, "max_length": 768,
        "fit": {"steps": 800, "lr": 5e-5, "batch_size": 4, "weight_decay": 0.01},
    },
    "circuit_breakers": {
        "layers": (9, 19), "alpha": 10.0, "horizon": 300, "max_length": 512,
        "retain_max_length": 1024,
        "fit": {"steps": 150, "lr": 1e-4, "batch_size": 16, "schedule": "constant", "clip": 1.0},
        "lora": {"rank": 16, "alpha": 16.0},
    },
    "repnoise": {
        "alpha": 1.0, "beta": 0.001, "max_length": 256,
        "fit": {
            "steps": 250, "lr": 1e-4, "batch_size": 4, "warmup": 25, "schedule": "cosine",
            "weight_decay": 0.01,
        },
    },
    "ssd": {"alpha": 10.0, "lam": 1.0, "batch_size": 64, "against": "all", "vectors": True},
    "lfssd": {"alpha": 10.0, "lam": 1.0, "batch_size": 64},
    "assd": {"batch_size": 64, "against": "all"},
    "potion": {
        "rho": WORDS, "start_divisor": 25.0, "step": 1.1, "tries": 500, "rows": WORDS,
        "loss": "logits", "against": "retain", "batch_size": 512, "vectors": True,
    },
    "undo": {
        "alpha": OURS,
        "beta": 0.1,
        "groups": ("all",),
        "fit": {
            "steps": 1000, "lr": 7e-4, "min_lr": 0.1, "warmup": 50, "schedule": "cosine",
            "batch_size": 360, "clip": 1.0, "weight_decay": 0.0,
        },
        "max_length": 256,
        "stop_tolerance": 0.05,
    },
}  # fmt: skip
"""By method and setting; of a configuration inside one, the settings that its source names."""


def default_of(cls: type[Config], path: str) -> Any:
    """Return the default of a dotted setting.

    Raises:
        AttributeError: If there is no such setting.
    """
    first, *rest = path.split(".")
    if first not in cls.model_fields:
        raise AttributeError(first)
    value = cls.model_fields[first].get_default(call_default_factory=True)
    for name in rest:
        value = getattr(value, name)
    return value


def numbers(text: str) -> set[float]:
    """Return the numbers in a text; of a percentage, the share too."""
    found = set()
    for digits, percent in NUMBER.findall(text):
        value = float(digits.replace(",", ""))
        found |= {value, value / 100} if percent else {value}
    return found


def contradictions(at: str, sentence: str, released: Any, ours: Any) -> Iterator[str]:
    """Yield where a default is not what was released and the sentence does not say so."""
    if isinstance(released, Mapping):
        for name, value in released.items():
            yield from contradictions(f"{at}.{name}", sentence, value, getattr(ours, name))
        return
    if released == ours:
        return
    if not DIFFERS.search(sentence):
        yield f"{at}: {released} was released and {ours} is the default; say so with 'here'"
    parts = [v if isinstance(v, tuple) else (v,) for v in (released, ours)]
    said = numbers(sentence)
    for value in (*parts[0], *parts[1]):
        counts = isinstance(value, int | float) and not isinstance(value, bool) and value
        if counts and not any(abs(abs(value) - n) <= 1e-9 * n for n in said):
            yield f"{at}: {released} was released, {ours} is the default; {value} is not said"


def problems(cls: type[Method], paper: Paper, released: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the defaults that a method explains."""
    name = cls.model_fields["name"].default
    found = [f"{key}: in the table, not explained" for key in released if key not in paper.defaults]
    for key, sentence in paper.defaults.items():
        at = f"{name}.{key}"
        try:
            ours = default_of(cls, key)
        except AttributeError:
            found.append(f"{at}: no such setting")
            continue
        if key not in released:
            found.append(f"{at}: what was released is not in the table")
            continue
        value = released[key]
        own = bool(NO_SOURCE.search(sentence))
        if own != (value == OURS):
            found.append(f"{at}: the table and the sentence disagree on whether it is ours")
        if not (own or SOURCE.search(sentence)):
            found.append(f"{at}: names no source")
        if value not in (OURS, WORDS):
            found += contradictions(at, sentence, value, ours)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_every_default_has_a_name_a_source_and_the_released_value(name: str) -> None:
    cls = METHODS[name]
    assert problems(cls, cls.paper, RELEASED.get(name, {})) == []


def test_the_table_has_no_method_that_does_not_exist() -> None:
    assert set(RELEASED) <= set(METHODS)


@pytest.mark.parametrize(
    ("name", "key", "sentence", "problem"),
    [
        ("grad_diff", "fit", "run_unlearn_language.py: 100 steps of 4, lr 6e-5", "say so"),
        ("grad_diff", "fit", "run_unlearn_language.py: 100 steps; here 8 rows", "4 is not said"),
        ("grad_diff", "fit", "run_unlearn_language.py: 4 rows; here another number", "8 is not"),
        ("undo", "alpha", "run_serum_arithmetic_sweep_alpha.py: 0.6", "whether it is ours"),
        ("undo", "max_length", "256 there; here 512", "names no source"),
        ("undo", "max_len", "run_serum_arithmetic_sweep_alpha.py: 256", "no such setting"),
        ("undo", "fit.step", "run_serum_arithmetic_sweep_alpha.py: 1000", "no such setting"),
        ("undo", "student", "section 3: the unlearned", "is not in the table"),
    ],
)
def test_a_sentence_that_is_wrong_is_found(
    name: str, key: str, sentence: str, problem: str
) -> None:
    cls = METHODS[name]
    paper = replace(cls.paper, defaults={**cls.paper.defaults, key: sentence})
    found = problems(cls, paper, RELEASED[name])
    assert any(problem in p and p.startswith(f"{name}.{key}") for p in found)


def test_a_default_that_moves_away_from_its_source_is_found() -> None:
    class Moved(RMU):
        steering: float = 6.5

    (found,) = problems(Moved, Moved.paper, RELEASED["rmu"])[:1]
    assert "20.0 was released and 6.5 is the default" in found
