"""A training as a run: its spec, its metrics while it goes on, checkpoints, weights, figure and report in one folder."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import theme as look
from ..errors import ArgumentError, QtxError, RunFailed
from ..specs import ClusterSpec, TrainSpec
from ..storage import write_tensors
from . import provenance
from .figures import themed_figure
from .report import write_report
from .runs import Run, find_run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from ..training import TrainingResult


def train_run(
    spec: TrainSpec | None = None,
    *,
    cluster: ClusterSpec | None = None,
    home: str | Path | None = None,
    name: str = "train",
    resume: str | Path | None = None,
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
        Where to train; in this process where None.
    home : path, optional
        See `runs_home`.
    name : str
        Of the run.
    resume : str or path, optional
        A run, by its folder or a part of its name.
    progress : bool
        Show a bar with the time left.

    Returns
    -------
    Run
        Ended, as `done`.

    Raises
    ------
    ArgumentError, SpecError, TextError, StorageError, BackendUnavailable, RunFailed
        As `QuantumTrainer`. The run is kept with what was done, and can be resumed.
    """
    from ..training.checkpoints import locked

    if resume is None:
        spec = spec or TrainSpec()
        return _within(Run.create(spec, name, home, title="A training"), spec, cluster, progress)
    if spec is not None:
        raise ArgumentError("resume goes on under the run's own spec: leave spec out.")
    run = find_run(resume, home)
    kind = (run.manifest.get("spec") or {}).get("kind")
    if kind != "TrainSpec":
        raise ArgumentError(f"resume={str(resume)!r} is no training: its run was asked for by a {kind}.")
    with locked(run.path / "checkpoints"):
        if run.status in ("running", "done"):
            raise ArgumentError(
                f"resume={str(resume)!r} is {run.status}: only what has stopped early can be resumed."
            )
        spec = TrainSpec.from_yaml(run.path / "spec.yaml")
        run.update(status="running", error=None, process=provenance.this_process())
        return _within(run, spec, cluster, progress)


def _within(run: Run, spec: TrainSpec, cluster: ClusterSpec | None, progress: bool) -> Run:
    try:
        with run:
            _train(run, spec, cluster, progress)
    except BaseException:
        with suppress(QtxError):  # the first error is the one to hear about
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
    report_training(run, result)
    if result.stopped:
        raise RunFailed(
            f"Cancelled after step {result.steps}; `qtx-lab train --resume {run.path.name}` goes on."
        )


def save_model(path: Path, model: Any) -> None:
    """Write the weights of a reference model, of whatever shape, for `load_reference_model`."""
    write_tensors(path, model.state_dict(), {"config": json.dumps(asdict(model.config))})


def report_training(run: Run, result: TrainingResult) -> None:
    """The figure of a training, and its headline numbers."""
    data = run.metrics().drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)
    final = data.iloc[-1]
    held_out = "held_out_bits_per_byte_exact"
    spec = TrainSpec.from_yaml(run.path / "spec.yaml")
    numbers = {
        name: float(final[name])
        for name in data
        if name.startswith("held_out") and final[name] == final[name]
    }
    speed = float(data["tokens_per_second"].median())
    sentences = [
        f"{result.steps} steps of {spec.batch_size} × {spec.num_tokens} tokens on {result.ranks} rank(s): loss {result.loss:.4f}."
    ]
    if held_out in numbers:
        sentences.append(f"Held-out text with exact attention: {numbers[held_out]:.3f} bits per byte.")
    sentences += [*(f"Overcome: {fault}" for fault in result.faults), *result.notes]
    run.update(
        results={
            "summary": sentences,
            "loss": result.loss,
            "tokens_per_second": speed,
            "faults": len(result.faults),
            **numbers,
        }
    )
    if "bits_per_byte" in data and held_out in data:
        run.save_figure(
            "training",
            training_curves,
            data,
            caption=f"Bits per byte of each step's batch and of held-out text (exact attention: solid; drawn: dashed). Model "
            f"{spec.model}, {spec.sampler}, {spec.num_samples} draws at the start, seed {spec.seed}.",
        )


def training_curves(data: pd.DataFrame, theme: str) -> Figure:
    """Bits per byte against steps: batches, held-out text with exact attention, and with draws.

    data: columns `step`, `bits_per_byte`, `held_out_bits_per_byte_exact` and, where drawn, `..._sampled`; NaN where not validated.
    """
    colours = look.colours_of(theme)
    with themed_figure(theme) as figure:
        ax = figure.subplots()
        ax.plot(data["step"], data["bits_per_byte"], color=colours["line"], linewidth=1, label="batch")
        ends = {}
        for way, style in (("exact", "-"), ("sampled", "--")):
            column = f"held_out_bits_per_byte_{way}"
            if column in data:
                part = data.dropna(subset=[column])
                colour = colours["exact"] if way == "exact" else colours["accent"]
                ax.plot(
                    part["step"],
                    part[column],
                    style,
                    marker="o",
                    markersize=4,
                    color=colour,
                    label=f"held out, {way}",
                )
                ends[way] = float(part[column].iloc[-1])
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
        ax.set_title(
            f"Held-out text ends at {', '.join(f'{end:.3f} ({way})' for way, end in ends.items())} bits per byte"
        )
    return figure
