"""Decoding by systematic draws from exact logits, in plain torch.

It gives the draws of `launch.decode`, bit by bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...streams import Stream
from ..inputs import Inputs
from ..masses import PAGE, UNITS, Masses, comb_offsets, locate_page, mass_dtype


@dataclass(frozen=True)
class DecodeResult:
    """The draws of N heads of M rows, and the averages of the values there.

    Parameters
    ----------
    parts : Tensor, float32, (N, M, R, Ev)
        The output of each replicate, less what the row's sink takes of it.
    indices : Tensor, int64, (N, M, R * S)
    row_mass : Tensor, int64, (N, M)
        The mass of all keys; 0 where the row attends to none, and then its output is 0; -1 where it sees a
        token that is not there, and then its output is NaN.
    row_exponent : Tensor, float32, (N, M)
    mass_bits : float
        A key of base-2 logit l has the mass 2^(l - row_exponent + mass_bits), rounded.
    sinks : Tensor, float32, (N, M), optional
        Of the inputs.
    """

    parts: Tensor
    indices: Tensor
    row_mass: Tensor
    row_exponent: Tensor
    mass_bits: float
    sinks: Tensor | None = None

    @property
    def log_sum_exp(self) -> Tensor:
        """The log-sum-exp of each row's natural logits, its sink among them: (N, M), float32.

        Rounded masses make it wrong by some 1e-5. -inf where the row sees nothing.
        """
        logs = self.row_mass.double().log2() + (self.row_exponent.double() - self.mass_bits)
        logs = logs * math.log(2)
        return (logs if self.sinks is None else torch.logaddexp(logs, self.sinks.double())).float()

    @property
    def visible(self) -> Tensor:
        """Whether a row attends to any key: bool, (N, M)."""
        return self.row_mass != 0

    @property
    def output(self) -> Tensor:
        """The mean over the replicates: (N, M, Ev), float32."""
        return self.parts.mean(2) if self.parts.shape[2] > 1 else self.parts[:, :, 0]

    @property
    def std_error(self) -> Tensor | None:
        """The standard error of the output, (N, M, Ev), by the spread of the replicates; None if R = 1."""
        replicates = self.parts.shape[2]
        return None if replicates == 1 else self.parts.std(2) / math.sqrt(replicates)


def decode(x: Inputs, num_samples: int, replicates: int, stream: Stream) -> DecodeResult:
    """Average the values at systematic draws: see `qtx_lab.kernels.decode.launch.decode`."""
    heads, rows, _, width = x.shape
    masses = Masses.of(x.logits(), stream, mass_dtype(num_samples * replicates))
    up, down = masses.shifts()
    weight = masses.page_mass << up >> down  # [N, M, T], in the row's unit
    end = weight.cumsum(-1)
    row_mass = end[..., -1]  # [N, M]

    offsets = comb_offsets(stream, replicates, rows)  # [N, M, R]
    points = comb_points(row_mass, offsets, num_samples).flatten(-2)  # [N, M, R S]
    page, rest = locate_page(end - weight, points)
    unit = rest << down.gather(-1, page) >> up.gather(-1, page)  # [N, M, R S]
    sums = masses.mass.gather(2, page[..., None].expand(*page.shape, PAGE)).cumsum(-1)  # [N, M, R S, PAGE]
    visible = row_mass > 0
    indices = page * PAGE + (sums <= unit[..., None]).sum(-1)
    indices = indices.masked_fill(~visible[..., None], 0)

    values = x.side_by_side().v.flatten(0, 1).float() * x.v_scale
    drawn = values.gather(1, indices.flatten(1)[..., None].expand(-1, -1, width))
    parts = drawn.view(heads, rows, replicates, num_samples, width).mean(-2)
    result = DecodeResult(
        torch.where(visible[..., None, None], parts, 0),
        indices,
        row_mass,
        masses.page_exponent.amax(-1),
        masses.fraction_bits + math.log2(UNITS[masses.dtype]),
    )
    if x.sinks is None:
        return result
    share = torch.sigmoid(result.log_sum_exp - x.sinks)
    return replace(result, parts=result.parts * share[..., None, None], sinks=x.sinks)


def comb_points(row_mass: Tensor, offsets: Tensor, num_samples: int) -> Tensor:
    """S equally spaced points in each row's mass: int64, (N, M, R, S).

    Parameters
    ----------
    row_mass : Tensor, int64, (N, M)
    offsets : Tensor, float64, (N, M, R)
        In units of the distance of the points.
    num_samples : int
        S.
    """
    step = (row_mass.double() / num_samples)[..., None, None]
    s = torch.arange(num_samples, device=row_mass.device, dtype=torch.float64)
    points = ((s + offsets[..., None]) * step).long()
    return torch.minimum(points, (row_mass - 1)[..., None, None])
