"""Head and last hidden states of every family make the model's own logits.

Shape legend: B rows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.models import head as heads
from excise.models.checkpoint import save_model
from excise.models.head import final_hidden, head_of, head_of_checkpoint
from excise.models.tiny import FAMILIES, tiny_model, word_tokenizer

INPUTS = {"input_ids": torch.tensor([[1, 5, 9, 3], [1, 7, 7, 2]])}


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_times_head_are_the_logits(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, vocab=31, width=32, blocks=2).eval()
    with torch.no_grad():
        logits_BTV = model(**INPUTS).logits
        hidden_BTD = final_hidden(model, INPUTS)
        own_BTV = head_of(model).logits(hidden_BTD)
    assert torch.allclose(own_BTV, logits_BTV, atol=1e-6)
    assert (head_of(model).softcap is not None) == (family == "gemma2")
    stored = save_model(model, word_tokenizer(f"w{i}" for i in range(27)), tmp_path / "model")
    there = head_of_checkpoint(stored)
    assert torch.equal(there.logits(hidden_BTD), own_BTV)
    assert not there.weight_VD.requires_grad


def test_no_logits_are_made_and_no_hook_stays() -> None:
    model = tiny_model("llama", vocab=31, width=32, blocks=1)
    seen: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _m, _a, out: seen.append(out.numel()))
    hidden_BTD = final_hidden(model, INPUTS)
    handle.remove()
    assert seen == [0]
    assert hidden_BTD.requires_grad
    assert not model.lm_head._forward_pre_hooks
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        final_hidden(model, {})
    assert not model.lm_head._forward_pre_hooks


def test_a_tied_head_is_the_embedding_itself() -> None:
    model = tiny_model("gemma2", vocab=31, width=32, blocks=1)
    assert head_of(model).weight_VD is model.get_input_embeddings().weight


class Bent(nn.Module):
    """A model of no known family; its head does what no `Head` does where `bend` is on."""

    def __init__(self, bend: bool) -> None:
        super().__init__()
        inner = tiny_model("llama", vocab=31, width=32, blocks=1)
        self.model, self.lm_head = inner.model, inner.lm_head
        self.bend = bend

    def get_input_embeddings(self) -> Any:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        hidden_BTD = self.model(input_ids=input_ids).last_hidden_state
        z_BTV = self.lm_head(hidden_BTD)
        return type("Out", (), {"logits": z_BTV.abs() if self.bend else z_BTV})


def test_an_unknown_family_is_asked_whether_its_head_is_no_more() -> None:
    assert head_of(Bent(False)).vocab == 31
    with pytest.raises(UserError, match="not its head times its last hidden"):
        head_of(Bent(True))


def test_an_adapter_on_the_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", vocab=31, width=32, blocks=1)
    model.lm_head.base_layer = nn.Identity()
    monkeypatch.setattr(
        heads, "backbone", lambda _: type("A", (), {"head": "lm_head", "family": "llama"})
    )
    with pytest.raises(UserError, match="no plain matrix; merge its adapter"):
        head_of(model)
