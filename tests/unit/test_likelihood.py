"""Scores of published benchmarks: values worked out by hand, and short versions beside ours."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from excise.core.errors import UserError
from excise.data.domain import Row
from excise.data.stream import encode_row
from excise.evals import set_scores as whole
from excise.evals.likelihood import (
    continuation,
    extraction_strength,
    lowest_mean,
    option_probability,
    truth_ratio,
    truth_ratio_geometric,
)
from excise.evals.rouge import RULES, common, rouge_l
from excise.evals.score import DEFINITIONS, direction_of, measure, measure_all
from excise.evals.set_scores import auc, ks_p_value, model_utility, privleak, set_scores
from excise.models.tiny import byte_tokenizer, tiny_model
from excise.record import Item

LOG = math.log


@pytest.mark.parametrize(
    ("hits", "strength", "continued"),
    [
        ("1111", 1.0, 1.0),  # nothing has to be given
        ("0111", 0.75, 1.0),
        ("1011", 0.5, 1.0),
        ("1101", 0.25, 0.0),  # the second half begins with a miss
        ("1110", 0.0, 0.5),  # the last token is missed: all have to be given
        ("0000", 0.0, 0.0),
        ("1", 1.0, 1.0),
        ("0", 0.0, 0.0),
    ],
)
def test_extraction_strength_by_hand(hits: str, strength: float, continued: float) -> None:
    values = [float(hit) for hit in hits]
    assert extraction_strength(values) == pytest.approx(strength)
    assert continuation(values) == pytest.approx(continued)


def test_extraction_strength_is_the_first_suffix_that_is_right() -> None:
    rng = random.Random(0)
    for _ in range(200):
        hits = [rng.random() < 0.7 for _ in range(rng.randint(1, 9))]
        k = next(k for k in range(len(hits) + 1) if all(hits[k:]))
        assert extraction_strength(hits) == pytest.approx(1 - k / len(hits))


def test_a_token_that_ties_counts_as_often_as_it_is_drawn() -> None:
    # The last token comes in half of all draws, the last two in a quarter, all three as often.
    assert extraction_strength([1.0, 0.5, 0.5]) == pytest.approx((1 / 2 + 1 / 4 + 1 / 4) / 3)
    assert continuation([0.0, 0.0, 0.5, 1.0]) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert math.isnan(extraction_strength([1.0, math.nan]))
    assert math.isnan(lowest_mean([-1.0, math.nan, -2.0]))


def test_the_lowest_mean_by_hand() -> None:
    values = [-1.0, -5.0, -2.0, -4.0, -3.0]
    assert lowest_mean(values, 0.4) == -4.5  # -5 and -4
    assert lowest_mean(values, 0.59) == -4.5  # rounded down
    assert lowest_mean(values, 0.1) == -5.0  # at least one
    assert lowest_mean(values, 1.0) == -3.0


def test_truth_ratios_by_hand() -> None:
    # Right answer: probability 1/2 a token. Wrong ones: 1/4 and 1/16.
    means = [LOG(1 / 4), LOG(1 / 2), LOG(1 / 16)]
    assert truth_ratio(means, 1) == pytest.approx((1 / 4 + 1 / 16) / 2 / (1 / 2))
    assert truth_ratio_geometric(means, 1) == pytest.approx(math.sqrt(1 / 64) / (1 / 2))
    assert option_probability(means, 1) == pytest.approx((1 / 2) / (1 / 2 + 1 / 4 + 1 / 16))


@pytest.mark.parametrize(
    ("said", "expected", "precision", "recall"),
    [
        ("police killed the gunman", "police kill the gunman", 3 / 4, 3 / 4),  # Lin (2004)
        ("the gunman kill police", "police kill the gunman", 2 / 4, 2 / 4),
        ("It's a cat-fish!", "it s a cat fish", 1.0, 1.0),
        ("a b c d e f", "b d", 2 / 6, 1.0),
        ("", "a", 0.0, 0.0),
        ("x", "a b", 0.0, 0.0),
        ("running", "runs", 0.0, 0.0),  # not stemmed
    ],
)
def test_rouge_l_by_hand(said: str, expected: str, precision: float, recall: float) -> None:
    found = rouge_l(said, expected)
    assert (found["precision"], found["recall"]) == (precision, recall)
    total = precision + recall
    assert found["f1"] == pytest.approx(2 * precision * recall / total if total else 0.0)


def test_the_common_subsequence_is_the_longest() -> None:
    rng = random.Random(1)
    for _ in range(50):
        a, b = (rng.choices("abc", k=rng.randint(0, 7)) for _ in range(2))
        subsequences = {c for n in range(len(a) + 1) for c in itertools.combinations(a, n)}
        inside = {c for n in range(len(b) + 1) for c in itertools.combinations(b, n)}
        assert common(a, b) == max(len(c) for c in subsequences & inside)


def distance(first: Sequence[float], second: Sequence[float]) -> float:
    return max(
        abs(sum(v <= x for v in first) / len(first) - sum(v <= x for v in second) / len(second))
        for x in (*first, *second)
    )


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 3), (4, 4), (3, 5), (2, 6)])
def test_the_kolmogorov_smirnov_test_counts_all_orders(n: int, m: int) -> None:
    rng = random.Random(n * 10 + m)
    for _ in range(5):
        first, second = [rng.random() for _ in range(n)], [rng.random() + 0.3 for _ in range(m)]
        pooled = [*first, *second]
        splits = list(itertools.combinations(range(n + m), n))
        far = sum(
            distance([pooled[i] for i in s], [pooled[i] for i in range(n + m) if i not in s])
            >= distance(first, second) - 1e-12
            for s in splits
        )
        assert ks_p_value(first, second) == pytest.approx(far / len(splits))


def test_the_kolmogorov_smirnov_test_keeps_its_digits() -> None:
    # Of all orders of 40 and 40 values two are wholly apart.
    apart = ks_p_value(list(range(40)), list(range(100, 140)))
    assert apart == pytest.approx(2 / math.comb(80, 40), rel=1e-12)
    assert ks_p_value([1.0, 2.0], [1.0, 2.0]) == 1.0


def test_areas_and_privleak_by_hand() -> None:
    assert auc([1, 2], [3, 4]) == 1.0
    assert auc([3, 4], [1, 2]) == 0.0
    assert auc([1, 3], [2, 3]) == (1 + 1 + 0.5) / 4  # 2>1; 3>1; 3 ties with 3
    # Full memory: each holdout text is less probable than each forget text.
    assert privleak([-1, -2], [-3, -4], [-1, -3], [-2, -4]) == -100.0
    # The oracle orders one pair of four this way, the model three.
    assert privleak([-3, -1], [-2, 0], [-1, -3], [-2, -4]) == 100 * (3 / 4 - 1 / 4) / (1 / 4)
    assert privleak([-1], [-2], [-1], [-2]) is None


def test_model_utility_by_hand() -> None:
    values = {key: [0.5, 0.5] for key in whole.UTILITY}
    for key in values:
        if key[1] == whole.RATIO:
            values[key] = [0.2, 1.7]  # max(0, 1 - ratio): 0.8 and 0
    # Six halves and three of 0.4: 9 / (6 * 2 + 3 * 2.5)
    assert model_utility(values) == pytest.approx(9 / 19.5)
    values["benchmark.retain", "rouge_l"] = [0.0, 0.0]
    assert model_utility(values) == 0.0


def items(on: str, metric: str, values: Sequence[float]) -> list[Item]:
    return [Item(model="", set=on, unit=str(i), metric=metric, value=v)
            for i, v in enumerate(values)]  # fmt: skip


def test_a_set_score_without_an_oracle_is_unknown() -> None:
    own = items("benchmark.forget_perturbed", "truth_ratio_geometric", [0.1, 0.2, 0.3])
    other = items("benchmark.forget_perturbed", "truth_ratio_geometric", [1.1, 1.2, 1.3])
    scores, unknown = set_scores({"original": own, "rmu": other})
    assert scores == ()
    assert unknown == (
        "forget_quality is unknown: it compares with a model retrained without the forget set; "
        "give an --oracle",
    )
    models = {"original": own, "rmu": other, "oracle-0": other}
    scores, unknown = set_scores(models, "oracle-0")
    assert unknown == ()
    found = {score.model: score for score in scores}
    # Of the 20 orders of three and three, 2 are wholly apart.
    assert {name: score.value for name, score in found.items()} == {
        "original": 0.1, "rmu": 1.0, "oracle-0": 1.0,
    }  # fmt: skip
    assert found["rmu"].definition == whole.DEFINITIONS["forget_quality"]
    assert (found["rmu"].set, found["rmu"].n) == ("benchmark", 3)


def test_privleak_whose_oracle_leaves_nothing_is_unknown() -> None:
    same = [*items("benchmark.privleak_forget", "min_k", [-1, -1]),
            *items("benchmark.privleak_holdout", "min_k", [-2, -2])]  # fmt: skip
    scores, unknown = set_scores({"m": same, "oracle-0": same}, "oracle-0")
    assert scores == ()
    assert unknown[0].startswith("privleak is unknown: the oracle finds every forget text more")


def test_a_domain_without_benchmark_sets_has_no_set_scores() -> None:
    own = items("benchmark.forget_perturbed", "truth_ratio_geometric", [0.1])
    assert set_scores({"m": items("test.c", "text_loss", [1.0])}) == ((), ())
    assert set_scores({"m": own, "other": []}, "other") == ((), ())


ROWS = (
    Row("a", prompt="What is it?", completion=" a cat and a dog"),
    Row("b", prompt="Who was it?", completion=" nobody"),
)


def plain(model: Any, tokenizer: Any, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities by position and the tokens that are scored there, from one forward."""
    example = encode_row(row, tokenizer, max_length=128)
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
    at = [t for t, scored in enumerate(example.target) if scored]
    return logprobs_TV[[t - 1 for t in at]], torch.tensor([example.ids[t] for t in at])


def test_token_scores_are_the_plain_ones() -> None:
    model, tokenizer = tiny_model("llama", initializer_range=0.4), byte_tokenizer()
    found = measure_all(model, tokenizer, ROWS, ("probability", "min_k", "min_k_plus_plus"))
    for i, row in enumerate(ROWS):
        logprobs_NV, tokens_N = plain(model, tokenizer, row)
        own_N = logprobs_NV[range(len(tokens_N)), tokens_N]
        probs_NV = logprobs_NV.exp()
        mean_N = (probs_NV * logprobs_NV).sum(-1)
        std_N = ((probs_NV * logprobs_NV**2).sum(-1) - mean_N**2).sqrt()
        k = int(0.4 * len(tokens_N))
        expected = {
            "probability": own_N.mean().exp(),
            "min_k": own_N.sort().values[:k].mean(),
            "min_k_plus_plus": ((own_N - mean_N) / std_N).sort().values[:k].mean(),
        }
        for metric, value in expected.items():
            assert found[metric].items[i][0] == row.unit
            assert found[metric].items[i][1] == pytest.approx(float(value), rel=1e-4)


def test_truth_ratio_is_the_plain_one_and_shares_the_forward_of_choices() -> None:
    model, tokenizer = tiny_model("llama", initializer_range=0.4), byte_tokenizer()
    row = Row("q", prompt="What is it?", choices=("a cat", "a dog", "an owl"), answer=1)
    means = []
    for choice in row.choices:
        as_pair = Row("q", prompt=row.prompt, completion=f" {choice}")
        logprobs_NV, tokens_N = plain(model, tokenizer, as_pair)
        means.append(float(logprobs_NV[range(len(tokens_N)), tokens_N].mean()))
    p = [math.exp(m) for m in means]
    expected = {
        "truth_ratio": (p[0] + p[2]) / 2 / p[1],
        "truth_ratio_geometric": math.sqrt(p[0] * p[2]) / p[1],
        "option_probability": p[1] / sum(p),
    }
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_pre_hook(count)
    found = measure_all(model, tokenizer, [row], (*expected, "multiple_choice"))
    assert calls == 1
    for metric, value in expected.items():
        assert found[metric].mean == pytest.approx(value, rel=1e-4)
    assert direction_of("truth_ratio") == "lower"
    assert direction_of("option_probability") == "higher"


def test_answers_are_drawn_from_the_prompt_alone_and_cut_where_they_stop() -> None:
    model, tokenizer = tiny_model("llama", initializer_range=0.4), byte_tokenizer()
    prompt = "What is it?"
    ids = tokenizer(prompt)["input_ids"]
    said: list[int] = []
    with torch.no_grad():
        for _ in range(30):
            said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
            if said[-1] == tokenizer.eos_token_id:
                said.pop()
                break
    text = tokenizer.decode(said, skip_special_tokens=True)
    long = "x" * 300  # longer than a row may be: it takes nothing from the prompt
    for completion in (f" {text} and more words", long):
        row = Row("a", prompt=prompt, completion=completion)
        value = measure(model, tokenizer, [row], "rwku_recall").mean
        first = text.strip().split("\n")[0]
        assert value == pytest.approx(rouge_l(first, completion)["recall"])
    with pytest.raises(UserError, match="unit 't' has no prompt and completion"):
        measure(model, tokenizer, [Row("t", text="plain")], "knowmem")


def test_every_definition_is_versioned_by_its_own_name() -> None:
    other = {"truth_ratio_geometric": "truth_ratio@open_unlearning"}
    for name, definition in {**DEFINITIONS, **whole.DEFINITIONS}.items():
        version = definition.partition(":")[0]
        assert version == other.get(name) or version.partition("@")[0] == name
    assert set(RULES) <= set(DEFINITIONS)
