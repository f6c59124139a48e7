"""Sampled attention page by page as a newcomer would write it, in float64.

Tests compare the kernels and their reference with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..masses import PAGE


def prefill(logits: Tensor, values: Tensor, offsets: Tensor, num_samples: int) -> Tensor:
    """Sample the output of one row.

    Parameters
    ----------
    logits : Tensor, (n,)
        -inf where masked; the row attends to some key.
    values : Tensor, (n, Ev)
    offsets : Tensor, (T,)
        Where the first point of each page lies, in units of the distance between points, 0 <= u < 1.
    num_samples : int
        S, the draws on average.

    Returns
    -------
    output : Tensor, (Ev,)

    Examples
    --------
    >>> prefill(torch.zeros(2), torch.tensor([[1.0], [3.0]]), torch.tensor([0.5]), 4)
    tensor([2.], dtype=torch.float64)
    """
    values = values.double()
    pages = logits.double().softmax(-1).split(PAGE)
    output = torch.zeros_like(values[0])
    for p, v, u in zip(pages, values.split(PAGE), offsets, strict=True):
        # Key j is drawn once for each of the points 1 - u, 2 - u, ... between its two running sums of S p.
        cumulative = num_samples * p.cumsum(0)
        points = torch.arange(1, num_samples + 1, device=u.device) - u.double()
        drawn = torch.searchsorted(cumulative, points[points <= cumulative[-1]])
        missed = p.sum() - len(drawn) / num_samples
        output += v[drawn].sum(0) / num_samples + missed * v[p > 0].mean(0).nan_to_num(0.0)
    return output
