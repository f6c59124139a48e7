"""A tolerance in place of a number of draws: each row gets as many draws as keep its error within it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_number
from ..errors import ArgumentError
from ..estimates import AttentionEstimate, Draws, EstimateInfo, rounding_variance
from ..problem import AttentionProblem, log_sum_exp
from ..samplers import SAMPLERS, Design, InversionSampler, SampledRows, Sampler
from ..streams import Stream
from .draw_counts import EXACT, CountChooser, KeyOrder, Rows, by_count
from .error_bars import ErrorBars, degrees_of_freedom
from .predicted_error import ValueTable


@dataclass(frozen=True)
class Tolerance:
    """What is promised of every row: |o_hat - o| <= `relative` |o| with probability `confidence`."""

    relative: float
    confidence: float

    @classmethod
    def of(
        cls, tolerance: float | None, confidence: float, num_samples: int | None, sampler: Sampler
    ) -> Tolerance | None:
        """The promise that the arguments of `sampled_attention` ask for, or None.

        Raises
        ------
        ArgumentError
            If a number is out of bounds, a number of draws was given too, or the sampler cannot predict its
            variance.
        """
        confidence = check_number("confidence", confidence, least=0.5, below=1)
        if tolerance is None:
            return None
        tolerance = check_number("tolerance", tolerance, above=0)
        if tolerance > 1e30:  # its square must be a number
            raise ArgumentError(f"tolerance={tolerance} is not allowed: it must be a number up to 1e30.")
        if num_samples is not None:
            raise ArgumentError(
                f"num_samples={num_samples} and tolerance={tolerance} exclude each other: give one of them."
            )
        if not (sampler.predicts_variance or sampler.exact):
            able = [name for name, factory in SAMPLERS.items() if factory().predicts_variance]
            raise ArgumentError(
                f"tolerance needs a sampler that predicts its variance; sampler={sampler.name!r} does not: "
                f"use {', '.join(able[:-1])} or {able[-1]}."
            )
        return cls(tolerance, confidence)


@dataclass(frozen=True)
class _Group:
    """Rows `index` (heads, B) of some heads that got the same number of draws.

    `real` is False for padding.
    """

    heads: slice
    index: Tensor
    real: Tensor
    draws: Draws
    exact: bool

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """(heads, rows), each (heads, B): what `index` indexes."""
        heads = torch.arange(self.heads.start, self.heads.stop, device=self.index.device)
        return heads[:, None].expand(self.index.shape), self.index

    @property
    def real_rows(self) -> tuple[Tensor, Tensor]:
        """(heads, rows) of the rows that are no padding."""
        head, row = self.rows
        return head[self.real], row[self.real]


def to_tolerance(
    problem: AttentionProblem, sampler: Sampler, promise: Tolerance, replicates: int, stream: Stream
) -> AttentionEstimate:
    """Estimate every row so that |o_hat - o| <= tolerance |o| with probability `confidence`.

    The probabilities of a row are known, and a few numbers for every key (`ValueTable`). They give a bound of
    the row's error at every count of draws (`ErrorModel`), and the row gets the least count whose bound is
    within the tolerance. This happens before the row is drawn:

    - *The order of keys.* Keys are laid out in random order, unless draws are independent; for a sampler in
      value order, in random order where values are alike. So values that alternate in step with a comb make
      no row worse than others.
    - *The size of the output.* Part of |o| follows from the table. The rest of it is estimated from random
      directions, and by pilot draws where they save more draws than they take.
    - *What value order saves.* The sampler is rehearsed: it draws `REHEARSALS` times, and the averages of the
      projections in the table are compared with their exact values, which reads no value.

    The bound is raised by what Student's t makes of the uncertainty of both measurements. They use random
    numbers of their own, so the output is as unbiased as the sampler. A row that would need as many draws as
    it has keys is computed exactly.

    The probability is over all random numbers. It is a bound in the sense of its assumptions: errors that
    are nearly normal, apart from single far keys that are seldom drawn, for which there is a term of its own.
    """
    assert isinstance(sampler, InversionSampler)  # all that predict their variance are
    rows = _RowsToTolerance(problem, sampler, promise, replicates, stream)
    for heads, part in problem.blocks(0):
        for known, run in problem.runs(part):
            rows.estimate(heads, run, known)
    return rows.together()


class _RowsToTolerance:
    """The estimate while it is being computed, run of rows by run of rows."""

    def __init__(
        self,
        problem: AttentionProblem,
        sampler: InversionSampler,
        promise: Tolerance,
        replicates: int,
        stream: Stream,
    ):
        self.problem, self.sampler, self.promise = problem, sampler, promise
        self.replicates, self.stream = replicates, stream
        shape = problem.shape
        self.output = problem.values.new_empty(*shape, problem.width)
        self.spent, self.pilot = (
            torch.zeros(shape, dtype=torch.int64, device=self.output.device) for _ in range(2)
        )
        self.predicted, self.log_sum_exp = (self.output.new_zeros(shape) for _ in range(2))
        self.groups: list[_Group] = []
        self.exact_rows = 0
        self.order = None if sampler.independent else KeyOrder.of(problem, sampler, stream)
        self.tables: dict[int, ValueTable] = {}

    def estimate(self, heads: slice, part: slice, known: int) -> None:
        """Choose counts for rows `part` of some heads, which know the first `known` keys, and draw."""
        problem, promise, replicates = self.problem, self.promise, self.replicates
        if known not in self.tables:
            self.tables[known] = ValueTable.of(problem, known, self.stream)
        logits = problem.logits(heads, part)
        self.log_sum_exp[heads, part] = log_sum_exp(logits)
        p = logits.softmax(-1).masked_fill_(logits == -torch.inf, 0)
        values, positions = problem.values[heads], problem.positions(part)
        rows = Rows(heads, positions, logits, p, values, self.tables[known], self.sampler, self.order)
        chooser = CountChooser(rows, self.stream, promise.relative, promise.confidence, replicates)
        choice = chooser.choose()
        self.pilot[heads, part] = choice.pilot_draws
        self.spent[heads, part] = torch.where(choice.counts == EXACT, rows.keys, choice.counts * replicates)
        self.predicted[heads, part] = choice.predicted_error
        for count, index, real in by_count(choice.counts):
            if count == EXACT:
                chosen = index[..., None].expand(*index.shape, logits.shape[-1])
                draws = _every_key(p.gather(1, chosen), replicates)
                self.exact_rows += int(real.sum())
            else:
                draws = rows.draw(index, count, replicates, self.stream)
            group = _Group(heads, index + part.start, real, draws, count == EXACT)
            self.groups.append(group)
            self.output[group.real_rows] = draws.average(values)[real]

    def together(self) -> AttentionEstimate:
        """The estimate of all rows."""
        problem, groups, output = self.problem, self.groups, self.output
        design = Design(self.sampler.independent, self.sampler.count_variance)
        has_error = self.sampler.independent or self.replicates > 1
        sample = (
            groups[0].draws
            if groups
            else Draws(self.spent[..., :0], output[..., :0, 0], None, self.replicates)
        )
        # Copies, and not the problem itself, which would keep q and k alive.
        values, visible, unit = problem.values.clone(), problem.visible_keys(), problem.unit
        causal, dtype = problem.is_causal, problem.v.dtype
        positions = problem.positions(slice(0, problem.shape[1]))

        def make_std_error() -> Tensor:
            std_error = torch.zeros_like(output)
            bars = ErrorBars(values, visible, causal, design, dtype)
            for g in groups:
                if not g.exact:
                    error = bars(g.draws, output[g.rows], g.heads, positions[g.index])
                    std_error[g.real_rows] = error[g.real]
            return std_error if unit is None else std_error * unit

        shape, replicates = problem.shape, self.replicates
        sampled = SampledRows(
            problem.in_units(output),
            lambda: _padded_draws(groups, shape, replicates, output),
            design,
            self._info(),
            make_std_error if has_error else None,
            degrees_of_freedom(design, sample) if has_error else math.inf,
            lambda: self.log_sum_exp,
        )
        return sampled.to_estimate(problem)

    def _rounded_rows(self) -> int:
        """In how many rows rounding alone may exceed the tolerance."""
        visible, values = self.problem.visible_keys(), self.problem.values
        if visible is not None:
            values = torch.where(visible[..., None], values, 0)
        size = values.square().mean(1, keepdim=True).sqrt()
        dtype = self.problem.v.dtype
        variance = rounding_variance(self.output, size, self.problem.num_keys, dtype).sum(-1)
        allowed = (self.promise.relative * self.output).square().sum(-1)
        return int(((variance > allowed) & (self.log_sum_exp > -torch.inf)).sum())

    def _info(self) -> EstimateInfo:
        rows, total = self.problem.row_shape, self.output.shape[:2].numel()
        fallbacks: tuple[str, ...] = ()
        if self.exact_rows:
            mean = (self.spent + self.pilot).double().mean()
            fallbacks += (
                f"{self.exact_rows:,} of {total:,} rows were computed exactly: to the tolerance they need "
                f"as many draws as they have keys. With pilots a row took {mean:.1f} draws on average.",
            )
        rounded = self._rounded_rows()
        if rounded:
            fallbacks += (
                f"tolerance={self.promise.relative:g} is less than what rounding to {self.problem.v.dtype} "
                f"may change in {rounded:,} of {total:,} rows: they may miss it, whatever is drawn.",
            )
        return EstimateInfo(
            sampler=self.sampler.name,
            unbiased=self.sampler.unbiased,
            tolerance=self.promise.relative,
            confidence=self.promise.confidence,
            replicates=self.replicates,
            draws_per_row=self.spent.view(rows),
            pilot_draws_per_row=self.pilot.view(rows),
            predicted_relative_error=self.predicted.view(rows),
            fallbacks=fallbacks,
            log_sum_exp="exact",
        )


def _padded_draws(groups: list[_Group], shape: tuple[int, int], replicates: int, like: Tensor) -> Draws:
    """The draws of all rows (N, M), padded by draws of weight 0 to the most that a row has."""
    most = max((g.draws.indices.shape[-1] for g in groups), default=replicates) // replicates
    indices = torch.zeros(*shape, replicates, most, dtype=torch.int64, device=like.device)
    weights, p = (like.new_zeros(*shape, replicates, most) for _ in range(2))
    for g in groups:
        assert g.draws.probabilities is not None  # every sampler that inverts p knows it
        for x, y in ((indices, g.draws.indices), (weights, g.draws.weights), (p, g.draws.probabilities)):
            y = y[g.real].unflatten(-1, (replicates, -1))
            x[(*g.real_rows, slice(None), slice(0, y.shape[-1]))] = y
    return Draws(indices.flatten(-2), weights.flatten(-2), p.flatten(-2), replicates)


def _every_key(p: Tensor, replicates: int) -> Draws:
    """Rows p (heads, B, n) computed exactly, as draws of every key."""
    n = p.shape[-1]
    index = torch.arange(n, device=p.device).repeat(replicates).expand(*p.shape[:-1], replicates * n)
    return Draws(index, p.repeat(1, 1, replicates) / replicates, p.repeat(1, 1, replicates), replicates)
