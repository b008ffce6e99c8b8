from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from excise.core.errors import UserError
from excise.data.encoding import leading_specials
from excise.models.tiny import (
    BYTE_VOCAB,
    FAMILIES,
    byte_tokenizer,
    tiny_config,
    tiny_model,
    train_bpe,
    word_tokenizer,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_without_randomness(family: str) -> None:
    model = tiny_model(family, width=32)
    ids_BT = torch.arange(4, 16)[None]
    with torch.no_grad():
        first, second = model(ids_BT).logits, model(ids_BT).logits
    assert first.shape == (1, 12, BYTE_VOCAB)
    assert torch.equal(first, second)
    assert not model.training
    model.train()
    with torch.no_grad():
        assert torch.allclose(model(ids_BT).logits, first, atol=1e-5), "dropout is not 0"


def test_seed_decides_weights_and_leaves_the_global_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, two = tiny_model("llama", width=32), tiny_model("llama", width=32)
    assert torch.equal(torch.rand(2), expected)
    other = tiny_model("llama", width=32, seed=1)
    key = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(one.state_dict()[key], two.state_dict()[key])
    assert not torch.equal(one.state_dict()[key], other.state_dict()[key])


def test_overrides_reach_the_config() -> None:
    config = tiny_config("mistral", width=32, blocks=3, sliding_window=4)
    assert (config.sliding_window, config.num_hidden_layers, config.hidden_size) == (4, 3, 32)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"no tiny model of 'lama'.*'llama'"):
        tiny_config("lama")
    with pytest.raises(UserError, match=r"no field 'sliding_widow'.*'sliding_window'"):
        tiny_config("mistral", sliding_widow=4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mixtral"])
def test_models_round_trip_through_a_folder(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(family, width=32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = model.state_dict()
    assert expected.keys() == loaded.state_dict().keys()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())


def test_word_tokenizer_joins_words_and_puts_bos_first() -> None:
    tokenizer = word_tokenizer(["the", "cat", "sat.", "the"])
    ids = tokenizer("the cat flew sat.")["input_ids"]
    assert ids == [1, 4, 5, 3, 6]
    assert len(tokenizer) == 7
    assert tokenizer.decode(ids[1:]) == "the cat <unk> sat."
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the cat sat."
    assert leading_specials(tokenizer) == [1]
    assert tokenizer(" cat", add_special_tokens=False)["input_ids"] == [5]
    with pytest.raises(UserError, match="not a word"):
        word_tokenizer(["two words"])


@pytest.mark.parametrize("text", ["plain", " héllo  wörld\n\t", "😀 漢字\x00", "''\"<x>\\", ""])
def test_byte_level_tokenizers_round_trip_exactly(text: str) -> None:
    for tokenizer in (byte_tokenizer(), byte_tokenizer(bos=True), train_bpe(["hello"] * 3, 270)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(byte_tokenizer()(text)["input_ids"]) == len(text.encode())
    assert len(byte_tokenizer(bos=True)(text)["input_ids"]) == len(text.encode()) + 1


def test_bpe_merges_what_it_saw() -> None:
    tokenizer = train_bpe(["hello world"] * 4, 280)
    ids = tokenizer("hello world", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    assert max(ids) < len(tokenizer) <= 280
    with pytest.raises(UserError, match="cannot hold all bytes"):
        train_bpe(["a"], 100)


def test_tokenizers_round_trip_through_a_folder(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for i, tokenizer in enumerate(
        (word_tokenizer(["a", "b"]), byte_tokenizer(chat=True), train_bpe(["a b"], BYTE_VOCAB))
    ):
        tokenizer.save_pretrained(tmp_path / str(i))
        loaded = AutoTokenizer.from_pretrained(tmp_path / str(i))
        assert loaded("a  b")["input_ids"] == tokenizer("a  b")["input_ids"]
        assert loaded.chat_template == tokenizer.chat_template
        assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


def test_chat_template_marks_assistant_turns() -> None:
    tokenizer = byte_tokenizer(chat=True)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    out = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = out["input_ids"], out["assistant_masks"]
    assert tokenizer.decode([t for t, m in zip(ids, mask) if m]) == "yo<eos>"
    assert ids.count(1) == 1
    assert math.isclose(sum(mask), 3)
