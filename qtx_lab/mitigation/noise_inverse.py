"""The inverse of the Pauli part of gates' noise, as Pauli gates with signs that are added to a circuit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector
from qiskit.quantum_info import PTM
from torch import Tensor

from ..backends import QiskitQuantumBackend
from ..backends.aer import AerEngine
from ..backends.exact import Noise, compile_steps, outcome_probabilities
from ..errors import ArgumentError, BackendUnavailable
from .scaling import is_static

MIN_PAULI_FIDELITY = 0.1
"""Least Pauli fidelity of a gate's noise that is still inverted."""

_COMMUTES = np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
"""1 where two of I, X, Y, Z commute, and -1 where they anticommute."""


@dataclass(frozen=True, eq=False)
class NoiseInverse:
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


def total_gamma(inverses: Sequence[NoiseInverse]) -> float:
    """Compute the gamma of a whole circuit."""
    return math.prod(inverse.gamma for inverse in inverses)


def engine_with_pauli_errors(backend: QiskitQuantumBackend) -> AerEngine:
    """The engine of a simulator, which knows the Pauli errors of its gates.

    Raises
    ------
    BackendUnavailable
        If the backend is a device, whose calibration does not tell them.
    """
    engine = backend.engine
    if not isinstance(engine, AerEngine):
        raise BackendUnavailable(
            f"{engine.name} does not report the Pauli errors of its gates: probabilistic error cancellation "
            "is for simulators."
        )
    return engine


def invert_noise(backend: QiskitQuantumBackend, circuit: QuantumCircuit) -> list[NoiseInverse]:
    """Compute the inverse of each noisy gate of a transpiled circuit.

    Raises
    ------
    ArgumentError
        If the circuit measures before its end.
    BackendUnavailable
        If the backend is a device, or if its noise is too strong to be inverted.
    """
    engine = engine_with_pauli_errors(backend)
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
        inverses.append(NoiseInverse(place, name, qubits, c))
    return inverses


@dataclass(frozen=True, eq=False)
class PauliDraws:
    """Signs (D,) of D draws of all Paulis, and angles (D, P') of the rotations that apply them, 0 or pi."""

    signs: np.ndarray
    angles: np.ndarray


def draw_paulis(inverses: Sequence[NoiseInverse], count: int, rng: np.random.Generator) -> PauliDraws:
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
    return PauliDraws(signs, angles)


def add_paulis(circuit: QuantumCircuit, inverses: Sequence[NoiseInverse]) -> QuantumCircuit:
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


def cancelled_probabilities(
    backend: QiskitQuantumBackend,
    circuit: QuantumCircuit,
    inverses: Sequence[NoiseInverse],
    angles: np.ndarray,
    *,
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
