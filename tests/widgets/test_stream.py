"""`MetricStream`: what the browser holds is what was fed, in order, from any thread."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtx_lab.errors import ArgumentError, DtypeError, ShapeError
from qtx_lab.storage import read_frame
from qtx_lab.widgets.views import stream as module
from qtx_lab.widgets.views.stream import BLOCK_POINTS, COLUMNS, MetricStream


class Browser:
    """The other end of the wire: takes what is sent as the view does."""

    def __init__(self, stream: MetricStream, lose: int | None = None):
        self.stream, self.lose, self.next = stream, lose, 0
        self.messages: list[float] = []
        self.points: dict[str, list[tuple[float, float]]] = {}
        stream.send = self.hear  # type: ignore[method-assign]

    def tell(self, **content: Any) -> None:
        threading.Thread(target=self.stream._receive, args=(content,)).start()

    def hear(self, content: dict[str, Any], buffers: list[bytes]) -> None:
        self.messages.append(time.monotonic())
        if self.lose is not None and len(self.messages) == self.lose:
            return
        if content["first"] > self.next and content["first"] > content["oldest"]:
            return self.tell(kind="want", next=self.next)
        skip = self.next - content["first"]
        columns = {name: np.frombuffer(b, COLUMNS[name]) for name, b in zip(COLUMNS, buffers, strict=True)}
        for which, x, y in zip(
            columns["series"][skip:], columns["x"][skip:], columns["y"][skip:], strict=True
        ):
            self.points.setdefault(content["names"][which], []).append((x, y))
        self.next = content["first"] + content["count"]
        return self.tell(kind="got", next=self.next)

    def wait(self, count: int, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while self.next < count and time.monotonic() < end:
            time.sleep(0.01)
        assert self.next == count


@pytest.mark.parametrize("lose", [None, 3])
def test_three_threads_and_a_lost_message(lose: int | None) -> None:
    stream = MetricStream()
    browser = Browser(stream, lose)
    browser.tell(kind="want", next=0)

    def feed(name: str) -> None:
        for i in range(300):
            stream.push(name, [2 * i, 2 * i + 1], [i, -i])
            time.sleep(0.001)

    threads = [threading.Thread(target=feed, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    browser.wait(1800)
    for name in "abc":
        assert browser.points[name] == [(j, (-1) ** j * (j // 2)) for j in range(600)]
    gaps = np.diff(browser.messages)
    assert len(gaps) == 0 or 1 / gaps.mean() <= 60


def test_a_late_view_gets_all_and_a_full_store_forgets_the_oldest() -> None:
    stream = MetricStream(capacity=2 * BLOCK_POINTS)
    count = 3 * BLOCK_POINTS + 5
    stream.push("a", np.arange(count), np.arange(count))
    browser = Browser(stream)
    browser.tell(kind="want", next=0)
    end = time.monotonic() + 30
    while browser.next < count and time.monotonic() < end:
        time.sleep(0.01)
    stored = len(stream.frame())
    assert BLOCK_POINTS < stored <= 2 * BLOCK_POINTS
    assert len(browser.points["a"]) == stored
    assert browser.points["a"][0][0] == count - stored


def test_without_answers_it_goes_on_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ACKNOWLEDGE_TIMEOUT_S", 0.2)
    stream = MetricStream()
    sent: list[int] = []
    stream.send = lambda content, buffers: sent.append(content["count"])  # type: ignore[method-assign]
    stream._receive({"kind": "want", "next": 0})
    start = time.monotonic()
    for i in range(100):
        stream.push("a", i, i)
        time.sleep(0.01)
    seconds = time.monotonic() - start
    assert sum(sent) > 50
    assert len(sent) <= module.MAX_UNACKNOWLEDGED + 1 + seconds / 0.2


def test_what_is_wrong_is_refused() -> None:
    stream = MetricStream()
    with pytest.raises(ShapeError, match="all must be"):
        stream.push("a", [1, 2], [1])
    with pytest.raises(ShapeError):
        stream.push("a", np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(ArgumentError, match="finite"):
        stream.push("a", np.nan, 1)
    with pytest.raises(DtypeError, match="y is no array of real numbers"):
        stream.push("a", 0, "much")
    with pytest.raises(ArgumentError, match="together"):
        stream.push("a", 1, 1, low=0)
    assert stream.frame().empty
    stream.push("a", 1, np.nan)
    stream.push("a", torch.tensor([2]), torch.ones(1, requires_grad=True))  # a loss
    assert stream.frame()["x"].tolist() == [1, 2]


def test_it_is_saved_as_picture_and_data(tmp_path: Path) -> None:
    stream = MetricStream("Loss", log_y=True)
    assert "image/png" in stream._repr_mimebundle_()[0]
    stream.push("train", [0, 1, 2], [3, 2, 1], [2, 1, 0.5], [4, 3, 2])
    for name, start in {
        "a.png": b"\x89PNG",
        "a.svg": b"<?xml",
        "a.csv": b"series,x",
        "a.parquet": b"PAR1",
    }.items():
        assert stream.save(tmp_path / name).read_bytes().startswith(start)
    assert read_frame(tmp_path / "a.parquet")["y"].tolist() == [3, 2, 1]


FEED = """
import threading, time, numpy as np
from qtx_lab import ExperimentSpec, Run
from qtx_lab.widgets.views.stream import MetricStream
stream = MetricStream("A run", x_label="step", y_label="loss", log_y=True)
sent = []
original = stream.send
def send(content, buffers=None):
    sent.append(time.monotonic()); original(content, buffers)
stream.send = send
stream
"""

RUN = """
run = Run.create(ExperimentSpec(), "stream")
rows, lock = [], threading.Lock()
threads = set()
def feed(name, total, seconds, parts):
    me = threading.current_thread()
    side = "subshell" if "ubshell" in me.name else "worker"
    threads.add(("main" if me is threading.main_thread() else side, me.name))
    random, start = np.random.default_rng(len(name)), time.monotonic()
    for i, x in enumerate(np.array_split(np.arange(total, dtype=float), parts)):
        y = np.exp(-x / total * 3) + 0.1 + 0.05 * random.random(len(x))
        stream.push(name, x, y, y - 0.1, y + 0.1)
        with lock:
            rows.append((name, x, y))
        time.sleep(max(0, start + (i + 1) * seconds / parts - time.monotonic()))
def keep():
    run.log_many([{"series": n, "x": float(a), "y": float(b)} for n, x, y in rows for a, b in zip(x, y)])
    run.finish("done")
"""

BUTTON = """
import ipywidgets
button = ipywidgets.Button(description="feed on a subshell")
from qtx_lab.widgets.comms import hear_while_busy
hear_while_busy(button)
button.on_click(lambda _: feed("head-tail", {}, 8, 160))
button
"""

HELD = """
async () => {
  const out = {};
  for (const [name, series] of document.querySelector(".qtx-stream").qtxStore.series) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", series.bytes()));
    out[name] = [series.count, [...digest].map((x) => x.toString(16).padStart(2, "0")).join("")];
  }
  return out;
}
"""


def digest(frame: Any) -> list[Any]:
    content = frame["x"].to_numpy(float).tobytes() + frame["y"].to_numpy(float).tobytes()
    return [len(frame), hashlib.sha256(content).hexdigest()]


def heap(session: Any) -> float:
    session.send("HeapProfiler.collectGarbage")
    usage = session.send("Runtime.getHeapUsage")
    return (usage["usedSize"] + usage.get("backingStorageSize", 0)) / 1e6


@pytest.mark.ui
def test_in_jupyterlab(
    page: Any, lab: Any, soak: bool, open_notebook: Callable[..., Any], run_all: Callable[..., None],
    run_python: Callable[..., None], set_theme: Callable[..., None], shoot: Callable[..., Any],
    axe: Callable[..., list[str]],
) -> None:  # fmt: skip
    total = 1_000_000 if soak else 100_000
    each = total // 4
    open_notebook(page, [FEED, RUN, BUTTON.format(each)])
    run_all(page)
    view = page.locator(".qtx-stream")
    view.wait_for()
    session = page.context.new_cdp_session(page)
    before = heap(session)
    # In the worker and the main thread of the kernel; the click is handled on a subshell, while the main
    # thread is busy.
    feeds = f"""
worker = threading.Thread(target=feed, args=("systematic", {each}, 10, 200))
worker.start()
feed("monte-carlo", {total - 2 * each}, 10, 200)
worker.join()
"""
    run_python(page, feeds, wait=False)
    page.get_by_role("button", name="feed on a subshell").click()
    page.wait_for_function(f"() => document.querySelector('.qtx-stream').dataset.points === '{total}'")
    run_python(page, "keep(); assert {thread for thread, _ in threads} >= {'subshell', 'main'}, threads")
    page.wait_for_timeout(500)
    view.scroll_into_view_if_needed()
    shoot(page, "stream-light")
    growth = heap(session) - before
    held = page.evaluate(HELD)
    (path,) = lab.home.glob("*-stream-*/metrics.parquet")
    recorded = read_frame(path)
    path.parent.rename(path.parent.parent / ".seen")
    for name, part in recorded.groupby("series", sort=False):
        assert held[name] == digest(part)
    run_python(
        page,
        f"assert len(sent) <= 60 * (sent[-1] - sent[0]), len(sent)\nassert len(stream.frame()) == {total}",
    )
    print(f"{total} points: the browser's heap grew by {growth:.1f} MB")
    assert growth < 50
    assert "gaps" not in view.locator(".qtx-status").inner_text()
    plot = view.get_by_role("application")
    plot.focus()
    plot.press("+")
    page.wait_for_timeout(200)
    view.get_by_label("logarithmic y").uncheck()
    run_python(page, "stream.finish()")  # displays anew, with a picture for the saved notebook
    page.wait_for_function(f"() => document.querySelector('.qtx-stream').dataset.points === '{total}'")
    set_theme(page, "dark")
    view.get_by_role("button", name="Pause").click()
    run_python(page, "stream.push('monte-carlo', [1e6, 1e6 + 1], [1, 1])")
    page.wait_for_function("() => document.querySelector('.qtx-stream').textContent.includes('2 came since')")
    widths = "() => ['.qtx-plot', '.qtx-plot canvas'].map((of) => document.querySelector(of).clientWidth)"
    page.wait_for_function(f"() => {{ const [a, b] = ({widths})(); return a > 0 && a === b; }}")
    shoot(page, "stream-dark")
    assert axe(page, ".qtx-stream") == []
