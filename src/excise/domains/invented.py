"""Made-up words that nobody ever wrote. This module imports no torch."""

from __future__ import annotations

import random
from collections.abc import Set

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "tr", "kl")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("l", "m", "n", "r", "s", "x")


def made_names(count: int, draw: random.Random, taken: Set[str]) -> list[str]:
    """Return different made-up words of two or three syllables.

    Args:
        count: How many.
        draw: Where they are drawn from.
        taken: Words that are in use.
    """
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = [
            draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(draw.choice((2, 3)))
        ]
        name = "".join(syllables) + draw.choice(_CODAS)
        if name not in taken:
            names[name] = None
    return list(names)
