"""Files of runs that the server gives out: reports and executed notebooks, and nothing else of the disk."""

from __future__ import annotations

from pathlib import Path


def read_report(home: Path, name: str) -> bytes | None:
    """The report of the run in the folder `name` of `home`; None where there is none inside `home`."""
    if not is_folder_name(name):
        return None
    path = home / name / "report.html"
    try:
        return path.read_bytes() if path.resolve().is_relative_to(home.resolve()) else None
    except (OSError, ValueError):
        return None


def find_notebook(home: Path, name: str) -> Path | None:
    """The notebook in the folder `name` of `home`, the newest of several; None where there is none inside."""
    if not is_folder_name(name):
        return None
    try:
        inside = [
            path
            for path in (home / name).glob("[!.]*.ipynb")
            if path.resolve().is_relative_to(home.resolve())
        ]
        return max(inside, key=lambda path: path.stat().st_mtime, default=None)
    except (OSError, ValueError):
        return None


def is_folder_name(name: str) -> bool:
    """Whether a text can be the name of a run's folder, and no path that leads elsewhere."""
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\\0")
