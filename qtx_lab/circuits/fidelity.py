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


@dataclass(frozen=True)
class Measure:
    """A measure of each row.

    Parameters
    ----------
    value : Tensor, float64, (R,)
        NaN in a row that has no counts, as its floor and error.
    floor : Tensor, float64, (R,)
        What as many shots of an ideal device would give on average: a finite sample is never at distance 0.
    floor_range : Tensor, float64, (2, R)
        Where 95 % of such shots' values lie: a `value` beyond it is not explained by shots alone.
    std_error : Tensor, float64, (R,)
        Standard deviation of `value` over repetitions of the shots, by the bootstrap: too large, by up to a half,
        where a row is at its floor.
    """

    value: Tensor
    floor: Tensor
    floor_range: Tensor
    std_error: Tensor


def total_variation(
    counts: Tensor, p: Tensor, *, resamples: int = 200, generator: torch.Generator | None = None
) -> Measure:
    """Half of sum_j |counts_j / S - p_j|: the most by which the probability of any set of keys is off.

    Parameters
    ----------
    counts : Tensor, whole numbers, (R, n)
        Of each key, as `RowCounts.counts`; their sum S is the shots that count.
    p : Tensor, (R, n)
    resamples : int
        Of the bootstraps behind `floor` (shots drawn from p) and `std_error` (from the counts).
    generator : torch.Generator, optional
        The only source of randomness.

    Raises
    ------
    ArgumentError, ShapeError, DtypeError
        If p is not rows of probabilities (see `check_rows`), or counts are not as many whole numbers >= 0, of which a
        row sums to less than 2^53.

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
    """sqrt(1 - sum_j sqrt(p_j counts_j / S)); arguments as for `total_variation`."""
    return _measure(lambda q, p: np.sqrt(1 - _overlap(q, p)), counts, p, resamples, generator)


def hellinger_fidelity(
    counts: Tensor, p: Tensor, *, resamples: int = 200, generator: torch.Generator | None = None
) -> Measure:
    """(sum_j sqrt(p_j counts_j / S))^2, as `qiskit.quantum_info.hellinger_fidelity`; arguments as above.

    `floor` is below 1: finite shots of an ideal device do not reach it.
    """
    return _measure(lambda q, p: _overlap(q, p) ** 2, counts, p, resamples, generator)


def state_fidelity(rho: Tensor, p: Tensor, *, shots: int | None = None) -> Measure:
    """<psi|rho|psi> with psi = sum_j sqrt(p_j) |j>: includes phases, which measured keys do not show.

    Parameters
    ----------
    rho : Tensor, complex, (R, 2^m, 2^m)
        Density matrices, as `AerEngine.density_matrices` gives; of a loader that keeps phases, `TreeLoader(phase=True)`.
    p : Tensor, (R, n), n <= 2^m
    shots : int, optional
        Of a device that projects onto psi: then `std_error` is that of such an estimate. 0 where None: rho is known.

    Returns
    -------
    Measure
        `floor` and its range are 1, the fidelity without noise.

    Raises
    ------
    ArgumentError, ShapeError, DtypeError
        As for `total_variation`; if rho does not fit p.
    """
    p = check_rows(p)
    if not isinstance(rho, Tensor) or not (rho.is_complex() or rho.is_floating_point()):
        given = rho.dtype if isinstance(rho, Tensor) else type(rho).__name__
        raise DtypeError(f"rho is {given}; it must be a complex tensor.")
    rows, n = p.shape
    if rho.ndim != 3 or rho.shape[0] != rows or rho.shape[1] != rho.shape[2] or rho.shape[1] < n:
        raise ShapeError(
            f"rho has shape {tuple(rho.shape)}; p {tuple(p.shape)} needs ({rows}, d, d), d >= {n}."
        )
    if shots is not None:
        check_count("shots", shots)
    psi = torch.nn.functional.pad(p.sqrt(), (0, rho.shape[-1] - n)).to(rho)
    value = torch.einsum("ri,rij,rj->r", psi, rho, psi).real.double()
    error = (value * (1 - value)).clamp_min(0).div(shots).sqrt() if shots else torch.zeros_like(value)
    return Measure(value, torch.ones_like(value), torch.ones(2, rows, dtype=value.dtype), error)


def _overlap(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.minimum(np.sqrt(q * p).sum(-1), 1.0)


def _measure(
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray],
    counts: Tensor,
    p: Tensor,
    resamples: int,
    generator: torch.Generator | None,
) -> Measure:
    p = check_rows(p)
    check_count("resamples", resamples)
    if not isinstance(counts, Tensor):
        raise DtypeError(
            f"counts is a {type(counts).__name__}; it must be a tensor of whole numbers, as `RowCounts.counts`."
        )
    if counts.shape != p.shape:
        raise ShapeError(
            f"counts has shape {tuple(counts.shape)}, p {tuple(p.shape)}; they must be the same."
        )
    whole = not (counts.is_floating_point() or counts.is_complex())
    counts = counts.cpu().long()
    if not whole or bool((counts < 0).any()):
        raise ArgumentError("counts must be whole numbers >= 0.")
    if bool((counts.double().sum(-1) >= 2**53).any()):
        raise ArgumentError("counts sum to 2^53 or more in a row, which is more than can be resampled.")
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
    random = np.random.default_rng(seed)
    exact, k = p.numpy(), counts.numpy()
    shots = k.sum(-1)
    some = (shots > 0) & (exact.sum(-1) > 0)
    out = np.full((5, len(p)), np.nan)
    if some.any():
        exact, k, shots = exact[some], k[some], shots[some]
        q = k / shots[:, None]
        ideal, again = (
            random.multinomial(shots, x / x.sum(-1, keepdims=True), size=(resamples, len(x))) / shots[:, None]
            for x in (exact, q)
        )
        floor, spread = distance(ideal, exact), distance(again, exact)
        out[:, some] = (
            distance(q, exact),
            floor.mean(0),
            *np.quantile(floor, (0.025, 0.975), axis=0),
            spread.std(0, ddof=min(1, resamples - 1)),
        )
    result = torch.from_numpy(out)
    return Measure(result[0], result[1], result[2:4], result[4])
