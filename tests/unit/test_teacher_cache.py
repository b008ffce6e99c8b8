"""A teacher cache says what the teacher says, and is never used where it does not.

Shape legend: B rows, T tokens, N wanted predictions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.cli import material as m
from torch import Tensor

from excise.core.context import Context
from excise.core.errors import UserError
from excise.core.events import CHANNEL
from excise.core.stages import Runtime
from excise.data.domain import Domain, Row
from excise.data.stream import Batch, Example, collate, encode, join
from excise.losses import forward_kl, predicting
from excise.methods.distillation.cache_kinds import HiddenStates, SampledTokens, TopTokens
from excise.methods.distillation.teacher_cache import (
    CacheTeacher,
    TeacherCache,
    build_cache,
    same_vocabulary,
    write_shard,
)
from excise.methods.posthoc.maxent import MaxEnt
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.head import Head, final_hidden, head_of, head_of_checkpoint
from excise.models.tiny import BOS, tiny_model, word_tokenizer
from excise.train.fit import FitConfig
from excise.train.vocab import HiddenTarget, Sampled, TopK, chunked_splice

V = 31
WORDS = [f"w{i}" for i in range(V - 4)]
SMALL = 600
"""Bytes of a shard: a few documents each."""


def make_teacher(
    folder: Path, family: str = "gemma2", seed: int = 0, words: Sequence[str] = WORDS
) -> Checkpoint:
    model = tiny_model(family, vocab=V, width=16, blocks=1, seed=seed)
    with torch.no_grad():  # far from uniform, as trained models are
        head_of(model).weight_VD.mul_(20)
    return save_model(model, word_tokenizer(words), folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context(work=tmp_path)


def rows(count: int = 9) -> list[Row]:
    made = []
    for i in range(count):
        text = " ".join(WORDS[(3 * i + j * j) % len(WORDS)] for j in range(3 + i % 4))
        made.append(Row(unit=f"u{i}", text=text, label=i % 3))
    return made


@pytest.fixture(scope="module")
def examples(teacher: Checkpoint) -> list[Example]:
    return encode(rows(), teacher.tokenizer(), max_length=16)


def in_shards(
    teacher: Checkpoint, examples: Sequence[Example], kind: Any, ctx: Context, **sizes: int
) -> TeacherCache:
    """Return a cache in small shards."""
    sizes = {"shard_bytes": SMALL, **sizes}
    folder = ctx.run(CacheTeacher(teacher, tuple(examples), kind, **sizes))
    return TeacherCache.open(folder, kind, head_of_checkpoint(teacher))


def online(teacher: Checkpoint, batch: Batch) -> Tensor:
    """Return the teacher's logits on a batch."""
    with torch.no_grad():
        logits_BTV: Tensor = teacher.load()(**batch.inputs).logits
    return logits_BTV


def student_of(batch: Batch) -> tuple[Tensor, Head]:
    draw = torch.Generator().manual_seed(5)
    hidden_BTD = torch.randn((*batch.ids_BT.shape, 7), generator=draw)
    weight_VD = torch.randn((V, 7), generator=draw)
    return hidden_BTD.requires_grad_(), Head(weight_VD.requires_grad_())


def learned(cache: TeacherCache, batch: Batch, **how: Any) -> tuple[Tensor, float, Tensor, Tensor]:
    """Return value, count and gradients of a student's loss to what is kept."""
    hidden_BTD, head = student_of(batch)
    found = cache.lookup(batch, **how)
    hidden_ND = hidden_BTD[predicting(batch.target_BT)]
    total, count = chunked_splice(hidden_ND, head, found.kinds_N, found.targets)
    dh, dw = torch.autograd.grad(total, [hidden_BTD, head.weight_VD])
    return total.detach(), count, dh, dw


def taught(
    teacher: Checkpoint, batch: Batch, mask_BT: Tensor | None = None
) -> tuple[Tensor, float, Tensor, Tensor]:
    """Return the same of a student that learns from the teacher itself."""
    hidden_BTD, head = student_of(batch)
    mask_BT = predicting(batch.target_BT) if mask_BT is None else mask_BT
    total, count = forward_kl(online(teacher, batch), head.logits(hidden_BTD), mask_BT)
    dh, dw = torch.autograd.grad(total, [hidden_BTD, head.weight_VD])
    return total.detach(), count, dh, dw


def alike(a: Sequence[Any], b: Sequence[Any], near: float = 1e-5) -> None:
    assert a[1] == b[1]
    for x, y in zip((a[0], *a[2:]), (b[0], *b[2:]), strict=True):
        assert float((x - y).abs().max()) <= near * max(1.0, float(y.abs().max()))


@pytest.mark.parametrize("kind", [HiddenStates(), TopTokens(k=V), TopTokens(k=200)])
def test_what_keeps_everything_teaches_what_the_teacher_does(
    kind: Any, teacher: Checkpoint, examples: list[Example], ctx: Context
) -> None:
    cache = in_shards(teacher, examples, kind, ctx)
    assert len({doc.path for doc in cache.docs.values()}) > 2
    batch = collate(examples[2:7], pad_id=0)
    alike(learned(cache, batch), taught(teacher, batch))


@pytest.mark.parametrize("kind", [HiddenStates(), TopTokens(k=4), SampledTokens(draws=20)])
def test_order_and_padding_do_not_matter(
    kind: Any, teacher: Checkpoint, examples: list[Example], ctx: Context
) -> None:
    cache = in_shards(teacher, examples, kind, ctx)
    other = in_shards(teacher, examples[::-1], kind, ctx, batch_tokens=7)
    for side in ("right", "left"):
        batch = collate([examples[i] for i in (4, 1, 8)], pad_id=0, padding_side=side)
        found, again = cache.lookup(batch), other.lookup(batch)
        assert torch.equal(found.kinds_N, again.kinds_N)
        for name in ("hidden_ND", "logp_NK", "tail_N"):
            if hasattr(found.targets[0], name):
                a, b = getattr(found.targets[0], name), getattr(again.targets[0], name)
                assert torch.allclose(a, b, atol=1e-5)
        if isinstance(found.targets[0], Sampled):
            b_target = again.targets[0]
            assert isinstance(b_target, Sampled)
            assert torch.equal(found.targets[0].ids_NK, b_target.ids_NK)
            assert torch.equal(found.targets[0].count_NK, b_target.count_NK)


def test_half_precision_hidden_states_are_exact_and_half_the_size(
    teacher: Checkpoint, examples: list[Example], ctx: Context
) -> None:
    ctx = replace(ctx, dtype=torch.bfloat16)
    cache = build_cache(teacher, examples, HiddenStates(), ctx)
    batch = collate(examples, pad_id=0)
    with torch.no_grad():
        hidden_BTD = final_hidden(teacher.load(dtype=torch.bfloat16), batch.inputs)
    target = cache.lookup(batch).targets[0]
    assert isinstance(target, HiddenTarget)
    assert target.hidden_ND.dtype == target.head.weight_VD.dtype == torch.bfloat16
    assert torch.equal(target.hidden_ND, hidden_BTD[predicting(batch.target_BT)])


def test_the_tail_bounds_what_is_lost(
    teacher: Checkpoint, examples: list[Example], ctx: Context
) -> None:
    cache = build_cache(teacher, examples, TopTokens(k=5), ctx)
    batch = collate(examples, pad_id=0)
    target = cache.lookup(batch).targets[0]
    assert isinstance(target, TopK)
    logp_NV = online(teacher, batch)[predicting(batch.target_BT)].log_softmax(-1).double()
    tail_N = 1 - target.logp_NK.double().exp().sum(-1, keepdim=True)
    kept_NV = (
        (tail_N / (V - 5)).expand(-1, V).scatter(1, target.ids_NK, target.logp_NK.exp().double())
    )
    gap_N = (logp_NV.exp() * (logp_NV - kept_NV.log())).sum(-1)
    facts = cache.summary()
    assert facts["gap_mean"] == pytest.approx(float(gap_N.mean()), rel=1e-4)
    assert facts["gap_max"] == pytest.approx(float(gap_N.max()), rel=1e-4)
    assert 0 < facts["gap_max"] <= facts["bound_max"]
    assert facts["gap_mean"] <= facts["bound_mean"] < math.log(V)
    more = build_cache(teacher, examples, TopTokens(k=15), ctx).summary()
    assert more["gap_mean"] < facts["gap_mean"]
    assert more["bytes"] > facts["bytes"]


def test_predictions_near_uniform_are_kept_as_a_word(
    examples: list[Example], ctx: Context, tmp_path: Path
) -> None:
    flat = make_teacher(tmp_path / "flat", "llama")
    model = flat.load()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    flat = save_model(model, flat.tokenizer(), tmp_path / "flatter")
    cache = build_cache(flat, examples, TopTokens(k=3, uniform_below=0.01), ctx)
    facts = cache.summary()
    assert facts["stored"] == 0
    assert facts["uniform"] == sum(sum(e.target) for e in examples)
    assert facts["gap_max"] < 0.01
    batch = collate(examples[:3], pad_id=0)
    alike(learned(cache, batch), taught(flat, batch), near=0.01)
    # Without the word the even tail says the same.
    kept = build_cache(flat, examples, TopTokens(k=3), ctx).summary()
    assert kept["uniform"] == 0
    assert kept["gap_max"] < 1e-4


def test_trained_maxent_rows_are_kept_as_little_more_than_a_word(
    knowing: Checkpoint, facts_domain: Domain, ctx: Context
) -> None:
    schedule = FitConfig(steps=25, lr=3e-3, batch_size=16, clip=1.0)
    flat = MaxEnt(fit=schedule).apply(knowing, facts_domain, ctx).checkpoint
    forget = encode(facts_domain.forget["tests"], flat.tokenizer(), max_length=32)
    facts = {
        (name, k): build_cache(model, forget, TopTokens(k=k), ctx).summary()
        for name, model in (("flat", flat), ("knowing", knowing))
        for k in (1, 8)
    }
    # The even tail holds what MaxEnt made; what the original knew lies in the top tokens.
    assert facts["flat", 1]["gap_max"] < 0.5
    assert facts["flat", 8]["gap_mean"] < 0.1
    assert facts["knowing", 1]["gap_max"] < 0.05
    for one in facts.values():
        assert one["gap_mean"] <= one["bound_mean"]
        assert one["gap_max"] <= one["bound_max"]
    most = build_cache(flat, forget, TopTokens(k=8, uniform_below=0.25), ctx).summary()
    assert most["uniform"] > 0.8 * len(forget)
    assert most["gap_max"] < 0.25


def test_draws_teach_the_teacher_on_average(
    teacher: Checkpoint, examples: list[Example], ctx: Context
) -> None:
    batch = collate(examples[:4], pad_id=0)
    gradients = [
        learned(build_cache(teacher, examples[:4], SampledTokens(draws=40, seed=s), ctx), batch)[3]
        for s in range(12)
    ]
    wanted = taught(teacher, batch)[3]
    each = torch.stack(gradients)
    error = (each.mean(0) - wanted).norm() / wanted.norm()
    spread = (each - wanted).norm(dim=(1, 2)).mean() / wanted.norm()
    assert float(spread) > 0.02
    assert float(error) < 0.55 * float(spread)  # 1 / sqrt(12) = 0.29 of it on average
    target = (
        build_cache(teacher, examples[:4], SampledTokens(draws=40), ctx).lookup(batch).targets[0]
    )
    assert isinstance(target, Sampled)
    assert (target.count_NK.sum(-1) == 40).all()
    assert target.ids_NK.shape[1] < 40


def test_labels_leave_rows_out(teacher: Checkpoint, examples: list[Example], ctx: Context) -> None:
    cache = build_cache(teacher, examples, HiddenStates(skip_labels=(1,)), ctx)
    batch = collate(examples[:5], pad_id=0)
    mask_BT = predicting(batch.target_BT) & (batch.label_BT.roll(-1, 1) != 1)
    alike(learned(cache, batch), taught(teacher, batch, mask_BT))
    assert cache.summary()["skipped"] > 0


def test_joined_rows_are_put_together_from_their_documents(
    teacher: Checkpoint, examples: list[Example], ctx: Context
) -> None:
    bos = teacher.tokenizer().convert_tokens_to_ids(BOS)
    assert all(e.ids[0] == bos for e in examples)
    cache = build_cache(teacher, examples, TopTokens(k=6), ctx)
    batch = collate([join(examples[3:6], bos_id=bos), examples[0]], pad_id=0)
    with pytest.raises(UserError, match="packed=True"):
        cache.lookup(batch)
    found = cache.lookup(batch, packed=True, bos_id=bos).targets[0]
    alone = cache.lookup(collate([*examples[3:6], examples[0]], pad_id=0)).targets[0]
    assert isinstance(found, TopK)
    assert isinstance(alone, TopK)
    # The same predictions in the same order: that after a BOS stands at the token before.
    assert torch.equal(found.logp_NK, alone.logp_NK)
    unknown = replace(examples[0], ids=(bos, 9, 9, 9, 9), target=(False, *[True] * 4))
    with pytest.raises(UserError, match="is not made of documents"):
        cache.lookup(
            collate([join([examples[1], unknown], bos_id=bos)], pad_id=0), packed=True, bos_id=bos
        )


def test_packing_takes_another_document_where_the_longest_leads_nowhere(
    teacher: Checkpoint, ctx: Context
) -> None:
    def example(*ids: int) -> Example:
        return Example(ids, (False, *[True] * (len(ids) - 1)), 0, str(ids))

    made = [example(5, 6), example(5, 6, 7), example(7, 8, 9)]
    cache = build_cache(teacher, made, TopTokens(k=6), ctx)
    batch = collate([join([made[0], made[2]], bos_id=None)], pad_id=0)
    alone = cache.lookup(collate([made[0], made[2]], pad_id=0)).targets[0]
    assert isinstance(alone, TopK)
    for bos_id in (None, 1):  # a tokenizer may have a BOS and not put it before texts
        found = cache.lookup(batch, packed=True, bos_id=bos_id).targets[0]
        assert isinstance(found, TopK)
        assert torch.equal(found.logp_NK, alone.logp_NK)


class Killed(Exception):
    """What a test ends a build with."""


def test_a_killed_build_resumes(
    teacher: Checkpoint, examples: list[Example], ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = TopTokens(k=4)
    whole = in_shards(teacher, examples, kind, ctx, shard_bytes=SMALL // 2)
    in_store = replace(ctx, stages=Runtime(ctx.work / "store").run)
    wrote: list[Path] = []

    def dying(folder: Path, *args: Any) -> Path:
        if len(wrote) == 3:
            flip(wrote[1])
            raise Killed
        wrote.append(write_shard(folder, *args))
        return wrote[-1]

    with monkeypatch.context() as patch:
        patch.setattr("excise.methods.distillation.teacher_cache.write_shard", dying)
        with pytest.raises(Killed):
            in_shards(teacher, examples, kind, in_store, shard_bytes=SMALL // 2)
    times = [path.stat().st_mtime_ns for path in wrote]
    cache = in_shards(teacher, examples, kind, in_store, shard_bytes=SMALL // 2)
    after = [(cache.folder / path.name).stat().st_mtime_ns for path in wrote]
    # What was damaged meanwhile is made again, the rest is not.
    assert [a == b for a, b in zip(times, after, strict=True)] == [True, False, True]
    shards = sorted(path.name for path in whole.folder.iterdir())
    assert sorted(p.name for p in cache.folder.iterdir() if p.suffix != ".json") == shards
    for name in shards:
        assert (cache.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert cache.summary() == whole.summary()


def test_processes_share_the_shards_out(
    teacher: Checkpoint, examples: list[Example], ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = CacheTeacher(teacher, tuple(examples), TopTokens(k=4), shard_bytes=SMALL)
    whole = ctx.run(stage)
    monkeypatch.setattr("excise.methods.distillation.teacher_cache.barrier", lambda ctx: None)
    both = ctx.child("both")
    for rank in (1, 0):
        before = set(both.work.iterdir())
        stage.make(replace(both, rank=rank, world=2))
        assert {int(p.name.split("-")[1]) % 2 for p in {*both.work.iterdir()} - before} == {rank}
    assert sorted((p.name, p.read_bytes()) for p in both.work.iterdir()) == sorted(
        (p.name, p.read_bytes()) for p in whole.iterdir()
    )


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def swap_type(path: Path) -> None:
    tensors = load_file(path)
    tensors["types"][0] = 1
    save_file(tensors, path)


def edit_index(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        index = file.metadata()["index"]
    save_file(load_file(path), path, {"index": index.replace('"stored": ', '"stored": 1')})


def lose(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, cut, swap_type, edit_index, lose])
def test_a_damaged_shard_is_never_used(
    damage: Callable[[Path], None], teacher: Checkpoint, examples: list[Example], ctx: Context
) -> None:
    kind, notes = HiddenStates(), list[str]()
    runs = [replace(ctx, stages=Runtime(ctx.work / "store").run) for _ in range(2)]
    cache = in_shards(teacher, examples, kind, runs[0])
    before = {path.name: path.read_bytes() for path in cache.folder.glob("shard-*")}
    damage(sorted(cache.folder.glob("shard-*"))[1])
    token = CHANNEL.set(lambda kind, data: notes.append(data["text"]) if kind == "note" else None)
    again = in_shards(teacher, examples, kind, runs[1])
    CHANNEL.reset(token)
    assert "is damaged (shard-00001-" in notes[0]
    assert notes[0].endswith("making it again")
    assert {path.name: path.read_bytes() for path in again.folder.glob("shard-*")} == before


def test_caches_differ_by_teacher_tokenizer_kind_and_documents(
    teacher: Checkpoint, examples: list[Example], ctx: Context, tmp_path: Path
) -> None:
    ctx = replace(ctx, stages=Runtime(tmp_path / "store").run)
    kind = TopTokens(k=4)
    cache = build_cache(teacher, examples, kind, ctx)
    times = {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()}
    same = build_cache(teacher, examples, kind, ctx)
    assert same.docs == cache.docs
    assert {path: path.stat().st_mtime_ns for path in same.folder.iterdir()} == times
    others: list[tuple[Checkpoint, list[Example], Any]] = [
        (make_teacher(tmp_path / "other", seed=1), examples, kind),
        (make_teacher(tmp_path / "swapped", words=WORDS[::-1]), examples, kind),
        (teacher, examples, TopTokens(k=5)),
        (teacher, examples, HiddenStates()),
        (teacher, examples[1:], kind),
    ]
    folders = {build_cache(*other, ctx).folder for other in others}
    assert len(folders | {cache.folder}) == 6


def test_a_cache_of_another_precision_is_not_used(
    teacher: Checkpoint, examples: list[Example], ctx: Context
) -> None:
    wide = build_cache(teacher, examples, HiddenStates(), ctx)
    half = build_cache(teacher, examples, HiddenStates(), replace(ctx, dtype=torch.bfloat16))
    assert wide.folder != half.folder


def test_a_cache_says_what_it_lacks(
    teacher: Checkpoint, examples: list[Example], ctx: Context
) -> None:
    kind = HiddenStates()
    asked = examples[0]
    part = replace(asked, target=tuple(i == 2 for i in range(len(asked.ids))))
    cache = build_cache(teacher, [part, examples[1]], kind, ctx)
    with pytest.raises(UserError, match=r"unit 'u5' \(\d+ tokens\) is not in the teacher cache"):
        cache.lookup(collate(examples[5:6], pad_id=0))
    with pytest.raises(UserError, match="unit 'u0' with fewer scored tokens"):
        cache.lookup(collate([asked], pad_id=0))
    more = build_cache(teacher, [part, *examples], kind, ctx)
    batch = collate(examples, pad_id=0)
    alike(learned(more, batch), taught(teacher, batch))


def test_equal_rows_with_other_targets_are_one_document(
    teacher: Checkpoint, examples: list[Example], ctx: Context
) -> None:
    one = examples[3]
    halves = [
        replace(one, target=tuple(i > 0 and i % 2 == odd for i in range(len(one.ids))))
        for odd in (0, 1)
    ]
    cache = build_cache(teacher, halves, HiddenStates(), ctx)
    assert len(cache.docs) == 1
    batch = collate([one, *halves], pad_id=0)
    alike(learned(cache, batch), taught(teacher, batch))


@pytest.mark.parametrize("kind", [HiddenStates(), TopTokens(k=3), SampledTokens(draws=3)])
def test_a_teacher_that_gives_nan_is_refused_with_the_row(
    kind: Any, examples: list[Example], ctx: Context, tmp_path: Path
) -> None:
    teacher = make_teacher(tmp_path / "nan", "llama")
    model = teacher.load()
    bad = examples[4].ids[2]
    unit = next(e.unit for e in examples if bad in e.ids[:-1])
    teacher = save_model(model, teacher.tokenizer(), tmp_path / "worse")
    m.tensors(lambda t: t["model.embed_tokens.weight"][bad].fill_(math.nan))(teacher.path)
    with pytest.raises(UserError, match=rf"gives NaN or infinity for unit '{unit}' after token"):
        in_shards(teacher, examples, kind, ctx, batch_tokens=1, shard_bytes=1)
    teacher = save_model(model, teacher.tokenizer(), tmp_path / "worst")
    m.tensors(lambda t: t["lm_head.weight"][3].fill_(math.inf))(teacher.path)
    with pytest.raises(UserError, match="in its head"):
        build_cache(teacher, examples, kind, ctx)


def test_students_of_other_vocabularies_are_refused(
    teacher: Checkpoint, examples: list[Example], ctx: Context, tmp_path: Path
) -> None:
    cache = build_cache(teacher, examples[:1], HiddenStates(), ctx)
    same_vocabulary(teacher, make_teacher(tmp_path / "same", seed=3))
    with pytest.raises(UserError, match="different tokenizers: id 4 is 'w0' and 'w26'"):
        same_vocabulary(teacher, make_teacher(tmp_path / "swapped", words=WORDS[::-1]))
    model = tiny_model("llama", vocab=V + 1, width=16, blocks=1)
    larger = save_model(model, word_tokenizer([*WORDS, "new"]), tmp_path / "larger")
    with pytest.raises(UserError, match="vocabularies of 31 and 32 tokens"):
        same_vocabulary(teacher, larger)
    found = cache.lookup(collate(examples[:1], pad_id=0))
    with pytest.raises(UserError, match="vocabulary of 31 tokens and the student one of 32"):
        chunked_splice(
            torch.zeros(len(found.kinds_N), 2), Head(torch.zeros(32, 2)), found.kinds_N,
            found.targets,
        )  # fmt: skip
