"""How long the workbench takes to its first picture: numbers for people, on a quiet machine.

`pytest tests/widgets/timing_workbench.py -s` prints them; pytest does not collect this file by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

CELLS = {
    "first picture, with all imports": ("import qtx_lab as qtx\nwb = qtx.Workbench()\nwb", "pass"),
    "first picture, qtx_lab imported": ("wb = qtx.Workbench()\nwb", "import qtx_lab as qtx"),
    "restored": ("wb = qtx.Workbench.restore()\nwb", "import qtx_lab as qtx"),
    "restored once more in this kernel": (
        "wb = qtx.Workbench.restore()\nwb",
        "import qtx_lab as qtx\nqtx.Workbench.restore().close()",
    ),
}
"""The cell that is timed, and what ran in its kernel before."""


@pytest.mark.ui
def test_first_picture(
    page: Any, open_notebook: Callable[..., Any], run_all: Callable[..., None],
    run_python: Callable[..., None],
) -> None:  # fmt: skip
    for what, (cell, before) in CELLS.items():
        open_notebook(page, [cell])
        run_python(page, before)
        started = time.perf_counter()
        run_all(page, wait=False)
        page.wait_for_selector(".qtx-lens[data-confirmed]")
        print(f"{what}: {time.perf_counter() - started:.2f} s")
        run_python(page, "wb.sample.start().wait()\nwb.close()")
