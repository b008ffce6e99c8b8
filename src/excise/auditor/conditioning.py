"""Scales put back in place: what an informed attacker does to a model before training it.

Two matrices in a row, or a norm's gain and what reads it, can be scaled against each other without
changing what the model says; training then breaks it at the first step, and rounding ruins it. Who
holds the weights undoes that: every such pair gets equal root mean squares, channel by channel.
Factors are powers of two, so that nothing is rounded, and every move is checked on a few tokens
and taken back where the model says something else. So a layout that is guessed wrong, or an
activation between two matrices, costs a forward pass and no number.

What is left: scales that no second matrix answers for (before a norm, or of the whole residual
stream), which a learning rate by tensor meets (`rates_by_tensor`), and gains of exactly zero, which
`reinit` resets.

Shape legend: R rows, the channels of a pair; G factors, which rows share; B rows of tokens, T
positions, V vocabulary.

Source: that an informed attacker restores the rate at linear cost: arXiv 2602.18868, which gives no
form. Equal ranges of weights in a row: Nagel et al., arXiv 1906.04721, section 4.1. The search for
layouts and its check are this library's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.models.anatomy import Anatomy, BlockExperts, ExpertWeight, anatomy
from excise.models.structure import sizes

PROBE = (2, 16)
"""Rows and tokens on which a move is checked."""


@dataclass(frozen=True)
class ScaledSide:
    """One tensor of a pair.

    Attributes:
        value: A view of a parameter, channels first.
        factor_R: Which factor its rows take; -1 for none.
        bias: Whether it goes along without being measured.
        offset: What its family adds to the stored number: Gemma's gains are stored minus one.
    """

    value: Float[Tensor, "R *rest"]
    factor_R: Int[Tensor, " R"]
    bias: bool = False
    offset: float = 0.0

    def squares(self, count: int) -> tuple[Float[Tensor, " G"], Float[Tensor, " G"]]:
        """Return sum of squares and number of entries by factor."""
        used_R = self.factor_R >= 0
        rows = (self.value[used_R].float() + self.offset).reshape(int(used_R.sum()), -1)
        into_G = rows.new_zeros(count)
        total_G = into_G.index_add(0, self.factor_R[used_R], rows.square().sum(1))
        ones_R = rows.new_full((len(rows),), rows.shape[1])
        return total_G, into_G.index_add(0, self.factor_R[used_R], ones_R)

    def multiply(self, factor_G: Float[Tensor, " G"]) -> None:
        """Multiply every row by its factor in place."""
        used_R = self.factor_R >= 0
        by_R = torch.where(used_R, factor_G[self.factor_R.clamp(min=0)], 1.0)
        by = by_R.view(-1, *[1] * (self.value.dim() - 1)).to(self.value.dtype)
        self.value.copy_((self.value + self.offset) * by - self.offset)


@dataclass(frozen=True)
class ScaledPair:
    """Tensors of which one kind may be multiplied by what the other is divided by.

    Attributes:
        before: What comes first.
        after: What reads it.
        gain: Whether `before` is a norm's gain, whose typical entry shall be 1.
    """

    before: tuple[ScaledSide, ...]
    after: tuple[ScaledSide, ...]
    gain: bool = False

    def sizes(self) -> tuple[Float[Tensor, " G"], Float[Tensor, " G"]]:
        """Return the root mean squares of both kinds by factor."""
        count = 1 + max(int(side.factor_R.max()) for side in (*self.before, *self.after))
        rms = []
        for sides in (self.before, self.after):
            found = [side.squares(count) for side in sides if not side.bias]
            total_G, number_G = (torch.stack(each).sum(0) for each in zip(*found, strict=True))
            rms.append((total_G / number_G.clamp(min=1)).sqrt())
        return rms[0], rms[1]

    def factors(self) -> Float[Tensor, " G"]:
        """Return the powers of two that `before` is multiplied by; 1 where a channel is dead."""
        first_G, second_G = self.sizes()
        alive_G = (first_G > 0) & (second_G > 0) & (first_G + second_G).isfinite()
        one_G = torch.ones_like(first_G)
        if not bool(alive_G.any()):
            return one_G
        share_G = second_G / first_G
        if self.gain:
            # A gain that nothing answers for stays small: it trains faster than small columns.
            gain, column = first_G[alive_G].median(), second_G[alive_G].median()
            share_G = share_G / (gain * column)
        return torch.where(alive_G, torch.exp2(share_G.sqrt().log2().round()), one_G)


@torch.no_grad()
def rebalance(model: nn.Module) -> dict[str, Any]:
    """Give consecutive tensors equal scales in place; what the model says stays as it is.

    Args:
        model: A causal model without adapters, in eval mode. Of one whose parts are not found only
            gains are folded.

    Returns:
        `rescaled`, how many factors were not 1, and `largest_factor`, the most that a channel was
        multiplied or divided by.
    """
    probe_BT = _probe(model)
    before_BTV = _logits(model, probe_BT)
    count, largest = 0, 1.0
    if not bool(before_BTV.isfinite().all()):
        return {"rescaled": count, "largest_factor": largest}
    for readings in (*_gains(model, probe_BT), *_inside_blocks(model)):
        for pairs in readings:
            factors = [pair.factors() for pair in pairs]
            moved = [factor_G[factor_G != 1] for factor_G in factors]
            if _applied(model, probe_BT, before_BTV, pairs, factors):
                count += sum(map(len, moved))
                powers = [float(m.log2().abs().max()) for m in moved if len(m)]
                largest = max(largest, 2 ** max(powers, default=0.0))
                break
    return {"rescaled": count, "largest_factor": largest}


def rates_by_tensor(model: nn.Module, lr: float) -> dict[str, float]:
    """Return a learning rate for every parameter, so that matrices move by equal shares.

    A matrix gets the rate times its root mean square over the median one of all matrices, which a
    few that are scaled do not move; a vector gets the rate.

    Args:
        model: The model.
        lr: Rate of a matrix of typical scale.
    """
    named = dict(model.named_parameters())
    rms = {n: float(p.detach().float().square().mean().sqrt()) for n, p in named.items()}
    known = sorted(rms[n] for n, p in named.items() if p.dim() > 1 and rms[n] > 0)
    typical = known[len(known) // 2] if known else 1.0
    return {n: lr * rms[n] / typical if p.dim() > 1 and rms[n] else lr for n, p in named.items()}


def _probe(model: Any) -> Int[Tensor, "B T"]:
    """Return a few tokens, the same for every model of one vocabulary."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    drawn = torch.randint(vocabulary, PROBE, generator=torch.Generator().manual_seed(0))
    return drawn.to(next(model.parameters()).device)


def _logits(model: nn.Module, probe_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
    """Return what a model says of the probe."""
    logits_BTV: Tensor = model(input_ids=probe_BT, use_cache=False).logits
    return logits_BTV.float()


def _applied(
    model: nn.Module,
    probe_BT: Int[Tensor, "B T"],
    before_BTV: Float[Tensor, "B T V"],
    pairs: Sequence[ScaledPair],
    factors: Sequence[Tensor],
) -> bool:
    """Apply factors to pairs; take them back, and return False, where the model changes."""
    if all(bool((factor_G == 1).all()) for factor_G in factors):
        return True
    kept = [(side.value, side.value.clone()) for p in pairs for side in (*p.before, *p.after)]
    for pair, factor_G in zip(pairs, factors, strict=True):
        for side in pair.before:
            side.multiply(factor_G)
        for side in pair.after:
            side.multiply(1 / factor_G)
    after_BTV = _logits(model, probe_BT)
    # Powers of two round nothing; gains stored minus one, and sums in another order, do.
    slack = max(1e-4, 4 * torch.finfo(next(model.parameters()).dtype).eps)
    if float((after_BTV - before_BTV).abs().max()) <= slack * float(before_BTV.abs().max()):
        return True
    for value, old in kept:
        value.copy_(old)
    return False


Readings = list[list[ScaledPair]]
"""Ways to read one part of a model; the first that leaves the function alone is right."""


def _by_output(module: Any) -> Tensor:
    """Return a layer's matrix, outputs first: `Conv1D` has inputs first."""
    weight: Tensor = module.weight
    return weight.t() if hasattr(module, "nf") else weight


def _each(value: Tensor, **more: Any) -> ScaledSide:
    """Return a side of which every row has a factor of its own."""
    return ScaledSide(value, torch.arange(len(value), device=value.device), **more)


def _gains(model: Any, probe_BT: Int[Tensor, "B T"]) -> Iterator[Readings]:
    """Yield every norm's gain with the matrices that read its output and nothing else does.

    Which do is seen while the model runs: their input is the very tensor that the norm put out.
    """
    named = dict(model.named_modules())
    norms = {n: m for n, m in named.items() if _is_gain(m)}
    experts = _experts_by_module(model)
    outputs: dict[int, tuple[str, Tensor]] = {}
    read: dict[str, dict[str, None]] = {name: {} for name in norms}

    def note(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):  # and kept, so that its memory is not used again
                outputs[output.untyped_storage().data_ptr()] = (name, output)

        return hook

    def look(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for value in (*inputs, *kwargs.values()):
                if isinstance(value, Tensor):
                    norm = outputs.get(value.untyped_storage().data_ptr())
                    if norm is not None:
                        read[norm[0]].setdefault(name)

        return hook

    with ExitStack() as hooks:
        for name, module in norms.items():
            hooks.callback(module.register_forward_hook(note(name)).remove)
        for name, module in named.items():
            weight = getattr(module, "weight", None)
            if name in experts or (isinstance(weight, Tensor) and weight.dim() == 2):
                handle = module.register_forward_pre_hook(look(name), with_kwargs=True)
                hooks.callback(handle.remove)
        _logits(model, probe_BT)
    embedding = model.get_input_embeddings().weight
    for name, readers in read.items():
        norm, width = norms[name], norms[name].weight.numel()
        columns = [m for r in readers if r in experts for m in _columns(model, experts[r])]
        layers = [named[r] for r in readers if r not in experts]
        columns += [_by_output(layer).t() for layer in layers]
        tied = any(layer.weight is embedding for layer in layers)
        if tied or not columns or any(len(c) != width for c in columns):
            continue
        after = tuple(_each(c) for c in columns)
        biases = [norm.bias] if getattr(norm, "bias", None) is not None else []
        bias = tuple(_each(b, bias=True) for b in biases)
        yield [
            [ScaledPair((_each(norm.weight, offset=o), *bias), after, gain=True)]
            for o in (0.0, 1.0)
        ]


def _is_gain(module: nn.Module) -> bool:
    """Return whether a module is a norm with a gain."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1


def _parts(model: nn.Module) -> Anatomy | None:
    """Return where a model's parts are, None where they are not found."""
    try:
        return anatomy(model)
    except UserError:
        return None


def _experts_by_module(model: nn.Module) -> dict[str, BlockExperts]:
    """Return the experts of every block by its MLP, whose input they and the router read."""
    parts = _parts(model)
    if parts is None:
        return {}
    return {m: e for m, e in zip(parts.mlp, parts.experts, strict=True) if e is not None}


def _columns(model: nn.Module, experts: BlockExperts) -> list[Tensor]:
    """Return the matrices into a block's experts, inputs first."""
    names = dict.fromkeys(weight.parameter for weight in (*experts.up, *experts.gate))
    at = -2 if experts.transposed else -1
    return [model.get_parameter(name).movedim(at, 0) for name in names]


_MLP_NAMES = (("up_proj", "down_proj"), ("w3", "w2"), ("fc1", "fc2"))
_OUT_NAMES = ("o_proj", "out_proj")
"""How families name what lies outside their anatomy (shared experts, an MLP beside experts), and
where parts are not found."""


def _inside_blocks(model: Any) -> Iterator[Readings]:
    """Yield the pairs inside MLPs, experts and attention."""
    parts = _parts(model)
    dense: dict[Any, tuple[Any, tuple[int, int | None]]] = {}
    attentions: dict[Any, Any] = {}
    for i in range(parts.num_blocks if parts else 0):
        assert parts is not None
        experts = parts.experts[i]
        if experts is not None:
            yield [_expert_pairs(model, experts)]
        else:
            up, down = (model.get_submodule(paths[i]) for paths in (parts.mlp_up, parts.mlp_down))
            dense[up] = down, parts.slices.get("mlp_up", (0, None))
        out = model.get_submodule(parts.attention_out[i])
        attentions[model.get_submodule(parts.attention[i])] = out
    for module in model.modules():
        below = dict(module.named_children())
        for one, two in _MLP_NAMES:
            if sizes(below.get(one)) and sizes(below.get(two)):
                dense.setdefault(below[one], (below[two], (0, None)))
        for name in _OUT_NAMES:
            if sizes(below.get(name)) and "v_proj" in below:
                attentions.setdefault(module, below[name])
    for up, (down, span) in dense.items():
        yield [[_mlp(up, down, *span)]]
    for module, out in attentions.items():
        heads = _Heads.of(model, module, out)
        if heads is not None:
            yield heads.values()
            yield heads.queries()


def _mlp(up: Any, down: Any, start: int, stop: int | None) -> ScaledPair:
    """Return what goes into a dense MLP beside its gate, and what comes out of it."""
    before = [_each(_by_output(up)[start:stop])]
    if up.bias is not None:
        before.append(_each(up.bias[start:stop], bias=True))
    return ScaledPair(tuple(before), (_each(_by_output(down).t()),))


def _expert_pairs(model: nn.Module, experts: BlockExperts) -> list[ScaledPair]:
    """Return the same for every expert; none where up and gate alternate in one matrix."""
    if experts.gate == experts.up and not experts.slices:
        return []
    start, stop = experts.slices.get("mlp_up", (0, None))
    pairs = []
    for one, two in zip(experts.up, experts.down, strict=True):
        up, down = (_matrix(model, weight, experts.transposed) for weight in (one, two))
        pairs.append(ScaledPair((_each(up[start:stop]),), (_each(down.t()),)))
    return pairs


def _matrix(model: nn.Module, weight: ExpertWeight, transposed: bool) -> Tensor:
    """Return a matrix of one expert, outputs first."""
    whole = model.get_parameter(weight.parameter)
    matrix = whole if weight.index is None else whole[weight.index]
    return matrix.t() if transposed else matrix


@dataclass(frozen=True)
class _Heads:
    """The matrices of one attention, and how their outputs fall into heads.

    Attributes:
        module: The attention.
        out: Its output.
        rest: Its other linear layers by name.
        heads: Heads of queries.
        groups: Heads of keys and values.
        width: Channels of a head.
    """

    module: Any
    out: Any
    rest: dict[str, Any]
    heads: int
    groups: int
    width: int

    @classmethod
    def of(cls, model: Any, module: Any, out: Any) -> _Heads | None:
        """Read an attention; None where it does not fall into the configuration's heads."""
        config = model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", 0)
        groups = getattr(config, "num_key_value_heads", None) or heads
        inside, _ = sizes(out) or (0, 0)
        if not heads or inside % heads or heads % groups:
            return None
        rest = {n: m for n, m in module.named_modules() if sizes(m) and m is not out}
        return cls(module, out, rest, heads, groups, inside // heads)

    def _rows(self, device: Any) -> Iterator[dict[str, tuple[Any, Tensor]]]:
        """Yield readings of where queries, keys and values are: layer, and row by (group, ., d)."""
        g, d, share = self.groups, self.width, self.heads // self.groups
        named = {n.rpartition(".")[2]: m for n, m in self.rest.items()}
        each = {"q": share, "k": 1, "v": 1}
        if all(f"{p}_proj" in named for p in each):
            layers = {p: named[f"{p}_proj"] for p in each}
            if all((sizes(layers[p]) or (0, 0))[1] == g * each[p] * d for p in each):
                yield {
                    p: (layers[p], torch.arange(g * n * d, device=device).view(g, n, d))
                    for p, n in each.items()
                }
            return
        total = g * (share + 2) * d
        for layer in self.rest.values():
            if (sizes(layer) or (0, 0))[1] != total:
                continue
            index = torch.arange(total, device=device)
            flat = index.split([g * n * d for n in each.values()])
            yield {
                p: (layer, part.view(g, n, d))
                for (p, n), part in zip(each.items(), flat, strict=True)
            }
            mixed = index.view(g, share + 2, d).split(list(each.values()), dim=1)
            yield {p: (layer, part) for p, part in zip(each, mixed, strict=True)}

    def _sides(self, layer: Any, row: Tensor, factor: Tensor) -> tuple[ScaledSide, ...]:
        """Return a layer's matrix and bias, rows `row` of which take `factor`."""
        weight = _by_output(layer)
        factor_R = torch.full((len(weight),), -1, device=weight.device)
        factor_R[row.flatten()] = factor.expand_as(row).flatten()
        sides = [ScaledSide(weight, factor_R)]
        if layer.bias is not None:
            sides.append(ScaledSide(layer.bias, factor_R, bias=True))
        return tuple(sides)

    def values(self) -> Readings:
        """Return values and output, channel by channel; a group's heads share their factors."""
        out = _by_output(self.out).t()
        g, d, share = self.groups, self.width, self.heads // self.groups
        factor = torch.arange(g * d, device=out.device).view(g, 1, d)
        after = ScaledSide(out, factor.expand(g, share, d).flatten())
        return [
            [ScaledPair(self._sides(*reading["v"], factor), (after,))]
            for reading in self._rows(out.device)
        ]

    def queries(self) -> Readings:
        """Return queries and keys: by channel, by pair of channels that turn together, by head."""
        device = self.out.weight.device
        g, d, half = self.groups, self.width, max(1, self.width // 2)
        at, group = torch.arange(d, device=device), torch.arange(g, device=device).view(g, 1, 1)
        ways = (at, at % half, at // 2, at * 0)
        norms = [getattr(self.module, name, None) for name in ("q_norm", "k_norm")]
        if all(norm is not None and _is_gain(norm) for norm in norms):
            return self._gains(norms, ways)
        return [
            [
                ScaledPair(
                    self._sides(*reading["q"], group * d + way),
                    self._sides(*reading["k"], group * d + way),
                )
            ]
            for reading in self._rows(device)
            for way in ways
        ]

    def _gains(self, norms: Sequence[Any], ways: Sequence[Tensor]) -> Readings:
        """Return the gains of norms on queries and keys, of one head or of all."""
        whole = norms[0].weight.numel() != self.width
        readings: Readings = []
        for offset in (0.0, 1.0):
            for way in ways:
                sides = []
                for norm in norms:
                    count = norm.weight.numel() // self.width
                    of = torch.arange(count, device=way.device) * (self.groups if whole else 1)
                    group = (of // count).view(-1, 1) * self.width
                    sides.append(ScaledSide(norm.weight, (group + way).flatten(), offset=offset))
                readings.append([ScaledPair((sides[0],), (sides[1],))])
        return readings
