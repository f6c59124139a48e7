"""`SampledLayer`: one layer of a `SampledCache`, whose tokens are in a `SampledKVCache` once one attends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ..cache import SampledKVCache
from ..errors import ArgumentError, ShapeError
from ..estimates import AttentionEstimate
from .huggingface_settings import IMPLEMENTATION

QUERIES_TO_FIT = 64
"""How many of a prompt's last queries its sketch is fitted to, for the directions of the keys that matter."""


class CachedTokens(Tensor):
    """Stands for the keys or the values of a `SampledLayer` on their way through a model, without numbers.

    It has their shape, dtype and device. Whoever computes with it gets an error: the layer's sketch is of the
    tokens as they were given to the cache.

    Parameters
    ----------
    layer : SampledLayer
    like : Tensor
        New tokens, of the dtype and on the device.
    """

    layer: SampledLayer
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, layer: SampledLayer, like: Tensor) -> CachedTokens:
        """Stand for all tokens of the layer."""
        shape = (*like.shape[:-2], layer.get_seq_length(), like.shape[-1])
        tokens = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        tokens.layer = layer
        return tokens

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CachedTokens({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise ArgumentError(
            f"The model computes with keys or values that a cache gave it ({func}); a SampledCache has a "
            "sketch of them as they were. Leave the SampledCache out, or make the layer "
            '{"sampler": "exact"}.'
        )


def cached_layer(key: Tensor, value: Tensor) -> SampledLayer | None:
    """The layer whose tokens keys and values stand for; None where they are tensors like any other.

    Raises
    ------
    ArgumentError
        If only one of them stands for a layer's, or for another layer's.
    """
    layers = [x.layer if isinstance(x, CachedTokens) else None for x in (key, value)]
    if layers[0] is not layers[1]:
        raise ArgumentError(
            "The model attends to keys and values of which a SampledCache gave only one: leave it out, or "
            'make the layer {"sampler": "exact"}.'
        )
    return layers[0]


def arguments_of_a_step(module: nn.Module, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a module asks of its attention, by name, as arguments of `SampledLayer.attend`.

    Raises
    ------
    ArgumentError
        If a `SampledCache` does not give it.
    """
    sinks = asked.get("s_aux", asked.get("sinks"))
    unknown = set(asked) - {"output_attentions", "s_aux", "sinks", "softcap"}
    if sinks is not None and sinks.ndim != 1:
        unknown.add("sinks of each token")
    if unknown:
        raise ArgumentError(
            f"{type(module).__name__} asks its attention for {', '.join(sorted(unknown))}, which a "
            "SampledCache does not give: use transformers' own cache."
        )
    return {
        "sinks": sinks,
        "softcap": asked.get("softcap"),
        "output_attentions": bool(asked.get("output_attentions")),
    }


@dataclass
class SequenceGroup:
    """Sequences of a batch that see equally many tokens.

    Parameters
    ----------
    rows : Tensor, int64, (b,)
        Their numbers in the batch.
    cache : SampledKVCache
        The tokens that they see.
    """

    rows: Tensor
    cache: SampledKVCache


class SampledLayer(DynamicLayer):
    """One layer of a `SampledCache`.

    Tokens are first kept as they come, in `keys` and `values`. When a single new token attends, its mask
    tells which ones are seen at all; these go to a `SampledKVCache` for each number of tokens seen.

    Parameters
    ----------
    options : dict
        Arguments of `SampledKVCache.build`.
    prefill : {"exact", "sampled"}
        How several new tokens at once attend.
    """

    keys: Tensor
    """Keys that are in none of the groups yet, (B, Hkv, new, E), once there are any tokens."""
    values: Tensor
    """Their values."""

    def __init__(self, options: dict[str, Any], prefill: str = "exact"):
        super().__init__()
        self.options, self.prefill = options, prefill
        self.verifies = False
        """Whether new tokens, also single ones, attend exactly, to verify what was drafted."""
        self.observer: Callable[[SampledKVCache, AttentionEstimate], None] | None = None
        """Is called with each estimate of new tokens, and the cache that it is of."""
        self.groups: list[SequenceGroup] = []
        self._sorted_in = 0  # tokens in `groups` and `_hidden`, of each sequence
        self._visible: Tensor | None = None  # bool, (B, n): which of these are seen; None: all
        # The others, (number, Hkv, E) and (number, Hkv, Ev).
        self._hidden: tuple[Tensor, Tensor] | None = None
        self._queries: Tensor | None = None  # (B, H, up to QUERIES_TO_FIT, E), the last of a prompt
        self._queries_end = 0  # their positions end there

    @property
    def sampled(self) -> SampledKVCache | None:
        """The tokens of all sequences, where they are in one cache.

        None before the first new token, and where sequences see different numbers of tokens (`groups`).
        """
        return self.groups[0].cache if len(self.groups) == 1 else None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens, and return what stands for all keys and values.

        Raises
        ------
        ArgumentError
            If gradients are asked for.
        """
        _refuse_gradients(key_states, value_states)
        super().update(key_states, value_states)
        return CachedTokens(self, key_states), CachedTokens(self, value_states)

    def tokens(self, query: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All keys (B, Hkv, n, E) and values (B, Hkv, n, Ev), in the order in which they came.

        A prompt's `query` (B, H, L, E) is remembered for the sketch.
        """
        if query is not None:
            self._queries = query[:, :, -QUERIES_TO_FIT:].detach().clone()
            self._queries_end = self.get_seq_length()
        if not self.groups:
            return self.keys, self.values
        return self._in_order(0, self.keys), self._in_order(1, self.values)

    def _in_order(self, which: int, latest: Tensor) -> Tensor:
        """All keys (which = 0) or values (1), in the order in which they came; those of `latest` last."""
        batch, heads, _, width = latest.shape
        x = latest.new_empty(batch, self._sorted_in, heads, width)
        for group in self.groups:
            tokens = group.cache.tokens()[which].transpose(1, 2)  # [b, seen, Hkv, width]
            if self._visible is None:
                x[group.rows] = tokens
            else:
                place = self._visible[group.rows].nonzero()
                x[group.rows[place[:, 0]], place[:, 1]] = tokens.flatten(0, 1)
        if self._visible is not None and self._hidden is not None:
            x[~self._visible] = self._hidden[which]
        return torch.cat((x.transpose(1, 2), latest), 2)

    def attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        settings: dict[str, Any],
        *,
        sinks: Tensor | None = None,
        softcap: float | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output (B, 1, H, Ev) for one new token, query (B, H, 1, E), and weights (B, H, 1, n) if asked.

        `sinks` (H,) and `softcap` are as for `SampledKVCache.attend`.

        Raises
        ------
        ArgumentError, ShapeError
            If gradients are asked for, or the mask has a bias or hides different tokens from different heads.
        """
        _refuse_gradients(query)
        if self.prefill == "exact" and settings["control_variate"] is not None:  # it was set since
            raise ArgumentError(
                f"config.{IMPLEMENTATION}['control_variate'] would change nothing: a SampledCache draws for "
                "new tokens in its own way."
            )
        for name in ("proposal", "rank") if settings["proposal"] is not None else ():
            if settings[name] != self.options[name]:
                raise ArgumentError(
                    f"config.{IMPLEMENTATION}[{name!r}]={settings[name]!r} came after the SampledCache was "
                    f"made, with {name}={self.options[name]!r}: make another cache."
                )
        visible = _visible_tokens(mask, query.shape[0], self.get_seq_length())
        self._sort_in(visible)
        outputs, weights = [], []
        for group in self.groups:
            estimate = group.cache.attend(
                query if len(self.groups) == 1 else query[group.rows],
                settings["num_samples"],
                replicates=settings["replicates"],
                share_keys=settings["share_keys"],
                scale=scaling,
                generator=settings["generator"],
                sequences=group.rows,
                sinks=sinks,
                softcap=softcap,
            )
            if self.observer is not None:
                self.observer(group.cache, estimate)
            outputs.append(estimate.output.transpose(1, 2))
            if output_attentions:
                weights.append(self._by_column(group.rows, estimate.attention_weights()).to(query.dtype))
        place = torch.cat([group.rows for group in self.groups]).argsort()
        return torch.cat(outputs)[place], torch.cat(weights)[place] if output_attentions else None

    def attend_exactly(
        self, query: Tensor, scaling: float | None, sinks: Tensor | None = None, softcap: float | None = None
    ) -> Tensor:
        """The exact output (B, L, H, Ev) for new tokens, query (B, H, L, E), in one pass over all tokens."""
        _refuse_gradients(query)
        self._sort_in(None)
        cache = self.groups[0].cache
        output = cache.attend_exactly(query, scale=scaling, sinks=sinks, softcap=softcap)
        return output.transpose(1, 2).contiguous()

    def _by_column(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Weights (b, H, 1, seen) of what some sequences see, as (b, H, 1, n) of all tokens."""
        if self._visible is None:
            return weights
        columns = self._visible[rows].nonzero()[:, 1].view(len(rows), 1, 1, -1).expand_as(weights)
        return weights.new_zeros(*weights.shape[:-1], self.get_seq_length()).scatter_(-1, columns, weights)

    def _sort_in(self, visible: Tensor | None) -> None:
        """Have all tokens in `groups`, for a mask that shows the tokens visible (B, n); None: all of them."""
        if self.groups and not self._still_seen(visible):
            self._take_out()
        k, v = self.keys, self.values
        if self.groups:
            for group in self.groups if k.shape[-2] else ():
                group.cache.append(k[group.rows], v[group.rows])
        else:
            count = (
                torch.full(k.shape[:1], k.shape[2], device=k.device) if visible is None else visible.sum(1)
            )
            for number in count.unique().tolist():
                rows = (count == number).nonzero()[:, 0]
                self.groups.append(SequenceGroup(rows, self._build(rows, visible, number)))
            if visible is not None:
                self._hidden = (k.transpose(1, 2)[~visible], v.transpose(1, 2)[~visible])
        self._visible, self._sorted_in = visible, self.get_seq_length()
        self.keys, self.values = (x.new_empty(*x.shape[:2], 0, x.shape[-1]) for x in (k, v))

    def _still_seen(self, visible: Tensor | None) -> bool:
        """Whether a mask shows of the tokens in `groups` what it showed before, and all others."""
        if visible is None or self._visible is None:
            return visible is self._visible
        old, new = visible[:, : self._sorted_in], visible[:, self._sorted_in :]
        return torch.equal(old, self._visible) and bool(new.all())

    def _take_out(self) -> None:
        """Have all tokens in `keys` and `values`."""
        self.keys, self.values = self.tokens()
        self.groups, self._visible, self._hidden, self._sorted_in = [], None, None, 0

    def _build(self, rows: Tensor, visible: Tensor | None, number: int) -> SampledKVCache:
        """The `number` tokens that some sequences see."""
        if not number:
            raise ShapeError("The mask hides all tokens from a sequence.")
        k, v = self.keys[rows], self.values[rows]
        queries = None if self._queries is None else self._queries[rows]
        if visible is not None:
            seen = visible[rows]
            if queries is not None:
                shown = seen[:, : self._queries_end][:, -queries.shape[2] :]
                queries = queries[:, :, -shown.shape[1] :] * shown[:, None, :, None]
            k, v = (x.transpose(1, 2)[seen].unflatten(0, (len(rows), number)).transpose(1, 2) for x in (k, v))
        return SampledKVCache.build(k, v, **self.options, queries=queries)

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._sorted_in + (self.keys.shape[-2] if self.is_initialized else 0)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.groups, self._visible, self._hidden, self._queries, self._sorted_in = [], None, None, None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -tokens_to_remove tokens.

        Raises
        ------
        ArgumentError
            If the number is positive.
        """
        if tokens_to_remove > 0:
            raise ArgumentError(
                f"tokens_to_remove={tokens_to_remove} is not allowed: it must be 0 or less, minus the number."
            )
        if not self.is_initialized:
            return
        number = min(-tokens_to_remove, self.get_seq_length())
        sorted_in = number - self.keys.shape[-2]
        if sorted_in > 0:
            is_seen = self._visible is None or bool(self._visible[:, -sorted_in:].all())
            if is_seen and all(len(group.cache) > sorted_in for group in self.groups):
                for group in self.groups:
                    group.cache.crop(len(group.cache) - sorted_in)
                self._visible = None if self._visible is None else self._visible[:, :-sorted_in]
                self._sorted_in -= sorted_in
                number -= sorted_in
            else:
                self._take_out()
        length = self.keys.shape[-2] - number
        self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i be what sequence beam_idx_i was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each sequence `repeats` times, one after the other."""
        if self.is_initialized:
            batch = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.batch_select_indices(batch.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Let sequence i be what sequence indices_i was."""
        if not self.is_initialized:
            return
        indices = torch.arange(self.keys.shape[0], device=self.keys.device)[indices.to(self.keys.device)]
        self.keys, self.values = self.keys[indices], self.values[indices]
        self._queries = None if self._queries is None else self._queries[indices]
        if not self.groups:
            return
        if self._visible is not None:
            self._take_out_hidden(indices)
        groups = []
        for group in self.groups:
            rows = torch.isin(indices, group.rows).nonzero()[:, 0]
            if len(rows):
                group.cache.select_sequences(torch.searchsorted(group.rows, indices[rows]))
                groups.append(SequenceGroup(rows, group.cache))
        self.groups = groups

    def _take_out_hidden(self, indices: Tensor) -> None:
        """Select sequences of what the mask shows and of the tokens that it hides."""
        assert self._visible is not None
        assert self._hidden is not None
        hidden = []
        for x in self._hidden:
            room = x.new_empty(*self._visible.shape, *x.shape[1:])
            room[~self._visible] = x
            hidden.append(room[indices][~self._visible[indices]])
        self._visible, self._hidden = self._visible[indices], (hidden[0], hidden[1])

    def offload(self) -> None:
        """Not allowed: sketches stay on the device.

        Raises
        ------
        ArgumentError
        """
        raise ArgumentError("A SampledCache cannot be moved to another device.")

    prefetch = offload


def _visible_tokens(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """The tokens that a mask (B, 1 or H, 1, n) shows to a single query, bool (B, n); None if all.

    Raises
    ------
    ArgumentError, ShapeError
        If the mask has a bias, or hides different tokens from different heads.
    """
    if mask is None:
        return None
    mask = mask[..., :length]
    if mask.dtype != torch.bool:
        shown = mask == 0
        if not bool((shown | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
            raise ArgumentError(
                "The mask adds numbers to the logits, which a SampledCache has no place for: leave it out, "
                'or make the layer {"sampler": "exact"}.'
            )
        mask = shown
    if bool(mask.all()):
        return None
    if not torch.equal(mask, mask[:, :1].expand_as(mask)):
        raise ShapeError(
            "A SampledCache attends to the same tokens in all heads, but the mask differs between heads."
        )
    return mask[:, 0, -1].expand(batch, -1)


def _refuse_gradients(*tensors: Tensor) -> None:
    """Refuse what gradients would be missing of."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ArgumentError(
            "Gradients do not go through a SampledCache: call the model under torch.no_grad(), or without a "
            "cache."
        )
