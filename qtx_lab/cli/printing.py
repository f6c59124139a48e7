"""What commands print: what they are about to do, a run, and a table."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import click


def announce(text: str) -> None:
    """Say what a command does and how long it may take, before the imports that take longer than a second.

    It goes to stderr, as progress bars do, because scripts read results from stdout.
    """
    click.echo(text, err=True)


def print_run(path: Path, manifest: dict[str, Any]) -> None:
    """Print a run's summary, its status and, last, the path of its report."""
    summary = manifest["results"].get("summary", [])
    for sentence in [summary] if isinstance(summary, str) else summary:
        click.echo(sentence)
    click.echo(f"{manifest['status']} in {manifest['seconds']:.1f} s; report:")
    click.echo(path / "report.html")


def printable(text: str) -> str:
    """A text in one line, without what a terminal would obey, such as escape sequences.

    >>> printable("a name\\nwith \\x1b[2J")
    'a name\\\\nwith \\\\x1b[2J'
    """
    return "".join(x.encode("unicode_escape").decode() if _is_control(x) else x for x in text)


def _is_control(letter: str) -> bool:
    """Whether it is a control, format or surrogate character, or separates lines."""
    kind = unicodedata.category(letter)
    return kind[0] == "C" or kind in ("Zl", "Zp")


def print_columns(names: list[str], rows: list[list[str]]) -> None:
    """Print a table whose columns are as wide as their texts."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())
