"""What runs circuits: the `Engine` that a backend stands on, and the `Job` that a submission gives."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from qiskit import QuantumCircuit

from .counts import RowCounts
from .exact import Noise
from .ibm.ledger import JobStatus


class Engine(Protocol):
    """A simulator or a device that runs one circuit with many bindings.

    Making one asks nothing of a network. Its methods raise `BackendUnavailable` where it cannot be reached.
    An engine that queues jobs also has `submit(circuit, bindings, shots, request) -> Job`, where `request` is the
    `RowRequest` that turns outcomes into counts, now or after a restart.
    """

    name: str
    """Of the device: "aer", "fake_fez", "ibm_fez"."""
    ideal: bool
    """Whether it runs circuits without noise."""

    def identity(self) -> str:
        """What a transpiled circuit holds for, besides the circuit: device, calibration, options; a key of the cache."""
        ...

    def facts(self) -> dict[str, Any]:
        """For diagnostics: `device`, `calibration` (ISO time or None), `noise`, `num_qubits` (None: unlimited) and more."""
        ...

    def problems(self) -> tuple[str, ...]:
        """Sentences on why nothing can be run now: no account, no network, no such device, under maintenance."""
        ...

    def pending_jobs(self) -> int:
        """Jobs in the device's queue."""
        ...

    def transpile(self, circuit: QuantumCircuit, level: int) -> QuantumCircuit:
        """The circuit in the device's gates, on its qubits; level 0 to 3.

        Raises
        ------
        BackendUnavailable
            If it needs more qubits than there are, or what the device does not have.
        """
        ...

    def errors(self, circuit: QuantumCircuit) -> list[float]:
        """The calibrated error of each gate and measurement of a transpiled circuit; see `instruction_errors`."""
        ...

    def calibrated(self, circuit: QuantumCircuit) -> tuple[QuantumCircuit, Noise]:
        """A transpiled circuit, of a device on the qubits that it uses, and their noise by the calibration."""
        ...

    def run(self, circuit: QuantumCircuit, bindings: np.ndarray, shots: int, seed: int) -> np.ndarray:
        """Measure each binding of a transpiled circuit.

        Parameters
        ----------
        circuit : QuantumCircuit
            From `transpile`.
        bindings : ndarray, (R, P), float64
            In the order of `circuit.parameters`.
        shots : int
            Per row.
        seed : int
            Of simulators: the same seed gives the same outcomes on any number of threads.

        Returns
        -------
        ndarray, uint8, (R, shots, B)
            Bits of the register `c`, packed as in `qiskit.primitives.BitArray.array`. Shots of a row are independent.
        """
        ...


class Job(Protocol):
    """Rows on their way: what `submit_rows` gives at once."""

    @property
    def tag(self) -> str:
        """Unique, known before the submission."""
        ...

    def status(self) -> JobStatus:
        """Where it is."""
        ...

    def counts(self, timeout: float | None = None) -> RowCounts:
        """Wait for the result, at most `timeout` seconds.

        Raises
        ------
        BackendUnavailable, JobTimeout
            If it failed or was cancelled; if it took longer.
        """
        ...

    def cancel(self) -> None:
        """Cancel what has not ended."""
        ...
