"""Records as real runs write them, for the tests of report, terminal and card."""

from __future__ import annotations

import math
from typing import Any

from tests.report import parts
from tests.report.parts import MODELS, attacks, digest, model, scores, verdict

from excise.record import Environment, MethodRun, Record, Sample

HOSTILE = "<script>alert('x')</script>&\"'`|\x1b[31m\u202e</script><img src=http://evil.example/>"


def full(names: tuple[str, ...] = ("filtering", "rmu"), oracles: int = 3) -> Record:
    """Return the record of a complete run."""
    references = [model("original"), *(model(f"oracle-{i}") for i in range(oracles))]
    every = scores("original", 0.97, 0.99, 0.98)
    hits = attacks("original", 0.97, 0.98) + attacks("positive-control", 0.05, 0.9)
    for index in range(oracles):
        every += scores(f"oracle-{index}", 0.03 + 0.01 * index, 0.99, 0.97)
        hits += attacks(f"oracle-{index}", 0.03 + 0.01 * index, 0.05 + 0.01 * index)
    for name in names:
        start, end, retain = MODELS[name]
        every += scores(name, start, retain, retain - 0.06)
        hits += attacks(name, start, end)
    return Record(
        kind="run",
        title="Facts, removed in two ways",
        command="excise run facts --out out/facts --audit.budget smoke --seeds 0",
        config={"recipe": "facts", "arms": {n: {"name": n} for n in names}, "seeds": [0]},
        environment=Environment(
            excise="0.1.0",
            versions={"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
            device="cpu",
            dtype="float32",
            git="4a19b9b0c7",
            platform="Linux x86_64",
            started="2026-11-21T04:12:00Z",
        ),
        data={
            "name": "facts",
            "fingerprint": digest("facts"),
            "claim": "deletion",
            "exposure": "seen",
            "rows": {"forget.facts": 960, "retain": 2880, "relearn.facts": 480, "test.facts": 480},
            "units": {"forget.facts": 320, "retain": 960, "relearn.facts": 160, "test.facts": 160},
            "notes": ["3 near-duplicates were merged before the split."],
        },
        models=tuple(references),
        method_runs=tuple(method_run(n) for n in names),
        scores=tuple(every),
        attacks=tuple(hits),
        verdicts=tuple(verdict(n, MODELS[n][0], MODELS[n][1]) for n in names),
        samples=tuple(sample(i, names, oracles) for i in range(3)),
        seconds=104.2,
        peak_memory_bytes=1_420_000_000,
        notes=("The audit's null, the gap of filtering, is 0.012 of the way to the original.",),
    )


def method_run(name: str) -> MethodRun:
    """Return one removal."""
    return MethodRun(
        name=name,
        method={"name": name, "lr": 1e-3, "steps": 100, "layers": [1, 2, 3], "alpha": 100.0},
        model=model(name),
        changed=tuple(
            f"model.layers.{i}.mlp.{p}.weight" for i in (1, 2, 3) for p in ("up_proj", "down_proj")
        ),
        cost={"steps": 100.0, "tokens": 51_200.0, "flops": 8.2e10, "seconds": 4.2},
        extras={
            "trained": "3 blocks, mlp only",
            "share_moved": 0.083,
            "files": {"v": "v.safetensors"},
        },
        history=tuple(
            {"step": float(s), "forget": 4.0 * math.exp(-s / 30), "retain": 0.2 + 0.1 * math.sin(s)}
            for s in range(0, 101, 10)
        ),
    )


def sample(index: int, names: tuple[str, ...], oracles: int = 1) -> Sample:
    """Return a continuation."""
    outputs = {"original": " lives in Varn."}
    outputs |= {"oracle-0": " lives in Tolm."} if oracles else {}
    outputs |= {n: " lives in Tolm." if n == "filtering" else " the the the the" for n in names}
    who = ("Orla Benning", "Tam Reyes", "Ansel Duarte")[index]
    return Sample(set="test.facts", prompt=f"{who}", expected=" lives in Varn.", outputs=outputs)


def many() -> Record:
    """Return a run with every removal there is."""
    return full(tuple(MODELS)).model_copy(update={"title": "Facts, removed in four ways"})


def minimal() -> Record:
    """Return a record with nothing in it."""
    return Record()


def removed() -> Record:
    """Return a removal that nobody attacked."""
    record = full(("rmu",), oracles=0)
    return record.model_copy(update={"kind": "remove", "attacks": (), "verdicts": ()})


def no_oracle() -> Record:
    """Return an audit of one model without an oracle, subjects named `candidate`."""
    record = full(("rmu",), oracles=0)
    hits = [
        a.model_copy(update={"subject": "candidate"}) if a.subject == "rmu" else a
        for a in record.attacks
    ]
    verdict = record.verdicts[0]
    untested: dict[str, Any] = {"status": "untested", "against": "nothing", "margin": None}
    untested |= {"reason": "No model was trained without the forget set."}
    levels = tuple(
        r.model_copy(
            update={"gap": None, "low": None, "high": None, "against": "controls"}
            | (untested if r.level in ("D4", "D5") else {})
        )
        for r in verdict.levels
    )
    update: dict[str, Any] = {"levels": levels, "null": None, "residual_bits": None, "highest": ""}
    update["sentence"] = "After 8,192 tokens of relearning, 84 % of what rmu removed came back."
    return record.model_copy(
        update={
            "kind": "audit",
            "title": "Audit of a model of unknown making",
            "attacks": tuple(hits),
            "method_runs": (),
            "verdicts": (verdict.model_copy(update=update),),
            "data": {**record.data, "exposure": "unknown", "claim": "capability"},
        }
    )


def fresh_text() -> Record:
    """Return an audit without an oracle that also learned matched fresh text."""
    record = no_oracle()
    fresh = [
        a.model_copy(
            update={
                "variant": "full on fresh units",
                "control": True,
                "decisive": False,
                "trained_on": "fresh",
                "curve": tuple(p.model_copy(update={"trained": 0.06}) for p in a.curve),
            }
        )
        for a in record.attacks
        if (a.subject, a.name, a.variant, a.lr) == ("original", "relearn", "full", 1e-3)
    ]
    return record.model_copy(update={"attacks": (*record.attacks, *fresh)})


def crowd(count: int = 14) -> Record:
    """Return an audit of more candidates than a picture can name."""
    record = full(("rmu",))
    runs, hits, every, verdicts = [], list[Any](), list[Any](), []
    for i in range(count):
        name = f"candidate-{i:02}-of-a-long-name"
        hits += [a.model_copy(update={"subject": name}) for a in parts.attacks(name, 0.05, i / 15)]
        every += parts.scores(name, 0.05, 0.97, 0.95)
        verdicts.append(parts.verdict("rmu", 0.05, i / 15).model_copy(update={"model": name}))
        runs.append(method_run("rmu").model_copy(update={"name": name}))
    references = tuple(a for a in record.attacks if a.subject != "rmu")
    scored = tuple(s for s in record.scores if s.model != "rmu")
    return record.model_copy(
        update={
            "title": "Many candidates",
            "method_runs": tuple(runs),
            "attacks": (*references, *hits),
            "scores": (*scored, *every),
            "verdicts": tuple(verdicts),
        }
    )


def sensitive() -> Record:
    """Return a record of sensitive data that still holds a sample, which must not be shown."""
    record = full()
    secret = Sample(set="test.facts", prompt="SECRET PROMPT", outputs={"rmu": "SECRET OUTPUT"})
    return record.model_copy(update={"sensitive": True, "samples": (secret,)})


FIXED = ("status", "level", "against", "access", "direction", "kind")
FREE = ("extras", "facts", "method", "config", "data", "outputs", "versions", "cost")


def _taint(item: Any, field: str = "", free: bool = False) -> Any:
    """Append `HOSTILE` to every string that is not an enumeration, and to every free key."""
    if isinstance(item, str):
        return item if field in FIXED and not free else f"{item}{HOSTILE}"
    if isinstance(item, list):
        return [_taint(v, field, free) for v in item]
    if isinstance(item, dict):
        kept = {"name", "rows", "units", "notes", "claim", "exposure", "fingerprint"}
        return {
            (f"{k}{HOSTILE}" if free and k not in kept else k): _taint(v, k, free or k in FREE)
            for k, v in item.items()
        }
    return item


def hostile() -> Record:
    """Return a record in which every free string, and key, tries to break out of the page."""
    return Record.model_validate(_taint(full().model_dump(mode="json", by_alias=True)))


def broken_numbers() -> Record:
    """Return a record full of NaN and None."""
    record = full()
    nan = math.nan
    bad = [s.model_copy(update={"value": nan, "low": nan, "high": nan}) for s in record.scores[:6]]
    hits = [
        a.model_copy(
            update={
                "curve": tuple(
                    p.model_copy(update={"score": nan, "low": nan, "high": nan, "retain": None})
                    for p in a.curve
                )
            }
        )
        for a in record.attacks
    ]
    return record.model_copy(
        update={"scores": tuple(bad) + record.scores[6:], "attacks": tuple(hits)}
    )


RECORDS = {
    "full": full,
    "many": many,
    "minimal": minimal,
    "removed": removed,
    "no_oracle": no_oracle,
    "fresh_text": fresh_text,
    "crowd": crowd,
    "sensitive": sensitive,
    "hostile": hostile,
    "broken_numbers": broken_numbers,
}
"""Every kind of record the report must stand."""
