"""`JobTable`: jobs and runs of a folder, against the loopback server and in a real browser."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from qtx_lab import ExperimentSpec, Run
from qtx_lab.backends.ibm.ledger import Block, record_job
from qtx_lab.errors import ArgumentError
from qtx_lab.widgets.views.job_table import JobTable

SERVER = Path(__file__).parents[1] / "backends" / "ibm_server.py"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """The loopback IBM cloud of the backends' tests."""
    if "ibm_server" not in sys.modules:
        spec = importlib.util.spec_from_file_location("ibm_server", SERVER)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["ibm_server"] = module
        spec.loader.exec_module(module)
    with sys.modules["ibm_server"].IBMServer() as server:
        yield server


def recorded_messages(table: JobTable) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    table.send = lambda content, buffers=None: sent.append(content)  # type: ignore[method-assign]
    return sent


def fill(home: Path) -> str:
    """Two runs and three jobs that no server knows; the tag of the last."""
    with Run.create(ExperimentSpec(seed=1), "trial", home):
        pass
    run = Run.create(ExperimentSpec(seed=2), "other", home)
    run.finish("failed", "it broke")
    for folder, state in ((home / "jobs", "done"), (run.path / "jobs", "failed"), (home / "jobs", "queued")):
        path = record_job(
            folder, None, [Block(0, 2, 100)],
            provider="ibm", device="ibm_lagos", instance=None, region=None, circuits=2, shots=100,
        )  # fmt: skip
        record = json.loads(path.read_text())
        record["parts"][0]["state"] = state
        path.write_text(json.dumps(record))
    (home / "jobs" / "broken.json").write_text("{")
    return path.stem


def test_states_are_not_called_new_where_no_server_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QISKIT_IBM_TOKEN", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where no account is saved
    fill(tmp_path)
    table = JobTable(tmp_path)
    sent = recorded_messages(table)
    table._receive({"kind": "list", "ask": True})
    assert table._worker.join(60)
    assert not sent[0]["from_servers"]
    assert any("states are those last known" in problem for problem in sent[0]["problems"])


def test_all_jobs_and_runs_are_listed_and_broken_records_are_named(tmp_path: Path) -> None:
    tag = fill(tmp_path)
    table = JobTable(tmp_path)
    sent = recorded_messages(table)
    table._receive({"kind": "list", "ask": False})
    assert table._worker.join(30)
    (message,) = sent
    assert sorted(job["state"] for job in message["jobs"]) == ["done", "failed", "queued"]
    assert sorted((run["name"], run["status"]) for run in message["runs"]) == [
        ("other", "failed"),
        ("trial", "done"),
    ]
    assert any("broken.json" in problem for problem in message["problems"])
    json.dumps(message)
    table._receive({"kind": "open", "tag": tag})
    table._receive({"kind": "open", "run": message["runs"][0]["run"]})
    assert table._worker.join(30)
    assert table.opened.endswith(message["runs"][0]["run"])
    assert [m["kind"] for m in sent[1:]] in (["details"], ["details", "details"])
    frame = table.frame()
    assert len(frame) == 3
    assert set(frame["state"]) == {"done", "failed", "queued"}
    table._receive({"kind": "open", "run": "../../etc"})
    table._receive({"kind": "cancel", "tag": "no such"})
    assert table._worker.join(30)
    assert [m["kind"] for m in sent[-3:]].count("error") == 2
    with pytest.raises(ArgumentError, match="no job has it"):
        table.cancel("no such")


def test_it_is_saved_as_picture_and_data(tmp_path: Path) -> None:
    assert "image/png" in JobTable(tmp_path)._repr_mimebundle_()[0]
    fill(tmp_path)
    table = JobTable(tmp_path)
    for name, start in {
        "a.png": b"\x89PNG",
        "a.svg": b"<?xml",
        "a.csv": b"tag,run",
        "a.parquet": b"PAR1",
    }.items():
        assert table.save(tmp_path / name).read_bytes().startswith(start)


CELL = """
import qtx_lab as qtx, torch
from qtx_lab.widgets.views.job_table import JobTable
backend = qtx.QiskitQuantumBackend("ibm", "ibm_lagos", shots=64)
generators = [torch.Generator().manual_seed(i) for i in range(2)]
jobs = [backend.submit_rows(torch.tensor([[0.5, 0.5]]), generator=g) for g in generators]
table = JobTable()
table
"""


LINES = """(e) => {
  const range = document.createRange();
  range.selectNodeContents(e);
  return new Set([...range.getClientRects()].map((box) => box.top)).size;
}"""
"""Lines that a text takes."""


@pytest.mark.ui
@pytest.mark.hardware
def test_in_jupyterlab(
    page: Any, lab: Any, server: Any, open_notebook: Callable[..., Any], run_all: Callable[..., None],
    run_python: Callable[..., None], set_theme: Callable[..., None], shoot: Callable[..., Any],
    axe: Callable[..., list[str]],
) -> None:  # fmt: skip
    server.reset()
    server.polls_in_queue = 1_000_000
    environment = f"import os; os.environ.update({server.environment()!r})"
    open_notebook(page, [environment, CELL])
    run_all(page)
    view = page.locator(".qtx-jobs")
    view.get_by_role("button", name="Refresh").click()
    page.wait_for_function(
        "() => document.querySelector('.qtx-jobs').textContent.includes('as the servers say now')"
    )
    view.scroll_into_view_if_needed()
    shoot(page, "jobs-light")
    expect(view.locator("tbody tr")).to_have_count(2)
    assert view.locator("tbody .qtx-device").first.evaluate(LINES) == 1
    view.get_by_role("button", name="open qtx-").first.click()
    view.locator("details pre").wait_for()
    cancel = view.get_by_role("button", name="cancel qtx-")
    cancel.first.focus()
    page.keyboard.press("Enter")
    view.get_by_role("button", name="really cancel").wait_for()
    page.keyboard.press("Enter")
    view.locator("tbody .qtx-state-cancelled").wait_for()
    expect(cancel).to_have_count(1)
    run_python(page, "assert sorted(str(job.last_known) for job in jobs)[0].startswith('cancelled')")
    view.get_by_label("state").select_option("cancelled")
    expect(view.locator("tbody tr")).to_have_count(1)
    set_theme(page, "dark")
    shoot(page, "jobs-dark")
    assert axe(page, ".qtx-jobs") == []
