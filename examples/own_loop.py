"""Use the losses and the hooks of excise in a loop of one's own.

python examples/own_loop.py
"""

from __future__ import annotations

import torch

from excise.data.stream import Stream, encode
from excise.domains.facts import Facts
from excise.losses import kl_to_uniform, nll, predicting
from excise.models.hooks import capture, trainable
from excise.models.tiny import tiny_model


def main() -> None:
    """Flatten the guess on forget rows by training the MLPs of a tiny model, watch a block."""
    spec = Facts(subjects=24, relations=2, objects=8)
    domain, tokenizer = spec.build(None), spec.tokenizer()
    model = tiny_model("llama", vocab=len(tokenizer), width=32)
    forget, retain = (
        Stream(encode(rows, tokenizer, max_length=16), 16, seed, tokenizer.pad_token_id)
        for seed, rows in enumerate((domain.forget["alpha"], domain.retain))
    )
    with trainable(model, ["mlp"]) as parameters:
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
        for step in range(10):
            away, keep = forget(step)[0], retain(step)[0]
            flat, flat_count = kl_to_uniform(
                model(**away.inputs).logits, predicting(away.target_BT)
            )
            loss, count = nll(model(**keep.inputs).logits, keep)
            optimizer.zero_grad()
            (flat / flat_count + loss / count).backward()
            optimizer.step()
    with capture(model, ["model.layers.1"]) as seen:
        model(**forget(0)[0].inputs)
    print("norm after block 1:", round(float(seen["model.layers.1"][-1].norm(dim=-1).mean()), 3))


if __name__ == "__main__":
    main()
