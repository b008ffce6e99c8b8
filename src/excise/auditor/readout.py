"""What a model's own output layer makes of its residual stream, and who reads questions off it.

Shape legend: N positions, Q questions, L blocks, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from excise.auditor.evaluation_set import EvaluationSet, UnitScores
from excise.auditor.questions import choice_scores
from excise.auditor.residuals import Residuals
from excise.auditor.scoring import Measurement
from excise.core.errors import UserError
from excise.models.anatomy import backbone
from excise.models.head import head_of
from excise.models.names import find_module

Readout = Callable[[Float[Tensor, "N D"], int], Float[Tensor, "N V"]]
"""Scores of every token by a block's output and the number of the block."""

NO_QUESTIONS = (
    "these rows have no candidates to choose from; give questions with choices, or completions "
    "of several different answers, as test and dev rows"
)


@torch.no_grad()
def read_off(
    residuals: Residuals, role: str, readout: Readout, block: int
) -> tuple[UnitScores, float]:
    """Return score by unit and mean rank of the questions of a role, read at a block."""
    asked = residuals.asked[role]
    return choice_scores(asked.questions, readout(asked.hidden_QLD[:, block], block))


def logit_lens(model: Any) -> Readout:
    """Return the model's own final norm and head, which no block but the last was trained for.

    Args:
        model: A causal model whose head is a matrix (`excise.models.head.head_of`).

    Raises:
        UserError: If more than a norm stands between blocks and head, as in OPT 350M.
    """
    head, norm = head_of(model), final_norm(model)
    width = backbone(model).d_model
    if head.weight_VD.shape[1] != width:
        raise UserError(
            f"the output layer of this model reads {head.weight_VD.shape[1]} numbers and its "
            f"blocks write {width}, so that no lens fits between them; leave lens and probe out"
        )

    @torch.no_grad()
    def read(hidden_ND: Tensor, block: int) -> Tensor:
        del block
        return head.logits(norm(hidden_ND.to(head.weight_VD))).float().cpu()

    return read


def final_norm(model: Any) -> nn.Module:
    """Return the norm after the last block, or what leaves its input alone where there is none."""
    path = backbone(model).final_norm
    return find_module(model, path) if path else nn.Identity()


def own_output(model: Any, residuals: Residuals, evaluation: EvaluationSet) -> Measurement:
    """Return what the model itself answers to the questions of V, and retain: no attack yet.

    That is the last block through norm and head; of models that carry several streams to the end
    (Gemma 3n) it is the answer of the first.

    Args:
        model: The model.
        residuals: Its own.
        evaluation: Of the retain rows.
    """
    last = residuals.asked["test"].hidden_QLD.shape[1] - 1
    units, _ = read_off(residuals, "test", logit_lens(model), last)
    return Measurement(units, evaluation.retained(model))
