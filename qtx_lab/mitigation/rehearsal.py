"""`Rehearsal`: what a way to measure rows is expected to give, by the errors that a device reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, nan
from statistics import fmean, stdev
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..backends import QiskitQuantumBackend
from ..circuits.fidelity import total_variation_distance
from ..errors import ArgumentError, BackendUnavailable
from .readout import calibrated_readout_errors
from .results import Z_95, MitigatedRows, bias_aware_std_error


class RehearsedOption(Protocol):
    """What a rehearsal asks of an option, whose module needs this one."""

    @property
    def readout(self) -> bool:
        """Whether it undoes readout errors."""

    @property
    def name(self) -> str:
        """What it does, in words."""

    def allocate(self, shots: int) -> list[int]:
        """Shots of each noise level."""

    def check(self, backend: QiskitQuantumBackend, n: int) -> None:
        """Refuse what cannot be measured."""

    def construct_backends(self, backend: QiskitQuantumBackend) -> list[QiskitQuantumBackend]:
        """A backend for each noise level."""

    def outcome_probabilities(
        self, backend: QiskitQuantumBackend, p: Tensor, known: dict[object, Tensor]
    ) -> list[Tensor]:
        """Probabilities of what each noise level measures; `known` keeps what options share."""

    def combine_results(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        counts: Sequence[Tensor],
        errors: Sequence[Tensor] | None,
    ) -> MitigatedRows:
        """The mitigated rows."""


LIMIT_SHOTS = 1e15
"""Number of shots whose noise does not matter."""

EXPECTED_ROWS, EXPECTED_REPEATS = 8, 4
"""Rows on which a mitigation is rehearsed before it is used, and how often."""


@dataclass(frozen=True)
class Prediction:
    """What is expected of an option.

    Parameters
    ----------
    option : CircuitMitigation or ProbabilisticErrorCancellation
    error : float
        Total variation between mitigated and true rows, mean over rows; infinite if the option cannot be
        used.
    bias : float
        The same with infinitely many shots.
    noise : float
        Total variation between what the shots give and what infinitely many would, mean over rows.
    std_error : float
        Standard error of `error`, because rehearsals are few.
    problem : str
        Why the option cannot be used; empty if it can.
    mean_square : float
        Sum over keys of squared errors, mean over rows: what `boundary` is about.
    mean_square_std_error : float
        Its standard error.
    coverage : float
        Part of the keys that may be measured whose true probability is within 1.96 standard errors.
    """

    option: Any
    error: float
    bias: float
    noise: float
    std_error: float = 0.0
    problem: str = ""
    mean_square: float = inf
    mean_square_std_error: float = 0.0
    coverage: float = nan


class Rehearsal:
    """Tries options on rows, by the errors that a device reports; what options share is computed only once.

    Parameters
    ----------
    backend : QiskitQuantumBackend
    p : Tensor, float64, (R, n)
        Rows that `check_rows` returned, each with a key of probability above 0.
    readout : callable
        Returns the readout errors to undo, given the backend and the number of keys:
        `calibrated_readout_errors`, or `readout_errors` for those that are measured.
    """

    def __init__(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        readout: Callable[[QiskitQuantumBackend, int], Tensor] = calibrated_readout_errors,
    ):
        self.backend, self.p, self._readout = backend, p, readout
        self._outcomes: dict[object, Tensor] = {}
        self._errors: dict[QiskitQuantumBackend, Tensor] = {}

    def predict(
        self,
        option: RehearsedOption,
        shots: int,
        repeats: int,
        rng: np.random.Generator,
        *,
        bias: Tensor | None = None,
    ) -> Prediction:
        """Predict what an option gives.

        Parameters
        ----------
        option : CircuitMitigation
        shots : int
            Shots of each row.
        repeats : int
            Number of rehearsals.
        rng : numpy.random.Generator
            The only source of randomness.
        bias : Tensor, (R, n) or (1, 1), optional
            Bias that intervals allow for (`bias_aware_std_error`); without it they know of none.
        """
        try:
            shots_by_level = option.allocate(shots)
            option.check(self.backend, self.p.shape[-1])
            outcomes, errors = self.outcomes(option), self.readout_errors(option)
            limit = self.limit(option)
        except (ArgumentError, BackendUnavailable, torch.linalg.LinAlgError) as error:
            return Prediction(option, inf, inf, inf, problem=str(error))
        misses, noises, squares, coverages = [], [], [], []
        for _ in range(repeats):
            counts = [
                torch.from_numpy(rng.multinomial(level_shots, x.numpy()))
                for level_shots, x in zip(shots_by_level, outcomes, strict=True)
            ]
            rows = option.combine_results(self.backend, self.p, counts, errors)
            estimate = rows.p
            misses.append(float(total_variation_distance(estimate, self.p).mean()))
            noises.append(float(total_variation_distance(estimate, limit).mean()))
            squares.append(float((estimate - self.p).square().sum(-1).mean()))
            std_error = rows.std_error if bias is None else bias_aware_std_error(rows.std_error, bias)
            covered = (estimate - self.p).abs() <= Z_95 * std_error
            coverages.append(float(covered[self.p > 0].double().mean()))
        error_spread, square_spread = (
            stdev(x) / repeats**0.5 if repeats > 1 else 0.0 for x in (misses, squares)
        )
        return Prediction(
            option,
            fmean(misses),
            float(total_variation_distance(limit, self.p).mean()),
            fmean(noises),
            error_spread,
            mean_square=fmean(squares),
            mean_square_std_error=square_spread,
            coverage=fmean(coverages),
        )

    def limit(self, option: RehearsedOption) -> Tensor:
        """Return what infinitely many shots would give, (R, n).

        Raises
        ------
        ArgumentError, BackendUnavailable
            If the option cannot measure these rows.
        """
        counts = [LIMIT_SHOTS * x for x in self.outcomes(option)]
        return option.combine_results(self.backend, self.p, counts, self.readout_errors(option)).p

    def outcomes(self, option: RehearsedOption) -> list[Tensor]:
        """Return the probabilities of what an option measures at each noise level, (R, values)."""
        return option.outcome_probabilities(self.backend, self.p, self._outcomes)

    def readout_errors(self, option: RehearsedOption) -> list[Tensor] | None:
        """Return the readout errors at each noise level, (bits, 2, 2), or None if the option undoes none."""
        if not option.readout:
            return None
        backends = option.construct_backends(self.backend)
        for backend in backends:
            if backend not in self._errors:
                self._errors[backend] = self._readout(backend, self.p.shape[-1])
        return [self._errors[backend] for backend in backends]


def shots_that_pay(mitigated: Prediction, raw: Prediction, shots: int) -> int | None:
    """From how many shots a mitigation is expected to be better than raw counts; None if from none.

    The squares of bias and noise are added, and that of the noise falls with the shots: N solves bias² +
    noise² shots / N = raw bias² + raw noise² shots / N.

    Parameters
    ----------
    mitigated, raw : Prediction
        For `shots` shots.
    shots : int

    Examples
    --------
    >>> from qtx_lab.mitigation import CircuitMitigation
    >>> option = CircuitMitigation()
    >>> mitigated, raw = Prediction(option, 0.08, 0.0, 0.08), Prediction(option, 0.05, 0.03, 0.04)
    >>> shots_that_pay(mitigated, raw, 1000)
    5400
    """
    less_bias = raw.bias**2 - mitigated.bias**2
    more_noise = mitigated.noise**2 - raw.noise**2
    if not 0 < less_bias < inf:
        return None
    exact = shots * max(more_noise, 0) / less_bias
    digits = 10 ** max(len(str(int(exact))) - 2, 0)  # two digits are more than is known of it
    return max(int(-(-exact // digits) * digits), 1)


@dataclass(frozen=True)
class Expectation:
    """What a mitigation and raw counts of as many shots are expected to give.

    Parameters
    ----------
    mitigated, raw : Prediction
        Rehearsed on some of the rows themselves.
    warning : str
        Why raw counts are expected to be better, and from how many shots they are not; empty otherwise.
    """

    mitigated: Prediction
    raw: Prediction
    warning: str = ""


def expected_errors(
    option: RehearsedOption,
    raw: RehearsedOption,
    backend: QiskitQuantumBackend,
    p: Tensor,
    shots: int,
) -> Expectation | None:
    """Rehearse a mitigation and raw counts on some of the rows; None if they cannot be rehearsed.

    Parameters
    ----------
    option, raw : CircuitMitigation
    backend : QiskitQuantumBackend
    p : Tensor, float64, (R, n)
        Rows that `check_rows` returned, each with a key of probability above 0.
    shots : int
        Shots of each row, over all noise levels.
    """
    some = p[torch.linspace(0, len(p) - 1, min(len(p), EXPECTED_ROWS)).round().long()]
    rehearsal, rng = Rehearsal(backend, some), np.random.default_rng(0)
    repeats = EXPECTED_REPEATS * EXPECTED_ROWS // len(some)
    mitigated, of_raw = (rehearsal.predict(x, shots, repeats, rng) for x in (option, raw))
    if mitigated.problem or of_raw.problem:
        return None
    doubt = 2 * (mitigated.std_error**2 + of_raw.std_error**2) ** 0.5
    worse = mitigated.error - doubt > of_raw.error
    warning = unpaid_warning(option.name, mitigated, of_raw, shots) if worse else ""
    return Expectation(mitigated, of_raw, warning)


def unpaid_warning(name: str, mitigated: Prediction, raw: Prediction, shots: int) -> str:
    """The sentence that a mitigation of this name is expected to be worse than raw counts."""
    enough = shots_that_pay(mitigated, raw, shots)
    factor = (mitigated.noise / raw.noise) ** 2 if raw.noise else inf
    if enough is None:
        pays = "no number of shots pays for it"
    else:
        pays = f"about {enough:,} shots pay for it" if enough > shots else "somewhat more shots pay for it"
    return (
        f"{shots:,} shots a row do not pay for the mitigation {name!r}, which multiplies the variance by "
        f"{factor:.1f}: by the device's calibration its error is expected to be {mitigated.error:.4f} (total "
        f"variation), and that of the raw counts {raw.error:.4f}; {pays}. MitigationPlanner() chooses what "
        "does."
    )
