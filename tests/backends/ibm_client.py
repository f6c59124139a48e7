"""The process that a test kills: it submits rows and waits for them, or fetches rows submitted before."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from ibm_cloud_sdk_core.token_managers.token_manager import TokenManager
from urllib3.util.retry import Retry

from qtx_lab.backends.ibm import jobs
from qtx_lab.backends.ibm.engine import IBMEngine
from qtx_lab.backends.requests import RowRequest
from qtx_lab.circuits import check_rows, make_loader
from qtx_lab.errors import BackendUnavailable, CostError

SHOTS = 50
P = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)


def client(action: str, environment: dict[str, str], result: str) -> None:
    """Run an action in this process, with short delays, and write what it returns to the file `result`."""
    os.environ.update(environment)
    jobs.LISTING_LAG_S, jobs.FIRST_POLL_DELAY_S, jobs.LAST_POLL_DELAY_S = 0.4, 0.01, 0.05
    jobs.FIRST_RETRY_DELAY_S, jobs.LAST_RETRY_DELAY_S, jobs.NEVER_ARRIVED_S = 0.01, 0.05, 0.5
    Retry._sleep_backoff = lambda retry: None
    TokenManager.paced_request_token = _ask_for_a_token  # IBM's own waits a minute after a failure
    answer = {"submit": _submit, "recover": _recover, "spend": _spend}[action]()
    Path(result).write_text(json.dumps(answer))


def _ask_for_a_token(manager: TokenManager) -> None:
    if manager._is_token_expired():
        manager._save_token_info(manager.request_token())


def _submit() -> dict[str, Any]:
    engine, loader = IBMEngine("ibm_lagos"), make_loader("dynamic")
    try:
        circuit = engine.transpile(loader.circuit(2), 0)
        request = RowRequest(check_rows(P), loader, SHOTS, seed=1)
        job = engine.submit(circuit, request.bindings(), SHOTS, request)
        return {job.tag: _counts(job)}
    except BackendUnavailable as error:
        return {"error": str(error)}


def _recover() -> dict[str, Any]:
    return {job.tag: _counts(job) for job in jobs.find_jobs()}


def _spend() -> int:
    """Submit rows one after the other, as a loop that was forgotten does, until there is no budget left."""
    engine, loader = IBMEngine("ibm_lagos", budget="21 s"), make_loader("dynamic")
    circuit = engine.transpile(loader.circuit(2), 0)
    request = RowRequest(check_rows(P), loader, SHOTS, seed=1)
    for sent in range(20):
        try:
            engine.submit(circuit, request.bindings(), SHOTS, request)
        except CostError:
            return sent
    return 20


def _counts(job: jobs.DeviceJob) -> Any:
    try:
        return job.counts(progress=False, patience=2).counts.tolist()
    except BackendUnavailable as error:
        return str(error)


if __name__ == "__main__":
    client(*arguments)  # type: ignore[name-defined]  # noqa: F821  handed in by runpy
