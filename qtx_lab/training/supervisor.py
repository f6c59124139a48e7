"""Brings a training to its end: starts the ranks, watches them, and goes on after faults and changes.

An attempt is a number of ranks that train together. It ends with the training, by a fault, or because
workers left or came: then the ranks stop after their step, with a checkpoint, from which the next one begins.
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..errors import ArgumentError, RunFailed, StorageError
from ..storage import write_atomic
from .checkpoints import checkpoint_path, checkpoints, claim, load_weights, read_about
from .cluster import Cluster
from .loop import NotFinite
from .rank import RankEnd, RankJob, progress_of, train_rank
from .worker import ask_to_stop, open_store, run_in_worker, worker_facts

if TYPE_CHECKING:
    from distributed import Future

OnMetrics = Callable[[list[dict[str, Any]]], None]

POLL_INTERVAL_S = 0.1
"""How often the ranks' reports are looked at."""
WORKERS_POLL_INTERVAL_S = 0.5
"""How often the scheduler is asked which workers there are."""
START_TIMEOUT_S = 60.0
"""How long ranks may at least take to start, whatever the timeout: a new process imports torch first."""
RESTART_TIMEOUT_S = 10.0
"""How long a worker that is restarted may take to end."""
ANSWER_TIMEOUT_S = 3.0
"""How long a worker may take to answer a question."""
LEAVE_TIMEOUT_S = 10.0
"""How long the last worker of a training that leaves in order may take to write its checkpoint."""


class Supervisor:
    """One training: attempts until one ends well, and what they report.

    Parameters
    ----------
    job : RankJob
    cluster : Cluster or None
        Where the ranks run; in this process, as one rank, where None.
    retries : int
        Faults in a row, without a later step or a new checkpoint between them, after which training goes on.
    cancelled : threading.Event
        Once it is set, training stops after its step.
    on_metrics : callable, optional
        Takes lists of new rows, in this thread.
    progress : bool
        Show a bar with the time left.

    Attributes
    ----------
    rows : dict
        Metrics by step.
    faults : list of str
        What went wrong and was overcome.
    notes : list of str
        What the ranks chose, and how their number changed.
    world : int
        Ranks of the last attempt.
    """

    def __init__(
        self,
        job: RankJob,
        cluster: Cluster | None,
        *,
        retries: int,
        cancelled: threading.Event,
        on_metrics: OnMetrics | None = None,
        progress: bool = True,
    ):
        self.job, self.cluster, self.retries = job, cluster, retries
        self.cancelled, self.on_metrics = cancelled, on_metrics
        self.rows: dict[int, dict[str, Any]] = {}
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.world = 1
        self._facts: dict[str, Any] = {}
        self._asked: set[str] = set()
        self._ready: set[str] = set()
        self._refused: set[str] = set()
        self._leaving_since: float | None = None
        self.attempt = 0
        self.last_report, self.started = time.monotonic(), False
        self._new_rows: list[dict[str, Any]] = []
        self._messages: list[str] = []
        self._lock = threading.Lock()
        self._first_checkpoint = self._last_checkpoint()
        self.bar = tqdm(
            total=job.spec.steps,
            initial=self._first_checkpoint,
            desc="training",
            unit="step",
            disable=not progress,
        )

    def run(self, world: int) -> RankEnd:
        """Make attempts with up to `world` ranks until training ends, or faults are too many.

        Raises
        ------
        RunFailed
            If faults keep coming, or the loss is not finite again; a model's own errors as they are.
        """
        with self.bar:
            faults_in_a_row, not_finite_at = 0, set()
            while True:
                before, reached = set(checkpoints(self.job.folder)), self._last_step()
                name = f"{uuid.uuid4().hex[:12]}-{self.attempt}"
                claim(self.job.folder, name)
                end = self._run_alone(name) if self.cluster is None else self._run_over_cluster(name, world)
                self._pass_on_rows()
                self._add_notes(*end.notes)
                if end.ended_well:
                    self._add_rows_of(end.step)
                if end.how == "done" or (end.how == "stopped" and self.cancelled.is_set()):
                    return end
                self.attempt += 1
                if end.how == "stopped":
                    world = self._changed_world(end.step)
                    continue
                if isinstance(end.error, NotFinite) and end.step not in not_finite_at:
                    not_finite_at.add(end.step)
                elif end.how == "failed":
                    raise self._final_error(end)
                progressed = bool(set(checkpoints(self.job.folder)) - before) or self._last_step() > reached
                faults_in_a_row = 1 if progressed else faults_in_a_row + 1
                self.faults.append(f"step {end.step}: {end.error}")
                if self.cancelled.is_set():  # also where faults are many: what stops us may stop workers too
                    return self._stopped_while_recovering()
                if faults_in_a_row > self.retries:
                    raise RunFailed(
                        f"Training was given up after {faults_in_a_row} fault(s) without a later step or "
                        f"checkpoint between them: {' '.join(self.faults[-faults_in_a_row:])}"
                    ) from end.error
                text = f"Training goes on from step {self._last_checkpoint()}: {end.error}"
                tqdm.write(text, file=sys.stderr)

    def _stopped_while_recovering(self) -> RankEnd:
        """The end of a training that was cancelled after a fault: at the last checkpoint, else at step 0."""
        step = self._last_checkpoint()
        if self.cluster is None and step:  # the model has come further, or holds what is not finite
            load_weights(self.job.folder, step, self.job.model)
        elif self.cluster is None:
            self.job.model.load_state_dict(self._initial_state)
        return RankEnd("stopped", step)

    def _changed_world(self, step: int) -> int:
        """How many ranks go on after workers left or came, for which the others stopped at a step."""
        assert self.cluster is not None
        count = 0
        with suppress(OSError, ValueError):
            count = self._usable_count(self._candidates())
        if count != self.world:
            self._add_notes(
                f"After step {step} training went on with {max(1, count)} rank(s) instead of {self.world}."
            )
        return max(1, count)

    def _add_notes(self, *notes: str) -> None:
        self.notes += [note for note in notes if note not in self.notes]

    def _final_error(self, end: RankEnd) -> Exception:
        """The error that ends training."""
        assert end.error is not None
        if not isinstance(end.error, NotFinite):
            return end.error
        error = RunFailed(
            f"{end.error} The same happened again from the last checkpoint: try a smaller learning_rate "
            f"({self.job.spec.learning_rate:g}), more warmup_steps or a smaller clip_norm."
        )
        error.__cause__ = end.error
        return error

    def _last_checkpoint(self) -> int:
        return max(checkpoints(self.job.folder), default=0)

    def _run_alone(self, name: str) -> RankEnd:
        """One attempt in this process."""
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

        def report(rows: list[dict[str, Any]]) -> None:
            self._take_rows(rows)
            self._pass_on_rows()

        if self.attempt == 0:
            self._initial_state = {key: x.clone() for key, x in self.job.model.state_dict().items()}
        elif not checkpoints(self.job.folder):
            self.job.model.load_state_dict(self._initial_state)
        try:
            return train_rank(self.job, name, 0, 1, device, report, self.cancelled.is_set)
        except NotFinite as error:
            return RankEnd("failed", progress_of(name).step, error)

    # --- Over a cluster ------------------------------------------------------------------------

    def _run_over_cluster(self, name: str, world: int) -> RankEnd:
        """One attempt over the workers of the cluster."""
        try:
            workers = self._gather_workers(world)
            self.world = len(workers)
            futures = self._start_ranks(name, workers)
        except StorageError:
            raise
        except (OSError, TimeoutError, KeyError) as error:  # a worker or the scheduler went in the meantime
            return RankEnd("lost", self._last_checkpoint(), error)
        try:
            return self._watch(name, workers, futures)
        finally:
            self._end_ranks(name, workers, futures)

    def _gather_workers(self, world: int) -> tuple[str, ...]:
        """The workers to train on: `world` of them, or those that are there when the time is over."""
        assert self.cluster is not None
        until = time.monotonic() + self.cluster.timeout
        while True:
            workers: tuple[str, ...] = ()
            with suppress(OSError, ValueError):  # the scheduler may be on its way back
                workers = self._candidates()
            if len(workers) >= world:
                break
            if self.cancelled.is_set():
                raise TimeoutError("Cancelled while waiting for workers.")
            if time.monotonic() > until + (0 if workers else START_TIMEOUT_S):
                if not workers:
                    raise RunFailed(
                        f"No worker of the cluster ({self.cluster.chosen}) is there, or came back in "
                        f"{self.cluster.timeout:g} s."
                    )
                self.faults.append(
                    f"{world - len(workers)} of {world} workers stayed away: training goes on without them."
                )
                break
            time.sleep(POLL_INTERVAL_S)
        count = self._usable_count(workers)
        if count < len(workers):
            self._add_notes(
                f"{len(workers)} workers are there and {count} train: a batch has {self.job.shards} parts "
                "since training began, ranks times accumulation."
            )
        workers = workers[:count]
        answers = self._ask(workers, worker_facts, timeout=START_TIMEOUT_S)
        kinds = {tuple(sorted(facts.items())) for facts in answers.values()}
        if len(kinds) > 1:
            raise ArgumentError(
                f"cluster: its workers differ, and ranks need the same: {[dict(kind) for kind in kinds]}."
            )
        self._facts = dict(*kinds)
        return workers

    def _candidates(self) -> tuple[str, ...]:
        """The workers that can begin to train now; OSError where the scheduler does not answer."""
        assert self.cluster is not None
        return tuple(worker for worker in self.cluster.ready_workers if worker not in self._refused)

    def _usable_count(self, workers: Sequence[str]) -> int:
        """How many of these workers can be ranks."""
        count = min(len(workers), self.job.shards)
        if self.job.spec.parallel == "fsdp":  # its ranks go in step, so each needs as many shards
            count = max((n for n in range(1, count + 1) if self.job.shards % n == 0), default=0)
        return count

    def _more_workers(self, workers: Sequence[str]) -> bool:
        """Whether a next attempt could have more ranks than these workers."""
        try:
            there = self._candidates()
        except (OSError, ValueError):
            return False
        if self._usable_count(there) <= len(workers):
            return False
        for worker in set(there) - set(workers) - self._asked:
            # Beside the training: a new process takes seconds to import torch before it answers.
            self._asked.add(worker)
            threading.Thread(target=self._ask_facts, args=(worker,), daemon=True).start()
        return self._usable_count([w for w in there if w in workers or w in self._ready]) > len(workers)

    def _ask_facts(self, worker: str) -> None:
        """Find out whether a worker that came can be a rank."""
        facts = self._ask([worker], worker_facts, timeout=START_TIMEOUT_S).get(worker)
        if facts == self._facts:
            self._ready.add(worker)
        elif facts is None:
            self._asked.discard(worker)  # it is asked again, if it is still there
        else:
            self._refused.add(worker)
            self._add_notes(f"The worker {worker} does not train: it has {facts}, the others {self._facts}.")

    def _start_ranks(self, name: str, workers: Sequence[str]) -> list[Future]:
        """A rank in each worker."""
        from distributed.protocol.pickle import dumps

        assert self.cluster is not None
        client = self.cluster.client
        if self.attempt == 0:
            write_atomic(self.job.folder / "job.pickle", dumps(self.job))
        client.subscribe_topic(name, lambda event: self._take_rows(event[1]))
        host = workers[0].split("://")[-1].rpartition(":")[0].strip("[]")
        # Longer than it takes to notice a hang here, where all ranks are seen, and it is known which of them
        # hangs.
        patience = self.job.timeout + START_TIMEOUT_S
        failures: dict[str, Exception] = {}
        ports = self._ask(workers[:1], open_store, name, host, patience, timeout=patience, failures=failures)
        if workers[0] not in ports:
            error = failures.get(workers[0])
            reason = f"{type(error).__name__}: {error}" if error else f"no answer in {patience:g} s"
            raise TimeoutError(f"Rank 0 at {workers[0]} could not open a store for the ranks ({reason}).")
        port = ports[workers[0]]
        return [
            client.submit(
                run_in_worker,
                self.job.folder,
                name,
                rank,
                len(workers),
                host,
                port,
                patience,
                workers=[worker],
                allow_other_workers=False,
                pure=False,
                key=f"rank-{rank}-{name}",
            )
            for rank, worker in enumerate(workers)
        ]

    def _watch(self, name: str, workers: Sequence[str], futures: Sequence[Future]) -> RankEnd:
        """How the attempt ends: as its ranks say, or as it looks from outside."""
        self.started, stop_sent, self._leaving_since = False, False, None
        self.last_report = looked = time.monotonic()
        while True:
            self._pass_on_rows()
            now = time.monotonic()
            if self.cancelled.is_set() and not stop_sent:
                self._ask(workers, ask_to_stop, name)
                stop_sent = True
            if any(future.done() for future in futures) or now - looked > WORKERS_POLL_INTERVAL_S:
                looked = now
                end = self._end_of_attempt(workers, futures)
                if end is not None:
                    return end
                if self.started and not stop_sent and self._more_workers(workers):
                    self._ask(workers, ask_to_stop, name)
                    stop_sent = True
            if self.started:
                patience = self.job.timeout * (10 if self.job.spec.compile else 1)
            else:
                patience = START_TIMEOUT_S + self.job.timeout
            if now - self.last_report > patience:
                where = f"{self._progress_in_words(name, workers)} after {patience:g} s without a step"
                return RankEnd("lost", self._last_step(), RuntimeError(f"Training hung: {where}."))
            time.sleep(POLL_INTERVAL_S)

    def _end_of_attempt(self, workers: Sequence[str], futures: Sequence[Future]) -> RankEnd | None:
        """How the attempt ended; None while it goes on."""
        assert self.cluster is not None
        ends = _ends_of_ranks(futures)
        if len(ends) == len(futures) and all(end.ended_well for end in ends.values()):
            return ends[0]
        if not all(end.ended_well for end in ends.values()):
            # A rank may fail because the worker of another one is gone: the scheduler will know in a moment.
            time.sleep(WORKERS_POLL_INTERVAL_S)
            ends = _ends_of_ranks(futures)
        step = max([self._last_step(), *(end.step for end in ends.values())])
        try:
            there = self.cluster.workers
        except (OSError, ValueError) as error:
            return RankEnd("lost", step, RuntimeError(f"The scheduler does not answer ({error})."))
        gone = [worker for worker in workers if worker not in there]
        if gone and self._left_in_order(gone):
            return self._end_without(gone, workers, futures)
        if gone:
            names = ", ".join(f"rank {workers.index(worker)} at {worker}" for worker in gone)
            return RankEnd("lost", step, RuntimeError(f"The worker of {names} is gone."))
        for how in ("failed", "lost"):
            for rank, end in ends.items():
                if end.how == how:
                    if end.error is not None:  # as of the one worker that has too little memory
                        end.error.add_note(f"That happened in rank {rank} at {workers[rank]}.")
                    return end
        return None

    def _left_in_order(self, gone: Sequence[str]) -> bool:
        """Whether all workers that are gone were closed or retired, and did not die."""
        assert self.cluster is not None
        with suppress(Exception):
            events = {worker: self.cluster.client.get_events(worker) for worker in gone}
            return all(any(_is_leaving(message) for _, message in events[worker]) for worker in gone)
        return False

    def _end_without(
        self, gone: Sequence[str], workers: Sequence[str], futures: Sequence[Future]
    ) -> RankEnd | None:
        """How the attempt ends after workers left in order; None while the other ranks have not ended.

        A worker that is closing lets all ranks stop after their step. It cannot send the end of its own rank:
        that of another one, or the checkpoint, says how far they came.
        """
        if self._leaving_since is None:
            self._leaving_since = time.monotonic()
        left = [f for worker, f in zip(workers, futures, strict=True) if worker not in gone]
        ends = [_end_of_rank(future) for future in left if future.done()]
        bad = next((end for end in ends if not end.ended_well), None)
        if bad is not None:
            return bad
        waited = time.monotonic() - self._leaving_since
        if left and len(ends) == len(left):
            # Rank 0 may be writing the checkpoint still, in a worker that waits for it.
            written = self._last_checkpoint() >= ends[0].step or waited > LEAVE_TIMEOUT_S
            return ends[0] if written else None
        if not left and (self._last_checkpoint() > self._last_step() - 1 or waited > LEAVE_TIMEOUT_S):
            return RankEnd("stopped", self._last_checkpoint())
        return None

    def _progress_in_words(self, name: str, workers: Sequence[str]) -> str:
        """What each rank says that it is doing; a process that is stopped does not answer."""
        answers = self._ask(workers, progress_of, name)
        return "; ".join(
            f"rank {i} at step {answers[worker].step}: {answers[worker].activity}"
            if worker in answers
            else f"rank {i} at {worker} does not answer"
            for i, worker in enumerate(workers)
        )

    def _ask(
        self,
        workers: Sequence[str],
        function: Callable[..., Any],
        *args: Any,
        timeout: float = ANSWER_TIMEOUT_S,
        failures: dict[str, Exception] | None = None,
    ) -> dict[str, Any]:
        """What a function returns in each worker, beside its tasks, of those that answer in time, seconds.

        `failures` takes the errors of the others, by worker.
        """
        assert self.cluster is not None
        client, answers = self.cluster.client, {}

        def ask(worker: str) -> None:
            try:
                answers.update(client.run(function, *args, workers=[worker]))
            except Exception as error:
                if failures is not None:
                    failures[worker] = error

        threads = [threading.Thread(target=ask, args=(worker,), daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        until = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        return dict(answers)

    def _end_ranks(self, name: str, workers: Sequence[str], futures: Sequence[Future]) -> None:
        """Leave no rank behind: after a fault the workers that are left get new processes."""
        assert self.cluster is not None
        client = self.cluster.client
        with suppress(Exception):
            client.unsubscribe_topic(name)
        ended_well = {
            worker: future.status == "finished" and _end_of_rank(future).ended_well
            for worker, future in zip(workers, futures, strict=True)
        }
        with suppress(Exception):
            client.cancel(list(futures), force=True)
        with suppress(Exception):
            left = set(workers) & set(self.cluster.workers)
            if all(ended_well[worker] for worker in left):
                return
            client.restart_workers(sorted(left), timeout=RESTART_TIMEOUT_S, raise_for_error=False)
            until = time.monotonic() + START_TIMEOUT_S
            while left & set(self.cluster.workers) and time.monotonic() < until:
                time.sleep(POLL_INTERVAL_S)

    # --- What ranks report ---------------------------------------------------------------------

    def _take_rows(self, rows: list[dict[str, Any]]) -> None:
        """Rows from rank 0, on any thread."""
        with self._lock:
            self.last_report, self.started = time.monotonic(), True
            self._new_rows += [{**row, "attempt": self.attempt} for row in rows if "loss" in row]
            for row in rows:
                if row.get("phase") == "started" and row["step"]:
                    checkpoint = checkpoint_path(self.job.folder, row["step"])
                    self._messages += [*row["notes"], f"Training goes on from the checkpoint {checkpoint}."]

    def _add_rows_of(self, step: int) -> None:
        """Add the last rows before a checkpoint that the worker of rank 0, which left, could not send."""
        if self._last_step() >= step:
            return
        with suppress(StorageError):
            rows = read_about(self.job.folder, step).get("rows") or []
            self._take_rows([row for row in rows if row["step"] > self._last_step()])
            self._pass_on_rows()

    def _last_step(self) -> int:
        return max(self.rows, default=self._first_checkpoint)

    def _pass_on_rows(self) -> None:
        """Record the rows that came, and pass them on, in this thread."""
        with self._lock:
            new, self._new_rows = self._new_rows, []
            messages, self._messages = self._messages, []
        for message in messages:
            tqdm.write(message, file=sys.stderr)
        if not new:
            return
        self.rows |= {row["step"]: row for row in new}
        if self.on_metrics is not None:
            self.on_metrics(new)
        shown = {k: f"{new[-1][k]:.4g}" for k in ("loss", "draws", "tokens_per_second") if k in new[-1]}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(new[-1]["step"] - self.bar.n)


def _is_leaving(message: Any) -> bool:
    """Whether an event of a worker's own says that it is closed, or that the scheduler let it go."""
    if not isinstance(message, Mapping):
        return False
    action = message.get("action")
    return action == "closing-worker" or (action == "remove-worker" and bool(message.get("expected")))


def _ends_of_ranks(futures: Sequence[Future]) -> dict[int, RankEnd]:
    """How the ranks that have ended say that they did, by their numbers."""
    return {rank: _end_of_rank(future) for rank, future in enumerate(futures) if future.done()}


def _end_of_rank(future: Future) -> RankEnd:
    """How a rank says that it ended; a future without a result has lost its worker."""
    try:
        if future.status == "finished":
            return future.result(timeout=10)
        error = future.exception(timeout=1) if future.status == "error" else None
    except (OSError, TimeoutError, CancelledError):  # Dask keeps a result in the worker that computed it
        return RankEnd("lost", 0, RuntimeError("A worker went after the last step of its rank."))
    return RankEnd("lost", 0, error or RuntimeError(f"A rank was {future.status}."))
