"""Fixtures of the backends' tests: a loopback IBM cloud, and an empty folder for jobs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def _server_module() -> Any:
    """The module in `ibm_server.py`, which is in no package, imported once."""
    if "ibm_server" not in sys.modules:
        spec = importlib.util.spec_from_file_location("ibm_server", HERE / "ibm_server.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["ibm_server"] = module
        spec.loader.exec_module(module)
    return sys.modules["ibm_server"]


@pytest.fixture
def ibm() -> Any:
    """The module `ibm_server`."""
    return _server_module()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short delays between two questions to the server, and between the attempts of IBM's client."""
    from urllib3.util.retry import Retry

    from qtx_lab.backends.ibm import jobs, submission

    monkeypatch.setattr(Retry, "_sleep_backoff", lambda retry: None)

    monkeypatch.setattr(jobs, "FIRST_POLL_DELAY_S", 0.01)
    monkeypatch.setattr(jobs, "LAST_POLL_DELAY_S", 0.05)
    monkeypatch.setattr(submission, "LISTING_LAG_S", 0.6)
    monkeypatch.setattr(submission, "FIRST_RETRY_DELAY_S", 0.02)
    monkeypatch.setattr(submission, "LAST_RETRY_DELAY_S", 0.1)
    monkeypatch.setattr(submission, "REFUSAL_CHECK_S", 0.3)


@pytest.fixture(scope="module")
def lagos() -> Iterator[Any]:
    """A server with a device of 7 qubits, for all tests of a file."""
    with _server_module().IBMServer() as server:
        yield server


@pytest.fixture
def cloud(lagos: Any, quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """That server in its first state, as the account of the environment; jobs are recorded in `tmp_path`."""
    lagos.reset()
    monkeypatch.setenv("QTX_LAB_HOME", str(tmp_path))
    for name, value in lagos.environment().items():
        monkeypatch.setenv(name, value)
    return lagos


@pytest.fixture(scope="module")
def logged_in(lagos: Any) -> Any:
    """IBM's client, logged in to that server once."""
    from qiskit_ibm_runtime import QiskitRuntimeService

    lagos.reset()
    with _server_module().environment(lagos.environment()):
        return QiskitRuntimeService()


@pytest.fixture
def no_account(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which no account is saved."""
    from qiskit_ibm_runtime.accounts import management

    for name in ("QISKIT_IBM_TOKEN", "QISKIT_IBM_INSTANCE", "QISKIT_IBM_URL", "QISKIT_IBM_CHANNEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QTX_LAB_HOME", str(tmp_path))
    monkeypatch.setattr(management, "_DEFAULT_ACCOUNT_CONFIG_JSON_FILE", str(tmp_path / "accounts.json"))
