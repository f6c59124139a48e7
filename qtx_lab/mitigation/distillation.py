"""Virtual distillation: two noisy copies of a row's state, and the probabilities of what they have in common, squared."""

from __future__ import annotations

import numpy as np
from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister
from torch import Tensor

from ..circuits import Loader, TreeLoader
from ..circuits.base import check_num_qubits, unpack_values

MOST = 3
"""Qubits of a copy: two copies and the ancilla are seven."""


class TwoCopyLoader(Loader):
    """Two copies of a tree-loaded row, exchanged under the control of an ancilla, for `CircuitMitigation`.

    The ancilla's Z averages Tr(SWAP rho ⊗ rho |j><j| ⊗ 1) = <j|rho²|j> over the shots that measure key j in the first
    copy, and Tr rho² over all: their ratio is the row as the dominant eigenvector of rho has it. Errors that differ
    from shot to shot are suppressed; those of the exchange, seven two-qubit gates and more a qubit, are added, so that
    it seldom pays. Counts alone are no draws from the row: shots have signs.

    Source: Huggins et al., Virtual distillation for quantum error mitigation (2021), for M = 2 with an ancilla; and
    Koczor, Exponential error suppression for near-term quantum devices (2021).

    >>> circuit = TwoCopyLoader().circuit(2)
    >>> circuit.num_qubits, circuit.num_clbits
    (5, 3)
    """

    name = "two copies"
    exact = False

    def size(self, n: int) -> int:
        return TreeLoader().size(n)

    def circuit(self, size: int) -> QuantumCircuit:
        check_num_qubits(size, MOST)
        # With its phases: both copies have to be the same state, so that SWAP sees no more than noise.
        tree = TreeLoader(phase=True).circuit(size)
        tree.remove_final_measurements()
        circuit = QuantumCircuit(
            QuantumRegister(2 * size + 1, "q"), ClassicalRegister(size + 1, "c"), name="two-copies"
        )
        first, second, ancilla = range(size), range(size, 2 * size), 2 * size
        circuit.compose(tree, first, inplace=True)
        circuit.compose(tree, second, inplace=True)
        circuit.h(ancilla)
        for a, b in zip(first, second, strict=True):
            circuit.cswap(ancilla, a, b)
        circuit.h(ancilla)
        circuit.measure([*first, ancilla], range(size + 1))
        return circuit.decompose("cswap").decompose("ccx")  # in gates of at most two qubits

    def angles(self, p: Tensor) -> np.ndarray:
        return TreeLoader(phase=True).angles(p)

    def keys(self, outcomes: np.ndarray, n: int) -> np.ndarray:
        key = unpack_values(outcomes) & ((1 << self.size(n)) - 1)
        return np.where(key < n, key, -1)

    def signs(self, outcomes: np.ndarray, n: int) -> np.ndarray:
        """What each measured bit pattern counts, 1 or -1: the ancilla's Z."""
        return 1 - 2 * (unpack_values(outcomes) >> self.size(n) & 1)
