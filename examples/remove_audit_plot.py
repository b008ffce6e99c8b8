"""Remove a capability, attack the result, draw what comes back.

python examples/small_model.py              # or a model and files of your own
python examples/remove_audit_plot.py        # two minutes on two cores for the small model
python examples/remove_audit_plot.py --model DIR --forget f.jsonl --retain r.jsonl --out OUT

Needs matplotlib and pandas: pip install 'excise[plot]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # a file is written; no window is needed
from matplotlib import pyplot as plt

import excise as ex


def main(arguments: list[str] | None = None) -> Path:
    """Remove, audit, draw; return the path of the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small/original")
    parser.add_argument("--forget", default="small/forget.jsonl")
    parser.add_argument("--retain", default="small/retain.jsonl")
    parser.add_argument("--out", type=Path, default=Path("small/removed"))
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args(arguments)

    data = ex.Files(forget=given.forget, retain=given.retain)
    schedule = ex.FitConfig(steps=given.steps, lr=1e-2, batch_size=64)
    # A steering and a rate for two blocks of width 96; see docs/rmu.md for models of other sizes.
    method = ex.RMU(layer=given.layer, blocks=(0, 1), steering=50.0, alpha=20.0, fit=schedule)
    removal = ex.remove(given.model, method, data, out=given.out)
    record = ex.audit(
        removal.checkpoint,
        original=given.model,
        domain=data,
        budget="smoke",
        out=given.out.with_name(given.out.name + "-audit"),
    )
    print(record.verdicts[0].sentence)
    picture = given.out.with_name("relearning.svg")
    draw(record, picture)
    print(picture)
    return picture


def draw(record: ex.Record, path: Path) -> None:
    """Draw the score on facts the attacker never saw against the tokens it trained on."""
    curves = record.to_frame("curves")
    # `transfer` trains on the relearn set and is scored on facts that it never contains.
    curves = curves[(curves.name == "transfer") & curves.decisive]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for subject, points in curves.groupby("subject"):
        points = points.groupby("tokens")[["score", "low", "high"]].mean()
        axes.plot(points.index, points.score, marker="o", label=subject)
        axes.fill_between(points.index, points.low, points.high, alpha=0.2)
    axes.set_xscale("symlog", linthresh=100)
    axes.set_xlabel("tokens the attacker trained on")
    axes.set_ylabel(f"{curves.metric.iloc[0].replace('_', ' ')}, held-out test set")
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
