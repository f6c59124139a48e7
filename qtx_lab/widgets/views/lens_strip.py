"""Error and variance of a head against draws, by all samplers: the strip under the maps of a lens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import QtxError
from ...samplers import SAMPLERS, Budget, make_sampler
from ...streams import Purpose
from .lens_heads import TINY, LensHeads

REPETITIONS = 8
"""Independent draws at each point."""

MAX_ROWS = 64
"""Rows of the head, evenly spaced, on which it is measured."""

MAX_CELLS = 1 << 18
"""Rows × keys on which it is measured, but for 4 rows."""

FIRST_DRAWS = 4
MAX_DRAWS = 1 << 10


@dataclass(frozen=True)
class StripPoint:
    """How far a sampler is off at a number of draws.

    Parameters
    ----------
    sampler : str
    draws : int
        Of a row.
    error : float
        Root mean square of ‖ô − o‖ / ‖o‖ over repetitions.
    variance : float
        E‖ô − E ô‖² / ‖o‖², estimated from as many.
    """

    sampler: str
    draws: int
    error: float
    variance: float


def strip_plan(num_keys: int, shown: str) -> list[tuple[str, int]]:
    """The samplers and numbers of draws in the order in which they are measured; the one that is shown first.

    >>> strip_plan(16, "sobol")[:3]
    [('sobol', 4), ('monte-carlo', 4), ('stratified', 4)]
    """
    names = [name for name in SAMPLERS if name not in ("exact", shown)]
    names = [shown, *names] if shown in SAMPLERS and shown != "exact" else names
    counts: list[int] = []
    while not counts or 2 * counts[-1] <= min(num_keys, MAX_DRAWS):
        counts.append(2 * counts[-1] if counts else FIRST_DRAWS)
    return [(name, count) for count in counts for name in names]


def strip_rows(num_queries: int, num_keys: int) -> Tensor:
    """The rows on which a head is measured: int64, evenly spaced, from the middle of each stretch."""
    count = min(num_queries, MAX_ROWS, max(4, MAX_CELLS // num_keys))
    return ((torch.arange(count) + 0.5) * (num_queries / count)).long()


@dataclass(frozen=True)
class StripStep:
    """A step of the measuring: a repetition of a point.

    Parameters
    ----------
    left : int
        Points that are still to come.
    point : StripPoint, optional
        The point that the step has completed.
    """

    left: int
    point: StripPoint | None = None


def strip_steps(heads: LensHeads, layer: int, head: int, shown: str) -> Iterator[StripStep]:
    """Measure the points of a head, repetition by repetition; what a sampler refuses to draw has no point."""
    part = heads.some_rows(layer, head, strip_rows(heads.num_queries, heads.num_keys).tolist())
    problem, stream = heads.problem_of(part), heads.stream(head, part.rows)
    plan = strip_plan(heads.num_keys, shown)
    for number, (name, draws) in enumerate(plan, 1):
        left, outputs = len(plan) - number, []
        try:
            for i in range(REPETITIONS):
                repetition = stream.of_purpose(Purpose.POINTS, i)
                sampled = make_sampler(name).estimate_rows(problem, Budget(draws), repetition)
                outputs.append(sampled.output[0].float())
                yield StripStep(left + 1)
        except QtxError:
            yield StripStep(left)
        else:
            yield StripStep(left, _point(name, draws, torch.stack(outputs), part.output.float()))


def _point(name: str, draws: int, outputs: Tensor, exact: Tensor) -> StripPoint:
    size = float(exact.square().sum().clamp_min(TINY))
    squares = (outputs - exact).square().sum((-2, -1))
    return StripPoint(name, draws, float((squares.mean() / size).sqrt()), float(outputs.var(0).sum()) / size)
