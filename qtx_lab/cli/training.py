"""The command `train`, which has a flag for each field of a training's spec."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from ..errors import ArgumentError
from .options import HomePath, home_option, read_flag
from .printing import announce, print_run


class TrainCommand(click.Command):
    """A command with a flag for each field of `TrainSpec`, which is imported only when it is needed."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, and a flag for each field."""
        from ..specs import TrainSpec

        flags = []
        for name, field in TrainSpec.model_fields.items():
            text = f"{field.description} [default: {field.default}]"
            flags.append(click.Option([f"--{name.replace('_', '-')}"], metavar="VALUE", help=text))
        return [*super().get_params(ctx), *flags]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Say what is trained, before the flags are read, whose names take seconds of imports."""
        if any(word.startswith("--preset") for word in args):
            announce("Trains a shipped model again: hours on two cores.")
        elif "--help" not in args:
            what = shlex.join(args) or "the default settings"
            announce(
                f"Trains a model by {what}. After some steps the bar shows the time left; Ctrl-C keeps them."
            )
        return super().parse_args(ctx, args)


@click.command(cls=TrainCommand)
@click.argument("spec_file", required=False, metavar="[SPEC.yaml]", type=HomePath())
@click.option("--preset", type=click.Choice(["reference"]), help="Train the shipped model again, into --out.")
@click.option("--out", type=HomePath(), help="Folder for the preset's weights and model card.")
@click.option(
    "--cluster", type=click.Choice(["auto", "local", "cuda", "address"]), help="Train on a cluster."
)
@click.option("--num-workers", type=int, help="Number of workers of the cluster, each with one rank.")
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
    """Train a model in a run folder.

    SPEC.yaml and the flags hold the settings: a flag sets a field of the spec and overrides SPEC.yaml. The
    last line printed is the path of the report. Without --cluster, training uses one process.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 let the step end, write a checkpoint, and exit with 130, 143, 129 and
    138. The same command with --continue then continues from the checkpoint. A SLURM job that may be stopped
    for another one, or may run out of time, asks for the signal and is queued again by these lines:

    \b
        #SBATCH --requeue --signal=USR1@120
        srun qtx-lab train spec.yaml --name job-$SLURM_JOB_ID --continue
        if [ $? -eq 138 ]; then scontrol requeue $SLURM_JOB_ID; fi
    """
    from ..specs import ClusterSpec, TrainSpec

    kinds = {name: field.annotation for name, field in TrainSpec.model_fields.items()}
    given = {name: read_flag(kinds[name], text) for name, text in flags.items() if text is not None}
    if preset is not None or out is not None:
        others = (spec_file, cluster, num_workers, address, resume, home, continue_stopped or None)
        if preset is None or out is None or given or any(x is not None for x in others):
            raise ArgumentError("--preset and --out go together, and with nothing else.")
        from ..training.reference_training import train_reference

        train_reference(out)
        return
    from ..experiments.training_run import train_run

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
    print_run(finished.path, finished.manifest)
