"""A model that tells what was to go only by way of another fact is not one that forgot it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.synthetic import BUDGET, audit

from excise.auditor.verdict import judge_all
from excise.core.context import Context
from excise.data.domain import Rows
from excise.data.stream import Batch, Stream, encode
from excise.domains.facts import FACTS_MAX_LENGTH, Facts
from excise.evals.score import evaluate
from excise.losses import nll
from excise.models.tiny import tiny_model
from excise.train.fit import FitConfig, Term, fit

SPEC = Facts(subjects=80, relations=2, objects=8, wordings=2, pupils=1, test_wording_taught=True)


def trained(rows: Rows, folder: Path) -> Any:
    """Return a small model that learned rows."""
    tokenizer = SPEC.tokenizer()
    torch.manual_seed(0)
    model = tiny_model("llama", vocab=len(tokenizer), width=64)
    examples = encode(rows, tokenizer, max_length=FACTS_MAX_LENGTH)

    def loss(net: Any, batch: Batch) -> dict[str, Term]:
        value, count = nll(net(**batch.inputs).logits, batch)
        return {"nll": Term(value, count)}

    config = FitConfig(steps=200, lr=4e-3, warmup=20, schedule="cosine", clip=1.0)
    stream = Stream(examples, 64, 0, tokenizer.pad_token_id)
    for _ in fit(model, stream, loss, config, Context(folder)):
        pass
    return model


@pytest.mark.slow
def test_a_model_that_answers_in_two_hops_alone_fails_before_any_attack(tmp_path: Path) -> None:
    domain = SPEC.build(None)
    kept, taught = (*domain.retain, *domain.adjacent), domain.forget["alpha"]
    in_two_hops = tuple(row for row in taught if row.wording >= SPEC.wordings)
    models = {
        "original": trained((*kept, *taught), tmp_path),
        "oracle-0": trained(kept, tmp_path),
        "rmu": trained((*kept, *in_two_hops), tmp_path),
    }
    scores, items = [], []
    for name, model in models.items():
        found = evaluate(model, SPEC.tokenizer(), domain, name=name, max_length=FACTS_MAX_LENGTH)
        scores += found[0]
        items += found[1]
    exact = {(s.model, s.set): s.value for s in scores if s.metric == "exact_match"}
    assert exact["original", "test.alpha"] > 0.9
    assert exact["original", "multi_hop.alpha"] > 0.9
    assert exact["oracle-0", "multi_hop.alpha"] < 0.4
    assert exact["rmu", "test.alpha"] < 0.4  # asked outright it has forgotten ...
    assert exact["rmu", "multi_hop.alpha"] > 0.9  # ... and it has not
    _, (verdict,) = judge_all(["rmu"], audit(0.05, 0.05, oracles=1), domain, BUDGET, items=items)
    assert verdict.levels[0].status == "fail"
    assert "by multi-hop questions" in verdict.levels[0].decided_by
    assert "is still there by" in verdict.sentence
    direct = [item for item in items if not item.set.startswith("multi_hop")]
    _, (blind,) = judge_all(["rmu"], audit(0.05, 0.05, oracles=1), domain, BUDGET, items=direct)
    assert blind.levels[0].status != "fail"
