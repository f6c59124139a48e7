"""Mitigated calls on a device: any process makes the same result, whatever was killed before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qtx_lab as qtx
from qtx_lab.backends.base import JobState
from qtx_lab.backends.requests import CalibrationRequest, MitigatedRowRequest
from qtx_lab.circuits import TreeLoader
from qtx_lab.mitigation import (
    CircuitMitigation,
    SharedDecay,
    TwoCopyLoader,
    ZeroNoiseEstimate,
    ZeroNoiseExtrapolation,
    ZeroNoiseInference,
    find_mitigated_calls,
    readout,
)
from qtx_lab.mitigation.recorded import mitigation_of

P = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0] * 4, [0.0, 0.0, 0.2, 0.8]], dtype=torch.float64)
SHOTS = 400
ZNE = ZeroNoiseExtrapolation([1, 3], "linear")


@pytest.fixture
def noisy(cloud: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server with the noise of its device, and calibrations of few shots."""
    monkeypatch.setattr(readout, "CALIBRATION_SHOTS", 200)
    monkeypatch.setattr(cloud, "noise", True)
    return cloud


def backend_of(loader: Any = "tree") -> qtx.QiskitQuantumBackend:
    return qtx.QiskitQuantumBackend("ibm", "ibm_lagos", loader=loader, optimization_level=1)


def sample(mitigation: CircuitMitigation, loader: Any = "tree", p: torch.Tensor = P) -> qtx.RowCounts:
    g = torch.Generator().manual_seed(3)
    return mitigation.sample_rows(backend_of(loader), p, SHOTS, generator=g)


def check_same(result: Any, other: Any) -> None:
    for name in ("counts", "discarded", "estimate", "std_error"):
        assert torch.equal(getattr(result, name), getattr(other, name)), name
    assert torch.equal(result.classical.counts, other.classical.counts)
    tags = ("call", "jobs", "submission", "calibration_read")
    facts, others = ({k: v for k, v in x.diagnostics.items() if k not in tags} for x in (result, other))
    assert facts == others


MITIGATIONS = {
    "readout": (CircuitMitigation(readout=True), "tree"),
    "readout, dynamic": (CircuitMitigation(readout=True), "dynamic"),
    "raw": (CircuitMitigation(readout=False), "tree"),
    "line": (CircuitMitigation(ZNE, readout=True), "tree"),
    "exponential": (
        CircuitMitigation(ZeroNoiseExtrapolation([1, 3], "exponential", asymptote=0.25), readout=True),
        "tree",
    ),
    "shared decay": (
        CircuitMitigation(SharedDecay([1, 3], corrected=True), readout=False, scaling="global"),
        "tree",
    ),
    "two copies": (CircuitMitigation(readout=False, loader=TwoCopyLoader()), "tree"),
}


@pytest.mark.parametrize("name", MITIGATIONS)
def test_another_process_makes_the_same_result(noisy: Any, name: str) -> None:
    mitigation, loader = MITIGATIONS[name]
    result = sample(mitigation, loader)
    posts = noisy.posts()
    noisy.jobs.clear()  # what was fetched is kept
    (call,) = find_mitigated_calls()
    assert call.last_known.state == JobState.DONE
    check_same(call.send_rest().counts(), result)
    assert noisy.posts() == posts
    assert result.diagnostics["call"] == call.tag
    assert call.record.mitigation["name"] == mitigation.name == result.diagnostics["mitigation"]
    assert mitigation_of(call.record.mitigation).settings == mitigation.settings


def test_a_call_says_what_its_jobs_are(noisy: Any) -> None:
    result = sample(CircuitMitigation(ZNE, readout=True))
    (call,) = find_mitigated_calls()
    record, requests = call.record, [job.request() for job in call.jobs]
    assert [type(x) for x in requests] == [CalibrationRequest] * 4 + [MitigatedRowRequest] * 2
    (calibration,) = record.calibrations  # both levels measure the same qubits
    assert {x.qubits for x in requests[:4]} == {tuple(calibration.qubits)}
    assert [x.prepared for x in requests[:4]] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [level.noise_level for level in record.levels] == [1.0, 3.0]
    assert {x.batch for x in requests[4:]} == {call.tag}
    assert tuple(result.diagnostics["jobs"]) == tuple(record.job_tags)
    assert sum(level.shots for level in record.levels) == SHOTS
    again = sample(CircuitMitigation(ZNE, readout=True))  # the calibration is known now
    assert len(again.diagnostics["jobs"]) == 2
    newest, _ = find_mitigated_calls()
    check_same(newest.counts(), again)
    with pytest.raises(qtx.ArgumentError, match=f"its call {call.tag}"):
        call.jobs[-1].counts()


def test_readout_errors_are_measured_anew_with_other_options_of_the_sampler(noisy: Any) -> None:
    """Twirled measurements misread 0 and 1 equally often: the errors of others would not undo theirs."""
    options = {"twirling": {"enable_measure": True}}, {"dynamical_decoupling": {"enable": True}}, {}
    for given in options:
        backend = qtx.QiskitQuantumBackend("ibm", "ibm_lagos", loader="tree", optimization_level=1, **given)
        assert readout.known_errors(backend, 4).errors is None
        readout.readout_errors(backend, 4)
        assert readout.known_errors(backend, 4).errors is not None
        assert backend.engine.facts()["options"] == given


@pytest.mark.parametrize(("post", "accepted"), [(0, False), (1, True), (4, False), (5, True)])
def test_a_call_that_is_killed_at_any_post_is_rebuilt(
    noisy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, post: int, accepted: bool
) -> None:
    from qtx_lab.backends.ibm import submission
    from qtx_lab.backends.ibm.remote import IBMRemote

    mitigation = CircuitMitigation(ZNE, readout=True)
    original, count = IBMRemote.post, 0

    def killed(*arguments: Any, **options: Any) -> str:
        nonlocal count
        count += 1
        if count <= post:
            return original(*arguments, **options)
        if accepted:
            original(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(IBMRemote, "post", killed)
        with pytest.raises(KeyboardInterrupt):
            sample(mitigation)
    assert len(noisy.jobs) == post + accepted
    monkeypatch.setattr(submission, "NEVER_ARRIVED_S", 0.0)
    (call,) = find_mitigated_calls()
    if post < 5:
        monkeypatch.setattr(submission, "LISTING_LAG_S", 0.0)
        with pytest.raises(qtx.BackendUnavailable, match=rf"{call.tag}.*send_rest"):
            call.counts(progress=False)
    result = call.send_rest().counts()
    tags = [tag for job in noisy.jobs.values() for tag in job.tags if "." in tag]
    assert len(tags) == len(set(tags)) == 6
    monkeypatch.setenv("QTX_LAB_HOME", str(tmp_path / "without a crash"))
    check_same(result, sample(mitigation))


def test_a_call_is_sent_without_waiting_and_can_be_cancelled(noisy: Any) -> None:
    noisy.polls_in_queue = 10**6
    mitigation = CircuitMitigation(ZNE, readout=False)
    call = mitigation.submit_rows(backend_of(), P, SHOTS)
    assert len(noisy.jobs) == 2
    assert call.status().state == JobState.QUEUED
    with pytest.raises(qtx.JobTimeout):
        call.counts(0.05, progress=False)
    first, second = noisy.jobs.values()
    first.polls_left = 0
    assert str(call.status()).endswith("1 of 2 jobs are measured")
    (cancellation,) = call.cancel()
    assert cancellation.cancelled == (0,)
    assert (first.status, second.status) == ("Completed", "Cancelled")
    with pytest.raises(qtx.BackendUnavailable, match=rf"cancelled.*{call.tag}"):
        call.counts(progress=False)
    noisy.polls_in_queue = 0
    result = find_mitigated_calls()[0].send_rest(again=True).counts()
    assert result.estimate.sum(-1).tolist() == pytest.approx([1.0, 0.0, 1.0])
    assert len(noisy.jobs) == 3


def test_a_deleted_level_is_said_to_be_gone_and_can_be_run_again(noisy: Any) -> None:
    call = CircuitMitigation(ZNE, readout=False).submit_rows(backend_of(), P, SHOTS)
    noisy.delete(call.jobs[1].id)
    with pytest.raises(qtx.BackendUnavailable, match=rf"gone.*{call.tag}"):
        call.counts(progress=False)
    assert call.jobs[0].last_known.state == JobState.DONE
    assert call.send_rest(again=True).counts().estimate is not None
    assert len(noisy.jobs) == 2


class Own(ZeroNoiseInference):
    """An inference that no record holds: the first level is believed."""

    noise_levels, method = (1.0, 3.0), "own"

    def allocate(self, shots: int, spread: Any = None) -> list[int]:
        return [shots // 2, shots - shots // 2]

    def extrapolate(self, values: Any, std_errors: Any = None, *, levels: Any = None) -> ZeroNoiseEstimate:
        return ZeroNoiseEstimate(values[0], std_errors[0], torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_an_inference_and_a_loader_of_ones_own_are_asked_for(noisy: Any) -> None:
    class Mine(TreeLoader):
        name = "mine"

    mitigation = CircuitMitigation(Own(), readout=False)
    result = sample(mitigation, Mine())
    (call,) = find_mitigated_calls()
    with pytest.raises(qtx.ArgumentError, match="pass mitigation="):
        call.counts()
    with pytest.raises(qtx.ArgumentError, match="mine"):
        call.counts(mitigation=mitigation)
    check_same(call.counts(mitigation=mitigation, loader=Mine()), result)


def test_records_of_calls_that_cannot_be_read_cost_only_themselves(noisy: Any, tmp_path: Path) -> None:
    result = sample(CircuitMitigation(ZNE, readout=False))
    (call,) = find_mitigated_calls()
    record, folder = json.loads(call.path.read_bytes()), call.path.parent
    contents = [{**record, "schema_version": 2}, {**record, "levels": []}, {**record, "tag": "x"}, [], None]
    contents += [{key: value for key, value in record.items() if key != name} for name in record]
    for i, content in enumerate(contents):
        (folder / f"call-{i}.json").write_text(json.dumps(content))
    (folder / "call-folder.json").mkdir()
    (folder / "call-half.json").write_text(call.path.read_text()[:300])
    with pytest.warns(UserWarning, match="The call's record") as caught:
        (found,) = find_mitigated_calls()
    assert len(caught) == len(contents) + 2
    check_same(found.counts(), result)
    found.jobs[0].path.write_text("{")
    with (
        pytest.warns(UserWarning, match="The job's record"),
        pytest.raises(qtx.StorageError, match=r"record of job .* cannot be found"),
    ):
        find_mitigated_calls(tag=call.tag)[0].counts()


def test_what_is_measured_of_no_row_or_on_a_simulator_is_no_call(cloud: Any) -> None:
    with pytest.raises(qtx.ArgumentError, match="nothing to measure"):
        CircuitMitigation(readout=False).submit_rows(backend_of(), torch.zeros(2, 4), 10)
    with pytest.raises(qtx.ArgumentError, match="queues no jobs"):
        CircuitMitigation(readout=False).submit_rows(qtx.QiskitQuantumBackend("aer"), P, 10)
    assert cloud.posts() == 0
    assert find_mitigated_calls() == []
