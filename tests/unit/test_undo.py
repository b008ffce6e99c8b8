"""UNDO: groups, stop rule, interruption, labels, corpora, costs, and what it refuses."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli import material as m
from tests.parity.test_distillation import toy_domain
from tests.parity.toy import WORDS, context, sentences, toy_checkpoint, weights
from torch import Tensor

from excise.cli.show import settings
from excise.core.config import ConfigError, parse
from excise.core.context import Context
from excise.core.errors import UserError
from excise.core.keys import identity
from excise.core.stages import LAYOUT, Runtime
from excise.data.domain import Domain
from excise.data.labels import LabelNoise
from excise.data.stream import collate, encode
from excise.losses import nll, predicting
from excise.methods import METHODS, Filtering, GradDiff, Plain, Undo
from excise.methods.base import ApplyMethod, Cost, Removal, completed
from excise.methods.distillation.cache_kinds import HiddenStates, TopTokens
from excise.methods.distillation.corpora import OnPolicy, RefusingSamples, TeacherSamples, mix_of
from excise.methods.distillation.harmful import Classifier, Implicit, TrueLabels
from excise.methods.distillation.perturb import (
    at_random,
    forget_saliency,
    largest,
    members,
    perturb,
)
from excise.methods.distillation.sampling import sample
from excise.methods.distillation.targets import (
    FromMixture,
    FromOracle,
    FromTeacher,
    HardLabels,
    Splice,
    TargetPiece,
)
from excise.methods.distillation.teachers import Reads, frozen, mean_prediction, unigram
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import tiny_model, word_tokenizer
from excise.recipes import recipe_named
from excise.requests.registry import registry
from excise.train.fit import FitConfig

FIT = FitConfig(steps=6, lr=1e-3, batch_size=8)
TEACHER = GradDiff(fit=FIT.model_copy(update={"steps": 2}), max_length=16)
UNDO = Undo(unlearn=TEACHER, fit=FIT, max_length=16)


def changed(**fields: Any) -> Undo:
    return Undo(**{**{n: getattr(UNDO, n) for n in ("unlearn", "fit", "max_length")}, **fields})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_groups_are_disjoint_and_their_noise_is_their_own(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path, "gpt2")
    model: Any = start.load()
    parts = {p: set(members(model, (p,))) for p in ("mlp", "attention", "embed", "norms")}
    assert sum(len(names) for names in parts.values()) == len(set().union(*parts.values()))
    assert set().union(*parts.values()) == set(members(model, ("all",)))
    whole: Any = start.load()
    perturb(whole, alpha=0.5, beta=0.1, ctx=context(tmp_path / "a"))
    perturb(model, alpha=0.5, beta=0.1, ctx=context(tmp_path / "b"), groups=("mlp",))
    old, mlp, every = (dict(m.named_parameters()) for m in (start.load(), model, whole))
    for name in old:
        expected = every if name in parts["mlp"] else old
        assert torch.equal(mlp[name], expected[name]), name


def test_only_the_weights_that_forget_rows_lean_on_are_perturbed(tmp_path: Path) -> None:
    start, ctx, domain = toy_checkpoint(tmp_path), context(tmp_path / "w"), toy_domain()
    model: Any = start.load()
    names = members(model, ("mlp",))
    rows = [row for rows in domain.forget.values() for row in rows]
    scores = forget_saliency(model, rows, start.tokenizer(), names, max_length=16, ctx=ctx)
    by_hand = {name: torch.zeros_like(value) for name, value in scores.items()}
    for row in rows:
        model.zero_grad()
        batch = collate(encode([row], start.tokenizer(), max_length=16), pad_id=0)
        value, count = nll(model(**batch.inputs).logits, batch)
        (value / count).backward()
        for name in by_hand:
            p = model.get_parameter(name)
            by_hand[name] += (p * p.grad).abs().detach() / len(rows)
    for name, value in scores.items():
        torch.testing.assert_close(value, by_hand[name], rtol=1e-4, atol=1e-9)

    masks = largest(scores, 0.1)
    chosen = torch.cat([scores[n][m] for n, m in masks.items()])
    rest = torch.cat([scores[n][~m] for n, m in masks.items()])
    assert chosen.min() >= rest.max()
    assert len(chosen) == round(0.1 * (len(chosen) + len(rest)))
    others = at_random(model, names, 0.1, ctx)
    assert sum(int(m.sum()) for m in others.values()) == len(chosen)
    assert any(not torch.equal(others[n], masks[n]) for n in masks)

    old = dict(start.load().named_parameters())
    done = perturb(model, alpha=1.0, beta=1.0, ctx=ctx, groups=("mlp",), masks=masks)
    assert set(done) == set(masks)
    for name, value in model.named_parameters():
        moved = value != old[name]
        assert not (moved & ~masks.get(name, torch.zeros_like(moved))).any(), name
        assert moved.any() == (name in masks and masks[name].any()), name
    for kind in ("forget_snip", "random"):
        made = changed(weights=kind, share=0.1, groups=("mlp",)).apply(
            start, domain, context(tmp_path / kind)
        )
        assert made.extras["perturbed_tensors"] == len(masks)


def test_other_seeds_and_rounds_give_other_noise(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    drawn = []
    for seed, purpose in ((0, "perturb/0"), (1, "perturb/0"), (0, "perturb/1")):
        model: Any = start.load()
        ctx = context(tmp_path / "w", seed)
        perturb(model, alpha=1.0, beta=1.0, ctx=ctx, purpose=purpose)
        drawn.append(model.get_parameter("lm_head.weight").detach())
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    bound = (6 / sum(drawn[0].shape)) ** 0.5
    assert 0.95 * bound < float(drawn[0].abs().max()) <= bound


def test_alpha_one_leaves_nothing_of_the_teacher(tmp_path: Path) -> None:
    models = []
    for name in ("one", "two"):
        model: Any = toy_checkpoint(tmp_path / name).load()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.0 if name == "one" else 3.0)
        perturb(model, alpha=1.0, beta=1.0, ctx=context(tmp_path / "w"))
        models.append({n: p.detach() for n, p in model.named_parameters()})
    assert same(*models)


@pytest.mark.parametrize(
    "fields",
    [
        {"stop_tolerance": 1e-9, "stop_every": 2},
        {"repeats": 2, "targets": Splice(harmful="shuffled")},
        {"corpus": OnPolicy(new_tokens=3)},
        {"corpus": TeacherSamples(rows=24, new_tokens=3)},
    ],
    ids=["stop-rule", "rounds", "on-policy", "samples"],
)
def test_killed_anywhere_it_ends_with_the_same_weights(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    start, domain, method = toy_checkpoint(tmp_path), toy_domain(), changed(**fields)
    whole = method.apply(start, domain, context(tmp_path / "whole"))
    work = context(tmp_path / "killed")
    for last in (2, 5, 3, 4):
        told = 0

        def die(kind: str, data: Mapping[str, Any], last: int = last) -> None:
            nonlocal told
            told += 1
            if told >= last:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            method.apply(start, domain, replace(work, emit=die))
    torch.manual_seed(7)
    again = method.apply(start, domain, work)
    assert same(weights(whole.checkpoint), weights(again.checkpoint))
    assert again.extras["stop"]["steps"] == whole.extras["stop"]["steps"]
    assert again.extras["cost"]["teacher_tokens"] == whole.extras["cost"]["teacher_tokens"]


@pytest.mark.parametrize(("method", "ages"), [(TEACHER, 3), (UNDO, 2 + 3)])
def test_the_cost_of_a_killed_method_counts_the_steps_before_the_kill(
    method: GradDiff | Undo, ages: int, tmp_path: Path
) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    fit = FIT.model_copy(update={"save_every": 1, "log_every": 1})
    method, work = method.model_copy(update={"fit": fit}), context(tmp_path / "killed")

    def die(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step" and data["step"] == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:  # a clock by which a step takes an age
        patch.setattr(time, "perf_counter", itertools.count(step=10**6).__next__)
        with pytest.raises(KeyboardInterrupt):
            method.apply(start, domain, replace(work, emit=die))
    assert method.apply(start, domain, work).cost.seconds >= ages * 10**6


def test_the_rule_stops_at_the_first_check_that_is_near_enough(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    free = changed(stop_tolerance=0.0, stop_every=2).apply(start, domain, context(tmp_path / "0"))
    stop = free.extras["stop"]
    assert (stop["steps"], stop["met"], stop["metric"]) == (6, False, "text_loss")
    found = [check["retain"] for check in stop["checks"]]
    assert [check["step"] for check in stop["checks"]] == [2, 4]
    between = (min(found[0], found[1]) + max(found)) / 2 / stop["retain_teacher"] - 1
    nearer = 2 if found[0] < found[1] else 4
    method = changed(stop_tolerance=between, stop_every=2)
    made = method.apply(start, domain, context(tmp_path / "1"))
    assert made.extras["stop"]["met"]
    assert made.extras["stop"]["steps"] == made.cost.steps - 2 == nearer
    assert made.extras["stop"]["checks"][-1]["retain"] == found[nearer // 2 - 1]


def test_noise_alone_is_a_student_without_steps(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    method = changed(fit=FitConfig(steps=0), student="original", alpha=0.5)
    made = method.apply(start, domain, context(tmp_path / "w"))
    model: Any = start.load()
    perturb(model, alpha=0.5, beta=0.1, ctx=context(tmp_path / "w"), purpose="perturb/0")
    named = {name: p.detach() for name, p in model.named_parameters()}
    assert same(weights(made.checkpoint), named)
    assert made.extras["retain_per_million_tokens"] is None


def test_costs_count_every_forward_of_every_teacher(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    weight = {"unlearned": 1.0, "original": 1.0}
    method = changed(targets=FromMixture(weights=weight), pretrain_tokens=10_000)
    made = method.apply(start, domain, context(tmp_path / "w"))
    teacher = TEACHER.apply(start, domain, context(tmp_path / "t"))
    cost, size = made.extras["cost"], start.num_parameters
    assert cost["teacher_tokens"] == 2 * cost["student_tokens"] > 0
    flops = size * (6 + 2 * 2) * cost["student_tokens"] + teacher.cost.flops
    assert made.cost.flops == pytest.approx(flops)
    assert cost["share_of_pretraining"] == pytest.approx(flops / (6 * size * 10_000))
    assert made.cost.tokens == 3 * cost["student_tokens"] + teacher.cost.tokens
    spliced = changed(targets=Splice()).apply(start, domain, context(tmp_path / "s"))
    harmless = spliced.extras["cost"]
    assert 0 < harmless["teacher_tokens"] < harmless["student_tokens"]


def test_teachers_are_made_once_for_all_students(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    runtime = Runtime(tmp_path / "store")
    for alpha in (0.2, 0.4):
        runtime.run(ApplyMethod(changed(alpha=alpha), start, domain, 3))
    made = sorted(path.name.split("-")[0] for path in (tmp_path / "store" / LAYOUT).iterdir())
    assert made.count("grad_diff") == 1
    assert made.count("undo") == 2
    alone = changed(alpha=0.2).apply(start, domain, Context(work=_new(tmp_path / "a"), seed=3))
    staged = runtime.run(ApplyMethod(changed(alpha=0.2), start, domain, 3))
    assert staged.extras["cost"]["share_of_pretraining"] is None
    schedule = Pretrain(fit=FIT, max_length=16)
    base = runtime.run(ApplyMethod(Plain(pretrain=schedule), start, domain, 3))
    method = completed(changed(alpha=0.2), {"pretrain_tokens": base.cost.tokens})
    told = runtime.run(ApplyMethod(method, base.checkpoint, domain, 3))
    share = told.cost.flops / base.cost.flops
    assert told.extras["cost"]["share_of_pretraining"] == pytest.approx(share)
    assert staged.checkpoint.fingerprint == alone.checkpoint.fingerprint
    asked = changed(student="original", targets=HardLabels())
    assert asked.needed_makers() == {}


def test_a_model_named_by_its_folder_counts_by_its_bytes(tmp_path: Path) -> None:
    one = toy_checkpoint(tmp_path / "one")
    shutil.copytree(one.path, tmp_path / "two")
    other = toy_checkpoint(tmp_path / "three", "gpt2")
    folders = (one.path, tmp_path / "two", other.path)
    keys = [identity(changed(targets=FromOracle(path=str(path)))) for path in folders]
    assert keys[0] == keys[1] != keys[2]
    keys = [identity(changed(student=str(path))) for path in folders]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    "targets",
    [FromTeacher(), Splice(harmful="unlearned"), Splice(harmful="shuffled"), Splice()],
    ids=["teacher", "spliced", "shuffled", "uniform"],
)
def test_cached_teachers_give_the_same_student(targets: Any, tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    fields = {"targets": targets, "pack": (1, 2)}
    plain = changed(**{**fields, "pack": (1,)}).apply(start, domain, context(tmp_path / "plain"))
    kept = changed(**{**fields, "pack": (1,)}, cache=HiddenStates())
    made = kept.apply(start, domain, context(tmp_path / "kept"))
    one, two = weights(plain.checkpoint), weights(made.checkpoint)
    assert max(float((one[n] - two[n]).abs().max()) for n in one) < 5e-6
    caches = made.extras["corpus"]["caches"]
    assert set(caches) == ({targets.benign} if hasattr(targets, "benign") else set()) | (
        {"unlearned"} if getattr(targets, "harmful", "unlearned") == "unlearned" else set()
    )
    tokens = made.extras["corpus"]["tokens"]
    assert made.extras["cost"]["corpus_tokens"] == len(caches) * tokens
    packed = changed(**fields, cache=TopTokens(k=8)).apply(start, domain, context(tmp_path / "3"))
    assert packed.extras["corpus"]["caches"].keys() == caches.keys()


def test_students_share_a_cache_and_a_killed_one_goes_on(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    runtime = Runtime(tmp_path / "store")
    for alpha in (0.2, 0.4):
        method = changed(alpha=alpha, cache=HiddenStates())
        made = runtime.run(ApplyMethod(method, start, domain, 3))
    assert len(list((tmp_path / "store" / LAYOUT).glob("teacher-cache-hidden-*"))) == 1
    ctx = replace(context(tmp_path / "w", 3))
    told = 0

    def die(kind: str, data: Mapping[str, Any]) -> None:
        nonlocal told
        told += 1
        if told > 5:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        method.apply(start, domain, replace(ctx, emit=die))
    again = method.apply(start, domain, ctx)
    assert again.checkpoint.fingerprint == made.checkpoint.fingerprint


def _new(path: Path) -> Path:
    path.mkdir()
    return path


def test_shuffling_deals_out_the_teachers_own_predictions(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    tokenizer = start.tokenizer()
    model: Any = start.load()
    teacher = frozen("unlearned", model, len(tokenizer))
    batch = collate(encode(mix_of(domain), tokenizer, max_length=16), pad_id=0)
    wanted = predicting(batch.target_BT)
    harmful = wanted & (batch.label_BT > 0)
    reads = Reads({"unlearned": teacher}, {}, batch, wanted)
    torch.manual_seed(0)
    dealt: Any = reads.target(TargetPiece(harmful, "shuffled", {"unlearned": 1.0}))
    own = reads.hidden("unlearned", harmful)
    at = harmful[wanted]
    assert not torch.equal(dealt.hidden_ND[at], own[at])
    assert torch.equal(dealt.hidden_ND[at].sort(0).values, own[at].sort(0).values)
    assert reads.tokens == int(batch.attention_BT[harmful.any(1)].sum())


def test_fixed_distributions_are_what_they_say(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    tokenizer = start.tokenizer()
    rows = encode(sentences("f", 5, seed=1), tokenizer, max_length=16)
    words = [i for e in rows for i in e.ids[1:]]
    assert float(unigram(rows, 44)[words[0]]) == pytest.approx(
        (words.count(words[0]) + 1) / (len(words) + 44)
    )
    model: Any = start.load()
    batch = collate(rows, pad_id=0)
    with torch.no_grad():
        said = model(**batch.inputs).logits.softmax(-1)[predicting(batch.target_BT)]
    teacher = frozen("t", model, 44)
    found = mean_prediction(teacher, rows, 0, torch.device("cpu"))
    torch.testing.assert_close(found, said.mean(0), rtol=1e-5, atol=1e-8)


def test_implicit_labels_are_where_the_teacher_moved(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    other = TEACHER.model_copy(update={"fit": FIT.model_copy(update={"lr": 3e-2})})
    moved = other.apply(start, domain, context(tmp_path / "t")).checkpoint
    batch = collate(encode(mix_of(domain), start.tokenizer(), max_length=16), pad_id=0)
    wanted = predicting(batch.target_BT)
    models: dict[str, Any] = {"unlearned": moved.load(), "original": start.load()}
    teachers = {name: frozen(name, model, 44) for name, model in models.items()}
    with torch.no_grad():
        u, b = (m(**batch.inputs).logits.log_softmax(-1) for m in models.values())
    kl = (u.exp() * (u - b)).sum(-1)
    tau = float(kl[wanted].median())
    found = Reads(teachers, {}, batch, wanted).moved("unlearned", "original", tau)
    assert torch.equal(found, wanted & (kl > tau))
    method = changed(targets=Splice(harmful="skip", by=Implicit(tau=1e9)), unlearn=other)
    plain = changed(targets=Splice(harmful="unlearned", by=Implicit(tau=1e9)), unlearn=other)
    one = method.apply(start, domain, context(tmp_path / "1")).checkpoint
    two = plain.apply(start, domain, context(tmp_path / "2")).checkpoint
    assert same(weights(one), weights(two))


def facts_domain() -> Domain:
    """Rows that a probe can tell apart: forget rows use words of their own."""
    domain = toy_domain()
    half = [w for w in WORDS if int(w[1:]) < 20]

    def words(rows: Any, odd: bool) -> Any:
        pick = {w: half[i % 20] if odd else f"w{20 + i % 20}" for i, w in enumerate(WORDS)}
        told = (replace(r, text=" ".join(pick[w] for w in r.text.split())) for r in rows)
        return tuple(told)

    forget, retain = words(domain.forget["a"], True), words(domain.retain, False)
    mix = tuple(replace(row, label=-1) for row in (*forget, *retain))
    return replace(domain, forget={"a": forget}, retain=retain, unlabeled=mix)


@pytest.mark.parametrize("per", ["row", "token"])
def test_a_classifier_of_few_labels_finds_what_differs(per: Any, tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), facts_domain()
    method = changed(targets=Splice(by=Classifier(labels=20, per=per)))
    made = method.apply(start, domain, context(tmp_path / "w"))
    labels = made.extras["corpus"]["labels"]
    assert labels["recall"] > 0.8
    assert labels["false_alarms"] < 0.2
    assert made.extras["cost"]["corpus_tokens"] > 0


def test_labels_may_be_wrong(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    noise = TrueLabels(noise=LabelNoise(missed_units=0.5, false_alarms=0.25))
    made = changed(targets=HardLabels(by=noise)).apply(start, domain, context(tmp_path / "w"))
    labels = made.extras["corpus"]["labels"]
    assert 0.3 < labels["recall"] < 0.7
    assert 0.1 < labels["false_alarms"] < 0.4


def test_a_draw_depends_on_its_seed_alone(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    model: Any = start.load()
    prompts = [(1, 5), (1, 6, 7), (1, 5)]
    whole = sample(model, start.tokenizer(), prompts, [3, 4, 5], new_tokens=4)
    alone = sample(model, start.tokenizer(), prompts[:1], [3], new_tokens=4)
    assert whole[0] == alone[0] != whole[2]
    greedy = sample(model, start.tokenizer(), prompts[:1], [3], new_tokens=4, temperature=0.0)
    ids = list(prompts[0])
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    new = ids[2:]
    assert greedy[0] == tuple(new[: new.index(2) + 1] if 2 in new else new)


def test_a_refusing_model_refuses_and_its_depth_is_told(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    corpus = RefusingSamples(
        rows=30, new_tokens=4, refusal="w39 w38", prompt_tokens=2,
        fit=FitConfig(steps=40, lr=1e-2, batch_size=12),
    )  # fmt: skip
    made = changed(corpus=corpus).apply(start, domain, context(tmp_path / "w"))
    refusal = made.extras["corpus"]["refusal"]
    assert refusal["rate"] > 0.8
    assert refusal["rate_harmful"] > 0.5 > refusal["rate_benign"]
    assert refusal["rate_by_depth"][0] == refusal["rate"]
    assert 0 <= refusal["depth_tokens"] < len(refusal["rate_by_depth"])
    again = changed(corpus=corpus).apply(start, domain, context(tmp_path / "w"))
    assert again.extras["corpus"] == made.extras["corpus"]
    assert again.cost.flops == made.cost.flops
    with pytest.raises(UserError, match=r"corpus\.refusal: the tokenizer cannot write"):
        changed(corpus=RefusingSamples(refusal="I won't")).apply(
            start, domain, context(tmp_path / "x")
        )


def test_what_cannot_be_distilled_is_refused(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    with pytest.raises(UserError, match=r"holds .* tokens, less than one sequence of 512"):
        changed(max_length=512).apply(start, domain, context(tmp_path / "1"))
    other = word_tokenizer([*WORDS, "more"])
    folder = save_model(tiny_model("llama", vocab=45, width=32), other, tmp_path / "other").path
    with pytest.raises(UserError, match="have vocabularies of 45 and 44 tokens; take"):
        changed(targets=FromOracle(path=str(folder))).apply(start, domain, context(tmp_path / "2"))
    wide = tiny_model("llama", vocab=44, width=48, blocks=3)
    shape = save_model(wide, start.tokenizer(), tmp_path / "wide").path
    with pytest.raises(UserError, match="is no model of the original's shape"):
        changed(student=str(shape)).apply(start, domain, context(tmp_path / "3"))
    with pytest.raises(UserError, match="'nowhere' is neither a teacher"):
        changed(student="nowhere").apply(start, domain, context(tmp_path / "4"))
    with pytest.raises(UserError, match=r"alpha is 2; a share of the weights to replace lies in"):
        perturb(start.load(), alpha=2.0, beta=0.1, ctx=context(tmp_path / "5"))
    with pytest.raises(UserError, match="stop_tolerance needs rows of dev_retain"):
        changed(stop_tolerance=0.1).apply(
            start, replace(domain, dev_retain=()), context(tmp_path / "6")
        )


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("model.layers.1.mlp.down_proj.weight", float("nan")),
        ("lm_head.weight", float("nan")),
        ("lm_head.weight", 1e38),
    ],
)
def test_a_teacher_that_emits_nan_is_refused(where: str, value: float, tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    folder = save_model(start.load(), start.tokenizer(), tmp_path / "broken").path
    m.tensors(lambda t: t[where].copy_(value * torch.randn_like(t[where]).sign()))(folder)
    made = Removal(Checkpoint(folder), (where,), Cost())
    ctx = context(tmp_path / "w")
    with pytest.raises(UserError, match="teacher 'unlearned' emits NaN or infinity in float32"):
        UNDO.distil(start, domain, ctx, {"unlearned": made})
    assert not (ctx.work / "state").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"alpha": 1.5}, "alpha: must be 1 or less, not 1.5"),
        ({"alpha": -0.1}, "alpha: must be 0 or more, not -0.1"),
        ({"alpha": 1, "beta": 0}, "beta: with alpha 1 it leaves weights of 0"),
        ({"unlearn": {"name": "filtering"}}, "unlearn: 'filtering' trains from scratch"),
        ({"also": {"original": {"name": "rmu"}}}, "also: 'unlearned' and 'original' are taken"),
        ({"cache": {"name": "hidden"}, "corpus": {"name": "on_policy"}}, "cache: holds the scored"),
        ({"targets": {"name": "splic"}}, "targets.name: unknown choice 'splic'; did you mean"),
        ({"corpus": {"rows": 1}}, "corpus.rows: unknown field; known: name"),
        ({"corpus": {"name": 3}}, "corpus.name: is required; known: mix, on_policy"),
        ({"targets": {"name": "splice", "by": {"name": "classifier", "labels": 1}}},
         "targets.by.labels: must be 2 or more, not 1"),
        ({"targets": {"name": "mixture", "weights": {"original": 0}}}, "targets.weights: name at"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told_before_anything_runs(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Undo, {"name": "undo", **fields}, registry())
    assert said in str(caught.value)


def test_settings_survive_being_written_and_read() -> None:
    method = Undo(
        unlearn=TEACHER,
        also={"other": GradDiff()},
        targets=Splice(harmful="skip", by=Classifier(labels=10)),
        corpus=TeacherSamples(rows=5),
    )
    assert parse(Undo, method.model_dump(mode="json"), registry()) == method
    with pytest.raises(ValueError, match="trains from scratch"):
        Undo(unlearn=Filtering())


def test_show_lists_every_choice() -> None:
    text = settings(Undo)
    for said in (
        "--targets.name = 'teacher'",
        "    splice: One prediction where a token is benign",
        "      --targets.harmful = 'uniform'",
        "      --targets.path = required",
        "--cache.name = None",
        "--fit.steps = 1000",
    ):
        assert said in text


def test_show_says_what_is_required() -> None:
    texts = {name: settings(cls) for name, cls in METHODS.items()}
    assert not [name for name, text in texts.items() if "Undefined" in text]
    assert "    --pretrain.fit = required" in texts["relabel"]


@pytest.mark.parametrize("name", ["undo-arithmetic", "undo-languages"])
def test_students_of_a_recipe_share_teacher_and_schedule(name: str) -> None:
    recipe = recipe_named(name)
    students = {n: m for n, m in recipe.arms.items() if isinstance(m, Undo)}
    teacher = recipe.arms["unlearn_only"]
    assert all(student.unlearn == teacher for student in students.values())
    assert {m.fit.lr for m in students.values()} == {students["undo_06"].fit.lr}
    assert [students[f"undo_{a}"].alpha for a in ("03", "06", "08", "1")] == [0.3, 0.6, 0.8, 1.0]
    assert students["no_teacher"].targets == HardLabels(harmful="keep")
    assert recipe.oracles >= 1
