"""Decoding by draws from exact logits, in plain torch: what `decode` computes, in the order of the formulae."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..inputs import Inputs
from ..masses import PAGE, Masses, find_page, mass_dtype, offsets


def comb(total: Tensor, num_samples: int, replicates: int, length: int, seed: Tensor) -> Tensor:
    """Points of each row's mass total (N, M), int64 (N, M, R, S), equally far apart; rows of a group alike."""
    u = offsets(total.shape, replicates, length, seed)
    step = total.double() / num_samples
    s = torch.arange(num_samples, device=total.device, dtype=torch.float64)
    points = ((s + u[..., None]) * step[..., None, None]).long()
    return torch.minimum(points, (total - 1)[..., None, None])


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
