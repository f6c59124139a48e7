"""`MitigatedCall`: a mitigated measurement on a device, which outlives the process that sent it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import QiskitQuantumBackend, RowCounts
from ..backends.base import JobStatus, combined_status
from ..backends.ibm.budget import Confirm
from ..backends.ibm.calls import (
    CalibrationsRecord,
    CallRecord,
    LevelRecord,
    new_call_tag,
    read_call,
    read_call_rows,
    record_call,
    write_call,
)
from ..backends.ibm.jobs import Cancellation, DeviceJob
from ..backends.ibm.submission import check_waiting
from ..backends.requests import CalibrationRequest, MitigatedRowRequest, RowRequest
from ..circuits import Loader, make_loader
from ..errors import BackendUnavailable, StorageError
from ..storage import write_frame
from .distillation import TwoCopyLoader
from .readout import check_contrast, errors_of_outcomes, keep_errors, known_errors, prepared_states
from .register import LoaderRegister, count_values


class MitigatedCall:
    """A mitigated measurement on a device.

    Its jobs, those of the readout's calibration and one for each noise level, are recorded before the first
    is sent, together with how they make a result. So any process can make the same result from them.

    Parameters
    ----------
    path : Path
        The record's file.
    jobs : mapping of str to DeviceJob
        The jobs by their tags.
    make_mitigation : callable
        Gives the `CircuitMitigation` of recorded settings.
    loader : Loader, optional
        The loader; made by the recorded name where None.
    """

    def __init__(
        self,
        path: Path,
        jobs: Mapping[str, DeviceJob],
        make_mitigation: Callable[[Mapping[str, Any]], Any],
        loader: Loader | None = None,
    ):
        self.path = path
        self._jobs = jobs
        self._make_mitigation = make_mitigation
        self._loader = loader

    @property
    def record(self) -> CallRecord:
        """What is written down; StorageError where it cannot be read."""
        return read_call(self.path)

    @property
    def tag(self) -> str:
        """Unique name of the call."""
        return self.path.stem

    @property
    def jobs(self) -> list[DeviceJob]:
        """The jobs, those of calibrations first.

        Raises
        ------
        StorageError
            If the record of one of them cannot be found.
        """
        tags = self.record.job_tags
        lost = [tag for tag in tags if tag not in self._jobs]
        if lost:
            raise StorageError(
                f"The record of job {lost[0]}, of the call {self.tag}, cannot be found or read."
            )
        return [self._jobs[tag] for tag in tags]

    @property
    def last_known(self) -> JobStatus:
        """The status when the server was last asked. Does not ask it."""
        return combined_status([job.last_known for job in self.jobs], "jobs")

    def status(self) -> JobStatus:
        """Ask the server where the jobs are; errors as for `DeviceJob.status`."""
        return combined_status([job.status() for job in self.jobs], "jobs")

    def send_rest(self, **options: Any) -> MitigatedCall:
        """Send the jobs, and the parts of jobs, that the server never got.

        Options, errors and what is never sent twice are as for `DeviceJob.send_rest`.
        """
        for job in self.jobs:
            job.send_rest(**options)
        return self

    def cancel(self) -> tuple[Cancellation, ...]:
        """Cancel every job that has not ended.

        Returns
        -------
        tuple of Cancellation
            Of each job of which something was cancelled. What had run is kept.

        Raises
        ------
        BackendUnavailable
            If nothing was cancelled.
        """
        cancelled, problems = [], []
        for job in self.jobs:
            try:
                cancelled.append(job.cancel())
            except BackendUnavailable as error:
                problems.append(str(error))
        if not cancelled:
            raise BackendUnavailable(f"The call {self.tag} cannot be cancelled. {' '.join(problems)}")
        return tuple(cancelled)

    def counts(
        self,
        timeout: float | None = None,
        *,
        mitigation: Any = None,
        loader: Loader | None = None,
        progress: bool | Callable[[JobStatus], None] = True,
        patience: float | None = None,
    ) -> RowCounts:
        """Wait for all jobs, and make the mitigated result: the same in every process.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait at most. None: as long as it takes.
        mitigation : CircuitMitigation, optional
            The mitigation, where the call used an inference of its own that no record can hold.
        loader : Loader, optional
            The loader, where the call used one that no name makes.
        progress, patience
            As for `DeviceJob.outcomes`.

        Returns
        -------
        RowCounts
            As `CircuitMitigation.sample_rows` returns it; `diagnostics["call"]` is the tag, and
            `diagnostics["jobs"]` are those of the jobs.

        Raises
        ------
        ArgumentError
            If a mitigation or a loader has to be given.
        BackendUnavailable, JobTimeout, StorageError
            As for `DeviceJob.outcomes`.
        """
        check_waiting(timeout, patience, progress)
        record, jobs = self.record, self.jobs
        mitigation = mitigation or self._make_mitigation(record.mitigation)
        loader = loader or self._loader or loader_of(record.loader)
        end = None if timeout is None else time.monotonic() + timeout
        outcomes: dict[str, np.ndarray] = {}
        for job in jobs:
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                outcomes[job.tag] = job.outcomes(left, progress=progress, patience=patience)
            except BackendUnavailable as error:
                raise BackendUnavailable(
                    f"{error} It is one of the {len(jobs)} jobs of the call {self.tag}: "
                    "`find_mitigated_calls()` finds the call, and its `send_rest()` sends what was not sent."
                ) from error
        request = record.rows.to_request(read_call_rows(self.path, record), loader)
        running = request.p[request.running]
        errors = self._readout_errors(record, outcomes) if record.calibrations else None
        counts = [count_values(outcomes[level.job], level.shots, record.bits) for level in record.levels]
        attained = [level.attained for level in record.levels]
        register = LoaderRegister(loader, record.bits, running.shape[-1])
        rows = mitigation.combine_levels(register, running, counts, errors, attained)
        shots = [level.shots for level in record.levels]
        result = mitigation.finish(request, register, counts, rows, shots, attained)
        facts: dict[str, Any] = {"call": self.tag, "jobs": tuple(record.job_tags)}
        notes = tuple(note for job in jobs for note in job.record.submission_notes)
        facts |= {"submission": notes} if notes else {}
        return replace(result, diagnostics={**result.diagnostics, **facts})

    def _readout_errors(self, record: CallRecord, outcomes: Mapping[str, np.ndarray]) -> list[Tensor]:
        """The readout errors at each level; those that were measured are kept, for other calls too."""
        for calibration in record.calibrations:
            if calibration.errors is None:
                prepared = [self._jobs[tag].request() for tag in calibration.jobs]
                states = [x.prepared for x in prepared if isinstance(x, CalibrationRequest)]
                errors = errors_of_outcomes([outcomes[tag] for tag in calibration.jobs], states)
                calibration.errors = errors.tolist()
                if calibration.kept_in:
                    keep_errors(Path(calibration.kept_in), errors)
                write_call(self.path, record)
        known = [torch.tensor(x.errors, dtype=torch.float64) for x in record.calibrations]
        for errors in known:
            check_contrast(errors, record.device)
        return [known[level.calibration or 0] for level in record.levels]

    def save_counts(self) -> Path:
        """Wait for the result and write it to `<tag>.parquet` beside the record.

        Returns
        -------
        Path
            A table of `row`, `key`, `count`, `estimate` and `std_error`, of all keys of all rows.
        """
        import pandas as pd

        result = self.counts()
        assert result.estimate is not None
        assert result.std_error is not None
        rows, keys = result.counts.shape
        frame = pd.DataFrame(
            {
                "row": np.repeat(np.arange(rows), keys),
                "key": np.tile(np.arange(keys), rows),
                "count": result.counts.flatten().numpy(),
                "estimate": result.estimate.flatten().numpy(),
                "std_error": result.std_error.flatten().numpy(),
            }
        )
        path = self.path.with_suffix(".parquet")
        write_frame(path, frame)
        return path

    def __repr__(self) -> str:
        record = self.record
        return (
            f"MitigatedCall({self.tag!r}, {record.device}, {record.mitigation.get('name')!r}, "
            f"{len(record.job_tags)} jobs)"
        )


def submit_call(
    mitigation: Any,
    backend: QiskitQuantumBackend,
    request: RowRequest,
    shots_by_level: Sequence[int],
    facts: Mapping[str, Any],
    *,
    confirm: Confirm | None = None,
    patience: float | None = None,
    progress: bool | Callable[[JobStatus], None] = True,
) -> MitigatedCall:
    """Record all jobs of a mitigated measurement and the call itself, then send the jobs.

    Parameters
    ----------
    mitigation : CircuitMitigation
    backend : QiskitQuantumBackend
        On one of IBM's devices.
    request : RowRequest
        All rows.
    shots_by_level : sequence of int
        Shots of each row at each level.
    facts : mapping
        Diagnostics of the result, beside those of the circuit.
    confirm, patience, progress
        As for `IBMEngine.submit`.

    Raises
    ------
    ArgumentError, DtypeError
        If one of them is not allowed. Nothing is recorded or sent.
    CostError
        If all of it together exceeds a limit, and is not confirmed. Nothing is recorded or sent.
    BackendUnavailable, StorageError
        As for `IBMEngine.submit`. What was recorded can be sent later: see `find_mitigated_calls`.
    """
    check_waiting(None, patience, progress)
    running = request.p[request.running]
    with backend.engine.reserved(mitigation.planned_runs(backend, running, request.shots), confirm):
        request = replace(request, diagnostics=facts)
        call = _record_call(mitigation, backend, request, running, shots_by_level)
    return call.send_rest(patience=patience, progress=progress)


def _record_call(
    mitigation: Any,
    backend: QiskitQuantumBackend,
    request: RowRequest,
    running: Tensor,
    shots_by_level: Sequence[int],
) -> MitigatedCall:
    """Record all jobs of a call, and then the call itself; nothing is sent. See `submit_call`."""
    n, variants = running.shape[-1], mitigation.construct_backends(backend)
    tag = new_call_tag()
    jobs: dict[str, DeviceJob] = {}

    def record(variant: QiskitQuantumBackend, *arguments: Any) -> str:
        job = variant.engine.submit(*arguments, send=False)
        assert isinstance(job, DeviceJob)
        jobs[job.tag] = job
        return job.tag

    calibrations: dict[Path, CalibrationsRecord] = {}
    place_of: list[Path | None] = []
    for variant in variants:
        known = known_errors(variant, n) if mitigation.readout else None
        place_of.append(None if known is None else known.path)
        if known is None or known.path in calibrations:
            continue
        tags = [] if known.errors is not None else [
            record(variant, circuit, np.empty((1, 0)), calibration.shots, calibration)
            for circuit, calibration in prepared_states(variant.transpiled(n), request.seed)
        ]  # fmt: skip
        errors = None if known.errors is None else known.errors.tolist()
        calibrations[known.path] = CalibrationsRecord(
            qubits=known.qubits, errors=errors, jobs=tags, kept_in=str(known.path.resolve())
        )
    attained = mitigation.attained_levels(backend, n)
    levels = []
    for i, (variant, shots) in enumerate(zip(variants, shots_by_level, strict=True)):
        rows = replace(request, p=running, loader=variant.loader)
        of_level = MitigatedRowRequest(rows, mitigation.settings, attained[i], shots, tag)
        job = record(variant, variant.transpiled(n), rows.bindings(), shots, of_level)
        place = place_of[i]
        levels.append(
            LevelRecord(
                noise_level=mitigation.levels[i],
                attained=attained[i],
                shots=shots,
                job=job,
                calibration=None if place is None else list(calibrations).index(place),
            )
        )
    path = record_call(
        next(iter(jobs.values())).path.parent,
        tag,
        replace(
            request,
            diagnostics={
                **variants[0].diagnostics(variants[0].transpiled(n), request),
                **request.diagnostics,
            },
        ),
        device=backend.engine.name,
        loader=variants[0].loader,
        bits=variants[0].transpiled(n).num_clbits,
        mitigation=mitigation.settings,
        calibrations=list(calibrations.values()),
        levels=levels,
    )
    return MitigatedCall(path, jobs, lambda settings: mitigation, variants[0].loader)


def loader_of(name: str) -> Loader:
    """The loader of a name in a record."""
    return TwoCopyLoader() if name == TwoCopyLoader.name else make_loader(name)
