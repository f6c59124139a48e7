"""Coordinates of attention outputs by amplitude estimation, beside as many shots and classical draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import AmplitudeEstimate, AmplitudeEstimator, CircuitSampler
from ..backends.counts import mean_and_variance
from ..errors import ShapeError
from .numbers import Z95


@dataclass(frozen=True, eq=False)
class Estimates:
    """Estimates of R outputs with the ends of their 95 % intervals, each float64 (R,)."""

    value: Tensor
    lower: Tensor
    upper: Tensor

    @property
    def half_width(self) -> Tensor:
        """Half of each interval, (R,)."""
        return (self.upper - self.lower) / 2


@dataclass(frozen=True, eq=False)
class OutputEstimates:
    """One coordinate of the output of each of R rows, estimated in three ways that use the row equally often.

    Parameters
    ----------
    exact : Tensor, float64, (R,)
        The coordinates themselves, which take a classical computer a multiplication for each key.
    methods : mapping of str to Estimates
        "amplitude estimation"; "shots": mean value of the keys that the circuit of the sampler's loader
        measures; "classical draws": that of keys which pseudo-random numbers draw.
    rest : Tensor, float64, (R,)
        Weight of the keys beyond the largest ones. What they give is summed exactly for all three.
    amplitude : AmplitudeEstimate
        Of the mean value of the largest keys: its loads, schedule, gates and decay.
    """

    exact: Tensor
    methods: Mapping[str, Estimates]
    rest: Tensor
    amplitude: AmplitudeEstimate


def estimate_outputs(
    sampler: CircuitSampler, p: Tensor, v: Tensor, *, loads: int, keys: int, seed: int
) -> OutputEstimates:
    """Estimate one coordinate of the output of each row by amplitude estimation, by shots and by draws.

    Parameters
    ----------
    sampler : CircuitSampler
        Its backend runs the amplitude estimation; it measures the rows for the shots and their baseline.
    p : Tensor, (R, n)
        Rows of attention.
    v : Tensor, (n,)
        The coordinate of each key's value.
    loads : int
        Most uses of a row's loader and its inverse; as many shots and draws are made.
    keys : int
        Of each row so many of the largest weights are estimated, at most 16.
    seed : int
        The same seed gives the same numbers.

    Raises
    ------
    ShapeError
        If v is not one number for each key.
    ArgumentError, BackendUnavailable
        As `AmplitudeEstimator.estimate` and `CircuitSampler.measure`.
    """
    if p.ndim != 2 or v.shape != p.shape[-1:]:
        raise ShapeError(
            f"v has shape {tuple(v.shape)}; with p {tuple(p.shape)} it must be one number for each key."
        )
    p, v = p.double(), v.double()
    largest = p.topk(min(keys, p.shape[-1]), dim=-1)
    mass = largest.values.sum(-1)
    rows, values = largest.values / mass[:, None], v[largest.indices]
    exact = p @ v
    offset = exact - mass * (rows * values).sum(-1)
    amplitude = AmplitudeEstimator(sampler.backend).estimate(
        rows, values[..., None], loads=loads, generator=torch.Generator().manual_seed(seed)
    )
    measured = sampler.measure(rows, loads, generator=torch.Generator().manual_seed(seed))
    assert measured.classical is not None
    ends = (x[:, 0] for x in (amplitude.values, amplitude.lower, amplitude.upper))
    methods = {
        "amplitude estimation": Estimates(*ends),
        "shots": _mean_value(measured.counts, values),
        "classical draws": _mean_value(measured.classical.counts, values),
    }
    whole = {
        name: Estimates(*(offset + mass * x for x in (part.value, part.lower, part.upper)))
        for name, part in methods.items()
    }
    return OutputEstimates(exact, whole, (1 - mass).clamp_min(0), amplitude)


def _mean_value(counts: Tensor, values: Tensor) -> Estimates:
    """Mean of the values (R, n) of drawn keys, from their counts (R, n), with its 95 % interval."""
    mean, variance = mean_and_variance(counts.double(), values)
    variance = variance / (counts.sum(-1) - 1).clamp_min(1)
    half = Z95 * variance.sqrt()
    return Estimates(mean, mean - half, mean + half)
