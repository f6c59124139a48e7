"""How often each key of each row was measured, and the request that makes counts of measured bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..circuits import Loader

MOST_SHOTS_AT_ONCE = 1 << 22
"""Shots, of a byte each, whose outcomes are held at a time, all rows together; a row is never split."""


@dataclass(frozen=True, eq=False, repr=False)
class RowCounts:
    """How often each key of each row was measured.

    Parameters
    ----------
    counts : Tensor, int64, (R, n)
        Shots that gave a key; 0 at every key of probability 0.
    discarded : Tensor, int64, (R,)
        Shots that gave none: padding, a masked key, a wrong Hamming weight.
    shots : int
        Of each row; a row of all zeros gets none.
    classical : RowCounts, optional
        The baseline: the same number of shots drawn from the rows by a pseudo-random multinomial draw.
    diagnostics : mapping
        `device`, `calibration`, `noise`, `loader`, `method`, `depth`, `two_qubit_gates`, `seed`,
        `not_modelled` and `fallbacks` (tuples of sentences) as far as they apply.
    estimate, std_error : Tensor, float64, (R, n), optional
        What mitigation made of the counts: probabilities, and the standard error of each.
    """

    counts: Tensor
    discarded: Tensor
    shots: int
    classical: RowCounts | None = None
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    estimate: Tensor | None = None
    std_error: Tensor | None = None

    def __repr__(self) -> str:
        kept = f"{int(self.counts.sum())} kept, {int(self.discarded.sum())} discarded"
        return f"RowCounts({tuple(self.counts.shape)}, shots={self.shots}, {kept}, {self.diagnostics.get('device')})"

    def probabilities(self) -> Tensor:
        """Share of each key among the shots that gave one, or `estimate` where there is one, float64, (R, n).

        0 in a row without any.
        """
        if self.estimate is not None:
            return self.estimate
        valid = self.counts.sum(-1, keepdim=True)
        return self.counts / valid.clamp_min(1).double()


@dataclass(frozen=True, eq=False, repr=False)
class RowRequest:
    """Rows to be measured: all that is needed to bind the circuit, and to read the outcomes even after a restart.

    Parameters
    ----------
    p : Tensor, float64, (R, n)
        From `check_rows`. Rows of all zeros are not run.
    loader : Loader
    shots : int
        Of each row.
    seed : int
        Of the simulation and of the classical baseline.
    diagnostics : mapping
        Passed on to `RowCounts`.
    """

    p: Tensor
    loader: Loader
    shots: int
    seed: int
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def running(self) -> Tensor:
        """Which rows have mass, bool (R,): only they are run."""
        return self.p.sum(-1) > 0

    def bindings(self) -> np.ndarray:
        """The angles of the rows that are run, (R', P)."""
        return self.loader.angles(self.p[self.running])

    def finish(self, outcomes: np.ndarray) -> RowCounts:
        """The counts of the outcomes (R', S >= shots, B) that the bindings gave; devices may round shots up."""
        step = rows_at_once(self.shots, outcomes.shape[-1])
        parts = [self.tally(outcomes[start : start + step]) for start in range(0, len(outcomes), step)]
        return self.finish_counts(parts)

    def tally(self, outcomes: np.ndarray) -> Tensor:
        """How often each key stands in some rows' outcomes (R'', S >= shots, B), int64 (R'', n)."""
        n = self.p.shape[-1]
        return tally(torch.from_numpy(self.loader.keys(outcomes[:, : self.shots], n)), n)

    def finish_counts(self, parts: Sequence[Tensor]) -> RowCounts:
        """The counts of what `tally` gave for all rows that were run, part by part."""
        counts = torch.zeros(self.p.shape, dtype=torch.int64)
        if parts:
            counts[self.running] = torch.cat(list(parts))
        counts[self.p == 0] = 0
        return self._result(counts, self.classical(), self.diagnostics)

    def classical(self) -> Tensor:
        """The baseline's counts, (R, n): independent draws by pseudo-random numbers."""
        generator = torch.Generator().manual_seed(self.seed ^ 0x5EED)
        counts = torch.zeros(self.p.shape, dtype=torch.int64)
        if bool(self.running.any()):
            counts[self.running] = draw_counts(self.p[self.running], self.shots, generator)
        return counts

    def _result(self, counts: Tensor, classical: Tensor, diagnostics: Mapping[str, Any]) -> RowCounts:
        spent = self.shots * self.running.long()
        baseline = RowCounts(
            classical, spent - classical.sum(-1), self.shots, diagnostics={"device": "pseudo-random numbers"}
        )
        return RowCounts(counts, spent - counts.sum(-1), self.shots, baseline, diagnostics)


def rows_at_once(shots: int, num_bytes: int = 1) -> int:
    """Rows of as many shots, of outcomes of as many bytes, that are taken together."""
    return max(1, MOST_SHOTS_AT_ONCE // (shots * num_bytes))


def tally(keys: Tensor, n: int) -> Tensor:
    """How often each of n keys stands in a row of keys (R, S), int64 (R, n); -1 counts for none."""
    counts = torch.zeros(keys.shape[0], n + 1, dtype=torch.int64)
    return counts.scatter_add_(-1, keys + 1, torch.ones((), dtype=torch.int64).expand_as(keys))[:, 1:]


def draw_outcomes(p: Tensor, shots: int, generator: torch.Generator) -> Tensor:
    """Independent draws (R, shots), int64, from rows of probabilities (R, n), float64; never an outcome of 0."""
    cdf = p.cumsum(-1)
    total = cdf[:, -1:]
    points = torch.rand(len(p), shots, generator=generator, dtype=torch.float64).mul_(total)
    torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)), out=points)
    return torch.searchsorted(cdf, points, right=True)


def draw_counts(p: Tensor, shots: int, generator: torch.Generator) -> Tensor:
    """Counts (R, n) of `shots` independent draws from each row, int64."""
    counts = torch.zeros(p.shape, dtype=torch.int64)
    step = rows_at_once(shots)
    for start in range(0, len(p), step):
        part = slice(start, start + step)
        counts[part] = tally(draw_outcomes(p[part], shots, generator), p.shape[-1])
    return counts
