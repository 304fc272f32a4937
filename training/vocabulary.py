"""The text vocabulary: byte pairs merged until every word of the domain, behind a space, is one token.

The file is the release's `tiktoken.model`, only shorter. A word that the domain does not know still has an encoding,
in smaller pieces, so any text can be given to the model.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

from kimia.errors import ParameterError
from training.texts import vocabulary

Pair = tuple[bytes, bytes]


def _first_bytes() -> list[bytes]:
    """The single bytes in the release's order: what can be printed first, so that "!" is id 0."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [bytes([value]) for value in [*printable, *(value for value in range(256) if value not in printable)]]


def merged(words: Iterable[bytes], size: int) -> list[bytes]:
    """Tokens by id: the bytes, then the merges of the most frequent pairs, `size` in all.

    Raises ParameterError when the words have too few pairs.
    """
    split = Counter(tuple(bytes([value]) for value in word) for word in words)
    tokens = _first_bytes()
    while len(tokens) < size:
        pairs = _pairs(split)
        if not pairs:
            raise ParameterError(f"the words give {len(tokens)} tokens, {size} are wanted; lower base_tokens")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(best[0] + best[1])
        split = Counter({_with(word, best): count for word, count in split.items()})
    return tokens


def _pairs(split: Counter[tuple[bytes, ...]]) -> Counter[Pair]:
    pairs: Counter[Pair] = Counter()
    for word, count in split.items():
        for left, right in pairwise(word):
            pairs[left, right] += count
    return pairs


def _with(word: tuple[bytes, ...], pair: Pair) -> tuple[bytes, ...]:
    """The word with every occurrence of the pair merged."""
    parts: list[bytes] = []
    for part in word:
        if parts and (parts[-1], part) == pair:
            parts[-1] += part
        else:
            parts.append(part)
    return tuple(parts)


@lru_cache(maxsize=1)
def domain_tokens(size: int) -> list[bytes]:
    """The micro checkpoint's tokens: of every word of the domain, at the start of a text and behind a space.

    Words alone need fewer merges than there are ids; made-up syllables fill the rest, and are never trained.
    """
    words = [form for word in sorted(vocabulary()) for form in (word.encode(), f" {word}".encode())]
    syllables = [f"{c}{v}{d}".encode() for c in "bdfgklmnprstvz" for v in "aeiou" for d in "lmnrst"]
    return merged([*words, *words, *syllables], size)


def tiktoken_lines(tokens: list[bytes]) -> str:
    """The content of `tiktoken.model`."""
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
