"""What every mitigation begins and ends with: a checked request for rows, and counts with an estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import QiskitQuantumBackend, RowCounts
from ..backends.requests import RowRequest
from ..checks import check_count
from ..errors import DtypeError


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
        them. NaN where nothing is known of the row.
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
