"""Keys pooled to a few landmarks as a control."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_count
from .base import EVERY, check_keys, check_queries


class LinformerControl:
    """A softmax over segment means of the keys, each landmark's weight spread evenly over its keys.

    With segments of B = ceil(n / landmarks) neighbouring keys and k̄_g the mean of segment g,
    p̂_j ∝ exp(scale q·k̄_{g(j)}). Causal rows see their whole segments and the part of the last one that lies
    before them, whose landmark is the mean of that part. Cost landmarks (E + d) a query. Source: Wang et al.,
    Linformer (2020), with mean pooling as the projection of the keys.

    Parameters
    ----------
    landmarks : int
        At least 1; as many as there are keys where there are fewer.
    """

    name = "linformer"
    oracle = False

    def __init__(self, landmarks: int = 64):
        check_count("landmarks", landmarks)
        self.landmarks = landmarks

    def prepare(
        self,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool,
        q: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> LinformerWeights:
        check_keys(k, v, scale)
        return LinformerWeights(k, v, scale, causal, -(-k.shape[1] // self.landmarks))


class LinformerWeights:
    """`LinformerControl` for given keys; `size` is B, the keys of a segment."""

    def __init__(self, k: Tensor, v: Tensor, scale: float, causal: bool, size: int):
        self.scale, self.causal, self.size = scale, causal, size
        self.num_keys = k.shape[1]
        self.count = torch.arange(self.num_keys, device=k.device) % size + 1  # keys of j's segment up to j
        ends = torch.arange(size - 1, self.num_keys, size, device=k.device)
        if self.num_keys % size:  # the last segment is shorter
            ends = F.pad(ends, (0, 1), value=self.num_keys - 1)
        self.ends = ends
        self.partial_k, self.partial_v = (_segment_means(x, size) for x in (k, v))  # [N, n, .]
        self.k, self.v = self.partial_k[:, ends], self.partial_v[:, ends]  # [N, landmarks, .]

    def sums(self, q: Tensor, positions: Tensor, *, heads: slice = EVERY) -> Tensor:
        whole, partial = self._segment_weights(q, positions, heads)
        out = whole @ self.v[heads]
        if partial is not None:
            out += partial * self.partial_v[heads][:, self._last(positions)]
        return out

    def weights_at(self, q: Tensor, positions: Tensor, indices: Tensor, *, heads: slice = EVERY) -> Tensor:
        whole, partial = self._segment_weights(q, positions, heads)
        segment = indices // self.size
        weights = (whole / self.count[self.ends]).gather(-1, segment)
        if partial is None:
            return weights
        last = self._last(positions)[:, None]  # [M, 1]
        inside = (segment == last // self.size) & (indices <= last)
        return torch.where(inside, partial / self.count[last], weights)

    def trust(self, q: Tensor, positions: Tensor, *, heads: slice = EVERY) -> None:
        return None

    def cost_at(self) -> float:
        return 1.0

    def cost(self, n: int) -> float:
        landmarks = -(-n // self.size) + int(self.causal)
        return float(landmarks * (self.k.shape[-1] + self.v.shape[-1]))

    def _last(self, positions: Tensor) -> Tensor:
        """The last key that each query sees, (M,)."""
        return positions.clamp_max(self.num_keys - 1)

    def _segment_weights(self, q: Tensor, positions: Tensor, heads: slice) -> tuple[Tensor, Tensor | None]:
        """Weight of each whole segment (N, M, landmarks), 0 if not whole, and of the last part (N, M, 1)."""
        k = self.k[heads]
        check_queries(q, positions, k)
        q = q * self.scale
        logits = q @ k.mT + self.count[self.ends].to(q.dtype).log()
        if not self.causal:
            return logits.softmax(-1), None
        last = self._last(positions)
        logits.masked_fill_(self.ends // self.size >= last[:, None] // self.size, -torch.inf)
        partial = (q * self.partial_k[heads][:, last]).sum(-1, keepdim=True)
        partial += self.count[last].to(q.dtype).log()[:, None]
        weights = torch.cat((logits, partial), dim=-1).softmax(-1)
        return weights[..., :-1], weights[..., -1:]


def _segment_means(x: Tensor, size: int) -> Tensor:
    """Mean of x (N, n, e) over j's segment up to and including j, (N, n, e)."""
    n = x.shape[1]
    padded = F.pad(x, (0, 0, 0, -n % size)).unflatten(1, (-1, size))
    count = torch.arange(1, size + 1, device=x.device, dtype=x.dtype)[:, None]
    return (padded.cumsum(2) / count).flatten(1, 2)[:, :n]
