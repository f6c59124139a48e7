"""A training as a run, as a person who typed `qtx-lab train` sees it."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta

import pytest
import torch
from click.testing import CliRunner

import qtx_lab as qtx
from qtx_lab.cli import main
from qtx_lab.cli.options import read_flag
from qtx_lab.experiments import training_run
from qtx_lab.experiments.training_run import train_run
from qtx_lab.training import scaling
from qtx_lab.training.checkpoints import checkpoints

FAST = {"model": "small", "num_tokens": 32, "steps": 9, "batch_size": 4, "warmup_steps": 2, "num_samples": 4}
FAST |= {"validate_every": 3, "checkpoint_every": 3, "learning_rate": 1e-2}


def flags(**fields):
    return [part for name, value in fields.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def state(run):
    return qtx.load_reference_model(run.path / "model.safetensors").state_dict()


def test_a_spec_and_the_same_flags_are_the_same_training(tmp_path):
    spec = qtx.TrainSpec(**FAST)
    run = train_run(spec, home=tmp_path, progress=False)
    assert run.status == "done"
    metrics = run.metrics()
    assert metrics["step"].tolist() == list(range(1, 10))
    assert metrics["held_out_bits_per_byte_exact"].notna().sum() == 3
    assert run.manifest["results"]["loss"] == metrics["loss"].iloc[-1]
    assert [figure["name"] for figure in run.figures()] == ["training"]
    assert (run.path / "report.html").exists()
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    given = {name: FAST[name] for name in ("steps", "learning_rate")}
    done = CliRunner().invoke(
        main,
        ["train", str(tmp_path / "spec.yaml"), *flags(**given), "--home", str(tmp_path), "--name", "again"],
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].endswith("report.html")
    (again,) = (qtx.Run.open(path) for path in tmp_path.glob("*-again-*"))
    assert again.manifest["spec"]["identity"] == spec.identity
    assert all(torch.equal(x, state(run)[name]) for name, x in state(again).items())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--steps", "0"], "steps=0"),
        (["--steps", "1e-3"], "steps=0.001"),
        (["--learning-rate", "fast"], "learning_rate='fast'"),
        (["--sampler", "exact", "--noise", "0.5"], "noise"),
        (["--model", "smal"], "model='smal'"),
        (["--preset", "reference"], "--preset and --out"),
        (["--out", "x", "--steps", "3"], "--preset and --out"),
        (["--num-workers", "2"], "belong to --cluster"),
        (["--cluster", "address"], "address"),
        (["--resume", "none"], "resume='none'|run='none'"),
        (["missing.yaml"], "missing.yaml"),
        (["--compile", "maybe"], "compile='maybe'"),
        (["--steps", "!!int"], "steps='!!int'"),
        (["--preset", "reference", "--out", "x", "--num-workers", "2"], "--preset and --out"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(arguments, text, tmp_path):
    done = CliRunner().invoke(main, ["train", *arguments, "--home", str(tmp_path)])
    assert done.exit_code == 2
    assert re.search(text, done.output)
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_flags_mean_what_they_look_like():
    kinds = {name: field.annotation for name, field in qtx.TrainSpec.model_fields.items()}
    read = {
        ("compile", "true"): True,
        ("compile", "False"): False,
        ("learning_rate", "1e-3"): 1e-3,
        ("control_variate", "none"): None,
        ("text", "12"): "12",
        ("text", "none"): "none",
        ("steps", "12"): 12,
        ("sampler", "head-tail"): "head-tail",
    }
    assert {key: read_flag(kinds[key[0]], key[1]) for key in read} == read


def test_only_a_training_is_resumed(tmp_path):
    run = qtx.Run.create(qtx.ExperimentSpec(), "demo", tmp_path)
    run.finish("interrupted")
    with pytest.raises(qtx.ArgumentError, match=r"no training: .* ExperimentSpec"):
        train_run(home=tmp_path, resume=run.path)
    assert run.status == "interrupted"


def test_the_first_error_is_raised(tmp_path, monkeypatch):
    def fail(error):
        def call(*arguments):
            raise error

        return call

    monkeypatch.setattr(training_run, "_train", fail(qtx.RunFailed("the first")))
    monkeypatch.setattr(training_run, "write_report", fail(qtx.StorageError("the second")))
    with pytest.raises(qtx.RunFailed, match="the first"):
        train_run(qtx.TrainSpec(**FAST), home=tmp_path)


@pytest.mark.chaos
def test_a_killed_training_is_resumed(tmp_path):
    """After kill -9 the run reads as interrupted; resumed, it ends as if nothing had happened."""
    slow = {**FAST, "steps": 120}  # it is killed after the first checkpoint, and long before the end
    command = [sys.executable, "-m", "qtx_lab.cli", "train", *flags(**slow), "--home", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 300
        while (
            not list(tmp_path.glob("*/checkpoints/step-*"))
            and process.poll() is None
            and time.monotonic() < end
        ):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    (run,) = (qtx.Run.open(path) for path in tmp_path.glob("*-*"))
    assert run.status == "interrupted"
    assert 0 < checkpoints(run.path / "checkpoints")[-1] < 120
    resumed = train_run(home=tmp_path, resume=run.path.name[-6:], progress=False)
    assert resumed.status == "done"
    whole = train_run(qtx.TrainSpec(**slow), home=tmp_path, progress=False)
    assert all(torch.equal(x, state(whole)[name]) for name, x in state(resumed).items())
    with pytest.raises(qtx.ArgumentError, match="is done"):
        train_run(home=tmp_path, resume=run.path)


@pytest.mark.chaos
def test_the_same_command_again_continues_what_a_signal_stopped(tmp_path, monkeypatch):
    log_many, sent = qtx.Run.log_many, []

    def stop_once(run, rows):
        log_many(run, rows)
        if not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(qtx.Run, "log_many", stop_once)
    settings = {**FAST, "checkpoint_every": 1}
    command = ["train", *flags(**settings), "--home", str(tmp_path), "--name", "job-1", "--continue"]
    stopped = CliRunner().invoke(main, command)
    assert stopped.exit_code == 128 + signal.SIGUSR1
    assert "interrupted: Stopped by SIGUSR1 after step" in stopped.output
    (folder,) = tmp_path.glob("*-*")
    run = qtx.Run.open(folder)
    assert run.status == "interrupted"
    other = CliRunner().invoke(main, [*command, "--steps", "3"])  # another spec is another run
    assert other.exit_code == 0, other.output
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 0, again.output
    assert len(list(tmp_path.glob("*-*"))) == 2
    assert run.status == "done"
    assert run.metrics()["step"].tolist() == list(range(1, 10))


def begun(home, status, **facts):
    run = qtx.Run.create(qtx.TrainSpec(**FAST), "job", home, **facts)
    run.finish(status)
    return run


def continued(home, monkeypatch, **facts):
    """The run in which `train_run` with `continue_stopped` trains."""
    taken = []
    monkeypatch.setattr(training_run, "_train_in", lambda run, *arguments: taken.append(run) or run)
    if facts:
        monkeypatch.setattr("qtx_lab.experiments.runs.datetime", shifted(**facts))
    train_run(qtx.TrainSpec(**FAST), home=home, name="job", continue_stopped=True, progress=False)
    return taken[0]


def shifted(days):
    """The class `datetime` on a machine whose clock is wrong by so many days."""

    class Shifted(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=days)

    return Shifted


def test_the_latest_run_is_continued_whatever_the_clock_said(tmp_path, monkeypatch):
    first = continued(tmp_path, monkeypatch)
    first.finish("done")
    second = continued(tmp_path, monkeypatch, days=-400)  # the clock was set back in the meantime
    assert second.path != first.path
    second.finish("interrupted")
    assert second.manifest["started"] < first.manifest["started"]
    assert continued(tmp_path, monkeypatch, days=-800).path == second.path
    second.finish("done")
    third = continued(tmp_path, monkeypatch, days=-900)
    assert third.path not in (first.path, second.path)


def test_which_of_several_runs_was_the_latest_is_not_guessed(tmp_path, monkeypatch):
    """Runs of older versions have no sequence number, and two where folders have no locks the same."""
    old = [begun(tmp_path / "old", status, sequence=None) for status in ("done", "interrupted")]
    together = [begun(tmp_path / "together", status, sequence=3) for status in ("failed", "interrupted")]
    begun(tmp_path / "together", "done", sequence=2)
    for home, runs in (("old", old), ("together", together)):
        with pytest.raises(qtx.ArgumentError, match=r"continue_stopped=True .* --resume") as caught:
            continued(tmp_path / home, monkeypatch)
        assert all(run.path.name in str(caught.value) for run in runs)
    ended = [begun(tmp_path / "ended", "done", sequence=None) for _ in range(2)]
    begins = continued(tmp_path / "ended", monkeypatch)  # none of them is to be continued
    assert begins.path not in [run.path for run in ended]


FILLED = """
import sys, time
from pathlib import Path
import qtx_lab as qtx
from qtx_lab.cli import main
from qtx_lab.training import rank

home, log_many = Path(sys.argv[-1]), qtx.Run.log_many

def fill(run, rows):
    while rows[-1]["step"] >= 4 and not list(home.glob("*/checkpoints/step-*")):
        time.sleep(0.01)  # it is written beside the training
    if rows[-1]["step"] >= 4:
        with (home / "filler").open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(1 << 20))
                except OSError:
                    break
    log_many(run, rows)

rank.REPORT_INTERVAL_S, qtx.Run.log_many = 0, fill
main(sys.argv[1:])
"""


@pytest.mark.chaos
def test_a_full_disk_and_a_read_only_disk(small_disk):
    """Each ends in one sentence; what was trained before the disk was full is kept, and goes on."""

    def command(*arguments):
        done = CliRunner().invoke(main, ["train", *arguments, "--home", str(small_disk)])
        return done.exit_code, done.stderr.splitlines()[-1]

    full = subprocess.run(
        [sys.executable, "-c", FILLED, "train", *flags(**FAST), "--home", small_disk],
        capture_output=True,
        text=True,
    )
    assert full.returncode == 2, full.stderr
    assert "Traceback" not in full.stderr
    assert re.match(
        "error: Cannot write .*No space left on device; free some space", full.stderr.splitlines()[-1]
    )
    assert "The last checkpoint is" in full.stderr.splitlines()[-1]
    (run,) = (qtx.Run.open(path) for path in small_disk.iterdir() if path.is_dir())
    assert run.status == "interrupted"  # as it is read: the disk has no room for how it ended
    assert checkpoints(run.path / "checkpoints") == [3]
    code, error = command(*flags(**FAST))
    assert code == 2
    assert re.match(r"error: Cannot start a run in .* 0 MiB free, a run needs 64 MiB; free some space", error)
    (small_disk / "filler").unlink()
    assert command("--resume", run.path.name)[0] == 0
    assert run.metrics()["step"].tolist() == list(range(1, 10))
    run.update(status="interrupted")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for arguments in (flags(**FAST), ["--resume", run.path.name]):
        code, error = command(*arguments)
        assert code == 2
        assert re.match("error: Cannot write .*Read-only file system; check", error)


HOLD = """
import sys
from pathlib import Path
from qtx_lab.training.checkpoints import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.chaos
def test_two_do_not_resume_one_training(tmp_path):
    run = qtx.Run.create(qtx.TrainSpec(**FAST), "train", tmp_path)
    run.finish("interrupted")
    command = [sys.executable, "-c", HOLD, run.path / "checkpoints"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(qtx.StorageError, match="being trained into by somebody else"):
            train_run(home=tmp_path, resume=run.path, progress=False)
        assert run.status == "interrupted"  # the other training was not touched
        other.kill()
        other.wait()
        assert train_run(home=tmp_path, resume=run.path, progress=False).status == "done"


def test_a_run_that_ended_after_its_last_step_is_resumed_to_its_end(tmp_path, monkeypatch):
    """Killed between the last checkpoint and the weights, it failed at every resume: no step had a loss."""

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_run, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        train_run(qtx.TrainSpec(**FAST), home=tmp_path, progress=False)
    monkeypatch.undo()
    (folder,) = tmp_path.glob("*-*")
    run = train_run(home=tmp_path, resume=folder, progress=False)
    assert run.status == "done"
    assert run.manifest["results"]["loss"] == run.metrics()["loss"].iloc[-1]
    assert (folder / "model.safetensors").exists()


def test_the_cost_model():
    assert scaling.bytes_per_step(10**8, 1) == 0
    assert scaling.bytes_per_step(10**8, 2) == 4 * 10**8 + scaling.STATISTICS_BYTES
    assert scaling.bytes_per_step(10**8, 8, parallel="fsdp") / scaling.bytes_per_step(
        10**8, 8
    ) == pytest.approx(1.5)
    quiet = scaling.Machine(jitter=0)
    assert scaling.simulate(10**8, 4096, 1, quiet)["efficiency"] == pytest.approx(1)
    for jitter in (0.0, 0.05):
        machine = scaling.Machine(jitter=jitter)
        efficiencies = [
            scaling.simulate(10**8, 4096, ranks, machine)["efficiency"] for ranks in (1, 8, 64, 512)
        ]
        assert efficiencies == sorted(efficiencies, reverse=True)
    more = [scaling.simulate(10**8, tokens, 512)["efficiency"] for tokens in (1024, 8192, 65_536)]
    assert more == sorted(more)
    # Local updates send as many times fewer bytes, and wait less.
    alone = [scaling.simulate(10**9, 4096, 64, local_steps=count) for count in (1, 10, 100)]
    assert [alone[0]["bytes"] / row["bytes"] for row in alone] == pytest.approx([1, 10, 100], rel=1e-4)
    assert [row["efficiency"] for row in alone] == sorted(row["efficiency"] for row in alone)
    # A step is never shorter than its exchange alone, or than computing alone.
    one = scaling.simulate(10**9, 64, 512, quiet)
    assert one["seconds"] >= scaling.exchange_seconds(4 * 10**9, 512, quiet)
