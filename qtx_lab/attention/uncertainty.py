"""Gives an estimate its standard errors, their reliability and bounds, each made when it is first read."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from ..estimates import reliability
from ..problem import AttentionProblem
from ..samplers import SampledRows
from ..samplers.inversion import row_probabilities
from .bounds import Bounds
from .corrections import Correction
from .error_bars import ErrorBars, MeasuredRows, RowSums, degrees_of_freedom


def with_error_bars(
    sampled: SampledRows, problem: AttentionProblem, correction: Correction | None = None
) -> SampledRows:
    """The same estimate with standard errors, which are made when they are first read.

    An estimate from one replicate whose draws are not independent gets none: nothing tells its variance.

    A sampler's own standard errors stay as they are.

    Parameters
    ----------
    correction : Correction, optional
        What made the output, where controls did.
    """
    if sampled.make_std_error is not None:
        return sampled
    if correction is not None and bool(correction.exact_rows.all()):
        zero = torch.zeros_like(sampled.output)
        exact = torch.full_like(zero[..., 0], math.inf)
        return replace(
            sampled,
            make_std_error=lambda: zero,
            make_reliability=lambda: exact,
            make_bounds=lambda level: (sampled.output,) * 2,
            degrees_of_freedom=math.inf,
        )
    draws, design = sampled.make_draws(), sampled.design
    if not (design.independent or draws.replicates > 1):
        return sampled
    for_later, unit = problem.for_later(), problem.unit
    positions = problem.positions(slice(0, problem.shape[1]))
    cuts = list(
        problem.blocks(max(16, 4 * problem.width if design.in_order else 0) * draws.indices.shape[-1])
    )
    output = sampled.output if unit is None else sampled.output / unit
    degrees = degrees_of_freedom(design, draws)
    knows_p = draws.probabilities is not None or design.variance_weights is not None

    @functools.cache
    def measured() -> MeasuredRows:
        std_error, hidden = torch.empty_like(output), torch.empty_like(output[..., 0])
        later = for_later()
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            bars = ErrorBars(later.values, later.visible_keys(), later.is_causal, design, later.v.dtype)
            for block in cuts:
                drawn, cut = draws[block], None if correction is None else correction[block]
                sums = None
                if knows_p:
                    p = row_probabilities(later.logits(*block))
                    sums = RowSums.of(p, drawn, bars.distance[block[0]], design)
                    drawn = replace(drawn, probabilities=p.gather(-1, drawn.indices))
                rows = bars.measure(drawn, output[block], block[0], positions[block[1]], cut, sums)
                std_error[block], hidden[block] = rows.std_error, rows.hidden
        return MeasuredRows(std_error, hidden)

    def make_std_error() -> Tensor:
        std_error = measured().std_error
        return std_error if unit is None else std_error * unit

    def make_bounds(level: float) -> tuple[Tensor, Tensor]:
        low, high = torch.empty_like(output), torch.empty_like(output)
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            bounds = Bounds(for_later(), design, sampled.info.unbiased and correction is None, knows_p)
            for block in cuts:
                low[block], high[block] = bounds(draws[block], output[block], block, level)
        return (low, high) if unit is None else (low * unit, high * unit)

    return replace(
        sampled,
        make_std_error=make_std_error,
        make_reliability=lambda: reliability(measured().std_error, measured().hidden, degrees),
        make_bounds=make_bounds,
        degrees_of_freedom=degrees,
    )
