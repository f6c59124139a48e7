"""A real JupyterLab and a real browser for the tests of the widgets, and what both must never do."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
import pytest

HERE = Path(__file__).parent
SCREENSHOTS = HERE.parent / "screenshots"
SOURCES = HERE.parents[1] / "widgets"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

NOISE = re.compile("|".join([
    r"WebSocket connection to 'ws://127\.0\.0\.1.* failed",  # of a kernel that restarts
]))  # fmt: skip
"""Console errors that JupyterLab itself makes, with or without qtx_lab."""


def chromium() -> str:
    """The system's Chromium. Without it CI fails, and other tests are skipped with a hint."""
    for name in CHROMIUM:
        if path := shutil.which(name):
            return path
    hint = "No Chromium: `apt-get install chromium` (Debian), or put a Chrome on the PATH."
    if os.environ.get("CI"):
        pytest.fail(hint, pytrace=False)
    pytest.skip(hint)


@dataclass
class Watch:
    """Errors and requests of a page that must not happen."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def attach(self, page: Any) -> None:
        """Record a page's errors, and its requests that leave the machine."""
        page.on("pageerror", lambda error: self.errors.append(f"page error: {error.stack or error}"))
        page.on("console", self._console)
        page.on("request", lambda request: self._address(request.url))
        page.on("websocket", lambda websocket: self._address(websocket.url))

    def _console(self, message: Any) -> None:
        if message.type == "error" and not NOISE.search(message.text):
            self.errors.append(f"console: {message.text} ({message.location.get('url', '')})")

    def _address(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https", "ws", "wss") and not is_loopback(parts.hostname or ""):
            self.requests.append(url)

    def check(self) -> None:
        """Fail if the page had an error or left the machine."""
        assert self.errors == []
        assert self.requests == []


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# Module, not session: while Playwright's synchronous interface is up, an asyncio loop runs in this thread,
# and a test of another room that starts its own would be refused.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright."""
    path = chromium()
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)  # as long as a page waits
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=[
                "--no-sandbox",
                "--disable-background-networking",
                "--disable-component-update",
                "--no-proxy-server",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def module_page(browser: Any) -> Iterator[Any]:
    """A page of 1280 × 800 that the tests of a module share, because to load one may take longer than a test.

    `module_page.watch` knows its errors and its requests that left this machine.
    """
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    page, watch = context.new_page(), Watch()
    page.set_default_timeout(60_000)
    watch.attach(page)
    page.watch = watch
    yield page
    context.close()
    watch.check()


@pytest.fixture
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """An empty page of 1280 × 800; fails at the end if it had an error, or a request left this machine.

    Its last picture is saved as `end-<file>-<test>.png`, whether the test passes or not.
    """
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    page, watch = context.new_page(), Watch()
    page.set_default_timeout(60_000)
    watch.attach(page)
    page.watch = watch  # a test that means to make an error takes it out of `page.watch.errors`
    yield page
    SCREENSHOTS.mkdir(exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{request.node.path.stem}-{request.node.name}")
    page.screenshot(path=SCREENSHOTS / f"end-{name}.png")
    context.close()
    watch.check()


@dataclass(frozen=True)
class Lab:
    """A JupyterLab server that runs."""

    url: str
    token: str
    notebooks: Path
    home: Path
    """QTX_LAB_HOME of its kernels."""
    log: Path


def free_port() -> int:
    """A loopback port on which nobody listens.

    It is below those that systems give to connections: any process could get one of these before the server
    that this one is for has bound it.
    """
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def stop(process: subprocess.Popen[Any]) -> None:
    """End a server that a fixture started, and wait for it."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for(url: str, process: subprocess.Popen[Any], log: Path, seconds: float = 90) -> None:
    """Wait until a server answers; fails with the end of its log."""
    end = time.monotonic() + seconds
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < end and process.poll() is None:
        try:
            with opener.open(url, timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    stop(process)
    pytest.fail(f"No answer from {url}\n{log.read_text()[-4000:]}", pytrace=False)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A real JupyterLab on a loopback port, with settings, notebooks and runs of its own."""
    chromium()  # before a server is started for nothing
    folder = tmp_path_factory.mktemp("lab")
    port, token = free_port(), secrets.token_hex(16)
    lab = Lab(
        f"http://127.0.0.1:{port}", token, folder / "notebooks", folder / "runs", folder / "jupyter.log"
    )
    for directory in (lab.notebooks, lab.home):
        directory.mkdir()
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    own = {
        name: str(folder / name.lower())
        for name in (
            "IPYTHONDIR",
            "JUPYTER_CONFIG_DIR",
            "JUPYTER_DATA_DIR",
            "JUPYTER_RUNTIME_DIR",
            "JUPYTERLAB_WORKSPACES_DIR",
        )
    }
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "QTX_LAB_HOME": str(lab.home)}
    command = [
        sys.executable,
        *("-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"),
        *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"),
        *(f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={lab.notebooks}"),
        *("--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"),
        "--LabApp.extension_manager=readonly",
    ]
    with lab.log.open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT, cwd=folder
        )
    try:
        wait_for(f"{lab.url}/api?token={token}", process, lab.log)
        yield lab
    finally:
        stop(process)


def wait_for_splash(page: Any) -> None:
    """Wait until JupyterLab's start screen is gone; a change of theme in its last 200 ms is an error."""
    page.wait_for_function("() => !document.getElementById('jupyterlab-splash')")


@pytest.fixture
def open_notebook(lab: Lab) -> Callable[..., Path]:
    """`open_notebook(page, cells)`: a new notebook in JupyterLab, its kernel ready, in the light theme."""

    def open_notebook(page: Any, cells: list[str], name: str | None = None) -> Path:
        path = lab.notebooks / f"{name or 'test-' + secrets.token_hex(4)}.ipynb"
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        )
        nbformat.write(notebook, path)
        page.goto(f"{lab.url}/lab/tree/{path.name}?reset&token={lab.token}")
        page.wait_for_function(
            """() => {
              const panel = window.jupyterapp?.shell.currentWidget; const kernel =
              panel?.sessionContext?.session?.kernel; return panel?.context?.isReady &&
              kernel?.connectionStatus === "connected" && kernel.status === "idle";
            }"""
        )
        wait_for_splash(page)
        page.evaluate("""async () => {
          const { commands, shell } = window.jupyterapp;
          if (!shell.leftCollapsed) await commands.execute("application:toggle-left-area");
          if (document.body.dataset.jpThemeLight !== "true") // the theme of the last test stays
            await commands.execute("apputils:change-theme", { theme: "JupyterLab Light" });
        }""")
        page.wait_for_function("() => document.body.dataset.jpThemeLight === 'true'")
        wait_for_splash(page)
        return path

    return open_notebook


@pytest.fixture
def run_all() -> Callable[..., None]:
    """`run_all(page)`: run every cell of the notebook; fails with the error of a cell."""

    def run_all(page: Any, *, wait: bool = True) -> None:
        page.evaluate(
            f"async () => {{ const done = window.jupyterapp.commands.execute('notebook:run-all-cells');"
            f"{'await done;' if wait else ''} }}"
        )
        if wait:
            errors = page.evaluate(
                """() => window.jupyterapp.shell.currentWidget.content.widgets.flatMap((cell) =>
                  (cell.model.sharedModel.outputs ?? []).filter((o) => o.output_type === "error")
                    .map((o) => [o.ename, o.evalue, ...o.traceback].join("\\n")))"""
            )
            assert errors == []

    return run_all


@pytest.fixture
def set_theme() -> Callable[..., None]:
    """`set_theme(page, "dark")`, or "light": JupyterLab's."""

    def set_theme(page: Any, theme: str) -> None:
        name = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}[theme]
        page.evaluate(
            "(theme) => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", name
        )
        light = "true" if theme == "light" else "false"
        page.wait_for_function(f"() => document.body.dataset.jpThemeLight === '{light}'")
        page.wait_for_timeout(300)  # the style sheet comes after the mark
        wait_for_splash(page)

    return set_theme


@pytest.fixture
def run_python(lab: Lab) -> Callable[..., None]:
    """`run_python(page, code)`: in the notebook's kernel, beside its cells; fails with its error."""

    def run_python(page: Any, code: str, *, wait: bool = True) -> None:
        error = page.evaluate(
            """async ([code, wait]) => {
              const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel; const future
              = kernel.requestExecute({ code, stop_on_error: false }); if (!wait) return null; const reply =
              (await future.done).content; return reply.status === "ok" ? null : [reply.ename, reply.evalue,
              ...(reply.traceback ?? [])].join("\\n");
            }""",
            [code, wait],
        )
        assert error is None, error

    return run_python


@pytest.fixture
def shoot() -> Callable[..., Path]:
    """`shoot(page, name)`: save a screenshot of a page or of an element in `tests/screenshots/`."""

    def shoot(what: Any, name: str) -> Path:
        SCREENSHOTS.mkdir(exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        what.screenshot(path=path)
        return path

    return shoot


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """What `widgets/package-lock.json` pins, as `make test` installed it; without npm the test is skipped.

    It is not installed here: workers that did so side by side would remove each other's modules.
    """
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: it is needed to check the bundle and for axe-core.")
    stamp, lock = SOURCES / "node_modules" / ".package-lock.json", SOURCES / "package-lock.json"
    if not stamp.exists() or stamp.stat().st_mtime < lock.stat().st_mtime:
        pytest.fail(
            "widgets/node_modules is missing or older than package-lock.json: "
            "`make test` installs it, or `npm ci` in widgets/"
        )
    return stamp.parent


@pytest.fixture
def axe(node_modules: Path) -> Callable[..., list[str]]:
    """`axe(page, selector)`: what axe-core calls serious or critical there."""
    source = (node_modules / "axe-core" / "axe.min.js").read_text(encoding="utf-8")

    def axe(page: Any, selector: str) -> list[str]:
        # JupyterLab's AMD loader would take axe for a module of its own.
        page.evaluate(f"() => {{ const define = undefined, module = undefined; {source} }}")
        violations = page.evaluate(
            "async (selector) => "
            "(await window.axe.run(selector, { resultTypes: ['violations'] })).violations",
            selector,
        )
        return [
            f"{v['id']} ({v['impact']}): {v['help']}: {[node['html'][:160] for node in v['nodes']]}"
            for v in violations
            if v["impact"] in ("serious", "critical")
        ]

    return axe
