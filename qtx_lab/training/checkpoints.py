"""Checkpoints by torch.distributed.checkpoint: whole or not there at all, the latest few of them.

A checkpoint is a folder `step-00000100` that appears under this name only when all of it is on disk. It can be
read by another number of ranks than wrote it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from filelock import FileLock, Timeout
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict

from ..errors import StorageError
from ..storage import json_bytes, storage_error, sync_folder, write_atomic

ABOUT = "training.json"
NEEDED = {"recipe": dict, "text": str, "shards": int, "draws": int, "scaler": dict | None}
"""What a checkpoint must say of itself."""
FULL_BYTES = 16 << 20
"""Free space below which a disk is called full when a write failed for no reason that is told."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return folder / f"step-{step:08d}"


def checkpoints(folder: Path) -> list[int]:
    """Steps after which there is a whole checkpoint, in rising order."""
    found = (path.parent.name.removeprefix("step-") for path in folder.glob(f"step-*/{ABOUT}"))
    return sorted(int(step) for step in found if step.isdecimal())


def read_about(folder: Path, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises
    ------
    StorageError
        If it cannot be read.
    """
    path = checkpoint_path(folder, step) / ABOUT
    try:
        about = json.loads(path.read_bytes())
        missing = [
            x for x in NEEDED if not isinstance(about, dict) or not isinstance(about.get(x), NEEDED[x])
        ]
        if missing:
            raise ValueError(f"{ABOUT} does not say its {missing[0]}")
        return about
    except (OSError, ValueError) as error:
        raise StorageError(f"The checkpoint {path.parent} cannot be read: {error}.") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let nobody else train into a folder meanwhile, in this process or another; who is killed holds no lock.

    Raises
    ------
    StorageError
        If somebody does already, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / "lock", timeout=0, is_singleton=True).acquire()
    except Timeout as error:
        raise StorageError(
            f"folder={str(folder)!r} is being trained into by somebody else: wait for that training's end, or stop it."
        ) from error
    except OSError as error:
        raise storage_error(folder, error) from error
    with held:
        yield


def claim(folder: Path, attempt: str) -> None:
    """From now on only this attempt's checkpoints count; what others left half written is removed.

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


def save_checkpoint(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    about: Mapping[str, Any],
    attempt: str,
    keep: int,
) -> None:
    """Write the checkpoint after `step` steps; every rank of the process group calls it.

    Raises
    ------
    StorageError
        If it cannot be written: nothing is left of it, and those before are untouched.
    """
    path = checkpoint_path(folder, step)
    hidden = folder / f".{path.name}.{attempt}.tmp"
    model, optimizer_state = get_state_dict(module, optimizer)
    lead = not dist.is_initialized() or dist.get_rank() == 0
    try:
        _dcp(dcp.save, {"model": model, "optimizer": optimizer_state}, hidden)
        if not lead:
            return
        if (folder / "attempt").read_text() != attempt:
            raise StorageError(f"{folder} was taken over by another attempt at this training.")
        write_atomic(hidden / ABOUT, json_bytes(about))
        if path.exists():  # of a step that was done again after a fault
            shutil.rmtree(path)
        os.rename(hidden, path)
        sync_folder(folder)
    except BaseException as error:
        if lead:
            shutil.rmtree(hidden, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise storage_error(path, error) from error
        raise
    # Those of later steps could not be read: else training would not have gone on from one before them.
    found = checkpoints(folder)
    for old in set(found) - set([x for x in found if x <= step][-keep:]):
        shutil.rmtree(checkpoint_path(folder, old), ignore_errors=True)


def load_checkpoint(folder: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read the checkpoint after `step` steps into a model, wrapped or not, and its optimizer, on every rank.

    Raises
    ------
    StorageError
        If it cannot be read.
    """
    model, optimizer_state = get_state_dict(module, optimizer)
    _dcp(dcp.load, {"model": model, "optimizer": optimizer_state}, checkpoint_path(folder, step))
    set_state_dict(module, optimizer, model_state_dict=model, optim_state_dict=optimizer_state)


def load_weights(folder: Path, step: int, module: nn.Module) -> None:
    """Read the weights of a checkpoint alone, in one process, into a model that nothing wraps.

    Raises
    ------
    StorageError
        If it cannot be read.
    """
    state = get_model_state_dict(module)
    _dcp(dcp.load, {"model": state}, checkpoint_path(folder, step))
    module.load_state_dict(state)


def _dcp(function: Any, state: dict[str, Any], path: Path) -> None:
    """Save or load a state; what a disk refused, on whatever rank, as our error."""
    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            function(state, checkpoint_id=path, no_dist=alone)
    except dcp.api.CheckpointException as error:
        if function is dcp.load:
            causes = "; ".join(repr(cause) for cause, _ in error.failures.values())
            raise StorageError(f"The checkpoint {path} cannot be read: {causes}") from error
        refused = [cause for cause, _ in error.failures.values()]
        # torch's writer hides what the disk said behind an error of its own; from other ranks only that one comes.
        refused += [hidden.__context__ for hidden in refused if hidden.__context__ is not None]
        found = [cause for cause in refused if isinstance(cause, OSError)]
        full = shutil.disk_usage(path.parent).free < FULL_BYTES
        number = errno.ENOSPC if full else errno.EIO
        cause = found[-1] if found else OSError(number, f"{os.strerror(number)} ({refused[0]})")
        raise storage_error(path, cause) from error
