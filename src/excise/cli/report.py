"""`excise report DIR`: rebuild the report from the record alone."""

from __future__ import annotations

from excise.cli.options import ReportOptions
from excise.report.show import finish


def main(options: ReportOptions) -> int:
    """Write the page and print the summary."""
    return finish(options.folder)
