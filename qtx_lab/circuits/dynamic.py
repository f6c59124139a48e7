"""The loader without entanglement: it measures one bit, chooses the next rotation by it, and so on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister
from qiskit.circuit import ParameterVector
from torch import Tensor

from ..checks import check_count
from .base import Loader, check_num_qubits, node_angles, unpack_values

MAX_QUBITS = 12
"""Most qubits of a dynamic circuit: 12 qubits have 4,094 conditions, more than any device takes."""


MAX_READS = 2
"""Most measurements of a bit."""


@dataclass(frozen=True)
class DynamicLoader(Loader):
    """Measures the key's bits one by one; the bits read so far choose the rotation of the next qubit.

    The most significant bit comes first. The circuit has no two-qubit gate. A register of m bits takes 2^m -
    2 conditions, each of which compares the whole register with one number. They stand one after the other,
    because IBM's devices allow neither nested conditions nor `switch`. Simulators take the feed-forward to
    cost no time; on a device the qubits that wait for it decohere.

    A bit that is misread also sends the circuit down the wrong branch, which inverting readout errors after
    the shot cannot undo. With two readings of each bit, a shot whose readings differ draws no key: it is
    discarded, and feeds nothing forward. If a reading is wrong with probability e, both readings are wrong
    with probability e², and such a shot is kept. A device that misreads 1 more often than 0 loses more shots
    of keys with many ones: `qtx_lab.mitigation.RandomFlips` balances that.

    Parameters
    ----------
    reads : int
        How often each bit is measured, once or twice.

    Raises
    ------
    ArgumentError
        If reads is out of these bounds.

    Source: Griffiths and Niu, Semiclassical Fourier transform for quantum computation (1996): a qubit that
    does nothing but control others can be measured first.

    Examples
    --------
    >>> DynamicLoader().circuit(3).num_nonlocal_gates()
    0
    >>> DynamicLoader(reads=2).circuit(3).count_ops()["measure"]
    6
    """

    name = "dynamic"
    exact = True

    reads: int = 1

    def __post_init__(self) -> None:
        reads = check_count("reads", self.reads, 1, MAX_READS)
        object.__setattr__(self, "reads", reads)
        object.__setattr__(self, "feeds_forward", reads == 1)

    def circuit(self, size: int) -> QuantumCircuit:
        """Build the circuit of `size` qubits; see `Loader.circuit`."""
        check_num_qubits(size, MAX_QUBITS)
        angle = ParameterVector("a", (1 << size) - 1)
        reads = self.reads
        register = ClassicalRegister(size * reads, "c")
        circuit = QuantumCircuit(QuantumRegister(size, "q"), register, name=self.name)
        for level in range(size):
            target, count = size - 1 - level, 1 << level
            if level == 0:
                circuit.ry(angle[0], target)
            else:
                for x in range(count):
                    read = _repeated(x << (size - level), size, reads)  # bits not yet measured are 0
                    with circuit.if_test((register, read)):
                        circuit.ry(angle[count - 1 + x], target)
            for i in range(reads):
                circuit.measure(target, target * reads + i)
        return circuit

    def angles(self, p: Tensor) -> np.ndarray:
        """Compute the angles of the rows' binary trees; see `Loader.angles`."""
        return node_angles(p).numpy()

    def keys(self, outcomes: np.ndarray, n: int) -> np.ndarray:
        """Return the key of each shot, -1 where two readings of a bit differ; see `Loader.keys`."""
        if self.reads == 1:
            return super().keys(outcomes, n)
        value = unpack_values(outcomes)
        size = self.size(n)
        key = np.zeros_like(value)
        for bit in range(size):
            key |= (value >> bit * self.reads & 1) << bit
        agree = value == _repeated(key, size, self.reads)
        return np.where(agree & (key < n), key, -1)


def _repeated(key: Any, size: int, reads: int) -> Any:
    """The value of a register in which each of the key's bits stands `reads` times.

    >>> f"{_repeated(0b101, size=3, reads=2):b}"
    '110011'
    """
    ones = (1 << reads) - 1
    return sum((key >> bit & 1) * (ones << bit * reads) for bit in range(size))
