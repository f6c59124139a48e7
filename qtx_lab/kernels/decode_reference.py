"""Decoding by draws from exact logits, in plain torch: what `decode` computes, in the order of the formulae."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox_reference import OFFSETS, ROUNDING, ROUNDING_ROUNDS, philox, uniform

PAGE = 64
"""Keys whose masses share an exponent. Draws depend on it, but on no other size of a block."""
GROUP = 8
"""Keys of a page whose masses are summed up by themselves: a draw is looked for among the sums, then among those keys."""
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Inputs:
    """What is attended to, heads of a group together.

    Parameters
    ----------
    q : Tensor, (N, M, E)
        N = B * Hkv key heads, M = G * L rows of each, position last.
    k : Tensor, (B, Hkv, n, E)
    v : Tensor, (B, Hkv, n, Ev)
    mask : Tensor, (B, Hkv * G, L, n), optional
        Boolean (True: attend) or added to the logits.
    length : int
        L.
    scale : float
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    length: int
    scale: float

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> Inputs:
        """Those of q (..., H, L, E), k (..., Hkv, n, E), v (..., Hkv, n, Ev); a mask broadcasts to (..., H, L, n)."""
        *_, length, features = q.shape
        heads, kv_heads = (x.shape[-3] if x.ndim > 2 else 1 for x in (q, k))
        lead = q.shape[:-3].numel() if q.ndim > 2 else 1
        if mask is not None:
            mask = mask.expand(*q.shape[:-1], k.shape[-2]).reshape(lead, heads, length, k.shape[-2])
        return cls(
            q.reshape(lead * kv_heads, heads // max(1, kv_heads) * length, features).contiguous(),
            k.reshape(lead, kv_heads, *k.shape[-2:]),
            v.reshape(lead, kv_heads, *v.shape[-2:]),
            mask,
            length,
            1 / math.sqrt(features) if scale is None else float(scale),
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, M, n, Ev."""
        return (*self.q.shape[:2], *self.v.shape[-2:])

    def logits(self) -> Tensor:
        """In base 2 and float32, (N, M, n); the cost is n numbers a row."""
        k = self.k.flatten(0, 1).float()
        logits = torch.bmm(self.q.float(), k.mT) * (self.scale * LOG2_E)
        if self.mask is None:
            return logits
        mask = self.mask.reshape(logits.shape)
        if mask.dtype == torch.bool:
            return logits.masked_fill_(~mask, -torch.inf)
        return logits + mask.float() * LOG2_E


@dataclass(frozen=True)
class Masses:
    """Rows of keys' masses in fixed point, a page's in units of its own.

    Sums of whole numbers do not depend on the order they are summed in, so that a seed gives the same draws however
    the keys are split among blocks. A mass is rounded up with the probability of what rounding down would lose, which
    leaves draws unbiased and adds less than 2 S / units to the variance of S draws, relative to that of their own.

    Parameters
    ----------
    mass : Tensor, int64, (N, M, T, PAGE)
        2^(l - top) * units, rounded; 0 past the last key.
    sums : Tensor, int64, (N, M, T)
    top : Tensor, float32, (N, M, T)
        The page's largest base-2 logit, rounded up; -inf where nothing is seen.
    dtype : torch.dtype
        What masses are kept in, int16 or int32.
    """

    mass: Tensor
    sums: Tensor
    top: Tensor
    dtype: torch.dtype

    @property
    def fine(self) -> int:
        """Bits behind the point of the row's common unit."""
        return fine_bits(self.sums.shape[-1], self.dtype)

    @classmethod
    def of(cls, logits: Tensor, seed: Tensor, dtype: torch.dtype) -> Masses:
        """The masses of base-2 logits (N, M, n) as they are kept in int16 or int32."""
        units = UNITS[dtype]
        heads, _, n = logits.shape
        logits = F.pad(logits, (0, -n % PAGE), value=-torch.inf).unflatten(-1, (-1, PAGE))
        top = logits.amax(-1).ceil()
        exact = torch.exp2(logits - top.masked_fill(top == -torch.inf, 0)[..., None]) * units
        quarter = torch.arange(logits.shape[2] * PAGE // 4, device=logits.device)
        head = torch.arange(heads, device=logits.device)[:, None]
        words = torch.stack(philox(seed, quarter, head, 0, ROUNDING, rounds=ROUNDING_ROUNDS), -1).view(
            heads, 1, -1, PAGE
        )
        mass = (exact + uniform(words)).floor().long()
        return cls(mass, mass.sum(-1), top, dtype)

    def shifts(self) -> tuple[Tensor, Tensor]:
        """Bits by which a page's units are shifted up and down to the row's common ones, (N, M, T) each."""
        highest = self.top.amax(-1, keepdim=True)
        apart = torch.where(self.top > -torch.inf, highest - self.top, 100).clamp_max(100).long()
        return (self.fine - apart).clamp_min(0), (apart - self.fine).clamp_min(0)


UNITS = {torch.int16: 65534.0, torch.int32: float(1 << 23)}
"""Of a page's largest mass, or up to half of them; one less than fits, since float32 may round a sum with a number below 1 up."""


def least_bits(dtype: torch.dtype) -> int:
    """How many a page's sum has at the least, where any key is seen: its largest mass is half of `UNITS` or more."""
    return int(UNITS[dtype] / 2).bit_length()


def fine_bits(pages: int, dtype: torch.dtype) -> int:
    """Bits behind the point with which a row's total stays below 2^56."""
    return (34 if dtype == torch.int16 else 26) - math.ceil(math.log2(max(1, pages)))


def mass_dtype(total: int) -> torch.dtype:
    """16 bits a mass for up to 4096 draws, whose variance their rounding raises by an eighth at the very most."""
    return torch.int16 if total <= 4096 else torch.int32


def offsets(shape: tuple[int, ...], replicates: int, length: int, seed: Tensor) -> Tensor:
    """Where the combs of rows (N, M) start, in parts of the distance of their points: (N, M, R), rows of a group alike."""
    heads, rows = shape
    device = seed.device
    words = philox(
        seed,
        torch.arange(replicates, device=device),
        torch.arange(rows, device=device)[:, None] % length,
        torch.arange(heads, device=device)[:, None, None],
        OFFSETS,
    )
    return words[0].double() * 2.0**-32


def comb(total: Tensor, num_samples: int, replicates: int, length: int, seed: Tensor) -> Tensor:
    """Points of each row's mass total (N, M), int64 (N, M, R, S), equally far apart; rows of a group alike."""
    u = offsets(total.shape, replicates, length, seed)
    step = total.double() / num_samples
    s = torch.arange(num_samples, device=total.device, dtype=torch.float64)
    points = ((s + u[..., None]) * step[..., None, None]).long()
    return torch.minimum(points, (total - 1)[..., None, None])


def find_page(start: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The pages in which points (N, M, T) lie, and how far behind the pages' starts (N, M, pages)."""
    page = torch.searchsorted(start, points, right=True).sub_(1).clamp_min_(0)
    return page, points - start.gather(-1, page)


@dataclass(frozen=True)
class Decoded:
    """What came of a decode.

    Parameters
    ----------
    parts : Tensor, float32, (N, M, R, Ev)
        The output of each replicate.
    indices : Tensor, int64, (N, M, R * S)
    seen : Tensor, bool, (N, M)
        Whether the row attends to anything; its output is 0 where not.
    """

    parts: Tensor
    indices: Tensor
    seen: Tensor

    def output(self) -> Tensor:
        """(N, M, Ev), float32."""
        return self.parts.mean(2) if self.parts.shape[2] > 1 else self.parts[:, :, 0]

    def std_error(self) -> Tensor | None:
        """(N, M, Ev), from how the replicates differ; None of one."""
        r = self.parts.shape[2]
        return None if r == 1 else self.parts.std(2) / math.sqrt(r)


def decode(x: Inputs, num_samples: int, replicates: int, seed: Tensor) -> Decoded:
    """Averages of the values at systematic draws: see `qtx_lab.kernels.decode.decode`."""
    masses = Masses.of(x.logits(), seed, mass_dtype(num_samples * replicates))
    up, down = masses.shifts()
    weight = masses.sums << up >> down  # [N, M, T]
    end = weight.cumsum(-1)
    total = end[..., -1]
    points = comb(total, num_samples, replicates, x.length, seed).flatten(-2)
    page, rest = find_page(end - weight, points)
    unit = rest << down.gather(-1, page) >> up.gather(-1, page)
    inside = masses.mass.gather(2, page[..., None].expand(*page.shape, PAGE)).cumsum(-1)  # [N, M, T, PAGE]
    seen = total > 0
    indices = page * PAGE + (inside <= unit[..., None]).sum(-1)
    indices = indices.masked_fill(~seen[..., None], 0)
    heads, rows, _, width = x.shape
    values = x.v.flatten(0, 1).float()
    drawn = values.gather(1, indices.flatten(1)[..., None].expand(-1, -1, width))
    parts = drawn.view(heads, rows, replicates, num_samples, width).mean(-2)
    return Decoded(parts * seen[..., None, None], indices, seen)
