"""Ties and fused tensors: what is one parameter in memory and several on disk, or the reverse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import byte_tokenizer, tiny_model


def raw(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder with the safetensors library."""
    return {k: v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}


def plain(folder: Path) -> Any:
    """Load a folder with plain transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def test_a_tensor_that_is_fused_on_disk_keeps_its_other_parts(tmp_path: Path) -> None:
    """HRM's gate, query, key and value lie in one tensor on disk and in four in memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "hrm_text",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=16,
        vocab_size=260,
    )
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base = save_model(made, byte_tokenizer(), tmp_path / "base")
    name = next(n for n in base.parameter_names() if n.endswith("k_proj.weight"))
    group = base.layout.groups[name]
    assert (len(group.names), len(group.keys)) == (4, 1)
    value = base.weights_of([name])[name] + 1
    loaded = dict(plain(base.write({name: value}, tmp_path / "out").path).named_parameters())
    for other, old in made.named_parameters():
        assert torch.equal(loaded[other], value if other == name else old), other


@pytest.mark.parametrize("given", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("stored", [("model.embed_tokens.weight",), ("lm_head.weight",), None])
def test_a_tie_is_one_tensor_however_it_is_stored(
    tmp_path: Path, given: str, stored: tuple[str, ...] | None
) -> None:
    model = tiny_model("llama", width=32, tie_word_embeddings=True)
    base = save_model(model, byte_tokenizer(), tmp_path / "base")
    tensors = load_file(base.path / "model.safetensors")
    table = tensors.pop("model.embed_tokens.weight")
    assert "lm_head.weight" not in tensors
    names = stored or ("model.embed_tokens.weight", "lm_head.weight")
    tensors |= {name: table.clone() for name in names}
    save_file(tensors, base.path / "model.safetensors", {"format": "pt"})
    base = Checkpoint(base.path)
    assert "lm_head.weight" not in base.parameter_names()
    assert torch.equal(base.weights_of([given])[given], table)
    written = base.write({given: table + 1}, tmp_path / "out")
    loaded = plain(written.path)
    assert torch.equal(loaded.lm_head.weight, table + 1)
    assert torch.equal(loaded.model.embed_tokens.weight, table + 1)
    assert raw(written.path).keys() == tensors.keys()


def test_a_tie_that_the_files_contradict_is_none(tmp_path: Path) -> None:
    model = tiny_model("llama", width=32, tie_word_embeddings=True)
    base = save_model(model, byte_tokenizer(), tmp_path / "base")
    tensors = load_file(base.path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, base.path / "model.safetensors", {"format": "pt"})
    base = Checkpoint(base.path)
    assert "lm_head.weight" in base.parameter_names()
    written = base.write({"lm_head.weight": tensors["lm_head.weight"] + 1}, tmp_path / "out")
    new = raw(written.path)
    assert torch.equal(new["lm_head.weight"], tensors["lm_head.weight"] + 1)
    assert torch.equal(new["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
