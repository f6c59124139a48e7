"""The heads behind an `AttentionLens`: their exact attention, what is drawn of them, and their variances."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention import sampled_attention
from ...attention.uncertainty import with_error_bars
from ...errors import ArgumentError, ShapeError
from ...estimates import AttentionEstimate
from ...problem import AttentionProblem
from ...samplers import Sampler
from ...samplers.base import Budget
from ...samplers.inversion_sampler import remember_layout
from ...streams import Stream, make_seed, sequence_keys
from .lens_estimates import GivenEstimate, HeadFinding, effort_text, estimate_of_head, estimate_of_rows
from .lens_maps import TILE, overview_level

MAX_POSITIONS = 1 << 20
"""Queries or keys of a head, at most."""

MAX_WHOLE_CELLS = 1 << 24
"""Queries × keys of a head up to which its whole map is computed; of larger ones only rows are."""

OVERVIEW_ROWS = 64
"""Rows, at most, by which a head too large to be computed whole is measured."""

MAX_CACHED_PARTS = 5
"""Heads, or parts of large heads, whose maps are cached."""

THUMBNAIL_CELLS = 32
"""Cells of a side of a head's thumbnail."""

MAX_VARIANCE_ROWS = 256
"""Rows of a head on which its variance is measured, at most."""

MAX_VARIANCE_CELLS = 1 << 20
"""Rows × keys of a head on which its variance is measured, at most, but for 16 rows."""

TINY = torch.finfo(torch.float32).tiny

Layer = tuple[Tensor, Tensor, Tensor]
"""q (H, L, E), k (Hkv, n, E) and v (Hkv, n, Ev)."""


@dataclass
class HeadRows:
    """Some rows of a head, all where they fit: its inputs and exact attention, and what was drawn of it last.

    Parameters
    ----------
    rows : Tensor, int64, (R,)
        Which queries they are.
    q, k, v : Tensor, (R, E), (n, E), (n, Ev)
    p : Tensor, float32, (R, n)
        Its exact attention.
    output : Tensor, (R, Ev)
        Exact.
    effective_keys : Tensor, (R,)
        exp of the entropy of each row.
    """

    rows: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor
    output: Tensor
    effective_keys: Tensor
    draws: int = 0
    """The number of draws a row of `estimate`."""
    estimate: AttentionEstimate | None = None
    """What the lens drew of it last."""
    problem: AttentionProblem | None = None
    """It as a problem, whose keys are laid out once for all draws."""

    @property
    def norm(self) -> Tensor:
        """‖o‖ of the exact output, over all rows and features."""
        return self.output.float().norm().clamp_min(TINY)

    def error(self, estimate: AttentionEstimate) -> float:
        """‖ô − o‖ / ‖o‖ of an estimate's output."""
        return float((estimate.output - self.output).float().norm() / self.norm)

    def std_error(self, estimate: AttentionEstimate) -> float | None:
        """‖σ‖ / ‖o‖ of an estimate's standard errors σ, None where they are unknown."""
        sigma = estimate.std_error
        return None if sigma is None else float(sigma.float().norm() / self.norm)

    def row_facts(self, estimate: AttentionEstimate) -> np.ndarray:
        """What is known of each row, float32 (4, R).

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
        Exact attention, the largest weight of each cell; NaN where all its keys are masked.
    variances : ndarray, float32, (H,)
        E‖ô − o‖² / ‖o‖² of each head.
    """

    maps: np.ndarray
    variances: np.ndarray


class LensHeads:
    """All heads of some layers, of which one at a time is computed and drawn.

    The draws of a head are those that `sampled_attention` makes of it when it draws the whole layer with a
    generator of the same seed.

    Parameters
    ----------
    layers : sequence of (q, k, v)
        See `checked_layers`.
    sampler : Sampler
    is_causal : bool
    scale : float, optional
        1/√E where None.
    seed : int
        Of the draws of every layer.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        sampler: Sampler,
        *,
        is_causal: bool,
        scale: float | None,
        seed: int,
    ):
        self.layers, self.sampler, self.is_causal = layers, sampler, is_causal
        self.num_heads, self.num_queries, width = layers[0][0].shape
        self.num_keys = layers[0][1].shape[-2]
        self._scale = 1 / math.sqrt(width) if scale is None else scale
        self._seed = seed
        self.given: GivenEstimate | None = None
        self.is_large = self.num_queries * self.num_keys > MAX_WHOLE_CELLS
        self._cache: OrderedDict[tuple[int, ...], HeadRows] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self._scale

    def group_of(self, head: int) -> int:
        """The key head that a query head attends to."""
        return head // (self.num_heads // self.layers[0][1].shape[0])

    def visible(self, rows: Tensor) -> Tensor:
        """Which keys each of some queries (R,) sees, bool (R, n)."""
        if not self.is_causal:
            return torch.ones(len(rows), self.num_keys, dtype=torch.bool)
        return torch.arange(self.num_keys) <= rows[:, None]

    def measured(self, layer: int, head: int) -> HeadRows:
        """The rows of a head on which its error is measured: all, or evenly spaced ones of a large map."""
        if not self.is_large:
            return self._cached((layer, head), torch.arange(self.num_queries))
        row_level = overview_level(self.num_queries, self.num_keys, OVERVIEW_ROWS).rows
        return self.band(layer, head, row_level, 0)

    def band(self, layer: int, head: int, row_level: int, tile_row: int) -> HeadRows:
        """The rows that stand for the cells of a row of tiles of a large map: the middle one of each cell."""
        first, cells = tile_row * TILE, -(-self.num_queries >> row_level)
        cell = torch.arange(first, min(first + TILE, cells))
        middle = ((cell << row_level) + ((1 << row_level) >> 1)).clamp_max(self.num_queries - 1)
        return self._cached((layer, head, row_level, tile_row), middle)

    def some_rows(self, layer: int, head: int, rows: Sequence[int]) -> HeadRows:
        """The rows of a head that are named."""
        return self._compute(layer, head, torch.tensor(list(rows), dtype=torch.int64))

    def shown(self, layer: int, head: int, part: HeadRows, num_samples: int | None) -> AttentionEstimate:
        """The estimate of rows of a head: the one that was given where `num_samples` is None, else new draws.

        Raises
        ------
        ArgumentError
            If none was given of this head.
        """
        if num_samples is not None:
            return self._draw(head, part, num_samples)
        estimate = None if self.given is None else self.given.of_head(layer, head)
        if estimate is None:
            raise ArgumentError(f"No estimate of layer {layer}, head {head} was given.")
        return estimate if len(part.rows) == self.num_queries else estimate_of_rows(estimate, part.rows)

    def finding(self, layer: int, head: int, num_samples: int | None) -> HeadFinding:
        """How wrong the output of a head is, by the estimate of it that is shown."""
        part = self.measured(layer, head)
        estimate = self.shown(layer, head, part, num_samples)
        return HeadFinding(
            layer, head, part.error(estimate), part.std_error(estimate), effort_text(estimate), len(part.rows)
        )

    def take_sampler(self, sampler: Sampler) -> None:
        """Draw by another sampler from now on."""
        with self._lock:
            self.sampler = sampler
            for part in self._cache.values():
                part.draws, part.estimate = 0, None

    def problem_of(self, part: HeadRows) -> AttentionProblem:
        """The attention of some rows of a head by itself, which then has one head."""
        whole = len(part.rows) == self.num_queries
        mask = self.visible(part.rows) if self.is_causal and not whole else None
        return AttentionProblem.of(
            part.q[None], part.k[None], part.v[None], attn_mask=mask,
            is_causal=self.is_causal and whole, scale=self._scale,
        )  # fmt: skip

    def stream(self, head: int, positions: Tensor) -> Stream:
        """The random numbers of a head's queries, as `sampled_attention` of its whole layer uses them."""
        seed = make_seed(torch.Generator().manual_seed(self._seed))
        group = torch.tensor([self.group_of(head)])
        return Stream(sequence_keys(seed, torch.tensor([0])), group, positions)

    def thumbnails(self, layer: int, num_samples: int, *, given: bool = False) -> Thumbnails:
        """The heads of a layer at a glance; variances are measured on some of the rows.

        Of heads of which an estimate was given, they are the estimate's if `given`.
        """
        q, k, v = self.layers[layer]
        group = q.shape[0] // k.shape[0]
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        most = min(MAX_VARIANCE_ROWS, max(16, MAX_VARIANCE_CELLS // self.num_keys))
        rows = torch.arange(0, self.num_queries, max(1, -(-self.num_queries // most)))
        mask = self.visible(rows) if self.is_causal else None
        q = q[:, rows]
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self._scale)
        estimate = sampled_attention(
            q, k, v, sampler=self.sampler, num_samples=num_samples, attn_mask=mask, scale=self._scale,
            generator=torch.Generator().manual_seed(self._seed),
        )  # fmt: skip
        errors = (estimate.output - exact).float()
        for head in range(self.num_heads):
            stated = self.given.of_head(layer, head) if given and self.given is not None else None
            if stated is not None:
                errors[head] = (stated.output[rows] - exact[head]).float()
        squares = errors.square().sum((-2, -1))
        variances = squares / exact.float().square().sum((-2, -1)).clamp_min(TINY)
        shown = torch.arange(0, len(rows), max(1, len(rows) // THUMBNAIL_CELLS))
        logits = (q[:, shown].float() * self._scale) @ k.float().mT
        if mask is not None:
            logits.masked_fill_(~mask[shown], -torch.inf)
        width = -(-self.num_keys // THUMBNAIL_CELLS)  # keys under a cell
        padded = F.pad(logits.softmax(-1), (0, width * -(-self.num_keys // width) - self.num_keys))
        maps = padded.unflatten(-1, (-1, width)).amax(-1)
        if self.is_causal:
            first_key = torch.arange(maps.shape[-1]) * width
            maps.masked_fill_(first_key > rows[shown][:, None], torch.nan)
        return Thumbnails(maps.numpy().astype(np.float16), variances.numpy())

    def _cached(self, key: tuple[int, ...], rows: Tensor) -> HeadRows:
        """Rows (R,) of the head whose layer and number `key` begins with; the last few parts are cached."""
        with self._lock:
            part = self._cache.get(key)
            if part is None:
                part = self._compute(key[0], key[1], rows)
                self._cache[key] = part
                while len(self._cache) > MAX_CACHED_PARTS:
                    self._cache.popitem(last=False)
            else:
                self._cache.move_to_end(key)
            return part

    def _compute(self, layer: int, head: int, rows: Tensor) -> HeadRows:
        q, k, v = self.layers[layer]
        group = q.shape[0] // k.shape[0]
        q, k, v = q[head], k[head // group], v[head // group]
        if len(rows) < self.num_queries:
            q = q[rows]
        logits = (q.float() * self._scale) @ k.float().mT  # [R, n]
        if self.is_causal:  # not by -inf, so that p · logits is finite
            logits.masked_fill_(~self.visible(rows), torch.finfo(logits.dtype).min)
        p = logits.softmax(-1)
        likeliest, key = p.max(-1, keepdim=True)
        log_sum_exp = (logits.gather(-1, key) - likeliest.log()).squeeze(-1)
        entropy = log_sum_exp - torch.linalg.vecdot(p, logits)
        return HeadRows(rows, q, k, v, p, p @ v.float(), entropy.exp())

    def _draw(self, head: int, part: HeadRows, num_samples: int) -> AttentionEstimate:
        """`num_samples` draws a row of some rows; the same arguments give the same draws."""
        with self._lock:
            if part.estimate is None or part.draws != num_samples:
                if part.problem is None:
                    part.problem = self.problem_of(part)
                    remember_layout(part.problem)
                problem, stream = part.problem, self.stream(head, part.rows)
                sampled = self.sampler.estimate_rows(problem, Budget(num_samples), stream)
                estimate = with_error_bars(sampled, problem).to_estimate(problem)
                part.draws, part.estimate = num_samples, estimate_of_head(estimate, (0,))
            return part.estimate


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
