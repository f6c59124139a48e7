"""Writes `src/theme.ts`, the twin of `qtx_lab/theme.py`: run it after that file has changed."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np

from qtx_lab import theme

TARGET = Path(__file__).parent / "src" / "theme.ts"


def colour_map(name: str) -> str:
    """256 colours of a map of matplotlib, as base64 of RGB bytes."""
    colours = mpl.colormaps[name](np.arange(256) / 255)[:, :3]
    return base64.b64encode((colours * 255).round().astype(np.uint8).tobytes()).decode()


def source() -> str:
    """The text of `theme.ts`."""
    tables = {
        "COLOURS": theme.COLOURS,
        "SAMPLER_COLOURS": theme.SAMPLER_COLOURS,
        "SEQUENTIAL": colour_map(theme.SEQUENTIAL),
        "DIVERGING": colour_map(theme.DIVERGING),
    }
    lines = [
        f"export const {name} = {json.dumps(table, indent=2)} as const;" for name, table in tables.items()
    ]
    head = "// The tables of qtx_lab/theme.py. Written by widgets/theme.py; not edited by hand."
    return "\n\n".join([head, *lines]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(source(), encoding="utf-8")
