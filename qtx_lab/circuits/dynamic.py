"""The loader without entanglement: measure a bit, choose the next rotation by it, and so on."""

from __future__ import annotations

import numpy as np
from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister
from qiskit.circuit import ParameterVector
from torch import Tensor

from .base import binary_keys, check_size, node_angles, num_bits

MOST = 12
"""Qubits: 4,094 conditions is more than any device takes."""


class DynamicLoader:
    """The most significant bit first: Ry, measure, then the next qubit's Ry chosen by the bits so far.

    No two-qubit gate. Each condition is a plain `if_test` of the register against a number, side by side, 2^m - 2 of
    them, since IBM's devices take neither nested conditions nor `switch`. Simulators take feeding forward to cost
    no time; on a device the qubits that wait for it decohere.

    Source: the semiclassical idea of Griffiths and Niu, Semiclassical Fourier transform for quantum computation
    (1996): a qubit that only controls can be measured first.

    >>> DynamicLoader().circuit(3).num_nonlocal_gates()
    0
    """

    name = "dynamic"
    exact = True

    def size(self, n: int) -> int:
        return num_bits(n)

    def circuit(self, size: int) -> QuantumCircuit:
        check_size(size, MOST)
        angle = ParameterVector("a", (1 << size) - 1)
        register = ClassicalRegister(size, "c")
        circuit = QuantumCircuit(QuantumRegister(size, "q"), register, name=self.name)
        for level in range(size):
            target, count = size - 1 - level, 1 << level
            if level == 0:
                circuit.ry(angle[0], target)
            else:
                for x in range(count):
                    with circuit.if_test((register, x << (size - level))):  # bits not yet measured are 0
                        circuit.ry(angle[count - 1 + x], target)
            circuit.measure(target, target)
        return circuit

    def angles(self, p: Tensor) -> np.ndarray:
        return node_angles(p).numpy()

    def keys(self, outcomes: np.ndarray, n: int) -> np.ndarray:
        return binary_keys(outcomes, n)
