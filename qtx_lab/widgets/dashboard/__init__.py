"""The dashboard: all runs of a folder, live, for anyone with a browser; served by Panel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .server import serve

# Panel is loaded when the dashboard is served, not when JupyterLab asks for the launcher's card.
__getattr__, __dir__, _ = lazy_loader.attach(__name__, submod_attrs={"server": ["serve"]})

__all__ = ["serve"]
