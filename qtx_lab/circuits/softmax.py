"""The softmax circuit: it loads a query and keys, and computes their softmax instead of being given it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from qiskit import QuantumCircuit, transpile
from qiskit.circuit import ParameterVector
from torch import Tensor

from ..checks import check_count, check_number, check_scale
from ..errors import ArgumentError, DtypeError, ShapeError
from .base import Loader, blank_circuit, check_num_qubits, num_bits, walsh_hadamard
from .signal_processing import MAX_DEGREE, ExponentialPolynomial, exponential_polynomial, signal_phases

MAX_INDEX_QUBITS = 6
"""Most qubits of the key's index, so at most 64 keys: the gates of a load grow with the number of keys."""

MAX_FEATURES = 64
"""Most components of a query or a key."""

MAX_ROUNDS = 50
"""Most rounds of amplitude amplification."""

MAX_ALPHA = 100.0
"""Largest product of the norms of a query and a key with the scale."""

MIN_ALPHA = 0.25
"""Least subnormalisation: rows of nearly equal logits share it."""

ALPHA_STEPS = 8
"""Subnormalisations are rounded up to one of so many steps an octave, so that rows share polynomials."""


@dataclass(frozen=True, eq=False)
class SoftmaxExpectation:
    """What a softmax circuit measures without noise, by theory.

    Parameters
    ----------
    probabilities : Tensor, float64, (R, n)
        P(x_j)² divided by its sum over the allowed keys: what accepted shots are drawn from. 0 in a row that
        allows no key, as are `softmax` and `success`.
    softmax : Tensor, float64, (R, n)
        What they ought to be drawn from.
    success : Tensor, float64, (R,)
        Probability that a shot of the circuit without amplification gives a key that is allowed.
    amplified : Tensor, float64, (R,)
        The same for the circuit with its rounds of amplitude amplification.
    best_rounds : Tensor, int64, (R,)
        Rounds after which success is first at its highest.
    alpha : Tensor, float64, (R,)
        Subnormalisation: the circuit's amplitudes are x_j = logit_j / alpha.
    scale : Tensor, float64, (R,)
        Of the polynomial: `success` is nearly scale² times the mean of exp(logit_j - max_logit) over 2^m
        indices.
    key_loads : int
        How often a shot loads or unloads all keys, amplification included.
    """

    probabilities: Tensor
    softmax: Tensor
    success: Tensor
    amplified: Tensor
    best_rounds: Tensor
    alpha: Tensor
    scale: Tensor
    key_loads: int

    @property
    def total_variation(self) -> Tensor:
        """Distance of `probabilities` from `softmax`, float64 (R,): the error of the polynomial."""
        return (self.probabilities - self.softmax).abs().sum(-1) / 2

    @property
    def key_loads_a_draw(self) -> Tensor:
        """Mean number of loads of all keys for an accepted shot, float64 (R,)."""
        return self.key_loads / self.amplified


@dataclass(frozen=True)
class SoftmaxLoader(Loader):
    """Loads q and k_j, and draws key j with a probability near softmax(q·k_j scale), which is never loaded.

    The index j is in uniform superposition. U loads q and unloads k_j, so that its amplitude
    <0|U|0> = q·k_j / (|q| max|k|) = x_j is an overlap with its sign: U is a block-encoding of the diagonal
    matrix of the logits divided by alpha = |scale| |q| max|k|. Keys have different norms: a qubit `norm` is
    rotated by 2 arccos(|k_j| / max|k|), and its 1 is failure. The quantum singular value transformation,
    which alternates U and its inverse with rotations of an ancilla, makes P(x_j) of x_j, with P the
    polynomial that is nearly proportional to exp(alpha x / 2) (`exponential_polynomial`). The exponential is
    neither even nor odd, so that a second ancilla combines both parts. Where all qubits but those of the
    index read 0, the index is drawn with a probability proportional to P(x_j)²: the other shots are
    discarded.

    This is no way to draw faster. A softmax of eight keys, and a draw from it, take a classical computer less
    than a microsecond, and the angles of the circuit are computed from all components of q and k. A shot
    loads all keys `degree` times, and succeeds with a probability that falls as exp(max_logit - alpha), which
    a higher degree or amplitude amplification makes up for. The circuit is a measure of what computing a
    softmax on a device takes.

    A row p that has no q and k is given as keys of one component, its logarithms, so that the loader also
    works wherever loaders do (`angles`); it needs features = 1. Then alpha is half of the range of the logits
    of the row.

    Parameters
    ----------
    features : int
        Components d of q and of each key, 1 to 64.
    degree : int
        Degree of the polynomial, 1 to 40: loads of all keys.
    rounds : int
        Rounds of amplitude amplification, each with two more circuits of the degree. They change the
        probability of success to sin²((2 rounds + 1) arcsin √success), and leave the distribution alone.
    max_logit : float, optional
        Promised bound of |q·k_j scale|. It makes success more likely. Where None, only alpha bounds it.
    tolerance : float
        Largest total variation between softmax and the noiseless circuit.

    Raises
    ------
    ArgumentError
        If a setting is out of its bounds.

    Source: Gilyén, Su, Low and Wiebe, Quantum singular value transformation and beyond (2019); Guo, Yu, Choi,
    Agrawal, Nakaji, Aspuru-Guzik and Rebentrost, Quantum linear algebra is all you need for transformer
    architectures (2024), for softmax by a polynomial of a block-encoding; Brassard, Høyer, Mosca and Tapp,
    Quantum amplitude amplification and estimation (2002).

    Examples
    --------
    >>> loader = SoftmaxLoader(features=2, degree=4)
    >>> q, k = torch.tensor([[1.0, 1.0]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]])
    >>> expected = loader.expected(q, k)
    >>> expected.probabilities.round(decimals=2)
    tensor([[0.4000, 0.4000, 0.1000, 0.1000]], dtype=torch.float64)
    >>> loader.vector_angles(q, k).shape == (1, loader.circuit(2).num_parameters)
    True
    """

    name = "softmax"
    exact = False

    features: int = 1
    degree: int = 12
    rounds: int = 0
    max_logit: float | None = None
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "features": check_count("features", self.features, 1, MAX_FEATURES),
            "degree": check_count("degree", self.degree, 1, MAX_DEGREE),
            "rounds": check_count("rounds", self.rounds, 0, MAX_ROUNDS),
            "tolerance": check_number("tolerance", self.tolerance, least=1e-6, most=0.9),
        }
        if self.max_logit is not None:
            checked["max_logit"] = check_number("max_logit", self.max_logit, least=0)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def circuit(self, size: int) -> QuantumCircuit:
        """Build the circuit for 2^size keys; see `Loader.circuit`.

        Its qubits are those of the index, then those of the components of q and k (none if features = 1),
        `norm`, and the ancillas of the polynomial and of its two parts.
        """
        check_num_qubits(size, MAX_INDEX_QUBITS)
        wires = _Wires(size, self.features)
        circuit = blank_circuit(wires.count, self.name)
        prepared = self._prepared(wires)
        circuit.compose(prepared, inplace=True)
        for _ in range(self.rounds):  # the sign of a round is no matter
            _flip_zero(circuit, wires.flags)
            circuit.compose(prepared.inverse(), inplace=True)
            _flip_zero(circuit, list(range(wires.count)))
            circuit.compose(prepared, inplace=True)
        circuit.measure(range(wires.count), range(wires.count))
        return circuit

    def angles(self, p: Tensor) -> np.ndarray:
        """Compute the angles from the logarithms of rows p as keys of one component; see `Loader.angles`.

        Raises
        ------
        ArgumentError
            If features is not 1, or if the degree is too low for the range of a row's logarithms.
        """
        if self.features != 1:
            raise ArgumentError(
                f"features={self.features}: this circuit needs queries and keys, not rows p. Use "
                "`vector_angles`, or `SoftmaxCircuitSampler`, or features=1."
            )
        return self.vector_angles(*row_vectors(p.log()), scale=1.0, allowed=p > 0)

    def vector_angles(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, allowed: Tensor | None = None
    ) -> np.ndarray:
        """Compute the angles of rows that are given by their queries and keys.

        Parameters
        ----------
        q : Tensor, (R, d)
        k : Tensor, (R, n, d) or (n, d)
        scale : float, optional
            1 / sqrt(d) if None.
        allowed : Tensor, bool, (R, n), optional
            Keys that may be drawn; all if None. The others are in the superposition too, and are discarded.

        Returns
        -------
        ndarray, float64, (R, P)
            In the order of `circuit(size(n)).parameters`.

        Raises
        ------
        ShapeError, DtypeError
            If the shapes do not fit the features, or the tensors are not floating-point.
        ArgumentError
            If a number is not finite, a logit is beyond `max_logit`, or the degree is too low.
        """
        check_vectors(q, k, allowed)
        return self._angles(self._inputs(q, k, scale, allowed))

    def _angles(self, inputs: _Inputs) -> np.ndarray:
        rows = len(inputs.query)
        wires = _Wires(num_bits(inputs.key.shape[1]), self.features)
        parts = [_transformed(2 * inputs.key_norm.clamp(-1, 1).acos())]
        key_nodes, query_nodes = _vector_angles(inputs.key), _vector_angles(inputs.query[:, None])
        for level in range(len(wires.data)):  # [R, 2^m, 2^level] to the order of the controls
            parts.append(_transformed(key_nodes[level].mT.reshape(rows, -1)))
        queries = [_transformed(nodes.reshape(rows, -1)) for nodes in query_nodes[: len(wires.data)]]
        programs = [_program(self._polynomial(alpha)) for alpha in inputs.alpha.tolist()]
        phases = torch.tensor(np.array([x.phases for x in programs])).reshape(rows, 2 * self.degree + 1)
        weights = torch.tensor([x.weight_angle for x in programs], dtype=torch.float64).reshape(rows, 1)
        return torch.cat([*parts, phases, *queries, weights], -1).numpy()

    def expected(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, allowed: Tensor | None = None
    ) -> SoftmaxExpectation:
        """Compute what the circuit measures without noise; arguments and errors as for `vector_angles`."""
        check_vectors(q, k, allowed)
        return self._expected(self._inputs(q, k, scale, allowed))

    def computed(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, allowed: Tensor | None = None
    ) -> tuple[SoftmaxExpectation, np.ndarray]:
        """Compute `expected` and `vector_angles` together, of vectors that `check_vectors` has let through.

        Arguments, results and further errors are theirs.
        """
        inputs = self._inputs(q, k, scale, allowed)
        return self._expected(inputs), self._angles(inputs)

    def _expected(self, inputs: _Inputs) -> SoftmaxExpectation:
        n, visible = inputs.num_keys, inputs.visible
        polynomials = [self._polynomial(alpha) for alpha in inputs.alpha.tolist()]
        amplitudes = [f(x) for f, x in zip(polynomials, inputs.overlap.numpy(), strict=True)]
        squares = torch.from_numpy(np.array(amplitudes).reshape(inputs.overlap.shape)).square()
        passed = squares.mean(-1)  # of all indices, also those that are discarded
        accepted = squares * visible
        draws = accepted.mean(-1)
        angle = passed.clamp(0, 1).sqrt().asin()
        rounds = (math.pi / (4 * angle) - 0.5).round().clamp_min(0)
        logits = (inputs.overlap * inputs.alpha[:, None]).masked_fill(~visible, -torch.inf)
        return SoftmaxExpectation(
            probabilities=(accepted / accepted.sum(-1, keepdim=True)).nan_to_num(0)[:, :n],
            softmax=logits.softmax(-1).nan_to_num(0)[:, :n],
            success=draws,
            amplified=((2 * self.rounds + 1) * angle).sin().square() * draws / passed,
            best_rounds=rounds.long(),
            alpha=inputs.alpha,
            scale=torch.tensor([f.scale for f in polynomials], dtype=torch.float64),
            key_loads=self.degree * (2 * self.rounds + 1),
        )

    def _polynomial(self, alpha: float) -> ExponentialPolynomial:
        bound = None if self.max_logit is None else min(alpha, self.max_logit)
        return exponential_polynomial(alpha, self.degree, max_logit=bound, tolerance=self.tolerance)

    def _inputs(self, q: Tensor, k: Tensor, scale: float | None, allowed: Tensor | None) -> _Inputs:
        """Check shapes and numbers of queries and keys, and normalise them."""
        for name, x in (("q", q), ("k", k)):
            if not bool(x.isfinite().all()):
                raise ArgumentError(f"{name} holds NaN or infinity; it must be finite.")
        if k.ndim == 2:
            k = k.expand(len(q), *k.shape)
        fits = q.ndim == 2 and k.ndim == 3 and len(q) == len(k) and k.shape[1] > 0
        if not fits or not q.shape[-1] == k.shape[-1] == self.features:
            raise ShapeError(
                f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; they must be (R, {self.features}) and "
                f"(R, n, {self.features}) for features={self.features}."
            )
        if allowed is not None and allowed.shape != k.shape[:2]:
            raise ShapeError(f"allowed has shape {tuple(allowed.shape)}; it must be {tuple(k.shape[:2])}.")
        scale = check_scale(scale)
        factor = self.features**-0.5 if scale is None else scale
        query = q.detach().to("cpu", torch.float64) * factor
        key = k.detach().to("cpu", torch.float64)
        if allowed is not None:
            key = key * allowed.cpu()[..., None]
        padded = torch.nn.functional.pad(key, (0, 0, 0, (1 << num_bits(key.shape[1])) - key.shape[1]))
        most = query.norm(dim=-1) * padded.norm(dim=-1).amax(-1)
        if not bool((most <= MAX_ALPHA).all()):
            raise ArgumentError(
                f"|scale| |q| max|k| is {float(most.max()):.4g} in row {int(most.argmax())}; it must be at "
                f"most {MAX_ALPHA:g}, because success falls exponentially with it."
            )
        visible = torch.zeros(padded.shape[:2], dtype=torch.bool)
        visible[:, : key.shape[1]] = True if allowed is None else allowed.cpu()
        inputs = _normalised(query, padded, visible, key.shape[1])
        reached = (inputs.overlap * inputs.alpha[:, None]).abs().amax(-1)
        if self.max_logit is not None and bool((reached > self.max_logit * (1 + 1e-9)).any()):
            raise ArgumentError(
                f"max_logit={self.max_logit:g} is exceeded: the logits of row {int(reached.argmax())} reach "
                f"{float(reached.max()):.4g}."
            )
        return inputs

    def _prepared(self, wires: _Wires) -> QuantumCircuit:
        """The circuit before amplification and measurement."""
        keys, queries = _load_gates(wires)
        count = {
            name: sum(1 << len(x.controls) for x in gates) for name, gates in (("k", keys), ("q", queries))
        }
        key, query = ParameterVector("k", count["k"]), ParameterVector("q", count["q"])
        phase, weight = ParameterVector("phase", 2 * self.degree + 1), ParameterVector("weight", 1)
        longer = self.degree % 2  # the part, even or odd, of the whole degree; the other has one less
        circuit = QuantumCircuit(wires.count)
        circuit.h(wires.index)
        circuit.ry(weight[0], wires.part)
        # The first rotation of the longer part acts where the block is 0, as Ry(2 phase).
        start = [phase[0], -phase[0] if longer else phase[0]]
        _multiplexed(circuit, start, [wires.part], wires.signal)
        table = _phase_table(len(wires.block))
        for i in range(1, self.degree + 1):
            only = (wires.part, longer) if i == 1 else None
            if i % 2:  # U: load q, unload k
                _load(circuit, query, queries, only=only)
                _load(circuit, key, keys, inverse=True, only=only)
            else:
                _load(circuit, key, keys)
                _load(circuit, query, queries, inverse=True)
            angles = [even * phase[2 * i - 1] + odd * phase[2 * i] for even, odd in table.tolist()]
            _multiplexed(circuit, angles, [*wires.block, wires.part], wires.signal)
        circuit.ry(-weight[0], wires.part)
        return circuit


def check_vectors(q: object, k: object, allowed: object | None) -> None:
    """Refuse queries and keys that are no tensors of real numbers, and masks that are none of booleans."""
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise DtypeError(f"{name} is {given}; it must be a floating-point tensor.")
        if x.is_meta:
            raise DtypeError(f"{name} is on the device meta; it must hold numbers.")
    if allowed is None:
        return
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
        given = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
        raise DtypeError(f"allowed is {given}; it must be a tensor of torch.bool.")
    if allowed.is_meta:
        raise DtypeError("allowed is on the device meta; it must hold True and False.")


def row_vectors(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (R, 1) and keys (R, n, 1) whose products are logits (R, n), but for a number in each row.

    Logits are shifted so that the largest and the smallest of a row are opposite. A key of the logit -inf,
    which is masked, is 0.

    Examples
    --------
    >>> row_vectors(torch.tensor([[2.0, 3.0, -torch.inf]]))[1].squeeze(-1)
    tensor([[-0.5000,  0.5000,  0.0000]])
    """
    masked = logits == -torch.inf
    high = logits.amax(-1, keepdim=True)
    low = logits.masked_fill(masked, torch.inf).amin(-1, keepdim=True)
    middle = ((high + low) / 2).masked_fill(high == -torch.inf, 0)
    shifted = (logits - middle).masked_fill(masked, 0)
    return torch.ones_like(logits[:, :1]), shifted[..., None]


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Normalised queries and keys: query and key are of norm 1 or 0, and overlap = query·key key_norm."""

    query: Tensor  # [R, d]
    key: Tensor  # [R, 2^m, d]
    key_norm: Tensor  # [R, 2^m], |k_j| divided so that alpha overlap is the logit; with a sign if d is 1
    alpha: Tensor  # [R]
    overlap: Tensor  # [R, 2^m]
    visible: Tensor  # [R, 2^m], keys that may be drawn
    num_keys: int


def _normalised(query: Tensor, key: Tensor, visible: Tensor, num_keys: int) -> _Inputs:
    """Divide queries (R, d), which hold the scale, and keys (R, 2^m, d) by norms."""
    query_norm, key_norm = query.norm(dim=-1), key.norm(dim=-1)
    largest = (query_norm * key_norm.amax(-1)).clamp_min(MIN_ALPHA)
    # A hair below, so that a number that is a step already is not rounded up by its last digit.
    alpha = 2 ** ((ALPHA_STEPS * largest.log2() - 1e-9).ceil() / ALPHA_STEPS)
    share = key_norm * (query_norm / alpha)[:, None]
    unit_query = query / query_norm.masked_fill(query_norm == 0, 1)[:, None]
    unit_key = key / key_norm.masked_fill(key_norm == 0, 1)[..., None]
    overlap = (unit_key @ unit_query[..., None]).squeeze(-1) * share
    if query.shape[-1] == 1:  # there is no qubit for the only component, whose sign `norm` takes
        share = overlap
    return _Inputs(unit_query, unit_key, share, alpha, overlap.clamp(-1, 1), visible, num_keys)


@dataclass(frozen=True)
class _Wires:
    """Which qubit is which, for 2^size keys of some components."""

    size: int
    features: int

    @property
    def index(self) -> list[int]:
        return list(range(self.size))

    @property
    def data(self) -> list[int]:
        """The qubits of the components, the lowest bit first."""
        return list(range(self.size, self.size + (self.features - 1).bit_length()))

    @property
    def block(self) -> list[int]:
        """The qubits whose 0 is the block that is encoded."""
        return [*self.data, self.norm]

    @property
    def norm(self) -> int:
        return self.size + len(self.data)

    @property
    def signal(self) -> int:
        return self.norm + 1

    @property
    def part(self) -> int:
        return self.norm + 2

    @property
    def flags(self) -> list[int]:
        """The qubits that must read 0."""
        return [*self.block, self.signal, self.part]

    @property
    def count(self) -> int:
        return self.norm + 3


@dataclass(frozen=True)
class _LoadGate:
    """A multiplexed rotation of a load: its angles are the parameters from `first` on."""

    first: int
    controls: list[int]
    target: int


def _load_gates(wires: _Wires) -> tuple[list[_LoadGate], list[_LoadGate]]:
    """The rotations that load the keys, and those that load the query."""
    keys, queries = [_LoadGate(0, wires.index, wires.norm)], []
    first = [1 << wires.size, 0]
    for level in range(len(wires.data)):
        target, higher = wires.data[-1 - level], wires.data[len(wires.data) - level :]
        keys.append(_LoadGate(first[0], [*wires.index, *higher], target))
        queries.append(_LoadGate(first[1], higher, target))
        first = [first[0] + (1 << wires.size + level), first[1] + (1 << level)]
    return keys, queries


def _load(
    circuit: QuantumCircuit,
    parameters: ParameterVector,
    gates: list[_LoadGate],
    *,
    inverse: bool = False,
    only: tuple[int, int] | None = None,
) -> None:
    """Append a load or its inverse; only where a qubit has a value, if (qubit, value) is given."""
    for gate in reversed(gates) if inverse else gates:
        angles: list[Any] = parameters[gate.first : gate.first + (1 << len(gate.controls))]
        controls = gate.controls
        if only is not None:
            sign = -1 if only[1] else 1
            angles = [0.5 * x for x in angles] + [0.5 * sign * x for x in angles]
            controls = [*controls, only[0]]
        _multiplexed(circuit, angles, controls, gate.target, inverse=inverse)


def _multiplexed(
    circuit: QuantumCircuit, angles: list[Any], controls: list[int], target: int, *, inverse: bool = False
) -> None:
    """Append a rotation about Y by an angle that the controls choose, with 2^controls CZ gates.

    `angles` holds the transform 2^-l sum_x (-1)^|x & g| theta_x for every g; bit i of x is control i.
    Source: Möttönen et al., as for `TreeLoader`.
    """
    count, gates = len(angles), []
    for i in range(count):
        gates.append(("ry", angles[i ^ (i >> 1)]))
        if count > 1:  # the bit in which the Gray codes of i and i + 1 differ
            gates.append(("cz", controls[min((~i & (i + 1)).bit_length() - 1, len(controls) - 1)]))
    for name, what in reversed(gates) if inverse else gates:
        if name == "ry":
            circuit.ry(-what if inverse else what, target)
        else:
            circuit.cz(what, target)


def _transformed(theta: Tensor) -> Tensor:
    """Angles (R, 2^l) that 2^l values of the controls choose, as `_multiplexed` takes them."""
    return walsh_hadamard(theta) / theta.shape[-1]


def _vector_angles(x: Tensor) -> list[Tensor]:
    """Rotation angles of the trees of real vectors (R, N, d), level by level: (R, N, 2^level).

    As `node_angles`, but the lowest level also makes the signs.
    """
    padded = torch.nn.functional.pad(x, (0, (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]))
    levels = []
    while padded.shape[-1] > 1:
        left, right = padded[..., 0::2], padded[..., 1::2]
        levels.append(2 * torch.atan2(right, left))
        padded = torch.hypot(left, right)
    return levels[::-1]


@cache
def _phase_table(qubits: int) -> np.ndarray:
    """How the angles of the signal's rotations depend on the phases of both parts, (2^(qubits + 1), 2).

    The rotation exp(-i phase Y Z), where Z is 1 if the block reads 0 and else -1, is Ry(±2 phase).
    """
    theta = torch.zeros(2, 2, 1 << qubits, dtype=torch.float64)  # [phase, part, block]
    for part in (0, 1):
        theta[part, part] = -2
        theta[part, part, 0] = 2
    return _transformed(theta.flatten(1)).T.numpy()


@dataclass(frozen=True, eq=False)
class _Program:
    """The numbers by which a circuit computes a polynomial."""

    phases: np.ndarray  # [2 degree + 1]: the first of the longer part, then pairs (even, odd)
    weight_angle: float


@lru_cache(maxsize=256)
def _program(polynomial: ExponentialPolynomial) -> _Program:
    """Find the phases of both parts."""
    degree = polynomial.degree
    parts = [_block_phases(signal_phases(polynomial.part(parity))) for parity in (0, 1)]
    longer = degree % 2
    pairs = [part[1:] if parity == longer else part for parity, part in enumerate(parts)]
    return _Program(
        np.concatenate([parts[longer][:1], np.stack(pairs, -1).ravel()]),
        2 * math.acos(math.sqrt(polynomial.weight)),
    )


def _block_phases(phases: np.ndarray) -> np.ndarray:
    """Phases for U and its inverse, which act as the reflections Z R, from those for rotations R."""
    shift = np.zeros(len(phases))
    shift[1:-1:2] = np.pi / 2
    shift[2::2] = -np.pi / 2
    return np.asarray(phases + shift)


def _flip_zero(circuit: QuantumCircuit, qubits: list[int]) -> None:
    """Append a sign of the state in which these qubits are 0."""
    circuit.x(qubits)
    circuit.h(qubits[-1])
    circuit.compose(_controlled_x(len(qubits) - 1), qubits, inplace=True)
    circuit.h(qubits[-1])
    circuit.x(qubits)


@cache
def _controlled_x(controls: int) -> QuantumCircuit:
    """X with many controls, made of gates of at most two qubits."""
    circuit = QuantumCircuit(controls + 1)
    circuit.mcx(list(range(controls)), controls)
    return transpile(circuit, basis_gates=["cz", "h", "rx", "ry", "rz"], optimization_level=1)
