"""Attention logits from circuits: the overlaps of queries and keys, measured by Hadamard and swap tests.

A vector x is loaded as the amplitudes x_i / |x|. The Hadamard test measures <q|k> with its sign, the swap
test its square. The first needs loadings that an ancilla controls, the second a second copy, and the error of
both falls only with the square root of the number of shots. The norms |q| and |k| are known classically and
are multiplied back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister
from qiskit.circuit.library import StatePreparation
from torch import Tensor

from ..checks import check_count, check_scale
from ..errors import ArgumentError, DtypeError, ShapeError
from .base import num_bits


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Estimated overlaps of normalised queries and keys.

    Parameters
    ----------
    value : Tensor, float64, (..., L, n)
        Estimates z of <q|k> by the Hadamard test, or of |<q|k>|² by the swap test; these may be slightly
        negative.
    std_error : Tensor, float64, (..., L, n)
        Standard error sqrt((1 - z²) / shots) of `value`, computed from the true z.
    logits : Tensor, float64, (..., L, n)
        `value` times |q| |k| scale for the Hadamard test, or times |q|² |k|² scale for the swap test.
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
    """Estimate the logits q k^T scale from measured overlaps <q|k>.

    The ancilla of each pair of vectors reads 0 with probability (1 + <q|k>) / 2. Outcomes of the ideal
    circuit, `hadamard_test_circuit`, are drawn from this probability. The result has no gradients.

    Parameters
    ----------
    q : Tensor, (..., L, E)
    k : Tensor, (..., n, E)
        The leading dimensions are those of q. A vector of zeros has overlap 0 with every other.
    shots : int
        Shots of each pair, so L n shots for a head.
    scale : float, optional
        1 / sqrt(E) if None.
    generator : torch.Generator, optional
        The only source of randomness.

    Returns
    -------
    Overlaps

    Raises
    ------
    ShapeError, DtypeError, ArgumentError
        If the shapes do not fit, if the tensors are not floating-point, if they or the logits are not
        finite, or if shots is below 1.

    Source: Cleve, Ekert, Macchiavello and Mosca, Quantum algorithms revisited (1998).

    Examples
    --------
    >>> q, k = torch.eye(2)[None], torch.eye(2)[None]
    >>> hadamard_test(q, k, 100).value.diagonal(dim1=-2, dim2=-1)
    tensor([[1., 1.]], dtype=torch.float64)
    """
    return _estimate(q, k, shots, scale, 1, generator)


def swap_test(
    q: Tensor,
    k: Tensor,
    shots: int,
    *,
    scale: float | None = None,
    generator: torch.Generator | None = None,
) -> Overlaps:
    """Estimate the logits (q k^T)² scale from measured squares |<q|k>|².

    The ancilla reads 0 with probability (1 + |<q|k>|²) / 2. The signs of the overlaps are lost, so this is
    attention with squared overlaps, another model than the softmax of dot products. The circuit is
    `swap_test_circuit`. Arguments, result and errors are those of `hadamard_test`.

    Source: Buhrman, Cleve, Watrous and de Wolf, Quantum fingerprinting (2001).

    Examples
    --------
    >>> swap_test(torch.eye(2), -torch.eye(2), 100).value.diagonal()
    tensor([1., 1.], dtype=torch.float64)
    """
    return _estimate(q, k, shots, scale, 2, generator)


def hadamard_test_circuit(q: Tensor, k: Tensor) -> QuantumCircuit:
    """Build the Hadamard test of two vectors (E,): the ancilla controls both loadings of ceil(log2 E) qubits.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError
        If q and k are not two floating-point vectors of the same length, or if one is zero or not finite.

    Examples
    --------
    >>> hadamard_test_circuit(torch.ones(4), torch.ones(4)).num_qubits
    3
    """
    a, b = _amplitudes(q, k)
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
    """Build the swap test of two vectors (E,), on 2 m + 1 qubits with m controlled swaps, m = ceil(log2 E).

    Raises
    ------
    ShapeError, DtypeError, ArgumentError
        If q and k are not two floating-point vectors of the same length, or if one is zero or not finite.

    Examples
    --------
    >>> swap_test_circuit(torch.ones(4), torch.ones(4)).num_qubits
    5
    """
    a, b = _amplitudes(q, k)
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


def _amplitudes(*vectors: Tensor) -> list[np.ndarray]:
    """Return each vector divided by its norm, padded with zeros to a power of two of at least 2."""
    for name, x in zip("qk", vectors, strict=True):
        _check_vectors(name, x)
    if any(x.ndim != 1 for x in vectors) or len({len(x) for x in vectors}) > 1 or not len(vectors[0]):
        shapes = " and ".join(str(tuple(x.shape)) for x in vectors)
        raise ShapeError(f"q and k have the shapes {shapes}; a circuit needs two vectors of the same length.")
    amplitudes = []
    for x in vectors:
        vector = _normalise(x.cpu())
        if not bool(vector.norm > 0):
            raise ArgumentError("q or k is a vector of zeros; a circuit needs two vectors that are not zero.")
        padded = np.zeros(1 << num_bits(len(x)))
        padded[: len(x)] = vector.unit.numpy()
        amplitudes.append(padded / np.linalg.norm(padded))
    return amplitudes


def _check_vectors(name: str, x: Tensor) -> None:
    """Refuse what is no tensor of finite floating-point numbers."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise DtypeError(f"{name} is {given}; it must be a floating-point tensor.")
    if not bool(x.isfinite().all()):
        raise ArgumentError(f"{name} holds NaN or infinity; it must be finite.")


def _check_pairs(q: Tensor, k: Tensor) -> None:
    """Refuse what are no queries (..., L, E) and keys (..., n, E)."""
    _check_vectors("q", q)
    _check_vectors("k", k)
    if q.device != k.device:
        raise DtypeError(f"q is on {q.device}, k on {k.device}; they must agree.")
    if q.ndim < 2 or q.shape[:-2] != k.shape[:-2] or not 0 < q.shape[-1] == k.shape[-1]:
        raise ShapeError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; they must be (..., L, E) and (..., n, E) "
            "with E >= 1."
        )


@dataclass(frozen=True, eq=False)
class _Normalised:
    """Vectors of norm 1, (..., E), or zeros where a vector is zero, and what their norms were.

    A norm was `norm` times 2^`exponent`, (..., 1), with `norm` from 0.5 to sqrt(E), or 0: so products of
    norms neither overflow nor underflow.
    """

    unit: Tensor
    norm: Tensor
    exponent: Tensor


def _normalise(x: Tensor) -> _Normalised:
    """Divide vectors (..., E) by their norms."""
    x = x.detach().double()
    # Divided by a power of two that is near the largest number first, so that no square overflows.
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True)).exponent
    scaled = _times_power_of_two(x, -exponent)
    norm = scaled.norm(dim=-1, keepdim=True)
    return _Normalised(scaled / norm.masked_fill(norm == 0, 1), norm, exponent)


def _times_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """x 2^exponent, in two steps: a power of two alone may be too large for float64, or too small."""
    half = exponent.div(2, rounding_mode="floor")
    return torch.ldexp(torch.ldexp(x, half), exponent - half)


def _estimate(
    q: Tensor, k: Tensor, shots: int, scale: float | None, power: int, generator: torch.Generator | None
) -> Overlaps:
    """Draw outcomes of ancillas that read 0 with probability (1 + z) / 2 for the overlap z to a power.

    Logits are the estimated z times (|q| |k|)^power scale.
    """
    shots, scale = check_count("shots", shots), check_scale(scale)
    _check_pairs(q, k)
    queries, keys = _normalise(q), _normalise(k)
    z = (queries.unit @ keys.unit.mT).clamp(-1, 1) ** power
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
    zeros = np.random.default_rng(seed).binomial(shots, ((1 + z) / 2).cpu().numpy())
    value = torch.as_tensor(2 * zeros / shots - 1, dtype=torch.float64).to(z.device)
    mantissa, exponent = math.frexp(q.shape[-1] ** -0.5 if scale is None else scale)
    norms = (queries.norm * keys.norm.mT) ** power * mantissa
    factor = _times_power_of_two(norms, power * (queries.exponent + keys.exponent.mT) + exponent)
    if not bool(factor.isfinite().all()):
        raise ArgumentError(
            "q, k and scale are too large: the logits are beyond what float64 holds. Divide q or k."
        )
    return Overlaps(value, ((1 - z.square()) / shots).sqrt(), value * factor)
