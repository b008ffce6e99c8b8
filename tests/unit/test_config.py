"""Configurations: every problem at once, each with its path and the nearest right name."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
from pydantic import Field, ValidationError, field_validator

from excise.core.config import Config, ConfigError, Registry, parse
from excise.core.errors import UserError, nearest


class Schedule(Config):
    """A nested configuration."""

    steps: int = Field(default=10, ge=1)
    """Steps."""
    lr: float = 1e-3
    """Rate."""


class Cut(Config):
    """Base of an open family."""

    kind: ClassVar[str] = "method"


class Ascend(Cut):
    """One member."""

    name: Literal["ascend"] = "ascend"
    fit: Schedule = Schedule()
    """Schedule."""
    blocks: tuple[int, ...] = ()
    """Blocks."""


class Steer(Cut):
    """Another member."""

    name: Literal["steer"] = "steer"
    layer: int
    """Required."""

    @field_validator("layer")
    @classmethod
    def _check(cls, layer: int) -> int:
        if layer == 13:
            raise ValueError("layer 13 is unlucky; take another")
        return layer


class Recipe(Config):
    """What is parsed."""

    title: str
    """Required."""
    arms: dict[str, Cut] = {}
    """Members by name."""
    chain: tuple[Cut, ...] = ()
    """Members in order."""
    first: Cut | None = None
    """An optional member."""
    fit: Schedule = Schedule()
    """Nested."""
    fits: tuple[Schedule, ...] = ()
    """Nested, several."""
    mode: Literal["fast", "careful"] = "fast"
    """A choice."""
    limits: dict[str, int] = {}
    """Plain values."""


REGISTRY: Registry = {"method": {"ascend": Ascend, "steer": Steer}}


def problems(data: object, **more: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse(Recipe, data, REGISTRY, **more)
    return caught.value.problems


def test_members_of_open_families_are_chosen_by_name() -> None:
    made = parse(
        Recipe,
        {
            "title": "t",
            "arms": {"a": {"name": "ascend", "fit": {"steps": 3}, "blocks": [1, 2]}},
            "chain": [{"name": "steer", "layer": 1}, {"name": "ascend"}],
            "first": {"name": "steer", "layer": 2},
            "fits": [{"steps": 4}],
        },
        REGISTRY,
    )
    assert made.arms["a"] == Ascend(fit=Schedule(steps=3), blocks=(1, 2))
    assert made.chain == (Steer(layer=1), Ascend())
    assert made.first == Steer(layer=2)
    assert made.fits == (Schedule(steps=4),)


def test_a_base_parses_to_the_named_member() -> None:
    assert parse(Cut, {"name": "ascend"}, REGISTRY) == Ascend()


def test_what_is_built_already_is_kept() -> None:
    member = Steer(layer=4)
    made = parse(Recipe, {"title": "t", "arms": {"a": member}, "first": None}, REGISTRY)
    assert made.arms["a"] is member
    assert made.first is None
    assert parse(Recipe, made, REGISTRY) is made


def test_all_problems_are_told_at_once() -> None:
    told = problems(
        {
            "titel": "t",
            "arms": {
                "a": {"name": "ascent"},
                "b": {"name": "ascend", "fit": {"stesp": 3, "lr": "fast"}},
                "c": {"layer": 1},
                "d": {"name": "steer"},
            },
            "chain": [{"name": "ascend", "blocks": ["x"]}, 7],
            "fits": [{"steps": 0}],
            "mode": "quick",
        },
        source="r.yaml",
    )
    text = "\n".join(told)
    for part in (
        "titel: unknown field; did you mean 'title'",
        "title: is required",
        "arms.a.name: unknown method 'ascent'; did you mean 'ascend'?",
        "arms.b.fit.stesp: unknown field; did you mean 'steps'",
        "arms.b.fit.lr: ",
        "arms.c.name: names no method",
        "arms.d.layer: is required",
        "chain[0].blocks[0]: ",
        "chain[1]: needs a mapping of fields, not 7",
        "fits[0].steps: ",
        "mode: ",
    ):
        assert part in text, part
    assert len(told) == 11


def test_each_problem_is_told_once() -> None:
    assert problems({"title": "t", "arms": {"a": {"name": "ascent"}}}) == (
        "arms.a.name: unknown method 'ascent'; did you mean 'ascend'?",
    )


def test_a_problem_in_a_field_does_not_hide_a_problem_in_one_of_like_name() -> None:
    told = problems({"title": "t", "fit": {"steps": 0}, "fits": 3})
    assert [p.split(":")[0] for p in sorted(told)] == ["fit.steps", "fits"]


def test_wrong_values_are_shown() -> None:
    (told,) = problems({"title": "t", "fit": {"steps": "many"}})
    assert told == "fit.steps: needs a whole number, not 'many'"
    (told,) = problems({"title": "t", "fit": {"steps": 0}})
    assert told == "fit.steps: must be 1 or more, not 0"
    (told,) = problems({"title": "t", "limits": {"a": "b"}})
    assert told == "limits.a: needs a whole number, not 'b'"
    (told,) = problems({"title": "t", "mode": "quick"})
    assert told == "mode: must be 'fast' or 'careful', not 'quick'"


def test_the_words_of_a_validator_are_kept() -> None:
    (told,) = problems({"title": "t", "arms": {"a": {"name": "steer", "layer": 13}}})
    assert told.startswith("arms.a.layer: layer 13 is unlucky; take another")


def test_one_problem_is_one_line_with_its_source() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Recipe, {}, REGISTRY, source="r.yaml")
    assert str(caught.value) == "r.yaml: title: is required"
    assert isinstance(caught.value, UserError)
    with pytest.raises(ConfigError, match=r"^r.yaml: 2 problems\n  "):
        parse(Recipe, {"x": 1}, REGISTRY, source="r.yaml")


@pytest.mark.parametrize("data", [None, 3, "text", ["a"]])
def test_anything_but_a_mapping_is_refused(data: object) -> None:
    (told,) = problems(data)
    assert told == f"configuration: needs a mapping of fields, not {data!r}"


def test_configurations_are_frozen_and_canonical() -> None:
    one, two = Ascend(blocks=(1,)), parse(Ascend, {"blocks": [1], "name": "ascend"}, REGISTRY)
    assert one == two
    assert one.canonical() == two.canonical()
    assert one.digest() == two.digest() != Ascend().digest()
    with pytest.raises(ValidationError):
        one.blocks = (2,)


def test_help_is_the_text_under_a_field() -> None:
    assert Schedule.model_fields["steps"].description == "Steps."


def test_the_nearest_names_come_first() -> None:
    assert nearest("grad_dif", ["rmu", "grad_diff", "plain"]) == "did you mean 'grad_diff'?"
    assert nearest("zzz", ["rmu", "plain"]) == "known: plain, rmu"
    assert nearest("q", [f"n{i:02}" for i in range(20)]).endswith("n11, ...")


def test_a_part_of_a_setting_keeps_what_its_default_says() -> None:
    from excise.methods import MaxEnt, Undo
    from excise.requests.registry import registry

    made = parse(MaxEnt, {"name": "maxent", "fit": {"lr": 0.5}}, registry())
    assert made.fit == MaxEnt().fit.model_copy(update={"lr": 0.5})
    undo = parse(Undo, {"name": "undo", "unlearn": {"fit": {"steps": 3}}}, registry())
    assert undo.unlearn == MaxEnt(fit=MaxEnt().fit.model_copy(update={"steps": 3}))
    other = parse(Undo, {"name": "undo", "unlearn": {"name": "grad_diff"}}, registry())
    assert other.unlearn.name == "grad_diff"  # type: ignore[attr-defined]
    recipe = {"targets": {"harmful": "skip", "name": "splice"}, "name": "undo"}
    assert parse(Undo, recipe, registry()).targets.name == "splice"
