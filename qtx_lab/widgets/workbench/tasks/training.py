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
) -> dict[str, Any]:
    """Train in a run of its own; `report.send` passes on the rows of metrics as they come.

    Returns
    -------
    dict
        `rows`, a list of the metrics of each step; `run`; `notes` and `faults` of the trainer; `seconds`.
    """
    from ....training import QuantumTrainer, open_cluster  # the other tasks need none of what it loads

    spec = TrainSpec(**training)
    rows: list[dict[str, Any]] = []

    with Run.create(spec, "train", home) as run, ExitStack() as stack:
        report(0.01, "preparing")

        def log(new: list[dict[str, Any]]) -> None:
            rows.extend(new)
            run.log_many(new)
            report.send({"rows": new, "run": run.path.name})
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
