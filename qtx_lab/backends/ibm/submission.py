"""Sending the parts of a recorded job to a device: each part once, whatever the server answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from qiskit import QuantumCircuit

from ...checks import check_number, check_progress
from ...errors import BackendUnavailable
from ..base import JobState, JobStatus
from .budget import spent_seconds
from .ledger import has_program, is_being_sent, read_record, sending, update_record
from .records import JobRecord, PartRecord
from .remote import Busy, DeviceAccess, Refused, Remote, SessionClosed

PATIENCE_S = 600.0
"""For how long a server that gives no answer, or takes no more jobs, is asked again by default."""

LISTING_LAG_S = 30.0
"""For how long a job that was accepted may be missing from the server's listing."""

REFUSAL_CHECK_S = 2.0
"""For how long a refused job is looked for: a gateway may refuse what the server behind it accepted."""

FIRST_RETRY_DELAY_S, LAST_RETRY_DELAY_S = 5.0, 60.0
"""Between two posts of a part while the server takes no more jobs."""

NEVER_ARRIVED_S = 600.0
"""After how long a posted part that is still not listed certainly never arrived, and may be sent again."""


def check_waiting(timeout: Any = None, patience: Any = None, progress: object = True) -> None:
    """Refuse a timeout or a patience that is no number of seconds, and a progress that is no answer.

    None stands for a value that is decided elsewhere; an infinite timeout or patience waits for ever.

    Raises
    ------
    ArgumentError, DtypeError
        Before anything is recorded, sent or waited for.
    """
    for name, seconds in (("timeout", timeout), ("patience", patience)):
        if seconds is not None and not (isinstance(seconds, float) and seconds == math.inf):
            check_number(name, seconds, least=0)
    check_progress(progress)


def post_part(
    remote: Remote, record: JobRecord, part: PartRecord, circuit: QuantumCircuit, bindings: np.ndarray
) -> str:
    """Post a part of a recorded job by IBM's client, and return the server's id of it."""
    mode = record.mode if record.mode in ("batch", "session") else "job"
    return remote.post(
        DeviceAccess(record.device, record.fractional_gates, mode),  # type: ignore[arg-type]
        circuit,
        bindings[part.start : part.stop],
        part.shots,
        tags=[record.tag, part.tag],
        options=record.options,
    )


def submit_parts(
    path: Path,
    remote: Callable[[], Remote],
    post: Callable[[PartRecord], str],
    *,
    patience: float = PATIENCE_S,
    progress: bool | Callable[[JobStatus], None] = False,
) -> None:
    """Submit each part of a recorded job that the server does not have, once.

    A part is marked in the record before it is posted. It is posted again only where the server certainly
    refused it, because of a limit or of a session that was closed, and where its tag is not listed. Where the
    answer does not say whether it was accepted, it is looked for by its tag for `LISTING_LAG_S` seconds,
    since a listing may lag. If it is not found, nobody knows, and it stays recorded: a second post might be a
    second job.

    Parameters
    ----------
    path : Path
        The job's record.
    remote : callable
        Returns the server, which is asked for tags.
    post : callable
        Posts a part, with its tag, and returns the server's id. Raises `Refused` where there is certainly no
        job.
    patience : float
        Seconds to wait at most while the server takes no more jobs.
    progress : bool or callable
        Whether to show on stderr that the server takes no more jobs; or a function that is called with a
        `JobStatus`.

    Raises
    ------
    BackendUnavailable
        If a part was refused; if it is not known whether it was accepted; if the server took no more jobs for
        longer than `patience`; if another process is sending parts of this job. Parts before it stay
        submitted.
    """
    with sending(path) as nobody_else, status_line(path, progress) as show:
        if not nobody_else:
            raise BackendUnavailable(
                f"The parts of job {path.stem} are being sent by another process just now."
            )
        for i, part in enumerate(read_record(path).parts):
            if part.id is None and part.state != JobState.CANCELLED:
                _PartSubmission(path, i, remote, post, patience, show).send()


class _PartSubmission:
    """The sending of part `i` of a recorded job; the other arguments are those of `submit_parts`.

    `show` shows a status while the server takes no more jobs.
    """

    def __init__(
        self,
        path: Path,
        i: int,
        remote: Callable[[], Remote],
        post: Callable[[PartRecord], str],
        patience: float,
        show: Callable[[JobStatus], None],
    ):
        self.path, self.i, self.remote, self.post = path, i, remote, post
        self.patience, self.show = patience, show
        self.part = read_record(path).parts[i]
        self.busy_since: float | None = None
        self.retry_delay = FIRST_RETRY_DELAY_S
        self.reopened = False

    @property
    def tag(self) -> str:
        """The job's tag."""
        return self.path.stem

    def send(self) -> None:
        """Post the part until the server has it, or it is cancelled; errors as `submit_parts`."""
        id = self._id_of_earlier_post()
        while id is None:
            if not self._may_post():
                return
            try:
                id = self.post(self.part)
            except Exception as error:
                id = self._id_after_error(error)
        self._write(id=id, state=JobState.SUBMITTED, reason=None)

    def _may_post(self) -> bool:
        """Mark the part as posted, unless another thread or process has cancelled it meanwhile."""

        def attempt(record: JobRecord) -> None:
            part = record.parts[self.i]
            if part.state != JobState.CANCELLED:
                part.attempted, part.state = datetime.now(UTC), JobState.RECORDED
                part.reason, part.charged_seconds = None, None

        return update_record(self.path, attempt).parts[self.i].state != JobState.CANCELLED

    def _id_of_earlier_post(self) -> str | None:
        """The server's id, where an earlier post of the part was accepted; None where it may be posted."""
        part = self.part
        if part.attempted is None:
            return None
        age = (datetime.now(UTC) - part.attempted).total_seconds()
        id = self._listed_id(0.0, must_answer=True)
        if id is None and age < NEVER_ARRIVED_S and part.state != JobState.FAILED:
            raise BackendUnavailable(
                f"Whether part {self.i} of job {self.tag} was accepted {age:.0f} s ago is not known: none "
                f"with its tag is listed. It can be sent {NEVER_ARRIVED_S - age:.0f} s from now, if it is "
                "not listed until then."
            )
        return id

    def _id_after_error(self, error: Exception) -> str | None:
        """The server's id, where the part was accepted in spite of an error; None to post it again."""
        refused = isinstance(error, Refused)
        id = self._listed_id(min(LISTING_LAG_S, REFUSAL_CHECK_S) if refused else LISTING_LAG_S)
        if id is not None:
            return id
        if not refused:
            raise BackendUnavailable(
                f"{error} Whether job {self.tag} was accepted is not known: none with its tag was listed for "
                f"{LISTING_LAG_S:g} s. It is recorded, and not submitted again: `qtx-lab jobs` looks for it."
            ) from error
        if isinstance(error, Busy):
            self._write(attempted=None)
            return self._wait_for_room(error)
        if isinstance(error, SessionClosed) and not self.reopened:
            self.reopened = True
            self._note("the Batch or Session was closed before all jobs were sent; another was opened")
            return None
        self._refuse(error)

    def _wait_for_room(self, error: Busy) -> str | None:
        """Sleep before the part is posted again; its id, where it was accepted after all."""
        if self.busy_since is None:
            self.busy_since = time.monotonic()
        while True:
            parts = read_record(self.path).parts
            if parts[self.i].state == JobState.CANCELLED:
                return None
            left = self.busy_since + self.patience - time.monotonic()
            if left <= 0:
                reason = f"the server took no more jobs for {self.patience:g} s"
                self._write(reason=reason)
                self._note(reason)
                raise BackendUnavailable(
                    f"{error} Job {self.tag}: {self.i} of its {len(parts)} parts were submitted, and "
                    f"{reason}. The others are recorded: `find_jobs()` finds the job, and its `send_rest()` "
                    "sends them."
                ) from error.__cause__
            pause = min(self.retry_delay, left)
            self.show(
                JobStatus(
                    JobState.RECORDED,
                    reason=f"the server takes no more jobs now; {self.i} of {len(parts)} parts are sent; "
                    f"trying again in {pause:.0f} s, for {left:.0f} s at most",
                )
            )
            time.sleep(pause)
            self.retry_delay = min(2 * self.retry_delay, LAST_RETRY_DELAY_S)
            with suppress(BackendUnavailable):  # without an answer nothing is posted
                id = self._listed_id(0.0, must_answer=True)
                waited = time.monotonic() - self.busy_since
                self._note(f"the server took no more jobs for {waited:.0f} s before part {self.i}")
                return id

    def _refuse(self, error: Exception) -> NoReturn:
        """Record that the part was refused, and that those after it are not sent."""

        def refuse(record: JobRecord) -> None:
            part, *later = record.parts[self.i :]
            part.state, part.reason = JobState.FAILED, f"{error} Nothing was submitted."
            for other in later:
                if other.id is None and other.state != JobState.CANCELLED:
                    other.state = JobState.FAILED
                    other.reason = "not submitted, since a part before it was refused"

        parts = update_record(self.path, refuse).parts
        sent = sum(part.id is not None for part in parts)
        what = f"{sent} of its {len(parts)} parts were submitted" if sent else "nothing was submitted"
        cure = "; `send_rest()` sends the others" if has_program(self.path) else ""
        raise BackendUnavailable(f"{error} Job {self.tag}: {what}{cure}.") from error.__cause__

    def _listed_id(self, seconds: float, *, must_answer: bool = False) -> str | None:
        """The server's id of the part, as soon as it is listed; None where it is not, or nothing answers.

        The last look begins when `seconds` have passed, however long the looks before it took.

        Raises
        ------
        BackendUnavailable
            If there has to be an answer, and was none.
        """
        end, delay, problem = time.monotonic() + seconds, 0.1, None
        while True:
            last = time.monotonic() >= end
            try:
                ids = self.remote().lookup(self.part.tag)
                if ids:
                    return ids[0]
                problem = None
            except BackendUnavailable as error:
                problem = error
            if last:
                if must_answer and problem:
                    raise problem
                return None
            time.sleep(min(delay, max(0.0, end - time.monotonic())))
            delay = min(2 * delay, 5.0)

    def _write(self, **fields: Any) -> None:
        """Write fields of the part down."""

        def change(record: JobRecord) -> None:
            for name, value in fields.items():
                setattr(record.parts[self.i], name, value)

        update_record(self.path, change)

    def _note(self, text: str) -> None:
        """Write down what was unusual about the submission."""

        def change(record: JobRecord) -> None:
            if text not in record.submission_notes:
                record.submission_notes.append(text)

        update_record(self.path, change)


def is_unsent(part: PartRecord) -> bool:
    """Whether it is certain that the server has no job of this part, and that one may be sent."""
    refused = part.state == JobState.FAILED
    return part.id is None and (refused or (part.state == JobState.RECORDED and part.attempted is None))


def may_arrive(path: Path, part: PartRecord) -> bool:
    """Whether a part without an id may be listed soon, or is about to be sent; `path` is the job's record."""
    if part.state.ended:
        return False
    if has_program(path) and part.attempted is None:
        return is_being_sent(path)
    since = part.attempted or read_record(path).recorded
    return (datetime.now(UTC) - since).total_seconds() < LISTING_LAG_S


def never_arrived(part: PartRecord) -> bool:
    """Whether a part was posted so long ago that the server, which does not list it, certainly has no job."""
    if part.id or part.attempted is None:
        return False
    return part.attempted < datetime.now(UTC) - timedelta(seconds=NEVER_ARRIVED_S)


def renew_parts(record: JobRecord, states: Collection[JobState]) -> None:
    """Give parts that ended in these states new tags, under which they are sent again."""
    for i, part in enumerate(record.parts):
        if part.state in states and (part.id or part.state == JobState.CANCELLED):
            part.earlier_seconds = spent_seconds(record, part)
            part.charged_seconds = None
            part.earlier_ids = [*part.earlier_ids, part.id] if part.id else part.earlier_ids
            part.tag = f"{record.tag}.{i}.{len(part.earlier_ids)}"
            part.id, part.state, part.reason, part.attempted = None, JobState.RECORDED, None, None


@contextmanager
def status_line(
    path: Path, progress: bool | Callable[[JobStatus], None]
) -> Iterator[Callable[[JobStatus], None]]:
    """Give a function that shows a status of the job recorded at `path`.

    It does so on one line of stderr, which it writes again and again, or in the caller's own way.
    """
    if not isinstance(progress, bool):
        yield progress
        return
    from tqdm.auto import tqdm

    line: tqdm[Any] | None = None

    def show(status: JobStatus) -> None:
        nonlocal line
        if line is None:  # nothing is shown before there is something to say
            line = tqdm(bar_format="{desc} [{elapsed}]", disable=not progress, leave=False)
        line.set_description_str(f"{path.stem} on {read_record(path).device}: {status}")

    try:
        yield show
    finally:
        if line is not None:
            line.close()
