"""Keys pooled to a few landmarks as a control."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_count
from .base import EVERY, Control, Prepared, check_keys, check_queries


class LinformerControl(Control):
    """A softmax over means of segments of keys, each segment's weight spread evenly over its keys.

    With segments of B neighbouring keys and k̄_g the mean of segment g, p̂_j ∝ exp(scale q·k̄_{g(j)}). B =
    ceil(n / landmarks); for a causal row that sees m keys it is the smallest power of two with m <= B
    landmarks, so that nothing later matters. Causal rows see their whole segments and, as a segment of its
    own, the part of the last one that they have reached. Costs landmarks (E + d) multiply-adds a query.
    Source: Wang et al., Linformer (2020), with mean pooling as the projection of the keys.

    Parameters
    ----------
    landmarks : int
        At least 1. With as many landmarks as keys, or more, the surrogate is the row itself.
    """

    name = "linformer"

    def __init__(self, landmarks: int = 64):
        landmarks = check_count("landmarks", landmarks)
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
        """Pool the keys and values: see `Control.prepare`."""
        check_keys(k, v, scale)
        return LinformerWeights(k, v, scale, causal, self.landmarks)


@dataclass(frozen=True)
class Segments:
    """The first `end` keys in segments of `size`, for the rows that attend to them so.

    Parameters
    ----------
    size : int
        B.
    start, end : int
        Causal rows attend to these segments if their last key is from `start` to `end - 1`. Without causality
        both are n.
    lengths : Tensor, (segments,)
        Keys of each segment; the last one may be shorter.
    keys, values : Tensor, (N, segments, E) and (N, segments, d)
        Means of whole segments.
    partial_keys, partial_values : Tensor, (N, end - start, E) and (N, end - start, d)
        For each key from `start` on, the mean over its segment up to and including it.
    """

    size: int
    start: int
    end: int
    lengths: Tensor
    keys: Tensor
    values: Tensor
    partial_keys: Tensor
    partial_values: Tensor

    @classmethod
    def of(cls, k: Tensor, v: Tensor, size: int, start: int, end: int) -> Segments:
        """Pool keys (N, n, E) and values (N, n, d)."""
        last = torch.arange(size, end + size, size, device=k.device).clamp_max(end) - 1  # of each segment
        last = last[: -(-end // size)]
        means = [_segment_means(x[:, :end], size) for x in (k, v)]
        whole, partial = [x[:, last] for x in means], [x[:, start:] for x in means]
        return cls(size, start, end, last % size + 1, whole[0], whole[1], partial[0], partial[1])


class LinformerWeights(Prepared):
    """`LinformerControl` for given keys."""

    def __init__(self, k: Tensor, v: Tensor, scale: float, causal: bool, landmarks: int):
        self.scale, self.causal, self.landmarks = scale, causal, landmarks
        self.num_keys, self.width = k.shape[1], k.shape[-1] + v.shape[-1]
        if not causal:
            size = -(-self.num_keys // landmarks)
            self.segments = [Segments.of(k, v, size, self.num_keys, self.num_keys)]
            return
        self.segments, size, start = [], 1, 0
        while start < self.num_keys:
            end = min(self.num_keys, size * landmarks)
            self.segments.append(Segments.of(k, v, size, start, end))
            size, start = 2 * size, end

    def sums(self, q: Tensor, positions: Tensor, *, heads: slice = EVERY) -> Tensor:
        """sum_j p̂_j v_j: see `Prepared.sums`."""
        check_queries(q, positions, self.segments[0].keys[heads])
        out = q.new_empty(*q.shape[:2], self.segments[0].values.shape[-1])
        for segments, rows, last in self._rows(positions):
            whole, partial = self._segment_weights(q[:, rows], segments, last, heads)
            out[:, rows] = whole @ segments.values[heads]
            if partial is not None:
                out[:, rows] += partial * segments.partial_values[heads][:, last - segments.start]
        return out

    def weights_at(self, q: Tensor, positions: Tensor, indices: Tensor, *, heads: slice = EVERY) -> Tensor:
        """p̂ at some keys: see `Prepared.weights_at`."""
        check_queries(q, positions, self.segments[0].keys[heads])
        weights = torch.empty_like(indices, dtype=q.dtype)
        for segments, rows, last in self._rows(positions):
            whole, partial = self._segment_weights(q[:, rows], segments, last, heads)
            keys = indices[:, rows]
            unseen = keys >= segments.end
            segment = (keys // segments.size).masked_fill(unseen, 0)
            each = (whole / segments.lengths).gather(-1, segment).masked_fill(unseen, 0)
            if partial is not None:
                reached = last[:, None]  # [rows, 1]
                inside = (segment == reached // segments.size) & (keys <= reached)
                each = torch.where(inside, partial / (reached % segments.size + 1), each)
            weights[:, rows] = each
        return weights

    def exact_rows(self, positions: Tensor) -> Tensor:
        """Those that see no more keys than there are landmarks: see `Prepared.exact_rows`."""
        seen = (positions + 1).clamp_max(self.num_keys) if self.causal else self.num_keys
        return torch.full_like(positions, self.landmarks) >= seen

    def cost_at(self) -> float:
        """Multiply-adds for a drawn key: see `Prepared.cost_at`."""
        return 1.0

    def cost(self, n: int) -> float:
        """Multiply-adds for a query of n keys: see `Prepared.cost`."""
        size = -(-n // self.landmarks)
        if self.causal:
            size = 1 << (size - 1).bit_length()
        return float((-(-n // size) + int(self.causal)) * self.width)

    def _rows(self, positions: Tensor) -> Iterator[tuple[Segments, Tensor, Tensor]]:
        """The segments that rows attend to, which rows these are, and the last key that each of them sees."""
        last = positions.clamp_max(self.num_keys - 1)
        if not self.causal:
            yield self.segments[0], torch.arange(len(last), device=last.device), last
            return
        for segments in self.segments:
            rows = ((last >= segments.start) & (last < segments.end)).nonzero().squeeze(-1)
            if len(rows):
                yield segments, rows, last[rows]

    def _segment_weights(
        self, q: Tensor, segments: Segments, last: Tensor, heads: slice
    ) -> tuple[Tensor, Tensor | None]:
        """The weights of the whole segments seen (N, M, segments) and of the part reached (N, M, 1)."""
        q = q * self.scale
        logits = q @ segments.keys[heads].mT + segments.lengths.to(q.dtype).log()
        if not self.causal:
            return logits.softmax(-1), None
        size, segment = segments.size, torch.arange(len(segments.lengths), device=q.device)
        logits.masked_fill_(segment >= last[:, None] // size, -torch.inf)
        partial = (q * segments.partial_keys[heads][:, last - segments.start]).sum(-1, keepdim=True)
        partial += (last % size + 1).to(q.dtype).log()[:, None]
        weights = torch.cat((logits, partial), dim=-1).softmax(-1)
        return weights[..., :-1], weights[..., -1:]


def _segment_means(x: Tensor, size: int) -> Tensor:
    """The mean of x (N, n, e) over the segment of j up to and including j, (N, n, e)."""
    n = x.shape[1]
    padded = F.pad(x, (0, 0, 0, -n % size)).unflatten(1, (-1, size))
    count = torch.arange(1, size + 1, device=x.device, dtype=x.dtype)[:, None]
    return (padded.cumsum(2) / count).flatten(1, 2)[:, :n]
