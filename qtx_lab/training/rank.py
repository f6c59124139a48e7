"""What one rank of a training does, in the caller's process where it is alone, else in a Dask worker."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..errors import ArgumentError, StorageError
from ..samplers import Sampler
from ..specs import TrainSpec
from .checkpoints import (
    CheckpointWriter,
    check_hashes,
    checkpoints,
    load_checkpoint,
    read_about,
    resumable_settings,
)
from .data import SequenceOrder, Tokens, held_out_windows, open_tokens, stream_seed
from .local_updates import LocalUpdates
from .loop import run_steps, squared_sums
from .sampling import Attention
from .schedules import learning_rate_share, needed_draws, scheduled_draws, scheduled_noise

HELD_OUT_WINDOWS = 16
"""Windows of the held-out text that a validation reads."""
ORDER, DRAWS, DROPOUT, REPEATED_DRAWS, VALIDATION = range(5)
"""What a stream of random numbers is for."""
REPORT_INTERVAL_S = 0.25
"""Rank 0 reports its steps at most this often."""
RESEND_S = 10.0
"""Rows that were reported less than this before a checkpoint are written into it, too."""

Report = Callable[[list[dict[str, Any]]], None]


@dataclass(frozen=True)
class RankJob:
    """All that a rank needs to know.

    Parameters
    ----------
    model : nn.Module
    text : str, path, Tensor or array
    digest : str
        Digest of the text's tokens: every rank must read the same ones.
    spec : TrainSpec
        The settings. Its model, text and sampler are not used: the job has them as objects.
    sampler : Sampler or None
        Sampler of the attention rows; None: those of the model's own modules, else "systematic".
    shards : int
        Parts of a batch, each with its own stream of draws; rank r of R works off the parts r, r + R, ...
        Their number stays the same when ranks are lost, so that the draws do too, and the losses but for
        rounding.
    folder : Path
        Folder of the checkpoints, the same on every machine.
    timeout : float
        How long a rank waits for the others, seconds.
    """

    model: nn.Module
    text: Any
    digest: str
    spec: TrainSpec
    sampler: Sampler | None
    shards: int
    folder: Path
    timeout: float


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended.

    Parameters
    ----------
    how : str
        "done", "stopped", "lost" (other ranks did not answer) or "failed".
    step : int
        Steps that were done.
    error : Exception or None
        What went wrong, if it was lost or failed.
    notes : tuple of str
        What the rank chose by itself, and what it passed over.
    """

    how: str
    step: int
    error: Exception | None = None
    notes: tuple[str, ...] = ()

    @property
    def ended_well(self) -> bool:
        """Whether the rank came to its end, or stopped because it was asked to."""
        return self.how in ("done", "stopped")


@dataclass(frozen=True)
class RankProgress:
    """The step that a rank is at, and what it is doing there."""

    step: int
    activity: str


_PROGRESS: dict[str, RankProgress] = {}
"""Where the rank of each attempt in this process is."""


def progress_of(attempt: str) -> RankProgress:
    """Where the rank of an attempt in this process is."""
    return _PROGRESS.get(attempt, RankProgress(0, "starting"))


def forget_progress(attempt: str) -> None:
    """The attempt is over in this process."""
    _PROGRESS.pop(attempt, None)


def train_rank(
    job: RankJob,
    attempt: str,
    rank: int,
    world: int,
    device: torch.device,
    report: Report,
    must_stop: Callable[[], bool],
) -> RankEnd:
    """Train from the latest checkpoint, or from the start, to the end.

    Parameters
    ----------
    job : RankJob
    attempt : str
        Name of this attempt at the training.
    rank, world : int
        This rank's number, and how many there are; more than one meet in the default process group.
    device : torch.device
    report : callable
        Takes rows of metrics, on rank 0.
    must_stop : callable
        Asked in each step whether to stop after it; if one rank must, all do.

    Raises
    ------
    NotFinite, StorageError, ArgumentError, RuntimeError
        Whatever goes wrong, as it is.
    """
    tokens = open_tokens(job.text, job.spec.num_tokens)
    if tokens.digest != job.digest:
        raise ArgumentError(
            f"text={job.text!r} holds other tokens on rank {rank} than where training was started."
        )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        spec = job.spec
        attention = Attention(
            job.model, job.sampler, spec.num_samples, spec.control_variate, spec.drawn_heads
        )
        was_training = job.model.training
        try:
            return _Rank(job, attempt, rank, world, device, tokens, attention).train(report, must_stop)
        finally:
            attention.undo()
            job.model.train(was_training)


class _Rank:
    """A training under way, on one rank."""

    def __init__(
        self,
        job: RankJob,
        attempt: str,
        rank: int,
        world: int,
        device: torch.device,
        tokens: Tokens,
        attention: Attention,
    ):
        self.job, self.attempt, self.rank, self.world, self.device = job, attempt, rank, world, device
        self.tokens, self.attention, self.spec = tokens, attention, job.spec
        spec = job.spec
        self.order = SequenceOrder(tokens.training, spec.num_tokens, stream_seed(spec.seed, ORDER))
        self.held_out = held_out_windows(tokens.held_out, spec.num_tokens, HELD_OUT_WINDOWS)
        self.model = job.model.to(device).train()
        self.module = self._wrapped_model()
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.names, self.parameters = [n for n, _ in named], [p for _, p in named]
        self.optimizer: torch.optim.Optimizer = _adamw(self.parameters, spec)
        self.optimizer.zero_grad()  # gradients of the caller, or of a failed attempt
        self.dtype, self.notes = _precision(spec.precision, device)
        self.parts = range(rank, job.shards, world)
        self.local: LocalUpdates | None = None
        if spec.local_steps > 1:
            if self.dtype == torch.float16:
                raise ArgumentError(f"local_steps={spec.local_steps} needs bf16 or fp32, not fp16.")
            adamw = partial(_adamw, self.parameters, spec)
            self.local = LocalUpdates(self.names, self.parameters, adamw, self.parts, job.shards)
            self.optimizer = self.local.outer
        self.scaler = torch.amp.GradScaler(device.type) if self.dtype == torch.float16 else None
        self.generator = torch.Generator(device)
        self.draws = attention.draws
        self.checkpoint_seconds: float | None = None
        self.passed_over: list[str] = []
        self.noise_statistics: dict[str, float | None] = {}
        self.rows: list[dict[str, Any]] = []
        self.reports: list[tuple[float, list[dict[str, Any]]]] = []
        self.step_started = self.reported = time.monotonic()

    def _wrapped_model(self) -> nn.Module:
        """The model as its forward is called: compiled, and wrapped for several ranks."""
        if self.spec.compile:
            self.model.compile()
        if self.spec.parallel == "fsdp" and self.world > 1:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.world,))
            for blocks in (m for m in self.model.modules() if isinstance(m, nn.ModuleList)):
                for block in blocks:
                    fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        elif self.world > 1 and self.spec.local_steps == 1:
            return nn.parallel.DistributedDataParallel(self.model)
        return self.model

    def train(self, report: Report, must_stop: Callable[[], bool]) -> RankEnd:
        """See `train_rank`."""
        start = self._resume()
        self.report, self.must_stop, self.stopping = report, must_stop, False
        self.steps_done = start
        self.report([{"phase": "started", "step": start, "notes": self.passed_over}])
        self.step_started = time.monotonic()
        with CheckpointWriter(
            self.job.folder, self.module, self.optimizer, self.attempt, self.spec.keep_checkpoints
        ) as self.writer:
            if self.local is not None:
                self._train_locally(self.local)
            else:
                run_steps(
                    range(start, self.spec.steps),
                    self._gradient,
                    self.parameters,
                    [self.optimizer],
                    rate=lambda step: learning_rate_share(self.spec, step),
                    clip_norm=self.spec.clip_norm,
                    after=self._after,
                    scaler=self.scaler,
                )
        self._send_rows()
        how = "done" if self.steps_done == self.spec.steps else "stopped"
        return RankEnd(how, self.steps_done, notes=tuple(self.notes))

    def _resume(self) -> int:
        """The step to go on from: that of the latest checkpoint that is whole; 0 where there is none at all.

        Raises
        ------
        StorageError
            If there are checkpoints and none of them is whole.
        """
        folder, problems = self.job.folder, []
        for step in reversed(checkpoints(folder)):
            self._note_progress(step, "loading a checkpoint")
            try:
                self._check_checkpoint(step)
                about = read_about(folder, step)
                replicas = None if self.local is None else self.local.state()
                load_checkpoint(folder, step, self.module, self.optimizer, replicas)
            except StorageError as error:
                problems.append(str(error))
                continue
            self.passed_over = [f"A checkpoint was passed over: {problem}" for problem in problems]
            self.notes += self.passed_over
            self.draws = about["draws"]
            if self.scaler is not None:
                self.scaler.load_state_dict(about["scaler"])
            if self.local is not None:
                self.local.restart()
            return step
        if problems:
            raise StorageError(
                f"folder={str(folder)!r} has no checkpoint that is whole: move it away to begin again. "
                + " ".join(problems)
            )
        return 0

    def _check_checkpoint(self, step: int) -> None:
        """Compare the files of a checkpoint with their hashes, shared among ranks; all raise if one does."""
        problem = None
        try:
            check_hashes(self.job.folder, step, self.rank, self.world)
        except StorageError as error:
            problem = str(error)
        if self.world > 1:
            problems: list[str | None] = [None] * self.world
            dist.all_gather_object(problems, problem)
            problem = next(filter(None, problems), None)
        if problem is not None:
            raise StorageError(problem)

    # --- A step --------------------------------------------------------------------------------

    def _gradient(self, step: int) -> float:
        """Leave the gradient of a step in the parameters; the loss, over all ranks."""
        self._note_progress(step, "forward and backward")
        if self.attention.draws:
            self.draws = scheduled_draws(self.spec, step, self.attention.draws, self.draws)
        else:
            self.draws = 0
        self.noise_statistics = {}
        if self.draws and (step == 0 or self._due(step, self.spec.validate_every)):
            # The same batch with other draws: half the squared difference is what sampling adds to the
            # variance.
            self._accumulate(step, REPEATED_DRAWS)
            repeated = [p.grad.clone() for p in self.parameters if p.grad is not None]
            self.optimizer.zero_grad()
            losses = self._accumulate(step, DRAWS)
            self._measure_noise(repeated)
        else:
            losses = self._accumulate(step, DRAWS)
        self._note_progress(step, "waiting for the other ranks' losses")
        table = torch.cat((losses, torch.tensor([float(self.must_stop())], device=losses.device)))
        if self.world > 1:
            dist.all_reduce(table)
        self.stopping = table[-1].item() > 0
        return table[:-1].sum().item()  # in the order of the parts, however many ranks there are

    def _accumulate(self, step: int, stream: int) -> Tensor:
        """The shares of this rank's parts in the batch's mean loss, (shards,), 0 for those of other ranks.

        The parameters get the gradient over all ranks.
        """
        losses = torch.zeros(self.job.shards, device=self.device)
        for shard in self.parts:
            self._exchange_gradients(shard == self.parts[-1])
            share = len(self._sequences(step, shard)) / self.spec.batch_size
            # Ranks' gradients are averaged: times the number of ranks, that is the sum over shards.
            losses[shard] = share * self._backward(step, stream, shard, share * self.world)
        return losses

    def _sequences(self, step: int, shard: int) -> range:
        """The numbers of the sequences of a part."""
        first, last = (self.spec.batch_size * i // self.job.shards for i in (shard, shard + 1))
        base = step * self.spec.batch_size
        return range(base + first, base + last)

    def _backward(self, step: int, stream: int, shard: int, factor: float = 1.0) -> Tensor:
        """Add `factor` times the gradient of a part's mean loss to the parameters' gradients; that loss."""
        spec = self.spec
        batch = self.order.sequences(self._sequences(step, shard)).to(self.device)
        self.generator.manual_seed(stream_seed(spec.seed, stream, step, shard))
        torch.manual_seed(stream_seed(spec.seed, DROPOUT, stream, step, shard))
        with self.attention.drawing(self.draws, scheduled_noise(spec, step), self.generator):
            loss = self._losses(batch).mean()
            scaled = factor * loss
            torch.autograd.backward(scaled if self.scaler is None else self.scaler.scale(scaled))
        return loss.detach()

    def _exchange_gradients(self, exchange: bool) -> None:
        """Whether the next backward pass exchanges gradients between ranks: once in a step is enough."""
        if isinstance(self.module, nn.parallel.DistributedDataParallel):
            self.module.require_backward_grad_sync = exchange
        elif isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(exchange)

    def _losses(self, batch: Tensor) -> Tensor:
        """Cross-entropy of each token, nats, (B, T)."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.attention.forward(self.module, batch[:, :-1])
        return F.cross_entropy(logits.float().transpose(1, 2), batch[:, 1:], reduction="none")

    def _measure_noise(self, repeated: Sequence[Tensor]) -> None:
        """Sampling variance of the step's gradient, whole and by layer, and relative to its squared length.

        `repeated` is the gradient of the same batch with other draws.
        """
        named = [(n, p.grad) for n, p in zip(self.names, self.parameters, strict=True) if p.grad is not None]
        sums = squared_sums([n for n, _ in named], [g for _, g in named], repeated)
        table = torch.stack([torch.stack(pair) for pair in sums.values()])
        if self.spec.parallel == "fsdp" and self.world > 1:
            dist.all_reduce(table)
        table /= 1.0 if self.scaler is None else self.scaler.get_scale() ** 2
        noise, signal = table.sum(0).tolist()
        if not math.isfinite(noise + signal):
            return  # the scaler leaves this step out, or the loop refuses it
        self.noise_to_signal = noise / signal if signal > 0 else math.inf
        self.noise_statistics = {
            "sampling_variance": noise,
            "noise_to_signal": self.noise_to_signal if math.isfinite(self.noise_to_signal) else None,
        }
        for layer, (variance, _) in zip(sums, table.tolist(), strict=True):
            self.noise_statistics[f"sampling_variance {layer}"] = variance

    # --- Local updates -------------------------------------------------------------------------

    def _train_locally(self, local: LocalUpdates) -> None:
        """Let this rank's replicas train alone between exchanges, to the end or until asked to stop."""
        every = self.spec.local_steps
        while self.steps_done < self.spec.steps and not self.stopping:
            stop = (self.steps_done // every + 1) * every
            stretch = range(self.steps_done, min(stop, self.spec.steps))
            started = time.monotonic()
            table = torch.zeros(len(stretch) + 1, 2, device=self.device)  # loss and gradient norm; stop
            for shard in self.parts:
                with local.training(shard) as optimizer:
                    self._train_replica(shard, stretch, optimizer, table)
            self._note_progress(stretch.stop, "waiting for the other ranks' weights")
            table[-1] = float(self.must_stop())
            if self.world > 1:
                dist.all_reduce(table)
            local.exchange()
            self.stopping = table[-1, 0].item() > 0
            seconds = (time.monotonic() - started) / len(stretch)
            for step, (loss, norm) in zip(stretch, table[:-1].tolist(), strict=True):
                self.steps_done = step + 1
                if self.steps_done < stretch.stop:
                    self.rows.append(self._metrics(step, loss, norm, seconds))
            self.step_started = time.monotonic() - seconds
            self._after(step, loss, norm)

    def _train_replica(
        self, shard: int, stretch: range, optimizer: torch.optim.Optimizer, table: Tensor
    ) -> None:
        """Take the steps of one replica, and add its share of each loss and norm to the table."""

        def gradient(step: int) -> float:
            self._note_progress(step, f"training replica {shard} alone")
            if self.attention.draws:
                self.draws = scheduled_draws(self.spec, step, self.attention.draws, self.draws)
            return self._backward(step, DRAWS, shard).item()

        def after(step: int, loss: float, norm: float) -> bool:
            share = len(self._sequences(step, shard)) / self.spec.batch_size
            row = torch.tensor([share * loss, norm / self.job.shards], device=table.device)
            table[step - stretch.start] += row
            if self.rank == 0 and time.monotonic() - self.reported >= REPORT_INTERVAL_S:
                self.report([{"phase": "alone", "step": step}])  # that it goes on
                self.reported = time.monotonic()
            return False

        run_steps(
            stretch,
            gradient,
            self.parameters,
            [optimizer],
            rate=lambda step: learning_rate_share(self.spec, step),
            clip_norm=self.spec.clip_norm,
            after=after,
        )

    # --- After a step --------------------------------------------------------------------------

    def _after(self, step: int, loss: float, norm: float) -> bool:
        """Keep the records of a step; whether training stops after it."""
        spec = self.spec
        self.writer.check()
        self.steps_done = step + 1
        now = time.monotonic()
        seconds, self.step_started = now - self.step_started, now
        if self.checkpoint_seconds is not None:
            self.checkpoint_seconds += self.writer.copy_wait
            seconds -= self.writer.copy_wait
        row = self._metrics(step, loss, norm, seconds)
        if self.noise_statistics and spec.draws_schedule == "signal-to-noise":
            self.draws = needed_draws(spec, self.noise_to_signal, self.attention.draws, self.draws)
        last = self.steps_done == spec.steps
        if last or self._due(step, spec.validate_every):
            self._note_progress(self.steps_done, "validating")
            row |= self._validate(step)
            self.step_started = time.monotonic()  # the time of a step is without validation
        self.rows.append(row)
        if last or self.stopping or self._due(step, spec.checkpoint_every):
            self._send_rows()
            self._note_progress(self.steps_done, "writing a checkpoint")
            self._save_checkpoint()
            self.step_started = time.monotonic()  # and without checkpoints
        elif now - self.reported >= REPORT_INTERVAL_S:
            self._send_rows()
        return self.stopping

    def _metrics(self, step: int, loss: float, norm: float, seconds: float) -> dict[str, Any]:
        spec = self.spec
        row: dict[str, Any] = {
            "step": self.steps_done,
            "loss": loss,
            "learning_rate": self.spec.learning_rate * learning_rate_share(self.spec, step),
            "gradient_norm": norm,
            "tokens_per_second": spec.batch_size * spec.num_tokens / max(seconds, 1e-9),
            "memory_bytes": _memory_bytes(self.device),
            "ranks": self.world,
        }
        if self.checkpoint_seconds is not None:
            row["checkpoint_seconds"], self.checkpoint_seconds = self.checkpoint_seconds, None
        if self.tokens.bytes:
            row["bits_per_byte"] = loss / math.log(2)
        if self.attention.draws:
            row |= {"draws": self.draws, "noise": scheduled_noise(spec, step), **self.noise_statistics}
        return row

    def _due(self, step: int, interval: int) -> bool:
        return interval > 0 and (step + 1) % interval == 0

    def _save_checkpoint(self) -> None:
        about = {
            "step": self.steps_done,
            "sequences": self.steps_done * self.spec.batch_size,
            "recipe": resumable_settings(self.spec, self.job.sampler),
            "text": self.job.digest,
            "shards": self.job.shards,
            "draws": self.draws,
            "ranks": self.world,
            "rows": [row for _, rows in self.reports for row in rows],
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }
        started = time.monotonic()
        self.writer.save(self.steps_done, about, None if self.local is None else self.local.gathered_state())
        self.checkpoint_seconds = time.monotonic() - started

    def _validate(self, step: int) -> dict[str, float]:
        """Held-out loss over all ranks, with exact attention, and with draws as in training."""
        count = len(self.held_out)
        share = -(-count // self.world)  # the same on every rank: fsdp's ranks go in step
        mine = range(self.rank * share, (self.rank + 1) * share)
        draws_of = {"exact": 0} | ({"sampled": self.draws} if self.attention.draws else {})
        table = torch.zeros(len(draws_of), count, device=self.device)
        self.model.eval()
        with torch.no_grad():
            for row, draws in enumerate(draws_of.values()):
                noise = scheduled_noise(self.spec, step) if draws else 0.0
                for i in mine:  # one window at a time: validation must not need more memory than training
                    window = self.held_out[min(i, count - 1)].to(self.device)
                    self.generator.manual_seed(stream_seed(self.spec.seed, VALIDATION, i))
                    with self.attention.drawing(draws, noise, self.generator):
                        loss = self._losses(window[None]).mean()
                    if i < count:
                        table[row, i] = loss
        self.model.train()
        if self.world > 1:
            dist.all_reduce(table)
        unit, name = (math.log(2), "bits_per_byte") if self.tokens.bytes else (1.0, "loss")
        means = (table.sum(1) / count / unit).tolist()
        return {f"held_out_{name}_{way}": mean for way, mean in zip(draws_of, means, strict=True)}

    def _send_rows(self) -> None:
        if self.rows:
            if self.rank == 0:
                self.report(self.rows)
            now = time.monotonic()
            # The scheduler drops what comes from a worker that is leaving, from before the worker knows that
            # it is to stop: at least the rows of the step at that time, and of the last step, are lost.
            earlier = [report for report in self.reports[:-1] if now - report[0] < RESEND_S]
            self.reports = [*earlier, *self.reports[-1:], (now, self.rows)]
            self.rows, self.reported = [], now

    def _note_progress(self, step: int, activity: str) -> None:
        _PROGRESS[self.attempt] = RankProgress(step, activity)


def _adamw(parameters: Sequence[nn.Parameter], spec: TrainSpec) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [{**group, "peak_lr": spec.learning_rate} for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(0.9, 0.95), fused=True)


def _precision(precision: str, device: torch.device) -> tuple[torch.dtype | None, list[str]]:
    """The dtype of autocast, None for none, and a note of what was chosen where that was left open."""
    if precision in ("fp32", "bf16", "fp16"):
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision], []
    if precision == "auto" and device.type == "cpu":
        return None, ["precision: fp32, on a CPU."]
    if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, ["precision: bf16 autocast."]
    return torch.float16, ["precision: fp16 autocast with a loss scaler; this GPU has no bf16."]


def _memory_bytes(device: torch.device) -> int:
    """The most memory that tensors took on the GPU so far, or what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
