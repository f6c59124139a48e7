"""Philox 4×32 in plain torch: the random numbers of the kernels, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
OFFSETS, ROUNDING, PAGES = 0, 1, 2
"""Streams, the last word of a counter: where a comb starts, how masses are rounded, where a page's comb starts."""

ROUNDING_ROUNDS = 7
"""For the rounding of masses, of which there are as many as keys: the fewest that pass BigCrush (Salmon and others 2011, table 2)."""


def philox(
    seed: Tensor | int, *counter: Tensor | int, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter; the same seed and counter give the same words, whatever is beside them.

    Parameters
    ----------
    seed : int or Tensor, int64
        Two words of key: the lower and the upper half.
    counter : four of int or Tensor, int64, broadcastable, 0 <= c < 2^32

    Returns
    -------
    four Tensors, int64, 0 <= x < 2^32

    Source: Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3 (2011). The first of its known
    answers:

    >>> [f"{int(x):08x}" for x in philox(0, 0, 0, 0, 0)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    like = next((x for x in (*counter, seed) if isinstance(x, Tensor)), None)
    device = None if like is None else like.device
    c0, c1, c2, c3 = torch.broadcast_tensors(
        *(torch.as_tensor(c, dtype=torch.int64, device=device) for c in counter)
    )
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(rounds):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def uniform(word: Tensor) -> Tensor:
    """A number in [0, 1) from the upper 24 bits of a word, float32."""
    return (word >> 8).to(torch.float32) * 2.0**-24


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower word of a b; int64 would not hold it."""
    upper = (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16
    return upper, (a * (b & 0xFFFF) + ((a * (b >> 16) & 0xFFFF) << 16)) & WORD
