"""The key of a stage: whatever decides its result changes it, and nothing else does.

Every class of every open family and every stage there is takes part, found by walking the
packages: one that is added is tested without a line here, or fails for want of a sample.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import pkgutil
import shutil
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parity.toy import toy_domain

import excise
import excise_studies
from excise.auditor.attacks import ATTACKS, Benign, Quantize
from excise.auditor.budget import SMOKE, Budget
from excise.auditor.controls import GatedEdit, PositiveControl
from excise.auditor.tuning import Training
from excise.core import keys, stages
from excise.core.code_files import load_code
from excise.core.config import Config
from excise.core.context import Context, Stage
from excise.core.disk import file_sum
from excise.core.keys import identity
from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.data.stream import Example
from excise.domains import DOMAINS
from excise.evals.extra import SCORES
from excise.methods import METHODS
from excise.methods.base import ApplyMethod, Method
from excise.methods.chain import Chain
from excise.methods.distillation.targets import FromMixture, FromOracle, Splice
from excise.methods.distillation.undo import Undo
from excise.methods.posthoc.circuit_breakers import CircuitBreakers
from excise.methods.posthoc.grad_diff import GradDiff
from excise.methods.posthoc.repnoise import RepNoise
from excise.methods.posthoc.rmu import RMU
from excise.methods.posthoc.rmu_lat import RMULAT
from excise.models.checkpoint import Checkpoint, open_checkpoint, save_model
from excise.models.tiny import byte_tokenizer, tiny_model
from excise.requests.recipe import EvalSpec
from excise.run.study import Study, study_named, study_points
from excise.train.worker import in_place
from excise_studies.auditing.hidings import Hiding


def modules() -> Iterator[types.ModuleType]:
    """Import every module of both packages."""
    for package in (excise, excise_studies):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                yield importlib.import_module(found.name)


def subclasses(cls: type) -> set[type]:
    """Return every class below one, in our packages."""
    below = set[type]()
    for child in list[type](cls.__subclasses__()):
        below |= {child, *subclasses(child)}
    return {part for part in below if part.__module__.startswith("excise")}


IMPORTED = list(modules())
STAGES = sorted(
    (cls for cls in subclasses(Stage) if not inspect.isabstract(cls)), key=lambda c: c.__name__
)
CONTROLS = sorted(
    (cls for cls in subclasses(PositiveControl) if not inspect.isabstract(cls)),
    key=lambda c: c.__name__,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model") / "model"
    return save_model(tiny_model("llama"), byte_tokenizer(chat=True), folder)


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("another") / "model"
    return save_model(tiny_model("llama", seed=1), byte_tokenizer(chat=True), folder)


# Settings of a configuration, one after the other.


def required(cls: type[Config]) -> Config:
    """Return a configuration with its defaults, and samples where it has none."""
    given: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        if field.is_required():
            given[name] = {
                "methods": (GradDiff(),), "path": "somewhere", "forget": {"forget": "f.jsonl"},
                "retain": "r.jsonl", "model": "m", "layer": 1, "teacher": "t",
            }[name]  # fmt: skip
    return cls(**given)


def other(value: Any, annotation: Any = None) -> Any:
    """Return another value of the same kind; it need not make sense."""
    choices = [c for c in literals(annotation) if c != value]
    if choices:
        return choices[0]
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case None:
            return "something"
        case Mapping():
            return {**value, "another": 1}
        case tuple() | list():
            return (*value, "another")
        case Config():
            return changed(value)[0][1]
    raise AssertionError(f"no other value is known for {value!r}")


def literals(annotation: Any) -> list[Any]:
    """Return the values that an annotation lists."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [value for part in get_args(annotation) for value in literals(part)]
    return []


def changed(config: Config) -> list[tuple[str, Config]]:
    """Return the configuration with each of its settings changed, those of parts too."""
    out: list[tuple[str, Config]] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name == "name" and len(literals(field.annotation)) == 1:
            continue  # it is the class's
        if isinstance(value, Config):
            out += [(f"{name}.{n}", config.model_copy(update={name: v})) for n, v in changed(value)]
        elif isinstance(value, tuple) and value and isinstance(value[0], Config):
            for inner, part in changed(value[0]):
                new = (part, *value[1:])
                out.append((f"{name}[0].{inner}", config.model_copy(update={name: new})))
            out.append((name, config.model_copy(update={name: value[1:]})))
        else:
            new = other(value, field.annotation)
            out.append((name, config.model_copy(update={name: new})))
    return out


def text(value: Any) -> str:
    """Return an identity as the key holds it."""
    return json.dumps(identity(value), sort_keys=True)


def study(name: str) -> Config:
    """Return a study with its defaults, but on images that need no fetching."""
    config = study_named(name)(**{})
    images = getattr(config, "images", None)
    if images is None:
        return config
    return config.model_copy(update={"images": images.model_copy(update={"source": "generated"})})


FAMILIES: dict[str, list[Config]] = {
    "method": [required(cls) for cls in METHODS.values()],
    "attack": [required(cls) for cls in ATTACKS.values()],
    "score": [required(cls) for cls in SCORES.values()],
    "control": [required(cls) for cls in CONTROLS],
    "domain": [required(cls) for cls in DOMAINS.values()],
    "study": [study(name) for name in study_points()],
    "hiding": [required(cls) for cls in sorted(subclasses(Hiding), key=lambda c: c.__name__)],
    "rest": [SMOKE, EvalSpec()],
}
MEMBERS = [config for family in FAMILIES.values() for config in family]


@pytest.mark.parametrize("config", MEMBERS, ids=lambda c: type(c).__name__)
def test_every_setting_counts(config: Config) -> None:
    seen = {text(config): "as it is"}
    for setting, new in changed(config):
        key = text(new)
        assert key not in seen, f"{type(config).__name__}: {setting} does not count"
        seen[key] = setting


def test_classes_of_equal_settings_are_told_apart_and_order_does_not_count() -> None:
    assert text(Benign()) != text(Quantize())
    assert text(GatedEdit()) != text(required(CONTROLS[-1]))
    one, two = {"a": 1, "b": (1, 2)}, {"b": [1, 2], "a": 1}
    assert text(one) == text(two)
    assert text({"a": 1}) != text({"a": 1.5}) != text({"a": "1"})
    assert text({"a": 1}) != text({"a": True})
    assert text((1, (2, 3))) != text(((1, 2), 3))


def test_a_version_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (GradDiff, Benign, GatedEdit):
        before = text(cls())
        monkeypatch.setattr(cls, "version", 99)
        assert text(cls()) != before


def test_what_has_no_identity_is_refused() -> None:
    with pytest.raises(TypeError, match="makes two Tensor values equal"):
        identity({"a": torch.zeros(2)})


# Stages: every field of every one.


def sample(annotation: Any, name: str, models: list[Checkpoint]) -> list[Any]:
    """Return two different values for a field of a stage."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return sample(next(a for a in get_args(annotation) if a is not type(None)), name, models)
    if origin is Literal:
        return list(get_args(annotation))[:2]
    domain = toy_domain()
    known: dict[Any, list[Any]] = {
        Checkpoint: models,
        Path: [model.path for model in models],
        Domain: [domain, replace(domain, retain=domain.retain[1:])],
        int: [1, 2],
        float: [1.0, 2.0],
        str: ["one", "two"],
        bool: [False, True],
        Method: [GradDiff(), GradDiff(alpha=2.0)],
        PositiveControl: [GatedEdit(), CONTROLS[-1]()],
        Budget: [SMOKE, SMOKE.model_copy(update={"steps": 99})],
        EvalSpec: [EvalSpec(), EvalSpec(samples=9)],
        Training: [Training("full", 1e-3, 0), Training("lora", 1e-3, 0)],
    }
    if annotation in known:
        return known[annotation]
    if origin is tuple and get_args(annotation)[0] is Example:
        example = Example((1, 2), (True, True), 0, "u")
        return [(example,), (replace(example, ids=(1, 3)),)]
    if origin is tuple and get_args(annotation)[-1] is Ellipsis:
        return [(one,) for one in sample(get_args(annotation)[0], name, models)]
    if origin is tuple:
        return [tuple(sample(a, name, models)[i] for a in get_args(annotation)) for i in (0, 1)]
    if inspect.isclass(annotation) and issubclass(annotation, Config):
        if name == "images":
            generated = annotation.model_validate({"source": "generated"})
            return [generated, generated.model_copy(update={"train": 30})]
        config = next((c for c in MEMBERS if isinstance(c, annotation) and changed(c)), None)
        config = config or required(annotation)
        return [config, changed(config)[0][1]]
    if name == "tokenizer":
        return [byte_tokenizer(), byte_tokenizer(bos=True)]
    if name == "clearing":
        from excise_studies.rmu.clearing import Clearing

        parts = (torch.ones(1, 2, 1), torch.ones(1, 2, 1), torch.ones(1, 2))
        return [Clearing("a", *parts, first, "mean") for first in (0, 1)]
    if dataclasses.is_dataclass(annotation):
        hints = get_type_hints(annotation)
        fields = {
            f.name: sample(hints[f.name], f.name, models)
            for f in dataclasses.fields(annotation)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        assert inspect.isclass(annotation)
        return [annotation(**{n: v[i] for n, v in fields.items()}) for i in (0, 1)]
    if origin is Annotated:
        return sample(get_args(annotation)[0], name, models)
    raise AssertionError(f"no sample is known for {name}: {annotation}; add one here")


@pytest.mark.parametrize("cls", STAGES, ids=lambda c: c.__name__)
def test_every_input_of_a_stage_counts(
    cls: type[Stage[Any]], model: Checkpoint, another: Checkpoint, tmp_path: Path
) -> None:
    assert cast(Any, cls).__dataclass_params__.frozen, f"{cls.__name__} is no frozen dataclass"
    hints = get_type_hints(cls, include_extras=True)
    fields = dataclasses.fields(cast(Any, cls))
    values = {f.name: sample(hints[f.name], f.name, [model, another]) for f in fields}
    runtime = Runtime(tmp_path)
    first: Any = cls(**{name: pair[0] for name, pair in values.items()})
    paths = {"as it is": runtime.path(first)}
    for name, pair in values.items():
        path = runtime.path(replace(first, **{name: pair[1]}))
        assert path not in paths.values(), f"{cls.__name__}.{name} does not count"
        paths[name] = path
    twin: Any = cls(**{name: pair[0] for name, pair in values.items()})
    assert runtime.path(twin) == paths["as it is"]


# What surrounds a stage.


@dataclasses.dataclass(frozen=True)
class Nothing(Stage[None]):
    """A stage without inputs."""

    @property
    def name(self) -> str:
        return "nothing"

    def make(self, ctx: Context) -> None:
        pass

    def read(self, folder: Path) -> None:
        return None


def test_dtype_device_processes_libraries_and_our_code_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(tmp_path)
    path = runtime.path(Nothing())
    assert Runtime(tmp_path, began=0.0).path(Nothing()) == path
    assert replace(runtime, device="cpu:0").path(Nothing()) == path
    for change in ({"dtype": "bfloat16"}, {"device": "cuda:1"}):
        assert replace(runtime, **cast(Any, change)).path(Nothing()) != path
    for name in keys.library_versions():
        newer = {**keys.library_versions(), name: "99"}
        monkeypatch.setattr(stages, "library_versions", lambda newer=newer: newer)
        assert runtime.path(Nothing()) != path, f"the version of {name} does not count"
        monkeypatch.undo()
    monkeypatch.setattr(stages, "own_source", lambda: "edited")
    assert runtime.path(Nothing()) != path


def test_processes_count_where_a_method_works_on_whole_batches(
    model: Checkpoint, tmp_path: Path
) -> None:
    one = Runtime(tmp_path)
    for method, counts in (
        (GradDiff(), False), (RepNoise(), True), (RMULAT(), True), (CircuitBreakers(), True),
        (Chain(methods=(GradDiff(), RMU())), False), (Undo(), False),
        (Undo(targets=Splice()), False), (Undo(targets=Splice(harmful="shuffled")), True),
        (Undo(targets=FromMixture(weights={"original": 1.0}, how="draw")), True),
        (Chain(methods=(GradDiff(), RepNoise())), True), (Undo(unlearn=RepNoise()), True),
    ):  # fmt: skip
        stage = ApplyMethod(method, model, toy_domain(), 0)
        path = one.path(stage)
        assert (replace(one, world=2).path(stage) != path) == counts, method
        assert replace(one, world=2, fsdp=True).path(stage) == replace(one, world=2).path(stage)


@dataclasses.dataclass(frozen=True)
class Counting(Nothing):
    """A stage that depends on the number of processes, and is killed in one."""

    data_parallel = True

    @property
    def counts_processes(self) -> bool:
        return True

    def make(self, ctx: Context) -> None:
        if ctx.world == 4:
            raise KeyboardInterrupt


def test_what_another_number_of_processes_began_is_named(tmp_path: Path) -> None:
    told: list[str] = []
    with in_place(lambda kind, data: told.append(str(data.get("text", kind)))):
        with pytest.raises(KeyboardInterrupt):
            Runtime(tmp_path, world=4).run(Counting())
        assert not any("depends on" in text for text in told)
        Runtime(tmp_path, world=2).run(Counting())
    begun = next(tmp_path.glob("v2/*.partial"))
    assert [text for text in told if "depends on" in text] == [
        "what 'nothing' makes depends on the number of processes, 2 here; what was begun with 4 is "
        f"not used and lies in {begun}"
    ]


def test_our_source_is_every_file_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys.own_source()
    one = Path(inspect.getfile(GradDiff))
    monkeypatch.setattr(keys, "file_sum", lambda p: "edited" if p == one else file_sum(p))
    assert keys.own_source.__wrapped__() != before


# Models: every file in their folder.


def edit_json(name: str, **fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        data = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**data, **fields}))

    return edit


def flip(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def more_templates(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize(
    "change",
    [
        edit_json("config.json", rope_theta=1.0),
        edit_json("generation_config.json", temperature=0.5),
        edit_json("tokenizer_config.json", padding_side="left"),
        edit_json("tokenizer.json", version="1.1"),
        flip,
        template,
        more_templates,
        lambda folder: (folder / "tokenizer.model").write_bytes(b"pieces"),
    ],
    ids=["config", "generation", "tokenizer config", "tokenizer", "a weight", "template",
         "more templates", "a file of the tokenizer"],
)  # fmt: skip
def test_every_file_of_a_model_counts(
    change: Callable[[Path], None], model: Checkpoint, tmp_path: Path
) -> None:
    shutil.copytree(model.path, tmp_path / "copy")
    assert text(Checkpoint(tmp_path / "copy")) == text(model)
    change(tmp_path / "copy")
    assert text(Checkpoint(tmp_path / "copy")) != text(model)


def test_the_place_the_time_and_the_card_of_a_model_do_not_count(
    model: Checkpoint, tmp_path: Path
) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(model.path, copy)
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    (copy / "README.md").write_text("a card")
    (copy / "LICENSE").write_text("a licence")
    (copy / "pytorch_model.bin").write_bytes(b"never read")
    assert text(Checkpoint(copy)) == text(model)


def test_a_tokenizer_that_lies_elsewhere_counts_and_code_only_where_trusted(
    model: Checkpoint, tmp_path: Path
) -> None:
    byte_tokenizer(bos=True).save_pretrained(tmp_path / "tokenizer")
    assert text(replace(model, tokenizer_path=tmp_path / "tokenizer")) != text(model)
    assert text(replace(model, trust_remote_code=True)) != text(model)


def test_a_folder_with_a_model_and_an_adapter_is_refused(model: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(model.path, tmp_path / "both")
    (tmp_path / "both" / "adapter_config.json").write_text("{}")
    with pytest.raises(excise.UserError, match="a whole model and an adapter beside it"):
        open_checkpoint(tmp_path / "both")


def test_a_model_in_memory_counts_by_all_that_is_saved_of_it(tmp_path: Path) -> None:
    net, tokenizer = tiny_model("llama"), byte_tokenizer(chat=True)

    def saved() -> str:
        return text(open_checkpoint(net, tokenizer=tokenizer, cache=tmp_path))

    first = saved()
    assert saved() == first
    tokenizer.chat_template = tokenizer.chat_template + " "
    second = saved()
    assert second != first
    net.generation_config.temperature = 0.5
    net.generation_config.do_sample = True
    assert saved() not in (first, second)


# Files and code of the user's.


def test_a_file_counts_by_its_bytes_and_not_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.safetensors").write_bytes(b"one")
    Path("copy").mkdir()
    shutil.copy("c.safetensors", "copy/other.safetensors")
    bare = text(RMU(controls="c.safetensors"))
    assert text(RMU(controls=str(tmp_path / "copy" / "other.safetensors"))) == bare
    os.utime("c.safetensors", (1, 1))
    assert text(RMU(controls="c.safetensors")) == bare
    Path("c.safetensors").write_bytes(b"two")
    assert text(RMU(controls="c.safetensors")) != bare


def test_a_model_named_by_a_method_counts_by_its_bytes(
    model: Checkpoint, another: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model.path, "mine")
    for named in (lambda p: Undo(student=p), lambda p: Undo(targets=FromOracle(path=p))):
        assert text(named("mine")) == text(named(str(model.path)))
        assert text(named("mine")) != text(named(str(another.path)))


class Reads(Method):
    """A method that never said that a text of it is a file."""

    name: Literal["reads"] = "reads"
    table: str = ""
    several: dict[str, tuple[str, ...]] = {}

    def apply(self, start: Any, domain: Any, ctx: Any) -> Any:
        raise AssertionError


def test_what_a_text_names_counts_even_where_nobody_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, inner = Path("table.csv"), Path("folder/inner.csv")
    inner.parent.mkdir()
    for path in (file, inner):
        path.write_text("one")
    for method in (
        Reads(table="table.csv"), Reads(table="folder"), Reads(several={"a": ("table.csv",)}),
    ):  # fmt: skip
        before = text(Chain(methods=(method,)))
        for path in (file, inner):
            path.write_text(path.read_text() + "more")
        assert text(Chain(methods=(method,))) != before


MINE = """
from typing import ClassVar, Literal
import {helper}
from excise.methods.base import Method, Paper

class Mine(Method):
    name: Literal["mine"] = "mine"
    paper: ClassVar[Paper] = Paper("t", "u")
    def apply(self, start, domain, ctx):
        return {helper}.FACTOR
"""


def test_code_of_ones_own_counts_with_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    helper = f"helper_{os.getpid()}"
    (tmp_path / f"{helper}.py").write_text("FACTOR = 1\n")
    file = tmp_path / "mine.py"
    file.write_text(MINE.format(helper=helper))

    def key() -> str:
        keys.source_of.cache_clear()
        return text(Chain(methods=(load_code(f"{file}:Mine", allow=True)(),)))

    first = key()
    (tmp_path / "copy.py").write_text(file.read_text())
    copied = load_code(f"{tmp_path / 'copy.py'}:Mine", allow=True)
    assert text(Chain(methods=(copied(),))) == first
    file.write_text(file.read_text() + "# another line\n")
    second = key()
    assert second != first
    (tmp_path / f"{helper}.py").write_text("FACTOR = 2\n")
    assert key() not in (first, second)


def test_a_class_made_at_a_prompt_is_new_in_every_process() -> None:
    module = types.ModuleType("prompt")
    exec("class Made:\n    pass", module.__dict__)
    made = module.__dict__["Made"]
    made.__module__ = "prompt"
    first = keys.source_of.__wrapped__(made)
    assert keys.source_of(made) == keys.source_of(made)
    assert keys.source_of.__wrapped__(made) != first


def test_a_removal_of_ones_own_is_a_stage_like_any_other(model: Checkpoint, tmp_path: Path) -> None:
    domain = toy_domain()
    runtime = Runtime(tmp_path)
    one = runtime.path(ApplyMethod(Reads(), model, domain, 0))
    swapped = replace(domain, forget={"forget": domain.retain}, retain=domain.benign)
    assert runtime.path(ApplyMethod(Reads(), model, swapped, 0)) != one
    assert runtime.path(ApplyMethod(Reads(), model, domain, 1)) != one
    assert runtime.path(ApplyMethod(Reads(table="x"), model, domain, 0)) != one


def test_every_family_is_here() -> None:
    assert all(FAMILIES.values())
    assert len(STAGES) >= 15
    assert {type(c) for c in FAMILIES["study"]} >= {
        cls for cls in subclasses(Study) if cls.__module__.startswith("excise_studies")
    } - {cls for cls in subclasses(Study) if inspect.isabstract(cls)}
