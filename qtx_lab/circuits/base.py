"""What a loader is: the base class of all that turns rows into circuits, and the parts that loaders share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister
from torch import Tensor

from ..errors import ArgumentError, DtypeError, ShapeError

MAX_QUBITS = 16
"""Most qubits of a loader whose number of angles doubles with each qubit: 16 qubits have 65,535 angles."""


class Loader(ABC):
    """A way to turn rows of probabilities into circuits: one shot of a row's circuit draws one key.

    One circuit serves all rows of the same size. Its rotation angles are parameters, and `angles` computes
    them for many rows at once. A row that has fewer keys than the circuit can hold is padded with keys of
    probability 0.

    To add a loader, write one file with a subclass and add one line for it to `LOADERS` in
    `qtx_lab/circuits/__init__.py`. The subclass sets `name` and `exact` and defines `circuit` and `angles`.
    The other methods have defaults that suit a register which holds the key as a binary number. A loader
    never changes after it is made: circuits that were built and transpiled for it are reused. A loader with
    settings is best written as a frozen dataclass, so that two loaders with equal settings are equal. The
    tests in `tests/circuits` run over every entry of `LOADERS`.

    Attributes
    ----------
    name : str
        Name in `LOADERS`, in results and in the records of jobs.
    exact : bool
        True if the circuit, run without noise, draws from the row itself; False if it draws from an
        approximation.
    feeds_forward : bool
        True if the circuit measures the key's bits one after the other, the most significant bit first, and
        chooses each rotation by the bits read so far, as `DynamicLoader` does, with one reading of each bit.
        False by default.

    Examples
    --------
    This loader rotates every bit independently of the others. It needs no two-qubit gate, but loses the
    correlations between bits:

    >>> from qiskit.circuit import ParameterVector
    >>> class IndependentBitsLoader(Loader):
    ...     name = "independent-bits"
    ...     exact = False
    ...
    ...     def circuit(self, size):
    ...         circuit = blank_circuit(size, self.name)
    ...         for bit, angle in enumerate(ParameterVector("a", size)):
    ...             circuit.ry(angle, bit)
    ...         circuit.measure(range(size), range(size))
    ...         return circuit
    ...
    ...     def angles(self, p):
    ...         keys = torch.arange(p.shape[-1])
    ...         bits = keys[:, None] >> torch.arange(num_bits(len(keys))) & 1  # [n, m]
    ...         ones = p @ bits.double()  # [R, m], the probability that a bit is 1
    ...         return 2 * ones.clamp_max(1).sqrt().asin().numpy()

    It works wherever a loader is taken, also before it has a line in `LOADERS`:

    >>> from qtx_lab import QiskitQuantumBackend
    >>> backend = QiskitQuantumBackend("aer", loader=IndependentBitsLoader())
    >>> backend.sample_rows(torch.tensor([[0.0, 0.0, 1.0, 0.0]]), shots=10).counts
    tensor([[ 0,  0, 10,  0]])
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    feeds_forward: bool = False

    def size(self, n: int) -> int:
        """Size of the circuit for rows of n keys; rows of the same size share a circuit.

        The default is the number of bits of the key; `UnaryLoader` has one qubit for each key instead.
        """
        return num_bits(n)

    @abstractmethod
    def circuit(self, size: int) -> QuantumCircuit:
        """Build the circuit of a size, with the angles as its `parameters`, and its measurements.

        Bits are best measured into one register `c`. Those of registers with other names are put into it, in
        the circuit's order.

        Raises
        ------
        ArgumentError
            If the circuit would be larger than anything can run.
        """

    @abstractmethod
    def angles(self, p: Tensor) -> np.ndarray:
        """Compute the angles of all rows at once, in the order of `circuit(size(n)).parameters`.

        Parameters
        ----------
        p : Tensor, float64, (R, n)
            Probabilities that `check_rows` returned. Rows of all zeros must not fail, but are never run.

        Returns
        -------
        ndarray, float64, (R, P)
            Angles in radians.
        """

    def keys(self, outcomes: np.ndarray, n: int) -> np.ndarray:
        """Return the key that each measured bit pattern stands for.

        The default reads the register as a binary number.

        Parameters
        ----------
        outcomes : ndarray, uint8, (..., B)
            Bits of the register `c`, packed as in `qiskit.primitives.BitArray`: big-endian, padded on the
            left.
        n : int
            Number of keys.

        Returns
        -------
        ndarray, int64, (...)
            Keys from 0 to n - 1, and -1 where the pattern stands for no key.
        """
        value = unpack_values(outcomes)
        return np.where(value < n, value, -1)

    def signs(self, outcomes: np.ndarray, n: int) -> np.ndarray:
        """Return the sign, 1 or -1, with which a shot of each measured bit pattern is counted.

        The default counts every shot as 1. Arguments and shape of the result are those of `keys`.
        """
        return np.ones(outcomes.shape[:-1], dtype=np.int64)


def blank_circuit(num_qubits: int, name: str) -> QuantumCircuit:
    """Make an empty circuit with a quantum register `q` and a classical register `c` of the same size."""
    return QuantumCircuit(QuantumRegister(num_qubits, "q"), ClassicalRegister(num_qubits, "c"), name=name)


def in_one_register(circuit: QuantumCircuit) -> QuantumCircuit:
    """Return a loader's circuit measured into one register `c`, by whose name devices return bits.

    The bits of registers with other names, and of several, are those of `c` in the circuit's own order, the
    first register's the lowest. Conditions on bits, and on the only register, are those of `c`.

    Raises
    ------
    DtypeError
        If it is no circuit.
    ArgumentError
        If it measures nothing, or tests a register that is a part of its bits.

    Examples
    --------
    >>> circuit = QuantumCircuit(2)
    >>> circuit.measure_all()  # into a register `meas`
    >>> in_one_register(circuit).cregs
    [ClassicalRegister(2, 'c')]
    """
    if not isinstance(circuit, QuantumCircuit):
        raise DtypeError(
            f"The loader's `circuit` gave a {type(circuit).__name__}; it must give a QuantumCircuit."
        )
    if "measure" not in circuit.count_ops():
        raise ArgumentError(
            f"The loader's circuit {circuit.name} measures nothing: a shot would give no key."
        )
    if [(register.name, register.size) for register in circuit.cregs] == [("c", circuit.num_clbits)]:
        return circuit
    register = ClassicalRegister(circuit.num_clbits, "c")
    one = QuantumCircuit(circuit.qubits, *circuit.qregs, register, name=circuit.name)
    one.metadata = circuit.metadata
    one.compose(circuit, one.qubits, one.clbits, inplace=True)
    if one.cregs != [register]:
        raise ArgumentError(
            f"The loader's circuit {circuit.name} has conditions on one of {len(circuit.cregs)} registers: "
            "measure into one register `c`, or test single bits."
        )
    return one


def check_num_qubits(size: int, max_qubits: int) -> None:
    """Refuse a circuit that has no qubit or more than `max_qubits`.

    Raises
    ------
    ArgumentError
        If size is not from 1 to `max_qubits`.
    """
    if not 1 <= size <= max_qubits:
        raise ArgumentError(f"size={size} is not allowed: this loader takes 1 to {max_qubits} qubits.")


def check_rows(p: Tensor, argument: str = "p") -> Tensor:
    """Check rows of probabilities, and return them in float64 on the CPU, each divided by its sum.

    Parameters
    ----------
    p : Tensor, (R, n)
        Rows that sum to 1, or to 0 where every key is masked.
    argument : str
        What error messages call the rows.

    Returns
    -------
    Tensor, float64, (R, n)
        Rows that sum to 1 but for rounding, or are all zeros.

    Raises
    ------
    DtypeError
        If p is not a floating-point tensor.
    ShapeError
        If p is not (R, n) with n >= 1.
    ArgumentError
        If a probability is NaN, infinite or negative, or if a row sums neither to 0 nor to 1. The sum may be
        off by 1e-3, or by the rounding of p's dtype if that is more.

    Examples
    --------
    >>> check_rows(torch.tensor([[0.25, 0.75], [0.0, 0.0]]))
    tensor([[0.2500, 0.7500],
            [0.0000, 0.0000]], dtype=torch.float64)
    """
    if not isinstance(p, Tensor) or not p.is_floating_point():
        given = p.dtype if isinstance(p, Tensor) else type(p).__name__
        raise DtypeError(f"{argument} is {given}; it must be a floating-point tensor.")
    if p.is_meta:
        raise DtypeError(f"{argument} is on the device meta; it must hold numbers.")
    if p.ndim != 2 or p.shape[-1] == 0:
        raise ShapeError(f"{argument} has shape {tuple(p.shape)}; it must be (R, n) with n >= 1 keys.")
    tolerance = max(1e-3, torch.finfo(p.dtype).eps)  # bfloat16: 2^-7
    p = p.detach().to("cpu", torch.float64)
    if not bool((p >= 0).all()) or not bool(p.isfinite().all()):  # the first is also False for NaN
        raise ArgumentError(f"{argument} holds a negative number, NaN or infinity; probabilities are >= 0.")
    total = p.sum(-1, keepdim=True)
    wrong = ((total - 1).abs() > tolerance) & (total != 0)
    if bool(wrong.any()):
        row = int(wrong.squeeze(-1).nonzero()[0])
        raise ArgumentError(
            f"{argument}[{row}] sums to {float(total[row]):.6g}; a row must sum to 1, or be all zeros if "
            "every key is masked."
        )
    return p / total.masked_fill(total == 0, 1)


def num_bits(n: int) -> int:
    """Return the number of bits of a key out of n: ceil(log2 n), and 1 if n is 1.

    Examples
    --------
    >>> [num_bits(n) for n in (1, 2, 3, 64, 65)]
    [1, 1, 2, 6, 7]
    """
    return max(1, (n - 1).bit_length())


def node_angles(p: Tensor) -> Tensor:
    """Compute the rotation angle of every node of the rows' binary trees.

    A node stands for the keys whose highest l bits are x. Its angle is 2 atan2(sqrt(right), sqrt(left)),
    where left and right are the probabilities of those of its keys whose next bit is 0 and 1. So cos² and
    sin² of half the angle are the probabilities of the next bit. A node without probability has the angle 0,
    and its next bit is 0.

    Parameters
    ----------
    p : Tensor, float64, (R, n)

    Returns
    -------
    Tensor, float64, (R, 2^m - 1)
        Angles in radians, with m = `num_bits(n)`. Column 2^l - 1 + x is the node of the highest l bits x.

    Examples
    --------
    >>> node_angles(torch.tensor([[0.25, 0.75, 0.0, 0.0]]))
    tensor([[0.0000, 2.0944, 0.0000]])
    """
    mass = F.pad(p, (0, (1 << num_bits(p.shape[-1])) - p.shape[-1]))
    levels = []
    while mass.shape[-1] > 1:
        left, right = mass[..., 0::2], mass[..., 1::2]
        levels.append(2 * torch.atan2(right.sqrt(), left.sqrt()))
        mass = left + right
    return torch.cat(levels[::-1], -1)


def walsh_hadamard(x: Tensor) -> Tensor:
    """Compute sum_v (-1)^|v & s| x_v for every s, with |v & s| the number of ones that v and s share.

    Parameters
    ----------
    x : Tensor, (..., 2^m)

    Returns
    -------
    Tensor, (..., 2^m)
        The same transform of the result is 2^m x.

    Examples
    --------
    >>> walsh_hadamard(torch.tensor([0.75, 0.25]))
    tensor([1.0000, 0.5000])
    """
    shape, half = x.shape, 1
    while half < shape[-1]:
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * half), 2, half)
        low, high = pairs.unbind(-2)
        x = torch.stack((low + high, low - high), -2)
        half *= 2
    return x.reshape(shape)


def unpack_values(outcomes: np.ndarray) -> np.ndarray:
    """Turn packed bits, uint8 (..., B) with B <= 8, big-endian, into whole numbers, int64 (...)."""
    value = np.zeros(outcomes.shape[:-1], dtype=np.int64)
    for byte in range(outcomes.shape[-1]):
        value = (value << 8) | outcomes[..., byte]
    return value


def pack_values(values: np.ndarray, bits: int) -> np.ndarray:
    """Turn whole numbers (...) into packed bits, uint8 (..., ceil(bits / 8)): the inverse of `unpack_values`.

    Examples
    --------
    >>> pack_values(np.array([1, 300]), bits=9)
    array([[ 0,  1],
           [ 1, 44]], dtype=uint8)
    """
    shifts = 8 * np.arange(-(-bits // 8))[::-1]
    return (values[..., None] >> shifts).astype(np.uint8)
