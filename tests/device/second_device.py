"""A second device, `second:0`, that computes what the CPU does, to the bit.

Its tensors are ordinary ones of PyTorch's key for devices of others (PrivateUse1), whose memory is
the host's: DLPack hands memory over under another device's name, so that views, storages and
versions are PyTorch's own. Every operator for which the CPU has a kernel runs in that kernel, on
the same memory.

What makes it a device is what it refuses and counts. As on CUDA, an operator takes tensors of one
device, beside CPU scalars where it works elementwise and CPU indices; a generator of the CPU draws
nothing here; and the device has a random state of its own, which forks only where it is named.
`COUNTS` holds how often the host waited for the device, and how often something was sent to it.

`install` is once and for the whole process, so tests that use it run in a process of their own.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "second"

COUNTS: Counter[str] = Counter()
"""`sync:OPERATOR`, and `to_device`: since the process began."""

_CPU, _SECOND = 1, 12
"""Kinds of device in DLPack; 12 is for extensions, which PyTorch reads as PrivateUse1."""

_ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_CPU_DEVICE = torch.device("cpu")
_LIBRARIES: list[torch.library.Library] = []

_TAKES_INDICES = ("index", "index_put", "_index_put_impl", "_unsafe_index", "_unsafe_index_put")
"""Operators whose indices CUDA reads from the CPU too."""


class _Header(ctypes.Structure):
    """The beginning of a DLPack tensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("index", ctypes.c_int32),
    )


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _handed(tensor: Tensor, kind: int) -> Tensor:
    """Return a tensor of the same memory, shape and strides on another device."""
    capsule = torch._C._to_dlpack(tensor)
    _Header.from_address(_pointer(capsule, b"dltensor")).kind = kind
    other = torch._C._from_dlpack(capsule)
    if other.stride() != tensor.stride():  # DLPack says 1 for dimensions of one element
        strides = torch.ops.aten.as_strided.default
        other = strides.redispatch(_ON_CPU, other, tensor.shape, tensor.stride())
    return other


class _State:
    """The random state of the device."""

    def __init__(self) -> None:
        """Begin as PyTorch's own generators do."""
        self.generator = torch.Generator().manual_seed(torch.default_generator.initial_seed())

    @contextmanager
    def drawn_from(self) -> Iterator[None]:
        """Let the CPU's kernels draw from the device's state."""
        cpu = torch.default_generator
        kept = cpu.get_state()
        cpu.set_state(self.generator.get_state())
        try:
            yield
        finally:
            self.generator.set_state(cpu.get_state())
            cpu.set_state(kept)


class _Module:
    """What is found as `torch.second`."""

    def __init__(self, state: _State) -> None:
        """Keep the random state."""
        self._state = state

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        assert torch.device(device) == torch.device(NAME, 0)

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        self._state.generator.manual_seed(seed)

    def manual_seed(self, seed: int) -> None:
        self._state.generator.manual_seed(seed)

    def get_rng_state(self, device: Any = NAME) -> Tensor:
        return self._state.generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = NAME) -> None:
        self._state.generator.set_state(state)

    def synchronize(self, device: Any = None) -> None:
        COUNTS["sync:synchronize"] += 1


def _refuse(op: Any, argument: Any, tensor: Tensor, *, alone: bool) -> None:
    """Raise where CUDA does for a tensor of another device; scalars and indices may be of one.

    Args:
        op: The operator.
        argument: Which of its arguments.
        tensor: What was given.
        alone: Whether it is the argument, and not one of a list.
    """
    name = op._schema.name.removeprefix("aten::").rstrip("_")
    written = argument.alias_info is not None and argument.alias_info.is_write
    anywhere = torch.Tag.pointwise in op.tags or name in ("fill", *_TAKES_INDICES)
    scalar = alone and tensor.dim() == 0 and not written and anywhere
    index = argument.name == "indices" and name in _TAKES_INDICES
    if not tensor.is_cpu or not (scalar or index):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {op}: '{argument.name}' is on "
            f"{tensor.device}, others on {NAME}:0"
        )


def _has_mask(indices: Any) -> bool:
    """Return whether a list of indices holds a mask, whose size the host has to know."""
    return isinstance(indices, (list, tuple)) and any(
        isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices
    )


def _kernel(op: Any, state: _State) -> Callable[..., Any]:
    """Return the kernel of an operator: that of the CPU, on the same memory."""
    schema = op._schema
    arguments = {argument.name: argument for argument in schema.arguments}
    names = list(arguments)
    tensors = [n for n, a in arguments.items() if str(a.type) in ("Tensor", "Optional[Tensor]")]
    written = {
        frozenset(a.alias_info.before_set): name
        for name, a in arguments.items()
        if a.alias_info is not None and a.alias_info.is_write
    }
    returned = [
        written.get(frozenset(r.alias_info.before_set)) if r.alias_info is not None else None
        for r in schema.returns
    ]
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    draws = torch.Tag.nondeterministic_seeded in op.tags or "generator" in names
    takes_indices = schema.name.removeprefix("aten::").rstrip("_") in _TAKES_INDICES
    waits = not takes_indices and bool(
        {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(op.tags)
    )

    def run(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        here: dict[str, Any] = {}
        fresh: dict[str, Tensor] = {}
        for name, value in given.items():
            if isinstance(value, Tensor):
                if value.device.type != NAME:
                    _refuse(op, arguments[name], value, alone=True)
                    here[name] = value
                elif arguments[name].is_out and value.numel() == 0:  # may be resized
                    here[name] = fresh[name] = torch.empty(value.shape, dtype=value.dtype)
                else:
                    here[name] = value if is_view else _handed(value, _CPU)
            elif isinstance(value, (list, tuple)):
                here[name] = [_item_here(op, arguments[name], item) for item in value]
            else:
                here[name] = _CPU_DEVICE if isinstance(value, torch.device) else value
        if is_view:
            return op.redispatch(_ON_CPU, *args, **kwargs)
        if waits or (takes_indices and _has_mask(given["indices"])):
            COUNTS[f"sync:{op}"] += 1
        if draws and given.get("generator") is not None:
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
        # A number where a tensor is meant is one that decides no dtype; another overload takes it.
        numbers = any(isinstance(given.get(name), (bool, int, float, complex)) for name in tensors)
        call = op.overloadpacket if numbers else op
        with state.drawn_from() if draws else nullcontext():
            result = call(*[here[n] for n in names[: len(args)]], **{n: here[n] for n in kwargs})
        for name, made in fresh.items():
            if made.numel():
                _give_memory(given[name], made)
        if len(returned) == 1:
            return given[returned[0]] if returned[0] is not None else _back(result)
        if returned:
            pairs = zip(returned, result, strict=True)
            return tuple(given[n] if n is not None else _back(one) for n, one in pairs)
        return None

    return run


def _item_here(op: Any, argument: Any, item: Any) -> Any:
    """Return an item of a list as the CPU's kernel takes it."""
    if not isinstance(item, Tensor):
        return item
    if item.device.type != NAME:
        _refuse(op, argument, item, alone=False)
        return item
    return _handed(item, _CPU)


def _back(result: Any) -> Any:
    """Return what the CPU's kernel gave as the device's."""
    if isinstance(result, Tensor):
        return _to_second(result)
    return [_back(item) for item in result] if isinstance(result, (list, tuple)) else result


def _to_second(tensor: Tensor) -> Tensor:
    return _handed(tensor.detach(), _SECOND)


def _give_memory(tensor: Tensor, made: Tensor) -> None:
    """Let a tensor of the device have the memory of a new one of the CPU."""
    storage = _to_second(made).untyped_storage()
    set_ = torch.ops.aten.set_.source_Storage_storage_offset
    set_.redispatch(_ON_CPU, tensor, storage, 0, made.shape, made.stride())


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between devices, or on the device."""
    if to.device.type == "cpu":
        COUNTS["sync:copy to the CPU"] += 1
    elif source.device.type == "cpu":
        COUNTS["to_device"] += 1
    here = [_handed(t, _CPU) if t.device.type == NAME else t for t in (source, to)]
    here[1].copy_(here[0])
    return to


def _item(tensor: Tensor) -> Any:
    COUNTS["sync:item"] += 1
    return _handed(tensor, _CPU).item()


def _resize(tensor: Tensor, size: Sequence[int], *, memory_format: Any = None) -> Tensor:
    """Resize in place; what fits keeps its memory."""
    made = torch.empty(
        size, dtype=tensor.dtype, memory_format=memory_format or torch.contiguous_format
    )
    room = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
    if made.numel() * made.element_size() <= room:
        set_ = torch.ops.aten.set_.source_Storage_storage_offset
        set_.redispatch(
            _ON_CPU, tensor, tensor.untyped_storage(), tensor.storage_offset(), made.shape,
            made.stride(),
        )  # fmt: skip
    else:
        kept = min(made.numel(), tensor.numel())
        made.view(-1)[:kept].copy_(_handed(tensor, _CPU).reshape(-1)[:kept])
        _give_memory(tensor, made)
    return tensor


def _histogram(x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """Count in bins; of whole numbers too, which accelerators take and the CPU does not."""
    wide = _handed(x, _CPU)
    wide = wide if wide.is_floating_point() else wide.float()
    return _to_second(torch.histc(wide, bins, min, max).to(x.dtype))


def _dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Return what the CPU's dropout gives, which is no fused one, and its factors as the mask."""
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x)
    factors = torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
    return x * factors, factors


def _dropout_backward(grad: Tensor, factors: Tensor, scale: float) -> Tensor:
    return grad * factors


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Choose the kernel of attention as the CPU does; PyTorch asks only devices it knows."""
    aten = torch.ops.aten
    how = {"scale": scale, "enable_gqa": enable_gqa}
    given = (query, key, value, attn_mask, dropout_p, is_causal)
    if aten._fused_sdp_choice(*given, **how) == 0:
        plain: Tensor = aten._scaled_dot_product_attention_math(*given, None, **how)[0]
        return plain
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        shut = torch.full((), -torch.inf, dtype=query.dtype, device=query.device)
        attn_mask = torch.where(attn_mask, torch.zeros_like(shut), shut)
    attended: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return attended


def _apply(module: Any, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Move or cast a module in place, as to CUDA: its parameters stay the objects they were.

    PyTorch would give it others, and ties would be lost: it takes memory of this device for one
    of another kind.
    """
    for child in module.children() if recurse else ():
        child._apply(change)
    for parameter in module._parameters.values():
        for tensor in () if parameter is None else (parameter, parameter.grad):
            if tensor is None:
                continue
            with torch.no_grad():
                changed = change(tensor)
            if changed.device == tensor.device:
                tensor.data = changed
            elif tensor is parameter:
                other = torch.nn.Parameter(changed, requires_grad=tensor.requires_grad)
                torch._C._swap_tensor_impl(tensor, other)
            else:
                torch._C._swap_tensor_impl(tensor, changed.detach())
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


def install() -> None:
    """Register the device with PyTorch; it cannot be taken back."""
    if _LIBRARIES:
        return
    state = _State()
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module(state))
    torch.nn.Module._apply = _apply  # type: ignore[method-assign]
    torch.autograd.set_multithreading_enabled(False)  # flushing denormals is by thread
    library = torch.library.Library("aten", "IMPL")
    own: dict[str, Callable[..., Any]] = {
        "aten::_copy_from": _copy_from,
        "aten::_local_scalar_dense": _item,
        "aten::histc": _histogram,
        "aten::resize_": _resize,
        "aten::native_dropout": _dropout,
        "aten::native_dropout_backward": _dropout_backward,
    }
    for full in torch._C._dispatch_get_all_op_names():
        if full in own or not full.startswith("aten::"):
            continue
        if not torch._C._dispatch_has_kernel_for_dispatch_key(full, "CPU"):
            continue
        name, _, overload = full.removeprefix("aten::").partition(".")
        try:
            op = getattr(getattr(torch.ops.aten, name), overload or "default")
        except (AttributeError, RuntimeError):
            continue  # TorchScript's own
        library.impl(full.removeprefix("aten::"), _kernel(op, state), "PrivateUse1")
    for full, kernel in own.items():
        library.impl(full.removeprefix("aten::"), kernel, "PrivateUse1")
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        library.impl("scaled_dot_product_attention", _attention, key)
    _LIBRARIES.append(library)
