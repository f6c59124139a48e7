"""The command `jobs`: jobs on devices."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import ArgumentError, BackendUnavailable, StorageError
from ..storage import runs_home
from .group import one_line
from .options import home_option
from .printing import print_columns

if TYPE_CHECKING:
    from ..backends.ibm.jobs import DeviceJob


@click.command()
@home_option
@click.option(
    "--fetch",
    metavar="TAG",
    help="Wait for a job and write its counts; the last line printed is the file's path.",
)
@click.option("--cancel", metavar="TAG", help="Cancel a job.")
def jobs(home: Path | None, fetch: str | None, cancel: str | None) -> None:
    """List the jobs on IBM's devices, newest first.

    The list has their present states. For TAG, a part of a job's tag is enough.
    """
    from ..backends.ibm.jobs import find_jobs

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
    from ..backends.ibm.remote import Unreachable

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
            problems.append(f"The server could not be asked; states are those last known. {one_line(error)}")
        except StorageError as error:
            problems.append(
                f"The server's answer could not be recorded; states are those last known. {error}"
            )
        folder = job.path.parent.parent
        run = "" if folder == home else folder.name
        size = f"{record.circuits} × {record.shots}"
        rows.append([job.tag, run, record.device, str(status), size, f"{record.recorded:%Y-%m-%d %H:%M:%S}"])
    if rows:
        print_columns(["tag", "run", "device", "state", "rows × shots", "recorded"], rows)
    else:
        click.echo(f"No jobs in {home}.")
    for problem in dict.fromkeys(problems):
        click.echo(problem, err=True)
