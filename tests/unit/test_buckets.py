"""What an edit adds to one kind of token shows in that bucket and in no other.

Shape legend: N positions, L blocks, D width.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from excise.auditor.buckets import TOP, bucket_stats, top_share
from excise.auditor.residuals import Positions, Residuals

N, L, D = 120, 3, 16


def held(seed: int, *, every: bool = False) -> Positions:
    """Return noise as hidden states; every third position of six is due an answer, or all are."""
    hidden_NLD = torch.randn(N, L, D, generator=torch.Generator().manual_seed(seed))
    answering_N = torch.ones(N).bool() if every else torch.arange(N) % 3 == 1
    return Positions(hidden_NLD, torch.arange(N) // 6, answering_N)


TEXTS = {"dev": held(0), "retain": held(1), "relearn": held(2)}


@pytest.mark.parametrize("role", ["dev", "retain"])
@pytest.mark.parametrize("answering", [True, False])
def test_a_planted_vector_shows_in_exactly_its_bucket(role: str, answering: bool) -> None:
    before = TEXTS[role]
    vector_D = torch.nn.functional.normalize(torch.ones(D), dim=0) * 20
    hidden_NLD = before.hidden_NLD.clone()
    last_N = torch.arange(N) % 6 == 5  # behind the answer: of neither kind
    hidden_NLD[(before.answering_N == answering) & ~last_N, 1] += vector_D
    hidden_NLD[last_N] += 1e3
    edited = Residuals({}, {**TEXTS, role: replace(before, hidden_NLD=hidden_NLD)})
    found = bucket_stats(Residuals({}, TEXTS), edited)
    assert len(found) == 4 * L
    side, place = {"dev": "forget"}.get(role, role), "answer" if answering else "prompt"
    for bucket in found:
        if (bucket.text, bucket.position, bucket.block) == (side, place, 1):
            assert bucket.change == pytest.approx(20 / bucket.norm_original, rel=1e-5)
            assert bucket.norm_edited > 19
            assert bucket.cosine < 0.5
        else:
            assert bucket.change == 0
            assert bucket.cosine == pytest.approx(1)
            assert bucket.norm_edited == bucket.norm_original
        # One vector for all of a bucket moves its mean; its variance stays.
        assert bucket.top_edited == pytest.approx(bucket.top_original, rel=1e-4)
    assert sum(b.tokens for b in found if b.block == 0) == 2 * (N - N // 6)


def test_a_vector_on_some_tokens_of_a_bucket_squeezes_its_variance() -> None:
    before = held(0, every=True)
    hidden_NLD = before.hidden_NLD.clone()
    hidden_NLD[::2] += 20
    edited = Residuals({}, {"dev": replace(before, hidden_NLD=hidden_NLD)})
    found = bucket_stats(Residuals({}, {"dev": before}), edited)
    assert [(b.text, b.position) for b in found] == [("forget", "answer")] * L
    assert all(b.top_original < 0.5 for b in found)
    assert all(b.top_edited > 0.98 for b in found)


def test_the_share_of_the_top_directions_is_that_of_the_variances() -> None:
    scale_D = torch.tensor([8.0, 4.0, 4.0, 2.0] + [1.0] * (D - 4))
    signs = torch.tensor([[(-1.0) ** (n >> d & 1) for d in range(4)] for n in range(16)])
    hidden = torch.zeros(16, D)
    hidden[:, :4] = signs * scale_D[:4]
    assert top_share(hidden + 7) == pytest.approx(1)
    wide = torch.cat([torch.diag(scale_D), -torch.diag(scale_D)])  # variances are the squares
    squares_D = scale_D.square()
    assert top_share(wide) == pytest.approx(float(squares_D[:TOP].sum() / squares_D.sum()))
    assert top_share(torch.ones(5, D)) == 0
