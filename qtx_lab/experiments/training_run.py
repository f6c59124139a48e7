"""A training as a run: one folder with its spec, metrics, checkpoints, weights, figure and report."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import theme as look
from ..checks import check_flags
from ..errors import ArgumentError, QtxError, RunFailed
from ..specs import ClusterSpec, TrainSpec
from ..storage import write_tensors
from . import provenance
from .figures import themed_figure
from .report import write_report
from .runs import ListedRun, Run, find_run, read_manifests

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from ..training import TrainingResult

HELD_OUT_EXACT = "held_out_bits_per_byte_exact"
"""The metric of held-out text with exact attention, bits per byte."""


def train_run(
    spec: TrainSpec | None = None,
    *,
    cluster: ClusterSpec | None = None,
    home: str | Path | None = None,
    name: str = "train",
    resume: str | Path | None = None,
    continue_stopped: bool = False,
    progress: bool = True,
) -> Run:
    """Train as a spec says, in a new run, or resume the training of a run that was interrupted or failed.

    The folder gets `metrics.parquet` while training goes on, `checkpoints/`, `model.safetensors` (for
    `load_reference_model`), a figure and `report.html`.

    Parameters
    ----------
    spec : TrainSpec, optional
        Its defaults where None; not together with `resume`.
    cluster : ClusterSpec, optional
        The cluster to train over; in this process where None.
    home : path, optional
        Folder of all runs, see `runs_home`.
    name : str
        Name of the new run.
    resume : str or path, optional
        A run, by its folder or a part of its name.
    continue_stopped : bool
        Go on with the latest run of this name and spec if it was interrupted or failed: so the same call
        again resumes, as a job does that a batch system has queued again.
    progress : bool
        Show a bar with the time left.

    Returns
    -------
    Run
        The run, ended as `done`.

    Raises
    ------
    ArgumentError, SpecError, TextError, StorageError, BackendUnavailable, RunFailed
        As `QuantumTrainer`. The run is kept with what was done, and can be resumed. Also an ArgumentError if
        there is no run to resume, or nothing says which of several runs is the latest.
    """
    from ..training.checkpoints import locked

    check_flags(continue_stopped=continue_stopped, progress=progress)
    if resume is None and continue_stopped:
        resume = _stopped_run(spec or TrainSpec(), name, home)
        spec = spec if resume is None else None
    if resume is None:
        spec = spec or TrainSpec()
        run = Run.create(spec, name, home, title="A training")
        return _train_in(run, spec, cluster, progress)
    if spec is not None:
        raise ArgumentError("resume goes on under the run's own spec: leave spec out.")
    run = find_run(resume, home)
    kind = (run.manifest.get("spec") or {}).get("kind")
    if kind != "TrainSpec":
        raise ArgumentError(f"resume={str(resume)!r} is no training: its run was made by a {kind}.")
    with locked(run.path / "checkpoints"):
        if run.status in ("running", "done"):
            raise ArgumentError(
                f"resume={str(resume)!r} is {run.status}: only a run that stopped early can be resumed."
            )
        spec = TrainSpec.from_yaml(run.path / "spec.yaml")
        run.update(status="running", error=None, process=provenance.this_process())
        return _train_in(run, spec, cluster, progress)


def _latest_runs(spec: TrainSpec, name: str, home: str | Path | None) -> list[ListedRun]:
    """The latest run of this name and spec; several where nothing says which of them is the latest.

    Their sequence numbers say it, and not the clock: one that was set back would make an earlier run look
    like the latest one. Runs of older versions have none.
    """
    same = [
        run
        for run in read_manifests(home)
        if run.manifest["name"] == name and (run.manifest.get("spec") or {}).get("identity") == spec.identity
    ]
    numbers = [run.manifest.get("sequence") or 0 for run in same]
    return [run for run, number in zip(same, numbers, strict=True) if number == max(numbers)]


def _stopped_run(spec: TrainSpec, name: str, home: str | Path | None) -> Path | None:
    """The latest run of this name and spec, if it stopped early.

    Raises
    ------
    ArgumentError
        If there are several, and one of them stopped early.
    """
    latest = _latest_runs(spec, name, home)
    stopped = [run for run in latest if run.manifest["status"] in ("interrupted", "cancelled", "failed")]
    if stopped and len(latest) > 1:
        names = ", ".join(run.folder.name for run in latest)
        raise ArgumentError(
            f"continue_stopped=True is not allowed here: {names} have the same name and spec, and nothing "
            "says which of them is the latest; name the one to continue with --resume, or resume=."
        )
    return stopped[0].folder if stopped else None


def _train_in(run: Run, spec: TrainSpec, cluster: ClusterSpec | None, progress: bool) -> Run:
    """Train in a run that has begun, end the run, and write its report."""
    try:
        with run:
            _train(run, spec, cluster, progress)
    except BaseException:
        with suppress(QtxError):  # an error of the report would hide the first one
            write_report(run)
        raise
    write_report(run)
    return run


def _train(run: Run, spec: TrainSpec, cluster: ClusterSpec | None, progress: bool) -> None:
    from ..training import QuantumTrainer, open_cluster

    with nullcontext(None) if cluster is None else open_cluster(**cluster.arguments()) as opened:
        if opened is not None:
            run.update(cluster={"chosen": opened.chosen, "dashboard": opened.dashboard_link})
        trainer = QuantumTrainer(
            **spec.arguments(),
            distributed=opened is not None,
            cluster=opened,
            folder=run.path / "checkpoints",
            on_metrics=run.log_many,
            progress=progress,
        )
        result = trainer.train()
    save_model(run.path / "model.safetensors", trainer.model)
    report_training(run, spec, result)
    if result.stopped:
        raise RunFailed(
            f"Cancelled after step {result.steps}; `qtx-lab train --resume {run.path.name}` goes on."
        )


def save_model(path: Path, model: Any) -> None:
    """Write the weights of a reference model of any shape, for `load_reference_model`."""
    write_tensors(path, model.state_dict(), {"config": json.dumps(asdict(model.config))})


def report_training(run: Run, spec: TrainSpec, result: TrainingResult) -> None:
    """Write the summary of a training, its last numbers and its figure into the run."""
    data = run.metrics().drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)
    final = data.iloc[-1]
    held_out = {
        name: float(final[name]) for name in data if name.startswith("held_out") and not np.isnan(final[name])
    }
    sentences = [
        f"{result.steps} steps of {spec.batch_size} × {spec.num_tokens} tokens on {result.ranks} rank(s): "
        f"loss {result.loss:.4f}."
    ]
    if HELD_OUT_EXACT in held_out:
        sentences.append(f"Held-out text with exact attention: {held_out[HELD_OUT_EXACT]:.3f} bits per byte.")
    sentences += [*(f"Overcome: {fault}" for fault in result.faults), *result.notes]
    run.declare("tokens_per_second", unit="tokens/s", timing=True)
    run.declare("checkpoint_seconds", unit="s", timing=True)
    run.declare("memory_bytes", unit="bytes", timing=True)  # no more than time does another run repeat it
    run.declare("loss", unit="nats", main=True)
    run.update(
        results={
            "summary": sentences,
            "loss": result.loss,
            "tokens_per_second": float(data["tokens_per_second"].median()),
            "faults": len(result.faults),
            **held_out,
        }
    )
    if "bits_per_byte" in data and HELD_OUT_EXACT in data:
        attention = "exact attention"
        if "draws" in data:
            attention = f"{spec.sampler or 'systematic'}, {data['draws'].iloc[0]:g} draws at the start"
        run.save_figure(
            "training",
            training_curves,
            data,
            caption="Bits per byte of each step's batch and of held-out text (exact attention: solid; drawn: "
            f"dashed). Model {spec.model}, {attention}, seed {spec.seed}.",
        )


def training_curves(data: pd.DataFrame, theme: str) -> Figure:
    """Bits per byte against steps: of batches, and of held-out text with exact attention and with draws.

    Parameters
    ----------
    data : DataFrame
        Columns `step`, `attempt`, `bits_per_byte`, `held_out_bits_per_byte_exact` and, where attention is
        drawn, `held_out_bits_per_byte_sampled`; NaN at steps without validation.
    theme : str
        "light" or "dark".
    """
    colours = look.colours_of(theme)
    with themed_figure(theme) as figure:
        ax = figure.subplots()
        ax.plot(data["step"], data["bits_per_byte"], color=colours["line"], linewidth=1, label="batch")
        last_bits = {}
        for way, style, colour in (("exact", "-", colours["exact"]), ("sampled", "--", colours["accent"])):
            column = f"held_out_bits_per_byte_{way}"
            if column in data:
                validated = data.dropna(subset=[column])
                ax.plot(
                    validated["step"],
                    validated[column],
                    style,
                    marker="o",
                    markersize=4,
                    color=colour,
                    label=f"held out, {way}",
                )
                last_bits[way] = float(validated[column].iloc[-1])
        resumed = data.loc[np.diff(data["attempt"], prepend=data["attempt"].iloc[0]) > 0, "step"]
        for step in resumed:
            ax.axvline(step - 0.5, color=colours["baseline"], linewidth=1, linestyle=":")
            ax.annotate(
                "resumed",
                (step - 0.5, 1),
                (3, -10),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
            )
        ax.legend(frameon=False)
        ax.set_xlabel("step")
        ax.set_ylabel("bits per byte")
        ends = ", ".join(f"{bits:.3f} ({way})" for way, bits in last_bits.items())
        ax.set_title(f"Held-out text ends at {ends} bits per byte")
    return figure
