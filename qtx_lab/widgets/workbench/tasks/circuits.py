"""The tasks `measure` and `submit`: rows of a head's attention as circuits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ....errors import ArgumentError
from ....experiments.runs import Run
from ....models.inputs import AttentionInputs
from ....specs import CircuitSpec, MitigationSpec
from ..process_server import TaskReport
from .inputs import load_inputs

if TYPE_CHECKING:
    from ....backends import QiskitQuantumBackend
    from ...measurement import Measurement

DEVICE_FACTS = ("calibration", "noise", "not_modelled", "classical_rows", "shots_by_level")
"""Diagnostics of a measurement that are shown."""


def measure(
    report: TaskReport,
    source: Mapping[str, Any],
    layer: int,
    head: int,
    seed: int,
    rows: list[int],
    circuit: Mapping[str, Any],
    mitigation: Mapping[str, Any] | None = None,
    run_dir: str | None = None,
) -> dict[str, Any]:
    """Measure rows of a head's attention by circuits, part by part; `report.send` sends the result so far.

    Returns
    -------
    dict
        `rows` (R,), `p` (R, n) exact, `counts`, `classical` (R, n) of as many pseudo-random draws, `estimate`
        and `std_error` (R, n) where mitigated, `shots` so far, total variation from p of each row `error`,
        `classical_error` and `raw_error`; the Hellinger `fidelity` of each row with its `error`, and that of
        the `classical` draws, after each part, as `curve`; `facts` of the circuit and the device; `discarded`
        shots (R,); `fallbacks`.
    """
    from ....backends import CircuitSampler
    from ...measurement import NUM_PARTS, growing_parts, measure_in_parts

    report(0.01, "loading the model and text")
    inputs = load_inputs(**source)
    spec = CircuitSpec(**circuit)
    p = _rows(inputs, layer, head, rows)
    report(0.03, "transpiling the circuit")
    options = {"run_dir": run_dir} if spec.provider == "ibm" else {}
    backend = spec.build(**options)
    mitigate: Any = None if mitigation is None else MitigationSpec(**mitigation).build(num_keys=p.shape[-1])
    sampler = CircuitSampler(backend, mitigation=mitigate, hybrid_mode=spec.policy())
    facts = _circuit_facts(backend, p.shape[-1])
    facts["mitigation"] = None if mitigate is None else mitigate.name
    in_one_part = mitigate is not None or spec.provider == "ibm"
    report(0.1, f"0 of {spec.shots:,} shots a row")
    parts = growing_parts(spec.shots, 1 if in_one_part else NUM_PARTS)
    result: dict[str, Any] = {}
    for measurement in measure_in_parts(sampler.measure, p, parts, seed=seed):
        result = {"rows": np.array(rows), **_part_result(measurement, p, facts)}
        report.send(result)
        shots = measurement.counts.shots
        report(0.1 + 0.9 * shots / spec.shots, f"{shots:,} of {spec.shots:,} shots a row")
    return result


def _circuit_facts(backend: QiskitQuantumBackend, num_keys: int) -> dict[str, Any]:
    from ....circuits.resources import resources

    needs = resources(backend.transpiled(num_keys))
    return {
        "device": backend.engine.name,
        "loader": backend.loader.name,
        "keys": num_keys,
        "qubits": needs.qubits,
        "depth": needs.depth,
        "two_qubit_gates": needs.two_qubit_gates,
    }


def _part_result(measurement: Measurement, p: Tensor, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is known after a part, as arrays and plain values."""
    counts, baseline = measurement.counts, measurement.baseline
    raw_error = _total_variation(_shares(counts.counts), p)
    device = {name: counts.diagnostics[name] for name in DEVICE_FACTS if name in counts.diagnostics}
    return {
        "p": p.numpy(),
        "shots": counts.shots,
        "discarded": counts.discarded.numpy(),
        "counts": counts.counts.numpy(),
        "classical": baseline.counts.numpy(),
        "estimate": None if counts.estimate is None else counts.estimate.numpy(),
        "std_error": None if counts.std_error is None else counts.std_error.numpy(),
        "fallbacks": list(counts.diagnostics["fallbacks"]),
        "classical_error": _total_variation(_shares(baseline.counts), p),
        "raw_error": raw_error,
        "error": raw_error if counts.estimate is None else _total_variation(counts.estimate, p),
        "facts": {name: _plain(value) for name, value in {**facts, **device}.items()},
        "curve": [_plain(asdict(point)) for point in measurement.curve],
    }


def _rows(inputs: AttentionInputs, layer: int, head: int, rows: list[int]) -> Tensor:
    """Some rows of a head's attention, (R, n), cut to the keys that any of them sees."""
    p = inputs.weights(layer, head)
    bad = [row for row in rows if not 0 <= row < len(p)]
    if bad or not rows:
        raise ArgumentError(f"rows={rows} is not allowed: it must be some of 0 to {len(p) - 1}.")
    p = p[rows]
    return p[:, : int(p.sum(0).nonzero().amax()) + 1]


def _shares(counts: Tensor) -> Tensor:
    return counts / counts.sum(-1, keepdim=True).clamp_min(1).double()


def _total_variation(shares: Tensor, p: Tensor) -> list[float]:
    """Total variation of each row from the exact one."""
    return (0.5 * (shares - p).abs().sum(-1)).tolist()


def _plain(value: Any) -> Any:
    """The same as JSON types; what has none as text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def submit(report: TaskReport, home: str, **arguments: Any) -> dict[str, Any]:
    """Do as `measure` in a run of its own; a job on IBM's devices is recorded there before it is sent."""
    with Run.create(CircuitSpec(**arguments["circuit"]), "hardware", home) as run:
        result = measure(report, run_dir=str(run.path), **arguments)
        run.log_many(
            {"row": int(row), "shots": result["shots"], "error": a, "raw_error": b, "classical_error": c}
            for row, a, b, c in zip(
                result["rows"], result["error"], result["raw_error"], result["classical_error"], strict=True
            )
        )
        run.update(results={"facts": result["facts"], "discarded": int(result["discarded"].sum())})
    return {**result, "run": run.path.name}
