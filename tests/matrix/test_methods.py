"""Every method on five families of models keeps the contract; methods that break it are caught."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from excise.core.code_files import load_code
from excise.core.config import Config
from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.stream import Batch, Stream, zip_streams
from excise.losses import nll, token_nll
from excise.methods import METHODS, RMU, Chain, Filtering, GradDiff, Method, Removal
from excise.methods.base import Cost
from excise.methods.tuning import (
    Progress,
    finish,
    role_counts,
    run_fit,
    state_dir,
    stream,
    tuned,
)
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.lora import LoRA
from excise.testing import check_method, toy_domain, toy_start
from excise.testing.methods import FAMILIES, map_fits, outputs, shortened
from excise.train.fit import FitConfig, Term, fit

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "rmu": {"layer": 2},
    "elm": {"layers": (1, 2), "lora": LoRA(rank=4), "guide": {"continuation": 4}},
    "repselect": {"components": {"count": 4}},
    "tar": {
        "inner_steps": 4,
        "every": 2,
        "inner_lr": (1e-4,),
        "fit": FitConfig(lr=1e-3, warmup=0, optimizer="schedule_free"),
    },
    "seam": {"fit": FitConfig(lr=1e-4)},
    "rmu_lat": {"layer": 2, "per_attack": 2, "attack_steps": 3},
    # Dropout is drawn by place, so that the padding side would matter.
    "circuit_breakers": {"layers": (0, 1), "lora": LoRA(rank=4)},
    "ssd": {"alpha": 1.5},
    "lfssd": {"alpha": 1.2},
    "potion": {"step": 1.5},  # the toy is never as ignorant as asked: fewer turns say the same
    "memsinks": {"sinks": 2, "active": 1},
    "moefy": {"rounds": 2, "dense_share": 0.5, "read_rows": 8},
    "altpo": {"new_tokens": 4, "answers": 2},
    "idk_dpo": {"answers": 2},
    "undo": {"unlearn": RMU(layer=2), "max_length": 32, "stop_tolerance": 0.0},
    "chain": {"methods": (Filtering(), RMU(layer=2))},
}
"""What a method needs to run on a model of three blocks."""


SIMILAR = frozenset(
    {
        "filter_lora", "relabel", "propagate", "token_filter", "ablated_plain", "moefy", "gram",
        "demix", "memsinks", "era_after", "adapter_modules", "dual_adapters",
    }
)  # fmt: skip
"""Methods that see a model only through what others are checked with: two families will do."""

CHAOTIC = frozenset({"circuit_breakers"})
"""Methods whose first gradient is rounding; `tests/parity` holds what they minimise instead."""

PAIRS = [(n, f) for n in METHODS for f in FAMILIES if n not in SIMILAR or f in ("llama", "gpt2")]
MORE = [(n, f) for n in METHODS for f in FAMILIES if (n, f) not in PAIRS]


ANSWERING = frozenset({"dpo", "idk_dpo", "altpo"})
"""Methods that put another answer behind a prompt, and need one in every row to forget."""


@functools.cache
def early(family: str) -> str:
    """Return a model of the same shape as that of `toy_start` that holds other things."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    start = toy_start(folder / "start", family)
    model, draw = start.load(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for matrix in (p for p in model.parameters() if p.dim() > 1):
            matrix += 0.3 * matrix.std() * torch.randn(matrix.shape, generator=draw)
    return str(save_model(model, start.tokenizer(), folder / "early").path)


def made(name: str, family: str = "llama") -> Method:
    settings = dict(SETTINGS.get(name, {}))
    if name == "checkpoint_transfer":
        settings["teacher"] = early(family)
    return METHODS[name].model_validate(settings)


def domain_for(name: str) -> Domain:
    """Return the toy domain, its rows to forget as questions where a method needs them."""
    domain = toy_domain()
    if name not in ANSWERING:
        return domain
    asked = []
    for i, row in enumerate(domain.forget["toy"]):
        words = (row.text or row.prompt + row.completion).split()
        prompt, options = " ".join(words[:-2]), (words[-1], words[-2], words[0])
        changed = replace(row, text="", completion="", prompt=prompt, choices=options)
        asked.append(replace(changed, answer=i % 2))
    return replace(domain, forget={"toy": tuple(asked)})


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_every_method_keeps_the_contract(
    name: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = DynamicCache.update

    def update(self: DynamicCache, keys: Tensor, *args: Any, **more: Any) -> Any:
        assert not keys.requires_grad, "a training step fills a cache of keys that nobody reads"
        return filled(self, keys, *args, **more)

    monkeypatch.setattr(DynamicCache, "update", update)
    check_method(made(name, family), families=(family,), steps=3, domain=domain_for(name))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "name",
    [
        "grad_diff", "rmu", "npo", "dpo", "undial", "rmu_lat", "repnoise", "task_vector", "refusal",
    ],
)  # fmt: skip
def test_methods_keep_the_contract_with_an_adapter(name: str, family: str) -> None:
    method = made(name).model_copy(update={"lora": LoRA(rank=2, output="adapter")})
    check_method(method, families=(family,), steps=3, domain=domain_for(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family"),
    [
        *MORE,
        *(
            (name, family)
            for name in METHODS
            for family in ("mistral", "qwen2", "gemma3", "phi3", "olmo2", "mixtral")
        ),
    ],
)
def test_every_method_keeps_the_contract_on_the_other_families(name: str, family: str) -> None:
    check_method(made(name, family), families=(family,), steps=3, domain=domain_for(name))


@pytest.mark.parametrize("name", [n for n in METHODS if n not in CHAOTIC])
def test_padding_on_the_left_changes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, domain = shortened(made(name), 3), domain_for(name)
    start = toy_start(tmp_path / "start")
    sides = []
    for side in ("right", "left"):
        monkeypatch.setattr(
            "excise.methods.tuning.Stream", partial(Stream, padding_side=side), raising=True
        )
        (tmp_path / side).mkdir()
        removal = method.apply(start, domain, Context(tmp_path / side))
        sides.append(outputs(removal.checkpoint, domain))
    moved = float((sides[0] - outputs(start, domain)).abs().max())
    assert moved > 1e-5
    assert float((sides[0] - sides[1]).abs().max()) <= 0.02 * moved + 1e-5


def test_the_contract_covers_every_schedule_inside_a_method() -> None:
    chain = Chain(methods=(GradDiff(), RMU(layer=2)))
    cut = map_fits(chain, lambda fit: fit.model_copy(update={"steps": 2}))
    assert [m.fit.steps for m in cut.methods] == [2, 2]  # type: ignore[attr-defined]


class Good(Method):
    """Descends on retain; every bad method below differs from it in one thing."""

    name: Literal["good"] = "good"
    fit: FitConfig = FitConfig(lr=1e-2)

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        return self.train(start, start.load(), domain, ctx)

    def train(self, start: Checkpoint, model: Any, domain: Domain, ctx: Context) -> Removal:
        return self.trained(start, model, domain, ctx, self.loss, self.fit)

    def trained(
        self, start: Checkpoint, model: Any, domain: Domain, ctx: Context, loss: Any, config: Any
    ) -> Removal:
        batches, progress = self.batches(start, domain, ctx), Progress(ctx, self.name, config.steps)
        with tuned(model, (), None, ctx) as (live, parameters):
            groups = {"trained": list(parameters.values())}
            steps = fit(
                live, batches, loss, config, ctx, groups=groups, counts=role_counts,
                state_dir=state_dir(ctx),
            )  # fmt: skip
            run_fit(steps, progress)
            return finish(start, live, parameters, progress, ctx)

    def batches(
        self, start: Checkpoint, domain: Domain, ctx: Context
    ) -> Callable[[int], list[dict[str, Batch]]]:
        rows = stream(
            domain.retain, start.tokenizer(), self.fit, ctx, purpose="retain", max_length=16
        )
        return zip_streams({"retain": rows})

    def loss(self, model: nn.Module, micro: Mapping[str, Batch]) -> dict[str, Term]:
        total, count = nll(model(**micro["retain"].inputs).logits, micro["retain"])
        return {"retain": Term(total, count)}


class GlobalNoise(Good):
    """Draws from the global random state."""

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        model = start.load()
        with torch.no_grad():
            model.get_parameter("model.norm.weight").mul_(1 + torch.rand(()))
        return self.train(start, model, domain, ctx)


class LeavesHook(Good):
    """Forgets to remove a hook."""

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        model = start.load()
        model.get_submodule("model.layers.0").register_forward_hook(lambda m, a, out: None)
        return self.train(start, model, domain, ctx)


class LeavesFrozen(Good):
    """Leaves requires_grad off."""

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        model = start.load()
        removal = self.train(start, model, domain, ctx)
        model.requires_grad_(False)
        return removal


class WritesInput(Good):
    """Leaves a file in the folder it was given."""

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        (start.path / "cache.json").write_text("{}")
        return super().apply(start, domain, ctx)


class TouchesInput(Good):
    """Writes a file of the input again, with the same bytes."""

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        config = start.path / "config.json"
        config.write_bytes(config.read_bytes())
        return super().apply(start, domain, ctx)


class Undeclared(Good):
    """Names only one of the tensors it moved."""

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        made = super().apply(start, domain, ctx)
        return Removal(made.checkpoint, made.changed[:1], made.cost)


class Overdeclared(Good):
    """Names a tensor that it did not move."""

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        shutil.rmtree(ctx.work / "model", ignore_errors=True)
        name = "model.norm.weight"
        made = start.write(start.weights_of([name]), ctx.work / "model")
        return Removal(made, (name,), Cost())


class MeanOfMeans(Good):
    """Averages every micro-batch for itself."""

    def loss(self, model: nn.Module, micro: Mapping[str, Batch]) -> dict[str, Term]:
        batch = micro["retain"]
        nll_BT = token_nll(model(**batch.inputs).logits, batch.ids_BT)
        return {"retain": Term(nll_BT[batch.target_BT].mean() * batch.num_targets**3,
                               float(batch.num_targets))}  # fmt: skip


class PadsByTokenizer(Good):
    """Reads the last column, which is padding on one side and a word on the other."""

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        tokenizer, model = start.tokenizer(), start.load()
        texts = [row.text or row.prompt + row.completion for row in domain.retain]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            shift = model(**batch).logits[:, -1].mean()
        weight: Tensor = model.get_parameter("model.norm.weight").detach()
        shutil.rmtree(ctx.work / "model", ignore_errors=True)
        name = "model.norm.weight"
        made = start.write({name: weight + 10 * shift}, ctx.work / "model")
        return Removal(made, (name,), Cost())


class NoState(Good):
    """Keeps a random stream of its own that a killed run loses."""

    def train(self, start: Checkpoint, model: Any, domain: Domain, ctx: Context) -> Removal:
        noise = ctx.generator("noise")

        def loss(model: nn.Module, micro: Mapping[str, Batch]) -> dict[str, Term]:
            scale = 0.5 + torch.rand((), generator=noise)
            return {k: Term(t.sum * scale, t.count) for k, t in self.loss(model, micro).items()}

        config = self.fit.model_copy(update={"optimizer": "sgd"})
        return self.trained(start, model, domain, ctx, loss, config)


class RefusesOldFolder(Good):
    """Will not go on in a folder that holds something."""

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        (ctx.work / "mine").mkdir()
        return super().apply(start, domain, ctx)


class NotJson(Good):
    """Puts a tensor where the record goes."""

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        made = super().apply(start, domain, ctx)
        return Removal(made.checkpoint, made.changed, made.cost, {"direction": torch.zeros(2)})


class Elsewhere(Good):
    """Writes its model where no run looks for it."""

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        return super().apply(start, domain, ctx.child("sub"))


class Widens(Good):
    """Writes the whole model in float32, whatever it was stored in."""

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        name = "model.norm.weight"
        shutil.rmtree(ctx.work / "model", ignore_errors=True)
        values = {name: start.weights_of([name])[name].float() + 1}
        return Removal(
            start.write(values, ctx.work / "model", dtype=torch.float32), (name,), Cost()
        )


class Unties(Good):
    """Gives the head values of its own where it was the embedding."""

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        from safetensors.torch import load_file, save_file

        removal = super().apply(start, domain, ctx)
        file, config = ctx.work / "model/model.safetensors", ctx.work / "model/config.json"
        tensors = load_file(file)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
        save_file(tensors, file, {"format": "pt"})
        text = config.read_text()
        assert '"tie_word_embeddings": true' in text
        config.write_text(
            text.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
        )
        return removal


def test_a_method_that_keeps_the_contract_passes() -> None:
    check_method(Good())


BAD: tuple[tuple[type[Good], str, str], ...] = (
    (GlobalNoise, "llama", "same configuration and seed"),
    (LeavesHook, "llama", "left 1 hooks"),
    (LeavesFrozen, "llama", "requires_grad"),
    (WritesInput, "llama", "wrote cache.json into the model folder"),
    (TouchesInput, "llama", "changed config.json in the model folder"),
    (Undeclared, "llama", "without naming it in Removal.changed"),
    (Overdeclared, "llama", "but it did not move"),
    (MeanOfMeans, "llama", "micro-batches moves the outputs"),
    (PadsByTokenizer, "llama", "padding side moves the outputs"),
    (NoState, "llama", "gives other weights"),
    (RefusesOldFolder, "llama", "applied again in the same ctx.work it fails"),
    (NotJson, "llama", "cannot be written as JSON"),
    (Elsewhere, "llama", r"looks for it in ctx.work / 'model'"),
    (Widens, "llama", "was .*BF16.* and is .*F32"),
    (Unties, "gemma2", "on disk and is"),
)


@pytest.mark.parametrize(("method", "family", "says"), BAD, ids=[b[0].__name__ for b in BAD])
def test_a_method_that_breaks_the_contract_is_told_how(
    method: type[Good], family: str, says: str
) -> None:
    with pytest.raises(AssertionError, match=says):
        check_method(method(), families=(family,))


def test_the_method_in_the_documentation_keeps_the_contract(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/extending.md").read_text(encoding="utf-8")
    code = next(block for block in text.split("```python\n")[1:] if "class Decay" in block)
    file = tmp_path / "mine.py"
    file.write_text(code.split("```")[0], encoding="utf-8")
    assert len(file.read_text().splitlines()) <= 40
    check_method(load_code(f"{file}:Decay", allow=True)(), families=("llama", "gpt2"))


def test_settings_may_depend_on_the_family() -> None:
    asked: list[str] = []

    def settings(family: str) -> dict[str, Any]:
        asked.append(family)
        return {"layer": 1}

    check_method(RMU(), families=("llama", "gpt2"), settings=settings)
    assert asked == ["llama", "gpt2"]
    with pytest.raises(ValueError, match="beyond this model"):
        check_method(RMU(), families=("llama",))


def test_every_built_in_method_is_a_configuration_with_a_paper() -> None:
    for name, cls in METHODS.items():
        assert issubclass(cls, Config)
        assert cls.model_fields["name"].default == name
        assert cls.paper.title
        assert cls.starts_from in ("original", "scratch")
