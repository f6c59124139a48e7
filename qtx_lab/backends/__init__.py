"""Where circuits run: simulators, twins of devices, IBM's devices; noise, jobs, and the hybrid policy."""

from __future__ import annotations

from .amplitude import AmplitudeEstimate, AmplitudeEstimator
from .counts import RowCounts
from .exact import Noise
from .hybrid import HybridPolicy, predicted_fidelity
from .noise import MedianErrors, ParametricNoise, SimulatorNoise, device_errors, fake_devices
from .noise_sources import AerModelNoise, DeviceNoise, ThermalNoise
from .qiskit import QiskitQuantumBackend
from .requests import RowRequest
from .sampler import CircuitSampler
from .softmax import SoftmaxCircuitSampler

__all__ = [
    "AerModelNoise",
    "AmplitudeEstimate",
    "AmplitudeEstimator",
    "CircuitSampler",
    "DeviceNoise",
    "HybridPolicy",
    "MedianErrors",
    "Noise",
    "ParametricNoise",
    "QiskitQuantumBackend",
    "RowCounts",
    "RowRequest",
    "SimulatorNoise",
    "SoftmaxCircuitSampler",
    "ThermalNoise",
    "device_errors",
    "fake_devices",
    "predicted_fidelity",
]
