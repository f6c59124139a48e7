"""The Python that the tabs Circuit, Mitigate and Hardware give to copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....specs import CircuitSpec, MitigationSpec
from .code_parts import IMPORTS, Code, call, changed_fields, inputs_code

MEASUREMENT_IMPORTS = (
    "from qtx_lab.circuits.fidelity import total_variation\n"
    "from qtx_lab.widgets.measurement import growing_parts, measure_in_parts\n"
)


def measurement_code(source: Mapping[str, Any], rows: Mapping[str, Any], circuit: Mapping[str, Any]) -> str:
    """Python that measures the same rows, part by part as the tab does, and prints how far they are off.

    Parameters
    ----------
    source, rows, circuit : mapping
        The fields of the forms.
    """
    return _rows_code(source, rows, circuit) + _counts_code(source["seed"]) + _print_code("measured", "error")


def mitigation_code(
    source: Mapping[str, Any],
    rows: Mapping[str, Any],
    circuit: Mapping[str, Any],
    mitigation: Mapping[str, Any],
) -> str:
    """Python that measures the same rows with and without mitigation, and prints how far both are off.

    Parameters
    ----------
    source, rows, circuit, mitigation : mapping
        The fields of the forms.
    """
    spec = MitigationSpec(**mitigation)
    fields = changed_fields(spec)
    if "readout" not in spec.unused_fields():  # its default depends on the method
        fields["readout"] = spec.readout
    return (
        _rows_code(source, rows, circuit)
        + _counts_code(source["seed"])
        + _print_code("raw counts", "raw_error")
        + f"\nmitigation = {call('qtx.MitigationSpec', **fields)}.build(num_keys=p.shape[-1])\n"
        "mitigated_sampler = qtx.CircuitSampler(backend, mitigation=mitigation, hybrid_mode=spec.policy())\n"
        f"generator = torch.Generator().manual_seed({source['seed']})\n"
        "counts = mitigated_sampler.measure(p, spec.shots, generator=generator)\n"
        "if counts.estimate is None:\n"
        "    print(counts.diagnostics['plan'].reason)\n"
        "else:\n"
        "    error = (counts.estimate - p).abs().sum(-1) / 2\n"
        '    print(f"Mitigated: {error.mean():.4f}, by row {error.tolist()}")\n'
    )


def _rows_code(source: Mapping[str, Any], rows: Mapping[str, Any], circuit: Mapping[str, Any]) -> str:
    """The statements that give `p`, `spec`, `backend` and `sampler`."""
    spec = call("qtx.CircuitSpec", **changed_fields(CircuitSpec(**circuit)))
    return (
        f"{IMPORTS}{MEASUREMENT_IMPORTS}\n{inputs_code(source)}"
        f"p = inputs.weights({source['layer']}, {source['head']})[{list(rows['rows'])!r}]\n"
        "p = p[:, : int(p.sum(0).nonzero().amax()) + 1]  # the keys that any of the rows sees\n"
        f"spec = {spec}\nbackend = spec.build()\n"
        "sampler = qtx.CircuitSampler(backend, hybrid_mode=spec.policy())\n"
    )


def _counts_code(seed: int) -> str:
    """The statements that measure, and give `counts` and `baseline`, the classical draws."""
    measured = call("measure_in_parts", Code("sampler.measure"), Code("p"), Code("parts"), seed=seed)
    return (
        "parts = growing_parts(spec.shots, 1) if spec.provider == 'ibm' else growing_parts(spec.shots)\n"
        f"*_, measured = {measured}\n"
        "counts, baseline = measured.counts.counts, measured.baseline.counts\n"
    )


def _print_code(name: str, variable: str) -> str:
    return (
        f"{variable} = total_variation(counts, p).value\n"
        "classical_error = total_variation(baseline, p).value\n"
        f'print(f"Total variation, {name}: {{{variable}.mean():.4f}}, by row {{{variable}.tolist()}}; "\n'
        '      f"as many classical draws: {classical_error.mean():.4f}")\n'
    )
