"""JupyterLab itself, driven by the fixtures: a cell runs, errors are noticed, nothing leaves the machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import free_port, stop, wait_for

pytestmark = pytest.mark.ui


FIGURE = """
import matplotlib.pyplot as plt, pandas as pd, qtx_lab as qtx
draw = lambda data, theme: plt.figure(figsize=(2, 1), facecolor={"light": "white", "dark": "black"}[theme])
run = qtx.Run.create(qtx.ExperimentSpec(), "trial")
run.save_figure("empty", draw, pd.DataFrame({"x": [1.0]}), "What is drawn.")
"""

MIDDLE = """(image) => {
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext("2d");
  canvas.drawImage(image, 0, 0);
  return [...canvas.getImageData(image.naturalWidth / 2, image.naturalHeight / 2, 1, 1).data.slice(0, 3)];
}"""


def test_a_notebook_runs_in_both_themes(
    page: Any, open_notebook: Callable[..., Any], run_all: Callable[..., None], set_theme: Callable[..., None]
) -> None:
    open_notebook(page, ["import os; print(6 * 7, os.environ['QTX_LAB_HOME'])", FIGURE])
    run_all(page)
    assert page.locator(".jp-OutputArea-output").first.inner_text().startswith("42 ")
    output = page.locator(".jp-OutputArea-output").last
    assert "What is drawn." in output.inner_text()
    middles = {}
    for theme in ("dark", "light"):
        set_theme(page, theme)
        (seen,) = (image for image in output.locator("img").all() if image.is_visible())
        middles[theme] = seen.evaluate(MIDDLE)
    assert middles == {"dark": [0, 0, 0], "light": [255, 255, 255]}


def test_an_error_in_a_cell_is_noticed(
    page: Any, open_notebook: Callable[..., Any], run_all: Callable[..., None]
) -> None:
    open_notebook(page, ["1 / 0"])
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_all(page)


def test_the_watch_sees_errors_and_strangers(browser: Any, page: Any) -> None:
    page.set_content("<script>console.error('planted'); fetch('http://192.0.2.1/x').catch(() => 0)</script>")
    page.wait_for_timeout(200)
    assert any("planted" in error for error in page.watch.errors)
    assert page.watch.requests == ["http://192.0.2.1/x"]
    page.watch.errors.clear()
    page.watch.requests.clear()


@pytest.mark.parametrize("own", [None, "true"])
def test_the_lab_asks_for_no_news_unless_somebody_wants_them(own: str | None, tmp_path: Path) -> None:
    """JupyterLab asks whether one wants news where the setting is neither "true" nor "false"."""
    port, log = free_port(), tmp_path / "jupyter.log"
    folders = {
        name: str(tmp_path / name.lower())
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    }
    settings = tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    if own is not None:
        (settings / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": own}))
    environment = {**os.environ, **folders, "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings")}
    command = [
        *(sys.executable, "-m", "qtx_lab.cli", "lab", "--no-browser", "--allow-root"),
        *(f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=token"),
    ]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(f"{url}/api?token=token", process, log)
        address = f"{url}/lab/api/settings/@jupyterlab/apputils-extension:notification?token=token"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address) as answer:
            known = json.loads(answer.read())
        assert known["schema"]["properties"]["fetchNews"]["default"] == "false"
        assert known["schema"]["properties"]["checkForUpdates"]["default"] is False
        assert known["settings"].get("fetchNews") == own
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the command and the server that it waits for
        stop(process)
