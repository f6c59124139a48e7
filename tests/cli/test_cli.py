"""The command line: errors in one line, exit codes, and a help that imports nothing heavy."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

import qtx_lab
from qtx_lab.cli import main
from qtx_lab.cli.group import EndingSignals
from qtx_lab.errors import RunFailed
from qtx_lab.experiments.notebook_execution import ExecutionLimits
from qtx_lab.experiments.runs import Run
from qtx_lab.specs import ExperimentSpec, value_of


def call(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys\nfrom qtx_lab.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'pandas', 'pydantic', 'papermill'} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "[]"
    assert all(
        command in process.stdout for command in ("demo", "lab", "run ", "runs", "report", "train", "bench")
    )
    assert qtx_lab.__version__ in call("--version").output


def test_runs_are_listed_and_skipped_folders_named(tmp_path) -> None:
    assert "No runs" in call("runs", "--home", tmp_path).output
    with Run.create(ExperimentSpec(seed=5), "trial", tmp_path) as run:
        pass
    (tmp_path / "mine").mkdir()
    listed = call("runs", "--home", tmp_path)
    assert listed.exit_code == 0
    assert listed.stdout.splitlines()[0].split() == ["run", "name", "status", "started", "seconds", "path"]
    assert run.path.name in listed.stdout
    assert "skipped mine: not a run" in listed.stderr
    content = json.loads(call("runs", "--home", tmp_path, "--json").stdout)
    assert content["runs"][0]["seed"] == 5
    assert content["skipped"][0]["folder"] == "mine"


def test_report_by_part_of_the_name(tmp_path) -> None:
    with Run.create(ExperimentSpec(), "trial", tmp_path) as run:
        pass
    result = call("report", run.path.name[-6:], "--home", tmp_path)
    assert result.output.strip() == str(run.path / "report.html")
    assert (run.path / "report.html").exists()


@pytest.mark.parametrize("name", ["ServerApp.root_dir", "notebook-dir"])
def test_lab_opens_another_folder_of_notebooks(monkeypatch, tmp_path, name) -> None:
    from jupyter_server.serverapp import ServerApp

    def run(command, **options):
        app = ServerApp()
        app.parse_command_line(command[command.index("jupyterlab") + 1 :])  # ends at an option given twice
        folders.append(app.root_dir)
        return subprocess.CompletedProcess(command, 0)

    folders: list[str] = []
    monkeypatch.setattr("qtx_lab.cli.browser.subprocess.run", run)
    assert call("lab", f"--{name}={tmp_path}").exit_code == 0
    assert folders == [str(tmp_path)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "one on each core at a time"),
        (["--workers", 1], "one at a time"),
        (["--workers", 3], "3 at a time"),
        (["--cluster", "127.0.0.1:1"], "one on each worker of the cluster at a time"),
    ],
)
def test_a_sweep_says_how_many_run_at_a_time(tmp_path, arguments, says) -> None:
    result = call("sweep", "no such notebook", "-g", "x=1", *arguments, "--home", tmp_path)
    assert result.exit_code == 2
    assert f", repeats: 1, {says}. After" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo", "--layer", "9"], "layer=9"),
        (["demo", "--samplers", "monte-carlo,sytematic"], "Did you mean 'systematic'"),
        (["demo", "--sample-counts", "8,0"], "sample_counts[1]=0"),
        (["demo", "--text", "no such file"], "no such file"),
        (["run", "no such notebook"], "no such notebook"),
        (["report", "nothing"], "none of the 0 runs"),
        (["run", "00_quickstart", "--max-output", "nan"], "--max-output nan is not allowed"),
        (["run", "00_quickstart", "--max-output", "inf"], "--max-output inf is not allowed"),
        (["run", "00_quickstart", "--timeout", "inf"], "seconds=inf is not allowed"),
    ],
)
def test_an_error_is_one_line_and_exit_2(tmp_path, arguments, says) -> None:
    result = call(*arguments, "--home", tmp_path / "home")
    assert result.exit_code == 2
    *announced, error = result.stderr.splitlines()
    assert len(announced) == (arguments[0] == "demo")
    assert error.startswith("error: ")
    assert says in error
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("name", ["empty", "binary"])
def test_demo_refuses_text_before_any_run(tmp_path, name) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    result = call("demo", "--text", tmp_path / name, "--home", tmp_path / "home")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 2)  # what it does, and the error
    assert not (tmp_path / "home").exists()


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list:
    """Replace `run_notebook`; the list gets the arguments of each call."""
    calls: list = []

    def run_notebook(notebook, parameters, **options):
        calls.append((notebook, parameters, options))
        if options["name"] == "fails":
            error = RunFailed("a.ipynb stopped in\ncell [1]")
            error.add_note("kept in somewhere")
            raise error
        with Run.create(ExperimentSpec(), "trial", tmp_path) as run:
            run.update(results={"summary": ["One.", "Two."]})
        return run

    monkeypatch.setattr("qtx_lab.experiments.notebooks.run_notebook", run_notebook)
    return calls


def test_demo_prints_the_report_last(calls, tmp_path) -> None:
    result = call("demo", "--samplers", "stratified, monte-carlo", "--sample-counts", "16,8", "--seed", 4)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[:2] == ["One.", "Two."]
    assert result.stdout.splitlines()[-1].endswith("report.html")
    spec = ExperimentSpec(samplers=("stratified", "monte-carlo"), sample_counts=(8, 16), seed=4)
    assert calls[0][:2] == ("00_quickstart", spec)


def test_run_takes_words_that_the_notebook_explains(calls) -> None:
    result = call(
        "run", "x", "-p", "n", "3", "-p", "words", "[a, b]", "-p", "rate", "0.5", "-p", "name", "it"
    )
    assert result.exit_code == 0
    meant = {name: value_of(word, {}) for name, word in calls[0][1].items()}
    assert meant == {"n": 3, "words": ["a", "b"], "rate": 0.5, "name": "it"}
    assert call("run", "x", "-p", "n", "1", "-p", "n", "2").exit_code == 2


def test_a_failed_run_is_exit_1(calls) -> None:
    result = call("run", "x", "--name", "fails")
    assert result.exit_code == 1
    assert result.stderr == "error: a.ipynb stopped in cell [1] (kept in somewhere)\n"


def test_ending_signals_are_ctrl_c_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with pytest.raises(KeyboardInterrupt), EndingSignals() as signals:  # noqa: PT012
            try:
                signal.raise_signal(signal.SIGHUP)
            finally:
                assert signals.received == signal.SIGHUP
                signal.raise_signal(signal.SIGTERM)  # while runs are being marked: it changes nothing
        assert signal.getsignal(signal.SIGTERM) == before
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        with EndingSignals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, outside)


@pytest.mark.parametrize(
    ("arguments", "module", "says"),
    [
        (["demo"], "experiments.notebooks", "about a minute"),
        (["sweep", "tiny", "-g", "n=1,2"], "experiments.sweeps", "tiny for n=1,2"),
        (
            ["train", "--preset", "reference", "--out", "x"],
            "training.reference_training",
            "hours on two cores",
        ),
        (["bench", "samplers", "--quick"], "bench.base", "up to three minutes"),
    ],
)
def test_long_commands_say_first_what_they_do(monkeypatch, arguments, module, says) -> None:
    monkeypatch.setitem(sys.modules, f"qtx_lab.{module}", None)  # to import it fails
    result = CliRunner().invoke(main, arguments)
    assert isinstance(result.exception, ImportError)
    assert says in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            KeyboardInterrupt("Stopped after step 3; checkpoint: c"),
            "interrupted. Stopped after step 3; checkpoint: c\n",
        ),
        (KeyboardInterrupt(), "interrupted. The tables above are complete; nothing else is kept.\n"),
    ],
)
def test_ctrl_c_leaves_one_sentence(monkeypatch, error, says) -> None:
    def run_bench(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("qtx_lab.bench.base.run_bench", run_bench)
    result = CliRunner().invoke(main, ["bench", "samplers"])
    assert result.exit_code == 130
    assert result.stderr.endswith(says)
    assert result.stderr.count("\n") == 2


def test_runs_are_filtered_and_exported(tmp_path) -> None:
    for seed in (1, 2, 3):
        with Run.create(ExperimentSpec(seed=seed), "trial", tmp_path) as run:
            run.update(results={"error": seed / 10})
    listed = call("runs", "--home", tmp_path, "--where", "results.error > 0.15")
    assert len(listed.stdout.splitlines()) == 3
    exported = call("runs", "--home", tmp_path, "--where", "seed = 2", "--export", "csv").stdout.splitlines()
    assert len(exported) == 2
    assert "results.error" in exported[0]
    parquet = call("runs", "--home", tmp_path, "--export", "parquet").stdout_bytes
    assert parquet[:4] == parquet[-4:] == b"PAR1"
    assert "No run fits" in call("runs", "--home", tmp_path, "--where", "seed = 7").stdout
    for arguments in (["--where", "sed = 2"], ["--json", "--export", "csv"], ["--where", "error = 1"]):
        refused = call("runs", "--home", tmp_path, *arguments)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)


def test_schemas_are_printed() -> None:
    schema = json.loads(call("spec", "cluster").stdout)
    assert schema["properties"]["timeout"]["unit"] == "s"
    assert "Did you mean 'cluster'" in call("spec", "clusters").stderr


def test_sweep_passes_on_its_options(monkeypatch, tmp_path) -> None:
    calls: list = []

    def sweep(notebook, grid, **options):
        calls.append((notebook, grid, options))
        with Run.create(ExperimentSpec(), "sweep", tmp_path) as run:
            run.update(results={"summary": ["Two."]})
        if options["resume"]:
            run.finish("failed", "1 of 2 notebooks failed.")
        return run

    monkeypatch.setattr("qtx_lab.experiments.sweeps.sweep", sweep)
    (tmp_path / "cluster.yaml").write_text("kind: local\nnum_workers: 3\n")
    words = ["sweep", "x", "-g", "n=1,2.5,true", "-g", "name=a,[b, c]", "-p", "rate", "0.5", "--repeats", 3]
    result = call(*words, "--cluster", tmp_path / "cluster.yaml")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].endswith("report.html")
    notebook, grid, options = calls[0]
    assert notebook == "x"
    meant = {name: [value_of(word, {}) for word in words] for name, words in grid.items()}
    assert meant == {"n": [1, 2.5, True], "name": ["a", ["b", "c"]]}
    assert value_of(options["parameters"], {}) == {"rate": 0.5}
    assert (options["repeats"], options["cluster"].num_workers) == (3, 3)
    assert call(*words, "--cluster", "tcp://127.0.0.1:8786", "--resume").exit_code == 1
    assert calls[1][2]["cluster"] == "tcp://127.0.0.1:8786"
    call(*words, "--cluster", "localhost:8786", "--cell-timeout", "3", "--keep-going")
    assert calls[2][2]["limits"] == ExecutionLimits(cell_seconds=3, keep_going=True)
    assert calls[2][2]["cluster"] == "tcp://localhost:8786"
    for bad in (
        ["-g", "n"],
        ["-g", "n="],
        ["-g", "n=[1"],
        ["-g", "n=1", "-g", "n=2"],
        ["--cluster", "nowhere.yaml"],
        ["--timeout", "0"],
    ):
        refused = call("sweep", "x", *bad)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 2), bad  # what it does, and the error


def test_all_notebooks_run_even_if_one_fails(monkeypatch, tmp_path) -> None:
    listed = call("notebooks").stdout.splitlines()
    assert any(line.endswith("00_quickstart.ipynb") for line in listed)
    seen = []

    def run_notebook(path, **options):
        seen.append(path.stem)
        if path.stem == "02_circuits":
            raise RunFailed("02_circuits.ipynb stopped")
        with Run.create(ExperimentSpec(), "trial", tmp_path) as run:
            return run

    monkeypatch.setattr("qtx_lab.experiments.notebooks.run_notebook", run_notebook)
    result = call("notebooks", "--full")
    assert result.exit_code == 1
    assert len(seen) == len(listed)
    assert "1 notebook(s) failed: 02_circuits" in result.stderr


def test_long_commands_say_what_they_do_before_imports_that_take_a_second() -> None:
    code = """
import sys
import click
from qtx_lab.cli import main

class Said(BaseException):
    pass

def echo(text, err=False):
    raise Said(text, err, sorted({"torch", "pandas", "numpy", "scipy", "qiskit"} & sys.modules.keys()))

click.echo = echo
for command in (["bench", "samplers"], ["demo"], ["sweep", "x", "-g", "a=1"], ["train"]):
    try:
        main(command, standalone_mode=False)
    except Said as said:
        print(*said.args, sep="|")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert len(lines) == 4, done
    assert all((err, loaded) == ("True", "[]") for _, err, loaded in lines), lines
    words = ("up to three minutes", "about a minute", "time left", "time left")
    assert all(word in text for word, (text, *_) in zip(words, lines, strict=True)), lines
