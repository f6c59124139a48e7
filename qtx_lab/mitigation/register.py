"""The classical register of a loader's circuit: counts and probabilities of its values, and their keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from qiskit import QuantumCircuit
from torch import Tensor

from ..backends import QiskitQuantumBackend
from ..backends.counts import rows_at_once
from ..backends.exact import compile_steps, outcome_probabilities
from ..backends.requests import MitigatedRowRequest
from ..circuits import Loader
from ..circuits.base import pack_values, unpack_values
from ..errors import BackendUnavailable

MAX_BITS = 16
"""Most bits of a register whose counts are held for all its values, for every row."""


@dataclass(frozen=True, eq=False)
class RegisterEstimate:
    """Estimated probabilities of the register's values.

    Parameters
    ----------
    value : Tensor, float64, (R, 2^bits)
        Estimates that sum to 1; some may be negative.
    variance : Tensor, float64, (R, 2^bits)
        Variance of each estimate over repetitions of the shots.
    """

    value: Tensor
    variance: Tensor


def register_counts(
    backend: QiskitQuantumBackend,
    circuit: QuantumCircuit,
    bindings: np.ndarray,
    shots: int,
    seed: int,
    request: MitigatedRowRequest | None = None,
) -> Tensor:
    """Run a circuit, and count how often the register has each value.

    Parameters
    ----------
    backend : QiskitQuantumBackend
    circuit : QuantumCircuit
        A transpiled circuit of the backend.
    bindings : ndarray, (R, P)
        Angles of each row, in radians.
    shots : int
        Shots of each row.
    seed : int
        Seed of a simulation.
    request : MitigatedRowRequest, optional
        What the circuit is run for, with the R rows that are run. A device keeps it in the record of its job.

    Returns
    -------
    Tensor, int64, (R, 2^bits)
    """
    step = rows_at_once(shots)
    parts = []
    for start in range(0, len(bindings), step):
        block = slice(start, start + step)
        block_request = request and replace(request, rows=replace(request.rows, p=request.rows.p[block]))
        outcomes = backend.engine.run(circuit, bindings[block], shots, seed + start, block_request)
        parts.append(count_values(outcomes, shots, circuit.num_clbits))
    return torch.cat(parts)


def count_values(outcomes: np.ndarray, shots: int, bits: int) -> Tensor:
    """Count how often the register had each value: int64 (R, 2^bits).

    Parameters
    ----------
    outcomes : ndarray, uint8, (R, S, B)
        Packed bits. Shots beyond `shots` are left out: devices may round them up.
    shots : int
        Shots of each row.
    bits : int
        Bits of the register.
    """
    step, parts = rows_at_once(shots), []
    for start in range(0, len(outcomes), step):
        values = torch.from_numpy(unpack_values(outcomes[start : start + step, :shots]))
        counts = torch.zeros(len(values), 1 << bits, dtype=torch.int64)
        parts.append(counts.scatter_add_(-1, values, torch.ones_like(values)))
    return torch.cat(parts)


def register_probabilities(backend: QiskitQuantumBackend, p: Tensor) -> Tensor:
    """Compute how probable each value of the register is, by the calibration that the device reports.

    Parameters
    ----------
    backend : QiskitQuantumBackend
    p : Tensor, float64, (R, n)
        Rows that `check_rows` returned, each with a key of probability above 0.

    Returns
    -------
    Tensor, float64, (R, 2^bits)

    Raises
    ------
    BackendUnavailable
        If the circuit is too large to be simulated exactly.
    """
    n = p.shape[-1]
    circuit = backend.transpiled(n)
    steps = compile_steps(*backend.engine.calibrated(circuit))
    if steps is None:
        raise BackendUnavailable(f"{circuit.name} for {n} keys is too large to be simulated with its noise.")
    probabilities, values = outcome_probabilities(steps, backend.loader.angles(p))
    out = torch.zeros(len(p), 1 << circuit.num_clbits, dtype=torch.float64)
    out[:, torch.from_numpy(values)] = probabilities
    return out / out.sum(-1, keepdim=True)


@dataclass(frozen=True)
class LoaderRegister:
    """The register of a loader's circuit for rows of n keys: how its values are read.

    Parameters
    ----------
    loader : Loader
    bits : int
        Bits of the register.
    n : int
        Number of keys.
    """

    loader: Loader
    bits: int
    n: int

    @classmethod
    def of(cls, backend: QiskitQuantumBackend, n: int) -> LoaderRegister:
        """That of the circuit which a backend runs for rows of n keys."""
        return cls(backend.loader, backend.transpiled(n).num_clbits, n)

    @property
    def keys(self) -> Tensor:
        """Key of each value, int64, (2^bits,); -1 for no key."""
        return torch.from_numpy(self.loader.keys(self._values, self.n))

    @property
    def signs(self) -> Tensor:
        """Sign with which a shot of each value is counted, int64, (2^bits,)."""
        return torch.from_numpy(self.loader.signs(self._values, self.n))

    @property
    def _values(self) -> np.ndarray:
        return pack_values(np.arange(1 << self.bits), self.bits)


def register_keys(backend: QiskitQuantumBackend, n: int) -> Tensor:
    """Return the key of each value of the register, int64, (2^bits,), for rows of n keys; -1 for no key."""
    return LoaderRegister.of(backend, n).keys
