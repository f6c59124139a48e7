"""What a control is: a cheap surrogate of an attention row, known at every key, whose full sum is known."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ArgumentError, DtypeError, ShapeError
from ..estimates import Draws

EVERY = slice(None)

GATHERED = 1 << 20
"""The most numbers gathered at a time where each row looks at keys of its own: 4 MiB in float32."""


class Prepared(Protocol):
    """A control for the given keys and values of N heads.

    For every query it has surrogate weights p̂_j >= 0 of the keys that the query sees, which sum to 1 (0 for
    the other keys), and knows both each p̂_j and sum_j p̂_j v_j.
    """

    @abstractmethod
    def sums(self, q: Tensor, positions: Tensor, *, heads: slice = EVERY) -> Tensor:
        """sum_j p̂_j v_j of every query.

        Parameters
        ----------
        q : Tensor, (N, M, E)
            M queries of each of the heads `heads`.
        positions : Tensor, (M,), int64
            In a causal problem query m sees the keys 0 to positions[m]. Ignored otherwise.
        heads : slice
            The prepared heads that the queries belong to.

        Returns
        -------
        Tensor, (N, M, d)

        Raises
        ------
        ShapeError
            If q does not fit the heads or positions does not fit q.
        """

    @abstractmethod
    def weights_at(self, q: Tensor, positions: Tensor, indices: Tensor, *, heads: slice = EVERY) -> Tensor:
        """p̂ at the keys `indices` (N, M, T), the same p̂ as that of `sums`; (N, M, T)."""

    def trust(self, q: Tensor, positions: Tensor, *, heads: slice = EVERY) -> Tensor | None:
        """1 / sum_j p̂_j^2 / p_j of every query, (N, M); None where it needs p: see `measured_trust`."""
        return None

    def exact_rows(self, positions: Tensor) -> Tensor:
        """At which positions p̂ = p, whatever the keys: bool, (M,).

        The coefficient of such a row is known to be 1.
        """
        return torch.zeros_like(positions, dtype=torch.bool)

    @abstractmethod
    def cost(self, n: int) -> float:
        """Multiply-adds that `sums` spends on a query of n keys, without those that all queries share."""

    @abstractmethod
    def cost_at(self) -> float:
        """Multiply-adds that `weights_at` spends on a drawn key, once `sums` is known."""


class Control(ABC):
    """A cheap surrogate of attention rows, to be prepared for given keys."""

    name: str
    oracle: bool = False
    """Whether p̂ = p, so that the coefficient 1 is known to be right."""

    @abstractmethod
    def prepare(
        self,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool,
        q: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Prepared:
        """Read the keys and values once.

        Parameters
        ----------
        k : Tensor, (N, n, E), float32 or float64
        v : Tensor, (N, n, d), of the same dtype
        scale : float
            p = softmax(scale q·k).
        causal : bool
            Whether a query sees only the keys up to its position. What the control then says of a query must
            not depend on later keys, nor on n: for queries that see as many it can be fitted to the first
            `qtx_lab.problem.FIRST_KNOWN` keys.
        q : Tensor, (N, M, E), optional
            Queries that the control can tune itself to, as many as there are. Those of a causal problem must
            be known to every query that sees `FIRST_KNOWN` keys.
        generator : torch.Generator, optional
            The only source of randomness; torch's default one for the device where None.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            If k and v are not of these shapes and types, or scale is not finite.
        """


def check_keys(k: Tensor, v: Tensor, scale: float) -> None:
    """Refuse keys and values that no control can be prepared for: see `Control.prepare`."""
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise DtypeError(f"{name} is {given}; it must be a float32 or float64 tensor.")
    if k.ndim != 3 or v.ndim != 3 or k.shape[:2] != v.shape[:2] or 0 in k.shape[1:]:
        raise ShapeError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; they must be (N, n, E) and (N, n, d) "
            "with n, E >= 1."
        )
    if k.dtype != v.dtype:
        raise DtypeError(f"k is {k.dtype} and v is {v.dtype}; they must agree.")
    if not math.isfinite(scale):
        raise ArgumentError(f"scale={scale} is not allowed: it must be a finite number.")


def check_queries(q: Tensor, positions: Tensor, k: Tensor) -> None:
    """Refuse queries that do not fit the heads' keys `k` (N, n, E)."""
    if q.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ShapeError(
            f"q has shape {tuple(q.shape)}; it must be ({k.shape[0]}, M, {k.shape[2]}), as the keys."
        )
    if positions.shape != q.shape[1:2]:
        raise ShapeError(f"positions has shape {tuple(positions.shape)}; it must be ({q.shape[1]},), as q.")


def masked_logits(q: Tensor, k: Tensor, positions: Tensor, scale: float, causal: bool) -> Tensor:
    """scale q·k, (N, M, n); -inf where a query does not see a key."""
    logits = torch.bmm(q * scale, k.mT)
    if causal:
        key = torch.arange(k.shape[1], device=k.device)
        logits.masked_fill_(key > positions[:, None], -torch.inf)
    return logits


def dense_weights(
    prepared: Prepared, q: Tensor, positions: Tensor, num_keys: int, *, heads: slice = EVERY
) -> Tensor:
    """p̂ at every key, (N, M, n): memory M n, for small inputs."""
    indices = torch.arange(num_keys, device=q.device).expand(*q.shape[:2], num_keys)
    return prepared.weights_at(q, positions, indices, heads=heads)


def ratios(draws: Draws, weights: Tensor) -> Tensor:
    """weights_s p̂_s / p_s of every draw, (..., R * S); 0 where the draw has no weight.

    Raises
    ------
    ArgumentError
        If the draws have no probabilities.
    """
    if draws.probabilities is None:
        raise ArgumentError(
            "draws has no probabilities, but a control variate needs p at every drawn key: use a sampler "
            "that knows it."
        )
    live = draws.weights > 0
    p = draws.probabilities.masked_fill(~live, 1)
    # A probability below the smallest normal number has lost its digits, and its ratio means nothing.
    return (draws.weights * weights / p.clamp_min(torch.finfo(p.dtype).tiny)).masked_fill(~live, 0)


def measured_trust(
    prepared: Prepared,
    q: Tensor,
    positions: Tensor,
    keys: Tensor,
    *,
    scale: float,
    causal: bool,
    variance_weights: Callable[[Tensor], Tensor] | None = None,
    heads: slice = EVERY,
) -> Tensor:
    """sum_j a_j / sum_j a_j (p̂_j / p_j)^2 of every query, (N, M), but at most 1; 0 where nothing varies.

    The weight a_j says how much key j adds to the variance of an estimate. For independent draws it is p_j,
    and the result 1 / sum_j p̂_j^2 / p_j. The sum below is what a surrogate costs in variance: a key that is
    likely under p̂ and unlikely under p is drawn very seldom, but then with a huge ratio. The draws do not
    show this, so the whole row is read, for n (E + `Prepared.cost_at`) multiply-adds a query.
    """
    log_p = masked_logits(q, keys, positions, scale, causal).log_softmax(-1)
    log_hat = dense_weights(prepared, q, positions, keys.shape[1], heads=heads).log_()
    log_a = log_p
    if variance_weights is not None:
        p = log_p.exp().nan_to_num(0)
        each = variance_weights(p) / p
        # A key whose probability underflows to 0 counts as one of those that are drawn least.
        log_a = torch.where(p > 0, each, each.nan_to_num(0).amax(-1, keepdim=True)).log() + log_p
    unseen = ~(log_p > -torch.inf)
    cost = (2 * (log_hat - log_p) + log_a).masked_fill(unseen, -torch.inf).logsumexp(-1)
    total = log_a.masked_fill(unseen, -torch.inf).logsumexp(-1)
    return (total - cost).nan_to_num(-torch.inf).clamp_max(0).exp()


def control_ratios(
    prepared: Prepared,
    q: Tensor,
    positions: Tensor,
    keys: Tensor,
    draws: Draws,
    *,
    scale: float,
    causal: bool,
    variance_weights: Callable[[Tensor], Tensor] | None = None,
    heads: slice = EVERY,
) -> Tensor:
    """trust * weights_s p̂(j_s) / p(j_s) of every draw, (N, M, R * S): see `control_noise`."""
    weights = ratios(draws, prepared.weights_at(q, positions, draws.indices, heads=heads))
    trust = prepared.trust(q, positions, heads=heads) if variance_weights is None else None
    if trust is None:
        options: dict[str, Any] = {
            "scale": scale,
            "causal": causal,
            "variance_weights": variance_weights,
            "heads": heads,
        }
        trust = measured_trust(prepared, q, positions, keys, **options)
    return weights * trust[..., None]


def control_noise(
    prepared: Prepared,
    q: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    draws: Draws,
    *,
    scale: float,
    causal: bool,
    variance_weights: Callable[[Tensor], Tensor] | None = None,
    heads: slice = EVERY,
) -> tuple[Tensor, Tensor]:
    """The error of a control's estimate from the same draws, in each replicate, and its known sum.

    With μ = sum_j p̂_j v_j and the R * S draws of a row, replicate r has

        noise_r = R c sum_{s in r} weights_s p̂(j_s) / p(j_s) (v_{j_s} - μ),       E[noise_r] = 0,

    as p̂ sums to 1. Subtracting μ removes the noise of sum_s weights_s p̂ / p itself, which the target does
    not have, as its weights sum to 1. The row's trust c (`measured_trust`) makes one coefficient for a head
    nearly as good as one for each row; without it, a row on which p̂ fails would spoil its whole head.

    Parameters
    ----------
    prepared : Prepared
    q : Tensor, (N, M, E)
    positions : Tensor, (M,)
    keys, values : Tensor, (N, n, E) and (N, n, d)
        Of the heads `heads`, as in `prepare`; so are `scale` and `causal`.
    draws : Draws
        Rows (N, M), probabilities known.
    variance_weights : callable, optional
        Of the sampler (`InversionSampler.variance_weights`), where its draws are not independent.
    heads : slice

    Returns
    -------
    noise : Tensor, (N, M, R, d)
    mean : Tensor, (N, M, d)
        μ.

    Raises
    ------
    ArgumentError
        If the draws' probabilities are not known.
    """
    mean = prepared.sums(q, positions, heads=heads)
    w = control_ratios(
        prepared,
        q,
        positions,
        keys,
        draws,
        scale=scale,
        causal=causal,
        variance_weights=variance_weights,
        heads=heads,
    )
    r = draws.replicates
    mass = w.unflatten(-1, (r, w.shape[-1] // r)).sum(-1, keepdim=True)  # [N, M, R, 1]
    return r * (draws.average_by_replicate(values, w) - mass * mean[..., None, :]), mean
