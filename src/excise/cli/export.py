"""`excise export`: rebuild a model from its base and a delta, or a LoRA adapter of any scale."""

from __future__ import annotations

from excise.cli.options import ExportOptions
from excise.core.errors import UserError
from excise.models.checkpoint import open_checkpoint
from excise.models.delta import FACTS, export, export_adapter
from excise.models.lora import ADAPTER_CONFIG


def main(options: ExportOptions) -> int:
    """Write the model and print where it lies."""
    mark, inside = (ADAPTER_CONFIG, "adapter") if options.merge else (FACTS, "delta")
    edit = options.delta / inside
    edit = edit if (edit / mark).is_file() else options.delta
    if not options.merge and (edit / ADAPTER_CONFIG).is_file():
        raise UserError(f"{edit} holds an adapter; add --merge to write the merged model")
    if not options.merge and options.scale != 1:
        raise UserError("--scale is for adapters; add --merge, or leave it out for a delta")
    base = open_checkpoint(options.base, revision=options.revision)
    if options.merge:
        model = export_adapter(edit, base, options.out, scale=options.scale, link=options.link)
    else:
        model = export(edit, base, options.out, link=options.link)
    print(f"wrote {model.path}")
    return 0
