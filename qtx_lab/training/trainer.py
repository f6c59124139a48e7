"""`QuantumTrainer`: trains a model with sampled attention, in one process or over a cluster."""

from __future__ import annotations

import math
import os
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import check_count, check_flags
from ..errors import ArgumentError, DtypeError, FallbackWarning, ShapeError, StoppedBySignal, StorageError
from ..models.reference import ReferenceModel
from ..samplers import ExactSampler, Sampler, make_sampler
from ..specs import TrainSpec
from ..specs.training import DrawsSchedule, NoiseSchedule, Parallel, Precision
from ..storage import runs_home, storage_error
from .checkpoints import checkpoint_path, checkpoints, load_weights, locked, read_about, resumable_settings
from .cluster import Cluster, find_gpus, open_cluster
from .data import Tokens, open_tokens
from .models import MODELS, make_model
from .rank import RankEnd, RankJob
from .sampling import Attention
from .supervisor import OnMetrics, Supervisor

STOP_SIGNALS = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if name in signal.Signals.__members__  # Windows has only the first two
)
"""The signals after which a training finishes its step, writes a checkpoint and ends."""
ALONE_TIMEOUT_S = 60.0
"""The timeout of a training without a cluster, in which no rank waits for another."""


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a training.

    Parameters
    ----------
    steps : int
        Steps that are done, over all attempts.
    stopped : bool
        Whether it was cancelled before the end.
    loss : float
        Of the last step, nats a token; NaN where the training had already ended and its checkpoint, of an
        older version, does not hold the loss.
    metrics : tuple of dict
        One row for each step, see `QuantumTrainer`; of a step that was done again after a fault, the last
        one.
    ranks : int
        Number of ranks at the end.
    faults : tuple of str
        What went wrong and was overcome.
    notes : tuple of str
        What was chosen, and requests that were carried out in another way.
    folder : Path or None
        Folder of the checkpoints, where they are kept.
    dashboard_link : str or None
        Address of Dask's dashboard, where there is a cluster.
    seconds : float
        How long the training took.

    Examples
    --------
    >>> model = nn.Sequential(nn.Embedding(256, 4), nn.Linear(4, 256))
    >>> result = QuantumTrainer(model, steps=2, num_tokens=16, progress=False).train()
    >>> result.steps, result.stopped, result.faults, [row["step"] for row in result.metrics]
    (2, False, (), [1, 2])
    """

    steps: int
    stopped: bool
    loss: float
    metrics: tuple[dict[str, Any], ...]
    ranks: int
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    folder: Path | None
    dashboard_link: str | None
    seconds: float


class QuantumTrainer:
    """Trains a causal language model whose attention is drawn, in this process or over a cluster.

    AdamW with a linear warm-up, half a cosine, and clipped gradients. Ranks share the parts of a batch; each
    part has a stream of draws of its own, derived from the seed, the step and the number of the part. So
    ranks draw independently, a run with the same seed, ranks and threads repeats bit for bit on a CPU, and
    one that lost a rank draws as if it had not. Ranks are processes of torch.distributed in the workers of a
    Dask cluster: NCCL on GPUs, gloo on CPUs.

    Training is elastic: when a worker leaves in order, as Dask retires it, or one comes, the ranks stop after
    their step and go on from a checkpoint with the workers that are there, up to as many as a batch has
    parts: ranks at the start times `accumulation`. With two ranks of one part each, losses stay the same to
    the bit; otherwise sums of gradients are rounded in another order. Checkpoints are written by a thread
    while training goes on ("fsdp" waits for them).

    A rank that is killed, hangs, or loses its scheduler costs the steps since the last checkpoint. From there
    training continues automatically, with fewer ranks if a worker does not return. A loss that is not finite
    is tried again once: if it is no accident, the same step fails again. What cannot be repaired (a full
    disk, an error of the model) ends training with that error and leaves the last checkpoint whole. `train`
    with the same `folder` resumes, from the latest checkpoint whose files have the hashes that were written
    with them.

    The arguments from `text` and `num_tokens` to `seed` are the fields of `TrainSpec`, with its defaults and
    bounds: `QuantumTrainer(**spec.arguments())` trains as a spec says.

    Parameters
    ----------
    model : nn.Module or str
        Maps tokens (B, T) to logits (B, T, V), or to an object with such `logits`. Its attention draws if its
        forward takes `attention=` (`qtx_lab.models.base.AttentionFn`), or if it holds
        `torch.nn.MultiheadAttention` or `QuantumMultiheadAttention` modules. A name is one of "reference"
        (the shipped model), "reference-untrained", "small" and "100m" (random weights). The model is trained
        in place.
    text : str, path, Tensor or array
        "reference", a UTF-8 file, a `.npy` file of whole numbers, or a 1-D tensor of them; see `open_tokens`.
    distributed : bool
        Train over the workers of `cluster`, or of one that is opened for the training.
    num_gpus : int, optional
        With `distributed`: as many ranks, one GPU each; without it 1 or None. Where there is no GPU at all,
        as many CPU processes train in their place, with a FallbackWarning; fewer GPUs than that are an error.
    mixed_precision : bool
        Short for `precision="mixed"`.
    cluster : Cluster, optional
        An open cluster, from `open_cluster`; each worker is a rank.
    folder : path, optional
        Folder of the checkpoints; workers on other machines must see it under the same path. Where None, one
        in `runs_home()` that is removed after a training that ends well.
    on_metrics : callable, optional
        Called with lists of new rows, in this process, a few times a second at most. A row has `step` (from
        1), `loss` (nats a token), `bits_per_byte`, `learning_rate`, `gradient_norm`, `tokens_per_second`,
        `memory_bytes`, `ranks`, `attempt`, `draws`, `noise`; where measured `sampling_variance` (of the
        step's gradient, summed over parameters), `noise_to_signal` (that over the gradient's squared length)
        and `sampling_variance LAYER`; where validated `held_out_bits_per_byte_exact` and
        `held_out_bits_per_byte_sampled`; after a checkpoint `checkpoint_seconds`, for which training waited.
    progress : bool
        Show a bar with the time left.
    retries : int
        Faults in a row, without a later step or a new checkpoint between them, after which training goes on.
    num_tokens : int
        Length of a sequence, tokens.
    sampler : str or Sampler, optional
        Sampler of the attention rows; "exact" trains without sampling. Where None: what the model's own
        `QuantumMultiheadAttention` modules say, "systematic" for other attention.
    num_samples : int, optional
        Draws of a row at the start; where None, those of the model's own modules, else 64.
    control_variate : str, optional
        As for `sampled_attention`.
    drawn_heads : str, optional
        Layers and heads that draw, as "0-2, 3:0, 3:5" (see `qtx_lab.specs.read_heads`); the rest attends
        exactly. All where None. Of a model that holds attention modules, whole layers only.
    draws_schedule : str
        How the draws go from `num_samples` to `final_num_samples`: "constant", "linear", "cosine", or
        "signal-to-noise". The last one measures the sampling variance of the gradient where it validates, and
        takes as many draws as bring it to a tenth of the gradient's squared length: at most twice and at
        least half as many as before, from `num_samples` to `final_num_samples` (16 times as many where None).
    final_num_samples : int, optional
        Draws of a row at the end; as at the start where None.
    noise : float
        Part of each row that is the uniform distribution over its visible keys, as on a noisy device, from 0
        to 1.
    noise_schedule : str
        "constant", or "linear": from 0 up to `noise`.
    steps : int
        Steps of the optimizer.
    batch_size : int
        Sequences of a step, over all ranks.
    accumulation : int
        Parts into which each rank divides its share of a batch, to need less memory.
    local_steps : int
        Above 1: local updates (DiLoCo, arXiv 2311.08105). Each part of a batch trains a replica of the model
        alone for so many steps; then the replicas exchange their weights, by an outer optimizer, see
        `qtx_lab.training.local_updates`. Ranks send that many times fewer bytes. Rows come, and training
        stops, only after an exchange; `gradient_norm` is the mean over replicas. It learns less in a step
        than without, most of all from random weights: begin with a model that has been trained for a while.
    learning_rate : float
        Learning rate of AdamW at its peak, after `warmup_steps`; then it falls as a cosine to 0.
    warmup_steps : int
        Steps in which the learning rate rises.
    weight_decay : float
        Weight decay of AdamW, for parameters with two dimensions or more.
    clip_norm : float
        Longer gradients are shortened to this length; 0: never.
    precision : str
        "fp32", "bf16" (autocast), "fp16" (autocast with a loss scaler), "mixed" (bf16, or fp16 on a GPU
        without it), or "auto": "mixed" on GPUs, "fp32" on CPUs.
    compile : bool
        `torch.compile` the model; attention that draws runs between the graphs.
    parallel : str
        "ddp": each rank holds the whole model; "fsdp": `fully_shard` of each block.
    validate_every, checkpoint_every : int
        Steps between validations and between checkpoints; 0: only at the end.
    keep_checkpoints : int
        How many of the latest checkpoints are kept.
    seed : int
        Seed of every random number.

    Attributes
    ----------
    spec : TrainSpec
        The settings. A model, text or sampler that was given as an object is no part of it: there the spec
        has its default, and the attributes `model`, `text` and `sampler` count.

    Raises
    ------
    ArgumentError, ShapeError, DtypeError, TextError
        When it is made or at the start of `train`: an argument is not allowed, or the model does not fit it.
        An argument that `TrainSpec` refuses is a SpecError, which is an ArgumentError.

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
        num_tokens: int = 256,
        sampler: str | Sampler | None = None,
        num_samples: int | None = None,
        control_variate: str | None = None,
        drawn_heads: str | None = None,
        draws_schedule: DrawsSchedule = "constant",
        final_num_samples: int | None = None,
        noise: float = 0.0,
        noise_schedule: NoiseSchedule = "constant",
        steps: int = 200,
        batch_size: int = 8,
        accumulation: int = 1,
        local_steps: int = 1,
        learning_rate: float = 1e-3,
        warmup_steps: int = 50,
        weight_decay: float = 0.1,
        clip_norm: float = 1.0,
        precision: Precision = "auto",
        compile: bool = False,
        parallel: Parallel = "ddp",
        validate_every: int = 100,
        checkpoint_every: int = 100,
        keep_checkpoints: int = 2,
        seed: int = 0,
    ):
        check_flags(distributed=distributed, mixed_precision=mixed_precision, progress=progress)
        if mixed_precision:
            if precision not in ("auto", "mixed"):
                raise ArgumentError(
                    f"mixed_precision=True and precision={precision!r} contradict each other."
                )
            precision = "mixed"
        if isinstance(sampler, ExactSampler):  # it has no settings, so its name says all
            sampler = "exact"
        named = {"model": model, "text": text, "sampler": sampler}  # a spec holds names, and no objects
        self.spec = TrainSpec(
            **{name: value for name, value in named.items() if isinstance(value, str)},
            num_tokens=num_tokens,
            num_samples=num_samples,
            control_variate=control_variate,
            drawn_heads=drawn_heads,
            draws_schedule=draws_schedule,
            final_num_samples=final_num_samples,
            noise=noise,
            noise_schedule=noise_schedule,
            steps=steps,
            batch_size=batch_size,
            accumulation=accumulation,
            local_steps=local_steps,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            precision=precision,
            compile=compile,
            parallel=parallel,
            validate_every=validate_every,
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
            seed=seed,
        )
        if num_gpus is not None:
            num_gpus = check_count("num_gpus", num_gpus)
        _check_ranks(distributed, num_gpus, cluster)
        retries = check_count("retries", retries, 0)
        if isinstance(model, str):
            model = make_model(model, self.spec.seed)
        _check_types(model, cluster, folder, on_metrics)
        self.model, self.text = model, text
        self.sampler = None if sampler is None else make_sampler(sampler)
        self.distributed, self.num_gpus, self.cluster = distributed, num_gpus, cluster
        self.folder, self.on_metrics, self.progress, self.retries = folder, on_metrics, progress, retries
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop the training under way after its step, with a checkpoint; from any thread."""
        self._cancelled.set()

    def train(self) -> TrainingResult:
        """Train to the end, or until cancelled, and leave the weights in `model`.

        Ctrl-C, as in a notebook's Interrupt, cancels: the step is finished and a checkpoint written, then
        KeyboardInterrupt is raised. A second Ctrl-C does not wait for that. SIGTERM, SIGHUP and SIGUSR1, as a
        batch system sends them before it ends a job, do the same and raise StoppedBySignal, which is a
        KeyboardInterrupt; they are handled only where `train` runs in the main thread.

        Raises
        ------
        KeyboardInterrupt
            After Ctrl-C or one of these signals.
        RunFailed
            If faults keep coming, or the loss is not finite again; a model's own errors as they are.
        StorageError
            If checkpoints cannot be written or read.
        BackendUnavailable
            If the cluster cannot be opened.
        """
        started = time.monotonic()
        self._cancelled.clear()
        digest = self._check().digest
        folder = self._make_folder()
        temporary = self.folder is None
        try:
            with (
                locked(folder),
                self._open_cluster() as (cluster, notes),
                self._cancelling_on_signals() as received,
            ):
                supervisor, end = self._run(folder, digest, cluster)
                if received:
                    where = "before the first checkpoint"
                    if end.step:
                        where = f"after step {end.step}; checkpoint: {checkpoint_path(folder, end.step)}"
                    raise (
                        KeyboardInterrupt(f"Stopped {where}")
                        if received[0] == signal.SIGINT
                        else StoppedBySignal(received[0], f"Stopped by {received[0].name} {where}")
                    )
        except BaseException as error:
            if checkpoints(folder):
                error.add_note(f"The last checkpoint is {checkpoint_path(folder, checkpoints(folder)[-1])}.")
            elif temporary:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        stopped = end.how == "stopped"
        rows = [supervisor.rows[step] for step in sorted(supervisor.rows) if step <= end.step]
        known = rows or (read_about(folder, end.step).get("rows") if end.step else None) or []
        is_kept = not temporary or (stopped and end.step > 0)
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)
        return TrainingResult(
            steps=end.step,
            stopped=stopped,
            loss=float(known[-1]["loss"]) if known else math.nan,
            metrics=tuple(rows),
            ranks=supervisor.world,
            faults=tuple(supervisor.faults),
            notes=(*notes, *supervisor.notes),
            folder=folder if is_kept else None,
            dashboard_link=cluster.dashboard_link if cluster else None,
            seconds=time.monotonic() - started,
        )

    def _run(self, folder: Path, digest: str, cluster: Cluster | None) -> tuple[Supervisor, RankEnd]:
        """Train in a folder, and load the weights from there if other processes trained them."""
        world = 1
        if cluster:
            world = max(1, min(max(cluster.num_workers, len(cluster.workers)), self.spec.batch_size))
        job = RankJob(
            model=self.model,
            text=self.text,
            digest=digest,
            spec=self.spec,
            sampler=self.sampler,
            shards=self._count_shards(folder, world, digest),
            folder=folder,
            timeout=cluster.timeout if cluster else ALONE_TIMEOUT_S,
        )
        supervisor = Supervisor(
            job,
            cluster,
            retries=self.retries,
            cancelled=self._cancelled,
            on_metrics=self.on_metrics,
            progress=self.progress,
        )
        end = supervisor.run(world)
        if cluster:
            if end.step:
                load_weights(folder, end.step, self.model)
            (folder / "job.pickle").unlink(missing_ok=True)  # it is as large as the model
        return supervisor, end

    def _check(self) -> Tokens:
        """Refuse what cannot be trained; the tokens of the text."""
        spec, model = self.spec, self.model
        if isinstance(model, ReferenceModel) and spec.num_tokens > model.config.context:
            raise ArgumentError(
                f"num_tokens={spec.num_tokens} is more than the model's context, {model.config.context}."
            )
        tokens = open_tokens(self.text, spec.num_tokens)
        if not any(p.requires_grad for p in model.parameters()):
            raise ArgumentError("model has no parameters to train.")
        first = np.asarray(tokens.training[: spec.num_tokens], dtype=np.int64)
        batch = torch.as_tensor(first, device=next(model.parameters()).device)[None]
        attention = Attention(model, self.sampler, spec.num_samples, spec.control_variate, spec.drawn_heads)
        was_training = model.training
        try:
            with torch.no_grad(), attention.drawing(0):
                logits = attention.forward(model.eval(), batch)
            attention.check_layers()
        except IndexError as error:
            raise ShapeError(
                f"model fails on the text's tokens ({error}): has it embedded all {tokens.vocab_size}?"
            ) from error
        finally:
            attention.undo()
            model.train(was_training)
        if not isinstance(logits, Tensor) or logits.shape[:2] != batch.shape or logits.ndim != 3:
            given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ShapeError(
                f"model gives {given} for tokens {tuple(batch.shape)}; it must give logits (B, T, "
                "vocabulary)."
            )
        if logits.shape[-1] < tokens.vocab_size:
            raise ShapeError(
                f"model has logits for {logits.shape[-1]} tokens; the text has {tokens.vocab_size}."
            )
        return tokens

    def _make_folder(self) -> Path:
        """The folder of the checkpoints."""
        try:
            if self.folder is not None:
                folder = Path(os.path.expanduser(self.folder)).absolute()
                folder.mkdir(parents=True, exist_ok=True)
                return folder
            home = runs_home().absolute()
            home.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=".training-", dir=home))
        except OSError as error:
            raise storage_error(Path(self.folder or runs_home()), error) from error

    def _count_shards(self, folder: Path, world: int, digest: str) -> int:
        """Parts of a batch: as in the training that is resumed, else `accumulation` for each rank."""
        for step in reversed(checkpoints(folder)):
            with suppress(StorageError):  # when training begins, a note says that a broken one is passed over
                about = read_about(folder, step)
                settings = {**resumable_settings(self.spec, self.sampler), "text": digest}
                defaults = {name: x.default for name, x in TrainSpec.model_fields.items()}
                # A setting that came later than the checkpoint has its default there.
                there = {**defaults, **about["recipe"], "text": about["text"]}
                differences = [
                    f"{name}={value!r} (there {there.get(name)!r})"
                    for name, value in settings.items()
                    if value != there.get(name)
                ]
                if differences:
                    raise ArgumentError(
                        f"folder={str(folder)!r} holds another training, with other {', '.join(differences)}."
                    )
                return int(about["shards"])
        shards = world * self.spec.accumulation
        if shards > self.spec.batch_size:
            raise ArgumentError(
                f"batch_size={self.spec.batch_size} cannot be shared: {world} ranks times accumulation="
                f"{self.spec.accumulation} are {shards} parts of at least one sequence."
            )
        return shards

    @contextmanager
    def _open_cluster(self) -> Iterator[tuple[Cluster | None, list[str]]]:
        """The cluster to train over, None for this process, and notes of what was chosen."""
        if not self.distributed:
            yield None, []
            return
        if self.cluster is not None:
            yield self.cluster, [self.cluster.chosen]
            return
        kind, notes = "auto", []
        if self.num_gpus is not None:
            gpus, why_none = find_gpus()
            kind = "cuda" if gpus else "local"
            if 0 < gpus < self.num_gpus:
                raise ArgumentError(
                    f"num_gpus={self.num_gpus} is not allowed: there are {gpus}, and each rank needs its own."
                )
            if not gpus:
                notes = [
                    f"num_gpus={self.num_gpus}: {why_none}; {self.num_gpus} CPU processes over gloo train in "
                    "their place."
                ]
                warnings.warn(notes[0], FallbackWarning, stacklevel=4)
        with open_cluster(kind, num_workers=self.num_gpus) as cluster:
            yield cluster, [*notes, cluster.chosen]

    @contextmanager
    def _cancelling_on_signals(self) -> Iterator[list[signal.Signals]]:
        """Let the signals in `STOP_SIGNALS` cancel the training inside the block; the list has those of them.

        What a program ignores, as one under nohup does SIGHUP, stays ignored.
        """
        received: list[signal.Signals] = []
        if threading.current_thread() is not threading.main_thread():
            yield received
            return

        def handle(number: int, frame: Any) -> None:
            if received and number == signal.SIGINT:
                raise KeyboardInterrupt
            received.append(signal.Signals(number))
            self.cancel()

        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        handled = [number for number in STOP_SIGNALS if handlers[number] != signal.SIG_IGN]
        for number in handled:
            signal.signal(number, handle)
        try:
            yield received
        finally:
            for number in handled:
                signal.signal(number, handlers[number])


def _check_ranks(distributed: bool, num_gpus: int | None, cluster: Cluster | None) -> None:
    """Refuse arguments that contradict each other about where the ranks run."""
    if not distributed and ((num_gpus or 1) > 1 or cluster is not None):
        raise ArgumentError(f"num_gpus={num_gpus} and cluster={cluster} need distributed=True.")
    if cluster is not None and num_gpus is not None:
        raise ArgumentError(
            "num_gpus and cluster exclude each other: a cluster has as many ranks as workers."
        )


def _check_types(model: object, cluster: object, folder: object, on_metrics: object) -> None:
    """Refuse arguments of another type by name."""
    kind: Any
    for name, value, kind, expected in (
        ("model", model, nn.Module, f"an nn.Module or one of {', '.join(MODELS)}"),
        ("cluster", cluster, Cluster | None, "a Cluster from open_cluster"),
        ("folder", folder, str | Path | None, "a path"),
        ("on_metrics", on_metrics, Callable | None, "a function of a list of rows"),
    ):
        if not isinstance(value, kind):
            raise DtypeError(f"{name}={value!r} is not allowed: it must be {expected}.")
