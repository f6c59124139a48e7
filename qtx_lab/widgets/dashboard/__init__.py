"""The dashboard: all runs of a folder, live, for anyone with a browser; served by Panel, read only."""

from __future__ import annotations

from .server import serve

__all__ = ["serve"]
