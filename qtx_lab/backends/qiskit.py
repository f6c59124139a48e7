"""`QiskitQuantumBackend`: rows of probabilities in, counts of measured keys out, wherever circuits run."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from copy import copy
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import qiskit
import torch
from qiskit import QuantumCircuit, qpy
from qiskit.circuit import Parameter
from torch import Tensor

from .. import __version__
from ..checks import check_count, check_generator
from ..circuits import Loader, check_rows, make_loader
from ..circuits.resources import resources
from ..errors import ArgumentError, BackendUnavailable, DtypeError, JobTimeout, StorageError, unknown_name
from ..storage import runs_home, write_atomic
from .aer import AerEngine
from .base import Engine, Job
from .counts import MOST_SHOTS_AT_ONCE, RowCounts, RowRequest, rows_at_once
from .ibm.ledger import JobStatus

PROVIDERS = ("aer", "ibm", "ibm-q")

MOST_SHOTS = 4 * MOST_SHOTS_AT_ONCE
"""Of a row: its outcomes are held at once."""


class QiskitQuantumBackend:
    """Measures keys of rows by circuits: on a simulator, on the twin of a device, on a device.

    One circuit serves all rows of a size. It is transpiled once for each (loader, size, device and calibration,
    level), kept in memory and under `<runs>/.cache/circuits`, and run with an array of bindings.

    Loading a row that is known into a circuit has no advantage over drawing from it on a classical computer: every
    result holds that draw beside it (`RowCounts.classical`).

    Parameters
    ----------
    provider : str
        "aer": simulators; "ibm" or "ibm-q": IBM's devices, through qiskit-ibm-runtime.
    backend_name : str, optional
        aer: see `AerEngine`. ibm: the device's name, as "ibm_fez".
    shots : int
        Of each row, unless a call says otherwise.
    optimization_level : int
        0 to 3, of the transpiler.
    loader : str or Loader
        How a row becomes a circuit: a name in `qtx_lab.circuits.LOADERS`.
    **options
        aer: `noise`, `noise_scale`, `method`. ibm: `service`, `instance`, `region` and more; see `IBMEngine`.

    Raises
    ------
    ArgumentError, DtypeError
        Unknown names, counts below 1. Nothing is asked of a network before a circuit is run.

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
        **options: Any,
    ):
        if provider not in PROVIDERS:
            raise unknown_name("provider", provider, PROVIDERS)
        if backend_name is not None and not isinstance(backend_name, str):
            raise DtypeError(f"backend_name is a {type(backend_name).__name__}; it must be a name or None.")
        check_count("shots", shots)
        if optimization_level not in (0, 1, 2, 3) or isinstance(optimization_level, bool):
            raise ArgumentError(
                f"optimization_level={optimization_level!r} is not allowed: it is 0, 1, 2 or 3."
            )
        self.provider = "aer" if provider == "aer" else "ibm"
        self.backend_name, self.shots, self.optimization_level = backend_name, shots, optimization_level
        self.loader = make_loader(loader)
        self.engine: Engine
        if self.provider == "aer":
            _refuse_unknown(options, AerEngine)
            self.engine = AerEngine(backend_name, **options)
        else:
            if backend_name is None:
                raise ArgumentError(
                    "backend_name=None is not allowed with IBM's devices: name one, as 'ibm_fez'."
                )
            from .ibm.engine import IBMEngine  # loads IBM's client

            _refuse_unknown(options, IBMEngine)
            self.engine = IBMEngine(backend_name, **options)
        self._circuits: dict[tuple[object, ...], QuantumCircuit] = {}
        self._cache_trouble: tuple[str, ...] = ()
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
        other = copy(self)
        vars(other).update(parts, _circuits={})
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
            Of each row.
        generator : torch.Generator, optional
            The only source of a simulator's randomness, and of the classical baseline's.

        Returns
        -------
        RowCounts

        Raises
        ------
        ArgumentError, ShapeError, DtypeError
            Before any work: see `check_rows`; shots below 1.
        BackendUnavailable
            If the device cannot be reached, or cannot run the circuit.
        """
        if hasattr(self.engine, "submit"):
            return self.submit_rows(p, shots, generator=generator).counts()
        return self._run(self.request(p, shots, generator))

    def submit_rows(
        self, p: Tensor, shots: int | None = None, *, generator: torch.Generator | None = None, **options: Any
    ) -> Job:
        """Measure rows, without waiting: arguments as for `sample_rows`, and what the engine's `submit` takes.

        Returns
        -------
        Job
            `counts()` waits for the result. On IBM's devices the job outlives this process; a simulator works in a
            thread.
        """
        request = self.request(p, shots, generator)
        submit = getattr(self.engine, "submit", None)
        if submit is not None and bool(request.running.any()):
            circuit = self.transpiled(p.shape[-1])
            request = replace(request, diagnostics=self.diagnostics(circuit, request))
            return submit(circuit, request.bindings(), request.shots, request, **options)
        if options:
            raise ArgumentError(
                f"{', '.join(options)} is not allowed: simulators take no options of a submission."
            )
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, "qtx-lab-aer")
        return LocalJob(self._threads.submit(self._run, request))

    def jobs(self) -> list[Any]:
        """The jobs that this computer has sent to this device, by this process or before, newest first; see `find_jobs`."""
        jobs = getattr(self.engine, "jobs", None)
        return list(jobs()) if jobs else []

    def problems(self) -> tuple[str, ...]:
        """Sentences on why nothing can be run now; asks a device over the network, a simulator never."""
        return self.engine.problems()

    def transpiled(self, n: int) -> QuantumCircuit:
        """The circuit for rows of n keys in the device's gates; made once and kept, see the class.

        Raises
        ------
        ArgumentError, BackendUnavailable
            If the loader cannot make it; if the device cannot run it.
        """
        size = self.loader.size(n)
        # The bound method stands for the loader, and keeps it; what it holds may have been changed.
        what = (self.loader.circuit, str(getattr(self.loader, "__dict__", "")))
        key = (*what, self.engine.identity(), self.optimization_level, size)
        if key not in self._circuits:
            drawn = self.loader.circuit(size)
            path = self._cache_path(size, drawn)
            circuit = _read_circuit(path)
            if circuit is None:
                circuit = self.engine.transpile(drawn, self.optimization_level)
                self._keep(path, circuit)
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

    def _keep(self, path: Path, circuit: QuantumCircuit) -> None:
        content = io.BytesIO()
        qpy.dump(circuit, content)
        body = content.getvalue()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, hashlib.sha256(body).digest() + body)
        except (OSError, StorageError) as error:
            self._cache_trouble = (f"the transpiled circuit was not kept on disk: {error}",)

    def request(
        self, p: Tensor, shots: int | None = None, generator: torch.Generator | None = None
    ) -> RowRequest:
        """What is asked of the engine, checked: arguments and errors as for `sample_rows`."""
        shots = self.shots if shots is None else shots
        check_count("shots", shots)
        if shots > MOST_SHOTS:
            raise ArgumentError(
                f"shots={shots} is not allowed: at most {MOST_SHOTS} a row; measure again and add the counts."
            )
        check_generator(generator)
        p = check_rows(p)
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
        return RowRequest(p, self.loader, int(shots), seed)

    def _run(self, request: RowRequest) -> RowCounts:
        if not bool(request.running.any()):
            idle = replace(
                request,
                diagnostics={"device": self.engine.name, "method": "nothing was run: no row has mass"},
            )
            return idle.finish_counts([])
        circuit = self.transpiled(request.p.shape[-1])
        request = replace(request, diagnostics=self.diagnostics(circuit, request))
        bindings = request.bindings()
        step = rows_at_once(request.shots, -(-circuit.num_clbits // 8))
        parts = [
            request.tally(
                self.engine.run(circuit, bindings[start : start + step], request.shots, request.seed + start)
            )
            for start in range(0, len(bindings), step)
        ]
        return request.finish_counts(parts)

    def diagnostics(self, circuit: QuantumCircuit, request: RowRequest) -> dict[str, Any]:
        """Device, calibration, what is not modelled and what the transpiled circuit costs: `RowCounts.diagnostics`."""
        needs = resources(circuit)
        how = getattr(self.engine, "how", None)
        return {
            **self.engine.facts(),
            "loader": self.loader.name,
            "qubits": needs.qubits,
            "depth": needs.depth,
            "two_qubit_gates": needs.two_qubit_gates,
            "optimization_level": self.optimization_level,
            "seed": request.seed,
            **(how(circuit) if how else {}),
            "fallbacks": self._cache_trouble,
        }


class LocalJob:
    """Rows that a thread of this process simulates: the interface of a device's job."""

    def __init__(self, future: Future[RowCounts]):
        self.tag = f"local-{uuid4().hex[:12]}"
        self._future = future

    def status(self) -> JobStatus:
        if self._future.cancelled():
            return JobStatus("cancelled")
        if self._future.done():
            error = self._future.exception()
            return JobStatus("done") if error is None else JobStatus("failed", None, str(error))
        return JobStatus("running" if self._future.running() else "queued")

    def counts(self, timeout: float | None = None) -> RowCounts:
        """Wait for the result; JobTimeout, BackendUnavailable as for a device's job, or what the simulation raised."""
        try:
            return self._future.result(timeout)
        except FutureTimeout as error:
            raise JobTimeout(f"Job {self.tag} is {self.status()} after {timeout:g} s; it goes on.") from error
        except BaseException:
            if self._future.cancelled():
                raise BackendUnavailable(f"Job {self.tag} was cancelled.") from None
            raise

    def cancel(self) -> None:
        """Cancel what has not started; BackendUnavailable where it has."""
        if not self._future.cancel():
            raise BackendUnavailable(f"Job {self.tag} cannot be cancelled: it is {self.status()}.")


def _refuse_unknown(options: dict[str, Any], engine: Callable[..., Engine]) -> None:
    allowed = [x.name for x in signature(engine).parameters.values() if x.kind is x.KEYWORD_ONLY]
    for name in options:
        if name not in allowed:
            raise unknown_name("option", name, allowed)


def _fingerprint(circuit: QuantumCircuit) -> str:
    """A digest of a circuit, the same for circuits that are built alike: parameters count by name, not by identity."""
    alike = circuit.assign_parameters(
        [Parameter(x.name, uuid=UUID(int=i)) for i, x in enumerate(circuit.parameters)]
    )
    alike.name = ""  # where none is given, it has a number
    content = io.BytesIO()
    qpy.dump(alike, content)
    return hashlib.sha256(content.getvalue()).hexdigest()


def _read_circuit(path: Path) -> QuantumCircuit | None:
    """A circuit that was kept; None where there is none, or none that can be read."""
    with suppress(Exception):  # whatever is wrong with it, the circuit can be made anew
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            return qpy.load(io.BytesIO(content[32:]))[0]
    return None
