"""Direction: one direction of the residual stream is taken out of every matrix that writes to it.

    for every block l:   r_l = mean of h_l(forget) - mean of h_l(retain), over tokens
    choose l:            of the first blocks whose direction, cleared, moves retain text by a KL of
                         at most `max_kl`, the one that raises the loss on forget text most (dev)
    r = r_l / |r_l|
    for every W (and bias) that writes to the stream:   W <- W - r r^T W

with h_l the output of block l. Writers are the embeddings, the attention's output and the MLP's
down-projection of every block, of every expert too. Where a norm stands between a matrix and the
stream (Gemma 2, OLMo 2) with weights g, its output has no part along r exactly where W has none
along g * r, which is then taken out in the place of r.

Source:
    Arditi et al. 2024, arXiv:2406.11717, sections 2.3 and 2.4, for refusals; the same with forget
    and retain text in the place of harmful and harmless instructions.

Shape legend: B rows, T tokens, N scored tokens, L blocks, D residual width.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain, Rows, all_rows
from excise.data.stream import Batch, Tokenizer, collate, encode
from excise.data.subsample import subsample
from excise.losses import Summed, predicting
from excise.methods.base import Cost, Paper, PostHoc, Removal
from excise.methods.tuning import forget_rows, write_edit
from excise.models.anatomy import Anatomy, anatomy
from excise.models.checkpoint import Checkpoint
from excise.models.head import final_hidden, head_of, hidden_at
from excise.models.hooks import Edit, edit
from excise.models.names import find_module, modules_by_name
from excise.models.structure import sizes
from excise.train.vocab import HiddenTarget, chunked_kl, chunked_nll, next_tokens

BATCH = 8
"""Rows of a forward pass."""
DEPTH = 0.8
"""Share of the blocks whose directions are tried, from the first."""
FILE = "direction.safetensors"


class Direction(PostHoc):
    """Take the difference of mean activations out of all weights that write to the stream."""

    name: Literal["direction"] = "direction"
    layer: int | None = Field(default=None, ge=0)
    """Block whose output gives the direction; missing for the best on `dev`."""
    max_kl: float = Field(default=0.1, gt=0)
    """KL in nats by which clearing may move predictions on `dev` retain text."""
    tokens: Literal["scored", "all"] = "scored"
    """Tokens in the means: those that predict a scored one, or all; never the first of a row."""
    rows: int = Field(default=128, ge=1)
    """Rows of each role in the means at most."""
    dev_rows: int = Field(default=32, ge=1)
    """Rows of each role of `dev` that a block is chosen on at most."""
    embedding: bool = True
    """Take it out of the embedding too; where the head is tied to that, it changes with it."""
    max_length: int = Field(default=512, ge=2)
    """Tokens per row."""

    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("lora", "stop", "fit", "modules", "sam", "drop_components"),
        "a direction is projected out of all that writes to the stream, and nothing is trained",
    )
    paper: ClassVar[Paper] = Paper(
        "Refusal in language models is mediated by a single direction",
        "arXiv:2406.11717",
        "sections 2.3 (difference of means) and 2.4 (weight orthogonalization)",
        "andyrdt/refusal_direction@9d852fa (Apache-2.0)",
        {
            "layer": "pipeline/submodules/select_direction.py: best score on validation among the "
            "first 80 % of the blocks; there that of refusing, here the loss on forget "
            "text, and the output of the embedding is no candidate",
            "max_kl": "pipeline/submodules/select_direction.py, kl_threshold=0.1, there at the "
            "last token of a prompt, here at every scored token",
            "tokens": "pipeline/submodules/generate_directions.py: the tokens of the template "
            "behind the instruction, one by one; plain text has none",
            "rows": "pipeline/config.py, n_train = 128",
            "dev_rows": "pipeline/config.py, n_val = 32",
            "embedding": "andyrdt/refusal_direction@9d852fa, pipeline/model_utils, take it out of "
            "embed_tokens, also where that is tied; without what stands between a matrix and the "
            "stream, such as Gemma 2's norms",
        },
    )

    @property
    def readings(self) -> float:
        """One pass, forward alone."""
        return 1 / 3

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Clear the direction of `domain.forget` from the weights."""
        began = time.monotonic()
        domain, quality = self.given(domain, ctx)
        model, tokenizer = start.load(dtype=ctx.dtype, device=ctx.device), start.tokenizer()
        parts = anatomy(model)
        writes = writers(model, parts, embedding=self.embedding)
        forget = self.batches(forget_rows(domain), self.rows, tokenizer, ctx)
        retain = self.batches(domain.retain, self.rows, tokenizer, ctx)
        raw_LD = self.means(model, parts, forget, "forget")
        raw_LD -= self.means(model, parts, retain, "retain")
        reads = _tokens(forget) + _tokens(retain)

        # Which block gives the direction.
        facts: dict[str, Any] = dict(quality)
        layer = self.layer
        if layer is None:
            layer, table, read = self.choose(model, parts, writes, raw_LD, domain, tokenizer, ctx)
            facts["candidates"] = table
            reads += read
        elif layer >= parts.num_blocks:
            raise UserError(
                f"direction: layer {layer} is beyond this model of {parts.num_blocks} blocks; name "
                f"one from 0 to {parts.num_blocks - 1}"
            )
        if not float(raw_LD[layer].norm()) > 0:
            raise UserError(
                f"direction: forget and retain rows have the same mean after block {layer}; are "
                "they the same rows?"
            )
        r_D = _unit(raw_LD[layer]).float().cpu()
        along = seen_by(writes, model, r_D)
        del model  # the weights are read one by one from here on

        # W <- W - r r^T W
        changed: dict[str, Tensor] = {}
        for write in writes:
            for name, axis in write.parameters.items():
                own = start.own_name(name)
                changed[own] = cleared(start.weights_of([own])[own], along[write.point], axis)
        if ctx.rank == 0:
            save_file({"direction": r_D}, str(ctx.work / FILE))
        facts |= {
            "layer": layer,
            "direction_norm": float(raw_LD[layer].norm()),
            "head_changed": parts.tied and self.embedding,
            "files": {"direction": FILE},
        }
        cost = Cost(0, reads, 2.0 * start.num_parameters * reads, time.monotonic() - began)
        removal = write_edit(start, changed, ctx, extras=facts, cost=cost, history=())
        left = _left(removal.checkpoint, parts, [*forget[:1], *retain[:1]], r_D, ctx)
        if self.embedding and left > _rounding(changed, ctx):
            raise UserError(
                f"direction: {left:.2g} of the residual stream still lies along the direction, so "
                f"that a {parts.family} model has other parts that write to it; this method cannot "
                "clear it"
            )
        return replace(removal, extras={**removal.extras, "left": left})

    def batches(self, rows: Rows, count: int, tokenizer: Tokenizer, ctx: Context) -> list[Batch]:
        """Return at most `count` rows in batches, as many units as possible."""
        examples = encode(
            subsample(rows, count), tokenizer, max_length=self.max_length, only_spans=True
        )
        return [
            collate(examples[i : i + BATCH], pad_id=tokenizer.pad_token_id).to(ctx.device)
            for i in range(0, len(examples), BATCH)
        ]

    def counted(self, batch: Batch) -> Bool[Tensor, "B T"]:
        """Return the tokens in the means; the norm of a row's first is orders larger."""
        later_BT = batch.attention_BT & (batch.attention_BT.cumsum(1) > 1)
        return later_BT if self.tokens == "all" else later_BT & predicting(batch.target_BT)

    @torch.no_grad()
    def means(
        self, model: nn.Module, parts: Anatomy, batches: Sequence[Batch], role: str
    ) -> Float[Tensor, "L D"]:
        """Return the mean residual stream after every block, in float64.

        Raises:
            UserError: If no token counts.
        """
        total_LD = torch.zeros(parts.num_blocks, parts.d_model, dtype=torch.float64)
        count = 0
        for batch in batches:
            mask_BT = self.counted(batch)
            count += int(mask_BT.sum())
            for layer, hidden_BTD in enumerate(hidden_at(model, parts.blocks, batch.inputs)):
                total_LD[layer] += hidden_BTD[mask_BT].double().sum(0).cpu()
        if not count:
            raise UserError(
                f"direction: no {role} row has a token to take a mean over beside its first; give "
                "longer rows or set tokens to 'all'"
            )
        return total_LD / count

    @torch.no_grad()
    def choose(
        self,
        model: nn.Module,
        parts: Anatomy,
        writes: Sequence[Write],
        raw_LD: Float[Tensor, "L D"],
        domain: Domain,
        tokenizer: Tokenizer,
        ctx: Context,
    ) -> tuple[int, list[dict[str, float]], int]:
        """Return the block whose direction is best to clear, what each block gave, tokens read.

        The model is run with what every matrix puts out cleared, which is what clearing the matrix
        does; a tied head is cleared by what goes into it.

        Raises:
            UserError: If `dev` is empty, or every direction moves retain text too far.
        """
        rows = all_rows(domain.dev_forget), domain.dev_retain
        if not all(rows):
            raise UserError(
                f"domain '{domain.name}' has no dev rows to choose a block on; set 'layer', or "
                "give --dev-forget and --dev-retain"
            )
        forget, retain = (self.batches(part, self.dev_rows, tokenizer, ctx) for part in rows)
        head = head_of(model).detach()
        original = [final_hidden(model, batch.inputs).flatten(0, 1) for batch in retain]
        table: list[dict[str, float]] = []
        for layer in range(max(1, int(DEPTH * parts.num_blocks) - 1)):
            r_D = _unit(raw_LD[layer]).float().cpu()
            along = seen_by(writes, model, r_D)
            edits = {point: _clearing(u_D.to(original[0])) for point, u_D in along.items()}
            head_edit = _clearing(r_D.to(original[0]))

            def read(batch: Batch, head_edit: Edit = head_edit) -> Float[Tensor, "N D"]:
                hidden_ND = final_hidden(model, batch.inputs).flatten(0, 1)
                return head_edit(hidden_ND) if parts.tied and self.embedding else hidden_ND

            with edit(model, edits):
                losses = [chunked_nll(read(b), head, next_tokens(b)) for b in forget]
                kls = [
                    chunked_kl(
                        read(batch), head, HiddenTarget(before_ND, head),
                        mask_N=predicting(batch.target_BT).flatten(),
                    )
                    for batch, before_ND in zip(retain, original, strict=True)
                ]  # fmt: skip
            table.append({"layer": layer, "forget": _mean(losses), "kl": _mean(kls)})
        fitting = [row for row in table if row["kl"] <= self.max_kl]
        if not fitting:
            least = min(table, key=lambda row: row["kl"])
            raise UserError(
                f"direction: clearing moves predictions on dev_retain by a KL of at least "
                f"{least['kl']:.3g} (block {least['layer']}), more than max_kl {self.max_kl:g}; "
                "raise max_kl, or set 'layer'"
            )
        best = max(fitting, key=lambda row: row["forget"])
        read_tokens = len(table) * (_tokens(forget) + _tokens(retain)) + _tokens(retain)
        return int(best["layer"]), table, read_tokens


@dataclass(frozen=True)
class Write:
    """A part that adds to the residual stream.

    Attributes:
        point: Module whose output the matrices make.
        parameters: Matrices and biases by name, with the axis that is the stream.
        norm: Norm between them and the stream; empty for none.
    """

    point: str
    parameters: Mapping[str, int]
    norm: str = ""


def writers(model: nn.Module, parts: Anatomy, *, embedding: bool = True) -> tuple[Write, ...]:
    """Return everything that adds to the residual stream of a model.

    Args:
        model: The model, not wrapped.
        parts: Its anatomy.
        embedding: Whether embeddings are among it: of tokens, and of positions where they are
            learned.
    """
    named, parameters = modules_by_name(model), dict(model.named_parameters())
    inside = tuple(f"{block}." for block in parts.blocks)

    def linear(path: str) -> dict[str, int]:
        axis = 1 if hasattr(named[path], "nf") else 0  # GPT-2 stores (in, out)
        both = {f"{path}.weight": axis, f"{path}.bias": 0}
        return {name: at for name, at in both.items() if name in parameters}

    writes = [
        Write(path, {f"{path}.weight": 1})
        for path, module in named.items()
        if embedding
        and isinstance(module, nn.Embedding)
        and module.embedding_dim == parts.d_model
        and not path.startswith(inside)
    ]
    for i, block in enumerate(parts.blocks):
        downs: dict[str, int] = {}
        experts = parts.experts[i]
        for down in experts.down if experts is not None else ():
            if experts is not None and down.index is not None:  # all experts in one parameter
                downs[down.parameter] = 2 if experts.transposed else 1
                downs |= {n: 1 for n in (f"{down.parameter}_bias",) if n in parameters}
        leaf = parts.mlp_down[i].rpartition(".")[2]
        for path, module in named.items():
            size = sizes(module) if path.startswith(f"{parts.mlp[i]}.") else None
            if size and size[1] == parts.d_model and path.rpartition(".")[2] == leaf:
                downs |= linear(path)  # the only one, or one of each expert, shared ones too
        # Where a norm follows the MLP, another one follows the attention.
        norms = (f"{block}.post_attention_layernorm", f"{block}.post_feedforward_layernorm")
        after = norms if norms[1] in named else ("", "")
        attention = parts.attention_out[i]
        writes.append(Write(attention, linear(attention), after[0]))
        writes.append(Write(parts.mlp[i], downs, after[1]))
    return tuple(writes)


def seen_by(
    writes: Sequence[Write], model: nn.Module, r_D: Float[Tensor, " D"]
) -> dict[str, Float[Tensor, " D"]]:
    """Return which direction of its own output every writer must lack, by its point.

    Args:
        writes: The writers.
        model: The model they are of.
        r_D: The direction in the stream, a unit vector on the CPU.
    """
    return {w.point: _unit(r_D * _gain(model, w.norm, len(r_D))) if w.norm else r_D for w in writes}


def cleared(weight: Tensor, u_D: Float[Tensor, " D"], axis: int) -> Tensor:
    """Return W - u u^T W in the dtype of the weight.

    Args:
        weight: Matrix, bias, or matrices of several experts.
        u_D: Unit vector.
        axis: Axis of the weight that is the residual stream.

    Source:
        arXiv:2406.11717, section 2.4; `get_orthogonalized_matrix` of the release rounds u to the
        dtype of the weight first, where this is computed in float32.
    """
    rows = weight.float().movedim(axis, -1)
    rows = rows - (rows @ u_D)[..., None] * u_D
    return rows.movedim(-1, axis).to(weight.dtype).contiguous()


def _unit(vector_D: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    unit_D: Tensor = vector_D / vector_D.norm().clamp(min=1e-30)
    return unit_D


def _clearing(u_D: Float[Tensor, " D"]) -> Edit:
    return lambda x: x - (x @ u_D)[..., None] * u_D


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(batch.num_tokens for batch in batches)


def _mean(sums: Sequence[Summed]) -> float:
    """Return the mean of sums that have counts."""
    return float(sum(float(total) for total, _ in sums) / max(1.0, sum(n for _, n in sums)))


@torch.no_grad()
def _gain(model: nn.Module, norm: str, width: int) -> Float[Tensor, " D"]:
    """Return what a root-mean-square norm multiplies each entry by, whatever its weight means."""
    weight = next(find_module(model, norm).parameters())
    # So large that the norm's epsilon is nothing beside it.
    same: Tensor = find_module(model, norm)(torch.full_like(weight, 1e3).expand(1, 1, width))
    return same[0, 0].float().cpu()


@torch.no_grad()
def _left(
    edited: Checkpoint, parts: Anatomy, batches: Sequence[Batch], r_D: Tensor, ctx: Context
) -> float:
    """Return the largest share of the residual stream along the direction, over blocks."""
    model = edited.load(dtype=ctx.dtype, device=ctx.device)
    largest = 0.0
    for batch in batches:
        for hidden_BTD in hidden_at(model, parts.blocks, batch.inputs):
            hidden_ND = hidden_BTD[batch.attention_BT].float()
            share_N = (hidden_ND @ r_D.to(hidden_ND)).abs() / hidden_ND.norm(dim=-1)
            largest = max(largest, float(share_N.max()))
    return largest


def _rounding(changed: Mapping[str, Tensor], ctx: Context) -> float:
    """Return what may be left of a direction in weights and activations of these dtypes."""
    dtypes = {ctx.dtype, *(tensor.dtype for tensor in changed.values())}
    return max(1e-4, *(8 * torch.finfo(dtype).eps for dtype in dtypes))
