"""What the tab Circuit shows and copies of estimated outputs: a headline, a table, and the Python."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from ....specs import CircuitSpec
from ....theme import fixed, with_error
from ...numbers import spaced
from .code_parts import IMPORTS, Code, call, changed_fields, inputs_code
from .html_parts import facts_text, head_row, headline, notes_list

EXACT_NOTE = (
    "A classical computer sums the exact output with a multiplication for each key: nothing here is faster "
    "than that. The comparison is of what one use of the row's loader yields."
)


def outputs_headline(result: Mapping[str, Any]) -> str:
    """Half of the 95 % interval of each method in the mean over rows.

    Parameters
    ----------
    result : mapping
        Of the task `estimate`.
    """
    widths = {x["name"]: _half_width(x) for x in result["methods"]}
    amplitude = widths.pop("amplitude estimation")
    others = ", ".join(f"{name} ± {x:.2g}" for name, x in widths.items())
    count = len(result["rows"])
    rows = "1 row" if count == 1 else f"mean of {count} rows"
    return headline(
        f"Amplitude estimation ± {amplitude:.2g}; as many {others}",
        f"Half of the 95 % interval, {rows}, coordinate {result['coordinate']} of the output; "
        f"{spaced(result['asked_loads'])} loads of each row on {html.escape(result['facts']['device'])}.",
    )


def outputs_table(result: Mapping[str, Any]) -> str:
    """The estimates of each row beside its exact output, and what the circuits took."""
    methods = result["methods"]
    body = ""
    for i, row in enumerate(result["rows"]):
        cells = [fixed(result["exact"][i], 4)]
        cells += [with_error(x["value"][i], (x["upper"][i] - x["lower"][i]) / 2) for x in methods]
        cells += [spaced(int(result["loads"][i])), f"{result['rest'][i]:.1%}"]
        body += f"<tr><th scope='row'>{row}</th>{''.join(f'<td>{x}</td>' for x in cells)}</tr>"
    head = head_row(["row", "exact", *(x["name"] for x in methods), "loads used", "summed exactly"])
    facts, gates = result["facts"], dict(map(tuple, result["two_qubit_gates"]))
    schedule = ", ".join(
        f"{k} ({spaced(shots)} shots, {gates[k]} two-qubit gates)" for k, shots in result["schedule"]
    )
    seconds = result["seconds"]
    time = "" if seconds is None else f", about {seconds:.0f} s of quantum time"
    return (
        "<p><b>One coordinate of each output</b> (± half of the 95 % interval)</p>"
        f"<table class='qtx-wb-table'><thead>{head}</thead><tbody>{body}</tbody></table>"
        f"<p>{facts_text(facts)}; contrast {result['contrast']:.3f}, decay {result['decay']:.4f} an "
        f"iterate{time}.</p>"
        f"<p>Grover iterates: {schedule or 'none'}.</p>"
        + notes_list(facts.get("not_modelled", []), html.escape(EXACT_NOTE))
    )


def outputs_code(
    source: Mapping[str, Any],
    rows: Mapping[str, Any],
    circuit: Mapping[str, Any],
    output: Mapping[str, Any],
) -> str:
    """Python that estimates the same outputs, and prints them beside the exact ones.

    Parameters
    ----------
    source, rows, circuit, output : mapping
        The fields of the forms.
    """
    spec = call("qtx.CircuitSpec", **changed_fields(CircuitSpec(**circuit)))
    numbers = {name: output[name] for name in ("loads", "keys")}
    estimated = call(
        "estimate_outputs", Code("sampler"), Code("p"), Code("v"), **numbers, seed=source["seed"]
    )
    return (
        f"{IMPORTS}from qtx_lab.widgets.outputs import estimate_outputs\n\n{inputs_code(source)}"
        f"layer, head = {source['layer']}, {source['head']}\n"
        f"p = inputs.weights(layer, head)[{list(rows['rows'])!r}]\n"
        "p = p[:, : int(p.sum(0).nonzero().amax()) + 1]  # the keys that any of the rows sees\n"
        "q, _, v = inputs.layers[layer]\n"
        f"v = v[head * len(v) // len(q), : p.shape[-1], {output['coordinate']}]\n"
        f"spec = {spec}\n"
        "sampler = qtx.CircuitSampler(spec.build(), hybrid_mode=spec.policy())\n"
        f"result = {estimated}\n"
        'print("exact:", result.exact.tolist())\n'
        "for name, x in result.methods.items():\n"
        '    print(f"{name}: {x.value.tolist()}, half of the 95 % intervals {x.half_width.tolist()}")\n'
    )


def _half_width(method: Mapping[str, Any]) -> float:
    widths = [high - low for low, high in zip(method["lower"], method["upper"], strict=True)]
    return sum(widths) / (2 * len(widths))
