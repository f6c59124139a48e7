"""Positive orthogonal random features as a control."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_count
from ..errors import ArgumentError
from .base import EVERY, GATHERED, check_keys, check_queries

FLOOR = 1e-6
"""Added to every key's features (the largest is 1), so that no row, and no causal prefix, has mass 0."""


class PerformerControl:
    """p̂_j ∝ φ(q)·φ(k_j) with positive orthogonal random features φ (FAVOR+).

    φ_f(x) = exp(±B ω_f·x + A |ω_f|^2 - |x|^2 / 2), f = 1..features / 2, with A and B that make the variance least
    (`damping`; A = 0 and B = 1 are the Performer's). The directions ω_f are orthogonal in blocks of E, with the
    lengths of Gaussian vectors, and come in pairs ±ω_f. A row of a softmax does not change when all keys move
    by k̄, nor when queries shrink as keys grow, and what all queries share, exp(scale q̄·k_j), is known exactly:
    so x stands for the centred key and, where `prepare` was shown the queries, the centred query, both scaled
    to the same mean square.
    Accurate where logits are small, useless where they are large: the relative variance of a feature grows as
    exp(scale |q + k|^2). Cost features (E + d + 1) a query, and for a causal query also
    B (features + d + 1), B ~ sqrt(n), for the keys of its own chunk; n features (E + d + 1) once for all
    queries. Source: Choromanski et al., Rethinking attention with Performers (2021), eq. 5 and 7, Theorem 2;
    Likhosherstov et al., Chefs' random tables (2022), for A and B.

    Parameters
    ----------
    features : int
        r, even and at least 2.
    """

    name = "performer"
    oracle = False

    def __init__(self, features: int = 128):
        check_count("features", features)
        if features % 2:
            raise ArgumentError(f"features={features} is not allowed: it must be even, they come in pairs.")
        self.features = features

    def prepare(
        self,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool,
        q: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PerformerWeights:
        check_keys(k, v, scale)
        directions = orthogonal_directions(self.features // 2, k.shape[-1], generator)
        if q is not None:
            check_queries(q, torch.empty(q.shape[1:2]), k)
        return PerformerWeights(k, v, scale, causal, directions.to(k), q)


def orthogonal_directions(count: int, width: int, generator: torch.Generator | None) -> Tensor:
    """`count` Gaussian vectors, (count, width) float64, orthogonal within each block of `width`."""
    device = None if generator is None else generator.device
    blocks = -(-count // width)
    gaussian = torch.randn(2, blocks, width, width, generator=generator, device=device, dtype=torch.float64)
    orthogonal, upper = torch.linalg.qr(gaussian[0])
    # Signs that make the rotation uniform (Mezzadri 2007), lengths of independent Gaussian vectors.
    orthogonal = orthogonal * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    return (orthogonal.mT * gaussian[1].norm(dim=-1, keepdim=True)).reshape(-1, width)[:count]


def damping(square: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(B, A) of the features exp(A |ω|^2 + B ω·x - |x|^2 / 2) of least variance for |q + k|^2 = `square` > 0.

    Source: Likhosherstov et al., Chefs' random tables (2022), optimal positive random features.
    """
    s, d = square.double(), width
    rho = (((2 * s + d).square() + 8 * d * s).sqrt() - 2 * s - d) / (4 * s)
    tilt = (1 - 1 / rho.clamp(1e-6, 1)) / 8
    return (1 - 4 * tilt).sqrt().to(square), tilt.to(square)


def _both_signs(x: Tensor) -> Tensor:
    return torch.cat((x, -x), dim=-1)


class PerformerWeights:
    """`PerformerControl` for given keys and `directions` ω, (features / 2, E)."""

    def __init__(
        self, k: Tensor, v: Tensor, scale: float, causal: bool, directions: Tensor, q: Tensor | None = None
    ):
        self.causal, self.directions = causal, directions
        k = k - k.mean(1, keepdim=True)
        q = k if q is None or not q.numel() else q * scale
        self.centre = torch.zeros_like(k[:, :1]) if q is k else q.mean(1, keepdim=True)  # [N, 1, E]
        common = k @ self.centre.mT  # [N, n, 1], the part of the logits that all queries share
        sizes = [x.square().sum(-1).mean(1).clamp_min(1e-12)[:, None, None] for x in (q - self.centre, k)]
        if q is k:
            sizes = [sizes[1] * scale * scale, sizes[1]]
        factor = (sizes[0] / sizes[1]).sqrt().sqrt()  # [N, 1, 1]: both sides get the same mean square
        self.factor, self.query_factor = factor, scale / factor
        self.stretch, tilt = damping(2 * (sizes[0] * sizes[1]).sqrt(), k.shape[-1])
        x = k * factor
        # |ω|^2 acts on queries and on keys; here both times on the keys
        bend = 2 * tilt * directions.square().sum(-1).repeat(2)  # [N, 1, r]
        self.mixed = self.stretch * directions.mT  # [N, E, r / 2]
        exponents = _both_signs(x @ self.mixed) + bend + common - x.square().sum(-1, keepdim=True) / 2
        self.shift = exponents.amax(1, keepdim=True)  # [N, 1, r], handed on to the queries' features
        self.features = (exponents - self.shift).exp_() + FLOOR
        self.values = F.pad(v, (0, 1), value=1.0)  # [N, n, d + 1]: the last column sums up to the normaliser
        n = k.shape[1]
        self.chunk = 16 * math.ceil(math.sqrt(n) / 16) if causal else n
        padding = (0, 0, 0, -n % self.chunk)
        # [N, chunks, r, d + 1], summed over the keys of all chunks before, and lastly over all keys
        parts = (F.pad(x, padding).unflatten(1, (-1, self.chunk)) for x in (self.features, self.values))
        keys, values = parts
        self.states = F.pad((keys.mT @ values).cumsum(1), (0, 0, 0, 0, 1, 0))

    def sums(self, q: Tensor, positions: Tensor, *, heads: slice = EVERY) -> Tensor:
        out = self._totals(self._query_features(q, positions, heads), positions, heads, EVERY)
        return out[..., :-1] / out[..., -1:]

    def weights_at(self, q: Tensor, positions: Tensor, indices: Tensor, *, heads: slice = EVERY) -> Tensor:
        queries = self._query_features(q, positions, heads)
        normaliser = self._totals(queries, positions, heads, slice(-1, None))
        keys = self.features[heads]
        count, n, r = keys.shape
        first = torch.arange(count, device=q.device)[:, None, None] * n
        table, rows = keys.reshape(count * n, r), indices + first
        if indices.shape[-1] >= n:  # reading each key once is less than reading each draw's
            weights = (queries @ keys.mT).gather(-1, indices) / normaliser
            return weights.masked_fill_(indices > positions[:, None], 0) if self.causal else weights
        step = max(1, GATHERED // max(1, count * indices.shape[-1] * r))
        weights = torch.empty_like(indices, dtype=q.dtype)
        for start in range(0, q.shape[1], step):
            part = slice(start, start + step)
            gathered = F.embedding(rows[:, part], table)  # [N, step, T, r]
            weights[:, part] = (gathered @ queries[:, part, :, None]).squeeze(-1)
        weights /= normaliser
        return weights.masked_fill_(indices > positions[:, None], 0) if self.causal else weights

    def trust(self, q: Tensor, positions: Tensor, *, heads: slice = EVERY) -> None:
        return None

    def cost_at(self) -> float:
        return float(self.features.shape[-1])

    def cost(self, n: int) -> float:
        r, width = self.features.shape[-1], self.values.shape[-1]
        chunk = self.chunk if self.causal else 0
        return float(r * (self.directions.shape[-1] + width) + chunk * (r + width))

    def _query_features(self, q: Tensor, positions: Tensor, heads: slice) -> Tensor:
        """φ(q) up to a factor that p̂ does not have, (N, M, r), the largest 1."""
        centre, mixed, shift = (x[heads] for x in (self.centre, self.mixed, self.shift))
        check_queries(q, positions, centre)
        x = q * self.query_factor[heads] - centre / self.factor[heads]
        exponents = _both_signs(x @ mixed) + shift
        return (exponents - exponents.amax(-1, keepdim=True)).exp()

    def _totals(self, queries: Tensor, positions: Tensor, heads: slice, columns: slice) -> Tensor:
        """sum_j φ(q)·φ(k_j) of the `columns` of values over the visible keys, (N, M, columns)."""
        states, values = self.states[heads][..., columns], self.values[heads][..., columns]
        if not self.causal:
            return queries @ states[:, -1]
        keys, n = self.features[heads], self.values.shape[1]
        last = positions.clamp_max(n - 1)
        out = queries.new_empty(*queries.shape[:2], values.shape[-1])
        for c in (last // self.chunk).unique().tolist():
            rows = (last // self.chunk == c).nonzero().squeeze(-1)
            part = slice(c * self.chunk, min(n, (c + 1) * self.chunk))
            key = torch.arange(part.start, part.stop, device=last.device)
            scores = queries[:, rows] @ keys[:, part].mT  # [N, rows, chunk]
            scores.masked_fill_(key > last[rows, None], 0)
            out[:, rows] = queries[:, rows] @ states[:, c] + scores @ values[:, part]
        return out
