"""`InversionSampler`: the base of the samplers that choose only the points at which rows are inverted."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, ShapeError
from ..estimates import Draws
from ..problem import AttentionProblem, Block, KeyLayout
from ..streams import Stream
from .base import Budget, Design, SampledRows, StreamSampler, average_rows
from .inversion import invert, row_masses
from .value_order import FIRST_VALUES, RowOrders, cached_order, first_whole_blocks


@dataclass(frozen=True)
class RowLayout:
    """How the rows of a problem lay out their keys.

    Parameters
    ----------
    keys : KeyLayout, optional
        In the order that the rows of a head share; None where they have several.
    rows : RowOrders, optional
        Where a mask decides on them.
    """

    keys: KeyLayout | None
    rows: RowOrders | None

    @classmethod
    def of(cls, problem: AttentionProblem) -> RowLayout:
        """The layout of a problem's keys in value order.

        It knows no window, with which it would change from row to row.
        """
        shape = problem.keys.shape[:2]
        if problem.mask is None:
            return cls(problem.lay_out(cached_order(problem.v).view(shape)), None)
        values = problem.v.detach().to(problem.dtype).reshape(*shape, problem.width)
        blocks = problem.first_whole_blocks(first_whole_blocks)
        rows = RowOrders.of(values, blocks, lambda: cached_order(problem.v).view(shape))
        return cls(problem.lay_out(rows.orders[0]) if rows.shared else None, rows)


_LAYOUTS: WeakKeyDictionary[AttentionProblem, RowLayout | None] = WeakKeyDictionary()
"""The problems that `remember_layout` was called for, while they are alive, and their layouts."""


def remember_layout(problem: AttentionProblem) -> None:
    """Lay out the keys of a problem only once, because it is drawn from again and again."""
    _LAYOUTS.setdefault(problem, None)


class InversionSampler(StreamSampler):
    """Base of the samplers that invert each row's cumulative distribution at points of [0, 1).

    What makes them differ is where the points lie: `points`. Unless they form a comb, override
    `count_variance` too, which error bars and tolerances use: that of independent draws is `expected`.

    Examples
    --------
    Pairs of points that lie on opposite sides of 1/2:

    >>> class Antithetic(InversionSampler):
    ...     name = "antithetic"
    ...
    ...     def points(self, stream, num_samples, replicates):
    ...         u = stream.uniform(replicates, (num_samples + 1) // 2)
    ...         return torch.cat((u, 1 - u - 2**-53), -1)[..., :num_samples]
    ...
    ...     def count_variance(self, expected):
    ...         return expected
    >>> g = torch.Generator().manual_seed(0)
    >>> Antithetic().draw(torch.tensor([0.0, 0.0]), 4, generator=g).indices.sum()
    tensor(2)
    """

    unbiased = True
    predicts_variance = True
    ascending: bool = False
    """Whether the points of a replicate ascend, so that its draws come in the order in which keys are laid
    out."""

    @abstractmethod
    def points(self, stream: Stream, num_samples: int, replicates: int) -> Tensor:
        """Points (N, P, R, S) of the rows of a stream, float64 in [0, 1), replicates independent.

        Averaged over a replicate's points, which key they hit must have the distribution of a uniform number.
        """

    def count_variance(self, expected: Tensor) -> Tensor | None:
        """Variance of how often a key is drawn in a replicate, given how often it is on average.

        Here that of a comb, f (1 - f) with f the fractional part: a key is drawn as often as its share,
        rounded down or up.
        """
        f = expected.frac()
        return f * (1 - f)

    @property
    def min_samples(self) -> int:
        """The fewest draws of a replicate that it can make."""
        return 1

    def variance_weights(self, p: Tensor, num_samples: int | Tensor) -> tuple[Tensor, Tensor]:
        """a_j of rows p (..., n), and the weight w (..., 1) of a draw that varies.

        sum_j a_j (v_j - c)^2, for any c, is above the variance of one replicate, if keys lie in random order
        or neighbours in it are alike: a_j = c_j w^2 with the variance c_j of a key's count
        (`count_variance`), 0 for one that is sure. `num_samples` may be a number for each row, (..., 1).
        """
        variance = self.count_variance(num_samples * p)
        assert variance is not None
        return variance / num_samples**2, torch.ones_like(p[..., :1]) / num_samples

    def checked_points(self, stream: Stream, num_samples: int, replicates: int) -> Tensor:
        """`points`, of the right shape and in [0, 1).

        Raises
        ------
        ShapeError, ArgumentError
            If they are not, as a class of your own may make them.
        """
        points = self.points(stream, num_samples, replicates)
        if points.shape[-2:] != (replicates, num_samples) or points.ndim != 4:
            raise ShapeError(
                f"sampler={self.name!r} gave points {tuple(points.shape)}; they must be (heads, positions, "
                f"{replicates} replicates, {num_samples} draws)."
            )
        if points.numel() and not (float(points.amin()) >= 0 and float(points.amax()) < 1):
            raise ArgumentError(f"sampler={self.name!r} gave points outside [0, 1).")
        return points

    def place(self, logits: Tensor, points: Tensor) -> Draws:
        """Draws at given points (..., R, S) of rows (..., n)."""
        mass = row_masses(logits)
        indices, total = invert(mass, points.flatten(-2))
        probabilities = mass.gather(-1, indices) / total.clamp_min(1).to(mass.dtype)
        weights = torch.full_like(probabilities, 1 / indices.shape[-1]).masked_fill_(total == 0, 0)
        return Draws(indices, weights, probabilities, points.shape[-2])

    def place_in_order(self, logits: Tensor, order: Tensor, points: Tensor, seen: Tensor | int) -> Draws:
        """Draws at given points (h, m, R, S) of rows (h, m, n) whose keys stand in an order.

        The order is (h, n), or (h, m, n) where each row has its own.

        The draws name keys, not places. A row that sees fewer than `FIRST_VALUES` keys takes them as they
        come: it may not see those that the order was fitted to. `seen` says how many keys rows see, and
        broadcasts to (h, m).
        """
        order = order.view(len(order), -1, order.shape[-1]).expand(logits.shape)
        draws = self.place(logits, points)
        indices = order.gather(-1, draws.indices)
        early = torch.as_tensor(seen, device=logits.device) < FIRST_VALUES
        if not bool(early.any()):
            return replace(draws, indices=indices)
        early = early.expand(logits.shape[:2])
        rows = early.any(0).nonzero().squeeze(-1)  # drawn again, as their keys come
        some = logits[:, rows]
        as_they_come = torch.empty_like(some).scatter_(-1, order[:, rows], some)
        again = self.place(torch.where(early[:, rows, None], as_they_come, some), points[:, rows])
        keys = order[:, rows].gather(-1, again.indices)
        indices[:, rows] = torch.where(early[:, rows, None], again.indices, keys)
        draws.weights[:, rows] = again.weights
        assert draws.probabilities is not None  # these samplers know p
        assert again.probabilities is not None
        draws.probabilities[:, rows] = again.probabilities
        return replace(draws, indices=indices)

    def draw_from(
        self,
        stream: Stream,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        replicates: int = 1,
    ) -> Draws:
        """Draw keys with the random numbers of a stream: see `Sampler.draw_from`."""
        points = self.checked_points(stream, num_samples, replicates)  # [N, P, R, S]
        if not self.ordered or values is None:
            return self.place(logits, points)
        seen = logits > -torch.inf
        rows = RowOrders.of(values, first_whole_blocks(seen))
        every = slice(0, None)
        order = rows.orders[0][:, None].expand_as(logits) if rows.shared else rows.of_rows(every, every)
        number = torch.where(rows.which < 0, 0, seen.sum(-1))
        return self.place_in_order(logits.gather(-1, order), order, points, number)

    def estimate_rows(self, problem: AttentionProblem, budget: Budget, stream: Stream) -> SampledRows:
        """An estimate of the rows of a problem: see `Sampler.estimate_rows`."""
        # [N, L, R, S], shared by the heads of a group.
        points = self.checked_points(stream, budget.num_samples, budget.replicates)
        layout = self.layout(problem)

        def draw(heads: slice, rows: slice) -> Draws:
            here = points[heads, rows] if problem.group == 1 else points[heads, problem.queries_of(rows)]
            return self.place_block(problem, (heads, rows), layout, here)

        sampled = average_rows(problem, budget, draw, self)
        if self.independent:
            return sampled

        def variance_weights(p: Tensor) -> Tensor:
            return self.variance_weights(p, budget.num_samples)[0]

        in_order = self.ordered and self.ascending
        return replace(sampled, design=Design(False, self.count_variance, variance_weights, in_order))

    def layout(self, problem: AttentionProblem) -> RowLayout | None:
        """The keys of a problem in the order of their values, if this sampler is `ordered`."""
        if not self.ordered:
            return None
        layout = _LAYOUTS.get(problem) or RowLayout.of(problem)
        if problem in _LAYOUTS:
            _LAYOUTS[problem] = layout
        return layout

    def place_block(
        self, problem: AttentionProblem, block: Block, layout: RowLayout | None, points: Tensor
    ) -> Draws:
        """Draws of a block of rows at points (heads, rows, R, S), in the caller's order of keys."""
        if layout is None:
            return self.place(problem.logits(*block), points)
        seen = problem.keys_seen(*block)
        if layout.rows is not None:
            seen = torch.where(layout.rows.which[block] < 0, 0, seen)
        if layout.keys is not None:
            logits = problem.logits(*block, layout.keys)
            return self.place_in_order(logits, layout.keys.order[block[0]], points, seen)
        assert layout.rows is not None
        order = layout.rows.of_rows(*block)
        logits = problem.logits(*block)
        logits = F.pad(logits, (0, problem.num_keys - logits.shape[-1]), value=-torch.inf)
        return self.place_in_order(logits.gather(-1, order), order, points, seen)

    def sample_attention_weights(
        self, logits: Tensor, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Dense attention weights (..., n) estimated from `num_samples` draws of each row (..., n)."""
        return self.draw(logits, num_samples, generator=generator).dense(logits.shape[-1])
