"""Checkpoint transfer: pull activations on forget text to what an early checkpoint held there.

    t = an early checkpoint, ignorant of what is to go;  h0 = the start
    for every block l in `layers`, once:
        A_l, b_l = argmin sum over retain tokens |A t_l + b - h0_l|^2 + ridge |A|^2
        target_l = A_l t_l(forget) + b_l                                            (kept on disk)
    for step s of S, x = s / S:
        L = remove (1 - x / 4) mean over l, tokens and D of (h_l(forget) - target_l)^2
          + retain x KL(p0 || p) on retain text
        AdamW step on L

The map is fitted in closed form from sums over tokens, both models being read up to the last of
these blocks; no other model is in memory while one is trained: targets and the start's last hidden
states are stages on disk. A control, and no cure: its authors' models relearn in 5 to 30 steps.

Source:
    EleutherAI/unlearn@1a6079f (MIT), unlearn/algorithm/checkpoint_transfer_unlearn.py; there is no
    paper.

Shape legend: B rows, T tokens, N tokens of a batch or document, L blocks, D residual width, E
width of the early checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from excise.core.context import Context, Stage
from excise.core.disk import write_text
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.data.stream import Batch, Example, collate, encode, zip_streams
from excise.data.subsample import subsample
from excise.losses import predicting
from excise.methods.base import Paper, Removal
from excise.methods.distillation.cache_kinds import HiddenStates
from excise.methods.distillation.teacher_cache import (
    build_cache,
    document_hash,
    examples_identity,
    same_vocabulary,
)
from excise.methods.tuning import (
    Progress,
    TuningMethod,
    examples_read,
    finish,
    forget_rows,
    looking,
    numbered,
    run_fit,
    state_dir,
    stream,
    tuned,
)
from excise.models.anatomy import backbone
from excise.models.checkpoint import Checkpoint, ModelPath, open_checkpoint
from excise.models.head import final_hidden, head_of, hidden_at
from excise.models.lora import LoRA
from excise.train.distributed import barrier
from excise.train.fit import FitConfig, Term, fit
from excise.train.vocab import chunked_splice

BATCH = 8
"""Rows of a pass over frozen models."""
LOGGED = tuple(layer / 32 for layer in (5, 10, 15, 20, 25, 30))
"""Blocks below the activations that the release's logged runs pull, as a share of all."""


class CheckpointTransfer(TuningMethod):
    """Minimise the distance to an affine image of an early checkpoint's activations, keep KL."""

    name: Literal["checkpoint_transfer"] = "checkpoint_transfer"
    teacher: ModelPath
    """Folder or hub id of an early checkpoint that does not know yet what is to go."""
    layers: tuple[int, ...] = ()
    """Blocks whose outputs are pulled; empty for six, evenly spaced."""
    remove: float = 5.0
    """Weight of the distance."""
    retain: float = 5.0
    """Weight of the KL from the start on retain text."""
    ramp: bool = True
    """Let the weight of the KL grow from 0 over the run and that of the distance fall by a
    quarter."""
    fit_on: Literal["output", "input"] = "output"
    """What of a block the map is fitted on; the release fits inputs and maps outputs."""
    map_rows: int = Field(default=1024, ge=1)
    """Retain rows that the map is fitted on at most."""
    ridge: float = Field(default=0.01, gt=0)
    """Added to the diagonal of the map's normal equations."""
    fit: FitConfig = FitConfig(
        steps=512, lr=1e-3, batch_size=4, schedule="linear", weight_decay=0.01, clip=1.0
    )
    """Steps, rows per step of each role, learning rate."""
    lora: LoRA | None = LoRA(rank=16, alpha=16)
    """Adapter that is trained, on blocks up to the last of `layers`; null for the weights."""

    refuses: ClassVar[Mapping[str, str]] = {
        "sam": "it was published for losses on logits, and this forget term is a distance of states"
    }
    paper: ClassVar[Paper] = Paper(
        "EleutherAI/unlearn: checkpoint activation transfer",
        "https://github.com/EleutherAI/unlearn",
        "RRTrainer.compute_loss with a checkpoint model, OnlineAffineFitter.solve",
        "EleutherAI/unlearn@1a6079f (MIT)",
        {
            "layers": "experiment_logs/checkpoint_transfer_unlearn.md: hidden states 5, 10 ... 30 "
            "of 32, which are outputs of blocks 4, 9 ... 29; the code's newest default is all",
            "remove": "checkpoint_transfer_unlearn.py, remove_coef 5",
            "retain": "checkpoint_transfer_unlearn.py, retain_coef 5; its KL counts every real "
            "token, ours those that predict a scored one",
            "ramp": "checkpoint_transfer_unlearn.py, scheduled_coeff over the examples of an epoch",
            "fit_on": "online_affine_fitter.py fits hidden_states[l], the input of block l, and "
            "since outputs of blocks are hooked maps those: ours is fitted where it is used",
            "map_rows": "EleutherAI/unlearn@1a6079f, train_affine_transform, reads what is there "
            "of 100000 examples, 1024 in the logged runs",
            "ridge": "online_affine_fitter.py, alpha=0.01",
            "fit": "checkpoint_transfer_unlearn.md: lr 1e-3, 512 steps of 4; checkpoint_transfer_"
            "unlearn.py: weight decay 0.01; of transformers' Trainer linear decay, clipping at 1",
            "lora": "checkpoint_transfer_unlearn.py: rank 16, alpha 16, merged; dropout of "
            "0.05, which no adapter has here",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Pull what `start` holds on `domain.forget` to what the early checkpoint held."""
        domain, quality = self.given(domain, ctx)
        teacher, tokenizer = open_checkpoint(self.teacher), start.tokenizer()
        layers = self.pulled(start, teacher)
        read = partial(
            stream, tokenizer=tokenizer, fit=self.fit, ctx=ctx, max_length=self.max_length
        )
        forget = read(forget_rows(domain), purpose="forget")
        retain = read(domain.retain, purpose="retain")

        # Everything frozen, before anything is trained.
        rows = subsample(domain.retain, self.map_rows, by="content", seed=ctx.seed_for("map"))
        mapped = tuple(encode(rows, tokenizer, max_length=self.max_length, only_spans=True))
        steps = self.fit.steps
        stage = MapTeacher(
            teacher,
            start,
            mapped,
            tuple(examples_read(forget, steps)),
            layers,
            self.fit_on,
            self.ridge,
        )
        targets = Targets.open(ctx.run(stage))
        cache = build_cache(start, examples_read(retain, steps), HiddenStates(), ctx)

        model = start.load(dtype=ctx.dtype, device=ctx.device)
        parts = backbone(model)
        pulled = [parts.blocks[layer] for layer in layers]

        def loss(model: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
            x = micro["step"] / steps if self.ramp else 0.0
            batch, kept = micro["forget"], micro["retain"]
            target_NLD = targets.lookup(batch)
            distance = batch.ids_BT.new_zeros((), dtype=torch.float32)
            for i, hidden_BTD in enumerate(hidden_at(model, pulled, batch.inputs)):
                hidden_ND = hidden_BTD[batch.attention_BT].float()
                distance = distance + (hidden_ND - target_NLD[:, i]).square().sum()
            found = cache.lookup(kept)
            hidden_ND = final_hidden(model, kept.inputs)[predicting(kept.target_BT)]
            kl = chunked_splice(hidden_ND, head_of(model), found.kinds_N, found.targets)
            return {
                "forget": Term(distance, float(target_NLD.numel()), self.remove * (1 - x / 4)),
                "retain": Term(*kl, self.retain * (x if self.ramp else 1.0)),
            }

        def counts(micro: Mapping[str, Any]) -> dict[str, float]:
            entries = micro["forget"].num_tokens * len(layers) * parts.d_model
            return {
                "forget": float(entries),
                "retain": float(predicting(micro["retain"].target_BT).sum()),
            }

        progress = Progress(ctx, self.name, steps)
        below = parts.blocks[: max(layers) + 1] if self.lora is not None else ()
        with tuned(model, self.modules or below, self.lora, ctx) as (live, parameters):
            looks = looking(self, live, parameters, tokenizer, domain, ctx)
            loop = fit(
                live, numbered(zip_streams({"forget": forget, "retain": retain})), loss, self.fit,
                ctx, groups={"trained": list(parameters.values())}, counts=counts,
                state_dir=state_dir(ctx), change=self.change,
            )  # fmt: skip
            chosen = run_fit(loop, progress, looks)
            facts = {"layers": list(layers), "teacher": teacher.fingerprint, **targets.facts}
            return finish(
                start, live, parameters, progress, ctx, lora=self.lora,
                extras={**quality, **chosen, **facts},
            )  # fmt: skip

    def pulled(self, start: Checkpoint, teacher: Checkpoint) -> tuple[int, ...]:
        """Return the blocks whose outputs are pulled.

        Raises:
            UserError: If the teacher is the start, has another vocabulary, or lacks a block.
        """
        if teacher.fingerprint == start.fingerprint:
            raise UserError(
                f"checkpoint_transfer: the teacher {self.teacher} is the model itself, which knows "
                "what is to go; name an earlier checkpoint"
            )
        same_vocabulary(teacher, start)
        counts = [backbone(model.shapes).num_blocks for model in (start, teacher)]
        spaced = {max(0, round(share * counts[0]) - 1) for share in LOGGED}
        layers = tuple(sorted(self.layers or spaced))
        if not 0 <= layers[0] <= layers[-1] < min(counts):
            raise UserError(
                f"checkpoint_transfer: layers {list(layers)} are not all among the {counts[0]} "
                f"blocks of the model and the {counts[1]} of the teacher; name 'layers' that are"
            )
        return layers


@dataclass(frozen=True)
class MapTeacher(Stage[Path]):
    """What an early checkpoint held on documents, mapped to where the start would hold it.

    Attributes:
        teacher: The early checkpoint.
        start: The model whose activations are to be pulled there.
        mapped: Encoded retain rows that the map is fitted on.
        examples: Encoded forget rows.
        layers: Blocks.
        fit_on: Whether the map is fitted on outputs of blocks or, as released, on their inputs.
        ridge: Of the map.
    """

    teacher: Checkpoint
    start: Checkpoint
    mapped: tuple[Example, ...] = field(metadata={"identity": examples_identity})
    examples: tuple[Example, ...] = field(metadata={"identity": examples_identity})
    layers: tuple[int, ...]
    fit_on: Literal["output", "input"]
    ridge: float

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "checkpoint-transfer-targets"

    @torch.no_grad()
    def make(self, ctx: Context) -> None:
        """Fit the maps, then write one file of targets per batch of documents."""
        if ctx.rank == 0:
            upto = max(self.layers) + 1
            teacher, start = (
                model.load_prefix(upto, dtype=ctx.dtype, device=ctx.device)
                for model in (self.teacher, self.start)
            )
            maps = self._fit_maps(teacher, start, ctx)
            del start
            index = []
            parts = _in_batches({e.ids: e for e in self.examples}.values())
            for number, part in enumerate(parts):
                batch = collate(part, pad_id=0).to(ctx.device)
                held = _held(teacher, batch, self.layers, "output")
                pairs = zip(held, maps, strict=True)
                target_NLD = torch.stack([m(t_NE).to("cpu", ctx.dtype) for t_NE, m in pairs], 1)
                file = f"targets-{number:05d}.safetensors"
                save_file({"hidden": target_NLD}, ctx.work / file)
                index += [(document_hash(e.ids), file, len(e.ids)) for e in part]
            facts = {"map_explains": [m.explains for m in maps], "map_tokens": maps[0].tokens}
            write_text(ctx.work / "index.json", json.dumps({"docs": index, "facts": facts}))
        barrier(ctx)

    def read(self, folder: Path) -> Path:
        """Return the folder of the targets."""
        return folder

    def _fit_maps(self, teacher: nn.Module, start: nn.Module, ctx: Context) -> list[AffineMap]:
        """Return the map of every block, from one pass of both models over the retain rows."""
        sums: list[MapSums] = []
        for part in _in_batches(self.mapped):
            batch = collate(part, pad_id=0).to(ctx.device)
            both = [_held(model, batch, self.layers, self.fit_on) for model in (teacher, start)]
            sums = sums or [MapSums.of(*pair) for pair in zip(*both, strict=True)]
            for one, t_NE, h_ND in zip(sums, *both, strict=True):
                one.add(t_NE, h_ND)
        return [one.solve(self.ridge) for one in sums]


@dataclass(frozen=True)
class AffineMap:
    """The map t -> t A + b and how well it does.

    Attributes:
        a_ED: Matrix, float64.
        b_D: Shift, float64.
        explains: Share of the variance it explains where it was fitted.
        tokens: Tokens it was fitted on.
    """

    a_ED: Float[Tensor, "E D"]
    b_D: Float[Tensor, " D"]
    explains: float
    tokens: int

    def __call__(self, t_NE: Float[Tensor, "N E"]) -> Float[Tensor, "N D"]:
        """Return what the teacher held, mapped, in float64."""
        return t_NE.double() @ self.a_ED + self.b_D


@dataclass
class MapSums:
    """Sums over tokens from which a ridge regression with intercept follows, in float64.

    Source:
        `OnlineAffineFitter` of EleutherAI/unlearn@1a6079f (MIT): the ridge is added to the centred
        sums as they are, not to means.
    """

    count: int
    t_E: Tensor
    h_D: Tensor
    tt_EE: Tensor
    th_ED: Tensor
    hh: float

    @classmethod
    def of(cls, t_NE: Float[Tensor, "N E"], h_ND: Float[Tensor, "N D"]) -> MapSums:
        """Return sums over no token yet, of the widths and on the device of these."""
        wide, width = t_NE.shape[1], h_ND.shape[1]
        zeros = partial(torch.zeros, dtype=torch.float64, device=t_NE.device)
        return cls(0, zeros(wide), zeros(width), zeros(wide, wide), zeros(wide, width), 0.0)

    def add(self, t_NE: Float[Tensor, "N E"], h_ND: Float[Tensor, "N D"]) -> None:
        """Add tokens: what the teacher held, and what it is to be mapped to."""
        t_NE, h_ND = t_NE.double(), h_ND.double()
        self.count += len(t_NE)
        self.t_E += t_NE.sum(0)
        self.h_D += h_ND.sum(0)
        self.tt_EE += t_NE.T @ t_NE
        self.th_ED += t_NE.T @ h_ND
        self.hh += float(h_ND.square().sum())

    def solve(self, ridge: float) -> AffineMap:
        """Return the minimiser of the squared distance plus `ridge` times the matrix squared."""
        t_E, h_D = self.t_E / self.count, self.h_D / self.count
        tt_EE = self.tt_EE - self.count * torch.outer(t_E, t_E)
        th_ED = self.th_ED - self.count * torch.outer(t_E, h_D)
        eye_EE = torch.eye(len(t_E), dtype=torch.float64, device=t_E.device)
        a_ED = torch.linalg.solve(tt_EE + ridge * eye_EE, th_ED)
        spread = self.hh - self.count * float(h_D.square().sum())
        wrong = spread - 2 * float((a_ED * th_ED).sum()) + float((a_ED * (tt_EE @ a_ED)).sum())
        explains = 1 - wrong / spread if spread > 0 else 0.0
        return AffineMap(a_ED, h_D - t_E @ a_ED, explains, self.count)


def _in_batches(examples: Any) -> list[list[Example]]:
    """Return examples in batches of like length."""
    ordered = sorted(examples, key=lambda e: len(e.ids))
    return [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]


def _held(
    model: nn.Module, batch: Batch, layers: Sequence[int], of: Literal["output", "input"]
) -> list[Float[Tensor, "N D"]]:
    """Return what blocks put out, or are given, at the real tokens of a batch, row by row."""
    blocks = [backbone(model).blocks[layer] for layer in layers]
    return [h_BTD[batch.attention_BT] for h_BTD in hidden_at(model, blocks, batch.inputs, of=of)]


@dataclass(frozen=True)
class Targets:
    """The targets that `MapTeacher` wrote, found by the token ids of a document.

    Attributes:
        docs: File, first token and number of tokens of each document, by hash.
        files: The files, open.
        facts: What the record says of the maps.
    """

    docs: Mapping[str, tuple[str, int, int]]
    files: Mapping[str, Any]
    facts: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Targets:
        """Return the targets in the folder of a finished stage."""
        told = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        docs: dict[str, tuple[str, int, int]] = {}
        ends: dict[str, int] = {}
        for name, file, length in told["docs"]:
            docs[name] = (file, ends.get(file, 0), length)
            ends[file] = ends.get(file, 0) + length
        files = {file: safe_open(folder / file, framework="pt") for file in ends}
        return cls(docs, files, told["facts"])

    def lookup(self, batch: Batch) -> Float[Tensor, "N L D"]:
        """Return the targets of the real tokens of a batch, row by row, in float32."""
        rows = []
        for ids_T, real_T in zip(batch.ids_BT.cpu(), batch.attention_BT.cpu(), strict=True):
            file, first, length = self.docs[document_hash(ids_T[real_T].tolist())]
            rows.append(self.files[file].get_slice("hidden")[first : first + length])
        return torch.cat(rows).to(batch.ids_BT.device, torch.float32)
