"""Runs are run again with the same numbers, and a finished result is taken where nothing has changed."""

from __future__ import annotations

import importlib.util
import os
import zipfile
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner

from qtx_lab.cli import main
from qtx_lab.errors import ArgumentError, BackendUnavailable, QtxError
from qtx_lab.experiments import provenance, replays
from qtx_lab.experiments.notebook_code import code_hash, local_modules, without_outputs
from qtx_lab.experiments.notebooks import declared_parameters, notebook_spec, result_facts, run_notebook
from qtx_lab.experiments.provenance import input_hashes
from qtx_lab.experiments.replays import environment_differences, replay
from qtx_lab.experiments.run_comparison import compare_runs
from qtx_lab.experiments.runs import Run, runs
from qtx_lab.experiments.training_run import train_run
from qtx_lab.specs import NotebookSpec, SamplerSpec, SearchSpec, TrainSpec

# It writes what `Run.update` would write: a kernel that imports little starts in under a second.
MEASURE = """
import json, os, pathlib, time
import beside
path = pathlib.Path(run_dir, "manifest.json")
manifest = json.loads(path.read_text())
x = seed + 0.5 + beside.shift + float(os.environ.get("PLANTED", 0))
manifest["results"] = {"x": x, "speed": time.time()}
manifest["measures"] = {"speed": {"timing": True}}
path.with_suffix(".new").write_text(json.dumps(manifest))
os.replace(path.with_suffix(".new"), path)
"""


def write(path: Path, *cells: str, note: str = "A note.") -> Path:
    new = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(note)])
    new.cells += [nbformat.v4.new_code_cell(cell) for cell in ("seed = 0\nrun_dir = None", *cells)]
    new.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(new, path)
    return path


@pytest.mark.notebooks
def test_a_replay_compares_every_metric_but_those_that_tell_time(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("beside.py").write_text("shift = 0")
    path, home = write(tmp_path / "a.ipynb", MEASURE), tmp_path / "home"
    run = run_notebook(path, {"seed": 3}, home=home, progress=False, threads=1)
    write(path, MEASURE, note="Another note.")
    assert run_notebook(path, {"seed": 3}, home=home, progress=False).path == run.path
    assert f"Taken from {run.path.name}" in capsys.readouterr().err
    comparison = replay(run.path.name, home=home, progress=False)
    assert comparison.reproduced
    assert comparison.same_setup
    assert (comparison.metrics, comparison.compared, comparison.not_compared) == ((), 1, ("speed",))
    again = Run(home / comparison.b)
    assert again.manifest["replay_of"] == run.path.name
    assert again.manifest["threads"] == 1
    assert len(runs(home)) == 2
    monkeypatch.setenv("PLANTED", "1")
    said = CliRunner().invoke(main, ["replay", run.path.name, "--home", str(home)])
    assert said.exit_code == 1
    assert "results.x: 3.5 → 4.5, differs" in said.output
    assert said.stdout.splitlines()[-1] == "not reproduced"


def test_a_result_is_of_its_spec_code_and_inputs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("beside.py").write_text("from part.inner import shift")
    Path("part").mkdir()
    Path("part/__init__.py").write_text("")
    Path("part/inner.py").write_text("from . import other\nshift = 0")
    Path("part/other.py").write_text("")
    path = write(tmp_path / "a.ipynb", MEASURE)
    assert set(local_modules(path, tmp_path)) == {
        "beside.py", "part/__init__.py", "part/inner.py", "part/other.py",
    }  # fmt: skip

    def key(**given: object) -> str:
        spec = notebook_spec(path, declared_parameters(path), given)
        return str(result_facts(path, spec)["code"]["result"])

    first = key(seed=1)
    assert first == key(seed=1.0) != key(seed=2)
    write(path, MEASURE, note="Another note.")
    assert key(seed=1) == first
    Path("part/other.py").write_text("# a change")
    changed = key(seed=1)
    assert changed != first
    write(path, MEASURE, "1 + 1")
    assert key(seed=1) != changed
    versions = {**provenance.distributions(), "numpy": "0.9"}
    before = key(seed=1)
    monkeypatch.setattr(provenance, "distributions", lambda: versions)
    assert key(seed=1) != before
    Path("model/shards").mkdir(parents=True)
    Path("model/shards/weights").write_text("1")
    folder = input_hashes({"model": ["model"]})
    assert folder == input_hashes({"model": ["model"]}) != {}
    Path("model/shards/weights").write_text("10")
    assert folder != input_hashes({"model": ["model"]})


def test_a_training_is_replayed(tmp_path) -> None:
    """In another process, or after another checkpoint, it would be the same: it is a function of its spec."""
    spec = TrainSpec(model="small", num_tokens=32, steps=4, batch_size=2, num_samples=4, checkpoint_every=2)
    run = train_run(spec, home=tmp_path, progress=False)
    comparison = replay(run, progress=False)
    assert comparison.reproduced
    assert (comparison.metrics, comparison.spec, comparison.code) == ((), (), ())
    assert {"loss", "gradient_norm", "sampling_variance"} <= set(run.metrics().columns)
    assert comparison.compared > 4 * 10
    assert set(comparison.not_compared) == {"tokens_per_second", "checkpoint_seconds", "memory_bytes"}
    again = Run(tmp_path / comparison.b)
    assert again.manifest["replay_of"] == run.path.name
    assert (again.path / "model.safetensors").read_bytes() == (run.path / "model.safetensors").read_bytes()


def test_an_executed_notebook_is_the_one_that_was_executed(tmp_path) -> None:
    path = write(tmp_path / "a.ipynb", "1 + 1")
    executed = nbformat.read(path, as_version=4)
    executed.cells.insert(
        2, nbformat.v4.new_code_cell("seed = 3", metadata={"tags": ["injected-parameters"]})
    )
    executed.cells[-1].outputs = [nbformat.v4.new_output("stream", text="2")]
    executed.cells[-1].metadata["papermill"] = {"duration": 3}
    nbformat.write(executed, tmp_path / "b.ipynb")
    assert code_hash(tmp_path / "b.ipynb") == code_hash(path)
    (tmp_path / "c.ipynb").write_bytes(without_outputs(tmp_path / "b.ipynb"))
    cells = [[c.source for c in nbformat.read(tmp_path / f"{name}.ipynb", 4).cells] for name in "ac"]
    assert cells[0] == cells[1]
    assert "duration" not in (tmp_path / "c.ipynb").read_text()


def test_what_cannot_be_replayed_is_refused_and_what_differs_is_named(tmp_path, monkeypatch) -> None:
    with Run.create(SamplerSpec(), "hand", tmp_path) as run:
        pass
    with pytest.raises(ArgumentError, match="holds no notebook"):
        replay(run)
    assert environment_differences(run) == ()
    open_run = Run.create(NotebookSpec(notebook="n"), "open", tmp_path)
    with pytest.raises(ArgumentError, match=f"{open_run.path.name} is still running"):
        replay(open_run)
    said = CliRunner().invoke(main, ["replay", str(open_run.path)])
    assert (said.exit_code, len(said.stderr.splitlines())) == (2, 1)
    file = run.path / "requirements.txt"
    file.write_text(file.read_text().replace("numpy==", "numpy==0.") + "gone==1.0\n")
    assert [difference.name for difference in environment_differences(run)] == ["gone", "numpy"]
    commands: list[list[str]] = []

    def call(command: list[str], problem: str) -> str:
        commands.append(command)
        if "install" in command:
            raise BackendUnavailable(problem)
        return str(tmp_path)

    monkeypatch.setattr(replays, "_call", call)
    with pytest.raises(BackendUnavailable, match=r"pip cannot install gone==1.0, numpy==0\."):
        replay(run, install=True)
    assert "--no-deps" in commands[-1]


@pytest.mark.notebooks
def test_a_run_is_replayed_in_an_environment_with_the_versions_of_then(tmp_path, monkeypatch) -> None:
    """A distribution that was there then and is not there now is installed, here from a folder of wheels."""
    monkeypatch.chdir(tmp_path)
    Path("beside.py").write_text("from gone import shift")
    Path("then").mkdir()
    facts = {"METADATA": "Metadata-Version: 2.1\nName: gone\nVersion: 1.0\n", "RECORD": ""}
    facts["WHEEL"] = "Wheel-Version: 1.0\nGenerator: a-test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile("then/gone-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("gone.py", "shift = 0.125")
        for name, text in facts.items():
            wheel.writestr(f"gone-1.0.dist-info/{name}", text)
    here = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'then' / wheel.filename[5:]}{os.pathsep}{here}")
    run = run_notebook(write(tmp_path / "a.ipynb", MEASURE), home=tmp_path / "home", progress=False)
    monkeypatch.setenv("PYTHONPATH", here)
    with (run.path / "requirements.txt").open("a") as file:
        file.write("gone==1.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "then"))
    comparison = replay(run, install=True, progress=False)
    assert comparison.reproduced
    assert comparison.environment == ()
    assert Run(tmp_path / "home" / comparison.b).manifest["results"]["x"] == 0.625
    assert importlib.util.find_spec("gone") is None  # here it would fail


def test_a_search_is_replayed_as_a_search(tmp_path, monkeypatch) -> None:
    given = {"notebook": "a", "sha256": "0" * 64, "repeats": 2, "seed": 3, "objective": "x", "trials": 5}
    spec = SearchSpec(**given, space={"n": "1..8", "m": [1, 2]}, parameters={"k": 1}, maximize=True)
    with Run.create(spec, "search-a", tmp_path) as run:
        write(run.path / "a.ipynb", MEASURE)
    asked: dict[str, object] = {}

    def search(path: Path, space: object, objective: str, **options: object) -> Run:
        asked.update(options, space=space, objective=objective, cells=code_hash(path))
        with Run.create(spec, "search-a", tmp_path) as again:
            return again

    monkeypatch.setattr(replays, "search", search)
    replay(run)
    expected = {name: given[name] for name in ("repeats", "seed", "objective", "trials")}
    expected |= {"maximize": True, "space": {"n": "1..8", "m": [1, 2]}, "parameters": {"k": 1}}
    assert expected.items() <= asked.items()
    assert asked["cells"] == code_hash(run.path / "a.ipynb")


@pytest.mark.parametrize(
    "content", ["{broken", "[]", "{}", '{"cells": 3}', '{"cells": ["a"]}', '{"cells": [], "metadata": 5}']
)
def test_a_notebook_that_is_damaged_is_refused_by_its_path(content, tmp_path):
    run = Run.create(NotebookSpec(notebook="damaged", parameters={}), "damaged", tmp_path)
    (run.path / "damaged.ipynb").write_text(content)
    (run.path / "requirements.txt").write_bytes(b"\xff\xfe")
    run.finish("done")
    with pytest.raises(QtxError, match=r"damaged\.ipynb.* cannot be read as a notebook"):
        replay(run, progress=False)
    (run.path / "damaged.ipynb").unlink()
    assert compare_runs(run, run).reproduced  # by the versions in the manifest
