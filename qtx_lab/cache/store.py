"""`TokenStore`: keys and values in the order of arrival, and the order of places in which they are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..samplers.value_order import FIRST_VALUES, ValueOrder

ROOM = 256
"""Tokens that a store has at least room for, beyond those it holds, where it grows."""

FEWEST_TO_SORT = 16
UNSORTED_SHARE = 16
"""New tokens stay at the last places until they are `FEWEST_TO_SORT`, and a sixteenth of all."""

FIRST_KEY = -1
"""The order key of tokens that are put first: below those of `ValueOrder`."""


@dataclass
class TokenStore:
    """Keys and values of N heads, appended to and never moved, and the order in which they are drawn.

    Draws are spread evenly along the places: those of tokens with an exact score first (`arrange`), then
    the others in value order (`ValueOrder`), last the newest as they came.

    Parameters
    ----------
    table : Tensor, (N, C, E + Ev)
        Keys and values side by side, in the order of arrival, and room for more.
    features : int
        E.
    order : Tensor, int64, (N, C)
        The token at each place.
    order_keys : Tensor, int64, (N, C)
        The order key of the token at each place.
    value_sums : Tensor, float64, (2, N, 1, Ev)
        Sums of the values and of their squares.
    length : int
        n, the tokens held.
    sorted_length : int
        Tokens at places that are sorted.
    value_order : ValueOrder, optional
        From the first `FIRST_VALUES` values; None before there are so many.
    crops : int
        How often tokens were forgotten: what is read later then belongs to others.
    """

    table: Tensor
    features: int
    order: Tensor
    order_keys: Tensor
    value_sums: Tensor
    length: int = 0
    sorted_length: int = 0
    value_order: ValueOrder | None = field(default=None, repr=False)
    crops: int = 0

    @classmethod
    def empty(cls, k: Tensor, v: Tensor) -> TokenStore:
        """A store for keys like k (N, n, E) and values like v (N, n, Ev), without a token."""
        heads, features, width = k.shape[0], k.shape[-1], v.shape[-1]
        places = torch.empty(heads, 0, dtype=torch.int64, device=k.device)
        sums = torch.zeros(2, heads, 1, width, dtype=torch.float64, device=k.device)
        return cls(k.new_empty(heads, 0, features + width), features, places, places.clone(), sums)

    @property
    def heads(self) -> int:
        """N."""
        return self.table.shape[0]

    @property
    def width(self) -> int:
        """Ev."""
        return self.table.shape[-1] - self.features

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float64 for float64 tokens, else float32."""
        return torch.promote_types(self.table.dtype, torch.float32)

    def keys(self, heads: slice = slice(None)) -> Tensor:
        """Keys of all tokens of some heads, (heads, n, E), a view."""
        return self.table[heads, : self.length, : self.features]

    def values(self, heads: slice = slice(None)) -> Tensor:
        """Values of all tokens of some heads, (heads, n, Ev), a view."""
        return self.table[heads, : self.length, self.features :]

    def places(self, heads: slice = slice(None)) -> Tensor:
        """The token at each place, int64, (heads, n), a view."""
        return self.order[heads, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes held, with the room to grow."""
        tensors = [self.table, self.order, self.order_keys, self.value_sums]
        if self.value_order is not None:
            tensors += [self.value_order.centre, self.value_order.axes]
        return sum(x.nbytes for x in tensors)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens k (N, m, E) and v (N, m, Ev), at the last places."""
        start, end = self.length, self.length + k.shape[1]
        self.table = grown(self.table, start, end)
        self.order, self.order_keys = grown(self.order, start, end), grown(self.order_keys, start, end)
        self.table[:, start:end, : self.features] = k
        self.table[:, start:end, self.features :] = v
        self.order[:, start:end] = torch.arange(start, end, device=k.device)
        added = v.to(torch.float64)
        added = torch.stack((added, added.square())).sum(2, keepdim=True)
        self.value_sums = self.value_sums + added  # estimates hold on to the earlier sums
        self.length = end
        if self.value_order is None and end >= FIRST_VALUES:
            self.value_order = ValueOrder.fit(self.values()[:, :FIRST_VALUES].to(self.dtype))

    def needs_sorting(self) -> bool:
        """Whether many tokens stand at unsorted places."""
        waiting = self.length - self.sorted_length
        return self.value_order is not None and waiting >= max(FEWEST_TO_SORT, self.length // UNSORTED_SHARE)

    def sort_new(self) -> Tensor:
        """Put the newest tokens where their values belong.

        Returns the former place of what is at each place now, int64, (N, n).
        """
        start, end = self.sorted_length, self.length
        if self.value_order is not None:
            tokens, known = self.order[:, start:end], self.order_keys[:, start:end]
            values = self.values().gather(1, tokens[..., None].expand(-1, -1, self.width))
            keys = self.value_order.keys(values.to(self.dtype))
            known.copy_(torch.where(known == FIRST_KEY, FIRST_KEY, keys))
        return self._sort()

    def arrange(self, first: Tensor) -> Tensor:
        """Put tokens `first` (N, T) at the first places and all others in value order.

        Returns the token at each place, int64, (N, n), a view.
        """
        n = self.length
        self.order[:, :n] = torch.arange(n, device=first.device)
        if self.value_order is None:
            self.order_keys[:, :n] = 0
        else:
            self.order_keys[:, :n] = self.value_order.keys(self.values().to(self.dtype))
        self.order_keys[:, :n].scatter_(1, first, FIRST_KEY)
        self._sort()
        return self.places()

    def crop(self, length: int) -> Tensor | None:
        """Forget all but the first `length` tokens.

        Returns the former place of what is at each place now, int64, (N, length); None where all stay, as
        the tokens that are forgotten were at the last places.
        """
        stays = None
        if self.value_order is None or length < self.sorted_length:
            stays = (self.places() < length).nonzero()[:, 1].view(self.heads, length)
            for x in (self.order, self.order_keys):
                x[:, :length] = x[:, : self.length].gather(1, stays)
        gone = self.values()[:, length:].to(torch.float64)
        self.value_sums = self.value_sums - torch.stack((gone, gone.square())).sum(2, keepdim=True)
        self.length, self.sorted_length = length, min(self.sorted_length, length)
        if length < FIRST_VALUES:  # the order was fitted to values that are gone
            self.value_order, self.sorted_length = None, 0
        self.crops += 1
        return stays

    def select(self, heads: Tensor) -> TokenStore:
        """A store with some of the heads, int64, (N',), with repetitions; its memory is its own."""
        order = self.value_order
        return replace(
            self,
            table=self.table[heads],
            order=self.order[heads],
            order_keys=self.order_keys[heads],
            value_sums=self.value_sums[:, heads],
            value_order=None if order is None else ValueOrder(order.centre[heads], order.axes[heads]),
        )

    def _sort(self) -> Tensor:
        n = self.length
        index = self.order_keys[:, :n].argsort(dim=-1, stable=True)
        for x in (self.order, self.order_keys):
            x[:, :n] = x[:, :n].gather(1, index)
        self.sorted_length = n if self.value_order is not None else 0
        return index


def grown(x: Tensor, used: int, needed: int) -> Tensor:
    """x with room for `needed` along dimension 1, of which the first `used` are in use.

    Where it grows it has a quarter more than is used.
    """
    if x.shape[1] >= needed:
        return x
    larger = x.new_zeros(
        x.shape[0], needed if used == 0 else max(needed, used + used // 4 + ROOM), *x.shape[2:]
    )
    larger[:, :used] = x[:, :used]
    return larger
