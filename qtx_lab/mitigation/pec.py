"""Probabilistic error cancellation: random Pauli gates with signs undo the Pauli part of known noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ..backends import QiskitQuantumBackend, RowCounts
from ..backends.base import Engine
from ..backends.counts import draw_counts
from ..backends.requests import PlannedRun
from ..checks import check_count, check_flags, check_number
from ..errors import ArgumentError, FallbackWarning
from .circuit import CircuitMitigation
from .noise_inverse import (
    NoiseInverse,
    add_paulis,
    cancelled_probabilities,
    draw_paulis,
    engine_with_pauli_errors,
    invert_noise,
    total_gamma,
)
from .projection import sum_by_key
from .readout import planned_calibration, readout_errors
from .register import register_counts, register_keys
from .rehearsal import expected_errors, unpaid_warning
from .results import MitigatedRows, check_backend, checked_request, finish_request
from .scaling import scale_noise
from .signed_shots import combine_instances, combine_signed

MAX_OVERHEAD_SHARE = 0.1
"""Part of the shots that the overhead may be without a warning."""

MIN_LOSS = 0.02
"""Part of the expected error of raw counts by which that of a mitigation must be larger for a warning."""

_TWIRLED: WeakKeyDictionary[QiskitQuantumBackend, dict[Engine, QiskitQuantumBackend]] = WeakKeyDictionary()
"""Twirled backends, so that their circuits are compiled only once."""

_INVERSES: WeakKeyDictionary[QiskitQuantumBackend, dict[tuple[object, ...], list[NoiseInverse]]] = (
    WeakKeyDictionary()
)
"""The inverses of each backend's circuits."""


class ProbabilisticErrorCancellation:
    """Cancels the noise of circuits on simulators, whose noise is known.

    `CircuitSampler` takes it as its `mitigation`.

    The inverse of a Pauli channel with fidelities f_P is sum_Q c_Q Q rho Q with c_Q = 4^-k sum_P (±1) / f_P,
    where the sign is + if P and Q commute. Some c are negative. So after each noisy gate a Pauli Q is drawn
    with probability |c_Q| / gamma, gamma = sum |c|, and the shot counts as sign(c_Q) gamma. The estimate is
    unbiased for Pauli noise, such as depolarising noise; of damping, the part that is no Pauli channel stays.
    The variance grows by the product of gamma² over all gates: see `overhead` beforehand. The drawn Paulis
    are assumed to have no noise, as where they are merged with neighbouring gates. Decoherence of qubits
    that wait is not cancelled.

    Two-qubit gates are twirled (see `TwirledEngine`), so that all of their noise is Pauli noise. On the twins
    of IBM's devices the bias that is left is then a tenth to a fifth of that without twirling.

    If neither instances nor a precision is given, new Paulis are drawn for each shot, which is best: 64
    draws for 64,000 shots of 16 keys have twice the error on the twin of Fez. No circuit is then simulated
    for a draw: a shot has a sign and a value, and the probabilities of both together are computed from two
    Pauli channels, that of c and that of |c|. The sign is + and - with the probabilities
    (q ± x / gamma) / 2, where x and q are the results of these channels.

    Sources: Temme, Bravyi and Gambetta, Error mitigation for short-depth quantum circuits (2017); van den
    Berg, Minev, Kandala and Temme, Probabilistic error cancellation with sparse Pauli-Lindblad models on
    noisy quantum processors (2023), for twirling.

    Parameters
    ----------
    instances : int, optional
        Number of draws of all Paulis for each row, at least 2. The shots of the row are split over them, as
        where a device is slow to load circuits.
    precision : float, optional
        Standard error that no key's probability may exceed, in place of `instances`, before readout errors
        are undone: gamma² / precision² draws are enough, because a draw counts as at most gamma. Fewer shots
        than that are refused.
    readout : bool
        Whether to undo readout errors too.
    twirled : bool
        Whether two-qubit gates are twirled.
    model : QiskitQuantumBackend, optional
        A simulator of the same device whose noise is cancelled, in place of the true one: what a model that
        was learned, or is some days old, gets wrong stays as bias.

    Raises
    ------
    ArgumentError
        If instances is below 2 (the spread of the instances gives the error bars), if precision is not
        between 0 and 1, or if both are given.
    DtypeError
        If readout or twirled is not True or False, precision not a number, or model not a backend.

    Examples
    --------
    >>> from qtx_lab.backends import ParametricNoise
    >>> backend = QiskitQuantumBackend("aer", noise=ParametricNoise(two_qubit=0.01), loader="tree")
    >>> round(ProbabilisticErrorCancellation().overhead(backend, 8), 3)
    1.162
    >>> ProbabilisticErrorCancellation(precision=0.02).count_instances(backend, 8, 64_000)
    2905
    """

    loader: ClassVar[None] = None
    """It measures the loader of the backend."""

    zne: ClassVar[None] = None
    """It extrapolates nothing."""

    def __init__(
        self,
        instances: int | None = None,
        *,
        precision: float | None = None,
        readout: bool = True,
        twirled: bool = True,
        model: QiskitQuantumBackend | None = None,
    ):
        if instances is not None and precision is not None:
            raise ArgumentError(
                f"instances={instances} and precision={precision} exclude each other: give one of them."
            )
        if instances is not None:
            instances = check_count("instances", instances)
            if instances < 2:
                raise ArgumentError(f"instances={instances} is not allowed: error bars need at least 2.")
        if precision is not None:
            precision = check_number("precision", precision, above=0, below=1)
        check_flags(readout=readout, twirled=twirled)
        if model is not None:
            check_backend(model, "model")
        self.instances, self.precision, self.readout = instances, precision, readout
        self.twirled, self.model = twirled, model
        parts = ["readout"] * readout + ["pec"] + ["not twirled"] * (not twirled)
        self.name = ", ".join(parts)

    def overhead(self, backend: QiskitQuantumBackend, n: int) -> float:
        """Compute gamma² of the circuit for rows of n keys: how many times the shots it takes.

        Raises
        ------
        ArgumentError
            If the circuit measures before its end.
        BackendUnavailable
            On a device, whose calibration does not have its Pauli errors; for noise that is too strong to be
            inverted.
        """
        return total_gamma(self._inverses(backend, n)) ** 2

    def count_instances(self, backend: QiskitQuantumBackend, n: int, shots: int) -> int:
        """Compute how many draws of the Paulis a row of n keys with these shots gets.

        Raises
        ------
        ArgumentError
            If the shots are fewer than the precision needs; also as `overhead`.
        BackendUnavailable
            As `overhead`.
        """
        shots = check_count("shots", shots)
        if self.instances is not None:
            return min(self.instances, shots)
        if self.precision is None:
            return shots
        overhead = self.overhead(backend, n)
        needed = max(2, math.ceil(overhead / self.precision**2))
        if needed > shots:
            raise ArgumentError(
                f"precision={self.precision:g} needs {needed:,} shots a row, because cancelling the errors "
                f"multiplies the variance by {overhead:.3g} (gamma²); shots={shots} is too few."
            )
        return needed

    def check(self, backend: QiskitQuantumBackend, n: int) -> None:
        """Refuse, before any work, what cannot be done with rows of n keys; errors are as for `overhead`."""
        self.overhead(backend, n)

    def allocate(self, shots: int) -> list[int]:
        """Return how many shots go to each noise level: there is one."""
        return [shots]

    def construct_backends(self, backend: QiskitQuantumBackend) -> list[QiskitQuantumBackend]:
        """Return the backend, twirled if asked for, whose noise is to be cancelled."""
        engine = engine_with_pauli_errors(backend)
        if not self.twirled:
            return [backend]
        known = _TWIRLED.setdefault(backend, {})
        if engine not in known:
            known[engine] = scale_noise(backend, 1.0, "pauli")
        return [known[engine]]

    def planned_runs(self, backend: QiskitQuantumBackend, p: Tensor, shots: int) -> list[PlannedRun]:
        """List all that `sample_rows` runs; see `CircuitMitigation.planned_runs`."""
        n = p.shape[-1]
        instances = self.count_instances(backend, n, shots)
        calibration = planned_calibration(backend, n) if self.readout else []
        circuit = backend.transpiled(n)
        return [
            *calibration,
            PlannedRun(circuit, len(p) * instances, shots // instances, "error cancellation"),
        ]

    def outcome_probabilities(
        self, backend: QiskitQuantumBackend, p: Tensor, known: dict[object, Tensor]
    ) -> list[Tensor]:
        """Compute the probabilities of a shot's sign and value, if Paulis are drawn for each shot.

        Parameters
        ----------
        backend, p
            As for `register_probabilities`.
        known : dict
            What was computed for these rows; what is new is added.

        Returns
        -------
        list of Tensor, float64, (R, 2 * 2^bits)
            One: the values of shots that count as gamma, and then those of shots that count as -gamma.

        Raises
        ------
        BackendUnavailable
            If the circuit is too large to be simulated exactly; also as `overhead`.
        """
        key = ("signed", self.twirled, self.model)
        if key not in known:
            (noisy,) = self.construct_backends(backend)
            circuit = backend.transpiled(p.shape[-1])
            inverses = self._inverses(backend, p.shape[-1])
            angles = backend.loader.angles(p)
            x, q = (
                cancelled_probabilities(noisy, circuit, inverses, angles, signed=signed)
                for signed in (True, False)
            )
            x = x / total_gamma(inverses)
            known[key] = torch.cat(((q + x) / 2, (q - x) / 2), -1).clamp_min(0)
            known[key] /= known[key].sum(-1, keepdim=True)
        return [known[key]]

    def sample_rows(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        shots: int,
        *,
        generator: torch.Generator | None = None,
        rehearse: bool = True,
    ) -> RowCounts:
        """Measure rows and mitigate them; arguments are those of `CircuitMitigation.sample_rows`.

        Returns
        -------
        RowCounts
            Its diagnostics hold `overhead`, which is gamma², `instances`, `precision`, `unused_shots`, and
            `mass`: the sum of each row's signed shares, about 1 for a row that can be trusted. A row without
            mass has estimate 0 and standard error NaN. A fallback counts these and the rows with less than
            half of their mass.

        Raises
        ------
        ArgumentError, ShapeError, DtypeError, BackendUnavailable
            As `QiskitQuantumBackend.sample_rows`, and as `overhead`; also for fewer than two shots.
        """
        request = checked_request(backend, p, shots, generator)
        shots = request.shots
        if shots < 2:
            raise ArgumentError(f"shots={shots} is not allowed: two draws of the Paulis need one shot each.")
        check_flags(rehearse=rehearse)
        if not bool(request.running.any()):
            return backend.sample_rows(request.p, shots, generator=generator)
        running = request.p[request.running]
        rows, n = running.shape
        circuit = backend.transpiled(n)
        instances = self.count_instances(backend, n, shots)
        overhead = self.overhead(backend, n)
        expected_raw = self._warn_of_overhead(backend, running, shots, overhead) if rehearse else None
        shots_by_instance = shots // instances
        errors = [readout_errors(backend, n, seed=request.seed)] if self.readout else None
        if instances == shots:
            (signed,) = self.outcome_probabilities(backend, running, {})
            counts = draw_counts(signed, shots, torch.Generator().manual_seed(request.seed))
            estimate = self.combine_results(backend, running, [counts], errors)
        else:
            counts, signs = self._run_instances(backend, running, instances, shots_by_instance, request.seed)
            estimate = self.combine_instances(backend, running, counts, signs, errors[0] if errors else None)
        by_row = counts.view(rows, -1, 1 << circuit.num_clbits).sum(1)
        diagnostics = {
            **backend.diagnostics(circuit, request),
            "mitigation": self.name,
            "overhead": overhead,
            "instances": instances,
            "precision": self.precision,
            "expected_raw_error": expected_raw,
            "mass": _all_rows(request.running, estimate.mass),
            "unused_shots": shots - shots_by_instance * instances,
        }
        return finish_request(
            request, sum_by_key(by_row, register_keys(backend, n), running > 0), estimate, diagnostics
        )

    def _run_instances(
        self, backend: QiskitQuantumBackend, p: Tensor, instances: int, shots: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Run a circuit for each draw of the Paulis with so many shots: the register's counts, and signs."""
        (noisy,) = self.construct_backends(backend)
        circuit, inverses = backend.transpiled(p.shape[-1]), self._inverses(backend, p.shape[-1])
        draws = draw_paulis(inverses, len(p) * instances, np.random.default_rng(seed))
        angles = np.repeat(backend.loader.angles(p), instances, axis=0)
        bindings = np.concatenate((angles, draws.angles), axis=1)
        counts = register_counts(noisy, add_paulis(circuit, inverses), bindings, shots, seed)
        return counts, total_gamma(inverses) * torch.from_numpy(draws.signs)

    def _inverses(self, backend: QiskitQuantumBackend, n: int) -> list[NoiseInverse]:
        """The inverse of each noisy gate of the circuit for rows of n keys."""
        model = backend if self.model is None else self.model
        known = _INVERSES.setdefault(backend, {})
        key = (model.engine, backend.engine, backend.loader, backend.optimization_level, n)
        if key not in known:
            known[key] = invert_noise(model, backend.transpiled(n))
        return known[key]

    def combine_results(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        counts: Sequence[Tensor],
        errors: Sequence[Tensor] | None,
    ) -> MitigatedRows:
        """Estimate rows from the signed counts of shots for each of which Paulis were drawn.

        Parameters
        ----------
        backend : QiskitQuantumBackend
        p : Tensor, (R, n)
            The rows that were measured; only which keys are masked is used.
        counts : sequence of one Tensor, (R, 2 * 2^bits)
            How often the register had each value in shots that count as gamma, and then in the others.
        errors : sequence of one Tensor, (bits, 2, 2), or None
            Readout errors to be undone.

        Returns
        -------
        MitigatedRows
            As of `combine_instances`.
        """
        gamma, keys = total_gamma(self._inverses(backend, p.shape[-1])), register_keys(backend, p.shape[-1])
        return combine_signed(p, counts[0], gamma, keys, errors[0] if errors else None)

    def combine_instances(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        counts: Tensor,
        signs: Tensor,
        errors: Tensor | None,
    ) -> MitigatedRows:
        """Estimate rows from the register's counts of all instances.

        Parameters
        ----------
        backend : QiskitQuantumBackend
        p : Tensor, (R, n)
            The rows that were measured; only which keys are masked is used.
        counts : Tensor, (R instances, 2^bits)
            How often the register had each value, the instances of a row one after the other.
        signs : Tensor, float64, (R instances,)
            What a shot of each instance counts as: gamma or -gamma.
        errors : Tensor, (bits, 2, 2), optional
            Readout errors to be undone.

        Returns
        -------
        MitigatedRows
            A row whose signed shares nearly cancel has estimate 0 and standard error NaN, and a fallback says
            so. A fallback also counts the rows with less than half of their mass.
        """
        return combine_instances(p, counts, signs, register_keys(backend, p.shape[-1]), errors)

    def _warn_of_overhead(
        self, backend: QiskitQuantumBackend, p: Tensor, shots: int, overhead: float
    ) -> float | None:
        """Warn if shots do not pay for the overhead; return the expected error of raw counts, if known."""
        without = CircuitMitigation(readout=self.readout)
        expected = expected_errors(without, CircuitMitigation(readout=False), backend, p, shots)
        if overhead > shots * MAX_OVERHEAD_SHARE:
            warnings.warn(
                f"Cancelling the errors multiplies the variance by {overhead:.3g} (gamma²): {shots:,} shots "
                f"a row say as much as {shots / overhead:.2g} without noise. Use more shots or another "
                "mitigation.",
                FallbackWarning,
                stacklevel=3,
            )
        elif expected is not None:
            noise = overhead**0.5 * expected.mitigated.noise
            cancelled = replace(expected.mitigated, error=noise, bias=0.0, noise=noise)
            if noise > (1 + MIN_LOSS) * expected.raw.error:
                warning = unpaid_warning(self.name, cancelled, expected.raw, shots)
                warnings.warn(warning, FallbackWarning, stacklevel=3)
        return None if expected is None else expected.raw.error


def _all_rows(running: Tensor, x: Tensor | None) -> Tensor:
    """Numbers of the rows that were run, among zeros for the others."""
    assert x is not None
    return x.new_zeros(len(running)).masked_scatter(running, x)
