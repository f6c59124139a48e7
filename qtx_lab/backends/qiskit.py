"""`QiskitQuantumBackend`: rows of probabilities in, counts of measured keys out, wherever circuits run."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from copy import copy
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable
from uuid import UUID, uuid4

import qiskit
import torch
from qiskit import QuantumCircuit, qpy
from qiskit.circuit import Parameter
from qiskit.transpiler import Target
from torch import Tensor

from .. import __version__
from ..checks import check_count, check_flags, check_generator, check_number
from ..circuits import Loader, check_rows, make_loader
from ..circuits.base import in_one_register
from ..circuits.resources import resources
from ..errors import ArgumentError, BackendUnavailable, DtypeError, JobTimeout, StorageError, unknown_name
from ..storage import runs_home, write_atomic
from .aer import AerEngine
from .base import Engine, JobState, JobStatus, RowJob
from .costs import Bill, RowPlan
from .counts import MAX_OUTCOME_BYTES, RowCounts
from .ibm.budget import Confirm, check_confirm
from .ibm.engine import IBMEngine
from .ibm.submission import check_waiting
from .ibm.target import TargetEngine
from .noise import fake_devices
from .noise_sources import NoiseSource
from .requests import PlannedRun, RowRequest

if TYPE_CHECKING:
    from qiskit_ibm_runtime import QiskitRuntimeService

PROVIDERS = ("aer", "ibm", "ibm-q")

MAX_SHOTS_PER_ROW = 4 * MAX_OUTCOME_BYTES
"""The outcomes of a row, of at least a byte each, are in memory together."""


@runtime_checkable
class PlannedMitigation(Protocol):
    """A mitigation that can say what it is going to run."""

    def planned_runs(self, backend: QiskitQuantumBackend, p: Tensor, shots: int) -> list[PlannedRun]:
        """All that `sample_rows` with these rows, of which each has mass, and this budget would run."""
        ...


class QiskitQuantumBackend:
    """Measures keys of rows with circuits: on a simulator, on the twin of a device, or on a device.

    One circuit serves all rows of a size. It is transpiled once for each (loader, size, device and
    calibration, level), kept in memory and under `<runs>/.cache/circuits`, and run with an array of bindings.

    Loading a row that is known into a circuit has no advantage over drawing from it on a classical computer.
    So every result also has that draw (`RowCounts.classical`).

    Parameters
    ----------
    provider : {"aer", "ibm", "ibm-q"}
        "aer": simulators on this machine. "ibm", or "ibm-q": IBM's devices, through qiskit-ibm-runtime.
    backend_name : str, optional
        With "aer": None or "aer" for a simulator, or a name in `fake_devices()` for the twin of that device,
        which has its calibrated noise; see `AerEngine`. With "ibm": the device's name, as "ibm_fez".
    shots : int
        Shots of each row, unless a call says otherwise.
    optimization_level : int
        Optimisation level of the transpiler, 0 to 3.
    loader : str or Loader
        How a row becomes a circuit: a name in `qtx_lab.circuits.LOADERS`, or a loader of your own.
    noise : SimulatorNoise, NoiseModel, path or BackendProperties, optional
        "aer" only: noise of the simulator, as `ParametricNoise`, `ThermalNoise`, an Aer `NoiseModel` or a
        device's calibration; see `AerEngine`. Not together with a twin. The `dynamic` loader has no two-qubit
        gates: only errors of one-qubit gates and readout act on it.
    noise_scale : float
        "aer" only: factor on all error probabilities, and on 1/T1 and 1/T2; 0 is no noise.
    feed_forward_latency : float or "typical", optional
        "aer" only: seconds from a measurement to a gate that depends on its bit; qubits that wait then
        decohere. Where None, waiting costs nothing, and diagnostics say so; see `AerEngine`.
    idling : bool
        "aer" only: whether qubits that wait for the gates of others decohere, in all circuits.
    method : {"auto", "aer"}
        "aer" only: compute exact probabilities where that fits, or simulate every shot with `AerSimulator`.
    service : QiskitRuntimeService, optional
        "ibm" only: a service that is logged in. Where None, the account in the environment (QISKIT_IBM_TOKEN,
        QISKIT_IBM_INSTANCE) or on disk is used.
    instance, region : str, optional
        "ibm" only: the instance, by CRN or name; the region, us-east or eu-de, of an instance that is chosen
        for you.
    mode : {"job", "batch", "session"}
        "ibm" only: how jobs are run: each separately, or all in one Batch or Session.
    fractional_gates : bool
        "ibm" only: transpile to rx and rzz too.
    twirling, dynamical_decoupling : mapping, optional
        "ibm" only: options of IBM's Sampler by these names.
    account : str, optional
        "ibm" only: name of a saved account. Where None, the account in the environment, or else the default
        one on disk.
    plans_preference, instance_tags : sequence of str, optional
        "ibm" only: of an instance that is chosen for you: names of plans, as "open", the most preferred
        first; tags that it must have.
    max_quantum_seconds : float
        "ibm" only: a call that is estimated to take longer needs `confirm`. All that it sends counts: rows,
        noise levels, and calibrations of the readout.
    budget : str or float, optional
        "ibm" only: quantum time that all jobs recorded in the folder of runs may take, in any process:
        seconds, or a text as "10 min" or "10 min per 28 days", which is what IBM's Open Plan gives. A call
        for which too little is left is refused before anything of it is sent.
    confirm : bool or callable
        "ibm" only: a function is called with the `Cost` of a call that exceeds the limit or the budget, and
        returns True to send it. True allows calls above `max_quantum_seconds`, but none above the budget.
    run_dir : path, optional
        "ibm" only: folder of the run that gets the jobs' records; where None, the folder of all runs.
    patience : float
        "ibm" only: seconds to wait at most while IBM takes no more jobs, because of its limits of requests
        and of pending jobs, or gives no answer.

    Raises
    ------
    ArgumentError
        If a name is unknown, a number is out of its bounds, or an option is given that belongs to the other
        provider. The network is not used before a circuit is run.
    DtypeError
        If `backend_name` is no name.

    Examples
    --------
    >>> import torch
    >>> backend = QiskitQuantumBackend("aer", shots=1000)
    >>> g = torch.Generator().manual_seed(0)
    >>> result = backend.sample_rows(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]), generator=g)
    >>> result.counts.sum(-1)
    tensor([1000, 1000])
    >>> int(result.counts[0, 2]), int(result.counts[1, 2])
    (0, 1000)
    """

    def __init__(
        self,
        provider: str = "aer",
        backend_name: str | None = None,
        shots: int = 1024,
        optimization_level: int = 3,
        *,
        loader: str | Loader = "dynamic",
        noise: NoiseSource | None = None,
        noise_scale: float = 1.0,
        method: Literal["auto", "aer"] = "auto",
        feed_forward_latency: float | Literal["typical"] | None = None,
        idling: bool = False,
        service: QiskitRuntimeService | None = None,
        instance: str | None = None,
        region: str | None = None,
        mode: Literal["job", "batch", "session"] = "job",
        fractional_gates: bool = False,
        twirling: Mapping[str, Any] | None = None,
        dynamical_decoupling: Mapping[str, Any] | None = None,
        account: str | None = None,
        plans_preference: Sequence[str] | None = None,
        instance_tags: Sequence[str] | None = None,
        max_quantum_seconds: float = 60.0,
        budget: str | float | None = None,
        confirm: Confirm = False,
        run_dir: str | Path | None = None,
        patience: float = 600.0,
    ):
        if provider not in PROVIDERS:
            raise unknown_name("provider", provider, PROVIDERS)
        if backend_name is not None and not isinstance(backend_name, str):
            raise DtypeError(f"backend_name is a {type(backend_name).__name__}; it must be a name or None.")
        shots = check_count("shots", shots)
        optimization_level = check_count("optimization_level", optimization_level, 0, 3)
        check_flags(fractional_gates=fractional_gates)
        self.provider = "aer" if provider == "aer" else "ibm"
        self.backend_name, self.shots, self.optimization_level = backend_name, shots, optimization_level
        self.loader = make_loader(loader)
        for_aer: dict[str, Any] = {"noise": noise, "noise_scale": noise_scale, "method": method}
        for_aer |= {"feed_forward_latency": feed_forward_latency, "idling": idling}
        for_ibm: dict[str, Any] = {
            "service": service,
            "instance": instance,
            "region": region,
            "mode": mode,
            "fractional_gates": fractional_gates,
            "twirling": twirling,
            "dynamical_decoupling": dynamical_decoupling,
            "account": account,
            "plans_preference": plans_preference,
            "instance_tags": instance_tags,
            "max_quantum_seconds": max_quantum_seconds,
            "budget": budget,
            "confirm": confirm,
            "run_dir": run_dir,
            "patience": patience,
        }
        self.engine: Engine
        if self.provider == "aer":
            _refuse_options(for_ibm, provider, for_aer)
            self.engine = AerEngine(backend_name, **for_aer)
        else:
            if backend_name is None:
                raise ArgumentError(
                    "backend_name=None is not allowed with IBM's devices: name one, as 'ibm_fez'."
                )
            _refuse_options(for_aer, provider, for_ibm)
            self.engine = IBMEngine(backend_name, **for_ibm)
        self._circuits: dict[tuple[object, ...], QuantumCircuit] = {}
        self._cache_problems: tuple[str, ...] = ()
        self._threads: ThreadPoolExecutor | None = None

    def __repr__(self) -> str:
        return f"QiskitQuantumBackend({self.provider!r}, {self.backend_name!r}, loader={self.loader.name!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_threads": None}  # each process, and each copy, starts its own

    def with_loader(self, loader: Loader) -> QiskitQuantumBackend:
        """The same backend, on the same engine, with another loader."""
        return self._with(loader=loader)

    def with_engine(self, engine: Engine) -> QiskitQuantumBackend:
        """The same backend, with the same loader, on another engine."""
        return self._with(engine=engine)

    def _with(self, **parts: Any) -> QiskitQuantumBackend:
        """A copy with other attributes, and the circuits, whose keys say what they were transpiled for."""
        other = copy(self)
        vars(other).update(parts, _circuits=dict(self._circuits))
        return other

    def sample_rows(
        self, p: Tensor, shots: int | None = None, *, generator: torch.Generator | None = None
    ) -> RowCounts:
        """Measure rows, and wait for the result.

        Parameters
        ----------
        p : Tensor, (R, n)
            Probabilities. A row of all zeros, where everything is masked, is not run and has no counts.
        shots : int, optional
            Shots of each row; those of the backend where None.
        generator : torch.Generator, optional
            The only source of randomness of a simulator and of the classical baseline.

        Returns
        -------
        RowCounts
            With the classical baseline beside the counts.

        Raises
        ------
        ArgumentError, ShapeError, DtypeError
            Before any work: if the rows are no probabilities (see `check_rows`), or shots is below 1.
        BackendUnavailable
            If the device cannot be reached, or cannot run the circuit.
        """
        if self.engine.queues:
            return self.submit_rows(p, shots, generator=generator).counts()
        return self._run(self.request(p, shots, generator))

    def submit_rows(
        self, p: Tensor, shots: int | None = None, *, generator: torch.Generator | None = None, **options: Any
    ) -> RowJob:
        """Measure rows, without waiting for the result.

        Parameters
        ----------
        p, shots, generator
            As for `sample_rows`.
        **options
            Options of this submission that the engine's `submit` has: on IBM's devices `confirm`, for which
            True sends these rows, whatever limit they exceed, `patience` and `progress`.

        Returns
        -------
        RowJob
            `counts()` waits for the result. On IBM's devices it is a `DeviceJob`, which outlives this
            process; a simulator works in a thread.

        Raises
        ------
        ArgumentError, ShapeError, DtypeError, BackendUnavailable
            As for `sample_rows`; also if a simulator is given options.
        """
        if options.get("confirm") is not None:
            check_confirm(options["confirm"])
        request = self.request(p, shots, generator)
        if self.engine.queues and bool(request.running.any()):
            self.engine.refresh()
            circuit = self.transpiled(p.shape[-1])
            request = replace(request, diagnostics=self.diagnostics(circuit, request))
            return self.engine.submit(circuit, request.bindings(), request.shots, request, **options)
        if options:
            raise ArgumentError(
                f"{', '.join(options)} is not allowed: simulators take no options of a submission."
            )
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, "qtx-lab-aer")
        return LocalJob(self._threads.submit(self._run, request))

    def plan_rows(
        self,
        p: Tensor,
        shots: int | None = None,
        *,
        mitigation: PlannedMitigation | None = None,
        target: Target | str | None = None,
        price_per_second: float | None = None,
    ) -> RowPlan:
        """What measuring rows would send and cost. Nothing is sent.

        With one of IBM's devices, the circuits are transpiled for its present target, which needs an account;
        without one, for the twin of that device, if there is one, and the plan says so. A twin's plan is that
        of the device.

        Parameters
        ----------
        p, shots
            As for `sample_rows`.
        mitigation : PlannedMitigation, optional
            With which the rows would be measured, as `CircuitMitigation`: its noise levels and calibrations
            are part of the plan.
        target : Target or str, optional
            Plan for this target of a device, or for the twin of this name.
        price_per_second : float, optional
            Price of a second of quantum time, in any currency.

        Returns
        -------
        RowPlan
            Circuits, shots, depth, two-qubit gates, quantum seconds and how they were estimated, the price,
            what is left of the budget, and why the call would be refused.

        Raises
        ------
        ArgumentError, ShapeError, DtypeError
            As for `sample_rows`; if there is no such target, or the mitigation cannot say what it runs.
        BackendUnavailable
            If the device cannot be reached and has no twin, or cannot run the circuit.

        Examples
        --------
        >>> import torch
        >>> plan = QiskitQuantumBackend("aer", "fake_fez").plan_rows(torch.full((4, 8), 0.125), 1000)
        >>> plan.circuits, plan.executions, plan.two_qubit_gates
        (4, 4000, 0)
        >>> round(plan.quantum_seconds, 1)
        3.4
        """
        shots = self._checked_shots(shots)
        p = check_rows(p)
        price = _checked_price(price_per_second)
        if mitigation is not None and not isinstance(mitigation, PlannedMitigation):
            raise ArgumentError(
                f"mitigation={mitigation!r} cannot be planned: it has no `planned_runs`, which says what it "
                "runs."
            )
        running = p[p.sum(-1) > 0]
        problems: tuple[str, ...] = ()
        engine = self.engine if target is None else TargetEngine(target)
        if engine is self.engine and engine.name in fake_devices():
            engine = TargetEngine(engine.name)
        try:
            plan = self._plan_on(engine, running, shots, mitigation)
        except BackendUnavailable as error:
            twin = f"fake_{engine.name.removeprefix('ibm_')}"
            if not engine.queues or twin not in fake_devices():
                raise
            problems = (str(error),)
            plan = self._plan_on(TargetEngine(twin), running, shots, mitigation)
        return replace(
            plan,
            price=None if price is None else plan.quantum_seconds * price,
            problems=(*problems, *plan.problems),
        )

    def _plan_on(
        self, engine: Engine, p: Tensor, shots: int, mitigation: PlannedMitigation | None
    ) -> RowPlan:
        """The plan for rows that have mass, as transpiled and priced by an engine."""
        backend = self if engine is self.engine else self.with_engine(engine)
        runs: list[PlannedRun] = []
        if len(p) and mitigation is not None:
            runs = mitigation.planned_runs(backend, p, shots)
        elif len(p):
            runs = [PlannedRun(backend.transpiled(p.shape[-1]), len(p), shots)]
        return self.engine.plan(runs, shots, None if engine is self.engine else engine)

    def bill(self, *, price_per_second: float | None = None, ask: bool = True) -> Bill:
        """What was sent to IBM's devices from this folder of runs, and what IBM charged for it.

        Parameters
        ----------
        price_per_second : float, optional
            Price of a second of quantum time, in any currency.
        ask : bool
            Whether IBM is asked what it charged for jobs that have ended since; as far as it answers.

        Returns
        -------
        Bill
            Of the jobs on all devices, in any process; empty for a simulator.
        """
        price = _checked_price(price_per_second)
        return replace(self.engine.bill(ask=ask), price_per_second=price)

    def jobs(self) -> Sequence[RowJob]:
        """The jobs sent to this device from this machine, in any process, newest first; see `find_jobs`."""
        return self.engine.jobs()

    def problems(self) -> tuple[str, ...]:
        """Sentences that say why nothing can be run now; of a device, this asks over the network."""
        return self.engine.problems()

    def transpiled(self, n: int) -> QuantumCircuit:
        """The circuit for rows of n keys in the device's gates. It is made once and kept, see the class.

        Raises
        ------
        ArgumentError
            If the loader cannot make it.
        BackendUnavailable
            If the device cannot run it.
        """
        size = self.loader.size(check_count("n", n))
        # The bound method stands for the loader and keeps it alive, but its settings may have been changed.
        key = (
            self.loader.circuit,
            str(self.loader.__getstate__()),
            self.engine.identity(),
            self.optimization_level,
            size,
        )
        if key not in self._circuits:
            original = in_one_register(self.loader.circuit(size))
            path = self._cache_path(size, original)
            circuit = _read_circuit(path)
            if circuit is None:
                circuit = self.engine.transpile(original, self.optimization_level)
                self._write_circuit(path, circuit)
            self._circuits[key] = circuit
        return self._circuits[key]

    def _cache_path(self, size: int, circuit: QuantumCircuit) -> Path:
        what = (
            _fingerprint(circuit),
            self.engine.identity(),
            f"level {self.optimization_level}",
            f"qiskit {qiskit.__version__}, qtx_lab {__version__}",
        )
        digest = hashlib.sha256("\n".join(what).encode()).hexdigest()[:20]
        name = f"{self.engine.name}-{self.loader.name}-{size}-{digest}.qpy"
        return runs_home() / ".cache" / "circuits" / name

    def _write_circuit(self, path: Path, circuit: QuantumCircuit) -> None:
        content = io.BytesIO()
        qpy.dump(circuit, content)
        body = content.getvalue()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, hashlib.sha256(body).digest() + body)
        except (OSError, StorageError) as error:
            self._cache_problems = (f"the transpiled circuit was not kept on disk: {error}",)

    def request(
        self, p: Tensor, shots: int | None = None, generator: torch.Generator | None = None
    ) -> RowRequest:
        """The checked request to measure rows; arguments and errors as for `sample_rows`."""
        shots = self._checked_shots(shots)
        check_generator(generator)
        p = check_rows(p)
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
        return RowRequest(p, self.loader, shots, seed)

    def _checked_shots(self, shots: int | None) -> int:
        """The shots of each row, those of the backend where None."""
        shots = check_count("shots", self.shots if shots is None else shots)
        if shots > MAX_SHOTS_PER_ROW:
            raise ArgumentError(
                f"shots={shots} is not allowed: at most {MAX_SHOTS_PER_ROW} a row; measure again and add the "
                "counts."
            )
        return shots

    def _run(self, request: RowRequest) -> RowCounts:
        """Run a request here, as many rows at a time as fit into memory."""
        if not bool(request.running.any()):
            facts = {"device": self.engine.name, "method": "nothing was run: no row has mass"}
            return replace(request, diagnostics=facts).finish_counts([])
        circuit = self.transpiled(request.p.shape[-1])
        request = replace(request, diagnostics=self.diagnostics(circuit, request))
        return request.finish_by(self.engine.run, circuit, request.bindings())

    def diagnostics(self, circuit: QuantumCircuit, request: RowRequest) -> dict[str, Any]:
        """Diagnostics for a `RowCounts`: device, calibration, what is not modelled, the circuit's size."""
        size = resources(circuit)
        return {
            **self.engine.facts(),
            "loader": self.loader.name,
            "qubits": size.qubits,
            "depth": size.depth,
            "two_qubit_gates": size.two_qubit_gates,
            "optimization_level": self.optimization_level,
            "seed": request.seed,
            **self.engine.how(circuit),
            "fallbacks": self._cache_problems,
        }


class LocalJob:
    """Rows that a thread of this process simulates: a `RowJob` as a device has.

    Parameters
    ----------
    future : Future of RowCounts
        The thread's work.
    """

    def __init__(self, future: Future[RowCounts]):
        self.tag = f"local-{uuid4().hex[:12]}"
        self._future = future

    def status(self) -> JobStatus:
        """Where the job is now."""
        if self._future.cancelled():
            return JobStatus(JobState.CANCELLED)
        if self._future.done():
            error = self._future.exception()
            return JobStatus(JobState.DONE) if error is None else JobStatus(JobState.FAILED, None, str(error))
        return JobStatus(JobState.RUNNING if self._future.running() else JobState.QUEUED)

    def counts(self, timeout: float | None = None) -> RowCounts:
        """Wait for the result, at most `timeout` seconds.

        Raises
        ------
        JobTimeout
            If it is not done in time. It goes on.
        BackendUnavailable
            If it was cancelled.
        Exception
            What the simulation raised.
        """
        check_waiting(timeout)
        try:
            return self._future.result(None if timeout == math.inf else timeout)
        except FutureTimeout as error:
            if self._future.done():  # it is the job that has failed so, not the wait for it
                raise
            raise JobTimeout(f"Job {self.tag} is {self.status()} after {timeout:g} s; it goes on.") from error
        except BaseException:
            if self._future.cancelled():
                raise BackendUnavailable(f"Job {self.tag} was cancelled.") from None
            raise

    def cancel(self) -> None:
        """Cancel a job that has not started; BackendUnavailable where it has."""
        if not self._future.cancel():
            raise BackendUnavailable(f"Job {self.tag} cannot be cancelled: it is {self.status()}.")


def _checked_price(price: float | None) -> float | None:
    """A price per second as a number >= 0."""
    return None if price is None else check_number("price_per_second", price, least=0)


def _refuse_options(options: Mapping[str, Any], provider: str, allowed: Mapping[str, Any]) -> None:
    """Refuse options of the other provider that differ from their defaults."""
    defaults = signature(QiskitQuantumBackend).parameters
    for name, value in options.items():
        if value is not defaults[name].default and value != defaults[name].default:
            raise ArgumentError(
                f"{name}={value!r} is not allowed with provider={provider!r}. Allowed: {', '.join(allowed)}."
            )


def _fingerprint(circuit: QuantumCircuit) -> str:
    """A digest that is the same for equal circuits: their parameters count by name, not by identity."""
    renamed = circuit.assign_parameters(
        [Parameter(x.name, uuid=UUID(int=i)) for i, x in enumerate(circuit.parameters)]
    )
    renamed.name = ""  # where none is given, it has a number
    content = io.BytesIO()
    qpy.dump(renamed, content)
    return hashlib.sha256(content.getvalue()).hexdigest()


def _read_circuit(path: Path) -> QuantumCircuit | None:
    """A circuit from the cache; None where there is none, or none that can be read."""
    with suppress(Exception):  # whatever is wrong with the file, the circuit can be transpiled again
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            return qpy.load(io.BytesIO(content[32:]))[0]
    return None
