"""The view Compare: two runs side by side, with what differs in spec, code, environment and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

from ...errors import QtxError
from ...experiments.manifest import read_manifest
from ...experiments.run_comparison import RunComparison, compare_runs
from ...theme import digits, with_error
from .elements import DRAWING, DashboardView, empty_note, html_pane, html_table, status_mark
from .records import Listing
from .run_files import is_folder_name
from .settings import RESULT, SPEC, half_width, metric_columns, value_text
from .view_host import ViewHost

TWO_NEEDED = empty_note("Tick two runs", "Tick two runs in the table of runs to see them side by side.")


MAX_CODE_LINES = 60
"""Lines of code that differ and are shown, of each file."""


@dataclass(frozen=True)
class ComparedRun:
    """One of two runs: its row of the listing, and its manifest, empty where it cannot be read."""

    row: Any
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class ComparedPair:
    """What the view shows: two runs, or fewer where they are not there; why they cannot be compared."""

    runs: list[ComparedRun]
    comparison: RunComparison | None = None
    problem: str = ""


class CompareView(DashboardView):
    """Two runs side by side."""

    uses_run_filters = False
    parent = "Runs"

    def __init__(self, page: ViewHost):
        self._runs: list[str] = []
        self._known: tuple[Any, ComparedPair] | None = None
        self._text = html_pane(DRAWING)
        super().__init__(page, [self._text])

    def state(self) -> tuple[str, ...]:
        """The runs that are compared."""
        return tuple(self._runs)

    def apply(self, query: Mapping[str, str]) -> None:
        """Take the runs from an address: those that are ticked."""
        self._runs = [run for run in query.get("ticked", "").split("/") if is_folder_name(run)]

    def prepare(self, listing: Listing, rows: pd.DataFrame) -> ComparedPair:
        """Compare the runs that are still there, anew only if one of them has changed."""
        records, compared = self.page.records, []
        for run in self._runs[:2]:
            listed = listing.table[listing.table["run"] == run]
            if len(listed):
                try:
                    manifest: Mapping[str, Any] = read_manifest(records.home / run)
                except QtxError:
                    manifest = {}
                compared.append(ComparedRun(listed.iloc[0], manifest))
        if len(compared) < 2:
            return ComparedPair(compared)
        key = [(x.row["run"], dict(x.manifest), records.mark(x.row["run"])) for x in compared]
        if self._known is None or self._known[0] != key:
            try:
                a, b = (records.home / x.row["run"] for x in compared)
                pair = ComparedPair(compared, compare_runs(a, b))
            except QtxError as error:
                pair = ComparedPair(compared, None, str(error))
            self._known = (key, pair)
        return self._known[1]

    def show(self, data: ComparedPair) -> None:
        """Show the two runs, what differs first."""
        back = f"<p><a href='{escape(self.page.link(view=None))}'>← All runs</a></p>"
        if len(data.runs) != 2:
            self._text.object = back + TWO_NEEDED
            return
        a, b = data.runs
        columns = {"": "", "A": "", "B": ""}
        comparison = data.comparison
        sections = {
            "Spec": _pairs(_spec(a), _spec(b)),
            "Code": _pairs({"version and commit": _code(a)}, {"version and commit": _code(b)}),
            "Environment": _pairs(_environment(a), _environment(b)),
        }
        if comparison is not None:
            known = {name for name, *_ in sections["Environment"]}
            more = [
                (d.name, value_text(d.a), value_text(d.b))
                for d in comparison.environment
                if d.name not in known
            ]
            sections["Environment"] += more
            sections["Inputs"] = [(d.name, value_text(d.a), value_text(d.b)) for d in comparison.inputs]
        html = back + f"<h2>{escape(_finding(sections, comparison))}</h2>"
        html += f"<p>{self._name(a, 'A')}<br>{self._name(b, 'B')}</p>"
        if data.problem:
            html += f"<p class='warning' role='alert'>Not compared line by line: {escape(data.problem)}</p>"
        metrics = _metric_lines(a, b)
        if metrics:
            html += "<h3>Metrics</h3>" + html_table({**columns, "B − A": ""}, metrics)
            html += "<p class='note'>± is half of a 95 % interval, where the run has recorded one.</p>"
        html += _numbers(comparison)
        for name, pairs in sections.items():
            differing = [_line(key, x, y) for key, x, y in pairs if x != y]
            same = [_line(key, x, y) for key, x, y in pairs if x == y]
            lines = _code_lines(comparison) if name == "Code" else ""
            verb = "differ" if len(differing) > 1 else "differs"
            count = "differs" if lines and not differing else f"{_count(len(differing))} {verb}"
            html += f"<h3>{name}: {count}</h3>"
            html += (html_table(columns, differing) if differing else "") + lines
            if same:
                html += (
                    f"<details><summary>{len(same)} the same</summary>{html_table(columns, same)}</details>"
                )
        self._text.object = f"<div class='pair'>{html}</div>"

    def _name(self, run: ComparedRun, mark: str) -> str:
        link = self.page.link(view="Run", run=str(run.row["run"]))
        return (
            f"<b>{mark}</b>: <a href='{escape(link)}'>{escape(str(run.row['run']))}</a> "
            f"{status_mark(run.row['status'])}"
        )


def _spec(run: ComparedRun) -> dict[str, str]:
    names = [name for name in run.row.index if str(name).startswith(SPEC)]
    fields = {name.removeprefix(SPEC): value_text(run.row[name]) for name in names}
    return {"kind of spec": value_text(run.row.get("kind")), **fields}


def _environment(run: ComparedRun) -> dict[str, str]:
    versions, machine, devices = (run.manifest.get(key) or {} for key in ("versions", "machine", "devices"))
    return {
        **{f"machine: {name}": str(value) for name, value in machine.items()},
        **{f"{name}, calibrated": str(time or "") for name, time in devices.items()},
        **{str(name): str(version) for name, version in versions.items()},
    }


def _code(run: ComparedRun) -> str:
    return str(run.row.get("code") or "")


def _count(number: int) -> str:
    return {0: "nothing", 1: "one"}.get(number, str(number))


def _code_lines(comparison: RunComparison | None) -> str:
    """The lines of code that differ, file by file, as HTML."""
    parts = []
    for part in comparison.code if comparison else ():
        lines = "\n".join(part.lines[:MAX_CODE_LINES])
        more = len(part.lines) - MAX_CODE_LINES
        rest = f"\n… and {more} more lines" if more > 0 else ""
        parts.append(f"<p><code>{escape(part.file)}</code></p><pre>{escape(lines + rest)}</pre>")
    return "".join(parts)


def _numbers(comparison: RunComparison | None) -> str:
    """How the values of the metrics compare, bit for bit and within their intervals, in a sentence."""
    if comparison is None or not comparison.compared:
        return ""
    timing = (
        f" Left out, because they tell time: {', '.join(comparison.not_compared)}."
        if comparison.not_compared
        else ""
    )
    if not comparison.metrics:
        return f"<p>All {comparison.compared:,} values are the same, bit for bit.{escape(timing)}</p>"
    lines = "".join(f"<li>{escape(str(difference))}</li>" for difference in comparison.metrics)
    within = sum(difference.within for difference in comparison.metrics)
    count = len(comparison.metrics)
    summary = (
        f"{count} metric{'s differ' if count > 1 else ' differs'}, {within} within the intervals; "
        f"{comparison.compared:,} values were compared.{timing}"
    )
    return f"<details><summary>{escape(summary)}</summary><ul>{lines}</ul></details>"


def _pairs(a: Mapping[str, str], b: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """The values of both by name, without what neither has."""
    pairs = ((name, a.get(name, ""), b.get(name, "")) for name in dict.fromkeys([*a, *b]))
    return [(name, x, y) for name, x, y in pairs if x or y]


def _finding(sections: Mapping[str, list[tuple[str, str, str]]], comparison: RunComparison | None) -> str:
    """What differs, in a sentence."""
    differing = [name for pairs in sections.values() for name, x, y in pairs if x != y]
    differing += [f"the code of {part.file}" for part in (comparison.code if comparison else ())]
    if not differing:
        return "Both runs have the same spec, code and environment"
    if differing == ["seed"]:
        return "These runs differ in nothing but the seed"
    more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
    return f"These runs differ in {', '.join(differing[:4])}{more}"


def _line(name: str, x: str, y: str) -> str:
    css_class = " class='differs'" if x != y else ""
    none = "<span class='note'>–</span>"
    cells = "".join(f"<td{css_class}>{escape(text) or none}</td>" for text in (x, y))
    return f"<tr><td>{escape(name)}</td>{cells}</tr>"


def _metric_lines(a: ComparedRun, b: ComparedRun) -> list[str]:
    """A line for each result that one of the runs has, with the difference and its interval."""
    columns = metric_columns(pd.DataFrame([a.row, b.row]).infer_objects())
    lines = []
    for column in columns:
        values = [float(pd.to_numeric(run.row.get(column), errors="coerce")) for run in (a, b)]
        widths = [half_width(run.row, column) for run in (a, b)]
        texts = [
            "<span class='note'>–</span>" if x != x else with_error(x, w) if w > 0 else digits(x, 5)
            for x, w in zip(values, widths, strict=True)
        ]
        difference, width = values[1] - values[0], (widths[0] ** 2 + widths[1] ** 2) ** 0.5
        apart = "" if difference != difference else with_error(difference, width, sign=True)
        cells = "".join(f"<td>{text}</td>" for text in texts)
        name = escape(column.removeprefix(RESULT))
        lines.append(f"<tr><td>{name}</td>{cells}<td>{apart}</td></tr>")
    return lines
