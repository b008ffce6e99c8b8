"""Linear probes: is the answer still in the residual stream, in directions of another's choosing?

A ridge regression from the residual stream where a question is answered to its answer, fitted on
the relearn set and on benign questions, read on the held-out test set. *classes* has a direction of
its own for every answer, and so reads only answers that it was fitted on; *embeddings* has one map
into the model's output embeddings, and so reads any. Block and penalty are chosen on `dev`.
Controls: the same with the answers of the training questions shuffled (selectivity).

Shape legend: N questions to fit on, Q questions to read, L blocks, D width, C answers, E size of
a target, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from excise.auditor.base import Access, Attack, AttackResult, Subject, VariantResult
from excise.auditor.budget import Budget
from excise.auditor.controls import GatedEdit, PositiveControl
from excise.auditor.evaluation_set import UnitScores, evaluation_set
from excise.auditor.questions import METRIC, choice_scores
from excise.auditor.readout import NO_QUESTIONS, own_output
from excise.auditor.residuals import Residuals, residuals_of
from excise.auditor.results import absent, decided
from excise.auditor.scoring import Measurement, variant_of
from excise.core.context import Context
from excise.data.domain import Domain
from excise.models.head import head_of
from excise.record import Level

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Penalties that are tried, as shares of the mean squared length of what is fitted on."""

ONE_ANSWER = (
    "the relearn set has no two questions of different answers to fit a probe on; give it "
    "questions with choices, or completions of several different answers"
)

Kind = Literal["classes", "embeddings"]


@dataclass(frozen=True)
class ProbeRows:
    """What a probe is fitted on.

    Attributes:
        hidden_NLD: Residual streams, less the mean of their role: an edit may shift one of them.
        answer_N: Token of each answer, an index into `answers`.
        answers: The tokens that are answers here, C of them.
        center_LD: Mean of the relearn set, taken off whatever is read.
    """

    hidden_NLD: Float[Tensor, "N L D"]
    answer_N: Int[Tensor, " N"]
    answers: tuple[int, ...]
    center_LD: Float[Tensor, "L D"]


class Probe(Attack):
    """A linear map from the residual stream to the answer, fitted on what the attacker knows."""

    name: Literal["probe"] = "probe"
    """Name of the attack."""
    kinds: tuple[Kind, ...] = ("classes", "embeddings")
    """What is predicted: which answer, or the output embedding of the answer's token."""

    access: ClassVar[Access] = "activations"
    level: ClassVar[Level] = "D2"
    controls: ClassVar[tuple[PositiveControl, ...]] = (GatedEdit(),)
    light: ClassVar[bool] = True
    source: ClassVar[str] = (
        "Alain & Bengio, arXiv 1610.01644; Hewitt & Liang, arXiv 1909.03368 (control tasks); "
        "the map into output embeddings is this library's"
    )
    version: ClassVar[int] = 2

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read: once, and retain."""
        del budget
        return 2.0

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Fit on T and benign questions, choose block and penalty on dev, read V.

        Args:
            subject: The model.
            domain: Rows by role; roles whose rows have candidates are asked.
            budget: Rows and lengths.
            ctx: Seed of the shuffled controls, device, dtype.

        Returns:
            One variant per kind, and its control. The curve begins with what the model's own
            output says of the same candidates.
        """
        start = time.perf_counter()
        residuals = residuals_of(subject.checkpoint, domain, budget, ctx)
        reason = _why_not(residuals)
        if reason:
            return absent(self, subject.name, "missing", reason, applies=False)
        model = subject.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        bare = own_output(model, residuals, evaluation)
        training = training_of(residuals)
        variants = []
        for kind in self.kinds:
            targets_VE = _targets(kind, model, training)
            for shuffled in (False, True):
                order_N = _order(training, shuffled, ctx)
                variants.append(
                    _variant(self, subject, residuals, bare, kind, training, targets_VE, order_N)
                )
        marked, chosen = decided(variants, higher=True)
        return AttackResult(self.name, subject.name, marked, chosen, time.perf_counter() - start)


def _why_not(residuals: Residuals) -> str:
    """Say why rows cannot be probed, or nothing."""
    if not residuals.asked["test"].questions or not residuals.asked["dev"].questions:
        return NO_QUESTIONS
    answers = {question.answer for question in residuals.asked["relearn"].questions}
    return "" if len(answers) > 1 else ONE_ANSWER


def training_of(residuals: Residuals) -> ProbeRows:
    """Return what a probe is fitted on: the questions of T, and of benign text where it has any.

    Args:
        residuals: Of the model.
    """
    parts = [p for p in (residuals.asked["relearn"], residuals.asked["benign"]) if p.questions]
    tokens = [question.answer for part in parts for question in part.questions]
    answers = tuple(sorted(set(tokens)))
    number = {token: i for i, token in enumerate(answers)}
    return ProbeRows(
        torch.cat([part.hidden_QLD - part.hidden_QLD.mean(0) for part in parts]),
        torch.tensor([number[token] for token in tokens]),
        answers,
        parts[0].hidden_QLD.mean(0),
    )


def _order(training: ProbeRows, shuffled: bool, ctx: Context) -> Int[Tensor, " N"]:
    """Return whose answer each question is fitted to: its own, or another's in the control."""
    count = len(training.answer_N)
    if not shuffled:
        return torch.arange(count)
    return torch.randperm(count, generator=ctx.generator("probe/shuffled"))


def _targets(kind: Kind, model: Any, training: ProbeRows) -> Float[Tensor, "V E"]:
    """Return what each token is as a target: one-hot among the answers, or its output embedding."""
    weight_VD = head_of(model).weight_VD.detach().float().cpu()
    if kind == "embeddings":
        return weight_VD - weight_VD[list(training.answers)].mean(0)
    onehot_VC = torch.zeros(len(weight_VD), len(training.answers))
    onehot_VC[list(training.answers)] = torch.eye(len(training.answers))
    return onehot_VC


def _variant(
    attack: Probe,
    subject: Subject,
    residuals: Residuals,
    bare: Measurement,
    kind: Kind,
    training: ProbeRows,
    targets_VE: Float[Tensor, "V E"],
    order_N: Int[Tensor, " N"],
) -> VariantResult:
    """Fit one kind of probe at every block and penalty, and read V with the best on dev."""
    tokens = torch.tensor(training.answers)[training.answer_N[order_N]]
    target_NE = targets_VE[tokens]

    def read(role: str, block: int, ridge: float) -> tuple[UnitScores, float]:
        asked = residuals.asked[role]
        hidden_QD = asked.hidden_QLD[:, block] - training.center_LD[block]
        said_QE = predicted(training.hidden_NLD[:, block], target_NE, hidden_QD, ridge)
        return choice_scores(asked.questions, said_QE @ targets_VE.T)

    blocks = training.hidden_NLD.shape[1]
    on_dev = {
        (block, ridge): read("dev", block, ridge) for block in range(blocks) for ridge in RIDGES
    }
    means = {at: sum(units.values()) / len(units) for at, (units, _) in on_dev.items()}
    best = max(on_dev, key=lambda at: (means[at], -on_dev[at][1]))
    units, rank = read("test", *best)
    control = bool((order_N != torch.arange(len(order_N))).any())
    return variant_of(
        attack,
        subject,
        METRIC,
        variant=kind + (" shuffled" if control else ""),
        control=control,
        measurements=(bare, Measurement(units, bare.retain, examples=len(order_N))),
        dev=on_dev[best][0],
        extras={"dev_loss": on_dev[best][1]},  # settles ties: the mean rank
        trained_on="relearn",
        facts={"block": best[0], "ridge": best[1], "mean_rank": rank, "questions": len(order_N)},
    )


def predicted(
    hidden_ND: Float[Tensor, "N D"],
    target_NE: Float[Tensor, "N E"],
    hidden_QD: Float[Tensor, "Q D"],
    ridge: float,
) -> Float[Tensor, "Q E"]:
    """Return what a ridge regression predicts, in its dual form, which costs N^3 and not D^3.

    X_q X^T (X X^T + ridge m I)^-1 Y, m the mean squared length of X (Hoerl and Kennard 1970).

    Args:
        hidden_ND: X, what it is fitted on, centred.
        target_NE: Y.
        hidden_QD: X_q, what it is read on, centred alike.
        ridge: Penalty.
    """
    gram_NN = hidden_ND @ hidden_ND.T
    penalty = ridge * gram_NN.diagonal().mean() + 1e-12
    eye_NN = torch.eye(len(gram_NN), dtype=torch.float64)
    weights_NE = torch.linalg.solve(gram_NN.double() + penalty * eye_NN, target_NE.double())
    said_QE: Tensor = (hidden_QD @ hidden_ND.T) @ weights_NE.float()
    return said_QE
