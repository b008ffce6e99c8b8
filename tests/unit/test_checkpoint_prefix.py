"""Nothing is read that is not asked for: single tensors, and the first blocks of a model."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from excise.core.errors import UserError
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import FAMILIES, byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama") / "model"
    return save_model(tiny_model("llama", width=32), byte_tokenizer(), folder)


def test_travels_as_a_path(llama: Checkpoint) -> None:
    llama = Checkpoint(llama.path)
    assert llama.layout is not None
    sent = pickle.dumps(llama)
    assert len(sent) < 500
    assert pickle.loads(sent) == llama


def test_single_tensors_are_read_alone(llama: Checkpoint) -> None:
    llama = Checkpoint(llama.path)
    name = "model.norm.weight"
    assert llama.bytes_read == 0
    llama.weights_of([name])
    assert llama.bytes_read == 32 * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_computes_what_the_model_does(
    tmp_path: Path, family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(family, width=32, blocks=3)
    checkpoint = save_model(model, byte_tokenizer(), tmp_path / "a")
    capfd.readouterr()
    prefix = checkpoint.load_prefix(2, dtype=torch.float32)
    assert not capfd.readouterr().err  # nothing is missing, nothing unexpected
    assert len(getattr(prefix.config, "layer_types", None) or (0, 1)) == 2
    # Read before a fresh object has loaded anything else: exactly the parameters that are there.
    held = {name: p for name, p in prefix.named_parameters()}
    assert checkpoint.bytes_read == sum(p.nbytes for p in held.values())
    whole = dict(model.named_parameters())
    assert all(torch.equal(p, whole[name]) for name, p in held.items())
    ids = torch.arange(20)[None]
    arguments = {"attention_mask": torch.ones_like(ids), "output_hidden_states": True}
    with torch.no_grad():
        want = model(ids, **arguments).hidden_states
        found = prefix(ids, **arguments).hidden_states
    assert torch.equal(found[1], want[1])
    # The last hidden state of a prefix has gone through the final norm; undo nothing, compare so.
    base = getattr(model, model.base_model_prefix)
    norm = next(m for n, m in base.named_children() if "norm" in n or n == "ln_f")
    assert torch.allclose(found[2], norm(want[2]), atol=1e-6)


def test_prefix_with_head_and_bad_numbers(llama: Checkpoint) -> None:
    whole = llama.load_prefix(2, head=True)
    assert tuple(n for n, _ in whole.named_parameters()) == llama.parameter_names()
    for blocks in (0, 3):
        with pytest.raises(UserError, match="2 blocks"):
            llama.load_prefix(blocks)
