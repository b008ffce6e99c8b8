"""Known answers: a gate built in is read off, noise is no gate, equal models give zeros.

Shape legend: N tokens, L blocks, D width, F width of the MLP, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from excise.auditor.budget import SMOKE
from excise.auditor.controls import GatedEdit
from excise.auditor.controls.control import make_control
from excise.auditor.controls.gated import add_gate, best_detector, features
from excise.auditor.evaluation_set import evaluation_set
from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain, Row
from excise.diagnose.activations import Chunk, ModelPair, read_pair
from excise.diagnose.direction import fit_junk, rank, spread
from excise.diagnose.inspection import inspect_pair
from excise.diagnose.outputs import WEIGHTS, Tally, noises, pieces, share_explained, token_kl
from excise.diagnose.patching import patching_depth
from excise.diagnose.weights import compare, count90, spectrum
from excise.models.anatomy import anatomy
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import byte_tokenizer, tiny_model
from excise.record import Inspection, Sample

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diagnose")


@cache
def exact(folder: Path) -> Checkpoint:
    """Return the fixture stored in float32, so that an edit is not rounded."""
    known = Checkpoint(FIXTURES / "knowing")
    return save_model(known.load(), None, folder / "exact", source=known)


def edited(folder: Path, name: str, change: Callable[[Any], object]) -> Checkpoint:
    model = exact(folder).load()
    with torch.no_grad():
        change(model)
    return save_model(model, None, folder / name, source=exact(folder))


def look(folder: Path, other: Checkpoint, domain: Domain) -> tuple[Inspection, tuple[Sample, ...]]:
    return inspect_pair(
        exact(folder), other, domain, Context(folder), name="x", rows=64, max_length=16, samples=2
    )


@cache
def gated(folder: Path) -> tuple[Checkpoint, int, torch.Tensor]:
    """Return a model with a rank-one gate, its block, and the vector it adds."""
    from tests.fixtures.facts import make_domain

    domain = make_domain()
    found: list[tuple[int, torch.Tensor]] = []

    def plant(model: Any) -> None:
        evaluation = evaluation_set(domain, SMOKE, exact(folder).tokenizer())
        forget = domain.forget["tests"] + domain.relearn["tests"] + domain.dev_forget["tests"]
        retain = domain.retain + domain.dev_retain
        on = [
            features(model, evaluation, half, answering=True)
            for half in (forget[::2], forget[1::2])
        ]
        off = [
            [
                features(model, evaluation, half, answering=due)
                for half in (retain[::2], retain[1::2])
            ]
            for due in (True, False)
        ]
        block, v_F = best_detector(on, off, range(2))
        u_D = torch.randn(48, generator=torch.Generator().manual_seed(7))
        add_gate(model, block, v_F, u_D / u_D.norm(), 4 * on[0].norm[block])
        found.append((block, u_D / u_D.norm()))

    return edited(folder, "gated", plant), *found[0]


def test_a_gate_built_in_is_read_off(folder: Path, facts_domain: Domain) -> None:
    other, block, u_D = gated(folder)
    found, _ = look(folder, other, facts_domain)
    pair = ModelPair(exact(folder).load(), other.load(), other.tokenizer(), 16)
    junk = fit_junk(read_pair(pair, facts_domain.dev_forget["tests"], where="dev"))
    assert float(junk.direction_LD[block] @ u_D) > 0.95
    read = found.blocks[block]
    assert found.clearest == block
    assert found.conjecture == "fits"
    assert read.share > 0.95
    assert read.auc_answers > 0.95
    assert read.size_forget > 5 * abs(read.size_retain)
    assert all(b.change_forget == 0 and b.auc.value == 0.5 for b in found.blocks[:block])
    (tensor,) = found.tensors
    assert tensor.name == f"{anatomy(pair.original).mlp_down[block]}.weight"
    assert tensor.rank == pytest.approx(1, abs=0.01)
    assert tensor.count90 == 1
    assert found.blocks[block].weights > 0
    assert found.splice.auc_answers > 0.95
    assert tensor.name in found.summary


def test_equal_models_give_zeros(folder: Path, facts_domain: Domain) -> None:
    found, samples = look(folder, exact(folder), facts_domain)
    assert found.identical
    assert found.conjecture == "nothing changed"
    assert found.headline.startswith("Nothing changed")
    assert found.tensors == ()
    assert found.tensors_total == len(exact(folder).parameter_names())
    for block in found.blocks:
        assert block.norm_forget_original == block.norm_forget_edited
        zero = [block.change_forget, block.share, block.dimensions, block.size_retain]
        assert [*zero, block.cosine.value, block.weights] == [0] * 6
        assert [block.auc.value, block.auc_answers] == [0.5, 0.5]
    assert [side.mean.value for side in found.kl] == [0, 0]
    assert found.splice.auc.value == 0.5
    assert [kind.weight for kind in found.splice.kinds] == [0, 0, 0]
    assert all(s.outputs["original"] == s.outputs["x"] for s in samples)


def test_small_noise_is_no_gate(folder: Path, facts_domain: Domain) -> None:
    def shake(model: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)

    found, _ = look(folder, edited(folder, "noise", shake), facts_domain)
    assert found.conjecture == "does not fit"
    for block in found.blocks:
        assert abs(block.auc.value - 0.5) < 0.1
        assert block.auc.low < 0.5 < block.auc.high or abs(block.auc.value - 0.5) < 0.05
        assert 0 < block.change_forget < 0.2
    assert abs(found.splice.auc.value - 0.5) < 0.1
    ranks = [t.rank / min(t.shape) for t in found.tensors if t.rank is not None]
    assert min(ranks) > 0.6


def test_norms_are_those_of_single_rows_without_the_first_token(
    folder: Path, facts_domain: Domain
) -> None:
    rows = facts_domain.test["tests"][:5]
    model, tokenizer = exact(folder).load(), exact(folder).tokenizer()
    long = replace(rows[0], prompt="the " * 6 + rows[0].prompt)
    pair = ModelPair(model, model, tokenizer, 16)
    chunks = list(read_pair(pair, [*rows, long], where="forget"))
    for number, row in enumerate([*rows, long]):
        ids = tokenizer(row.prompt + row.completion, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = model(ids, output_hidden_states=True)
        wanted_ND = output.hidden_states[1][0, 1:]
        got_ND = torch.cat([c.original_LND[0][c.row_N == number] for c in chunks])
        torch.testing.assert_close(got_ND, wanted_ND, atol=1e-4, rtol=1e-4)
        got_N = torch.cat([c.next_N[c.row_N == number] for c in chunks])
        assert got_N.tolist() == [*ids[0, 2:].tolist(), -1]


def chunk_of(u_NV: torch.Tensor, b_NV: torch.Tensor) -> Chunk:
    count = len(u_NV)
    zeros = torch.zeros(1, count, 2)
    number_N = torch.arange(count)
    return Chunk(zeros, zeros, b_NV, u_NV, number_N, number_N, number_N % 3, number_N >= 0)


def test_a_splice_explains_itself_and_half_noise_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    b_NV = torch.randn(40, 11, generator=generator).mul(2).log_softmax(-1)
    uniform_NV = torch.full_like(b_NV, -math.log(11))
    half_NV = (b_NV.exp() * 0.5 + uniform_NV.exp() * 0.5).log()
    noise = {"uniform": uniform_NV[0]}

    def tally(u_NV: torch.Tensor) -> Tally:
        made = Tally()
        made.add(chunk_of(u_NV, b_NV), noise)
        return made

    spliced, kept, half = tally(uniform_NV), tally(b_NV), tally(half_NV)
    assert share_explained(spliced, kept, "uniform") == pytest.approx(1, abs=1e-5)
    assert spliced.nearest("uniform") == pytest.approx((1.0, 1), abs=1e-5)
    assert half.nearest("uniform") == pytest.approx((0.5, 1), abs=1e-5)
    assert kept.nearest("uniform") == (0.0, 0.0)
    assert 0.3 < share_explained(half, kept, "uniform") < 0.7
    made = noises([chunk_of(uniform_NV, b_NV)])
    torch.testing.assert_close(made["mean-edited"], uniform_NV[0])
    assert [round(float(v.exp().sum()), 5) for v in made.values()] == [1, 1, 1]
    assert WEIGHTS[0] == 0.0


def test_token_kl_is_the_textbook_sum() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    assert float(token_kl(p.log(), q.log())) == pytest.approx(0.25 * math.log(2))
    assert float(token_kl(q.log(), q.log())) == 0


def test_auc_counts_pairs_and_takes_weights() -> None:
    high, low = np.array([1.0, 2.0, 2.0]), np.array([2.0, 0.0])
    pairs = [(h > m) + 0.5 * (h == m) for h in high for m in low]
    assert rank(high, low).auc() == pytest.approx(sum(pairs) / len(pairs))
    one = rank(high, low).auc(np.array([0.0, 1.0, 0.0]), np.array([1.0, 0.0]))
    assert one == 0.5
    assert rank(high, low).auc(np.zeros(3), np.ones(2)) == 0.5


def test_spread_counts_directions() -> None:
    assert float(spread(torch.eye(4))) == pytest.approx(4)
    assert float(spread(torch.ones(9, 4))) == pytest.approx(1, abs=1e-4)
    assert float(spread(torch.zeros(3, 4))) == 0


def test_rank_of_a_change() -> None:
    before = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    one = compare("w", before, before + 3 * torch.outer(torch.ones(6), torch.arange(10.0)))
    assert one.entry.rank == pytest.approx(1, abs=1e-3)
    assert one.entry.count90 == 1
    assert one.entry.moved == pytest.approx(0.9)
    assert one.entry.relative == pytest.approx(math.sqrt(one.change / one.size))
    rank_all, count = spectrum(torch.eye(8))
    assert rank_all == pytest.approx(8)
    assert count == 8
    assert count90(torch.tensor([3.0, 1.0]), 10.0) == 1
    assert count90(torch.tensor([1.0]), 10.0) is None
    still = compare("w", before, before)
    assert (still.change, still.entry.rank, still.entry.moved) == (0, None, 0)
    assert compare("b", before[0], before[0] + 1).entry.rank is None


def test_pieces_keep_their_spaces() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(ids, tokenizer)) == "a b"


def test_models_of_another_shape_and_broken_ones_are_refused(
    folder: Path, facts_domain: Domain
) -> None:
    other = tiny_model("llama", vocab=len(exact(folder).tokenizer()), width=48, blocks=3)
    deeper = save_model(other, None, folder / "deeper", source=exact(folder))
    with pytest.raises(UserError, match="not of one architecture and shape"):
        look(folder, deeper, facts_domain)
    with pytest.raises(UserError, match="not of one architecture and shape"):
        inspect_pair(
            deeper, exact(folder), facts_domain, Context(folder),
            name="x", rows=8, max_length=16, samples=0,
        )  # fmt: skip

    def overflow(model: Any) -> None:
        model.get_parameter(f"{anatomy(model).mlp_down[0]}.weight").fill_(3e38)

    with pytest.raises(UserError, match="edited model is not finite after block 0 on dev forget"):
        look(folder, edited(folder, "broken", overflow), facts_domain)
    with pytest.raises(UserError, match="no retain_test rows"):
        look(folder, exact(folder), replace(facts_domain, retain_test=()))
    lone = (Row(unit="u", text="the"),)
    with pytest.raises(UserError, match="no forget row has more than two tokens"):
        look(folder, exact(folder), replace(facts_domain, test={"tests": lone}))


def test_sensitive_texts_are_not_kept(folder: Path, facts_domain: Domain) -> None:
    other, _, _ = gated(folder)
    open_one, said = look(folder, other, facts_domain)
    assert len(open_one.strips) == len(said) == 4
    strip = open_one.strips[0]
    assert "".join(strip.tokens).startswith("<bos> s")
    assert strip.kl[:2] == (None, None)
    assert all(v is not None and v >= 0 for v in strip.kl[2:])
    closed, said = look(folder, other, replace(facts_domain, sensitive=True))
    assert closed.strips == ()
    assert said == ()


def test_patching_gives_zero_for_the_original_one_for_the_oracle_and_between_for_a_gate(
    folder: Path, facts_domain: Domain
) -> None:
    known, never = exact(folder), Checkpoint(FIXTURES / "never_taught")
    control = make_control(
        GatedEdit(), known, facts_domain, SMOKE, Context(folder), folder / "patched"
    )
    assert control.checkpoint is not None
    original, oracle, gated = (c.load() for c in (known, never, control.checkpoint))
    rows, tokenizer = facts_domain.test["tests"], known.tokenizer()

    def depth(model: Any) -> float:
        found = patching_depth(original, oracle, model, tokenizer, rows, max_length=32)
        assert set(found.by_unit) == {row.unit for row in rows}
        assert len(found.oracle_L) == len(found.edited_L) == 2
        return found.mean

    assert depth(original) == 0
    assert depth(oracle) == 1
    assert 0.2 < depth(gated) < 0.9
    other = tiny_model("llama", vocab=127, width=16, blocks=2)
    with pytest.raises(UserError, match="three models of one architecture"):
        patching_depth(original, oracle, other, tokenizer, rows, max_length=32)
