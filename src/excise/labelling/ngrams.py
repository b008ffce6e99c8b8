"""Hashed character and word n-grams around a word.

Source: the hashing trick, Weinberger et al. 2009, "Feature hashing for large scale multitask
learning", arXiv:0902.2206; character n-grams as in Bojanowski et al. 2017, "Enriching word vectors
with subword information", arXiv:1607.04606, section 3.2.

Shape legend: N words, F buckets, C features of the words around one, K classes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from excise.labelling.words import Document

_EDGE: Final = ""
"""What stands before the first word and behind the last one."""


@lru_cache(maxsize=1 << 18)
def subwords(word: str, buckets: int, longest: int) -> tuple[int, ...]:
    """Return the buckets of a word: itself, its n-grams of 3 characters and more, its shape.

    Args:
        word: The word.
        buckets: How many there are.
        longest: Characters of the longest n-gram.
    """
    lower = word.lower()
    marked = f"<{lower}>"
    grams = {
        marked[i : i + n] for n in range(3, longest + 1) for i in range(len(marked) - n + 1)
    } - {marked}
    if word.isdigit():
        shape = "9"
    else:
        shape = "A" if word.isupper() else "Aa" if word[:1].isupper() else "a"
    names = [f"word:{lower}", f"shape:{shape}", *(f"gram:{gram}" for gram in sorted(grams))]
    return tuple(_crc(name) % buckets for name in names)


def _crc(name: str) -> int:
    """Return 32 bits of a text, the same in every process."""
    return zlib.crc32(name.encode("utf-8", "surrogatepass"))


@lru_cache(maxsize=1 << 18)
def _number(word: str) -> int:
    return _crc(f"near:{word.lower()}")


def around(words: Sequence[str], buckets: int, window: int) -> Any:
    """Return the buckets of the words around each word, as an int64 array [N, C].

    C counts the words on both sides by their distance, then the pairs with the word before and the
    one behind.

    Args:
        words: Words of one document.
        buckets: How many there are.
        window: Words on either side.
    """
    edge = [_number(_EDGE)] * window
    padded = np.array([*edge, *map(_number, words), *edge], dtype=np.uint64)
    count = len(words)
    columns = []
    for offset in (*range(-window, 0), *range(1, window + 1)):
        near = padded[window + offset : window + offset + count]
        columns.append(_mixed(near, offset + 64))
    if window:
        here = padded[window : window + count]
        before, behind = padded[window - 1 :][:count], padded[window + 1 :][:count]
        columns.append(_mixed(before * np.uint64(31) + here, 1))
        columns.append(_mixed(here * np.uint64(31) + behind, 2))
    if not columns:
        return np.zeros((count, 0), dtype=np.int64)
    return (np.stack(columns, axis=1) % np.uint64(buckets)).astype(np.int64)


def _mixed(values: Any, salt: int) -> Any:
    """Return 64-bit numbers whose low bits depend on all bits of both arguments."""
    mixed = (values ^ np.uint64(salt * 0x9E3779B1)) * np.uint64(0x9E3779B97F4A7C15)
    return mixed ^ (mixed >> np.uint64(32))


def bags(words: Sequence[str], buckets: int, longest: int) -> tuple[Tensor, Tensor]:
    """Return the buckets of several words one behind the other, and where each begins."""
    each = [subwords(word, buckets, longest) for word in words]
    ids = np.fromiter(chain.from_iterable(each), dtype=np.int64)
    ends = np.cumsum([0, *map(len, each)])[:-1]
    return torch.from_numpy(ids), torch.from_numpy(ends.astype(np.int64))


def sparse_features(
    documents: Sequence[Document], masks: Sequence[Sequence[bool]], buckets: int, longest: int,
    window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the features of chosen words, and which buckets they use.

    Args:
        documents: Documents of words.
        masks: Which words of each are chosen.
        buckets: How many there are.
        longest: Characters of the longest n-gram.
        window: Words on either side that are read.

    Returns:
        A sparse float64 matrix [N, used], and the used buckets in order.
    """
    rows: list[Any] = []
    columns: list[Any] = []
    count = 0
    for document, mask in zip(documents, masks, strict=True):
        chosen = np.flatnonzero(np.asarray(mask, dtype=bool))
        if not len(chosen):
            continue
        ids, starts = bags([document.words[i] for i in chosen], buckets, longest)
        lengths = np.diff(np.append(starts.numpy(), len(ids)))
        near = around(document.words, buckets, window)[chosen]
        here = np.arange(count, count + len(chosen))
        rows += [np.repeat(here, lengths), np.repeat(here, near.shape[1])]
        columns += [ids.numpy(), near.ravel()]
        count += len(chosen)
    used, inverse = np.unique(np.concatenate(columns), return_inverse=True)
    index = torch.from_numpy(np.stack([np.concatenate(rows), inverse.ravel()]))
    values = torch.ones(index.shape[1], dtype=torch.float64)
    x_NF = torch.sparse_coo_tensor(
        index, values, (count, len(used)), check_invariants=True
    ).coalesce()
    return x_NF, torch.from_numpy(used)


def scores(
    documents: Sequence[Document], head_FK: Float[Tensor, "F1 K"], longest: int, window: int
) -> list[Float[Tensor, "N K"]]:
    """Return the scores of every word of some documents.

    Args:
        documents: The documents.
        head_FK: Weights, the biases in the last row.
        longest: Characters of the longest n-gram.
        window: Words on either side that are read.
    """
    buckets = len(head_FK) - 1
    weights_FK, bias_K = head_FK[:-1], head_FK[-1]
    kinds = [*dict.fromkeys(word for document in documents for word in document.words)]
    if not kinds:
        return [weights_FK.new_zeros(0, len(bias_K)) for _ in documents]
    place = {word: i for i, word in enumerate(kinds)}
    ids, starts = bags(kinds, buckets, longest)
    of_kind = torch.nn.functional.embedding_bag(ids, weights_FK, starts, mode="sum")
    out = []
    for document in documents:
        at_N = torch.tensor([place[word] for word in document.words], dtype=torch.long)
        near_NC = torch.from_numpy(around(document.words, buckets, window))
        out.append(of_kind[at_N] + weights_FK[near_NC].sum(dim=1) + bias_K)
    return out
