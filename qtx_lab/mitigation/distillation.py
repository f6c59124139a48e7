"""Virtual distillation: two noisy copies of a row show the squared probabilities of what they share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister
from torch import Tensor

from ..circuits import Loader, TreeLoader
from ..circuits.base import check_num_qubits, unpack_values

MAX_COPY_QUBITS = 3
"""Most qubits of one copy: two copies and the ancilla then have seven."""


@dataclass(frozen=True)
class TwoCopyLoader(Loader):
    """Prepares two copies of a row by trees, and swaps them under the control of an ancilla.

    Over the shots that measure key j in the first copy, the ancilla's Z averages Tr(SWAP rho ⊗ rho |j><j| ⊗
    1) = <j|rho²|j>; over all shots it averages Tr rho². Their ratio is the row as the dominant eigenvector of
    rho holds it. Errors that differ from shot to shot are suppressed. Those of the swap, at least seven
    two-qubit gates for each qubit, are added. Shots have signs: counts alone are no draws from the row.

    Experimental: the swap mostly adds more errors than it takes away.

    Sources: Huggins et al., Virtual distillation for quantum error mitigation (2021), for M = 2 with an
    ancilla; and Koczor, Exponential error suppression for near-term quantum devices (2021).

    Examples
    --------
    >>> circuit = TwoCopyLoader().circuit(2)
    >>> circuit.num_qubits, circuit.num_clbits
    (5, 3)
    """

    name = "two copies"
    exact = False

    def circuit(self, size: int) -> QuantumCircuit:
        """Build the circuit of two copies of `size` qubits and the ancilla; see `Loader.circuit`."""
        check_num_qubits(size, MAX_COPY_QUBITS)
        # With its phases: both copies have to be the same state, so that the swap changes nothing but for
        # noise.
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
        return circuit.decompose("cswap").decompose("ccx")  # into gates of at most two qubits

    def angles(self, p: Tensor) -> np.ndarray:
        """Compute the angles of the tree, which both copies share; see `Loader.angles`."""
        return TreeLoader(phase=True).angles(p)

    def keys(self, outcomes: np.ndarray, n: int) -> np.ndarray:
        """Return the key in the first copy; see `Loader.keys`."""
        key = unpack_values(outcomes) & ((1 << self.size(n)) - 1)
        return np.where(key < n, key, -1)

    def signs(self, outcomes: np.ndarray, n: int) -> np.ndarray:
        """Return the ancilla's Z; see `Loader.signs`."""
        return 1 - 2 * (unpack_values(outcomes) >> self.size(n) & 1)
