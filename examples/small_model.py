"""Make something to try the other examples with: a small Llama that knows made-up facts.

python examples/small_model.py [FOLDER]     # a minute on two cores, no network

FOLDER (small/ when missing) then holds `original/`, a model of 0.3 M parameters that plain
`transformers` loads, `forget.jsonl`, facts about subjects that shall be forgotten, and
`retain.jsonl`, facts about the others.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import excise as ex
from excise.domains.facts import FACTS_FIT, FACTS_MAX_LENGTH, FACTS_MODEL
from excise.models.tiny import tiny_model


def make(folder: Path, *, subjects: int = 64, steps: int = 250) -> None:
    """Train the model and write the files.

    Args:
        folder: Where to write.
        subjects: Made-up subjects; a third of them shall be forgotten.
        steps: Training steps of 128 rows.
    """
    facts = ex.Facts(subjects=subjects, objects=16, relations=4, forget_share=0.34)
    domain, tokenizer = facts.build(None), facts.tokenizer()
    untrained = tiny_model(**FACTS_MODEL, vocab=len(tokenizer))
    schedule = ex.FitConfig(**{**FACTS_FIT, "steps": steps})
    plain = ex.Plain(pretrain=ex.Pretrain(fit=schedule, max_length=FACTS_MAX_LENGTH))
    ex.remove(untrained, plain, domain, tokenizer=tokenizer, out=folder / "training")
    (folder / "training" / "model").rename(folder / "original")
    (folder / "original" / "README.md").unlink()  # it speaks of a removal
    shutil.rmtree(folder / "training")

    taught = (*domain.forget["alpha"], *domain.relearn["alpha"], *domain.test["alpha"])
    kept = (*domain.retain, *domain.retain_test, *domain.benign)
    write(folder / "forget.jsonl", taught)
    write(folder / "retain.jsonl", kept)


def write(path: Path, rows: Iterable[ex.Row]) -> None:
    """Write rows as one JSON object a line, each fact in all its paraphrases."""
    lines = {
        json.dumps({"unit": row.unit, "prompt": row.prompt, "completion": row.completion})
        for row in rows
    }
    path.write_text("\n".join(sorted(lines)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else "small"))
