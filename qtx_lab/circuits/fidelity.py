"""How far measured rows are from the rows that were loaded, and how far they would be without noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count
from ..errors import ArgumentError, DtypeError, ShapeError
from .base import check_rows


@dataclass(frozen=True, eq=False)
class Measure:
    """A distance or a fidelity of each row.

    Parameters
    ----------
    value : Tensor, float64, (R,)
        The measure of the counts. It is NaN in a row without counts, as are the floor and the error.
    floor : Tensor, float64, (R,)
        Mean over ideal devices with the same number of shots. A finite sample is never at distance 0.
    floor_range : Tensor, float64, (2, R)
        Lower and upper end of the range that holds 95 % of the ideal devices' values. Shots alone do not
        explain a `value` outside it.
    std_error : Tensor, float64, (R,)
        Standard deviation of `value` over repetitions of the shots, by the bootstrap. It is too large, by up
        to a half, where a row is at its floor. Where all shots gave one key, which says little of how others
        would fall, one more shot from the row itself is among those that are drawn from. NaN for a single
        resample.
    """

    value: Tensor
    floor: Tensor
    floor_range: Tensor
    std_error: Tensor


def total_variation(
    counts: Tensor, p: Tensor, *, resamples: int = 200, generator: torch.Generator | None = None
) -> Measure:
    """Compute half of sum_j |counts_j / S - p_j|: the most by which a set of keys can be too probable.

    Parameters
    ----------
    counts : Tensor, whole numbers, (R, n)
        How often each key was measured, as `RowCounts.counts`. S is the sum of a row.
    p : Tensor, (R, n)
        The rows that were loaded.
    resamples : int
        Number of simulated repetitions behind `floor`, with shots drawn from p, and behind `std_error`, with
        shots drawn from the counts.
    generator : torch.Generator, optional
        The only source of randomness.

    Returns
    -------
    Measure

    Raises
    ------
    ArgumentError, ShapeError, DtypeError
        If p does not hold rows of probabilities (see `check_rows`), if counts has another shape or does not
        hold whole numbers >= 0, if a row of it sums to 2^53 or more, or if resamples is below 1.

    Examples
    --------
    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> m = total_variation(torch.tensor([[75, 25]]), torch.tensor([[0.5, 0.5]]), generator=g)
    >>> m.value
    tensor([0.2500], dtype=torch.float64)
    """
    return _measure(lambda q, p: 0.5 * np.abs(q - p).sum(-1), counts, p, resamples, generator)


def hellinger_distance(
    counts: Tensor, p: Tensor, *, resamples: int = 200, generator: torch.Generator | None = None
) -> Measure:
    """Compute sqrt(1 - sum_j sqrt(p_j counts_j / S)).

    Arguments, result and errors are those of `total_variation`.

    Examples
    --------
    >>> hellinger_distance(torch.tensor([[100, 0]]), torch.tensor([[1.0, 0.0]])).value
    tensor([0.], dtype=torch.float64)
    """
    return _measure(lambda q, p: np.sqrt(1 - _overlap(q, p)), counts, p, resamples, generator)


def hellinger_fidelity(
    counts: Tensor, p: Tensor, *, resamples: int = 200, generator: torch.Generator | None = None
) -> Measure:
    """Compute (sum_j sqrt(p_j counts_j / S))², as `qiskit.quantum_info.hellinger_fidelity` does.

    Arguments, result and errors are those of `total_variation`. `floor` is below 1, because finite shots of
    an ideal device do not reach fidelity 1.

    Examples
    --------
    >>> hellinger_fidelity(torch.tensor([[50, 50]]), torch.tensor([[1.0, 0.0]])).value
    tensor([0.5000], dtype=torch.float64)
    """
    return _measure(lambda q, p: _overlap(q, p) ** 2, counts, p, resamples, generator)


def state_fidelity(rho: Tensor, p: Tensor, *, shots: int | None = None) -> Measure:
    """Compute <psi|rho|psi> with psi = sum_j sqrt(p_j) |j>.

    Unlike measured keys, this fidelity also depends on phases.

    Parameters
    ----------
    rho : Tensor, complex, (R, 2^m, 2^m)
        Density matrices, as `AerEngine.density_matrices` computes them, of a loader whose amplitudes are all
        positive, as those of `TreeLoader(phase=True)`.
    p : Tensor, (R, n)
        The rows that were loaded, n <= 2^m.
    shots : int, optional
        Shots of a device that projects rho onto psi: `std_error` is then the standard error of its estimate.
        It is 0 if shots is None, because rho is known.

    Returns
    -------
    Measure
        `floor` and both ends of `floor_range` are 1, the fidelity without noise.

    Raises
    ------
    ArgumentError, ShapeError, DtypeError
        If p does not hold rows of probabilities (see `check_rows`), if rho is not a tensor of fitting shape,
        or if shots is below 1.

    Examples
    --------
    >>> mixed = torch.eye(2, dtype=torch.complex128)[None] / 2
    >>> state_fidelity(mixed, torch.tensor([[0.25, 0.75]])).value
    tensor([0.5000], dtype=torch.float64)
    """
    p = check_rows(p)
    if not isinstance(rho, Tensor) or not (rho.is_complex() or rho.is_floating_point()):
        given = rho.dtype if isinstance(rho, Tensor) else type(rho).__name__
        raise DtypeError(f"rho is {given}; it must be a complex tensor.")
    rows, n = p.shape
    if rho.ndim != 3 or rho.shape[0] != rows or rho.shape[1] != rho.shape[2] or rho.shape[1] < n:
        raise ShapeError(
            f"rho has shape {tuple(rho.shape)}; with p {tuple(p.shape)} it must be ({rows}, d, d), d >= {n}."
        )
    if shots is not None:
        shots = check_count("shots", shots)
    psi = torch.nn.functional.pad(p.sqrt(), (0, rho.shape[-1] - n)).to(rho)
    value = torch.einsum("ri,rij,rj->r", psi, rho, psi).real.double()
    error = (value * (1 - value)).clamp_min(0).div(shots).sqrt() if shots else torch.zeros_like(value)
    return Measure(value, torch.ones_like(value), torch.ones(2, rows, dtype=value.dtype), error)


def total_variation_distance(p: Tensor, q: Tensor) -> Tensor:
    """Compute half of sum_j |p_j - q_j|, (...), for pairs of distributions (..., n).

    Examples
    --------
    >>> total_variation_distance(torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5]))
    tensor(0.2500)
    """
    return (p - q).abs().sum(-1) / 2


def _overlap(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.minimum(np.sqrt(q * p).sum(-1), 1.0)


def _measure(
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray],
    counts: Tensor,
    p: Tensor,
    resamples: int,
    generator: torch.Generator | None,
) -> Measure:
    """Compute a distance (..., n), (..., n) -> (...) of the counts, of ideal shots and of the bootstrap."""
    p = check_rows(p)
    resamples = check_count("resamples", resamples)
    counts = _check_counts(counts, p)
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
    random = np.random.default_rng(seed)
    exact, k = p.numpy(), counts.numpy()
    measured = (k.sum(-1) > 0) & (exact.sum(-1) > 0)
    value, floor, std_error = np.full((3, len(p)), np.nan)
    floor_range = np.full((2, len(p)), np.nan)
    if measured.any():
        exact, k = exact[measured], k[measured]
        shots = k.sum(-1)
        q = k / shots[:, None]

        def repeated(rows: np.ndarray) -> np.ndarray:
            rows = rows / rows.sum(-1, keepdims=True)
            return random.multinomial(shots, rows, size=(resamples, len(rows))) / shots[:, None]

        agree = (k.max(-1) == shots)[:, None]
        source = np.where(agree, (k + exact) / (shots[:, None] + 1), q)
        ideal, bootstrap = distance(repeated(exact), exact), distance(repeated(source), exact)
        value[measured], floor[measured] = distance(q, exact), ideal.mean(0)
        floor_range[:, measured] = np.quantile(ideal, (0.025, 0.975), axis=0)
        if resamples > 1:
            std_error[measured] = bootstrap.std(0, ddof=1)
    return Measure(*(torch.from_numpy(x) for x in (value, floor, floor_range, std_error)))


def _check_counts(counts: Tensor, p: Tensor) -> Tensor:
    """Return counts as int64 on the CPU; refuse what are not whole numbers >= 0 of the shape of p."""
    if not isinstance(counts, Tensor):
        raise DtypeError(
            f"counts is a {type(counts).__name__}; it must be a tensor, as `RowCounts.counts` is."
        )
    if counts.shape != p.shape:
        raise ShapeError(
            f"counts has shape {tuple(counts.shape)} and p has {tuple(p.shape)}; they must be the same."
        )
    whole = not (counts.is_floating_point() or counts.is_complex())
    counts = counts.cpu().long()
    if not whole or bool((counts < 0).any()):
        raise ArgumentError("counts must hold whole numbers >= 0.")
    if bool((counts.double().sum(-1) >= 2**53).any()):
        raise ArgumentError("counts sum to 2^53 or more in a row, which is more than can be resampled.")
    return counts
