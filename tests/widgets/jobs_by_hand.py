"""Ten jobs that people open the workbench for, done in a browser by visible labels, their clicks counted.

`pytest tests/widgets/jobs_by_hand.py -s` prints a table of the jobs, in minutes; `-k "resume and 1280"` does
one of them. Pytest does not collect this file by itself. The first job looks at SmolLM2-135M, which is
fetched where the machine does not have it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

WAIT_MS = 400_000
"""How long a step of a job may take on a busy machine."""

START = "import qtx_lab as qtx\nwb = qtx.Workbench()\nwb"

OWN = """import torch
q, k, v = torch.randn(3, 2, 4, 96, 16, generator=torch.Generator().manual_seed(0))
own = qtx.Workbench(q, k, v)
own"""

RESTORE = "import qtx_lab as qtx\nwb = qtx.Workbench.restore()\nwb"

KERNEL = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"

HEADLINE = re.compile(r"^Layer \d+, head \d+: off by")

pytestmark = [pytest.mark.ui, pytest.mark.timeout(2400)]


@dataclass
class Person:
    """Somebody at the workbench, who sees labels, and whose clicks are counted."""

    page: Any
    size: tuple[int, int]
    theme: str
    shoot: Callable[..., Path]
    notebook: Path | None = None
    clicks: int = 0
    table: list[str] = field(default_factory=list)

    @property
    def tab(self) -> Any:
        """What is seen of the open tab."""
        return self.page.locator(".qtx-wb-page:visible").last

    @property
    def headline(self) -> str:
        """What the lens of the open tab says."""
        return str(self.tab.get_by_role("heading", name=HEADLINE).first.inner_text())

    def click(self, what: Any) -> None:
        """Click something."""
        self.clicks += 1
        what.click()

    def press(self, name: str) -> None:
        """Press a button of the open tab, once it can be pressed."""
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

    def run_in_new_cell(self, code: str) -> None:
        """Type code into a new cell at the end, and run it."""
        self.clicks += 1
        self.page.evaluate(
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

    @contextmanager
    def job(self, name: str, foreseen: int) -> Iterator[None]:
        """Count the clicks of a job; what it needs beforehand is done before this, and is not counted."""
        self.clicks, result = 0, "stopped"
        try:
            yield
            result = "done" if self.clicks <= foreseen else "too many clicks"
        finally:
            size = f"{self.size[0]} × {self.size[1]}, {self.theme}"
            self.table.append(f"{size:<21}{name:<46}{foreseen:>9}{self.clicks:>6}  {result}")
            print(self.table[-1], flush=True)
            self.shoot(self.page, f"job-{name.replace(' ', '-')}-{self.size[0]}-{self.theme}")
        assert result == "done"


@pytest.fixture(
    scope="module",
    params=[((1280, 800), "light"), ((1920, 1080), "dark")],
    ids=["1280-light", "1920-dark"],
)
def seat(request: pytest.FixtureRequest, module_page: Any) -> Iterator[Person]:
    """A browser of this size, in which there is no notebook yet; its jobs are printed at the end."""
    (width, height), theme = request.param
    module_page.set_viewport_size({"width": width, "height": height})
    module_page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    module_page.set_default_timeout(WAIT_MS)
    person = Person(module_page, (width, height), theme, lambda *_: Path())
    yield person
    print(f"\n{'':<21}{'job':<46}{'foreseen':>9}{'used':>6}  result", *person.table, sep="\n")


@pytest.fixture
def person(
    seat: Person, open_notebook: Callable[..., Path], run_all: Callable[..., None],
    set_theme: Callable[..., None], shoot: Callable[..., Path],
) -> Person:  # fmt: skip
    """Somebody who has a workbench, with its first picture, in the notebook that the jobs share."""
    seat.shoot = shoot
    if seat.notebook is None:
        seat.notebook = open_notebook(seat.page, [START])
        set_theme(seat.page, seat.theme)
        run_all(seat.page)
        seat.page.locator(".qtx-lens[data-confirmed]").wait_for()
    return seat


def test_compare_samplers(person: Person) -> None:
    with person.job("compare two samplers on SmolLM2's layer 15", 3):
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


def test_find_head(person: Person) -> None:
    person.open("Sample")
    with person.job("find the head that minds sampling most", 2):
        person.clicks += 1
        person.tab.get_by_label("sorted").select_option("by variance")
        grid = person.tab.get_by_role("radiogroup", name="layer and head")
        grid.locator("xpath=self::*[not(@data-stale)]").wait_for()
        first = grid.get_by_role("radio").first
        place = first.get_attribute("aria-label").partition(", relative")[0].capitalize()
        person.click(first)
        person.wait(re.compile(f"^{place}: off by"))


def test_send_row(person: Person) -> None:
    person.open("Sample")
    with person.job("send a row to the twin of a current device", 4):
        canvas = person.tab.get_by_role("application", name=re.compile("systematic.*queries by")).first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        person.clicks += 1
        person.page.mouse.move(box["x"] + 200, box["y"] + 60)
        person.page.mouse.down()
        person.page.mouse.up()
        assert person.wait("1 row selected").is_visible()
        person.open("Circuit")
        person.fill("device", "fake_fez")
        person.press("Measure rows")
        person.wait(re.compile("^Query .* on fake_fez: fidelity"))
        person.wait(re.compile("^done in"))
        assert person.tab.locator("tbody tr").count() == 1


def test_mitigate(person: Person) -> None:
    with person.job("see whether mitigation helps", 2):
        person.open("Mitigate")
        person.press("Mitigate rows")
        person.wait(re.compile("^(Mitigation h|No difference that|Nothing was mitigated|No row could)"))


def test_sweep(person: Person) -> None:
    with person.job("sweep two samplers and compare", 5):
        person.open("Sweep")
        person.press("Sweep")
        person.wait(re.compile("^Error is smallest at sampler"))
        person.wait("4 of 4 notebooks are done; the sweep is done")
        person.tab.get_by_role("region", name="What was measured").scroll_into_view_if_needed()


def test_resume(person: Person) -> None:
    person.open("Sweep")
    person.tab.get_by_text("grid", exact=True).first.click()
    windows = person.tab.get_by_label(re.compile("^parameters 2: "))
    assert windows.first.input_value() == "num_windows"
    windows.last.fill(str(person.size[0] // 640 + 1))  # of notebooks that were never run
    windows.last.press("Enter")
    person.press("Sweep")
    person.wait(re.compile("^[1-3] of 4 notebooks are done|^[1-3] of 4 notebooks have ended"))
    with person.job("resume a sweep that was cancelled", 2):
        person.press("Cancel")
        kept = person.wait(re.compile(r"\d of 4 notebooks are done and kept")).inner_text()
        count = re.search(r"(\d) of 4", kept)[1]
        person.press("Sweep")
        person.wait("4 of 4 notebooks are done; the sweep is done")
        taken = person.wait(re.compile(r"\d of them had been run before")).inner_text()
        assert int(re.search(r"(\d) of them", taken)[1]) >= int(count)  # more may have ended meanwhile


def test_report(person: Person, page: Any, tmp_path: Path) -> None:
    person.open("Sample")
    width, height = person.size
    page.set_viewport_size({"width": width, "height": height})  # the colleague's
    page.emulate_media(color_scheme=person.theme)
    page.context.set_offline(True)
    with person.job("hand a colleague a report that redraws", 2):
        with person.page.expect_download() as downloaded:
            person.press("Report")
        path = tmp_path / "report.html"
        downloaded.value.save_as(path)
        page.goto(path.as_uri())
        heading = page.get_by_role("heading", name=HEADLINE).first
        before = heading.inner_text()
        person.click(page.get_by_role("slider", name="draws per row"))
        page.wait_for_function(
            "([old]) => ![...document.querySelectorAll('h1, h2, h3')].some((e) => e.innerText === old)",
            arg=[before],
        )
        assert heading.inner_text() != before
        person.shoot(page, f"job-report-{width}-{person.theme}")


def test_script(person: Person) -> None:
    person.open("Sample")
    page = person.page
    person.wait(HEADLINE)
    with person.job("the same numbers in a script", 3):
        shown = person.headline
        person.press("Copy as Python")
        person.wait(re.compile("copied", re.IGNORECASE))
        page.evaluate("""async () => {
          const { commands } = window.jupyterapp;
          await commands.execute("notebook:insert-cell-below");
          await commands.execute("notebook:enter-edit-mode");
        }""")
        person.clicks += 1
        page.keyboard.press("Control+V")
        person.clicks += 1
        page.keyboard.press("Shift+Enter")
        share = re.search(r"off by ([\d.]+) %", shown)[1]
        printed = page.locator(".jp-OutputArea-output").filter(has_text=re.compile(r": off by [\d.]+ %")).last
        printed.wait_for()
        number = re.search(r"off by ([\d.]+) %", printed.inner_text())[1]
        digits = len(share.replace(".", "").lstrip("0"))
        assert float(f"{float(number):.{digits}g}") == float(share), (number, share)


def test_every_tab_is_looked_at(person: Person, axe: Callable[..., list[str]]) -> None:
    """No job, but a picture of each tab in this size and theme, and of the run's page that its link opens."""
    size = f"{person.size[0]}-{person.theme}"
    person.open("Hardware")
    person.press("Submit rows")
    person.wait(re.compile("^done in"))
    problems = {}
    for name in ("Sample", "Circuit", "Mitigate", "Hardware", "Calibrate", "Train", "Sweep", "Runs"):
        person.open(name)
        person.page.wait_for_timeout(1000)
        person.shoot(person.page, f"tab-{name.lower()}-{size}")
        problems[name] = axe(person.page, ".qtx-workbench")
    person.open("Hardware")
    with person.page.expect_popup() as opened:
        person.tab.locator(".qtx-wb-run a").click()
    dashboard = opened.value
    dashboard.set_default_timeout(WAIT_MS)
    dashboard.set_viewport_size({"width": person.size[0], "height": person.size[1]})
    dashboard.get_by_text("All runs").wait_for()
    person.shoot(dashboard, f"dashboard-run-{size}")
    problems["the run"] = axe(dashboard, "body")
    dashboard.close()
    assert {name: found for name, found in problems.items() if found} == {}


def test_own_inputs(person: Person) -> None:
    with person.job("my own q, k, v", 1):
        person.run_in_new_cell(OWN)
        person.page.locator(".qtx-lens[data-confirmed]").last.wait_for()
        person.wait(re.compile("^Layer 1, head 0: off by"))
        own = person.page.locator(".qtx-workbench").last
        assert not own.get_by_label("model", exact=True).is_visible()


def test_go_on(person: Person) -> None:
    page = person.page
    person.open("Sample")
    person.press("Draw")
    person.wait(re.compile("^done in"))
    before = person.headline
    page.evaluate(f"async () => {KERNEL}.restart()")
    page.wait_for_function(f"() => {KERNEL}.connectionStatus === 'connected' && {KERNEL}.status === 'idle'")
    with person.job("go on after the kernel was restarted", 1):
        person.run_in_new_cell(RESTORE)
        person.wait(HEADLINE)
        assert person.headline == before
