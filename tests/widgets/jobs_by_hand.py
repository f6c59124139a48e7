"""Ten jobs that people open the workbench for, done in a browser by visible labels, their clicks counted.

`pytest tests/widgets/jobs_by_hand.py -s` prints a table of the jobs, in minutes; pytest does not collect this
file by itself. The first two jobs look at SmolLM2-135M, which is fetched where the machine does not have it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Error as BrowserError

WAIT_MS = 400_000
"""How long a job may take on a busy machine."""

FORESEEN = {
    "compare two samplers on SmolLM2's layer 15": 3,
    "find the head that minds sampling most": 2,
    "send a row to the twin of a current device": 4,
    "see whether mitigation helps": 2,
    "sweep two samplers and compare": 5,
    "resume a sweep that was cancelled": 2,
    "hand a colleague a report that redraws": 2,
    "the same numbers in a script": 3,
    "my own q, k, v": 1,
    "go on after the kernel was restarted": 1,
}
"""The jobs, and the clicks that were foreseen before the workbench was seen; a filled field counts as one."""

OWN = """import torch
q, k, v = torch.randn(3, 2, 4, 96, 16, generator=torch.Generator().manual_seed(0))
own = qtx.Workbench(q, k, v)
own"""


@dataclass
class Person:
    """Somebody at the workbench, who sees labels, and whose clicks are counted."""

    page: Any
    clicks: int = 0
    table: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def tab(self) -> Any:
        """What is seen of the open tab."""
        return self.page.locator(".qtx-wb-page:visible").last

    def click(self, what: Any) -> None:
        """Click something."""
        self.clicks += 1
        what.click()

    def press(self, name: str) -> None:
        """Press a button of the open tab."""
        self.click(self.tab.get_by_role("button", name=name, exact=True))

    def open(self, name: str) -> None:
        """Open a tab."""
        self.click(self.page.get_by_role("tab", name=name, exact=True).last)

    def fill(self, label: str, text: str) -> None:
        """Fill in a field."""
        self.clicks += 1
        box = self.page.get_by_label(label, exact=True).and_(self.page.locator("input:visible")).first
        box.fill(text)
        box.press("Enter")

    def wait(self, text: str | re.Pattern[str], where: Any = None) -> Any:
        """Wait until something is to be read."""
        shown = (where or self.tab).get_by_text(text).first
        shown.wait_for(timeout=WAIT_MS)
        return shown

    def do(self, job: str, act: Callable[[], None]) -> None:
        """Do a job; what stops it is written into the table, and the next one begins."""
        self.clicks = 0
        try:
            act()
            self.table[job] = (self.clicks, "done")
        except (BrowserError, AssertionError) as error:
            self.table[job] = (self.clicks, f"stopped: {str(error).splitlines()[0]}")
        print(f"{job}: {self.table[job]}", flush=True)


@pytest.mark.ui
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("size", "theme"), [((1280, 800), "light"), ((1920, 1080), "dark")])
def test_ten_jobs(
    page: Any, browser: Any, open_notebook: Callable[..., Any], run_all: Callable[..., None],
    set_theme: Callable[..., None], shoot: Callable[..., Path], size: tuple[int, int], theme: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.set_viewport_size({"width": size[0], "height": size[1]})
    open_notebook(page, ["import qtx_lab as qtx\nwb = qtx.Workbench()\nwb"])
    set_theme(page, theme)
    run_all(page)
    page.locator(".qtx-lens[data-confirmed]").wait_for(timeout=WAIT_MS)
    person, jobs = Person(page), list(FORESEEN)

    def compare_samplers() -> None:
        person.fill("model", "smollm2-135m")
        person.fill("layer", "15")
        person.press("Draw")
        person.wait(re.compile("^Layer 15, head 0: off by"))
        chart = person.tab.get_by_role("img", name=re.compile(r"against the number of draws")).first
        person.tab.locator(".qtx-strip-place").scroll_into_view_if_needed()  # is measured once in sight
        person.wait(re.compile(r"repetitions on [^S]*\.$"))  # nothing is still to come
        spoken = chart.get_attribute("aria-label")
        assert "systematic" in spoken, spoken
        assert "head-tail" in spoken, spoken

    def find_head() -> None:
        person.clicks += 1
        person.tab.get_by_label("sorted").select_option("by variance")
        grid = person.tab.get_by_role("radiogroup", name="layer and head")
        grid.locator("xpath=self::*[not(@data-stale)]").wait_for(timeout=WAIT_MS)
        first = grid.get_by_role("radio").first
        place = first.get_attribute("aria-label").partition(", relative")[0].capitalize()
        person.click(first)
        person.wait(re.compile(f"^{place}: off by"))

    def send_row() -> None:
        canvas = person.tab.get_by_role("application", name=re.compile("systematic.*queries by")).first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        person.clicks += 1
        page.mouse.move(box["x"] + 200, box["y"] + 60)
        page.mouse.down()
        page.mouse.up()
        row = person.wait("1 row selected")
        assert row.is_visible()
        person.open("Circuit")
        person.fill("device", "fake_fez")
        person.press("Measure rows")
        person.wait(re.compile("^Query .* on fake_fez: fidelity"))
        assert person.tab.locator("tbody tr").count() == 1

    def mitigate() -> None:
        person.open("Mitigate")
        person.press("Mitigate rows")
        person.wait(re.compile("^(Mitigation h|No difference that|Nothing was mitigated|No row could)"))

    def sweep() -> None:
        person.open("Sweep")
        person.press("Sweep")
        person.wait(re.compile("^[1-3] of 4 notebooks are done"))

    def resume() -> None:
        person.press("Cancel")
        person.wait("are done and kept")
        person.press("Sweep")
        person.wait(re.compile("^Error is smallest at sampler"))
        person.wait("had been run before")

    def report() -> None:
        with page.expect_download(timeout=WAIT_MS) as downloaded:
            person.press("Report")
        path = tmp_path / "report.html"
        downloaded.value.save_as(path)
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, offline=True)
        colleague = context.new_page()
        colleague.goto(path.as_uri())
        slider = colleague.get_by_role("slider", name="draws per row")
        heading = colleague.get_by_role("heading", name=re.compile("^Layer .*: off by")).first
        before = heading.inner_text()
        person.clicks += 1
        slider.press("ArrowLeft")
        changed = colleague.get_by_role("heading", name=re.compile("^Layer .*: off by")).first
        colleague.wait_for_timeout(3000)
        shoot(colleague, f"job-report-{size[0]}-{theme}")
        assert changed.inner_text() != before
        context.close()

    def script() -> None:
        shown = person.tab.get_by_role("heading", name=re.compile("off by")).first.inner_text()
        person.press("Copy as Python")
        page.wait_for_timeout(1500)
        page.evaluate("""async () => {
          const { commands, shell } = window.jupyterapp;
          await commands.execute("notebook:move-cursor-down");
          await commands.execute("notebook:insert-cell-below");
          await commands.execute("notebook:enter-edit-mode");
        }""")
        person.clicks += 1
        page.keyboard.press("Control+V")
        person.clicks += 1
        page.keyboard.press("Shift+Enter")
        share = re.search(r"off by ([\d.]+) %", shown)[1]
        printed = page.locator(".jp-OutputArea-output").filter(has_text=re.compile(r": off by [\d.]+%")).last
        printed.wait_for(timeout=WAIT_MS)
        number = re.search(r"off by ([\d.]+)%", printed.inner_text())[1]
        assert float(f"{float(number):.2g}") == float(share), (number, share)

    def run_in_new_cell(code: str) -> None:
        page.evaluate(
            """async (code) => {
              const { commands, shell } = window.jupyterapp;
              const notebook = shell.currentWidget.content;
              notebook.activeCellIndex = notebook.widgets.length - 1;
              await commands.execute("notebook:insert-cell-below");
              notebook.activeCell.model.sharedModel.setSource(code);
              await commands.execute("notebook:run-cell");
            }""",
            code,
        )

    def own_inputs() -> None:
        person.clicks += 1
        run_in_new_cell(OWN)
        lens = page.locator(".qtx-lens[data-confirmed]").last
        lens.wait_for(timeout=WAIT_MS)
        person.wait(re.compile("^Layer 1, head 0: off by"))
        assert not page.get_by_label("model", exact=True).last.is_visible()

    def go_on() -> None:
        kernel = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"
        page.evaluate(f"async () => {kernel}.restart()")
        page.wait_for_function(
            f"() => {kernel}.connectionStatus === 'connected' && {kernel}.status === 'idle'"
        )
        person.clicks += 1
        run_in_new_cell("import qtx_lab as qtx\nwb = qtx.Workbench.restore()\nwb")
        person.wait(re.compile("^Layer 1, head 0: off by"))

    person.do(jobs[0], compare_samplers)
    person.do(jobs[1], find_head)
    shoot(page, f"job-find-head-{size[0]}-{theme}")
    person.do(jobs[2], send_row)
    shoot(page, f"job-circuit-{size[0]}-{theme}")
    person.do(jobs[3], mitigate)
    shoot(page, f"job-mitigate-{size[0]}-{theme}")
    person.do(jobs[4], sweep)
    person.do(jobs[5], resume)
    shoot(page, f"job-sweep-{size[0]}-{theme}")
    person.open("Sample")
    person.do(jobs[6], report)
    person.do(jobs[7], script)
    person.do(jobs[8], own_inputs)
    person.do(jobs[9], go_on)
    shoot(page, f"job-restored-{size[0]}-{theme}")

    print(f"\n{size[0]} × {size[1]}, {theme}\n{'job':<46}{'foreseen':>9}{'used':>6}  result")
    for job, (clicks, result) in person.table.items():
        print(f"{job:<46}{FORESEEN[job]:>9}{clicks:>6}  {result}")
    assert all(result == "done" for _, result in person.table.values())
    assert all(clicks <= FORESEEN[job] for job, (clicks, _) in person.table.items())
