"""Studies: a question, a statistic and a margin stated beforehand, and the run that answers it.

This module imports no torch and no study.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from excise.errors import UserError, nearest

if TYPE_CHECKING:
    from excise.studies.base import Study

STUDIES = {
    "rmu-is-shallow": "excise.studies.rmu_is_shallow:RMUIsShallow",
    "messy-forget-set": "excise.studies.messy_forget_set:MessyForgetSet",
    "undo-levels": "excise.studies.undo_levels:UndoLevels",
    "splice": "excise.studies.splice:TeacherSplice",
    "dark-knowledge": "excise.studies.dark_knowledge:DarkKnowledge",
    "splice-factorial": "excise.studies.splice_factorial:SpliceFactorial",
    "label-budget": "excise.studies.label_budget:LabelBudget",
    "pretrain-loss": "excise.studies.pretrain_loss:PretrainLoss",
    "distil-corpus": "excise.studies.distil_corpus:DistilCorpus",
    "undo-pilot": "excise.studies.undo_pilot:UndoPilot",
    "init-leak": "excise.studies.init_leak:InitLeak",
    "noise-where": "excise.studies.noise_where:NoiseWhere",
    "undo-teachers": "excise.studies.undo_teachers:UndoTeachers",
    "reversal-cost": "excise.studies.reversal_cost:ReversalCost",
    "digits-split": "excise.studies.digits_split:DigitsSplit",
    "objects-split": "excise.studies.objects_split:ObjectsSplit",
    "class-imbalance": "excise.studies.class_imbalance:ClassImbalance",
    "edges": "excise.studies.edges:Edges",
    "partial-labels": "excise.studies.partial_labels:PartialLabels",
    "routing-scale": "excise.studies.routing_scale:RoutingScale",
    "repair": "excise.studies.repair:Repair",
    "ingrained": "excise.studies.ingrained:Ingrained",
    "era-after-training": "excise.studies.era_after_training:ERAAfterTraining",
    "separability": "excise.studies.separability:Separability",
    "spurious": "excise.studies.spurious:Spurious",
    "moe-equivalence": "excise.studies.moe_equivalence:MoEEquivalence",
    "moefication": "excise.studies.moefication:Moefication",
}
"""Studies by name: module and class. Packages add theirs by entry points `excise.studies`."""


def study_named(name: str) -> type[Study]:
    """Return the class of a study.

    Raises:
        UserError: If there is no such study.
    """
    from importlib.metadata import entry_points

    known = {**STUDIES, **{p.name: p.value for p in entry_points(group="excise.studies")}}
    if name not in known:
        raise UserError(f"no study is called '{name}'; {nearest(name, known)}")
    module, _, cls = known[name].partition(":")
    found: type[Study] = getattr(importlib.import_module(module), cls)
    return found
