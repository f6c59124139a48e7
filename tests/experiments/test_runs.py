"""Run folders are written whole or not at all, and record how a run ended, whatever ended it."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import click
import numpy as np
import pandas as pd
import psutil
import pytest

from qtx_lab.cli import main
from qtx_lab.cli.options import HomePath, read_parameters
from qtx_lab.errors import ArgumentError, StorageError
from qtx_lab.experiments import provenance
from qtx_lab.experiments.notebooks import find_result
from qtx_lab.experiments.report import write_report
from qtx_lab.experiments.ro_crate_export import export_to_ro_crate
from qtx_lab.experiments.runs import SEQUENCE, Run, find_run, runs
from qtx_lab.experiments.saved_figure import with_palette
from qtx_lab.experiments.sweeps import find_done
from qtx_lab.models.text import read_text
from qtx_lab.specs import ExperimentSpec
from qtx_lab.storage import read_frame, write_atomic
from qtx_lab.training import QuantumTrainer
from qtx_lab.training.data import open_tokens
from qtx_lab.widgets.workbench.workbench import RUN_NAME, STATE_FILE, _newest

FILES = ("figures", "manifest.json", "requirements.txt", "spec.yaml")
"""What every run has."""


@pytest.fixture
def spec() -> ExperimentSpec:
    return ExperimentSpec(seed=3)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_records_its_spec_and_results(tmp_path, spec) -> None:
    with Run.create(spec, "trial", tmp_path) as run:
        assert run.status == "running"
        run.update(results={"error": np.float32(0.5), "bad": float("nan")})
        run.update(results={"draws": 64})
    manifest = Run.open(run.path).manifest
    assert ExperimentSpec.from_yaml(run.path / "spec.yaml") == spec
    assert manifest["spec"] == {
        "kind": "ExperimentSpec",
        "identity": spec.identity,
        "fields": spec.to_parameters(),
    }
    assert manifest["results"] == {"error": 0.5, "bad": None, "draws": 64}
    assert (manifest["status"], manifest["seed"], manifest["name"]) == ("done", 3, "trial")
    assert {"python", "qtx_lab", "torch", "numpy"} <= set(manifest["versions"])
    assert manifest["machine"]["cores"] >= 1
    assert manifest["seconds"] >= 0
    assert names(tmp_path) == {run.path.name, SEQUENCE}


@pytest.mark.parametrize(
    ("raised", "status", "error"),
    [(ValueError("no good"), "failed", "ValueError: no good"), (KeyboardInterrupt(), "interrupted", None)],
)
def test_the_status_says_how_a_run_ended(tmp_path, spec, raised, status, error) -> None:
    with pytest.raises(type(raised)), Run.create(spec, "trial", tmp_path) as run:
        raise raised
    manifest = run.manifest
    assert (manifest["status"], manifest.get("error")) == (status, error)


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a/b", "x" * 81])
def test_names_that_cannot_be_a_folder_are_refused(tmp_path, spec, name) -> None:
    with pytest.raises(ArgumentError, match="name="):
        Run.create(spec, name, tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_bytes_that_are_no_text_are_refused_and_leave_nothing(tmp_path, spec) -> None:
    with pytest.raises(ArgumentError, match=r"'\\udcff\\udcfe' is not allowed: it is not Unicode"):
        Run.create(spec, "trial", tmp_path, command=b"-p c \xff\xfe".decode(errors="surrogateescape"))
    assert names(tmp_path) == set()


def test_metrics_append_and_grow_columns(tmp_path, spec) -> None:
    run = Run.create(spec, "trial", tmp_path)
    assert run.metrics().empty
    run.log(sampler="exact", draws=np.int64(8), error=1)
    run.log_many([{"sampler": "it's", "error": 0.5, "fine": True}, {"draws": 2**60}])
    metrics = run.metrics()
    assert list(metrics.columns) == ["sampler", "draws", "error", "fine"]
    assert metrics["error"].tolist()[:2] == [1.0, 0.5]
    assert metrics["sampler"].tolist()[:2] == ["exact", "it's"]
    assert metrics["error"].isna().tolist() == [False, False, True]


def test_the_same_rows_give_the_same_bytes(tmp_path, spec) -> None:
    written = set()
    for name in ("one", "two"):
        run = Run.create(spec, name, tmp_path)
        run.log_many({"i": i, "x": i / 7, "name": str(i % 5)} for i in range(5000))
        run.log(i=1, extra=2.5)
        written.add((run.path / "metrics.parquet").read_bytes())
    assert len(written) == 1


def test_untidy_metrics_are_refused(tmp_path, spec) -> None:
    run = Run.create(spec, "trial", tmp_path)
    run.log(x=1)
    for row in ({"x": "text"}, {"x": [1, 2]}, {"y": np.zeros(2)}):
        with pytest.raises(ArgumentError, match=r"one kind|cannot be a metric"):
            run.log(**row)
    with pytest.raises(ArgumentError, match="mixes bool, int"):
        run.log_many([{"z": 1}, {"z": True}])
    assert len(run.metrics()) == 1


def draw(data: pd.DataFrame, theme: str):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(2, 1), facecolor="white" if theme == "light" else "black")
    axes.plot(data["x"])
    return figure


def test_figures_are_saved_in_both_themes_with_data(tmp_path, spec) -> None:
    import matplotlib.pyplot as plt

    run = Run.create(spec, "trial", tmp_path)
    data = pd.DataFrame({"x": [1.0, 2.0], "name": ["a", "b"]})
    before = plt.get_fignums()
    for name in ("second", "first", "second"):
        picture = run.save_figure(name, draw, data, f"caption of {name}", title="a title")
    assert plt.get_fignums() == before
    assert picture.light == with_palette((run.path / "figures" / "second.png").read_bytes())
    assert names(run.path / "figures") == {
        f"{name}{end}"
        for name in ("first", "second")
        for end in (".png", ".svg", ".json", ".parquet", "-dark.png")
    }
    assert [facts["name"] for facts in run.figures()] == ["second", "first"]
    pd.testing.assert_frame_equal(read_frame(run.path / "figures" / "first.parquet"), data)
    light, dark = (run.path / "figures" / f"first{end}.png" for end in ("", "-dark"))
    assert light.read_bytes() != dark.read_bytes()


def test_commit_is_that_of_the_package_or_absent() -> None:
    commit = provenance.commit()
    assert commit is None or (len(commit["commit"]) == 40 and isinstance(commit["dirty"], bool))


def test_an_empty_folder_lists_nothing(tmp_path) -> None:
    for home in (tmp_path, tmp_path / "missing"):
        assert runs(home).empty
        assert runs(home).attrs["skipped"] == []


def test_listings_skip_broken_runs_and_say_why(tmp_path, spec) -> None:
    with Run.create(spec, "good", tmp_path) as run:
        pass
    stored = json.loads((run.path / "manifest.json").read_text())
    broken = {
        "cut": (run.path / "manifest.json").read_bytes()[:100],
        "bytes": b"\xff\xfe\x00",
        "deep": b"[" * 200_000,
        "list": b"[]",
        "status": json.dumps({**stored, "status": "great"}).encode(),
        "start": json.dumps({**stored, "started": "today"}).encode(),
        "seed": json.dumps({**stored, "seed": 2**70}).encode(),
        "seconds": json.dumps({**stored, "seconds": "long"}).encode(),
        "surrogate": json.dumps({**stored, "name": "half \ud800 a pair"}).encode(),
    }
    for name, content in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_bytes(content)
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "directory" / "manifest.json").mkdir(parents=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    table = runs(tmp_path)
    assert table["run"].tolist() == [run.path.name]
    skipped = dict(table.attrs["skipped"])
    assert set(skipped) == {*broken, "folder", "notes.txt", "directory", "dangling"}
    assert all(skipped.values())


def test_runs_are_newest_first_and_found_by_part_of_the_name(tmp_path, spec) -> None:
    created = [Run.create(spec, name, tmp_path) for name in ("a", "b", "c")]
    for age, run in enumerate(reversed(created)):
        run.update(started=f"2024-01-0{9 - age}T00:00:00.000+00:00")
    assert runs(tmp_path)["name"].tolist() == ["c", "b", "a"]
    assert find_run(created[1].path.name[-6:], tmp_path).path == created[1].path
    assert find_run(created[1].path).path == created[1].path
    for part in ("nothing", "2"):
        with pytest.raises(ArgumentError, match="run="):
            find_run(part, tmp_path)


def test_a_name_that_no_file_can_have_is_not_a_run(tmp_path) -> None:
    with pytest.raises(ArgumentError, match="none of the 0 runs"):
        find_run("a" * 5000, tmp_path)


def test_home_that_cannot_hold_runs(tmp_path, spec, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot write"):
        Run.create(spec, "trial", tmp_path / "file")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 << 20))
    with pytest.raises(StorageError, match=r"5 MiB free.*64 MiB.*--home"):
        Run.create(spec, "trial", tmp_path)
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize("files_before", range(2))
def test_a_full_disk_while_a_run_is_created_leaves_nothing(tmp_path, spec, monkeypatch, files_before) -> None:
    # A disk cannot be filled up exactly between two writes, so that fsync raises the error in its place.
    count = iter(range(100))

    def fsync(descriptor: int) -> None:
        if next(count) >= files_before * 2:  # a file and its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError, match=r"No space left.*free some space"):
        Run.create(spec, "trial", tmp_path)
    assert names(tmp_path) == set()


def test_write_atomic_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(StorageError, match="broken"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


LIMITED = """
import resource, sys
from qtx_lab.errors import StorageError
from qtx_lab.experiments.runs import Run
from qtx_lab.specs import ExperimentSpec
import os
run = Run.create(ExperimentSpec(), "trial", sys.argv[1])
try:
    with run:
        run.log(x=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        run.log_many({"x": hash(str(i))} for i in range(20_000))
except StorageError as error:
    print(error)
"""


@pytest.mark.chaos
def test_a_limit_of_file_size_fails_the_run(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Cannot write")
    table = runs(tmp_path)
    assert table["status"].tolist() == ["failed"]
    assert "StorageError" in table["error"][0]
    run = find_run(table["path"][0])
    assert run.metrics()["x"].tolist() == [1]
    assert names(run.path) - {"code.patch"} == {*FILES, "metrics.parquet"}


@pytest.mark.chaos
def test_a_disk_that_is_really_full(tmp_path, spec) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", tmp_path]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(StorageError, match="No space left"), Run.create(spec, "trial", tmp_path) as run:  # noqa: PT012
            run.log(x=1)
            with suppress(OSError), (tmp_path / ".filler").open("wb", buffering=0) as filler:
                while filler.write(bytes(1 << 16)):
                    pass
            run.log_many({"x": hash(str(i))} for i in range(20_000))
        assert run.metrics()["x"].tolist() == [1]
        with pytest.raises(StorageError, match="0 MiB free"):
            Run.create(spec, "next", tmp_path)
        assert len(runs(tmp_path)) == 1
    finally:
        subprocess.run(["umount", tmp_path], check=True)


ENDLESS = """
import sys
from qtx_lab.experiments.runs import Run
from qtx_lab.specs import ExperimentSpec
with Run.create(ExperimentSpec(), "trial", sys.argv[1]) as run:
    print(run.path, flush=True)
    for i in range(1_000_000):
        run.log(step=i)
        run.update(results={"step": i})
        print(i, flush=True)
"""


@pytest.mark.chaos
def test_a_killed_process_leaves_a_run_that_reads_as_interrupted(tmp_path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, tmp_path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        for _ in range(5):
            last = int(process.stdout.readline())
        assert Run.open(path).status == "running"
        process.send_signal(signal.SIGKILL)
    run = Run.open(path)
    assert run.status == "interrupted"
    assert runs(tmp_path)["status"].tolist() == ["interrupted"]
    assert run.metrics()["step"].tolist()[: last + 1] == list(range(last + 1))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["process"] = {**manifest["process"], "pid": os.getpid()}  # the pid was given to another process
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert Run.open(path).status == "interrupted"


@pytest.fixture
def clock(monkeypatch):
    """The clock that runs read, which shows another day after `clock.shift` was set."""

    class Clock(datetime):
        shift = timedelta(0)

        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + cls.shift

    monkeypatch.setattr("qtx_lab.experiments.runs.datetime", Clock)
    return Clock


def test_a_clock_that_steps_back_fails_no_run(tmp_path, spec, clock) -> None:
    with Run.create(spec, "trial", tmp_path) as run:
        clock.shift = timedelta(days=-1)
    assert 0 <= run.manifest["seconds"] < 3600
    with Run.create(spec, "moved", tmp_path) as run:  # ended on another boot of the machine
        run.update(clock={"boot_id": "another"})
        clock.shift = timedelta(days=-2)
    assert run.manifest["seconds"] == 0


def test_what_was_created_last_is_the_newest_whatever_the_clock_said(tmp_path, spec, clock) -> None:
    """In listings, for the result that is taken, and for the workbench that is restored."""
    facts = {"sweep": {"cell": "a cell"}, "code": {"result": "a result"}}
    created: list[Run] = []

    def create(days: float, **more) -> Run:
        clock.shift = timedelta(days=days)
        with Run.create(spec, RUN_NAME, tmp_path, **facts, **more) as run:
            (run.path / STATE_FILE).write_text("{}")
        return run

    def check() -> None:
        newest = created[-1].path
        assert runs(tmp_path)["run"].tolist() == [run.path.name for run in reversed(created)]
        assert runs(tmp_path, where="seed = 3")["run"].iloc[0] == newest.name
        assert find_result(tmp_path, "a result").path == newest
        assert find_done(tmp_path, {"a cell"}) == {"a cell": newest}
        assert _newest(tmp_path).path == newest

    for days in (-4, -3):  # of a version that had no sequence numbers
        created.append(create(days, sequence=None))
        (tmp_path / SEQUENCE).unlink()
    for days in (-700, 0, 300, 0, -700):
        created.append(create(days))
        check()
    (tmp_path / SEQUENCE).write_bytes(b"no number")  # it was lost
    created.append(create(-1))
    check()
    foreign = Run.create(spec, RUN_NAME, tmp_path / "elsewhere", **facts)
    (foreign.path / STATE_FILE).write_text("{}")
    foreign.finish("done")
    created.insert(3, Run(foreign.path.rename(tmp_path / foreign.path.name)))  # sorted in by the clock
    check()


def test_runs_that_begin_at_once_have_different_sequence_numbers(tmp_path, spec) -> None:
    with ThreadPoolExecutor(8) as pool:
        created = [pool.submit(Run.create, spec, "trial", tmp_path) for _ in range(24)]
    numbers = {run.result().manifest["sequence"] for run in created}
    assert len(numbers) == 24
    assert int((tmp_path / SEQUENCE).read_bytes()) == max(numbers)


def test_a_process_is_known_by_its_boot_and_ticks() -> None:
    mine = provenance.this_process()
    assert not provenance.is_gone(mine)
    assert provenance.is_this_process_or_its_parent(mine)
    if "start_ticks" in mine:
        assert "process_started" not in mine  # which moves when the clock is set
        assert provenance.is_gone({**mine, "boot_id": "the boot before"})
        assert provenance.is_gone({**mine, "start_ticks": mine["start_ticks"] + 1})
    assert not provenance.is_gone({**mine, "hostname": "elsewhere"})
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            pass
        assert provenance.is_gone({**mine, "pid": child.pid})  # it has ended, and nobody asked how


ODD = {
    "fields": {"spec": {"fields": [1]}},
    "identity": {"spec": {"identity": 5}},
    "parameters": {"spec": {"kind": "NotebookSpec", "fields": {"parameters": [1]}}},
    "sweep": {"sweep": {"name": {"a": 1}}},
    "error": {"error": {"a": 1}},
    "year 1": {"started": "0001-01-01T00:00:00+14:00"},
    "huge": {"results": {"n": 10**400}},
    "huger": {"results": {"n": 10**4000, "table": [{"a": 10**400}, 1]}},
    "text": {"results": {"n": "x", "N": 3, "": 1, 'a"b': 2}},
    "process": {"status": "running", "process": {"pid": 10**30, "hostname": "x", "start_ticks": "z"}},
    "finished": {"finished": {"a": 1}},
    "measures": {"measures": {"n": 5}},
    "git": {"git": {"commit": 5}, "title": [1], "command": {"a": 1}},
}


@pytest.mark.parametrize("odd", sorted(ODD))
def test_an_odd_manifest_costs_only_itself(tmp_path, spec, odd) -> None:
    with Run.create(spec, "good", tmp_path) as run:
        run.update(results={"n": 1})
    stored = json.loads((run.path / "manifest.json").read_text())
    (tmp_path / "odd" / "figures").mkdir(parents=True)
    (tmp_path / "odd" / "manifest.json").write_text(json.dumps({**stored, **ODD[odd]}))
    table = runs(tmp_path)
    assert run.path.name in set(table["run"])
    assert len(table) + len(table.attrs["skipped"]) == 2
    assert run.path.name in set(table.select("status = 'done' and layer = 3")["run"])
    assert table.export("parquet")[:4] == b"PAR1"
    assert table.to_json(orient="records", date_format="iso")
    if len(table) == 2:
        assert write_report(Run(tmp_path / "odd")).exists()
        if importlib.util.find_spec("rocrate") and Run(tmp_path / "odd").status != "running":
            assert export_to_ro_crate(Run(tmp_path / "odd"), tmp_path / "crates").exists()


def test_a_tilde_is_a_home(tmp_path, spec, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = Run.create(spec, "trial", "~/mine")
    assert run.path.parent == tmp_path / "mine"
    monkeypatch.setenv("QTX_LAB_HOME", "~/mine")
    assert runs()["run"].tolist() == [run.path.name]
    assert find_run(f"~/mine/{run.path.name}").path == run.path
    with pytest.raises(ArgumentError, match="home='~nobody-of-this-name'"):
        runs("~nobody-of-this-name")


def test_a_tilde_is_a_home_wherever_a_path_is_given(tmp_path, spec, monkeypatch) -> None:
    """Also where no shell has seen it: in a form, in a spec file, and after `--out=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.txt").write_text("Attention is a mean of values. " * 9)
    assert read_text("~/mine.txt").startswith("Attention")
    assert open_tokens("~/mine.txt", 8).digest == open_tokens(tmp_path / "mine.txt", 8).digest
    (tmp_path / "mine.yaml").write_text(spec.to_yaml())
    assert type(spec).from_yaml("~/mine.yaml") == type(spec).from_yaml(Path("~/mine.yaml")) == spec
    trainer = QuantumTrainer("small", steps=1, num_tokens=8, batch_size=1, folder="~/t", progress=False)
    assert trainer.train().folder == tmp_path / "t"
    (tmp_path / "values.yaml").write_text("n: 3")
    assert read_parameters((), (), (HomePath().convert("~/values.yaml", None, None),)) == {"n": "3"}
    commands = [*main.commands.values()]
    commands += [inner for group in commands for inner in getattr(group, "commands", {}).values()]
    types = [option.type for command in commands for option in command.params]
    paths = [kind for kind in types if isinstance(kind, click.Path)]
    assert len(paths) > 9
    assert all(isinstance(kind, HomePath) for kind in paths)
    pytest.importorskip("rocrate")
    run = Run.create(spec, "trial", "~/runs")
    run.finish("done")
    assert export_to_ro_crate(run, "~/crates").parent == tmp_path / "crates"


HOLD = """
import sys
from qtx_lab.experiments.runs import Run
from qtx_lab.specs import ExperimentSpec
run = Run.create(ExperimentSpec(), "held", sys.argv[1])
print(run.path, flush=True)
sys.stdin.read()
"""


@pytest.mark.chaos
def test_two_writers_to_one_run_are_refused(tmp_path, spec) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        run = Run.open(process.stdout.readline().strip())
        data = pd.DataFrame({"x": [1]})
        for write in (
            lambda: run.log(x=1),
            lambda: run.update(results={"x": 1}),
            lambda: run.finish("done"),
            lambda: run.save_figure("f", draw, data, "caption"),
        ):
            with pytest.raises(StorageError, match=f"process {process.pid} on .* is writing this run"):
                write()
        assert run.status == "running"
        assert names(run.path) - {"code.patch"} == set(FILES)
        process.kill()
    run.update(results={"x": 1})  # nobody else is writing any more
    run.finish("interrupted")
    mine = Run.create(spec, "mine", tmp_path)
    child = f"from qtx_lab.experiments.runs import Run; Run.open({str(mine.path)!r}).log(x=2)"
    subprocess.run([sys.executable, "-c", child], check=True)  # as the kernel of a notebook
    assert mine.metrics()["x"].tolist() == [2]


def test_a_saved_figure_shows_both_themes_and_its_caption(tmp_path, spec) -> None:
    with Run.create(spec, "trial", tmp_path) as run:
        shown = run.save_figure("both", draw, pd.DataFrame({"x": [1.0, 2.0]}), 'A "caption" & more')
    assert len(repr(shown)) < 100
    data, metadata = shown._repr_mimebundle_()
    page = data["text/html"]
    light, dark = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert light == data["image/png"] != dark  # viewers without HTML show the light one
    assert metadata["image/png"] == {"width": 192, "height": 96}
    assert 'class="qtx-dark" style="display: none"' in page
    assert "<p>A &quot;caption&quot; &amp; more</p>" in page
    assert 'data-jp-theme-light="false"' in page


@pytest.mark.parametrize("value", [True, 3, 0.5, "a text"])
def test_a_metric_may_be_missing_first_and_last(value, tmp_path):
    """None is of every kind: a row of its own was of numbers, and refused beside texts and truth values."""
    with Run.create(ExperimentSpec(), "trial", tmp_path) as run:
        for given in (None, None, value, None, value):
            run.log(step=1, metric=given)
        with pytest.raises(ArgumentError, match="'metric' was"):
            run.log(metric=[1.5, "text"][isinstance(value, int | float)] if value is not True else 1.5)
    logged = [None if pd.isna(x) else x for x in run.metrics()["metric"].astype(object)]
    assert logged == [None, None, value, None, value]


def test_an_error_that_is_not_unicode_ends_the_run_with_itself(tmp_path):
    """As one that names a file of other bytes than UTF-8; the run stayed running, by an error of our own."""
    run = Run.create(ExperimentSpec(), "trial", tmp_path)
    with pytest.raises(FileNotFoundError), run:
        open(b"/no/such/\xff".decode(errors="surrogateescape")).close()
    assert run.status == "failed"
    assert "udcff" in run.manifest["error"]
    with pytest.raises(ArgumentError, match=r"'\\udcff' is not allowed: it is not Unicode"):
        Run.create(ExperimentSpec(), "trial", tmp_path).update(results={"text": "\udcff"})


def test_a_table_without_columns_is_refused_by_name(tmp_path):
    with (
        Run.create(ExperimentSpec(), "trial", tmp_path) as run,
        pytest.raises(ArgumentError, match="without columns"),
    ):
        run.save_figure("empty", lambda data, theme: None, pd.DataFrame(), "nothing")
