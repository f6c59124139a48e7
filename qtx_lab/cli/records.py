"""Commands about runs that were made: `runs`, `replay`, `diff`, `report`."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ArgumentError, StorageError
from ..storage import json_bytes, runs_home
from .group import one_line
from .options import HomePath, home_option
from .printing import print_columns, printable

if TYPE_CHECKING:
    from ..experiments.listing import RunTable


@click.command(name="runs")
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
    type=HomePath(),
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
    from ..experiments.runs import runs

    if sum((as_json, export is not None, mlflow is not None, ro_crate is not None)) > 1:
        raise ArgumentError("--json, --export, --mlflow and --ro-crate are not allowed together.")
    if license is not None and ro_crate is None:
        raise ArgumentError("--license belongs to --ro-crate.")
    if export == "parquet" and sys.stdout.isatty():
        raise ArgumentError("--export parquet is not for a terminal: redirect it, as `> runs.parquet`.")
    table = runs(home, where=where)
    skipped, complete = table.attrs["skipped"], True
    if as_json:
        left_out = [{"folder": folder, "reason": reason} for folder, reason in skipped]
        click.echo(json_bytes({"runs": _records(table), "skipped": left_out}), nl=False)
        return
    if export is not None:
        click.echo(table.export(export), nl=False)
    elif mlflow is not None:
        complete = _copy_to_mlflow(table, mlflow)
    elif ro_crate is not None:
        complete = _write_crates(table, ro_crate, license)
    elif table.empty:
        if where:
            click.echo(f"No run fits in {runs_home(home)}.")
        else:
            click.echo(f"No runs in {runs_home(home)} yet. `qtx-lab demo` makes one.")
    else:
        _print_runs(table)
    for folder, reason in skipped:
        click.echo(f"skipped {printable(folder)}: {printable(reason)}", err=True)
    if not complete:
        sys.exit(1)


def _records(table: RunTable) -> list[dict[str, Any]]:
    """The rows of a table by column, with all digits of their numbers: pandas' own JSON rounds them."""
    columns = table.assign(started=table["started"].dt.strftime("%Y-%m-%dT%H:%M:%S.%f").str[:-3] + "Z")
    cells = columns.astype("object")
    return cells.where(cells.notna(), None).to_dict("records")


def _print_runs(table: RunTable) -> None:
    """Print a table of runs."""
    columns = table[["run", "name", "status", "started", "seconds", "path"]].copy()
    columns["started"] = columns["started"].dt.strftime("%Y-%m-%d %H:%M:%S")
    columns["seconds"] = ["" if math.isnan(seconds) else f"{seconds:.1f}" for seconds in columns["seconds"]]
    print_columns(list(columns.columns), columns.astype(str).to_numpy().tolist())


def _copy_to_mlflow(table: RunTable, uri: str) -> bool:
    """Copy runs to an MLflow server, print what came of it, and return whether all were copied."""
    from ..experiments.mlflow_export import export_to_mlflow

    exported = export_to_mlflow(table, uri)
    for name, reason in exported.problems.items():
        click.echo(f"not copied: {name}: {reason}", err=True)
    click.echo(f"Of {len(table)} runs {exported} ({uri}).")
    return not exported.problems


def _write_crates(table: RunTable, folder: Path, license: str | None) -> bool:
    """Write the runs that have ended as RO-Crates, print the paths, and return whether all were written."""
    from ..experiments.ro_crate_export import export_to_ro_crate
    from ..experiments.runs import Run

    complete = True
    for row in table.itertuples():
        if row.status == "running":
            click.echo(f"not exported: {row.run}: it is still running", err=True)
            continue
        try:
            click.echo(export_to_ro_crate(Run(Path(row.path)), folder, license=license))
        except StorageError as error:
            click.echo(f"not exported: {row.run}: {one_line(error)}", err=True)
            complete = False
            if not (folder.is_dir() and os.access(folder, os.W_OK)):  # the fault is not the run's
                break
    return complete


@click.command()
@click.argument("run")
@click.option(
    "--install",
    is_flag=True,
    help="Run it in a new environment, into which pip installs the package versions of the original run.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@home_option
def replay(run: str, install: bool, as_json: bool, home: Path | None) -> None:
    """Run a run again and compare its metrics.

    RUN is a folder, or part of its name. Every metric is compared that is not a time.

    The exit code is 1 if a metric is neither equal bit for bit nor within its interval.
    """
    from dataclasses import asdict

    from ..experiments.replays import environment_differences
    from ..experiments.replays import replay as run_again
    from ..experiments.runs import find_run

    original = find_run(run, home)
    differing = environment_differences(original)
    if differing and not as_json:
        click.echo(f"{len(differing)} of the versions of the original run differ from those installed now:")
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


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@home_option
def diff(a: str, b: str, as_json: bool, home: Path | None) -> None:
    """Show where two runs differ.

    Their specs, code, environments, inputs and metrics are compared. A and B are folders, or parts of their
    names.
    """
    from dataclasses import asdict

    from ..experiments.run_comparison import compare_runs

    comparison = compare_runs(a, b, home)
    click.echo(json.dumps(asdict(comparison), indent=2) if as_json else comparison)


@click.command()
@click.argument("run")
@home_option
def report(run: str, home: Path | None) -> None:
    """Write the report of a run again and print its path.

    RUN is a folder, or part of its name.
    """
    from ..experiments.report import write_report
    from ..experiments.runs import find_run

    click.echo(write_report(find_run(run, home)))
