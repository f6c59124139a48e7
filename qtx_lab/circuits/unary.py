"""The one-hot loader: one qubit for each key, so that a shot without exactly one 1 is known to be wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector
from torch import Tensor

from .base import Loader, blank_circuit, check_num_qubits, node_angles, num_bits

MAX_QUBITS = 1024
"""Most qubits, and so keys, of a one-hot circuit."""


@dataclass(frozen=True)
class UnaryLoader(Loader):
    """Splits a single excitation in two, again and again along the row's tree: sum_j sqrt(p_j) |0..1_j..0>.

    A row of n keys takes n qubits and 2(n - 1) two-qubit gates, in depth O(log n). An error that changes the
    number of ones is seen, and the shot is discarded.

    Source: Johri et al., Nearest centroid classification on a trapped ion quantum computer (2021), whose
    parallel unary loader has this tree. Here each split is a rotation about Y, a CZ, the inverse rotation,
    and a CX.

    Examples
    --------
    >>> UnaryLoader().circuit(5).num_nonlocal_gates()
    8
    """

    name = "unary"
    exact = True

    def size(self, n: int) -> int:
        """Return n: there is a qubit for each key."""
        return n

    def circuit(self, size: int) -> QuantumCircuit:
        """Build the circuit of `size` qubits; see `Loader.circuit`."""
        check_num_qubits(size, MAX_QUBITS)
        angle = ParameterVector("a", size - 1)
        circuit = blank_circuit(size, self.name)
        circuit.x(0)
        for i, split in enumerate(_splits(size)):
            circuit.ry(-angle[i] / 2, split.middle)
            circuit.cz(split.first, split.middle)
            circuit.ry(angle[i] / 2, split.middle)
            circuit.cx(split.middle, split.first)
        circuit.measure(range(size), range(size))
        return circuit

    def angles(self, p: Tensor) -> np.ndarray:
        """Select the angles of the tree's nodes that have a right half; see `Loader.angles`."""
        return node_angles(p)[:, [split.node for split in _splits(p.shape[-1])]].numpy()

    def keys(self, outcomes: np.ndarray, n: int) -> np.ndarray:
        """Return the position of the only 1, and -1 where not exactly one bit is 1; see `Loader.keys`."""
        bits = np.unpackbits(outcomes, axis=-1, bitorder="big")[..., ::-1]  # [..., 8 B], bit 0 first
        return np.where(bits.sum(-1) == 1, bits.argmax(-1), -1)


@dataclass(frozen=True)
class _Split:
    """A node of the binary tree whose keys start at `first`; the keys of its right half start at `middle`."""

    node: int
    first: int
    middle: int


def _splits(n: int) -> list[_Split]:
    """List the nodes of the binary tree over n keys that have a right half, in the order of `node_angles`."""
    m = num_bits(n)
    return [
        _Split((1 << level) - 1 + x, x << (m - level), (2 * x + 1) << (m - level - 1))
        for level in range(m)
        for x in range(1 << level)
        if (2 * x + 1) << (m - level - 1) < n
    ]
