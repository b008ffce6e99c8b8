"""A small transformer that reads both ways, trained here on labelled words and masked text.

A word enters as the mean vector of its character n-grams, so that no tokenizer is needed and an
unseen word has a vector too. Every step hides some words; those that are left of labelled documents
are classified, and of all documents the hidden frequent words are guessed (Devlin et al. 2019,
"BERT", arXiv:1810.04805, section 3.1; every hidden word becomes the mask).

Shape legend: B windows, W words of a window, D width, K classes, V words that are guessed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from excise.core.context import Context
from excise.data.domain import UNLABELED
from excise.labelling.ngrams import bags
from excise.labelling.words import Document
from excise.train.fit import FitConfig, Term, fit

OTHER = -1
"""Number of a word that is never guessed, and of a place without a label."""


@dataclass(frozen=True)
class Size:
    """What decides the shape of an encoder.

    Attributes:
        width: Size of the residual stream.
        blocks: Number of blocks.
        heads: Heads of attention.
        buckets: Vectors of character n-grams.
        longest: Characters of the longest n-gram.
        window: Words that are read at once.
    """

    width: int
    blocks: int
    heads: int
    buckets: int
    longest: int
    window: int


class Block(nn.Module):
    """Attention in both directions, then an MLP, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.between = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(
        self, x_BWD: Float[Tensor, "B W D"], real_BW: Bool[Tensor, "B W"]
    ) -> Float[Tensor, "B W D"]:
        """Return the residual stream behind the block."""
        batch, words, width = x_BWD.shape
        qkv = self.qkv(self.before(x_BWD)).view(batch, words, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        read = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=real_BW[:, None, None, :]
        )
        x_BWD = x_BWD + self.out(read.transpose(1, 2).reshape(batch, words, width))
        hidden = nn.functional.gelu(self.up(self.between(x_BWD)))
        result: Tensor = x_BWD + self.down(hidden)
        return result


class Encoder(nn.Module):
    """Words to scores of every class, and of the words that are guessed."""

    positions: Tensor

    def __init__(self, size: Size, classes: int, guessed: int = 0) -> None:
        super().__init__()
        self.size = size
        self.embed = nn.EmbeddingBag(size.buckets, size.width, mode="mean")
        self.mask = nn.Parameter(torch.zeros(size.width))
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.blocks))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, classes)
        self.guess = nn.Linear(size.width, guessed) if guessed else None
        self.register_buffer("positions", _waves(size.window, size.width), persistent=False)

    def start(self, generator: torch.Generator) -> Encoder:
        """Draw the weights and return the encoder."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                scale = 1.0 if name == "embed.weight" else parameter.shape[1] ** -0.5
                if name.endswith(("out.weight", "down.weight")):
                    scale /= math.sqrt(2 * self.size.blocks)
                nn.init.normal_(parameter, std=scale, generator=generator)
            elif not name.startswith(("norm", "blocks")) or name.endswith("bias"):
                nn.init.zeros_(parameter)
        return self

    def forward(
        self,
        ids: Int[Tensor, " ids"],
        starts: Int[Tensor, " kinds"],
        kind_BW: Int[Tensor, "B W"],
        real_BW: Bool[Tensor, "B W"],
        hidden_BW: Bool[Tensor, "B W"] | None = None,
    ) -> Float[Tensor, "B W D"]:
        """Return the states that both heads read.

        Args:
            ids: Buckets of the distinct words, one behind the other.
            starts: Where each begins.
            kind_BW: Which distinct word stands where.
            real_BW: Where a word stands.
            hidden_BW: Which words are hidden; None for none.
        """
        x_BWD = self.embed(ids, starts)[kind_BW]
        if hidden_BW is not None:
            x_BWD = torch.where(hidden_BW[..., None], self.mask, x_BWD)
        x_BWD = x_BWD + self.positions[: kind_BW.shape[1]]
        for block in self.blocks:
            x_BWD = block(x_BWD, real_BW)
        result: Tensor = self.norm(x_BWD)
        return result


def _waves(window: int, width: int) -> Float[Tensor, "W D"]:
    """Return sinusoidal positions (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""
    half = width // 2
    rate = torch.exp(-math.log(10000.0) * torch.arange(half) / half)
    angle = torch.arange(window)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)


@dataclass(frozen=True)
class Window:
    """Words that are read at once.

    Attributes:
        words: They.
        labels: Class of each, `OTHER` where nobody has looked.
        guesses: Number of each among the frequent words, or `OTHER`.
    """

    words: tuple[str, ...]
    labels: tuple[int, ...]
    guesses: tuple[int, ...] = ()


@dataclass(frozen=True)
class Words:
    """Windows padded to one length; see `Encoder.forward` for the rest."""

    ids: Tensor
    starts: Tensor
    kind_BW: Tensor
    real_BW: Tensor
    label_BW: Tensor
    guess_BW: Tensor
    hidden_BW: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Number of words."""
        return int(self.real_BW.sum())

    def to(self, device: torch.device) -> Words:
        """Return the batch on `device`."""
        moved = {k: v.to(device) for k, v in vars(self).items() if v is not None}
        return replace(self, **moved)


def windows(
    documents: Sequence[Document], length: int, frequent: Mapping[str, int] | None = None
) -> list[Window]:
    """Return documents cut into windows of equal numbers of words, at most `length` each."""
    out = []
    for document in documents:
        count = len(document.words)
        parts = -(-count // length)
        for part in range(parts):
            at = slice(part * count // parts, (part + 1) * count // parts)
            words = document.words[at]
            labels = tuple(OTHER if n == UNLABELED else n for n in document.labels[at])
            guesses = tuple((frequent or {}).get(word.lower(), OTHER) for word in words)
            out.append(Window(words, labels, guesses))
    return out


def batch_of(chosen: Sequence[Window], size: Size) -> Words:
    """Pad windows to one length, on the CPU."""
    width = max(len(window.words) for window in chosen)
    kinds = [*dict.fromkeys(word for window in chosen for word in window.words)]
    place = {word: i for i, word in enumerate(kinds)}

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

    ids, starts = bags(kinds, size.buckets, size.longest)
    return Words(
        ids,
        starts,
        padded([[place[word] for word in window.words] for window in chosen], 0),
        padded([[1] * len(window.words) for window in chosen], 0).bool(),
        padded([window.labels for window in chosen], OTHER),
        padded([window.guesses or [OTHER] * len(window.words) for window in chosen], OTHER),
    )


def frequent_words(documents: Sequence[Document], count: int) -> dict[str, int]:
    """Return the most frequent words with their numbers; of equally frequent, in their order."""
    seen = Counter(word.lower() for document in documents for word in document.words)
    ordered = sorted(seen, key=lambda word: (-seen[word], word))
    return {word: i for i, word in enumerate(ordered[:count])}


def train_encoder(
    teaching: Sequence[Document],
    others: Sequence[Document],
    size: Size,
    classes: int,
    config: FitConfig,
    ctx: Context,
    *,
    vocabulary: int,
    hide: float,
    masked_weight: float,
) -> tuple[dict[str, Tensor], int]:
    """Train an encoder and return its weights, without those for guessing, and the words read.

    Args:
        teaching: Documents with labelled words.
        others: Documents without; their words are only guessed.
        size: Its shape.
        classes: Core and every capability.
        config: Steps, windows per step, rates.
        ctx: Seed, device and the folder in which an interrupted training resumes.
        vocabulary: Frequent words that are guessed.
        hide: Share of the words that are hidden.
        masked_weight: Weight of guessing; 0 for none.
    """
    every = [*teaching, *others]
    frequent = frequent_words(every, vocabulary) if masked_weight else {}
    taught = [w for w in windows(teaching, size.window, frequent) if {*w.labels} != {OTHER}]
    texts = windows(every, size.window, frequent) if masked_weight else []
    seed = ctx.seed_for("encoder")
    model = Encoder(size, classes, len(frequent)).start(torch.Generator().manual_seed(seed))
    model = model.to(ctx.device)

    def batches(step: int) -> list[Words]:
        chosen = _drawn(taught, config.batch_size, step, ctx.seed_for("labelled windows"))
        if texts:
            for window in _drawn(texts, config.batch_size, step, ctx.seed_for("all windows")):
                chosen.append(replace(window, labels=(OTHER,) * len(window.words)))
        batch = batch_of(chosen, size)
        draw = torch.Generator().manual_seed(ctx.seed_for(f"hidden words {step}"))
        hidden_BW = (torch.rand(batch.real_BW.shape, generator=draw) < hide) & batch.real_BW
        return [replace(batch, hidden_BW=hidden_BW).to(ctx.device)]

    def loss(model: nn.Module, batch: Words) -> dict[str, Term]:
        assert isinstance(model, Encoder)
        assert batch.hidden_BW is not None
        x_BWD = model(batch.ids, batch.starts, batch.kind_BW, batch.real_BW, batch.hidden_BW)
        seen_BW = (batch.label_BW != OTHER) & ~batch.hidden_BW
        terms = {"labels": _cross_entropy(model.head, x_BWD[seen_BW], batch.label_BW[seen_BW])}
        if model.guess is not None:
            hidden_BW = (batch.guess_BW != OTHER) & batch.hidden_BW
            guessed = _cross_entropy(model.guess, x_BWD[hidden_BW], batch.guess_BW[hidden_BW])
            terms["masked"] = replace(guessed, weight=masked_weight)
        return terms

    model.train()
    read = 0
    for record in fit(model, batches, loss, config, ctx, state_dir=ctx.work / "encoder"):
        read += record.tokens
    state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    return {k: v for k, v in state.items() if not k.startswith("guess.")}, read


def _cross_entropy(head: nn.Module, x_ND: Tensor, y_N: Tensor) -> Term:
    total = nn.functional.cross_entropy(head(x_ND), y_N, reduction="sum")
    return Term(total, float(len(y_N)))


def _drawn(items: Sequence[Window], count: int, step: int, seed: int) -> list[Window]:
    """Return the windows of a step: every epoch reads all, in an order of its own."""
    out: list[Window] = []
    epoch, order = -1, list[int]()
    for i in range(step * count, (step + 1) * count):
        if i // len(items) != epoch:
            epoch = i // len(items)
            draw = torch.Generator().manual_seed((seed + epoch) % (1 << 63))
            order = torch.randperm(len(items), generator=draw).tolist()
        out.append(items[order[i % len(items)]])
    return out


def loaded(weights: Mapping[str, Tensor], size: Size) -> Encoder:
    """Return an encoder with the weights of `train_encoder`, to read with."""
    classes = len(weights["head.bias"])
    model = Encoder(size, classes)
    model.load_state_dict(dict(weights))
    return model.eval()


@torch.no_grad()
def scores(
    documents: Sequence[Document], model: Encoder, device: torch.device, *, batch: int = 64
) -> list[Float[Tensor, "N K"]]:
    """Return the scores of every word of some documents, on the CPU.

    Args:
        documents: The documents.
        model: The encoder.
        device: Where it runs.
        batch: Windows that are read at once.
    """
    model = model.to(device)
    every = windows(documents, model.size.window)
    order = sorted(range(len(every)), key=lambda i: len(every[i].words))  # little padding
    found: dict[int, Tensor] = {}
    for i in range(0, len(order), batch):
        chosen = order[i : i + batch]
        words = batch_of([every[at] for at in chosen], model.size).to(device)
        said = model.head(model(words.ids, words.starts, words.kind_BW, words.real_BW)).cpu()
        found |= {at: said[j, : len(every[at].words)] for j, at in enumerate(chosen)}
    out, at = [], 0
    for document in documents:
        parts = -(-len(document.words) // model.size.window)
        own = [found[at + i] for i in range(parts)]
        out.append(torch.cat(own) if own else torch.zeros(0, model.head.out_features))
        at += parts
    return out


def flops_per_word(size: Size, classes: int) -> float:
    """Return the floating-point operations of reading a word of a full window."""
    matrices = 12 * size.width**2 * size.blocks + size.width * classes
    return 2.0 * matrices + 4.0 * size.window * size.width * size.blocks
