"""The view Run: one run with its spec, metrics, figures, environment, events and cost; tags and note."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import panel as pn

from ...errors import QtxError
from ...experiments.annotations import Annotations, write_annotations
from ...experiments.manifest import read_manifest
from ...experiments.runs import Run
from ...theme import digits, with_error
from .cells import Cell
from .elements import CONTROL_WIDTH, DRAWING, DashboardView, empty_note, html_pane, html_table, status_mark
from .figures import UNITS
from .records import Listing
from .run_files import is_folder_name
from .settings import RESULT, SPEC, half_width, metric_columns, value_text
from .view_host import ViewHost

MAX_METRIC_ROWS = 30
"""Rows of a table of metrics that are shown; the rest is in the file."""

MAX_FIGURES = 12

MAX_FIGURE_BYTES = 2 << 20
"""Size of a picture that is still shown."""

FIELD_CSS = ".bk-input { background: var(--house-background); color: var(--house-text); }"


@dataclass(frozen=True)
class RunData:
    """What is known about a run; `problem` says what could not be read."""

    row: Any
    manifest: Mapping[str, Any]
    metrics: pd.DataFrame
    figures: Sequence[tuple[Mapping[str, Any], bytes]]
    cells: Sequence[Cell]
    notebook: bool
    annotations: Annotations
    jobs: pd.DataFrame
    problems: Sequence[str]


class RunView(DashboardView):
    """One run, with its tags and note, which can be written where the page allows it."""

    uses_run_filters = False
    parent = "Runs"

    def __init__(self, page: ViewHost):
        self._run, self._loaded = "", ("", Annotations())
        self._head, self._rest, self._answer = html_pane(DRAWING), html_pane(), html_pane()
        self._tags = pn.widgets.TextInput(
            label="Tags, separated by commas", width=CONTROL_WIDTH, stylesheets=[FIELD_CSS]
        )
        self._note = pn.widgets.TextAreaInput(
            label="Note", width=CONTROL_WIDTH, height=160, max_length=10_000, stylesheets=[FIELD_CSS]
        )
        self._save = pn.widgets.Button(label="Save tags and note", width=CONTROL_WIDTH)
        self._save.on_click(self._write)
        self._editor = pn.Column(self._tags, self._note, self._save, self._answer, visible=False, margin=0)
        super().__init__(page, [self._head, self._rest])
        self.side = [self._editor] if page.writable else []

    def state(self) -> Any:
        """Changes with the run, and whenever its metrics or its notebook do."""
        return self._run, self.page.records.mark(self._run), self.page.records.notebook_mark(self._run)

    def query(self) -> dict[str, str]:
        """The run, as the address has it."""
        return {"run": self._run} if self._run else {}

    def apply(self, query: Mapping[str, str]) -> None:
        """Take the run from an address."""
        run = query.get("run", "")
        self._run = run if is_folder_name(run) else ""

    def prepare(self, listing: Listing, rows: pd.DataFrame) -> RunData | None:
        """Read the run; None where there is none of that name."""
        listed = listing.table[listing.table["run"] == self._run]
        if listed.empty:
            return None
        records, problems = self.page.records, []
        folder = records.home / self._run
        manifest: Mapping[str, Any] = {}
        metrics, annotations = pd.DataFrame(), Annotations()
        try:
            manifest = read_manifest(folder)
        except QtxError as error:
            problems.append(str(error))
        try:
            metrics = records.metrics(self._run)
        except QtxError as error:
            problems.append(f"The metrics cannot be read: {error}")
        try:
            annotations = records.annotations(self._run)
        except QtxError as error:
            problems.append(str(error))
        cells = records.cells(self._run)
        jobs = listing.jobs[listing.jobs["run"] == self._run] if len(listing.jobs) else listing.jobs
        return RunData(
            listed.iloc[0], manifest, metrics, _figures(folder, self.page.theme), cells or (),
            cells is not None, annotations, jobs, problems,
        )  # fmt: skip

    def show(self, data: RunData | None) -> None:
        """Show the run."""
        back = f"<p><a href='{escape(self.page.link(view=None, run=None))}'>← All runs</a></p>"
        self._editor.visible = data is not None and self.page.writable
        if data is None:
            self._head.object = back + empty_note(
                "There is no such run", f"No folder <code>{escape(self._run)}</code> can be read here."
            )
            self._rest.object = ""
            return
        self._show_annotations(data.annotations)
        self._head.object = back + self._heading(data)
        parts = {
            "Metrics": _metrics(data),
            "Figures": _pictures(data.figures),
            "Spec": _facts(_spec(data.row)),
            "Environment": _facts(_environment(data.manifest, data.row)),
            "Events": _events(data),
            "Cost": _facts(_cost(data)),
        }
        self._rest.object = "".join(f"<h3>{name}</h3>{html}" for name, html in parts.items() if html)

    def _heading(self, data: RunData) -> str:
        row, title = data.row, data.manifest.get("title") or data.row["name"]
        links = []
        if row["report"]:
            link = escape(self.page.report_link(self._run))
            links.append(f"<a href='{link}' target='_blank' rel='noopener'>report</a>")
        if data.notebook:
            link = escape(self.page.notebook_link(self._run))
            links.append(f"<a href='{link}' download>executed notebook</a>")
        if isinstance(row["sweep"], str):
            link = escape(self.page.link(view="Sweeps", run=None, sweep=row["sweep"]))
            links.append(f"<a href='{link}'>its sweep</a>")
        elif row.get("kind") == "SweepSpec":
            link = escape(self.page.link(view="Sweeps", run=None, sweep=self._run))
            links.append(f"<a href='{link}'>what mattered in it</a>")
        error = f"<p class='warning'>{escape(str(row['error']))}</p>" if isinstance(row["error"], str) else ""
        problems = "".join(f"<p class='warning' role='alert'>{escape(text)}</p>" for text in data.problems)
        tags = "".join(f"<span class='tag'>{escape(tag)}</span>" for tag in data.annotations.tags)
        note = f"<pre>{escape(data.annotations.note)}</pre>" if data.annotations.note else ""
        shown = f"<p>{tags}</p>{note}" if not self.page.writable and (tags or note) else ""
        hint = "" if self.page.writable else (
            "<p class='note'>Tags and notes can be written where the dashboard is started with a token, or "
            "from JupyterLab's launcher.</p>"
        )  # fmt: skip
        started = "" if pd.isna(row["started"]) else f"{row['started']:%Y-%m-%d %H:%M:%S} UTC"
        return (
            f"<h2>{escape(str(title))}</h2><p>{status_mark(row['status'])} · {started} · "
            f"<code>{escape(self._run)}</code>{''.join(f' · {link}' for link in links)}</p>"
            f"{error}{problems}{_summary(data.manifest)}{shown}{hint}"
        )

    # --- Tags and note --------------------------------------------------------------------------------

    def _show_annotations(self, annotations: Annotations) -> None:
        """Show what is stored, unless somebody is changing it here."""
        known_run, known = self._loaded
        changed = (self._tags.value_input or "", self._note.value_input or "") != _texts(known)
        if known_run == self._run and (changed or annotations == known):
            return
        self._answer.object = "" if known_run != self._run else self._answer.object
        self._loaded = (self._run, annotations)
        tags, note = _texts(annotations)
        self._tags.param.update(value=tags, value_input=tags)
        self._note.param.update(value=note, value_input=note)

    async def _write(self, event: Any) -> None:
        """Write tags and note, whole or not at all."""
        run, old = self._loaded
        if not self.page.writable or run != self._run:
            return
        folder = self.page.records.home / Path(run).name
        try:
            new = Annotations.of_text(self._tags.value_input or "", self._note.value_input or "")
            await asyncio.to_thread(write_annotations, folder, new, old=old)
        except QtxError as error:
            self._answer.object = f"<p class='warning' role='alert'>{escape(str(error))}</p>"
            return
        self._loaded = (run, new)
        tags, note = _texts(new)
        self._tags.param.update(value=tags, value_input=tags)
        self._note.param.update(value=note, value_input=note)
        self._answer.object = "<p role='status'>Saved.</p>"
        await asyncio.to_thread(self.page.records.look)
        await self.page.on_change(event)


def _texts(annotations: Annotations) -> tuple[str, str]:
    return ", ".join(annotations.tags), annotations.note


# --- Reading ------------------------------------------------------------------------------------------


def _figures(folder: Path, theme: str) -> list[tuple[Mapping[str, Any], bytes]]:
    """What is said about the figures, and their pictures in a theme; those that are broken are left out."""
    figures: list[tuple[Mapping[str, Any], bytes]] = []
    for facts in Run(folder).figures()[:MAX_FIGURES]:
        for suffix in ("-dark", "") if theme == "dark" else ("",):
            path = folder / "figures" / f"{facts['name']}{suffix}.png"
            try:
                if path.stat().st_size <= MAX_FIGURE_BYTES:
                    figures.append((facts, path.read_bytes()))
                    break
            except OSError:
                continue
    return figures


# --- HTML ---------------------------------------------------------------------------------------------


def _summary(manifest: Mapping[str, Any]) -> str:
    summary = (manifest.get("results") or {}).get("summary") or []
    lines = [summary] if isinstance(summary, str) else summary if isinstance(summary, list) else []
    return "".join(f"<p>{escape(str(line))}</p>" for line in lines[:12])


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    """Names and values, one below the other; "" where there are none."""
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts if text)
    return f"<dl>{lines}</dl>" if lines else ""


def _spec(row: Any) -> list[tuple[str, str]]:
    names = [name for name in row.index if str(name).startswith(SPEC)]
    kind = row.get("kind")
    return [("kind", value_text(kind)), *((n.removeprefix(SPEC), value_text(row[n])) for n in names)]


def _environment(manifest: Mapping[str, Any], row: Any) -> list[tuple[str, str]]:
    versions, machine, devices = (manifest.get(key) or {} for key in ("versions", "machine", "devices"))
    calibrated = (
        f"{name}, calibrated {time[:16].replace('T', ' ')}" if isinstance(time, str) else str(name)
        for name, time in devices.items()
    )
    return [
        ("code", str(row.get("code") or "")),
        ("command", str(manifest.get("command") or "")),
        ("machine", ", ".join(f"{name} {value}" for name, value in machine.items())),
        ("devices", "; ".join(calibrated)),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def _metrics(data: RunData) -> str:
    """The results with their intervals, the table of the results, and the rows of the metrics."""
    row = data.row
    names = metric_columns(row.to_frame().T.infer_objects())
    lines = []
    for column in names:
        value, width = float(row[column]), half_width(row, column)
        text = with_error(value, width) if width > 0 else digits(value, 6)
        lines.append(f"<tr><td>{escape(column.removeprefix(RESULT))}</td><td class='number'>{text}</td></tr>")
    results = html_table({"result": "", "value, 95 % interval": "number"}, lines)
    html = f"<div class='narrow'>{results}</div>" if lines else ""
    table = (data.manifest.get("results") or {}).get("table")
    if isinstance(table, list) and table and all(isinstance(x, Mapping) for x in table):
        html += _frame_html(pd.DataFrame(table))
    frame = data.metrics
    if frame.empty:
        return html or "<p class='note'>Nothing measured yet.</p>"
    parts = (
        dict(list(frame.groupby(frame["figure"].fillna("metrics"), sort=False)))
        if "figure" in frame
        else {"metrics": frame}
    )
    for name, part in parts.items():
        part = _with_intervals(part.dropna(axis=1, how="all").drop(columns="figure", errors="ignore"))
        more = f", the first {MAX_METRIC_ROWS}" if len(part) > MAX_METRIC_ROWS else ""
        html += (
            f"<details><summary>{escape(str(name))}: {len(part)} row{'s' * (len(part) != 1)}{more}</summary>"
            f"<div class='wide' tabindex='0'>{_frame_html(part)}</div></details>"
        )
    return html


def _with_intervals(frame: pd.DataFrame) -> pd.DataFrame:
    """Metrics whose half widths stand in them as ±, in place of a column of their own."""
    frame = frame.copy()
    pairs = {c: c.removesuffix("_half_width") for c in frame.columns if c.endswith("_half_width")}
    known = [
        c for c in UNITS if c in frame.columns and c not in ("step", "epoch", "num_samples", "shots", "m")
    ]
    if "half_width" in frame.columns and known:
        pairs["half_width"] = known[0]
    for width, metric in pairs.items():
        if metric in frame.columns:
            values = pd.to_numeric(frame[metric], errors="coerce").to_numpy("float64", na_value=np.nan)
            widths = pd.to_numeric(frame[width], errors="coerce").to_numpy("float64", na_value=np.nan)
            frame[metric] = [
                "" if value != value else with_error(value, half)
                for value, half in zip(values, widths, strict=True)
            ]
            frame = frame.drop(columns=width)
    return frame


def _frame_html(frame: pd.DataFrame) -> str:
    numeric = {str(c): "number" if pd.api.types.is_numeric_dtype(frame[c]) else "" for c in frame.columns}
    lines = [
        "<tr>" + "".join(
            f"<td class='{numeric[str(name)]}'>{escape(value_text(x))}</td>"
            for name, x in zip(frame.columns, values, strict=True)
        ) + "</tr>"
        for values in frame.head(MAX_METRIC_ROWS).itertuples(index=False)
    ]  # fmt: skip
    return html_table({escape(str(c).replace("_", " ")): numeric[str(c)] for c in frame.columns}, lines)


def _pictures(figures: Sequence[tuple[Mapping[str, Any], bytes]]) -> str:
    parts = []
    for facts, picture in figures:
        caption = escape(str(facts.get("caption") or facts["name"]))
        source = base64.b64encode(picture).decode()
        parts.append(
            f"<figure><img src='data:image/png;base64,{source}' alt='{caption}'>"
            f"<figcaption class='note'>{caption}</figcaption></figure>"
        )
    return "".join(parts)


def _events(data: RunData) -> str:
    """What happened when: the start, the cells of the notebook, jobs, and the end."""
    manifest, row = data.manifest, data.row
    events: list[tuple[str, str]] = [(str(manifest.get("started") or ""), "started")]
    for cell in data.cells:
        if cell.started:
            took = "" if cell.seconds != cell.seconds else f", {cell.seconds:.1f} s"
            text = f"cell {cell.number} of {len(data.cells)} {cell.status}{took}: {cell.first_line}"
            events.append((cell.started, text))
    events += [
        (
            str(job.recorded),
            f"job {job.tag} on {job.device}: {job.rows} rows × {job.shots} shots, {job.state}",
        )
        for job in data.jobs.itertuples()
    ]
    if manifest.get("finished"):
        events.append((str(manifest["finished"]), str(row["status"])))
    lines = [
        f"<tr><td class='time'>{escape(_clock(time))}</td><td>{escape(text)}</td></tr>"
        for time, text in sorted(events, key=lambda event: _instant(event[0]))
    ]
    return html_table({"time (UTC)": "", "event": ""}, lines)


def _instant(time: str) -> float:
    try:
        return datetime.fromisoformat(time).timestamp()
    except ValueError:
        return 0.0


def _clock(time: str) -> str:
    return time[:19].replace("T", " ")


def _cost(data: RunData) -> list[tuple[str, str]]:
    """What the run took: time, shots, and seconds of a device."""
    row, results = data.row, data.manifest.get("results") or {}
    seconds, cores = row["seconds"], (data.manifest.get("machine") or {}).get("cores")
    facts = [
        ("time", "" if pd.isna(seconds) else f"{seconds:.1f} s" + (f" on {cores} cores" if cores else ""))
    ]
    if len(data.jobs):
        shots = int((data.jobs["rows"] * data.jobs["shots"]).sum())
        facts.append(("shots sent to devices", f"{shots:,}".replace(",", "\N{THIN SPACE}")))
        seconds = f"{digits(data.jobs['seconds'].sum(), 3)} s, charged or else estimated"
        facts.append(("time on quantum processors", seconds))
    for key in ("shots", "planned_quantum_seconds", "charged_quantum_seconds", "tokens_per_second"):
        if isinstance(results.get(key), int | float):
            facts.append((key.replace("_", " "), value_text(results[key])))
    return facts
