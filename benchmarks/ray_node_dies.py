"""An audit of at least 24 jobs on a Ray cluster of two nodes, one of which is killed half-way.

    pip install 'excise[ray]'
    python benchmarks/ray_node_dies.py [--save]

The record must be that of one process: scores, attacks and verdicts to the bit. Exit code 1 where
it is not, or where no job was lost with the node.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from excise.models.checkpoint import save_model
from excise.models.tiny import byte_tokenizer, tiny_model
from excise.record import load

JOBS = 24
ALIKE = {"seeds", "data", "models", "scores", "attacks", "verdicts", "notes"}
ATTACKS = "relearn, few_shot, prefix, direction, filler, prune, quantize"
AUDIT = (
    f"audit removed --quiet --audit.change '{{attacks: [{ATTACKS}], steps: 20, "
    "checkpoints: [0, 10, 20], rates: [0.0001, 0.0003, 0.001], max_test_rows: 16, "
    "max_other_rows: 16, max_length: 64}' --evaluate.max_length 64"
)


def start(line: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start a command line of excise."""
    return subprocess.Popen([sys.executable, "-m", "excise", *shlex.split(line)], cwd=folder)


def finish(line: str, folder: Path) -> float:
    """Run a command line of excise, and return its seconds."""
    began = time.monotonic()
    if start(line, folder).wait():
        raise SystemExit(f"failed: excise {line}")
    return time.monotonic() - began


def events(folder: Path, kind: str) -> list[dict[str, object]]:
    """Return the events of a kind that a run has had so far."""
    path = folder / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # it is being written
            continue
    return [event for event in found if event["kind"] == kind]


def make(folder: Path) -> None:
    """Write a tiny model and rows, and remove them from it."""
    save_model(tiny_model("llama", width=64), byte_tokenizer(), folder / "model")
    for kind in ("f", "r"):
        draw = random.Random(kind)
        words = [f"{kind}{i}" for i in range(200)]
        rows = [json.dumps({"text": " ".join(draw.choices(words, k=8))}) for _ in range(48)]
        (folder / f"{kind}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    method = "--layer 0 --fit.steps 10 --max_length 64 --workers 1 --quiet"
    finish(
        f"remove rmu --model model --forget f.jsonl --retain r.jsonl --out removed {method}", folder
    )


def numbers(folder: Path) -> str:
    """Return what a record says but for times, command and environment."""
    return json.dumps(load(folder).model_dump(mode="json", include=ALIKE), sort_keys=True)


def main() -> int:
    """Audit twice and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--save", action="store_true", help="append a row to results.csv")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="excise-ray-") as root:
        facts = measure(Path(root).resolve())
    if options.save:
        results = importlib.import_module("results")  # which lies beside a script that is run
        results.save("ray_node_dies", facts)
    return int(facts["differences"])


def measure(out: Path) -> dict[str, Any]:
    """Audit in one process, then on the cluster, and return what the two are worth."""
    make(out)
    alone = finish(f"{AUDIT} --out alone/audit --workers 1", out)
    print(f"one process: {alone:.0f} s", flush=True)
    jobs = len(events(out / "alone" / "audit", "attack"))
    assert jobs >= JOBS, jobs
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    doomed = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    here = out / "cluster" / "audit"
    began = time.monotonic()
    audit = start(f"{AUDIT} --out cluster/audit --pool ray:{cluster.address}", out)
    try:
        while len(events(here, "attack")) < jobs // 2:
            if audit.poll() is not None:
                raise SystemExit("the audit ended before a node was killed")
            time.sleep(0.02)
        cluster.remove_node(doomed, allow_graceful=False)
        done = len(events(here, "attack"))
        print(f"killed a node of two after {done} jobs of {jobs}", flush=True)
        code = audit.wait()
    finally:
        audit.kill()
        cluster.shutdown()
    took = time.monotonic() - began
    gone = [event["text"] for event in events(here, "note") if "is gone" in str(event["text"])]
    attempts = [event["stage"] for event in events(here, "stage_start")]
    again = sorted({str(stage) for stage in attempts if attempts.count(stage) > 1})
    alike = code == 0 and numbers(here) == numbers(out / "alone" / "audit")
    print(f"two nodes, then one: {took:.0f} s, exit code {code}; {gone}")
    print(f"jobs that were lost with the node and done again: {again}")
    print(f"jobs: {len(events(here, 'attack'))}; the same record: {alike}")
    return {
        "seconds": round(took),
        "seconds_before": round(alone),
        "variant": f"audit, killed after {done} jobs",
        "kills": 1,
        "cases": jobs,
        "differences": int(not (alike and again and gone)),
    }


if __name__ == "__main__":
    sys.exit(main())
