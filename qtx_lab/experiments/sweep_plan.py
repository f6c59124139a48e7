"""What a sweep will run: a notebook for every combination of values, all checked before any work."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import MAX_SEED, check_count
from ..errors import ArgumentError, SpecError
from ..specs import NotebookSpec, Spec, SweepSpec, Word, listed_word, value_of
from .notebook_code import canonical, cell_key, code_hash
from .notebooks import declared_parameters, notebook_kind, notebook_spec, parameter_schema, parameter_words
from .parameters import Parameter


@dataclass(frozen=True)
class PlannedNotebook:
    """One notebook of a sweep.

    Parameters
    ----------
    spec : Spec
        The spec of its run.
    repeat : int
        The number of the repeat, from 0.
    key : str
        A hash of the notebook's code cells, their tags and its parameters, equal in all sweeps.
    """

    spec: Spec
    repeat: int
    key: str


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will run: its spec, and each notebook."""

    spec: SweepSpec
    notebooks: list[PlannedNotebook]


def plan(
    path: Path,
    grid: Mapping[str, Sequence[Any]],
    *,
    parameters: Mapping[str, Any] | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> SweepPlan:
    """What a sweep will run, checked as a whole; arguments and errors as of `sweep`."""
    repeats, seed = check_count("repeats", repeats), check_count("seed", seed, 0, MAX_SEED)
    fixed = dict(parameters or {})
    declared = declared_parameters(path)
    checked: dict[str, list[Any]] = {}
    for name, values in grid.items():
        checked[name] = listed_values(path, declared, name, values)
        _check_values(name, checked[name])
        if name in fixed:
            raise ArgumentError(f"{name!r} is in the grid and in the parameters: give it once.")
    fixed = {name: listed_values(path, declared, name, [value])[0] for name, value in fixed.items()}
    seeded = "seed" in declared and "seed" not in grid and "seed" not in fixed
    if repeats > 1 and not seeded:
        why = "has no parameter `seed`" if "seed" not in declared else "is given its seed"
        raise ArgumentError(f"repeats={repeats} is not allowed: {path.name} {why}, so all would be the same.")
    digest = code_hash(path)
    spec = SweepSpec(
        notebook=path.stem, sha256=digest, grid=checked, parameters=fixed, repeats=repeats, seed=seed
    )
    notebooks = []
    for repeat in range(repeats):  # of all combinations, so that an early figure shows all of them
        for values in itertools.product(*spec.grid.values()):
            given = {**spec.parameters, **dict(zip(spec.grid, values, strict=True))}
            if seeded:
                given["seed"] = repeat_seed(seed, repeat)
            try:
                of_notebook = notebook_spec(path, declared, given)
            except SpecError as error:
                shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if name in spec.grid)
                raise SpecError(f"{error} (at {shown or 'the only combination'})") from None
            key = cell_key(path, of_notebook)
            notebooks.append(PlannedNotebook(of_notebook, repeat, key))
    return SweepPlan(spec, notebooks)


def listed_values(path: Path, declared: Mapping[str, Parameter], name: str, values: object) -> list[Any]:
    """The values of a parameter as it takes them; they are checked together with all others later."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ArgumentError(f"grid[{name!r}]={values!r} is not allowed: it must be a list of values.")
    if name not in declared:
        return [value_of(value, {}) for value in values]
    schema = parameter_schema(path, declared, name)
    if all(option.get("type") == "array" for option in schema.get("anyOf", [schema])):
        values = [value if _is_list(value) else [value] for value in values]
    if notebook_kind(path) is NotebookSpec:
        return [declared[name].taken(value) for value in values]
    return [value_of(value, schema) for value in values]


def _is_list(value: object) -> bool:
    """Whether a value, or the word that was typed for it, is a list."""
    if isinstance(value, str):
        return isinstance(value, Word) and value.strip().startswith(("[", "!", "-"))
    return isinstance(value, Sequence)


def _check_values(name: str, values: list[Any]) -> None:
    """Refuse values of a grid that are not distinct."""
    texts = [canonical(value) for value in values]
    for value, text in zip(values, texts, strict=True):
        if texts.count(text) > 1:
            raise ArgumentError(
                f"grid[{name!r}]={list(values)!r} is not allowed: {value!r} is named more than once."
            )


def repeat_seed(seed: int, repeat: int) -> int:
    """The seed of a repeat, of 52 bits, so that JavaScript and floats hold it exactly.

    >>> repeat_seed(0, 0) == repeat_seed(0, 0) != repeat_seed(0, 1)
    True
    """
    word = np.random.SeedSequence(seed, spawn_key=(repeat,)).generate_state(1, np.uint64)[0]
    return int(word >> np.uint64(12))


def sweep_command(notebook: str | Path, path: Path, spec: SweepSpec) -> str:
    """What to type to run this sweep again."""
    declared = declared_parameters(path)
    words = ["qtx-lab", "sweep", str(notebook)]
    for name, values in spec.grid.items():
        schema = parameter_schema(path, declared, name)
        words += ["-g", f"{name}={','.join(listed_word(value, schema) for value in values)}"]
    words += parameter_words(path, declared, spec.parameters)
    return shlex.join([*words, "--repeats", str(spec.repeats), "--seed", str(spec.seed)])
