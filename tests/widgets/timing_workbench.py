"""How long the workbench takes to its first picture: numbers for people, on a quiet machine.

`pytest tests/widgets/timing_workbench.py -s` prints them; pytest does not collect this file by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import pytest

START = "import qtx_lab as qtx\n"
MAKE, RESTORE = "wb = qtx.Workbench()\nwb", "wb = qtx.Workbench.restore()\nwb"
CASES = {
    "first picture, new kernel": (START + MAKE, "pass"),
    "first picture, second workbench of a kernel": (MAKE, f"{START}qtx.Workbench().close()"),
    "restored, new kernel": (START + RESTORE, "pass"),
    "restored, kernel that had one before": (RESTORE, f"{START}qtx.Workbench.restore().close()"),
}
"""The cell that is timed, and what ran in its kernel before."""

CLOCK = """() => {
  const times = (window.qtxTimes = {});
  const start = performance.now();
  const note = (name) => (times[name] ??= (performance.now() - start) / 1000);
  const look = () => {
    if (document.querySelector(".qtx-workbench")) note("frame");
    if (document.querySelector(".qtx-lens")) note("lens");
    // Two frames later what the kernel confirmed has been painted.
    if (document.querySelector(".qtx-lens[data-confirmed]"))
      requestAnimationFrame(() => requestAnimationFrame(() => note("picture")));
    else setTimeout(look, 5);
  };
  look();
  window.jupyterapp.commands.execute("notebook:run-all-cells").then(() => note("cell"));
}"""
"""Runs the notebook, and notes when its cell had run, and when what was there to be seen."""


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _renderer() -> psutil.Process:
    """The process of Chromium that draws the page: the one that has worked most."""
    children = psutil.Process().children(recursive=True)
    renderers = [child for child in children if "--type=renderer" in child.cmdline()]
    return max(renderers, key=_cpu_seconds)


@pytest.mark.ui
@pytest.mark.parametrize("what", CASES)
def test_first_picture(
    page: Any, open_notebook: Callable[..., Any], run_python: Callable[..., None], what: str,
    tmp_path: Any,
) -> None:  # fmt: skip
    cell, before = CASES[what]
    for _ in range(2):  # the second time shows how much the first one varies
        open_notebook(page, [cell])
        pid_file = tmp_path / "pid"
        run_python(
            page,
            f"{before}\nimport os, pathlib\npathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))",
        )
        page.wait_for_timeout(1500)
        kernel, renderer = psutil.Process(int(pid_file.read_text())), _renderer()
        cpu = _cpu_seconds(kernel), _cpu_seconds(renderer)
        page.evaluate(CLOCK)
        page.wait_for_function("() => window.qtxTimes.picture && window.qtxTimes.cell")
        times = page.evaluate("() => window.qtxTimes")
        spent = _cpu_seconds(kernel) - cpu[0], _cpu_seconds(renderer) - cpu[1]
        print(
            f"\n{what}: {times['picture']:.2f} s after the cell began, "
            f"{times['picture'] - times['cell']:.2f} s after it had run (frame {times['frame']:.2f}, "
            f"cell {times['cell']:.2f}, lens {times['lens']:.2f}); CPU kernel {spent[0]:.2f} s, "
            f"page {spent[1]:.2f} s"
        )
        run_python(page, "wb.sample.start().wait()\nwb.close()")
