"""`excise export DELTA --base MODEL --out DIR`: rebuild a model from what an edit changed."""

from __future__ import annotations

from excise.cli.options import ExportOptions
from excise.models.checkpoint import open_checkpoint
from excise.models.delta import FACTS, export


def main(options: ExportOptions) -> int:
    """Write the model and print where it lies."""
    inside = options.delta / "delta"
    delta = inside if (inside / FACTS).is_file() else options.delta
    base = open_checkpoint(options.base, revision=options.revision)
    print(f"wrote {export(delta, base, options.out, link=options.link).path}")
    return 0
