"""A control made of positive orthogonal random features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_count
from ..errors import ArgumentError
from ..problem import FIRST_KNOWN
from .base import EVERY, GATHERED, Control, Prepared, check_keys, check_queries, masked_logits

FLOOR = 1e-6
"""Added to every feature, so that no row has mass 0. The largest feature of the keys fitted to is 1."""

MAX_EXPONENT = 30.0
"""Features of later keys are at most exp(MAX_EXPONENT), so that sums of a million stay far inside float32."""


class PerformerControl(Control):
    """p̂_j ∝ φ(q)·φ(k_j) with positive orthogonal random features φ (FAVOR+).

    φ_f(x) = exp(±B ω_f·x + A |ω_f|^2 - |x|^2 / 2), f = 1 … features / 2, with A and B of least variance
    (`damping`; the Performer has A = 0 and B = 1). The directions ω_f are orthogonal in blocks of E, have the
    lengths of Gaussian vectors and come in pairs ±ω_f. A row of a softmax does not change when all keys move
    by k̄, nor when queries shrink as keys grow; and what all queries share, exp(scale q̄·k_j), is known
    exactly. So x stands for the centred key and, where `prepare` was given queries, the centred query, both
    scaled to the same mean square. Centres and scales are those of all keys and queries or, in a causal
    problem, of the first 64 keys: a row that sees no more has the exact row as its surrogate, which costs
    less than the default features there.

    The control is accurate where logits are small and useless where they are large: the relative variance of
    a feature grows as exp(scale |q + k|^2). It costs features (E + d + 1) multiply-adds a query, and for a
    causal query also B (features + d + 1), B ~ sqrt(n), for the keys of its own chunk; n features (E + d + 1)
    once for all queries. Source: Choromanski et al., Rethinking attention with Performers (2021), eq. 5 and
    7, Theorem 2; Likhosherstov et al., Chefs' random tables (2022), for A and B.

    Parameters
    ----------
    features : int
        r, even and at least 2.
    """

    name = "performer"

    def __init__(self, features: int = 128):
        features = check_count("features", features)
        if features % 2:
            raise ArgumentError(
                f"features={features} is not allowed: it must be even, as features come in pairs."
            )
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
        """Compute the features of the keys: see `Control.prepare`."""
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


def _mean_square(x: Tensor) -> Tensor:
    """The mean of |x|^2 of vectors (N, n, E), (N, 1, 1); above 0."""
    return x.square().sum(-1).mean(1).clamp_min(1e-12)[:, None, None]


class PerformerWeights(Prepared):
    """`PerformerControl` for given keys and `directions` ω, (features / 2, E)."""

    def __init__(
        self, k: Tensor, v: Tensor, scale: float, causal: bool, directions: Tensor, q: Tensor | None = None
    ):
        self.scale, self.causal, self.directions = scale, causal, directions
        n, known = k.shape[1], FIRST_KNOWN if causal else k.shape[1]
        self.first_keys, self.first_values = (x[:, :FIRST_KNOWN] for x in (k, v))
        k = k - k[:, :known].mean(1, keepdim=True)
        key_square = _mean_square(k[:, :known])
        if q is None or not q.numel():  # queries are taken to be like keys
            self.centre, query_square = torch.zeros_like(k[:, :1]), key_square * scale * scale
        else:
            self.centre = scale * q.mean(1, keepdim=True)  # [N, 1, E]
            query_square = _mean_square(scale * q - self.centre)
        common = k @ self.centre.mT  # [N, n, 1], the part of the logits that all queries share
        factor = (query_square / key_square).sqrt().sqrt()  # [N, 1, 1], gives both sides the same mean square
        self.factor, self.query_factor = factor, scale / factor
        self.stretch, tilt = damping(2 * (query_square * key_square).sqrt(), k.shape[-1])
        x = k * factor
        # |ω|^2 acts on queries and on keys; here both times on the keys
        bend = 2 * tilt * directions.square().sum(-1).repeat(2)  # [N, 1, r]
        self.mixed = self.stretch * directions.mT  # [N, E, r / 2]
        exponents = _both_signs(x @ self.mixed) + bend + common - x.square().sum(-1, keepdim=True) / 2
        self.shift = exponents[:, :known].amax(
            1, keepdim=True
        )  # [N, 1, r], handed on to the queries' features
        self.features = (exponents - self.shift).clamp_max_(MAX_EXPONENT).exp_() + FLOOR
        self.values = F.pad(v, (0, 1), value=1.0)  # [N, n, d + 1]: the last column sums up to the normaliser
        self.chunk = 16 * math.ceil(math.sqrt(n) / 16) if causal else n
        padding = (0, 0, 0, -n % self.chunk)
        keys, values = (
            F.pad(x, padding).unflatten(1, (-1, self.chunk)) for x in (self.features, self.values)
        )
        # [N, chunks + 1, r, d + 1], summed over the keys of all chunks before, and lastly over all keys
        self.states = F.pad((keys.mT @ values).cumsum(1), (0, 0, 0, 0, 1, 0))

    def sums(self, q: Tensor, positions: Tensor, *, heads: slice = EVERY) -> Tensor:
        """sum_j p̂_j v_j: see `Prepared.sums`."""
        out = self._totals(self._query_features(q, positions, heads), positions, heads, EVERY)
        out = out[..., :-1] / out[..., -1:]
        early = self.exact_rows(positions).nonzero().squeeze(-1)
        if len(early):
            out[:, early] = self._early_weights(q, positions, early, heads) @ self.first_values[heads]
        return out

    def weights_at(self, q: Tensor, positions: Tensor, indices: Tensor, *, heads: slice = EVERY) -> Tensor:
        """p̂ at some keys: see `Prepared.weights_at`."""
        queries = self._query_features(q, positions, heads)
        weights = self._feature_weights(queries, indices, heads)
        weights /= self._totals(queries, positions, heads, slice(-1, None))
        early = self.exact_rows(positions).nonzero().squeeze(-1)
        if len(early):
            p = self._early_weights(q, positions, early, heads)
            weights[:, early] = p.gather(-1, indices[:, early].clamp_max(p.shape[-1] - 1))
        return weights.masked_fill_(indices > positions[:, None], 0) if self.causal else weights

    def _early_weights(self, q: Tensor, positions: Tensor, early: Tensor, heads: slice) -> Tensor:
        """The exact rows `early` over the first keys, (N, early, keys)."""
        logits = masked_logits(q[:, early], self.first_keys[heads], positions[early], self.scale, True)
        return logits.softmax(-1)

    def _feature_weights(self, queries: Tensor, indices: Tensor, heads: slice) -> Tensor:
        """φ(q)·φ(k_j) at keys `indices` (N, M, T) of queries' features (N, M, r)."""
        keys = self.features[heads]
        count, n, r = keys.shape
        if indices.shape[-1] >= n:  # reading each key once is less than reading each draw's
            return (queries @ keys.mT).gather(-1, indices)
        first = torch.arange(count, device=indices.device)[:, None, None] * n
        table, rows = keys.reshape(count * n, r), indices + first
        step = max(1, GATHERED // max(1, count * indices.shape[-1] * r))
        weights = torch.empty_like(indices, dtype=queries.dtype)
        for start in range(0, queries.shape[1], step):
            part = slice(start, start + step)
            gathered = F.embedding(rows[:, part], table)  # [N, step, T, r]
            weights[:, part] = (gathered @ queries[:, part, :, None]).squeeze(-1)
        return weights

    def exact_rows(self, positions: Tensor) -> Tensor:
        """Causal rows that see too few keys for a fit: see `Prepared.exact_rows`."""
        return positions < FIRST_KNOWN if self.causal else torch.zeros_like(positions, dtype=torch.bool)

    def cost_at(self) -> float:
        """Multiply-adds for a drawn key: see `Prepared.cost_at`."""
        return float(self.features.shape[-1])

    def cost(self, n: int) -> float:
        """Multiply-adds for a query of n keys: see `Prepared.cost`."""
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
