"""The task `estimate`: one coordinate of attention outputs by amplitude estimation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np
from torch import Tensor

from ....errors import ArgumentError
from ....experiments.runs import Run
from ...numbers import spaced
from ..process_server import TaskReport
from .circuits import DEVICE_FACTS, CircuitRows, device_label, plain


def estimate(
    report: TaskReport, selection: CircuitRows, output: Mapping[str, Any], home: str | None = None
) -> dict[str, Any]:
    """Estimate a coordinate of a head's outputs by amplitude estimation, by shots and by classical draws.

    Parameters
    ----------
    selection : CircuitRows
    output : mapping
        `coordinate`, `loads` and `keys`: the fields of the form.
    home : str, optional
        Folder of runs: the estimates are saved in a run of their own.

    Returns
    -------
    dict
        `rows` (R,), `exact` (R,), `methods`: of each its `name` and lists `value`, `lower`, `upper` (R,);
        `loads` (R,) that amplitude estimation took; `rest` (R,): weight of the keys that are summed exactly;
        `schedule` and `two_qubit_gates`: pairs of a number of iterates with shots and gates; `seconds` of
        quantum time, `contrast`, `decay`; `facts` of the device; `discarded`, `coordinate` and `asked_loads`.
    """
    from ....backends import CircuitSampler
    from ...outputs import estimate_outputs

    report(0.01, "loading the model and text")
    spec, p = selection.spec, selection.probabilities()
    v = values_of_head(selection, output["coordinate"])[: p.shape[-1]]
    report(0.05, "transpiling the circuits")
    sampler = CircuitSampler(spec.build(), hybrid_mode=spec.policy())
    report(0.1, f"{spaced(output['loads'])} loads of {len(p)} rows")
    done = estimate_outputs(sampler, p, v, loads=output["loads"], keys=output["keys"], seed=selection.seed)
    amplitude = done.amplitude
    facts = {name: amplitude.diagnostics[name] for name in DEVICE_FACTS if name in amplitude.diagnostics}
    result: dict[str, Any] = {
        "kind": "outputs",
        "rows": np.array(selection.rows),
        "coordinate": output["coordinate"],
        "asked_loads": output["loads"],
        "exact": done.exact.tolist(),
        "methods": [
            {"name": name, "value": x.value.tolist(), "lower": x.lower.tolist(), "upper": x.upper.tolist()}
            for name, x in done.methods.items()
        ],
        "loads": amplitude.loads[:, 0].tolist(),
        "rest": done.rest.tolist(),
        "schedule": [list(pair) for pair in amplitude.schedule.items()],
        "two_qubit_gates": [list(pair) for pair in amplitude.two_qubit_gates.items()],
        "contrast": amplitude.decay.contrast,
        "decay": amplitude.decay.per_iterate,
        "seconds": amplitude.seconds,
        "facts": {
            "device": sampler.backend.engine.name,
            "device_label": device_label(spec),
            "qubits": amplitude.diagnostics["qubits"],
            **{name: plain(value) for name, value in facts.items()},
        },
    }
    if home is not None:
        with Run.create(spec, "amplitude", home) as run:
            _log_outputs(run, result)
        result["run"] = run.path.name
    return result


def values_of_head(selection: CircuitRows, coordinate: int) -> Tensor:
    """One coordinate of the values that a query head sees, (n,)."""
    q, _, v = selection.inputs().layer_of(selection.layer, selection.head)
    if coordinate >= v.shape[-1]:
        raise ArgumentError(
            f"coordinate={coordinate} is not allowed: there are {v.shape[-1]}, counted from 0."
        )
    return v[selection.head * v.shape[0] // q.shape[0], :, coordinate]


def _log_outputs(run: Run, result: Mapping[str, Any]) -> None:
    """Log each estimate, with half of its 95 % interval, beside the exact output."""
    run.log_many(
        {
            "row": int(row),
            "method": method["name"],
            "output": method["value"][i],
            "output_half_width": (method["upper"][i] - method["lower"][i]) / 2,
            "exact": result["exact"][i],
            "loads": result["asked_loads"],
            "coordinate": result["coordinate"],
            "device": result["facts"]["device_label"],
        }
        for i, row in enumerate(result["rows"])
        for method in result["methods"]
    )
    run.update(
        results={**_mean_half_widths(result), "facts": dict(result["facts"]), "schedule": result["schedule"]}
    )


def _mean_half_widths(result: Mapping[str, Any]) -> dict[str, float]:
    """Half of each method's 95 % interval, in the mean over rows; not where a row has no interval."""
    means: dict[str, float] = {}
    for method in result["methods"]:
        bounds = zip(method["lower"], method["upper"], strict=True)
        mean = fmean((upper - lower) / 2 for lower, upper in bounds)
        if math.isfinite(mean):
            means[f"{method['name'].replace(' ', '_')}_half_width"] = mean
    return means
