"""Notebooks as runs: errors before any work, failures that are recorded, and the kernel that is used."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import psutil
import pytest

from qtx_lab.errors import ArgumentError, RunFailed, SpecError, TextError
from qtx_lab.experiments.notebook_execution import ExecutionLimits
from qtx_lab.experiments.notebooks import (
    declared_parameters,
    notebook_kind,
    notebook_path,
    notebook_spec,
    notebooks_folder,
    run_notebook,
)
from qtx_lab.experiments.runs import runs
from qtx_lab.specs import ControlSpec, ExperimentSpec, NotebookSpec, SamplerSpec, Spec

pytestmark = pytest.mark.notebooks


def notebook(path: Path, parameters: str, *cells: str, spec: str | None = None) -> Path:
    new = nbformat.v4.new_notebook()
    if spec is not None:
        new.metadata["qtx_lab"] = {"spec": spec}
    new.cells = [nbformat.v4.new_code_cell(cell) for cell in (parameters, *cells)]
    new.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(new, path)
    return path


def test_a_notebook_runs_in_a_folder_by_this_interpreter(tmp_path, monkeypatch) -> None:
    impostor = tmp_path / "jupyter" / "kernels" / "python3"
    impostor.mkdir(parents=True)
    (impostor / "kernel.json").write_text(
        json.dumps({"argv": ["false"], "language": "python", "display_name": "no"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    monkeypatch.chdir(tmp_path)
    path = notebook(
        tmp_path / "a {brace}.ipynb",
        "n = 1\nrun_dir = None\nwords = ()",
        "import os, sys\nimport ipywidgets\nipywidgets.IntSlider()",
        "from qtx_lab.experiments.runs import Run\n"
        "run = Run.open(run_dir)\n"
        "run.log(n=n)\n"
        "run.update(results={'python': sys.executable, 'cwd': os.getcwd(), 'words': words,\n"
        "                    'quiet': os.environ['DO_NOT_TRACK'], 'summary': ['n is 3.']})",
    )
    run = run_notebook(path, {"n": 3, "words": ["a", "b"]}, home="home", progress=False)
    manifest = run.manifest
    assert run.status == "done"
    assert manifest["results"] == {
        "python": sys.executable,
        "cwd": str(tmp_path),
        "words": ["a", "b"],
        "quiet": "1",
        "summary": ["n is 3."],
    }
    assert run.metrics()["n"].tolist() == [3]
    assert "-p n 3" in manifest["command"]
    executed = nbformat.read(run.path / path.name, as_version=4)
    assert "widgets" not in executed.metadata
    assert executed.metadata.papermill.input_path == path.name
    assert "n is 3." in (run.path / "report.html").read_text(encoding="utf-8")


def test_invalid_arguments_are_refused_before_any_work(tmp_path) -> None:
    path = notebook(tmp_path / "a.ipynb", "num_samples = 8\nrun_dir = None")
    home = tmp_path / "home"
    with pytest.raises(SpecError, match=r"no parameter 'num_sample'\. Did you mean 'num_samples'"):
        run_notebook(path, {"num_sample": 9}, home=home)
    with pytest.raises(SpecError, match=r"num_samples='x' .* declares a number, num_samples = 8"):
        run_notebook(path, {"num_samples": "x"}, home=home)
    with pytest.raises(SpecError, match="no parameter 'run_dir'"):
        run_notebook(path, {"run_dir": "elsewhere"}, home=home)
    with pytest.raises(ArgumentError, match="neither a file nor a shipped notebook"):
        run_notebook(tmp_path / "none.ipynb", home=home)
    with pytest.raises(ArgumentError, match="neither a file nor a shipped notebook"):
        run_notebook("a" * 5000, home=home)
    for content in ("not JSON", "{}", "[]", json.dumps({"nbformat": 4, "nbformat_minor": 5})):
        (tmp_path / "bad.ipynb").write_text(content)
        with pytest.raises(ArgumentError, match="cannot be read as a notebook"):
            run_notebook(tmp_path / "bad.ipynb", home=home)
    other = nbformat.read(path, as_version=4)
    other.metadata["kernelspec"] = {"name": "ir", "language": "R", "display_name": "R"}
    nbformat.write(other, tmp_path / "r.ipynb")
    with pytest.raises(ArgumentError, match="is in R; only Python"):
        run_notebook(tmp_path / "r.ipynb", home=home)
    assert not home.exists()


def parameters_cell(spec: Spec) -> str:
    return "\n".join(f"{name} = {value!r}" for name, value in spec.to_parameters().items())


def test_a_notebook_whose_metadata_names_the_experiment_is_checked_as_one(tmp_path) -> None:
    cell = parameters_cell(ExperimentSpec()) + "\nrun_dir = None"
    path = notebook(tmp_path / "a.ipynb", cell, "1 / 0", spec="experiment")
    home = tmp_path / "home"
    with pytest.raises(SpecError, match="layer=77"):
        run_notebook(path, {"layer": 77}, home=home)
    (tmp_path / "latin.txt").write_bytes(b"gr\xfc\xdfe" * 1000)
    for text in ("latin.txt", "missing.txt"):
        with pytest.raises(TextError, match=text):
            run_notebook(path, ExperimentSpec(text=str(tmp_path / text)), home=home)
    assert not home.exists()


def test_one_more_parameter_does_not_make_a_notebook_another_kind(tmp_path) -> None:
    cell = parameters_cell(ExperimentSpec(seed=4)) + "\nrun_dir = None"
    for name, more in (("a", ""), ("b", "\ncolour = 'red'")):
        path = notebook(tmp_path / f"{name}.ipynb", cell + more, spec="experiment")
        spec = notebook_spec(path, declared_parameters(path), {"layer": 2})
        assert spec == ExperimentSpec(seed=4, layer=2)
    with pytest.raises(SpecError, match="ExperimentSpec has no field 'colour'"):
        notebook_spec(path, declared_parameters(path), {"colour": "blue"})
    path = notebook(tmp_path / "c.ipynb", parameters_cell(SamplerSpec()), spec="sampler")
    assert notebook_spec(path, declared_parameters(path), {"num_samples": 9}) == SamplerSpec(num_samples=9)
    with pytest.raises(
        SpecError, match="run by a SamplerSpec, as its metadata says; given was a ControlSpec"
    ):
        run_notebook(path, ControlSpec(), home=tmp_path / "home")
    path = notebook(tmp_path / "d.ipynb", cell)
    assert isinstance(notebook_spec(path, declared_parameters(path), {}), NotebookSpec)


@pytest.mark.parametrize(("kind", "hint"), [("samplr", r"\. Did you mean 'sampler'\? "), (5, "")])
def test_an_unknown_kind_of_spec_is_refused_by_name(kind, hint, tmp_path) -> None:
    path = notebook(tmp_path / "a.ipynb", "seed = 0", spec=kind)
    with pytest.raises(SpecError, match=rf"a.ipynb names the spec {kind!r} in its metadata.*{hint}.*Allowed"):
        run_notebook(path, home=tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_every_shipped_notebook_names_its_kind() -> None:
    kinds = {path.stem: notebook_kind(path) for path in notebooks_folder().glob("*.ipynb")}
    assert kinds.pop("00_quickstart") is ExperimentSpec
    assert set(kinds.values()) == {NotebookSpec}
    for path in notebooks_folder().glob("*.ipynb"):
        assert "spec" in nbformat.read(path, as_version=4).metadata["qtx_lab"], path.name


def test_a_failing_cell_is_named_and_recorded(tmp_path) -> None:
    path = notebook(tmp_path / "a.ipynb", "", "x = 1", "# a comment\nassert x == 2, 'x is off'")
    with pytest.raises(
        RunFailed, match=r"a.ipynb stopped in cell \[.\] \(# a comment\) with AssertionError: x is off"
    ):
        run_notebook(path, home=tmp_path / "home", progress=False)
    table = runs(tmp_path / "home")
    assert table["status"].tolist() == ["failed"]
    assert "x is off" in table["error"][0]
    folder = Path(table["path"][0])
    assert "x is off" in (folder / "a.ipynb").read_text(encoding="utf-8")
    assert "This run failed" in (folder / "report.html").read_text(encoding="utf-8")


def test_an_error_is_told_by_its_type_and_first_line_and_expected_ones_are_not_told(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = notebook(
        tmp_path / "a.ipynb",
        "",
        "1 / 0",
        "print('x' * 5000)\nprint('y' * 50)\nraise ValueError('the reason\\nand\\ndetails')",
        "open('went on', 'w').close()",
        "import sys\nsys.exit(3)",
    )
    content = nbformat.read(path, as_version=4)
    content.cells[1].metadata["tags"] = ["raises-exception"]
    nbformat.write(content, path)
    limits = ExecutionLimits(output_bytes=1000, keep_going=True)
    with pytest.raises(
        RunFailed,
        match=r"cell \[\d\] \(print.* with ValueError: the reason, and 1 more cell\(s\) failed",
    ):
        run_notebook(path, home=tmp_path / "home", progress=False, limits=limits)
    executed = next((tmp_path / "home").glob("*/a.ipynb")).read_text(encoding="utf-8")
    assert "keeps 1,000 bytes of a cell's output" in executed
    assert "xxxxx" not in executed.replace("'x' * 5000", "")
    assert "ValueError" in executed
    assert Path("went on").exists()


@pytest.mark.parametrize(
    ("cell", "error"),
    [
        ("raise ExceptionGroup('two', [ValueError(1), KeyError(2)])", r"ExceptionGroup: two \(2 sub-"),
        ("get_ipython().showtraceback = lambda *args, **options: None\n1 / 0", "ZeroDivisionError: division"),
    ],
)
def test_an_error_that_ipython_does_not_show_is_told(cell, error, tmp_path) -> None:
    path = notebook(tmp_path / "a.ipynb", "", cell)
    with pytest.raises(RunFailed, match=error):
        run_notebook(path, home=tmp_path / "home", progress=False)


def test_sys_exit_is_told_and_ends_a_notebook_well(tmp_path) -> None:
    path = notebook(tmp_path / "a.ipynb", "code = 0", "import sys\nsys.exit(code)", "1 / 0")
    run = run_notebook(path, home=tmp_path / "home", progress=False)
    assert run.status == "done"
    assert "called sys.exit(): the cells after it did not run" in run.manifest["results"]["summary"][0]
    with pytest.raises(RunFailed, match=r"cell \[\d\] \(import sys\) with sys.exit\(2\)"):
        run_notebook(path, {"code": 2}, home=tmp_path / "home", progress=False)


@pytest.mark.parametrize("call", ["quit()", "exit()", "get_ipython().ask_exit()"])
def test_quit_is_told_and_ends_a_notebook_as_sys_exit_does(call, tmp_path) -> None:
    """Jupyter's kernel goes on for a tenth of a second: the cells after it must not begin."""
    path = notebook(tmp_path / "a.ipynb", "", call, f"open({str(tmp_path / 'began')!r}, 'w')")
    content = nbformat.read(path, as_version=4)
    content.cells[1].metadata["tags"] = ["raises-exception"]
    nbformat.write(content, path)
    limits = ExecutionLimits(keep_going=True)
    run = run_notebook(path, home=tmp_path / "home", progress=False, limits=limits)
    assert run.status == "done"
    assert "the cells after it did not run" in run.manifest["results"]["summary"][0]
    assert not (tmp_path / "began").exists()


@pytest.mark.parametrize("limits", [{"cell_seconds": 8}, {"seconds": 4}])
def test_a_notebook_that_takes_too_long_is_stopped(limits, tmp_path) -> None:
    path = notebook(tmp_path / "a.ipynb", "", "import time\ntime.sleep(600)")
    (what, seconds), *_ = limits.items()
    where = r" in cell \[.*\] \(import time\)" if what == "cell_seconds" else ""
    with pytest.raises(RunFailed, match=rf"a.ipynb stopped{where}: it took longer than the {seconds} s"):
        run_notebook(path, home=tmp_path / "home", progress=False, limits=ExecutionLimits(**limits))
    assert runs(tmp_path / "home")["status"].tolist() == ["failed"]
    for wrong in (0, math.nan, math.inf):
        with pytest.raises(ArgumentError, match=f"{what}={wrong} is not allowed"):
            ExecutionLimits(**{what: wrong})


@pytest.mark.chaos
def test_a_kernel_that_dies_fails_the_run(tmp_path) -> None:
    path = notebook(tmp_path / "a.ipynb", "", "import os\nos._exit(9)")
    with pytest.raises(RunFailed, match="kernel died"):
        run_notebook(path, home=tmp_path / "home", progress=False)
    assert runs(tmp_path / "home")["status"].tolist() == ["failed"]


@pytest.mark.chaos
def test_a_kernel_that_dies_at_its_start_is_started_once_more(tmp_path, monkeypatch) -> None:
    """As one does whose port another process takes."""
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\nmkdir '{tmp_path}/died' && exit 1\nexec '{sys.executable}' \"$@\"\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    path = notebook(tmp_path / "a.ipynb", "", "print(1)")
    assert run_notebook(path, home=tmp_path / "home", progress=False).status == "done"
    assert (tmp_path / "died").exists()


@pytest.mark.chaos
def test_a_function_stops_a_notebook(tmp_path) -> None:
    path = notebook(
        tmp_path / "a.ipynb",
        "run_dir = None",
        f"open({str(tmp_path / 'ready')!r}, 'w').close()\nimport time\ntime.sleep(600)",
    )
    with pytest.raises(KeyboardInterrupt):
        run_notebook(path, home=tmp_path / "home", progress=False, stop=(tmp_path / "ready").exists)
    assert runs(tmp_path / "home")["status"].tolist() == ["interrupted"]


def kernel_at_work(process: subprocess.Popen[str], home: Path) -> psutil.Process:
    """The kernel of a command that runs a notebook, once a cell has ended."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        assert process.poll() is None
        for path in home.glob("[!.]*/*.ipynb"):
            cells = nbformat.read(path, as_version=4).cells
            if any(cell.metadata.get("papermill", {}).get("status") == "completed" for cell in cells):
                children = psutil.Process(process.pid).children(recursive=True)
                return next(child for child in children if "ipykernel_launcher" in child.cmdline())
        time.sleep(0.05)
    raise AssertionError("No cell has ended.")


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("command", "number"), [("run", signal.SIGINT), ("run", signal.SIGTERM), ("demo", signal.SIGINT)]
)
def test_ctrl_c_and_other_ends_interrupt_a_notebook(command: str, number: int, tmp_path: Path) -> None:
    name = {"run": "a.ipynb", "demo": "00_quickstart.ipynb"}[command]
    arguments = [notebook(tmp_path / name, "", "import time\ntime.sleep(60)")] if command == "run" else []
    words = [sys.executable, "-m", "qtx_lab.cli", command, *arguments, "--home", tmp_path / "home"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        kernel = kernel_at_work(process, tmp_path / "home")
        process.send_signal(number)
        output, errors = process.communicate(timeout=240)
    assert process.returncode == 128 + number
    assert output == ""
    assert "Traceback" not in errors
    assert errors.rstrip().splitlines()[-1].startswith("interrupted")
    table = runs(tmp_path / "home")
    assert table["status"].tolist() == ["interrupted"]
    assert {name, "report.html"} <= {file.name for file in Path(table["path"][0]).iterdir()}
    psutil.wait_procs([kernel], timeout=30)
    with suppress(psutil.NoSuchProcess):
        assert kernel.status() == psutil.STATUS_ZOMBIE  # it has ended, and nobody asked for its exit code yet


def test_shipped_notebooks_are_found_by_name() -> None:
    path = notebook_path("00_quickstart")
    assert path == notebook_path("00_quickstart.ipynb")
    with pytest.raises(ArgumentError, match="Did you mean '00_quickstart'"):
        notebook_path("00_quikstart")


def test_the_quickstart_declares_the_experiment_with_its_defaults() -> None:
    cells = nbformat.read(notebook_path("00_quickstart"), as_version=4).cells
    declared: dict[str, object] = {}
    exec(next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])), declared)
    del declared["__builtins__"]
    assert declared == {**ExperimentSpec().to_parameters(), "run_dir": None}


def test_the_same_spec_and_seed_give_the_same_metrics_bit_for_bit(tmp_path, monkeypatch) -> None:
    path = notebook(
        tmp_path / "a.ipynb",
        "seed = 0\nrun_dir = None",
        "import torch\nimport qtx_lab as qtx\n"
        "g = torch.Generator().manual_seed(seed)\n"
        "q, k, v = torch.randn(3, 4, 64, 32, generator=g)\n"
        "estimate = qtx.sampled_attention(q, k, v, num_samples=16, generator=g)\n"
        "run = qtx.Run.open(run_dir)\n"
        "run.log_many({'row': i, 'x': x} for i, x in enumerate(estimate.output.flatten().tolist()))",
    )
    metrics = {}
    for name, seed, threads in (("one", 1, "1"), ("two", 1, "2"), ("other", 2, "1")):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        run = run_notebook(path, {"seed": seed}, home=tmp_path / "home", progress=False, fresh=True)
        metrics[name] = (run.path / "metrics.parquet").read_bytes()
    assert metrics["one"] == metrics["two"] != metrics["other"]


REDUCED = json.loads((notebooks_folder() / "reduced.json").read_text(encoding="utf-8"))
"""Parameters with which a notebook checks its claims in seconds; `make demo` runs the quickstart."""


@pytest.mark.parametrize("name", sorted(REDUCED))
def test_shipped_notebooks_run(name: str, tmp_path: Path) -> None:
    run = run_notebook(name, REDUCED[name], home=tmp_path, progress=False)
    assert run.status == "done"
    assert run.figures()
    assert name not in ("02_circuits", "04_mitigation") or run.manifest["devices"]["fake_fez"][:2] == "20"
    assert (run.path / "report.html").exists() or run.manifest["results"]
