"""Commands that run notebooks: `demo`, `run`, `sweep`, `notebooks`; and `spec`, which says what they take."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ArgumentError, RunFailed
from .group import one_line
from .options import (
    CommaList,
    fresh_option,
    home_option,
    limit_options,
    parameter_options,
    read_grid,
    read_limits,
    read_parameters,
    read_space,
)
from .printing import announce, print_run

if TYPE_CHECKING:
    from ..specs import ClusterSpec


@click.command()
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
    """Run the quickstart on real text and write its report.

    It takes less than a minute on two quiet cores. The last line printed is the report's path. A text must be
    at least one byte longer than a window.
    """
    text = options["text"] or "the shipped text"
    announce(f"Runs the quickstart on {text}: about a minute on two cores. The bar shows the time left.")
    from ..experiments.notebooks import run_notebook
    from ..specs import ExperimentSpec

    spec = ExperimentSpec(**{name: value for name, value in options.items() if value is not None})
    run = run_notebook("00_quickstart", spec, home=home, name="demo", fresh=True)
    print_run(run.path, run.manifest)


@click.command()
@click.argument("notebook")
@parameter_options
@click.option("--name", help="Name of the run [default: the notebook's].")
@limit_options
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
    """Execute a notebook in a run folder.

    NOTEBOOK is a file, or the name of a shipped notebook. The last line printed is the path of the report.
    """
    from ..experiments.notebooks import run_notebook

    limits = read_limits(timeout, cell_timeout, max_output, keep_going)
    given = read_parameters(parameters, texts, files)
    finished = run_notebook(notebook, given, home=home, name=name, limits=limits, fresh=fresh)
    print_run(finished.path, finished.manifest)


@click.command()
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
@click.option("--objective", metavar="NAME", help="With --search: the result to minimise.")
@click.option("--maximize", is_flag=True, help="With --search: maximise the objective instead.")
@click.option("--trials", type=int, help="With --search: combinations that are tried [default: 40].")
@click.option(
    "--resume",
    is_flag=True,
    help="Run only notebooks that no earlier sweep has done, with any version of qtx_lab's code.",
)
@limit_options
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
    """Run a notebook for every combination of values.

    NOTEBOOK is a file, or the name of a shipped notebook. The last line printed is the path of the report.

    With --search, combinations are proposed one after the other, and with --repeats of 2 or more each is
    stopped as soon as its 95 % interval excludes the best one.
    """
    values = " × ".join((*grid, *space)) or "no values"
    at_a_time = _how_many(options["workers"], cluster)
    announce(
        f"Runs {notebook} for {values}, repeats: {options['repeats']}, {at_a_time}. After the first has "
        "ended the bar shows the time left."
    )
    from ..experiments.sweeps import sweep as run_sweep
    from ..specs import ClusterSpec

    place: ClusterSpec | str | None = cluster
    if cluster is not None and "://" not in cluster:
        cluster = os.path.expanduser(cluster)
        is_address = not os.path.exists(cluster) and re.fullmatch(r"[^/\s]+:\d+", cluster)
        place = f"tcp://{cluster}" if is_address else ClusterSpec.from_yaml(Path(cluster))
    limits = read_limits(*(options.pop(n) for n in ("timeout", "cell_timeout", "max_output", "keep_going")))
    options |= {"parameters": read_parameters(parameters, texts, files), "cluster": place, "home": home}
    options |= {"limits": limits}
    if space:
        from ..experiments.search import search

        if grid or measure is not None or objective is None or options.pop("fresh"):
            raise ArgumentError("--search needs --objective, and excludes -g, --measure and --fresh.")
        finished = search(
            notebook,
            read_space(space),
            objective,
            maximize=maximize,
            trials=40 if trials is None else trials,
            **options,
        )
    elif objective is not None or maximize or trials is not None:
        raise ArgumentError("--objective, --maximize and --trials belong to --search.")
    else:
        finished = run_sweep(notebook, read_grid(grid), measure=measure, **options)
    print_run(finished.path, finished.manifest)
    if finished.status != "done":
        sys.exit(1)


def _how_many(workers: int | None, cluster: str | None) -> str:
    """How many notebooks of a sweep run at a time, in words."""
    if cluster is not None:
        return "one on each worker of the cluster at a time"
    if workers is None:
        return "one on each core at a time"
    return "one at a time" if workers == 1 else f"{workers} at a time"


@click.command()
@click.option("--full", is_flag=True, help="Execute each with its default parameters, one after the other.")
@home_option
def notebooks(full: bool, home: Path | None) -> None:
    """List the shipped notebooks, or execute them all in full."""
    from ..experiments.notebooks import notebooks_folder, run_notebook

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
            click.echo(f"{path.stem}: {one_line(error)}", err=True)
    if failed:
        raise RunFailed(f"{len(failed)} notebook(s) failed: {', '.join(failed)}.")


@click.command()
@click.argument("kind")
def spec(kind: str) -> None:
    """Print the JSON schema of a kind of spec.

    It has the fields of the spec with their bounds, units and help texts.

    KIND is experiment, sampler, control, circuit, mitigation, train, cluster, notebook, sweep or search.
    """
    from ..errors import unknown_name
    from ..specs import SPECS

    if kind not in SPECS:
        raise unknown_name("kind", kind, SPECS)
    click.echo(json.dumps(SPECS[kind].model_json_schema(), indent=2, ensure_ascii=False))
