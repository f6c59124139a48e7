"""`execute_with_zne`: zero-noise extrapolation of what a user's own executor returns for a circuit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from qiskit import QuantumCircuit
from qiskit.quantum_info import SparsePauliOp

from ..errors import ArgumentError, DtypeError
from .inference import ZeroNoiseEstimate
from .scaling import fold
from .zne import ZeroNoiseExtrapolation


def execute_with_zne(
    circuit: QuantumCircuit,
    executor: Callable[[QuantumCircuit], Any],
    observable: SparsePauliOp | None = None,
    *,
    zne: ZeroNoiseExtrapolation | None = None,
    how: str = "local",
) -> Any:
    """Estimate what an executor would return for a circuit if there were no noise.

    The circuit is folded to each noise level, the executor runs it, and the results are extrapolated to noise
    0. The executor is any function: it may run a simulator, a device or a density matrix.

    Parameters
    ----------
    circuit : QuantumCircuit
        A circuit in the gates of the device, so that it isn't compiled again: barriers keep the added gates
        apart. Without an observable it measures at its end, or not at all, as the executor wants it.
    executor : callable
        Without an observable, `executor(circuit)` returns the value: a number, an array of floating-point
        numbers, a Tensor, or an estimate with `output` and `std_error`. With one, the circuit that it gets
        measures all qubits, and it returns counts: a mapping from bitstrings, the last qubit first as in
        qiskit, to how often each was read.
    observable : SparsePauliOp, optional
        Whose expectation is estimated, on the qubits of a circuit without measurements. Terms that commute
        qubit by qubit are measured together.
    zne : ZeroNoiseExtrapolation, optional
        `ZeroNoiseExtrapolation()` if None.
    how : str
        How gates are folded: one of `FOLDINGS`; see `fold`.

    Returns
    -------
    float, ndarray, Tensor or ZeroNoiseEstimate
        A number where the executor returns numbers, an array or a Tensor where it returns such, and an
        estimate with error bars where it returns estimates, or counts for an observable.

    Raises
    ------
    DtypeError
        If an argument has the wrong type, or if the executor returns something else.
    ArgumentError, ShapeError
        If the circuit cannot be folded or measures where an observable is given, if the observable has
        another number of qubits or is not Hermitian, or if results do not fit each other.

    Source: Giurgica-Tiron et al., Digital zero noise extrapolation for quantum error mitigation (2020); the
    verb is mitiq's.

    Examples
    --------
    >>> circuit = QuantumCircuit(1)
    >>> for _ in range(10):
    ...     _ = circuit.x(0)
    >>> def executor(circuit):  # depolarises by 1 % at each gate
    ...     return 0.99 ** circuit.count_ops()["x"]
    >>> round(executor(circuit), 3), round(execute_with_zne(circuit, executor), 3)
    (0.904, 0.979)
    """
    if not isinstance(circuit, QuantumCircuit):
        raise DtypeError(f"circuit is a {type(circuit).__name__}; it must be a QuantumCircuit.")
    if not callable(executor):
        raise DtypeError(f"executor is a {type(executor).__name__}; it must be a function of a circuit.")
    zne = ZeroNoiseExtrapolation() if zne is None else zne
    if not isinstance(zne, ZeroNoiseExtrapolation):
        raise DtypeError(f"zne is a {type(zne).__name__}; it must be a ZeroNoiseExtrapolation, or None.")
    groups = None if observable is None else _checked_groups(circuit, observable)
    folded = [fold(circuit, level, how) for level in zne.noise_levels]
    levels = [float(x.metadata["noise_level"]) for x in folded]
    if len(set(levels)) < len(set(zne.noise_levels)):
        raise ArgumentError(
            f"noise_levels={list(zne.noise_levels)} become {levels} on this circuit, which has too few gates "
            "to fold. Use levels that are further apart, or how='local'."
        )
    results = [executor(x) if groups is None else _expectation(x, executor, groups) for x in folded]
    return zne.combine_results(results, levels=levels)


def _checked_groups(circuit: QuantumCircuit, observable: SparsePauliOp) -> Sequence[SparsePauliOp]:
    """The terms of an observable in groups that are measured together."""
    if not isinstance(observable, SparsePauliOp):
        raise DtypeError(
            f"observable is a {type(observable).__name__}; it must be a qiskit.quantum_info.SparsePauliOp."
        )
    if observable.num_qubits != circuit.num_qubits:
        raise ArgumentError(
            f"observable has {observable.num_qubits} qubits and circuit has {circuit.num_qubits}; they must "
            "have the same."
        )
    if any(i.operation.name == "measure" for i in circuit.data):
        raise ArgumentError("circuit measures, but the observable decides what is measured: leave it to it.")
    if np.abs(np.imag(observable.coeffs)).max() > 1e-12 * np.abs(observable.coeffs).max():
        raise ArgumentError("observable has complex coefficients; it must be Hermitian.")
    return list(observable.group_commuting(qubit_wise=True))


def _expectation(
    circuit: QuantumCircuit,
    executor: Callable[[QuantumCircuit], Any],
    groups: Sequence[SparsePauliOp],
) -> ZeroNoiseEstimate:
    """The expectation of the groups' sum and its standard error, from counts of the bases of the groups."""
    value, variance = 0.0, 0.0
    for group in groups:
        x, z = group.paulis.x.any(0), group.paulis.z.any(0)
        measured = circuit.copy()
        for qubit in range(circuit.num_qubits):
            if x[qubit]:
                if z[qubit]:  # it is Y: X and Z do not commute, so they are not both in one group
                    measured.sdg(qubit)
                measured.h(qubit)
        measured.measure_all()
        counts = executor(measured)
        if not isinstance(counts, Mapping) or not counts:
            raise DtypeError(
                f"executor returned a {type(counts).__name__}; with an observable it must return counts, a "
                "mapping from bitstrings to numbers."
            )
        shots = float(sum(counts.values()))
        if not shots > 0:
            raise ArgumentError("executor returned counts that sum to 0.")
        share = np.array([count / shots for count in counts.values()])
        bits = np.array([_bits(key, circuit.num_qubits) for key in counts])  # [K, qubits]
        supports = group.paulis.x | group.paulis.z  # [terms, qubits]
        signs = 1 - 2 * ((bits @ supports.T.astype(int)) % 2)  # [K, terms]
        each = signs @ np.real(group.coeffs)  # of each bitstring
        mean = float(share @ each)
        value += mean
        seen = max(float(share @ (each - mean) ** 2), 0.0) / max(shots - 1, 1)
        # As `laplace_variance`, for shots that agree: one more at either end of what the terms can sum to.
        reach = float(np.abs(group.coeffs[supports.any(1)]).sum())
        variance += max(seen, 4 * reach**2 * (shots + 1) / (shots + 2) ** 2 / shots)
    output, std_error = (torch.tensor(x, dtype=torch.float64) for x in (value, variance**0.5))
    return ZeroNoiseEstimate(output, std_error, torch.ones(1, dtype=torch.float64))


def _bits(key: Any, num_qubits: int) -> list[int]:
    """The bits of a bitstring, that of qubit 0 first."""
    text = str(key).replace(" ", "")
    if len(text) != num_qubits or set(text) - {"0", "1"}:
        raise ArgumentError(f"executor returned counts of {key!r}; keys must be {num_qubits} bits, as '01'.")
    return [int(bit) for bit in reversed(text)]
