"""Readout errors: how they are measured, once for the qubits in use and the device's calibration, and undone.

The errors of different qubits are taken to be independent, as mthree and IBM's calibration take them. mthree
corrects the counts of one circuit at a time, for the outcomes that occurred. A loader's register is small and
there are many rows, so here the inverses of the qubits' 2 × 2 matrices are applied to all values of the
register. The result is the same (it is tested against mthree) and needs no loop over rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from qiskit import QuantumCircuit
from torch import Tensor

from ..backends import QiskitQuantumBackend
from ..backends.requests import CalibrationRequest, PlannedRun
from ..checks import MAX_SEED, check_count
from ..circuits.base import unpack_values
from ..errors import ArgumentError, BackendUnavailable, DtypeError, ShapeError, StorageError
from ..storage import runs_home, write_atomic
from .register import RegisterEstimate
from .results import check_backend

CALIBRATION_SHOTS = 1 << 14
"""Shots of each prepared state. Readout errors of 1 % are then known to 6 % of their value. On the twins of
Fez, Boston and Sherbrooke, rows of 16 keys and 64,000 shots have errors that are at most 1 % larger than with
eight times as many, which would take more than three minutes of a device."""

MIN_CONTRAST = 0.02
"""Least difference of the probabilities to read 1 from a qubit in the states 1 and 0."""

SINGULAR_CONTRAST = 1e-6
"""Below this the matrix of a bit's errors counts as one without an inverse."""


def readout_errors(backend: QiskitQuantumBackend, n: int, *, seed: int = 0) -> Tensor:
    """Measure how the bits of the register for rows of n keys are misread.

    The qubits are prepared in 0...0, in 1...1, and in the two patterns that alternate. Errors of the
    preparation count as readout errors. The result is kept under `<runs>/.cache/readout`; with a new
    calibration of the device, for other qubits, or with other options of IBM's Sampler, as twirled
    measurements, it is measured again.

    Parameters
    ----------
    backend : QiskitQuantumBackend
    n : int
        Number of keys.
    seed : int
        Seed of a simulation.

    Returns
    -------
    Tensor, float64, (bits, 2, 2)
        P(read column | true row) of each bit of the register.

    Raises
    ------
    DtypeError
        If backend is not a QiskitQuantumBackend.
    BackendUnavailable
        If the errors cannot be measured, or if a bit reads the same whatever its qubit is.

    Examples
    --------
    >>> readout_errors(QiskitQuantumBackend("aer"), 2)  # an ideal simulator makes none
    tensor([[[1., 0.],
             [0., 1.]]], dtype=torch.float64)
    """
    check_backend(backend)
    seed = check_count("seed", seed, 0, MAX_SEED)
    circuit = backend.transpiled(n)
    bits = circuit.num_clbits
    if backend.engine.ideal:
        return torch.eye(2, dtype=torch.float64).expand(bits, 2, 2)
    known = known_errors(backend, n)
    errors = known.errors
    if errors is None:
        with backend.engine.reserved(planned_calibration(backend, n)):
            errors = _measure(backend, circuit, seed)
        keep_errors(known.path, errors)
    check_contrast(errors, backend.engine.name)
    return errors


@dataclass(frozen=True, eq=False)
class KnownErrors:
    """What is known of the readout errors of some qubits, without measuring.

    Parameters
    ----------
    path : Path
        The file that keeps them, or will.
    qubits : list of int
        The device's qubit of each bit of the register.
    errors : Tensor, float64, (bits, 2, 2), or None
        The errors; None where they have to be measured.
    """

    path: Path
    qubits: list[int]
    errors: Tensor | None


def known_errors(backend: QiskitQuantumBackend, n: int) -> KnownErrors:
    """Look up the readout errors of the register for rows of n keys."""
    circuit = backend.transpiled(n)
    path = _cache_path(backend, circuit)
    return KnownErrors(path, calibration_qubits(circuit), _read(path, circuit.num_clbits))


def planned_calibration(backend: QiskitQuantumBackend, n: int) -> list[PlannedRun]:
    """List what `readout_errors` is going to run: nothing if the errors are known already."""
    if backend.engine.ideal or known_errors(backend, n).errors is not None:
        return []
    return [
        PlannedRun(prepared, 1, CALIBRATION_SHOTS, "readout calibration", kept=True)
        for prepared, _ in prepared_states(backend.transpiled(n), 0)
    ]


def calibrated_readout_errors(backend: QiskitQuantumBackend, n: int) -> Tensor:
    """Return the same as `readout_errors`, without measuring, by the calibration that the device reports.

    Parameters
    ----------
    backend : QiskitQuantumBackend
    n : int
        Number of keys.

    Returns
    -------
    Tensor, float64, (bits, 2, 2)

    Raises
    ------
    DtypeError
        If backend is not a QiskitQuantumBackend.
    BackendUnavailable
        If a bit reads the same whatever its qubit is.
    """
    check_backend(backend)
    circuit, noise = backend.engine.calibrated(backend.transpiled(n))
    matrices = [noise.readout.get(qubit, np.eye(2)) for qubit in calibration_qubits(circuit)]
    errors = torch.from_numpy(np.stack(matrices)).double()
    check_contrast(errors, backend.engine.name)
    return errors


def undo_readout(shares: Tensor, errors: Tensor) -> Tensor:
    """Estimate the shares of the register's values if no bit were misread.

    This is for circuits that measure at their end only.

    Parameters
    ----------
    shares : Tensor, (..., 2^bits)
        Shares of the values that were read, or counts.
    errors : Tensor, (bits, 2, 2)
        Readout errors, as `readout_errors` returns them.

    Returns
    -------
    Tensor, (..., 2^bits)
        Quasi-probabilities. They have the same sum as `shares`; some may be negative. They are float64 if
        `shares` or `errors` are.

    Raises
    ------
    ShapeError, DtypeError
        If errors are not (bits, 2, 2), or shares not (..., 2^bits); if either holds anything but real
        numbers.
    ArgumentError
        If shares hold NaN or infinity, if errors are no probabilities that sum to 1 for each true value, or
        if a bit reads the same whatever its qubit is: then the matrix of its errors has no inverse.

    Source: Bravyi, Sheldon, Kandala, McKay and Gambetta, Mitigating measurement errors in multiqubit
    experiments (2021), the tensor product model.

    Examples
    --------
    >>> errors = torch.tensor([[[0.875, 0.125], [0.25, 0.75]]])
    >>> undo_readout(torch.tensor([[0.5625, 0.4375]]), errors)
    tensor([[0.5000, 0.5000]])
    """
    errors, shares = _checked_errors(errors), _real_numbers("shares", shares)
    shares = shares.double() if not shares.is_floating_point() else shares
    if shares.ndim < 1 or shares.shape[-1] != 1 << len(errors):
        raise ShapeError(
            f"shares has shape {tuple(shares.shape)}; it must be (..., {1 << len(errors)}), because errors "
            f"has {len(errors)} bits."
        )
    if not bool(shares.isfinite().all()):
        raise ArgumentError("shares holds NaN or infinity; it must be finite.")
    dtype = torch.promote_types(shares.dtype, errors.dtype)
    rows = shares.to(dtype).reshape(-1, shares.shape[-1])
    return _apply_to_bits(torch.linalg.inv(errors.to(dtype).mT), rows).view(shares.shape)


def estimate_register(
    counts: Tensor, errors: Tensor | None = None, *, feeds_forward: bool = False
) -> RegisterEstimate:
    """Estimate the probabilities of the register's values from counts, and undo known readout errors.

    Parameters
    ----------
    counts : Tensor, (R, 2^bits)
        How often each value was read.
    errors : Tensor, float64, (bits, 2, 2), optional
        Readout errors; None to undo none.
    feeds_forward : bool
        Whether the loader chooses rotations by the bits read so far; see `Loader.feeds_forward`.

    Returns
    -------
    RegisterEstimate
        Variances count one more shot for and against each value (Laplace's rule), because a value that no
        shot read is not known to be impossible.
    """
    errors = None if errors is None else _checked_errors(errors)
    if errors is not None and feeds_forward:
        return _undo_bit_by_bit(counts, errors)
    shots = counts.sum(-1, keepdim=True).double()
    shares = counts / shots
    unseen = laplace_variance(counts, shots)
    if errors is None:
        return RegisterEstimate(shares, unseen)
    value = undo_readout(shares, errors)
    # The value of a single shot is an element of the inverse, so its second moment takes their squares.
    second_moment = _apply_to_bits(torch.linalg.inv(errors.mT).square(), shares)
    variance = (second_moment - value.square()) / shots
    return RegisterEstimate(value, torch.maximum(variance, unseen))


def laplace_variance(counts: Tensor, shots: Tensor) -> Tensor:
    """Compute the variance s (1 - s) / shots of shares, with s = (counts + 1) / (shots + 2)."""
    share = (counts.double() + 1) / (shots + 2)
    return share * (1 - share) / shots.clamp_min(1)


def _undo_bit_by_bit(counts: Tensor, errors: Tensor) -> RegisterEstimate:
    """Estimate the same for a loader that feeds forward, where a misread bit also chooses the next rotations.

    Whatever the true bits were, the next qubit is rotated by the angle of the bits that were read. So the
    share of 1 among shots with the same bits so far, corrected for the readout of this one bit, is the row's
    own conditional probability: only the last measurement has to be undone. The variance is that of a
    product of independent conditional probabilities.
    """
    bits = len(errors)
    p = torch.ones(len(counts), 1, dtype=torch.float64)
    variance = torch.zeros_like(p)
    for bit in reversed(range(bits)):
        pairs = counts.double().reshape(len(counts), p.shape[-1], 2, -1).sum(-1)  # [R, prefixes, 2]
        shots = pairs.sum(-1, keepdim=True)
        contrast = errors[bit, 0, 0] + errors[bit, 1, 1] - 1
        read = torch.where(shots > 0, pairs / shots.clamp_min(1e-300), 0.5)
        misread = torch.stack((errors[bit, 1, 0], errors[bit, 0, 1]))  # of bits read as 0, as 1
        share = ((read - misread) / contrast).clamp(0, 1)
        share = share / share.sum(-1, keepdim=True)
        share_variance = laplace_variance(pairs, shots) / contrast**2
        # The variance of a product of two independent estimates.
        before, p_before = variance[..., None], p[..., None]
        variance = before * share.square() + (p_before.square() + before) * share_variance
        variance, p = variance.flatten(1), (p_before * share).flatten(1)
    return RegisterEstimate(p, variance)


def _apply_to_bits(matrices: Tensor, x: Tensor) -> Tensor:
    """Apply matrices (bits, 2, 2), indexed [result, given], to the bits of the register in x (R, 2^bits)."""
    bits = len(matrices)
    y = x.reshape(len(x), *[2] * bits)
    for bit in range(bits):
        axis = bits - bit  # the highest bit comes first
        y = torch.tensordot(y, matrices[bit], dims=([axis], [1])).movedim(-1, axis)
    return y.reshape(len(x), -1)


def _checked_errors(errors: Tensor) -> Tensor:
    """Readout errors (bits, 2, 2) as floating-point numbers, or an error if they cannot be undone."""
    errors = _real_numbers("errors", errors)
    if errors.ndim != 3 or errors.shape[1:] != (2, 2):
        raise ShapeError(f"errors has shape {tuple(errors.shape)}; it must be (bits, 2, 2).")
    errors = errors if errors.is_floating_point() else errors.double()
    if not bool(((errors >= 0) & (errors <= 1)).all()) or bool(((errors.sum(-1) - 1).abs() > 1e-4).any()):
        raise ArgumentError(
            "errors holds numbers that are not allowed: P(read | true) must be from 0 to 1 and sum to 1 for "
            "each true value."
        )
    contrast = errors[:, 0, 0] + errors[:, 1, 1] - 1
    if bool((contrast.abs() < SINGULAR_CONTRAST).any()):
        bit = int(contrast.abs().argmin())
        raise ArgumentError(
            f"errors cannot be undone: bit {bit} reads the same whatever its qubit is (its matrix has no "
            "inverse)."
        )
    return errors


def _real_numbers(argument: str, given: Tensor | np.ndarray | Sequence[float]) -> Tensor:
    """A tensor of what was given, or a DtypeError that names the argument."""
    try:
        numbers = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise DtypeError(f"{argument} is a {type(given).__name__}; it must hold real numbers.") from None
    if numbers.is_complex():
        raise DtypeError(f"{argument} is {numbers.dtype}; it must hold real numbers.")
    return numbers


def check_contrast(errors: Tensor, device: str) -> None:
    """Refuse errors (bits, 2, 2) that cannot be undone."""
    if bool((errors[:, 0, 0] + errors[:, 1, 1] - 1 < MIN_CONTRAST).any()):
        raise BackendUnavailable(
            f"A bit of {device} reads nearly the same whatever its qubit is: its readout errors cannot be "
            "undone."
        )


def calibration_qubits(circuit: QuantumCircuit) -> list[int]:
    """Return the qubit that each bit of the register is measured from."""
    qubit = {
        circuit.find_bit(i.clbits[0]).index: circuit.find_bit(i.qubits[0]).index
        for i in circuit.data
        if i.operation.name == "measure"
    }
    if sorted(qubit) != list(range(circuit.num_clbits)):
        raise ArgumentError(
            f"{circuit.name} does not measure every bit once, so its readout errors cannot be undone."
        )
    return [qubit[bit] for bit in range(circuit.num_clbits)]


def _measure(backend: QiskitQuantumBackend, circuit: QuantumCircuit, seed: int) -> Tensor:
    """Measure the readout errors (bits, 2, 2) of the qubits that a transpiled circuit measures."""
    outcomes, states = [], []
    for calibration, request in prepared_states(circuit, seed):
        outcomes.append(
            backend.engine.run(calibration, np.empty((1, 0)), request.shots, request.seed, request)
        )
        states.append(request.prepared)
    return errors_of_outcomes(outcomes, states)


def prepared_states(circuit: QuantumCircuit, seed: int) -> list[tuple[QuantumCircuit, CalibrationRequest]]:
    """Build the circuits that calibrate the qubits which a transpiled circuit measures.

    The states are 0...0, 1...1, and the two patterns that alternate.

    Returns
    -------
    list of (QuantumCircuit, CalibrationRequest)
        Each with what it is run for.
    """
    qubits, states = calibration_qubits(circuit), []
    for pattern in range(4):
        prepared = [pattern >> (i % 2) & 1 for i in range(len(qubits))]  # 0000, 1010, 0101, 1111
        calibration = circuit.copy_empty_like(f"readout-{pattern}")
        calibration.global_phase = 0
        for qubit, bit in zip(qubits, prepared, strict=True):
            if bit:
                calibration.x(qubit)
        calibration.barrier()
        for i, qubit in enumerate(qubits):
            calibration.measure(qubit, i)
        request = CalibrationRequest(tuple(qubits), tuple(prepared), CALIBRATION_SHOTS, seed + pattern)
        states.append((calibration, request))
    return states


def errors_of_outcomes(outcomes: Sequence[np.ndarray], states: Sequence[Sequence[int]]) -> Tensor:
    """Compute readout errors, float64 (bits, 2, 2), from what was read in prepared states.

    Parameters
    ----------
    outcomes : sequence of ndarray, uint8, (1, S, B)
        Outcomes in each state.
    states : sequence of sequence of int
        The bits that were prepared, lowest first. Each bit has to be 0 in one state and 1 in another.
    """
    totals = torch.zeros(len(states[0]), 2, 2, dtype=torch.float64)
    for read, prepared in zip(outcomes, states, strict=True):
        value = torch.from_numpy(unpack_values(read[0]))
        for i, bit in enumerate(prepared):
            ones = (value >> i & 1).double().mean()
            totals[i, bit] += torch.stack((1 - ones, ones))
    return totals / totals.sum(-1, keepdim=True)


def _cache_path(backend: QiskitQuantumBackend, circuit: QuantumCircuit) -> Path:
    facts = backend.engine.facts()
    key = (
        # The region is that of the transpiled circuit: the same numbers are other qubits in another region.
        f"{(circuit.metadata or {}).get('region')} {calibration_qubits(circuit)}",
        f"{facts.get('device')} {facts.get('calibration')} {facts.get('noise')} {facts.get('noise_scale')}",
        f"{CALIBRATION_SHOTS}",
        # Twirled measurements misread 0 and 1 equally often, so that their errors are not those without.
        *([json.dumps(facts["options"], sort_keys=True)] if facts.get("options") else []),
    )
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:20]
    return runs_home() / ".cache" / "readout" / f"{backend.engine.name}-{digest}.json"


def _read(path: Path, bits: int) -> Tensor | None:
    """Read errors that were kept; None if there are none, or if the file is broken."""
    with suppress(OSError, ValueError, TypeError):
        errors = torch.tensor(json.loads(path.read_text()), dtype=torch.float64)
        if errors.shape == (bits, 2, 2):
            sums_to_one = bool((errors.sum(-1) - 1).abs().max() < 1e-9)
            if sums_to_one and float(errors.min()) >= 0 and float(errors.max()) <= 1:
                return errors
    return None


def keep_errors(path: Path, errors: Tensor) -> None:
    """Keep errors for the next time; if that fails, they will be measured again."""
    with suppress(OSError, StorageError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(errors.tolist()).encode())
