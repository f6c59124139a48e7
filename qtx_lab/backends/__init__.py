"""Where circuits run: simulators, twins of devices, IBM's devices; noise, jobs, and the hybrid policy."""

from __future__ import annotations

from .counts import RowCounts
from .exact import Noise
from .hybrid import HybridPolicy, predicted_fidelity
from .noise import ParametricNoise, SimulatorNoise, fake_devices
from .qiskit import QiskitQuantumBackend
from .requests import RowRequest
from .sampler import CircuitSampler

__all__ = [
    "CircuitSampler",
    "HybridPolicy",
    "Noise",
    "ParametricNoise",
    "QiskitQuantumBackend",
    "RowCounts",
    "RowRequest",
    "SimulatorNoise",
    "fake_devices",
    "predicted_fidelity",
]
