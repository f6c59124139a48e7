"""The task `train`: a training in a run of its own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from ....experiments.runs import Run
from ....specs import TrainSpec
from ..process_server import TaskReport


def train(
    report: TaskReport,
    home: str,
    training: Mapping[str, Any],
    cluster: Mapping[str, Any],
    distributed: bool,
    compare: bool = False,
) -> dict[str, Any]:
    """Train in a run of its own; `report.send` passes on the rows of metrics as they come.

    Parameters
    ----------
    compare : bool
        Train the same model with exact attention first, in another run.

    Returns
    -------
    dict
        `rows`, a list of the metrics of each step; `run`; `notes` and `faults` of the trainer; `seconds`;
        `exact_rows`, those of the training with exact attention, empty without it.
    """
    spec, where = TrainSpec(**training), (home, cluster, distributed)
    if not compare or spec.sampler == "exact":
        return {**_train(report, spec, *where), "exact_rows": []}

    def half(begin: float, is_exact: bool) -> TaskReport:
        """A report of one of the two trainings, which take half of the progress each."""

        def send(kind: str, content: Any) -> None:
            if kind == "progress":
                name = "exact attention" if is_exact else "drawn attention"
                report(begin + content[0] / 2, f"{name}, {content[1]}")
            else:
                report.send({**content, "is_exact": is_exact})

        return TaskReport(send)

    exact = _train(half(0.0, True), exact_twin(spec), *where)
    drawn = _train(half(0.5, False), spec, *where)
    return {**drawn, "exact_rows": exact["rows"]}


def exact_twin(spec: TrainSpec) -> TrainSpec:
    """The same training with exact attention."""
    drawing = ("num_samples", "control_variate", "draws_schedule", "final_num_samples", "noise")
    defaults = {name: TrainSpec.model_fields[name].default for name in (*drawing, "noise_schedule")}
    return spec.model_copy(update={**defaults, "sampler": "exact"})


def _train(
    report: TaskReport, spec: TrainSpec, home: str, cluster: Mapping[str, Any], distributed: bool
) -> dict[str, Any]:
    """One training in a run of its own; see `train`."""
    from ....training import QuantumTrainer, open_cluster  # the other tasks need none of what it loads

    rows: list[dict[str, Any]] = []

    with Run.create(spec, "train", home) as run, ExitStack() as stack:
        report(0.01, "preparing")

        def log(new: list[dict[str, Any]]) -> None:
            rows.extend(new)
            run.log_many(new)
            report.send({"rows": new, "run": run.path.name, "is_exact": False})
            report(new[-1]["step"] / spec.steps, f"step {new[-1]['step']} of {spec.steps}")

        workers = stack.enter_context(open_cluster(**cluster)) if distributed else None
        trainer = QuantumTrainer(
            **spec.arguments(),
            on_metrics=log,
            progress=False,
            folder=run.path / "checkpoints",
            distributed=distributed,
            cluster=workers,
        )
        result = trainer.train()
        run.update(results={"loss": result.loss, "ranks": result.ranks, "notes": result.notes})
    return {
        "rows": rows,
        "run": run.path.name,
        "notes": list(result.notes),
        "faults": list(result.faults),
        "seconds": result.seconds,
    }
