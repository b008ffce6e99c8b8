"""`--device auto` takes the accelerator that is there."""

from __future__ import annotations

import pytest
import torch

from excise.run.environment import device_of


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ((), "cpu"),
        (("mps",), "mps"),
        (("xpu",), "xpu"),
        (("cuda",), "cuda"),
        (("mps", "xpu", "cuda"), "cuda"),
    ],
)
def test_auto_takes_what_is_there(
    there: tuple[str, ...], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu), ("mps", torch.backends.mps)):
        monkeypatch.setattr(module, "is_available", lambda kind=kind: kind in there)
    assert device_of("auto") == taken
