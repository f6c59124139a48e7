"""How long the workbench takes to its first picture, and a lens to redraw in a page and beside a kernel, on a
quiet machine.

`pytest tests/widgets/timing_workbench.py -s` prints them, with `-k "page or live"` those of lenses only.
pytest does not collect this file by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import pytest
import torch

from qtx_lab.widgets.views.lens import AttentionLens
from qtx_lab.widgets.views.lens_page import SAMPLERS_IN_PAGES

from .test_lens import CELL, LARGE_CELL

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


STEPS = """async ([sampler, draws, repetitions]) => {
  const lens = document.querySelector(".qtx-lens");
  const menu = lens.querySelector(".qtx-toolbar select");
  const slider = lens.querySelector("input[type=range]");
  const { page } = document.querySelector(".qtx-page");
  const counts = page.get("draw_counts");
  const frame = () => new Promise(requestAnimationFrame);
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  const measured = () => lens.dataset.measured === String(page.get("num_queries"));
  const step = async (draws) => {
    const start = performance.now();
    slider.value = String(counts.indexOf(draws));
    slider.dispatchEvent(new Event("input", { bubbles: true }));
    while (lens.dataset.draws !== String(draws)) await frame();
    await frame(); // it has been painted
    const painted = performance.now() - start;
    while (!measured()) await pause(1);
    return [painted, performance.now() - start];
  };
  menu.value = sampler;
  menu.dispatchEvent(new Event("change", { bubbles: true }));
  while (!lens.querySelector(".qtx-caption").innerText.includes(sampler)) await frame();
  const index = counts.indexOf(draws);
  const times = [];
  for (let i = 0; i < repetitions; i++) {
    // From the number of draws before it, as a slider goes.
    await step(counts[index - 1 - (i % 2)]);
    await pause(50);
    times.push(await step(draws));
    await pause(50);
  }
  return times;
}"""
"""Moves the slider of a page to a number of draws again and again: the milliseconds until they were painted,
and until the error was measured on all rows."""

PAGE_DRAWS = (64, 128, 256, 512)
REPETITIONS = 20
LIVE_GESTURES = 40


def _spread(times: Sequence[float]) -> str:
    return f"p50 {median(times):.0f} ms, p95 {quantiles(times, n=20, method='inclusive')[-1]:.0f} ms"


@pytest.mark.ui
def test_page_of_2048_keys(page: Any, tmp_path: Path) -> None:
    q, k, v = torch.randn(3, 1, 2048, 64, generator=torch.Generator().manual_seed(0))
    path = AttentionLens(q, k, v, is_causal=True).to_html(tmp_path / "lens.html")
    page.goto(path.as_uri())
    page.wait_for_selector(".qtx-lens[data-draws]")
    print("\npage, 2,048 keys: from a movement of the slider to its picture")
    for sampler in SAMPLERS_IN_PAGES:
        every: list[float] = []
        page.evaluate(STEPS, [sampler, 64, 3])  # makes what all draws of the sampler share
        for draws in PAGE_DRAWS:
            renderer = _renderer()
            cpu = _cpu_seconds(renderer)
            steps = page.evaluate(STEPS, [sampler, draws, REPETITIONS])
            mean_cpu = 1000 * (_cpu_seconds(renderer) - cpu) / (2 * REPETITIONS)
            painted = [ms for ms, _ in steps]
            every += painted
            print(
                f"    {sampler}, {draws} draws: {_spread(painted)}; all rows measured: "
                f"p50 {median(ms for _, ms in steps):.0f} ms; CPU of the page {mean_cpu:.0f} ms a step"
            )
        print(f"  {sampler}, all: {_spread(every)}")


LIVE_STEPS = """async ([lens, gestures, pauseMs]) => {
  const slider = lens.querySelector("input[type=range]");
  const frame = () => new Promise(requestAnimationFrame);
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  const last = Number(slider.max);
  const times = [];
  for (let i = 0; i < gestures; i++) {
    const before = lens.dataset.draws;
    const start = performance.now();
    slider.value = String(Math.round(last / 2) + (i % 8 < 4 ? i % 4 : 4 - (i % 4)));
    slider.dispatchEvent(new Event("input", { bubbles: true }));
    slider.dispatchEvent(new Event("change", { bubbles: true }));
    while (lens.dataset.draws === before) await frame();
    await frame(); // it has been painted
    const painted = performance.now() - start;
    if (pauseMs === 0) while (!lens.hasAttribute("data-confirmed")) await pause(2);
    times.push([painted, performance.now() - start]);
    await pause(pauseMs || 100);
  }
  return times;
}"""
"""Moves the slider of a live lens: the milliseconds until its draws were painted and, without pauses between
the movements, until the kernel had confirmed them."""


@pytest.mark.ui
def test_live_lens(
    page: Any, open_notebook: Callable[..., Any], run_all: Callable[..., None],
    run_python: Callable[..., None], tmp_path: Path,
) -> None:  # fmt: skip
    open_notebook(page, [CELL, LARGE_CELL])
    run_all(page)
    page.wait_for_function("() => document.querySelectorAll('.qtx-lens[data-confirmed]').length === 2")
    page.wait_for_selector(".qtx-heads:not([data-stale])")
    pid_file = tmp_path / "pid"
    run_python(page, f"import os, pathlib\npathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))")
    kernel, renderer = psutil.Process(int(pid_file.read_text())), _renderer()
    print("\nlive lens in JupyterLab: from a movement of the slider to its picture")
    for number, keys in enumerate(("512", "65,536")):
        lens = page.locator(".qtx-lens").nth(number)
        lens.scroll_into_view_if_needed()
        page.wait_for_timeout(3000)  # until the strip and the thumbnails are there
        for pause_ms, what in ((150, "one after the other"), (0, "each after the kernel's answer")):
            cpu = _cpu_seconds(kernel), _cpu_seconds(renderer)
            steps = page.evaluate(LIVE_STEPS, [lens.element_handle(), LIVE_GESTURES, pause_ms])
            spent = [
                1000 * (_cpu_seconds(process) - start) / LIVE_GESTURES
                for process, start in zip((kernel, renderer), cpu, strict=True)
            ]
            print(f"    {keys} keys, {what}: {_spread([ms for ms, _ in steps])}", end="")
            if pause_ms == 0:
                print(f"; confirmed: {_spread([ms for _, ms in steps])}", end="")
            print(f"; CPU kernel {spent[0]:.0f} ms, page {spent[1]:.0f} ms a step")
