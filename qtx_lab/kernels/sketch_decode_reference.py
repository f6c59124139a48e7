"""Decoding by draws from a sketch of the keys, in plain torch: what `sketch_decode` computes, in the order of the formulae."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, DtypeError
from ..samplers.base import check_count
from ..samplers.learned_proposal import best_low_rank
from .decode_reference import LOG2_E, PAGE, Inputs, Masses, comb, find_page, mass_dtype

FP8_LARGEST = 448.0
FITTED_KEYS = 8192
"""A low-rank sketch is fitted to no more keys than that, evenly spread."""


@dataclass(frozen=True)
class Sketch:
    """A small table that all of a row's logits are guessed from.

    Parameters
    ----------
    kind : {"low-rank", "int4"}
    table : Tensor, (N, r, n) or (N, ceil(E / 2), n)
        float32, float16 or float8_e4m3fn: a logit is about scale q^T weight table, or of bytes: 8 + the level of an even
        feature in the lower half, that of the next one in the upper half.
    weight : Tensor, float32, (N, E, r) or (N, E)
        The queries' map, or the step of each feature's levels.
    key_map : Tensor, float32, (N, E, r) or (N, 1, E)
        The keys' map, or what is taken off them first.
    """

    kind: str
    table: Tensor
    weight: Tensor
    key_map: Tensor

    def columns(self, k: Tensor) -> Tensor:
        """What the table holds of keys (N, m, E), by the same maps or steps."""
        k = k.float()
        if self.kind == "low-rank":
            dtype = self.table.dtype
            limit = {torch.float8_e4m3fn: FP8_LARGEST, torch.float16: 6e4}.get(dtype, torch.inf)
            return (k @ self.key_map).mT.clamp(-limit, limit).to(dtype)
        level = ((k - self.key_map) / self.weight[:, None]).round().clamp(-7, 7) + 8
        nibbles = F.pad(level.to(torch.uint8), (0, k.shape[-1] % 2), value=8).mT  # [N, E, m]
        return nibbles[:, ::2] | nibbles[:, 1::2] << 4

    def scores(self, x: Inputs) -> Tensor:
        """The guessed logits, base 2, but for a shift of each row: (N, M, n), float32."""
        q = x.q.float()
        factor = x.scale * LOG2_E
        if self.kind == "low-rank":
            rows = torch.bmm(q, self.weight) * factor
            if self.table.dtype == torch.float32:
                return torch.bmm(rows, self.table)
            table = self.table.float()
            unit = rows.abs().amax(-1, keepdim=True).clamp_min(1e-30)
            rows = rows / unit
            upper = rows.half().float()
            lower = (
                ((rows - upper) * 2048).half().float()
            )  # both halves: a draw must not hang on their rounding
            return (torch.bmm(upper, table) + torch.bmm(lower, table) / 2048) * unit
        rows = q * self.weight[:, None] * factor
        unit = rows.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        rows = F.pad((rows / unit).half().float(), (0, rows.shape[-1] % 2))
        even, odd = ((self.table >> shift & 15).float() - 8 for shift in (0, 4))
        return (torch.bmm(rows[..., ::2], even) + torch.bmm(rows[..., 1::2], odd)) * unit

    def nbytes(self) -> int:
        """What a scan reads."""
        return self.table.nbytes + self.weight.nbytes


def low_rank_sketch(
    k: Tensor, rank: int = 16, *, queries: Tensor | None = None, dtype: torch.dtype = torch.float16
) -> Sketch:
    """The best `rank` numbers a key for these queries, all directions alike where there are none.

    Parameters
    ----------
    k : Tensor, (..., Hkv, n, E)
    rank : int
        r, 1 <= r <= E.
    queries : Tensor, (..., H, L, E), optional
    dtype : torch.dtype
        float32, float16 or float8_e4m3fn, the last for GPUs of compute capability 8.9 or newer.

    Raises
    ------
    ArgumentError, DtypeError
        If rank or dtype is not allowed.
    """
    check_count("rank", rank)
    if rank > k.shape[-1]:
        raise ArgumentError(f"rank={rank} is not allowed: it must be at most E={k.shape[-1]}.")
    if dtype not in (torch.float32, torch.float16, torch.float8_e4m3fn):
        raise DtypeError(f"dtype={dtype} is not allowed: it must be float32, float16 or float8_e4m3fn.")
    keys = k.detach().flatten(0, -3).float()
    heads, n, features = keys.shape
    if queries is None:
        q = torch.eye(features, device=k.device).expand(heads, -1, -1)
    else:
        q = queries.detach().float().reshape(heads, -1, features)
    a, b = best_low_rank(q, keys[:, :: -(-n // FITTED_KEYS)], rank)
    if dtype != torch.float32:
        largest = (keys @ b).abs().amax(1, keepdim=True).clamp_min(1e-30)  # [N, 1, r]
        step = largest / (FP8_LARGEST if dtype == torch.float8_e4m3fn else 1024.0)
        a, b = a * step, b / step
    empty = keys.new_empty(heads, rank, 0).to(dtype)
    sketch = Sketch("low-rank", empty, a.contiguous(), b.contiguous())
    return replace(sketch, table=_with_room(sketch.columns(keys), n)[..., :n])


def int4_sketch(k: Tensor) -> Sketch:
    """Each feature of the keys k (..., Hkv, n, E) in 15 levels, in steps of its own."""
    keys = k.detach().flatten(0, -3).float()
    n = keys.shape[1]
    centre = keys.mean(1, keepdim=True)  # a shift of the row's logits
    step = ((keys - centre).abs().amax(1) / 7).clamp_min(1e-30)
    sketch = Sketch("int4", torch.empty(0), step.contiguous(), centre)
    return replace(sketch, table=_with_room(sketch.columns(keys), n)[..., :n])


def _with_room(table: Tensor, columns: int) -> Tensor:
    """A table of so many columns or a few more, the first of them these; rows start at multiples of 128 bytes or numbers."""
    room = table.new_zeros(*table.shape[:2], -(-columns // 128) * 128)
    room[..., : table.shape[-1]] = table
    return room


class GrowingSketch:
    """The sketch of keys that grow, with room for more: what was sketched is sketched again only when keys moved."""

    def __init__(self, make: Callable[[Tensor], Sketch]):
        self.make = make
        self.held: Sketch | None = None
        self.length = 0
        self.layout: tuple[int, ...] = ()

    def of(self, keys: Tensor, layout: tuple[int, ...]) -> Sketch:
        """That of keys (N, n, E), of which those held so far lie as they lay while `layout` is the same."""
        n = keys.shape[1]
        held = self.held
        if held is None or layout != self.layout or not self.length <= n <= held.table.shape[-1]:
            made = self.make(keys)
            held = self.held = replace(made, table=_with_room(made.table, n + max(512, n // 8)))
            self.layout = layout
        elif n > self.length:
            held.table[..., self.length : n] = held.columns(keys[:, self.length :])
        self.length = n
        return replace(held, table=held.table[..., :n])


@dataclass(frozen=True)
class SketchDecoded:
    """What came of a decode by a sketch.

    Parameters
    ----------
    output : Tensor, (N, M, Ev), v's dtype
    std_error : Tensor, float32, (N, M, Ev)
    indices : Tensor, int64, (N, M, R * S)
    log_weights : Tensor, float32, (N, M, R * S)
        Base 2, before normalisation; -inf for a key that its replicate drew before.
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


def defensive_inverse(n: int, defensive: float) -> int:
    """The whole number c of 1 / c: the share of the guessed mass that every key gets on top of its own."""
    return max(1, round(n * (1 - defensive) / defensive))


def sketch_decode(
    x: Inputs, sketch: Sketch, num_samples: int, replicates: int, seed: Tensor, *, defensive: float = 0.02
) -> SketchDecoded:
    """Self-normalised averages of the values at draws from a sketch: see `qtx_lab.kernels.sketch_decode.sketch_decode`."""
    heads, rows, n, width = x.shape
    masses = Masses.of(sketch.scores(x), seed, mass_dtype(num_samples * replicates))
    up, down = masses.shifts()
    own = torch.where((down == 0)[..., None], masses.mass << up[..., None], 0)  # [N, M, T, PAGE]
    each = (own.sum((-2, -1)) // defensive_inverse(n, defensive)).clamp_min(1)
    there = (torch.arange(own.shape[-2] * PAGE, device=own.device) < n).view(own.shape[-2:])
    own = own + there * each[..., None, None]
    weight = own.sum(-1)
    end = weight.cumsum(-1)
    total = end[..., -1]
    points = comb(total, num_samples, replicates, x.length, seed)  # [N, M, R, S]
    page, rest = find_page(end - weight, points.flatten(-2))
    inside = own.gather(2, page[..., None].expand(*page.shape, PAGE))  # [N, M, R S, PAGE]
    place = (inside.cumsum(-1) <= rest[..., None]).sum(-1)
    indices = page * PAGE + place
    chance = inside.gather(-1, place[..., None])[..., 0].double() / total[..., None].double()
    fresh = torch.ones_like(points, dtype=torch.bool)
    apart = indices.view(points.shape)
    fresh[..., 1:] = apart[..., 1:] != apart[..., :-1]

    keys, values = (y.flatten(0, 1).float() for y in (x.k, x.v))
    at = indices.flatten(1)[..., None]
    drawn_k = keys.gather(1, at.expand(-1, -1, keys.shape[-1])).view(*indices.shape, -1)
    drawn_v = values.gather(1, at.expand(-1, -1, width)).view(heads, rows, replicates, num_samples, width)
    logits = torch.einsum("nmte,nme->nmt", drawn_k, x.q.float()) * (x.scale * LOG2_E)
    included = (chance * num_samples).clamp_max(1).float()
    log_weights = (logits - included.log2()).masked_fill(~fresh.flatten(-2), -torch.inf)
    log_w = log_weights.view(points.shape)
    log_normaliser = (log_w * math.log(2)).logsumexp(-1) / math.log(2)  # [N, M, R]
    w = torch.exp2(log_w - log_normaliser[..., None])
    outputs = torch.einsum("nmrs,nmrsd->nmrd", w, drawn_v)
    a = (1 - included.view(points.shape)) * w.square()
    variance = torch.einsum("nmrs,nmrsd->nmrd", a, (drawn_v - outputs[..., None, :]).square())
    std_error = variance.sum(2).sqrt() / replicates
    return SketchDecoded(outputs.mean(2).to(x.v.dtype), std_error, indices, log_weights, log_normaliser)
