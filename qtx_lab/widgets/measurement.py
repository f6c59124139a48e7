"""Rows measured in parts: counts add up, and how near they are to the rows is known after every part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..backends import RowCounts
from ..circuits.fidelity import hellinger_fidelity, total_variation, total_variation_distance
from ..mitigation import project_to_simplex
from .numbers import Distances

BOOTSTRAP_RESAMPLES = 100
"""Resamples of the bootstrap that gives the standard error of a fidelity or a distance."""

NUM_PARTS = 16
"""Parts in which the shots of a simulator are run, so that they are seen to arrive."""

FIRST_PART_SHOTS = 16
"""Shots of the first part, at most."""


class MeasureRows(Protocol):
    """`QiskitQuantumBackend.sample_rows` or `CircuitSampler.measure`."""

    def __call__(self, p: Tensor, shots: int, *, generator: torch.Generator | None = None) -> RowCounts:
        """Counts of `shots` shots of each row of p (R, n)."""
        ...


@dataclass(frozen=True)
class FidelityPoint:
    """Hellinger fidelity of each row after some shots.

    Parameters
    ----------
    shots : int
        Shots of each row.
    fidelity, error : tuple of float, (R,)
        Of what was measured, and its standard error.
    classical, classical_error : tuple of float, (R,)
        Of the same number of classical draws, and its standard error.
    """

    shots: int
    fidelity: tuple[float, ...]
    error: tuple[float, ...]
    classical: tuple[float, ...]
    classical_error: tuple[float, ...]

    def of_row(self, row: int) -> dict[str, float]:
        """The numbers of one row by their names."""
        return {
            "shots": self.shots,
            "fidelity": self.fidelity[row],
            "error": self.error[row],
            "classical": self.classical[row],
            "classical_error": self.classical_error[row],
        }


@dataclass(frozen=True)
class Measurement:
    """What was measured of some rows so far.

    Parameters
    ----------
    counts : RowCounts
        Sums over all parts, with the classical baseline of as many draws. Diagnostics are those of the last
        part, with the `fallbacks` of all. An estimate by mitigation is that of the last part.
    curve : tuple of FidelityPoint
        One after each part.
    """

    counts: RowCounts
    curve: tuple[FidelityPoint, ...] = ()

    @classmethod
    def empty(cls, num_rows: int, num_keys: int) -> Measurement:
        """Nothing measured yet of rows (R, n)."""
        counts = torch.zeros(num_rows, num_keys, dtype=torch.int64)
        discarded = torch.zeros(num_rows, dtype=torch.int64)
        return cls(RowCounts(counts, discarded, 0, RowCounts(counts, discarded, 0)))

    @property
    def baseline(self) -> RowCounts:
        """The classical draws."""
        assert self.counts.classical is not None
        return self.counts.classical

    def plus(self, part: RowCounts, p: Tensor, seed: int) -> Measurement:
        """Add the counts of another part, and the fidelity to the rows p (R, n) after it.

        Parameters
        ----------
        part : RowCounts
            Without a classical baseline, it adds nothing to the baseline so far.
        seed : int
            Of the bootstrap.
        """
        before, baseline = self.counts, self.baseline
        if part.classical is not None:
            draws = baseline.counts + part.classical.counts
            baseline = replace(baseline, counts=draws, shots=baseline.shots + part.shots)
        fallbacks = (*before.diagnostics.get("fallbacks", ()), *part.diagnostics.get("fallbacks", ()))
        counts = replace(
            part,
            counts=before.counts + part.counts,
            discarded=before.discarded + part.discarded,
            shots=before.shots + part.shots,
            classical=baseline,
            diagnostics={**part.diagnostics, "fallbacks": tuple(dict.fromkeys(fallbacks))},
        )
        return Measurement(counts, (*self.curve, _fidelity(counts, baseline, p, seed)))


def _fidelity(counts: RowCounts, baseline: RowCounts, p: Tensor, seed: int) -> FidelityPoint:
    measured, classical = (
        hellinger_fidelity(
            x.counts, p, resamples=BOOTSTRAP_RESAMPLES, generator=torch.Generator().manual_seed(seed)
        )
        for x in (counts, baseline)
    )
    numbers = (measured.value, measured.std_error, classical.value, classical.std_error)
    return FidelityPoint(counts.shots, *(tuple(torch.as_tensor(x).tolist()) for x in numbers))


def distances_of_counts(counts: Tensor, p: Tensor, seed: int) -> Distances:
    """Distances of counts (R, n) from rows p (R, n); the standard error is that of a bootstrap."""
    distance = total_variation(
        counts, p, resamples=BOOTSTRAP_RESAMPLES, generator=torch.Generator().manual_seed(seed)
    )
    return Distances(tuple(distance.value.tolist()), tuple(distance.std_error.tolist()))


def distances_of_estimate(estimate: Tensor, std_error: Tensor, p: Tensor, seed: int) -> Distances:
    """Distances of estimated rows (R, n) from rows p (R, n).

    The standard error is that of a parametric bootstrap: the estimate is given errors of the size that
    `std_error` (R, n) says, independent for each key, and is projected onto the distributions again. It is
    too large by up to a half where a row is as near as its shots allow, as is that of counts.
    """
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn((BOOTSTRAP_RESAMPLES, *p.shape), generator=generator, dtype=p.dtype)
    repeated = project_to_simplex(estimate + std_error.nan_to_num(0.0) * z, (p > 0).expand_as(z))
    spread = total_variation_distance(repeated, p).std(0)
    return Distances(tuple(total_variation_distance(estimate, p).tolist()), tuple(spread.tolist()))


def growing_parts(shots: int, num_parts: int = NUM_PARTS) -> list[int]:
    """Shots in parts that grow, so that the first ones are seen at once.

    >>> growing_parts(1024, 4)
    [16, 48, 192, 768]
    >>> growing_parts(1024, 1)
    [1024]
    """
    if num_parts == 1:
        return [shots]
    ends = np.geomspace(min(shots, FIRST_PART_SHOTS), shots, num_parts).round().astype(int)
    return np.diff([0, *np.unique(ends)]).tolist()


def measure_in_parts(
    measure: MeasureRows,
    p: Tensor,
    parts: Iterable[int],
    *,
    seed: int,
    start: Measurement | None = None,
) -> Iterator[Measurement]:
    """Measure rows part by part; yields what is known after each.

    Parameters
    ----------
    measure : callable
        `QiskitQuantumBackend.sample_rows` or `CircuitSampler.measure`.
    p : Tensor, (R, n)
        The rows.
    parts : iterable of int
        Shots of each part; see `growing_parts`.
    seed : int
        The same seed and the same parts give the same counts. A part's random numbers depend on the shots
        before it, so that a measurement that goes on has new ones.
    start : Measurement, optional
        What was measured before.
    """
    measurement = Measurement.empty(*p.shape) if start is None else start
    for shots in parts:
        generator = torch.Generator().manual_seed(seed + 7919 * (measurement.counts.shots + 1))
        measurement = measurement.plus(measure(p, shots, generator=generator), p, seed)
        yield measurement
