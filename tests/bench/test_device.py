"""The run for a borrowed GPU, rehearsed on the CPU: every stage, resumed, with steps that crash or hang."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

import qtx_lab as qtx
from qtx_lab.bench import device
from qtx_lab.bench.device import Record, Stage, Step, run_stage, write_tables
from qtx_lab.bench.device_profile import kernel_times

CHILD = """
import json, os, sys, time
path, behaviour = sys.argv[1:3]
for name in json.loads(sys.argv[-1]):
    content = json.load(open(path))
    content["steps"][name] = {"status": "running"}
    json.dump(content, open(path, "w"))
    if name == "bad":
        os._exit(9) if behaviour == "crash" else time.sleep(600)
    content["steps"][name] = {"status": "done"}
    json.dump(content, open(path, "w"))
"""
"""Stands in for the process that runs steps; it crashes or hangs in the step "bad"."""


def run_child(tmp_path, behaviour, names, seconds):
    record = Record(tmp_path / "out.json")
    record.put_machine({"cores": 2})
    (tmp_path / "child.py").write_text(CHILD)
    stage = Stage("stage", tuple(Step(name, dict) for name in names), seconds)
    command = [sys.executable, str(tmp_path / "child.py"), str(record.path), behaviour]
    run_stage(stage, record, command, dict(os.environ), seconds)
    return record


def test_every_stage_runs_on_small_sizes_and_is_not_repeated(tmp_path):
    """On the CPU, whose kernels run in the interpreter; a second run finds all of it in the file."""
    path = tmp_path / "out.json"
    environment = {name: x for name, x in os.environ.items() if name != "QTX_LAB_KERNELS"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def run(*options):
        command = [sys.executable, "-m", "qtx_lab.bench.device", "--json", str(path), "--quick", *options]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-5000:]
        return json.loads(path.read_text())

    content = run("--commit", "abc")
    assert content["machine"]["commit"] == "abc"
    assert {"torch", "triton", "cpu"} <= set(content["machine"])
    steps = content["steps"]
    profile = steps.pop("profile")
    assert profile["status"] == "left out"
    assert "no CUDA device" in profile["reason"]
    assert {step["status"] for step in steps.values()} == {"done"}, steps
    assert steps["correctness"]["counts"].keys() == {"passed"}
    rows = [row for step in steps.values() for row in step.get("rows", ())]
    assert {row["method"] for row in rows} >= {
        *("SDPA", "exact K", "int4", "rank 16", "exact, 8 tokens", "systematic, S=64")
    }
    assert [row for row in rows if row["check"] != "pass"] == []

    again = run("--only", "kernels", "--only", "training", "--only", "model")
    del again["steps"]["profile"]
    assert again["steps"] == steps

    write_tables(Record(path), tmp_path)
    table = json.loads((tmp_path / "gpu_kernels.json").read_text())
    assert table["bench"] == "kernels"
    assert table["rows"] == next(x["rows"] for name, x in steps.items() if name.startswith("kernels"))
    assert json.loads((tmp_path / "gpu_training.json").read_text())["rows"] == steps["training"]["rows"]


def test_no_stage_takes_the_time_of_another(tmp_path):
    """What tells the most comes first, and the limits of all but the last two stages fit the whole run's."""
    chosen = device.stages(False, device.torch.device("cpu"), Record(tmp_path / "out.json"))
    assert tuple(stage.name for stage in chosen) == device.STAGES
    assert device.STAGES[:4] == ("correctness", "kernels", "model", "training")
    limits = [stage.seconds + device.GRACE_SECONDS for stage in chosen[:-2]]
    assert sum(limits) <= device.SECONDS
    assert device.SECONDS + device.GRACE_SECONDS < 480


def test_a_step_that_crashes_costs_only_itself(tmp_path):
    record = run_child(tmp_path, "crash", ["first", "bad", "last"], 60)
    assert [record.status(name) for name in ("first", "bad", "last")] == ["done", "failed", "done"]
    assert "ended with code 9" in record.read()["steps"]["bad"]["reason"]


def test_a_step_that_hangs_is_ended_and_what_had_no_time_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(device, "GRACE_SECONDS", 0.0)
    record = run_child(tmp_path, "hang", ["bad", "last"], 1.0)
    assert record.status("bad") == "failed"
    assert "took longer" in record.read()["steps"]["bad"]["reason"]
    assert record.status("last") == "left out"


def test_what_failed_is_tried_again_and_what_is_done_is_not(tmp_path):
    record = Record(tmp_path / "out.json")
    record.put("first", "done", answer=1)
    record.put("last", "failed", reason="no memory")
    run_child(tmp_path, "crash", ["first", "last"], 60)
    assert record.read()["steps"] == {"first": {"status": "done", "answer": 1}, "last": {"status": "done"}}


def test_a_stage_that_fails_leaves_its_reason(tmp_path):
    def broken():
        raise RuntimeError("illegal memory access")

    def impossible():
        raise qtx.BackendUnavailable("ncu is not installed.")

    record = Record(tmp_path / "out.json")
    steps = [Step("left", impossible), Step("broken", broken), Step("after", dict)]
    assert not device.run_steps(steps, record, 60)
    assert record.read()["steps"]["left"] == {"status": "left out", "reason": "ncu is not installed."}
    assert record.read()["steps"]["broken"]["reason"] == "RuntimeError: illegal memory access"
    assert record.status("after") is None  # another process runs it


def test_without_a_gpu_or_with_a_foreign_file_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: False)
    arguments = ["--json", str(tmp_path / "out.json")]
    with pytest.raises(qtx.BackendUnavailable, match=r"needs a CUDA device.*--quick"):
        CliRunner().invoke(device.main, arguments, catch_exceptions=False)
    with pytest.raises(qtx.ArgumentError, match="Did you mean 'kernels'"):
        CliRunner().invoke(device.main, [*arguments, "--only", "kernel"], catch_exceptions=False)
    (tmp_path / "out.json").write_text('{"bench": "kernels"}')
    with pytest.raises(qtx.ArgumentError, match="something else"):
        CliRunner().invoke(device.main, [*arguments, "--quick"], catch_exceptions=False)


def test_without_a_gpu_no_kernel_is_timed(monkeypatch):
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: False)
    assert kernel_times([dict], 3) == []
