"""Variable tracking: variables that stand for other variables, hidden in documentation, are resolved.

Source: Hsieh et al., RULER (2024), §3.2. There a model is to name every variable that a value has reached;
here it writes down the steps from a variable to its value, which small models can do, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from .base import Draft, Request, Task, TextModel, check_setting, fit
from .haystack import haystack
from .words import NOUNS


@dataclass(frozen=True)
class VariableTracking(Task):
    """Chains such as "VAR lamp = 4821." and "VAR river = VAR lamp."; the steps from `river` are asked for.

    The steps of another chain, which is hidden too, are given as an example.

    Parameters
    ----------
    chains : int
        Beside that of the example, 1 to 16.
    steps : int
        From the variable that is asked for to the one that has a value, 0 to 4.
    digits : int
        Of a value, 2 to 15.
    """

    name: ClassVar[str] = "variable-tracking"
    chains: int = 2
    steps: int = 1
    digits: int = 4

    def __post_init__(self) -> None:
        check_setting("chains", self.chains, 1, 16)
        check_setting("steps", self.steps, 0, 4)
        check_setting("digits", self.digits, 2, 15)

    def draft(self, model: TextModel, length: int, random: Random) -> Draft:
        """The statements of each chain stand in its order, those of different chains in any."""
        size = self.steps + 1
        names = random.sample(NOUNS, (self.chains + 1) * size)
        values = random.sample(range(10 ** (self.digits - 1), 10**self.digits), self.chains + 1)
        chains = [[str(value), *(names.pop() for _ in range(size))] for value in values]
        order = [chain for chain in range(len(chains)) for _ in range(size)]
        random.shuffle(order)
        progress = [iter(assignments(chain)) for chain in chains]
        asked, *path = reversed(chains[0])
        pieces: list[tuple[str, bool]] = []
        for name in path[:-1]:
            pieces += [(" VAR", False), (f" {name}", True), (f". VAR {name} =", False)]
        example = " ".join(reversed(assignments(chains[-1])))
        request = Request(
            instruction="Variables are given values in the following text.",
            question=f"The value of VAR {chains[-1][-1]}: {example}\nThe value of VAR {asked}: VAR {asked} =",
            opening="",
            pieces=(*pieces, (f" {path[-1]}", True)),
            answers=tuple(path),
            filling=haystack(model, [next(progress[chain]) for chain in order], random),
            chat=False,
        )
        return fit(self.name, model, length, request)


def assignments(chain: list[str]) -> list[str]:
    """The statements that pass the first of a chain, a value, on to each of its variables.

    >>> assignments(["4821", "lamp", "river"])
    ['VAR lamp = 4821.', 'VAR river = VAR lamp.']
    """
    sources = [chain[0], *(f"VAR {name}" for name in chain[1:-1])]
    return [f"VAR {name} = {source}." for name, source in zip(chain[1:], sources, strict=True)]
