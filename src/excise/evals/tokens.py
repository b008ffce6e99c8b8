"""Log-probabilities of named tokens: what every teacher-forced metric is made of.

Only the positions that are asked for reach the output layer: a hook gathers their hidden states
just before it, so memory holds N x V logits and not B x T x V, and whatever the model does to its
logits afterwards (soft caps, scales) still happens. A model without an output layer that can be
found falls back to all logits.

Shape legend: B rows, T tokens, N positions asked for, M tokens asked for at them, V vocabulary,
D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from excise.data.stream import Example, Tokenizer, collate
from excise.models.limits import carries_state
from excise.models.spec import Model

MAX_LOGITS = 1 << 25
"""Logits held at once at most (128 MB in float32)."""

MAX_NATS = 100.0
"""A token's loss is cut here, so that one impossible token does not decide a mean."""


@dataclass(frozen=True, slots=True)
class Request:
    """Tokens to score after one sequence.

    Attributes:
        ids: What the model reads.
        positions: Where to look, increasing: position p predicts the token after `ids[p]`.
        tokens: The token whose log-probability is wanted at each position.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says about one request.

    Attributes:
        logprobs: Natural log-probability of each token, in float32 arithmetic; NaN where the model
            gives no numbers.
        hits: 1 where the token is the most probable one, 1/k where k tokens are equally probable,
            else 0; NaN where the log-probability is.
        standardized: How many standard deviations the log-probability of each token lies above
            the mean log-probability of a token drawn there; empty where nobody asked.
    """

    logprobs: tuple[float, ...]
    hits: tuple[float, ...]
    standardized: tuple[float, ...] = ()

    @property
    def total(self) -> float:
        """Summed log-probability."""
        return sum(self.logprobs)

    @property
    def mean(self) -> float:
        """Mean log-probability of a token."""
        return self.total / len(self.logprobs)


def request_of(example: Example) -> Request:
    """Return the request for the scored tokens of an example."""
    at = [t for t, scored in enumerate(example.target) if scored and t > 0]
    ids = example.ids[:-1] if len(example.ids) > 1 else example.ids
    return Request(ids, tuple(t - 1 for t in at), tuple(example.ids[t] for t in at))


def pad_id(tokenizer: Tokenizer) -> int:
    """Return an id to pad with; attention never sees it."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


def device_of(model: Model) -> torch.device:
    """Return the device of the model's first parameter."""
    device: torch.device = next(iter(model.parameters())).device
    return device


@contextmanager
def evaluating(model: Model) -> Iterator[Model]:
    """Put every module into eval mode without gradients; on leaving, each has its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, mode in modes:
            module.training = mode


def _head(model: Model) -> Any | None:
    """Return the output layer, looking through wrappers."""
    inner = model
    for name in ("module", "_orig_mod"):
        inner = getattr(inner, name, inner)
    find = getattr(inner, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head if isinstance(head, torch.nn.Module) else None


def logits_at(
    model: Model, inputs: dict[str, Any], wanted_BT: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "N V"], Any]:
    """Run the model and return the logits of the wanted positions, row by row.

    Args:
        model: A causal model.
        inputs: Keyword arguments of its forward.
        wanted_BT: Which positions are wanted.

    Returns:
        Logits in float32 and the model's whole output (for its cache).
    """
    head = _head(model)
    if head is None:
        output = model(**inputs)
        return output.logits[wanted_BT].float(), output
    gathered = []

    def gather(_module: Any, args: tuple[Any, ...]) -> Any:
        hidden_BTD = args[0]
        if hidden_BTD.shape[:-1] != wanted_BT.shape:
            return None
        gathered.append(True)
        return (hidden_BTD[wanted_BT][None], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        output = model(**inputs)
    finally:
        handle.remove()
    logits = output.logits[0] if gathered else output.logits[wanted_BT]
    return logits.float(), output


def _vocabulary(model: Model) -> int:
    """Return the number of logits per position, for memory only."""
    weight = getattr(_head(model), "weight", None)
    return int(weight.shape[0]) if weight is not None else 1 << 16


def _batches(
    lengths: Sequence[tuple[int, int]], batch_size: int, vocabulary: int
) -> Iterator[list[int]]:
    """Yield indices of sequences of like (length, positions) that fit into memory together."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    part: list[int] = []
    positions = 0
    for i in order:
        more = lengths[i][1]
        if part and (len(part) >= batch_size or (positions + more) * vocabulary > MAX_LOGITS):
            yield part
            part, positions = [], 0
        part.append(i)
        positions += more
    if part:
        yield part


def answer(
    model: Model,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    batch_size: int = 64,
    device: torch.device | None = None,
    padding_side: str = "right",
    standardize: bool = False,
) -> list[Answer]:
    """Score every request; sequences that several requests share are read once.

    Args:
        model: A causal model; its mode is restored.
        tokenizer: For the padding id.
        requests: What to score.
        batch_size: Sequences per forward at most; fewer where the logits would not fit.
        device: Where the inputs go; None takes the model's.
        padding_side: `right` or `left`; scores do not depend on it. A model that carries a state
            is padded on the right, behind what it is asked.
        standardize: Whether answers have `standardized`, which reads every logit once more.

    Returns:
        One answer per request, in order.
    """
    if carries_state(model):
        padding_side = "right"
    shared: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        shared.setdefault(request.ids, []).append(i)
    sequences = list(shared.items())
    wanted = [sorted({p for i in users for p in requests[i].positions}) for _, users in sequences]
    lengths = [(len(ids), len(at)) for (ids, _), at in zip(sequences, wanted, strict=True)]
    answers: list[Answer | None] = [None] * len(requests)
    with evaluating(model):
        for part in _batches(lengths, batch_size, _vocabulary(model)):
            examples = [
                Example(ids, tuple(p in at for p in range(len(ids))), 0, "")
                for ids, at in ((sequences[i][0], set(wanted[i])) for i in part)
            ]
            batch = collate(examples, pad_id=pad_id(tokenizer), padding_side=padding_side)
            batch = batch.to(device or device_of(model))
            inputs = {**batch.inputs, "use_cache": False}
            logits_NV, _ = logits_at(model, inputs, batch.target_BT)
            at = _rows_of(part, wanted)
            users = [(k, i) for k, s in enumerate(part) for i in sequences[s][1]]
            _fill(answers, requests, users, at, logits_NV, standardize)
    assert all(a is not None for a in answers)
    return [a for a in answers if a is not None]


def _rows_of(part: Sequence[int], wanted: Sequence[Sequence[int]]) -> list[dict[int, int]]:
    """Return for every sequence of a batch where its positions lie among the gathered rows."""
    out, start = [], 0
    for s in part:
        out.append({p: start + k for k, p in enumerate(wanted[s])})
        start += len(wanted[s])
    return out


def _fill(
    answers: list[Answer | None],
    requests: Sequence[Request],
    users: Sequence[tuple[int, int]],
    at: Sequence[dict[int, int]],
    logits_NV: Tensor,
    standardize: bool,
) -> None:
    """Read the answers of one batch off its logits."""
    rows = [at[k][p] for k, i in users for p in requests[i].positions]
    tokens = [t for _, i in users for t in requests[i].tokens]
    if not rows:
        for _, i in users:
            answers[i] = Answer((), ())
        return
    row_M = torch.tensor(rows, device=logits_NV.device)
    token_M = torch.tensor(tokens, device=logits_NV.device)
    best_N = logits_NV.amax(-1)
    ties_N = (logits_NV == best_N[:, None]).sum(-1)
    norm_N = logits_NV.logsumexp(-1)
    logit_M = logits_NV[row_M, token_M]
    logprob_M = (logit_M - norm_N[row_M]).clamp(min=-MAX_NATS)  # NaN stays NaN
    hit_M = (logit_M == best_N[row_M]) / ties_N[row_M]
    hit_M = torch.where(logprob_M.isnan(), logprob_M, hit_M)
    values, hits = logprob_M.tolist(), hit_M.tolist()
    marks = _standardized(logprob_M, row_M, logits_NV).tolist() if standardize else []
    start = 0
    for _, i in users:
        end = start + len(requests[i].positions)
        part = slice(start, end)
        answers[i] = Answer(tuple(values[part]), tuple(hits[part]), tuple(marks[part]))
        start = end


def _standardized(
    logprob_M: Float[Tensor, "M"], row_M: Int[Tensor, "M"], logits_NV: Float[Tensor, "N V"]
) -> Float[Tensor, "M"]:
    """Return log-probabilities less the mean of their position, in its standard deviations."""
    logprobs_NV = logits_NV.log_softmax(-1)
    probs_NV = logprobs_NV.exp()
    logprobs_NV = torch.where(probs_NV == 0, 0.0, logprobs_NV)  # p log p is 0 there, not NaN
    mean_N = (probs_NV * logprobs_NV).sum(-1)
    variance_N = (probs_NV * (logprobs_NV - mean_N[:, None]).square()).sum(-1)
    deviation_N = variance_N.clamp(1e-6).sqrt()  # 0 for a uniform distribution; as open-unlearning
    return (logprob_M - mean_N[row_M]) / deviation_N[row_M]


def answer_examples(
    model: Model,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    device: torch.device | None = None,
    padding_side: str = "right",
    standardize: bool = False,
) -> list[Answer]:
    """Score the targets of encoded rows; see `answer`."""
    requests = [request_of(example) for example in examples]
    return answer(
        model,
        tokenizer,
        requests,
        batch_size=batch_size,
        device=device,
        padding_side=padding_side,
        standardize=standardize,
    )
