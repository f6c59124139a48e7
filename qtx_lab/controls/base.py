"""What a control is: a cheap surrogate of an attention row, known at every key, whose full sum is known."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, DtypeError, ShapeError
from ..estimates import Draws

EVERY = slice(None)

GATHERED = 1 << 20
"""Numbers that are gathered at a time where rows look at keys of their own: 4 MiB in float32."""


class Prepared(Protocol):
    """A control that has seen the keys and values of N heads.

    For every query it holds surrogate weights p̂_j >= 0 of the keys that the query sees, which sum to 1
    (0 of the others), and knows both each p̂_j and sum_j p̂_j v_j.
    """

    def sums(self, q: Tensor, positions: Tensor, *, heads: slice = EVERY) -> Tensor:
        """sum_j p̂_j v_j of every query.

        Parameters
        ----------
        q : Tensor, (N, M, E)
            M queries of each of the heads `heads`.
        positions : Tensor, (M,), int64
            Causal: query m sees keys 0..positions[m]. Not looked at otherwise.
        heads : slice
            Which of the prepared heads the queries belong to.

        Returns
        -------
        Tensor, (N, M, d)

        Raises
        ------
        ShapeError
            If q does not fit the heads or positions does not fit q.
        """
        ...

    def weights_at(self, q: Tensor, positions: Tensor, indices: Tensor, *, heads: slice = EVERY) -> Tensor:
        """p̂ at keys `indices` (N, M, T), the same p̂ as that of `sums`; (N, M, T)."""
        ...

    def trust(self, q: Tensor, positions: Tensor, *, heads: slice = EVERY) -> Tensor | None:
        """1 / sum_j p̂_j^2 / p_j of every query, (N, M), in [0, 1]; None where only a look at p could tell."""
        ...

    def cost(self, n: int) -> float:
        """Multiply-adds that `sums` spends on a query of n keys; what is shared by all queries not counted."""
        ...

    def cost_at(self) -> float:
        """Multiply-adds that `weights_at` spends on a drawn key, once `sums` is known."""
        ...


class Control(Protocol):
    """Makes surrogate weights for given keys."""

    name: str
    oracle: bool
    """Whether p̂ = p, so that the coefficient 1 is known to be right."""

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
        q : Tensor, (N, M, E), optional
            The queries to come, for a control that can tune itself to them. Any will do.
        generator : torch.Generator, optional
            The only source of randomness; torch's default one for the device where None.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            If k and v are not of these shapes and types, or scale is not finite.
        """
        ...


def check_keys(k: Tensor, v: Tensor, scale: float) -> None:
    """Refuse keys and values that no control can be prepared from (see `Control.prepare`)."""
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise DtypeError(f"{name} is {given}; it must be a float32 or float64 tensor.")
    if k.ndim != 3 or v.ndim != 3 or k.shape[:2] != v.shape[:2] or 0 in k.shape[1:]:
        raise ShapeError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; they must be (N, n, E) and (N, n, d), n, E >= 1."
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
        If the sampler did not say how probable its draws are.
    """
    if draws.probabilities is None:
        raise ArgumentError(
            "draws has no probabilities; a control variate needs p at every drawn key: use a sampler that knows it."
        )
    live = draws.weights > 0
    p = draws.probabilities.masked_fill(~live, 1)
    # A draw of probability below the smallest normal number has lost its digits, and its ratio its meaning.
    return (draws.weights * weights / p.clamp_min(torch.finfo(p.dtype).tiny)).masked_fill(~live, 0)


def measured_trust(
    prepared: Prepared,
    q: Tensor,
    positions: Tensor,
    keys: Tensor,
    draws: Draws,
    *,
    scale: float,
    causal: bool,
    pilot: int | None = None,
    heads: slice = EVERY,
) -> Tensor:
    """1 / sum_j p̂_j^2 / p_j of every query, (N, M), in [0, 1].

    The sum is what draws from p must pay for a surrogate: keys that p̂ holds likely and p does not are drawn
    once in a very long time, with a huge ratio. Draws do not show it, so the row is looked at: all of it, or
    `pilot` evenly spread keys where it is longer. They are fixed, and log p_j = scale q·k_j - log Z needs only
    the Z that every draw already knows, so that the result does not depend on what was drawn.
    """
    assert draws.probabilities is not None
    n = keys.shape[1]
    if pilot is None or pilot >= n:
        p = masked_logits(q, keys, positions, scale, causal)
        log_hat = dense_weights(prepared, q, positions, n, heads=heads).log_()
        chi = (2 * log_hat).sub_(p).masked_fill_(p == -torch.inf, -torch.inf).logsumexp(-1)
        return (-chi - p.logsumexp(-1)).clamp_max(0).exp()  # the sum is at least 1
    last = positions.clamp_max(n - 1) if causal else torch.full_like(positions, n - 1)
    visible = last + 1
    # Rows start at different keys (golden ratio), so that all rows of a head together see most of them.
    turn = torch.arange(len(positions), device=q.device, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2)
    comb = torch.arange(pilot, device=q.device, dtype=torch.float64)
    stride = (visible.double() / pilot).clamp_min(1)[:, None]
    at = ((comb + (turn % 1)[:, None]) * stride).long()
    at = torch.where(visible[:, None] <= pilot, comb.long(), at)
    seen = at < visible[:, None]  # [M, pilot]
    at = at.minimum(last[:, None])
    indices = at.expand(q.shape[0], *at.shape)

    best = draws.probabilities.masked_fill(draws.weights <= 0, 0).argmax(-1, keepdim=True)
    drawn = draws.indices.gather(-1, best)
    log_p = draws.probabilities.gather(-1, best).log()
    logits = _logits_at(q, keys, torch.cat((drawn, indices), dim=-1), scale)
    log_p = logits[..., 1:] - (logits[..., :1] - log_p)
    log_hat = prepared.weights_at(q, positions, indices, heads=heads).log()
    chi = (2 * log_hat - log_p).masked_fill(~seen, -torch.inf).logsumexp(-1)
    chi += (visible / seen.sum(-1)).to(chi.dtype).log()
    return (-chi).nan_to_num(0, 0, 0).clamp_max(0).exp()  # the sum is at least 1


def _logits_at(q: Tensor, keys: Tensor, indices: Tensor, scale: float) -> Tensor:
    """scale q·k at keys `indices` (N, M, T), (N, M, T), gathering `GATHERED` numbers at a time."""
    count, n, width = keys.shape
    table = keys.reshape(count * n, width)
    rows = indices + torch.arange(count, device=q.device)[:, None, None] * n
    out = torch.empty_like(indices, dtype=q.dtype)
    step = max(1, GATHERED // max(1, count * indices.shape[-1] * width))
    for start in range(0, q.shape[1], step):
        part = slice(start, start + step)
        gathered = F.embedding(rows[:, part], table)  # [N, step, T, E]
        out[:, part] = (gathered @ (q[:, part, :, None] * scale)).squeeze(-1)
    return out


def control_ratios(
    prepared: Prepared,
    q: Tensor,
    positions: Tensor,
    keys: Tensor,
    draws: Draws,
    *,
    scale: float,
    causal: bool,
    pilot: int | None = None,
    heads: slice = EVERY,
) -> Tensor:
    """trust * weights_s p̂(j_s) / p(j_s) of every draw, (N, M, R * S): see `control_noise`."""
    weights = ratios(draws, prepared.weights_at(q, positions, draws.indices, heads=heads))
    trust = prepared.trust(q, positions, heads=heads)
    if trust is None:
        trust = measured_trust(
            prepared, q, positions, keys, draws, scale=scale, causal=causal, pilot=pilot, heads=heads
        )
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
    pilot: int | None = None,
    heads: slice = EVERY,
) -> tuple[Tensor, Tensor]:
    """What the control's estimate from the same draws is off by, in each replicate, and its known sum.

    With μ = sum_j p̂_j v_j and the R * S draws of a row, replicate r has

        noise_r = R c sum_{s in r} weights_s p̂(j_s) / p(j_s) (v_{j_s} - μ),       E[noise_r] = 0,

    since p̂ sums to 1. Taking off μ removes the noise of sum_s weights_s p̂ / p itself, which the target,
    whose weights sum to 1, does not have. c = 1 / sum_j p̂_j^2 / p_j, the row's trust, makes one coefficient a
    head nearly as good as one a row: a row on which p̂ fails would else spoil its whole head.

    Parameters
    ----------
    prepared : Prepared
    q : Tensor, (N, M, E)
    positions : Tensor, (M,)
    keys, values : Tensor, (N, n, E) and (N, n, d)
        Of the heads `heads`, as in `prepare`; so are `scale` and `causal`.
    draws : Draws
        Rows (N, M), probabilities known.
    pilot : int, optional
        Keys that `measured_trust` looks at where the control does not know its trust; all where None, for
        n (E + `cost_at`) multiply-adds a query. With fewer, a row whose worst keys are missed can raise its
        head's variance.
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
        prepared, q, positions, keys, draws, scale=scale, causal=causal, pilot=pilot, heads=heads
    )
    r = draws.replicates
    mass = w.unflatten(-1, (r, w.shape[-1] // r)).sum(-1, keepdim=True)  # [N, M, R, 1]
    return r * (draws.average_by_replicate(values, w) - mass * mean[..., None, :]), mean
