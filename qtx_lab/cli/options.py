"""Options that several commands share, and what the words given to them mean."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ArgumentError

if TYPE_CHECKING:
    from ..experiments.notebook_execution import ExecutionLimits


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


class HomePath(click.Path):
    """A path in which `~` is a home; a shell leaves it as it is in `--out=~/model`."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The path of a text."""
        return super().convert(os.path.expanduser(value), param, ctx)


home_option = click.option(
    "--home", type=HomePath(), help="Folder of runs [default: $QTX_LAB_HOME, else ./runs]."
)

fresh_option = click.option(
    "--fresh", is_flag=True, help="Run it even if there is a result of the same spec, code and inputs."
)


def parameter_options(command: Any) -> Any:
    """The options of a command that gives parameters to a notebook."""
    for option in (
        click.option(
            "-f", "--parameters-file", "files", multiple=True, type=HomePath(),
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


def limit_options(command: Any) -> Any:
    """The options of a command that say what a notebook may take; see `read_limits`."""
    for option in (
        click.option(
            "--keep-going", is_flag=True, help="Continue with the next cell after one that failed.",
        ),
        click.option(
            "--max-output", type=float, default=16, show_default=True, metavar="MIB",
            help="Output of a cell that the executed notebook keeps.",
        ),
        click.option(
            "--cell-timeout", type=float, metavar="S", help="Seconds that a cell may take at most.",
        ),
        click.option(
            "--timeout", type=float, metavar="S", help="Seconds that a notebook may take at most.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def read_limits(
    timeout: float | None, cell_timeout: float | None, max_output: float, keep_going: bool
) -> ExecutionLimits:
    """The limits that the options of `limit_options` state."""
    from ..experiments.notebook_execution import ExecutionLimits

    if not 0 < max_output < math.inf:
        raise ArgumentError(f"--max-output {max_output:g} is not allowed: it must be above 0 and finite.")
    return ExecutionLimits(cell_timeout, timeout, math.ceil(max_output * 2**20), keep_going)


def read_parameters(
    words: tuple[tuple[str, str], ...], texts: tuple[tuple[str, str], ...], files: tuple[Path, ...]
) -> dict[str, Any]:
    """The values of `-f FILE`, `-p NAME VALUE` and `-r NAME TEXT` options; later kinds override a file."""
    from ..specs import Word, read_words

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


def read_grid(options: tuple[str, ...]) -> dict[str, Any]:
    """The values of `-g NAME=A,B` options."""
    from ..specs import split_words

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


def read_space(options: tuple[str, ...]) -> dict[str, str]:
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


def read_flag(kind: Any, text: str) -> Any:
    """The value of a flag, as the type of its field takes what is typed."""
    from pydantic import TypeAdapter

    from ..specs import Word, value_of

    return value_of(Word(text), TypeAdapter(kind).json_schema())
