"""Answer rank: how near the top of the vocabulary the first token of the answer stands."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

import excise as ex
from excise.data.stream import encode


class AnswerRank(ex.ExtraScore):
    """Reciprocal rank of the answer's first token: 1 for the likeliest, 1/2 for the next ...

    Tokens that tie take the mean of the places they share.
    """

    name: Literal["answer_rank"] = "answer_rank"
    """Name of the score."""

    def items(
        self, model: Any, tokenizer: Any, rows: tuple[ex.Row, ...], *, max_length: int
    ) -> ex.ItemScores:
        """Return the reciprocal rank of every row; see `ExtraScore.items`."""
        values = []
        for row, example in zip(rows, encode(rows, tokenizer, max_length=max_length), strict=True):
            first = example.target.index(True)  # position of the first scored token
            ids_BT = torch.tensor([example.ids[:first]], device=model.device)
            with torch.no_grad():
                logits_V = model(input_ids=ids_BT).logits[0, -1]
            logit = logits_V[example.ids[first]]
            above, ties = int((logits_V > logit).sum()), int((logits_V == logit).sum())
            # No token equals NaN: a model that gives no numbers has no rank, and `checked` says so.
            places = [1 / (above + i) for i in range(1, ties + 1)]
            values.append((row.unit, sum(places) / ties if ties else math.nan))
        return ex.ItemScores(
            metric=self.name,
            definition="answer_rank@2: reciprocal rank of the first scored token, ties shared",
            direction="higher",
            chance=None,
            items=tuple(values),
        )
