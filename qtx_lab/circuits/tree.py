"""The entangling loader: a binary tree of multiplexed Ry rotations that leaves sum_j sqrt(p_j) |j>."""

from __future__ import annotations

import numpy as np
import torch
from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister
from qiskit.circuit import ParameterVector
from torch import Tensor

from .base import MOST_QUBITS, binary_keys, check_size, node_angles, num_bits


class TreeLoader:
    """One qubit a bit, most significant first, each rotated by an angle that depends on those before it.

    A rotation multiplexed over l qubits is 2^l rotations and 2^l CZ gates in Gray-code order, the angles a
    Walsh-Hadamard transform of the tree's. The last CZ of each gives only signs: 2^m - m - 1 two-qubit gates where
    they are dropped, 2^m - 2 where `phase` keeps them.

    Source: Möttönen, Vartiainen, Bergholm and Salomaa, Transformation of quantum states using uniformly controlled
    rotations (2005), whose CNOT gates are CZ gates here: Z Ry(a) Z = Ry(-a) as X Ry(a) X does.

    Parameters
    ----------
    phase : bool
        Keep the last CZs, so that all amplitudes are +sqrt(p_j). False will do where only keys are measured.

    >>> TreeLoader().circuit(3).num_parameters
    7
    """

    name = "tree"
    exact = True

    def __init__(self, phase: bool = False):
        self.phase = phase

    def size(self, n: int) -> int:
        return num_bits(n)

    def circuit(self, size: int) -> QuantumCircuit:
        check_size(size, MOST_QUBITS)
        angle = ParameterVector("a", (1 << size) - 1)
        circuit = QuantumCircuit(QuantumRegister(size, "q"), ClassicalRegister(size, "c"), name=self.name)
        for level in range(size):
            target, count = size - 1 - level, 1 << level
            for i in range(count):
                circuit.ry(angle[count - 1 + i], target)
                if i + 1 < count or (self.phase and level):
                    # The bit in which the Gray codes of i and i + 1 differ; the highest to come back to code 0.
                    bit = min((~i & (i + 1)).bit_length() - 1, level - 1)
                    circuit.cz(size - level + bit, target)
        if self.phase:
            circuit.barrier()  # or the transpiler drops what only changes phases
        circuit.measure(range(size), range(size))
        return circuit

    def angles(self, p: Tensor) -> np.ndarray:
        nodes = node_angles(p)
        levels = []
        for level in range(num_bits(p.shape[-1])):
            count = 1 << level
            x = nodes[:, count - 1 : 2 * count - 1]
            for bit in range(level):  # a_g = 2^-l sum_x (-1)^|x & g| theta_x
                pairs = x.reshape(len(x), -1, 2, 1 << bit)
                x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2)
                x = x.reshape(len(nodes), count)
            i = torch.arange(count)
            levels.append(x[:, i ^ (i >> 1)] / count)
        return torch.cat(levels, -1).numpy()

    def keys(self, outcomes: np.ndarray, n: int) -> np.ndarray:
        return binary_keys(outcomes, n)
