"""What is computed on the CPU and on the second device and compared to the bit.

A process of its own: `python -m tests.device.comparisons` reads lines of JSON, a name of `CASES`
and its arguments, and answers each with a line: null where both agree, else what differs. The
device is registered here alone, since that cannot be taken back.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from excise.auditor.attacks import ATTACKS
from excise.auditor.base import Subject
from excise.auditor.budget import SMOKE
from excise.auditor.results import to_json
from excise.core.context import Context
from excise.core.stages import Runtime
from excise.data.domain import Row
from excise.data.rows import READS
from excise.data.stream import Batch, Stream, collate, encode
from excise.evals.score import measure
from excise.losses import nll
from excise.methods.base import ApplyMethod
from excise.methods.distillation.cache_kinds import SampledTokens
from excise.methods.distillation.teacher_cache import build_cache
from excise.models.checkpoint import Checkpoint
from excise.models.lora import LoRA
from excise.models.tiny import tiny_model
from excise.routing import Groups, Part, Policy, Rule, route
from excise.run.study import conduct
from excise.testing import toy_domain, toy_start
from excise.testing.methods import Killed, shortened
from excise.train.fit import FitConfig, Term, fit
from excise.train.pool import Processes
from excise.train.vocab.targets import Sampled
from excise_studies.routing.moe_equivalence import MoEEquivalence
from tests.conftest import FIXTURES
from tests.device.second_device import COUNTS, NAME, install
from tests.fixtures.facts import make_domain
from tests.matrix import test_methods

DEVICES = ("cpu", NAME)

QUICK: Mapping[str, Mapping[str, Any]] = {
    "sampling": {"samples": (4,)},
    "lens": {"steps": 2, "batch": 16},
    "latent": {"steps": 2, "strengths": (1.0,), "blocks": 1},
    "steer": {"strengths": (1.0,), "blocks": 1},
    "prune": {"shares": (0.3,), "top_shares": (0.01,), "calibration_rows": 16},
    "noise": {"repair_steps": 2, "strengths": (0.1,)},
    "shrink_perturb": {"repair_steps": 2, "alphas": (0.3,)},
    "reinit": {"repair_steps": 2, "parts": ("norms", "attention")},
    "align_rows": {"steps": 3},
    "gcg": {"steps": 2, "width": 16, "tokens": 4, "rows": 4, "top": 16},
    "soft_prompt": {"vectors": 4, "rates": (0.03,)},
}
"""Attacks cut short: each kind of step is taken, few times."""

TIMES = ("seconds",)
"""Facts that no two runs share."""


def shared(value: Any, folder: str) -> Any:
    """Return plain data without times and the place of its files, which no two runs share."""
    if isinstance(value, Mapping):
        return {key: shared(item, folder) for key, item in value.items() if key not in TIMES}
    if isinstance(value, str) and value.startswith(folder):
        return Path(value).name
    return [shared(item, folder) for item in value] if isinstance(value, (list, tuple)) else value


def both(compute: Callable[[Context], Any]) -> str | None:
    """Compute something on either device, from other global random states; say what differs."""
    results = []
    for i, device in enumerate(DEVICES):
        torch.manual_seed(i)
        before = random_states()
        with tempfile.TemporaryDirectory() as folder:
            ctx = Context(Path(folder), seed=5, device=torch.device(device))
            results.append(shared(compute(ctx), folder))
        for name, state in random_states().items():
            if not torch.equal(state, before[name]):
                return f"computing on {device} left the global random state of {name} changed"
    return difference(*results)


def random_states() -> dict[str, torch.Tensor]:
    """Return the global random state of either device."""
    return {"cpu": torch.get_rng_state(), NAME: torch.get_device_module(NAME).get_rng_state()}


def difference(one: Any, two: Any, at: str = "") -> str | None:
    """Return where two pieces of plain data first differ."""
    if isinstance(one, Mapping) and isinstance(two, Mapping) and one.keys() == two.keys():
        return next((d for k in one if (d := difference(one[k], two[k], f"{at}.{k}"))), None)
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        pairs = enumerate(zip(one, two, strict=True))
        return next((d for i, (a, b) in pairs if (d := difference(a, b, f"{at}[{i}]"))), None)
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return None if torch.equal(one.cpu(), two.cpu()) else f"{at}: tensors differ"
    same = one == two or (one != one and two != two)
    return None if same else f"{at}: {one!r} on the CPU and {two!r} on the device"


def method(name: str, family: str, change: Mapping[str, Any] | None = None) -> str | None:
    """Apply a method for two steps."""
    made = shortened(test_methods.made(name, family), 2).model_copy(update=dict(change or {}))
    if name == "potion":
        made = made.model_copy(update={"tries": 2})
    domain = test_methods.domain_for(name)
    with tempfile.TemporaryDirectory() as folder:
        path = toy_start(Path(folder) / "start", family).path

        def apply(ctx: Context) -> Any:
            start = Checkpoint(path)  # counts from 0 what is read of it
            removal = made.apply(start, domain, ctx)
            of_model = {"fingerprint": removal.checkpoint.fingerprint, "changed": removal.changed}
            return {**of_model, "cost": asdict(removal.cost), "extras": dict(removal.extras)}

        return both(apply)


def attack(name: str) -> str | None:
    """Attack a model that was never taught, with one that was as the original."""
    models = [Checkpoint(FIXTURES / folder) for folder in ("never_taught", "knowing")]
    budget = SMOKE.model_copy(
        update={
            "steps": 2, "rates": (1e-3,), "checkpoints": (0, 1, 2), "batch_size": 8,
            "max_test_rows": 8, "max_other_rows": 8,
        }
    )  # fmt: skip

    def run(ctx: Context) -> Any:
        subject = Subject("never-taught", *models)
        made = ATTACKS[name].model_validate(QUICK.get(name, {}))
        result = made.run(subject, make_domain(), budget, ctx)
        return to_json(replace(result, seconds=0.0))

    return both(run)


def with_adapter(name: str) -> str | None:
    """Apply a method through PEFT, and keep the adapter."""
    return method(name, "llama", {"lora": LoRA(rank=2, output="adapter")})


def resumed(name: str) -> str | None:
    """Kill a method at its last event on the device, and apply it again in the same folder."""
    made = shortened(test_methods.made(name), 3)
    with tempfile.TemporaryDirectory() as folder:
        path = toy_start(Path(folder) / "start").path

        def apply(ctx: Context) -> Any:
            events: list[str] = []

            def die(kind: str, data: Mapping[str, Any]) -> None:
                events.append(kind)
                if ctx.device.type == NAME and kind == "step":
                    raise Killed

            with suppress(Killed):
                removal = made.apply(Checkpoint(path), toy_domain(), replace(ctx, emit=die))
            assert events.count("step"), "the method tells no step, so nothing was killed"
            if ctx.device.type == NAME:
                removal = made.apply(Checkpoint(path), toy_domain(), ctx)
            return removal.checkpoint.fingerprint

        return both(apply)


def scores(metric: str) -> str | None:
    """Score the rows a metric reads, padded on either side."""
    model = Checkpoint(FIXTURES / "knowing")
    domain = make_domain()
    plain = domain.test["tests"][:3]
    options = tuple(dict.fromkeys(row.completion for row in plain))[:3]
    kinds = {
        "completion": plain,
        "text": tuple(Row(r.unit, text=r.prompt + r.completion) for r in plain),
        "choice": tuple(replace(r, completion="", choices=options, answer=0) for r in plain),
    }
    choice = metric.startswith("multiple_choice")
    rows = kinds["choice" if choice else READS.get(metric, ("completion",))[0]]

    def ask(ctx: Context) -> Any:
        live = model.load(dtype=ctx.dtype, device=ctx.device)
        return [
            measure(live, model.tokenizer(), rows, metric, batch_size=4, padding_side=side).items
            for side in ("right", "left")
        ]

    return both(ask)


def study() -> str | None:
    """Conduct a study: every stage of it, its statistics and its decision."""

    def run(ctx: Context) -> Any:
        asked = MoEEquivalence(seeds=(1,), families=("gpt2",), device=ctx.device.type)
        record = conduct(asked, ctx.work / "out", Processes(1, emit=ctx.emit))
        assert record.study is not None
        return record.study.model_dump(mode="json")

    return both(run)


def pooled() -> str | None:
    """Apply a method in two workers that have a device each, and in this process on the CPU."""
    fingerprints = []
    with tempfile.TemporaryDirectory() as folder:
        start = toy_start(Path(folder) / "start")
        made = shortened(test_methods.made("grad_diff"), 2)
        jobs = [ApplyMethod(made, start, toy_domain(), seed) for seed in (0, 1)]
        preload = ("tests.device.installed",)
        with Processes(2, preload=preload, devices=(f"{NAME}:0", f"{NAME}:0")) as pool:
            for device, run in (("cpu", None), (NAME, pool)):
                runtime = Runtime(Path(folder) / device, device=device)
                found = run.map(runtime.run, jobs) if run else [runtime.run(job) for job in jobs]
                fingerprints.append([removal.checkpoint.fingerprint for removal in found])
    return difference(fingerprints[0], fingerprints[1])


def sampled() -> str | None:
    """Keep tokens that a teacher samples."""
    with tempfile.TemporaryDirectory() as folder:
        teacher = toy_start(Path(folder) / "teacher")
        examples = encode(toy_domain().retain, teacher.tokenizer(), max_length=16)
        batch = collate(examples[:4], pad_id=0)

        def keep(ctx: Context) -> Any:
            found = build_cache(teacher, examples, SampledTokens(draws=5), ctx).lookup(batch)
            drawn = found.targets[0]
            assert isinstance(drawn, Sampled)
            return {"ids": drawn.ids_NK, "counts": drawn.count_NK}

        return both(keep)


def loop() -> str | None:
    """Route gradients in a loop of one's own."""
    policy = Policy(
        groups=Groups(parts={"module_1": (Part(at="mlp", units=(0, 8)),)}),
        rules={
            "core": (Rule(write=("core",)),),
            "forget": (Rule(write=("self",)),),
            "unlabeled": (Rule(),),
        },
        capabilities=("x",),
    )

    def train(ctx: Context) -> Any:
        model = tiny_model("llama", width=32).train().to(ctx.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        draw = torch.Generator().manual_seed(0)
        with route(model, policy, labels=(-1, 0, 1)) as routing:
            for _ in range(3):
                ids_BT = torch.randint(4, 200, (4, 16), generator=draw).to(ctx.device)
                label_BT = torch.tensor([0, 1, 0, -1])[:, None].expand(4, 16)
                routing.labels(label_BT.to(ctx.device))
                model(input_ids=ids_BT, labels=ids_BT).loss.backward()
                routing.step(optimizer)
                optimizer.zero_grad()
        return {name: p.detach().cpu() for name, p in model.named_parameters()}

    return both(train)


def mixed() -> str | None:
    """Return what mixes devices and is not refused, or is no mixing and is."""
    here, there = torch.arange(6.0).view(2, 3), torch.arange(6.0, device=NAME).view(2, 3)
    refused: Mapping[str, Callable[[], Any]] = {
        "sum": lambda: there + here,
        "sum the other way": lambda: here + there,
        "in place": lambda: here.clone().add_(there),
        "scalar in place": lambda: torch.tensor(0.0).add_(there.sum()),
        "product": lambda: there @ here.T,
        "one of a list": lambda: torch.cat([there, here]),
        "where": lambda: torch.where(there > 1, there, here),
        "gather": lambda: there.gather(1, torch.zeros(2, 1, dtype=torch.long)),
        "embedding": lambda: torch.nn.functional.embedding(torch.tensor([1]), there),
        "generator": lambda: torch.rand(2, device=NAME, generator=torch.Generator()),
    }
    for name, call in refused.items():
        try:
            call()
        except RuntimeError:
            continue
        return f"{name} is not refused"
    taken = {
        "scalar": (there + torch.tensor(1.0), here + 1),
        "indices": (there[torch.tensor([1])], here[torch.tensor([1])]),
        "copy": (torch.empty(2, 3, device=NAME).copy_(here), here),
    }
    wrong = (n for n, (a, b) in taken.items() if a.device.type != NAME or difference(a, b))
    return next(wrong, None)


def counted() -> dict[str, int]:
    """Return how often the host waits in things that are known to make it."""
    there = torch.tensor([1.0, 0.0, 2.0], device=NAME)
    at = torch.tensor([0], device=NAME)
    calls: Mapping[str, Callable[[], Any]] = {
        "item": lambda: there[0].item(),
        "bool": lambda: bool(there[0]),
        "tolist": lambda: there.tolist(),
        "cpu": lambda: there.cpu(),
        "nonzero": lambda: there.nonzero(),
        "mask": lambda: there[there > 0],
        "equal": lambda: torch.equal(there, there),
        "sum": lambda: (there * 2).sum(),
        "indices": lambda: there[at],
    }
    found = {}
    for name, call in calls.items():
        before = waited()
        call()
        found[name] = waited() - before
    return found


def faults() -> list[str | None]:
    """Return what is said of computations that do depend on the device, or leave traces there."""

    def draws(ctx: Context) -> float:
        return float(torch.rand((), device=ctx.device))

    def seeds(ctx: Context) -> float:
        torch.manual_seed(7)
        return 0.0

    def rounds(ctx: Context) -> Any:
        third = torch.ones(1) / 3
        return third if ctx.device.type == "cpu" else torch.nextafter(third, third + 1)

    return [both(draws), both(seeds), both(rounds)]


def waits(micro_size: int) -> dict[str, int]:
    """Return how often the host waits in one step of `fit`, in excise and in transformers.

    Two terms and a clipped norm; rows of different lengths, so that there is padding.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = toy_start(Path(folder) / "start")
        tokenizer = start.tokenizer()
        examples = encode(toy_domain().retain, tokenizer, max_length=32)
        batches = Stream(examples, 8, 0, tokenizer.pad_token_id, micro_size=micro_size)
        model = start.load(device=NAME)
        inside: list[int] = []

        def loss(net: Any, batch: Batch) -> dict[str, Term]:
            before = waited()
            logits_BTV = net(**batch.inputs).logits
            inside.append(waited() - before)
            total, count = nll(logits_BTV, batch)
            return {"down": Term(total, count), "up": Term(total, count, -0.5)}

        def counts(batch: Batch) -> dict[str, float]:
            return dict.fromkeys(("down", "up"), float(batch.num_targets))

        config = FitConfig(steps=2, lr=1e-3, clip=0.1, weight_decay=0.1)
        ctx = Context(Path(folder), device=torch.device(NAME))
        steps = fit(model, batches, loss, config, ctx, counts=counts)
        next(steps)
        inside.clear()
        before = waited()
        next(steps)
        total = waited() - before
        steps.close()
        return {"excise": total - sum(inside), "transformers": sum(inside)}


def waited() -> int:
    """Return how often the host has waited since the process began."""
    return sum(count for name, count in COUNTS.items() if name.startswith("sync:"))


CASES: Mapping[str, Callable[..., Any]] = {
    "method": method,
    "attack": attack,
    "adapter": with_adapter,
    "resumed": resumed,
    "scores": scores,
    "study": study,
    "sampled": sampled,
    "pool": pooled,
    "route": loop,
    "waits": waits,
    "mixed": mixed,
    "counted": counted,
    "faults": faults,
}


def main() -> None:
    """Answer until nobody asks."""
    install()
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        case, *arguments = json.loads(line)
        try:
            answer = CASES[case](*arguments)
        except Exception:
            answer = traceback.format_exc()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
