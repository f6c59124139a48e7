"""Multilevel Monte Carlo over surrogate weights: cheap levels often, the exact row seldom."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError
from ..samplers import MonteCarloSampler
from .base import Control, dense_weights
from .registry import make_control

PILOT = 16
"""Draws a row from which the variance of a step is estimated; they are not used again."""


@dataclass(frozen=True)
class Step:
    """One step of the telescope: from level `lower` up to level `upper`.

    `variance` is that of one draw, summed over coordinates, the mean over rows; `cost` the multiply-adds of one
    draw; `draws` how many a row got.
    """

    lower: str
    upper: str
    variance: float
    cost: float
    draws: int


@dataclass(frozen=True)
class MultilevelEstimate:
    """A multilevel estimate of attention and how its budget was spent.

    Parameters
    ----------
    output : Tensor, (..., L, d)
    std_error : Tensor or None, (..., L, d)
        From the sample variance of each step's draws; None where a step got a single draw.
    steps : tuple of Step
    known_cost : float
        Multiply-adds a query for what is no draw: the lowest level's known sum and every used level's
        normaliser. Not part of the budget.
    budget : float
        Multiply-adds a query that draws might cost.
    """

    output: Tensor
    std_error: Tensor | None
    steps: tuple[Step, ...]
    known_cost: float
    budget: float

    @property
    def spent(self) -> float:
        """Multiply-adds a query that draws did cost."""
        return sum(step.draws * step.cost for step in self.steps)

    @property
    def predicted_variance(self) -> float:
        """sum_l V_l / n_l: variance of the output, summed over coordinates, the mean over rows."""
        return sum(step.variance / step.draws for step in self.steps)

    def report(self) -> str:
        """The allocation, a line a step."""
        lines = ["step                         variance a draw   cost a draw   draws a row"]
        for s in self.steps:
            lines.append(f"{s.lower + ' to ' + s.upper:<29}{s.variance:<18.3g}{s.cost:<14,.0f}{s.draws}")
        lines.append(
            f"spent {self.spent:,.0f} of {self.budget:,.0f} multiply-adds a query on draws, and "
            f"{self.known_cost:,.0f} on known sums; predicted variance {self.predicted_variance:.3g}"
        )
        return "\n".join(lines)


def allocate(variances: Sequence[float], costs: Sequence[float], budget: float) -> list[int]:
    """Draws of each level that minimise sum_l V_l / n_l for sum_l n_l C_l <= budget.

    n_l = budget sqrt(V_l / C_l) / sum_m sqrt(V_m C_m), rounded down, at least 1 (Giles 2008, eq. 12; 2015, sec. 1.3).

    Parameters
    ----------
    variances : sequence of float, >= 0
    costs : sequence of float, > 0
    budget : float
        At least sum_l C_l, one draw of each level.

    Raises
    ------
    ArgumentError, ShapeError
        If a number is not allowed, the budget too small, or the lengths differ.

    Examples
    --------
    >>> allocate([4.0, 1.0], [1.0, 4.0], 80)
    [40, 10]
    """
    if len(variances) != len(costs) or not len(costs):
        raise ShapeError(f"variances has {len(variances)} levels, costs {len(costs)}; one of each a level.")
    if not all(math.isfinite(v) and v >= 0 for v in variances):
        raise ArgumentError(f"variances={list(variances)} is not allowed: they must be finite and >= 0.")
    if not all(math.isfinite(c) and c > 0 for c in costs):
        raise ArgumentError(f"costs={list(costs)} is not allowed: they must be finite and > 0.")
    if not (math.isfinite(budget) and budget >= sum(costs)):
        raise ArgumentError(
            f"budget={budget} is not allowed: one draw of each level costs {sum(costs):g}, it must be that at least."
        )
    draws = [0.0] * len(costs)
    free = list(range(len(costs)))
    left = float(budget)
    while free:
        norm = sum(math.sqrt(variances[i] * costs[i]) for i in free)
        wanted = {i: left * math.sqrt(variances[i] / costs[i]) / norm if norm else 0.0 for i in free}
        few = [i for i in free if wanted[i] < 1]  # they get one draw, the others share the rest
        for i in few or free:
            draws[i] = max(1.0, wanted[i])
        left -= sum(costs[i] for i in few)
        free = [i for i in free if i not in few] if few else []
    return [int(n + 1e-9) for n in draws]


def multilevel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Sequence[str | Control] = ("linformer", "topk", "exact"),
    *,
    budget: float,
    is_causal: bool = False,
    scale: float | None = None,
    generator: torch.Generator | None = None,
) -> MultilevelEstimate:
    """Estimate softmax(scale q·k) v by a telescoping sum over levels p̂_0, ..., p̂_L = p.

    With p̂_0's sum known, and for each step n_l draws j of its own from π_l = (p̂_l + p̂_{l-1}) / 2,

        o = sum_j p̂_0 v_j + sum_l E[ (p̂_l(j) - p̂_{l-1}(j)) / π_l(j) (v_j - μ_0) ].

    Both weights sum to 1, so any vector may be taken off v_j; μ_0, the known sum, is at hand. The ratio is at most
    2 in size, so no row has the heavy tail that draws from p would have. Unbiased: the variances V_l behind
    n_l ∝ sqrt(V_l / C_l) come from pilot draws that are not used again. Levels that do not pay, by sum_l
    sqrt(V_l C_l), the square root of variance times cost, are left out; steps from the lowest kept level on are
    what the result lists. One allocation for all rows.

    Costs count arithmetic in the estimator (p̂ at the draws, values read); finding the draws takes a pass over
    each row here, as with every sampler of this lab. Source: Giles, Multilevel Monte Carlo path simulation
    (2008); Multilevel Monte Carlo methods (2015).

    Parameters
    ----------
    q : Tensor, (..., L, E), float32 or float64
    k, v : Tensor, (..., n, E) and (..., n, d)
    levels : sequence of str or Control
        From the cheapest to the dearest; the last must be "exact".
    budget : float
        Multiply-adds a query that draws may cost.
    is_causal : bool
    scale : float, optional
        1 / sqrt(E) where None.
    generator : torch.Generator, optional

    Returns
    -------
    MultilevelEstimate

    Raises
    ------
    ShapeError, DtypeError, ArgumentError
        If shapes do not fit, the last level is not exact, or the budget does not pay for one draw of a step.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> q, k, v = (torch.randn(4, 64, 16, generator=g) for _ in range(3))
    >>> est = multilevel_attention(q, k, v, ["performer", "exact"], budget=2000, generator=g)
    >>> [(s.lower, s.upper, s.draws) for s in est.steps]
    [('performer', 'exact', 12)]
    """
    leading = q.shape[:-2]
    if q.ndim < 2 or k.shape[:-2] != leading or v.shape[:-1] != k.shape[:-1]:
        raise ShapeError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (..., L, E), (..., n, E) and "
            "(..., n, d) with the same leading dimensions."
        )
    if isinstance(levels, str) or len(levels) < 2:
        raise ArgumentError(f"levels={levels!r} is not allowed: it must be a list of two controls or more.")
    made = [make_control(level) for level in levels]
    if not made[-1].oracle:
        raise ArgumentError(f"levels={[c.name for c in made]} is not allowed: the last must be 'exact'.")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    queries, keys, values = (x.reshape(leading.numel(), *x.shape[-2:]) for x in (q, k, v))
    positions = torch.arange(q.shape[-2], device=q.device)
    prepared = [
        c.prepare(keys, values, scale=scale, causal=is_causal, q=queries, generator=generator) for c in made
    ]
    weights = [dense_weights(p, queries, positions, keys.shape[1]) for p in prepared]  # [N, L, n] each
    sums = [p.sums(queries, positions) for p in prepared[:-1]]

    def step_samples(a: int, b: int, start: int, count: int) -> Tensor:
        """`count` samples a row of the step from level a to b, (N, L, count, d), values about level `start`."""
        proposal = (weights[a] + weights[b]) / 2
        draws = MonteCarloSampler().draw(proposal.log(), count, generator=generator)
        ratio = (weights[b] - weights[a]).gather(-1, draws.indices) / proposal.gather(-1, draws.indices)
        head = torch.arange(len(values), device=q.device)[:, None, None]
        return ratio[..., None] * (values[head, draws.indices] - sums[start][..., None, :])

    top, width = len(made) - 1, v.shape[-1]
    cost = {
        (a, b): prepared[a].cost_at() + prepared[b].cost_at() + width
        for a in range(top)
        for b in range(a + 1, top + 1)
    }
    variance = {(a, b): step_samples(a, b, a, PILOT).double().var(2).sum(-1).mean().item() for a, b in cost}
    paths = [
        list(itertools.pairwise((*kept, top)))
        for size in range(1, top + 1)
        for kept in itertools.combinations(range(top), size)
    ]
    affordable = [path for path in paths if sum(cost[e] for e in path) <= budget]
    if not affordable:
        raise ArgumentError(
            f"budget={budget} is not allowed: one draw of the cheapest step costs "
            f"{min(sum(cost[e] for e in path) for path in paths):g}."
        )
    path = min(affordable, key=lambda path: sum(math.sqrt(variance[e] * cost[e]) for e in path))
    counts = allocate([variance[e] for e in path], [cost[e] for e in path], budget)

    start = path[0][0]
    output, square = sums[start].clone(), torch.zeros_like(sums[start])
    for (a, b), count in zip(path, counts, strict=True):
        samples = step_samples(a, b, start, count)
        output += samples.mean(2)
        square += samples.var(2) / count if count > 1 else torch.nan
    used = sorted({level for edge in path for level in edge})
    return MultilevelEstimate(
        output=output.reshape(*leading, *output.shape[1:]),
        std_error=None if min(counts) < 2 else square.sqrt().reshape(*leading, *square.shape[1:]),
        steps=tuple(
            Step(made[a].name, made[b].name, variance[a, b], cost[a, b], count)
            for (a, b), count in zip(path, counts, strict=True)
        ),
        known_cost=sum(prepared[i].cost(k.shape[-2]) for i in used),
        budget=float(budget),
    )
