"""Task vectors, directions, refusal training, checkpoint transfer: against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from excise.core.errors import UserError
from excise.data.domain import Domain, Row, Rows
from excise.data.stream import Batch, collate, encode
from excise.evals.refusal import refuses
from excise.methods import CheckpointTransfer, Direction, Refusal, TaskVector
from excise.methods.posthoc.answers import REFUSALS, with_answer
from excise.methods.posthoc.direction import Write, writers
from excise.methods.tuning import examples_read, role_batches, stream
from excise.models.anatomy import anatomy
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.lora import LoRA
from excise.models.tiny import CHAT_TEMPLATE
from excise.testing import toy_start
from excise.train.fit import FitConfig
from tests.parity.toy import WORDS, context, toy_checkpoint, toy_domain, weights

FIT = FitConfig(steps=6, lr=1e-3, batch_size=4)


def plain_nll(model: Any, batch: Batch) -> Tensor:
    """Mean loss over scored tokens, by cross-entropy on shifted labels."""
    logits = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT.long()).logits[:, :-1]
    labels = batch.ids_BT[:, 1:].masked_fill(~batch.target_BT[:, 1:], -100)
    loss: Tensor = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return loss


def plain_loop(
    model: Any, read: Callable[[int], Any], loss: Callable[[Any], Tensor], fit: FitConfig = FIT
) -> None:
    """Run the yardstick: torch's AdamW, nothing else."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=fit.lr, weight_decay=0.0)
    for step in range(fit.steps):
        optimizer.zero_grad()
        loss(read(step)[0]).backward()
        optimizer.step()


def assert_same(ours: Checkpoint, theirs: Any, atol: float = 5e-6) -> None:
    for name, tensor in weights(ours).items():
        wanted = dict(theirs.named_parameters())[name].detach()
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=atol)


# Task vectors.


def fine_tuned(start: Checkpoint, domain: Domain, folder: Path) -> Any:
    model = start.load()
    read = role_batches(
        domain, ("forget",), start.tokenizer(), FIT, context(folder), max_length=512
    )
    plain_loop(model, read, lambda micro: plain_nll(model, micro["forget"]))
    return model


def test_a_task_vector_is_the_start_minus_what_learning_added(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    removal = TaskVector(fit=FIT, scale=2.0).apply(start, domain, context(tmp_path / "ours"))
    theirs = fine_tuned(start, domain, tmp_path / "plain")
    before = weights(start)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(before[name] - 2.0 * (parameter - before[name]))
    assert_same(removal.checkpoint, theirs, atol=2e-5)
    assert set(removal.changed) == set(before)
    # The other sign is the model that learned it, four times as far away.
    added = fine_tuned(start, domain, tmp_path / "added")
    name = "model.embed_tokens.weight"
    moved = (dict(added.named_parameters())[name] - before[name]).abs().max()
    off = (dict(added.named_parameters())[name] - weights(removal.checkpoint)[name]).abs().max()
    assert off > 2.9 * moved > 0


def test_a_negated_adapter_is_minus_the_adapter_that_learned(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    lora = LoRA(rank=2, output="adapter")
    one = TaskVector(fit=FIT, scale=1.0, lora=lora)
    two = TaskVector(fit=FIT, scale=2.0, lora=lora)
    removals = [m.apply(start, domain, context(tmp_path / f"{m.scale}")) for m in (one, two)]
    before = weights(start)
    for name in removals[0].changed:
        ones, twos = (weights(r.checkpoint)[name] - before[name] for r in removals)
        torch.testing.assert_close(2 * ones, twos, rtol=1e-4, atol=1e-7)
    # What lies beside the model is the adapter that makes it.
    from excise.models.delta import export_adapter

    again = export_adapter(tmp_path / "2.0" / "adapter", start, tmp_path / "again")
    assert_same(again, removals[1].checkpoint.load(), atol=1e-6)
    assert "merge_rounding" in removals[0].extras["lora"]


def test_subtracting_makes_forget_text_less_likely(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    removal = TaskVector(fit=FIT, scale=3.0).apply(start, domain, context(tmp_path / "ours"))
    batch = collate(
        encode(domain.forget["a"], start.tokenizer(), max_length=64),
        pad_id=start.tokenizer().pad_token_id,
    )
    assert plain_nll(removal.checkpoint.load(), batch) > plain_nll(start.load(), batch)


# Directions.


def plain_direction(model: Any, domain: Domain, tokenizer: Any, layer: int) -> Tensor:
    """Difference of mean residual streams over scored positions, row by row."""

    def mean(rows: Rows) -> Tensor:
        kept = []
        for example in encode(rows, tokenizer, max_length=512):
            hidden = model(
                input_ids=torch.tensor([example.ids]), output_hidden_states=True
            ).hidden_states[layer + 1][0]
            kept += [hidden[t] for t in range(1, len(example.ids) - 1) if example.target[t + 1]]
        return torch.stack(kept).double().mean(0)

    with torch.no_grad():
        difference = mean(domain.forget["a"]) - mean(domain.retain)
    unit: Tensor = (difference / difference.norm()).float()
    return unit


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_direction_is_taken_out_of_all_that_writes(family: str, tmp_path: Path) -> None:
    start, domain = toy_start(tmp_path / "start", family), toy_domain()
    removal = Direction(layer=1).apply(start, domain, context(tmp_path / "ours"))
    r = plain_direction(start.load(), domain, start.tokenizer(), 1)
    eye = torch.eye(len(r)) - torch.outer(r, r)
    theirs = start.load()
    ends = {
        "llama": ("o_proj.weight", "down_proj.weight"),
        "gpt2": ("c_proj.weight", "c_proj.bias"),
        "gpt_neox": ("dense.weight", "dense.bias", "4h_to_h.weight", "4h_to_h.bias"),
    }[family]
    moved = set()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(
                ("embed_tokens.weight", "wte.weight", "wpe.weight", "embed_in.weight")
            ):
                parameter.copy_(parameter @ eye)
            elif name.endswith(ends):
                conv = family == "gpt2" and parameter.dim() == 2
                parameter.copy_(parameter @ eye if conv else eye @ parameter)
            else:
                continue
            moved.add(name)
    before = weights(start)
    moved -= {n for n in moved if not bool(before[n].any())}  # biases that are zero stay so
    assert set(removal.changed) == moved
    assert_same(removal.checkpoint, theirs, atol=1e-6)
    assert removal.extras["left"] < 1e-5


def test_another_direction_gives_other_weights(tmp_path: Path) -> None:
    start, domain = toy_start(tmp_path / "start"), toy_domain()
    one = Direction(layer=1).apply(start, domain, context(tmp_path / "one"))
    other = Direction(layer=1, tokens="all").apply(start, domain, context(tmp_path / "other"))
    name = "model.layers.0.mlp.down_proj.weight"
    apart = (weights(one.checkpoint)[name] - weights(other.checkpoint)[name]).abs().max()
    assert apart > 1e-4


def test_the_embedding_is_left_alone_on_demand(tmp_path: Path) -> None:
    start, name = toy_checkpoint(tmp_path), "model.embed_tokens.weight"
    whole = Direction(layer=1).apply(start, toy_domain(), context(tmp_path / "whole"))
    spared = Direction(layer=1, embedding=False)
    removal = spared.apply(start, toy_domain(), context(tmp_path / "spared"))
    assert set(whole.changed) - set(removal.changed) == {name}


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_norms_before_the_stream_are_reckoned_with(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = toy_start(tmp_path / "plain", family)
    model = start.load()
    with torch.no_grad():  # the norms of a new model multiply every entry alike
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.add_(torch.linspace(-0.5, 0.5, len(parameter)))
    start = save_model(model, start.tokenizer(), tmp_path / "start")
    removal = Direction(layer=1).apply(start, toy_domain(), context(tmp_path / "ours"))
    assert removal.extras["left"] < 1e-5

    def as_released(model: Any, parts: Any, *, embedding: bool = True) -> tuple[Write, ...]:
        return tuple(
            replace(write, norm="") for write in writers(model, parts, embedding=embedding)
        )

    monkeypatch.setattr("excise.methods.posthoc.direction.writers", as_released)
    with pytest.raises(UserError, match="other parts that write to it"):
        Direction(layer=1).apply(start, toy_domain(), context(tmp_path / "released"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_block_is_chosen_by_what_the_edited_model_does(family: str, tmp_path: Path) -> None:
    start = toy_start(tmp_path / "start", family)
    domain = toy_domain()
    model = start.load()
    assert anatomy(model).tied == (family in ("gpt2", "gemma2"))
    found = Direction().apply(start, domain, context(tmp_path / "chosen")).extras
    (candidate,) = found["candidates"]  # the first of three blocks: the last fifth is left out
    assert found["layer"] == candidate["layer"] == 0
    edited = Direction(layer=0).apply(start, domain, context(tmp_path / "edited")).checkpoint.load()
    tokenizer = start.tokenizer()
    dev = [
        collate(encode(rows, tokenizer, max_length=64), pad_id=tokenizer.pad_token_id)
        for rows in (domain.dev_forget["a"], domain.dev_retain)
    ]
    with torch.no_grad():
        assert float(plain_nll(edited, dev[0])) == pytest.approx(candidate["forget"], abs=1e-5)
        logp, logq = (m(**dev[1].inputs).logits.log_softmax(-1) for m in (model, edited))
    kl = (logp.exp() * (logp - logq)).sum(-1)[:, :-1][dev[1].target_BT[:, 1:]].mean()
    assert candidate["kl"] == pytest.approx(float(kl), abs=1e-6)


def test_bad_input_of_a_direction_is_one_sentence(tmp_path: Path) -> None:
    start, domain = toy_start(tmp_path / "start"), toy_domain()
    ctx = context(tmp_path / "run")
    with pytest.raises(UserError, match="beyond this model of 3 blocks"):
        Direction(layer=3).apply(start, domain, ctx)
    with pytest.raises(UserError, match="no dev rows to choose a block on; set 'layer'"):
        Direction().apply(start, replace(domain, dev_retain=()), ctx)
    with pytest.raises(UserError, match="raise max_kl, or set 'layer'"):
        Direction(max_kl=1e-12).apply(start, domain, ctx)
    with pytest.raises(UserError, match="the same mean after block 1"):
        Direction(layer=1).apply(start, replace(domain, retain=domain.forget["a"]), ctx)
    with pytest.raises(ValidationError, match="nothing is trained; leave it out"):
        Direction.model_validate({"lora": {"rank": 2}})


# Refusal training.


def asking(prefix: str, count: int) -> Rows:
    words = iter(WORDS * count)
    return tuple(
        Row(f"{prefix}{i}", prompt=f"{next(words)} {next(words)}", completion=f" {next(words)}")
        for i in range(count)
    )


def test_refusal_training_equals_a_plain_loop(tmp_path: Path) -> None:
    start = toy_checkpoint(tmp_path)
    domain = replace(toy_domain(), forget={"a": asking("f", 5)}, retain=asking("r", 7))
    own = tmp_path / "own.txt"
    own.write_text("w1 w2 w3\n\nw4\n")
    method = Refusal(fit=FIT, alpha=0.5, sentences=str(own))
    removal = method.apply(start, domain, context(tmp_path / "ours"))
    ctx = context(tmp_path / "plain")
    texts = ("w1 w2 w3", "w4")
    drawn = torch.randint(2, (5,), generator=ctx.generator("refusals")).tolist()
    assert set(drawn) == {0, 1}
    declined = tuple(
        replace(row, completion=f" {texts[i]}")
        for row, i in zip(domain.forget["a"], drawn, strict=True)
    )
    model = start.load()
    read = role_batches(
        replace(domain, forget={"a": declined}), ("forget", "retain"), start.tokenizer(), FIT, ctx,
        max_length=512,
    )  # fmt: skip
    plain_loop(
        model,
        read,
        lambda micro: plain_nll(model, micro["forget"]) + 0.5 * plain_nll(model, micro["retain"]),
    )
    assert_same(removal.checkpoint, model)
    # Training on the answers themselves is another thing.
    name = "model.embed_tokens.weight"
    model = start.load()
    read = role_batches(
        domain, ("forget", "retain"), start.tokenizer(), FIT, context(tmp_path / "sft"),
        max_length=512,
    )  # fmt: skip
    plain_loop(
        model,
        read,
        lambda micro: plain_nll(model, micro["forget"]) + 0.5 * plain_nll(model, micro["retain"]),
    )
    ours, theirs = weights(removal.checkpoint)[name], dict(model.named_parameters())[name]
    assert (ours - theirs).abs().max() > 1e-4


def test_every_shipped_refusal_is_recognised_as_one() -> None:
    assert len(set(REFUSALS)) == len(REFUSALS) >= 30
    assert [text for text in REFUSALS if not refuses(text)] == []


def test_every_kind_of_prompt_is_declined() -> None:
    known = with_answer(Row("u", prompt="who?", completion="\nme"), "no", "refusal")
    assert (known.prompt, known.completion) == ("who?", "\nno")
    asked = Row("u", prompt="who?", choices=("you", "me"), answer=1)
    assert with_answer(asked, "no", "refusal").choices == ("you", "no")
    turns = (("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d"))
    chat = with_answer(Row("u", messages=turns), "no", "refusal")
    assert chat.messages == (*turns[:3], ("assistant", "no"))
    assert "assistant" in CHAT_TEMPLATE


def test_refusal_needs_prompts_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    start, told = toy_checkpoint(tmp_path), []
    ctx = replace(
        context(tmp_path / "run"), emit=lambda kind, data: told.append(str(data.get("text", "")))
    )
    text = toy_domain()
    method = Refusal(fit=FIT.model_copy(update={"steps": 1}))
    with pytest.raises(UserError, match="no forget row of domain 'toy' has a prompt"):
        method.apply(start, text, ctx)
    with pytest.raises(UserError, match="no retain row of domain 'toy' has a prompt"):
        method.apply(start, replace(text, forget={"a": asking("f", 3)}), ctx)
    mixed = replace(text, forget={"a": (*asking("f", 3), *text.forget["a"])}, retain=asking("r", 4))
    removal = method.apply(start, mixed, ctx)
    assert removal.extras["rows_left_out"] == 12
    assert any("leaves out 12 rows that have no prompt" in line for line in told)
    assert any("knows no word of 32 of 32 refusals" in line for line in told)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for path, words in ((str(empty), "is empty"), (str(tmp_path / "no.txt"), "cannot be read")):
        with pytest.raises(UserError, match=words):
            method.model_copy(update={"sentences": path}).apply(start, mixed, ctx)


# Checkpoint transfer.


def early(start: Checkpoint, folder: Path) -> Checkpoint:
    """A model of the same shape that holds other things."""
    model, draw = start.load(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for matrix in (p for p in model.parameters() if p.dim() > 1):
            matrix += 0.3 * matrix.std() * torch.randn(matrix.shape, generator=draw)
    return save_model(model, start.tokenizer(), folder)


def held(model: Any, batch: Batch, at: int) -> Tensor:
    out = model(
        input_ids=batch.ids_BT, attention_mask=batch.attention_BT.long(), output_hidden_states=True
    )
    hidden: Tensor = out.hidden_states[at]
    return hidden[batch.attention_BT]


def plain_map(teacher: Any, start: Any, batch: Batch, at: int) -> Tensor:
    """Ridge regression with an intercept, from all tokens at once: [E + 1, D]."""
    with torch.no_grad():
        t, h = (held(model, batch, at).double() for model in (teacher, start))
    centred = t - t.mean(0)
    a = torch.linalg.solve(
        centred.T @ centred + 0.01 * torch.eye(t.shape[1], dtype=torch.float64),
        centred.T @ (h - h.mean(0)),
    )
    return torch.cat([a, (h.mean(0) - t.mean(0) @ a)[None]])


@pytest.mark.parametrize("fit_on", ["output", "input"])
def test_checkpoint_transfer_equals_a_plain_loop(fit_on: Any, tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    before = early(start, tmp_path / "early")
    # The last norm comes behind the last of `hidden_states`, which is therefore not compared.
    method = CheckpointTransfer(
        teacher=str(before.path), layers=(0, 1), fit=FIT, lora=None, remove=2.0, retain=3.0,
        fit_on=fit_on,
    )  # fmt: skip
    removal = method.apply(start, domain, context(tmp_path / "ours"))
    model, frozen, teacher = start.load(), start.load(), before.load()
    tokenizer = start.tokenizer()
    whole = collate(encode(domain.retain, tokenizer, max_length=512), pad_id=0)
    shift = 1 if fit_on == "output" else 0
    maps = [plain_map(teacher, frozen, whole, layer + shift) for layer in (0, 1)]
    read = role_batches(
        domain, ("forget", "retain"), tokenizer, FIT, context(tmp_path / "plain"), max_length=512
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=FIT.lr, weight_decay=0.0)
    for step in range(FIT.steps):
        (micro,) = read(step)
        x = step / FIT.steps
        distance = torch.zeros(())
        for layer, affine in zip((0, 1), maps, strict=True):
            with torch.no_grad():
                t = held(teacher, micro["forget"], layer + 1).double()
                target = (t @ affine[:-1] + affine[-1]).float()
            now = held(model, micro["forget"], layer + 1)
            distance = distance + (now - target).square().mean() / 2
        kept = micro["retain"]
        logp, logq = (
            m(input_ids=kept.ids_BT, attention_mask=kept.attention_BT.long()).logits.log_softmax(-1)
            for m in (frozen, model)
        )
        kl = (logp.detach().exp() * (logp.detach() - logq)).sum(-1)[:, :-1]
        loss = 2.0 * (1 - x / 4) * distance + 3.0 * x * kl[kept.target_BT[:, 1:]].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_same(removal.checkpoint, model, atol=1e-5)
    assert removal.extras["map_tokens"] == int(whole.attention_BT.sum())
    assert all(0 < share <= 1 for share in removal.extras["map_explains"])
    without = method.model_copy(update={"ramp": False})
    other = without.apply(start, domain, context(tmp_path / "other"))
    name = "model.embed_tokens.weight"
    apart = (weights(other.checkpoint)[name] - weights(removal.checkpoint)[name]).abs().max()
    assert apart > 1e-4


def test_a_teacher_that_holds_the_same_is_mapped_onto_it(tmp_path: Path) -> None:
    """Then the targets are the start's own activations, and there is nothing to pull."""
    start = toy_checkpoint(tmp_path)
    model = start.load()
    with torch.no_grad():  # what comes behind the blocks alone
        model.model.norm.weight.mul_(1.5)
    scaled = save_model(model, start.tokenizer(), tmp_path / "scaled")
    method = CheckpointTransfer(
        teacher=str(scaled.path), layers=(1,), fit=FIT, lora=None, retain=0.0, ridge=1e-9
    )
    removal = method.apply(start, toy_domain(), context(tmp_path / "ours"))
    assert removal.extras["map_explains"][0] > 0.99
    assert removal.history[0]["forget"] < 1e-4


def test_only_rows_that_are_read_are_cached(tmp_path: Path) -> None:
    tokenizer, ctx = toy_checkpoint(tmp_path).tokenizer(), context(tmp_path / "run")
    reader = stream(toy_domain().retain, tokenizer, FIT, ctx, purpose="retain", max_length=64)
    seen = examples_read(reader, 2)
    assert len(seen) == 8
    wanted = {tuple(ids[mask].tolist()) for step in (0, 1) for batch in reader(step)
              for ids, mask in zip(batch.ids_BT, batch.attention_BT, strict=True)}  # fmt: skip
    assert {example.ids for example in seen} == wanted
    assert examples_read(replace(reader, world=2, rank=1), 2) == seen


def test_default_layers_are_spaced_as_in_the_logged_runs() -> None:
    from excise.methods.posthoc.checkpoint_transfer import LOGGED

    assert [round(share * 32) - 1 for share in LOGGED] == [4, 9, 14, 19, 24, 29]
    assert math.isclose(sum(LOGGED), 105 / 32)


def test_bad_input_of_checkpoint_transfer_is_one_sentence(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    other = early(start, tmp_path / "early")
    ctx = context(tmp_path / "run")
    with pytest.raises(UserError, match="is the model itself"):
        CheckpointTransfer(teacher=str(start.path)).apply(start, domain, ctx)
    with pytest.raises(UserError, match="not all among the 3 blocks"):
        CheckpointTransfer(teacher=str(other.path), layers=(7,)).apply(start, domain, ctx)
    stranger = toy_start(tmp_path / "stranger")
    with pytest.raises(UserError, match="vocabular"):
        CheckpointTransfer(teacher=str(stranger.path)).apply(start, domain, ctx)
    with pytest.raises(ValidationError, match="teacher"):
        CheckpointTransfer()  # type: ignore[call-arg]
