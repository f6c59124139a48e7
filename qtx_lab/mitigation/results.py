"""What every mitigation begins and ends with: a checked request for rows, and counts with an estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import QiskitQuantumBackend, RowCounts
from ..backends.requests import RowRequest
from ..checks import check_count
from ..errors import DtypeError

Z_95 = 1.959964
"""Standard errors on either side of a 95 % interval."""

Z_95_ONE_SIDED = 1.644854
"""Standard errors below which 95 % lie."""

OTHER_TAIL_ENDS = 6.0
"""Biases in standard errors from which an interval misses on one side only."""


@dataclass(frozen=True, eq=False)
class MitigatedRows:
    """Rows estimated from noisy counts.

    Parameters
    ----------
    p : Tensor, float64, (R, n)
        Estimated probabilities. Each row is a distribution on the keys that are not masked, or 0 where
        nothing is known of it.
    std_error : Tensor, float64, (R, n)
        Standard error before the projection onto the distributions, which brings a row no further from any of
        them. It knows nothing of a bias that is left. NaN where nothing is known of the row.
    fallbacks : tuple of str
        What was done in another way than asked, and why.
    mass : Tensor, float64, (R,), optional
        Sum of each row's signed shares before it was divided by it, where shots have signs.
    """

    p: Tensor
    std_error: Tensor
    fallbacks: tuple[str, ...] = ()
    mass: Tensor | None = None


def checked_request(
    backend: QiskitQuantumBackend, p: Tensor, shots: int, generator: torch.Generator | None
) -> RowRequest:
    """Check the arguments of `sample_rows`, and return them as a request.

    Raises
    ------
    DtypeError
        If backend is not a QiskitQuantumBackend.
    ArgumentError, ShapeError, DtypeError
        As `QiskitQuantumBackend.sample_rows`; shots must be given, because noise levels share them.
    """
    check_backend(backend)
    request = backend.request(p, check_count("shots", shots), generator)
    if bool(request.running.any()):
        backend.engine.refresh()  # so that all circuits and corrections are those of one calibration
    return request


def check_backend(backend: object, argument: str = "backend") -> None:
    """Refuse what is not a QiskitQuantumBackend, with a DtypeError."""
    if not isinstance(backend, QiskitQuantumBackend):
        raise DtypeError(f"{argument} is a {type(backend).__name__}; it must be a QiskitQuantumBackend.")


def finish_request(
    request: RowRequest, counts: Tensor, rows: MitigatedRows, diagnostics: Mapping[str, Any]
) -> RowCounts:
    """Make the result for all rows of a request from those that were run.

    Parameters
    ----------
    request : RowRequest
    counts : Tensor, int64, (R', n)
        Shots that gave each key, of the R' rows that were run. All other shots count as discarded.
    rows : MitigatedRows
        Estimates of the R' rows.
    diagnostics : mapping
        Diagnostics of the result; the fallbacks are added here.

    Returns
    -------
    RowCounts
        Rows that were not run have no counts, estimate 0 and standard error 0.
    """
    place = request.running.nonzero()[:, 0]

    def all_rows(x: Tensor) -> Tensor:
        return x.new_zeros(request.p.shape).index_copy(0, place, x)

    spent = request.shots * request.running.long()
    all_counts = all_rows(counts)
    return RowCounts(
        all_counts,
        spent - all_counts.sum(-1),
        request.shots,
        request.baseline(),
        {**diagnostics, "fallbacks": (*diagnostics.get("fallbacks", ()), *rows.fallbacks)},
        all_rows(rows.p),
        all_rows(rows.std_error),
    )


def bias_aware_std_error(std_error: Tensor, bias: Tensor) -> Tensor:
    """Widen standard errors so that intervals of 95 % allow for a bias whose size is expected.

    An estimate with standard error s and bias b is within s c(b / s) of the truth with probability .95, where
    c(t) is the 95 % quantile of |N(t, 1)|: Armstrong and Kolesár, Optimal inference in a class of regression
    models (Econometrica 2018), section 2.2. What is returned is s c(b / s) / 1.96, so that 1.96 of it make
    that interval. It is s without a bias.

    Parameters
    ----------
    std_error : Tensor, float64, (R, n)
        At least 0, or NaN where nothing is known.
    bias : Tensor
        Expected bias, of a shape that broadcasts.

    Returns
    -------
    Tensor, float64, (R, n)

    Examples
    --------
    >>> bias_aware_std_error(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 2.0, 1.96])).round(decimals=2)
    tensor([1.0000, 1.8600, 1.0000], dtype=torch.float64)
    """
    from scipy.special import chndtrix

    std_error, bias = torch.broadcast_tensors(std_error.double(), bias.double().abs())
    ratio = bias / std_error
    quantile = np.sqrt(chndtrix(0.95, 1, ratio.clamp(max=OTHER_TAIL_ENDS).square().numpy()))
    quantile = torch.where(ratio < OTHER_TAIL_ENDS, torch.from_numpy(quantile), ratio + Z_95_ONE_SIDED)
    return torch.where(std_error == 0, bias, std_error * quantile) / Z_95
