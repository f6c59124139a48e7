"""The entangling loader: a binary tree of multiplexed Ry rotations that prepares sum_j sqrt(p_j) |j>."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector
from torch import Tensor

from ..checks import check_flags
from .base import (
    MAX_QUBITS,
    Loader,
    blank_circuit,
    check_num_qubits,
    node_angles,
    num_bits,
    walsh_hadamard,
)


@dataclass(frozen=True)
class TreeLoader(Loader):
    """Has one qubit for each bit; the angle of its rotation depends on all more significant bits.

    A rotation that l qubits control this way is made of 2^l rotations and 2^l CZ gates, in the order of a
    Gray code. The angles of those rotations are a Walsh-Hadamard transform of the tree's angles. The last CZ
    gate of each multiplexed rotation changes only signs. A circuit of m qubits has 2^m - m - 1 two-qubit
    gates without these CZ gates and 2^m - 2 with them.

    Source: Möttönen, Vartiainen, Bergholm and Salomaa, Transformation of quantum states using uniformly
    controlled rotations (2005). CZ gates stand for the CNOT gates there: Z Ry(a) Z = Ry(-a), as X Ry(a) X is.

    Parameters
    ----------
    phase : bool
        Whether to keep the last CZ gates, so that all amplitudes are +sqrt(p_j). Measured keys do not need
        them.

    Examples
    --------
    >>> TreeLoader().circuit(3).num_parameters
    7
    """

    name = "tree"
    exact = True

    phase: bool = False

    def __post_init__(self) -> None:
        check_flags(phase=self.phase)

    def circuit(self, size: int) -> QuantumCircuit:
        """Build the circuit of `size` qubits; see `Loader.circuit`."""
        check_num_qubits(size, MAX_QUBITS)
        angle = ParameterVector("a", (1 << size) - 1)
        circuit = blank_circuit(size, self.name)
        for level in range(size):
            target, count = size - 1 - level, 1 << level
            for i in range(count):
                circuit.ry(angle[count - 1 + i], target)
                if i + 1 < count or (self.phase and level):
                    # The bit in which the Gray codes of i and i + 1 differ. From the last code, the highest
                    # bit leads back to code 0.
                    bit = min((~i & (i + 1)).bit_length() - 1, level - 1)
                    circuit.cz(size - level + bit, target)
        if self.phase:
            circuit.barrier()  # otherwise the transpiler drops the gates that change nothing but phases
        circuit.measure(range(size), range(size))
        return circuit

    def angles(self, p: Tensor) -> np.ndarray:
        """Transform the angles of the rows' binary trees to Gray-code order; see `Loader.angles`."""
        nodes = node_angles(p)
        levels = []
        for level in range(num_bits(p.shape[-1])):
            count = 1 << level
            # a_g = 2^-l sum_x (-1)^|x & g| theta_x for the Gray code g of each i
            transformed = walsh_hadamard(nodes[:, count - 1 : 2 * count - 1]) / count
            i = torch.arange(count)
            levels.append(transformed[:, i ^ (i >> 1)])
        return torch.cat(levels, -1).numpy()
