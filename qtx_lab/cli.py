"""The command line, `qtx-lab`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from . import __version__
from .errors import ArgumentError, BackendUnavailable, QtxError, RunFailed, StorageError
from .storage import runs_home


def _one_line(error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    text = f"{error} ({'; '.join(notes)})" if notes else str(error)
    return " ".join(text.split())


class Commands(click.Group):
    """Commands whose errors are one line and an exit code: 1 a run that failed, 2 what was not allowed."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QtxError as error:
            click.echo(f"error: {_one_line(error)}", err=True)
            ctx.exit(1 if isinstance(error, RunFailed) else 2)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)


class Names(click.ParamType):
    """A list separated by commas."""

    def __init__(self, name: str, item: type):
        self.name = name
        self.item = item

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        try:
            return tuple(self.item(part.strip()) for part in value.split(",") if part.strip())
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
@click.option("--samplers", type=Names("a,b", str), help="Samplers compared.")
@click.option("--sample-counts", type=Names("8,16", int), help="Draws a row at which they are compared.")
@click.option("--sampler", metavar="NAME", help="Sampler of the attention maps.")
@click.option("--layer", type=int, help="Layer whose attention is shown.")
@click.option("--head", type=int, help="Head whose attention is shown.")
@click.option("--num-tokens", type=int, help="Length of a window of text, bytes [default: 512].")
@click.option("--num-windows", type=int, help="Windows over which bits per byte are averaged.")
@click.option("--seed", type=int, help="Seed of every random number.")
@home_option
def demo(home: Path | None, **options: Any) -> None:
    """Run the quickstart on real text and write its report; the last line is the report's path.

    Takes less than a minute on two cores. A text needs at least one byte more than a window has.
    """
    from .experiments.notebooks import run_notebook
    from .specs import ExperimentSpec

    spec = ExperimentSpec(**{name: value for name, value in options.items() if value is not None})
    run = run_notebook("00_quickstart", spec, home=home, name="demo")
    _print_run(run.path, run.manifest)


@main.command()
@click.argument("notebook")
@click.option(
    "-p", "--parameter", "parameters", nargs=2, multiple=True, metavar="NAME VALUE", help="VALUE is YAML."
)
@click.option("--name", help="Name of the run [default: the notebook's].")
@home_option
def run(notebook: str, parameters: tuple[tuple[str, str], ...], name: str | None, home: Path | None) -> None:
    """Execute NOTEBOOK, a file or a shipped one, in a run folder; the last line is the report's path."""
    from .experiments.notebooks import run_notebook

    done = run_notebook(notebook, _parsed(parameters), home=home, name=name)
    _print_run(done.path, done.manifest)


def _parsed(parameters: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    from .specs import read_yaml

    values: dict[str, Any] = {}
    for name, text in parameters:
        if name in values:
            raise ArgumentError(f"-p {name} is given more than once.")
        try:
            values[name] = read_yaml(text)
        except ValueError:
            raise ArgumentError(f"-p {name} {text!r} is not allowed: the value must be valid YAML.") from None
    return values


def _print_run(path: Path, manifest: dict[str, Any]) -> None:
    summary = manifest["results"].get("summary", [])
    for sentence in [summary] if isinstance(summary, str) else summary:
        click.echo(sentence)
    click.echo(f"{manifest['status']} in {manifest['seconds']:.1f} s; report:")
    click.echo(path / "report.html")


@main.command()
@click.argument("notebook")
@click.option(
    "-g", "--grid", "grid", multiple=True, metavar="NAME=A,B", help="Values of a parameter, as YAML."
)
@click.option(
    "-p", "--parameter", "parameters", nargs=2, multiple=True, metavar="NAME VALUE", help="VALUE is YAML."
)
@click.option("--repeats", type=int, default=1, show_default=True, help="Runs of each combination.")
@click.option("--seed", type=int, default=0, show_default=True, help="What the repeats' seeds come from.")
@click.option("--workers", type=int, help="Processes on this machine [default: one a core].")
@click.option(
    "--cluster", metavar="SPEC|ADDRESS", help="A Dask cluster instead: a YAML file, or a scheduler's address."
)
@click.option("--measure", metavar="NAME", help="The result that the figure shows [default: the first].")
@click.option("--resume", is_flag=True, help="Run only what an earlier sweep has not done.")
@home_option
def sweep(
    notebook: str,
    grid: tuple[str, ...],
    parameters: tuple[tuple[str, str], ...],
    cluster: str | None,
    home: Path | None,
    **options: Any,
) -> None:
    """Run NOTEBOOK for every combination of values; the last line is the report's path."""
    from .experiments.sweeps import sweep as run_sweep
    from .specs import ClusterSpec, read_yaml

    values: dict[str, Any] = {}
    for text in grid:
        name, _, listed = text.partition("=")
        if not listed or name in values:
            raise ArgumentError(f"-g {text!r} is not allowed: it must be NAME=A,B, each name once.")
        try:
            values[name] = read_yaml(f"[{listed}]")
        except ValueError:
            raise ArgumentError(f"-g {text!r} is not allowed: the values must be valid YAML.") from None
    where = None
    if cluster is not None:
        where = cluster if "://" in cluster else ClusterSpec.from_yaml(Path(cluster))
    done = run_sweep(notebook, values, parameters=_parsed(parameters), cluster=where, home=home, **options)
    _print_run(done.path, done.manifest)
    if done.status != "done":
        sys.exit(1)


@main.command()
@click.option("--full", is_flag=True, help="Execute each with its own parameters, one after the other.")
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
            done = run_notebook(path, home=home)
            click.echo(f"{path.stem}: done in {done.manifest['seconds']:.1f} s; {done.path / 'report.html'}")
        except RunFailed as error:
            failed.append(path.stem)
            click.echo(f"{path.stem}: {_one_line(error)}", err=True)
    if failed:
        raise RunFailed(f"{len(failed)} notebook(s) failed: {', '.join(failed)}.")


@main.command(name="runs")
@home_option
@click.option("--where", metavar="SQL", help="Only these, as \"status = 'done' and results.coverage > 0.9\".")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--export", type=click.Choice(["csv", "parquet"]), help="Write all columns to standard output.")
@click.option("--mlflow", metavar="URI", help="Copy them to an MLflow server, each once.")
def list_runs(
    home: Path | None, where: str | None, as_json: bool, export: str | None, mlflow: str | None
) -> None:
    """List the runs, newest first."""
    from .experiments.runs import runs

    if sum((as_json, export is not None, mlflow is not None)) > 1:
        raise ArgumentError("--json, --export and --mlflow are not allowed together.")
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

        click.echo(f"{export_to_mlflow(table, mlflow)} of {len(table)} runs copied to {mlflow}.")
    elif table.empty:
        none = "No run fits" if where else "No runs"
        click.echo(f"{none} in {runs_home(home)}{'' if where else ' yet. `qtx-lab demo` makes one'}.")
    else:
        shown = table[["run", "name", "status", "started", "seconds", "path"]].copy()
        shown["started"] = shown["started"].dt.strftime("%Y-%m-%d %H:%M:%S")
        shown["seconds"] = [f"{seconds:.1f}" if seconds == seconds else "" for seconds in shown["seconds"]]
        _print_columns(list(shown.columns), shown.astype(str).to_numpy().tolist())
    for folder, reason in skipped:
        click.echo(f"skipped {folder}: {reason}", err=True)


@main.command()
@click.argument("kind")
def spec(kind: str) -> None:
    """Print the JSON schema of a KIND of spec: its fields, bounds, units and help.

    KIND is experiment, sampler, control, circuit, mitigation, train, cluster, notebook or sweep.
    """
    from .errors import unknown_name
    from .specs import SPECS

    if kind not in SPECS:
        raise unknown_name("kind", kind, SPECS)
    click.echo(json.dumps(SPECS[kind].model_json_schema(), indent=2, ensure_ascii=False))


def _print_columns(names: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


@main.command()
@home_option
@click.option(
    "--fetch", metavar="TAG", help="Wait for a job and write its counts; the last line is the file's path."
)
@click.option("--cancel", metavar="TAG", help="Cancel a job.")
def jobs(home: Path | None, fetch: str | None, cancel: str | None) -> None:
    """List the jobs on devices, newest first, and ask where they are. A part of a TAG will do."""
    from .backends.ibm.jobs import find_jobs
    from .backends.ibm.remote import Unreachable

    asked = [tag for tag in (fetch, cancel) if tag is not None]
    if len(asked) > 1:
        raise ArgumentError("--fetch and --cancel are not allowed together.")
    if "" in asked:
        raise ArgumentError("An empty TAG is not allowed: see `qtx-lab jobs`.")
    with warnings.catch_warnings(record=True) as skipped:
        warnings.simplefilter("always")
        found = find_jobs(home, tag=asked[0] if asked else None)
    for warning in skipped:
        click.echo(f"skipped: {warning.message}", err=True)
    if asked:
        text = asked[0]
        if len(found) != 1:
            raise ArgumentError(
                f"{text!r} is in the tags of {len(found)} jobs; it must be in one's: see `qtx-lab jobs`."
            )
        if cancel is not None:
            found[0].cancel()
            click.echo(f"{found[0].tag} is {found[0].last_known}")
        else:
            click.echo(found[0].save_counts())
        return
    silent, troubles, rows = False, [], []
    for job in found:
        try:
            status, record = job.last_known, job.record
        except StorageError as error:  # gone, or broken, since it was found
            click.echo(f"skipped: {error}", err=True)
            continue
        try:
            status = status if silent else job.status()
        except BackendUnavailable as error:
            silent = isinstance(error, Unreachable)  # each question to a silent server takes long
            troubles.append(f"The server could not be asked; states are those last known. {_one_line(error)}")
        except StorageError as error:
            troubles.append(f"What the server said cannot be kept; states are those last known. {error}")
        run = job.path.parent.parent.name if job.path.parent.parent != runs_home(home) else ""
        size = f"{record.circuits} × {record.shots}"
        rows.append([job.tag, run, record.device, str(status), size, f"{record.recorded:%Y-%m-%d %H:%M:%S}"])
    if rows:
        _print_columns(["tag", "run", "device", "state", "rows × shots", "recorded"], rows)
    else:
        click.echo(f"No jobs in {runs_home(home)}.")
    for trouble in dict.fromkeys(troubles):
        click.echo(trouble, err=True)


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
    # Kernels start in the notebooks' folder, the dashboard here: both are told of one folder of runs.
    home = {"QTX_LAB_HOME": str(runs_home().resolve())}
    done = subprocess.run([*command, *offline, *arguments], env={**os.environ, **home}, check=False)
    sys.exit(done.returncode)


@main.command()
@home_option
@click.option("--port", type=click.IntRange(0, 65_535), help="0: any that is free [default: 5006].")
@click.option(
    "--address", help="Where to listen; a token is needed beyond this machine [default: 127.0.0.1]."
)
@click.option("--token", envvar="QTX_LAB_TOKEN", help="What visitors must give [default: $QTX_LAB_TOKEN].")
@click.option("--prefix", metavar="PATH", help="Path under which a reverse proxy shows it.")
@click.option("--socket", type=click.Path(path_type=Path), help="Listen on this Unix socket, not on a port.")
def dashboard(home: Path | None, **options: Any) -> None:
    """Serve the dashboard of all runs, live and read only, until Ctrl-C; prints its address."""
    from .widgets.dashboard import serve

    given = {name: value for name, value in options.items() if value is not None}
    serve(home, started=click.echo, **given)


class TrainCommand(click.Command):
    """A command with a flag for each field of `TrainSpec`, which is loaded only when it is needed."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from .specs import TrainSpec

        flags = []
        for name, field in TrainSpec.model_fields.items():
            text = f"{field.description} [default: {field.default}]"
            flags.append(click.Option([f"--{name.replace('_', '-')}"], metavar="VALUE", help=text))
        return [*super().get_params(ctx), *flags]


def _flag(kind: Any, text: str) -> Any:
    """What a flag's value means: itself for a text, else YAML, but `none` is nothing, and 1e-3 (YAML: a text) a number."""
    from .specs import read_yaml

    if kind is str or text == "none":
        return text if kind is str else None
    value: Any = text
    with suppress(ValueError):
        value = read_yaml(text)
        value = float(value) if isinstance(value, str) else value
    return value


@main.command(cls=TrainCommand)
@click.argument("spec_file", required=False, metavar="[SPEC.yaml]", type=click.Path(path_type=Path))
@click.option("--preset", type=click.Choice(["reference"]), help="Remake the shipped model, in --out.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the preset's weights and model card."
)
@click.option(
    "--cluster", type=click.Choice(["auto", "local", "cuda", "address"]), help="Train over a cluster."
)
@click.option("--num-workers", type=int, help="Its workers, a rank each.")
@click.option("--address", help="Of its scheduler, with --cluster address.")
@click.option("--resume", metavar="RUN", help="Go on with a training that was stopped.")
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
    name: str,
    home: Path | None,
    **flags: str | None,
) -> None:
    """Train a model as SPEC.yaml and the flags say, in a run folder; the last line is the report's path.

    A flag sets a field of the spec, over what SPEC.yaml says. Without --cluster, in one process.
    """
    from .specs import ClusterSpec, TrainSpec

    kinds = {name: field.annotation for name, field in TrainSpec.model_fields.items()}
    given = {name: _flag(kinds[name], text) for name, text in flags.items() if text is not None}
    if preset is not None or out is not None:
        others = (spec_file, cluster, num_workers, address, resume, home)
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
        if given or spec_file:
            raise ArgumentError("--resume goes on under the run's own spec: leave the others out.")
        done = train_run(cluster=where, home=home, resume=resume)
    else:
        base = {} if spec_file is None else TrainSpec.from_yaml(spec_file).to_parameters()
        done = train_run(TrainSpec.from_parameters({**base, **given}), cluster=where, home=home, name=name)
    _print_run(done.path, done.manifest)


@main.command()
@click.argument("name")
@click.option("--quick", is_flag=True, help="Fewer repetitions and smaller cases.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write a file.")
def bench(name: str, quick: bool, json_path: Path | None) -> None:
    """Measure NAME side by side with what one would use instead.

    NAME is samplers, estimators, decode, model, circuits, mitigation, sweep, training or kernels.
    """
    from .bench.base import run_bench

    run_bench(name, quick=quick, json_path=json_path)


if __name__ == "__main__":
    main()
