"""What a sampler is, and what it makes of the rows of a problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count
from ..errors import ArgumentError, DtypeError, ShapeError
from ..estimates import AttentionEstimate, Draws, EstimateInfo
from ..problem import AttentionProblem, Block, log_sum_exp
from ..streams import Stream, make_seed


@dataclass(frozen=True)
class Budget:
    """How many keys are drawn.

    A row takes S = `num_samples` draws in each of R = `replicates` independent repetitions.
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
    do not depend on other rows. Inside the package a sampler has its name in `samplers.SAMPLERS`, by which
    the tests find it, and its colour in `theme.SAMPLER_COLOURS`.

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
    """What there is to say about the latest draw, which is passed on as `info.drawn_by`.

    `fallbacks` is a tuple of sentences. Whole numbers whose names end in `_rows` are added up over blocks of
    rows."""

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
        """The sampler whose draws control variates correct.

        That is the sampler itself, where it knows the probabilities of its draws.
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
            Unnormalised log-probabilities; -inf where a key is masked. A row of nothing but -inf gets draws
            of weight 0.
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
        """Variance of how often a key is drawn in a replicate, given how often it is on average.

        None where it is not known.

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
        depends on other rows. Samplers whose rows do not depend on others derive from
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
        """An estimate of the rows of a problem.

        Here it is the average of the values at draws from the rows' exact logits.

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
    """The facts that a sampler states about each block of rows, put together."""

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
    """The averages of values at the draws of all rows, block by block.

    `draw` gives the draws of a block (heads, rows).
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
    """The log-sum-exp of the logits of a block, (heads, rows).

    It is l_j - log p_j of the likeliest key drawn, or comes from all logits where the draws do not know p.
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
    """A sampler whose rows do not depend on the rows beside them.

    It takes its random numbers from a stream.
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
