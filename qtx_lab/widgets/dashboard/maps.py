"""One head of a language model, exact and sampled, as maps that follow a slider of draws."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import datashader
import holoviews as hv
import numpy as np
import torch
import xarray
from bokeh.models import FixedTicker
from matplotlib import colormaps
from matplotlib.colors import to_hex

from ... import theme as look
from ...attention import sampled_attention
from ...experiments.attention_maps import attention_panels
from ...models.base import LanguageModel
from ...models.download import models_home
from ...models.language_model import REFERENCE, language_models, load_language_model
from ...models.text import reference_text
from ...samplers import SAMPLERS
from .figures import axes

SAMPLER_NAMES = [name for name in SAMPLERS if name not in ("exact", "learned")]  # learned needs fitting first
LENGTHS = (128, 256, 512, 1024)
SIDE = 240
"""Pixels of a side of a map, as Datashader draws it, before the browser has said how large the map is."""
MAX_SIDE = 640
"""Pixels of a side of a map, at most."""
SHAPE = 0.83
"""Width over height of a map with its axes and its colour bar, so that the map itself is nearly square."""
DIFFERENCE_LIMIT = 0.02
"""Larger differences of weights have the deepest colours, so that the scale stays while draws change."""


@dataclass(frozen=True)
class Maps:
    """One head: weights (L, L), float32, NaN where masked, and the errors of the sample."""

    exact: np.ndarray
    sampled: np.ndarray
    distance: float
    """Total variation of a row from the exact one, mean over rows."""
    error: float
    """‖ô − o‖ / ‖o‖ of the head's output."""


def models() -> list[str]:
    """The language models that this machine has, by name: those of the registry only if they were fetched."""
    return [name for name in language_models() if name == REFERENCE or (models_home() / name).is_dir()]


@lru_cache(maxsize=2)
def model_called(name: str) -> LanguageModel:
    """The model of that name."""
    return load_language_model(name)


@lru_cache(maxsize=len(LENGTHS))
def _layers(model: str, length: int) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]:
    tokens = model_called(model).encode(reference_text())[None, :length]
    return tuple(model_called(model).attention_inputs(tokens))


@lru_cache(maxsize=24)
def _exact(model: str, length: int, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = _one_head(model, length, layer, head)
    estimate = sampled_attention(q, k, v, sampler="exact", is_causal=True)
    return estimate.output, estimate.attention_weights()


def _one_head(model: str, length: int, layer: int, head: int) -> tuple[torch.Tensor, ...]:
    q, k, v = _layers(model, length)[layer]
    group = q.shape[1] // k.shape[1]
    return q[0, head], k[0, head // group], v[0, head // group]


def _visible(weights: torch.Tensor) -> np.ndarray:
    future = torch.ones_like(weights, dtype=torch.bool).triu(1)
    return weights.masked_fill(future, torch.nan).numpy()


@lru_cache(maxsize=64)
def attention_maps(
    model: str, length: int, layer: int, head: int, sampler: str, draws: int, seed: int = 0
) -> Maps:
    """The maps of one head for the beginning of the held-out text; the same arguments give the same draws."""
    output, exact = _exact(model, length, layer, head)
    q, k, v = _one_head(model, length, layer, head)
    g = torch.Generator().manual_seed(seed)
    estimate = sampled_attention(q, k, v, sampler=sampler, num_samples=draws, is_causal=True, generator=g)
    weights = estimate.attention_weights()
    return Maps(
        _visible(exact),
        _visible(weights),
        float(0.5 * (weights - exact).abs().sum(-1).mean()),
        float((estimate.output - output).norm() / output.norm()),
    )


def _pixels(
    data: np.ndarray, x_range: Any = None, y_range: Any = None, side: int = SIDE
) -> tuple[np.ndarray, tuple[float, ...]]:
    """A part of a map as side² pixels, each the mean of the cells under it, and the part's bounds."""
    end = len(data) - 0.5
    (left, right), (low, high) = x_range or (-0.5, end), y_range or (-0.5, end)
    places = np.arange(len(data))
    cells = xarray.DataArray(data, coords={"query": places, "key": places}, dims=("query", "key"))
    seen = datashader.Canvas(side, side, (left, right), (low, high)).raster(cells, agg="mean").data
    return seen[::-1].astype(np.float32), (left, low, right, high)


def _image(
    data: np.ndarray, x_range: Any, y_range: Any, width: int | None, height: int | None,
    scale: float, *, like: hv.Image, least: float,
) -> hv.Image:  # fmt: skip
    """A part of a map as a copy of `like`, so that its options are not worked out anew at every move.

    `width` is that of the map in the browser, in pixels; None before it is known.
    """
    seen, bounds = _pixels(data, x_range, y_range, min(MAX_SIDE, max(SIDE, width or SIDE)))
    return like.clone(np.maximum(seen, least), bounds=bounds)


@dataclass(frozen=True)
class Canvas:
    """The three maps of a head, which share axes and zoom; sending to a pipe repaints its map."""

    pictures: tuple[hv.DynamicMap, ...]
    exact: hv.streams.Pipe
    sampled: hv.streams.Pipe
    difference: hv.streams.Pipe

    def show(self, maps: Maps, *, exact: bool) -> None:
        """Repaint the maps; the exact one only if `exact`."""
        if exact:
            self.exact.send(maps.exact)
        self.sampled.send(maps.sampled)
        self.difference.send(maps.sampled - maps.exact)


def canvas(maps: Maps, theme: str) -> Canvas:
    """Exact, sampled and difference maps of one head."""
    pipes = [hv.streams.Pipe(data=x) for x in (maps.exact, maps.sampled, maps.sampled - maps.exact)]
    panels = attention_panels(maps.exact, maps.sampled, difference_limit=DIFFERENCE_LIMIT)
    pictures = []
    for pipe, panel in zip(pipes, panels, strict=True):
        options = axes(
            theme, responsive="width", aspect=SHAPE, show_grid=False,
            title=panel.title, xlabel="key", ylabel="query", invert_yaxis=True, tools=["hover"],
            toolbar="above", colorbar=True, colorbar_position="bottom", cmap=palette(panel.colours),
            logz=panel.log_scale, clim=(panel.low, panel.high), clabel=panel.label.removeprefix("attention "),
        )  # fmt: skip
        del options["height"]  # follows from the width
        if panel.log_scale:
            decades = np.arange(np.log10(panel.low).round(), np.log10(panel.high).round() + 1)
            ticks = (10**decades).tolist()
        else:
            ticks = np.linspace(panel.low, panel.high, 5).tolist()
        # Plain numbers, so that the three bars, and so the maps, are of one height.
        texts = {tick: look.digits(tick, 3) for tick in ticks}
        options["colorbar_opts"] = {"ticker": FixedTicker(ticks=ticks), "major_label_overrides": texts}
        seen, bounds = _pixels(pipe.data)
        like = hv.Image(seen, ["key", "query"], "weight", bounds=bounds).opts(**options)
        draw = partial(_image, like=like, least=panel.low if panel.log_scale else -np.inf)
        pictures.append(hv.DynamicMap(draw, streams=[pipe, hv.streams.RangeXY(), hv.streams.PlotSize()]))
    return Canvas(tuple(pictures), *pipes)


def palette(name: str) -> list[str]:
    """256 colours of one of matplotlib's maps."""
    return [to_hex(c) for c in colormaps[name](np.linspace(0, 1, 256))]


def warm_up() -> None:
    """Load the model and compile what Datashader needs, before somebody waits for it."""
    _pixels(attention_maps(REFERENCE, 512, 3, 0, "systematic", 32).sampled)
