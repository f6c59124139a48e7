"""The heads behind an `AttentionLens`: their exact attention, what is drawn of them, and their variances."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention import sampled_attention
from ...errors import ShapeError
from ...estimates import AttentionEstimate
from ...problem import AttentionProblem
from ...samplers import Sampler
from .lens_maps import pool_map

MAX_POSITIONS = 4096
"""Queries or keys of a head, at most."""

MAX_CACHED_HEADS = 4
"""Heads whose maps are cached."""

THUMBNAIL_CELLS = 32
"""Cells of a side of a head's thumbnail."""

MAX_VARIANCE_ROWS = 256
"""Rows of a head on which its variance is measured, at most."""

TINY = torch.finfo(torch.float32).tiny

Layer = tuple[Tensor, Tensor, Tensor]
"""q (H, L, E), k (Hkv, n, E) and v (Hkv, n, Ev)."""


@dataclass
class Head:
    """A head's inputs and exact attention, and what was drawn of it last.

    Parameters
    ----------
    q, k, v : Tensor, (L, E), (n, E), (n, Ev)
    p : Tensor, float32, (L, n)
        Its exact attention.
    output : Tensor, (L, Ev)
        Exact.
    effective_keys : Tensor, (L,)
        exp of the entropy of each row.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor
    output: Tensor
    effective_keys: Tensor
    levels: dict[int, np.ndarray] = field(default_factory=dict)
    """The exact map at coarser levels, float16."""
    draws: int = 0
    estimate: AttentionEstimate | None = None

    def map_at(self, level: int) -> np.ndarray:
        """The exact map at a level, float16; see `pool_map`."""
        if level not in self.levels:
            self.levels[level] = pool_map(self.p.numpy(), level).astype(np.float16)
        return self.levels[level]

    def error(self, estimate: AttentionEstimate) -> float:
        """‖ô − o‖ / ‖o‖ of an estimate's output."""
        return float(
            (estimate.output - self.output).float().norm() / self.output.float().norm().clamp_min(TINY)
        )

    def row_facts(self, estimate: AttentionEstimate) -> np.ndarray:
        """What is known of each row, float32 (4, L).

        Effective keys exp(entropy), distinct keys drawn, ‖ô − o‖ / ‖o‖, and its standard error ‖σ‖ / ‖o‖,
        which is NaN where it is unknown.
        """
        norm = self.output.norm(dim=-1).clamp_min(TINY)
        error = (estimate.output.float() - self.output).norm(dim=-1) / norm
        sigma = estimate.std_error
        std_error = torch.full_like(error, torch.nan) if sigma is None else sigma.float().norm(dim=-1) / norm
        distinct = estimate.keys_touched().float()
        return torch.stack((self.effective_keys, distinct, error, std_error)).float().numpy()


@dataclass(frozen=True)
class Thumbnails:
    """The heads of a layer at a glance.

    Parameters
    ----------
    maps : ndarray, float16, (H, rows, columns)
        Exact attention, the largest weight of each cell.
    variances : ndarray, float32, (H,)
        E‖ô − o‖² / ‖o‖² of each head.
    """

    maps: np.ndarray
    variances: np.ndarray


class LensHeads:
    """All heads of some layers, of which one at a time is computed and drawn.

    Parameters
    ----------
    layers : sequence of (q, k, v)
        See `checked_layers`.
    sampler : Sampler
    is_causal : bool
    scale : float, optional
        1/√E where None.
    seed : int
        Of the draws of every head.
    estimate : AttentionEstimate, optional
        Of the first layer: used at its own number of draws.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        sampler: Sampler,
        *,
        is_causal: bool,
        scale: float | None,
        seed: int,
        estimate: AttentionEstimate | None = None,
    ):
        self.layers, self.sampler, self.is_causal = layers, sampler, is_causal
        self.num_heads, self.num_queries, width = layers[0][0].shape
        self.num_keys = layers[0][1].shape[-2]
        self._scale = 1 / math.sqrt(width) if scale is None else scale
        self._seed, self._estimate = seed, estimate
        self._cache: OrderedDict[tuple[int, int], Head] = OrderedDict()
        self._lock = threading.RLock()

    def visible(self) -> Tensor:
        """Which keys each query sees, bool (L, n)."""
        ones = torch.ones(self.num_queries, self.num_keys, dtype=torch.bool)
        return ones.tril() if self.is_causal else ones

    def head(self, layer: int, head: int) -> Head:
        """One head with its exact attention; the last few are cached."""
        with self._lock:
            if (layer, head) not in self._cache:
                self._cache[layer, head] = self._compute_head(layer, head)
                while len(self._cache) > MAX_CACHED_HEADS:
                    self._cache.popitem(last=False)
            return self._cache[layer, head]

    def draw(self, layer: int, head: int, num_samples: int) -> AttentionEstimate:
        """One head with `num_samples` draws a row; the same arguments give the same draws."""
        drawn = self.head(layer, head)
        with self._lock:
            if drawn.estimate is not None and drawn.draws == num_samples:
                return drawn.estimate
            estimate = self._from_given_estimate(layer, head, num_samples)
            if estimate is None:
                generator = torch.Generator().manual_seed(self._seed + 1_000_003 * layer + 1_009 * head)
                estimate = sampled_attention(
                    drawn.q, drawn.k, drawn.v, sampler=self.sampler, num_samples=num_samples,
                    is_causal=self.is_causal, scale=self._scale, generator=generator,
                )  # fmt: skip
            drawn.draws, drawn.estimate = num_samples, estimate
            return estimate

    def thumbnails(self, layer: int, num_samples: int) -> Thumbnails:
        """The heads of a layer at a glance; variances are measured on some of the rows."""
        q, k, v = self.layers[layer]
        group = q.shape[0] // k.shape[0]
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        rows = torch.arange(0, self.num_queries, max(1, -(-self.num_queries // MAX_VARIANCE_ROWS)))
        mask = self.visible()[rows] if self.is_causal else None
        q = q[:, rows]
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self._scale)
        estimate = sampled_attention(
            q, k, v, sampler=self.sampler, num_samples=num_samples, attn_mask=mask, scale=self._scale,
            generator=torch.Generator().manual_seed(self._seed),
        )  # fmt: skip
        squares = (estimate.output - exact).float().square().sum((-2, -1))
        variances = squares / exact.float().square().sum((-2, -1)).clamp_min(TINY)
        shown = torch.arange(0, len(rows), max(1, len(rows) // THUMBNAIL_CELLS))
        logits = (q[:, shown].float() * self._scale) @ k.float().mT
        if mask is not None:
            logits.masked_fill_(~mask[shown], -torch.inf)
        width = -(-self.num_keys // THUMBNAIL_CELLS)  # keys under a cell
        padded = F.pad(logits.softmax(-1), (0, width * -(-self.num_keys // width) - self.num_keys))
        maps = padded.unflatten(-1, (-1, width)).amax(-1)
        return Thumbnails(maps.numpy().astype(np.float16), variances.numpy())

    def _compute_head(self, layer: int, head: int) -> Head:
        q, k, v = self.layers[layer]
        group = q.shape[0] // k.shape[0]
        q, k, v = q[head], k[head // group], v[head // group]
        logits = (q.float() * self._scale) @ k.float().mT  # [L, n]
        if self.is_causal:
            logits.masked_fill_(~self.visible(), -torch.inf)
        p = logits.softmax(-1)
        return Head(q, k, v, p, p @ v.float(), torch.special.entr(p).sum(-1).exp())

    def _from_given_estimate(self, layer: int, head: int, num_samples: int) -> AttentionEstimate | None:
        """This head of the estimate that was handed in, if it has this number of draws."""
        est = self._estimate
        if est is None or layer != 0 or est.info.num_samples != num_samples:
            return None
        at = (head,) if est.output.ndim == 3 else (0, head) if est.output.ndim == 4 else ()
        draws, error = est.draws, est.std_error
        for i in at:
            draws = draws[i : i + 1,].view(tuple(draws.indices.shape[1:-1]))
            error = None if error is None else error[i]
        output = est.output[at] if at else est.output
        return AttentionEstimate(
            output, est.num_keys, est.degrees_of_freedom, lambda: draws,
            None if error is None else lambda: error, info=est.info,
        )  # fmt: skip


def checked_layers(
    q: Tensor | Sequence[Tensor],
    k: Tensor | Sequence[Tensor],
    v: Tensor | Sequence[Tensor],
    is_causal: bool,
    scale: float | None,
) -> list[Layer]:
    """(q, k, v) of every layer.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError
        As `sampled_attention`; a batch; too many positions; layers of different shapes.
    """
    stacks = [[x] if isinstance(x, Tensor) else list(x) for x in (q, k, v)]
    lengths = [len(stack) for stack in stacks]
    if not stacks[0] or len(set(lengths)) > 1:
        raise ShapeError(f"q, k, v have {lengths} layers; each needs as many, at least one.")
    layers: list[Layer] = []
    for number, inputs in enumerate(zip(*stacks, strict=True)):
        for name, x in zip("qkv", inputs, strict=True):
            _check_shape(name, x)
        queries, keys, values = (
            x.detach().cpu().reshape(-1, *x.shape[-2:]) if isinstance(x, Tensor) else x for x in inputs
        )
        AttentionProblem.of(queries, keys, values, is_causal=is_causal, scale=scale, enable_gqa=True)
        if max(queries.shape[-2], keys.shape[-2]) > MAX_POSITIONS:
            raise ShapeError(
                f"q has {queries.shape[-2]} queries, k {keys.shape[-2]} keys; 1 to {MAX_POSITIONS} can be "
                "shown."
            )
        layers.append((queries, keys, values))
        if queries.shape != layers[0][0].shape or keys.shape != layers[0][1].shape:
            raise ShapeError(f"Layer {number} has another shape than layer 0; all layers must have the same.")
    return layers


def _check_shape(name: str, x: object) -> None:
    if isinstance(x, Tensor) and (
        x.ndim not in (2, 3, 4) or (x.ndim == 4 and x.shape[0] != 1) or 0 in x.shape
    ):
        raise ShapeError(
            f"{name} has shape {tuple(x.shape)}; it must be (L, E), (H, L, E) or (1, H, L, E), one text at a "
            "time, and not empty."
        )
