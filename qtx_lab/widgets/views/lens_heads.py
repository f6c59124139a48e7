"""The heads behind an `AttentionLens`: their exact attention, what is drawn of them, and their variances."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention import sampled_attention
from ...attention.error_bars import with_error_bars
from ...errors import ArgumentError, ShapeError
from ...estimates import AttentionEstimate
from ...problem import AttentionProblem
from ...samplers import Sampler
from ...samplers.base import Budget
from ...streams import Stream, make_seed, sequence_keys
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
    """The number of draws a row of `estimate`."""
    estimate: AttentionEstimate | None = None
    """What the lens drew of this head last."""

    def map_at(self, level: int) -> np.ndarray:
        """The exact map at a level, float16; see `pool_map`."""
        if level not in self.levels:
            self.levels[level] = pool_map(self.p.numpy(), level).astype(np.float16)
        return self.levels[level]

    def error(self, estimate: AttentionEstimate) -> float:
        """‖ô − o‖ / ‖o‖ of an estimate's output."""
        return float((estimate.output - self.output).float().norm() / self.norm)

    def std_error(self, estimate: AttentionEstimate) -> float | None:
        """‖σ‖ / ‖o‖ of an estimate's standard errors σ, None where they are unknown."""
        sigma = estimate.std_error
        return None if sigma is None else float(sigma.float().norm() / self.norm)

    @property
    def norm(self) -> Tensor:
        """‖o‖ of the exact output, over all rows and features."""
        return self.output.float().norm().clamp_min(TINY)

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


@dataclass(frozen=True)
class GivenEstimate:
    """An estimate that was made elsewhere, and the heads that it is of.

    Parameters
    ----------
    number : int
        Which of those that were given it is, counted from 1.
    estimate : AttentionEstimate
        Its output is (H, L, Ev) or (1, H, L, Ev), or (L, Ev) of a single head.
    layer : int
    head : int, optional
        The head that it is of; all heads of the layer where None.
    """

    number: int
    estimate: AttentionEstimate
    layer: int
    head: int | None

    def covers(self, layer: int, head: int) -> bool:
        """Whether it is of this head."""
        return layer == self.layer and self.head in (None, head)

    def of_head(self, layer: int, head: int) -> AttentionEstimate | None:
        """The part of the estimate that is of one head, (L, Ev); None where it is of other heads."""
        if not self.covers(layer, head):
            return None
        estimate = self.estimate
        leading = estimate.output.shape[:-2]
        index = head if leading and leading[-1] > 1 else 0
        return estimate_of_head(estimate, (*(0,) * (len(leading) - 1), index) if leading else ())


@dataclass(frozen=True)
class HeadFinding:
    """How wrong the output of a head is.

    Parameters
    ----------
    layer, head : int
    error : float
        ‖ô − o‖ / ‖o‖, over all rows and features.
    std_error : float, optional
        ‖σ‖ / ‖o‖ of the standard errors σ: the size of the error that the draws predict. None where unknown.
    effort : str
        How the estimate was made, in words.
    """

    layer: int
    head: int
    error: float
    std_error: float | None
    effort: str

    @property
    def text(self) -> str:
        """The finding in words.

        >>> HeadFinding(3, 2, 0.0283, 0.0291, "systematic, 64 draws a row").text
        "Layer 3, head 2: off by 2.8 % of the output's norm (standard error ± 2.9 %)"
        """
        predicted = "" if self.std_error is None else f" (standard error ± {percent_text(self.std_error)})"
        error = f"off by {percent_text(self.error)} of the output's norm"
        return f"Layer {self.layer}, head {self.head}: {error}{predicted}"


def estimate_of_head(estimate: AttentionEstimate, head: tuple[int, ...]) -> AttentionEstimate:
    """The part of an estimate that is of the head at an index of its leading dimensions, output (L, Ev)."""
    if not head:
        return estimate
    parts, rows = tuple(slice(i, i + 1) for i in head), tuple(estimate.output.shape[-2:-1])
    sigma, per_row = estimate.std_error, estimate.info.draws_per_row
    info = replace(estimate.info, draws_per_row=per_row[head] if isinstance(per_row, Tensor) else per_row)
    return AttentionEstimate(
        estimate.output[head], estimate.num_keys, estimate.degrees_of_freedom,
        lambda: estimate.draws[parts].view(rows), None if sigma is None else lambda: sigma[head], info,
    )  # fmt: skip


def percent_text(share: float) -> str:
    """A share of 1 as a percentage in two significant digits.

    >>> percent_text(0.02834), percent_text(1.234), percent_text(3e-6), percent_text(0.0)
    ('2.8 %', '123 %', 'less than 0.01 %', '0 %')
    """
    if share == 0:
        return "0 %"
    if share < 1e-4:
        return "less than 0.01 %"
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def effort_text(estimate: AttentionEstimate) -> str:
    """How an estimate of a head was made, in words: its sampler, its draws, and what corrects it.

    >>> q, k, v = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
    >>> effort_text(sampled_attention(q, k, v, num_samples=8, replicates=2))
    'systematic, 8 draws a row × 2 replicates'
    """
    info = estimate.info
    per_row = info.draws_per_row
    mean = float(per_row.double().mean()) if isinstance(per_row, Tensor) else per_row
    if info.num_samples is not None:
        draws = f"{info.num_samples} draw{'s' * (info.num_samples != 1)} a row"
        draws += f" × {info.replicates} replicates" * (info.replicates > 1)
    else:
        draws = "draws by tolerance" if mean is None else f"{mean:.0f} draws a row on average"
    words = [info.sampler, draws]
    if info.tolerance is not None:
        words.append(f"tolerance {info.tolerance:g} at confidence {info.confidence:g}")
    if info.control_variate is not None:
        words.append(f"corrected by {', '.join(info.control_variate.costs)}")
    return ", ".join(words)


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
        self._cache: OrderedDict[tuple[int, int], Head] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self._scale

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
            if drawn.estimate is None or drawn.draws != num_samples:
                problem = AttentionProblem.of(
                    drawn.q[None], drawn.k[None], drawn.v[None], is_causal=self.is_causal, scale=self._scale
                )
                stream = self._stream(head, torch.arange(self.num_queries))
                sampled = self.sampler.estimate_rows(problem, Budget(num_samples), stream)
                estimate = with_error_bars(sampled, problem).to_estimate(problem)
                drawn.draws, drawn.estimate = num_samples, estimate_of_head(estimate, (0,))
            return drawn.estimate

    def shown(self, layer: int, head: int, num_samples: int | None) -> AttentionEstimate:
        """The estimate of a head: the one that was given where `num_samples` is None, else new draws.

        Raises
        ------
        ArgumentError
            If none was given of this head.
        """
        if num_samples is not None:
            return self.draw(layer, head, num_samples)
        estimate = None if self.given is None else self.given.of_head(layer, head)
        if estimate is None:
            raise ArgumentError(f"No estimate of layer {layer}, head {head} was given.")
        return estimate

    def take_sampler(self, sampler: Sampler) -> None:
        """Draw by another sampler from now on."""
        with self._lock:
            self.sampler = sampler
            for head in self._cache.values():
                head.draws, head.estimate = 0, None

    def _stream(self, head: int, positions: Tensor) -> Stream:
        """The random numbers of a head's queries, as `sampled_attention` of its whole layer uses them."""
        seed = make_seed(torch.Generator().manual_seed(self._seed))
        group = head // (self.num_heads // self.layers[0][1].shape[0])
        return Stream(sequence_keys(seed, torch.tensor([0])), torch.tensor([group]), positions)

    def thumbnails(self, layer: int, num_samples: int, *, given: bool = False) -> Thumbnails:
        """The heads of a layer at a glance; variances are measured on some of the rows.

        Of heads of which an estimate was given, they are the estimate's if `given`.
        """
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
