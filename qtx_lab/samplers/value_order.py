"""Lays keys along a line on which neighbours have similar values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

POWER_STEPS = 4
"""Power iterations for a part's principal axis: any direction is valid, a better one gives less variance."""


_KEPT: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""(what it looked like, order) of each tensor of values that `kept_value_order` has seen and that is still alive."""


def kept_value_order(values: Tensor) -> Tensor:
    """`value_order`, computed once for a tensor of values: kept until the tensor is changed or gone.

    A change that torch does not count (through NumPy, say) leaves the old order, which costs variance and no bias.
    """
    if values.is_inference():  # its changes are not counted
        return value_order(values)
    seen = (values._version, values.data_ptr(), values.shape, values.stride())
    known, order = _KEPT.get(values, (None, None))
    if order is None or known != seen:
        order = value_order(values)
        _KEPT[values] = (seen, order)
    return order


def value_order(values: Tensor, features: int | None = None, leaf: int = 1) -> Tensor:
    """An order of the keys in which neighbours have similar values.

    Each part of the keys is split at the median along its first principal axis, again and again, until a key is
    alone; the right one of two sibling parts runs backwards, so that the line does not jump. A low-discrepancy
    sample along such a line is spread out in value space: along a Hilbert curve its variance is o(S^-(1 + 1/d))
    (Gerber, Chopin and Whiteley, Negative association, ordering and convergence of resampling methods, 2019,
    th. 5), along this line, which follows the values, it was measured to be smaller.

    Parameters
    ----------
    values : Tensor, (..., n, d)
    features : int, optional
        How many of the values' principal components are looked at; all d where None.
    leaf : int
        Parts of up to that many keys are left as they are.

    Returns
    -------
    Tensor, int64, (..., n)
        A permutation of the keys for each leading index. Cost O(n d log n).
    """
    *lead, n, d = values.shape
    x = values.reshape(-1, n, d).to(torch.promote_types(values.dtype, torch.float32))
    if x.numel():  # so that squares are numbers
        x = x / x.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    if features is not None and features < d:
        x = x - x.mean(1, keepdim=True)
        x, d = x @ torch.linalg.eigh(x.mT @ x).eigenvectors[..., -features:], features
    size = 1 << (n - 1).bit_length()  # padded to a power of two; the padding goes to the end of each part
    order = torch.arange(size, device=x.device).expand(len(x), size)
    real = (order < n).to(x.dtype)
    x = F.pad(x, (0, 0, 0, size - n))
    parts = 1
    while parts * leaf < size:
        length = size // parts
        x, w = x.view(len(x), parts, length, d), real.view(len(x), parts, length, 1)
        centred = (x - (x * w).sum(2, keepdim=True) / w.sum(2, keepdim=True).clamp_min(1)) * w
        axis = _principal_axis(centred)  # [N, parts, d]
        if parts > 1:
            left, right = axis.view(len(x), parts // 2, 2, d).unbind(2)
            against = (left * right).sum(-1, keepdim=True) > 0
            axis = torch.stack((left, torch.where(against, -right, right)), 2).view(len(x), parts, d)
        along = torch.einsum("npld,npd->npl", centred, axis).masked_fill(w.squeeze(-1) == 0, torch.inf)
        step = along.argsort(dim=-1, stable=True)
        order, real = (y.view(step.shape).gather(-1, step).view(len(x), size) for y in (order, real))
        x = x.gather(2, step.unsqueeze(-1).expand_as(x))
        parts *= 2
    return order[real > 0].view(*lead, n)


def _principal_axis(centred: Tensor) -> Tensor:
    """A direction of large variance of each part (N, parts, length, d), (N, parts, d), by power iteration."""
    far = centred.square().sum(-1, keepdim=True).argmax(2, keepdim=True)
    axis = centred.gather(2, far.expand(-1, -1, 1, centred.shape[-1])).squeeze(2)
    for _ in range(POWER_STEPS):
        axis = F.normalize(axis, dim=-1)
        axis = torch.einsum("npld,npl->npd", centred, torch.einsum("npld,npd->npl", centred, axis))
    return F.normalize(axis, dim=-1)
