"""Export of runs to MLflow, each run once; the run folders stay the record."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from ..errors import ArgumentError, BackendUnavailable
from ..storage import folder_lock
from .listing import RunTable
from .manifest import spec_values
from .runs import Run

TAG = "qtx_lab.run"
"""Tag of an MLflow run: the name of the run folder, percent-encoded, as MLflow's search has no escapes."""

ARTIFACTS = ("report.html", "spec.yaml", "manifest.json", "metrics.parquet")

STATES = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "cancelled": "KILLED"}

MAX_VALUE_LENGTH = 5000
"""Characters of a parameter's or tag's value that every MLflow server accepts."""
MAX_KEY_LENGTH = 250
MAX_PARAMETERS, MAX_METRICS = 100, 1000
"""How many a server accepts in one batch."""


@dataclass(frozen=True)
class MlflowExport:
    """What an export to MLflow did.

    Parameters
    ----------
    copied : int
        Runs that were copied.
    already_there : int
        Runs that an earlier export had copied.
    running : int
        Runs that have not ended.
    problems : mapping
        Why a run was not copied, by its name; nothing of it is left in MLflow.
    """

    copied: int
    already_there: int
    running: int
    problems: Mapping[str, str]

    def __str__(self) -> str:
        parts = {
            "copied": self.copied,
            "there already": self.already_there,
            "still running": self.running,
            "not copied": len(self.problems),
        }
        return ", ".join(f"{count} {what}" for what, count in parts.items() if count or what == "copied")


def export_to_mlflow(table: RunTable, uri: str, *, experiment: str = "qtx_lab") -> MlflowExport:
    """Copy the runs that have ended to an MLflow tracking server or folder, unless they are there already.

    The spec's fields become parameters. The metrics' numbers become metrics, with a step for each row, and
    the numbers in the results become metrics named `results.NAME`. The run's files become artifacts. Names
    are cleaned by `clean_names`. A run that cannot be read, or that MLflow refuses, does not keep the others
    from being copied.

    Parameters
    ----------
    table : RunTable
        The runs; those that are still running are left out.
    uri : str
        MLflow's tracking URI: a server such as "http://…", or, if MLFLOW_ALLOW_FILE_STORE is true, a folder
        such as "file:///…".
    experiment : str
        Name of MLflow's experiment.

    Returns
    -------
    MlflowExport
        How many runs were copied, and why others were not.

    Raises
    ------
    ArgumentError
        If MLflow is not installed.
    BackendUnavailable
        If MLflow cannot be reached.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise ArgumentError("This Python has no mlflow: pip install 'qtx-lab[mlflow]'.")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow reads it when it is imported
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known else client.create_experiment(experiment)
    except (MlflowException, OSError) as error:
        raise BackendUnavailable(f"MLflow at {uri!r} cannot be written: {error}") from error
    counts = dict.fromkeys(("copied", "already_there", "running"), 0)
    problems: dict[str, str] = {}
    for path in table["path"]:
        run = Run(Path(path))
        try:
            counts[_export(client, experiment_id, run)] += 1
        except (MlflowException, OSError, ValueError) as error:  # StorageError is an OSError
            problems[run.path.name] = " ".join(str(error).split())
            try:  # it is the run's fault only if MLflow still answers
                client.get_experiment(experiment_id)
            except (MlflowException, OSError):
                raise BackendUnavailable(
                    f"MLflow at {uri!r} does not answer any more, after {counts['copied']} of {len(table)} "
                    f"runs were copied: {error}"
                ) from error
    return MlflowExport(**counts, problems=problems)


def _export(client: Any, experiment_id: str, run: Run) -> str:
    """Copy one run if need be; what was done, as a field of `MlflowExport`."""
    manifest = run.manifest
    if manifest["status"] == "running":
        return "running"
    with folder_lock(run.path):  # another export waits, and then finds what this one copied
        for copy in client.search_runs([experiment_id], f"tags.`{TAG}` = '{quote(run.path.name)}'"):
            if (copy.info.status, copy.info.end_time) == (STATES[manifest["status"]], _ended(manifest)):
                return "already_there"
            # It was left by an export that was interrupted, or the run went on after it was copied.
            client.delete_run(copy.info.run_id)
        _copy(client, experiment_id, run, manifest, _parameters(manifest), _metrics(run, manifest))
    return "copied"


def _copy(
    client: Any,
    experiment_id: str,
    run: Run,
    manifest: Mapping[str, Any],
    parameters: list[Any],
    metrics: Iterator[Any],
) -> None:
    """Copy one run, whole or not at all."""
    started = _milliseconds(manifest["started"])
    mlflow_run = client.create_run(
        experiment_id, start_time=started, tags=_tags(run.path.name, manifest), run_name=run.path.name
    )
    run_id = mlflow_run.info.run_id
    try:
        for start in range(0, len(parameters), MAX_PARAMETERS):
            client.log_batch(run_id, params=parameters[start : start + MAX_PARAMETERS])
        while batch := list(islice(metrics, MAX_METRICS)):
            client.log_batch(run_id, metrics=batch)
        for path in sorted(run.path.iterdir()):
            if path.name in ARTIFACTS or path.suffix == ".ipynb":
                client.log_artifact(run_id, str(path))
        if (run.path / "figures").is_dir() and any((run.path / "figures").iterdir()):
            client.log_artifacts(run_id, str(run.path / "figures"), "figures")
        client.set_terminated(run_id, STATES[manifest["status"]], end_time=_ended(manifest))
    except BaseException:
        with suppress(Exception):  # the first error is the one to report
            client.delete_run(run_id)
        raise


def _tags(name: str, manifest: Mapping[str, Any]) -> dict[str, str]:
    """What is known about a run besides its parameters and results."""
    facts = {
        TAG: quote(name),
        "qtx_lab.status": manifest["status"],
        "qtx_lab.spec": (manifest.get("spec") or {}).get("identity"),
        "qtx_lab.seed": manifest.get("seed"),
        "qtx_lab.sweep": (manifest.get("sweep") or {}).get("name"),
        "qtx_lab.command": manifest.get("command"),
        "mlflow.source.git.commit": (manifest.get("git") or {}).get("commit"),
        **{f"version.{name}": version for name, version in (manifest.get("versions") or {}).items()},
    }
    keys = clean_names(facts)
    return {keys[key]: str(value)[:MAX_VALUE_LENGTH] for key, value in facts.items() if value is not None}


def _parameters(manifest: Mapping[str, Any]) -> list[Any]:
    """The spec's fields; the parameters of a notebook stand among them."""
    from mlflow.entities import Param

    fields = spec_values(manifest.get("spec") or {})
    keys = clean_names(fields)
    return [Param(keys[str(name)], str(value)[:MAX_VALUE_LENGTH]) for name, value in fields.items()]


def _metrics(run: Run, manifest: Mapping[str, Any]) -> Iterator[Any]:
    """The finite numbers of the results and of the metrics, all of them at the time of the run's end."""
    from mlflow.entities import Metric

    time = _ended(manifest)
    rows = run.metrics()
    series = {
        f"results.{name}": pd.Series([float(value)])
        for name, value in (manifest.get("results") or {}).items()
        if isinstance(value, int | float) and abs(value) <= sys.float_info.max
    }
    for name in rows.columns:
        if pd.api.types.is_numeric_dtype(rows[name]):
            series[str(name)] = rows[name].dropna().astype("float64")
    keys = clean_names(series)
    return (  # one after the other: a long training has millions
        Metric(keys[name], value, time, int(step))
        for name, values in series.items()
        for step, value in values.items()
        if math.isfinite(value)
    )


def _milliseconds(time: str) -> int:
    """An ISO time as MLflow writes it: milliseconds since 1970."""
    return round(1000 * datetime.fromisoformat(time).timestamp())


def _ended(manifest: Mapping[str, Any]) -> int:
    """When a run ended, or began if that is not known."""
    return _milliseconds(manifest.get("finished") or manifest["started"])


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """A key that MLflow allows for each name; different names have different keys.

    MLflow allows letters, digits and `_-. /` in keys, takes them for paths, and refuses those that are not in
    their shortest form, such as `a//b` or `../a`.

    >>> clean_names(["loss", "p50 %", "p50 $", "../a//b", ""])
    {'loss': 'loss', 'p50 %': 'p50 _', 'p50 $': 'p50 _-2', '../a//b': 'a/b', '': '_'}
    """
    keys: dict[str, str] = {}
    for name in map(str, names):
        letters = "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)
        parts = [part.strip() for part in letters.split("/")]
        clean = "/".join(part for part in parts if part.strip(".")) or "_"
        key, count = clean[:MAX_KEY_LENGTH].rstrip("/ "), 1
        while key in keys.values():
            count += 1
            key = f"{clean[: MAX_KEY_LENGTH - 9].rstrip('/ ')}-{count}"
        keys[name] = key
    return keys
