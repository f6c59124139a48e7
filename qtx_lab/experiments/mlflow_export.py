"""Runs as MLflow shows them: an export, once a run; the run folders stay the truth."""

from __future__ import annotations

import importlib.util
import math
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import ArgumentError, BackendUnavailable, StorageError
from .listing import RunTable
from .runs import Run

TAG = "qtx_lab.run"
"""Of an MLflow run: the name of the folder it was made from."""

STATES = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}

LONGEST = 5000
"""Characters of a parameter or tag that every MLflow server keeps."""


def export_to_mlflow(table: RunTable, uri: str, *, experiment: str = "qtx_lab") -> int:
    """Copy runs that have ended to an MLflow tracking server or folder, unless they are there.

    The spec's fields become parameters; the metrics' numbers metrics, a row a step, and the results' as `results.NAME`; the
    run's files artifacts.

    Parameters
    ----------
    table : RunTable
        What is copied; runs that go on are left out.
    uri : str
        As MLflow takes it: a server as "http://…"; a folder as "file:///…" only where MLFLOW_ALLOW_FILE_STORE is true.
    experiment : str
        Of MLflow.

    Returns
    -------
    int
        How many were copied.

    Raises
    ------
    ArgumentError
        If MLflow is not installed.
    BackendUnavailable
        If MLflow refuses.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise ArgumentError("This Python has no mlflow: pip install 'qtx-lab[mlflow]'.")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        target = found.experiment_id if found else client.create_experiment(experiment)
        copied = 0
        for path in table["path"]:
            run = Run(Path(path))
            there = client.search_runs([target], f"tags.`{TAG}` = '{run.path.name}'", max_results=1)
            if run.status != "running" and not (there and there[0].info.status != "RUNNING"):
                for half in there:  # an export that was cut off
                    client.delete_run(half.info.run_id)
                _copy(client, target, run)
                copied += 1
    except (MlflowException, OSError) as error:
        if isinstance(error, StorageError):
            raise
        raise BackendUnavailable(f"MLflow at {uri!r} cannot be written: {error}") from error
    return copied


def _copy(client: Any, experiment: str, run: Run) -> None:
    from mlflow.entities import Metric, Param, RunTag

    manifest = run.manifest
    started = _milliseconds(manifest["started"])
    ended = _milliseconds(manifest.get("finished") or manifest["started"])
    spec = manifest.get("spec") or {}
    fields = spec.get("fields") or {}
    fields = {**fields, **(fields.get("parameters") or {})}
    fields.pop("parameters", None)
    about = {
        TAG: run.path.name,
        "qtx_lab.status": manifest["status"],
        "qtx_lab.spec": spec.get("identity"),
        "qtx_lab.seed": manifest.get("seed"),
        "qtx_lab.sweep": (manifest.get("sweep") or {}).get("name"),
        "qtx_lab.command": manifest.get("command"),
        "mlflow.source.git.commit": (manifest.get("git") or {}).get("commit"),
        **{f"version.{name}": version for name, version in (manifest.get("versions") or {}).items()},
    }
    tags = [RunTag(key, str(value)[:LONGEST]) for key, value in about.items() if value is not None]
    params = [Param(_key(name), str(value)[:LONGEST]) for name, value in fields.items()]
    numbers = [
        Metric(_key(f"results.{name}"), float(value), ended, 0)
        for name, value in (manifest.get("results") or {}).items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    rows = run.metrics()
    for name in rows.columns:
        if pd.api.types.is_numeric_dtype(rows[name]):
            values = rows[name].dropna().astype("float64")
            numbers += [Metric(_key(name), v, ended, i) for i, v in values.items() if math.isfinite(v)]
    id = client.create_run(
        experiment, start_time=started, tags={tag.key: tag.value for tag in tags}, run_name=run.path.name
    ).info.run_id
    for start in range(0, max(len(params), 1), 100):  # what a server takes at once
        client.log_batch(id, params=params[start : start + 100])
    for start in range(0, len(numbers), 1000):
        client.log_batch(id, metrics=numbers[start : start + 1000])
    for path in sorted(run.path.iterdir()):
        if (
            path.name in ("report.html", "spec.yaml", "manifest.json", "metrics.parquet")
            or path.suffix == ".ipynb"
        ):
            client.log_artifact(id, str(path))
    if any((run.path / "figures").iterdir()):
        client.log_artifacts(id, str(run.path / "figures"), "figures")
    client.set_terminated(id, STATES[manifest["status"]], end_time=ended)


def _milliseconds(time: str) -> int:
    return round(1000 * datetime.fromisoformat(time).timestamp())


def _key(name: str) -> str:
    """MLflow's keys hold letters, digits, and a few signs."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in str(name))[:250]
