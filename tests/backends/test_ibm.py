"""IBM's devices through IBM's own client and a loopback server: the life of a job, and faults in it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from qtx_lab.backends import QiskitQuantumBackend
from qtx_lab.backends.ibm import engine as ibm_engine
from qtx_lab.backends.ibm.engine import IBMEngine
from qtx_lab.backends.ibm.jobs import find_jobs
from qtx_lab.backends.ibm.remote import IBMRemote
from qtx_lab.backends.requests import CalibrationRequest, MitigatedRowRequest, RowRequest
from qtx_lab.circuits import check_rows, make_loader
from qtx_lab.errors import ArgumentError, BackendUnavailable, JobTimeout, StorageError
from qtx_lab.mitigation import CircuitMitigation, ZeroNoiseExtrapolation, readout

pytestmark = pytest.mark.hardware

SHOTS = 500


def rows(n: int = 7, count: int = 3) -> torch.Tensor:
    p = torch.rand(count, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    p[:, -2:] = 0
    return p / p.sum(-1, keepdim=True)


def submit(engine: IBMEngine, loader: str = "dynamic", n: int = 7, shots: int = SHOTS) -> Any:
    """Submit the rows of `rows` as `QiskitQuantumBackend` does."""
    make = make_loader(loader)
    request = RowRequest(check_rows(rows(n)), make, shots, seed=1)
    circuit = engine.transpile(make.circuit(make.size(n)), 1)
    return engine.submit(circuit, request.bindings(), shots, request)


def check_draws(counts: torch.Tensor, p: torch.Tensor) -> None:
    """Check counts as draws from the rows, by a chi-squared test with false alarms once in a million."""
    assert not counts[p == 0].any()
    expected = p * counts.sum(-1, keepdim=True)
    statistic = ((counts - expected)[p > 0] ** 2 / expected[p > 0]).sum()
    freedom = int((p > 0).sum()) - len(p)
    assert chi2.sf(float(statistic), freedom) > 1e-6


# --- The life of a job ----------------------------------------------------------------------------


@pytest.mark.parametrize("loader", ["dynamic", "tree"])
def test_a_job_lives_from_token_to_counts(ibm: Any, cloud: Any, loader: str) -> None:
    with ibm.IBMServer(("fez",)) as fez, ibm.environment(fez.environment()):
        engine = IBMEngine("ibm_fez")
        assert fez.requests == []
        assert engine.problems() == ()
        assert engine.facts()["num_qubits"] == 156
        fez.polls_in_queue = 3
        job = submit(engine, loader)
        seen: list[str] = []
        result = job.counts(progress=lambda status: seen.append(str(status)))
        assert seen[-1] == "done"
        assert any("queued, place" in text for text in seen)
        check_draws(result.counts, rows())
        assert result.counts.sum() == 3 * SHOTS
        assert result.diagnostics["job"] == job.tag
        assert [job.tag in accepted.tags for accepted in fez.jobs.values()] == [True]
        assert {"POST /identity/token", "GET /backends", "GET /backends/ibm_fez/properties"} <= {
            *fez.requests
        }


def test_another_process_reads_the_same_counts_by_tag(cloud: Any) -> None:
    job = submit(IBMEngine("ibm_lagos"))
    (again,) = find_jobs()
    assert (again.tag, again.id, again.status().state) == (job.tag, "job-1", "done")
    assert torch.equal(again.counts().counts, job.counts().counts)
    posts = cloud.posts()
    assert torch.equal(find_jobs()[0].counts().counts, job.counts().counts)  # now from the disk
    assert cloud.posts() == posts == 1


def test_the_backend_measures_rows_and_lists_its_jobs(cloud: Any, tmp_path: Path) -> None:
    backend = QiskitQuantumBackend("ibm-q", "ibm_lagos", loader="tree", run_dir=tmp_path / "a-run")
    assert cloud.requests == []
    p = torch.cat([rows(), torch.zeros(1, 7, dtype=torch.float64)])  # the last row is all masked
    result = backend.sample_rows(p, SHOTS)
    check_draws(result.counts[:3], p[:3])
    assert result.counts[3].sum() == result.discarded[3] == 0
    job = backend.submit_rows(p, SHOTS)
    assert [other.tag for other in backend.jobs()] == [job.tag, result.diagnostics["job"]]
    assert cloud.posts() == 2
    again = find_jobs(tag=job.tag)[0].counts()
    assert torch.equal(again.counts, job.counts().counts)
    assert torch.equal(again.classical.counts, job.counts().classical.counts)


def test_a_ready_service_is_used(
    cloud: Any, ibm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from qiskit_ibm_runtime import QiskitRuntimeService

    monkeypatch.delenv("QISKIT_IBM_TOKEN")
    service = QiskitRuntimeService(
        channel="ibm_quantum_platform",
        token=ibm.TOKEN,
        url=cloud.url,
        url_resolver=lambda url, *_: url + "/api/v1",
        instance=ibm.CRN,
    )
    job = submit(IBMEngine("ibm_lagos", service=service))
    check_draws(job.counts().counts, rows())
    elsewhere = IBMEngine("ibm_lagos", service=service, run_dir=tmp_path / "elsewhere" / "run")
    cloud.polls_in_queue = 100
    second = submit(elsewhere)
    assert [other.tag for other in elsewhere.jobs()] == [second.tag, job.tag]
    assert elsewhere.jobs()[0].status().state == "queued"  # by the service, there is no other account
    adapters = service._get_api_client()._session.adapters
    assert len(adapters) == 2  # as IBM's client made it: the guard against a second POST is gone again
    with pytest.raises(ArgumentError, match="local"):
        IBMEngine("ibm_lagos", service=QiskitRuntimeService(channel="local"))


def test_a_queued_job_is_cancelled_and_a_finished_one_is_not(cloud: Any) -> None:
    cloud.polls_in_queue = 100
    engine = IBMEngine("ibm_lagos")
    job = submit(engine)
    assert engine.pending_jobs() == 1
    with pytest.raises(JobTimeout, match=job.tag):
        job.counts(timeout=0.1)
    job.cancel()
    assert job.status().state == find_jobs()[0].last_known.state == "cancelled"
    with pytest.raises(BackendUnavailable, match=f"{job.tag}.*cancelled"):
        job.counts()
    cloud.polls_in_queue = 0
    done = submit(engine)
    with pytest.raises(BackendUnavailable, match=f"{done.tag}.*done"):
        done.cancel()


@pytest.mark.parametrize("mode", ["batch", "session"])
def test_batch_and_session(cloud: Any, mode: str) -> None:
    engine = IBMEngine("ibm_lagos", mode=mode)
    first, second = submit(engine), submit(engine)
    engine.close()
    (session,) = cloud.sessions.values()
    assert session["mode"] == {"batch": "batch", "session": "dedicated"}[mode]
    assert not session["accepting_jobs"]
    assert {job.session_id for job in cloud.jobs.values()} == {session["id"]}
    for job in (first, second):
        check_draws(job.counts().counts, rows())


@pytest.mark.parametrize("mode", ["batch", "session"])
def test_a_closed_session_is_opened_again(cloud: Any, mode: str) -> None:
    engine = IBMEngine("ibm_lagos", mode=mode)
    first = submit(engine)
    cloud.close_sessions()
    second = submit(engine)
    assert len(cloud.sessions) == 2
    assert len(cloud.jobs) == 2
    assert [len(cloud.accepted(job.tag)) for job in (first, second)] == [1, 1]
    assert "another was opened" in second.counts().diagnostics["submission"][0]
    engine.close()
    cloud.close_sessions()
    third = submit(engine)
    assert "submission" not in third.counts().diagnostics


def test_a_limit_of_pending_jobs_is_waited_for(ibm: Any, cloud: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtx_lab.backends.ibm.engine.MAX_EXECUTIONS_PER_JOB", SHOTS)
    cloud.pending_limit, cloud.polls_in_queue = 2, 10**6
    engine = IBMEngine("ibm_lagos", patience=0.3)
    with pytest.raises(BackendUnavailable, match=r"limit of 2 pending jobs.*2 of its 3 parts.*send_rest"):
        submit(engine)
    (job,) = find_jobs()
    assert job.status().state == "recorded"
    for other in cloud.jobs.values():
        other.polls_left = 0
    cloud.polls_in_queue = 0
    part = job.counts(partial=True)
    check_draws(part.counts[:2], rows()[:2])
    assert part.diagnostics["missing_rows"] == (2,)
    assert "took no more jobs" in part.diagnostics["submission"][-1]
    check_draws(job.send_rest().counts().counts, rows())
    assert [len(cloud.accepted(part.tag)) for part in job.record.parts] == [1, 1, 1]


def test_a_deleted_job_is_gone_and_the_others_are_asked(cloud: Any) -> None:
    engine = IBMEngine("ibm_lagos")
    first, second, third = (submit(engine) for _ in range(3))
    cloud.delete(str(second.id))
    assert [str(job.status().state) for job in find_jobs()] == ["done", "gone", "done"]
    with pytest.raises(BackendUnavailable, match=rf"{second.tag}.*gone: IBM has no job job-2.*deleted"):
        second.counts()
    check_draws(third.counts().counts, rows())
    check_draws(find_jobs(tag=second.tag)[0].send_rest(again=True).counts().counts, rows())
    cloud.delete(str(first.id))
    with pytest.raises(BackendUnavailable, match=rf"{first.tag} are gone"):
        first.counts()


@pytest.mark.parametrize("patience", [-1, True, "long", None, float("nan")])
def test_a_wrong_patience_is_refused(patience: Any) -> None:
    with pytest.raises(ArgumentError, match="patience"):
        IBMEngine("ibm_lagos", patience=patience)


def test_rows_and_shots_are_split_by_the_limits(cloud: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ibm_engine, "MAX_EXECUTIONS_PER_JOB", 400)
    monkeypatch.setitem(cloud.devices["ibm_lagos"][0], "max_shots", 200)
    job = submit(IBMEngine("ibm_lagos"))  # 500 shots in 167 + 167 + 166, so 2 rows a job
    assert cloud.posts() == len(cloud.jobs) == 6
    result = job.counts()
    assert result.shots == SHOTS
    assert torch.equal(result.counts.sum(-1), torch.full((3,), SHOTS))
    check_draws(result.counts, rows())
    assert len({tag for accepted in cloud.jobs.values() for tag in accepted.tags}) == 7  # one, and one a part


def test_twirling_and_dynamical_decoupling(cloud: Any) -> None:
    options = {
        "twirling": {"enable_gates": True, "enable_measure": True},
        "dynamical_decoupling": {"enable": True},
    }
    engine = IBMEngine("ibm_lagos", **options)
    result = submit(engine, "tree").counts()
    assert (result.shots, result.diagnostics["shots_run"]) == (SHOTS, 512)  # 8 randomisations of 64
    check_draws(result.counts, rows())
    with pytest.raises(ArgumentError, match="feed"):
        submit(engine, "dynamic")
    assert cloud.posts() == 1


def test_fractional_gates_where_the_device_has_them(ibm: Any, cloud: Any) -> None:
    with ibm.IBMServer(("fractional",)) as server, ibm.environment(server.environment()):
        engine = IBMEngine("fake_fractional", fractional_gates=True)
        loader = make_loader("dynamic")
        assert "rx" in engine.transpile(loader.circuit(1), 1).count_ops()
        check_draws(submit(engine, "tree").counts().counts, rows())
    with pytest.raises(BackendUnavailable, match="fractional"):
        IBMEngine("ibm_lagos", fractional_gates=True).transpile(loader.circuit(1), 1)


def test_the_cost_is_shown_and_has_to_be_confirmed(cloud: Any, capsys: pytest.CaptureFixture[str]) -> None:
    costs = []
    with pytest.raises(ArgumentError, match="max_quantum_seconds=2"):
        submit(IBMEngine("ibm_lagos", max_quantum_seconds=2))
    with pytest.raises(ArgumentError, match="confirm"):
        submit(IBMEngine("ibm_lagos", max_quantum_seconds=2, confirm=lambda cost: bool(costs.append(cost))))
    assert cloud.posts() == 0
    assert find_jobs() == []
    assert str(costs[0]) == "3 circuits × 500 shots = 1,500 executions, about 3 s of quantum time"
    job = submit(IBMEngine("ibm_lagos", max_quantum_seconds=2, confirm=True))
    assert capsys.readouterr().err.strip() == f"ibm_lagos: {costs[0]}; job {job.tag}"


def test_circuits_that_are_not_of_rows_run_too(cloud: Any) -> None:
    from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister

    circuit = QuantumCircuit(QuantumRegister(2), ClassicalRegister(2, "c"))
    circuit.x(1)
    circuit.measure([0, 1], [0, 1])
    engine = IBMEngine("ibm_lagos")
    outcomes = engine.run(engine.transpile(circuit, 1), np.zeros((2, 0)), 10, seed=0)
    assert outcomes.tolist() == [[[2]] * 10] * 2
    with pytest.raises(ArgumentError, match="'circuits', not of rows"):
        find_jobs()[0].counts()


def test_registers_of_other_names_are_put_into_one_before_anything_is_sent(cloud: Any) -> None:
    from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister

    from qtx_lab.circuits import TreeLoader

    class MeasuredAll(TreeLoader):
        def circuit(self, size: int) -> QuantumCircuit:
            circuit = super().circuit(size).remove_final_measurements(inplace=False)
            circuit.measure_all()  # into a register `meas`
            return circuit

    backend = QiskitQuantumBackend("ibm", "ibm_lagos", loader=MeasuredAll(), optimization_level=1)
    check_draws(backend.sample_rows(rows(), SHOTS).counts, rows())
    assert cloud.posts() == 1

    circuit = QuantumCircuit(QuantumRegister(1), ClassicalRegister(1, "meas"))
    circuit.measure(0, 0)
    with pytest.raises(ArgumentError, match="measures into meas"):
        backend.engine.run(circuit, np.zeros((1, 0)), 10, seed=0)
    assert cloud.posts() == 1


def test_jobs_of_a_mitigation_say_what_they_measure(cloud: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "CALIBRATION_SHOTS", 200)
    backend = QiskitQuantumBackend("ibm", "ibm_lagos", loader="tree", optimization_level=1)
    mitigation = CircuitMitigation(ZeroNoiseExtrapolation([1, 3]), readout=True)
    p = torch.cat([rows(4, 2), torch.zeros(1, 4, dtype=torch.float64)])  # the last row is not run
    assert (mitigation.sample_rows(backend, p, 400).counts >= 0).all()
    requests = [job.request() for job in find_jobs()]
    calibrations = [request for request in requests if isinstance(request, CalibrationRequest)]
    levels = [request for request in requests if isinstance(request, MitigatedRowRequest)]
    assert len(calibrations) + len(levels) == len(requests) == cloud.posts()
    assert {request.prepared for request in calibrations} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert sorted(request.noise_level for request in levels) == [1.0, 3.0]
    assert sum(request.shots for request in levels) == levels[0].rows.shots == 400
    assert len({request.batch for request in levels}) == 1
    for request in levels:
        assert torch.equal(request.rows.p, p[:2])
        assert request.rows.loader.name == "tree"


# --- What is refused before any request -----------------------------------------------------------


@pytest.mark.parametrize("name", ["ibmq_qasm_simulator", "ibmq_manila", "ibmqx2", "simulator_statevector"])
def test_retired_names_are_refused_offline(cloud: Any, name: str) -> None:
    engine = IBMEngine(name)
    assert any("retired" in problem for problem in engine.problems())
    with pytest.raises(BackendUnavailable, match="retired"):
        submit(engine)
    assert cloud.requests == []


def test_a_missing_account_is_reported_offline(no_account: None) -> None:
    engine = IBMEngine("ibmq_qasm_simulator")
    retired, account = engine.problems()
    assert "retired" in retired
    assert "save_account" in account
    with pytest.raises(BackendUnavailable, match="save_account"):
        submit(IBMEngine("ibm_fez"))
    assert find_jobs() == []


def test_an_account_on_disk_is_found(no_account: None, cloud: Any, ibm: Any, monkeypatch: Any) -> None:
    from qiskit_ibm_runtime import QiskitRuntimeService

    monkeypatch.delenv("QISKIT_IBM_TOKEN")
    QiskitRuntimeService.save_account(
        token=ibm.TOKEN, url=f"{cloud.url}/experimental/api/v1", instance=ibm.CRN, set_as_default=True
    )
    assert IBMEngine("ibm_lagos").problems() == ()
    with pytest.raises(BackendUnavailable, match=r"ibm_nowhere.*ibm_lagos"):
        submit(IBMEngine("ibm_nowhere"))


def test_wrong_arguments() -> None:
    with pytest.raises(ArgumentError, match=r"mode='btach'.*batch"):
        IBMEngine("ibm_fez", mode="btach")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="max_quantum_seconds"):
        IBMEngine("ibm_fez", max_quantum_seconds=0)
    with pytest.raises(ArgumentError, match="enable_gaets"):
        IBMEngine("ibm_fez", twirling={"enable_gaets": True})


def test_what_cannot_be_recorded_is_not_submitted(cloud: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        submit(IBMEngine("ibm_lagos", run_dir=tmp_path / "file"))
    assert cloud.posts() == 0


# --- Faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", [401, 403, 404, 409, 429, 500, 503, "cut", "truncate", "nonsense"])
def test_a_fault_at_the_submission_neither_loses_a_job_nor_submits_a_second(
    ibm: Any, cloud: Any, logged_in: Any, what: int | str, when: str
) -> None:
    engine = IBMEngine("ibm_lagos", service=logged_in)
    engine.problems()
    cloud.faults = [ibm.Fault("POST /jobs", what, when)]
    cloud.hidden_lookups = 1  # the listing lags
    posted_again = when == "before" and what == 429
    if when == "after" or posted_again:
        check_draws(submit(engine).counts().counts, rows())
    else:
        with pytest.raises(BackendUnavailable, match=r"qtx-\d{8}T"):
            submit(engine)
    assert cloud.posts() == 1 + posted_again
    accepted = int(when == "after" or posted_again)
    assert len(cloud.accepted(find_jobs()[0].tag)) == len(cloud.jobs) == accepted
    assert cloud.faults[0].times == 0


@pytest.mark.parametrize("what", [403, 429, 503, "cut", "nonsense"])
@pytest.mark.parametrize(
    "request_",
    [
        "POST /identity/token",
        "POST /search.*",
        "GET /backends",
        "GET /backends/.*/configuration",
        "GET /backends/.*/properties",
    ],
)
def test_a_fault_before_the_submission_is_a_clear_error(
    ibm: Any, cloud: Any, request_: str, what: Any
) -> None:
    cloud.faults = [ibm.Fault(request_, what, times=99)]
    with pytest.raises(BackendUnavailable) as caught:
        submit(IBMEngine("ibm_lagos"))
    assert str(caught.value).endswith(".")
    assert cloud.posts() == 0
    assert find_jobs() == []


@pytest.mark.parametrize("what", [401, 500, "cut"])
def test_a_fault_just_before_the_post_leaves_a_record_that_has_failed(
    ibm: Any, cloud: Any, what: Any
) -> None:
    engine = IBMEngine("ibm_lagos")
    engine.problems()
    cloud.faults = [ibm.Fault("GET /instances/usage", what, times=99)]
    with pytest.raises(BackendUnavailable, match="nothing was submitted"):
        submit(engine)
    (job,) = find_jobs()
    assert job.last_known.state == "failed"
    assert cloud.posts() == 0


@pytest.mark.parametrize("what", [503, "cut", "truncate", "nonsense"])
@pytest.mark.parametrize(
    "request_", ["GET /jobs/job-1", "GET /jobs/job-1/results", "GET /jobs/job-1/metrics"]
)
def test_a_fault_while_waiting_is_survived(
    ibm: Any, cloud: Any, logged_in: Any, request_: str, what: Any
) -> None:
    cloud.polls_in_queue = 6
    job = submit(IBMEngine("ibm_lagos", service=logged_in))
    cloud.faults = [ibm.Fault(request_, what, "after", times=2)]
    check_draws(job.counts().counts, rows())
    assert cloud.faults[0].times == 0
    assert cloud.posts() == 1


def test_results_that_stay_broken_are_an_error_that_names_the_job(ibm: Any, cloud: Any) -> None:
    job = submit(IBMEngine("ibm_lagos"))
    cloud.faults = [ibm.Fault("GET /jobs/job-1/results", "nonsense", times=99)]
    with pytest.raises(BackendUnavailable, match=job.tag):
        job.counts()
    cloud.faults = []
    check_draws(find_jobs()[0].counts().counts, rows())


def test_a_server_that_is_silent_for_too_long_is_an_error_that_names_the_job(ibm: Any, cloud: Any) -> None:
    job = submit(IBMEngine("ibm_lagos"))
    cloud.faults = [ibm.Fault("GET /jobs/job-1", "cut", times=999)]
    with pytest.raises(BackendUnavailable, match=job.tag):
        job.counts(patience=0.1)


def test_two_threads_that_submit_at_once_post_one_job_each(cloud: Any, logged_in: Any) -> None:
    engine = IBMEngine("ibm_lagos", service=logged_in)
    engine.problems()
    with ThreadPoolExecutor(4) as threads:
        jobs = list(threads.map(lambda _: submit(engine), range(8)))
    assert len({job.id for job in jobs}) == len(cloud.jobs) == cloud.posts() == 8


def test_the_reason_of_a_failed_job_is_reported(cloud: Any) -> None:
    cloud.job_error = "the fridge is warm"
    job = submit(IBMEngine("ibm_lagos"))
    with pytest.raises(BackendUnavailable, match=f"{job.tag}.*the fridge is warm"):
        job.counts()
    assert job.last_known.state == "failed"


def test_a_wrong_key_is_reported(ibm: Any, cloud: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QISKIT_IBM_TOKEN", "not the key")
    (problem,) = IBMEngine("ibm_lagos").problems()
    assert "API key is not valid" in problem


def test_a_server_that_is_gone_loses_no_job(ibm: Any, cloud: Any) -> None:
    job = submit(IBMEngine("ibm_lagos"))
    cloud.faults = [ibm.Fault(".*", 401, times=999)]
    with pytest.raises(BackendUnavailable):
        find_jobs()[0].status()
    assert find_jobs()[0].last_known.state == "submitted"
    cloud.faults = []
    assert job.status().state == "done"
    content = json.loads(job.path.read_bytes())
    assert content["parts"][0]["id"] == "job-1"


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:-1],
        lambda x: x[:, :-1],
        lambda x: x[:, :, :0],
        lambda x: np.concatenate([x, x], 2),
        lambda x: x[0],
        lambda x: x.astype(np.int64),
    ],
    ids=["fewer rows", "fewer shots", "no bits", "other bits", "one row", "no bytes"],
)
def test_results_of_another_shape_are_refused(
    change: Any, cloud: Any, logged_in: Any, monkeypatch: Any
) -> None:
    """Bits of another register were counted as keys. The results stay on the server for a later look."""
    backend = QiskitQuantumBackend("ibm", "ibm_lagos", loader="tree", optimization_level=0, service=logged_in)
    job = backend.submit_rows(torch.full((2, 4), 0.25), 20, progress=False)
    outcomes = IBMRemote.outcomes
    with monkeypatch.context() as patch:
        patch.setattr(IBMRemote, "outcomes", lambda *arguments: change(outcomes(*arguments)))
        for _ in range(2):
            with pytest.raises(BackendUnavailable, match="in place of the packed bits of 2 rows × 20 shots"):
                job.counts(5, progress=False)
    assert job.counts(5, progress=False).shots == 20
