"""What a sampler is, and the inversion of a row's distribution that most samplers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_count
from ..errors import ArgumentError, DtypeError, ShapeError
from ..estimates import AttentionEstimate, Draws, EstimateInfo
from ..problem import AttentionProblem, Block, KeyLayout, log_sum_exp
from ..streams import Stream, make_seed
from .value_order import FIRST_VALUES, RowOrders, cached_order, first_whole_blocks


@dataclass(frozen=True)
class Budget:
    """How many keys are drawn: S = `num_samples` for a row and replicate, R = `replicates` independent
    repetitions.
    """

    num_samples: int
    replicates: int = 1

    @property
    def total(self) -> int:
        """Draws of a row."""
        return self.num_samples * self.replicates


@dataclass(frozen=True)
class Design:
    """How draws were made, as far as error bars and corrections need to know.

    Parameters
    ----------
    independent : bool
        Whether the draws of a replicate are independent draws from p.
    count_variance : callable, optional
        `Sampler.count_variance`, where it is known.
    variance_weights : callable, optional
        a_j of rows p (..., n): see `InversionSampler.variance_weights`; None for independent draws.
    in_order : bool
        Whether the draws of a replicate come in the order of their values, so that neighbours are alike.
    """

    independent: bool
    count_variance: Callable[[Tensor], Tensor | None] | None = None
    variance_weights: Callable[[Tensor], Tensor] | None = None
    in_order: bool = False


@dataclass(frozen=True)
class SampledRows:
    """What a sampler makes of the rows (N, M) of a problem, before corrections and error bars.

    Parameters
    ----------
    output : Tensor, (N, M, d)
        In the units of the caller's values.
    make_draws : callable
        Gives the draws of the rows (N, M), in the caller's order of keys.
    design : Design
    info : EstimateInfo
    make_std_error : callable, optional
        Gives standard errors (N, M, d) in the units of the caller's values, for a sampler that knows better
        than its draws tell.
    degrees_of_freedom : float
        Of those standard errors.
    make_log_sum_exp : callable, optional
        Gives the log-sum-exp (N, M) of the rows' logits, in the problem's `dtype`, for a sampler that knows
        it; `info.log_sum_exp` says whether it is exact.
    make_reliability : callable, optional
        Gives the reliability (N, M) of those standard errors (`AttentionEstimate.reliability`).
    make_bounds : callable, optional
        Gives (low, high), each (N, M, d) in the units of the caller's values, of an interval of a level that
        holds without asymptotics.
    """

    output: Tensor
    make_draws: Callable[[], Draws]
    design: Design
    info: EstimateInfo
    make_std_error: Callable[[], Tensor] | None = None
    degrees_of_freedom: float = float("inf")
    make_log_sum_exp: Callable[[], Tensor] | None = None
    make_reliability: Callable[[], Tensor] | None = None
    make_bounds: Callable[[float], tuple[Tensor, Tensor]] | None = None

    def to_estimate(self, problem: AttentionProblem) -> AttentionEstimate:
        """The estimate as the caller gets it, in the shapes and the dtype of the problem."""
        row_shape, shape = problem.row_shape, (*problem.row_shape, problem.width)
        make_draws, make_std_error = self.make_draws, self.make_std_error
        make_log_sum_exp = self.make_log_sum_exp
        make_reliability, make_bounds = self.make_reliability, self.make_bounds

        def bounds(level: float) -> tuple[Tensor, Tensor]:
            assert make_bounds is not None
            low, high = make_bounds(level)
            return low.reshape(shape), high.reshape(shape)

        return AttentionEstimate(
            output=self.output.reshape(shape).to(problem.v.dtype),
            num_keys=problem.num_keys,
            degrees_of_freedom=self.degrees_of_freedom,
            make_draws=lambda: make_draws().view(row_shape),
            make_std_error=None if make_std_error is None else lambda: make_std_error().reshape(shape),
            info=self.info,
            group=problem.group,
            make_log_sum_exp=(
                None if make_log_sum_exp is None else lambda: make_log_sum_exp().reshape(row_shape)
            ),
            make_reliability=None
            if make_reliability is None
            else lambda: make_reliability().reshape(row_shape),
            make_bounds=None if make_bounds is None else bounds,
        )


DRAWING = (
    "draw",
    "draw_from",
    "estimate_rows",
    "place",
    "place_block",
    "place_in_order",
    "points",
)
"""The methods by which samplers draw."""


class Sampler(ABC):
    """Turns rows of logits into draws.

    A sampler of your own needs a `name`, says whether it is `unbiased` and `independent`, and implements
    `draw`; everything else has a default. `register_sampler` makes it known by name. One with a better way to
    an estimate than drawing from exact logits overrides `estimate_rows`.

    Derive from `samplers.InversionSampler` if you only choose the points at which a row's distribution is
    inverted, and from `samplers.StreamSampler` if you draw with a stream's random numbers: then a row's draws
    do not depend on the rows beside it. Inside the package a sampler has its name in `samplers.SAMPLERS`, by
    which the tests find it, and its colour in `theme.SAMPLER_COLOURS`.

    Examples
    --------
    >>> class First(Sampler):
    ...     name, unbiased, independent = "first", False, False
    ...
    ...     def draw(self, logits, num_samples, *, values=None, generator=None, replicates=1):
    ...         first = (logits > -torch.inf).int().argmax(-1, keepdim=True)
    ...         indices = first.expand(*logits.shape[:-1], replicates * num_samples)
    ...         return Draws(indices, torch.full(indices.shape, 1 / indices.shape[-1]), replicates=replicates)
    >>> First().draw(torch.tensor([-torch.inf, 1.0, 2.0]), 2).indices
    tensor([1, 1])
    """

    name: str = ""
    """What figures, results and errors call it; a sampler without one is refused."""
    unbiased: bool = False
    """Whether E[sum_s weights_s f(indices_s)] = sum_j p_j f(j) for every f."""
    independent: bool = False
    """Whether the draws of one replicate are independent draws from p, so that one replicate gives error
    bars.
    """
    exchangeable: bool | None = None
    """Whether the draws of a row are independent of each other, from p or not; as `independent` says where
    None.
    """
    takes_sinks: bool = False
    """Whether `estimate_rows` takes a problem's sinks into its own normaliser. Where not, it sees the problem
    without them, and its estimate is scaled by the mass that the sinks leave to the keys, which comes from
    all logits."""
    joint: bool = False
    """Whether the rows of a head share their randomness, so that their errors are not independent."""
    ordered: bool = False
    """Whether keys are laid out by their values first (see `value_order`)."""
    exact: bool = False
    """Whether the output is exact."""
    predicts_variance: bool = False
    """Whether `variance_weights` bounds the variance for every count of draws, which a tolerance needs."""
    has_kernel: bool = False
    """Whether the Triton kernels draw as it does, so that problems on CUDA go to them. A class that draws in
    another way than the one it derives from does not inherit it."""
    self_normalised: bool = False
    """Whether weights are divided by their own sum: the gradient then takes the replicate's own mean as
    its baseline.
    """
    classical_baseline: str | None = None
    """A sampler whose estimate is shown beside this one's, as `info.classical`: what a circuit is compared
    with.
    """
    last_facts: Mapping[str, Any] = {}
    """What there is to say about the latest draw, passed on as `info.drawn_by`; `fallbacks` is a tuple of
    sentences.
    Whole numbers whose names end in `_rows` are added up over blocks of rows."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls).keys()
        if "has_kernel" not in own and not own.isdisjoint(DRAWING):
            cls.has_kernel = False

    @property
    def draws_are_exchangeable(self) -> bool:
        """`exchangeable`, settled."""
        return self.independent if self.exchangeable is None else self.exchangeable

    def correctable(self) -> Sampler:
        """The sampler whose draws control variates correct: itself, where it knows the probabilities of
        its draws.
        """
        return self

    @abstractmethod
    def draw(
        self,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        generator: torch.Generator | None = None,
        replicates: int = 1,
    ) -> Draws:
        """Draw `replicates` times `num_samples` keys from every row.

        Parameters
        ----------
        logits : Tensor, (..., n), float32 or float64
            Unnormalised log-probabilities; -inf where a key is masked. A row of nothing but -inf
            gets draws of weight 0.
        num_samples : int
            S >= 1, the draws of a replicate.
        values : Tensor, (..., n, d), optional
            What will be averaged, for samplers that use it.
        generator : torch.Generator, optional
            The only source of randomness; torch's default one for the device where None.
        replicates : int
            R >= 1 independent repetitions.

        Returns
        -------
        Draws
            indices and weights (..., R * S).

        Raises
        ------
        ArgumentError, ShapeError, DtypeError
            If num_samples or replicates is below 1, or if logits has no keys, a NaN, +inf or another dtype.
        """

    def count_variance(self, expected: Tensor) -> Tensor | None:
        """Variance of how often a key is drawn in a replicate, given how often it is on average; None: not
        known.

        Error bars use it.
        """
        return None

    def draw_from(
        self,
        stream: Stream,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        replicates: int = 1,
    ) -> Draws:
        """Draw keys with the random numbers of a stream.

        Here by `draw`, with a generator that the stream's first row gives: what it draws for a row then
        depends on the rows beside it. Samplers whose rows do not depend on others derive from
        `StreamSampler`.

        Parameters
        ----------
        stream : Stream
            Of the N heads and P positions of the rows.
        logits : Tensor, (N, P, n)
        values : Tensor, (N, n, d), optional
        """
        generator = stream.make_generator()
        return self.draw(logits, num_samples, values=values, generator=generator, replicates=replicates)

    def estimate_rows(self, problem: AttentionProblem, budget: Budget, stream: Stream) -> SampledRows:
        """An estimate of the rows of a problem: here the average of the values at draws from their exact
        logits.

        Parameters
        ----------
        problem : AttentionProblem
        budget : Budget
        stream : Stream
            Of the problem's N key heads and L positions.

        Raises
        ------
        ArgumentError, ShapeError, DtypeError
            If `draw` gives what cannot be averaged.
        """
        facts = Facts()

        def draw(heads: slice, rows: slice) -> Draws:
            logits = problem.logits(heads, rows)
            draws = self.draw_from(
                stream.of_block(heads, problem.positions(rows)),
                logits,
                budget.num_samples,
                values=problem.values[heads, : logits.shape[-1]],
                replicates=budget.replicates,
            )
            check_draws(self.name, draws, logits, budget)
            facts.add(self.last_facts)
            return draws

        return average_rows(problem, budget, draw, self, facts)


class Facts:
    """What a sampler said of each block of rows, together."""

    def __init__(self) -> None:
        self.stated: dict[str, Any] = {}
        self.fallbacks: dict[str, None] = {}

    def add(self, facts: Mapping[str, Any]) -> None:
        """Take in the facts of another block."""
        for name, x in facts.items():
            if name == "fallbacks":
                self.fallbacks |= dict.fromkeys(x)
            elif name.endswith("_rows"):
                self.stated[name] = self.stated.get(name, 0) + x
            else:
                self.stated[name] = x


def average_rows(
    problem: AttentionProblem,
    budget: Budget,
    draw: Callable[[slice, slice], Draws],
    sampler: Sampler,
    facts: Facts | None = None,
) -> SampledRows:
    """The averages of values at the draws of all rows, block by block; `draw` gives those of a block
    (heads, rows).
    """
    facts = facts or Facts()
    shape, total = problem.shape, budget.total
    values = problem.values
    output = values.new_empty(*shape, values.shape[-1])
    indices = torch.empty(*shape, total, dtype=torch.int64, device=values.device)
    weights = values.new_empty(*shape, total)
    probabilities: Tensor | None = values.new_empty(*shape, total)
    normaliser = values.new_empty(shape)
    for block in problem.blocks(16 * total):
        draws = draw(*block)
        output[block] = draws.average(values[block[0]])
        indices[block], weights[block] = draws.indices, draws.weights
        normaliser[block] = _log_sum_exp(problem, block, draws)
        if probabilities is None or draws.probabilities is None:
            probabilities = None
        else:
            probabilities[block] = draws.probabilities
    flat = Draws(indices, weights, probabilities, budget.replicates)
    info = EstimateInfo(
        sampler=sampler.name,
        unbiased=bool(sampler.unbiased),
        num_samples=budget.num_samples,
        replicates=budget.replicates,
        draws_per_row=total,
        effective_sample_size=flat.effective_sample_size().view(problem.row_shape),
        fallbacks=tuple(facts.fallbacks),
        drawn_by=facts.stated or None,
        log_sum_exp="exact",
    )
    return SampledRows(
        problem.in_units(output),
        lambda: flat,
        Design(sampler.independent, sampler.count_variance),
        info,
        make_log_sum_exp=lambda: normaliser,
    )


def _log_sum_exp(problem: AttentionProblem, block: Block, draws: Draws) -> Tensor:
    """The log-sum-exp of the logits of a block, (heads, rows): l_j - log p_j of the likeliest key drawn, or
    from all logits where draws do not know p.
    """
    p = draws.probabilities
    if p is None:
        return log_sum_exp(problem.logits(*block))
    p, best = p.max(-1, keepdim=True)
    key = draws.indices.gather(-1, best)
    logit = problem.logits_at(problem.row_numbers(*block), key.flatten(0, 1)).view(p.shape)
    return torch.where(p > 0, logit - p.log(), -torch.inf).squeeze(-1)


def check_draw_arguments(logits: Tensor, num_samples: int, replicates: int) -> tuple[int, int]:
    """Refuse what no sampler can draw from (see `Sampler.draw`); `row_masses` refuses NaN and +inf.

    Returns
    -------
    num_samples, replicates : int
    """
    num_samples = check_count("num_samples", num_samples)
    replicates = check_count("replicates", replicates)
    if not isinstance(logits, Tensor) or logits.dtype not in (torch.float32, torch.float64):
        given = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise DtypeError(f"logits is {given}; it must be a float32 or float64 tensor.")
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ShapeError(f"logits has shape {tuple(logits.shape)}; it must be (..., n) with n >= 1 keys.")
    return num_samples, replicates


def check_draws(name: str, draws: object, logits: Tensor, budget: Budget) -> None:
    """Refuse draws of a sampler `name` that cannot be averaged."""
    who = f"sampler={name!r} gave"
    if not isinstance(draws, Draws):
        raise DtypeError(f"{who} a {type(draws).__name__}; draw must give Draws.")
    shape, n = (*logits.shape[:-1], budget.total), logits.shape[-1]
    parts = {"indices": draws.indices, "weights": draws.weights, "probabilities": draws.probabilities}
    for part, x in parts.items():
        if x is not None and x.shape != shape:
            raise ShapeError(f"{who} {part} {tuple(x.shape)} from logits {tuple(logits.shape)}, not {shape}.")
    if draws.replicates != budget.replicates:
        raise ArgumentError(
            f"{who} Draws(replicates={draws.replicates}) where {budget.replicates} were asked for."
        )
    if draws.indices.dtype != torch.int64 or not draws.weights.is_floating_point():
        raise DtypeError(f"{who} {draws.indices.dtype} indices and {draws.weights.dtype} weights.")
    if draws.indices.numel() and not (int(draws.indices.min()) >= 0 and int(draws.indices.max()) < n):
        raise ArgumentError(f"{who} indices outside 0..{n - 1}, the keys that it was shown.")
    if not bool(draws.weights.isfinite().all()):
        raise ArgumentError(f"{who} weights that are not finite.")


class StreamSampler(Sampler):
    """A sampler whose rows do not depend on the rows beside them: it takes its random numbers from a
    stream.
    """

    @abstractmethod
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

    def draw(
        self,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        generator: torch.Generator | None = None,
        replicates: int = 1,
    ) -> Draws:
        """Draw keys: see `Sampler.draw`. The last dimension of rows counts the positions of a head."""
        num_samples, replicates = check_draw_arguments(logits, num_samples, replicates)
        rows, n = logits.shape[:-1], logits.shape[-1]
        heads, length = rows[:-1].numel() if rows else 1, rows[-1] if rows else 1
        stream = Stream.of(make_seed(generator), 1, heads, length, device=logits.device)
        flat = logits.reshape(heads, length, n)
        if values is not None:
            values = values.expand(*rows[:-1], n, values.shape[-1]).reshape(heads, n, -1)
        return self.draw_from(stream, flat, num_samples, values=values, replicates=replicates).view(rows)


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
        """The layout of a problem's keys in value order, which knows no window: it would change from row to
        row.
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
        """Draws at given points (h, m, R, S) of rows (h, m, n), whose keys stand in an order (h, n), or
        (h, m, n) where each row has its own.

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


INVERSION_BLOCK = 16
"""Keys in a block of `invert`: long rows are searched by block first, so that only block masses are summed
up.
"""


FEWEST_LIGHT = 16
"""Draws of keys that are not sure that an adaptive row makes at the least, or a little fewer: the search for
them is short. See `HeadTailSampler` and `SampledKVCache`."""


def row_masses(logits: Tensor) -> Tensor:
    """exp(logits - max) of rows (..., n), padded by zeros to whole blocks; all zero in an all-masked row.

    Raises
    ------
    ArgumentError
        If logits holds NaN or +inf.
    """
    *lead, n = logits.shape
    top = logits.amax(-1, keepdim=True)
    if not bool((top < torch.inf).all()):  # also False for NaN
        raise ArgumentError("logits holds NaN or +inf; only finite numbers and -inf are allowed.")
    mass = logits.new_empty(*lead, -(-n // INVERSION_BLOCK) * INVERSION_BLOCK)
    mass[..., n:] = 0
    torch.sub(logits, top.masked_fill(top == -torch.inf, 0), out=mass[..., :n]).exp_()
    return mass


def row_probabilities(logits: Tensor) -> Tensor:
    """softmax(logits) of rows (..., n); 0 everywhere in an all-masked row. Raises as `row_masses`."""
    mass = row_masses(logits)[..., : logits.shape[-1]]
    return mass / mass.sum(-1, keepdim=True).clamp_min(1)


def invert(mass: Tensor, points: Tensor, scale: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keys at given points of the cumulative masses of rows.

    Parameters
    ----------
    mass : Tensor, (..., N * INVERSION_BLOCK), >= 0
    points : Tensor, (..., T), float64 in [0, 1)
    scale : float or Tensor (..., 1), optional
        What a point of 1 stands for; the row's total mass where None.

    Returns
    -------
    indices : Tensor, int64, (..., T)
        min {j : F_j > scale * points_t}, never a key without mass; the last key with mass for a point past
        the row's total, 0 in a row without mass. Masses within a block have their own precision, those of
        whole blocks are summed in float64: the probability of a key is off by a rounding of its block's,
        however long the row.
    total : Tensor, (..., 1), float64
        The mass of each row.
    """
    *lead, padded = mass.shape
    parts = mass.view(-1, INVERSION_BLOCK)
    cdf = parts.sum(-1).view(*lead, padded // INVERSION_BLOCK).cumsum(-1, dtype=torch.float64)  # [..., N]
    total = cdf[..., -1:]
    empty = total == 0
    target = _below(points * (total if scale is None else scale), total)
    block = torch.searchsorted(cdf, target, right=True).masked_fill_(empty, 0)  # [..., T]
    rest = (target - F.pad(cdf, (1, 0)).gather(-1, block)).to(mass.dtype)  # left to go in the block

    row = torch.arange(cdf[..., 0].numel(), device=mass.device).view(*lead, 1)
    inside = F.embedding(block + row * cdf.shape[-1], parts).cumsum_(-1)  # [..., T, INVERSION_BLOCK]
    rest = _below(rest[..., None], inside[..., -1:])
    indices = block * INVERSION_BLOCK + inside.le_(rest).sum(-1).long()
    return indices.masked_fill_(empty, 0), total


def _below(x: Tensor, limit: Tensor) -> Tensor:
    """min(x, the number just below limit): what has mass above it, whatever was rounded."""
    return torch.minimum(x, torch.nextafter(limit, torch.zeros_like(limit)))
