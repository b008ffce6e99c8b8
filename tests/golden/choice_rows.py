"""Questions and tiny models whose `lm-eval` scores are frozen in `lm_eval_choices.json`."""

from __future__ import annotations

from typing import Any

from excise.data.domain import Row
from excise.models.tiny import tiny_model, train_bpe

TEXTS = (
    "the quick brown fox jumps over the lazy dog and the cat",
    "Question: which animal is quick? Answer: the brown fox",
    "The following are multiple choice questions (with answers) about animals.",
    "A. fox B. dog C. cat D. bird",
)

ROWS = (
    Row("q0", prompt="Question: which animal is quick?\nAnswer:", choices=("fox", "dog"), answer=0),
    Row("q1", prompt="the lazy ", choices=("dog", "brown fox", "cat and dog"), answer=2),
    Row("q2", prompt="A. fox\nB. dog\nAnswer:", choices=("A", "B", "C", "D"), answer=1),
    Row("q3", prompt="the  quick \n", choices=("fox jumps over", "bird \u00e9t\u00e9"), answer=1),
    Row("q4", prompt="x" * 40 + " and then", choices=("the", "a dog", "cat"), answer=0),
    Row("q5", prompt="", choices=("fox", "the dog"), answer=1),
    Row("q6", prompt="<bos>the cat", choices=("and dog", "jumps"), answer=0),
)


def make_tokenizer(name: str) -> Any:
    """Return a BPE whose merges cross the border of prompt and choice; `_bos` puts BOS first."""
    return train_bpe(TEXTS, 340, bos=name != "bpe")


def make_model(name: str, tokenizer: Any) -> Any:
    """Return a random model; Gemma-2 caps its logits after the output layer."""
    family = "gemma2" if name == "gemma2" else "llama"
    return tiny_model(family, vocab=len(tokenizer), width=32, seed=3, initializer_range=0.3)
