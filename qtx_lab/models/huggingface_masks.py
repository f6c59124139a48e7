"""Which keys a query of a Hugging Face model attends to: its masks, and what a missing one means."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import eager_mask, sdpa_mask

from ..attention.gradients import outside_graphs
from ..errors import ArgumentError, ShapeError


class PlainMask(Tensor):
    """A mask (B, 1, L, n) that hides the future, or nothing, and is computed only where a model reads it.

    Whatever torch does with it is done with `numbers`. So it takes no memory in a model that hands it on from
    layer to layer as it is, and a model that cuts it or adds to it gets an ordinary mask.

    Parameters
    ----------
    make : callable
        Computes the mask.
    shape, dtype, device
        Of the mask.
    first_position : int or None
        The position of the first query, the first key's being 0; None where the future is visible, too.
    """

    first_position: int | None
    _make: Callable[[], Tensor]
    _numbers: Tensor | None

    @staticmethod
    def __new__(
        cls,
        make: Callable[[], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: Any,
        first_position: int | None,
    ) -> PlainMask:
        """An empty shell, without numbers."""
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.first_position, self._make, self._numbers = first_position, make, None
        return self

    @property
    def is_read(self) -> bool:
        """Whether someone looked into it, and so may also have changed it."""
        return self._numbers is not None

    @property
    def numbers(self) -> Tensor:
        """The numbers."""
        if self._numbers is None:
            self._numbers = self._make()
        return self._numbers

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Any of torch's functions, of the numbers."""
        args, kwargs = tree_map_only(PlainMask, lambda mask: mask.numbers, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        """What it is, without its numbers."""
        return f"PlainMask({tuple(self.shape)}, first_position={self.first_position})"


@dataclass(frozen=True)
class Visibility:
    """What the queries of a call attend to.

    Parameters
    ----------
    mask : Tensor, broadcastable to (B, H, L, num_keys), or None
        Boolean (True: attend) or float (added to the logits); None where `is_causal` says everything.
    is_causal : bool
        Whether the query at position i sees keys 0 … i only.
    first_position : int
        The position of the first query.
    num_keys : int
        How many of the first keys there are: those of a static cache after them hold nothing yet.
    """

    mask: Tensor | None
    is_causal: bool
    first_position: int
    num_keys: int

    def as_mask(self, query: Tensor) -> Tensor | None:
        """The same as a mask, broadcastable to (B, H, L, num_keys); None where every key is visible."""
        if not self.is_causal:
            return self.mask
        position = self.first_position + torch.arange(query.shape[2], device=query.device)[:, None]
        return (torch.arange(self.num_keys, device=query.device) <= position)[None, None]

    def with_bias(self, bias: Tensor, query: Tensor) -> Visibility:
        """The same with a bias, broadcastable to (B, H, L, num_keys), that is added to the logits."""
        mask = self.as_mask(query)
        if mask is not None:
            bias = torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask
        return replace(self, mask=bias, is_causal=False)


@outside_graphs
def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    *,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor:
    """The mask that transformers asks for: float, (B, 1, L, n), 0 where a query attends, else very negative.

    It is the one of eager attention, which every model is written for. For SDPA transformers leaves a mask
    out where it hides nothing but the future, or nothing at all, and `is_causal` of the attention module has
    to say which: that is wrong where the module says something else, or where the model then keeps some of
    the queries only. Here such a mask is a `PlainMask`.
    """
    arguments: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "attention_mask": attention_mask,
        "device": device,
        **kwargs,
    }
    skips: dict[str, Any] = {
        "allow_is_causal_skip": allow_is_causal_skip,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
    }
    mask = sdpa_mask(**arguments, **skips)
    if mask is not None:
        return as_bias(mask, dtype)
    make = functools.partial(eager_mask, dtype=dtype, **arguments)
    first = int(q_offset) - int(kv_offset) if allow_is_causal_skip else None
    # What of a static cache is not there yet must be in the future.
    if first is not None and not 0 <= first <= kv_length - q_length:
        return make()
    return PlainMask(make, (batch_size, 1, q_length, kv_length), dtype, device, first)


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the logits, as transformers' eager attention takes it."""
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)


def as_visible(mask: Tensor) -> Tensor:
    """A mask from which samplers see which keys a row may draw.

    A float mask that only shows keys and hides them becomes a boolean one. A row that hides all of its keys
    attends to all of them alike, as in eager attention; where there are such rows, it stays a float mask.
    """
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if not bool((visible | (mask <= torch.finfo(mask.dtype).min)).all()):
        return mask
    seeing = visible.any(-1, keepdim=True)
    return visible if bool(seeing.all()) else mask.masked_fill(~visible & seeing, -torch.inf)


def read_mask(
    mask: Tensor | None, is_causal: bool | None, module_is_causal: bool, length: int, num_keys: int
) -> Visibility:
    """What the mask of a call of L queries and n keys means.

    Parameters
    ----------
    mask : Tensor, broadcastable to (B, H, L, n or more), or None
    is_causal : bool, optional
        Of the call.
    module_is_causal : bool
        Of its attention module, where the call does not say.
    length, num_keys : int
        L and n.

    Raises
    ------
    ShapeError
        If there is no mask though queries are fewer than keys and hide the future: which of the keys the
        first query sees is then not known.
    """
    last = max(0, num_keys - length)  # queries are the last tokens, where the keys of others are cached
    if mask is None:
        causal = bool(module_is_causal if is_causal is None else is_causal) and length > 1
        if causal and length != num_keys:
            raise ShapeError(
                f"{length} causal queries attend to {num_keys} keys without an attention mask, which does "
                "not say where they stand: pass the mask that transformers' `create_causal_mask` makes."
            )
        return Visibility(None, causal, last, num_keys)
    if isinstance(mask, PlainMask) and not mask.is_read and num_keys <= mask.shape[-1]:
        if mask.first_position is None:
            return Visibility(None, False, last, num_keys)
        end = min(num_keys, mask.first_position + length)
        return Visibility(None, length > 1, mask.first_position, end)
    return Visibility(mask[..., :num_keys], False, last, num_keys)


def keep_selected(mask: Tensor | None, indices: Tensor, num_keys: int) -> Tensor:
    """A mask that also hides every key which the model did not select.

    Parameters
    ----------
    mask : Tensor, broadcastable to (B, H, L, n), or None
    indices : Tensor, (B, L, selected)
        The keys that each query attends to; negative ones stand for none.
    num_keys : int
        n.

    Raises
    ------
    ArgumentError
        If indices are not of this kind.
    """
    if indices.ndim != 3 or indices.is_floating_point():
        raise ArgumentError(
            f"indices is {indices.dtype} of shape {tuple(indices.shape)}; it must hold whole numbers of "
            "shape (batch, queries, selected keys)."
        )
    # One place more, for those that select nothing.
    places = torch.where(indices < 0, num_keys, indices).long()
    selected = torch.zeros(*indices.shape[:2], num_keys + 1, dtype=torch.bool, device=indices.device)
    selected = selected.scatter(-1, places, True)[:, None, :, :num_keys]
    if mask is None:
        return selected
    mask = mask[..., :num_keys]
    if mask.dtype == torch.bool:
        return mask & selected
    return mask.masked_fill(~selected, torch.finfo(mask.dtype).min)


def with_sink_key(
    query: Tensor, key: Tensor, value: Tensor, visible: Visibility, sinks: Tensor
) -> tuple[Tensor, Tensor, Visibility]:
    """Keys, values and their visibility with one key more, which takes probability and has the value 0.

    Parameters
    ----------
    query : Tensor, (B, H, L, E)
    key : Tensor, (B, Hkv, n, E)
    value : Tensor, (B, Hkv, n, Ev)
    visible : Visibility
    sinks : Tensor, (B, H, L, 1)
        The logit of that key for each query.
    """
    mask = visible.as_mask(query)
    bias = query.new_zeros(1) if mask is None else as_visible(mask)
    if bias.dtype == torch.bool:
        bias = query.new_zeros(bias.shape).masked_fill_(~bias, -torch.inf)
    bias = torch.cat((bias.expand(*query.shape[:-1], key.shape[2]), sinks.to(bias.dtype)), -1)
    key, value = (torch.cat((x, x.new_zeros(*x.shape[:2], 1, x.shape[3])), 2) for x in (key, value))
    return key, value, replace(visible, mask=bias, is_causal=False)
