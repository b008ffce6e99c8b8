"""`excise label`: from labels of a few documents or words to labels for all."""

from __future__ import annotations

from typing import Any

from excise.cli.options import LabelOptions
from excise.cli.progress import progress
from excise.cli.settings import override
from excise.labelling.stages import LABELS
from excise.requests.labelling import LabelRun
from excise.requests.registry import parse_named, registry
from excise.run.labelling import label
from excise.run.output import check_out


def main(options: LabelOptions) -> int:
    """Train a labeller, write the labels and say how good they are."""
    check_out(options.out)
    request = parse_named(
        LabelRun,
        override(request_data(options), options.settings, LabelRun, registry()),
        allow_code=options.allow_code,
        source="excise label",
    )
    with progress(options.out / "events.jsonl", quiet=options.quiet) as emit:
        facts = label(request, options.out, emit=emit)
    print("\n".join(summary(facts)))
    print(f"wrote {options.out / LABELS}")
    return 0


def request_data(options: LabelOptions) -> dict[str, Any]:
    """Return the request that a command line stands for, as plain data."""
    data: dict[str, Any] = {
        "labels": options.labels,
        "unlabeled": options.unlabeled,
        "documents": options.documents,
        "labeller": {"name": options.labeller},
        "model": {"path": options.model},
        "seed": options.seed,
        "dtype": options.dtype,
        "device": options.device,
    }
    return data | ({"domain": {"name": options.domain}} if options.domain else {})


def summary(facts: dict[str, Any]) -> list[str]:
    """Return what is known of a labeller, as lines for a terminal."""
    documents, words = facts["documents"], facts["held_out_words"]
    lines = [
        f"learned from {documents['learned_from']} labelled documents, measured on "
        f"{documents['held_out']} others ({words['capability']:,} words of capabilities, "
        f"{words['core']:,} core); {documents['unlabelled']:,} had no label",
        f"capabilities: {', '.join(facts['capabilities'])}",
        f"calibration error {facts['calibration']['error']:.3f}",
        "threshold  precision  recall  flagged",
    ]
    for line in facts["thresholds"]:
        precision = "-" if line["precision"] is None else f"{line['precision']:.3f}"
        lines.append(
            f"{line['threshold']:>9.2f}  {precision:>9}  {line['recall']:>6.3f}  "
            f"{line['flagged']:>7.3f}"
        )
    truth = facts.get("unlabelled_truth")
    if truth and truth["recall"] is not None:
        precision = "-" if truth["precision"] is None else f"{truth['precision']:.3f}"
        lines.append(
            f"of what had no label, at 0.5: precision {precision}, recall {truth['recall']:.3f} "
            "by characters, judged by the truth"
        )
    return [*lines, *filter(None, [facts["verdict"]])]
