"""The stages of a run beside removals and attacks: random models, and scores of any model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from excise.core.context import Context, Stage
from excise.core.disk import write_text
from excise.data.domain import Domain
from excise.evals.extra import extra_scores
from excise.evals.generate import continuations
from excise.evals.lm_eval_bridge import run_lm_eval
from excise.evals.score import evaluate
from excise.models.checkpoint import Checkpoint, save_model, tokenizer_identity
from excise.models.delta import export_adapter
from excise.models.spec import Scratch
from excise.models.tiny import tiny_model
from excise.record import Item, Score
from excise.requests.recipe import EvalSpec


@dataclass(frozen=True)
class MakeModel(Stage[Checkpoint]):
    """A random model and its tokenizer; equal seeds give equal bytes.

    Attributes:
        scratch: Its architecture.
        tokenizer: The tokenizer, in memory.
        seed: Seed of the weights.
    """

    scratch: Scratch
    tokenizer: Any = field(metadata={"identity": tokenizer_identity})
    seed: int

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "init"

    def make(self, ctx: Context) -> None:
        """Write the model."""
        shutil.rmtree(ctx.work / "model", ignore_errors=True)  # of a run that was killed
        marks = ("pad_token_id", "bos_token_id", "eos_token_id")
        ids = {mark: getattr(self.tokenizer, mark) for mark in marks}
        overrides: dict[str, Any] = {m: i for m, i in ids.items() if i is not None}
        overrides |= self.scratch.overrides
        model = tiny_model(
            self.scratch.family,
            seed=self.seed,
            vocab=len(self.tokenizer),
            width=self.scratch.width,
            blocks=self.scratch.blocks,
            **overrides,
        )
        save_model(model, self.tokenizer, ctx.work / "model")

    def read(self, folder: Path) -> Checkpoint:
        """Return the model."""
        return Checkpoint(folder / "model")


@dataclass(frozen=True)
class MergeAdapter(Stage[Checkpoint]):
    """A LoRA adapter added to the model that it edits.

    Attributes:
        adapter: Folder of the adapter, as peft saves it.
        base: The model.
    """

    adapter: Path
    base: Checkpoint

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "merged"

    def make(self, ctx: Context) -> None:
        """Write the merged model."""
        shutil.rmtree(ctx.work / "model", ignore_errors=True)  # of a run that was killed
        export_adapter(self.adapter, self.base, ctx.work / "model")

    def read(self, folder: Path) -> Checkpoint:
        """Return the model."""
        return Checkpoint(folder / "model")


@dataclass(frozen=True)
class Scored:
    """What `ScoreModel` gives: scores, items, and (set, prompt, expected, output) rows."""

    scores: tuple[Score, ...]
    items: tuple[Item, ...]
    samples: tuple[tuple[str, str, str, str], ...]

    def named(self, model: str) -> Scored:
        """Return the same about a model of that name; equal models are scored once."""
        name = {"model": model}
        return Scored(
            tuple(score.model_copy(update=name) for score in self.scores),
            tuple(item.model_copy(update=name) for item in self.items),
            self.samples,
        )


@dataclass(frozen=True)
class ScoreModel(Stage[Scored]):
    """A model scored on every set of a domain, and a few prompts continued by it.

    Attributes:
        checkpoint: The model.
        domain: Rows by role.
        evaluate: How much is scored, and by what.
    """

    version: ClassVar[int] = 4

    checkpoint: Checkpoint
    domain: Domain
    evaluate: EvalSpec

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "scores"

    def make(self, ctx: Context) -> None:
        """Score the model and write what it gave."""
        asked = self.evaluate
        model = self.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
        tokenizer = self.checkpoint.tokenizer()
        scores, items = evaluate(
            model,
            tokenizer,
            self.domain,
            name="model",
            max_rows=asked.max_rows,
            max_length=asked.max_length,
        )
        for extra in asked.scores:
            more, rows = extra_scores(
                model, tokenizer, self.domain, extra, max_length=asked.max_length
            )
            scores, items = [*scores, *more], [*items, *rows]
        if asked.lm_eval:
            scores += run_lm_eval(model, tokenizer, asked.lm_eval, asked.lm_eval_limit)
        samples = [] if self.domain.sensitive else self._samples(model, tokenizer)
        data = {
            "scores": [s.model_dump(mode="json") for s in scores],
            "items": [i.model_dump(mode="json") for i in items],
            "samples": samples,
        }
        write_text(ctx.work / "scores.json", json.dumps(data))

    def read(self, folder: Path) -> Scored:
        """Return scores, items and samples of a model called `model`."""
        data = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        return Scored(
            tuple(Score.model_validate(s) for s in data["scores"]),
            tuple(Item.model_validate(i) for i in data["items"]),
            tuple(tuple(s) for s in data["samples"]),
        )

    def _samples(self, model: Any, tokenizer: Any) -> list[tuple[str, str, str, str]]:
        """Continue the first prompts of every scored set, one per unit."""
        sets: Mapping[str, Any] = {
            **{f"test.{name}": rows for name, rows in self.domain.test.items()},
            "retain_test": self.domain.retain_test,
        }
        out = []
        for name, rows in sets.items():
            by_unit: dict[str, Any] = {}
            for row in rows:
                by_unit.setdefault(row.unit, row)
            chosen = list(by_unit.values())[: self.evaluate.samples]
            out += [(name, *said) for said in continuations(model, tokenizer, chosen)]
        return out
