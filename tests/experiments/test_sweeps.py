"""Sweeps are checked as a whole, and no notebook that has ended is lost, whichever process is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import nbformat
import psutil
import pytest
from distributed import LocalCluster

from qtx_lab.errors import ArgumentError, BackendUnavailable, DtypeError, SpecError, StorageError
from qtx_lab.experiments import sweeps
from qtx_lab.experiments.notebook_execution import ExecutionLimits
from qtx_lab.experiments.runs import Run, read_manifests, runs
from qtx_lab.experiments.sweep_plan import plan, repeat_seed
from qtx_lab.experiments.sweeps import sweep
from qtx_lab.specs import ClusterSpec, ExperimentSpec
from qtx_lab.storage import read_frame
from qtx_lab.training import open_cluster

pytestmark = pytest.mark.notebooks
SOAK = os.environ.get("QTX_LAB_SOAK", "0") not in ("", "0")

PARAMETERS = "n = 1\nsampler = 'a'\nseed = 0\nwait = 0\nrun_dir = None"
# A kernel that imports little starts in under a second. The notebook writes what `Run.update` would write.
MEASURE = """
import json, os, pathlib, time
time.sleep(wait)
if n == 13 and sampler == "b":
    raise ValueError("unlucky")
path = pathlib.Path(run_dir, "manifest.json")
manifest = json.loads(path.read_text())
manifest["measures"] = {"error": {"main": True}}
manifest["results"] = {"aside": 1, "error": 1 / n + seed % 97 / 1e4, "threads": os.environ["OMP_NUM_THREADS"]}
path.with_suffix(".new").write_text(json.dumps(manifest))
os.replace(path.with_suffix(".new"), path)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a scheduler with two workers."""
    with open_cluster("local", num_workers=2) as opened:
        yield opened.client.scheduler.address


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.ipynb", PARAMETERS, MEASURE)


def write(path: Path, parameters: str, *cells: str, spec: str | None = None) -> Path:
    new = nbformat.v4.new_notebook()
    if spec is not None:
        new.metadata["qtx_lab"] = {"spec": spec}
    new.cells = [nbformat.v4.new_code_cell(cell) for cell in (parameters, *cells)]
    new.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(new, path)
    return path


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ({"m": [1]}, {}, r"no parameter 'm'.*at m=1"),
        ({"n": [1, 2, "three"]}, {}, r"n='three' .* a number, n = 1\. \(at n='three'\)"),
        ({"n": []}, {}, r"grid\['n'\]=\[\]"),
        ({"n": "12"}, {}, r"grid\['n'\]='12'"),
        ({"n": [1, 2, 1]}, {}, "1 is named more than once"),
        ({"n": [object()]}, {}, "not a valid JSON"),
        ({"n": [1]}, {"parameters": {"n": 2}}, "in the grid and in the parameters"),
        ({"n": [1]}, {"parameters": {"run_dir": "x"}}, "no parameter 'run_dir'"),
        ({"seed": [1, 2]}, {"repeats": 2}, "is given its seed"),
        ({"n": [1]}, {"repeats": 0}, "repeats=0"),
        ({"n": [1]}, {"seed": -1}, "seed=-1"),
        ({"n": [1]}, {"workers": 0}, "workers=0"),
        ({"n": [1]}, {"workers": 1, "cluster": "tcp://127.0.0.1:1"}, "exclude each other"),
    ],
)
def test_the_whole_grid_is_checked_before_any_work(notebook, tmp_path, grid, options, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        sweep(notebook, grid, home=tmp_path / "home", **options)
    assert not (tmp_path / "home").exists()


def test_every_combination_is_checked_as_an_experiment(tmp_path) -> None:
    defaults = "\n".join(f"{name} = {value!r}" for name, value in ExperimentSpec().to_parameters().items())
    path = write(tmp_path / "a.ipynb", defaults + "\nrun_dir = None", spec="experiment")
    with pytest.raises(SpecError, match=r"layer=6 .* \(at sampler='systematic', layer=6\)"):
        plan(path, {"sampler": ["systematic", "sobol"], "layer": [0, 6]}, parameters={"num_tokens": 64})
    cells = plan(path, {"layer": [0, 1]}, repeats=2, seed=5).notebooks
    assert [cell.spec.layer for cell in cells] == [0, 1, 0, 1]
    assert [cell.spec.seed for cell in cells] == [repeat_seed(5, 0)] * 2 + [repeat_seed(5, 1)] * 2
    assert len({repeat_seed(seed, repeat) for seed in range(50) for repeat in range(50)}) == 2500


def test_a_notebook_without_a_seed_is_not_repeated(tmp_path) -> None:
    path = write(tmp_path / "a.ipynb", "n = 1")
    with pytest.raises(ArgumentError, match="no parameter `seed`"):
        plan(path, {"n": [1]}, repeats=2)
    assert len(plan(path, {}).notebooks) == 1


def test_a_sweep_is_resumed(notebook, cluster, tmp_path, capsys) -> None:
    home = tmp_path / "home"
    grid = {"n": [4, 13], "sampler": ["a", "b"]}
    run = sweep(notebook, grid, cluster=cluster, home=home)
    assert "4/4" in capsys.readouterr().err
    assert run.status == "failed"
    assert run.manifest["error"] == "Of 4 notebooks not all are done: 1 failed."
    table = run.metrics()
    assert sorted(table["status"]) == ["done"] * 3 + ["failed"]
    assert set(table["results.threads"].dropna()) == {"1"}
    done = table[table["status"] == "done"]
    expected = 1 / done["spec.n"] + done["spec.seed"] % 97 / 1e4
    assert done["results.error"].to_numpy() == pytest.approx(expected.to_numpy())
    failed = runs(home, where="status = 'failed' and kind = 'NotebookSpec'")
    assert failed["sweep"].unique().tolist() == [run.path.name]
    for path in failed["path"]:
        assert '"evalue": "unlucky"' in (Path(path) / "tiny.ipynb").read_text(encoding="utf-8")
    drawn = read_frame(run.path / "figures" / "results.parquet")
    assert sorted(zip(drawn["by"], drawn["x"], drawn["runs"], strict=True)) == [
        ("a", 4, 1),
        ("a", 13, 1),
        ("b", 4, 1),
    ]
    assert "1 failed" in (run.path / "report.html").read_text(encoding="utf-8")
    assert "-g n=4,13 -g sampler=a,b --repeats 1" in run.manifest["command"]

    (home / "foreign").mkdir()
    (home / "cut").mkdir()
    (home / "cut" / "manifest.json").write_text("{")
    done_before = {path: (path / "manifest.json").read_bytes() for path in map(Path, done["path"])}
    more = sweep(
        notebook, {**grid, "n": [4, 6]}, repeats=2, cluster=cluster, home=home, resume=True, progress=False
    )
    assert more.status == "done"
    assert more.manifest["results"]["kept"] == 2
    assert len(more.metrics()) == 8
    drawn = read_frame(more.path / "figures" / "results.parquet")
    assert set(drawn["runs"]) == {2}
    assert {path: (path / "manifest.json").read_bytes() for path in done_before} == done_before
    content = nbformat.read(notebook, as_version=4)
    content.cells.append(nbformat.v4.new_markdown_cell("A note changes no result."))
    nbformat.write(content, notebook)
    same = sweep(notebook, {"n": [4.0]}, cluster=cluster, home=home, resume=True, progress=False)
    assert same.manifest["results"]["kept"] == 0  # without a sampler it is another combination
    assert plan(notebook, {"n": [4.0]}) == plan(notebook, {"n": [4]})
    taken = sweep(notebook, {"n": [4]}, cluster=cluster, home=home, progress=False)
    assert taken.manifest["results"]["kept"] == 1
    assert "1 of them are taken from earlier runs" in taken.manifest["results"]["summary"][1]
    Run(Path(taken.metrics()["path"][0])).update(code={"package": "another"})
    older = sweep(notebook, {"n": [4]}, cluster=cluster, home=home, resume=True, progress=False)
    assert older.manifest["results"]["kept"] == 1
    said = "1 of the notebooks that --resume takes were done by other code of qtx_lab than this"
    assert said in older.manifest["results"]["summary"][2]
    assert said in capsys.readouterr().err
    write(notebook, PARAMETERS, MEASURE, "'changed'")
    assert plan(notebook, grid).notebooks[0].key != plan(notebook, grid, seed=1).notebooks[0].key
    again = sweep(notebook, {"n": [4]}, cluster=cluster, home=home, resume=True, progress=False)
    assert again.manifest["results"]["kept"] == 0


def test_a_notebook_of_a_sweep_that_hangs_is_a_failed_run(notebook, cluster, tmp_path) -> None:
    limits = ExecutionLimits(cell_seconds=8)
    run = sweep(notebook, {"wait": [600, 0]}, cluster=cluster, home=tmp_path, limits=limits, progress=False)
    assert run.metrics()["status"].tolist() == ["failed", "done"]
    assert "longer than the 8 s that a cell may take" in run.metrics()["error"][0]


def test_what_a_resumed_sweep_takes_is_told_by_its_cells(notebook, tmp_path, capsys) -> None:
    """Another text beside the cells changes nothing; other code does, and why nothing is taken is said."""
    home = tmp_path / "home"
    sha256 = plan(notebook, {}).spec.sha256
    content = nbformat.read(notebook, as_version=4)
    content.cells.insert(0, nbformat.v4.new_markdown_cell("A text."))
    nbformat.write(content, notebook)
    assert plan(notebook, {}).spec.sha256 == sha256
    with Run.create(plan(notebook, {}).spec, "sweep-tiny", home):
        pass

    nowhere = ClusterSpec(kind="address", address="tcp://127.0.0.1:1", timeout=1)

    def told(**options: bool) -> str:
        with pytest.raises(BackendUnavailable):
            sweep(notebook, {}, cluster=nowhere, home=home, progress=False, **options)
        return capsys.readouterr().err

    why = "--resume takes nothing: the code cells of tiny"
    assert why not in told(resume=True)
    content.cells[-1].source += "\n# changed"
    nbformat.write(content, notebook)
    assert why in told(resume=True)
    assert why not in told(resume=True)  # that sweep was of these cells


@pytest.mark.chaos
def test_two_sweeps_share_a_folder(notebook, cluster, tmp_path) -> None:
    by_seed: dict[int, Run] = {}

    def work(seed: int) -> None:
        by_seed[seed] = sweep(
            notebook, {"n": [1, 2]}, seed=seed, cluster=cluster, home=tmp_path / "home", progress=False
        )

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, run in by_seed.items():
        assert run.status == "done"
        table = run.metrics()
        assert sorted(table["spec.n"]) == [1, 2]
        assert set(table["spec.seed"]) == {repeat_seed(seed, 0)}
        assert set(table["sweep"]) == {run.path.name}
    assert len(runs(tmp_path / "home")) == 6


@pytest.mark.chaos
def test_a_function_stops_a_sweep(notebook, cluster, tmp_path) -> None:
    home = tmp_path / "home"

    def stop() -> bool:
        return sum(facts["status"] == "done" for _, facts in read_manifests(home)) >= 1

    with pytest.raises(KeyboardInterrupt):
        sweep(
            notebook, {"n": [1, 2, 3, 4, 5, 6]}, parameters={"wait": 1.0}, cluster=cluster, home=home,
            stop=stop, progress=False,
        )  # fmt: skip
    statuses = [
        json.loads((Path(path) / "manifest.json").read_text())["status"] for path in runs(home)["path"]
    ]
    assert set(statuses) == {"done", "interrupted"}  # as stored, and not only as read
    assert len(statuses) < 7
    table = Run(Path(runs(home, where="kind = 'SweepSpec'")["path"][0])).metrics()
    assert len(table) == 6
    assert "missing" in set(table["status"])


KILLS = """
import sys
from qtx_lab.cli import main
main(sys.argv[1:])
"""


def start(notebook: Path, home: Path, cells: int, *options: str) -> subprocess.Popen:
    grid = ["-g", f"n={','.join(str(n) for n in range(1, cells // 2 + 1))}", "-g", "sampler=a,c"]
    command = ["sweep", notebook, *grid, "--workers", "2", "--home", home, "--resume", *options]
    return subprocess.Popen(
        [sys.executable, "-c", KILLS, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def done_in(home: Path) -> dict[str, bytes]:
    """What has ended well, by folder, as it is on disk."""
    return {
        folder.name: (folder / "manifest.json").read_bytes()
        for folder, facts in read_manifests(home)
        if facts["status"] == "done" and "cell" in facts.get("sweep", {})
    }


def wait_until(process: subprocess.Popen, home: Path, count: int) -> None:
    """Wait until so many notebooks are done, or the sweep has ended."""
    end = time.monotonic() + 600  # a busy machine may need minutes to start three processes
    while time.monotonic() < end and process.poll() is None:
        if home.exists() and len(done_in(home)) >= count:
            break
        time.sleep(0.1)


def kill(process: subprocess.Popen, victim: str, rng: random.Random) -> bool:
    """Kill the sweep, a worker or a kernel, as soon as there is one; False where the sweep ends before."""
    word = {"sweep": "", "worker": "spawn_main", "kernel": "ipykernel_launcher"}[victim]
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            target = psutil.Process(process.pid)
            pool = [child for child in target.children(recursive=True) if word in command_of(child)]
            if pool or not word:
                rng.choice(pool if word else [target]).send_signal(signal.SIGKILL)
                return True
        time.sleep(0.02)
    return False


def command_of(process: psutil.Process) -> str:
    """The command line of a process; empty where it has ended in the meantime, as kernels often do."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def complete(notebook: Path, home: Path, cells: int) -> None:
    """Let --resume complete a sweep: nothing that was done is lost or run again, nothing is there twice."""
    before = done_in(home)
    last = start(notebook, home, cells)
    output, _ = last.communicate(timeout=1200)
    assert last.returncode == 0, output.decode()[-2000:]
    final = done_in(home)
    assert {name: final.get(name) for name in before} == before
    keys = [json.loads(content)["sweep"]["cell"] for content in final.values()]
    assert len(keys) == len(set(keys)) == cells
    ended = runs(home, where="kind = 'SweepSpec' and status = 'done'")
    assert len(Run(Path(ended["path"][0])).metrics()) == cells
    assert not runs(home).attrs["skipped"]


@pytest.mark.chaos
def test_nothing_is_lost_when_processes_are_killed_or_interrupted(notebook, tmp_path, seed) -> None:
    """A worker is killed, which is replaced, then the sweep; one that goes on is interrupted by Ctrl-C.

    No notebook that is done is lost or run again, and --resume completes the sweep.
    """
    rng, home, cells = random.Random(seed), tmp_path / "home", 8
    process = start(notebook, home, cells)
    wait_until(process, home, 1)
    assert kill(process, "worker", rng)
    wait_until(process, home, 3)
    before = done_in(home)
    assert kill(process, "sweep", rng)
    process.communicate(timeout=600)
    assert len(before) < cells

    interrupted = start(notebook, home, cells, "--workers", "1")
    wait_until(interrupted, home, len(done_in(home)) + 1)
    os.killpg(interrupted.pid, signal.SIGINT)  # as a terminal does: to the worker too
    output, _ = interrupted.communicate(timeout=600)
    assert interrupted.returncode == 130, output.decode()
    assert b"Traceback" not in output
    assert b"--resume runs the others" in output.splitlines()[-1]
    after = done_in(home)
    assert {name: after.get(name) for name in before} == before
    assert {facts["status"] for _, facts in read_manifests(home)} == {"done", "interrupted"}  # none runs on
    complete(notebook, home, cells)


@pytest.mark.chaos
def test_two_processes_sweep_in_one_folder_at_once(notebook, tmp_path) -> None:
    """The second waits for the notebook that the first is running, and runs it itself when the first dies."""
    home, gate = tmp_path / "home", tmp_path / "gate"
    waits = f"""
import pathlib, time
while sampler == "a" and not pathlib.Path({str(gate)!r}).exists():
    time.sleep(0.1)
"""
    write(notebook, PARAMETERS, waits, MEASURE)
    first = start(notebook, home, 2, "--workers", "1")
    while not any("cell" in facts.get("sweep", {}) for _, facts in read_manifests(home)):
        assert first.poll() is None
        time.sleep(0.1)
    second = start(notebook, home, 2, "--workers", "1")
    assert any(b"Waits for 1 notebook(s) that another sweep is running" in line for line in second.stdout)
    first.kill()
    first.communicate()
    gate.touch()
    output, _ = second.communicate(timeout=1200)
    assert second.returncode == 0, output.decode()
    (ended,) = runs(home, where="kind = 'SweepSpec' and status = 'done'").to_dict("records")
    assert ended["results.kept"] == 0
    assert Run(Path(ended["path"])).metrics()["status"].tolist() == ["done", "done"]


def test_a_notebook_that_another_sweep_brings_to_its_end_is_taken(notebook, tmp_path, monkeypatch) -> None:
    """It is waited for, unless its sweep is over: then it runs no more, and is left."""
    planned = plan(notebook, {"n": [1, 2]})
    folders = {}
    for cell, status in zip(planned.notebooks, ("running", "failed"), strict=True):
        other = Run.create(planned.spec, "sweep-tiny", tmp_path)
        of_sweep = {"name": other.path.name, "cell": cell.key, "repeat": 0}
        folders[cell.key] = Run.create(cell.spec, "tiny", tmp_path, sweep=of_sweep).path
        if status == "failed":
            other.finish(status)
    running, left = folders
    looks = []

    def stop() -> bool:
        looks.append(1)
        if len(looks) == 2:
            Run(folders[running]).finish("done")
        return False

    monkeypatch.setattr(sweeps, "OTHER_SWEEPS_POLL_S", 0.01)
    assert sweeps._left_by_other_sweeps(folders, stop) == {left}
    assert len(looks) == 2
    Run(folders[running]).update(status="running")
    with pytest.raises(KeyboardInterrupt):
        sweeps._left_by_other_sweeps(folders, lambda: True)


@pytest.mark.chaos
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("number", range(10 if SOAK else 0))
def test_sweeps_that_are_killed_five_times_lose_nothing(notebook, tmp_path, seed, number, capsys) -> None:
    """In a soak ten sweeps of 24 notebooks, each killed five times: the sweep, a worker or a kernel of it."""
    rng, home, cells, process, kills = random.Random(f"{seed} {number}"), tmp_path / "home", 24, None, []
    for i in range(5):
        before = done_in(home) if home.exists() else {}
        if process is None:
            process = start(notebook, home, cells)
        enough = rng.randrange(0, cells // 6)
        wait_until(process, home, len(before) + enough)
        time.sleep(rng.random() * (4 if enough == 0 else 1))
        victim = ("sweep", "worker", "kernel")[(5 * number + i) % 3]
        kills += [victim] if kill(process, victim, rng) else []
        if victim == "sweep":  # after the others it continues by itself
            process.communicate(timeout=600)
            process = None
        after = done_in(home)
        assert {name: after.get(name) for name in before} == before
    if process is not None:
        process.communicate(timeout=1200)
    complete(notebook, home, cells)
    with capsys.disabled():
        print(f"\nsweep {number}: killed {', '.join(kills) or 'nothing'}; 24 notebooks done, none lost")


@pytest.mark.chaos
def test_a_full_disk_and_a_read_only_disk(notebook, cluster, small_disk, tmp_path) -> None:
    fill = f"open({str(small_disk / 'filler')!r}, 'wb').write(bytes(30 << 20))"
    full = write(tmp_path / "full.ipynb", PARAMETERS, fill)
    with pytest.raises(StorageError, match=r"MiB free.*needs 64 MiB"):
        sweep(full, {"n": [1, 2, 3]}, cluster=cluster, home=small_disk / "home", progress=False)
    table = runs(small_disk / "home")
    assert sorted(table["status"])[-1] != "running"
    mine = table[table["kind"] == "SweepSpec"].iloc[0]
    assert mine["status"] == "failed"
    assert "MiB free" in mine["error"]
    with pytest.raises(StorageError, match="MiB free"):
        sweep(full, {"n": [1]}, cluster=cluster, home=small_disk / "home", progress=False)
    assert len(runs(small_disk / "home")) == len(table)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        sweep(notebook, {"n": [1]}, cluster=cluster, home=small_disk / "other", progress=False)


def test_an_open_cluster_stays_open(notebook, cluster, tmp_path) -> None:
    with open_cluster("address", address=cluster) as opened:
        assert sweep(notebook, {"n": [1]}, cluster=opened, home=tmp_path, progress=False).status == "done"
        assert opened.client.status == "running"


@pytest.mark.parametrize("name", ["cluster", "grid", "parameters"])
def test_arguments_of_another_type_are_refused_by_name(notebook, tmp_path, name) -> None:
    with pytest.raises(DtypeError, match=f"{name}=5 is not allowed"):
        sweep(notebook, **{"grid": {"n": [1]}, "home": tmp_path / "home", name: 5})
    assert not (tmp_path / "home").exists()


def test_no_more_processes_than_notebooks(notebook, tmp_path, monkeypatch) -> None:
    num_workers = []

    def opening(**arguments):
        num_workers.append(arguments["num_workers"])
        raise BackendUnavailable("not today")

    monkeypatch.setattr("qtx_lab.experiments.sweep_execution.open_cluster", opening)
    with pytest.raises(BackendUnavailable):
        sweep(notebook, {"n": [1, 2]}, workers=10**6, home=tmp_path, progress=False)
    assert num_workers == [2]


@pytest.mark.chaos
def test_a_scheduler_that_dies_or_has_no_workers_is_told_in_a_sentence(
    notebook, tmp_path, monkeypatch
) -> None:
    with LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address=None) as empty:
        address = empty.scheduler_address
        monkeypatch.setattr("qtx_lab.experiments.sweep_execution.NO_WORKERS_TIMEOUT_S", 1.0)
        with pytest.raises(BackendUnavailable, match=f"{address} has had no workers for 1 s.*--resume"):
            sweep(notebook, {"n": [1]}, cluster=address, home=tmp_path / "home", progress=False)
        monkeypatch.setattr("qtx_lab.experiments.sweep_execution.NO_WORKERS_TIMEOUT_S", 600.0)

        def close_soon() -> bool:
            """Called twice a second while the sweep waits for its notebook."""
            if empty.status.name == "running":
                empty.close()
            return False

        with pytest.raises(BackendUnavailable, match="scheduler of the cluster went away; --resume"):
            sweep(
                notebook, {"n": [1]}, cluster=address, home=tmp_path / "home", stop=close_soon, progress=False
            )
    assert runs(tmp_path / "home")["status"].tolist() == ["failed", "failed"]
    with pytest.raises(BackendUnavailable, match=r"tls://127.0.0.1:1.* needs certificates"):
        sweep(notebook, {"n": [1]}, cluster="tls://127.0.0.1:1", home=tmp_path / "home")


@pytest.mark.chaos
def test_a_sweep_whose_scheduler_is_killed_is_resumed_on_the_next_one(notebook, tmp_path) -> None:
    """Processes of their own, at the same address before and after; what was done is taken."""
    from tests.widgets.conftest import free_port

    home, processes = tmp_path / "home", []
    address = f"127.0.0.1:{free_port()}"

    def start_cluster() -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        own = ["--host", "127.0.0.1", "--no-dashboard"]
        ends = ["scheduler", "--port", address.rpartition(":")[2]], ["worker", f"tcp://{address}"]
        for name, *rest in ends:
            command = [sys.executable, "-m", f"distributed.cli.dask_{name}", *rest, *own]
            processes.append(subprocess.Popen(command, **quiet))

    def end_cluster() -> None:
        for process in processes:
            process.kill()
            process.wait()

    def restart_once() -> bool:
        if len(processes) == 2 and len(done_in(home)) == 1:
            end_cluster()
            start_cluster()
        return False

    where = ClusterSpec(kind="address", address=f"tcp://{address}", num_workers=1)
    settings = {"grid": {"n": [1, 2]}, "parameters": {"wait": 3}, "cluster": where, "home": home}
    start_cluster()
    try:
        with pytest.raises(BackendUnavailable, match="scheduler of the cluster went away; --resume runs"):
            sweep(notebook, **settings, stop=restart_once, progress=False)
        assert len(processes) == 4
        run = sweep(notebook, **settings, resume=True, progress=False)
        assert (run.status, run.manifest["results"]["kept"]) == ("done", 1)
    finally:
        end_cluster()


def test_an_address_without_a_scheduler(notebook, tmp_path) -> None:
    nowhere = ClusterSpec(kind="address", address="tcp://127.0.0.1:1", timeout=0.5)
    with pytest.raises(BackendUnavailable, match=r"tcp://127.0.0.1:1"):
        sweep(notebook, {"n": [1]}, cluster=nowhere, home=tmp_path)
    assert runs(tmp_path)["status"].tolist() == ["failed"]
    assert os.listdir(tmp_path)
