"""How wrong a cache's estimate may be: standard errors, from the draws in their order and all values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.cpu_decode.reference import DrawnRows, rows_at
from ..problem import blocks

BLOCK_ELEMENTS = 1 << 24
"""Size of a block of rows: its draws times their features."""

EXTRAPOLATED = 3.0
"""A key that was not drawn may weigh more than the mean by so many times what the heaviest draw does."""

HALF_WIDTH = 1.959964
"""Half of the width of a 95 % interval, in standard errors."""

ROUNDED_MASS = 1e-5
"""Mass of a proposal that cannot be distinguished from what rounding leaves."""

TINY = 1e-30


@dataclass(frozen=True)
class ValueMoments:
    """What is known of all values of N key heads.

    Parameters
    ----------
    mean, square : Tensor, float64, (N, 1, d)
        Of the values, and of their squares.
    radius : Tensor, float64, (N, 1), optional
        The largest distance of a value from the mean, for which all values are read. Without it nothing is
        known of what is hidden.
    """

    mean: Tensor
    square: Tensor
    radius: Tensor | None = None


@dataclass(frozen=True)
class RowErrors:
    """What is known of the errors of rows (N, M).

    Parameters
    ----------
    variance : Tensor, float64, (N, M, d)
        Of each coordinate, without rounding.
    hidden : Tensor, float64, (N, M)
        The error, as a length, that keys may make that were not drawn and of which the draws tell nothing;
        NaN where the radius of the values is not known.
    """

    variance: Tensor
    hidden: Tensor

    def reliability(self) -> Tensor:
        """The half-width of the 95 % intervals over what may be hidden, lengths over features, (N, M).

        Infinite where nothing is hidden, as all keys were drawn.
        """
        half_width = HALF_WIDTH * self.variance.sum(-1).sqrt()
        return torch.where(self.hidden > 0, half_width / self.hidden, torch.inf)


def row_errors(
    table: Tensor, features: int, drawn: DrawnRows, moments: ValueMoments, replicates: int
) -> RowErrors:
    """Errors of self-normalised estimates from draws at equally spaced points, in value order.

    With w_s the weights (of a replicate, sum_s w_s = 1 beside a sink's), pi_s the inclusion probabilities, o
    the output, and sums over the m draws of a replicate that are not sure (pi_s < 1) and count (w_s > 0):

        D = m / (2 m - 2) sum_s (1 - pi_s) |z_(s+1) - z_s|^2,   z_s = w_s (v_s - o),

    is the variance of such draws along an order (Wolter, Introduction to Variance Estimation, 1985, chapter
    8: successive differences), in which neighbours stand for one another. It knows what the order gains, but
    nothing of rare values that were not drawn. Of these tells

        A = sum_s (1 - pi_s) w_s^2 (pi_s (v_s - u)^2 + (1 - pi_s) (mean_j (v_j - u)^2)) + B

    with u the mean value of these draws and B = sum_s (1 - pi_s) var(w) (u - o)^2: a drawn key stands for
    itself, and for (1 - pi) / pi others that were not drawn, whose values are like those of all keys. The
    variance is the larger one of D and g A, where g <= 1 is what the order gains: D over A, both summed over
    coordinates, with the drawn values in place of all values in A.

    What is hidden, as a length: a key at the usual distance that weighs more than the mean draw, by three
    times what the heaviest draw does; or a key of the mean weight, at the largest distance of all values.

    On keys of SmolLM2 (layers 0, 3, 15, 29, 1,984 tokens), 95 % intervals cover .97-.99 for exact and int4
    proposals and .95-.99 for 16 components, of 32 or 256 draws. The standard error over the root mean squared
    error, row by row, is 1.0-2.3 in nine of ten rows.

    Parameters
    ----------
    table : Tensor, (N, C, features + d)
        Keys and values of the tokens.
    features : int
    drawn : DrawnRows
    moments : ValueMoments
    replicates : int
    """
    (n, m, total), width = drawn.indices.shape, table.shape[-1] - features
    variance = drawn.output.new_empty(n, m, width, dtype=torch.float64)
    hidden = drawn.output.new_empty(n, m, dtype=torch.float64)
    for block in blocks((n, m), BLOCK_ELEMENTS // max(1, total * table.shape[-1])):
        variance[block], hidden[block] = _block(table, features, drawn, moments, replicates, block)
    return RowErrors(variance, hidden)


def _block(
    table: Tensor,
    features: int,
    drawn: DrawnRows,
    moments: ValueMoments,
    replicates: int,
    block: tuple[slice, slice],
) -> tuple[Tensor, Tensor]:
    """`row_errors` of some rows."""
    heads = block[0]
    columns = (drawn.indices, drawn.weights, drawn.inclusion, drawn.proposed)
    index, w, pi, q = (x[block].unflatten(-1, (replicates, -1)) for x in columns)  # [n, m, R, S]
    w, pi, o = w.double() * replicates, pi.double(), drawn.output[block].double()
    unseen = 1 - (q.double() * (w > 0)).sum(-1).mean(-1)  # of the proposal
    unseen = torch.where(unseen > ROUNDED_MASS, unseen, 0)
    light = (w > 0) & (pi < 1)
    place = (~light).int().argsort(dim=-1, stable=True)  # those first, in their order
    index, w, pi, light = (x.gather(-1, place) for x in (index, w, pi, light))
    values = rows_at(table[heads], index.flatten(-2))[..., features:].double().unflatten(2, w.shape[-2:])
    w, share = w * light, (1 - pi) * light
    count = light.sum(-1).double()  # [n, m, R]
    several, everywhere = count / (count - 1).clamp_min(1), count.sum(-1)[..., None]  # [n, m, 1]
    mean_weight = (w.sum((-2, -1))[..., None] / everywhere.clamp_min(1)).clamp_min(TINY)
    centre = torch.einsum("nmrs,nmrsd->nmd", w, values) / (mean_weight * everywhere.clamp_min(1))

    z = w[..., None] * (values - o[:, :, None, None])
    both = (share[..., 1:] + share[..., :-1]) / 2 * light[..., 1:]
    steps = (z[..., 1:, :] - z[..., :-1, :]).square()
    differences = torch.einsum("nmrs,nmrsd,nmr->nmd", both, steps, several) / 2

    spread = (values - centre[:, :, None, None]).square()
    weight = share * w.square()
    of_weights = ((w - mean_weight[..., None]) * light).square().sum((-2, -1))[..., None]
    offset = share.sum((-2, -1))[..., None] * of_weights / (everywhere - 1).clamp_min(1)
    offset = offset * (centre - o).square()
    of_draws = torch.einsum("nmrs,nmrsd,nmr->nmd", weight, spread, several) + offset
    all_values = (moments.square[heads] - moments.mean[heads].square()).clamp_min(0)
    rest = (weight * (1 - pi)).sum((-2, -1))[..., None] * (
        all_values + (moments.mean[heads] - centre).square()
    )
    modelled = torch.einsum("nmrs,nmrsd->nmd", weight * pi, spread) + rest + offset
    gain = (differences.sum(-1) + TINY) / (of_draws.sum(-1) + TINY)
    variance = torch.maximum(differences, gain.clamp_max(1)[..., None] * modelled) / replicates**2

    # Where all draws are sure, and not all keys drawn, nothing else is known.
    away = (moments.mean[heads] - o).square() + all_values
    variance = torch.where(everywhere > 0, variance, unseen.square()[..., None] * away)
    if moments.radius is None:
        return variance, torch.full_like(unseen, torch.nan)
    radius = moments.radius[heads] + (moments.mean[heads] - o).norm(dim=-1)
    usual, mean_weight = away.sum(-1).sqrt(), mean_weight[..., 0]
    farther = mean_weight + EXTRAPOLATED * (w.amax((-2, -1)) - mean_weight)
    largest = torch.maximum(farther * usual, mean_weight * radius) / replicates
    hidden = torch.where(everywhere[..., 0] > 0, largest, unseen * radius)
    return variance, hidden
