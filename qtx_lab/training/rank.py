"""What one rank of a training does: in the caller's process where it is alone, else in a Dask worker."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, RunFailed, StorageError
from .checkpoints import checkpoints, load_checkpoint, read_about, save_checkpoint
from .data import SequenceOrder, Tokens, held_out_windows, open_tokens, stream_seed
from .loop import run_steps, squared_sums
from .recipe import Recipe
from .sampling import Attention

HELD_OUT_WINDOWS = 16
"""Windows of the held-out text that a validation reads."""
ORDER, DRAWS, DROPOUT, OTHER_DRAWS, VALIDATION = range(5)
"""What a stream of random numbers is for."""
EVERY_SECONDS = 0.25
"""How often rank 0 reports its steps."""

LEAVE_SECONDS = 5.0
"""How long after the last exchange a process group's destructor runs: see `leave_group`."""

_STOP: set[str] = set()
"""Attempts that are to stop, by name."""
_STORES: dict[str, dist.TCPStore] = {}
"""Where the ranks of an attempt meet, in rank 0's process."""
_AT: dict[str, tuple[int, str]] = {}
"""Step of each attempt here, and what it is doing."""

Report = Callable[[list[dict[str, Any]]], None]


@dataclass(frozen=True)
class Job:
    """All that a rank needs to know.

    Parameters
    ----------
    model : nn.Module
    text : str, path, Tensor or array
    digest : str
        Of the text's tokens: every rank must read the same.
    recipe : Recipe
    shards : int
        Parts of a batch, each with its own stream of draws; rank r of R works off parts r, r + R, ... Their number stays
        when ranks are lost, so that the draws, and but for rounding the losses, stay too.
    folder : Path
        Of the checkpoints; on every machine the same.
    timeout : float
        Seconds after which a rank gives up waiting for the others.
    """

    model: nn.Module
    text: Any
    digest: str
    recipe: Recipe
    shards: int
    folder: Path
    timeout: float


@dataclass(frozen=True)
class End:
    """How a rank ended: "done", "stopped", "lost" (others did not answer) or "failed"; the step it was at."""

    how: str
    step: int
    error: Exception | None = None
    notes: tuple[str, ...] = ()


def train_rank(
    job: Job,
    attempt: str,
    rank: int,
    world: int,
    device: torch.device,
    report: Report,
    stopped: Callable[[], bool],
) -> End:
    """Train from the latest checkpoint, or from the start, to the end.

    Parameters
    ----------
    job : Job
    attempt : str
        Name of this attempt at the training.
    rank, world : int
        With world > 1 the default process group is there.
    device : torch.device
    report : callable
        Takes rows of metrics, on rank 0.
    stopped : callable
        Whether to stop now, asked before each step; if so on one rank, all do.

    Raises
    ------
    NotFinite, StorageError, ArgumentError, RuntimeError
        As they come.
    """
    recipe, model = job.recipe, job.model
    tokens = open_tokens(job.text, recipe.num_tokens)
    if tokens.digest != job.digest:
        raise ArgumentError(
            f"text={job.text!r} is another one on rank {rank} than where training was asked for."
        )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        attention = Attention(model, recipe)
        was_training = model.training
        try:
            return _Rank(job, attempt, rank, world, device, tokens, attention).train(report, stopped)
        finally:
            attention.undo()
            model.train(was_training)


class _Rank:
    """A training under way: what its steps share."""

    def __init__(
        self,
        job: Job,
        attempt: str,
        rank: int,
        world: int,
        device: torch.device,
        tokens: Tokens,
        attention: Attention,
    ):
        self.job, self.attempt, self.rank, self.world, self.device = job, attempt, rank, world, device
        self.tokens, self.attention, self.recipe = tokens, attention, job.recipe
        recipe = job.recipe
        self.order = SequenceOrder(tokens.training, recipe.num_tokens, stream_seed(recipe.seed, ORDER))
        self.held_out = held_out_windows(tokens.held_out, recipe.num_tokens, HELD_OUT_WINDOWS)
        self.model = job.model.to(device).train()
        self.module = self._wrapped()
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.names, self.parameters = [n for n, _ in named], [p for _, p in named]
        self.optimizer = _adamw(self.parameters, recipe)
        self.optimizer.zero_grad()  # the caller's, or a failed attempt's
        self.dtype, self.notes = _precision(recipe.precision, device)
        self.scaler = torch.amp.GradScaler(device.type) if self.dtype == torch.float16 else None
        self.generator = torch.Generator(device)
        self.draws = attention.draws
        self.measured: dict[str, float | None] = {}
        self.rows: list[dict[str, Any]] = []
        self.step_started = self.reported = time.monotonic()

    def _wrapped(self) -> nn.Module:
        if self.recipe.compile:
            self.model.compile()
        if self.recipe.parallel == "fsdp" and self.world > 1:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.world,))
            for blocks in (m for m in self.model.modules() if isinstance(m, nn.ModuleList)):
                for block in blocks:
                    fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        elif self.world > 1:
            return nn.parallel.DistributedDataParallel(self.model)
        return self.model

    def train(self, report: Report, stopped: Callable[[], bool]) -> End:
        start = self._resume()
        self.report, self.stopped, self.stop = report, stopped, False
        self.done = start
        self.report([{"phase": "started", "step": start}])
        self.step_started = time.monotonic()
        run_steps(
            range(start, self.recipe.steps),
            self._gradient,
            self.parameters,
            [self.optimizer],
            rate=self.recipe.rate,
            clip_norm=self.recipe.clip_norm,
            after=self._after,
            scaler=self.scaler,
        )
        self._flush(0)
        return End("stopped" if self.done < self.recipe.steps else "done", self.done, notes=tuple(self.notes))

    def _resume(self) -> int:
        """The step to go on from: the latest checkpoint's that can be read."""
        for step in reversed(checkpoints(self.job.folder)):
            self._at(step, "loading a checkpoint")
            try:
                about = read_about(self.job.folder, step)
                load_checkpoint(self.job.folder, step, self.module, self.optimizer)
            except StorageError as error:
                self.notes.append(f"A checkpoint was passed over: {error}")
                continue
            self.draws = about["draws"]
            if self.scaler is not None:
                self.scaler.load_state_dict(about["scaler"])
            return step
        return 0

    def _gradient(self, step: int) -> float:
        self._at(step, "forward and backward")
        recipe = self.recipe
        self.draws = recipe.draws(step, self.attention.draws, self.draws) if self.attention.draws else 0
        self.measured = {}
        if self.draws and (step == 0 or self._due(step, recipe.validate_every)):
            # The same batch with other draws: half the squared difference is what sampling adds to the variance.
            self._accumulate(step, OTHER_DRAWS)
            other = [p.grad.clone() for p in self.parameters if p.grad is not None]
            self.optimizer.zero_grad()
            loss = self._accumulate(step, DRAWS)
            self._measure(other)
        else:
            loss = self._accumulate(step, DRAWS)
        self._at(step, "waiting for the other ranks' losses")
        sums = torch.stack((loss, torch.tensor(float(self.stopped()), device=loss.device)))
        if self.world > 1:
            dist.all_reduce(sums)
        self.stop = sums[1].item() > 0
        return sums[0].item()

    def _accumulate(self, step: int, stream: int) -> Tensor:
        """This rank's share of the batch's mean loss; its gradient, of all ranks, goes to the parameters."""
        recipe, shards, total = self.recipe, self.job.shards, torch.zeros((), device=self.device)
        mine = range(self.rank, shards, self.world)
        for shard in mine:
            first, last = (recipe.batch_size * i // shards for i in (shard, shard + 1))
            base = step * recipe.batch_size
            batch = self.order.sequences(range(base + first, base + last)).to(self.device)
            share = len(batch) / recipe.batch_size
            self.generator.manual_seed(stream_seed(recipe.seed, stream, step, shard))
            torch.manual_seed(stream_seed(recipe.seed, DROPOUT, stream, step, shard))
            self._sync(shard == mine[-1])
            with self.attention.drawing(self.draws, recipe.noise_at(step), self.generator):
                loss = self._loss(batch).mean() * share
                # Ranks' gradients are averaged: times their number it is the sum over shards.
                scaled = loss * self.world if self.scaler is None else self.scaler.scale(loss * self.world)
                torch.autograd.backward(scaled)
            total += loss.detach()
        return total

    def _sync(self, now: bool) -> None:
        """Whether the next backward exchanges gradients: once a step is enough."""
        module: Any = self.module
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module.require_backward_grad_sync = now
        elif hasattr(module, "set_requires_gradient_sync"):
            module.set_requires_gradient_sync(now)

    def _loss(self, batch: Tensor) -> Tensor:
        """Cross-entropy of each token, nats, (B, T)."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.attention.forward(self.module, batch[:, :-1])
        return F.cross_entropy(logits.float().transpose(1, 2), batch[:, 1:], reduction="none")

    def _measure(self, other: Sequence[Tensor]) -> None:
        """Sampling variance of the step's gradient, whole and by layer, relative to its squared length."""
        named = [(n, p.grad) for n, p in zip(self.names, self.parameters, strict=True) if p.grad is not None]
        sums = squared_sums([n for n, _ in named], [g for _, g in named], other)
        table = torch.stack([torch.stack(pair) for pair in sums.values()])
        if self.recipe.parallel == "fsdp" and self.world > 1:
            dist.all_reduce(table)
        scale = 1.0 if self.scaler is None else self.scaler.get_scale() ** 2
        noise, signal = (table / scale).sum(0).tolist()
        if not math.isfinite(noise + signal):
            return  # the scaler, or the loop, will have something to say
        ratio = noise / signal if signal > 0 else math.inf
        self.measured = {
            "sampling_variance": noise,
            "noise_to_signal": ratio if math.isfinite(ratio) else None,
        }
        for layer, (variance, _) in zip(sums, (table / scale).tolist(), strict=True):
            self.measured[f"sampling_variance {layer}"] = variance
        self.ratio = ratio

    def _after(self, step: int, loss: float, norm: float) -> bool:
        recipe, now = self.recipe, time.monotonic()
        seconds, self.step_started = now - self.step_started, now
        self.done = step + 1
        row: dict[str, Any] = {
            "step": self.done,
            "loss": loss,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": norm,
            "tokens_per_second": recipe.batch_size * recipe.num_tokens / max(seconds, 1e-9),
            "memory_bytes": _memory(self.device),
            "ranks": self.world,
        }
        if self.tokens.bytes:
            row["bits_per_byte"] = loss / math.log(2)
        if self.attention.draws:
            row |= {"draws": self.draws, "noise": recipe.noise_at(step)} | self.measured
        if self.measured and recipe.draws_schedule == "signal-to-noise":
            self.draws = recipe.draws_for(self.ratio, self.attention.draws, self.draws)
        last = self.done == recipe.steps
        if last or self._due(step, recipe.validate_every):
            self._at(self.done, "validating")
            row |= self._validate(step)
            self.step_started = time.monotonic()  # a step's time is without these
        self.rows.append(row)
        if last or self.stop or self._due(step, recipe.checkpoint_every):
            self._flush(0)
            self._at(self.done, "writing a checkpoint")
            about = {"step": self.done, "sequences": self.done * recipe.batch_size, "recipe": recipe.identity(),
                     "text": self.job.digest, "shards": self.job.shards, "draws": self.draws, "ranks": self.world,
                     "scaler": None if self.scaler is None else self.scaler.state_dict()}  # fmt: skip
            save_checkpoint(
                self.job.folder,
                self.done,
                self.module,
                self.optimizer,
                about,
                self.attempt,
                recipe.keep_checkpoints,
            )
            self.step_started = time.monotonic()
        self._flush(EVERY_SECONDS)
        return self.stop

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and (step + 1) % every == 0

    def _validate(self, step: int) -> dict[str, float]:
        """Held-out loss with exact attention, and with draws as in training, over all ranks."""
        each = -(-len(self.held_out) // self.world)  # as many on every rank: fsdp's ranks go in step
        mine = torch.arange(self.rank * each, (self.rank + 1) * each)
        counted = (mine < len(self.held_out)).to(self.device)
        windows = self.held_out[mine.clamp_max(len(self.held_out) - 1)].to(self.device)
        ways = {"exact": 0} | ({"sampled": self.draws} if self.attention.draws else {})
        sums = []
        self.model.eval()
        with torch.no_grad():
            for draws in ways.values():
                self.generator.manual_seed(stream_seed(self.recipe.seed, VALIDATION, self.rank))
                with self.attention.drawing(
                    draws, self.recipe.noise_at(step) if draws else 0.0, self.generator
                ):
                    # One window at a time: validation must not need more memory than training.
                    losses = torch.stack([self._loss(window[None]).mean() for window in windows])
                sums.append((losses * counted).sum())
        self.model.train()
        total = torch.stack(sums)
        if self.world > 1:
            dist.all_reduce(total)
        unit, name = (math.log(2), "bits_per_byte") if self.tokens.bytes else (1.0, "loss")
        found = (total / len(self.held_out) / unit).tolist()
        return {f"held_out_{name}_{way}": value for way, value in zip(ways, found, strict=True)}

    def _flush(self, seconds: float) -> None:
        now = time.monotonic()
        if self.rank == 0 and self.rows and now - self.reported >= seconds:
            self.report(self.rows)
            self.rows, self.reported = [], now

    def _at(self, step: int, doing: str) -> None:
        _AT[self.attempt] = (step, doing)


def _adamw(parameters: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [{**group, "peak_lr": recipe.learning_rate} for group in groups if group["params"]]
    # A rate that is 0 for now, as at the end of the cosine, still has to be a number that AdamW takes.
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def _precision(precision: str, device: torch.device) -> tuple[torch.dtype | None, list[str]]:
    """The dtype of autocast, None for none, and what was chosen where that was left open."""
    if precision in ("fp32", "bf16", "fp16"):
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision], []
    if precision == "auto" and device.type == "cpu":
        return None, ["precision: fp32, on a CPU."]
    if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, ["precision: bf16 autocast."]
    return torch.float16, ["precision: fp16 autocast with a loss scaler; this GPU has no bf16."]


def _memory(device: torch.device) -> int:
    """Most memory that tensors took on the GPU so far, or what the process holds now, bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


# --- In a Dask worker ---------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    """What must be alike on all workers, and what a rank can use."""
    from .. import __version__

    return {"torch": torch.__version__, "qtx_lab": __version__, "cuda": torch.cuda.is_available()}


def open_store(attempt: str, host: str, timeout: float) -> int:
    """Open the meeting place of an attempt's ranks, in rank 0's worker; its port."""
    _STORES.clear()
    _STORES[attempt] = dist.TCPStore(
        host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout)
    )
    return _STORES[attempt].port


def ask_to_stop(attempt: str) -> None:
    """The attempt's rank here stops before its next step is over."""
    _STOP.add(attempt)


def whereabouts(attempt: str) -> tuple[int, str]:
    """The step that the attempt's rank here is at, and what it is doing."""
    return _AT.get(attempt, (0, "starting"))


def run_in_worker(
    folder: Path, attempt: str, rank: int, world: int, host: str, port: int, timeout: float
) -> End:
    """Be rank `rank` of `world`, in a Dask worker; never raises."""
    from distributed import get_worker
    from distributed.protocol.pickle import loads

    worker = get_worker()
    threads = torch.get_num_threads()
    try:
        try:
            job = loads((folder / "job.pickle").read_bytes())
        except FileNotFoundError:
            raise ArgumentError(
                f"folder={str(folder)!r} is not there for rank {rank} at {worker.address}: workers on other machines need "
                "a folder that all of them share."
            ) from None
        torch.set_num_threads(worker.state.nthreads)
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", 0) if cuda else torch.device("cpu")
        interface = _interface(worker.address)
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface else ():
            os.environ.setdefault(name, interface or "")
        if cuda:
            torch.cuda.set_device(device)
        if dist.is_initialized():
            raise RunFailed(f"The worker {worker.address} is already training something else.")
        if world > 1:
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout))
            dist.init_process_group("nccl" if cuda else "gloo", store=dist.PrefixStore(attempt, store), rank=rank,
                                    world_size=world, timeout=timedelta(seconds=timeout))  # fmt: skip

        def stopped() -> bool:
            if worker.status.name != "running":  # its scheduler is gone: another attempt may be under way
                raise _Lost(f"The worker {worker.address} is {worker.status.name}.")
            return attempt in _STOP

        end = train_rank(job, attempt, rank, world, device, partial(worker.log_event, attempt), stopped)
        leave_group()
        return end
    except Exception as error:
        # The process group stays as it is: taking one down whose ranks wait for each other can take its process along.
        # Whoever reads this starts the worker anew.
        return End(_kind(error), whereabouts(attempt)[0], _portable(error))
    finally:
        torch.set_num_threads(threads)
        _AT.pop(attempt, None)


def leave_group() -> None:
    """Leave the default process group after a training that ended well.

    Its last reference is dropped a while later. The group's destructor joins gloo's threads with Python's lock held, and
    one that just then lets go of the last exchange's tensor waits for this lock: that would be a deadlock.
    """
    if dist.is_initialized():
        kept = [dist.group.WORLD]
        dist.destroy_process_group()
        timer = threading.Timer(LEAVE_SECONDS, kept.clear)
        timer.daemon = True
        timer.start()


class _Lost(RuntimeError):
    """This rank has lost the others."""


def _kind(error: BaseException | None) -> str:
    """Whether an error means that other ranks did not answer: gloo says so in words only."""
    words = (
        "gloo",
        "Connection closed by peer",
        "Connection reset",
        "Broken pipe",
        "NCCL",
        "timed out",
        "Timed out",
    )
    while error is not None:
        lost = isinstance(error, _Lost | dist.DistError | ConnectionError)
        if lost or (
            isinstance(error, RuntimeError)
            and not isinstance(error, RunFailed)
            and any(w in str(error) for w in words)
        ):
            return "lost"
        error = error.__cause__
    return "failed"


def _portable(error: Exception) -> Exception:
    """The error itself if it can travel, else its words."""
    from distributed.protocol.pickle import dumps, loads

    try:
        return loads(dumps(error))
    except Exception:
        return RunFailed(f"{type(error).__name__}: {error}")


def _interface(address: str) -> str | None:
    """The network interface that has a worker's address; what gloo takes by itself may not reach the others."""
    ip = address.split("://")[-1].rpartition(":")[0].strip("[]")
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == ip for a in addresses):
            return name
    return None
