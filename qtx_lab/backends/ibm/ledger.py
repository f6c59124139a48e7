"""The ledger of device jobs: each is written down before it is submitted, submitted once, and found again by its tag."""

from __future__ import annotations

import io
import json
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ...errors import ArgumentError, BackendUnavailable, FallbackWarning, JobTimeout, StorageError
from ...storage import json_bytes, runs_home, storage_error, write_atomic, write_frame

if TYPE_CHECKING:
    from ...circuits import Loader
    from ..counts import RowCounts, RowRequest

ENDED = ("done", "failed", "cancelled")
STATES = ("recorded", "submitted", "queued", "running", *ENDED)
"""Of a job as a whole: that of its part which is furthest behind, but failed or cancelled as soon as one is."""

FIRST_POLL, LAST_POLL = 1.0, 30.0
"""Seconds between two questions about a waiting job: they grow from the first to the last."""

SETTLE = 30.0
"""Seconds for which a listing may lag: so long an accepted job may seem not to be there."""

FETCHES = 4
"""How often results are asked for before giving up: an answer can be cut short."""

RECORD: dict[str, Any] = {
    "tag": str,
    "recorded": str,
    "device": str,
    "circuits": int,
    "shots": int,
    "parts": list,
}
ROWS: dict[str, Any] = {"loader": str, "seed": int, "rows": int, "keys": int, "diagnostics": dict}
PART: dict[str, Any] = {
    "tag": str,
    "start": int,
    "stop": int,
    "shots": int,
    "state": str,
    "id": str | None,
    "reason": str | None,
}
"""What a record of a job must hold, what that of a job of rows too, and what each of its parts."""

ACCOUNT = ("provider", "instance", "region")
"""Texts that a record may hold."""


@dataclass(frozen=True)
class JobStatus:
    """Where a job is.

    Attributes
    ----------
    state : str
        recorded (written down; no job with its tag was seen on the server), submitted (accepted, not asked
        about since), queued, running, done, failed or cancelled.
    position : int or None
        Place in the queue, 1 the next, where the server says.
    reason : str or None
        Why it failed, or what is odd.
    pending : int or None
        Jobs that wait for the device, where the server gives no place.
    """

    state: str
    position: int | None = None
    reason: str | None = None
    pending: int | None = None

    def __str__(self) -> str:
        place = f", place {self.position}" if self.position is not None else ""
        place = place or (f", {self.pending} pending on the device" if self.pending is not None else "")
        return f"{self.state}{place}" + (f": {self.reason}" if self.reason else "")


class Remote(Protocol):
    """The machine that holds the jobs. Every method may raise BackendUnavailable."""

    def lookup(self, tag: str) -> list[str]:
        """Ids of the jobs with this tag, oldest first."""

    def status(self, id: str) -> JobStatus:
        """Where the job is; queued, running or ended."""

    def outcomes(self, id: str) -> np.ndarray:
        """Measured bits of a job that is done, uint8 (rows, shots, B), packed as in `BitArray`."""

    def cancel(self, id: str) -> None:
        """Cancel; no error where the job has ended already."""


class Unreachable(BackendUnavailable):
    """The server gave no usable answer; it may give one later."""


class Refused(Exception):
    """There is certainly no job: the server said no, or the request never left."""


def record_job(
    folder: Path, request: RowRequest | None, parts: Sequence[Mapping[str, Any]], **facts: Any
) -> Path:
    """Write a job down, durably, before anything of it is submitted.

    Parameters
    ----------
    folder : Path
        Where; made if missing.
    request : RowRequest or None
        Kept whole, so that counts can be made of the outcomes after a restart.
    parts : sequence of mappings
        `start`, `stop` (bound circuits) and `shots` of each job that the whole is split into.
    **facts
        provider, device, instance, region, circuits, shots, ...: what is needed to fetch the results.

    Returns
    -------
    Path
        `<folder>/<tag>.json`.

    Raises
    ------
    StorageError
        If it cannot be written. Then nothing may be submitted.
    """
    now = datetime.now(UTC)
    tag = f"qtx-{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(6)}"
    record = {"tag": tag, "recorded": now.isoformat(timespec="milliseconds"), **facts}
    if request is not None:
        rows, keys = request.p.shape
        record |= {"rows": rows, "keys": keys, "loader": request.loader.name, "seed": request.seed}
        record["diagnostics"] = dict(request.diagnostics)
    record["parts"] = [
        {"tag": f"{tag}.{i}", **part, "id": None, "state": "recorded", "reason": None}
        for i, part in enumerate(parts)
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    if request is not None:
        _save_arrays(folder / f"{tag}.rows.npz", p=request.p.numpy())
    write_atomic(folder / f"{tag}.json", json_bytes(record))  # last: a record that can be seen is whole
    return folder / f"{tag}.json"


class Job:
    """A handle on a recorded job. It holds no state but the record's path: any process can make another.

    Parameters
    ----------
    path : Path
        The record.
    connect : callable
        Gives the `Remote`; called when the server is first needed.
    request : RowRequest, optional
        What was asked; read from the record where None.
    """

    def __init__(self, path: Path, connect: Callable[[], Remote], request: RowRequest | None = None):
        self.path = path
        self._connect = cache(connect)
        self._request = request

    @property
    def record(self) -> dict[str, Any]:
        """What is written down, with the state last known."""
        return _read(self.path)

    @property
    def tag(self) -> str:
        """What the job is found by, here and on the server."""
        return self.path.stem

    @property
    def id(self) -> str | None:
        """The server's id of the job, or of its parts, with commas; None before it is known."""
        ids = [part["id"] for part in self.record["parts"] if part["id"]]
        return ", ".join(ids) or None

    @property
    def last_known(self) -> JobStatus:
        """The status when the server was last asked; asks nobody."""
        return _overall(self.record["parts"])

    def status(self) -> JobStatus:
        """Ask the server where the job is; a job whose id is not known is looked up by its tag.

        Raises
        ------
        BackendUnavailable
            If the server cannot be asked. The record still has what was last known.
        """
        record, asked = self.record, []
        before = json_bytes(record)
        for part in record["parts"]:
            self._find(part)
            if part["id"] and part["state"] not in ENDED:
                now = self._connect().status(part["id"])
                part.update(state=now.state, reason=now.reason)
                asked.append(now)
        if json_bytes(record) != before:
            write_atomic(self.path, json_bytes(record))
        last = max(
            asked, key=lambda now: (now.state == "queued", now.position or 0), default=JobStatus("done")
        )
        return replace(_overall(record["parts"]), position=last.position, pending=last.pending)

    def outcomes(
        self,
        timeout: float | None = None,
        *,
        progress: bool | Callable[[JobStatus], None] = True,
        patience: float = 600.0,
    ) -> np.ndarray:
        """Wait for the job and fetch what was measured; kept beside the record, so fetched once.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait at most. None: as long as it takes.
        progress : bool or callable
            Show state and queue position on stderr, or hand each status to a function.
        patience : float
            Seconds for which a server that cannot be asked is asked again.

        Returns
        -------
        ndarray, uint8, (R, S, B)
            Bits packed as in `qiskit.primitives.BitArray`. Twirling may round the shots S up.

        Raises
        ------
        BackendUnavailable
            If it failed, was cancelled, never arrived, or its results cannot be read; if the server cannot be asked
            for longer than `patience`: then it goes on. Names the tag.
        StorageError
            If what was kept cannot be read and cannot be fetched again either; if nothing can be kept.
        JobTimeout
            If it is not done in time. It goes on.
        """
        kept, broken = self.path.with_suffix(".outcomes.npz"), None
        if kept.exists():
            try:
                return self._kept_outcomes(kept)
            except StorageError as error:
                broken = error
                warnings.warn(f"{error} It is fetched anew.", FallbackWarning, stacklevel=2)
        try:
            self._wait(timeout, progress, patience)
            parts = self.record["parts"]
            blocks: dict[int, list[np.ndarray]] = {}  # by first row; the shots of a block side by side
            for part in parts:
                blocks.setdefault(part["start"], []).append(self._fetch(part))
        except BackendUnavailable as error:
            if broken is None:
                raise
            raise StorageError(f"{broken} It cannot be fetched anew: {error}") from error
        rows = [np.concatenate(block, axis=1) for _, block in sorted(blocks.items())]
        outcomes = np.concatenate(rows)
        _save_arrays(kept, outcomes=outcomes)
        return outcomes

    def counts(self, timeout: float | None = None, **waiting: Any) -> RowCounts:
        """Wait for the job and count its outcomes; arguments and errors as for `outcomes`.

        `diagnostics` has the job's tag and id. Twirling rounds the shots up: those beyond what was asked are left
        out, and `shots_run` says how many ran.
        """
        request = self.request()
        outcomes = self.outcomes(timeout, **waiting)
        found = request.finish(outcomes[:, : request.shots])
        job = {"job": self.tag, "job_id": self.id, "shots_run": outcomes.shape[1]}
        return replace(found, diagnostics={**found.diagnostics, **job})

    def save_counts(self) -> Path:
        """Fetch the counts into `<tag>.parquet` beside the record: row, key (-1: discarded) and count, if not 0."""
        import pandas as pd

        found = self.counts()
        table = torch.cat([found.counts, found.discarded[:, None]], -1)
        row, key = table.nonzero(as_tuple=True)
        key_or_none = key.where(key < found.counts.shape[-1], -1)
        frame = pd.DataFrame(
            {"row": row.numpy(), "key": key_or_none.numpy(), "count": table[row, key].numpy()}
        )
        path = self.path.with_suffix(".parquet")
        write_frame(path, frame)
        return path

    def request(self, loader: Loader | None = None) -> RowRequest:
        """What was asked; `request().finish(outcomes())` makes counts.

        Parameters
        ----------
        loader : Loader, optional
            The one that was used, where another process used one that no name makes.

        Raises
        ------
        ArgumentError
            If circuits were run that are not of rows; if no loader has the recorded name.
        StorageError
            If the rows, kept beside the record, cannot be read.
        """
        if self._request is None:
            from ...circuits import make_loader
            from ..counts import RowRequest

            record = self.record
            if "loader" not in record:
                raise ArgumentError(f"Job {self.tag} ran circuits that are not of rows: take its `outcomes`.")
            kept = self.path.with_suffix(".rows.npz")
            p = torch.from_numpy(_load_array(kept, "p"))
            if p.shape != (record["rows"], record["keys"]) or p.dtype != torch.float64:
                raise StorageError(
                    f"{kept} does not hold the {record['rows']} rows of {record['keys']} keys."
                )
            notes = record["diagnostics"].items()
            diagnostics = {name: tuple(note) if isinstance(note, list) else note for name, note in notes}
            self._request = RowRequest(
                p, make_loader(loader or record["loader"]), record["shots"], record["seed"], diagnostics
            )
        return self._request

    def cancel(self) -> None:
        """Cancel what has not ended.

        Raises
        ------
        BackendUnavailable
            If it has ended, if no job with its tag is on the server, or if the server cannot be asked.
        """
        self.status()
        waiting = [part for part in self.record["parts"] if part["id"] and part["state"] not in ENDED]
        for part in waiting:
            self._connect().cancel(part["id"])
        status = self.status()
        if not waiting or status.state != "cancelled":
            raise BackendUnavailable(f"Job {self.tag} cannot be cancelled: it is {status}.")

    def __repr__(self) -> str:
        record = self.record
        size = f"{record['circuits']} circuits × {record['shots']} shots"
        return f"Job({self.tag!r}, {record['device']}, {size}, {_overall(record['parts']).state})"

    def _kept_outcomes(self, path: Path) -> np.ndarray:
        """The outcomes that were fetched before; StorageError where the file does not hold them."""
        outcomes, record = _load_array(path, "outcomes"), self.record
        rows = max(part["stop"] for part in record["parts"])
        fits = outcomes.ndim == 3 and len(outcomes) == rows and outcomes.shape[1] >= record["shots"]
        if not fits or outcomes.dtype != np.uint8:
            raise StorageError(f"{path} does not hold the outcomes of {rows} rows × {record['shots']} shots.")
        return outcomes

    def _is_fresh(self) -> bool:
        """Whether the job was recorded so recently that a listing may not show it yet."""
        recorded = datetime.fromisoformat(self.record["recorded"])
        return (datetime.now(UTC) - recorded).total_seconds() < SETTLE

    def _find(self, part: dict[str, Any]) -> None:
        """Look for a part whose id is not known, by its tag, even if it was refused."""
        if not part["id"]:
            ids = self._connect().lookup(part["tag"])
            if ids:
                part.update(id=ids[0], state="submitted", reason=None)

    def _wait(
        self, timeout: float | None, progress: bool | Callable[[JobStatus], None], patience: float
    ) -> None:
        """Until the job is done; errors as for `outcomes`."""
        start, pause, since_heard = time.monotonic(), FIRST_POLL, time.monotonic()
        with _shown(self, progress) as show:
            while True:
                try:
                    status, since_heard = self.status(), time.monotonic()
                except Unreachable as error:
                    if time.monotonic() - since_heard > patience:
                        raise BackendUnavailable(
                            f"{error} Job {self.tag} goes on; `qtx-lab jobs` finds it again."
                        ) from error
                    status = JobStatus(self.last_known.state, reason=str(error))
                show(status)
                if status.state == "done":
                    return
                if status.state in ENDED:
                    raise BackendUnavailable(
                        f"Job {self.tag} on {self.record['device']} has ended as {status}."
                    )
                if status.state == "recorded" and not self._is_fresh():
                    raise BackendUnavailable(
                        f"Job {self.tag} is recorded, but no job with this tag is on the server: it never "
                        "arrived, or is not listed yet. Nothing was submitted again."
                    )
                left = np.inf if timeout is None else start + timeout - time.monotonic()
                if left <= 0:
                    raise JobTimeout(f"Job {self.tag} is {status} after {timeout:g} s; it goes on.")
                time.sleep(min(pause, left))
                pause = min(pause * 1.5, LAST_POLL)

    def _fetch(self, part: Mapping[str, Any]) -> np.ndarray:
        """The outcomes of a part that is done, checked against what was asked."""
        for attempt in range(FETCHES):
            try:
                outcomes = self._connect().outcomes(part["id"])
                break
            except Unreachable as error:
                if attempt == FETCHES - 1:
                    raise BackendUnavailable(
                        f"The results of job {self.tag} ({part['id']}) cannot be fetched: {error} "
                        "They stay on the server; try again."
                    ) from error
                time.sleep(FIRST_POLL)
        rows = part["stop"] - part["start"]
        if outcomes.shape[0] != rows or outcomes.shape[1] < part["shots"]:
            raise BackendUnavailable(
                f"The results of job {self.tag} ({part['id']}) have {outcomes.shape[0]} rows × "
                f"{outcomes.shape[1]} shots; {rows} × {part['shots']} were asked."
            )
        return outcomes


def submit_parts(job: Job, post: Callable[[Mapping[str, Any]], str]) -> Job:
    """Submit each part of a recorded job, once.

    Whatever happens, a part is posted a single time. Where the answer does not say whether it was accepted,
    it is looked for by its tag for `SETTLE` seconds, since a listing may lag; if it is not found, nobody knows,
    and it is left recorded: a second post might be a second job.

    Parameters
    ----------
    job : Job
        Just recorded.
    post : callable
        Posts a part, with its tag, and gives the server's id. Raises `Refused` where there is certainly no job.

    Raises
    ------
    BackendUnavailable
        If a part was refused; if it is not known whether it was accepted. Parts before it stay submitted.
    """
    count = len(job.record["parts"])
    for i in range(count):
        record = job.record
        part = record["parts"][i]
        try:
            part["id"] = post(part)
        except Exception as error:
            refused = isinstance(error, Refused)
            # Even a refusal is looked into for a moment: a gateway may say no to what the server behind it took.
            part["id"] = _settled(job, part["tag"], min(SETTLE, 2.0) if refused else SETTLE)
            if not part["id"] and refused:
                part.update(state="failed", reason=f"{error} Nothing was submitted.")
                for later in record["parts"][i + 1 :]:
                    later.update(state="failed", reason="not submitted, since a part before it was refused")
                write_atomic(job.path, json_bytes(record))
                what = f"{i} of its {count} parts were submitted" if i else "nothing was submitted"
                raise BackendUnavailable(f"{error} Job {job.tag}: {what}.") from error.__cause__
            if not part["id"]:
                raise BackendUnavailable(
                    f"{error} Whether job {job.tag} was accepted is not known: none with its tag was listed for "
                    f"{SETTLE:g} s. It is recorded, and not submitted again: `qtx-lab jobs` looks for it."
                ) from error
        part["state"] = "submitted"
        write_atomic(job.path, json_bytes(record))
    return job


def _settled(job: Job, tag: str, seconds: float) -> str | None:
    """The id of the job with this tag, once it is listed; None where it is not, or nobody could be asked."""
    end, pause = time.monotonic() + seconds, 0.1
    while True:
        with suppress(BackendUnavailable):
            if ids := job._connect().lookup(tag):
                return ids[0]
        if time.monotonic() >= end:
            return None
        time.sleep(min(pause, max(0.0, end - time.monotonic())))
        pause = min(2 * pause, 5.0)


def find_jobs(home: str | Path | None = None, *, tag: str | None = None, service: Any = None) -> list[Job]:
    """All recorded jobs, newest first, of this process or any before it. Asks no server.

    A file that is not the record of a job is left out, with a warning that says why.

    Parameters
    ----------
    home : path, optional
        The folder of runs, see `runs_home`: jobs are in `<home>/jobs` and in each run's `jobs`.
    tag : str, optional
        Only those whose tag has this part.
    service : QiskitRuntimeService, optional
        Asked about the jobs; the account that the environment or disk has, where None.

    Returns
    -------
    list of Job
        `job.status()` asks the server, `job.counts()` waits and fetches, `job.cancel()` cancels.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     find_jobs(home)
    []
    """
    home = runs_home(home)
    connections: dict[tuple[Any, ...], Remote] = {}

    def connect(record: Mapping[str, Any]) -> Remote:
        key = tuple(record.get(name) for name in ("provider", "instance", "region"))
        if key not in connections:
            from .engine import IBMRemote

            connections[key] = IBMRemote(service, instance=key[1], region=key[2])
        return connections[key]

    jobs = []
    for path in {*home.glob("jobs/*.json"), *home.glob("*/jobs/*.json")}:
        if tag is None or tag in path.stem:
            try:
                record = _read(path)
            except StorageError as error:
                warnings.warn(str(error), stacklevel=2)  # a broken one costs only itself
                continue
            jobs.append((record["recorded"], Job(path, partial(connect, record))))
    return [job for _, job in sorted(jobs, key=lambda item: (item[0], item[1].tag), reverse=True)]


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        cause = _wrong(record, path.stem)
    except OSError as error:
        cause = f"cannot be read: {error.strerror or error}"
    except (ValueError, RecursionError):  # what is nested deeply, and is not ours
        cause = "is not readable JSON"
    if cause:
        raise StorageError(f"The job's record {path} {cause}.")
    return dict(record)


def _wrong(record: Any, tag: str) -> str | None:
    """What keeps a file's content from being the record of a job with this tag; None where it is one."""
    if not isinstance(record, dict):
        return "is not the record of a job"
    kinds = RECORD | (ROWS if "loader" in record else {})
    kinds |= {name: str | None for name in ACCOUNT if name in record}
    parts = record["parts"] if isinstance(record.get("parts"), list) else []
    for holder, needed in ((record, kinds), *((part, PART) for part in parts)):
        for name, kind in needed.items():
            if not isinstance(holder, dict) or name not in holder:
                return f"is not the record of a job: {name!r} is missing"
            if not isinstance(holder[name], kind):
                return f"is not the record of a job: {name!r} is {str(holder[name])[:60]!r}"
        if holder.get("state", "done") not in STATES:
            return f"has the state {holder['state']!r}; allowed are {', '.join(STATES)}"
    if not parts or record["tag"] != tag:
        return "holds another record"
    try:
        aware = datetime.fromisoformat(record["recorded"]).tzinfo is not None
    except ValueError:
        aware = False
    return None if aware else f"has recorded={record['recorded']!r}, which is no time with a zone"


def _overall(parts: Sequence[Mapping[str, Any]]) -> JobStatus:
    """Of all parts: failed or cancelled as soon as one is, else that of the one furthest behind."""
    states = [part["state"] for part in parts]
    reasons = "; ".join(dict.fromkeys(part["reason"] for part in parts if part["reason"]))
    for state in ("failed", "cancelled", *STATES):
        if state in states:
            return JobStatus(state, reason=reasons or None)
    raise AssertionError(f"{states} are none of {STATES}: `_read` lets no such record through")


def _save_arrays(path: Path, **arrays: np.ndarray) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    write_atomic(path, content.getvalue())


def _load_array(path: Path, name: str) -> np.ndarray:
    """One array of a file that `_save_arrays` made; StorageError where there is none."""
    try:
        with np.load(path) as content:
            return np.asarray(content[name])
    except Exception as error:  # numpy, zipfile and zlib each have errors of their own for junk
        cause = (error.strerror if isinstance(error, OSError) else None) or "it is damaged, or another file"
        raise StorageError(f"Cannot read {path}: {cause}.") from error


@contextmanager
def _shown(job: Job, progress: bool | Callable[[JobStatus], None]) -> Iterator[Callable[[JobStatus], None]]:
    """A function that shows a status: as a line that is rewritten, or as the caller wants it."""
    if not isinstance(progress, bool):
        yield progress
        return
    from tqdm.auto import tqdm

    with tqdm(bar_format="{desc} [{elapsed}]", disable=not progress, leave=False) as line:
        yield lambda status: line.set_description_str(f"{job.tag} on {job.record['device']}: {status}")
