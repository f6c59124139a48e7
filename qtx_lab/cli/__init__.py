"""The command line, `qtx-lab`. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

import click

from .. import __version__
from .benchmarks import bench
from .browser import dashboard, docs, lab
from .device_jobs import jobs
from .group import Commands
from .models import calibrate, lm_eval, model
from .records import diff, list_runs, replay, report
from .running import demo, notebooks, run, spec, sweep
from .training import train


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="qtx-lab")
def main() -> None:
    """A research workbench for sampled attention."""


for command in (demo, run, sweep, notebooks, spec, list_runs, replay, diff, report, train):
    main.add_command(command)
for command in (model, calibrate, lm_eval, jobs, lab, dashboard, docs, bench):
    main.add_command(command)
