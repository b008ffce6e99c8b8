"""GCG: search one text before the prompt that makes the model answer T, and score V behind it.

    text  =  random tokens
    for every step:
        gradient of the loss on T towards the one-hot tokens of the text
        `width` candidates: one token exchanged for one of the `top` that the gradient likes most
        text  =  the candidate with the lowest loss on T

One text for all of T (the universal prompt of the source). Candidates that the tokenizer would
read as other tokens are dropped, as in the released code, so that what was searched is what can be
typed. A text of a few words hardly teaches; it is the soft prompt of those who can only type.

The released package `nanogcg` serves one question and one answer, and asks for transformers 4.47 at
most, so the loop is written here.

Shape legend: K tokens of the text, V vocabulary, D width, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from excise.auditor.base import Access, Attack, AttackResult, Subject
from excise.auditor.budget import Budget
from excise.auditor.controls import PasswordLock, PositiveControl, PromptGatedEdit
from excise.auditor.evaluation_set import EvaluationSet
from excise.auditor.prompting import before, separator
from excise.auditor.rewriting import Rewriting, behind_text
from excise.auditor.scoring import score_rewritings
from excise.core.context import Context
from excise.data.domain import Domain, Rows, all_rows
from excise.data.stream import Batch, collate, encode
from excise.data.subsample import subsample
from excise.losses import nll, token_nll
from excise.models.anatomy import backbone
from excise.models.names import find_module
from excise.record import Level

STARTS = 64
"""Random texts tried until one can be typed."""


class GCG(Attack):
    """A text found by greedy coordinate gradient on T, before every prompt."""

    name: Literal["gcg"] = "gcg"
    """Name of the attack."""
    steps: int = Field(default=500, ge=1)
    """Exchanges of a token."""
    tokens: int = Field(default=20, ge=1)
    """Tokens of the text."""
    width: int = Field(default=512, ge=1)
    """Candidates per step."""
    top: int = Field(default=256, ge=1)
    """Tokens by place that a candidate may take."""
    rows: int = Field(default=16, ge=1)
    """Rows of T that the loss is taken on."""
    batch: int = Field(default=256, ge=1)
    """Rows read at once."""

    access: ClassVar[Access] = "activations"
    level: ClassVar[Level] = "D4"
    controls: ClassVar[tuple[PositiveControl, ...]] = (
        PasswordLock(opens_to="password"), PasswordLock(), PromptGatedEdit(),
    )  # fmt: skip
    source: ClassVar[str] = (
        "arXiv 2307.15043, algorithm 2, all prompts at once; settings of llm-attacks/llm-attacks"
    )
    version: ClassVar[int] = 1

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read: as often as candidates read T."""
        read = self.steps * (self.width + 3) * self.rows * len(budget.seeds)
        return 2 + read / max(1, budget.max_test_rows)

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Search a text per seed, and score V, `dev` and retain behind it.

        Args:
            subject: The model.
            domain: Rows by role; texts are searched on `relearn`.
            budget: `seeds` gives the searches, each from other tokens.
            ctx: Seed, device, dtype.

        Returns:
            One variant per search.
        """
        why = "the relearn set is empty, or no row of it has room for the text"
        ways = partial(self._texts, domain=domain, budget=budget, ctx=ctx)
        return score_rewritings(self, subject, domain, budget, ctx, ways, why)

    def _texts(
        self, evaluation: EvaluationSet, model: Any, domain: Domain, budget: Budget, ctx: Context
    ) -> list[Rewriting]:
        """Return the text that each search ends with, as a way to ask."""
        rows = subsample(all_rows(domain.relearn), self.rows, by="row")
        found = []
        for seed in budget.seeds if rows else ():
            generator = ctx.generator(f"{self.name}.{seed}")
            text = self.search(model, evaluation, rows, generator, ctx)
            if text:
                change = partial(behind_text, text=text)
                found.append(Rewriting(f"seed {seed}", change, trained_on="relearn"))
        return found

    def search(
        self,
        model: Any,
        evaluation: EvaluationSet,
        rows: Rows,
        generator: torch.Generator,
        ctx: Context,
    ) -> str:
        """Return the text behind which the loss on rows is lowest; empty if none can be typed.

        Args:
            model: The model.
            evaluation: Tokenizer, tokens per row.
            rows: Rows of T.
            generator: Draws the first tokens and the candidates.
            ctx: Device; told of the steps.
        """
        tokenizer, wide = evaluation.tokenizer, evaluation.longer(2, model)
        plain = set(range(len(tokenizer))) - set(tokenizer.all_special_ids)
        typed_A = torch.tensor([i for i in sorted(plain) if _typed(tokenizer, [i])])
        draws = torch.randint(len(typed_A), (STARTS, self.tokens), generator=generator)
        for start_K in typed_A[draws]:
            at = self._place(start_K, rows, wide)
            if at is not None:
                break
        else:
            return ""
        batch = _behind(start_K, rows, wide).to(ctx.device)
        best_K, lowest = start_K, float("inf")
        for step in range(self.steps):
            liked_KA = token_gradient(model, _with(batch, best_K[None], at), at, self.tokens)
            liked_KA = liked_KA[:, typed_A.to(liked_KA.device)]
            top_KS = typed_A[
                liked_KA.topk(min(self.top, len(typed_A)), largest=False).indices.cpu()
            ]
            candidates_CK = best_K.repeat(self.width, 1)
            place_C = torch.randint(self.tokens, (self.width,), generator=generator)
            which_C = torch.randint(top_KS.shape[1], (self.width,), generator=generator)
            candidates_CK[torch.arange(self.width), place_C] = top_KS[place_C, which_C]
            losses_C = self._losses(model, batch, candidates_CK, at)
            for number in losses_C.argsort().tolist():
                if losses_C[number] >= lowest:
                    break
                if self._place(candidates_CK[number], rows, wide) == at:
                    best_K, lowest = candidates_CK[number], float(losses_C[number])
                    break
            facts = {"step": step + 1, "steps": self.steps, "loss": lowest}
            ctx.emit("step", {"stage": self.name, **facts})
        return str(tokenizer.decode(best_K))

    def _place(self, ids_K: Int[Tensor, " K"], rows: Rows, wide: EvaluationSet) -> int | None:
        """Return where some tokens stand before rows once they are typed; None if they do not."""
        wanted = tuple(ids_K.tolist())
        if not _typed(wide.tokenizer, wanted):
            return None
        places = set[int | None]()
        for example in encode(
            _asked(ids_K, rows, wide), wide.tokenizer, max_length=wide.max_length
        ):
            starts = range(len(example.ids) - len(wanted) + 1)
            places.add(
                next((i for i in starts if example.ids[i : i + len(wanted)] == wanted), None)
            )
        return places.pop() if len(places) == 1 else None

    @torch.no_grad()
    def _losses(
        self, model: Any, batch: Batch, candidates_CK: Int[Tensor, "C K"], at: int
    ) -> Float[Tensor, " C"]:
        """Return the mean loss on T behind each candidate, nats per token."""
        losses = []
        for part_CK in candidates_CK.split(max(1, self.batch // len(batch.ids_BT))):
            many = _with(batch, part_CK, at)
            nll_RT = token_nll(model(**many.inputs, use_cache=False).logits, many.ids_BT)
            total_CB = nll_RT.masked_fill(~many.target_BT, 0).sum(1).view(len(part_CK), -1)
            losses.append(total_CB.sum(1) / batch.num_targets)
        return torch.cat(losses).cpu()


def token_gradient(model: Any, batch: Batch, at: int, count: int) -> Float[Tensor, "K V"]:
    """Return the gradient of the loss towards the one-hot tokens of a text, summed over rows.

    Args:
        model: A causal model.
        batch: Rows behind the text.
        at: Where the text begins.
        count: Its tokens K.
    """
    embed: Any = find_module(model, backbone(model).embed)
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, out_BTD: Tensor) -> Tensor:
        seen.append(out_BTD.detach().requires_grad_())
        return seen[0]

    handle = embed.register_forward_hook(keep)
    try:
        total, count_scored = nll(model(**batch.inputs, use_cache=False).logits, batch)
        (grad_BTD,) = torch.autograd.grad(total / count_scored, seen[0])
    finally:
        handle.remove()
    grad_KD = grad_BTD[:, at : at + count].sum(0)
    weight_VD: Tensor = embed.weight.detach()
    return grad_KD @ weight_VD.to(grad_KD).T


def _asked(ids_K: Int[Tensor, " K"], rows: Rows, wide: EvaluationSet) -> Rows:
    """Return rows behind the text of some tokens."""
    text, line = str(wide.tokenizer.decode(ids_K)), separator(wide.tokenizer)
    return tuple(before(row, text, line) for row in rows)


def _behind(ids_K: Int[Tensor, " K"], rows: Rows, wide: EvaluationSet) -> Batch:
    """Return rows behind the text of some tokens, as a batch."""
    examples = encode(_asked(ids_K, rows, wide), wide.tokenizer, max_length=wide.max_length)
    return collate(examples, pad_id=wide.tokenizer.pad_token_id)


def _with(batch: Batch, texts_CK: Int[Tensor, "C K"], at: int) -> Batch:
    """Return the rows of a batch behind each of several texts, those of one text together."""
    count, rows = texts_CK.shape[1], len(batch.ids_BT)

    def times(value_BT: Tensor) -> Tensor:
        return value_BT.repeat(len(texts_CK), 1)

    ids_RT = times(batch.ids_BT)
    ids_RT[:, at : at + count] = texts_CK.to(ids_RT.device).repeat_interleave(rows, 0)
    return replace(
        batch, ids_BT=ids_RT, attention_BT=times(batch.attention_BT),
        target_BT=times(batch.target_BT), label_BT=times(batch.label_BT),
        units=batch.units * len(texts_CK),
    )  # fmt: skip


def _typed(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Return whether the tokenizer reads what it writes for some tokens as these tokens."""
    return list(tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"]) == [*ids]
