"""Where random numbers come from: a counter-based stream that every device computes alike.

A random number is a function of (seed, sequence, head group, query position, replicate, index of the draw)
and of what it is for. So the draws of a row do not depend on the rows, heads and sequences beside it, nor on
how the work is cut into blocks or spread over threads and devices. The generator is Philox 4×32 with 10
rounds: its key is made of the seed and the sequence, its counter holds the rest:

    word 0: index of the draw // 2        word 2: head group (the key head within its sequence)
    word 1: position of the query         word 3: replicate << 8 | purpose

Each call of Philox gives four words of 32 bits, which make two uniform numbers of 53 bits.

Source: Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import check_generator, transformed
from .errors import ArgumentError

WORD = 0xFFFFFFFF
"""The largest word; every word is kept in 64 bits."""

MAX_REPLICATES = 1 << 24
"""How many replicates have numbers of their own."""


class Purpose(IntEnum):
    """What a number is for: the lowest byte of a counter's last word.

    Numbers of different purposes are independent.
    """

    POINTS = 0
    """Where the draws of a row lie in its distribution."""
    MASS_ROUNDING = 1
    """How the kernels round the masses of keys; the index counts keys."""
    PAGES = 2
    """Where the comb of a page of keys starts."""
    HEAD = 3
    """What the rows of a head share."""
    PILOT = 4
    """The pilot draws of a tolerance."""
    BASELINE = 5
    """The draws made again for the baseline of a gradient."""
    LEVEL = 6
    """The random level of a telescoped estimate."""
    FEATURES = 7
    """Random features of a control variate."""
    TIES = 9
    """What decides where two keys or tiles are worth the same."""
    GENERATOR = 8
    """The seed of a torch.Generator, for samplers that take one."""
    REHEARSAL = 10
    """The draws by which a tolerance tries a sampler out."""
    PROBES = 11
    """The directions along which a tolerance looks at values."""
    SEQUENCE = 255
    """The key of a sequence."""


def philox(
    key: Tensor | int, *counter: Tensor | int, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter.

    The same key and counter give the same words, whatever is beside them.

    Parameters
    ----------
    key : int or Tensor, int64, broadcastable to the counters
        Two words: the lower and the upper half.
    counter : four of int or Tensor, int64, broadcastable, 0 <= c < 2^32
    rounds : int
        10; 7 are the fewest that pass BigCrush (Salmon and others, table 2).

    Returns
    -------
    four Tensors, int64, 0 <= x < 2^32

    The first of the known answers of its authors:

    Examples
    --------
    >>> [f"{int(x):08x}" for x in philox(0, 0, 0, 0, 0)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    device = next((x.device for x in (key, *counter) if isinstance(x, Tensor)), torch.device("cpu"))
    k, *c = (torch.as_tensor(x, dtype=torch.int64, device=device) for x in (key, *counter))
    if device.type != "cpu" or transformed():
        return _rounds(c, (k & WORD, (k >> 32) & WORD), rounds)
    # NumPy takes a third of the time.
    arrays = [x.numpy().view(np.uint64) for x in (*c, k & WORD, (k >> 32) & WORD)]
    words = [np.asarray(x, dtype=np.uint64).view(np.int64) for x in _rounds(arrays[:4], arrays[4:], rounds)]
    return (
        torch.from_numpy(words[0]),
        torch.from_numpy(words[1]),
        torch.from_numpy(words[2]),
        torch.from_numpy(words[3]),
    )


def _rounds(counter: Sequence[Any], key: Sequence[Any], rounds: int) -> tuple[Any, Any, Any, Any]:
    """The rounds of Philox 4×32 on tensors or arrays.

    64-bit products may wrap round to a negative sign, which the masks mend.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product1 >> 32) & WORD ^ c1 ^ k0, product1 & WORD
        c2, c3 = (product0 >> 32) & WORD ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def uniform(high: Tensor, low: Tensor) -> Tensor:
    """A number in [0, 1) of 53 bits from two words, float64.

    float32 has 24 bits: a key of probability 1e-5 would be drawn up to 0.6 % too often.
    """
    return ((high >> 5) * (1 << 26) + (low >> 6)).double() * 2.0**-53


def make_seed(generator: torch.Generator | None) -> Tensor:
    """The next seed of a generator, int64, (), on its device; where None, torch's default one.

    A seed on the CPU costs a GPU no time: the keys of the sequences are made of it before they are copied.
    """
    check_generator(generator)
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**63 - 1, (), generator=generator, device=device)


def sequence_keys(seed: Tensor | int, sequences: Tensor | int) -> Tensor:
    """The Philox key of each sequence: int64, of the shape of `sequences`.

    `sequences` names them by whole numbers.
    """
    here = sequences.device if isinstance(sequences, Tensor) else torch.device("cpu")
    device = seed.device if isinstance(seed, Tensor) else here
    named = torch.as_tensor(sequences, dtype=torch.int64, device=device)
    low, high, *_ = philox(seed, named & WORD, (named >> 32) & WORD, 0, int(Purpose.SEQUENCE))
    return low | (high << 32)


@dataclass(frozen=True)
class Stream:
    """The random numbers of some attention rows: N key heads, P query positions of each.

    The query heads of a group share the numbers of their key head.

    Parameters
    ----------
    keys : Tensor, int64, (N,)
        The Philox key of each head's sequence (`sequence_keys`).
    groups : Tensor, int64, (N,)
        Which head group of its sequence each is.
    positions : Tensor, int64, (P,), or (N, P) where rows of different positions stand together
        The positions of the queries.
    purpose : Purpose
    first_replicate : int, or Tensor int64 (N,)
        The number of the first replicate; higher ones give independent repetitions of the same rows.

    Examples
    --------
    A row's numbers are the same alone and among others:

    >>> stream = Stream.of(seed=0, sequences=2, groups=4, length=8)
    >>> alone = stream[5:6, 3:4]
    >>> bool((stream.uniform(2, 3)[5, 3] == alone.uniform(2, 3)[0, 0]).all())
    True
    """

    keys: Tensor
    groups: Tensor
    positions: Tensor
    purpose: Purpose = Purpose.POINTS
    first_replicate: int | Tensor = 0

    @classmethod
    def of(
        cls,
        seed: Tensor | int,
        sequences: Tensor | int,
        groups: int,
        length: int,
        first_position: int = 0,
        device: torch.device | None = None,
    ) -> Stream:
        """The stream of whole sequences.

        Parameters
        ----------
        seed : int or Tensor, int64, ()
        sequences : int or Tensor, int64, (B,)
            Their names, or how many there are, which are then named 0 … B - 1.
        groups : int
            Head groups (key heads) of each sequence.
        length : int
            Queries of each head, at positions first_position, first_position + 1, …
        device : torch.device, optional
            Where the numbers are made; the seed's device where None.
        """
        # The device is named: torch's default one may be another.
        here = seed.device if isinstance(seed, Tensor) else torch.device("cpu")
        names = torch.arange(sequences, device=here) if isinstance(sequences, int) else sequences
        keys = sequence_keys(seed, names).to(device, non_blocking=True)
        group = torch.arange(groups, device=keys.device)
        return cls(
            keys.repeat_interleave(groups),
            group.repeat(len(keys)),
            torch.arange(first_position, first_position + length, device=keys.device),
        )

    def __getitem__(self, rows: tuple[slice, slice]) -> Stream:
        """The stream of some heads and positions."""
        heads, positions = rows
        return replace(
            self,
            keys=self.keys[heads],
            groups=self.groups[heads],
            positions=self.positions[..., positions] if self.positions.ndim == 1 else self.positions[rows],
        )

    def of_block(self, heads: slice, positions: Tensor) -> Stream:
        """The stream of some heads at positions (P,), or (heads, P)."""
        return replace(self, keys=self.keys[heads], groups=self.groups[heads], positions=positions)

    def of_single_rows(self, heads: Tensor, positions: Tensor, replicates: Tensor) -> Stream:
        """The stream of B rows, as (B, 1) rows.

        Each has a head (B,), a position (B,) and a replicate (B,) of its own.
        """
        return replace(
            self,
            keys=self.keys[heads],
            groups=self.groups[heads],
            positions=positions[:, None],
            first_replicate=replicates,
        )

    def of_purpose(self, purpose: Purpose, first_replicate: int | Tensor = 0) -> Stream:
        """The numbers of the same rows for another purpose, or of later replicates."""
        return replace(self, purpose=purpose, first_replicate=first_replicate)

    def uniform(self, replicates: int, count: int) -> Tensor:
        """Uniform numbers in [0, 1): float64, (N, P, replicates, count)."""
        positions = self.positions if self.positions.ndim == 2 else self.positions[None]
        return self._uniform(positions, int(self.purpose), replicates, count)

    def uniform_of_heads(self, replicates: int, count: int) -> Tensor:
        """Uniform numbers that all rows of a head share: float64, (N, 1, replicates, count)."""
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self.keys.device)
        purpose = int(self.purpose) << 4 | int(Purpose.HEAD)
        return self._uniform(zero, purpose, replicates, count)

    def make_generator(self) -> torch.Generator:
        """A torch.Generator for these rows together, for samplers that take one.

        It is a function of their first row.
        """
        first = replace(self, purpose=Purpose.GENERATOR)[0:1, 0:1]
        seed = int(first.uniform(1, 1).item() * 2**53) if self.keys.numel() and self.positions.numel() else 0
        return torch.Generator(self.keys.device).manual_seed(seed)

    def _uniform(self, positions: Tensor, purpose: int, replicates: int, count: int) -> Tensor:
        if replicates > MAX_REPLICATES:
            raise ArgumentError(
                f"replicates={replicates} is not allowed: a stream has numbers for up to {MAX_REPLICATES}."
            )
        device = self.keys.device
        pair = torch.arange((count + 1) // 2, device=device)
        first = torch.as_tensor(self.first_replicate, device=device).view(-1, 1, 1, 1)
        replicate = first + torch.arange(replicates, device=device)[:, None]  # [N or 1, 1, R, 1]
        words = philox(
            self.keys[:, None, None, None],
            pair,
            positions[:, :, None, None] & WORD,
            self.groups[:, None, None, None],
            replicate << 8 | purpose,
        )
        numbers = torch.stack((uniform(*words[:2]), uniform(*words[2:])), -1)
        return numbers.flatten(-2)[..., :count].expand(-1, -1, replicates, count)
