"""What everything passes on: `Draws` from attention rows, and the `AttentionEstimate` made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_number
from .errors import ArgumentError, ShapeError, quoted, unknown_name

T = TypeVar("T")


@dataclass(frozen=True)
class Draws:
    """Keys drawn from attention rows, with the weights that make an estimate of them.

    For any f, `sum_s weights[s] * f(indices[s])` estimates `sum_j p[j] * f(j)`.

    Parameters
    ----------
    indices : Tensor, int64, (..., R * S)
        The drawn keys of each row, S for each of the R replicates, replicates one after the other.
    weights : Tensor, float, (..., R * S)
        The weight of each draw: 1 / (R * S) for a plain sampler; 0 in a row that attends to nothing.
    probabilities : Tensor, float, (..., R * S), optional
        p of each drawn key, where the sampler knows it. Error bars use it. Where there is a sink, the p of
        keys do not sum to 1, and neither do the weights.
    replicates : int
        R, the number of independent repetitions held here.

    Examples
    --------
    >>> draws = Draws(torch.tensor([[0, 2, 2]]), torch.full((1, 3), 1 / 3))
    >>> draws.dense(3)
    tensor([[0.3333, 0.0000, 0.6667]])
    """

    indices: Tensor
    weights: Tensor
    probabilities: Tensor | None = None
    replicates: int = 1

    def view(self, rows: tuple[int, ...]) -> Draws:
        """The same draws with their rows arranged as ``(*rows, R * S)``."""
        shape = (*rows, self.indices.shape[-1])
        p = self.probabilities
        return Draws(
            self.indices.view(shape),
            self.weights.view(shape),
            None if p is None else p.view(shape),
            self.replicates,
        )

    def __getitem__(self, rows: tuple[slice, ...]) -> Draws:
        """The draws of some rows."""
        p = self.probabilities
        return Draws(self.indices[rows], self.weights[rows], None if p is None else p[rows], self.replicates)

    def scaled(self, mass: Tensor) -> Draws:
        """The same draws where all keys of a row hold the probability `mass` (...), and not 1."""
        p = self.probabilities
        return replace(
            self,
            weights=self.weights * mass[..., None].to(self.weights.dtype),
            probabilities=None if p is None else p * mass[..., None].to(p.dtype),
        )

    def dense(self, num_keys: int) -> Tensor:
        """The estimated attention weights, (..., num_keys), in the weights' dtype."""
        shape = (*self.indices.shape[:-1], num_keys)
        return self.weights.new_zeros(shape).scatter_add_(-1, self.indices, self.weights)

    def average(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """sum_s weights[s] * values[indices[s]] of every row, without forming the gathered values.

        Parameters
        ----------
        values : Tensor, (..., n, d)
            The leading dimensions are those of the draws without the rows: draws (..., L, R * S) go with
            values (..., n, d).
        weights : Tensor, (..., L, R * S), optional
            Used in place of the draws' own.

        Returns
        -------
        Tensor, (..., L, d), float32 (float64 where values are)

        Raises
        ------
        ShapeError
            If the leading dimensions differ.
        """
        return self.average_by_replicate(values, weights).sum(-2)

    def average_by_replicate(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """Each replicate's part of `average`, (..., L, R, d): their sum is the average."""
        weights = self.weights if weights is None else weights
        *batch, n, d = values.shape
        if self.indices.shape[:-2] != torch.Size(batch):
            raise ShapeError(
                f"values has leading dimensions {tuple(batch)}, the draws have "
                f"{tuple(self.indices.shape[:-2])}; they must be the same."
            )
        table = values.to(torch.promote_types(values.dtype, torch.float32)).reshape(-1, d)
        *_, rows, total = self.indices.shape
        s = total // self.replicates
        first = torch.arange(table.shape[0] // n, device=values.device) * n  # [N], row of key 0
        bags = self.indices.reshape(len(first), rows * total) + first[:, None]
        out = F.embedding_bag(
            bags.view(-1, s),
            table,
            per_sample_weights=weights.reshape(-1, s).to(table.dtype),
            mode="sum",
        )
        return out.view(*batch, rows, self.replicates, d)

    def effective_sample_size(self) -> Tensor:
        """Kish's effective number of draws of each row, (...): (sum w)^2 / sum w^2; 0 for an empty row."""
        square = self.weights.square().sum(-1)
        return self.weights.sum(-1).square() / square.clamp_min(torch.finfo(square.dtype).tiny)

    def once(self) -> Tensor:
        """What makes a sum over draws one over the keys drawn, each once: (..., R * S), in weights' dtype.

        1 over how often the draw's key was drawn with a weight above 0; 0 for a draw without.
        """
        drawn = self.weights > 0
        times = Draws(self.indices.masked_fill(~drawn, -1), self.weights).multiplicity()
        return drawn / times.to(self.weights.dtype)

    def multiplicity(self) -> Tensor:
        """How often each draw's key was drawn in its row, (..., R * S), int64 >= 1."""
        ordered, position = self.indices.sort(dim=-1)
        starts = torch.ones_like(ordered, dtype=torch.bool)
        starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
        run = starts.cumsum(-1) - 1  # which run of equal keys a draw belongs to
        length = torch.zeros_like(run).scatter_add_(-1, run, torch.ones_like(run))
        return torch.empty_like(run).scatter_(-1, position, length.gather(-1, run))


def rounding_variance(
    output: Tensor, size: Tensor, total: int, dtype: torch.dtype, computed: torch.dtype | None = None
) -> Tensor:
    """Variance that rounding adds to an output.

    It has two parts: the rounding of a sum of `total` values of root mean square `size` in the precision in
    which it was computed, the output's own where `computed` is None; and that of the cast to `dtype`.
    """
    summed = torch.finfo(computed or output.dtype).eps * math.sqrt(total) * size
    return summed.square() + (torch.finfo(dtype).eps * output).square() / 12


PRIOR_WEIGHT = 2.0
"""Weight of a predicted variance against the R - 1 degrees of freedom of R replicates."""


def mixed_degrees_of_freedom(replicates: int) -> float:
    """Satterthwaite's of a variance between replicates and a predicted one of weight `PRIOR_WEIGHT`."""
    return (PRIOR_WEIGHT + replicates - 1) ** 2 / (replicates - 1)


def mass_of_keys(log_sum_exp: Tensor, sinks: Tensor) -> Tensor:
    """The probability that all keys of a row hold beside its sink; 0 where the row sees no key.

    Parameters
    ----------
    log_sum_exp : Tensor, (...)
        Of the keys' logits.
    sinks : Tensor, broadcastable to it
    """
    empty = log_sum_exp == -torch.inf
    return torch.sigmoid(torch.where(empty, -torch.inf, log_sum_exp - sinks))


def reliability(std_error: Tensor, hidden: Tensor, degrees_of_freedom: float) -> Tensor:
    """`AttentionEstimate.reliability` of rows, (...).

    Parameters
    ----------
    std_error : Tensor, (..., d)
    hidden : Tensor, (...)
        How far from the exact output the rows would be, going by how far the weights of the draws are from
        the row's probabilities, if values lay in random directions from their centre.
    degrees_of_freedom : float
        Of the standard errors.
    """
    from scipy import special  # loaded here, because the first picture of the workbench does without it

    half = float(special.stdtrit(degrees_of_freedom, 0.975)) * std_error.norm(dim=-1)
    tiny = torch.finfo(half.dtype).tiny
    return torch.where(hidden > 0, half / hidden.clamp_min(tiny), math.inf)


INTERVALS = ("t", "bernstein")

RELIABLE = 4 / 3
"""The least `AttentionEstimate.reliability` of a row whose error bars can be trusted.

Of rows farther from the exact output than their half-width nearly all are below it where a few keys have most
of the error, and few where many share it, as those miss by chance. Of all rows it is 1 in 20
(`qtx-lab bench coverage`).
"""


@dataclass(frozen=True)
class KernelUse:
    """Which code computed an estimate.

    Parameters
    ----------
    path : {"triton", "cpu", "reference", "torch"}
        A Triton kernel, the pass compiled for CPUs, a kernel's plain-torch reference, or the samplers' own
        torch.
    reason : str
        Why this one.
    name : str, optional
        The kernel's name, where one ran.
    slower_than_exact : str, optional
        Why exact attention takes less time, where that is known (`qtx_lab.kernels.choice`).
    """

    path: str
    reason: str
    name: str | None = None
    slower_than_exact: str | None = None

    def as_dict(self) -> dict[str, str]:
        """The fields that say something, by name."""
        stated = {"path": self.path, "reason": self.reason}
        optional = {"name": self.name, "slower_than_exact": self.slower_than_exact}
        return stated | {name: x for name, x in optional.items() if x is not None}


@dataclass(frozen=True)
class ControlReport:
    """What control variates did to an estimate.

    Parameters
    ----------
    coefficients : mapping of str to Tensor (..., H)
        By control's name: how much of the control's error each query head takes out of its own, from 0 to 1:
        the mean over its rows and replicates.
    costs : mapping of str to float
        By control's name: multiply-adds a query.
    exact_cost : float
        Multiply-adds a query of the exact output.
    variance_before, variance_after : Tensor, (..., H), or None
        Of the output, the mean over rows, summed over features; None for one replicate, which cannot tell.
    """

    coefficients: Mapping[str, Tensor]
    costs: Mapping[str, float]
    exact_cost: float
    variance_before: Tensor | None
    variance_after: Tensor | None


@dataclass(frozen=True)
class EstimateInfo:
    """How an estimate came about: what was asked for, what was done, and what was not done as asked.

    Parameters
    ----------
    sampler : str
        The sampler's name.
    unbiased : bool
        Whether the expected output is the exact one.
    num_samples : int, optional
        Draws of a row and replicate, as asked for; None where a tolerance chose them.
    replicates : int
        Independent repetitions.
    draws_per_row : int, float or Tensor int64 (..., L)
        Draws that a row took, all replicates together; a number for each row where rows differ by a
        tolerance.
    effective_sample_size : Tensor, (..., L), optional
        Kish's, of the draws' weights; infinite for `exact`.
    fallbacks : tuple of str
        What was not done as asked, and why.
    kernel : KernelUse, optional
        Which code ran; None where there was no choice.
    drawn_by : mapping, optional
        What the sampler reports about its draws: device, calibration, noise, what is not modelled.
    classical : AttentionEstimate, optional
        Beside circuits: the estimate from as many pseudo-random draws.
    control_variate : ControlReport, optional
    baseline : str, optional
        Which draws the gradient's baseline comes from (`qtx_lab.attention.gradients`).
    estimator : str, optional
        Of a `LearnedImportanceSampler`: "self-normalised", "plain" or "debiased".
    draws_of_each_row : Tensor int64 (..., L), optional
        Of the debiased estimator, whose rows take random numbers of draws.
    tolerance, confidence : float, optional
        As asked for in place of a count.
    pilot_draws_per_row : Tensor int64 (..., L), optional
        Draws that told the size of a row's output before a tolerance chose the count.
    predicted_relative_error : Tensor (..., L), optional
        The bound that a tolerance kept, relative to the size of the output.
    cache : mapping, optional
        Of a `SampledKVCache`: the sketch that proposed the keys, and what it holds.
    log_sum_exp : {"exact", "estimated"}, optional
        Whether the estimate's `log_sum_exp` is the row's own, up to rounding, or made of draws; None where
        there is none.
    """

    sampler: str
    unbiased: bool
    num_samples: int | None = None
    replicates: int = 1
    draws_per_row: int | float | Tensor | None = None
    effective_sample_size: Tensor | None = None
    fallbacks: tuple[str, ...] = ()
    kernel: KernelUse | None = None
    drawn_by: Mapping[str, Any] | None = None
    classical: AttentionEstimate | None = None
    control_variate: ControlReport | None = None
    baseline: str | None = None
    estimator: str | None = None
    draws_of_each_row: Tensor | None = None
    tolerance: float | None = None
    confidence: float | None = None
    pilot_draws_per_row: Tensor | None = None
    predicted_relative_error: Tensor | None = None
    cache: Mapping[str, Any] | None = None
    log_sum_exp: str | None = None

    def __repr__(self) -> str:
        """The fields that say something; of a tensor its shape."""
        stated = {f.name: getattr(self, f.name) for f in fields(self)}
        words = [
            f"{name}={quoted(x) if isinstance(x, Tensor) else repr(x)}"
            for name, x in stated.items()
            if x is not None and x != ()
        ]
        return f"EstimateInfo({', '.join(words)})"

    def with_fallbacks(self, *reasons: str) -> EstimateInfo:
        """The same with more reasons in `fallbacks`."""
        return replace(self, fallbacks=(*self.fallbacks, *reasons))

    def as_dict(self) -> dict[str, Any]:
        """The fields that say something, by name; `kernel` and `control_variate` as dictionaries too."""
        stated = {f.name: getattr(self, f.name) for f in fields(self)}
        stated = {name: x for name, x in stated.items() if x is not None}
        if self.kernel is not None:
            stated["kernel"] = self.kernel.as_dict()
        if self.control_variate is not None:
            report = self.control_variate
            stated["control_variate"] = {f.name: getattr(report, f.name) for f in fields(report)}
        return stated


@dataclass(frozen=True, eq=False, repr=False)
class AttentionEstimate:
    """An attention output with its error bars and the draws from which it was computed.

    Parameters
    ----------
    output : Tensor, (..., L, Ev), v's dtype
        The estimate of softmax(q k^T scale + mask) v.
    num_keys : int
        n, the number of keys.
    degrees_of_freedom : float
        Of `std_error`, for Student's t; infinite where the error is known or predicted.
    make_draws, make_std_error : callable
        Compute `draws` and `std_error` when they are first read; the latter gives None where one replicate
        shows no error.
    info : EstimateInfo
        How the estimate was computed.
    group : int
        G, the query heads that share a key head.
    make_log_sum_exp : callable, optional
        Computes `log_sum_exp` when it is first read.
    make_reliability, make_bounds : callable, optional
        Compute `reliability`, and an interval for a level that holds without asymptotics; None where the
        method has none.

    Examples
    --------
    >>> from qtx_lab import sampled_attention
    >>> g = torch.Generator().manual_seed(0)
    >>> q, k, v = torch.randn(3, 2, 8, 4, generator=g)
    >>> est = sampled_attention(q, k, v, num_samples=4, replicates=2, generator=g)
    >>> low, high = est.confidence_interval(0.95)
    >>> est, low.shape
    (AttentionEstimate(output (2, 8, 4) torch.float32, sampler='systematic', draws_per_row=8),
    torch.Size([2, 8, 4]))
    """

    output: Tensor
    num_keys: int
    degrees_of_freedom: float
    make_draws: Callable[[], Draws]
    make_std_error: Callable[[], Tensor] | None
    info: EstimateInfo
    group: int = 1
    make_log_sum_exp: Callable[[], Tensor] | None = None
    make_reliability: Callable[[], Tensor] | None = None
    make_bounds: Callable[[float], tuple[Tensor, Tensor]] | None = None

    def __repr__(self) -> str:
        draws = self.info.draws_per_row
        spent = f"{draws.double().mean():.1f} on average" if isinstance(draws, Tensor) else f"{draws}"
        return (
            f"AttentionEstimate(output {tuple(self.output.shape)} {self.output.dtype}, "
            f"sampler={self.info.sampler!r}, draws_per_row={spent})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Everything that is computed when it is asked for is computed before, but for Bernstein's bounds."""
        later = (self.output, self.std_error, self.log_sum_exp, self.reliability)
        tensors = [None if x is None else x.detach() for x in later]
        about = (self.num_keys, self.degrees_of_freedom, self.info, self.group)
        return _of_values, (*about, self.draws, *tensors)

    @cached_property
    def diagnostics(self) -> dict[str, Any]:
        """`info` as a dictionary, without the fields that say nothing here."""
        return self.info.as_dict()

    @cached_property
    def draws(self) -> Draws:
        """`Draws` with indices (..., L, S) and weights (..., L, S), S the draws of all replicates."""
        return self.make_draws()

    @cached_property
    def std_error(self) -> Tensor | None:
        """Standard error of each coordinate, (..., L, Ev), float32 (float64 for float64 input).

        None where the method cannot tell from one replicate: ask for replicates >= 2.
        """
        return None if self.make_std_error is None else self.make_std_error()

    @cached_property
    def log_sum_exp(self) -> Tensor | None:
        """log(sum_j exp(l_j) + exp(sink)) of each row's logits, (..., L), float32 (float64 for such input).

        The natural logarithm; -inf in a row that sees no key and has no sink. `info.log_sum_exp` says whether
        it is exact or estimated; None where the method does not know it.

        Attention over two sets of keys is attention over each, weighted by the share that it has of the sum
        of both. Only one of the parts may have the sink.

        Examples
        --------
        >>> import torch
        >>> from qtx_lab import sampled_attention
        >>> g = torch.Generator().manual_seed(0)
        >>> q, k, v = (torch.randn(2, 8, 16, generator=g) for _ in range(3))
        >>> a = sampled_attention(q, k[:, :5], v[:, :5], sampler="exact")
        >>> b = sampled_attention(q, k[:, 5:], v[:, 5:], sampler="exact")
        >>> log_sum_exp = torch.logaddexp(a.log_sum_exp, b.log_sum_exp)
        >>> merged = sum((x.log_sum_exp - log_sum_exp).exp()[..., None] * x.output for x in (a, b))
        >>> torch.allclose(merged, sampled_attention(q, k, v, sampler="exact").output, atol=1e-6)
        True
        """
        return None if self.make_log_sum_exp is None else self.make_log_sum_exp()

    def with_sinks(self, sinks: Tensor) -> AttentionEstimate:
        """This estimate of attention over keys alone, after sinks took their share of each row.

        All keys together hold the mass m = exp(l) / (exp(l) + exp(sink)), with l their log-sum-exp: the
        output, its standard error and the weights of the draws are m times what they are without the sink.

        Parameters
        ----------
        sinks : Tensor, broadcastable to (..., L)
            The logit of each row's sink, in the dtype of `log_sum_exp`.

        Raises
        ------
        ArgumentError
            If the estimate has no log_sum_exp.
        """
        keys = self.log_sum_exp
        if keys is None:
            raise ArgumentError(f"sinks need log_sum_exp, which sampler={self.info.sampler!r} does not know.")
        mass, empty = mass_of_keys(keys, sinks), keys == -torch.inf
        total = torch.where(empty, sinks, torch.logaddexp(keys.masked_fill(empty, 0), sinks))
        make_draws, make_std_error, fixed = self.make_draws, self.make_std_error, mass.detach()

        def bounds(level: float) -> tuple[Tensor, Tensor]:
            assert self.make_bounds is not None
            low, high = self.make_bounds(level)
            return low * fixed[..., None], high * fixed[..., None]

        info = self.info
        if info.classical is not None:
            info = replace(info, classical=info.classical.with_sinks(sinks))
        return replace(
            self,
            output=(self.output * mass[..., None]).to(self.output.dtype),
            make_draws=lambda: make_draws().scaled(fixed),
            make_std_error=(None if make_std_error is None else lambda: make_std_error() * fixed[..., None]),
            info=info,
            make_log_sum_exp=lambda: total,
            make_bounds=None if self.make_bounds is None else bounds,
        )

    @cached_property
    def reliability(self) -> Tensor | None:
        """How far the error bars of each row can be trusted, (..., L): above `RELIABLE` (4 / 3) they can.

        The half-width of the 95 % interval over the error that the draws may hide, lengths over features:

            reliability = |t std_error| / sqrt( sum_j (w_j - p_j)^2 |v_j - c|^2 ),

        where w_j is the weight that the draws give to key j, 0 for a key never drawn, whose whole probability
        p_j is hidden, and c is the mean value. The root is how far the output would be from the exact one if
        values lay in random directions from c: about half the half-width, which makes the reliability about
        2, where many keys share the error. It is the error itself where one key has nearly all of it: a key
        with a value far from the others that was never drawn, or drawn too often. Where p is not known, as of
        circuits, the root is 3 / T times the largest distance of a value not drawn, T being the number of
        draws: a key that T draws missed has a probability below 3 / T with 95 % confidence. For `learned`
        draws, which do not need it otherwise, reading it computes the probability of every key. Of a
        `SampledKVCache` see `cache.error_bars.row_errors`.

        Infinite where the row is exact. It sees no error that many keys share and that goes in one direction:
        values that alternate in step with systematic draws, and the bias of a method (`info.unbiased`).
        None where there are no standard errors, or where the kernel or cache that made them does not know.
        """
        return None if self.make_reliability is None else self.make_reliability()

    @property
    def reliable(self) -> Tensor | None:
        """Rows whose error bars can be trusted, bool, (..., L): `reliability` is at least `RELIABLE`."""
        return None if self.reliability is None else self.reliability >= RELIABLE

    def keys_touched(self) -> Tensor:
        """How many distinct values the draws of each query position read: (..., H / G, L), int64.

        The heads of a group count together.

        What control variates and pilots of a tolerance read comes on top.
        """
        indices = self.draws.indices.masked_fill(self.draws.weights == 0, -1)
        if self.group > 1:
            indices = indices.unflatten(-3, (-1, self.group)).movedim(-3, -2).flatten(-2)
        ordered = indices.sort(dim=-1).values
        fresh = ordered[..., 1:] != ordered[..., :-1]
        return (fresh & (ordered[..., 1:] >= 0)).sum(-1) + (ordered[..., 0] >= 0)

    def attention_weights(self) -> Tensor:
        """The estimated weights as a dense matrix, (..., L, n): memory L * n."""
        return self.draws.dense(self.num_keys)

    def confidence_interval(self, level: float = 0.95, method: str = "t") -> tuple[Tensor, Tensor]:
        """(low, high), each (..., L, Ev): an interval for each coordinate separately.

        Parameters
        ----------
        level : float
            How often the interval is to hold the exact output, between 0 and 1.
        method : {"t", "bernstein"}
            - "t": Student's t about the output, by `std_error`. It is right for many draws or replicates, and
              `reliability` shows where it is not. Standard errors of `stratified` and `systematic` draws use
              the probabilities of the keys and assume that their order has nothing to do with the values:
              where values alternate in step with the draws they are too small. They show variance, not bias:
              where `info.unbiased` is False (a noisy device, an approximate loader) they are about the mean
              of the method, and may cover the exact output far less often.
            - "bernstein": holds for any number of draws and any values, as `qtx_lab.attention.bounds` says,
              and is wider. It is the intersection of what is sure, given the probabilities of the keys that
              were never drawn and the range of the values, and of Bernstein's inequalities for independent
              draws (`monte-carlo`) or for the replicates, which take hundreds to say much. What is sure holds
              for biased methods too, where they know the row's probabilities. Not of an estimate from a
              proposal or a cache, which do not.

        Raises
        ------
        ArgumentError, DtypeError
            If level is not a number between 0 and 1, if the method is unknown, if there are no standard
            errors, or no bound that holds without asymptotics.

        Examples
        --------
        >>> import qtx_lab as qtx
        >>> q, k, v = (torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
        >>> est = qtx.sampled_attention(q, k, v, sampler="head-tail", num_samples=32, replicates=4)
        >>> low, high = est.confidence_interval(0.95, method="bernstein")
        >>> exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> bool(((low <= exact) & (exact <= high)).all())
        True
        """
        level = check_number("level", level, above=0, below=1)
        if method not in INTERVALS:
            raise unknown_name("method", method, INTERVALS)
        if self.std_error is None:
            raise ArgumentError(
                f"The sampler {self.info.sampler!r} gives no standard error from one replicate: "
                "ask sampled_attention for replicates >= 2."
            )
        if method == "bernstein":
            if self.make_bounds is None:
                raise ArgumentError(
                    f"The estimate by {self.info.sampler!r} does not know the row's probabilities or the "
                    "range of the values, which method='bernstein' needs: use method='t'."
                )
            return self.make_bounds(level)
        from scipy import special

        t = float(special.stdtrit(self.degrees_of_freedom, (1 + level) / 2))
        centre = self.output.to(self.std_error.dtype)
        return centre - t * self.std_error, centre + t * self.std_error


def _of_values(
    num_keys: int,
    degrees_of_freedom: float,
    info: EstimateInfo,
    group: int,
    draws: Draws,
    output: Tensor,
    *later: Tensor | None,
) -> AttentionEstimate:
    """The estimate that `AttentionEstimate.__reduce__` took apart: for pickle and copies."""
    std_error, log_sum_exp, reliable = (None if x is None else partial(_same, x) for x in later)
    return AttentionEstimate(
        output,
        num_keys,
        degrees_of_freedom,
        partial(_same, draws),
        std_error,
        info,
        group,
        log_sum_exp,
        reliable,
    )


def _same(x: T) -> T:
    return x
