"""Gradient routing in a training loop of one's own: learn two things into separate weights.

python examples/route_own_loop.py           # ten seconds on one core, no network

Trains a small Llama in plain PyTorch on made-up facts. What rows of the capability teach is
written into 32 neurons of every MLP; afterwards these neurons are set to zero, and the facts of
the capability go with them.
"""

from __future__ import annotations

import torch

import excise as ex
from excise.data.stream import Stream, encode
from excise.evals.score import measure
from excise.losses import nll
from excise.models.tiny import tiny_model

NEURONS = slice(0, 32)


def main(steps: int = 200) -> dict[str, float]:
    """Train routed, cut the neurons, return exact match before and after."""
    facts = ex.Facts(subjects=24, relations=2, objects=8)
    domain, tokenizer = facts.build(None), facts.tokenizer()
    forget, retain = domain.forget["alpha"], domain.retain
    model = tiny_model("llama", vocab=len(tokenizer), width=64).train()
    policy = ex.Policy(
        groups=ex.Groups(parts={"module_1": (ex.Part(at="mlp", units=(0, 32)),)}),
        rules={
            "core": (ex.Rule(write=("core",)),),
            "forget": (ex.Rule(write=("self",)),),
            "unlabeled": (ex.Rule(),),  # padding, which has no loss
        },
        capabilities=("alpha",),
    )
    rows = encode((*forget, *retain), tokenizer, max_length=16)
    batches = Stream(rows, 64, 0, tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    with ex.route(model, policy, labels=(-1, 0, 1)) as routing:
        for step in range(steps):
            batch = batches(step)[0]
            routing.labels(batch.label_BT)  # 0: the rest, 1: the capability
            total, count = nll(model(**batch.inputs).logits, batch)
            (total / count).backward()
            routing.step(optimizer)  # what no token may write keeps its bits
            optimizer.zero_grad()

    def score(rows: tuple[ex.Row, ...]) -> float:
        return measure(model, tokenizer, rows, "exact_match", max_length=16).mean

    before = {"capability": score(forget), "rest": score(retain)}
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, NEURONS] = 0.0
    after = {"capability cut": score(forget), "rest cut": score(retain)}
    return before | after


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:15} exact match {value:.2f}")
