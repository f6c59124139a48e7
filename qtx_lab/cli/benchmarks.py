"""The command `bench`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import HomePath
from .printing import announce


@click.command()
@click.argument("name")
@click.option("--quick", is_flag=True, help="Fewer repetitions and smaller cases.")
@click.option("--json", "json_path", type=HomePath(), help="File to which the result is also written.")
def bench(name: str, quick: bool, json_path: Path | None) -> None:
    """Measure a method side by side with the alternatives to it.

    NAME is samplers, estimators, coverage, tolerance, guarantee, decode, model, llm, tasks, circuits,
    softmax_circuit, orthogonal, amplitude, mitigation, mitigated_rows, sweep, training, kernels, llm_rows or
    lossless.
    """
    times = "up to three minutes" if quick else "minutes, for llm hours; --quick takes up to three minutes"
    announce(f"Measures {name} on this machine: {times}. Each case is printed when it is done.")
    from ..bench.base import run_bench

    try:
        run_bench(name, quick=quick, json_path=json_path)
    except KeyboardInterrupt as error:
        error.add_note("The tables above are complete; nothing else is kept.")
        raise
