"""Sampled attention of many queries and its gradients, in plain torch.

It gives the draws of `launch`, with whole maps of queries by keys in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import DtypeError
from ...streams import Purpose, Stream
from ..inputs import Inputs
from ..masses import PAGE


@dataclass(frozen=True)
class PageDraws:
    """The draws of N heads of M rows, page by page.

    Parameters
    ----------
    draws : Tensor, float32, (N, M, T, PAGE)
        c_j / S: how often each key is drawn.
    weights : Tensor, float32, (N, M, T, PAGE)
        w_j: the share of each key in the output.
    probabilities : Tensor, float32, (N, M, T, PAGE)
        p_j.
    """

    draws: Tensor
    weights: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Gradients:
    """Estimates of the gradients of q (N, M, E), k (N, n, E) and v (N, n, Ev), float32."""

    q: Tensor
    k: Tensor
    v: Tensor


def refuse_unknown(x: Inputs) -> None:
    """Refuse what this operation does not know of inputs, but the others do.

    Raises
    ------
    ArgumentError
        If there are a softcap, a window, lengths, a block table, sinks, or scales of keys and values.
    DtypeError
        If keys or values have 8 bits.
    """
    x.refuse("softcap", "window", "lengths", "block_table", "sinks", "k_scale", "v_scale")
    for name, y in (("k", x.k), ("v", x.v)):
        if y.dtype.itemsize == 1:
            raise DtypeError(f"{name} is {y.dtype}; this kernel takes 16 bits or more.")


def masked_logits(x: Inputs, is_causal: bool) -> Tensor:
    """The natural logits, (N, M, n), float32; -inf where a row does not see a key."""
    refuse_unknown(x)
    logits = x.logits() * math.log(2)
    if is_causal:
        position = x.first_position + torch.arange(logits.shape[1], device=logits.device) % x.length
        later = torch.arange(x.shape[2], device=logits.device) > position[:, None]
        logits = logits.masked_fill(later, -torch.inf)
    return logits


def probabilities(x: Inputs, is_causal: bool) -> Tensor:
    """The attention rows, (N, M, n), float32; 0 where a row attends to nothing."""
    return masked_logits(x, is_causal).softmax(-1).nan_to_num(0.0)


def page_offsets(stream: Stream, pages: int, rows: int) -> Tensor:
    """Where the comb of each page starts, in units of the distance of its points: (N, M, T), float32.

    They are the upper 24 bits of the numbers of the stream. The query heads of a group share them.
    """
    numbers = stream.of_purpose(Purpose.PAGES, stream.first_replicate).uniform(1, pages)[:, :, 0]  # [N, L, T]
    offsets = ((numbers * (1 << 24)).floor() * 2.0**-24).float()
    return offsets.repeat(1, rows // offsets.shape[1], 1)


def draw(x: Inputs, num_samples: int, stream: Stream, *, is_causal: bool) -> PageDraws:
    """Draw S keys of each row, on average.

    In each page of keys the draws are systematic, with an offset U of the page's own: key j is drawn
    floor(F_j + U) - floor(F_(j-1) + U) times, where F is the running sum of S p within the page. What the
    draws of a page miss of its probability is spread evenly over those of its keys that the row attends to.
    """
    p = probabilities(x, is_causal)
    p = F.pad(p, (0, -p.shape[-1] % PAGE)).unflatten(-1, (-1, PAGE))  # [N, M, T, PAGE]
    u = page_offsets(stream, p.shape[2], p.shape[1])[..., None]  # [N, M, T, 1]
    share = num_samples * p
    run = share.cumsum(-1)
    draws = ((run + u).floor() - (run - share + u).floor()) / num_samples
    missed = p.sum(-1, keepdim=True) - draws.sum(-1, keepdim=True)
    visible = p > 0
    return PageDraws(draws, draws + visible * (missed / visible.sum(-1, keepdim=True).clamp_min(1)), p)


def prefill(x: Inputs, num_samples: int, stream: Stream, *, is_causal: bool = False) -> Tensor:
    """Sample the output (N, M, Ev), in v's dtype: see `launch.prefill`."""
    weights = draw(x, num_samples, stream, is_causal=is_causal).weights
    output = torch.bmm(weights.flatten(-2)[..., : x.shape[2]], x.v.flatten(0, 1).float())
    return output.to(x.v.dtype)


def gradients(
    x: Inputs, num_samples: int, stream: Stream, g: Tensor, *, is_causal: bool = False
) -> Gradients:
    """Estimate the gradients of q, k and v for a gradient g (N, M, Ev) of the output, without bias.

    With l_j the logits, a_j = g . v_j and t the page of key j, the draws of other pages are independent of
    c_j, so that

        dL/dl_j = c_j / S (a_j - b_t),    b_t = sum_(k not in t) w_k a_k + sum_(k in t) p_k a_k

    is unbiased for p_j (a_j - sum_k p_k a_k): a leave-one-out baseline, page by page (see
    `qtx_lab.attention.gradients.differentiable`). The gradient of v_j, w_j g, is that of the output itself.
    """
    drawn = draw(x, num_samples, stream, is_causal=is_causal)
    n = x.shape[2]
    q, k, v, g = x.q.float(), x.k.flatten(0, 1).float(), x.v.flatten(0, 1).float(), g.float()
    a = F.pad(torch.bmm(g, v.mT), (0, -n % PAGE)).unflatten(-1, (-1, PAGE))  # [N, M, T, PAGE]
    page_sum = (drawn.weights * a).sum(-1, keepdim=True)  # [N, M, T, 1]
    baseline = page_sum.sum(-2, keepdim=True) - page_sum + (drawn.probabilities * a).sum(-1, keepdim=True)
    dl = (drawn.draws * (a - baseline)).flatten(-2)[..., :n] * x.scale
    weights = drawn.weights.flatten(-2)[..., :n]
    return Gradients(torch.bmm(dl, k), torch.bmm(dl.mT, q), torch.bmm(weights.mT, g))
