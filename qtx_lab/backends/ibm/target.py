"""`TargetEngine`: plans what a device would be sent, from a target of it, without an account or a network."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
from qiskit import QuantumCircuit
from qiskit.transpiler import Target

from ...errors import BackendUnavailable, DtypeError, unknown_name
from ..base import Engine
from ..costs import Cost
from ..exact import Noise
from ..noise import fake_device, fake_devices, instruction_errors, on_used_qubits
from ..requests import PlannedRun, Request
from .engine import estimated_cost, transpile_for

MAX_SHOTS = 100_000
"""Most shots of a circuit in one job on IBM's devices, where a target does not say it."""


class TargetEngine(Engine):
    """The gates of a device, for which circuits are transpiled and priced, and on which nothing runs.

    Parameters
    ----------
    target : Target or str
        The target of a device, or the name of a twin in `fake_devices()`.

    Raises
    ------
    ArgumentError
        If no twin has the name.
    DtypeError
        If it is neither a target nor a name.

    Examples
    --------
    >>> TargetEngine("fake_fez").facts()["num_qubits"]
    156
    """

    ideal = False

    def __init__(self, target: Target | str):
        if isinstance(target, str):
            if target not in fake_devices():
                raise unknown_name("target", target, fake_devices())
            self.name, target = target, fake_device(target).target
        elif isinstance(target, Target):
            self.name = "the target that was given"
        else:
            raise DtypeError(
                f"target is a {type(target).__name__}; it must be a qiskit Target or the name of a twin."
            )
        self._target = target
        self._digest = hashlib.sha256(pickle.dumps(target)).hexdigest()[:20]

    def identity(self) -> str:
        return f"target {self._digest}"

    def facts(self) -> dict[str, Any]:
        return {
            "device": self.name,
            "calibration": None,
            "noise": "device",
            "num_qubits": self._target.num_qubits,
        }

    def transpile(self, circuit: QuantumCircuit, level: int) -> QuantumCircuit:
        return transpile_for(self._target, self.name, circuit, level)

    def errors(self, circuit: QuantumCircuit) -> list[float]:
        return instruction_errors(circuit, self._target)

    def calibrated(self, circuit: QuantumCircuit) -> tuple[QuantumCircuit, Noise]:
        return on_used_qubits(circuit, self._target)

    def cost(self, runs: Sequence[PlannedRun]) -> Cost:
        return estimated_cost(runs, self._target, MAX_SHOTS)

    def run(
        self,
        circuit: QuantumCircuit,
        bindings: np.ndarray,
        shots: int,
        seed: int,
        request: Request | None = None,
    ) -> np.ndarray:
        raise BackendUnavailable(f"{self.name} is only planned for: nothing runs on it.")
