"""What is known of a row beforehand: masked keys and padding have probability 0, and the others sum to 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError, DtypeError, ShapeError


def project_to_simplex(x: Tensor, support: Tensor | None = None, variance: Tensor | None = None) -> Tensor:
    """Compute the distribution z that is nearest to each row: max(x - t, 0), with t so that it sums to 1.

    Distances are Euclidean, or sum_i (x_i - z_i)^2 / variance_i: then z_i = max(x_i - t variance_i, 0). The
    result is never further from any distribution on the support than the row was, because the simplex is
    convex.

    Parameters
    ----------
    x : Tensor, (..., n)
        Quasi-probabilities, of which some may be negative.
    support : Tensor, bool, (..., n), optional
        Keys that may have a probability above 0; all keys if None. A row without any becomes 0.
    variance : Tensor, (..., n), optional
        Of each number, so that the badly known ones give way; equal if None.

    Returns
    -------
    Tensor, (..., n)

    Raises
    ------
    DtypeError
        If x is no floating-point tensor.
    ShapeError
        If x has no keys, or if x, support and variance have different shapes.
    ArgumentError
        If x or variance holds NaN or infinity, or variance a negative number.

    Source: Smolin, Gambetta and Smith, Efficient method for computing the maximum-likelihood quantum state
    from measurements with additive Gaussian noise (2012), the step for the eigenvalues; here by one sort of
    all rows.

    Examples
    --------
    >>> project_to_simplex(torch.tensor([0.8, 0.4, -0.2]))
    tensor([0.7000, 0.3000, 0.0000])
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise DtypeError(f"x is {given}; it must be a floating-point tensor.")
    if not x.ndim or not x.shape[-1]:
        raise ShapeError(f"x has shape {tuple(x.shape)}; it must be (..., n) with n >= 1 keys.")
    support = torch.ones_like(x, dtype=torch.bool) if support is None else support
    if support.shape != x.shape:
        raise ShapeError(
            f"support has shape {tuple(support.shape)} and x has {tuple(x.shape)}; they must be the same."
        )
    if not bool(x.isfinite().all()):
        raise ArgumentError("x holds NaN or infinity; quasi-probabilities must be finite.")
    if variance is not None:
        return _project_by_variance(x, support, variance)
    # Subtracting the largest number of a row changes nothing, and keeps the sums below exact.
    largest = x.double().masked_fill(~support, -torch.inf).amax(-1, keepdim=True)
    inside = (x - largest.where(largest.isfinite(), 0)).masked_fill(~support, -torch.inf)
    ordered = inside.sort(-1, descending=True).values
    rank = torch.arange(1, x.shape[-1] + 1, device=x.device)
    surplus = ordered.masked_fill(ordered.isneginf(), 0).cumsum(-1) - 1
    positive = (ordered > surplus / rank).sum(-1, keepdim=True).clamp_min(1)  # keys that stay above 0
    threshold = surplus.gather(-1, positive - 1) / positive
    return (inside - threshold).clamp_min(0).to(x.dtype)


def _project_by_variance(x: Tensor, support: Tensor, variance: Tensor) -> Tensor:
    """`project_to_simplex` with variances."""
    if variance.shape != x.shape:
        raise ShapeError(
            f"variance has shape {tuple(variance.shape)} and x has {tuple(x.shape)}; they must be the same."
        )
    if not bool((variance.isfinite() & (variance >= 0)).all()):
        raise ArgumentError("variance holds NaN, infinity or a negative number.")
    largest = variance.double().amax(-1, keepdim=True)
    v = torch.where(largest > 0, variance / largest, torch.ones_like(x, dtype=torch.float64)).clamp_min(1e-12)
    ratio, order = (x / v).masked_fill(~support, -torch.inf).sort(-1, descending=True)
    seen = support.gather(-1, order)
    sums, variances = ((y * seen).cumsum(-1) for y in (x.double().gather(-1, order), v.gather(-1, order)))
    threshold = (sums - 1) / variances.clamp_min(1e-300)  # t, if the keys so far stay above 0
    positive = (seen & (ratio > threshold)).sum(-1, keepdim=True).clamp_min(1)
    z = (x - threshold.gather(-1, positive - 1) * v).clamp_min(0).masked_fill(~support, 0)
    # Differences of large numbers lose digits of the sum.
    return (z / z.sum(-1, keepdim=True).clamp_min(1e-300)).to(x.dtype)


def sum_by_key(x: Tensor, keys: Tensor, support: Tensor) -> Tensor:
    """Sum what the register's values hold over the values of each key, and discard what belongs to no key.

    Parameters
    ----------
    x : Tensor, (R, V)
        Counts, shares, quasi-probabilities or variances of the register's values.
    keys : Tensor, int64, (V,)
        The key of each value, and -1 for values that are no key, as padding or a wrong Hamming weight.
    support : Tensor, bool, (R, n)
        Keys that are not masked.

    Returns
    -------
    Tensor, (R, n)
        0 outside the support.

    Examples
    --------
    >>> support = torch.tensor([[True, False, True]])
    >>> sum_by_key(torch.tensor([[5, 2, 1, 9]]), torch.tensor([0, 1, 2, -1]), support)
    tensor([[5, 0, 1]])
    """
    n = support.shape[-1]
    by_key = x.new_zeros(len(x), n + 1).index_add(-1, keys + 1, x)[:, 1:]
    return by_key.masked_fill(~support, 0)
