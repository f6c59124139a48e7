"""The process that a test kills: it submits rows and waits for them, or fetches rows submitted before."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from ibm_cloud_sdk_core.token_managers.token_manager import TokenManager
from urllib3.util.retry import Retry

from qtx_lab.backends import QiskitQuantumBackend
from qtx_lab.backends.ibm import engine as engine_module
from qtx_lab.backends.ibm import jobs, submission
from qtx_lab.backends.ibm.engine import IBMEngine
from qtx_lab.backends.requests import RowRequest
from qtx_lab.circuits import check_rows, make_loader
from qtx_lab.errors import BackendUnavailable, CostError, JobTimeout
from qtx_lab.mitigation import CircuitMitigation, ZeroNoiseExtrapolation, find_mitigated_calls, readout
from qtx_lab.mitigation.calls import MitigatedCall

SHOTS = 50
BUDGET = "20 s"
"""Of a schedule of faults, in which a job takes two seconds, and a mitigated call six jobs."""
P = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)


def client(action: str, environment: dict[str, str], result: str) -> None:
    """Run an action in this process, with short delays, and write what it returns to the file `result`."""
    os.environ.update(environment)
    jobs.FIRST_POLL_DELAY_S, jobs.LAST_POLL_DELAY_S = 0.01, 0.05
    submission.LISTING_LAG_S, submission.NEVER_ARRIVED_S = 0.4, 0.5
    submission.FIRST_RETRY_DELAY_S, submission.LAST_RETRY_DELAY_S = 0.01, 0.05
    Retry._sleep_backoff = lambda retry: None
    TokenManager.paced_request_token = _ask_for_a_token  # IBM's own waits a minute after a failure
    answer = {
        "submit": _submit,
        "recover": _recover,
        "spend": _spend,
        "split": _split,
        "mitigate": _mitigate,
        "rest": _rest,
        "again": _again,
    }[action]()
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


def _split() -> Any:
    """Submit rows as two jobs of one batch, within a budget."""
    engine_module.MAX_EXECUTIONS_PER_JOB = SHOTS
    engine, loader = IBMEngine("ibm_lagos", mode="batch", budget=BUDGET, patience=0.3), make_loader("dynamic")
    try:
        circuit = engine.transpile(loader.circuit(2), 0)
        request = RowRequest(check_rows(P), loader, SHOTS, seed=1)
        return _counts(engine.submit(circuit, request.bindings(), SHOTS, request))
    except (BackendUnavailable, CostError) as error:
        return str(error)


def _mitigate() -> Any:
    """Measure mitigated rows: four calibrations and two noise levels, within a budget."""
    readout.CALIBRATION_SHOTS = 100
    options = {"optimization_level": 0, "budget": BUDGET, "patience": 0.3}
    backend = QiskitQuantumBackend("ibm", "ibm_lagos", loader="tree", **options)
    mitigation = CircuitMitigation(ZeroNoiseExtrapolation([1, 3], "linear"), readout=True)
    try:
        result = mitigation.sample_rows(backend, P, SHOTS, generator=torch.Generator().manual_seed(1))
        return _estimate(result)
    except (BackendUnavailable, CostError) as error:
        return str(error)


def _rest(again: bool = False) -> dict[str, Any]:
    """Send what was not sent, and fetch everything: counts of rows, and estimates of calls, by their tags."""
    out: dict[str, Any] = {}
    for job in jobs.find_jobs():
        if isinstance(job.request(), RowRequest):
            out[job.tag] = _sent(job, again, lambda job=job: _counts(job))
    for call in find_mitigated_calls():
        out[call.tag] = _sent(
            call, again, lambda call=call: _estimate(call.counts(progress=False, patience=2))
        )
    return out


def _again() -> dict[str, Any]:
    """The same, and run again what was deleted or refused."""
    return _rest(again=True)


def _sent(what: Any, again: bool, fetch: Any) -> Any:
    try:
        what.send_rest(again=again, patience=2, progress=False)
        return fetch()
    except (BackendUnavailable, CostError, JobTimeout) as error:
        _fetch_what_ran(what.record.job_tags if isinstance(what, MitigatedCall) else [what.tag])
        return str(error)


def _fetch_what_ran(tags: list[str]) -> None:
    """Fetch the parts that ran of jobs that cannot be measured whole."""
    for job in jobs.find_jobs():
        if job.tag in tags:
            with suppress(BackendUnavailable, JobTimeout):
                if isinstance(job.request(), RowRequest):
                    job.counts(5.0, partial=True, progress=False)
                else:
                    job.outcomes(5.0, progress=False)


def _estimate(result: Any) -> dict[str, Any]:
    names = ("counts", "estimate", "std_error")
    return {
        **{name: getattr(result, name).tolist() for name in names},
        "calibration": result.diagnostics["calibration"],
    }


def _counts(job: jobs.DeviceJob) -> Any:
    try:
        return job.counts(progress=False, patience=2).counts.tolist()
    except BackendUnavailable as error:
        return str(error)


if __name__ == "__main__":
    client(*arguments)  # type: ignore[name-defined]  # noqa: F821  handed in by runpy
