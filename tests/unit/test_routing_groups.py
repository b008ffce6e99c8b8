"""Who owns which slice of a model, and everything that is wrong with groups at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.fixtures.gpt_neo import gpt_neo
from torch import nn

from excise.core.config import ConfigError
from excise.models.tiny import FAMILIES, tiny_model
from excise.routing import GroupMap, Groups, Part, Policy, Rule, resolve, route
from excise.routing.groups import Place


def owned(map: GroupMap, name: str, group: str) -> list[tuple[int | None, int, int]]:
    return [(o.dim, o.start, o.stop) for o in map.owners[name] if o.group == group]


def parts(**groups: tuple[Part, ...]) -> Groups:
    return Groups(parts=groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_belongs_to_one_group(family: str) -> None:
    model = tiny_model(family)
    at: Any = "experts" if family == "mixtral" else "mlp"
    groups = parts(
        module_1=(Part(at=at, units=(1, 3)), Part(at="heads", units=(0, 2))),
        module_2=(Part(at=at, units=(3, 4), blocks=(-1,)),),
        joint=(Part(at="embed"), Part(at="norms")),
    )
    map = resolve(model, groups)
    for name, param in model.named_parameters():
        count = torch.zeros(param.shape)
        for one in map.owners[name]:
            part = (
                count if one.dim is None else count.narrow(one.dim, one.start, one.stop - one.start)
            )
            part += 1
        assert bool((count == 1).all()), name
    sizes = map.sizes()
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters())
    assert map.names == ("core", "module_1", "module_2", "joint")
    assert sizes["module_1"] > sizes["module_2"] > 0
    table = map.table()
    assert sum(row["entries"] for row in table) == sum(sizes.values())
    assert {row["group"] for row in table} == set(map.names)
    assert sum(p.numel() for p in model.parameters()) == sum(
        one.numel() if isinstance(one, nn.Parameter) else one.of(one.param).numel()
        for slices in map.slices(model).values()
        for one in slices
    )


def test_neurons_own_rows_of_up_and_gate_and_columns_of_down() -> None:
    map = resolve(tiny_model("llama"), parts(a=(Part(at="mlp", units=(8, 24), blocks=(1,)),)))
    block = "model.layers.1.mlp"
    assert owned(map, f"{block}.up_proj.weight", "a") == [(0, 8, 24)]
    assert owned(map, f"{block}.gate_proj.weight", "a") == [(0, 8, 24)]
    assert owned(map, f"{block}.down_proj.weight", "a") == [(1, 8, 24)]
    assert not owned(map, "model.layers.0.mlp.up_proj.weight", "a")
    assert map.places == (
        Place(f"{block}.down_proj", "input", "core", 0, 8),
        Place(f"{block}.down_proj", "input", "a", 8, 24),
        Place(f"{block}.down_proj", "input", "core", 24, None),
    )


def test_conv1d_is_transposed_and_owns_biases() -> None:
    map = resolve(
        tiny_model("gpt2"),
        parts(a=(Part(at="mlp", units=(0, 8)), Part(at="heads", units=(1, 2), blocks=(0,)))),
    )
    assert owned(map, "transformer.h.1.mlp.c_fc.weight", "a") == [(1, 0, 8)]
    assert owned(map, "transformer.h.1.mlp.c_fc.bias", "a") == [(0, 0, 8)]
    assert owned(map, "transformer.h.1.mlp.c_proj.weight", "a") == [(0, 0, 8)]
    assert owned(map, "transformer.h.1.mlp.c_proj.bias", "core") == [(None, 0, 0)]
    spans = [(1, 16, 32), (1, 80, 96), (1, 144, 160)]  # queries, keys, values of head 1
    assert owned(map, "transformer.h.0.attn.c_attn.weight", "a") == spans
    assert owned(map, "transformer.h.0.attn.c_proj.weight", "a") == [(0, 16, 32)]


def test_fused_gate_and_up_and_interleaved_heads() -> None:
    phi = resolve(
        tiny_model("phi3"), parts(a=(Part(at="mlp", units=(4, 6)), Part(at="heads", units=(2, 4))))
    )
    name = "model.layers.0.mlp.gate_up_proj.weight"
    assert owned(phi, name, "a") == [(0, 4, 6), (0, 260, 262)]
    # 4 query heads of 16, then 2 key heads, then 2 value heads: the second pair owns the second.
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert owned(phi, name, "a") == [(0, 32, 64), (0, 80, 96), (0, 112, 128)]
    neox = resolve(tiny_model("gpt_neox"), parts(a=(Part(at="heads", units=(1, 3)),)))
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    assert owned(neox, name, "a") == [(0, 48, 144)]


def test_heads_of_a_wrapped_attention_are_found() -> None:
    map = resolve(gpt_neo(), parts(a=(Part(at="heads", units=(1, 2)),)))
    block = "transformer.h.1.attn.attention"
    for name in ("q_proj", "k_proj", "v_proj"):
        assert owned(map, f"{block}.{name}.weight", "a") == [(0, 16, 32)]
    assert owned(map, f"{block}.out_proj.weight", "a") == [(1, 16, 32)]
    assert owned(map, f"{block}.out_proj.bias", "core") == [(None, 0, 0)]
    assert Place(f"{block}.out_proj", "input", "a", 16, 32) in map.places


def test_key_heads_go_with_all_their_queries_or_stay() -> None:
    model = tiny_model("llama")  # 4 query heads, 2 key-value heads
    one = resolve(model, parts(a=(Part(at="heads", units=(0, 1)),)))
    name = "model.layers.0.self_attn.{}_proj.weight"
    assert owned(one, name.format("q"), "a") == [(0, 0, 16)]
    assert not owned(one, name.format("k"), "a")
    assert any("share with others belong to 'core'" in note for note in one.notes)
    three = resolve(model, parts(a=(Part(at="heads", units=(1, 4)),)))
    assert owned(three, name.format("k"), "a") == [(0, 16, 32)]
    both = resolve(model, parts(a=(Part(at="heads", units=(0, 2)),)))
    assert owned(both, name.format("v"), "a") == [(0, 0, 16)]
    assert not both.notes


def test_down_projections_of_modules_can_be_joint() -> None:
    groups = Groups(parts={"module_1": (Part(at="mlp", units=(0, 4)),)}, joint_down=True)
    map = resolve(tiny_model("llama"), groups)
    down = "model.layers.0.mlp.down_proj.weight"
    assert owned(map, down, "joint") == [(1, 0, 4)]
    assert not owned(map, down, "module_1")
    assert map.places[0].group == "module_1"


def test_tied_embeddings_are_assigned_once_and_said() -> None:
    map = resolve(tiny_model("gemma2"), parts(joint=(Part(at="embed"),)))
    assert owned(map, "model.embed_tokens.weight", "joint")
    assert any("lm_head.weight" in note for note in map.notes)
    same = resolve(tiny_model("gemma2"), parts(joint=(Part(at="embed"), Part(at="head"))))
    assert same.owners == map.owners


def test_parts_of_any_other_model_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))
    map = resolve(
        model,
        parts(
            a=(Part(at="parameters", names=("0",), units=(0, 2)),),
            b=(Part(at="outputs", names=("0",), units=(2, 4)),),
        ),
    )
    assert owned(map, "0.weight", "a") == [(0, 0, 2)]
    assert map.places == (
        Place("0", "output", "core", 0, 2),
        Place("0", "output", "b", 2, 4),
        Place("0", "output", "core", 4, None),
    )


@pytest.mark.parametrize(
    ("family", "groups", "words"),
    [
        (
            "llama",
            parts(a=(Part(at="mlp", units=(0, 8)),), b=(Part(at="mlp", units=(4, 12)),)),
            "parts.b[0]: mlp 4:12 of group 'b' overlaps mlp 0:8 of group 'a'",
        ),
        (
            "llama",
            parts(a=(Part(at="mlp", units=(0, 999), blocks=(0,)),)),
            "parts.a[0]: units 0:999 do not lie within the 256 neurons of the MLP of block 0",
        ),
        (
            "llama",
            parts(a=(Part(at="heads", units=(3, 5), blocks=(0,)),)),
            "parts.a[0]: units 3:5 do not lie within the 4 query heads of block 0",
        ),
        ("llama", parts(a=(Part(at="mlp", blocks=(2,)),)), "there is no block 2 among 2"),
        ("llama", parts(a=(Part(at="experts"),)), "block 0 has no experts; use at: mlp"),
        ("mixtral", parts(a=(Part(at="mlp", units=(0, 4)),)), "has experts; use at: experts"),
        (
            "gpt2",
            parts(a=(Part(at="embed"),), b=(Part(at="head"),)),
            "head is the same tensor as embed of group 'a' (tied embeddings)",
        ),
        ("llama", parts(a=(Part(at="parameters"),)), "'parameters' needs names"),
        ("llama", parts(a=(Part(at="mlp", names=("x",)),)), "'mlp' takes no names"),
        ("llama", parts(a=(Part(at="parameters", names=("upp",)),)), "matches no weights"),
        (
            "llama",
            parts(a=(Part(at="attention"),), b=(Part(at="heads", units=(0, 1)),)),
            "overlaps attention of group 'a'",
        ),
    ],
)
def test_bad_groups_are_refused(family: str, groups: Groups, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(tiny_model(family), groups)
    assert words in str(error.value)


def test_a_model_whose_mlp_cannot_be_found_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"parts\.a\[0\]: the parts of a Sequential model"):
        resolve(model, parts(a=(Part(at="mlp", units=(0, 1)),)))


def test_all_problems_of_groups_policy_and_labels_come_at_once() -> None:
    policy = Policy(
        groups=parts(a=(Part(at="mlp", units=(0, 999), blocks=(0,)), Part(at="experts"))),
        rules={
            "core": (Rule(write=("coer",)), Rule(read=("self",))),
            "virology": (Rule(),),
            "x": (Rule(write=("self",)),),
        },
        capabilities=("x",),
        modules={"y": "b"},
    )
    with pytest.raises(ConfigError) as error, route(tiny_model("llama"), policy, labels=(0, 1, -1)):
        raise AssertionError("the block must not run")
    text = str(error.value)
    for words in (
        "do not lie within the 256 neurons",
        "has no experts",
        "rules.core[0].write: there is no group 'coer'; did you mean 'core'",
        "rules.core[1].read: tokens labelled core have no module of their own",
        "rules.virology: is no label",
        "label 'unlabeled' occurs in the data and has no rule",
        "capability 'x' has no group 'module_1'",
        "modules.y: is no capability",
    ):
        assert words in text, words
