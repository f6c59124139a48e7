"""A lens as HTML that redraws without a kernel and without a network."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ArgumentError
from ...experiments.saved_figure import compressed, picture_uri
from ...samplers import HeadTailSampler, Sampler
from ...samplers.value_order import ValueOrder
from ...theme import COLOURS
from .base import STATIC, render_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .lens_heads import LensHeads, Thumbnails

SAMPLERS_IN_PAGES = ("monte-carlo", "stratified", "systematic", "head-tail")
"""The samplers that the page has too, in TypeScript."""

MAX_LOCAL_CELLS = 1 << 20
"""Queries × keys of a head up to which a browser with a kernel draws it too, while the slider moves."""

MAX_LOCAL_KEYS = 1 << 16
"""Keys that the browser's numbers for the order of values tell apart."""

MAX_THUMBNAIL_BYTES = 200_000
"""The thumbnails of all heads are made coarser until they take no more."""

PICTURE_DPI = 80
"""Pixels an inch of the picture that stands for the lens where no script runs."""

HEAD_BYTES = 24
"""Of what names and separates a head and its keys among the others, at most."""

MAX_PICTURE_BYTES = 200_000
"""Of such a picture in each theme: those of random inputs would take more than the heads."""

PAGE_BYTES = 2000
"""What a page takes besides the pictures and the lens, at most."""


def live_html(heads: LensHeads, state: Mapping[str, Any], seed: int, max_bytes: int) -> str:
    """HTML that puts a lens that redraws in the place of the `<picture>` beside it.

    It holds q and k in float32 and v in float16 of the shown head, then of the other heads of its layer and
    of other layers, as many as `max_bytes` allow. The page computes their logits and exponentials itself,
    which may differ from torch's in their last bits; from the same masses it draws the same keys with the
    same weights as Python, to the bit.

    Parameters
    ----------
    heads : LensHeads
    state : mapping
        The traits of the view.
    seed : int
        Of the draws.
    max_bytes : int
        Of the HTML, script included.

    Raises
    ------
    ArgumentError
        If the page does not know the sampler, or `max_bytes` do not hold the shown head.
    """
    if heads.sampler.name not in samplers_in_browser(heads.sampler):
        raise ArgumentError(_refusal(heads.sampler))
    style, script = ((STATIC / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    data: dict[str, Any] = {
        "state": {**state, "own_draws": True, "given": {}, "selected_rows": list(state["selected_rows"])},
        "scale": heads.scale,
        "seed": str(seed),
        "key": stream_key(heads),
        "thumbnails": list(_thumbnails(heads, state["num_samples"])),
        "heads": [],
        "kv": [],
    }
    size = len(_placed(style, script, data))
    places: dict[tuple[int, int], int] = {}
    for layer, head in _by_nearness(heads, state["layer"], state["head"]):
        x = inputs_for_browser(heads, layer, head)
        group = x.group
        entry: dict[str, Any] = {"layer": layer, "head": head, "group": group, "q": _text(x.q)}
        shared: dict[str, str] = {}
        if (layer, group) not in places:
            unit = float(x.v.abs().amax()) or 1.0
            shared = {
                "k": _text(x.k),
                "v": _text((x.v / unit).half()),
                "order": _text(x.order),
                "unit": str(unit),
            }
        size += sum(len(_encoded(part)) for part in (entry, shared)) + HEAD_BYTES
        if size > max_bytes:
            if not data["heads"]:
                raise ArgumentError(
                    f"max_bytes={max_bytes} is not allowed: layer {layer}, head {head} with the script takes "
                    f"{size} bytes."
                )
            break
        if shared:
            places[layer, group] = len(data["kv"])
            data["kv"].append(shared)
        data["heads"].append({**entry, "kv": places[layer, group]})
    return _placed(style, script, data)


def _encoded(data: Any) -> str:
    """JSON that may stand inside of a script element."""
    return json.dumps(data).replace("<", "\\u003c")


def _placed(style: str, script: str, data: Mapping[str, Any]) -> str:
    """The HTML of a lens that redraws, with its data."""
    return (
        f'<div class="qtx-page"><style>{style}</style>'
        f'<script type="application/json">{_encoded(data)}</script></div>\n'
        f'<script type="module">{script}</script>'
    )


def page_html(title: str, figure: Callable[[str], Figure], live: Callable[[int], str], max_bytes: int) -> str:
    """A page of its own, with the figure in both themes.

    Where scripts run, `live(max_bytes)` of `live_html` takes the figure's place.
    """
    pictures = {}
    for theme in ("light", "dark"):
        picture = render_figure(figure, "png", theme, PICTURE_DPI)
        pictures[theme] = picture_uri(compressed(picture, MAX_PICTURE_BYTES))
    colours = {theme: f"color: {c['text']}; background: {c['background']};" for theme, c in COLOURS.items()}
    title = html.escape(title)
    inside = live(max_bytes - sum(map(len, pictures.values())) - PAGE_BYTES)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · qtx_lab</title>
<link rel="icon" href="data:,">
<style>
body {{ margin: 1rem; font-family: system-ui, sans-serif; {colours["light"]} }}
@media (prefers-color-scheme: dark) {{ body {{ {colours["dark"]} }} }}
picture, img {{ display: block; max-width: 100%; height: auto; }}
[hidden] {{ display: none; }}
</style>
</head>
<body>
<main>
<picture>
<source media="(prefers-color-scheme: dark)" srcset="{pictures["dark"]}">
<img src="{pictures["light"]}" alt="{title}">
</picture>
{inside}
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class BrowserInputs:
    """What a browser needs of a head to draw it itself.

    Parameters
    ----------
    group : int
        Its key head.
    q, k, v : Tensor, float32, (L, E), (n, E), (n, Ev)
    order : Tensor, uint16, (n,)
        The keys in the order of their values.
    """

    group: int
    q: Tensor
    k: Tensor
    v: Tensor
    order: Tensor

    def buffers(self) -> list[bytes]:
        """q, k, v and the order, little-endian."""
        return [little_endian(x) for x in (self.q, self.k, self.v, self.order)]


def inputs_for_browser(heads: LensHeads, layer: int, head: int) -> BrowserInputs:
    """What a browser needs of a head to draw it itself."""
    q, k, v = heads.layers[layer]
    group = heads.group_of(head)
    values = v[group].float()
    order = ValueOrder.fit(values[None]).order(values[None])[0].to(torch.uint16)
    return BrowserInputs(group, q[head].float(), k[group].float(), values, order)


def samplers_in_browser(current: Sampler) -> tuple[str, ...]:
    """The samplers by which a browser draws as the lens does; `current` may have options of its own."""
    plain = not isinstance(current, HeadTailSampler) or current.head == "optimal"
    return tuple(name for name in SAMPLERS_IN_PAGES if plain or name != current.name)


def stream_key(heads: LensHeads) -> str:
    """The Philox key of the sequence, 16 hexadecimal digits."""
    return f"{int(heads.stream(0, torch.arange(1)).keys) & 0xFFFFFFFFFFFFFFFF:016x}"


def _refusal(sampler: Sampler) -> str:
    options = f"(head={sampler.head!r})" if isinstance(sampler, HeadTailSampler) else ""
    return (
        f"sampler={sampler.name!r}{options} is not allowed in a page without a kernel, which draws by "
        f"{', '.join(SAMPLERS_IN_PAGES)}."
    )


def _by_nearness(heads: LensHeads, layer: int, head: int) -> Iterator[tuple[int, int]]:
    """All heads: the shown one, those of its group, of its layer, and those of other layers."""
    group = heads.num_heads // heads.layers[0][1].shape[0]
    every = [(i, j) for i in range(len(heads.layers)) for j in range(heads.num_heads)]
    yield from sorted(
        every, key=lambda x: (x != (layer, head), abs(x[0] - layer), x[1] // group != head // group)
    )


def _thumbnails(heads: LensHeads, num_samples: int) -> Iterator[dict[str, Any]]:
    """What the browser takes of each layer's thumbnails."""
    layers: list[Thumbnails] = [heads.thumbnails(layer, num_samples) for layer in range(len(heads.layers))]
    step = 1
    while sum(layer.maps.nbytes for layer in layers) > MAX_THUMBNAIL_BYTES * step**2:
        step *= 2
    for layer in layers:
        _, rows, columns = layer.maps.shape
        starts = [np.arange(0, size, step) for size in (rows, columns)]
        coarse = np.fmax.reduceat(np.fmax.reduceat(layer.maps, starts[0], axis=1), starts[1], axis=2)
        yield {
            "rows": coarse.shape[1],
            "columns": coarse.shape[2],
            "variances": _text(torch.from_numpy(layer.variances)),
            "maps": _text(torch.from_numpy(coarse)),
        }


def little_endian(x: Tensor) -> bytes:
    """The numbers of a tensor, one after the other."""
    array = x.contiguous().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _text(x: Tensor) -> str:
    """The bytes of a tensor in base64."""
    return base64.b64encode(little_endian(x)).decode()
