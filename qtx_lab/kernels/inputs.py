"""What the kernels attend to: queries, keys, values and a mask, with the heads of a group together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Inputs:
    """What is attended to, heads of a group together.

    Parameters
    ----------
    q : Tensor, (N, M, E)
        N = B * Hkv key heads, M = G * L rows of each, position last.
    k : Tensor, (B, Hkv, n, E)
    v : Tensor, (B, Hkv, n, Ev)
    mask : Tensor, (B, Hkv * G, L, n), optional
        Boolean (True: attend) or added to the logits.
    length : int
        L.
    scale : float
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    length: int
    scale: float

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> Inputs:
        """Those of q (..., H, L, E), k (..., Hkv, n, E), v (..., Hkv, n, Ev); a mask broadcasts to (..., H, L, n)."""
        *_, length, features = q.shape
        heads, kv_heads = (x.shape[-3] if x.ndim > 2 else 1 for x in (q, k))
        lead = q.shape[:-3].numel() if q.ndim > 2 else 1
        if mask is not None:
            mask = mask.expand(*q.shape[:-1], k.shape[-2]).reshape(lead, heads, length, k.shape[-2])
        return cls(
            q.reshape(lead * kv_heads, heads // max(1, kv_heads) * length, features).contiguous(),
            k.reshape(lead, kv_heads, *k.shape[-2:]),
            v.reshape(lead, kv_heads, *v.shape[-2:]),
            mask,
            length,
            1 / math.sqrt(features) if scale is None else float(scale),
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, M, n, Ev."""
        return (*self.q.shape[:2], *self.v.shape[-2:])

    def logits(self) -> Tensor:
        """In base 2 and float32, (N, M, n); the cost is n numbers a row."""
        k = self.k.flatten(0, 1).float()
        logits = torch.bmm(self.q.float(), k.mT) * (self.scale * LOG2_E)
        if self.mask is None:
            return logits
        mask = self.mask.reshape(logits.shape)
        if mask.dtype == torch.bool:
            return logits.masked_fill_(~mask, -torch.inf)
        return logits + mask.float() * LOG2_E
