"""The loader without entanglement: it measures one bit, chooses the next rotation by it, and so on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector
from torch import Tensor

from .base import Loader, blank_circuit, check_num_qubits, node_angles

MAX_QUBITS = 12
"""Most qubits of a dynamic circuit: 12 qubits have 4,094 conditions, more than any device takes."""


@dataclass(frozen=True)
class DynamicLoader(Loader):
    """Measures the key's bits one by one; the bits read so far choose the rotation of the next qubit.

    The most significant bit comes first. The circuit has no two-qubit gate. A register of m bits takes 2^m -
    2 conditions, each of which compares the whole register with one number. They stand one after the other,
    because IBM's devices allow neither nested conditions nor `switch`. Simulators take the feed-forward to
    cost no time; on a device the qubits that wait for it decohere.

    Source: Griffiths and Niu, Semiclassical Fourier transform for quantum computation (1996): a qubit that
    does nothing but control others can be measured first.

    Examples
    --------
    >>> DynamicLoader().circuit(3).num_nonlocal_gates()
    0
    """

    name = "dynamic"
    exact = True
    feeds_forward = True

    def circuit(self, size: int) -> QuantumCircuit:
        """Build the circuit of `size` qubits; see `Loader.circuit`."""
        check_num_qubits(size, MAX_QUBITS)
        angle = ParameterVector("a", (1 << size) - 1)
        circuit = blank_circuit(size, self.name)
        register = circuit.cregs[0]
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
        """Compute the angles of the rows' binary trees; see `Loader.angles`."""
        return node_angles(p).numpy()
