"""Checkpoints of a training, by torch.distributed.checkpoint: whole or not there, and only the latest few.

A checkpoint is a folder `step-00000100` that appears under this name only when all of it is on disk. It can
be read by another number of ranks than wrote it. Its file `SHA256SUMS` has the hash of every other file, as
`sha256sum --check` reads it; a checkpoint whose files have other hashes is not loaded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import StorageError
from ..samplers import Sampler
from ..specs import TrainSpec
from ..storage import json_bytes, storage_error, sync_folder, write_atomic

ABOUT = "training.json"
"""The file in a checkpoint that describes it."""
HASHES = "SHA256SUMS"
"""The file in a checkpoint that has the hash of every other file."""
ABOUT_TYPES = {"recipe": dict, "text": str, "shards": int, "draws": int, "scaler": dict | None}
"""What a checkpoint must say about itself; "recipe" is what `resumable_settings` gives."""
RECORDING = ("compile", "parallel", "validate_every", "checkpoint_every", "keep_checkpoints")
"""Settings that may differ when a training is resumed: they change no number but for rounding."""
FULL_DISK_BYTES = 16 << 20
"""Free space below which a disk counts as full when a write failed without a reason."""


def resumable_settings(spec: TrainSpec, sampler: Sampler | None) -> dict[str, Any]:
    """The settings that decide numbers, as plain JSON types: a training is resumed only under the same ones.

    The model and the text are not among them; a checkpoint has the digest of the text's tokens instead.
    """
    settings = spec.model_dump(mode="json", exclude={"model", "text", *RECORDING})
    return {**settings, "sampler": None if sampler is None else sampler.name}


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return folder / f"step-{step:08d}"


def checkpoints(folder: Path) -> list[int]:
    """Numbers of the steps after which there is a whole checkpoint, in rising order."""
    numbers = (path.parent.name.removeprefix("step-") for path in folder.glob(f"step-*/{ABOUT}"))
    return sorted(int(number) for number in numbers if number.isdecimal())


def read_about(folder: Path, step: int) -> dict[str, Any]:
    """What a checkpoint says about itself.

    Raises
    ------
    StorageError
        If it cannot be read.
    """
    path = checkpoint_path(folder, step) / ABOUT
    try:
        about = json.loads(path.read_bytes())
        for name, kind in ABOUT_TYPES.items():
            if not isinstance(about, dict) or not isinstance(about.get(name), kind):
                raise ValueError(f"{ABOUT} does not say its {name}")
        return about
    except (OSError, ValueError) as error:
        raise StorageError(f"The checkpoint {path.parent} cannot be read: {error}.") from error


def write_hashes(checkpoint: Path) -> None:
    """Write the hash of every file of a checkpoint into `HASHES`, in the format of sha256sum."""
    lines = [f"{_sha256(path)}  {path.name}\n" for path in sorted(checkpoint.iterdir())]
    write_atomic(checkpoint / HASHES, "".join(lines).encode())


def check_hashes(folder: Path, step: int, part: int = 0, parts: int = 1) -> None:
    """Compare the files of a checkpoint with their hashes.

    Parameters
    ----------
    folder : Path
        Folder of all checkpoints.
    step : int
        The checkpoint after so many steps.
    part, parts : int
        Only every `parts`-th file from this one, so that ranks share the work.

    Raises
    ------
    StorageError
        If a file is missing or holds other bytes than were written.
    """
    checkpoint = checkpoint_path(folder, step)
    try:
        lines = (checkpoint / HASHES).read_text().splitlines()
        for line in lines[part::parts]:
            digest, _, name = line.partition("  ")
            if Path(name).name != name or _sha256(checkpoint / name) != digest:
                raise ValueError(f"{name!r} holds other bytes than were written: its SHA-256 differs")
    except (OSError, ValueError) as error:
        raise StorageError(f"The checkpoint {checkpoint} cannot be read: {error}.") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other training, in this process or another, out of a folder; a killed process holds no lock.

    Raises
    ------
    StorageError
        If another training holds the folder, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock", timeout=0, is_singleton=True).acquire()
    except Timeout as error:
        raise StorageError(
            f"folder={str(folder)!r} is being trained into by somebody else: wait for the end of that "
            "training, or stop it."
        ) from error
    except OSError as error:
        raise storage_error(folder, error) from error
    with lock:
        yield


def claim(folder: Path, attempt: str) -> None:
    """Let only this attempt write checkpoints from now on, and remove what others left half written.

    Raises
    ------
    StorageError
        If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    write_atomic(folder / "attempt", attempt.encode())
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


class CheckpointWriter:
    """Writes the checkpoints of a training, where possible beside it; used as a `with` block around it.

    Where every rank holds the whole state, a thread of rank 0 copies it and writes the copy while training
    goes on; beside the second step it has prepared the memory for that. The forward and backward passes of
    the next step run beside the copying, which leaves the parameters alone; the optimizer's step waits for
    its end. At most one checkpoint is being written: the next `save` waits for it. An error of the write is
    raised by the next `check` or `save`, or at the end of the block. Of a sharded module all ranks write
    their parts at once, and training waits.

    Parameters
    ----------
    folder : Path
        Folder of all checkpoints.
    module, optimizer
        What is saved.
    attempt : str
        Name of this attempt, from `claim`.
    keep : int
        How many of the latest checkpoints are kept.

    Attributes
    ----------
    copy_wait : float
        Seconds for which optimizers have waited for the copy of the last checkpoint.
    """

    def __init__(
        self, folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, attempt: str, keep: int
    ):
        self.folder, self.module, self.optimizer = folder, module, optimizer
        self.attempt, self.keep = attempt, keep
        self.sharded = isinstance(module, FSDPModule)
        self.copy_wait = 0.0
        self._copied = threading.Event()
        self._copied.set()
        self._writing: Future[None] | None = None
        self._allocating: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._warnings = warnings.catch_warnings()
        self._pointers: list[int] = []
        self._sources: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._staged: dict[str, Any] = {}

    def __enter__(self) -> Self:
        # Here and not in the thread: filters of warnings belong to the whole process.
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self._hooks = [
            self.optimizer.register_step_pre_hook(lambda *_: self._wait_for_copy()),
            self.optimizer.register_step_post_hook(lambda *_: self._allocate_beside()),
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._pool.shutdown(wait=True)
        self._warnings.__exit__(None, None, None)
        if kind is None:
            self._finish()

    def save(self, step: int, about: Mapping[str, Any], replicas: Mapping[str, Tensor] | None = None) -> None:
        """Write the checkpoint after `step` steps; every rank calls it.

        Parameters
        ----------
        step : int
        about : mapping
            What the checkpoint says about itself, see `ABOUT_TYPES`.
        replicas : mapping, optional
            The state of all replicas of a training with local updates, as a copy; on rank 0.

        Raises
        ------
        StorageError
            If this or the one before cannot be written: nothing is left of it, and earlier checkpoints are
            untouched.
        """
        self._finish()
        self.copy_wait = 0.0
        if self.sharded:
            model, optimizer_state = get_state_dict(self.module, self.optimizer)
            self._write(step, {"model": model, "optimizer": optimizer_state}, about)
        elif self._is_lead:
            pairs = self._stage()
            state = self._staged | ({} if replicas is None else {"replicas": replicas})
            self._copied.clear()
            self._writing = self._pool.submit(self._copy_and_write, pairs, step, state, about)

    def check(self) -> None:
        """Raise the error of a write that has failed."""
        if self._writing is not None and self._writing.done():
            self._finish()

    def _finish(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _wait_for_copy(self) -> None:
        started = time.monotonic()
        self._copied.wait()
        self.copy_wait += time.monotonic() - started

    @property
    def _is_lead(self) -> bool:
        """Whether this is the rank that writes what all ranks have alike."""
        return not dist.is_initialized() or dist.get_rank() == 0

    def _allocate_beside(self) -> None:
        """Let the thread prepare the first checkpoint once the optimizer has its state."""
        if self._allocating is None and self._is_lead and not self.sharded and self.optimizer.state:
            self._allocating = self._pool.submit(self._allocate, self._pointers_now())

    def _pointers_now(self) -> list[int]:
        """Where the tensors of the module and its optimizer are."""
        tensors = (*self.module.parameters(), *self.module.buffers(), *self._optimizer_tensors())
        return [x.data_ptr() for x in tensors]

    def _optimizer_tensors(self) -> list[Tensor]:
        states = self.optimizer.state.values()
        return [x for state in states for x in state.values() if isinstance(x, Tensor)]

    def _allocate(self, pointers: list[int]) -> None:
        """Prepare `_staged`, the state in main memory, without the content of its tensors."""
        model, optimizer_state = get_state_dict(self.module, self.optimizer)
        leaves, structure = tree_flatten({"model": model, "optimizer": optimizer_state})
        staged = [torch.empty_like(x, device="cpu") if isinstance(x, Tensor) else x for x in leaves]
        self._staged = tree_unflatten(staged, structure)
        self._sources = [x.detach() for x in leaves if isinstance(x, Tensor)]
        self._copies = [x for x in staged if isinstance(x, Tensor)]
        # They are used again only if all of them are those of the module and its optimizer.
        self._pointers = pointers if {x.data_ptr() for x in self._sources} <= set(pointers) else []

    def _stage(self) -> list[tuple[Tensor, Tensor]]:
        """Bring `_staged` up to date; the pairs (copy, source) that are still to be copied.

        The tensors of the last checkpoint are used again.
        """
        if self._allocating is not None:
            self._allocating.result()
        pointers = self._pointers_now()
        if pointers != self._pointers:
            self._allocate(pointers)
        groups = self._staged["optimizer"]["param_groups"]
        for group, now in zip(groups, self.optimizer.param_groups, strict=True):
            group |= {name: now[name] for name in group if name != "params"}
        # Only the optimizer's step, which waits, changes these; a forward pass changes buffers.
        lasting = {x.data_ptr() for x in (*self.module.parameters(), *self._optimizer_tensors())}
        pairs = list(zip(self._copies, self._sources, strict=True))
        _copy([pair for pair in pairs if pair[1].data_ptr() not in lasting])
        return [pair for pair in pairs if pair[1].data_ptr() in lasting]

    def _copy_and_write(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        step: int,
        state: dict[str, Any],
        about: Mapping[str, Any],
    ) -> None:
        try:
            _copy(pairs)
        finally:
            self._copied.set()
        self._write(step, state, about)

    def _write(self, step: int, state: dict[str, Any], about: Mapping[str, Any]) -> None:
        folder, path = self.folder, checkpoint_path(self.folder, step)
        hidden = folder / f".{path.name}.{self.attempt}.tmp"
        lead = not self.sharded or self._is_lead
        try:
            _dcp(dcp.save, state, hidden, alone=not self.sharded)
            if not lead:
                return
            if (folder / "attempt").read_text() != self.attempt:
                raise StorageError(f"{folder} was taken over by another attempt at this training.")
            write_atomic(hidden / ABOUT, json_bytes(about))
            write_hashes(hidden)
            if path.exists():  # the step was done again after a fault
                shutil.rmtree(path)
            os.rename(hidden, path)
            sync_folder(folder)
        except BaseException as error:
            if lead:
                shutil.rmtree(hidden, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise storage_error(path, error) from error
            raise
        # Checkpoints of later steps are broken: otherwise training would have gone on from one of them.
        steps = checkpoints(folder)
        for old in set(steps) - set([x for x in steps if x <= step][-self.keep :]):
            shutil.rmtree(checkpoint_path(folder, old), ignore_errors=True)


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first."""
    with torch.no_grad():
        for copy, source in pairs:
            copy.copy_(source)


def load_checkpoint(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    replicas: Mapping[str, Tensor] | None = None,
) -> None:
    """Read the checkpoint after `step` steps into a model, wrapped or not, and its optimizer, on every rank.

    With local updates, the states of the replicas' optimizers are read into the tensors `replicas`.

    Raises
    ------
    StorageError
        If it cannot be read.
    """
    model, optimizer_state = get_state_dict(module, optimizer)
    state = {"model": model, "optimizer": optimizer_state}
    _load(state if replicas is None else state | {"replicas": replicas}, checkpoint_path(folder, step))
    set_state_dict(module, optimizer, model_state_dict=model, optim_state_dict=optimizer_state)


def load_weights(folder: Path, step: int, module: nn.Module) -> None:
    """Read only the weights of a checkpoint, in one process, into a model without a wrapper.

    Raises
    ------
    StorageError
        If it cannot be read, or holds other bytes than were written.
    """
    check_hashes(folder, step)
    state = get_model_state_dict(module)
    _load({"model": state}, checkpoint_path(folder, step))
    module.load_state_dict(state)


def _load(state: dict[str, Any], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        _dcp(dcp.load, state, path, alone=not dist.is_initialized())


def _dcp(function: Any, state: dict[str, Any], path: Path, *, alone: bool) -> None:
    """Save or load a state; a StorageError where the disk refused it, on whatever rank."""
    try:
        function(state, checkpoint_id=path, no_dist=alone)
    except dcp.api.CheckpointException as error:
        if function is dcp.load:
            reasons = "; ".join(repr(cause) for cause, _ in error.failures.values())
            raise StorageError(f"The checkpoint {path} cannot be read: {reasons}") from error
        causes = [cause for cause, _ in error.failures.values()]
        # torch's writer hides what the disk said behind an error of its own; other ranks send only that one.
        hidden = [cause.__context__ for cause in causes if cause.__context__ is not None]
        disk_errors = [cause for cause in (*causes, *hidden) if isinstance(cause, OSError)]
        full = shutil.disk_usage(path.parent).free < FULL_DISK_BYTES
        number = errno.ENOSPC if full else errno.EIO
        disk_error = (
            disk_errors[-1] if disk_errors else OSError(number, f"{os.strerror(number)} ({causes[0]})")
        )
        raise storage_error(path, disk_error) from error
