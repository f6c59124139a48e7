"""A figure in both themes as notebooks show it, with its caption."""

from __future__ import annotations

import base64
import html
import io
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PIXEL_RATIO = 1.5
"""Pixels of a picture for each CSS pixel: it has 144 dpi, a page 96."""

COLOURS_IN_PICTURE = 256
"""Colours of a PNG's palette: it is a third as large as with all colours."""

WEBP_QUALITY = 80
"""Of 100: maps of random numbers then take a quarter of what PNG takes, and look the same."""

STYLE = """
.qtx-figure { max-width: 100%; }
.qtx-figure p { max-width: 56rem; margin: 0.3rem 0 0; opacity: 0.8; }
:is([data-jp-theme-light="false"], .vscode-dark, .vscode-high-contrast, html[theme="dark"]) .qtx-figure
  img { display: none !important; }
:is([data-jp-theme-light="false"], .vscode-dark, .vscode-high-contrast, html[theme="dark"]) .qtx-figure
  img.qtx-dark { display: block !important; }
"""
"""Where a notebook's theme is dark, the dark picture is shown: in JupyterLab, VS Code and Colab."""


@dataclass(frozen=True)
class SavedFigure:
    """A figure that was saved in a run: what a cell shows that ends in it.

    Parameters
    ----------
    light, dark : bytes
        The PNG files of both themes.
    caption : str
    """

    light: bytes = field(repr=False)  # a notebook keeps the repr too
    dark: bytes = field(repr=False)
    caption: str

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
        """HTML that follows the notebook's theme, and the light picture for viewers that show no HTML."""
        light, dark = (base64.b64encode(png).decode() for png in (self.light, self.dark))
        size = png_size(self.light)
        width, height = size or (0, 0)
        attributes = f'alt="{html.escape(self.caption)}"' + (
            f' width="{width}" height="{height}"' if size else ""
        )
        page = (
            f'<div class="qtx-figure"><style>{STYLE}</style>'
            f'<img {attributes} src="data:image/png;base64,{light}">'
            f'<img class="qtx-dark" style="display: none" {attributes} src="data:image/png;base64,{dark}">'
            f"<p>{html.escape(self.caption)}</p></div>"
        )
        metadata = {"image/png": {"width": width, "height": height}} if size else {}
        return {"text/html": page, "image/png": light}, metadata


def png_size(png: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG in CSS pixels; None if it is none."""
    if len(png) < 24 or not png.startswith(b"\x89PNG"):
        return None
    width, height = struct.unpack(">II", png[16:24])
    return round(width / PIXEL_RATIO), round(height / PIXEL_RATIO)


def with_palette(png: bytes) -> bytes:
    """The same picture with a palette of its most frequent colours."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    content = io.BytesIO()
    few = picture.quantize(COLOURS_IN_PICTURE, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(content, "png", optimize=True)
    return content.getvalue()


def compressed(png: bytes, max_bytes: int) -> bytes:
    """The same picture in a file of at most `max_bytes`, as finely as that allows.

    It is the PNG itself, the PNG with a palette, or WebP with half as many pixels at each next step.
    """
    from PIL import Image

    if len(png) <= max_bytes:
        return png
    few = with_palette(png)
    if len(few) <= max_bytes:
        return few
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    size = picture.size
    width, height = map(float, size)
    while True:
        content = io.BytesIO()
        picture.resize(size, Image.Resampling.LANCZOS).save(content, "webp", quality=WEBP_QUALITY)
        if content.tell() <= max_bytes or size == (1, 1):
            return content.getvalue()
        width, height = width / 2**0.5, height / 2**0.5
        size = max(1, round(width)), max(1, round(height))


def picture_uri(content: bytes) -> str:
    """A PNG or WebP picture as an address that holds it."""
    kind = "png" if content.startswith(b"\x89PNG") else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def rendered(figure: Figure, kind: str) -> bytes:
    """A figure as the content of a file of kind "png" or "svg"."""
    content = io.BytesIO()
    # No dates and versions, so that equal figures are equal files.
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    figure.savefig(content, format=kind, dpi=144, metadata=metadata, facecolor=figure.get_facecolor())
    return content.getvalue()
