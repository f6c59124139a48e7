"""Readout errors: measured once for the qubits in use and the device's calibration, and undone on all rows at once.

Errors of qubits are taken to be independent, as mthree and IBM's calibration take them. mthree inverts the counts of
one circuit at a time on the outcomes that occurred; a loader's register is small and there are many rows, so here
the inverses of the qubits' 2 × 2 matrices are applied to all values of the register, which is the same (tested
against mthree) and needs no loop over rows.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from qiskit import QuantumCircuit
from torch import Tensor

from ..backends import QiskitQuantumBackend
from ..circuits import DynamicLoader
from ..circuits.base import unpack_values
from ..errors import ArgumentError, BackendUnavailable, StorageError
from ..storage import runs_home, write_atomic

CALIBRATION_SHOTS = 1 << 17
"""Of each of the prepared states: readout errors of 1 % are then known to 2 % of themselves."""


def readout_errors(backend: QiskitQuantumBackend, n: int, *, seed: int = 0) -> Tensor:
    """How the bits that rows of n keys are measured into are misread.

    The qubits are prepared in 0...0, 1...1, and the two patterns that alternate; errors of preparing them count as
    errors of reading. Measured once for a region and a device's calibration time, and kept under
    `<runs>/.cache/readout`: with a new calibration, or on other qubits, it is measured again.

    Parameters
    ----------
    backend : QiskitQuantumBackend
    n : int
    seed : int
        Of a simulator.

    Returns
    -------
    Tensor, float64, (bits, 2, 2)
        P(read column | true row) of each bit of the register.

    Raises
    ------
    BackendUnavailable
        If it cannot be measured, or if a bit says nothing.
    """
    circuit = backend.transpiled(n)
    bits = circuit.num_clbits
    if backend.engine.ideal:
        return torch.eye(2, dtype=torch.float64).expand(bits, 2, 2)
    path = _path(backend, circuit)
    errors = _read(path, bits)
    if errors is None:
        errors = _measure(backend, circuit, seed)
        _keep(path, errors)
    return checked(errors, backend.engine.name)


def checked(errors: Tensor, name: str) -> Tensor:
    """The errors (bits, 2, 2), if they can be undone; else BackendUnavailable."""
    if bool((errors[:, 0, 0] + errors[:, 1, 1] < 1.02).any()):
        raise BackendUnavailable(
            f"A bit of {name} reads nearly the same whatever its qubit is: its readout cannot be undone."
        )
    return errors


def _path(backend: QiskitQuantumBackend, circuit: QuantumCircuit) -> Path:
    facts = backend.engine.facts()
    what = (
        # The region is that of the transpiled circuit; the same numbers of qubits are others in another region.
        f"{(circuit.metadata or {}).get('region')} {_measured(circuit)}",
        f"{facts.get('device')} {facts.get('calibration')} {facts.get('noise')} {facts.get('noise_scale')}",
        f"{CALIBRATION_SHOTS}",
    )
    digest = hashlib.sha256("\n".join(what).encode()).hexdigest()[:20]
    return runs_home() / ".cache" / "readout" / f"{backend.engine.name}-{digest}.json"


def _measured(circuit: QuantumCircuit) -> list[int]:
    """The qubit that each bit of the register is measured from."""
    qubit = {
        circuit.find_bit(i.clbits[0]).index: circuit.find_bit(i.qubits[0]).index
        for i in circuit.data
        if i.operation.name == "measure"
    }
    if sorted(qubit) != list(range(circuit.num_clbits)):
        raise ArgumentError(f"{circuit.name} does not measure every bit once: its readout cannot be undone.")
    return [qubit[bit] for bit in range(circuit.num_clbits)]


def _read(path: Path, bits: int) -> Tensor | None:
    with suppress(OSError, ValueError, TypeError):  # missing or broken: measured again
        errors = torch.tensor(json.loads(path.read_text()), dtype=torch.float64)
        sums = bool((errors.sum(-1) - 1).abs().max() < 1e-9) if errors.shape == (bits, 2, 2) else False
        if sums and float(errors.min()) >= 0 and float(errors.max()) <= 1:
            return errors
    return None


def _keep(path: Path, errors: Tensor) -> None:
    with suppress(OSError, StorageError):  # a cache: it can be measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(errors.tolist()).encode())


def _measure(backend: QiskitQuantumBackend, circuit: QuantumCircuit, seed: int) -> Tensor:
    qubits = _measured(circuit)
    seen = torch.zeros(len(qubits), 2, 2, dtype=torch.float64)
    for pattern in range(4):
        bits = [pattern >> (i % 2) & 1 for i in range(len(qubits))]  # 0000, 1010, 0101, 1111
        prepare = circuit.copy_empty_like(f"readout-{pattern}")
        prepare.global_phase = 0
        for qubit, bit in zip(qubits, bits, strict=True):
            if bit:
                prepare.x(qubit)
        prepare.barrier()
        for i, qubit in enumerate(qubits):
            prepare.measure(qubit, i)
        outcomes = backend.engine.run(prepare, np.empty((1, 0)), CALIBRATION_SHOTS, seed + pattern)
        value = torch.from_numpy(unpack_values(outcomes[0]))
        for i, bit in enumerate(bits):
            ones = (value >> i & 1).double().mean()
            seen[i, bit] += torch.stack((1 - ones, ones))
    return seen / seen.sum(-1, keepdim=True)


def undo_readout(shares: Tensor, errors: Tensor, *, squared: bool = False) -> Tensor:
    """The shares of the register's values if none were misread, for circuits that measure at their end only.

    Parameters
    ----------
    shares : Tensor, float64, (R, 2^bits)
        As measured.
    errors : Tensor, (bits, 2, 2)
        From `readout_errors`.
    squared : bool
        Apply the squares of the inverse's elements, as variances need.

    Returns
    -------
    Tensor, (R, 2^bits)
        Quasi-probabilities: they sum to what shares do; some may be negative.

    Source: Bravyi, Sheldon, Kandala, McKay and Gambetta, Mitigating measurement errors in multiqubit experiments
    (2021), the tensor product model.
    """
    bits = len(errors)
    inverse = torch.linalg.inv(errors.mT)  # [bits, true, read]
    inverse = inverse.square() if squared else inverse
    x = shares.reshape(len(shares), *[2] * bits)
    for bit in range(bits):
        axis = bits - bit  # the highest bit comes first
        x = torch.tensordot(x, inverse[bit], dims=([axis], [1])).movedim(-1, axis)
    return x.reshape(len(shares), -1)


def undo_dynamic_readout(counts: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """The same for `DynamicLoader`, where a bit that is misread also chooses the next rotations.

    Given the bits read so far, the next qubit is rotated by the angle of just those bits, whatever the true ones
    were. So the share of 1 among shots with the same bits so far, corrected for that one bit's readout, is the row's
    own conditional probability: nothing but the last measurement has to be undone.

    Parameters
    ----------
    counts : Tensor, (R, 2^bits)
    errors : Tensor, (bits, 2, 2)

    Returns
    -------
    probabilities, variances : Tensor, float64, (R, 2^bits)
        The latter to first order in those of the conditional probabilities.
    """
    bits = len(errors)
    p = torch.ones(len(counts), 1, dtype=torch.float64)
    relative = torch.zeros_like(p)
    for bit in reversed(range(bits)):
        pairs = counts.double().reshape(len(counts), p.shape[-1], 2, -1).sum(-1)  # [R, prefixes, 2]
        shots = pairs.sum(-1, keepdim=True)
        gain = errors[bit, 0, 0] + errors[bit, 1, 1] - 1
        raw = torch.where(shots > 0, pairs / shots.clamp_min(1e-300), 0.5)
        wrongly = torch.stack((errors[bit, 1, 0], errors[bit, 0, 1]))  # read 0, read 1
        share = ((raw - wrongly) / gain).clamp(0, 1)
        share = share / share.sum(-1, keepdim=True)
        variance = (raw * (1 - raw)).clamp_min(0) / shots.clamp_min(1e-300) / gain**2
        relative = relative[..., None] + (variance / share.square().clamp_min(1e-300)).masked_fill(
            share == 0, 0
        )
        p = (p[..., None] * share).flatten(1)
        relative = relative.flatten(1)
    return p, p.square() * relative


def can_undo(loader: object, static: bool) -> bool:
    """Whether a circuit's readout can be undone: it measures at its end, or is `DynamicLoader`'s."""
    return static or isinstance(loader, DynamicLoader)
