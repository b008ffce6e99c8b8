"""`excise export DELTA --base MODEL --out DIR`: rebuild a model from what an edit changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from excise.cli.flags import flags
from excise.core.errors import UserError


@dataclass
class ExportOptions:
    """Rebuild an edited model from its delta and the model it was made from."""

    delta: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DELTA")]
    """Folder of the delta, or an output folder that holds one."""
    base: str
    """The model the delta was made from: folder, hub id or GGUF file."""
    out: Path
    """Folder of the model; must not exist."""
    revision: str | None = None
    """Revision of a hub id."""
    link: bool = False
    """Hard-link the files that did not change instead of copying them."""


def main(args: list[str]) -> int:
    """Run the verb."""
    options, rest = flags(ExportOptions, args, "excise export")
    if rest:
        raise UserError(f"unexpected argument '{rest[0]}'; see excise export --help")
    from excise.models.delta import FACTS, export
    from excise.models.open import open_checkpoint

    inside = options.delta / "delta"
    delta = inside if (inside / FACTS).is_file() else options.delta
    base = open_checkpoint(options.base, revision=options.revision)
    made = export(delta, base, options.out, link=options.link)
    print(f"wrote {made.path}")
    return 0
