"""Vectors before the tokens: what they change, what they leave alone, and that nothing stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.fixtures.odd_models import odd_model

from excise.data.domain import Row
from excise.data.stream import collate, encode
from excise.evals.generate import Prompt, continue_greedily
from excise.models.soft_prompt import PARAMETER, PromptVectors
from excise.models.tiny import FAMILIES, byte_tokenizer, tiny_model

ODD = ("opt", "bloom", "mamba", "rwkv")
COUNT = 3


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def inputs() -> dict[str, Any]:
    rows = [Row(unit="a", text="a short text"), Row(unit="b", text="another")]
    return collate(encode(rows, byte_tokenizer(), max_length=32), pad_id=0).inputs


@pytest.mark.parametrize("family", [*FAMILIES, *ODD])
def test_vectors_are_read_and_alone_are_trained(family: str) -> None:
    model = odd_model(family) if family in ODD else tiny_model(family)
    given = inputs()
    before = model(**given, use_cache=False).logits
    required = [p.requires_grad for p in model.parameters()]
    prompt = PromptVectors(COUNT, generator())
    with prompt.on(model):
        torch.testing.assert_close(model(**given, use_cache=False).logits, before)
        prompt.begin()
        logits_BTV = model(**given, use_cache=False).logits
        assert logits_BTV.shape == before.shape
        assert (logits_BTV - before).abs().max() > 1e-6
        logits_BTV.square().sum().backward()
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained == [PARAMETER]
        assert prompt.vectors_KD.grad is not None
        assert prompt.vectors_KD.grad.abs().sum() > 0
        assert all(p.grad is None for n, p in model.named_parameters() if n != PARAMETER)
    torch.testing.assert_close(model(**given, use_cache=False).logits, before)
    assert [p.requires_grad for p in model.parameters()] == required
    assert not hasattr(model, PARAMETER)


def test_logits_are_those_behind_embedded_vectors() -> None:
    model, given = tiny_model("llama", vocab=300), inputs()
    prompt = PromptVectors(COUNT, generator())
    with prompt.on(model), torch.no_grad():
        prompt.begin()
        prompt.vectors_KD.normal_(generator=generator())
        logits_BTV = model(**given, use_cache=False).logits
        vectors_BKD = (prompt.vectors_KD * prompt.scale).expand(2, -1, -1).clone()
    tokens_BTD = model.get_input_embeddings()(given["input_ids"])
    mask_BT = torch.cat([torch.ones(2, COUNT, dtype=torch.long), given["attention_mask"]], 1)
    expected = model(
        inputs_embeds=torch.cat([vectors_BKD, tokens_BTD], 1), attention_mask=mask_BT
    ).logits[:, COUNT:]
    real = given["attention_mask"].bool()
    torch.testing.assert_close(logits_BTV[real], expected[real])


def test_a_cached_continuation_is_that_of_the_whole_text() -> None:
    model, tokenizer = tiny_model("llama", vocab=300), byte_tokenizer()
    prompt = PromptVectors(COUNT, generator())
    ids = tuple(tokenizer("a text that is continued")["input_ids"])
    with prompt.on(model), torch.no_grad():
        prompt.begin()
        (said,) = continue_greedily(model, tokenizer, [Prompt(ids, "", "", 6)])
        whole = list(ids)
        for _ in range(6):
            ids_BT = torch.tensor([whole])
            given = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
            position_BT = torch.arange(len(whole))[None]
            logits = model(**given, position_ids=position_BT, use_cache=False).logits
            whole.append(int(logits[0, -1].argmax()))
    assert said == tokenizer.decode(whole[len(ids) :], skip_special_tokens=True).strip()
