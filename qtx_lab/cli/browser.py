"""Commands that open or serve pages: `lab`, `dashboard`, `docs`."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from ..errors import ArgumentError
from ..storage import runs_home
from .options import HomePath, home_option

JUPYTER_CONFIG = Path(__file__).parent / "jupyter"
"""A folder of Jupyter's configuration: JupyterLab asks nobody whether they want news."""


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[JUPYTER ARGUMENTS]...")
def lab(arguments: tuple[str, ...]) -> None:
    """Start JupyterLab on the shipped notebooks."""
    from ..experiments.notebooks import notebooks_folder

    defaults = {
        "ServerApp.root_dir": str(notebooks_folder()),
        "LabApp.news_url": "None",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }
    # JupyterLab refuses an option that is given twice.
    given = {argument.lstrip("-").partition("=")[0] for argument in arguments if argument.startswith("--")}
    if "notebook-dir" in given:  # another name of it
        del defaults["ServerApp.root_dir"]
    options = [f"--{name}={value}" for name, value in defaults.items() if name not in given]
    # Kernels start in the notebooks' folder and the dashboard in this one: both get the same folder of runs.
    home = {"QTX_LAB_HOME": str(runs_home().resolve())}
    # What `news_url` turns off is the news; the question whether one wants them is a setting.
    paths = [*filter(None, [os.environ.get("JUPYTER_CONFIG_PATH")]), str(JUPYTER_CONFIG)]
    config = {"JUPYTER_CONFIG_PATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "jupyterlab", *options, *arguments]
    process = subprocess.run(command, env=os.environ | home | config, check=False)
    sys.exit(process.returncode)


@click.command()
@home_option
@click.option("--port", type=click.IntRange(0, 65_535), help="Port; 0 means any free one [default: 5006].")
@click.option(
    "--address", help="Address to listen at; beyond this machine a token is needed [default: 127.0.0.1]."
)
@click.option(
    "--token", envvar="QTX_LAB_TOKEN", help="Token that visitors must give [default: $QTX_LAB_TOKEN]."
)
@click.option("--prefix", metavar="PATH", help="Path under which a reverse proxy serves it.")
@click.option("--socket", type=HomePath(), help="Unix socket to listen at instead of a port.")
def dashboard(home: Path | None, **options: Any) -> None:
    """Serve the dashboard of all runs, live, until Ctrl-C.

    The command prints its address. The dashboard writes nothing but tags and notes of runs, and those only
    for visitors who have given a token or come through JupyterLab.
    """
    from ..widgets.dashboard.starting import starting_page

    given = {name: value for name, value in options.items() if value is not None}
    with ExitStack() as stack:
        served = stack.enter_context(starting_page(given["socket"])) if "socket" in given else None

        def started(address: str) -> None:
            if served is not None:
                served.set()
            click.echo(address)

        from ..widgets.dashboard.server import serve

        serve(home, started=started, **given)


@click.command()
def docs() -> None:
    """Open the documentation that `make docs` has built.

    It opens in the browser, and its path is printed.
    """
    from ..experiments.notebooks import PACKAGE

    page = PACKAGE.parent / "build" / "docs" / "index.html"
    if not (PACKAGE.parent / "notebooks" / "conf.py").is_file():
        raise ArgumentError(
            "The documentation is built in a checkout of qtx_lab; this installation is not one."
        )
    if not page.is_file():
        raise ArgumentError(f"{page} is not there: build it with `make docs`.")
    click.echo(page)
    click.launch(page.as_uri())
