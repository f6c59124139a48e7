"""`SweepSpec` and `SearchSpec`: a notebook that is run for many combinations of values, several times."""

from __future__ import annotations

from pydantic import JsonValue

from .base import Spec
from .fields import MAX_SEED, Switch, Whole, field


class SweepSpec(Spec):
    """A notebook that is run for every combination of values, several times."""

    notebook: str = field(
        ..., "The notebook's name, without its folder and ending.", "name", "notebook", min_length=1
    )
    sha256: str = field(
        ...,
        "Hash of the notebook's code cells and their tags: other code is another sweep.",
        "hash",
        "notebook",
        pattern="[0-9a-f]{64}",
    )
    grid: dict[str, tuple[JsonValue, ...]] = field(
        {}, "Values by parameter; every combination of them is run.", "values", "grid"
    )
    parameters: dict[str, JsonValue] = field(
        {}, "Parameters that are the same in every run.", "values", "grid"
    )
    repeats: Whole = field(
        1, "Runs of each combination, each with a seed of its own.", "runs", "grid", ge=1, le=65_536
    )
    seed: Whole = field(
        0, "The number from which the seeds of the repeats are derived.", "number", "grid", ge=0, le=MAX_SEED
    )


class SearchSpec(SweepSpec):
    """A notebook that is run for the combinations of values that a search proposes; the grid is empty."""

    space: dict[str, JsonValue] = field(
        {}, "What each parameter may be: a list of values, or a range such as 8..512:log.", "values", "grid"
    )
    objective: str | None = field(
        None, "The number in the results of a notebook that is to be small.", "name", "grid", min_length=1
    )
    maximize: Switch = field(False, "Whether the objective is to be large instead.", "yes or no", "grid")
    trials: Whole = field(40, "Combinations that are tried.", "trials", "grid", ge=1, le=1_000_000)
