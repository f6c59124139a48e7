"""JupyterLab itself, driven by the fixtures: a cell runs, errors are noticed, nothing leaves the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.ui


def test_a_notebook_runs_in_both_themes(
    page: Any, open_notebook: Callable[..., Any], run_all: Callable[..., None], set_theme: Callable[..., None]
) -> None:
    open_notebook(page, ["import os; print(6 * 7, os.environ['QTX_LAB_HOME'])"])
    run_all(page)
    assert page.locator(".jp-OutputArea-output").first.inner_text().startswith("42 ")
    set_theme(page, "dark")
    set_theme(page, "light")


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
