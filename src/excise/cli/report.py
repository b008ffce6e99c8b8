"""`excise report DIR`: rebuild the report from the record alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from excise.cli.flags import flags
from excise.core.errors import UserError


@dataclass
class ReportOptions:
    """Rebuild report.html of an output folder from its record and print the summary."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Output folder."""


def main(args: list[str]) -> int:
    """Run the verb."""
    options, rest = flags(ReportOptions, args, "excise report")
    if rest:
        raise UserError(f"unexpected argument '{rest[0]}'; see excise report --help")
    from excise.report.page import write_report
    from excise.report.terminal import finish

    write_report(options.folder)
    return finish(options.folder)
