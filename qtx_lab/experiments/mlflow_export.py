"""Export of runs to MLflow, each run once; the run folders stay the record."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import ArgumentError, BackendUnavailable, StorageError
from .listing import RunTable
from .runs import Run

TAG = "qtx_lab.run"
"""Tag of an MLflow run that holds the name of the run folder."""

ARTIFACTS = ("report.html", "spec.yaml", "manifest.json", "metrics.parquet")

STATES = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "cancelled": "KILLED"}

MAX_VALUE_LENGTH = 5000
"""Characters of a parameter's or tag's value that every MLflow server accepts."""
MAX_KEY_LENGTH = 250
MAX_PARAMETERS, MAX_METRICS = 100, 1000
"""How many a server accepts in one batch."""


def export_to_mlflow(table: RunTable, uri: str, *, experiment: str = "qtx_lab") -> int:
    """Copy the runs that have ended to an MLflow tracking server or folder, unless they are there already.

    The spec's fields become parameters. The metrics' numbers become metrics, with a step for each row, and
    the numbers in the results become metrics named `results.NAME`. The run's files become artifacts.

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
    int
        The number of runs that were copied.

    Raises
    ------
    ArgumentError
        If MLflow is not installed.
    BackendUnavailable
        If MLflow cannot be reached or refuses a run.
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
        num_copied = 0
        for path in table["path"]:
            run = Run(Path(path))
            filter_string = f"tags.`{TAG}` = '{run.path.name}'"
            copies = client.search_runs([experiment_id], filter_string, max_results=1)
            if run.status != "running" and not (copies and copies[0].info.status != "RUNNING"):
                for unfinished in copies:  # left by an export that was interrupted
                    client.delete_run(unfinished.info.run_id)
                _copy(client, experiment_id, run)
                num_copied += 1
    except (MlflowException, OSError) as error:
        if isinstance(error, StorageError):
            raise
        raise BackendUnavailable(f"MLflow at {uri!r} cannot be written: {error}") from error
    return num_copied


def _copy(client: Any, experiment_id: str, run: Run) -> None:
    """Copy one run."""
    manifest = run.manifest
    started = _milliseconds(manifest["started"])
    ended = _milliseconds(manifest.get("finished") or manifest["started"])
    mlflow_run = client.create_run(
        experiment_id, start_time=started, tags=_tags(run.path.name, manifest), run_name=run.path.name
    )
    run_id = mlflow_run.info.run_id
    parameters, metrics = _parameters(manifest), _metrics(run, manifest, ended)
    for start in range(0, len(parameters), MAX_PARAMETERS):
        client.log_batch(run_id, params=parameters[start : start + MAX_PARAMETERS])
    for start in range(0, len(metrics), MAX_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])
    for path in sorted(run.path.iterdir()):
        if path.name in ARTIFACTS or path.suffix == ".ipynb":
            client.log_artifact(run_id, str(path))
    if any((run.path / "figures").iterdir()):
        client.log_artifacts(run_id, str(run.path / "figures"), "figures")
    client.set_terminated(run_id, STATES[manifest["status"]], end_time=ended)


def _tags(name: str, manifest: Mapping[str, Any]) -> dict[str, str]:
    """What is known about a run besides its parameters and results."""
    facts = {
        TAG: name,
        "qtx_lab.status": manifest["status"],
        "qtx_lab.spec": (manifest.get("spec") or {}).get("identity"),
        "qtx_lab.seed": manifest.get("seed"),
        "qtx_lab.sweep": (manifest.get("sweep") or {}).get("name"),
        "qtx_lab.command": manifest.get("command"),
        "mlflow.source.git.commit": (manifest.get("git") or {}).get("commit"),
        **{f"version.{name}": version for name, version in (manifest.get("versions") or {}).items()},
    }
    return {key: str(value)[:MAX_VALUE_LENGTH] for key, value in facts.items() if value is not None}


def _parameters(manifest: Mapping[str, Any]) -> list[Any]:
    """The spec's fields; the parameters of a notebook stand among them."""
    from mlflow.entities import Param

    fields = (manifest.get("spec") or {}).get("fields") or {}
    fields = {**fields, **(fields.get("parameters") or {})}
    fields.pop("parameters", None)
    return [Param(_key(name), str(value)[:MAX_VALUE_LENGTH]) for name, value in fields.items()]


def _metrics(run: Run, manifest: Mapping[str, Any], time: int) -> list[Any]:
    """The finite numbers of the results and of the metrics, all of them at one time, in milliseconds."""
    from mlflow.entities import Metric

    metrics = [
        Metric(_key(f"results.{name}"), float(value), time, 0)
        for name, value in (manifest.get("results") or {}).items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    rows = run.metrics()
    for name in rows.columns:
        if pd.api.types.is_numeric_dtype(rows[name]):
            values = rows[name].dropna().astype("float64")
            metrics += [
                Metric(_key(name), value, time, step)
                for step, value in values.items()
                if math.isfinite(value)
            ]
    return metrics


def _milliseconds(time: str) -> int:
    """An ISO time as MLflow writes it: milliseconds since 1970."""
    return round(1000 * datetime.fromisoformat(time).timestamp())


def _key(name: str) -> str:
    """A name without the characters that MLflow does not allow in keys."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in str(name))[:MAX_KEY_LENGTH]
