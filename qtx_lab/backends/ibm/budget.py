"""What may be sent: a limit for each call, and a budget that all processes of a folder of runs share."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ...checks import check_number
from ...errors import ArgumentError, CostError, StorageError
from ...storage import json_bytes, runs_home, storage_error, write_atomic
from ..base import JobState
from ..costs import BilledJob, Cost, RunCost, in_seconds
from .ledger import find_records
from .records import JobRecord, PartRecord

Confirm = bool | Callable[[Cost], bool]
"""Whether a call above a limit is sent all the same: True, False, or a function that decides by its cost."""

SECONDS_PER_UNIT = {
    "s": 1.0,
    "sec": 1.0,
    "second": 1.0,
    "min": 60.0,
    "minute": 60.0,
    "h": 3600.0,
    "hour": 3600.0,
}
"""Units in which a budget can be written; a plural s is allowed."""

LOCK_PATIENCE_S = 60.0
"""For how long the ledger's lock is waited for. It is held while records are read, and never while asking."""

MAX_DAYS = 1_000_000
"""The longest time that a budget is for."""

ROUNDING_S = 1e-6
"""Quantum seconds that only the rounding of sums makes."""


@dataclass(frozen=True)
class Budget:
    """Quantum time that all recorded jobs together may take.

    Parameters
    ----------
    seconds : float
        The quantum time, >= 0.
    days : float or None
        Only jobs that were recorded in the last so many days count, and those that have not ended, as on
        IBM's Open Plan, which gives 10 minutes per 28 days; None: all jobs count. A job is recorded just
        before it is sent: one that waited in the queue leaves the budget that much earlier than IBM's plan.

    Examples
    --------
    >>> Budget.of("10 min per 28 days")
    Budget(seconds=600.0, days=28.0)
    >>> print(Budget.of(90))
    90 s
    """

    seconds: float
    days: float | None = None

    @classmethod
    def of(cls, given: Any) -> Budget:
        """The budget that a number of seconds, or a text as "10 min" or "10 min per 28 days", means.

        Raises
        ------
        ArgumentError
            If the text cannot be read, or the number is negative or not finite.
        NumberError
            If it is neither a text nor a number.
        """
        if isinstance(given, str):
            units = "|".join(sorted(SECONDS_PER_UNIT, key=len, reverse=True))
            pattern = rf"\s*(\d+\.?\d*)\s*({units})s?\s*(?:(?:per|/)\s*(\d+\.?\d*)\s*d(?:ays?)?\s*)?"
            match = re.fullmatch(pattern, given, re.IGNORECASE)
            if match is None:
                raise ArgumentError(
                    f"budget={given!r} is not allowed: it must be a number of seconds, or a text as "
                    "'10 min', '45 s', '1.5 h' or '10 min per 28 days'."
                )
            seconds = float(match[1]) * SECONDS_PER_UNIT[match[2].lower()]
            days = float(match[3]) if match[3] else None
            if days is not None and not 0 < days <= MAX_DAYS:
                raise ArgumentError(
                    f"budget={given!r} is not allowed: its days must be above 0, and {MAX_DAYS:,} at most."
                )
            if seconds == math.inf:
                raise ArgumentError(f"budget={given!r} is not allowed: it must be finite.")
            return cls(seconds, days)
        return cls(check_number("budget", given, least=0))

    def __str__(self) -> str:
        whole_minutes = self.seconds > 0 and self.seconds % 60 == 0
        size = f"{_decimal(self.seconds / 60)} min" if whole_minutes else f"{_decimal(self.seconds)} s"
        return size if self.days is None else f"{size} per {_decimal(self.days)} days"

    def counts(self, record: JobRecord) -> bool:
        """Whether a job counts: jobs that have not ended do, however old they are."""
        if record.provider != "ibm":
            return False
        if self.days is None or not all(part.state.ended for part in record.parts):
            return True
        return datetime.now(UTC) - record.recorded < timedelta(days=self.days)


def _decimal(x: float) -> str:
    """All digits of a number, without an exponent, so that a budget can be read from its text."""
    return np.format_float_positional(x, trim="-")


def check_confirm(given: object) -> None:
    """Refuse what is neither True, nor False, nor a function: a text as "no" would count as a yes."""
    if not isinstance(given, bool | np.bool_) and not callable(given):
        raise ArgumentError(
            f"confirm={given!r} is not allowed: it must be True, False, or a function that is called with "
            "the Cost and returns True or False."
        )


def check_limit(given: Any) -> float:
    """The limit of a call in seconds; anything but a positive number is refused."""
    if isinstance(given, float) and given == math.inf:
        return given
    return check_number("max_quantum_seconds", given, above=0)


# --- Leave to send ----------------------------------------------------------------------------------


class Hold:
    """Quantum time that a call has leave to send. With a budget it is on disk, where other processes see it.

    Its file is locked as long as its process lives, so that what a killed process held is free again.

    Attributes
    ----------
    allowed : float
        Quantum seconds that the call has leave for, in all.
    left : float
        Those that are not sent yet.
    """

    def __init__(self, guard: CostGuard):
        self.guard = guard
        self.allowed = self.left = 0.0
        self._path: Path | None = None
        self._lock: FileLock | None = None

    def add(self, seconds: float, folder: Path | None) -> None:
        """Give leave for more. With a folder, it is written there."""
        if folder is not None and self._path is None:
            self._path = folder / f"{secrets.token_hex(8)}.json"
            self._lock = FileLock(self._path.with_suffix(".lock"), timeout=0, thread_local=False)
            self._lock.acquire()
        self.allowed += seconds
        self.left += seconds
        self._write()

    @contextmanager
    def recorded(self, seconds: float) -> Iterator[None]:
        """Inside the `with` so much of it is recorded as a job, and counts there from then on.

        Whoever adds up the budget meanwhile counts either the leave or the job.
        """
        home = self.guard.home()
        with _locked(home) if self._path is not None else nullcontext():
            yield
            self.left = max(0.0, self.left - seconds)
            self._write()

    def close(self) -> None:
        """Give back what was not sent."""
        if self._path is not None and self._lock is not None:
            self._path.unlink(missing_ok=True)
            self._lock.release()
            with suppress(OSError):
                self._path.with_suffix(".lock").unlink()

    def _write(self) -> None:
        if self._path is not None:
            write_atomic(self._path, json_bytes({"quantum_seconds": self.left}))


_HOLDS: ContextVar[tuple[Hold, ...]] = ContextVar("_HOLDS", default=())
"""The holds of the calls that are being made in this thread, the outermost first."""


class CostGuard:
    """Gives calls leave to send, within a limit for each call and a budget for all of them.

    The budget counts what IBM charged for the jobs recorded in the folder of runs, the estimates of those
    for which it has not told it, and what calls in any process have leave for and have not sent yet.

    Parameters
    ----------
    device : str
        Named in errors.
    max_quantum_seconds : float
        Most estimated quantum seconds of a call.
    budget : str, float or None
        See `Budget.of`.
    confirm : bool or callable
        Decides about calls above a limit. True is no leave to exceed the budget.
    run_dir : Path or None
        The folder of the run that gets the records.
    settle : callable
        Asks IBM what it charged, before a call is refused for the budget.
    home : Path or None
        The folder of runs, see `runs_home`.

    Raises
    ------
    ArgumentError, DtypeError
        If an argument is not allowed.
    """

    def __init__(
        self,
        device: str,
        max_quantum_seconds: float,
        budget: str | float | None,
        confirm: Confirm = False,
        run_dir: Path | None = None,
        settle: Callable[[], None] = lambda: None,
        home: Path | None = None,
    ):
        check_confirm(confirm)
        self.device = device
        self.max_quantum_seconds = check_limit(max_quantum_seconds)
        self.budget = None if budget is None else Budget.of(budget)
        self.confirm = confirm
        self._run_dir, self._home = run_dir, home
        self._settle = settle

    def home(self) -> Path:
        """The folder of runs whose jobs count: the one that holds the run, or else `runs_home`."""
        if self._home is None and self._run_dir is not None:
            return self._run_dir.absolute().parent
        return runs_home(self._home)

    def facts(self) -> dict[str, Any]:
        """What a job's record holds of the limits."""
        limit = self.max_quantum_seconds
        return {
            "max_quantum_seconds": None if limit == math.inf else limit,
            "budget": None if self.budget is None else str(self.budget),
        }

    @contextmanager
    def allow(self, cost: Cost, confirm: Confirm | None = None) -> Iterator[Hold]:
        """Give leave for all that a call sends, or refuse it before its first post.

        What is sent inside the `with` counts against this leave. What goes beyond it, as a call inside a
        call may, is checked together with what was allowed before.

        Parameters
        ----------
        cost : Cost
            All that the call is known to send.
        confirm : bool or callable, optional
            For this call, in place of the standing one: True sends it, whatever is exceeded.

        Raises
        ------
        CostError
            If it is above a limit and not confirmed.
        ArgumentError
            If `confirm` is, or returns, anything but True or False.
        """
        if confirm is not None:
            check_confirm(confirm)
        outer = next((hold for hold in _HOLDS.get() if hold.guard is self), None)
        if outer is not None:
            self._extend(outer, cost, confirm)
            yield outer
            return
        hold = Hold(self)
        token = _HOLDS.set((*_HOLDS.get(), hold))
        try:
            self._extend(hold, cost, confirm)
            yield hold
        finally:
            _HOLDS.reset(token)
            hold.close()

    def exceeded(self, cost: Cost) -> tuple[str, ...]:
        """Which limits a call of this cost would exceed now."""
        seconds = cost.quantum_seconds
        return (*self._over_limit(seconds), *self._over_budget(seconds, self.left()))

    def left(self) -> float | None:
        """Seconds of the budget that are left, not below 0; None without one."""
        if self.budget is None:
            return None
        return max(0.0, self.budget.seconds - _committed(self.home(), self.budget))

    def _extend(self, hold: Hold, cost: Cost, confirm: Confirm | None) -> None:
        """Give more leave, so that this cost can be sent."""
        missing = cost.quantum_seconds - hold.left
        if missing <= ROUNDING_S:
            return
        given = self.confirm if confirm is None else confirm
        yes = not callable(given) and bool(given)
        over_limit = () if yes else self._over_limit(hold.allowed + missing)
        budget_binds = confirm is None or not yes  # a standing True says nothing about a sum that grows
        exceeded = over_limit or self._reserve(hold, missing, budget_binds)
        if exceeded and not over_limit:
            self._settle()  # IBM may have charged less than was estimated
            exceeded = self._reserve(hold, missing, budget_binds)
        if not exceeded:
            return
        if over_limit:
            exceeded += self._over_budget(missing, self.left())
        if not (callable(given) and _answer(given, replace(cost, exceeds=exceeded))):
            raise CostError(f"{self.device}: {_refusal(cost, hold, exceeded)}")
        self._reserve(hold, missing, budget_binds=False)

    def _over_limit(self, seconds: float) -> tuple[str, ...]:
        if seconds <= self.max_quantum_seconds + ROUNDING_S:
            return ()
        return (f"more than max_quantum_seconds={self.max_quantum_seconds:g}",)

    def _over_budget(self, seconds: float, left: float | None) -> tuple[str, ...]:
        if left is None or seconds <= left + ROUNDING_S:
            return ()
        return (
            f"more than the {in_seconds(left)} that are left of the budget of {self.budget} in {self.home()}",
        )

    def _reserve(self, hold: Hold, seconds: float, budget_binds: bool) -> tuple[str, ...]:
        """Give leave, unless the budget binds and has less left; then say so."""
        if self.budget is None:
            hold.add(seconds, None)
            return ()
        home = self.home()
        with _locked(home):
            over = self._over_budget(seconds, self.left()) if budget_binds else ()
            if not over:
                hold.add(seconds, _holds(home))
        return over


def _answer(confirm: Callable[[Cost], Any], cost: Cost) -> bool:
    """What a function says about a cost; anything but True or False is refused, as the text "no"."""
    answer = confirm(cost)
    if not isinstance(answer, bool | np.bool_):
        raise ArgumentError(
            f"confirm returned {answer!r}, which is not allowed: it must return True or False. Nothing was "
            "sent."
        )
    return bool(answer)


def _refusal(cost: Cost, hold: Hold, exceeded: tuple[str, ...]) -> str:
    """Why a call is refused, and what to do."""
    before = f", after {in_seconds(hold.allowed)} that this call had leave for before" if hold.allowed else ""
    return (
        f"{cost}{before}, {' and '.join(exceeded)}. Nothing of it was sent: take fewer shots or a higher "
        "limit, or allow this call by submit_rows(..., confirm=True)."
    )


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """While this lasts, no other process and no other thread gives leave in this folder of runs."""
    folder = _holds(home)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "ledger.lock", timeout=LOCK_PATIENCE_S, thread_local=False):
            yield
    except Timeout as error:
        raise StorageError(
            f"The budget's ledger in {home} was locked for {LOCK_PATIENCE_S:g} s by another process: try "
            "again."
        ) from error
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(folder, error) from error


def _holds(home: Path) -> Path:
    return home / "jobs" / ".holds"


def _committed(home: Path, budget: Budget) -> float:
    """Quantum seconds that count against the budget: what calls have leave for, and recorded jobs.

    Leave is read first: what is sent meanwhile then counts twice rather than not at all.
    """
    seconds = 0.0
    for path in _holds(home).glob("*.json"):
        lock = FileLock(path.with_suffix(".lock"), timeout=0, thread_local=False)
        try:
            with lock:  # its process has ended
                path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
        except Timeout:
            with suppress(FileNotFoundError):  # it was given back meanwhile
                seconds += float(json.loads(path.read_bytes())["quantum_seconds"])
    return seconds + sum(
        billed_job(record).seconds for _, record in find_records(home) if budget.counts(record)
    )


# --- What was charged -------------------------------------------------------------------------------


def billed_job(record: JobRecord) -> BilledJob:
    """What a recorded job was estimated to take, and what it was charged."""
    costly = [part for part in record.parts if part.may_cost]
    open_parts = [part for part in costly if part.charged_seconds is None]
    earlier = sum(part.earlier_seconds for part in record.parts)
    return BilledJob(
        record.tag,
        record.device,
        str(record.status.state),
        record.request.kind,
        estimated_seconds=earlier + sum(map(record.estimated_seconds, costly)),
        charged_seconds=earlier + sum(part.charged_seconds or 0.0 for part in costly),
        open_seconds=sum(map(record.estimated_seconds, open_parts)),
        settled=not open_parts,
    )


def spent_seconds(record: JobRecord, part: PartRecord) -> float:
    """Quantum seconds of all jobs of a part so far, charged or else estimated."""
    if not part.may_cost:
        return part.earlier_seconds
    seconds = record.estimated_seconds(part) if part.charged_seconds is None else part.charged_seconds
    return part.earlier_seconds + seconds


def rest_cost(record: JobRecord, again: Collection[JobState]) -> Cost:
    """What sending the rest of a job costs anew, beyond what its record counts already.

    Parameters
    ----------
    record : JobRecord
    again : collection of JobState
        Parts that ended in these states are run again.
    """
    parts = [
        part
        for part in record.parts
        if part.state in again
        or (part.id is None and part.state != JobState.CANCELLED and spent_seconds(record, part) == 0)
    ]
    runs = [
        RunCost(
            f"the rest of job {record.tag}",
            part.stop - part.start,
            part.shots,
            1,
            record.estimated_seconds(part),
        )
        for part in parts
    ]
    return Cost(tuple(runs))


def recorded_guard(path: Path, record: JobRecord) -> CostGuard:
    """Gives leave to send parts of a recorded job, within the limits that it was submitted in."""
    limit = math.inf if record.max_quantum_seconds is None else record.max_quantum_seconds
    folder = path.absolute().parent.parent
    home = folder.parent if (folder / "manifest.json").exists() else folder  # of runs, not of the one run
    return CostGuard(record.device, limit, record.budget, home=home)
