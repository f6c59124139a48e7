"""Orthogonal layers on unary states, the features of a quantum kernel, and their gradients by shifts.

A reconfigurable beam splitter, RBS, rotates the two states of a pair of qubits that have one 1 between them.
On the n unary states of n qubits, which hold a vector of n numbers as amplitudes, it is a rotation of two
components, and a network of such gates is an orthogonal matrix. Simulating it takes a classical computer four
multiplications a gate and vector, fewer than a device needs operations: there is no advantage in it at any
size. What is of interest is whether layers of this shape learn better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector
from torch import Tensor

from ..checks import check_count
from ..errors import ArgumentError, ShapeError, unknown_name
from .base import blank_circuit

Pairs = tuple[tuple[int, int], ...]

MAX_COMPONENTS = 1024
"""Most components of a vector that an orthogonal layer rotates."""

MAX_KERNEL_QUBITS = 6
"""Most qubits of a kernel, whose features grow as 4^qubits."""


def _pyramid(n: int) -> tuple[Pairs, ...]:
    """Neighbours (i, i + 1) in 2 n - 3 layers, n (n - 1) / 2 gates: every rotation matrix can be made."""
    layers = []
    for step in range(2 * n - 3):
        top = min(step, 2 * n - 4 - step)
        layers.append(tuple((i, i + 1) for i in range(top % 2, top + 1, 2)))
    return tuple(layers)


def _butterfly(n: int) -> tuple[Pairs, ...]:
    """Pairs at the distances n / 2, n / 4, ..., 1, as in a fast Fourier transform: n / 2 log2 n gates."""
    if n & (n - 1):
        raise ArgumentError(f"n={n} is not allowed with layout='butterfly', which needs a power of two.")
    layers, distance = [], n // 2
    while distance:
        layers.append(tuple((i, i + distance) for i in range(n) if not i & distance))
        distance //= 2
    return tuple(layers)


LAYOUTS: dict[str, Callable[[int], tuple[Pairs, ...]]] = {"pyramid": _pyramid, "butterfly": _butterfly}
"""The networks of gates of an orthogonal layer, by name."""


@cache
def rbs_layers(n: int, layout: str = "pyramid") -> tuple[Pairs, ...]:
    """The pairs of components that the gates of a network rotate, in layers that act at the same time.

    Parameters
    ----------
    n : int
        Components of the vector, from 2 to `MAX_COMPONENTS`.
    layout : {"pyramid", "butterfly"}
        n (n - 1) / 2 gates between neighbours in depth 2 n - 3, or n / 2 log2 n gates in depth log2 n.

    Raises
    ------
    ArgumentError
        If n is out of its bounds, or no power of two for a butterfly; if there is no such layout.

    Source: Landman et al., Quantum methods for neural networks and application to medical image
    classification (2022, arXiv 2212.07389), for the pyramid; Cherrat et al., Quantum vision transformers
    (2022, arXiv 2209.08167), for the butterfly.

    Examples
    --------
    >>> rbs_layers(4, "butterfly")
    (((0, 2), (1, 3)), ((0, 1), (2, 3)))
    """
    n = check_count("n", n, 2, MAX_COMPONENTS)
    if layout not in LAYOUTS:
        raise unknown_name("layout", layout, LAYOUTS)
    return LAYOUTS[layout](n)


def num_rotations(n: int, layout: str = "pyramid") -> int:
    """Number of gates, and so of angles, of a network; arguments and errors as for `rbs_layers`."""
    return sum(len(layer) for layer in rbs_layers(n, layout))


def rotate(x: Tensor, angles: Tensor, layout: str = "pyramid") -> Tensor:
    """Apply an orthogonal layer to vectors, exactly, with gradients.

    The gate of the pair (i, j) and the angle a maps (x_i, x_j) to (x_i cos a + x_j sin a,
    x_j cos a - x_i sin a).

    Parameters
    ----------
    x : Tensor, (..., n)
        Amplitudes of unary states; they need not be normalised.
    angles : Tensor, (P,)
        Radians, in the order of `rbs_layers`.
    layout : str
        As for `rbs_layers`.

    Returns
    -------
    Tensor, (..., n)

    Raises
    ------
    ShapeError, ArgumentError
        If the number of angles does not fit, and as for `rbs_layers`.

    Examples
    --------
    >>> y = rotate(torch.tensor([3.0, 0.0, 4.0]), torch.rand(3))
    >>> bool((y.norm() - 5).abs() < 1e-5)
    True
    """
    layers = rbs_layers(x.shape[-1], layout)
    count = num_rotations(x.shape[-1], layout)
    if angles.shape != (count,):
        raise ShapeError(
            f"angles has shape {tuple(angles.shape)}; a {layout} of {x.shape[-1]} components has ({count},)."
        )
    first = 0
    for layer in layers:
        a = angles[first : first + len(layer)]
        first += len(layer)
        i, j = (torch.tensor(side, device=x.device) for side in zip(*layer, strict=True))
        left, right, c, s = x[..., i], x[..., j], a.cos(), a.sin()
        turned = torch.cat((left * c + right * s, right * c - left * s), -1)
        x = x.index_copy(-1, torch.cat((i, j)), turned)
    return x


def orthogonal_circuit(n: int, layout: str = "pyramid") -> QuantumCircuit:
    """Build the circuit that loads a vector as a unary state, rotates it, and measures all n qubits.

    Its parameters are x_0 to x_(n-2), by which `unary_angles` loads a vector, and y_0, ..., the angles of
    the layer. A shot with exactly one 1, on qubit i, has the probability y_i² of the rotated unit vector y;
    other shots are known to be wrong.

    Raises
    ------
    ArgumentError
        As for `rbs_layers`.

    Examples
    --------
    >>> orthogonal_circuit(4).num_nonlocal_gates()
    18
    """
    layers = rbs_layers(n, layout)
    load, angle = ParameterVector("x", n - 1), ParameterVector("y", num_rotations(n, layout))
    circuit = blank_circuit(n, f"orthogonal {layout}")
    circuit.x(0)
    for i in range(n - 1):
        _rbs(circuit, -load[i], i, i + 1)
    gates = iter(angle)
    for layer in layers:
        for i, j in layer:
            _rbs(circuit, next(gates), i, j)
    circuit.measure(range(n), range(n))
    return circuit


def unary_angles(x: Tensor) -> Tensor:
    """Angles (..., n - 1) by which a chain of gates loads the unit vectors x / |x|, with their signs.

    Parameters
    ----------
    x : Tensor, (..., n)
        Not zero.

    Examples
    --------
    >>> unary_angles(torch.tensor([0.0, -1.0]))
    tensor([-1.5708])
    """
    rest = x.square().flip(-1).cumsum(-1).flip(-1).sqrt()  # |(x_i, ..., x_n-1)|
    rest = torch.cat((rest[..., 1:-1], x[..., -1:]), -1)  # the last one has the sign
    return torch.atan2(rest, x[..., :-1])


def _rbs(circuit: QuantumCircuit, angle: Any, i: int, j: int) -> None:
    """Append a beam splitter: |10> to cos |10> - sin |01>, and |01> to cos |01> + sin |10>, with two CZ."""
    circuit.h([i, j])
    circuit.cz(i, j)
    circuit.ry(-angle, i)
    circuit.ry(angle, j)
    circuit.cz(i, j)
    circuit.h([i, j])


def kernel_features(angles: Tensor) -> Tensor:
    """Features of data that a circuit encodes in its angles: all numbers of its density matrix.

    Each layer rotates every qubit about Y by its angle, and then applies CZ between neighbours in a ring.
    The product of the features of two inputs is the fidelity |<phi(a)|phi(b)>|² of their states, a kernel.

    Parameters
    ----------
    angles : Tensor, (..., layers, m)
        Radians, for m qubits.

    Returns
    -------
    Tensor, (..., 4^m)

    Raises
    ------
    ShapeError, ArgumentError
        If there are no layers, or m is not from 1 to `MAX_KERNEL_QUBITS`.

    Source: Havlíček et al., Supervised learning with quantum-enhanced feature spaces (2019), for the kernel;
    the encoding is repeated as by Pérez-Salinas et al., Data re-uploading for a universal quantum classifier
    (2020).

    Examples
    --------
    >>> a, b = kernel_features(torch.tensor([[[0.0, 0.0]], [[0.0, torch.pi]]]))
    >>> (a @ a).round(decimals=4), (a @ b).abs().round(decimals=4)
    (tensor(1.), tensor(0.))
    """
    if angles.ndim < 2 or angles.shape[-2] < 1:
        raise ShapeError(f"angles has shape {tuple(angles.shape)}; it must be (..., layers, qubits).")
    *rows, layers, m = angles.shape
    check_count("qubits", m, 1, MAX_KERNEL_QUBITS)
    signs = angles.new_tensor(_ring_signs(m))
    state = torch.zeros(*rows, 1 << m, dtype=angles.dtype, device=angles.device)
    state[..., 0] = 1
    for layer in range(layers):
        for qubit in range(m):
            half = angles[..., layer, qubit, None, None] / 2
            low, high = state.unflatten(-1, (-1, 2, 1 << qubit)).unbind(-2)
            turned = (low * half.cos() - high * half.sin(), low * half.sin() + high * half.cos())
            state = torch.stack(turned, -2).flatten(-3)
        state = state * signs
    return (state[..., :, None] * state[..., None, :]).flatten(-2)


@cache
def _ring_signs(m: int) -> tuple[int, ...]:
    """The diagonal of CZ between all neighbours in a ring of m qubits, 2^m numbers.

    They are no tensor, because one that is first made in inference mode could not be trained with later.
    """
    neighbours = [(i, (i + 1) % m) for i in range(m if m > 2 else m - 1)]
    return tuple((-1) ** sum(key >> i & key >> j & 1 for i, j in neighbours) for key in range(1 << m))


@dataclass(frozen=True)
class ShiftRule:
    """A derivative from values at shifted angles: f'(a) = sum_i weights_i f(a + shifts_i).

    Parameters
    ----------
    shifts, weights : tuple of float
        Radians, and 1 / radians.
    """

    shifts: tuple[float, ...]
    weights: tuple[float, ...]

    @classmethod
    def of_frequencies(cls, highest: int) -> ShiftRule:
        """The rule of functions with the frequencies 0, 1, ..., `highest` = R, with 2 R shifts.

        Source: Wierichs, Izaac, Wang and Lin, General parameter-shift rules for quantum gradients (2022),
        equation 28.

        Examples
        --------
        >>> ShiftRule.of_frequencies(1).weights
        (0.5, -0.5)
        """
        shifts = [(2 * i + 1) * math.pi / (2 * highest) for i in range(2 * highest)]
        weights = [(-1) ** i / (4 * highest * math.sin(x / 2) ** 2) for i, x in enumerate(shifts)]
        return cls(tuple(shifts), tuple(round(w, 15) for w in weights))


TWO_TERMS = ShiftRule.of_frequencies(1)
"""The rule of a rotation of one qubit: its generator has two eigenvalues, and an expectation value frequency
1. It also holds for amplitudes of a beam splitter, measured against a reference."""

FOUR_TERMS = ShiftRule.of_frequencies(2)
"""The rule of a beam splitter: its generator has the eigenvalues -1, 0 and 1, and the expectation value of
an observable, as the square of an amplitude, the frequencies 1 and 2."""


def shifted_gradient(
    function: Callable[[Tensor], Tensor], angles: Tensor, weights: Tensor, rule: ShiftRule, shared: bool
) -> Tensor:
    """The gradient of sum(weights * function(angles)) by shifts of one angle after the other.

    Parameters
    ----------
    function : callable
        Values of circuits, of the shape of `weights`, from angles.
    angles : Tensor, (..., P)
    weights : Tensor, (..., F)
        Its leading dimensions are those of the angles, if each row has angles of its own.
    rule : ShiftRule
    shared : bool
        Whether all values come from the same angles (P,).
    """
    gradient = torch.zeros_like(angles)
    for p in range(angles.shape[-1]):
        for shift, weight in zip(rule.shifts, rule.weights, strict=True):
            moved = angles.clone()
            moved[..., p] += shift
            change = weight * weights * function(moved)
            gradient[..., p] += change.sum() if shared else change.sum(-1)
    return gradient


class _ByShifts(torch.autograd.Function):
    """A function of angles whose gradient is taken as a device would: from its own values at other angles."""

    @staticmethod
    def forward(
        ctx: Any, angles: Tensor, function: Callable[[Tensor], Tensor], rule: ShiftRule, shared: bool
    ) -> Tensor:
        ctx.save_for_backward(angles)
        ctx.function, ctx.rule, ctx.shared = function, rule, shared
        return function(angles)

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor, None, None, None]:
        (angles,) = ctx.saved_tensors
        return shifted_gradient(ctx.function, angles, weights[0], ctx.rule, ctx.shared), None, None, None


def by_shifts(
    function: Callable[[Tensor], Tensor], angles: Tensor, rule: ShiftRule, *, shared: bool = True
) -> Tensor:
    """`function(angles)`, whose gradient for the angles is taken by a shift rule; see `shifted_gradient`.

    Examples
    --------
    >>> angles = torch.tensor([0.3, 0.1, 0.2], requires_grad=True)
    >>> x = torch.tensor([1.0, 0.0, 0.0])
    >>> by_shifts(lambda a: rotate(x, a).square(), angles, FOUR_TERMS)[0].backward()
    >>> angles.grad.shape
    torch.Size([3])
    """
    result: Tensor = _ByShifts.apply(angles, function, rule, shared)
    return result
