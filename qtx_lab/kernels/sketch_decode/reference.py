"""Decoding by draws from a sketch of the keys, in plain torch: what `sketch_decode` computes, in the order of the formulae."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_count
from ...errors import ArgumentError, DtypeError
from ...samplers.learned_proposal import best_low_rank
from ..inputs import LOG2_E, Inputs
from ..masses import PAGE, Masses, find_page, least_bits, mass_dtype, offsets

FITTED_KEYS = 8192
"""A sketch is fitted to no more keys than that, evenly spread."""
LARGEST = {torch.float16: 1024.0, torch.int8: 127.0, torch.uint8: 7.0}
"""What the largest number of a component is scaled to. Of uint8 each byte holds two, of 4 bits."""
UPPER, LOWER = 127, 128
"""A query's component in units of its largest's 1 / (UPPER LOWER): an upper digit from -UPPER to UPPER, and a lower one."""
SMALLEST = 1e-30


@dataclass(frozen=True)
class Sketch:
    """A small table that all of a row's logits are guessed from: a logit is about scale q^T weight table_j, but for a shift.

    Parameters
    ----------
    table : Tensor, (N, n, r) or (N, n, ceil(r / 2))
        float16, int8, or uint8: 8 + a number of the first half of the components in the lower four bits, 8 + one of the
        second half in the upper ones.
    weight : Tensor, float32, (N, E, r)
        The queries' map.
    key_map : Tensor, float32, (N, E, r)
        The keys' map, after `centre` is taken off them.
    centre : Tensor, float32, (N, 1, E)
    """

    table: Tensor
    weight: Tensor
    key_map: Tensor
    centre: Tensor

    @property
    def kind(self) -> str:
        """For a result's `diagnostics`."""
        return "int4" if self.table.dtype == torch.uint8 else "low-rank"

    def lines(self, k: Tensor) -> Tensor:
        """What the table holds of keys (N, m, E), by the same maps."""
        found, dtype = (k.float() - self.centre) @ self.key_map, self.table.dtype
        if dtype == torch.float16:
            return found.clamp(-6e4, 6e4).half()
        found = found.round().clamp(-LARGEST[dtype], LARGEST[dtype])
        if dtype == torch.int8:
            return found.char()
        low, high = halves((found + 8).byte(), 8)
        return low | high << 4

    def digits(self, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Base-2 queries by the table's components, in two digits: upper and lower (N, M, r), unit (N, M, 1).

        A logit is unit (LOWER upper + lower) . table_j where the table is of whole numbers, so that it has no rounding but its
        own; unit (upper + lower / 2048) . table_j where it is of halves. Made in float64: no digit hangs on an order of sums.
        """
        rows = torch.bmm(x.q.double(), self.weight.double()) * (x.scale * LOG2_E)
        largest = rows.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
        if self.table.dtype == torch.float16:
            part = (rows / largest).float()
            upper = part.half()
            return upper, ((part - upper.float()) * 2048).half(), largest.float()
        level = (rows / largest * (UPPER * LOWER) + 0.5).floor()
        upper = ((level + LOWER // 2) / LOWER).floor()
        return upper.char(), (level - LOWER * upper).char(), (largest / (UPPER * LOWER)).float()

    def scores(self, x: Inputs) -> Tensor:
        """The guessed logits, base 2, but for a shift of each row: (N, M, n), float32."""
        upper, lower, unit = self.digits(x)
        if self.table.dtype == torch.float16:
            table = self.table.float().mT
            return (torch.bmm(upper.float(), table) + torch.bmm(lower.float(), table) / 2048) * unit
        both = LOWER * upper.double() + lower.double()
        if self.table.dtype == torch.int8:
            return torch.bmm(both, self.table.double().mT).float() * unit
        low, high = ((self.table >> shift & 15).double().mT - 8 for shift in (0, 4))
        both_low, both_high = halves(both, 0)
        return (torch.bmm(both_low, low) + torch.bmm(both_high, high)).float() * unit

    def nbytes(self) -> int:
        """What a scan reads."""
        return self.table.nbytes + self.weight.nbytes


def halves(x: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """The first and the second half of the last dimension, which is filled up to an even number."""
    first, second = F.pad(x, (0, x.shape[-1] % 2), value=fill).chunk(2, -1)
    return first, second


def low_rank_sketch(
    k: Tensor, rank: int = 16, *, queries: Tensor | None = None, dtype: torch.dtype = torch.int8
) -> Sketch:
    """The best `rank` numbers a key for these queries, all directions alike where there are none.

    Parameters
    ----------
    k : Tensor, (..., Hkv, n, E)
    rank : int
        r, 1 <= r <= E.
    queries : Tensor, (..., H, L, E), optional
    dtype : torch.dtype
        int8, each component in 255 levels of its own, or float16.

    Raises
    ------
    ArgumentError, DtypeError
        If rank or dtype is not allowed.
    """
    if dtype not in (torch.int8, torch.float16):
        raise DtypeError(f"dtype={dtype} is not allowed: it must be int8 or float16.")
    return _sketch(k, rank, queries, dtype)


def int4_sketch(k: Tensor, rank: int | None = None, *, queries: Tensor | None = None) -> Sketch:
    """`rank` numbers a key, E where None, of 4 bits: each principal component in 15 levels of its own.

    Components, not the channels themselves: a query weighs all channels, and the rounding of the large ones would drown the
    directions in which keys hardly differ. Arguments and errors as for `low_rank_sketch`.
    """
    return _sketch(k, k.shape[-1] if rank is None else rank, queries, torch.uint8)


def _sketch(k: Tensor, rank: int, queries: Tensor | None, dtype: torch.dtype) -> Sketch:
    check_count("rank", rank)
    if rank > k.shape[-1]:
        raise ArgumentError(f"rank={rank} is not allowed: it must be at most E={k.shape[-1]}.")
    keys = k.detach().flatten(0, -3).float()
    heads, n, features = keys.shape
    centre = keys.mean(1, keepdim=True)
    if queries is None:
        q = torch.eye(features, device=k.device).expand(heads, -1, -1)
    else:
        q = queries.detach().float().reshape(heads, -1, features)
    a, b = best_low_rank(q, keys[:, :: -(-n // FITTED_KEYS)] - centre, rank)
    step = ((keys - centre) @ b).abs().amax(1, keepdim=True).clamp_min(SMALLEST) / LARGEST[dtype]  # [N, 1, r]
    empty = keys.new_empty(0, dtype=dtype)
    sketch = Sketch(empty, (a * step).contiguous(), (b / step).contiguous(), centre)
    return replace(sketch, table=sketch.lines(keys))


GROWING = threading.Lock()
"""Threads may attend to a cache at the same time."""


class GrowingSketch:
    """The sketch of keys that grow, with room for more: what was sketched is sketched again only when keys moved."""

    def __init__(self, make: Callable[[Tensor], Sketch]):
        self.make = make
        self.held: Sketch | None = None
        self.length = 0
        self.layout: tuple[int, ...] = ()

    def of(self, keys: Tensor, layout: tuple[int, ...]) -> Sketch:
        """That of keys (N, n, E), of which those held so far lie as they lay while `layout` is the same."""
        with GROWING:
            return self._of(keys, layout)

    def _of(self, keys: Tensor, layout: tuple[int, ...]) -> Sketch:
        n = keys.shape[1]
        held = self.held
        if held is None or layout != self.layout or not self.length <= n <= held.table.shape[1]:
            made = self.make(keys)
            held = self.held = replace(made, table=F.pad(made.table, (0, 0, 0, max(512, n // 8))))
            self.layout = layout
        elif n > self.length:
            held.table[:, self.length : n] = held.lines(keys[:, self.length :])
        self.length = n
        return replace(held, table=held.table[:, :n])


@dataclass(frozen=True)
class SketchDecoded:
    """What came of a decode by a sketch.

    Parameters
    ----------
    output : Tensor, (N, M, Ev), v's dtype
    std_error : Tensor, float32, (N, M, Ev)
    indices : Tensor, int64, (N, M, R * S)
    log_weights : Tensor, float32, (N, M, R * S)
        Base 2, before normalisation; -inf for a draw that found no key.
    log_normaliser : Tensor, float32, (N, M, R)
    """

    output: Tensor
    std_error: Tensor
    indices: Tensor
    log_weights: Tensor
    log_normaliser: Tensor

    def weights(self) -> Tensor:
        """The weight of each draw, (N, M, R * S), float32."""
        replicates = self.log_normaliser.shape[-1]
        apart = self.log_weights.unflatten(-1, (replicates, -1)) - self.log_normaliser[..., None]
        return (torch.exp2(apart) / replicates).flatten(-2)


def defensive_inverse(pages: int, defensive: float) -> int:
    """The whole number c of 1 / c: the share of the guessed mass that every page is given at the least."""
    return max(1, round(pages * (1 - defensive) / defensive))


SEARCHED_PAGES, NEWTON_STEPS = 64, 6
"""Of the search for the mass from which a key is sure: the pages of the largest keys, at most so many, that it goes through
key by key, as many as it samples of the others, and its steps. See `Proposal.sure_mass`."""


@dataclass(frozen=True)
class Proposal:
    """Whole masses of keys, made of a sketch's, from which they are drawn: v_j 2^up of the row's common units, v_j at most `cap`.

    A key's own mass, in the units of its page, is raised by `besides`. A page of little mass is raised by whole powers of two
    until it has its share `least` of the defensive part, of which `besides` is a key's. So all arithmetic within a page is
    that of small whole numbers, and no key has less than about epsilon / (2 n) of the row.

    Parameters
    ----------
    up : Tensor, int64, (N, M, T)
    besides : Tensor, int64, (N, M, T)
    coarsest : Tensor, int64, (N, M, 1)
        No page's `up` is more.
    """

    up: Tensor
    besides: Tensor
    coarsest: Tensor

    @classmethod
    def of(cls, masses: Masses, defensive: float) -> Proposal:
        up, down = masses.shifts()
        pages = up.shape[-1]
        total = torch.where(down == 0, masses.sums << up, 0).sum(-1, keepdim=True)
        least = (total.double() / defensive_inverse(pages, defensive)).long().clamp_min(1)
        # 2^k s reaches `least` for k the difference of their exponents, or one more.
        wanted = torch.frexp(least.double()).exponent.long()
        missing = (wanted - torch.frexp(masses.sums.double()).exponent).clamp_min(0)
        missing = missing + (masses.sums << missing < least)
        up = torch.maximum(up, missing)
        coarsest = (wanted - least_bits(masses.dtype) + 1).clamp_min(masses.fine)
        return cls(up, ((least >> up) // PAGE).clamp_min(1), coarsest)

    def sure_mass(self, masses: Masses, there: Tensor, num_samples: int) -> Tensor:
        """The mass c from which a key is drawn surely, int64, (N, M, 1), about that for which sum_j min(1, v_j / c) is S.

        By Newton's steps for c S - sum_j min(v_j, c), a convex function, from above: no step falls below its root, so that no
        more than S draws are spent, which would cost the heaviest keys their certainty. Of at most `SEARCHED_PAGES`
        pages, those whose largest keys are the largest, all keys are looked at; of the others a sample of pages, every
        `stride`-th: what c cuts off there is scaled up by their mass. Where the sample has sure keys, c is a sixteenth larger: a
        few draws less cost only themselves. It is rounded up to what every page can hold.
        """
        pages = self.up.shape[2]
        stride = -(-pages // SEARCHED_PAGES)
        first = first_searched(masses.top)  # [N, M, 1]
        searched = masses.top >= first  # [N, M, T]
        keys = there.sum(-1)
        whole = masses.sums + keys * self.besides << self.up  # [N, M, T]
        own = torch.where(there, masses.mass + self.besides[..., None] << self.up[..., None], 0)
        sampled = ~searched & (torch.arange(pages, device=own.device) % stride == 0)
        rest = torch.where(searched, 0, whole).sum(-1, keepdim=True).double()
        seen = torch.where(sampled, whole, 0).sum(-1, keepdim=True).double()
        ratio = torch.where(seen > 0, rest / seen, 0.0)  # [N, M, 1]
        total = whole.sum(-1, keepdim=True)
        c = (total.double() / num_samples).ceil().long()
        some = torch.zeros_like(c)
        for _ in range(NEWTON_STEPS):
            over = own >= c[..., None]
            sure, excess = over.sum(-1), torch.where(over, own, 0).sum(-1)  # [N, M, T]
            sure, some, excess, other = (
                torch.where(where, x, 0).sum(-1, keepdim=True)
                for x in (sure, excess)
                for where in (searched, sampled)
            )
            left = num_samples - sure.double() - some.double() * ratio
            light = total.double() - excess.double() - other.double() * ratio
            c = torch.where(
                left > 0.5, torch.minimum(c, (light / left.clamp_min(0.5)).ceil().long()), c
            ).clamp_min(1)
        c = torch.where(some > 0, c + (c >> 4), c)
        return c + (1 << self.coarsest) - 1 >> self.coarsest << self.coarsest


def first_searched(top: Tensor) -> Tensor:
    """The least exponent of at most `SEARCHED_PAGES` pages, of `top` (N, M, T): float32, (N, M, 1); above all if those of the
    largest exponent are more."""
    highest = top.amax(-1, keepdim=True)
    below = torch.full_like(highest, -1)
    for bit in (64, 32, 16, 8, 4, 2, 1):
        few = (top >= highest - (below + bit)).sum(-1, keepdim=True) <= SEARCHED_PAGES
        below = torch.where(few, below + bit, below)
    return highest - below


def sketch_decode(
    x: Inputs, sketch: Sketch, num_samples: int, replicates: int, seed: Tensor, *, defensive: float = 0.02
) -> SketchDecoded:
    """Self-normalised averages of the values at draws from a sketch: see `qtx_lab.kernels.sketch_decode.sketch_decode`."""
    heads, rows, n, width = x.shape
    masses = Masses.of(sketch.scores(x), seed, mass_dtype(num_samples * replicates))
    there = (torch.arange(masses.mass[0, 0].numel(), device=x.q.device) < n).view(masses.mass.shape[2:])
    proposal = Proposal.of(masses, defensive)
    up, besides = proposal.up, proposal.besides
    if n <= num_samples:  # every key is sure
        up, sure = torch.zeros_like(up), torch.ones_like(up[..., :1])
    else:
        sure = proposal.sure_mass(masses, there, num_samples)  # [N, M, 1]
    cap = sure >> up
    own = torch.where(
        there, torch.minimum(masses.mass + besides[..., None], cap[..., None]), 0
    )  # [N, M, T, PAGE]
    weight = own.sum(-1) << up
    end = weight.cumsum(-1)
    total = end[..., -1:]
    step = torch.maximum(sure, -(-total // num_samples))  # [N, M, 1]
    u = offsets((heads, rows), replicates, x.length, seed)[..., None]
    offset = torch.minimum((u * step[..., None]).long(), step[..., None] - 1)  # [N, M, R, 1]
    points = (torch.arange(num_samples, device=u.device) * step[..., None] + offset).flatten(-2)
    found = points < total
    points = points.masked_fill(~found, 0)
    page, rest = find_page(end - weight, points)
    rest = rest >> up.gather(-1, page)
    inside = own.gather(2, page[..., None].expand(*page.shape, PAGE))  # [N, M, R S, PAGE]
    place = (inside.cumsum(-1) <= rest[..., None]).sum(-1)
    indices = page * PAGE + place
    chance = (inside.gather(-1, place[..., None])[..., 0] << up.gather(-1, page)).double() / step.double()

    keys, values = (y.flatten(0, 1).float() for y in (x.k, x.v))
    at = indices.flatten(1)[..., None]
    drawn_k = keys.gather(1, at.expand(-1, -1, keys.shape[-1])).view(*indices.shape, -1)
    drawn_v = values.gather(1, at.expand(-1, -1, width)).view(heads, rows, replicates, num_samples, width)
    logits = torch.einsum("nmte,nme->nmt", drawn_k, x.q.float()) * (x.scale * LOG2_E)
    included = chance.float()
    log_weights = (logits - included.log2()).masked_fill(~found, -torch.inf)
    log_w = log_weights.unflatten(-1, (replicates, num_samples))
    log_normaliser = (log_w * math.log(2)).logsumexp(-1) / math.log(2)  # [N, M, R]
    w = torch.exp2(log_w - log_normaliser[..., None])
    outputs = torch.einsum("nmrs,nmrsd->nmrd", w, drawn_v)
    a = (1 - included.view(w.shape)) * w.square()
    variance = torch.einsum("nmrs,nmrsd->nmrd", a, (drawn_v - outputs[..., None, :]).square())
    std_error = variance.sum(2).sqrt() / replicates
    return SketchDecoded(outputs.mean(2).to(x.v.dtype), std_error, indices, log_weights, log_normaliser)
