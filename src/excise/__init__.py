"""excise: cut a capability out of a neural network, and measure how deep the cut went.

```python
import excise as ex

removal = ex.remove("path/to/model", ex.RMU(layer=6), ex.Files(forget="f.jsonl", retain="r.jsonl"))
record = ex.audit(removal.checkpoint, original="path/to/model", domain=..., budget="smoke")
print(record.verdicts[0].sentence)
```

Names are imported when they are first used, so that `import excise` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from excise import losses, testing
    from excise.auditor.base import Attack, AttackResult, Subject
    from excise.auditor.budget import Budget
    from excise.auditor.controls import PositiveControl
    from excise.core.config import Config
    from excise.core.context import Context, Stage
    from excise.core.errors import UserError
    from excise.data.domain import Domain, Row
    from excise.data.spec import DomainSpec, Files
    from excise.domains.facts import Facts
    from excise.domains.published import Mmlu, Muse, Rwku, Tofu, Wmdp
    from excise.evals.extra import ExtraScore
    from excise.evals.score import ItemScores
    from excise.methods import (
        ERA,
        GRAM,
        RMU,
        SGTM,
        Chain,
        Cost,
        Filtering,
        GradDiff,
        GradDiffPretrain,
        MaxEnt,
        Method,
        Paper,
        Plain,
        Removal,
        Undo,
    )
    from excise.methods.pretraining.pretrain import Pretrain
    from excise.models.checkpoint import Checkpoint, open_checkpoint
    from excise.models.endpoint import Endpoint
    from excise.models.lora import LoRA
    from excise.record import Record
    from excise.requests.recipe import Recipe
    from excise.routing import Groups, Part, Policy, Rule, route
    from excise.run.api import audit, audit_endpoint, load, remove
    from excise.run.study import Study, StudyResult
    from excise.train.fit import FitConfig

_HOME = {
    "audit": "excise.run.api",
    "audit_endpoint": "excise.run.api",
    "load": "excise.run.api",
    "remove": "excise.run.api",
    "Config": "excise.core.config",
    "Context": "excise.core.context",
    "Stage": "excise.core.context",
    "UserError": "excise.core.errors",
    "Domain": "excise.data.domain",
    "Row": "excise.data.domain",
    "DomainSpec": "excise.data.spec",
    "Files": "excise.data.spec",
    "Facts": "excise.domains.facts",
    "Mmlu": "excise.domains.published",
    "Muse": "excise.domains.published",
    "Rwku": "excise.domains.published",
    "Tofu": "excise.domains.published",
    "Wmdp": "excise.domains.published",
    "ExtraScore": "excise.evals.extra",
    "ItemScores": "excise.evals.score",
    "Checkpoint": "excise.models.checkpoint",
    "Endpoint": "excise.models.endpoint",
    "LoRA": "excise.models.lora",
    "open_checkpoint": "excise.models.checkpoint",
    "FitConfig": "excise.train.fit",
    "Groups": "excise.routing",
    "Part": "excise.routing",
    "Policy": "excise.routing",
    "Rule": "excise.routing",
    "route": "excise.routing",
    "Method": "excise.methods",
    "Paper": "excise.methods",
    "Cost": "excise.methods",
    "Removal": "excise.methods",
    "Chain": "excise.methods",
    "Filtering": "excise.methods",
    "GradDiffPretrain": "excise.methods",
    "Plain": "excise.methods",
    "ERA": "excise.methods",
    "SGTM": "excise.methods",
    "GRAM": "excise.methods",
    "GradDiff": "excise.methods",
    "MaxEnt": "excise.methods",
    "RMU": "excise.methods",
    "Undo": "excise.methods",
    "Pretrain": "excise.methods.pretraining.pretrain",
    "Attack": "excise.auditor.base",
    "AttackResult": "excise.auditor.base",
    "Subject": "excise.auditor.base",
    "Budget": "excise.auditor.budget",
    "PositiveControl": "excise.auditor.controls",
    "Recipe": "excise.requests.recipe",
    "Record": "excise.record",
    "Study": "excise.run.study",
    "StudyResult": "excise.run.study",
}
_MODULES = ("losses", "testing")

__all__ = [
    "ERA",
    "GRAM",
    "RMU",
    "SGTM",
    "Attack",
    "AttackResult",
    "Budget",
    "Chain",
    "Checkpoint",
    "Config",
    "Context",
    "Cost",
    "Domain",
    "DomainSpec",
    "Endpoint",
    "ExtraScore",
    "Facts",
    "Files",
    "Filtering",
    "FitConfig",
    "GradDiff",
    "GradDiffPretrain",
    "Groups",
    "ItemScores",
    "LoRA",
    "MaxEnt",
    "Method",
    "Mmlu",
    "Muse",
    "Paper",
    "Part",
    "Plain",
    "Policy",
    "PositiveControl",
    "Pretrain",
    "Recipe",
    "Record",
    "Removal",
    "Row",
    "Rule",
    "Rwku",
    "Stage",
    "Study",
    "StudyResult",
    "Subject",
    "Tofu",
    "Undo",
    "UserError",
    "Wmdp",
    "audit",
    "audit_endpoint",
    "load",
    "losses",
    "open_checkpoint",
    "remove",
    "route",
    "testing",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _MODULES:
        return importlib.import_module(f"excise.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'excise' has no attribute '{name}'")


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
