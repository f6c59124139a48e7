"""Probabilistic error cancellation: random Pauli gates with signs undo the Pauli part of known noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector
from qiskit.quantum_info import PTM
from scipy import special
from torch import Tensor

from ..backends import QiskitQuantumBackend, RowCounts
from ..backends.aer import AerEngine
from ..backends.base import Engine
from ..backends.counts import draw_counts
from ..backends.exact import Noise, compile_steps, outcome_probabilities
from ..backends.requests import PlannedRun
from ..checks import check_count, check_number
from ..errors import ArgumentError, BackendUnavailable, DtypeError, FallbackWarning
from .circuit import CircuitMitigation
from .projection import project_to_simplex, sum_by_key
from .readout import laplace_variance, planned_calibration, readout_errors, undo_readout
from .register import register_counts, register_keys
from .rehearsal import expected_errors, unpaid_warning
from .results import MitigatedRows, check_backend, checked_request, finish_request
from .scaling import is_static, scale_noise

MIN_PAULI_FIDELITY = 0.1
"""Least Pauli fidelity of a gate's noise that is still inverted."""

MAX_OVERHEAD_SHARE = 0.1
"""Part of the shots that the overhead may be without a warning."""

MIN_LOSS = 0.02
"""Part of the expected error of raw counts by which that of a mitigation must be larger for a warning."""

LOW_MASS = 0.5
"""Rows whose signed shares sum to less are reported."""

MIN_SIGNAL = 2.0
"""Least sum of a row's signed shares, in its standard errors, for which anything is said of the row."""

_TWIRLED: WeakKeyDictionary[QiskitQuantumBackend, dict[Engine, QiskitQuantumBackend]] = WeakKeyDictionary()
"""Twirled backends, so that their circuits are compiled only once."""

_INVERSES: WeakKeyDictionary[QiskitQuantumBackend, dict[tuple[object, ...], list[_NoiseInverse]]] = (
    WeakKeyDictionary()
)
"""The inverses of each backend's circuits."""

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
    are taken to have no noise, as where they are merged with the gates beside them. Decoherence of qubits
    that wait is not cancelled.

    Two-qubit gates are twirled (see `TwirledEngine`), so that all of their noise is Pauli noise. On the twins
    of IBM's devices the bias that is left is then a tenth to a fifth of that without twirling.

    If neither instances nor a precision is given, the Paulis are drawn anew for each shot, which is best: 64
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
        Standard error that no key's probability may exceed, in place of `instances`: gamma² / precision²
        draws are enough, because a draw counts as at most gamma. Fewer shots than that are refused.
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
        for argument, given in (("readout", readout), ("twirled", twirled)):
            if not isinstance(given, bool):
                raise DtypeError(f"{argument}={given!r} is not allowed: it must be True or False.")
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
            On a device, whose calibration does not tell its Pauli errors; for noise that is too strong to be
            inverted.
        """
        return _gamma(self._inverses(backend, n)) ** 2

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
        engine = backend.engine
        if not isinstance(engine, AerEngine):
            raise BackendUnavailable(
                f"{engine.name} does not tell the Pauli errors of its gates: probabilistic error "
                "cancellation is for simulators."
            )
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
            x, q = (_probabilities(noisy, circuit, inverses, angles, signed) for signed in (True, False))
            x = x / _gamma(inverses)
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
        draws = _draw_paulis(inverses, len(p) * instances, np.random.default_rng(seed))
        angles = np.repeat(backend.loader.angles(p), instances, axis=0)
        bindings = np.concatenate((angles, draws.angles), axis=1)
        counts = register_counts(noisy, _add_paulis(circuit, inverses), bindings, shots, seed)
        return counts, _gamma(inverses) * torch.from_numpy(draws.signs)

    def _inverses(self, backend: QiskitQuantumBackend, n: int) -> list[_NoiseInverse]:
        """The inverse of each noisy gate of the circuit for rows of n keys."""
        model = backend if self.model is None else self.model
        known = _INVERSES.setdefault(backend, {})
        key = (model.engine, backend.engine, backend.loader, backend.optimization_level, n)
        if key not in known:
            known[key] = _invert_noise(model, backend.transpiled(n))
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
        gamma, keys = _gamma(self._inverses(backend, p.shape[-1])), register_keys(backend, p.shape[-1])
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
        signed_mass, mass = mass[:, 0], mass.where(known, torch.ones_like(mass))
        estimate = by_key.mean(1) / mass
        # The variance of a ratio: what each instance has beyond its share of the mass, which varies with the
        # signs. Laplace's rule, as for plain counts, for what few instances and few shots do not show: one
        # more instance whose Paulis, with the other sign, spread it over all keys, and one more shot for and
        # against each key.
        beyond = by_key - estimate[:, None] * masses
        gamma = float(signs.abs().max())
        spread = gamma * (estimate + 1 / p.shape[-1])
        variance = (beyond.square().sum(1) + spread.square()) / (instances * (instances - 1))
        # Student's t for few instances: 1.96 standard errors are a 95 % interval.
        few = float(special.stdtrit(instances - 1, 0.975) / special.ndtri(0.975))
        shots = counts.view(rows, instances, -1).sum((1, 2))[:, None].double()
        return _signed_rows(_Signed(estimate, variance, mass, known, signed_mass), shots, gamma, support, few)

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


def combine_signed(
    p: Tensor, counts: Tensor, gamma: float, keys: Tensor, errors: Tensor | None = None
) -> MitigatedRows:
    """Estimate rows from the counts of shots with signs, for each of which Paulis were drawn.

    Parameters
    ----------
    p : Tensor, (R, n)
        The rows that were measured; only which keys are masked is used.
    counts : Tensor, (R, 2 * V)
        How often the register had each of its V values in shots that count as gamma, and then in those that
        count as -gamma.
    gamma : float
    keys : Tensor, int64, (V,)
        Key of each value, -1 for no key.
    errors : Tensor, (bits, 2, 2), optional
        Readout errors to be undone.

    Returns
    -------
    MitigatedRows
        A row whose signed shares nearly cancel has estimate 0 and standard error NaN, and a fallback says so.
    """
    n, support = p.shape[-1], (p > 0).double()
    shots = counts.sum(-1, keepdim=True).double()
    plus, minus = (counts.double() / shots).view(len(p), 2, -1).unbind(1)
    values = torch.eye(plus.shape[-1], dtype=torch.float64)
    if errors is not None:
        values = undo_readout(values, errors)
    # What a shot that reads value v adds to key k of a row without a mask, [V, n].
    adds = sum_by_key(values, keys, torch.ones(len(values), n, dtype=torch.bool))
    by_key = gamma * (plus - minus) @ adds * support
    mass = by_key.sum(-1, keepdim=True)
    share, adds_mass = plus + minus, support @ adds.mT  # [R, V]: what a shot adds to the row's mass
    square_of_mass = (share * adds_mass.square()).sum(-1, keepdim=True)
    known = mass > MIN_SIGNAL * ((gamma**2 * square_of_mass - mass.square()) / shots).clamp_min(0).sqrt()
    signed_mass, mass = mass[:, 0], mass.where(known, torch.ones_like(mass))
    estimate = by_key / mass
    # The variance of a ratio, as in `combine_instances`: the mean over the shots of
    # gamma² (adds_k - estimate_k adds_mass)².
    square = share @ adds.square() - 2 * estimate * ((share * adds_mass) @ adds)
    beyond = gamma**2 * (square + estimate.square() * square_of_mass).clamp_min(0)
    spread = gamma * (estimate + 1 / n)
    variance = beyond / shots + (spread / shots).square()
    return _signed_rows(_Signed(estimate, variance, mass, known, signed_mass), shots, gamma, p > 0)


@dataclass(frozen=True, eq=False)
class _Signed:
    """Rows (R, n) from signed shots: estimates and their variances, both of which are still to be finished.

    The mass (R, 1) is that by which rows are divided, 1 where nothing is known of them; `signed_mass` (R,) is
    what was measured.
    """

    estimate: Tensor
    variance: Tensor
    mass: Tensor
    known: Tensor
    signed_mass: Tensor


def _signed_rows(
    rows: _Signed, shots: Tensor, gamma: float, support: Tensor, few: float = 1.0
) -> MitigatedRows:
    """Project estimates, count what few shots (R, 1) do not show, and say of which rows little is known."""
    fallbacks: tuple[str, ...] = ()
    known, count = rows.known, len(rows.known)
    if not bool(known.all()):
        fallbacks = (
            f"The signed shots of {int((~known).sum())} of {count} rows cancel to within {MIN_SIGNAL:g} "
            "standard errors: their weights are 0. Use more shots or another mitigation.",
        )
    low = int((known & (rows.mass < LOW_MASS)).sum())
    if low:
        fallbacks += (
            f"The signed shots of {low} of {count} rows sum to less than {LOW_MASS:g} and not to about 1: "
            "their weights are badly known. Use more shots or another mitigation.",
        )
    unseen = gamma**2 * laplace_variance(shots * rows.estimate.clamp(0, 1), shots)
    std_error = few * torch.maximum(rows.variance, unseen).sqrt() / rows.mass
    return MitigatedRows(
        project_to_simplex(rows.estimate, support).where(known, 0),
        std_error.where(known, torch.nan),
        fallbacks,
        rows.signed_mass,
    )


def _probabilities(
    backend: QiskitQuantumBackend,
    circuit: QuantumCircuit,
    inverses: Sequence[_NoiseInverse],
    angles: np.ndarray,
    signed: bool,
) -> Tensor:
    """Probabilities of the register's values, (R, 2^bits), with the Paulis of all inverses.

    The channel after a gate is sum_Q c_Q Q rho Q if signed, and otherwise sum_Q |c_Q| Q rho Q / gamma.
    """
    calibrated, noise = backend.engine.calibrated(circuit)
    gates = dict(noise.gates)
    for inverse in inverses:
        c = inverse.coefficients if signed else np.abs(inverse.coefficients) / inverse.gamma
        fidelity = _commutes(len(inverse.qubits)) @ c
        channel = noise.channel(inverse.name, inverse.qubits)
        before = np.eye(len(fidelity)) if channel is None else channel.numpy()
        gates[inverse.name, inverse.qubits] = PTM(fidelity[:, None] * before)
    steps = compile_steps(calibrated, Noise(gates, noise.readout))
    if steps is None:
        raise BackendUnavailable(f"{circuit.name} is too large for the average over random Paulis.")
    probabilities, values = outcome_probabilities(steps, angles, signed=signed)
    out = torch.zeros(len(angles), 1 << circuit.num_clbits, dtype=torch.float64)
    out[:, torch.from_numpy(values)] = probabilities
    return out


def _commutes(qubits: int) -> np.ndarray:
    """1 where Pauli strings commute, and -1 where they anticommute, (4^k, 4^k)."""
    return _COMMUTES if qubits == 1 else np.kron(_COMMUTES, _COMMUTES)


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
    name : str
        The gate's.
    qubits : tuple of int
        The k qubits of the gate.
    coefficients : ndarray, (4^k,)
        c of each Pauli string.
    """

    place: int
    name: str
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
        c = _commutes(len(qubits)) @ (1 / fidelity) / len(fidelity)
        inverses.append(_NoiseInverse(place, name, qubits, c))
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
