"""Jobs and their records: whatever is killed, cut or refused, no job is lost and none is submitted twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import runpy
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import qtx_lab
from qtx_lab.backends.base import JobStatus
from qtx_lab.backends.ibm import submission
from qtx_lab.backends.ibm.jobs import DeviceJob, find_jobs
from qtx_lab.backends.ibm.ledger import Block, record_job, update_record
from qtx_lab.backends.ibm.remote import Busy, Gone, Refused, SessionClosed, Unreachable
from qtx_lab.backends.ibm.submission import submit_parts
from qtx_lab.backends.requests import CalibrationRequest, MitigatedRowRequest, RowRequest
from qtx_lab.cli import main
from qtx_lab.errors import ArgumentError, BackendUnavailable, FallbackWarning, JobTimeout, StorageError
from qtx_lab.experiments.notebooks import run_notebook

CLIENT = Path(__file__).with_name("ibm_client.py")
RECORDS_WITHOUT_VERSION = Path(__file__).with_name("records_without_version")
SHOTS = 50


class Machine:
    """A `Remote` in memory, whose answers a test sets."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.states: dict[str, str] = {}
        self.bound: dict[str, np.ndarray] = {}
        self.unreachable = 0
        self.posts: list[str] = []
        self.answers: list[BaseException | None] = []

    def accept(self, part: Any) -> str:
        id = f"id-{len(self.jobs)}"
        self.jobs[id] = part.tag
        self.states[id] = "queued"
        return id

    def lookup(self, tag: str) -> list[str]:
        if self.unreachable:
            self.unreachable -= 1
            raise Unreachable("no answer.")
        return [id for id, other in self.jobs.items() if other == tag]

    def status(self, id: str) -> JobStatus:
        if self.states[id] == "deleted":
            raise Gone("404")
        return JobStatus(self.states[id])

    def outcomes(self, id: str) -> np.ndarray:
        if self.states[id] == "deleted":
            raise Gone("404")
        if id in self.bound:
            rows = self.bound[id][:, 0].astype(np.uint8)  # each row has its own number as its outcome
            return rows[:, None, None].repeat(10, 1)
        return np.full((1, 10, 1), int(id.removeprefix("id-")), dtype=np.uint8)

    def cancel(self, id: str) -> None:
        self.states[id] = "cancelled"

    def post(self, device: Any, circuit: Any, bindings: np.ndarray, shots: int, **tags: Any) -> str:
        """Accept a part, as `accept` does, unless a test wants another answer."""
        self.posts.append(tags["tags"][-1])
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, BaseException):
            raise answer
        id = f"id-{len(self.jobs)}"
        self.jobs[id], self.states[id], self.bound[id] = self.posts[-1], "done", bindings
        return id


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def recorded(quick: None, machine: Machine, tmp_path: Path) -> DeviceJob:
    parts = [Block(i, i + 1, 10) for i in range(3)]
    facts = {"provider": "none", "device": "none", "circuits": 3, "shots": 10}
    return DeviceJob(record_job(tmp_path / "jobs", None, parts, **facts), lambda: machine)


# --- The ledger -----------------------------------------------------------------------------------


def test_parts_are_posted_once_each_and_put_together_in_order(recorded: DeviceJob, machine: Machine) -> None:
    submit_parts(recorded.path, recorded.remote, machine.accept)
    assert recorded.last_known.state == "submitted"
    machine.states |= {"id-0": "running", "id-1": "queued", "id-2": "done"}
    assert recorded.status().state == "queued"
    machine.states |= dict.fromkeys(machine.jobs, "done")
    assert recorded.outcomes()[:, 0, 0].tolist() == [0, 1, 2]
    assert list(machine.jobs.values()) == [f"{recorded.tag}.{i}" for i in range(3)]


def test_a_part_whose_answer_was_lost_is_found_by_its_tag(recorded: DeviceJob, machine: Machine) -> None:
    def post(part: Any) -> str:
        machine.accept(part)
        machine.unreachable = 1
        raise Unreachable("cut.")

    submit_parts(recorded.path, recorded.remote, post)
    assert recorded.id == "id-0, id-1, id-2"


def test_a_refused_part_stops_the_rest_and_what_is_there_can_be_cancelled(
    recorded: DeviceJob, machine: Machine
) -> None:
    def post(part: Any) -> str:
        if part.start == 1:
            raise Refused("no more.")
        return machine.accept(part)

    with pytest.raises(BackendUnavailable, match=f"{recorded.tag}: 1 of its 3 parts"):
        submit_parts(recorded.path, recorded.remote, post)
    assert len(machine.jobs) == 1
    assert recorded.last_known.state == "failed"
    cancellation = recorded.cancel()
    assert machine.states == {"id-0": "cancelled"}
    assert (cancellation.cancelled, cancellation.measured, cancellation.others) == ((0,), (), (1, 2))
    assert cancellation.status.state == "failed"
    with pytest.raises(BackendUnavailable, match="failed"):
        recorded.cancel()


def test_an_unknown_outcome_of_a_post_is_an_error_and_never_leads_to_a_second_post(
    recorded: DeviceJob, machine: Machine
) -> None:
    posts = []

    def post(part: Any) -> str:
        posts.append(part.tag)
        raise Unreachable("cut.")

    with pytest.raises(BackendUnavailable, match=f"{recorded.tag} was accepted is not known"):
        submit_parts(recorded.path, recorded.remote, post)
    assert len(posts) == 1
    assert recorded.status().state == "recorded"
    with pytest.raises(BackendUnavailable, match="never arrived"):
        recorded.outcomes()
    machine.accept(recorded.record.parts[0])  # it shows up late
    assert recorded.status().state == "recorded"  # two parts are still nowhere
    assert recorded.id == "id-0"


def test_a_record_is_durable_before_anything_is_posted(recorded: DeviceJob, machine: Machine) -> None:
    def post(part: Any) -> str:
        (job,) = find_jobs(recorded.path.parent.parent)
        assert part.tag in [other.tag for other in job.record.parts]
        return machine.accept(part)

    submit_parts(recorded.path, recorded.remote, post)


def test_jobs_of_runs_are_found_and_a_broken_record_costs_only_itself(
    recorded: DeviceJob, tmp_path: Path
) -> None:
    folder = tmp_path / "20260101T000000Z-a-run-abcdef" / "jobs"
    facts = {"provider": "none", "device": "none", "circuits": 1, "shots": 1}
    other = record_job(folder, None, [Block(0, 1, 1)], **facts)
    (folder / "qtx-broken.json").write_text("{")
    with pytest.warns(UserWarning, match="qtx-broken"):
        jobs = qtx_lab.find_jobs(tmp_path)
    assert [job.path for job in jobs] == [other, recorded.path]
    assert [job.path for job in find_jobs(tmp_path, tag=other.stem)] == [other]
    (folder / "qtx-broken.json").unlink()
    recorded.path.unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        recorded.status()


BROKEN = {
    "recorded": [None, 5, "yesterday", "2026-01-01T00:00:00"],
    "device": [None, 3],
    "circuits": [None, "2"],
    "shots": [None],
    "region": [{}],
    "parts": [None, {}, [], "abc", [3], [{}], [None]],
    "tag": [None, "another"],
}


def test_no_foreign_or_partial_record_stops_a_listing(recorded: DeviceJob, tmp_path: Path) -> None:
    """Whatever else is in the folder is skipped, with a warning that names it and says why."""
    record, folder = json.loads(recorded.path.read_bytes()), tmp_path / "jobs"
    (part, *_) = record["parts"]
    cases = [{**record, name: value} for name, values in BROKEN.items() for value in values]
    needed = [name for name in BROKEN if name != "region"]
    cases += [{key: value for key, value in record.items() if key != name} for name in needed]
    wrong = {"state": "asleep", "id": 3, "reason": {}, "start": None, "tag": 1}
    cases += [
        {**record, "parts": [{**part, name: value}]} for name, value in wrong.items() if name != "region"
    ]
    cases += [{**record, "parts": [{key: part[key] for key in part if key != name}]} for name in part]
    cases += [{**record, "request": request} for request in (None, {}, {"kind": "rows", "loader": "tree"})]
    cases += [{**record, "schema_version": 2}, [], 3, None]
    contents = [json.dumps(case) for case in cases] + ["{", "", "[" * 100_000, "1" * 10_000, "\0"]
    for i, content in enumerate(contents):
        path = folder / f"qtx-broken-{i}.json"
        if content.startswith("{") and content != "{" and json.loads(content).get("tag") == record["tag"]:
            content = json.dumps({**json.loads(content), "tag": path.stem})
        path.write_text(content)
    (folder / "qtx-folder.json").mkdir()
    with pytest.warns(UserWarning, match="The job's record") as caught:
        assert [job.tag for job in find_jobs(tmp_path)] == [recorded.tag]
    assert len(caught) == len(contents) + 1
    listed = CliRunner().invoke(main, ["jobs", "--home", str(tmp_path)])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["tag", recorded.tag]
    assert listed.stderr.count("skipped: The job's record") == len(contents) + 1
    assert "parts.0.state is 'asleep'; Input should be 'recorded'" in listed.stderr


def test_whatever_a_record_holds_it_costs_only_itself(recorded: DeviceJob, tmp_path: Path, seed: int) -> None:
    """A value of a record is replaced, left out or doubled, at any depth; the others are read."""
    rng = random.Random(seed)
    record, folder = json.loads(recorded.path.read_bytes()), tmp_path / "jobs"
    p = torch.full((3, 4), 0.25, dtype=torch.float64)
    rows = RowRequest(p, qtx_lab.make_loader("tree"), 10, 0)
    facts = {"device": "none", "circuits": 3, "shots": 10}
    other = json.loads(record_job(folder, rows, [Block(0, 3, 10)], **facts).read_bytes())
    junk = [
        None,
        True,
        -1,
        0,
        10**30,
        1e400,
        float("nan"),
        "",
        "\ud800",
        "a\0b",
        [],
        {},
        [[]],
        {"": {}},
        b"x",
    ]
    dates = ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-01-01T00:00:00Z"]
    for i in range(300):
        content = json.loads(json.dumps(rng.choice([record, other])))
        place = content
        while True:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.3:
                break
            place = place[key]
        action = rng.choice(["replace", "replace", "date", "remove", "double"])
        if action == "remove":
            del place[key]
        elif action == "double" and isinstance(place, list):
            place.append(place[key])
        else:
            place[key] = rng.choice(dates if action == "date" else junk)
        path = folder / f"qtx-mutant-{i}.json"
        if content.get("tag") in (record["tag"], other["tag"]):
            content["tag"] = path.stem
        path.write_text(json.dumps(content, default=str))
    (folder / "qtx-large.json").write_bytes(b" " * 1000)
    os.mkfifo(folder / "qtx-pipe.json")
    (folder / "qtx-loop.json").symlink_to(folder / "qtx-loop.json")
    with pytest.warns(UserWarning, match="The job's record") as caught:
        found = find_jobs(tmp_path)
    assert {recorded.tag, other["tag"]} < {job.tag for job in found}
    assert len(found) + len(caught) == 300 + 2 + 3
    assert len(caught) > 150
    machine = Machine()
    for job in found:
        mine = DeviceJob(job.path, lambda: machine)
        assert mine.tag in repr(mine)
        for ask in (mine.status, mine.counts, mine.missing_rows, mine.send_rest, mine.cancel):
            with suppress(qtx_lab.QtxError):
                ask()
    listed = CliRunner().invoke(main, ["jobs", "--home", str(tmp_path)])
    assert listed.exit_code == 0, listed.exception


def test_records_of_a_later_version_say_so(recorded: DeviceJob) -> None:
    record = json.loads(recorded.path.read_bytes())
    recorded.path.write_text(json.dumps({**record, "schema_version": 2}))
    with pytest.raises(StorageError, match="schema_version 2, and this qtx_lab reads 1"):
        recorded.status()


def test_damaged_outcomes_are_fetched_again(recorded: DeviceJob, machine: Machine) -> None:
    submit_parts(recorded.path, recorded.remote, machine.accept)
    machine.states |= dict.fromkeys(machine.jobs, "done")
    good = recorded.outcomes()
    file = recorded.path.with_suffix(".outcomes.npz")
    whole = file.read_bytes()
    other = file.with_name("other.npz")
    np.savez_compressed(other, outcomes=good[:1])
    for junk in (b"", b"junk", b"PK\x03\x04", whole[:60], other.read_bytes(), b"\x93NUMPY\x01\x00"):
        file.write_bytes(junk)
        with pytest.warns(FallbackWarning, match="fetched again"):
            assert np.array_equal(recorded.outcomes(), good)
        assert np.array_equal(recorded.outcomes(), good)  # and they are on disk again
    file.write_bytes(b"junk")
    machine.states |= dict.fromkeys(machine.jobs, "gone")

    def gone(id: str) -> np.ndarray:
        raise Unreachable("deleted.")

    machine.outcomes = gone  # type: ignore[method-assign]
    with (
        pytest.warns(FallbackWarning),
        pytest.raises(StorageError, match=r"damaged.*cannot be fetched again"),
    ):
        recorded.outcomes()


def test_rows_that_cannot_be_read_are_one_clear_error(tmp_path: Path) -> None:
    request = RowRequest(torch.full((2, 4), 0.25, dtype=torch.float64), qtx_lab.make_loader("tree"), 5, 0)
    parts = [Block(0, 2, 5)]
    facts = {"provider": "none", "device": "none", "circuits": 2, "shots": 5}
    path = record_job(tmp_path / "jobs", request, parts, **facts)
    assert torch.equal(DeviceJob(path, Machine).request().p, request.p)
    rows = path.with_suffix(".rows.npz")
    rows.write_bytes(b"junk")
    with pytest.raises(StorageError, match="damaged"):
        DeviceJob(path, Machine).request()
    rows.unlink()
    fetched = CliRunner().invoke(main, ["jobs", "--home", str(tmp_path), "--fetch", path.stem])
    assert fetched.exit_code == 2
    assert fetched.stderr.startswith("error: Cannot read")
    for option in ("--fetch", "--cancel"):
        empty = CliRunner().invoke(main, ["jobs", "--home", str(tmp_path), option, ""])
        assert empty.exit_code == 2
        assert "empty TAG" in empty.stderr


def test_every_kind_of_request_is_rebuilt_from_its_record(tmp_path: Path) -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    rows = RowRequest(p, qtx_lab.make_loader("tree"), 90, seed=4, diagnostics={"fallbacks": ("a", "b")})
    settings = {"name": "readout, linear 1 3 (local)", "noise_levels": [1, 3], "readout": True}
    level = MitigatedRowRequest(rows, settings, noise_level=3.0, shots=30, batch="abc")
    calibration = CalibrationRequest(qubits=(5, 3), prepared=(0, 1), shots=70, seed=8)
    facts = {"device": "none", "circuits": 1, "shots": 30}
    paths = [
        record_job(tmp_path / "jobs", x, [Block(0, 1, 30)], **facts) for x in (rows, level, calibration, None)
    ]
    assert len(find_jobs(tmp_path)) == 4
    plain, mitigated, calibrated, other = (DeviceJob(path, Machine).request() for path in paths)
    for rebuilt in (plain, mitigated.rows):
        assert torch.equal(rebuilt.p, p)
        assert (rebuilt.loader.name, rebuilt.shots, rebuilt.seed) == ("tree", 90, 4)
        assert rebuilt.diagnostics == rows.diagnostics
    assert mitigated.mitigation == settings
    assert (mitigated.noise_level, mitigated.shots, mitigated.batch) == (3.0, 30, "abc")
    assert calibrated == calibration
    assert other is None
    for path, kind in zip(paths[1:], ("mitigated-rows", "calibration", "circuits"), strict=True):
        job = DeviceJob(path, Machine)
        assert job.record.request.kind == kind
        with pytest.raises(ArgumentError, match=f"{kind}.*take its `outcomes`"):
            job.counts()


def test_records_from_before_there_was_a_schema_version_are_read(machine: Machine, tmp_path: Path) -> None:
    """Three records written through IBM's client: rows that are done, rows in the queue, other circuits."""
    shutil.copytree(RECORDS_WITHOUT_VERSION, tmp_path / "jobs")
    states = {str(job.last_known.state): job for job in find_jobs(tmp_path)}
    assert set(states) == {"done", "queued", "submitted"}
    done = states["done"]
    assert done.counts().counts.tolist() == [[17, 12, 11, 0], [0, 0, 0, 40], [0, 0, 0, 0]]
    assert done.counts().diagnostics["calibration"] == "2024-05-27T15:51:15+00:00"
    assert done.request().loader.name == "dynamic"
    assert states["submitted"].request() is None
    queued = DeviceJob(states["queued"].path, lambda: machine)
    assert queued.request().p.tolist() == done.request().p.tolist()
    machine.states["job-2"] = "done"
    assert queued.status().state == "done"
    assert json.loads(queued.path.read_bytes())["schema_version"] == 1
    assert queued.record["quantum_seconds"] == queued.record.quantum_seconds == 2.028
    broken = json.loads((RECORDS_WITHOUT_VERSION / done.path.name).read_bytes())
    for name in ("rows", "keys", "seed", "diagnostics"):
        done.path.write_text(json.dumps({key: value for key, value in broken.items() if key != name}))
        with pytest.raises(StorageError, match=f"request.rows.{name} is missing"):
            done.status()


# --- Split jobs, of which some parts ran ----------------------------------------------------------


@pytest.fixture
def split(quick: None, machine: Machine, tmp_path: Path) -> DeviceJob:
    """Four rows of four keys, the second of which is not run, as three parts of one row; nothing is sent.

    `machine` gives the keys 0, 1, 2 for the rows 0, 2, 3.
    """
    p = torch.full((4, 4), 0.25, dtype=torch.float64)
    p[1] = 0
    request = RowRequest(p, qtx_lab.make_loader("tree"), 10, 0)
    facts = {"provider": "none", "device": "none", "circuits": 3, "shots": 10}
    program = {"circuit": qtx_lab.make_loader("tree").circuit(2), "bindings": np.arange(3.0)[:, None]}
    parts = [Block(i, i + 1, 10) for i in range(3)]
    path = record_job(tmp_path / "jobs", request, parts, **program, **facts)
    return DeviceJob(path, lambda: machine)


def again(job: DeviceJob) -> DeviceJob:
    """The same job, as another process finds it."""
    return DeviceJob(job.path, job.remote)


def check_whole(job: DeviceJob) -> None:
    assert job.counts(progress=False).counts.argmax(-1).tolist() == [0, 0, 1, 2]
    assert job.counts().counts.sum(-1).tolist() == [10, 0, 10, 10]
    assert "missing_rows" not in job.counts().diagnostics
    assert job.missing_rows() == ()
    assert not list(job.path.parent.glob("*.outcomes-*"))


@pytest.mark.parametrize("error", [Refused("no more."), Busy("429"), KeyboardInterrupt(), SystemExit()])
def test_the_rest_of_a_split_job_is_sent_later_and_nothing_twice(
    split: DeviceJob, machine: Machine, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.answers = [None, *[error] * 99]
    with pytest.raises((BackendUnavailable, KeyboardInterrupt, SystemExit)):
        split.send_rest(patience=0.05)
    machine.answers = []
    found = again(split)
    monkeypatch.setattr(submission, "LISTING_LAG_S", 0.0)
    with pytest.raises(
        BackendUnavailable, match=r"2 of 3 parts are missing.*rows 2 to 3.*partial=True"
    ) as said:
        found.counts()
    assert split.tag in str(said.value)
    part = found.counts(partial=True, progress=False)
    assert part.counts.tolist() == [[10, 0, 0, 0]] + [[0] * 4] * 3
    assert part.discarded.tolist() == [0] * 4
    assert part.diagnostics["missing_rows"] == found.missing_rows() == (2, 3)
    assert part.diagnostics["shots_by_row"] == (10, 0, 0, 0)
    if isinstance(error, KeyboardInterrupt | SystemExit):  # as a killed process, it left a post unanswered
        with pytest.raises(BackendUnavailable, match=r"not known.*can be sent \d+ s from now"):
            found.send_rest()
        monkeypatch.setattr(submission, "NEVER_ARRIVED_S", 0.0)
    found.send_rest()
    check_whole(found)
    assert list(machine.jobs.values()) == [f"{split.tag}.{i}" for i in range(3)]
    found.send_rest(again=True)
    assert len(machine.jobs) == 3


def test_a_part_that_was_accepted_unanswered_is_found_and_not_sent_again(
    split: DeviceJob, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    post = machine.post

    def killed(*arguments: Any, **options: Any) -> str:
        post(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "post", killed)
    with pytest.raises(KeyboardInterrupt):
        split.send_rest()
    monkeypatch.setattr(machine, "post", post)
    monkeypatch.setattr(submission, "NEVER_ARRIVED_S", 0.0)
    check_whole(again(split).send_rest())
    assert machine.posts == [f"{split.tag}.{i}" for i in range(3)]


def test_limits_are_waited_for_and_said(split: DeviceJob, machine: Machine) -> None:
    machine.answers = [None, Busy("limit of 3 pending jobs"), Busy("429"), None, Busy("429")]
    shown: list[JobStatus] = []
    split.send_rest(progress=shown.append)
    assert len(shown) == 3
    assert "takes no more jobs now; 1 of 3 parts are sent; trying again in" in str(shown[0])
    check_whole(split)
    notes = split.counts().diagnostics["submission"]
    assert len(notes) == 2
    assert all("took no more jobs" in note for note in notes)
    assert len(machine.jobs) == 3


@pytest.mark.parametrize("answer", ["busy", "refused", "accepted"])
def test_what_is_cancelled_while_parts_are_sent_is_not_sent(
    split: DeviceJob, machine: Machine, answer: str
) -> None:
    """Another process cancels while the second part waits for room, is refused, or is accepted."""
    machine.answers = [None, {"busy": Busy("429"), "refused": Refused("no more.")}.get(answer)]
    post = machine.post

    def queued(*arguments: Any, **tags: Any) -> str:
        if len(machine.posts) == 1 and answer != "busy":
            assert again(split).cancel().cancelled == (0, 2)
        id = post(*arguments, **tags)
        machine.states[id] = "queued"
        return id

    def cancel_while_busy(status: JobStatus) -> None:
        assert again(split).cancel().cancelled == (0, 1, 2)

    machine.post = queued  # type: ignore[method-assign]
    refused = pytest.raises(BackendUnavailable, match="no more")
    with refused if answer == "refused" else nullcontext():
        split.send_rest(progress=cancel_while_busy)
    assert len(machine.posts) == 2
    assert split.record.parts[2].state == "cancelled"
    split.send_rest(progress=False)
    assert f"{split.tag}.2" not in machine.posts


def test_a_busy_server_that_gives_no_list_is_sent_nothing(split: DeviceJob, machine: Machine) -> None:
    machine.answers, machine.unreachable = [Busy("429")], 10**6
    with pytest.raises(BackendUnavailable, match=r"took no more jobs for 0\.2 s.*send_rest"):
        submit_parts(
            split.path,
            split.remote,
            lambda part: machine.post(None, None, np.zeros((1, 1)), 1, tags=[part.tag]),
            patience=0.2,
        )
    assert len(machine.posts) == 1
    assert split.last_known.state == "recorded"


def test_a_closed_session_is_opened_again_once(split: DeviceJob, machine: Machine) -> None:
    machine.answers = [None, SessionClosed("closed.")]
    check_whole(split.send_rest())
    assert "another was opened" in split.counts().diagnostics["submission"][0]
    machine.answers = [SessionClosed("closed.")] * 3
    other = DeviceJob(
        record_job(
            split.path.parent, None, [Block(0, 1, 10)], device="none", circuits=1, shots=10,
            circuit=qtx_lab.make_loader("tree").circuit(2), bindings=np.zeros((1, 1)),
        ),
        lambda: machine,
    )  # fmt: skip
    with pytest.raises(BackendUnavailable, match="closed"):
        other.send_rest()


def test_a_deleted_part_is_gone_at_once_and_the_others_are_kept(split: DeviceJob, machine: Machine) -> None:
    split.send_rest()
    machine.states = {"id-0": "queued", "id-1": "deleted", "id-2": "done"}
    status = split.status()
    assert status.state == "gone"
    assert "no job id-1" in status.reason
    assert [str(part.state) for part in split.record.parts] == ["queued", "gone", "done"]
    with pytest.raises(BackendUnavailable, match=r"gone.*rows 0, 2"):
        split.counts()
    assert split.counts(0.1, partial=True, progress=False).diagnostics["missing_rows"] == (0, 2)
    machine.states = {"id-0": "done", "id-1": "deleted", "id-2": "deleted"}  # what was fetched stays
    part = again(split).counts(partial=True, progress=False)
    assert part.counts.argmax(-1).tolist() == [0, 0, 0, 2]
    assert part.diagnostics["missing_rows"] == (2,)
    check_whole(again(split).send_rest(again=True))
    assert machine.posts[3:] == [f"{split.tag}.1.1"]
    assert split.record.parts[1].earlier_ids == ["id-1"]


def test_results_that_were_deleted_are_gone(split: DeviceJob, machine: Machine) -> None:
    split.send_rest()
    split.status()
    machine.states["id-2"] = "deleted"
    with pytest.raises(BackendUnavailable, match=r"gone: IBM has no job id-2"):
        split.counts()
    assert split.last_known.state == "gone"
    assert split.counts(partial=True, progress=False).diagnostics["missing_rows"] == (3,)


def test_cancel_tells_what_it_cancelled_and_keeps_what_ran(split: DeviceJob, machine: Machine) -> None:
    machine.answers = [None, None, KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        split.send_rest()
    update_record(split.path, lambda record: setattr(record.parts[2], "attempted", None))
    machine.states["id-1"] = "running"
    cancellation = split.cancel()
    assert (cancellation.cancelled, cancellation.measured, cancellation.others) == ((1, 2), (0,), ())
    assert str(cancellation).endswith("2 of its 3 parts were cancelled, 1 had run and is kept")
    assert split.counts(partial=True, progress=False).counts[0].tolist() == [10, 0, 0, 0]
    split.send_rest()
    assert len(machine.posts) == 3  # what was cancelled is not sent
    with pytest.raises(BackendUnavailable, match="cannot be cancelled"):
        split.cancel()
    check_whole(split.send_rest(again=True))


def test_one_part_that_cannot_be_cancelled_does_not_keep_the_others(
    split: DeviceJob, machine: Machine
) -> None:
    split.send_rest()
    machine.states = dict.fromkeys(machine.states, "queued")
    cancel = machine.cancel

    def refuse_one(id: str) -> None:
        if id == "id-0":
            raise Unreachable("no answer.")
        cancel(id)

    machine.cancel = refuse_one  # type: ignore[method-assign]
    cancellation = split.cancel()
    assert (cancellation.cancelled, cancellation.others) == ((1, 2), (0,))
    assert cancellation.problems == ("no answer.",)


def test_parts_are_sent_by_one_process_at_a_time(split: DeviceJob, machine: Machine) -> None:
    """While one waits for room, another sends nothing, and one that waits for the counts does not give up."""
    machine.answers = [None, *[Busy("429")] * 5]
    waiting, go_on = threading.Event(), threading.Event()

    def show(_: JobStatus) -> None:
        waiting.set()
        go_on.wait(20)

    with ThreadPoolExecutor(1) as thread:
        sent = thread.submit(split.send_rest, progress=show)
        assert waiting.wait(20)
        with pytest.raises(BackendUnavailable, match="sent by another process"):
            again(split).send_rest()
        with pytest.raises(JobTimeout):
            again(split).counts(0.05, progress=False)
        go_on.set()
        sent.result()
    check_whole(again(split))
    assert len(machine.jobs) == 3


def test_a_job_of_which_no_program_was_kept_says_so(recorded: DeviceJob) -> None:
    with pytest.raises(StorageError, match=r"program\.npz"):
        recorded.send_rest()


def test_rows_that_were_exchanged_are_noticed(split: DeviceJob, tmp_path: Path) -> None:
    rows = split.path.with_suffix(".rows.npz")
    p = np.load(rows)["p"]
    np.savez_compressed(rows, p=p[[0, 1, 3, 2]] * [0.5, 1.5, 1.0, 1.0])
    with pytest.raises(StorageError, match="does not hold"):
        again(split).request()


# --- Killed processes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that start at once, because their common parent has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qtx_lab.mitigation", "qtx_lab.circuits", "scipy.stats"])
    return context


class Client:
    """A process at work on a server; its home is the test's folder."""

    def __init__(self, processes: Any, action: str, cloud: Any, home: Path):
        self.result = home / f"{action}.result"
        self.result.unlink(missing_ok=True)
        environment = {**cloud.environment(), "QTX_LAB_HOME": str(home), "OMP_NUM_THREADS": "1"}
        given = {"arguments": (action, environment, str(self.result))}
        options = {"init_globals": given, "run_name": "__main__"}
        self.process = processes.Process(target=runpy.run_path, args=(str(CLIENT),), kwargs=options)
        self.process.start()
        for fault in cloud.faults:
            fault.pid = self.process.pid

    def end(self) -> tuple[int, Any]:
        """Wait for the process: its exit code and its result, None where it was killed before."""
        self.process.join(120)
        result = json.loads(self.result.read_bytes()) if self.result.exists() else None
        return self.process.exitcode, result


def check_nothing_lost_nothing_twice(cloud: Any, home: Path, recovered: dict[str, Any]) -> None:
    """Each accepted job is recorded, has its counts, and is alone with its tag."""
    records = {job.tag: job for job in find_jobs(home)}
    accepted = [next(tag for tag in job.tags if tag in records) for job in cloud.jobs.values()]
    assert len(accepted) == len(set(accepted)) <= cloud.posts() <= len(records)
    assert set(recovered) == set(records)
    for tag, job in records.items():
        if tag in accepted:
            counts = np.array(recovered[tag])
            assert counts.sum(-1).tolist() == [SHOTS, SHOTS]
            assert counts[0, 3] == 0
            assert counts[1].tolist() == [0, 0, 0, SHOTS]
            assert job.last_known.state == "done"
        else:
            assert "never arrived" in recovered[tag] or "Nothing was submitted" in recovered[tag]


KILLS = {
    "between record and submission": {"request": "GET /instances/usage"},
    "as the submission arrives": {"request": "POST /jobs"},
    "accepted, not answered": {"request": "POST /jobs", "when": "after"},
    "as the answer comes": {"request": "POST /jobs", "when": "after", "answered": True},
    "while waiting": {"request": "GET /jobs/job-1", "when": "after", "skip": 2},
    "while fetching": {"request": "GET /jobs/job-1/results"},
}


@pytest.mark.hardware
@pytest.mark.chaos
@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_process_loses_nothing(
    ibm: Any, cloud: Any, processes: Any, tmp_path: Path, moment: str
) -> None:
    cloud.polls_in_queue = 3
    cloud.faults = [ibm.Fault(what="kill", **KILLS[moment])]
    code, _ = Client(processes, "submit", cloud, tmp_path).end()
    assert code == -9
    assert len(find_jobs(tmp_path)) == 1
    code, recovered = Client(processes, "recover", cloud, tmp_path).end()
    assert code == 0
    check_nothing_lost_nothing_twice(cloud, tmp_path, recovered)
    assert len(cloud.jobs) == int(
        moment not in ("between record and submission", "as the submission arrives")
    )


RECALIBRATED = "2026-11-26T08:00:00+00:00"


@pytest.mark.hardware
@pytest.mark.chaos
def test_no_schedule_of_faults_loses_a_job_or_makes_two(
    ibm: Any, cloud: Any, processes: Any, tmp_path: Path, seed: int, soak: bool
) -> None:
    """Faults, kills, limits, deletions, recalibrations, closed sessions: 0 lost, 0 doubled, 0 over budget."""
    devices = dict(cloud.devices)
    accepted = killed = unanswered = deleted = rebuilt = refused = 0
    expected: dict[str, Any] = {}
    try:
        for schedule in range(300 if soak else 5):
            cloud.reset()
            cloud.devices = dict(devices)
            rng = random.Random(f"{seed} {schedule}")
            home = tmp_path / str(schedule)
            home.mkdir()
            cloud.polls_in_queue = rng.randrange(4)
            cloud.listing_lag = rng.choice([0.0, 0.0, 0.2])
            for action in (
                "mitigate",
                rng.choice(["rest", "mitigate"]),
                rng.choice(["split", "split", "rest"]),
            ):
                cloud.pending_limit = rng.choice([None, None, 1, 3])
                cloud.faults = [_fault(ibm, rng) for _ in range(rng.randrange(1, 4))]
                code, _ = Client(processes, action, cloud, home).end()
                assert code in (0, -9), f"schedule {schedule}, {action}: {cloud.faults}"
                killed += code == -9
                if cloud.jobs and rng.random() < 0.2:
                    cloud.delete(rng.choice(list(cloud.jobs)))
                if rng.random() < 0.2:
                    cloud.recalibrate("ibm_lagos", RECALIBRATED)
                if rng.random() < 0.2:
                    cloud.close_sessions()
            cloud.faults, cloud.pending_limit, cloud.polls_in_queue = [], None, 0
            time.sleep(0.5)  # now every job is listed, and a post that is not listed never arrived
            code, first = Client(processes, "rest", cloud, home).end()
            assert code == 0
            code, recovered = Client(processes, "again", cloud, home).end()
            assert code == 0
            _check_schedule(cloud, home, first, recovered)
            for tag, result in recovered.items():
                if tag.startswith("call-") and not isinstance(result, str):
                    calibration = result["calibration"]
                    if calibration not in expected:
                        cloud.devices = dict(devices)
                        expected[calibration] = _without_faults(cloud, processes, tmp_path, calibration)
                    assert result == expected[calibration], f"schedule {schedule}, {tag}"
                    rebuilt += 1
                refused += isinstance(result, str)
            accepted += len(cloud.jobs)
            deleted += len(cloud.deleted)
            unanswered += cloud.posts() - len(cloud.jobs) - len(cloud.deleted)
    finally:
        cloud.devices = devices
    print(
        f"{accepted} jobs accepted, {unanswered} posts came to nothing, {killed} processes killed, {deleted} "
        f"jobs deleted, {rebuilt} mitigated results, {refused} jobs and calls not measured for the budget"
    )
    # The schedules are worth something: jobs got through, posts came to nothing, processes died.
    assert accepted
    assert killed
    assert rebuilt
    if soak:
        assert accepted > 1000
        assert killed > 90
        assert unanswered > 30
        assert deleted > 30


def _check_schedule(cloud: Any, home: Path, first: dict[str, Any], recovered: dict[str, Any]) -> None:
    """Nothing is lost, nothing is there twice, and no more was sent than the budget allows."""
    records = {job.tag: job for job in find_jobs(home)}
    known = {part.tag for job in records.values() for part in job.record.parts}
    all_jobs = [*cloud.jobs.values(), *cloud.deleted.values()]
    posted = [tag for job in all_jobs for tag in job.tags if "." in tag]
    assert len(posted) == len(set(posted)), "a part is there twice"
    assert {tag for job in cloud.jobs.values() for tag in job.tags if "." in tag} <= known, (
        "a job is not recorded"
    )
    calls = {job for call in qtx_lab.find_mitigated_calls(home) for job in call.record.job_tags}
    for job in records.values():
        for part in job.record.parts:
            if part.id in cloud.jobs and (job.tag in calls or job.record.request.kind == "rows"):
                assert part.state == "done", f"{part} was accepted and not fetched"
    assert 2.0 * len(all_jobs) <= 20.0, f"{len(all_jobs)} jobs were sent, of two seconds each"
    for tag, result in recovered.items():
        if isinstance(result, str):
            assert "budget" in result, f"{tag}: {result}"
        elif not tag.startswith("call-"):
            counts = np.array(result)
            assert counts.sum(-1).tolist() == [SHOTS, SHOTS]
            assert counts[0, 3] == 0
        if not isinstance(first[tag], str):
            assert first[tag] == result


def _without_faults(cloud: Any, processes: Any, home: Path, calibration: str) -> Any:
    """The mitigated result of a process that nothing happens to, on the device calibrated at a time."""
    folder = home / f"without faults {calibration}"
    folder.mkdir()
    if calibration == RECALIBRATED:
        cloud.recalibrate("ibm_lagos", RECALIBRATED)
    code, result = Client(processes, "mitigate", cloud, folder).end()
    assert code == 0
    assert result["calibration"] == calibration
    return result


def _fault(ibm: Any, rng: random.Random) -> Any:
    """A fault or a kill, mostly around the submission."""
    request = rng.choice(["POST /jobs"] * 5 + ["GET /jobs.*", "GET /jobs/.*", "GET /instances/usage", ".*"])
    what = rng.choice(
        ["kill", "kill", "kill", 500, 502, 503, 504, 429, 429, 403, "cut", "truncate", "nonsense"]
    )
    return ibm.Fault(
        request,
        what,
        when=rng.choice(["before", "after"]),
        times=rng.choice([1, 1, 2, 7]),
        skip=rng.randrange(7) if request == "POST /jobs" else rng.randrange(30),
        answered=rng.random() < 0.5,
        delay=rng.choice([0.0, rng.uniform(0, 0.05)]),
    )


# --- The command line -----------------------------------------------------------------------------


@pytest.mark.hardware
def test_jobs_are_listed_fetched_and_cancelled_by_command(
    ibm: Any, cloud: Any, processes: Any, tmp_path: Path
) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["jobs", "--home", str(tmp_path), *arguments])

    assert run().output == f"No jobs in {tmp_path}.\n"
    cloud.polls_in_queue = 10**6
    for _ in range(2):
        cloud.faults = [ibm.Fault("GET /jobs/.*", "kill", skip=1)]
        Client(processes, "submit", cloud, tmp_path).end()
    second, first = find_jobs(tmp_path)
    listed = run()
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.output.splitlines()] == ["tag", second.tag, first.tag]
    assert "queued, place" in listed.output
    assert run("--cancel", second.tag).output == f"{second.tag} is cancelled\n"
    for job in cloud.jobs.values():
        job.polls_left = 0
    fetched = run("--fetch", first.tag[-6:])
    path = Path(fetched.stdout.splitlines()[-1])
    frame = qtx_lab.storage.read_frame(path)
    assert frame.groupby("row")["count"].sum().tolist() == [SHOTS, SHOTS]

    facts = {
        name: first.record[name] for name in ("provider", "device", "instance", "region", "circuits", "shots")
    }
    record_job(tmp_path / "a-run" / "jobs", None, [Block(0, 2, SHOTS)], **facts)
    cloud.faults = [ibm.Fault(".*", 403, times=10**6)]
    offline = run()
    assert offline.exit_code == 0
    assert "could not be asked" in offline.stderr
    states = [line.split("ibm_lagos")[1].split()[0] for line in offline.stdout.splitlines()[1:]]
    assert states == ["recorded", "cancelled", "done"]
    assert "  a-run  " in offline.stdout
    refused = run("--fetch", "qtx-")
    assert refused.exit_code == 2
    assert "3 jobs" in refused.output


# --- The notebook ---------------------------------------------------------------------------------


@pytest.mark.notebooks
def test_the_notebook_runs_on_the_twin(tmp_path: Path) -> None:
    run = run_notebook("03_hardware", home=tmp_path, progress=False)
    assert run.status == "done"


@pytest.mark.notebooks
@pytest.mark.hardware
def test_the_notebook_submits_and_comes_back(cloud: Any, tmp_path: Path) -> None:
    cloud.polls_in_queue = 2
    given = {"provider": "ibm", "backend_name": "ibm_lagos", "num_keys": 8, "shots": 200}
    first = run_notebook("03_hardware", given, home=tmp_path, progress=False)
    (job,) = find_jobs(tmp_path)
    assert job.path.parent == first.path / "jobs"
    assert first.manifest["results"]["job"] == job.tag
    again = run_notebook("03_hardware", {**given, "tag": job.tag}, home=tmp_path, progress=False)
    results = [run.manifest["results"]["total_variation"] for run in (first, again)]
    assert results[0] == pytest.approx(results[1])
    assert cloud.posts() == 1
