"""The served dashboard, as people with browsers find it; and what it reads, in this process."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from bokeh.document import Document
from bokeh.models import GlyphRenderer, ImportedStyleSheet, Text
from click.testing import CliRunner
from panel.io.state import set_curdoc
from playwright.sync_api import expect
from scipy import stats

import qtx_lab as qtx
from qtx_lab import cli
from qtx_lab.errors import ArgumentError, StorageError
from qtx_lab.experiments.annotations import read_annotations
from qtx_lab.specs import ExperimentSpec, NotebookSpec, SearchSpec, SweepSpec
from qtx_lab.theme import MAX_DECADES, SAMPLER_COLOURS, SAMPLER_MARKERS, log_ticks
from qtx_lab.widgets.dashboard import figures, frames, maps, serve
from qtx_lab.widgets.dashboard.cells import read_cells
from qtx_lab.widgets.dashboard.devices_view import raw_and_mitigated
from qtx_lab.widgets.dashboard.importance import importance
from qtx_lab.widgets.dashboard.live_view import LiveRun
from qtx_lab.widgets.dashboard.page import DashboardPage, make_page
from qtx_lab.widgets.dashboard.records import Records
from qtx_lab.widgets.dashboard.run_files import find_notebook, read_report
from qtx_lab.widgets.dashboard.runs_view import RunGroup, _number_cell
from qtx_lab.widgets.dashboard.server import is_loopback
from qtx_lab.widgets.dashboard.settings import (
    differing,
    facets,
    half_width,
    metric_columns,
    passes,
    short_names,
)
from qtx_lab.widgets.dashboard.starting import starting_page

VIEWS = ("Runs", "Sweeps", "Live", "Error", "Heads", "Devices", "Maps", "Jobs")
TOKEN = "a token of twenty-six chars"


def fill(home: Path) -> None:
    """A few small runs of each kind, and what is no run."""
    rng = np.random.default_rng(0)
    for seed in range(3):
        with qtx.Run.create(ExperimentSpec(seed=seed), "demo", home) as run:
            run.log_many(
                {
                    "figure": "error-against-draws", "sampler": name, "num_samples": n,
                    "error": size * n**-0.5 * rng.lognormal(0, 0.05), "half_width": 0.01,
                }
                for name, size in (("monte-carlo", 1.0), ("systematic", 0.6), ("head-tail", 0.35))
                for n in (8, 32, 128)
            )  # fmt: skip
            run.log_many(
                {
                    "sampler": "systematic",
                    "num_samples": 32,
                    "layer": i,
                    "head": h,
                    "variance": (1 + i + 6 * h) / 500,
                }
                for i in range(6)
                for h in range(8)
            )
            run.update(title="Sampled attention", results={"summary": ["One sentence."]})
        qtx.write_report(run)
    for device, noise in (("fake_fez", 0.08), ("fake_sherbrooke", 0.17)):
        spec = NotebookSpec(notebook="02_circuits", parameters={"device": device})
        with qtx.Run.create(spec, "circuits", home) as run:
            run.log_many(
                {
                    "loader": loader,
                    "shots": s,
                    "distance": 0.3 * s**-0.5 + off,
                    "half_width": 0.002,
                    "classical": 0.3 * s**-0.5,
                }
                for s in (256, 4096)
                for loader, off in (("dynamic", noise / 20), ("tree", noise))
            )  # fmt: skip
            run.log_many({"loader": "tree", "m": m, "fidelity": 1 - noise * m / 4} for m in (1, 2, 3))
    with pytest.raises(RuntimeError), qtx.Run.create(NotebookSpec(notebook="x"), "broken", home):
        raise RuntimeError("<b>boom</b> it fell")
    with qtx.Run.create(NotebookSpec(notebook="x"), "torn", home) as run:
        run.log(sampler="systematic", num_samples=8, error=0.1)
    metrics = run.path / "metrics.parquet"
    metrics.write_bytes(metrics.read_bytes()[:100])
    sweep_of(home, run)
    (home / "foreign").mkdir()
    (home / "foreign" / "manifest.json").write_text("{nope")
    (home / "notes.txt").write_text("not a run")


def views_drawn(page: DashboardPage) -> Iterator[tuple[str, list[str]]]:
    """The name of each view and its texts, once it is open and its figures are drawn."""
    for name, view in page.views.items():
        page.open(name)
        listing = page.records.listing
        view.show(view.prepare(listing, page.filtered(listing)))
        for pane in view.body.select(lambda x: type(x).__name__ == "HoloViews"):
            figures.hv.render(pane.object)
        yield name, [pane.object for pane in view.body.select(lambda x: type(x).__name__ == "HTML")]


def sweep_of(home: Path, run: qtx.Run, draws: tuple[int, ...] = (8, 32), seeds: int = 3) -> str:
    """A sweep of samplers, draws and seeds, copied from the manifest of a run; gives its name."""
    manifest = json.loads((run.path / "manifest.json").read_text())
    rng = np.random.default_rng(0)
    cells = [(s, n, i) for s in ("systematic", "head-tail") for n in draws for i in range(seeds)]
    for number, (sampler, n, seed) in enumerate([("", 0, 0), *cells]):
        folder = home / f"20261120T000000Z-{'grid' if number else 'sweep-grid'}-{number:03}"
        folder.mkdir()
        parameters = {"sampler": sampler, "num_samples": n, "seed": seed}
        spec = {"kind": "NotebookSpec", "fields": {"notebook": "grid", "parameters": parameters}}
        error = (0.45 if sampler == "head-tail" else 0.6) * max(n, 1) ** -0.5 * rng.lognormal(0, 0.02)
        own = {
            "spec": spec,
            "sweep": {"name": "20261120T000000Z-sweep-grid-000"},
            "results": {"error": error},
        }
        if not number:
            own = {"spec": {"kind": "SweepSpec", "fields": {}}, "results": {"notebooks": len(cells)}}
        new = {**manifest, "name": "grid" if number else "sweep-grid", "seed": seed, **own}
        new["started"] = f"2026-11-20T00:{number // 60:02}:{number % 60:02}.000+00:00"
        (folder / "manifest.json").write_text(json.dumps(new))
    return "20261120T000000Z-sweep-grid-000"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("dashboard") / "runs"
    fill(home)
    return home


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """`start(home, *options)`: a dashboard in a process of its own; gives its address."""
    processes = []

    def start(home: Path, *options: str) -> str:
        log = tmp_path_factory.mktemp("log") / "stderr"
        command = [
            sys.executable,
            "-m",
            "qtx_lab.cli",
            "dashboard",
            "--home",
            str(home),
            "--port",
            "0",
            *options,
        ]
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        processes.append((process, log))
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line.startswith("http"), log.read_text()[-3000:]
        return line

    yield start
    for process, _ in processes:
        process.terminate()
    for process, _ in processes:
        process.wait(60)
    for _, log in processes:
        assert "could not be drawn" not in log.read_text(), log.read_text()[-3000:]


@pytest.fixture(scope="module")
def served(home: Path, start: Callable[..., str]) -> str:
    return start(home)


@pytest.fixture
def shared(module_page: Any, served: str) -> Iterator[Any]:
    """A page that several tests share; fails at the end of each if it had an error, or left this machine."""
    if module_page.url == "about:blank":
        visit(module_page, served)
    yield module_page
    module_page.watch.check()


def visit(page: Any, url: str, view: str = "Runs", theme: str = "light") -> None:
    """Open a view as a person would."""
    page.goto(f"{url}?theme={theme}")
    page.get_by_role("button", name="Runs", exact=True).wait_for()
    if view != "Runs":
        page.get_by_role("button", name=view, exact=True).click()


def fetch(url: str, method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    """Status, body and headers, redirects followed, past any proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(
        url, method=method, headers=headers, data=b"" if method == "POST" else None
    )
    try:
        with opener.open(request, timeout=30) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), dict(error.headers)


# --- In a browser -----------------------------------------------------------------------------------


AXIS_OPACITIES = """() => [...Bokeh.documents].flatMap((d) => [...d._all_models.values()])
  .filter((m) => m.type === "LinearAxis" || m.type === "LogAxis").map((m) => m.axis_line_alpha)"""
"""How opaque the axes of all figures are."""


LAYOUT = """() => {
  const box = (e) => e.getBoundingClientRect();
  const within = (root) => [...root.querySelectorAll("*")].flatMap((e) =>
    e.shadowRoot ? [e, ...within(e.shadowRoot)] : [e]);
  const all = (selector) => within(document).filter((e) => e.matches(selector) && box(e).width);
  return {
    page: document.documentElement.scrollWidth - innerWidth,
    tables: all(".wide").map((e) => e.scrollWidth - e.clientWidth),
    canvas: all("canvas").map((e) => box(e).width)[0],
    frames: all(".bk-CartesianFrame").map((e) => [box(e).y, box(e).height].join()),
    figures: all(".bk-Figure").map((e) => box(e).y),
  };
}"""


def layout_problems(page: Any, view: str, width: int) -> list[str]:
    """What is wrong with the layout of a view, once it has settled; figures get their places one by one."""
    for _ in range(150):
        seen, problems = page.evaluate(LAYOUT), []
        if seen["page"] > 0:
            problems.append("the page needs scrolling sideways")
        if max(seen["tables"], default=0) > 1:
            problems.append("a table needs scrolling sideways")
        if view == "Maps" and (seen["canvas"] or 0) <= width / 4.5:
            problems.append("the maps do not use the room that a larger window has")
        if view == "Maps" and len(set(seen["frames"])) != 1:
            problems.append("the maps are not side by side")
        if view == "Devices" and len(set(seen["figures"])) != (1 if width > 1500 else 2):
            problems.append("the figures are not placed as there is room")
        if not problems:
            break
        page.wait_for_timeout(400)
    return problems


@pytest.mark.ui
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_view_opens_in_both_themes(
    page: Any, served: str, shoot: Any, axe: Any, theme: str, soak: bool
) -> None:
    violations = {}
    size = {"light": (1280, 800), "dark": (1920, 1080)}[theme]
    page.set_viewport_size({"width": size[0], "height": size[1]})
    checked = {"light": ("Runs", "Error", "Maps"), "dark": ("Sweeps", "Live", "Devices")}[theme]
    a, b = "20261120T000000Z-grid-001", "20261120T000000Z-grid-009"
    for name, query in (("run", f"view=Run&run={a}"), ("compare", f"view=Compare&ticked={a}/{b}")):
        page.goto(f"{served}?theme={theme}&{query}")
        page.get_by_text("All runs").wait_for()
        shoot(page, f"dashboard-{name}-{theme}")
        if soak or theme == "light":  # in the dark theme, another test sees them
            violations[query] = axe(page, "body")
    visit(page, served, theme=theme)
    buttons = page.locator("nav .bk-btn")
    assert set(buttons.evaluate_all("(all) => all.map((e) => getComputedStyle(e).borderRadius)")) == {"6px"}
    places = [box.bounding_box() for box in buttons.all()]
    gaps = [b["x"] - a["x"] - a["width"] for a, b in itertools.pairwise(places)]
    assert min(gaps) >= 0, "a button of the navigation covers the edge of the one before"
    expected = {
        "Runs": "2 skipped: not readable",
        "Sweeps": re.compile("num_samples explains .* of the variance; smallest error 0.0"),
        "Live": "Nothing is running",
        "Error": re.compile(r"With 128 draws a row head-tail is best: 0\.03\d+ ± 0\.0"),
        "Heads": "Layer 5, head 7 is the hardest",
        "Devices": "Closest to the row: dynamic on fake_fez",
        "Maps": "32 systematic draws lie",
        "Jobs": "No jobs on devices",
    }
    for view in VIEWS:
        page.get_by_role("button", name=view, exact=True).click()
        page.get_by_text(expected[view]).first.wait_for()
        if view in ("Sweeps", "Error", "Heads", "Devices", "Maps"):
            page.locator("#picture canvas:visible").first.wait_for()
        page.wait_for_timeout(400)
        assert layout_problems(page, view, size[0]) == [], view
        shoot(page, f"dashboard-{view.lower()}-{theme}")
        assert page.get_by_text("The dashboard is loading").count() == 0
        assert all(page.evaluate(AXIS_OPACITIES)), f"an axis of {view} is not to be seen"
        assert page.locator("#controls").is_visible() == (view != "Jobs")  # which has none
        if soak or view in checked:
            violations[view] = axe(page, "body")
    assert page.evaluate("() => getComputedStyle(document.body).colorScheme") == theme
    assert {key: problems for key, problems in violations.items() if problems} == {}


@pytest.mark.ui
def test_filters_and_reports(shared: Any) -> None:
    page = shared
    page.get_by_role("button", name="Runs", exact=True).click()
    rows = page.locator("#picture tbody tr:visible")
    page.get_by_text("boom").wait_for()
    expect(rows).to_have_count(8)  # a sweep is folded into a row
    assert page.get_by_text("<b>boom</b> it fell").count() == 1  # as text
    page.get_by_label("Run contains").press_sequentially("CIRC")
    expect(rows).to_have_count(2)  # after "C" alone, which the random end of any run's name may have
    expect(page.get_by_text("boom")).to_be_hidden()
    page.get_by_label("Run contains").fill("")
    page.get_by_text("boom").wait_for()
    page.get_by_label("failed").uncheck()
    page.get_by_text("boom").wait_for(state="hidden")
    expect(rows).to_have_count(7)
    page.get_by_label("Run contains").fill("no such run")
    page.get_by_text("No run passes the filters").wait_for()
    page.get_by_label("Run contains").fill("")
    page.get_by_label("failed").check()
    page.get_by_text("boom").wait_for()
    with page.expect_popup() as opened:
        page.get_by_role("link", name=re.compile("Report of .*demo")).first.click()
    report = opened.value
    report.get_by_text("One sentence.").wait_for()
    assert "/report/" in report.url
    report.close()


@pytest.mark.ui
def test_an_address_brings_a_colleague_to_the_same_view(page: Any, served: str, axe: Any) -> None:
    visit(page, served)
    page.get_by_text("boom").wait_for()
    page.get_by_label("Rows", exact=True).select_option("seeds averaged")
    page.get_by_label("Run contains").fill("num_samples=32")
    page.get_by_text("boom").wait_for(state="hidden")
    page.get_by_role("link", name="error", exact=True).click()
    page.wait_for_url(re.compile("sort=results.error"))
    rows = page.locator("#picture tbody tr:visible")
    rows.nth(0).get_by_text("head-tail").wait_for()
    expect(rows).to_have_count(2)
    page.get_by_text("error ▲").wait_for()
    errors = page.locator("#picture thead th").all_inner_texts().index("error ▲")  # seconds are beside it
    mean_of_three_seeds = rows.nth(0).locator("td").nth(errors).inner_text()
    assert re.fullmatch(r"0\.0[78]\d* ± 0\.00\d", mean_of_three_seeds)
    page.wait_for_url(re.compile("contains=num_samples"))
    page.get_by_role("link", name="Dark theme").click()  # loads the page anew, at the same view
    page.wait_for_url(re.compile("theme=dark"))
    rows.nth(0).get_by_text("head-tail").wait_for()
    expect(rows).to_have_count(2)
    expect(page.get_by_label("Run contains")).to_have_value("num_samples=32")
    boxes = [row.get_by_role("checkbox") for row in (rows.nth(0), rows.nth(1))]
    boxes[0].check()
    page.get_by_text("tick one more").wait_for()
    boxes[0].uncheck()
    page.get_by_text("Tick two runs to see them").wait_for()
    # Faster than the server answers; found and clicked in one go, since the table may just be drawn anew.
    # At the same time an address arrives that the server sent before it knew of them.
    rows.get_by_role("checkbox").evaluate_all(
        """(boxes) => {
            const location = Bokeh.documents.flatMap((d) => d.roots()).find((m) => "pathname" in m);
            const before = location.search;
            boxes.forEach((box) => box.click());
            location.setv({ search: `${before}&crossed=1` }, { sync: false });
        }"""
    )
    page.wait_for_url(re.compile("ticked=.*%2F"))
    page.get_by_text("Compare the two ticked runs").click()
    page.get_by_role("heading", name="These runs differ in sampler").wait_for()
    assert axe(page, "body") == []
    page.get_by_role("link", name=re.compile("grid-")).first.click()
    page.get_by_role("heading", name="Environment").wait_for()
    assert axe(page, "body") == []
    assert "num_samples=32" in urllib.parse.unquote(page.url)
    page.go_back()
    page.get_by_role("heading", name="These runs differ in sampler").wait_for()


@pytest.mark.ui
def test_the_error_view_follows_its_filters(shared: Any) -> None:
    page = shared
    page.get_by_role("button", name="Error", exact=True).click()
    page.get_by_text("head-tail is best").wait_for()
    page.get_by_text("Mean of 3 runs.").wait_for()
    page.get_by_text("1 skipped").wait_for()  # the torn metrics are named
    page.get_by_label("Samplers").select_option(["monte-carlo", "systematic"])
    page.get_by_text("systematic is best").wait_for()


@pytest.mark.ui
def test_keyboard_reaches_every_control(shared: Any) -> None:
    page = shared
    page.get_by_role("button", name="Maps", exact=True).click()
    page.get_by_text("32 systematic draws lie").wait_for()
    seen = set()
    page.locator("#theme").focus()
    for _ in range(14):
        page.keyboard.press("Tab")
        seen.add(page.evaluate(
            """() => { let e = document.activeElement;
                       while (e?.shadowRoot?.activeElement) e = e.shadowRoot.activeElement;
            return e.getAttribute('role') || e.tagName; }"""
        ))  # fmt: skip
    assert {"slider", "SELECT"} <= seen
    page.get_by_role("slider").first.focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text("33 systematic draws lie").wait_for()
    page.keyboard.press("ArrowLeft")
    page.get_by_text("32 systematic draws lie").wait_for()


REPAINTS = """async ([steps]) => {
  // From the key that moves the slider to the frame in which the canvas of the sampled map is another.
  const find = (root, canvases = []) => {
    for (const e of root.querySelectorAll("*")) {
      if (e.tagName === "CANVAS" && e.offsetWidth) canvases.push(e);
      if (e.shadowRoot) find(e.shadowRoot, canvases); }
    return canvases;
  };
  const slider = (root) => { for (const e of root.querySelectorAll("*")) {
      if (e.getAttribute("role") === "slider" && e.offsetWidth) return e;
      const inner = e.shadowRoot && slider(e.shadowRoot); if (inner) return inner; } };
  const all = find(document.querySelector("#picture")), third = all.length / 3;
  const canvases = all.slice(third, 2 * third), small = document.createElement("canvas");
  small.width = small.height = 96;
  const pen = small.getContext("2d", { willReadFrequently: true });
  const shot = () => canvases.map((c) => { pen.clearRect(0, 0, 96, 96); pen.drawImage(c, 0, 0, 96, 96);
    return pen.getImageData(0, 0, 96, 96).data.reduce((h, x) => (h * 31 + x) | 0, 7); }).join();
  const knob = slider(document.querySelector("#controls")), times = [];
  for (let i = 0; i < steps; i++) {
    const before = shot(), start = performance.now();
    const key = { key: "ArrowRight", keyCode: 39, bubbles: true, composed: true };
    knob.dispatchEvent(new KeyboardEvent("keydown", key));
    while (shot() === before && performance.now() - start < 60000) await new Promise(requestAnimationFrame);
    times.push(performance.now() - start);
    await new Promise((done) => setTimeout(done, 150));
  }
  return times;
}"""


@pytest.mark.ui
def test_the_map_follows_the_slider(shared: Any, soak: bool, capsys: Any) -> None:
    page = shared
    page.get_by_role("button", name="Maps", exact=True).click()
    page.get_by_text("32 systematic draws lie").wait_for()
    page.locator("#picture canvas:visible").first.wait_for()
    page.wait_for_timeout(500)
    steps = 200 if soak else 12
    times = page.evaluate(REPAINTS, [steps])
    page.get_by_text(f"{32 + steps} systematic draws lie").wait_for()
    assert max(times) < 60_000, "a move of the slider did not change the picture"
    with capsys.disabled():
        median, p95 = np.percentile(times, [50, 95])
        load = os.getloadavg()[0] / (os.cpu_count() or 1)
        timing = f"slider to repaint {median:.0f} ms (median), {p95:.0f} ms (p95), load {load:.1f} a core"
        print(f"\ndashboard, n = 512, {steps} steps: {timing}")


SIDES = """() => [...Bokeh.documents].flatMap((d) => [...d._all_models.values()])
  .filter((m) => m.type === "ColumnDataSource" && m.data.image)
  .flatMap((m) => [...m.data.image].map((image) => image.shape[0]))"""


@pytest.mark.ui
def test_maps_are_drawn_as_finely_as_they_are_shown(shared: Any) -> None:
    page = shared
    page.get_by_role("button", name="Maps", exact=True).click()
    page.get_by_text("systematic draws lie").wait_for()
    for size, low, high in (((1920, 1080), 400, 640), ((1280, 800), 240, 300)):
        page.set_viewport_size({"width": size[0], "height": size[1]})
        page.wait_for_function(
            f"([low, high]) => {{ const sides = ({SIDES})(); return sides.length === 3"
            " && sides.every((side) => side >= low && side <= high); }",
            arg=[low, high],
        )


@pytest.mark.ui
def test_two_people_at_once(shared: Any, browser: Any, served: str) -> None:
    page, other = shared, browser.new_context().new_page()
    visit(other, served)
    for someone, text in ((page, "circuits"), (other, "demo")):
        someone.get_by_role("button", name="Runs", exact=True).click()
        someone.get_by_text("boom").wait_for()
        someone.get_by_label("Run contains").fill(text)
    for _ in range(2):  # in the second round, after both pages were drawn
        for someone, text, others in ((page, "circuits", "demo"), (other, "demo", "circuits")):
            shown = someone.locator("#picture tbody:visible")
            expect(shown).to_contain_text(text)
            expect(shown).not_to_contain_text(others)
        page.wait_for_timeout(500)
    other.context.close()
    page.get_by_label("Run contains").fill("")
    page.get_by_text("boom").wait_for()


@pytest.mark.ui
def test_the_first_run_appears_and_is_followed(page: Any, start: Callable[..., str], tmp_path: Path) -> None:
    home = tmp_path / "runs"
    visit(page, start(home))
    page.get_by_text("No runs yet").wait_for()
    assert not home.exists()  # looking makes nothing
    run = qtx.Run.create(NotebookSpec(notebook="train"), "train", home)
    run.log(step=0, loss=5.0)
    page.get_by_role("cell", name="train", exact=True).wait_for()
    page.get_by_role("button", name="Live", exact=True).click()
    page.get_by_text("1 rows; last: step 0, loss 5").wait_for()
    for step in range(1, 6):
        run.log_many({"step": 10 * step + i, "loss": 5.0 - 0.5 * step} for i in range(10))
        page.wait_for_timeout(300)
    page.get_by_text("51 rows; last: step 59, loss 2.5").wait_for()
    page.locator("#picture canvas:visible").first.wait_for()
    whole = (run.path / "metrics.parquet").read_bytes()
    (run.path / "metrics.parquet").write_bytes(whole[:80])
    page.get_by_text("metrics cannot be read").wait_for()
    (run.path / "metrics.parquet").write_bytes(whole)
    page.get_by_text("51 rows").wait_for()
    run.finish("done")
    page.get_by_text("done", exact=True).last.wait_for()  # it stays, ended
    page.get_by_text("51 rows").wait_for()
    for i in range(25):
        shutil.copytree(run.path, home / f"copy-{i:02}")
    page.get_by_role("button", name="Runs", exact=True).click()
    page.get_by_text("1–20 of 26").wait_for()
    page.get_by_role("button", name="Older").click()
    page.get_by_text("21–26 of 26").wait_for()
    page.get_by_role("button", name="Newer").click()
    page.get_by_text("1–20 of 26").wait_for()


@pytest.mark.ui
def test_a_token_lets_in(page: Any, browser: Any, home: Path, start: Callable[..., str]) -> None:
    link = start(home, "--token", TOKEN)
    url = link.split("login")[0]
    run = next(home.glob("*-demo-*")).name
    for path in ("", f"report/{run}", "metadata"):
        status, body, _ = fetch(url + path)
        assert run not in body
        assert "One sentence" not in body
        assert "Token, as printed" in body or status == 404
    page.goto(url)
    page.get_by_label("Token").fill("wrong" * 5)
    page.get_by_role("button", name="Enter").click()
    page.get_by_text("This is not the token.").wait_for()
    page.watch.errors.clear()  # the browser reports the 403
    page.goto(f"{url}?view=Run&run={run}&theme=light")  # a colleague's address: it is shown after the login
    page.watch.errors.clear()
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Enter").click()
    page.get_by_role("heading", name="Environment").wait_for()
    assert TOKEN not in page.url
    page.get_by_label("Tags").fill("paper, " + "x" * 41)
    page.get_by_role("button", name="Save").click()
    page.get_by_text("is not allowed: a tag has").wait_for()
    page.get_by_label("Tags").fill("paper, figure 2")
    page.get_by_label("Note").fill("<b>Seeds</b> agree.")
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Saved.").wait_for()
    assert read_annotations(home / run).tags == ("paper", "figure 2")
    page.get_by_role("link", name="All runs").click()
    page.get_by_text("figure 2").wait_for()
    assert page.get_by_text("<b>Seeds</b> agree.").count() == 1  # as text
    (home / run / "annotations.json").unlink()
    other = browser.new_context().new_page()
    other.goto(link)  # the printed link
    other.get_by_role("button", name="Runs", exact=True).wait_for()
    assert "token" not in other.url
    other.context.close()


# --- By hand ----------------------------------------------------------------------------------------


def test_reports_are_all_that_is_served(served: str, home: Path, tmp_path: Path) -> None:
    run = next(home.glob("*-demo-*"))
    status, body, headers = fetch(f"{served}report/{run.name}")
    assert status == 200
    assert "One sentence." in body
    assert "sandbox" in headers["Content-Security-Policy"]
    (home.parent / "report.html").write_text("secret")
    (home.parent / "elsewhere").mkdir(exist_ok=True)
    (home.parent / "elsewhere" / "report.html").write_text("secret")
    link = home / "linked"
    link.symlink_to(home.parent / "elsewhere")
    try:
        tries = ["..", "%2e%2e", ".", "..%2felsewhere", "..%2Felsewhere", "%2e%2e%2felsewhere",
                 "..%5celsewhere", "linked", "%00", f"{run.name}%2fmanifest.json",
                 f"{run.name}/manifest.json", "", "%252e%252e%252felsewhere"]  # fmt: skip
        for name in tries:
            status, body, _ = fetch(f"{served}report/{name}")
            assert status in (400, 403, 404), name
            assert "secret" not in body
            assert "manifest" not in body
    finally:
        link.unlink()
    assert read_report(home, run.name) is not None
    for name in ("", "..", ".hidden", "a/b", "a\\b", "a\0b", "/etc", "x" * 5000):
        assert read_report(home, name) is None
        assert find_notebook(home, name) is None
    (run / "done.ipynb").write_text("{}")
    status, body, headers = fetch(f"{served}notebook/{run.name}")
    assert (status, body) == (200, "{}")
    assert headers["Content-Disposition"].startswith("attachment")
    (run / "done.ipynb").unlink()
    assert fetch(f"{served}notebook/{run.name}")[0] == 404
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert fetch(f"{served}report/{run.name}", method)[0] == 405


def test_looking_changes_no_file(served: str, home: Path) -> None:
    def files() -> dict[Path, tuple[int, int]]:
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in home.rglob("*")}

    before = files()
    assert fetch(served)[0] == 200
    assert fetch(f"{served}report/{next(home.glob('*-demo-*')).name}")[0] == 200
    assert files() == before


def test_other_names_for_this_machine_are_refused(served: str) -> None:
    port = urllib.parse.urlsplit(served).port
    assert fetch(served, Host=f"rebound.example:{port}")[0] == 403
    assert fetch(served, Host=f"localhost:{port}")[0] == 200
    hosts = ("127.0.0.1", "::1", "[::1]", "localhost", "0.0.0.0", "10.0.0.1", "localhost.example")
    assert [is_loopback(host) for host in hosts] == [
        True, True, True, True, False, False, False,
    ]  # fmt: skip


def test_a_session_without_a_rendered_page_asks_nobody_outside_for_style_sheets(home: Path) -> None:
    document = Document()
    with set_curdoc(document):
        make_page(Records(home)).server_doc(document)
    sheets = {sheet.url for sheet in document.select({"type": ImportedStyleSheet})}
    assert sheets
    assert [url for url in sheets if "//" in url] == []


def test_a_public_address_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QTX_LAB_TOKEN", raising=False)
    for address in ("0.0.0.0", "::", "", "192.0.2.1", "example.org"):
        with pytest.raises(ArgumentError, match="token=None"):
            serve(tmp_path, address=address)
    with pytest.raises(ArgumentError, match="it must have 16 or more"):
        serve(tmp_path, address="0.0.0.0", token="short")
    result = CliRunner().invoke(cli.main, ["dashboard", "--address", "0.0.0.0"])
    assert result.exit_code == 2
    assert "--token or QTX_LAB_TOKEN" in result.output


def test_a_port_that_is_taken_is_named(served: str, tmp_path: Path) -> None:
    port = urllib.parse.urlsplit(served).port
    with pytest.raises(ArgumentError, match=f"port={port} of 127.0.0.1 cannot be used"):
        serve(tmp_path, port=port or 0)


# --- What it reads ----------------------------------------------------------------------------------


def test_records_read_a_file_once_until_it_changes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(home)
    number = records.listing.number
    records.look()
    assert records.listing.number == number  # nothing changed
    run = qtx.Run.create(NotebookSpec(notebook="x"), "growing", home)
    try:
        run.log(step=0, loss=1.0)
        records.look()
        assert records.listing.number == number + 1
        assert len(records.metrics(run.path.name)) == 1
        mark = records.mark(run.path.name)
        with monkeypatch.context() as patch:
            patch.setattr(Records, "_read_frame", lambda self, path: pytest.fail("read again"))
            assert len(records.metrics(run.path.name)) == 1
        run.log(step=1, loss=0.5)
        assert records.mark(run.path.name) != mark
        assert len(records.metrics(run.path.name)) == 2
    finally:
        run.finish("done")
    torn = next(home.glob("*-torn-*")).name
    for _ in range(2):
        with pytest.raises(StorageError, match="Cannot read"):
            records.metrics(torn)
    table = records.listing.table
    rows = records.rows(table, "sampler", "num_samples", "error")
    assert [run for run, _ in rows.skipped] == [torn]
    assert set(rows.frame["run"]) == set(table["run"][table["name"] == "demo"])
    circuits = records.rows(table, "loader", "shots", "distance").frame
    assert set(circuits["device"]) == {"fake_fez", "fake_sherbrooke"}  # from the parameters of the runs


def test_what_no_table_can_hold_costs_a_warning(tmp_path: Path) -> None:
    with qtx.Run.create(NotebookSpec(notebook="x"), "good", tmp_path) as run:
        pass
    records = Records(tmp_path)
    manifest = json.loads((run.path / "manifest.json").read_text())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text(json.dumps({**manifest, "name": "\ud800"}))
    records.look()
    assert len(records.listing.table) >= 1
    shutil.rmtree(tmp_path / "bad")
    records.look()
    assert (len(records.listing.table), records.listing.trouble) == (1, "")
    (tmp_path / "file").write_text("no folder")
    page = DashboardPage(Records(tmp_path / "file"), "light")
    assert "Not a directory" in page.foot.object
    for name in ("Live", "Error", "Heads", "Devices", "Jobs"):
        view = page.views[name]
        view.show(view.prepare(page.records.listing, page.filtered(page.records.listing)))


def test_how_far_a_sweep_is(tmp_path: Path) -> None:
    plan = SweepSpec(notebook="00_quickstart", sha256="0" * 64, grid={"x": [1, 2, 3, 4]})
    sweep = qtx.Run.create(plan, "sweep-it", tmp_path, results={"notebooks": 8, "kept": 1})
    for status in ("done", "done", "failed", "running"):
        run = qtx.Run.create(NotebookSpec(notebook="x"), "x", tmp_path, sweep={"name": sweep.path.name})
        if status != "running":
            run.finish(status, "why" if status == "failed" else None)
    page = DashboardPage(Records(tmp_path), "light")
    view = page.views["Live"]
    view.state()
    progress = view.prepare(page.records.listing, page.filtered(page.records.listing)).sweeps
    assert (
        "4 of 8 notebooks have ended (1 running, 2 done, 1 failed, 1 from earlier sweeps); about" in progress
    )
    assert "max='8' value='4'" in progress
    sweep.update(results={"notebooks": "many"})
    tried = qtx.Run.create(SearchSpec(notebook="x", sha256="0" * 64, trials=6, repeats=2), "search", tmp_path)
    qtx.Run.create(NotebookSpec(notebook="x"), "x", tmp_path, sweep={"name": tried.path.name}).finish("done")
    page.records.look()
    view.state()
    progress = view.prepare(page.records.listing, page.filtered(page.records.listing)).sweeps
    assert "1 of at most 12 notebooks have ended (1 done)" in progress
    tried.finish("done")
    page.records.look()
    view._followed.pop(tried.path.name)
    assert view.prepare(page.records.listing, page.records.listing.table).sweeps == ""


def test_over_runs_is_students_interval_of_the_mean() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(1, 0.1, 5)
    frame = pd.DataFrame(
        {"sampler": "a", "num_samples": 8, "error": values, "half_width": 9.0, "run": list("abcde")}
    )
    (row,) = frames.over_runs(frame, ("sampler", "num_samples"), "error").to_dict("records")
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert row["error"] == pytest.approx(values.mean())
    assert 2 * row["half_width"] == pytest.approx(high - low)
    (row,) = frames.over_runs(frame[:1], ("sampler", "num_samples"), "error").to_dict("records")
    assert (row["half_width"], row["runs"]) == (9.0, 1)  # the run's own


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_an_axis_has_a_few_ticks_however_short_or_long_it_is() -> None:
    assert log_ticks(0.015, 0.3) == [(0.02, "0.02"), (0.05, "0.05"), (0.1, "0.1"), (0.2, "0.2")]
    assert [text for _, text in log_ticks(3e-7, 0.6)] == ["10⁻⁶", "10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²", "10⁻¹"]
    for low, high in ((1e-300, 1e300), (5e-324, 1.7e308), (1e-12, 1e3), (0.2, 200.0)):
        ticks = [tick for tick, _ in log_ticks(np.float64(low), np.float64(high))]
        assert 3 <= len(ticks) <= MAX_DECADES + 1
        assert low <= ticks[0] < ticks[-1] <= high
    for low, high in ((0.053, 0.096), (0.21, 0.22), (3.0, 4.0)):
        ((tick, text),) = log_ticks(low, high)
        assert low <= tick <= high
        assert float(text) == tick


def test_a_thinned_curve_keeps_its_extremes() -> None:
    rng = np.random.default_rng(2)
    for size in (10, frames.MAX_POINTS + 1, 100_003):
        y = rng.normal(size=size)
        y[size // 3], y[size // 2] = 50, np.nan
        x, thinned = frames.thinned(np.arange(size), y)
        assert len(x) <= frames.MAX_POINTS + 4
        assert (np.nanmin(thinned), np.nanmax(thinned)) == (np.nanmin(y), np.nanmax(y))
        assert (x[0], x[-1]) == (0, size - 1)
        assert (np.diff(x) > 0).all()


def test_maps_are_the_heads_own() -> None:
    few = maps.attention_maps("reference", 128, 3, 0, "systematic", 16)
    again = maps.attention_maps.__wrapped__("reference", 128, 3, 0, "systematic", 16)
    assert np.array_equal(few.sampled, again.sampled, equal_nan=True)
    lower = np.tril(np.ones((128, 128), bool))
    assert np.isnan(few.exact[~lower]).all()
    for p in (few.exact, few.sampled):
        assert np.allclose(np.nansum(p, 1), 1, atol=1e-5)
    more = maps.attention_maps("reference", 128, 3, 0, "systematic", 512)
    assert 0 < more.distance < few.distance
    assert 0 < more.error < few.error
    tokens = qtx.encode(qtx.reference_text())[None, :128]
    q, k, _ = qtx.load_reference_model().attention_inputs(tokens)[3]
    p = np.exp((q[0, 0] @ k[0, 0].T).numpy() / q.shape[-1] ** 0.5) * lower
    assert np.allclose(np.nan_to_num(few.exact), p / p.sum(1, keepdims=True), atol=1e-5)


FOREIGN = {
    "texts": {
        "sampler": ["x", "y"], "num_samples": ["many", "few"], "error": ["a", "b"], "layer": ["a", "b"],
        "head": ["c", "d"], "variance": ["1", "2"], "loader": ["l", "m"], "shots": ["3", "x"],
        "distance": ["z", "0.1"], "m": ["1", "2"], "fidelity": ["q", "0.5"],
    },
    "nothing": {
        name: [None, None]
        for name in (
            "sampler", "num_samples", "error", "layer", "head", "variance", "loader", "shots", "distance",
        )
    },
    "infinite": {
        "sampler": ["x", "x"], "num_samples": [0, -1], "error": [float("inf"), float("nan")], "layer": [0, 1],
        "head": [0, 1], "variance": [float("inf"), 0.0], "loader": ["t", "t"], "shots": [0.0, -3.0],
        "distance": [1.0, 1.0],
    },
    "numbers for names": {
        "sampler": [1, 2], "num_samples": [True, False], "error": [1e300, 1e-300], "layer": [1.5, 1e18],
        "head": [0, 1], "variance": [1e-300, 1e300], "loader": [3, 4], "shots": [10, 20],
        "distance": [1e-9, 0.5], "device": [1, 2], "m": [1, 2], "fidelity": [0.5, 2.0],
    },
    "one of each": {
        "sampler": ["<img src=x onerror=alert(1)>"], "num_samples": [8], "error": [0.1], "layer": [0],
        "head": [0], "variance": [0.1], "loader": ["tree"], "shots": [10], "distance": [0.1], "m": [3],
        "fidelity": [0.9], "step": ["late"],
    },
}  # fmt: skip


def test_a_view_that_is_not_drawn_yet_says_so(tmp_path: Path) -> None:
    """The server may be drawing another view for seconds."""
    from qtx_lab.widgets.dashboard.page import DashboardPage

    page = DashboardPage(Records(tmp_path), "light")
    for name, view in page.views.items():
        texts = [pane.object for pane in view.body.select(lambda x: type(x).__name__ == "HTML")]
        assert ("Reading and drawing" in texts[0]) == (name != "Runs"), name  # Runs is drawn with the page


@pytest.mark.parametrize("kind", FOREIGN)
def test_anybodys_metrics_are_drawn_or_left_out(kind: str, tmp_path: Path) -> None:
    """Every view of a page over a run whose metrics hold anything."""
    from qtx_lab.widgets.dashboard.page import DashboardPage

    run = qtx.Run.create(NotebookSpec(notebook="x"), "anybody", tmp_path)
    qtx.storage.write_frame(run.path / "metrics.parquet", pd.DataFrame(FOREIGN[kind]))
    (run.path / "spec.yaml").write_text("- a list\n")
    page = DashboardPage(Records(tmp_path), "light")
    for _, texts in views_drawn(page):
        assert not any("<img" in text for text in texts)
    run.finish("done")


def listing_of(*rows: dict[str, Any]) -> pd.DataFrame:
    """A listing of runs r0, r1, … with these columns."""
    frame = pd.DataFrame([{"run": f"r{i}", "kind": "NotebookSpec", **row} for i, row in enumerate(rows)])
    return frame.assign(tags=[()] * len(rows), note="")


def test_columns_are_those_in_which_runs_differ() -> None:
    table = listing_of(
        {"spec.sampler": "sobol", "spec.n": 8, "spec.layer": 3, "spec.seed": 0, "spec.text": "a"},
        {"spec.sampler": "halton", "spec.n": 8, "spec.layer": 3, "spec.seed": 1},
        {"spec.sampler": "halton", "spec.n": 16, "spec.layer": 3, "spec.seed": 2},
    )
    assert differing(table) == ["spec.sampler", "spec.n"]
    assert half_width({"results.error_half_width": 0.5}, "results.error") == 0.5
    assert half_width({"results.error_std_error": 1.0}, "results.error") == pytest.approx(1.96, abs=1e-3)
    assert np.isnan(half_width({"results.other": 1.0}, "results.error"))
    declared = {"results.error": 1.0, "results.ci": 0.25, "half_widths": '{"error": "ci"}'}
    assert half_width(declared, "results.error") == 0.25
    assert metric_columns(pd.DataFrame([declared])) == ["results.error"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "r0 r1 r2"), ("R1", "r1"), ("sampler=halton", "r1 r2"), ("sampler=halton n>=16", "r2"),
        ("n<16", "r0 r1"), ("n!=8", "r2"), ("error<0.1", "r0"), ("unknown=3", ""), ("paper", "r2"),
        ("note='two words'", "r1"), ("'two w", ""), ("sampler=", ""), ("error=nan", ""),
    ],
)  # fmt: skip
def test_a_filter_compares_parameters_and_metrics(text: str, found: str) -> None:
    table = listing_of(
        {"spec.sampler": "sobol", "spec.n": 8, "results.error": 0.05},
        {"spec.sampler": "halton", "spec.n": 8, "results.error": 0.2},
        {"spec.sampler": "halton", "spec.n": 16},
    )
    table["note"] = ["", "two words", ""]
    table.at[2, "tags"] = ("Paper",)
    assert " ".join(table["run"][passes(table, text)]) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("error<0.1", "r0"), ("error=sobol", "r0"), ("spec.error=sobol", "r0"), ("error!=sobol", "r1 r2"),
        ("error>0.1", "r1"), ("results.error=0.2", "r1"), ("error=boom", "r2"),
    ],
)  # fmt: skip
def test_a_filter_knows_every_meaning_of_a_name(text: str, found: str) -> None:
    table = listing_of(
        {"spec.error": "sobol", "results.error": 0.05, "error": None},
        {"spec.error": "halton", "results.error": 0.2, "error": None},
        {"error": "boom"},
    )
    assert " ".join(table["run"][passes(table, text)]) == found


def test_a_parameter_and_a_number_of_its_name_are_both_shown(tmp_path: Path) -> None:
    """In every view of a page over a sweep whose notebooks log a parameter's name with other values."""
    for error in (3, 5):
        for seed in range(3):
            parameters = {"error": error, "sampler": "sobol", "seed": seed}
            spec = NotebookSpec(notebook="x", parameters=parameters)
            with qtx.Run.create(spec, "x", tmp_path, sweep={"name": "a-sweep", "cell": "c"}) as run:
                run.declare("error", main=True)
                run.log_many(
                    {"sampler": s, "num_samples": 8, "error": e + seed / 100 + error / 9, "step": 1}
                    for s, e in (("lattice", 0.25), ("head-tail", 0.75))
                )
                run.update(results={"error": error / 10})
    page = DashboardPage(Records(tmp_path), "light")
    texts = {name: " ".join(texts) for name, texts in views_drawn(page)}
    runs = texts["Runs"].replace("_<wbr>", "_")
    assert "Sort by error (parameter)" in runs
    assert "Sort by error'" in runs
    assert "error (parameter)" in texts["Sweeps"]
    assert "lattice" in texts["Sweeps"]
    both = ["results.error", "spec.error"]
    assert len(set(short_names(both).values())) == 2


def test_the_dashboard_can_draw_every_marker() -> None:
    assert set(SAMPLER_MARKERS.values()) | {"h"} <= set(figures.MARKERS)  # "h": named in CONTRIBUTING.md


def test_only_runs_that_differ_in_the_seed_are_averaged() -> None:
    rows = [
        {"spec.sampler": s, "spec.num_tokens": n, "spec.seed": i, "code": "1"}
        for s in ("sobol", "halton") for n in (128, 512) for i in (0, 1)
    ]  # fmt: skip
    table = listing_of(*rows)
    measured = pd.DataFrame({"run": table["run"], "sampler": table["spec.sampler"], "error": 0.1})
    names = facets(table, measured, ("sampler", "num_samples"))  # samplers are lines of one figure
    assert set(names.values()) == {"num_tokens = 128", "num_tokens = 512"}
    measured["sampler"] = "both"  # the metrics do not tell the runs' samplers apart
    assert len(set(facets(table, measured, ("sampler",)).values())) == 4
    other = table.assign(code=["1", "2"] * 4)
    assert len(set(facets(other, measured, ("sampler",)).values())) == 8


def test_importance_is_the_share_of_variance() -> None:
    rng = np.random.default_rng(3)
    grid = [(a, b, s) for a in range(4) for b in range(5) for s in range(6)]
    frame = pd.DataFrame(grid, columns=["spec.a", "spec.b", "seed"])
    frame["spec.none"] = rng.integers(0, 3, len(frame))
    # Variances: 4 of a (-3, -1, 1, 3 times √.8), 1 of the seed; b and `none` have no effect.
    frame["y"] = (2 * frame["spec.a"] - 3) * 0.8**0.5 + rng.normal(size=len(frame))
    effects = importance(frame, ["spec.b", "spec.a"], "y")
    assert effects is not None
    assert effects.balanced
    assert not effects.log
    shares = effects.table.set_index("name")
    assert list(shares.index) == ["spec.a", "spec.b", "interactions", "seed"]
    assert shares.loc["spec.a", "share"] == pytest.approx(0.8, abs=0.06)
    assert shares.loc["spec.b", "share"] < 0.03
    assert shares.loc["seed", "share"] == pytest.approx(0.2, abs=0.06)
    assert abs(shares.loc["spec.a", "share"] - 0.8) < shares.loc["spec.a", "half_width"] < 0.2
    assert importance(frame[:2], ["spec.a"], "y") is None
    assert importance(frame.assign(y=1.0), ["spec.a"], "y") is None
    single = importance(frame[frame["seed"] == 0], ["spec.a", "spec.b"], "y")
    assert single is not None
    assert single.table["name"].iloc[-1] == "interactions and seed"
    assert single.table["half_width"].isna().all()
    log = importance(frame.assign(y=10 ** frame["y"]), ["spec.a"], "y")
    assert log is not None
    assert log.log
    assert not log.balanced or len(frame) % 4 == 0


def test_live_shows_cells_and_results_and_no_settings(tmp_path: Path) -> None:
    spec = NotebookSpec(notebook="x", parameters={"num_samples": 32, "layer": 3})
    run = qtx.Run.create(spec, "x", tmp_path)
    run.log_many(
        {"num_samples": 32, "layer": 3, "sampler": s, "step": i, "error": e, "error_half_width": 0.1}
        for s, e in (("sobol", 0.25), ("halton", 0.75)) for i in range(2)
    )  # fmt: skip
    cells = [
        {"cell_type": "code", "source": "# why\nfit(model)", "metadata": {"papermill": facts}}
        for facts in ({"status": "completed", "duration": 2.0}, {"status": "running", "start_time": "?"}, {})
    ]
    (run.path / "x.ipynb").write_text(json.dumps({"cells": [*cells, {"cell_type": "markdown"}]}))
    page = DashboardPage(Records(tmp_path), "light", search="?view=Live")
    view = page.views["Live"]
    view.state()
    view.show(view.prepare(page.records.listing, page.records.listing.table))
    html = view.body[0].object
    assert "1 of 3 cells" in html
    assert "fit(model)" in html
    assert "step 1, error 0.75" in html
    assert "num_samples" not in html
    data = view.prepare(page.records.listing, page.records.listing.table)
    assert isinstance(data.runs[run.path.name], LiveRun)
    assert len(view.body[1].objects) == 1  # of the errors; and samplers are not averaged:
    assert {label.partition("/")[2] for label in view._pipes["error", "step"].data} == {"sobol", "halton"}
    for text in ("", "[]", '{"cells": [3]}', '{"cells": 3}'):
        (tmp_path / "broken.ipynb").write_text(text)
        assert read_cells(tmp_path / "broken.ipynb") is None
    run.finish("done")


def test_live_curves_of_samplers_have_their_colours_and_names_apart(tmp_path: Path) -> None:
    run = qtx.Run.create(NotebookSpec(notebook="x"), "x", tmp_path)
    run.log_many(
        {"num_samples": n, "sampler": s, "error": 1 / n, "bias": 0.1 - 1 / n}
        for n in (8, 64) for s in ("sobol", "halton", "head-tail")
    )  # fmt: skip
    page = DashboardPage(Records(tmp_path), "light", search="?view=Live")
    view = page.views["Live"]
    view.state()
    view.show(view.prepare(page.records.listing, page.records.listing.table))
    scales = []
    for pane in view.body[1].objects:
        plot = figures.hv.renderer("bokeh").get_plot(pane.object)
        scales.append([type(scale).__name__ for scale in (plot.state.x_scale, plot.state.y_scale)])
        drawn = list(plot.state.select({"type": GlyphRenderer}))
        colours = {x.glyph.line_color for x in drawn if not isinstance(x.glyph, Text)}
        assert {SAMPLER_COLOURS[name] for name in ("sobol", "halton", "head-tail")} <= colours
        (names,) = (x.data_source.data for x in drawn if isinstance(x.glyph, Text))
        assert {name.strip() for name in names["name"]} == {"sobol", "halton", "head-tail"}
        assert len(set(names["y"])) == 3
    assert scales == [["LogScale", "LogScale"], ["LogScale", "LinearScale"]]
    run.finish("done")


def test_a_mean_over_seeds_has_its_interval_also_where_it_is_zero() -> None:
    rows = listing_of(*({"results.error": x, "settings": "a", "seed": i} for i, x in enumerate((0.5, 0.5))))
    cell = _number_cell(RunGroup(rows.iloc[0], rows), "results.error", several=True)
    assert ">0.5 ± 0<" in cell
    rows["results.error"] = [0.5, 0.5 + 1e-11]
    cell = _number_cell(RunGroup(rows.iloc[0], rows), "results.error", several=True)
    assert "± <0.00000001" in cell


def test_two_runs_are_compared_line_by_line(tmp_path: Path) -> None:
    names = []
    for seed in (1, 2):
        with qtx.Run.create(ExperimentSpec(seed=seed), "x", tmp_path) as run:
            run.update(results={"error": 0.25 * seed, "error_half_width": 0.01, "same": 3})
            source = [f"draw({seed})", "plot()"]
            cells = [{"cell_type": "code", "source": "\n".join(source), "metadata": {}}]
            (run.path / "x.ipynb").write_text(json.dumps({"cells": cells}))
        names.append(run.path.name)
    page = DashboardPage(Records(tmp_path), "light", search=f"?view=Compare&ticked={'/'.join(names)}")
    view = page.view
    view.show(view.prepare(page.records.listing, page.records.listing.table))
    html = view.body[0].object
    assert "These runs differ in seed, the code of x.ipynb" in html
    assert "-draw(1)\n+draw(2)" in html
    assert "plot()" not in html
    assert "0.250 ± 0.010" in html
    assert "0.500 ± 0.010" in html
    assert "Environment: nothing differs" in html
    again = view.prepare(page.records.listing, page.records.listing.table)
    assert again is view.prepare(page.records.listing, page.records.listing.table)  # git is not asked again


def test_classical_draws_of_one_number_of_shots_are_seen() -> None:
    frame = pd.DataFrame({
        "run": ["a"], "device": ["fake_fez"], "loader": ["tree"], "mitigation": [""], "shots": [1024],
        "distance": [0.03], "half_width": [0.01], "classical": [0.04],
    })  # fmt: skip
    for shots, kind in (([1024], "Scatter"), ([256, 1024], "Curve")):
        several = pd.concat([frame.assign(shots=n) for n in shots])
        layers = list(figures.distance_against_shots(several, "light"))
        assert kind in {type(layer).__name__ for layer in layers if "classical" in map(str, layer.vdims)}


def test_devices_show_mitigated_rows_and_the_age_of_the_calibration(tmp_path: Path) -> None:
    with qtx.Run.create(NotebookSpec(notebook="x"), "mitigate", tmp_path) as run:
        run.log(
            row=3, device="fake_fez, noise × 2", loader="tree", shots=1024, distance=0.2, half_width=0.01,
            classical=0.03, mitigated=0.1, mitigated_half_width=0.02, mitigation="zne",
        )  # fmt: skip
        started = pd.Timestamp(run.manifest["started"])
        calibrated = (started - pd.Timedelta(hours=30)).isoformat()
        run.update(results={"facts": {"device": "fake_fez", "calibration": calibrated}})
    page = DashboardPage(Records(tmp_path), "light", search="?view=Devices")
    view = page.view
    view.show(view.prepare(page.records.listing, page.filtered(page.records.listing)))
    assert "tree on fake_fez, noise × 2 with zne, total variation 0.100 ± 0.020" in view.body[0].object
    caption = view.body[2].object
    assert "raw counts" in caption
    assert "1\N{NARROW NO-BREAK SPACE}024" in caption
    assert "30 h" in caption
    assert len(raw_and_mitigated(pd.DataFrame({"distance": [1.0], "mitigated": [None]}))) == 1


@pytest.mark.parametrize(
    "search",
    [
        "?view=No", "?view=Run", "?view=Run&run=../..", "?view=Compare&ticked=a/b/c", "?from=-3&sort=%00",
        "?view=Maps&draws=99999999999&layer=99&sampler=no&length=7", "?view=Error&samplers=%3Cb%3E/x",
        "?view=Sweeps&sweep=none&result=none", "?status=none&started=x", "?rows=x&columns=y&opened=z",
    ],
)  # fmt: skip
def test_any_address_opens_a_page(search: str, home: Path) -> None:
    page = DashboardPage(Records(home), "light", search=search)
    assert "could not be drawn" not in page.foot.object
    if page.open_name != "Maps":
        listing = page.records.listing
        page.view.show(page.view.prepare(listing, page.filtered(listing)))
    again = DashboardPage(page.records, "light", search=page.link())
    assert again.open_name == page.open_name
    assert again.query() == page.query()


def test_a_page_says_starting_until_the_dashboard_answers(tmp_path: Path) -> None:
    path = tmp_path / "socket"

    def ask() -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(path))
            client.sendall(b"GET /user/me/qtx-lab/ HTTP/1.0\r\n\r\n")
            return b"".join(iter(lambda: client.recv(4096), b""))

    with starting_page(path) as served:
        assert b"The dashboard is starting" in ask()
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:  # the dashboard takes its place
            other.bind(str(path))
            served.set()
    assert path.exists()
    with starting_page(path):
        assert b"http-equiv=refresh" in ask()
    assert not path.exists()


def test_ten_thousand_runs_are_paged(tmp_path: Path) -> None:
    from qtx_lab.widgets.dashboard.page import DashboardPage

    page = DashboardPage(Records(tmp_path), "light")
    n = 10_000
    table = pd.DataFrame(
        {
            "run": [f"r{i}" for i in range(n)], "name": "r", "status": "done", "seconds": 1.0,
            "seed": pd.array([0] * n, "Int64"),
            "started": pd.Timestamp("2026-11-23", tz="UTC"), "error": None, "report": False, "path": "",
        }
    )  # fmt: skip
    listing = type(page.records.listing)(9, table, (), pd.DataFrame())
    view = page.views["Runs"]
    view.show(view.prepare(listing, table))
    assert view.body[1].object.count("<tr>") == 21
    assert "1–20 of 10000" in view.body[2][2].object


def test_the_proxy_starts_what_the_command_line_has(tmp_path: Path) -> None:
    from importlib.metadata import entry_points

    from qtx_lab.widgets.dashboard import proxy

    (entry,) = (e for e in entry_points(group="jupyter_serverproxy_servers") if e.value.startswith("qtx_lab"))
    assert entry.name == proxy.NAME
    entry_settings = entry.load()()
    assert Path(entry_settings["launcher_entry"]["icon_path"]).is_file()
    command = [
        word.format(unix_socket=tmp_path / "socket", base_url="/user/me/")
        for word in entry_settings["command"]
    ]
    pipe = subprocess.PIPE
    process = subprocess.Popen([*command, "--home", str(tmp_path)], stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stdout is not None
        assert "unix socket" in process.stdout.readline()
        assert os.stat(tmp_path / "socket").st_mode & 0o077 == 0, "others may open the socket"
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert "leaked" not in errors  # as DuckDB says of what is open at the end
    assert json.dumps(entry_settings)
