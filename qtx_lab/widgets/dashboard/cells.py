"""How far the notebook of a run is: its cells, as papermill writes them into the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A code cell of an executed notebook.

    Parameters
    ----------
    number : int
        Its place among the code cells, from 1.
    first_line : str
        The first line of its source that is no comment.
    status : str
        "pending", "running", "completed" or "failed".
    started : str
        ISO time; "" where it has not begun.
    seconds : float
        How long it took; NaN while it is not known.
    """

    number: int
    first_line: str
    status: str
    started: str
    seconds: float


def read_cells(path: Path) -> tuple[Cell, ...] | None:
    """The code cells of an executed notebook; None where the file cannot be read as one."""
    try:
        cells = json.loads(path.read_bytes())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        return tuple(_cell(number, cell) for number, cell in enumerate(code, 1))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _cell(number: int, cell: Mapping[str, Any]) -> Cell:
    facts = cell.get("metadata", {}).get("papermill", {})
    source = cell.get("source", "")
    lines = (source if isinstance(source, str) else "".join(source)).splitlines()
    code = [line.strip() for line in lines if line.strip() and not line.strip().startswith(("#", "%"))]
    duration, started = facts.get("duration"), facts.get("start_time")
    return Cell(
        number,
        (code or [""])[0][:80],
        str(facts.get("status") or "pending"),
        started if isinstance(started, str) else "",
        float(duration) if isinstance(duration, int | float) else float("nan"),
    )


def seconds_since(started: str, now: datetime) -> float:
    """Seconds from an ISO time to now; NaN where the text is none."""
    try:
        return (now - datetime.fromisoformat(started)).total_seconds()
    except (ValueError, TypeError):
        return float("nan")
