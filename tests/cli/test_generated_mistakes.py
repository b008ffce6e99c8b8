"""A slice of the generated bad inputs: no traceback, no hang, no changed byte, no code run."""

from __future__ import annotations

import os
import random

import pytest
from benchmarks import bad_inputs as bad

from excise.core.errors import UserError
from excise.data.chat import apply_template
from excise.models.tiny import byte_tokenizer

NO_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="cases run in forks")


@NO_FORK
def test_a_slice_of_the_generated_inputs() -> None:
    """Drawn from all kinds; those that would train are left to the whole campaign."""
    quick = [case for case in bad.cases(400, seed=1) if "--dry-run" in case.args]
    chosen = random.Random(1).sample(quick, 25)
    codes = [case for case in bad.codes(random.Random(1)) if "beside" not in case.name]
    chosen += random.Random(1).sample(codes, 15)
    told: list[str] = []
    counts = bad.campaign(
        chosen, 20, lambda case, out: told.extend(f"{case.name}: {f}" for f in out.faults)
    )
    assert told == []
    assert sum(count for name, count in counts.items() if name.startswith("exit ")) == 40


def test_the_whole_campaign_is_long_and_the_same_every_time() -> None:
    names = [case.name for case in bad.cases(500)]
    assert len(names) >= 400
    assert names == [case.name for case in bad.cases(500)]


@NO_FORK
@pytest.mark.parametrize("name", ["loops flat", "huge power"])
def test_a_template_without_end_is_told(name: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = bad.TEMPLATES[name]
    with pytest.raises(UserError, match="does not end within"):
        apply_template([{"role": "user", "content": "x"}], tokenizer, tokenize=False)
