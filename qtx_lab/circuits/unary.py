"""The one-hot loader: a qubit a key, exactly one of them 1, so that a shot with another count is known to be wrong."""

from __future__ import annotations

import numpy as np
from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister
from qiskit.circuit import ParameterVector
from torch import Tensor

from .base import check_size, node_angles, num_bits

MOST = 1024
"""Qubits."""


class UnaryLoader:
    """A single excitation, split in two again and again along the row's binary tree: sum_j sqrt(p_j) |0..1_j..0>.

    n qubits and 2(n - 1) two-qubit gates in depth O(log n). Errors that change the number of ones are seen, and
    the shot is discarded.

    Source: Johri et al., Nearest centroid classification on a trapped ion quantum computer (2021), whose parallel
    unary loader has this tree; here each split is a rotation about Y, CZ, its inverse, and CX.

    >>> UnaryLoader().circuit(5).num_nonlocal_gates()
    8
    """

    name = "unary"
    exact = True

    def size(self, n: int) -> int:
        return n

    def circuit(self, size: int) -> QuantumCircuit:
        check_size(size, MOST)
        angle = ParameterVector("a", size - 1)
        circuit = QuantumCircuit(QuantumRegister(size, "q"), ClassicalRegister(size, "c"), name=self.name)
        circuit.x(0)
        for i, (_, first, middle) in enumerate(_splits(size)):
            circuit.ry(-angle[i] / 2, middle)
            circuit.cz(first, middle)
            circuit.ry(angle[i] / 2, middle)
            circuit.cx(middle, first)
        circuit.measure(range(size), range(size))
        return circuit

    def angles(self, p: Tensor) -> np.ndarray:
        return node_angles(p)[:, [node for node, *_ in _splits(p.shape[-1])]].numpy()

    def keys(self, outcomes: np.ndarray, n: int) -> np.ndarray:
        bits = np.unpackbits(outcomes, axis=-1, bitorder="big")[..., ::-1]  # [..., 8 B], bit 0 first
        return np.where(bits.sum(-1) == 1, bits.argmax(-1), -1)


def _splits(n: int) -> list[tuple[int, int, int]]:
    """(node, first key, first key of its right half) of the nodes of n keys' binary tree that have a right half."""
    m = num_bits(n)
    return [
        ((1 << level) - 1 + x, x << (m - level), (2 * x + 1) << (m - level - 1))
        for level in range(m)
        for x in range(1 << level)
        if (2 * x + 1) << (m - level - 1) < n
    ]
