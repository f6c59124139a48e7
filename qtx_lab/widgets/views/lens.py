"""`AttentionLens`: exact, sampled and difference maps of a head, and which heads are hard to sample."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
import traitlets
from torch import Tensor

from ...attention import sampled_attention
from ...checks import check_count
from ...errors import ArgumentError, ShapeError
from ...estimates import AttentionEstimate
from ...experiments.attention_maps import attention_panels, draw_attention_maps
from ...problem import check_inputs
from ...samplers import Sampler, make_sampler
from .base import View

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MOST_POSITIONS = 4096
"""Queries or keys of a head at most."""

TILE = 256
"""Cells of a side of what is sent at a time."""

THUMBNAIL = 32
"""Cells of a side of a head's thumbnail."""

MAX_LABELLED_KEYS = 48
"""Keys of a head up to which a figure names each by its token."""

KEPT_HEADS = 4
"""Heads whose maps are kept."""

THUMBNAIL_ROWS = 256
"""Rows of a head that its variance is measured on, at most."""


@dataclass
class _Head:
    """A head's inputs and exact map, and what was last drawn from it."""

    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor  # (L, n), float32
    output: Tensor  # (L, Ev), exact
    effective_keys: Tensor  # (L,), exp of the entropy
    levels: dict[int, np.ndarray] = field(default_factory=dict)  # level -> float16 map
    drawn: tuple[int, AttentionEstimate] | None = None


class AttentionLens(View):
    """Exact, sampled and difference maps of each head side by side; rows can be brushed and taken away.

    The maps share axes, zoom and hover. Moving the slider draws anew, with the same seed; the heads' thumbnails are
    coloured by their relative variance E‖ô − o‖² / ‖o‖². Maps of up to 4,096 × 4,096 are sent in tiles, as they are
    looked at; zoomed out, a cell is the mean of those under it.

    Parameters
    ----------
    q, k, v : Tensor, or a sequence of Tensors, one a layer
        (L, E), (H, L, E) or (1, H, L, E), shaped as for `sampled_attention`; k and v may have fewer heads, of which
        H is a multiple (grouped queries). At most 4,096 queries and keys.
    tokens : str or sequence of str, optional
        What stands at each key, shown on the axes: one character or one string a key.
    sampler : str or Sampler
        As for `sampled_attention`.
    num_samples : int
        Draws of a row to begin with.
    is_causal : bool
    scale : float, optional
    seed : int
        Of the draws of every head.
    estimate : AttentionEstimate, optional
        Of the first layer: shown where its draws are asked for, in place of drawing anew.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError
        Inputs that `sampled_attention` would refuse; a batch; too many positions; not one token a key.

    Examples
    --------
    >>> import torch
    >>> q, k, v = torch.randn(3, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    >>> lens = AttentionLens(q, k, v, tokens="a little text...", num_samples=8)
    >>> lens.selected_rows = [3, 4]
    >>> lens.rows().shape
    torch.Size([2, 16])
    """

    tokens = traitlets.List(traitlets.Unicode(), read_only=True).tag(sync=True)
    layers = traitlets.Int(read_only=True).tag(sync=True)
    heads = traitlets.Int(read_only=True).tag(sync=True)
    num_queries = traitlets.Int(read_only=True).tag(sync=True)
    num_keys = traitlets.Int(read_only=True).tag(sync=True)
    is_causal = traitlets.Bool(read_only=True).tag(sync=True)
    sampler = traitlets.Unicode(read_only=True).tag(sync=True)
    draw_counts = traitlets.List(traitlets.Int(), read_only=True).tag(sync=True)
    """The stops of the slider."""
    layer = traitlets.Int(0).tag(sync=True)
    head = traitlets.Int(0).tag(sync=True)
    num_samples = traitlets.Int(64).tag(sync=True)
    selected_rows = traitlets.List(traitlets.Int()).tag(sync=True)
    """Queries that were brushed, in rising order."""
    log_scale = traitlets.Bool(True).tag(sync=True)

    def __init__(
        self,
        q: Tensor | Sequence[Tensor],
        k: Tensor | Sequence[Tensor],
        v: Tensor | Sequence[Tensor],
        *,
        tokens: str | Sequence[str] | None = None,
        sampler: str | Sampler = "systematic",
        num_samples: int = 64,
        is_causal: bool = False,
        scale: float | None = None,
        seed: int = 0,
        layer: int = 0,
        head: int = 0,
        estimate: AttentionEstimate | None = None,
    ):
        self._layers, shape = _checked(q, k, v, is_causal, scale)
        heads, length, _ = shape
        n = self._layers[0][1].shape[-2]
        self._sampler = make_sampler(sampler)
        check_count("num_samples", num_samples)
        if tokens is not None and len(tokens) != n:
            raise ShapeError(f"tokens has {len(tokens)} entries; there are {n} keys, and each needs one.")
        if estimate is not None and tuple(estimate.output.shape[-3:-1]) not in ((heads, length), (length,)):
            raise ShapeError(
                f"estimate.output has shape {tuple(estimate.output.shape)}; it must be of {heads} heads × {length} queries."
            )
        self._scale, self._seed, self._estimate = scale, int(seed), estimate
        self._kept: OrderedDict[tuple[int, int], _Head] = OrderedDict()
        self._turn = threading.RLock()
        top = max(2 * n, num_samples, 16)
        counts = {round(2 ** (i / 4)) for i in range(4 * math.ceil(math.log2(top)) + 1)} | {num_samples}
        super().__init__("lens", layer=layer, head=head, num_samples=int(num_samples))
        for name, value in {
            "tokens": list(tokens or ()),
            "layers": len(self._layers),
            "heads": heads,
            "num_queries": length,
            "num_keys": n,
            "is_causal": bool(is_causal),
            "sampler": self._sampler.name,
            "draw_counts": sorted(count for count in counts if count <= top),
        }.items():
            self.set_trait(name, value)
        self._check_head(self.layer, self.head)

    @traitlets.validate("layer", "head", "num_samples")
    def _check_counts(self, proposal: Any) -> int:
        name, value = proposal["trait"].name, proposal["value"]
        if name == "num_samples":
            check_count(name, value)
        else:
            size = len(self._layers) if name == "layer" else self._layers[0][0].shape[0]
            if not 0 <= value < size:
                raise ArgumentError(f"{name}={value} is not allowed: it must be in 0..{size - 1}.")
        return int(value)

    @traitlets.validate("selected_rows")
    def _check_rows(self, proposal: Any) -> list[int]:
        length = self._layers[0][0].shape[-2]
        outside = [row for row in proposal["value"] if not 0 <= row < length]
        if outside:
            raise ArgumentError(
                f"selected_rows holds {outside[0]}, which is not allowed: rows are 0..{length - 1}."
            )
        return sorted(set(proposal["value"]))

    def rows(self) -> Tensor:
        """The exact attention rows that are selected, of the head that is shown: (R, n), float32."""
        return self._get_head(self.layer, self.head).p[list(self.selected_rows)]

    def frame(self) -> pd.DataFrame:
        """Every visible cell of the shown head: `query`, `key`, `exact`, `sampled`."""
        import pandas as pd

        head = self._get_head(self.layer, self.head)
        sampled = self._draw(self.layer, self.head, self.num_samples).attention_weights()
        visible = self._visible().nonzero(as_tuple=True)
        query, key = (x.numpy() for x in visible)
        return pd.DataFrame(
            {
                "query": query,
                "key": key,
                "exact": head.p[visible].numpy(),
                "sampled": sampled[visible].numpy(),
            }
        )

    def figure(self, theme: str = "light") -> Figure:
        """The three maps of the shown head."""
        head = self._get_head(self.layer, self.head)
        estimate = self._draw(self.layer, self.head, self.num_samples)
        level = _overview(self.num_queries, self.num_keys, 512)
        exact = self._level(head, level).astype(np.float32)
        sampled = _pool_draws(estimate, level, (0, exact.shape[0]), (0, exact.shape[1]), head.p.shape)
        visible = _pool(self._visible().float().numpy(), level) > 0
        error = _relative(estimate.output - head.output, head.output)
        panels = attention_panels(
            exact, sampled, sampler=self.sampler, visible=visible, log_scale=self.log_scale
        )
        return draw_attention_maps(
            panels,
            theme,
            title=f"Layer {self.layer}, head {self.head}: {self.num_samples} {self.sampler} draws a row are off by "
            f"{error:.2g} of the output  (n = {self.num_keys}, seed {self._seed})",
            extent=(-0.5, self.num_keys - 0.5, self.num_queries - 0.5, -0.5),
            tokens=self.tokens
            if self.tokens and self.num_keys == self.num_queries <= MAX_LABELLED_KEYS
            else None,
        )

    def _visible(self) -> Tensor:
        shape = (self.num_queries, self.num_keys)
        return torch.ones(shape, dtype=torch.bool).tril() if self.is_causal else torch.ones(shape).bool()

    def _check_head(self, layer: int, head: int) -> None:
        if not (0 <= layer < self.layers and 0 <= head < self.heads):
            raise ArgumentError(
                f"layer={layer}, head={head} is not allowed: there are {self.layers} layers × {self.heads} heads."
            )

    def _get_head(self, layer: int, head: int) -> _Head:
        with self._turn:
            if (layer, head) not in self._kept:
                self._kept[layer, head] = self._make_head(layer, head)
                while len(self._kept) > KEPT_HEADS:
                    self._kept.popitem(last=False)
            return self._kept[layer, head]

    def _make_head(self, layer: int, head: int) -> _Head:
        q, k, v = self._layers[layer]
        group = q.shape[0] // k.shape[0]
        q, k, v = q[head], k[head // group], v[head // group]
        scale = 1 / math.sqrt(q.shape[-1]) if self._scale is None else self._scale
        logits = (q.float() * scale) @ k.float().mT  # [L, n]
        if self.is_causal:
            logits.masked_fill_(~self._visible(), -torch.inf)
        p = logits.softmax(-1)
        return _Head(q, k, v, p, p @ v.float(), torch.special.entr(p).sum(-1).exp())

    def _draw(self, layer: int, head: int, num_samples: int) -> AttentionEstimate:
        kept = self._get_head(layer, head)
        with self._turn:
            if kept.drawn is not None and kept.drawn[0] == num_samples:
                return kept.drawn[1]
            estimate = self._given(layer, head, num_samples)
            if estimate is None:
                generator = torch.Generator().manual_seed(self._seed + 1_000_003 * layer + 1_009 * head)
                estimate = sampled_attention(
                    kept.q, kept.k, kept.v, sampler=self._sampler, num_samples=num_samples,
                    is_causal=self.is_causal, scale=self._scale, generator=generator,
                )  # fmt: skip
            kept.drawn = (num_samples, estimate)
            return estimate

    def _given(self, layer: int, head: int, num_samples: int) -> AttentionEstimate | None:
        """The head of the estimate that was handed in, where that is asked for."""
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

    def _level(self, head: _Head, level: int) -> np.ndarray:
        if level not in head.levels:
            head.levels[level] = _pool(head.p.numpy(), level).astype(np.float16)
        return head.levels[level]

    def _on_message(self, content: Mapping[str, Any]) -> None:
        if content["kind"] == "maps":
            self._worker.put(f"maps {content.get('view')}", partial(self._send_maps, dict(content)))
        elif content["kind"] == "thumbnails":
            self._worker.put("thumbnails", partial(self._send_thumbnails, int(content["draws"]), 0), rank=2)

    def _send_maps(self, asked: dict[str, Any]) -> None:
        """Tiles of the exact and the sampled map, and what is known of each row."""
        layer, head_index, draws = int(asked["layer"]), int(asked["head"]), int(asked["draws"])
        level = int(asked["level"])
        self._check_head(layer, head_index)
        head = self._get_head(layer, head_index)
        estimate = self._draw(layer, head_index, draws)
        exact = self._level(head, level)
        tiles: list[dict[str, Any]] = []
        buffers: list[bytes] = []

        def add(name: str, i: int, j: int, tile: np.ndarray) -> None:
            tiles.append({"map": name, "i": i, "j": j, "rows": tile.shape[0], "columns": tile.shape[1]})
            buffers.append(np.ascontiguousarray(tile, dtype=np.float16).tobytes())

        for i, j in asked["exact"]:
            add("exact", i, j, exact[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE])
        if asked["sampled"]:
            at = np.array(asked["sampled"])
            (i0, j0), (i1, j1) = at.min(0) * TILE, (at.max(0) + 1) * TILE
            shape = (min(i1, exact.shape[0]), min(j1, exact.shape[1]))
            block = _pool_draws(estimate, level, (i0, shape[0]), (j0, shape[1]), head.p.shape)
            for i, j in asked["sampled"]:
                add("sampled", i, j, block[i * TILE - i0 :, j * TILE - j0 :][:TILE, :TILE])
        buffers.append(self._row_facts(head, estimate).tobytes())
        reply = {name: asked[name] for name in ("view", "seq", "layer", "head", "draws", "level")}
        self.send({"kind": "maps", **reply, "tiles": tiles, **self._summary(head, estimate)}, buffers)

    def _summary(self, head: _Head, estimate: AttentionEstimate) -> dict[str, Any]:
        return {
            "error": _relative(estimate.output - head.output, head.output),
            "fallbacks": list(estimate.info.fallbacks),
        }

    def _row_facts(self, head: _Head, estimate: AttentionEstimate) -> np.ndarray:
        """Of each row, float32 (4, L): effective keys exp(entropy), distinct keys drawn, ‖ô − o‖ / ‖o‖, and its standard
        error ‖σ‖ / ‖o‖ (NaN where it is not known)."""
        norm = head.output.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        off = (estimate.output.float() - head.output).norm(dim=-1) / norm
        error = estimate.std_error
        told = torch.full_like(off, torch.nan) if error is None else error.float().norm(dim=-1) / norm
        return torch.stack((head.effective_keys, estimate.keys_touched().float(), off, told)).float().numpy()

    def _send_thumbnails(self, draws: int, layer: int) -> None:
        """A layer's thumbnails and variances; then the next layer's, after whatever is more urgent."""
        q, k, v = self._layers[layer]
        heads, length, _ = q.shape
        n = k.shape[-2]
        group = heads // k.shape[0]
        at = torch.arange(0, length, max(1, -(-length // THUMBNAIL_ROWS)))
        mask = self._visible()[at] if self.is_causal else None
        q = q[:, at]
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self._scale)
        generator = torch.Generator().manual_seed(self._seed)
        estimate = sampled_attention(
            q, k, v, sampler=self._sampler, num_samples=draws, attn_mask=mask, scale=self._scale,
            generator=generator,
        )  # fmt: skip
        off = (estimate.output - exact).float().square().sum((-2, -1))
        variance = off / exact.float().square().sum((-2, -1)).clamp_min(torch.finfo(torch.float32).tiny)
        scale = 1 / math.sqrt(q.shape[-1]) if self._scale is None else self._scale
        few = torch.arange(0, len(at), max(1, len(at) // THUMBNAIL))
        logits = (q[:, few].float() * scale) @ k.float().mT
        if mask is not None:
            logits.masked_fill_(~mask[few], -torch.inf)
        step = -(-n // THUMBNAIL)
        p = F.pad(logits.softmax(-1), (0, step * -(-n // step) - n)).unflatten(-1, (-1, step)).amax(-1)
        facts = {"layer": layer, "draws": draws, "rows": p.shape[1], "columns": p.shape[2]}
        buffers = [variance.numpy().tobytes(), p.numpy().astype(np.float16).tobytes()]
        self.send({"kind": "thumbnails", **facts}, buffers)
        if layer + 1 < self.layers:
            self._worker.put("thumbnails", partial(self._send_thumbnails, draws, layer + 1), rank=2)


def _relative(off: Tensor, output: Tensor) -> float:
    return float(off.float().norm() / output.float().norm().clamp_min(torch.finfo(torch.float32).tiny))


def _overview(rows: int, columns: int, cells: int) -> int:
    """The least level at which a map has at most so many cells a side."""
    return max(0, math.ceil(math.log2(max(rows, columns) / cells)))


def _cells(count: int, level: int) -> np.ndarray:
    """How many positions lie under each cell of a level."""
    side = 1 << level
    starts = np.arange(0, count, side)
    return np.minimum(side, count - starts)


def _pool(x: np.ndarray, level: int) -> np.ndarray:
    """The means of x (L, n) over the cells of a level."""
    if level == 0:
        return x
    starts = [np.arange(0, size, 1 << level) for size in x.shape]
    sums = np.add.reduceat(np.add.reduceat(x, starts[0], axis=0), starts[1], axis=1)
    return sums / np.outer(_cells(x.shape[0], level), _cells(x.shape[1], level))


def _pool_draws(
    estimate: AttentionEstimate,
    level: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    shape: Sequence[int],
) -> np.ndarray:
    """The same of the estimated weights, on a part of the level's cells, without forming all of them."""
    (r0, r1), (c0, c1) = rows, columns
    part = slice(r0 << level, min(r1 << level, shape[0]))
    keys = estimate.draws.indices[part].numpy() >> level
    weights = estimate.draws.weights[part].numpy()
    row = np.broadcast_to((np.arange(part.start, part.stop) >> level)[:, None], keys.shape)
    inside = (keys >= c0) & (keys < c1)
    cell = (row[inside] - r0) * (c1 - c0) + (keys[inside] - c0)
    sums = np.bincount(cell, weights[inside], (r1 - r0) * (c1 - c0)).reshape(r1 - r0, c1 - c0)
    return sums / np.outer(_cells(shape[0], level)[r0:r1], _cells(shape[1], level)[c0:c1])


def _checked(
    q: Any, k: Any, v: Any, is_causal: bool, scale: float | None
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], torch.Size]:
    """(q, k, v) of every layer, each (heads, positions, features), and q's shape."""
    stacks = [[x] if isinstance(x, Tensor) else list(x) for x in (q, k, v)]
    if not stacks[0] or len({len(stack) for stack in stacks}) > 1:
        raise ShapeError(
            f"q, k, v have {[len(stack) for stack in stacks]} layers; each needs as many, at least one."
        )
    layers = []
    for number, inputs in enumerate(zip(*stacks, strict=True)):
        for name, x in zip("qkv", inputs, strict=True):
            if isinstance(x, Tensor) and (
                x.ndim not in (2, 3, 4) or (x.ndim == 4 and x.shape[0] != 1) or 0 in x.shape
            ):
                raise ShapeError(
                    f"{name} has shape {tuple(x.shape)}; it must be (L, E), (H, L, E) or (1, H, L, E), one text at a time, "
                    "and not empty."
                )
        queries, keys, values = (
            x.detach().cpu().reshape(-1, *x.shape[-2:]) if isinstance(x, Tensor) else x for x in inputs
        )
        check_inputs(queries, keys, values, None, is_causal, scale, True)
        if max(queries.shape[-2], keys.shape[-2]) > MOST_POSITIONS:
            raise ShapeError(
                f"q has {queries.shape[-2]} queries, k {keys.shape[-2]} keys; 1 to {MOST_POSITIONS} can be shown."
            )
        layers.append((queries, keys, values))
        if queries.shape != layers[0][0].shape or keys.shape != layers[0][1].shape:
            raise ShapeError(f"Layer {number} has another shape than layer 0; all layers must have the same.")
    return layers, layers[0][0].shape
