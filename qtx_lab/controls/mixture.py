"""How much of each control a row uses: what its probabilities say before any key is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..estimates import Draws
from .base import EVERY, Prepared, dense_weights

SWEEPS = 24
"""How often `row_weights` goes through the controls. Four nearly collinear ones are within 1e-3 of the best
objective then, and one or two are exact after a few."""


@dataclass(frozen=True)
class RowVariance:
    """What the variance of an estimate is made of, for a block of rows (N, M).

    Parameters
    ----------
    log_p : Tensor, (N, M, n)
        log p; -inf for keys that a row does not see.
    spread : Tensor, (N, n)
        How far the value of each key is from others, squared: see `value_spread`.
    variance_weights : callable, optional
        a_j of rows p (..., n), where draws are not independent: see `InversionSampler.variance_weights`.
    """

    log_p: Tensor
    spread: Tensor
    variance_weights: Callable[[Tensor], Tensor] | None = None

    def log_shares(self) -> Tensor:
        """log(a_j s_j), which each key adds to the variance of a draw: (N, M, n).

        a_j = p_j for independent draws, and s_j is the key's spread.
        """
        log_a = self.log_p
        if self.variance_weights is not None:
            p = log_a.exp()
            each = self.variance_weights(p) / p
            # A key whose probability underflows to 0 counts as one of those that are drawn least.
            each = torch.where(p > 0, each, each.nan_to_num(0).amax(-1, keepdim=True))
            log_a = log_a + each.log()
        shares = log_a + self.spread[:, None].log()
        return shares.masked_fill(self.log_p == -torch.inf, -torch.inf)


def value_spread(values: Tensor) -> Tensor:
    """s_j = |v_j - m_j|^2 with m_j the mean of the values before it (0 before the first one), (N, n).

    It stands for |v_j - o|^2, which would take as long for all keys as the exact output. No later value
    changes it, as causal rows need.
    """
    before = values.cumsum(1)[:, :-1]
    count = torch.arange(1, values.shape[1], device=values.device, dtype=values.dtype)[:, None]
    mean = torch.cat((torch.zeros_like(values[:, :1]), before / count), 1)
    return (values - mean).square().sum(-1)


def row_weights(variance: RowVariance, surrogates: Sequence[Tensor]) -> Tensor:
    """The weight β_c of each control in each row, (C, N, M), from 0 to 1.

    A row of draws of p is corrected by sum_c β_c (the estimate of control c minus what it is known to be).
    What is left of the value of key j is 1 - sum_c β_c p̂_cj / p_j of it, so that the variance left is about

        sum_j a_j s_j (1 - sum_c β_c p̂_cj / p_j)^2,

    which β minimises under 0 <= β_c <= 1, by coordinate descent from the best single control: with more
    controls it can only get less. β is a function of p, p̂ and the values, and not of the draws, so that it
    brings no bias, and no other row has a say in it. p̂ is never below 0, hence neither are the inner products
    of controls, and without the bounds hardly anything would be gained: they keep the weights of nearly
    collinear controls small (Jagannathan and Ma, Risk reduction in large portfolios: why imposing the wrong
    constraints helps, 2003, of the same problem). For optimal weights that are known instead of estimated see
    Owen and Zhou, Safe and effective importance sampling (2000), sec. 4.

    Ratios of variance after to before, in the geometric mean over the heads of the reference model (causal,
    n = 512, S = 64, R = 4):

        draws          topk    performer    linformer    all three
        systematic     .624    .921         .655         .378
        monte-carlo    .213    .939         .712         .135

    Parameters
    ----------
    variance : RowVariance
    surrogates : sequence of C Tensors, (N, M, n)
        p̂ of each control, 0 for keys that a row does not see.

    Examples
    --------
    A surrogate that is the row itself leaves nothing to another one:

    >>> p = torch.tensor([[[0.5, 0.25, 0.25]]])
    >>> variance = RowVariance(p.log(), torch.ones(1, 3))
    >>> row_weights(variance, [torch.full((1, 1, 3), 1 / 3), p]).flatten().round(decimals=3)
    tensor([0., 1.])
    """
    half = variance.log_shares() / 2  # [N, M, n]
    ratios = (x.log() - variance.log_p for x in surrogates)
    parts = [half, *(torch.where(x > -torch.inf, half + x, -torch.inf) for x in ratios)]
    # Where a control is likely and p is not, ratios leave float32: vectors are scaled to length 1.
    lengths = torch.stack([(2 * x).logsumexp(-1) / 2 for x in parts], -1)  # [N, M, C + 1]
    unit = torch.stack(parts, -2).sub_(lengths.nan_to_num(0, 0, 0)[..., None]).exp_()
    products = (unit @ unit.mT).double()  # [N, M, C + 1, C + 1]
    rest = products.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).sqrt()  # what rounding left of their lengths
    products = products / (rest[..., None] * rest[..., None, :])
    lengths = lengths.double() + rest.log()
    size = (lengths[..., :1] - lengths[..., 1:]).exp().nan_to_num(0, 0, 0)  # [N, M, C]
    weights = _descend(products[..., 1:, 1:], products[..., 0, 1:], size.clamp_min(1e-300).reciprocal())
    return (weights * size).movedim(-1, 0).to(half)


def _descend(gram: Tensor, target: Tensor, most: Tensor) -> Tensor:
    """argmin x'G x - 2 b'x under 0 <= x <= most, (..., C); G (..., C, C) has a diagonal of 1 or 0."""
    alone = torch.minimum(target, most)
    gain = alone * (2 * target - alone)
    best = gain.argmax(-1, keepdim=True)
    x = torch.zeros_like(target).scatter(-1, best, alone.gather(-1, best))
    for _ in range(SWEEPS if target.shape[-1] > 1 else 0):
        for c in range(target.shape[-1]):  # over controls, a handful
            others = (gram[..., c, :] * x).sum(-1) - gram[..., c, c] * x[..., c]
            x[..., c] = torch.minimum((target[..., c] - others).clamp_min(0), most[..., c])
    return x


@dataclass(frozen=True)
class MixedControls:
    """Controls at the draws of a block of rows (N, M), and the weight of each in the row.

    Parameters
    ----------
    weights : Tensor, (C, N, M)
        β of `row_weights`; 1 for a control that is the row itself, and 0 for those beside it.
    ratios : Tensor, (C, N, M, R * S)
        p̂_c / p of every draw; 0 where the draw has no weight.
    means : Tensor, (C, N, M, d)
        sum_j p̂_cj v_j.
    unseen : Tensor, (2, N, M)
        The mean of x and x^2, x_j = sum_c β_c p̂_cj / p_j, over the keys that the draws are likely to miss.
    """

    weights: Tensor
    ratios: Tensor
    means: Tensor
    unseen: Tensor

    def noise(self, draws: Draws, values: Tensor) -> Tensor:
        """The error of the mixture of controls in each replicate, (N, M, R, d); its mean is 0.

        noise_r = R sum_c β_c sum_{s in r} weights_s p̂_c(j_s) / p(j_s) (v_{j_s} - μ_c),       μ_c its known
        sum. Subtracting μ removes the noise of sum_s weights_s p̂ / p itself, which the target does not have,
        as its weights sum to 1.
        """
        r = draws.replicates
        w = draws.weights * self.ratios * self.weights[..., None]  # [C, N, M, R * S]
        replicate_weights = w.unflatten(-1, (r, w.shape[-1] // r)).sum(-1)  # [C, N, M, R]
        known = torch.einsum("cnmr,cnmd->nmrd", replicate_weights, self.means)
        return r * (draws.average_by_replicate(values, w.sum(0)) - known)


def mix_controls(
    prepared: Sequence[Prepared],
    q: Tensor,
    positions: Tensor,
    draws: Draws,
    variance: RowVariance,
    *,
    heads: slice = EVERY,
) -> MixedControls:
    """Evaluate controls for a block of rows, and weigh them.

    This reads whole rows, for n `Prepared.cost_at` multiply-adds a control and query: a key that is likely
    under p̂ and unlikely under p is drawn very seldom, but then with a huge ratio, which the draws do not
    show.

    Parameters
    ----------
    prepared : sequence of C Prepared
    q : Tensor, (N, M, E)
        Queries of the heads `heads`.
    positions : Tensor, (M,)
    draws : Draws
        Rows (N, M), probabilities known.
    variance : RowVariance
        Of the n first keys, which are all that the rows see.
    heads : slice

    Raises
    ------
    ArgumentError
        If the draws have no probabilities.
    """
    if draws.probabilities is None:
        raise ArgumentError(
            "draws has no probabilities, but a control variate needs p at every drawn key: use a sampler "
            "that gives it."
        )
    n = variance.log_p.shape[-1]
    surrogates = [dense_weights(x, q, positions, n, heads=heads) for x in prepared]
    exact = torch.stack([x.exact_rows(positions) for x in prepared])  # [C, M]
    itself = exact & (exact.cumsum(0) == 1)  # one of them, where several are
    weights = row_weights(variance, surrogates)
    weights = torch.where(exact.any(0), itself[:, None].to(weights), weights)
    live = draws.weights > 0
    # A probability below the smallest normal number has lost its digits, and its ratio means nothing.
    p = draws.probabilities.masked_fill(~live, 1).clamp_min(torch.finfo(q.dtype).tiny)
    drawn = draws.indices.masked_fill(~live, 0)
    ratios = torch.stack([(x.gather(-1, drawn) / p).masked_fill(~live, 0) for x in surrogates])
    means = torch.stack([x.sums(q, positions, heads=heads) for x in prepared])
    unseen = _unseen_moments(variance, surrogates, weights, draws.indices.shape[-1])
    return MixedControls(weights, ratios, means, unseen)


def _unseen_moments(
    variance: RowVariance, surrogates: Sequence[Tensor], weights: Tensor, draws: int
) -> Tensor:
    """The mean of x and of x^2 (see `MixedControls`), (2, N, M); key j counts p_j s_j (1 - p_j)^draws."""
    log_p = variance.log_p
    log_missed = log_p + draws * (-log_p.exp()).log1p().clamp_min(-1e4) + variance.spread[:, None].log()
    missed = log_missed.nan_to_num(-torch.inf, neginf=-torch.inf).softmax(-1).nan_to_num(0)  # [N, M, n]
    mixed = sum(w[..., None] * x for w, x in zip(weights, surrogates, strict=True))
    # p at a key that no draw may hit can be 0
    x = torch.where(missed > 0, mixed / log_p.exp().clamp_min(torch.finfo(log_p.dtype).tiny), 0)
    return torch.stack(((missed * x).sum(-1), (missed * x.square()).sum(-1)))
