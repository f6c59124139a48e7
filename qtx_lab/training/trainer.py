"""`QuantumTrainer`: trains a model with sampled attention, on one process or a cluster, whatever fails."""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import check_count
from ..errors import (
    ArgumentError,
    DtypeError,
    FallbackWarning,
    RunFailed,
    ShapeError,
    StorageError,
    unknown_name,
)
from ..models.reference import ReferenceConfig, ReferenceModel, load_reference_model
from ..storage import runs_home, storage_error, write_atomic
from . import rank as ranks
from .checkpoints import checkpoint_path, checkpoints, claim, load_weights, locked, read_about
from .cluster import Cluster, find_gpus, open_cluster
from .data import open_tokens
from .loop import NotFinite
from .rank import End, Job
from .recipe import Recipe
from .sampling import Attention

if TYPE_CHECKING:
    from distributed import Future

OnMetrics = Callable[[list[dict[str, Any]]], None]

MODELS: dict[str, ReferenceConfig | None] = {
    "reference": None,
    "reference-untrained": ReferenceConfig(),
    "small": ReferenceConfig(layers=2, width=32, heads=4, head_dim=8, mlp_width=64),
    "100m": ReferenceConfig(context=2048, layers=16, width=768, heads=12, kv_heads=4, head_dim=64, mlp_width=2048),
}  # fmt: skip
"""Models by name; all but the shipped one with random weights."""
POLL_SECONDS = 0.1
LOOK_SECONDS = 0.5
"""How often the scheduler is asked which workers there are."""
START_SECONDS = 60.0
"""How long ranks may at least take to start, whatever the timeout: a new process imports torch first."""
GRACE_SECONDS = 10.0
"""How long a worker that is to be started anew may take to end."""


@dataclass(frozen=True)
class TrainingResult:
    """What came of a training.

    Parameters
    ----------
    steps : int
        Done, of all attempts together.
    stopped : bool
        Whether it was cancelled before the end.
    metrics : tuple of dict
        A row a step, see `QuantumTrainer`; of steps that were done again after a fault, the last.
    ranks : int
        At the end.
    faults : tuple of str
        What went wrong and was overcome.
    notes : tuple of str
        What was chosen, and what is otherwise than asked.
    folder : Path or None
        Of the checkpoints, where they are kept.
    dashboard_link : str or None
        Of the cluster.
    seconds : float
    """

    steps: int
    stopped: bool
    metrics: tuple[dict[str, Any], ...]
    ranks: int
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    folder: Path | None
    dashboard_link: str | None
    seconds: float

    @property
    def loss(self) -> float:
        """Of the last step."""
        return float(self.metrics[-1]["loss"])


class QuantumTrainer:
    """Trains a causal language model whose attention is drawn, in this process or over the workers of a cluster.

    AdamW, a linear warm-up and half a cosine, clipped gradients. The parts of a batch are shared among ranks; each part
    has a stream of draws of its own, derived from the seed, the step and the part's number, so that ranks draw
    independently, a run with the same seed, ranks and threads repeats bit for bit on a CPU, and one that lost a rank
    draws on as if it had not. Ranks are processes of torch.distributed in the workers of a Dask cluster: NCCL on GPUs,
    gloo on CPUs.

    A rank that is killed, hangs, or loses its scheduler costs the steps since the last checkpoint, from which training
    goes on by itself, with fewer ranks if a worker stays away. A loss that is not finite is tried again once: the same
    step fails twice if it is no accident. What cannot be mended (a full disk, an error of the model) ends training with
    that error, and the last checkpoint intact. `train` with the same `folder` resumes.

    Parameters
    ----------
    model : nn.Module or str
        Maps tokens (B, T) to logits (B, T, V), or to an object with such `logits`. Its attention draws if its forward
        takes `attention=` (`qtx_lab.models.reference.AttentionFn`) or if it holds `torch.nn.MultiheadAttention` or
        `QuantumMultiheadAttention` modules. A name in `MODELS` is one of the lab's. Trained in place.
    text : str, path, Tensor or array
        "reference", a UTF-8 file, a `.npy` file of whole numbers, or a 1-D tensor of them: see `open_tokens`.
    distributed : bool
        Train over the workers of `cluster`, else of one opened for the training.
    num_gpus : int, optional
        With `distributed`: as many ranks, a GPU each; without it 1 or None. Where there is no GPU at all, as many CPU
        processes rehearse them, with a FallbackWarning; fewer GPUs than that are an error.
    mixed_precision : bool
        Short for `precision="mixed"`.
    cluster : Cluster, optional
        From `open_cluster`; a rank each worker.
    folder : path, optional
        Of the checkpoints; workers on other machines must see it under the same path. Where None, one in `runs_home()`
        that is removed after a training that ends well.
    on_metrics : callable, optional
        Called with lists of new rows, in this process, a few times a second at most: `step` (from 1), `loss` (nats a
        token), `bits_per_byte`, `learning_rate`, `gradient_norm`, `tokens_per_second`, `memory_bytes`, `ranks`,
        `attempt`, `draws`, `noise`; where measured `sampling_variance` (of the step's gradient, summed over
        parameters), `noise_to_signal` (that over the gradient's squared length) and `sampling_variance LAYER`; where
        validated `held_out_bits_per_byte_exact` and `held_out_bits_per_byte_sampled`.
    progress : bool
        Show a bar with the time left.
    retries : int
        Faults in a row, without a new checkpoint between them, that are overcome.
    **settings
        Of `Recipe`.

    Raises
    ------
    ArgumentError, ShapeError, DtypeError, TextError
        On making it or at the start of `train`: an argument is not allowed, the model does not fit it.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(256, 8), torch.nn.Linear(8, 256))
    >>> result = QuantumTrainer(model, steps=3, num_tokens=16, progress=False).train()
    >>> result.steps, result.metrics[-1]["step"], round(result.metrics[0]["bits_per_byte"])
    (3, 3, 8)
    """

    def __init__(
        self,
        model: nn.Module | str = "reference",
        *,
        text: str | Path | Tensor | np.ndarray = "reference",
        distributed: bool = False,
        num_gpus: int | None = None,
        mixed_precision: bool = False,
        cluster: Cluster | None = None,
        folder: str | Path | None = None,
        on_metrics: OnMetrics | None = None,
        progress: bool = True,
        retries: int = 3,
        **settings: Any,
    ):
        allowed = Recipe.__dataclass_fields__
        for name in settings:
            if name not in allowed:
                raise unknown_name("setting", name, allowed)
        if mixed_precision:
            if settings.get("precision", "auto") not in ("auto", "mixed"):
                raise ArgumentError(
                    f"mixed_precision=True and precision={settings['precision']!r} contradict each other."
                )
            settings["precision"] = "mixed"
        self.recipe = Recipe(**settings)
        if num_gpus is not None:
            check_count("num_gpus", num_gpus)
        if not distributed and ((num_gpus or 1) > 1 or cluster is not None):
            raise ArgumentError(f"num_gpus={num_gpus} and cluster={cluster} need distributed=True.")
        if cluster is not None and num_gpus is not None:
            raise ArgumentError(
                "num_gpus and cluster exclude each other: a cluster has as many ranks as workers."
            )
        if type(retries) is not int or retries < 0:
            raise ArgumentError(f"retries={retries!r} is not allowed: it must be a whole number from 0.")
        if isinstance(model, str):
            model = make_model(model, self.recipe.seed)
        kind: Any
        for name, value, kind, what in (
            ("model", model, nn.Module, f"an nn.Module or one of {', '.join(MODELS)}"),
            ("cluster", cluster, Cluster | None, "a Cluster from open_cluster"),
            ("folder", folder, str | Path | None, "a path"),
            ("on_metrics", on_metrics, Callable | None, "a function of a list of rows"),
        ):
            if not isinstance(value, kind):
                raise DtypeError(f"{name}={value!r} is not allowed: it must be {what}.")
        self.model, self.text = model, text
        self.distributed, self.num_gpus, self.cluster = distributed, num_gpus, cluster
        self.folder, self.on_metrics, self.progress, self.retries = folder, on_metrics, progress, retries
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop the training under way after its step, with a checkpoint; from any thread."""
        self._cancelled.set()

    def train(self) -> TrainingResult:
        """Train to the end, or until cancelled, and leave the weights in `model`.

        Ctrl-C, as in a notebook's Interrupt, cancels: the step is finished and a checkpoint written, then
        KeyboardInterrupt is raised. A second Ctrl-C does not wait for that.

        Raises
        ------
        RunFailed
            If faults keep coming, or the loss is not finite again; a model's own errors as they are.
        StorageError
            If checkpoints cannot be written or read.
        BackendUnavailable
            If the cluster cannot be opened.
        """
        started = time.monotonic()
        self._cancelled.clear()
        digest = self._check()
        folder, kept = self._folder()
        try:
            with locked(folder), self._cluster() as (cluster, notes), self._ctrl_c() as interrupted:
                world = max(1, min(cluster.num_workers, self.recipe.batch_size)) if cluster else 1
                shards = self._shards(folder, world, digest)
                timeout = cluster.timeout if cluster else 60.0
                job = Job(self.model, self.text, digest, self.recipe, shards, folder, timeout)
                supervised = _Supervised(self, job, cluster, notes)
                end = supervised.run(world)
                stopped = end.how == "stopped"
                if cluster:
                    load_weights(folder, end.step, self.model)
                    (folder / "job.pickle").unlink(missing_ok=True)  # as large as the model
                if interrupted:
                    raise KeyboardInterrupt(
                        f"Stopped after step {end.step}; checkpoint: {checkpoint_path(folder, end.step)}"
                    )
        except BaseException as error:
            if checkpoints(folder):
                error.add_note(f"The last checkpoint is {checkpoint_path(folder, checkpoints(folder)[-1])}.")
            elif not kept:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if not kept and not stopped:
            shutil.rmtree(folder, ignore_errors=True)
        return TrainingResult(
            steps=end.step,
            stopped=stopped,
            metrics=tuple(supervised.rows[step] for step in sorted(supervised.rows)),
            ranks=supervised.world,
            faults=tuple(supervised.faults),
            notes=(*notes, *end.notes),
            folder=folder if kept or stopped else None,
            dashboard_link=cluster.dashboard_link if cluster else None,
            seconds=time.monotonic() - started,
        )

    def _check(self) -> str:
        """Refuse what cannot be trained; the digest of the text."""
        recipe, model = self.recipe, self.model
        context = getattr(getattr(model, "config", None), "context", None)
        if isinstance(context, int) and recipe.num_tokens > context:
            raise ArgumentError(
                f"num_tokens={recipe.num_tokens} is more than the model's context, {context}."
            )
        tokens = open_tokens(self.text, recipe.num_tokens)
        if not any(p.requires_grad for p in model.parameters()):
            raise ArgumentError("model has no parameters to train.")
        attention, was_training = Attention(model, recipe), model.training
        place = next(model.parameters()).device
        batch = torch.as_tensor(
            np.asarray(tokens.training[: recipe.num_tokens], dtype=np.int64), device=place
        )[None]
        try:
            with torch.no_grad(), attention.drawing(0):
                logits = attention.forward(model.eval(), batch)
        except IndexError as error:
            raise ShapeError(
                f"model fails on the text's tokens ({error}): has it embedded all {tokens.vocab_size}?"
            ) from error
        finally:
            attention.undo()
            model.train(was_training)
        if not isinstance(logits, Tensor) or logits.shape[:2] != batch.shape or logits.ndim != 3:
            what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ShapeError(
                f"model gives {what} for tokens {tuple(batch.shape)}; it must give logits (B, T, vocabulary)."
            )
        if logits.shape[-1] < tokens.vocab_size:
            raise ShapeError(
                f"model has logits for {logits.shape[-1]} tokens; the text has {tokens.vocab_size}."
            )
        return tokens.digest

    def _folder(self) -> tuple[Path, bool]:
        try:
            if self.folder is not None:
                folder = Path(self.folder).absolute()
                folder.mkdir(parents=True, exist_ok=True)
                return folder, True
            home = runs_home().absolute()
            home.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=".training-", dir=home)), False
        except OSError as error:
            raise storage_error(Path(self.folder or runs_home()), error) from error

    def _shards(self, folder: Path, world: int, digest: str) -> int:
        """Parts of a batch: those of the run that is resumed, else accumulation times ranks."""
        shards = world * self.recipe.accumulation
        for step in reversed(checkpoints(folder)):
            with suppress(StorageError):  # a broken one is passed over, and told of, when training begins
                about = read_about(folder, step)
                asked = {**self.recipe.identity(), "text": digest}
                kept = {**about["recipe"], "text": about["text"]}
                other = [
                    f"{k}={asked.get(k)!r} (there {kept.get(k)!r})"
                    for k in asked
                    if asked.get(k) != kept.get(k)
                ]
                if other:
                    raise ArgumentError(
                        f"folder={str(folder)!r} holds another training, with other {', '.join(other)}."
                    )
                return int(about["shards"])
        if shards > self.recipe.batch_size:
            raise ArgumentError(
                f"batch_size={self.recipe.batch_size} cannot be shared: {world} ranks times accumulation="
                f"{self.recipe.accumulation} are {shards} parts of at least one sequence."
            )
        return shards

    @contextmanager
    def _cluster(self) -> Iterator[tuple[Cluster | None, list[str]]]:
        """The cluster, and what was chosen."""
        if not self.distributed:
            yield None, []
        elif self.cluster is not None:
            yield self.cluster, [self.cluster.chosen]
        else:
            kind, count, notes = "auto", None, []
            if self.num_gpus is not None:
                found, why = find_gpus()
                kind, count = ("cuda" if found else "local"), self.num_gpus
                if 0 < found < count:
                    raise ArgumentError(
                        f"num_gpus={count} is not allowed: there are {found}, and each rank needs its own."
                    )
                if not found:
                    notes = [
                        f"num_gpus={count}: {why}; {count} CPU processes over gloo train in their place."
                    ]
                    warnings.warn(notes[0], FallbackWarning, stacklevel=4)
            with open_cluster(kind, num_workers=count) as cluster:
                yield cluster, [*notes, cluster.chosen]

    @contextmanager
    def _ctrl_c(self) -> Iterator[list[bool]]:
        """Ctrl-C cancels; the list is not empty afterwards if it came."""
        came: list[bool] = []
        if threading.current_thread() is not threading.main_thread():
            yield came
            return
        before = signal.getsignal(signal.SIGINT)

        def handle(number: int, frame: Any) -> None:
            if came:
                raise KeyboardInterrupt
            came.append(True)
            self.cancel()

        signal.signal(signal.SIGINT, handle)
        try:
            yield came
        finally:
            signal.signal(signal.SIGINT, before)


class _Supervised:
    """One training: attempts until one ends well, and what they report."""

    def __init__(self, trainer: QuantumTrainer, job: Job, cluster: Cluster | None, notes: Sequence[str]):
        from tqdm.auto import tqdm

        self.trainer, self.job, self.cluster = trainer, job, cluster
        self.rows: dict[int, dict[str, Any]] = {}
        self.faults: list[str] = []
        self.notes = list(notes)
        self.world = 1
        self.attempt = 0
        self.sign_of_life, self.started = time.monotonic(), False
        self._new: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        done = max(checkpoints(job.folder), default=0)
        self.bar = tqdm(
            total=job.recipe.steps, initial=done, desc="training", unit="step", disable=not trainer.progress
        )

    def run(self, world: int) -> End:
        """Attempts until training ends, or faults are too many."""
        with self.bar:
            in_a_row, failed_at = 0, set()
            while True:
                before = set(checkpoints(self.job.folder))
                name = f"{uuid.uuid4().hex[:12]}-{self.attempt}"
                claim(self.job.folder, name)
                end = self._alone(name) if self.cluster is None else self._together(name, world)
                self._drain()
                if end.how in ("done", "stopped"):
                    return end
                if isinstance(end.error, NotFinite) and end.step not in failed_at:
                    failed_at.add(end.step)
                elif end.how == "failed":
                    assert end.error is not None
                    if isinstance(end.error, NotFinite):
                        raise RunFailed(
                            f"{end.error} So it was when that was done again from the last checkpoint: try a smaller "
                            f"learning_rate ({self.job.recipe.learning_rate:g}), more warmup_steps or a smaller clip_norm."
                        ) from end.error
                    raise end.error
                progressed = bool(set(checkpoints(self.job.folder)) - before)
                in_a_row = 1 if progressed else in_a_row + 1
                self.faults.append(f"step {end.step}: {end.error}")
                if in_a_row > self.trainer.retries:
                    raise RunFailed(
                        f"Training was given up after {in_a_row} fault(s) without a new checkpoint between them: "
                        f"{' '.join(self.faults[-in_a_row:])}"
                    ) from end.error
                if self.trainer._cancelled.is_set():
                    raise RunFailed(f"Cancelled while recovering: {self.faults[-1]}") from end.error
                self.attempt += 1
                self.bar.write(
                    f"Training goes on from step {max(checkpoints(self.job.folder), default=0)}: {end.error}"
                )

    def _alone(self, name: str) -> End:
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

        def report(rows: list[dict[str, Any]]) -> None:
            self._take(rows)
            self._drain()

        if self.attempt == 0:
            self.initial = {name: x.clone() for name, x in self.job.model.state_dict().items()}
        elif not checkpoints(self.job.folder):
            self.job.model.load_state_dict(self.initial)
        try:
            return ranks.train_rank(self.job, name, 0, 1, device, report, self.trainer._cancelled.is_set)
        except NotFinite as error:
            return End("failed", ranks.whereabouts(name)[0], error)

    # --- Over a cluster ------------------------------------------------------------------------

    def _together(self, name: str, wanted: int) -> End:
        """One attempt over the cluster's workers."""
        assert self.cluster is not None
        client = self.cluster.client
        try:
            workers = self._gather(wanted)
            self.world = len(workers)
            self._ship()
            client.subscribe_topic(name, lambda event: self._take(event[1]))
            host = workers[0].split("://")[-1].rpartition(":")[0].strip("[]")
            # Longer than a hang is watched for: which rank hangs is said by whom sees all of them.
            timeout = self.job.timeout + START_SECONDS
            port = self._ask(workers[:1], ranks.open_store, name, host, timeout, seconds=timeout)[workers[0]]
            futures = [
                client.submit(ranks.run_in_worker, self.job.folder, name, i, len(workers), host, port, timeout,
                              workers=[worker], allow_other_workers=False, pure=False, key=f"rank-{i}-{name}")
                for i, worker in enumerate(workers)
            ]  # fmt: skip
        except (
            OSError,
            TimeoutError,
            KeyError,
        ) as error:  # a worker or the scheduler went while this was prepared
            if isinstance(error, StorageError):
                raise
            return End("lost", max(checkpoints(self.job.folder), default=0), error)
        try:
            return self._watch(name, workers, futures)
        finally:
            self._end(name, workers, futures)

    def _gather(self, wanted: int) -> tuple[str, ...]:
        """The workers to train on: as many as wanted, or those that are there when the time is over."""
        assert self.cluster is not None
        until = time.monotonic() + self.cluster.timeout
        while True:
            workers: tuple[str, ...] = ()
            with suppress(OSError, ValueError):  # the scheduler may be on its way back
                workers = self.cluster.workers
            if len(workers) >= wanted:
                break
            if time.monotonic() > until + (0 if workers else START_SECONDS):
                if not workers:
                    raise RunFailed(
                        f"No worker of the cluster ({self.cluster.chosen}) is there, or came back in {self.cluster.timeout:g} s."
                    )
                self.faults.append(
                    f"{wanted - len(workers)} of {wanted} workers stayed away: training goes on without."
                )
                break
            time.sleep(POLL_SECONDS)
        count = min(len(workers), wanted, self.job.shards)
        if self.job.recipe.parallel == "fsdp":  # its ranks go in step: each has as many shards
            count = max(n for n in range(1, count + 1) if self.job.shards % n == 0)
        workers = workers[:count]
        found = self._ask(workers, ranks.facts, seconds=START_SECONDS)
        kinds = {tuple(sorted(facts.items())) for facts in found.values()}
        if len(kinds) > 1:
            raise ArgumentError(
                f"cluster: its workers differ, and ranks must be alike: {[dict(kind) for kind in kinds]}."
            )
        return workers

    def _ship(self) -> None:
        from distributed.protocol.pickle import dumps

        if self.attempt == 0:
            write_atomic(self.job.folder / "job.pickle", dumps(self.job))

    def _watch(self, name: str, workers: Sequence[str], futures: Sequence[Future]) -> End:
        """How the attempt ends: by its ranks' own word, or by what is seen from outside."""
        assert self.cluster is not None
        recipe = self.job.recipe
        self.sign_of_life, looked, asked = time.monotonic(), time.monotonic(), False
        self.started = False
        while True:
            self._drain()
            now = time.monotonic()
            if self.trainer._cancelled.is_set() and not asked:
                self._ask(workers, ranks.ask_to_stop, name)
                asked = True
            over = [f.done() for f in futures]
            if any(over) or now - looked > LOOK_SECONDS:
                looked = now
                ends = [_end_of(f) for f in futures if f.done()]
                if len(ends) == len(futures) and all(end.how in ("done", "stopped") for end in ends):
                    return ends[0]
                if any(end.how in ("failed", "lost") for end in ends):
                    time.sleep(LOOK_SECONDS)  # a rank may fail because another's worker is gone: is it?
                    ends = [_end_of(f) for f in futures if f.done()]
                step = max([self._step(), *(end.step for end in ends)])
                gone = self._gone(workers)
                if gone:
                    return End("lost", step, RuntimeError(f"{gone}."))
                failed = [end for end in ends if end.how == "failed"] or [
                    end for end in ends if end.how == "lost"
                ]
                if failed:
                    return failed[0]
            patience = (
                self.job.timeout * (10 if recipe.compile else 1)
                if self.started
                else START_SECONDS + self.job.timeout
            )
            if now - self.sign_of_life > patience:
                where = f"{self._whereabouts(name, workers)} after {patience:g} s without a step"
                return End("lost", self._step(), RuntimeError(f"Training hung: {where}."))
            time.sleep(POLL_SECONDS)

    def _gone(self, workers: Sequence[str]) -> str:
        """Which ranks' workers are gone, in words."""
        assert self.cluster is not None
        try:
            there = self.cluster.workers
        except (OSError, ValueError) as error:
            return f"The scheduler does not answer ({error})"
        gone = [f"rank {i} at {worker}" for i, worker in enumerate(workers) if worker not in there]
        return f"The worker of {', '.join(gone)} is gone" if gone else ""

    def _whereabouts(self, name: str, workers: Sequence[str]) -> str:
        """What each rank says that it is doing; one that is stopped says nothing."""
        said = self._ask(workers, ranks.whereabouts, name)
        return "; ".join(
            f"rank {i} at step {said[worker][0]}: {said[worker][1]}"
            if worker in said
            else f"rank {i} at {worker} does not answer"
            for i, worker in enumerate(workers)
        )

    def _ask(
        self, workers: Sequence[str], function: Callable[..., Any], *args: Any, seconds: float = 3.0
    ) -> dict[str, Any]:
        """What a function gives in each worker, beside its tasks, for those that answer in time."""
        assert self.cluster is not None
        client, answers = self.cluster.client, {}

        def ask(worker: str) -> None:
            with suppress(Exception):
                answers.update(client.run(function, *args, workers=[worker]))

        threads = [threading.Thread(target=ask, args=(worker,), daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        until = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        return dict(answers)

    def _end(self, name: str, workers: Sequence[str], futures: Sequence[Future]) -> None:
        """Leave no rank behind: after a fault the workers that are left get a new process."""
        assert self.cluster is not None
        client = self.cluster.client
        with suppress(Exception):
            client.unsubscribe_topic(name)
        well = [f.status == "finished" and _end_of(f).how in ("done", "stopped") for f in futures]
        with suppress(Exception):
            client.cancel(list(futures), force=True)
        if all(well):
            return
        with suppress(Exception):
            left = set(workers) & set(self.cluster.workers)
            client.restart_workers(sorted(left), timeout=GRACE_SECONDS, raise_for_error=False)
            until = time.monotonic() + START_SECONDS
            while left & set(self.cluster.workers) and time.monotonic() < until:
                time.sleep(POLL_SECONDS)

    # --- What ranks report ---------------------------------------------------------------------

    def _take(self, rows: list[dict[str, Any]]) -> None:
        """Rows from rank 0, on whatever thread."""
        with self._lock:
            self.sign_of_life, self.started = time.monotonic(), True
            self._new += [{**row, "attempt": self.attempt} for row in rows if "loss" in row]

    def _step(self) -> int:
        return max(self.rows, default=0)

    def _drain(self) -> None:
        """Pass on what has come."""
        with self._lock:
            new, self._new = self._new, []
        if not new:
            return
        self.rows |= {row["step"]: row for row in new}
        if self.trainer.on_metrics is not None:
            self.trainer.on_metrics(new)
        shown = {k: f"{new[-1][k]:.4g}" for k in ("loss", "draws", "tokens_per_second") if k in new[-1]}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(new[-1]["step"] - self.bar.n)


def _end_of(future: Future) -> End:
    """How a rank says that it ended; a future without a result has lost its worker."""
    try:
        if future.status == "finished":
            return future.result(timeout=10)
        error = future.exception(timeout=1) if future.status == "error" else None
    except (OSError, TimeoutError, CancelledError):  # Dask keeps a result in the worker that made it
        return End("lost", 0, RuntimeError("A worker went after its rank's last step, and its word of it."))
    return End("lost", 0, error or RuntimeError(f"A rank was {future.status}."))


def make_model(name: str, seed: int = 0) -> nn.Module:
    """A model of `MODELS`, ready to train: the shipped one, or another with random weights of this seed.

    Raises
    ------
    ArgumentError
        If there is none of that name.
    """
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    config = MODELS[name]
    if config is None:
        return load_reference_model().train()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return ReferenceModel(config).train()
