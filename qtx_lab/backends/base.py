"""What runs circuits (`Engine`), and the state of a job that was submitted to one (`JobStatus`, `RowJob`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
from qiskit import QuantumCircuit

from ..circuits.resources import resources
from ..errors import ArgumentError
from .costs import Bill, Cost, RowPlan, RunCost
from .counts import RowCounts
from .exact import Noise
from .requests import PlannedRun, Request


class JobState(StrEnum):
    """The stages of a job, in their order."""

    RECORDED = "recorded"
    """Written down here; no job with its tag was seen on the server."""
    SUBMITTED = "submitted"
    """Accepted by the server, which was not asked about it since."""
    QUEUED = "queued"
    """Waiting for the device."""
    RUNNING = "running"
    """Being run."""
    DONE = "done"
    """Ended; its results can be fetched."""
    FAILED = "failed"
    """Ended without results, or refused."""
    CANCELLED = "cancelled"
    """Ended by a request to cancel it."""
    GONE = "gone"
    """Deleted from the server, or never of this account; its results cannot be fetched."""

    @property
    def ended(self) -> bool:
        """Whether the state can no longer change."""
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED, JobState.GONE)


@dataclass(frozen=True)
class JobStatus:
    """Where a job is.

    Parameters
    ----------
    state : JobState
        Its stage.
    position : int or None
        Place in the queue, 1 for the next job, where the server tells it.
    reason : str or None
        Why the job failed, or what is unusual about it.
    pending : int or None
        Number of jobs that wait for the device, where the server tells no place.
    charged_seconds : float or None
        Quantum time that was charged for a job that has ended, where the server tells it.

    Examples
    --------
    >>> print(JobStatus(JobState.QUEUED, position=3))
    queued, place 3
    """

    state: JobState
    position: int | None = None
    reason: str | None = None
    pending: int | None = None
    charged_seconds: float | None = None

    def __str__(self) -> str:
        place = f", place {self.position}" if self.position is not None else ""
        place = place or (f", {self.pending} pending on the device" if self.pending is not None else "")
        return f"{self.state}{place}" + (f": {self.reason}" if self.reason else "")


def combined_status(statuses: Sequence[JobStatus], things: str) -> JobStatus:
    """Status of what has several parts.

    It is failed, gone or cancelled as soon as one part is, and else what the part furthest behind is. Where
    parts differ, the reason says how many of them were measured.

    Parameters
    ----------
    statuses : sequence of JobStatus
        Those of the parts, at least one.
    things : str
        What the parts are called.

    Examples
    --------
    >>> print(combined_status([JobStatus(JobState.DONE), JobStatus(JobState.QUEUED)], "parts"))
    queued: 1 of 2 parts are measured
    """
    states = [status.state for status in statuses]
    order = (JobState.FAILED, JobState.GONE, JobState.CANCELLED, *JobState)
    state = next(state for state in order if state in states)
    reasons = list(dict.fromkeys(status.reason for status in statuses if status.reason))
    measured = states.count(JobState.DONE)
    if measured and state != JobState.DONE:
        reasons.append(f"{measured} of {len(states)} {things} are measured")
    return JobStatus(state, reason="; ".join(reasons) or None)


class RowJob(Protocol):
    """Rows that are being measured: what `submit_rows` returns at once."""

    @property
    def tag(self) -> str:
        """Unique name of the job, known before it is submitted."""
        ...

    def status(self) -> JobStatus:
        """Where the job is now."""
        ...

    def counts(self, timeout: float | None = None) -> RowCounts:
        """Wait for the result, at most `timeout` seconds.

        Raises
        ------
        BackendUnavailable
            If the job failed or was cancelled.
        JobTimeout
            If it is not done in time. It goes on.
        """
        ...

    def cancel(self) -> object:
        """Cancel the job; on a device, return a `Cancellation`, which says what was cancelled.

        Raises
        ------
        BackendUnavailable
            If it has ended.
        """
        ...


class Engine(ABC):
    """A simulator or a device that runs one circuit with many bindings.

    Making an engine uses no network. Its methods raise `BackendUnavailable` where a device cannot be reached.

    A new engine has to define `name`, `ideal` and the abstract methods. What else an engine may be able to do
    stands here too, with the answer of an engine that cannot.
    """

    name: str
    """The device's name: "aer", "fake_fez", "ibm_fez"."""
    ideal: bool
    """Whether circuits are run without noise."""
    queues: bool = False
    """Whether circuits are handed over as jobs that outlive this process, by `submit`."""

    @abstractmethod
    def identity(self) -> str:
        """Everything besides the circuit that decides how it is transpiled: device, calibration, options.

        It is part of the key under which transpiled circuits are cached.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Diagnostics of the device.

        Returns
        -------
        dict
            `device`, `calibration` (ISO time or None), `noise`, `num_qubits` (None where it is unlimited) and
            what else the engine knows.
        """

    @abstractmethod
    def transpile(self, circuit: QuantumCircuit, level: int) -> QuantumCircuit:
        """The circuit in the device's gates and on its qubits.

        Parameters
        ----------
        circuit : QuantumCircuit
            Measured into one register `c`.
        level : int
            Optimisation level, 0 to 3.

        Raises
        ------
        BackendUnavailable
            If the circuit needs more qubits, or other instructions, than the device has.
        """

    @abstractmethod
    def errors(self, circuit: QuantumCircuit) -> list[float]:
        """Calibrated error of each gate and measurement of a transpiled circuit; see `instruction_errors`."""

    @abstractmethod
    def calibrated(self, circuit: QuantumCircuit) -> tuple[QuantumCircuit, Noise]:
        """A transpiled circuit on the qubits that it uses, and their noise according to the calibration."""

    @abstractmethod
    def run(
        self,
        circuit: QuantumCircuit,
        bindings: np.ndarray,
        shots: int,
        seed: int,
        request: Request | None = None,
    ) -> np.ndarray:
        """Measure a transpiled circuit with each of the bindings, and wait for the outcomes.

        Parameters
        ----------
        circuit : QuantumCircuit
            As `transpile` returns it.
        bindings : ndarray, float64, (R, P)
            Values of `circuit.parameters`, in their order; angles in radians.
        shots : int
            Shots of each row.
        seed : int
            Seed of a simulation: the same seed gives the same outcomes on any number of threads.
        request : Request, optional
            What the circuit is run for. An engine that queues jobs writes it into the job's record.

        Returns
        -------
        ndarray, uint8, (R, shots, B)
            Bits of the register `c`, packed as in `qiskit.primitives.BitArray.array`. Shots of a row are
            independent.
        """

    def refresh(self, max_age: float = 0.0) -> bool:
        """Look at the device's calibration again, if it was read longer than `max_age` seconds ago.

        After a new one, `identity`, `facts`, `errors` and `transpile` are those of the new calibration. A
        simulator has nothing to read again: by default this does nothing.

        Returns
        -------
        bool
            Whether there is a new calibration.

        Raises
        ------
        BackendUnavailable
            If the device cannot be asked.
        """
        return False

    def how(self, circuit: QuantumCircuit) -> dict[str, Any]:
        """Diagnostics of how `run` treats a transpiled circuit, as `method`; empty by default."""
        return {}

    def problems(self) -> tuple[str, ...]:
        """Sentences that say why nothing can be run now: no account, no network; none by default."""
        return ()

    def pending_jobs(self) -> int:
        """Number of jobs in the device's queue; 0 by default."""
        return 0

    def cost(self, runs: Sequence[PlannedRun]) -> Cost:
        """What it would take to run some circuits; no quantum time by default."""
        sizes = [(run, resources(run.circuit)) for run in runs]
        return Cost(
            tuple(
                RunCost(run.purpose, run.rows, run.shots, 0, 0.0, x.qubits, x.depth, x.two_qubit_gates)
                for run, x in sizes
            ),
            "nothing: a simulator takes no quantum time",
        )

    def reserved(self, runs: Sequence[PlannedRun], confirm: Any = None) -> AbstractContextManager[object]:
        """Give a call that runs several circuits leave for all of them, or refuse it before the first.

        A call enters this before its first run, and calls `run` inside. By default everything is allowed.

        Parameters
        ----------
        runs : sequence of PlannedRun
            All that the call is known to run; none if it does not know. What it runs beyond this is added up.
        confirm : bool or callable, optional
            For this call, in place of the engine's: True allows it, whatever limit it exceeds.

        Raises
        ------
        CostError
            If all runs together cost more than is allowed.
        """
        return nullcontext()

    def plan(self, runs: Sequence[PlannedRun], shots: int, planned_on: Engine | None = None) -> RowPlan:
        """What a call that runs these circuits would send and cost; nothing is sent.

        Parameters
        ----------
        runs : sequence of PlannedRun
        shots : int
            Shots of each row.
        planned_on : Engine, optional
            The engine that transpiled the circuits and estimates their cost, where it is another one.
        """
        engine = planned_on or self
        return RowPlan(self.name, engine.name, engine.cost(runs), shots)

    def bill(self, *, ask: bool = True) -> Bill:
        """What was sent to devices and what it cost; nothing by default.

        Parameters
        ----------
        ask : bool
            Whether the server is asked what it charged for jobs that have ended since.
        """
        return Bill()

    def submit(
        self,
        circuit: QuantumCircuit,
        bindings: np.ndarray,
        shots: int,
        request: Request | None = None,
        **options: Any,
    ) -> RowJob:
        """Hand over what `run` takes as a job, without waiting; for engines with `queues` only.

        Parameters
        ----------
        circuit, bindings, shots, request
            As for `run`. A `RowRequest` turns outcomes into counts, now or after a restart.
        **options
            Options of this submission that the engine has.

        Raises
        ------
        ArgumentError
            If the engine does not queue jobs.
        """
        raise ArgumentError(f"{self.name} queues no jobs: call `run`, which waits for the outcomes.")

    def jobs(self) -> Sequence[RowJob]:
        """The recorded jobs of this device, newest first; none by default."""
        return ()
