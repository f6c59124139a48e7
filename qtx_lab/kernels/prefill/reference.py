"""Sampled attention of many queries and its unbiased gradients, in plain torch: what `prefill` computes, whole maps at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import Inputs
from ..masses import PAGE
from ..philox_reference import PAGES, philox, uniform


def probabilities(x: Inputs, is_causal: bool) -> Tensor:
    """The rows (N, M, n), 0 where nothing is seen; memory M * n."""
    logits = x.logits()
    if is_causal:
        position = torch.arange(logits.shape[1], device=logits.device)[:, None] % x.length
        logits = logits.masked_fill(torch.arange(x.shape[2], device=logits.device) > position, -torch.inf)
    return (logits * math.log(2)).softmax(-1).nan_to_num(0.0)


def weights(
    x: Inputs, num_samples: int, seed: Tensor, *, is_causal: bool, replicate: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws c_j / S, weights w_j and probabilities p_j of the rows, each (N, M, T, PAGE).

    In each page of keys draws are systematic, with an offset of the page's own: floor(F_j + U) - floor(F_(j-1) + U) of
    key j, F the running sum of S p within the page. What a page's draws miss of its probability is spread evenly over
    the keys of it that the row sees.
    """
    p = probabilities(x, is_causal)
    seen = F.pad(p > 0, (0, -p.shape[-1] % PAGE)).unflatten(-1, (-1, PAGE))
    p = F.pad(p, (0, -p.shape[-1] % PAGE)).unflatten(-1, (-1, PAGE))
    heads, rows, pages, _ = p.shape
    device = p.device
    words = philox(
        seed,
        torch.arange(pages, device=device),
        torch.arange(rows, device=device)[:, None] % x.length,
        torch.arange(heads, device=device)[:, None, None],
        PAGES + replicate,
    )
    u = uniform(words[0])[..., None]  # [N, M, T, 1]
    share = num_samples * p
    run = share.cumsum(-1)
    draws = ((run + u).floor() - (run - share + u).floor()) / num_samples
    missed = p.sum(-1, keepdim=True) - draws.sum(-1, keepdim=True)
    return draws, draws + seen * (missed / seen.sum(-1, keepdim=True).clamp_min(1)), p


def prefill(
    x: Inputs, num_samples: int, seed: Tensor, *, is_causal: bool = False, replicate: int = 0
) -> Tensor:
    """The output (N, M, Ev), v's dtype: see `qtx_lab.kernels.prefill.prefill`."""
    w = weights(x, num_samples, seed, is_causal=is_causal, replicate=replicate)[1]
    output = torch.bmm(w.flatten(-2)[..., : x.shape[2]], x.v.flatten(0, 1).float())
    return output.to(x.v.dtype)


def gradients(
    x: Inputs, num_samples: int, seed: Tensor, g: Tensor, *, is_causal: bool = False, replicate: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Unbiased estimates of q's (N, M, E), k's (N, n, E) and v's (N, n, Ev) gradients for g (N, M, Ev), float32.

    With l_j the logits, a_j = g . v_j and t the page of key j, draws of other pages are independent of c_j, so that

        dL/dl_j = c_j / S (a_j - b_t),    b_t = sum_(k not in t) w_k a_k + sum_(k in t) p_k a_k

    is unbiased for p_j (a_j - sum_k p_k a_k): a leave-one-out baseline, page by page (see
    `qtx_lab.attention.gradients.differentiable`). v's gradient, w_j g, is that of the output itself.
    """
    draws, w, p = weights(x, num_samples, seed, is_causal=is_causal, replicate=replicate)
    n = x.shape[2]
    q, k, v, g = x.q.float(), x.k.flatten(0, 1).float(), x.v.flatten(0, 1).float(), g.float()
    a = F.pad(torch.bmm(g, v.mT), (0, -n % PAGE)).unflatten(-1, (-1, PAGE))
    of_page = (w * a).sum(-1, keepdim=True)
    baseline = of_page.sum(-2, keepdim=True) - of_page + (p * a).sum(-1, keepdim=True)
    dl = (draws * (a - baseline)).flatten(-2)[..., :n] * x.scale
    return torch.bmm(dl, k), torch.bmm(dl.mT, q), torch.bmm(w.flatten(-2)[..., :n].mT, g)
