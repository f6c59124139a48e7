"""`qtx-lab bench samplers`: the time of every sampler beside exact SDPA and beside a loop over rows."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import sampled_attention
from ..samplers import SAMPLERS
from .base import BenchRow, Method, compare

HEADS, FEATURES = 8, 64
ALLOWED = 1.1
"""A sampler may have this many times the error that is expected of independent draws."""


def bench_samplers(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Time every registered sampler on synthetic rows of moderate peakedness; rows as of `compare`."""
    cases = [(1024, 64)] if quick else [(256, 64), (1024, 16), (1024, 64), (1024, 256), (4096, 64)]
    rows = []
    for n, draws in cases:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, HEADS, n, FEATURES, generator=generator) for _ in range(3))
        q *= 1.5  # an effective number of keys of about n / 9
        p = (q.double() @ k.double().mT / math.sqrt(FEATURES)).softmax(-1)
        exact = p @ v.double()
        # The relative error that is expected of S independent draws: E|ô − o|² = (Σ_j p_j v_j² − o²) / S.
        variance = (p @ v.double().square()).sum() - exact.square().sum()
        allowed = ALLOWED * math.sqrt(variance / draws / exact.square().sum())
        streamed = q.nbytes + k.nbytes + v.nbytes + q.nbytes
        drawn = streamed - v.nbytes + HEADS * n * draws * FEATURES * v.element_size()
        methods = [
            Method("sdpa", partial(F.scaled_dot_product_attention, q, k, v), streamed, 1e-5),
            Method("row-by-row loop", partial(row_by_row, q, k, v, draws, generator), drawn, allowed),
        ]
        for name in SAMPLERS:
            if name != "exact":
                call = partial(sampled_output, q, k, v, name, draws, generator)
                methods.append(Method(name, call, drawn, allowed))
        case = f"B=1 H={HEADS} L=n={n} d={FEATURES} S={draws}"
        turns = 5 if quick else 9
        rows += compare(case, methods, exact, ("sdpa", "row-by-row loop"), turns, copy_bandwidth)
    return rows


def sampled_output(
    q: Tensor, k: Tensor, v: Tensor, sampler: str, draws: int, generator: torch.Generator
) -> Tensor:
    """The output of `sampled_attention`."""
    return sampled_attention(q, k, v, sampler=sampler, num_samples=draws, generator=generator).output


def row_by_row(q: Tensor, k: Tensor, v: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Sampled attention as published quantum-attention code computes it, by loops over all rows."""
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                p = torch.softmax(k[b, h] @ q[b, h, i] / math.sqrt(q.shape[-1]), dim=0)
                keys = torch.multinomial(p, draws, replacement=True, generator=generator)
                out[b, h, i] = v[b, h, keys].mean(0)
    return out
