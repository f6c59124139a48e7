"""`TwirledEngine`: a simulator whose two-qubit gates are twirled by random Paulis, with more Pauli errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from qiskit import QuantumCircuit
from qiskit.quantum_info import PTM

from ..backends.aer import AerEngine
from ..backends.exact import Noise
from ..checks import check_number
from ..errors import BackendUnavailable

TWIRLED_GATES = ("cz", "cx", "ecr", "iswap")
"""Gates of two qubits that turn each Pauli string into another, so that random ones around them cancel."""


class TwirledEngine(AerEngine):
    """Runs circuits as an `AerEngine` does, with twirled gates and `level` times the Pauli errors.

    Twirling puts a random Pauli string before each two-qubit gate, and after it the one that undoes it, anew
    for each shot. The noise of the gate then is a Pauli channel: of its matrix in the Pauli basis the
    diagonal f remains. One-qubit gates are merged with those Paulis and are not twirled. Noise is amplified
    as by a Pauli-Lindblad model whose rates are multiplied: Pauli errors with fidelities f^(level - 1) are
    inserted after each gate (probabilistic error amplification, PEA). Readout errors stay as they are. What
    Paulis do is averaged exactly, so that no circuit has to be simulated for each draw of them.

    Sources: Wallman and Emerson, Noise tailoring for scalable quantum computation via randomized compiling
    (2016); Kim et al., Evidence for the utility of quantum computing before fault tolerance (2023), for PEA.

    Parameters
    ----------
    engine : AerEngine
        What it is like.
    level : float
        Noise level, >= 1: a level below 1 would need errors of negative probability, which
        `ProbabilisticErrorCancellation` has.
    """

    def __init__(self, engine: AerEngine, level: float = 1.0):
        vars(self).update(vars(engine), _compiled={})
        self._level = check_number("level", level, least=1)

    def facts(self) -> dict[str, Any]:
        """Return the diagnostics of the engine, with the level; see `Engine.facts`."""
        return {**super().facts(), "twirled": True, "noise_level": self._level}

    def calibrated(self, circuit: QuantumCircuit) -> tuple[QuantumCircuit, Noise]:
        """Return a circuit on the qubits that it uses, and their noise as it is; see `Engine.calibrated`."""
        circuit, noise = super().calibrated(circuit)
        gates: dict[tuple[str, tuple[int, ...]], object] = {}
        for name, qubits in noise.gates:
            channel = noise.channel(name, qubits)
            assert channel is not None
            fidelity = channel.diagonal().clamp_min(0)
            twirled = torch.diag(fidelity) if name in TWIRLED_GATES else channel
            gates[name, qubits] = PTM((fidelity ** (self._level - 1))[:, None].numpy() * twirled.numpy())
        return circuit, Noise(gates, noise.readout)

    def _shots(self, circuit: QuantumCircuit, bindings: np.ndarray, shots: int, seed: int) -> np.ndarray:
        raise BackendUnavailable(
            f"{circuit.name} has {circuit.num_qubits} qubits, too many for the average over random Paulis."
        )
