"""Exact and near duplicates, clustered into one unit before anything is split.

Two texts are near duplicates when their sets of 13-word shingles have a Jaccard index of at least
one half; texts under 13 words only when their normal forms are equal. Candidates are found exactly,
by prefix filtering (Bayardo et al. 2007, "Scaling up all pairs similarity search"): of two sets
with Jaccard >= t, the rarest `|A| - ceil(t |A|) + 1` shingles of one share a member with those of
the other. It misses nothing, unlike MinHash, and is as fast here, since a long shingle that two
documents share is rare. This module imports no torch.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

SHINGLE: Final = 13
"""Words of a shingle."""

THRESHOLD: Final = 0.5
"""Jaccard index from which two texts are near duplicates."""

COMMON: Final = 0.9
"""Share of texts that a shingle is in when it belongs to what they have in common."""

# Scripts without blanks between words: every character counts as a word.
_WORD = re.compile(
    "[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
    "|[^\\s\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
_EDGES = re.compile(r"^[^\w]+|[^\w]+$")


class Clusters:
    """Union-find: which items belong together."""

    def __init__(self) -> None:
        self._parent: dict[Hashable, Hashable] = {}

    def find(self, item: Hashable) -> Hashable:
        """Return the representative of an item's cluster."""
        root = item
        while (up := self._parent.setdefault(root, root)) != root:
            root = up
        while item != root:  # compress the path
            self._parent[item], item = root, self._parent[item]
        return root

    def join(self, a: Hashable, b: Hashable) -> bool:
        """Put two items into one cluster; returns whether they were apart."""
        first, second = self.find(a), self.find(b)
        self._parent[second] = first
        return first != second


@dataclass(frozen=True, slots=True)
class Duplicates:
    """What was found among texts.

    Attributes:
        cluster: For each text, the index of the first text of its cluster.
        exact: Pairs (first, later) of texts with equal normal forms.
        near: Pairs of near duplicates that joined two clusters.
    """

    cluster: tuple[int, ...]
    exact: tuple[tuple[int, int], ...]
    near: tuple[tuple[int, int], ...]


def normal_form(text: str) -> str:
    """Return a text with case, compatibility forms and white space made equal.

    Punctuation stays: `3 + 4` and `3 - 4` are different texts.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_hash(text: str) -> str:
    """Return the SHA-256 of the normal form, as hex."""
    return hashlib.sha256(normal_form(text).encode("utf-8", "surrogatepass")).hexdigest()


def words_of(text: str) -> list[str]:
    """Return the words of a normal form, punctuation at their edges left out where words remain."""
    return [_EDGES.sub("", word) or word for word in _WORD.findall(text)]


def find_duplicates(texts: Sequence[str], exact_only: Collection[int] = ()) -> Duplicates:
    """Cluster texts by exact and near duplication.

    Args:
        texts: What each row says.
        exact_only: Which of them, by place, are joined with equal texts alone.

    Returns:
        The clusters; which texts form one does not depend on their order.
    """
    clusters = Clusters()
    first: dict[str, int] = {}
    exact: list[tuple[int, int]] = []
    forms = [normal_form(text) for text in texts]
    for i, form in enumerate(forms):
        if first.setdefault(form, i) != i:
            clusters.join(first[form], i)
            exact.append((first[form], i))
    distinct = sorted(first.values())
    near = []
    sets = [shingles("" if i in exact_only else forms[i]) for i in distinct]
    for a, b in near_pairs(sets):
        if clusters.join(distinct[a], distinct[b]):
            near.append((distinct[a], distinct[b]))
    smallest: dict[Hashable, int] = {}
    roots = [clusters.find(i) for i in range(len(texts))]
    for i, root in enumerate(roots):
        smallest.setdefault(root, i)
    return Duplicates(tuple(smallest[root] for root in roots), tuple(exact), tuple(near))


def shingles(form: str) -> NDArray[np.uint64]:
    """Return the hashes of a normal form's 13-word shingles, sorted and unique.

    Args:
        form: A text in normal form.

    Returns:
        Hashes; none for texts under 13 words.
    """
    words = words_of(form)
    if len(words) < SHINGLE:
        return np.empty(0, np.uint64)
    hashed = {
        word: int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
        for word in set(words)
    }
    values = np.fromiter((hashed[w] for w in words), np.uint64, len(words))
    total = np.zeros(len(words) - SHINGLE + 1, np.uint64)
    for k in range(SHINGLE):
        # A polynomial in an odd base, modulo 2**64: equal windows give equal sums.
        total = total * np.uint64(0x9E3779B97F4A7C15) + values[k : k + len(total)]
    return np.unique(total)


def shared_words(texts: Sequence[str]) -> int:
    """Return about how many words of a text are a passage that texts have in common.

    Args:
        texts: Texts; several.

    Returns:
        Words of the shingles that `COMMON` of the texts hold, where these make them near
        duplicates; else 0: they are alike in pairs, as the pages of one document are.
    """
    sets = [shingles(normal_form(text)) for text in texts]
    _, counts = np.unique(np.concatenate(sets), return_counts=True)
    common = int((counts >= COMMON * len(texts)).sum())
    usual = float(np.median([len(s) for s in sets]))
    return common + SHINGLE - 1 if common and common >= THRESHOLD * usual else 0


def near_pairs(
    sets: Sequence[NDArray[np.uint64]], threshold: float = THRESHOLD
) -> list[tuple[int, int]]:
    """Return pairs of similar sets, enough of them to join every cluster.

    Pairs that earlier pairs already connect are left out.

    Args:
        sets: Sorted, unique hashes of each text.
        threshold: Jaccard index from which two are similar.

    Returns:
        Pairs (a, b) with a < b.
    """
    sizes = np.array([len(s) for s in sets], np.int64)
    if not sizes.sum():
        return []
    values, inverse, counts = np.unique(
        np.concatenate(list(sets)), return_inverse=True, return_counts=True
    )
    members = np.split(inverse, np.cumsum(sizes)[:-1])
    marked = np.zeros(len(values), np.bool_)
    clusters = Clusters()
    pairs = []
    for bucket in _buckets(members, counts, threshold):
        for at, a in enumerate(bucket):
            root = clusters.find(a)
            rest = [b for b in bucket[at + 1 :] if clusters.find(b) != root]
            if not rest:
                continue
            marked[members[a]] = True
            shared = _overlaps(marked, [members[b] for b in rest])
            marked[members[a]] = False
            both = shared / (sizes[a] + sizes[rest] - shared)
            for b in np.asarray(rest)[both >= threshold].tolist():
                if clusters.join(a, b):
                    pairs.append((a, b))
    return pairs


def _overlaps(marked: NDArray[np.bool_], members: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return how many members of each set are marked; no set is empty."""
    starts = np.cumsum([0, *(len(m) for m in members[:-1])])
    counts: NDArray[np.int64] = np.add.reduceat(
        marked[np.concatenate(list(members))].astype(np.int64), starts
    )
    return counts


def _buckets(
    members: Sequence[NDArray[np.int64]], counts: NDArray[np.int64], threshold: float
) -> list[list[int]]:
    """Return the groups of sets that share one of their rarest members.

    Args:
        members: Numbers of the hashes in each set.
        counts: In how many sets each number occurs.
        threshold: Jaccard index from which two sets are similar.

    Returns:
        Every similar pair is together in at least one group; groups are ascending.
    """
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    groups: dict[int, list[int]] = defaultdict(list)
    for i, mine in enumerate(members):
        if not len(mine):
            continue
        prefix = len(mine) - math.ceil(threshold * len(mine)) + 1
        rarest = mine[np.argsort(rank[mine])[:prefix]]
        for value in rarest[counts[rarest] > 1].tolist():
            groups[value].append(i)
    return [list(g) for g in sorted({tuple(g) for g in groups.values() if len(g) > 1})]
