"""What calls cost: a call's estimate (`Cost`), a dry run of rows (`RowPlan`), what was sent (`Bill`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RunCost:
    """What one circuit with all its bindings takes.

    Parameters
    ----------
    purpose : str
        What it is run for: "rows", "readout calibration", "noise level 3".
    circuits, shots : int
        Number of bound circuits, and the shots of each.
    jobs : int
        Number of jobs that it is split into.
    quantum_seconds : float
        Estimated time on the device that IBM would bill, without queueing.
    qubits, depth, two_qubit_gates : int
        Those of the transpiled circuit; of qubits only those in use.
    shot_seconds : float
        How long a shot of the circuit lasts, from the first gate to the last measured bit; 0 on simulators.
    """

    purpose: str
    circuits: int
    shots: int
    jobs: int
    quantum_seconds: float
    qubits: int = 0
    depth: int = 0
    two_qubit_gates: int = 0
    shot_seconds: float = 0.0

    @property
    def executions(self) -> int:
        """Bound circuits times shots."""
        return self.circuits * self.shots


@dataclass(frozen=True)
class Cost:
    """What a call would take: all rows, noise levels and calibrations together.

    Parameters
    ----------
    runs : tuple of RunCost
        What would be run, in its order.
    estimated_by : str
        How the quantum time was estimated.
    exceeds : tuple of str
        Why a confirmation is asked for: a sentence for each limit that the call is above.
    """

    runs: tuple[RunCost, ...]
    estimated_by: str = ""
    exceeds: tuple[str, ...] = ()

    @property
    def quantum_seconds(self) -> float:
        """Estimated time on the device that IBM would bill, in seconds, without queueing."""
        return sum(run.quantum_seconds for run in self.runs)

    @property
    def circuits(self) -> int:
        """Number of bound circuits."""
        return sum(run.circuits for run in self.runs)

    @property
    def shots(self) -> int:
        """Shots of a circuit; the most of any."""
        return max((run.shots for run in self.runs), default=0)

    @property
    def executions(self) -> int:
        """Shots of all bound circuits together."""
        return sum(run.executions for run in self.runs)

    @property
    def jobs(self) -> int:
        """Number of jobs."""
        return sum(run.jobs for run in self.runs)

    def seconds_by_purpose(self) -> dict[str, float]:
        """Estimated quantum seconds of each purpose."""
        seconds: dict[str, float] = {}
        for run in self.runs:
            seconds[run.purpose] = seconds.get(run.purpose, 0.0) + run.quantum_seconds
        return seconds

    def __str__(self) -> str:
        split = f" in {self.jobs} jobs" if self.jobs > 1 else ""
        size = f"{self.circuits:,} circuits"
        if len({run.shots for run in self.runs}) == 1:
            size += f" × {self.shots:,} shots"
        by_purpose = self.seconds_by_purpose()
        parts = ", ".join(f"{purpose} {seconds:.0f} s" for purpose, seconds in by_purpose.items())
        return (
            f"{size} = {self.executions:,} executions{split}, about {self.quantum_seconds:.0f} s of quantum "
            f"time{f' ({parts})' if len(by_purpose) > 1 else ''}"
        )


@dataclass(frozen=True, repr=False)
class RowPlan:
    """What a call that measures rows would send and cost. Nothing was sent to make it.

    Parameters
    ----------
    device : str
        The device, or the simulator.
    planned_on : str
        What the circuits were transpiled for: the device's present target, a saved one, or a twin.
    cost : Cost
        All that the call would run, with the estimated quantum time and how it was estimated.
    shots : int
        Shots of each row.
    price : float or None
        Price of the quantum time, in the currency of the `price_per_second` that was given.
    max_quantum_seconds : float or None
        The limit of a call; None where there is none.
    budget : str or None
        The budget, as it was given.
    budget_left : float or None
        Seconds of the budget that are left before the call; None where there is none.
    problems : tuple of str
        Why the call would be refused now, without a confirmation: a sentence for each reason.
    """

    device: str
    planned_on: str
    cost: Cost
    shots: int
    price: float | None = None
    max_quantum_seconds: float | None = None
    budget: str | None = None
    budget_left: float | None = None
    problems: tuple[str, ...] = ()

    @property
    def circuits(self) -> int:
        """Number of bound circuits, of all noise levels and calibrations together."""
        return self.cost.circuits

    @property
    def executions(self) -> int:
        """Shots of all bound circuits together."""
        return self.cost.executions

    @property
    def jobs(self) -> int:
        """Number of jobs."""
        return self.cost.jobs

    @property
    def quantum_seconds(self) -> float:
        """Estimated time on the device that IBM would bill, in seconds."""
        return self.cost.quantum_seconds

    @property
    def estimated_by(self) -> str:
        """How the quantum time was estimated."""
        return self.cost.estimated_by

    @property
    def qubits(self) -> int:
        """Qubits of the widest circuit."""
        return max((run.qubits for run in self.cost.runs), default=0)

    @property
    def depth(self) -> int:
        """Depth of the deepest circuit, as it is transpiled."""
        return max((run.depth for run in self.cost.runs), default=0)

    @property
    def two_qubit_gates(self) -> int:
        """Two-qubit gates of the circuit that has most of them."""
        return max((run.two_qubit_gates for run in self.cost.runs), default=0)

    def __repr__(self) -> str:
        lines = [
            f"Plan for {self.device}, transpiled for {self.planned_on}; nothing was sent.",
            *_table(
                ["run", "circuits", "shots", "jobs", "qubits", "depth", "2q gates", "shot µs", "quantum s"],
                [
                    [
                        run.purpose,
                        *(
                            f"{x:,}"
                            for x in (
                                run.circuits,
                                run.shots,
                                run.jobs,
                                run.qubits,
                                run.depth,
                                run.two_qubit_gates,
                            )
                        ),
                        f"{1e6 * run.shot_seconds:.1f}",
                        f"{run.quantum_seconds:.1f}",
                    ]
                    for run in self.cost.runs
                ],
            ),
            f"In all {self.cost}.",
        ]
        lines += [f"Estimated by {self.estimated_by}."] if self.estimated_by else []
        lines += [f"Price: {self.price:,.2f}."] if self.price is not None else []
        if self.max_quantum_seconds is not None:
            lines.append(f"Limit of a call: max_quantum_seconds={self.max_quantum_seconds:g}.")
        if self.budget_left is not None:
            lines.append(
                f"Budget {self.budget}: {in_seconds(self.budget_left)} are left, "
                f"{in_seconds(max(0.0, self.budget_left - self.quantum_seconds))} after this call."
            )
        lines += [f"It would be refused now: {problem}" for problem in self.problems]
        return "\n".join(lines)


@dataclass(frozen=True)
class BilledJob:
    """What a recorded job was estimated to take, and what it was charged.

    Parameters
    ----------
    tag, device, state : str
        Of the job.
    purpose : str
        What it ran: "rows", "mitigated-rows", "calibration" or "circuits".
    estimated_seconds : float
        Estimated quantum time; 0 for jobs that were never submitted.
    charged_seconds : float
        What IBM charged, as far as it has told it.
    open_seconds : float
        Estimates of the parts for which it has not told it.
    settled : bool
        Whether it has told it of all parts.
    """

    tag: str
    device: str
    state: str
    purpose: str
    estimated_seconds: float
    charged_seconds: float
    open_seconds: float
    settled: bool

    @property
    def seconds(self) -> float:
        """What was charged and, where that is not known, estimated."""
        return self.charged_seconds + self.open_seconds


@dataclass(frozen=True, repr=False)
class Bill:
    """What was sent to devices, and what it cost.

    Parameters
    ----------
    jobs : tuple of BilledJob
        Recorded jobs, the newest first.
    price_per_second : float or None
        Price of a second of quantum time.
    budget : str or None
        The budget, as it was given.
    budget_left : float or None
        Seconds of the budget that are left; None where there is none.
    """

    jobs: tuple[BilledJob, ...] = ()
    price_per_second: float | None = None
    budget: str | None = None
    budget_left: float | None = None

    @property
    def charged_seconds(self) -> float:
        """What IBM charged for the jobs whose charges it has reported."""
        return sum(job.charged_seconds for job in self.jobs)

    @property
    def open_seconds(self) -> float:
        """Estimates for the jobs whose charges IBM has not reported yet."""
        return sum(job.open_seconds for job in self.jobs)

    @property
    def price(self) -> float | None:
        """Price of what was charged and of what is open; None without a price per second."""
        if self.price_per_second is None:
            return None
        return (self.charged_seconds + self.open_seconds) * self.price_per_second

    def __repr__(self) -> str:
        if not self.jobs:
            lines = ["Nothing was sent to a device."]
        else:
            rows = [
                [
                    job.tag,
                    job.device,
                    job.purpose,
                    job.state,
                    f"{job.estimated_seconds:.1f}",
                    f"{job.charged_seconds:.1f}" if job.settled else "not known",
                ]
                for job in self.jobs
            ]
            lines = [
                *_table(["job", "device", "ran", "state", "estimated s", "charged s"], rows),
                f"Charged {self.charged_seconds:.1f} s of quantum time; {self.open_seconds:.1f} s more are "
                "estimated for jobs whose charge is not known.",
            ]
        lines += [f"Price: {self.price:,.2f}."] if self.price is not None else []
        if self.budget_left is not None:
            lines.append(f"Budget {self.budget}: {in_seconds(self.budget_left)} are left.")
        return "\n".join(lines)


def in_seconds(left: float) -> str:
    """Write what is left of a budget: whole seconds, and three digits where it is short.

    >>> in_seconds(3600.0), in_seconds(0.25)
    ('3600 s', '0.25 s')
    """
    return f"{left:.0f} s" if left >= 100 else f"{left:.3g} s"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, its columns as wide as they need."""
    table = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
