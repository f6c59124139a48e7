"""The trainable quantum layers of `QuantumMultiheadAttention(kind=...)`, and their classical controls."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_count
from ..circuits.orthogonal import (
    LAYOUTS,
    MAX_KERNEL_QUBITS,
    TWO_TERMS,
    by_shifts,
    kernel_features,
    num_rotations,
    rotate,
)
from ..errors import ArgumentError, DtypeError, quoted, unknown_name

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of all heads, (N, heads, length, features); logits are q·k / sqrt(features)."""


class AttentionKind(ABC):
    """What makes queries, keys and values of heads from the inputs of an attention module.

    To add a kind, write a frozen dataclass that derives from this one, and give it a name in `KINDS`.
    """

    name: ClassVar[str]

    @abstractmethod
    def build(self, embed_dim: int, num_heads: int) -> nn.Module:
        """Make the layer, which maps (query, key, value), each (N, length, embed_dim), to `Heads`."""

    @property
    @abstractmethod
    def classical(self) -> AttentionKind:
        """The classical control: as many parameters in the same place, without a circuit."""


@dataclass(frozen=True)
class OrthogonalKind(AttentionKind):
    """Projects queries, keys and values by orthogonal layers on unary states, without biases.

    A circuit of embed_dim qubits loads a vector, and a network of beam splitters rotates it. The rotated
    amplitudes with their signs are expectation values: half of the circuit's state is kept on one more qubit
    as a reference. Here they are computed exactly, as by infinitely many shots; the simulation takes four
    multiplications a gate, so that a device cannot be faster. The norm of the vector is multiplied back.

    Parameters
    ----------
    layout : {"pyramid", "butterfly"}
        See `qtx_lab.circuits.orthogonal.rbs_layers`.
    shifts : bool
        Whether gradients of the angles are taken by the parameter-shift rule, from two more evaluations an
        angle, as on a device. They are those of backpropagation, but for rounding, and take longer.
    control : bool
        Whether this is the classical control: matrices with as many free numbers, which stand on cyclic
        diagonals, the others being 0.

    Source: Landman et al. (2022, arXiv 2212.07389); Cherrat et al., Quantum vision transformers (2022, arXiv
    2209.08167).
    """

    layout: str = "pyramid"
    shifts: bool = False
    control: bool = False
    name: ClassVar[str] = "orthogonal"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise unknown_name("layout", self.layout, LAYOUTS)

    def build(self, embed_dim: int, num_heads: int) -> nn.Module:
        """Make the layer; ArgumentError if the layout does not allow embed_dim."""
        try:
            return OrthogonalHeads(self, embed_dim, num_heads)
        except ArgumentError as error:
            raise ArgumentError(
                f"embed_dim={embed_dim} is not allowed with kind={self.name!r}: {error}"
            ) from None

    @property
    def classical(self) -> OrthogonalKind:
        return replace(self, control=True, shifts=False)


@dataclass(frozen=True)
class QuantumKernelKind(AttentionKind):
    """Attends by the fidelity of states that encode queries and keys: a quantum kernel.

    Each head encodes its head_dim features of a query in as many qubits: a layer rotates qubit i about Y by
    w_i x_i + b_i, with trainable w and b, and entangles neighbours. Keys have weights of their own. The
    logit is a trainable temperature times the fidelity |<phi(q)|phi(k)>|². Values are projected as usual,
    without a bias. The simulation is exact and takes 4^head_dim numbers for a query or a key.

    Parameters
    ----------
    layers : int
        How often the features are encoded, 1 to 16.
    shifts : bool
        Whether gradients of the circuits' angles are taken by the parameter-shift rule, as on a device.
    control : bool
        Whether this is the classical control, with the same weights: the logit is the temperature times the
        squared cosine between sums over layers of sin(w x + b).

    Source: Havlíček et al. (2019) for kernels of states. That classical controls of the same capacity tie
    with such attention is what 2504.05336 found.
    """

    layers: int = 2
    shifts: bool = False
    control: bool = False
    name: ClassVar[str] = "quantum-kernel"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_count("layers", self.layers, 1, 16))

    def build(self, embed_dim: int, num_heads: int) -> nn.Module:
        """Make the layer; ArgumentError if a head has more features than qubits can be simulated."""
        return KernelHeads(self, embed_dim, num_heads)

    @property
    def classical(self) -> QuantumKernelKind:
        return replace(self, control=True, shifts=False)


KINDS: dict[str, AttentionKind] = {
    "orthogonal": OrthogonalKind(),
    "orthogonal-control": OrthogonalKind(control=True),
    "quantum-kernel": QuantumKernelKind(),
    "quantum-kernel-control": QuantumKernelKind(control=True),
}
"""The kinds of attention besides torch's own, by name, with default settings."""


def make_kind(kind: str | AttentionKind) -> AttentionKind:
    """Return the kind of a name; a kind is returned as it is.

    Raises
    ------
    ArgumentError, DtypeError
        If there is no such kind.

    Examples
    --------
    >>> make_kind("quantum-kernel").layers
    2
    """
    if isinstance(kind, str):
        if kind not in KINDS:
            raise unknown_name("kind", kind, ["softmax", *KINDS])
        return KINDS[kind]
    if not isinstance(kind, AttentionKind):
        raise DtypeError(
            f"kind={quoted(kind)} is a {type(kind).__name__}; it must be a name or an AttentionKind."
        )
    return kind


class OrthogonalHeads(nn.Module):
    """Queries, keys and values by three orthogonal layers, or by their control; see `OrthogonalKind`.

    Attributes
    ----------
    angles : Parameter, (3, P)
        Radians; of the control, the free numbers of its matrices.
    """

    def __init__(self, kind: OrthogonalKind, embed_dim: int, num_heads: int):
        super().__init__()
        self.kind, self.num_heads = kind, num_heads
        count = num_rotations(embed_dim, kind.layout)
        start = torch.rand(3, count) * (2 * math.pi) - math.pi
        if kind.control:  # rows have the norm 1 on average, as those of an orthogonal matrix
            start = torch.randn(3, count) * math.sqrt(embed_dim / count)
        self.angles = nn.Parameter(start)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Heads:
        """Project and split into heads."""
        q, k, v = (
            self._project(x, a).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, a in zip((query, key, value), self.angles, strict=True)
        )
        return q, k, v

    def _project(self, x: Tensor, angles: Tensor) -> Tensor:
        if self.kind.control:
            return F.linear(x, cyclic_matrix(angles, x.shape[-1]))
        if not self.kind.shifts:
            basis = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
            return x @ rotate(basis, angles, self.kind.layout)  # the layer's matrix, made once for all rows
        fixed = x.detach()
        turned = by_shifts(lambda a: rotate(fixed, a, self.kind.layout), angles, TWO_TERMS)
        through = rotate(x, angles.detach(), self.kind.layout)  # the gradient of x: the layer transposed
        return turned + (through - through.detach())


def cyclic_matrix(entries: Tensor, n: int) -> Tensor:
    """A matrix (n, n) whose entries (i, (i + o) mod n) are given for the offsets o = 1, 2, ..., the rest 0.

    Examples
    --------
    >>> cyclic_matrix(torch.tensor([1.0, 2.0, 3.0]), 3)
    tensor([[0., 1., 0.],
            [0., 0., 2.],
            [3., 0., 0.]])
    """
    place = torch.arange(len(entries), device=entries.device)
    row, offset = place % n, place // n + 1
    return entries.new_zeros(n * n).index_copy(0, row * n + (row + offset) % n, entries).view(n, n)


class KernelHeads(nn.Module):
    """Features whose products are kernels, and projected values; see `QuantumKernelKind`.

    Attributes
    ----------
    weight, offset : Parameter, (2, heads, layers, head_dim)
        w and b of queries and of keys.
    log_temperature : Parameter, (heads,)
    value_weight : Parameter, (embed_dim, embed_dim)
    """

    def __init__(self, kind: QuantumKernelKind, embed_dim: int, num_heads: int):
        super().__init__()
        features = embed_dim // num_heads
        if features > MAX_KERNEL_QUBITS:
            raise ArgumentError(
                f"embed_dim / num_heads = {features} is not allowed with kind={kind.name!r}: a head has a "
                f"qubit for each feature, at most {MAX_KERNEL_QUBITS}. Take more heads."
            )
        self.kind, self.num_heads = kind, num_heads
        shape = (2, num_heads, kind.layers, features)
        self.weight = nn.Parameter(torch.rand(shape) * 2 - 1)
        self.offset = nn.Parameter(torch.rand(shape) * 2 - 1)
        self.log_temperature = nn.Parameter(torch.full((num_heads,), math.log(4)))
        self.value_weight = nn.Parameter(torch.empty(embed_dim, embed_dim))
        nn.init.xavier_uniform_(self.value_weight)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Heads:
        """Encode queries and keys, project values."""
        q, k = (self._features(x, side) for side, x in enumerate((query, key)))
        factor = self.log_temperature.exp() * math.sqrt(q.shape[-1])
        v = F.linear(value, self.value_weight).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return q * factor[:, None, None], k, v

    def _features(self, x: Tensor, side: int) -> Tensor:
        heads = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [N, heads, L, d]
        weight, offset = self.weight[side, :, None], self.offset[side, :, None]  # [heads, 1, layers, d]
        angles = heads[..., None, :] * weight + offset
        if self.kind.control:
            unit = F.normalize(angles.sin().sum(-2), dim=-1)
            return (unit[..., :, None] * unit[..., None, :]).flatten(-2)
        if not self.kind.shifts:
            return kernel_features(angles)
        shape = angles.shape[-2:]
        return by_shifts(
            lambda a: kernel_features(a.unflatten(-1, shape)), angles.flatten(-2), TWO_TERMS, shared=False
        )
