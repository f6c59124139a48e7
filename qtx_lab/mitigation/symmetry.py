"""What is known of a row beforehand: masked and padding keys have no mass, the others none below 0, and all sum to 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError


def project_to_simplex(x: Tensor, support: Tensor | None = None) -> Tensor:
    """The distribution next to each row, by Euclidean distance: max(x - t, 0) on the support, t so that it sums to 1.

    Never further from any distribution on the support than the row was: the simplex is convex.

    Parameters
    ----------
    x : Tensor, (..., n)
        Quasi-probabilities.
    support : Tensor, bool, (..., n), optional
        Keys that may have mass; a row without any becomes 0.

    Returns
    -------
    Tensor, (..., n)

    Raises
    ------
    ShapeError, ArgumentError
        If the shapes differ; if x holds NaN or infinity.

    Source: Smolin, Gambetta and Smith, Efficient method for computing the maximum-likelihood quantum state from
    measurements with additive Gaussian noise (2012), the eigenvalues' step; here by one sort of all rows.

    >>> project_to_simplex(torch.tensor([0.8, 0.4, -0.2]))
    tensor([0.7000, 0.3000, 0.0000])
    """
    support = torch.ones_like(x, dtype=torch.bool) if support is None else support
    if support.shape != x.shape:
        raise ShapeError(f"support has shape {tuple(support.shape)}, x {tuple(x.shape)}: the same is needed.")
    if not bool(x.isfinite().all()):
        raise ArgumentError("x holds NaN or infinity; quasi-probabilities are finite.")
    # A shift changes nothing, and keeps the sums below exact.
    top = x.double().masked_fill(~support, -torch.inf).amax(-1, keepdim=True)
    inside = (x - top.where(top.isfinite(), 0)).masked_fill(~support, -torch.inf)
    ordered = inside.sort(-1, descending=True).values
    rank = torch.arange(1, x.shape[-1] + 1, device=x.device)
    surplus = ordered.masked_fill(ordered.isneginf(), 0).cumsum(-1) - 1
    kept = (ordered > surplus / rank).sum(-1, keepdim=True).clamp_min(1)
    threshold = surplus.gather(-1, kept - 1) / kept
    return (inside - threshold).clamp_min(0).to(x.dtype)


def keep_keys(x: Tensor, keys: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """What register values hold, as what keys hold; all else is discarded.

    Parameters
    ----------
    x : Tensor, (R, V)
        Shares, quasi-probabilities or counts of the register's values.
    keys : Tensor, int64, (V,)
        The key of each value; -1: none, as padding or a wrong Hamming weight.
    support : Tensor, bool, (R, n)
        Keys of probability above 0.

    Returns
    -------
    kept : Tensor, (R, n)
        0 outside the support.
    discarded : Tensor, (R,)
    """
    n = support.shape[-1]
    by_key = x.new_zeros(len(x), n + 1).index_add(-1, keys + 1, x)[:, 1:]
    kept = by_key.masked_fill(~support, 0)
    return kept, x.sum(-1) - kept.sum(-1)
