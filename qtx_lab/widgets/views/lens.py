"""`AttentionLens`: exact, sampled and difference maps of a head, and which heads are hard to sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import traitlets
from torch import Tensor

from ...checks import MAX_SEED, check_count
from ...errors import ArgumentError, ShapeError
from ...estimates import AttentionEstimate
from ...experiments.attention_maps import attention_panels, draw_attention_maps
from ...models.base import LanguageModel
from ...models.language_model import load_language_model
from ...models.text import reference_text
from ...samplers import Sampler, make_sampler
from .base import View
from .lens_heads import LensHeads, checked_layers
from .lens_maps import exact_tiles, overview_level, pool_draws, pool_map, sampled_tiles

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MAX_LABELLED_KEYS = 48
"""Keys of a head up to which a figure names each by its token."""

FIGURE_CELLS = 512
"""Cells of a side of a map in the figure, at most."""


class AttentionLens(View):
    """Exact, sampled and difference maps of each head side by side, with rows that can be selected.

    The maps share axes, zoom and hover. Moving the slider draws anew, with the same seed; the heads'
    thumbnails are coloured by their relative variance E‖ô − o‖² / ‖o‖². Maps of up to 4,096 × 4,096 are sent
    in tiles, as they are looked at; zoomed out, a cell is the mean of those under it.

    Parameters
    ----------
    q, k, v : Tensor, or a sequence of Tensors, one a layer
        (L, E), (H, L, E) or (1, H, L, E), shaped as for `sampled_attention`; k and v may have fewer heads, of
        which H is a multiple (grouped queries). At most 4,096 queries and keys.
    tokens : str or sequence of str, optional
        What stands at each key, shown on the axes: one character or one string a key.
    sampler : str or Sampler
        As for `sampled_attention`.
    num_samples : int
        Draws of a row at first.
    is_causal : bool
    scale : float, optional
    seed : int
        Of the draws of every head.
    layer, head : int
        What is shown at first.
    estimate : AttentionEstimate, optional
        Of the first layer: shown at its own number of draws, in place of new draws.

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
    """The numbers of draws at which the slider stops."""
    layer = traitlets.Int(0).tag(sync=True)
    head = traitlets.Int(0).tag(sync=True)
    num_samples = traitlets.Int(64).tag(sync=True)
    selected_rows = traitlets.List(traitlets.Int()).tag(sync=True)
    """Queries that are selected, in rising order."""
    log_scale = traitlets.Bool(True).tag(sync=True)

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
        self._seed = check_count("seed", seed, 0, MAX_SEED)
        self._heads = heads = LensHeads(
            layers, make_sampler(sampler), is_causal=bool(is_causal), scale=scale, seed=self._seed,
            estimate=estimate,
        )  # fmt: skip
        n, size = heads.num_keys, (heads.num_heads, heads.num_queries)
        if tokens is not None and len(tokens) != n:
            raise ShapeError(f"tokens has {len(tokens)} entries; there are {n} keys, and each needs one.")
        if estimate is not None and tuple(estimate.output.shape[-3:-1]) not in (size, size[1:]):
            raise ShapeError(
                f"estimate.output has shape {tuple(estimate.output.shape)}; it must be of {size[0]} heads × "
                f"{size[1]} queries."
            )
        super().__init__("lens", layer=layer, head=head, num_samples=num_samples)
        for name, value in {
            "tokens": list(tokens or ()),
            "layers": len(layers),
            "heads": heads.num_heads,
            "num_queries": heads.num_queries,
            "num_keys": n,
            "is_causal": heads.is_causal,
            "sampler": heads.sampler.name,
            "draw_counts": _draw_counts(n, num_samples),
        }.items():
            self.set_trait(name, value)

    @traitlets.validate("layer", "head", "num_samples")
    def _check_counts(self, proposal: Any) -> int:
        name, value = proposal["trait"].name, proposal["value"]
        if name == "num_samples":
            return check_count(name, value)
        size = len(self._heads.layers) if name == "layer" else self._heads.num_heads
        value = check_count(name, value, 0)
        if value >= size:
            raise ArgumentError(f"{name}={value} is not allowed: it must be in 0..{size - 1}.")
        return value

    @traitlets.validate("selected_rows")
    def _check_rows(self, proposal: Any) -> list[int]:
        length = self._heads.num_queries
        outside = [row for row in proposal["value"] if not 0 <= row < length]
        if outside:
            raise ArgumentError(
                f"selected_rows holds {outside[0]}, which is not allowed: rows are 0..{length - 1}."
            )
        return sorted(set(proposal["value"]))

    def rows(self) -> Tensor:
        """The exact attention rows that are selected, of the head that is shown: (R, n), float32."""
        return self._heads.head(self.layer, self.head).p[list(self.selected_rows)]

    def frame(self) -> pd.DataFrame:
        """Every visible cell of the shown head: `query`, `key`, `exact`, `sampled`."""
        import pandas as pd

        exact = self._heads.head(self.layer, self.head).p
        sampled = self._heads.draw(self.layer, self.head, self.num_samples).attention_weights()
        visible = self._heads.visible().nonzero(as_tuple=True)
        query, key = (x.numpy() for x in visible)
        return pd.DataFrame(
            {"query": query, "key": key, "exact": exact[visible].numpy(), "sampled": sampled[visible].numpy()}
        )

    def figure(self, theme: str = "light") -> Figure:
        """The three maps of the shown head."""
        head = self._heads.head(self.layer, self.head)
        estimate = self._heads.draw(self.layer, self.head, self.num_samples)
        level = overview_level(self.num_queries, self.num_keys, FIGURE_CELLS)
        exact = head.map_at(level).astype(np.float32)
        sampled = pool_draws(estimate, level, (0, exact.shape[0]), (0, exact.shape[1]), head.p.shape)
        visible = pool_map(self._heads.visible().float().numpy(), level) > 0
        panels = attention_panels(
            exact, sampled, sampler=self.sampler, visible=visible, log_scale=self.log_scale
        )
        named = self.tokens and self.num_keys == self.num_queries <= MAX_LABELLED_KEYS
        return draw_attention_maps(
            panels,
            theme,
            title=f"Layer {self.layer}, head {self.head}: {self.num_samples} {self.sampler} draws a row are "
            f"off by {head.error(estimate):.2g} of the output  (n = {self.num_keys}, seed {self._seed})",
            extent=(-0.5, self.num_keys - 0.5, self.num_queries - 0.5, -0.5),
            tokens=self.tokens if named else None,
        )

    def _on_message(self, content: Mapping[str, Any]) -> None:
        if content["kind"] == "maps":
            self._worker.put(f"maps {content.get('view')}", partial(self._send_maps, dict(content)))
        elif content["kind"] == "thumbnails":
            self._worker.put("thumbnails", partial(self._send_thumbnails, int(content["draws"]), 0), rank=2)

    def _send_maps(self, request: dict[str, Any]) -> None:
        """Send tiles of the exact and the sampled map, and what is known of each row."""
        layer, head_index, level = (int(request[name]) for name in ("layer", "head", "level"))
        if not (0 <= layer < self.layers and 0 <= head_index < self.heads):
            raise ArgumentError(
                f"layer={layer}, head={head_index} is not allowed: there are {self.layers} layers × "
                f"{self.heads} heads."
            )
        head = self._heads.head(layer, head_index)
        estimate = self._heads.draw(layer, head_index, int(request["draws"]))
        exact = head.map_at(level)
        sampled = sampled_tiles(estimate, level, request["sampled"], exact.shape, head.p.shape)
        tiles: list[dict[str, Any]] = []
        buffers: list[bytes] = []
        for name, parts in (("exact", exact_tiles(exact, request["exact"])), ("sampled", sampled)):
            for i, j, tile in parts:
                tiles.append({"map": name, "i": i, "j": j, "rows": tile.shape[0], "columns": tile.shape[1]})
                buffers.append(np.ascontiguousarray(tile, dtype=np.float16).tobytes())
        buffers.append(head.row_facts(estimate).tobytes())
        reply = {name: request[name] for name in ("view", "seq", "layer", "head", "draws", "level")}
        known = {"error": head.error(estimate), "fallbacks": list(estimate.info.fallbacks)}
        self.send({"kind": "maps", **reply, "tiles": tiles, **known}, buffers)

    def _send_thumbnails(self, draws: int, layer: int) -> None:
        """Send a layer's thumbnails and variances; then the next layer's, after whatever is more urgent."""
        thumbnails = self._heads.thumbnails(layer, draws)
        _, rows, columns = thumbnails.maps.shape
        message = {"kind": "thumbnails", "layer": layer, "draws": draws, "rows": rows, "columns": columns}
        self.send(message, [thumbnails.variances.tobytes(), thumbnails.maps.tobytes()])
        if layer + 1 < self.layers:
            self._worker.put("thumbnails", partial(self._send_thumbnails, draws, layer + 1), rank=2)


def _draw_counts(num_keys: int, num_samples: int) -> list[int]:
    """Stops of a slider of draws: four in every doubling, and the number at first."""
    top = max(2 * num_keys, num_samples, 16)
    counts = {round(2 ** (i / 4)) for i in range(4 * math.ceil(math.log2(top)) + 1)} | {num_samples}
    return sorted(count for count in counts if count <= top)
