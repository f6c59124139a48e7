"""`DeviceJob`, a job on a device that is recorded on disk: submitted once, followed, and found again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...checks import check_flags
from ...circuits import Loader
from ...errors import ArgumentError, BackendUnavailable, FallbackWarning, JobTimeout, StorageError
from ...storage import write_frame
from ..base import JobState, JobStatus
from ..counts import RowCounts
from ..requests import MitigatedRowRequest, Request, RowRequest
from .budget import Confirm, billed_job, check_confirm, recorded_guard, rest_cost
from .ledger import (
    find_records,
    has_program,
    is_being_sent,
    load_array,
    read_program,
    read_record,
    read_request,
    read_rows,
    save_array,
    update_record,
)
from .records import JobRecord, MitigatedRowsRecord, PartRecord, RowsRecord
from .remote import Gone, IBMRemote, Remote, Unreachable
from .submission import (
    PATIENCE_S,
    check_waiting,
    is_unsent,
    may_arrive,
    never_arrived,
    post_part,
    renew_parts,
    status_line,
    submit_parts,
)

FIRST_POLL_DELAY_S, LAST_POLL_DELAY_S = 1.0, 30.0
"""Between two questions about a waiting job: the delay grows from the first value to the last."""

MAX_RESULT_FETCHES = 4
"""How often results are fetched before giving up: an answer can be cut short."""


GONE = "IBM has no job {id} for this account: it was deleted, or belongs to another account or instance"
"""Why a job is gone."""


@dataclass(frozen=True)
class Cancellation:
    """What came of a request to cancel a job.

    Parameters
    ----------
    tag : str
        The job's.
    status : JobStatus
        Of the whole job, afterwards.
    cancelled : tuple of int
        Parts that were cancelled, or that will now not be sent.
    measured : tuple of int
        Parts that had run: their outcomes are kept.
    others : tuple of int
        Parts that ended without a result, and parts that could not be cancelled now.
    problems : tuple of str
        Why not.

    Examples
    --------
    >>> print(Cancellation("qtx-1", JobStatus(JobState.CANCELLED), (1, 2), (0,), (), ()))
    qtx-1 is cancelled: 2 of its 3 parts were cancelled, 1 had run and is kept
    """

    tag: str
    status: JobStatus
    cancelled: tuple[int, ...]
    measured: tuple[int, ...]
    others: tuple[int, ...]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        count = len(self.cancelled) + len(self.measured) + len(self.others)
        if count == 1:
            return f"{self.tag} is {self.status}"
        text = f"{self.tag} is {self.status.state}: {len(self.cancelled)} of its {count} parts were cancelled"
        if self.measured:
            text += f", {len(self.measured)} had run and {'are' if len(self.measured) > 1 else 'is'} kept"
        if self.others:
            text += f", {len(self.others)} ended before or could not be cancelled"
        return "; ".join((text, *self.problems))


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
    patience : float
        Seconds for which a server that gives no answer, or takes no more jobs, is asked again.
    """

    def __init__(
        self,
        path: Path,
        connect: Callable[[], Remote],
        request: Request | None = None,
        patience: float = PATIENCE_S,
    ):
        self.path = path
        self.patience = patience
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
        answers: dict[str, tuple[str, JobStatus]] = {}
        for part in self.record.parts:
            id = part.id
            if not id and (part.attempted or not has_program(self.path)):
                id = next(iter(self.remote().lookup(part.tag)), None)
            if id and (not part.state.ended or part.state == JobState.GONE or not part.id):
                answers[part.tag] = id, self._ask(id)

        def learn(record: JobRecord) -> None:
            for part in record.parts:
                if part.tag in answers and part.state != JobState.DONE:
                    part.id, answer = answers[part.tag]
                    part.state, part.reason = answer.state, answer.reason
                    part.charged_seconds = answer.charged_seconds

        record = update_record(self.path, learn) if answers else self.record
        last = max(
            (answer for _, answer in answers.values()),
            key=lambda answer: (answer.state == JobState.QUEUED, answer.position or 0),
            default=JobStatus(JobState.DONE),
        )
        return replace(record.status, position=last.position, pending=last.pending)

    def settle(self) -> None:
        """Ask the server what it charged for the job's parts, and write that into the record.

        A part that the server does not list, `submission.NEVER_ARRIVED_S` after it was posted, costs nothing,
        unless a process is sending the job just now.

        Raises
        ------
        BackendUnavailable
            If the server cannot be asked.
        StorageError
            If the record cannot be read or written.
        """
        if billed_job(self.record).settled:
            return
        if any(part.may_cost and not (part.id and part.state.ended) for part in self.record.parts):
            self.status()
        charges = {
            part.tag: self._ask(part.id).charged_seconds
            for part in self.record.parts
            if part.charged_seconds is None and part.id and part.state.ended
        }
        being_sent = is_being_sent(self.path)

        def write(record: JobRecord) -> None:
            for part in record.parts:
                if part.charged_seconds is None:
                    never = never_arrived(part) and not being_sent
                    part.charged_seconds = 0.0 if never else charges.get(part.tag)

        update_record(self.path, write)

    def _ask(self, id: str) -> JobStatus:
        """Where one of the server's jobs is."""
        try:
            return self.remote().status(id)
        except Gone:
            return JobStatus(JobState.GONE, reason=GONE.format(id=id))

    def outcomes(
        self,
        timeout: float | None = None,
        *,
        progress: bool | Callable[[JobStatus], None] = True,
        patience: float | None = None,
    ) -> np.ndarray:
        """Wait for the job and fetch what was measured, once: it is kept beside the record.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait at most. None: as long as it takes.
        progress : bool or callable
            Whether to show state and place in the queue on stderr; or a function that is called with each
            `JobStatus`.
        patience : float, optional
            Seconds for which a server that cannot be reached is asked again; None: the job's own.

        Returns
        -------
        ndarray, uint8, (R, S, B)
            Bits packed as in `qiskit.primitives.BitArray`. Twirling may round the number of shots S up.

        Raises
        ------
        BackendUnavailable
            If a part failed, was cancelled, never arrived or is gone; if its results cannot be read; if the
            server cannot be reached for longer than `patience`, while the job goes on. The message names the
            tag, and says what was measured.
        StorageError
            If outcomes that were kept can neither be read nor fetched again; if they cannot be kept.
        JobTimeout
            If it is not done in time. It goes on.
        """
        check_waiting(timeout, patience, progress)
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
            for i, part in enumerate(self.record.parts):
                blocks.setdefault(part.start, []).append(self._part_outcomes(i, part))
        except BackendUnavailable as error:
            if broken is None:
                raise
            raise StorageError(f"{broken} They cannot be fetched again: {error}") from error
        rows = [np.concatenate(block, axis=1) for _, block in sorted(blocks.items())]
        outcomes = np.concatenate(rows)
        save_array(path, outcomes=outcomes)
        for i in range(len(self.record.parts)):
            with suppress(OSError):
                self._part_path(i).unlink(missing_ok=True)
        return outcomes

    def counts(self, timeout: float | None = None, *, partial: bool = False, **waiting: Any) -> RowCounts:
        """Wait for the job and count its outcomes; arguments and errors as for `outcomes`.

        `diagnostics` has the job's tag and id. Twirling may round the shots up: those beyond the requested
        number are left out, and `shots_run` is how many were run.

        Parameters
        ----------
        timeout : float, optional
            As for `outcomes`.
        partial : bool
            Whether to take what there is, once every part of a split job has ended or certainly was not sent,
            or at the end of `timeout`. Then `diagnostics` has `missing_rows`, the rows of which shots are
            missing, `shots_by_row`, and `missing`, which says why. `send_rest` sends the others later.
        **waiting
            `progress` and `patience`, as for `outcomes`.

        Raises
        ------
        ArgumentError
            If the job did not measure plain rows, so that its outcomes alone are no counts of keys.
        """
        check_flags(partial=partial)
        check_waiting(timeout, **waiting)
        request = self.request()
        if not isinstance(request, RowRequest):
            kind = self.record.request.kind
            what = (
                f"Job {self.tag} ran circuits of the kind {kind!r}, not of rows alone: take its `outcomes`."
            )
            if isinstance(request, MitigatedRowRequest):
                what += f" `find_mitigated_calls()` finds its call {request.batch}, which makes the result."
            raise ArgumentError(what)
        if partial:
            self._wait(timeout, waiting.get("progress", True), waiting.get("patience"), partial=True)
            if self.record.status.state != JobState.DONE:
                return self._partial_counts(request)
        outcomes = self.outcomes(timeout, **waiting)
        result = request.finish(outcomes[:, : request.shots])
        facts = {**self._facts(), "shots_run": outcomes.shape[1]}
        return replace(result, diagnostics={**result.diagnostics, **facts})

    def _partial_counts(self, request: RowRequest) -> RowCounts:
        """Counts of the parts that were measured."""
        record = self.record
        blocks = [
            (part.start, self._part_outcomes(i, part)[:, : part.shots])
            for i, part in enumerate(record.parts)
            if part.state == JobState.DONE
        ]
        if not blocks:
            raise BackendUnavailable(f"Nothing of job {self.tag} was measured: it is {record.status}.")
        result = request.finish_partly(blocks)
        facts = {**self._facts(), "missing": self._missing(record)}
        return replace(result, diagnostics={**result.diagnostics, **facts})

    def _facts(self) -> dict[str, Any]:
        """Diagnostics of a result."""
        facts: dict[str, Any] = {"job": self.tag, "job_id": self.id}
        notes = self.record.submission_notes
        return {**facts, "submission": tuple(notes)} if notes else facts

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

    def missing_rows(self) -> tuple[int, ...]:
        """Rows of which shots are missing, as last known; circuits, where the job measures no plain rows.

        Raises
        ------
        StorageError
            If the record, or the rows beside it, cannot be read.
        """
        return self._rows_of(part for part in self.record.parts if part.state != JobState.DONE)

    def send_rest(
        self,
        *,
        again: bool = False,
        patience: float | None = None,
        progress: bool | Callable[[JobStatus], None] = True,
        confirm: Confirm = False,
    ) -> DeviceJob:
        """Send the parts that the server never got, and no other: each part is looked for by its tag before.

        It does nothing if there are none. Parts whose post was not answered are sent only when they have not
        been listed for 600 seconds (`submission.NEVER_ARRIVED_S`).

        Parameters
        ----------
        again : bool
            Whether to run parts again, too, that ended without a result because they failed, were cancelled
            or are gone. What IBM billed for them is billed once more.
        patience : float, optional
            Seconds to wait at most while the server takes no more jobs; None: the job's own.
        progress : bool or callable
            As for `outcomes`.
        confirm : bool or callable
            Parts that are run again, or that were refused, cost anew. Within the job's own limit and budget
            they are sent; beyond them only if this is True, or a function that returns it for their `Cost`.

        Returns
        -------
        DeviceJob
            This job.

        Raises
        ------
        CostError
            If what is to be sent anew exceeds a limit and is not confirmed. Nothing is sent.
        BackendUnavailable
            If another process is sending the job's parts now; if a part was refused, or if it is not known
            whether it was accepted; if the server takes no more jobs for longer than `patience`. Parts before
            it stay submitted.
        StorageError
            If the circuits were not kept, as for jobs of older versions of qtx_lab, or cannot be read.
        """
        check_confirm(confirm)
        check_flags(again=again)
        check_waiting(None, patience, progress)
        self.status()
        states = {JobState.FAILED, JobState.CANCELLED, JobState.GONE}
        record = self.record
        with recorded_guard(self.path, record).allow(rest_cost(record, states if again else set()), confirm):
            if again and any(part.state in states for part in record.parts):
                update_record(self.path, lambda record: renew_parts(record, states))
            if any(part.id is None for part in self.record.parts):
                circuit, bindings = read_program(self.path)

                def post(part: PartRecord) -> str:
                    return post_part(self.remote(), self.record, part, circuit, bindings)

                patience = self.patience if patience is None else patience
                submit_parts(self.path, self.remote, post, patience=patience, progress=progress)
        return self

    def cancel(self) -> Cancellation:
        """Cancel every part that has not ended, and send none of those that were not sent yet.

        Parts that have run are kept: `counts(partial=True)` gives them.

        Returns
        -------
        Cancellation
            Which parts were cancelled.

        Raises
        ------
        BackendUnavailable
            If nothing was cancelled, because the job has ended, no job with its tag is on the server, or the
            server cannot be asked.
        """
        self.status()
        before = self.record
        problems: list[str] = []
        asked = [part for part in before.parts if part.id and not part.state.ended]
        for part in asked:
            try:
                self.remote().cancel(str(part.id))
            except BackendUnavailable as error:  # the others are cancelled all the same
                problems.append(str(error))
        unsent = {part.tag for part in before.parts if is_unsent(part) and has_program(self.path)}

        def leave_out(record: JobRecord) -> None:
            for part in record.parts:
                if part.tag in unsent and is_unsent(part):
                    part.state, part.reason = JobState.CANCELLED, "cancelled before it was sent"

        if unsent:
            update_record(self.path, leave_out)
        try:
            status = self.status()
        except BackendUnavailable as error:
            status = self.last_known
            problems.append(str(error))
        states = [part.state for part in self.record.parts]
        tried = {part.tag for part in asked} | unsent
        cancelled = tuple(
            i for i, part in enumerate(before.parts) if part.tag in tried and states[i] == JobState.CANCELLED
        )
        measured = tuple(i for i, state in enumerate(states) if state == JobState.DONE)
        if not cancelled:
            raise BackendUnavailable(
                " ".join([f"Job {self.tag} cannot be cancelled: it is {status}.", *problems])
            )
        others = tuple(i for i in range(len(states)) if i not in cancelled + measured)
        return Cancellation(self.tag, status, cancelled, measured, others, tuple(problems))

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

    def _wait(
        self,
        timeout: float | None,
        progress: bool | Callable[[JobStatus], None],
        patience: float | None,
        partial: bool = False,
    ) -> None:
        """Return when the job is done or, if a part is enough, when no more comes; errors as `outcomes`."""
        patience = self.patience if patience is None else patience
        start = last_answer = time.monotonic()
        delay = FIRST_POLL_DELAY_S
        with status_line(self.path, progress) as show:
            while True:
                try:
                    status, last_answer = self.status(), time.monotonic()
                    self._keep_measured()
                except Unreachable as error:
                    if time.monotonic() - last_answer > patience:
                        raise BackendUnavailable(
                            f"{error} Job {self.tag} goes on; `qtx-lab jobs` finds it again."
                        ) from error
                    status = JobStatus(self.last_known.state, reason=str(error))
                show(status)
                if status.state == JobState.DONE or (partial and not self._is_coming()):
                    return
                if not partial:
                    self._check_alive(status)
                left = np.inf if timeout is None else start + timeout - time.monotonic()
                if left <= 0 and partial:
                    return
                if left <= 0:
                    raise JobTimeout(f"Job {self.tag} is {status} after {timeout:g} s; it goes on.")
                time.sleep(min(delay, left))
                delay = min(delay * 1.5, LAST_POLL_DELAY_S)

    def _keep_measured(self) -> None:
        """Fetch the parts of a split job that are done, while others wait: they might be deleted."""
        parts = self.record.parts
        if len(parts) == 1 or all(part.state == JobState.DONE for part in parts):
            return
        for i, part in enumerate(parts):
            if part.state == JobState.DONE and not self._part_path(i).exists():
                with suppress(BackendUnavailable):  # it is fetched again when it is needed
                    self._part_outcomes(i, part)

    def _is_coming(self) -> bool:
        """Whether a part may still change its state by itself."""
        return any(
            may_arrive(self.path, part) if part.id is None else not part.state.ended
            for part in self.record.parts
        )

    def _check_alive(self, status: JobStatus) -> None:
        """Raise BackendUnavailable where waiting is of no use."""
        if status.state.ended:
            raise BackendUnavailable(
                f"Job {self.tag} on {self.record.device} has ended as {status}.{self._cure()}"
            )
        lost = [part for part in self.record.parts if part.state == JobState.RECORDED]
        if not lost or any(may_arrive(self.path, part) for part in lost):
            return
        if any(part.attempted or not has_program(self.path) for part in lost):
            raise BackendUnavailable(
                f"Job {self.tag} is recorded, but no job with this tag is on the server: it never "
                f"arrived, or is not listed yet. Nothing was submitted again.{self._cure()}"
            )
        raise BackendUnavailable(
            f"Job {self.tag} is recorded, but {len(lost)} of its {len(self.record.parts)} parts were never "
            f"sent.{self._cure()}"
        )

    def _cure(self) -> str:
        """What can be done about a job that will not be done by itself; begins with a space."""
        record = self.record
        cures = []
        if any(part.state == JobState.DONE for part in record.parts):
            cures.append("`counts(partial=True)` gives what was measured")
        if has_program(self.path) and any(is_unsent(part) for part in record.parts):
            cures.append("`send_rest()` sends what was not sent")
        return f" {self._missing(record)}; {'; '.join(cures)}." if cures else ""

    def _missing(self, record: JobRecord) -> str:
        """Which rows are missing, and why."""
        parts = [part for part in record.parts if part.state != JobState.DONE]
        states = ", ".join(dict.fromkeys(f"{part.state}" for part in parts))
        text = f"{len(parts)} of {len(record.parts)} parts are missing ({states})"
        what = "row" if isinstance(record.request, RowsRecord | MitigatedRowsRecord) else "circuit"
        with suppress(StorageError):  # then the rows are not known
            text += f", with {_spans(what, self._rows_of(parts))}"
        return text

    def _rows_of(self, parts: Iterable[PartRecord]) -> tuple[int, ...]:
        """Rows, among all that were asked for, that some parts run."""
        circuits = sorted({i for part in parts for i in range(part.start, part.stop)})
        p = read_rows(self.path, self.record)
        if p is None:
            return tuple(circuits)
        return tuple((p.sum(-1) > 0).nonzero()[circuits, 0].tolist())

    def _part_path(self, i: int) -> Path:
        """Where the outcomes of a part are kept until all are there."""
        return self.path.with_suffix(f".outcomes-{i}.npz")

    def _part_outcomes(self, i: int, part: PartRecord) -> np.ndarray:
        """The outcomes of a part that is done: those that are kept, or else the server's, which are kept."""
        path = self._part_path(i)
        if path.exists():
            with suppress(StorageError):  # it is fetched again
                outcomes = load_array(path, "outcomes")
                if self._fits(outcomes, part):
                    return outcomes
        outcomes = self._fetch(part)
        if len(self.record.parts) > 1:
            save_array(path, outcomes=outcomes)
        return outcomes

    def _mark_gone(self, part: PartRecord) -> None:
        """Write down that the server has no such job any more."""

        def change(record: JobRecord) -> None:
            for other in record.parts:
                if other.id == part.id:
                    other.state, other.reason = JobState.GONE, GONE.format(id=part.id)

        update_record(self.path, change)

    def _fits(self, outcomes: np.ndarray, part: PartRecord) -> bool:
        """Whether these are packed bits of all that the part was to run."""
        if outcomes.ndim != 3 or outcomes.dtype != np.uint8 or not outcomes.shape[2]:
            return False
        if has_program(self.path) and outcomes.shape[2] != -(-read_program(self.path)[0].num_clbits // 8):
            return False
        return outcomes.shape[0] == part.stop - part.start and outcomes.shape[1] >= part.shots

    def _fetch(self, part: PartRecord) -> np.ndarray:
        """The outcomes of a part that is done, checked against what it was to run."""
        for attempt in range(MAX_RESULT_FETCHES):
            try:
                outcomes = self.remote().outcomes(str(part.id))
                break
            except Gone as error:
                self._mark_gone(part)
                raise BackendUnavailable(
                    f"The results of job {self.tag} are gone: {GONE.format(id=part.id)}.{self._cure()}"
                ) from error
            except Unreachable as error:
                if attempt == MAX_RESULT_FETCHES - 1:
                    raise BackendUnavailable(
                        f"The results of job {self.tag} ({part.id}) cannot be fetched: {error} "
                        "They stay on the server; try again."
                    ) from error
                time.sleep(FIRST_POLL_DELAY_S)
        if not self._fits(outcomes, part):
            rows, shape = part.stop - part.start, " × ".join(map(str, outcomes.shape))
            raise BackendUnavailable(
                f"The results of job {self.tag} ({part.id}) are {shape} numbers of {outcomes.dtype}, in "
                f"place of the packed bits of {rows} rows × {part.shots} shots, which were submitted."
            )
        return outcomes


def _spans(what: str, numbers: Sequence[int]) -> str:
    """Numbers in words.

    >>> _spans("row", [0, 1, 2, 3, 7, 9, 10])
    'rows 0 to 3, 7, 9 to 10'
    """
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    texts = [str(first) if first == last else f"{first} to {last}" for first, last in spans]
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(texts)}"


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
        account = (record.provider, record.account, record.instance, record.region)
        if account not in remotes:
            remotes[account] = IBMRemote(
                service, account=record.account, instance=record.instance, region=record.region
            )
        return remotes[account]

    jobs = [
        (record.recorded, DeviceJob(path, partial(connect, record)))
        for path, record in find_records(home, tag)
    ]
    return [job for _, job in sorted(jobs, key=lambda item: (item[0], item[1].tag), reverse=True)]
