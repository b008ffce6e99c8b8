"""Words of a command line become options, and dotted settings find their place."""

from __future__ import annotations

import importlib.metadata
import shlex
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from excise.cli import main
from excise.cli.flags import read
from excise.cli.options import VERBS, AuditOptions, LsOptions, RemoveOptions, RunOptions
from excise.cli.remove import recipe_data
from excise.cli.settings import override
from excise.core.errors import UserError
from excise.requests.recipe import Recipe
from excise.requests.registry import registry


def test_flags_words_and_settings_are_told_apart() -> None:
    line = "--fit.lr 1e-4 --model m --forget a=f --forget b=g rmu --retain r --out o"
    more = "--dry_run --no-quiet --seed=-3 --fit.steps=5 --modules '[a, b]'"
    options = read(RemoveOptions, shlex.split(f"{line} {more}"), "excise remove")
    assert options.method == "rmu"
    assert options.forget == ("a=f", "b=g")
    assert options.out == Path("o")
    assert (options.dry_run, options.quiet, options.seed) == (True, False, -3)
    assert options.settings == {"fit.lr": "1e-4", "fit.steps": "5", "modules": "[a, b]"}
    assert options.command.startswith("excise remove --fit.lr 1e-4 --model m")
    assert options.command.endswith("--modules '[a, b]'")


@pytest.mark.parametrize("words", [["made", "--out", "o"], ["--out", "o", "made"]])
def test_a_word_may_stand_anywhere(words: list[str]) -> None:
    options = read(AuditOptions, words, "excise audit")
    assert (options.folder, options.out) == ("made", Path("o"))


def test_what_is_not_given_is_the_default() -> None:
    assert read(LsOptions, [], "excise ls") == LsOptions(command="excise ls")
    assert read(LsOptions, ["a", "b"], "excise ls").family == ("a", "b")
    assert read(RunOptions, ["demo"], "excise run").out is None
    for cls in VERBS.values():
        assert cls.__doc__


DATA = {
    "domain": {"name": "files", "forget": {"my-cap": "a"}, "retain": "r"},
    "arms": {"my-run": {"name": "undo"}, "my_other": {"name": "rmu", "fit": {"lr": 1.0}}},
    "oracles": [{"a-b": 1}],
}


@pytest.mark.parametrize("first", ["audit.budget", "audit.change.steps"])
def test_another_budget_leaves_the_changes_of_a_recipe_behind(first: str) -> None:
    """What a recipe changes of *smoke* would cut *standard* short; what is asked for stays."""
    data = {"audit": {"budget": "smoke", "change": {"steps": 64, "batch_size": 64}}}

    def changed(*paths: str) -> object:
        asked = {"audit.budget": "standard", "audit.change.steps": "99"}
        return override(data, {path: asked[path] for path in paths}, Recipe, registry())["audit"]

    assert changed("audit.budget") == {"budget": "standard"}
    both = sorted(("audit.budget", "audit.change.steps"), key=lambda path: path != first)
    assert changed(*both) == {"budget": "standard", "change": {"steps": 99}}
    assert changed("audit.change.steps") == {
        "budget": "smoke", "change": {"steps": 99, "batch_size": 64}
    }  # fmt: skip
    whole = {"audit.change": "{batch_size: 8}", "audit.change.steps": "3"}
    last = override(data, {**whole, "audit.budget": "strong"}, Recipe, registry())
    assert last["audit"]["change"] == {"batch_size": 8, "steps": 3}
    same = override(data, {"audit.budget": "smoke"}, Recipe, registry())
    assert same == data
    unsaid = {"audit": {"change": {"steps": 64}}}
    assert override(unsaid, {"audit.budget": "strong"}, Recipe, registry()) == {
        "audit": {"budget": "strong"}
    }
    assert override(unsaid, {"audit.budget": "smoke"}, Recipe, registry())["audit"] == {
        "budget": "smoke", "change": {"steps": 64}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("domain.forget.my-cap", ("domain", "forget", "my-cap")),
        ("domain.forget.new-cap", ("domain", "forget", "new-cap")),
        ("domain.retain-test", ("domain", "retain_test")),
        ("evaluate.max-rows", ("evaluate", "max_rows")),
        ("model.scratch.overrides.a-b", ("model", "scratch", "overrides", "a-b")),
        ("arms.my-run.fit.batch-size", ("arms", "my-run", "fit", "batch_size")),
        ("arms.my-run.unlearn.fit.batch-size", ("arms", "my-run", "unlearn", "fit", "batch_size")),
        ("arms.my-run.targets.skip-labels", ("arms", "my-run", "targets", "skip_labels")),
        ("arms.my-run.also.new-one.name", ("arms", "my-run", "also", "new-one", "name")),
        ("arms.my_other.fit.lr", ("arms", "my_other", "fit", "lr")),
        ("oracles.0.a-b", ("oracles", 0, "a-b")),
    ],
)
def test_names_of_settings_are_normalised_and_keys_are_not(
    path: str, place: tuple[str | int, ...]
) -> None:
    node: object = override(DATA, {path: "[7]"}, Recipe, registry())
    for key in place:
        node = node[key]  # type: ignore[index]
    assert node == [7]
    assert DATA["domain"] == {"name": "files", "forget": {"my-cap": "a"}, "retain": "r"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("arms.my_run.fit.lr", "there is no arms.my_run, .* did you mean 'my-run'"),
        ("arms.my-run.also.x.alpha", "there is no arms.my-run.also.x, "),
        ("arms", "leads nowhere"),
    ],
)
def test_what_is_not_there_is_not_made(path: str, message: str) -> None:
    settings = {"arms": "3", "arms.my-run.alpha": "1"} if path == "arms" else {path: "1"}
    with pytest.raises(UserError, match=message):
        override(DATA, settings, Recipe, registry())


def test_what_other_packages_offer_is_listed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offered = [EntryPoint("mine", "pack:Mine", "g"), EntryPoint("rmu", "pack:RMU", "g")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: offered)
    assert main(["ls", "methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "pack:" in line] == [["mine", "from", "pack:Mine"]]


def test_another_name_starts_from_its_own_defaults() -> None:
    data = {**DATA, "name": "r", "arms": {"my-run": {"name": "rmu", "layer": 3}}}
    settings = {"arms.my-run.fit.steps": "5", "arms.my-run.name": "maxent", "name": "other"}
    changed = override(data, settings, Recipe, registry())
    assert changed["arms"] == {"my-run": {"name": "maxent", "fit": {"steps": 5}}}
    assert changed["name"] == "other"
    assert changed["domain"] == data["domain"]
    again = override(data, {"arms.my-run.name": "rmu"}, Recipe, registry())
    assert again["arms"]["my-run"] == {"name": "rmu", "layer": 3}
    facts = override(data, {"domain.subjects": "9", "domain.name": "facts"}, Recipe, registry())
    assert facts["domain"] == {"name": "facts", "subjects": 9}


def test_remove_takes_the_settings_of_a_recipe_beside_those_of_the_method() -> None:
    line = "rmu --model m --forget f --retain r --out o --controls c.safetensors --layer 3"
    more = "--audit smoke --audit.change '{steps: 2}' --evaluate.max-rows 9 --domain.claim deletion"
    options = read(RemoveOptions, shlex.split(f"{line} {more}"), "excise remove")
    data = recipe_data(options)
    assert data["arms"] == {"rmu": {"name": "rmu", "controls": "c.safetensors", "layer": 3}}
    assert data["audit"] == {"budget": "smoke", "change": {"steps": 2}, "require": ""}
    assert data["evaluate"] == {"max_rows": 9}
    assert data["domain"]["claim"] == "deletion"
    assert data["domain"]["forget"] == {"forget": "f"}
