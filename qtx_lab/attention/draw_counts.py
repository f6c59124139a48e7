"""How many draws each row needs to keep a tolerance, and the order of keys in which they are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..estimates import Draws
from ..problem import AttentionProblem
from ..samplers import InversionSampler
from ..samplers.value_order import FIRST_VALUES, ValueOrder, first_whole_blocks
from ..streams import Purpose, Stream
from .predicted_error import ErrorModel, OutputSize, Scale, ValueTable, rest_square, student_factor

EXACT = -1
"""The count of a row that is computed exactly."""

RISK_OF_DRAWS = 0.6
"""Share of the allowed risk that is given to the draws; the rest is for the assumptions of the bound."""

RUNGS = 4
"""Number of candidate counts from one count to its double."""

FEW_DRAWS = 4
"""Number of draws of the smallest pilot."""

PILOT_SHARE = 8
"""The first pilot has the row's smallest possible count over this number."""

ORDER_BITS = 7
"""Bits of a coordinate in value order. With more bits, fewer keys tie and stand in random order."""

REHEARSALS = 16
"""Number of replicates in a rehearsal, which draws the stored components of the values."""

TRIALS = 4
"""Largest number of counts that are rehearsed."""

DESCENT = 2 * RUNGS
"""Rungs by which the first rehearsal lies below the predicted count: a quarter of its draws."""


@dataclass(frozen=True)
class KeyOrder:
    """The keys of each head as they are laid out for the draws of a tolerance.

    Parameters
    ----------
    random : Tensor, int64, (N, n)
        The key at each place of a random order, in which rows stand that see few keys.
    values : Tensor, (N, n, Ev), or None
        For samplers in value order: what the order along the curve is fitted to, as `RowOrders` does.
    masked : bool
        Whether a mask decides which keys a row sees.
    """

    random: Tensor
    values: Tensor | None
    masked: bool = False
    along: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """The place in the random order of each key along the curve, (N, n), by the block it is fitted to."""

    @classmethod
    def of(cls, problem: AttentionProblem, sampler: InversionSampler, stream: Stream) -> KeyOrder:
        """The random order is a function of the seed and the keys' indices: no later key changes it."""
        number = stream.of_purpose(Purpose.TIES).uniform_of_heads(1, problem.num_keys)[:, 0, 0]
        # The order along the curve knows no window: it would change from row to row.
        masked = problem.mask is not None
        return cls(number.argsort(-1), problem.values if sampler.ordered else None, masked)

    def place(self, sampler: InversionSampler, logits: Tensor, heads: slice, points: Tensor) -> Draws:
        """Draws at points of rows (heads, B, keys), whose keys stand as they come."""
        random = self.random[heads, None]  # [heads, 1, n]
        logits = F.pad(logits, (0, random.shape[-1] - logits.shape[-1]), value=-torch.inf)
        if self.values is None:
            draws = sampler.place(logits.gather(-1, random.expand_as(logits)), points)
        else:
            seen = logits > -torch.inf
            blocks = first_whole_blocks(seen) if self.masked else seen.new_zeros(seen.shape[:2]).long()
            ordered = self._along(blocks, heads)
            order = random.expand(*ordered.shape[:2], -1).gather(-1, ordered)
            in_order = logits.gather(-1, order.expand_as(logits))
            number = torch.where(blocks < 0, 0, seen.sum(-1))
            draws = sampler.place_in_order(in_order, ordered, points, number)
        keys = random.expand(*draws.indices.shape[:2], -1)
        return replace(draws, indices=keys.gather(-1, draws.indices))

    def _along(self, blocks: Tensor, heads: slice) -> Tensor:
        """The places along the curve for rows whose orders are fitted to these blocks (heads, B).

        int64, (heads, B or 1, n).
        """
        assert self.values is not None
        used = blocks[blocks >= 0].unique().tolist() or [0]
        for block in used:
            if block not in self.along:
                first = block * FIRST_VALUES
                fit = ValueOrder.fit(self.values[:, first : first + FIRST_VALUES])
                along = fit.keys(self.values, ORDER_BITS).gather(-1, self.random)
                self.along[block] = along.argsort(dim=-1, stable=True)
        if len(used) == 1:
            return self.along[used[0]][heads, None]
        orders = torch.stack([self.along[block][heads] for block in used])  # [blocks, heads, n]
        which = torch.searchsorted(
            torch.tensor(used, device=blocks.device), blocks.clamp_min(used[0]).contiguous()
        )
        return orders[which, torch.arange(orders.shape[1], device=which.device)[:, None]]


@dataclass(frozen=True)
class Rows:
    """Some rows of some heads, and what draws them.

    Parameters
    ----------
    heads : slice
    positions : Tensor, int64, (rows,)
    logits : Tensor, (heads, rows, n)
    p : Tensor, (heads, rows, n)
        Their probabilities.
    values : Tensor, (heads, m, d)
        m >= n.
    table : ValueTable
        Of all heads.
    sampler : InversionSampler
    order : KeyOrder or None
        None where the order of keys does not matter.
    """

    heads: slice
    positions: Tensor
    logits: Tensor
    p: Tensor
    values: Tensor
    table: ValueTable
    sampler: InversionSampler
    order: KeyOrder | None

    @property
    def keys(self) -> Tensor:
        """How many keys each row sees: int64, (heads, rows)."""
        return (self.logits > -torch.inf).sum(-1)

    def draw(self, index: Tensor, count: int, replicates: int, stream: Stream) -> Draws:
        """Draws of the rows `index` (heads, B); the stream is that of all rows of the problem."""
        stream = stream.of_block(self.heads, self.positions[index])
        points = self.sampler.checked_points(stream, count, replicates)
        logits = self.logits.gather(1, index[..., None].expand(*index.shape, self.logits.shape[-1]))
        if self.order is None:
            return self.sampler.place(logits, points)
        return self.order.place(self.sampler, logits, self.heads, points)

    def error_model(self, counts: Tensor) -> ErrorModel:
        """The predicted errors at `counts` (heads, rows) draws."""
        return ErrorModel.of(self.p, counts, self.sampler, self.table, self.heads)


@dataclass(frozen=True)
class CountChoice:
    """The number of draws that keeps a tolerance, each (heads, rows).

    Parameters
    ----------
    counts : Tensor, int64
        Draws of a replicate; `EXACT` for rows that are computed exactly.
    pilot_draws : Tensor, int64
        Draws from which the size of the output was estimated.
    predicted_error : Tensor
        The bound of the relative error at these counts; 0 for exact rows.
    """

    counts: Tensor
    pilot_draws: Tensor
    predicted_error: Tensor


@dataclass(frozen=True)
class _Size:
    """|o|^2 as it was measured, the relative variance of |o|, and the pilot draws: (heads, rows)."""

    square: Tensor
    uncertainty: Tensor
    draws: Tensor


class CountChooser:
    """Chooses counts for the rows of one block.

    Parameters
    ----------
    rows : Rows
    stream : Stream
        Of all rows of the problem.
    tolerance, confidence : float
        |o_hat - o| <= tolerance |o| with probability `confidence`.
    replicates : int
    """

    def __init__(self, rows: Rows, stream: Stream, tolerance: float, confidence: float, replicates: int):
        self.rows, self.stream = rows, stream
        self.tolerance, self.replicates = tolerance, replicates
        self.confidence = 1 - RISK_OF_DRAWS * (1 - confidence)
        self.student = student_factor(self.confidence)
        self.keys = rows.keys
        least = rows.sampler.min_samples
        most = -(-int(self.keys.max()) // replicates) if self.keys.numel() else 0
        counts = sorted({round(2 ** (i / RUNGS)) for i in range(32 * RUNGS) if 2 ** (i / RUNGS) < most})
        self.ladder = torch.tensor([c for c in counts if c >= least], device=rows.p.device, dtype=torch.int64)

    def choose(self) -> CountChoice:
        """The least counts that keep the tolerance."""
        rows, tolerance2 = self.rows, self.tolerance**2
        bounds = OutputSize.of(rows.p, rows.table, rows.heads)
        zero = torch.zeros_like(self.keys)
        # No rung of a row depends on the keys of the rows beside it.
        top = (self.ladder * self.replicates < self.keys[..., None]).sum(-1)
        fewest, _ = self._search(tolerance2 * bounds.most, zero, top)
        size = self._measure_size(bounds, fewest)
        raised = 1 + self.student * size.uncertainty
        allowed = tolerance2 * size.square / raised
        rung, bound = self._search(allowed, fewest, top)
        if rows.sampler.ordered:
            rung, bound = self._rehearse(allowed, rung, bound)
        counts = self._counts(rung)
        # A row that is drawn only because its |o| may have been measured too large is computed exactly.
        surely = self.keys * (1 - 2 * size.uncertainty.sqrt())
        counts = torch.where(counts * self.replicates < surely, counts, EXACT)
        tiny = torch.finfo(bound.dtype).tiny
        error = (bound / self.replicates * raised / size.square.clamp_min(tiny)).sqrt()
        exact = counts == EXACT
        counts[self.keys == 0] = rows.sampler.min_samples  # nothing to attend to
        return CountChoice(counts, size.draws, torch.where(exact, 0, error))

    def _counts(self, rung: Tensor) -> Tensor:
        """The counts at rungs of the ladder; `EXACT` where they are no fewer draws than keys."""
        last = self.ladder.new_tensor([EXACT])
        counts = torch.cat((self.ladder, last))[rung]
        return torch.where(counts * self.replicates < self.keys, counts, EXACT)

    def _search(
        self, allowed: Tensor, low: Tensor, high: Tensor, scale: Scale | None = None
    ) -> tuple[Tensor, Tensor]:
        """The least rungs from `low` on whose bound is within `allowed`, and the bound.

        `high` where there is none below it.
        """
        low, high = low.clone(), torch.where(allowed > 0, high, len(self.ladder))
        low = torch.where(allowed > 0, low, high)
        bound = torch.zeros_like(allowed)
        while bool((low < high).any()):
            middle = (low + high) // 2
            model = self.rows.error_model(self.ladder[middle.clamp_max(len(self.ladder) - 1)])
            expected = (model if scale is None else model.scaled(scale)).quantile(self.confidence)
            open_rows = low < high
            enough = open_rows & (expected <= allowed * self.replicates)
            bound = torch.where(enough, expected, bound)
            high = torch.where(enough, middle, high)
            low = torch.where(open_rows & ~enough, middle + 1, low)
        return high, bound

    def _measure_size(self, bounds: OutputSize, fewest: Tensor) -> _Size:
        """|o|^2, by pilot draws where that saves more draws than it takes.

        What R o adds to it is estimated by the probes, and by |R o_hat|^2 of the pilot less its expected
        error, each weighted by the inverse of its variance.
        """
        rows = self.rows
        tiny = torch.finfo(bounds.projected.dtype).tiny
        floor = self._counts(fewest).clamp_min(0) * self.replicates  # the fewest draws of the row
        square, uncertainty = _combined(bounds, None, None)
        spent = torch.zeros_like(self.keys)
        count = (-(-floor // PILOT_SHARE)).clamp_min(max(FEW_DRAWS, rows.sampler.min_samples))
        o = rows.values.new_zeros(*self.keys.shape, rows.values.shape[-1])
        variance = torch.zeros_like(square)
        repetition = 0
        while True:
            # Twice the pilot halves the uncertainty.
            needed = floor * bounds.most / square.clamp_min(tiny)
            saved = self.student * uncertainty / 2 * needed
            most_saved = (bounds.most / bounds.least.clamp_min(tiny) - 1) * floor
            more = (torch.minimum(saved, most_saved) > count) | (uncertainty > 0.1) & (most_saved > count)
            count = torch.where(more & (4 * (spent + count) < self.keys), count, 0)
            if not bool(count.any()):
                return _Size(square, uncertainty, spent)
            for size, index, real in by_count(count):
                if size:
                    stream = self.stream.of_purpose(Purpose.PILOT, repetition)
                    draws = rows.draw(index, size, 1, stream)
                    head = torch.arange(len(index), device=index.device)[:, None].expand_as(index)
                    o[head[real], index[real]] += size * draws.average(rows.values)[real]
            model = rows.error_model(count.clamp_min(rows.sampler.min_samples))
            variance += count.square() * model.rest
            spent += count
            drawn = spent.clamp_min(1)
            v = variance / drawn.square()
            piloted = rest_square(o / drawn[..., None], rows.table, rows.heads) - v
            row_square, row_uncertainty = _combined(bounds, piloted, (v, model.rest_shared))
            square = torch.where(count > 0, row_square, square)
            uncertainty = torch.where(count > 0, row_uncertainty, uncertainty)
            count, repetition = spent, repetition + 1

    def _rehearse(self, allowed: Tensor, rung: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
        """Lower rungs, where the sampler's own draws of the projections err no more than is allowed.

        A trial that is passed is followed by one further down, and one that is not by one where it says that
        the next would be.
        """
        zero = torch.zeros_like(allowed)
        passed = rung
        # The highest rung that is too low: seldom draws alone do too much there.
        failed = self._search(allowed, torch.zeros_like(rung), passed, Scale(zero, zero))[0] - 1
        trial = torch.maximum(passed - DESCENT, failed + 1)
        for repetition in range(TRIALS):
            active = (failed < trial) & (trial < passed) & (allowed > 0)
            if not bool(active.any()):
                break
            counts = torch.where(active, self.ladder[trial.clamp(0, len(self.ladder) - 1)], 0)
            model, scale = self._measured_scale(counts, repetition)
            raised = 1 + self.student * model.shared / (2 * REHEARSALS)
            expected = model.scaled(scale).quantile(self.confidence) * raised
            enough = active & (expected <= allowed * self.replicates)
            bound, rung, passed = (
                torch.where(enough, x, y) for x, y in ((expected, bound), (trial, rung), (trial, passed))
            )
            failed = torch.where(active & ~enough, trial, failed)
            start = torch.where(active & ~enough, trial + 1, passed)
            predicted, _ = self._search(allowed / raised, start, passed, scale)
            lower = torch.where(failed < 0, passed - DESCENT, (failed + passed) // 2)
            trial = torch.where(enough, lower.clamp_min(0), predicted)
        return rung, bound

    def _measured_scale(self, counts: Tensor, repetition: int) -> tuple[ErrorModel, Scale]:
        """The errors at counts (heads, rows), 0 for rows to be left out, and their scale in a rehearsal."""
        rows, r = self.rows, self.rows.table.components
        projections = rows.table.projections[rows.heads, : rows.p.shape[-1]]
        exact = rows.p @ projections
        measured = exact.new_zeros(exact.shape)
        stream = self.stream.of_purpose(Purpose.REHEARSAL, repetition * REHEARSALS)
        for count, index, real in by_count(counts):
            if count:
                draws = rows.draw(index, count, REHEARSALS, stream)
                mean = draws.average_by_replicate(projections) * REHEARSALS  # [heads, B, K, r]
                at = index[..., None].expand(*index.shape, exact.shape[-1])
                error = mean - exact.gather(1, at)[:, :, None]
                head = torch.arange(len(index), device=index.device)[:, None].expand_as(index)
                measured[head[real], index[real]] = error.square().mean(-2)[real]
        model = rows.error_model(counts.clamp_min(self.rows.sampler.min_samples))
        tiny = torch.finfo(measured.dtype).tiny
        measured = measured.double()
        projected, probed = measured[..., :r].sum(-1), measured[..., r:].sum(-1)
        return model, Scale(
            projected / model.projected.clamp_min(tiny), probed / model.probed.clamp_min(tiny)
        )


def _combined(
    bounds: OutputSize, piloted: Tensor | None, spread: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """|o|^2 and the relative variance of |o|, from the probes and from a pilot.

    The pilot gives |R o|^2, and (v, s): its expected error in R and the share of a direction in it.
    """
    tiny = torch.finfo(bounds.projected.dtype).tiny
    rest, variance = bounds.probed, bounds.probe_variance * bounds.probed.square()
    if piloted is not None and spread is not None:
        v, s = spread
        likely = torch.maximum(rest, piloted)
        by_probes = (bounds.probe_variance * likely.square()).clamp_min(tiny)
        by_pilot = (s * (4 * likely * v + 2 * v.square())).clamp_min(tiny)
        rest = (rest * by_pilot + piloted * by_probes) / (by_pilot + by_probes)
        variance = by_pilot * (by_probes / (by_pilot + by_probes))
    square = torch.maximum(torch.minimum(bounds.projected + rest, bounds.most), bounds.least)
    return square, variance / (2 * square.clamp_min(tiny)).square()


def by_count(counts: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(count, index (heads, B), real (heads, B)) of the rows of each count of `counts` (heads, rows).

    Heads with fewer such rows than others are filled up with rows that are not `real`.
    """
    for count in counts.unique().tolist():
        chosen = counts == count
        most = int(chosen.sum(-1).max())
        index = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :most]
        yield int(count), index, chosen.gather(-1, index)
