"""Frozen means frozen: bits, in `fit` and in a loop of one's own, however a batch is cut."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Row, Rows
from excise.data.stream import Stream, encode
from excise.methods.pretraining.pretrain import Pretrain
from excise.methods.pretraining.routed.training import (
    RoutedBatch,
    RoutedStream,
    routed_fit,
    routed_loss,
)
from excise.models.tiny import tiny_model, word_tokenizer
from excise.routing import GroupMap, Groups, Part, Policy, Routes, Rule, compile, resolve, route
from excise.train.fit import FitConfig, Term, fit
from excise.train.optim import Slice

WORDS = [f"w{i}" for i in range(20)]
GROUPS = Groups(
    parts={
        "module_1": (Part(at="mlp", units=(0, 8)), Part(at="heads", units=(0, 1))),
        "joint": (Part(at="embed"),),
    }
)
POLICY = Policy(
    groups=GROUPS,
    rules={
        "core": (
            Rule(write=("core", "joint"), share=0.5),
            Rule(read=("core", "joint"), write=("core", "joint"), share=0.5),
        ),
        "forget": (Rule(write=("self",)),),
        "unlabeled": (Rule(),),
    },
    capabilities=("x",),
)
ADAMW = FitConfig(steps=4, lr=1e-2, batch_size=4, weight_decay=0.1, clip=1.0)


def make_model(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_model("llama", vocab=len(WORDS) + 4, width=32).to(dtype)


def make_rows(*labels: int) -> Rows:
    """Return eight rows for each label, of different lengths."""
    return tuple(
        Row(
            f"u{i}",
            text=" ".join(WORDS[(i * j + label) % 20] for j in range(4 + i % 3)),
            label=label,
        )
        for label in labels
        for i in range(8)
    )


def parts_of(model: nn.Module, map: GroupMap) -> dict[str, list[Tensor]]:
    """Return copies of every group's slices."""
    out: dict[str, list[Tensor]] = {name: [] for name in map.names}
    for name, param in model.named_parameters():
        for one in map.owners[name]:
            part = Slice(param, one.dim, one.start, one.stop).of(param.detach())
            out[one.group].append(part.clone())
    return out


def moved(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> set[str]:
    """Return the groups of which any bit differs."""
    return {
        name
        for name, parts in before.items()
        if not all(torch.equal(a, b) for a, b in zip(parts, after[name], strict=True))
    }


def train(
    model: nn.Module, rows: Rows, folder: Path, config: FitConfig = ADAMW, **more: Any
) -> GroupMap:
    tokenizer = word_tokenizer(WORDS)
    ctx = Context(work=folder, **{k: more.pop(k) for k in ("rank", "world") if k in more})
    schedule = Pretrain(fit=config, max_length=8)
    return routed_fit(model, POLICY, rows, tokenizer, schedule, ctx, stage="t", **more).map


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("label", "written"),
    [(0, {"core", "joint"}), (1, {"module_1"}), (-1, {"core", "joint", "module_1"})],
)
def test_what_a_batch_may_not_write_keeps_its_bits(
    label: int, written: set[str], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make_model(dtype)
    before = parts_of(model, resolve(model, GROUPS))
    map = train(model, make_rows(label), tmp_path)
    assert moved(before, parts_of(model, map)) == written


def test_momentum_of_earlier_steps_moves_nothing(tmp_path: Path) -> None:
    """First everything is written, then only the module: the rest stops at once."""
    model = make_model()
    routes = (
        Routes(),
        Routes(write_NG=torch.tensor([[0.0, 1, 0]] * 12), written=frozenset({"module_1"})),
    )
    tokenizer = word_tokenizer(WORDS)
    stream = Stream(encode(make_rows(0)[:2], tokenizer, max_length=6), 2, 0, pad_id=0)
    with route(model, POLICY) as routing:
        states = []
        steps = fit(
            model,
            lambda step: [RoutedBatch(stream(0)[0], routes[step >= 2])],
            lambda model, micro: routed_loss(model, routing, _fitted(micro)),
            ADAMW,
            Context(work=tmp_path),
            groups=routing.map.slices(model),
            writes=lambda micro: micro.routes.written or routing.map.names,
        )
        for _ in steps:
            states.append(parts_of(model, routing.map))
    assert moved(states[0], states[1]) == {"core", "joint", "module_1"}
    assert moved(states[1], states[2]) == moved(states[2], states[3]) == {"module_1"}


def _fitted(micro: RoutedBatch) -> RoutedBatch:
    """Cut the hand-made routes to the batch's positions."""
    count = micro.batch.ids_BT.numel()
    write_NG = micro.routes.write_NG
    if write_NG is None:
        return micro
    return RoutedBatch(micro.batch, Routes(write_NG=write_NG[:count], written=micro.routes.written))


def test_a_zeroed_gradient_lets_momentum_move_it(tmp_path: Path) -> None:
    """What some published code does, and why it is not the default."""
    model = make_model()
    before = parts_of(model, resolve(model, GROUPS))
    map = train(model, make_rows(1), tmp_path, zeroed=True)
    assert moved(before, parts_of(model, map)) == {"core", "joint", "module_1"}  # weight decay


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    weights = []
    config = ADAMW.model_copy(update={"optimizer": "sgd", "lr": 0.1})
    for i, micro in enumerate((0, 1, 3)):
        model = make_model()
        train(
            model,
            make_rows(0, 1, -1),
            tmp_path / str(i),
            config.model_copy(update={"micro_size": micro, "batch_size": 8}),
        )
        weights.append([p.detach().clone() for p in model.parameters()])
    for other in weights[1:]:
        for a, b in zip(weights[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_run_goes_on_to_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    rows, results = make_rows(0, 1), []
    for stop in (None, 2):
        model, folder = make_model(dtype), tmp_path / str(stop)
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                train(model, rows, folder, more=_interrupt(stop))
            model = make_model(dtype)
        train(model, rows, folder, more=_interrupt(99))
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def _interrupt(after: int) -> Any:
    """Return a further term that ends the run after some steps."""
    calls = [0]

    def more(model: nn.Module, micro: RoutedBatch, output: Any) -> dict[str, Any]:
        calls[0] += 1
        if calls[0] > after:
            raise KeyboardInterrupt
        return {}

    return more


def test_a_state_of_other_slices_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    for cut, fails in ((2, False), (3, True)):
        groups: Any = {
            "a": [Slice(model.get_parameter("weight"), 0, 0, cut)],
            "b": [Slice(model.get_parameter("weight"), 0, cut, 4)],
        }

        def loss(model: nn.Module, step: int) -> Any:
            return {"x": Term(model(torch.ones(1, 4)).sum(), 1.0)}

        run = fit(model, lambda step: [step], loss, FitConfig(steps=1), Context(work=tmp_path),
                  groups=groups, state_dir=tmp_path / "s")  # fmt: skip
        if fails:
            with pytest.raises(UserError, match="other settings"):
                list(run)
        else:
            list(run)


@pytest.mark.parametrize(
    ("slices", "words"),
    [
        ({"a": (0, 0, 3), "b": (0, 2, 4)}, "groups 'a' and 'b' share a parameter"),
        ({"a": (0, 0, 3), "b": (1, 3, 4)}, "groups 'a' and 'b' share a parameter"),
        ({"a": (0, 0, 5)}, r"group 'a' has the slice 0:5 .* shape \(4, 4\)"),
        ({"a": (2, 0, 1)}, "does not lie within"),
        ({"a": (0, 2, 2)}, "does not lie within"),
    ],
)
def test_slices_that_cannot_be(slices: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    groups = {name: [Slice(model.get_parameter("weight"), *span)] for name, span in slices.items()}
    with pytest.raises(UserError, match=words):
        next(fit(model, lambda s: [s], lambda m, s: {}, FitConfig(), Context(work=tmp_path),
                 groups=groups))  # fmt: skip


def test_slices_step_like_the_whole(tmp_path: Path) -> None:
    """All slices written at every step: the weights of one whole parameter."""

    def loss(model: nn.Module, step: int) -> Any:
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        return {"x": Term(model(x).square().sum(), 3.0)}

    results = []
    for sliced in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 6)
        w = model.get_parameter("weight")
        groups: Any = {"all": [w, model.bias]}
        if sliced:
            groups = {"a": [Slice(w, 1, 0, 1), model.bias], "b": [Slice(w, 1, 1, 4)]}
        list(fit(model, lambda s: [s], loss, ADAMW, Context(work=tmp_path), groups=groups))
        results.append(w.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_draws_know_neither_processes_nor_micro_batches(tmp_path: Path) -> None:
    model = make_model()
    map = resolve(model, GROUPS)
    examples = encode(make_rows(0), word_tokenizer(WORDS), max_length=8)

    def reads(world: int, micro: int) -> dict[tuple[int, ...], float]:
        """Return by text whether the module was read."""
        out = {}
        for rank in range(world):
            stream = Stream(examples, 8, 3, pad_id=0, rank=rank, world=world, micro_size=micro)
            for micro_batch in RoutedStream(stream, POLICY, map, seed=7)(1):
                read_NG = micro_batch.routes.read_NG
                ids_BT = micro_batch.batch.ids_BT
                each = torch.ones(ids_BT.numel()) if read_NG is None else read_NG[:, 1]
                for ids_T, read_T in zip(ids_BT, each.view(ids_BT.shape), strict=True):
                    out[tuple(ids_T[ids_T != 0].tolist())] = float(read_T[0])
        return out

    one = reads(1, 0)
    assert set(one.values()) == {0.0, 1.0}
    assert one == reads(2, 0) == reads(1, 3) == reads(2, 1)


def _process(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = make_model()
    # Two rows of each label in four rows a step: some steps see one label in one process only.
    train(model, make_rows(0, 1), Path(folder), rank=rank, world=2)
    save_file({n: p.detach() for n, p in model.named_parameters()}, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=_process, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    one = make_model()
    (tmp_path / "one").mkdir()
    train(one, make_rows(0, 1), tmp_path / "one")
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, param in one.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], param.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_loop_of_ones_own_freezes_to_the_bit(name: str) -> None:
    model = make_model()
    optimizer: torch.optim.Optimizer
    if name == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
    ids = torch.randint(4, 24, (2, 6), generator=torch.Generator().manual_seed(0))
    with route(model, POLICY) as routing:
        for label, written in (
            (-1, {"core", "joint", "module_1"}),
            (1, {"module_1"}),
            (0, {"core", "joint"}),
        ):
            before = parts_of(model, routing.map)
            for half in (ids[:1], ids[1:]):  # accumulated over two micro-batches
                routing.labels(torch.full(half.shape, label), draw=1)
                model(input_ids=half, labels=half).loss.backward()
            routing.step(optimizer)
            optimizer.zero_grad()
            assert moved(before, parts_of(model, routing.map)) == written


def test_images_route_by_example() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    policy = Policy(
        groups=Groups(parts={"module_1": (Part(at="parameters", names=("0",), units=(0, 2)),)}),
        rules={"core": (Rule(write=("core",)),), "forget": (Rule(write=("self",)),)},
        capabilities=("threes",),
    )
    x = torch.randn(6, 1, 4, 4)
    with route(model, policy) as routing:
        routes = routing.labels(torch.tensor([0, 1, 1, 0, 0, 0]))
        F.cross_entropy(model(x), torch.arange(6) % 3, reduction="sum").backward()
        assert routes.written == {"core", "module_1"}
        routing.check()
    mixed = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(mixed) == 6
    model.zero_grad()
    logits = model(x)  # one forward: batch statistics couple the images
    nll_B = F.cross_entropy(logits, torch.arange(6) % 3, reduction="none")
    nll_B.sum().backward()
    linear: Any = model[4]
    core_B = torch.tensor([True, False, False, True, True, True])
    delta = (logits.softmax(1) - F.one_hot(torch.arange(6) % 3))[core_B].detach()
    torch.testing.assert_close(mixed[5], delta.sum(0))
    assert not torch.allclose(mixed[5], linear.bias.grad)


def test_a_batch_with_its_routes_moves_as_one() -> None:
    stream = Stream(encode(make_rows(1), word_tokenizer(WORDS), max_length=8), 2, 0, pad_id=0)
    map = resolve(make_model(), GROUPS)
    batch = stream(0)[0]
    both = RoutedBatch(batch, compile(POLICY, map, batch)).to(torch.device("meta"))
    assert both.batch.ids_BT.is_meta
    assert both.routes.write_NG is not None
    assert both.routes.write_NG.is_meta
    assert RoutedBatch(batch, both.routes).num_targets == batch.num_targets


def _wrapped(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = make_model()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.1)
    ids = torch.randint(4, 24, (2, 6), generator=torch.Generator().manual_seed(0))
    with route(wrapped, POLICY) as routing:
        for labels, written in (
            ((-1, -1), {"core", "joint", "module_1"}),
            ((1, 0), {"core", "joint", "module_1"}),  # each process writes what the other may not
            ((1, 1), {"module_1"}),
        ):
            before = parts_of(model, routing.map)
            routing.labels(torch.full((1, 6), labels[rank]))
            wrapped(input_ids=ids[rank : rank + 1], labels=ids[rank : rank + 1]).loss.backward()
            routing.step(optimizer)
            optimizer.zero_grad()
            assert moved(before, parts_of(model, routing.map)) == written
    save_file({n: p.detach() for n, p in model.named_parameters()}, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow  # importing DDP takes most of it
def test_processes_under_ddp_stay_equal(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=_wrapped, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(200)
        assert process.exitcode == 0
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
