"""`excise report DIR`: rebuild the report from the record alone."""

from __future__ import annotations

from excise.cli.options import ReportOptions
from excise.report.page import write_report
from excise.report.terminal import finish


def main(options: ReportOptions) -> int:
    """Write the page and print the summary."""
    write_report(options.folder)
    return finish(options.folder)
