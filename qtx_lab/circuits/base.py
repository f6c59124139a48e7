"""What a loader is, and what the loaders share: the angles of a row's binary tree, measured bits as keys."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from qiskit import QuantumCircuit
from torch import Tensor

from ..errors import ArgumentError, DtypeError, ShapeError

MOST_QUBITS = 16
"""Most qubits of a loader whose number of angles doubles with each: 65,535 angles."""


class Loader(Protocol):
    """Makes one circuit for all rows of a size, and the angles that make it draw keys of each row.

    Measuring a key j of n >= 1 is what a shot of the circuit does. Rows are padded with keys of probability 0.
    """

    name: str
    exact: bool
    """Whether the ideal circuit draws from the row itself; otherwise from an approximation."""

    def size(self, n: int) -> int:
        """What a circuit is built for: rows of n keys with the same size share their circuit."""
        ...

    def circuit(self, size: int) -> QuantumCircuit:
        """The circuit, measured into one register `c`, its `parameters` the angles.

        Raises
        ------
        ArgumentError
            If the circuit would be larger than anything could run.
        """
        ...

    def angles(self, p: Tensor) -> np.ndarray:
        """The angles of all rows at once, in the order of `circuit(size(n)).parameters`.

        Parameters
        ----------
        p : Tensor, (R, n)
            Probabilities; see `check_rows`.

        Returns
        -------
        ndarray, (R, P), float64, radians
        """
        ...

    def keys(self, outcomes: np.ndarray, n: int) -> np.ndarray:
        """The key of each measured bit pattern.

        Parameters
        ----------
        outcomes : ndarray, uint8, (..., B)
            Bits of register `c`, packed as in `qiskit.primitives.BitArray`: big-endian, padded on the left.
        n : int

        Returns
        -------
        ndarray, int64, (...)
            -1 where the pattern is no key of 0..n-1: padding, a wrong Hamming weight.
        """
        ...


def check_rows(p: Tensor, argument: str = "p") -> Tensor:
    """Rows of probabilities (R, n) in float64, each summing to exactly one but for rounding, or all zero.

    Raises
    ------
    DtypeError, ShapeError, ArgumentError
        If p is no real floating-point tensor; if it is not (R, n) with n >= 1; if a probability is NaN, infinite or
        negative; if a row sums neither to one within 1e-3, or what its dtype rounds by if that is more, nor to zero.
    """
    if not isinstance(p, Tensor) or not p.is_floating_point():
        given = p.dtype if isinstance(p, Tensor) else type(p).__name__
        raise DtypeError(f"{argument} is {given}; it must be a floating-point tensor.")
    if p.ndim != 2 or p.shape[-1] == 0:
        raise ShapeError(f"{argument} has shape {tuple(p.shape)}; it must be (R, n) with n >= 1 keys.")
    tolerance = max(1e-3, torch.finfo(p.dtype).eps)  # bfloat16: 2^-7
    p = p.detach().to("cpu", torch.float64)
    if not bool((p >= 0).all()) or not bool(p.isfinite().all()):  # also False for NaN
        raise ArgumentError(f"{argument} holds a negative number, NaN or infinity; probabilities are >= 0.")
    total = p.sum(-1, keepdim=True)
    wrong = ((total - 1).abs() > tolerance) & (total != 0)
    if bool(wrong.any()):
        row = int(wrong.squeeze(-1).nonzero()[0])
        raise ArgumentError(
            f"{argument}[{row}] sums to {float(total[row]):.6g}; a row must sum to 1, or be all zero where all is masked."
        )
    return p / total.masked_fill(total == 0, 1)


def num_bits(n: int) -> int:
    """Qubits of a binary loader for n keys: ceil(log2 n), and 1 where n is 1.

    >>> [num_bits(n) for n in (1, 2, 3, 64, 65)]
    [1, 1, 2, 6, 7]
    """
    return max(1, (n - 1).bit_length())


def check_size(size: int, most: int) -> None:
    """Refuse a circuit of more qubits than `most`."""
    if not 1 <= size <= most:
        raise ArgumentError(f"size={size} is not allowed: this loader takes 1 to {most} qubits.")


def node_angles(p: Tensor) -> Tensor:
    """Angles of the binary tree of rows: 2 atan2(sqrt(right), sqrt(left)) of each node's two halves.

    Parameters
    ----------
    p : Tensor, (R, n), float64

    Returns
    -------
    Tensor, (R, 2^m - 1), float64, radians
        m = num_bits(n); node 2^l - 1 + x is that of the keys whose highest l bits are x. cos^2 and sin^2 of half an
        angle are the probabilities of the next bit; 0, so the bit 0, in a node without mass.
    """
    mass = F.pad(p, (0, (1 << num_bits(p.shape[-1])) - p.shape[-1]))
    levels = []
    while mass.shape[-1] > 1:
        left, right = mass[..., 0::2], mass[..., 1::2]
        levels.append(2 * torch.atan2(right.sqrt(), left.sqrt()))
        mass = left + right
    return torch.cat(levels[::-1], -1)


def integers(outcomes: np.ndarray) -> np.ndarray:
    """Packed bits (..., B <= 8), big-endian, as int64 (...)."""
    value = np.zeros(outcomes.shape[:-1], dtype=np.int64)
    for byte in range(outcomes.shape[-1]):
        value = (value << 8) | outcomes[..., byte]
    return value


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers (...) as packed bits, uint8 (..., ceil(bits / 8)), the inverse of `integers`."""
    shifts = 8 * np.arange(-(-bits // 8))[::-1]
    return (values[..., None] >> shifts).astype(np.uint8)


def binary_keys(outcomes: np.ndarray, n: int) -> np.ndarray:
    """`Loader.keys` where the register holds the key as a binary number."""
    value = integers(outcomes)
    return np.where(value < n, value, -1)
