"""Export of a run as an RO-Crate: its files with a description that archives and other tools can read."""

from __future__ import annotations

import importlib.util
import mimetypes
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import ArgumentError, StorageError
from ..storage import storage_error, sync_file
from .manifest import spec_values
from .runs import Run

PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
"""The profile Process Run Crate 0.5, to which crates conform beside RO-Crate 1.1."""

NO_LICENSE = "Nobody has stated a licence for this run: ask those who made it before you use it."

FORMATS = {
    ".ipynb": "application/x-ipynb+json",
    ".parquet": "application/vnd.apache.parquet",
    ".yaml": "application/yaml",
    ".safetensors": "application/octet-stream",
    ".patch": "text/x-diff",
}
"""Media types that Python does not know."""

LEFT_OUT = {"checkpoints", "ro-crate-metadata.json", "ro-crate-preview.html"}
"""What of a run is not exported."""

STATES = {"done": "CompletedActionStatus", "failed": "FailedActionStatus"}


def export_to_ro_crate(run: Run, folder: str | Path, *, license: str | None = None) -> Path:
    """Write a run that has ended as an RO-Crate, a zip file with the run's name.

    The crate holds the files of the run but its checkpoints, and but the description of another crate, which
    a run has that was taken from one. It says what was run (the notebook, this
    package and its version), by which parameters, on which input files (their SHA-256), when, whether it came
    to its end, and which numbers came out. It conforms to RO-Crate 1.1 and to the profile Process Run Crate
    (Leo et al., Recording provenance of workflow runs with RO-Crate, PLoS ONE 2024).

    Parameters
    ----------
    run : Run
        The run.
    folder : path
        Where the file is written; it is created if need be.
    license : str, optional
        The URL of the licence under which the run is given away, such as
        "https://spdx.org/licenses/CC-BY-4.0". Where None, the crate says that nobody has stated one.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ArgumentError
        If rocrate is not installed, the run has not ended, or the licence is no URL.
    StorageError
        If the run cannot be read, a file of it has a name that is not Unicode, or the crate cannot be
        written. What was written before under its name is untouched.
    """
    if importlib.util.find_spec("rocrate") is None:
        raise ArgumentError("This Python has no rocrate: pip install 'qtx-lab[ro-crate]'.")
    from rocrate.rocrate import ROCrate

    manifest = run.manifest
    if manifest["status"] == "running":
        raise ArgumentError(f"{run.path.name} is running: only a run that has ended is exported.")
    if license is not None and not license.startswith(("https://", "http://")):
        raise ArgumentError(f"license={license!r} is not allowed: it must be a URL.")
    crate = ROCrate(version="1.1")
    ended = manifest.get("finished") or manifest["started"]
    crate.name = str(manifest.get("title") or manifest["name"])
    crate.description = f"The run {run.path.name} of qtx_lab, which ended as {manifest['status']}."
    crate.datePublished = ended
    crate.license = _entity(crate, license or "#no-license", "CreativeWork", _license(license))
    crate.root_dataset["conformsTo"] = _entity(
        crate, PROFILE, "CreativeWork", {"name": "Process Run Crate", "version": "0.5"}
    )
    try:
        files = {name: crate.add_file(path, name, properties=_about(path)) for name, path in _files(run.path)}
    except OSError as error:
        raise error if isinstance(error, StorageError) else _unreadable(error) from error
    action = {
        "name": crate.name,
        "description": str(manifest.get("command") or crate.description),
        "startTime": manifest["started"],
        "endTime": ended,
        "actionStatus": f"http://schema.org/{STATES.get(manifest['status'], 'FailedActionStatus')}",
    }
    if manifest["status"] != "done":
        action["error"] = manifest.get("error") or manifest["status"]
    notebook = next((entity for name, entity in files.items() if name.endswith(".ipynb")), None)
    package = _entity(crate, "#qtx_lab", "SoftwareApplication", _package(manifest))
    if notebook is not None:
        notebook["softwareRequirements"] = package
    crate.root_dataset["mentions"] = crate.add_action(
        package if notebook is None else notebook,
        identifier="#run",
        object=list(_given(crate, manifest)),
        result=[*(x for x in files.values() if x is not notebook), *_measured(crate, manifest)],
        properties=action,
    )
    return _write(crate, Path(os.path.expanduser(folder)), run.path)


def _write(crate: Any, folder: Path, run: Path) -> Path:
    """Write the zip file, whole or not at all."""
    target = folder / f"{run.name}.zip"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as hidden:
            written = Path(hidden) / target.name
            crate.write_zip(written)
            sync_file(written)
            os.replace(written, target)
    except OSError as error:
        if error.filename is not None and Path(error.filename).is_relative_to(run):
            raise _unreadable(error) from error
        raise storage_error(target, error) from error
    return target


def _unreadable(error: OSError) -> StorageError:
    return StorageError(f"Cannot read {error.filename}: {error.strerror or error}.")


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a run by their names in its folder."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts) or path.name == "lock"
        left_out = hidden or parts[0] in LEFT_OUT
        if not left_out and path.is_file() and not path.is_symlink():
            name = "/".join(parts)
            try:
                name.encode()
            except UnicodeEncodeError:
                raise StorageError(f"{folder} has a file whose name is not Unicode: {name!r}.") from None
            yield name, path


def _about(path: Path) -> dict[str, Any]:
    """What a crate says about a file."""
    kind = FORMATS.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    about = {"name": path.name, "encodingFormat": kind, "contentSize": str(path.stat().st_size)}
    return about | ({"@type": ["File", "SoftwareSourceCode"]} if path.suffix == ".ipynb" else {})


def _license(url: str | None) -> dict[str, str]:
    if url is None:
        return {"name": "no licence", "description": NO_LICENSE}
    return {"name": url.rstrip("/").rpartition("/")[2], "description": f"The licence at {url}."}


def _package(manifest: Mapping[str, Any]) -> dict[str, str]:
    versions = manifest.get("versions") or {}
    version = versions.get("qtx-lab") or versions.get("qtx_lab") or "unknown"
    return {"name": "qtx_lab", "softwareVersion": str(version)}


def _given(crate: Any, manifest: Mapping[str, Any]) -> Iterator[Any]:
    """Parameters and input files, as objects of the action."""
    for name, value in spec_values(manifest.get("spec") or {}).items():
        yield _property(crate, f"parameter-{name}", name, value)
    for name, digest in (manifest.get("inputs") or {}).items():
        yield _property(crate, f"input-{name}", f"SHA-256 of {name}", digest)


def _measured(crate: Any, manifest: Mapping[str, Any]) -> Iterator[Any]:
    """The numbers of the results, with their units."""
    measures = manifest.get("measures") or {}
    for name, value in (manifest.get("results") or {}).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            facts = measures.get(name)
            unit = facts.get("unit") if isinstance(facts, Mapping) else None
            yield _property(crate, f"result-{name}", name, value, {"unitText": unit} if unit else {})


def _property(
    crate: Any, identifier: str, name: str, value: Any, more: Mapping[str, Any] | None = None
) -> Any:
    """A named value; what JSON-LD has no type for is written as text."""
    plain = isinstance(value, str | bool | int) or (isinstance(value, float) and abs(value) < float("inf"))
    shown = value if plain else str(value)
    facts = {"name": str(name), "value": shown, **(more or {})}
    return _entity(crate, f"#{quote(identifier, safe='')}", "PropertyValue", facts)


def _entity(crate: Any, identifier: str, kind: str, properties: Mapping[str, Any]) -> Any:
    """Add a thing that is no file to the crate."""
    from rocrate.model.contextentity import ContextEntity

    return crate.add(ContextEntity(crate, identifier, properties={"@type": kind, **properties}))
