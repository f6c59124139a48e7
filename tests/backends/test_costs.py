"""What calls cost: nothing is sent above a limit or a budget that nobody confirmed, whatever is called."""

from __future__ import annotations

import json
import multiprocessing
import random
import runpy
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qtx_lab as qtx
from qtx_lab.backends import (
    AmplitudeEstimator,
    CircuitSampler,
    HybridPolicy,
    QiskitQuantumBackend,
    SoftmaxCircuitSampler,
)
from qtx_lab.backends.ibm import budget
from qtx_lab.backends.ibm import engine as ibm_engine
from qtx_lab.backends.ibm.budget import Budget
from qtx_lab.backends.ibm.jobs import find_jobs
from qtx_lab.backends.ibm.target import TargetEngine
from qtx_lab.backends.noise import fake_device
from qtx_lab.backends.waiting import TYPICAL_FEED_FORWARD_LATENCY_S, shot_duration
from qtx_lab.errors import ArgumentError, BackendUnavailable, CostError, DtypeError
from qtx_lab.mitigation import (
    CircuitMitigation,
    MitigationPlanner,
    RandomFlips,
    ZeroNoiseExtrapolation,
    readout,
)

CLIENT = Path(__file__).with_name("ibm_client.py")
P = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]])
ZNE = CircuitMitigation(ZeroNoiseExtrapolation([1, 3]), readout=True)

hardware = pytest.mark.hardware


@pytest.fixture
def make(cloud: Any, logged_in: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., QiskitQuantumBackend]:
    """Makes backends of the loopback device, on which 100 executions take a second."""
    monkeypatch.setattr(ibm_engine, "SECONDS_PER_EXECUTION", 0.01)
    monkeypatch.setattr(readout, "CALIBRATION_SHOTS", 100)

    def backend(**options: Any) -> QiskitQuantumBackend:
        options = {"loader": "tree", "optimization_level": 1, "service": logged_in, **options}
        return QiskitQuantumBackend("ibm", "ibm_lagos", **options)

    return backend


# --- Before the first post --------------------------------------------------------------------------


@hardware
def test_a_call_is_refused_for_the_sum_of_all_that_it_sends(cloud: Any, make: Any) -> None:
    """Four calibrations of 3 s, and two noise levels of 2 rows: none of them alone is above 10 s."""
    backend = make(max_quantum_seconds=20)
    with pytest.raises(
        CostError, match=r"calibration 12 s, noise level 1 \d+ s, noise level 3 \d+ s"
    ) as caught:
        ZNE.sample_rows(backend, P, 400)
    assert "more than max_quantum_seconds=20" in str(caught.value)
    assert cloud.posts() == 0
    assert find_jobs() == []
    plan = make(max_quantum_seconds=30).plan_rows(P, 400, mitigation=ZNE)
    ZNE.sample_rows(make(max_quantum_seconds=30), P, 400)
    records = [job.record for job in find_jobs()]
    assert sum(record.quantum_seconds for record in records) == pytest.approx(plan.quantum_seconds)
    assert sum(len(record.parts) for record in records) == plan.jobs == cloud.posts()
    assert sum(map(cloud.executions, cloud.jobs.values())) == plan.executions
    known = make(max_quantum_seconds=20).plan_rows(P, 400, mitigation=ZNE)  # the calibration is kept
    assert known.quantum_seconds == pytest.approx(plan.quantum_seconds - 12)


@hardware
def test_flips_of_two_sizes_are_refused_together(cloud: Any, make: Any) -> None:
    """401 shots are two jobs, one of them for the flip that has a shot more; the first alone is below 9 s."""
    with pytest.raises(CostError, match="more than max_quantum_seconds=9"):
        RandomFlips(16).sample_rows(make(max_quantum_seconds=9), P, 401)
    assert cloud.posts() == 0
    counts = RandomFlips(16).sample_rows(make(max_quantum_seconds=20), P, 401)
    assert (counts.counts.sum(-1) + counts.discarded).tolist() == [401, 401]
    assert cloud.posts() == 2


@hardware
def test_replicates_are_paid_together_or_not_at_all(cloud: Any, make: Any) -> None:
    mitigation = CircuitMitigation(ZeroNoiseExtrapolation([1, 3]), readout=False)
    logits = P.log()
    sampler = CircuitSampler(make(max_quantum_seconds=20), mitigation=mitigation)
    sampler.draw(logits, 400, replicates=1)
    posts = cloud.posts()
    with pytest.raises(CostError):
        sampler.draw(logits, 400, replicates=3)
    hybrid = CircuitSampler(make(max_quantum_seconds=20), mitigation=mitigation, hybrid_mode=True)
    with pytest.warns(qtx.FallbackWarning, match="max_quantum_seconds=20"):
        draws = hybrid.draw(logits, 400, replicates=3)
    assert cloud.posts() == posts
    assert draws.indices.shape == (2, 1200)
    assert hybrid.diagnostics["classical_rows"] == 2
    assert "max_quantum_seconds=20" in " ".join(hybrid.diagnostics["fallbacks"])


@hardware
def test_a_mitigation_that_says_nothing_beforehand_stops_at_the_limit(cloud: Any, make: Any) -> None:
    class Own:
        name = "own"

        def sample_rows(self, backend: Any, p: Any, shots: int, *, generator: Any = None) -> Any:
            return [backend.sample_rows(p, shots // 4, generator=generator) for _ in range(4)][-1]

    with pytest.raises(CostError, match="more than max_quantum_seconds=9"):
        CircuitSampler(make(max_quantum_seconds=9), mitigation=Own()).measure(P, 400)
    assert cloud.posts() == 2  # of 4 s each


@hardware
def test_a_mitigated_call_is_confirmed_as_the_error_says(cloud: Any, make: Any) -> None:
    backend = make(max_quantum_seconds=20)
    p, generator = P.double(), torch.Generator().manual_seed(0)
    with pytest.raises(CostError, match=r"submit_rows\(\.\.\., confirm=True\)"):
        ZNE.submit_rows(backend, p, 400, generator=generator)
    assert cloud.posts() == 0
    assert ZNE.submit_rows(backend, p, 400, generator=generator, confirm=True, progress=False).counts().shots
    assert cloud.posts() == 6


WAITING: list[dict[str, Any]] = [
    {"progress": "no"},
    {"progress": 1},
    {"patience": float("nan")},
    {"patience": -1},
    {"patience": "10 s"},
    {"patience": True},
]
"""What is no progress and no patience."""


@hardware
@pytest.mark.parametrize("wrong", WAITING, ids=str)
def test_how_to_wait_is_checked_before_anything_is_recorded(cloud: Any, make: Any, wrong: Any) -> None:
    (name,) = wrong
    backend = make()
    for submit in (
        backend.submit_rows,
        lambda p, shots, **options: ZNE.submit_rows(backend, p, shots, **options),
    ):
        with pytest.raises((ArgumentError, DtypeError), match=f"{name}="):
            submit(P.double(), 100, **wrong)
        with pytest.raises(TypeError, match="pateince"):
            submit(P.double(), 100, pateince=3)
    assert cloud.posts() == 0
    assert find_jobs() == []


@hardware
def test_how_to_wait_for_a_job_is_checked_before_the_server_is_asked(cloud: Any, make: Any) -> None:
    """Also after a submission: NaN as a timeout never ended, and a text was asked for its status."""
    cloud.polls_in_queue = 2
    job, local = make().submit_rows(P, 100), QiskitQuantumBackend("aer").submit_rows(P, 100)
    asked = len(cloud.requests)
    timeouts = [{"timeout": x} for x in (float("nan"), -1, "1 s", True)]
    for wrong in (*WAITING, *timeouts):
        (name,) = wrong
        for wait in (job.outcomes, job.counts, lambda **options: job.counts(partial=True, **options)):
            with pytest.raises((ArgumentError, DtypeError), match=f"{name}="):
                wait(**wrong)
        if name != "timeout":
            with pytest.raises((ArgumentError, DtypeError), match=f"{name}="):
                job.send_rest(**wrong)
        else:
            with pytest.raises((ArgumentError, DtypeError), match="timeout="):
                local.counts(**wrong)
    for flag, use in (("partial", job.counts), ("again", job.send_rest)):
        with pytest.raises(DtypeError, match=f"{flag}='no'"):
            use(**{flag: "no"})
    assert len(cloud.requests) == asked
    assert job.counts(float("inf"), progress=False).shots == local.counts(float("inf")).shots == 100


@hardware
@pytest.mark.parametrize("answer", [True, np.True_, False, "n", 1, None])
def test_a_function_confirms_by_true_alone(cloud: Any, make: Any, answer: Any) -> None:
    costs: list[Any] = []

    def confirm(cost: Any) -> Any:
        costs.append(cost)
        return answer

    backend = make(max_quantum_seconds=3, budget="2 s", confirm=confirm)
    if answer is True or answer is np.True_:
        backend.sample_rows(P, 100)
        assert cloud.posts() == 1
    else:
        kind = CostError if answer is False else ArgumentError
        with pytest.raises(kind, match=r"max_quantum_seconds=3|confirm returned"):
            backend.sample_rows(P, 100)
        assert cloud.posts() == 0
    (cost,) = costs
    assert cost.quantum_seconds == pytest.approx(4.0)
    assert "max_quantum_seconds=3" in cost.exceeds[0]
    assert "budget of 2 s" in cost.exceeds[1]


@hardware
def test_a_true_for_one_call_is_a_confirmation_and_a_standing_one_is_none_of_the_budget(
    cloud: Any, make: Any
) -> None:
    backend = make(max_quantum_seconds=3, budget=5, confirm=True)
    backend.sample_rows(P, 100)
    with pytest.raises(CostError, match=r"budget of 5 s"):
        make(max_quantum_seconds=30, budget=5, confirm=True).sample_rows(P, 200)
    with pytest.raises(CostError):
        backend.submit_rows(P, 200, confirm=False)
    assert cloud.posts() == 1
    backend.submit_rows(P, 200, confirm=True)
    assert cloud.posts() == 2
    assert backend.plan_rows(P, 200).budget_left == 0


@pytest.mark.parametrize("confirm", ["no", "", 0, 1, None, [], 1.0])
def test_what_is_no_confirmation_is_refused_before_any_work(confirm: Any) -> None:
    if confirm is not None:
        with pytest.raises(ArgumentError, match="True, False, or a function"):
            QiskitQuantumBackend("ibm", "ibm_lagos").submit_rows(P, confirm=confirm)
    with pytest.raises(ArgumentError, match="True, False, or a function"):
        QiskitQuantumBackend("ibm", "ibm_lagos", confirm=confirm)


def test_limits_and_budgets_are_numbers_and_true_is_none() -> None:
    for wrong in (0, -1, float("nan"), True, "60", None):
        with pytest.raises((ArgumentError, DtypeError), match="max_quantum_seconds"):
            QiskitQuantumBackend("ibm", "ibm_fez", max_quantum_seconds=wrong)
    for wrong in (
        -1,
        float("inf"),
        True,
        "",
        "ten minutes",
        "10",
        "10 min per 0 days",
        "9" * 400 + " s",
        "10 min per 9999999999 days",
        [600],
    ):
        with pytest.raises((ArgumentError, DtypeError), match="budget"):
            QiskitQuantumBackend("ibm", "ibm_fez", budget=wrong)
    with pytest.raises(ArgumentError, match="budget=60 is not allowed with provider='aer'"):
        QiskitQuantumBackend("aer", budget=60)
    QiskitQuantumBackend("ibm", "ibm_fez", budget=np.float32(60), max_quantum_seconds=float("inf"))
    texts = {"10 min": 600, "10min": 600, "1.5 h": 5400, "90 s": 90, "2 Minutes": 120, np.int64(7): 7}
    assert {given: Budget.of(given).seconds for given in texts} == texts
    for seconds in (0, 1e-7, 45.5, 12345.6789, 6e6, 1e9 + 1):
        assert Budget.of(str(Budget(seconds, 28))) == Budget(seconds, 28)
    assert Budget.of("10 min / 28 d") == Budget.of("10 min per 28 days") == Budget(600, 28)


@hardware
def test_the_budget_is_that_of_the_folder_that_holds_the_run(cloud: Any, make: Any, tmp_path: Path) -> None:
    first = make(budget=10, run_dir=tmp_path / "a-run")
    first.submit_rows(P, 150)
    assert make(budget=10).plan_rows(P).budget_left == 5
    elsewhere = make(budget=10, run_dir=tmp_path / "other" / "run")
    assert elsewhere.plan_rows(P).budget_left == 10
    assert str(tmp_path / "other") in " ".join(elsewhere.plan_rows(P, 500).problems)


# --- The budget -------------------------------------------------------------------------------------


@hardware
def test_a_loop_of_calls_under_the_limit_ends_at_the_budget(cloud: Any, make: Any) -> None:
    cloud.polls_in_queue = 99
    for layer in range(5):
        backend = make(budget="20 s")  # each layer makes its own
        if layer < 4:
            backend.submit_rows(P, 150)
        else:
            with pytest.raises(CostError, match=r"the 0 s that are left of the budget of 20 s"):
                backend.submit_rows(P, 150)
    hybrid = CircuitSampler(make(budget="20 s"), hybrid_mode=HybridPolicy())
    with pytest.warns(qtx.FallbackWarning, match="budget of 20 s"):
        result = hybrid.measure(P, 150)
    assert result.counts.sum() == 300
    assert cloud.posts() == 4


@hardware
@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"budget": 0}, "more than the 0 s that are left of the budget of 0 s in "),
        ({"budget": "0 min per 28 days"}, "more than the 0 s that are left of the budget of 0 s per 28 days"),
        ({"budget": 0.25}, "more than the 0.25 s that are left of the budget of 0.25 s in "),
        ({"max_quantum_seconds": 1e-6}, "more than max_quantum_seconds=1e-06"),
    ],
)
@pytest.mark.filterwarnings("ignore:400 shots a row do not pay", "ignore:A circuit of one iterate")
def test_where_no_time_is_left_every_call_is_refused_and_says_why(
    cloud: Any, make: Any, limits: dict[str, Any], reason: str
) -> None:
    """Not even the cheapest of the planner's options can be paid."""
    backend, planner = make(**limits), MitigationPlanner([ZNE])
    v, vectors = torch.tensor([1.0, 0.0, 0.0, 2.0]), torch.ones(1, 1, 1)
    calls: dict[str, Callable[[], Any]] = {
        "raw": lambda: backend.sample_rows(P, 400),
        "extrapolation": lambda: ZNE.sample_rows(backend, P, 400),
        "planner": lambda: planner.sample_rows(backend, P, 400),
        "planner, one shot": lambda: MitigationPlanner([]).sample_rows(backend, P[:1], 1),
        "planner of a sampler": lambda: CircuitSampler(backend, mitigation=planner).measure(P, 400),
        "amplitude estimation": lambda: AmplitudeEstimator(backend).estimate(P, v, 100),
        "softmax": lambda: SoftmaxCircuitSampler(backend, degree=2).measure(vectors[0], vectors, 100),
    }
    for name, call in calls.items():
        with pytest.raises(CostError) as caught:
            call()
        assert str(caught.value).count(reason) == 1, name
    assert reason in str(backend.plan_rows(P, 400, mitigation=planner))
    with pytest.warns(qtx.FallbackWarning, match="2 of 2 rows drawn classically"):
        CircuitSampler(backend, mitigation=planner, hybrid_mode=True).measure(P, 400)
    assert cloud.posts() == 0
    assert find_jobs() == []


@hardware
def test_what_ibm_charged_settles_the_estimates(cloud: Any, make: Any) -> None:
    """Jobs of 5 s each are charged 1.5 s, so that a third fits into 10 s, and a fourth does not."""
    cloud.charge = lambda job: 1.5
    backend = make(budget=10)
    first = backend.submit_rows(P, 150)
    backend.submit_rows(P, 150)
    assert make(budget=10).plan_rows(P, 150).budget_left == 0
    backend.submit_rows(P, 150)  # it is asked what the first two were charged
    assert first.record.parts[0].charged_seconds == 1.5
    assert backend.bill(ask=False).budget_left == pytest.approx(2)
    bill = backend.bill(price_per_second=1.6)
    assert (bill.charged_seconds, bill.open_seconds, bill.budget_left) == (4.5, 0, 5.5)
    assert bill.price == pytest.approx(7.2)
    assert repr(bill).count("done") == 3
    assert "Charged 4.5 s" in repr(bill)
    cloud.polls_in_queue = 5
    queued = backend.submit_rows(P, 150)
    with pytest.raises(CostError, match="left of the budget"):
        backend.submit_rows(P, 150)
    queued.cancel()
    assert backend.bill().budget_left == 5.5  # it never reached the device
    cloud.charge = lambda job: None
    cloud.polls_in_queue = 0
    job = backend.submit_rows(P, 150)
    job.counts()
    job.settle()
    assert not backend.bill().jobs[0].settled
    assert backend.bill().budget_left == pytest.approx(0.5)


@hardware
def test_refused_jobs_cost_nothing_and_lost_ones_are_counted(ibm: Any, cloud: Any, make: Any) -> None:
    backend = make(budget=10)
    cloud.faults = [ibm.Fault("POST /jobs", 403)]
    with pytest.raises(BackendUnavailable):
        backend.submit_rows(P, 150)
    assert backend.bill().budget_left == 10
    cloud.faults = [ibm.Fault("POST /jobs", "cut")]
    with pytest.raises(BackendUnavailable, match="not known"):
        backend.submit_rows(P, 150)
    assert backend.bill().budget_left == 5  # it may still turn up
    (lost, _) = find_jobs()
    record = json.loads(lost.path.read_bytes())
    record["parts"][0]["attempted"] = "2026-01-01T00:00:00.000+00:00"
    lost.path.write_text(json.dumps(record))
    assert backend.bill().budget_left == 10  # long after, the server lists none with its tag
    assert backend.bill().jobs[1].settled


@hardware
def test_parts_that_are_sent_again_cost_anew(ibm: Any, cloud: Any, make: Any) -> None:
    cloud.job_error = "the fridge is warm"
    cloud.charge = lambda job: 1.0
    backend = make(budget=8)
    job = backend.submit_rows(P, 150)  # 5 s
    with pytest.raises(BackendUnavailable, match="fridge"):
        job.counts()
    cloud.job_error = None
    (found,) = find_jobs()
    with pytest.raises(CostError, match=r"the rest|3 s that are left of the budget"):
        found.send_rest(again=True)
    with pytest.raises(ArgumentError, match="confirm"):
        found.send_rest(again=True, confirm="yes")
    assert cloud.posts() == 1
    found.send_rest(again=True, confirm=lambda cost: cost.quantum_seconds == 5)
    assert cloud.posts() == 2
    assert found.counts().counts.sum() == 300
    bill = backend.bill()
    assert bill.budget_left == pytest.approx(2)  # 5 s of the failed job, of which IBM tells nothing, and 1 s
    cloud.faults = [ibm.Fault("POST /jobs", 403)]
    with pytest.raises(BackendUnavailable):
        backend.submit_rows(P[:1], 50, confirm=True)  # 2.5 s, refused by the server: it costs nothing
    refused = find_jobs()[0]
    with pytest.raises(CostError, match="left of the budget"):
        refused.send_rest()
    refused.send_rest(confirm=True)
    assert cloud.posts() == 4


@hardware
def test_a_budget_per_days_forgets_older_jobs_that_have_ended(cloud: Any, make: Any) -> None:
    cloud.charge = lambda job: 4.0
    backend = make(budget="10 s per 28 days")
    job = backend.submit_rows(P, 150)
    record = json.loads(job.path.read_bytes())
    record["recorded"] = "2026-01-01T00:00:00.000+00:00"
    job.path.write_text(json.dumps(record))
    assert backend.bill(ask=False).budget_left == 5  # it has not ended
    assert backend.bill().budget_left == 10
    assert make(budget="10 s").bill().budget_left == 6


@hardware
def test_leave_that_a_killed_process_held_is_free_again(cloud: Any, make: Any, tmp_path: Path) -> None:
    backend = make(budget=10)
    folder = tmp_path / "jobs" / ".holds"
    with backend.engine.reserved([]):
        other = make(budget=10)
        with backend.engine._guard.allow(backend.engine.cost([])):
            assert other.plan_rows(P, 150).budget_left == 10
        with other.engine.reserved(_runs(other, 3)):
            assert backend.plan_rows(P, 150).budget_left == 5
            (hold,) = folder.glob("*.json")
    assert not hold.exists()
    hold.write_text('{"quantum_seconds": 8}')  # its lock is gone with the process
    assert backend.plan_rows(P, 150).budget_left == 10
    assert not hold.exists()


def _runs(backend: QiskitQuantumBackend, seconds: float) -> list[Any]:
    from qtx_lab.backends.requests import PlannedRun

    return [PlannedRun(backend.transpiled(4), 1, round(100 * seconds))]


@hardware
def test_threads_that_spend_at_once_stay_within_the_budget(cloud: Any, make: Any) -> None:
    cloud.polls_in_queue = 99

    def spend(_: int) -> int:
        backend = make(budget=26)
        for sent in range(9):
            try:
                backend.submit_rows(P, 150)
            except CostError:
                return sent
        return 9

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(spend, range(4))) == cloud.posts() == 5


@hardware
def test_leave_that_becomes_a_job_is_never_left_out_of_the_budget(
    cloud: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread lists the jobs just before another, which had leave, records its own."""
    cloud.polls_in_queue = 99
    recording, listed = threading.Event(), threading.Event()

    def record(*args: Any, record_job: Any = ibm_engine.record_job, **options: Any) -> Path:
        recording.set()
        listed.wait(0.5)
        return record_job(*args, **options)

    def find(*args: Any, find_records: Any = budget.find_records) -> Any:
        records = list(find_records(*args))
        if recording.is_set():
            listed.set()
            time.sleep(0.3)
        return records

    monkeypatch.setattr(ibm_engine, "record_job", record)
    monkeypatch.setattr(budget, "find_records", find)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(make(budget=6).submit_rows, P, 150)
        assert recording.wait(30)
        with pytest.raises(CostError, match="budget"):
            make(budget=6).submit_rows(P, 150)
        first.result()
    assert cloud.posts() == 1


@hardware
def test_processes_that_spend_at_once_stay_within_the_budget(cloud: Any, tmp_path: Path) -> None:
    cloud.polls_in_queue = 99
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["qtx_lab.backends.ibm.engine", "qtx_lab.circuits", "scipy.stats"])
    environment = {**cloud.environment(), "QTX_LAB_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    results = [tmp_path / f"{i}.result" for i in range(2)]
    started = []
    for result in results:
        given = {"arguments": ("spend", environment, str(result))}
        options = {"init_globals": given, "run_name": "__main__"}
        started.append(processes.Process(target=runpy.run_path, args=(str(CLIENT),), kwargs=options))
        started[-1].start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    sent = [json.loads(result.read_bytes()) for result in results]
    assert sum(sent) == cloud.posts() == 10  # of 2.035 s each


@hardware
def test_whatever_is_called_stays_within_the_limit_and_the_budget(
    cloud: Any, make: Any, seed: int, soak: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server counts what arrives: of each call, and of all of them, without what was confirmed."""
    refused = confirmed = sent = 0
    for schedule in range(60 if soak else 2):
        rng = random.Random(f"{seed} {schedule}")
        cloud.reset()
        monkeypatch.setenv("QTX_LAB_HOME", str(tmp_path / str(schedule)))
        monkeypatch.setitem(cloud.devices["ibm_lagos"][0], "max_shots", rng.choice([60, 32000]))
        cloud.polls_in_queue = rng.choice([0, 0, 2])
        share = rng.choice([1.0, 0.5])  # of the estimate that is charged
        cloud.charge = lambda job, share=share: share * _seconds(cloud, job)
        limit, budget = rng.uniform(5, 30), rng.uniform(20, 90)
        allowed = 0.0
        for _ in range(7):
            answers: list[Any] = []

            def confirm(cost: Any, answers: list[Any] = answers, yes: bool = rng.random() < 0.15) -> bool:
                answers.append(cost if yes else None)
                return yes

            backend = make(
                max_quantum_seconds=limit,
                budget=budget,
                confirm=rng.choice([False, True, confirm]),
            )
            before = list(cloud.jobs)
            try:
                _call(backend, rng)
            except (CostError, BackendUnavailable):
                refused += 1
            new = [_seconds(cloud, job) for id, job in cloud.jobs.items() if id not in before]
            sent += len(new)
            yes = [cost for cost in answers if cost is not None]
            confirmed += len(yes)
            if not yes and backend.engine._guard.confirm is not True:
                assert sum(new) <= limit + 1e-6, f"schedule {schedule}"
            allowed += sum(new) if yes else 0.0
            total = sum(share * _seconds(cloud, job) for job in cloud.jobs.values())
            assert total <= budget + allowed + 1e-6, f"schedule {schedule}"
    print(f"{sent} jobs sent, {refused} calls refused, {confirmed} confirmed")
    assert sent > 5
    assert refused > 1


def _seconds(cloud: Any, job: Any) -> float:
    """Estimated quantum seconds of a job, from what the server received."""
    return ibm_engine.SECONDS_PER_JOB + ibm_engine.SECONDS_PER_EXECUTION * cloud.executions(job)


def _call(backend: QiskitQuantumBackend, rng: random.Random) -> None:
    """One of the calls that measure rows, with rows and shots by chance."""
    p = torch.rand(rng.randint(1, 4), 4, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    p, shots = p / p.sum(-1, keepdim=True), rng.choice([20, 80, 250])
    mitigation = rng.choice([None, ZNE, CircuitMitigation(readout=True), CircuitMitigation()])
    hybrid = rng.random() < 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        match rng.randrange(4):
            case 0:
                backend.submit_rows(p, shots)
            case 1:
                backend.sample_rows(p, shots)
            case 2:
                CircuitSampler(backend, mitigation=mitigation, hybrid_mode=hybrid).measure(p, shots)
            case 3:
                sampler = CircuitSampler(backend, mitigation=mitigation, hybrid_mode=hybrid)
                sampler.draw(p.log(), shots, replicates=rng.choice([1, 2, 4]))


# --- Plans ------------------------------------------------------------------------------------------


@hardware
def test_a_plan_sends_nothing_and_tells_what_a_call_sends(cloud: Any, make: Any) -> None:
    backend = make(max_quantum_seconds=3, budget="10 min")
    state = torch.get_rng_state()
    plan = backend.plan_rows(P, 100, price_per_second=1.6)
    assert torch.equal(torch.get_rng_state(), state)
    assert cloud.posts() == 0
    assert (plan.circuits, plan.shots, plan.executions, plan.jobs) == (2, 100, 200, 1)
    assert plan.quantum_seconds == pytest.approx(4)
    assert plan.price == pytest.approx(6.4)
    circuit = backend.transpiled(4)
    assert (plan.depth, plan.two_qubit_gates) == (circuit.depth(), circuit.num_nonlocal_gates())
    assert (plan.budget, plan.budget_left) == ("10 min", 600)
    assert plan.problems == ("more than max_quantum_seconds=3",)
    text = repr(plan)
    for part in ("nothing was sent", "ibm_lagos, calibrated 2024", "IBM's rule", "6.40", "600 s are left"):
        assert part in text
    empty = backend.plan_rows(torch.zeros(2, 4), 100)
    assert (empty.circuits, empty.quantum_seconds, empty.problems) == (0, 0, ())
    with pytest.raises(DtypeError, match="price_per_second"):
        backend.plan_rows(P, price_per_second="1.6")
    with pytest.raises(ArgumentError, match="shots=0"):
        backend.plan_rows(P, 0)
    with pytest.raises(ArgumentError, match="planned_runs"):
        backend.plan_rows(P, mitigation=object())  # type: ignore[arg-type]


def test_a_plan_needs_no_account(no_account: None) -> None:
    p = torch.full((4, 8), 0.125)
    twin = QiskitQuantumBackend("aer", "fake_fez", loader="tree").plan_rows(p, 1000)
    assert (twin.device, twin.planned_on, twin.budget_left) == ("fake_fez", "fake_fez", None)
    assert twin.quantum_seconds == pytest.approx(2 + 4000 * 0.00035)
    device = QiskitQuantumBackend("ibm", "ibm_fez", loader="tree", max_quantum_seconds=3)
    plan = device.plan_rows(p, 1000)
    assert (plan.device, plan.planned_on) == ("ibm_fez", "fake_fez")
    assert plan.cost == twin.cost
    assert plan.qubits == 3
    assert "save_account" in plan.problems[0]
    assert "max_quantum_seconds=3" in plan.problems[1]
    saved = device.plan_rows(p, 1000, target=fake_device("fake_torino").target)
    assert (
        saved.cost.runs[0].two_qubit_gates == device.plan_rows(p, 1000, target="fake_torino").two_qubit_gates
    )
    with pytest.raises(ArgumentError, match="fake_torino"):
        device.plan_rows(p, target="fake_torin")
    with pytest.raises(DtypeError, match="target"):
        device.plan_rows(p, target=3)  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailable, match="save_account"):
        QiskitQuantumBackend("ibm", "ibm_nowhere").plan_rows(p)
    free = QiskitQuantumBackend("aer").plan_rows(p)
    assert (free.quantum_seconds, free.circuits) == (0, 4)
    assert repr(QiskitQuantumBackend("aer").bill()) == "Nothing was sent to a device."


def test_a_plan_of_a_mitigation_lists_all_noise_levels(no_account: None) -> None:
    backend = QiskitQuantumBackend("aer", "fake_fez", loader="tree", optimization_level=1)
    plan = backend.plan_rows(P, 1000, mitigation=ZNE)
    assert [run.purpose for run in plan.cost.runs] == ["readout calibration"] * 4 + [
        "noise level 1",
        "noise level 3",
    ]
    assert sum(run.shots for run in plan.cost.runs[-2:]) == 1000
    assert plan.cost.runs[-1].two_qubit_gates == 3 * plan.cost.runs[-2].two_qubit_gates
    planner = MitigationPlanner([CircuitMitigation(ZeroNoiseExtrapolation([1, 3]), readout=False)])
    assert backend.plan_rows(P, 1000, mitigation=planner).executions == 2000


def test_long_circuits_take_longer_than_the_rule(no_account: None) -> None:
    """At noise level 99 the circuit lasts longer than the 100 µs that IBM's rule leaves for it."""
    backend = QiskitQuantumBackend("aer", "fake_fez", loader="tree", optimization_level=1)
    long = CircuitMitigation(ZeroNoiseExtrapolation([1, 199]), readout=False)
    plan = backend.plan_rows(torch.full((1, 16), 1 / 16), 1000, mitigation=long)
    short, folded = plan.cost.runs
    assert short.quantum_seconds == pytest.approx(2 + 0.00035 * short.executions)
    assert folded.quantum_seconds > 2 + 0.00035 * folded.executions
    assert "where the circuit takes longer" in plan.estimated_by


def test_a_plan_tells_how_long_a_shot_is_though_the_rule_counts_short_ones_alike(no_account: None) -> None:
    """64 rows × 10,000 shots are 226 s for every loader: the wait between shots is longer than a shot."""
    p, target = torch.full((64, 16), 1 / 16), fake_device("fake_fez").target
    durations = {}
    for loader in ("mps", "dynamic"):
        backend = QiskitQuantumBackend("aer", "fake_fez", loader=loader, optimization_level=1)
        plan = backend.plan_rows(p, 10_000)
        assert plan.quantum_seconds == pytest.approx(2 + 0.00035 * 640_000)
        assert "counts circuits of up to 100 µs alike" in plan.estimated_by
        assert "shot µs" in repr(plan)
        durations[loader] = plan.cost.runs[0].shot_seconds
    circuit = backend.with_engine(TargetEngine("fake_fez")).transpiled(16)
    reads = 4 * target["measure"][0,].duration
    waits = sum(i.operation.name == "if_else" for i in circuit.data) * TYPICAL_FEED_FORWARD_LATENCY_S
    assert 0.5 * (reads + waits) < durations["dynamic"] < 1.5 * (reads + waits)
    circuit = QiskitQuantumBackend("aer", loader="mps").with_engine(TargetEngine("fake_fez")).transpiled(16)
    assert shot_duration(circuit, target) == pytest.approx(circuit.estimate_duration(target), rel=0.01)
