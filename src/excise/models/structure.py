"""Finding the parts of a model of an unknown family by what they are, not what they are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from excise.models.names import is_adapter


class Frame(NamedTuple):
    """Parts outside the blocks: token embedding, list of blocks, last norm, output matrix."""

    embed: str
    blocks: str
    final_norm: str
    head: str


class Block(NamedTuple):
    """Parts of one block, relative to it; `gate` and `experts` may be empty."""

    attention: str
    attention_out: str
    mlp: str
    down: str
    up: str
    gate: str
    experts: str = ""


def sizes(module: nn.Module | None) -> tuple[int, int] | None:
    """Return (in, out) of a linear layer, adapted or quantized ones and `Conv1D` included."""
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(features[0], int) and isinstance(features[1], int):
        return features[0], features[1]
    if isinstance(getattr(module, "nf", None), int) and isinstance(module.nx, int):  # type: ignore[union-attr]
        return module.nx, module.nf  # type: ignore[union-attr, return-value]
    return None


def _path_of(named: Mapping[str, nn.Module], wanted: nn.Module | None) -> str:
    """Return the path of a module, empty when it is not there."""
    return next((n for n, m in named.items() if wanted is not None and m is wanted), "")


def _ask(model: nn.Module, question: str) -> nn.Module | None:
    """Return what a method of a transformers model answers, None when it has no answer."""
    method = getattr(model, question, None)
    try:
        answer = method() if callable(method) else None
    except (AttributeError, NotImplementedError):
        return None
    return answer if isinstance(answer, nn.Module) else None


def find_frame(model: nn.Module, named: Mapping[str, nn.Module], missed: list[str]) -> Frame:
    """Find embedding, blocks, last norm and head; what is not found is added to `missed`.

    Blocks are the list of as many modules as the configuration counts, whatever their classes; of
    several (a vision tower) the one beside the embedding. Elsewhere they are the longest list
    of modules of one class. A list inside another such list is not looked at.
    """
    lists = {n: m for n, m in named.items() if isinstance(m, nn.ModuleList)}
    lists = {n: m for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists)}
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None)
    alike = {n: m for n, m in lists.items() if len({type(child) for child in m}) == 1}
    fitting = {n: m for n, m in lists.items() if len(m) == count} or alike
    embed = _path_of(named, _ask(model, "get_input_embeddings"))
    beside = embed.rpartition(".")[0]
    blocks = max(
        fitting, key=lambda n: (len(fitting[n]), n.rpartition(".")[0] == beside), default=""
    )
    outside = {n: m for n, m in named.items() if n and not (f"{n}.").startswith(f"{blocks}.")}
    if not embed:
        embed = next((n for n, m in outside.items() if isinstance(m, nn.Embedding)), "")
    head = _path_of(named, _ask(model, "get_output_embeddings"))
    if not head and embed:
        vocab = getattr(named[embed], "num_embeddings", -1)
        ends = [n for n, m in outside.items() if (s := sizes(m)) and s[1] == vocab]
        head = ends[-1] if ends else ""
    parent = blocks.rpartition(".")[0]
    norms = [
        n
        for n, m in outside.items()
        if n.rpartition(".")[0] == parent and "norm" in type(m).__name__.lower()
    ]
    size = getattr(text, "hidden_size", None)
    # Beside the list may lie norms of other things than the stream (embeddings by layer).
    wide = [n for n in norms if getattr(getattr(named[n], "weight", None), "shape", ()) == (size,)]
    norms = wide or norms
    for part, words in (
        (blocks, "the blocks (a ModuleList with one module per block)"),
        (embed, "the token embedding (get_input_embeddings or an nn.Embedding)"),
        (head, "the head (get_output_embeddings or a linear layer with one output per token)"),
        (norms, "the last norm (a module whose class is named Norm beside the list of blocks)"),
    ):
        if not part:
            missed.append(words)
    return Frame(embed, blocks, norms[-1] if norms else "", head)


def _linears(named: Mapping[str, nn.Module], path: str) -> dict[str, tuple[int, int]]:
    """Return (in, out) of all linear layers below `path`, adapters left out."""
    return {
        name: size
        for name, module in named.items()
        if name.startswith(f"{path}.") and not is_adapter(name) and (size := sizes(module))
    }


def find_block(named: Mapping[str, nn.Module], path: str, width: int, missed: list[str]) -> Block:
    """Find the parts of the block at `path`; what is not found is added to `missed`.

    Args:
        named: All modules by canonical name.
        path: The block.
        width: Width of the residual stream.
        missed: Receives what was looked for in vain.

    Returns:
        Names relative to the block.
    """
    children = [
        n
        for n, m in named[path].named_children()
        if any(p.dim() > 1 for p in m.parameters()) and "norm" not in type(m).__name__.lower()
    ]
    kinds = {n: f"{n} {type(named[f'{path}.{n}']).__name__}".lower() for n in children}
    attention = next((n for n in children if "attention" in kinds[n] or "attn" in kinds[n]), "")
    rest = [n for n in children if n != attention and sizes(named[f"{path}.{n}"]) is None]
    words = ("mlp", "feedforward", "feed_forward", "ffn", "moe", "experts")
    likely = [n for n in rest if any(word in kinds[n] for word in words)]
    mlp = next(iter(likely or rest), "")
    outs = [n for n, s in _linears(named, f"{path}.{attention}").items() if s[1] == width]
    out = next((n for n in outs if not n.endswith(("q_proj", "k_proj", "v_proj"))), "")
    for part, looked in (
        (attention, "the attention of a block (a child named or classed attention)"),
        (out, "the attention's output (a linear layer with one output per width of the stream)"),
        (mlp, "the MLP of a block (a child with matrices that is not the attention)"),
    ):
        if not part:
            missed.append(looked)
    if not attention or not mlp:
        return Block(attention, "", mlp, "", "", "")
    down, up, gate, experts = _mlp_parts(named, f"{path}.{mlp}", width)
    if not down or not up:
        missed.append(
            f"the projections of the MLP (linear layers or 3-D parameters from and to {width})"
        )
    start = len(path) + 1
    return Block(
        attention, out[start:], mlp, down[start:], up[start:], gate[start:], experts[start:]
    )


def _mlp_parts(named: Mapping[str, nn.Module], mlp: str, width: int) -> tuple[str, str, str, str]:
    """Return paths of down, up, gate and experts of an MLP; empty where there is none."""
    for name, module in named.items():
        if not name.startswith(f"{mlp}.") and name != mlp:
            continue
        cubes = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
        if len(cubes) >= 2:
            return (*_fused_parts(name, cubes, width), name)
        if isinstance(module, nn.ModuleList) and len(module) and _linears(named, f"{name}.0"):
            return (*_dense_parts(_linears(named, f"{name}.0"), width), name)
    return (*_dense_parts(_linears(named, mlp), width), "")


def _dense_parts(linears: Mapping[str, tuple[int, int]], width: int) -> tuple[str, str, str]:
    """Return down, up and gate among linear layers by their sizes."""
    # Routers and shared gates have few outputs; the inside is the widest way into `down`.
    downs = [n for n, (_, out) in linears.items() if out == width]
    if not downs:
        return "", "", ""
    named_down = [n for n in downs if n.rpartition(".")[2] in ("down_proj", "w2", "fc2", "c_proj")]
    down = (named_down or downs)[-1]
    inside = linears[down][0]
    ups = [n for n, s in linears.items() if n != down and s == (width, inside)]
    one = [n for n, s in linears.items() if n != down and s == (width, 2 * inside)]
    if one:
        return down, one[0], one[0]
    gates = [n for n in ups if "gate" in n.rpartition(".")[2] or n.endswith(".w1")]
    if len(ups) < 2:
        return down, ups[0] if ups else "", ""
    gate = gates[0] if gates else ups[0]
    return down, next(n for n in ups if n != gate), gate


def _fused_parts(path: str, cubes: Mapping[str, nn.Parameter], width: int) -> tuple[str, str, str]:
    """Return down, up and gate among 3-D parameters (expert, out, in)."""
    down = next((n for n, p in cubes.items() if "down" in n or n == "w2"), "")
    down = down or next((n for n, p in cubes.items() if p.shape[1] == width), "")
    others = [n for n in cubes if n != down]
    gate = next((n for n in others if "gate" in n or n == "w1"), "")
    up = next((n for n in others if n != gate), "")
    if not up and gate:
        up = gate
    return tuple(f"{path}.{n}" if n else "" for n in (down, up, gate))  # type: ignore[return-value]
