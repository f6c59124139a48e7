"""How often each key of each row was measured (`RowCounts`), and the counting and drawing of keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MAX_OUTCOME_BYTES = 1 << 22
"""Outcomes that are held in memory at a time, of all rows together. A row is never split."""


@dataclass(frozen=True, eq=False, repr=False)
class RowCounts:
    """How often each key of each row was measured.

    Parameters
    ----------
    counts : Tensor, int64, (R, n)
        Number of shots that gave each key; 0 for every key of probability 0.
    discarded : Tensor, int64, (R,)
        Number of shots that gave no key: padding, a masked key, a wrong Hamming weight.
    shots : int
        Shots of each row. A row of all zeros gets none.
    classical : RowCounts, optional
        The baseline: as many independent draws from the rows by pseudo-random numbers.
    diagnostics : mapping
        `device`, `calibration`, `noise`, `loader`, `method`, `depth`, `two_qubit_gates`, `seed`,
        `not_modelled` and `fallbacks` (tuples of sentences), as far as they apply; of a device
        `calibration_read` (when it was asked last) and `recalibrations` (what changed in this session).
    estimate, std_error : Tensor, float64, (R, n), optional
        The probabilities that a mitigation infers from the counts, and their standard errors.

    Examples
    --------
    >>> counts = RowCounts(torch.tensor([[30, 10]]), discarded=torch.tensor([0]), shots=40)
    >>> counts.probabilities()
    tensor([[0.7500, 0.2500]], dtype=torch.float64)
    """

    counts: Tensor
    discarded: Tensor
    shots: int
    classical: RowCounts | None = None
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    estimate: Tensor | None = None
    std_error: Tensor | None = None

    def __repr__(self) -> str:
        shape, device = tuple(self.counts.shape), self.diagnostics.get("device")
        shots = f"{int(self.counts.sum())} counted, {int(self.discarded.sum())} discarded"
        return f"RowCounts({shape}, shots={self.shots}, {shots}, {device})"

    def probabilities(self) -> Tensor:
        """Probabilities of the keys, float64 (R, n): `estimate`, or shares of the shots that gave a key.

        A row without such shots has only zeros.
        """
        if self.estimate is not None:
            return self.estimate
        valid = self.counts.sum(-1, keepdim=True)
        return self.counts / valid.clamp_min(1).double()


def rows_at_once(shots: int, num_bytes: int = 1) -> int:
    """How many rows of `shots` outcomes of `num_bytes` bytes each are held in memory together."""
    return max(1, MAX_OUTCOME_BYTES // (shots * num_bytes))


def tally(keys: Tensor, n: int) -> Tensor:
    """How often each of n keys occurs in each row of keys (R, S): int64 (R, n). The key -1 is not counted."""
    counts = torch.zeros(keys.shape[0], n + 1, dtype=torch.int64)
    return counts.scatter_add_(-1, keys + 1, torch.ones((), dtype=torch.int64).expand_as(keys))[:, 1:]


def mean_and_variance(counts: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (...,) of the values (..., n) of counted keys (..., n), and the variance of a shot's value.

    Shots that all agree do not tell how far others would lie: the variance is then that with one more shot at
    either end of the values.
    """
    shots, seen = counts.sum(-1), counts > 0
    mean = (counts * values).sum(-1) / shots.clamp_min(1)
    square = (counts * values.square()).sum(-1) / shots.clamp_min(1)
    least = values.masked_fill(~seen, torch.inf).amin(-1)
    largest = values.masked_fill(~seen, -torch.inf).amax(-1)
    ends = torch.stack((values.amin(-1), values.amax(-1)))
    more_mean = (shots * mean + ends.sum(0)) / (shots + 2)
    more_square = (shots * square + ends.square().sum(0)) / (shots + 2)
    variance = torch.where(least == largest, more_square - more_mean.square(), square - mean.square())
    return mean, variance.clamp_min(0)


def draw_outcomes(p: Tensor, shots: int, generator: torch.Generator) -> Tensor:
    """Independent draws, int64 (R, shots), from rows of probabilities, float64 (R, n).

    An outcome of probability 0 is never drawn.
    """
    cdf = p.cumsum(-1)
    total = cdf[:, -1:]
    points = torch.rand(len(p), shots, generator=generator, dtype=torch.float64).mul_(total)
    torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)), out=points)
    return torch.searchsorted(cdf, points, right=True)


def draw_counts(p: Tensor, shots: int, generator: torch.Generator) -> Tensor:
    """Counts, int64 (R, n), of `shots` independent draws from each row of probabilities, float64 (R, n)."""
    counts = torch.zeros(p.shape, dtype=torch.int64)
    step = rows_at_once(shots)
    for start in range(0, len(p), step):
        part = slice(start, start + step)
        counts[part] = tally(draw_outcomes(p[part], shots, generator), p.shape[-1])
    return counts
