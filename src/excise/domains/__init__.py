"""Domains that are made here, shipped or fetched; the typed union is the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from excise.data.spec import DomainSpec, Files
from excise.domains.arithmetic import Arithmetic
from excise.domains.biology import Biology
from excise.domains.cyber import Cyber
from excise.domains.definitions import Definitions
from excise.domains.facts import Facts
from excise.domains.glosses import Glosses
from excise.domains.languages import Languages
from excise.domains.published import Mmlu, Muse, Rwku, Tofu, Wmdp

AnyDomain = (
    Files | Facts | Arithmetic | Languages | Glosses | Definitions | Cyber | Biology
    | Wmdp | Mmlu | Tofu | Muse | Rwku
)  # fmt: skip
"""Adding a domain: its file, its test, one line here."""

DOMAINS: Mapping[str, type[DomainSpec]] = {
    cls.model_fields["name"].default: cls for cls in get_args(AnyDomain)
}
"""Built-in domains by name."""
