"""`DeviceJob`, a job on a device that is recorded on disk: submitted once, followed, and found again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...circuits import Loader
from ...errors import ArgumentError, BackendUnavailable, FallbackWarning, JobTimeout, StorageError
from ...storage import write_frame
from ..base import JobState, JobStatus
from ..counts import RowCounts
from ..requests import Request, RowRequest
from .ledger import (
    JobRecord,
    PartRecord,
    find_records,
    load_array,
    read_record,
    read_request,
    save_array,
    write_record,
)
from .remote import IBMRemote, Refused, Remote, Unreachable

FIRST_POLL_DELAY_S, LAST_POLL_DELAY_S = 1.0, 30.0
"""Between two questions about a waiting job: the delay grows from the first value to the last."""

LISTING_LAG_S = 30.0
"""For how long a job that was accepted may be missing from the server's listing."""

REFUSAL_CHECK_S = 2.0
"""For how long a refused job is looked for: a gateway may refuse what the server behind it accepted."""

MAX_RESULT_FETCHES = 4
"""How often results are fetched before giving up: an answer can be cut short."""


class DeviceJob:
    """A recorded job on a device.

    It holds no state but the path of its record, so that any process can make another for the same job.

    Parameters
    ----------
    path : Path
        The record's file.
    connect : callable
        Returns the `Remote`; called when the server is first needed.
    request : Request, optional
        What the job runs, where it is known; read from the record otherwise.
    """

    def __init__(self, path: Path, connect: Callable[[], Remote], request: Request | None = None):
        self.path = path
        self.remote = cache(connect)
        self._request = request

    @property
    def record(self) -> JobRecord:
        """What is written down, with the state last known; StorageError where it cannot be read."""
        return read_record(self.path)

    @property
    def tag(self) -> str:
        """Unique name by which the job is found, here and on the server."""
        return self.path.stem

    @property
    def id(self) -> str | None:
        """The server's ids of the job's parts, with commas between them; None before one is known."""
        ids = [part.id for part in self.record.parts if part.id]
        return ", ".join(ids) or None

    @property
    def last_known(self) -> JobStatus:
        """The status when the server was last asked. Does not ask it."""
        return self.record.status

    def status(self) -> JobStatus:
        """Ask the server where the job is. A part whose id is not known is looked up by its tag.

        Raises
        ------
        BackendUnavailable
            If the server cannot be asked. The record still has what was last known.
        """
        record, answers = self.record, []
        before = record.model_copy(deep=True)
        for part in record.parts:
            self._find(part)
            if part.id and not part.state.ended:
                answer = self.remote().status(part.id)
                part.state, part.reason = answer.state, answer.reason
                answers.append(answer)
        if record != before:
            write_record(self.path, record)
        last = max(
            answers,
            key=lambda answer: (answer.state == JobState.QUEUED, answer.position or 0),
            default=JobStatus(JobState.DONE),
        )
        return replace(record.status, position=last.position, pending=last.pending)

    def outcomes(
        self,
        timeout: float | None = None,
        *,
        progress: bool | Callable[[JobStatus], None] = True,
        patience: float = 600.0,
    ) -> np.ndarray:
        """Wait for the job and fetch what was measured, once: it is kept beside the record.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait at most. None: as long as it takes.
        progress : bool or callable
            Whether to show state and place in the queue on stderr; or a function that is called with each
            `JobStatus`.
        patience : float
            Seconds for which a server that cannot be reached is asked again.

        Returns
        -------
        ndarray, uint8, (R, S, B)
            Bits packed as in `qiskit.primitives.BitArray`. Twirling may round the number of shots S up.

        Raises
        ------
        BackendUnavailable
            If the job failed, was cancelled or never arrived; if its results cannot be read; if the server
            cannot be reached for longer than `patience`, while the job goes on. The message names the tag.
        StorageError
            If outcomes that were kept can neither be read nor fetched again; if they cannot be kept.
        JobTimeout
            If it is not done in time. It goes on.
        """
        path, broken = self.path.with_suffix(".outcomes.npz"), None
        if path.exists():
            try:
                return self._read_outcomes(path)
            except StorageError as error:
                broken = error
                warnings.warn(f"{error} They are fetched again.", FallbackWarning, stacklevel=2)
        try:
            self._wait(timeout, progress, patience)
            blocks: dict[int, list[np.ndarray]] = {}  # by first row; the shots of a block side by side
            for part in self.record.parts:
                blocks.setdefault(part.start, []).append(self._fetch(part))
        except BackendUnavailable as error:
            if broken is None:
                raise
            raise StorageError(f"{broken} They cannot be fetched again: {error}") from error
        rows = [np.concatenate(block, axis=1) for _, block in sorted(blocks.items())]
        outcomes = np.concatenate(rows)
        save_array(path, outcomes=outcomes)
        return outcomes

    def counts(self, timeout: float | None = None, **waiting: Any) -> RowCounts:
        """Wait for the job and count its outcomes; arguments and errors as for `outcomes`.

        `diagnostics` has the job's tag and id. Twirling may round the shots up: those beyond the requested
        number are left out, and `shots_run` is how many were run.

        Raises
        ------
        ArgumentError
            If the job did not measure plain rows, so that its outcomes alone are no counts of keys.
        """
        request = self.request()
        if not isinstance(request, RowRequest):
            kind = self.record.request.kind
            raise ArgumentError(
                f"Job {self.tag} ran circuits of the kind {kind!r}, not of rows alone: take its `outcomes`."
            )
        outcomes = self.outcomes(timeout, **waiting)
        result = request.finish(outcomes[:, : request.shots])
        job = {"job": self.tag, "job_id": self.id, "shots_run": outcomes.shape[1]}
        return replace(result, diagnostics={**result.diagnostics, **job})

    def save_counts(self) -> Path:
        """Wait for the counts and write them to `<tag>.parquet` beside the record.

        Returns
        -------
        Path
            A table of `row`, `key` (-1 for discarded shots) and `count`, where that is not 0.
        """
        import pandas as pd

        result = self.counts()
        table = torch.cat([result.counts, result.discarded[:, None]], -1)
        row, key = table.nonzero(as_tuple=True)
        key_or_none = key.where(key < result.counts.shape[-1], -1)
        frame = pd.DataFrame(
            {"row": row.numpy(), "key": key_or_none.numpy(), "count": table[row, key].numpy()}
        )
        path = self.path.with_suffix(".parquet")
        write_frame(path, frame)
        return path

    def request(self, loader: Loader | None = None) -> Request | None:
        """What the job runs, rebuilt from its record.

        Parameters
        ----------
        loader : Loader, optional
            The loader of the rows, where another process used one that no name makes.

        Returns
        -------
        RowRequest, MitigatedRowRequest, CalibrationRequest or None
            None for circuits of another purpose. `RowRequest.finish(job.outcomes())` makes counts.

        Raises
        ------
        ArgumentError
            If no loader has the recorded name.
        StorageError
            If the rows, kept beside the record, cannot be read.
        """
        if self._request is None:
            self._request = read_request(self.path, self.record, loader)
        return self._request

    def cancel(self) -> None:
        """Cancel every part that has not ended.

        Raises
        ------
        BackendUnavailable
            If the job has ended, if no job with its tag is on the server, or if the server cannot be asked.
        """
        self.status()
        waiting = [part.id for part in self.record.parts if part.id and not part.state.ended]
        for id in waiting:
            self.remote().cancel(id)
        status = self.status()
        if not waiting or status.state != JobState.CANCELLED:
            raise BackendUnavailable(f"Job {self.tag} cannot be cancelled: it is {status}.")

    def __repr__(self) -> str:
        record = self.record
        size = f"{record.circuits} circuits × {record.shots} shots"
        return f"DeviceJob({self.tag!r}, {record.device}, {size}, {record.status.state})"

    def _read_outcomes(self, path: Path) -> np.ndarray:
        """The outcomes that were fetched before; StorageError where the file does not hold them."""
        outcomes, record = load_array(path, "outcomes"), self.record
        rows = max(part.stop for part in record.parts)
        fits = outcomes.ndim == 3 and len(outcomes) == rows and outcomes.shape[1] >= record.shots
        if not fits or outcomes.dtype != np.uint8:
            raise StorageError(f"{path} does not hold the outcomes of {rows} rows × {record.shots} shots.")
        return outcomes

    def _may_be_unlisted(self) -> bool:
        """Whether the job was recorded so recently that a listing may not show it yet."""
        return (datetime.now(UTC) - self.record.recorded).total_seconds() < LISTING_LAG_S

    def _find(self, part: PartRecord) -> None:
        """Look for a part whose id is not known, by its tag, even if it was refused."""
        if not part.id:
            ids = self.remote().lookup(part.tag)
            if ids:
                part.id, part.state, part.reason = ids[0], JobState.SUBMITTED, None

    def _wait(
        self, timeout: float | None, progress: bool | Callable[[JobStatus], None], patience: float
    ) -> None:
        """Return when the job is done; errors as for `outcomes`."""
        start = last_answer = time.monotonic()
        delay = FIRST_POLL_DELAY_S
        with _progress(self, progress) as show:
            while True:
                try:
                    status, last_answer = self.status(), time.monotonic()
                except Unreachable as error:
                    if time.monotonic() - last_answer > patience:
                        raise BackendUnavailable(
                            f"{error} Job {self.tag} goes on; `qtx-lab jobs` finds it again."
                        ) from error
                    status = JobStatus(self.last_known.state, reason=str(error))
                show(status)
                if status.state == JobState.DONE:
                    return
                self._check_alive(status)
                left = np.inf if timeout is None else start + timeout - time.monotonic()
                if left <= 0:
                    raise JobTimeout(f"Job {self.tag} is {status} after {timeout:g} s; it goes on.")
                time.sleep(min(delay, left))
                delay = min(delay * 1.5, LAST_POLL_DELAY_S)

    def _check_alive(self, status: JobStatus) -> None:
        """Raise BackendUnavailable where waiting is of no use."""
        if status.state.ended:
            raise BackendUnavailable(f"Job {self.tag} on {self.record.device} has ended as {status}.")
        if status.state == JobState.RECORDED and not self._may_be_unlisted():
            raise BackendUnavailable(
                f"Job {self.tag} is recorded, but no job with this tag is on the server: it never "
                "arrived, or is not listed yet. Nothing was submitted again."
            )

    def _fetch(self, part: PartRecord) -> np.ndarray:
        """The outcomes of a part that is done, checked against what it was to run."""
        for attempt in range(MAX_RESULT_FETCHES):
            try:
                outcomes = self.remote().outcomes(str(part.id))
                break
            except Unreachable as error:
                if attempt == MAX_RESULT_FETCHES - 1:
                    raise BackendUnavailable(
                        f"The results of job {self.tag} ({part.id}) cannot be fetched: {error} "
                        "They stay on the server; try again."
                    ) from error
                time.sleep(FIRST_POLL_DELAY_S)
        rows = part.stop - part.start
        if outcomes.shape[0] != rows or outcomes.shape[1] < part.shots:
            raise BackendUnavailable(
                f"The results of job {self.tag} ({part.id}) have {outcomes.shape[0]} rows × "
                f"{outcomes.shape[1]} shots; {rows} rows × {part.shots} shots were submitted."
            )
        return outcomes


def submit_parts(job: DeviceJob, post: Callable[[PartRecord], str]) -> DeviceJob:
    """Submit each part of a recorded job, once.

    Whatever happens, a part is posted a single time. Where the answer does not say whether it was accepted,
    it is looked for by its tag for `LISTING_LAG_S` seconds, since a listing may lag. If it is not found,
    nobody knows, and it stays recorded: a second post might be a second job.

    Parameters
    ----------
    job : DeviceJob
        Just recorded.
    post : callable
        Posts a part, with its tag, and returns the server's id. Raises `Refused` where there is certainly no
        job.

    Raises
    ------
    BackendUnavailable
        If a part was refused; if it is not known whether it was accepted. Parts before it stay submitted.
    """
    count = len(job.record.parts)
    for i in range(count):
        record = job.record
        part = record.parts[i]
        try:
            part.id = post(part)
        except Exception as error:
            refused = isinstance(error, Refused)
            seconds = min(LISTING_LAG_S, REFUSAL_CHECK_S) if refused else LISTING_LAG_S
            part.id = _listed_id(job.remote, part.tag, seconds)
            if not part.id and refused:
                part.state, part.reason = JobState.FAILED, f"{error} Nothing was submitted."
                for later in record.parts[i + 1 :]:
                    later.state = JobState.FAILED
                    later.reason = "not submitted, since a part before it was refused"
                write_record(job.path, record)
                what = f"{i} of its {count} parts were submitted" if i else "nothing was submitted"
                raise BackendUnavailable(f"{error} Job {job.tag}: {what}.") from error.__cause__
            if not part.id:
                raise BackendUnavailable(
                    f"{error} Whether job {job.tag} was accepted is not known: none with its tag was listed "
                    f"for {LISTING_LAG_S:g} s. It is recorded, and not submitted again: `qtx-lab jobs` looks "
                    "for it."
                ) from error
        part.state = JobState.SUBMITTED
        write_record(job.path, record)
    return job


def _listed_id(remote: Callable[[], Remote], tag: str, seconds: float) -> str | None:
    """The id of the job with this tag, as soon as it is listed; None where it is not, or nothing answers."""
    end, delay = time.monotonic() + seconds, 0.1
    while True:
        with suppress(BackendUnavailable):
            if ids := remote().lookup(tag):
                return ids[0]
        if time.monotonic() >= end:
            return None
        time.sleep(min(delay, max(0.0, end - time.monotonic())))
        delay = min(2 * delay, 5.0)


def find_jobs(
    home: str | Path | None = None, *, tag: str | None = None, service: Any = None
) -> list[DeviceJob]:
    """All recorded jobs, newest first, of this process or any before it. No server is asked.

    A file that is not the record of a job is left out, with a warning that says why.

    Parameters
    ----------
    home : path, optional
        The folder of runs, see `runs_home`: jobs are in `<home>/jobs` and in each run's `jobs`.
    tag : str, optional
        Only the jobs whose tag contains this text.
    service : QiskitRuntimeService, optional
        The service that is asked about the jobs; where None, that of the account in the environment or on
        disk.

    Returns
    -------
    list of DeviceJob
        `job.status()` asks the server, `job.counts()` waits and fetches, `job.cancel()` cancels.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     find_jobs(home)
    []
    """
    remotes: dict[tuple[str | None, ...], Remote] = {}

    def connect(record: JobRecord) -> Remote:
        account = (record.provider, record.instance, record.region)
        if account not in remotes:
            remotes[account] = IBMRemote(service, instance=record.instance, region=record.region)
        return remotes[account]

    jobs = [
        (record.recorded, DeviceJob(path, partial(connect, record)))
        for path, record in find_records(home, tag)
    ]
    return [job for _, job in sorted(jobs, key=lambda item: (item[0], item[1].tag), reverse=True)]


@contextmanager
def _progress(
    job: DeviceJob, progress: bool | Callable[[JobStatus], None]
) -> Iterator[Callable[[JobStatus], None]]:
    """A function that shows a status: in a line on stderr that is rewritten, or as the caller does it."""
    if not isinstance(progress, bool):
        yield progress
        return
    from tqdm.auto import tqdm

    with tqdm(bar_format="{desc} [{elapsed}]", disable=not progress, leave=False) as line:
        yield lambda status: line.set_description_str(f"{job.tag} on {job.record.device}: {status}")
