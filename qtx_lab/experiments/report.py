"""`report.html`: a run as one self-contained page that needs no network, and no script either."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from numbers import Real
from pathlib import Path
from typing import Any

import jinja2

from .. import __version__
from ..errors import StorageError
from ..specs import SPECS, NotebookSpec, Spec, read_yaml
from ..storage import read_frame, write_atomic
from ..theme import COLOURS
from .manifest import spec_values
from .runs import Run
from .saved_figure import compressed, picture_uri, png_size

MAX_BYTES = 3_000_000
"""Size of a page, unless its text and tables alone are larger: many mail servers refuse larger files."""

MIN_PICTURE_BYTES = 20_000
"""What is left for each picture when parts that redraw and data are taken into the page, in base64."""

FIGURE_MARKUP_BYTES = 500
"""What names and links of a figure take in the page, at most, besides its picture, data and caption."""

MAX_CSV_BYTES = 256 << 10
"""Size up to which a figure's data is put into the page."""
MIN_ROW_BYTES = 4
"""A row of a CSV file takes at least this much."""
THIN_SPACE = "\N{NARROW NO-BREAK SPACE}"


def write_report(run: Run, *, stays_open: bool = False) -> Path:
    """Write `report.html` from the content of the run folder, whatever the run's status.

    Parts that are missing or broken are left out of the page, or named in it. A page takes at most 3 MB, so
    that it can be sent: where the pictures of a run are larger, the largest are compressed, and where parts
    that redraw or data do not fit, the page has the pictures alone.

    Parameters
    ----------
    run : Run
        The run.
    stays_open : bool
        Whether the run lasts as long as somebody works in it, as a workbench's does. What it shows is
        complete, so that the page does not say that the run is not finished.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    StorageError
        If the manifest cannot be read, or the page cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from qtx_lab import ExperimentSpec, Run
    >>> with tempfile.TemporaryDirectory() as home:
    ...     with Run.create(ExperimentSpec(), "trial", home) as run:
    ...         run.update(results={"summary": ["Nothing was measured."]})
    ...     write_report(run).name
    'report.html'
    """
    manifest = run.manifest
    results = manifest.get("results") or {}
    summary, table = results.get("summary") or [], results.get("table")
    spec = _spec_fields(run, manifest)
    open_run = stays_open and manifest["status"] == "running"
    figures = [figure for facts in run.figures() if (figure := _figure(run, facts))]
    render = partial(
        _template().render,
        title=manifest.get("title") or manifest["name"],
        manifest={"error": None, "command": None, **manifest},
        started=f"{datetime.fromisoformat(manifest['started']):%-d %B %Y, %H:%M} UTC",
        duration=_duration(manifest.get("seconds")),
        is_whole=open_run or manifest["status"] == "done",
        summary=[str(x) for x in summary] if isinstance(summary, list) else [str(summary)],
        table=_table([row for row in table if isinstance(row, Mapping)] if isinstance(table, list) else []),
        spec=spec.fields,
        spec_missing=spec.problem,
        provenance=_provenance(manifest),
        files=_files(run),
        version=__version__,
        colours={theme: _css(COLOURS[theme]) for theme in ("light", "dark")},
    )
    bare = [{**figure, "light": "", "dark": "", "csv": "", "live": ""} for figure in figures]
    text_bytes = len(render(figures=bare, is_live=False).encode()) + FIGURE_MARKUP_BYTES * len(figures)
    figures = _fitted(figures, MAX_BYTES - text_bytes)
    page = render(figures=figures, is_live=any(figure["live"] for figure in figures))
    path = run.path / "report.html"
    write_atomic(path, page.encode())
    return path


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2")


def _css(colours: Mapping[str, str]) -> str:
    """The colours of a theme as CSS variables."""
    keys = ("background", "text", "muted", "accent", "line", "panel")
    return " ".join(f"--{key}: {colours[key]};" for key in keys)


def _figure(run: Run, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the template shows of a figure, but for its pictures as bytes; None if its picture is missing."""
    folder, name = run.path / "figures", facts["name"]
    light = _bytes(folder / f"{name}.png")
    if light is None:
        return None
    caption, title = str(facts.get("caption") or ""), facts.get("title")
    rows, live = facts.get("rows"), _bytes(folder / f"{name}.html")
    return {
        "name": name,
        "title": title,
        "caption": caption,
        "alt": f"{title}. {caption}" if title else caption or name,
        "light": light,
        "dark": _bytes(folder / f"{name}-dark.png"),
        "size": png_size(light),
        "rows": _text(rows) if isinstance(rows, int) else None,
        "csv": _csv(folder / f"{name}.parquet", rows),
        "live": live and live.decode(errors="replace"),
    }


def _fitted(figures: list[dict[str, Any]], max_bytes: int) -> list[dict[str, Any]]:
    """What the template shows of figures in `max_bytes`: what redraws, data, then pictures."""
    figures = [dict(figure) for figure in figures]
    pictures = [(figure, theme) for figure in figures for theme in ("light", "dark") if figure[theme]]
    free_bytes = max_bytes - MIN_PICTURE_BYTES * len(pictures)
    for part in ("live", "csv"):
        for figure in figures:
            size = len((figure[part] or "").encode())
            if size > free_bytes:
                figure[part] = None
            else:
                free_bytes -= size
    free_bytes += MIN_PICTURE_BYTES * len(pictures)
    sizes = [len(picture_uri(figure[theme])) for figure, theme in pictures]
    limit = max(MIN_PICTURE_BYTES, _largest_share(sizes, free_bytes))
    for figure, theme in pictures:
        figure[theme] = _embedded(figure[theme], limit)
    return [figure for figure in figures if figure["light"]]


def _embedded(png: bytes, max_bytes: int) -> str | None:
    """A picture as an address of at most `max_bytes` that holds it; None if it is too large and broken."""
    try:
        return picture_uri(compressed(png, (max_bytes - len("data:image/webp;base64,")) // 4 * 3))
    except (OSError, SyntaxError, ValueError):  # SyntaxError: of a broken PNG
        return None


def _largest_share(sizes: list[int], total: int) -> int:
    """The limit to each of some sizes with which their sum is at most `total`.

    >>> _largest_share([10, 70, 90], 110), _largest_share([10, 20], 110)
    (50, 110)
    """
    sizes = sorted(sizes)
    for i, size in enumerate(sizes):
        share = total // (len(sizes) - i)
        if size > share:
            return share
        total -= size
    return total + sum(sizes)


def _csv(path: Path, rows: object) -> str | None:
    """A figure's data as a link; None if it is missing, broken or large."""
    if not isinstance(rows, int) or rows > MAX_CSV_BYTES // MIN_ROW_BYTES:
        return None
    try:
        content = read_frame(path).to_csv(index=False).encode()
    except StorageError:
        return None
    if len(content) > MAX_CSV_BYTES:
        return None
    return f"data:text/csv;base64,{base64.b64encode(content).decode()}"


def _bytes(path: Path) -> bytes | None:
    """The content of a file; None if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


@dataclass(frozen=True)
class _SpecFields:
    """The name, value and help of each field of a spec, and why there are none if they cannot be read."""

    fields: list[dict[str, str]]
    problem: str = ""


def _spec_fields(run: Run, manifest: Mapping[str, Any]) -> _SpecFields:
    try:
        content = read_yaml((run.path / "spec.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return _SpecFields([], "spec.yaml cannot be read")
    if not isinstance(content, dict):
        return _SpecFields([], "spec.yaml holds no fields")
    name = (manifest.get("spec") or {}).get("kind")
    kind = next((spec for spec in SPECS.values() if spec.__name__ == name), Spec)
    helps = {field: info.description or "" for field, info in kind.model_fields.items()}
    if kind is NotebookSpec:
        content, helps["parameters"] = spec_values({"fields": content}), ""
    fields = [
        {"name": str(field), "value": _text(value), "help": helps.get(field, "")}
        for field, value in content.items()
    ]
    return _SpecFields(fields)


def _table(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns and the texts of a table of results."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    numeric = [all(_is_number(row[name]) for row in rows if row.get(name) is not None) for name in names]
    return {
        "columns": [
            {"name": name, "numeric": is_number} for name, is_number in zip(names, numeric, strict=True)
        ],
        "rows": [[_text(row.get(name)) for name in names] for row in rows],
    }


def _is_number(value: object) -> bool:
    """Whether a value is a number, or a text that begins with one, such as '0.083 ± 0.004'."""
    if isinstance(value, str):
        return value.lstrip("+-\N{MINUS SIGN}")[:1].isdigit()
    return isinstance(value, Real) and not isinstance(value, bool)


def _text(value: object) -> str:
    """A value as the page shows it."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", THIN_SPACE) if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:z.4g}"  # never -0
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return str(value)


def _duration(seconds: object) -> str:
    """Seconds in words, such as "2 min 5 s"; "" if they are not known."""
    if not isinstance(seconds, int | float):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _provenance(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and texts of what is known about the run's origin."""
    versions, machine, git, devices = (
        manifest.get(key) or {} for key in ("versions", "machine", "git", "devices")
    )
    processor = [
        machine.get("cpu"),
        f"{machine['cores']} cores" if machine.get("cores") else None,
        f"{machine['memory_gib']} GiB memory" if machine.get("memory_gib") else None,
    ]
    facts = {
        "Status": manifest["status"],
        "Seed": str(manifest["seed"]) if manifest.get("seed") is not None else "",
        "Spec": (manifest.get("spec") or {}).get("identity", ""),
        "Commit": str(git.get("commit") or "") + (", with changes not committed" if git.get("dirty") else ""),
        "Devices": ", ".join(
            f"{name}, calibrated {time[:16].replace('T', ' ')}" if isinstance(time, str) else str(name)
            for name, time in devices.items()
        ),
        "Sweep": (manifest.get("sweep") or {}).get("name", ""),
        "Processor": ", ".join(part for part in processor if part),
        "System": machine.get("platform", ""),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Duration": _duration(manifest.get("seconds")),
    }
    return [(name, text) for name, text in facts.items() if text]


def _files(run: Run) -> list[str]:
    """Names of the files that the page links to."""
    notebooks = sorted(path.name for path in run.path.glob("*.ipynb"))
    others = [
        name for name in ("metrics.parquet", "spec.yaml", "manifest.json") if (run.path / name).exists()
    ]
    return notebooks + others
