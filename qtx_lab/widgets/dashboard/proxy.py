"""The dashboard's card in JupyterLab's launcher: what jupyter-server-proxy starts and shows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

NAME = "qtx-lab"
"""The path under Jupyter's address: the entry point in pyproject.toml has the same name."""


def dashboard() -> dict[str, Any]:
    """The entry of `jupyter_serverproxy_servers`.

    The dashboard listens on a Unix socket in a folder of the user's own, so that only Jupyter's own login
    leads to it, also on a machine with other users. It shows `$QTX_LAB_HOME`, else `runs` where Jupyter was
    started.
    """
    location = ["--socket", "{unix_socket}", "--prefix", "{base_url}" + NAME]
    return {
        "command": [sys.executable, "-m", "qtx_lab.cli", "dashboard", *location],
        "unix_socket": True,
        "absolute_url": True,
        "timeout": 60,
        "new_browser_tab": True,
        "launcher_entry": {
            "title": "qtx_lab dashboard",
            "icon_path": str(Path(__file__).with_name("icon.svg")),
            "category": "Notebook",  # JupyterLab shows icons of their own only there and under "Console"
        },
    }
