"""How long the workbench takes to its first picture, and a lens in a page to redraw, on a quiet machine.

`pytest tests/widgets/timing_workbench.py -s` prints them; pytest does not collect this file by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import pytest
import torch

from qtx_lab.widgets.views.lens import AttentionLens
from qtx_lab.widgets.views.lens_page import SAMPLERS_IN_PAGES

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
    tmp_path: Path,
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


STEPS = """async (sampler) => {
  const lens = document.querySelector(".qtx-lens");
  const menu = lens.querySelector(".qtx-toolbar select");
  const slider = lens.querySelector("input[type=range]");
  const counts = document.querySelector(".qtx-page").page.get("draw_counts");
  const frame = () => new Promise(requestAnimationFrame);
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  const times = [];
  const step = async (draws) => {
    const start = performance.now();
    slider.value = String(counts.indexOf(draws));
    slider.dispatchEvent(new Event("input", { bubbles: true }));
    while (lens.dataset.draws !== String(draws)) await frame();
    await frame(); // it has been painted
    return performance.now() - start;
  };
  menu.value = sampler;
  menu.dispatchEvent(new Event("change", { bubbles: true }));
  while (!lens.querySelector(".qtx-caption").innerText.includes(sampler)) await frame();
  await pause(500);
  await step(counts.find((draws) => draws >= 13));
  for (const draws of counts.filter((draws) => draws >= 16 && draws <= 512)) {
    await pause(50);
    times.push([draws, await step(draws)]);
  }
  return times;
}"""
"""Moves the slider of a page from 16 to 512 draws a row: the milliseconds until each was painted."""


@pytest.mark.ui
def test_page_of_2048_keys(page: Any, tmp_path: Path) -> None:
    q, k, v = torch.randn(3, 1, 2048, 64, generator=torch.Generator().manual_seed(0))
    path = AttentionLens(q, k, v, is_causal=True).to_html(tmp_path / "lens.html")
    page.goto(path.as_uri())
    page.wait_for_selector(".qtx-lens[data-draws]")
    for sampler in SAMPLERS_IN_PAGES:
        renderer = _renderer()
        cpu = _cpu_seconds(renderer)
        steps = page.evaluate(STEPS, sampler)
        mean_cpu = 1000 * (_cpu_seconds(renderer) - cpu) / len(steps)
        times = [ms for _, ms in steps]
        tail = quantiles(times, n=20)[-1]
        print(f"\npage, 2,048 keys, {sampler}: p50 {median(times):.0f} ms, p95 {tail:.0f} ms a step")
        print(f"    CPU {mean_cpu:.0f} ms a step, with the pauses between them")
        print("    by draws a row: " + ", ".join(f"{draws}: {ms:.0f}" for draws, ms in steps))
