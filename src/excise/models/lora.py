"""LoRA adapters through `peft`, put on for as long as a `with` block lasts.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685; on a
base in 4 bits Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs",
arXiv:2305.14314.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from excise.core.config import Config
from excise.core.errors import UserError
from excise.core.plugins import import_bitsandbytes
from excise.core.random_state import seeded
from excise.models.anatomy import backbone
from excise.models.names import (
    Names,
    canonical,
    is_adapter,
    match,
    modules_by_name,
    nearest_names,
    parameters_by_name,
    unwrap,
)
from excise.models.structure import sizes

PeftModel = Any
"""A `peft.PeftModel`."""

BLOCK = 64
"""Weights in a row that share a scale in NF4."""

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_BEYOND_LORA = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias",
                "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora",
                "arrow_config", "kasa_config", "velora_config", "monteclora_config")  # fmt: skip
"""Settings of peft with which an adapter is more than the product of two matrices."""

_STARTS_FROM_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Settings of `init_lora_weights` that leave the weights of the base as they are."""


_MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
READ_BY_KERNELS = ("out_proj", "conv1d")
"""Layers by family for which peft refuses an adapter: fused kernels read their weight past it."""


class LoRA(Config):
    """An adapter of low rank on linear layers, trained instead of their weights."""

    rank: int = Field(default=8, ge=1)
    """Rank of the update of each matrix."""
    alpha: float = Field(default=16.0, gt=0)
    """Scale of the update, divided by the rank."""
    modules: Names = ()
    """Which linear layers (names, suffixes, globs); empty for all in the blocks that can be."""
    output: Literal["merged", "adapter"] = "merged"
    """Whether only the merged model is kept, or the adapter beside it."""
    load_in_4bit: bool = False
    """Whether the linear layers of the blocks are held in NF4 with double quantization while the
    adapter trains (QLoRA); needs bitsandbytes."""


def _in_full(lora: LoRA) -> LoRA:
    """Refuse a base in 4 bits.

    Raises:
        ValueError: If it is asked for.
    """
    if lora.load_in_4bit:
        raise ValueError(
            "load_in_4bit: only methods that edit a trained model through one adapter alone hold "
            "its weights in 4 bits; leave it out"
        )
    return lora


FullLoRA = Annotated[LoRA, AfterValidator(_in_full)]
"""The adapter of a method that trains weights of the base too, or reads or routes gradients."""


def _peft() -> ModuleType:
    """Import peft.

    Raises:
        UserError: If it is not installed.
    """
    import_bitsandbytes()
    try:
        import peft
    except ImportError:
        raise UserError(
            "LoRA needs the package peft; install it with: pip install excise[lora]"
        ) from None
    return peft  # type: ignore[no-any-return, unused-ignore]


def require_bitsandbytes() -> Any:
    """Import bitsandbytes for a base in 4 bits.

    Raises:
        UserError: If it is not installed.
    """
    package = import_bitsandbytes()
    if package is None:
        raise UserError(
            "lora.load_in_4bit needs the package bitsandbytes; install it with: "
            "pip install 'excise[bitsandbytes]', or leave load_in_4bit out"
        )
    return package


def targets(model: nn.Module, patterns: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Return what an adapter is put on: linear layers, and fused 3-D parameters of experts.

    Args:
        model: The model, not wrapped.
        patterns: As in `LoRA.modules`; a module stands for everything in it.

    Returns:
        Canonical names of modules and of parameters, in the model's order.

    Raises:
        UserError: If a pattern matches no such layer, or one whose weight is shared.
    """
    named = modules_by_name(model)
    every = dict(model.named_parameters(remove_duplicate=False))
    linears = [n for n, m in named.items() if _plain(m) and not is_adapter(n)]
    # A matrix per expert; kernels of convolutions and weights by channel have a dimension of 1.
    fused = [n for n, p in every.items() if p.dim() == 3 and min(p.shape[1:]) > 1]
    fused = [n for n in fused if not is_adapter(n)]
    names = [*named, *fused]
    chosen: set[str] = set()
    for pattern in patterns or backbone(model).blocks:
        heads = set(match(pattern, names))
        hits = {n for n in (*linears, *fused) if any(_within(n, h) for h in heads)}
        if not hits:
            near = nearest_names(pattern, [*linears, *fused])
            what = "no linear layer that an adapter can be put on" if heads else "no linear layer"
            raise UserError(f"lora.modules '{pattern}' matches {what}; {near}")
        chosen |= hits
    uses = Counter(id(p) for p in every.values())
    kind = str(getattr(getattr(unwrap(model)[1], "config", None), "model_type", ""))
    for name in sorted(chosen):
        weight = every.get(f"{name}.weight")
        shared = weight is not None and uses[id(weight)] > 1
        if not shared and (kind not in _MAMBA or name.rpartition(".")[2] not in READ_BY_KERNELS):
            continue
        if not patterns:
            chosen.remove(name)
            continue
        why = "whose weight is shared" if shared else f"which {kind} reads past an adapter"
        raise UserError(f"lora.modules names '{name}', {why}; leave it out")
    return [n for n in linears if n in chosen], [n for n in fused if n in chosen]


def _plain(module: nn.Module) -> bool:
    """Return whether an adapter's output can be added to that of a module.

    A router is a linear layer by class, and puts out scores and choices.
    """
    router = isinstance(module, nn.Linear) and "router" in type(module).__name__.lower()
    return sizes(module) is not None and not router


def _within(name: str, head: str) -> bool:
    return name == head or name.startswith(head + ".")


def _config(peft: ModuleType, model: nn.Module, lora: LoRA) -> Any:
    """Return peft's configuration of an adapter on `model`."""
    modules, parameters = targets(model, lora.modules)
    named = modules_by_name(model)
    conv = any(hasattr(named[name], "nf") for name in modules)
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=modules,
        target_parameters=parameters or None,
        fan_in_fan_out=conv,
        task_type="CAUSAL_LM",
    )


def on_modules(lora: LoRA, names: Sequence[str]) -> LoRA:
    """Return an adapter on the modules that its method trains, where it names none itself.

    Args:
        lora: The adapter.
        names: Modules, or parameters, which stand for their modules.
    """
    if lora.modules or not names:
        return lora
    return lora.model_copy(update={"modules": tuple(n.removesuffix(".weight") for n in names)})


def adapter_size(model: nn.Module, lora: LoRA) -> int:
    """Return the number of entries of an adapter; experts that are one tensor have one each.

    Args:
        model: The model, not wrapped; shapes are enough.
        lora: The adapter.

    Raises:
        UserError: As `targets`.
    """
    modules, parameters = targets(model, lora.modules)
    named = modules_by_name(model)
    ends = sum(sum(sizes(named[name]) or ()) for name in modules)
    for name in parameters:
        experts, *matrix = model.get_parameter(name).shape
        ends += experts * sum(matrix)
    return lora.rank * ends


def linears_in_4bit(model: nn.Module) -> list[nn.Linear]:
    """Return the layers that `LoRA.load_in_4bit` holds in 4 bits: those with an adapter by default.

    Args:
        model: The model, not wrapped; shapes are enough.

    Raises:
        UserError: As `targets`, or if a layer is no plain linear layer, or one of a broken block:
            of a row that ends in one, bitsandbytes 0.50 reads other scales on the CPU.
    """
    names, fused = targets(model)
    named = modules_by_name(model)
    found: list[nn.Linear] = []
    for name in (*fused, *names):
        layer = named.get(name)
        if type(layer) is not nn.Linear or layer.in_features % BLOCK:
            raise UserError(
                f"lora.load_in_4bit holds nn.Linear of a multiple of {BLOCK} inputs in 4 bits, and "
                f"'{name}' is none; leave load_in_4bit out"
            )
        found.append(layer)
    return found


@contextmanager
def _in_4bit(model: nn.Module, linears: Sequence[nn.Linear]) -> Iterator[None]:
    """Hold layers in NF4 with double quantization while the block lasts, packed one by one.

    Their own weights wait on the CPU meanwhile, as `original` of the packed ones.

    Args:
        model: What the layers are in.
        linears: The layers; their biases stay as they are.

    Raises:
        UserError: If there is a layer and bitsandbytes is missing.
    """
    package = require_bitsandbytes() if linears else None
    wanted = {id(linear): linear for linear in linears}
    places = [
        (parent, leaf, wanted[id(child)])
        for parent in model.modules()
        for leaf, child in parent.named_children()
        if id(child) in wanted
    ]
    try:
        for parent, leaf, linear in places:
            setattr(parent, leaf, _packed(package, linear))
            linear.weight.data = linear.weight.data.new_empty(0)
        yield
    finally:
        for parent, leaf, linear in places:
            held: Any = parent.get_submodule(leaf)
            if held is not linear:
                linear.weight.data = held.weight.original.to(linear.weight.device)
                setattr(parent, leaf, linear.train(held.training))


def _packed(package: Any, linear: nn.Linear) -> nn.Linear:
    """Return a `bitsandbytes.nn.Linear4bit` that computes what a layer does, its weight rounded."""
    weight = linear.weight
    packed = package.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=weight.dtype,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    # Without `module` nothing refers in a circle, and what is replaced is freed at once.
    packed.weight = package.nn.Params4bit(weight.data, quant_type="nf4").to(weight.device)
    packed.weight.original = weight.data.cpu()
    packed.bias = linear.bias
    # Otherwise a pass without gradient lays the weight out for a kernel without a backward pass.
    packed.support_avx512bf16_for_cpu = False
    return packed.train(linear.training)  # type: ignore[no-any-return]


@contextmanager
def adapted(
    model: nn.Module, lora: LoRA, seed: int = 0, *, name: str = "default"
) -> Iterator[PeftModel]:
    """Put an adapter on a model for as long as the block lasts.

    The adapter starts as the identity; only its parameters require gradients. At the end the
    model is what it was: same modules, same bits, same flags. With `lora.load_in_4bit` the base is
    rounded meanwhile; its own weights wait on the CPU, which saves memory of an accelerator alone.

    Args:
        model: A `transformers` causal model, not wrapped.
        lora: The adapter.
        seed: Seed of its random half; the global random state is left as it was.
        name: What peft calls it.

    Yields:
        The peft model.

    Raises:
        UserError: If peft is missing, the model has an adapter already, a name matches nothing, or
            a layer cannot be held in 4 bits.
    """
    peft = _peft()
    if hasattr(model, "peft_config"):
        raise UserError("the model has an adapter already; merge or unload it first")
    config = _config(peft, model, lora)
    linears = linears_in_4bit(model) if lora.load_in_4bit else []
    flags = [(p, p.requires_grad) for p in model.parameters()]
    before = set(vars(model))
    layers = [(module, dict(module.named_children())) for module in model.modules()]
    wrapped: Any = None
    try:
        try:
            with seeded(seed, next(model.parameters()).device), _names_as_given():
                wrapped = peft.get_peft_model(model, config, adapter_name=name)
        except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
            for module, children in layers:  # those before the one that peft refused are wrapped
                module._modules.update(children)
            raise _refused(error, config.target_modules) from None
        wrapped.train(model.training)
        with _in_4bit(wrapped, linears):
            yield wrapped
    finally:
        if wrapped is not None:
            wrapped.unload()
        for name in set(vars(model)) - before:
            delattr(model, name)
        for parameter, required in flags:
            parameter.requires_grad_(required)


@contextmanager
def _names_as_given() -> Iterator[None]:
    """Keep peft from reading names of layers as those of older experts while the block runs.

    In families whose experts were modules once (DeepSeek, Qwen) it takes `up_proj` of a dense MLP
    or a shared expert for theirs and puts no adapter on it; ours are names of the model at hand.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # a peft that does not do so yet
        yield
        return
    kept = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = kept


def _refused(error: Exception, names: Iterable[str]) -> UserError:
    """Return what peft says of a layer as one sentence, with the layers it may mean."""
    reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0][:200]
    meant = sorted(n for n in names if f"'{n.rpartition('.')[2]}'" in reason)
    where = f" (such as '{meant[0]}')" if meant else ""
    return UserError(
        f"peft puts no adapter on a layer of lora.modules{where}: {reason.rstrip('.')}; name other "
        "lora.modules, or leave lora out"
    )


def holds_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter and no model beside it."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def load_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """Put a saved LoRA adapter on a model, which is changed by it.

    Args:
        model: A `transformers` causal model, not wrapped.
        folder: What `save_pretrained` of a peft model wrote.

    Returns:
        The peft model.

    Raises:
        UserError: If peft is missing, the folder holds no plain LoRA adapter, a file of it is
            broken, or it is not an adapter of this model.
    """
    peft = _peft()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}; name the folder of a LoRA adapter")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        weights = load_file(folder / ADAPTER_WEIGHTS)
    except (ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(
            f"the adapter in {folder} cannot be read: {reason}; copy it again"
        ) from None
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise UserError(f"{folder} holds an adapter of kind {config.peft_type}; only LoRA is read")
    more = [name for name in _BEYOND_LORA if getattr(config, name, None)]
    more += ["bias"] if config.bias != "none" else []
    more += [] if config.init_lora_weights in _STARTS_FROM_BASE else ["init_lora_weights"]
    if more:
        raise UserError(
            f"the adapter in {folder} sets {', '.join(more)}, so it is more than a product of two "
            "matrices on its base; merge it with peft"
        )
    wrong = f"the adapter in {folder} does not fit the base; name the model it was trained on"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each of them is an error below
            wrapped = peft.get_peft_model(model, config)
            loaded = peft.set_peft_model_state_dict(wrapped, weights)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{wrong} ({reason})") from None
    missing = [name for name in loaded.missing_keys if is_adapter(name)]
    for kind, names in (("lacks", missing), ("has", loaded.unexpected_keys)):
        if names:
            raise UserError(f"{wrong} (it {kind} '{names[0]}')")
    return wrapped


def add_adapter(model: PeftModel, lora: LoRA, name: str, seed: int = 0) -> None:
    """Lay a further adapter over an adapted model; `adapted` takes all of them off.

    Args:
        model: What `adapted` yields; `model.base_model.set_adapter([...])` says which run.
        lora: The adapter.
        name: What peft calls it.
        seed: Seed of its random half.
    """
    with seeded(seed, next(model.parameters()).device), _names_as_given():
        model.add_adapter(name, _config(_peft(), unwrap(model)[1], lora))


def _find_peft(model: nn.Module) -> PeftModel:
    """Return the peft model in `model`, which may be wrapped further."""
    for module in model.modules():
        if hasattr(module, "disable_adapter") and hasattr(module, "peft_config"):
            return module
    raise UserError("the model has no adapter; wrap it with excise.models.lora.adapted")


@contextmanager
def reference(model: nn.Module) -> Iterator[PeftModel]:
    """Switch the adapter off for as long as the block lasts: the model as it was before.

    With `lora.load_in_4bit` it is the base in 4 bits.

    Args:
        model: What `adapted` yields, or a wrapper of it.

    Yields:
        `model`.

    Raises:
        UserError: If the model has no adapter.
    """
    wrapped = _find_peft(model)
    flags = [(p, p.requires_grad) for p in wrapped.parameters()]
    try:
        with wrapped.disable_adapter():
            yield model
    finally:
        # peft lets every adapter require gradients when it switches them on again.
        for parameter, required in flags:
            parameter.requires_grad_(required)


@torch.no_grad()
def merge(model: nn.Module, scale: float = 1.0) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the weights with the adapter added, without changing the model.

    A negative scale takes away what the adapter was trained for (Ilharco et al. 2023, "Editing
    models with task arithmetic", arXiv:2212.04089; Zhang et al. 2023, "Composing parameter-
    efficient modules with arithmetic operations", arXiv:2306.14870).

    Sums are formed in float32 and rounded once to the dtype of the weights; the update of fused
    experts is rounded to it first, as it is in the adapted model's forward. Of a base in 4 bits the
    update is added to the weights as they were before.

    Args:
        model: What `adapted` yields, or a wrapper of it.
        scale: How often the update is added.

    Returns:
        The changed weights by canonical name, and what rounding cost: `merge_rounding` is the
        largest difference between exact and rounded weight in the dtype of the weights,
        `merge_rounding_bf16` the same in bfloat16, `merge_lost_bf16` the share of changed
        entries that bfloat16 rounds back to the weight they had; `adapter_parameters` counts. Of
        a base in 4 bits, `base_rounding_nf4` is the norm of what rounding took from its weights,
        over their norm.

    Raises:
        UserError: If the model has no adapter, or one on a weight that is shared.
    """
    wrapped = _find_peft(model)
    prefix, _ = unwrap(wrapped)
    own = parameters_by_name(wrapped)
    uses = Counter(id(p) for _, p in wrapped.named_parameters(remove_duplicate=False))
    merged: dict[str, Tensor] = {}
    cost = {"merge_rounding": 0.0, "merge_rounding_bf16": 0.0}
    changed = lost = 0
    for real, layer in wrapped.named_modules():
        if not hasattr(layer, "get_delta_weight"):
            continue
        leaf = getattr(layer, "parameter_name", "weight")
        name = f"{canonical(real, prefix)}.{leaf}"
        if name not in own or uses[id(own[name])] > 1:
            raise UserError(f"the adapter is on '{name}', which is shared; it cannot be merged")
        weight: Tensor = getattr(own[name], "original", own[name].detach())
        exact = weight.float() + scale * _delta(layer).to(weight.device)
        merged[name] = exact.to(weight.dtype)
        short, old = exact.bfloat16(), weight.bfloat16()
        for key, rounded in (("merge_rounding", merged[name]), ("merge_rounding_bf16", short)):
            cost[key] = max(cost[key], float((exact - rounded.float()).abs().max()))
        moved = exact != weight.float()
        changed += int(moved.sum())
        lost += int((moved & (short == old)).sum())
    size = sum(p.numel() for n, p in own.items() if is_adapter(n))
    share = lost / changed if changed else 0.0
    packed = [parameter for parameter in own.values() if hasattr(parameter, "original")]
    if packed:
        cost["base_rounding_nf4"] = _rounding(packed)
    return merged, {**cost, "merge_lost_bf16": share, "adapter_parameters": float(size)}


def _rounding(packed: Iterable[Any]) -> float:
    """Return the norm of what 4 bits took from weights, over the norm of the weights."""
    dequantized = require_bitsandbytes().functional.dequantize_4bit
    lost = whole = 0.0
    for weight in packed:
        exact = weight.original.float()
        rounded = dequantized(weight.data, weight.quant_state)
        lost += float((exact - rounded.to(exact)).square().sum())
        whole += float(exact.square().sum())
    return (lost / whole) ** 0.5 if whole else 0.0


def _delta(layer: Any) -> Tensor:
    """Return the update of one layer's weight in float32, adapters added up."""
    total: Tensor | None = None
    for name in layer.active_adapters:
        delta = layer.get_delta_weight(name).float()
        total = delta if total is None else total + delta
    assert total is not None, "a layer without adapter has no update"
    return total
