"""Pieces of HTML that several tabs show: a table of measured rows, lists of notes, and numbers."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from ....specs import Spec, field
from ....theme import with_error
from ...numbers import Z95, Distances, spaced

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
"""The facts about a circuit and its device that are shown, and what they are called."""


def field_groups(kind: type[Spec]) -> dict[str, str]:
    """The heading under which each field of a spec stands in a form."""
    properties = kind.model_json_schema()["properties"]
    return {name: str(schema.get("group", "")) for name, schema in properties.items()}


def rows_text(number: int) -> str:
    """A number of rows in words.

    >>> rows_text(1), rows_text(2)
    ('1 row', '2 rows')
    """
    return f"{number} row{'s' * (number != 1)}"


def ranges_text(numbers: Iterable[int]) -> str:
    """Rising whole numbers in words, neighbours as a range.

    >>> ranges_text([3, 4, 5, 9])
    '3–5, 9'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}–{b}" if a < b else str(a) for a, b in runs)


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
        Of the task `measure`, `mitigate` or `submit`.
    """
    facts, columns = result["facts"], distance_columns(result)
    head = head_row(["row", "keys", *columns])
    body = ""
    for i, row in enumerate(result["rows"]):
        keys = int((result["p"][i] > 0).sum())
        cells = [with_error(x.value[i], Z95 * x.std_error[i]) for x in columns.values()]
        body += f"<tr><th scope='row'>{row}</th><td>{keys}</td>{_cells(cells)}</tr>"
    means = [with_error(mean, Z95 * std_error) for mean, std_error in (x.mean for x in columns.values())]
    foot = f"<tr><th scope='row'>mean</th><td></td>{_cells(means)}</tr>"
    notes = notes_list([*result["fallbacks"], *facts.get("not_modelled", [])], NO_ADVANTAGE)
    return (
        f"<p><b>Total variation from the exact row after {spaced(result['shots'])} shots</b> "
        "(± half of the 95 % interval)</p>"
        f"<table class='qtx-wb-table'><thead>{head}</thead><tbody>{body}</tbody><tfoot>{foot}</tfoot></table>"
        f"<p>{facts_text(facts)}; {spaced(int(result['discarded'].sum()))} shots discarded.</p>{notes}"
    )


def facts_text(facts: Mapping[str, Any]) -> str:
    """What is known of a circuit and its device, in words; HTML.

    >>> facts_text({"device": "fake_fez", "qubits": 7, "calibration": "2025-02-26T15:16:25-05:00"})
    'device fake_fez, qubits 7, calibrated 2025-02-26 20:16 UTC'
    """
    texts = {name: str(facts[name]) for name in CIRCUIT_FACTS if facts.get(name) is not None}
    with suppress(KeyError, ValueError):  # a device may have another way to write times, or none
        time = datetime.fromisoformat(texts["calibration"])
        if time.tzinfo is not None:
            texts["calibration"] = f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    return ", ".join(f"{CIRCUIT_FACTS[name]} {html.escape(text)}" for name, text in texts.items())


def measured_headline(result: Mapping[str, Any]) -> str:
    """How far the measured rows are off in the mean, beside the same number of classical draws."""
    columns, device = distance_columns(result), html.escape(str(result["facts"]["device"]))
    measured, classical = (
        with_error(mean, Z95 * std_error)
        for mean, std_error in (columns[name].mean for name in ("measured", "classical"))
    )
    return headline(
        f"Total variation {measured} on {device}; as many classical draws: {classical}",
        f"Mean of {rows_text(len(result['rows']))}; ± is half of the 95 % interval.",
    )


def distance_columns(result: Mapping[str, Any]) -> dict[str, Distances]:
    """How far the rows of a result are off, by what they were estimated from."""
    names = {"mitigated": "error", "measured": "raw_error", "classical": "classical_error"}
    return {
        title: Distances(
            tuple(result[name]), tuple(result.get(f"{name}_std") or [math.nan] * len(result[name]))
        )
        for title, name in names.items()
        if result.get(name) is not None and (title != "mitigated" or result["estimate"] is not None)
    }


def headline(text: str, detail: str = "") -> str:
    """The one finding of a picture, and in smaller letters what belongs to it; both are HTML."""
    more = f"<p class='qtx-wb-detail'>{detail}</p>" if detail else ""
    return f"<p class='qtx-wb-headline' role='heading' aria-level='3'>{text}</p>{more}"


def opened(title: str, notes: Sequence[str]) -> str:
    """A list of notes that is opened by its title; empty where there are none."""
    if not notes:
        return ""
    return (
        f"<details class='qtx-wb-opened'><summary>{html.escape(title)}</summary>{notes_list(notes)}</details>"
    )


def _cells(texts: Iterable[str]) -> str:
    return "".join(f"<td>{html.escape(text)}</td>" for text in texts)
