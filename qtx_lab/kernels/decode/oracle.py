"""Decoding by systematic draws as a newcomer would write it, in float64.

Tests compare the kernels and their reference with it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decode(logits: Tensor, values: Tensor, offsets: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """Draw S keys of each row at equally spaced points of its distribution, and average their values.

    Parameters
    ----------
    logits : Tensor, (..., M, n)
        -inf where masked; every row attends to some key.
    values : Tensor, (..., n, Ev)
    offsets : Tensor, (..., M)
        Where the first point of each row lies, in units of the distance between points, 0 <= u < 1.
    num_samples : int
        S.

    Returns
    -------
    indices : Tensor, int64, (..., M, S)
    output : Tensor, (..., M, Ev)

    Examples
    --------
    >>> decode(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0], [3.0]]), torch.tensor([0.5]), 4)
    (tensor([[0, 0, 1, 1]]), tensor([[2.]], dtype=torch.float64))
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    points = (torch.arange(num_samples, device=logits.device) + offsets[..., None].double()) / num_samples
    indices = torch.searchsorted(cumulative, points, right=True).clamp_max(logits.shape[-1] - 1)
    drawn = torch.take_along_dim(values.double()[..., None, :, :], indices[..., None], -2)
    return indices, drawn.mean(-2)
