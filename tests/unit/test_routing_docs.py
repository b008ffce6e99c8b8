"""The example in the documentation runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "routing.md"


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    names: dict[str, object] = {}
    torch.manual_seed(0)
    exec(compile(code, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "'group': 'module_1', 'tensor': 'model.layers.{}.mlp.down_proj.weight'" in printed
    assert "'group': 'core', 'tensor': 'model.norm.weight'" in printed
