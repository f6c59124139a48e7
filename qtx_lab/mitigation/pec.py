"""Probabilistic error cancellation: random Pauli gates with signs that undo the Pauli part of known noise on average."""

from __future__ import annotations

import math

import numpy as np
import torch
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector
from torch import Tensor

from ..backends import QiskitQuantumBackend, RowCounts
from ..backends.aer import AerEngine
from ..checks import check_count
from ..errors import ArgumentError, BackendUnavailable, DtypeError
from .circuit import checked_request, counted, register_counts, register_keys
from .readout import readout_errors, undo_readout
from .scaling import is_static
from .symmetry import keep_keys, project_to_simplex

COMMUTES = np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
"""1 where two of I, X, Y, Z commute, -1 where they do not."""


class ProbabilisticErrorCancellation:
    """A `Mitigation` for simulators, whose noise is known.

    The inverse of a Pauli channel with fidelities f_P is sum_Q c_Q Q rho Q with c_Q = 4^-k sum_P (±1) / f_P, + where P
    and Q commute. Some c are negative: after each noisy gate a Pauli Q is drawn with probability |c_Q| / gamma,
    gamma = sum |c|, and the shot counts as sign(c_Q) gamma. That is unbiased for Pauli noise, as depolarising; of
    damping the part that is no Pauli channel stays. Variance grows by gamma² of all gates: see `overhead` beforehand.
    The drawn Paulis are taken to cost nothing, as where they are merged into the gates beside them.

    Source: Temme, Bravyi and Gambetta, Error mitigation for short-depth quantum circuits (2017).

    Parameters
    ----------
    instances : int
        Draws of all Paulis for each row; its shots are split over them.
    readout : bool
        Undo readout errors too.

    >>> from qtx_lab.backends import ParametricNoise
    >>> backend = QiskitQuantumBackend("aer", noise=ParametricNoise(two_qubit=0.01), loader="tree")
    >>> round(ProbabilisticErrorCancellation().overhead(backend, 8), 3)
    1.162
    """

    def __init__(self, instances: int = 256, *, readout: bool = False):
        check_count("instances", instances)
        if not isinstance(readout, bool):
            raise DtypeError(f"readout={readout!r} is not allowed: it must be True or False.")
        self.instances, self.readout = instances, readout
        self.name = "readout, pec" if readout else "pec"

    def overhead(self, backend: QiskitQuantumBackend, n: int) -> float:
        """gamma², by how much more shots are needed for the same variance with rows of n keys.

        Raises
        ------
        ArgumentError, BackendUnavailable
            On a device, whose calibration does not tell its Pauli errors; for circuits that measure on the way; for
            noise that leaves nothing to be recovered.
        """
        gates = _inverses(backend, backend.transpiled(n))
        return math.prod(float(np.abs(c).sum()) ** 2 for _, _, c in gates)

    def sample_rows(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        shots: int,
        *,
        generator: torch.Generator | None = None,
    ) -> RowCounts:
        """Measure rows; see `Mitigation`. Its diagnostics hold `overhead`, which is gamma².

        Raises
        ------
        ArgumentError, ShapeError, DtypeError, BackendUnavailable
            As `QiskitQuantumBackend.sample_rows`; as `overhead`; fewer than two shots.
        """
        request = checked_request(backend, p, shots, generator)
        p = request.p
        if shots < 2:
            raise ArgumentError(f"shots={shots} is not allowed: two Pauli draws need one shot each.")
        running, n = request.running, p.shape[-1]
        if not bool(running.any()):
            return backend.sample_rows(p, shots, generator=generator)
        circuit = backend.transpiled(n)
        gates = _inverses(backend, circuit)
        rows, instances = int(running.sum()), min(self.instances, shots)
        each = shots // instances
        rng = np.random.default_rng(request.seed)
        signs, bits = _draw(gates, rows * instances, rng)
        twirled = _with_paulis(circuit, gates)
        angles = np.repeat(backend.loader.angles(p[running]), instances, axis=0)
        bindings = np.concatenate((angles, np.pi * bits), axis=1)
        outcomes = register_counts(backend, twirled, bindings, each, request.seed)
        gamma = math.prod(float(np.abs(c).sum()) for _, _, c in gates)
        shares = outcomes.double().view(rows, instances, -1) / each
        if self.readout:
            errors = readout_errors(backend, n, seed=request.seed)
            shares = undo_readout(shares.flatten(0, 1), errors).view_as(shares)
        signed = gamma * torch.from_numpy(signs)[:, None] * shares.flatten(0, 1)
        keys, support = register_keys(backend, n), p[running] > 0
        kept, _ = keep_keys(signed, keys, support.repeat_interleave(instances, 0))
        kept = kept.view(rows, instances, -1)
        mass = kept.sum(-1).mean(1)[:, None]
        mass = mass.where(mass > 0, torch.ones_like(mass))
        estimate = kept.mean(1) / mass
        # Of a ratio: what each instance has beyond its share of the mass, which goes up and down with the signs.
        beyond = kept - estimate[:, None] * kept.sum(-1, keepdim=True)
        std_error = (beyond.square().sum(1) / (instances * (instances - 1))).sqrt() / mass
        counts, _ = keep_keys(outcomes.view(rows, instances, -1).sum(1), keys, support)
        return counted(
            request,
            counts,
            project_to_simplex(estimate, support),
            std_error,
            {
                **backend.diagnostics(circuit, request),
                "mitigation": self.name,
                "overhead": gamma**2,
                "instances": instances,
                "unused_shots": shots - each * instances,
            },
        )


def _inverses(
    backend: QiskitQuantumBackend, circuit: QuantumCircuit
) -> list[tuple[int, tuple[int, ...], np.ndarray]]:
    """(place in the circuit, qubits, coefficients c (4^k,)) of the inverse of each noisy gate's Pauli part."""
    engine = backend.engine
    if not isinstance(engine, AerEngine):
        raise BackendUnavailable(
            f"{engine.name} does not tell the Pauli errors of its gates: probabilistic error cancellation is for simulators."
        )
    if not is_static(circuit):
        raise ArgumentError(
            f"{circuit.name} measures on the way: its errors are not cancelled; take another loader, as 'tree'."
        )
    _, noise = engine.calibrated(circuit)
    found = []
    for place, instruction in enumerate(circuit.data):
        qubits = tuple(circuit.find_bit(q).index for q in instruction.qubits)
        if instruction.operation.name in ("measure", "barrier"):
            continue
        channel = noise.channel(instruction.operation.name, qubits)
        if channel is None:
            continue
        fidelity = channel.diagonal().numpy()
        if fidelity.min() < 0.1:
            raise BackendUnavailable(
                f"{instruction.operation.name} on qubits {qubits} keeps {fidelity.min():.2g} of a Pauli: too little to recover."
            )
        commutes = COMMUTES if len(qubits) == 1 else np.kron(COMMUTES, COMMUTES)
        found.append((place, qubits, commutes @ (1 / fidelity) / len(fidelity)))
    return found


def _draw(
    gates: list[tuple[int, tuple[int, ...], np.ndarray]], count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Signs (count,), and of each drawn Pauli of each gate and qubit whether it holds Y, and Z: (count, 2 G)."""
    signs = np.ones(count)
    columns = []
    for _, qubits, c in gates:
        drawn = rng.choice(len(c), count, p=np.abs(c) / np.abs(c).sum())
        signs *= np.sign(c)[drawn]
        for i in range(len(qubits)):  # the second qubit is the higher digit
            digit = drawn >> (2 * i) & 3
            columns += [(digit == 1) | (digit == 2), (digit == 1) | (digit == 3)]  # X is Y Z up to a phase
    return signs, np.stack(columns, 1).astype(float) if columns else np.zeros((count, 0))


def _with_paulis(
    circuit: QuantumCircuit, gates: list[tuple[int, tuple[int, ...], np.ndarray]]
) -> QuantumCircuit:
    """The circuit with turns about Y and Z after each noisy gate, by parameters that come after its own."""
    turns = ParameterVector("~pauli", sum(2 * len(qubits) for _, qubits, _ in gates))  # sorts last
    after = {place: qubits for place, qubits, _ in gates}
    out, used = circuit.copy_empty_like(), 0
    for place, instruction in enumerate(circuit.data):
        out.append(instruction)
        for qubit in after.get(place, ()):
            # No device has a gate of the name ry, so that these have no noise of their own.
            out.ry(turns[used], qubit)
            out.rz(turns[used + 1], qubit)
            used += 2
    return out
