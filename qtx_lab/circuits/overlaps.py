"""Other ways in which circuits compute attention: overlaps of queries and keys, measured, as logits.

A vector x is loaded as the amplitudes x_i / |x|. The Hadamard test gives <q|k> with its sign, the swap test its square;
both need a controlled loading or a second copy, and their error falls only with the square root of the shots. The norms
|q| and |k| are known classically and multiplied back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister
from qiskit.circuit.library import StatePreparation
from torch import Tensor

from ..checks import check_count
from ..errors import ArgumentError, DtypeError, ShapeError
from .base import num_bits


@dataclass(frozen=True)
class Overlaps:
    """Estimated overlaps of normalised queries and keys.

    Parameters
    ----------
    value : Tensor, float64, (..., L, n)
        Of <q|k> (Hadamard test) or |<q|k>|^2 (swap test; may come out slightly negative).
    std_error : Tensor, float64, (..., L, n)
        Expected, for the true overlaps: sqrt((1 - z^2) / shots), z being what is estimated.
    logits : Tensor, float64, (..., L, n)
        `value` times |q| |k| scale (Hadamard test) or |q|^2 |k|^2 scale (swap test).
    """

    value: Tensor
    std_error: Tensor
    logits: Tensor


def hadamard_test(
    q: Tensor,
    k: Tensor,
    shots: int,
    *,
    scale: float | None = None,
    generator: torch.Generator | None = None,
) -> Overlaps:
    """Logits q k^T scale from <q|k>: the ancilla of each pair reads 0 with probability (1 + <q|k>) / 2.

    The outcomes of the ideal circuit (`hadamard_test_circuit`) are drawn from this probability.

    Parameters
    ----------
    q : Tensor, (..., L, E)
    k : Tensor, (..., n, E)
        Leading dimensions equal to q's. A vector of zeros has overlap 0.
    shots : int
        Of each pair: L n shots for a head in all.
    scale : float, optional
        1 / sqrt(E) where None.
    generator : torch.Generator, optional
        The only source of randomness.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError
        If the shapes do not fit, the tensors are not floating-point or not finite; if shots is below 1.

    Source: Cleve, Ekert, Macchiavello and Mosca, Quantum algorithms revisited (1998).

    >>> q, k = torch.eye(2)[None], torch.eye(2)[None]
    >>> hadamard_test(q, k, 100).value.diagonal(dim1=-2, dim2=-1)
    tensor([[1., 1.]], dtype=torch.float64)
    """
    overlap, norms = _overlaps(q, k, shots)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    value = _ancilla(overlap, shots, generator)
    return Overlaps(value, _error(overlap, shots), value * norms * scale)


def swap_test(
    q: Tensor,
    k: Tensor,
    shots: int,
    *,
    scale: float | None = None,
    generator: torch.Generator | None = None,
) -> Overlaps:
    """Logits (q k^T)^2 scale from |<q|k>|^2: the ancilla reads 0 with probability (1 + |<q|k>|^2) / 2.

    Signs are lost: this is attention with squared overlaps, another model than softmax of dot products. Arguments and
    errors as for `hadamard_test`, the circuit is `swap_test_circuit`.

    Source: Buhrman, Cleve, Watrous and de Wolf, Quantum fingerprinting (2001).
    """
    overlap, norms = _overlaps(q, k, shots)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    square = overlap.square()
    value = _ancilla(square, shots, generator)
    return Overlaps(value, _error(square, shots), value * norms.square() * scale)


def hadamard_test_circuit(q: Tensor, k: Tensor) -> QuantumCircuit:
    """The Hadamard test of one pair of vectors (E,): log2 E + 1 qubits, both loadings controlled by the ancilla."""
    a, b = (_amplitudes(x) for x in (q, k))
    m = num_bits(len(a))
    circuit = QuantumCircuit(
        QuantumRegister(m, "q"), QuantumRegister(1, "ancilla"), ClassicalRegister(1, "c")
    )
    circuit.h(m)
    circuit.append(StatePreparation(a).control(1, ctrl_state=0), [m, *range(m)])
    circuit.append(StatePreparation(b).control(1), [m, *range(m)])
    circuit.h(m)
    circuit.measure(m, 0)
    return circuit


def swap_test_circuit(q: Tensor, k: Tensor) -> QuantumCircuit:
    """The swap test of one pair of vectors (E,): 2 log2 E + 1 qubits, log2 E controlled swaps."""
    a, b = (_amplitudes(x) for x in (q, k))
    m = num_bits(len(a))
    circuit = QuantumCircuit(
        QuantumRegister(m, "q"),
        QuantumRegister(m, "k"),
        QuantumRegister(1, "ancilla"),
        ClassicalRegister(1, "c"),
    )
    circuit.append(StatePreparation(a), range(m))
    circuit.append(StatePreparation(b), range(m, 2 * m))
    circuit.h(2 * m)
    for i in range(m):
        circuit.cswap(2 * m, i, m + i)
    circuit.h(2 * m)
    circuit.measure(2 * m, 0)
    return circuit


def _amplitudes(x: Tensor) -> np.ndarray:
    """x / |x|, padded to a power of two of at least 2."""
    if x.ndim != 1 or not bool(x.norm() > 0):
        raise ArgumentError("A circuit needs one vector (E,) that is not zero.")
    padded = np.zeros(1 << num_bits(len(x)))
    padded[: len(x)] = x.double().numpy()
    return padded / np.linalg.norm(padded)


def _overlaps(q: Tensor, k: Tensor, shots: int) -> tuple[Tensor, Tensor]:
    """<q|k> of the normalised vectors and |q| |k|, float64 (..., L, n)."""
    check_count("shots", shots)
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise DtypeError(f"{name} must be a floating-point tensor.")
        if not bool(x.isfinite().all()):
            raise ArgumentError(f"{name} holds NaN or infinity.")
    if q.ndim < 2 or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ShapeError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must be (..., L, E) and (..., n, E).")
    q, k = q.double(), k.double()
    norms = q.norm(dim=-1)[..., :, None] * k.norm(dim=-1)[..., None, :]
    overlap = (q @ k.mT) / norms.masked_fill(norms == 0, 1)
    return overlap.clamp(-1, 1), norms


def _ancilla(z: Tensor, shots: int, generator: torch.Generator | None) -> Tensor:
    """2 (share of zeros) - 1 of an ancilla that reads 0 with probability (1 + z) / 2."""
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
    zeros = np.random.default_rng(seed).binomial(shots, ((1 + z) / 2).cpu().numpy())
    return torch.as_tensor(2 * zeros / shots - 1, dtype=torch.float64).to(z.device)


def _error(z: Tensor, shots: int) -> Tensor:
    return ((1 - z.square()) / shots).sqrt()
