"""`manifest.json`, the record of a run: how it is read, checked and merged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ..errors import StorageError

MANIFEST = "manifest.json"
STATUSES = ("running", "done", "failed", "interrupted", "cancelled")

TYPES: dict[str, Any] = {
    "spec": dict,
    "process": dict,
    "results": dict,
    "versions": dict,
    "machine": dict,
    "git": dict,
    "devices": dict,
    "sweep": dict,
    "measures": dict,
    "inputs": dict,
    "code": dict,
    "seconds": int | float,
    "error": str,
    "finished": str,
    "seed": int,
    "sequence": int,
}
"""Types of the entries that a manifest may leave out."""

SPEC_TYPES: dict[str, Any] = {"kind": str, "identity": str, "fields": dict}
"""Types of what the entry `spec` may leave out."""

MAX_SECONDS = 1e15
"""A longer run is a broken manifest."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder, as it is stored.

    Raises
    ------
    StorageError
        If the folder holds no readable manifest.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
        if rb"\ud" in content.lower():  # half a surrogate pair is text that no file can hold
            json.dumps(manifest, ensure_ascii=False).encode()
    except OSError as error:
        raise StorageError(f"{folder} is not a run: {path.name}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{folder} is not a readable run: {path.name} is not valid JSON.") from error
    problem = manifest_problem(manifest)
    if problem:
        raise StorageError(f"{folder} is not a readable run: {problem}.")
    return dict(manifest)


def manifest_problem(manifest: object) -> str | None:
    """Why this is not a valid manifest; None if it is one."""
    if not isinstance(manifest, dict):
        return f"{MANIFEST} holds no object"
    if manifest.get("status") not in STATUSES:
        return f"{MANIFEST} has the status {manifest.get('status')!r}"
    try:
        if datetime.fromisoformat(manifest["started"]).tzinfo is None:
            return f"{MANIFEST} has a start without a time zone"
    except (KeyError, TypeError, ValueError):
        return f"{MANIFEST} has no start"
    if not isinstance(manifest.get("name"), str):
        return f"{MANIFEST} has no name"
    spec = manifest.get("spec")
    if isinstance(spec, dict):
        for key, kind in SPEC_TYPES.items():
            if not isinstance(spec.get(key), kind | None):
                return f"{MANIFEST} has spec.{key}={spec[key]!r}"
    wrong = [key for key, kind in TYPES.items() if not isinstance(manifest.get(key), kind | None)]
    if not wrong:
        wrong = [key for key in ("seed", "sequence") if not 0 <= (manifest.get(key) or 0) < 2**63]
    if not wrong and not 0 <= (manifest.get("seconds") or 0) < MAX_SECONDS:
        wrong = ["seconds"]
    return f"{MANIFEST} has {wrong[0]}={manifest[wrong[0]]!r}" if wrong else None


def creation_order(manifest: Mapping[str, Any]) -> tuple[int, int]:
    """Sort runs by this to have them in the order in which they were created.

    It is a run's sequence number, which grows in a folder of runs whatever its clock says, and then its start
    in milliseconds since 1970. A run of an older version has its start in place of a sequence number, and one
    that is not there at all is the oldest.
    """
    started = manifest.get("started")
    since = datetime.fromisoformat(started) - datetime(1970, 1, 1, tzinfo=UTC) if started else timedelta(0)
    milliseconds = since // timedelta(milliseconds=1)
    sequence = manifest.get("sequence")
    return milliseconds if sequence is None else sequence, milliseconds


def spec_values(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a spec as a manifest has it, with the parameters of its notebook among them.

    A parameter with the name of a field stands under `parameters.NAME`, so that neither hides the other.

    >>> spec_values({"fields": {"notebook": "a", "parameters": {"draws": 8, "notebook": "b"}}})
    {'notebook': 'a', 'draws': 8, 'parameters.notebook': 'b'}
    """
    fields = dict(spec.get("fields") or {})
    parameters = fields.get("parameters")
    if not isinstance(parameters, Mapping):
        return fields
    own = {name: value for name, value in fields.items() if name != "parameters"}
    return own | {f"parameters.{n}" if n in fields else n: value for n, value in parameters.items()}


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with the entries of both, where the new one's win; mappings in them are merged likewise.

    >>> merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": 4})
    {'a': {'x': 1, 'y': 3}, 'b': 4}
    """
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged
