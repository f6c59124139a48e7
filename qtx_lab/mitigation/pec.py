"""Probabilistic error cancellation: random Pauli gates with signs undo the Pauli part of known noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector
from scipy import special
from torch import Tensor

from ..backends import QiskitQuantumBackend, RowCounts
from ..backends.aer import AerEngine
from ..checks import check_count, check_number
from ..errors import ArgumentError, BackendUnavailable, DtypeError, FallbackWarning
from .circuit import CircuitMitigation
from .projection import project_to_simplex, sum_by_key
from .readout import laplace_variance, readout_errors, undo_readout
from .register import register_counts, register_keys
from .rehearsal import expected_errors, unpaid_warning
from .results import MitigatedRows, checked_request, finish_request
from .scaling import is_static

MIN_PAULI_FIDELITY = 0.1
"""Least Pauli fidelity of a gate's noise that is still inverted."""

MIN_INSTANCES, MAX_INSTANCES = 1_000, 16_384
"""Least number of draws, as far as the shots go, and most, where neither their number nor a precision is
given."""

SHOTS_BY_INSTANCE = 16
"""Shots of a draw, beyond `MIN_INSTANCES`. A draw for each shot would be best, but takes the longest: on the
twin of Fez, 64,000 shots of 16 keys have an error of .0162 with 64 draws, .0079 with 2,000, .0074 with 4,000
and .0071 with 8,000."""

MAX_OVERHEAD_SHARE = 0.1
"""Part of the shots that the overhead may be without a warning."""

MIN_LOSS = 0.02
"""Part of the expected error of raw counts by which that of a mitigation must be larger for a warning."""

LOW_MASS = 0.5
"""Rows whose signed shares sum to less are reported."""

MIN_SIGNAL = 2.0
"""Least sum of a row's signed shares, in its standard errors, for which anything is said of the row."""

_COMMUTES = np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
"""1 where two of I, X, Y, Z commute, and -1 where they anticommute."""


class ProbabilisticErrorCancellation:
    """Cancels the noise of circuits on simulators, whose noise is known.

    `CircuitSampler` takes it as its `mitigation`.

    The inverse of a Pauli channel with fidelities f_P is sum_Q c_Q Q rho Q with c_Q = 4^-k sum_P (±1) / f_P,
    where the sign is + if P and Q commute. Some c are negative. So after each noisy gate a Pauli Q is drawn
    with probability |c_Q| / gamma, gamma = sum |c|, and the shot counts as sign(c_Q) gamma. The estimate is
    unbiased for Pauli noise, such as depolarising noise; of damping, the part that is no Pauli channel stays.
    The variance grows by the product of gamma² over all gates: see `overhead` beforehand. The drawn Paulis
    are taken to have no noise, as where they are merged with the gates beside them.

    Source: Temme, Bravyi and Gambetta, Error mitigation for short-depth quantum circuits (2017).

    Parameters
    ----------
    instances : int, optional
        Number of draws of all Paulis for each row, at least 2. The shots of the row are split over them. If
        neither this nor a precision is given, the number grows with the shots: a draw for 16 shots, and at
        least one for each of the first 1,000 shots.
    precision : float, optional
        Standard error that no key's probability may exceed, in place of `instances`: gamma² / precision²
        draws are enough, because a draw counts as at most gamma. Fewer shots than that are refused.
    readout : bool
        Whether to undo readout errors too.

    Raises
    ------
    ArgumentError
        If instances is below 2 (the spread of the instances gives the error bars), if precision is not
        between 0 and 1, or if both are given.
    DtypeError
        If readout is not True or False, or precision not a number.

    Examples
    --------
    >>> from qtx_lab.backends import ParametricNoise
    >>> backend = QiskitQuantumBackend("aer", noise=ParametricNoise(two_qubit=0.01), loader="tree")
    >>> round(ProbabilisticErrorCancellation().overhead(backend, 8), 3)
    1.162
    >>> ProbabilisticErrorCancellation(precision=0.02).count_instances(backend, 8, 64_000)
    2905
    """

    def __init__(self, instances: int | None = None, *, precision: float | None = None, readout: bool = True):
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
        if not isinstance(readout, bool):
            raise DtypeError(f"readout={readout!r} is not allowed: it must be True or False.")
        self.instances, self.precision, self.readout = instances, precision, readout
        self.name = "readout, pec" if readout else "pec"

    def overhead(self, backend: QiskitQuantumBackend, n: int) -> float:
        """Compute gamma² of the circuit for rows of n keys: how many times the shots it takes.

        Raises
        ------
        ArgumentError
            If the circuit measures before its end.
        BackendUnavailable
            On a device, whose calibration does not tell its Pauli errors; for noise that is too strong to be
            inverted.
        """
        return _gamma(_invert_noise(backend, backend.transpiled(n))) ** 2

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
            return min(shots, max(MIN_INSTANCES, shots // SHOTS_BY_INSTANCE), MAX_INSTANCES)
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

    def sample_rows(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        shots: int,
        *,
        generator: torch.Generator | None = None,
    ) -> RowCounts:
        """Measure rows and mitigate them; arguments are those of `Mitigation.sample_rows`.

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
        if not bool(request.running.any()):
            return backend.sample_rows(request.p, shots, generator=generator)
        running = request.p[request.running]
        rows, n = running.shape
        circuit = backend.transpiled(n)
        inverses = _invert_noise(backend, circuit)
        instances = self.count_instances(backend, n, shots)
        overhead = _gamma(inverses) ** 2
        expected_raw = self._warn_of_overhead(backend, running, shots, overhead)
        shots_by_instance = shots // instances
        draws = _draw_paulis(inverses, rows * instances, np.random.default_rng(request.seed))
        angles = np.repeat(backend.loader.angles(running), instances, axis=0)
        counts = register_counts(
            backend,
            _add_paulis(circuit, inverses),
            np.concatenate((angles, draws.angles), axis=1),
            shots_by_instance,
            request.seed,
        )
        errors = readout_errors(backend, n, seed=request.seed) if self.readout else None
        signs = _gamma(inverses) * torch.from_numpy(draws.signs)
        estimate = self.combine_results(backend, running, counts, signs, errors)
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
        by_row = counts.view(rows, instances, -1).sum(1)
        return finish_request(
            request, sum_by_key(by_row, register_keys(backend, n), running > 0), estimate, diagnostics
        )

    def combine_results(
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
        rows, support = len(p), p > 0
        instances = len(counts) // rows
        shares = counts.double() / counts.sum(-1, keepdim=True)
        if errors is not None:
            shares = undo_readout(shares, errors)
        keys = register_keys(backend, p.shape[-1])
        by_key = sum_by_key(signs[:, None] * shares, keys, support.repeat_interleave(instances, 0))
        by_key = by_key.view(rows, instances, -1)
        masses = by_key.sum(-1, keepdim=True)  # [R, instances, 1]
        mass = masses.mean(1)
        known = mass > MIN_SIGNAL * masses.std(1) / instances**0.5
        fallbacks: tuple[str, ...] = ()
        if not bool(known.all()):
            fallbacks = (
                f"The signed shots of {int((~known).sum())} of {rows} rows cancel to within {MIN_SIGNAL:g} "
                "standard errors: their weights are 0. Use more shots or another mitigation.",
            )
        low = int((known & (mass < LOW_MASS)).sum())
        if low:
            fallbacks += (
                f"The signed shots of {low} of {rows} rows sum to less than {LOW_MASS:g} and not to about 1: "
                "their weights are badly known. Use more shots or another mitigation.",
            )
        signed_mass, mass = mass[:, 0], mass.where(known, torch.ones_like(mass))
        estimate = by_key.mean(1) / mass
        # The variance of a ratio: what each instance has beyond its share of the mass, which varies with the
        # signs. Laplace's rule, as for plain counts, for what few instances and few shots do not show: one
        # more instance whose Paulis, with the other sign, spread it over all keys, and one more shot for and
        # against each key.
        beyond = by_key - estimate[:, None] * masses
        gamma = signs.abs().max()
        spread = gamma * (estimate + 1 / p.shape[-1])
        variance = (beyond.square().sum(1) + spread.square()) / (instances * (instances - 1))
        shots = counts.view(rows, instances, -1).sum((1, 2))[:, None].double()
        unseen = gamma.square() * laplace_variance(shots * estimate.clamp(0, 1), shots)
        # Student's t for few instances: 1.96 standard errors are a 95 % interval.
        few = float(special.stdtrit(instances - 1, 0.975) / special.ndtri(0.975))
        std_error = few * torch.maximum(variance, unseen).sqrt() / mass
        return MitigatedRows(
            project_to_simplex(estimate, support).where(known, 0),
            std_error.where(known, torch.nan),
            fallbacks,
            signed_mass,
        )

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


@dataclass(frozen=True, eq=False)
class _NoiseInverse:
    """Inverse of the Pauli part of a gate's noise.

    Parameters
    ----------
    place : int
        Position of the gate in the circuit's instructions.
    qubits : tuple of int
        The k qubits of the gate.
    coefficients : ndarray, (4^k,)
        c of each Pauli string.
    """

    place: int
    qubits: tuple[int, ...]
    coefficients: np.ndarray

    @property
    def gamma(self) -> float:
        """sum |c|, 1 without noise."""
        return float(np.abs(self.coefficients).sum())


def _gamma(inverses: Sequence[_NoiseInverse]) -> float:
    """Compute the gamma of a whole circuit."""
    return math.prod(inverse.gamma for inverse in inverses)


def _invert_noise(backend: QiskitQuantumBackend, circuit: QuantumCircuit) -> list[_NoiseInverse]:
    """Compute the inverse of each noisy gate of a transpiled circuit."""
    engine = backend.engine
    if not isinstance(engine, AerEngine):
        raise BackendUnavailable(
            f"{engine.name} does not tell the Pauli errors of its gates: probabilistic error cancellation is "
            "for simulators."
        )
    if not is_static(circuit):
        raise ArgumentError(
            f"{circuit.name} measures before its end, so its errors cannot be cancelled: use another loader, "
            "as 'tree'."
        )
    _, noise = engine.calibrated(circuit)
    inverses = []
    for place, instruction in enumerate(circuit.data):
        qubits = tuple(circuit.find_bit(q).index for q in instruction.qubits)
        name = instruction.operation.name
        channel = None if name in ("measure", "barrier") else noise.channel(name, qubits)
        if channel is None:
            continue
        fidelity = channel.diagonal().numpy()
        if fidelity.min() < MIN_PAULI_FIDELITY:
            raise BackendUnavailable(
                f"The noise of {name} on the qubits {qubits} leaves {fidelity.min():.2g} of a Pauli; at "
                f"least {MIN_PAULI_FIDELITY:g} are needed to cancel it."
            )
        commutes = _COMMUTES if len(qubits) == 1 else np.kron(_COMMUTES, _COMMUTES)
        inverses.append(_NoiseInverse(place, qubits, commutes @ (1 / fidelity) / len(fidelity)))
    return inverses


@dataclass(frozen=True, eq=False)
class _PauliDraws:
    """Signs (D,) of D draws of all Paulis, and angles (D, P') of the rotations that apply them, 0 or pi."""

    signs: np.ndarray
    angles: np.ndarray


def _draw_paulis(inverses: Sequence[_NoiseInverse], count: int, rng: np.random.Generator) -> _PauliDraws:
    """Draw a Pauli for each noisy gate, `count` times."""
    signs = np.ones(count)
    columns = []
    for inverse in inverses:
        c = inverse.coefficients
        drawn = rng.choice(len(c), count, p=np.abs(c) / np.abs(c).sum())
        signs *= np.sign(c)[drawn]
        for i in range(len(inverse.qubits)):  # the second qubit is the higher digit
            digit = drawn >> (2 * i) & 3
            columns += [(digit == 1) | (digit == 2), (digit == 1) | (digit == 3)]  # X is Y Z up to a phase
    angles = np.pi * np.stack(columns, 1) if columns else np.zeros((count, 0))
    return _PauliDraws(signs, angles)


def _add_paulis(circuit: QuantumCircuit, inverses: Sequence[_NoiseInverse]) -> QuantumCircuit:
    """Add rotations about Y and Z after each noisy gate; their parameters come after the circuit's own."""
    angles = ParameterVector("~pauli", sum(2 * len(inverse.qubits) for inverse in inverses))  # sorts last
    qubits_after = {inverse.place: inverse.qubits for inverse in inverses}
    out, used = circuit.copy_empty_like(), 0
    for place, instruction in enumerate(circuit.data):
        out.append(instruction)
        for qubit in qubits_after.get(place, ()):
            out.ry(angles[used], qubit)  # no device has a gate of the name ry, so these have no noise
            out.rz(angles[used + 1], qubit)
            used += 2
    return out
