"""`AttentionLens`: exact, sampled and difference maps of a head, and which heads are hard to sample."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import traitlets
from torch import Tensor

from ...checks import MAX_SEED, check_count
from ...errors import ArgumentError, DtypeError, ShapeError
from ...estimates import AttentionEstimate
from ...models.base import LanguageModel
from ...models.language_model import load_language_model
from ...models.text import reference_text
from ...samplers import Sampler, make_sampler
from ...storage import write_atomic
from .base import View
from .lens_estimates import GivenEstimate, HeadFinding, estimate_of_rows
from .lens_heads import OVERVIEW_ROWS, HeadRows, LensHeads, checked_layers
from .lens_maps import (
    MapLevel,
    cumulative_cells,
    exact_tiles,
    overview_level,
    pool_draws,
    pool_map,
    sampled_tiles,
)
from .lens_page import (
    MAX_LOCAL_CELLS,
    MAX_LOCAL_KEYS,
    SAMPLERS_IN_PAGES,
    inputs_for_browser,
    little_endian,
    live_html,
    page_html,
    samplers_in_browser,
    stream_key,
)
from .lens_strip import REPETITIONS, StripStep, strip_rows, strip_steps
from .lens_tokens import readable_tokens

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MAX_LABELLED_KEYS = 48
"""Keys of a head up to which a figure names each by its token."""

REQUEST_NAMES = ("view", "seq", "layer", "head", "draws", "drawing", "level", "row_level")
"""What the reply to a request for maps repeats of it; `drawing` is the browser's name of these draws."""

MAX_PAGE_BYTES = 3_000_000
"""Size of a page that redraws a lens without a kernel, at most."""

MAX_LIVE_BYTES = 1_500_000
"""Size of such a lens in a page that holds other things too, at most."""
MAX_SLIDER_DRAWS = 1 << 14
"""Draws a row, at most, at the slider's end."""

Tiles = Sequence[tuple[int, int]]

STRIP_STEP_S = 0.05
"""Seconds of measuring for the strip after which waiting requests get their turn."""

FIGURE_CELLS = 512
"""Cells of a side of a map in the figure, at most."""


class AttentionLens(View):
    """Exact, sampled and difference maps of each head side by side, with rows that can be selected.

    The maps share axes, zoom and hover. Moving the slider draws again, with the same seed; the heads'
    thumbnails are coloured by their relative variance E‖ô − o‖² / ‖o‖². Maps are sent in tiles, as they are
    looked at; zoomed out, a cell is the mean of those under it. Maps larger than 4,096 × 4,096 are never
    formed: only the tiles in view are computed. Zoomed out, a cell is then the mean over its keys of its
    middle query, and errors are measured on 64 queries.

    The lens draws what `sampled_attention` draws of the whole layer with a generator of the same seed. Where
    an `estimate` is given, everything that is shown of its heads is that estimate, with its own draws,
    sampler and corrections, until the slider moves: then the lens shows draws of its own, and says so.

    Parameters
    ----------
    q, k, v : Tensor, or a sequence of Tensors, one a layer
        (L, E), (H, L, E) or (1, H, L, E), shaped as for `sampled_attention`; k and v may have fewer heads, of
        which H is a multiple (grouped queries). Up to 1,048,576 queries and keys.
    tokens : str or sequence of str, optional
        What stands at each key, shown on the axes and as text: one character or one string a key, as text or
        as its vocabulary writes it (`readable_tokens`).
    sampler : str or Sampler
        As for `sampled_attention`.
    num_samples : int
        Draws of a row at first.
    is_causal : bool
    scale : float, optional
    seed : int
        Of the draws of every layer.
    layer, head : int
        What is shown at first.
    estimate : AttentionEstimate, optional
        Of the layer that is shown at first, or of its head alone: see `show_estimate`.

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
    sampler = traitlets.Unicode("systematic").tag(sync=True)
    """The name of the sampler by which the lens draws."""
    draw_counts = traitlets.List(traitlets.Int(), read_only=True).tag(sync=True)
    """The numbers of draws at which the slider stops."""
    layer = traitlets.Int(0).tag(sync=True)
    head = traitlets.Int(0).tag(sync=True)
    num_samples = traitlets.Int(64).tag(sync=True)
    selected_rows = traitlets.List(traitlets.Int()).tag(sync=True)
    """Queries that are selected, in rising order."""
    drawn_heads = traitlets.List(traitlets.List(traitlets.Int()), None, allow_none=True).tag(sync=True)
    """The heads that were picked to be drawn, as [layer, head] in rising order; None: all. What draws a whole
    model may keep the others exact."""
    own_draws = traitlets.Bool(True).tag(sync=True)
    """Whether the lens shows its own draws, and not the estimate that was given."""
    given = traitlets.Dict(read_only=True).tag(sync=True)
    """The estimate that was given, for the browser: its `number`, `layer`, `head` (None: all), and its
    `draws` a row (None where a tolerance chose them)."""
    log_scale = traitlets.Bool(True).tag(sync=True)

    live_samplers = SAMPLERS_IN_PAGES
    """The samplers that pages draw by; see `live_html`."""

    @classmethod
    def of_model(
        cls, model: str | LanguageModel, text: str | None = None, num_tokens: int = 512, **options: Any
    ) -> Self:
        """The attention of a language model's layers over the beginning of a text.

        Parameters
        ----------
        model : str or LanguageModel
            What `load_language_model` takes, or what it gives.
        text : str, optional
            The shipped text where None.
        num_tokens : int
            Of the text's beginning, at most 4,096.
        **options
            `sampler`, `num_samples`, `seed`, `layer` and `head` as above.

        Raises
        ------
        ArgumentError, ModelUnavailable
            As `load_language_model`, or if the text has no tokens.

        Examples
        --------
        >>> lens = AttentionLens.of_model("reference", "The import statement", layer=3)
        >>> lens.layers, lens.heads, lens.num_keys
        (6, 8, 20)
        """
        if isinstance(model, str):
            model = load_language_model(model)
        num_tokens = check_count("num_tokens", num_tokens)
        tokens = model.encode(reference_text() if text is None else text)[:num_tokens]
        if not len(tokens):
            raise ArgumentError(f"text={text!r} has no tokens.")
        q, k, v = zip(*model.attention_inputs(tokens[None]), strict=True)
        names = [model.decode(token[None]) for token in tokens]
        return cls(q, k, v, tokens=names, is_causal=True, **options)

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
        layers = checked_layers(q, k, v, is_causal, scale)
        num_samples = check_count("num_samples", num_samples)
        self._strips: dict[str, Iterator[StripStep]] = {}  # by view: what is being measured for it
        self._strip_numbers: dict[str, int] = {}  # of the requests, by view
        self._seed = check_count("seed", seed, 0, MAX_SEED)
        self._heads = heads = LensHeads(
            layers, make_sampler(sampler), is_causal=bool(is_causal), scale=scale, seed=self._seed
        )  # fmt: skip
        n = heads.num_keys
        if tokens is not None and len(tokens) != n:
            raise ShapeError(f"tokens has {len(tokens)} entries; there are {n} keys, and each needs one.")
        super().__init__(
            "lens", layer=layer, head=head, num_samples=num_samples, sampler=heads.sampler.name,
            tokens=readable_tokens(tokens or ()), layers=len(layers), heads=heads.num_heads,
            num_queries=heads.num_queries, num_keys=n, is_causal=heads.is_causal,
            draw_counts=_draw_counts(n, num_samples),
        )  # fmt: skip
        self.observe(self._draw_anew, ["num_samples", "sampler"])
        if estimate is not None:
            self.show_estimate(estimate)

    @traitlets.validate("layer", "head", "num_samples")
    def _check_counts(self, proposal: Any) -> int:
        name, value = proposal["trait"].name, proposal["value"]
        if name == "num_samples":
            return check_count(name, value)
        return self._check_index(name, value)

    def _check_index(self, name: str, value: Any) -> int:
        size = len(self._heads.layers) if name == "layer" else self._heads.num_heads
        value = check_count(name, value, 0)
        if value >= size:
            raise ArgumentError(f"{name}={value} is not allowed: it must be in 0..{size - 1}.")
        return value

    @traitlets.validate("sampler")
    def _check_sampler(self, proposal: Any) -> str:
        if proposal["value"] != self._heads.sampler.name:
            self._heads.take_sampler(make_sampler(proposal["value"]))
        return self._heads.sampler.name

    @traitlets.validate("own_draws")
    def _check_own_draws(self, proposal: Any) -> bool:
        return bool(proposal["value"]) or self._heads.given is None

    @traitlets.validate("drawn_heads")
    def _check_drawn_heads(self, proposal: Any) -> list[list[int]] | None:
        places = proposal["value"]
        if places is None:
            return None
        for place in places:
            if len(place) != 2 or not (0 <= place[0] < len(self._heads.layers)):
                raise ArgumentError(
                    f"drawn_heads holds {place}, which is not allowed: each is [layer, head], of layers "
                    f"0..{len(self._heads.layers) - 1}."
                )
            self._check_index("head", place[1])
        return [list(place) for place in sorted({(layer, head) for layer, head in places})]

    @traitlets.validate("selected_rows")
    def _check_rows(self, proposal: Any) -> list[int]:
        length = self._heads.num_queries
        outside = [row for row in proposal["value"] if not 0 <= row < length]
        if outside:
            raise ArgumentError(
                f"selected_rows holds {outside[0]}, which is not allowed: rows are 0..{length - 1}."
            )
        return sorted(set(proposal["value"]))

    def show_estimate(
        self, estimate: AttentionEstimate, *, layer: int | None = None, head: int | None = None
    ) -> None:
        """Show an estimate that was made elsewhere, in place of the lens's own draws and of an earlier one.

        Parameters
        ----------
        estimate : AttentionEstimate
            Of a layer, output (H, L, Ev) or (1, H, L, Ev), or of one head, (L, Ev) or (1, L, Ev).
        layer, head : int, optional
            What it is of; the layer that is shown where None, and the head that is shown for an estimate of
            one head.

        Raises
        ------
        ShapeError
            If it has other heads, queries or keys.
        ArgumentError
            If there is no such layer or head, or if `head` is named for an estimate of many heads.
        """
        if not isinstance(estimate, AttentionEstimate):
            raise DtypeError(f"estimate is a {type(estimate).__name__}; it must be an AttentionEstimate.")
        layer = self._check_index("layer", self.layer if layer is None else layer)
        shape, heads = tuple(estimate.output.shape), self.heads
        whole = (heads, self.num_queries)
        one_head = shape[:-1] in (whole[1:], (1, *whole[1:])) and (heads > 1 or head is not None)
        if not one_head and shape[:-1] not in (whole, (1, *whole), whole[1:]):
            raise ShapeError(
                f"estimate.output has shape {shape}; it must be of {heads} heads × {self.num_queries} "
                "queries, or of one head."
            )
        if estimate.num_keys != self.num_keys:
            raise ShapeError(f"estimate is over {estimate.num_keys} keys; the lens shows {self.num_keys}.")
        if head is not None and not one_head:
            raise ArgumentError(f"head={head} is not allowed: the estimate is of {heads} heads.")
        of_head = self._check_index("head", self.head if head is None else head) if one_head else None
        number = self.given.get("number", 0) + 1
        self._heads.given = GivenEstimate(number, estimate, layer, of_head)
        info = estimate.info
        with self.hold_sync():
            if info.num_samples is not None:
                self.num_samples = info.num_samples
            self.set_trait("given", {
                "number": number,
                "layer": layer,
                "head": of_head,
                "draws": info.num_samples,
            })  # fmt: skip
            self.own_draws = False

    def finding(self) -> HeadFinding:
        """How wrong the output of the shown head is, by the estimate that is shown."""
        return self._heads.finding(self.layer, self.head, self._shown_draws())

    def rows(self) -> Tensor:
        """The exact attention rows that are selected, of the head that is shown: (R, n), float32."""
        return self._heads.some_rows(self.layer, self.head, self.selected_rows).p

    def frame(self) -> pd.DataFrame:
        """Every visible cell of the shown head: `query`, `key`, `exact`, `sampled`.

        Of a map too large to be computed whole, the cells of the rows on which its error is measured.
        """
        import pandas as pd

        part = self._heads.measured(self.layer, self.head)
        sampled = self._heads.shown(self.layer, self.head, part, self._shown_draws()).attention_weights()
        visible = self._heads.visible(part.rows).nonzero(as_tuple=True)
        row, key = visible
        return pd.DataFrame(
            {
                "query": part.rows[row].numpy(),
                "key": key.numpy(),
                "exact": part.p[visible].numpy(),
                "sampled": sampled[visible].numpy(),
            }
        )

    def figure(self, theme: str = "light") -> Figure:
        """The three maps of the shown head."""
        # matplotlib's import is a seventh of the workbench's, and the first picture does without it.
        from ...experiments.attention_maps import attention_panels, draw_attention_maps

        finding, draws = self.finding(), self._shown_draws()
        part = self._heads.measured(self.layer, self.head)
        estimate = self._heads.shown(self.layer, self.head, part, draws)
        level = overview_level(len(part.rows), self.num_keys, FIGURE_CELLS)
        exact = pool_map(part.p.numpy(), level)
        sampled = pool_draws(estimate, level, (0, exact.shape[0]), (0, exact.shape[1]), part.p.shape)
        visible = pool_map(self._heads.visible(part.rows).float().numpy(), level) > 0
        panels = attention_panels(
            exact, sampled, sampler=estimate.info.sampler, visible=visible, log_scale=self.log_scale
        )
        named = self.tokens and self.num_keys == self.num_queries <= MAX_LABELLED_KEYS
        where = [f"n = {self.num_keys}"]
        if draws is not None:
            where.append(f"seed {self._seed}")
        if finding.measured_rows < self.num_queries:
            where.append(f"{finding.measured_rows} of {self.num_queries} rows")
        return draw_attention_maps(
            panels,
            theme,
            title=f"{finding.text}\n{finding.effort}  ({', '.join(where)})",
            extent=(-0.5, self.num_keys - 0.5, self.num_queries - 0.5, -0.5),
            tokens=self.tokens if named else None,
        )

    def live_html(self, max_bytes: int = MAX_LIVE_BYTES) -> str:
        """HTML for `Run.save_figure(live=)` that redraws the lens in a page, without a kernel or a network.

        It holds the shown head, and as many others as `max_bytes` allow, first those of the same layer. Draws
        in the page are those of the lens: the same from the same logits, which the page computes itself, to
        about a rounding of float32. It draws by the samplers of `live_samplers`, and gives no standard
        errors.

        Parameters
        ----------
        max_bytes : int
            Of the HTML.

        Raises
        ------
        ArgumentError
            If the lens draws by another sampler, or the shown head does not fit.
        """
        names = set(self.trait_names(sync=True)) - set(View.class_trait_names())
        state = {name: getattr(self, name) for name in ("kind", *sorted(names))}
        return live_html(self._heads, state, self._seed, check_count("max_bytes", max_bytes))

    def to_html(self, path: str | Path, *, max_bytes: int = MAX_PAGE_BYTES) -> Path:
        """Write a page that redraws the lens in any browser, and shows its figure where scripts are off.

        See `live_html`, also for the errors.

        Raises
        ------
        StorageError
            If the file cannot be written.
        """
        write_atomic(Path(path), self._page(check_count("max_bytes", max_bytes)))
        return Path(path)

    def _page(self, max_bytes: int) -> bytes:
        title = f"Attention lens: {self.finding().text}"
        return page_html(title, self.figure, self.live_html, max_bytes).encode()

    def _export_page(self) -> None:
        message = {"kind": "file", "name": "attentionlens.html", "type": "text/html"}
        self.send(message, [self._page(MAX_PAGE_BYTES)])

    def _on_message(self, content: Mapping[str, Any]) -> None:
        if content["kind"] == "maps":
            self._worker.put(f"maps {content.get('view')}", partial(self._send_maps, dict(content)))
        elif content["kind"] == "page":
            self._worker.put("export", self._export_page, rank=1)
        elif content["kind"] == "thumbnails":
            draws, given = int(content["draws"]), bool(content.get("given"))
            self._worker.put("thumbnails", partial(self._send_thumbnails, draws, given, 0), rank=2)
        elif content["kind"] == "row":
            self._worker.put(f"row {content.get('view')}", partial(self._send_row, dict(content)))
        elif content["kind"] == "inputs":
            self._worker.put(
                f"inputs {content.get('view')}", partial(self._send_inputs, dict(content)), rank=1
            )
        elif content["kind"] == "strip":
            view, place = str(content.get("view")), (int(content["layer"]), int(content["head"]))
            if view in self._strips and self._strip_numbers[view] == content["seq"]:
                return  # it is being measured, and a browser that waits has asked again
            self._strips[view] = steps = strip_steps(self._heads, *place, str(content["sampler"]))
            self._strip_numbers[view] = content["seq"]
            self._put_strip(dict(content), steps)

    def _send_maps(self, request: dict[str, Any]) -> None:
        """Send tiles of the exact and the sampled map, and what is known of each row."""
        layer, head = int(request["layer"]), int(request["head"])
        if not (0 <= layer < self.layers and 0 <= head < self.heads):
            raise ArgumentError(
                f"layer={layer}, head={head} is not allowed: there are {self.layers} layers × "
                f"{self.heads} heads."
            )
        given, draws = self._heads.given, request["draws"]
        if draws is None and (given is None or given.number != request["given"]):
            return  # another was given since, and the browser asks again
        tiles: list[dict[str, Any]] = []
        buffers: list[bytes] = []
        rows, facts = [], []
        for part, level, first_tile, exact_names, sampled_names in self._parts(request):
            estimate = self._heads.shown(layer, head, part, draws)
            exact = exact_tiles(part.p.numpy(), level, exact_names)
            sampled = sampled_tiles(estimate, level, sampled_names, part.p.shape)
            for name, map_tiles in (("exact", exact), ("sampled", sampled)):
                for i, j, tile in map_tiles:
                    size = {"rows": tile.shape[0], "columns": tile.shape[1]}
                    tiles.append({"map": name, "i": i + first_tile, "j": j, **size})
                    buffers.append(np.ascontiguousarray(tile, dtype=np.float16).tobytes())
            rows.append(part.rows.numpy().astype(np.int32))
            facts.append(part.row_facts(estimate))
        finding = self._heads.finding(layer, head, draws)
        measured = self._heads.measured(layer, head)
        info = self._heads.shown(layer, head, measured, draws).info
        buffers.append(np.concatenate(rows or [np.zeros(0, np.int32)]).tobytes())
        buffers.append(np.concatenate(facts or [np.zeros((4, 0), np.float32)], axis=1).tobytes())
        reply = {name: request.get(name) for name in REQUEST_NAMES}
        known = {
            "error": finding.error,
            "std_error": finding.std_error,
            "effort": finding.effort,
            "measured_rows": finding.measured_rows,
            "sampler": info.sampler,
            "corrected": info.control_variate is not None,
            "seed": str(self._seed),
            "fallbacks": list(info.fallbacks),
        }
        self.send({"kind": "maps", **reply, "tiles": tiles, **known}, buffers)

    def _parts(self, request: Mapping[str, Any]) -> Iterator[tuple[HeadRows, MapLevel, int, Tiles, Tiles]]:
        """The computed parts of a head that a request for tiles needs, and the tiles that are in each.

        Yields
        ------
        part, level : HeadRows, MapLevel
            What the tiles are means of.
        first_tile : int
            Of the part, counted in rows of tiles.
        exact, sampled : list of (int, int)
            The tiles, rows counted within the part.
        """
        layer, head = int(request["layer"]), int(request["head"])
        column_level = int(request["level"])
        row_level = int(request.get("row_level", column_level))
        if not self._heads.is_large:
            whole = self._heads.measured(layer, head)
            yield whole, MapLevel(row_level, column_level), 0, request["exact"], request["sampled"]
            return
        for band in sorted({i for i, _ in (*request["exact"], *request["sampled"])}):
            part = self._heads.band(layer, head, row_level, band)
            exact, sampled = (
                [(0, j) for i, j in request[name] if i == band] for name in ("exact", "sampled")
            )
            yield part, MapLevel(0, column_level), band, exact, sampled

    def _send_row(self, request: Mapping[str, Any]) -> None:
        """Send the weights of a query over some keys, and the lengths of their value vectors."""
        layer, head, row = (int(request[name]) for name in ("layer", "head", "row"))
        given, draws = self._heads.given, request["draws"]
        if draws is None and (given is None or given.number != request["given"]):
            return
        part = self._heads.some_rows(layer, head, [row])
        if not self._heads.is_large:
            part = self._heads.measured(layer, head)
        at = row if len(part.rows) > 1 else 0
        estimate = self._heads.shown(layer, head, part, draws)
        drawn = estimate_of_rows(estimate, torch.tensor([at])).attention_weights()[0]
        keys = slice(int(request["first"]), int(request["end"]))
        norms = part.v[keys].float().norm(dim=-1)
        reply = {name: request.get(name) for name in (*REQUEST_NAMES, "row", "first", "end")}
        buffers = [x.float().numpy().tobytes() for x in (part.p[at, keys], drawn[keys], norms)]
        self.send({"kind": "row", **reply, "sampler": estimate.info.sampler}, buffers)

    def _send_inputs(self, request: dict[str, Any]) -> None:
        """Send what the browser needs to draw a small head itself, or the overview of a large one.

        Of heads between these nothing is sent: the browser would draw them no faster than the kernel does.
        """
        layer, head = int(request["layer"]), int(request["head"])
        reply = {name: request.get(name) for name in ("view", "layer", "head")}
        known = {
            "scale": self._heads.scale,
            "group": self._heads.group_of(head),
            "key": stream_key(self._heads),
            "seed": str(self._seed),
        }
        if self._heads.is_large:
            part, level = (
                self._heads.measured(layer, head),
                overview_level(self.num_queries, self.num_keys, OVERVIEW_ROWS),
            )
            at = {"overview": True, "level": level.columns, "row_level": level.rows}
            samplers = [name for name in SAMPLERS_IN_PAGES if not make_sampler(name).ordered]
            buffers = [little_endian(part.rows.int()), little_endian(cumulative_cells(part.p, level))]
            self.send({"kind": "inputs", **reply, **known, **at, "samplers": samplers}, buffers)
        elif self.num_queries * self.num_keys > MAX_LOCAL_CELLS or self.num_keys > MAX_LOCAL_KEYS:
            self.send({"kind": "inputs", **reply})
        else:
            samplers = list(samplers_in_browser(self._heads.sampler))
            buffers = inputs_for_browser(self._heads, layer, head).buffers()
            self.send({"kind": "inputs", **reply, **known, "samplers": samplers}, buffers)

    def _put_strip(self, request: dict[str, Any], steps: Iterator[StripStep]) -> None:
        task = partial(self._send_strip, request, steps)
        self._worker.put(f"strip {request.get('view')} {request['seq']}", task, rank=3)

    def _send_strip(self, request: dict[str, Any], steps: Iterator[StripStep]) -> None:
        """Send the next points of the strip; then the ones after them, after whatever is more urgent."""
        points, left = [], 0
        end = time.monotonic() + STRIP_STEP_S
        for step in steps:
            left = step.left
            if step.point is not None:
                points.append(asdict(step.point))
            if time.monotonic() > end:
                break
        else:
            left = 0
        if self._strips.get(str(request.get("view"))) is not steps:
            return  # another head is looked at
        reply = {name: request[name] for name in ("view", "seq", "layer", "head")}
        rows = len(strip_rows(self.num_queries, self.num_keys))
        known = {"rows": rows, "repetitions": REPETITIONS, "left": left}
        if points or not left:
            self.send({"kind": "strip", **reply, **known, "points": points})
        if left:
            self._put_strip(request, steps)
        else:
            del self._strips[str(request.get("view"))]

    def _send_thumbnails(self, draws: int, given: bool, layer: int) -> None:
        """Send a layer's thumbnails and variances; then the next layer's, after whatever is more urgent."""
        thumbnails = self._heads.thumbnails(layer, draws, given=given)
        _, rows, columns = thumbnails.maps.shape
        message = {"kind": "thumbnails", "layer": layer, "draws": draws, "rows": rows, "columns": columns}
        self.send(message, [thumbnails.variances.tobytes(), thumbnails.maps.tobytes()])
        if layer + 1 < self.layers:
            self._worker.put("thumbnails", partial(self._send_thumbnails, draws, given, layer + 1), rank=2)

    def _draw_anew(self, change: Any) -> None:
        self.own_draws = True

    def _given_in_view(self) -> bool:
        """Whether the shown head is shown by the estimate that was given."""
        given = self._heads.given
        return not self.own_draws and given is not None and given.covers(self.layer, self.head)

    def _shown_draws(self) -> int | None:
        """The draws a row that the lens makes for what is shown; None where that is the given estimate."""
        return None if self._given_in_view() else self.num_samples


def _draw_counts(num_keys: int, num_samples: int) -> list[int]:
    """Stops of a slider of draws: four in every doubling, and the number at first."""
    top = max(min(2 * num_keys, MAX_SLIDER_DRAWS), num_samples, 16)
    counts = {round(2 ** (i / 4)) for i in range(4 * math.ceil(math.log2(top)) + 1)} | {num_samples}
    return sorted(count for count in counts if count <= top)
