"""The tasks `measure`, `mitigate` and `submit`: rows of a head's attention as circuits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ....errors import ArgumentError, FallbackWarning
from ....experiments.runs import Run
from ....models.inputs import AttentionInputs
from ....specs import CircuitSpec, MitigationSpec, Spec
from ....specs.circuit import NOISE_FIELDS
from ...numbers import Z95, mean_with_error, spaced
from ..process_server import TaskReport
from .inputs import load_inputs

if TYPE_CHECKING:
    from ....backends import CircuitSampler, QiskitQuantumBackend, RowCounts
    from ....mitigation import Plan
    from ...measurement import Measurement

DEVICE_FACTS = ("calibration", "noise", "not_modelled", "classical_rows", "shots_by_level")
"""Diagnostics of a measurement that are shown."""

SHOTS_FACTORS = (1 / 16, 1 / 4, 1, 4, 16, 64)
"""Shots for which ways to measure rows are rehearsed, as multiples of those that are measured."""

REHEARSED_ROWS = 8
"""Rows on which they are rehearsed, at most."""

REHEARSALS = 32
"""Rehearsals of each row and way, over all rows: the fewer rows, the more rehearsals of each."""

SHOWN_WAYS = 6
"""Ways to measure rows whose expected errors are shown, at most, beside the raw counts."""


@dataclass(frozen=True)
class CircuitRows:
    """Some rows of a head's attention, and the circuits that measure them.

    Parameters
    ----------
    source : mapping
        What attention is computed from: the arguments of `load_inputs`.
    layer, head : int
    rows : tuple of int
        Numbers of the rows.
    circuit : mapping
        The fields of a `CircuitSpec`.
    seed : int
        Of the shots and of the classical draws.
    """

    source: Mapping[str, Any]
    layer: int
    head: int
    rows: tuple[int, ...]
    circuit: Mapping[str, Any]
    seed: int

    @property
    def spec(self) -> CircuitSpec:
        """The checked spec of the circuits."""
        return CircuitSpec(**self.circuit)

    def inputs(self) -> AttentionInputs:
        """What attention is computed from."""
        return load_inputs(**self.source)

    def probabilities(self) -> Tensor:
        """The rows, (R, n), cut to the keys that any of them sees.

        Raises
        ------
        ArgumentError
            If the head has no such rows.
        """
        p = self.inputs().weights(self.layer, self.head)
        bad = [row for row in self.rows if not 0 <= row < len(p)]
        if bad or not self.rows:
            rows = list(self.rows)
            raise ArgumentError(f"rows={rows} is not allowed: it must be some of 0 to {len(p) - 1}.")
        p = p[list(self.rows)]
        return p[:, : int(p.sum(0).nonzero().amax()) + 1]


def measure(
    report: TaskReport, selection: CircuitRows, home: str | None = None, run_dir: str | None = None
) -> dict[str, Any]:
    """Measure rows of a head's attention by circuits, part by part; `report.send` sends the result so far.

    Parameters
    ----------
    selection : CircuitRows
    home : str, optional
        Folder of runs: the measurement is saved in a run of its own.
    run_dir : str, optional
        Folder of the run that gets the records of jobs on IBM's devices.

    Returns
    -------
    dict
        `rows` (R,), `p` (R, n) exact, `counts`, `classical` (R, n) of as many pseudo-random draws, `shots` so
        far, total variation from p of each row `raw_error` and `classical_error` with the standard errors
        `raw_error_std` and `classical_error_std`; the Hellinger `fidelity` of each row with its `error`, and
        that of the `classical` draws, after each part, as `curve`; `facts` of the circuit and the device;
        `discarded` shots (R,); `fallbacks`.
    """
    from ....backends import CircuitSampler

    report(0.01, "loading the model and text")
    spec = selection.spec
    p = selection.probabilities()
    report(0.03, "transpiling the circuit")
    options = {"run_dir": run_dir} if spec.provider == "ibm" else {}
    backend = spec.build(**options)
    sampler = CircuitSampler(backend, hybrid_mode=spec.policy())
    result = _measure_in_parts(report, sampler, p, selection, (0.1, 1.0))
    if home is not None:
        result["run"] = _save_run(home, "circuit", spec, result).path.name
    return result


def mitigate(
    report: TaskReport, selection: CircuitRows, mitigation: Mapping[str, Any], home: str | None = None
) -> dict[str, Any]:
    """Measure rows of a head's attention with and without mitigation, with the same number of shots.

    Parameters
    ----------
    selection : CircuitRows
    mitigation : mapping
        The fields of a `MitigationSpec`.
    home : str, optional
        Folder of runs: the measurement is saved in a run of its own.

    Returns
    -------
    dict
        That of `measure`, of the raw counts, with the mitigated `estimate` and `std_error` (R, n), their
        total variation from p `error` with its standard error `error_std`; `warnings` of the mitigation;
        `plan`: the `choice` of the planner and its `reason`; `ways`: the expected error of some ways to
        measure the rows against shots; see `MitigationView.show`. The estimate is None where the planner
        takes the raw counts.
    """
    from ....backends import CircuitSampler

    report(0.01, "loading the model and text")
    spec, mitigation_spec, seed = selection.spec, MitigationSpec(**mitigation), selection.seed
    p = selection.probabilities()
    report(0.03, "transpiling the circuit")
    backend = spec.build()
    chosen: Any = mitigation_spec.build(num_keys=p.shape[-1])
    if chosen is None:
        raise ArgumentError(
            "method='none' is not allowed here without readout: there is nothing to mitigate."
        )
    report(0.1, "measuring with mitigation")
    sampler = CircuitSampler(backend, mitigation=chosen, hybrid_mode=spec.policy())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FallbackWarning)
        mitigated = sampler.measure(p, spec.shots, generator=torch.Generator().manual_seed(seed))
    for warning in caught:  # so that the status line counts them, too
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    plan: Plan | None = mitigated.diagnostics.get("plan")
    mitigated_part = {
        "warnings": list(dict.fromkeys(str(x.message) for x in caught)),
        "plan": None if plan is None else {"choice": plan.choice.option.name, "reason": plan.reason},
        **_mitigated_result(mitigated, p, seed),
    }
    raw = CircuitSampler(backend, hybrid_mode=spec.policy())
    result = _measure_in_parts(report, raw, p, selection, (0.3, 0.7), mitigated_part)
    result["facts"]["mitigation"] = mitigated.diagnostics.get("mitigation", chosen.name)
    report(0.7, "rehearsing other numbers of shots")
    option = chosen if plan is None else plan.choice.option
    result["ways"] = _expected_errors(backend, p, spec.shots, option, seed)
    if home is not None:
        result["run"] = _save_run(home, "mitigate", spec, result).path.name
    return result


def _measure_in_parts(
    report: TaskReport,
    sampler: CircuitSampler,
    p: Tensor,
    selection: CircuitRows,
    progress: tuple[float, float],
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure rows p (R, n) part by part, and send the result so far after each, together with `more`."""
    from ...measurement import NUM_PARTS, growing_parts, measure_in_parts

    backend, spec, seed, (start, end) = sampler.backend, selection.spec, selection.seed, progress
    facts = {**_circuit_facts(backend, p.shape[-1]), "device_label": device_label(spec)}
    parts = growing_parts(spec.shots, 1 if spec.provider == "ibm" else NUM_PARTS)
    report(start, f"0 of {spaced(spec.shots)} shots a row")
    result: dict[str, Any] = {}
    for measurement in measure_in_parts(sampler.measure, p, parts, seed=seed):
        part = _part_result(measurement, p, facts, seed)
        result = {"rows": np.array(selection.rows), **part, **(more or {})}
        report.send(result)
        shots = measurement.counts.shots
        text = f"{spaced(shots)} of {spaced(spec.shots)} shots a row"
        report(start + (end - start) * shots / spec.shots, text)
    return result


def _mitigated_result(counts: RowCounts, p: Tensor, seed: int) -> dict[str, Any]:
    """The mitigated rows and how far they are off; without an estimate nothing was mitigated."""
    from ...measurement import distances_of_estimate

    if counts.estimate is None or counts.std_error is None:
        return {"estimate": None, "std_error": None, "error": None, "error_std": None}
    distance = distances_of_estimate(counts.estimate, counts.std_error, p, seed)
    return {
        "estimate": counts.estimate.numpy(),
        "std_error": counts.std_error.numpy(),
        "error": list(distance.value),
        "error_std": list(distance.std_error),
    }


def _expected_errors(
    backend: QiskitQuantumBackend, p: Tensor, shots: int, chosen: object, seed: int
) -> list[dict[str, Any]]:
    """The expected error of ways to measure rows against the shots: the chosen one, raw counts, the best."""
    from ....mitigation import CircuitMitigation
    from ....mitigation.planner import Option, default_options
    from ....mitigation.rehearsal import Rehearsal

    some = p[torch.linspace(0, len(p) - 1, min(len(p), REHEARSED_ROWS)).round().long()]
    raw, rng = CircuitMitigation(readout=False), np.random.default_rng(seed)
    options: list[Option] = [raw, *default_options(backend, p.shape[-1])]
    if isinstance(chosen, CircuitMitigation):
        options.append(chosen)
    rehearsal, repeats = Rehearsal(backend, some), max(2, REHEARSALS // len(some))
    grid = [max(1, round(factor * shots)) for factor in SHOTS_FACTORS]
    ways: list[dict[str, Any]] = []
    for option in dict.fromkeys(options):
        predictions = [rehearsal.predict(option, count, repeats, rng) for count in grid]
        usable = [(n, x) for n, x in zip(grid, predictions, strict=True) if not x.problem]
        if usable:
            kind = "raw" if option == raw else "chosen" if option == chosen else "other"
            numbers = {"error": [x.error for _, x in usable], "std_error": [x.std_error for _, x in usable]}
            ways.append({"name": option.name, "kind": kind, "shots": [n for n, _ in usable], **numbers})
    first = [way for way in ways if way["kind"] != "other"]
    others = sorted((way for way in ways if way["kind"] == "other"), key=lambda way: min(way["error"]))
    return [_classical_errors(some, grid, repeats, rng), *first, *others[: SHOWN_WAYS - len(first)]]


def _classical_errors(p: Tensor, grid: list[int], repeats: int, rng: np.random.Generator) -> dict[str, Any]:
    """The error of as many independent classical draws from rows p (R, n)."""
    rows = p.numpy() / p.numpy().sum(-1, keepdims=True)
    means, errors = [], []
    for shots in grid:
        share = rng.multinomial(shots, rows, size=(repeats, len(rows))) / shots
        distance = 0.5 * np.abs(share - rows).sum(-1).mean(-1)
        means.append(float(distance.mean()))
        errors.append(float(distance.std(ddof=1) / repeats**0.5))
    return {
        "name": "classical draws",
        "kind": "classical",
        "shots": grid,
        "error": means,
        "std_error": errors,
    }


def device_label(spec: CircuitSpec) -> str:
    """The device or simulator, and how its noise was changed: what tells measurements apart.

    >>> device_label(CircuitSpec(two_qubit=0.01)), device_label(CircuitSpec(noise_scale=0))
    ('aer, two_qubit 0.01', 'aer')
    """
    name = spec.device or "aer"
    fields = dict(spec)
    noise = [f"{field} {fields[field]:g}" for field in NOISE_FIELDS if fields[field]]
    if (spec.device or noise) and spec.noise_scale != 1:
        noise.append(f"noise × {spec.noise_scale:g}")
    return ", ".join([name, *noise])


def _save_run(home: str, name: str, spec: Spec, result: Mapping[str, Any]) -> Run:
    """Save a measurement as a run; the dashboard shows its metrics on the page Devices."""
    with Run.create(spec, name, home) as run:
        _log_rows(run, result)
    return run


def _log_rows(run: Run, result: Mapping[str, Any]) -> None:
    """Log how far each row is off, with half of its 95 % interval, and what is known of the circuit."""
    facts = result["facts"]
    common = {"device": facts["device_label"], "loader": facts["loader"], "shots": result["shots"]}
    fidelity = result["curve"][-1]
    lines: list[dict[str, Any]] = []
    for i, row in enumerate(result["rows"]):
        line = {
            "row": int(row),
            "distance": result["raw_error"][i],
            "half_width": Z95 * result["raw_error_std"][i],
            "classical": result["classical_error"][i],
            "classical_half_width": Z95 * result["classical_error_std"][i],
            "fidelity": fidelity["fidelity"][i],
            "fidelity_half_width": Z95 * fidelity["error"][i],
            **common,
        }
        if result.get("error") is not None:
            line |= {
                "mitigated": result["error"][i],
                "mitigated_half_width": Z95 * result["error_std"][i],
                "mitigation": facts["mitigation"],
            }
        lines.append(line)
    run.log_many(lines)
    discarded = int(result["discarded"].sum())
    run.update(results={**_means(result), "facts": dict(facts), "discarded": discarded})


def _means(result: Mapping[str, Any]) -> dict[str, float]:
    """Mean distance and fidelity of the rows, with half of the 95 % intervals, where each row has counts."""
    fidelity = result["curve"][-1]
    measured = {
        "distance": (result["raw_error"], result["raw_error_std"]),
        "classical": (result["classical_error"], result["classical_error_std"]),
        "mitigated": (result.get("error"), result.get("error_std")),
        "fidelity": (fidelity["fidelity"], fidelity["error"]),
        "classical_fidelity": (fidelity["classical"], fidelity["classical_error"]),
    }
    means: dict[str, float] = {}
    for name, (values, std_errors) in measured.items():
        if values is not None and std_errors is not None:
            mean, std_error = mean_with_error(values, std_errors)
            if math.isfinite(mean + std_error):
                means |= {name: mean, f"{name}_half_width": Z95 * std_error}
    return means


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


def _part_result(measurement: Measurement, p: Tensor, facts: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What is known after a part, as arrays and plain values."""
    from ...measurement import distances_of_counts

    counts, baseline = measurement.counts, measurement.baseline
    raw, classical = (distances_of_counts(x.counts, p, seed) for x in (counts, baseline))
    device = {name: counts.diagnostics[name] for name in DEVICE_FACTS if name in counts.diagnostics}
    return {
        "p": p.numpy(),
        "shots": counts.shots,
        "discarded": counts.discarded.numpy(),
        "counts": counts.counts.numpy(),
        "classical": baseline.counts.numpy(),
        "fallbacks": list(counts.diagnostics["fallbacks"]),
        "raw_error": list(raw.value),
        "raw_error_std": list(raw.std_error),
        "classical_error": list(classical.value),
        "classical_error_std": list(classical.std_error),
        "facts": {name: plain(value) for name, value in {**facts, **device}.items()},
        "curve": [plain(asdict(point)) for point in measurement.curve],
    }


def plain(value: Any) -> Any:
    """The same as JSON types; what has none as text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def submit(report: TaskReport, selection: CircuitRows, home: str) -> dict[str, Any]:
    """Do as `measure` in a run of its own; a job on IBM's devices is recorded there before it is sent."""
    with Run.create(selection.spec, "hardware", home) as run:
        result = measure(report, selection, run_dir=str(run.path))
        _log_rows(run, result)
    return {**result, "run": run.path.name}
