"""Files of the workbench in its run: results of the tabs, and the inputs that a user gave."""

from __future__ import annotations

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...errors import QtxError, StorageError
from ...experiments.manifest import read_manifest
from ...experiments.provenance import is_gone
from ...experiments.runs import Run
from ...storage import storage_error, write_atomic, write_tensors

MAX_MARKED_RUNS = 256
"""The newest runs among which those of a cancelled task are looked for."""

KILL_TIMEOUT_S = 10.0
"""Seconds to wait for the end of a process that was killed."""

MAX_RESULT_BYTES = 256 << 20
"""Bytes of a result that is saved in the run, at most."""


INPUTS = ("q", "k", "v")
"""Arrays of a result that the next one mostly has too; they have a file of their own, named by a digest."""


def write_result(path: Path, result: Mapping[str, Any], forms: Mapping[str, Any]) -> None:
    """Write a result, whole or not at all.

    Parameters
    ----------
    path : Path
        Of the `.npz` file; its folder is made. Inputs that the last result had too are not written again.
    result : mapping
        Arrays, and values that JSON knows.
    forms : mapping
        The fields of the forms that led to it.

    Raises
    ------
    StorageError
        If it is too large, or cannot be written.
    """
    arrays = {name: value for name, value in result.items() if isinstance(value, np.ndarray)}
    if sum(array.nbytes for array in arrays.values()) > MAX_RESULT_BYTES:
        raise StorageError(
            f"The result of {path.stem} is not saved for a restart: it has more than "
            f"{MAX_RESULT_BYTES >> 20} MiB."
        )
    values = {name: value for name, value in result.items() if name not in arrays}
    about: dict[str, Any] = {"result": values, "made_by": forms}
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise storage_error(path.parent, error) from error
    inputs = {name: arrays.pop(name) for name in INPUTS if name in arrays}
    if inputs:
        digest = hashlib.blake2b(digest_size=8)
        for name, array in inputs.items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        about["inputs"] = f"{path.stem}-inputs-{digest.hexdigest()}.npz"
        if not (path.parent / about["inputs"]).exists():
            write_atomic(path.parent / about["inputs"], _npz(inputs))
    text = json.dumps(about, allow_nan=True).encode()
    write_atomic(path, _npz({**arrays, "json": np.frombuffer(text, np.uint8)}))
    for old in path.parent.glob(f"{path.stem}-inputs-*.npz"):
        if old.name != about.get("inputs"):
            old.unlink(missing_ok=True)


def _npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    return content.getvalue()


def read_result(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A result that `write_result` wrote, and the fields of the forms that led to it.

    Raises
    ------
    StorageError
        If it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        content = json.loads(arrays.pop("json").tobytes())
        if "inputs" in content:
            with np.load(path.parent / content["inputs"], allow_pickle=False) as file:
                arrays |= {name: file[name] for name in file.files}
        return {**content["result"], **arrays}, content["made_by"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise StorageError(f"Cannot read {path}: {error}.") from error


def mark_cancelled(home: Path, process_id: int) -> None:
    """Record as cancelled the runs of a process that was killed, and those of the sweep that it ran.

    Without this, they would read as `interrupted`, as after a crash. Waits until the process is gone.
    """
    of_sweeps: set[str] = set()
    for _ in range(2):  # a sweep's notebooks, which are newer, have processes of their own
        for folder in sorted(home.glob("*/"), reverse=True)[:MAX_MARKED_RUNS]:
            with suppress(QtxError, OSError):
                manifest = read_manifest(folder)
                process, sweep = manifest.get("process") or {}, (manifest.get("sweep") or {}).get("name")
                if manifest["status"] != "running" or not (
                    process.get("pid") == process_id or sweep in of_sweeps
                ):
                    continue
                end = time.monotonic() + KILL_TIMEOUT_S
                while not is_gone(process) and time.monotonic() < end:
                    time.sleep(0.05)
                Run.open(folder).finish("cancelled")
                of_sweeps.add(folder.name)


def write_inputs(
    path: Path, q: Tensor, k: Tensor, v: Tensor, tokens: Sequence[str] | None, is_causal: bool
) -> int:
    """Write q, k and v for the workers, as (layers, heads, positions, features); the number of layers.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError
        If they do not fit each other, or the tokens do not fit them.
    StorageError
        If they cannot be written.
    """
    from ...attention import sampled_attention
    from ...errors import DtypeError, ShapeError

    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name} is a {type(x).__name__}; it must be a Tensor.")
        if x.ndim not in (2, 3, 4):
            raise ShapeError(
                f"{name} has shape {tuple(x.shape)}; it must be (L, E), (H, L, E) or (layers, H, L, E)."
            )
    q, k, v = (x.detach().cpu()[(None,) * (4 - x.ndim)].contiguous() for x in (q, k, v))
    sampled_attention(  # refuses what does not fit
        q[:1, :, :1], k[:1], v[:1], num_samples=1, enable_gqa=q.shape[1] != k.shape[1]
    )
    layers = [len(q), len(k), len(v)]
    if len(set(layers)) > 1:
        raise ShapeError(f"q, k, v have {layers} layers; they must have the same.")
    if tokens is not None and len(tokens) != k.shape[-2]:
        raise ShapeError(
            f"tokens has {len(tokens)} entries; there are {k.shape[-2]} keys, and each needs one."
        )
    about = {"tokens": json.dumps(list(tokens or ())), "is_causal": json.dumps(bool(is_causal))}
    write_tensors(path, {"q": q, "k": k, "v": v}, about)
    return len(q)
