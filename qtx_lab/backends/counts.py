"""How often each key of each row was measured, and the request that makes counts of measured bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..circuits import Loader


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
    """

    counts: Tensor
    discarded: Tensor
    shots: int
    classical: RowCounts | None = None
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        kept = f"{int(self.counts.sum())} kept, {int(self.discarded.sum())} discarded"
        return f"RowCounts({tuple(self.counts.shape)}, shots={self.shots}, {kept}, {self.diagnostics.get('device')})"

    def probabilities(self) -> Tensor:
        """Share of each key among the shots that gave one, float64, (R, n); 0 in a row without any."""
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
        keys = torch.from_numpy(self.loader.keys(outcomes[:, : self.shots], self.p.shape[-1]))
        counts = torch.zeros(self.p.shape, dtype=torch.int64)
        counts[self.running] = tally(keys, self.p.shape[-1])
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


def tally(keys: Tensor, n: int) -> Tensor:
    """How often each of n keys stands in a row of keys (R, S), int64 (R, n); -1 counts for none."""
    counts = torch.zeros(keys.shape[0], n + 1, dtype=torch.int64)
    return counts.scatter_add_(-1, keys + 1, torch.ones_like(keys))[:, 1:]


def draw_outcomes(p: Tensor, shots: int, generator: torch.Generator) -> Tensor:
    """Independent draws (R, shots), int64, from rows of probabilities (R, n), float64; never an outcome of 0."""
    cdf = p.cumsum(-1)
    total = cdf[:, -1:]
    points = torch.rand(len(p), shots, generator=generator, dtype=torch.float64) * total
    points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, points, right=True)


def draw_counts(p: Tensor, shots: int, generator: torch.Generator) -> Tensor:
    """Counts (R, n) of `shots` independent draws from each row."""
    return tally(draw_outcomes(p, shots, generator), p.shape[-1])
