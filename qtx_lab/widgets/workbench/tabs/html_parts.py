"""Pieces of HTML that several tabs show: a table of measured rows, lists of notes, and numbers."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

from ....specs import Spec, field

form_field = field

NO_ADVANTAGE = (
    "Loading a row that is known into a circuit gives no advantage over drawing from it: the same number of "
    "pseudo-random draws stands beside it, as <em>classical</em>."
)

CIRCUIT_FACTS = {
    "device": "device",
    "loader": "loader",
    "qubits": "qubits",
    "depth": "depth",
    "two_qubit_gates": "two-qubit gates",
    "calibration": "calibrated",
    "mitigation": "mitigation",
}
"""What is said of a circuit and its device, and how it is called."""


def field_groups(kind: type[Spec]) -> dict[str, str]:
    """The heading under which each field of a spec stands in a form."""
    properties = kind.model_json_schema()["properties"]
    return {name: str(schema.get("group", "")) for name, schema in properties.items()}


def spaced(number: int) -> str:
    """A whole number with thin spaces between thousands.

    >>> spaced(1234567) == "1\\u2009234\\u2009567"
    True
    """
    return f"{number:,}".replace(",", "\u2009")


def notes_list(notes: Iterable[str], *fragments: str) -> str:
    """A list of notes; `notes` are escaped, `fragments` are HTML already."""
    items = [html.escape(note) for note in notes] + list(fragments)
    return "<ul class='qtx-wb-notes'>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def head_row(names: Iterable[str]) -> str:
    """The heading of a table."""
    return "<tr>" + "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in names) + "</tr>"


def rows_table(result: Mapping[str, Any]) -> str:
    """How far the measured distribution of each row is off, beside the same number of classical draws.

    Parameters
    ----------
    result : mapping
        Of the task `measure`.
    """
    facts, mitigated = result["facts"], result["estimate"] is not None
    head = head_row(["row", "keys", *(["mitigated"] if mitigated else []), "measured", "classical"])
    body = ""
    for i, row in enumerate(result["rows"]):
        keys = int((result["p"][i] > 0).sum())
        errors = [result["error"][i]] if mitigated else []
        errors += [result["raw_error"][i], result["classical_error"][i]]
        cells = "".join(f"<td>{error:.3f}</td>" for error in errors)
        body += f"<tr><th scope='row'>{row}</th><td>{keys}</td>{cells}</tr>"
    known = ", ".join(
        f"{label} {html.escape(str(facts[name]))}"
        for name, label in CIRCUIT_FACTS.items()
        if facts.get(name) is not None
    )
    notes = notes_list([*result["fallbacks"], *facts.get("not_modelled", [])], NO_ADVANTAGE)
    return (
        f"<p><b>Total variation from the exact row after {spaced(result['shots'])} shots</b></p>"
        f"<table class='qtx-wb-table'><thead>{head}</thead><tbody>{body}</tbody></table>"
        f"<p>{known}; {spaced(int(result['discarded'].sum()))} shots discarded.</p>{notes}"
    )
