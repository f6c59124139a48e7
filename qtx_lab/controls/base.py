"""What a control is: a cheap surrogate of an attention row, known at every key, whose full sum is known."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ArgumentError, DtypeError, ShapeError

EVERY = slice(None)

GATHERED = 1 << 20
"""The most numbers gathered at a time where each row looks at keys of its own: 4 MiB in float32."""


class Prepared(Protocol):
    """A control for the given keys and values of N heads.

    For every query it has surrogate weights p̂_j >= 0 of the keys that the query sees, which sum to 1 (0 for
    the other keys), and knows both each p̂_j and sum_j p̂_j v_j.
    """

    @abstractmethod
    def sums(self, q: Tensor, positions: Tensor, *, heads: slice = EVERY) -> Tensor:
        """sum_j p̂_j v_j of every query.

        Parameters
        ----------
        q : Tensor, (N, M, E)
            M queries of each of the heads `heads`.
        positions : Tensor, (M,), int64
            In a causal problem query m sees the keys 0 to positions[m]. Ignored otherwise.
        heads : slice
            The prepared heads that the queries belong to.

        Returns
        -------
        Tensor, (N, M, d)

        Raises
        ------
        ShapeError
            If q does not fit the heads or positions does not fit q.
        """

    @abstractmethod
    def weights_at(self, q: Tensor, positions: Tensor, indices: Tensor, *, heads: slice = EVERY) -> Tensor:
        """p̂ at the keys `indices` (N, M, T), the same p̂ as that of `sums`; (N, M, T)."""

    def exact_rows(self, positions: Tensor) -> Tensor:
        """At which positions p̂ = p, whatever the keys: bool, (M,).

        The weight of the control in such a row is known to be 1.
        """
        return torch.zeros_like(positions, dtype=torch.bool)

    @abstractmethod
    def cost(self, n: int) -> float:
        """Multiply-adds that `sums` spends on a query of n keys, without those that all queries share."""

    @abstractmethod
    def cost_at(self) -> float:
        """Multiply-adds that `weights_at` spends on a drawn key, once `sums` is known."""


class Control(ABC):
    """A cheap surrogate of attention rows, to be prepared for given keys."""

    name: str
    oracle: bool = False
    """Whether p̂ = p, so that the output is known."""

    @abstractmethod
    def prepare(
        self,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool,
        q: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Prepared:
        """Read the keys and values once.

        Parameters
        ----------
        k : Tensor, (N, n, E), float32 or float64
        v : Tensor, (N, n, d), of the same dtype
        scale : float
            p = softmax(scale q·k).
        causal : bool
            Whether a query sees only the keys up to its position. What the control then says of a query must
            not depend on later keys, nor on n: for queries that see as many it can be fitted to the first
            `qtx_lab.problem.FIRST_KNOWN` keys.
        q : Tensor, (N, M, E), optional
            Queries that the control can tune itself to, as many as there are. Those of a causal problem must
            be known to every query that sees `FIRST_KNOWN` keys.
        generator : torch.Generator, optional
            The only source of randomness; torch's default one for the device where None.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            If k and v are not of these shapes and types, or scale is not finite.
        """


def check_keys(k: Tensor, v: Tensor, scale: float) -> None:
    """Refuse keys and values that no control can be prepared for: see `Control.prepare`."""
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise DtypeError(f"{name} is {given}; it must be a float32 or float64 tensor.")
    if k.ndim != 3 or v.ndim != 3 or k.shape[:2] != v.shape[:2] or 0 in k.shape[1:]:
        raise ShapeError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; they must be (N, n, E) and (N, n, d) "
            "with n, E >= 1."
        )
    if k.dtype != v.dtype:
        raise DtypeError(f"k is {k.dtype} and v is {v.dtype}; they must agree.")
    if not math.isfinite(scale):
        raise ArgumentError(f"scale={scale} is not allowed: it must be a finite number.")


def check_queries(q: Tensor, positions: Tensor, k: Tensor) -> None:
    """Refuse queries that do not fit the heads' keys `k` (N, n, E)."""
    if q.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ShapeError(
            f"q has shape {tuple(q.shape)}; it must be ({k.shape[0]}, M, {k.shape[2]}), as the keys."
        )
    if positions.shape != q.shape[1:2]:
        raise ShapeError(f"positions has shape {tuple(positions.shape)}; it must be ({q.shape[1]},), as q.")


def masked_logits(q: Tensor, k: Tensor, positions: Tensor, scale: float, causal: bool) -> Tensor:
    """scale q·k, (N, M, n); -inf where a query does not see a key."""
    logits = torch.bmm(q * scale, k.mT)
    if causal:
        key = torch.arange(k.shape[1], device=k.device)
        logits.masked_fill_(key > positions[:, None], -torch.inf)
    return logits


def dense_weights(
    prepared: Prepared, q: Tensor, positions: Tensor, num_keys: int, *, heads: slice = EVERY
) -> Tensor:
    """p̂ at every key, (N, M, n): memory M n, for small inputs."""
    indices = torch.arange(num_keys, device=q.device).expand(*q.shape[:2], num_keys)
    return prepared.weights_at(q, positions, indices, heads=heads)
